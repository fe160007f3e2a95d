"""What each stage of a run trains, by which settings, and for how many updates."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from experiments import recipe
from experiments.config import Config
from experiments.stage_config import FinetuneConfig, PretrainConfig, SearchConfig
from instanas_jax import latency, policy, search_space
from instanas_jax.stage import Setting, Stage


@dataclasses.dataclass(frozen=True)
class Plan:
    """A stage, and the section of the configuration that it trains by.

    Attributes:
      total_steps: updates after which the stage ends.
      first_step: updates among them that its first state brings along, from another stage.
      name: of the network that the stage makes, if it is a finetuning.
      architecture: [L, O] that decides its paths, if it is not the network itself.
    """

    stage: Stage
    section: PretrainConfig | SearchConfig | FinetuneConfig
    total_steps: int
    first_step: int = 0
    name: str = ""
    architecture: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Planner:
    """Plans of one run.

    Attributes:
      images: how many the training split has.
    """

    config: Config
    setting: Setting
    table: latency.LatencyTable
    images: int

    @property
    def trained_paths(self) -> np.ndarray:
        """bool [L, O]; no network of the run has another path."""
        return recipe.trained_paths(self.setting.spec, self.config)

    def steps(self, epochs: float, batch_size: int) -> int:
        return recipe.stage_steps(epochs, images=self.images, batch_size=batch_size)

    def pretraining(self) -> Plan:
        section = self.config.pretrain
        total_steps = self.steps(section.epochs, section.batch_size)
        stage = recipe.pretrain_stage(
            self.setting, section, total_steps=total_steps, paths=self.trained_paths
        )
        return Plan(stage, section, total_steps)

    def search(self) -> Plan:
        section = self.config.search
        total_steps = max(2, self.steps(section.epochs, section.batch_size))
        stage = recipe.search_stage(
            self.setting,
            section,
            self.table,
            total_steps=total_steps,
            epoch_steps=self.steps(1.0, section.batch_size),
        )
        return Plan(stage, section, total_steps)

    def variant(self, name: str, settled: policy.Settled) -> Plan:
        """Finetuning of a snapshot that has settled these decisions, after what variants share."""
        plan = self._finetuning(name, settled, self.config.finetune, None)
        return dataclasses.replace(plan, first_step=self.shared_steps)

    @property
    def shared_steps(self) -> int:
        """The first updates of finetuning, which variants share; the last is each one's own."""
        section = self.config.finetune
        total_steps = self.steps(section.epochs, section.batch_size)
        return min(round(section.open_share * total_steps), total_steps - 1)

    def shared(self, policies: Iterable[policy.Settled]) -> Plan | None:
        """What variants with these settled decisions share, if anything: all images run every path
        that some image of one of them may run."""
        if not self.shared_steps:
            return None
        forced_cells = self.setting.spec.forced_cells
        paths = np.any([settled.may_run(forced_cells) for settled in policies], axis=0)
        settled, architecture = policy.Settled.architecture(paths), paths.astype(np.float32)
        plan = self._finetuning("shared", settled, self.config.finetune, architecture)
        return dataclasses.replace(plan, total_steps=self.shared_steps)

    def one_op(self, op_name: str) -> Plan:
        """A static baseline with the same op in all cells."""
        op = search_space.op_index(op_name)
        name = "mobilenetv2" if op == search_space.MOBILENETV2_OP else op_name
        return self.static(name, search_space.uniform_architecture(self.setting.spec, op))

    def static(self, name: str, architecture: np.ndarray) -> Plan:
        """A static network [L, O], from the pretrained supernet or, if variants do, from scratch,
        with as many images as the last variant's weights see from there on: in finetuning, and in
        the search where they come from it."""
        section = dataclasses.replace(self.config.finetune, epochs=self._epochs_after_pretraining())
        return self._finetuning(
            name, policy.Settled.architecture(architecture), section, architecture
        )

    def scratch(self, name: str, architecture: np.ndarray) -> Plan:
        """A static network [L, O] from fresh weights, with as many images as a variant's weights
        see in all, by the batches, rate, schedule and decay of the pretraining. Mixed and smoothed
        all along as in finetuning, since it is one training. Where variants start from scratch as
        well, like their static baselines."""
        name = f"scratch_{name}"
        if self.config.finetune.start == "scratch":
            return self.static(name, architecture)
        like = self.config.pretrain
        section = dataclasses.replace(
            self.config.finetune,
            epochs=like.epochs + self._epochs_after_pretraining(),
            batch_size=like.batch_size,
            learning_rate=like.learning_rate,
            schedule=like.schedule,
            weight_decay=like.weight_decay,
        )
        return self._finetuning(
            name, policy.Settled.architecture(architecture), section, architecture
        )

    def _epochs_after_pretraining(self) -> float:
        """That train a variant's weights."""
        of_search = self.config.search.epochs / 2 if self.config.finetune.start == "search" else 0.0
        return self.config.finetune.epochs + of_search

    def _finetuning(
        self,
        name: str,
        settled: policy.Settled,
        section: FinetuneConfig,
        architecture: np.ndarray | None,
    ) -> Plan:
        total_steps = self.steps(section.epochs, section.batch_size)
        stage = recipe.finetune_stage(self.setting, section, total_steps, settled)
        stage = dataclasses.replace(stage, name=f"finetune_{name}")
        return Plan(stage, section, total_steps, name=name, architecture=architecture)
