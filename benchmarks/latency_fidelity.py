"""How well the latency table predicts what whole networks take.

python -m benchmarks.latency_fidelity --output=benchmarks/results/latency_fidelity.json

The networks are random architectures through the skipping execution, the controller included, and
with --workdir a trained variant on validation images, one of each architecture that its controller
chooses. None is among those that the table is fitted to. Table and networks are timed in the same
interleaved rounds, since the machine's clock drifts.

Rows named `repeat` set every other round against the rounds between: what the machine's own noise
leaves of error and order, where each network is predicted by itself.
"""

import functools
from typing import Any

import numpy as np
from absl import flags
from scipy import stats
from tqdm import tqdm

from benchmarks import reporting
from benchmarks.subjects import Call, Subjects
from experiments import flags as flags_lib
from experiments.config import SPEC_SETTINGS, DataConfig, ModelConfig
from instanas_jax import environment, latency, profiling, whole_networks
from instanas_jax.policy import Settled

_SEED = 1  # The table's own architectures have seed 0.
_DENSITIES = (0.05, 0.95)
_VALIDATION_IMAGES = 5000  # Among which those are looked for.


def _define_flags() -> None:
    flags_lib.define_section(ModelConfig(), names=SPEC_SETTINGS)
    flags_lib.define_output()
    flags.DEFINE_string("workdir", "", "A trained run, whose supernet is then the one measured.")
    flags.DEFINE_string("variant", "", "Of the run; empty: its most accurate.")
    flags_lib.define_section(DataConfig(), names=("data_dir",))
    flags.DEFINE_integer("num_classes", 100, "Classes of the classifier.", lower_bound=1)
    flags.DEFINE_integer("architectures", 200, "Random architectures.", lower_bound=2)
    flags.DEFINE_integer(
        "images",
        50,
        "Images of the trained variant, at most: one of each architecture that it chooses.",
        lower_bound=1,
    )
    flags.DEFINE_integer("rounds", 30, "Timed calls of each network.", lower_bound=2)
    flags.DEFINE_integer("threads", 1, "Threads of one image.", lower_bound=1)


def _run() -> None:
    values = flags.FLAGS
    output = flags_lib.read_output()
    environment.configure_cpu(inference_threads=values.threads)
    spec = flags_lib.read_section(ModelConfig).spec(num_classes=values.num_classes)
    calls: list[Call] = []
    subjects, chosen = None, np.zeros(0)
    if values.workdir:
        subjects = Subjects.trained(
            values.workdir, values.variant, values.data_dir, count=_VALIDATION_IMAGES
        )
        spec = subjects.spec
        images, chosen = _image_of_each_architecture(subjects, values.images)
        calls += [functools.partial(subjects.predictor, image) for image in images]
    masks = whole_networks.random_masks(
        spec, values.architectures, densities=_DENSITIES, seed=_SEED
    )
    with tqdm(total=values.rounds, desc="networks", unit="round", dynamic_ncols=True) as bar:
        table, times_ms = profiling.measure_beside(
            spec, masks, calls, rounds=values.rounds, on_round=bar.update
        )

    def predict(masks: np.ndarray, settled: Settled) -> np.ndarray:
        return latency.image_ms(table, masks, spec.forced_cells, settled)

    undecided = Settled.nothing(spec.mask_shape)
    rows = _rows("random_architectures", predict(masks, undecided), times_ms[:, : len(masks)])
    if subjects is not None:
        predicted_ms = predict(chosen, subjects.settled)
        rows += _rows("trained_controller", predicted_ms, times_ms[:, len(masks) :])
    rows += [
        reporting.measurement(f"in_network_{name}", [value], "ms")
        for name, value in table.in_network_ms.items()
    ]
    reporting.write_report(output, benchmark="latency_fidelity", results=rows)
    reporting.print_rows(rows)


def _image_of_each_architecture(subjects: Subjects, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, 3] and what the controller chooses for them [N, L, O]: the first image of
    each architecture. Two of one have one prediction and, but for noise, one time, so that there is
    no order in them."""
    masks = subjects.decide(subjects.images)
    _, firsts = np.unique(masks.reshape(len(masks), -1), axis=0, return_index=True)
    places = np.sort(firsts)[:most]
    return subjects.images[places], masks[places]


def _rows(name: str, predicted_ms: np.ndarray, times_ms: np.ndarray) -> list[dict[str, Any]]:
    """Error, order, worst case and bias of predictions [N] of what took times [rounds, N]; and how
    well half of the rounds predicts the other half."""
    measured_ms = profiling.undisturbed(times_ms)
    relative = predicted_ms / measured_ms - 1.0
    halves_ms = profiling.undisturbed(times_ms[::2]), profiling.undisturbed(times_ms[1::2])
    rows = [
        reporting.measurement(f"{name}_worst_error", [float(np.abs(relative).max())], "fraction"),
        reporting.measurement(f"{name}_bias", [float(relative.mean())], "fraction"),
        reporting.measurement(f"{name}_measured", measured_ms.tolist(), "ms"),
        reporting.measurement(f"{name}_predicted", predicted_ms.tolist(), "ms"),
    ]
    for prefix, guess_ms, truth_ms in (
        (name, predicted_ms, measured_ms),
        (f"{name}_repeat", *halves_ms),
    ):
        error = float(np.abs(guess_ms / truth_ms - 1.0).mean())
        rows.append(reporting.measurement(f"{prefix}_mean_absolute_error", [error], "fraction"))
        if np.ptp(predicted_ms) > 0.0:  # One architecture for all images has no order.
            tau = float(stats.kendalltau(guess_ms, truth_ms)[0])  # pyright: ignore
            rows.append(reporting.measurement(f"{prefix}_kendall_tau", [tau], "tau"))
    return rows


def main() -> None:
    _define_flags()
    flags_lib.start(_run)


if __name__ == "__main__":
    main()
