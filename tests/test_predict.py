"""Answers about images of one's own, from the folder of a finished run."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import comparison, dataset_summary, export, images, predict, trained_run
from experiments.config import Config, ModelConfig
from experiments.stage_config import FinetuneConfig
from experiments.workdir import Workdir, write_json
from instanas_jax import (
    augment,
    checkpoint,
    controller,
    convolution,
    data,
    environment,
    inference,
    latency,
    latency_file,
    onnx_graph,
    onnx_model,
    policy,
    search_space,
    supernet,
    train_state,
)
from instanas_jax.errors import InputError
from tests.networks import as_if_trained

ROOT = Path(__file__).parent.parent
DATASET = data.load("synthetic", validation_size=16, train_limit=64)
TEST_IMAGES = DATASET.test.images
CONFIG = Config(
    "synthetic",
    model=ModelConfig(preset="tiny"),
    finetune=FinetuneConfig(epochs=0.5, batch_size=16),
)
FINAL_STEP = 2  # Half a pass over 64 images, 16 at a time.


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """What a run leaves behind, with networks that were never trained.

    A decides by the image; B is settled. (`tests/test_experiments.py` opens folders of real runs.)
    """
    path = tmp_path_factory.mktemp("predict") / "run"
    workdir = Workdir(str(path), config=CONFIG, flags_text="")
    dataset_summary.keep(DATASET, workdir.dataset)
    spec = CONFIG.model.spec(num_classes=DATASET.num_classes)
    table = latency.LatencyTable(
        backend="cpu",
        device=environment.describe_device(),
        versions={},
        spec=spec.to_json(),
        batch_size=1,
        dtype="float32",
        fixed_ms={"stem": 100.0, "head": 200.0, "controller": 400.0},
        cells_ms=np.arange(1.0, 21.0).reshape(spec.mask_shape),
        settled_ms=np.arange(1.0, 21.0).reshape(spec.mask_shape),
        spread_ms=np.zeros(spec.mask_shape),
        repeats=1,
        in_network_ms=dict.fromkeys(latency.IN_NETWORK, 0.0),
    )
    latency_file.save(table, workdir.latency_table)
    state = train_state.create(jax.random.key(0), spec)
    state = state.replace(
        supernet=as_if_trained(state.supernet), controller=as_if_trained(state.controller)
    )
    settled = policy.Settled.by_masks(
        np.random.default_rng(1).uniform(size=(1, *spec.mask_shape)) < 0.4
    )
    controllers = {"A": state.controller, "B": controller.settle(state.controller, settled)}
    for name, variables in controllers.items():
        checkpoints = checkpoint.StageCheckpoints(workdir.checkpoints(f"finetune_{name}"))
        final = train_state.ravel(jax.device_get(state.replace(controller=variables)))
        earlier = jax.tree.map(np.zeros_like, final)
        for step, saved in ((1, earlier), (FINAL_STEP, final)):
            checkpoints.save(step, {"state": saved, "seconds": np.zeros(())})
        checkpoints.close()
    rows = [
        {
            "name": name,
            "validation_accuracy": 0.5,
            "measured_ms": 1.0,
            # At these thresholds everything that is undecided is on, as trained, and off.
            "budget": {"curve": {"thresholds": [-19.0, 0.0, 19.0], "table_ms": [9.0, 5.0, 1.0]}},
        }
        for name in controllers
    ]
    write_json(workdir.results, {"variants": rows})
    return path


@pytest.fixture
def copy(workdir, tmp_path) -> Path:
    """A copy to damage."""
    shutil.copytree(workdir, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(TEST_IMAGES[index]).save(folder / f"{index}.png")
    return folder


def execute(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.predict", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("variant", ["A", "B"])
def test_answers_are_the_masked_supernets(workdir, variant):
    """Class, confidence, mask and table time, computed with all paths of the whole state."""
    opened = trained_run.open_run(str(workdir))
    spec = opened.spec
    fresh = train_state.ravel(train_state.create(jax.random.key(1), spec))
    checkpoints = checkpoint.StageCheckpoints(workdir / f"checkpoints/finetune_{variant}")
    saved = checkpoints.restore(FINAL_STEP, {"state": fresh, "seconds": np.zeros(())})
    state = train_state.unravel(saved["state"])
    pixels = augment.normalise(TEST_IMAGES[:6], mean=DATASET.mean, std=DATASET.std)
    policy_logits = controller.apply_eval(
        spec, controller.fold(state.controller), pixels, lowering="native"
    )
    masks = np.asarray(policy.greedy(policy_logits))
    class_logits = supernet.apply_eval(
        spec, supernet.fold(state.supernet), pixels, masks, lowering="native"
    )
    ran = np.asarray(policy.resolve_empty_cells(masks, spec.forced_cells)[0])
    probabilities = np.asarray(jax.nn.softmax(class_logits))
    architectures = len(np.unique(ran, axis=0))
    assert architectures > 1 if variant == "A" else architectures == 1

    predictor = predict.Predictor(opened, variant, top=10)
    for index in range(6):
        answer = predictor(TEST_IMAGES[index])
        by_name = dict(answer.classes)
        assert list(by_name.values()) == sorted(by_name.values(), reverse=True)
        np.testing.assert_allclose(
            [by_name[name] for name in DATASET.class_names], probabilities[index], atol=1e-4
        )
        np.testing.assert_array_equal(answer.architecture, masks[index])
        # Whole numbers of milliseconds: stem and head, the controller where it runs, and cells.
        fixed_ms = 700.0 if variant == "A" else 300.0
        cells_ms = (ran[index] * np.arange(1.0, 21.0).reshape(4, 5)).sum()
        assert answer.table_ms == fixed_ms + cells_ms
        assert answer.measured_ms > 0.0


@pytest.mark.parametrize("variant", ["A", "B"])
def test_a_budget_moves_what_is_undecided(workdir, variant):
    opened = trained_run.open_run(str(workdir))
    variables = trained_run.restore_networks(opened, variant)["controller"]
    settled = controller.settled(opened.spec, variables)
    as_trained = predict.Predictor(opened, variant, top=1)(TEST_IMAGES[0]).architecture
    masks = [
        predict.Predictor(opened, variant, top=1, budget_ms=ms)(TEST_IMAGES[0]).architecture
        for ms in (9.0, 5.0, 1.0)
    ]
    np.testing.assert_array_equal(masks[0], ~settled.off)
    np.testing.assert_array_equal(masks[1], as_trained)
    np.testing.assert_array_equal(masks[2], settled.on)


@pytest.mark.parametrize("variant", ["A", "B"])
def test_a_limit_is_kept_by_every_image(workdir, variant):
    opened = trained_run.open_run(str(workdir))
    free = predict.Predictor(opened, variant, top=1)
    times = [free(image).table_ms for image in TEST_IMAGES[:6]]
    with pytest.raises(InputError, match="less than") as error:
        predict.Predictor(opened, variant, top=1, limit_ms=1.0)
    least_ms = float(re.findall(r"less than ([0-9.]+) ms", str(error.value))[0])
    limit_ms = (least_ms + max(times)) / 2
    limited = predict.Predictor(opened, variant, top=1, limit_ms=limit_ms)
    for image, time in zip(TEST_IMAGES[:6], times, strict=True):
        table_ms = limited(image).table_ms
        assert table_ms <= limit_ms and (time > limit_ms or table_ms == time)


def test_a_budget_that_cannot_be_met(workdir, copy, pictures):
    done = execute(f"--workdir={workdir}", "--latency_budget_ms=10", pictures)
    assert done.returncode == 2 and "1.000 to 9.000 ms" in done.stderr and not done.stdout
    write_json(copy / "results.json", {"variants": [{"name": "A"}]})
    done = execute(f"--workdir={copy}", "--variant=A", "--latency_budget_ms=5", pictures)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "repeat" in done.stderr


def test_good_images_are_answered_among_bad_ones(workdir, pictures):
    """Through the real program, flags among the names."""
    (pictures / "1a_letter.png").write_text("Dear Sir or Madam,")
    whole = (pictures / "2.png").read_bytes()
    (pictures / "1b_cut.png").write_bytes(whole[: len(whole) // 2])
    absent = pictures.parent / "absent.jpg"
    done = execute(
        absent, pictures, "--json", f"--workdir={workdir}", "--top=2", pictures / "0.png"
    )
    assert done.returncode == 1
    errors = done.stderr.splitlines()
    assert [error.split(": ")[0] for error in errors] == ["error"] * 3, done.stderr
    for error, name in zip(errors, ("absent.jpg", "1a_letter.png", "1b_cut.png"), strict=True):
        assert name in error
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(answer["image"]).name for answer in answers] == [
        "0.png",
        "1.png",
        "2.png",
        "0.png",
    ]
    for answer in answers:
        assert [set(row) for row in answer["classes"]] == [{"name", "confidence"}] * 2
        assert len(answer["architecture"]) == 4 and answer["measured_ms"] > 0.0
        assert answer["variant"] in ("A", "B") and answer["table_ms"] > 0.0


def test_text_names_class_cells_and_times(workdir, pictures):
    done = execute(f"--workdir={workdir}", "--variant=B", pictures / "0.png")
    assert done.returncode == 0 and done.stderr == ""
    header, classes, cells, times = done.stdout.splitlines()
    assert header == "variant B of synthetic"
    assert classes.startswith(f"{pictures / '0.png'}: class_") and classes.count("%") == 3
    assert cells.startswith("  0")
    assert "table" in times and "measured" in times and times.endswith(" ms")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no image is named"),
        (["a.png"], "--workdir is not set"),
        (["a.png", "--workdir=/nowhere"], "holds no config.json"),
        (["a.png", "--top=0"], "top"),
        (["a.png", "--varaint=A"], "varaint"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments, message):
    done = execute(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_no_data_are_read(workdir, pictures, monkeypatch, capsys):
    def forbidden(*arguments, **options):
        raise AssertionError("the data set was opened")

    monkeypatch.setattr("instanas_jax.data_sources.open_source", forbidden)
    opened = trained_run.open_run(str(workdir))
    predictor = predict.Predictor(opened, "A", top=1)
    failures = predict.answer_all([str(pictures)], predictor, opened, variant="A", as_json=True)
    assert failures == 0 and len(capsys.readouterr().out.splitlines()) == 3


def test_a_comparison_in_a_folder_in_use_touches_nothing(copy, monkeypatch):
    def in_use(*_, **__):
        raise InputError("in use by another process")

    monkeypatch.setattr(comparison, "Workdir", in_use)
    before = sorted(copy.iterdir())
    finished = comparison.Finished(trained_run.open_run(str(copy)), "B", {}, DATASET)
    with pytest.raises(InputError, match="in use"):
        comparison.open_pipeline(finished, copy / "static_search.json")
    assert sorted(copy.iterdir()) == before


class TestChoice:
    def rate(self, workdir: Path, **rows: tuple[float, float]) -> None:
        """Writes a results.json with these validation accuracies and measured milliseconds."""
        variants = [
            {"name": name, "validation_accuracy": accuracy, "measured_ms": ms}
            for name, (accuracy, ms) in rows.items()
        ]
        write_json(workdir / "results.json", {"variants": variants})

    @pytest.mark.parametrize(
        ("a", "b", "chosen"),
        [
            ((0.9, 1.0), (0.8, 0.5), "A"),
            ((0.8, 0.5), (0.9, 1.0), "B"),
            ((0.9, 1.0), (0.9, 0.5), "B"),
            ((0.9, 0.5), (0.9, 1.0), "A"),
        ],
    )
    def test_the_most_accurate_then_the_fastest(self, copy, a, b, chosen):
        self.rate(copy, A=a, B=b)
        opened = trained_run.open_run(str(copy))
        assert trained_run.choose_variant(opened) == chosen
        assert trained_run.choose_variant(opened, "A") == "A"

    def test_without_results_the_last_that_is_finished(self, copy):
        (copy / "results.json").unlink()
        opened = trained_run.open_run(str(copy))
        assert trained_run.choose_variant(opened) == "B"
        shutil.rmtree(copy / f"checkpoints/finetune_B/{FINAL_STEP}")
        assert trained_run.choose_variant(opened) == "A"
        with pytest.raises(InputError, match="no finished variant B: choose --variant from A, or"):
            trained_run.choose_variant(opened, "B")
        shutil.rmtree(copy / "checkpoints/finetune_A")
        with pytest.raises(InputError, match="no finished variant: repeat the command"):
            trained_run.choose_variant(opened)
        assert not (copy / "checkpoints/finetune_A").exists()

    def test_an_unknown_name_is_refused_with_the_known_ones(self, workdir):
        opened = trained_run.open_run(str(workdir))
        with pytest.raises(InputError, match="no finished variant Z: choose --variant from A, B"):
            trained_run.choose_variant(opened, "Z")

    def test_damaged_results_name_the_remedy(self, copy):
        (copy / "results.json").write_text("{")
        with pytest.raises(InputError, match="choose a --variant"):
            trained_run.choose_variant(trained_run.open_run(str(copy)))


class TestDamage:
    """Whatever is wrong with a run's folder is one line with a remedy."""

    def test_a_run_from_before_there_was_a_summary(self, copy):
        (copy / "dataset.json").unlink()
        with pytest.raises(InputError, match="dataset.json does not exist.*repeat the command"):
            trained_run.open_run(str(copy))

    @pytest.mark.parametrize(
        ("file", "field", "value", "message"),
        [
            ("dataset.json", "std", [0.2, 0.0, 0.2], "std is"),
            ("dataset.json", "channels", 1, "1 channels"),
            ("dataset.json", "class_names", None, "misstates a field"),
            ("dataset.json", "image_size", 64, "64 pixels.*reads 32"),
            ("dataset.json", "schema_version", 9, "schema_version is 9"),
            ("config.json", "run", {"seeds": 3}, "does not fit this program.*seeds"),
            ("config.json", "model", {"width": 9.0}, "--width=9.0"),
            ("config.json", "model", {"width": "wide"}, "does not fit this program"),
        ],
    )
    def test_a_field_that_makes_no_sense(self, copy, file, field, value, message):
        values = json.loads((copy / file).read_text())
        write_json(copy / file, values | {field: value})
        with pytest.raises(InputError, match=message) as caught:
            trained_run.open_run(str(copy))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("file", ["dataset.json", "config.json", "latency_table.json"])
    def test_a_file_that_is_no_json(self, copy, file):
        (copy / file).write_text('{"name":')
        with pytest.raises(InputError, match="is not JSON"):
            trained_run.open_run(str(copy))

    def test_a_lost_table_is_measured_by_the_run(self, copy):
        (copy / "latency_table.json").unlink()
        with pytest.raises(InputError, match="results.json.*repeat the command of the run"):
            trained_run.open_run(str(copy))

    def test_a_run_without_results_is_told_to_be_unfinished(self, copy):
        (copy / "results.json").unlink()
        with pytest.raises(InputError, match="does not exist, so the run is not finished"):
            trained_run.results_row(trained_run.open_run(str(copy)), "A")

    def test_a_damaged_checkpoint(self, copy):
        for path in (copy / "checkpoints/finetune_A").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
        with pytest.raises(InputError, match="checkpoint is damaged.*copy the run"):
            trained_run.restore_networks(trained_run.open_run(str(copy)), "A")

    @pytest.mark.parametrize(
        "model", [{"preset": "tiny", "head_channels": 40}, {"preset": "px32", "width": 0.25}]
    )
    def test_checkpoints_of_other_networks(self, copy, model):
        values = json.loads((copy / "config.json").read_text())
        write_json(copy / "config.json", values | {"model": model})
        table = json.loads((copy / "latency_table.json").read_text())
        spec = Config.from_json(values | {"model": model}).model.spec(num_classes=10)
        times = np.ones(spec.mask_shape).tolist()
        table |= {"spec": spec.to_json(), "cells_ms": times, "spread_ms": times}
        table["settled_ms"] = times
        write_json(copy / "latency_table.json", table)
        with pytest.raises(InputError, match="networks that config.json describes"):
            trained_run.restore_networks(trained_run.open_run(str(copy)), "A")

    @pytest.mark.parametrize(
        ("value", "message"),
        [(np.nan, "parameters that are no numbers.*choose"), (3e38, "variant A gives .*choose")],
    )
    def test_a_diverged_network(self, workdir, monkeypatch, value, message):
        opened = trained_run.open_run(str(workdir))
        networks = trained_run.restore_networks(opened, "A")
        networks["supernet"]["params"]["classifier"]["kernel"][:] = value
        monkeypatch.setattr(trained_run, "restore_networks", lambda *arguments: networks)
        with pytest.raises(InputError, match=message):
            predict.Predictor(opened, "A", top=1)(TEST_IMAGES[0])


