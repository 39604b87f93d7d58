"""Everything has a place on any mesh, and the place changes no number."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import lmjax
from lmjax.model import ModelConfig, structure
from lmjax.parallel import sharding
from lmjax.parallel.reduction import reduces_narrow
from lmjax.parallel.sharding import MeshConfig, mesh_shape
from lmjax.precision import paths
from lmjax.runs.resolved import phase_of
from lmjax.train import abstract_state

SIZES = MeshConfig(data=2, fsdp=2, tensor=2)


def test_minus_one_takes_what_is_left():
    assert mesh_shape(MeshConfig(), 8) == {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert mesh_shape(MeshConfig(data=2, tensor=-1), 8)["tensor"] == 4
    assert mesh_shape(SIZES, 8)["fsdp"] == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": -1}, "only one"),
        ({"data": 0}, "at least 1"),
        ({"tensor": -2}, "at least 1"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**sizes)


def test_sizes_that_do_not_fit_the_devices_are_refused():
    with pytest.raises(ValueError, match="do not divide 8 devices"):
        mesh_shape(MeshConfig(tensor=3), 8)
    with pytest.raises(ValueError, match="ask for 4 devices, but there are 8"):
        mesh_shape(MeshConfig(data=2, fsdp=2), 8)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_and_its_moments_are_divided_alike(family: str, name: str, tiny):
    config = tiny(family=family, optimizer={"name": name}).resolved()
    mesh = sharding.abstract_mesh(SIZES, 8)
    state = abstract_state(config, mesh)
    _, _, axes = structure(config.model)
    named = paths.flatten(jax.tree.map(lambda p, a: "/".join(a), state.params, axes))
    specs = {path: p.sharding.spec for path, p in paths.flatten(state.params).items()}
    for path, spec in specs.items():
        expected = [sharding.RULES.get(axis) for axis in named[path].split("/")]
        assert spec == PartitionSpec(*expected), path
    divided = {path for path, spec in specs.items() if any(spec)}
    assert all(path in divided for path in specs if path.endswith(("kernel", "table")))

    inner = paths.flatten(state.opt_state.inner)
    moments = 0
    for path, leaf in inner.items():
        owners = [p for p in specs if path.endswith("/" + p)]
        if owners and leaf.ndim:
            assert leaf.sharding.spec == specs[max(owners, key=len)], path
            moments += 1
    assert moments >= len(specs)
    for leaf in (*state.opt_state[:4], state.step, state.key):
        assert leaf.sharding.spec == PartitionSpec(), "the loss scale is whole on every device"


def test_a_dimension_that_does_not_divide_is_kept_whole():
    mesh = sharding.abstract_mesh(SIZES, 8)
    assert sharding.named_sharding(mesh, ("embed", "mlp"), (6, 7)).spec == PartitionSpec(
        ("fsdp",), None
    )


def test_a_batch_that_cannot_be_divided_is_refused():
    mesh = sharding.abstract_mesh(SIZES, 8)
    spec = sharding.batch_sharding(mesh, (8, 16)).spec
    assert spec == PartitionSpec(("data", "fsdp"), ("sequence",))
    with pytest.raises(ValueError, match="6 rows cannot be divided among 4"):
        sharding.batch_sharding(mesh, (6, 16))


def test_a_parameter_called_scale_does_not_confuse_the_state():
    mesh = sharding.abstract_mesh(SIZES, 8)
    axes = {"scale": ("embed",)}
    state = {"scale": jnp.zeros(()), "mu": {"scale": jnp.zeros(4)}, "count": jnp.zeros(())}
    placed = sharding.state_shardings(mesh, axes, state)
    assert placed["mu"]["scale"].spec == PartitionSpec(("fsdp",))
    assert placed["scale"].spec == placed["count"].spec == PartitionSpec()


FAMILIES: dict[str, dict] = {
    "gpt2": {},
    "llama": {
        "kv_heads": 2,
        "positions": "rope",
        "norm": "rms",
        "activation": "swiglu",
        "tied": False,
        "qk_norm": True,
    },
}
MESHES: list[dict[str, int]] = [
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 4, "tensor": 2},
    {"data": 1, "fsdp": 4, "tensor": 2},
    {"data": 2, "tensor": 2, "sequence": 2},
]


def trained(sizes: dict[str, int], devices: int, family: str = "llama", **changes: Any) -> dict:
    """Three steps of a tiny model on a mesh: its losses, and digests of its parameters.

    `changes` replaces fields of the config.
    """
    from lmjax.data import document_starts
    from lmjax.optim.optimizer import OptimizerConfig
    from lmjax.runs.run_directory import parameters_sha256
    from lmjax.train import Config, create_state, make_train_step

    config = Config(
        **{"precision": "f32", "steps": 10, "context": 16, "batch_size": 8} | changes,
        mesh=MeshConfig(**sizes),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        model=ModelConfig(vocab_size=64, width=16, layers=2, heads=4, **FAMILIES[family]),
    ).resolved()
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    rows = config.batch_size
    tokens = jax.random.randint(jax.random.key(1), (rows, 17), 0, 64, jnp.int32)
    shape = sharding.batch_sharding(mesh, (rows, 16))
    rows = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    if config.data.document_mask:
        starts = document_starts(np.asarray(rows["inputs"]) % 3, 0)
        assert starts.any(axis=1).all(), "every row holds several documents"
        rows["document_starts"] = jnp.asarray(starts)
    batch = jax.device_put(rows, shape)
    state, step = create_state(config, mesh), make_train_step(config, mesh)
    digest = parameters_sha256(state.params)
    held = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(state.params)}
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    after = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(state.params)}
    return {
        "digest": digest,
        "losses": losses,
        "final": parameters_sha256(state.params),
        "stable": held == after,
        "cut": len(held) > 1,
    }


@functools.cache
def gradient(policy: str) -> dict:
    """Gradients and loss of a batch on eight devices."""
    from lmjax.precision import exact
    from lmjax.train import Config, create_state
    from lmjax.train.step import make_gradient

    config = Config(
        precision=policy,
        context=16,
        batch_size=8,
        mesh=MeshConfig(data=4, fsdp=2),
        model=ModelConfig(vocab_size=64, width=16, layers=2, heads=4),
    ).resolved()
    mesh = sharding.make_mesh(config.mesh)
    tokens = jax.random.randint(jax.random.key(1), (8, 17), 0, 64, jnp.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    batch = jax.device_put(batch, sharding.batch_sharding(mesh, (8, 16)))
    arguments = (batch, jax.random.key(0), jnp.float32(1), {}, {})
    (gradients, _), loss = exact.jit(make_gradient(phase_of(config), mesh))(
        create_state(config, mesh).params, *arguments
    )
    leaves = paths.flatten(gradients) | {"loss": loss}
    return {path: np.asarray(leaf, np.float32) for path, leaf in leaves.items()}


def reduced(policy: str) -> dict:
    """The gradient on eight devices: whether its numbers are of bf16, and how far from f32's."""
    exactly, narrow = gradient("f32"), gradient(policy)
    is_bf16 = lambda x: bool(np.all(x == x.astype(jnp.bfloat16).astype(np.float32)))
    return {
        "loss": float(narrow["loss"]) == pytest.approx(float(exactly["loss"]), rel=1e-6),
        "bf16": {path: is_bf16(leaf) for path, leaf in narrow.items() if path != "loss"},
        "error": {
            path: float(np.abs(leaf - exactly[path]).max() / np.abs(exactly[path]).max())
            for path, leaf in narrow.items()
        },
    }


