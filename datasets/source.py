"""A split of any data set, as cache_embeddings.py uses it.

The split says what it is made of, gives the units to embed, and makes the cache from them:

split = CocoCaptions(root, "val", layout)    or another reader's
embed_units(split.units(), clip, store)      utils/embed.py
split.assemble(store, folder, meta)          the finished units become embeddings/<name>/<split>/
"""

import logging
from dataclasses import dataclass, field
from functools import partial

import torch

from datasets.checks import check_widths, has_fields
from datasets.images import image_stream
from datasets.write import write_split
from utils.cli import UserError, need
from utils.embed import Broken, distinct_texts, say_notes, versions
from utils.files import clean_text, digest, load_tensors, save_tensors

UNIT = 4096  # images or texts: a whole number of chunks, which takes seconds to minutes
TEXT_NOTES = {"cut": int, "unknown": int, "example": str}  # as `embed_texts` returns them
FIELDS = {"image": {"left_out": dict}, "text": TEXT_NOTES}  # that a unit keeps besides its rows


class Split:
    """A split of a data set. cache_embeddings.py treats every data set the same way."""

    def fingerprint(self):
        """What its embeddings are made from, {name: text}.

        Units and caches of another fingerprint are refused.
        """
        raise NotImplementedError

    def state(self):
        """What else a finished cache must share with its files now, {name: text}.

        It is not compared when units are reused: each unit checks its own file.
        """
        return {}

    def check_broken(self, allowed):
        """Raise a UserError if more samples are known to be broken than may be left out."""

    def units(self):
        """The units, each saved as a whole: a list of `embed.Unit`."""
        raise NotImplementedError

    def assemble(self, store, folder, meta):
        """Make the cache of the finished units.

        Args:
            store: UnitStore that holds them.
            folder: the split's.
            meta: dict, the beginning of meta.json, which this completes.
        Returns: meta.
        Raises: UserError if more samples are broken than the store allows, or none is left.
        """
        raise NotImplementedError


@dataclass
class ListSplit(Split):
    """Images and captions in lists, in the order of the cache's rows: N images and M captions.

    Relevance says which answers are right if more than one is. It is either M lists of image rows,
    ascending (an image is then right for a caption and the caption for it), or judgements of both
    directions, {set: {"t2i": M lists of image rows, "i2t": N lists of caption rows}}, where a list
    is empty if nobody judged the query.
    """

    image_ids: list
    image_files: list  # paths
    image_names: list  # file names as the data set gives them
    caption_ids: list
    captions: list
    image_of_caption: list  # image rows
    relevance: list | dict | None = None
    broken: list = field(default_factory=list)  # [place, problem] of rows that are left out already
    facts: dict = field(default_factory=dict)  # what else meta.json says, plain types

    def __post_init__(self):
        cleaned = [clean_text(caption) for caption in self.captions]
        changed = sum(a != b for a, b in zip(cleaned, self.captions, strict=True))
        if changed:
            message = "note: %d captions have half a character (a surrogate), which became U+FFFD"
            logging.warning(message, changed)
        self.captions = cleaned

    def check_broken(self, allowed):
        """Raise a UserError, after naming them, if more rows are broken than may be left out."""
        broken = Broken(allowed)
        broken.add([f"{place} {problem}" for place, problem in self.broken])
        broken.check()

    def fingerprint(self):
        """The numbers of images and captions; digests of all lists but paths and broken rows."""
        images = [self.image_ids, self.image_names]
        # None stands for a field of earlier versions, so that digests of older caches stay valid.
        captions = [self.caption_ids, self.captions, self.image_of_caption, self.relevance, None]
        return {
            "image_list": f"{len(self.image_ids)} images, {digest(images)}",
            "caption_list": f"{len(self.captions)} captions, {digest(captions)}",
        }

    def units(self):
        """Units of UNIT images each, then of UNIT distinct captions each."""
        texts, _ = distinct_texts(self.captions)
        return list_units("image", self.image_files) + list_units("text", texts)

    def assemble(self, store, folder, meta):
        """The cache in one file of images and one of texts; in shards if meta names shard_rows."""
        image_units = store.load(unit for unit in self.units() if unit.kind == "image")
        text_units = store.load(unit for unit in self.units() if unit.kind == "text")
        broken_images = {}  # row -> reason
        for content in image_units:
            broken_images.update(content["left_out"])
        messages = [f"{place} {problem}" for place, problem in self.broken]
        for row, reason in broken_images.items():
            messages.append(f"{self.image_files[row]}: {reason}")
        store.check_broken(messages)
        say_notes(text_units, meta["context_length"])
        left = self.without(broken_images)
        problem = f"without the {len(broken_images)} broken image files no caption is left"
        need(left.captions, f"{folder}: {problem}; fix them")
        image = torch.cat([content["rows"] for content in image_units])  # (N, D)
        distinct_text = torch.cat([content["rows"] for content in text_units])
        texts, _ = distinct_texts(self.captions)
        row_of_text = {text: row for row, text in enumerate(texts)}
        text = distinct_text[[row_of_text[caption] for caption in left.captions]]  # (M, D)
        check_widths(meta, image.shape[1], text.shape[1])
        meta["embed_dim"] = image.shape[1]
        meta["image_count"] = len(image)
        meta["caption_count"] = len(text)
        meta["image_ids"] = left.image_ids
        meta["caption_ids"] = left.caption_ids
        image_folder = left.image_folder()
        if image_folder is not None:
            meta["image_folder"] = image_folder
        meta.update(self.facts)
        meta["skipped"] = [list(row) for row in self.broken]
        for row, reason in broken_images.items():
            meta["skipped"].append([self.image_names[row], reason])
        meta["versions"] = versions()
        write_split(
            folder,
            image,
            text,
            left.image_of_caption,
            left.captions,
            left.image_names,
            left.relevance,
            meta,
            meta.get("shard_rows"),
        )
        return meta

    def image_folder(self):
        """The folder in which all images lie under their names, or None; for eval.py."""
        folders = set()
        for file, name in zip(self.image_files, self.image_names, strict=True):
            folders.add(str(file).removesuffix(name))
        return folders.pop() if len(folders) == 1 else None

    def without(self, rows):
        """The split without the images in `rows` and their captions."""
        images = [row for row in range(len(self.image_ids)) if row not in rows]
        captions = [caption for caption, row in enumerate(self.image_of_caption) if row not in rows]
        new_row = {row: new for new, row in enumerate(images)}
        image_of_caption = [new_row[self.image_of_caption[caption]] for caption in captions]
        return ListSplit(
            _pick(self.image_ids, images),
            _pick(self.image_files, images),
            _pick(self.image_names, images),
            _pick(self.caption_ids, captions),
            _pick(self.captions, captions),
            image_of_caption,
            self._relevance_of(images, captions, image_of_caption),
        )

    def _relevance_of(self, images, captions, image_of_caption):
        """The relevance of the images and captions that are left, given by their rows."""
        if not self.relevance:
            return self.relevance
        if isinstance(self.relevance, list):
            relevance = _renumbered(self.relevance, captions, images)
            for caption, image in enumerate(image_of_caption):
                if not relevance[caption]:  # its own image stays right
                    relevance[caption] = [image]
            return relevance
        relevance = {}
        for name, both in self.relevance.items():
            t2i = _renumbered(both["t2i"], captions, images)
            i2t = _renumbered(both["i2t"], images, captions)
            relevance[name] = {"t2i": t2i, "i2t": i2t}
        return relevance


