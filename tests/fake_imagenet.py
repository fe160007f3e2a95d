"""A tiny data set in the form in which TFDS prepares ImageNet, written without TensorFlow."""

import io
import json
import pathlib

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

VERSION = "5.1.0"
MODES = ("RGB", "RGB", "L", "CMYK")  # In turn; ImageNet has a few that are not RGB.


def picture(number: int, *, mode: str | None = None) -> Image.Image:
    """A smooth picture of its own colour; sizes, aspects and modes vary with the number."""
    width, height = 40 + 7 * (number % 5), 40 + 11 * (number % 3)
    ramp = np.linspace(0, 80, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    colour = np.array([number * 37 % 100, number * 59 % 100, number * 83 % 100])
    image = Image.fromarray((ramp + colour).astype(np.uint8))
    return image.convert(mode or MODES[number % len(MODES)])


def encode(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95)
    return stream.getvalue()


def label(number: int) -> int:
    return number % 1000


def write(folder: pathlib.Path, *, train: int, validation: int, broken: int | None = None) -> None:
    """Makes `folder/imagenet2012` of so many images, numbered from 0 in each split.

    Args:
      broken: number of a training image whose file is cut off.
    """
    home = folder / "imagenet2012" / VERSION
    home.mkdir(parents=True)
    splits = {"train": train, "validation": validation}
    for split, count in splits.items():
        # Two shards, as a place in the split must be found across files.
        for shard, numbers in enumerate(np.array_split(np.arange(count), 2)):
            path = home / f"imagenet2012-{split}.array_record-{shard:05}-of-00002"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for number in numbers.tolist():
                cut = number == broken and split == "train"
                writer.write(_record(number, cut=cut))
            writer.close()
    (home / "features.json").write_text(json.dumps(_FEATURES))
    (home / "label.labels.txt").write_text("".join(f"n{index:08}\n" for index in range(1000)))
    (home / "dataset_info.json").write_text(
        json.dumps(
            {
                "fileFormat": "array_record",
                "name": "imagenet2012",
                "version": VERSION,
                "splits": [
                    {
                        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                        "name": split,
                        "numBytes": "1",
                        "shardLengths": [
                            str(len(part)) for part in np.array_split(np.arange(count), 2)
                        ],
                    }
                    for split, count in splits.items()
                ],
            }
        )
    )


def _record(number: int, *, cut: bool) -> bytes:
    encoded = encode(picture(number))
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["image"].bytes_list.value.append(encoded[: len(encoded) // 2] if cut else encoded)
    feature["label"].int64_list.value.append(label(number))
    feature["file_name"].bytes_list.value.append(f"{number}.JPEG".encode())
    return example.SerializeToString()


def _feature(module: str, name: str, **values) -> dict:
    return {"pythonClassName": f"tensorflow_datasets.core.features.{module}.{name}", **values}


_FEATURES = _feature(
    "features_dict",
    "FeaturesDict",
    featuresDict={
        "features": {
            "file_name": _feature("text_feature", "Text", text={}),
            "image": _feature(
                "image_feature",
                "Image",
                image={
                    "dtype": "uint8",
                    "encodingFormat": "jpeg",
                    "shape": {"dimensions": ["-1", "-1", "3"]},
                },
            ),
            "label": _feature(
                "class_label_feature", "ClassLabel", classLabel={"numClasses": "1000"}
            ),
        }
    },
)
