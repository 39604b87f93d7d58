"""lmjax: Transformer language models with number precision as an experimental variable."""
