"""Everything that training changes, as one pytree of one structure in every stage."""

import dataclasses
from typing import Any

import flax.struct
import jax
import numpy as np

from instanas_jax import controller, optimizers, packing, supernet
from instanas_jax.search_space import SupernetSpec


@flax.struct.dataclass
class TrainState:
    """Networks are dicts {"params", "batch_stats"}; no random key is kept (see `stage`).

    At rest they hold trees of arrays; where they train and on disk, each tree is one vector
    (`ravel`, `packing`).
    """

    step: jax.Array  # int32 [], updates done in this stage.
    supernet: dict[str, Any]
    controller: dict[str, Any]
    optimizer: dict[str, Any]  # Of both networks; a stage uses those it trains.


def create(
    key: jax.Array, spec: SupernetSpec, *, policy_start: np.ndarray | None = None
) -> TrainState:
    """Fresh networks at step 0, on the host.

    Args:
      policy_start: [L, O], see `controller.init`.
    """
    supernet_key, controller_key = jax.random.split(key)
    networks = {
        "supernet": supernet.init(supernet_key, spec),
        "controller": controller.init(controller_key, spec, start=policy_start),
    }
    return restart(TrainState(step=_no_updates(), optimizer={}, **networks))


def shapes(spec: SupernetSpec) -> TrainState:
    """Shapes and types of a state, without its values."""
    networks = {"supernet": supernet.shapes(spec), "controller": controller.shapes(spec)}
    empty = TrainState(step=_no_updates(), optimizer={}, **networks)
    return jax.eval_shape(restart, empty)


def ravel(state: TrainState) -> TrainState:
    """Every tree of arrays as one `packing.Packed` vector: the form in which phases take states."""

    def networks(variables: dict[str, Any]) -> dict[str, Any]:
        return {kind: packing.ravel(tree) for kind, tree in variables.items()}

    return dataclasses.replace(
        state,
        supernet=networks(state.supernet),
        controller=networks(state.controller),
        # What optax keeps for each parameter has the parameters' nesting, of dicts.
        optimizer={
            name: jax.tree.map(_ravel_dict, value, is_leaf=_is_dict)
            for name, value in state.optimizer.items()
        },
    )


def unravel(state: TrainState) -> TrainState:
    """The trees that `ravel` had; on the host, views of the vectors."""
    return jax.tree.map(
        lambda node: node.arrays() if isinstance(node, packing.Packed) else node,
        state,
        is_leaf=lambda node: isinstance(node, packing.Packed),
    )


def _is_dict(node: Any) -> bool:
    return isinstance(node, dict)


def _ravel_dict(node: Any) -> Any:
    return packing.ravel(node) if _is_dict(node) else node


def restart(state: TrainState) -> TrainState:
    """The same networks at step 0 with fresh optimizers: how every stage begins."""
    optimizer = optimizers.init(state.supernet["params"], state.controller["params"])
    return dataclasses.replace(state, step=_no_updates(), optimizer=optimizer)


def _no_updates() -> Any:
    return np.zeros((), np.int32)
