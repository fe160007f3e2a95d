"""What programs share that set other networks beside a finished run's variant."""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import flags as flags_lib
from experiments import results, timing, trained_run
from experiments.config import DataConfig
from experiments.pipeline import Network, Pipeline
from experiments.trained_run import TrainedRun
from experiments.workdir import Workdir, write_json
from instanas_jax import data, metrics, search_space
from instanas_jax.train_state import TrainState


def define_flags() -> None:
    """Of every such program."""
    flags.DEFINE_string("workdir", None, "Folder of a finished run. Required.")
    flags.DEFINE_string("variant", "", "Whom to compare with; empty: the most accurate variant.")
    flags_lib.define_section(DataConfig(), names=("data_dir",))


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run with results, one of its variants, and the run's data."""

    run: TrainedRun
    variant: str
    networks: dict[str, Any]  # The variant's "supernet" and "controller".
    dataset: data.Dataset


def open_finished() -> Finished:
    """The one that the flags name; InputError where it lacks something."""
    values = flags.FLAGS
    run = trained_run.open_run(values.workdir or "")
    variant = trained_run.choose_variant(run, values.variant)
    trained_run.results_row(run, variant)  # A run without results is told so before the work.
    networks = trained_run.restore_networks(run, variant)
    dataset = data.load(
        run.dataset.name,
        data_dir=values.data_dir or None,
        validation_size=run.config.data.validation_size,
        train_limit=run.config.data.train_limit or None,
        test_limit=run.config.data.test_limit or None,
        image_size=run.config.model.image_size,
    )
    return Finished(run, variant, networks, dataset)


def open_pipeline(finished: Finished, report: Path) -> Pipeline:
    """Of the run itself, with metrics of its own beside `report`: those of the run are complete.

    Who trains by it closes its writer.
    """
    config = finished.run.config
    workdir = Workdir(str(finished.run.files.path), config=config, flags_text="")
    writer = metrics.JsonlWriter(report.with_suffix(".metrics.jsonl"))  # Held by `workdir`'s lock.
    return Pipeline(config, dataset=finished.dataset, workdir=workdir, writer=writer)


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A network among those compared.

    Attributes:
      pipeline: of its supernet: who evaluates it, and the latency table.
      state: on the host.
      architecture: [L, O] that it runs; None: what its own controller decides.
      seconds: that it trained, if it did so by itself; a variant's are in results.json.
    """

    pipeline: Pipeline
    state: TrainState
    architecture: np.ndarray | None = None
    seconds: float | None = None


def train_mobilenetv2(pipeline: Pipeline, pretrained: TrainState) -> Entrant:
    """The run's own static baseline, which most runs have trained already."""
    architecture = search_space.uniform_architecture(pipeline.spec, search_space.MOBILENETV2_OP)
    return of_static(pipeline, pipeline.train_static("mobilenetv2", architecture, pretrained))


def of_static(pipeline: Pipeline, network: Network) -> Entrant:
    """A network of one architecture that the pipeline has trained."""
    return Entrant(pipeline, network.state, network.architecture, network.seconds)


def of_variant(finished: Finished, baseline: Entrant) -> Entrant:
    """The variant, whose optimizers nobody asks for: they are the baseline's."""
    return Entrant(baseline.pipeline, dataclasses.replace(baseline.state, **finished.networks))


def rows(entrants: dict[str, Entrant], dataset: data.Dataset) -> list[dict[str, Any]]:
    """A row each, timed in turn: accuracies and milliseconds, and what results.json says else of
    static networks. Reads the test split.

    Args:
      entrants: by name, all of one data set.
    """
    config = next(iter(entrants.values())).pipeline.config.run
    measured = timing.time_networks(
        {
            name: timing.Timed(one.pipeline.setting, one.state, one.architecture)
            for name, one in entrants.items()
        },
        images=results.timed_images(config, dataset),
        threads=config.inference_threads,
    )

    def row(name: str, one: Entrant) -> dict[str, Any]:
        pipeline, accuracies = one.pipeline, {}
        for split in ("test", "validation"):
            answers = pipeline.evaluate(
                one.state, getattr(dataset, split), architecture=one.architecture
            )
            accuracies[f"{split}_accuracy"] = answers.accuracy
        cost = (
            {}
            if one.architecture is None
            else results.static_cost(pipeline.spec, one.architecture, pipeline.table)
        )
        trained = {} if one.seconds is None else {"training_seconds": one.seconds}
        milliseconds = results.timing_fields(measured[name])
        return {"name": name, **accuracies, **cost, **milliseconds, **trained}

    return [row(name, one) for name, one in entrants.items()]


def write_report(path: Path, finished: Finished, contents: dict[str, Any]) -> None:
    """Writes what was found, and before it of which run, when and where it was."""
    write_json(
        path,
        {
            **results.describe(finished.run.config, finished.dataset),
            "variant": finished.variant,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            **contents,
        },
    )


def print_rows(compared: list[dict[str, Any]]) -> None:
    """A line each."""
    for row in compared:
        accuracy, milliseconds = row["test_accuracy"], row["measured_ms"]
        print(f"{row['name']}: {100 * accuracy:.2f} % in {milliseconds:.3f} ms")
