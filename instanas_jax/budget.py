"""The knobs of a trained policy: how long images take in the mean, and how long one may take.

A path is on where its logit reaches a threshold; the policy was trained at 0. A higher one leaves
paths away, first those that the controller is least sure of, a lower one adds them. What a
threshold costs in the mean is measured by the table on calibration images, none of them of the test
split. A limit holds for each image: a threshold of its own where it would take longer.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instanas_jax import latency, policy
from instanas_jax.errors import InputError
from instanas_jax.latency import LatencyTable
from instanas_jax.search_space import FORCED_OP, SupernetSpec

# Quantiles of the undecided logits at which the curve is known: of 128, neighbours are less than
# one image in a hundred of one path apart.
_POINTS = 129
_ROUNDING_MS = 5e-4  # The ends of a curve are told to three digits.


@dataclasses.dataclass(frozen=True)
class Curve:
    """What images take at some thresholds.

    Attributes:
      thresholds: of logits, increasing; one of them is 0.
      table_ms: mean over the calibration images of whole images' table time.
    """

    thresholds: np.ndarray
    table_ms: np.ndarray

    @property
    def range_ms(self) -> tuple[float, float]:
        """The smallest and the largest mean time that a threshold reaches."""
        return float(self.table_ms.min()), float(self.table_ms.max())

    @property
    def as_trained_ms(self) -> float:
        """What calibration images take at the threshold 0."""
        return float(np.interp(0.0, self.thresholds, self.table_ms))

    def to_json(self) -> dict[str, list[float]]:
        return {name: values.tolist() for name, values in vars(self).items()}

    @classmethod
    def from_json(cls, values: Any) -> "Curve":
        """What `to_json` wrote; ValueError, TypeError or KeyError if it is something else."""
        curve = cls(*(np.asarray(values[name], float) for name in ("thresholds", "table_ms")))
        lengths = {array.shape for array in vars(curve).values()}
        numbers = np.concatenate([curve.thresholds, curve.table_ms])
        if lengths != {(len(curve.thresholds),)} or not numbers.size:
            raise ValueError(f"a budget curve has two lists of one length, not {lengths}")
        if not np.isfinite(numbers).all():
            raise ValueError("a budget curve holds a number that is not finite")
        return curve


def calibrate(
    policy_logits: np.ndarray,
    *,
    table: LatencyTable,
    spec: SupernetSpec,
    settled: policy.Settled,
) -> Curve:
    """The curve of a policy.

    Args:
      policy_logits: [N, L, O] of calibration images.
      settled: what the policy decides alike for every image, at whatever threshold.
    """
    values = np.asarray(policy_logits[:, ~(settled.on | settled.off)], np.float64).ravel()
    thresholds = np.zeros(1)
    if values.size:
        inner = np.quantile(values, np.linspace(0.0, 1.0, _POINTS))
        # Beyond the last logit every undecided path is off, in float32 as well.
        beyond = inner[-1] + 1e-3 * max(1.0, abs(inner[-1]))
        thresholds = np.unique([*inner, 0.0, beyond])

    def mean_ms(threshold: float) -> float:
        masks = masks_at(threshold, policy_logits, settled)
        return float(latency.image_ms(table, masks, spec.forced_cells, settled).mean())

    return Curve(thresholds, np.array([mean_ms(threshold) for threshold in thresholds]))


def masks_at(threshold: float, policy_logits: np.ndarray, settled: policy.Settled) -> np.ndarray:
    """Masks [N, L, O] of a policy that decides at a threshold; what is settled stays."""
    undecided = ~(settled.on | settled.off)
    return np.where(undecided, policy_logits >= threshold, settled.on).astype(np.float32)


def threshold(curve: Curve, budget_ms: float) -> float:
    """The threshold at which images take `budget_ms` in the mean.

    A forced cell that loses its last path runs the forced op, so the curve may rise for a while; of
    several thresholds the one nearest to where the policy was trained is taken.

    Raises:
      InputError: no threshold makes the policy so slow or so fast.
    """
    lowest, highest = curve.range_ms
    if not lowest - _ROUNDING_MS <= budget_ms <= highest + _ROUNDING_MS:
        if len(curve.thresholds) == 1:
            raise InputError(
                f"a budget of {budget_ms:g} ms is out of this variant's reach: everything is "
                f"settled, and it takes {lowest:.3f} ms by its table; choose another variant"
            )
        raise InputError(
            f"a budget of {budget_ms:g} ms is out of this variant's reach: by its table it takes "
            f"{lowest:.3f} to {highest:.3f} ms, choose a budget within"
        )
    budget_ms = min(max(budget_ms, lowest), highest)
    times, places = curve.table_ms, curve.thresholds
    exact = places[times == budget_ms]
    beyond = (times[:-1] - budget_ms) * (times[1:] - budget_ms) < 0.0
    first, second = np.flatnonzero(beyond), np.flatnonzero(beyond) + 1
    share = (budget_ms - times[first]) / (times[second] - times[first])
    between = places[first] + share * (places[second] - places[first])
    candidates = np.concatenate([exact, between])
    return float(candidates[np.argmin(np.abs(candidates))])


@dataclasses.dataclass(frozen=True, eq=False)
class Limit:
    """A bound on every image's table time, which a policy keeps by leaving paths away.

    Attributes:
      limit_ms: of whole images.
      prices: of the policy's paths.
      forced_cells: bool [L], `SupernetSpec.forced_cells`.
      settled: what the policy decides alike for every image.
    """

    limit_ms: float
    prices: latency.Prices
    forced_cells: np.ndarray
    settled: policy.Settled

    def masks(self, policy_logits: jax.Array) -> jax.Array:
        """Of an image's paths that are on, the surest that fit the limit; [B, L, O]. Traceable.

        A forced cell keeps the surest of its own whatever it takes: without one it would run the
        forced op, for which the image was not trained and which may be slower.

        Args:
          policy_logits: [B, L, O].
        """
        always, undecided = jnp.asarray(self.settled.on), ~(self.settled.on | self.settled.off)
        on = jnp.asarray(undecided) & (policy_logits >= 0.0)
        in_cell = jnp.argmax(jnp.where(on, policy_logits, -jnp.inf), axis=-1)
        surest = on & jax.nn.one_hot(in_cell, on.shape[-1], dtype=bool)
        least = always | surest & _cells_in_need(self.forced_cells, self.settled)[:, None]
        spare = on & ~least
        masks = least | spare & (_ranks(spare, policy_logits) < _counts(undecided))
        masks = masks.astype(jnp.float32)
        cells_ms = self.prices.cells_ms(masks, self.forced_cells)
        fits = cells_ms <= self.limit_ms - self.prices.constant_ms
        most = jnp.max(jnp.where(fits, jnp.arange(len(masks))[:, None], 0), axis=0)
        return jnp.take_along_axis(masks, most[None, :, None, None], axis=0)[0]


def _cells_in_need(forced_cells: np.ndarray, settled: policy.Settled) -> np.ndarray:
    """Cells [L] that can't be empty and have no path for certain."""
    return np.asarray(forced_cells) & ~settled.on.any(axis=-1)


