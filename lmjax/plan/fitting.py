"""Plans a run on chips by their own compilers, and finds what makes it fit.

Knows everything else in this room.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, get_args

from lmjax.hlo.collectives import Collective, collectives
from lmjax.hlo.kernels import Kernel, Product, kernels, products
from lmjax.model.config import Remat
from lmjax.parallel import sharding
from lmjax.plan.memory import CPU_ONLY, expected_memory
from lmjax.plan.program import Compiled, DoesNotFit, Memory, compiled_for
from lmjax.plan.targets import Target
from lmjax.train import Config, resolve

TRIES: Final = 3
"""Programs to compile in search of one that fits."""

_MOST: Final = 0.95
"""What a process may take of a GPU's memory; the rest is CUDA's and that of libraries."""


@dataclass(frozen=True)
class ChipPlan:
    """The plan of a run on chips.

    Attributes:
      config: the resolved run, with the policy of its first phase.
      target: the chips.
      memory: what the step needs on one device.
      compiled: the step; None if its compiler refused it for want of memory.
    """

    config: Config
    target: Target
    memory: Memory
    compiled: Compiled | None

    @property
    def mesh(self) -> dict[str, int]:
        """The size of every mesh axis."""
        return sharding.mesh_shape(self.config.mesh, self.target.devices)

    @property
    def fits(self) -> bool:
        """Whether the chips have the memory that the step needs."""
        share = 1.0 if self.target.backend.platform == "tpu" else _MOST
        return self.compiled is not None and self.memory.peak <= share * self.target.memory

    @property
    def fits_by_default(self) -> bool:
        """Whether that is so without telling JAX to take more of it."""
        return self.fits and self.memory.peak <= self.target.usable

    @functools.cached_property
    def sent(self) -> tuple[Collective, ...]:
        """The collectives of the step."""
        return tuple(collectives(self._text, self.mesh)) if self._text else ()

    @functools.cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels of libraries that it uses."""
        return tuple(kernels(self._text)) if self._text else ()

    @functools.cached_property
    def products(self) -> tuple[Product, ...]:
        """Its products outside of attention kernels."""
        return tuple(products(self._text)) if self._text else ()

    @property
    def _text(self) -> str:
        return self.compiled.text if self.compiled is not None else ""


@dataclass(frozen=True)
class Suggestion:
    """A change of a run.

    Attributes:
      flags: that make it.
      plan: of the changed run, compiled; None if nothing that was compiled fits.
      expected: bytes on one device before it was compiled, by the arithmetic.
    """

    flags: str
    plan: ChipPlan | None
    expected: float


def plan_for_chips(config: Config, target: Target) -> ChipPlan:
    """Compiles the step of a run for chips.

    Args:
      config: the run; only the first phase of a policy with phases is planned.
      target: the chips.

    Raises:
      ValueError: the compiler is not installed, the mesh does not fit the devices, or the batch
        does not fit the mesh.
      PlanError: the step cannot be compiled.
    """
    config = resolve(config).at(0).config
    try:
        compiled = compiled_for(config, target)
    except DoesNotFit as error:
        return ChipPlan(config, target, error.memory, None)
    return ChipPlan(config, target, compiled.memory, compiled)


def suggestion(plan: ChipPlan) -> Suggestion | None:
    """The smallest change with which a step that does not fit does.

    Changes are ordered by the number of settings that differ, then by how much they do; among
    equals the mesh comes before micro-batches, and these before rematerialisation. Each is
    estimated by the arithmetic of memory, corrected by what compilers have said so far; the first
    that should fit is compiled, up to `TRIES` times.

    Returns:
      The change; None if by the arithmetic nothing helps.
    """
    target, found = plan.target, None
    room = target.memory if target.backend.platform == "tpu" else target.usable
    correction = plan.memory.peak / _expected(plan.config, target)
    tries = 0
    for flags, config in _changes(plan.config, target.devices):
        expected = _expected(config, target) * correction
        if expected > room:
            continue
        if tries == TRIES:
            return found
        tries += 1
        made = plan_for_chips(config, target)
        if made.fits:
            return Suggestion(flags, made, expected)
        correction = max(correction, correction * made.memory.peak / expected)
        found = Suggestion(flags, None, expected)
    return found


def _expected(config: Config, target: Target) -> float:
    parts = expected_memory(resolve(config).at(0), target.devices)
    return sum(parts.values()) - parts[CPU_ONLY]


def _changes(config: Config, devices: int) -> Iterator[tuple[str, Config]]:
    """Changed runs that the devices can divide, the smallest change first."""
    meshes = list(_meshes(config, devices))
    options = (list(_remat(config)), list(_micro_batches(config)), meshes)
    chosen = itertools.product(*(range(len(one)) for one in options))
    size = lambda places: (sum(place > 0 for place in places), sum(places), places)
    for places in sorted(chosen, key=size)[1:]:
        changes = [one[place] for one, place in zip(options, places, strict=True)]
        flags = " ".join(flag for flag, _ in changes if flag)
        values: dict[str, Any] = {
            name: value for _, fields in changes for name, value in fields.items()
        }
        try:
            changed = dataclasses.replace(config, **values)
        except ValueError:  # such as a fixed order of sums, which wants whole parts
            continue
        parts = sharding.batch_parts(sharding.abstract_mesh(changed.mesh, devices))
        if not changed.batch_size // changed.micro_batches % parts:
            yield flags, changed


Option = tuple[str, dict[str, Any]]
"""Flags, and the fields of a config that they change."""


def _remat(config: Config) -> Iterator[Option]:
    yield "", {}
    names = get_args(Remat)
    for name in names[names.index(config.model.remat) + 1 :]:
        model = dataclasses.replace(config.model, remat=name)
        yield f"--model.remat {name}", {"model": model}


def _micro_batches(config: Config) -> Iterator[Option]:
    yield "", {}
    count = 2 * config.micro_batches
    while config.batch_size % count == 0:
        yield f"--micro-batches {count}", {"micro_batches": count}
        count *= 2


def _meshes(config: Config, devices: int) -> Iterator[Option]:
    """All of data to fsdp, and then half of that to tensor, again and again."""
    yield "", {}
    sizes = sharding.mesh_shape(config.mesh, devices)
    whole = sizes["data"] * sizes["fsdp"]
    tensor = sizes["tensor"]
    while whole >= 1 and config.model.heads % tensor == 0:
        mesh = sharding.MeshConfig(1, whole, tensor, sizes["sequence"])
        if dataclasses.asdict(mesh) != sizes:
            flags = f"--mesh.data 1 --mesh.fsdp {whole}"
            flags += f" --mesh.tensor {tensor}" if tensor != sizes["tensor"] else ""
            yield flags, {"mesh": mesh}
        if whole % 2:
            return
        whole, tensor = whole // 2, tensor * 2
