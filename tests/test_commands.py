"""Programs as a user starts them: help, mistakes, and what is left when one is stopped."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.config import Config
from experiments.workdir import Workdir
from instanas_jax.errors import InputError


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("experiments.digits", ("workdir", "search_epochs", "width", "compile_cache")),
        ("experiments.static_search", ("workdir", "variant", "method")),
        ("experiments.profile", ("output", "profile_rounds", "width")),
        ("benchmarks.over_seeds", ("output",)),
    ],
)
def test_help_shows_every_flag_of_the_program(module, names):
    finished = run("-m", module, "--help")
    assert finished.returncode == 0
    for name in names:
        assert f"--{name}:" in finished.stdout or f"--[no]{name}:" in finished.stdout


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--pretrain_batch_size=100000", "--pretrain_batch_size=100000"),
        ("--preset=px64", "choose another preset"),
    ],
)
def test_a_mistake_leaves_no_folder_that_the_mended_command_would_find(tmp_path, flag, message):
    workdir = tmp_path / "run"
    finished = run("-m", "experiments.digits", f"--workdir={workdir}", flag)
    assert finished.returncode == 2
    assert message in finished.stderr and finished.stderr.count("\n") == 1
    assert not workdir.exists()


def test_a_folder_that_a_run_had_begun_to_make_is_its_own(tmp_path):
    config = Config("digits")
    (tmp_path / "flags.txt").write_text("--seed=1\n")
    (tmp_path / "versions.json.partial").touch()
    Workdir(str(tmp_path), config=config, flags_text="--seed=0")
    assert (tmp_path / "flags.txt").read_text() == "--seed=0\n"
    (tmp_path / "config.json").rename(tmp_path / "letters.json")
    with pytest.raises(InputError, match="not a run's folder"):
        Workdir(str(tmp_path), config=config, flags_text="")


def test_a_full_disk_is_one_line():
    raising = "OSError(28, 'No space left on device', 'run/metrics.jsonl')"
    finished = run(
        "-c",
        f"from experiments import flags\ndef main():\n    raise {raising}\nflags.start(main)",
    )
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert "run/metrics.jsonl" in finished.stderr and "No space left" in finished.stderr


def test_an_address_without_a_port_is_one_line(tmp_path):
    finished = run(
        "-m",
        "experiments.digits",
        f"--workdir={tmp_path / 'run'}",
        "--num_processes=2",
        "--coordinator=host",
    )
    assert finished.returncode == 2
    assert finished.stderr == (
        "error: --coordinator=host: give HOST:PORT, where process 0 is reached\n"
    )


@pytest.mark.parametrize(
    ("resumes", "line"),
    [(False, "interrupted\n"), (True, "interrupted: repeat the command to resume\n")],
)
def test_an_interruption_is_heard_where_python_would_drop_it(resumes, line):
    """In a callback of the garbage collector, such as JAX's, exceptions end as a warning."""
    finished = run(
        "-c",
        "import gc, signal, time\n"
        "from experiments import flags\n"
        # Whatever this process was started with: what runs in the background ignores it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "pressed = []\n"
        "def callback(phase, info):\n"
        "    if not pressed:\n"
        "        pressed.append(signal.SIGINT)\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "        time.sleep(0.001)\n"
        "def main():\n"
        "    gc.callbacks.append(callback)\n"
        "    gc.collect()\n"
        "    time.sleep(10)\n"
        "    print('not heard')\n"
        f"flags.start(main, resumes={resumes})",
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (130, "", line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir={folder}/" + "x" * 300], "File name too long"),
        (["--flagfile={folder}/latin1.flags"], "codec can't decode"),
        (["--workdir={folder}/run", "--controller=large"], "choose one of residual_small, "),
        (["--workdir={folder}/run", "--num_processes=0"], "no cluster is found"),
    ],
)
def test_strange_arguments_are_one_line(tmp_path, arguments, message):
    (tmp_path / "latin1.flags").write_bytes("# für zwei Kerne\n--seed=1\n".encode("latin1"))
    given = [argument.format(folder=tmp_path) for argument in arguments]
    finished = run("-m", "experiments.digits", *given)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert message in finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["latin1.flags"]


@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_an_interruption_ends_the_inference_process_as_well(tmp_path, send):
    """Ctrl-C in a terminal reaches both, `kill` the one that waits for the other."""
    note, script = tmp_path / "pid", tmp_path / "timing.py"
    script.write_text(
        "import os, signal, time\n"
        "from experiments import flags\n"
        "from instanas_jax import environment\n"
        "def measure():\n"
        f"    open({str(note)!r}, 'w').write(str(os.getpid()))\n"
        "    time.sleep(30)\n"
        "def main():\n"
        "    environment.in_inference_process(measure, threads=1)\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    flags.start(main)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent.parent)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _wait_until(lambda: note.exists() and note.read_text() != "")
        send(parent.pid, signal.SIGINT)
        assert parent.communicate(timeout=20)[1] == "interrupted\n"
        assert parent.returncode == 130 and not _is_running(int(note.read_text()))
    finally:
        parent.kill()


def test_a_folder_in_use_is_one_line(tmp_path):
    workdir = tmp_path / "run"
    Workdir(str(workdir), config=Config("digits"), flags_text="")
    before = {path.name for path in workdir.iterdir()}
    finished = run("-m", "experiments.digits", f"--workdir={workdir}")
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert f"{workdir} is in use by another process" in finished.stderr
    assert {path.name for path in workdir.iterdir()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")
def test_an_inference_process_ends_with_the_one_that_is_killed(tmp_path):
    note = tmp_path / "pid"
    command = f"import os, time; open({str(note)!r}, 'w').write(str(os.getppid())); time.sleep(30)"
    script = tmp_path / "parent.py"
    script.write_text(
        "import subprocess, sys\n"
        "from instanas_jax import environment\n"
        "if __name__ == '__main__':\n"
        f"    arguments = [sys.executable, '-c', {command!r}]\n"
        "    environment.in_inference_process(subprocess.run, arguments, threads=1)\n"
    )
    root = pathlib.Path(__file__).parent.parent
    parent = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(root)}
    )
    try:
        _wait_until(lambda: note.exists() and note.read_text() != "")
        child = int(note.read_text())
        os.kill(child, 0)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        _wait_until(lambda: not _is_running(child))
    finally:
        parent.kill()


def _wait_until(is_true, *, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
