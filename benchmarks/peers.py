"""The same subnet in what a user would pick instead: PyTorch eager and ONNX Runtime.

Each peer runs one static architecture from the same folded weights, so that answers can be
compared as well as times. Peers live in `requirements-peers.txt`; where one is not installed,
`Missing` says so.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from instanas_jax import plain_layers, skipping, supernet
from instanas_jax.plain_layers import Conv, Path
from instanas_jax.policy import Settled
from instanas_jax.search_space import SupernetSpec

Run = Callable[[np.ndarray], np.ndarray]  # Normalised [B, 3, H, W] float32 to class logits [B, K].


class Missing(Exception):
    """A peer's package is not installed."""


def require(package: str) -> None:
    """Missing, with its remedy, unless the package can be imported."""
    if not importlib.util.find_spec(package):
        raise Missing(f"{package} is not installed: pip install -r requirements-peers.txt")


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
        active = tuple(plain_layers.path(cell, op, paths[op]) for op in paths)
        cells.append((active, 1.0 / max(len(active), 1) if spec.join == "mean" else 1.0))
    classifier = weights["classifier"]
    return Subnet(
        stem=plain_layers.conv(weights["stem"], stride=spec.stem_stride),
        cells=tuple(cells),
        head=plain_layers.conv(weights["head"]),
        classifier=(classifier["kernel"], classifier["bias"]),
    )


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
    from instanas_jax import onnx_graph  # Which needs a package that may be missing.

    graph = onnx_graph.Graph()
    x = graph.conv("images", net.stem)
    for paths, scale in net.cells:
        outputs = [graph.path(x, path) for path in paths]
        if outputs:
            x = functools.reduce(lambda left, right: graph.add("Add", left, right), outputs)
            x = x if scale == 1.0 else graph.add("Mul", x, graph.constant(scale))
    features = graph.mean_over_positions(graph.conv(x, net.head))
    kernel, bias = net.classifier
    graph.linear(features, kernel, bias, result="class_logits")
    images = onnx_graph.value("images", np.float32, ["batch", 3, image_size, image_size])
    class_logits = onnx_graph.value("class_logits", np.float32, ["batch", len(bias)])
    return onnx_graph.model(graph.finish("subnet", [images], [class_logits])).SerializeToString()


def onnx_runtime(net: Subnet, *, image_size: int, threads: int) -> Run:
    """ONNX Runtime on CPUs with all of its graph optimisations."""
    for package in ("onnx", "onnxruntime"):
        require(package)
    from instanas_jax import onnx_graph

    session = onnx_graph.session(onnx_model(net, image_size=image_size), threads=threads)

    def run(images: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(["class_logits"], {"images": images})[0])

    return run
