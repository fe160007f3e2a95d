"""The controller: shapes of all kinds, first answers near zero, images that do not meet."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instanas_jax import controller, layers, policy, search_space

BATCH = 4
TINY = search_space.preset("tiny", num_classes=10)
SPECS = {
    "residual_small": TINY,
    "residual_large": dataclasses.replace(TINY, controller="residual_large"),
    "pooled": dataclasses.replace(TINY, controller_pool=4),
    "patches": dataclasses.replace(TINY, controller="patches"),
}
each_kind = pytest.mark.parametrize("kind", SPECS)


@functools.cache
def variables(kind: str):
    return controller.init(jax.random.key(0), SPECS[kind])


@functools.cache
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(BATCH, 32, 32, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("kind", "lowering", "dtype"))
def evaluate(variables, images, *, kind, lowering="shifted", dtype=jnp.float32):
    folded = controller.fold(variables)
    return controller.apply_eval(SPECS[kind], folded, images, lowering=lowering, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("kind", "dtype"))
def train(variables, images, *, kind, dtype=jnp.float32):
    logits, moments = controller.apply_train(
        SPECS[kind], variables, images, lowering="shifted", dtype=dtype
    )
    return logits, layers.move(variables["batch_stats"], moments)


@functools.cache
def trained_once(kind: str):
    return train(variables(kind), images(), kind=kind)


@each_kind
class TestEveryKind:
    def test_shapes_and_types(self, kind):
        logits = evaluate(variables(kind), images(), kind=kind)
        train_logits, _ = trained_once(kind)
        assert logits.shape == train_logits.shape == (BATCH, 4, 5)
        assert logits.dtype == train_logits.dtype == jnp.float32

    def test_first_logits_are_near_zero_but_not_all_zero(self, kind):
        """Every path starts near probability one half: sigmoid(1) = 0.73."""
        for logits in (evaluate(variables(kind), images(), kind=kind), trained_once(kind)[0]):
            assert 0.0 < float(jnp.abs(logits).mean()) < 0.5
            assert float(jnp.abs(logits).max()) < 1.0

    def test_images_do_not_meet_in_evaluation(self, kind):
        before = np.asarray(evaluate(variables(kind), images(), kind=kind))
        changed = images().copy()
        changed[[0, 2]] = 10.0 * images()[[2, 0]] + 1.0
        changed[3] = np.nan
        after = np.asarray(evaluate(variables(kind), changed, kind=kind))
        np.testing.assert_allclose(after[1], before[1], rtol=1e-5, atol=1e-6)
        assert np.all(after[[0, 2]] != before[[0, 2]])
        assert np.any(before[0] != before[1])  # The answer depends on the image at all.

    def test_training_moves_every_running_statistic(self, kind):
        before = variables(kind)["batch_stats"]
        _, after = trained_once(kind)
        assert jax.tree.structure(after) == jax.tree.structure(before)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert np.all(np.isfinite(new)) and np.any(old != new)

    def test_modes_agree_once_running_statistics_are_the_batchs(self, kind):
        """A step moves r to r + 0.1 (batch - r). The variance so found is unbiased; on the last
        maps of the large kind and of patches, 1 x 1, it is 4 / 3 of what training divides by."""
        logits, new = trained_once(kind)

        def to_batch_statistics(path, old, moved):
            batch = old + 10.0 * (moved - old)
            if path[-1].key == "mean":
                return batch
            size = map_size(kind, path[0].key)
            count = BATCH * size * size
            return batch * (count - 1) / count

        stats = jax.tree_util.tree_map_with_path(
            to_batch_statistics, variables(kind)["batch_stats"], new
        )
        evaluated = evaluate({**variables(kind), "batch_stats": stats}, images(), kind=kind)
        np.testing.assert_allclose(evaluated, logits, rtol=1e-2, atol=2e-3)

    def test_bfloat16_answers_in_float32(self, kind):
        logits = evaluate(variables(kind), images(), kind=kind, dtype=jnp.bfloat16)
        assert logits.dtype == jnp.float32
        expected = evaluate(variables(kind), images(), kind=kind)
        assert 0.0 < float(jnp.abs(logits - expected).max()) < 0.05

    def test_lowerings_agree(self, kind):
        native = evaluate(variables(kind), images(), kind=kind, lowering="native")
        shifted = evaluate(variables(kind), images(), kind=kind)
        np.testing.assert_allclose(shifted, native, rtol=1e-4, atol=1e-5)


def map_size(kind: str, module: str) -> int:
    """Output size in pixels of a module. Patches: 4 x 4 of them, then one. Small: strides 1, 1, 2,
    2 from the pooled image. Large: stem strides by 2, then a pool by 2, then strides 1, 2, 2, 2."""
    size = 32 // SPECS[kind].controller_pool
    if kind == "patches":
        return {"embedding": 4, "hidden": 1}[module]
    if SPECS[kind].controller == "residual_small":
        divisors = {"stem": 1, "segment_0": 1, "segment_1": 2, "segment_2": 4}
    else:
        divisors = {"stem": 2, "segment_0": 4, "segment_1": 8, "segment_2": 16, "segment_3": 32}
    return max(1, size // divisors[module])


def test_every_path_starts_near_the_probability_asked_for():
    start = np.full((4, 5), 0.2)
    start[:, 0] = 0.6
    start[3, 4] = 1.0  # Has no logit, so nearly certain.
    fresh = controller.init(jax.random.key(0), TINY, start=start)
    probability = jax.nn.sigmoid(evaluate(fresh, images(), kind="residual_small"))
    np.testing.assert_allclose(probability, np.broadcast_to(start, probability.shape), atol=0.12)


def test_settled_paths_no_longer_depend_on_the_image():
    on, off = np.zeros((2, *TINY.mask_shape), bool)
    on[0, 1] = off[2] = True
    before = variables("residual_small")
    settled = controller.settle(before, policy.Settled(on, off))
    logits = np.asarray(evaluate(settled, images(), kind="residual_small"))
    assert (logits[:, on] > 10).all() and (logits[:, off] < -10).all()
    others = ~(on | off)
    asked = np.asarray(evaluate(before, images(), kind="residual_small"))
    np.testing.assert_allclose(logits[:, others], asked[:, others], rtol=1e-5)
    read = controller.settled(TINY, settled)
    np.testing.assert_array_equal(read.on, on)
    np.testing.assert_array_equal(read.off, off)
    assert not (controller.settled(TINY, before).on | controller.settled(TINY, before).off).any()


def test_a_pooled_controller_sees_means_of_pixels():
    """Changes that leave the mean of every 4 x 4 pixels alone change nothing; others do."""
    changed = np.array(images())
    changed[:, 0, 0] += 1.0
    changed[:, 3, 3] -= 1.0
    before = evaluate(variables("pooled"), images(), kind="pooled")
    same = evaluate(variables("pooled"), changed, kind="pooled")
    np.testing.assert_allclose(same, before, atol=1e-5)
    changed[:, 0, 0] += 16.0
    other = evaluate(variables("pooled"), changed, kind="pooled")
    assert float(jnp.abs(other - before).max()) > 1e-3


def test_patches_are_tiles_of_the_image():
    x = jnp.arange(2 * 8 * 8 * 3.0).reshape(2, 8, 8, 3)
    patches = controller._patches(x)
    for row, column in ((0, 0), (1, 3), (3, 2)):
        tile = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(patches[:, row, column], tile.reshape(2, -1))


def test_cost_of_patches():
    spec = search_space.preset("px32", num_classes=100, controller="patches", controller_pool=2)
    params = controller.init(jax.random.key(0), spec)["params"]
    cost = controller.cost(spec)
    assert cost.params == sum(leaf.size for leaf in jax.tree.leaves(params))
    # 16 patches of 4 x 4 pixels of 3 channels to 16; all 256 to 64; 64 to 85 logits.
    assert cost.flops == 2 * (16 * 48 * 16 + 256 * 64 + 64 * 85)


class TestPublishedSizes:
    @pytest.mark.parametrize(
        ("name", "widths"), [("px32", (16, 16, 32, 64)), ("px224", (16, 16, 32, 64, 128))]
    )
    def test_widths_and_outputs(self, name, widths):
        spec = search_space.preset(name, num_classes=100)
        params = controller.init(jax.random.key(0), spec)["params"]
        assert controller.cost(spec).params == sum(leaf.size for leaf in jax.tree.leaves(params))
        stem, *segments = [params[module] for module in sorted(params, key=module_order)][:-1]
        kernel_size = 3 if name == "px32" else 7
        assert stem["kernel"].shape == (kernel_size, kernel_size, 3, 16)
        assert [each["second"]["kernel"].shape[-1] for each in segments] == list(widths[1:])
        assert params["logits"]["kernel"].shape == (widths[-1], 85)
        # Only the large kind projects, and only where the shape changes.
        projecting = [index for index, each in enumerate(segments) if "shortcut" in each]
        assert projecting == ([] if name == "px32" else [1, 2, 3])

    def test_large_controller_on_224_pixels(self):
        """Shapes only, and about the 21 M multiply-adds of the authors' controller."""
        spec = search_space.preset("px224", num_classes=1000)
        folded = jax.eval_shape(controller.fold, controller.init(jax.random.key(0), spec))
        program, shape = jax.make_jaxpr(
            lambda *inputs: controller.apply_eval(spec, *inputs, lowering="native"),
            return_shape=True,
        )(folded, jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32))
        assert shape.shape == (2, 17, 5) and shape.dtype == jnp.float32
        multiply_adds = sum(
            equation.outvars[0].aval.size * int(np.prod(equation.invars[1].aval.shape[:-1]))
            for equation in program.eqns
            if equation.primitive.name == "conv_general_dilated"
        )
        assert multiply_adds / 2 == pytest.approx(21e6, rel=0.05)
        # The program above saw 2 images; the linear layer is no convolution.
        assert controller.cost(spec).flops == multiply_adds + 2 * 128 * 85


def module_order(module: str) -> tuple[int, str]:
    return ({"stem": 0, "logits": 2}.get(module, 1), module)


def test_pooled_shortcut_by_hand():
    """Mean of each 2 x 2 block, then channels of zeros."""
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    # Block means: (0 + 1 + 4 + 5) / 4 = 2.5, then 4.5, 10.5, 12.5.
    y = controller._pooled_shortcut(x, 3, 2)
    np.testing.assert_array_equal(y[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])
    np.testing.assert_array_equal(y[..., 1:], 0.0)
