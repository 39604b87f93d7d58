"""Measures tensors inside a differentiated, scanned and compiled model.

A probe is an extra input of the model that does not affect its output: slots of zeros. In place of
the gradient of a slot, `jax.grad` returns a measurement. Measurements thus leave the program as
gradients do: stacked by a scan over blocks, recomputed under rematerialisation, and absent from
the program if there is no probe.

The class of a slot decides what is measured, and so the cost:

    Maximum   the largest magnitude                    (delayed scale factors)
    Spread    the same, and exponents of a sample      (predictive loss scaling)
    Census    what rounding does to a sample of it     (telemetry)
    FullCensus   the same of every element

Tensors are identified by their role at a site. At a product: its operands `w` and `x`, its
cotangent `g`, and the gradients `dx` and `dw` that it returns. At any other site: its output `y`
and the cotangent `dx` of its input. Each is measured before it is rounded.

`taps.py` has slots for whole tensors, `past.py` a `Slope`. Knows jax, `bits`, `formats` and those.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.precision.asides import aside
from lmjax.precision.bits import largest_magnitude, pattern, split
from lmjax.precision.formats import Format
from lmjax.precision.past import Slope
from lmjax.precision.taps import TAPS, handed_on

EXPONENTS = 256
"""Length of a histogram of exponents; see `exponent_histogram`."""

SPREAD_SAMPLE, CENSUS_SAMPLE = 2**12, 2**14
"""Approximate number of elements that a `Spread` and a `Census` sample from a tensor."""

_LINE = 16
"""Neighbours that are sampled together: one cache line, in f32."""


class Rounded(NamedTuple):
    """A tensor before and after rounding.

    Attributes:
      raw: the tensor.
      scaled: the same in units of the format: divided by the scale factors, if any.
      values: `scaled`, rounded to the format.
      format: what it was rounded to.
    """

    raw: jax.Array
    scaled: jax.Array
    values: jax.Array
    format: Format


class Slot(Protocol):
    """A measurement of one tensor: a pytree of f32 arrays."""

    @classmethod
    def empty(cls) -> Any:
        """The slot that goes in, and the neutral element of `combine`."""

    def of(self, tensor: Rounded) -> Any:
        """The measurement that comes out."""

    def combine(self, other: Any) -> Any:
        """The measurement of two tensors combined."""


class Maximum(NamedTuple):
    """f32[]: the largest magnitude of the unrounded tensor; NaN if it holds a NaN."""

    maximum: jax.Array

    @classmethod
    def empty(cls) -> Maximum:
        """Nothing seen."""
        return cls(jnp.zeros((), jnp.float32))

    @classmethod
    def of(cls, tensor: Rounded) -> Maximum:
        """One pass over the tensor."""
        return cls(_maximum(tensor.raw))

    def combine(self, other: Maximum) -> Maximum:
        """The larger one."""
        return Maximum(jnp.maximum(self.maximum, other.maximum))


class Spread(NamedTuple):
    """The largest magnitude, and the exponents of about `SPREAD_SAMPLE` elements.

    Attributes:
      maximum: f32[], over all elements.
      histogram: f32[EXPONENTS], from the sample, scaled up to the size of the tensor.
    """

    maximum: jax.Array
    histogram: jax.Array

    @classmethod
    def empty(cls) -> Spread:
        """Nothing seen."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((EXPONENTS,), jnp.float32))

    @classmethod
    def of(cls, tensor: Rounded) -> Spread:
        """One pass for the maximum, and one over the sample."""
        sample = _sample(tensor.raw, SPREAD_SAMPLE)
        histogram = exponent_histogram(sample) * np.float32(tensor.raw.size / sample.size)
        return cls(_maximum(tensor.raw), histogram)

    def combine(self, other: Spread) -> Spread:
        """The larger maximum, and the sum of the histograms."""
        return Spread(jnp.maximum(self.maximum, other.maximum), self.histogram + other.histogram)


class Fate(enum.IntEnum):
    """The effect of rounding on an element."""

    OTHER = 0
    """It remained a normal number, infinite or NaN."""
    ZERO = 1
    """It was 0 before."""
    UNDERFLOW = 2
    """It became 0."""
    SUBNORMAL = 3
    """It became subnormal, and so lost relative precision."""
    OVERFLOW = 4
    """It was finite, but beyond the largest finite value of the format: it saturates or becomes
    infinite, as the site rounds."""


