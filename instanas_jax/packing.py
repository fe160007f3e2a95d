"""Weights as few arguments of a program.

XLA's CPU client pays 0.3 to 1 us a call for every array that is an argument of a program, and less
for a constant (`fusion.in_call`), on a path that runs or on one that does not. A supernet has 480
arrays; MobileNetV2 at width 0.5 takes 300 us. So small arrays lie in one long vector. Loops index
the vector itself; matrices are cut out, a copy of 1 to 5 us, which pays inside a branch and nowhere
else: of a network of few paths, all settled, cutting took a fifth of the time.

Most are arguments rather than constants: a program's constants are copied into each of its forms
on the way to machine code, a gigabyte at width 1, and programs that share them between branches
run one at a time, however many threads call. But the few megabytes of a narrow network's matrices
cost less as constants (`compile_with`).

A program that trains holds whole trees as one vector each (`ravel`): its optimizer is three loops
instead of 930, it is traced in two thirds of the time, and a checkpoint is a few long arrays.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Weights = Any  # A pytree of arrays.

# Values up to which a branch's matrix is cut out, where the branch is taken, rather than an
# argument of its own at every call. By 2**14 an undecided network of width 1 takes 0.7 % less time
# than by 2**13 or 2**15, a narrow one as much; by 2**11 narrow ones take 1 to 3 % more.
_CUT_UP_TO = 2**14

# Bytes of matrices up to which they are constants of a program. CIFAR quick's networks, of 1.5 and
# 2.3 MB, take 3 to 8 % less time than with arguments; at width 1 an argument less is nothing.
_CONSTANT_UP_TO = 2**22


@dataclasses.dataclass(frozen=True, eq=False)  # Equal by identity: compared at every call.
class _Layout:
    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    is_cut: tuple[bool, ...]

    def __reduce__(self) -> Any:  # Another process's layout is this one's of an equal tree.
        return _layout, (self.structure, self.shapes, self.is_cut)


@functools.cache  # One object for equal trees, so that they have one structure.
def _layout(structure: Any, shapes: tuple[tuple[int, ...], ...], is_cut: tuple[bool, ...]):
    return _Layout(structure, shapes, is_cut)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["vector", "large"], meta_fields=["layout"]
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """A tree of weights as one vector and few arrays; an argument of jitted functions."""

    vector: jax.Array | np.ndarray
    large: tuple[jax.Array, ...]
    layout: _Layout

    def unpack(self) -> Weights:
        """The tree for `read`: arrays, and cuts of the vector in the place of small ones."""
        shapes, is_cut = self.layout.shapes, self.layout.is_cut
        sizes = [math.prod(shape) if cut else 0 for shape, cut in zip(shapes, is_cut, strict=True)]
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        large = iter(self.large)
        leaves = [
            _Cut(self.vector, start, shape) if cut else next(large)
            for shape, cut, start in zip(shapes, is_cut, starts, strict=True)
        ]
        return jax.tree.unflatten(self.layout.structure, leaves)

    def arrays(self) -> Weights:
        """The tree as it was; on the host, views of the vector."""
        return read(self.unpack())


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A small array that lies in a longer vector."""

    vector: jax.Array | np.ndarray
    start: int
    shape: tuple[int, ...]

    def read(self) -> jax.Array | np.ndarray:
        stop = self.start + math.prod(self.shape)
        if isinstance(self.vector, np.ndarray):
            return self.vector[self.start : stop].reshape(self.shape)
        return lax.reshape(lax.slice(self.vector, (self.start,), (stop,)), self.shape)


def pack(weights: Weights, *, in_branch: Any = False) -> Packed:
    """Lays a predictor's tree of float32 arrays out on the default device.

    Args:
      in_branch: whether an array is read inside a branch; a bool, or
        a tree of them whose leaves may stand for whole subtrees of `weights`.
    """
    leaves, structure = jax.tree.flatten(jax.device_get(weights))
    cut = map(_is_cut, leaves, jax.tree.leaves(jax.tree.broadcast(in_branch, weights)))
    return jax.tree.map(jnp.asarray, _pack(leaves, structure, tuple(cut)))


def ravel(weights: Weights) -> Packed:
    """A tree of float32 arrays as nothing but a vector; on the host from host arrays, in a traced
    function traced."""
    leaves, structure = jax.tree.flatten(weights)
    return _pack(leaves, structure, (True,) * len(leaves))


def compile_with(function: Callable[..., Any], weights: Any, *arguments: Any) -> functools.partial:
    """Compiles a function of weights and other arguments for weights that stay.

    Args:
      weights: a tree of `Packed`. Their vectors are an argument of the program, because loops index
        those where they lie; matrices are constants if they take few megabytes in all.
      arguments: arrays, or shapes of arrays.

    Returns:
      The function of the arguments alone; as `func` the program, as `args` what it is passed.
    """
    packed, structure = jax.tree.flatten(weights, is_leaf=lambda node: isinstance(node, Packed))
    if sum(matrix.nbytes for pack in packed for matrix in pack.large) > _CONSTANT_UP_TO:
        return functools.partial(jax.jit(function).lower(weights, *arguments).compile(), weights)

    def run(vectors: list[jax.Array], *arguments: Any) -> Any:
        whole = [
            dataclasses.replace(pack, vector=vector)
            for pack, vector in zip(packed, vectors, strict=True)
        ]
        return function(jax.tree.unflatten(structure, whole), *arguments)

    vectors = [pack.vector for pack in packed]
    return functools.partial(jax.jit(run).lower(vectors, *arguments).compile(), vectors)


def _pack(leaves: list[Any], structure: Any, cut: tuple[bool, ...]) -> Packed:
    small = [leaf.reshape(-1) for leaf, is_small in zip(leaves, cut, strict=True) if is_small]
    on_host = all(isinstance(leaf, np.ndarray | np.generic) for leaf in small)
    return Packed(
        vector=(np if on_host else jnp).concatenate(small or [np.zeros(0, np.float32)]),
        large=tuple(leaf for leaf, is_small in zip(leaves, cut, strict=True) if not is_small),
        layout=_layout(structure, tuple(np.shape(leaf) for leaf in leaves), cut),
    )


def _is_cut(leaf: Any, in_branch: bool) -> bool:
    """A bias [C] or depthwise kernel [k, k, C], which fused loops index in the vector itself; or
    a matrix that a branch reads, up to `_CUT_UP_TO` values."""
    return leaf.ndim in (1, 3) or (in_branch and leaf.size <= _CUT_UP_TO)


def read(weights: Weights) -> Weights:
    """Weights as arrays, where `Packed.unpack` made some of them cuts. Call it inside the branch
    that uses them, or a branch that is not taken would still copy."""
    return jax.tree.map(lambda leaf: leaf.read() if isinstance(leaf, _Cut) else leaf, weights)
