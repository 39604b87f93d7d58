"""Checkpoints hold exactly the state, and refuse to be read as anything else."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from run_helpers import NAMES, ROOT

from lmjax.files import manifest
from lmjax.runs.checkpoint import CheckpointError, Checkpoints


def small_state(value: float = 1.0 + 2.0**-10) -> dict[str, jax.Array]:
    """One array whose values bf16 does not have, and one that f32 does not."""
    return {
        "kernel": jnp.full((2, 3), value, jnp.float32),
        "count": jnp.asarray(2**24 + 1, jnp.int32),
    }


def template(state: dict[str, Any], **changes: jax.ShapeDtypeStruct) -> Any:
    """What `restore` asks for: the state's own shapes and dtypes, but for the changes."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in state.items()
    }
    for name, change in changes.items():
        abstract[name] = jax.ShapeDtypeStruct(change.shape, change.dtype, sharding=sharding)
    return abstract


def saved(folder: Path, state: Any, steps: tuple[int, ...] = (1,), keep: int = 2) -> None:
    """Writes the state as the checkpoints of some steps."""
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, state, {"next_index": step}, {"train_seconds": 0.5})
    checkpoints.close()


def test_round_trip(tmp_path: Path) -> None:
    saved(tmp_path / "c", small_state(), steps=(7,))
    restored = Checkpoints(tmp_path / "c").restore(7, template(small_state()))
    jax.tree.map(np.testing.assert_array_equal, restored.state, small_state())
    assert jax.tree.map(lambda leaf: leaf.dtype, restored.state) == {
        "kernel": np.float32,
        "count": np.int32,
    }
    assert restored.data == {"next_index": 7}
    assert restored.progress == {"train_seconds": 0.5}


OTHERS = {
    "dtype": ({"kernel": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}, "kernel", "bfloat16[2, 3]"),
    "integer": ({"count": jax.ShapeDtypeStruct((), jnp.float32)}, "count", "float32[]"),
    "shape": ({"kernel": jax.ShapeDtypeStruct((3, 3), jnp.float32)}, "kernel", "float32[3, 3]"),
    "missing": ({"bias": jax.ShapeDtypeStruct((3,), jnp.float32)}, "bias", "nothing"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_of_any_name_can_be_written_and_read(name: str, tmp_path: Path) -> None:
    saved(tmp_path / name, small_state(), steps=(1, 2, 3))
    reader = Checkpoints(tmp_path / name)
    assert reader.steps() == [2, 3]
    assert reader.newest_intact() == 3
    restored = reader.restore(3, template(small_state())).state
    jax.tree.map(np.testing.assert_array_equal, restored, small_state())


def test_what_cannot_be_restored_costs_no_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "b[1]"
    saved(folder, small_state(), keep=1)
    # Orbax finds nothing in a folder whose name is a pattern; every file in it is intact.
    monkeypatch.setattr("lmjax.runs.checkpoint.plain", lambda path: path)
    mirrored: list[Any] = []
    checkpoints = Checkpoints(folder, 1, mirror=mirrored.append)
    checkpoints.save(2, small_state(), {}, {})
    with pytest.raises(CheckpointError, match=r"2 was written but cannot be .* step 1 is kept"):
        checkpoints.wait()
    assert checkpoints.steps() == [1]
    assert mirrored == []
    manifest.check(folder / "damaged" / "2")
    monkeypatch.undo()
    restored = Checkpoints(folder).restore(1, template(small_state())).state
    jax.tree.map(np.testing.assert_array_equal, restored, small_state())


def test_the_first_checkpoint_of_a_launch_is_read_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, small_state(), keep=1)
    saved(tmp_path / "other", small_state(2.0))

    def seal(folder: Path) -> None:
        """The arrays of another state, which can be read, get into the folder."""
        shutil.rmtree(folder / "state")
        shutil.copytree(tmp_path / "other" / "1" / "state", folder / "state")

    monkeypatch.setattr(manifest, "seal", seal)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(2, small_state(), {}, {})
    with pytest.raises(CheckpointError, match=r"kernel comes back with other values .* 1 is kept"):
        checkpoints.wait()
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize("other", OTHERS)
def test_another_dtype_or_shape_is_refused_by_name(other: str, tmp_path: Path) -> None:
    changes, name, described = OTHERS[other]
    saved(tmp_path / "c", small_state())
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path / "c").restore(1, template(small_state(), **changes))
    assert name in str(error.value)
    assert described in str(error.value)


