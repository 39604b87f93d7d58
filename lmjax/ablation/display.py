"""Progress of an ablation: a table of arms by seeds, and the time left.

A live table in a terminal or notebook; elsewhere (a log file, CI) one line per cell that ends.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from lmjax.ablation import grid
from lmjax.ablation.grid import Ablation, State
from lmjax.ablation.words import significant
from lmjax.console import stages
from lmjax.console.tables import Column, table_lines
from lmjax.files.filenames import printable


class Display:
    """Shows how far each cell is; a context manager, silent when `enabled` is false."""

    def __init__(self, ablation: Ablation, *, enabled: bool = True):
        self._console = Console(stderr=True, highlight=False, emoji=False, quiet=not enabled)
        self._is_live = enabled and (self._console.is_terminal or self._console.is_jupyter)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._ablation = ablation
        self._plan = grid.plan(ablation)
        self._keys = grid.keys_by_arm(ablation)
        self._labels = _labels(self._keys)
        self._began = time.monotonic()
        self._steps_before: int | None = None
        self._ended: set[str] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Display:
        """Starts the table."""
        if self._is_live:
            self._stack.enter_context(stages.hidden())
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the table."""
        if self._is_live:
            self._live.stop()
        self._stack.close()

    def show(self, states: Mapping[str, State]) -> None:
        """Shows the states of all cells, by key."""
        ended = {key for key, state in states.items() if state.status != "missing"}
        if self._steps_before is None or self._ended is None:
            self._steps_before, self._ended = self._steps_done(states), ended
        if self._is_live:
            count = f"{len(ended)}/{len(states)} cells  {self._elapsed()}"
            caption = Text(count + self._time_left(states), style="dim")
            self._live.update(Group(*self._table(states), caption), refresh=True)
        else:
            for key in sorted(ended - self._ended):
                line = f"{len(ended)}/{len(states)} cells  {self._labels[key]}: "
                self.note(line + f"{_outcome(states[key])}{self._time_left(states)}")
        self._ended = ended

    def note(self, text: str) -> None:
        """Prints a line above the table, where it stays."""
        self._console.print(printable(text), markup=False, soft_wrap=True)

    def _table(self, states: Mapping[str, State]) -> list[Text]:
        seeds, fitting = self._ablation.all_seeds, self._seeds_that_fit()
        hidden, shown = seeds[:-fitting], seeds[-fitting:]
        titles = ["ended before"] if hidden else []
        titles += [f"seed {seed}" for seed in shown]
        rows = []
        for arm, keys in self._keys.items():
            before = [states[keys[seed]].status != "missing" for seed in hidden if seed in keys]
            count = [f"{sum(before)}/{len(before)}"] if hidden else []
            cells = (
                _short(states[keys[seed]], self._plan[keys[seed]].steps) if seed in keys else ""
                for seed in shown
            )
            rows.append((arm, *count, *cells))
        columns = Column("arm", "key"), *(Column(title, "number") for title in titles)
        header, *lines = table_lines(columns, rows, width=self._console.width)
        return [Text(header, style="bold"), *map(Text, lines)]

    def _seeds_that_fit(self) -> int:
        """How many columns of seeds fit the terminal, at least one."""
        room = self._console.width - max(map(len, self._keys)) - len("  ended before")
        return max(1, room // (len("  seed 00") + 1))

    def _elapsed(self) -> str:
        return str(datetime.timedelta(seconds=int(time.monotonic() - self._began)))

    def _steps_done(self, states: Mapping[str, State]) -> int:
        """Steps taken so far; all steps of a failed cell count."""
        return sum(
            (state.step or 0) if state.status == "missing" else self._plan[key].steps
            for key, state in states.items()
        )

    def _time_left(self, states: Mapping[str, State]) -> str:
        assert self._steps_before is not None
        done = self._steps_done(states)
        fresh, left = done - self._steps_before, sum(c.steps for c in self._plan.values()) - done
        if not fresh or not left:
            return ""
        seconds = math.ceil((time.monotonic() - self._began) * left / fresh)
        return f"  {datetime.timedelta(seconds=seconds)} left"


def _labels(keys_by_arm: Mapping[str, Mapping[int, str]]) -> dict[str, str]:
    """Display name of each cell: the arms that share it, and its seed."""
    arms: dict[str, list[str]] = {}
    seed_of: dict[str, int] = {}
    for arm, keys in keys_by_arm.items():
        for seed, key in keys.items():
            arms.setdefault(key, []).append(arm)
            seed_of[key] = seed
    return {key: f"{', '.join(names)} seed {seed_of[key]}" for key, names in arms.items()}


def _outcome(state: State) -> str:
    return f"failed: {state.reason}" if state.status == "failed" else significant(state.value)


def _short(state: State, steps: int) -> str:
    if state.status == "failed":
        return "failed"
    if state.status == "finished":
        return significant(state.value)
    return "-" if state.step is None else f"{state.step / steps:.0%}"
