"""The network under test, and everything that runs it: our executions and the peers."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import peers
from experiments import trained_run
from instanas_jax import (
    augment,
    batching,
    controller,
    convolution,
    data,
    inference,
    supernet,
)
from instanas_jax.policy import Settled
from instanas_jax.search_space import MOBILENETV2_OP, SupernetSpec, uniform_architecture

DENSITIES = {"sparse": 0.1, "medium": 0.25, "dense": 0.6, "all_on": 1.0}
PEERS = ("torch_eager", "torch_folded", "onnx_runtime")

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Subjects:
    """One trained state, or one of random weights, on which no time depends.

    Attributes:
      spec: of the supernet.
      state: keyword arguments of `inference.deploy`.
      images: uint8 [N, H, W, 3].
    """

    spec: SupernetSpec
    state: dict[str, Any]
    images: np.ndarray

    @classmethod
    def random(cls, spec: SupernetSpec, count: int) -> "Subjects":
        key, rng = jax.random.key(0), np.random.default_rng(0)
        state = {
            # No path may be silent, or answers could not be compared.
            "supernet_variables": _with_random_batch_norms(supernet.init(key, spec)),
            "controller_variables": controller.init(key, spec),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.25, 0.25),
            "lowering": convolution.default_lowering(),
        }
        shape = (count, spec.image_size, spec.image_size, 3)
        return cls(spec, state, rng.integers(0, 256, shape, dtype=np.uint8))

    @classmethod
    def trained(
        cls, workdir: str, variant: str = "", data_dir: str = "", *, count: int
    ) -> "Subjects":
        """A finished variant and validation images of its data set.

        Args:
          variant: its name; empty: see `trained_run.choose_variant`.
          data_dir: folder of the data set; empty: see `data.load`.
          count: of images, at most.
        """
        run = trained_run.open_run(workdir)
        networks = trained_run.restore_networks(run, trained_run.choose_variant(run, variant))
        dataset = data.load(
            run.dataset.name,
            data_dir=data_dir or None,
            validation_size=run.config.data.validation_size,
            train_limit=1,
            test_limit=1,
            image_size=run.spec.image_size,
        )
        state = {
            "supernet_variables": networks["supernet"],
            "controller_variables": networks["controller"],
            "mean": run.dataset.mean,
            "std": run.dataset.std,
            "lowering": convolution.default_lowering(),
        }
        return cls(
            run.spec,
            state,
            dataset.validation.take(np.arange(min(count, len(dataset.validation)))).images,
        )

    @property
    def settled(self) -> Settled:
        return controller.settled(self.spec, self.state["controller_variables"])

    def masks(self) -> dict[str, np.ndarray]:
        """By name, one architecture [L, O]."""
        rng = np.random.default_rng(0)
        random = {
            name: (rng.uniform(size=self.spec.mask_shape) < density).astype(np.float32)
            for name, density in DENSITIES.items()
        }
        return {"mobilenetv2": uniform_architecture(self.spec, MOBILENETV2_OP), **random}

    @functools.cached_property
    def masked(self) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
        folded = jax.jit(supernet.fold)(self.state["supernet_variables"])

        @jax.jit
        def run(folded, images, masks):
            return supernet.apply_eval(
                self.spec, folded, self._normalise(images), masks, lowering=self.state["lowering"]
            )

        return functools.partial(run, folded)

    def _normalise(self, images: Any) -> jax.Array:
        return augment.normalise(images, mean=self.state["mean"], std=self.state["std"])

    def skipping(self) -> Callable[[np.ndarray, np.ndarray], Any]:
        """Of one image and a mask [L, O] from outside; the controller runs all the same."""
        return self._with_controller(self.settled)

    def static_controller(self, architecture: np.ndarray) -> Callable[[np.ndarray, Any], Any]:
        """Compiled for one architecture; the controller runs all the same."""
        return self._with_controller(Settled.architecture(architecture))

    def _with_controller(self, settled: Settled) -> Callable[[np.ndarray, np.ndarray], Any]:
        return inference.compile_under_mask(self._deploy(settled=settled))

    def _deploy(self, settled: Settled | None = None) -> inference.Network:
        return inference.deploy(self.spec, settled=settled, **self.state)

    def decide(self, images: np.ndarray) -> np.ndarray:
        """The controller's masks [B, L, O]."""
        network = self._deploy()
        return np.asarray(jax.jit(network.decide)(network.weights, images))

    @functools.cached_property
    def predictor(self) -> inference.Predict:
        return inference.make_predictor(self.spec, **self.state)

    def static(self, architecture: np.ndarray) -> inference.Predict:
        state = {name: value for name, value in self.state.items() if "controller" not in name}
        return inference.make_static_predictor(self.spec, architecture=architecture, **state)

    def batch_predictor(
        self, settled: Settled | None = None, *, threads: int
    ) -> batching.BatchPredictor:
        """Of this controller, or with other decisions settled."""
        return batching.BatchPredictor(self._deploy(settled), threads=threads)

    def exported(self, mask: np.ndarray, image: np.ndarray, *, threads: int) -> dict[str, Call]:
        """ONNX Runtime on what `experiments.export` writes, for one image [1, H, W, 3]; left out
        where a package is missing. Its controller runs, and decides for this mask [L, O]."""
        try:
            for package in ("onnx", "onnxruntime"):
                peers.require(package)
        except peers.Missing:  # As `peers` tells.
            return {}
        from instanas_jax import onnx_graph, onnx_model

        variables = _deciding(self.spec, self.state["controller_variables"], mask)
        state = {name: value for name, value in self.state.items() if name != "lowering"}
        content = onnx_model.serialise(self.spec, **{**state, "controller_variables": variables})
        session = onnx_graph.session(content, threads=threads)
        return {"exported": functools.partial(session.run, ["class_logits"], {"image": image})}

    def peers(
        self,
        architecture: np.ndarray,
        images: np.ndarray,
        *,
        threads: int,
        names: Sequence[str] = PEERS,
    ) -> dict[str, Call]:
        """Peers by name; a missing one is told, and left out."""
        net = peers.subnet(self.spec, self.state["supernet_variables"], architecture)
        planes = np.ascontiguousarray(np.asarray(self._normalise(images)).transpose(0, 3, 1, 2))
        makers = {
            "torch_eager": functools.partial(peers.torch_eager, net, folded=False),
            "torch_folded": functools.partial(peers.torch_eager, net, folded=True),
            "onnx_runtime": functools.partial(
                peers.onnx_runtime, net, image_size=self.spec.image_size
            ),
        }
        calls: dict[str, Call] = {}
        for name in names:
            try:
                calls[name] = functools.partial(makers[name](threads=threads), planes)
            except peers.Missing as missing:
                print(f"missing peer: {missing}")
        return calls


def _deciding(spec: SupernetSpec, variables: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
    """A controller whose undecided logits still come from the image, but always mean this mask."""
    linear = variables["params"]["logits"]
    settled = controller.settled(spec, variables)
    bias = np.where((settled.on | settled.off).ravel(), linear["bias"], 2.0 * mask.ravel() - 1.0)
    logits = {"kernel": 1e-6 * linear["kernel"], "bias": bias.astype(np.float32)}
    return {**variables, "params": {**variables["params"], "logits": logits}}


def _with_random_batch_norms(variables: dict[str, Any]) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def randomise(path, leaf):
        if path[-1].key in ("scale", "var"):
            return np.asarray(rng.uniform(0.5, 1.5, leaf.shape), np.float32)
        return leaf

    return jax.tree_util.tree_map_with_path(randomise, variables)
