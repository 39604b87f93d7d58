"""Where every array lives: the only file that knows the axes of a device mesh.

The rest of lmjax gives array dimensions logical names (`embed`, `heads`, `batch`); `RULES` maps
each to the mesh axes that divide it. A dimension that its mesh axes do not divide evenly stays
whole.

Knows JAX, backends, and how fields are checked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lmjax.checks import at_least, validate
from lmjax.precision.backend import Backend, planned_for, this_backend

Function = TypeVar("Function", bound=Callable[..., Any])

RULES: dict[str, tuple[str, ...]] = {
    # activations; their width stays whole, because fsdp already divides their batch
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    # rows that each device computes by itself, those of all its positions
    "parts": ("data", "fsdp", "sequence"),
    # rows of the embedding table, on their way from the devices that hold its columns
    "replicas": ("data",),
    "columns": ("fsdp",),
    # parameters: fsdp divides the residual stream, tensor what branches off it
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
"""Mesh axes that divide a logical axis; an unlisted axis (layers, norm, positions, width) stays
whole."""


MeshSize = Annotated[int, at_least(1, also=(-1,))]


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh; -1 takes the remaining devices."""

    data: MeshSize = -1
    """Divides batches; parameters are replicated."""
    fsdp: MeshSize = 1
    """Divides batches, parameters and optimizer state (fully sharded data parallelism)."""
    tensor: MeshSize = 1
    """Divides heads, MLP and vocabulary."""
    sequence: MeshSize = 1
    """Divides positions of the context."""

    def __post_init__(self) -> None:
        """Rejects sizes that fit no number of devices."""
        validate(self, "mesh")
        sizes = [getattr(self, f.name) for f in fields(self)]
        if sizes.count(-1) > 1:
            raise ValueError(
                "only one of mesh.data, mesh.fsdp, mesh.tensor and mesh.sequence may be -1"
            )


def mesh_shape(config: MeshConfig, devices: int) -> dict[str, int]:
    """The size of every mesh axis for a number of devices.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    shape = {f.name: getattr(config, f.name) for f in fields(config)}
    known = math.prod(size for size in shape.values() if size != -1)
    if -1 in shape.values():
        if devices % known:
            raise ValueError(
                f"the mesh sizes {_described(shape)} do not divide {devices} devices; "
                "change --mesh.data, --mesh.fsdp, --mesh.tensor or --mesh.sequence"
            )
        shape = {name: devices // known if size == -1 else size for name, size in shape.items()}
    elif known != devices:
        raise ValueError(
            f"the mesh sizes {_described(shape)} ask for {known} devices, but there are {devices}; "
            "set one of them to -1 for what is left"
        )
    return shape


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the given devices or all of them, those of a process adjacent."""
    if devices is None:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    shape = mesh_shape(config, len(devices))
    return Mesh(
        np.asarray(devices).reshape(tuple(shape.values())),
        tuple(shape),
        axis_types=(AxisType.Auto,) * len(shape),
    )


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """An abstract mesh, to trace and plan programs without devices."""
    shape = mesh_shape(config, devices)
    types = (AxisType.Auto,) * len(shape)
    return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=types)


def backend_of(mesh: Mesh | AbstractMesh) -> Backend:
    """What the devices of a mesh are; an abstract mesh has JAX's default ones."""
    return Backend.of(mesh.devices.flat[0]) if isinstance(mesh, Mesh) else this_backend()


def traced_for(mesh: Mesh | AbstractMesh, function: Function) -> Function:
    """A function whose products are written for the devices of a mesh; see `this_backend`."""

    @functools.wraps(function)
    def traced(*arguments: Any, **options: Any) -> Any:
        with planned_for(backend_of(mesh)):
            return function(*arguments, **options)

    return cast(Function, traced)


def named_sharding(
    mesh: Mesh | AbstractMesh, axes: Sequence[str], shape: Sequence[int]
) -> NamedSharding:
    """The sharding of an array with these logical axes."""
    return NamedSharding(mesh, _spec(mesh, axes, shape))


