"""The chips that a step can be compiled for without having them.

Their compilers are those of a run on the chip: libtpu (the extra `aot-tpu`) and XLA's GPU compiler
with CUDA's assembler (`aot-cuda`). What only the chip can tell is missing: time, and which of
several GPU kernels is fastest, among which XLA chooses by measuring.

Knows backends, and JAX's descriptions of topologies.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import re
from dataclasses import dataclass
from typing import Any, Final

from packaging.requirements import Requirement

from lmjax.precision.backend import Backend

GIB: Final = 2**30


@dataclass(frozen=True)
class _Tpu:
    """A TPU as Google Cloud offers it.

    Attributes:
      title: its name.
      memory: bytes of a device.
      axes: dimensions of its torus.
      largest: number of chips in the largest slice.
      devices: JAX devices of a chip.
    """

    title: str
    memory: int
    axes: int
    largest: int
    devices: int = 1


@dataclass(frozen=True)
class _Gpu:
    """An Nvidia GPU, in what XLA's compiler asks about it.

    Attributes:
      title: its name.
      memory: bytes, as CUDA reports them.
      kind: JAX's `device_kind`.
      capability: compute capability.
      cores: streaming multiprocessors.
      bandwidth: bytes per second to memory.
      cache: bytes of the L2 cache.
      shared: bytes of shared memory of a multiprocessor; a block may use 1 KiB less.
      clock: GHz.
      lanes: f32 units of a multiprocessor.
    """

    title: str
    memory: int
    kind: str
    capability: tuple[int, int]
    cores: int
    bandwidth: int
    cache: int
    shared: int = 228 * 1024
    clock: float = 1.98
    lanes: int = 128


_TPUS: Final = {
    "v5e": _Tpu("TPU v5e", 16 * GIB, 2, 256),
    "v5p": _Tpu("TPU v5p", 95 * GIB, 3, 6144),
    "v6e": _Tpu("TPU v6e", 32 * GIB, 2, 256),
    "7x": _Tpu("TPU7x", 96 * GIB, 3, 9216, devices=2),
}
_GPUS: Final = {
    "a100": _Gpu(
        "A100 80GB", 84987740160, "NVIDIA A100-SXM4-80GB", (8, 0), 108, 2039 * 10**9, 40 * 2**20,
        shared=164 * 1024, clock=1.41, lanes=64,
    ),
    "h100": _Gpu(
        "H100 SXM", 84978434048, "NVIDIA H100 80GB HBM3", (9, 0), 132, 3352 * 10**9, 50 * 2**20
    ),
    "h200": _Gpu("H200", 150110011392, "NVIDIA H200", (9, 0), 132, 4800 * 10**9, 60 * 2**20),
    "b200": _Gpu(
        "B200", 183359 * 2**20, "NVIDIA B200", (10, 0), 148, 8000 * 10**9, 126 * 2**20, clock=1.965
    ),
}  # fmt: skip

_NODE: Final = 8
"""GPUs of a host."""

_TPU_NODE: Final = (2, 2, 1)
"""Chips of a host along each axis of the torus; libtpu does not make it smaller by itself."""

_PREALLOCATED: Final = 0.75
"""What JAX takes of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""

_CONFIG: Final = """\
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin} core_count: {cores} fpus_per_core: {lanes}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock}
  device_memory_size: {memory} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{kind}"
"""
"""A GpuTargetConfigProto of XLA, in text form."""


