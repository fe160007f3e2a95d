"""One architecture for all images, found by evaluations alone: the search to compare with.

Cells, weights and latency table are those of the instance-aware search; what differs is that every
image gets the same. No architecture is evaluated twice.

Sources: regularised evolution, arXiv 1802.01548, algorithm 1.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from instanas_jax import latency
from instanas_jax.errors import InputError
from instanas_jax.latency import LatencyTable
from instanas_jax.search_space import SupernetSpec

Evaluate = Callable[[np.ndarray], float]  # Fitness of an architecture [L, O]; higher is better.

_TRIES = 1000
_ROUNDING = 1e-5  # Share of a time that sums in float32 may be off.


@dataclasses.dataclass(frozen=True)
class Evaluated:
    architecture: np.ndarray  # bool [L, O]
    fitness: float


@dataclasses.dataclass(frozen=True)
class Space:
    """Architectures that take no longer than a budget.

    Attributes:
      spec: of the supernet.
      table: its latency table.
      budget_ms: of a whole image, as a static network.
      paths: bool [L, O], those to choose from, one or more in each cell that needs one.
    """

    spec: SupernetSpec
    table: LatencyTable
    budget_ms: float
    paths: np.ndarray

    def __post_init__(self):
        if not self.paths[self.spec.forced_cells].any(axis=1).all():
            raise ValueError("there is no path to choose in a cell that can't be empty")

    def image_ms(self, architecture: np.ndarray) -> float:
        """Table time of an architecture [L, O] as a static network."""
        return latency.static_ms(self.table, architecture, self.spec.forced_cells)

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """A random architecture: an op in each cell that needs one, then others in random order.

        Raises:
          InputError: not even one op in each cell that needs one fits into the budget.
        """
        forced = np.flatnonzero(self.spec.forced_cells)
        rows_ms = self._rows_ms
        least_ms = rows_ms.min(axis=1)
        spare_ms = self.budget_ms - self.table.fixed_total_ms(controller=False)
        spare_ms -= least_ms[forced].sum()
        if spare_ms < -_ROUNDING * self.budget_ms:
            raise InputError(
                f"no architecture takes {self.budget_ms:.4f} ms: the fastest takes "
                f"{self.budget_ms - spare_ms:.4f} ms by the table, compare with a slower variant"
            )
        spare_ms = max(spare_ms, 0.0)
        architecture = np.zeros(self.spec.mask_shape, bool)
        for cell in rng.permutation(forced):
            more_ms = rows_ms[cell] - least_ms[cell]
            op = rng.choice(np.flatnonzero(more_ms <= spare_ms))
            architecture[cell, op] = True
            spare_ms -= more_ms[op]
        return self._with_more(architecture, rng)

    def mutate(self, architecture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A neighbour: one path leaves, and others may come that fit."""
        for _ in range(_TRIES):
            child = architecture.copy()
            active = np.argwhere(child)
            cell, op = active[rng.integers(len(active))]
            child[cell, op] = False
            if self.spec.forced_cells[cell] and not child[cell].any():
                child[cell, rng.choice(np.flatnonzero(self.paths[cell]))] = True
            if self.image_ms(child) > self.budget_ms * (1.0 + _ROUNDING):
                continue
            child = self._with_more(child, rng)
            if not np.array_equal(child, architecture):
                return child
        return self.sample(rng)

    def _with_more(self, architecture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Paths in random order, until a random share of what is left of the budget is spent."""
        spare_ms = rng.uniform() * (self.budget_ms - self.image_ms(architecture))
        more, rows_ms = architecture.copy(), self._rows_ms
        for place in rng.permutation(architecture.size):
            at = np.unravel_index(place, architecture.shape)
            if not more[at] and rows_ms[at] <= spare_ms:
                more[at] = True
                spare_ms -= rows_ms[at]
        return more

    @property
    def _rows_ms(self) -> np.ndarray:
        """Of each path; what is not to be chosen fits into no budget."""
        return np.where(self.paths, self.table.settled_ms, np.inf)


def random_search(space: Space, evaluate: Evaluate, *, seed: int = 0) -> Iterator[Evaluated]:
    """Random architectures, each evaluated as it is asked for, until no new one is found."""
    rng, seen = np.random.default_rng(seed), _Seen()
    while (architecture := seen.first_new(lambda: space.sample(rng))) is not None:
        yield Evaluated(architecture, evaluate(architecture))


def evolution(
    space: Space, evaluate: Evaluate, *, population: int = 20, tournament: int = 5, seed: int = 0
) -> Iterator[Evaluated]:
    """Regularised evolution, until no new architecture is found: the child of the fittest of some
    joins, the oldest leaves.

    Args:
      population: the first so many are random.
      tournament: members drawn, without replacement, of which the fittest is the parent.
    """
    rng, seen = np.random.default_rng(seed), _Seen()
    alive: collections.deque[Evaluated] = collections.deque(maxlen=population)

    def propose() -> np.ndarray:
        if len(alive) < population:
            return space.sample(rng)
        drawn = rng.choice(population, size=tournament, replace=False)
        parent = max((alive[index] for index in drawn), key=lambda member: member.fitness)
        return space.mutate(parent.architecture, rng)

    while (architecture := seen.first_new(propose)) is not None:
        alive.append(Evaluated(architecture, evaluate(architecture)))
        yield alive[-1]


class _Seen:
    """Architectures that were evaluated before."""

    def __init__(self):
        self._keys: set[bytes] = set()

    def first_new(self, draw: Callable[[], np.ndarray]) -> np.ndarray | None:
        """The first drawn that is new, or None where many draws bring none."""
        for _ in range(_TRIES):
            architecture = draw()
            key = np.packbits(architecture).tobytes()
            if key not in self._keys:
                self._keys.add(key)
                return architecture
        return None
