"""The programs that users run: every shipped flagfile, resuming, and mistakes."""

import contextlib
import dataclasses
import datetime
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from absl import flags
from tqdm import tqdm

from experiments import (
    cifar10,
    cifar100,
    digits,
    evaluation,
    imagenet,
    mobilenetv2_widths,
    recipe,
    run,
    stage_runner,
    static_search,
    timing,
    trained_run,
)
from experiments import flags as flags_lib
from experiments import results as results_lib
from experiments.config import Config, DataConfig, ModelConfig, RunConfig, validate_section
from experiments.plans import Planner
from experiments.stage_config import FinetuneConfig, PretrainConfig
from experiments.workdir import RunFiles, Workdir
from instanas_jax import (
    checkpoint,
    controller,
    data,
    data_sources,
    environment,
    feeding,
    latency_file,
    metrics,
    parallel,
    policy,
    search_space,
    train_state,
)
from instanas_jax.augment import Augmentation
from instanas_jax.errors import InputError
from tests import fake_imagenet
from tests.test_latency import make_table
from tests.test_training import fresh_state, make_setting, make_stage

ROOT = Path(__file__).parent.parent
FLAGFILES = sorted((ROOT / "experiments/flagfiles").glob("*.flags"))
PROGRAMS = {"cifar10": cifar10, "cifar100": cifar100, "digits": digits, "imagenet": imagenet}
TINY = [
    "--preset=tiny",
    "--width=1",
    "--stem_stride=0",
    "--data_workers=0",
    "--validation_size=16",
    "--train_limit=64",
    "--test_limit=24",
    "--pretrain_epochs=0.5",
    "--search_epochs=1",
    "--finetune_epochs=0.25",
    "--pretrain_batch_size=16",
    "--search_batch_size=16",
    "--finetune_batch_size=16",
    "--variants=2",
    "--profile_rounds=2",
    "--timed_images=4",
    "--eval_epochs=1",
]

if "workdir" not in flags.FLAGS:
    flags_lib.define(Config("synthetic"))


def parse(*arguments: str) -> None:
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    flags.FLAGS(["test", *arguments])


@pytest.fixture
def fake_data(monkeypatch, tmp_path):
    """Synthetic images instead of any data set; for ImageNet, made-up JPEGs in its format."""
    load = data.load

    def fake(name, **options):
        if name != "imagenet2012":
            return load("synthetic", **options)
        return load(name, **{**options, "data_dir": str(tmp_path / "prepared")})

    fake_imagenet.write(tmp_path / "prepared", train=90, validation=30)
    monkeypatch.setattr(data, "load", fake)
    _time_here(monkeypatch)


