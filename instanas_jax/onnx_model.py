"""A trained state as one ONNX model, of one image, in which only the chosen paths run.

Where a cell is undecided stands an `If`, and the weights of a path lie in its branch. Elsewhere
ONNX Runtime neither fuses them nor lays them out, and MobileNetV2's paths at width 1 take twice as
long. What is settled has no `If` or no weights, as in `skipping`; where all is, no controller is in
the model.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from instanas_jax import controller, onnx_graph, plain_layers, policy, skipping, supernet
from instanas_jax.onnx_graph import Graph
from instanas_jax.search_space import FORCED_OP, CellSpec, Join, SupernetSpec

_Run = Callable[[Graph, str], str]  # Adds a path to a graph, of the cell's input.


def serialise(
    spec: SupernetSpec,
    *,
    supernet_variables: dict[str, Any],
    controller_variables: dict[str, Any],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    settled: policy.Settled | None = None,
    metadata: dict[str, str] | None = None,
) -> bytes:
    """The model's file.

    It maps `image`, uint8 [1, H, W, 3], to `class_logits`, float32 [1, K], and `mask`, bool
    [1, L, O], what the controller decides, as `inference.make_predictor` does.

    Args:
      supernet_variables, controller_variables: {"params", "batch_stats"}.
      mean, std: of pixels, to normalise by.
      settled: decisions that no image changes; by default what the controller has settled.
      metadata: kept in the model for whoever reads its answers.
    """
    if settled is None:
        settled = controller.settled(spec, controller_variables)
    folded = supernet.fold(jax.device_get(supernet_variables))
    weights = skipping.prepare_weights(spec, folded, settled)
    plans = skipping.plans(spec, settled)
    graph = Graph()
    image = _normalised(graph, np.asarray(mean), np.asarray(std))
    if settled.everything:
        graph.add("Identity", graph.constant(settled.on[None], bool), result="mask")
        decisions = None
    else:
        mask = _decide(graph, spec, controller.fold(jax.device_get(controller_variables)), image)
        decisions = _decisions(graph, spec, mask, plans)

    x = graph.conv(image, plain_layers.conv(weights["stem"], stride=spec.stem_stride))
    for index, plan in enumerate(plans):
        paths = {op: _path(spec.cells[index], op, weights["paths"][index][op]) for op in plan.ops}
        if plan.always:
            x = _joined(graph, [run(graph, x) for run in paths.values()], spec.join) if paths else x
        else:
            assert decisions is not None
            x = _decided(graph, x, spec, index, plan, paths, decisions)
    x = graph.mean_over_positions(graph.conv(x, plain_layers.conv(weights["head"])))
    graph.linear(x, **weights["classifier"], result="class_logits")

    size = spec.image_size
    model = onnx_graph.model(
        graph.finish(
            "instanas",
            [onnx_graph.value("image", np.uint8, [1, size, size, 3])],
            [
                onnx_graph.value("class_logits", np.float32, [1, spec.num_classes]),
                onnx_graph.value("mask", np.bool_, [1, *spec.mask_shape]),
            ],
        ),
        metadata,
    )
    return model.SerializeToString()


def _normalised(graph: Graph, mean: np.ndarray, std: np.ndarray) -> str:
    """`augment.normalise` of the model's input, as planes [1, 3, H, W]."""
    pixels = graph.add("Cast", "image", to=onnx_graph.FLOAT)
    planes = graph.add("Transpose", pixels, perm=[0, 3, 1, 2])
    scaled = graph.add("Mul", planes, graph.constant((1.0 / (255.0 * std))[:, None, None]))
    return graph.add("Sub", scaled, graph.constant((mean / std)[:, None, None]))