def test_orbax_alone_would_cast_silently(tmp_path: Path) -> None:
    """The pitfall behind the refusal: when this fails, Orbax has changed and the guard may go."""
    saved(tmp_path / "c", small_state())
    target = template(
        small_state(),
        kernel=jax.ShapeDtypeStruct((2, 3), jnp.bfloat16),
        count=jax.ShapeDtypeStruct((), jnp.float32),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore((tmp_path / "c" / "1" / "state").absolute(), target)
    assert restored["kernel"].dtype == jnp.bfloat16
    assert float(restored["kernel"][0, 0]) == 1.0
    assert float(restored["count"]) == 2**24


def test_keeps_the_newest(tmp_path: Path) -> None:
    saved(tmp_path / "c", small_state(), steps=(1, 2, 5, 9), keep=2)
    assert sorted(int(path.name) for path in (tmp_path / "c").iterdir()) == [5, 9]
    assert Checkpoints(tmp_path / "c").latest() == 9


def test_saving_a_step_again_is_not_an_error(tmp_path: Path) -> None:
    saved(tmp_path / "c", small_state(), steps=(3, 3))
    assert Checkpoints(tmp_path / "c").latest() == 3


def test_the_next_step_may_take_the_memory_of_what_is_being_saved(tmp_path: Path) -> None:
    """`save` returns before the arrays are on disk; the step after it is given their buffers."""
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: -x, tree), donate_argnums=0)
    state = {"kernel": jnp.arange(2**21, dtype=jnp.float32)}
    expected = np.arange(2**21, dtype=np.float32)
    checkpoints = Checkpoints(tmp_path / "c", 1)
    checkpoints.save(1, state, {}, {})
    for _ in range(5):  # an odd number: the buffer ends up holding other values
        state = jax.block_until_ready(overwrite(state))
    checkpoints.close()
    assert np.asarray(state["kernel"])[1] == -1
    restored = Checkpoints(tmp_path / "c").restore(1, template(state)).state
    np.testing.assert_array_equal(restored["kernel"], expected)


LEFTOVERS = {
    "being written": ".6.partial",
    "being removed": ".6.removed",
    "written by a version before": "6.orbax-checkpoint-tmp",
}


@pytest.mark.parametrize("leftover", LEFTOVERS)
def test_what_a_killed_process_left_is_ignored_and_removed_by_the_next_run(
    leftover: str, tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    saved(folder, small_state(), steps=(4, 6))
    hidden = (folder / "6").rename(folder / LEFTOVERS[leftover])

    reader = Checkpoints(folder)
    assert reader.newest_intact() == 4
    reader.close()
    assert hidden.exists(), "a reader must not touch what another process may be writing"

    saved(folder, small_state(), steps=(8,))
    assert not hidden.exists()
    assert Checkpoints(folder).newest_intact() == 8
    assert not (folder / "damaged").exists()


@pytest.mark.parametrize("moment", ["write_text", "rename", "rmtree"])
def test_a_process_killed_at_any_moment_leaves_whole_checkpoints(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first file that is not arrays, before the checkpoint gets its name, and while the
    one that it replaces is removed.
    """

    class Killed(BaseException):
        pass

    def kill(path: Path, *_: object, **__: object) -> None:
        if moment == "rmtree":
            next(path.rglob("_METADATA")).unlink()
        raise Killed

    folder = tmp_path / "c"
    saved(folder, small_state(), steps=(4,), keep=1)
    owner = shutil if moment == "rmtree" else Path
    checkpoints = Checkpoints(folder, 1)
    monkeypatch.setattr(owner, moment, kill)
    checkpoints.save(6, small_state(), {}, {})
    with pytest.raises(Killed):
        checkpoints.wait()
    monkeypatch.undo()
    after = Checkpoints(folder, 1)
    assert after.newest_intact() == (6 if moment == "rmtree" else 4)
    assert [path.name for path in folder.iterdir()] == [str(after.latest())]


def test_restored_onto_other_meshes_every_bit_stays(tmp_path: Path) -> None:
    """Eight devices need a process that was told so before it started JAX."""
    program = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from lmjax.parallel.sharding import MeshConfig, make_mesh
from lmjax.runs.checkpoint import Checkpoints
value = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
assert jax.device_count() == 8
checkpoints, state, step = Checkpoints(Path(sys.argv[1]), 1), None, 0
for devices, sizes in ((1, {}), (8, dict(fsdp=8)), (4, dict(fsdp=2, tensor=2)), (1, {})):
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:devices])
    specs = {"kernel": P("fsdp", "tensor"), "key": P()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    if state is None:
        state = jax.device_put({"kernel": value, "key": np.uint32([7, 2**31])}, shardings)
    else:
        target = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[n])
                  for n, x in state.items()}
        state = checkpoints.restore(step, target).state
    assert len(state["kernel"].sharding.device_set) == devices
    np.testing.assert_array_equal(np.asarray(state["kernel"]), value)
    np.testing.assert_array_equal(np.asarray(state["key"]), [7, 2**31])
    step += 1
    checkpoints.save(step, state, {}, {})
    checkpoints.wait()
checkpoints.close()
"""
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": str(ROOT),
        },
        check=True,
    )
    assert Checkpoints(tmp_path).newest_intact() == 4


