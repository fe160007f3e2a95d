"""The controller: a small network that reads an image and scores every path.

Source: InstaNAS (arXiv 1811.10201), section 3.3; layer widths of the residual kinds from the
authors' program. The kind `patches` is ours: an embedding of each patch of a grid, as of a vision
transformer (arXiv 2010.11929, section 3.1), and one hidden layer over all. Two small products
answer in 3 us what takes a residual controller 29 us beside narrow networks, a tenth of
MobileNetV2's time there, and the published one 400 us, a seventh.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from instanas_jax import convolution, layers, policy
from instanas_jax.cost import Cost, conv_cost
from instanas_jax.layers import ConvBatchNorm, Folded
from instanas_jax.search_space import SupernetSpec

Variables = dict[str, Any]

# Logits start near their biases, whatever the image.
_INITIAL_LOGIT_GAIN = 0.1
GRID = 4  # Patches a side, of the kind of that name.
# Of a settled path: its probability is 1 or 0 in float32, and has no gradient.
_SETTLED_LOGIT = 200.0


def segments(spec: SupernetSpec) -> tuple[tuple[int, int], ...]:
    """(channels, stride) of each segment's residual block, if any."""
    width = spec.controller_channels
    if spec.controller == "patches":
        return ()
    small = ((width, 1), (2 * width, 2), (4 * width, 2))
    return small if spec.controller == "residual_small" else (*small, (8 * width, 2))


