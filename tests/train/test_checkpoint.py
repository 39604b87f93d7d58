"""Checkpoints hold exactly the state, and refuse to be read as anything else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lmjax.train.checkpoint import CheckpointError, Checkpoints


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


def test_saving_a_step_again_is_no_error(tmp_path: Path) -> None:
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


def test_an_unfinished_checkpoint_is_ignored_and_removed_by_the_next_run(tmp_path: Path) -> None:
    """The folder of a save that was killed, as Orbax itself makes and names it."""
    folder = tmp_path / "c"
    saved(folder, small_state(), steps=(4, 6))
    leftover = (folder / "6").rename(folder / "6.orbax-checkpoint-tmp")

    reader = Checkpoints(folder)
    assert reader.latest() == 4
    time.sleep(0.3)  # Orbax would remove it in the background
    reader.close()
    assert leftover.exists(), "a reader must not touch what another process may be writing"

    saved(folder, small_state(), steps=(8,))
    assert not leftover.exists()
    assert Checkpoints(folder).latest() == 8


def test_a_reader_makes_no_directory(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        Checkpoints(tmp_path / "none").restore(1, template(small_state()))
    assert not (tmp_path / "none").exists()