def _time_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are not looked at here, and a process of its own is slow to start."""
    monkeypatch.setattr(
        environment,
        "in_inference_process",
        lambda function, *arguments, threads: function(*arguments),
    )


@pytest.fixture
def made_up_table(monkeypatch):
    _make_up_tables(monkeypatch)


def _make_up_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of measuring them, for which more is compiled than for training."""

    def made_up(spec, *, rounds, threads):
        del rounds, threads
        return make_table(spec=json.loads(json.dumps(spec.to_json())))

    monkeypatch.setattr(timing, "measure_table", made_up)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a run of two variants; tests that one worker runs share it."""
    path = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patched:
        _time_here(patched)
        _make_up_tables(patched)
        parse(*TINY, f"--workdir={path}")
        run._run("synthetic")
    return path


@pytest.mark.parametrize("flagfile", FLAGFILES, ids=lambda path: path.stem)
def test_every_shipped_flagfile_runs_to_its_results(
    flagfile, tmp_path, fake_data, capsys, monkeypatch
):
    # Measures its latency table, and has a second variant, which begins as the first does.
    whole = flagfile.stem == "digits"
    if not whole:
        _make_up_tables(monkeypatch)
    variants = ["A", "B"] if whole else ["A"]
    monkeypatch.chdir(ROOT)  # From where flagfiles name others.
    name = PROGRAMS[flagfile.stem.split("_")[0]].DEFAULTS.dataset
    smaller = [*TINY, f"--variants={len(variants)}", f"--workdir={tmp_path / 'run'}"]
    parse(f"--flagfile={flagfile}")
    if "," in flags.FLAGS.search_start_op:
        ops = dict.fromkeys(flags.FLAGS.search_start_op.split(","))
        ops.pop("", None)
        names = (list(ops) * 4)[: ModelConfig(preset="tiny").spec(num_classes=10).num_cells]
        smaller.append(f"--search_start_op={','.join(names)}")
    if whole:
        smaller += ["--finetune_epochs=1", "--finetune_open_share=0.5"]
    parse(f"--flagfile={flagfile}", *smaller)
    run._run(name)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [row["name"] for row in results["static"]] == ["mobilenetv2"]
    assert [row["name"] for row in results["variants"]] == variants
    for row in (*results["static"], *results["variants"]):
        assert 0.0 <= row["test_accuracy"] <= 1.0
        assert row["measured_ms"] > 0.0 and row["table_ms"] > 0.0 and row["flops"] > 0.0
    for row in results["variants"]:
        assert 0.0 <= row["shuffled_accuracy"] <= 1.0
        assert row["same_for_all"]["table_ms"] > 0.0 and row["budget"]["curve"]["thresholds"]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    networks = ["mobilenetv2", *variants]
    finetuned = ["mobilenetv2", "shared", *variants] if whole else networks
    assert stages == ["pretrain", "search", *(f"finetune_{name}" for name in finetuned)]
    if whole:
        steps = {stage: [row["step"] for row in rows if row["stage"] == stage] for stage in stages}
        assert max(steps["finetune_shared"]) < min(steps["finetune_A"] + steps["finetune_B"])
        _check_own_policies(tmp_path / "run", variants)
    assert any("validation_accuracy" in row for row in rows)
    assert any("sampled_reward" in row for row in rows)
    for file in ("flags.txt", "config.json", "versions.json", "latency_table.json"):
        assert (tmp_path / "run" / file).stat().st_size > 0
    printed = capsys.readouterr()
    assert "mobilenetv2" in printed.out
    parts = timing.PROCESSES + len(networks)
    assert re.search(rf"results: 100%.* {parts}/{parts} ", printed.err)
    opened = trained_run.open_run(str(tmp_path / "run"))
    assert opened.dataset.class_names == data.load(name, validation_size=1).class_names
    assert trained_run.choose_variant(opened, "A") == "A"
    trained_run.restore_networks(opened, trained_run.choose_variant(opened))
    (sitting,) = results["sittings"]
    assert sitting["device"] == results["device"]
    assert datetime.datetime.fromisoformat(sitting["date"]) <= datetime.datetime.now(datetime.UTC)
    # The same command again reads the finished run and trains nothing; it adds the summary of the
    # data set, which runs of older versions lack.
    before = (tmp_path / "run/metrics.jsonl").read_text()
    (tmp_path / "run/dataset.json").unlink()
    run._run(name)
    assert trained_run.open_run(str(tmp_path / "run")) is not None
    assert "is complete" in capsys.readouterr().out
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def _check_own_policies(path: Path, variants: list[str]) -> None:
    """Each variant has the controller of its own snapshot, also after updates that all share."""
    opened = trained_run.open_run(str(path))
    search = opened.files.checkpoints("search")
    like = train_state.create(jax.random.key(0), opened.spec)
    kept = checkpoint.StageCheckpoints(stage_runner.kept_directory(search), keep=None)
    kept_steps = kept.steps()
    kept.close()
    controllers = []
    for name, step in zip(variants, kept_steps, strict=True):
        state = stage_runner.newest(opened.files.finetuning(name), like)
        assert state is not None
        snapshot = stage_runner.restore_kept(search, step, like).controller
        settled = controller.settled(opened.spec, state.controller)
        chex.assert_trees_all_equal(state.controller, controller.settle(snapshot, settled))
        controllers.append(snapshot["params"])
    with pytest.raises(AssertionError):  # Or there was nothing to tell apart.
        chex.assert_trees_all_equal(*controllers)


@pytest.mark.usefixtures("made_up_table")
@pytest.mark.parametrize("start", ["search", "pretrain", "scratch"])
def test_variants_start_from_the_weights_that_are_asked_for(start, tmp_path, fake_data):
    """At a learning rate of 0, what they end with is what they started from; and a search of depth
    ends with its op in the cells that can't be empty."""
    path, op = tmp_path / "run", "mbconv_k5_e3"
    settings = [f"--finetune_start={start}", "--finetune_learning_rate=0"]
    settings += ["--search_alternation=batch", "--search_scope=depth", f"--search_start_op={op}"]
    parse(*TINY, *settings, "--variants=1", f"--workdir={path}")
    run._run("synthetic")
    opened = trained_run.open_run(str(path))
    like = jax.eval_shape(train_state.ravel, train_state.shapes(opened.spec))

    def after(stage: str) -> tuple:
        checkpoints = checkpoint.StageCheckpoints(opened.files.checkpoints(stage))
        restored = checkpoints.restore_latest({"state": like, "seconds": np.zeros(())})
        checkpoints.close()
        assert restored is not None
        return restored[0], restored[1]["state"]

    # Neither the search nor a baseline has this op, so nothing has trained it.
    statistics = train_state.unravel(after("pretrain")[1]).supernet["batch_stats"]["cell_02"]
    for other, is_trained in (("mbconv_k5_e6", False), (op, True), ("mbconv_k3_e6", True)):
        assert statistics[f"project_{other}"]["mean"].any() == is_trained
    steps, variant = after("finetune_A")  # How the search ended.
    states = {stage: after(stage)[1] for stage in ("pretrain", "search")}
    key = jax.random.key(opened.config.run.seed)
    states["scratch"] = train_state.ravel(train_state.create(key, opened.spec))
    for name, state in states.items():
        same = np.array_equal(state.supernet["params"].vector, variant.supernet["params"].vector)
        assert same == (name == start)
    # MobileNetV2 makes up for the search's images where a variant's weights have seen them.
    baseline_steps, baseline = after("finetune_mobilenetv2")
    begun = states["scratch" if start == "scratch" else "pretrain"].supernet["params"].vector
    np.testing.assert_array_equal(baseline.supernet["params"].vector, begun)
    assert (baseline_steps, steps) == ((3, 1) if start == "search" else (1, 1))
    found = controller.settled(opened.spec, train_state.unravel(variant).controller)
    forced = opened.spec.forced_cells
    np.testing.assert_array_equal(
        found.on[forced], np.arange(5) == np.full((forced.sum(), 1), search_space.op_index(op))
    )


