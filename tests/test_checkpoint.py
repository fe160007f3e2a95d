import jax
import numpy as np
import pytest

from experiments import stage_runner
from instanas_jax import checkpoint, search_space, train_state
from instanas_jax.errors import InputError
from tests.disk import no_room_beyond


def state(value: float) -> dict:
    return {"a": np.full((3,), value, np.float32), "b": {"step": np.asarray(int(value), np.int32)}}


def test_what_was_saved_is_restored_bit_for_bit(tmp_path):
    values = {"a": np.random.default_rng(0).standard_normal(7).astype(np.float32)}
    checkpoints = checkpoint.StageCheckpoints(tmp_path)
    checkpoints.save(5, values)
    step, restored = checkpoints.restore_latest(values)
    assert step == 5
    np.testing.assert_array_equal(restored["a"], values["a"])


def test_only_the_newest_are_kept_unless_all_are_asked_for(tmp_path):
    rolling = checkpoint.StageCheckpoints(tmp_path / "rolling")
    everything = checkpoint.StageCheckpoints(tmp_path / "all", keep=None)
    for step in (1, 2, 3):
        rolling.save(step, state(step))
        everything.save(step, state(step))
    assert rolling.steps() == [2, 3]
    assert everything.steps() == [1, 2, 3]


def test_nothing_saved_restores_nothing(tmp_path):
    assert checkpoint.StageCheckpoints(tmp_path).restore_latest(state(0)) is None


def damage(directory) -> None:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(b"")


def test_walks_back_over_a_damaged_checkpoint(tmp_path):
    checkpoints = checkpoint.StageCheckpoints(tmp_path)
    checkpoints.save(1, state(1))
    checkpoints.save(2, state(2))
    damage(tmp_path / "2")
    reopened = checkpoint.StageCheckpoints(tmp_path)
    step, restored = reopened.restore_latest(state(0))
    assert step == 1
    np.testing.assert_array_equal(restored["a"], state(1)["a"])
    with pytest.raises(InputError, match="cannot be restored"):
        reopened.restore(2, state(0))


@pytest.mark.parametrize("damaged", [[2], [1, 2]])
def test_damaged_checkpoints_make_room_for_what_is_trained_again(tmp_path, damaged, caplog):
    checkpoints = checkpoint.StageCheckpoints(tmp_path)
    checkpoints.save(1, state(1))
    checkpoints.save(2, state(2))
    for step in damaged:
        damage(tmp_path / str(step))
    reopened = checkpoint.StageCheckpoints(tmp_path)
    restored = reopened.restore_latest(state(0))
    assert (restored is None) == (1 in damaged)
    told = [record.getMessage() for record in caplog.records if record.name == checkpoint.__name__]
    for step, message in zip(reversed(damaged), told, strict=True):
        assert f"{tmp_path}/{step} cannot be restored (" in message
    assert reopened.steps() == [1, 2]  # Until there is something in their place.
    for step in damaged:
        reopened.save(step, state(step))
        assert (tmp_path / f"{step}.damaged").is_dir()
    reopened.close()
    again = checkpoint.StageCheckpoints(tmp_path)
    for step in (1, 2):
        np.testing.assert_array_equal(again.restore(step, state(0))["a"], state(step)["a"])


def test_a_checkpoint_that_the_disk_has_no_room_for_is_told(tmp_path):
    checkpoints = checkpoint.StageCheckpoints(tmp_path)
    noise = {"a": np.random.default_rng(0).standard_normal(100_000).astype(np.float32)}
    with (
        no_room_beyond(65_536),
        pytest.raises(InputError, match="cannot be written .*make room") as caught,
    ):
        checkpoints.save(1, noise)
    assert f"{tmp_path}/1 " in str(caught.value) and "\n" not in str(caught.value)
    assert checkpoint.StageCheckpoints(tmp_path).restore_latest(noise) is None


def test_a_checkpoint_that_may_not_be_read_keeps_its_place(tmp_path, monkeypatch):
    checkpoints = checkpoint.StageCheckpoints(tmp_path)
    checkpoints.save(1, state(1))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoints._manager, "restore", refuse)
    with pytest.raises(PermissionError):
        checkpoints.restore_latest(state(0))
    checkpoints.save(1, state(2))
    np.testing.assert_array_equal(
        checkpoint.StageCheckpoints(tmp_path).restore(1, state(0))["a"], state(1)["a"]
    )


def test_a_lost_snapshot_of_the_search_names_both_folders_to_delete(tmp_path):
    like = train_state.create(jax.random.key(0), search_space.preset("tiny", num_classes=10))
    with pytest.raises(InputError) as caught:
        stage_runner.restore_kept(tmp_path / "search", 5, like)
    assert f"delete it and {tmp_path / 'search'}, and repeat" in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "search_kept"))
