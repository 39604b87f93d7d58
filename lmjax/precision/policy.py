"""The policy: the number format of every tensor.

A policy is a base and rules by path; `resolve` applies them to one site of a model, where the last
matching rule wins. `grammar.py` defines how policies are written.

A rule reaches a site in one of two ways. It *names* the site when its pattern matches the site's
own path; it *contains* the site when the pattern matches a path above it, and then sets what the
sites within follow by default. The difference matters three times:

- sites that are declared *wide* compute in at least f32: neither the base nor a rule on a container
  narrows them, only a rule that names them (`**/softmax: c=bf16`, or `blocks/0/**: c=bf16`);
- products that are declared *unrounded* hand on their sums in at least f32, unless a rule that
  names them sets `c` or `o`;
- products that are declared *unquantized* keep their operands in the compute format unless a rule
  that names them sets `w`, `x`, `g`, `wb` or `xb`; other products also inherit these keys.

The base `o` applies only to the logits, as in jmp; inside the model, a site's output has its
compute format unless a rule that names it sets `o`.

A policy may change with the step. It then has phases, each a complete policy, and a site is
resolved in one phase: `policy.at(step).resolve(path)`.

`sites.py` declares each site and `keys.py` each key. Knows those, formats, quantizers and jmp; the
sites of a model come from the paths passed in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jmp

from lmjax.precision import paths
from lmjax.precision.formats import Format, parse_format
from lmjax.precision.keys import KEYS, OPERANDS
from lmjax.precision.quantizer import Quantizer
from lmjax.precision.rounding import Overflow, emulate, quantize
from lmjax.precision.settings import Accumulator, Operand, Storage, Update
from lmjax.precision.sites import Kind, Site, site_at

NATIVE = ("f64", "f32", "bf16", "f16")
"""Formats that JAX computes in everywhere; all others are emulated in f32."""

MatmulPrecision = Literal["highest", "tf32", "default"]


class PolicyError(ValueError):
    """An invalid policy.

    Attributes:
      position: index of the offending character in the policy string, or None if the string is well
        formed but does not fit the model.
    """

    def __init__(self, message: str, *, text: str, position: int | None = None):
        where = "" if position is None else f" at character {position}"
        super().__init__(f"policy {text!r}{where}: {message}")
        self.position = position


F32 = parse_format("f32")
STORED_AS_F32 = Quantizer(F32)
SUMMED_IN_F32 = Accumulator(F32)


@dataclass(frozen=True)
class SitePolicy:
    """The formats of one site's tensors; hashable, so usable as a static argument under jit.

    Attributes:
      site: its declaration.
      stored: how parameters are stored, and updates rounded.
      compute: format of everything the site computes with.
      output: format of its output.
      weights, activations, grads: quantization of the operands of its product, and of the
        cotangent in the backward products; None leaves them in the compute format.
      backward_weights, backward_activations: the same for the backward products; as in the forward
        product unless the policy sets them.
      accum: accumulation of its product.
      matmul: precision of products: `highest` (f32 operands as f32, sums in f32), `tf32` (f32
        operands rounded to it), or whatever the backend does by default.
      reduce: format that its gradients are summed in over devices.
      mu, nu: how the optimizer stores the first and second moment of its parameters.
      cache: how decoding stores its second operand between tokens: keys at `scores`, values at
        `combine`, after the cast to the compute format; None leaves them in it.
      cotangents: overflow mode of `quantize` for cotangents in a format without infinities:
        `clamp`, or `fail` while the loss scale adapts. Not a key of the grammar; the config of a
        run sets it.
      path: path of the site, which names its equations in compiled programs (`scope`); ignored
        when sites are compared.
    """

    site: Site
    stored: Storage
    compute: Format
    output: Format
    weights: Operand | None = None
    activations: Operand | None = None
    grads: Operand | None = None
    backward_weights: Operand | None = None
    backward_activations: Operand | None = None
    accum: Accumulator = SUMMED_IN_F32
    matmul: MatmulPrecision = "highest"
    reduce: Format = F32
    mu: Quantizer = STORED_AS_F32
    nu: Quantizer = STORED_AS_F32
    cache: Quantizer | None = None
    cotangents: Overflow = "clamp"
    path: str = field(default="", compare=False)

    @property
    def params(self) -> Format:
        """The format that parameters are stored in."""
        return self.stored.format

    @property
    def update(self) -> Update:
        """How an update is rounded to that format."""
        return self.stored.update

    @property
    def scope(self) -> AbstractContextManager[Any]:
        """Labels operations traced inside with the site, in jaxprs, programs and profiles."""
        return jax.named_scope(self.path or self.site.name)

    @property
    def result(self) -> Format:
        """What its product is rounded to: `compute`, or `output` where the site is `unrounded`."""
        return self.output if self.site.unrounded else self.compute

    @property
    def second(self) -> Operand | None:
        """Quantization of the second operand of its product: weights or activations."""
        return self.weights if self.site.kind is Kind.WEIGHT_PRODUCT else self.activations

    @property
    def stores(self) -> Quantizer | None:
        """What its weights are stored as, to be read and not trained; None if they are arrays."""
        if self.second is None or self.second.kept != "stored":
            return None
        return self.second.quantizer

    @property
    def stored_as(self) -> tuple[Quantizer, Operand | None, Format] | None:
        """What weights have in common that are stored alike; None for those that stay arrays."""
        return None if self.stores is None else (self.stores, self.activations, self.compute)

    @property
    def backward_second(self) -> Operand | None:
        """The same in the backward products."""
        weights = self.site.kind is Kind.WEIGHT_PRODUCT
        return self.backward_weights if weights else self.backward_activations

    @property
    def jmp(self) -> jmp.Policy:
        """params, compute and output as a `jmp.Policy`, by the dtypes that carry them."""
        return jmp.Policy(
            param_dtype=carrier(self.params),
            compute_dtype=carrier(self.compute),
            output_dtype=carrier(self.output),
        )

    def to_params(self, tree: Any) -> Any:
        """Rounds the floating-point leaves of a pytree to the stored format."""
        return self._emulated(self.jmp.cast_to_param(tree), self.params)

    def to_compute(self, tree: Any) -> Any:
        """Rounds the floating-point leaves of a pytree to the compute format.

        Their cotangents have that format too, as with a JAX dtype.
        """
        return self._emulated(self.jmp.cast_to_compute(tree), self.compute)

    def to_output(self, tree: Any) -> Any:
        """Rounds the floating-point leaves of a pytree to the output format, like `to_compute`."""
        return self._emulated(self.jmp.cast_to_output(tree), self.output)

    def to_result(self, x: jax.Array) -> jax.Array:
        """Rounds the sums of a product to `result`."""
        return self.to_output(x) if self.site.unrounded else self.to_compute(x)

    def to_cotangent(self, g: jax.Array) -> jax.Array:
        """Rounds a cotangent to the compute format."""
        g = self.jmp.cast_to_compute(g)
        if self.compute.name in NATIVE:
            return g
        return quantize(g, self.compute, overflow=self.cotangents)

    def _emulated(self, tree: Any, number_format: Format) -> Any:
        """Rounds leaves that are already in the carrier's dtype to an emulated format."""
        if number_format.name in NATIVE:
            return tree

        def one(leaf: Any) -> Any:
            floating = jnp.issubdtype(leaf.dtype, jnp.floating)
            return emulate(leaf, number_format, self.cotangents) if floating else leaf

        return jax.tree.map(one, tree)

    @property
    def stochastic(self) -> bool:
        """Whether an operand of its products is rounded stochastically, or rotated at random."""
        forward = (self.weights, self.activations, self.grads)
        operands = (*forward, self.backward_weights, self.backward_activations)
        return any(o is not None and (o.rounding == "stochastic" or o.rotation) for o in operands)

    def rows(self) -> dict[str, str]:
        """Every setting by its key in the grammar, as written in a policy."""
        # An operand or a cache that is not quantized stays in the compute format.
        return {key: str(getattr(self, row.field) or self.compute) for key, row in KEYS.items()}

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in list(self.rows().items())[:3])


