"""Several texts are continued at once, each as it would be alone; stop strings end them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from run_helpers import strict_loads, tiny

from lmjax.cli import verbs
from lmjax.inference import (
    Generation,
    TrainedModel,
    generate,
    generate_batch,
    load_model,
    stream,
    stream_batch,
)
from lmjax.inference.growing import Growing
from lmjax.inference.sampling import Sampler
from lmjax.inference.text import GrowingText
from lmjax.train import train

PROMPTS = ("the qu", "", "the quick brown fox jumps", "the lazy")
DRAWN: dict[str, Any] = {"tokens": 40, "temperature": 1.2, "top_p": 0.9, "seed": 3}


@pytest.fixture(scope="module")
def workdir(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context of 16: continuations of 40 tokens overflow it, each row at another time."""
    folder = tmp_path_factory.mktemp("batch") / "run"
    train(tiny(home, steps=60), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def model(workdir: Path) -> TrainedModel:
    return load_model(workdir)


@pytest.fixture(scope="module")
def together(model: TrainedModel) -> list[str]:
    return generate_batch(model, PROMPTS, **DRAWN)


def test_each_text_is_that_of_its_prompt_alone(model: TrainedModel, together: list[str]) -> None:
    assert together == [generate(model, prompt, **DRAWN) for prompt in PROMPTS]
    assert len(set(together)) == 4
    greedy = DRAWN | {"temperature": 0.0, "repetition_penalty": 1.3}
    found = generate_batch(model, PROMPTS, **greedy)
    assert found == [generate(model, prompt, **greedy) for prompt in PROMPTS]


@pytest.mark.parametrize("window", [1, 7, 64])
def test_neither_order_nor_window_changes_a_text(
    window: int, model: TrainedModel, together: list[str]
) -> None:
    found = generate_batch(model, PROMPTS[::-1], window=window, **DRAWN)
    assert found[::-1] == together


def test_a_row_is_the_same_to_the_bit_whatever_the_others_are(model: TrainedModel) -> None:
    """Keys and values of 7 + 4 positions, in a cache that others share."""

    def entries(prompts: tuple[str, ...]) -> Any:
        how = Generation(tokens=5, temperature=0.0)
        ids = [[255, *model.tokenizer.encode(prompt)] for prompt in prompts]
        growing = Growing(model, ids, [Sampler(256, how, 0)] * len(ids), how)
        return growing.drawn(), growing._cache

    one, cache = entries(("the qu", "fox", "a"))
    two, other = entries(("dog dog dog", "the qu", ""))
    assert one[0] == two[1]
    assert len(one[0]) == 5
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a)[0], np.asarray(b)[1]
        np.testing.assert_array_equal(a[..., :11, :11], b[..., :11, :11])


@pytest.mark.long
@pytest.mark.parametrize("policy", ["mixed_bf16", "mixed_f16,kv=int8@channel", "fp8"])
def test_rows_do_not_see_each_other_under_any_policy(policy: str, model: TrainedModel) -> None:
    """Neither factors nor the cache are shared: the same whatever the others are."""
    narrow = model.under(policy)
    found = generate_batch(narrow, PROMPTS, **DRAWN)
    assert generate_batch(narrow, PROMPTS[::-1], **DRAWN)[::-1] == found
    others = generate_batch(narrow, ["the qu", "fox fox fox", "a", "then"], **DRAWN)
    assert others[0] == found[0]


def test_one_seed_for_each_text(model: TrainedModel, together: list[str]) -> None:
    seeds = [3, 6, 3, 7]
    found = generate_batch(model, ["the qu"] * 4, seeds=seeds, **DRAWN)
    assert found[0] == found[2] == together[0]
    assert len(set(found)) == 3
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        stream_batch(model, ["a", "b"], seeds=[1])
    with pytest.raises(ValueError, match="no prompts"):
        stream_batch(model, [])


def test_rows_end_one_by_one(model: TrainedModel, together: list[str]) -> None:
    """A row that a stop string ended says no more; others are what they would have been."""
    stop = together[0][:2]
    pieces = stream_batch(model, PROMPTS, stop=stop, window=5, **DRAWN)
    texts = [""] * 4
    for row, piece in pieces:
        texts[row] += piece
    for found, whole, state in zip(texts, together, pieces.texts, strict=True):
        assert found == whole.partition(stop)[0]
        assert state.stopped_by == (stop if stop in whole else "")
    assert (texts[0], pieces.texts[0].tokens) == ("", 2)
    assert max(state.tokens for state in pieces.texts) == 40


