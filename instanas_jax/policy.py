"""The Bernoulli policy over path masks, and the empty-cell rule.

Everything here is a pure function of arrays. `B` images, `L` cells, `O` ops.
Source: InstaNAS (arXiv 1811.10201), section 3.3.
"""

import dataclasses
import itertools
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from instanas_jax.errors import InputError
from instanas_jax.search_space import CANDIDATE_OPS, FORCED_OP, NUM_OPS, OpSpec

EntropyKind = Literal["one_sided", "binary"]
Bounding = float | np.ndarray  # The paper's alpha, of all paths or [L, O].


def log_probabilities(
    policy_logits: jax.Array, *, bounding: Bounding
) -> tuple[jax.Array, jax.Array]:
    """Logarithms of p' and 1 - p', where p' = a p + (1 - a)(1 - p) and p = sigmoid(logit).

    Bounding keeps exploring: with a = 0.8, p' stays in [0.2, 0.8]. Worked in log space so that
    a = 1 (no bounding) has finite values and gradients for any finite logit.

    Args:
      policy_logits: [..., L, O].
      bounding: the paper's alpha, in [0.5, 1]; [L, O] where paths differ (`Settled.bounding`).

    Returns:
      Two arrays [..., L, O].
    """
    log_on = jax.nn.log_sigmoid(policy_logits)
    log_off = jax.nn.log_sigmoid(-policy_logits)
    with np.errstate(divide="ignore"):  # Where nothing is bounded, log 0.
        log_keep, log_swap = np.log(bounding), np.log1p(-np.asarray(bounding))
    log_p = jnp.logaddexp(log_keep + log_on, log_swap + log_off)
    log_q = jnp.logaddexp(log_keep + log_off, log_swap + log_on)
    return log_p, log_q


def sample(keys: jax.Array, policy_logits: jax.Array, *, bounding: Bounding) -> jax.Array:
    """One mask an image, Bernoulli(p') for every path.

    Args:
      keys: typed keys [B], one an image, so that a draw does not depend on the batch's other
        images or on how many devices share the batch.
      policy_logits: [B, L, O].
      bounding: see `log_probabilities`.

    Returns:
      Mask [B, L, O], float32 of 0 and 1.
    """
    chex.assert_rank(policy_logits, 3)
    log_p, _ = log_probabilities(policy_logits, bounding=bounding)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, policy_logits.shape[1:]))(keys)
    return (uniform < jnp.exp(log_p)).astype(jnp.float32)


def greedy(policy_logits: jax.Array) -> jax.Array:
    """The mask of test time: a path is on where sigmoid(logit) >= 0.5. Shapes as given."""
    return (policy_logits >= 0.0).astype(jnp.float32)


def path_dropout(
    keys: jax.Array, paths: np.ndarray, forced_cells: np.ndarray, keep: jax.Array | float
) -> jax.Array:
    """One Bernoulli(keep) for each image and path; [B, L, O] float32.

    A cell that can't be empty is not left so where `FORCED_OP`, which would run in it, is not among
    the paths: it keeps all of its own.

    Args:
      keys: [B], one for each image.
      paths: bool [L, O], those that may be on.
      forced_cells: bool [L], `SupernetSpec.forced_cells`.
    """
    uniform = jax.vmap(lambda key: jax.random.uniform(key, paths.shape))(keys)
    mask = (uniform < keep) & paths
    refilled = paths & (forced_cells & ~paths[:, FORCED_OP])[:, None]
    empty = ~jnp.any(mask, axis=-1, keepdims=True)
    return (mask | (empty & refilled)).astype(jnp.float32)


def random_thresholds(keys: jax.Array, spread: float) -> jax.Array:
    """One threshold for each image, drawn evenly from -spread to spread; [B, 1, 1]."""
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (1, 1), minval=-1.0))(keys)
    return spread * uniform


