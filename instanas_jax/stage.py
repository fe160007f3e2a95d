"""What a stage is, and what the steps of all stages share.

A step maps (state, batch) to (state, metrics). Randomness is a function of the seed, the stage,
the step and an image's place in the global batch, never of a key kept in the state: a resumed run
and a run on another number of devices draw the same numbers.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from instanas_jax import augment, controller, convolution, layers, optimizers, packing, supernet
from instanas_jax.search_space import SupernetSpec
from instanas_jax.train_state import TrainState

Batch = dict[str, jax.Array]  # image uint8 [B, H, W, 3], label int32 [B]
Inputs = dict[str, jax.Array]  # What `Phase.prepare` decided for one update.
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Phase:
    """One kind of update, in two programs.

    `prepare` augments the images and decides masks and learning rate; it differs from stage to
    stage and is small. `update` is the costly half, and where two stages share it (pretrain,
    search and finetune train the supernet by the same `supernet_update`, where they run the same
    paths) it compiles once. Metrics of different phases have different names.
    """

    name: str
    prepare: Callable[[TrainState, Batch], Inputs]  # States are raveled, here and below.
    update: Callable[[TrainState, Inputs], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage's behaviour as a value; it starts from `train_state.restart`.

    Attributes:
      name: also the name of its checkpoints.
      phases: the kinds of update.
      phase_at: index into `phases` of the update with this number.
    """

    name: str
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
    remat: bool = False  # See `supernet.apply_train`.


@dataclasses.dataclass(frozen=True)
class Draws:
    """Keys of one step: [B] typed keys for each use, and one key for the whole global batch."""

    augment: jax.Array
    mask: jax.Array
    mix: jax.Array
    dropout: jax.Array
    batch: jax.Array


def draw_keys(setting: Setting, stage: str, step: jax.Array, batch_size: int) -> Draws:
    key = jax.random.fold_in(jax.random.key(setting.seed), zlib.crc32(stage.encode()))
    key = jax.random.fold_in(key, step)
    device = lax.axis_index(setting.axis_name) if setting.axis_name else 0
    first = device * batch_size

    def per_image(use: int) -> jax.Array:
        return augment.image_keys(jax.random.fold_in(key, use), first, batch_size)

    return Draws(
        augment=per_image(0),
        mask=per_image(1),
        mix=per_image(3),
        dropout=per_image(4),
        batch=jax.random.fold_in(key, 2),
    )


def augmented(setting: Setting, draws: Draws, batch: Batch) -> jax.Array:
    return augment.augment_and_normalise(
        draws.augment,
        batch["image"],
        augmentation=setting.augmentation,
        mean=setting.mean,
        std=setting.std,
    )


def certain_targets(spec: SupernetSpec, labels: jax.Array) -> jax.Array:
    """Labels [B] as distributions over the classes, float32 [B, K], that leave no doubt."""
    return jax.nn.one_hot(labels, spec.num_classes, dtype=jnp.float32)


def mean_over_devices(setting: Setting, tree: Any) -> Any:
    return lax.pmean(tree, setting.axis_name) if setting.axis_name else tree