def overflowing() -> dict:
    """Steps on eight devices that raise the loss scale until gradients overflow, again and again.

    The parts overflow before their sum, which has another format.
    """
    from lmjax.optim.loss_scale import LossScaleConfig
    from lmjax.train import Config, create_state, make_train_step

    config = Config(
        precision="p=f32,c=f16,o=f32,r=tf32",
        context=16,
        batch_size=8,
        mesh=MeshConfig(data=8),
        model=ModelConfig(vocab_size=64, width=16, layers=1, heads=2),
        loss_scale=LossScaleConfig(initial=2.0**20, growth_interval=1),
    ).resolved()
    mesh = sharding.make_mesh(config.mesh)
    tokens = jax.random.randint(jax.random.key(1), (8, 17), 0, 64, jnp.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    batch = jax.device_put(batch, sharding.batch_sharding(mesh, (8, 16)))
    state, step = create_state(config, mesh), make_train_step(config, mesh)
    skipped, norms = [0], []
    for _ in range(24):
        state, metrics = step(state, batch)
        skipped.append(int(metrics["skipped_steps"]))
        norms.append(float(metrics["grad_norm"]))
    applied = [not jump for jump in np.diff(skipped)]
    return {
        "skipped": skipped[-1],
        "applied": sum(applied),
        "largest": max(norm for norm, was in zip(norms, applied, strict=True) if was),
    }


def on_eight_devices(*arguments: str) -> list:
    """What this file prints when it is run with eight devices."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={
            **os.environ,
            "XLA_FLAGS": flags,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(lmjax.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_equal(one: dict, *others: dict) -> None:
    """Runs on eight devices compute what the run on one computes."""
    for other in others:
        assert other["digest"] == one["digest"], "initial parameters do not depend on the mesh"
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert other["stable"], "a step leaves parameters where they were"
        assert other["cut"]
    assert one["losses"][2] < one["losses"][0]


def assert_identical(one: dict, *others: dict) -> None:
    """Runs have the same losses and the same parameters, to the last bit."""
    for other in others:
        assert other["losses"] == one["losses"]
        assert other["final"] == one["final"] != one["digest"]


def test_eight_devices_compute_what_one_computes_and_reduce_as_the_policy_says():
    runs, ordered, reductions, overflow = on_eight_devices()
    assert_equal(*runs)
    assert_identical(*ordered)
    assert ordered[0]["losses"] == pytest.approx(runs[0]["losses"], rel=1e-5)
    assert ordered[1]["cut"]
    everywhere, only_mlp = reductions
    assert everywhere["loss"]
    assert all(everywhere["bf16"].values())
    # Seven roundings of partial sums, each of half a unit in the last of 8 bits.
    assert all(error < 7 * 2.0**-8 for error in everywhere["error"].values())
    for path, narrow in only_mlp["bf16"].items():
        assert narrow == ("mlp/up" in path or "mlp/down" in path), path
    assert min(overflow["skipped"], overflow["applied"]) > 4
    assert overflow["largest"] < 100, "no step was taken whose gradients had overflowed"


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mesh_computes_what_one_device_computes(family: str):
    assert_equal(*on_eight_devices(family))


@pytest.mark.long
def test_a_document_mask_is_the_same_on_every_mesh():
    *families, ordered = on_eight_devices("masked")
    for runs in families:
        assert_equal(*runs)
    assert_identical(*ordered)


NARROW = (
    "p=bf16.sr,c=bf16,o=f32,r=bf16,w=e4m3@tensor,x=e4m3@tensor.delayed,g=e5m2@tensor.sr,"
    "nu=int8@block64"
)


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "precision", "micro_batches"),
    [("gpt2", "f32", 1), ("llama", "mixed_f16", 2), ("llama", NARROW, 1)],
)
def test_a_fixed_order_gives_the_same_bits_on_every_mesh(
    family: str, precision: str, micro_batches: int
):
    assert_identical(*on_eight_devices(family, precision, str(micro_batches)))


@pytest.mark.parametrize(
    ("sizes", "parts"), [({"data": 8}, 4), ({"data": 4, "tensor": 2}, 4), ({"data": 3}, 8)]
)
def test_a_mesh_that_cannot_keep_the_order_is_refused(sizes: dict[str, int], parts: int):
    mesh = sharding.abstract_mesh(MeshConfig(**sizes), math.prod(sizes.values()))
    with pytest.raises(ValueError, match="do not fit deterministic_reductions"):
        sharding.in_order(mesh, parts, lambda index, rows: rows, lambda one, other: one)


def test_on_one_device_there_is_nothing_to_reduce(tiny):
    config = tiny("f32,r=bf16")
    one = sharding.make_mesh(config.mesh, jax.devices()[:1])
    assert not reduces_narrow(phase_of(config).param_sites, one)
    assert reduces_narrow(phase_of(config).param_sites, sharding.abstract_mesh(SIZES, 8))
    assert not reduces_narrow(phase_of(tiny("f32")).param_sites, sharding.abstract_mesh(SIZES, 8))


ORDERED_MESHES = [
    ({}, 1),
    ({"data": 2}, 2),
    ({"data": 1, "fsdp": 2}, 2),
    ({"data": 4}, 4),
    ({"data": 2, "fsdp": 2}, 4),
    ({"data": 8}, 8),
    ({"data": 1, "fsdp": 8}, 8),
    ({"data": 4, "fsdp": 2}, 8),
]


def main(family: str = "", precision: str = "", micro_batches: str = "1") -> list:
    """What the tests above ask of eight devices."""
    from lmjax.data import DataConfig

    masked = {"data": DataConfig(document_mask=True)}
    if family == "masked":
        ordered = {"deterministic_reductions": 8} | masked
        return [
            *(
                [trained({}, 1, name, **masked)] + [trained(s, 8, name, **masked) for s in MESHES]
                for name in FAMILIES
            ),
            [trained(*ORDERED_MESHES[i], **ordered) for i in (0, 4, -1)],
        ]
    if precision:
        fields = {"micro_batches": int(micro_batches), "batch_size": 8 * int(micro_batches)}
        fields |= {"precision": precision, "deterministic_reductions": 8}
        return [trained(sizes, n, family, **fields) for sizes, n in ORDERED_MESHES]
    if family:
        return [trained({}, 1, family)] + [trained(sizes, 8, family) for sizes in MESHES]
    runs = [trained({}, 1, **masked), trained(MESHES[-1], 8, **masked)]
    ordered = [trained(*ORDERED_MESHES[i], deterministic_reductions=8, **masked) for i in (0, -1)]
    reductions = [reduced("f32,r=bf16"), reduced("f32; **/mlp/*: r=bf16; **/norm: r=f32")]
    return [runs, ordered, reductions, overflowing()]


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
