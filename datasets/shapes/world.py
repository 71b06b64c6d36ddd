"""The built-in data set: scenes, images and captions that are drawn from a seed, in COCO format.

A scene has one to three objects (shape, colour, size, cell of a 3 x 3 grid) and a background. A
caption is a text together with what it says: a *mention* for every object it speaks of, and the
backgrounds it allows. Since both are known, so is the exact answer to "which images does this
caption describe?", which no photographs can give:

>>> ring = {"shape": "ring", "colour": "red", "size": "small", "cell": 0}
>>> scene = {"background": "grey", "objects": [ring]}
>>> mention = {"colour": ("red",), "shape": ("ring",)}
>>> describes(Caption("a red ring", (mention,), BACKGROUNDS), scene)
True
>>> text = "a red thing and something else"
>>> describes(Caption(text, ({"colour": ("red",)}, {}), BACKGROUNDS), scene)
False

The length of a caption does not fully determine its ambiguity (python -m tests.benchmarks.shapes
prints how far it does): a rare colour or shape says much in one word, while hypernyms ("a round
thing") and fillers ("if you look at this drawing, you will find ...") say little in many.

    python -m datasets.shapes.world --out data/shapes
"""

import argparse
import collections
import functools
import itertools
import json
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from utils.files import partial, remove_leftovers

PIXELS = 96  # side of a picture; a cell of the 3 x 3 grid is 32 pixels wide
OVERSAMPLE = 3  # pictures are drawn three times as large and averaged down, which smooths the edges

RADIUS = {"small": 6, "medium": 10, "big": 14}  # pixels

# words.json has "shares", value -> share (skewed, so that words differ in how much they say);
# "words", value -> words for it; "hypernyms", word -> the values that it leaves open; "frames",
# texts around the objects that say nothing about the scene; and the ladder, in which every prompt
# adds a detail to the one before.
_WORDS = json.loads((Path(__file__).parent / "words.json").read_text(encoding="ascii"))
SHARES = {
    name: {
        int(value) if value.isdecimal() else value: share / 100 for value, share in shares.items()
    }
    for name, shares in _WORDS["shares"].items()
}
SHAPES, COLOURS, SIZES, CELLS, BACKGROUNDS, COUNTS = SHARES.values()
RGB = {name: tuple(rgb) for name, rgb in _WORDS["rgb"].items()}
WORDS = _WORDS["words"] | {
    "cell": {int(cell): phrases for cell, phrases in _WORDS["words"]["cell"].items()}
}
HYPERNYMS = {
    name: {phrase: tuple(values) for phrase, values in table.items()}
    for name, table in _WORDS["hypernyms"].items()
}
FULL = 0.4  # share of captions that describe everything
NATS = math.log(1000)  # information of a caption that describes one picture of 1,000
BY_OBJECT = 0.8  # how often all details of one object come before those of the next
MOST_WORDS = 51  # which the built-in CLIP's 64 tokens hold
VAGUENESS = 0.1  # how often a hypernym is the word
EMPTY = 0.1  # how often an object is mentioned of which nothing is said
FRAMES = _WORDS["frames"]
VAGUE = _WORDS["vague captions"]
LADDER = tuple(_WORDS["ladder"])


@dataclass(frozen=True)
class Caption:
    """A text and what it says.

    text: the caption. backgrounds: those that the text allows.
    mentions: one dict per object that the text speaks of: "shape", "colour", "size" or "cell" ->
        the values that the text allows; a missing attribute is left open.
    """

    text: str
    mentions: tuple
    backgrounds: tuple


def describes(caption, scene):
    """Whether a caption is true of a scene.

    Its background must be allowed, and every mention must have an object of its own. Objects that
    the caption does not mention do not matter.

    Args:
        caption: Caption.
        scene: dict with "background" and "objects", dicts with "shape", "colour", "size", "cell".
    Returns: bool.
    """
    if scene["background"] not in caption.backgrounds:
        return False
    # Every choice of one object per mention; there is none if there are too few objects.
    for objects in itertools.permutations(scene["objects"], len(caption.mentions)):
        if all(map(_fits, caption.mentions, objects)):
            return True
    return False


