"""The exported model gives the masked supernet's answers, in ONNX Runtime, and really skips."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

from instanas_jax import augment, controller, onnx_graph, onnx_model, policy, supernet
from instanas_jax.search_space import FORCED_OP, SupernetSpec, preset, uniform_architecture
from tests.networks import as_if_trained

TINY = preset("tiny", num_classes=10)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
RNG = np.random.default_rng(0)
IMAGES = (
    RNG.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8) // np.arange(1, 9)[:, None, None, None]
)
IMAGES = IMAGES.astype(np.uint8)  # From bright to dark, which a fresh controller tells apart.


def make_spec(kind: str, join, *, pool: int = 1) -> SupernetSpec:
    return dataclasses.replace(
        TINY, controller=kind, controller_channels=4, controller_pool=pool, join=join
    )


def some_settled(spec: SupernetSpec, known: str) -> policy.Settled:
    """Nothing, half of the decisions, everything, all but where one op runs, or for each cell
    another case: two ops on, one on, the rule's off, all but two off."""
    rng = np.random.default_rng(3)
    on, off = np.zeros((2, *spec.mask_shape), bool)
    if known == "depth":
        depth = uniform_architecture(spec, 3).astype(bool)
        return policy.Settled(on=depth & spec.forced_cells[:, None], off=~depth)
    if known == "cases":
        on[0, :2] = on[1, 2] = True
        off[2, FORCED_OP] = off[3, [0, 3, 4]] = True
        return policy.Settled(on, off)
    everything = policy.Settled.architecture(rng.uniform(size=spec.mask_shape) < 0.4)
    share = {"nothing": 0.0, "half": 0.5, "everything": 1.1}[known]
    which = rng.uniform(size=spec.mask_shape) < share
    return policy.Settled(everything.on & which, everything.off & which)


@functools.cache
def supernet_variables(join):
    return jax.device_get(
        as_if_trained(supernet.init(jax.random.key(0), make_spec("patches", join)))
    )


def controller_variables(spec: SupernetSpec, settled: policy.Settled):
    """That switch each path on for half of the images."""
    variables = jax.device_get(as_if_trained(controller.init(jax.random.key(1), spec)))
    linear = variables["params"]["logits"]
    middle = np.median(policy_logits(spec, variables), axis=0).ravel()
    centred = {**linear, "bias": linear["bias"] - middle}
    variables = {**variables, "params": {**variables["params"], "logits": centred}}
    return controller.settle(variables, settled)


def policy_logits(spec: SupernetSpec, variables) -> jax.Array:
    pixels = augment.normalise(jnp.asarray(IMAGES), mean=MEAN, std=STD)
    return controller.apply_eval(spec, controller.fold(variables), pixels, lowering="native")


def expected(spec: SupernetSpec, network, decides) -> tuple[np.ndarray, np.ndarray]:
    """Class logits and masks of all images, every path computed."""
    pixels = augment.normalise(jnp.asarray(IMAGES), mean=MEAN, std=STD)
    mask = policy.greedy(policy_logits(spec, decides))
    folded = supernet.fold(network)
    logits = supernet.apply_eval(spec, folded, pixels, mask, lowering="native")
    return np.asarray(logits), np.asarray(mask)