@dataclass(frozen=True)
class Target:
    """A number of chips of one kind.

    Attributes:
      name: as it is written: `h100:8`, `tpu-v5p:4x4x4`.
      title: of the chip.
      backend: what decides how products are written for it.
      devices: number of JAX devices.
      memory: bytes of a device.
      usable: bytes of it that JAX takes by default.
      extra: of lmjax, with its compiler.
    """

    name: str
    title: str
    backend: Backend
    devices: int
    memory: int
    usable: int
    extra: str

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages of which one has its compiler."""
        if self.extra == "aot-tpu":
            return ("libtpu",)
        return ("jax_cuda13_plugin", "jax_cuda12_plugin")

    @property
    def compiler(self) -> str | None:
        """The installed package with its compiler and the version; None if there is none."""
        for package in self.packages:
            if importlib.util.find_spec(package) is not None:
                name = package.replace("_", "-")
                return f"{name} {importlib.metadata.version(name)}"
        return None

    @property
    def mismatch(self) -> str:
        """What is wrong with the version of the installed compiler, if JAX asks for another."""
        for text in importlib.metadata.requires("jax") or ():
            wanted = Requirement(text)
            for name in (package.replace("_", "-") for package in self.packages):
                if wanted.name != name or not wanted.specifier:
                    continue
                with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                    installed = importlib.metadata.version(name)
                    if not wanted.specifier.contains(installed, prereleases=True):
                        jax = importlib.metadata.version("jax")
                        return (
                            f"jax {jax} needs {name}{wanted.specifier}, but {installed} is "
                            f"installed; install it with: pip install '{name}{wanted.specifier}'"
                        )
        return ""


def parse_target(text: str) -> Target:
    """Parses the chips to compile for; without a shape, one chip.

    Raises:
      ValueError: says what is unknown or impossible, and what to write instead.
    """
    kind, _, shape = text.lower().partition(":")
    chip = kind.removeprefix("tpu-").removeprefix("tpu")
    if chip in _TPUS:
        sizes = _torus(chip, shape)
        tpu, name = _TPUS[chip], f"tpu-{chip}:{'x'.join(map(str, sizes))}"
        devices = math.prod(sizes) * tpu.devices
        backend = Backend("tpu")
        return Target(name, tpu.title, backend, devices, tpu.memory, tpu.memory, "aot-tpu")
    if chip in _GPUS:
        gpu, count = _GPUS[chip], _count(chip, shape)
        usable, backend = int(_PREALLOCATED * gpu.memory), Backend("gpu", gpu.capability)
        name = f"{chip}:{count}"
        return Target(name, gpu.title, backend, count, gpu.memory, usable, "aot-cuda")
    known = [*_GPUS, *(f"tpu-{name}" for name in _TPUS)]
    raise ValueError(
        f"unknown chip '{kind}' in the target '{text}'; write CHIP:SHAPE, such as h100:8 or "
        f"tpu-v5p:4x4x4, with one of {', '.join(known)}"
    )


def topology_devices(target: Target) -> list[Any]:
    """The devices of a target, to compile for and not to compute on.

    In a process with JAX on the CPU, in whose environment `TPU_SKIP_MDS_QUERY` is set: libtpu would
    ask a cloud for the TPU of this machine.

    Raises:
      jax.errors.JaxRuntimeError: the compiler does not have such a topology.
    """
    from jax.experimental.topologies import get_topology_desc

    chip, _, shape = target.name.removeprefix("tpu-").partition(":")
    if target.backend.platform == "tpu":
        name = f"{'tpu' if chip[0].isdigit() else ''}{chip}:{shape}"
        sizes = (*map(int, shape.split("x")), 1)
        host = tuple(math.gcd(size, most) for size, most in zip(sizes, _TPU_NODE, strict=False))
        return list(get_topology_desc(name, "tpu", chips_per_host_bounds=host).devices)
    hosts, inside = divmod(target.devices, _NODE)
    topology = f"1x{hosts}x{_NODE}" if hosts else f"1x1x{inside}"
    return list(
        get_topology_desc(
            platform="cuda", topology_name="", target_config=_config(_GPUS[chip]), topology=topology
        ).devices
    )


def _config(gpu: _Gpu) -> str:
    major, minor = gpu.capability
    fields = {name: getattr(gpu, name) for name in gpu.__dataclass_fields__}
    return _CONFIG.format(major=major, minor=minor, optin=gpu.shared - 1024, **fields)


def _count(chip: str, shape: str) -> int:
    if not re.fullmatch(r"[1-9]\d*|", shape):
        raise ValueError(
            f"'{shape}' is not a number of GPUs; write {chip}:N, such as {chip}:8, whose mesh "
            "--mesh.data, --mesh.fsdp, --mesh.tensor and --mesh.sequence lay out"
        )
    count = int(shape or 1)
    if count > _NODE and count % _NODE:
        near = count // _NODE * _NODE
        raise ValueError(
            f"{count} GPUs are no whole number of hosts with {_NODE}; write {chip}:{near} or "
            f"{chip}:{near + _NODE}"
        )
    return count


def _torus(chip: str, shape: str) -> tuple[int, ...]:
    tpu = _TPUS[chip]
    if not shape:
        return (1,) * tpu.axes
    example = "4x4" if tpu.axes == 2 else "4x4x4"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != tpu.axes - 1:
        raise ValueError(
            f"'{shape}' is not a shape of {tpu.title} slices, which have {tpu.axes} dimensions; "
            f"write tpu-{chip}:{example}"
        )
    sizes = tuple(map(int, shape.split("x")))
    chips, small, cubes = math.prod(sizes), _small(tpu), sizes == tuple(sorted(sizes))
    cubes = cubes and tpu.axes == 3 and not any(size % 4 for size in sizes)
    if sizes not in small and not (cubes and chips <= tpu.largest):
        listed = ", ".join("x".join(map(str, one)) for one in small)
        more = "" if tpu.axes == 2 else (
            f", and multiples of 4 in ascending order up to {tpu.largest} chips"
        )  # fmt: skip
        raise ValueError(f"there are no {tpu.title} slices of {shape}; there are {listed}{more}")
    return sizes


def _small(tpu: _Tpu) -> list[tuple[int, ...]]:
    if tpu.axes == 2:
        return [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    return [(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
