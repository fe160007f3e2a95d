"""ONNX models, made node by node, and run; needs the package `onnx`."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from instanas_jax.plain_layers import Conv, Path

FLOAT = TensorProto.FLOAT
_OPSET, _IR_VERSION = 17, 8  # Of ONNX 1.12, of 2022.

Build = Callable[["Graph"], str]  # Adds nodes to a graph and names the result.


class Graph:
    """A graph to be, or a branch of one. Values are known by name, unique in the whole model."""

    def __init__(self, numbers: "itertools.count[int] | None" = None):
        self._numbers = itertools.count() if numbers is None else numbers
        self._nodes: list[Any] = []
        self._constants: list[TensorProto] = []

    def constant(self, array: np.ndarray | float, dtype: Any = np.float32) -> str:
        """A constant that lies in this graph."""
        name = f"constant_{next(self._numbers)}"
        self._constants.append(numpy_helper.from_array(np.array(array, dtype, order="C"), name))
        return name

    def add(self, kind: str, *inputs: str, result: str = "", **attributes: Any) -> str:
        """One node; its result is named so, or by a number."""
        name = result or f"value_{next(self._numbers)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def conv(self, x: str, layer: Conv) -> str:
        """A convolution [B, C_in, H, W] and its activation."""
        size = layer.kernel.shape[-1]
        y = self.add(
            "Conv",
            x,
            self.constant(layer.kernel),
            self.constant(layer.bias),
            kernel_shape=[size, size],
            strides=[layer.stride] * 2,
            pads=[size // 2] * 4,
            group=layer.groups,
        )
        if layer.activation == "none":
            return y
        if layer.activation == "relu":
            return self.add("Relu", y)
        return self.add("Clip", y, self.constant(0.0), self.constant(6.0))

    def path(self, x: str, path: Path) -> str:
        """One op of a cell."""
        y = x
        for layer in path.convs:
            y = self.conv(y, layer)
        return self.add("Add", x, y) if path.adds_input else y

    def linear(self, x: str, kernel: np.ndarray, bias: np.ndarray, *, result: str = "") -> str:
        """[B, C_in] by a kernel [C_in, C_out], and a bias [C_out]."""
        return self.add("Gemm", x, self.constant(kernel), self.constant(bias), result=result)

    def mean_over_positions(self, x: str) -> str:
        """[B, C, H, W] to [B, C]."""
        return self.add("Flatten", self.add("GlobalAveragePool", x))

    def choose(self, condition: str, then: Build, otherwise: Build) -> str:
        """What one of two builders gives, float32; only that branch runs.

        What a builder adds lies in its branch, constants included: ONNX Runtime fuses a branch's
        nodes and lays its weights out as it does those of a graph of its own.
        """
        return self.add(
            "If",
            condition,
            then_branch=self._branch("then", then),
            else_branch=self._branch("otherwise", otherwise),
        )

    def _branch(self, name: str, build: Build) -> GraphProto:
        branch = Graph(self._numbers)
        result = build(branch)
        if not any(result in node.output for node in branch._nodes):
            result = branch.add("Identity", result)  # A result has to be the branch's own.
        return branch.finish(name, [], [helper.make_tensor_value_info(result, FLOAT, None)])

    def finish(
        self, name: str, inputs: list[ValueInfoProto], results: list[ValueInfoProto]
    ) -> GraphProto:
        return helper.make_graph(self._nodes, name, inputs, results, self._constants)


def model(graph: GraphProto, metadata: dict[str, str] | None = None) -> ModelProto:
    made = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
    )
    helper.set_model_props(made, metadata or {})
    return made


def value(name: str, dtype: Any, shape: list[int | str]) -> ValueInfoProto:
    """An input or a result of a graph."""
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape
    )


def session(content: bytes, *, threads: int) -> Any:
    """A model of ONNX Runtime on the CPU, all of its optimisations done; needs `onnxruntime`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
