"""Declares sites: every kind of place in a model whose formats a policy can set.

A site is identified by the last component of its path: `blocks/3/attention/softmax` is a `softmax`.
The table `SITES` declares what each site computes, which of its tensors a policy can quantize, and
what a policy leaves unchanged unless a rule names the site. Policies, probes, telemetry, native
products and plans all use this declaration; to add a site, add a row.

A model declares its sites as a `Layout` of `Place`s. The parameters of blocks are stacked in one
array, and so are their measurements: except in a policy, the same site in every block is one place.
Only this module knows how paths refer to stacks.

    policy, one path a block         blocks/0/mlp/up, blocks/1/mlp/up, ...
    parameters and measurements      blocks/mlp/up

Knows nothing but Python.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, TypeVar

T = TypeVar("T")


class Kind(enum.Enum):
    """What a site computes."""

    WEIGHT_PRODUCT = "product of activations and weights"
    ACTIVATION_PRODUCT = "product of two activations"
    ELEMENTWISE = "elementwise, with reductions over one axis"
    LOOKUP = "rows of a table"


@dataclass(frozen=True)
class Site:
    """One kind of place whose formats a policy can set.

    Attributes:
      name: the last component of its paths.
      kind: what it computes.
      wide: why it computes in at least f32 unless a rule names it; empty where it does not.
      unquantized: why the base's `w`, `x`, `g`, `wb` and `xb` do not reach a product unless a rule
        names it; empty where they do.
      unrounded: why its result leaves the sum as it is, in at least f32, unless a rule that names
        it sets `c` or `o`; empty where a result is rounded to the compute format.
      logits: whether its output is the output of the model, which the base's `o` is for.
      scalar: whether its output is a single number, for which a census is meaningless.
      inner: what it hands on besides its output, by role: values that taps see.
    """

    name: str
    kind: Kind
    wide: str = ""
    unquantized: str = ""
    unrounded: str = ""
    logits: bool = False
    scalar: bool = False
    inner: tuple[str, ...] = ()

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product, which goes through `matmul.einsum`."""
        return self.kind in (Kind.WEIGHT_PRODUCT, Kind.ACTIVATION_PRODUCT)

    @property
    def takes_operands(self) -> bool:
        """Whether the base of a policy quantizes its operands."""
        return self.is_product and not self.unquantized

    @property
    def roles(self) -> tuple[str, ...]:
        """Its tensors that can be measured; see `probes.py`.

        Operands `w` and `x`, cotangent `g` and gradients `dx` and `dw` of a product; of any other
        site its output `y` and the cotangent `dx` of its input.
        """
        if self.is_product:
            return ("w", "x", "g", "dx", "dw")
        return ("dx",) if self.scalar else ("y", "dx")

    @property
    def taps(self) -> tuple[str, ...]:
        """Its tensors that can be tapped whole, as it hands them on; see `taps.py`.

        Values: its output `y` and what is `inner`. Gradients: `dy`, the cotangent of its output as
        it arrives, unless that is the loss, and its `gradients`.
        """
        arriving = () if self.scalar else ("dy",)
        return (*self.inner, "y", *arriving, *self.gradients)

    @property
    def operands(self) -> tuple[str, ...]:
        """The roles of what it computes with, before it is cast."""
        return ("x", "w", "g") if self.is_product else ("x",)

    @property
    def gradients(self) -> tuple[str, ...]:
        """The roles that are gradients of its inputs, before they are rounded."""
        return tuple(role for role in self.roles if role in ("dx", "dw"))


def _declared(*sites: Site) -> Mapping[str, Site]:
    return MappingProxyType({site.name: site for site in sites})


_LINEAR: Final = ("query", "key", "value", "out", "up", "gate", "down", "dense")
_MEAN_SQUARE: Final = "a mean of squares overflows f16 and loses small differences in bf16"

SITES: Final = _declared(
    Site("embed", Kind.LOOKUP, inner=("sum",)),
    Site("positions", Kind.LOOKUP),
    Site("types", Kind.LOOKUP),
    Site("residual", Kind.ELEMENTWISE, inner=("entering", "between")),
    Site("norm", Kind.ELEMENTWISE, wide=_MEAN_SQUARE),
    *(Site(name, Kind.WEIGHT_PRODUCT) for name in _LINEAR),
    Site("query_norm", Kind.ELEMENTWISE, wide=f"{_MEAN_SQUARE}, over one head"),
    Site("key_norm", Kind.ELEMENTWISE, wide=f"{_MEAN_SQUARE}, over one head"),
    Site(
        "rope",
        Kind.ELEMENTWISE,
        wide="an angle is a position times a frequency: bf16 has no odd integers above 256",
        inner=("keys",),
    ),
    Site(
        "scores",
        Kind.ACTIVATION_PRODUCT,
        unquantized="both operands are activations, and the softmax amplifies their errors",
        unrounded="the softmax reads sums of f32, as in every fused kernel",
    ),
    Site(
        "softmax",
        Kind.ELEMENTWISE,
        wide="exponentials of differences, summed over the whole context",
    ),
    Site(
        "combine",
        Kind.ACTIVATION_PRODUCT,
        unquantized="attention weights span many binades within one row",
    ),
    Site(
        "activation",
        Kind.ELEMENTWISE,
        wide="a chain of elementwise operations is rounded once, at its end",
    ),
    Site(
        "head",
        Kind.WEIGHT_PRODUCT,
        unquantized="errors of the logits go straight into the loss",
        logits=True,
    ),
    Site(
        "loss",
        Kind.ELEMENTWISE,
        wide="a logarithm of a sum over the vocabulary, averaged over the batch",
        scalar=True,
    ),
)
"""Every site by its name."""


