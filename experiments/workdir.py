"""The folder of one run: which files it holds and whose it is."""

import datetime
import json
from pathlib import Path
from typing import Any

from experiments.config import Config
from instanas_jax import environment, files, latency, latency_file
from instanas_jax.errors import InputError
from instanas_jax.search_space import SupernetSpec

_LOCK = "lock"


class RunFiles:
    """Where a run's files lie; nothing is read, written or made."""

    def __init__(self, path: str):
        if not path:
            raise InputError("--workdir is not set: name a folder for the run's files")
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.dataset = self.path / "dataset.json"
        self.latency_table = self.path / "latency_table.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.sittings = self.path / "sittings.json"
        self.results = self.path / "results.json"

    def checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    def finetuning(self, network: str) -> Path:
        """Checkpoints of the stage that finetunes a network (`plans`)."""
        return self.checkpoints(f"finetune_{network}")


class Workdir(RunFiles):
    """A run's files, to write. Making one checks that the folder belongs to the configuration, and
    keeps other processes from making one until this process ends.

    Args:
      path: made where absent.
      config: the run's. Settings that an older version's folder does not name have defaults.
      flags_text: the flags in the form of a flagfile, kept for the record.

    Raises:
      InputError: the folder holds another configuration's run, is in use, or cannot be written.
    """

    def __init__(self, path: str, *, config: Config, flags_text: str):
        super().__init__(path)
        self._claim(config, flags_text)

    def begin_sitting(self, where: dict[str, Any]) -> None:
        """Notes today's date and where a run goes on: it may have begun on another machine."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(self.sittings, [*self.read_sittings(), {"date": now, **where}])

    def read_sittings(self) -> list[dict[str, Any]]:
        """All that were noted, in order; none of runs that began before there were notes."""
        if not self.sittings.exists():
            return []
        try:
            sittings = json.loads(self.sittings.read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.sittings} cannot be read ({error}): copy it again from where the run was, "
                "or delete it, and the results will not say where the run trained"
            ) from error
        if not isinstance(sittings, list):
            raise InputError(f"{self.sittings} holds no list of sittings: delete it")
        return sittings

    def _claim(self, config: Config, flags_text: str) -> None:
        try:
            if not self.config.exists():
                self._check_free()
                self.path.mkdir(parents=True, exist_ok=True)
            files.hold(self.path / _LOCK)
            if self.config.exists():  # By now: another process may just have made it.
                there = self._read_config()
                _check_same(self.path, there.to_json(), config.to_json())
                return
            files.write_text(self.path / "flags.txt", flags_text + "\n")
            write_json(self.path / "versions.json", environment.describe_versions())
            write_json(self.config, config.to_json())
        except OSError as error:
            raise InputError(
                f"--workdir={self.path} cannot be used ({error.strerror}): name a folder that "
                "can be written"
            ) from error

    def _check_free(self) -> None:
        # A run that was stopped here before may have left the first of its files.
        names = {file.name for file in self.path.iterdir()} if self.path.exists() else set()
        first = {"flags.txt", "versions.json", _LOCK}
        if any(name not in first and not name.endswith(".partial") for name in names):
            raise InputError(
                f"--workdir={self.path} holds files but no config.json, so it is not a run's "
                "folder: name an empty or a new one"
            )

    def _read_config(self) -> Config:
        try:
            return Config.from_json(json.loads(self.config.read_text()))
        except InputError as error:
            raise InputError(
                f"{self.config} does not fit this program ({error}): name another --workdir"
            ) from error
        except ValueError as error:  # Bytes that are no text, too.
            raise InputError(
                f"{self.config} is not JSON ({error}): name another --workdir"
            ) from error


def load_table(run: RunFiles, spec: SupernetSpec) -> latency.LatencyTable:
    """The latency table that a run was searched with; InputError where it is lost or damaged."""
    return latency_file.load(
        run.latency_table,
        spec,
        advice="delete it and, if there is one, results.json beside it, and repeat the command of "
        "the run, which measures it anew and trains nothing twice",
    )


def _check_same(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    if there == here:
        return
    old, new = _flatten(there), _flatten(here)
    name = next(key for key in sorted({*old, *new}) if old.get(key) != new.get(key))
    raise InputError(
        f"--workdir={path} belongs to a run with {name}={old.get(name)}, this one has "
        f"{name}={new.get(name)}: name another --workdir or restore the setting"
    )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def write_json(path: Path, values: Any) -> None:
    files.write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")