def carrier(number_format: Format) -> Any:
    """The dtype that holds values of a format: its own if JAX computes in it, else f32."""
    native = number_format if number_format.name in NATIVE else F32
    assert native.dtype is not None
    return native.dtype.type  # jmp prints scalar types but not np.dtype instances


Settings = Mapping[str, Any]
"""Parsed values by key of the grammar."""


@dataclass(frozen=True)
class Rule:
    """`pattern: key=value,...`: settings for the sites that the pattern reaches."""

    pattern: str
    settings: Settings = field(hash=False)
    position: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.pattern}: {settings_string(self.settings)}"


class PolicyPhase(NamedTuple):
    """A policy and the first step it holds for, counted in steps attempted before that one."""

    start: int
    policy: Policy


@dataclass(frozen=True)
class Policy:
    """A parsed policy. `str(policy)` is its canonical string; parsing that gives it back.

    Attributes:
      base: settings of every site.
      rules: settings by path.
      text: what it was read from.
      later: phases after this one, first to last; each replaces base and rules as a whole.
    """

    base: Settings = field(hash=False)
    rules: tuple[Rule, ...] = ()
    text: str = field(default="", compare=False)
    later: tuple[PolicyPhase, ...] = ()

    @property
    def phases(self) -> tuple[PolicyPhase, ...]:
        """All phases, the first of which starts at 0; none of their policies has phases itself."""
        return (PolicyPhase(0, replace(self, later=())), *self.later)

    def at(self, step: int) -> Policy:
        """Returns the policy of the phase that contains a step, given the steps before it."""
        return [policy for start, policy in self.phases if start <= step][-1]

    def resolve(self, path: str, depth: int | None = None) -> SitePolicy:
        """Resolves the formats of one site.

        Args:
          path: the site, e.g. `blocks/3/attention/softmax`.
          depth: number of blocks, from which negative indices in patterns count.

        Returns:
          The site's formats after applying the base and every rule that reaches it, in order.

        Raises:
          ValueError: no site of that name is declared, or the policy has phases, so that formats
            depend on the step.
        """
        self._refuse_phases()
        site = site_at(path)
        settings = _inherited(self.base, site)
        if not site.logits:
            settings.pop("o", None)
        rounded = not site.unrounded
        for rule in self.rules:
            named, contained = _reach(rule.pattern, path, depth)
            if named:
                settings |= rule.settings
                rounded |= "c" in rule.settings
            elif contained:
                inherited = _inherited(rule.settings, site)
                inherited.pop("o", None)
                settings |= inherited
        if not rounded and settings["c"].bits <= 32:
            settings.setdefault("o", F32)
        resolved = _site_policy(settings, site, path)
        of_x, wrong = resolved.activations, ""
        if of_x is not None and of_x.kept and resolved.stores is None:
            wrong = "a static factor is stored with weights, which must be .stored, by quantize"
        if of_x is not None and of_x.rotation and resolved.stores is not None:
            wrong = "weights that are stored are not rotated; leave out .rht"
        if wrong:
            raise PolicyError(f"{path} has x={of_x}: {wrong}", text=self.text or str(self))
        return resolved

    def resolve_all(
        self, site_paths: Sequence[str], depth: int | None = None
    ) -> dict[str, SitePolicy]:
        """Resolves every site of a model, and refuses rules that reach none of them.

        Raises:
          PolicyError: a rule matches nothing; the message lists the paths there are.
          ValueError: the policy has phases.
        """
        self._refuse_phases()
        for rule in self.rules:
            if not any(any(_reach(rule.pattern, path, depth)) for path in site_paths):
                raise PolicyError(
                    f"the rule '{rule.pattern}' matches no site; the sites are: "
                    + ", ".join(_summarised(site_paths)),
                    text=self.text or str(self),
                    position=rule.position,
                )
        return {path: self.resolve(path, depth) for path in site_paths}

    def _refuse_phases(self) -> None:
        if self.later:
            raise ValueError(
                f"the policy '{self}' changes with the step; ask the policy or the config of one "
                "phase, which their method at(step) gives"
            )

    def __str__(self) -> str:
        if self.later:
            return " | ".join(f"{start}: {policy}" for start, policy in self.phases)
        return "; ".join([settings_string(self.base), *map(str, self.rules)])


