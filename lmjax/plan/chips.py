"""What accelerators can do, by their makers' data sheets. Knows nothing but Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Chip:
    """Peak rates of one chip.

    Attributes:
      name: of the chip.
      flops: floating-point operations a second of products, by the format of their operands.
      memory: bytes it holds.
      memory_bandwidth: bytes a second from and to them.
      near: bytes a second that it sends to chips of its node, along one mesh axis.
      node: chips that reach each other at that rate.
      far: bytes a second that it sends to other nodes; 0: all chips are near.
      sources: where the figures stand.
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
