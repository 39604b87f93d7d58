"""Defines ablations: arms that differ in named fields, seeds, and their cells.

A cell is one arm with one seed. Its name depends only on its resolved config, so a cell keeps its
results as long as its computation stays the same, whatever changes in other arms, and two arms with
the same computation share their cells.

Knows the config of a run and the files that a cell leaves; nothing of processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from lmjax import checks, strict_json
from lmjax.ablation.keys import cell_key, seedless
from lmjax.checks import above, at_least, validate, validate_value
from lmjax.files.locks import lock
from lmjax.runs import config as run_config
from lmjax.runs.config import Config, Seed, from_json, to_json
from lmjax.runs.metrics import replace_text
from lmjax.runs.run_directory import InputError

if TYPE_CHECKING:
    from lmjax.ablation.statistics import Monitoring

Status = Literal["finished", "failed", "missing"]

DEFINITION = "ablation.json"

MOST_SEEDS = 10_000
"""Maximum number of seeds of an arm: more than any question needs."""


@dataclass(frozen=True)
class Ablation:
    """A question about training, and the runs that answer it.

    Attributes:
      name: of the ablation; letters, digits, `_` and `-`.
      question: what is asked, as a sentence for the report.
      base: the run that all arms are made from; its seed does not count.
      arms: the runs to compare, by name, made from `base` by `dataclasses.replace`.
      varies: dotted config fields in which arms may differ from the base; the name of a part,
        such as `optimizer`, stands for all fields of it.
      control: the arm that others are compared with.
      seeds: each decides initial parameters and order of the data, alike in every arm.
      max_seeds: seeds of an arm at most, where they are added until its question is settled; None:
        `seeds` are all there are.
      seed_counts: arms that have been given more seeds than `seeds`, and how many in all.
      metric: field of `result.json` that is compared; lower is better.
      margin: largest difference of the metric that does not matter, for claims of equivalence.
      controls: for arms that are compared with another arm than `control`, which one.
    """

    name: str
    question: str
    base: Config
    arms: Mapping[str, Config]
    varies: tuple[str, ...]
    control: str
    seeds: tuple[Seed, ...]
    metric: str = "eval_loss"
    margin: Annotated[float, above(0, f64=True)] = 0.005
    controls: Mapping[str, str] = field(default_factory=dict)
    max_seeds: Annotated[int, at_least(1, MOST_SEEDS)] | None = None
    seed_counts: Mapping[str, Annotated[int, at_least(1, MOST_SEEDS)]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses invalid names and arms that differ in fields that `varies` does not name."""
        validate(self)
        if not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(f"name is {self.name!r}; use letters, digits, _ and -")
        for arm in self.arms:
            if not (arm and arm.isprintable() and arm == arm.strip()):
                raise ValueError(f"arm is {arm!r}; use one line of text without spaces around it")
        for name in (self.control, *self.controls, *self.controls.values(), *self.seed_counts):
            if name not in self.arms:
                raise ValueError(f"no arm is named {name!r}; the arms are {', '.join(self.arms)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}; give at least one, and none twice")
        if self.max_seeds is not None and self.max_seeds < len(self.seeds):
            raise ValueError(
                f"max_seeds is {self.max_seeds}, but there are {len(self.seeds)} seeds to begin "
                "with; raise it or name fewer seeds"
            )
        most = max(self.max_seeds or 0, *self.seed_counts.values(), len(self.seeds))
        last = max(self.seeds) + most - len(self.seeds)
        validate_value("the last seed that may be added", last, Seed)
        self._refuse_unknown_fields()
        self._refuse_unnamed_differences()

    def control_of(self, arm: str) -> str:
        """The arm that an arm is compared with."""
        return self.controls.get(arm, self.control)

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """The seeds of an arm: `seeds`, and those that were added, which follow on the largest."""
        chain = itertools.chain(self.seeds, itertools.count(max(self.seeds) + 1))
        count = self.seed_counts.get(arm, len(self.seeds))
        return tuple(itertools.islice(chain, count))

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of the arm that has most; other arms have the first of them."""
        return max((self.seeds_of(arm) for arm in self.arms), key=len)

    @property
    def monitoring(self) -> Monitoring:
        """How its statistics look at the seeds: `anytime` where they are added as needed."""
        return "fixed" if self.max_seeds is None else "anytime"

    def _refuse_unknown_fields(self) -> None:
        known = checks.fields(Config)
        for name in self.varies:
            if not any(field == name or field.startswith(name + ".") for field in known):
                raise ValueError(
                    f"varies names {name!r}, which is not a field of a config; write dotted names, "
                    "such as optimizer.learning_rate"
                )

    def _refuse_unnamed_differences(self) -> None:
        for arm, config in self.arms.items():
            unnamed = {
                name: values
                for name, values in _chosen(self.base, config).items()
                if name not in run_config.HOUSEKEEPING
                and not any(name == part or name.startswith(part + ".") for part in self.varies)
            }
            if unnamed:
                named = unnamed.items()
                fields = "; ".join(f"{n} is {old!r} there, {new!r} here" for n, (old, new) in named)
                raise ValueError(
                    f"arm {arm} differs from the base in more than varies names ({fields}); name "
                    "these fields in varies, or leave them as they are in the base"
                )


class Cell(NamedTuple):
    """One arm with one seed, and its status.

    Attributes:
      arm: name of the arm.
      seed: of initial parameters and data order.
      directory: the run directory, which exists once the cell was started.
      status: `finished` with a finite metric, `failed`, or `missing`: not run to its end yet.
      value: the metric; NaN unless finished.
      reason: why it failed; else empty.
    """

    arm: str
    seed: int
    directory: Path
    status: Status
    value: float
    reason: str


class ArmDifference(NamedTuple):
    """A field in which some arm differs from the base.

    Attributes:
      field: its dotted name.
      values: what the resolved config of each arm says.
      follows: no arm chose it; it follows from what they chose, as the kind of loss scale follows
        from a policy.
    """

    field: str
    values: dict[str, Any]
    follows: bool


class State(NamedTuple):
    """The state of a cell, read from its files.

    Attributes:
      status, value, reason: as in `Cell`.
      step: the newest that was logged; None before it begins.
    """

    status: Status
    value: float
    reason: str
    step: int | None


def arm_differences(ablation: Ablation) -> list[ArmDifference]:
    """The fields in which arms differ from the base, in the order of the config."""
    base = seedless(ablation.base)
    arms = {arm: seedless(config) for arm, config in ablation.arms.items()}
    differing = set().union(*(run_config.all_differences(base, config) for config in arms.values()))
    chosen = set().union(*(_chosen(ablation.base, config) for config in ablation.arms.values()))
    flat = {arm: run_config.by_name(config) for arm, config in arms.items()}
    return [
        ArmDifference(name, {arm: flat[arm][name] for arm in flat}, name not in chosen)
        for name in run_config.by_name(base)
        if name in differing
    ]


def _chosen(base: Config, config: Config) -> dict[str, tuple[Any, Any]]:
    """The differences of resolved configs that somebody wrote down, and so must answer for.

    Another spelling of the same policy is none; neither is a field that both leave to be derived.
    """
    written = run_config.all_differences(base, config)
    resolved = run_config.all_differences(seedless(base), seedless(config))
    return {name: values for name, values in resolved.items() if name in written}


def plan(ablation: Ablation) -> dict[str, Config]:
    """The resolved config of every cell, by key, in the order in which they are run.

    Cells are in order of seeds, so that pairs are complete early and workers that start together
    compile different arms.
    """
    configs = (
        dataclasses.replace(config, seed=seed).resolved()
        for seed, (arm, config) in itertools.product(ablation.all_seeds, ablation.arms.items())
        if seed in ablation.seeds_of(arm)
    )
    return {cell_key(config): config for config in configs}


def keys_by_arm(ablation: Ablation) -> dict[str, dict[int, str]]:
    """The keys of every arm's cells, by seed."""
    return {
        arm: {
            seed: cell_key(dataclasses.replace(config, seed=seed))
            for seed in ablation.seeds_of(arm)
        }
        for arm, config in ablation.arms.items()
    }