def _spec(mesh: Mesh | AbstractMesh, axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
    dimensions = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = RULES.get(axis, ())
        parts = math.prod(mesh.shape[name] for name in mesh_axes)
        dimensions.append(mesh_axes if mesh_axes and size % parts == 0 else None)
    return PartitionSpec(*dimensions)


def state_shardings(mesh: Mesh | AbstractMesh, axes: Any, state: Any) -> Any:
    """The sharding of each array of a train state: what mirrors a parameter is sharded like it.

    Optimizers keep trees with the structure of the parameters (moments, some as values and scales)
    beside counters and scales. A leaf whose path contains a parameter's path and whose rank is the
    same is sharded like that parameter; everything else is replicated.

    Args:
      axes: logical axis names of each parameter, a tree of tuples.
      state: arrays or their shapes, any tree.
    """
    is_axes = lambda node: isinstance(node, tuple)
    leaves, _ = jax.tree_util.tree_flatten_with_path(axes, is_leaf=is_axes)
    by_path = {tuple(_names(keys)): names for keys, names in leaves}
    whole = NamedSharding(mesh, PartitionSpec())

    def place(keys: Any, leaf: Any) -> NamedSharding:
        path = tuple(_names(keys))
        for end in (len(path), len(path) - 1):
            for start in range(end):
                names = by_path.get(path[start:end])
                if names is not None and len(names) == leaf.ndim:
                    return named_sharding(mesh, names, leaf.shape)
        return whole

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh | AbstractMesh, shape: Sequence[int]) -> NamedSharding:
    """The sharding of a batch `[B, T]`.

    Raises:
      ValueError: the batch cannot be divided among the devices.
    """
    parts = batch_parts(mesh)
    if shape[0] % parts:
        raise ValueError(
            f"a batch of {shape[0]} rows cannot be divided among {parts} devices (mesh.data x "
            "mesh.fsdp); choose a batch size that is a multiple"
        )
    return named_sharding(mesh, ("batch", "length")[: len(shape)], shape)


@dataclass(frozen=True)
class Placement:
    """Where the activations of a model live: on devices, by the logical names of their axes.

    Attributes:
      devices: the mesh.
    """

    devices: Mesh | AbstractMesh

    def __call__(self, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """Constrains an activation to the sharding of its logical axes."""
        if self.devices.size == 1:
            return x
        sharding = NamedSharding(self.devices, self.spec(axes, x.shape))
        return jax.lax.with_sharding_constraint(x, sharding)

    def parts(self, axis: str, size: int) -> int:
        """The number of parts into which a logical axis of this size is divided."""
        whole = self.spec((axis,), (size,)) == PartitionSpec(None)
        return 1 if whole else math.prod(self.devices.shape[name] for name in RULES[axis])

    def spec(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """How an array is divided."""
        return _spec(self.devices, axes, shape)

    @property
    def mesh(self) -> Mesh | AbstractMesh | None:
        """The mesh."""
        return self.devices

    @property
    def backend(self) -> Backend:
        """What the devices are."""
        return backend_of(self.devices)


class PartPlacement(Placement):
    """`Placement` for one part of a batch, in `each_part`: mesh axes that divide batches do not
    divide it again.
    """

    def spec(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """How an array of one part is divided."""
        taken = set(RULES["batch"])
        free = tuple("part" if taken & set(RULES.get(axis, ())) else axis for axis in axes)
        return super().spec(free, shape)

    def parts(self, axis: str, size: int) -> int:
        """1 for an axis that divides batches: a part has all of its own."""
        own = set(RULES["batch"]) & set(RULES.get(axis, ()))
        return 1 if own else super().parts(axis, size)


class HerePlacement(Placement):
    """`Placement` inside `in_order`, where every array is already on one device."""

    def __call__(self, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """Leaves an activation where it is."""
        return x

    def spec(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """Nothing is divided."""
        return PartitionSpec(*[None] * len(axes))

    @property
    def mesh(self) -> None:
        """None: kernels run where they are called."""
        return None


def whole(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Replicates every array of a tree, and computes it before it is used.

    A single device would otherwise fuse producer and consumer into one kernel, which rounds less;
    several devices exchange the array in between.
    """
    pinned = jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))
    return jax.lax.optimization_barrier(pinned)


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """The number of parts that a batch is divided into, each on its own devices."""
    return math.prod(mesh.shape[name] for name in RULES["batch"])


def each_part(
    mesh: Mesh | AbstractMesh, function: Callable[..., Any], in_axes: Sequence[int | None]
) -> Callable[..., Any]:
    """`jax.vmap(function, in_axes)` over the parts of a batch, each computed where it lives.

    Inside, pin activations with `PartPlacement`, because their batch is no longer divided.
    """
    return jax.vmap(function, in_axes, spmd_axis_name=RULES["batch"])


def in_order(
    mesh: Mesh | AbstractMesh,
    parts: int,
    function: Callable[..., Any],
    combine: Callable[[Any, Any], Any],
) -> Callable[..., Any]:
    """Maps a function over the parts of a batch and combines in an order no mesh changes.

    Neighbours are combined pairwise, and so are the results: a binary tree over the parts. Each
    device maps over its parts one after another, with programs of the same shapes, and combines
    those; then devices exchange results at distances 1, 2, 4 and so on. No sum depends on the
    number of devices.

    Args:
      mesh: where the parts live.
      parts: their number, 2^n.
      function: `(index, rows, *whole) -> tree`, where `index` is an i32[] and `rows` a part.
      combine: `(tree, tree) -> tree`; must be commutative.

    Returns:
      `(batch, *whole) -> tree`, replicated, as `whole` is.

    Raises:
      ValueError: the devices that divide a batch do not divide `parts`, or other axes divide.
    """
    axes, devices = RULES["batch"], batch_parts(mesh)
    refuse_unordered(mesh, parts)
    held = parts // devices

    def on_device(batch: Any, *whole: Any) -> Any:
        """The parts of one device, combined with each other and with those of all devices."""
        indices = jax.lax.axis_index(axes) * held + jax.numpy.arange(held, dtype="int32")
        cut = jax.tree.map(lambda rows: rows.reshape(held, -1, *rows.shape[1:]), batch)
        found = jax.lax.map(lambda part: function(*part, *whole), (indices, cut))
        for _ in range(held.bit_length() - 1):
            pairs = (jax.tree.map(lambda x, i=i: x[i::2], found) for i in (0, 1))
            found = jax.vmap(combine)(*pairs)
        found = jax.tree.map(lambda x: x[0], found)
        for distance in (2**i for i in range(devices.bit_length() - 1)):
            swap = [(i, i ^ distance) for i in range(devices)]
            other = jax.tree.map(lambda x, to=swap: jax.lax.ppermute(x, axes, to), found)
            found = combine(found, other)
        return found

    def over_all(batch: Any, *whole: Any) -> Any:
        specs = (PartitionSpec(axes), *(PartitionSpec() for _ in whole))
        mapped = jax.shard_map(
            on_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
        )
        return mapped(batch, *whole)

    return over_all


def refuse_unordered(mesh: Mesh | AbstractMesh, parts: int) -> None:
    """Rejects a mesh that `in_order` cannot use with this number of parts.

    Raises:
      ValueError: the devices that divide a batch do not divide `parts`, or other axes divide.
    """
    devices = batch_parts(mesh)
    if parts % devices or devices != mesh.size:
        raise ValueError(
            f"the mesh sizes {_described(dict(mesh.shape))} do not fit deterministic_reductions: "
            f"let mesh.data x mesh.fsdp divide {parts}, and mesh.tensor and mesh.sequence be 1"
        )


@functools.cache
def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch the devices of this process hold, and of how many parts.

    There is one part per process, or fewer: if `tensor` or `sequence` spans processes, several of
    them hold the same rows.

    Raises:
      ValueError: the rows of this process are not contiguous.
    """
    parts = batch_parts(mesh)
    indices = batch_sharding(mesh, (parts, 1)).addressable_devices_indices_map((parts, 1))
    held = sorted({index[0].indices(parts)[0] for index in indices.values() if index})
    first, count = held[0], len(held)
    if held != list(range(first, first + count)) or first % count or parts % count:
        raise ValueError(
            f"the mesh sizes {_described(dict(mesh.shape))} do not divide batches evenly among "
            f"processes of {len(indices)} devices; let mesh.tensor x mesh.sequence be a divisor "
            "or a multiple of that"
        )
    return first // count, parts // count


def global_batch(mesh: Mesh, rows: dict[str, np.ndarray], shares: int) -> dict[str, jax.Array]:
    """Assembles global batches from this process's rows (`batch_share`).

    Args:
      mesh: where they live.
      rows: arrays `[B / shares, T]`.
      shares: the number of parts.
    """

    def place(part: np.ndarray) -> jax.Array:
        shape = (part.shape[0] * shares, *part.shape[1:])
        return jax.make_array_from_process_local_data(batch_sharding(mesh, shape), part, shape)

    return {name: place(part) for name, part in rows.items()}


def _names(keys: Any) -> list[str]:
    return [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys
    ]


def _described(shape: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in shape.items())
