"""Static searches stay within their budget, evaluate nothing twice, and find what is there."""

import dataclasses
import itertools

import numpy as np
import pytest

from instanas_jax import static_nas
from instanas_jax.errors import InputError
from tests.test_latency import SPEC, make_table

TABLE = make_table()  # Rows of 1 to 20 ms; stem and head take 0.75.
FORCED = SPEC.forced_cells
FASTEST_MS = 0.75 + 1.0 + 6.0 + 16.0
EVERY_PATH = np.ones(SPEC.mask_shape, bool)
SPACE = static_nas.Space(SPEC, TABLE, budget_ms=60.0, paths=EVERY_PATH)
RNG = np.random.default_rng(0)
TARGET = SPACE.sample(np.random.default_rng(99))


def likeness(architecture: np.ndarray) -> float:
    """A fitness with one best architecture."""
    return float((architecture == TARGET).mean())


def take(search, count: int) -> list[static_nas.Evaluated]:
    return list(itertools.islice(search, count))


def check(architecture: np.ndarray) -> None:
    assert architecture[FORCED].any(axis=1).all()
    milliseconds = SPACE.image_ms(architecture)
    np.testing.assert_allclose(milliseconds, 0.75 + TABLE.settled_ms[architecture].sum())
    assert milliseconds <= SPACE.budget_ms + 1e-9


def test_architectures_stay_within_the_budget():
    times = []
    for _ in range(100):
        architecture = SPACE.sample(RNG)
        check(architecture)
        child = SPACE.mutate(architecture, RNG)
        check(child)
        assert not np.array_equal(child, architecture)
        times += [SPACE.image_ms(architecture), SPACE.image_ms(child)]
    # Some spend all that there is, others much less.
    assert max(times) > SPACE.budget_ms - 1.0 and min(times) < SPACE.budget_ms - 20.0


def test_a_space_that_is_exhausted_ends_the_search():
    """Each of three cells can run its fastest op alone: one architecture."""
    least = static_nas.Space(SPEC, TABLE, budget_ms=FASTEST_MS + 0.5, paths=EVERY_PATH)
    for method in (static_nas.random_search, static_nas.evolution):
        assert len(list(method(least, likeness))) == 1


def test_a_budget_that_sums_in_float32_missed_by_a_rounding_is_kept():
    least = static_nas.Space(SPEC, TABLE, budget_ms=FASTEST_MS * (1 - 1e-6), paths=EVERY_PATH)
    for method in (static_nas.random_search, static_nas.evolution):
        (found,) = method(least, likeness)
        np.testing.assert_allclose(least.image_ms(found.architecture), FASTEST_MS, rtol=1e-6)
    too_small = dataclasses.replace(least, budget_ms=FASTEST_MS * (1 - 1e-3))
    with pytest.raises(InputError, match=f"the fastest takes {FASTEST_MS:.4f} ms"):
        too_small.sample(RNG)


def test_the_fastest_architecture_is_found_where_nothing_else_fits():
    least = static_nas.Space(SPEC, TABLE, budget_ms=FASTEST_MS + 1e-3, paths=EVERY_PATH)
    expected = np.zeros(SPEC.mask_shape, bool)
    expected[FORCED, 0] = True
    np.testing.assert_array_equal(least.sample(RNG), expected)
    too_small = static_nas.Space(SPEC, TABLE, budget_ms=FASTEST_MS - 0.1, paths=EVERY_PATH)
    with pytest.raises(InputError, match=r"23\.6500 ms: the fastest takes 23\.7500 ms"):
        too_small.sample(RNG)


def test_other_paths_than_those_to_choose_from_never_run():
    paths = EVERY_PATH.copy()
    paths[:, [0, 3]] = False  # The fastest and a dear one.
    paths[~FORCED, 1] = False
    space = dataclasses.replace(SPACE, paths=paths)
    ever = np.zeros(SPEC.mask_shape, bool)
    for _ in range(200):
        architecture = space.sample(RNG)
        for one in (architecture, space.mutate(architecture, RNG)):
            check(one)
            ever |= one
    np.testing.assert_array_equal(ever, paths)


@pytest.mark.parametrize("method", [static_nas.random_search, static_nas.evolution])
def test_nothing_is_evaluated_twice_and_a_seed_repeats(method):
    evaluated = []

    def fitness(architecture: np.ndarray) -> float:
        evaluated.append(architecture.tobytes())
        return likeness(architecture)

    members = take(method(SPACE, fitness, seed=3), 60)
    assert len(set(evaluated)) == len(evaluated) == 60
    assert [member.fitness for member in members] == [likeness(m.architecture) for m in members]
    again = take(method(SPACE, likeness, seed=3), 60)
    assert [one.fitness for one in again] == [one.fitness for one in members]


def test_evolution_comes_nearer_than_chance():
    """At equal evaluations, over some seeds."""

    def best(method, seed: int, **options) -> float:
        return max(one.fitness for one in take(method(SPACE, likeness, seed=seed, **options), 80))

    by_chance = [best(static_nas.random_search, seed) for seed in range(5)]
    evolved = [best(static_nas.evolution, seed, population=10, tournament=4) for seed in range(5)]
    assert np.mean(evolved) > np.mean(by_chance) + 0.05


def test_parents_are_among_the_youngest():
    """The best of all is the oldest: where it has left, no child is near it any more."""
    first = {}

    def fitness(architecture: np.ndarray) -> float:
        first.setdefault("architecture", architecture)
        return float(np.array_equal(architecture, first["architecture"]))

    parents = []

    class Watched(static_nas.Space):
        def mutate(self, architecture, rng):
            parents.append(np.array_equal(architecture, first["architecture"]))
            return super().mutate(architecture, rng)

    space = Watched(SPEC, TABLE, budget_ms=60.0, paths=EVERY_PATH)
    take(static_nas.evolution(space, fitness, population=5, tournament=5, seed=0), 30)
    # The first member is drawn by the first child alone, then it is the oldest and leaves.
    assert parents[0] and not any(parents[1:])
