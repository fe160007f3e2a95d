"""results.json and the table on the terminal. With `policy_study`, which it calls, and
`comparison`, the only reader of the test split; nothing is chosen by it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tqdm import tqdm

from experiments import evaluation, policy_study, timing
from experiments.config import Config, RunConfig
from instanas_jax import (
    controller,
    cost,
    data,
    environment,
    inference,
    latency,
    parallel,
    policy,
    search_space,
)
from instanas_jax.errors import InputError
from instanas_jax.stage import Setting
from instanas_jax.train_state import TrainState

SCHEMA_VERSION = 1


def collect(
    config: Config,
    *,
    setting: Setting,
    dataset: data.Dataset,
    table: latency.LatencyTable,
    evaluate: evaluation.Evaluator,
    statics: dict[str, tuple[TrainState, np.ndarray]],
    variants: dict[str, TrainState],
    seconds: dict[str, float],
    sittings: list[dict[str, Any]],
) -> dict[str, Any]:
    """Evaluates every network on the test split, under its own policy once and under those of
    `policy_study`, and times it image by image.

    Args:
      statics: by name, a state and the architecture [L, O] it runs.
      variants: by name, a state.
      seconds: training seconds of each stage.
      sittings: when and where the run trained.

    Returns:
      The contents of results.json.
    """
    with tqdm(
        total=timing.PROCESSES + len(statics) + len(variants),
        desc="results",
        unit="part",
        dynamic_ncols=True,
        disable=not parallel.is_first(),
    ) as bar:
        measured = parallel.from_first(
            lambda: timing.time_networks(
                {name: timing.Timed(setting, *static) for name, static in statics.items()}
                | {name: timing.Timed(setting, state) for name, state in variants.items()},
                images=timed_images(config.run, dataset),
                threads=config.run.inference_threads,
                on_process=bar.update,
            )
        )
        static_answers, static_rows = {}, []
        for name, (state, architecture) in statics.items():
            static_answers[name] = evaluate(state, dataset.test, architecture=architecture)
            validation = evaluate(state, dataset.validation, architecture=architecture)
            static_rows.append(
                {
                    "name": name,
                    "test_accuracy": static_answers[name].accuracy,
                    "validation_accuracy": validation.accuracy,
                    **static_cost(setting.spec, architecture, table),
                    **timing_fields(measured[name]),
                }
            )
            bar.update()
        # How hard an image is: its loss under the first static baseline, which saw no controller.
        difficulty = next(iter(static_answers.values())).loss
        variant_rows = []
        for name, state in variants.items():
            variant_rows.append(
                {
                    "name": name,
                    **_policy_fields(setting, dataset, table, evaluate, state, difficulty),
                    **timing_fields(measured[name]),
                    **_study(setting, dataset, table, evaluate, state),
                }
            )
            bar.update()
    bounds = latency.baselines(table, setting.spec)
    return {
        "schema_version": SCHEMA_VERSION,
        **describe(config, dataset),
        "sittings": sittings,
        "images": {
            "train": len(dataset.train),
            "validation": len(dataset.validation),
            "test": len(dataset.test),
        },
        "seconds": seconds,
        "latency_table": {
            "device": table.device,
            "mobilenetv2_ms": bounds.mobilenetv2_ms,
            "max_ms": bounds.max_ms,
            "min_ms": bounds.min_ms,
            "fixed_ms": table.fixed_ms,
            "in_network_ms": table.in_network_ms,
        },
        "static": static_rows,
        "variants": variant_rows,
    }


def _policy_fields(
    setting: Setting,
    dataset: data.Dataset,
    table: latency.LatencyTable,
    evaluate: evaluation.Evaluator,
    state: TrainState,
    difficulty: np.ndarray,
) -> dict[str, Any]:
    """Of a variant's row: what its network answers under its own policy, and that policy."""
    answers = evaluate(state, dataset.test)
    settled = controller.settled(setting.spec, state.controller)
    table_ms = latency.image_ms(table, answers.mask, setting.spec.forced_cells, settled)
    return {
        "test_accuracy": answers.accuracy,
        "validation_accuracy": evaluate(state, dataset.validation).accuracy,
        **evaluation.policy_statistics(answers, table=table, spec=setting.spec, settled=settled),
        "latency_vs_difficulty": _rank_correlation(table_ms, difficulty),
    }


