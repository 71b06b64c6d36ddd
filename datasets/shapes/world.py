"""The world of the built-in data set: a seed in; scenes, their pictures and their captions, in COCO format, out.

A scene has one to three objects (shape, colour, size, cell of a 3 x 3 grid) and a background. A caption is a text
together with what the text says: a *mention* for every object it speaks of, and the backgrounds it allows. Since both
are known, so is the exact answer to "which pictures does this caption describe?", which no photographs can give:

>>> scene = {"background": "grey", "objects": [{"shape": "ring", "colour": "red", "size": "small", "cell": 0}]}
>>> describes(Caption("a red ring", ({"colour": ("red",), "shape": ("ring",)},), BACKGROUNDS), scene)
True
>>> describes(Caption("a red thing and something else", ({"colour": ("red",)}, {}), BACKGROUNDS), scene)
False

The length of a caption does not fully give its ambiguity away (python -m tests.benchmarks.shapes prints how far): a
rare colour or shape says much in one word, hypernyms ("a round thing") and fillers ("if you look at this drawing, you
will find ...") say little in many.

    python -m datasets.shapes.world --out data/shapes
"""

import argparse
import itertools
import json
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from utils.files import partial, remove_leftovers

PIXELS = 96  # side of a picture; a cell of the 3 x 3 grid is 32 pixels wide
OVERSAMPLE = 3  # pictures are drawn three times as large and averaged down, which smooths the edges

RADIUS = {"small": 6, "medium": 10, "big": 14}  # pixels

# words.json: what there is, value -> share (skewed, so that words differ in how much they say), and what can be said:
# value -> words for it, and hypernyms -> the values that they leave open. "frames" are texts around the objects, and
# none of their words narrows the scene down; of the ladder, every prompt adds a detail to the one before.
_WORDS = json.loads((Path(__file__).parent / "words.json").read_text(encoding="ascii"))
SHAPES, COLOURS, SIZES, CELLS, BACKGROUNDS, COUNTS = (
    {int(value) if value.isdecimal() else value: share for value, share in shares.items()}
    for shares in _WORDS["shares"].values()
)
RGB = {name: tuple(rgb) for name, rgb in _WORDS["rgb"].items()}
WORDS = _WORDS["words"] | {"cell": {int(cell): phrases for cell, phrases in _WORDS["words"]["cell"].items()}}
HYPERNYMS = {
    name: {phrase: tuple(values) for phrase, values in table.items()} for name, table in _WORDS["hypernyms"].items()
}
FRAMES, VAGUE, LADDER = _WORDS["frames"], _WORDS["vague captions"], tuple(_WORDS["ladder"])


@dataclass(frozen=True)
class Caption:
    """A text and what it says.

    text: the caption. backgrounds: those that the text allows.
    mentions: one dict an object that the text speaks of: "shape", "colour", "size" or "cell" -> the values that the
        text allows; an attribute that is not there is left open.
    """

    text: str
    mentions: tuple
    backgrounds: tuple


def describes(caption, scene):
    """Whether a caption is true of a scene: its background is allowed, and every mention has an object to itself.

    Objects that the caption does not speak of do not matter.
    Args: caption: Caption. scene: dict with "background" and "objects" (dicts with "shape", "colour", "size", "cell").
    Returns: bool.
    """
    if scene["background"] not in caption.backgrounds:
        return False
    fits = [
        [all(thing[name] in allowed for name, allowed in mention.items()) for thing in scene["objects"]]
        for mention in caption.mentions
    ]
    orders = itertools.permutations(
        range(len(scene["objects"])), len(fits)
    )  # the mentions' objects; none if there are too few
    return any(all(row[i] for row, i in zip(fits, order, strict=True)) for order in orders)


