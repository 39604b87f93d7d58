"""After training: smaller models of a trained one, quantized or pruned."""

from lmjax.compression.calibration import Calibration, calibration_batches
from lmjax.compression.prune import PruneConfig, PrunedModel, prune
from lmjax.compression.quantize import QuantizedModel, quantize
from lmjax.compression.request import QuantizeConfig

__all__ = [
    "Calibration",
    "PruneConfig",
    "PrunedModel",
    "QuantizeConfig",
    "QuantizedModel",
    "calibration_batches",
    "prune",
    "quantize",
]
