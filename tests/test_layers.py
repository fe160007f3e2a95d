"""Batch norm's statistics by hand, in training and folded; fresh weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instanas_jax import batch_norm, layers
from instanas_jax.layers import ConvBatchNorm

# One channel, four values: mean 3, biased variance (4 + 1 + 0 + 9) / 4 = 3.5, unbiased 14 / 3.
VALUES = np.array([1.0, 2.0, 3.0, 6.0], np.float32)


def variables_of_one_channel(scale=1.0, bias=0.0, mean=0.0, var=1.0):
    return {
        "params": {
            "kernel": jnp.ones((1, 1)),
            "scale": jnp.array([scale]),
            "bias": jnp.array([bias]),
        },
        "batch_stats": {"mean": jnp.array([mean]), "var": jnp.array([var])},
    }


def train(module, variables, x):
    y, updated = module.apply(variables, x, mutable=["batch_stats"])
    return y, layers.move(variables["batch_stats"], updated["batch_stats"])


def random_layer(module: ConvBatchNorm, kernel_shape: tuple[int, ...]):
    rng = np.random.default_rng(0)
    channels = (module.channels,)
    return {
        "params": {
            "kernel": jnp.asarray(rng.normal(size=kernel_shape), jnp.float32),
            "scale": jnp.asarray(rng.uniform(0.5, 1.5, channels), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=channels), jnp.float32),
        },
        "batch_stats": {
            "mean": jnp.asarray(rng.normal(size=channels), jnp.float32),
            "var": jnp.asarray(rng.uniform(0.5, 1.5, channels), jnp.float32),
        },
    }


class TestTraining:
    @pytest.mark.parametrize("shape", [(4, 1, 1, 1), (1, 2, 2, 1), (2, 2, 1, 1)])
    def test_statistics_by_hand(self, shape):
        module = ConvBatchNorm("pointwise", 1, activation="none")
        variables = variables_of_one_channel(scale=2.0, bias=1.0, mean=10.0, var=1.0)
        y, stats = train(module, variables, VALUES.reshape(shape))
        # 2 (x - 3) / sqrt(3.5 + 1e-5) + 1, with the biased variance.
        expected = 2.0 * (VALUES - 3.0) / np.sqrt(3.5 + 1e-5) + 1.0
        np.testing.assert_allclose(np.ravel(y), expected, rtol=1e-5)
        # Momentum 0.1: 10 + 0.1 (3 - 10) = 9.3, and 1 + 0.1 (14 / 3 - 1) = 1.366667 (unbiased).
        np.testing.assert_allclose(stats["mean"], [9.3], rtol=1e-6)
        np.testing.assert_allclose(stats["var"], [1.366667], rtol=1e-5)

    def test_activations(self):
        x = jnp.array([-1.0, 0.5, 7.0])
        np.testing.assert_array_equal(batch_norm.activate(x, "none"), [-1.0, 0.5, 7.0])
        np.testing.assert_array_equal(batch_norm.activate(x, "relu"), [0.0, 0.5, 7.0])
        np.testing.assert_array_equal(batch_norm.activate(x, "relu6"), [0.0, 0.5, 6.0])

    def test_one_value_a_channel_has_no_unbiased_variance_and_stays_finite(self):
        module = ConvBatchNorm("pointwise", 1, activation="none")
        y, stats = train(module, variables_of_one_channel(), jnp.full((1, 1, 1, 1), 5.0))
        np.testing.assert_array_equal(y, 0.0)
        np.testing.assert_allclose(stats["var"], [0.9], rtol=1e-6)  # 1 + 0.1 (0 - 1)

    def test_a_shared_batch_has_the_statistics_of_the_whole(self):
        """Two shards over a named axis, as devices would hold them, against one batch."""
        x = jax.random.normal(jax.random.key(0), (6, 3, 3, 2))
        variables = random_layer(ConvBatchNorm("pointwise", 4), (2, 4))
        whole_y, whole = train(ConvBatchNorm("pointwise", 4), variables, x)
        shared = ConvBatchNorm("pointwise", 4, axis_name="devices")
        y, stats = jax.vmap(lambda part: train(shared, variables, part), axis_name="devices")(
            x.reshape(2, 3, 3, 3, 2)
        )
        np.testing.assert_allclose(y.reshape(whole_y.shape), whole_y, atol=1e-5)
        for name in ("mean", "var"):
            np.testing.assert_allclose(stats[name][0], stats[name][1])
            np.testing.assert_allclose(stats[name][0], whole[name], rtol=1e-5)

    def test_bfloat16_activations_keep_float32_statistics(self):
        module = ConvBatchNorm("pointwise", 1)
        y, stats = train(
            module,
            variables_of_one_channel(),
            jnp.asarray(VALUES, jnp.bfloat16).reshape(4, 1, 1, 1),
        )
        assert y.dtype == jnp.bfloat16
        assert stats["mean"].dtype == stats["var"].dtype == jnp.float32
        np.testing.assert_allclose(stats["var"], [1.366667], rtol=1e-5)


class TestKept:
    KEPT = ((1, 2), (3, 5))
    CHANNELS = np.array([1, 3, 4])
    OTHERS = np.array([0, 2, 5])

    @pytest.mark.parametrize("kind", ["pointwise", "depthwise"])
    def test_kept_channels_run_as_in_the_whole_and_the_others_rest(self, kind):
        x = jax.random.normal(jax.random.key(0), (2, 4, 4, 6))
        size, shape = (1, (6, 6)) if kind == "pointwise" else (3, (3, 3, 6))
        whole = ConvBatchNorm(kind, 6, size)
        variables = random_layer(whole, shape)
        whole_y, whole_stats = train(whole, variables, x)

        part_x = x if kind == "pointwise" else x[..., self.CHANNELS]
        y, stats = train(ConvBatchNorm(kind, 6, size, kept=self.KEPT), variables, part_x)
        np.testing.assert_allclose(y, whole_y[..., self.CHANNELS], atol=1e-5)
        for name, before in variables["batch_stats"].items():
            np.testing.assert_array_equal(stats[name][self.OTHERS], before[self.OTHERS])
            np.testing.assert_allclose(
                stats[name][self.CHANNELS], whole_stats[name][self.CHANNELS], rtol=1e-5
            )
            assert np.all(stats[name][self.CHANNELS] != before[self.CHANNELS])

    def test_keep_lays_ranges_side_by_side(self):
        array = jnp.arange(12).reshape(2, 6)
        np.testing.assert_array_equal(layers.keep(array, self.KEPT), [[1, 3, 4], [7, 9, 10]])
        np.testing.assert_array_equal(layers.keep(array, None), array)


class TestFold:
    @pytest.mark.parametrize("lowering", ["shifted", "native"])
    @pytest.mark.parametrize(
        ("kind", "kernel_shape"),
        [("pointwise", (4, 6)), ("depthwise", (3, 3, 4)), ("dense", (3, 3, 4, 6))],
    )
    def test_is_the_normalisation_by_running_statistics(self, kind, kernel_shape, lowering):
        module = ConvBatchNorm(kind, kernel_shape[-1], kernel_shape[0])
        variables = random_layer(module, kernel_shape)
        params = variables["params"]
        stats = {name: np.asarray(array) for name, array in variables["batch_stats"].items()}
        x = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))

        folded = layers.fold(params, variables["batch_stats"])
        y = layers.conv_bias(x, folded, kind=kind, stride=2, activation="none", lowering=lowering)
        plain = {"kernel": params["kernel"], "bias": jnp.zeros(kernel_shape[-1])}
        convolved = layers.conv_bias(
            x, plain, kind=kind, stride=2, activation="none", lowering=lowering
        )
        normalised = (convolved - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
        expected = normalised * np.asarray(params["scale"]) + np.asarray(params["bias"])
        assert y.shape[1:3] == (3, 3)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)

    def test_leaves_a_linear_layer_as_it_is_and_keeps_the_nesting(self):
        linear = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
        layer = variables_of_one_channel(scale=3.0, mean=5.0, var=4.0 - 1e-5)
        folded = layers.fold(
            {"block": {"conv": layer["params"]}, "linear": linear},
            {"block": {"conv": layer["batch_stats"]}},
        )
        assert folded["linear"] == linear
        # Gain 3 / sqrt(4) = 1.5; bias 0 - 5 x 1.5 = -7.5.
        np.testing.assert_allclose(folded["block"]["conv"]["kernel"], [[1.5]], rtol=1e-6)
        np.testing.assert_allclose(folded["block"]["conv"]["bias"], [-7.5], rtol=1e-6)


class TestInitialise:
    SHAPES = {
        "params": {
            "dense": {"kernel": (3, 3, 16, 64), "scale": (64,), "bias": (64,)},
            "depthwise": {"kernel": (5, 5, 400), "scale": (400,), "bias": (400,)},
            "linear": {"kernel": (100, 100), "bias": (100,)},
        },
        "batch_stats": {"dense": {"mean": (64,), "var": (64,)}},
    }

    def initialise(self, seed=0, **arguments):
        shapes = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
            self.SHAPES,
            is_leaf=lambda node: isinstance(node, tuple),
        )
        return layers.initialise(jax.random.key(seed), shapes, **arguments)

    def test_deviations(self):
        params = self.initialise(linear_gain=0.5)["params"]
        # He: sqrt(2 / fan-in), fan-in 3 x 3 x 16 = 144 and, one input a filter, 5 x 5 = 25.
        # Linear: 0.5 / sqrt(100). Each over about 10,000 draws: 5 deviations are 3.6 %.
        for name, deviation in [
            ("dense", np.sqrt(2 / 144)),
            ("depthwise", np.sqrt(2 / 25)),
            ("linear", 0.05),
        ]:
            kernel = np.asarray(params[name]["kernel"])
            assert kernel.std() == pytest.approx(deviation, rel=0.036)
            assert abs(kernel.mean()) < 0.05 * deviation

    def test_batch_norm_starts_as_the_identity(self):
        variables = self.initialise()
        np.testing.assert_array_equal(variables["params"]["dense"]["scale"], 1.0)
        np.testing.assert_array_equal(variables["params"]["dense"]["bias"], 0.0)
        np.testing.assert_array_equal(variables["params"]["linear"]["bias"], 0.0)
        np.testing.assert_array_equal(variables["batch_stats"]["dense"]["mean"], 0.0)
        np.testing.assert_array_equal(variables["batch_stats"]["dense"]["var"], 1.0)

    def test_same_key_same_bits_and_another_key_others(self):
        first, again, other = self.initialise(), self.initialise(), self.initialise(seed=1)
        jax.tree.map(np.testing.assert_array_equal, first, again)
        assert np.all(first["params"]["dense"]["kernel"] != other["params"]["dense"]["kernel"])

    def test_no_two_kernels_share_draws(self):
        params = self.initialise()["params"]
        values = np.concatenate(
            [
                np.ravel(params["dense"]["kernel"]) * np.sqrt(144 / 2),
                np.ravel(params["depthwise"]["kernel"]) * np.sqrt(25 / 2),
            ]
        )
        # Independent float32 draws seldom coincide; shared ones would, thousands of times.
        assert len(np.unique(np.round(values, 5))) > 0.9 * values.size


@pytest.mark.parametrize("lowering", ["shifted", "native"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 2)])
def test_expansion_and_depthwise_in_one_are_both_in_turn(lowering, dtype, kernel, stride):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 7, 6, 3)), dtype)
    expand, depthwise = (
        {
            "kernel": jnp.asarray(rng.normal(size=shape), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=shape[-1]), jnp.float32),
        }
        for shape in ((3, 8), (kernel, kernel, 8))
    )
    y = layers.conv_bias(x, expand, kind="pointwise", lowering=lowering)
    expected = layers.conv_bias(y, depthwise, kind="depthwise", stride=stride, lowering=lowering)
    found = layers.expand_depthwise(x, expand, depthwise, stride=stride, lowering=lowering)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    as_floats = [np.asarray(array, np.float32) for array in (found, expected)]
    np.testing.assert_allclose(*as_floats, rtol=tolerance, atol=tolerance)
