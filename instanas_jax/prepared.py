"""Data sets that TFDS has prepared in a folder; neither TensorFlow nor the network is needed."""

import dataclasses
import os
import pathlib
from typing import Any

from instanas_jax import errors
from instanas_jax.errors import InputError

# What TFDS cannot fetch by itself, and where it looks for it.
_BY_HAND = {
    "imagenet2012": (
        "download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar by hand from "
        "https://image-net.org/download-images (free, after registering) to {folder}/downloads/"
        "manual, then "
    )
}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared set.

    Attributes:
      name: of the set in TFDS.
      folder: that holds it, among others.
      splits: by name, a sequence of records; a record's `image` is the encoded file. Sequences can
        be pickled and read by several threads.
      class_names: [K].
    """

    name: str
    folder: pathlib.Path
    splits: dict[str, Any]
    class_names: tuple[str, ...]

    def unreadable(self, error: Exception) -> InputError:
        """What to tell a user when a record of it, or all of it, cannot be read."""
        return _unreadable(self.name, self.folder, error)


def open_prepared(name: str, data_dir: str | None, splits: tuple[str, ...]) -> Prepared:
    """Opens a set that was prepared in array_record format.

    Args:
      name: of the set in TFDS; its features must include `image` and `label`.
      data_dir: folder of prepared sets; by default TFDS_DATA_DIR, else `~/tensorflow_datasets`.
      splits: names of those to open.

    Raises:
      InputError: the set is not in the folder, or cannot be read.
    """
    default_dir = os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    folder = pathlib.Path(data_dir or default_dir).expanduser()
    # TFDS would ask the network about a set it does not find, so look first.
    if not any((folder / name).glob("*/dataset_info.json")):
        by_hand = _BY_HAND.get(name, "").format(folder=folder)
        raise InputError(
            f"no data set {name} in {folder}; prepare it once: {by_hand}`pip install -r "
            f"requirements-prepare.txt && {_build(name, folder)}`; or name the folder that holds "
            "it with --data_dir or TFDS_DATA_DIR"
        )
    try:
        # Imported here so that the other sources do without it.
        import tensorflow_datasets as tfds

        # Any: the declared return type covers every shape the function can return.
        opened: Any = tfds.data_source(
            name,
            split=list(splits),
            data_dir=str(folder),
            download=False,
            decoders={"image": tfds.decode.SkipDecoding()},
        )
        class_names = tuple(opened[0].dataset_info.features["label"].names)
        for split in opened:
            len(split)
    except Exception as error:  # TFDS and its readers raise many types, RuntimeError included
        raise _unreadable(name, folder, error) from error
    return Prepared(name, folder, dict(zip(splits, opened, strict=True)), class_names)


def _build(name: str, folder: pathlib.Path) -> str:
    return f"tfds build {name} --data_dir={folder} --file_format=array_record"


def _unreadable(name: str, folder: pathlib.Path, error: Exception) -> InputError:
    remedy = (
        f"delete {folder / name} and prepare it again with `{_build(name, folder)}`"
        if not isinstance(error, (ImportError, PermissionError, MemoryError))
        else "the data may be sound: install requirements.txt, check permissions, or make room"
    )
    return InputError(
        f"data set {name} in {folder} cannot be read ({errors.reason(error)}); {remedy}"
    )