def _fits(mention, thing):
    """Whether an object has the attributes that a mention allows."""
    return all(thing[name] in allowed for name, allowed in mention.items())


def draw_scene(rng):
    """A random scene: what it shows, and small shifts, turns and shades that vary its image.

    Args: rng: random.Random.
    Returns: dict of plain ints and strings, the input of `describes` and `paint`.
    """
    background = _pick(rng, BACKGROUNDS)
    colours = {colour: share for colour, share in COLOURS.items() if colour != background}
    cells = dict(CELLS)
    objects = []
    for _ in range(_pick(rng, COUNTS)):
        shares = {"shape": SHAPES, "colour": colours, "size": SIZES, "cell": cells}
        thing = {name: _pick(rng, shares_of_name) for name, shares_of_name in shares.items()}
        del cells[thing["cell"]]  # an object has its cell to itself, so none hides another
        shift = 16 - RADIUS[thing["size"]]  # pixels to the border of the cell
        thing["dx"] = rng.randint(-shift, shift) // 2
        thing["dy"] = rng.randint(-shift, shift) // 2
        thing["turn"] = rng.randint(-9, 9)
        thing["shade"] = rng.randint(-12, 12)
        objects.append(thing)
    return {"background": background, "objects": objects}


def paint(scene):
    """The picture of a scene, from `draw_scene`: a PIL image, RGB, 96 x 96."""
    image = Image.new("RGB", (PIXELS * OVERSAMPLE,) * 2, RGB[scene["background"]])
    pen = ImageDraw.Draw(image)
    for thing in scene["objects"]:
        row, column = divmod(thing["cell"], 3)
        x = (column * 32 + 16 + thing["dx"]) * OVERSAMPLE
        y = (row * 32 + 16 + thing["dy"]) * OVERSAMPLE
        radius = RADIUS[thing["size"]] * OVERSAMPLE
        colour = tuple(
            min(255, max(0, channel + thing["shade"])) for channel in RGB[thing["colour"]]
        )
        if thing["shape"] == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        elif thing["shape"] == "ring":
            pen.ellipse(
                (x - radius, y - radius, x + radius, y + radius),
                outline=colour,
                width=round(radius * 0.42),
            )
        else:
            turn = math.radians(thing["turn"])
            corners = [
                (radius * r * math.cos(a + turn), radius * r * math.sin(a + turn))
                for r, a in OUTLINES[thing["shape"]]
            ]
            pen.polygon([(round(x + dx), round(y + dy)) for dx, dy in corners], fill=colour)
    return image.reduce(OVERSAMPLE)


def _outlines():
    """The corners of the polygons, (distance in radii, angle); y points down."""
    up = -math.pi / 2
    arm = 0.32  # half the width of an arm of the cross
    half = [(arm, 1), (arm, arm), (1, arm), (1, -arm), (arm, -arm), (arm, -1)]
    cross = half + [(-x, -y) for x, y in half]
    steps = [2 * math.pi * i / 40 for i in range(40)]
    heart = [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15,
        )
        for t in steps
    ]
    return {
        "square": [(1.15, math.pi / 4 + i * math.pi / 2) for i in range(4)],
        "diamond": [(1.05 if i % 2 == 0 else 0.72, up + i * math.pi / 2) for i in range(4)],
        "triangle": [(1.1, up + i * 2 * math.pi / 3) for i in range(3)],
        "star": [(1.1 if i % 2 == 0 else 0.45, up + i * math.pi / 5) for i in range(10)],
        "cross": [(math.hypot(x, y), math.atan2(y, x)) for x, y in cross],
        "heart": [(math.hypot(x, y), math.atan2(y, x)) for x, y in heart],
    }


OUTLINES = _outlines()