def answers(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    session = onnx_graph.session(content, threads=1)
    rows = [session.run(["class_logits", "mask"], {"image": image[None]}) for image in IMAGES]
    logits, masks = (np.concatenate(column) for column in zip(*rows, strict=True))
    return logits, masks


@pytest.mark.parametrize(
    ("kind", "join", "pool", "known"),
    [
        ("patches", "mean", 2, "nothing"),
        ("patches", "sum", 4, "nothing"),
        ("patches", "mean", 1, "half"),
        ("patches", "mean", 2, "depth"),
        ("patches", "sum", 2, "cases"),
        ("patches", "mean", 2, "cases"),
        ("patches", "sum", 2, "everything"),
        ("residual_small", "mean", 1, "half"),
        ("residual_large", "sum", 2, "half"),
    ],
)
def test_answers_are_the_masked_supernets(kind, join, pool, known):
    spec = make_spec(kind, join, pool=pool)
    network = supernet_variables(join)
    decides = controller_variables(spec, some_settled(spec, known))
    logits, masks = expected(spec, network, decides)
    if known != "everything":
        assert len(np.unique(masks.reshape(len(masks), -1), axis=0)) > 1
    content = onnx_model.serialise(
        spec, supernet_variables=network, controller_variables=decides, mean=MEAN, std=STD
    )
    found, found_masks = answers(content)
    np.testing.assert_array_equal(found_masks, masks > 0.5)
    np.testing.assert_allclose(found, logits, rtol=1e-3, atol=1e-4 * np.abs(logits).max())


def fixed_policy(spec: SupernetSpec, mask: np.ndarray):
    """Undecided by its weights, but the same for every image."""
    variables = controller_variables(spec, policy.Settled.nothing(spec.mask_shape))
    linear = variables["params"]["logits"]
    logits = {"kernel": 1e-6 * linear["kernel"], "bias": np.float32(2.0 * mask.ravel() - 1.0)}
    return {**variables, "params": {**variables["params"], "logits": logits}}


@pytest.mark.parametrize("join", ["sum", "mean"])
@pytest.mark.parametrize("case", ["empty", "one each", "several", "mixed"])
def test_paths_that_are_off_do_not_run(case, join):
    """Their weights are no numbers, which would reach the answer if anything were multiplied by
    zero."""
    spec = make_spec("patches", join)
    mask = np.zeros(spec.mask_shape)
    if case == "one each":
        mask[np.arange(len(mask)), np.arange(len(mask)) % 5] = 1.0
    elif case == "several":
        mask[:, 1:4] = 1.0
    elif case == "mixed":
        mask[0, 4] = mask[2, 0] = mask[2, 2] = 1.0
    running = mask.astype(bool)
    running[~running.any(axis=1) & spec.forced_cells, FORCED_OP] = True
    network, decides = supernet_variables(join), fixed_policy(spec, mask)
    logits, masks = expected(spec, network, decides)
    np.testing.assert_array_equal(masks, np.broadcast_to(mask, masks.shape))
    content = onnx_model.serialise(
        spec,
        supernet_variables=poisoned(spec, network, ~running),
        controller_variables=decides,
        mean=MEAN,
        std=STD,
    )
    found, _ = answers(content)
    np.testing.assert_allclose(found, logits, rtol=1e-3, atol=1e-4 * np.abs(logits).max())


def poisoned(spec: SupernetSpec, variables, paths: np.ndarray):
    """Variables in which the last layers of these paths [L, O] hold no numbers."""
    params = dict(variables["params"])
    for cell, op in np.argwhere(paths):
        name = supernet.cell_name(cell)
        layer = "basic_second" if op == 4 else f"project_{spec.to_json()['ops'][op]}"
        kernel = np.full_like(params[name][layer]["kernel"], np.nan)
        params[name] = {**params[name], layer: {**params[name][layer], "kernel": kernel}}
    return {**variables, "params": params}


def test_weights_of_undecided_paths_lie_in_their_branches():
    spec = make_spec("patches", "mean")
    nothing = policy.Settled.nothing(spec.mask_shape)
    content = onnx_model.serialise(
        spec,
        supernet_variables=supernet_variables("mean"),
        controller_variables=controller_variables(spec, nothing),
        mean=MEAN,
        std=STD,
        metadata={"variant": "A"},
    )
    model = onnx.load_from_string(content)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"variant": "A"}
    outside = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    folded = supernet.fold(supernet_variables("mean"))
    ends = {name: folded[name] for name in ("stem", "head", "classifier")}
    decides = controller.fold(controller_variables(spec, nothing))
    needed = sum(leaf.size for leaf in jax.tree.leaves((ends, decides)))
    assert needed <= outside < needed + 100  # And the numbers that the rules are made of.


@pytest.mark.parametrize(("known", "asks"), [("depth", False), ("half", True), ("cases", True)])
def test_paths_are_counted_only_where_a_cell_may_run_several(known, asks):
    spec = make_spec("patches", "mean")
    content = onnx_model.serialise(
        spec,
        supernet_variables=supernet_variables("mean"),
        controller_variables=controller_variables(spec, some_settled(spec, known)),
        mean=MEAN,
        std=STD,
    )
    kinds = [node.op_type for node in onnx.load_from_string(content).graph.node]
    assert "If" in kinds
    assert ("ReduceSum" in kinds) == asks