def _decide(graph: Graph, spec: SupernetSpec, folded: dict[str, Any], image: str) -> str:
    """The model's result `mask`, [1, L, O]."""
    x = image
    if spec.controller_pool > 1:
        window = [spec.controller_pool] * 2
        x = graph.add("AveragePool", x, kernel_shape=window, strides=window)
    features = _features(graph, spec, folded, x)
    logits = graph.linear(features, **folded["logits"])
    shape = graph.constant(np.array([1, *spec.mask_shape]), np.int64)
    logits = graph.add("Reshape", logits, shape)
    return graph.add("GreaterOrEqual", logits, graph.constant(0.0), result="mask")


def _features(graph: Graph, spec: SupernetSpec, folded: dict[str, Any], x: str) -> str:
    """What the controller's logits read, [1, C]; see `controller.apply_eval`."""
    if spec.controller == "patches":
        return _patch_features(graph, folded, x, spec.image_size // spec.controller_pool)
    if spec.controller == "residual_large":
        x = graph.conv(x, plain_layers.conv(folded["stem"], stride=2))
        x = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    else:
        x = graph.conv(x, plain_layers.conv(folded["stem"]))
    in_channels = spec.controller_channels
    for index, (channels, stride) in enumerate(controller.segments(spec)):
        x = _block(graph, folded[f"segment_{index}"], x, channels - in_channels, stride)
        in_channels = channels
    return graph.mean_over_positions(x)


def _patch_features(graph: Graph, folded: dict[str, Any], x: str, size: int) -> str:
    side = size // controller.GRID
    embedding, hidden = folded["embedding"], folded["hidden"]
    channels = len(embedding["bias"])
    kernel = embedding["kernel"].reshape(side, side, 3, channels).transpose(3, 2, 0, 1)
    patches = graph.add(
        "Conv",
        x,
        graph.constant(kernel),
        graph.constant(embedding["bias"]),
        kernel_shape=[side] * 2,
        strides=[side] * 2,
    )
    # Patches one after another, of which a plane holds one channel.
    kernel = hidden["kernel"].reshape(controller.GRID**2, channels, -1).transpose(1, 0, 2)
    planes = graph.add("Flatten", graph.add("Relu", patches))
    joined = graph.linear(planes, kernel.reshape(-1, kernel.shape[-1]), hidden["bias"])
    return graph.add("Relu", joined)


def _block(graph: Graph, folded: dict[str, Any], x: str, wider_by: int, stride: int) -> str:
    y = graph.conv(x, plain_layers.conv(folded["first"], stride=stride))
    y = graph.conv(y, plain_layers.conv(folded["second"], activation="relu6"))
    if "shortcut" in folded:
        shortcut = plain_layers.conv(folded["shortcut"], stride=stride, activation="none")
        x = graph.conv(x, shortcut)
    else:
        if stride > 1:
            x = graph.add("AveragePool", x, kernel_shape=[stride] * 2, strides=[stride] * 2)
        if wider_by:
            around = graph.constant(np.array([0, 0, 0, 0, 0, wider_by, 0, 0]), np.int64)
            x = graph.add("Pad", x, around)
    return graph.add("Relu", graph.add("Add", x, y))


class _Decisions(NamedTuple):
    """Names of what a mask means, the empty-cell rule applied.

    Attributes:
      on: bool [L * O], whether a path runs.
      one: bool [L], whether a cell runs exactly one; None where no cell has to ask.
      none: bool [L], whether an image passes through a cell; None likewise.
    """

    on: str
    one: str | None = None
    none: str | None = None


def _decisions(
    graph: Graph, spec: SupernetSpec, mask: str, plans: list[skipping.Plan]
) -> _Decisions:
    """Of all cells at once: ten nodes, where one a path would take as long as the controller. None
    of them are needed where each cell runs one op or nothing: a sixth of what deciding takes
    (0.213 ms instead of 0.221, CIFAR quick's B on a busy machine)."""
    flat = graph.constant(np.array([-1]), np.int64)

    def flattened(name: str) -> str:
        return graph.add("Reshape", name, flat)

    if all(plan.always or _is_one_or_nothing(plan) for plan in plans):
        return _Decisions(on=flattened(mask))
    forced = spec.forced_cells
    rule = np.zeros((1, *spec.mask_shape), bool)  # What runs in cells that would be empty.
    rule[0, forced, FORCED_OP] = True
    axis = graph.constant(np.array([2]), np.int64)
    count = graph.add("ReduceSum", graph.add("Cast", mask, to=onnx_graph.FLOAT), axis, keepdims=1)
    empty = graph.add("Less", count, graph.constant(0.5))
    on = graph.add("Or", mask, graph.add("And", empty, graph.constant(rule, bool)))
    count = graph.add("Max", count, graph.constant(forced[None, :, None]))
    return _Decisions(
        on=flattened(on),
        one=flattened(graph.add("Equal", count, graph.constant(1.0))),
        none=flattened(graph.add("Less", count, graph.constant(0.5))),
    )


def _is_one_or_nothing(plan: skipping.Plan) -> bool:
    """Whether a cell runs one op that it can't replace, or passes its input through."""
    return len(plan.alone) == 1 and plan.none and not plan.several


def _path(cell: CellSpec, op: int, weights: dict[str, Any]) -> _Run:
    layers = plain_layers.path(cell, op, weights)
    return lambda graph, x: graph.path(x, layers)


def _decided(
    graph: Graph,
    x: str,
    spec: SupernetSpec,
    index: int,
    plan: skipping.Plan,
    paths: dict[int, _Run],
    decisions: _Decisions,
) -> str:
    """A cell that is not settled. As most run one path or none, these are asked for first, and the
    paths of a cell that may run several are in the model twice."""

    def is_true(graph: Graph, name: str, place: int) -> str:
        return graph.add("Gather", name, graph.constant(place, np.int64))

    def is_on(graph: Graph, op: int) -> str:
        return is_true(graph, decisions.on, index * spec.mask_shape[1] + op)

    def alone(graph: Graph, ops: tuple[int, ...] = plan.alone) -> str:
        """The first of these that is on."""
        if len(ops) == 1:
            return paths[ops[0]](graph, x)
        return graph.choose(
            is_on(graph, ops[0]),
            lambda branch: paths[ops[0]](branch, x),
            lambda branch: alone(branch, ops[1:]),
        )

    def several(graph: Graph) -> str:
        """Those that are on, one after another."""
        cell = spec.cells[index]
        shape = (1, cell.out_channels, cell.out_size, cell.out_size)
        total = graph.constant(np.zeros(shape))
        conditions = {op: is_on(graph, op) for op in paths}
        for op, run in paths.items():
            total = graph.choose(
                conditions[op],
                lambda branch, total=total, run=run: branch.add("Add", total, run(branch, x)),
                lambda branch, total=total: total,
            )
        if spec.join == "sum":
            return total
        ones = [
            graph.add("Cast", condition, to=onnx_graph.FLOAT) for condition in conditions.values()
        ]
        return graph.add("Div", total, graph.add("Sum", *ones))

    def beyond_one(graph: Graph) -> str:
        if not plan.none:
            return several(graph)
        assert decisions.none is not None
        return graph.choose(is_true(graph, decisions.none, index), lambda branch: x, several)

    if _is_one_or_nothing(plan):
        return graph.choose(is_on(graph, plan.alone[0]), alone, lambda branch: x)
    if not plan.several:
        return alone(graph)
    if not plan.alone:  # Two or more always run.
        return several(graph)
    assert decisions.one is not None
    return graph.choose(is_true(graph, decisions.one, index), alone, beyond_one)


def _joined(graph: Graph, outputs: list[str], join: Join) -> str:
    """Of paths that all run."""
    total = functools.reduce(lambda a, b: graph.add("Add", a, b), outputs)
    if join == "mean" and len(outputs) > 1:
        return graph.add("Mul", total, graph.constant(1.0 / len(outputs)))
    return total
