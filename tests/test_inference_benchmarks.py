"""The benchmarks of inference: which images and masks they take, and whose answers they compare."""

import subprocess
import sys
import types

import numpy as np
import pytest

from benchmarks import latency_fidelity, skip_speedup, turns
from benchmarks.subjects import PEERS, Subjects
from experiments import flags as flags_lib
from instanas_jax import search_space
from instanas_jax.errors import InputError

SPEC = search_space.preset("tiny", num_classes=10)


def masks_of(architectures: list[int]) -> np.ndarray:
    """[N, 1, 4], equal where numbers are; the first in the order of masks is 0."""
    return np.array([[[number >> bit & 1 for bit in (3, 2, 1, 0)]] for number in architectures])


def chosen_places(architectures: list[int], count: int) -> list[int]:
    subjects = types.SimpleNamespace(
        images=np.arange(len(architectures)), decide=lambda images: masks_of(architectures)
    )
    places, masks = latency_fidelity._image_of_each_architecture(subjects, count)  # pyright: ignore
    np.testing.assert_array_equal(masks, masks_of(architectures)[places])
    return places.tolist()


def test_fidelity_takes_the_first_image_of_each_architecture():
    """Not those of the first masks in order, whose early cells are empty."""
    assert chosen_places([9, 9, 3, 1, 3, 0], 3) == [0, 2, 3]
    assert chosen_places([9, 9, 3, 1, 3, 0], 6) == [0, 2, 3, 5]


def test_fidelity_is_of_undisturbed_times_and_beside_what_a_repeat_would_reach():
    """Three networks, which half of the rounds takes for 1, 2 and 4 ms, the other for 2, 1, 4."""
    times_ms = np.array([[1.0, 2.0, 4.0], [2.0, 1.0, 4.0]] * 20)
    times_ms[5] = 100.0  # Disturbed.
    rows = latency_fidelity._rows("case", np.array([1.0, 1.0, 5.0]), times_ms)
    values = {row["name"]: row["value"] for row in rows}
    assert values["case_measured"] == 1.0  # All lower deciles are 1, 1 and 4.
    assert values["case_mean_absolute_error"] == pytest.approx(0.25 / 3)
    assert values["case_worst_error"] == pytest.approx(0.25)
    assert values["case_bias"] == pytest.approx(0.25 / 3)
    assert values["case_kendall_tau"] == pytest.approx(1.0)
    assert values["case_repeat_mean_absolute_error"] == pytest.approx((0.5 + 1.0) / 3)
    assert values["case_repeat_kendall_tau"] == pytest.approx(1 / 3)


def test_a_trained_variant_answers_under_its_most_frequent_masks():
    places = skip_speedup._trained_images(masks_of([5, 2, 7, 2, 7, 7, 1, 1, 2, 2]))
    assert places == {"trained_1": 1, "trained_2": 2, "trained_3": 6}


def test_ratios_are_of_turns_and_times_of_calls():
    row = turns._TIMED_CALLS_IN_A_ROW
    times = {"skipping": [1.0] * row + [2.0] * row, "other": [4.0] * row + [6.0] * row}
    rows = {row["name"]: row for row in skip_speedup._rows("case", times)}
    assert rows["case_other"]["value"] == 5.0 and rows["case_other"]["unit"] == "ms"
    ratio = rows["case_other_over_skipping"]  # 4 / 1 and 6 / 2.
    assert ratio["unit"] == "ratio" and (ratio["min"], ratio["value"], ratio["max"]) == (3, 3.5, 4)
    assert "case_skipping_over_skipping" not in rows


@pytest.fixture
def no_peers(monkeypatch):
    monkeypatch.setattr(Subjects, "peers", lambda *_, **__: {})


@pytest.mark.usefixtures("no_peers")
def test_all_executions_of_an_image_agree_under_every_mask():
    subjects = Subjects.random(SPEC, 1)
    for name, mask in subjects.masks().items():
        calls = skip_speedup._one_image(subjects, subjects.images, mask, 1, first=1)
        assert set(calls) == {"skipping", "static_controller", "static", "masked", "exported"}
        skip_speedup._check_answers(name, calls)


def test_a_variant_is_timed_beside_mobilenetv2(monkeypatch):
    """Which answers otherwise."""
    variant, rival = Subjects.random(SPEC, 1), lambda: None
    asked = []

    def peers(self, architecture, images, *, threads, names):
        asked.append((architecture, threads))
        every = {"torch_eager": lambda: None, "onnx_runtime": rival}
        return {name: every[name] for name in names}

    monkeypatch.setattr(Subjects, "peers", peers)
    calls = skip_speedup._mobilenetv2(variant, variant.images, 2)
    assert calls == {"mobilenetv2_onnx_runtime": rival}
    ((architecture, threads),) = asked
    wanted = search_space.uniform_architecture(SPEC, search_space.MOBILENETV2_OP)
    np.testing.assert_array_equal(architecture, wanted)
    assert threads == 2
    monkeypatch.setattr(Subjects, "peers", lambda *_, **__: {})
    assert skip_speedup._mobilenetv2(variant, variant.images, 2) == {}


@pytest.mark.parametrize("threads", [1, 2])
def test_onnx_runtime_on_two_threads_is_timed_beside_ours_on_one(monkeypatch, threads):
    def peers(*_, threads, names=PEERS):
        return dict.fromkeys(names, threads)

    monkeypatch.setattr(Subjects, "peers", peers)
    subjects = Subjects.random(SPEC, 1)
    mask = subjects.masks()["mobilenetv2"]
    calls = skip_speedup._one_image(subjects, subjects.images, mask, threads, first=0)
    assert all(calls[name] == threads for name in PEERS)
    assert calls.get("onnx_runtime_two_threads") == (2 if threads == 1 else None)


@pytest.mark.usefixtures("no_peers")
def test_all_executions_of_a_batch_agree():
    for name, calls in skip_speedup._batches(Subjects.random(SPEC, 11), 4, threads=2).items():
        assert len(calls) >= 2
        skip_speedup._check_answers(name, calls)


def test_an_execution_that_answers_otherwise_is_refused():
    right = np.arange(10.0)
    calls = {"skipping": lambda: (right, None), "static": lambda: right.reshape(1, 10)}
    skip_speedup._check_answers("case", calls)
    calls["masked"] = lambda: right + 0.1
    with pytest.raises(InputError, match="case: masked"):
        skip_speedup._check_answers("case", calls)


def test_a_file_that_can_be_written_leaves_no_trace_until_it_is(tmp_path):
    path = flags_lib.check_output(str(tmp_path / "new/x.json"))
    assert path.parent.is_dir() and not list(path.parent.iterdir())


@pytest.mark.parametrize("name", ["", "file/x.json", "x" * 300 + "/x.json", "x" * 300])
def test_an_output_that_cannot_be_written_is_one_line(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as error:
        flags_lib.check_output(str(tmp_path / name))
    assert "\n" not in str(error.value) and str(error.value).startswith("--output=")


def test_an_output_is_no_device_which_a_file_would_replace():
    with pytest.raises(InputError, match="--output=/dev/null is a device or a pipe"):
        flags_lib.check_output("/dev/null")


@pytest.mark.parametrize("module", ["experiments.profile", "benchmarks.latency_fidelity"])
def test_an_output_is_checked_before_the_work(tmp_path, module):
    finished = subprocess.run(
        [sys.executable, "-m", module, f"--output={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 2
    assert finished.stderr == f"error: --output={tmp_path} is a folder: name a file\n"
