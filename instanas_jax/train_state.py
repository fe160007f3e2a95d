"""Everything that training changes, as one pytree of one structure in every stage."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from instanas_jax import controller, optimizers, supernet
from instanas_jax.search_space import SupernetSpec


@flax.struct.dataclass
class TrainState:
    """Networks are dicts {"params", "batch_stats"}; no random key is kept (see `stage`)."""

    step: jax.Array  # int32 [], updates done in this stage.
    supernet: dict[str, Any]
    controller: dict[str, Any]
    optimizer: dict[str, Any]  # Of both networks; a stage uses those it trains.


def create(
    key: jax.Array, spec: SupernetSpec, *, policy_start: np.ndarray | None = None
) -> TrainState:
    """Fresh networks at step 0.

    Args:
      policy_start: [L, O], see `controller.init`.
    """
    supernet_key, controller_key = jax.random.split(key)
    networks = {
        "supernet": supernet.init(supernet_key, spec),
        "controller": controller.init(controller_key, spec, start=policy_start),
    }
    empty = TrainState(step=jnp.zeros((), jnp.int32), optimizer={}, **networks)
    return restart(empty)


def shapes(spec: SupernetSpec) -> TrainState:
    """Shapes and types of a state, without its values."""
    networks = {"supernet": supernet.shapes(spec), "controller": controller.shapes(spec)}
    empty = TrainState(step=jnp.zeros((), jnp.int32), optimizer={}, **networks)
    return jax.eval_shape(restart, empty)


def restart(state: TrainState) -> TrainState:
    """The same networks at step 0 with fresh optimizers: how every stage begins."""
    optimizer = optimizers.init(state.supernet["params"], state.controller["params"])
    return dataclasses.replace(state, step=jnp.zeros((), jnp.int32), optimizer=optimizer)
