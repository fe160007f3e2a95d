"""The weight-sharing supernet under a path mask: pure functions over a Flax module.

  variables = init(key, spec)
  class_logits, moments = apply_train(spec, variables, images, mask, ...)
  class_logits = apply_eval(spec, fold(variables), images, mask, ...)

Source: InstaNAS (arXiv 1811.10201), sections 3.2 and 4.1.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from instanas_jax import channels, convolution, layers, ops, policy
from instanas_jax.layers import ConvBatchNorm, Folded
from instanas_jax.search_space import SupernetSpec

Variables = dict[str, Any]


def cell_name(index: int) -> str:
    """Name of a cell's parameters."""
    return f"cell_{index:02d}"


class _Supernet(nn.Module):
    spec: SupernetSpec
    enabled: tuple[tuple[int, ...], ...]  # For each cell, the ops that may run at all.
    lowering: convolution.Lowering
    axis_name: str | None
    remat: bool = False

    @nn.compact
    def __call__(
        self, images: jax.Array, mask: jax.Array, dropout_keys: jax.Array | None
    ) -> jax.Array:
        spec = self.spec
        common = {"lowering": self.lowering, "axis_name": self.axis_name}
        resolved, identity = policy.resolve_empty_cells(mask, spec.forced_cells)
        x = ConvBatchNorm("dense", spec.stem_channels, 3, spec.stem_stride, name="stem", **common)(
            images
        )
        cell_type = nn.remat(ops.Cell) if self.remat else ops.Cell
        for index, cell in enumerate(spec.cells):
            module = cell_type(
                cell, self.enabled[index], spec.join, name=cell_name(index), **common
            )
            x = module(x, resolved[:, index], identity[:, index])
        x = ConvBatchNorm("pointwise", spec.head_channels, name="head", **common)(x)
        features = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        if spec.head_dropout > 0.0 and dropout_keys is not None:
            features = layers.dropout(dropout_keys, features, rate=spec.head_dropout)
        return nn.Dense(spec.num_classes, name="classifier")(features)


def _all_enabled(spec: SupernetSpec) -> tuple[tuple[int, ...], ...]:
    return (channels.ALL_OPS,) * spec.num_cells


def _enabled_by(spec: SupernetSpec, paths: np.ndarray | None) -> tuple[tuple[int, ...], ...]:
    if paths is None:
        return _all_enabled(spec)
    return tuple(tuple(np.flatnonzero(row).tolist()) for row in paths)


def shapes(spec: SupernetSpec) -> Variables:
    """Shapes and types of {"params", "batch_stats"}, without their values."""
    module = _Supernet(spec, _all_enabled(spec), lowering="native", axis_name=None)
    images = jax.ShapeDtypeStruct((1, spec.image_size, spec.image_size, 3), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, *spec.mask_shape), jnp.float32)
    return jax.eval_shape(
        lambda *inputs: module.init(jax.random.key(0), *inputs, None), images, mask
    )


def init(key: jax.Array, spec: SupernetSpec) -> Variables:
    """Fresh {"params", "batch_stats"} of all paths, float32.

    Residual paths start as the identity (arXiv 1706.02677, section 5.1): the scale of their last
    batch norm is zero. Differs from the authors' program, whose 200 epochs make up for a slow
    start: after 480 updates on CIFAR-100, MobileNetV2's path at width 0.25 has 16 % instead of 12.
    """
    variables = layers.initialise(key, shapes(spec))
    for index, cell in enumerate(spec.cells):
        if cell.has_residual:
            ops.start_as_identity(variables["params"][cell_name(index)])
    return variables


