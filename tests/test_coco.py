"""CocoCaptions and CocoImages on small files made here, and on COCO itself against plain json."""

import json
import zlib

import numpy as np
import pytest
from PIL import Image

from datasets import DATASETS
from datasets.coco import CocoCaptions, CocoImages, read_rgb
from utils.cli import UserError

LAYOUT = DATASETS["shapes"].layout
IMAGES = {30: "b.png", 7: "z.png", 12: "sub/a.png", 9: "no_caption.png"}  # neither ids nor names are in order
CAPTIONS = [
    (501, 7, "seven, said last"),
    (3, 30, "  thirty\n"),
    (44, 12, "twelve"),
    (2, 7, "seven"),
    (45, 12, "Zwölf 🐈"),
]


def document():
    return {
        "images": [{"id": image_id, "file_name": name} for image_id, name in IMAGES.items()],
        "annotations": [{"id": i, "image_id": image_id, "caption": text} for i, image_id, text in CAPTIONS],
    }


def write(root, content, relevance=None):
    """A data set of the split val under root; content: a document or the text of its file."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "val").mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "annotations" / "captions_val.json").write_text(text, encoding="utf-8")
    if relevance is not None:
        (root / "annotations" / "relevance_val.json").write_text(json.dumps(relevance))
    return root


def load(root):
    return CocoCaptions(root, "val", LAYOUT)


def refusal(root):
    """The message with which a data set is refused; it is one line."""
    with pytest.raises(UserError) as caught:
        load(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_come_in_order_of_image_id_with_or_without_captions(tmp_path):
    data = load(write(tmp_path, document()))
    assert data.image_ids == [7, 9, 12, 30]
    assert data.image_names == ["z.png", "no_caption.png", "sub/a.png", "b.png"]
    assert data.image_files == [tmp_path / "val" / name for name in data.image_names]
    assert 1 not in data.image_of_caption  # the image without a caption has row 1, and no caption


def test_captions_come_in_order_of_annotation_id_each_with_its_image(tmp_path):
    data = load(write(tmp_path, document()))
    assert data.caption_ids == [2, 3, 44, 45, 501]
    assert data.captions == ["seven", "  thirty\n", "twelve", "Zwölf 🐈", "seven, said last"]
    assert data.image_of_caption == [0, 3, 2, 2, 0]


def test_reading_captions_prints_nothing(tmp_path, capfd):
    load(write(tmp_path, document()))
    assert capfd.readouterr() == ("", "")


def test_relevance_becomes_image_rows_in_order_of_caption(tmp_path):
    relevance = {"2": [9, 7], "3": [30], "44": [30, 12, 7], "45": [12, 12], "501": [7]}
    assert load(write(tmp_path, document(), relevance)).relevance == [[0, 1], [3], [0, 2, 3], [2], [0]]
    (tmp_path / "annotations" / "relevance_val.json").unlink()
    assert load(tmp_path).relevance is None


@pytest.mark.parametrize(
    "changes",
    [{"44": None}, {"44": 12}, {"44": [13]}, {"44": [[12]]}, {"44": "12"}, {"44": []}],
    ids=["null", "number", "unknown", "nested", "text", "empty"],
)
def test_broken_relevance_is_refused(tmp_path, changes):
    relevance = {"2": [7], "3": [30], "44": [12], "45": [12], "501": [7]} | changes
    assert "relevance_val.json" in refusal(write(tmp_path, document(), relevance))


def test_relevance_that_leaves_a_caption_out_is_refused(tmp_path):
    assert "relevance_val.json" in refusal(write(tmp_path, document(), {"2": [7]}))
    assert "relevance_val.json" in refusal(write(tmp_path, document(), [[7]]))


def test_a_wrong_root_says_what_was_expected_and_what_was_found(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.txt").touch()
    assert "expected annotations/captions_val.json, found only a.txt, elsewhere/" in refusal(tmp_path)
    assert "found no such folder" in refusal(tmp_path / "absent")
    assert "found an empty folder" in refusal(tmp_path / "elsewhere")


def test_a_missing_folder_of_images_is_named(tmp_path):
    write(tmp_path, document())
    (tmp_path / "val").rmdir()
    assert "expected val, found only annotations/" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "nonsense", "[" * 100_000, '{"images": [1'], ids=["empty", "brace", "words", "deep", "cut"]
)
def test_what_is_not_json_is_refused(tmp_path, text):
    message = refusal(write(tmp_path, text))
    assert "captions_val.json: not valid JSON" in message


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    write(tmp_path, document())
    (tmp_path / "annotations" / "captions_val.json").write_bytes(b'{"images": "\xff\xfe"}')
    assert "captions_val.json: not valid JSON" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content", [[], "null", "3", {}, {"images": [], "annotations": []}, {"images": {"id": 1}, "annotations": []}]
)
def test_json_of_another_kind_is_refused(tmp_path, content):
    assert "captions_val.json: " in refusal(write(tmp_path, content))


def set_field(section, row, field, value):
    def change(content):
        if value is ...:
            del content[section][row][field]
        else:
            content[section][row][field] = value

    return change


BROKEN = {
    "an image's id comes twice": (set_field("images", 1, "id", 30), ["images[1]", "30"]),
    "a caption's id comes twice": (set_field("annotations", 3, "id", 501), ["annotations[3]", "501"]),
    "a blank caption": (set_field("annotations", 2, "caption", " \n\t"), ["annotations[2]", "44", "'caption'"]),
    "an empty caption": (set_field("annotations", 2, "caption", ""), ["annotations[2]", "44", "'caption'"]),
    "a number for a caption": (set_field("annotations", 2, "caption", 17), ["annotations[2]", "44", "17"]),
    "null for a caption": (set_field("annotations", 2, "caption", None), ["annotations[2]", "44", "null"]),
    "a list for a caption": (set_field("annotations", 2, "caption", ["twelve"]), ["annotations[2]", "44"]),
    "no caption": (set_field("annotations", 2, "caption", ...), ["annotations[2]", "44", "'caption'"]),
    "no image id": (set_field("annotations", 2, "image_id", ...), ["annotations[2]", "44", "'image_id'"]),
    "an unknown image": (set_field("annotations", 0, "image_id", 8), ["annotations[0]", "501", "image 8"]),
    "a text for an id": (set_field("images", 0, "id", "30"), ["images[0]", '"30"']),
    "a fraction for an id": (set_field("images", 0, "id", 30.0), ["images[0]", "30.0"]),
    "true for an id": (set_field("images", 0, "id", True), ["images[0]", "true"]),
    "no file name": (set_field("images", 2, "file_name", ...), ["images[2]", "12", "'file_name'"]),
    "a blank file name": (set_field("images", 2, "file_name", " "), ["images[2]", "12", "'file_name'"]),
    "the folder above": (set_field("images", 2, "file_name", "../../secret.png"), ["../../secret.png", "outside"]),
    "the folder above, on a detour": (
        set_field("images", 2, "file_name", "sub/../../val2/a.png"),
        ["sub/../../val2/a.png", "outside"],
    ),
    "an absolute file name": (set_field("images", 2, "file_name", "/etc/hostname"), ["/etc/hostname", "outside"]),
    "a file name with a null character": (set_field("images", 2, "file_name", "a\0.png"), ["a\\x00.png"]),
    "a file name with half a surrogate pair": (set_field("images", 2, "file_name", "\ud800.png"), ["\\ud800.png"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_entry_is_named(tmp_path, case):
    change, expected = BROKEN[case]
    content = document()
    change(content)
    message = refusal(write(tmp_path, content))
    assert "captions_val.json" in message
    for part in expected:
        assert part in message


def test_an_entry_that_is_no_object_is_named(tmp_path):
    content = document()
    content["annotations"][1] = "thirty"
    assert "annotations[1]" in refusal(write(tmp_path, content))


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path):
    write(tmp_path, document())
    (tmp_path / "secret.png").touch()
    (tmp_path / "val" / "z.png").symlink_to(tmp_path / "secret.png")
    assert "'z.png' lies outside" in refusal(tmp_path)


def test_a_link_that_leads_to_itself_is_named(tmp_path):
    write(tmp_path, document())
    (tmp_path / "val" / "z.png").symlink_to(tmp_path / "val" / "z.png")
    try:  # resolving it raises up to Python 3.12, opening it from 3.13 on
        message = CocoImages(load(tmp_path).image_files, np.asarray)[0][1]
    except UserError as error:
        message = str(error)
    assert "z.png" in message


def test_a_link_within_the_folder_is_followed(tmp_path):
    write(tmp_path, document())
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "val" / "there.png")
    (tmp_path / "val" / "z.png").symlink_to("there.png")
    assert read_rgb(load(tmp_path).image_files[0]).getpixel((0, 0)) == (1, 2, 3)


# Pictures. Every one is 2 x 1, so that left and right tell whether it was turned.


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
    "CMYK, white": (pixels("CMYK", (0, 0, 0, 0), (0, 255, 255, 0)), "tiff", [(255, 255, 255), (255, 0, 0)]),
    "16 bits, PNG": (array_image([257 * 3, 65535], np.uint16), "png", [(3,) * 3, (255,) * 3]),
    "16 bits, TIFF": (array_image([257 * 130, 0], np.uint16), "tiff", [(130,) * 3, (0,) * 3]),
    "32 bits, small numbers": (array_image([100, 255], np.int32), "tiff", [(100,) * 3, (255,) * 3]),
    "32 bits, large numbers": (array_image([257 * 100, 65535], np.int32), "tiff", [(100,) * 3, (255,) * 3]),
    "float, 0 to 1": (array_image([0.2, 1.0], np.float32), "tiff", [(51,) * 3, (255,) * 3]),
    "float, 0 to 255": (array_image([51.0, 254.0], np.float32), "tiff", [(51,) * 3, (254,) * 3]),
    "float, 0 to 65535": (array_image([257 * 9.0, 65535.0], np.float32), "tiff", [(9,) * 3, (255,) * 3]),
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
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def noise_jpeg(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(64, 64, 3), dtype=np.uint8)).save(path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "case", ["zero bytes", "truncated", "random", "text", "bomb of 100 megapixels", "bomb of 400 megapixels", "nan"]
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
    tensor, reason = CocoImages([path], np.asarray)[0]
    assert tensor is None
    assert reason.startswith(f"{path}: ")
    assert len(reason) > len(f"{path}: ")
    assert reason.count(path.name) == 1
    if "bomb" in case:
        assert "decompression bomb" in reason


def test_a_missing_file_and_a_folder_give_a_reason(tmp_path):
    images = CocoImages([tmp_path / "absent.png", tmp_path], np.asarray)
    assert len(images) == 2
    assert images[0] == (None, f"{tmp_path / 'absent.png'}: no such file")
    assert images[1][0] is None
    assert str(tmp_path) in images[1][1]


def test_a_transform_gets_the_picture_of_its_row(tmp_path):
    files = []
    for shade in (5, 90, 250):
        files.append(tmp_path / f"{shade}.png")
        Image.new("L", (3, 2), shade).save(files[-1])
    images = CocoImages(files, lambda image: image.getpixel((0, 0))[0])
    assert [images[row] for row in range(3)] == [(5, None), (90, None), (250, None)]


def test_warnings_about_big_pictures_elsewhere_stay_as_they_are(tmp_path, recwarn):
    path = tmp_path / "a.png"
    path.write_bytes(huge_png(10_000))
    CocoImages([path], np.asarray)[0]
    with Image.open(path):
        pass
    assert [warning.category for warning in recwarn] == [Image.DecompressionBombWarning]


# COCO itself.


@pytest.mark.parametrize(("split", "images", "captions"), [("train", 700, 3502), ("val", 300, 1501)])
def test_coco_is_read_as_plain_json_has_it(coco_root, split, images, captions):
    data = CocoCaptions(coco_root, split, DATASETS["coco"].layout)
    plain = json.loads((coco_root / "annotations" / f"captions_{split}2017.json").read_text(encoding="utf-8"))
    assert (
        (len(data.image_files), len(data.captions))
        == (images, captions)
        == (len(plain["images"]), len(plain["annotations"]))
    )
    assert data.image_ids == sorted(entry["id"] for entry in plain["images"])
    name_of = {entry["id"]: entry["file_name"] for entry in plain["images"]}
    expected = sorted((entry["id"], entry["caption"], name_of[entry["image_id"]]) for entry in plain["annotations"])
    rows = zip(data.caption_ids, data.captions, data.image_of_caption, strict=True)
    assert [(caption_id, text, data.image_files[row].name) for caption_id, text, row in rows] == expected
    for image_id, path in zip(data.image_ids, data.image_files, strict=True):
        assert int(path.stem) == image_id  # COCO's file names are the ids
        assert path.is_file()


def test_the_loader_has_no_dependence_on_the_order_in_the_file(coco_root, tmp_path):
    plain = json.loads((coco_root / "annotations" / "captions_val2017.json").read_text(encoding="utf-8"))
    for section in ("images", "annotations"):
        np.random.default_rng(0).shuffle(plain[section])
    shuffled, straight = load(write(tmp_path, plain)), CocoCaptions(coco_root, "val", DATASETS["coco"].layout)
    for attribute in ("image_ids", "caption_ids", "captions", "image_of_caption", "image_names"):
        assert getattr(shuffled, attribute) == getattr(straight, attribute)


def test_coco_pictures_decode(coco_root):
    data = CocoCaptions(coco_root, "val", DATASETS["coco"].layout)
    for tensor, reason in map(CocoImages(data.image_files[::30], np.asarray).__getitem__, range(10)):
        assert reason is None
        assert tensor.shape[2] == 3
