"""lmjax: Transformer language models with number precision as an experimental variable."""

import sys

_main = getattr(sys.modules.get("__main__"), "__spec__", None)
if _main is not None and _main.name.startswith("experiments."):
    # `python -m experiments.NAME`: nothing earlier in it can say that it is importing.
    from lmjax.console import opening

    opening.use_huge_pages()
    opening.begin()
