"""The head and the loss of what it predicts, in one pass over the rows.

Logits are the largest tensor of a small model's step, and autodiff keeps them for the backward
pass. Here a chunk of rows goes through the head, the loss and back before the next chunk is read,
so that logits never exist whole:

    for each chunk of rows    logits = x w,  losses(logits),  g = d(cotangent * losses) / d(logits)
                              dx = g w,  dw = dw + x^T g

Every operation is that of the plain form, with its formats, probes and roundings, for the chunk is
differentiated by `jax.vjp`. What differs is the order of the sums over rows: of the losses, and of
dw, whose parts are added in f32 before the sum is rounded. The gradients are computed in the
forward pass, multiplied by the cotangent that the loss is going to have; should it have another
one, they are multiplied by the quotient.

Devices that divide the rows work on their own; dw is summed over them once, at the end.

Knows JAX, backends, policies and probes; no parameters and no mesh.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.model.layers import ANYWHERE, Constrain
from lmjax.model.loss import mean_handed_on, token_losses
from lmjax.model.parametrisation import Parametrisation
from lmjax.model.sites import Context, Sites
from lmjax.precision import probes
from lmjax.precision.asides import aside
from lmjax.precision.backend import this_backend
from lmjax.precision.contraction import axes_of
from lmjax.precision.exact import at_least_f32
from lmjax.precision.matmul import RandomKey, einsum, hand_on, second_operand
from lmjax.precision.policy import SUMMED_IN_F32, SitePolicy
from lmjax.precision.probes import Rounded
from lmjax.precision.settings import Operand

CHUNK = 512
"""Most rows of logits at a time. Fewer would sum dw in more passes over memory."""

_CHUNK_OF_GPUS: Final = 4096
"""The same on GPUs, whose memory is slower in proportion to their products."""


def rows_at_once() -> int:
    """Most rows of logits that exist at a time."""
    return _CHUNK_OF_GPUS if this_backend().platform == "gpu" else CHUNK


class Head(NamedTuple):
    """The product that gives logits: `einsum(spec, x, weights)`, `[B, T, D]` to `[B, T, V]`."""

    spec: str
    weights: jax.Array
    unit: bool

    def __call__(self, x: jax.Array, site: SitePolicy, context: Context) -> jax.Array:
        """The logits, in the output format of the site."""
        given: dict[str, Any] = {"key": context.key, "probe": context.probe, "unit": self.unit}
        return hand_on(einsum(self.spec, x, self.weights, site, **given), site, context.probe)


class Backward(NamedTuple):
    """What an objective is told of the backward pass that follows.

    Attributes:
      cotangent: f32[], what the caller is going to multiply the loss by.
      multiplier: the part of it that cancels constants of a parametrisation.
      constrain: where activations live, which says how devices divide rows.
    """

    cotangent: jax.Array
    multiplier: float = 1.0
    constrain: Constrain = ANYWHERE


class WeightGradient(NamedTuple):
    """The slot of a probe in which dw leaves a chunk before it is rounded: f32, or f64."""

    tensor: jax.Array

    @classmethod
    def of(cls, tensor: Rounded) -> WeightGradient:
        """See `probes.Slot`."""
        return cls(tensor.raw)

    def combine(self, other: WeightGradient) -> WeightGradient:
        """The gradient of both chunks."""
        with jax.named_scope("reduction"):
            return WeightGradient(self.tensor + other.tensor)


def mean_loss(
    x: jax.Array,
    head: Head,
    targets: jax.Array,
    sites: Sites,
    context: Context,
    *,
    scales: Parametrisation,
    z_loss: float,
    backward: Backward,
) -> jax.Array:
    """The mean over all rows of cross entropy and z-loss, in the compute format of the site `loss`.

    Args:
      x: what the head reads, `[B, T, D]`.
      head: the head.
      targets: `int32[B, T]`.
      sites: the formats of `head` and `loss`.
      context: randomness and probes.
      scales: the parametrisation of the model.
      z_loss: weight of the z-loss.
      backward: the cotangent that the result is going to have.
    """
    count = targets.size
    own, of_loss = context.at("head"), context.at("loss")
    form = _Form(
        head.spec,
        head.unit,
        sites["head"],
        sites["loss"],
        scales,
        z_loss,
        backward.multiplier / count,
        not _divisible(sites["head"]) or not all(map(_combine, (own.slots, of_loss.slots))),
        backward.constrain,
    )
    weights = second_operand(head.spec, head.weights, sites["head"], own.probe)
    product = {role: slot for role, slot in (own.slots or {}).items() if role != "w"}
    inside = {role: slot for role, slot in (of_loss.slots or {}).items() if role != "y"}
    slots = {"head": product, "loss": inside}
    with jax.named_scope("loss_scale"):
        narrow = sites["loss"].to_compute(backward.cotangent)
        cotangent = narrow.astype(at_least_f32(narrow.dtype)) / count
    given = own.key, own.factors, targets, cotangent
    total = _summed(form, x, weights, slots, given)
    with sites["loss"].scope, aside("mean"):
        mean = total / count
    return mean_handed_on(mean, sites["loss"], of_loss.probe)


def token_nats(
    x: jax.Array,
    head: Head,
    targets: jax.Array,
    sites: Sites,
    context: Context,
    constrain: Constrain = ANYWHERE,
) -> jax.Array:
    """The cross entropy of each row `[B, T]` in nats, without a gradient; see `mean_loss`."""
    whole = not _divisible(sites["head"])

    def of_part(rows: tuple[jax.Array, jax.Array], weights: jax.Array) -> tuple[Any, jax.Array]:
        def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
            logits = head._replace(weights=weights)(chunk[0], sites["head"], context.at("head"))
            return token_losses(logits, chunk[1], sites["loss"]).cross_entropy

        return (), jax.lax.map(of_chunk, _cut(rows, whole)).reshape(rows[1].shape)

    weights = second_operand(head.spec, head.weights, sites["head"])
    return _by_part(of_part, ANYWHERE if whole else constrain, (x, targets), weights)[1]


@dataclass(frozen=True)
class _Form:
    """What of a loss is known before it is traced; see `mean_loss`."""

    spec: str
    unit: bool
    head: SitePolicy
    loss: SitePolicy
    scales: Parametrisation
    z_loss: float
    weight: float
    whole: bool
    constrain: Constrain

    def parts(self, function: Callable[..., tuple[Any, Any]], rows: Any, *whole: Any) -> Any:
        """Applies a function to the rows of each device; see `_by_part`."""
        return _by_part(function, ANYWHERE if self.whole else self.constrain, rows, *whole)

    def summed(self, shares: jax.Array, rows: tuple[int, ...]) -> jax.Array:
        """The gradients dw of all parts of the rows `[B, T, D]`, summed where the weights live."""
        if len(shares) == 1:
            return shares[0]
        _, weights, logits = axes_of(self.spec)
        axis, *_ = _divided(self.constrain, rows)
        named = lambda width: ("vocab" if a == logits[-1] else width for a in weights)
        shares = self.constrain(shares, (axis, *named("width")))
        # As a product, which is partitioned as that of a whole batch would be: each device gets the
        # sum of its own slice.
        with jax.named_scope("reduction"):
            ones = jnp.ones(len(shares), shares.dtype)
            total = jnp.einsum("p,pij->ij", ones, shares, precision=jax.lax.Precision.HIGHEST)
        return self.constrain(total, tuple(named("embed")))

    def of_chunk(
        self,
        x: jax.Array,
        weights: jax.Array,
        slots: Any,
        targets: jax.Array,
        key: RandomKey,
        known: Any,
    ) -> jax.Array:
        """The summed losses of a chunk, in f32 or f64."""
        head = Head(self.spec, weights, self.unit)
        logits = head(x, self.head, Context(key, known, slots["head"]))
        probe = Context(slots=slots["loss"]).probe
        options: dict[str, Any] = {"scales": self.scales, "weight": self.weight}
        losses = token_losses(logits, targets, self.loss, probe, **options)
        each = losses.cross_entropy
        with self.loss.scope:
            if self.z_loss:  # 0 times a square that overflowed would be NaN
                each = each + self.z_loss * losses.z
            return jnp.sum(each.astype(at_least_f32(each.dtype)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(form: _Form, x: jax.Array, weights: jax.Array, slots: Any, given: Any) -> jax.Array:
    key, known, targets, _ = given

    def of_part(rows: tuple[jax.Array, jax.Array], weights: jax.Array) -> tuple[Any, tuple[()]]:
        one = lambda chunk: form.of_chunk(chunk[0], weights, slots, chunk[1], key, known)
        return jnp.sum(jax.lax.map(one, _cut(rows, form.whole))), ()

    totals, _ = form.parts(of_part, (x, targets), weights)
    return jnp.sum(totals)


def _forward(form: _Form, x: jax.Array, weights: jax.Array, slots: Any, given: Any) -> Any:
    """The loss, and its gradients for the cotangent that it is going to have."""
    key, known, targets, cotangent = given
    kept = WeightGradient(jnp.zeros(weights.shape, at_least_f32(weights.dtype)))
    inside = slots | {"head": slots["head"] | {"dw": {"sum": kept}}}
    of_part = functools.partial(_differentiated, form)
    (totals, measured), dx = form.parts(
        of_part, (x, targets), weights, inside, key, known, cotangent
    )
    shares = measured["head"].pop("dw")["sum"].tensor
    wide = form.summed(shares, x.shape)
    parts = [jax.tree.map(lambda m, i=i: m[i], measured) for i in range(len(totals))]
    measured = functools.reduce(probes.combine, parts)
    with form.head.scope:
        dw = form.head.to_cotangent(wide)
    if "dw" in slots["head"]:
        tensor = Rounded(wide, wide, dw, form.head.compute)
        measured["head"]["dw"] = probes.measure(slots["head"]["dw"], tensor)
    return jnp.sum(totals), (dx, wide, measured, known, cotangent)


def _differentiated(
    form: _Form, rows: Any, weights: jax.Array, slots: Any, key: RandomKey, known: Any, g: jax.Array
) -> tuple[Any, jax.Array]:
    """The sum of the losses of one part and what was measured in it; and dx."""
    chunks = _cut(rows, form.whole)
    count = chunks[1].shape[0]

    def of_chunk(x: jax.Array, targets: jax.Array) -> tuple[Any, jax.Array]:
        run = lambda x, slots: form.of_chunk(x, weights, slots, targets, key, known)
        loss, pull = jax.vjp(run, x, slots)
        dx, measured = pull(g)
        return (loss, measured), dx

    def add(total: Any, chunk: Any) -> tuple[Any, jax.Array]:
        (loss, measured), dx = of_chunk(*chunk)
        return (total[0] + loss, probes.combine(total[1], measured)), dx

    if count == 1:
        total, dx = of_chunk(*jax.tree.map(lambda rows: rows[0], chunks))
    else:
        total, dx = jax.lax.scan(add, (jnp.zeros_like(g), slots), chunks)
    if form.unit and count > 1:  # each product divided by the root of the terms of its chunk
        kept = total[1]["head"]["dw"]["sum"]
        total[1]["head"]["dw"]["sum"] = kept._replace(tensor=kept.tensor * count**-0.5)
    return total, dx.reshape(rows[0].shape)


def _backward(form: _Form, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    dx, wide, measured, known, cotangent = saved
    with jax.named_scope("loss_scale"):
        ratio = g / cotangent  # 1
        times = lambda y: y.astype(ratio.dtype) * ratio
        dx, wide = times(dx).astype(dx.dtype), times(wide)
    with form.head.scope:
        dw = form.head.to_cotangent(wide)
    zeros = jax.tree.map(jnp.zeros_like, known)
    return dx, dw, measured, (None, zeros, None, None)


_summed.defvjp(_forward, _backward)


def _divided(constrain: Constrain, shape: tuple[int, ...]) -> tuple[str, int, int]:
    """How devices divide rows `[B, T, ...]`: the axis of the parts, and their numbers."""
    batch, length = constrain.parts("batch", shape[0]), constrain.parts("length", shape[1])
    return ("batch" if length == 1 else "length" if batch == 1 else "parts"), batch, length


def _by_part(
    function: Callable[..., tuple[Any, Any]], constrain: Constrain, rows: Any, *whole: Any
) -> tuple[Any, Any]:
    """Applies a function to the rows of each device by itself, those of its positions included.

    Args:
      function: `(rows, *whole) -> (tree, rows)`, of one part.
      constrain: how devices divide the rows.
      rows: a tree of arrays `[B, T, ...]`.
      whole: what every part reads.

    Returns:
      The trees of the parts, stacked along a new leading axis, and the rows of all parts.
    """
    axis, b, t = _divided(constrain, jax.tree.leaves(rows)[0].shape)
    if b * t == 1:
        tree, rows = function(rows, *whole)
        return jax.tree.map(lambda leaf: leaf[None], tree), rows

    def apart(x: jax.Array) -> jax.Array:
        batch, length, *rest = x.shape
        cut = x.reshape(b, batch // b, t, length // t, *rest).swapaxes(1, 2)
        cut = cut.reshape(b * t, batch // b, length // t, *rest)
        return constrain(cut, (axis, *("part" for _ in cut.shape[1:])))

    def together(x: jax.Array) -> jax.Array:
        _, batch, length, *rest = x.shape
        cut = x.reshape(b, t, batch, length, *rest).swapaxes(1, 2)
        return cut.reshape(b * batch, t * length, *rest)

    each = jax.vmap(function, (0, *[None] * len(whole)))
    tree, found = each(jax.tree.map(apart, rows), *whole)
    return tree, jax.tree.map(together, found)


def _divisible(site: SitePolicy) -> bool:
    """Whether no rounding of the head depends on how its rows are divided."""
    backward = site.backward_activations, site.backward_second
    operands = site.activations, site.second, site.grads, *backward
    return site.accum == SUMMED_IN_F32 and all(map(_by_element, operands))


def _by_element(operand: Operand | None) -> bool:
    if operand is None:
        return True
    nearest = operand.rounding == "nearest_even" and not operand.rotation
    return nearest and operand.quantizer.groups == "none"


def _combine(slots: Any) -> bool:
    """Whether measurements of chunks can be put together: not those that copy a whole tensor."""
    roles = (slots or {}).values()
    return all(hasattr(slot, "combine") for users in roles for slot in users.values())


def _cut(rows: Any, whole: bool) -> Any:
    """Rows `[B, T, ...]` in chunks `[N, 1, R, ...]`, near `rows_at_once`, or `[1, B, T, ...]`."""
    leaf = jax.tree.leaves(rows)[0]
    size = leaf.shape[0] * leaf.shape[1]
    enough = -(-size // rows_at_once())
    count = next((n for n in range(enough, 2 * enough + 1) if size % n == 0), 1)
    if whole or count == 1:
        return jax.tree.map(lambda r: r[None], rows)
    return jax.tree.map(lambda r: r.reshape(count, 1, size // count, *r.shape[2:]), rows)