def is_correct(class_logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.argmax(class_logits, axis=-1) == labels


def train_network(
    setting: Setting,
    optimizer: optax.GradientTransformation,
    loss_fn: Callable[[Any], tuple[jax.Array, tuple[Any, Any]]],
    variables: dict[str, packing.Packed],
    optimizer_state: Any,
) -> tuple[dict[str, packing.Packed], Any, jax.Array, Any]:
    """One update of a network.

    Args:
      loss_fn: of the tree {"params", "batch_stats"}; returns the loss, and beside it what the
        running statistics move towards and anything else.
      variables: the network's, raveled.
      optimizer_state: raveled.

    Returns:
      The new variables and optimizer state, the loss, and anything else.
    """
    params: Any = variables["params"]  # A pytree of one vector, to optax as well.
    batch_stats = variables["batch_stats"]

    def loss_of(params: Any) -> tuple[jax.Array, tuple[Any, Any]]:
        return loss_fn({"params": params, "batch_stats": batch_stats.arrays()})

    gradient_fn = jax.value_and_grad(loss_of, has_aux=True)
    (loss, (moments, rest)), gradients = gradient_fn(params.arrays())
    gradients = mean_over_devices(setting, packing.ravel(gradients))
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    new_variables = {
        "params": optax.apply_updates(params, updates),
        "batch_stats": layers.move(batch_stats, packing.ravel(moments)),
    }
    return new_variables, optimizer_state, loss, rest


def supernet_inputs(
    spec: SupernetSpec,
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
    sgd: optimizers.SgdSettings,
    learning_rate: jax.typing.ArrayLike,
    dropout_keys: jax.Array | None = None,
    targets: jax.Array | None = None,
) -> Inputs:
    """What `supernet_update` reads; numbers rather than constants, so that stages share it.

    Args:
      labels: [B], by which metrics count right answers.
      dropout_keys: [B] typed keys, read where the spec has dropout.
      targets: [B, K], by which the network is trained: the distribution over classes that it
        should give to each image; by default the labels, without doubt.
    """
    inputs = {
        "image": images,
        "label": labels,
        "target": certain_targets(spec, labels) if targets is None else targets,
        "mask": mask,
        "learning_rate": jnp.asarray(learning_rate, jnp.float32),
        "momentum": jnp.asarray(sgd.momentum, jnp.float32),
        "weight_decay": jnp.asarray(sgd.weight_decay, jnp.float32),
    }
    if spec.head_dropout > 0.0:
        assert dropout_keys is not None
        inputs["dropout"] = jax.random.key_data(dropout_keys)
    return inputs


def some_paths(paths: np.ndarray) -> tuple[tuple[bool, ...], ...] | None:
    """Paths [L, O] as `supernet_update` takes them; None for all, the program that stages share."""
    return None if paths.all() else tuple(tuple(row) for row in paths.tolist())


# A setting's update is one function object, by which compiled programs are found again.
@functools.lru_cache(maxsize=32)
def supernet_update(
    setting: Setting, paths: tuple[tuple[bool, ...], ...] | None = None
) -> Callable[[TrainState, Inputs], tuple[TrainState, Metrics]]:
    """Cross-entropy with given targets under given masks by SGD; the controller stays as it is.

    Args:
      paths: [L, O] as nested tuples, those that masks may hold; only they are computed.
    """

    def update(state: TrainState, inputs: Inputs) -> tuple[TrainState, Metrics]:
        dropout_keys = jax.random.wrap_key_data(inputs["dropout"]) if "dropout" in inputs else None

        def loss_fn(variables):
            class_logits, moments = supernet.apply_train(
                setting.spec,
                variables,
                inputs["image"],
                inputs["mask"],
                dropout_keys=dropout_keys,
                lowering=setting.lowering,
                dtype=setting.dtype,
                axis_name=setting.axis_name,
                paths=None if paths is None else np.array(paths),
                remat=setting.remat,
            )
            loss = optax.softmax_cross_entropy(class_logits, inputs["target"]).mean()
            return loss, (moments, class_logits)

        optimizer = optimizers.sgd(
            inputs["learning_rate"], inputs["momentum"], inputs["weight_decay"]
        )
        variables, optimizer_state, loss, class_logits = train_network(
            setting, optimizer, loss_fn, state.supernet, state.optimizer["supernet"]
        )
        metrics = {
            "loss": loss,
            "accuracy": jnp.mean(is_correct(class_logits, inputs["label"])),
            "active_paths": jnp.mean(jnp.sum(inputs["mask"], axis=(-2, -1))),
            "learning_rate": inputs["learning_rate"],
        }
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            supernet=variables,
            optimizer={**state.optimizer, "supernet": optimizer_state},
        )
        return new_state, mean_over_devices(setting, metrics)

    return update


def arrays_of(variables: dict[str, packing.Packed]) -> dict[str, Any]:
    """A raveled network's {"params", "batch_stats"} as trees."""
    return {kind: packed.arrays() for kind, packed in variables.items()}


def policy_logits_of(setting: Setting, state: TrainState, images: jax.Array) -> jax.Array:
    return controller.apply_eval(
        setting.spec,
        controller.fold(arrays_of(state.controller)),
        images,
        lowering=setting.lowering,
        dtype=setting.dtype,
    )