class Census(NamedTuple):
    """The effect of rounding on the elements of a tensor.

    Counts, as f32, of about `CENSUS_SAMPLE` elements spread evenly over the tensor, scaled up to
    its size; smaller tensors are counted whole.

    Attributes:
      size: f32[], elements of the tensor.
      maximum: f32[], the largest magnitude of all elements of the unrounded tensor.
      table: f32[len(Fate), EXPONENTS], elements by fate and by exponent in units of the format; see
        `exponent_histogram`.
    """

    size: jax.Array
    maximum: jax.Array
    table: jax.Array

    @property
    def histogram(self) -> jax.Array:
        """f32[EXPONENTS]: elements by exponent."""
        return self.table.sum(axis=-2)

    def elements(self, fate: Fate) -> jax.Array:
        """f32[]: number of elements with this fate."""
        return self.table[..., fate, :].sum(axis=-1)

    @classmethod
    def empty(cls) -> Census:
        """Nothing seen."""
        zero = jnp.zeros((), jnp.float32)
        return cls(zero, zero, jnp.zeros((len(Fate), EXPONENTS), jnp.float32))

    @classmethod
    def of(cls, tensor: Rounded) -> Census:
        """One pass for the maximum, and one over the sample."""
        return cls._counted(tensor, CENSUS_SAMPLE)

    @classmethod
    def _counted(cls, tensor: Rounded, size: int) -> Census:
        # One table in one pass: a watched step contains about a hundred of these, and each adds to
        # compile time.
        scaled, values = (_sample(x, size) for x in (tensor.scaled, tensor.values))
        bins = np.int32(EXPONENTS) * _fates(scaled, values, tensor.format) + _exponents(scaled)
        counts = jnp.zeros((len(Fate) * EXPONENTS,), jnp.int32).at[bins].add(1)
        return cls(
            size=jnp.asarray(tensor.scaled.size, jnp.float32),
            maximum=_maximum(tensor.raw),
            table=counts.astype(jnp.float32).reshape(len(Fate), -1)
            * np.float32(tensor.scaled.size / scaled.size),
        )

    def combine(self, other: Census) -> Census:
        """Sums of counts, and the larger maximum."""
        total = jax.tree.map(jnp.add, self, other)
        return total._replace(maximum=jnp.maximum(self.maximum, other.maximum))


class FullCensus(Census):
    """A `Census` of every element, which takes several passes over the tensor."""

    @classmethod
    def of(cls, tensor: Rounded) -> Census:
        """Counts everything."""
        return cls._counted(tensor, tensor.scaled.size)


Slots = Mapping[str, Mapping[str, Any]]
"""Slots by role and then by user, e.g. `{"dx": {"telemetry": Census.empty()}}`."""


class Probe(NamedTuple):
    """The inputs of one site for delayed scaling and measurements.

    Attributes:
      factors: f32[] each, by role: factors of operands with delayed scaling.
      slots: what to measure.
    """

    factors: Mapping[str, jax.Array]
    slots: Slots


def exponent_histogram(x: jax.Array) -> jax.Array:
    """Counts elements by exponent.

    Returns:
      f32[EXPONENTS]: entry e counts elements with `2**(e - 127) <= abs(x) < 2**(e - 126)`; entry 0
      also zeros and subnormals, the last one infinities and NaN. f64 is rounded to f32 first.
    """
    # Counted as integers: a sum of ones in f32 stops at 2^24.
    counts = jnp.zeros((EXPONENTS,), jnp.int32).at[_exponents(x.reshape(-1))].add(1)
    return counts.astype(jnp.float32)


def _exponents(x: jax.Array) -> jax.Array:
    """int32, of the shape of `x`: the bin of each element in `exponent_histogram`."""
    patterns = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    biased = (patterns >> np.uint32(23)) & np.uint32(EXPONENTS - 1)  # without the sign
    return biased.astype(jnp.int32)


def _fates(scaled: jax.Array, values: jax.Array, rounded_to: Format) -> jax.Array:
    """int32: the `Fate` of each element, from what it was before and after rounding.

    On bit patterns: compiled comparisons of floats may take subnormals for 0.
    """
    work, _, before = split(scaled)
    _, _, after = split(values.astype(work.dtype))
    normal, largest, infinity = (
        pattern(value, work)
        for value in (rounded_to.smallest_normal, rounded_to.largest_finite, np.inf)
    )
    fates = {
        Fate.ZERO: before == 0,
        Fate.UNDERFLOW: (before != 0) & (after == 0),
        Fate.SUBNORMAL: (after != 0) & (after < normal),
        Fate.OVERFLOW: (before > largest) & (before < infinity),
    }
    return sum(
        (np.int32(fate) * mask.astype(jnp.int32) for fate, mask in fates.items()),
        start=jnp.int32(Fate.OTHER),
    )


