"""A run on devices that need not exist: what is cut how, what is sent, what is held.

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
from lmjax.plan.traffic import Row, compared
from lmjax.precision import paths
from lmjax.train import Config, abstract_state


@dataclass(frozen=True)
class Plan:
    """A run on a number of devices.

    Attributes:
      config: the run, resolved, with the policy of its first phase.
      mesh: the size of every mesh axis.
      program: its compiled step.
      sent: the collectives of the step.
    """

    config: Config
    mesh: dict[str, int]
    program: Program
    sent: tuple[Collective, ...]

    @property
    def devices(self) -> int:
        """How many."""
        return math.prod(self.mesh.values())

    @property
    def rows(self) -> list[Row]:
        """What is sent, by purpose, beside what the arithmetic says."""
        return compared(self.sent, expected_traffic(self.config, self.mesh))

    @property
    def memory(self) -> dict[str, float]:
        """Bytes of the parts of the peak on one device, by arithmetic."""
        return expected_memory(self.config, self.devices)


@dataclass(frozen=True)
class Cut:
    """How one array of the train state, or of the batch, is divided.

    Attributes:
      path: of the array; of a parameter, its own.
      shape: of all of it.
      dtype: as JAX calls it.
      spec: for each dimension the mesh axes that divide it, joined by `x`; `-` where none does.
      bytes: on one device.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: tuple[str, ...]
    bytes: int


def make_plan(config: Config, devices: int) -> Plan:
    """Compiles the step of a run for a number of devices; nothing is allocated.

    Args:
      config: the run; of a policy with phases, the first is planned.
      devices: how many.

    Raises:
      ValueError: the mesh does not fit the devices, or a micro-batch does not fit the mesh.
      PlanError: XLA does not compile the step.
    """
    config = config.resolved().at(0)
    program = partitioned(config, devices)
    mesh = sharding.mesh_shape(config.mesh, devices)
    sent = tuple(collectives(program.text, mesh)) if program.text else ()
    return Plan(config, mesh, program, sent)


def scaled(config: Config, devices: int, to: int) -> Config:
    """The same run on another number of devices, each with as many rows as before.

    Raises:
      ValueError: the mesh has no axis that takes what is left, or rows do not come out even.
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
    """How every parameter is divided, and what the rest of the state and the batch come to."""
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
    placed = sharding.batch_sharding(mesh, shape)
    spec = tuple(_used(axes, mesh) for axes in placed.spec)
    fields = config.data.batch_fields
    size = len(fields) * 4 * math.prod(placed.shard_shape(shape))
    yield Cut(", ".join(fields), shape, "int32", spec, size)


def _used(axes: str | tuple[str, ...] | None, mesh: jax.sharding.AbstractMesh) -> str:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return "x".join(name for name in names if mesh.shape[name] > 1) or "-"


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
