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
from instanas_jax.search_space import SupernetSpec

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

        With none of them an image takes the least there is, and always fits (`limit`).

        Args:
          policy_logits: [B, L, O].
        """
        shape, undecided = policy_logits.shape, ~(self.settled.on | self.settled.off)
        logits = policy_logits.reshape(shape[0], -1)[:, undecided.ravel()]
        # Rank 0 is the surest. Kept are those of a rank below k, for every k.
        ranks = jnp.argsort(jnp.argsort(-logits, axis=-1), axis=-1)
        counts = jnp.arange(logits.shape[-1] + 1)
        kept = (ranks < counts[:, None, None]) & (logits >= 0.0)
        on = jnp.broadcast_to(self.settled.on.ravel(), (*kept.shape[:2], undecided.size))
        masks = on.at[..., undecided.ravel()].set(kept).reshape(len(counts), *shape)
        masks = masks.astype(jnp.float32)
        cells_ms = self.prices.cells_ms(masks, self.forced_cells)
        fits = cells_ms <= self.limit_ms - self.prices.constant_ms
        most = jnp.max(jnp.where(fits, counts[:, None], 0), axis=0)
        return jnp.take_along_axis(masks, most[None, :, None, None], axis=0)[0]


def limit(
    limit_ms: float, *, table: LatencyTable, spec: SupernetSpec, settled: policy.Settled
) -> Limit:
    """The limit of a policy that has settled what it has settled.

    Raises:
      InputError: an image takes longer, whatever it leaves away.
    """
    least_ms = float(latency.image_ms(table, settled.on, spec.forced_cells, settled))
    if not limit_ms >= least_ms - _ROUNDING_MS:
        raise InputError(
            f"a limit of {limit_ms:g} ms is out of this variant's reach: by its table an image "
            f"takes {least_ms:.3f} ms or more, choose another variant or a limit from there"
        )
    return Limit(limit_ms, latency.prices(table, settled), spec.forced_cells, settled)
