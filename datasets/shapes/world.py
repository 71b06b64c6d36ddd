"""The built-in data set: scenes, images and captions that are drawn from a seed, in COCO format.

A scene has one to three objects (shape, colour, size, cell of a 3 x 3 grid) and a background. A
caption is a text together with what it says: the backgrounds that it allows, and a *mention* for
every object that it speaks of. A mention gives the values that each attribute may have. Therefore
we know exactly which images a caption describes, which is not known of photographs:

>>> ring = {"shape": "ring", "colour": "red", "size": "small", "cell": 0}
>>> scene = {"background": "grey", "objects": [ring]}
>>> mention = {"colour": ("red",), "shape": ("ring",)}
>>> describes(Caption("a red ring", (mention,), BACKGROUNDS), scene)
True
>>> text = "a red thing and something else"
>>> describes(Caption(text, ({"colour": ("red",)}, {}), BACKGROUNDS), scene)
False

The length of a caption does not fully determine its ambiguity (python -m tests.benchmarks.shapes
measures it). A rare colour or shape says much in one word. Hypernyms ("a round thing") and fillers
("if you look at this drawing, you will find ...") say little in many words.

    python -m datasets.shapes.world --out data/shapes
"""

import argparse
import functools
import itertools
import json
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from tqdm import tqdm

from utils.files import partial_path, remove_leftovers

PIXELS = 96  # side of an image
CELL = PIXELS // 3  # side of a cell of the grid
OVERSAMPLE = 3  # images are drawn three times as large and averaged down, which smooths the edges
RADIUS = {"small": 6, "medium": 10, "big": 14}  # pixels

ATTRIBUTES = ("shape", "colour", "size", "cell")  # of an object
BACKGROUND = "background"

_TABLES = json.loads((Path(__file__).parent / "words.json").read_text(encoding="ascii"))


def _shares(name):
    """How probable the values of an attribute are, {value: share}.

    They are skewed on purpose, so that words differ in how much they say.
    """
    return {value: percent / 100 for value, percent in _TABLES["shares"][name].items()}


def _with_int_keys(table):
    """Cells and counts are numbers, but the keys of JSON are strings."""
    return {int(key): value for key, value in table.items()}


SHAPES = _shares("shape")
COLOURS = _shares("colour")
SIZES = _shares("size")
CELLS = _with_int_keys(_shares("cell"))
BACKGROUNDS = _shares("background")
COUNTS = _with_int_keys(_shares("objects"))  # objects in a scene
SHARES = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "cell": CELLS,
    "background": BACKGROUNDS,
}
RGB = {colour: tuple(rgb) for colour, rgb in _TABLES["rgb"].items()}

WORDS = {  # attribute -> {value: list of words for it}
    "shape": _TABLES["words"]["shape"],
    "colour": _TABLES["words"]["colour"],
    "size": _TABLES["words"]["size"],
    "cell": _with_int_keys(_TABLES["words"]["cell"]),
}
HYPERNYMS = _TABLES["hypernyms"]  # attribute -> {words: list of the values that they leave open}
FRAMES = _TABLES["frames"]  # texts around the objects that say nothing about the scene -> weight
VAGUE_CAPTIONS = _TABLES["vague captions"]  # texts that are true of every scene -> weight
LADDER = tuple(_TABLES["ladder"])  # prompts, each of which adds a detail to the one before

FULL_SHARE = 0.4  # share of captions that describe everything
MAX_NATS = math.log(1000)  # information of a caption that describes one image of 1,000
BY_OBJECT_SHARE = 0.8  # share of captions that collect the details of one object after another
HYPERNYM_SHARE = 0.1  # share of details that are given by a hypernym
EMPTY_SHARE = 0.1  # share of the remaining objects that are mentioned without any detail
MAX_WORDS = 51  # of a caption; as many fit into the 64 tokens of the built-in CLIP


@dataclass(frozen=True)
class Caption:
    """A text and what it says.

    Attributes:
        text: the caption.
        mentions: one dict per object that the text speaks of, {attribute: values that the text
            allows}. Any value is allowed for an attribute that is not in the dict.
        backgrounds: the backgrounds that the text allows.
    """

    text: str
    mentions: tuple
    backgrounds: tuple


class Phrase(NamedTuple):
    """Words for an attribute, and the values of the attribute of which they are true."""

    words: str
    values: tuple