def test_the_configuration_survives_its_json():
    assert Config.from_json(json.loads(json.dumps(CONFIG.to_json()))) == CONFIG


@pytest.mark.parametrize("start_op", [["mbconv_k3_e6", "mbconv_k3_e3"], 3])
def test_a_setting_of_another_type_is_one_line(start_op):
    values = Config("digits").to_json()
    values["search"]["start_op"] = start_op
    with pytest.raises(InputError, match="of another type"):
        Config.from_json(values)


def test_the_summary_is_written_once_and_whole(tmp_path):
    path = tmp_path / "dataset.json"
    dataset_summary.keep(DATASET, path)
    summary = dataset_summary.load(path)
    assert (summary.name, summary.class_names) == ("synthetic", DATASET.class_names)
    assert (summary.mean, summary.std) == (DATASET.mean, DATASET.std)
    assert (summary.image_size, summary.channels, summary.train_images) == (32, 3, 64)
    path.write_text("kept")
    dataset_summary.keep(DATASET, path)
    assert path.read_text() == "kept"
    assert [file.name for file in tmp_path.iterdir()] == ["dataset.json"]
    with pytest.raises(InputError, match="cannot be written"):
        dataset_summary.keep(DATASET, tmp_path / "none" / "dataset.json")


def test_a_path_stays_on_one_line():
    assert images.printable("a b/é.png") == "a b/é.png"
    assert "\n" not in images.printable("a\nb.png")
    assert images.printable("") == "''"
    images.printable("\udcff.png").encode()  # A name that is not UTF-8.


