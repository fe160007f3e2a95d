"""Two processes of two devices train as one process of four, through the whole program."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import flags as flags_lib
from experiments import trained_run
from instanas_jax import latency_file, parallel
from instanas_jax.errors import InputError
from tests.test_experiments import TINY, parse
from tests.test_latency import make_table

ROOT = Path(__file__).parent.parent
# Times are not looked at here, and each process that takes them is slow to start.
PROGRAM = """
from experiments import run, timing
from experiments.config import Config
timing.PROCESSES = 1
run.main(Config("synthetic"))
"""

MISTAKES = """
import sys
from instanas_jax import parallel
from instanas_jax.errors import InputError

def mistake(): raise InputError("no such table")
def defect(): return {}["no such"]
def no_pickle(): return lambda: None

parallel.initialise(coordinator=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
for make in (mistake, defect, no_pickle, lambda: 7):
    try:
        print("GOT", parallel.from_first(make))
    except Exception as error:
        print("GOT", type(error).__name__, error)
"""

FULL_DISK = """
from instanas_jax import checkpoint
def save(self, step, state): raise OSError(28, "No space left on device", "the disk")
checkpoint.StageCheckpoints.save = save
"""


def start(arguments: list[str], *, devices: int) -> subprocess.Popen:
    return start_code(PROGRAM, [*TINY, "--variants=1", *arguments], devices=devices)


def start_code(code: str, arguments: list[str], *, devices: int) -> subprocess.Popen:
    flags = os.environ["XLA_FLAGS"].replace("device_count=4", f"device_count={devices}")
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes: list[subprocess.Popen], *, status: int = 0) -> list[str]:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == status, output[-2000:]
    return outputs


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_two_processes_train_as_one(tmp_path):
    table = tmp_path / "table.json"
    latency_file.save(make_table(), table)
    common = [f"--latency_table={table}", "--allow_foreign_table"]
    finish([start([*common, f"--workdir={tmp_path / 'one'}"], devices=4)])
    port = free_port()
    outputs = finish(
        [
            start(
                [
                    *common,
                    f"--workdir={tmp_path / f'process_{process}'}",
                    "--num_processes=2",
                    f"--process_id={process}",
                    f"--coordinator=localhost:{port}",
                ],
                devices=2,
            )
            for process in range(2)
        ]
    )
    assert "mobilenetv2" in outputs[0] and "mobilenetv2" not in outputs[1]
    # Process 0 alone writes, and what it writes is what one process would have written.
    assert not (tmp_path / "process_1").exists()
    runs = {name: trained_run.open_run(str(tmp_path / name)) for name in ("one", "process_0")}
    results = {name: json.loads((tmp_path / name / "results.json").read_text()) for name in runs}
    for name, processes in (("process_0", 2), ("one", 1)):
        (sitting,) = results[name]["sittings"]
        assert (sitting["devices"], sitting["processes"]) == (4, processes)
    one, two = (
        jax.tree.leaves(trained_run.restore_networks(opened, "A")) for opened in runs.values()
    )
    for ours, theirs in zip(one, two, strict=True):
        difference = np.linalg.norm(np.asarray(ours) - np.asarray(theirs))
        assert difference <= 1e-4 * np.linalg.norm(np.asarray(ours)) + 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_processes=2", "--process_id=2"], "--process_id=2: of 2 processes the last is 1"),
        (["--num_processes=2"], "--num_processes=2 needs --coordinator=HOST:PORT"),
    ],
)
def test_flags_of_no_cluster_are_one_line(arguments, message):
    parse(*arguments)
    with pytest.raises(InputError, match=message) as error:
        flags_lib.join_processes()
    assert "\n" not in str(error.value)


def test_a_cluster_that_does_not_meet_says_why(monkeypatch):
    def wait(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: the others\ndid not come")

    monkeypatch.setattr(jax.distributed, "initialize", wait)
    with pytest.raises(InputError, match=r"cannot join its cluster \(.*the others did not come\)"):
        parallel.initialise()


def test_processes_of_different_numbers_of_devices_are_refused(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_devices", lambda process: ["cpu"] * (process + 1))
    with pytest.raises(InputError, match="processes have 1 or 2 devices"):
        parallel.initialise(coordinator="localhost:1", num_processes=2, process_id=0)


def test_a_mistake_of_the_first_process_is_raised_as_it_is():
    def mistake():
        raise InputError("no such table")

    with pytest.raises(InputError, match="no such table"):
        parallel.from_first(mistake)


def test_whatever_fails_in_the_first_process_all_end():
    address = f"localhost:{free_port()}"
    outputs = finish(
        [start_code(MISTAKES, [address, str(process)], devices=1) for process in range(2)]
    )
    first, second = (
        [line for line in output.splitlines() if line.startswith("GOT")] for output in outputs
    )
    assert first[0] == second[0] == "GOT InputError no such table"
    assert first[1].startswith("GOT KeyError")
    assert second[1].startswith("GOT InputError process 0 failed (KeyError(")
    assert first[2] != second[2] and second[2].startswith("GOT InputError process 0 failed (")
    assert first[3:] == second[3:] == ["GOT 7"]  # The processes are still in step.


def test_where_the_first_process_has_no_room_all_end(tmp_path):
    table = tmp_path / "table.json"
    latency_file.save(make_table(), table)
    port = free_port()
    outputs = finish(
        [
            start_code(
                FULL_DISK + PROGRAM,
                [
                    *TINY,
                    f"--latency_table={table}",
                    "--allow_foreign_table",
                    f"--workdir={tmp_path / f'process_{process}'}",
                    "--num_processes=2",
                    f"--process_id={process}",
                    f"--coordinator=localhost:{port}",
                ],
                devices=1,
            )
            for process in range(2)
        ],
        status=2,
    )
    assert "error: the disk cannot be used (No space left on device)" in outputs[0]
    assert "error: process 0 failed (OSError(28" in outputs[1]