def describes(caption, scene):
    """Whether a caption is true of a scene.

    The background must be allowed, and every mention must fit an object of its own. Objects that
    the caption does not mention do not matter.

    Args:
        caption: Caption.
        scene: dict with "background" and "objects", dicts with "shape", "colour", "size", "cell".
    Returns: bool.
    """
    if scene["background"] not in caption.backgrounds:
        return False
    # Try every way to give each mention an object of its own.
    for objects in itertools.permutations(scene["objects"], len(caption.mentions)):
        if all(map(_fits, caption.mentions, objects)):
            return True
    return False


def _fits(mention, thing):
    """Whether an object has the attributes that a mention allows."""
    return all(thing[name] in values for name, values in mention.items())


# Scenes and their images.


def draw_scene(rng):
    """A random scene: what it shows, and small shifts, turns and shades that vary its image.

    Args: rng: random.Random.
    Returns: dict of plain ints and strings, the input of `describes` and `paint`.
    """
    background = _pick(rng, BACKGROUNDS)
    visible_colours = dict(COLOURS)
    visible_colours.pop(background, None)
    free_cells = dict(CELLS)  # an object has its cell to itself, so that none hides another
    objects = []
    for _ in range(_pick(rng, COUNTS)):
        thing = {
            "shape": _pick(rng, SHAPES),
            "colour": _pick(rng, visible_colours),
            "size": _pick(rng, SIZES),
            "cell": _pick(rng, free_cells),
        }
        del free_cells[thing["cell"]]
        margin = CELL // 2 - RADIUS[thing["size"]]  # pixels between the object and its cell's edge
        thing["dx"] = rng.randint(-margin, margin) // 2
        thing["dy"] = rng.randint(-margin, margin) // 2
        thing["turn"] = rng.randint(-9, 9)  # degrees
        thing["shade"] = rng.randint(-12, 12)  # added to red, green and blue
        objects.append(thing)
    return {"background": background, "objects": objects}


def _pick(rng, weights):
    """A random key of {key: weight}."""
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def paint(scene):
    """The image of a scene from `draw_scene`: a PIL image, RGB, 96 x 96 pixels."""
    side = PIXELS * OVERSAMPLE
    image = Image.new("RGB", (side, side), RGB[scene["background"]])
    pen = ImageDraw.Draw(image)
    for thing in scene["objects"]:
        _paint_object(pen, thing)
    return image.reduce(OVERSAMPLE)


