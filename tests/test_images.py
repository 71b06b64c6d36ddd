"""Picture files of any mode, broken ones too. Those made here are 2 x 1: left and right tell whether one was turned."""

import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.coco import CocoCaptions
from datasets.images import decode_file, image_stream, read_rgb
from datasets.registry import DATASETS


def palette_image(transparent):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    return image, ({"transparency": 0} if transparent else {})


def array_image(values, dtype):
    return Image.fromarray(np.array([values], dtype=dtype)), {}


def pixels(mode, left, right):
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), left)
    image.putpixel((1, 0), right)
    return image, {}


MODES = {
    "RGB": (pixels("RGB", (1, 2, 3), (250, 251, 252)), "png", [(1, 2, 3), (250, 251, 252)]),
    "L": (pixels("L", 7, 200), "png", [(7,) * 3, (200,) * 3]),
    "1": (pixels("1", 0, 1), "png", [(0,) * 3, (255,) * 3]),
    "LA": (pixels("LA", (7, 0), (200, 128)), "png", [(7,) * 3, (200,) * 3]),
    "RGBA": (pixels("RGBA", (10, 20, 30, 0), (1, 2, 3, 255)), "png", [(10, 20, 30), (1, 2, 3)]),
    "P": (palette_image(False), "png", [(10, 20, 30), (200, 100, 50)]),
    "P, transparent": (palette_image(True), "png", [(10, 20, 30), (200, 100, 50)]),
    "P, transparent by entry": (
        (palette_image(False)[0], {"transparency": b"\x00\x80"}),
        "png",
        [(10, 20, 30), (200, 100, 50)],
    ),
    "CMYK": (pixels("CMYK", (255, 0, 0, 0), (0, 0, 0, 255)), "tiff", [(0, 255, 255), (0, 0, 0)]),
    "CMYK, white": (
        pixels("CMYK", (0, 0, 0, 0), (0, 255, 255, 0)),
        "tiff",
        [(255, 255, 255), (255, 0, 0)],
    ),
    "16 bits, PNG": (array_image([257 * 3, 65535], np.uint16), "png", [(3,) * 3, (255,) * 3]),
    "16 bits, TIFF": (array_image([257 * 130, 0], np.uint16), "tiff", [(130,) * 3, (0,) * 3]),
    "32 bits, small numbers": (array_image([100, 255], np.int32), "tiff", [(100,) * 3, (255,) * 3]),
    "32 bits, large numbers": (
        array_image([257 * 100, 65535], np.int32),
        "tiff",
        [(100,) * 3, (255,) * 3],
    ),
    "float, 0 to 1": (array_image([0.2, 1.0], np.float32), "tiff", [(51,) * 3, (255,) * 3]),
    "float, 0 to 255": (array_image([51.0, 254.0], np.float32), "tiff", [(51,) * 3, (254,) * 3]),
    "float, 0 to 65535": (
        array_image([257 * 9.0, 65535.0], np.float32),
        "tiff",
        [(9,) * 3, (255,) * 3],
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_any_mode_decodes_to_rgb(tmp_path, mode):
    (image, options), suffix, expected = MODES[mode]
    image.save(tmp_path / f"a.{suffix}", **options)
    found = read_rgb(tmp_path / f"a.{suffix}")
    assert (found.mode, found.size) == ("RGB", (2, 1))
    assert [found.getpixel((0, 0)), found.getpixel((1, 0))] == expected


def test_jpegs_in_grey_and_cmyk_decode_to_rgb(tmp_path):
    Image.new("L", (16, 16), 90).save(tmp_path / "grey.jpg")
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert read_rgb(tmp_path / "grey.jpg").getpixel((8, 8)) == (90,) * 3
    assert read_rgb(tmp_path / "cmyk.jpg").getpixel((8, 8)) == pytest.approx((255, 0, 0), abs=6)


def test_orientation_tags_are_ignored(tmp_path):
    image, _ = pixels("RGB", (0, 0, 255), (255, 0, 0))
    exif = Image.Exif()
    exif[274] = 6  # "turn by a quarter"
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.getexif()[274] == 6
    found = read_rgb(tmp_path / "a.png")
    assert found.size == (2, 1)
    assert found.getpixel((0, 0)) == (0, 0, 255)


def huge_png(side):
    """A PNG that declares side x side pixels in a few bytes."""

    def chunk(kind, data):
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def noise_jpeg(path):
    Image.fromarray(
        np.random.default_rng(0).integers(0, 256, size=(64, 64, 3), dtype=np.uint8)
    ).save(path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "case",
    [
        "zero bytes",
        "truncated",
        "random",
        "text",
        "bomb of 100 megapixels",
        "bomb of 400 megapixels",
        "nan",
    ],
)
def test_a_broken_file_gives_a_reason_that_names_it(tmp_path, case):
    path = tmp_path / "it is me.jpg"
    content = noise_jpeg(path)
    path.write_bytes(
        {
            "zero bytes": b"",
            "truncated": content[: len(content) // 2],
            "random": np.random.default_rng(1).bytes(1000),
            "text": b"hello, world",
            "bomb of 100 megapixels": huge_png(10_000),
            "bomb of 400 megapixels": huge_png(20_000),
        }.get(case, b"")
    )
    if case == "nan":
        array_image([np.nan, 0.5], np.float32)[0].save(path, format="tiff")
    tensor, reason = decode_file(path, np.asarray)
    assert tensor is None
    assert reason
    assert path.name not in reason  # a message puts it before the reason
    if "bomb" in case:
        assert "decompression bomb" in reason


def test_a_missing_file_and_a_folder_give_a_reason(tmp_path):
    images = [decode_file(path, np.asarray) for path in (tmp_path / "absent.png", tmp_path)]
    assert images[0] == (None, "no such file")
    assert images[1][0] is None
    assert images[1][1]


def test_a_transform_gets_the_picture_of_its_row(tmp_path):
    files = []
    for shade in (5, 90, 250):
        files.append(tmp_path / f"{shade}.png")
        Image.new("L", (3, 2), shade).save(files[-1])
    images = [decode_file(path, lambda image: image.getpixel((0, 0))[0]) for path in files]
    assert images == [(5, None), (90, None), (250, None)]


def test_images_are_handed_over_as_one_tensor_black_where_one_is_broken(tmp_path):
    files = []
    for shade in (5, 90):
        files.append(tmp_path / f"{shade}.png")
        Image.new("L", (3, 2), shade).save(files[-1])
    (batch,) = image_stream([files[0], tmp_path / "absent.png", files[1]], 64, to_tensor)
    assert batch.keys == [64, 65, 66]
    assert batch.captions == []
    assert batch.images[:, 0, 0, 0].tolist() == [5, 0, 90]
    assert batch.errors == [None, "no such file", None]
    (batch,) = image_stream([tmp_path / "absent.png"], 0, to_tensor)
    assert (batch.keys, batch.images) == ([0], None)


def to_tensor(image):
    return torch.from_numpy(np.array(image))


def test_warnings_about_big_pictures_elsewhere_stay_as_they_are(tmp_path, recwarn):
    path = tmp_path / "a.png"
    path.write_bytes(huge_png(10_000))
    decode_file(path, np.asarray)
    with Image.open(path):
        pass
    assert [warning.category for warning in recwarn] == [Image.DecompressionBombWarning]


def test_coco_pictures_decode(coco_root):
    data = CocoCaptions(coco_root, "val", DATASETS["coco"].layout)
    for tensor, reason in (decode_file(path, np.asarray) for path in data.image_files[:300:30]):
        assert reason is None
        assert tensor.shape[2] == 3
