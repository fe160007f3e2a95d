"""The same subnet in what a user would pick instead: PyTorch eager and ONNX Runtime.

Each peer runs one static architecture from the same folded weights, so that answers can be
compared as well as times. Peers live in `requirements-peers.txt`; where one is not installed,
`Missing` says so.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from instanas_jax import channels, skipping, supernet
from instanas_jax.policy import Settled
from instanas_jax.search_space import CANDIDATE_OPS, CellSpec, SupernetSpec

Run = Callable[[np.ndarray], np.ndarray]  # Normalised [B, 3, H, W] float32 to class logits [B, K].


class Missing(Exception):
    """A peer's package is not installed."""


def require(package: str) -> None:
    """Missing, with its remedy, unless the package can be imported."""
    if not importlib.util.find_spec(package):
        raise Missing(f"{package} is not installed: pip install -r requirements-peers.txt")


@dataclasses.dataclass(frozen=True)
class Conv:
    """One convolution of a subnet, batch norm folded in."""

    kernel: np.ndarray  # [C_out, C_in / groups, k, k]
    bias: np.ndarray  # [C_out]
    stride: int
    groups: int
    activation: str


@dataclasses.dataclass(frozen=True)
class Path:
    convs: tuple[Conv, ...]
    adds_input: bool


@dataclasses.dataclass(frozen=True)
class Subnet:
    """A static architecture, layer by layer. A cell without paths passes the image through.

    Attributes:
      cells: for each cell, its active paths and what their sum is multiplied by.
      classifier: kernel [C, K] and bias [K], after the mean over positions.
    """

    stem: Conv
    cells: tuple[tuple[tuple[Path, ...], float], ...]
    head: Conv
    classifier: tuple[np.ndarray, np.ndarray]


def subnet(spec: SupernetSpec, variables: dict[str, Any], architecture: np.ndarray) -> Subnet:
    """The layers that one architecture [L, O] of a supernet runs."""
    settled = Settled.architecture(architecture)
    weights = jax.tree.map(
        np.asarray, skipping.prepare_weights(spec, jax.jit(supernet.fold)(variables), settled)
    )
    cells = []
    for cell, paths in zip(spec.cells, weights["paths"], strict=True):
        active = tuple(_path(cell, op, paths[op]) for op in paths)
        cells.append((active, 1.0 / max(len(active), 1) if spec.join == "mean" else 1.0))
    classifier = weights["classifier"]
    return Subnet(
        stem=_conv(weights["stem"], stride=spec.stem_stride),
        cells=tuple(cells),
        head=_conv(weights["head"]),
        classifier=(classifier["kernel"], classifier["bias"]),
    )


def _path(cell: CellSpec, op: int, weights: dict[str, Any]) -> Path:
    if op == channels.BASIC_OP:
        first = _conv(weights["first"], stride=cell.stride)
        return Path((first, _conv(weights["second"], activation="relu6")), adds_input=False)
    hidden = cell.in_channels * CANDIDATE_OPS[op].expansion
    return Path(
        (
            _conv(weights["expand"]),
            _conv(weights["depthwise"], stride=cell.stride, groups=hidden),
            _conv(weights["project"], activation="none"),
        ),
        adds_input=cell.has_residual,
    )


def _conv(
    folded: dict[str, Any], *, stride: int = 1, groups: int = 1, activation: str = "relu"
) -> Conv:
    kernel = folded["kernel"]
    if kernel.ndim == 2:  # Pointwise [C_in, C_out].
        kernel = kernel[None, None]
    elif kernel.ndim == 3:  # Depthwise [k, k, C].
        kernel = kernel[:, :, None]
    kernel = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
    return Conv(kernel, folded["bias"], stride, groups, activation)