def test_a_static_search_answers_beside_the_variant(
    finished_run, tmp_path, fake_data, capsys, monkeypatch
):
    path = shutil.copytree(finished_run, tmp_path / "run")
    written = json.loads((path / "results.json").read_text())
    row, before = written["variants"][0], (path / "metrics.jsonl").read_text()
    wanted = {
        "workdir": str(path),
        "method": "evolution",
        "evaluations": 25,
        "images": 8,
        "calibration_images": 16,
    }
    monkeypatch.setattr(
        static_search.flags, "FLAGS", SimpleNamespace(**wanted, variant="A", data_dir="")
    )
    evaluated = []
    recalibrate = evaluation.Evaluator.recalibrated

    def recalibrated(self, state, batches, *, architecture):
        evaluated.append(recalibrate(self, state, batches, architecture=architecture))
        return evaluated[-1]

    answer = evaluation.Evaluator.__call__
    answering = []

    def call(self, state, images, **options):
        answering.append(state)
        return answer(self, state, images, **options)

    with monkeypatch.context() as patched:
        patched.setattr(evaluation.Evaluator, "recalibrated", recalibrated)
        patched.setattr(evaluation.Evaluator, "__call__", call)
        static_search._run()
    # Each architecture was judged by its own statistics.
    assert all(one is other for one, other in zip(evaluated, answering[:25], strict=True))
    found = json.loads((path / "static_search_evolution.json").read_text())
    baseline, static, variant = found["rows"]
    assert len(found["fitness"]) == 25
    curve = row["budget"]["curve"]
    budget_ms = curve["table_ms"][curve["thresholds"].index(0.0)]
    assert found["budget_ms"] == budget_ms and static["table_ms"] <= budget_ms + 1e-6
    assert variant["test_accuracy"] == row["test_accuracy"]
    assert baseline["test_accuracy"] == written["static"][0]["test_accuracy"]
    assert static["measured_ms"] > 0.0 and 0.0 <= static["test_accuracy"] <= 1.0
    # Whose results they are, and what they cost.
    assert (found["config"], found["variant"]) == (written["config"], "A")
    assert found["device"] == written["device"]
    assert written["sittings"][0]["date"][:10] <= found["date"]
    assert baseline["training_seconds"] == written["seconds"]["static"]
    assert static["training_seconds"] > 0.0 and "training_seconds" not in variant
    assert found["architecture"] in capsys.readouterr().out
    # Again: the same architecture, trained already.
    trained = (path / "static_search_evolution.metrics.jsonl").read_text()
    static_search._run()
    again = json.loads((path / "static_search_evolution.json").read_text())
    assert again["rows"][1]["test_accuracy"] == static["test_accuracy"]
    assert trained and (path / "static_search_evolution.metrics.jsonl").read_text() == trained
    assert (path / "metrics.jsonl").read_text() == before
    shutil.rmtree(path / "checkpoints/pretrain")
    with pytest.raises(InputError, match="lacks the pretrained supernet"):
        static_search._run()


@pytest.mark.usefixtures("made_up_table")
def test_widths_from_scratch_answer_beside_the_variant(
    finished_run, tmp_path, fake_data, capsys, monkeypatch
):
    path = shutil.copytree(finished_run, tmp_path / "run")
    written = json.loads((path / "results.json").read_text())
    wanted = {"workdir": str(path), "variant": "A", "data_dir": ""}

    def compare(*widths: str) -> list[dict]:
        values = SimpleNamespace(**wanted, widths=list(widths))
        monkeypatch.setattr(mobilenetv2_widths.flags, "FLAGS", values)
        mobilenetv2_widths._run()
        return json.loads((path / "mobilenetv2_widths.json").read_text())["rows"]

    narrow, wide, baseline, variant = compare("1", "0.5")
    assert [narrow["name"], wide["name"]] == ["mobilenetv2_0.5", "mobilenetv2_1"]
    assert narrow["params"] < wide["params"] == baseline["params"]
    assert variant["test_accuracy"] == written["variants"][0]["test_accuracy"]
    assert baseline["test_accuracy"] == written["static"][0]["test_accuracy"]
    # As many as a variant's weights have seen, 64 images in batches of 16: 0.5 passes of
    # pretraining, half of the search's 1, and 0.25 of finetuning.
    folder = path / "mobilenetv2_widths/0.5"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"finetune_scratch_mobilenetv2"}
    assert max(row["step"] for row in rows) == 5
    stage = "checkpoints/finetune_scratch_mobilenetv2"
    kept = {width: (path / "mobilenetv2_widths" / width / stage) for width in ("0.5", "1")}
    before = {width: sorted(p.stat().st_mtime_ns for p in kept[width].rglob("*")) for width in kept}
    assert compare("0.5", "1")[0]["test_accuracy"] == narrow["test_accuracy"]
    for width, times in before.items():  # Trained already.
        assert sorted(p.stat().st_mtime_ns for p in kept[width].rglob("*")) == times
    assert "mobilenetv2_0.5: " in capsys.readouterr().out
    for widths, message in (("", "is empty"), ("x", "name numbers"), ("9", "--width=9")):
        with pytest.raises(InputError, match=message):
            compare(*widths)