class TestExport:
    """One file that answers as the run's folder does."""

    def run(self, *arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "experiments.export", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    @pytest.mark.parametrize(
        "settings", [["--variant=A", "--latency_budget_ms=3"], ["--variant=B"]]
    )
    def test_answers_are_those_of_predict(self, workdir, tmp_path, settings):
        target = tmp_path / "new" / "variant.onnx"
        done = self.run(f"--workdir={workdir}", f"--output={target}", *settings)
        assert done.returncode == 0, done.stderr
        assert "as this program does (relative error" in done.stdout
        ms = r"\d+\.\d\d\d ms"
        assert re.search(rf"one image takes {ms} in ONNX Runtime, {ms} in this", done.stdout)
        assert re.search(rf"MobileNetV2 of this width {ms} in ONNX Runtime", done.stdout)
        budget_ms = 3.0 if len(settings) > 1 else None
        opened = trained_run.open_run(str(workdir))
        variant = settings[0][-1]
        ours = predict.Predictor(opened, variant, top=1, budget_ms=budget_ms)
        session = onnx_graph.session(target.read_bytes(), threads=1)
        described = session.get_modelmeta().custom_metadata_map
        names = json.loads(described["class_names"])
        assert (described["variant"], described["dataset"]) == (variant, "synthetic")
        for image in TEST_IMAGES[:4]:
            class_logits, mask = session.run(["class_logits", "mask"], {"image": image[None]})
            answer = ours(image)
            assert answer.classes[0][0] == names[int(class_logits.argmax())]
            np.testing.assert_array_equal(mask[0], answer.architecture > 0.5)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "--output is not set"),
            (["--output={folder}"], "is a folder: name a file"),
            (["--output={folder}/a.onnx", "--variant=C"], "no finished variant C"),
            (["--output={folder}/a.onnx", "--latency_budget_ms=99"], "99"),
        ],
    )
    def test_a_mistake_is_one_line_and_no_file(self, workdir, tmp_path, arguments, message):
        given = [argument.format(folder=tmp_path) for argument in arguments]
        done = self.run(f"--workdir={workdir}", *given)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1 and message in done.stderr
        assert not list(tmp_path.iterdir())

    def test_a_model_that_answers_otherwise_is_refused(self, workdir):
        opened = trained_run.open_run(str(workdir))
        state = {
            name: export.state_of(opened, trained_run.networks_at(opened, name, None))
            for name in "AB"
        }
        content = onnx_model.serialise(opened.spec, **state["A"])
        predictor = inference.make_predictor(
            opened.spec, lowering=convolution.default_lowering(), **state["B"]
        )
        images = export.made_up_images(opened.spec.image_size)
        with pytest.raises(InputError, match="answers otherwise"):
            export.compare(predictor, export.open_model(content, threads=1), images)

    @pytest.mark.parametrize("place", [0, 1])
    def test_an_answer_that_is_no_number_is_refused(self, place):
        count = itertools.count()

        def ours(_):
            return np.full(3, np.nan if next(count) == place else 1.0), np.ones((2, 5))

        def exported(_):
            return np.ones(3), np.ones((2, 5))

        with pytest.raises(InputError, match="answers otherwise .* nan"):
            export.compare(ours, exported, np.zeros((4, 8, 8, 3)))

    def test_it_is_timed_beside_mobilenetv2(self, workdir):
        opened = trained_run.open_run(str(workdir))
        state = export.state_of(opened, trained_run.networks_at(opened, "B", None))
        rival = export.open_model(export.mobilenetv2(opened.spec, state), threads=1)
        del state["controller_variables"]
        architecture = search_space.uniform_architecture(opened.spec, search_space.MOBILENETV2_OP)
        ours = inference.make_static_predictor(
            opened.spec,
            architecture=architecture,
            lowering=convolution.default_lowering(),
            **state,
        )
        (class_logits, mask), (expected, _) = rival(TEST_IMAGES[0]), ours(TEST_IMAGES[0])
        np.testing.assert_allclose(class_logits, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(mask, architecture > 0.5)
