"""Models as Hugging Face lays them out, in and out: names, fields, files and tensors.

A table of architectures, `architectures.py`, has one small file for each. The only room that knows
safetensors.
"""

from lmjax.interop.exchange import Made, export_run, import_run
from lmjax.interop.origin import settings_of
from lmjax.interop.reading import Pretrained, pretrained

__all__ = ["Made", "Pretrained", "export_run", "import_run", "pretrained", "settings_of"]
