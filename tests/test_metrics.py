"""Sums that count every image once, and files that survive a kill and a resume."""

import csv
import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instanas_jax import metrics
from instanas_jax.errors import InputError


def read_jsonl(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_csv(path: pathlib.Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


class TestSums:
    def test_correct_and_count_by_hand(self):
        class_logits = jnp.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 0.0]])
        # The answers are 1, 0, 1, 0: right, right, wrong, and right on a row of padding.
        sums = metrics.correct_and_count(
            class_logits, jnp.array([1, 0, 0, 0]), jnp.array([1.0, 1.0, 1.0, 0.0])
        )
        assert float(sums["accuracy"]) == 2 and float(sums["count"]) == 3
        assert metrics.mean(sums) == {"accuracy": pytest.approx(2 / 3)}

    def test_nan_in_padding_does_not_reach_the_sum(self):
        sums = metrics.weighted_sums(jnp.array([1.0, 0.0]), latency_ms=jnp.array([4.0, jnp.nan]))
        assert metrics.mean(sums) == {"latency_ms": 4.0}

    @settings(deadline=None, max_examples=30)
    @given(values=st.lists(st.integers(-100, 100), min_size=1, max_size=20), size=st.integers(1, 8))
    def test_mean_is_the_same_for_any_batch_size(self, values: list[int], size: int):
        total = None
        for first in range(0, len(values), size):
            part = values[first : first + size]
            padding = [0.0] * (size - len(part))
            weight = jnp.array([1.0] * len(part) + padding)
            sums = metrics.weighted_sums(weight, figure=jnp.array([*map(float, part), *padding]))
            total = sums if total is None else metrics.add(total, sums)
        assert total is not None
        assert metrics.mean(total)["figure"] == pytest.approx(np.mean(values), abs=1e-4)

    def test_mean_of_nothing_is_nan(self):
        assert math.isnan(metrics.mean({"accuracy": 0.0, "count": 0.0})["accuracy"])

    def test_sums_of_different_names_do_not_add(self):
        with pytest.raises(ValueError, match="accuracy.*latency_ms"):
            metrics.add({"accuracy": 1, "count": 1}, {"latency_ms": 1, "count": 1})


class TestJsonlWriter:
    def test_rows_and_not_a_number(self, tmp_path: pathlib.Path):
        path = tmp_path / "new" / "metrics.jsonl"
        writer = metrics.JsonlWriter(path)
        writer.write(
            np.int64(3), {"loss": jnp.float32(0.5), "a": math.nan, "b": math.inf}, "search"
        )
        # Read before closing: a killed run must find its rows on disk.
        assert path.read_text() == (
            '{"stage": "search", "step": 3, "loss": 0.5, "a": null, "b": null}\n'
        )

    def test_half_written_line_is_dropped_on_reopening(self, tmp_path: pathlib.Path):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"stage": "search", "step": 1}\n{"stage": "sea')
        writer = metrics.JsonlWriter(path)
        writer.write(2, {}, "search")
        writer.close()
        assert [row["step"] for row in read_jsonl(path)] == [1, 2]

    def test_foreign_line_is_refused_with_its_number(self, tmp_path: pathlib.Path):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"stage": "search", "step": 1}\nhello\n')
        with pytest.raises(InputError, match="line 2 of .*metrics.jsonl"):
            metrics.JsonlWriter(path).truncate_after(1, "search")


@pytest.mark.parametrize(
    ("writer_type", "read"), [(metrics.JsonlWriter, read_jsonl), (metrics.CsvWriter, read_csv)]
)
class TestResume:
    def test_a_resumed_file_equals_an_uninterrupted_one(self, tmp_path, writer_type, read):
        def write(writer, stage: str, steps: range):
            for step in steps:
                writer.write(step, {"loss": step / 7}, stage)

        whole = writer_type(tmp_path / "whole")
        write(whole, "pretrain", range(1, 6))
        write(whole, "search", range(1, 4))

        # Killed in the search at step 2, with the last checkpoint at pretrain step 3.
        killed = writer_type(tmp_path / "resumed")
        write(killed, "pretrain", range(1, 6))
        write(killed, "search", range(1, 3))
        killed.close()
        resumed = writer_type(tmp_path / "resumed")
        resumed.truncate_after(3, "pretrain")
        write(resumed, "pretrain", range(4, 6))
        write(resumed, "search", range(1, 4))
        assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()

    def test_earlier_stages_and_steps_stay(self, tmp_path, writer_type, read):
        writer = writer_type(tmp_path / "file")
        for stage, step in [("pretrain", 9), ("search", 1), ("search", 2), ("search", 3)]:
            writer.write(step, {"loss": 1.0}, stage)
        writer.truncate_after(2, "search")
        rows = [(row["stage"], int(row["step"])) for row in read(tmp_path / "file")]
        assert rows == [("pretrain", 9), ("search", 1), ("search", 2)]


def test_csv_is_one_scalar_a_line_with_one_header(tmp_path: pathlib.Path):
    path = tmp_path / "metrics.csv"
    for step in (1, 2):  # a writer each: reopening must not repeat the header
        writer = metrics.CsvWriter(path)
        writer.write(step, {"loss": 0.5, "accuracy": math.nan}, "search")
        writer.close()
    assert path.read_text().splitlines() == [
        "stage,step,name,value",
        "search,1,loss,0.5",
        "search,1,accuracy,nan",
        "search,2,loss,0.5",
        "search,2,accuracy,nan",
    ]


def test_multi_writer_reaches_tensorboard_and_jsonl(tmp_path: pathlib.Path):
    writer = metrics.MultiWriter(
        [metrics.TensorBoardWriter(tmp_path / "tb"), metrics.JsonlWriter(tmp_path / "m.jsonl")]
    )
    writer.write(1, {"loss": 0.5}, "search")
    writer.write(2, {"loss": 0.25}, "search")
    writer.truncate_after(1, "search")
    writer.write(2, {"loss": 0.125}, "search")
    writer.write(1, {"loss": 0.75}, "finetune")
    writer.close()
    rows = [(row["stage"], row["step"], row["loss"]) for row in read_jsonl(tmp_path / "m.jsonl")]
    assert rows == [("search", 1, 0.5), ("search", 2, 0.125), ("finetune", 1, 0.75)]
    # The tag is stored as plain bytes; two event files follow from the truncation of the search.
    events = [f.read_bytes() for f in sorted((tmp_path / "tb" / "search").iterdir())]
    assert all(b"loss" in content for content in events)
    assert (tmp_path / "tb" / "finetune").is_dir()
