"""The training supernet in PyTorch, as a user of it would write it: our step's peer.

Written from the paper's description (InstaNAS, arXiv 1811.10201, sections 3.2 and 4.1; MobileNetV2,
arXiv 1801.04381). Every op is a module of its own with its own convolutions and batch norms, all of
a cell's ops run on the whole batch, and the mask multiplies what they return. The step is cross-
entropy, backward and SGD with Nesterov momentum, in bfloat16 by autocast if asked.

What a user would tune is tuned. `fastest_step` tries both memory layouts on the batch that is to be
timed and keeps the faster: on two Xeon cores channels-last, by a quarter to a third (width 0.5,
batch 16). SGD is the fused one, there 3 to 4 times as fast as the others (10 million parameters:
15 ms). cuDNN may search for its algorithms. In one process with ours it also profits from memory
that stays with the process (`environment.configure_cpu`), which a program of its own would not.

Modules are called as in the authors' program, so that `reference_weights` says where weights go.
Importing this module without PyTorch raises `peers.Missing`.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import peers, reference_weights
from instanas_jax.layers import ConvKind
from instanas_jax.search_space import CANDIDATE_OPS, FORCED_OP, CellSpec, OpSpec, SupernetSpec

peers.require("torch")

import torch  # noqa: E402  # pyright: ignore[reportMissingImports]
from torch import nn  # noqa: E402  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # noqa: E402  # pyright: ignore[reportMissingImports]

# Of each layout. Where nobody keeps freed memory, the first ones fault it in.
_TRIED_UPDATES = 3
LAYOUTS = {"channels_last": torch.channels_last, "channels_first": torch.contiguous_format}


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1):
    return nn.Conv2d(
        in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
    )


class MBConv(nn.Module):
    """Expand, depthwise, project; the input is added where shapes allow."""

    def __init__(self, cell: CellSpec, op: OpSpec):
        super().__init__()
        hidden = cell.in_channels * op.expansion
        self.conv1 = _conv(cell.in_channels, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = _conv(hidden, hidden, op.kernel, cell.stride, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = _conv(hidden, cell.out_channels, 1)
        self.bn3 = nn.BatchNorm2d(cell.out_channels)
        self.has_residual = cell.has_residual

    def forward(self, x: Any) -> Any:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return x + y if self.has_residual else y


class BasicConv(nn.Module):
    """Two 3x3 convolutions, the first with the cell's stride."""

    def __init__(self, cell: CellSpec, op: OpSpec):
        super().__init__()
        self.conv1 = _conv(cell.in_channels, cell.out_channels, op.kernel, cell.stride)
        self.bn1 = nn.BatchNorm2d(cell.out_channels)
        self.conv2 = _conv(cell.out_channels, cell.out_channels, op.kernel)
        self.bn2 = nn.BatchNorm2d(cell.out_channels)

    def forward(self, x: Any) -> Any:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu6(self.bn2(self.conv2(y)), inplace=True)


class Supernet(nn.Module):
    """Training mode of the supernet under a mask.

    Args:
      spec: of the network.
      paths: bool [L, O], the ops that run, the empty-cell rule applied; all by default.
    """

    def __init__(self, spec: SupernetSpec, paths: np.ndarray | None = None):
        super().__init__()
        self.spec = spec
        self.paths = np.ones(spec.mask_shape, bool) if paths is None else paths
        self.conv1 = _conv(3, spec.stem_channels, 3, spec.stem_stride)
        self.bn1 = nn.BatchNorm2d(spec.stem_channels)
        self.layers = nn.ModuleList(
            nn.ModuleList((BasicConv if op.is_basic else MBConv)(cell, op) for op in CANDIDATE_OPS)
            for cell in spec.cells
        )
        self.conv2 = _conv(spec.cells[-1].out_channels, spec.head_channels, 1)
        self.bn2 = nn.BatchNorm2d(spec.head_channels)
        self.dropout = nn.Dropout(spec.head_dropout)
        self.linear = nn.Linear(spec.head_channels, spec.num_classes)
        self.forced_cells: Any
        self.register_buffer("forced_cells", torch.from_numpy(spec.forced_cells))

    def forward(self, images: Any, mask: Any) -> Any:
        """Normalised [B, 3, H, W] under masks [B, L, O] to class logits [B, K]."""
        x = functional.relu(self.bn1(self.conv1(images)), inplace=True)
        mask, identity = self._resolve_empty_cells(mask)
        # In the activations' type, or a product with the mask would be float32 under autocast.
        mask, identity = (values.to(x.dtype)[..., None, None, None] for values in (mask, identity))
        for index, (cell, ops) in enumerate(zip(self.spec.cells, self.layers, strict=True)):
            total: Any = 0 if cell.forces_op else x * identity[:, index]
            for position in np.flatnonzero(self.paths[index]):
                total = total + ops[position](x) * mask[:, index, position]  # pyright: ignore
            if self.spec.join == "mean":
                total = total / mask[:, index].sum(dim=1).clamp(min=1)
            x = total
        x = functional.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.linear(self.dropout(x.mean(dim=(2, 3))))

    def _resolve_empty_cells(self, mask: Any) -> tuple[Any, Any]:
        """Masks [B, L, O] that run, and identity [B, L]: see `policy.resolve_empty_cells`."""
        empty = (mask < 0.5).all(dim=-1)
        forced = torch.zeros_like(mask)
        forced[..., FORCED_OP] = (empty & self.forced_cells).to(mask.dtype)
        return mask + forced, (empty & ~self.forced_cells).to(mask.dtype)


