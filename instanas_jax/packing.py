"""Weights inside a program, as few constants.

XLA's CPU client pays 0.5 to 1 us a call for every array of a program, be it an argument or a
constant, on a path that runs or on one that does not. A supernet has 480 arrays; MobileNetV2 at
width 0.5 takes 300 us. So small arrays lie in one long vector and are cut out where they are used,
inside the branch of their path.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Weights = Any  # A pytree of arrays.

# Values up to which cutting a matrix out, a copy on the paths that run, is cheaper than a
# constant of its own on all paths.
_CUT_UP_TO = 2**13


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A small array that lies in a longer vector."""

    vector: jax.Array
    start: int
    shape: tuple[int, ...]

    def read(self) -> jax.Array:
        stop = self.start + math.prod(self.shape)
        return lax.slice(self.vector, (self.start,), (stop,)).reshape(self.shape)


def embed(weights: Weights) -> Weights:
    """Inside a traced function: numpy weights as few constants of the program.

    Returns:
      The same tree for `read`: arrays, and cuts of one vector in the place of small ones.
    """
    leaves, structure = jax.tree.flatten(weights)
    small = [leaf for leaf in leaves if _is_cut(leaf)]
    vector = np.concatenate([leaf.ravel() for leaf in small]) if small else np.zeros(0, np.float32)
    large = [jnp.asarray(leaf) for leaf in leaves if not _is_cut(leaf)]
    # The barrier keeps XLA from cutting the vector up when it compiles, and large arrays from
    # becoming one constant in each branch that reads them.
    vector, large = lax.optimization_barrier((jnp.asarray(vector), large))
    starts = iter(np.cumsum([0, *(leaf.size for leaf in small)]).tolist())
    rest = iter(large)
    embedded = [
        _Cut(vector, next(starts), leaf.shape) if _is_cut(leaf) else next(rest) for leaf in leaves
    ]
    return jax.tree.unflatten(structure, embedded)


def _is_cut(leaf: np.ndarray) -> bool:
    """Small, or a bias [C] or depthwise kernel [k, k, C]: fused loops index the vector itself."""
    return leaf.ndim in (1, 3) or leaf.size <= _CUT_UP_TO


def read(weights: Weights) -> Weights:
    """Weights as arrays, where `embed` made some of them cuts. Call it inside the branch that
    uses them, or a branch that is not taken would still copy."""
    return jax.tree.map(lambda leaf: leaf.read() if isinstance(leaf, _Cut) else leaf, weights)
