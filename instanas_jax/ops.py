"""The five candidate ops: trained side by side in a cell, run one by one where they are chosen.

The MBConv ops of a cell read the same input, so their expansions lie next to each other on the
channel axis of one wide layer, and their depthwise kernels in one layer a kernel size: the same
arithmetic in a third of the kernels, and a third of the time to compile. An op is a range of
channels there. `Cell` trains, `apply_cell` evaluates under a mask, `apply_op` runs one path.

Source: InstaNAS (arXiv 1811.10201), section 4.1; MBConv is MobileNetV2's inverted bottleneck
(arXiv 1801.04381, section 3.3).
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from instanas_jax import channels, convolution, fusion, layers
from instanas_jax.channels import ALL_OPS, BASIC_OP, MBCONV_OPS
from instanas_jax.layers import ConvBatchNorm, Folded, conv_bias
from instanas_jax.search_space import CANDIDATE_OPS, CellSpec, Join, OpSpec


def _project_name(op: int) -> str:
    return f"project_{CANDIDATE_OPS[op].name}"


def start_as_identity(params: dict) -> None:
    """Sets, in place, a residual cell's parameters so that its MBConv paths add nothing yet."""
    for op in MBCONV_OPS:
        last = params[_project_name(op)]
        last["scale"] = np.zeros_like(last["scale"])


class Cell(nn.Module):
    """One cell in training mode.

    Attributes:
      cell: shapes.
      enabled: ops that may run at all, in order; the others are not computed.
      join: how active paths become one output, see `join_scale`.
      lowering, axis_name: see `layers.ConvBatchNorm`.
    """

    cell: CellSpec
    enabled: tuple[int, ...]
    join: Join
    lowering: convolution.Lowering
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, identity: jax.Array) -> jax.Array:
        """Input [B, S, S, C_in], mask [B, O], identity [B] to [B, S', S', C_out]."""
        outputs = self._mbconvs(x)
        if BASIC_OP in self.enabled:
            outputs[BASIC_OP] = self._basic_conv(x)
        # Selects rather than multiplies, so that a NaN in an unchosen path stays there.
        total = jnp.asarray(_pass_through(self.cell, x, mask, identity))
        for op, y in outputs.items():
            total = total + jnp.where(_per_image(mask[:, op]) > 0.5, y, 0.0)
        total = _joined(total, mask, self.join)
        return fusion.made_once(total) if self.lowering == "shifted" else total

    def _common(self) -> dict:
        return {"lowering": self.lowering, "axis_name": self.axis_name}

    def _mbconvs(self, x: jax.Array) -> dict[int, jax.Array]:
        """The enabled MBConv ops' outputs, without their residual."""
        cell, enabled = self.cell, tuple(op for op in MBCONV_OPS if op in self.enabled)
        if not enabled:
            return {}
        groups = channels.groups(enabled)
        expanded = ConvBatchNorm(
            "pointwise",
            channels.width(cell, MBCONV_OPS),
            kept=channels.kept(cell, MBCONV_OPS, enabled),
            parts=tuple(channels.width(cell, running) for _, running, _ in groups),
            name="expand",
            **self._common(),
        )(x)
        outputs = {}
        for (kernel, running, group), part in zip(groups, expanded, strict=True):
            y = ConvBatchNorm(
                "depthwise",
                channels.width(cell, group),
                kernel,
                cell.stride,
                kept=channels.kept(cell, group, running),
                name=f"depthwise_k{kernel}",
                **self._common(),
            )(part)
            pieces = layers.split(y, tuple(channels.hidden(cell, op) for op in running))
            for op, piece in zip(running, pieces, strict=True):
                outputs[op] = ConvBatchNorm(
                    "pointwise",
                    cell.out_channels,
                    activation="none",
                    name=_project_name(op),
                    **self._common(),
                )(piece)
        return outputs

    def _basic_conv(self, x: jax.Array) -> jax.Array:
        """Two 3x3 convolutions, the first with the cell's stride; ReLU, then ReLU6."""
        cell, common = self.cell, self._common()
        y = ConvBatchNorm("dense", cell.out_channels, 3, cell.stride, name="basic_first", **common)(
            x
        )
        return ConvBatchNorm(
            "dense", cell.out_channels, 3, activation="relu6", name="basic_second", **common
        )(y)


def _per_image(values: jax.Array) -> jax.Array:
    return values[:, None, None, None]


def join_scale(mask: jax.Array, join: Join) -> jax.Array:
    """What the sum of a cell's paths is multiplied by: 1, or 1 / (active paths) for the mean.

    Args:
      mask: [..., O], the empty-cell rule applied; a cell that is passed through has no path on.

    Returns:
      [...].
    """
    active = jnp.sum(mask, axis=-1)
    return jnp.ones_like(active) if join == "sum" else 1.0 / jnp.maximum(active, 1.0)


def _joined(total: jax.Array, mask: jax.Array, join: Join) -> jax.Array:
    if join == "sum":
        return total
    return total * _per_image(join_scale(mask, join)).astype(total.dtype)


