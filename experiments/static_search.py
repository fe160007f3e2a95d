"""The best architecture for all images at a variant's latency, from the supernet of a finished run.

python -m experiments.static_search --workdir=W --method=evolution --evaluations=100

The paths to choose from are those that the run has pretrained. Fitness is accuracy on validation
images with the pretrained supernet's weights and the batch statistics of some training images under
the architecture; the budget is what the variant takes in the mean on validation images, by the
table. What is found is trained as the run's own static baseline, with as many images as a variant,
answers the test split once, and is timed in turn with the variant and the baseline. Writes
static_search_METHOD.json and the metrics of the training into the run's folder; the same command
again resumes the training.
"""

import itertools
import zlib
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import comparison, trained_run
from experiments import flags as flags_lib
from experiments.pipeline import Pipeline
from instanas_jax import data, feeding, parallel, policy, static_nas
from instanas_jax.train_state import TrainState

_METHODS = {"random": static_nas.random_search, "evolution": static_nas.evolution}


def _define_flags() -> None:
    comparison.define_flags()
    flags.DEFINE_enum("method", "evolution", sorted(_METHODS), "How architectures are proposed.")
    flags.DEFINE_integer("evaluations", 100, "Architectures to evaluate.", lower_bound=1)
    flags.DEFINE_integer(
        "images", 1000, "Validation images of an evaluation, at most.", lower_bound=1
    )
    flags.DEFINE_integer(
        "calibration_images",
        256,
        "Training images of an evaluation, in whole batches of pretraining.",
        lower_bound=1,
    )


def search(
    pipeline: Pipeline,
    pretrained: TrainState,
    *,
    method: str,
    evaluations: int,
    images: int,
    calibration_images: int,
    budget_ms: float,
) -> list[static_nas.Evaluated]:
    """All architectures that were evaluated, in order."""
    validation = pipeline.dataset.validation
    some = validation.take(np.arange(min(images, len(validation))))
    seed = pipeline.config.run.seed
    batches = _calibration_batches(pipeline, calibration_images, seed=seed)

    def fitness(architecture: np.ndarray) -> float:
        mask = architecture.astype(np.float32)
        state = pipeline.evaluate.recalibrated(pretrained, batches, architecture=mask)
        return pipeline.evaluate(state, some, architecture=mask).accuracy

    space = static_nas.Space(
        pipeline.spec, pipeline.table, budget_ms, paths=pipeline.planner.trained_paths
    )
    proposed = _METHODS[method](space, fitness, seed=seed)
    with tqdm(total=evaluations, desc=method, unit="architecture", dynamic_ncols=True) as bar:
        evaluated = []
        for member in itertools.islice(proposed, evaluations):
            evaluated.append(member)
            bar.set_postfix_str(f"best={max(one.fitness for one in evaluated):.4f}", refresh=False)
            bar.update()
    return evaluated


def _calibration_batches(pipeline: Pipeline, images: int, *, seed: int) -> list[Any]:
    """Random training images as evaluation sees them, in whole batches on the devices."""
    train, batch_size = pipeline.dataset.train, pipeline.config.pretrain.batch_size
    count = max(1, min(images, len(train)) // batch_size) * batch_size
    some = train.take(np.random.default_rng(seed).permutation(len(train))[:count])
    share = parallel.share(batch_size)
    batches = data.eval_batches(some, batch_size=batch_size, share=share)
    return [feeding.to_devices(batch) for batch in batches]


def _run() -> None:
    values = flags.FLAGS
    finished = comparison.open_finished()
    curve = trained_run.budget_curve(finished.run, finished.variant)
    path = finished.run.files.path / f"static_search_{values.method}.json"
    pipeline = comparison.open_pipeline(finished, path)
    try:
        pretrained = pipeline.pretrained()
        evaluated = search(
            pipeline,
            pretrained,
            method=values.method,
            evaluations=values.evaluations,
            images=values.images,
            calibration_images=values.calibration_images,
            budget_ms=curve.as_trained_ms,
        )
        best = max(evaluated, key=lambda member: member.fitness)
        architecture = best.architecture.astype(np.float32)
        text = policy.describe(architecture, pipeline.spec.forced_cells)
        print(
            f"{text}\n{best.fitness:.4f} with the supernet's weights and its own statistics",
            flush=True,
        )
        # Another architecture is another training.
        digest = zlib.crc32(np.packbits(best.architecture).tobytes())
        found = pipeline.train_static(f"static_{digest:08x}", architecture, pretrained)
        baseline = comparison.train_mobilenetv2(pipeline, pretrained)
    finally:
        pipeline.writer.close()
    compared = comparison.rows(
        {
            "mobilenetv2": baseline,
            "found": comparison.of_static(pipeline, found),
            finished.variant: comparison.of_variant(finished, baseline),
        },
        finished.dataset,
    )
    comparison.write_report(
        path,
        finished,
        {
            "method": values.method,
            "evaluations": len(evaluated),
            "images": values.images,
            "calibration_images": values.calibration_images,
            "budget_ms": curve.as_trained_ms,
            "architecture": text,
            "fitness": [member.fitness for member in evaluated],
            "rows": compared,
        },
    )
    comparison.print_rows(compared)
    print(f"written to {path}")


def main() -> None:
    _define_flags()
    flags_lib.start(_run, resumes=True)


if __name__ == "__main__":
    main()
