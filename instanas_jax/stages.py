"""The first and the last stage: pretrain under path dropout, finetune under fixed decisions.

Source: InstaNAS (arXiv 1811.10201), section 3 and algorithm 1. The stage between is `search`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from instanas_jax import optimizers, policy
from instanas_jax.stage import (
    Batch,
    Metrics,
    Phase,
    Setting,
    Stage,
    augmented,
    draw_keys,
    policy_logits_of,
    restart,
    train_supernet,
)
from instanas_jax.train_state import TrainState


def path_keep_probability(progress: jax.Array | float, *, final: float) -> jax.Array:
    """Path dropout's keep probability: 1 for the first half, then linearly down to `final`."""
    fraction = jnp.clip(2.0 * jnp.asarray(progress, jnp.float32) - 1.0, 0.0, 1.0)
    return 1.0 + (final - 1.0) * fraction


def pretrain(
    setting: Setting,
    *,
    sgd: optimizers.SgdSettings,
    total_steps: int,
    final_keep: float = 0.5,
) -> Stage:
    """Trains the supernet for the task alone, under path dropout."""
    optimizer = optimizers.sgd(sgd, total_steps=total_steps)

    def init(state: TrainState) -> TrainState:
        return restart(state, supernet=optimizer)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        draws = draw_keys(setting, "pretrain", state.step, batch["image"].shape[0])
        images = augmented(setting, draws, batch)
        keep = path_keep_probability(state.step / total_steps, final=final_keep)
        mask = policy.random_masks(draws.mask, setting.spec.mask_shape, keep)
        return train_supernet(setting, optimizer, state, draws, images, batch["label"], mask)

    return Stage("pretrain", init, (Phase("supernet", step),))


def finetune(
    setting: Setting,
    *,
    name: str,
    sgd: optimizers.SgdSettings,
    total_steps: int,
    static_architecture: np.ndarray | None = None,
) -> Stage:
    """Trains the supernet under fixed decisions.

    Args:
      name: of the stage and its checkpoints.
      static_architecture: [L, O] for every image, in place of the controller's greedy masks.
    """
    optimizer = optimizers.sgd(sgd, total_steps=total_steps)

    def init(state: TrainState) -> TrainState:
        return restart(state, supernet=optimizer)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        labels = batch["label"]
        # All variants see the same augmentation, so that they differ by their policy alone.
        draws = draw_keys(setting, "finetune", state.step, labels.shape[0])
        images = augmented(setting, draws, batch)
        if static_architecture is None:
            mask = policy.greedy(policy_logits_of(setting, state, images))
        else:
            mask = jnp.broadcast_to(
                static_architecture, (labels.shape[0], *setting.spec.mask_shape)
            ).astype(jnp.float32)
        return train_supernet(
            setting,
            optimizer,
            state,
            draws,
            images,
            labels,
            mask,
            static_architecture=static_architecture,
        )

    return Stage(name, init, (Phase("supernet", step),))
