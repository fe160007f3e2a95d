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


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file under another name and renames it; one that was there is replaced."""
    partial = partial_of(path)
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: str | os.PathLike[str]) -> Path:
    """Where this process writes what shall become a file."""
    target = Path(path)
    return target.with_name(f"{target.name}.{os.getpid()}.partial")


def hold(path: str | os.PathLike[str]) -> TextIO | None:
    """Keeps other processes from holding the same file until what is returned is closed; on
    Windows, and on file systems without locks, it keeps nobody.

    The system lets go of it when the process ends, however it ends. The same process may hold it
    several times, and then holds it until it closes the first of them.

    Returns:
      None where nobody can write, so that nobody needs to be kept away.

    Raises:
      InputError: another process holds it.
    """
    try:
        file = open(path, "a")  # noqa: SIM115
    except OSError:
        return None
    if fcntl is None:
        return file
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
    return file