def apply_train(
    spec: SupernetSpec,
    variables: Variables,
    images: jax.Array,
    mask: jax.Array,
    *,
    dropout_keys: jax.Array | None = None,
    lowering: convolution.Lowering,
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    paths: np.ndarray | None = None,
    remat: bool = False,
) -> tuple[jax.Array, dict[str, Any]]:
    """Training mode: every path runs on the whole batch, and so do its batch statistics.

    Args:
      variables: {"params", "batch_stats"}.
      images: normalised [B, H, W, 3].
      mask: [B, L, O].
      dropout_keys: [B] typed keys, of dropout before the classifier where the spec has it; by
        default none is done.
      dtype: of activations; parameters, statistics and logits are float32.
      axis_name: the device axis that shares the global batch, if any.
      paths: bool [L, O], those that masks may hold, the empty-cell rule applied; all by default.
        The others are not computed.
      remat: keep the cells' inputs alone and compute the rest again for the gradient.

    Returns:
      class_logits [B, K] float32, and what the running statistics move towards (`layers.move`):
      the batch's, or, where something did not run, themselves.
    """
    chex.assert_shape(images, (None, spec.image_size, spec.image_size, 3))
    chex.assert_shape(mask, (images.shape[0], *spec.mask_shape))
    enabled = _enabled_by(spec, paths)
    module = _Supernet(spec, enabled, lowering=lowering, axis_name=axis_name, remat=remat)
    class_logits, updated = module.apply(
        variables, images.astype(dtype), mask, dropout_keys, mutable=["batch_stats"]
    )
    return class_logits, _merge(variables["batch_stats"], dict(updated["batch_stats"]))


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the leaves that `new` has replaced."""
    return {
        name: (_merge(child, new[name]) if isinstance(child, dict) else new[name])
        if name in new
        else child
        for name, child in old.items()
    }


def fold(variables: Variables) -> Folded:
    """Parameters with every batch norm folded in; see `layers.fold`."""
    return layers.fold(variables["params"], variables["batch_stats"])


def apply_stem(
    spec: SupernetSpec, folded: Folded, images: jax.Array, *, lowering: convolution.Lowering
) -> jax.Array:
    """Stem in evaluation mode: images [B, H, W, 3] to [B, S, S, stem_channels]."""
    return layers.conv_bias(
        images, folded["stem"], kind="dense", stride=spec.stem_stride, lowering=lowering
    )


def apply_head(folded: Folded, x: jax.Array, *, lowering: convolution.Lowering) -> jax.Array:
    """Head in evaluation mode: [B, S, S, C] to class_logits [B, K] float32."""
    x = layers.conv_bias(x, folded["head"], kind="pointwise", lowering=lowering)
    features = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    return features @ folded["classifier"]["kernel"] + folded["classifier"]["bias"]


def apply_eval(
    spec: SupernetSpec,
    folded: Folded,
    images: jax.Array,
    mask: jax.Array,
    *,
    lowering: convolution.Lowering,
    dtype: Any = jnp.float32,
    paths: np.ndarray | None = None,
) -> jax.Array:
    """Evaluation mode: running statistics, every path of `paths` computed, the mask selects.

    Each image's answer is independent of the others' pixels and masks. An image may be asked under
    R masks: what comes before the first selection, the stem and the first cell's paths, then runs
    once for all of them.

    Args:
      folded: `fold(variables)`.
      images: normalised [B, H, W, 3].
      mask: [R * B, L, O]: one for each image, then a second for each and so on.
      paths: see `apply_train`.

    Returns:
      class_logits [R * B, K] float32, in the order of the masks.
    """
    chex.assert_shape(images, (None, spec.image_size, spec.image_size, 3))
    chex.assert_shape(mask, (None, *spec.mask_shape))
    if mask.shape[0] % images.shape[0]:
        raise ValueError(f"{mask.shape[0]} masks for {images.shape[0]} images")
    resolved, identity = policy.resolve_empty_cells(mask, spec.forced_cells)
    enabled = _enabled_by(spec, paths)
    x = apply_stem(spec, folded, images.astype(dtype), lowering=lowering)
    for index, cell in enumerate(spec.cells):
        x = ops.apply_cell(
            cell,
            folded[cell_name(index)],
            x,
            resolved[:, index],
            identity[:, index],
            join=spec.join,
            lowering=lowering,
            enabled=enabled[index],
        )
    return apply_head(folded, x, lowering=lowering)
