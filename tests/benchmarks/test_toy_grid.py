"""Every config that the grid of toy worlds writes is one that its command takes, and its runs are apart."""

from pathlib import Path

import pytest
import yaml

from benchmarks.toy_grid import COEFS, SEEDS, Stage, config_text, gate, markdown, stages, summary, systems
from gearshift.launch.config import validate

ALL = [*stages(), Stage("compare", "compare", "compare-full", systems())]


@pytest.mark.parametrize("stage", ALL, ids=lambda stage: stage.name)
def test_a_config_is_right(stage: Stage) -> None:
    values = yaml.safe_load(config_text(stage, Path("runs/grid/seed-2"), 2))
    config = validate(stage.command, values)
    assert config.run.folder == f"runs/grid/seed-2/{stage.name}"
    assert "runs/demo" not in str(values)
    assert config.run.seed // 100 == 2


def test_the_grid() -> None:
    assert len({stage.name for stage in ALL}) == len(ALL)
    assert 0.0 in COEFS
    assert len(SEEDS) == 3
    configs = {stage.name: yaml.safe_load(config_text(stage, Path("x"), 1)) for stage in ALL}
    assert configs["ppo-0.05"]["ppo"]["kl"]["coef"] == 0.05
    assert configs["ppo-ptx"]["ppo"]["kl"]["coef"] == 0.2
    assert set(configs["compare"]["systems"]) == {
        *("base", "prompted", "flan", "t0", "sft", "ppo", "ppo-ptx", "grpo", "rloo"),
        *(f"{kind}-{coef}" for kind in ("ppo", "ppo-ptx") for coef in ("0", "0.05", "0.8")),
    }


def test_figures_over_seeds() -> None:
    found = summary([0.5, 0.6, 0.7])
    assert found["mean"] == pytest.approx(0.6)
    assert found["half"] == pytest.approx(4.303 * 0.1 / 3**0.5)
    each = {s: {"a": {"true_score_low": 0.5 + s / 10}, "b": {"true_score_high": 0.65}} for s in (1, 2)}
    assert gate(each, "a", "b") == {"gate": "a above b", "holds": False, "each": [False, True]}
    table = markdown(
        {
            "systems": {"a": dict.fromkeys(("true_score", "score", "kl", "pretraining_loss", "length"), found)},
            "gates": [gate(each, "a", "b")],
            "seconds": [60.0, 120.0],
            "seeds": [1, 2],
        }
    )
    assert "| a | 0.600 ± 0.248 | 0.500, 0.600, 0.700 |" in table
    assert "FAILS: a above b" in table
