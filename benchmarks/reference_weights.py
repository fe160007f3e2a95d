"""The original implementation's weights: drawn from its manifest, laid out for our networks.

The reference files store no weights. Each tensor is drawn from a generator seeded by its name,
in PyTorch's layouts, and put where our networks keep it. `supernet_layers` and
`controller_layers` say where that is; the same list cuts a tree of ours back into the original's
tensors, so that gradients and running statistics can be compared one by one.
"""

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from instanas_jax.errors import InputError
from instanas_jax.layers import ConvKind
from instanas_jax.search_space import CANDIDATE_OPS, NUM_OPS, OpSpec, SupernetSpec
from instanas_jax.supernet import cell_name

Shape = tuple[int, ...]
Variables = dict[str, Any]

# Ours, the original's, and the collection of ours that holds it.
_BATCH_NORM_TENSORS = (
    ("scale", "weight", "params"),
    ("bias", "bias", "params"),
    ("mean", "running_mean", "batch_stats"),
    ("var", "running_var", "batch_stats"),
)


@dataclasses.dataclass(frozen=True)
class ReferenceLayer:
    """One convolution with its batch norm: the original's names, and our place for it.

    Layers of one `path` lie side by side there, in their order, on the channel axis.
    """

    path: tuple[str, ...]
    convolution: str
    batch_norm: str
    kind: ConvKind
    in_channels: int
    out_channels: int
    kernel: int = 1

    @property
    def shape(self) -> Shape:
        """Of the original's kernel: [out, in / groups, k, k]."""
        in_per_group = 1 if self.kind == "depthwise" else self.in_channels
        return (self.out_channels, in_per_group, self.kernel, self.kernel)

    def to_our_layout(self, kernel: np.ndarray) -> np.ndarray:
        """[out, in / groups, k, k] to the layout of `layers.ConvBatchNorm`; out is last."""
        if self.kind == "pointwise":
            return kernel[:, :, 0, 0].T
        if self.kind == "depthwise":
            return kernel[:, 0].transpose(1, 2, 0)
        return kernel.transpose(2, 3, 1, 0)


@dataclasses.dataclass(frozen=True)
class ReferenceLinear:
    """The linear layer at a network's end: our name, the original's, and its shape there."""

    path: tuple[str, ...]
    name: str
    shape: Shape  # [out, in]


@dataclasses.dataclass(frozen=True)
class ReferenceNetwork:
    layers: tuple[ReferenceLayer, ...]
    linear: ReferenceLinear


def supernet_layers(spec: SupernetSpec, shapes: Mapping[str, Shape]) -> ReferenceNetwork:
    """Where the original supernet's tensors belong in ours.

    Args:
      spec: of our supernet.
      shapes: of the manifest's tensors; only tells how the original called its linear layer.
    """
    layers = [
        ReferenceLayer(("stem",), "conv1", "bn1", "dense", 3, spec.stem_channels, 3),
        *_cells(spec),
        ReferenceLayer(
            ("head",),
            "conv2",
            "bn2",
            "pointwise",
            spec.cells[-1].out_channels,
            spec.head_channels,
        ),
    ]
    name = "linear.1" if "linear.1.weight" in shapes else "linear"
    linear = ReferenceLinear(("classifier",), name, (spec.num_classes, spec.head_channels))
    return ReferenceNetwork(tuple(layers), linear)


def _cells(spec: SupernetSpec) -> Iterator[ReferenceLayer]:
    for index, cell in enumerate(spec.cells):
        for position, op in enumerate(CANDIDATE_OPS):
            yield from _op(
                op,
                cell_name(index),
                f"layers.{index}.{position}",
                cell.in_channels,
                cell.out_channels,
            )


def _op(
    op: OpSpec, cell: str, reference: str, in_channels: int, out_channels: int
) -> Iterator[ReferenceLayer]:
    steps: list[tuple[str, ConvKind, int, int, int]]
    if op.is_basic:
        steps = [
            ("basic_first", "dense", in_channels, out_channels, op.kernel),
            ("basic_second", "dense", out_channels, out_channels, op.kernel),
        ]
    else:
        hidden = in_channels * op.expansion
        steps = [
            ("expand", "pointwise", in_channels, hidden, 1),
            (f"depthwise_k{op.kernel}", "depthwise", hidden, hidden, op.kernel),
            (f"project_{op.name}", "pointwise", hidden, out_channels, 1),
        ]
    for number, (name, kind, step_in, step_out, kernel) in enumerate(steps, start=1):
        yield ReferenceLayer(
            (cell, name),
            f"{reference}.conv{number}",
            f"{reference}.bn{number}",
            kind,
            step_in,
            step_out,
            kernel,
        )


def controller_layers(spec: SupernetSpec) -> ReferenceNetwork:
    """Where the original controller's tensors belong in ours."""
    large = spec.controller == "residual_large"
    channels = spec.controller_channels
    layers = [
        ReferenceLayer(
            ("stem",), "features.conv1", "features.bn1", "dense", 3, channels, 7 if large else 3
        )
    ]
    for segment in range(4 if large else 3):
        width = spec.controller_channels * 2**segment
        block = f"features.blocks.{segment}.0"
        path = f"segment_{segment}"
        for number, name, step_in in ((1, "first", channels), (2, "second", width)):
            conv, norm = f"{block}.conv{number}", f"{block}.bn{number}"
            layers.append(ReferenceLayer((path, name), conv, norm, "dense", step_in, width, 3))
        if large and segment > 0:
            conv, norm = f"features.ds.{segment}.0", f"features.ds.{segment}.1"
            layers.append(
                ReferenceLayer((path, "shortcut"), conv, norm, "pointwise", channels, width)
            )
        channels = width
    linear = ReferenceLinear(("logits",), "logit", (spec.num_cells * NUM_OPS, channels))
    return ReferenceNetwork(tuple(layers), linear)


