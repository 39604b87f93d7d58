"""The verbs of `python -m lmjax VERB`: each is a function whose parameters are its flags.

Knows all rooms; how flags are parsed, errors caught and tables printed is in `cli/common.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from lmjax import checks
from lmjax.checks import at_least
from lmjax.cli.audit import audit
from lmjax.cli.chips import show_chip_plan
from lmjax.cli.common import (
    DONE,
    FAILED,
    STOPPED,
    RunDirectory,
    UserPath,
    bad_input,
    guarded,
    load_experiment,
    print_json,
    resume_run,
    written,
)
from lmjax.cli.compression import prune, quantize
from lmjax.cli.data import show_prepared
from lmjax.cli.diagnosis import advise, attribute, replay, twin
from lmjax.cli.flags import known_flags, parse_flags, refuse_unknown
from lmjax.cli.inference import evaluate, generate, parity, score
from lmjax.cli.interop import export, import_model
from lmjax.cli.plan import MeshSizes, ModelChanges, changed, show_plan, show_rooflines
from lmjax.console.tables import Column, print_table
from lmjax.data import DataConfig
from lmjax.data import prepare as prepare_data
from lmjax.plan import parse_target
from lmjax.precision.backend import planned_for, this_backend
from lmjax.precision.formats import format_table
from lmjax.precision.keys import KEYS
from lmjax.precision.native import in_words
from lmjax.runs.store.object_store import as_url
from lmjax.runs.store.remote import fetched
from lmjax.train import InputError, Phase, resolve
from lmjax.train.compilation import keep_programs
from lmjax.train.memory import keep_freed_memory

Count = Annotated[int, at_least(1)]

FORMAT_COLUMNS = (
    Column("name", "key"),
    Column("bits", "number"),
    Column("layout"),
    Column("bias", "number"),
    *(Column(title, "number") for title in ("largest", "normal", "subnormal")),
    *(Column(title) for title in ("inf", "NaN", "native")),
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Uses trained runs, and inspects and plans experiments."""
    verbs: dict[str, Callable[..., int]] = {
        "resume": resume,
        "generate": generate,
        "score": score,
        "parity": parity,
        "evaluate": evaluate,
        "quantize": quantize,
        "prune": prune,
        "import": import_model,
        "export": export,
        "prepare": prepare,
        "sites": sites,
        "plan": plan,
        "audit": audit,
        "twin": twin,
        "replay": replay,
        "attribute": attribute,
        "advise": advise,
        "formats": formats,
        "report": report,
        "reproduce": reproduce,
    }
    deferred = {name: _deferred(verb) for name, verb in verbs.items()}
    arguments = _renamed(sys.argv[1:] if arguments is None else arguments)
    verb, *flags = arguments or [""]
    if verb == "resume":  # its flags default to the recorded values
        sys.exit(guarded(lambda: resume_run(flags)))

    def run() -> int:
        """Parses the flags of the verb and calls it; returns its exit code."""
        keep_freed_memory()
        keep_programs()
        if verb in verbs:
            refuse_unknown(flags, known_flags(verbs[verb]))
        call = parse_flags(
            lambda: tyro.extras.subcommand_cli_from_dict(
                deferred, prog="python -m lmjax", description=main.__doc__, args=arguments
            )
        )
        return call()

    sys.exit(guarded(run, prints_results=True))


def _renamed(arguments: Sequence[str]) -> Sequence[str]:
    """The arguments with the new name of a renamed verb; the old name works until version 0.2."""
    if list(arguments[:1]) != ["sharding"]:
        return arguments
    print("note: the verb sharding is now called plan", file=sys.stderr)
    return ["plan", *arguments[1:]]


def resume(run: RunDirectory, /) -> int:
    """Resumes a recorded run where it stopped; takes an experiment's flags.

    Args:
      run: The run directory, or its URL in an object store such as s3://BUCKET/RUN.
    """
    return resume_run([run])


