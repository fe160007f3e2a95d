"""What a step has to do, counted, and how fast this machine does such things, measured.

A step takes its arithmetic at the rate of a large matrix product, or its memory traffic at the rate
of a large addition; the later of the two is the time at the ceiling.

Arithmetic is counted from the search space (`cost`): 2 FLOPs a multiply-add of the convolutions
and the classifier, three times the forward pass for an update (forward, gradient of the input,
gradient of the kernel). Traffic is counted from the maps: with batch norm over the whole batch,
a layer that reads i values and makes o of them moves, in activations' type,

  forward   i + 4 o: the convolution reads i and writes o; the moments read o; normalising reads
            and writes o
  backward  2 i + 7 o: two sums read the gradient and the convolution's output; the gradient of
            that output reads both again and is written; the gradients of input and kernel read it,
            and one reads the input, the other writes its gradient

and every parameter three times (two reads, its gradient) and five more in the optimizer, in
float32. Where batch norm is folded, as in the controller's update, a layer moves i + o. Joining
paths, augmentation and the controller's own layers are left out. Where maps stay in a cache, or a
program computes a map anew rather than read it, it moves less than is counted here: in small
batches on a CPU, a share may pass 1.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import reporting
from instanas_jax import cost, parallel
from instanas_jax.search_space import CANDIDATE_OPS, CellSpec, SupernetSpec

_MAX_VECTOR = 2**28  # Values.


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Of all devices together."""

    flops_a_second: float
    bytes_a_second: float


@dataclasses.dataclass(frozen=True)
class Work:
    flops: float
    bytes: float

    def bound(self, ceilings: Ceilings) -> tuple[float, str]:
        """Seconds at the ceiling, and which ceiling it is: `compute` or `memory`."""
        compute = self.flops / ceilings.flops_a_second
        memory = self.bytes / ceilings.bytes_a_second
        return max(compute, memory), "compute" if compute >= memory else "memory"


def update_work(
    spec: SupernetSpec, images: int, *, itemsize: int, paths: np.ndarray | None = None
) -> Work:
    """One update of the supernet.

    Args:
      images: B.
      itemsize: bytes of an activation.
      paths: bool [L, O], those that are computed; all by default.
    """
    paths = np.ones(spec.mask_shape, bool) if paths is None else paths
    flops, params = _forward_cost(spec, paths)
    _, all_params = _forward_cost(spec, np.ones(spec.mask_shape, bool))
    values = sum(3 * read + 11 * made for read, made in _maps(spec, paths))
    weights = np.dtype(np.float32).itemsize * (3 * params + 5 * all_params)
    return Work(3.0 * images * flops, float(images * itemsize * values + weights))


def masked_work(spec: SupernetSpec, images: int, *, masks: int, itemsize: int) -> Work:
    """One forward pass of all paths with batch norm folded, of every image under some masks.

    What comes before the first choice runs once an image (`supernet.apply_eval`): the stem, and the
    paths of the first cell.
    """
    paths = np.ones(spec.mask_shape, bool)
    flops, params = _forward_cost(spec, paths)
    values = [read + made for read, made in _maps(spec, paths)]
    shared_flops = cost.stem_cost(spec).flops + int(cost.path_costs(spec)[0][0].sum())
    shared_maps = 1 + len(list(_cell_maps(spec.cells[0], paths[0])))
    image_flops = shared_flops + masks * (flops - shared_flops)
    image_values = sum(values[:shared_maps]) + masks * sum(values[shared_maps:])
    weights = np.dtype(np.float32).itemsize * params
    return Work(float(images * image_flops), float(images * itemsize * image_values + weights))


def _forward_cost(spec: SupernetSpec, paths: np.ndarray) -> tuple[int, int]:
    """FLOPs of one image and parameters of a network of these paths."""
    flops, params = cost.path_costs(spec)
    fixed = cost.fixed_cost(spec)
    return fixed.flops + int((flops * paths).sum()), fixed.params + int((params * paths).sum())


def _maps(spec: SupernetSpec, paths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Values that each layer reads and makes, for one image."""
    first, last = spec.cells[0], spec.cells[-1]
    yield 3 * spec.image_size**2, spec.stem_channels * first.in_size**2
    for cell, row in zip(spec.cells, paths, strict=True):
        yield from _cell_maps(cell, row)
    yield last.out_channels * last.out_size**2, spec.head_channels * last.out_size**2


def _cell_maps(cell: CellSpec, paths: np.ndarray) -> Iterator[tuple[int, int]]:
    """All expansions read the cell's input at once."""
    before, after = cell.in_size**2, cell.out_size**2
    ops = [op for op, runs in zip(CANDIDATE_OPS, paths, strict=True) if runs]
    expanded = [cell.in_channels * op.expansion for op in ops if not op.is_basic]
    if expanded:
        yield cell.in_channels * before, sum(expanded) * before
    for channels in expanded:
        yield channels * before, channels * after
        yield channels * after, cell.out_channels * after
    if len(ops) > len(expanded):
        yield cell.in_channels * before, cell.out_channels * after
        yield cell.out_channels * after, cell.out_channels * after


def default_size() -> int:
    """Side of matrices that keep the default backend busy."""
    return 2048 if jax.default_backend() == "cpu" else 8192


def measure_ceilings(
    dtype: Any, *, size: int, repeats: int
) -> tuple[Ceilings, list[dict[str, Any]]]:
    """The fastest of some runs on one device, times the number of devices; and the rows.

    Args:
      dtype: of the values.
      size: side of the matrices; the vectors hold 16 times as many values as one, up to 2**28.
    """
    ones = jnp.ones((size, size), dtype)
    vector = jnp.ones(min(16 * size * size, _MAX_VECTOR), dtype)
    products = _rates(jnp.matmul, (ones, ones), 2.0 * size**3, repeats)
    # Of one vector added to itself, the second reading would come from a cache.
    additions = _rates(jnp.add, (vector, jnp.ones_like(vector)), 3.0 * vector.nbytes, repeats)
    devices = parallel.device_count()
    rows = [
        reporting.measurement("ceiling_matrix_product", [r / 1e9 for r in products], "GFLOP/s"),
        reporting.measurement("ceiling_addition", [r / 1e9 for r in additions], "GB/s"),
    ]
    return Ceilings(devices * max(products), devices * max(additions)), rows


def _rates(
    function: Callable[..., Any], operands: tuple[jax.Array, ...], amount: float, repeats: int
) -> list[float]:
    """`amount` a second of a function of two arrays, in each of some runs."""
    run = jax.jit(function)
    jax.block_until_ready(run(*operands))
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*operands))
        rates.append(amount / (time.perf_counter() - start))
    return rates