def draw(name: str, shape: Shape, *, prefix: str) -> np.ndarray:
    """The value of one tensor, float32, from a generator seeded by its name alone."""
    generator = np.random.default_rng(zlib.crc32((prefix + name).encode()))
    if name.endswith(".running_var"):
        values = generator.uniform(0.5, 1.5, shape)
    elif name.endswith(".running_mean") or name.endswith(".bias"):
        values = 0.1 * generator.standard_normal(shape)
    elif len(shape) == 4:
        values = generator.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif len(shape) == 2:
        values = generator.standard_normal(shape) * np.sqrt(1 / shape[1])
    elif len(shape) == 1 and name.endswith(".weight"):
        values = generator.uniform(0.1, 0.6, shape)
    else:
        raise InputError(f"tensor '{name}' of shape {list(shape)}: no rule says how to draw it")
    return values.astype(np.float32)


def convert(network: ReferenceNetwork, shapes: Mapping[str, Shape], *, prefix: str) -> Variables:
    """The original's weights as our {"params", "batch_stats"}, float32.

    Shortcuts inside the ops and batch counters are left out: they take no part in the
    computation.

    Args:
      network: `supernet_layers` or `controller_layers`.
      shapes: of the manifest's tensors, by name.
      prefix: what stands before a name in its seed.

    Raises:
      InputError: the manifest lacks a tensor, has one of another shape or one too many.
    """
    _check(network, shapes)
    pieces: dict[tuple[str, ...], list[np.ndarray]] = {}

    def place(collection: str, path: tuple[str, ...], leaf: str, values: np.ndarray) -> None:
        pieces.setdefault((collection, *path, leaf), []).append(values)

    for layer in network.layers:
        kernel = draw(f"{layer.convolution}.weight", layer.shape, prefix=prefix)
        place("params", layer.path, "kernel", layer.to_our_layout(kernel))
        for ours, theirs, collection in _BATCH_NORM_TENSORS:
            values = draw(f"{layer.batch_norm}.{theirs}", (layer.out_channels,), prefix=prefix)
            place(collection, layer.path, ours, values)
    linear = network.linear
    kernel = draw(f"{linear.name}.weight", linear.shape, prefix=prefix)
    place("params", linear.path, "kernel", kernel.T)
    bias = draw(f"{linear.name}.bias", linear.shape[:1], prefix=prefix)
    place("params", linear.path, "bias", bias)
    return _nest(pieces)


def _nest(pieces: Mapping[tuple[str, ...], Sequence[np.ndarray]]) -> Variables:
    """Nested dicts of the arrays that lie side by side at each path."""
    tree: Variables = {}
    for path, arrays in pieces.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = np.ascontiguousarray(np.concatenate(arrays, axis=-1))
    return tree


def split_params(network: ReferenceNetwork, params: Variables) -> dict[str, np.ndarray]:
    """Cuts a tree like our params into the original's tensors: by its names, in our layouts."""
    tensors = _cut(network, params, (("kernel", "weight"),), of_convolution=True)
    tensors |= _cut(network, params, (("scale", "weight"), ("bias", "bias")))
    linear = network.linear
    node = _node_at(params, linear.path)
    tensors[f"{linear.name}.weight"] = np.asarray(node["kernel"])
    tensors[f"{linear.name}.bias"] = np.asarray(node["bias"])
    return tensors


def split_running_means(network: ReferenceNetwork, batch_stats: Variables) -> dict[str, np.ndarray]:
    """Cuts our running means into the original's, by its names."""
    return _cut(network, batch_stats, (("mean", "running_mean"),))


def _cut(
    network: ReferenceNetwork,
    tree: Variables,
    leaves: Sequence[tuple[str, str]],
    *,
    of_convolution: bool = False,
) -> dict[str, np.ndarray]:
    offsets: dict[tuple[str, ...], int] = {}
    tensors = {}
    for layer in network.layers:
        start = offsets.get(layer.path, 0)
        stop = offsets[layer.path] = start + layer.out_channels
        owner = layer.convolution if of_convolution else layer.batch_norm
        for ours, theirs in leaves:
            values = np.asarray(_node_at(tree, layer.path)[ours])
            tensors[f"{owner}.{theirs}"] = values[..., start:stop]
    return tensors


def _node_at(tree: Variables, path: tuple[str, ...]) -> Variables:
    for name in path:
        tree = tree[name]
    return tree


def is_unused(name: str) -> bool:
    """Whether a tensor of the original's takes no part in its computation."""
    return ".shortcut." in name or name.endswith(".num_batches_tracked")


def _check(network: ReferenceNetwork, shapes: Mapping[str, Shape]) -> None:
    expected = dict(_expected_shapes(network))
    for name, shape in expected.items():
        if name not in shapes:
            raise InputError(f"the manifest lacks tensor '{name}' of shape {list(shape)}")
        if shapes[name] != shape:
            raise InputError(
                f"tensor '{name}' of shape {list(shapes[name])}: our network needs {list(shape)}"
            )
    for name in shapes:
        if name not in expected and not is_unused(name):
            raise InputError(f"our network has no place for the manifest's tensor '{name}'")


def _expected_shapes(network: ReferenceNetwork) -> Iterator[tuple[str, Shape]]:
    for layer in network.layers:
        yield f"{layer.convolution}.weight", layer.shape
        for _, theirs, _ in _BATCH_NORM_TENSORS:
            yield f"{layer.batch_norm}.{theirs}", (layer.out_channels,)
    yield f"{network.linear.name}.weight", network.linear.shape
    yield f"{network.linear.name}.bias", network.linear.shape[:1]
