"""The benchmarks of training: PyTorch's step is ours, counts are right, programs write rows."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers, reference_weights, reporting, roofline, scaling, step_peers
from instanas_jax import augment, cost, optimizers, supernet, train_state
from instanas_jax.errors import InputError
from instanas_jax.search_space import preset, uniform_architecture
from instanas_jax.stage import Setting, supernet_inputs, supernet_update
from tests.networks import as_if_trained

_ONE_DEVICE = re.sub("(host_platform_device_count)=[0-9]+", r"\1=1", os.environ["XLA_FLAGS"])
ROOT = Path(__file__).parent.parent
BATCH = 8
SGD = optimizers.SgdSettings(0.1, momentum=0.9, weight_decay=1e-2)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(BATCH, 32, 32, 3)).astype(np.float32)
LABELS = RNG.integers(0, 10, BATCH)

needs_torch = pytest.mark.skipif(
    not importlib.util.find_spec("torch"),
    reason="torch is not installed: pip install -r requirements-peers.txt",
)


def some_masks(spec) -> np.ndarray:
    """Mixed ones; an image without any path, and one with all."""
    masks = (RNG.uniform(size=(BATCH, *spec.mask_shape)) < 0.5).astype(np.float32)
    masks[0], masks[1] = 0.0, 1.0
    return masks


def torch_model(spec, params, mask, layout="channels_last", paths=None):
    from benchmarks import torch_supernet

    model = torch_supernet.Supernet(spec, paths)
    torch_supernet.load_params(model, params)
    inputs = torch_supernet.Inputs(
        IMAGES, LABELS, mask, SGD.learning_rate, SGD.momentum, SGD.weight_decay
    )
    return model, torch_supernet.TrainStep(model, inputs, device="cpu", layout=layout)


@needs_torch
@pytest.mark.parametrize(("join", "layout"), [("sum", "channels_first"), ("mean", "channels_last")])
def test_pytorchs_step_is_ours(join, layout):
    """Loss, every tensor's gradient, and every parameter after one update, to 1e-3 of its norm.

    Sums in another order change the loss by 1e-6; gradients of a bias that a batch norm further on
    nearly cancels are the least exact.
    """
    from benchmarks import torch_supernet

    spec = preset("tiny", num_classes=10, join=join)
    state = train_state.create(jax.random.key(0), spec)
    state = jax.device_get(state.replace(supernet=as_if_trained(state.supernet)))
    variables, mask = state.supernet, some_masks(spec)
    network = reference_weights.supernet_layers(spec, {})
    setting = Setting(
        spec, (0.5,) * 3, (0.25,) * 3, augment.Augmentation(), seed=0, lowering="native"
    )
    inputs = supernet_inputs(
        spec,
        jnp.asarray(IMAGES),
        jnp.asarray(LABELS),
        jnp.asarray(mask),
        sgd=SGD,
        learning_rate=SGD.learning_rate,
    )
    after, metrics = jax.jit(supernet_update(setting))(train_state.ravel(state), inputs)
    after = train_state.unravel(jax.device_get(after))
    # The first trace of momentum is the gradient with the decay in it.
    gradients = jax.tree.map(
        lambda trace, before: trace - SGD.weight_decay * before,
        after.optimizer["supernet"][1].trace,
        variables["params"],
    )

    model, step = torch_model(spec, variables["params"], mask, layout)
    np.testing.assert_allclose(step(), metrics["loss"], rtol=1e-5)
    for ours, theirs in (
        (gradients, torch_supernet.read_params(model, gradients=True)),
        (after.supernet["params"], torch_supernet.read_params(model)),
    ):
        expected = reference_weights.split_params(network, ours)
        assert expected.keys() == theirs.keys()
        for name, tensor in expected.items():
            error = np.linalg.norm(theirs[name] - tensor)
            assert error < 1e-3 * np.linalg.norm(tensor), name


@needs_torch
def test_pytorch_computes_no_other_paths_than_asked():
    """A static architecture alone has the loss that it has as a mask."""
    spec = preset("tiny", num_classes=10)
    params = as_if_trained(supernet.init(jax.random.key(0), spec))["params"]
    architecture = uniform_architecture(spec, 1)
    mask = np.broadcast_to(architecture, (BATCH, *spec.mask_shape))
    _, everything = torch_model(spec, params, mask)
    model, alone = torch_model(spec, params, mask, paths=architecture > 0.5)
    assert alone() == pytest.approx(everything(), rel=1e-5)
    used = {name for name, tensor in model.named_parameters() if tensor.grad is not None}
    assert {name.split(".")[2] for name in used if name.startswith("layers.")} == {"1"}


def test_without_pytorch_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "benchmarks.torch_supernet", raising=False)
    with pytest.raises(peers.Missing, match="requirements-peers.txt"):
        importlib.import_module("benchmarks.torch_supernet")


def test_losses_that_differ_are_refused():
    step_peers.check_losses("pretrain", {"ours": 2.0, "torch": 2.001}, dtype="float32")
    for other in (2.1, math.nan):
        with pytest.raises(InputError, match="torch"):
            step_peers.check_losses("pretrain", {"ours": 2.0, "torch": other}, dtype="float32")


def test_counted_work_by_hand():
    # Stem: 32x32x3 to 16x16x8. Head: 8x8x24 to 8x8x32. Nothing between.
    spec = preset("tiny", num_classes=10)
    nothing = np.zeros(spec.mask_shape, bool)
    assert list(roofline._maps(spec, nothing)) == [(3072, 2048), (1536, 2048)]
    # Cell 1 halves 16x16x8 to 8x8x16: expansions by 6 and 3 side by side, then op by op; basic.
    cell = spec.cells[1]
    assert list(roofline._cell_maps(cell, np.array([1, 1, 0, 0, 1], bool))) == [
        (2048, 72 * 256),
        (48 * 256, 48 * 64),
        (48 * 64, 1024),
        (24 * 256, 24 * 64),
        (24 * 64, 1024),
        (2048, 1024),
        (1024, 1024),
    ]
    one, two = (roofline.update_work(spec, images, itemsize=2, paths=nothing) for images in (1, 2))
    assert two.flops == 2 * one.flops
    assert two.bytes - one.bytes == 2 * (3 * (3072 + 1536) + 11 * (2048 + 2048))


def test_masks_of_an_image_share_stem_and_first_cell():
    spec = preset("tiny", num_classes=10)
    one, three = (roofline.masked_work(spec, 2, masks=masks, itemsize=2) for masks in (1, 3))
    flops, _ = cost.path_costs(spec)
    head = cost.fixed_cost(spec).flops - 2 * 9 * 3 * 8 * 16**2  # Less the stem: 8 maps of 16 x 16.
    assert three.flops - one.flops == 2 * 2 * (flops[1:].sum() + head)
    maps = list(roofline._maps(spec, np.ones(spec.mask_shape, bool)))
    first = list(roofline._cell_maps(spec.cells[0], np.ones(5, bool)))
    assert maps[1 : 1 + len(first)] == first
    assert three.bytes - one.bytes == 2 * 2 * 2 * sum(sum(m) for m in maps[1 + len(first) :])


def test_a_ceiling_of_memory_reads_two_vectors(monkeypatch):
    added = []

    def rates(function, operands, amount, repeats):
        del amount
        if function is jnp.add:
            added.extend(operand.unsafe_buffer_pointer() for operand in operands)
        return [1.0] * repeats

    monkeypatch.setattr(roofline, "_rates", rates)
    roofline.measure_ceilings(jnp.float32, size=8, repeats=2)
    assert len(set(added)) == 2


def test_the_later_of_two_ceilings_bounds():
    work = roofline.Work(flops=6.0, bytes=8.0)
    assert work.bound(roofline.Ceilings(2.0, 4.0)) == (3.0, "compute")
    assert work.bound(roofline.Ceilings(6.0, 1.0)) == (8.0, "memory")


def test_differences_of_parameters_by_hand():
    params = {"a": np.array([4.0, 0.0]), "b": np.array([0.0, -3.0])}
    others = {"a": np.array([4.0, 0.2]), "b": np.array([0.3, -3.0])}
    start = {"a": np.array([4.0, 0.0]), "b": np.array([2.0, -3.0])}
    # 0.2 of 4 and 0.3 of 3; sqrt(0.04 + 0.09) of 2.
    apart = scaling.differences(params, others, start=start)
    assert apart == pytest.approx((0.1, math.sqrt(0.13) / 2))
    assert scaling.differences(params, params, start=start) == (0.0, 0.0)
    # What holds nothing but rounding counts by 0.001.
    (largest, _) = scaling.differences(
        {"a": np.array([1e-9])}, {"a": np.array([-1e-9])}, start={"a": np.array([1.0])}
    )
    assert largest == pytest.approx(2e-6)
    # Parameters that are no numbers do not agree.
    others = {"a": np.array([math.nan, 0.0]), "b": np.array([0.0, -3.0])}
    assert all(map(math.isnan, scaling.differences(params, others, start=start)))


def test_a_row_of_no_number_is_printed(capsys):
    rows = [
        reporting.measurement("a", [2.0], "ms"),
        reporting.measurement("b", [math.nan], "ratio"),
    ]
    reporting.print_rows(rows)
    assert capsys.readouterr().out == "a: 2 ms\nb: not a number\n"


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", "--preset=tiny", *arguments],
        cwd=ROOT,
        # One device, in whose programs there is less to compile.
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": _ONE_DEVICE},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def read_rows(finished: subprocess.CompletedProcess, path: Path) -> dict[str, dict]:
    assert finished.returncode == 0, finished.stderr
    report = json.loads(path.read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", report["date"]) and report["seconds"] > 1.0
    rows = {row["name"]: row for row in report["results"]}
    for name, row in rows.items():
        assert math.isfinite(row["value"]) and row["value"] >= 0.0, name
        assert f"{name}: " in finished.stdout
    return rows


def test_a_training_step_is_measured(tmp_path):
    path = tmp_path / "train_step.json"
    arguments = [
        f"--output={path}",
        "--num_classes=10",
        "--batch_size=8",
        "--repeats=2",
        "--stages=pretrain,search_controller",
        "--peers=torch,torch_alone,native,remat",
        "--ceiling_size=64",
    ]
    rows = read_rows(run("train_step", *arguments), path)
    for kind in ("pretrain", "search_controller"):
        for name in (
            *("host_batch", "prepare", "update", "step", "images_a_second", "input_share"),
            *(f"{p}_compile_{part}" for p in ("prepare", "update") for part in ("trace", "xla")),
            *("update_roofline_share", "update_planned_memory"),
        ):
            assert rows[f"{kind}_{name}"]["value"] > 0.0
    assert {"ceiling_matrix_product", "ceiling_addition"} < rows.keys()
    assert {"pretrain_loop_step", "pretrain_input_wait_share"} < rows.keys()
    ratios = {name for name, row in rows.items() if row["unit"] == "ratio"}
    expected = {"native", "remat"}
    if importlib.util.find_spec("torch"):
        expected |= {"torch", "torch_alone"}
    assert ratios == {f"pretrain_update_{peer}_over_ours" for peer in expected}
    assert rows["pretrain_update_native"]["repeats"] == 1
    for peer in ("native", "remat"):
        assert rows[f"pretrain_{peer}_update_planned_memory"]["value"] > 0.0
        assert rows[f"pretrain_{peer}_update_compile_xla"]["value"] > 0.0


def test_devices_are_compared(tmp_path):
    path = tmp_path / "scaling.json"
    arguments = [
        f"--output={path}",
        "--num_classes=10",
        "--batch_size=8",
        "--devices=1,2",
        "--repeats=2",
        "--compared_steps=2",
    ]
    rows = read_rows(run("scaling", *arguments), path)
    assert rows.keys() == {
        "1_device_step",
        "1_device_images_a_second",
        "1_device_rounding_largest_difference",
        "1_device_rounding_relative_difference",
        "2_devices_step",
        "2_devices_images_a_second",
        "2_devices_speed_over_1_device",
        "2_devices_largest_difference",
        "2_devices_relative_difference",
    }
    assert rows["2_devices_relative_difference"]["value"] < 1e-3
    assert 0.0 < rows["1_device_rounding_relative_difference"]["value"] < 1e-2


@pytest.mark.parametrize(
    ("module", "argument", "names"),
    [
        ("train_step", "--stages=warmup", "warmup"),
        ("scaling", "--devices=2,4", "--devices=2,4"),
        ("scaling", "--devices=1,3", "3 devices"),
    ],
)
def test_mistakes_end_in_one_line(module, argument, names, tmp_path):
    finished = run(module, f"--output={tmp_path / 'x.json'}", argument)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1
    assert names in finished.stderr
