"""Model FLOP utilisation of a run, and its peak memory.

Model FLOP per token are 6 N + 12 x layers x width x length, not halved for causality (Chowdhery et
al. 2022, appendix B), regardless of recomputation. N counts the parameters that are multiplied: not
the position table, nor the token table unless it is also the head. The width is that of all heads.

They are divided by the peak rate of the products' format, taken at `mlp/up` of the first block.
Known chips use their data sheets (`lmjax/chips.py`); other machines, mainly CPUs, use the rate of a
square product measured here, once per machine, format and JAX version. It is the rate of all
threads of a process, however many devices it emulates.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp

from lmjax import strict_json
from lmjax.chips import peak_flops
from lmjax.model import ModelConfig, structure
from lmjax.parallel.sharding import Mesh
from lmjax.precision import exact
from lmjax.precision.backend import Backend
from lmjax.precision.formats import parse_format
from lmjax.precision.policy import carrier
from lmjax.runs.resolved import Phase

ROWS: Final = {"cpu": 512}
"""For the measured product on CPU; elsewhere `ROWS_ELSEWHERE`."""

ROWS_ELSEWHERE: Final = 4096
REPETITIONS: Final = 7


@dataclass(frozen=True)
class Peak:
    """The peak rate of a run's devices.

    Attributes:
      flops: floating-point operations per second of products, over all devices.
      format: of the operands.
      source: of the rate: a chip, or a measurement.
    """

    flops: float
    format: str
    source: str

    def __str__(self) -> str:
        """Describes the rate, such as `210 GFLOP/s of f16 products (measured)`."""
        return f"{_rate(self.flops)} of {self.format} products ({self.source})"


def flops_per_token(model: ModelConfig, context: int) -> int:
    """Model FLOP of training on one token; see the module docstring."""
    params = dict(structure(model)[1])
    lookups = {"positions", "types"} | (set() if model.tied_head else {"embed"})
    share = model.predicted(context) / context
    heads = {"embed", "transform", "pool", "head"}
    count = sum(
        leaf.size * (share if name in heads else 1)
        for name, part in params.items()
        if name not in lookups
        for leaf in jax.tree.leaves(part)
    )
    return 6 * round(count) + 12 * model.layers * model.heads * model.head_size * context


def peak_of(phase: Phase, mesh: Mesh) -> Peak | None:
    """The peak of the devices of a mesh in the format of a phase's products.

    Args:
      phase: gives the format and where measurements are cached.
      mesh: the devices.

    Returns:
      The peak; None if it is unknown and cannot be measured.
    """
    device = mesh.devices.flat[0]
    name = product_format(phase, Backend.of(device))
    known = peak_flops(device.device_kind, name)
    if known is not None:
        return Peak(known.flops * mesh.size, known.format, f"{known.chip} x {mesh.size}")
    parts = mesh.size if device.platform != "cpu" else jax.process_count()
    dtype = "f32" if name in ("tf32", "fp8") else name
    try:
        rate = _remembered(
            phase.config.data.cache_path, device, dtype, lambda: measured(device, dtype)
        )
    except Exception:  # utilisation is only a log column; it must not end a run
        return None
    return Peak(rate * parts, dtype, "measured")


def product_format(phase: Phase, backend: Backend) -> str:
    """The format that a phase's products are computed in: `f32`, `tf32`, `bf16`, `fp8`, ..."""
    products = phase.products(backend)
    path = next((path for path in products if path.endswith("/mlp/up")), next(iter(products)))
    site, product = phase.sites[path], products[path]["y"]
    if set(product.operands) == {"tf32"} and backend.platform == "gpu":
        return "tf32"
    if product.native and site.weights is not None and site.activations is not None:
        return "fp8"  # or int8, whose rate is the same
    if not product.native:
        return product.multiplied
    return parse_format(jnp.dtype(carrier(site.compute)).name).name


def measured(device: jax.Device, name: str) -> float:
    """FLOP/s of a square product on a device, by the faster of two methods; well under a second.

    Args:
      device: where.
      name: format of the operands; the other method first widens them to f32.
    """
    rows = ROWS.get(device.platform, ROWS_ELSEWHERE)
    dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16, "f64": jnp.float64}[name]
    how: Any = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    multiply = exact.jit(lambda x: jnp.matmul(x, x, **how))
    best = float("inf")
    for way in {dtype, jnp.float32}:
        operand = jax.device_put(jnp.full((rows, rows), 0.5, way), device)
        multiply(operand).block_until_ready()  # compiles
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            multiply(operand).block_until_ready()
            best = min(best, time.perf_counter() - start)
            if best > 0.05:
                break
    return 2 * rows**3 / best


def _remembered(cache: Path, device: jax.Device, name: str, measure: Callable[[], float]) -> float:
    """Reads a rate from the cache, or measures it and caches it if writable."""
    threads = os.environ.get("PJRT_NPROC") or str(os.cpu_count())
    what = (platform.node(), platform.processor(), device.device_kind, threads, name)
    key = hashlib.sha256("\0".join((*what, jax.__version__)).encode()).hexdigest()[:16]
    path = cache / "peaks" / f"{key}.json"
    try:
        return float(strict_json.loads(path.read_text(encoding="utf-8"))["flops_per_second"])
    except (OSError, ValueError, KeyError, TypeError):
        rate = measure()
    record = {"machine": what, "jax": jax.__version__, "flops_per_second": rate}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(strict_json.dumps(record) + "\n", encoding="utf-8")
        temporary.replace(path)
    return rate


def peak_memory_bytes() -> int | None:
    """Peak memory of one device of this process in bytes; on CPU, of the whole process."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in _local()]
    known = [peak for peak in peaks if peak]
    if known:
        return max(known)
    if _local()[0].platform != "cpu" or sys.platform == "win32":
        return None
    if sys.platform == "linux":  # ru_maxrss is inherited from the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    import resource

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # getrusage(2): kilobytes


def _local() -> list[Any]:
    return jax.local_devices()


def _rate(flops: float) -> str:
    unit, size = ("TFLOP/s", 1e12) if flops >= 1e12 else ("GFLOP/s", 1e9)
    return f"{flops / size:.4g} {unit}"
