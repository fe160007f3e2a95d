"""A user's images: every odd kind as expected, every bad kind as one line."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import images
from instanas_jax.errors import InputError

# Two rows of three pixels, all different, so that every turn and mirror shows.
PIXELS = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [128, 128, 128], [255, 255, 255]]],
    np.uint8,
)
NOISE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
GREY_16 = np.array([[0, 0x8000, 0xFFFF]], np.uint16)


def encode(image: Image.Image, format_name: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def read(tmp_path: Path, content: bytes) -> np.ndarray:
    path = tmp_path / "image"
    path.write_bytes(content)
    image = images.read(str(path))
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    return image


def png(width: int, height: int, *, depth: int, colour: int, rows: bytes = b"") -> bytes:
    """A PNG by hand, for headers and modes that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


def grey_tiff(values: bytes, *, width: int, bits: int, white_is_zero: bool) -> bytes:
    """A TIFF of one row by hand."""
    tags = (
        *((256, width), (257, 1), (258, bits), (259, 1), (262, 0 if white_is_zero else 1)),
        *((273, 8), (277, 1), (278, 1), (279, len(values))),
    )
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II" + struct.pack("<HI", 42, 8 + len(values)) + values + directory


class TestOddImages:
    @pytest.mark.parametrize("format_name", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
    def test_pixels_survive_lossless_formats(self, tmp_path, format_name):
        options = {"lossless": True} if format_name == "WEBP" else {}
        content = encode(Image.fromarray(PIXELS), format_name, **options)
        np.testing.assert_array_equal(read(tmp_path, content), PIXELS)

    def test_jpeg(self, tmp_path):
        flat = Image.new("RGB", (16, 8), (200, 100, 50))
        image = read(tmp_path, encode(flat, "JPEG", quality=95))
        assert image.shape == (8, 16, 3)
        assert np.abs(image.astype(int) - (200, 100, 50)).max() <= 3

    @pytest.mark.parametrize("format_name", ["PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize(
        ("orientation", "upright"),
        [
            (2, PIXELS[:, ::-1]),
            (3, PIXELS[::-1, ::-1]),
            (6, np.rot90(PIXELS, -1)),
            (8, np.rot90(PIXELS)),
        ],
    )
    def test_orientation_is_honoured(self, tmp_path, format_name, orientation, upright):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if format_name == "WEBP" else {}
        content = encode(Image.fromarray(PIXELS), format_name, exif=exif, **options)
        np.testing.assert_array_equal(read(tmp_path, content), upright)

    def test_a_damaged_exif_block_leaves_the_image_as_stored(self, tmp_path):
        image = Image.fromarray(NOISE)
        damaged = encode(image, "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
        np.testing.assert_array_equal(
            read(tmp_path, damaged), read(tmp_path, encode(image, "JPEG"))
        )

    @pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG", "TIFF"])
    def test_of_an_animation_the_first_frame(self, tmp_path, format_name):
        red, blue = (Image.new("RGB", (5, 4), colour) for colour in ("red", "blue"))
        options = {"lossless": True} if format_name == "WEBP" else {}
        content = encode(red, format_name, save_all=True, append_images=[blue], **options)
        np.testing.assert_array_equal(
            read(tmp_path, content), np.broadcast_to(np.uint8([255, 0, 0]), (4, 5, 3))
        )

    @pytest.mark.parametrize("format_name", ["JPEG", "TIFF"])
    def test_cmyk(self, tmp_path, format_name):
        """Full cyan ink and no other leaves green and blue."""
        image = read(tmp_path, encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), format_name))
        assert np.abs(image.astype(int) - (0, 255, 255)).max() <= 2

    @pytest.mark.parametrize("format_name", ["PNG", "TIFF", "PPM"])
    def test_16_bit_grey_is_scaled_not_clipped(self, tmp_path, format_name):
        image = read(tmp_path, encode(Image.fromarray(GREY_16), format_name))
        np.testing.assert_array_equal(image[0], [[0] * 3, [128] * 3, [255] * 3])

    def test_a_transparent_level_of_16_bit_grey_lies_on_white(self, tmp_path):
        content = encode(Image.fromarray(GREY_16), "PNG", transparency=0x8000)
        np.testing.assert_array_equal(read(tmp_path, content)[0, :, 0], [0, 255, 255])

    def test_16_bit_colour(self, tmp_path):
        row = b"\0" + struct.pack(">HHH", 0xFFFF, 0x8000, 0)
        image = read(tmp_path, png(1, 1, depth=16, colour=2, rows=row))
        np.testing.assert_array_equal(image, [[[255, 128, 0]]])

    def test_tiff_with_white_as_zero(self, tmp_path):
        content = grey_tiff(GREY_16.tobytes(), width=3, bits=16, white_is_zero=True)
        np.testing.assert_array_equal(read(tmp_path, content)[0, :, 0], [255, 127, 0])

    def test_tiff_of_12_bits(self, tmp_path):
        """Two values in three bytes: 4095, white, and 2048."""
        content = grey_tiff(b"\xff\xf8\x00", width=2, bits=12, white_is_zero=False)
        np.testing.assert_array_equal(read(tmp_path, content)[0, :, 0], [255, 128])

    def test_1_bit(self, tmp_path):
        bits = Image.new("1", (2, 1), 0)
        bits.putpixel((1, 0), 1)
        np.testing.assert_array_equal(
            read(tmp_path, encode(bits, "PNG")), [[[0, 0, 0], [255, 255, 255]]]
        )

    @pytest.mark.parametrize("format_name", ["PNG", "TIFF", "WEBP"])
    def test_alpha_lies_on_white(self, tmp_path, format_name):
        """Black of alpha 51/255 = 1/5 on white is 4/5 of white."""
        options = {"lossless": True} if format_name == "WEBP" else {}
        content = encode(Image.new("RGBA", (2, 2), (0, 0, 0, 51)), format_name, **options)
        np.testing.assert_array_equal(read(tmp_path, content), np.full((2, 2, 3), 204))

    def test_grey_with_alpha_lies_on_white(self, tmp_path):
        content = encode(Image.new("LA", (1, 1), (0, 51)), "PNG")
        np.testing.assert_array_equal(read(tmp_path, content), [[[204, 204, 204]]])

    @pytest.mark.parametrize("format_name", ["PNG", "GIF"])
    def test_a_transparent_palette_entry_is_white(self, tmp_path, format_name):
        palette = Image.new("P", (2, 1), 0)
        palette.putpalette([255, 0, 0, 0, 255, 0])
        palette.putpixel((1, 0), 1)
        content = encode(palette, format_name, transparency=0)
        np.testing.assert_array_equal(read(tmp_path, content), [[[255, 255, 255], [0, 255, 0]]])
        opaque = encode(palette, format_name)
        np.testing.assert_array_equal(read(tmp_path, opaque), [[[255, 0, 0], [0, 255, 0]]])

    def test_a_transparent_colour_is_white(self, tmp_path):
        image = Image.fromarray(PIXELS)
        changed = read(tmp_path, encode(image, "PNG", transparency=(0, 0, 255)))
        np.testing.assert_array_equal(changed[0, 2], [255, 255, 255])
        np.testing.assert_array_equal(changed[0, :2], PIXELS[0, :2])


class TestBadFiles:
    def refused(self, path: Path | str, match: str) -> str:
        with pytest.raises(InputError, match=match) as caught:
            images.read(str(path))
        message = str(caught.value)
        assert "\n" not in message and images.printable(str(path)) in message
        return message

    @pytest.mark.parametrize("share", [0.3, 0.9])
    @pytest.mark.parametrize("format_name", images.FORMATS)
    def test_truncated(self, tmp_path, format_name, share):
        content = encode(Image.fromarray(NOISE), format_name)
        path = tmp_path / "cut.png"
        path.write_bytes(content[: int(share * len(content))])
        self.refused(path, "cannot be decoded")

    @pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "tiff_deflate"])
    def test_a_damaged_compressed_tiff_says_nothing_else(self, tmp_path, compression, capfd):
        content = bytearray(encode(Image.fromarray(NOISE), "TIFF", compression=compression))
        middle = len(content) // 2
        content[8 : middle + 8] = b"\xff" * middle
        path = tmp_path / "damaged.tif"
        path.write_bytes(content)
        self.refused(path, "damaged.tif")
        os.write(2, b"heard")
        assert capfd.readouterr().err == "heard"

    @pytest.mark.parametrize(
        "content",
        [
            png(50_000, 50_000, depth=8, colour=2),
            png(8192, 8193, depth=8, colour=2),
            b"P6 100000 100000 255\n",
            b"P4 8200 8200\n",
        ],
        ids=["far_too_large", "one_row_too_many", "ppm", "pbm"],
    )
    def test_a_bomb_is_refused_by_its_header(self, tmp_path, content, monkeypatch):
        def decoded(self):
            raise AssertionError("decoded")

        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
        path = tmp_path / "bomb.png"
        path.write_bytes(content)
        self.refused(path, "at most 67 million")

    def test_a_bomb_in_a_frame_is_refused(self, tmp_path):
        """A GIF of 2 x 2 whose only frame is 60,000 x 60,000."""
        screen = struct.pack("<HHBBB", 2, 2, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
        frame = b"," + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x02\x4c\x01\x00;"
        path = tmp_path / "bomb.gif"
        path.write_bytes(b"GIF89a" + screen + frame)
        self.refused(path, "at most 67 million")

    @pytest.mark.parametrize("format_name", images.FORMATS)
    def test_damage_anywhere_is_one_line_or_an_image(self, tmp_path, format_name):
        """A few bytes of the first hundred overwritten: decoders then raise many types."""
        rng = np.random.default_rng(0)
        content = np.frombuffer(encode(Image.fromarray(NOISE), format_name), np.uint8)
        for _ in range(60):
            damaged = content.copy()
            damaged[rng.integers(0, 100, 3)] = rng.integers(0, 256, 3)
            try:
                read(tmp_path, damaged.tobytes())
            except InputError as error:
                assert "\n" not in str(error)

    def test_empty_and_without_pixels(self, tmp_path):
        path = tmp_path / "nothing.png"
        path.write_bytes(b"")
        self.refused(path, "is empty")
        path.write_bytes(b"P6 0 5 255\n")
        self.refused(path, "no image that can be read")

    def test_text_under_the_name_of_an_image(self, tmp_path):
        path = tmp_path / "letter.png"
        path.write_text("Dear Sir or Madam,")
        self.refused(path, "no image that can be read: give one of PNG, JPEG")

    def test_a_format_that_is_not_allowed(self, tmp_path):
        path = tmp_path / "icon.png"
        path.write_bytes(encode(Image.fromarray(NOISE), "TGA"))
        self.refused(path, "no image that can be read")

    @pytest.mark.parametrize("values", [np.float32([[0.5]]), np.int32([[7]])])
    def test_values_without_a_white(self, tmp_path, values):
        path = tmp_path / "measured.tif"
        path.write_bytes(encode(Image.fromarray(values), "TIFF"))
        self.refused(path, "none is known to be white")

    def test_missing_and_not_a_file(self, tmp_path):
        self.refused(tmp_path / "none.png", "No such file")
        self.refused(tmp_path, "not a regular file")
        self.refused("two\nlines.png", "No such file")
        os.mkfifo(tmp_path / "pipe.png")
        self.refused(tmp_path / "pipe.png", "not a regular file")

    def test_unreadable(self, tmp_path):
        path = tmp_path / "secret.png"
        path.write_bytes(encode(Image.fromarray(NOISE), "PNG"))
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
        self.refused(path, "Permission denied")

    def test_permission_denied_while_opening(self, tmp_path, monkeypatch):
        path = tmp_path / "secret.png"
        path.write_bytes(b"something")

        def denied(*arguments, **options):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", denied)
        self.refused(path, "Permission denied.*check its name and permissions")


class TestFit:
    def test_an_image_of_the_right_size_is_left_alone(self):
        square = NOISE[:60, :60]
        np.testing.assert_array_equal(images.fit(square, 60), square)

    @pytest.mark.parametrize("upright", [False, True])
    def test_is_the_shorter_side_scaled_then_a_centre_crop(self, upright):
        wide = NOISE[:20, :60]
        scaled = np.asarray(Image.fromarray(wide).resize((24, 8), Image.Resampling.BILINEAR))
        expected = scaled[:, 8:16].astype(int)
        if upright:
            wide, expected = wide.swapaxes(0, 1), expected.swapaxes(0, 1)
        fitted = images.fit(np.ascontiguousarray(wide), 8)
        assert fitted.shape == (8, 8, 3) and np.abs(fitted - expected).max() <= 1

    def test_shrinking_averages(self):
        """Stripes of one pixel, black and white, become grey and not one of the two."""
        stripes = np.zeros((64, 64, 3), np.uint8)
        stripes[:, ::2] = 255
        assert np.abs(images.fit(stripes, 8).astype(int) - 127).max() <= 8

    def test_a_thin_image_costs_no_memory(self):
        assert images.fit(np.zeros((1, 1_000_000, 3), np.uint8), 32).shape == (32, 32, 3)


class TestFind:
    def test_a_folder_is_walked_in_order_and_by_suffix(self, tmp_path):
        for name in ("b.PNG", "a.jpeg", "notes.txt", ".hidden.png", "sub/c.gif", ".trash/d.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        paths, errors = images.find(str(tmp_path))
        assert [os.path.relpath(path, tmp_path) for path in paths] == [
            "a.jpeg",
            "b.PNG",
            "sub/c.gif",
        ]
        assert errors == []

    def test_a_named_file_is_always_tried(self, tmp_path):
        for name in ("scan", "notes.txt", "absent.png"):
            assert images.find(str(tmp_path / name)) == ([str(tmp_path / name)], [])

    def test_a_folder_without_images(self, tmp_path):
        (tmp_path / "notes.txt").write_text("")
        paths, (error,) = images.find(str(tmp_path))
        assert paths == [] and f"{tmp_path} holds no image" in str(error)

    def test_an_unreadable_folder_is_named_and_the_others_walked(self, tmp_path, monkeypatch):
        for name in ("closed/a.png", "open/b.png"):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_bytes(b"")
        scandir = os.scandir

        def guarded(path):
            if str(path).endswith("closed"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", guarded)
        paths, (error,) = images.find(str(tmp_path))
        assert paths == [str(tmp_path / "open/b.png")]
        assert "closed cannot be read (Permission denied)" in str(error)