def _deferred(verb: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """A function whose call only binds its arguments: flags are validated before work begins."""

    @functools.wraps(verb)
    def bind(*arguments: Any, **options: Any) -> Callable[[], int]:
        given = inspect.signature(verb).bind(*arguments, **options).arguments
        checks.validate_arguments(verb, given)
        return functools.partial(verb, *arguments, **options)

    return bind


def prepare(data: Annotated[DataConfig, tyro.conf.arg(name="data")], json: bool = False) -> int:
    """Prepares a corpus; the only command that downloads, and only a requested tfds: dataset.

    Args:
      data: Which corpus, and how it is tokenized.
      json: Print JSON.
    """
    show_prepared(data, prepare_data(data, progress=not json), json=json)
    return DONE


def sites(
    experiment: tyro.conf.Positional[str],
    /,
    precision: str | None = None,
    target: str | None = None,
    json: bool = False,
) -> int:
    """Shows the resolved format of each tensor at each site of an experiment's model, by phase.

    Consecutive blocks that are alike are one row: blocks/0-3/mlp/up is mlp/up of blocks 0 to 3. A
    rule of a policy names one of them as blocks/2/mlp/up and all of them as blocks/*/mlp/up.
    The last column says which products are native on this machine or on the target, and how the
    others are emulated: the product y and its gradients dx and dw. In the row of a softmax it says
    how attention is computed: blockwise, or with its whole matrix of scores, and what asks for it.

    Args:
      experiment: Module, such as experiments.quickstart.
      precision: Policy, if not the experiment's own.
      target: Chips, such as h100 or tpu-v5p, if not those of this machine.
      json: Print JSON.
    """
    config = load_experiment(experiment)
    backend = this_backend() if target is None else bad_input(parse_target, target).backend
    if precision is not None:
        config = bad_input(dataclasses.replace, config, precision=precision)
    with planned_for(backend):
        _show_sites(resolve(config).phases, target or backend.platform, json=json)
    return DONE


def _show_sites(phases: Sequence[Phase], devices: str, *, json: bool) -> None:
    if json:
        found = {phase.start: _sites_json(phase) for phase in phases}
        print_json(found if len(found) > 1 else found[0])
        return
    settings = (Column(key, "setting") for key in KEYS)
    native = Column(f"products on {devices}", "text")
    columns = (Column("site", "key"), *settings, native)
    for phase in phases:
        if len(phases) > 1:
            print(f"from step {phase.start} on: {phase.config.precision}")
        words = {path: in_words(product) for path, product in phase.products().items()}
        words |= {path: str(form) for path, form in phase.attention_forms().items()}
        rows = {
            path: (*site.rows().values(), words.get(path, "")) for path, site in phase.sites.items()
        }
        merged = phase.layout.merged(rows)
        print_table(columns, [(path, *row) for path, row in merged.items()], each="site")


def _sites_json(phase: Phase) -> dict[str, dict[str, Any]]:
    """The settings of every site, and how each product and each attention is computed."""
    words: dict[str, dict[str, Any]] = {
        path: {"products": {name: str(one) for name, one in product.items()}}
        for path, product in phase.products().items()
    }
    for path, form in phase.attention_forms().items():
        words[path] = {"attention": form._asdict()}
    return {path: site.rows() | words.get(path, {}) for path, site in phase.sites.items()}


def plan(
    experiment: tyro.conf.Positional[str],
    /,
    target: str | None = None,
    devices: Count | None = None,
    mesh: MeshSizes = MeshSizes(),  # noqa: B008
    model: ModelChanges = ModelChanges(),  # noqa: B008
    precision: str | None = None,
    context: Count | None = None,
    batch_size: Count | None = None,
    micro_batches: Count | None = None,
    roofline: bool = False,
    json: bool = False,
) -> int:
    """How an experiment is divided over devices, which may be absent, and what a step sends.

    A separate process compiles the step for that many CPU devices, or with --target with the
    compiler of the chips; nothing is allocated.

    Args:
      experiment: Module, such as experiments.llama_1b.
      target: Chips, such as h100:8, b200:8, tpu-v5p:4x4x4 or tpu-v6e:16x16. Prints what their own
        compiler makes of the step: memory, kernels, products, collectives; and if it does not fit,
        the smallest change with which it does. Needs lmjax[aot-cuda] or lmjax[aot-tpu].
      devices: Number of devices without a target; 8 by default.
      mesh: Sizes of the device mesh, if not the experiment's own; -1 takes the rest.
      model: What differs from the experiment's own model.
      precision: Policy, if not the experiment's own.
      context: Context length in tokens, if not the experiment's own.
      batch_size: Sequences in a step, if not the experiment's own.
      micro_batches: Parts of a batch, if not the experiment's own.
      roofline: Print instead how long a step takes at least on two kinds of chips, for 8, 64 and
        256 of them and this number, with as many rows on each.
      json: Print JSON.
    """
    config = load_experiment(experiment)
    sizes = {"context": context, "batch_size": batch_size, "micro_batches": micro_batches}
    config = bad_input(changed, config, model, mesh, precision=precision, **sizes)
    if target is not None:
        if devices is not None or roofline:
            flag = "--roofline" if roofline else "--devices"
            raise InputError(f"--target already names the chips; leave out {flag}")
        bad_input(show_chip_plan, config, bad_input(parse_target, target), json=json)
        return DONE
    bad_input(show_rooflines if roofline else show_plan, config, devices or 8, json=json)
    return DONE


def report(
    directories: tyro.conf.Positional[tuple[str, ...]],
    /,
    out: UserPath | None = None,
    json: bool = False,
) -> int:
    """Writes reports from the files of runs; trains nothing.

    Args:
      directories: Of ablations, each of which gets its report; or of runs, which are compared with
        the first of them. Runs may be in an object store: s3://BUCKET/RUN.
      out: Where the comparison of runs goes, a directory or a page *.html, if not beside the first.
      json: Print JSON.
    """
    if not directories:
        raise InputError("name the directories of ablations or runs")
    if out is None and any(map(as_url, directories)):
        raise InputError("say with --out DIR where the report on runs in an object store goes")
    with ExitStack() as stack:
        here = [stack.enter_context(fetched(name, checkpoint=False)) for name in directories]
        _report(here, out, json=json)
    return DONE


def _report(directories: Sequence[Path], out: Path | None, *, json: bool) -> None:
    from lmjax.ablation.grid import DEFINITION
    from lmjax.cli.ablation import report_on, report_on_runs

    for directory in directories:
        if not any((directory / name).exists() for name in (DEFINITION, "config.json")):
            raise InputError(f"{directory} is the directory of neither an ablation nor a run")
    runs = [directory for directory in directories if not (directory / DEFINITION).exists()]
    for directory in directories:
        if directory not in runs:
            report_on(directory, json=json)
    if runs:
        report_on_runs(runs, out, json=json)


def reproduce(
    claims: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    all: bool = False,
    quick: bool = False,
    large: bool = False,
    workdir: UserPath = Path("runs/reproduce"),
    processes: Count = 1,
    seeds: str | None = None,
    json: bool = False,
) -> int:
    """Replays published claims about precision; without arguments, lists them.

    Exits with 0 if every claim was confirmed, 1 if one was refuted or is undecided.

    Args:
      claims: Which ones, by name or number.
      all: All of them.
      quick: Those that take ten minutes together on two cores.
      large: The size of the paper, on the hardware that the list names.
      workdir: Where runs and reports go; the same command again resumes what is there.
      processes: Concurrent runs, each in its own process.
      seeds: Which seeds, such as 0,1,2, if not the claim's own.
      json: Print JSON.
    """
    from lmjax.cli import claims as claims_of

    if not claims and not all and not quick:
        claims_of.list_claims(json=json)
        return DONE
    chosen = claims_of.choose(claims, everything=all, quick=quick)
    outcome = claims_of.replay(
        chosen,
        workdir,
        large=large,
        processes=processes,
        seeds=seeds,
        json=json,
    )
    return STOPPED if outcome is None else DONE if outcome == "confirmed" else FAILED


def formats(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    plot: UserPath | None = None,
    json: bool = False,
) -> int:
    """The number formats: bits, range, special values, and whether JAX has them natively.

    Args:
      names: Which ones, such as e4m3 or e5m7 or int8; by default those with a name.
      plot: Draw their number lines into this PNG.
      json: Print JSON.
    """
    rows = bad_input(format_table, names or None)
    if plot is not None:
        from lmjax.telemetry.format_plot import DEFAULT_FORMATS, draw_number_lines

        with written(plot):
            bad_input(draw_number_lines, plot, names or DEFAULT_FORMATS)
    if json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        print_table(FORMAT_COLUMNS, [[*map(_cell, dataclasses.astuple(row))] for row in rows])
    return DONE


def _cell(value: object) -> str:
    """A value for a table: powers of two and other floats in short form, booleans as words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        mantissa, exponent = math.frexp(value)
        return f"2^{exponent - 1}" if mantissa == 0.5 and abs(value) < 1 else f"{value:.5g}"
    return "" if value is None else str(value)