def cells_directory(directory: Path) -> Path:
    """Where the run directories of the cells are."""
    return directory / "cells"


def read_cells(ablation: Ablation, directory: Path) -> list[Cell]:
    """Every cell of the ablation as the files in its directory have it, arm by arm.

    Raises:
      InputError: a finished run has no such metric.
    """
    cells = []
    for arm, keys in keys_by_arm(ablation).items():
        for seed, key in keys.items():
            run = cells_directory(directory) / key
            status, value, reason, _ = read_state(run, ablation.metric)
            cells.append(Cell(arm, seed, run, status, value, reason))
    return cells


def is_done(run: Path) -> bool:
    """Whether a cell finished or failed, and so must not be rerun."""
    return (run / "result.json").exists() or (run / "failed.json").exists()


def record_failure(run: Path, reason: str) -> None:
    """Records in a cell's directory why it cannot be finished."""
    replace_text(run / "failed.json", strict_json.dumps({"reason": reason}, indent=2) + "\n")


def read_state(run: Path, metric: str) -> State:
    """Reads the state of the run in a directory, which may not exist yet.

    Raises:
      InputError: it finished, but has no such metric.
    """
    failed, result = run / "failed.json", run / "result.json"
    if failed.exists():
        reason = strict_json.read(failed)["reason"]
        return State("failed", math.nan, reason, _last_step(run))
    if not result.exists():
        return State("missing", math.nan, "", _last_step(run) if run.exists() else None)
    values = strict_json.read(result)
    try:
        value = float(values[metric])
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{metric} is not a number in {result}; the metric must be one of {', '.join(values)}"
        ) from error
    if not math.isfinite(value):
        return State("failed", math.nan, f"{metric} is {value}", values["steps"])
    return State("finished", value, "", values["steps"])


