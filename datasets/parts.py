"""Encoded parts of a split in, the same parts out after a kill: embeddings/<name>/<split>/.parts/, which is there while a split is unfinished.

    .parts/settings.json       what the parts were made with; written before the first of them
           image-00000.pt ...  {"rows": (n, D), "left_out": {image row: reason}}
           text-00000.pt ...   {"rows": (n, D), "cut": int, "unknown": int, "example": str}, of the distinct captions

A part is PART images or texts, whatever --batch-size, --workers or the number of processes, and no part depends on another.
"""

import contextlib
import shutil

import torch

from utils.cli import UserError
from utils.files import differences, load_json, load_tensors, save_json, save_tensors

PART = 4096  # rows: a whole number of chunks, of which a part takes seconds to minutes
FIELDS = {"image": {"rows": torch.Tensor, "left_out": dict}, "text": {"rows": torch.Tensor, "cut": int, "unknown": int, "example": str}}


class Parts:
    """The parts of a split. Args: folder: the split's. settings: dict of plain types. overwrite: leave parts of other runs unused.

    Raises: UserError that names the difference if there are parts that were made with other settings.
    """

    def __init__(self, folder, settings, overwrite=False):
        self.folder, self.settings = folder / ".parts", settings | {"overwrite": overwrite}
        found = None
        with contextlib.suppress(UserError, FileNotFoundError):  # unreadable: nothing tells what the parts are
            found = load_json(self.folder / "settings.json")
        if isinstance(found, dict) and any(self.folder.glob("*.pt")):
            changed = differences(found, settings)
            if not changed and (found.get("overwrite") or not overwrite):  # one --overwrite goes on with another
                self.settings = found
                return
            if not overwrite:
                raise UserError(f"{folder} was begun with other settings: {changed}; finish it with those, give another --name, or --overwrite it")
        self.remove()

    def missing(self, kind, rows, strict=False):
        """The numbers of the parts that are still to be made.

        Args: kind: "image" or "text". rows: of all parts together. strict: also those that leave an image out.
        """
        contents = {part: self.read(kind, part, rows) for part in range(-(-rows // PART))}
        return [part for part, content in contents.items() if content is None or (strict and content.get("left_out"))]

    def read(self, kind, part, rows):
        """One part, or None if it is not there or not to be trusted."""
        try:
            content = load_tensors(self._path(kind, part))
        except (UserError, FileNotFoundError):
            return None
        fits = isinstance(content, dict) and all(isinstance(content.get(key), of) for key, of in FIELDS[kind].items())
        return content if fits and len(content["rows"]) + len(content.get("left_out", ())) == len(part_rows(part, rows)) else None

    def write(self, kind, part, content):
        """Keep one part."""
        if not (self.folder / "settings.json").exists():
            save_json(self.settings, self.folder / "settings.json", indent=1)
        save_tensors(content, self._path(kind, part))

    def join(self, kind, rows):
        """All parts of a kind. Returns: ((N, D) tensor, list of the parts' contents without their rows)."""
        contents = [self.read(kind, part, rows) for part in range(-(-rows // PART))]
        return torch.cat([content.pop("rows") for content in contents]), contents

    def remove(self):
        """Remove them all; the settings first, without which no part is believed."""
        (self.folder / "settings.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, kind, part):
        return self.folder / f"{kind}-{part:05d}.pt"


def part_rows(part, rows):
    """The rows of a part, a range. Args: rows: of all parts together."""
    return range(part * PART, min((part + 1) * PART, rows))
