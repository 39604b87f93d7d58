"""Flags: their names, suggestions for mistyped ones, and the sources of their values.

    experiment's defaults  <  model of --init-from  <  --config FILE  <  flags

A file of settings becomes flags that precede those of the command line, so one mechanism parses
both, and only the result is validated as a whole. An error becomes one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from lmjax import checks, strict_json
from lmjax.console import stages
from lmjax.interop import settings_of
from lmjax.runs.config import from_json, to_json
from lmjax.train import Config, InputError

T = TypeVar("T")

WIDEST_TEXT = 100
"""Columns of prose in a help text, however wide the terminal is."""

ALIASES = {
    "accumulation-steps": "micro-batches", "beta1": "b1", "beta2": "b2", "block-size": "context",
    "bs": "batch-size", "clip": "clip-norm", "context-length": "context", "d-ff": "mlp-width",
    "d-model": "width", "decay": "weight-decay", "depth": "layers", "dim": "width",
    "dir": "workdir", "dtype": "precision", "epochs": "steps", "epsilon": "eps",
    "eval-every": "evaluation.every", "eval-interval": "evaluation.every",
    "ffn-width": "mlp-width", "grad-accum": "micro-batches", "grad-clip": "clip-norm",
    "gradient-accumulation-steps": "micro-batches", "hidden-size": "width", "iters": "steps",
    "iterations": "steps", "log-interval": "log-every", "logging-steps": "log-every", "lr":
    "learning-rate", "max-grad-norm": "clip-norm", "max-iters": "steps", "max-steps": "steps",
    "momentum": "b1", "n-embd": "width", "n-head": "heads", "n-heads": "heads", "n-layer":
    "layers", "n-layers": "layers", "num-heads": "heads", "num-layers": "layers", "num-steps":
    "steps", "optim": "optimizer.name", "optimizer": "optimizer.name", "out": "workdir",
    "out-dir": "workdir", "output-dir": "workdir", "policy": "precision", "random-seed": "seed",
    "save-every": "checkpoint.every", "save-steps": "checkpoint.every", "seq-len": "context",
    "seq-length": "context", "sequence-length": "context", "tp": "mesh.tensor", "vocab":
    "vocab-size", "warmup": "warmup-steps", "wd": "weight-decay",
}  # fmt: skip
"""Names of settings elsewhere, and here."""


NAMED = {"config_file": "config", "from_": "from"}
"""Flags that are not named after their field."""


def program(main: Any = None) -> tuple[str, str]:
    """The dotted name of the started module, and the command that started it.

    A module started by its path is named after the file.
    """
    spec = getattr(main or sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return spec.name, f"python -m {spec.name}"
    return Path(sys.argv[0]).stem or "experiment", f"python {sys.argv[0]}"


def parsed(kind: type[T], arguments: Sequence[str], *, default: T, command: str) -> T:
    """The flags of a dataclass.

    Args:
      kind: the dataclass.
      arguments: from the command line.
      default: an instance with the values of omitted flags.
      command: what the user has typed before the flags.

    Raises:
      InputError: a flag is unknown, its value is invalid, or the whole config is.
      SystemExit: the help was requested and printed, below the docstring of the main module.
    """
    refuse_unknown(arguments, known_flags(kind))
    if {"-h", "--help"} & set(arguments):
        stages.end(stages.IMPORTING)
        print(laid_out(sys.modules["__main__"].__doc__ or ""))
    return parse_flags(
        lambda: tyro.cli(kind, default=default, args=arguments, prog=command, description=" ")
    )


def parse_flags(parse: Callable[[], T]) -> T:
    """Runs tyro; its boxed errors, and those of config dataclasses, become one line."""
    stages.end(stages.IMPORTING)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return parse()
    except ValueError as error:  # a config dataclass rejected the values
        raise InputError(str(error)) from error
    except SystemExit as error:
        if not error.code:
            raise
        raise InputError(_one_line(complaint.getvalue())) from error


def _one_line(boxed: str) -> str:
    """The text of tyro's boxes, without colors and frames and the pointer to --help."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", boxed)
    lines = [
        re.sub(r"[\u2500-\u257f]", " ", line) for line in plain.splitlines() if "──" not in line
    ]
    text = " ".join(" ".join(lines).split())
    for noise, words in (
        (r"For full helptext, (run|see) .*", ""),
        (r"Argument helptext: .*", ""),
        (r"^Error parsing config\S*: ", ""),
        (r"^Error parsing (?=--)", ""),
        (r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number"),
        (r"could not convert string to float: (.*)", r"\1 is not a number"),
    ):
        text = re.sub(noise, words, text).strip()
    return text or "bad flags"


# --- Unknown flags


def known_flags(kind: Callable[..., Any]) -> list[str]:
    """The flags of a dataclass or of a command's function, without `--`."""
    found = []
    for name, hint in _leaves(kind):
        flag = NAMED.get(name, name.removeprefix("config.")).replace("_", "-")
        found.append(flag)
        if bool in typing.get_args(hint) or hint is bool:
            part, dot, last = flag.rpartition(".")
            found.append(f"{part}{dot}no-{last}")
    return found


def _leaves(kind: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(kind, type):
        yield from checks.leaves(kind)
        return
    hints = typing.get_type_hints(kind)
    for name, parameter in inspect.signature(kind).parameters.items():
        hint = hints[name]
        if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
            yield from ((f"{name}.{inner}", h) for inner, h in checks.leaves(hint))
        elif parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
            yield name, hint


def refuse_unknown(arguments: Iterable[str], known: Sequence[str]) -> None:
    """Rejects an unknown flag and suggests the one that may be meant.

    Raises:
      InputError: for the first such flag.
    """
    for argument in arguments:
        flag = re.fullmatch(r"--([A-Za-z][^=\s]*)(=.*)?", argument, re.DOTALL)
        if argument == "--":
            return
        if flag is None or (name := flag[1].replace("_", "-")) in (*known, "help"):
            continue
        meant = suggested(name, known)
        hint = f"did you mean --{meant}?" if meant else "--help lists the flags"
        raise InputError(f"unknown flag --{flag[1]}; {hint}")


def suggested(name: str, known: Sequence[str]) -> str | None:
    """The flag that may be meant: an alias, one of another part, or one spelled alike."""
    part, _, last = name.rpartition(".")
    negated = "no-" if last.startswith("no-") else ""
    for meant in (ALIASES.get(name), ALIASES.get(last), last, last.removeprefix("no-")):
        places = [f for f in known if meant and (f == meant or f.endswith(f".{meant}"))]
        if places:
            return _nearest_place(places, part)
    ends = {flag.rpartition(".")[2] for flag in known}
    inside = [flag for flag in known if part and flag.startswith(f"{part}.")]
    own = difflib.get_close_matches(name, inside, 1, 0.7)
    whole = own or difflib.get_close_matches(name, known, 1, 0.75)
    if whole or negated:
        return whole[0] if whole else None
    close = difflib.get_close_matches(last, ends, 1, 0.7)
    return (
        _nearest_place([f for f in known if f.rpartition(".")[2] == close[0]], part)
        if close
        else None
    )


def _nearest_place(places: Sequence[str], part: str) -> str:
    """The one in the same part, else the one at the top, else that of the first part."""
    return min(places, key=lambda flag: (flag.rpartition(".")[0] != part, flag.count(".")))


# --- Files of settings


def with_file(arguments: Sequence[str], origin: str = "") -> list[str]:
    """The arguments, preceded by those from where a run starts and from a file of settings.

    Args:
      arguments: from the command line; the last `--config FILE` and `--init-from ORIGIN` count.
      origin: where the run starts if no argument says so.
    """
    path = _last("--config", arguments)
    settings = flags_of_file(path) if path else []
    given = _last("--init-from", [*settings, *arguments])
    origin = origin if given is None else given
    start = list(_as_flags(settings_of(origin), "")) if origin else []
    return [*start, *settings, *arguments]


def _last(flag: str, arguments: Sequence[str]) -> str | None:
    """The last value that arguments give a flag."""
    found = None
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else next(iter(arguments[index + 1 :]), "")
    return found


def flags_of_file(name: str) -> list[str]:
    """A file of settings as flags: the `config.json` of a run, or any part of one.

    A recorded config has every derived field filled in. Fields that would be derived to the same
    value are reopened here to follow the flags, as the kind of loss scale does the policy.

    Raises:
      InputError: it cannot be read, or does not hold settings.
    """
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    try:
        values = strict_json.read(path)
        if not isinstance(values, dict):
            raise ValueError("it does not hold an object")
        if "version" in values:
            values = to_json(reopened(from_json(values)))
        return list(_as_flags(values, ""))
    except OSError as error:
        raise InputError(f"--config {name}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"--config {name}: {error}") from error


DERIVED: dict[str, dict[str, Any]] = {
    "model": {"kv_heads": 0, "head_width": 0, "mlp_width": 0},
    "loss_scale": {"kind": "auto", "format": "auto"},
    "evaluation": {"batch_size": 0},
}
"""The fields that `Config.resolved` fills in, and their values before that."""


def reopened(config: Config) -> Config:
    """The same run, with every field reopened that would be derived to the same value."""
    resolved = config.resolved()
    for part, fields in DERIVED.items():
        for name, value in fields.items():
            own = getattr(config, part)
            try:
                opened = dataclasses.replace(own, **{name: value})
                candidate = dataclasses.replace(config, **{part: opened})
                config = candidate if candidate.resolved() == resolved else config
            except ValueError:  # such as a width that the heads do not divide
                continue
    return config


def _as_flags(values: dict[str, Any], prefix: str) -> Iterator[str]:
    hints = dict(checks.leaves(Config))
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, dict) and any(known.startswith(f"{dotted}.") for known in hints):
            yield from _as_flags(value, f"{dotted}.")
            continue
        if dotted not in hints:
            meant = checks.suggestion(dotted, hints)
            raise ValueError(f"unknown config field {dotted}{meant}")
        part, dot, last = dotted.replace("_", "-").rpartition(".")
        if hints[dotted] is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{dotted} is {value!r}; it must be true or false")
            yield f"--{part}{dot}{'' if value else 'no-'}{last}"
        elif isinstance(value, list | tuple):
            yield from (f"--{part}{dot}{last}", *map(str, value))
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            yield f"--{part}{dot}{last}={value}"
        else:
            raise ValueError(f"{dotted} is {value!r}; it must be a number or a string")


# --- Help


def laid_out(text: str, width: int | None = None) -> str:
    """A docstring for a terminal: prose is wrapped, manual layout is kept.

    A paragraph has manual layout if one of its lines is indented or has gaps. Lines that are too
    long continue below their last column.
    """
    width = width or min(shutil.get_terminal_size().columns, WIDEST_TEXT)
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(_paragraph(part.splitlines(), width) for part in paragraphs) + "\n"


def _paragraph(lines: Sequence[str], width: int) -> str:
    by_hand = any(re.search(r"^\s|^[-*] |\S\s{2,}\S", line) for line in lines)
    if not by_hand:
        return textwrap.fill(" ".join(lines), width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(_continued(line, width) for line in lines)


def _continued(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    gaps = [gap.end() for gap in re.finditer(r"^\s+|(?<=\S)\s{2,}|^[-*] ", line)]
    column = max((gap for gap in gaps if gap <= width // 2), default=0)
    first = re.sub(r"\s", "\u00a0", line[:column])  # the gaps must not be folded
    filled = textwrap.fill(
        first + line[column:],
        width,
        subsequent_indent=" " * column,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled.replace("\u00a0", " ")
