"""Everything that training changes, as one pytree."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from instanas_jax import controller, supernet
from instanas_jax.search_space import SupernetSpec


@flax.struct.dataclass
class TrainState:
    """Networks are dicts {"params", "batch_stats"}; no random key is kept (see `stages`)."""

    step: jax.Array  # int32 [], updates done in this stage.
    supernet: dict[str, Any]
    controller: dict[str, Any]
    optimizer: dict[str, Any]  # Optimizer state of each network that this stage trains.


def create(key: jax.Array, spec: SupernetSpec) -> TrainState:
    """Fresh networks, before any stage."""
    supernet_key, controller_key = jax.random.split(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        supernet=supernet.init(supernet_key, spec),
        controller=controller.init(controller_key, spec),
        optimizer={},
    )
