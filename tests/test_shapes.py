"""The built-in data set: captions against a recursive search, pictures by their pixels, files by pycocotools."""

import contextlib
import hashlib
import io
import itertools
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from scipy.stats import spearmanr

from datasets.coco import CocoCaptions
from datasets.images import read_rgb
from datasets.registry import DATASETS
from datasets.shapes import world
from datasets.shapes.world import (
    Caption,
    describes,
    draw_scene,
    make,
    make_split,
    paint,
    relevant_images,
    write_caption,
    write_full_description,
)

# Where it changes, the CLIP is outdated.
SMALL_SPLIT_SHA256 = "a08144df972fd9b6fb5cfd40bc5bd2404c2ebf8fd5bee61ee6a0889dce453abb"
ATTRIBUTES = ("shape", "colour", "size", "cell")
TIP = 2  # pixels by which the tip of a big star, triangle or heart may reach over the border of its cell


def random_scenes(count, seed=0):
    return [draw_scene(random.Random(f"{seed}/{i}")) for i in range(count)]


def captions_of(document):
    """(caption, scene it was written for) of every annotation of a split."""
    scene_of = {image["id"]: image["scene"] for image in document["images"]}
    for entry in document["annotations"]:
        yield (
            Caption(entry["caption"], tuple(entry["mentions"]), tuple(entry["backgrounds"])),
            scene_of[entry["image_id"]],
        )


@pytest.fixture(scope="module")
def split():
    return make_split(seed=3, split="val", images=300)


@pytest.fixture(scope="module")
def relevance(split):
    return relevant_images(split)


# What a caption describes.


def described_by_search(mentions, objects):
    """Whether the mentions can have objects of their own: give the first away in every way, go on with what is left."""
    if not mentions:
        return True
    for k in range(len(objects)):
        fits = all(
            objects[k][name] in mentions[0].get(name, [objects[k][name]]) for name in ATTRIBUTES
        )
        if fits and described_by_search(mentions[1:], objects[:k] + objects[k + 1 :]):
            return True
    return False


def random_mention(rng):
    values = {
        "shape": list(world.SHAPES)[:3],
        "colour": list(world.COLOURS)[:3],
        "size": list(world.SIZES),
        "cell": list(world.CELLS),
    }
    return {
        name: tuple(rng.sample(values[name], rng.randint(1, 3)))
        for name in ATTRIBUTES
        if rng.random() < 0.35
    }


def test_describes_equals_a_recursive_search_on_captions_of_other_scenes():
    rng = random.Random(0)
    scenes = random_scenes(60)
    captions = [
        write(scene, rng)
        for scene in scenes
        for write in (write_caption, write_caption, write_full_description)
    ]
    answers = Counter()
    for caption, scene in itertools.product(captions, scenes):
        expected = scene["background"] in caption.backgrounds and described_by_search(
            list(caption.mentions), scene["objects"]
        )
        assert describes(caption, scene) == expected, (caption, scene)
        answers[expected] += 1
    assert min(answers[True], answers[False]) > 500  # both answers have been put to the test


def test_describes_equals_a_recursive_search_on_mentions_that_compete():
    rng = random.Random(1)
    scenes = random_scenes(2000)
    answers = Counter()
    for scene in scenes:
        mentions = tuple(random_mention(rng) for _ in range(rng.randint(0, 4)))
        expected = described_by_search(list(mentions), scene["objects"])
        assert describes(Caption("", mentions, tuple(world.BACKGROUNDS)), scene) == expected, (
            mentions,
            scene,
        )
        alone = all(described_by_search([mention], scene["objects"]) for mention in mentions)
        answers[expected, alone] += 1
    assert (
        answers[False, True] > 50
    )  # each mention fits something, but there are not enough objects to go round
    assert answers[True, True] > 100
    assert answers[False, False] > 100


def test_two_mentions_never_share_an_object():
    one = {
        "background": "grey",
        "objects": [{"shape": "ring", "colour": "red", "size": "small", "cell": 0}],
    }
    mention = {"colour": ("red",)}
    assert describes(Caption("", (mention,), ("grey",)), one)
    assert not describes(Caption("", (mention, mention), ("grey",)), one)
    assert not describes(Caption("", (mention,), ("white", "black")), one)


def test_every_caption_describes_its_own_scene(split):
    assert all(describes(caption, scene) for caption, scene in captions_of(split))


def test_a_full_description_says_everything():
    for i, scene in enumerate(random_scenes(100)):
        caption = write_full_description(scene, random.Random(i))
        said = sorted(tuple(mention[name] for name in ATTRIBUTES) for mention in caption.mentions)
        assert said == sorted(
            tuple((thing[name],) for name in ATTRIBUTES) for thing in scene["objects"]
        )
        assert caption.backgrounds == (scene["background"],)


def test_no_caption_speaks_of_more_objects_than_its_scene_has(split):
    assert all(
        len(caption.mentions) <= len(scene["objects"]) for caption, scene in captions_of(split)
    )
    assert {len(caption.mentions) for caption, _ in captions_of(split)} == {0, 1, 2, 3}


