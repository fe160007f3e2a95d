"""Writes a trained variant as one ONNX file, in which only the paths run that an image needs.

python -m experiments.export --workdir=runs/digits --output=digits.onnx

The file holds the controller, and what `experiments.predict` would say of images that fit: it maps
`image`, uint8 [1, H, W, 3], to `class_logits` [1, K] and the controller's `mask`, bool [1, L, O].
Where ONNX Runtime is installed, its answers are compared with this program's before anything is
written, and both are timed.
"""

import importlib.util
import json
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from experiments import flags as flags_lib
from experiments import trained_run
from experiments.trained_run import TrainedRun
from instanas_jax import convolution, environment, files, inference
from instanas_jax.errors import InputError
from instanas_jax.search_space import CANDIDATE_OPS, FORCED_OP

_INSTALL = "pip install -r requirements-export.txt"
_COMPARED_IMAGES = 32
_TOLERANCE = 1e-3  # Relative; sums in another order change logits by 1e-6.


def metadata_of(run: TrainedRun, variant: str) -> dict[str, str]:
    """What the file says of itself; lists are JSON."""
    return {
        "variant": variant,
        "dataset": run.dataset.name,
        "class_names": json.dumps(run.dataset.class_names),
        "ops": json.dumps(run.spec.to_json()["ops"]),
        # That run `forced_op` where the mask has no path for them.
        "forced_cells": json.dumps(np.flatnonzero(run.spec.forced_cells).tolist()),
        "forced_op": CANDIDATE_OPS[FORCED_OP].name,
    }


def compare(
    predict: inference.Predict, content: bytes, *, image_size: int, threads: int
) -> dict[str, float]:
    """Answers and times of the file in ONNX Runtime beside those of a predictor.

    Returns:
      `error`, the largest relative one of class logits; `architectures`, how many of them images
      ran; `predictor_ms` and `onnx_runtime_ms`, medians of one image.

    Raises:
      InputError: the two answer differently, or the file can't be read.
    """
    from instanas_jax import onnx_graph

    try:
        session = onnx_graph.session(content, threads=threads)
    except Exception as error:  # ONNX Runtime documents no common base of what it raises.
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"ONNX Runtime cannot read the model ({reason}), so nothing is written: {_INSTALL}"
        ) from error

    def run(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        class_logits, mask = session.run(["class_logits", "mask"], {"image": image[None]})
        return class_logits[0], mask[0]

    images = _made_up_images(image_size)
    errors, masks = [], set()
    for image in images:
        (ours, our_mask), (theirs, their_mask) = predict(image), run(image)
        ours = np.asarray(ours)
        # A logit within rounding of the threshold may fall to either side.
        if np.array_equal(np.asarray(our_mask) > 0.5, their_mask):
            errors.append(float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours)))
            masks.add(their_mask.tobytes())
    error = max(errors, default=np.inf)
    if not error < _TOLERANCE or len(errors) < _COMPARED_IMAGES // 2:
        raise InputError(
            "ONNX Runtime answers otherwise than this program, so nothing is written (of "
            f"{_COMPARED_IMAGES} images {len(errors)} run the same paths; largest relative error "
            f"{error:.2g}): install another version of onnxruntime"
        )
    times = inference.time_in_turn({"predictor": predict, "onnx_runtime": run}, images)
    medians = {f"{name}_ms": float(np.median(values)) for name, values in times.items()}
    return {"error": error, "architectures": len(masks), **medians}


def _made_up_images(size: int) -> np.ndarray:
    """uint8 [N, H, W, 3], coarse and fine, dark and bright, which a controller tells apart."""
    rng = np.random.default_rng(0)
    images = []
    for index in range(_COMPARED_IMAGES):
        side = min(size, 2 ** (1 + index % 5))
        coarse = rng.uniform(0.0, rng.uniform(32.0, 255.0), (side, side, 3)).astype(np.uint8)
        images.append(Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR))
    return np.stack([np.asarray(image) for image in images])


def state_of(run: TrainedRun, networks: dict[str, Any]) -> dict[str, Any]:
    """A variant's networks, and what normalises their images, as `onnx_model.serialise` and
    `inference.make_predictor` take them."""
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
    try:
        from instanas_jax import onnx_model
    except ImportError as error:
        raise InputError(f"onnx is not there ({error}): {_INSTALL}") from error
    path = flags_lib.check_output(values.output)
    run = trained_run.open_run(values.workdir or "")
    threads = run.config.run.inference_threads
    environment.configure_cpu(inference_threads=threads)
    variant = trained_run.choose_variant(run, values.variant)
    networks = trained_run.networks_at(run, variant, values.latency_budget_ms)
    state = state_of(run, networks)
    content = onnx_model.serialise(run.spec, **state, metadata=metadata_of(run, variant))
    lines = [f"{path}: variant {variant} of {run.dataset.name}, {len(content) / 1e6:.1f} MB"]
    if importlib.util.find_spec("onnxruntime"):
        predict = inference.make_predictor(
            run.spec, lowering=convolution.default_lowering(), **state
        )
        found = compare(predict, content, image_size=run.spec.image_size, threads=threads)
        lines.append(
            f"ONNX Runtime answers {_COMPARED_IMAGES} made-up images by {found['architectures']} "
            f"architectures as this program does (relative error {found['error']:.0e}), one in "
            f"{found['onnx_runtime_ms']:.3f} ms, this program in {found['predictor_ms']:.3f} ms"
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