def _last_step(run: Path) -> int:
    """The step of the last row of `metrics.jsonl`, 0 where there is none.

    Only the end of the file is read, because this is asked several times a second.
    """
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return strict_json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):  # cut short, at one end or the other
            continue
    return 0


def with_steps(ablation: Ablation, steps: int) -> Ablation:
    """The same ablation with runs of another length: the base as given, every arm in proportion."""

    def scaled(config: Config) -> Config:
        length = max(1, round(config.steps * steps / ablation.base.steps))
        return dataclasses.replace(config, steps=length)

    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    arms = {arm: scaled(config) for arm, config in ablation.arms.items()}
    return dataclasses.replace(ablation, base=scaled(ablation.base), arms=arms)


def add_seeds(ablation: Ablation, adding: Mapping[str, int]) -> Ablation:
    """The same ablation with so many more seeds for some arms, and for what they are compared with.

    Differences are paired by seed, so a control has every seed of its arms.
    """
    counts = dict(ablation.seed_counts)
    for arm, more in adding.items():
        wanted = len(ablation.seeds_of(arm)) + more
        for name in (arm, ablation.control_of(arm)):
            counts[name] = max(wanted, counts.get(name, len(ablation.seeds)))
    return dataclasses.replace(ablation, seed_counts=counts)


def write_ablation(ablation: Ablation, directory: Path) -> Path:
    """Writes the definition of an ablation into its directory.

    Returns:
      A copy for the workers: it stays as it is when another definition is written, so that they do
      what they were started for.
    """
    values = {f.name: getattr(ablation, f.name) for f in dataclasses.fields(ablation)}
    values["base"] = to_json(ablation.base)
    values["arms"] = {arm: to_json(config) for arm, config in ablation.arms.items()}
    text = strict_json.dumps(values, indent=2) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    copy = directory / "definitions" / f"{digest}.json"
    with lock(directory / "locks" / "definition"):
        replace_text(directory / DEFINITION, text)
        copy.parent.mkdir(exist_ok=True)
        replace_text(copy, text)
    return copy


def read_ablation(path: Path) -> Ablation:
    """The ablation whose definition is in a file.

    Raises:
      InputError: there is none, or it cannot be read.
    """
    try:
        values = strict_json.read(path)
        values["base"] = from_json(values["base"])
        values["arms"] = {arm: from_json(config) for arm, config in values["arms"].items()}
        for name in ("varies", "seeds"):
            values[name] = tuple(values[name])
        return Ablation(**values)
    except OSError as error:
        raise InputError(
            f"{path.parent} is not the directory of an ablation: {path.name} cannot be read "
            f"({error.strerror})"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged or of another version: {error}") from error
