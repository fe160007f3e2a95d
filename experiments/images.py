"""A user's own images: finding them, and reading any size and mode as a network sees it."""

import contextlib
import logging
import os
import stat
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from instanas_jax import errors
from instanas_jax.errors import InputError

# Pillow logs some of the errors that it also raises.
logging.getLogger("PIL").setLevel(logging.CRITICAL)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
MAX_PIXELS = 1 << 26  # 8192 x 8192: a quarter of a gigabyte, once decoded.


def find(name: str) -> tuple[list[str], list[InputError]]:
    """The files behind one argument: itself, or all images in a folder and the folders in it.

    Returns:
      Paths, sorted, and what of the folder cannot be read. Hidden files are left out, and a file's
      suffix must be that of an image; a file that is named itself is always tried.
    """
    if not os.path.isdir(name):
        return [name], []
    paths: list[str] = []
    errors: list[InputError] = []
    for folder, subfolders, files in os.walk(
        name, onerror=lambda error: errors.append(_unreadable(error.filename, error))
    ):
        subfolders[:] = [subfolder for subfolder in subfolders if not subfolder.startswith(".")]
        paths += [os.path.join(folder, file) for file in files if _looks_like_an_image(file)]
    if not paths and not errors:
        errors.append(
            InputError(
                f"{printable(name)} holds no image: name a folder with files that end in .png, "
                ".jpg, ..., or the files themselves"
            )
        )
    return sorted(paths), errors


def read(path: str) -> np.ndarray:
    """Decodes a file's first frame, upright, as RGB; uint8 [H, W, 3].

    Transparent pixels lie on white. 16 bits become 8 by scaling.

    Raises:
      InputError: the file is absent, unreadable, no image of `FORMATS`, damaged, or has more than
        `MAX_PIXELS`, which its header tells before anything is decoded.
    """
    try:
        _check_file(path)
        # Pillow warns of much that an error or a good image follows.
        with open(path, "rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(path, stream)
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(path, "far too many") from None
    except Image.UnidentifiedImageError:
        raise InputError(
            f"{printable(path)} is no image that can be read: give one of {', '.join(FORMATS)}"
        ) from None
    except OSError as error:
        if error.errno is not None:
            raise _unreadable(path, error) from error
        raise _undecodable(path, error) from error
    except Exception as error:  # Pillow's decoders raise many types on damaged files.
        raise _undecodable(path, error) from error


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """The middle square of an image uint8 [H, W, 3], scaled to [size, size, 3].

    This is the shorter side scaled to `size`, then a centre crop, without ever holding the long
    side of a very thin image at that scale. Shrinking averages over the pixels that become one.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    scaled = Image.fromarray(image).resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    return np.asarray(scaled)


def printable(path: str) -> str:
    """A path on one line, whatever bytes its name holds, if any."""
    return path if path and path.isprintable() else repr(path)


def _looks_like_an_image(file: str) -> bool:
    return not file.startswith(".") and os.path.splitext(file)[1].lower() in _SUFFIXES


def _check_file(path: str) -> None:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # Opening a pipe would wait for whoever writes to it.
        raise InputError(f"{printable(path)} is not a regular file: name an image file")
    if status.st_size == 0:
        raise InputError(f"{printable(path)} is empty: copy or save the image again")


def _decode(path: str, stream: BinaryIO) -> np.ndarray:
    with Image.open(stream, formats=FORMATS) as image:
        width, height = image.size
        if width < 1 or height < 1:
            raise InputError(
                f"{printable(path)} has {width} x {height} pixels: give an image that has some"
            )
        if width * height > MAX_PIXELS:
            raise _too_large(path, f"{width} x {height}")
        with _libtiff_silenced() if image.format == "TIFF" else contextlib.nullcontext():
            image.load()
        _turn_upright(image)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            return _as_rgb(_eight_bits(image, tiff_tags=getattr(image, "tag_v2", {})))
        if image.mode in ("I", "F"):
            raise InputError(
                f"{printable(path)} holds signed or 32-bit values, of which none is known to be "
                "white: save it with 8 or 16 bits a channel"
            )
        return _as_rgb(image)


@contextlib.contextmanager
def _libtiff_silenced() -> Iterator[None]:
    """libtiff writes to the process's standard error what Pillow raises afterwards."""
    try:
        kept = os.dup(2)
    except OSError:  # Standard error is closed.
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _turn_upright(image: Image.Image) -> None:
    # A damaged EXIF block says nothing about orientation, and viewers show such images as stored.
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:
        return


def _eight_bits(image: Image.Image, *, tiff_tags: Any) -> Image.Image:
    """Grey levels of 16 bits, in TIFF perhaps of 12 or with white as 0, as the nearest of 8."""
    (bits,) = tiff_tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))
    white = (1 << bits) - 1
    levels = np.asarray(image).astype(np.uint32)
    if tiff_tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        levels = white - levels
    if isinstance(transparent := image.info.get("transparency"), int):  # One level, in PNG.
        levels[levels == transparent] = white
    return Image.fromarray(((levels * 255 + white // 2) // white).astype(np.uint8))


def _as_rgb(image: Image.Image) -> np.ndarray:
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _too_large(path: str, pixels: str) -> InputError:
    return InputError(
        f"{printable(path)} has {pixels} pixels, at most {MAX_PIXELS / 1e6:.0f} million are "
        "decoded: shrink it first"
    )


def _unreadable(path: str, error: OSError) -> InputError:
    return InputError(
        f"{printable(path)} cannot be read ({error.strerror}): check its name and permissions"
    )


def _undecodable(path: str, error: Exception) -> InputError:
    return InputError(
        f"{printable(path)} cannot be decoded ({errors.reason(error)}): copy it again, or save it "
        "as PNG"
    )
