"""The verbs that look at what precision did to a run: twin.

Knows `lmjax.diagnosis` and how tables are printed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any

from lmjax import diagnosis
from lmjax.checks import above, at_least
from lmjax.cli.common import DONE, RunDirectory, UserPath, bad_input, print_json, written
from lmjax.console import stages
from lmjax.console.tables import Column, print_table
from lmjax.diagnosis import Difference, Twin

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
