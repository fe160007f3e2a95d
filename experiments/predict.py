"""Classifies own images with a trained variant: class, confidence, architecture and time.

python -m experiments.predict --workdir=runs/digits IMAGE_OR_FOLDER...

Folders are searched for images, and the folders in them. Every image is cut to its middle square
and scaled to what the network reads. An image that cannot be read is named on standard error, the
others are answered, and the exit status is 1. The data set is not needed.
"""

import dataclasses
import json
import sys
from typing import Any

import numpy as np
from absl import flags

from experiments import flags as flags_lib
from experiments import images, trained_run
from experiments.trained_run import TrainedRun
from instanas_jax import budget, controller, convolution, environment, inference, latency, policy
from instanas_jax.errors import InputError

_TIMED_CALLS = 8


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a variant makes of one image. Times are of the whole image, in milliseconds."""

    classes: list[tuple[str, float]]  # Names with their probabilities, the likeliest first.
    architecture: np.ndarray  # [L, O], the mask that ran.
    table_ms: float  # The table's active paths and fixed parts.
    measured_ms: float  # Median of calls one after another, here and now.


class Predictor:
    """A variant, compiled for one image at a time with real skipping.

    Args:
      variant: name of a finished one.
      top: how many classes an answer names.
      budget_ms: what images are to take in the mean; None for what the variant was trained at.
      limit_ms: what no image is to take more than; None for no limit.

    Raises:
      InputError: the variant can't meet the budget, or keep the limit.
    """

    def __init__(
        self,
        run: TrainedRun,
        variant: str,
        *,
        top: int,
        budget_ms: float | None = None,
        limit_ms: float | None = None,
    ):
        networks = trained_run.networks_at(run, variant, budget_ms)
        self._settled = controller.settled(run.spec, networks["controller"])
        rule = policy.greedy
        if limit_ms is not None:
            rule = budget.limit(
                limit_ms, table=run.table, spec=run.spec, settled=self._settled
            ).masks
        self._run = run
        self._variant = variant
        self._top = top
        self._predict = inference.make_predictor(
            run.spec,
            supernet_variables=networks["supernet"],
            controller_variables=networks["controller"],
            mean=run.dataset.mean,
            std=run.dataset.std,
            lowering=convolution.default_lowering(),
            settled=self._settled,
            rule=rule,
        )

    def __call__(self, image: np.ndarray) -> Answer:
        """Answers one image uint8 [H, W, 3] of any size.

        Raises:
          InputError: the network answers with no number.
        """
        run = self._run
        pixels = images.fit(image, run.spec.image_size)
        class_logits, architecture = (np.asarray(output) for output in self._predict(pixels))
        if not np.isfinite(class_logits).all():
            raise InputError(
                f"variant {self._variant} gives {class_logits[0]}, so its training diverged: "
                "choose another --variant"
            )
        probabilities = _softmax(class_logits)
        likeliest = np.argsort(-probabilities, kind="stable")[: self._top]
        table_ms = latency.image_ms(run.table, architecture, run.spec.forced_cells, self._settled)
        times = inference.time_in_turn({"": self._predict}, [pixels] * _TIMED_CALLS)[""]
        return Answer(
            classes=[(run.dataset.class_names[k], float(probabilities[k])) for k in likeliest],
            architecture=architecture,
            table_ms=float(table_ms),
            measured_ms=float(np.median(times)),
        )


def answer_all(
    names: list[str], predictor: Predictor, run: TrainedRun, *, variant: str, as_json: bool
) -> int:
    """Prints an answer, or on standard error what is wrong, for each image that the names mean.

    Returns:
      How many images or folders could not be read.
    """
    failures = 0
    for name in names:
        paths, errors = images.find(name)
        failures += len(errors)
        for error in errors:
            print(f"error: {error}", file=sys.stderr)
        for path in paths:
            try:
                image = images.read(path)
            except InputError as error:
                failures += 1
                print(f"error: {error}", file=sys.stderr)
                continue
            answer = predictor(image)
            if as_json:
                print(json.dumps(_as_json(path, answer, run, variant)), flush=True)
            else:
                print(_as_text(path, answer, run), flush=True)
    return failures


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    return shifted / shifted.sum()


def _as_json(path: str, answer: Answer, run: TrainedRun, variant: str) -> dict[str, Any]:
    cells = policy.running_ops(answer.architecture, run.spec.forced_cells)
    return {
        "image": path,
        "variant": variant,
        "classes": [{"name": name, "confidence": value} for name, value in answer.classes],
        "architecture": [[op.name for op in ops] for ops in cells],
        "table_ms": answer.table_ms,
        "measured_ms": answer.measured_ms,
    }


def _as_text(path: str, answer: Answer, run: TrainedRun) -> str:
    classes = ", ".join(f"{name} ({100 * value:.1f} %)" for name, value in answer.classes)
    return "\n".join(
        (
            f"{images.printable(path)}: {classes}",
            f"  {policy.describe(answer.architecture, run.spec.forced_cells)}",
            f"  table {answer.table_ms:.3f} ms, measured {answer.measured_ms:.3f} ms",
        )
    )


def _predict(names: list[str]) -> int:
    values = flags.FLAGS
    if not names:
        raise InputError("no image is named: name files or folders after the flags")
    run = trained_run.open_run(values.workdir or "")
    environment.configure_cpu(inference_threads=run.config.run.inference_threads)
    variant = trained_run.choose_variant(run, values.variant)
    predictor = Predictor(
        run,
        variant,
        top=values.top,
        budget_ms=values.latency_budget_ms,
        limit_ms=values.latency_limit_ms,
    )
    environment.release_memory()
    if not values.json:
        print(f"variant {variant} of {run.dataset.name}", flush=True)
    return int(answer_all(names, predictor, run, variant=variant, as_json=values.json) > 0)


def main() -> None:
    flags.DEFINE_string("workdir", None, "Folder of a training run. Required.")
    flags.DEFINE_string(
        "variant",
        "",
        "Variant that answers; empty: the one of the highest validation accuracy, the faster of "
        "equals.",
    )
    flags.DEFINE_float(
        "latency_budget_ms",
        None,
        "What images are to take in the mean, by the run's latency table: more or fewer paths "
        "run. Left out: as trained.",
    )
    flags.DEFINE_float(
        "latency_limit_ms",
        None,
        "What no image is to take more than, by the run's latency table: of its paths the surest "
        "run that fit, after --latency_budget_ms, whose mean falls by it. Left out: no limit.",
    )
    flags.DEFINE_integer("top", 3, "Classes to name for each image.", lower_bound=1)
    flags.DEFINE_bool(
        "json",
        False,
        "Print JSON lines, one object an image: image, variant, classes (name, confidence), "
        "architecture (names of the ops of each cell), table_ms, measured_ms.",
    )
    flags_lib.start_with_arguments(_predict)


if __name__ == "__main__":
    main()
