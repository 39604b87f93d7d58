"""What a policy asks of the operations of a site, in terms that a program can be compared with.

Read off a `SitePolicy` and the declaration of its site alone; how the model obeys them does not
matter here.

Knows policies and declarations of sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from lmjax.inspection.facts import dtype_name, format_name, narrower
from lmjax.precision.formats import Format, parse_format
from lmjax.precision.policy import SitePolicy, carrier
from lmjax.precision.quantizer import Quantizer, parse_quantizer
from lmjax.precision.settings import Operand
from lmjax.precision.sites import Kind as SiteKind
from lmjax.precision.sites import Layout

F32: Final = "f32"


@dataclass(frozen=True)
class AskedProduct:
    """What is asked of one product of a site.

    Attributes:
      operands: a quantizer each, as a policy writes it, or the compute format.
      sums: the format of the sum, before its rounding to the accumulator.
      accumulator: what the sum is rounded to.
      exact: whether f32 operands must be multiplied as f32.
    """

    operands: tuple[str, str]
    sums: str
    accumulator: str
    exact: bool

    def __str__(self) -> str:
        summed = self.sums if self.accumulator == self.sums else f"{self.sums}, {self.accumulator}"
        return f"{self.operands[0]} x {self.operands[1]}, summed in {summed}"


@dataclass(frozen=True)
class Asked:
    """What is asked of a site.

    Attributes:
      site: its policy.
      arrives: format of the input of an elementwise site; empty for products.
      handed_on: formats in which its result may be read elsewhere.
      table: what the table of a lookup is stored as, which may be that of the head; or empty.
    """

    site: SitePolicy
    arrives: str
    handed_on: frozenset[str]
    table: str = ""

    @cached_property
    def compute(self) -> str:
        """The dtype that everything the site computes with has."""
        return dtype_name(carrier(self.site.compute))

    @cached_property
    def wide(self) -> str:
        """The dtype of sums that may be wider than the compute format."""
        return "f64" if self.compute == "f64" else F32

    def product(self, role: str) -> AskedProduct:
        """Of the product `y`, `dx` or `dw`."""
        s = self.site
        pair = {
            "y": (s.activations, s.second),
            "dx": (s.grads, s.backward_second),
            "dw": (s.backward_activations, s.grads),
        }[role]
        plain = "tf32" if s.matmul == "tf32" and s.compute.name == F32 else s.compute.name
        first, second = (self._operand(operand, plain) for operand in pair)
        accumulator = self.wide if s.accum.format.name == F32 else s.accum.format.name
        return AskedProduct((first, second), self.wide, accumulator, s.matmul != "default")

    def _operand(self, operand: Operand | None, plain: str) -> str:
        """As written, unless rounding to it changes no number of the compute format."""
        if operand is None:
            return plain
        quantizer = operand.quantizer
        unscaled = quantizer.groups == "none" and quantizer.format.contains(self.site.compute)
        return plain if unscaled else str(quantizer)

    @cached_property
    def elementwise(self) -> frozenset[str]:
        """The dtypes of arithmetic outside of products."""
        return frozenset((self.compute,))

    @cached_property
    def sums(self) -> frozenset[str]:
        """The dtypes of sums outside of products."""
        lookup = self.site.site.kind is SiteKind.LOOKUP
        stored = (dtype_name(carrier(self.site.params)),) if lookup else ()
        return frozenset((self.compute, self.wide, *stored))

    @cached_property
    def roundings(self) -> frozenset[str]:
        """Every format that something at the site is rounded to."""
        s = self.site
        operands = (
            s.weights, s.activations, s.grads, s.backward_weights, s.backward_activations
        )  # fmt: skip
        quantizers = [o.quantizer for o in operands if o is not None]
        quantizers += [q for q in (s.cache, s.mu, s.nu) if q is not None]
        named = {name for q in quantizers for name in _names_of(q)}
        formats = (s.compute, s.output, s.params, s.accum.format, s.reduce)
        named |= {f.name for f in formats} | {dtype_name(carrier(f)) for f in formats}
        named |= {"tf32"} if s.matmul == "tf32" else set()
        return frozenset(named | {self.arrives, self.table} | self.handed_on)


def _names_of(quantizer: Quantizer) -> set[str]:
    """What a quantizer rounds to: itself, with a factor of its own, its elements and factors."""
    now = quantizer.of_the_tensor
    return {str(quantizer), str(now), quantizer.format.name, quantizer.scale.name}


def asked_of(layout: Layout, sites: Mapping[str, SitePolicy], path: str) -> Asked:
    """What is asked of a site.

    Args:
      layout: of the model.
      sites: the policy of every site.
      path: as policies have it: `blocks/2/mlp/up`.
    """
    arrives = layout.input_format(path, sites)
    site = sites[path]
    formats = [site.output]
    own = next(place.path for place in layout.places if path in place.paths)
    sources = (place.source for place in layout.places if place.source is not None)
    formats += [getattr(site, source.format) for source in sources if source.path == own]
    # Numbers of a narrow result stay what they are in a wider output.
    narrow = (site.result if f.contains(site.result) else f for f in formats)
    numbers = {f.name for f in narrow}
    if site.site.is_product and narrower(site.accum.format.name, site.result.name):
        numbers.add(site.accum.format.name)
    handed_on = frozenset(numbers)
    stored = [str(one.stores) for one in sites.values() if one.site.logits and one.stores]
    table = stored[0] if stored and site.site.kind is SiteKind.LOOKUP else ""
    return Asked(site, arrives.name if arrives is not None else "", handed_on, table)


def same(found: str, asked: str) -> bool:
    """Whether a rounding that was found is the one that is asked for.

    A delayed factor may be taken from the tensor itself, as in evaluation.
    """
    if found == asked:
        return True
    try:
        one, other = parse_quantizer(found), parse_quantizer(asked)
    except ValueError:
        return format_name(found) == format_name(asked)
    return one.of_the_tensor == other.of_the_tensor


def stores(dtype: str, number_format: Format, *, nan: bool) -> bool:
    """Whether a dtype is what a tensor of a format should be stored in.

    That is the format's own dtype; where JAX has none of at least a byte, or it lacks a NaN that is
    needed, any that has all of its values.

    Args:
      dtype: as policies name it.
      number_format: of the elements.
      nan: whether a failure must remain visible in the elements themselves.
    """
    found = parse_format(dtype)
    suits = not (nan and number_format.is_integer)
    if suits and number_format.dtype is not None and number_format.bits >= 8:
        return found == number_format
    return found.contains(number_format)
