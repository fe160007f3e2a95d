"""Our numbers against the authors' program, where its reference files are at hand."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

from benchmarks import (
    reference_cases,
    reference_files,
    reference_parity,
    reference_weights,
    reporting,
)
from instanas_jax import controller, supernet
from instanas_jax.errors import InputError
from instanas_jax.search_space import SupernetSpec, preset

ROOT = pathlib.Path(__file__).resolve().parent.parent
REFERENCE_DIR = pathlib.Path(
    os.environ.get("INSTANAS_REFERENCE_DIR", ROOT.parent / "shared" / "golden")
)
ARRAYS = REFERENCE_DIR / "instanas_reference.npz"
MANIFEST = REFERENCE_DIR / "instanas_reference_manifest.json"

TINY = preset("tiny", num_classes=7)


@pytest.fixture(scope="module")
def reference() -> reference_files.Reference:
    if not (ARRAYS.exists() and MANIFEST.exists()):
        pytest.skip(f"no reference files in {REFERENCE_DIR}: set INSTANAS_REFERENCE_DIR")
    return reference_files.load(str(ARRAYS), str(MANIFEST))


def assert_all_pass(cases) -> None:
    cases = list(cases)
    assert cases
    failures = [case for case in cases if not case.passes]
    assert not failures, failures


class TestAgainstTheOriginal:
    def test_supernet_eval(self, reference):
        assert_all_pass(reference_parity.check_supernet_eval(reference, "c100"))

    def test_supernet_train(self, reference):
        assert_all_pass(reference_parity.check_supernet_train(reference))

    @pytest.mark.parametrize("network", ["c100", "imagenet"])
    def test_controller(self, reference, network: str):
        assert_all_pass(reference_parity.check_controller(reference, network))

    @pytest.mark.parametrize(
        "check",
        [
            reference_parity.check_latency,
            reference_parity.check_reward,
            reference_parity.check_search_loss,
        ],
    )
    def test_search_mathematics(self, reference, check):
        assert_all_pass(check(reference))


def original_shapes(spec: SupernetSpec) -> dict[str, tuple[int, ...]]:
    """State-dict names and shapes of the original supernet, written down from its naming rules."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv_bn(conv: str, norm: str, *shape: int) -> None:
        shapes[f"{conv}.weight"] = shape
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{tensor}"] = (shape[0],)
        shapes[f"{norm}.num_batches_tracked"] = ()

    conv_bn("conv1", "bn1", spec.stem_channels, 3, 3, 3)
    for index, cell in enumerate(spec.cells):
        wide, out = cell.in_channels, cell.out_channels
        for op, (kernel, expansion) in enumerate(((3, 6), (3, 3), (5, 6), (5, 3))):
            name, hidden = f"layers.{index}.{op}", wide * expansion
            conv_bn(f"{name}.conv1", f"{name}.bn1", hidden, wide, 1, 1)
            conv_bn(f"{name}.conv2", f"{name}.bn2", hidden, 1, kernel, kernel)
            conv_bn(f"{name}.conv3", f"{name}.bn3", out, hidden, 1, 1)
            conv_bn(f"{name}.shortcut.0", f"{name}.shortcut.1", out, wide, 1, 1)
        name = f"layers.{index}.4"
        conv_bn(f"{name}.conv1", f"{name}.bn1", out, wide, 3, 3)
        conv_bn(f"{name}.conv2", f"{name}.bn2", out, out, 3, 3)
    conv_bn("conv2", "bn2", spec.head_channels, out, 1, 1)
    shapes["linear.weight"] = (spec.num_classes, spec.head_channels)
    shapes["linear.bias"] = (spec.num_classes,)
    return shapes


def convert_tiny(shapes: dict[str, tuple[int, ...]]) -> dict:
    network = reference_weights.supernet_layers(TINY, shapes)
    return reference_weights.convert(network, shapes, prefix="seed/")


def shapes_of(tree) -> dict:
    return jax.tree.map(lambda leaf: tuple(leaf.shape), tree)


