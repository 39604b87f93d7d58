"""What every family of models is: embeddings, a stack of blocks, heads and an objective.

A family is a subclass of `Assembly` in a file of its own, and a row in `families.py`. All else
(parameters, policies, checkpoints, the train step, plans) is derived from what is declared here.

Knows Flax, JAX and policies; no mesh, no optimizer, no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

import jax
from flax import nnx

from lmjax.model.config import ModelConfig
from lmjax.model.head import Backward, Head
from lmjax.model.layers import ANYWHERE, Constrain
from lmjax.model.mask import Mask
from lmjax.model.sites import Context, Sites
from lmjax.precision.sites import Layout

Batch = Mapping[str, jax.Array]
"""`inputs`, `int32[B, T]`, and what else a family and its objective read, by name."""


class Assembly(nnx.Module):
    """The parameters of a model, by name, and how they are put together.

    Built once to learn the names and shapes of its parameters (see `families.structure`), then
    merged with arrays wherever it is called: its methods are pure functions of them.
    """

    def __init__(self, key: jax.Array, config: ModelConfig):
        raise NotImplementedError

    @staticmethod
    def layout(config: ModelConfig) -> Layout:
        """The sites of a model."""
        raise NotImplementedError

    @staticmethod
    def objective(config: ModelConfig) -> Objective:
        """What a model is trained for, and evaluated by."""
        raise NotImplementedError

    @staticmethod
    def mask(*, documents: bool) -> type[Mask]:
        """The mask that it is trained under; of `documents`, rows may hold several."""
        raise NotImplementedError

    def trunk(
        self,
        batch: Batch,
        *,
        sites: Sites,
        context: Context,
        cotangent_scales: jax.Array | None,
        constrain: Constrain,
    ) -> jax.Array:
        """What leaves the last block, `[B, T, D]`.

        Args:
          batch: the inputs.
          sites: the formats of every site.
          context: randomness and probes.
          cotangent_scales: f32[layers + 1], powers of two: by what the cotangents inside each block
            are multiplied, and last those outside of the blocks, which the cotangent of the result
            already is. None: by nothing.
          constrain: places an activation, given the logical names of its axes.
        """
        raise NotImplementedError

    def readout(self, x: jax.Array, sites: Sites, context: Context) -> tuple[jax.Array, Head]:
        """What the head reads of what left the trunk, `[B, T, D]`, and the head."""
        raise NotImplementedError

    def logits(self, x: jax.Array, sites: Sites, context: Context) -> jax.Array:
        """The output of the head, in the output format of its site, of what left the trunk."""
        read, head = self.readout(x, sites, context)
        return head(read, sites["head"], context.at("head"))


class Objective(Protocol):
    """What a model is trained for.

    It is given what left the trunk and not logits, so that it may fuse a head with its loss.

    Attributes:
      reads: what it needs of a batch of the data pipeline, by name.
    """

    reads: ClassVar[tuple[str, ...]] = ("inputs", "targets")

    def posed(self, batch: Batch, key: jax.Array | None) -> Batch:
        """A batch as the trunk and `loss` or `evaluate` read it; by default as it is.

        Args:
          batch: from the data pipeline.
          key: random, of this part of this step; None in evaluation, which is the same each time.
        """
        return batch

    def predictions(
        self, x: jax.Array, model: Assembly, batch: Batch, sites: Sites, context: Context
    ) -> jax.Array:
        """The logits of what is predicted in a posed batch, of what left the trunk."""
        return model.logits(x, sites, context)

    def loss(
        self,
        x: jax.Array,
        model: Assembly,
        batch: Batch,
        sites: Sites,
        context: Context,
        backward: Backward,
    ) -> jax.Array:
        """The mean loss of a batch in nats, a scalar in the compute format of the site `loss`.

        Args:
          x: what left the trunk, `[B, T, D]`.
          model: the parameters.
          batch: the inputs, and what the objective compares with.
          sites: the formats of every site.
          context: randomness and probes.
          backward: what the caller is going to multiply the loss by before it is differentiated.
        """
        ...

    def evaluate(
        self,
        x: jax.Array,
        model: Assembly,
        batch: Batch,
        sites: Sites,
        context: Context,
        constrain: Constrain = ANYWHERE,
    ) -> tuple[jax.Array, jax.Array]:
        """The summed nats of what counts in a batch and how much counts, at least f32[] each.

        What counts has a positive weight in `weights`; whatever the padding holds has no effect.
        `constrain` says how devices divide the rows.
        """
        ...