def write_caption(scene, rng, full=FULL):
    """A caption of random detail that is true of the scene.

    A share of `full` are full descriptions. The others get details, in random order, until they
    have as much information as was drawn evenly from 0 to NATS. So the logarithm of their ambiguity
    is spread evenly.

    Args: scene: dict; rng: random.Random.
    Returns: Caption.
    """
    if rng.random() < full:
        return write_full_description(scene, rng)
    wanted_nats = rng.random() * NATS
    said = {}
    said_nats = 0.0
    for row, name in _details(scene, rng):
        value = scene["background"] if row is None else scene["objects"][row][name]
        more = said | {row: said.get(row, {}) | {name: _say(name, value, rng, VAGUENESS)}}
        more_nats = information(more)
        # The detail that crosses the wanted information is added with a probability that makes the
        # information equal to the wanted one on average.
        if rng.random() * (more_nats - said_nats) > wanted_nats - said_nats:
            break
        said = more
        said_nats = more_nats
    if not said:
        return Caption(_pick(rng, VAGUE), (), tuple(BACKGROUNDS))
    for row in range(len(scene["objects"])):
        says_background_only = said.keys() == {None}
        if says_background_only or rng.random() < EMPTY:
            said.setdefault(row, {})
    return _compose(said, rng)


def write_full_description(scene, rng):
    """A caption that says everything about a scene. Args: as `write_caption`."""
    said = {
        row: {name: _say(name, thing[name], rng) for name in WORDS}
        for row, thing in enumerate(scene["objects"])
    }
    return _compose(
        said | {None: {"background": _say("background", scene["background"], rng)}}, rng
    )


def _details(scene, rng):
    """All (row of an object, attribute) of a scene and (None, "background"), in random order.

    Mostly, all details of one object come together.
    """
    rows = [*range(len(scene["objects"])), None]
    details = [(row, name) for row in rows for name in (["background"] if row is None else WORDS)]
    rng.shuffle(details)
    if rng.random() < BY_OBJECT:
        rng.shuffle(rows)
        details.sort(key=lambda detail: rows.index(detail[0]))
    return details


def information(said):
    """Nearly minus the logarithm of the share of scenes of which a caption is true.

    Args: said: {object's row, or None: {attribute: (words, values that they allow)}}.
    Returns: nats, at least 0.
    """
    nats = 0.0
    for row, details in said.items():
        share = math.prod(
            sum(SHARES[name][value] for value in values) for name, (_, values) in details.items()
        )
        if row is not None:  # it is true of one of the objects that there are
            share = 1 - sum(p * (1 - share) ** count for count, p in COUNTS.items())
        nats -= math.log(share)
    return nats


def _say(name, value, rng, vagueness=0.0):
    """Words for an attribute and the values they allow; vagueness: the share of hypernyms."""
    hypernyms = [(words, values) for words, values in HYPERNYMS[name].items() if value in values]
    if hypernyms and rng.random() < vagueness:
        return rng.choice(hypernyms)
    return rng.choice(WORDS[name][value]) if name in WORDS else value, (value,)


def write_chain(scene, rng):
    """Captions of one scene, general first; each says one thing more than the one before.

    Args: scene: dict; rng: random.Random.
    Returns: list of 6 Captions, which add shape, colour, size and place of an object, and the
        background, in random order.
    """
    thing = rng.choice(scene["objects"])
    said = {}
    chain = [Caption("a picture", (), tuple(BACKGROUNDS))]
    for name in rng.sample(["shape", "colour", "size", "cell", "background"], 5):
        said[name] = scene["background"] if name == "background" else thing[name]
        mention = {key: (value,) for key, value in said.items() if key != "background"}
        words = [WORDS[key][said[key]][0] for key in ("size", "colour") if key in said]
        text = "a picture"
        if mention:
            noun = WORDS["shape"][said["shape"]][0] if "shape" in said else "shape"
            text += " of " + _article(" ".join([*words, noun]))
        if "cell" in said:
            text += " " + WORDS["cell"][said["cell"]][0]
        if "background" in said:
            text += f"{',' if 'cell' in said else ''} on {_article(said['background'])} background"
        backgrounds = (said["background"],) if "background" in said else tuple(BACKGROUNDS)
        chain.append(Caption(text, (mention,) if mention else (), backgrounds))
    return chain