def settings_string(settings: Settings) -> str:
    """Settings as the grammar writes them."""
    return ",".join(f"{key}={value}" for key, value in settings.items())


def _inherited(settings: Settings, site: Site) -> dict[str, Any]:
    """The settings that a site inherits from the base or from a rule on a container."""
    inherited = dict(settings)
    if site.wide and "c" in inherited and inherited["c"].bits <= 32:
        inherited["c"] = F32
    if not site.takes_operands:
        inherited = {key: value for key, value in inherited.items() if key not in OPERANDS}
    return inherited


def _site_policy(settings: Settings, site: Site, path: str) -> SitePolicy:
    """The policy of a site; a key that is not set follows another one with values of its kind."""
    values = dict(settings)
    for key, row in KEYS.items():
        followed = KEYS.get(row.default)
        if key not in values and followed is not None and followed.kind is row.kind:
            values |= {key: values[row.default]} if row.default in values else {}
    fields = {KEYS[key].field: value for key, value in values.items()}
    return SitePolicy(site, path=path, **fields)


def _reach(pattern: str, path: str, depth: int | None) -> tuple[bool, bool]:
    """Whether the pattern names the site itself, and whether it names a container of the site."""
    pattern = _absolute(pattern, depth)
    return (
        paths.matches(pattern, path),
        any(paths.matches(pattern, above) for above in paths.ancestors(path)),
    )


def _absolute(pattern: str, depth: int | None) -> str:
    """Replaces a negative block index by the index that it denotes."""
    if depth is None:
        return pattern
    parts = pattern.split("/")
    return "/".join(
        str(depth + int(part)) if re.fullmatch(r"-\d+", part) and depth + int(part) >= 0 else part
        for part in parts
    )


def _summarised(site_paths: Sequence[str]) -> list[str]:
    """The paths with block indices as `*`, for the message about a mistyped path."""
    return list(dict.fromkeys(re.sub(r"/\d+(?=/|$)", "/*", path) for path in site_paths))
