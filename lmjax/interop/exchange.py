"""From a folder of Hugging Face to a run directory, and back.

Both appear completely or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax

from lmjax import strict_json
from lmjax.console.progress import say
from lmjax.data import ByteTokenizer, DataConfig, Tokenizer, read_tokenizer
from lmjax.errors import InputError
from lmjax.files.filenames import printable
from lmjax.files.publishing import published_directory
from lmjax.interop.architectures import architecture_of
from lmjax.interop.origin import casts, of_files, own_tokenizer
from lmjax.interop.reading import CONFIG, Pretrained, pretrained
from lmjax.interop.writing import write_pretrained
from lmjax.model import dense_weights, parameter_count
from lmjax.optim.storage import convert_params
from lmjax.parallel import sharding
from lmjax.precision import exact
from lmjax.runs.checkpoint import Checkpoints
from lmjax.runs.config import Config
from lmjax.runs.resolved import Phase, resolve
from lmjax.runs.run_directory import (
    BESIDE,
    class_names,
    open_run,
    read_config,
    record_environment,
)
from lmjax.runs.state import abstract_params, params_alone
from lmjax.runs.store.remote import fetched

KEPT: Final = (
    CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
LONGEST_CONTEXT: Final = 1024
"""Of an imported run, unless it is told otherwise: the cache of keys and values has this length."""


@dataclass(frozen=True)
class Made:
    """What was written.

    Attributes:
      directory: where.
      architecture: its `model_type`.
      parameters: how many.
      precision: the policy.
      tokenizer: in words.
      notes: what a user should know.
    """

    directory: Path
    architecture: str
    parameters: int
    precision: str
    tokenizer: str
    notes: tuple[str, ...]


def import_run(
    folder: Path,
    workdir: Path,
    data: DataConfig | None = None,
    precision: str | None = None,
    context: int | None = None,
) -> Made:
    """Makes a run directory of a model that transformers saved.

    Args:
      folder: of `config.json`, safetensors files and the tokenizer.
      workdir: where the run directory is to be; it must not exist, or be empty.
      data: what the run is evaluated on; its tokenizer counts if the folder has none.
      precision: the policy; None: that of an exported run, or of the dtype of the files.
      context: in tokens; None: what the model has, at most `LONGEST_CONTEXT`.

    Raises:
      InputError: the model cannot be imported; nothing was written.
    """
    _refuse_existing(workdir)
    with pretrained(folder) as found:
        tokenizer, data, notes = _tokenizer_of(found, data or DataConfig())
        data = dataclasses.replace(data, labels=data.labels or found.labels)
        config = Config(
            precision=precision or found.precision,
            model=found.model,
            data=data,
            context=context or min(found.model.max_positions, LONGEST_CONTEXT),
        )
        phase = resolve(config).at(0)
        stored = of_files(found)
        mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1))
        where = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(phase, mesh))
        convert = lambda params: convert_params(params, {}, stored, phase.param_sites)[0]
        cast = casts(stored, phase.param_sites)
        params = found.parameters(mesh)
        if cast:
            params = exact.jit(convert, out_shardings=where)(params)
        with _published(workdir) as partial:
            open_run(partial, phase.config)
            record_environment(partial, resolve(config))
            tokenizer.save(partial / "tokenizer.json")
            _keep(folder, partial / BESIDE)
            with contextlib.closing(Checkpoints(partial / "checkpoints", 1)) as checkpoints:
                counters = {"train_seconds": 0.0, "corpus": "", "rewinds": []}
                checkpoints.save(0, params_alone(params, 0), {}, counters)
                del params  # what is written is read back, so that both would be in memory
        return _made(workdir, found.architecture.name, phase, tokenizer, (*notes, *cast))


def export_run(
    run: str | Path, folder: Path, dtype: str | None = None, limit: int = 2 * 10**9
) -> Made:
    """Writes the newest parameters of a run so that transformers loads them.

    Args:
      run: the run directory or its URL.
      folder: where to; it must not exist, or be empty.
      dtype: of the tensors: f32, bf16 or f16; None: as stored.
      limit: bytes of a file.

    Raises:
      InputError: there is no run, or transformers has no such model; nothing was written.
      CheckpointError: the run has checkpoints, but none is intact.
    """
    _refuse_existing(folder)
    with fetched(run) as workdir:
        config = read_config(workdir)
        imported = _imported(workdir)
        architecture = architecture_of(config.model, imported.get("model_type", ""))
        tokenizer = read_tokenizer(str(workdir))
        with contextlib.closing(Checkpoints(workdir / "checkpoints", note=say)) as checkpoints:
            step = checkpoints.newest_intact()
            if step is None:
                raise InputError(f"{run} has no complete checkpoint yet; train it further")
            phase = resolve(config).after(step)
            mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1))
            params = dense_weights(checkpoints.restore_params(step, abstract_params(phase, mesh)))
        # Elsewhere weights are arrays, which the same policy rounds while it computes.
        precision = phase.config.precision.replace(".stored", "").replace(".static", "")
        own = (workdir / BESIDE / "tokenizer.json").is_file()
        ids = {"bos_token_id": tokenizer.start_of_document}
        ids["eos_token_id"] = tokenizer.end_of_document
        with _published(folder) as partial:
            cast = write_pretrained(
                partial,
                architecture,
                config.model,
                params,
                precision=precision,
                dtype=dtype,
                labels=class_names(workdir, config),
                imported=ids | imported if own else imported | ids,
                limit=limit,
            )
            if imported:
                _keep(workdir / BESIDE, partial, but=CONFIG)
            if not (partial / "tokenizer.json").exists():
                for name, text in tokenizer.exported(config.model.max_positions).items():
                    (partial / name).write_text(text, encoding="utf-8")
        return _made(folder, architecture.name, phase, tokenizer, cast)


def _made(
    directory: Path, name: str, phase: Phase, tokenizer: Tokenizer, notes: tuple[str, ...]
) -> Made:
    words = f"{tokenizer.name} of {tokenizer.vocab_size:,} tokens"
    count = parameter_count(phase.config.model)
    return Made(directory, name, count, phase.config.precision, words, notes)


def _tokenizer_of(
    found: Pretrained, data: DataConfig
) -> tuple[Tokenizer, DataConfig, tuple[str, ...]]:
    """The tokenizer of an imported model, the settings that name it, and notes."""
    rows, notes = found.model.vocab_size, found.notes
    tokenizer: Tokenizer | None = own_tokenizer(found.folder, data.end_of_document)
    if tokenizer is not None:
        data = dataclasses.replace(data, tokenizer=str(found.folder.absolute()))
    elif data.tokenizer_path:
        tokenizer = read_tokenizer(data.tokenizer, data.end_of_document)
    else:
        tokenizer, data = ByteTokenizer(), dataclasses.replace(data, tokenizer="bytes")
        notes += ("it has no tokenizer, so texts are read as bytes; name one: --data.tokenizer",)
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"{found.folder} cannot be imported: the tokenizer {tokenizer.name} has "
            f"{tokenizer.vocab_size} tokens, but the model embeds {rows}"
        )
    return tokenizer, data, notes


def _imported(workdir: Path) -> dict[str, Any]:
    """The `config.json` that a run was imported with; empty if it was not."""
    path = workdir / BESIDE / CONFIG
    return strict_json.read(path) if path.is_file() else {}


def _keep(source: Path, target: Path, but: str = "") -> None:
    """Copies the small files of a folder."""
    target.mkdir(exist_ok=True)
    for name in KEPT:
        if name != but and (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _refuse_existing(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists; choose another --to or delete it")


@contextlib.contextmanager
def _published(target: Path) -> Iterator[Path]:
    """`published_directory`; what the system refuses becomes one line."""
    try:
        with published_directory(target) as partial:
            yield partial
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write {printable(target)}: {reason}") from error
