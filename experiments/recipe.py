"""From configuration to stages: how flags' shares and names become steps, bounds and rates."""

import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments.config import Config
from experiments.stage_config import FinetuneConfig, PretrainConfig, SearchConfig
from instanas_jax import (
    convolution,
    data,
    feeding,
    latency,
    optimizers,
    parallel,
    policy,
    search,
    search_space,
    stages,
)
from instanas_jax.errors import InputError
from instanas_jax.search_space import SupernetSpec
from instanas_jax.stage import Setting, Stage

_START_OP_KEEP = 0.6  # Greedy masks begin with the start op, samples often without it.


def check_data(config: Config, dataset: data.Dataset) -> None:
    """InputError unless networks and batches of the configuration are for such images and devices.

    Ask before a run claims its folder, or the mended command finds another run's there.
    """
    preset, images = config.model, len(dataset.train)
    if dataset.image_size != preset.image_size:
        raise InputError(
            f"--preset={preset.preset} reads images of {preset.image_size} pixels, "
            f"{dataset.name} has {dataset.image_size}: choose another preset"
        )
    for name in ("pretrain", "search", "finetune"):
        flag, batch_size = f"{name}_batch_size", getattr(config, name).batch_size
        # Networks from scratch mix in batches of the pretraining's size (`plans`).
        mixes = name != "search" and config.finetune.cut_mix > 0.0
        feeding.check_batch_size(batch_size, flag=flag, in_pairs=mixes)
        if batch_size > images:
            raise InputError(f"--{flag}={batch_size}, but {images} images train: choose fewer")


def make_setting(
    config: Config,
    spec: SupernetSpec,
    dataset: data.Dataset,
    *,
    lowering: convolution.Lowering | None = None,
) -> Setting:
    """What all stages of a run share; `lowering` is the platform's by default."""
    return Setting(
        spec=spec,
        mean=dataset.mean,
        std=dataset.std,
        augmentation=config.data.augmentation,
        seed=config.run.seed,
        lowering=lowering or convolution.default_lowering(),
        dtype=jnp.dtype(config.model.dtype),
        axis_name=parallel.axis_name(),
        remat=config.run.remat,
    )


def stage_steps(epochs: float, *, images: int, batch_size: int) -> int:
    """Updates in so many passes over so many images, and at least one."""
    return max(1, round(epochs * data.steps_per_epoch(images, batch_size)))


def policy_start(spec: SupernetSpec, section: SearchConfig) -> np.ndarray:
    """Probability [L, O] of each path when the search begins."""
    start = np.full(spec.mask_shape, section.start_keep)
    start[_start_paths(spec, section)] = _START_OP_KEEP
    return start


def search_settled(spec: SupernetSpec, section: SearchConfig) -> policy.Settled:
    """What the search leaves as it is: nothing, or all but where the start ops run."""
    if section.scope == "paths":
        return policy.Settled.nothing(spec.mask_shape)
    start = _start_paths(spec, section)
    return policy.Settled(on=start & spec.forced_cells[:, None], off=~start)


def finetune_settled(
    spec: SupernetSpec, policy_logits: np.ndarray, section: FinetuneConfig
) -> policy.Settled:
    """What images of these logits [N, L, O] agree on, at all thresholds that are trained."""
    agreed = policy.Settled.by_thresholds(
        policy_logits >= section.threshold_spread,
        policy_logits >= -section.threshold_spread,
        tolerance=section.settle_tolerance,
    )
    return agreed.by_the_rule(spec.forced_cells)


def _start_paths(spec: SupernetSpec, section: SearchConfig) -> np.ndarray:
    """bool [L, O], each cell's start op."""
    names = section.start_ops
    if len(names) == 1:
        names *= spec.num_cells
    paths = np.zeros(spec.mask_shape, bool)
    for cell, name in enumerate(names):
        if name:
            paths[cell, search_space.op_index(name)] = True
    return paths


def trained_paths(spec: SupernetSpec, config: Config) -> np.ndarray:
    """bool [L, O], what is pretrained: what the search may choose, MobileNetV2's paths and those of
    the other static baselines."""
    paths = search_settled(spec, config.search).may_run(spec.forced_cells)
    baselines = {search_space.op_index(name) for name in config.run.static_ops}
    paths[:, [search_space.MOBILENETV2_OP, *baselines]] = True
    return paths


def pretrain_stage(
    setting: Setting, section: PretrainConfig, *, total_steps: int, paths: np.ndarray
) -> Stage:
    return stages.pretrain(
        setting,
        sgd=_sgd(section),
        total_steps=total_steps,
        final_keep=section.final_keep,
        dropout_start=section.dropout_start,
        dropout_end=section.dropout_end,
        paths=paths,
    )


def search_stage(
    setting: Setting,
    section: SearchConfig,
    table: latency.LatencyTable,
    *,
    total_steps: int,
    epoch_steps: int,
) -> Stage:
    """Bounds of the reward in milliseconds of this table."""
    settled = search_settled(setting.spec, section)
    bounds = latency.baselines(table, setting.spec, settled)
    upper_start_ms = section.upper_bound_start * bounds.max_ms
    upper_end_ms = section.upper_bound_end * bounds.mobilenetv2_ms
    if min(upper_start_ms, upper_end_ms) <= bounds.min_ms:
        logging.warning(
            "the reward's latency bound falls from %.3f to %.3f ms, but no architecture of this "
            "search takes less than %.3f ms, so that none is rewarded: raise "
            "--search_upper_bound_start or --search_upper_bound_end",
            upper_start_ms,
            upper_end_ms,
            bounds.min_ms,
        )
    decay_steps = round(section.controller_decay_epochs * epoch_steps)
    return search.search(
        setting,
        cells_ms=table.settled_ms,
        reward=search.RewardSettings(
            lower_ms=bounds.min_ms,
            upper_start_ms=upper_start_ms,
            upper_end_ms=upper_end_ms,
            task=section.task_reward,  # pyright: ignore[reportArgumentType]
            positive_weight=section.positive_weight,
            negative_weight=section.negative_weight,
            latency_exponent=section.latency_exponent,
            bounding=section.bounding,
            entropy_weight=section.entropy_weight,
            entropy_kind=section.entropy_kind,  # pyright: ignore[reportArgumentType]
            diversity_weight=section.diversity_weight,
            diversity_kind=section.diversity_kind,  # pyright: ignore[reportArgumentType]
            advantage=section.advantage,  # pyright: ignore[reportArgumentType]
            samples=section.samples,
        ),
        controller_rate=optimizers.decay_schedule(
            section.controller_learning_rate, decay_steps=decay_steps or None
        ),
        supernet_sgd=optimizers.SgdSettings(section.supernet_learning_rate, momentum=0.0),
        total_steps=total_steps,
        alternation_steps=1 if section.alternation == "batch" else epoch_steps,
        settled=settled,
    )


def finetune_stage(
    setting: Setting, section: FinetuneConfig, total_steps: int, settled: policy.Settled
) -> Stage:
    """Of a variant, or of a static baseline where everything is settled."""
    return stages.finetune(
        setting,
        name="finetune",
        sgd=_sgd(section),
        total_steps=total_steps,
        settled=settled,
        threshold_spread=section.threshold_spread,
        cut_mix=section.cut_mix,
        label_smoothing=section.label_smoothing,
    )


def _sgd(section: PretrainConfig | FinetuneConfig) -> optimizers.SgdSettings:
    return optimizers.SgdSettings(
        section.learning_rate,
        section.schedule,  # pyright: ignore[reportArgumentType]
        weight_decay=section.weight_decay,
    )
