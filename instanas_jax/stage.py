"""What a stage is, and what the steps of all stages share.

A step maps (state, batch) to (state, metrics). Randomness is a function of the seed, the stage,
the step and an image's place in the global batch, never of a key kept in the state: a resumed run
and a run on another number of devices draw the same numbers.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from instanas_jax import augment, controller, convolution, supernet
from instanas_jax.search_space import SupernetSpec
from instanas_jax.train_state import TrainState

Batch = dict[str, jax.Array]  # image uint8 [B, H, W, 3], label int32 [B], weight float32 [B]
Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Phase:
    """One kind of update; metrics of different phases have different names."""

    name: str
    step: Step


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage's behaviour as a value.

    Attributes:
      name: also the name of its checkpoints.
      init: takes the networks of the stage before, gives a state at step 0.
      phases: the kinds of update.
      phase_at: index into `phases` of the update with this number.
    """

    name: str
    init: Callable[[TrainState], TrainState]
    phases: tuple[Phase, ...]
    phase_at: Callable[[int], int] = lambda step: 0


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the steps of all stages share."""

    spec: SupernetSpec
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augmentation: augment.Augmentation
    seed: int
    lowering: convolution.Lowering
    dtype: Any = jnp.float32
    axis_name: str | None = None  # The device axis that shares the global batch.


@dataclasses.dataclass(frozen=True)
class Draws:
    """Keys of one step: [B] typed keys for each use, and one key for the whole global batch."""

    augment: jax.Array
    mask: jax.Array
    batch: jax.Array


def draw_keys(setting: Setting, stage: str, step: jax.Array, batch_size: int) -> Draws:
    key = jax.random.fold_in(jax.random.key(setting.seed), zlib.crc32(stage.encode()))
    key = jax.random.fold_in(key, step)
    device = lax.axis_index(setting.axis_name) if setting.axis_name else 0
    first = device * batch_size

    def per_image(use: int) -> jax.Array:
        return augment.image_keys(jax.random.fold_in(key, use), first, batch_size)

    return Draws(per_image(0), per_image(1), jax.random.fold_in(key, 2))


def augmented(setting: Setting, draws: Draws, batch: Batch) -> jax.Array:
    return augment.augment_and_normalise(
        draws.augment,
        batch["image"],
        augmentation=setting.augmentation,
        mean=setting.mean,
        std=setting.std,
    )


def mean_over_devices(setting: Setting, tree: Any) -> Any:
    return lax.pmean(tree, setting.axis_name) if setting.axis_name else tree


def _cross_entropy(class_logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(class_logits, labels).mean()


def is_correct(class_logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.argmax(class_logits, axis=-1) == labels


def apply_gradients(
    optimizer: optax.GradientTransformation, gradients: Any, state: Any, params: Any
) -> tuple[Any, Any]:
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def train_supernet(
    setting: Setting,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    draws: Draws,
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
    static_architecture: np.ndarray | None = None,
) -> tuple[TrainState, Metrics]:
    """Cross-entropy under the given masks; the controller stays as it is."""

    def loss_fn(params):
        class_logits, batch_stats = supernet.apply_train(
            setting.spec,
            {"params": params, "batch_stats": state.supernet["batch_stats"]},
            images,
            mask,
            dropout_key=draws.batch,
            lowering=setting.lowering,
            dtype=setting.dtype,
            axis_name=setting.axis_name,
            static_architecture=static_architecture,
        )
        return _cross_entropy(class_logits, labels), (class_logits, batch_stats)

    params = state.supernet["params"]
    (loss, (class_logits, batch_stats)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
        params
    )
    gradients = mean_over_devices(setting, gradients)
    params, optimizer_state = apply_gradients(
        optimizer, gradients, state.optimizer["supernet"], params
    )
    metrics = {
        "loss": loss,
        "accuracy": jnp.mean(is_correct(class_logits, labels)),
        "active_paths": jnp.mean(jnp.sum(mask, axis=(-2, -1))),
    }
    new_state = dataclasses.replace(
        state,
        step=state.step + 1,
        supernet={"params": params, "batch_stats": batch_stats},
        optimizer={**state.optimizer, "supernet": optimizer_state},
    )
    return new_state, mean_over_devices(setting, metrics)


def policy_logits_of(setting: Setting, state: TrainState, images: jax.Array) -> jax.Array:
    return controller.apply_eval(
        setting.spec,
        controller.fold(state.controller),
        images,
        lowering=setting.lowering,
        dtype=setting.dtype,
    )


def restart(state: TrainState, **trained: optax.GradientTransformation) -> TrainState:
    """The networks of `state` at step 0 with fresh optimizers for those named."""
    return dataclasses.replace(
        state,
        step=jnp.zeros((), jnp.int32),
        optimizer={
            name: optimizer.init(getattr(state, name)["params"])
            for name, optimizer in trained.items()
        },
    )
