"""The skipping execution gives the masked supernet's answers, and really skips."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instanas_jax import inference, profiling, supernet
from instanas_jax.search_space import preset, uniform_architecture

SPEC = preset("tiny", num_classes=10)
VARIABLES = supernet.init(jax.random.key(0), SPEC)
FOLDED = supernet.fold(VARIABLES)
WEIGHTS = inference.prepare_weights(SPEC, FOLDED)
IMAGE = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))

masked = jax.jit(lambda mask: supernet.apply_eval(SPEC, FOLDED, IMAGE, mask, lowering="shifted"))
skipping = jax.jit(
    lambda weights, mask: inference.apply_skipping(SPEC, weights, IMAGE, mask, lowering="shifted")
)


def relative_error(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


def masks():
    rng = np.random.default_rng(0)
    yield np.zeros(SPEC.mask_shape)
    yield np.ones(SPEC.mask_shape)
    for density in (0.1, 0.3, 0.6):
        for _ in range(4):
            yield rng.uniform(size=SPEC.mask_shape) < density


@pytest.mark.parametrize("mask", list(masks()))
def test_skipping_equals_masked(mask):
    mask = jnp.asarray(mask, jnp.float32)[None]
    assert relative_error(skipping(WEIGHTS, mask), masked(mask)) < 1e-4


def test_static_equals_masked():
    for architecture in (uniform_architecture(SPEC, 0), np.zeros(SPEC.mask_shape, np.float32)):
        static = inference.apply_static(SPEC, WEIGHTS, IMAGE, architecture, lowering="shifted")
        assert relative_error(static, masked(jnp.asarray(architecture)[None])) < 1e-4


def test_an_unchosen_path_does_not_run():
    """NaN weights in an unchosen path cannot reach the answer: its branch is not taken."""
    poisoned = jax.tree.map(lambda leaf: leaf, WEIGHTS)
    poisoned["paths"][1][2] = jax.tree.map(lambda leaf: leaf * jnp.nan, poisoned["paths"][1][2])
    mask = np.ones(SPEC.mask_shape, np.float32)
    mask[1, 2] = 0.0
    clean = skipping(WEIGHTS, mask[None])
    np.testing.assert_array_equal(skipping(poisoned, mask[None]), clean)
    mask[1, 2] = 1.0
    assert np.isnan(skipping(poisoned, mask[None])).all()


def test_the_program_holds_one_branch_a_path():
    text = (
        jax.jit(
            lambda mask: inference.apply_skipping(SPEC, WEIGHTS, IMAGE, mask, lowering="shifted")
        )
        .lower(jnp.ones((1, *SPEC.mask_shape)))
        .as_text()
    )
    assert text.count("stablehlo.case") == SPEC.num_cells * 5


def test_a_measured_table_is_complete_and_positive():
    table = profiling.measure(SPEC, rounds=2)
    assert table.cells_ms.shape == SPEC.mask_shape
    assert (table.cells_ms > 0).all() and all(time > 0 for time in table.fixed_ms.values())
    assert table.repeats == 2 and table.batch_size == 1


def test_the_mean_join_is_the_same_in_every_execution():
    """Masked, skipping and static agree, and differ from the sum."""
    spec = dataclasses.replace(SPEC, join="mean")
    mask = np.random.default_rng(1).uniform(size=SPEC.mask_shape) < 0.5
    mask = jnp.asarray(mask, jnp.float32)
    mean = supernet.apply_eval(spec, FOLDED, IMAGE, mask[None], lowering="shifted")
    skipped = inference.apply_skipping(spec, WEIGHTS, IMAGE, mask[None], lowering="shifted")
    static = inference.apply_static(spec, WEIGHTS, IMAGE, np.asarray(mask), lowering="shifted")
    assert relative_error(skipped, mean) < 1e-4
    assert relative_error(static, mean) < 1e-4
    assert relative_error(masked(mask[None]), mean) > 1e-2