def _sample(x: jax.Array, size: int) -> jax.Array:
    """About `size` elements of a tensor in evenly spread lines of neighbours; all if it has fewer.

    The distance between lines is coprime to their number, so that they visit every column, whatever
    the shape of the tensor.
    """
    flat = x.reshape(-1)
    if flat.size <= size:
        return flat
    lines = flat[: flat.size // _LINE * _LINE].reshape(-1, _LINE)
    distance = max(1, flat.size // size)
    while math.gcd(distance, lines.shape[0]) > 1:
        distance += 1
    return lines[::distance].reshape(-1)


def report(x: jax.Array, slots: Mapping[str, Any], tensor: Callable[[], Rounded]) -> jax.Array:
    """Returns `x`, which only a `Swap` replaces; the gradients of `slots` measure `tensor()`."""
    if not slots:
        return x
    with aside("measuring"):
        measured = jax.lax.stop_gradient(measure(slots, tensor()))
    return _deliver(x, slots, measured)


@aside("measuring")
def measure(slots: Mapping[str, Any], tensor: Rounded) -> dict[str, Any]:
    """Returns every slot's measurement of a tensor."""
    return {who: slot.of(tensor) for who, slot in slots.items()}


@jax.custom_vjp
def _deliver(x: jax.Array, slots: Any, measured: Any) -> jax.Array:
    return handed_on(x, slots)


def _deliver_forward(x: jax.Array, slots: Any, measured: Any) -> tuple[jax.Array, Any]:
    return handed_on(x, slots), measured


def _deliver_backward(measured: Any, g: jax.Array) -> tuple[jax.Array, Any, Any]:
    met = lambda slot: slot.met(g) if isinstance(slot, Slope) else slot
    return (
        g,
        {who: met(slot) for who, slot in measured.items()},
        jax.tree.map(jnp.zeros_like, measured),
    )


_deliver.defvjp(_deliver_forward, _deliver_backward)


Round = Callable[..., Rounded]


def report_cotangent(
    x: jax.Array, slots: Mapping[str, Any], rounded: Round, *arguments: Any
) -> jax.Array:
    """Returns `x` unchanged; the gradients of `slots` are measurements of its cotangent.

    Args:
      x: any tensor of the model.
      slots: what to measure.
      rounded: `rounded(cotangent, *arguments)` returns the cotangent before and after rounding.
      arguments: arrays that `rounded` needs.
    """
    return _watch(rounded, x, slots, arguments) if slots else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watch(rounded: Round, x: jax.Array, slots: Any, arguments: Any) -> jax.Array:
    return x


def _watch_forward(rounded: Round, x: jax.Array, slots: Any, arguments: Any) -> Any:
    return x, (slots, arguments)


def _watch_backward(rounded: Round, saved: Any, g: jax.Array) -> tuple[jax.Array, Any, Any]:
    slots, arguments = saved
    measured = aside("measuring")(lambda: measure(slots, rounded(g, *arguments)))()
    return handed_on(g, slots), measured, jax.tree.map(jnp.zeros_like, arguments)


_watch.defvjp(_watch_forward, _watch_backward)


def tap(x: jax.Array, slots: Slots, role: str, held_in: Format) -> jax.Array:
    """Returns `x`, a tensor in a format, as its site hands it on; `slots[role]` measure it."""
    return report(x, slots.get(role, {}), lambda: Rounded(x, x, x, held_in))


def tap_cotangent(x: jax.Array, slots: Slots, role: str, held_in: Format) -> jax.Array:
    """Returns `x`; `slots[role]` measure its cotangent as it arrives."""
    return report_cotangent(x, slots.get(role, {}), lambda g: Rounded(g, g, g, held_in))


def rescale_cotangent(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns `x` unchanged; multiplies its cotangent by `factor`, f32[], a power of two."""
    with jax.named_scope("loss_scale"):
        return _rescale(x, factor)


@jax.custom_vjp
def _rescale(x: jax.Array, factor: jax.Array) -> jax.Array:
    return x


def _rescale_forward(x: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, factor


def _rescale_backward(factor: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    # In f32: the factor itself may be out of the range of f16 where the product is not.
    wide = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    return (wide * factor.astype(wide.dtype)).astype(g.dtype), jnp.zeros_like(factor)


_rescale.defvjp(_rescale_forward, _rescale_backward)


def combine(first: Any, second: Any) -> Any:
    """Combines two trees of measurements, slot by slot."""
    return jax.tree.map(lambda a, b: a.combine(b), first, second, is_leaf=is_slot)


def is_slot(node: Any) -> bool:
    """Whether a node of a pytree is a measurement."""
    return isinstance(node, TAPS) or hasattr(node, "combine")


def _maximum(x: jax.Array) -> jax.Array:
    return largest_magnitude(x).astype(jnp.float32)