def test_a_poisoned_row_is_named(model: TrainedModel) -> None:
    scale = np.array(model.params["norm"]["scale"]) * np.nan
    norm = model.params["norm"] | {"scale": scale}
    bad = dataclasses.replace(model, params=model.params | {"norm": norm})
    with pytest.raises(RuntimeError, match="token 1 of the continuation of prompt 1 are not"):
        generate_batch(bad, ["a", "b"])


# --- Stop strings ---


def said(text: str | bytes, stop: tuple[str, ...], size: int = 1) -> tuple[list[str], GrowingText]:
    """What a text of tokens of `size` bytes each gives out, and what it is in the end."""
    data, growing = text if isinstance(text, bytes) else text.encode(), GrowingText(stop)
    pieces = []
    for start in range(0, len(data), size):
        pieces.append(growing.add(data[start : start + size]))
        if growing.stopped_by:
            return pieces, growing
    return [*pieces, growing.end(document=True)], growing


@pytest.mark.parametrize("size", [1, 2, 3, 5, 50])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\ntwo\n\nthree", ("\n\n",), "one\ntwo"),
        ("aaab", ("aab",), "a"),
        ("abacabad", ("abad", "cab"), "aba"),
        ("xab", ("ab", "xab"), ""),
        ("xabc", ("xabc", "ab"), "x"),
        ("Жx日本😀!", ("本😀",), "Жx日"),
        ("no such thing", ("thinG", "zz"), "no such thing"),
        ("ends with the star", ("start",), "ends with the star"),
    ],
)
def test_a_text_ends_before_the_first_stop_string_however_tokens_cut_it(
    size: int, text: str, stop: tuple[str, ...], expected: str
) -> None:
    pieces, growing = said(text, stop, size)
    assert "".join(pieces) == expected
    assert growing.stopped_by == (
        "" if expected == text else next(s for s in stop if text.startswith(expected + s))
    )


def test_what_may_begin_a_stop_string_is_held_back_and_nothing_else() -> None:
    pieces, _ = said("ab\n\nUser: x", ("\n\nUser:", "\nQ"))
    assert pieces == ["a", "b", *[""] * 6, ""]
    pieces, _ = said("ab\n\nUse it", ("\n\nUser:",))
    assert pieces == ["a", "b", *[""] * 5, "\n\nUse ", "i", "t", ""]
    growing = GrowingText(("\n\n",))
    assert [growing.add(b"a\n"), growing.end(document=False)] == ["a", "\n"]


def test_broken_characters_are_text_too() -> None:
    pieces, growing = said(b"a\xd0b", ("\ufffdb",))
    assert "".join(pieces) == "a"
    assert growing.stopped_by == "\ufffdb"


def test_the_text_of_a_stop_string_is_counted_in_tokens(model: TrainedModel) -> None:
    whole = generate(model, "the", tokens=30, temperature=1.0)
    stop = whole[10:13]
    pieces = stream(model, "the", tokens=30, temperature=1.0, stop=stop)
    assert "".join(pieces) == whole.partition(stop)[0]
    assert (pieces.stopped_by, pieces.ended) == (stop, False)
    assert pieces.tokens == len(whole.partition(stop)[0]) + 3


# --- The command line ---


def lmjax(*arguments: str) -> int:
    with pytest.raises(SystemExit) as error:
        verbs.main(arguments)
    return int(error.value.code or 0)


def test_several_prompts_on_the_command_line(
    workdir: Path, model: TrainedModel, together: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tokens", "40", "--temperature", "1.2", "--top-p", "0.9", "--seed", "3"]
    flags += [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    stop = together[1][5:9]
    capsys.readouterr()
    assert lmjax("generate", str(workdir), *flags, "--stop", stop) == 0
    out, err = capsys.readouterr()
    expected = [text.partition(stop)[0] for text in together]
    rows = [prompt + text + "\n" for prompt, text in zip(PROMPTS, expected, strict=True)]
    assert out == "\n".join(rows)
    assert f"prompt 2: stopped before {stop!r} after 9 tokens" in err
    assert lmjax("generate", str(workdir), *flags, "--json") == 0
    found = strict_loads(capsys.readouterr().out)
    assert [row["text"] for row in found["continuations"]] == together
    assert found["continuations"][0] == {
        "prompt": "the qu",
        "text": together[0],
        "tokens": 40,
        "ended": False,
        "stopped_by": None,
    }


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--top-p", "0"), ("--top-p", "nan"), ("--min-p", "1.5"), ("--repetition-penalty", "0"),
     ("--stop", ""), ("--window", "0"), ("--temperature", "-1")],
)  # fmt: skip
def test_bad_settings_are_one_line(
    flag: str, value: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert lmjax("generate", str(workdir), flag, value) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert flag.lstrip("-") in err.replace("_", "-")
