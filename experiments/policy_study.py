"""What a variant's policy is worth: its network under policies that do not look at the image, and
under other latency budgets.

The weights stay as they were finetuned; only who decides changes. Batches are answered by skipping,
so that a policy costs what its paths cost.
"""

import functools
import math
from typing import Any

import numpy as np

from instanas_jax import batching, budget, data, inference, latency, policy
from instanas_jax.latency import LatencyTable
from instanas_jax.search_space import SupernetSpec

_IMAGES = 10_000  # Of a split, at most.
_SHUFFLED_IMAGES = 2_500  # At least, over all permutations.
_BUDGETS = 5
_BATCH_SIZE = 1024


def study(
    network: inference.Network,
    *,
    table: LatencyTable,
    dataset: data.Dataset,
    validation_logits: np.ndarray,
    test_logits: np.ndarray,
) -> dict[str, Any]:
    """Fields of a variant's row in results.json.

    Policies and thresholds are chosen by validation images; nothing is by the test split. Of larger
    splits the first 10,000 images stand for all.

    Args:
      validation_logits, test_logits: of the variant's controller, [N, L, O].

    Returns:
      `shuffled_accuracy`: test accuracy where masks are permuted among the images, which changes no
      architecture and no latency; mean over some permutations where images are few.
      `same_for_all`: accuracy and time of the one architecture, see the function; no controller
      runs. `budget`: the calibrated `curve`
      (`budget.Curve`), and a `front` of budgets spread over it.
    """
    spec, settled = network.spec, network.settled
    predictor = batching.BatchPredictor(network)
    test_logits, validation_logits = test_logits[:_IMAGES], validation_logits[:_IMAGES]
    test_accuracy = functools.partial(_accuracy, predictor, dataset.test)
    validation_accuracy = functools.partial(_accuracy, predictor, dataset.validation)

    def mean_ms(masks: np.ndarray) -> float:
        return float(latency.image_ms(table, masks, spec.forced_cells, settled).mean())

    def under(budget_ms: float) -> dict[str, float]:
        threshold = budget.threshold(curve, budget_ms)
        masks = budget.masks_at(threshold, test_logits, settled)
        return {
            "budget_ms": budget_ms,
            "threshold": threshold,
            "table_ms": mean_ms(masks),
            "test_accuracy": test_accuracy(masks),
            "validation_accuracy": validation_accuracy(
                budget.masks_at(threshold, validation_logits, settled)
            ),
        }

    curve = budget.calibrate(validation_logits, table=table, spec=spec, settled=settled)
    masks = budget.masks_at(0.0, test_logits, settled)
    rng = np.random.default_rng(0)
    shuffles = math.ceil(_SHUFFLED_IMAGES / len(masks))
    shuffled = [test_accuracy(rng.permutation(masks)) for _ in range(shuffles)]
    validation_masks = budget.masks_at(0.0, validation_logits, settled)
    architecture = same_for_all(
        validation_masks,
        settled,
        table=table,
        spec=spec,
        budget_ms=mean_ms(validation_masks),
    )
    budgets = [] if settled.everything else np.linspace(*curve.range_ms, _BUDGETS)
    return {
        "shuffled_accuracy": float(np.mean(shuffled)),
        "same_for_all": {
            "test_accuracy": test_accuracy(np.broadcast_to(architecture, masks.shape)),
            "table_ms": latency.static_ms(table, architecture, spec.forced_cells),
        },
        "budget": {"curve": curve.to_json(), "front": [under(float(ms)) for ms in budgets]},
    }


def same_for_all(
    masks: np.ndarray,
    settled: policy.Settled,
    *,
    table: LatencyTable,
    spec: SupernetSpec,
    budget_ms: float,
) -> np.ndarray:
    """The policy that ignores the image: one architecture [L, O] of the paths that run most often.

    Args:
      masks: [N, L, O] that a policy gives to N images.
      settled: what that policy decides alike for every image. What it never switches on is off; in
        a cell that would be empty, and can't be, a path of it may run all the same.
      budget_ms: of the architectures that take no longer as static networks the slowest is taken;
        where there is none, the fastest of all.
    """
    running = np.asarray(policy.resolve_empty_cells(masks, spec.forced_cells)[0])
    share = running.mean(axis=0, dtype=np.float64)
    candidates = [
        ((share >= least) & ~settled.off).astype(np.float32)
        for least in np.unique(share[share > 0.0])
    ]
    times = [latency.static_ms(table, candidate, spec.forced_cells) for candidate in candidates]
    within = [place for place, ms in enumerate(times) if ms <= budget_ms]
    best = max(within, key=times.__getitem__) if within else int(np.argmin(times))
    return candidates[best]


def _accuracy(predictor: batching.BatchPredictor, images: data.Images, masks: np.ndarray) -> float:
    """Share of right answers about the first N images under masks [N, L, O]."""
    correct = []
    for first, batch in enumerate(data.eval_batches(images, batch_size=_BATCH_SIZE)):
        some = masks[first * _BATCH_SIZE : (first + 1) * _BATCH_SIZE]
        if not len(some):
            break
        class_logits = predictor.answer(batch["image"][: len(some)], some)
        correct.append(class_logits.argmax(axis=-1) == batch["label"][: len(some)])
    return float(np.concatenate(correct).mean())
