"""Where the first parameters of a run come from, if they are not drawn: a run, or Hugging Face.

Knows both kinds of folders, checkpoints and states, not how steps are computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from lmjax import strict_json
from lmjax.data import Tokenizer, holds_tokenizer, load_tokenizer, read_tokenizer
from lmjax.errors import InputError
from lmjax.interop.reading import POLICIES, Pretrained, is_pretrained, pretrained, read_model
from lmjax.model import (
    ModelConfig,
    Params,
    dense_weights,
    is_of_objective,
    param_sites,
    resolve_sites,
    structure,
)
from lmjax.parallel import sharding
from lmjax.parallel.agreement import is_first
from lmjax.precision import paths
from lmjax.precision.grammar import parse_policy
from lmjax.precision.policy import SitePolicy
from lmjax.runs.checkpoint import Checkpoints
from lmjax.runs.metrics import replace_text
from lmjax.runs.resolved import Phase, resolve
from lmjax.runs.run_directory import parameters_sha256, read_config
from lmjax.runs.state import TrainState, abstract_params, adopt
from lmjax.runs.store.object_store import as_url
from lmjax.runs.store.remote import fetched

FILE = "origin.json"
OF_TRAINING: Final = ("dropout", "z_loss", "init_std", "remat", "unroll")
"""Fields of a model that do not change what its parameters compute in evaluation."""

_PROBES = (
    "In 1948, she said: 'Don't worry, we'll go!' (3.14% of 2,000)\n\n\tfor i in range(10): x += i",
    "Grüße, señor; déjà vu, \u00e5ngstr\u00f6m \u4f60\u597d \u043c\u0438\u0440 \U0001f600 e\u0301",
)


class Origin(NamedTuple):
    """Parameters to start from.

    Attributes:
      name: what the user called it.
      model: its config.
      step: the training step of a run; None for a model from elsewhere.
      stored: how its parameters are stored, by path.
      tokenizer: its own, if it has one.
      notes: what a user should know.
      parameters: reads them onto a mesh.
    """

    name: str
    model: ModelConfig
    step: int | None
    stored: dict[str, SitePolicy]
    tokenizer: Tokenizer | None
    notes: tuple[str, ...]
    parameters: Callable[[sharding.Mesh], Params]


@contextlib.contextmanager
def opened(name: str) -> Iterator[Origin]:
    """The origin of that name: a run directory or its URL, or a folder of Hugging Face.

    Raises:
      InputError: it is neither, or cannot be read.
      CheckpointError: the run has checkpoints, but none is intact.
    """
    with fetched(name) as folder:
        if is_pretrained(folder):
            with pretrained(folder) as found:
                own, read = own_tokenizer(folder), found.parameters
                yield Origin(name, found.model, None, of_files(found), own, found.notes, read)
            return
        config = read_config(folder)
        with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
            step = checkpoints.newest_intact()
            if step is None:
                raise InputError(f"{name} has no complete checkpoint yet; train it first")
            phase = resolve(config).after(step)
            own = load_tokenizer(folder / "tokenizer.json")

            def read(mesh: sharding.Mesh) -> Params:
                params = checkpoints.restore_params(step, abstract_params(phase, mesh))
                return dense_weights(params)

            yield Origin(name, config.model, step, phase.param_sites, own, (), read)


def of_files(found: Pretrained) -> dict[str, SitePolicy]:
    """How the parameters of a folder of Hugging Face are stored, by path."""
    policy = parse_policy(POLICIES[found.dtype.name])
    return param_sites(found.model, resolve_sites(found.model, policy))


def own_tokenizer(folder: Path, end_of_document: str = "") -> Tokenizer | None:
    """The tokenizer in a folder of Hugging Face; None if it holds none.

    Raises:
      DataError: it holds one that is damaged, or in which no token ends a document.
    """
    return read_tokenizer(str(folder), end_of_document) if holds_tokenizer(folder) else None


def settings_of(name: str) -> dict[str, Any]:
    """The settings that a run takes over from its origin, as nested fields of a config.

    Raises:
      InputError: there is no such origin.
    """
    with fetched(name, checkpoint=False) as folder:
        if not folder.is_dir():
            raise InputError(
                f"there is no {name} to start from; name a run directory, or a folder that "
                "transformers saved, with --init-from"
            )
        here = name if as_url(name) else str(folder.absolute())
        if is_pretrained(folder):
            model, tokenizer = read_model(folder), here if own_tokenizer(folder) else ""
        else:
            config = read_config(folder)
            model, builtin = config.model, config.data.tokenizer in ("bytes", "gpt2")
            tokenizer = config.data.tokenizer if builtin else here
    fields = dataclasses.asdict(model)
    # What an encoder is trained for stays the run's own, unless the origin tells classes apart.
    own = (*OF_TRAINING, "headless", *(() if model.classes else ("classes",)))
    kept = {name: value for name, value in fields.items() if name not in own}
    return {"model": kept, **({"data": {"tokenizer": tokenizer}} if tokenizer else {})}


def refuse_unfit(name: str, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Rejects an origin whose parameters or tokens are not those of a run.

    Raises:
      InputError: a shape or the tokenizer differs, or there is no such origin.
    """
    with opened(name) as origin:
        wanted, found = (paths.flatten(structure(m)[1]) for m in (model, origin.model))
        unequal = [
            f"{path} is {_shape(found.get(path))} there and {_shape(wanted.get(path))} here"
            for path in sorted(wanted.keys() | found.keys())
            if _shape(found.get(path)) != _shape(wanted.get(path))
            and not (is_of_objective(model, path) and is_of_objective(origin.model, path))
        ]
        if unequal:
            more = f" and {len(unequal) - 4} more" if len(unequal) > 4 else ""
            raise InputError(
                f"the model does not have the parameters of {name}: {'; '.join(unequal[:4])}{more}"
            )
        own = origin.tokenizer
        if own is not None and not _encode_alike(own, tokenizer):
            raise InputError(
                f"the text is encoded with the tokenizer {tokenizer.name}, but the model in {name} "
                f"was trained with another, {own.name} of {own.vocab_size} tokens; add "
                f"--data.tokenizer {name}"
            )


