"""Folders of Hugging Face: written and read bit for bit; what is wrong is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from lmjax.checks import LARGEST_F32
from lmjax.compression.written import write_run
from lmjax.data import ByteTokenizer, DataError
from lmjax.errors import InputError
from lmjax.inference import load_model
from lmjax.interop import export_run, import_run, pretrained
from lmjax.interop.architectures import ARCHITECTURES, architecture_of
from lmjax.interop.writing import write_pretrained
from lmjax.model import ModelConfig, structure
from lmjax.parallel import sharding
from lmjax.precision import paths

pytest.importorskip("safetensors")

SMALL: dict[str, Any] = {
    "vocab_size": 257,
    "max_positions": 24,
    "width": 12,
    "layers": 2,
    "heads": 6,
}
LLAMA = SMALL | {
    "kv_heads": 2, "mlp_width": 20, "positions": "rope", "norm": "rms", "activation": "swiglu",
    "bias": False,
}  # fmt: skip
MODELS = {
    "gpt2": SMALL,
    "llama": LLAMA | {"attention_bias": "qkvo"},
    "qwen2": LLAMA | {"attention_bias": "qkv"},
    "qwen3": LLAMA | {"qk_norm": True, "head_width": 4},
    "mistral": LLAMA,
}


def drawn(model: ModelConfig, dtype: Any = np.float32) -> Any:
    generator = np.random.default_rng(0)
    draw = lambda leaf: generator.normal(0, 0.1, leaf.shape).astype(dtype)
    return jax.tree.map(draw, structure(model)[1])


def written(
    folder: Path, name: str = "llama", dtype: Any = np.float32, limit: int = 10**9, **changes: Any
) -> tuple[ModelConfig, Any]:
    model = ModelConfig(**MODELS[name] | changes)
    folder.mkdir()
    params = drawn(model, dtype)
    write_pretrained(
        folder, ARCHITECTURES[name], model, params, precision="p=f32", imported={}, limit=limit
    )
    return model, params


def one_device() -> Any:
    return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, name: str, tied: bool, dtype: Any):
    """With its config; in one file or in several, where every second case has several."""
    model, params = written(tmp_path / "hf", name, dtype, 4000 if tied else 10**9, tied=tied)
    assert (tmp_path / "hf" / "model.safetensors").exists() != tied
    with pretrained(tmp_path / "hf") as found:
        assert (found.architecture.name, found.model.resolved()) == (name, model.resolved())
        assert found.dtype == dtype
        read = paths.flatten(found.parameters(one_device()))
    for path, leaf in paths.flatten(params).items():
        assert read[path].dtype == dtype
        np.testing.assert_array_equal(np.asarray(read[path]), leaf, err_msg=path)


def test_each_model_is_exported_as_what_it_is():
    for name, fields in MODELS.items():
        model = ModelConfig(**fields)
        assert architecture_of(model, name).name == name
        assert architecture_of(model).name == ("llama" if name == "mistral" else name)
    with pytest.raises(InputError, match=r"nearest is gpt2, but model\.kv_heads is 2, not 6"):
        architecture_of(ModelConfig(**SMALL, kv_heads=2))
    with pytest.raises(InputError, match=r"model\.parametrisation is unit, not standard"):
        architecture_of(ModelConfig(**SMALL, parametrisation="unit"))


def test_a_run_is_imported_and_exported(tmp_path: Path, capsys: Any):
    """With a policy that stores less, the casts are named."""
    model, params = written(tmp_path / "hf", "gpt2")
    made = import_run(tmp_path / "hf", tmp_path / "run", precision="p=bf16,c=f32")
    assert "all cast from f32 to bf16" in made.notes
    loaded = load_model(tmp_path / "run")
    assert loaded.config.model == model.resolved()
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    rounded = params["embed"]["table"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(loaded.params["embed"]["table"], rounded)
    out = export_run(tmp_path / "run", tmp_path / "out", dtype="f32")
    assert (out.architecture, out.precision) == ("gpt2", "p=bf16,c=f32,o=f32")
    with pretrained(tmp_path / "out") as found:
        assert found.precision == "p=bf16,c=f32,o=f32"
        table = found.parameters(one_device())["embed"]["table"]
    np.testing.assert_array_equal(table, rounded.astype(np.float32))
    for call in (
        lambda: import_run(tmp_path / "hf", tmp_path / "run"),
        lambda: export_run(tmp_path / "run", tmp_path / "hf"),
    ):
        with pytest.raises(InputError, match="exists; choose another --to"):
            call()


def test_names_of_classes_survive(tmp_path: Path):
    """So does what else a folder says, also in a run that was made of the imported one."""
    model = ModelConfig(**SMALL, family="encoder", token_types=2, classes=3)
    kept: dict[str, Any] = {"precision": "p=f32", "limit": 10**9}
    kept |= {"labels": ("good", "so-so", "bad"), "imported": {"own_field": 5}}
    (tmp_path / "hf").mkdir()
    write_pretrained(tmp_path / "hf", ARCHITECTURES["bert"], model, drawn(model), **kept)
    import_run(tmp_path / "hf", tmp_path / "run")
    imported = load_model(tmp_path / "run")
    assert imported.config.data.labels == kept["labels"]
    write_run(tmp_path / "made", imported, source=tmp_path / "run")
    export_run(tmp_path / "made", tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["id2label"] == {"0": "good", "1": "so-so", "2": "bad"}
    assert values["label2id"] == {"good": 0, "so-so": 1, "bad": 2}
    assert values["own_field"] == 5
    for names in ({"1": "good", "2": "bad"}, 3):
        config_with(tmp_path / "hf", id2label=names)
        with pytest.raises(InputError, match=r"id2label is .* it must number classes from 0"):
            import_run(tmp_path / "hf", tmp_path / "other")


def config_with(folder: Path, **changes: Any) -> None:
    """Changes fields of `config.json`; None removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({n: v for n, v in values.items() if v is not None}))