def test_what_is_finetuned_mixes_and_smooths_as_told_and_networks_from_scratch_do_too():
    """And baselines, of which everything is settled."""
    section = FinetuneConfig(batch_size=16, cut_mix=1.0, label_smoothing=0.1)
    config = Config("synthetic", pretrain=PretrainConfig(batch_size=16), finetune=section)
    setting, state = make_setting(None), train_state.ravel(fresh_state())
    planner = Planner(config, setting, make_table(), images=64)
    architecture = search_space.uniform_architecture(setting.spec, 0)
    images = data_sources.synthetic(train_size=16, test_size=8).read("train", np.arange(16))
    batch = next(iter(data.train_batches(images, batch_size=16, seed=0, num_steps=1)))
    for plan in (planner.static("s", architecture), planner.scratch("s", architecture)):
        targets = np.asarray(jax.jit(plan.stage.phases[0].prepare)(state, dict(batch))["target"])
        assert targets.min() == pytest.approx(0.1 / setting.spec.num_classes)
        own = np.take_along_axis(targets, batch["label"][:, None], axis=1)
        assert own.min() < 0.8  # By smoothing alone 0.91.


def test_networks_from_scratch_train_as_variants_that_do():
    section = FinetuneConfig(start="scratch", epochs=2.0, batch_size=16, learning_rate=0.3)
    config = Config("synthetic", pretrain=PretrainConfig(epochs=5.0), finetune=section)
    setting = make_setting(None)
    planner = Planner(config, setting, make_table(), images=64)
    variant = planner.variant("A", policy.Settled.nothing(setting.spec.mask_shape))
    scratch = planner.scratch("s", search_space.uniform_architecture(setting.spec, 0))
    assert scratch.section == variant.section == section
    assert scratch.total_steps == variant.total_steps == 8
    assert scratch.stage.name == "finetune_scratch_s"


def test_batches_that_mix_are_shared_in_pairs():
    assert parallel.device_count() == 4
    feeding.check_batch_size(12, flag="finetune_batch_size")
    feeding.check_batch_size(16, flag="finetune_batch_size", in_pairs=True)
    with pytest.raises(InputError, match="--finetune_batch_size=12 .* in pairs .* multiple of 8"):
        feeding.check_batch_size(12, flag="finetune_batch_size", in_pairs=True)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs_its_own_data(name):
    assert PROGRAMS[name].DEFAULTS.dataset.startswith(name)
    assert PROGRAMS[name].DEFAULTS.dataset in data_sources.NAMES


def test_variants_share_the_first_updates_of_their_finetuning_by_every_path_of_any_of_them():
    shape = make_setting(None).spec.mask_shape
    forced = make_setting(None).spec.forced_cells
    policies = []
    for op in (1, 2):  # One leaves op 1 of cell 1 to the image, the other op 2.
        off = np.ones(shape, bool)
        off[1, op] = False
        policies.append(policy.Settled(on=np.zeros(shape, bool), off=off))

    def plan(**options) -> Planner:
        section = FinetuneConfig(epochs=2.0, batch_size=16, start="scratch", **options)
        config = Config("synthetic", finetune=section)
        return Planner(config, make_setting(None), make_table(), images=64)

    planner = plan(open_share=0.75)
    shared = planner.shared(policies)
    assert shared is not None
    assert (shared.first_step, shared.total_steps, shared.stage.name) == (0, 6, "finetune_shared")
    np.testing.assert_array_equal(
        shared.architecture, np.logical_or(*(one.may_run(forced) for one in policies))
    )
    variant = planner.variant("A", policies[0])
    assert (variant.first_step, variant.total_steps) == (6, 8)
    static = planner.static("s", search_space.uniform_architecture(planner.setting.spec, 0))
    assert (static.first_step, static.total_steps) == (0, 8)
    alone = plan()
    assert alone.shared(policies) is None and alone.variant("A", policies[0]).first_step == 0
    assert plan(open_share=1.0).shared_steps == 7  # Or a variant would have no checkpoint.


def test_a_stage_goes_on_bit_for_bit_where_another_has_begun_it(tmp_path):
    """Search, whose phases take turns and have an optimizer each."""
    images = data.split(
        data_sources.synthetic(train_size=64, test_size=8), validation_size=16
    ).train
    stage = make_stage("search", parallel.AXIS_NAME)

    def train(name: str, state, steps: range):
        with contextlib.closing(metrics.JsonlWriter(tmp_path / name / "metrics.jsonl")) as writer:
            final, _ = stage_runner.run_stage(
                dataclasses.replace(stage, name=name),
                state,
                images,
                first_step=steps.start,
                total_steps=steps.stop,
                batch_size=16,
                seed=5,
                checkpoints=tmp_path / name / "checkpoints",
                writer=writer,
                validate=lambda state, step: {},
                eval_steps=4,
                log_steps=1,
                batches_named="search",
            )
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert {json.loads(row)["step"] for row in rows} == {step + 1 for step in steps}
        return final

    whole = train("whole", fresh_state(), range(4))
    begun = train("begun", fresh_state(), range(2))
    for _ in range(2):  # The second time from its checkpoint.
        gone_on = train("gone_on", begun, range(2, 4))
        for ours, theirs in zip(jax.tree.leaves(whole), jax.tree.leaves(gone_on), strict=True):
            np.testing.assert_array_equal(ours, theirs)


