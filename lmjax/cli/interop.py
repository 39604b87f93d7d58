"""The verbs that exchange models with Hugging Face's transformers: import and export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lmjax.checks import at_least
from lmjax.cli.common import DONE, RunDirectory, UserPath, bad_input, print_json
from lmjax.console import stages
from lmjax.console.wording import counted
from lmjax.data import DataConfig
from lmjax.files.filenames import printable
from lmjax.interop import Made, export_run, import_run

Count = Annotated[int, at_least(1)]


def import_model(
    directory: tyro.conf.Positional[UserPath],
    /,
    to: UserPath,
    data: Annotated[DataConfig, tyro.conf.arg(name="data")] = DataConfig(),  # noqa: B008
    precision: str | None = None,
    context: Count | None = None,
    json: bool = False,
) -> int:
    """Makes a run of a model that transformers saved: GPT-2, Llama, Qwen, Mistral, BERT.

    The run generates, scores, evaluates and exports, and other runs can start from it with
    --init-from. Its parameters are those of the files, bit for bit, unless --precision stores them
    in another format.

    Args:
      directory: Of config.json, one or more safetensors files, and the tokenizer.
      to: The run directory to write; it must not exist.
      data: What evaluate reads, and the tokenizer if the directory has none.
      precision: Policy; by default that of an exported run, or else parameters and computation in
        the format of the files.
      context: Context in tokens; by default what the model has, at most 1024.
      json: Print JSON.
    """
    with stages.stage(f"importing {printable(directory)}"):
        made = bad_input(import_run, directory, to, data, precision, context)
    _show(made, json=json)
    return DONE


def export(
    run: RunDirectory,
    /,
    to: UserPath,
    dtype: Literal["f32", "bf16", "f16"] | None = None,
    shard_megabytes: Count = 2000,
    json: bool = False,
) -> int:
    """Writes the newest parameters of a run so that Hugging Face's transformers load them.

    Args:
      run: The run directory, or its URL in an object store such as s3://BUCKET/RUN.
      to: The directory to write; it must not exist.
      dtype: Format of the tensors; by default the one that they are stored in.
      shard_megabytes: Largest size of a file, in millions of bytes.
      json: Print JSON.
    """
    with stages.stage(f"exporting {printable(run)}"):
        made = bad_input(export_run, run, to, dtype, shard_megabytes * 10**6)
    _show(made, json=json)
    return DONE


def _show(made: Made, *, json: bool) -> None:
    values = dataclasses.asdict(made)
    if json:
        print_json({name: str(v) if isinstance(v, Path) else v for name, v in values.items()})
        return
    print(
        f"{printable(made.directory)} is a {made.architecture} of "
        f"{counted(made.parameters, 'parameter')}, {made.precision}, with the tokenizer "
        f"{made.tokenizer}"
    )
    for note in made.notes:
        print(f"note: {printable(note)}")
