"""MobileNetV2 at several widths, trained from scratch, beside a finished run's variant.

python -m experiments.mobilenetv2_widths --workdir=W --widths=0.25,0.35,0.5

What a user would do without a search to be faster: train a narrower network. Each width sees as
many images as a variant's weights did, those of pretraining included, by the pretraining's rate and
schedule (by the finetuning's, if variants train from scratch too), answers the test split once, and
is timed in turn with the variant and the run's own MobileNetV2. Writes mobilenetv2_widths.json into
the run's folder, and a folder for each width with its latency table, metrics and checkpoints; the
same command again resumes the training. The tables are of different moments: compare measured
times.
"""

import dataclasses

from absl import flags

from experiments import comparison
from experiments import flags as flags_lib
from experiments.comparison import Entrant, Finished
from experiments.config import ModelConfig, validate_section
from experiments.pipeline import Pipeline
from experiments.workdir import Workdir
from instanas_jax import metrics, search_space
from instanas_jax.errors import InputError


def _read_models(like: ModelConfig) -> list[ModelConfig]:
    texts = flags.FLAGS.widths
    try:
        widths = sorted({float(_name(float(text))) for text in texts})
    except ValueError:
        raise InputError(f"--widths={','.join(texts)}: name numbers, 0.25,0.5") from None
    if not widths:
        raise InputError("--widths is empty: name width multipliers, 0.25,0.5")
    models = [dataclasses.replace(like, width=width) for width in widths]
    for model in models:
        try:
            validate_section(model)
        except InputError as error:
            raise InputError(f"--widths={','.join(texts)}: as {error}") from None
    return models


def _name(width: float) -> str:
    """Of its folder and row, to six digits."""
    return f"{width:g}"


def _train(finished: Finished, model: ModelConfig) -> Entrant:
    config = dataclasses.replace(finished.run.config, model=model)
    path = finished.run.files.path / "mobilenetv2_widths" / _name(model.width)
    workdir = Workdir(str(path), config=config, flags_text="")
    writer = metrics.JsonlWriter(workdir.metrics)
    try:
        pipeline = Pipeline(config, dataset=finished.dataset, workdir=workdir, writer=writer)
        architecture = search_space.uniform_architecture(pipeline.spec, search_space.MOBILENETV2_OP)
        network = pipeline.train_from_scratch("mobilenetv2", architecture)
        return comparison.of_static(pipeline, network)
    finally:
        writer.close()


def _run() -> None:
    finished = comparison.open_finished()
    models = _read_models(finished.run.config.model)
    path = finished.run.files.path / "mobilenetv2_widths.json"
    own = comparison.open_pipeline(finished, path)
    try:
        baseline = comparison.train_mobilenetv2(own, own.pretrained())
    finally:
        own.writer.close()
    entrants = {f"mobilenetv2_{_name(model.width)}": _train(finished, model) for model in models}
    entrants["mobilenetv2"] = baseline
    entrants[finished.variant] = comparison.of_variant(finished, baseline)
    compared = comparison.rows(entrants, finished.dataset)
    comparison.write_report(path, finished, {"rows": compared})
    comparison.print_rows(compared)
    print(f"written to {path}")


def main() -> None:
    comparison.define_flags()
    flags.DEFINE_list("widths", ["0.25", "0.35", "0.5"], "Width multipliers of MobileNetV2.")
    flags_lib.start(_run, resumes=True)


if __name__ == "__main__":
    main()
