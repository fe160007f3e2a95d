"""The shifted lowering against XLA's own convolution, forward and in both gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instanas_jax import convolution

# Odd by even and even by odd; narrower than a kernel; several rows of an image a turn.
SIZES = [(7, 8), (6, 5), (2, 1), (4, 4)]


def random_array(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def output_and_gradients(apply, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
    """Output, and gradients of x and kernel for a fixed random gradient of the output."""

    @jax.jit
    def program(x, kernel, gradient):
        y, pull_back = jax.vjp(apply, x, kernel)
        return y, *pull_back(gradient)

    return program(x, kernel, random_array(*jax.eval_shape(apply, x, kernel).shape, seed=2))


@functools.cache
def native_depthwise(kernel_size: int, stride: int, size: tuple[int, int]):
    return output_and_gradients(
        functools.partial(convolution.depthwise, stride=stride, lowering="native"),
        random_array(3, *size, 4, seed=0),
        random_array(kernel_size, kernel_size, 4, seed=1),
    )


def assert_close(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


class TestDepthwise:
    def test_by_hand(self):
        # A 3x3 window of ones over a 3x3 image of ones covers 4 pixels in a corner, 6 on an
        # edge, 9 in the middle; at stride 2 the windows stand on the corners alone.
        x, kernel = jnp.ones((1, 3, 3, 1)), jnp.ones((3, 3, 1))
        y = convolution.depthwise(x, kernel, stride=1, lowering="shifted")
        np.testing.assert_array_equal(y[0, :, :, 0], [[4, 6, 4], [6, 9, 6], [4, 6, 4]])
        y = convolution.depthwise(x, kernel, stride=2, lowering="shifted")
        np.testing.assert_array_equal(y[0, :, :, 0], [[4, 4], [4, 4]])

    def test_a_tap_off_the_centre_shifts_the_image(self):
        # The tap of the row above and the column to the left moves the image down and right.
        x = jnp.arange(1.0, 5.0).reshape(1, 2, 2, 1)
        kernel = jnp.zeros((3, 3, 1)).at[0, 0].set(1.0)
        for lowering in ("shifted", "native"):
            y = convolution.depthwise(x, kernel, stride=1, lowering=lowering)
            np.testing.assert_array_equal(y[0, :, :, 0], [[0, 0], [0, 1]])

    @pytest.mark.parametrize("size", [(4, 4), (2, 1), (1, 9)])
    def test_on_gpus_small_maps_have_room(self, monkeypatch, size):
        def native(x, kernel):
            return convolution.depthwise(x, kernel, stride=1, lowering="native")

        arrays = random_array(3, *size, 4, seed=0), random_array(5, 5, 4, seed=1)
        plain = output_and_gradients(native, *arrays)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        text = str(jax.make_jaxpr(lambda *inputs: native(*inputs))(*arrays))
        assert " pad[" in text and "3,8," in text.replace("f32[", "")
        assert_close(output_and_gradients(lambda *inputs: native(*inputs), *arrays), plain)

    @pytest.mark.parametrize("positions_a_turn", [1, 16, 64])  # One row a turn; some; all.
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("kernel_size", [3, 5])
    def test_shifted_agrees_with_native(
        self, monkeypatch, kernel_size, stride, size, positions_a_turn
    ):
        monkeypatch.setattr(convolution, "_POSITIONS_A_TURN", positions_a_turn)
        shifted = output_and_gradients(
            functools.partial(convolution.depthwise, stride=stride, lowering="shifted"),
            random_array(3, *size, 4, seed=0),
            random_array(kernel_size, kernel_size, 4, seed=1),
        )
        assert_close(shifted, native_depthwise(kernel_size, stride, size))

    def test_bfloat16_keeps_its_type_and_sums_the_kernel_gradient_in_float32(self):
        # 1024 ones: a sum in bfloat16 would stop at 256, where 1 is lost to rounding.
        x = jnp.ones((4, 16, 16, 1), jnp.bfloat16)
        _, pull_back = jax.vjp(
            lambda kernel: convolution.depthwise(x, kernel, stride=1, lowering="shifted"),
            jnp.zeros((3, 3, 1), jnp.bfloat16),
        )
        (gradient,) = pull_back(jnp.ones((4, 16, 16, 1), jnp.bfloat16))
        assert gradient.dtype == jnp.bfloat16
        assert float(gradient[1, 1, 0]) == 1024.0


class TestPointwise:
    @pytest.mark.parametrize(
        ("shape", "split_from"),
        [
            ((2, 3, 4), 24),  # 24 positions: split into 4 batched products.
            ((2, 3, 4), 25),  # Too few to split.
            ((2, 3, 3), 1),  # 18 positions do not divide by 4: not split.
        ],
    )
    def test_shifted_agrees_with_native(self, monkeypatch, shape, split_from):
        monkeypatch.setattr(convolution, "_SPLIT_FROM_POSITIONS", split_from)
        shifted, native = (
            output_and_gradients(
                functools.partial(convolution.pointwise, lowering=lowering),
                random_array(*shape, 5, seed=0),
                random_array(5, 6, seed=1),
            )
            for lowering in ("shifted", "native")
        )
        assert_close(shifted, native)

    def test_the_kernel_gradient_is_split_where_positions_are_many(self, monkeypatch):
        monkeypatch.setattr(convolution, "_SPLIT_FROM_POSITIONS", 24)

        def products(positions_shape):
            program = jax.make_jaxpr(
                jax.grad(lambda k, x: convolution.pointwise(x, k, lowering="shifted").sum())
            )(jnp.ones((5, 6)), jnp.ones((*positions_shape, 5)))
            return str(program)

        assert "f32[4,6,5]" in products((2, 3, 4))  # 24 positions as 4 parts of 6.
        assert "f32[1,12,5]" in products((1, 3, 4))

    def test_by_hand(self):
        x = jnp.array([[[[1.0, 2.0]]]])
        kernel = jnp.array([[1.0, 0.0, 10.0], [0.0, 1.0, 100.0]])
        for lowering in ("shifted", "native"):
            y = convolution.pointwise(x, kernel, lowering=lowering)
            np.testing.assert_array_equal(y, [[[[1.0, 2.0, 210.0]]]])


def test_dense_by_hand():
    # Both input channels of ones: twice the counts of the depthwise window above.
    y = convolution.dense(
        jnp.ones((1, 3, 3, 2)), jnp.ones((3, 3, 2, 1)), stride=1, lowering="native"
    )
    np.testing.assert_array_equal(y[0, :, :, 0], [[8, 12, 8], [12, 18, 12], [8, 12, 8]])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("size", "channels", "kernel_size"),
    [(2, 32, 3), (9, 3, 3), (8, 3, 7)],  # A small map; images, odd and even.
)
def test_dense_as_a_product_of_windows_equals_the_native_one(size, channels, kernel_size, stride):
    x = random_array(3, size * stride, size * stride, channels, seed=0)
    kernel = random_array(kernel_size, kernel_size, channels, 40, seed=1)
    shifted = functools.partial(convolution.dense, stride=stride, lowering="shifted")
    text = jax.jit(shifted).lower(x, kernel).as_text()
    assert "stablehlo.convolution" not in text  # Or the comparison would be of one with itself.
    native = functools.partial(convolution.dense, stride=stride, lowering="native")
    assert_close(output_and_gradients(shifted, x, kernel), output_and_gradients(native, x, kernel))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(9, 6), (64, 32)])  # Positions in one part, and in several.
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_gradient_of_a_dense_kernel_by_taps_equals_the_native_one(size, stride, kernel_size):
    x = 0.1 * random_array(2, *size, 6, seed=0)
    kernel = random_array(kernel_size, kernel_size, 6, 5, seed=1)
    shifted = functools.partial(convolution.dense, stride=stride, lowering="shifted")
    native = functools.partial(convolution.dense, stride=stride, lowering="native")
    text = jax.jit(jax.grad(lambda x, k: jnp.sum(shifted(x, k)), 1)).lower(x, kernel).as_text()
    assert text.count("stablehlo.convolution") <= 1  # The forward one, or one with itself compared.
    assert_close(output_and_gradients(shifted, x, kernel), output_and_gradients(native, x, kernel))


def test_taps_of_dense_gradients_do_not_wait_in_memory():
    """Of three kernels of 25 taps each, XLA laid 75 maps out before the first gradient came."""

    def loss(kernels, x):
        for kernel in kernels:
            x = convolution.dense(x, kernel, stride=1, lowering="shifted")
        return jnp.sum(x**2)

    x = jnp.ones((4, 32, 32, 8))
    program = jax.jit(jax.grad(loss)).lower([jnp.ones((5, 5, 8, 8))] * 3, x).compile()
    plan = program.memory_analysis()
    assert plan is not None and plan.temp_size_in_bytes < 25 * x.nbytes


def test_padding_of_a_depthwise_loop_is_made_outside_of_it():
    """Behind calls, the input's and the gradient's; inside, it would run once a tap."""

    def of(x):
        return jnp.sum(
            convolution.depthwise(x, jnp.ones((3, 3, 8)), stride=1, lowering="shifted") ** 2
        )

    x = jnp.ones((2, 8, 8, 8))
    assert jax.jit(of).lower(x).compile().as_text().count(" call(") == 1
    assert jax.jit(jax.grad(of)).lower(x).compile().as_text().count(" call(") == 2


@pytest.mark.parametrize(
    "apply",
    [
        lambda x: convolution.depthwise(x, jnp.ones((3, 3, 2)), stride=1, lowering="shifted"),
        lambda x: convolution.pointwise(x, jnp.ones((2, 2)), lowering="shifted"),
    ],
)
def test_forward_mode_is_refused(apply):
    x = jnp.ones((1, 3, 3, 2))
    with pytest.raises(TypeError):
        jax.jvp(apply, (x,), (x,))


@pytest.mark.parametrize(("backend", "lowering"), [("cpu", "shifted"), ("gpu", "native")])
def test_default_lowering_follows_the_platform(monkeypatch, backend, lowering):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert convolution.default_lowering() == lowering
