"""Names of cells: what arms with the same computation have in common, and a seed.

Knows the config of a run.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Final

from lmjax import strict_json
from lmjax.runs import config as run_config
from lmjax.runs.config import Config

LATER: Final[Mapping[str, Any]] = {"data.labels": ()}
"""Fields that came after cells had names, with the values under which they change nothing."""


def cell_key(config: Config) -> str:
    """Returns the name of a cell: a digest of its config without the seed, and the seed.

    Cells of one arm are adjacent in a listing. Fields that lmjax did not always have are left out
    where they change nothing, so that finished cells keep their names.
    """
    fields = run_config.identity(seedless(config))
    lasting = {name: x for name, x in fields.items() if name not in LATER or x != LATER[name]}
    text = strict_json.dumps(lasting, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:12]}-seed{config.seed}"


def arm_and_seed(key: str) -> tuple[str, int]:
    """What the cells of an arm have in common in their keys, and the seed of this one."""
    arm, _, seed = key.rpartition("-seed")
    return arm, int(seed)


def seedless(config: Config) -> Config:
    """The resolved config with seed 0."""
    return dataclasses.replace(config.resolved(), seed=0)