def load_params(model: Supernet, params: dict[str, Any]) -> None:
    """Sets a model's parameters to a tree of our supernet's; running statistics stay fresh."""
    network = reference_weights.supernet_layers(model.spec, {})
    tensors = reference_weights.split_params(network, params)
    for layer in network.layers:
        name = f"{layer.convolution}.weight"
        tensors[name] = _torch_layout(layer.kind, tensors[name])
    tensors["linear.weight"] = tensors["linear.weight"].T
    own = dict(model.named_parameters())
    if own.keys() != tensors.keys():
        raise ValueError(f"parameters without a counterpart: {own.keys() ^ tensors.keys()}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(torch.from_numpy(np.array(tensors[name])))


def _torch_layout(kind: ConvKind, kernel: np.ndarray) -> np.ndarray:
    """Our kernel of a convolution as [out, in / groups, k, k]."""
    if kind == "pointwise":
        return kernel.T[:, :, None, None]
    if kind == "depthwise":
        return kernel.transpose(2, 0, 1)[:, None]
    return kernel.transpose(3, 2, 0, 1)


def read_params(model: Supernet, *, gradients: bool = False) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, as `reference_weights.split_params` gives ours."""
    named: list[tuple[str, Any]] = list(model.named_parameters())
    values = {
        name: (tensor.grad if gradients else tensor).detach().cpu().contiguous().numpy()
        for name, tensor in named
    }
    for layer in reference_weights.supernet_layers(model.spec, {}).layers:
        name = f"{layer.convolution}.weight"
        values[name] = layer.to_our_layout(values[name])
    values["linear.weight"] = values["linear.weight"].T
    return values


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything that one update reads beside the network."""

    images: np.ndarray  # [B, H, W, 3] float32, normalised
    labels: np.ndarray  # [B]
    mask: np.ndarray  # [B, L, O]
    learning_rate: float
    momentum: float
    weight_decay: float


class TrainStep:
    """One update of the model's parameters after another, on the same inputs.

    Args:
      model: a supernet; it moves to the device.
      inputs: copied to the device, so that a call begins with them there.
      device: `cpu` or `cuda`.
      layout: of `LAYOUTS`.
      bf16: activations in bfloat16, by autocast.
    """

    def __init__(
        self, model: Supernet, inputs: Inputs, *, device: str, layout: str, bf16: bool = False
    ):
        torch.backends.cudnn.benchmark = True
        memory_format = LAYOUTS[layout]
        self._model = model.to(device=device, memory_format=memory_format).train()  # pyright: ignore
        self._device, self._bf16 = device, bf16
        planes = torch.from_numpy(np.ascontiguousarray(inputs.images.transpose(0, 3, 1, 2)))
        self._images = planes.to(device=device, memory_format=memory_format)
        self._labels = torch.from_numpy(inputs.labels.astype(np.int64)).to(device)
        self._mask = torch.from_numpy(np.array(inputs.mask, np.float32)).to(device)
        self._optimizer = torch.optim.SGD(
            model.parameters(),
            lr=inputs.learning_rate,
            momentum=inputs.momentum,
            weight_decay=inputs.weight_decay,
            nesterov=inputs.momentum > 0.0,
            fused=True,
        )

    def __call__(self) -> float:
        """Updates once and returns the loss before it; waits for the device."""
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device, torch.bfloat16, enabled=self._bf16):
            class_logits = self._model(self._images, self._mask)
            loss = functional.cross_entropy(class_logits, self._labels)
        loss.backward()
        self._optimizer.step()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())


@dataclasses.dataclass(frozen=True)
class Trial:
    """The fastest of some updates in one layout; `peak_bytes` of tensors on accelerators."""

    seconds: float
    peak_bytes: int | None  # None on CPUs.


@dataclasses.dataclass(frozen=True)
class Fastest:
    step: Callable[[], float]  # A `TrainStep`, here or in another process.
    first_loss: float  # Of the network as it came.
    trials: dict[str, Trial]  # By layout.


def fastest_step(
    spec: SupernetSpec,
    params: dict[str, Any],
    inputs: Inputs,
    *,
    device: str,
    bf16: bool = False,
    paths: np.ndarray | None = None,
) -> Fastest:
    """The update in the layout that is faster here, by the fastest of a few updates in each.

    Args:
      params: our supernet's, on the host.
      device, bf16: see `TrainStep`.
      paths: see `Supernet`.
    """
    first_loss, trials, fastest = float("nan"), {}, None
    for layout in LAYOUTS:
        model = Supernet(spec, paths)
        load_params(model, params)
        step = TrainStep(model, inputs, device=device, layout=layout, bf16=bf16)
        first_loss = step()
        trials[layout] = _try(step, device)
        if fastest is None or trials[layout].seconds < min(
            trial.seconds for name, trial in trials.items() if name != layout
        ):
            fastest = step
    assert fastest is not None
    return Fastest(fastest, first_loss, trials)


def _try(step: TrainStep, device: str) -> Trial:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(_TRIED_UPDATES):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return Trial(min(seconds), torch.cuda.max_memory_allocated() if device == "cuda" else None)


def has_cuda() -> bool:
    return torch.cuda.is_available()