def _pass_through(
    cell: CellSpec, x: jax.Array, mask: jax.Array, identity: jax.Array
) -> jax.Array | float:
    """What the cell's output holds of its input: once for each active MBConv op with a residual,
    or once where the cell is empty."""
    if cell.has_residual:
        copies = identity + jnp.sum(mask[:, list(MBCONV_OPS)], axis=-1)
    elif not cell.forces_op:
        copies = identity
    else:
        return 0.0
    return x * _per_image(copies).astype(x.dtype)


def apply_cell(
    cell: CellSpec,
    folded: Folded,
    x: jax.Array,
    mask: jax.Array,
    identity: jax.Array,
    *,
    join: Join,
    lowering: convolution.Lowering,
    enabled: tuple[int, ...] = ALL_OPS,
) -> jax.Array:
    """One cell in evaluation mode, every enabled path computed.

    Each path is projected by itself and selected. One product over all hidden channels, zeroed
    where a path is off, would be slower and let a NaN in an unchosen projection out (0 x NaN).

    Args:
      folded: what `layers.fold` made of this cell's parameters.
      x: [B, S, S, C_in].
      mask: [R * B, O], the empty-cell rule applied: one for each image, then a second for each and
        so on. Paths run once, however many masks select among them.
      identity: [R * B], 1 where the cell is passed through.
      enabled: ops that masks may hold, in order.

    Returns:
      [R * B, S', S', C_out].
    """
    repeats = mask.shape[0] // x.shape[0]
    total = jnp.asarray(_pass_through(cell, _repeat(x, repeats), mask, identity))
    for op, y in _apply_mbconvs(cell, folded, x, enabled, lowering=lowering):
        total = total + _selected(y, mask[:, op], repeats)
    if BASIC_OP in enabled:
        weights = op_weights(cell, folded, BASIC_OP)
        basic = apply_op(cell, CANDIDATE_OPS[BASIC_OP], weights, x, lowering=lowering)
        total = total + _selected(basic, mask[:, BASIC_OP], repeats)
    return _joined(total, mask, join)


def _apply_mbconvs(
    cell: CellSpec,
    folded: Folded,
    x: jax.Array,
    enabled: tuple[int, ...],
    *,
    lowering: convolution.Lowering,
) -> Iterator[tuple[int, jax.Array]]:
    """The enabled MBConv ops and their outputs, without their residual."""
    mbconvs = tuple(op for op in MBCONV_OPS if op in enabled)
    if not mbconvs:
        return
    expand = _cut(folded["expand"], channels.kept(cell, MBCONV_OPS, mbconvs))
    hidden = conv_bias(x, expand, kind="pointwise", lowering=lowering)
    ranges = channels.ranges(cell, mbconvs)
    for kernel, running, group in channels.groups(mbconvs):
        first, last = ranges[running[0]][0], ranges[running[-1]][1]
        block = conv_bias(
            hidden[..., first:last],
            _cut(folded[f"depthwise_k{kernel}"], channels.kept(cell, group, running)),
            kind="depthwise",
            stride=cell.stride,
            lowering=lowering,
        )
        for op in running:
            start, stop = ranges[op]
            yield (
                op,
                conv_bias(
                    block[..., start - first : stop - first],
                    folded[_project_name(op)],
                    kind="pointwise",
                    activation="none",
                    lowering=lowering,
                ),
            )


def _repeat(x: jax.Array, repeats: int) -> jax.Array:
    """All images, then all again: [R * B, ...]."""
    return jnp.concatenate([x] * repeats) if repeats > 1 else x


def _selected(y: jax.Array, is_on: jax.Array, repeats: int) -> jax.Array:
    return jnp.where(_per_image(is_on) > 0.5, _repeat(y, repeats), 0.0)


def op_weights(cell: CellSpec, folded: Folded, op: int) -> Folded:
    """One path's own folded weights, cut out of its cell's: what `apply_op` runs."""
    if op == BASIC_OP:
        return {"first": folded["basic_first"], "second": folded["basic_second"]}
    ((kernel, _, group),) = channels.groups((op,))
    return {
        "expand": _cut(folded["expand"], channels.kept(cell, MBCONV_OPS, (op,))),
        "depthwise": _cut(folded[f"depthwise_k{kernel}"], channels.kept(cell, group, (op,))),
        "project": folded[_project_name(op)],
    }


def _cut(folded: Folded, kept: layers.Kept) -> Folded:
    return {name: layers.keep(array, kept) for name, array in folded.items()}


def apply_op(
    cell: CellSpec, op: OpSpec, weights: Folded, x: jax.Array, *, lowering: convolution.Lowering
) -> jax.Array:
    """One path in evaluation mode, its residual included.

    Args:
      weights: `op_weights` of this path, which `packing` may have left uncut.
      x: [B, S, S, C_in].

    Returns:
      [B, S', S', C_out].
    """
    if op.is_basic:

        def first() -> jax.Array:
            return conv_bias(
                x, weights["first"], kind="dense", stride=cell.stride, lowering=lowering
            )

        # Or both would read one zero, a constant that a branch keeps.
        y = first() if lowering == "native" else fusion.in_call(first)
        return conv_bias(y, weights["second"], kind="dense", activation="relu6", lowering=lowering)
    y = layers.expand_depthwise(
        x, weights["expand"], weights["depthwise"], stride=cell.stride, lowering=lowering
    )
    y = conv_bias(y, weights["project"], kind="pointwise", activation="none", lowering=lowering)
    return x + y if cell.has_residual else y
