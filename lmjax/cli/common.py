"""The command line of experiments, and code shared by all command lines.

Flags are derived from typed dataclasses and functions; an error becomes one line on stderr and an
exit code:

    0 done    2 bad input, nothing written    75 stopped early with a checkpoint
    130, 143 ended at once by SIGINT (Ctrl-C) or SIGTERM    1 anything else
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro
from rich.console import Console

from lmjax import strict_json
from lmjax.checks import at_least, validate
from lmjax.cli.flags import NAMED, parsed, program, reopened, with_file
from lmjax.console import interrupts, opening, stages
from lmjax.console.decoration import decoration
from lmjax.console.streams import tolerant
from lmjax.console.wording import counted
from lmjax.data import CacheFailed, DataError
from lmjax.errors import CheckpointError, OutOfMemory, StorageFailed
from lmjax.files.filenames import expanded, printable
from lmjax.inference import NonFiniteError, load_model
from lmjax.inference import generate as generate_text
from lmjax.parallel import distributed
from lmjax.parallel.agreement import is_first
from lmjax.parallel.distributed import DistributedConfig
from lmjax.plan.program import PlanError
from lmjax.runs.config import Extension, extended, unextended
from lmjax.runs.run_directory import finished_result
from lmjax.runs.store.remote import fetched
from lmjax.train import Config, InputError, TrainingFailed, read_config, train
from lmjax.train.compilation import keep_programs
from lmjax.train.exhaustion import explained, is_exhaustion
from lmjax.train.memory import keep_freed_memory

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75

T = TypeVar("T")

UserPath = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda typed: expanded(typed[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    ),
]
"""A path from the command line, with `~` expanded to a home directory."""

OWN_FLAGS: Any = tyro.conf.arg(name="")
"""Of a parameter that is a config: its fields are flags by their own names."""

Experiment = Annotated[str, tyro.conf.Positional]
"""A module, such as `experiments.quickstart`."""

REPEATED: Any = tyro.conf.UseAppendAction
"""Of a parameter whose values, or those of its fields, are given by one flag each."""

Repeated = Annotated[tuple[str, ...], REPEATED]
"""A flag that may be given several times."""

RunDirectory = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
"""A path or a URL, as a string: `Path` would collapse the two slashes."""

ExperimentName = tyro.conf.Positional[str]
"""A module, such as experiments.quickstart."""

FirstStep = Annotated[int, at_least(1), tyro.conf.arg(name=NAMED["from_"])]
"""A flag that Python has no name for."""


@dataclass(frozen=True)
class TrainFlags:
    """Flags of an experiment: its config, and the options of this launch."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    workdir: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """The run directory; the same command again resumes the run in it. s3://BUCKET/RUN and
    gs://BUCKET/RUN are in an object store: any machine can resume the run there."""
    config_file: Annotated[str, tyro.conf.arg(name=NAMED["config_file"], metavar="FILE")] = ""
    """Settings to start from, which other flags override: the config.json of a run, or a part."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    stop_after: Annotated[int, at_least(1)] | None = None
    """Stop with a checkpoint after this many steps of this launch; the schedule is unchanged."""
    extend_steps: Annotated[int, at_least(1)] | None = None
    """Prolong the finished run in the run directory by this many steps; on record in config.json
    and history.jsonl."""
    extend_schedule: Extension = "constant"
    """How: at the learning rate where the schedule ended, or rewarm: up to the peak in another
    warm-up, then down again as before."""
    sample: Annotated[int, at_least(0)] = 200
    """Tokens of sample text that a decoder generates when a single-process run is done; 0: none."""

    def __post_init__(self) -> None:
        """Rejects values out of range at the start, not at the end of the run."""
        validate(self)


def run_experiment(config: Callable[[], Config]) -> NoReturn:
    """Runs the started module, an experiment, from the command line and exits.

    Args:
      config: the module's `config`.
    """
    opening.begin()
    keep_freed_memory()
    keep_programs()
    module, command = program()
    sys.exit(guarded(lambda: _run_experiment(module, config, sys.argv[1:], command)))


def _run_experiment(
    module: str,
    config: Callable[[], Config],
    arguments: Sequence[str],
    command: str = "",
) -> int:
    default = TrainFlags(config=config(), workdir=str(Path("runs", module.rpartition(".")[2])))
    command = command or f"python -m {module}"
    helped = {"-h", "--help"} & set(arguments)
    arguments = with_file(arguments, "" if helped else default.config.init_from)
    launch = parsed(TrainFlags, arguments, default=default, command=command)
    if launch.extend_steps is not None:
        with fetched(launch.workdir, checkpoint=False) as folder:
            read_config(folder)  # raises if there is no run to prolong
        longer = extended(launch.config, launch.extend_steps, launch.extend_schedule)
        launch = dataclasses.replace(launch, config=longer)
    return _launched(launch)


def resume_run(arguments: Sequence[str]) -> int:
    """Resumes a recorded run; takes an experiment's flags.

    Args:
      arguments: the run directory or its URL, and flags.
    """
    run = next(iter(arguments), "-")
    if run.startswith("-"):
        if {"-h", "--help"} & set(arguments):
            parsed(TrainFlags, arguments, default=TrainFlags(Config(), "RUN"), command=RESUME)
        raise InputError(f"name the run directory first: {RESUME}")
    with fetched(run, checkpoint=False) as folder:
        recorded = read_config(folder)
        result = finished_result(folder, recorded)
    default = TrainFlags(config=reopened(recorded), workdir=run)
    launch = parsed(TrainFlags, with_file(arguments[1:]), default=default, command=RESUME)
    if launch.workdir != run:
        raise InputError(f"{RESUME} resumes in RUN itself; leave out --workdir")
    if launch.extend_steps is not None:
        return _launched(_prolonged(launch, recorded, result is not None))
    if result is not None:
        print(
            f"{run} is finished: {held_out(result)} after {result['steps']} steps. --extend-steps "
            "N prolongs it; for a longer schedule start another run: an experiment with --config "
            f"{run}/config.json, --steps and --workdir"
        )
        return DONE
    keep_freed_memory()
    keep_programs()
    return _launched(launch)


def _prolonged(launch: TrainFlags, recorded: Config, finished: bool) -> TrainFlags:
    """A launch of a recorded run with its extension, unless the run is in the middle of it.

    Raises:
      InputError: it is in the middle of something else.
    """
    longer = lambda config: extended(config, launch.extend_steps or 0, launch.extend_schedule)
    if finished:
        return dataclasses.replace(launch, config=longer(launch.config))
    if recorded.optimizer.extensions and longer(unextended(recorded)) == recorded:
        return launch
    raise InputError(
        f"{launch.workdir} is not finished, so it cannot be prolonged; resume it without "
        "--extend-steps first"
    )


RESUME = "python -m lmjax resume RUN [FLAGS]"


def _launched(launch: TrainFlags) -> int:
    if threads := launch.config.reductions.threads:
        # The size of XLA's thread pool on CPU: the number of cores or of devices, whichever is
        # larger, unless set here before a backend exists.
        os.environ.setdefault("PJRT_NPROC", str(threads))
    alone = not _joined(launch.distributed)
    outcome = train(launch.config, launch.workdir, stop_after=launch.stop_after)
    if outcome.result is None:
        return STOPPED
    console = Console(highlight=False, emoji=False, quiet=not is_first())
    if launch.sample and alone and launch.config.model.family == "decoder":
        with decoration("a sample"):
            with stages.stage("generating a sample"):
                text = generate_text(load_model(outcome.workdir), "", tokens=launch.sample)
            if is_first():
                write_text(f"A sample:\n{text}\n")
    console.print(
        f"{held_out(outcome.result)} after {counted(outcome.step, 'step')} "
        f"({outcome.result['train_seconds']:.1f} s of training); everything is in "
        f"{printable(launch.workdir)}",
        markup=False,
        soft_wrap=True,
    )
    return DONE


def held_out(result: Mapping[str, Any]) -> str:
    """The scores in `result.json`, or of an `Evaluation`, in words."""
    names = {"accuracy": "accuracy", "F1": "f1"}
    found = {name: result[key] for name, key in names.items() if result.get(key) is not None}
    right = " and ".join(f"{name} {score:.4f}" for name, score in found.items())
    loss = f"held-out loss {float(result['eval_loss']):.4f} nats per"
    return f"{loss} text, {right}" if found else f"{loss} token"


def _joined(config: DistributedConfig) -> bool:
    """Joins the other processes, if any; returns whether there are any."""
    try:
        with stages.stage("waiting for the other processes"):
            return distributed.start(config)
    except ValueError as error:
        raise InputError(str(error)) from error


def guarded(call: Callable[[], int], *, prints_results: bool = False) -> int:
    """Calls a function and returns its exit code; errors become one line.

    Args:
      call: what to do; failing to print its output is not an error by itself.
      prints_results: its output is the result, so failing to print it is an error.
    """
    with tolerant() as out:
        code = _guarded(call)
        out.flush()
        # A reader that closed the pipe has what it wanted.
        if prints_results and code == DONE and not isinstance(out.failure, BrokenPipeError | None):
            _say_error(f"cannot write to standard output: {out.failure.strerror}")
            return FAILED
    return code


def _guarded(call: Callable[[], int]) -> int:
    try:
        with interrupts.catching():
            return call()
    except KeyboardInterrupt as error:
        if not isinstance(error, interrupts.Interrupted):
            error = interrupts.Interrupted(signal.SIGINT)
            print(f"stopped by {error}", file=sys.stderr)
        distributed.leave_at_once(error.exit_code)
        return error.exit_code
    except (InputError, DataError) as error:
        _say_error(error)
        return BAD_INPUT
    except (TrainingFailed, CheckpointError, PlanError, NonFiniteError, CacheFailed) as error:
        _say_error(error)
        return FAILED
    except (StorageFailed, OutOfMemory) as error:
        _say_error(error)
        distributed.leave_at_once(FAILED)
        return FAILED
    except Exception as error:
        if is_exhaustion(error):
            _say_error(explained(error))
            distributed.leave_at_once(FAILED)
            return FAILED
        if distributed.started():
            if not distributed.is_of_the_backend(error):
                traceback.print_exc()
            print(f"error: {distributed.explained(error)}", file=sys.stderr)
            distributed.leave_at_once(FAILED)
        raise


def _say_error(error: object) -> None:
    """Prints one line, even if names in the message contain control characters."""
    print(f"error: {printable(error)}", file=sys.stderr)


def load_experiment(name: str) -> Config:
    """The config of an experiment module.

    Raises:
      InputError: there is no such module, or it defines no `config`.
    """
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"no experiment {name!r}: {error}; name a module, such as experiments.quickstart"
        ) from error
    if not callable(getattr(module, "config", None)):
        raise InputError(f"{name} is not an experiment: it does not define config()")
    return module.config()


def write_text(text: str) -> None:
    """Writes text to stdout at once: unchanged to a file or pipe, `visible` to a terminal."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def visible(text: str) -> str:
    """The text with control characters, except tabs and newlines, as pictures (U+2400 to U+2421).

    A model may generate any character, and terminals act on some.
    """
    return "".join(map(_picture, text))


def _picture(character: str) -> str:
    code = ord(character)
    if code < 0x20 and character not in "\t\n":
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd" if 0x80 <= code < 0xA0 else character


def bad_input(call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Calls a function that validates user input; its ValueErrors become `InputError`."""
    try:
        return call(*arguments, **options)
    except ValueError as error:
        raise InputError(str(error)) from error


def print_json(value: Any) -> None:
    """Prints strict JSON."""
    print(strict_json.dumps(value))


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """A block that writes a file; a failure leaves no new file behind."""
    try:
        new = not path.exists()
        path.open("ab").close()
        try:
            yield
        except BaseException:
            if new:
                path.unlink()
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
