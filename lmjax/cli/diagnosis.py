"""The verbs that look at what precision does to a run: twin, replay, attribute, advise.

Knows `lmjax.diagnosis` and how tables are printed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from lmjax import diagnosis
from lmjax.checks import above, at_least, between
from lmjax.cli.common import (
    DONE,
    FAILED,
    ExperimentName,
    FirstStep,
    RunDirectory,
    UserPath,
    bad_input,
    load_experiment,
    print_json,
    written,
)
from lmjax.console import stages
from lmjax.console.tables import (
    Column,
    print_sentences,
    print_table,
    table_lines,
    terminal_width,
)
from lmjax.console.wording import counted

LOST = (
    *(Column("tensor", "key"), Column("format", "setting")),
    *(Column(title, "number") for title in ("underflow", "predicted", "overflow", "predicted ")),
)

COSTS = (
    Column("switched to the policy", "key"),
    *(Column(title, "number") for title in ("nats", "95% interval", "rms", "share")),
)

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
    print_sentences(_twin_summary(made))
    return DONE


def _twin_row(difference: diagnosis.Difference) -> Sequence[str]:
    d = difference
    own = "" if math.isnan(d.own_error) else f"{d.own_error:.2g}"
    numbers = f"{d.relative_error:.2g}", own, f"{d.bits:.1f}", f"{d.cosine:.6f}"
    return (d.path, *numbers, f"{d.largest_error:.2g}", str(d.non_finite))


def _twin_summary(made: diagnosis.Twin) -> list[str]:
    same = sum(not d.relative_error for d in made.differences)
    first, count = made.first, len(made.differences)
    lines = [
        f"step {made.step + 1}, {made.precision} against {made.reference}: loss {made.loss:.6f}, "
        f"reference {made.reference_loss:.6f}, difference {made.loss - made.reference_loss:+.2e}",
        f"{same} of {count} tensors are equal to their twin"
        if same
        else "no tensor is equal to its twin",
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


def _twin_json(made: diagnosis.Twin) -> dict[str, Any]:
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
        print_sentences(_replay_summary(made))
    return FAILED if made.own and made.identical is False else DONE


def _replay_row(step: diagnosis.Replayed) -> Sequence[str]:
    numbers = f"{step.loss:.6f}", f"{step.grad_norm:.4g}", f"{step.loss_scale:g}"
    recorded = "" if step.recorded is None else f"{step.recorded:.6f}"
    yes = lambda value: "" if value is None else "yes" if value else "no"
    return str(step.step), *numbers, recorded, yes(step.same), yes(step.skipped)


def _replay_summary(made: diagnosis.Replay) -> list[str]:
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
    elif failed := [str(step.step) for step in made.steps if not step.is_finite]:
        steps = f"{'steps' if len(failed) > 1 else 'step'} {', '.join(failed)}"
        lines.append(f"gradients of {steps} were not finite; taken apart, every tensor is")
    elif made.outlier is not None:
        lines.append(f"all elements are finite; the largest outlier: {_element(made.outlier)}")
    return lines


def _element(found: diagnosis.Element) -> str:
    """A sentence about an element: where it is, what made it, and from what."""
    where = f"[{', '.join(map(str, found.index))}]" if found.index else ""
    what = f"{found.site}/{found.tensor}" if found.operation and "/" not in found.tensor else ""
    text = f"step {found.step}, {found.direction}, {what or found.tensor}{where} = {found.value:g}"
    if math.isfinite(found.value):
        text += f", {found.outlier:.3g} times the root mean square"
    if found.micro_batch:
        text += f", in part {found.micro_batch} of the batch"
    if found.operation:
        text += f"; {found.operation}"
    read = ", ".join(f"{name} {largest:.4g}" for name, largest in found.operands.items())
    return text + (f"; largest magnitudes read: {read}" if read else "")


def attribute(
    run: RunDirectory,
    /,
    precision: str | None = None,
    reference: str = "f32",
    batches: Annotated[int, at_least(2)] = 8,
    steps: Annotated[int, at_least(0)] = 0,
    evaluations: Annotated[int, at_least(2)] = 48,
    json: bool = False,
) -> int:
    """Attributes the difference in loss between two policies to sites and tensors.

    Bisects over modules: switches groups of sites from the reference to the policy and compares
    the loss on the run's next batches. Costs are mean changes of the loss in nats per token with
    their 95% interval over batches, their root mean square, and that as a share of the whole.

    Args:
      run: The run directory, or its URL in an object store such as s3://BUCKET/RUN.
      precision: Policy, if not the run's own.
      reference: Policy to compare with.
      batches: Batches to compare the loss on.
      steps: Train so many steps under each mixture first; without any, cotangents have no effect.
      evaluations: Mixtures to try in the search for sites.
      json: Print JSON.
    """
    opened = diagnosis.open_run(run)
    with stages.stage("trying mixtures of the two policies"):
        made = bad_input(
            diagnosis.attribute,
            opened,
            precision=precision,
            reference=reference,
            batches=batches,
            steps=steps,
            evaluations=evaluations,
        )
    if json:
        print_json(dataclasses.asdict(made))
        return DONE
    _print_attribution(made)
    return DONE


def _print_attribution(made: diagnosis.Attribution) -> None:
    print_sentences(
        [
            f"step {made.step}, {made.batches} batches: {made.precision} has loss {made.loss:.6f}, "
            f"{made.reference} has {made.reference_loss:.6f}; tried "
            f"{counted(made.evaluations, 'mixture')} of both"
        ]
    )
    if not made.sites:
        print("nothing to attribute: no site changes the loss")
        return
    parts = {
        "Sites, each alone": made.sites,
        "Tensors of these sites, each alone": made.tensors,
        "Kinds of tensors, at all sites": made.classes,
        "Interactions: beyond the sum of both": made.interactions,
    }
    for title, costs in parts.items():
        if costs:
            print(f"\n{title}")
            print_table(COSTS, [_cost_row(cost, made.total) for cost in costs])
    print()
    rest = [made.total] + ([] if made.remaining is None else [made.remaining])
    print_table(COSTS, [_cost_row(cost, made.total) for cost in rest])
    if made.remaining is not None:
        print_sentences(["what remains is the difference with the sites above switched back"])


def _cost_row(cost: diagnosis.Cost, total: diagnosis.Cost) -> Sequence[str]:
    share = cost.change / total.change if total.change else math.nan
    interval = f"{cost.low:+.1e} to {cost.high:+.1e}"
    return cost.where, f"{cost.difference:+.2e}", interval, f"{cost.change:.2e}", f"{share:.1%}"


def advise(
    experiment: ExperimentName,
    /,
    target: str = "",
    steps: Annotated[int, at_least(4)] = 60,
    seeds: Annotated[int, at_least(1)] = 1,
    budget: Annotated[float, between(0, 1)] = 0.01,
    tolerance: Annotated[float, above(0)] = 0.01,
    json: bool = False,
) -> int:
    """Advises on the formats of an experiment: what tensors have room for, and whether it trains.

    Counts the exponents of every tensor in a short run in f32. Each gets the narrowest format that
    few enough elements underflow or overflow; that policy is tried, and what telemetry then counts
    stands beside what was predicted. If its held-out loss is too far from that of f32, wider
    formats are tried. Prints the policy last.

    Args:
      experiment: Module, such as experiments.quickstart.
      target: A chip, such as h100: only formats that it multiplies faster are advised.
      steps: Length of each trial.
      seeds: How often each trial is repeated, with other seeds.
      budget: Share of a tensor that may underflow, or overflow.
      tolerance: Largest gap to f32 in held-out loss, in nats per token.
      json: Print JSON.
    """
    made = bad_input(
        diagnosis.advise,
        load_experiment(experiment),
        target=target,
        steps=steps,
        seeds=seeds,
        budget=budget,
        tolerance=tolerance,
    )
    if json:
        print_json(_advice_json(made))
    else:
        print("\n".join(_advice_lines(made)))
    return DONE


def _advice_json(made: diagnosis.Advice) -> dict[str, Any]:
    lost = lambda found: {path: loss._asdict() for path, loss in found.items()}
    trials = [
        dataclasses.asdict(one) | {"predicted": lost(one.predicted), "measured": lost(one.measured)}
        for one in made.trials
    ]
    return dataclasses.asdict(made) | {"trials": trials}


def _advice_lines(made: diagnosis.Advice) -> Iterator[str]:
    for number, trial in enumerate(made.trials, 1):
        scaled = f", loss scale {trial.loss_scale:g}" if trial.loss_scale != 1 else ""
        yield f"Trial {number}: {trial.precision}{scaled}"
        rows = [
            _lost_row(trial, path)
            for path, measured in trial.measured.items()
            if max(measured.worst, trial.predicted[path].worst) >= 1e-4
        ]
        if rows:
            yield from table_lines(LOST, rows, each="tensor", width=terminal_width())
        else:
            yield "no tensor was predicted or found to lose 0.01% of its elements"
        interval = f" +- {trial.half_width:.4f}" if math.isfinite(trial.half_width) else ""
        yield (
            f"held-out loss {sum(trial.losses) / len(trial.losses):.4f}, f32 "
            f"{sum(made.f32) / len(made.f32):.4f}: gap {trial.gap:+.4f}{interval} nats, accepted "
            f"up to {made.tolerance:g}"
        )
        yield ""
    if made.loss_scale is None:
        yield "f16 would need no loss scale"
    elif made.loss_scale <= made.largest_loss_scale:
        yield f"f16 would need a loss scale of {made.loss_scale:g} to {made.largest_loss_scale:g}"
    else:
        yield (
            f"no loss scale is right for f16: below {made.loss_scale:g} gradients underflow, above "
            f"{made.largest_loss_scale:g} others overflow"
        )
    yield f"advised: {made.flags}"


def _lost_row(trial: diagnosis.Trial, path: str) -> Sequence[str]:
    found, expected = trial.measured[path], trial.predicted[path]
    pairs = (found.underflow, expected.underflow, found.overflow, expected.overflow)
    return path, trial.formats[path], *(f"{share:.2%}" for share in pairs)
