"""Files of metrics survive a kill and a resume."""

import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from instanas_jax import metrics
from instanas_jax.errors import InputError
from tests.disk import no_room_beyond


def read_jsonl(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


class TestResume:
    def test_a_resumed_file_equals_an_uninterrupted_one(self, tmp_path):
        def write(writer, stage: str, steps: range):
            for step in steps:
                writer.write(step, {"loss": step / 7}, stage)

        whole = metrics.JsonlWriter(tmp_path / "whole")
        write(whole, "pretrain", range(1, 6))
        write(whole, "search", range(1, 4))

        # Killed in the search at step 2, with the last checkpoint at pretrain step 3.
        killed = metrics.JsonlWriter(tmp_path / "resumed")
        write(killed, "pretrain", range(1, 6))
        write(killed, "search", range(1, 3))
        killed.close()
        resumed = metrics.JsonlWriter(tmp_path / "resumed")
        resumed.truncate_after(3, "pretrain")
        write(resumed, "pretrain", range(4, 6))
        resumed.truncate_after(-1, "search")
        write(resumed, "search", range(1, 4))
        assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()

    def test_earlier_stages_and_steps_stay(self, tmp_path):
        writer = metrics.JsonlWriter(tmp_path / "file")
        for stage, step in [("pretrain", 9), ("search", 1), ("search", 2), ("search", 3)]:
            writer.write(step, {"loss": 1.0}, stage)
        writer.truncate_after(2, "search")
        rows = [(row["stage"], int(row["step"])) for row in read_jsonl(tmp_path / "file")]
        assert rows == [("pretrain", 9), ("search", 1), ("search", 2)]

    def test_later_stages_that_are_done_stay(self, tmp_path):
        writer = metrics.JsonlWriter(tmp_path / "file")
        for stage, step in [("search", 1), ("search", 2), ("finetune_A", 1)]:
            writer.write(step, {"loss": 1.0}, stage)
        writer.truncate_after(-1, "search")
        writer.write(1, {"loss": 2.0}, "search")
        rows = [(row["stage"], row["loss"]) for row in read_jsonl(tmp_path / "file")]
        assert rows == [("finetune_A", 1.0), ("search", 2.0)]


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


def test_a_row_that_the_disk_has_no_room_for_is_told_at_once(tmp_path: pathlib.Path):
    """And not to a thread, for which later rows would wait without an end."""
    writer = metrics.TensorBoardWriter(tmp_path)
    writer.write(1, {"loss": 0.5}, "search")
    with no_room_beyond(0):
        for step in range(2, 40):
            with pytest.raises(OSError, match="File too large"):
                writer.write(step, {"loss": 0.5}, "search")
    writer.close()


def test_a_resume_within_a_second_overwrites_no_events(tmp_path: pathlib.Path):
    for step in (1, 2):
        writer = metrics.TensorBoardWriter(tmp_path)
        writer.write(step, {"loss": 0.5}, "search")
        writer.close()
    assert sum(b"loss" in file.read_bytes() for file in (tmp_path / "search").iterdir()) == 2
