"""What caching needs of a split of any data set: what it is made of, the units that are encoded at once, and the cache.

split = CocoCaptions(root, "val", layout)    or another reader's
embed_units(split.units(), clip, store)      utils/embed.py
split.assemble(store, folder, meta)          the finished units become embeddings/<name>/<split>/
"""

from dataclasses import dataclass
from functools import partial

import torch

from datasets.checks import check_widths, has_fields
from datasets.pictures import picture_stream
from datasets.write import write_split
from utils.cli import UserError, need
from utils.embed import distinct_texts, say_notes, versions
from utils.files import digest, load_tensors, save_tensors

UNIT = 4096  # pictures or texts: a whole number of chunks, which takes seconds to minutes
TEXT_NOTES = {"cut": int, "unknown": int, "example": str}  # what a unit keeps of what `embed_texts` noted
FIELDS = {"image": {"left_out": dict}, "text": TEXT_NOTES}  # what a unit of each kind keeps beside its rows


class Split:
    """A split of a data set as cache_embeddings.py takes it; of every data set the same way."""

    def fingerprint(self):
        """What its embeddings are made from, {name: text}: units and caches of another fingerprint are refused."""
        raise NotImplementedError

    def state(self):
        """What else tells a finished cache from one of other files, {name: text}: units compare it by themselves."""
        return {}

    def units(self):
        """The units that are encoded at once and kept when a run is stopped: a list, as utils/embed.py has them."""
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
    """Pictures and captions in lists, in the order of the cache's rows: N images and M captions.

    Relevance is M lists of image rows, ascending, those that are right for a caption (and it for them), or
    {set: {"t2i": M lists of image rows, "i2t": N lists of caption rows}}, what people found right for some captions
    and, apart from that, for some images, elsewhere empty.
    """

    image_ids: list
    image_files: list  # paths
    image_names: list  # file names as the data set gives them
    caption_ids: list
    captions: list
    image_of_caption: list  # image rows
    relevance: list | dict | None = None  # where more than one answer is right; None: nowhere

    def fingerprint(self):
        """The numbers of images and captions, with digests of all that is in the lists but the paths."""
        images = f"{len(self.image_ids)} images, {digest([self.image_ids, self.image_names])}"
        lists = [self.caption_ids, self.captions, self.image_of_caption, self.relevance, None]
        return {"image_list": images, "caption_list": f"{len(self.captions)} captions, {digest(lists)}"}

    def units(self):
        """UNIT pictures each, then UNIT distinct captions each."""
        lists = {"image": self.image_files, "text": distinct_texts(self.captions)[0]}
        return [
            ListUnit(kind, start // UNIT, items[start : start + UNIT])
            for kind, items in lists.items()
            for start in range(0, len(items), UNIT)
        ]

    def assemble(self, store, folder, meta):
        """The cache in one file of images and one of texts; in shards if meta names shard_rows."""
        units = self.units()
        pictures, texts = (store.load(unit for unit in units if unit.kind == kind) for kind in ("image", "text"))
        broken = {row: reason for content in pictures for row, reason in content["left_out"].items()}
        store.check_broken(broken.values())
        say_notes(texts, meta["context_length"])
        left = self.without(broken)
        need(left.captions, f"{folder}: without the {len(broken)} broken image files no caption is left; mend them")
        row_of_text = {text: row for row, text in enumerate(distinct_texts(self.captions)[0])}
        image, text = (torch.cat([content["rows"] for content in contents]) for contents in (pictures, texts))
        text = text[[row_of_text[caption] for caption in left.captions]]  # (M, D)
        check_widths(meta, image.shape[1], text.shape[1])
        meta |= {"embed_dim": image.shape[1], "image_count": len(image), "caption_count": len(text)}
        meta |= {"image_ids": left.image_ids, "caption_ids": left.caption_ids}
        folders = {str(f).removesuffix(name) for f, name in zip(left.image_files, left.image_names, strict=True)}
        meta |= {"image_folder": folders.pop()} if len(folders) == 1 else {}  # where eval.py finds a picture to show
        reasons = [reason.removeprefix(f"{self.image_files[row]}: ") for row, reason in broken.items()]
        skipped = [[self.image_names[row], reason] for row, reason in zip(broken, reasons, strict=True)]
        meta |= {"skipped": skipped, "versions": versions()}
        lists = (left.image_of_caption, left.captions, left.image_names, left.relevance)
        write_split(folder, image, text, *lists, meta, meta.get("shard_rows"))
        return meta

    def without(self, rows):
        """The same split without some images, a collection of rows, and their captions."""
        images = [row for row in range(len(self.image_ids)) if row not in rows]
        captions = [caption for caption, row in enumerate(self.image_of_caption) if row not in rows]
        new_row = {row: new for new, row in enumerate(images)}
        image_of_caption = [new_row[self.image_of_caption[caption]] for caption in captions]
        relevance = self.relevance
        if isinstance(relevance, list):
            lists = _left(relevance, captions, images)  # a caption's image stays right where all others are gone
            relevance = [right or [image] for right, image in zip(lists, image_of_caption, strict=True)]
        elif relevance:
            relevance = {
                name: {"t2i": _left(both["t2i"], captions, images), "i2t": _left(both["i2t"], images, captions)}
                for name, both in relevance.items()
            }
        return ListSplit(
            *([of[row] for row in images] for of in (self.image_ids, self.image_files, self.image_names)),
            *([of[caption] for caption in captions] for of in (self.caption_ids, self.captions)),
            image_of_caption,
            relevance,
        )


def _left(lists, queries, answers):
    """The lists of the queries that are left, of the answers that are left, by their new rows."""
    new_row = {row: new for new, row in enumerate(answers)}
    return [[new_row[row] for row in lists[query] if row in new_row] for query in queries]


class ListUnit:
    """UNIT pictures, files in row order, or UNIT distinct texts: a `Unit` of utils/embed.py.

    It is kept as one file of tensors, <kind>-00000.pt: {"rows": (n, D)} and what stands in FIELDS.
    """

    def __init__(self, kind, number, items):
        self.kind, self.number, self.items = kind, number, items
        self.pictures, self.texts = (len(items), None) if kind == "image" else (0, items)

    def streams(self, size):
        """Of `size` pictures each; texts need none."""
        starts, first = range(0, self.pictures, size), self.number * UNIT
        return [partial(picture_stream, self.items[start : start + size], first + start) for start in starts]

    def name(self, row):
        """A picture in a message."""
        return self.items[row - self.number * UNIT]

    def describe(self, row, reason):
        """A broken picture in a message: the reason itself, which names the file."""
        return reason

    def load(self, folder):
        """What its file in the folder of units holds, or None if it is not there or not to be trusted."""
        try:
            content = load_tensors(self._path(folder))
        except (UserError, FileNotFoundError):
            return None
        fits = has_fields(content, {"rows": torch.Tensor} | FIELDS[self.kind])
        fits = fits and len(content["rows"]) + len(content.get("left_out", ())) == len(self.items)
        return content if fits else None

    def left_out(self, folder):
        """The broken pictures without which it was kept, {image row: reason}, or None if it is not there."""
        content = self.load(folder)
        return None if content is None else content.get("left_out", {})

    def save(self, folder, embedded):
        """Keep what it became, an Embedded, in the folder of units."""
        content = {"image": {"left_out": embedded.left_out}, "text": embedded.notes}[self.kind]
        save_tensors({"rows": getattr(embedded, self.kind)} | content, self._path(folder))

    def _path(self, folder):
        return folder / f"{self.kind}-{self.number:05d}.pt"
