"""Files appear whole or not at all, and are held by one process."""

import os
import subprocess
import sys

import pytest

from instanas_jax import files
from instanas_jax.errors import InputError


def test_what_was_there_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.json"
    for text in ("before", "after\n"):
        files.write_text(path, text)
        assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_no_trace(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        files.write_text(tmp_path / "folder", "text")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(tmp_path / "a.json", "half of it \ud800")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_what_another_process_holds_is_free_when_that_is_killed(tmp_path):
    path = tmp_path / "run" / "lock"
    path.parent.mkdir()
    command = (
        "from instanas_jax import files\n"
        f"held = files.hold({str(path)!r})\n"
        "print('held', flush=True)\n"
        "input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"{path.parent} is in use by another process"):
            files.hold(path)
    finally:
        holder.kill()
        holder.communicate()
    for _ in range(2):
        files.hold(path)
    refused = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert "in use by another process" in refused.stderr and refused.stdout == ""


def test_where_nobody_can_write_nobody_is_kept_away(tmp_path):
    files.hold(tmp_path / "no folder" / "lock")
    assert os.listdir(tmp_path) == []