def log_prob(mask: jax.Array, policy_logits: jax.Array, *, bounding: Bounding) -> jax.Array:
    """Log probability of each image's mask [B, L, O] under the bounded policy; [B], nats."""
    chex.assert_equal_shape([mask, policy_logits])
    log_p, log_q = log_probabilities(policy_logits, bounding=bounding)
    return jnp.sum(jnp.where(mask > 0.5, log_p, log_q), axis=(-2, -1))


def entropy(
    policy_logits: jax.Array, *, bounding: Bounding, kind: EntropyKind = "binary"
) -> jax.Array:
    """Entropy of the bounded policy summed over cells and ops; [B], nats.

    Args:
      policy_logits: [B, L, O].
      bounding: see `log_probabilities`.
      kind: `binary` is -p' log p' - (1 - p') log(1 - p'); `one_sided` keeps the first term
        alone, as the authors' program does.
    """
    log_p, log_q = log_probabilities(policy_logits, bounding=bounding)
    terms = -jnp.exp(log_p) * log_p
    if kind == "binary":
        # exp(x) * x -> 0 as x -> -inf, but 0 * -inf is NaN; logits are finite, so is log_q.
        terms = terms - jnp.exp(log_q) * log_q
    return jnp.sum(terms, axis=(-2, -1))


def mean_over_batch(
    values: jax.Array, *, axis: int | None = None, axis_name: str | None = None
) -> jax.Array:
    """Mean over an axis, or all, and over the devices that share the global batch, if any."""
    local = jnp.mean(values, axis=axis)
    return lax.pmean(local, axis_name) if axis_name else local


