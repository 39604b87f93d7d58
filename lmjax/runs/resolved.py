"""What a run's config decides, resolved once and passed on from there.

A policy may change with the step, so a run has phases. `resolve` fills in a config, parses the
policy of each phase and resolves its sites; whatever computes a step receives the `Phase`.

Knows configs, models and policies.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Final

from lmjax.model import Form, Sites, attention_forms, layout, param_sites, product_sums
from lmjax.precision.backend import Backend, this_backend
from lmjax.precision.native import Arithmetic, products
from lmjax.precision.policy import SitePolicy
from lmjax.precision.sites import Layout
from lmjax.runs.config import Config

ADAPTIVE: Final = ("dynamic", "predictive")
"""Kinds of loss scaling that need to see every overflow."""


@dataclass(frozen=True)
class Phase:
    """A phase of a run; phases that compute the same are equal, whenever they start.

    Attributes:
      config: resolved; its policy is that of this phase alone.
      start: number of steps attempted before its first.
      layout: the sites of the model, and where they are.
      sites: the formats of every site.
      param_sites: those of each parameter's site, by the parameter's path.
    """

    config: Config
    start: int = field(compare=False)
    layout: Layout = field(compare=False, repr=False)
    sites: Sites = field(compare=False, repr=False)
    param_sites: dict[str, SitePolicy] = field(compare=False, repr=False)

    def products(self, backend: Backend | None = None) -> dict[str, dict[str, Arithmetic]]:
        """How each product of the model is computed on a backend, by default this machine's."""
        rows = self.config.batch_size // self.config.micro_batches
        sums = product_sums(self.config.model, rows, self.config.context)
        return products(self.sites, sums, backend)

    def attention_forms(self, backend: Backend | None = None, parts: int = 1) -> dict[str, Form]:
        """How each attention is computed in an unwatched step, by the path of its softmax.

        On a backend, by default this machine's, with rows that devices divide into so many parts.
        """
        config = self.config
        return attention_forms(
            config.model,
            self.sites,
            backend or this_backend(),
            config.context,
            documents=config.data.document_mask,
            parts=parts,
        )


@dataclass(frozen=True)
class Resolved:
    """A run with everything that its config leaves open filled in.

    Attributes:
      config: as recorded in `config.json`.
      phases: first to last; the first starts at 0.
    """

    config: Config
    phases: tuple[Phase, ...]

    def at(self, step: int) -> Phase:
        """The phase that a step belongs to.

        Args:
          step: number of steps attempted before it, as in `TrainState.step`.
        """
        return [phase for phase in self.phases if phase.start <= step][-1]

    def after(self, steps: int) -> Phase:
        """The phase of a state after this many steps: that of its last step.

        The state is converted to the next phase's formats when that phase computes its first step.
        """
        return self.at(max(steps - 1, 0))


def resolve(config: Config) -> Resolved:
    """Fills in a config and resolves each phase of its policy."""
    config = config.resolved()
    if not config.policy.later:
        return Resolved(config, (_phase(config, 0),))
    alone = lambda policy: dataclasses.replace(config, precision=str(policy))
    return Resolved(
        config, tuple(_phase(alone(policy), start) for start, policy in config.policy.phases)
    )


def phase_of(config: Config | Phase) -> Phase:
    """The only phase of a run.

    Raises:
      ValueError: the policy changes with the step.
    """
    if isinstance(config, Phase):
        return config
    if config.policy.later:
        raise ValueError(
            f"the policy '{config.policy}' changes with the step; pass one phase of it, such as "
            "lmjax.train.resolve(config).at(step)"
        )
    return resolve(config).phases[0]


def _phase(config: Config, start: int) -> Phase:
    """The phase of a resolved config whose policy has no other."""
    (sites,) = config.sites_by_phase.values()
    if config.loss_scale.kind in ADAPTIVE:
        # Non-finite cotangents must skip the step and lower the scale, so no clamp may hide them.
        sites = {path: dataclasses.replace(s, cotangents="fail") for path, s in sites.items()}
    own = param_sites(config.model, sites)
    return Phase(config, start, layout(config.model), sites, own)
