"""The data room: from text to batches of token ids.

text -> TFDS (array_record) -> tokens, once, memory-mapped -> grain windows, by host. The only room
that knows TFDS, grain and tokenizers; imports nothing else of lmjax. Importing it does not import
TFDS, which is needed only to build a corpus.
"""

from __future__ import annotations

from lmjax.data.config import DataConfig
from lmjax.data.corpus import TokenizedCorpus, prepare, tokenized_corpus
from lmjax.data.errors import CacheFailed, DataError
from lmjax.data.pipeline import document_starts, train_iterator, validation_batches
from lmjax.data.rows import document_rows
from lmjax.data.tokenizer_files import holds_tokenizer, load_tokenizer, read_tokenizer
from lmjax.data.tokenizers import ByteTokenizer, Tokenizer

__all__ = [
    "ByteTokenizer",
    "CacheFailed",
    "DataConfig",
    "DataError",
    "TokenizedCorpus",
    "Tokenizer",
    "document_rows",
    "document_starts",
    "holds_tokenizer",
    "load_tokenizer",
    "prepare",
    "read_tokenizer",
    "tokenized_corpus",
    "train_iterator",
    "validation_batches",
]
