"""A folder of images per class, and prompts for the classes: zero-shot classification.

    <root>/<split>/<class>/*.jpg     a class is named after its folder, with spaces for "_"
    <root>/classes.txt               optional other names: lines of folder, tab and name

The captions of the cache are the prompts of all classes, class by class: template p of class c is
caption c * P + p. Each is right for all images of its class (relevance.json), so that a cache of
this kind is evaluated as any other.
"""

import logging
from pathlib import Path

from datasets.checks import listing
from datasets.source import ListSplit, images_of_group
from utils.cli import need
from utils.files import text_lines

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SLOT = "{}"  # where a template has the name of the class
TEMPLATES = (
    "{}",
    "an image of a {}",
    "a photo of a {}",
    "a picture that shows one {}",
    "a clear photo of a single {} in the middle of the picture",
)


class ImageFolder(ListSplit):
    """The images of a split by class and name, and the prompts of all classes.

    Args:
        layout: the default templates.
        templates: a file with a template per line, instead of these; None: no file.
    Raises: UserError that says what was expected and what was found.
    """

    def __init__(self, root, split, layout=TEMPLATES, templates=None):
        folder = Path(root) / split
        found = listing(folder)
        need(folder.is_dir(), f"--data-root {root}: expected {split}/<class>/*.jpg, found {found}")
        classes = _classes_of(folder, Path(root) / "classes.txt")
        lines = read_templates(templates) if templates else list(layout)
        names = []
        files = []
        prompts = []
        rows_of_class = []  # of each prompt
        for class_folder, class_name in classes.items():
            images = _images_in(folder / class_folder)
            rows = range(len(names), len(names) + len(images))
            names += [f"{class_folder}/{image.name}" for image in images]
            files += images
            prompts += [line.replace(SLOT, class_name) for line in lines]
            rows_of_class += [rows] * len(lines)
        images_of_prompt = images_of_group(prompts, rows_of_class)
        super().__init__(
            image_ids=list(range(len(names))),
            image_files=files,
            image_names=names,
            caption_ids=list(range(len(prompts))),
            captions=prompts,
            image_of_caption=_own_images(images_of_prompt),
            relevance=images_of_prompt,
        )
        self.facts = {
            "classes": [list(pair) for pair in classes.items()],
            "prompts_per_class": len(lines),
        }

    def without(self, rows):
        """The split without some images; every class keeps its prompts and at least one image."""
        images_left = []
        for prompt, images in zip(self.captions, self.relevance, strict=True):
            left = [image for image in images if image not in rows]
            need(left, f"no image of the class of {prompt!r} can be read; fix one of them")
            images_left.append(left)
        self.image_of_caption = _own_images(images_left)
        return super().without(rows)


def _own_images(images_of_prompt):
    """One image that each prompt is right for: the prompts of a class take its images in turn.

    A cache assigns one image to every caption. In retrieval, images that are assigned to no caption
    are in the gallery but are not queries; eval.py --zero-shot classifies all images.
    """
    taken = {}  # first image of a class -> its prompts so far
    own_images = []
    for images in images_of_prompt:
        number = taken.get(images[0], 0)
        taken[images[0]] = number + 1
        own_images.append(images[number % len(images)])
    return own_images


def _classes_of(folder, file):
    """The classes of a split: {folder: name}, in the order of the folders."""
    folders = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
    folders = [name for name in folders if not name.startswith(".")]
    need(len(folders) > 1, f"{folder}: expected a folder per class, at least two, found {folders}")
    classes = {name: name.replace("_", " ") for name in folders}
    if file.is_file():
        for line in text_lines(file):
            class_folder, tab, name = line.partition("\t")
            need(tab and name.strip(), f"{file}: expected folder, tab and name, found {line!r}")
            if class_folder.strip() in classes:
                classes[class_folder.strip()] = name.strip()
    folder_of_name = {}
    for class_folder, name in classes.items():
        other = folder_of_name.setdefault(name, class_folder)
        problem = f"the folders {other} and {class_folder} are both named {name!r}"
        need(other == class_folder, f"{folder}: {problem}; give them names in {file}")
    return classes


def _images_in(folder):
    """The images in the folder of a class, by name. Other files are left out, and counted."""
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    need(images, f"{folder}: no image ({', '.join(SUFFIXES)}); remove the folder, or fill it")
    if len(images) < len(files):
        logging.warning("note: %s: %d files are not images", folder, len(files) - len(images))
    return images


def read_templates(file):
    """The templates of a file, one per line.

    Raises: UserError if one has no place for the name of the class.
    """
    path = Path(file)
    need(path.is_file(), f"--templates {file}: no such file")
    lines = text_lines(path)
    need(lines, f"--templates {file}: holds no template")
    for line in lines:
        need(SLOT in line, f"--templates {file}: {line!r} has no {SLOT} for the name of the class")
    return lines
