"""The whole recipe: table, pretrain, search, finetune of variants and baselines, results."""

import dataclasses
import math
import string
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import evaluation, recipe, results, stage_runner, timing
from experiments.config import Config
from experiments.workdir import Workdir
from instanas_jax import (
    controller,
    convolution,
    data,
    environment,
    latency,
    metrics,
    parallel,
    policy,
    search_space,
    train_state,
)
from instanas_jax.errors import InputError
from instanas_jax.stage import Setting, Stage
from instanas_jax.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class Network:
    """A finetuned network and what decides its paths: itself, or one architecture [L, O]."""

    name: str
    state: TrainState
    seconds: float
    architecture: np.ndarray | None = None


class Pipeline:
    """One run, from data to results.

    Args:
      config: validated settings.
      dataset: all three splits.
      workdir: where everything goes.
      table_path: a latency table to search with; None to measure one.
      allow_foreign_table: accept another device's table.
    """

    def __init__(
        self,
        config: Config,
        *,
        dataset: data.Dataset,
        workdir: Workdir,
        table_path: str | None = None,
        allow_foreign_table: bool = False,
    ):
        self.config = config
        self.dataset = dataset
        self.workdir = workdir
        self.spec = config.model.spec(num_classes=dataset.num_classes)
        if dataset.image_size != self.spec.image_size:
            raise InputError(
                f"--preset={self.spec.name} reads images of {self.spec.image_size} pixels, "
                f"{dataset.name} has {dataset.image_size}: choose another preset"
            )
        self.setting = Setting(
            spec=self.spec,
            mean=dataset.mean,
            std=dataset.std,
            augmentation=config.data.augmentation,
            seed=config.run.seed,
            lowering=convolution.default_lowering(),
            dtype=jnp.dtype(config.model.dtype),
            axis_name=parallel.AXIS_NAME,
        )
        self._check_batches()
        self.table = self._latency_table(table_path, allow_foreign_table)
        self.writer = metrics.MultiWriter(
            [metrics.JsonlWriter(workdir.metrics), metrics.TensorBoardWriter(workdir.tensorboard)]
        )
        devices = parallel.device_count()
        batch_size = math.ceil(min(256, len(dataset.validation)) / devices) * devices
        self.evaluate = evaluation.Evaluator(self.setting, batch_size=batch_size)

    def run(self) -> dict[str, Any]:
        """Runs or resumes every stage, then evaluates; returns the contents of results.json."""
        try:
            pretrained, pretrain_seconds = self._pretrain()
            snapshots, search_seconds = self._search(pretrained)
            statics = [self._finetune_static(op, pretrained) for op in self.config.run.static_ops]
            variants = self._finetune_variants(snapshots)
        finally:
            self.writer.close()
        seconds = {
            "pretrain": pretrain_seconds,
            "search": search_seconds,
            "finetune": sum(network.seconds for network in variants),
            "static": sum(network.seconds for network in statics),
        }
        return results.collect(
            self.config,
            setting=self.setting,
            dataset=self.dataset,
            table=self.table,
            evaluate=self.evaluate,
            statics={
                network.name: (network.state, network.architecture)
                for network in statics
                if network.architecture is not None
            },
            variants={network.name: network.state for network in variants},
            seconds=seconds,
        )

    def _steps(self, epochs: float, batch_size: int) -> int:
        return recipe.stage_steps(epochs, images=len(self.dataset.train), batch_size=batch_size)

    def _check_batches(self) -> None:
        for name in ("pretrain", "search", "finetune"):
            batch_size = getattr(self.config, name).batch_size
            parallel.check_batch_size(batch_size, flag=f"{name}_batch_size")
            data.steps_per_epoch(len(self.dataset.train), batch_size)

    def _latency_table(self, table_path: str | None, allow_foreign: bool) -> latency.LatencyTable:
        device = environment.describe_device(inference_threads=self.config.run.inference_threads)
        if self.workdir.latency_table.exists():
            # The table this run began with; a resume on another machine keeps its reward.
            return latency.load(self.workdir.latency_table, self.spec)
        if table_path:
            table = latency.load(table_path, self.spec, device=device, allow_foreign=allow_foreign)
        else:
            table = timing.measure_table(
                self.spec,
                rounds=self.config.run.profile_rounds,
                threads=self.config.run.inference_threads,
            )
        latency.save(table, self.workdir.latency_table)
        return table

    def _run_stage(self, stage: Stage, state: TrainState, section: Any, **options: Any):
        batch_size = section.batch_size
        return stage_runner.run_stage(
            stage,
            state,
            self.dataset.train,
            batch_size=batch_size,
            seed=self.config.run.seed,
            checkpoints=self.workdir.checkpoints(stage.name),
            writer=self.writer,
            eval_steps=self._steps(self.config.run.eval_epochs, batch_size),
            log_steps=self.config.run.log_steps,
            **options,
        )

    def _validate(self, state: TrainState, architecture: np.ndarray | None) -> dict[str, float]:
        answers = self.evaluate(state, self.dataset.validation, architecture=architecture)
        scalars = {
            "validation_accuracy": answers.accuracy,
            "validation_loss": float(answers.loss.mean()),
        }
        if architecture is None:
            statistics = evaluation.policy_statistics(
                answers,
                table=self.table,
                spec=self.spec,
                settled=controller.settled(self.spec, state.controller),
            )
            scalars.update({f"validation_{name}": value for name, value in statistics.items()})
        return scalars

    def _pretrain(self) -> tuple[TrainState, float]:
        section = self.config.pretrain
        total_steps = self._steps(section.epochs, section.batch_size)
        stage = recipe.pretrain_stage(self.setting, section, total_steps=total_steps)
        fresh = train_state.create(
            jax.random.key(self.config.run.seed),
            self.spec,
            policy_start=recipe.policy_start(self.spec, self.config.search),
        )
        everything_on = np.ones(self.spec.mask_shape, np.float32)
        return self._run_stage(
            stage,
            fresh,
            section,
            total_steps=total_steps,
            validate=lambda state, step: self._validate(state, everything_on),
        )

    def _search(self, pretrained: TrainState) -> tuple[dict[str, TrainState], float]:
        section = self.config.search
        total_steps = max(2, self._steps(section.epochs, section.batch_size))
        epoch_steps = self._steps(1.0, section.batch_size)
        stage = recipe.search_stage(
            self.setting, section, self.table, total_steps=total_steps, epoch_steps=epoch_steps
        )
        count = min(self.config.run.variants, total_steps)
        keep_steps = tuple(total_steps * (index + 1) // count for index in range(count))
        _, seconds = self._run_stage(
            stage,
            pretrained,
            section,
            total_steps=total_steps,
            validate=lambda state, step: self._validate(state, None),
            keep_steps=keep_steps,
        )
        directory = self.workdir.checkpoints(stage.name)
        snapshots = {
            name: stage_runner.restore_kept(directory, step, pretrained)
            for name, step in zip(string.ascii_uppercase, keep_steps, strict=False)
        }
        return snapshots, seconds

    def _finetune(
        self,
        name: str,
        stage: Stage,
        state: TrainState,
        architecture: np.ndarray | None,
        steps: int,
    ) -> Network:
        final, seconds = self._run_stage(
            dataclasses.replace(stage, name=f"finetune_{name}"),
            state,
            self.config.finetune,
            total_steps=steps,
            validate=lambda state, step: self._validate(state, architecture),
            batches_named="finetune",
        )
        return Network(name, final, seconds, architecture)

    def _finetune_variants(self, snapshots: dict[str, TrainState]) -> list[Network]:
        section = self.config.finetune
        steps = self._steps(section.epochs, section.batch_size)
        variants = []
        for name, snapshot in snapshots.items():
            masks = self.evaluate.decisions(snapshot, self.dataset.train)
            settled = policy.Settled.by_masks(masks, tolerance=section.settle_tolerance)
            state = dataclasses.replace(
                snapshot, controller=controller.settle(snapshot.controller, settled)
            )
            stage = recipe.finetune_stage(self.setting, section, steps, settled)
            variants.append(self._finetune(name, stage, state, None, steps))
        return variants

    def _finetune_static(self, op_name: str, pretrained: TrainState) -> Network:
        """A static baseline, from the pretrained supernet, with as many images as the supernet
        sees after pretraining on the way to a variant: its half of the search, and finetuning."""
        section = self.config.finetune
        search_images = self.config.search.epochs / 2
        steps = self._steps(search_images + section.epochs, section.batch_size)
        op = search_space.op_index(op_name)
        architecture = search_space.uniform_architecture(self.spec, op)
        settled = policy.Settled.architecture(architecture)
        stage = recipe.finetune_stage(self.setting, section, steps, settled)
        name = "mobilenetv2" if op == search_space.MOBILENETV2_OP else op_name
        return self._finetune(name, stage, pretrained, architecture, steps)
