"""Everything that training changes, as one pytree of one structure in every stage."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from instanas_jax import controller, optimizers, supernet
from instanas_jax.search_space import SupernetSpec


@flax.struct.dataclass
class TrainState:
    """Networks are dicts {"params", "batch_stats"}; no random key is kept (see `stage`)."""

    step: jax.Array  # int32 [], updates done in this stage.
    supernet: dict[str, Any]
    controller: dict[str, Any]
    optimizer: dict[str, Any]  # Of both networks; a stage uses those it trains.


def create(key: jax.Array, spec: SupernetSpec, *, keep: float = 0.5) -> TrainState:
    """Fresh networks at step 0.

    Args:
      keep: probability of every path under the fresh controller's policy.
    """
    supernet_key, controller_key = jax.random.split(key)
    networks = {
        "supernet": supernet.init(supernet_key, spec),
        "controller": controller.init(controller_key, spec, keep=keep),
    }
    empty = TrainState(step=jnp.zeros((), jnp.int32), optimizer={}, **networks)
    return restart(empty)


def restart(state: TrainState) -> TrainState:
    """The same networks at step 0 with fresh optimizers: how every stage begins."""
    optimizer = optimizers.init(state.supernet["params"], state.controller["params"])
    return dataclasses.replace(state, step=jnp.zeros((), jnp.int32), optimizer=optimizer)