def _ranks(spare: jax.Array, policy_logits: jax.Array) -> jax.Array:
    """Place of each spare path of an image by its logit, 0 the highest; [B, L, O].

    By comparing all pairs, a few thousand: XLA's sort on CPUs is a call of its own.
    """
    scores = jnp.where(spare, policy_logits, -jnp.inf).reshape(len(spare), -1)
    above = scores[:, None, :] > scores[:, :, None]
    first = np.tri(scores.shape[-1], k=-1, dtype=bool)  # Of equals, the earlier.
    equal = (scores[:, None, :] == scores[:, :, None]) & first
    return jnp.sum(above | equal, axis=-1).reshape(spare.shape)


def _counts(undecided: np.ndarray) -> np.ndarray:
    """0, 1, ... to as many paths as an image may spare; [counts, 1, 1, 1]."""
    return np.arange(undecided.sum() + 1)[:, None, None, None]


def limit(
    limit_ms: float, *, table: LatencyTable, spec: SupernetSpec, settled: policy.Settled
) -> Limit:
    """The limit of a policy that has settled what it has settled.

    Raises:
      InputError: not every image is sure to keep it, whatever it leaves away.
    """
    prices = latency.prices(table, settled)
    always_ms = float(latency.image_ms(table, settled.on, spec.forced_cells, settled))
    in_need = _cells_in_need(spec.forced_cells, settled)
    # Cells in need are counted with the forced op there; their slowest path may be another.
    slowest = np.where(settled.may_run(spec.forced_cells), prices.rows_ms, 0.0).max(axis=-1)
    more_ms = np.sum((slowest - prices.rows_ms[:, FORCED_OP])[in_need])
    sure_ms = always_ms + float(more_ms)
    if not limit_ms >= sure_ms - _ROUNDING_MS:
        raise InputError(
            f"a limit of {limit_ms:g} ms is out of this variant's reach: by its table, no image is "
            f"sure to take less than {sure_ms:.3f} ms, choose a limit from there or another variant"
        )
    return Limit(limit_ms, prices, spec.forced_cells, settled)
