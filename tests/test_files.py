"""Files appear whole or not at all."""

import pytest

from instanas_jax import files


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
