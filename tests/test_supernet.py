"""The supernet's promises: a mask is as good as skipping, images do not meet, and a path that
nobody chose is inert."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instanas_jax import layers, ops, policy, search_space, supernet
from tests.networks import as_if_trained

BATCH = 4
SPEC = search_space.preset("tiny", num_classes=10)
# Cells 0, 1 and 3 are first of their group; cell 2 repeats, so it can be the identity.
EVERY_PATH = np.ones((BATCH, 4, 5), np.float32)
NO_PATH = np.zeros((BATCH, 4, 5), np.float32)


def random_masks(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2, EVERY_PATH.shape).astype(np.float32)


@functools.cache
def variables():
    return as_if_trained(supernet.init(jax.random.key(0), SPEC))


@functools.cache
def images() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(BATCH, 32, 32, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("lowering", "dtype"))
def evaluate(variables, images, mask, *, lowering="shifted", dtype=jnp.float32):
    folded = supernet.fold(variables)
    return supernet.apply_eval(SPEC, folded, images, mask, lowering=lowering, dtype=dtype)


def may_run(architecture) -> np.ndarray:
    return policy.Settled.architecture(np.array(architecture)).may_run(SPEC.forced_cells)


@functools.partial(jax.jit, static_argnames=("dtype", "architecture"))
def train(variables, images, mask, *, dtype=jnp.float32, architecture=None):
    """Logits and the statistics after one step.

    `architecture` is a nested tuple, because an array can't be a static argument.
    """
    logits, moments = supernet.apply_train(
        SPEC,
        variables,
        images,
        mask,
        lowering="shifted",
        dtype=dtype,
        paths=None if architecture is None else may_run(architecture),
    )
    return logits, layers.move(variables["batch_stats"], moments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_path(cell: int, op: int, folded, x):
    spec = SPEC.cells[cell]
    weights = ops.op_weights(spec, folded[supernet.cell_name(cell)], op)
    return ops.apply_op(spec, search_space.CANDIDATE_OPS[op], weights, x, lowering="native")


def run_skipping(folded, image, mask) -> np.ndarray:
    """One image through its chosen paths alone, the empty-cell rule spelt out."""
    x = supernet.apply_stem(SPEC, folded, image[None], lowering="native")
    for cell, forces in enumerate([True, True, False, True]):
        chosen = np.flatnonzero(mask[cell]).tolist()
        if not chosen and forces:
            chosen = [4]
        if chosen:
            x = sum(run_path(cell, op, folded, x) for op in chosen)
    return np.asarray(supernet.apply_head(folded, x, lowering="native")[0])


def relative_error(actual, expected) -> float:
    difference = np.linalg.norm(np.asarray(actual, np.float64) - expected)
    return float(difference / np.linalg.norm(expected))


def path_leaves(op: int, in_channels: int) -> dict[str, slice]:
    """Where a path's channels lie in its cell: layer name to range of output channels. The four
    MBConv ops expand by 6, 3, 6 and 3, side by side; ops 0 and 1 share the 3x3 depthwise layer,
    ops 2 and 3 the 5x5."""
    if op == 4:
        return {"basic_first": slice(None), "basic_second": slice(None)}
    start, stop = [(0, 6), (6, 9), (9, 15), (15, 18)][op]
    kernel, first = (3, 0) if op < 2 else (5, 9)
    return {
        "expand": slice(start * in_channels, stop * in_channels),
        f"depthwise_k{kernel}": slice((start - first) * in_channels, (stop - first) * in_channels),
        f"project_{search_space.CANDIDATE_OPS[op].name}": slice(None),
    }


def with_nan_in_path(op: int):
    """The supernet with NaN in every parameter of op `op`, in every cell."""
    params = jax.tree.map(lambda leaf: leaf, variables()["params"])
    for index, cell in enumerate(SPEC.cells):
        cell_params = params[supernet.cell_name(index)]
        for layer, channels in path_leaves(op, cell.in_channels).items():
            for name, leaf in cell_params[layer].items():
                broken = np.array(leaf)
                broken[..., channels] = np.nan
                cell_params[layer][name] = broken
    return {**variables(), "params": params}


class TestMaskedIsSkipping:
    @pytest.mark.parametrize(
        "mask",
        [NO_PATH, EVERY_PATH, random_masks(0), random_masks(1), random_masks(2) * random_masks(3)],
        ids=["none", "every", "random_0", "random_1", "sparse"],
    )
    @pytest.mark.parametrize("lowering", ["shifted", "native"])
    def test_same_logits(self, mask, lowering):
        folded = supernet.fold(variables())
        logits = evaluate(variables(), images(), mask, lowering=lowering)
        assert logits.shape == (BATCH, 10)
        for index in range(BATCH):
            expected = run_skipping(folded, images()[index], mask[index])
            assert relative_error(logits[index], expected) < 1e-4

    def test_every_single_path_matters(self):
        """Guards the test above: each of the 20 paths moves the logits by more than its bound."""
        everything = evaluate(variables(), images(), EVERY_PATH)
        for cell in range(4):
            for op in range(5):
                mask = EVERY_PATH.copy()
                mask[:, cell, op] = 0.0
                assert relative_error(evaluate(variables(), images(), mask), everything) > 1e-2

    def test_empty_cells_force_basic_conv_or_pass_through(self):
        forced = NO_PATH.copy()
        forced[:, [0, 1, 3], 4] = 1.0
        np.testing.assert_array_equal(
            evaluate(variables(), images(), NO_PATH), evaluate(variables(), images(), forced)
        )
        forced[:, 2, 4] = 1.0  # In the repeat cell nothing is forced.
        empty, full = (evaluate(variables(), images(), mask) for mask in (NO_PATH, forced))
        assert relative_error(full, empty) > 1e-2

    def test_train_mode_follows_the_same_empty_cell_rule(self):
        forced = NO_PATH.copy()
        forced[:, [0, 1, 3], 4] = 1.0
        empty, _ = train(variables(), images(), NO_PATH)
        same, _ = train(variables(), images(), forced)
        np.testing.assert_array_equal(empty, same)


class TestBatchIndependence:
    def test_other_images_and_masks_do_not_reach_mine(self):
        mask, other_mask = random_masks(0), random_masks(4)
        before = np.asarray(evaluate(variables(), images(), mask))
        for mine in range(BATCH):
            others = np.arange(BATCH) != mine
            new_images, new_mask = images().copy(), mask.copy()
            new_images[others] = 10.0 * images()[others][::-1] + 1.0
            new_mask[others] = other_mask[others]
            after = np.asarray(evaluate(variables(), new_images, new_mask))
            np.testing.assert_allclose(after[mine], before[mine], rtol=1e-5, atol=1e-6)
            assert np.all(np.any(after[others] != before[others], axis=-1))

    def test_a_broken_neighbour_does_not_reach_mine(self):
        mask = random_masks(0)
        before = evaluate(variables(), images(), mask)
        broken = images().copy()
        broken[1] = np.nan
        # Image 1 itself may not turn out NaN: the ReLU of XLA on CPU makes 0 of NaN.
        others = np.array([0, 2, 3])
        after = evaluate(variables(), broken, mask)
        np.testing.assert_allclose(after[others], before[others], rtol=1e-5, atol=1e-6)


class TestUnchosenPathIsInert:
    @pytest.mark.parametrize("op", range(5))
    def test_its_nan_stays_in_it(self, op):
        mask = EVERY_PATH.copy()
        mask[:, :, op] = 0.0
        broken = with_nan_in_path(op)
        logits = evaluate(broken, images(), mask)
        expected = evaluate(variables(), images(), mask)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
        logits, _ = train(broken, images(), mask)
        expected, _ = train(variables(), images(), mask)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("op", range(5))
    def test_only_who_chooses_it_is_touched_by_its_nan(self, op):
        mask = EVERY_PATH.copy()
        mask[1:, :, op] = 0.0
        logits = np.asarray(evaluate(with_nan_in_path(op), images(), mask))
        expected = np.asarray(evaluate(variables(), images(), mask))
        np.testing.assert_allclose(logits[1:], expected[1:], rtol=1e-5, atol=1e-6)
        assert np.all(logits[0] != expected[0])  # NaN, or what a ReLU on CPU makes of it.

    def test_statistics_cover_the_whole_batch_whatever_the_mask(self):
        """The documented change: cell 0 sees the stem's output under any mask, so its running
        statistics are those of the whole batch under any mask."""
        _, with_all = train(variables(), images(), EVERY_PATH)
        _, with_none = train(variables(), images(), NO_PATH)
        for name in ("stem", supernet.cell_name(0)):
            jax.tree.map(
                lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5),
                with_all[name],
                with_none[name],
            )


class TestStaticArchitecture:
    # A subset; empty and forced to op 4; empty and the identity; three ops of both kinds.
    ARCHITECTURE = ((0, 1, 1, 0, 0), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0), (1, 0, 0, 1, 1))
    RUNNING = ((1, 2), (4,), (), (0, 3, 4))

    def test_same_logits_as_the_full_mask_and_other_ops_rest(self):
        mask = np.tile(np.array(self.ARCHITECTURE, np.float32), (BATCH, 1, 1))
        full_logits, full_stats = train(variables(), images(), mask)
        logits, stats = train(variables(), images(), mask, architecture=self.ARCHITECTURE)
        np.testing.assert_allclose(logits, full_logits, rtol=1e-4, atol=1e-5)

        before = variables()["batch_stats"]
        assert jax.tree.structure(stats) == jax.tree.structure(before)
        for index, cell in enumerate(SPEC.cells):
            name = supernet.cell_name(index)
            for op in range(5):
                expected = full_stats if op in self.RUNNING[index] else before
                for layer, channels in path_leaves(op, cell.in_channels).items():
                    for statistic in ("mean", "var"):
                        np.testing.assert_allclose(
                            stats[name][layer][statistic][channels],
                            expected[name][layer][statistic][channels],
                            rtol=1e-4,
                            atol=1e-6,
                            err_msg=f"{name}, op {op}, {layer}, {statistic}",
                        )
        # The two expectations differ, so the loop above could have failed.
        assert np.all(
            full_stats["cell_00"]["expand"]["mean"] != before["cell_00"]["expand"]["mean"]
        )


class TestFreshNetworks:
    def test_a_residual_path_starts_as_the_identity(self):
        """An MBConv path in the cell that repeats adds nothing yet: as if the cell were empty."""
        fresh = supernet.init(jax.random.key(0), SPEC)
        with_path = NO_PATH.copy()
        with_path[:, 2, 0] = 1.0
        empty = evaluate(fresh, images(), NO_PATH)
        np.testing.assert_allclose(evaluate(fresh, images(), with_path), empty, rtol=1e-5)
        # After training the same path is no longer silent.
        assert relative_error(evaluate(variables(), images(), with_path), empty) > 1e-2


class TestModes:
    def test_training_and_evaluation_agree_once_running_statistics_are_the_batchs(self):
        """From running statistics r, a step gives r + 0.1 (batch - r), so the batch's own are
        r + 10 (new - r). The variance so found is the unbiased one: on maps of 8 x 8 in 4 images
        it is 256 / 255 of the biased one that training divides by, hence the tolerance."""
        mask = np.tile(random_masks(0)[:1], (BATCH, 1, 1))
        fresh = variables()
        logits, new = train(fresh, images(), mask)
        batch_stats = jax.tree.map(
            lambda old, moved: old + 10.0 * (moved - old), fresh["batch_stats"], new
        )
        evaluated = evaluate({**fresh, "batch_stats": batch_stats}, images(), mask)
        assert relative_error(evaluated, np.asarray(logits)) < 5e-2

    def test_dropout_acts_only_with_keys_and_by_an_images_own(self):
        spec, fresh = dataclasses.replace(SPEC, head_dropout=0.5), variables()

        def logits(dropout_keys):
            return supernet.apply_train(
                spec,
                fresh,
                images(),
                NO_PATH,
                dropout_keys=dropout_keys,
                lowering="native",
                paths=may_run(NO_PATH[0]),
            )[0]

        with_keys = jax.jit(logits)
        keys = jax.random.split(jax.random.key(0), BATCH)
        one, again = with_keys(keys), with_keys(keys)
        np.testing.assert_array_equal(one, again)
        other = np.asarray(with_keys(keys.at[0].set(jax.random.key(9))))
        assert relative_error(other[0], np.asarray(one)[0]) > 1e-2
        np.testing.assert_array_equal(other[1:], one[1:])
        without, _ = train(variables(), images(), NO_PATH)
        np.testing.assert_allclose(jax.jit(logits)(None), without, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("mode", ["train", "evaluate"])
    def test_bfloat16_runs_and_answers_in_float32(self, mode):
        architecture = TestStaticArchitecture.ARCHITECTURE
        mask = np.tile(np.array(architecture, np.float32), (BATCH, 1, 1))
        if mode == "train":
            run = functools.partial(train, architecture=architecture)
            logits, stats = run(variables(), images(), mask, dtype=jnp.bfloat16)
            expected, _ = run(variables(), images(), mask)
            assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype("float32")}
        else:
            run = functools.partial(evaluate, lowering="native")
            logits = run(variables(), images(), mask, dtype=jnp.bfloat16)
            expected = run(variables(), images(), mask)
        assert logits.dtype == jnp.float32
        # bfloat16 keeps 8 bits, 0.4 % an operation.
        assert 1e-5 < relative_error(logits, np.asarray(expected)) < 0.05

    def test_an_image_is_asked_under_several_masks(self):
        masks = np.concatenate([random_masks(seed) for seed in range(3)])
        logits = evaluate(variables(), images(), masks)
        expected = [evaluate(variables(), images(), masks[i : i + BATCH]) for i in (0, 4, 8)]
        np.testing.assert_allclose(logits, np.concatenate(expected), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="6 masks for 4 images"):
            evaluate(variables(), images(), masks[:6])

    def test_paths_that_no_mask_holds_are_not_computed(self):
        """Op 1 alone, then 0 and 3, then nothing or 4, then 2."""
        paths = np.zeros((4, 5), bool)
        paths[[0, 1, 1, 2, 3], [1, 0, 3, 4, 2]] = True

        folded = supernet.fold(variables())
        run = functools.partial(supernet.apply_eval, SPEC, folded, images(), lowering="shifted")
        some, every = jax.jit(functools.partial(run, paths=paths)), jax.jit(run)
        masks = np.concatenate([random_masks(seed) for seed in range(2)]) * paths
        masks[:, [0, 3], [1, 2]] = masks[:, 1, 0] = 1.0  # Or the empty-cell rule runs another.
        assert len(np.unique(masks, axis=0)) > 2
        assert relative_error(some(masks), every(masks)) < 1e-5
        few, many = (f.lower(masks).cost_analysis()["flops"] for f in (some, every))
        assert few < many / 2

    def test_computing_cells_again_changes_no_value(self):
        """XLA for CPUs finds the repeated part and drops it, so memory can't be looked at here."""

        def gradient(remat):
            def loss(params):
                logits, moments = supernet.apply_train(
                    SPEC,
                    {**variables(), "params": params},
                    images(),
                    EVERY_PATH,
                    lowering="native",
                    remat=remat,
                )
                return jnp.sum(logits**2), moments

            return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(variables()["params"])

        kept, again = (gradient(remat) for remat in (False, True))
        convolutions = [program.as_text().count("stablehlo.conv") for program in (kept, again)]
        assert convolutions[1] > convolutions[0]
        kept, again = kept.compile(), again.compile()
        ours, theirs = (
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(run(variables()["params"]))])
            for run in (kept, again)
        )
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(ours)

    def test_shapes_are_checked(self):
        folded = jax.eval_shape(supernet.fold, variables())
        for wrong_images, wrong_mask in (
            (images()[:, :16], EVERY_PATH),
            (images(), EVERY_PATH[:2]),
            (images(), EVERY_PATH[:, :3]),
        ):
            with pytest.raises((AssertionError, ValueError)):
                supernet.apply_eval(SPEC, folded, wrong_images, wrong_mask, lowering="native")


def test_cell_names_sort_in_the_order_of_cells():
    names = [supernet.cell_name(index) for index in range(17)]
    assert names == sorted(names) and len(set(names)) == 17