def _paint_object(pen, thing):
    row, column = divmod(thing["cell"], 3)
    x = (column * CELL + CELL // 2 + thing["dx"]) * OVERSAMPLE  # of the object's centre
    y = (row * CELL + CELL // 2 + thing["dy"]) * OVERSAMPLE
    radius = RADIUS[thing["size"]] * OVERSAMPLE
    box = (x - radius, y - radius, x + radius, y + radius)
    shaded = [channel + thing["shade"] for channel in RGB[thing["colour"]]]
    colour = tuple(min(255, max(0, channel)) for channel in shaded)
    if thing["shape"] == "circle":
        pen.ellipse(box, fill=colour)
        return
    if thing["shape"] == "ring":
        pen.ellipse(box, outline=colour, width=round(radius * 0.42))
        return
    corners = []
    for distance, angle in OUTLINES[thing["shape"]]:
        turned = angle + math.radians(thing["turn"])
        dx = radius * distance * math.cos(turned)
        dy = radius * distance * math.sin(turned)
        corners.append((round(x + dx), round(y + dy)))
    pen.polygon(corners, fill=colour)


def _corners_around(distances, first_angle):
    """The corners of a polygon at equal angles, given their distances from the centre."""
    corners = []
    for i, distance in enumerate(distances):
        angle = first_angle + i * 2 * math.pi / len(distances)
        corners.append((distance, angle))
    return corners


def _polar(points):
    """(distance, angle) of points (x, y)."""
    return [(math.hypot(x, y), math.atan2(y, x)) for x, y in points]


def _cross_points():
    arm = 0.32  # half the width of an arm
    half = [(arm, 1), (arm, arm), (1, arm), (1, -arm), (arm, -arm), (arm, -1)]
    return half + [(-x, -y) for x, y in half]


def _heart_points():
    points = []
    for i in range(40):
        t = 2 * math.pi * i / 40
        x = math.sin(t) ** 3
        y = (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15
        points.append((x, -y))
    return points


UP = -math.pi / 2  # y points down
OUTLINES = {  # shape -> its corners, (distance in radii, angle); circle and ring have none
    "square": _corners_around([1.15] * 4, math.pi / 4),
    "diamond": _corners_around([1.05, 0.72] * 2, UP),
    "triangle": _corners_around([1.1] * 3, UP),
    "star": _corners_around([1.1, 0.45] * 5, UP),
    "cross": _polar(_cross_points()),
    "heart": _polar(_heart_points()),
}


# Captions. What a caption is to say is collected in a dict `content`, {subject: {attribute:
# Phrase}}. A subject is the number of an object in its scene, or BACKGROUND.


def write_caption(scene, rng, full_share=FULL_SHARE):
    """A caption of random detail that is true of the scene.

    A share of `full_share` are full descriptions. Each of the others is to have a random amount of
    information, uniform between 0 and MAX_NATS, so that the logarithm of the ambiguity is spread
    evenly. Random details are added until it has as much.

    Args: scene: dict; rng: random.Random.
    Returns: Caption.
    """
    if rng.random() < full_share:
        return write_full_description(scene, rng)
    wanted_nats = rng.random() * MAX_NATS
    content = {}
    nats = 0.0
    for subject, name in _details(scene, rng):
        phrase = _say(name, _value_of(scene, subject, name), rng, HYPERNYM_SHARE)
        details = {**content.get(subject, {}), name: phrase}
        more = {**content, subject: details}
        more_nats = information(more)
        # The detail that crosses the wanted information is added with a probability that makes the
        # information equal to the wanted one on average.
        if rng.random() * (more_nats - nats) > wanted_nats - nats:
            break
        content = more
        nats = more_nats
    if not content:
        return Caption(_pick(rng, VAGUE_CAPTIONS), (), tuple(BACKGROUNDS))
    for row in range(len(scene["objects"])):
        # A caption that speaks of the background alone also mentions the first object.
        mentions_no_object = content.keys() == {BACKGROUND}
        if mentions_no_object or rng.random() < EMPTY_SHARE:
            content.setdefault(row, {})
    return _compose(content, rng)


def write_full_description(scene, rng):
    """A caption that says everything about a scene. Args: as for `write_caption`."""
    content = {}
    for row, thing in enumerate(scene["objects"]):
        content[row] = {name: _say(name, thing[name], rng) for name in ATTRIBUTES}
    content[BACKGROUND] = {BACKGROUND: _say(BACKGROUND, scene["background"], rng)}
    return _compose(content, rng)


def _details(scene, rng):
    """All (subject, attribute) of a scene, in random order.

    Mostly, all details of one object come together.
    """
    subjects = [*range(len(scene["objects"])), BACKGROUND]
    details = []
    for row in range(len(scene["objects"])):
        details += [(row, name) for name in ATTRIBUTES]
    details.append((BACKGROUND, BACKGROUND))
    rng.shuffle(details)
    if rng.random() < BY_OBJECT_SHARE:
        rng.shuffle(subjects)
        details.sort(key=lambda detail: subjects.index(detail[0]))
    return details


def _value_of(scene, subject, name):
    """The value of an attribute of a subject of the scene."""
    if subject == BACKGROUND:
        return scene["background"]
    return scene["objects"][subject][name]


def information(content):
    """Nearly minus the logarithm of the share of scenes of which a caption is true.

    It takes attributes and objects as independent.

    Args: content: {subject: {attribute: Phrase}}.
    Returns: nats, at least 0.
    """
    nats = 0.0
    for subject, details in content.items():
        share = 1.0  # of objects, or of backgrounds, of which the details are true
        for name, phrase in details.items():
            share *= sum(SHARES[name][value] for value in phrase.values)
        if subject != BACKGROUND:
            # The share of scenes in which the details are true of at least one object.
            share = 1 - sum(p * (1 - share) ** count for count, p in COUNTS.items())
        nats -= math.log(share)
    return nats


def _say(name, value, rng, hypernym_share=0.0):
    """A random Phrase for a value of an attribute, a hypernym with probability hypernym_share."""
    hypernyms = []
    for words, values in HYPERNYMS[name].items():
        if value in values:
            hypernyms.append(Phrase(words, tuple(values)))
    if hypernyms and rng.random() < hypernym_share:
        return rng.choice(hypernyms)
    if name == BACKGROUND:
        return Phrase(value, (value,))  # its words are just its name
    return Phrase(rng.choice(WORDS[name][value]), (value,))


def write_chain(scene, rng):
    """Captions of one scene, general first. Each says one thing more than the one before.

    Args: scene: dict; rng: random.Random.
    Returns: list of 6 Captions, which add shape, colour, size and cell of an object, and the
        background, in random order.
    """
    thing = rng.choice(scene["objects"])
    values = {}
    chain = [_plain_caption(values)]
    for name in rng.sample([*ATTRIBUTES, BACKGROUND], 5):
        values[name] = scene["background"] if name == BACKGROUND else thing[name]
        chain.append(_plain_caption(values))
    return chain


def _plain_caption(values):
    """A Caption that says no more than {attribute: value}, of one object and the background.

    The same values always have the same words.
    """
    mention = {name: (value,) for name, value in values.items() if name != BACKGROUND}
    first_word = {name: WORDS[name][values[name]][0] for name in mention}
    text = "a picture"
    if mention:
        adjectives = [first_word[name] for name in ("size", "colour") if name in mention]
        noun = first_word.get("shape", "shape")
        text += " of " + _with_article(" ".join([*adjectives, noun]))
    if "cell" in mention:
        text += " " + first_word["cell"]
    backgrounds = tuple(BACKGROUNDS)
    if BACKGROUND in values:
        backgrounds = (values[BACKGROUND],)
        comma = "," if "cell" in mention else ""
        text += f"{comma} on {_with_article(values[BACKGROUND])} background"
    return Caption(text, (mention,) if mention else (), backgrounds)


def write_chains(seed=0, count=200):
    """The texts of chains of captions.

    The train split shows none of their scenes. Val shows a few of them by chance, 10 of 200 with
    seed 0.

    Returns: `count` lists of 6 strings.
    """
    chains = []
    for i in range(count):
        rng = random.Random(f"shapes/{seed}/chains/{i}")
        chain = write_chain(draw_scene(rng), rng)
        chains.append([caption.text for caption in chain])
    return chains


# From what a caption says to its words.


def _compose(content, rng):
    """Put a Caption together. Args: content: {subject: {attribute: Phrase}}."""
    objects = [details for subject, details in content.items() if subject != BACKGROUND]
    rng.shuffle(objects)
    ending = ""
    backgrounds = tuple(BACKGROUNDS)
    if BACKGROUND in content:
        background, backgrounds = content[BACKGROUND][BACKGROUND]
        endings = (" on {} background", " against {} background", " in front of {} backdrop")
        ending = rng.choice(endings).format(_with_article(background))
    mentions = []
    noun_phrases = []
    for details in objects:
        mentions.append({name: details[name].values for name in ATTRIBUTES if name in details})
        words = {name: phrase.words for name, phrase in details.items()}
        noun_phrases.append(_noun_phrase(words, rng))
    text = _enumerate(noun_phrases) + ending
    frame = _pick(rng, FRAMES)
    if len(text.split()) + len(frame.split()) <= MAX_WORDS:
        text = frame.format(text)
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:] + "."
    return Caption(text, tuple(mentions), backgrounds)


def _noun_phrase(words, rng):
    """A phrase for one object and its place. Args: words: {attribute: words for it}."""
    phrase = _noun_phrase_without_place(words, rng)
    place = words.get("cell")
    if place is None and rng.random() < 0.15:
        place = rng.choice(("somewhere", "somewhere or other", "in some place"))
    has_comma = phrase.endswith(" in colour")  # "a small ring, red in colour"
    if place is not None:
        return f"{phrase}, {place}" if has_comma else f"{phrase} {place}"
    if has_comma:  # nothing follows: "a small ring that is red in colour"
        return phrase.replace(", ", " that is ", 1)
    return phrase


def _noun_phrase_without_place(words, rng):
    adjectives = [words[name] for name in ("size", "colour") if name in words]
    style = rng.random()
    if "shape" not in words:
        if not adjectives:
            return rng.choice(_TABLES["phrases for anything"])
        if style < 0.4:
            return "something " + " and ".join(adjectives)
        noun = rng.choice(_TABLES["nouns for any shape"])
    else:
        noun = words["shape"]
    if adjectives and style > 0.85:
        return _with_article(noun) + " that is " + " and ".join(adjectives)
    colour = words.get("colour")
    if colour in COLOURS and style > 0.75:
        return _with_article(" ".join([*adjectives[:-1], noun])) + f", {colour} in colour"
    return _with_article(" ".join([*adjectives, noun]))


def _enumerate(phrases):
    """ "a", "a and b" or "a, b and c"; a phrase that comes twice is "another" the second time."""
    distinct = []
    for phrase in phrases:
        if phrase in distinct:
            phrase = _another(phrase)
        if phrase in distinct:  # the third time
            phrase += " as well"
        distinct.append(phrase)
    *first_phrases, last = distinct
    if not first_phrases:
        return last
    comma = "," if any("," in phrase for phrase in first_phrases) else ""
    return f"{', '.join(first_phrases)}{comma} and {last}"


def _another(phrase):
    """ "a red ring" -> "another red ring", "something red" -> "something else red"."""
    first_word, _, rest = phrase.partition(" ")
    if first_word in ("a", "an"):
        return f"another {rest}"
    return f"{first_word} else {rest}".strip()


def _with_article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


# The files of a data set.


@functools.lru_cache(maxsize=4)
def _reserved(seed):
    """What the first 1,000 scenes of val and the 200 chains show. The train split shows none."""
    reserved = set()
    for split, count in (("val", 1000), ("chains", 200)):
        for i in range(count):
            rng = random.Random(f"shapes/{seed}/{split}/{i}")
            reserved.add(shown(draw_scene(rng)))
    return reserved


def shown(scene):
    """What a scene shows, without the small shifts, turns and shades: a string."""
    objects = []
    for thing in scene["objects"]:
        objects.append([thing[name] for name in ATTRIBUTES])
    return json.dumps([scene["background"], sorted(objects)])


def make_split(seed, split, images, captions_per_image=5):
    """One split in COCO's format, with fields for the scenes and for what the captions say.

    Args: seed: int. split: name, part of the random seed. images, captions_per_image: counts.
    Returns: dict with "info", "images" and "annotations", plain types only.
    """
    first_id = {"train": 100_000, "val": 1}.get(split, 0)  # of images; the splits share no id
    reserved = () if split == "val" else _reserved(seed)
    entries = []
    annotations = []
    for i in range(images):
        rng = random.Random(f"shapes/{seed}/{split}/{i}")
        scene = draw_scene(rng)
        while shown(scene) in reserved:
            scene = draw_scene(rng)
        image_id = first_id + i
        entry = {
            "id": image_id,
            "file_name": f"{image_id:012d}.png",
            "width": PIXELS,
            "height": PIXELS,
            "scene": scene,
        }
        entries.append(entry)
        # Some images are described with more care than others.
        full_share = 2 * FULL_SHARE if rng.random() < 0.5 else 0.0
        for k in range(captions_per_image):
            caption = write_caption(scene, rng, full_share)
            annotation = {
                "id": image_id * captions_per_image + k,
                "image_id": image_id,
                "caption": caption.text,
                "mentions": list(caption.mentions),
                "backgrounds": list(caption.backgrounds),
            }
            annotations.append(annotation)
    info = {"description": "shapes, the built-in data set", "seed": seed, "split": split}
    return {"info": info, "images": entries, "annotations": annotations}


def relevant_images(document):
    """Which images of a split each caption describes.

    For 1,000 images and 5,000 captions this takes about 4 seconds.

    Args:
        document: dict from `make_split`.
    Returns: {caption id as a string: [image ids, ascending]}, every list with at least one entry.
    """
    images = sorted(document["images"], key=lambda image: image["id"])
    relevant = {}
    for annotation in document["annotations"]:
        mentions = annotation["mentions"]
        caption = Caption(annotation["caption"], mentions, annotation["backgrounds"])
        ids = [image["id"] for image in images if describes(caption, image["scene"])]
        relevant[str(annotation["id"])] = ids
    return relevant


def make(root, seed=0, train=10_000, val=1_000):
    """Draw the data set in COCO's layout: train/, val/ and annotations/.

    The folder appears complete or not at all. The JSON has the same bytes everywhere, the images
    the same pixels for one Pillow version.

    Args:
        root: a folder that does not exist yet.
        train, val: numbers of images.
    """
    root = Path(root)
    remove_leftovers(root)
    aside = partial_path(root)
    try:
        (aside / "annotations").mkdir(parents=True)
        for split, images in (("train", train), ("val", val)):
            document = make_split(seed, split, images)
            (aside / split).mkdir()
            images_with_bar = tqdm(
                document["images"], desc=f"drawing {split}", unit="image", mininterval=0.5
            )
            for image in images_with_bar:
                paint(image["scene"]).save(aside / split / image["file_name"])
            _dump(document, aside / "annotations" / f"captions_{split}.json")
            if split == "val":
                _dump(relevant_images(document), aside / "annotations" / "relevance_val.json")
        aside.rename(root)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _dump(document, path):
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=True)
    path.write_text(text + "\n", encoding="ascii")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the built-in data set.")
    parser.add_argument("--out", default="data/shapes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=10_000)
    parser.add_argument("--val", type=int, default=1_000)
    args = parser.parse_args()
    if Path(args.out).exists():
        parser.error(f"{args.out} exists already; remove it or choose another --out")
    make(args.out, args.seed, args.train, args.val)