def site_at(path: str) -> Site:
    """The declaration of the site at a path such as `blocks/3/attention/softmax`.

    Raises:
      ValueError: its name is not declared.
    """
    name = path.rpartition("/")[2]
    if name not in SITES:
        raise ValueError(
            f"{path} is not a declared site; the sites are {', '.join(SITES)}. Declare new ones in "
            "lmjax/precision/sites.py"
        )
    return SITES[name]


@dataclass(frozen=True)
class Stack:
    """Parts of a model that are alike, and whose parameters are stacked along a leading axis.

    Attributes:
      name: of the part, which all paths into it begin with.
      size: how many there are.
    """

    name: str
    size: int

    def holds(self, path: str) -> bool:
        """Whether a path, stacked or not, leads into it."""
        return path.startswith(f"{self.name}/")

    def within(self, path: str) -> str:
        """A stacked path without the name of the stack: `blocks/mlp/up` to `mlp/up`."""
        return path.removeprefix(f"{self.name}/")

    def path(self, within: str) -> str:
        """The stacked path of what stands at a path within: `mlp/up` to `blocks/mlp/up`."""
        return f"{self.name}/{within}"

    def member(self, index: int | str, path: str = "") -> str:
        """The path of one member, or of what stands at a stacked path in it.

        `index` may be a range in words, which names several.
        """
        head = f"{self.name}/{index}"
        return f"{head}/{self.within(path)}" if path else head

    def members(self, path: str) -> tuple[str, ...]:
        """The paths that a stacked path stands for, one for each member."""
        return tuple(self.member(index, path) for index in range(self.size))


class Source(NamedTuple):
    """Where the input of an elementwise site comes from, and so in which format it arrives.

    Attributes:
      path: of the place; that of the same member, from within a stack, and else of the last one.
      format: which of its formats.
    """

    path: str
    format: Literal["params", "compute", "output"] = "output"


@dataclass(frozen=True)
class Place:
    """A site of a model; those of all members of a stack are one place.

    Attributes:
      path: where it is, as parameters and measurements have it: `blocks/attention/softmax`.
      site: what it is declared to be.
      stack: what it is stacked in, if anything.
      source: where its input comes from; None for products, which cast their operands themselves.
    """

    path: str
    site: Site
    stack: Stack | None = None
    source: Source | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Its paths as policies have them, one for each member of its stack."""
        return (self.path,) if self.stack is None else self.stack.members(self.path)

    def __str__(self) -> str:
        return self.path if self.stack is None else self.stack.member("*", self.path)


@dataclass(frozen=True)
class Layout:
    """Which sites a model has.

    Attributes:
      places: in the order of computation; those of the stack stand together.
      stack: its blocks.
    """

    places: tuple[Place, ...]
    stack: Stack

    @cached_property
    def _by_path(self) -> Mapping[str, Place]:
        return {place.path: place for place in self.places}

    @cached_property
    def _by_member(self) -> Mapping[str, tuple[Place, int]]:
        return {path: (p, index) for p in self.places for index, path in enumerate(p.paths)}

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """Every path at which a policy can say something, in the order of computation."""
        inside = [place.path for place in self.places if place.stack]
        blocks = [self.stack.member(i, path) for i in range(self.stack.size) for path in inside]
        first = next((i for i, place in enumerate(self.places) if place.stack), len(self.places))
        outside = [place.path for place in self.places if not place.stack]
        return (*outside[:first], *blocks, *outside[first:])

    def has(self, path: str) -> bool:
        """Whether there is a place at a stacked path."""
        return path in self._by_path

    def place(self, path: str) -> Place:
        """The place at a stacked path, such as `blocks/mlp/up`."""
        return self._by_path[path]

    def place_of_parameter(self, path: str) -> Place:
        """The place that a parameter belongs to: of `blocks/mlp/up/kernel` that of `mlp/up`."""
        return self.place(path.rpartition("/")[0])

    def named(self, name: str) -> tuple[Place, ...]:
        """The places of the site of this name."""
        return tuple(place for place in self.places if place.site.name == name)

    def merged(self, found: Mapping[str, T]) -> dict[str, T]:
        """What was found at every path, consecutive members of the stack that are equal as one.

        Args:
          found: by path, as policies have them.

        Returns:
          By `blocks/0-3/mlp/up` what was found at `blocks/0/mlp/up` to `blocks/3/mlp/up`, and by
          its own path what has no equal beside it; in the order of the first members.
        """
        names = {place.path: place.path for place in self.places if place.stack is None}
        for place in self.places:
            start = 0
            for end in range(1, len(place.paths) + 1 if place.stack else 0):
                first = place.paths[start]
                if end == len(place.paths) or found[place.paths[end]] != found[first]:
                    members = str(start) if end == start + 1 else f"{start}-{end - 1}"
                    names[first] = self.stack.member(members, place.path)
                    start = end
        return {names[path]: found[path] for path in self.paths if path in names}

    def input_format(self, path: str, sites: Mapping[str, Any]) -> Any:
        """The `Format` in which the input of a site arrives, and its cotangent leaves.

        Args:
          path: of a site, as policies have it.
          sites: the `SitePolicy` of every site of the model.

        Returns:
          None for a product, which casts its operands itself.
        """
        place, index = self._by_member[path]
        if place.source is None:
            return None
        read = self.place(place.source.path).paths[index if place.stack else -1]
        return getattr(sites[read], place.source.format)
