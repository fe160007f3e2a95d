"""The accuracy-gated latency reward and the schedule of its upper bound.

Source: InstaNAS (arXiv 1811.10201), section 3.3, equations 2 and 3.
"""

import chex
import jax
import jax.numpy as jnp


def latency_reward(
    latency_ms: jax.Array,
    *,
    lower_ms: jax.Array | float,
    upper_ms: jax.Array | float,
    exponent: float = 1.0,
) -> jax.Array:
    """R_A: a parabola in latency, 0 at and outside both bounds, 1 midway between them.

    R_A = max(0, -(t - upper)(t - lower) / ((upper - lower) / 2)^2) ^ exponent.

    Args:
      latency_ms: [B].
      lower_ms, upper_ms: the bounds, lower < upper.
      exponent: sharpens (> 1) or flattens (< 1) the parabola.

    Returns:
      [B], in [0, 1].
    """
    half_width = (upper_ms - lower_ms) / 2.0
    parabola = -(latency_ms - upper_ms) * (latency_ms - lower_ms) / half_width**2
    return jnp.maximum(parabola, 0.0) ** exponent


def gated_reward(
    latency_rewards: jax.Array,
    correct: jax.Array,
    *,
    positive_weight: float,
    negative_weight: float,
) -> jax.Array:
    """R: latency counts only once the answer is right, which is what stops the search from
    collapsing to the shallowest network.

    Args:
      latency_rewards: R_A, [B].
      correct: bool [B], whether the prediction is right.
      positive_weight: multiplies R_A where right.
      negative_weight: the reward where wrong, zero or less.

    Returns:
      [B].
    """
    chex.assert_equal_shape([latency_rewards, correct])
    return jnp.where(correct, positive_weight * latency_rewards, negative_weight)


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
