"""Fused attention kernels of accelerators: cuDNN's on Nvidia GPUs, splash attention on TPUs.

Each device runs the kernel on its own rows, heads and queries. What a kernel computes is what
`blockwise.py` does, but for the rounded result that its backward pass reads. Splash attention takes
no constant for the scores: queries are multiplied by it, which rounds them once more where it is no
power of two (the root of the width of a head).

Shapes are those of `tiling.py`. Knows JAX, masks and policies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.model.attention_form import LANES
from lmjax.model.blockwise import SAVED
from lmjax.model.layers import Constrain
from lmjax.model.mask import Bidirectional, Causal, CausalWithinDocuments, Mask
from lmjax.model.sheet import Rules

_QUERIES: Final = ("batch", "length", "heads", "group", "width")
_KEYS: Final = ("batch", "keys", "heads", "width")

_BLOCK: Final = 512


def cudnn(
    rules: Rules, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, constrain: Constrain
) -> jax.Array:
    """What queries `[B, T, K, G, H]` read, by cuDNN; all else as in `blockwise.attend`."""

    def read(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """The kernel on `[B, T, N, H]`, heads of one group side by side."""
        # The library promotes types by the rules of numpy.
        with jax.numpy_dtype_promotion("standard"):
            y = jax.nn.dot_product_attention(
                q.reshape(*q.shape[:2], -1, q.shape[-1]),
                k,
                v,
                scale=rules.score_factor,
                is_causal=isinstance(mask, Causal),
                implementation="cudnn",
            )
        return y.reshape(q.shape)

    of_queries, of_keys = constrain.spec(_QUERIES, q.shape), constrain.spec(_KEYS, k.shape)
    read = _on_each_device(read, constrain, (of_queries, of_keys, of_keys), of_queries)
    with rules.combine.scope:
        return checkpoint_name(read(q, k, v), SAVED)


def splash(
    rules: Rules, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, constrain: Constrain
) -> jax.Array:
    """The same by splash attention."""
    of_queries, of_keys = constrain.spec(_QUERIES, q.shape), constrain.spec(_KEYS, k.shape)
    kernel, of_kernel = _splash_kernel(q, k, mask, constrain)
    segments, of_segments = None, None
    if isinstance(mask, CausalWithinDocuments):  # the tokens of a document share its start
        starts = mask.starts, constrain.spec(("batch", "length"), mask.starts.shape)
        whole = mask.starts, constrain.spec(("batch", "keys"), mask.starts.shape)
        segments, of_segments = zip(starts, whole, strict=True)

    def read(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, segments: Any) -> jax.Array:
        heads_first = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1]).swapaxes(1, 2)
        with jax.numpy_dtype_promotion("standard"):
            y = jax.vmap(kernel)(*map(heads_first, (q, k, v)), _segment_ids(segments))
        return y.swapaxes(1, 2).reshape(q.shape)

    specs = (of_kernel, of_queries, of_keys, of_keys, of_segments)
    read = _on_each_device(read, constrain, specs, of_queries)
    with rules.scores.scope:
        q = rules.scores.to_compute(q * rules.score_factor)
    with rules.combine.scope:
        return read(kernel, q, k, v, segments)


def _splash_kernel(q: jax.Array, k: jax.Array, mask: Mask, constrain: Constrain) -> tuple[Any, Any]:
    """The kernel of the heads of one device, and how devices that divide the queries share it."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape, parts = (q.shape[1], k.shape[1]), constrain.parts("length", q.shape[1])
    heads = q.shape[2] // constrain.parts("heads", q.shape[2]) * q.shape[3]
    visible = masks.FullMask if isinstance(mask, Bidirectional) else masks.CausalMask
    rows, columns = _block(shape[0] // parts), _block(shape[1])
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([visible(shape) for _ in range(heads)]),
        block_sizes=kernels.BlockSizes(
            block_q=rows,
            block_q_dkv=rows,
            block_q_dq=rows,
            block_kv=columns,
            block_kv_dkv=columns,
            block_kv_dq=columns,
        ),
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=SAVED,
    )
    if constrain.mesh is None:
        return kernel, None
    spec = PartitionSpec(None, constrain.spec(("length",), shape[:1])[0])
    return kernel, kernel.manual_sharding_spec(NamedSharding(constrain.mesh, spec))


def _segment_ids(segments: tuple[jax.Array, jax.Array] | None) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    return None if segments is None else kernels.SegmentIds(*segments)


def _block(length: int) -> int:
    """The largest block that divides a length, a multiple of `LANES`."""
    return next(size for size in range(_BLOCK, 0, -LANES) if length % size == 0)


def _on_each_device(
    function: Callable[..., Any], constrain: Constrain, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    if constrain.mesh is None:
        return function
    return jax.shard_map(
        function,
        mesh=constrain.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )
