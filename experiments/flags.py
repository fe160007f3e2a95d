"""Command-line flags, and nothing else that reads them.

`define` turns every field of the configuration into an absl flag; `read` turns the parsed flags
back into a configuration; `start` runs a program and prints a user's mistake as one line.
"""

import _thread
import dataclasses
import errno
import gc
import io
import os
import pathlib
import signal
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

from experiments import config as config_lib
from experiments import settings
from instanas_jax import environment, files, parallel
from instanas_jax.errors import InputError

# Not of the program but of where it writes.
_DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT)

_DEFINERS = {
    bool: flags.DEFINE_bool,
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
}


flags.DEFINE_string(
    "compile_cache",
    os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "instanas_jax"),
    "Folder that keeps compiled programs for later runs; empty: none. JAX_COMPILATION_CACHE_DIR, "
    "where set, takes its place.",
)


def define(defaults: config_lib.Config) -> None:
    """Defines a flag for each setting, with this configuration's values as defaults."""
    for section, _, prefix in config_lib.sections():
        define_section(getattr(defaults, section), prefix=prefix)
    flags.DEFINE_string("workdir", None, "Folder for everything of this run. Required.")
    flags.DEFINE_string(
        "latency_table",
        "",
        "Latency table to search with; empty: measure one on this computer's processor.",
    )
    flags.DEFINE_bool("allow_foreign_table", False, "Accept a latency table of another processor.")
    flags.DEFINE_integer(
        "num_processes",
        1,
        "Processes that share the run, each started by the same command; 0: as many as the "
        "cluster's environment says (Slurm, Open MPI, Kubernetes, TPU).",
        lower_bound=0,
    )
    flags.DEFINE_integer(
        "process_id", 0, "This process among them, from 0; process 0 writes.", lower_bound=0
    )
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, of a run of many processes.")


def define_section(
    defaults: Any, *, prefix: str = "", names: tuple[str, ...] | None = None
) -> None:
    """Defines a flag for each field of a part of the configuration, or for those named."""
    for field in dataclasses.fields(defaults):
        if names is not None and field.name not in names:
            continue
        default = getattr(defaults, field.name)
        help_text = field.metadata["help"]
        if field.metadata["choices"]:
            help_text += f" One of {settings.listed(field.metadata['choices'])}."
        if isinstance(default, tuple):
            flags.DEFINE_list(prefix + field.name, list(default), help_text)
        else:
            _DEFINERS[type(default)](prefix + field.name, default, help_text)


def join_processes() -> None:
    """Joins the other processes that the flags speak of; InputError if that fails."""
    count, process, coordinator = (
        flags.FLAGS.num_processes,
        flags.FLAGS.process_id,
        flags.FLAGS.coordinator,
    )
    if count == 0:
        parallel.initialise()
        return
    if process >= count:
        raise InputError(f"--process_id={process}: of {count} processes the last is {count - 1}")
    if count == 1:
        return
    if not coordinator:
        raise InputError(
            f"--num_processes={count} needs --coordinator=HOST:PORT, where process 0 is reached"
        )
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdigit()):
        raise InputError(f"--coordinator={coordinator}: give HOST:PORT, where process 0 is reached")
    parallel.initialise(coordinator=coordinator, num_processes=count, process_id=process)


def read(dataset: str) -> config_lib.Config:
    """The configuration that the parsed flags describe; InputError if out of range."""
    parts: dict[str, Any] = {
        section: read_section(kind, prefix=prefix)
        for section, kind, prefix in config_lib.sections()
    }
    config = config_lib.Config(dataset=dataset, **parts)
    config_lib.check_together(config)
    return config


def read_section(kind: type, *, prefix: str = "") -> Any:
    """One part of the configuration, checked; fields without a flag keep their default."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if prefix + field.name in flags.FLAGS:
            value = flags.FLAGS[prefix + field.name].value
            values[field.name] = tuple(value) if isinstance(value, list) else value
    section = kind(**values)
    config_lib.validate_section(section, prefix=prefix)
    return section


def define_output() -> None:
    """Defines the flag of programs that write one file."""
    flags.DEFINE_string("output", None, "JSON file to write. Required.")


def read_output() -> pathlib.Path:
    """The file of `--output`. Ask before the work; see `check_output`."""
    if not flags.FLAGS.output:
        raise InputError("--output is not set: name the JSON file for what is found")
    return check_output(flags.FLAGS.output)


def check_output(name: str) -> pathlib.Path:
    """A file that can be written, whose folder is made; InputError if it can't be."""
    path = pathlib.Path(name)
    if os.path.isdir(path):
        raise InputError(f"--output={name} is a folder: name a file")
    try:
        if path.exists() and not path.is_file():  # Which a finished file would replace.
            raise InputError(f"--output={name} is a device or a pipe: name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = files.partial_of(path)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise InputError(
            f"--output={name} cannot be written ({error.strerror}): name another file"
        ) from error
    return path


def as_flagfile() -> str:
    """The flags of this program that were given or have a default, one a line."""
    module_flags = flags.FLAGS.flags_by_module_dict()[__name__]
    lines = (flag.serialize() for flag in module_flags)
    return "\n".join(sorted(line for line in lines if line))


def start(main: Callable[[], int | None], *, resumes: bool = False) -> None:
    """Parses flags and runs `main`; a user's mistake ends with one line and status 2.

    Args:
      main: returns the exit status, where it is not always 0.
      resumes: the same command goes on where it was interrupted.
    """

    def without_arguments(arguments: list[str]) -> int:
        if arguments:
            raise InputError(f"unexpected argument '{arguments[0]}': flags begin with --")
        return main() or 0

    start_with_arguments(without_arguments, resumes=resumes)


def start_with_arguments(main: Callable[[list[str]], int], *, resumes: bool = False) -> None:
    """As `start`, of a program that takes names beside flags; `main` returns the exit status."""

    def guarded(arguments: list[str]) -> None:
        # Orbax reports every step of a save; a user wants the progress bar.
        logging.set_verbosity(logging.WARNING)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Else it is ignored.
            signal.signal(signal.SIGINT, _interrupt)
        environment.configure_cpu()
        if flags.FLAGS.compile_cache:
            environment.keep_compiled(os.path.expanduser(flags.FLAGS.compile_cache))
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A file's name may hold what the terminal's encoding cannot say.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            sys.exit(main(arguments[1:]))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            remedy = ": repeat the command to resume" if resumes else ""
            print(f"interrupted{remedy}", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # Whoever read the output has left.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            name = error.filename or "a file"
            print(
                f"error: {name} cannot be used ({error.strerror}): make room or check permissions, "
                "and repeat the command",
                file=sys.stderr,
            )
            sys.exit(2)

    app.run(guarded, flags_parser=_parse)


def _interrupt(_signal: int, frame: types.FrameType | None) -> None:
    """As Python does, but not in a callback of its garbage collector, such as JAX's, where
    exceptions are printed and dropped: there once more a little later."""
    while frame is not None:
        if frame.f_code in _collector_callbacks():
            threading.Timer(0.01, _thread.interrupt_main).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _collector_callbacks() -> set[types.CodeType]:
    return {call.__code__ for call in gc.callbacks if isinstance(call, types.FunctionType)}


def _show_all_flags() -> None:
    """Makes --help show what this project defines, wherever, as the program's own."""
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.split(".")[0] in ("experiments", "benchmarks"):
            for flag in defined:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _parse(arguments: list[str]) -> list[str]:
    """Program's name and what is no flag; a mistake ends the program as in `start`."""
    try:
        _show_all_flags()
        return flags.FLAGS(arguments)
    except SystemExit:  # Of a flag such as --help, which has shown what it was asked for.
        sys.exit(0)
    except (flags.Error, UnicodeDecodeError) as error:  # The latter of a flagfile's bytes.
        print(f"error: {' '.join(str(error).split())}: see --help", file=sys.stderr)
        sys.exit(2)
