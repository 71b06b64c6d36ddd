"""The units of an unfinished split, and whether a split is finished.

Units are kept in embeddings/<name>/<split>/.parts/ until all are finished:

    settings.json       what they are made with and from; written first
    image-00000.pt ...  {"rows": (n, D), "left_out": {image row: reason}}
    text-00000.pt ...   {"rows": (n, D), "cut": int, "unknown": int, "example": str}

The texts are the distinct captions. For tars, a unit is one tar; its files are a shard of the
finished split, with notes-00000.json beside them (tars.py). No unit depends on another, on
--batch-size, on --workers or on the number of ranks.
"""

import contextlib
import logging
import shutil

from datasets.embedding import ROOT, EmbeddingCache, is_cache, units_folder
from utils.cli import UserError, need
from utils.distributed import is_first, world_size
from utils.embed import Broken
from utils.files import differences, load_json, locked, save_json
from utils.preprocess import ClipId


class UnitStore:
    """The units of the split that is to be in a folder, while it is unfinished.

    Args:
        settings: dict of plain types, what the units are made with and from.
        dtype: torch dtype of the stored embeddings.
        max_broken: samples that may be broken and left out.
        overwrite: leave the units of other settings unused.
    Raises: UserError that names the difference to the settings of the units that are there.
    """

    def __init__(self, folder, settings, dtype, max_broken=0, overwrite=False):
        self.folder = units_folder(folder)
        self.settings = {**settings, "overwrite": overwrite}
        self.dtype = dtype
        self.max_broken = max_broken
        begun = self._begun_settings()
        if begun is not None:
            changed = differences(begun, settings)
            # --overwrite goes on with units that an earlier --overwrite has begun, and no others.
            may_go_on = begun.get("overwrite") or not overwrite
            if not changed and may_go_on:
                self.settings = begun
                return
            cure = "finish it with those, give another --name, or --overwrite it"
            need(overwrite, f"{folder} was begun with other settings: {changed}; {cure}")
        cure = "all must work in one shared folder, with the same versions"
        need(is_first(), f"{folder}: this rank does not find what the first one began; {cure}")
        self.remove()
        if world_size() > 1:  # two ranks must not write it at once
            self.begin()

    def _begun_settings(self):
        """The settings of the units in the folder; None if there are none to go on with.

        The first rank does not go on with settings alone, the others wait for just these.
        """
        try:
            begun = load_json(self.folder / "settings.json")
        except (UserError, FileNotFoundError):
            return None
        has_units = any(self.folder.glob("*.pt")) or any(self.folder.glob("notes-*.json"))
        if not isinstance(begun, dict) or (is_first() and not has_units):
            return None
        return begun

    def begin(self):
        """The folder for the files of a unit, in which the settings are written first."""
        if not (self.folder / "settings.json").exists():
            save_json(self.settings, self.folder / "settings.json", indent=1)
        return self.folder

    def load(self, units):
        """What all of these units hold, in their order: a list of what `load` of each gives."""
        contents = [unit.load(self.folder) for unit in units]
        need(
            None not in contents,
            f"{self.folder}: a unit is missing or damaged; run the same command again",
        )
        return contents

    def check_broken(self, messages):
        """Raise a UserError, after naming them, if more samples are broken than may be left out."""
        broken = Broken(self.max_broken)
        broken.add(list(messages))
        broken.check()

    def remove(self):
        """Remove all units; the settings first."""
        (self.folder / "settings.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def is_finished(name, split, settings, state, max_broken):
    """Whether a split is cached already, by these settings.

    Args:
        settings: dict of plain types, what units are made with and from.
        state: `Split.state()`, which units do not record, but the cache.
        max_broken: samples that may have been left out.
    Raises: UserError that names the difference if it was cached by other settings.
    """
    folder = ROOT / name / split
    cure = "give another --name, or --overwrite it"
    if not (folder / "meta.json").exists():
        is_unknown = is_cache(folder) and not units_folder(folder).exists()
        need(
            not is_unknown,
            f"{folder}: holds a cache without a meta.json, so nothing tells what it is; {cure}",
        )
        return False
    meta = EmbeddingCache(name, split, mapped=True).meta
    changed = differences(meta | ClipId.of_meta(meta).readable(), settings | state)
    skipped = len(meta.get("skipped") or ())
    if not changed and skipped > max_broken:
        changed = f"{skipped} broken images were left out"
        changed += f"; --max-broken {skipped} or --skip-broken leaves it so"
    need(not changed, f"{folder}: was made with other settings: {changed}; {cure}")
    if units_folder(folder).exists() and is_first():  # of a run that was killed at its very end
        with contextlib.suppress(UserError), locked(lock_file(folder), folder):
            UnitStore(folder, settings, None).remove()
    logging.info("%s: whole already; --overwrite makes it anew", folder)
    return True


def lock_file(folder):
    """The lock of a split: one run at a time makes it."""
    return folder.with_name(f".{folder.name}.lock")


def check_other_splits(name, splits, clip_id):
    """Raise a UserError if another split of the cache was made with another CLIP."""
    cure = "give another --name, or all of its splits and --overwrite"
    for file in sorted((ROOT / name).glob("*/meta.json")):
        meta = load_json(file)
        is_object = isinstance(meta, dict)
        changed = (
            ClipId.of_meta(meta).difference(clip_id)
            if is_object
            else "its meta.json is not an object"
        )
        is_right = not changed or file.parent.name in splits
        need(is_right, f"{file.parent}: was made with another CLIP: {changed}; {cure}")
