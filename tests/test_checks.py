"""Every field of every config has a declared type and range, and nothing else gets past it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_helpers import strict_loads

from lmjax import checks, strict_json
from lmjax.ablation.grid import Ablation
from lmjax.checks import above, at_least, between, from_to_below, power_of_two
from lmjax.cli import ablation as ablation_cli
from lmjax.cli import common as cli
from lmjax.cli import inference as inference_cli
from lmjax.cli import verbs
from lmjax.cli.plan import MeshSizes
from lmjax.parallel.distributed import DistributedConfig
from lmjax.runs.config import from_json, to_json
from lmjax.train import Config

BASE = Config()
ABLATION = Ablation(
    name="a", question="?", base=BASE, arms={"one": BASE}, varies=(), control="one", seeds=(0,)
)
INSTANCES = (
    BASE,
    cli.TrainFlags(config=BASE, workdir="run"),
    ablation_cli.AblationFlags(workdir=Path("run")),
    DistributedConfig(),
    MeshSizes(),
    ABLATION,
)
VERBS = [
    inference_cli.generate,
    inference_cli.score,
    inference_cli.evaluate,
    verbs.sites,
    verbs.plan,
    verbs.reproduce,
]

ANYTHING = st.one_of(
    st.floats(),
    st.integers(),
    st.integers(-3, 300),
    st.integers(-(2**70), 2**70),
    st.sampled_from([2.0**k for k in (-149, -127, -126, -64, -1, 0, 3, 64, 65, 127, 128, 1023)]),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 5e-324, 1 - 1e-12, 10**400]),
    st.booleans(),
    st.none(),
    st.text(max_size=5),
    st.sampled_from([np.float32(0.5), np.float64(3.0), np.int64(8), np.bool_(True), [1], "1", 1j]),
)


def replaced(config: Any, dotted: str, value: Any) -> Any:
    """A config with one field of it, or of a part of it, replaced."""
    name, _, rest = dotted.partition(".")
    if rest:
        value = replaced(getattr(config, name), rest, value)
    return dataclasses.replace(config, **{name: value})


def refusal(config: Any, field: str, value: Any) -> tuple[Any, str]:
    """The config with that value, or why it is refused."""
    try:
        return replaced(config, field, value), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("config", INSTANCES, ids=lambda config: type(config).__module__)
def test_every_numeric_field_declares_a_range(config: Any) -> None:
    ranges = checks.numeric_fields(type(config))
    assert [name for name, declared in ranges.items() if declared is None] == []


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: v.__name__)
def test_every_numeric_flag_of_a_verb_declares_a_range(verb: Any) -> None:
    assert [name for name, declared in checks.signature_of(verb).items() if declared is None] == []


def test_a_number_without_a_range_is_a_mistake_of_the_config() -> None:
    @dataclasses.dataclass(frozen=True)
    class Forgetful:
        rate: float = 1.0

    with pytest.raises(TypeError, match="rate declares no range"):
        checks.validate(Forgetful())


@pytest.mark.parametrize("field", checks.numeric_fields(Config))
@settings(max_examples=60)
@given(value=ANYTHING)
def test_any_value_of_a_numeric_field_is_refused_by_name_or_kept_exactly(
    field: str, value: Any
) -> None:
    config, why = refusal(BASE, field, value)
    if config is None:
        assert field.replace("_", "-") in why.replace("_", "-")
        assert len(why.splitlines()) == 1
        assert len(why) < 400
        return
    text = strict_json.dumps(to_json(config))
    assert from_json(strict_loads(text)) == config
    assert repr(from_json(strict_loads(text))) == repr(config), "equal but not the same"


@pytest.mark.parametrize("instance", INSTANCES[1:], ids=lambda c: type(c).__module__)
@settings(max_examples=60)
@given(value=ANYTHING, data=st.data())
def test_other_settings_are_refused_by_name_too(instance: Any, value: Any, data: Any) -> None:
    names = [n for n in checks.numeric_fields(type(instance)) if "config." not in n]
    names = [name for name in names if not name.startswith(("base.", "arms"))]
    name = data.draw(st.sampled_from(names))
    _, why = refusal(instance, name, value)
    assert name.rpartition(".")[2] in why if why else not isinstance(value, str | complex | bool)


NOT_NUMBERS = {
    "precision": (None, 3),
    "optimizer.name": ("adma", None, 3),
    "optimizer.schedule": ("cosin",),
    "optimizer.no_decay": ("**/bias", (1,), None),
    "model": (None, {}, 3),
    "model.bias": ("False", 0, None),
    "model.positions": ("rotary",),
    "loss_scale.kind": ("dynamik",),
    "data.files": ("*.txt", (b"x",)),
    "data.cache_dir": (None, 3),
    "restore.allow_cast": ("yes", 1),
    "telemetry.exact": (1,),
}


@pytest.mark.parametrize("field", NOT_NUMBERS)
def test_what_is_of_another_type_is_refused_by_name(field: str) -> None:
    for value in NOT_NUMBERS[field]:
        with pytest.raises(ValueError, match=field.replace(".", r"\.")):
            replaced(BASE, field, value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("optimizer.clip_norm", math.inf, "0 switches clipping off"),
        ("optimizer.clip_norm", math.nan, "finite number, at least 0"),
        ("optimizer.learning_rate", 0.0, "above 0"),
        ("optimizer.learning_rate", 1e39, "at most 3.40282e+38"),
        ("optimizer.learning_rate", 1e-60, "which is 0 in f32"),
        ("optimizer.eps", 1e-40, "which is 0 in f32"),
        ("optimizer.b2", 1 - 1e-9, "which is 1 in f32"),
        ("optimizer.name", "adma", "did you mean 'adamw'"),
        ("model.norm_epsilon", 0.0, "above 0"),
        ("steps", 1e3, "whole number"),
        ("steps", True, "whole number"),
        ("steps", 2**31, "at most 2147483647"),
        ("seed", 2**64, "at most 2**64 - 1"),
        ("loss_multiplier", 3.0, "power of two"),
    ],
)
def test_messages_say_what_to_write(field: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is ") as error:
        replaced(BASE, field, value)
    assert words in str(error.value)


def test_numbers_of_other_libraries_become_pythons_own() -> None:
    config = replaced(replaced(BASE, "seed", np.int64(3)), "optimizer.b2", np.float32(0.5))
    config = replaced(config, "optimizer.learning_rate", 1)
    config = replaced(config, "optimizer.weight_decay", -0.0)
    config = replaced(config, "optimizer.no_decay", ["a", "b"])
    assert type(config.seed) is int
    assert repr(config.optimizer.learning_rate) == "1.0"
    assert repr(config.optimizer.weight_decay) == "0.0"
    assert config.optimizer.no_decay == ("a", "b")
    assert hash(config)


@pytest.mark.parametrize(
    ("declared", "inside", "outside"),
    [
        (at_least(0), (0.0, 5e30), (-1.0, -1e-30, 3.5e38)),
        (at_least(0, 1), (0.0, 1.0), (1.1, -0.1)),
        (above(0), (2.0**-126, 1.0), (0.0, -1.0)),
        (from_to_below(0, 1), (0.0, 0.5), (1.0,)),
        (between(0, 1), (0.5,), (0.0, 1.0)),
        (power_of_two(), (2.0**-100, 1.0, 4.0), (0.0, 3.0, -2.0)),
        (at_least(1, also=(-1,)), (-1.0, 1.0), (0.0, -2.0)),
    ],
)
def test_ranges(declared: checks.Range, inside: tuple[float], outside: tuple[float]) -> None:
    largest = checks.LARGEST_F32
    assert all(declared.holds(value, largest) for value in inside)
    assert not any(declared.holds(value, largest) for value in (*outside, math.nan, math.inf))


def test_arguments_of_a_command_are_refused_by_flag() -> None:
    def command(top_k: Annotated[int, at_least(0)] = 0) -> None: ...

    checks.validate_arguments(command, {"top_k": 3})
    with pytest.raises(ValueError, match="--top-k is -1; it must be at least 0"):
        checks.validate_arguments(command, {"top_k": -1})


# --- JSON


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', '{"a": 1, "a": 2}', "{"])
def test_what_is_not_json_is_not_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"not JSON|twice|Expecting"):
        strict_json.loads(text)


def test_what_json_lacks_is_written_as_text() -> None:
    text = strict_json.dumps({"a": math.nan, "b": (np.float64("inf"), -math.inf, 1.5)})
    assert strict_loads(text) == {"a": "nan", "b": ["inf", "-inf", 1.5]}