class TestConversion:
    def test_tree_is_the_one_that_our_supernet_initialises(self):
        ours = supernet.init(jax.random.key(0), TINY)
        assert shapes_of(convert_tiny(original_shapes(TINY))) == shapes_of(ours)

    @pytest.mark.parametrize("name", ["px32", "px224"])
    def test_tree_is_the_one_that_our_controller_initialises(self, name: str):
        spec = preset(name, num_classes=10)
        network = reference_weights.controller_layers(spec)
        # The controllers' names are checked against the real manifest, when it is at hand.
        shapes = {f"{layer.convolution}.weight": layer.shape for layer in network.layers}
        for layer in network.layers:
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{layer.batch_norm}.{tensor}"] = (layer.out_channels,)
        shapes |= {"logit.weight": network.linear.shape, "logit.bias": (85,)}
        variables = reference_weights.convert(network, shapes, prefix="")
        assert shapes_of(variables) == shapes_of(controller.init(jax.random.key(0), spec))

    def test_ops_lie_side_by_side(self):
        """Cell 1 has 8 channels in: expansions of 48, 24, 48 and 24 channels."""
        params = convert_tiny(original_shapes(TINY))["params"]["cell_01"]

        def drawn(name: str, *shape: int) -> np.ndarray:
            return reference_weights.draw(name, shape, prefix="seed/")

        expand = drawn("layers.1.2.conv1.weight", 48, 8, 1, 1)
        np.testing.assert_array_equal(params["expand"]["kernel"][:, 72:120], expand[:, :, 0, 0].T)
        depthwise = drawn("layers.1.3.conv2.weight", 24, 1, 5, 5)
        ours = params["depthwise_k5"]["kernel"][:, :, 48:72]
        np.testing.assert_array_equal(ours[1, 4], depthwise[:, 0, 1, 4])
        np.testing.assert_array_equal(
            params["depthwise_k3"]["bias"][48:], drawn("layers.1.1.bn2.bias", 24)
        )
        project = drawn("layers.1.1.conv3.weight", 16, 24, 1, 1)
        ours = params["project_mbconv_k3_e3"]["kernel"]
        np.testing.assert_array_equal(ours, project[:, :, 0, 0].T)
        basic = drawn("layers.1.4.conv1.weight", 16, 8, 3, 3)
        ours = params["basic_first"]["kernel"]
        np.testing.assert_array_equal(ours[2, 0, 5, 7], basic[7, 5, 2, 0])

    def test_cutting_back_gives_every_tensor_that_counts(self):
        shapes = original_shapes(TINY)
        variables = convert_tiny(shapes)
        network = reference_weights.supernet_layers(TINY, shapes)
        tensors = reference_weights.split_params(network, variables["params"])
        tensors |= reference_weights.split_running_means(network, variables["batch_stats"])
        wanted = {name for name in shapes if not reference_weights.is_unused(name)}
        assert set(tensors) == {name for name in wanted if not name.endswith("running_var")}
        for name, values in tensors.items():
            drawn = reference_weights.draw(name, shapes[name], prefix="seed/")
            np.testing.assert_array_equal(np.sort(values, axis=None), np.sort(drawn, axis=None))

    def test_prefix_changes_the_draw(self):
        first, second = (
            reference_weights.draw("bn1.bias", (4,), prefix=prefix) for prefix in ("a/", "b/")
        )
        assert not np.allclose(first, second)

    def test_missing_tensor_is_named(self):
        shapes = original_shapes(TINY)
        del shapes["layers.2.3.bn2.running_var"]
        with pytest.raises(InputError, match=r"lacks tensor 'layers\.2\.3\.bn2\.running_var'"):
            convert_tiny(shapes)

    def test_wrong_shape_is_named_with_both(self):
        shapes = original_shapes(TINY)
        shapes["conv1.weight"] = (8, 3, 5, 5)
        with pytest.raises(InputError, match=r"'conv1\.weight' of shape \[8, 3, 5, 5\].*3, 3\]"):
            convert_tiny(shapes)

    def test_tensor_without_a_place_is_named(self):
        shapes = original_shapes(TINY) | {"layers.9.0.conv1.weight": (1, 1, 1, 1)}
        with pytest.raises(InputError, match=r"no place .*'layers\.9\.0\.conv1\.weight'"):
            convert_tiny(shapes)

    def test_missing_network_is_named(self):
        with pytest.raises(InputError, match="no 'supernet_c100'"):
            reference_files.Reference({}, {}).supernet("c100")


class TestNorms:
    def test_vector_median_and_worst_by_hand(self):
        """Norms 5 and 2 against 5 and 1: off by 1 in sqrt(26) together, by 0 and 1 alone."""
        tensors = {"a": np.array([3.0, 4.0]), "b": np.array([2.0])}
        vector, median, worst = reference_cases.compare_norms(
            "n", tensors, {"a": 5.0, "b": 1.0}, tolerance=0.2, worst_tolerance=0.5
        )
        assert vector.error == pytest.approx(1 / 26**0.5) and vector.passes
        assert median.error == pytest.approx(0.5) and not median.passes
        assert worst.error == pytest.approx(1.0) and worst.worst == "b" and not worst.passes

    def test_floor_forgives_rounding_noise(self):
        tensors = {"a": np.array([5.0]), "b": np.array([2e-9])}
        *_, worst = reference_cases.compare_norms(
            "n", tensors, {"a": 5.0, "b": 0.0}, tolerance=1, worst_tolerance=1e-2, floor=1e-6
        )
        assert worst.error == pytest.approx(2e-9 / 5e-6) and worst.passes

    def test_nan_fails(self):
        cases = reference_cases.compare_norms(
            "n", {"a": np.array([np.nan])}, {"a": 1.0}, tolerance=1.0, worst_tolerance=1.0
        )
        assert not any(case.passes for case in cases)


