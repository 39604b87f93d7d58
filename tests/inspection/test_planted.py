"""Violations of a policy, planted one by one: each is found and named, and nothing else is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.audit.programs import trace
from lmjax.hlo.scopes import Scope
from lmjax.inspection.compiled import CompiledProgram
from lmjax.inspection.inspection import Inspection, inspect
from lmjax.inspection.judge_compiled import CompiledFor, CompiledJudge
from lmjax.inspection.judge_traced import TracedJudge
from lmjax.inspection.rows import AuditVerdict
from lmjax.inspection.traced import TracedProgram
from lmjax.model import block, blockwise, layers, layout, loss, normalisation, objectives
from lmjax.optim import loss_scale, muon, optimizer, storage
from lmjax.parallel import sharding
from lmjax.precision import exact, matmul, summation
from lmjax.precision.quantizer import parse_quantizer
from lmjax.precision.scaling import fake_quantize
from lmjax.runs.resolved import phase_of
from lmjax.train import Config
from lmjax.train.step import PARTS

Patch = Callable[[pytest.MonkeyPatch], None]
BF16 = jnp.bfloat16
KEPT = {"xla_allow_excess_precision": False}


def found(config: Config, asked: str, program: str) -> set[tuple[str, str]]:
    """The kinds and sites of what fails when a program of `config` is held against a policy."""
    built = phase_of(config)
    mesh = sharding.make_mesh(built.config.mesh, jax.devices()[:1])
    made = trace(program, built, mesh).traced
    inspection = inspected(made.jaxpr, config, asked, program)
    return {(finding.kind, row.site) for row, finding in inspection.findings}


def inspected(jaxpr: Any, config: Config, asked: str, program: str = "train") -> Inspection:
    phase = phase_of(dataclasses.replace(config, precision=asked))
    options = exact.COMPILER_OPTIONS
    return inspect(program, jaxpr, [], phase.layout, phase.sites, PARTS, options)


# --- what is planted


def rough_softmax(patch: pytest.MonkeyPatch) -> None:
    _exp = jnp.exp
    patch.setattr(blockwise.jnp, "exp", lambda x: _exp(x.astype(BF16)).astype(x.dtype))


def operands_not_cast(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(matmul, "_watched", lambda role, x, *_: x.astype(jnp.float32))


def weights_not_rounded(patch: pytest.MonkeyPatch) -> None:
    ready = matmul.ready_operand
    skip = lambda role, x, operand, *more, **how: ready(
        role, x, None if role == "w" else operand, *more, **how
    )
    patch.setattr(matmul, "ready_operand", skip)


def weak_constant(patch: pytest.MonkeyPatch) -> None:
    def gelu(x: jax.Array) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):
            half = jnp.where(x[0, 0, 0] > 0, 0.5, 0.25)  # an array that nothing gave a dtype
            return half * x

    patch.setitem(block.ACTIVATIONS, "gelu", gelu)


def embedding_not_cast(patch: pytest.MonkeyPatch) -> None:
    def rows(self: Any, indices: jax.Array, site: Any, context: Any) -> jax.Array:
        with site.scope:
            return self.table[...][indices]

    patch.setattr(layers.Embedding, "__call__", rows)


def moments_in_bf16(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "_encode", lambda moment, quantizer: moment.astype(BF16))
    patch.setattr(storage, "decode", lambda stored, quantizer: stored.astype(jnp.float32))


def default_precision(patch: pytest.MonkeyPatch) -> None:
    plain = lambda spec, x, w, site: jnp.einsum(spec, x, w, preferred_element_type=jnp.float32)
    patch.setattr(summation, "_contract", plain)


def narrow_accumulation(patch: pytest.MonkeyPatch) -> None:
    def contract(spec: str, x: jax.Array, w: jax.Array, site: Any) -> jax.Array:
        return jnp.einsum(spec, x, w, preferred_element_type=BF16).astype(jnp.float32)

    patch.setattr(summation, "_contract", contract)


def accumulator_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(summation, "rounded_sum", lambda total, site: total)


def product_in_a_norm(patch: pytest.MonkeyPatch) -> None:
    def mean(x: jax.Array) -> jax.Array:
        return jnp.einsum("...d,...d->...", x, jnp.ones_like(x))[..., None] / x.shape[-1]

    patch.setattr(normalisation, "_mean", mean)


def product_outside(patch: pytest.MonkeyPatch) -> None:
    token_nats = objectives.token_nats

    def nats(x: jax.Array, *more: Any) -> Any:
        return token_nats(x @ jnp.eye(x.shape[-1], dtype=x.dtype), *more)

    patch.setattr(objectives, "token_nats", nats)


def library_products(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(muon, "_product", jnp.matmul)
    patch.setattr(optimizer, "_in_f32", lambda inner: inner)


def unscaled_in_f16(patch: pytest.MonkeyPatch) -> None:
    def unscale(gradients: Any, scale: jax.Array, stack: Any) -> Any:
        with jax.named_scope("loss_scale"):
            half = lambda g: (g.astype(jnp.float16) / scale.astype(jnp.float16)).astype(g.dtype)
            return jax.tree.map(half, gradients)

    patch.setattr(loss_scale, "unscale", unscale)


def rounded_cotangent(patch: pytest.MonkeyPatch) -> None:
    @jax.custom_vjp
    def through(x: jax.Array) -> jax.Array:
        return x

    through.defvjp(lambda x: (x, None), lambda _, g: (g.astype(jnp.float8_e5m2).astype(g.dtype),))
    patch.setattr(block, "give", lambda y, site, probe: through(site.to_output(y)))


def wide_activation(patch: pytest.MonkeyPatch) -> None:
    wide = lambda x: jax.nn.gelu(x.astype(jnp.float32)).astype(x.dtype)
    patch.setitem(block.ACTIVATIONS, "gelu", wide)


def narrow_logarithms(patch: pytest.MonkeyPatch) -> None:
    _logsumexp = jax.nn.logsumexp
    narrow = lambda x, axis: _logsumexp(x.astype(BF16), axis=axis).astype(x.dtype)
    patch.setattr(loss.jax.nn, "logsumexp", narrow)


def update_in_bf16(patch: pytest.MonkeyPatch) -> None:
    apply = storage.apply_updates

    def applied(params: Any, updates: Any, *more: Any) -> Any:
        halve = lambda u: (u.astype(BF16) * BF16(0.5)).astype(u.dtype)
        return apply(params, jax.tree.map(halve, updates), *more)

    import lmjax.train.step as step

    patch.setattr(step, "apply_updates", applied)


class Plant(NamedTuple):
    """What is planted in a program, and what an audit must say of it.

    Attributes:
      kind: of the finding.
      site: one where it is found.
      asked: the policy that it is held against.
      built: the policy that the program is built under, if another one.
      patch: what is broken.
      program, family, optimizer: of what.
    """

    kind: str
    site: str
    asked: str
    built: str = ""
    patch: Patch | None = None
    program: str = "evaluate"
    family: str = "gpt2"
    optimizer: str = "adamw"


MIXED = "p=f32,c=bf16,o=f32"
FP8 = "p=f32,c=bf16,w=e4m3@tensor,x=e4m3@tensor,g=e5m2@tensor"
UP, DOWN = "blocks/0-1/mlp/up", "blocks/0-1/mlp/down"
SOFTMAX, NORM = "blocks/0-1/attention/softmax", "blocks/0-1/mlp/norm"

PLANTS = {
    "softmax in bf16 under an f32 rule": Plant("narrowed", SOFTMAX, MIXED, patch=rough_softmax),
    "softmax built narrow": Plant("narrowed", SOFTMAX, MIXED, f"{MIXED}; **/softmax: c=bf16"),
    "f32 product under bf16": Plant("silent upcast", UP, MIXED, patch=operands_not_cast),
    "bf16 product under f32": Plant("narrowed", UP, "f32", "f32; **/up: c=bf16"),
    "weights that fp8 forgot": Plant("missing rounding", UP, FP8, patch=weights_not_rounded),
    "another fp8 format": Plant("wrong rounding", UP, FP8, FP8.replace("w=e4m3", "w=e3m4")),
    "another granularity": Plant(
        "wrong rounding", UP, FP8, FP8.replace("w=e4m3@tensor", "w=e4m3@channel")
    ),
    "a rounding that no rule asks for": Plant(
        "unasked rounding", "head", MIXED, f"{MIXED}; head: x=e4m3@tensor"
    ),
    "weak-typed constant": Plant(
        "weak-type promotion",
        "blocks/0-1/mlp/activation",
        f"{MIXED}; **/activation: c=bf16",
        patch=weak_constant,
    ),
    "forgotten embedding cast": Plant(
        "silent upcast", "embed", MIXED, patch=embedding_not_cast, family="llama"
    ),
    "residual stream in f32": Plant(
        "silent upcast", "blocks/0-1/residual", MIXED, f"{MIXED}; **/residual: c=f32"
    ),
    "activation computed wide": Plant(
        "silent upcast",
        "blocks/0-1/mlp/activation",
        f"{MIXED}; **/activation: c=bf16",
        patch=wide_activation,
    ),
    "angles in bf16": Plant(
        "narrowed", "blocks/0-1/attention/rope", MIXED, f"{MIXED}; **/rope: c=bf16", family="llama"
    ),
    "statistics of a norm in bf16": Plant("narrowed", NORM, MIXED, f"{MIXED}; **/norm: c=bf16"),
    "logarithms of the loss in bf16": Plant("narrowed", "loss", MIXED, patch=narrow_logarithms),
    "default-precision f32 product": Plant(
        "default-precision product", UP, "f32", patch=default_precision
    ),
    "sums in bf16": Plant("narrow accumulation", DOWN, MIXED, patch=narrow_accumulation),
    "an accumulator that is ignored": Plant(
        "missing rounding", UP, f"{MIXED},a=e5m9", patch=accumulator_ignored
    ),
    "a product in a norm": Plant("product outside a site", NORM, MIXED, patch=product_in_a_norm),
    "a product outside of sites": Plant(
        "product outside a site", "outside of sites", MIXED, patch=product_outside
    ),
    "a library's own product": Plant(
        "default-precision product",
        "optimizer",
        "f32",
        patch=library_products,
        program="train",
        optimizer="muon",
    ),
    "cotangents through e5m2": Plant(
        "narrowed", "blocks/0-1/residual", MIXED, patch=rounded_cotangent, program="train"
    ),
    "moments in bf16": Plant(
        "stored otherwise", "blocks/*/mlp/up", "f32", "f32,mu=bf16", program="train"
    ),
    "moments that init stores and update does not": Plant(
        "stored otherwise", "embed", "f32", patch=moments_in_bf16, program="train"
    ),
    "parameters in bf16": Plant("stored otherwise", "embed", MIXED, "p=bf16,c=bf16,o=f32"),
    "gradients unscaled in f16": Plant(
        "narrowed", "loss_scale", "mixed_f16", patch=unscaled_in_f16, program="train"
    ),
    "arithmetic of the update in bf16": Plant(
        "narrowed", "optimizer", "f32", patch=update_in_bf16, program="train"
    ),
    "keys and values in e4m3": Plant(
        "stored otherwise",
        "blocks/0/attention/scores",
        MIXED,
        f"{MIXED},kv=e4m3@channel",
        program="decode",
    ),
    "elements of another format": Plant(
        "stored otherwise",
        "blocks/0/mlp/up",
        f"{MIXED},w=int4@block4.stored",
        f"{MIXED},w=int8@channel.stored",
        program="decode",
    ),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_violation_is_found_and_named(
    name: str, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = PLANTS[name]
    if plant.patch is not None:
        plant.patch(monkeypatch)
    changes = {"optimizer": {"name": plant.optimizer}} if plant.optimizer != "adamw" else {}
    config = tiny(plant.built or plant.asked, plant.family, **changes)
    assert (plant.kind, plant.site) in found(config, plant.asked, plant.program)


# --- what only compiled programs show

LAYOUT_SCOPE = "blocks/0-1/mlp/up"


def judged(
    function: Any, arguments: tuple[Any, ...], config: Config, target: CompiledFor, text: str = "",
    **options: Any,
) -> set[str]:  # fmt: skip
    """The kinds of what fails in a function that was compiled, or in a text that it became."""
    phase = phase_of(config)
    traced = jax.jit(function).trace(*arguments)
    program = TracedProgram(traced.jaxpr, phase.layout, PARTS)
    judge = TracedJudge(phase.layout, phase.sites)
    text = text or traced.lower().compile(compiler_options=options).as_text()
    CompiledJudge(
        judge, program, CompiledProgram(text, phase.layout, PARTS, target.mesh), target
    ).read()
    findings = [finding for row in judge.table for finding in row.findings]
    return {finding.kind for finding in findings if finding.verdict is not AuditVerdict.PASS}


CPU = CompiledFor("cpu", "cpu", {"data": 1})


def chain(x: jax.Array) -> jax.Array:
    with jax.named_scope("blocks/0-1/residual"):
        return (x + x * jnp.asarray(0.3, BF16)).astype(jnp.float32)


def round_trip(x: jax.Array) -> jax.Array:
    with jax.named_scope("blocks/0-1/residual"):
        return jnp.sin((x * x).astype(BF16).astype(jnp.float32))


def test_roundings_that_the_compiler_drops_are_found(tiny: Any) -> None:
    x, config = (jnp.ones((8, 128), BF16),), tiny(MIXED)
    elided = judged(chain, x, config, CPU, xla_allow_excess_precision=True)
    assert elided == {"elided rounding"}
    assert judged(chain, x, config, CPU, xla_allow_excess_precision=False) == set()


def sum_of_rounded(x: jax.Array) -> jax.Array:
    with jax.named_scope("blocks/0-1/residual"):
        rounded = jnp.square(x).astype(BF16).astype(jnp.float32)
        return jnp.sum(jnp.square(rounded - x), axis=-1)


def rounded_sum(x: jax.Array) -> jax.Array:
    with jax.named_scope("blocks/0-1/residual"):
        return jnp.sum(jnp.square(x), axis=0).astype(BF16).astype(jnp.float32)


def test_a_rounding_that_a_fused_sum_leaves_out_is_found(tiny: Any) -> None:
    x = jax.random.normal(jax.random.key(0), (64, 64), jnp.float32)
    compiled = jax.jit(sum_of_rounded, compiler_options=exact.COMPILER_OPTIONS)
    with jax.disable_jit():
        rounded = sum_of_rounded(x)
    is_lost = not np.allclose(compiled(x), rounded, rtol=1e-4)
    found = judged(sum_of_rounded, (x,), tiny("f32; **/residual: c=f32"), CPU, **KEPT)
    assert ("elided rounding" in found) == is_lost


def test_a_rounding_after_a_fused_sum_takes_place(tiny: Any) -> None:
    x = jax.random.normal(jax.random.key(0), (16, 64, 64), jnp.float32)
    found = np.asarray(jax.jit(rounded_sum, compiler_options=exact.COMPILER_OPTIONS)(x))
    assert np.array_equal(found, found.astype(BF16).astype(np.float32))
    assert judged(rounded_sum, (x,), tiny("mixed_bf16"), CPU, **KEPT) == set()


def test_casts_that_the_compiler_drops_are_found(tiny: Any) -> None:
    x, config = (jnp.ones((8, 128), jnp.float32),), tiny(MIXED)
    text = jax.jit(round_trip).lower(*x).compile().as_text()  # CPUs keep casts; GPUs do not
    assert judged(round_trip, x, config, CPU, text) == set()
    there_and_back = re.findall(r".*%(\S+) = (?:bf16|f32)\S* convert\(%(\S+)\).*\n", text)
    (first, source), (second, _) = there_and_back
    without = re.sub(r".* convert\(.*\n", "", text).replace(f"%{second}", f"%{source}")
    assert first not in without
    assert judged(round_trip, x, config, CPU, without) == {"elided rounding"}


def test_compiled_programs_name_the_quantizers_that_round(tiny: Any) -> None:
    phase = phase_of(tiny(FP8))

    def rounded(x: jax.Array) -> jax.Array:
        with jax.named_scope(LAYOUT_SCOPE):
            return fake_quantize(x, parse_quantizer("e4m3@tensor"))

    text = jax.jit(rounded).lower(jnp.ones((8, 8))).compile().as_text()
    there = CompiledProgram(text, phase.layout, PARTS, CPU.mesh).roundings()
    assert {rounding for _, rounding in there} == {"e4m3@tensor"}


def product(x: jax.Array) -> jax.Array:
    with jax.named_scope(LAYOUT_SCOPE), jax.named_scope("y"):
        return jnp.dot(x, x, precision="highest")


GEMM = """\
HloModule jit_product

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %gemm = f32[8,8]{1,0} OPERATION, metadata={op_name="jit(product)/SCOPE/y/dot_general"}
}
"""
CUBLAS = (
    'custom-call(%x, %x), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config"'
    ':{"precision_config":{"operand_precision":["DEFAULT","DEFAULT"],"algorithm":"ALG_UNSET"}}}'
)
DOT = "dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


@pytest.mark.parametrize(
    ("platform", "operation", "kind"),
    [
        ("gpu", CUBLAS, "tf32"),
        ("gpu", CUBLAS.replace("ALG_UNSET", "ALG_DOT_TF32_TF32_F32"), "tf32"),
        ("tpu", DOT, "one-pass bf16"),
        ("gpu", CUBLAS.replace("DEFAULT", "HIGHEST"), ""),
        ("tpu", f"{DOT}, operand_precision={{highest,highest}}", ""),
        ("cpu", DOT, ""),
    ],
)
def test_products_that_a_chip_would_do_in_fewer_bits_are_found(
    platform: str, operation: str, kind: str, tiny: Any
) -> None:
    text = GEMM.replace("OPERATION", operation).replace("SCOPE", LAYOUT_SCOPE)
    x = jnp.ones((8, 8), jnp.float32)
    target = CompiledFor(platform, platform, {"data": 1})
    kinds = judged(product, (x,), tiny("f32"), target, text) - {"kernel"}
    assert kinds == ({kind} if kind else set())


def product_and_sum(x: jax.Array) -> jax.Array:
    """Gradients of weights for one part of the rows, and their sum over the parts."""
    with jax.named_scope("head"), jax.named_scope("dw"):
        narrow = x.astype(BF16)
        shares = jnp.einsum("bv,bd->vd", narrow, narrow, preferred_element_type=jnp.float32)[None]
    with jax.named_scope("reduction"):
        return jnp.einsum("p,pij->ij", jnp.ones(1), shares, precision="highest")


BOTH = """\
HloModule jit_step

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %narrow = bf16[8,8]{1,0} convert(%x), metadata={op_name="jit(f)/head/dw/convert_element_type"}
  %dw = f32[8,8]{1,0} dot(%narrow, %narrow), metadata={op_name="jit(f)/DW/dot_general"}
  %less = bf16[8,8]{1,0} convert(%dw), metadata={op_name="jit(f)/SUM/dot_general"}
  ROOT %sum = f32[8,8]{1,0} dot(%less, %less), metadata={op_name="jit(f)/SUM/dot_general"}
}
""".replace("DW", "head/dw/bv,bd->vd").replace("SUM", "reduction/p,pij->ij")


def test_a_sum_that_is_part_of_the_product_before_it_is_as_traced(tiny: Any) -> None:
    x = (jnp.ones((8, 8)),)
    assert judged(product_and_sum, x, tiny(MIXED), CPU, BOTH) == {"narrowed by the compiler"}
    one = re.sub(r".*%(dw|less) = .*\n", "", BOTH).replace("%less", "%narrow")
    assert judged(product_and_sum, x, tiny(MIXED), CPU, one) == set()
    narrow = one.replace("%sum = f32", "%sum = bf16")
    assert judged(product_and_sum, x, tiny(MIXED), CPU, narrow) == {"narrowed by the compiler"}


ALL_REDUCE = """\
HloModule jit_step

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

