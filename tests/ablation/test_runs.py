"""Runs that were trained one by one, compared by `python -m lmjax report`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from ablation_helpers import write_run
from run_helpers import strict_loads

from lmjax.ablation.runs import ablation_of
from lmjax.cli import common as cli
from lmjax.cli import verbs
from lmjax.optim.optimizer import OptimizerConfig
from lmjax.runs.config import to_json
from lmjax.train import Config, InputError

BASE = Config(steps=10, precision="f32")
BF16 = dataclasses.replace(BASE, precision="mixed_bf16")
F32_ARM, BF16_ARM = (f"precision {config.resolved().precision}" for config in (BASE, BF16))


def trained(directory: Path, config: Config, eval_loss: float | None = 2.0, **columns: Any) -> Path:
    """The directory of a run with that config; without `eval_loss` it has not ended."""
    write_run(directory, {5: 2.5, 10: 2.1}, eval_loss=eval_loss, **columns)
    text = json.dumps(to_json(config.resolved()))
    (directory / "config.json").write_text(text, encoding="utf-8")
    return directory


def seeded(config: Config, seed: int) -> Config:
    """The same with another seed."""
    return dataclasses.replace(config, seed=seed)


def lmjax(*arguments: Any) -> int:
    """The exit code of `python -m lmjax report`, in this process."""
    with pytest.raises(SystemExit) as ended:
        verbs.main(("report", *map(str, arguments)))
    return ended.value.code or cli.DONE


def test_configs_are_arms_and_seeds_are_paired(tmp_path: Path) -> None:
    losses = {"f32": [2.0, 2.1, 2.2], "bf16": [2.3, 2.4, 2.5]}
    runs = [
        trained(tmp_path / f"{name}-{seed}", seeded(config, seed), losses[name][seed])
        for seed in (2, 0, 1)
        for name, config in (("f32", BASE), ("bf16", BF16))
    ]
    ablation, cells = ablation_of(runs)
    assert (ablation.control, *ablation.arms) == (F32_ARM, F32_ARM, BF16_ARM)
    assert ablation.varies == ("precision",)
    assert ablation.seeds == (0, 1, 2)
    found = {(cell.arm, cell.seed): (cell.value, cell.directory.name) for cell in cells}
    assert found[F32_ARM, 2] == (2.2, "f32-2")
    assert found[BF16_ARM, 0] == (2.3, "bf16-0")

    assert lmjax(*runs, "--json") == cli.DONE
    assert (tmp_path / "report.html").exists()


def test_where_it_is_written_and_what_it_says(tmp_path: Path, capsys: Any) -> None:
    runs = [
        trained(tmp_path / f"{number}" / "run", seeded(config, number % 3), 2.0 + number // 3 / 10)
        for number, config in enumerate([BASE] * 3 + [BF16] * 3)
    ]
    assert lmjax(*runs, "--json", "--out", tmp_path / "elsewhere") == cli.DONE
    there = tmp_path / "elsewhere" / "report.html"
    assert there.exists()
    printed = capsys.readouterr()
    assert f"the report is {there}" in printed.err
    (comparison,) = strict_loads(printed.out)["comparisons"].values()
    assert (comparison["verdict"], comparison["control"]) == ("worse", F32_ARM)
    assert comparison["mean"] == pytest.approx(0.1)

    # Without --out beside the first run, wherever the others are; the page can be named.
    assert not (tmp_path / "0" / "report.html").exists()
    assert lmjax(*runs) == cli.DONE
    assert f"the report is {tmp_path / '0' / 'report.html'}" in capsys.readouterr().out
    assert (tmp_path / "0" / "report.html").exists()
    assert not (tmp_path / "0" / "locks").exists()
    assert lmjax(*runs, "--out", tmp_path / "mine.html") == cli.DONE
    assert (tmp_path / "mine.html").exists()


def test_one_run_is_reported_in_its_directory(tmp_path: Path, capsys: Any) -> None:
    run = trained(tmp_path / "run", BASE)
    assert lmjax(run) == cli.DONE
    assert (run / "report.html").exists()
    out = capsys.readouterr().out
    assert "2.000" in out
    assert "verdict" not in out


def test_a_run_that_has_not_ended_is_missing_and_no_error(tmp_path: Path) -> None:
    _, cells = ablation_of(
        [trained(tmp_path / "a", BASE), trained(tmp_path / "b", BF16, eval_loss=None)]
    )
    assert [cell.status for cell in cells] == ["finished", "missing"]


@pytest.mark.parametrize(
    ("skipped", "status"),
    [
        (lambda step: step, "failed"),  # every step
        (lambda step: max(0, step - 6), "missing"),  # the last 4, of a limit of 10 with rows of 5
        (lambda step: 1, "missing"),
    ],
)
def test_a_run_that_diverged_is_shown_as_such(skipped: Any, status: str, tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, log_every=5)
    good = trained(tmp_path / "good", config)
    other = dataclasses.replace(BF16, log_every=5)
    bad = trained(tmp_path / "bad", other, None, skipped_steps=skipped)
    _, cells = ablation_of([good, bad])
    assert [cell.status for cell in cells] == ["finished", status]
    if status == "failed":
        assert cells[1].reason == "the gradients of the last 10 steps up to step 10 were not finite"
        assert lmjax(good, bad) == cli.DONE
        page = (tmp_path / "report.html").read_text("utf-8")
        assert "failed on 1 of 1 seed: the gradients of the last 10 steps" in page


def test_arms_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    def slow(config: Config, rate: float) -> Config:
        return dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=rate))

    def names(*configs: Config) -> list[str]:
        runs = [trained(tmp_path / f"{n}", config) for n, config in enumerate(configs)]
        return list(ablation_of(runs)[0].arms)

    assert names(slow(BASE, 0.125), slow(BASE, 0.25)) == [
        "learning_rate 0.125",
        "learning_rate 0.25",
    ]
    assert names(slow(BASE, 0.125), slow(BF16, 0.25)) == [
        f"{F32_ARM}, learning_rate 0.125",
        f"{BF16_ARM}, learning_rate 0.25",
    ]
    long = [
        dataclasses.replace(
            BASE,
            precision=f"f32; blocks/{n}/mlp/**: c=bf16,w=e4m3@tensor;"
            f" blocks/{n}/attention/**: c=bf16,w=e4m3@tensor,x=e4m3@tensor",
        )
        for n in (0, 1)
    ]
    assert names(*long) == ["0 (precision)", "1 (precision)"]


def test_what_follows_from_a_policy_is_not_said_beside_it(tmp_path: Path) -> None:
    configs = (BASE, dataclasses.replace(BASE, precision="mixed_f16"))
    runs = [trained(tmp_path / f"{n}", config) for n, config in enumerate(configs)]
    ablation, _ = ablation_of(runs)
    assert "loss_scale.kind" in ablation.varies
    assert list(ablation.arms) == [f"precision {c.resolved().precision}" for c in configs]


def test_names_of_runs_may_have_any_characters(tmp_path: Path) -> None:
    rule = "c=bf16,w=e4m3@tensor,x=e4m3@tensor,g=e5m2@tensor,a=f32"
    policies = [f"f32; blocks/{n}/mlp/**: {rule}; blocks/{n}/mlp/norm: c=bf16" for n in (0, 1)]
    runs = [
        trained(tmp_path / name, dataclasses.replace(BASE, precision=precision))
        for name, precision in zip((" a\nb<i>$", "[c] \u202e"), policies, strict=True)
    ]
    arms = list(ablation_of(runs)[0].arms)
    assert len(arms) == 2
    assert all(arm.isprintable() and arm == arm.strip() for arm in arms)
    assert lmjax(*runs) == cli.DONE


def test_the_same_run_twice_and_no_run_are_refused(tmp_path: Path, capsys: Any) -> None:
    twice = [trained(tmp_path / name, BASE) for name in ("a", "b")]
    with pytest.raises(InputError, match="hold the same run"):
        ablation_of(twice)
    assert lmjax(tmp_path) == cli.BAD_INPUT
    assert "of neither an ablation nor a run" in capsys.readouterr().err
    assert lmjax() == cli.BAD_INPUT
    assert "name the directories" in capsys.readouterr().err
