"""Text comes as it is generated, in whole characters; numbers that are not finite end it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import strict_loads, tiny

from lmjax.cli import common as cli
from lmjax.cli import verbs
from lmjax.inference import (
    NonFiniteError,
    Score,
    TrainedModel,
    evaluate,
    generate,
    load_model,
    score,
    stream,
)
from lmjax.inference.sampling import NOT_FINITE
from lmjax.train import train

generate_module = importlib.import_module("lmjax.inference.generate")


@pytest.fixture(scope="module")
def workdir(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with more tokens than its tokenizer has."""
    folder = tmp_path_factory.mktemp("stream") / "run"
    train(tiny(home, steps=2, model={"vocab_size": 300}), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def model(workdir: Path) -> TrainedModel:
    return load_model(workdir)


class Script:
    """In the place of what grows the texts: says its tokens one by one, whatever it reads."""

    def __init__(self, tokens: Iterator[int | float], calls: list[int], limit: int):
        self.unfinished, self._tokens, self._calls, self._limit = True, tokens, calls, limit
        self._count = 0

    def drawn(self) -> list[list[int]]:
        """The next token, NOT_FINITE for a NaN."""
        self._count += 1
        self._calls.append(self._count)
        token = next(self._tokens)
        token = NOT_FINITE if math.isnan(token) else int(token)
        self.unfinished = self._count < self._limit and token not in (END, NOT_FINITE)
        return [[token]]

    def finish(self, row: int) -> None:
        """Says no more."""
        self.unfinished = False


def says(monkeypatch: pytest.MonkeyPatch, tokens: Sequence[int | float]) -> list[int]:
    """Makes models say these bytes, whatever they read; a NaN stands for logits with one.

    Returns:
      How many tokens each call had drawn.
    """
    script, calls = iter(tokens), []
    make = lambda model, ids, samplers, how: Script(script, calls, how.tokens)
    monkeypatch.setattr(generate_module, "Growing", make)
    return calls


def lmjax(*arguments: str) -> int:
    """The exit code of `python -m lmjax arguments`, in this process."""
    with pytest.raises(SystemExit) as error:
        verbs.main(arguments)
    return int(error.value.code or 0)


END = 0xFF
SAID = "Жx日本😀!"


# --- The iterator ---


def test_pieces_are_whole_characters_as_soon_as_they_are_there(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = says(monkeypatch, [*SAID.encode(), END])
    seen = []
    pieces = stream(model, "")
    for piece in pieces:
        seen.append((piece, len(calls), pieces.tokens, pieces.ended))
    ends = np.cumsum([len(c.encode()) for c in SAID]).tolist()
    assert seen == [(c, end, end, False) for c, end in zip(SAID, ends, strict=True)]
    assert pieces.ended
    assert pieces.tokens == ends[-1]
    assert list(pieces) == []


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (b"\xd0", "\ufffd"),
        (b"a\xd0b", "a\ufffdb"),
        (b"\xf0\x9f\x98", "\ufffd"),
        (b"\xf0\x9fa\x98\xd0\xd0\x96", "\ufffda\ufffd\ufffd\u0416"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
    ],
)
def test_broken_utf8_is_marked_as_in_decode(
    said: bytes, text: str, model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, [*said, END])
    assert "".join(stream(model, "")) == text == model.tokenizer.decode(list(said))


def test_a_character_that_the_limit_cuts_off_is_left_out(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit, text in [(1, ""), (2, "Ж"), (3, "Жx"), (5, "Жx"), (6, "Жx日")]:
        says(monkeypatch, SAID.encode())
        assert generate(model, "", tokens=limit) == text


def test_a_limit_is_not_the_end_of_the_document(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = says(monkeypatch, b"xxxxx")
    pieces = stream(model, "", tokens=3)
    assert "".join(pieces) == "xxx"
    assert (pieces.ended, pieces.tokens, len(calls)) == (False, 3, 3)
    nothing = stream(model, "", tokens=0)
    assert (list(nothing), nothing.ended, len(calls)) == ([], False, 3)


def test_streaming_changes_no_text(model: TrainedModel) -> None:
    settings: dict[str, Any] = {"tokens": 30, "temperature": 3.0, "seed": 6}
    first, again = (list(stream(model, "the", **settings)) for _ in range(2))
    assert first == again
    assert "".join(first) == generate(model, "the", **settings)
    assert len(first) > 10


def test_settings_are_refused_before_the_first_token(model: TrainedModel) -> None:
    refused = {"tokens": (-1, 1.5), "temperature": (math.nan,), "stop": ("", ["a", ""], [1])}
    for name, values in (refused | {"window": (0, 65), "top_p": (0,), "seed": (-1,)}).items():
        for value in values:
            with pytest.raises(ValueError, match=rf"^{name}\b"):
                stream(model, "", **{name: value})
    with pytest.raises(TypeError, match="top_q"):
        stream(model, "", top_q=1)


# --- The command line ---


def show(capsys: pytest.CaptureFixture[str], workdir: Path, *flags: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = lmjax("generate", str(workdir), *flags)
    return code, *capsys.readouterr()


def test_what_goes_to_a_file_is_the_text_alone(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither wrapped nor coloured, nor read as markup; control characters too."""
    text = "[red]x[/red] :cat: " + "слово " * 40 + "\t\x1b[31m\x07\r\x00."
    says(monkeypatch, [*text.encode(), END])
    code, out, err = show(capsys, workdir, "--prompt", "日本 ", "--tokens", "900")
    assert (code, out) == (cli.DONE, f"日本 {text}\n")
    assert err.strip() == f"the model ended the document after {len(text.encode())} tokens"


def test_a_terminal_gets_pictures_of_control_characters() -> None:
    assert cli.visible("a\tb\nж😀") == "a\tb\nж😀"
    assert cli.visible("\x1b[31m\x00\r\x7f\x9b") == "\u241b[31m\u2400\u240d\u2421\ufffd"


def test_json_says_whether_the_model_ended_the_document(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says(monkeypatch, [*b"ab", END, *b"abc"])
    for limit, ended in (("5", True), ("2", False)):
        code, out, err = show(capsys, workdir, "--prompt", "x", "--tokens", limit, "--json")
        found = {"prompt": "x", "text": "ab", "tokens": 2, "ended": ended}
        found |= {"stopped_by": None, "step": 2}
        assert (code, strict_loads(out), err) == (cli.DONE, found, "")


# --- Numbers that are not finite ---


def poisoned(model: TrainedModel, value: float) -> TrainedModel:
    """The model with one number of a norm replaced."""
    scale = np.array(model.params["norm"]["scale"])
    scale[3] = value
    return dataclasses.replace(
        model, params=model.params | {"norm": model.params["norm"] | {"scale": scale}}
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("flags", [{}, {"temperature": 0.0}, {"top_k": 1}, {"top_k": 2}])
def test_a_model_that_computes_nan_says_nothing(
    flags: dict[str, Any], value: float, model: TrainedModel
) -> None:
    words = r"logits of token 1 of the continuation are not finite, at step 2 .*norm/scale"
    with pytest.raises(NonFiniteError, match=words):
        generate(poisoned(model, value), "the", **flags)


def test_a_nan_is_neither_a_score_nor_an_evaluation(model: TrainedModel) -> None:
    bad = poisoned(model, math.nan)
    with pytest.raises(NonFiniteError, match=r"logits of token 1 of the text are not finite"):
        score(bad, "the")
    with pytest.raises(NonFiniteError, match=r"losses in batch 1 of the validation split"):
        evaluate(bad, progress=False)


def test_logits_that_overflow_are_an_error_even_if_the_score_is_finite(
    workdir: Path, model: TrainedModel
) -> None:
    """In f16 one token's logit becomes -inf; that of the text's own tokens stays finite."""
    table = np.array(model.params["embed"]["table"])
    table[299] = -60000 * np.sign(model.params["norm"]["bias"] + 1e-3)
    scale = np.full_like(model.params["norm"]["scale"], 30)
    params = model.params | {
        "embed": {"table": table},
        "norm": model.params["norm"] | {"scale": scale},
    }
    narrow = dataclasses.replace(load_model(workdir, precision="p=f32,c=f16"), params=params)
    with pytest.raises(NonFiniteError, match=r"format is too narrow.*--precision f32"):
        score(narrow, "the")


def test_the_command_line_exits_with_1_and_one_line(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says(monkeypatch, [ord("a"), ord("b"), math.nan])
    code, out, err = show(capsys, workdir, "--prompt", "x")
    assert (code, out) == (cli.FAILED, "xab\n")
    assert err.startswith("error: the logits of token 3 of the continuation are not finite")
    assert len(err.splitlines()) == 1


# --- Scores ---


@pytest.mark.parametrize("text", ["the", "Жx日本", "😀", "e\u0301\u200d\n"])
def test_a_piece_is_a_character_of_several_tokens(text: str, model: TrainedModel) -> None:
    scored = score(model, text)
    assert [piece.text for piece in scored.pieces] == list(text)
    assert [piece.tokens for piece in scored.pieces] == [len(c.encode()) for c in text]
    parts: Iterator[float] = iter(scored.log_probabilities)
    for piece in scored.pieces:
        assert piece.log_probability == math.fsum(next(parts) for _ in range(piece.tokens))
    assert math.fsum(p.log_probability for p in scored.pieces) == pytest.approx(scored.total)


@pytest.mark.parametrize(
    ("nats", "written"),
    [
        (0.0, "1"),
        (math.log(0.5), "0.5"),
        (math.log(0.00123), "0.0012"),
        (math.log(3.2e-5), "3.2e-5"),
        (-332.7114, "3.2e-145"),
        (-145 * math.log(10), "1.0e-145"),
        (math.log(9.97) - 2000 * math.log(10), "1.0e-1999"),
        (-1e7, "1.5e-4342945"),
    ],
)
def test_a_probability_far_below_any_float_is_written(nats: float, written: str) -> None:
    scored = Score(("a",), (nats,), (), 1)
    assert scored.probability == written
    assert scored.log10 == pytest.approx(nats / math.log(10))


def test_the_table_of_a_score_is_readable(
    workdir: Path, model: TrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Жx日 [b]\n"
    capsys.readouterr()
    assert lmjax("score", str(workdir), "--text", text) == cli.DONE
    out = capsys.readouterr().out
    scored = score(model, text)
    lines = out.splitlines()
    shown = [line.split()[0] for line in lines[1 : 1 + len(text)] if line[:3] != "' '"]
    assert shown == [repr(character) for character in text if character != " "]
    for words in (
        f"log P = {scored.total:.4f} nats over {len(text.encode())} tokens",
        f"P = {scored.probability}",
        f"{scored.bits_per_byte:.4f} bits per byte",
    ):
        assert words in out
    assert lmjax("score", str(workdir), "--text", text, "--json") == cli.DONE
    found = strict_loads(capsys.readouterr().out)
    assert found["log10_probability"] == scored.log10
    assert found["pieces"] == json.loads(json.dumps([dataclasses.asdict(p) for p in scored.pieces]))
    assert len(found["per_token"]) == len(text.encode())


def test_stdout_is_flushed_piece_by_piece(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader of the pipe sees a piece before the next token is drawn."""
    seen: list[str] = []
    says(monkeypatch, [*"aж".encode(), END])
    monkeypatch.setattr("lmjax.cli.inference.write_text", seen.append)
    assert lmjax("generate", str(workdir), "--prompt", "x") == cli.DONE
    assert seen == ["xa", "ж", "\n"]
