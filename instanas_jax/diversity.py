"""How much a policy's decisions depend on the image: what keeps a search instance-aware.

`B` images, `L` cells, `O` ops. All are scalars in nats, zero or more, of the global batch: large
where the policy is sure of every image and images differ, 0 where all images have the same policy,
however unsure. Which op runs does not count, only which cells do. Ours; the paper has none.
"""

import functools
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from instanas_jax import policy

DiversityKind = Literal["cells", "joint"]
DIVERSITY_KINDS: tuple[DiversityKind, ...] = ("cells", "joint")

_TINY = float(np.finfo(np.float32).tiny)


def depth_information(
    policy_logits: jax.Array,
    forced_cells: np.ndarray,
    *,
    bounding: policy.Bounding,
    kind: DiversityKind = "cells",
    axis_name: str | None = None,
) -> jax.Array:
    """What the image says about which cells run; scalar, nats.

    A cell that may be empty is passed through with probability q, the product of 1 - p' over its
    ops.

    Args:
      policy_logits: [B, L, O].
      forced_cells: bool [L], `SupernetSpec.forced_cells`; those are never empty.
      bounding: see `policy.log_probabilities`.
      kind: `cells` is the sum over cells of each one's information, to which ten cells that divide
        the images alike add as much as ten that each divide them in a way of their own; `joint` a
        lower bound of the information about all cells together, to which they add nothing.
      axis_name: the device axis that shares the global batch, if any.
    """
    chex.assert_rank(policy_logits, 3)
    chex.assert_axis_dimension(policy_logits, 1, len(forced_cells))
    optional = np.flatnonzero(~np.asarray(forced_cells))
    _, log_off = policy.log_probabilities(policy_logits, bounding=bounding)
    empty = jnp.exp(jnp.sum(log_off[:, optional], axis=-1))
    measure = _sum_over_cells if kind == "cells" else _joint_bound
    return measure(empty, axis_name)


def _sum_over_cells(empty: jax.Array, axis_name: str | None) -> jax.Array:
    """Sum of h(mean of q) - mean of h(q), h the entropy of a bit.

    Args:
      empty: [B, optional cells], q.
    """
    mean = functools.partial(policy.mean_over_batch, axis=0, axis_name=axis_name)
    return jnp.sum(_bit_entropy(mean(empty)) - mean(_bit_entropy(empty)))


def _bit_entropy(probability: jax.Array) -> jax.Array:
    """-p ln p - (1 - p) ln(1 - p); shapes as given."""
    pair = jnp.stack([probability, 1.0 - probability])
    # One of the two may be 0 in float32, whose logarithm has no gradient.
    return -jnp.sum(pair * jnp.log(jnp.maximum(pair, _TINY)), axis=0)


def _joint_bound(empty: jax.Array, axis_name: str | None) -> jax.Array:
    """Minus the mean over images of the log of how much, in the mean, they overlap with all.

    The overlap of two images is the Bhattacharyya coefficient of their policies, a product over
    cells: 1 where they are the same, 0 where no architecture could be both's. At most ln B.
    Source: Kolchinsky and Tracey, Estimating mixture entropy with pairwise distances (Entropy
    2017, 19(7), 361), section 3, the lower bound by the Chernoff distance at 1/2.

    Args:
      empty: [B, optional cells], q.
    """
    # The root of 0 has no gradient.
    roots = jnp.sqrt(jnp.maximum(jnp.stack([empty, 1.0 - empty], axis=-1), _TINY))
    everyone = lax.all_gather(roots, axis_name, tiled=True) if axis_name else roots
    overlap = jnp.prod(jnp.einsum("icp,jcp->ijc", roots, everyone), axis=-1)
    return -policy.mean_over_batch(jnp.log(jnp.mean(overlap, axis=1)), axis_name=axis_name)