# Ambiguity.


def test_relevance_lists_the_images_that_a_caption_describes_its_own_among_them(split, relevance):
    scenes = sorted((image["id"], image["scene"]) for image in split["images"])
    assert list(relevance) == [str(entry["id"]) for entry in split["annotations"]]
    for entry in split["annotations"][::7]:
        expected = [
            image_id
            for image_id, scene in scenes
            if scene["background"] in entry["backgrounds"]
            and described_by_search(entry["mentions"], scene["objects"])
        ]
        assert relevance[str(entry["id"])] == expected
    own = [entry["image_id"] in relevance[str(entry["id"])] for entry in split["annotations"]]
    assert all(own)  # so ambiguity is at least 1


def test_equal_texts_have_equal_ambiguity(split, relevance):
    described, repeated = {}, 0
    for entry in split["annotations"]:
        text = entry["caption"].lower().rstrip(".")
        repeated += text in described
        assert (
            described.setdefault(text, relevance[str(entry["id"])]) == relevance[str(entry["id"])]
        ), text
    assert repeated > 20


def test_equal_texts_of_a_large_sample_say_the_same():
    said = {}
    for i, scene in enumerate(random_scenes(8000, seed="large")):
        caption = write_caption(scene, random.Random(i))
        text = caption.text.lower().rstrip(".")
        mentions = sorted(
            json.dumps(mention, sort_keys=True) for mention in caption.mentions if mention
        )
        least = max(
            len(caption.mentions), 1
        )  # every scene has an object: to speak of something is to say nothing
        says = (mentions, least, caption.backgrounds)
        assert said.setdefault(text, says) == says, text
    assert 1000 < len(said) < 8000


def test_the_length_of_a_caption_does_not_give_its_ambiguity_away(split, relevance):
    ambiguity = [len(relevance[str(entry["id"])]) for entry in split["annotations"]]
    for length in (lambda text: len(text), lambda text: len(text.split())):
        assert (
            abs(
                spearmanr(
                    [length(entry["caption"]) for entry in split["annotations"]], ambiguity
                ).statistic
            )
            < 0.9
        )
    assert len(set(ambiguity)) > 30  # of many degrees


# Texts.


def test_articles_fit_the_words_after_them():
    for i, scene in enumerate(random_scenes(3000, seed="articles")):
        text = write_caption(scene, random.Random(i)).text
        for article, letter in re.findall(r"\b(an?) (\w)", text.lower()):
            assert (article == "an") == (letter in "aeiou"), text


def test_captions_have_clean_spaces_and_punctuation():
    for i, scene in enumerate(random_scenes(3000, seed="spaces")):
        text = write_caption(scene, random.Random(i)).text
        assert text == " ".join(text.split())
        assert not re.search(r"[{}]| [,.]|,,|,\.|\.\.|,(?! )|, and\b(?<!, and)|,$", text), text
        assert text.isascii()
        assert text[0].isupper() == text.endswith("."), text  # a sentence has both or neither


# Pictures.


def one_object(shape, colour="red", size="big", cell=4, background="white", **more):
    thing = {
        "shape": shape,
        "colour": colour,
        "size": size,
        "cell": cell,
        "dx": 0,
        "dy": 0,
        "turn": 0,
        "shade": 0,
    }
    return {"background": background, "objects": [thing | more]}


def painted(scene):
    return np.asarray(paint(scene)).astype(int)


def test_the_same_scene_gives_the_same_pixels():
    for scene in random_scenes(30):
        assert paint(scene).tobytes() == paint(json.loads(json.dumps(scene))).tobytes()


