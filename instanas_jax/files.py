"""Files that appear whole or not at all, and files that one process holds."""

import errno
import os
from pathlib import Path
from typing import TextIO

from instanas_jax.errors import InputError

try:
    import fcntl
except ImportError:  # On Windows.
    fcntl = None

_held: dict[Path, TextIO] = {}  # Open: the system drops a lock when its file is closed.


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file under another name and renames it; one that was there is replaced."""
    partial = partial_of(path)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: str | os.PathLike[str]) -> Path:
    """Where this process writes what shall become a file."""
    target = Path(path)
    return target.with_name(f"{target.name}.{os.getpid()}.partial")


def hold(path: str | os.PathLike[str]) -> None:
    """Keeps other processes from holding the same file until this one ends, however it ends.

    A file that this process holds already it may hold again. Nobody is kept away on Windows, on
    file systems without locks, and where nobody can write.

    Raises:
      InputError: another process holds it.
    """
    if fcntl is None or Path(path).resolve() in _held:
        return
    try:
        file = open(path, "a")  # noqa: SIM115
    except OSError:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Of other errors the cause is a file system without locks.
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise InputError(
                f"{Path(path).parent} is in use by another process: wait until that ends, or name "
                "another folder"
            ) from None
    _held[Path(path).resolve()] = file