def cost(spec: SupernetSpec) -> Cost:
    """FLOPs of one image and trainable parameters."""
    size, channels = spec.image_size // spec.controller_pool, spec.controller_channels
    outputs = spec.num_cells * spec.mask_shape[1]
    if spec.controller == "patches":
        hidden = _hidden_channels(spec)
        total = conv_cost(GRID, 1, 3 * (size // GRID) ** 2, channels)
        total += conv_cost(1, 1, GRID**2 * channels, hidden)
        return total + Cost(2 * hidden * outputs, hidden * outputs + outputs)
    if spec.controller == "residual_large":
        size = (size + 1) // 2
        total = conv_cost(size, 7, 3, channels)
        size = (size + 1) // 2
    else:
        total = conv_cost(size, 3, 3, channels)
    for out_channels, stride in segments(spec):
        projects = _projects(spec, channels, out_channels, stride)
        size = (size - 1) // stride + 1
        total += conv_cost(size, 3, channels, out_channels)
        total += conv_cost(size, 3, out_channels, out_channels)
        if projects:
            total += conv_cost(size, 1, channels, out_channels)
        channels = out_channels
    return total + Cost(2 * channels * outputs, channels * outputs + outputs)


def _hidden_channels(spec: SupernetSpec) -> int:
    """Of the layer over all patches."""
    return 4 * spec.controller_channels


def _patches(x: jax.Array) -> jax.Array:
    """[B, S, S, C] as a grid of its patches, [B, G, G, S / G * S / G * C]."""
    batch, size, _, channels = x.shape
    side = size // GRID
    tiles = x.reshape(batch, GRID, side, GRID, side, channels).transpose(0, 1, 3, 2, 4, 5)
    return tiles.reshape(batch, GRID, GRID, side * side * channels)


def _joined(x: jax.Array) -> jax.Array:
    """[B, G, G, C] as a map of one pixel."""
    return x.reshape(x.shape[0], 1, 1, -1)


class _Block(nn.Module):
    channels: int
    stride: int
    projects: bool
    lowering: convolution.Lowering
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        common = {"lowering": self.lowering, "axis_name": self.axis_name}
        y = ConvBatchNorm("dense", self.channels, 3, self.stride, name="first", **common)(x)
        y = ConvBatchNorm("dense", self.channels, 3, activation="relu6", name="second", **common)(y)
        if self.projects:
            x = ConvBatchNorm(
                "pointwise",
                self.channels,
                stride=self.stride,
                activation="none",
                name="shortcut",
                **common,
            )(x)
        else:
            x = _pooled_shortcut(x, self.channels, self.stride)
        return jnp.maximum(x + y, 0.0)


def _pooled_shortcut(x: jax.Array, channels: int, stride: int) -> jax.Array:
    """Average pool by the stride, then zero channels up to `channels`."""
    return jnp.pad(_average_pool(x, stride), ((0, 0), (0, 0), (0, 0), (0, channels - x.shape[-1])))


def _average_pool(x: jax.Array, size: int) -> jax.Array:
    if size == 1:
        return x
    batch, height, width, channels = x.shape
    tiles = x.reshape(batch, height // size, size, width // size, size, channels)
    return jnp.mean(tiles, axis=(2, 4))  # Windows do not overlap; faster than reduce_window.


def _max_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore


def _projects(spec: SupernetSpec, in_channels: int, channels: int, stride: int) -> bool:
    return spec.controller == "residual_large" and (stride != 1 or in_channels != channels)


class _Controller(nn.Module):
    spec: SupernetSpec
    lowering: convolution.Lowering
    axis_name: str | None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        spec = self.spec
        common = {"lowering": self.lowering, "axis_name": self.axis_name}
        channels = spec.controller_channels
        x = _average_pool(images, spec.controller_pool)
        if spec.controller == "patches":
            x = ConvBatchNorm("pointwise", channels, name="embedding", **common)(_patches(x))
            hidden = _hidden_channels(spec)
            x = ConvBatchNorm("pointwise", hidden, name="hidden", **common)(_joined(x))
        elif spec.controller == "residual_large":
            x = ConvBatchNorm("dense", channels, 7, 2, name="stem", **common)(x)
            x = _max_pool(x)
        else:
            x = ConvBatchNorm("dense", channels, 3, name="stem", **common)(x)
        for index, (channels, stride) in enumerate(segments(spec)):
            projects = _projects(spec, x.shape[-1], channels, stride)
            x = _Block(channels, stride, projects, name=f"segment_{index}", **common)(x)
        features = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        logits = nn.Dense(spec.num_cells * spec.mask_shape[1], name="logits")(features)
        return logits.reshape(-1, *spec.mask_shape)


def shapes(spec: SupernetSpec) -> Variables:
    """Shapes and types of {"params", "batch_stats"}, without their values."""
    module = _Controller(spec, lowering="native", axis_name=None)
    images = jax.ShapeDtypeStruct((1, spec.image_size, spec.image_size, 3), jnp.float32)
    return jax.eval_shape(lambda inputs: module.init(jax.random.key(0), inputs), images)


def init(key: jax.Array, spec: SupernetSpec, *, start: np.ndarray | None = None) -> Variables:
    """Fresh {"params", "batch_stats"}, float32.

    Args:
      start: [L, O], about how likely the fresh policy switches each path on, whatever the image;
        one half everywhere by default.
    """
    variables = layers.initialise(key, shapes(spec), linear_gain=_INITIAL_LOGIT_GAIN)
    if start is not None:
        sure = np.clip(start, 0.01, 0.99)  # A probability of 0 or 1 has no logit.
        bias = np.log(sure / (1.0 - sure)).ravel()
        variables["params"]["logits"]["bias"] = bias.astype(np.float32)
    return variables


def settle(variables: Variables, settled: policy.Settled) -> Variables:
    """The same controller, but for paths whose decision no longer depends on the image: their
    logits become constants."""
    linear = variables["params"]["logits"]
    on, off = settled.on.ravel(), settled.off.ravel()
    bias = np.where(on, _SETTLED_LOGIT, np.where(off, -_SETTLED_LOGIT, linear["bias"]))
    constant = {
        "kernel": np.where(on | off, 0.0, linear["kernel"]).astype(np.float32),
        "bias": bias.astype(np.float32),
    }
    return {**variables, "params": {**variables["params"], "logits": constant}}


def decide_at(variables: Variables, threshold: float) -> Variables:
    """The same controller, but for where it decides: a path is on where its logit reached
    `threshold`, which was 0. What is settled stays."""
    linear = variables["params"]["logits"]
    bias = linear["bias"] - np.where(_is_constant(linear), 0.0, threshold)
    moved = {**linear, "bias": np.asarray(bias, np.float32)}
    return {**variables, "params": {**variables["params"], "logits": moved}}


def _is_constant(linear: Variables) -> np.ndarray:
    """Logits [L * O] that depend on no image."""
    return (np.asarray(linear["kernel"]) == 0.0).all(axis=0)


def settled(spec: SupernetSpec, variables: Variables) -> policy.Settled:
    """What of a controller's decisions does not depend on the image."""
    linear = variables["params"]["logits"]
    constant = _is_constant(linear)
    on = np.asarray(policy.greedy(jnp.asarray(linear["bias"]))) > 0.5
    return policy.Settled(
        on=(constant & on).reshape(spec.mask_shape), off=(constant & ~on).reshape(spec.mask_shape)
    )


def apply_train(
    spec: SupernetSpec,
    variables: Variables,
    images: jax.Array,
    *,
    lowering: convolution.Lowering,
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Training mode, with batch statistics of the global batch.

    Returns:
      policy_logits [B, L, O] float32, and what running statistics move towards: the batch's.
    """
    chex.assert_shape(images, (None, spec.image_size, spec.image_size, 3))
    module = _Controller(spec, lowering=lowering, axis_name=axis_name)
    policy_logits, updated = module.apply(variables, images.astype(dtype), mutable=["batch_stats"])
    return policy_logits, dict(updated["batch_stats"])


def fold(variables: Variables) -> Folded:
    """Parameters with every batch norm folded in; see `layers.fold`."""
    return layers.fold(variables["params"], variables["batch_stats"])


def apply_eval(
    spec: SupernetSpec,
    folded: Folded,
    images: jax.Array,
    *,
    lowering: convolution.Lowering,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Evaluation mode: normalised images [B, H, W, 3] to policy_logits [B, L, O] float32."""
    chex.assert_shape(images, (None, spec.image_size, spec.image_size, 3))
    x = _average_pool(images.astype(dtype), spec.controller_pool)
    if spec.controller == "patches":
        x = layers.conv_bias(_patches(x), folded["embedding"], kind="pointwise", lowering=lowering)
        x = layers.conv_bias(_joined(x), folded["hidden"], kind="pointwise", lowering=lowering)
    elif spec.controller == "residual_large":
        x = layers.conv_bias(x, folded["stem"], kind="dense", stride=2, lowering=lowering)
        x = _max_pool(x)
    else:
        x = layers.conv_bias(x, folded["stem"], kind="dense", lowering=lowering)
    for index, (channels, stride) in enumerate(segments(spec)):
        x = _apply_block(folded[f"segment_{index}"], x, channels, stride, lowering)
    features = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    logits = features @ folded["logits"]["kernel"] + folded["logits"]["bias"]
    return logits.reshape(-1, *spec.mask_shape)


def _apply_block(
    folded: Folded, x: jax.Array, channels: int, stride: int, lowering: convolution.Lowering
) -> jax.Array:
    y = layers.conv_bias(x, folded["first"], kind="dense", stride=stride, lowering=lowering)
    y = layers.conv_bias(y, folded["second"], kind="dense", activation="relu6", lowering=lowering)
    if "shortcut" in folded:
        x = layers.conv_bias(
            x,
            folded["shortcut"],
            kind="pointwise",
            stride=stride,
            activation="none",
            lowering=lowering,
        )
    else:
        x = _pooled_shortcut(x, channels, stride)
    return jnp.maximum(x + y, 0.0)
