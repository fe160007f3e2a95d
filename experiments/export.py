"""Writes a trained variant as one ONNX file, in which only the paths run that an image needs.

python -m experiments.export --workdir=runs/digits --output=digits.onnx

The file holds the controller, and what `experiments.predict` would say of images that fit: it maps
`image`, uint8 [1, H, W, 3], to `class_logits` [1, K] and the `mask` that ran, bool [1, L, O]. Where
ONNX Runtime is installed, its answers are compared with this program's before anything is written,
and both are timed.
"""

import importlib.util
import json
from typing import Any

import numpy as np
from absl import flags

from experiments import flags as flags_lib
from experiments import trained_run
from experiments.trained_run import TrainedRun
from instanas_jax import budget, controller, convolution, environment, files, inference
from instanas_jax.errors import InputError

_COMPARED_IMAGES = 16
_TOLERANCE = 1e-3  # Relative; sums in another order change logits by 1e-6.


def metadata_of(run: TrainedRun, variant: str) -> dict[str, str]:
    """What the file says of itself; lists are JSON."""
    return {
        "variant": variant,
        "dataset": run.dataset.name,
        "class_names": json.dumps(run.dataset.class_names),
        "ops": json.dumps(run.spec.to_json()["ops"]),
    }


def compare(
    predict: inference.Predict, content: bytes, *, image_size: int, threads: int
) -> dict[str, float]:
    """Answers and times of the file in ONNX Runtime beside those of a predictor.

    Returns:
      `error`, the largest relative one of class logits; `predictor_ms` and `onnx_runtime_ms`,
      medians of one image.

    Raises:
      InputError: the two answer differently.
    """
    from instanas_jax import onnx_graph

    session = onnx_graph.session(content, threads=threads)

    def run(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        class_logits, mask = session.run(["class_logits", "mask"], {"image": image[None]})
        return class_logits[0], mask[0]

    rng = np.random.default_rng(0)
    shape = (_COMPARED_IMAGES, image_size, image_size, 3)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    errors = []
    for image in images:
        (ours, our_mask), (theirs, their_mask) = predict(image), run(image)
        ours = np.asarray(ours)
        # A logit within rounding of the threshold may fall to either side.
        if np.array_equal(np.asarray(our_mask) > 0.5, their_mask):
            errors.append(float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours)))
    error = max(errors, default=np.inf)
    if not error < _TOLERANCE or len(errors) < _COMPARED_IMAGES // 2:
        raise InputError(
            "ONNX Runtime answers otherwise than this program, so nothing is written (of "
            f"{_COMPARED_IMAGES} images {len(errors)} run the same paths; largest relative error "
            f"{error:.2g}): install another version of onnxruntime"
        )
    times = inference.time_in_turn({"predictor": predict, "onnx_runtime": run}, images)
    medians = {f"{name}_ms": float(np.median(values)) for name, values in times.items()}
    return {"error": error, **medians}


def _networks(run: TrainedRun, variant: str, budget_ms: float | None) -> dict[str, Any]:
    networks = trained_run.restore_networks(run, variant)
    if budget_ms is not None:
        threshold = budget.threshold(trained_run.budget_curve(run, variant), budget_ms)
        networks["controller"] = controller.decide_at(networks["controller"], threshold)
    return {
        "supernet_variables": networks["supernet"],
        "controller_variables": networks["controller"],
        "mean": run.dataset.mean,
        "std": run.dataset.std,
    }


def _export() -> None:
    values = flags.FLAGS
    if not values.output:
        raise InputError("--output is not set: name the ONNX file to write")
    path = flags_lib.check_output(values.output)
    if not importlib.util.find_spec("onnx"):
        raise InputError("onnx is not installed: pip install -r requirements-export.txt")
    from instanas_jax import onnx_model

    run = trained_run.open_run(values.workdir or "")
    threads = run.config.run.inference_threads
    environment.configure_cpu(inference_threads=threads)
    variant = trained_run.choose_variant(run, values.variant)
    networks = _networks(run, variant, values.latency_budget_ms)
    content = onnx_model.serialise(run.spec, **networks, metadata=metadata_of(run, variant))
    lines = [f"{path}: variant {variant} of {run.dataset.name}, {len(content) / 1e6:.1f} MB"]
    if importlib.util.find_spec("onnxruntime"):
        predict = inference.make_predictor(
            run.spec, lowering=convolution.default_lowering(), **networks
        )
        found = compare(predict, content, image_size=run.spec.image_size, threads=threads)
        lines.append(
            f"ONNX Runtime answers as this program does (relative error {found['error']:.0e}), an "
            f"image in {found['onnx_runtime_ms']:.3f} ms, this program in "
            f"{found['predictor_ms']:.3f} ms"
        )
    else:
        lines.append("not compared, since onnxruntime is not installed")
    files.write_bytes(path, content)
    print("\n".join(lines))


def main() -> None:
    flags.DEFINE_string("workdir", None, "Folder of a training run. Required.")
    flags.DEFINE_string(
        "variant",
        "",
        "Variant to write; empty: the one of the highest validation accuracy, the faster of "
        "equals.",
    )
    flags.DEFINE_float(
        "latency_budget_ms",
        None,
        "What images are to take in the mean, by the run's latency table: more or fewer paths "
        "run. Left out: as trained.",
    )
    flags.DEFINE_string("output", None, "ONNX file to write. Required.")
    flags_lib.start(_export)


if __name__ == "__main__":
    main()
