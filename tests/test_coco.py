"""CocoCaptions on small files made here, and on COCO itself against plain json."""

import json

import numpy as np
import pytest
from PIL import Image

from datasets.coco import CocoCaptions
from datasets.images import decode_file, read_rgb
from datasets.registry import DATASETS
from tests.conftest import TRAIN_IDS, draw, draw_data
from utils.cli import UserError

LAYOUT = DATASETS["shapes"].layout
IMAGES = {
    30: "b.png",
    7: "z.png",
    12: "sub/a.png",
    9: "no_caption.png",
}  # neither ids nor names are in order


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
        "annotations": [
            {"id": i, "image_id": image_id, "caption": text} for i, image_id, text in CAPTIONS
        ],
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
        load(root).check_broken(0)
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
    assert load(write(tmp_path, document(), relevance)).relevance == [
        [0, 1],
        [3],
        [0, 2, 3],
        [2],
        [0],
    ]
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
    assert "expected annotations/captions_val.json, found only a.txt, elsewhere/" in refusal(
        tmp_path
    )
    assert "found no such folder" in refusal(tmp_path / "absent")
    assert "found an empty folder" in refusal(tmp_path / "elsewhere")


def test_a_missing_folder_of_images_is_named(tmp_path):
    write(tmp_path, document())
    (tmp_path / "val").rmdir()
    assert "expected val, found only annotations/" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "nonsense", "[" * 100_000, '{"images": [1'],
    ids=["empty", "brace", "words", "deep", "cut"],
)
def test_what_is_not_json_is_refused(tmp_path, text):
    message = refusal(write(tmp_path, text))
    assert "captions_val.json: not valid JSON" in message


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    write(tmp_path, document())
    (tmp_path / "annotations" / "captions_val.json").write_bytes(b'{"images": "\xff\xfe"}')
    assert "captions_val.json: line 1: byte 0xff is not UTF-8" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        [],
        "null",
        "3",
        {},
        {"images": [], "annotations": []},
        {"images": {"id": 1}, "annotations": []},
    ],
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
    "a caption's id comes twice": (
        set_field("annotations", 3, "id", 501),
        ["annotations[3]", "501"],
    ),
    "a blank caption": (
        set_field("annotations", 2, "caption", " \n\t"),
        ["annotations[2]", "44", "blank caption"],
    ),
    "an empty caption": (
        set_field("annotations", 2, "caption", ""),
        ["annotations[2]", "44", "blank caption"],
    ),
    "a number for a caption": (
        set_field("annotations", 2, "caption", 17),
        ["annotations[2]", "44", "17"],
    ),
    "null for a caption": (
        set_field("annotations", 2, "caption", None),
        ["annotations[2]", "44", "null"],
    ),
    "a list for a caption": (
        set_field("annotations", 2, "caption", ["twelve"]),
        ["annotations[2]", "44"],
    ),
    "no caption": (
        set_field("annotations", 2, "caption", ...),
        ["annotations[2]", "44", "'caption'"],
    ),
    "no image id": (
        set_field("annotations", 2, "image_id", ...),
        ["annotations[2]", "44", "'image_id'"],
    ),
    "an unknown image": (
        set_field("annotations", 0, "image_id", 8),
        ["annotations[0]", "501", "image 8"],
    ),
    "a word for an id": (set_field("images", 0, "id", "thirty"), ["images[0]", '"thirty"']),
    "a fraction for an id": (set_field("images", 0, "id", 30.5), ["images[0]", "30.5"]),
    "true for an id": (set_field("images", 0, "id", True), ["images[0]", "true"]),
    "no file name": (set_field("images", 2, "file_name", ...), ["images[2]", "12", "'file_name'"]),
    "a blank file name": (
        set_field("images", 2, "file_name", " "),
        ["images[2]", "12", "'file_name'"],
    ),
    "the folder above": (
        set_field("images", 2, "file_name", "../../secret.png"),
        ["../../secret.png", "leads out of"],
    ),
    "the folder above, on a detour": (
        set_field("images", 2, "file_name", "sub/../../val2/a.png"),
        ["sub/../../val2/a.png", "leads out of"],
    ),
    "a file name with a null character": (
        set_field("images", 2, "file_name", "a\0.png"),
        ["a\\x00.png"],
    ),
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


def test_links_and_absolute_names_are_read_wherever_they_lead(tmp_path):
    write(tmp_path, document())
    draw(tmp_path / "elsewhere.png", 1)
    (tmp_path / "val" / "z.png").symlink_to(tmp_path / "elsewhere.png")
    assert decode_file(load(tmp_path).image_files[0], np.asarray)[1] is None
    content = document()
    content["images"][2]["file_name"] = str(tmp_path / "elsewhere.png")
    write(tmp_path, content)
    assert tmp_path / "elsewhere.png" in load(tmp_path).image_files


