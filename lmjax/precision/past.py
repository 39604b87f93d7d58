"""Scale factors that follow from past steps: delayed, observed and learned ones.

Knows jax, `bits`, `quantizer` and `scaling`.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.precision.bits import largest_magnitude
from lmjax.precision.quantizer import Quantizer
from lmjax.precision.scaling import LARGEST_FACTOR, SMALLEST_FACTOR, scale_from_maximum

LEARNING_RATE: Final = np.float32(0.01)
"""Of the logarithm of a learned factor."""
_FIRST, _SECOND = np.float32(0.9), np.float32(0.999)


class Slope(NamedTuple):
    """What a factor that is learned needs to know of the tensor that it scales.

    Attributes:
      maximum: f32[], as in `Maximum`.
      slope: f32[], the derivative of the loss by the factor: that by each quantized element times
        `round(x / s) - x / s`, or times the largest number of the format where it is exceeded
        (LSQ, Esser et al. 2020, equation 3).
    """

    maximum: jax.Array
    slope: jax.Array

    @classmethod
    def empty(cls) -> Slope:
        """Nothing seen."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    @classmethod
    def of(cls, tensor: Any) -> Slope:
        """Of a `Rounded`: waits in `slope`, with its shape, for its cotangent; see `met`."""
        scaled, values = (x.astype(jnp.float32) for x in (tensor.scaled, tensor.values))
        low, high = tensor.format.smallest_finite, tensor.format.largest_finite
        inside = (scaled >= np.float32(low)) & (scaled <= np.float32(high))
        return cls(
            largest_magnitude(tensor.raw).astype(jnp.float32),
            jnp.where(inside, values - scaled, values),
        )

    def met(self, cotangent: jax.Array) -> Slope:
        """The measurement, once the cotangent of the tensor is known."""
        return self._replace(slope=jnp.sum(self.slope * cotangent.astype(jnp.float32)))

    def combine(self, other: Slope) -> Slope:
        """The larger maximum, and the sum of the derivatives."""
        return Slope(jnp.maximum(self.maximum, other.maximum), self.slope + other.slope)


class ScaleState(NamedTuple):
    """State of a factor that follows from past steps, without an extra pass over the tensor.

    Attributes:
      history: float32 [H]. delayed: the last maxima, newest first; 0 if there were fewer. observed:
        the number of steps, and the largest magnitude since the last recalibration. learned: the
        number of steps, and Adam's moments of the gradient of the factor's logarithm.
      scale: float32 [], the factor for the next tensor.
    """

    history: jax.Array
    scale: jax.Array


def init_scale_state(quantizer: Quantizer) -> ScaleState:
    """Returns the state before the first tensor: factor one.

    Raises:
      ValueError: the quantizer takes its factor from the tensor itself.
    """
    if not quantizer.history:
        raise ValueError(
            f"{quantizer} takes its factor from the tensor itself; add .delayed, .observed or "
            ".learned"
        )
    return ScaleState(
        history=jnp.zeros((quantizer.history,), jnp.float32), scale=jnp.ones((), jnp.float32)
    )


def update_scale_state(
    state: ScaleState,
    amax: jax.Array,
    quantizer: Quantizer,
    slope: jax.Array | None = None,
) -> ScaleState:
    """Adds what was measured of a tensor to the history, and finds the factor for the next one.

    A non-finite maximum is ignored, because a skipped step must leave no trace. The factor does not
    change while only zeros have been seen.

    Args:
      state: state used for the tensor.
      amax: float [], its `largest_magnitude`.
      quantizer: says how to find the factor.
      slope: float [], the derivative of the loss by a learned factor.
    """
    amax = amax.astype(jnp.float32)
    if quantizer.way == "learned":
        assert slope is not None
        return _descended(state, amax, slope.astype(jnp.float32), quantizer)
    if quantizer.way == "observed":
        return _observed(state, amax, quantizer)
    pushed = jnp.concatenate([amax[None], state.history[:-1]])
    history = jnp.where(jnp.isfinite(amax), pushed, state.history)
    largest = jnp.max(history)
    scale = scale_from_maximum(largest, quantizer)
    return ScaleState(history, jnp.where(largest > 0, scale, state.scale))


def _observed(state: ScaleState, amax: jax.Array, quantizer: Quantizer) -> ScaleState:
    """Recalibrates after the first step, and then every so many steps."""
    steps, largest = state.history
    largest = jnp.maximum(largest, amax)
    due = (steps == 0) | (steps == quantizer.every)
    found = jnp.where(due & (largest > 0), scale_from_maximum(largest, quantizer), state.scale)
    count = jnp.where(due, np.float32(1.0), steps + np.float32(1.0))
    new = jnp.stack([count, jnp.where(due, np.float32(0.0), largest)]), found
    return ScaleState(*_unless_lost(jnp.isfinite(amax), new, state))


def _descended(
    state: ScaleState, amax: jax.Array, slope: jax.Array, quantizer: Quantizer
) -> ScaleState:
    """A step of Adam on the logarithm of the factor, which begins at that of the first maximum.

    The gradient by the factor is that of LSQ (Esser et al. 2020, equation 3). Its size depends on
    the number of elements; Adam on the logarithm divides it out (Jain et al. 2020, section 4).
    """
    steps, first, second = state.history
    one, tiny = np.float32(1.0), np.float32(1e-30)
    gradient = slope * state.scale
    moments = (
        _FIRST * first + (one - _FIRST) * gradient,
        _SECOND * second + (one - _SECOND) * gradient * gradient,
    )
    mean, square = (
        moment / (one - jnp.power(rate, jnp.maximum(steps, one)))
        for moment, rate in zip(moments, (_FIRST, _SECOND), strict=True)
    )
    step = LEARNING_RATE * mean / (jnp.sqrt(square) + tiny)
    began = steps > 0
    scale = jnp.clip(state.scale * jnp.exp(-step), SMALLEST_FACTOR, LARGEST_FACTOR)
    scale = jnp.where(began, scale, scale_from_maximum(amax, quantizer))
    history = [steps + one, *(jnp.where(began, moment, np.float32(0.0)) for moment in moments)]
    seen = jnp.isfinite(amax) & jnp.isfinite(slope) & (began | (amax > 0))
    return ScaleState(*_unless_lost(seen, (jnp.stack(history), scale), state))


def _unless_lost(seen: jax.Array, new: Any, old: Any) -> Any:
    return (jnp.where(seen, n, o) for n, o in zip(new, old, strict=True))
