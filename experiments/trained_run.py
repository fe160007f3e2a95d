"""A run's folder as those see it who use its networks: no data set, nothing written."""

import dataclasses
import json
import string
from typing import Any

import jax
import numpy as np

from experiments import dataset_summary, recipe
from experiments.config import Config
from experiments.dataset_summary import DatasetSummary
from experiments.workdir import RunFiles, load_table
from instanas_jax import budget, checkpoint, controller, latency, train_state
from instanas_jax.errors import InputError
from instanas_jax.search_space import SupernetSpec


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """What a run was about; its networks come from `restore_networks`."""

    files: RunFiles
    config: Config
    dataset: DatasetSummary
    spec: SupernetSpec
    table: latency.LatencyTable


def open_run(path: str) -> TrainedRun:
    """Reads what a run is about; InputError where the folder is not one or lacks something."""
    files = RunFiles(path)
    config = _read_config(files)
    dataset = dataset_summary.load(files.dataset)
    spec = config.model.spec(num_classes=len(dataset.class_names))
    if dataset.image_size != spec.image_size:
        raise InputError(
            f"{files.dataset} says {dataset.image_size} pixels, the network of {files.config} "
            f"reads {spec.image_size}: the files are of two runs, name another --workdir"
        )
    return TrainedRun(files, config, dataset, spec, load_table(files, spec))


def choose_variant(run: TrainedRun, name: str = "") -> str:
    """Chooses a finished variant, or checks that the named one is.

    Args:
      name: of a variant; empty: the one of the highest validation accuracy in results.json, the
        faster of equals, or as long as there are no results the last one that is finished.

    Raises:
      InputError: there is no such variant, or none that is finished.
    """
    final_step = _final_step(run)
    finished = [name for name in string.ascii_uppercase if final_step in _steps_done(run, name)]
    has_results = run.files.results.exists()
    if not finished:
        finish = f"{'delete results.json and ' if has_results else ''}repeat the command of the run"
        raise InputError(f"--workdir={run.files.path} has no finished variant: {finish}")
    if not name:
        name = _best_variant(run) if has_results else finished[-1]
    if name not in finished:
        raise InputError(
            f"--workdir={run.files.path} has no finished variant {name}: choose --variant from "
            f"{', '.join(finished)}{'' if has_results else ', or repeat the command of the run'}"
        )
    return name


def restore_networks(run: TrainedRun, variant: str) -> dict[str, Any]:
    """Variables of a finetuned variant's "supernet" and "controller", on the host.

    Raises:
      InputError: its last checkpoint is damaged, or of other networks.
    """
    raveled = jax.eval_shape(train_state.ravel, train_state.shapes(run.spec))
    like = {"state": raveled, "seconds": jax.ShapeDtypeStruct((), np.float64)}
    checkpoints = _checkpoints(run, variant)
    try:
        state = checkpoints.restore(_final_step(run), like)["state"]
    except InputError as error:
        raise _not_restored(run, variant, "its last checkpoint is damaged or of others") from error
    finally:
        checkpoints.close()
    if jax.tree.map(np.shape, state) != jax.tree.map(np.shape, like["state"]):
        raise _not_restored(run, variant, "its last checkpoint is of others")
    state = train_state.unravel(state)
    return {"supernet": state.supernet, "controller": state.controller}


def networks_at(run: TrainedRun, variant: str, budget_ms: float | None) -> dict[str, Any]:
    """As `restore_networks`, deciding so that images take that much in the mean by the run's table,
    or as trained.

    Raises:
      InputError: as there, or the variant can't meet the budget, or its training diverged.
    """
    networks = restore_networks(run, variant)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(networks)):
        raise InputError(
            f"variant {variant} has parameters that are no numbers, so its training diverged: "
            "choose another --variant"
        )
    if budget_ms is not None:
        threshold = budget.threshold(budget_curve(run, variant), budget_ms)
        networks["controller"] = controller.decide_at(networks["controller"], threshold)
    return networks


def results_row(run: TrainedRun, variant: str) -> dict[str, Any]:
    """What results.json says of a variant; InputError if that is nothing."""
    try:
        rows = json.loads(run.files.results.read_text())["variants"]
        return dict(next(row for row in rows if row["name"] == variant))
    except FileNotFoundError:
        raise InputError(
            f"{run.files.results} does not exist, so the run is not finished: repeat its command"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise InputError(
            f"{run.files.results} says nothing of variant {variant} ({error!r}): repeat the "
            "command of the run"
        ) from error


def budget_curve(run: TrainedRun, variant: str) -> budget.Curve:
    """What a variant takes by the threshold of its controller, as the run has calibrated it.

    Raises:
      InputError: the run has no results yet, or its results hold no such curve.
    """
    row = results_row(run, variant)
    try:
        return budget.Curve.from_json(row["budget"]["curve"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{run.files.results} holds no budgets of variant {variant} ({error!r}): delete it and "
            "repeat the command of the run"
        ) from error


def _not_restored(run: TrainedRun, variant: str, reason: str) -> InputError:
    return InputError(
        f"variant {variant} of {run.files.path} does not give the networks that config.json "
        f"describes ({reason}): copy the run's folder again, or delete its results.json and repeat "
        "the run's command, which trains this anew"
    )


def _read_config(files: RunFiles) -> Config:
    try:
        values = json.loads(files.config.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"--workdir={files.path} holds no config.json, so it is not a run's folder: name the "
            "--workdir of a training run"
        ) from None
    except OSError as error:
        raise InputError(
            f"{files.config} cannot be read ({error.strerror}): check its permissions"
        ) from error
    except ValueError as error:
        raise InputError(f"{files.config} is not JSON ({error}): name another --workdir") from error
    try:
        return Config.from_json(values)
    except InputError as error:
        raise InputError(
            f"{files.config} does not fit this program ({error}): use the version that made the run"
        ) from error


def _final_step(run: TrainedRun) -> int:
    """Updates behind a finished variant's last checkpoint."""
    section = run.config.finetune
    return recipe.stage_steps(
        section.epochs, images=run.dataset.train_images, batch_size=section.batch_size
    )


def _steps_done(run: TrainedRun, variant: str) -> list[int]:
    if not run.files.finetuning(variant).is_dir():
        return []
    checkpoints = _checkpoints(run, variant)
    try:
        return checkpoints.steps()
    finally:
        checkpoints.close()


def _checkpoints(run: TrainedRun, variant: str) -> checkpoint.StageCheckpoints:
    return checkpoint.StageCheckpoints(run.files.finetuning(variant))


def best_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of variants, the one of the highest validation accuracy, the faster of equals."""
    return min(rows, key=lambda row: (-row["validation_accuracy"], row["measured_ms"]))


def _best_variant(run: TrainedRun) -> str:
    try:
        rows = json.loads(run.files.results.read_text())["variants"]
        return str(best_row(rows)["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{run.files.results} cannot be read ({error}): choose a --variant yourself"
        ) from error
