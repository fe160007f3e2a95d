"""Files that appear whole or not at all."""

import os
from pathlib import Path


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
