"""The verbs that look at what precision did to a run: twin, replay.

Knows `lmjax.diagnosis` and how tables are printed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any

from lmjax import diagnosis
from lmjax.checks import above, at_least
from lmjax.cli.common import (
    DONE,
    FAILED,
    FirstStep,
    RunDirectory,
    UserPath,
    bad_input,
    print_json,
    written,
)
from lmjax.console import stages
from lmjax.console.tables import Column, print_table
from lmjax.console.wording import counted
from lmjax.diagnosis import Difference, Element, Replay, Replayed, Twin

REPLAY = (
    Column("step", "key"),
    *(Column(title, "number") for title in ("loss", "gradient norm", "loss scale", "recorded")),
    Column("same", "setting"),
    Column("skipped", "setting"),
)

TWIN = (
    Column("tensor", "key"),
    *(Column(title, "number") for title in ("error", "own", "bits", "cosine", "largest")),
    Column("non-finite", "setting"),
)


def twin(
    run: RunDirectory,
    /,
    precision: str | None = None,
    reference: str = "f32",
    bound: Annotated[float, above(0)] = 2.0**-5,
    rows: Annotated[int, at_least(0)] = 0,
    plot: UserPath | None = None,
    json: bool = False,
) -> int:
    """Compares each tensor of a run's next step with what it would be under another policy.

    The parameters of the newest checkpoint and the next batch go through one program under both
    policies. For each value y and each gradient dy, dx and dw, in the order of computation: the
    norm of the difference over that of the reference (error), the same if the site is handed the
    reference's tensors (own), signal over noise in bits, the cosine between both, and the largest
    difference over the largest magnitude. Tensors that are equal to their twin are not listed.

    Args:
      run: The run directory, or its URL in an object store such as s3://BUCKET/RUN.
      precision: Policy, if not the run's own.
      reference: Policy to compare with, such as f32 or f64.
      bound: Relative error that counts as too large.
      rows: Sequences of the batch to use; 0: all of a micro-batch.
      plot: Draw the errors over depth into this PNG.
      json: Print JSON.
    """
    opened = diagnosis.open_run(run)
    with stages.stage("computing the step under both policies"):
        made = bad_input(
            diagnosis.twin,
            opened,
            precision=precision,
            reference=reference,
            bound=bound,
            rows=rows,
        )
    if plot is not None:
        from lmjax.diagnosis.twin_plot import draw_twin

        with written(plot):
            draw_twin(made, plot, str(run))
    if json:
        print_json(_twin_json(made))
        return DONE
    different = [d for d in made.differences if d.relative_error or d.own_error > 0]
    if different:
        print_table(TWIN, [_twin_row(d) for d in different], each="tensor")
        print()
    print("\n".join(_twin_summary(made)))
    return DONE


def _twin_row(difference: Difference) -> Sequence[str]:
    d = difference
    own = "" if math.isnan(d.own_error) else f"{d.own_error:.2g}"
    numbers = f"{d.relative_error:.2g}", own, f"{d.bits:.1f}", f"{d.cosine:.6f}"
    return (d.path, *numbers, f"{d.largest_error:.2g}", str(d.non_finite))


def _twin_summary(made: Twin) -> list[str]:
    same = sum(not d.relative_error for d in made.differences)
    first, count = made.first, len(made.differences)
    lines = [
        f"step {made.step + 1}, {made.precision} against {made.reference}: loss {made.loss:.6f}, "
        f"reference {made.reference_loss:.6f}, difference {made.loss - made.reference_loss:+.2e}",
        f"{same} of {count} tensors are equal to their twin" if same else "no tensor is equal",
    ]
    if first is None:
        return [*lines, f"no relative error exceeds {made.bound:g}"]
    lines.append(
        f"first error above {made.bound:g}: {first.path}, {first.relative_error:.2g} "
        f"({first.bits:.1f} bits)"
    )
    if not made.origins:
        return [*lines, "no site exceeds it by itself: the error accumulates"]
    worst = {site: max(d.own_error for d in made.origins if d.site == site) for site in made.sites}
    named = ", ".join(f"{site} ({error:.2g})" for site, error in worst.items())
    return [*lines, f"by themselves, these sites exceed it: {named}"]


def _twin_json(made: Twin) -> dict[str, Any]:
    path = lambda difference: None if difference is None else difference.path
    return {
        **{name: value for name, value in vars(made).items() if name != "differences"},
        "first": path(made.first),
        "sites": list(made.sites),
        "tensors": [
            {
                **dataclasses.asdict(d),
                "own_error": None if d.role == "dy" else d.own_error,
                "bits": d.bits,
            }
            for d in made.differences
        ],
    }


def replay(
    run: RunDirectory,
    /,
    from_: FirstStep,
    to: Annotated[int, at_least(1)] | None = None,
    precision: str | None = None,
    json: bool = False,
) -> int:
    """Computes steps of a run again, from the nearest checkpoint with the same data.

    Under the run's own policy the steps must be those of the run bit for bit: losses, gradient
    norms and loss scales are compared with metrics.jsonl, parameters with later checkpoints. Names
    the first operation that produced an infinity or a NaN; if none did, the largest outlier: the
    element furthest from the root mean square of its tensor. Exits with 1 if a step differs.

    Args:
      run: The run directory, or its URL in an object store such as s3://BUCKET/RUN.
      from_: First step to look at, counted from 1.
      to: Last step; by default the first one.
      precision: Policy instead of the run's, to which the state is rounded at the checkpoint.
      json: Print JSON.
    """
    opened = diagnosis.open_run(run, before=from_, initial=True)
    last = from_ if to is None else to
    made = bad_input(diagnosis.replay, opened, from_, last, precision=precision)
    if json:
        print_json(dataclasses.asdict(made) | {"identical": made.identical})
    else:
        print_table(REPLAY, [_replay_row(step) for step in made.steps], each="step")
        print()
        print("\n".join(_replay_summary(made)))
    return FAILED if made.own and made.identical is False else DONE


def _replay_row(step: Replayed) -> Sequence[str]:
    numbers = f"{step.loss:.6f}", f"{step.grad_norm:.4g}", f"{step.loss_scale:g}"
    recorded = "" if step.recorded is None else f"{step.recorded:.6f}"
    yes = lambda value: "" if value is None else "yes" if value else "no"
    return str(step.step), *numbers, recorded, yes(step.same), yes(step.skipped)


def _replay_summary(made: Replay) -> list[str]:
    origin = f"the checkpoint of step {made.start}" if made.start else "the initial parameters"
    lines = [f"from {origin}, under {made.precision}"]
    if made.own:
        compared = sum(step.same is not None for step in made.steps)
        rows = f"{counted(compared, 'row')} of metrics.jsonl"
        saved = f"{counted(len(made.checkpoints), 'checkpoint')}"
        words = {None: "nothing to compare with", True: "bit-identical", False: "NOT the same"}
        lines.append(f"{words[made.identical]}: compared with {rows} and {saved}")
    if made.non_finite is not None:
        lines.append(f"first element that is not finite: {_element(made.non_finite)}")
    elif made.outlier is not None:
        lines.append(f"all elements are finite; the largest outlier: {_element(made.outlier)}")
    return lines


def _element(found: Element) -> str:
    """A sentence about an element: where it is, what made it, and from what."""
    where = ", ".join(map(str, found.index))
    what = f"{found.site}/{found.tensor}" if found.operation and "/" not in found.tensor else ""
    text = (
        f"step {found.step}, {found.direction}, {what or found.tensor}[{where}] = {found.value:g}"
    )
    if math.isfinite(found.value):
        text += f", {found.outlier:.3g} times the root mean square"
    if found.micro_batch:
        text += f", in part {found.micro_batch} of the batch"
    if found.operation:
        text += f"; {found.operation}"
    read = ", ".join(f"{name} {largest:.4g}" for name, largest in found.operands.items())
    return text + (f"; largest magnitudes read: {read}" if read else "")
