"""The first and the last stage: pretrain under path dropout, finetune under fixed decisions.

Source: InstaNAS (arXiv 1811.10201), section 3 and algorithm 1. The stage between is `search`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from instanas_jax import augment, optimizers, policy
from instanas_jax.stage import (
    Batch,
    Inputs,
    Phase,
    Setting,
    Stage,
    augmented,
    certain_targets,
    draw_keys,
    policy_logits_of,
    some_paths,
    supernet_inputs,
    supernet_update,
)
from instanas_jax.train_state import TrainState


def path_keep_probability(
    progress: jax.Array | float, *, final: float, start: float = 0.5, end: float = 1.0
) -> jax.Array:
    """Path dropout's keep probability: 1 until `start`, then linearly down to `final` at `end`.

    Args:
      progress, start, end: shares of the pretraining's updates; the paper's are 0.5 and 1.
    """
    fraction = (jnp.asarray(progress, jnp.float32) - start) / max(end - start, 1e-6)
    return 1.0 + (final - 1.0) * jnp.clip(fraction, 0.0, 1.0)


def pretrain(
    setting: Setting,
    *,
    sgd: optimizers.SgdSettings,
    total_steps: int,
    final_keep: float = 0.5,
    dropout_start: float = 0.5,
    dropout_end: float = 1.0,
    paths: np.ndarray,
) -> Stage:
    """Trains the supernet for the task alone, under path dropout.

    Args:
      paths: bool [L, O], those that are trained; the others are not computed.
    """
    rate = optimizers.learning_rate_schedule(
        sgd.schedule, learning_rate=sgd.learning_rate, total_steps=total_steps
    )

    def prepare(state: TrainState, batch: Batch) -> Inputs:
        labels = batch["label"]
        draws = draw_keys(setting, "pretrain", state.step, labels.shape[0])
        keep = path_keep_probability(
            state.step / total_steps, final=final_keep, start=dropout_start, end=dropout_end
        )
        mask = policy.path_dropout(draws.mask, paths, setting.spec.forced_cells, keep)
        images = augmented(setting, draws, batch)
        return supernet_inputs(
            setting.spec,
            images,
            labels,
            mask,
            dropout_keys=draws.dropout,
            sgd=sgd,
            learning_rate=rate(state.step),
        )

    update = supernet_update(setting, some_paths(paths))
    return Stage("pretrain", (Phase("supernet", prepare, update),))


def finetune(
    setting: Setting,
    *,
    name: str,
    sgd: optimizers.SgdSettings,
    total_steps: int,
    settled: policy.Settled,
    threshold_spread: float = 0.0,
    cut_mix: float = 0.0,
    label_smoothing: float = 0.0,
) -> Stage:
    """Trains the supernet under fixed decisions: those paths that some image may run.

    Args:
      name: of the stage and its checkpoints.
      settled: the decisions that the state's controller gives to every image; where that is
        everything, all images have one architecture and the controller is not asked.
      threshold_spread: every image is decided at a threshold drawn evenly from 0 plus or minus
        this, so that the network learns to answer under the budgets that the threshold can meet
        later (`budget`). Our addition.
      cut_mix: probability that an image is partly its neighbour in the batch (`augment.cut_mix`),
        and should be answered so. The policy decides about the image that results. Our addition.
      label_smoothing: share of the target that is spread over all classes (arXiv 1512.00567,
        section 7). Our addition.
    """
    spec = setting.spec
    rate = optimizers.learning_rate_schedule(
        sgd.schedule, learning_rate=sgd.learning_rate, total_steps=total_steps
    )

    def prepare(state: TrainState, batch: Batch) -> Inputs:
        labels = batch["label"]
        # All variants see the same augmentation, so that they differ by their policy alone.
        draws = draw_keys(setting, "finetune", state.step, labels.shape[0])
        images = augmented(setting, draws, batch)
        targets = certain_targets(spec, labels)
        if cut_mix:
            images, others, own = augment.cut_mix(draws.mix, images, labels, probability=cut_mix)
            targets += (1.0 - own[:, None]) * (certain_targets(spec, others) - targets)
        targets = optax.smooth_labels(targets, label_smoothing)
        if settled.everything:
            shape = (labels.shape[0], *spec.mask_shape)
            mask = jnp.broadcast_to(settled.on.astype(np.float32), shape)
        else:
            policy_logits = policy_logits_of(setting, state, images)
            if threshold_spread:
                policy_logits -= policy.random_thresholds(draws.mask, threshold_spread)
            mask = policy.greedy(policy_logits)
        return supernet_inputs(
            spec,
            images,
            labels,
            mask,
            dropout_keys=draws.dropout,
            sgd=sgd,
            learning_rate=rate(state.step),
            targets=targets,
        )

    paths = some_paths(settled.may_run(spec.forced_cells))
    return Stage(name, (Phase("supernet", prepare, supernet_update(setting, paths)),))
