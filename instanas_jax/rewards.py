"""The reward: a task reward, which gates the latency reward, and the schedule of its upper bound.

Source: InstaNAS (arXiv 1811.10201), section 3.3, equations 2 and 3.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

TaskRewardKind = Literal["right", "information"]
TASK_REWARD_KINDS: tuple[TaskRewardKind, ...] = ("right", "information")


def latency_reward(
    latency_ms: jax.Array,
    *,
    lower_ms: jax.Array | float,
    upper_ms: jax.Array | float,
    exponent: float = 1.0,
) -> jax.Array:
    """R_A: a parabola in latency, 0 at and outside both bounds, 1 midway between them.

    R_A = max(0, -(t - upper)(t - lower) / ((upper - lower) / 2)^2) ^ exponent; of an exponent of 0
    its limit, 1 between the bounds.

    Args:
      latency_ms: [B].
      lower_ms, upper_ms: the bounds, lower < upper.
      exponent: sharpens (> 1) or flattens (< 1) the parabola.

    Returns:
      [B], in [0, 1].
    """
    half_width = (upper_ms - lower_ms) / 2.0
    parabola = -(latency_ms - upper_ms) * (latency_ms - lower_ms) / half_width**2
    return jnp.where(parabola > 0.0, jnp.maximum(parabola, 0.0) ** exponent, 0.0)


def right_reward(
    correct: jax.Array, *, positive_weight: float, negative_weight: float
) -> jax.Array:
    """R_T of the authors' program: one weight where the answer is right, another where wrong; [B].

    Args:
      correct: bool [B].
      positive_weight, negative_weight: the second is zero or less.
    """
    return jnp.where(correct, positive_weight, negative_weight)


def information_reward(loss: jax.Array, *, num_classes: int) -> jax.Array:
    """R_T by how much the network knows: max(0, 1 - loss / ln K); [B], in [0, 1].

    0 is what guessing among K classes earns, or worse. Ours: right or wrong says one bit of an
    image, and next to none of a supernet that is right about one image in ten. Nothing is negative,
    or policies would leave the bounds of latency, where an unsure answer costs less.

    Args:
      loss: cross-entropy [B], nats.
      num_classes: `K`.
    """
    return jnp.maximum(0.0, 1.0 - loss / np.log(num_classes))


def gated_reward(task_rewards: jax.Array, latency_rewards: jax.Array) -> jax.Array:
    """R: R_T * R_A where R_T > 0, else R_T. Latency counts only once the task is done, which is
    what stops the search from collapsing to the shallowest network.

    Args:
      task_rewards: R_T, [B].
      latency_rewards: R_A, [B].

    Returns:
      [B].
    """
    chex.assert_equal_shape([task_rewards, latency_rewards])
    return jnp.where(task_rewards > 0.0, task_rewards * latency_rewards, task_rewards)


def falling_upper_bound(
    progress: jax.Array | float, *, start_ms: float, end_ms: float
) -> jax.Array:
    """The dynamic reward's upper bound: linear from `start_ms` to `end_ms`.

    Args:
      progress: share of the search that is done, clipped to [0, 1].
      start_ms, end_ms: bound at the start and at the end; equal ones make the static reward.
    """
    fraction = jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0)
    return start_ms + (end_ms - start_ms) * fraction
