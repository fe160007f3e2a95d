"""REINFORCE with a self-critical baseline.

Source: InstaNAS (arXiv 1811.10201), section 3.3; self-critical sequence training
(arXiv 1612.00563), equation 7.
"""

import functools
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from instanas_jax import policy

AdvantageKind = Literal["self_critical", "standardised", "leave_one_out"]
ADVANTAGE_KINDS: tuple[AdvantageKind, ...] = ("self_critical", "standardised", "leave_one_out")

_SMALLEST_SPREAD = 1e-3  # Of rewards: equal ones must not become large by division.


def self_critical_advantage(sampled_reward: jax.Array, greedy_reward: jax.Array) -> jax.Array:
    """Reward of the sampled mask over the greedy mask's for the same image; [B].

    The greedy answer is the baseline, so a sample is reinforced only where it beats what test
    time would have done.
    """
    chex.assert_equal_shape([sampled_reward, greedy_reward])
    return sampled_reward - greedy_reward


def leave_one_out_advantage(sampled_reward: jax.Array) -> jax.Array:
    """Reward of each sampled mask over the mean of the image's other samples; shapes as given.

    Source: Buy 4 REINFORCE samples, get a baseline for free (Kool, van Hoof, Welling; ICLR 2019
    workshop). What makes an image's reward high whatever its mask drops out of the gradient.

    Args:
      sampled_reward: [S, B], two samples or more.
    """
    chex.assert_rank(sampled_reward, 2)
    samples = sampled_reward.shape[0]
    return (sampled_reward - jnp.mean(sampled_reward, axis=0)) * (samples / (samples - 1))


def standardise(advantage: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Advantages at mean 0 and standard deviation 1 over the global batch; shapes as given.

    A sample is usually worse than the greedy answer, if only for being noise. Its advantage is
    then negative whatever it drew, and every update makes the policy more certain of what it
    does already; after some 30 updates on digits nothing was left to choose. The mean takes that
    away, and the scale makes rates and entropy weights independent of the reward's.

    Args:
      axis_name: the device axis that shares the global batch, if any.
    """
    mean = functools.partial(policy.mean_over_batch, axis_name=axis_name)
    centred = advantage - mean(advantage)
    spread = jnp.sqrt(mean(jnp.square(centred)))
    return centred / jnp.maximum(spread, _SMALLEST_SPREAD)


def reinforce_loss(
    policy_logits: jax.Array,
    mask: jax.Array,
    advantage: jax.Array,
    *,
    bounding: policy.Bounding,
    entropy_weight: float,
    entropy_kind: policy.EntropyKind = "one_sided",
) -> jax.Array:
    """Mean over images of -advantage * log pi(mask) - entropy_weight * H(pi).

    Args:
      policy_logits: [B, L, O].
      mask: [B, L, O], the sampled mask.
      advantage: [B]; no gradient flows through it.
      bounding: see `policy.log_probabilities`.
      entropy_weight: the paper's beta.
      entropy_kind: see `policy.entropy`. Differs from the paper: `one_sided`, the authors'
        program's entropy, is the default.

    Returns:
      Scalar.
    """
    chex.assert_rank([policy_logits, mask, advantage], [3, 3, 1])
    log_prob = policy.log_prob(mask, policy_logits, bounding=bounding)
    entropy = policy.entropy(policy_logits, bounding=bounding, kind=entropy_kind)
    return jnp.mean(-jax.lax.stop_gradient(advantage) * log_prob - entropy_weight * entropy)