ENTRY %main (x: bf16[8,8]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  ROOT %sums = bf16[8,8]{1,0} all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}, ATTRIBUTES
}
"""


@pytest.mark.parametrize(("asked", "kinds"), [("", {"narrow all-reduce"}), (",r=bf16", set())])
def test_gradients_that_devices_sum_narrowly_are_found(
    asked: str, kinds: set[str], tiny: Any
) -> None:
    x = jnp.ones((8, 8), BF16)
    target = CompiledFor("tpu:8", "tpu", {"data": 8})
    name = f"jit(step)/transpose(jvp())/{LAYOUT_SCOPE}/dw/dot_general"
    attributes = f'to_apply=%add, metadata={{op_name="{name}"}}'
    text = ALL_REDUCE.replace("ATTRIBUTES", attributes)
    assert judged(lambda x: x, (x,), tiny(MIXED + asked), target, text) == kinds


def test_flags_that_change_what_numbers_mean_are_found(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    jaxpr = jax.make_jaxpr(lambda x: x)(jnp.ones(()))
    phase = phase_of(tiny("f32"))
    found = inspect("train", jaxpr, [], phase.layout, phase.sites, PARTS, {})
    kinds = {finding.kind for _, finding in found.findings}
    assert kinds == {"fast-math", "tf32", "excess precision"}


def test_what_is_not_attributed_is_listed(tiny: Any) -> None:
    phase = phase_of(tiny("f32"))
    traced = jax.jit(lambda x: jnp.sin(x)).trace(np.ones((8, 8), np.float32))
    text = traced.lower().compile().as_text()
    found = inspect("train", traced.jaxpr, [(CPU, text)], phase.layout, phase.sites, PARTS, {})
    share = found.shares["cpu"]
    assert share.attributed == 0
    assert share.rest[0][0] == "sine"


def test_rows_name_the_blocks_that_share_a_program(tiny: Any) -> None:
    phase = phase_of(tiny("f32"))
    judge = TracedJudge(layout(phase.config.model), phase.sites)
    assert judge.label(Scope("blocks/mlp/up", "0-1", False)) == LAYOUT_SCOPE
