"""Packed weights are the same weights, in fewer arrays."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np

from instanas_jax import packing

RNG = np.random.default_rng(0)
WEIGHTS = {
    "bias": RNG.normal(size=(7,)).astype(np.float32),
    "small": [RNG.normal(size=(3, 5)).astype(np.float32) for _ in range(4)],
    "depthwise": RNG.normal(size=(5, 5, 2**9)).astype(np.float32),
    "large": RNG.normal(size=(2**8, 2**7)).astype(np.float32),
}

unpack = jax.jit(lambda packed: packing.read(packed.unpack()))


def test_what_is_read_is_what_was_packed():
    for in_branch in (True, False):
        packed = packing.pack(WEIGHTS, in_branch=in_branch)
        jax.tree.map(np.testing.assert_array_equal, unpack(packed), WEIGHTS)


def test_all_small_arrays_of_branches_are_one_argument():
    packed = packing.pack(WEIGHTS, in_branch=True)
    small = sum(leaf.size for leaf in jax.tree.leaves(WEIGHTS)) - WEIGHTS["large"].size
    assert [leaf.shape for leaf in jax.tree.leaves(packed)] == [(small,), WEIGHTS["large"].shape]


def test_matrices_that_every_call_reads_are_arguments():
    """Biases and depthwise kernels are not: loops index the vector."""
    in_branch = {"bias": True, "small": [True, False, True, False], "depthwise": False}
    packed = packing.pack(WEIGHTS, in_branch={**in_branch, "large": False})
    assert [leaf.shape for leaf in packed.large] == [(2**8, 2**7), (3, 5), (3, 5)]
    jax.tree.map(np.testing.assert_array_equal, unpack(packed), WEIGHTS)


def test_matrices_of_branches_are_cut_up_to_64_kilobytes():
    matrices = [np.zeros((2**6, columns), np.float32) for columns in (2**8, 2**8 + 1)]
    packed = packing.pack(matrices, in_branch=True)
    assert [leaf.shape for leaf in packed.large] == [matrices[1].shape]


def test_weights_without_small_arrays():
    large = {"large": WEIGHTS["large"]}
    np.testing.assert_array_equal(unpack(packing.pack(large))["large"], large["large"])


def test_raveled_trees_come_back_on_the_host_as_views_and_traced():
    raveled = packing.ravel(WEIGHTS)
    assert [leaf.shape for leaf in jax.tree.leaves(raveled)] == [raveled.vector.shape]
    jax.tree.map(np.testing.assert_array_equal, raveled.arrays(), WEIGHTS)
    assert np.shares_memory(raveled.arrays()["large"], raveled.vector)
    doubled = jax.jit(lambda tree: packing.ravel(jax.tree.map(lambda leaf: 2 * leaf, tree)))
    traced = doubled(raveled.arrays())
    np.testing.assert_array_equal(traced.vector, 2 * raveled.vector)
    # One structure, so that arithmetic on trees of one kind is arithmetic on vectors.
    assert jax.tree.structure(traced) == jax.tree.structure(raveled)


def test_what_another_process_packed_has_the_same_structure():
    packed = packing.ravel({"a": np.arange(3.0, dtype=np.float32), "b": {"c": np.ones((2, 2))}})
    copied = pickle.loads(pickle.dumps(packed))
    assert jax.tree.structure(copied) == jax.tree.structure(packed)
    np.testing.assert_array_equal(copied.arrays()["a"], packed.arrays()["a"])


def test_a_program_holds_few_matrices_and_is_passed_many(monkeypatch):
    """Either way it gives what the function gives. The vector it never holds."""

    def held(line: str) -> bool:
        return " constant(" in line and "[]" not in line

    weights = {"packed": packing.pack(WEIGHTS), "other": packing.pack({"matrix": jnp.eye(5)})}
    x = jnp.arange(15.0).reshape(3, 5)

    def function(weights, x):
        tree = packing.read(weights["packed"].unpack())
        other = packing.read(weights["other"].unpack())
        return [x @ tree["small"][0].T @ tree["small"][1] @ other["matrix"], tree["bias"] * 2]

    small = packing.compile_with(function, weights, x)
    monkeypatch.setattr(packing, "_CONSTANT_UP_TO", 4 * WEIGHTS["large"].size)
    large = packing.compile_with(function, weights, x)
    assert len(jax.tree.leaves(small.args)) == 2  # The vectors, one of them of no value.
    assert len(jax.tree.leaves(large.args)) == 2 + 5 + 1
    few, none = (
        [line for line in program.func.as_text().splitlines() if held(line)]
        for program in (small, large)
    )
    assert none == [] and any("f32[5,5]" in line for line in few)
    assert all("," in line.split("{")[0] for line in few)  # Matrices, not the vector.
    for program in (small, large):
        jax.tree.map(np.testing.assert_array_equal, program(x), jax.jit(function)(weights, x))