def tensors_with(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Changes the tensors of a folder."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def header_with(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    assert old in content
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


NORM, TABLE = "model.norm.weight", "model.embed_tokens.weight"
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda f: (f / "config.json").unlink(), "holds no model: config.json cannot be"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
    "no object": (
        lambda f: (f / "config.json").write_text("[1]"),
        "is damaged: it holds no object",
    ),
    "no type": (lambda f: config_with(f, model_type=None), "has no model_type"),
    "another architecture": (
        lambda f: config_with(f, model_type="mamba"),
        "is a 'mamba', an architecture that lmjax does not know; it knows gpt2, bert, llama",
    ),
    "fields missing": (
        lambda f: config_with(f, num_hidden_layers=None, hidden_size=None),
        "config.json has no hidden_size; config.json has no num_hidden_layers",
    ),
    "fields of no size": (
        lambda f: config_with(f, num_hidden_layers=-1, vocab_size="many", rms_norm_eps=True),
        "vocab_size is 'many'; it must be a whole number above 0; num_hidden_layers is -1",
    ),
    "options": (
        lambda f: config_with(
            f,
            hidden_act="gelu",
            rope_scaling={"rope_type": "yarn"},
            layer_types=["sliding_attention"],
        ),
        "hidden_act is 'gelu'.* layer_types has sliding_attention 1 times.* its type is 'yarn'",
    ),
    "heads that do not divide": (
        lambda f: config_with(f, num_key_value_heads=4),
        "model.kv_heads is 4, which does not divide model.heads 6",
    ),
    "no tensors": (
        lambda f: (f / "model.safetensors").unlink(),
        "model.safetensors does not exist",
    ),
    "a truncated file": (truncated, "model.safetensors is damaged: .*file not fully covered"),
    "a wrong tag": (
        lambda f: header_with(f, b'"dtype":"F32"', b'"dtype":"F64"'),
        "model.safetensors is damaged",
    ),
    "another dtype": (
        lambda f: tensors_with(f, lambda t: t.update({NORM: t[NORM].astype(np.int32)})),
        "model.norm.weight is I32; supported are F32, BF16, F16",
    ),
    "missing and surplus": (
        lambda f: tensors_with(f, lambda t: t.update({"model.extra": t.pop(NORM)})),
        "model.norm.weight missing; no place for model.extra",
    ),
    "another shape": (
        lambda f: config_with(f, intermediate_size=24),
        r"model.layers.0.mlp.down_proj.weight is \[12, 20\], but config.json makes it \[12, 24\]",
    ),
    "another head": (
        lambda f: tensors_with(f, lambda t: t.update({"lm_head.weight": np.ones((257, 12), "f4")})),
        "no place for lm_head.weight",
    ),
    "a number that is none": (
        lambda f: tensors_with(f, lambda t: t[NORM].__setitem__(3, np.nan)),
        "model.norm.weight holds NaN or infinite numbers",
    ),
    "an index of nothing": (
        lambda f: (
            (f / "model.safetensors").unlink()
            or (f / "model.safetensors.index.json").write_text('{"weight_map": 3}')
        ),
        "index.json is damaged: weight_map does not name files of tensors",
    ),
    "a damaged tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"model":'),
        "tokenizer.json is damaged: Expecting value",
    ),
    "a larger tokenizer": (
        lambda f: (
            config_with(f, vocab_size=250)
            or tensors_with(
                f, lambda t: t.update({T: t[T][:250] for T in ["model.embed_tokens.weight"]})
            )
        ),
        "the tokenizer bytes has 256 tokens, but the model embeds 250",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_imported_is_refused_in_one_line(tmp_path: Path, case: str):
    written(tmp_path / "hf", "llama")
    spoil, message = WRONG[case]
    spoil(tmp_path / "hf")
    with pytest.raises((InputError, DataError), match=message) as error:
        import_run(tmp_path / "hf", tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_copy_of_the_embedding_is_not_surplus(tmp_path: Path):
    """Files of tied models may repeat the table as the head, lack the prefix, and hold buffers."""
    _, params = written(tmp_path / "hf", "gpt2")

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["wte.weight"]
        tensors["h.0.attn.bias"] = np.tril(np.ones((24, 24), bool))

    tensors_with(tmp_path / "hf", change)
    with pretrained(tmp_path / "hf") as found:
        read = found.parameters(one_device())
    np.testing.assert_array_equal(read["embed"]["table"], params["embed"]["table"])


def test_the_largest_numbers_survive_a_change_of_dtype(tmp_path: Path):
    """Tensors of several dtypes are read into one that holds them all."""
    written(tmp_path / "hf", "llama", ml_dtypes.bfloat16)
    large = np.full((12,), LARGEST_F32, np.float32)
    tensors_with(tmp_path / "hf", lambda tensors: tensors.update({NORM: large}))
    with pretrained(tmp_path / "hf") as found:
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.parameters(one_device())["norm"]["scale"], large)
