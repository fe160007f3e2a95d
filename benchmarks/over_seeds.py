"""What finished runs of one configuration say together: means over seeds, with their intervals.

python -m benchmarks.over_seeds --output=benchmarks/results/digits_seeds.json W1 W2 W3

Of each run, the variant of the highest validation accuracy (the faster of equals) stands against
the first static baseline, and against its own network under policies that do not look at the
image. Differences are taken within a run. An interval is Student's, 95 %, of the mean over runs.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import reporting
from experiments import flags as flags_lib
from experiments import trained_run
from instanas_jax.errors import InputError

_POINTS = "points"  # Of a hundred.


def figures(results: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Of one run: by name, a figure and its unit."""
    baseline, best = results["static"][0], trained_run.best_row(results["variants"])
    accuracy = best["test_accuracy"]
    same = best["same_for_all"]
    front = best["budget"]["front"]
    found = {
        f"{baseline['name']}_test_accuracy": (100 * baseline["test_accuracy"], "%"),
        "best_test_accuracy": (100 * accuracy, "%"),
        "best_less_baseline": (100 * (accuracy - baseline["test_accuracy"]), _POINTS),
        "best_measured_saved": (100 * (1 - best["measured_ms"] / baseline["measured_ms"]), "%"),
        "best_table_saved": (100 * (1 - best["table_ms"] / baseline["table_ms"]), "%"),
        "best_unique_architectures": (best["unique_architectures"], "architectures"),
        "best_less_shuffled": (100 * (accuracy - best["shuffled_accuracy"]), _POINTS),
        "best_less_same_for_all": (100 * (accuracy - same["test_accuracy"]), _POINTS),
        "same_for_all_table_over_best": (same["table_ms"] / best["table_ms"], "ratio"),
        "training_seconds": (sum(results["seconds"].values()), "s"),
    }
    if front:
        missed = max(abs(point["table_ms"] / point["budget_ms"] - 1) for point in front)
        found["best_budget_missed_by"] = (100 * missed, "%")
    return found


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each figure that every run has, with `mean` and `interval_95` over runs."""
    of_runs = [figures(results) for results in runs]
    rows = []
    for name, (_, unit) in of_runs[0].items():
        if all(name in found for found in of_runs):
            values = [found[name][0] for found in of_runs]
            mean, reach = _interval(values)
            row = reporting.measurement(name, values, unit)
            rows.append({**row, "mean": mean, "interval_95": reach, "values": values})
    return rows


def _interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and how far its interval reaches to both sides; one run alone has none."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


def _read(workdir: str) -> dict[str, Any]:
    path = Path(workdir) / "results.json"
    try:
        results = json.loads(path.read_text())
        figures(results)
        _settings(results)
        return results
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: name folders of finished runs") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{path} is no finished run's ({error!r}): name folders of finished runs"
        ) from error


def _settings(results: dict[str, Any]) -> list[Any]:
    """What runs have in common."""
    config = results["config"]
    others = {name: value for name, value in config["run"].items() if name != "seed"}
    devices = [results["device"], results.get("timed_on")]
    return [devices, others, {**config, "run": config["run"]["seed"] is None}]


def _check_alike(runs: list[dict[str, Any]], names: list[str]) -> None:
    """But for the seed, all runs have one configuration and device."""
    seeds = [results["config"]["run"]["seed"] for results in runs]
    for results, name in zip(runs, names, strict=True):
        if _settings(results) != _settings(runs[0]):
            raise InputError(
                f"{name} has other settings, or another device, than {names[0]}: name runs that "
                "differ in their seed alone"
            )
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds are {seeds}: name runs of different seeds")


def _run(names: list[str]) -> int:
    output = flags_lib.read_output()
    if not names:
        raise InputError("no run is named: name folders of finished runs after the flags")
    runs = [_read(name) for name in names]
    _check_alike(runs, names)
    rows = summarise(runs)
    reporting.write_report(output, benchmark="over_seeds", results=rows)
    for row in rows:
        reach = "" if row["interval_95"] is None else f" +- {row['interval_95']:.2f}"
        print(f"{row['name']}: {row['mean']:.2f}{reach} {row['unit']}")
    return 0


def main() -> None:
    flags_lib.define_output()
    flags_lib.start_with_arguments(_run)


if __name__ == "__main__":
    main()
