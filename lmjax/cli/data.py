"""The output of `python -m lmjax prepare`: the contents of a corpus and its location."""

from __future__ import annotations

from lmjax.cli.common import print_json
from lmjax.data import DataConfig, TokenizedCorpus
from lmjax.files.filenames import printable


def show_prepared(config: DataConfig, corpus: TokenizedCorpus, *, json: bool) -> None:
    """Prints documents, tokens, the split, the folder and its size."""
    assert corpus.directory is not None
    size = sum(path.stat().st_size for path in corpus.directory.iterdir())
    tokenizer = corpus.tokenizer
    if json:
        print_json(
            {
                "dataset": config.dataset,
                "tokenizer": tokenizer.name,
                "vocab_size": tokenizer.vocab_size,
                "train_documents": corpus.train_documents,
                "train_tokens": int(corpus.train.size),
                "validation_documents": corpus.validation_documents,
                "validation_tokens": int(corpus.validation.size),
                "held_out": corpus.held_out,
                "directory": str(corpus.directory),
                "bytes": size,
            }
        )
        return
    documents = corpus.train_documents, corpus.validation_documents
    unit = "files" if config.dataset == "text_files" else "documents"
    print(
        f"{config.dataset} is ready for training with the tokenizer {tokenizer.name} of "
        f"{tokenizer.vocab_size:,} tokens"
    )
    print(f"training  {documents[0]:,} {unit}, {corpus.train.size:,} tokens")
    print(f"held out  {documents[1]:,} {unit}, {corpus.validation.size:,} tokens")
    if corpus.held_out:
        print(f"          {corpus.held_out}")
    print(f"folder    {printable(corpus.directory)}, {size / 1e6:,.2f} MB")
