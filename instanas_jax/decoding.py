"""From an encoded image of any size and mode to the square that a network sees, on the host."""

import io
import math

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]  # Left, top, right, bottom: pixels, the last two outside.

_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)  # Width by height.
_TRIES = 10
_CENTRAL_SHARE = 224 / 256


def decode(encoded: bytes) -> Image.Image:
    """The image as RGB, stored orientation; Pillow's errors where it is damaged."""
    with Image.open(io.BytesIO(encoded)) as image:
        return image.convert("RGB")


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """A random part of an image, as Inception was trained on (Szegedy et al. 2015, section 6).

    Of the image's area it has a share uniform in 8 to 100 %, and its aspect is log-uniform between
    3:4 and 4:3. After ten that would not fit: the largest central part of such an aspect.

    Args:
      width: of the image in pixels.
      height: likewise.
      rng: the crop's own.
    """
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*_AREA)
        aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.integers(width - box_width + 1))
            top = int(rng.integers(height - box_height + 1))
            return left, top, left + box_width, top + box_height
    aspect = min(max(width / height, _ASPECT[0]), _ASPECT[1])
    return _central(width, height, min(width, height * aspect), min(height, width / aspect))


def central_box(width: int, height: int) -> Box:
    """The middle square, 224/256 of the shorter side: scaled to 256 and cropped to 224, at 224."""
    side = min(width, height) * _CENTRAL_SHARE
    return _central(width, height, side, side)


def scale(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """A part of an image, scaled to uint8 [size, size, 3].

    As if the whole image were scaled and then cut, bilinearly; shrinking averages over the pixels
    that become one.
    """
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _central(width: int, height: int, box_width: float, box_height: float) -> Box:
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, left + box_width, top + box_height
