"""The reader of kernels: whose they are, how often they run, and what they multiply.

The instructions are those of programs that libtpu and XLA's GPU compiler produced, shortened.
"""

from __future__ import annotations

import pytest

from lmjax.hlo.kernels import Kernel, kernels, products
from lmjax.hlo.module import parse

GPU = """\
HloModule jit_step, is_scheduled=true

%gemm_computation (p0: f8e5m2[2,8,32], p1: f8e4m3fn[32,16]) -> f32[2,8,16] {
  %p0 = f8e5m2[2,8,32]{2,1,0} parameter(0)
  %p1 = f8e4m3fn[32,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[2,8,16]{2,1,0} dot(%p0, %p1), lhs_contracting_dims={2}, rhs_contracting_dims={0}, operand_precision={highest,highest}
}

%body (p.1: (s32[], f8e5m2[2,8,32])) -> (s32[], f8e5m2[2,8,32]) {
  %p.1 = (s32[], f8e5m2[2,8,32]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %g.1 = f8e5m2[2,8,32]{2,1,0} get-tuple-element(%p.1), index=1
  %w.1 = f8e4m3fn[32,16]{1,0} constant({...})
  %gemm_fusion_dot.3 = f32[2,8,16]{2,1,0} fusion(%g.1, %w.1), kind=kCustom, calls=%gemm_computation, metadata={op_name="jit(step)/blocks/0-3/mlp/up/dot_general"}, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion","block_level_fusion_config":{"num_warps":"2"}}}
  %x.1 = f8e4m3fn[1,256,64]{2,1,0} constant({...})
  %y.1 = f8e4m3fn[1,128,64]{2,1,0} constant({...})
  %f.1 = f8e8m0fnu[256,4]{1,0} constant({...})
  %custom-call.1 = (f32[1,256,128]{2,1,0}, u8[0]{0}) custom-call(%x.1, %y.1, %f.1, %f.1), custom_call_target="__cudnn$blockScaledDot", metadata={op_name="jit(step)/value/jit(_scaled_matmul)/custom_partitioning"}
  ROOT %t.1 = (s32[], f8e5m2[2,8,32]{2,1,0}, f32[2,8,16]{2,1,0}, (f32[1,256,128]{2,1,0}, u8[0]{0})) tuple(%i.1, %g.1, %gemm_fusion_dot.3, %custom-call.1)
}

ENTRY %main (a: (s32[], f8e5m2[2,8,32]), q: bf16[4,512,4,128]) -> (f32[4,256,1024], bf16[4,4,512,128]) {
  %a = (s32[], f8e5m2[2,8,32]{2,1,0}) parameter(0)
  %q = bf16[4,512,4,128]{3,2,1,0} parameter(1)
  %w = (s32[], f8e5m2[2,8,32]{2,1,0}) while(%a), condition=%body, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %l = f32[4,256,512]{2,1,0} constant({...})
  %r = f32[4,1024,512]{2,1,0} constant({...})
  %custom-call.2 = (f32[4,256,1024]{2,1,0}, s8[4194304]{0}) custom-call(%l, %r), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(f)/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"]}}}
  %fwd.5 = (bf16[4,4,512,128]{3,1,2,0}, f32[4,4,512]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(f)/jvp()/dot_product_attention_fwd"}
  ROOT %t = ((s32[], f8e5m2[2,8,32]{2,1,0}), (f32[4,256,1024]{2,1,0}, s8[4194304]{0}), (bf16[4,4,512,128]{3,1,2,0}, f32[4,4,512]{2,1,0}, u8[0]{0})) tuple(%w, %custom-call.2, %fwd.5)
}
"""  # noqa: E501

TPU = """\
HloModule jit_step, is_scheduled=true

ENTRY %main (q: bf16[4,512,128], k: bf16[16,4,2,32]) -> f32[4,512,128] {
  %q = bf16[4,512,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[16,4,2,32]{3,2,1,0} parameter(1)
  %v = bf16[16,4,2,32]{3,2,1,0} parameter(2)
  %slice-start = ((f32[4,512,128]{2,1,0:T(8,128)}), f32[1,512,128]{2,1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%q), slice={[0:1], [0:512], [0:128]}
  %splash_mha_fwd.1 = (f32[128,128]{1,0:T(8,128)}, f32[4,512,128]{2,1,0:T(8,128)S(1)}) custom-call(%q, %q, /*index=2*/%q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(f)/splash_mha_fwd/pallas_call"}
  %get-tuple-element.8 = f32[4,512,128]{2,1,0:T(8,128)S(1)} get-tuple-element(%splash_mha_fwd.1), index=1, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}
  %convolution.7 = f32[16,16,4,2]{3,2,1,0} convolution(%k, %v), window={size=4x2 stride=3x1 lhs_dilate=4x2}, dim_labels=b01f_o01i->bf01, operand_precision={highest,highest}, metadata={op_name="jit(f)/scores"}
  ROOT %t = (f32[4,512,128]{2,1,0}, ((f32[4,512,128]{2,1,0}), f32[1,512,128]{2,1,0}, s32[]), f32[16,16,4,2]{3,2,1,0}) tuple(%get-tuple-element.8, %slice-start, %convolution.7)
}
"""  # noqa: E501


def test_kernels_of_a_gpu_program_have_a_library_and_a_count():
    assert kernels(GPU) == [
        Kernel("Triton", "nested_gemm_fusion", 3, attention=False),
        Kernel("cuBLASLt", "matmul", 1, attention=False),
        Kernel("cuDNN", "blockScaledDot", 3, attention=False),
        Kernel("cuDNN", "fmhaSoftmax", 1, attention=True),
    ]


def test_a_kernel_in_pallas_is_called_by_its_name():
    assert kernels(TPU) == [Kernel("Mosaic", "splash_mha_fwd", 1, attention=True)]
    # Its metadata takes several lines.
    (call,) = (one for one in parse(TPU).computations["main"].values() if one.op == "custom-call")
    assert call.source == "jit(f)/splash_mha_fwd/pallas_call"


def test_products_have_the_dtypes_of_their_operands_wherever_they_are_multiplied():
    found = {product.library: product for product in products(GPU)}
    assert set(found) == {"Triton", "cuDNN", "cuBLASLt"}
    triton, scaled, plain = found["Triton"], found["cuDNN"], found["cuBLASLt"]
    assert (triton.operands, triton.summed) == (("f8e5m2", "f8e4m3fn"), "f32")
    assert (triton.precision, triton.count) == ("highest", 3)
    assert triton.flops == 3 * 2 * (2 * 8 * 16) * 32
    assert scaled.operands == ("f8e4m3fn", "f8e4m3fn")
    assert scaled.flops == 3 * 2 * (256 * 128) * 64
    assert (plain.operands, plain.precision) == (("f32", "f32"), "")
    assert plain.flops == 2 * (4 * 256 * 1024) * 512


def test_a_batched_product_of_a_tpu_is_counted_without_the_holes_of_its_convolution():
    """Keys of 4 x 2 heads: each meets its own alone, though the window covers all of them."""
    (product,) = products(TPU)
    assert product.precision == "highest"
    assert product.flops == 2 * (16 * 16 * 4 * 2) * 32


def test_another_custom_call_is_said_to_be_one():
    call = 'custom-call(%q), custom_call_target="ConcatBitcast"'
    text = TPU.replace("slice-start(%q), slice={[0:1], [0:512], [0:128]}", call)
    assert Kernel("XLA", "ConcatBitcast", 1, attention=False) in kernels(text)


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        kernels("")
