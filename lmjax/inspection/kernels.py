"""Kernels that compilers call by name, and what their makers document of them.

The text of a program shows what goes into such a kernel and what comes out, not what happens
inside. Where this table says enough to compare a kernel with a policy, its products are compared;
everything else about it is opaque.

Knows nothing but Python.
"""

from __future__ import annotations

from typing import Final

from lmjax.hlo.module import word_set

PRODUCT_TARGETS: Final = word_set(
    """
    __cublas$gemm __cublas$lt$matmul __cublas$lt$matmul$f8 __onednn$matmul
    __cublas$lt$groupedMatmul __cudnn$convForward __triton_gemm
    """
)
"""Matrix products: operands and result are arrays of the program."""

YNN: Final = "__ynn_fusion"
"""Fusions that XLA's CPU backend has YNNPACK compute."""

_DOCUMENTED: Final = (
    (
        "__cublas$lt$matmul$f8",
        "cuBLASLt, fp8: elements are multiplied and summed in f32, with fast "
        "accumulation unless the product asks for HIGHEST (NVIDIA cuBLAS documentation, "
        "CUBLASLT_MATMUL_DESC_FAST_ACCUM)",
    ),
    (
        "__cublas$lt$matmul",
        "cuBLASLt: compute type as asked; f32 operands use TF32 unless HIGHEST "
        "(NVIDIA cuBLAS documentation, cublasComputeType_t)",
    ),
    (
        "__cublas$gemm",
        "cuBLAS: compute type as asked; f32 operands use TF32 unless HIGHEST (NVIDIA "
        "cuBLAS documentation, cublasComputeType_t)",
    ),
    ("__onednn$", "oneDNN: operands as given, sums in f32 (oneDNN documentation, Matmul)"),
    (
        "__cudnn$fmha",
        "cuDNN flash attention: products of the operands' dtype summed in f32, softmax "
        "in f32, weights rounded to the operands' dtype (cuDNN frontend documentation, SDPA)",
    ),
    ("__cudnn$", "cuDNN (NVIDIA cuDNN documentation)"),
    (
        YNN,
        "YNNPACK: leaves out a rounding before a sum or a maximum of the same fusion (measured "
        "with jax 0.10.2, whatever xla_allow_excess_precision says)",
    ),
    ("tpu_custom_call", "Mosaic kernel of JAX: its text is in the traced program"),
    ("__gpu$xla.gpu.triton", "Triton kernel of JAX (Pallas): its text is in the traced program"),
    ("mosaic_gpu", "Mosaic kernel of JAX: its text is in the traced program"),
)


def documented(name: str) -> str:
    """What is documented of a kernel, by the name of its target; empty if nothing is known."""
    return next((text for start, text in _DOCUMENTED if name.startswith(start)), "")
