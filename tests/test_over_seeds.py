"""Means over runs of different seeds."""

import copy
import json

import pytest

from benchmarks import over_seeds
from instanas_jax.errors import InputError


def make_results(seed: int, accuracy: float) -> dict:
    best = {
        "name": "B",
        "test_accuracy": accuracy,
        "validation_accuracy": 0.9,
        "table_ms": 0.5,
        "measured_ms": 0.6,
        "unique_architectures": 20 + seed,
        "shuffled_accuracy": accuracy - 0.02,
        "same_for_all": {"test_accuracy": accuracy - 0.01, "table_ms": 0.4},
        "budget": {"front": [{"budget_ms": 0.5, "table_ms": 0.51}]},
    }
    # As accurate on validation images and slower; its test accuracy must not matter.
    slower = {**best, "name": "A", "test_accuracy": 1.0, "measured_ms": 0.7}
    return {
        "config": {"dataset": "digits", "run": {"seed": seed, "variants": 2}},
        "device": {"cpu": "X"},
        "seconds": {"pretrain": 1.0, "search": 2.0},
        "static": [
            {"name": "mobilenetv2", "test_accuracy": 0.9, "table_ms": 1.0, "measured_ms": 1.0}
        ],
        "variants": [slower, best],
    }


RUNS = [make_results(seed, accuracy) for seed, accuracy in enumerate((0.88, 0.90, 0.92))]


def test_by_hand():
    rows = {row["name"]: row for row in over_seeds.summarise(RUNS)}
    difference = rows["best_less_baseline"]
    assert difference["values"] == pytest.approx([-2.0, 0.0, 2.0])
    assert difference["mean"] == pytest.approx(0.0, abs=1e-9)
    # Student's t of two degrees of freedom at 97.5 % is 4.303; the deviation is 2 points.
    assert difference["interval_95"] == pytest.approx(4.3027 * 2 / 3**0.5, rel=1e-4)
    assert rows["best_measured_saved"]["mean"] == pytest.approx(40.0)
    assert rows["best_less_shuffled"]["mean"] == pytest.approx(2.0)
    assert rows["best_less_same_for_all"]["mean"] == pytest.approx(1.0)
    assert rows["best_unique_architectures"]["median"] == 21
    assert rows["best_budget_missed_by"]["mean"] == pytest.approx(2.0)


def test_one_run_has_no_interval_and_a_front_that_not_all_have_is_left_out():
    assert over_seeds.summarise(RUNS[:1])[0]["interval_95"] is None
    without = copy.deepcopy(RUNS)
    without[1]["variants"][1]["budget"]["front"] = []
    assert "best_budget_missed_by" not in {row["name"] for row in over_seeds.summarise(without)}


def test_runs_of_other_settings_or_of_one_seed_are_named():
    other = copy.deepcopy(RUNS)
    other[2]["config"]["run"]["variants"] = 3
    elsewhere = [*RUNS[:2], {**RUNS[2], "device": {"cpu": "Y"}}]
    for runs in (other, elsewhere, [*RUNS[:2], {**RUNS[2], "config": {"run": {"seed": 2}}}]):
        with pytest.raises(InputError, match="c has other settings, or another device, than a"):
            over_seeds._check_alike(runs, ["a", "b", "c"])
    over_seeds._check_alike(RUNS, ["a", "b", "c"])
    with pytest.raises(InputError, match=r"\[0, 0\]"):
        over_seeds._check_alike([RUNS[0], RUNS[0]], ["a", "b"])


def test_a_folder_without_results_is_one_line(tmp_path):
    with pytest.raises(InputError, match="json does not exist: name folders of finished runs"):
        over_seeds._read(str(tmp_path))
    (tmp_path / "results.json").write_text(json.dumps({"static": []}))
    with pytest.raises(InputError, match="folders of finished runs"):
        over_seeds._read(str(tmp_path))
    (tmp_path / "results.json").write_text(json.dumps(RUNS[0]))
    assert over_seeds._read(str(tmp_path)) == RUNS[0]