def torch_eager(net: Subnet, *, folded: bool, threads: int) -> Run:
    """PyTorch eager, channels-last. Threads are a setting of the process: the last call's.

    Args:
      folded: batch norms are folded into the convolutions, which a user has to do; otherwise they
        are layers of their own, as in the evaluation mode of the network that was trained.
    """
    require("torch")
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn import functional  # pyright: ignore[reportMissingImports]

    def module(conv: Conv) -> tuple[Any, ...]:
        kernel = torch.from_numpy(conv.kernel).to(memory_format=torch.channels_last)
        bias = torch.from_numpy(conv.bias.copy())
        # What is left of a batch norm whose scale the kernel holds: mean, variance and scale.
        return conv, kernel, bias, torch.zeros_like(bias), torch.ones_like(bias)

    def apply(x: Any, layer: tuple[Any, ...]) -> Any:
        conv, kernel, bias, zeros, ones = layer
        place = conv.stride, conv.kernel.shape[-1] // 2
        if folded:
            y = functional.conv2d(x, kernel, bias, *place, groups=conv.groups)
        else:
            y = functional.conv2d(x, kernel, None, *place, groups=conv.groups)
            y = functional.batch_norm(y, zeros, ones, ones, bias, eps=0.0)
        if conv.activation == "none":
            return y
        return functional.relu_(y) if conv.activation == "relu" else functional.hardtanh_(y, 0, 6)

    stem, head = module(net.stem), module(net.head)
    cells = [
        ([([module(conv) for conv in path.convs], path.adds_input) for path in paths], scale)
        for paths, scale in net.cells
    ]
    kernel, bias = (torch.from_numpy(array.copy()) for array in net.classifier)

    def run(images: np.ndarray) -> np.ndarray:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            x = torch.from_numpy(images).to(memory_format=torch.channels_last)
            x = apply(x, stem)
            for paths, scale in cells:
                total: Any = None
                for layers, adds_input in paths:
                    y = x
                    for layer in layers:
                        y = apply(y, layer)
                    y = x + y if adds_input else y
                    total = y if total is None else total + y
                if total is not None:
                    x = total if scale == 1.0 else total * scale
            features = apply(x, head).mean(dim=(2, 3))
            return torch.addmm(bias, features, kernel).numpy()

    return run


def onnx_model(net: Subnet, *, image_size: int) -> bytes:
    """The subnet as a serialised ONNX graph from `images` [B, 3, H, W] to `class_logits`."""
    from onnx import TensorProto, helper, numpy_helper  # pyright: ignore[reportMissingImports]

    nodes: list[Any] = []
    initialisers: list[Any] = []

    def constant(array: np.ndarray | float) -> str:
        name = f"weight_{len(initialisers)}"
        initialisers.append(numpy_helper.from_array(np.asarray(array, np.float32, order="C"), name))
        return name

    def add(kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"value_{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def apply(x: str, conv: Conv) -> str:
        size = conv.kernel.shape[-1]
        y = add(
            "Conv",
            x,
            constant(conv.kernel),
            constant(conv.bias),
            kernel_shape=[size, size],
            strides=[conv.stride] * 2,
            pads=[size // 2] * 4,
            group=conv.groups,
        )
        if conv.activation == "none":
            return y
        if conv.activation == "relu":
            return add("Relu", y)
        return add("Clip", y, constant(0.0), constant(6.0))

    x = apply("images", net.stem)
    for paths, scale in net.cells:
        outputs = []
        for path in paths:
            y = x
            for conv in path.convs:
                y = apply(y, conv)
            outputs.append(add("Add", x, y) if path.adds_input else y)
        if outputs:
            x = outputs[0]
            for output in outputs[1:]:
                x = add("Add", x, output)
            x = x if scale == 1.0 else add("Mul", x, constant(scale))
    features = add("Flatten", add("GlobalAveragePool", apply(x, net.head)))
    kernel, bias = net.classifier
    nodes.append(
        helper.make_node(
            "Gemm", [features, constant(kernel), constant(bias)], ["class_logits"], alpha=1.0
        )
    )
    graph = helper.make_graph(
        nodes,
        "subnet",
        [
            helper.make_tensor_value_info(
                "images", TensorProto.FLOAT, ["batch", 3, image_size, image_size]
            )
        ],
        [helper.make_tensor_value_info("class_logits", TensorProto.FLOAT, ["batch", len(bias)])],
        initialisers,
    )
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
    return model.SerializeToString()


def onnx_runtime(net: Subnet, *, image_size: int, threads: int) -> Run:
    """ONNX Runtime on CPUs with all of its graph optimisations."""
    for package in ("onnx", "onnxruntime"):
        require(package)
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        onnx_model(net, image_size=image_size), options, providers=["CPUExecutionProvider"]
    )

    def run(images: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(["class_logits"], {"images": images})[0])

    return run
