"""What JAX's primitives do with numbers, by their names.

One that is not listed counts as arithmetic, so that nothing new goes unseen.

Knows nothing but names.
"""

from __future__ import annotations

from typing import Final

from lmjax.hlo.module import word_set
from lmjax.inspection.facts import OperationKind

PRODUCTS: Final = word_set(
    """
    dot_general conv_general_dilated ragged_dot ragged_dot_general scaled_matmul
    scaled_matmul_wrapper
    """
)
SUMS: Final = word_set(
    """
    reduce_sum cumsum scatter-add scatter_add reduce reduce_window_sum psum reduce_scatter
    psum_invariant reduce_prod cumlogsumexp
    """
)
EXPONENTIALS: Final = word_set(
    """
    exp exp2 expm1 log log1p logistic tanh erf erfc erf_inv pow sin cos tan sqrt rsqrt cbrt
    """
)
KERNELS: Final = word_set("pallas_call ffi_call custom_call tpu_custom_call")
FUSED: Final = "dot_product_attention"
MOVES: Final = word_set(
    """
    name     reshape transpose broadcast_in_dim squeeze expand_dims slice rev copy copy_p
    optimization_barrier sharding_constraint reshard stop_gradient neg dynamic_slice gather abs
    reduce_max reduce_min all_gather ppermute all_to_all pvary pcast split mesh_cast cummax sort
    argsort real
    """
)
"""Operations whose result has the numbers of their first operand, up to sign."""
JOINS: Final = word_set(
    """
    select_n concatenate dynamic_update_slice pad max min clamp stack scatter
    select_and_gather_add while scan cond
    """
)
"""Operations whose result has the numbers of several operands."""
OTHER_EXACT: Final = word_set(
    """
    iota sign floor ceil round random_bits rng_bit_generator bitcast_convert_type random_wrap
    random_unwrap random_seed random_fold_in zeros_like empty create_token broadcast full
    is_finite argmax argmin top_k axis_index debug_callback
    """
)
LEAVES: Final = SUMS | KERNELS | {"sort", "argsort", "scatter", "reduce_window", "custom_lin"}
CALLS: Final = word_set(
    """
    jit pjit closed_call core_call custom_jvp_call custom_vjp_call checkpoint remat2
    """
)


LOOPS: Final = word_set("scan while cond")


def kind_of(name: str) -> OperationKind | None:
    """What a primitive is, by its name; None if it rounds nothing."""
    if name in KERNELS or FUSED in name:
        return OperationKind.KERNEL
    if name in PRODUCTS:
        return OperationKind.PRODUCT
    if name in SUMS:
        return OperationKind.SUM
    if name in EXPONENTIALS:
        return OperationKind.EXPONENTIAL
    if name in ("convert_element_type", "reduce_precision"):
        return OperationKind.CAST
    exact = name in MOVES or name in JOINS or name in OTHER_EXACT or name.startswith("random_")
    return None if exact else OperationKind.ARITHMETIC
