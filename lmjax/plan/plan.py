"""Plans a run on devices that may be absent: its sharding, traffic and memory.

Knows everything else in this room.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from lmjax.hlo.collectives import Collective, collectives
from lmjax.parallel import sharding
from lmjax.plan.arithmetic import expected_traffic
from lmjax.plan.memory import expected_memory
from lmjax.plan.program import Program, partitioned
from lmjax.plan.traffic import TrafficRow, compared
from lmjax.precision import paths
from lmjax.train import Config, Phase, abstract_state, resolve


@dataclass(frozen=True)
class Plan:
    """The plan of a run on a number of devices.

    Attributes:
      phase: the first phase of the run.
      mesh: the size of every mesh axis.
      program: its compiled step.
      sent: the collectives of the step.
    """

    phase: Phase
    mesh: dict[str, int]
    program: Program
    sent: tuple[Collective, ...]

    @property
    def config(self) -> Config:
        """The resolved run, with the policy of its first phase."""
        return self.phase.config

    @property
    def devices(self) -> int:
        """How many."""
        return math.prod(self.mesh.values())

    @property
    def rows(self) -> list[TrafficRow]:
        """The compiled traffic by purpose, compared with the expected traffic."""
        return compared(self.sent, expected_traffic(self.phase, self.mesh))

    @property
    def memory(self) -> dict[str, float]:
        """Estimated bytes of each part of the peak on one device."""
        return expected_memory(self.phase, self.devices)


@dataclass(frozen=True)
class Cut:
    """How one array of the train state or of the batch is sharded.

    Attributes:
      path: path of the array or parameter.
      shape: global shape.
      dtype: JAX name of the dtype.
      spec: for each dimension, the mesh axes that divide it, joined by `x`; `-` if none does.
      bytes: bytes on one device.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: tuple[str, ...]
    bytes: int


def make_plan(config: Config, devices: int) -> Plan:
    """Compiles the step of a run for a number of devices, without allocating anything.

    Args:
      config: the run; only the first phase of a policy with phases is planned.
      devices: number of devices.

    Raises:
      ValueError: the mesh does not fit the devices, or a micro-batch does not fit the mesh.
      PlanError: XLA cannot compile the step.
    """
    phase = resolve(config).at(0)
    program = partitioned(phase.config, devices)
    mesh = sharding.mesh_shape(phase.config.mesh, devices)
    sent = tuple(collectives(program.text, mesh)) if program.text else ()
    return Plan(phase, mesh, program, sent)


def scaled(config: Config, devices: int, to: int) -> Config:
    """Returns the same run on another number of devices, with as many rows on each as before.

    Raises:
      ValueError: no mesh axis is -1, or rows do not divide evenly.
    """
    if -1 not in dataclasses.astuple(config.mesh):
        raise ValueError(
            "no mesh axis is -1, so none can grow with the number of devices; leave one at -1"
        )
    rows, left = divmod(config.batch_size * to, devices)
    if left or rows % config.micro_batches:
        raise ValueError(
            f"{config.batch_size} rows on {devices} devices are no whole number of rows on {to}"
        )
    return dataclasses.replace(config, batch_size=rows)


def cuts(config: Config, devices: int) -> Iterator[Cut]:
    """Yields the sharding of every parameter, and the totals of other state and of the batch."""
    mesh = sharding.abstract_mesh(config.mesh, devices)
    state = abstract_state(config, mesh)
    for path, leaf in paths.flatten(state.params).items():
        spec = tuple(_used(axes, mesh) for axes in leaf.sharding.spec)
        yield Cut(path, leaf.shape, str(leaf.dtype), spec, _bytes(leaf))
    rest = {"optimizer": state.opt_state, "residuals": state.residuals, "scaling": state.scaling}
    for name, tree in rest.items():
        leaves = jax.tree.leaves(tree)
        if leaves:
            dtypes = sorted({str(leaf.dtype) for leaf in leaves if leaf.ndim})
            yield Cut(name, (), " ".join(dtypes), (), sum(map(_bytes, leaves)))
    shape = (config.batch_size, config.context)
    spec = tuple(_used(axes, mesh) for axes in sharding.batch_sharding(mesh, shape).spec)
    shapes = config.data.batch_shapes(*shape)
    sizes = (math.prod(sharding.batch_sharding(mesh, s).shard_shape(s)) for s in shapes.values())
    yield Cut(", ".join(shapes), shape, "int32", spec, 4 * sum(sizes))


def _used(axes: str | tuple[str, ...] | None, mesh: jax.sharding.AbstractMesh) -> str:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return "x".join(name for name in names if mesh.shape[name] > 1) or "-"


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
