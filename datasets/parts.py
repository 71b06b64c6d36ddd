"""Encoded parts of a split in, the same parts out after a kill: embeddings/<name>/<split>/.parts/, which is there while a split is unfinished.

    .parts/settings.json       what the parts were made with; written before the first of them
           image-00000.pt ...  {"rows": (n, D), "left_out": {image row: reason}}
           text-00000.pt ...   {"rows": (n, D), "cut": int, "unknown": int, "example": str}, of the distinct captions

A part is PART images or texts, whatever --batch-size, --workers or the number of ranks, and no part depends on another. Of tars, a part is one tar,
and its files are those of the finished split (datasets/shards.py), with notes-00000.json beside them until they are moved there.
"""

import contextlib
import os
import shutil

import torch

from datasets.shards import shard_file
from utils.cli import UserError
from utils.distributed import is_first, rank, world_size
from utils.files import differences, load_json, load_tensors, save_json, save_tensors, sha256

PART = 4096  # rows: a whole number of chunks, of which a part takes seconds to minutes
FIELDS = {
    "image": {"rows": torch.Tensor, "left_out": dict},
    "text": {"rows": torch.Tensor, "cut": int, "unknown": int, "example": str},
}
KINDS = ("image", "text", "images", "captions")  # the files of a tar
NOTES = {
    "tar": list,
    "rows": int,
    "width": list,
    "sums": list,
    "left_out": list,
    "cut": int,
    "unknown": int,
    "example": str,
}


class Parts:
    """The parts of a split. Args: folder: the split's. settings: dict of plain types. overwrite: leave parts of other runs unused.

    Raises: UserError that names the difference if there are parts that were made with other settings.
    """

    def __init__(self, folder, settings, overwrite=False):
        self.folder, self.settings = folder / ".parts", settings | {"overwrite": overwrite}
        found = None
        with contextlib.suppress(UserError, FileNotFoundError):  # unreadable: nothing tells what the parts are
            found = load_json(self.folder / "settings.json")
        if isinstance(found, dict) and (
            not is_first() or any(self.folder.glob("*.pt")) or any(self.folder.glob("notes-*.json"))
        ):
            changed = differences(found, settings)
            if not changed and (found.get("overwrite") or not overwrite):  # one --overwrite goes on with another
                self.settings = found
                return
            if not overwrite:
                raise UserError(
                    f"{folder} was begun with other settings: {changed}; finish it with those, give another --name, or --overwrite it"
                )
        if not is_first():
            raise UserError(
                f"{folder}: this rank does not find what the first one began; all must work in one shared folder, with the same versions"
            )
        self.remove()
        if world_size() > 1:  # two ranks must not write it at once
            self._begin()

    def missing(self, kind, rows, strict=False):
        """The numbers of the parts that this rank is still to make.

        Args: kind: "image" or "text". rows: of all parts together. strict: also those that leave an image out.
        """
        contents = {part: self.read(kind, part, rows) for part in range(rank(), -(-rows // PART), world_size())}
        return [part for part, content in contents.items() if content is None or (strict and content.get("left_out"))]

    def read(self, kind, part, rows):
        """One part, or None if it is not there or not to be trusted."""
        try:
            content = load_tensors(self._path(kind, part))
        except (UserError, FileNotFoundError):
            return None
        fits = isinstance(content, dict) and all(isinstance(content.get(key), of) for key, of in FIELDS[kind].items())
        return (
            content
            if fits and len(content["rows"]) + len(content.get("left_out", ())) == len(part_rows(part, rows))
            else None
        )

    def write(self, kind, part, content):
        """Keep one part."""
        self._begin()
        save_tensors(content, self._path(kind, part))

    def join(self, kind, rows):
        """All parts of a kind. Returns: ((N, D) tensor, list of the parts' contents without their rows)."""
        contents = [self.read(kind, part, rows) for part in range(-(-rows // PART))]
        return torch.cat([content.pop("rows") for content in contents]), contents

    def remove(self):
        """Remove them all; the settings first, without which no part is believed."""
        (self.folder / "settings.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self):
        if not (self.folder / "settings.json").exists():
            save_json(self.settings, self.folder / "settings.json", indent=1)

    def _path(self, kind, part):
        return self.folder / f"{kind}-{part:05d}.pt"


class TarParts(Parts):
    """The parts of a split that is made of tars. Args: as of Parts."""

    def read_notes(self, number, tar=None):
        """What was noted of a tar, or None if it is still to be made. Args: tar: what it must have been made of, to have its files checked too."""
        try:
            notes = load_json(self._notes(number))
        except (UserError, FileNotFoundError):
            return None
        if not isinstance(notes, dict) or not all(isinstance(notes.get(key), of) for key, of in NOTES.items()):
            return None
        if tar is not None:
            files = [self._find(kind, number) for kind in KINDS]
            if (
                notes["tar"] != tar
                or not all(file.exists() for file in files)
                or [sha256(file) for file in files] != notes["sums"]
            ):
                return None
        return notes

    def write_tar(self, number, contents, notes):
        """Keep what a tar became. Args: contents: tensor, tensor, list, list, of KINDS. notes: as NOTES, without the sums."""
        self._begin()
        files = [shard_file(self.folder, kind, number) for kind in KINDS]
        for file, content in zip(files, contents, strict=True):
            (save_tensors if isinstance(content, torch.Tensor) else save_json)(content, file)
        save_json(notes | {"sums": [sha256(file) for file in files]}, self._notes(number))

    def publish(self, count):
        """Move the files of all tars to their split; a run that is killed meanwhile goes on with it."""
        for number in range(count):
            for kind in KINDS:
                file = shard_file(self.folder, kind, number)
                if file.exists():
                    os.replace(file, shard_file(self.folder.parent, kind, number))

    def _find(self, kind, number):
        """Where a file is: still here, or moved already."""
        here = shard_file(self.folder, kind, number)
        return here if here.exists() else shard_file(self.folder.parent, kind, number)

    def _notes(self, number):
        return self.folder / f"notes-{number:05d}.json"


def part_rows(part, rows):
    """The rows of a part, a range. Args: rows: of all parts together."""
    return range(part * PART, min((part + 1) * PART, rows))
