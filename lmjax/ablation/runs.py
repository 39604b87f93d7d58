"""Treats individually trained runs as an ablation: configs are arms, and their seeds its seeds.

Every field that differs counts as varying, and the config of the first run named is the control.
Runs with the same seed are pairs: a seed fixes initial parameters and the order of the data in
every arm.

Knows what an ablation is and the files of a run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lmjax.ablation.grid import Ablation, Cell, read_state
from lmjax.ablation.keys import cell_key
from lmjax.files.filenames import printable
from lmjax.runs.config import differences, identity
from lmjax.runs.metrics import read_rows
from lmjax.runs.run_directory import CASTABLE
from lmjax.train import Config, InputError, read_config

LONGEST_NAME = 100
"""Longest readable name of an arm in a table, in characters."""


def ablation_of(directories: Sequence[Path]) -> tuple[Ablation, list[Cell]]:
    """Returns the ablation that run directories form together, and the cell of each.

    Args:
      directories: of runs, finished or not; the config of the first is the control.

    Raises:
      InputError: a directory contains no run, or two contain the same run.
    """
    configs = {directory: read_config(directory) for directory in directories}
    keys = {directory: _arm_key(config) for directory, config in configs.items()}
    first = {key: directory for directory, key in reversed(keys.items())}
    base = dataclasses.replace(configs[directories[0]], seed=0)
    arms = {
        directory: dataclasses.replace(configs[directory], seed=0) for directory in first.values()
    }
    apart = {name for arm in arms.values() for name in differences(base, arm)}
    varies = tuple(name for name in identity(base) if name in apart)
    names = _names(arms, varies)
    ablation = Ablation(
        name="runs",
        question="How do these runs compare?" if len(configs) > 1 else "How did this run go?",
        base=base,
        arms={names[directory]: arms[directory] for directory in directories if directory in arms},
        varies=varies,
        control=names[directories[0]],
        seeds=tuple(sorted({config.seed for config in configs.values()})),
    )
    cells: dict[tuple[str, int], Cell] = {}
    for directory, config in configs.items():
        arm = names[first[keys[directory]]]
        if (arm, config.seed) in cells:
            raise InputError(
                f"{cells[arm, config.seed].directory} and {directory} hold the same run; name one"
            )
        cells[arm, config.seed] = _cell(arm, config, directory, ablation.metric)
    return ablation, list(cells.values())


def _arm_key(config: Config) -> str:
    return cell_key(dataclasses.replace(config, seed=0))


def _names(arms: Mapping[Path, Config], varies: Sequence[str]) -> dict[Path, str]:
    """Names each arm by its values of the fields in which the configs differ.

    Uses all fields if the name is short enough, else the first field or pair of fields that
    distinguishes all arms, else the name of its run and the fields.
    """
    # Omit fields that follow from the policy.
    told = [f for f in varies if f not in CASTABLE[1:]] if CASTABLE[0] in varies else varies
    fields = {directory: identity(config) for directory, config in arms.items()}
    pairs = (*itertools.combinations(told, 1), *itertools.combinations(told, 2))
    for chosen in (tuple(told), *pairs):
        names = {
            directory: ", ".join(f"{_short(name, told)} {_line(flat.get(name))}" for name in chosen)
            for directory, flat in fields.items()
        }
        if _tell_apart(names.values()):
            return names
    differing = f" ({', '.join(_short(name, told) for name in told)})" if told else ""
    names = {directory: _line(directory.absolute().name) + differing for directory in arms}
    return names if _tell_apart(names.values()) else {d: _line(d) + differing for d in arms}


def _short(field: str, others: Sequence[str]) -> str:
    """`learning_rate` for `optimizer.learning_rate`, unless another field ends the same way."""
    last = field.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in others) == 1 else field


def _line(value: object) -> str:
    """A value as one line of printable text."""
    return printable(str(value)).strip()


def _tell_apart(names: Collection[str]) -> bool:
    fit = all(0 < len(name) <= LONGEST_NAME for name in names)
    return fit and len(set(names)) == len(names)


def _cell(arm: str, config: Config, directory: Path, metric: str) -> Cell:
    state = read_state(directory, metric)
    if state.status == "missing" and (reason := _diverged(directory, config)):
        return Cell(arm, config.seed, directory, "failed", state.value, reason)
    return Cell(arm, config.seed, directory, state.status, state.value, state.reason)


def _diverged(directory: Path, config: Config) -> str:
    """Why a run without a result failed, according to its rows; empty if it may continue.

    The only trace is the steps skipped up to its end. They are counted from row to row, and so the
    count may be up to `log_every` too low.
    """
    rows = [row for row in read_rows(directory / "metrics.jsonl") if "skipped_steps" in row]
    if not rows or config.faults.non_finite == "skip":
        return ""
    last, begun = rows[-1], {"step": 0, "skipped_steps": 0}
    skipped = 0
    for row in reversed([begun, *rows[:-1]]):
        steps = last["step"] - row["step"]
        if last["skipped_steps"] - row["skipped_steps"] < steps:
            break
        skipped = steps
    limit = min(config.loss_scale.max_consecutive_skips, config.steps)
    if not skipped or skipped + config.log_every <= limit:
        return ""
    return f"the gradients of the last {skipped} steps up to step {last['step']} were not finite"