def write_chains(seed=0, count=200):
    """The texts of chains of scenes that are in neither split: lists of 6 strings."""
    rngs = [random.Random(f"shapes/{seed}/chains/{i}") for i in range(count)]
    return [[caption.text for caption in write_chain(draw_scene(rng), rng)] for rng in rngs]


def _compose(said, rng):
    """Put a caption together. Args: said: as for `information`."""
    things = [details for row, details in said.items() if row is not None]
    rng.shuffle(things)
    tail = ""
    backgrounds = tuple(BACKGROUNDS)
    if None in said:
        words, backgrounds = said[None]["background"]
        tail = rng.choice(
            (" on {} background", " against {} background", " in front of {} backdrop")
        )
        tail = tail.format(_article(words))
    phrases = []
    for thing in things:
        words_of_thing = {name: words for name, (words, _) in thing.items()}
        phrases.append(_noun_phrase(words_of_thing, rng))
    text = _enumerate(phrases) + tail
    frame = _pick(rng, FRAMES)
    if len(text.split()) + len(frame.split()) <= MOST_WORDS:
        text = frame.format(text)
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:] + "."
    mentions = []
    for thing in things:
        mentions.append({name: thing[name][1] for name in WORDS if name in thing})
    return Caption(text, tuple(mentions), backgrounds)


def _noun_phrase(words, rng):
    """A phrase for one object. Args: words: {attribute: words for it}."""
    adjectives = [words[name] for name in ("size", "colour") if name in words]
    style = rng.random()
    if not adjectives and "shape" not in words:
        phrase = rng.choice(_WORDS["phrases for anything"])
    elif "shape" not in words and style < 0.4:
        phrase = " and ".join(["something " + adjectives[0], *adjectives[1:]])
    else:
        noun = words.get("shape") or rng.choice(_WORDS["nouns for any shape"])
        if adjectives and style > 0.85:
            phrase = _article(noun) + " that is " + " and ".join(adjectives)
        elif words.get("colour") in COLOURS and style > 0.75:
            phrase = _article(" ".join([*adjectives[:-1], noun])) + f", {words['colour']} in colour"
        else:
            phrase = _article(" ".join([*adjectives, noun]))
    pause = ", " if " in colour" in phrase else " "
    if "cell" in words:
        phrase += pause + words["cell"]
    elif rng.random() < 0.15:
        phrase += pause + rng.choice(("somewhere", "somewhere or other", "in some place"))
    elif phrase.endswith(" in colour"):
        phrase = phrase.replace(", ", " that is ", 1)  # no comma at the end of a phrase
    return phrase


def _enumerate(phrases):
    """ "a", "a and b" or "a, b and c"; a phrase that comes twice is "another" the second time."""
    distinct = []
    for phrase in phrases:
        first, _, rest = phrase.partition(" ")
        if phrase in distinct and first in ("a", "an"):
            phrase = f"another {rest}"
        elif phrase in distinct:  # "something red" -> "something else red"
            phrase = f"{first} else {rest}".strip()
        distinct.append(phrase if phrase not in distinct else f"{phrase} as well")
    *first_phrases, last = distinct
    if not first_phrases:
        return last
    comma = "," if any("," in phrase for phrase in first_phrases) else ""
    return f"{', '.join(first_phrases)}{comma} and {last}"


def _article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def _pick(rng, shares):
    return rng.choices(list(shares), weights=list(shares.values()))[0]


@functools.lru_cache(maxsize=4)
def _reserved(seed):
    """What the scenes of val and of the chains show; the train split shows none of it."""
    reserved = set()
    for split, count in (("val", 1000), ("chains", 200)):
        for i in range(count):
            rng = random.Random(f"shapes/{seed}/{split}/{i}")
            reserved.add(shown(draw_scene(rng)))
    return reserved


def shown(scene):
    """What a scene shows, without the small shifts, turns and shades: a string."""
    things = [[thing[name] for name in WORDS] for thing in scene["objects"]]
    return json.dumps([scene["background"], sorted(things)])