class Killed(Exception):
    pass


@pytest.mark.parametrize(("log_steps", "kill_at"), [(1, 3), (3, 4)])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, log_steps, kill_at):
    """Search, which has two optimizers and two phases: killed before it has saved step 4, resumed
    from 2, also where fewer steps than all have a row."""
    images = data.split(
        data_sources.synthetic(train_size=64, test_size=8), validation_size=16
    ).train
    stage = make_stage("search", parallel.AXIS_NAME)

    def train(directory: Path, kill_at: int | None) -> tuple:
        def validate(state, step):
            return {"validation_accuracy": 0.5}

        class Writer(metrics.JsonlWriter):
            def write(self, step, scalars, stage):
                super().write(step, scalars, stage)
                if step == kill_at:
                    raise Killed

        writer = Writer(directory / "metrics.jsonl")
        try:
            return stage_runner.run_stage(
                stage,
                fresh_state(),
                images,
                total_steps=4,
                batch_size=16,
                seed=5,
                checkpoints=directory / "search",
                writer=writer,
                validate=validate,
                eval_steps=2,
                log_steps=log_steps,
                keep_steps=(2, 4),
            )
        finally:
            writer.close()

    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, _ = train(tmp_path / "whole", None)
    with pytest.raises(Killed):
        train(tmp_path / "killed", kill_at)
    resumed, _ = train(tmp_path / "killed", None)
    for ours, theirs in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    rows = {name: (tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")}
    assert rows["whole"] == rows["killed"]
    kept = stage_runner.restore_kept(tmp_path / "killed/search", 2, fresh_state())
    assert int(kept.step) == 2


def test_process_0_tells_all_which_stages_are_done(tmp_path, monkeypatch):
    assert not stage_runner.is_done(tmp_path / "absent", 4)
    monkeypatch.setattr(parallel, "from_first", lambda look: not look())  # It sees another disk.
    assert stage_runner.is_done(tmp_path / "absent", 4)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_row_that_cannot_be_written_ends_a_run_where_its_processes_meet(monkeypatch, processes):
    class Full(metrics.MultiWriter):
        def write(self, step, scalars, stage):
            raise OSError(28, f"no space for row {step}")

    monkeypatch.setattr(parallel, "process_count", lambda: processes)
    rows = stage_runner.LateRows(Full([]), "search", tqdm(disable=True))
    scalars = parallel.replicate({"loss": np.float32(1.0)})
    rows.add(1, scalars)
    if processes == 1:
        with pytest.raises(OSError, match="row 1"):
            rows.add(2, scalars)
    else:
        rows.add(2, scalars)
        rows.add(3, scalars)
        with pytest.raises(OSError, match="row 1"):
            rows.finish()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--width=9", "--width=9"),
        ("--width=nan", "--width=nan"),
        ("--preset=px31", "--preset=px31: choose one of"),
        ("--search_bounding=0.4", "--search_bounding=0.4: must be 0.5"),
        ("--search_negative_weight=1", "--search_negative_weight=1"),
        ("--pretrain_batch_size=0", "--pretrain_batch_size=0"),
        ("--pretrain_schedule=fast", "--pretrain_schedule=fast"),
        ("--search_advantage=leave_one_out", "--search_samples of 2 or more, not 1"),
        ("--search_scope=depth", "one for each, by --search_start_op"),
        ("--search_start_op=basic_conv,conv9", "--search_start_op=basic_conv,conv9: unknown op"),
        ("--search_start_op=basic_conv, basic_conv", "names 2 ops: .* of the 17 of --preset=px32"),
        ("--controller=large", "--controller=large: choose one of"),
        ("--static_ops=conv9", "unknown op 'conv9'"),
        ("--eval_epochs=inf", "--eval_epochs=inf: must be a number"),
        ("--pretrain_learning_rate=nan", "--pretrain_learning_rate=nan: must be a number"),
        ("--seed=4294967296", "--seed=4294967296: must be 4294967295 or less"),
        ("--static_ops=", "--static_ops is empty"),
        ("--static_ops=basic_conv,basic_conv", "names an op twice"),
    ],
)
def test_a_flag_out_of_range_names_itself(argument, message):
    parse(argument)
    with pytest.raises(InputError, match=message) as error:
        flags_lib.read("digits")
    assert "\n" not in str(error.value)


def test_every_default_is_within_its_range():
    for config in (module.DEFAULTS for module in PROGRAMS.values()):
        validate_section(config.data)
        validate_section(config.pretrain, prefix="pretrain_")
        validate_section(config.run)
    assert RunConfig().static_ops == ("mbconv_k3_e6",)