def _pick(items, rows):
    return [items[row] for row in rows]


def _renumbered(lists, queries, answers):
    """The lists of the queries that are left, with the answers that are left, by their new rows."""
    new_row = {row: new for new, row in enumerate(answers)}
    renumbered = []
    for query in queries:
        renumbered.append([new_row[row] for row in lists[query] if row in new_row])
    return renumbered


def images_of_group(groups, images):
    """The images that are right for each caption, ascending: those of all captions of its group.

    Args:
        groups: the group of each of M captions.
        images: M lists of image rows.
    """
    rows_of_group = {}
    for group, rows in zip(groups, images, strict=True):
        rows_of_group.setdefault(group, set()).update(rows)
    return [sorted(rows_of_group[group]) for group in groups]


def list_units(kind, items):
    """ListUnits of UNIT items each."""
    starts = range(0, len(items), UNIT)
    return [ListUnit(kind, start // UNIT, items[start : start + UNIT]) for start in starts]


class ListUnit:
    """UNIT images, files in row order, or UNIT distinct texts: a `Unit` of utils/embed.py.

    It is kept as one file of tensors, <kind>-00000.pt: {"rows": (n, D)} and what FIELDS names.
    """

    def __init__(self, kind, number, items):
        self.kind = kind
        self.number = number
        self.items = items
        self.image_count = len(items) if kind == "image" else 0
        self.texts = items if kind == "text" else None

    def streams(self, size):
        """Streams of `size` images each; texts need none."""
        streams = []
        for start in range(0, self.image_count, size):
            files = self.items[start : start + size]
            streams.append(partial(image_stream, files, self.number * UNIT + start))
        return streams

    def name(self, row):
        """The name of an image in messages: its path."""
        return self.items[row - self.number * UNIT]

    def load(self, folder):
        """The content of its file in the folder of units; None if it is missing or not whole."""
        try:
            content = load_tensors(self._path(folder))
        except (UserError, FileNotFoundError):
            return None
        if not has_fields(content, {"rows": torch.Tensor, **FIELDS[self.kind]}):
            return None
        left_out = content.get("left_out", {})
        if len(content["rows"]) + len(left_out) != len(self.items):
            return None
        for row, reason in left_out.items():
            # Units that earlier versions saved have the path before the reason.
            left_out[row] = reason.removeprefix(f"{self.name(row)}: ")
        return content

    def left_out(self, folder):
        """The broken images that the finished unit leaves out, {row: reason}; None if missing."""
        content = self.load(folder)
        return None if content is None else content.get("left_out", {})

    def save(self, folder, embedded):
        """Save this unit's Embedded in the folder of units."""
        if self.kind == "image":
            content = {"rows": embedded.image, "left_out": embedded.left_out}
        else:
            content = {"rows": embedded.text, **embedded.notes}
        save_tensors(content, self._path(folder))

    def _path(self, folder):
        return folder / f"{self.kind}-{self.number:05d}.pt"