@pytest.mark.parametrize("kind", [str, float])
def test_ids_may_be_texts_or_whole_floats(tmp_path, kind):
    expected = load(write(tmp_path, document()))
    content = document()
    for section, names in (("images", ["id"]), ("annotations", ["id", "image_id"])):
        for entry in content[section]:
            for name in names:
                entry[name] = kind(entry[name])
    found = load(write(tmp_path, content))
    assert found.fingerprint() == expected.fingerprint()
    mark = (tmp_path / "annotations" / "captions_val.json").read_text()
    (tmp_path / "annotations" / "captions_val.json").write_text(mark, encoding="utf-8-sig")
    assert load(tmp_path).fingerprint() == expected.fingerprint()


def test_blank_captions_are_left_out_if_they_may_be(tmp_path):
    content = document()
    content["annotations"][2]["caption"] = " "
    split = load(write(tmp_path, content))
    split.check_broken(1)
    with pytest.raises(UserError, match="1 broken samples so far"):
        split.check_broken(0)
    assert len(split.captions) == len(content["annotations"]) - 1
    assert len(split.image_ids) == len(content["images"])


def test_half_a_surrogate_pair_in_a_caption_becomes_a_mark_that_can_be_written(tmp_path, caplog):
    content = document()
    content["annotations"][2]["caption"] = "a \ud83d cat \U0001f408"
    split = load(write(tmp_path, content))
    assert "a \ufffd cat \U0001f408" in split.captions
    assert "1 captions have half a character" in caplog.text


def test_a_link_that_leads_to_itself_is_named(tmp_path):
    write(tmp_path, document())
    (tmp_path / "val" / "z.png").symlink_to(tmp_path / "val" / "z.png")
    try:  # resolving it raises up to Python 3.12, opening it from 3.13 on
        image, message = decode_file(load(tmp_path).image_files[0], np.asarray)
    except UserError as error:
        image, message = None, str(error)
        assert "z.png" in message
    assert image is None and message


def test_a_link_within_the_folder_is_followed(tmp_path):
    write(tmp_path, document())
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "val" / "there.png")
    (tmp_path / "val" / "z.png").symlink_to("there.png")
    assert read_rgb(load(tmp_path).image_files[0]).getpixel((0, 0)) == (1, 2, 3)


def test_a_captions_file_with_categories_is_read(tmp_path):
    root = draw_data(tmp_path / "mine", splits=(("val", TRAIN_IDS),))
    file = root / "annotations" / "captions_val.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"categories": [3], "info": None}))
    assert len(CocoCaptions(root, "val", LAYOUT).captions) == 6


# COCO itself.


@pytest.mark.parametrize(
    ("split", "images", "captions"), [("train", 700, 3502), ("val", 300, 1501)]
)
def test_coco_is_read_as_plain_json_has_it(coco_root, split, images, captions):
    data = CocoCaptions(coco_root, split, DATASETS["coco"].layout)
    plain = json.loads(
        (coco_root / "annotations" / f"captions_{split}2017.json").read_text(encoding="utf-8")
    )
    assert (
        (len(data.image_files), len(data.captions))
        == (images, captions)
        == (len(plain["images"]), len(plain["annotations"]))
    )
    assert data.image_ids == sorted(entry["id"] for entry in plain["images"])
    name_of = {entry["id"]: entry["file_name"] for entry in plain["images"]}
    expected = sorted(
        (entry["id"], entry["caption"], name_of[entry["image_id"]])
        for entry in plain["annotations"]
    )
    rows = zip(data.caption_ids, data.captions, data.image_of_caption, strict=True)
    assert [
        (caption_id, text, data.image_files[row].name) for caption_id, text, row in rows
    ] == expected
    for image_id, path in zip(data.image_ids, data.image_files, strict=True):
        assert int(path.stem) == image_id  # COCO's file names are the ids
        assert path.is_file()


def test_the_loader_has_no_dependence_on_the_order_in_the_file(coco_root, tmp_path):
    plain = json.loads(
        (coco_root / "annotations" / "captions_val2017.json").read_text(encoding="utf-8")
    )
    for section in ("images", "annotations"):
        np.random.default_rng(0).shuffle(plain[section])
    shuffled, straight = (
        load(write(tmp_path, plain)),
        CocoCaptions(coco_root, "val", DATASETS["coco"].layout),
    )
    for attribute in ("image_ids", "caption_ids", "captions", "image_of_caption", "image_names"):
        assert getattr(shuffled, attribute) == getattr(straight, attribute)
