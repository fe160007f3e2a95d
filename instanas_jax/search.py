"""The search stage: the controller by REINFORCE, the supernet under its masks, in turn.

Source: InstaNAS (arXiv 1811.10201), section 3.3 and algorithm 1.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from instanas_jax import (
    controller,
    diversity,
    latency,
    optimizers,
    policy,
    policy_gradient,
    rewards,
    supernet,
)
from instanas_jax.stage import (
    Batch,
    Draws,
    Inputs,
    Metrics,
    Phase,
    Setting,
    Stage,
    arrays_of,
    augmented,
    draw_keys,
    is_correct,
    mean_over_devices,
    policy_logits_of,
    some_paths,
    supernet_inputs,
    supernet_update,
    train_network,
)
from instanas_jax.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """The reward and its falling bound (paper section 3.3). Latencies are sums over cells."""

    lower_ms: float
    upper_start_ms: float
    upper_end_ms: float
    task: rewards.TaskRewardKind = "right"
    positive_weight: float = 30.0  # This and the next are of the task reward "right".
    negative_weight: float = 0.0
    latency_exponent: float = 1.0
    bounding: float = 0.8
    entropy_weight: float = 0.8
    entropy_kind: policy.EntropyKind = "one_sided"
    diversity_weight: float = 0.0  # Of `diversity.depth_information`; ours.
    diversity_kind: diversity.DiversityKind = "cells"
    advantage: policy_gradient.AdvantageKind = "self_critical"
    samples: int = 1  # Masks drawn an image for one update; the paper's is one.


def search(
    setting: Setting,
    *,
    cells_ms: np.ndarray,
    reward: RewardSettings,
    controller_rate: optax.Schedule,
    supernet_sgd: optimizers.SgdSettings,
    total_steps: int,
    alternation_steps: int,
    settled: policy.Settled | None = None,
) -> Stage:
    """Alternates controller updates (REINFORCE) with supernet updates under sampled masks.

    Args:
      cells_ms: [L, O].
      controller_rate: Adam's learning rate after so many updates of either phase.
      total_steps: of both phases together.
      alternation_steps: updates before the phase changes: an epoch's, or 1.
      settled: what is not searched: decisions that the state's controller gives to every image
        (`controller.settle`). They stay as they are, and what never runs is not computed. By
        default nothing.
    """
    spec = setting.spec
    if settled is None:
        settled = policy.Settled.nothing(spec.mask_shape)
    bounding = settled.bounding(reward.bounding)
    paths = settled.may_run(spec.forced_cells)
    supernet_rate = optimizers.learning_rate_schedule(
        supernet_sgd.schedule, learning_rate=supernet_sgd.learning_rate, total_steps=total_steps
    )

    def reward_of(
        class_logits: jax.Array, labels: jax.Array, mask: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        upper_ms = rewards.falling_upper_bound(
            step / total_steps, start_ms=reward.upper_start_ms, end_ms=reward.upper_end_ms
        )
        latency_ms = latency.lookup(cells_ms, mask, spec.forced_cells)
        latency_rewards = rewards.latency_reward(
            latency_ms,
            lower_ms=reward.lower_ms,
            upper_ms=upper_ms,
            exponent=reward.latency_exponent,
        )
        correct = is_correct(class_logits, labels)
        if reward.task == "information":
            loss = optax.softmax_cross_entropy_with_integer_labels(class_logits, labels)
            task_rewards = rewards.information_reward(loss, num_classes=spec.num_classes)
        else:
            task_rewards = rewards.right_reward(
                correct,
                positive_weight=reward.positive_weight,
                negative_weight=reward.negative_weight,
            )
        return rewards.gated_reward(task_rewards, latency_rewards), latency_ms, correct

    def controller_prepare(state: TrainState, batch: Batch) -> Inputs:
        draws = draw_keys(setting, "search", state.step, batch["label"].shape[0])
        return {"image": augmented(setting, draws, batch), "label": batch["label"]}

    def controller_update(state: TrainState, inputs: Inputs) -> tuple[TrainState, Metrics]:
        images, labels = inputs["image"], inputs["label"]
        draws = draw_keys(setting, "search", state.step, labels.shape[0])
        frozen_supernet = supernet.fold(arrays_of(state.supernet))

        def loss_fn(variables):
            policy_logits, moments = controller.apply_train(
                spec,
                variables,
                images,
                lowering=setting.lowering,
                dtype=setting.dtype,
                axis_name=setting.axis_name,
            )
            sampled = _sample_masks(draws, policy_logits, bounding=bounding, samples=reward.samples)
            # One pass under all masks: the sampled ones first, then the greedy ones.
            masks = lax.stop_gradient(jnp.concatenate([sampled, policy.greedy(policy_logits)]))
            class_logits = supernet.apply_eval(
                spec,
                frozen_supernet,
                images,
                masks,
                lowering=setting.lowering,
                dtype=setting.dtype,
                paths=paths,
            )
            totals, latency_ms, correct = reward_of(
                class_logits, jnp.concatenate([labels] * (reward.samples + 1)), masks, state.step
            )
            sampled_reward, greedy_reward = jnp.split(totals, [len(sampled)])
            advantage = _advantage(
                sampled_reward.reshape(reward.samples, -1), greedy_reward, reward, setting
            ).ravel()
            loss = policy_gradient.reinforce_loss(
                jnp.concatenate([policy_logits] * reward.samples),
                sampled,
                advantage,
                bounding=bounding,
                entropy_weight=reward.entropy_weight,
                entropy_kind=reward.entropy_kind,
            )
            information = diversity.depth_information(
                policy_logits,
                spec.forced_cells,
                bounding=bounding,
                kind=reward.diversity_kind,
                axis_name=setting.axis_name,
            )
            loss -= reward.diversity_weight * information
            sampled_latency, greedy_latency = jnp.split(latency_ms, [len(sampled)])
            sampled_correct, greedy_correct = jnp.split(correct, [len(sampled)])
            metrics = {
                "controller_loss": loss,
                "sampled_reward": jnp.mean(sampled_reward),
                "greedy_reward": jnp.mean(greedy_reward),
                "sampled_accuracy": jnp.mean(sampled_correct),
                "greedy_accuracy": jnp.mean(greedy_correct),
                "sampled_latency_ms": jnp.mean(sampled_latency),
                "greedy_latency_ms": jnp.mean(greedy_latency),
                "policy_entropy_nats": jnp.mean(policy.entropy(policy_logits, bounding=bounding)),
                "depth_information_nats": information,
            }
            return loss, (moments, metrics)

        optimizer = optimizers.adam(jnp.asarray(controller_rate(state.step)))
        variables, optimizer_state, _, metrics = train_network(
            setting, optimizer, loss_fn, state.controller, state.optimizer["controller"]
        )
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            controller=variables,
            optimizer={**state.optimizer, "controller": optimizer_state},
        )
        return new_state, mean_over_devices(setting, metrics)

    def supernet_prepare(state: TrainState, batch: Batch) -> Inputs:
        labels = batch["label"]
        draws = draw_keys(setting, "search", state.step, labels.shape[0])
        images = augmented(setting, draws, batch)
        policy_logits = policy_logits_of(setting, state, images)
        masks = policy.sample(draws.mask, policy_logits, bounding=bounding)
        # The policy of one image trains the weights on another, which keeps them of use to
        # many masks (facts of the authors' program).
        masks = _shuffle_over_batch(setting, draws.batch, masks)
        return supernet_inputs(
            setting.spec,
            images,
            labels,
            masks,
            dropout_keys=draws.dropout,
            sgd=supernet_sgd,
            learning_rate=supernet_rate(state.step),
        )

    phases = (
        Phase("controller", controller_prepare, controller_update),
        Phase("supernet", supernet_prepare, supernet_update(setting, some_paths(paths))),
    )
    return Stage("search", phases, lambda step: (step // alternation_steps) % 2)


def _advantage(
    sampled_reward: jax.Array, greedy_reward: jax.Array, reward: RewardSettings, setting: Setting
) -> jax.Array:
    """Of samples [S, B], whose images' greedy masks earn [B]."""
    if reward.advantage == "leave_one_out":
        advantage = policy_gradient.leave_one_out_advantage(sampled_reward)
    else:
        advantage = policy_gradient.self_critical_advantage(
            sampled_reward, jnp.broadcast_to(greedy_reward, sampled_reward.shape)
        )
        if reward.advantage == "self_critical":
            return advantage
    return policy_gradient.standardise(advantage, axis_name=setting.axis_name)


def _sample_masks(
    draws: Draws, policy_logits: jax.Array, *, bounding: policy.Bounding, samples: int
) -> jax.Array:
    """Masks [samples * B, L, O]: one of each image, then the next of each."""

    def sample(keys: jax.Array) -> jax.Array:
        return policy.sample(keys, policy_logits, bounding=bounding)

    if samples == 1:
        return sample(draws.mask)
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    return jnp.concatenate([sample(fold_in(draws.mask, index)) for index in range(samples)])


def _shuffle_over_batch(setting: Setting, key: jax.Array, masks: jax.Array) -> jax.Array:
    """Permutes masks over the global batch, over devices as well."""
    if setting.axis_name is None:
        return masks[jax.random.permutation(key, masks.shape[0])]
    everyone = lax.all_gather(masks, setting.axis_name, tiled=True)
    order = jax.random.permutation(key, everyone.shape[0])
    first = lax.axis_index(setting.axis_name) * masks.shape[0]
    return everyone[lax.dynamic_slice_in_dim(order, first, masks.shape[0])]
