"""Continues texts, alone or several at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lmjax.inference.finite import not_finite
from lmjax.inference.growing import Generation, Growing
from lmjax.inference.run import TrainedModel, refuse_encoder
from lmjax.inference.sampling import NOT_FINITE, Sampler
from lmjax.inference.text import GrowingText


def generate(model: TrainedModel, prompt: str, **settings: Any) -> str:
    """Returns the model's continuation of a prompt: everything that `stream` yields."""
    return "".join(stream(model, prompt, **settings))


def generate_batch(
    model: TrainedModel, prompts: Sequence[str], *, seeds: Sequence[int] = (), **settings: Any
) -> list[str]:
    """Returns the model's continuation of each prompt; see `stream_batch`."""
    texts = [""] * len(prompts)
    for row, piece in stream_batch(model, prompts, seeds=seeds, **settings):
        texts[row] += piece
    return texts


def stream(model: TrainedModel, prompt: str, **settings: Any) -> Continuation:
    """Continues a prompt piece by piece.

    The text ends after `tokens` tokens, where the model ends the document, or before a stop string.
    Each token is read once; its keys and values are kept, in the formats of the policy, until the
    context is full. Then the last half of the context is reread as the beginning of a text, so
    every token is drawn from at least half a context. If the prompt exceeds the context, only its
    last tokens are read. The same arguments give the same text.

    Args:
      model: from `load_model`.
      prompt: text to continue; empty: the start of a document.
      **settings: fields of `Generation`.

    Returns:
      An iterator over strings of whole characters. Bytes that are not UTF-8 become U+FFFD; an
      incomplete character after the last of `tokens` tokens is dropped.

    Raises:
      InputError: the model is an encoder.
      ValueError: a setting has another type or is out of range.
      NonFiniteError: while iterating, if the logits of a token contain NaN or infinity.
    """
    return Continuation(stream_batch(model, [prompt], **settings))


def stream_batch(
    model: TrainedModel, prompts: Sequence[str], *, seeds: Sequence[int] = (), **settings: Any
) -> Continuations:
    """Continues several prompts at the same time; they may differ in length.

    Each continuation is that of `stream`, whatever the other prompts are: to the bit for as many
    prompts and a cache as long, and else up to the order of sums, which can decide between tokens
    that are nearly equally likely.

    Args:
      model: from `load_model`.
      prompts: at least one.
      seeds: one for each prompt; empty: all use the seed of the settings, as they would alone.
      **settings: fields of `Generation`.

    Returns:
      An iterator over pairs of the index of a prompt and the next characters of its continuation.

    Raises:
      As `stream`; and ValueError if there are no prompts or not as many seeds.
    """
    refuse_encoder(model)
    stop = settings.get("stop", ())
    settings["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    how = Generation(**settings)
    if not prompts:
        raise ValueError("there are no prompts to continue; give at least one, which may be empty")
    if len(seeds) not in (0, len(prompts)):
        raise ValueError(f"there are {len(seeds)} seeds for {len(prompts)} prompts; give one each")
    samplers = [
        Sampler(model.tokenizer.vocab_size, how, seed)
        for seed in seeds or [how.seed] * len(prompts)
    ]
    encode = model.tokenizer.encode
    start = model.tokenizer.start_of_document
    texts = [[start, *map(int, encode(prompt))] for prompt in prompts]
    return Continuations(model, texts, samplers, how)


class Continuations(Iterator[tuple[int, str]]):
    """Texts that are being continued; see `stream_batch`.

    Attributes:
      texts: what each continuation is so far: number of tokens, and why it ended.
    """

    def __init__(
        self,
        model: TrainedModel,
        ids: Sequence[Sequence[int]],
        samplers: Sequence[Sampler],
        how: Generation,
    ):
        """See `stream_batch`; `ids` are the tokens so far, including the start of the document."""
        self.texts = tuple(GrowingText(how.stop) for _ in ids)
        self._model, self._limit = model, how.tokens
        self._pieces = self._whole_characters(ids, samplers, how)

    def __next__(self) -> tuple[int, str]:
        """The next whole characters of one of the texts."""
        return next(self._pieces)

    def _whole_characters(
        self, ids: Sequence[Sequence[int]], samplers: Sequence[Sampler], how: Generation
    ) -> Iterator[tuple[int, str]]:
        if not how.tokens:
            return
        growing = Growing(self._model, ids, samplers, how)
        while growing.unfinished:
            for row, tokens in enumerate(growing.drawn()):
                for piece in self._added(row, tokens):
                    yield row, piece
                if self.texts[row].stopped_by:
                    growing.finish(row)

    def _added(self, row: int, tokens: Sequence[int]) -> Iterator[str]:
        """The characters that a text grows by with some tokens."""
        text, tokenizer = self.texts[row], self._model.tokenizer
        for token in tokens:
            if token == NOT_FINITE:
                of = f" of prompt {row + 1}" if len(self.texts) > 1 else ""
                what = f"the logits of token {text.tokens + 1} of the continuation{of}"
                raise not_finite(self._model, what)
            document = token == tokenizer.end_of_document
            piece = "" if document else text.add(tokenizer.bytes_of([token]))
            if not text.stopped_by and (document or text.tokens == self._limit):
                piece += text.end(document=document)
            if piece:
                yield piece
            if text.stopped_by:
                return


class Continuation(Iterator[str]):
    """One text that is being continued; see `stream`."""

    def __init__(self, one: Continuations):
        """Continuations of a single prompt."""
        self._one = one
        self._text = one.texts[0]

    def __next__(self) -> str:
        """The next whole characters."""
        return next(self._one)[1]

    @property
    def tokens(self) -> int:
        """How many tokens the text has so far, up to the one that completed a stop string."""
        return self._text.tokens

    @property
    def ended(self) -> bool:
        """Whether the model has ended the document."""
        return self._text.ended

    @property
    def stopped_by(self) -> str:
        """The stop string that ended the text; empty: none did."""
        return self._text.stopped_by
