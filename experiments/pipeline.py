"""The whole recipe: table, pretrain, search, finetune of variants and baselines, results."""

import concurrent.futures
import dataclasses
import functools
import math
import string
from typing import Any

import jax
import numpy as np

from experiments import evaluation, recipe, results, stage_runner, timing
from experiments.config import Config
from experiments.plans import Plan, Planner
from experiments.workdir import Workdir
from instanas_jax import (
    controller,
    data,
    environment,
    metrics,
    parallel,
    policy,
    train_loop,
    train_state,
)
from instanas_jax.errors import InputError
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
      writer: of metrics; by default one into the folder.
    """

    def __init__(
        self,
        config: Config,
        *,
        dataset: data.Dataset,
        workdir: Workdir,
        table_path: str | None = None,
        allow_foreign_table: bool = False,
        writer: metrics.Writer | None = None,
    ):
        self.config = config
        self.dataset = dataset
        self.workdir = workdir
        self.spec = config.model.spec(num_classes=dataset.num_classes)
        recipe.check_data(config, dataset)
        self.setting = recipe.make_setting(config, self.spec, dataset)
        self.table = parallel.from_first(
            lambda: timing.table_of_run(
                config.run, self.spec, workdir, path=table_path, allow_foreign=allow_foreign_table
            )
        )
        self.planner = Planner(config, self.setting, self.table, images=len(dataset.train))
        self.writer = writer or metrics.MultiWriter(
            [metrics.JsonlWriter(workdir.metrics), metrics.TensorBoardWriter(workdir.tensorboard)]
            if parallel.is_first()
            else []
        )
        devices = parallel.device_count()
        batch_size = math.ceil(min(256, len(dataset.validation)) / devices) * devices
        self.evaluate = evaluation.Evaluator(
            self.setting, batch_size=batch_size, paths=self.planner.trained_paths
        )

    def run(self) -> dict[str, Any]:
        """Runs or resumes every stage, then evaluates; returns the contents of results.json."""
        self._begin_sitting()
        pretraining, searching = self.planner.pretraining(), self.planner.search()
        baselines = [self.planner.one_op(op) for op in self.config.run.static_ops]
        # What trains later compiles on the cores that what trains now leaves idle; what trains
        # first compiles alone, or it would share them while nothing trains.
        with concurrent.futures.ThreadPoolExecutor(1) as compiler:
            try:
                self._compile_ahead(compiler, [pretraining])
                compiler.submit(self.evaluate.compile_ahead, self._fresh, self.dataset.validation)
                self._compile_ahead(compiler, [searching, *baselines])
                pretrained, pretrain_seconds = self._pretrain(pretraining)
                snapshots, search_seconds = self._search(searching, pretrained)
                finetunings = [
                    self._plan_variant(name, snapshot, pretrained)
                    for name, snapshot in snapshots.items()
                ]
                shared = self.planner.shared(
                    controller.settled(self.spec, state.controller) for _, state in finetunings
                )
                plans = [shared, *(plan for plan, _ in finetunings)]
                self._compile_ahead(compiler, [plan for plan in plans if plan])
                begin = self._begin_of_statics(pretrained)
                statics = [self._finetune(plan, begin) for plan in baselines]
                finetunings, shared_seconds = self._share(shared, finetunings)
                variants = [self._finetune(plan, state) for plan, state in finetunings]
            finally:
                compiler.shutdown(wait=False, cancel_futures=True)
                self.writer.close()
        seconds = {
            "pretrain": pretrain_seconds,
            "search": search_seconds,
            "finetune": shared_seconds + sum(network.seconds for network in variants),
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
            sittings=parallel.from_first(self.workdir.read_sittings),
        )

    def pretrained(self) -> TrainState:
        """The pretrained supernet of a run that has one; InputError otherwise."""
        plan = self.planner.pretraining()
        checkpoints = self.workdir.checkpoints(plan.stage.name)
        if not stage_runner.is_done(checkpoints, plan.total_steps):
            raise InputError(
                f"{checkpoints} lacks the pretrained supernet: copy the run's folder whole, or "
                "repeat the command of the run in another --workdir"
            )
        return self._pretrain(plan)[0]

    def train_static(self, name: str, architecture: np.ndarray, pretrained: TrainState) -> Network:
        """One architecture [L, O] as the run's static baselines are trained, or resumed."""
        begin = self._begin_of_statics(pretrained)
        return self._finetune(self.planner.static(name, architecture), begin)

    def train_from_scratch(self, name: str, architecture: np.ndarray) -> Network:
        """One architecture [L, O] from fresh weights, without the supernet's pretraining."""
        return self._finetune(self.planner.scratch(name, architecture), self._fresh)

    def _begin_of_statics(self, pretrained: TrainState) -> TrainState:
        """What static networks train from."""
        return self._fresh if self.config.finetune.start == "scratch" else pretrained

    @functools.cached_property
    def _fresh(self) -> TrainState:
        return train_state.create(
            jax.random.key(self.config.run.seed),
            self.spec,
            policy_start=recipe.policy_start(self.spec, self.config.search),
        )

    def _begin_sitting(self) -> None:
        where = {
            "device": environment.describe_device(),
            "devices": parallel.device_count(),
            "processes": parallel.process_count(),
        }
        parallel.from_first(lambda: self.workdir.begin_sitting(where))

    def _compile_ahead(self, compiler: concurrent.futures.Executor, plans: list[Plan]) -> None:
        """Of stages that are not done yet. What fails here fails again in its turn, and is seen."""
        raveled = train_state.ravel(self._fresh)
        for plan in plans:
            checkpoints = self.workdir.checkpoints(plan.stage.name)
            if not stage_runner.is_done(checkpoints, plan.total_steps):
                batch_size = plan.section.batch_size
                batch = data.blank_batch(
                    self.dataset.train, batch_size=batch_size, share=parallel.share(batch_size)
                )
                compiler.submit(train_loop.compile_ahead, plan.stage, raveled, dict(batch))

    def _run_stage(self, plan: Plan, state: TrainState, **options: Any):
        batch_size = plan.section.batch_size
        return stage_runner.run_stage(
            plan.stage,
            state,
            self.dataset.train,
            total_steps=plan.total_steps,
            batch_size=batch_size,
            seed=self.config.run.seed,
            checkpoints=self.workdir.checkpoints(plan.stage.name),
            writer=self.writer,
            first_step=plan.first_step,
            eval_steps=self.planner.steps(self.config.run.eval_epochs, batch_size),
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

    def _plan_variant(
        self, name: str, snapshot: TrainState, pretrained: TrainState
    ) -> tuple[Plan, TrainState]:
        """And the state to finetune: the snapshot's policy, its decisions settled, with the weights
        that variants start from."""
        settled = self._settled_before(name) or recipe.finetune_settled(
            self.spec,
            self.evaluate.policy_logits(snapshot, self.dataset.train),
            self.config.finetune,
        )
        state = dataclasses.replace(
            snapshot
            if self.config.finetune.start == "search"
            else self._begin_of_statics(pretrained),
            controller=controller.settle(snapshot.controller, settled),
        )
        return self.planner.variant(name, settled), state

    def _share(
        self, shared: Plan | None, finetunings: list[tuple[Plan, TrainState]]
    ) -> tuple[list[tuple[Plan, TrainState]], float]:
        """What variants train together; then their states, each with its own policy, and the
        seconds that it took."""
        if shared is None:
            return finetunings, 0.0
        network = self._finetune(shared, finetunings[-1][1])
        return [
            (plan, dataclasses.replace(network.state, controller=state.controller))
            for plan, state in finetunings
        ], network.seconds

    def _settled_before(self, name: str) -> policy.Settled | None:
        """With what a variant that has a checkpoint began: where images stream, deciding about all
        of them again takes long."""

        def read() -> policy.Settled | None:
            state = stage_runner.newest(self.workdir.finetuning(name), self._fresh)
            return state and controller.settled(self.spec, state.controller)

        return parallel.from_first(read)

    def _pretrain(self, plan: Plan) -> tuple[TrainState, float]:
        paths = self.planner.trained_paths.astype(np.float32)
        return self._run_stage(
            plan, self._fresh, validate=lambda state, step: self._validate(state, paths)
        )

    def _search(self, plan: Plan, pretrained: TrainState) -> tuple[dict[str, TrainState], float]:
        """Snapshots by the names of the variants that they become."""
        count = min(self.config.run.variants, plan.total_steps)
        keep_steps = tuple(plan.total_steps * (index + 1) // count for index in range(count))
        settled = recipe.search_settled(self.spec, self.config.search)
        start = dataclasses.replace(
            pretrained, controller=controller.settle(pretrained.controller, settled)
        )
        _, seconds = self._run_stage(
            plan,
            start,
            validate=lambda state, step: self._validate(state, None),
            keep_steps=keep_steps,
        )
        directory = self.workdir.checkpoints(plan.stage.name)
        snapshots = {
            name: stage_runner.restore_kept(directory, step, pretrained)
            for name, step in zip(string.ascii_uppercase, keep_steps, strict=False)
        }
        return snapshots, seconds

    def _finetune(self, plan: Plan, state: TrainState) -> Network:
        final, seconds = self._run_stage(
            plan,
            state,
            validate=lambda state, step: self._validate(state, plan.architecture),
            batches_named="finetune",
        )
        return Network(plan.name, final, seconds, plan.architecture)
