"""The files of a run directory, and what keeps two runs out of the same one."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import ROOT, strict_loads, tiny

from lmjax.runs.config import VERSION, from_json, to_json
from lmjax.runs.run_directory import (
    InputError,
    environment,
    hold_run,
    open_run,
    parameters_sha256,
    read_config,
    record_changes,
    record_environment,
)
from lmjax.train import RestoreConfig, resolve


@pytest.fixture
def config() -> Any:
    """A resolved config whose files are never read."""
    return tiny(Path("anywhere"), "mixed_f16").resolved()


def test_config_is_resolved_and_reads_back(config: Any, tmp_path: Path) -> None:
    open_run(tmp_path / "run", config)
    text = (tmp_path / "run" / "config.json").read_text()
    assert '"kind": "auto"' not in text
    recorded = strict_loads(text)
    assert recorded["loss_scale"]["kind"] == "dynamic"
    assert recorded["model"]["mlp_width"] == 4 * config.model.width
    assert recorded["precision"] == "p=f32,c=f16,o=f32"
    assert read_config(tmp_path / "run") == config
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert config.resolved() == config


def take_a_step(workdir: Path) -> None:
    """Leaves what makes the directory that of its run: the row of a step."""
    (workdir / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')


DAMAGED = {
    "no JSON": "{",
    "not UTF-8": b"\xff",
    "no object": "[]",
    "a part is not an object": '{"model": "large"}',
    "unknown field": '{"presicion": "f32"}',
    "wrong type": '{"steps": "many"}',
    "refused value": '{"precision": "c=f33"}',
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_config_is_an_input_error(damage: str, tmp_path: Path) -> None:
    content = DAMAGED[damage]
    encoded = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "config.json").write_bytes(encoded)
    with pytest.raises(InputError, match=r"config\.json is damaged or of another version"):
        read_config(tmp_path)


def test_another_run_is_refused_by_field(config: Any, tmp_path: Path) -> None:
    open_run(tmp_path, config)
    take_a_step(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    other = dataclasses.replace(
        config, seed=5, optimizer=dataclasses.replace(config.optimizer, b2=0.5)
    )
    with pytest.raises(InputError) as error:
        open_run(tmp_path, other)
    for part in ("seed is 0 there, 5 now", "optimizer.b2 is 0.99 there, 0.5 now", "--workdir"):
        assert part in str(error.value)
    assert "precision" not in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_directory_without_a_step_belongs_to_nobody(config: Any, tmp_path: Path) -> None:
    """Whatever the first start left behind when it failed, the corrected one takes its place."""
    open_run(tmp_path, config)
    for folder in ("checkpoints/.5.partial", "tensorboard"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("environment.json", "tokenizer.json", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    other = dataclasses.replace(config, batch_size=2)
    with hold_run(tmp_path, other, print):
        assert read_config(tmp_path) == other


@pytest.mark.parametrize("kept", ["checkpoints/5", "checkpoints/damaged", "metrics.jsonl"])
def test_a_directory_with_a_step_is_refused(kept: str, config: Any, tmp_path: Path) -> None:
    open_run(tmp_path, config)
    take_a_step(tmp_path) if kept.endswith("jsonl") else (tmp_path / kept).mkdir(parents=True)
    other = dataclasses.replace(config, batch_size=2)
    with (
        pytest.raises(InputError, match="batch_size is 4 there, 2 now"),
        hold_run(tmp_path, other, print),
    ):
        pytest.fail("it holds another run")
    assert read_config(tmp_path) == config


def test_a_directory_is_not_taken_over_where_nothing_can_be_locked(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may be compiling its first step there."""
    open_run(tmp_path, config)
    monkeypatch.setattr("fcntl.lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "")))
    other = dataclasses.replace(config, batch_size=2)
    with pytest.raises(InputError, match="holds another run"), hold_run(tmp_path, other, print):
        pytest.fail("it may be another's")
    assert read_config(tmp_path) == config


def test_a_directory_with_other_files_is_refused(config: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not empty and holds no run"):
        open_run(tmp_path, config)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_start_killed_while_it_wrote_its_first_file_can_be_repeated(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(Path, "replace", kill)
    with pytest.raises(Killed):
        open_run(tmp_path, config)
    monkeypatch.undo()
    assert list(tmp_path.iterdir())
    open_run(tmp_path, config)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/run"])
def test_an_unwritable_place_is_an_input_error(place: str, config: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the run directory"):
        open_run(tmp_path / place, config)


# --- One trainer a directory ---

HOLD = """
import sys
from pathlib import Path
from lmjax.files.locks import lock
with lock(Path(sys.argv[1]) / ".lock") as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_dead(config: Any, tmp_path: Path) -> None:
    open_run(tmp_path, config)
    said: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        refused = f"process {other.pid} on {platform.node()} is training in {tmp_path}"
        with (
            pytest.raises(InputError, match=re.escape(refused)),
            hold_run(tmp_path, config, said.append),
        ):
            pytest.fail("two processes train there")
        other.kill()
    with hold_run(tmp_path, config, said.append):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()
    assert said == []


def test_where_nothing_can_be_locked_the_run_continues_with_a_warning(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", unsupported)
    said: list[str] = []
    with hold_run(tmp_path / "run", config, said.append):
        assert read_config(tmp_path / "run") == config
    assert len(said) == 1
    assert "has no locks" in said[0]


def test_a_directory_of_another_run_is_not_even_locked(config: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds no run"), hold_run(tmp_path, config, print):
        pytest.fail("there is no run")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_config_of_who_came_first_stays(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two first starts at once: the second looks again when it has the lock."""
    from lmjax.runs import run_directory

    other = dataclasses.replace(config, seed=5)
    take = run_directory.lock

    @contextlib.contextmanager
    def late(path: Path, *, wait: bool) -> Any:
        monkeypatch.undo()
        with hold_run(tmp_path / "run", config, print):
            take_a_step(tmp_path / "run")
        with take(path, wait=wait) as mine:
            yield mine

    monkeypatch.setattr(run_directory, "lock", late)
    with (
        pytest.raises(InputError, match="seed is 0 there, 5 now"),
        hold_run(tmp_path / "run", other, print),
    ):
        pytest.fail("it holds another run")
    assert read_config(tmp_path / "run") == config


# --- Versions and casts ---


def test_a_config_from_before_versions_is_read(config: Any, tmp_path: Path) -> None:
    """Fields that did not exist have defaults which mean what was done then."""
    values = to_json(config)
    del values["faults"], values["restore"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path) == config
    open_run(tmp_path, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": VERSION + 1}, f"version is {VERSION + 1}, this lmjax reads up to {VERSION}"),
        ({"version": "new"}, "version is 'new'"),
        ({"momentum": 0.9}, "unknown config field momentum"),
    ],
)
def test_a_config_of_a_later_version_is_explained(
    change: dict[str, Any], message: str, config: Any, tmp_path: Path
) -> None:
    values = {"version": VERSION, **to_json(config)} | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"{message}.*git_revision"):
        read_config(tmp_path)


def test_another_precision_is_another_run_unless_it_may_cast(config: Any, tmp_path: Path) -> None:
    open_run(tmp_path, config)
    take_a_step(tmp_path)
    other = dataclasses.replace(config, precision="pure_bf16").resolved()
    with pytest.raises(InputError, match=r"precision is .*--restore\.allow-cast"):
        open_run(tmp_path, other)
    cast = dataclasses.replace(other, restore=RestoreConfig(allow_cast=True))
    open_run(tmp_path, cast)
    assert read_config(tmp_path) == config, "recorded once the checkpoint could be read"
    record_changes(tmp_path, cast, 30)
    record_changes(tmp_path, cast, 40)
    assert read_config(tmp_path) == cast
    assert from_json(json.loads((tmp_path / "config.until-30.json").read_text())) == config
    assert not (tmp_path / "config.until-40.json").exists()
    with pytest.raises(InputError, match="seed"):
        open_run(tmp_path, dataclasses.replace(cast, seed=5))


def test_environment_says_where() -> None:
    recorded = environment()
    assert strict_loads(json.dumps(recorded)) == recorded
    assert set(recorded) == {
        "python",
        "packages",
        "backend",
        "devices",
        "processes",
        "machine",
        "processor",
        "cpu_count",
        "xla_flags",
        "compiler_options",
        "jax_enable_x64",
        "git_revision",
    }
    assert recorded["packages"]["jax"] == jax.__version__
    assert len(recorded["devices"]) == jax.device_count()
    assert recorded["compiler_options"]["xla_allow_excess_precision"] is False


def test_the_environment_of_a_run_says_which_products_are_native(tmp_path: Path) -> None:
    policy = "0: f32 | 5: f32; **/up: w=mxfp8"
    record_environment(tmp_path, resolve(tiny(tmp_path, policy)))
    recorded = strict_loads((tmp_path / "environment.json").read_text())
    assert recorded["backend"] == "cpu"
    assert recorded["products"] == {
        "native": ["f32 x f32"],
        "emulated": ["f32 x mxfp8 in f32"],
    }


def params() -> dict[str, Any]:
    """Two parameters in two formats."""
    return {
        "kernel": jnp.arange(64, dtype=jnp.float32).reshape(8, 8) / 7,
        "norm": {"scale": jnp.ones((8,), jnp.bfloat16)},
    }


def flipped_bit() -> dict[str, Any]:
    changed = params()
    bits = np.array(changed["kernel"]).view(np.uint32)
    bits[3, 5] ^= 1
    return changed | {"kernel": jnp.asarray(bits.view(np.float32))}


def test_the_digest_sees_bits_dtypes_shapes_and_names() -> None:
    original, kernel = params(), params()["kernel"]
    variants = {
        "same": original,
        "order of keys": {"norm": original["norm"], "kernel": kernel},
        "one bit": flipped_bit(),
        "dtype, same bytes": original | {"kernel": jnp.asarray(np.array(kernel).view(np.int32))},
        "shape, same bytes": original | {"kernel": kernel.reshape(4, 16)},
        "name": {"kernels": kernel, "norm": original["norm"]},
        "minus zero": original | {"kernel": kernel.at[0, 0].set(-0.0)},
    }
    digests = {name: parameters_sha256(tree) for name, tree in variants.items()}
    assert digests.pop("order of keys") == digests["same"]
    assert len(set(digests.values())) == len(digests)


def test_the_digest_does_not_depend_on_the_mesh() -> None:
    """Eight devices need a process that was told so before it started JAX."""
    program = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from lmjax.parallel.sharding import MeshConfig, make_mesh
from lmjax.runs.run_directory import parameters_sha256
assert jax.device_count() == 8
for sizes in (dict(data=8), dict(data=2, fsdp=2, tensor=2), dict(data=1, tensor=8)):
    mesh = make_mesh(MeshConfig(**sizes))
    params = {
        "kernel": jnp.arange(64, dtype=jnp.float32).reshape(8, 8) / 7,
        "norm": {"scale": jnp.ones((8,), jnp.bfloat16)},
    }
    params = jax.device_put(params, {
        "kernel": NamedSharding(mesh, P("fsdp", "tensor")),
        "norm": {"scale": NamedSharding(mesh, P())},
    })
    print(parameters_sha256(params))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [parameters_sha256(params())] * 3