def resolve_empty_cells(
    mask: jax.Array | np.ndarray, forced_cells: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """The empty-cell rule: what really runs where a cell's five paths are all off.

    In the first cell of a group `FORCED_OP` is switched on, because the shape may change there;
    in every other cell the image passes through unchanged.

    Args:
      mask: [..., L, O] of 0 and 1.
      forced_cells: bool [L], `SupernetSpec.forced_cells`.

    Returns:
      The mask that runs [..., L, O], and identity [..., L], 1 where the cell is passed through.
    """
    chex.assert_axis_dimension(mask, -1, NUM_OPS)
    mask = jnp.asarray(mask)
    empty = jnp.all(mask < 0.5, axis=-1)
    forced = jnp.asarray(forced_cells)
    forced_path = jax.nn.one_hot(FORCED_OP, NUM_OPS, dtype=mask.dtype)
    resolved = mask + (empty & forced)[..., None] * forced_path
    return resolved, (empty & ~forced).astype(mask.dtype)


def running_ops(architecture: np.ndarray, forced_cells: np.ndarray) -> list[list[OpSpec]]:
    """The ops that each cell of an architecture [L, O] runs, the empty-cell rule applied."""
    resolved, _ = resolve_empty_cells(architecture, forced_cells)
    return [[CANDIDATE_OPS[op] for op in np.flatnonzero(row)] for row in np.asarray(resolved)]


def describe(architecture: np.ndarray, forced_cells: np.ndarray) -> str:
    """An architecture [L, O] on one line: cells counted from 0, neighbours that agree together.

    `0 basic, 1-2 k3e3, 3 k3e6+k5e3, 4-16 skip`; the image passes through a cell that says `skip`.
    """
    cells = [
        "+".join(op.short_name for op in ops) or "skip"
        for ops in running_ops(architecture, forced_cells)
    ]
    parts, first = [], 0
    for text, equal in itertools.groupby(cells):
        last = first + len(list(equal)) - 1
        parts.append(f"{first}-{last} {text}" if last > first else f"{first} {text}")
        first = last + 1
    return ", ".join(parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Settled:
    """Decisions of a policy that are the same for every image.

    A searched policy is undecided, from image to image, about few of its paths. What is settled
    needs no switch to run and no gradient to train, and a path that is off for good no weights.

    Attributes:
      on: bool [L, O], paths that every image runs.
      off: bool [L, O], paths that no image runs by its policy; see `may_run`.
    """

    on: np.ndarray
    off: np.ndarray

    @classmethod
    def nothing(cls, mask_shape: tuple[int, int]) -> "Settled":
        """A policy of which nothing is known."""
        return cls(on=np.zeros(mask_shape, bool), off=np.zeros(mask_shape, bool))

    @classmethod
    def architecture(cls, architecture: np.ndarray) -> "Settled":
        """The policy that gives one architecture [L, O] to every image."""
        on = np.asarray(architecture) > 0.5
        return cls(on=on, off=~on)

    @classmethod
    def by_masks(cls, masks: np.ndarray, *, tolerance: float = 0.0) -> "Settled":
        """What the masks [N, L, O] of N images agree on.

        Args:
          tolerance: share of images that may disagree, below one half.
        """
        share = np.asarray(masks).mean(axis=0)
        return cls(on=share >= 1.0 - tolerance, off=share <= tolerance)

    @classmethod
    def by_thresholds(
        cls, cautious: np.ndarray, generous: np.ndarray, *, tolerance: float = 0.0
    ) -> "Settled":
        """What stays as it is between two thresholds of the logits.

        Args:
          cautious: masks [N, L, O] at the higher threshold, with the fewest paths.
          generous: at the lower one.
          tolerance: see `by_masks`.
        """
        return cls(
            on=cls.by_masks(cautious, tolerance=tolerance).on,
            off=cls.by_masks(generous, tolerance=tolerance).off,
        )

    def by_the_rule(self, forced_cells: np.ndarray) -> "Settled":
        """And what the empty-cell rule decides: `FORCED_OP` runs where no other path may.

        Args:
          forced_cells: bool [L], `SupernetSpec.forced_cells`.
        """
        others_off = np.delete(self.off, FORCED_OP, axis=-1).all(axis=-1)
        on, off = self.on.copy(), self.off.copy()
        on[:, FORCED_OP] |= np.asarray(forced_cells) & others_off
        off[:, FORCED_OP] &= ~on[:, FORCED_OP]
        return Settled(on=on, off=off)

    @property
    def everything(self) -> bool:
        """Whether there is one architecture left."""
        return bool((self.on | self.off).all())

    def bounding(self, bounding: float) -> Bounding:
        """The paper's alpha for paths that are left to explore, 1 for those that are settled;
        [L, O], or as it was where nothing is settled."""
        constant = self.on | self.off
        return np.where(constant, 1.0, bounding) if constant.any() else bounding

    @property
    def undecided_cells(self) -> np.ndarray:
        """Cells in which some decision is left; bool [L]."""
        return np.logical_not(np.all(self.on | self.off, axis=-1))

    def may_run(self, forced_cells: np.ndarray) -> np.ndarray:
        """Paths that some image may run, the empty-cell rule applied; bool [L, O].

        Args:
          forced_cells: bool [L], `SupernetSpec.forced_cells`.
        """
        paths = ~self.off
        paths[:, FORCED_OP] |= np.asarray(forced_cells) & ~self.on.any(axis=-1)
        return paths


def validate_mask(mask: np.ndarray, mask_shape: tuple[int, int]) -> np.ndarray:
    """Checks masks [L, O] or [B, L, O] that come from outside; returns them as float32.

    Raises:
      InputError: the shape is another or a value is neither 0 nor 1.
    """
    array = np.asarray(mask)
    if array.ndim not in (2, 3) or array.shape[-2:] != tuple(mask_shape):
        wanted = f"[{mask_shape[0]}, {mask_shape[1]}]"
        raise InputError(
            f"mask of shape {list(array.shape)}: this supernet needs {wanted} or [B, ...] of it"
        )
    wrong = array[(array != 0) & (array != 1)]
    if wrong.size:
        raise InputError(f"mask holds {wrong.flat[0]!r}: every entry must be 0 (off) or 1 (on)")
    return array.astype(np.float32)