class TestProgram:
    def run(self, capsys, **values) -> tuple[int, str]:
        """Exit status and errors, as `flags.start` makes them."""
        with flagsaver.flagsaver(**values):
            try:
                status = reference_parity._compare()
            except InputError as error:
                return 2, f"error: {error}\n"
        return status, capsys.readouterr().err

    @pytest.fixture(autouse=True)
    def parsed_flags(self):
        with flagsaver.flagsaver():
            reference_parity.flags.FLAGS(["reference_parity"])
            yield

    def test_missing_flag(self, capsys):
        assert self.run(capsys) == (
            2,
            "error: --reference is missing: give the path of the reference's file\n",
        )

    @pytest.mark.parametrize("content", [None, b"", b"not an archive", b"PK\x03\x04 cut short"])
    def test_missing_or_bad_archive(self, capsys, tmp_path, content: bytes | None):
        archive = tmp_path / "reference.npz"
        if content is not None:
            archive.write_bytes(content)
        status, message = self.run(capsys, reference=str(archive), manifest="unread.json")
        assert status == 2
        assert message.startswith("error: ") and message.count("\n") == 1
        assert "reference.npz" in message

    def test_single_array_is_refused(self, capsys, tmp_path):
        np.save(tmp_path / "array.npy", np.zeros(3))
        path = str(tmp_path / "array.npy")
        status, message = self.run(capsys, reference=path, manifest="unread.json")
        assert status == 2 and message.count("\n") == 1 and "not an .npz" in message

    @pytest.mark.parametrize("content", ["[1, 2]", "{", "{}"])
    def test_bad_manifest(self, capsys, tmp_path, content: str):
        np.savez(tmp_path / "reference.npz", unrelated=np.zeros(3))
        (tmp_path / "manifest.json").write_text(content)
        status, message = self.run(
            capsys,
            reference=str(tmp_path / "reference.npz"),
            manifest=str(tmp_path / "manifest.json"),
        )
        assert status == 2 and message.startswith("error: ") and message.count("\n") == 1

    def test_case_over_its_tolerance_is_named(self, capsys, tmp_path, monkeypatch):
        np.savez(tmp_path / "reference.npz")
        (tmp_path / "manifest.json").write_text("{}")
        cases = [reference_cases.Case("good", 0.0), reference_cases.Case("bad", 0.5)]
        monkeypatch.setattr(reference_parity, "CHECKS", (lambda reference: iter(cases),))
        status, message = self.run(
            capsys,
            reference=str(tmp_path / "reference.npz"),
            manifest=str(tmp_path / "manifest.json"),
            output=str(tmp_path / "new" / "report.json"),
        )
        assert (status, message) == (1, "error: over the tolerance: bad\n")
        report = json.loads((tmp_path / "new" / "report.json").read_text())
        assert [(row["name"], row["value"]) for row in report["results"]] == [
            ("good", 0.0),
            ("bad", 0.5),
        ]
        assert all(row["unit"] == "relative_error" for row in report["results"])
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]

    def start(self, argument: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.reference_parity", argument],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    @pytest.mark.parametrize("argument", ["--unknown", "name"])
    def test_a_mistyped_command_is_one_line(self, argument: str):
        finished = self.start(argument)
        assert finished.returncode == 2 and finished.stderr.count("\n") == 1
        assert finished.stderr.startswith("error: ") and argument.strip("-") in finished.stderr

    def test_every_flag_is_in_the_help(self):
        shown = self.start("--help").stdout
        assert all(f"--{name}" in shown for name in ("reference", "manifest", "output"))


class TestReporting:
    def test_measurement_by_hand(self):
        assert reporting.measurement("x", [3.0, 1.0, 2.0, 5.0], "ms") == {
            "name": "x",
            "value": 2.5,
            "unit": "ms",
            "min": 1.0,
            "median": 2.5,
            "max": 5.0,
            "repeats": 4,
        }

    def test_figure_that_is_not_finite_is_null(self):
        row = reporting.measurement("x", [float("nan")], "ms")
        assert row["value"] is None and row["max"] is None

    @pytest.mark.parametrize(
        ("argument", "recorded"),
        [
            ("--output=/a/b/c.json", "--output=c.json"),
            ("../c.json", "c.json"),
            ("--workdir=/a/b/", "--workdir=b/"),
            ("--files=a/b,/c/d", "--files=b,d"),
            ("--preset=px32", "--preset=px32"),
        ],
    )
    def test_command_names_no_folder(self, argument: str, recorded: str):
        command = reporting.describe_command("speed", [argument])
        assert command == f"python -m benchmarks.speed {recorded}"