@pytest.mark.parametrize("shape", world.SHAPES)
def test_an_object_lies_in_its_cell_and_has_its_colour(shape):
    colours = itertools.cycle([("red", 12), ("blue", -12), ("white", 12), ("black", -12)])
    for cell, (colour, shade) in zip(range(9), colours, strict=False):
        scene = one_object(shape, colour, "big", cell, "grey", shade=shade, turn=9, dx=1, dy=-1)
        pixels = painted(scene)
        changed = np.argwhere((pixels != world.RGB["grey"]).any(axis=2))
        corner = np.array(divmod(cell, 3)) * 32
        assert (changed >= corner - TIP).all() and (changed < corner + 32 + TIP).all()
        expected = np.clip(np.array(world.RGB[colour]) + shade, 0, 255)
        exact = (pixels == expected).all(axis=2).sum()
        assert exact > 0.5 * len(changed)  # the rest is smoothed edge
        middle = pixels[cell // 3 * 32 + 15, cell % 3 * 32 + 17]
        assert (middle == (world.RGB["grey"] if shape == "ring" else expected)).all()


def test_random_scenes_show_every_object_in_its_cell_and_nothing_else():
    for scene in random_scenes(200):
        pixels = painted(scene)
        background = np.array(world.RGB[scene["background"]])
        colour_of = {
            thing["cell"]: np.clip(np.array(world.RGB[thing["colour"]]) + thing["shade"], 0, 255)
            for thing in scene["objects"]
        }
        assert len(colour_of) == len(scene["objects"])  # a cell each
        for cell in range(9):
            row, column = divmod(cell, 3)
            tile = pixels[
                row * 32 + TIP : row * 32 + 32 - TIP, column * 32 + TIP : column * 32 + 32 - TIP
            ]
            if cell in colour_of:
                assert (tile == colour_of[cell]).all(axis=2).sum() >= 10
            else:
                assert (tile == background).all()


def test_no_object_has_the_colour_of_the_background():
    assert all(
        thing["colour"] != scene["background"]
        for scene in random_scenes(500)
        for thing in scene["objects"]
    )


@pytest.mark.parametrize("shape", world.SHAPES)
def test_larger_objects_cover_more_pixels(shape):
    areas = [
        (painted(one_object(shape, size=size)) != world.RGB["white"]).any(axis=2).sum()
        for size in ("small", "medium", "big")
    ]
    assert areas[0] < areas[1] < areas[2]


def test_shapes_differ_from_each_other_however_they_are_turned():
    pictures = {
        (shape, turn): painted(one_object(shape, turn=turn))
        for shape in world.SHAPES
        for turn in (-9, 0, 9)
    }
    for (one, a), (other, b) in itertools.combinations(pictures.items(), 2):
        if one[0] != other[0]:
            assert (a != b).any(axis=2).sum() > 60


def test_colours_differ_by_more_than_their_shades():
    for one, other in itertools.combinations(world.RGB, 2):
        assert (
            max(abs(a - b) for a, b in zip(world.RGB[one], world.RGB[other], strict=True)) > 24
        ), (one, other)


# Splits and files.


def test_a_split_has_known_bytes():
    document = make_split(seed=0, split="val", images=20)
    assert (
        hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
        == SMALL_SPLIT_SHA256
    )


def test_a_split_depends_on_seed_and_name_and_grows_at_its_end():
    texts = {
        key: [entry["caption"] for entry in make_split(key[0], key[1], 20)["annotations"]]
        for key in itertools.product((0, 1), ("train", "val"))
    }
    for one, other in itertools.combinations(texts.values(), 2):
        assert one != other
    assert [entry["caption"] for entry in make_split(0, "val", 30)["annotations"]][:100] == texts[
        0, "val"
    ]


def test_the_ids_of_train_and_val_differ():
    train, val = make_split(0, "train", 50), make_split(0, "val", 50)
    for section in ("images", "annotations"):
        ids = [entry["id"] for document in (train, val) for entry in document[section]]
        assert len(set(ids)) == len(ids)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made") / "deeper" / "shapes"
    make(root, seed=5, train=6, val=4)
    return root


def test_the_files_are_coco_to_pycocotools(made):
    for name, images in (("train", 6), ("val", 4)):
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(made / "annotations" / f"captions_{name}.json")
        assert len(coco.getImgIds()) == images
        assert len(coco.getAnnIds()) == images * 5
        for image in coco.loadImgs(coco.getImgIds()):
            with Image.open(made / name / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
            assert len(coco.getAnnIds(imgIds=[image["id"]])) == 5


def test_the_files_are_read_by_our_loader_scene_by_scene(made):
    data = CocoCaptions(made, "val", DATASETS["shapes"].layout)
    document = make_split(5, "val", 4)
    assert data.captions == [entry["caption"] for entry in document["annotations"]]
    assert data.image_of_caption == [row for row in range(4) for _ in range(5)]
    for path, image in zip(data.image_files, document["images"], strict=True):
        assert (np.asarray(read_rgb(path)) == painted(image["scene"])).all()
    relevant = relevant_images(document)
    ids = [image["id"] for image in document["images"]]
    assert [[ids[row] for row in rows] for rows in data.relevance] == [
        relevant[str(entry["id"])] for entry in document["annotations"]
    ]


def test_made_twice_the_files_are_equal(made, tmp_path):
    make(tmp_path / "again", seed=5, train=6, val=4)
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert len(files) == 6 + 4 + 3
    again = [path for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert files == sorted(path.relative_to(tmp_path / "again") for path in again)
    assert all(
        (made / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files
    )


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("pictures", [0, 2, 5])
def test_a_data_set_that_could_not_be_finished_leaves_nothing(
    tmp_path, monkeypatch, error, pictures
):
    calls = itertools.count()

    def paint_or_fail(scene):
        if next(calls) == pictures:
            raise error("stopped")
        return paint(scene)

    monkeypatch.setattr(world, "paint", paint_or_fail)
    with pytest.raises(error, match="stopped"):
        make(tmp_path / "shapes", train=4, val=4)
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_appears_only_when_it_is_whole(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        world, "paint", lambda scene: (seen.append((tmp_path / "shapes").exists()), paint(scene))[1]
    )
    make(tmp_path / "shapes", train=3, val=2)
    assert seen == [False] * 5
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_an_existing_data_set_is_never_overwritten(tmp_path):
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "mine.txt").touch()
    with pytest.raises(OSError):
        make(tmp_path / "shapes", train=1, val=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["shapes", "mine.txt"]
