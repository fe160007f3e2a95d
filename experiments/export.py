"""Writes a trained variant as one ONNX file, in which only the paths run that an image needs.

python -m experiments.export --workdir=runs/digits --output=digits.onnx

The file holds the controller, and what `experiments.predict` would say of images that fit: it maps
`image`, uint8 [1, H, W, 3], to `class_logits` [1, K] and the controller's `mask`, bool [1, L, O].
Where ONNX Runtime is installed, its answers are compared with this program's before anything is
written, and both are timed, in turn with MobileNetV2 in ONNX Runtime.
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
from instanas_jax import convolution, environment, errors, files, inference, policy
from instanas_jax.errors import InputError
from instanas_jax.search_space import (
    CANDIDATE_OPS,
    FORCED_OP,
    MOBILENETV2_OP,
    SupernetSpec,
    uniform_architecture,
)

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


def open_model(content: bytes, *, threads: int) -> inference.Predict:
    """The file in ONNX Runtime, as a predictor; InputError if that can't read it."""
    from instanas_jax import onnx_graph

    try:
        session = onnx_graph.session(content, threads=threads)
    except Exception as error:  # ONNX Runtime documents no common base of what it raises.
        raise InputError(
            f"ONNX Runtime cannot read the model ({errors.reason(error)}), so nothing is written: "
            f"{_INSTALL}"
        ) from error

    def predict(image: np.ndarray) -> tuple[Any, Any]:
        class_logits, mask = session.run(["class_logits", "mask"], {"image": image[None]})
        return class_logits[0], mask[0]

    return predict


def compare(
    ours: inference.Predict, exported: inference.Predict, images: np.ndarray
) -> tuple[float, int]:
    """The answers of a predictor and of the file to images [N, H, W, 3].

    Returns:
      The largest relative error of class logits, and by how many architectures images ran.

    Raises:
      InputError: the two answer differently.
    """
    errors, masks = [], set()
    for image in images:
        (expected, our_mask), (found, mask) = ours(image), exported(image)
        expected = np.asarray(expected)
        # A logit within rounding of the threshold may fall to either side.
        if np.array_equal(np.asarray(our_mask) > 0.5, mask):
            errors.append(float(np.linalg.norm(found - expected) / np.linalg.norm(expected)))
            masks.add(np.asarray(mask).tobytes())
    error = float(np.max(errors)) if errors else np.inf  # Of Python's `max`, a nan may be lost.
    if not error < _TOLERANCE or len(errors) < len(images) // 2:
        raise InputError(
            "ONNX Runtime answers otherwise than this program, so nothing is written (of "
            f"{len(images)} images {len(errors)} run the same paths; largest relative error "
            f"{error:.2g}): install another version of onnxruntime"
        )
    return error, len(masks)


def made_up_images(size: int) -> np.ndarray:
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


def mobilenetv2(spec: SupernetSpec, state: dict[str, Any]) -> bytes:
    """What an exported variant has to be faster than: MobileNetV2 of its width. The weights are the
    variant's, which no one has trained for that; no time depends on them."""
    from instanas_jax import onnx_model

    settled = policy.Settled.architecture(uniform_architecture(spec, MOBILENETV2_OP))
    return onnx_model.serialise(spec, settled=settled, **state)


def _compared(run: TrainedRun, state: dict[str, Any], content: bytes) -> str:
    """What is to be said of the file."""
    threads = run.config.run.inference_threads
    ours = inference.make_predictor(run.spec, lowering=convolution.default_lowering(), **state)
    exported = open_model(content, threads=threads)
    images = made_up_images(run.spec.image_size)
    error, architectures = compare(ours, exported, images)
    predictors = {
        "exported": exported,
        "ours": ours,
        "mobilenetv2": open_model(mobilenetv2(run.spec, state), threads=threads),
    }
    times = inference.time_in_turn(predictors, images)
    ms = {name: f"{np.median(of_images):.3f} ms" for name, of_images in times.items()}
    return (
        f"ONNX Runtime answers {len(images)} made-up images by {architectures} architectures as "
        f"this program does (relative error {error:.0e})\n"
        f"one image takes {ms['exported']} in ONNX Runtime, {ms['ours']} in this program; "
        f"MobileNetV2 of this width {ms['mobilenetv2']} in ONNX Runtime"
    )


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
    environment.configure_cpu(inference_threads=run.config.run.inference_threads)
    variant = trained_run.choose_variant(run, values.variant)
    networks = trained_run.networks_at(run, variant, values.latency_budget_ms)
    state = state_of(run, networks)
    content = onnx_model.serialise(run.spec, **state, metadata=metadata_of(run, variant))
    lines = [f"{path}: variant {variant} of {run.dataset.name}, {len(content) / 1e6:.1f} MB"]
    if importlib.util.find_spec("onnxruntime"):
        lines.append(_compared(run, state, content))
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