def draw_scene(rng):
    """A random scene: what it shows, and the small shifts, turns and shades that make no two pictures of it alike.

    Args: rng: random.Random.
    Returns: dict of plain ints and strings, the input of `describes` and `paint`.
    """
    background = _pick(rng, BACKGROUNDS)
    colours = {colour: share for colour, share in COLOURS.items() if colour != background}
    cells = dict(CELLS)
    objects = []
    for _ in range(_pick(rng, COUNTS)):
        shares = {"shape": SHAPES, "colour": colours, "size": SIZES, "cell": cells}
        thing = {name: _pick(rng, of) for name, of in shares.items()}
        del cells[thing["cell"]]  # an object has its cell to itself: none hides another
        shift = 16 - RADIUS[thing["size"]]  # pixels to the border of the cell
        thing |= {"dx": rng.randint(-shift, shift) // 2, "dy": rng.randint(-shift, shift) // 2}
        thing |= {"turn": rng.randint(-9, 9), "shade": rng.randint(-12, 12)}
        objects.append(thing)
    return {"background": background, "objects": objects}


def paint(scene):
    """The picture of a scene, from `draw_scene`: a PIL image, RGB, 96 x 96."""
    image = Image.new("RGB", (PIXELS * OVERSAMPLE,) * 2, RGB[scene["background"]])
    pen = ImageDraw.Draw(image)
    for thing in scene["objects"]:
        row, column = divmod(thing["cell"], 3)
        x, y = (column * 32 + 16 + thing["dx"]) * OVERSAMPLE, (row * 32 + 16 + thing["dy"]) * OVERSAMPLE
        radius = RADIUS[thing["size"]] * OVERSAMPLE
        colour = tuple(min(255, max(0, channel + thing["shade"])) for channel in RGB[thing["colour"]])
        if thing["shape"] == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        elif thing["shape"] == "ring":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=round(radius * 0.42))
        else:
            turn = math.radians(thing["turn"])
            corners = [
                (radius * r * math.cos(a + turn), radius * r * math.sin(a + turn)) for r, a in OUTLINES[thing["shape"]]
            ]
            pen.polygon([(round(x + dx), round(y + dy)) for dx, dy in corners], fill=colour)
    return image.reduce(OVERSAMPLE)


def _outlines():
    """Corners of the shapes with straight edges, and the heart: (distance in radii, angle), y pointing down."""
    up = -math.pi / 2
    arm = 0.32  # half the width of an arm of the cross
    half = [(arm, 1), (arm, arm), (1, arm), (1, -arm), (arm, -arm), (arm, -1)]
    cross = half + [(-x, -y) for x, y in half]
    steps = [2 * math.pi * i / 40 for i in range(40)]
    heart = [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15)
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


def write_caption(scene, rng):
    """A caption of random detail that is true of the scene.

    Args: scene: dict; rng: random.Random.
    Returns: Caption.
    """
    detail = rng.random()
    if detail < 0.07:
        return Caption(_pick(rng, VAGUE), (), tuple(BACKGROUNDS))
    detail = (detail - 0.07) / 0.93
    things = [thing for thing in scene["objects"] if rng.random() < 0.35 + 0.65 * detail]
    things = things or [rng.choice(scene["objects"])]
    said = [{name for name in WORDS if rng.random() < 0.1 + 0.85 * detail} for _ in things]
    return _compose(scene, things, said, rng.random() < 0.1 + 0.5 * detail, 0.3, rng)


def write_full_description(scene, rng):
    """A caption that says every attribute of every object, and the background. Arguments as `write_caption`'s."""
    things = list(scene["objects"])
    return _compose(scene, things, [set(WORDS)] * len(things), True, 0.0, rng)


def write_chain(scene, rng):
    """Captions of one scene from general to specific: each says what the one before says and one thing more.

    Args: scene: dict; rng: random.Random.
    Returns: list of 6 Captions, which add an object's shape, colour, size, place and the background in random order.
    """
    thing, said, chain = rng.choice(scene["objects"]), {}, [Caption("a picture", (), tuple(BACKGROUNDS))]
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
    """The texts of chains from general to specific, of scenes that are in neither split: lists of 6 strings."""
    rngs = [random.Random(f"shapes/{seed}/chains/{i}") for i in range(count)]
    return [[caption.text for caption in write_chain(draw_scene(rng), rng)] for rng in rngs]


def _compose(scene, things, said, say_background, vagueness, rng):
    """Put a caption together of attribute names said of each thing; vagueness: how often a hypernym is the word."""
    rng.shuffle(things)
    pairs = [_noun_phrase(thing, names, vagueness, rng) for thing, names in zip(things, said, strict=True)]
    phrases, mentions = zip(*pairs, strict=True)
    tail, backgrounds = "", tuple(BACKGROUNDS)
    if say_background:
        word, backgrounds = scene["background"], (scene["background"],)
        if rng.random() < vagueness:
            word, backgrounds = _hypernym("background", scene["background"], rng) or (word, backgrounds)
        tail = rng.choice((" on {} background", " against {} background", " in front of {} backdrop"))
        tail = tail.format(_article(word))
    text = _pick(rng, FRAMES).format(_enumerate(phrases) + tail)
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:] + "."
    return Caption(text, tuple(mentions), backgrounds)