def started_from(
    name: str, phase: Phase, mesh: sharding.Mesh, workdir: Path, note: Callable[[str], None]
) -> TrainState:
    """The state of a run before its first step, with the parameters of an origin.

    It is recorded in `origin.json`: where they are from, their digest, and what was cast.
    """
    with opened(name) as origin:
        params, model = origin.parameters(mesh), phase.config.model
        digest = parameters_sha256(params)
        params, heads = _fitting(params, model)
        cast = casts(origin.stored, phase.param_sites)
        for text in (*origin.notes, *_changes(origin.model, model), *heads, *cast):
            note(f"{name}: {text}")
        if is_first():
            record = {"from": name, "step": origin.step, "parameters_sha256": digest}
            own = {"casts": cast, "heads": heads} if heads else {"casts": cast}
            text = strict_json.dumps(record | own, indent=2)
            replace_text(workdir / FILE, text + "\n")
        return adopt(params, origin.stored, phase, mesh)


def _fitting(params: Params, model: ModelConfig) -> tuple[Params, list[str]]:
    """The parameters that a model has too; which others it draws, and which it leaves, in words."""
    flat, shapes = paths.flatten(params), paths.flatten(structure(model)[1])
    kept = {p: x for p, x in flat.items() if _shape(x) == _shape(shapes.get(p))}
    places = lambda found: ", ".join(sorted({path.rpartition("/")[0] for path in found}))
    words = {
        "new, drawn from the seed": shapes.keys() - kept.keys(),
        "left out": flat.keys() - shapes.keys(),
    }
    return paths.unflatten(kept), [f"{places(f)}: {how}" for how, f in words.items() if f]


def casts(old: dict[str, SitePolicy], new: dict[str, SitePolicy]) -> list[str]:
    """Which parameters change their format, in words."""
    changed: dict[tuple[str, str], list[str]] = {}
    for path, site in new.items():
        if path in old and old[path].params != site.params:
            changed.setdefault((old[path].params.name, site.params.name), []).append(path)
    return [
        f"{'all' if len(found) == len(new) else ', '.join(found)} cast from {was} to {now}"
        for (was, now), found in changed.items()
    ]


def _changes(old: ModelConfig, new: ModelConfig) -> list[str]:
    """What the same parameters are made to compute otherwise, in words."""
    was, now = (dataclasses.asdict(model.resolved()) for model in (old, new))
    return [
        f"model.{name} is {was[name]} there and {now[name]} here"
        for name in was
        if was[name] != now[name] and name not in (*OF_TRAINING, "classes", "headless")
    ]


def _encode_alike(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give the same ids, whatever they are called."""
    ends = (one.start_of_document, one.end_of_document)
    return ends == (other.start_of_document, other.end_of_document) and all(
        one.encode(probe).tolist() == other.encode(probe).tolist() for probe in _PROBES
    )


def _shape(leaf: Any) -> str:
    return "nothing" if leaf is None else str(list(leaf.shape))
