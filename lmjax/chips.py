"""Peak rates of accelerators, from vendor data sheets. Depends on Python only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, NamedTuple


@dataclass(frozen=True)
class Chip:
    """Peak rates of one chip.

    Attributes:
      name: of the chip.
      flops: FLOP/s of matrix products, by operand format.
      memory: capacity in bytes.
      memory_bandwidth: bytes per second to and from memory.
      near: bytes per second sent to chips of the same node, along one mesh axis.
      node: number of chips that reach each other at that rate.
      far: bytes per second sent to other nodes; 0: all chips are near.
      sources: of the figures.
    """

    name: str
    flops: dict[str, float]
    memory: float
    memory_bandwidth: float
    near: float
    node: int
    far: float
    sources: tuple[str, ...]


H100: Final = Chip(
    name="H100 SXM",
    flops={"f32": 67e12, "tf32": 494.5e12, "bf16": 989e12, "f16": 989e12, "fp8": 1979e12},
    memory=80e9,
    memory_bandwidth=3.35e12,
    near=450e9,
    node=8,
    far=50e9,
    sources=(
        "FLOP/s without sparsity, 80 GB and 3.35 TB/s: NVIDIA H100 Tensor Core GPU data sheet, SXM",
        "f32: outside of the tensor cores, which have no f32 products",
        "450 GB/s: NVLink, half of the 900 GB/s for both directions of the same data sheet",
        "50 GB/s: one 400 Gb/s port a GPU, NVIDIA DGX H100 data sheet",
    ),
)

V5P: Final = Chip(
    name="TPU v5p",
    flops={"f32": 459e12 / 6, "bf16": 459e12, "f16": 459e12 / 6, "fp8": 459e12},
    memory=95 * 2**30,
    memory_bandwidth=2.765e12,
    near=200e9,
    node=8960,
    far=0.0,
    sources=(
        "459 TFLOP/s, 95 GiB, 2765 GB/s: Google Cloud documentation, TPU v5p",
        "f32 and f16: f32 products at the highest precision are six of bf16 (assumed)",
        "200 GB/s: 1200 GB/s for both directions of six links, same page; two of them, along one "
        "axis of the torus, for each mesh axis",
    ),
)

CHIPS: Final = (H100, V5P)


class PeakRate(NamedTuple):
    """The peak product rate of one kind of device.

    Attributes:
      chip: its name.
      format: of the operands at this rate.
      flops: floating-point operations per second.
    """

    chip: str
    format: str
    flops: float


def _tera(**rates: float) -> dict[str, float]:
    return {name: rate * 1e12 for name, rate in rates.items()}


def _tpu(bf16: float, fp8: float | None = None) -> dict[str, float]:
    """f32 and f16 products at the highest precision are six of bf16 (assumed)."""
    return _tera(f32=bf16 / 6, bf16=bf16, f16=bf16 / 6, fp8=fp8 or bf16)


DEVICES: Final[tuple[tuple[str, str, dict[str, float]], ...]] = (
    (r"B200", "B200", _tera(f32=75, tf32=1125, bf16=2250, f16=2250, fp8=4500)),
    (r"H100 PCIe", "H100 PCIe", _tera(f32=51, tf32=378, bf16=756, f16=756, fp8=1513)),
    (r"H100 NVL", "H100 NVL", _tera(f32=60, tf32=417.5, bf16=835, f16=835, fp8=1671)),
    (r"H200|GH200", "H200", H100.flops),
    (r"H100", H100.name, H100.flops),
    (r"A100", "A100", _tera(f32=19.5, tf32=156, bf16=312, f16=312)),
    (r"\bL4\b", "L4", _tera(f32=30.3, tf32=60, bf16=121, f16=121, fp8=242)),
    (r"V100", "V100", _tera(f32=15.7, f16=125)),
    (r"TPU v6", "TPU v6e", _tpu(918)),
    (r"TPU v5 ?lite|TPU v5e", "TPU v5e", _tpu(197)),
    (r"TPU v5", V5P.name, V5P.flops),
    (r"TPU v4", "TPU v4", _tpu(275)),
)
"""Pattern of JAX's `device_kind`, chip name, and dense FLOP/s by format, from the data sheets of
NVIDIA and Google. The first match counts."""


def peak_flops(device_kind: str, name: str) -> PeakRate | None:
    """The peak rate of a device for products in a format.

    Args:
      device_kind: as JAX reports it, such as `NVIDIA H100 80GB HBM3`.
      name: of the format; formats without a rate on this device are multiplied in f32.

    Returns:
      The rate; None if the device is unknown.
    """
    for pattern, chip, flops in DEVICES:
        if re.search(pattern, device_kind):
            used = name if name in flops else "f32"
            return PeakRate(chip, used, flops[used])
    return None
