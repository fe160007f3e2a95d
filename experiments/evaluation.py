"""Accuracy, latency and decisions of a trained state over a whole split."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
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
    feeding,
    latency,
    packing,
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
      paths: bool [L, O], those that networks may have, the empty-cell rule applied; all by default.
        The others are not computed.
    """

    def __init__(self, setting: Setting, *, batch_size: int, paths: np.ndarray | None = None):
        self._setting = setting
        self._paths = paths
        self._batch_size = batch_size
        self._answer = parallel.compile_map(self._answer_batch)
        self._score = parallel.compile_map(self._score_batch)
        self._moments = parallel.Program(self._moments_of_batch)

    def _score_batch(self, weights: packing.Packed, batch: dict[str, jax.Array]) -> jax.Array:
        setting = self._setting
        images = augment.normalise(batch["image"], mean=setting.mean, std=setting.std)
        return controller.apply_eval(
            setting.spec, weights.arrays(), images, lowering=setting.lowering
        )

    def _answer_batch(self, inputs: dict[str, Any], batch: dict[str, jax.Array]) -> Any:
        setting = self._setting
        spec = setting.spec
        images = augment.normalise(batch["image"], mean=setting.mean, std=setting.std)
        policy_logits = controller.apply_eval(
            spec, inputs["controller"].arrays(), images, lowering=setting.lowering
        )
        static = jnp.broadcast_to(inputs["architecture"], policy_logits.shape)
        mask = jnp.where(inputs["is_static"], static, policy.greedy(policy_logits))
        class_logits = supernet.apply_eval(
            spec,
            inputs["supernet"].arrays(),
            images,
            mask,
            lowering=setting.lowering,
            paths=self._paths,
        )
        labels = batch["label"]
        return {
            "correct": jnp.argmax(class_logits, axis=-1) == labels,
            "loss": optax.softmax_cross_entropy_with_integer_labels(class_logits, labels),
            "mask": policy.resolve_empty_cells(mask, spec.forced_cells)[0],
            "policy_entropy_bits": policy.entropy(policy_logits, bounding=1.0) / np.log(2.0),
        }

    def _moments_of_batch(self, inputs: dict[str, Any], batch: dict[str, jax.Array]) -> Any:
        setting = self._setting
        images = augment.normalise(batch["image"], mean=setting.mean, std=setting.std)
        mask = jnp.broadcast_to(inputs["architecture"], (len(images), *setting.spec.mask_shape))
        _, moments = supernet.apply_train(
            setting.spec,
            inputs["supernet"].arrays(),
            images,
            mask,
            lowering=setting.lowering,
            axis_name=setting.axis_name,
            paths=self._paths,
        )
        return moments

    def __call__(
        self, state: TrainState, images: data.Images, *, architecture: np.ndarray | None = None
    ) -> Answers:
        """Answers of a host state under its greedy masks, or under one architecture [L, O].

        Raises:
          ValueError: the architecture has paths that are not computed.
        """
        return Answers(**self._over(images, self._answer, self._inputs(state, architecture)))

    def compile_ahead(self, state: TrainState, images: data.Images) -> None:
        """Compiles what answers, for images and states like these."""
        batch = data.blank_batch(
            images, batch_size=self._batch_size, share=parallel.share(self._batch_size)
        )
        shapes = parallel.replicated_shapes(self._inputs(state, None))
        self._answer.compile(shapes, parallel.shard(dict(batch)))

    def _check(self, architecture: np.ndarray) -> None:
        running = policy.resolve_empty_cells(architecture, self._setting.spec.forced_cells)[0]
        if self._paths is not None and (np.asarray(running) > 0.5)[~self._paths].any():
            raise ValueError("the architecture has paths that this evaluator does not compute")

    def _inputs(self, state: TrainState, architecture: np.ndarray | None) -> dict[str, Any]:
        spec = self._setting.spec
        if architecture is not None:
            self._check(architecture)
        return {
            "supernet": packing.ravel(supernet.fold(state.supernet)),
            "controller": packing.ravel(controller.fold(state.controller)),
            "architecture": np.zeros(spec.mask_shape) if architecture is None else architecture,
            "is_static": np.asarray(architecture is not None),
        }

    def recalibrated(
        self, state: TrainState, batches: Sequence[Any], *, architecture: np.ndarray
    ) -> TrainState:
        """A host state with the batch statistics of its supernet under one architecture [L, O].

        A supernet's running statistics are those of the masks that it was trained under. Networks
        of one op a cell, the best among them, answer by chance with them. Source: the
        post-statistics of universally slimmable networks (arXiv 1903.05134).

        Args:
          batches: of training images, on the devices; the statistics are their mean.
        """
        self._check(architecture)
        inputs = {"supernet": packing.ravel(state.supernet), "architecture": architecture}
        replicated = parallel.replicate(inputs)
        moments = [parallel.unreplicate(self._moments(replicated, batch)) for batch in batches]
        statistics = jax.tree.map(lambda *parts: np.mean(parts, axis=0), *moments)
        return dataclasses.replace(state, supernet={**state.supernet, "batch_stats": statistics})

    def policy_logits(self, state: TrainState, images: data.Images) -> np.ndarray:
        """Of a host state's controller; [N, L, O]."""
        return self._over(images, self._score, packing.ravel(controller.fold(state.controller)))

    def _over(self, images: data.Images, program: Callable[..., Any], inputs: Any) -> Any:
        """A program's answers about every image, in order, on the host."""
        replicated = parallel.replicate(inputs)
        chunks = [
            parallel.gather(program(replicated, feeding.to_devices(batch)))
            for batch in self._batches(images)
        ]
        # What pads the last batch stands at its end.
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(images)], *chunks)

    def _batches(self, images: data.Images) -> Iterator[data.Batch]:
        return data.eval_batches(
            images, batch_size=self._batch_size, share=parallel.share(self._batch_size)
        )


def policy_statistics(
    answers: Answers,
    *,
    table: latency.LatencyTable,
    spec: search_space.SupernetSpec,
    settled: policy.Settled,
) -> dict[str, float]:
    """What the controller's decisions over a split cost and how varied they are.

    Times and FLOPs are means over images of whole images: fixed parts, and the controller unless
    every decision is settled. Parameters are those that a predictor holds.
    """
    asks_controller = not settled.everything
    flops, params = cost.path_costs(spec)
    fixed = cost.fixed_cost(spec)
    if asks_controller:
        fixed += controller.cost(spec)
    table_ms = latency.image_ms(table, answers.mask, spec.forced_cells, settled)
    image_flops = (answers.mask * flops).sum(axis=(1, 2))
    flattened = answers.mask.reshape(len(answers.mask), -1) > 0.5
    return {
        "table_ms": float(table_ms.mean()),
        "table_ms_std": float(table_ms.std()),
        "flops": float(image_flops.mean()) + fixed.flops,
        "params": int(params[settled.may_run(spec.forced_cells)].sum()) + fixed.params,
        "unique_architectures": len(np.unique(np.packbits(flattened, axis=1), axis=0)),
        "policy_entropy_bits": float(answers.policy_entropy_bits.mean()),
        "undecided_paths": int((~(settled.on | settled.off)).sum()),
        "active_paths": float(answers.mask.sum(axis=(1, 2)).mean()),
    }