class TestWorkdir:
    CONFIG = Config("digits")

    def test_belongs_to_one_configuration(self, tmp_path):
        Workdir(str(tmp_path / "w"), config=self.CONFIG, flags_text="")
        Workdir(str(tmp_path / "w"), config=self.CONFIG, flags_text="")
        before = {path: path.read_bytes() for path in (tmp_path / "w").iterdir()}
        other = dataclasses.replace(self.CONFIG, run=RunConfig(seed=1))
        with pytest.raises(InputError, match="run.seed=0, this one has run.seed=1"):
            Workdir(str(tmp_path / "w"), config=other, flags_text="")
        assert {path: path.read_bytes() for path in (tmp_path / "w").iterdir()} == before

    def test_travels_to_the_other_processes_of_a_run(self, tmp_path):
        workdir = Workdir(str(tmp_path / "w"), config=self.CONFIG, flags_text="")
        assert vars(pickle.loads(pickle.dumps(workdir))) == vars(workdir)

    def test_what_an_older_version_did_not_know_has_its_default(self, tmp_path):
        path = tmp_path / "w/config.json"
        Workdir(str(tmp_path / "w"), config=self.CONFIG, flags_text="")
        values = json.loads(path.read_text())
        del values["search"]["diversity_kind"]
        path.write_text(json.dumps(values))
        Workdir(str(tmp_path / "w"), config=self.CONFIG, flags_text="")
        values["search"]["unheard_of"] = 1
        path.write_text(json.dumps(values))
        with pytest.raises(InputError, match="does not fit this program .*unheard_of"):
            Workdir(str(tmp_path / "w"), config=self.CONFIG, flags_text="")

    @pytest.mark.parametrize("content", [b"{", b"\xff"])
    def test_a_damaged_configuration_is_named(self, tmp_path, content):
        Workdir(str(tmp_path / "w"), config=self.CONFIG, flags_text="")
        (tmp_path / "w/config.json").write_bytes(content)
        with pytest.raises(InputError, match="config.json is not JSON"):
            Workdir(str(tmp_path / "w"), config=self.CONFIG, flags_text="")

    def test_notes_each_sitting(self, tmp_path):
        before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        workdir = Workdir(str(tmp_path / "w"), config=self.CONFIG, flags_text="")
        assert workdir.read_sittings() == []
        workdir.begin_sitting({"devices": 4})
        Workdir(str(tmp_path / "w"), config=self.CONFIG, flags_text="").begin_sitting(
            {"devices": 1}
        )
        first, second = workdir.read_sittings()
        assert (first["devices"], second["devices"]) == (4, 1)
        dates = [datetime.datetime.fromisoformat(sitting["date"]) for sitting in (first, second)]
        assert before <= dates[0] <= dates[1] <= datetime.datetime.now(datetime.UTC)

    @pytest.mark.parametrize(("text", "message"), [("[{", "cannot be read"), ("{}", "no list")])
    def test_notes_that_are_damaged_are_named(self, tmp_path, text, message):
        workdir = Workdir(str(tmp_path / "w"), config=self.CONFIG, flags_text="")
        workdir.sittings.write_text(text)
        with pytest.raises(InputError, match=f"sittings.json .*{message}"):
            workdir.begin_sitting({})
        assert workdir.sittings.read_text() == text

    def test_a_strangers_folder_is_refused(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("precious")
        with pytest.raises(InputError, match="not a run's"):
            Workdir(str(tmp_path), config=self.CONFIG, flags_text="")
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_file_or_nothing_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="cannot be used"):
            Workdir(str(tmp_path / "file" / "w"), config=self.CONFIG, flags_text="")
        with pytest.raises(InputError, match="--workdir is not set"):
            Workdir("", config=self.CONFIG, flags_text="")


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    """Through the real program: an absent data set names the folder and the remedy."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.cifar100",
            f"--data_dir={tmp_path}",
            f"--workdir={tmp_path / 'w'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert str(tmp_path) in lines[0] and "tfds build cifar100" in lines[0]
    assert not (tmp_path / "w").exists()


def test_a_foreign_table_is_refused_by_the_program(tmp_path, fake_data):
    parse(*TINY, f"--workdir={tmp_path / 'w'}", f"--latency_table={tmp_path / 'none.json'}")
    with pytest.raises(InputError, match="cannot be read"):
        run._run("synthetic")
    # It claims no folder, or the command could not be mended.
    latency_file.save(make_table(), tmp_path / "table.json")
    table = f"--latency_table={tmp_path / 'table.json'}"
    for wrong in ([], ["--allow_foreign_table", "--width=2"]):  # Its device; its supernet.
        parse(*TINY, f"--workdir={tmp_path / 'w'}", table, *wrong)
        with pytest.raises(InputError, match="was measured on|of another supernet"):
            run._run("synthetic")
    assert not (tmp_path / "w").exists()


def test_a_run_keeps_the_table_it_began_with(tmp_path):
    spec, section = search_space.preset("tiny", num_classes=10), RunConfig()
    began, other = tmp_path / "began.json", tmp_path / "other.json"
    table = make_table()
    latency_file.save(table, began)
    latency_file.save(dataclasses.replace(table, settled_ms=table.settled_ms + 1.0), other)
    files = RunFiles(str(tmp_path))
    for _ in range(2):  # Put there, and then read.
        found = timing.table_of_run(section, spec, files, path=str(began), allow_foreign=True)
        np.testing.assert_array_equal(found.settled_ms, table.settled_ms)
    with pytest.raises(InputError, match="by another latency table than --latency_table=.*other"):
        timing.table_of_run(section, spec, files, path=str(other), allow_foreign=True)


@pytest.mark.usefixtures("made_up_table")
def test_a_training_that_diverges_is_one_line_and_not_saved(tmp_path, fake_data):
    rate = ["--pretrain_learning_rate=1e30", "--pretrain_epochs=1"]
    parse(*TINY, *rate, f"--workdir={tmp_path / 'w'}")
    with pytest.raises(InputError, match="pretrain has diverged: after 4 updates .*supernet"):
        run._run("synthetic")
    assert not list((tmp_path / "w/checkpoints/pretrain").iterdir())


@pytest.mark.usefixtures("made_up_table")
def test_a_repeat_decides_about_no_training_image_again(tmp_path, fake_data, monkeypatch):
    path = tmp_path / "run"
    arguments = [*TINY, "--variants=1", "--finetune_settle_tolerance=0.2"]
    parse(*arguments, f"--workdir={path}")
    run._run("synthetic")
    files = RunFiles(str(path))
    before, rows = json.loads(files.results.read_text()), files.metrics.read_text()
    files.results.unlink()
    decided = []
    policy_logits = evaluation.Evaluator.policy_logits

    def recorded(self, state, images):
        decided.append(len(images))
        return policy_logits(self, state, images)

    monkeypatch.setattr(evaluation.Evaluator, "policy_logits", recorded)
    parse(*arguments, f"--workdir={path}")
    run._run("synthetic")
    assert decided == [16, 24]  # Validation and test, for the results.
    after = json.loads(files.results.read_text())
    for name in ("test_accuracy", "undecided_paths", "table_ms"):
        assert after["variants"][0][name] == before["variants"][0][name]
    assert files.metrics.read_text() == rows


def test_augmentation_is_what_the_flags_say(tmp_path):
    parse(*TINY, "--crop_pad=3", "--noflip", "--cutout=5")
    assert flags_lib.read("synthetic").data.augmentation == Augmentation(pad=3, cutout=5)
    assert digits.DEFAULTS.data.augmentation == Augmentation(pad=2)
    assert cifar100.DEFAULTS.data.augmentation == Augmentation(pad=4, flip=True, cutout=16)
    assert imagenet.DEFAULTS.data.augmentation == Augmentation(flip=True)


def test_who_decodes_is_no_part_of_the_experiment():
    here, there = (
        Config("imagenet2012", data=DataConfig(data_dir=folder, data_workers=workers))
        for folder, workers in (("a", 0), ("b", 8))
    )
    assert here.to_json() == there.to_json()
    assert Config.from_json(here.to_json()) == Config("imagenet2012")


def test_the_search_starts_where_the_flags_say(tmp_path):
    parse(
        *TINY,
        f"--workdir={tmp_path / 'w'}",
        "--search_start_keep=0.2",
        "--search_start_op=mbconv_k5_e3",
    )
    config = flags_lib.read("synthetic")
    start = recipe.policy_start(config.model.spec(num_classes=10), config.search)
    np.testing.assert_allclose(start[:, 3], 0.6)
    np.testing.assert_allclose(np.delete(start, 3, axis=1), 0.2)


def test_a_search_of_depth_settles_all_but_where_its_op_runs():
    config = Config("synthetic")
    spec = config.model.spec(num_classes=10)
    section = dataclasses.replace(config.search, scope="depth", start_op="mbconv_k5_e6")
    settled = recipe.search_settled(spec, section)
    op = search_space.op_index("mbconv_k5_e6")
    assert settled.off[:, np.arange(5) != op].all() and not settled.off[:, op].any()
    np.testing.assert_array_equal(settled.on[:, op], spec.forced_cells)
    np.testing.assert_array_equal(settled.undecided_cells, ~spec.forced_cells)
    assert recipe.search_settled(spec, config.search).undecided_cells.all()


def test_each_cell_may_have_a_start_op_of_its_own():
    spec = Config("synthetic").model.spec(num_classes=10)
    ops = np.arange(spec.num_cells) % 5
    names = [search_space.CANDIDATE_OPS[op].name for op in ops]
    section = dataclasses.replace(Config("synthetic").search, start_op=",".join(names))
    start = recipe.policy_start(spec, section)
    np.testing.assert_array_equal(start.argmax(axis=1), ops)
    np.testing.assert_allclose(np.sort(start, axis=1)[:, -2:], [[0.5, 0.6]] * spec.num_cells)
    settled = recipe.search_settled(spec, dataclasses.replace(section, scope="depth"))
    np.testing.assert_array_equal(~settled.off, np.eye(5, dtype=bool)[ops])
    np.testing.assert_array_equal(settled.on, ~settled.off & spec.forced_cells[:, None])


def test_by_depth_a_cell_without_a_name_never_runs():
    config = Config("synthetic")
    spec = config.model.spec(num_classes=10)
    cell = int(np.flatnonzero(~spec.forced_cells)[0])
    names = ["mbconv_k3_e3"] * spec.num_cells
    names[cell] = ""
    section = dataclasses.replace(config.search, scope="depth", start_op=",".join(names))
    settled = recipe.search_settled(spec, section)
    assert settled.off[cell].all() and not settled.may_run(spec.forced_cells)[cell].any()
    assert settled.off.sum() == spec.num_cells * 4 + 1
    # MobileNetV2 runs there, so that is pretrained.
    paths = recipe.trained_paths(spec, dataclasses.replace(config, search=section))
    np.testing.assert_array_equal(np.flatnonzero(paths[cell]), [search_space.MOBILENETV2_OP])
    parse("--search_scope=depth", f"--search_start_op=basic_conv{16 * ','}")
    with pytest.raises(InputError, match="names no op for cell 1, which can't be empty"):
        flags_lib.read("digits")


def test_a_cell_that_only_its_forced_op_is_left_to_is_settled():
    spec = search_space.preset("tiny", num_classes=10)
    logits = np.full((2, *spec.mask_shape), -9.0)
    logits[0, :, search_space.FORCED_OP] = 9.0  # The second image leaves all cells empty.
    settled = recipe.finetune_settled(spec, logits, Config("synthetic").finetune)
    decided = (settled.on | settled.off).all(axis=-1)
    np.testing.assert_array_equal(decided, spec.forced_cells)
    assert settled.on[spec.forced_cells, search_space.FORCED_OP].all()


def test_what_no_network_of_a_run_has_is_not_pretrained():
    config = Config("synthetic")
    spec = config.model.spec(num_classes=10)
    assert recipe.trained_paths(spec, config).all()
    section = dataclasses.replace(config.search, scope="depth", start_op="mbconv_k5_e6")
    run_config = dataclasses.replace(config.run, static_ops=("basic_conv",))
    paths = recipe.trained_paths(spec, dataclasses.replace(config, search=section, run=run_config))
    expected = np.zeros(spec.mask_shape, bool)
    for name in ("mbconv_k5_e6", "basic_conv", "mbconv_k3_e6"):  # The last is MobileNetV2's.
        expected[:, search_space.op_index(name)] = True
    np.testing.assert_array_equal(paths, expected)


def test_the_search_rewards_by_what_the_flags_say(monkeypatch):
    passed = []
    monkeypatch.setattr(recipe.search, "search", lambda *_, reward, **__: passed.append(reward))
    section = dataclasses.replace(
        Config("synthetic").search, diversity_kind="joint", diversity_weight=0.25, samples=3
    )
    recipe.search_stage(make_setting(None), section, make_table(), total_steps=4, epoch_steps=2)
    assert (passed[0].diversity_kind, passed[0].diversity_weight, passed[0].samples) == (
        "joint",
        0.25,
        3,
    )


def test_every_network_is_first_in_a_process_and_times_are_medians(monkeypatch):
    orders = []

    def time_in_turn(predictors, images):
        orders.append(list(predictors))
        assert all(name == predictor for name, predictor in predictors.items())
        return {name: np.array([orders[-1].index(name), 7.0]) for name in predictors}

    monkeypatch.setattr(
        environment, "in_inference_process", lambda function, *args, threads: function(*args)
    )
    monkeypatch.setattr(environment, "release_memory", lambda: None)
    monkeypatch.setattr(timing, "_make_predictor", lambda network: network)
    monkeypatch.setattr(timing.inference, "time_in_turn", time_in_turn)
    networks = {name: name for name in "abc"}
    done = []
    times = timing.time_networks(
        networks,  # pyright: ignore
        images=[],
        threads=1,
        on_process=lambda: done.append(len(orders)),
    )
    assert done == [1, 2, 3]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    for name in networks:  # First, second and third once.
        np.testing.assert_array_equal(times[name], [1.0, 7.0])


@pytest.mark.parametrize(("upper_bound_end", "warnings"), [(0.9, 0), (0.01, 1)])
def test_a_bound_that_no_architecture_meets_is_warned_of(upper_bound_end, warnings, caplog):
    config = Config("synthetic")
    section = dataclasses.replace(config.search, upper_bound_end=upper_bound_end)
    recipe.search_stage(make_setting(None), section, make_table(), total_steps=4, epoch_steps=2)
    assert len(caplog.messages) == warnings
    assert all("--search_upper_bound_end" in message for message in caplog.messages)


NETWORK = {
    "name": "A",
    "test_accuracy": 0.5,
    "validation_accuracy": 0.25,
    "table_ms": 0.1,
    "measured_ms": 0.2,
    "flops": 1e6,
}


def test_results_of_before_budgets_are_a_table(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"static": [NETWORK], "variants": [NETWORK | {"measured_ms": 0.1}]}))
    *_, baseline, variant = results_lib.read_table(path).splitlines()
    assert "50.00 %" in baseline and "+0 %" in baseline and "+50 %" in variant


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"static": []}', '{"static": [{}], "variants": []}', '{"static": 3}']
)
def test_damaged_results_are_one_line(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        results_lib.read_table(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
