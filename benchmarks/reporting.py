"""The JSON file that every benchmark writes."""

import datetime
import json
import math
import os
import pathlib
import re
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from instanas_jax import environment, files

SCHEMA_VERSION = 1
_STARTED = time.perf_counter()

# The folders in front of a file's name, in each part of a flag such as --files=a/b,c/d.
_FOLDERS = re.compile(r"[^=,]*/(?=[^/,])")


def measurement(name: str, values: Sequence[float], unit: str) -> dict[str, Any]:
    """One row of results: the median of `values` with its spread.

    A figure that is not finite becomes None, since JSON has no such number.
    """
    figures = [float(value) for value in values]
    if not all(math.isfinite(figure) for figure in figures):
        low = middle = high = None
    else:
        low, middle, high = min(figures), statistics.median(figures), max(figures)
    return {
        "name": name,
        "value": middle,
        "unit": unit,
        "min": low,
        "median": middle,
        "max": high,
        "repeats": len(figures),
    }


def write_report(
    path: str | os.PathLike[str], *, benchmark: str, results: Sequence[dict[str, Any]]
) -> None:
    """Writes a benchmark's results with the command, day, seconds, device and versions behind them.

    The file appears whole or not at all; a file that was there is replaced.

    Args:
      path: of the JSON file; missing folders are made.
      benchmark: the module's name under `benchmarks`.
      results: rows of `measurement`, with keys of the benchmark's own where it needs them.
    """
    report = {
        "benchmark": benchmark,
        "schema_version": SCHEMA_VERSION,
        "command": describe_command(benchmark, sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(time.perf_counter() - _STARTED, 1),
        "device": environment.describe_device(),
        "versions": environment.describe_versions(),
        "results": list(results),
    }
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(target, json.dumps(report, indent=2, allow_nan=False) + "\n")


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each row of `measurement`."""
    for row in rows:
        value = "not a number" if row["value"] is None else f"{row['value']:.4g} {row['unit']}"
        print(f"{row['name']}: {value}")


def describe_command(benchmark: str, arguments: Sequence[str]) -> str:
    """The command line, with files by name alone: folders of one machine mean nothing elsewhere."""
    named = [_FOLDERS.sub("", argument) for argument in arguments]
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *named])
