"""A handwritten GPT-2 training step in jnp and optax: the peer of lmjax's own step.

The arithmetic is that of the presets f32, mixed_bf16 and mixed_f16: parameters in f32, matrix
products and the residual stream in the compute format, LayerNorm, softmax, GELU and the loss in f32
and rounded once at the end, the optimizer in f32 after clipping by global norm; for f16 a dynamic
loss scale that skips steps with non-finite gradients. The code uses plain `x @ w`: it chooses no
layouts, writes no backward pass and does not depend on the machine.

Knows only JAX and optax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Params = Any
Batch = dict[str, jax.Array]


class Adam(NamedTuple):
    """The optimizer, with a constant learning rate."""

    learning_rate: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float


class LossScale(NamedTuple):
    """A dynamic loss scale; `scale` stays 1 where the format needs none."""

    scale: jax.Array
    good_steps: jax.Array


def make_step(
    dtype: Any, heads: int, adam: Adam, growth_interval: int = 2000
) -> tuple[Callable[[Params], Any], Callable[[Any, Batch], tuple[Any, jax.Array]]]:
    """`init(params) -> state` and the jitted `step(state, batch) -> state, loss`.

    Args:
      dtype: the compute format. Parameters are f32: `embed [V, D]`, `positions [T, D]`, `blocks`,
        a list of dicts (see `block`), and `norm`, a pair of scale and bias.
      heads: attention heads.
      adam: AdamW; biases and LayerNorm parameters are not decayed.
      growth_interval: finite steps after which the loss scale of f16 doubles.
    """
    decayed = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(adam.clip_norm),
        optax.adamw(
            adam.learning_rate,
            adam.b1,
            adam.b2,
            adam.eps,
            weight_decay=adam.weight_decay,
            mask=decayed,
        ),
    )
    scaled = dtype == jnp.float16

    def init(params: Params) -> Any:
        initial = LossScale(jnp.float32(2.0**15 if scaled else 1.0), jnp.int32(0))
        return params, optimizer.init(params), initial

    def step(state: Any, batch: Batch) -> tuple[Any, jax.Array]:
        params, opt_state, loss_scale = state

        def scaled_loss(params: Params) -> tuple[jax.Array, jax.Array]:
            loss = mean_loss(params, batch, dtype, heads)
            return loss * loss_scale.scale, loss

        gradients, loss = jax.grad(scaled_loss, has_aux=True)(params)
        if scaled:
            gradients = jax.tree.map(lambda g: g / loss_scale.scale, gradients)
        updates, new_opt_state = optimizer.update(gradients, opt_state, params)
        new = (optax.apply_updates(params, updates), new_opt_state)
        if scaled:
            finite = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(gradients)]).all()
            new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (params, opt_state))
            loss_scale = adjusted(loss_scale, finite, growth_interval)
        return (*new, loss_scale), loss

    return init, jax.jit(step, donate_argnums=0)


def adjusted(old: LossScale, finite: jax.Array, growth_interval: int) -> LossScale:
    """Halved after a step that is not finite, doubled after `growth_interval` that are."""
    good_steps = jnp.where(finite, old.good_steps + 1, 0)
    grow = good_steps >= growth_interval
    scale = jnp.where(finite, jnp.where(grow, old.scale * 2, old.scale), old.scale / 2)
    return LossScale(scale, jnp.where(grow, 0, good_steps))


def mean_loss(params: Params, batch: Batch, dtype: Any, heads: int) -> jax.Array:
    """Mean cross entropy in nats per token, f32[]."""
    tokens, targets = batch["inputs"], batch["targets"]
    x = params["embed"][tokens].astype(dtype)
    x = x + params["positions"][: tokens.shape[1]].astype(dtype)
    for layer in params["blocks"]:
        x = block(x, layer, heads)
    logits = layer_norm(x, *params["norm"]) @ params["embed"].astype(dtype).T
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), targets
    ).mean()


def block(x: jax.Array, layer: Params, heads: int) -> jax.Array:
    """`[B, T, D]` to `[B, T, D]`: attention and MLP, each behind its LayerNorm.

    `layer` holds pairs: `norm1`, `norm2` of scale and bias; `query`, `key`, `value`, `out`, `up`,
    `down` of kernel and bias.
    """
    batch, length, width = x.shape
    y = layer_norm(x, *layer["norm1"])
    q, k, v = (
        dense(y, *layer[name]).reshape(batch, length, heads, width // heads)
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32)
    scores = scores / math.sqrt(width // heads)
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)).astype(x.dtype)
    y = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, width)
    x = x + dense(y, *layer["out"])
    hidden = dense(layer_norm(x, *layer["norm2"]), *layer["up"]).astype(jnp.float32)
    return x + dense(jax.nn.gelu(hidden).astype(x.dtype), *layer["down"])


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """A linear layer in the format of x."""
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """LayerNorm in f32, rounded once to the format of x."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(x.dtype)
