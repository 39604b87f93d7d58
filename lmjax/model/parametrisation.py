"""Every parametrisation of a model, by the name that `model.parametrisation` gives it.

Knows the parametrisations and the model's config.
"""

from __future__ import annotations

from typing import Final

from lmjax.model.config import ModelConfig
from lmjax.model.standard import Standard
from lmjax.model.unit_scaling import UnitScaling

Parametrisation = Standard
"""What all of them are: the standard one, with what they change overridden."""

PARAMETRISATIONS: Final[dict[str, type[Parametrisation]]] = {
    "standard": Standard,
    "unit": UnitScaling,
}

IDENTITY: Final = Standard(ModelConfig())
"""For layers that stand alone."""


def parametrisation_of(config: ModelConfig) -> Parametrisation:
    """The parametrisation of a model."""
    return PARAMETRISATIONS[config.parametrisation](config)