# --- Damage ---


def files_of(folder: Path) -> list[str]:
    """The names of all files of a checkpoint."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


KINDS = (
    "manifest.sha256",
    "data.json",
    "progress.json",
    "state/manifest.ocdbt",
    "state/_METADATA",
    "state/_CHECKPOINT_METADATA",
    "state/_sharding",
    "state/commit_success.txt",
    "state/array_metadatas/",
    "state/d/",
    "state/ocdbt.process_0/manifest.ocdbt",
    "state/ocdbt.process_0/d/",
)
"""Every kind of file in a checkpoint; a folder stands for the files in it."""


def damage(checkpoint: Path, kind: str, how: str) -> tuple[Path, bytes]:
    """Damages the first file of a kind; returns it and what it was."""
    path = checkpoint / next(name for name in files_of(checkpoint) if name.startswith(kind))
    whole = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :])
    return path, whole


def test_the_kinds_of_files_are_all_there_are(tmp_path: Path) -> None:
    saved(tmp_path, small_state())
    names = files_of(tmp_path / "1")
    assert all(name.startswith(KINDS) for name in names)
    assert all(any(name.startswith(kind) for name in names) for kind in KINDS)


def test_a_reader_falls_back_from_damage_of_every_kind_and_moves_nothing(tmp_path: Path) -> None:
    saved(tmp_path, small_state(), steps=(3, 5))
    said: list[str] = []
    reader = Checkpoints(tmp_path, note=said.append)
    for kind in KINDS:
        for how in ("truncated", "flipped", "deleted"):
            path, whole = damage(tmp_path / "5", kind, how)
            assert reader.newest_intact() == 3, (kind, how)
            assert said.pop().startswith("checkpoint 5 is damaged: ")
            with pytest.raises(CheckpointError, match="checkpoint 5 is damaged"):
                reader.restore(5, template(small_state()))
            path.write_bytes(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "5"]
    assert reader.newest_intact() == 5
    reader.close()


def test_a_writer_keeps_what_is_damaged_aside(tmp_path: Path) -> None:
    saved(tmp_path, small_state(), steps=(3, 5))
    damage(tmp_path / "5", "state/d/", "flipped")
    left = files_of(tmp_path / "5")
    said: list[str] = []
    writer = Checkpoints(tmp_path, 2, said.append)
    assert writer.newest_intact() == 3
    writer.close()
    assert said[0].endswith(f"; moved to {tmp_path / 'damaged' / '5'}")
    assert files_of(tmp_path / "damaged" / "5") == left
    assert writer.steps() == [3]


def test_what_was_set_aside_is_never_overwritten(tmp_path: Path) -> None:
    for number in range(3):
        saved(tmp_path, small_state(), steps=(3, 5))
        (tmp_path / "5" / "data.json").write_text(str(number))
        checkpoints = Checkpoints(tmp_path, 2)
        assert checkpoints.newest_intact() == 3
        checkpoints.close()
    aside = sorted((tmp_path / "damaged").iterdir())
    assert [path.name for path in aside] == ["5", "5.1", "5.2"]
    assert [(path / "data.json").read_text() for path in aside] == ["0", "1", "2"]


def test_where_all_are_damaged_nothing_starts_from_scratch(tmp_path: Path) -> None:
    """Neither now nor when the command is repeated; deleting the folder says that it may."""
    folder = tmp_path / "checkpoints"
    saved(folder, small_state(), steps=(3, 5))
    for step in (3, 5):
        damage(folder / str(step), "data.json", "flipped")
    for _ in range(2):
        writer = Checkpoints(folder, 2)
        with pytest.raises(CheckpointError, match=r"no checkpoint .* is intact.*delete"):
            writer.newest_intact()
        writer.close()
    shutil.rmtree(folder)
    assert Checkpoints(folder, 2).newest_intact() is None


def test_a_checkpoint_that_disappears_while_it_is_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that trains has made a newer one meanwhile, and removed this one."""
    saved(tmp_path, small_state(), steps=(3, 5))
    check = manifest.check

    def remove_then_check(folder: Path) -> None:
        if folder.name == "5":
            shutil.rmtree(folder)
        check(folder)

    monkeypatch.setattr(manifest, "check", remove_then_check)
    said: list[str] = []
    assert Checkpoints(tmp_path, note=said.append).newest_intact() == 3
    assert said == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_failed_write_says_why_and_leaves_the_one_before(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmjax.errors import StorageFailed

    def fail(folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    saved(tmp_path, small_state(), steps=(3,))
    checkpoints = Checkpoints(tmp_path, 1)
    monkeypatch.setattr(manifest, "seal", fail)
    checkpoints.save(5, small_state(), {}, {})
    with pytest.raises(StorageFailed, match=rf"step 5 .*{os.strerror(number)}; that of step 3 is"):
        checkpoints.wait()
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    assert Checkpoints(tmp_path).newest_intact() == 3


# --- Casts, and other versions ---


def test_what_may_be_cast_is_rounded_and_named(tmp_path: Path) -> None:
    saved(tmp_path, small_state())
    target = template(small_state(), kernel=jax.ShapeDtypeStruct((2, 3), jnp.bfloat16))
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, note=said.append)
    with pytest.raises(CheckpointError, match=r"--restore\.allow-cast"):
        checkpoints.restore(1, target)
    state: Any = checkpoints.restore(1, target, allow_cast=True).state
    assert state["kernel"].dtype == jnp.bfloat16
    assert float(state["kernel"][0, 0]) == 1.0
    assert int(state["count"]) == 2**24 + 1
    assert said == [
        "checkpoint 1 is cast while it is read: kernel from float32[2, 3] to bfloat16[2, 3]"
    ]


@pytest.mark.parametrize("other", ["integer", "shape", "missing"])
def test_only_roundings_may_be_allowed(other: str, tmp_path: Path) -> None:
    changes, name, _ = OTHERS[other]
    saved(tmp_path, small_state())
    with pytest.raises(CheckpointError, match=name):
        Checkpoints(tmp_path).restore(1, template(small_state(), **changes), allow_cast=True)


def before_manifests(folder: Path) -> None:
    """A checkpoint of step 3 as the versions without manifests wrote it."""
    items = {
        "state": ocp.args.StandardSave(small_state()),
        "data": ocp.args.JsonSave({"next_index": 3}),
        "progress": ocp.args.JsonSave({"train_seconds": 0.5}),
    }
    manager = ocp.CheckpointManager(folder.absolute())
    manager.save(3, args=ocp.args.Composite(**items))
    manager.close()


def test_a_checkpoint_from_before_manifests_is_read(tmp_path: Path) -> None:
    before_manifests(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest_intact() == 3
    restored = checkpoints.restore(3, template(small_state()))
    jax.tree.map(np.testing.assert_array_equal, restored.state, small_state())
    assert (restored.data, restored.progress) == ({"next_index": 3}, {"train_seconds": 0.5})


def test_if_such_a_checkpoint_cannot_be_read_that_is_explained(tmp_path: Path) -> None:
    before_manifests(tmp_path)
    (tmp_path / "3" / "state" / "manifest.ocdbt").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"earlier version of lmjax .* move .* away"):
        checkpoints.restore(3, template(small_state()))


def test_going_back_sets_newer_ones_aside(tmp_path: Path) -> None:
    saved(tmp_path, small_state(), steps=(2, 4, 6), keep=3)
    checkpoints = Checkpoints(tmp_path, 3)
    assert checkpoints.newest_intact(before=4) == 2
    assert checkpoints.newest_intact(before=2) is None
    checkpoints.abandon_after(2)
    checkpoints.close()
    assert checkpoints.steps() == [2]
    assert sorted(path.name for path in (tmp_path / "rewound").iterdir()) == ["4", "6"]


def test_a_reader_makes_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of step 1"):
        Checkpoints(tmp_path / "none").restore(1, template(small_state()))
    assert not (tmp_path / "none").exists()