def _noun_phrase(thing, names, vagueness, rng):
    """A phrase for one object and what it says. names: the attributes to speak of. Returns: (phrase, mention)."""
    mention, words = {}, {}
    for name in (name for name in WORDS if name in names):
        words[name], mention[name] = rng.choice(WORDS[name][thing[name]]), (thing[name],)
        if rng.random() < vagueness:
            words[name], mention[name] = _hypernym(name, thing[name], rng) or (words[name], mention[name])
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
    return phrase, mention


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
    comma = "," if any("," in phrase for phrase in distinct[:-1]) else ""
    return distinct[0] if len(distinct) == 1 else ", ".join(distinct[:-1]) + f"{comma} and {distinct[-1]}"


def _article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def _hypernym(name, value, rng):
    """A random hypernym (phrase, values) of an attribute whose values contain this one, or None."""
    fitting = [item for item in HYPERNYMS[name].items() if value in item[1]]
    return rng.choice(fitting) if fitting else None


def _pick(rng, shares):
    return rng.choices(list(shares), weights=list(shares.values()))[0]


def make_split(seed, split, images, captions_per_image=5):
    """One split in COCO's format, with the scene of every image and the content of every caption as further fields.

    Args: seed: int. split: name, part of the random seed. images, captions_per_image: counts.
    Returns: dict with "info", "images" and "annotations", plain types only.
    """
    offset, entries, annotations = {"train": 100_000, "val": 1}.get(split, 0), [], []
    for i in range(images):
        rng = random.Random(f"shapes/{seed}/{split}/{i}")
        scene, image_id = draw_scene(rng), offset + i
        entry = {"id": image_id, "file_name": f"{image_id:012d}.png", "width": PIXELS, "height": PIXELS}
        entries.append(entry | {"scene": scene})
        for k in range(captions_per_image):
            caption = write_caption(scene, rng)
            entry = {"id": image_id * captions_per_image + k, "image_id": image_id, "caption": caption.text}
            entry |= {"mentions": list(caption.mentions), "backgrounds": list(caption.backgrounds)}
            annotations.append(entry)
    info = {"description": "shapes, the built-in data set", "seed": seed, "split": split}
    return {"info": info, "images": entries, "annotations": annotations}


def relevant_images(document):
    """Which images of a split each caption describes.

    Args: document: dict from `make_split`.
    Returns: {caption id as a string: [image ids, ascending]}, every list with at least one entry.
    """
    scenes = [(image["id"], image["scene"]) for image in sorted(document["images"], key=lambda image: image["id"])]
    known, relevance = {}, {}
    for entry in tqdm(document["annotations"], desc="who describes what", unit="caption", leave=False):
        caption = Caption(entry["caption"], tuple(entry["mentions"]), tuple(entry["backgrounds"]))
        key = json.dumps([sorted(map(json.dumps, entry["mentions"])), entry["backgrounds"]])
        if key not in known:
            known[key] = [image_id for image_id, scene in scenes if describes(caption, scene)]
        relevance[str(entry["id"])] = known[key]
    return relevance


def make(root, seed=0, train=10_000, val=1_000):
    """Draw the data set in COCO's layout: train/ val/ annotations/{captions_train,captions_val,relevance_val}.json.

    The folder appears complete or not at all. The JSON has the same bytes everywhere, the pictures the same pixels for
    one Pillow version.
    Args: root: a folder that does not exist yet. seed, train, val: the seed and the numbers of images.
    """
    root = Path(root)
    remove_leftovers(root)
    aside = partial(root)
    try:
        (aside / "annotations").mkdir(parents=True)
        for split, images in (("train", train), ("val", val)):
            document = make_split(seed, split, images)
            (aside / split).mkdir()
            for image in tqdm(document["images"], desc=f"drawing {split}", unit="image"):
                paint(image["scene"]).save(aside / split / image["file_name"])
            _dump(document, aside / "annotations" / f"captions_{split}.json")
            if split == "val":
                _dump(relevant_images(document), aside / "annotations" / "relevance_val.json")
        aside.rename(root)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _dump(document, path):
    path.write_text(json.dumps(document, separators=(",", ":"), ensure_ascii=True) + "\n", encoding="ascii")


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
