"""What the benchmarks compare with computes the same subnet."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks import peers
from instanas_jax import supernet
from instanas_jax.search_space import preset, uniform_architecture
from tests.networks import as_if_trained

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 32, 32, 3)).astype(np.float32)
PLANES = np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2))


def run_by_hand(net: peers.Subnet, planes: np.ndarray) -> jax.Array:
    """The subnet by plain convolutions, layer by layer as its description says."""

    def apply(x, conv: peers.Conv):
        pad = conv.kernel.shape[-1] // 2
        y = lax.conv_general_dilated(
            x,
            conv.kernel,
            (conv.stride, conv.stride),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
            feature_group_count=conv.groups,
        )
        y = y + conv.bias[:, None, None]
        return {"none": y, "relu": jnp.maximum(y, 0), "relu6": jnp.clip(y, 0, 6)}[conv.activation]

    x = apply(planes, net.stem)
    for paths, scale in net.cells:
        outputs = []
        for path in paths:
            y = x
            for conv in path.convs:
                y = apply(y, conv)
            outputs.append(x + y if path.adds_input else y)
        x = sum(outputs) * scale if outputs else x
    kernel, bias = net.classifier
    return apply(x, net.head).mean(axis=(2, 3)) @ kernel + bias


def torch_eager(net: peers.Subnet, planes: np.ndarray) -> np.ndarray:
    return peers.torch_eager(net, folded=False, threads=1)(planes)


def torch_folded(net: peers.Subnet, planes: np.ndarray) -> np.ndarray:
    return peers.torch_eager(net, folded=True, threads=1)(planes)


def onnx_runtime(net: peers.Subnet, planes: np.ndarray) -> np.ndarray:
    return peers.onnx_runtime(net, image_size=32, threads=1)(planes)


EXECUTIONS = {"by_hand": (run_by_hand, ()), "torch": (torch_eager, ("torch",))}
EXECUTIONS["torch_folded"] = (torch_folded, ("torch",))
EXECUTIONS["onnx_runtime"] = (onnx_runtime, ("onnx", "onnxruntime"))


def architectures():
    spec = preset("tiny", num_classes=10)
    yield "mobilenetv2", uniform_architecture(spec, 0)
    yield "empty", np.zeros(spec.mask_shape)
    yield "mixed", RNG.uniform(size=spec.mask_shape) < 0.4
    yield "everything", np.ones(spec.mask_shape)


@pytest.mark.parametrize("name", EXECUTIONS)
@pytest.mark.parametrize("join", ["sum", "mean"])
@pytest.mark.parametrize(("which", "architecture"), list(architectures()))
def test_a_peer_answers_as_the_supernet(which, architecture, join, name):
    execute, packages = EXECUTIONS[name]
    for package in packages:
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed: pip install -r requirements-peers.txt")
    spec = preset("tiny", num_classes=10, join=join)
    variables = as_if_trained(supernet.init(jax.random.key(0), spec))
    masks = np.broadcast_to(np.float32(architecture), (2, *spec.mask_shape))
    expected = supernet.apply_eval(
        spec, supernet.fold(variables), jnp.asarray(IMAGES), jnp.asarray(masks), lowering="native"
    )
    answer = execute(peers.subnet(spec, variables, np.asarray(architecture)), PLANES)
    error = np.linalg.norm(np.asarray(answer) - expected) / np.linalg.norm(expected)
    assert error < 1e-4


@pytest.mark.parametrize("make", [peers.torch_eager, peers.onnx_runtime])
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, make):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    spec = preset("tiny", num_classes=10)
    net = peers.subnet(spec, supernet.init(jax.random.key(0), spec), np.zeros(spec.mask_shape))
    options = {"folded": True} if make is peers.torch_eager else {"image_size": 32}
    with pytest.raises(peers.Missing, match="requirements-peers.txt"):
        make(net, threads=1, **options)