def _study(
    setting: Setting,
    dataset: data.Dataset,
    table: latency.LatencyTable,
    evaluate: evaluation.Evaluator,
    state: TrainState,
) -> dict[str, Any]:
    """See `policy_study.study`; every process asks the controller, the first one the network."""
    validation_logits = evaluate.policy_logits(state, dataset.validation)
    test_logits = evaluate.policy_logits(state, dataset.test)

    def study() -> dict[str, Any]:
        network = inference.deploy(
            setting.spec,
            supernet_variables=state.supernet,
            controller_variables=state.controller,
            mean=setting.mean,
            std=setting.std,
            lowering=setting.lowering,
        )
        return policy_study.study(
            network,
            table=table,
            dataset=dataset,
            validation_logits=validation_logits,
            test_logits=test_logits,
        )

    return parallel.from_first(study)


def describe(config: Config, dataset: data.Dataset) -> dict[str, Any]:
    """What every report says of its run: data, settings, devices and versions."""
    return {
        "dataset": dataset.name,
        "config": config.to_json(),
        "device": environment.describe_device(),
        "timed_on": environment.describe_device(inference_threads=config.run.inference_threads),
        "versions": environment.describe_versions(),
    }


def static_cost(
    spec: search_space.SupernetSpec, architecture: np.ndarray, table: latency.LatencyTable
) -> dict[str, float]:
    """Of a static network's row."""
    settled = policy.Settled.architecture(architecture)
    running = settled.may_run(spec.forced_cells)
    flops, params = cost.path_costs(spec)
    fixed = cost.fixed_cost(spec)
    return {
        "table_ms": float(latency.image_ms(table, running, spec.forced_cells, settled)),
        "flops": float(flops[running].sum()) + fixed.flops,
        "params": int(params[running].sum()) + fixed.params,
    }


def timed_images(section: RunConfig, dataset: data.Dataset) -> np.ndarray:
    """Test images on which networks are timed."""
    return dataset.test.take(np.arange(min(section.timed_images, len(dataset.test)))).images


def timing_fields(milliseconds: np.ndarray) -> dict[str, float]:
    """Of a network's row."""
    return {
        "measured_ms": float(np.median(milliseconds)),
        "measured_ms_mean": float(milliseconds.mean()),
        "measured_ms_p90": float(np.percentile(milliseconds, 90)),
    }


def _rank_correlation(latency_ms: np.ndarray, difficulty: np.ndarray) -> float | None:
    """Spearman's; None where every image has the same latency."""
    if np.ptp(latency_ms) == 0.0 or np.ptp(difficulty) == 0.0:
        return None
    correlation = float(stats.spearmanr(latency_ms, difficulty)[0])  # pyright: ignore
    return None if math.isnan(correlation) else correlation


def format_table(results: dict[str, Any]) -> str:
    """The comparison as text: baselines first, then the variants of the one search."""
    header = ["network", "test acc", "val acc", "table ms", "measured ms"]
    rows = [[*header, "saved", "MFLOP", "architectures", "shuffled", "same for all"]]
    baseline_ms = results["static"][0]["measured_ms"]
    for row in (*results["static"], *results["variants"]):
        rows.append(
            [
                row["name"],
                f"{100 * row['test_accuracy']:.2f} %",
                f"{100 * row['validation_accuracy']:.2f} %",
                f"{row['table_ms']:.3f}",
                f"{row['measured_ms']:.3f}",
                f"{100 * (1 - row['measured_ms'] / baseline_ms):+.0f} %",
                f"{row['flops'] / 1e6:.1f}",
                str(row.get("unique_architectures", 1)),
                *_of_other_policies(row),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += [line for row in results["variants"] if (line := _front(row))]
    return "\n".join(lines)


def read_table(path: Path) -> str:
    """`format_table` of a results.json; InputError if it can't be read."""
    try:
        return format_table(json.loads(path.read_text()))
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error!r}): delete it and repeat the command, which evaluates "
            "the run's networks again"
        ) from error


def _of_other_policies(row: dict[str, Any]) -> list[str]:
    """Test accuracies of a variant's network under policies that do not look at the image."""
    if "shuffled_accuracy" not in row:
        return ["", ""]
    accuracies = row["shuffled_accuracy"], row["same_for_all"]["test_accuracy"]
    return [f"{100 * accuracy:.2f} %" for accuracy in accuracies]


def _front(row: dict[str, Any]) -> str:
    """One line of what a variant's network does under other latency budgets."""
    points = [
        f"{point['table_ms']:.3f} ms {100 * point['test_accuracy']:.2f} %"
        for point in row.get("budget", {}).get("front", ())  # Which older results lack.
    ]
    return f"{row['name']} by --latency_budget_ms: {', '.join(points)}" if points else ""