def make_split(seed, split, images, captions_per_image=5):
    """One split in COCO's format; further fields have the scenes and what the captions say.

    Args: seed: int. split: name, part of the random seed. images, captions_per_image: counts.
    Returns: dict with "info", "images" and "annotations", plain types only.
    """
    offset = {"train": 100_000, "val": 1}.get(split, 0)
    entries = []
    annotations = []
    reserved = () if split == "val" else _reserved(seed)
    for i in range(images):
        rng = random.Random(f"shapes/{seed}/{split}/{i}")
        scene = draw_scene(rng)
        image_id = offset + i
        while shown(scene) in reserved:
            scene = draw_scene(rng)
        entry = {
            "id": image_id,
            "file_name": f"{image_id:012d}.png",
            "width": PIXELS,
            "height": PIXELS,
            "scene": scene,
        }
        entries.append(entry)
        # Some images are described with more care than others.
        full = 2 * FULL if rng.random() < 0.5 else 0.0
        for k in range(captions_per_image):
            caption = write_caption(scene, rng, full)
            entry = {
                "id": image_id * captions_per_image + k,
                "image_id": image_id,
                "caption": caption.text,
                "mentions": list(caption.mentions),
                "backgrounds": list(caption.backgrounds),
            }
            annotations.append(entry)
    info = {"description": "shapes, the built-in data set", "seed": seed, "split": split}
    return {"info": info, "images": entries, "annotations": annotations}


def relevant_images(document):
    """Which images of a split each caption describes: `describes`, of all scenes at once.

    Args: document: dict from `make_split`.
    Returns: {caption id as a string: [image ids, ascending]}, every list with at least one entry.
    """
    images = sorted(document["images"], key=lambda image: image["id"])
    ids = np.array([image["id"] for image in images])
    most = max(COUNTS)
    # Which places of the lists of objects are taken, (images, objects).
    things = np.zeros((len(images), most), dtype=bool)
    # (attribute, value) -> which objects have it, (images, objects).
    having = collections.defaultdict(lambda: np.zeros_like(things))
    for row, image in enumerate(images):
        having["background", image["scene"]["background"]][row] = True
        for k, thing in enumerate(image["scene"]["objects"]):
            things[row, k] = True
            for name in WORDS:
                having[name, thing[name]][row, k] = True

    @functools.cache
    def fitting(mention):  # (images, objects)
        fits = things
        for name, values in json.loads(mention).items():
            has_allowed_value = np.any([having[name, value] for value in values], axis=0)
            fits = fits & has_allowed_value
        return fits

    @functools.cache
    def described(mentions, backgrounds):  # ids, as a list
        masks = [fitting(mention) for mention in mentions]
        is_described = np.zeros(len(images), dtype=bool)
        for objects in itertools.permutations(range(most), len(masks)):  # one per mention
            fits = np.ones(len(images), dtype=bool)
            for mask, k in zip(masks, objects, strict=True):
                fits &= mask[:, k]
            is_described |= fits
        has_background = [having["background", value][:, 0] for value in backgrounds]
        return ids[is_described & np.any(has_background, axis=0)].tolist()

    relevant = {}
    for annotation in document["annotations"]:
        mentions = tuple(sorted(map(json.dumps, annotation["mentions"])))
        backgrounds = tuple(annotation["backgrounds"])
        relevant[str(annotation["id"])] = described(mentions, backgrounds)
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
    aside = partial(root)
    try:
        (aside / "annotations").mkdir(parents=True)
        for split, images in (("train", train), ("val", val)):
            document = make_split(seed, split, images)
            (aside / split).mkdir()
            for image in tqdm(
                document["images"], desc=f"drawing {split}", unit="image", mininterval=0.5
            ):
                paint(image["scene"]).save(aside / split / image["file_name"])
            _dump(document, aside / "annotations" / f"captions_{split}.json")
            if split == "val":
                _dump(relevant_images(document), aside / "annotations" / "relevance_val.json")
        aside.rename(root)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _dump(document, path):
    path.write_text(
        json.dumps(document, separators=(",", ":"), ensure_ascii=True) + "\n", encoding="ascii"
    )


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
