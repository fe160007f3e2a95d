"""Accuracy, latency and decisions of a trained state over a whole split."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from instanas_jax import (
    augment,
    controller,
    cost,
    data,
    latency,
    parallel,
    policy,
    search_space,
    supernet,
)
from instanas_jax.stage import Setting
from instanas_jax.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a network said of each of N images."""

    correct: np.ndarray  # [N] bool
    loss: np.ndarray  # [N] cross-entropy, nats
    mask: np.ndarray  # [N, L, O], the empty-cell rule applied
    policy_entropy_bits: np.ndarray  # [N], of the unbounded policy

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())


class Evaluator:
    """Evaluates on split after split with one compiled program.

    Args:
      setting: spec, statistics of pixels, lowering.
      batch_size: images a call, over all devices.
    """

    def __init__(self, setting: Setting, *, batch_size: int):
        self._setting = setting
        self._batch_size = batch_size
        self._answer = parallel.compile_map(self._answer_batch)

    def _answer_batch(self, inputs: dict[str, Any], batch: dict[str, jax.Array]) -> Any:
        setting = self._setting
        spec = setting.spec
        images = augment.normalise(batch["image"], mean=setting.mean, std=setting.std)
        policy_logits = controller.apply_eval(
            spec, controller.fold(inputs["controller"]), images, lowering=setting.lowering
        )
        static = jnp.broadcast_to(inputs["architecture"], policy_logits.shape)
        mask = jnp.where(inputs["is_static"], static, policy.greedy(policy_logits))
        class_logits = supernet.apply_eval(
            spec, supernet.fold(inputs["supernet"]), images, mask, lowering=setting.lowering
        )
        labels = batch["label"]
        return {
            "correct": jnp.argmax(class_logits, axis=-1) == labels,
            "loss": optax.softmax_cross_entropy_with_integer_labels(class_logits, labels),
            "mask": policy.resolve_empty_cells(mask, spec.forced_cells)[0],
            "policy_entropy_bits": policy.entropy(policy_logits, bounding=1.0) / np.log(2.0),
        }

    def __call__(
        self, state: TrainState, images: data.ImageSet, *, architecture: np.ndarray | None = None
    ) -> Answers:
        """Answers of a host state under its greedy masks, or under one architecture [L, O]."""
        spec = self._setting.spec
        inputs = {
            "supernet": state.supernet,
            "controller": state.controller,
            "architecture": np.zeros(spec.mask_shape) if architecture is None else architecture,
            "is_static": np.asarray(architecture is not None),
        }
        replicated = parallel.replicate(inputs)
        chunks: list[dict[str, np.ndarray]] = []
        for batch in data.eval_batches(images, batch_size=self._batch_size):
            real = batch["weight"] > 0
            answers = parallel.gather(self._answer(replicated, parallel.shard(dict(batch))))
            chunks.append({name: values[real] for name, values in answers.items()})
        return Answers(
            **{name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        )


def policy_statistics(
    answers: Answers, *, table: latency.LatencyTable, spec: search_space.SupernetSpec
) -> dict[str, float]:
    """What the controller's decisions over a split cost and how varied they are.

    Times and FLOPs are means over images of whole images: fixed parts and controller included.
    """
    cells_ms = (answers.mask * table.cells_ms).sum(axis=(1, 2))
    flops, _ = cost.path_costs(spec)
    image_flops = (answers.mask * flops).sum(axis=(1, 2))
    flattened = answers.mask.reshape(len(answers.mask), -1) > 0.5
    return {
        "table_ms": float(cells_ms.mean()) + table.fixed_total_ms(controller=True),
        "table_ms_std": float(cells_ms.std()),
        "flops": float(image_flops.mean())
        + cost.fixed_cost(spec).flops
        + controller.cost(spec).flops,
        "unique_architectures": len(np.unique(np.packbits(flattened, axis=1), axis=0)),
        "policy_entropy_bits": float(answers.policy_entropy_bits.mean()),
        "active_paths": float(answers.mask.sum(axis=(1, 2)).mean()),
    }
