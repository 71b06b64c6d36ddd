"""The units of an unfinished split, and whether a split is finished.

A unit is a part of a split that is embedded and saved as a whole. Finished units are kept in
embeddings/<name>/<split>/.parts/ until all are finished, so that a stopped run can go on:

    settings.json       what they are made with and from; written first
    image-00000.pt ...  {"rows": (n, D), "left_out": {image row: reason}}
    text-00000.pt ...   {"rows": (n, D), "cut": int, "unknown": int, "example": str}

The texts are the distinct captions. For tars, a unit is one tar. Its files are a shard of the
finished split, with notes-00000.json beside them (tars.py). A unit does not depend on other units,
on --batch-size, on --workers or on the number of ranks.
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
    """The finished units of an unfinished split.

    Units of an earlier run are reused if they have the same settings. With overwrite, the earlier
    run must have had it, too.

    Args:
        folder: where the split will be.
        settings: dict of plain types, what the units are made with and from.
        dtype: torch dtype of the stored embeddings.
        max_broken: samples that may be broken and left out.
        overwrite: remove other units instead of raising an error.
    Raises: UserError that names the difference if there are units with other settings, or if a rank
        does not find the first rank's.
    """

    def __init__(self, folder, settings, dtype, max_broken=0, overwrite=False):
        self.folder = units_folder(folder)
        self.settings = {**settings, "overwrite": overwrite}
        self.dtype = dtype
        self.max_broken = max_broken
        earlier_settings = self._load_settings()
        if earlier_settings is not None:
            changed = differences(earlier_settings, settings)
            # With --overwrite, the units of a run without --overwrite are not used.
            may_be_used = earlier_settings.get("overwrite") or not overwrite
            if not changed and may_be_used:
                self.settings = earlier_settings
                return
            cure = "finish it with those, give another --name, or --overwrite it"
            need(overwrite, f"{folder} was begun with other settings: {changed}; {cure}")
        # The first rank starts anew. The others come later and use the settings that it wrote.
        cure = "all must work in one shared folder, with the same versions"
        need(is_first(), f"{folder}: this rank does not find what the first one began; {cure}")
        self.remove()
        if world_size() > 1:
            self.prepared_folder()

    def _load_settings(self):
        """The settings of the units in the folder, or None if there are no units to go on with.

        A file of settings without units is enough for the ranks that follow the first one.
        """
        try:
            settings = load_json(self.folder / "settings.json")
        except (UserError, FileNotFoundError):
            return None
        if not isinstance(settings, dict):
            return None
        has_units = any(self.folder.glob("*.pt")) or any(self.folder.glob("notes-*.json"))
        if is_first() and not has_units:
            return None
        return settings

    def prepared_folder(self):
        """The folder for the units; its settings.json is written if it is not there yet."""
        if not (self.folder / "settings.json").exists():
            save_json(self.settings, self.folder / "settings.json", indent=1)
        return self.folder

    def load(self, units):
        """The content of each of these units, in their order, as its `load` returns it.

        Raises: UserError if one is missing or damaged.
        """
        contents = [unit.load(self.folder) for unit in units]
        problem = "a unit is missing or damaged"
        need(None not in contents, f"{self.folder}: {problem}; run the same command again")
        return contents

    def check_broken(self, messages):
        """Log all broken samples and raise a UserError if there are more than max_broken.

        Args: messages: one per broken sample.
        """
        broken = Broken(self.max_broken)
        broken.add(list(messages))
        broken.check()

    def remove(self):
        """Remove all units. Without its settings, a unit is not used: they are removed first."""
        (self.folder / "settings.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def is_finished(name, split, settings, state, max_broken):
    """Whether a split is cached already, with these settings.

    Args:
        settings: dict of plain types, what units are made with and from.
        state: what the files of the data set are now (`Split.state()`).
        max_broken: samples that may have been left out.
    Raises: UserError that says how the settings differ, if it was cached with others.
    """
    folder = ROOT / name / split
    cure = "give another --name, or --overwrite it"
    if not (folder / "meta.json").exists():
        if is_cache(folder) and not units_folder(folder).exists():
            problem = "holds a cache without a meta.json, so nothing tells what it is"
            raise UserError(f"{folder}: {problem}; {cure}")
        return False
    meta = EmbeddingCache(name, split, mapped=True).meta
    saved = {**meta, **ClipId.of_meta(meta).readable()}
    changed = differences(saved, {**settings, **state})
    skipped = len(meta.get("skipped") or ())
    if not changed and skipped > max_broken:
        changed = f"broken samples left out: {skipped}"
        changed += f"; to accept this, give --max-broken {skipped} or --skip-broken"
    need(not changed, f"{folder}: was made with other settings: {changed}; {cure}")
    # A run that was killed at its very end leaves units beside the finished split.
    if units_folder(folder).exists() and is_first():
        with contextlib.suppress(UserError), locked(lock_file(folder), folder):
            UnitStore(folder, settings, None).remove()
    logging.info("%s: cached already; --overwrite rebuilds it", folder)
    return True


def lock_file(folder):
    """The lock file of a split, which only one run at a time may make."""
    return folder.with_name(f".{folder.name}.lock")


def check_other_splits(name, splits, clip_id):
    """Raise a UserError if a split of the cache that is not in `splits` has another CLIP."""
    for file in sorted((ROOT / name).glob("*/meta.json")):
        if file.parent.name in splits:
            continue
        meta = load_json(file)
        if isinstance(meta, dict):
            changed = ClipId.of_meta(meta).difference(clip_id)
        else:
            changed = "its meta.json is not an object"
        cure = f"give another --name, or remove {file.parent} and cache that split again afterwards"
        need(not changed, f"{file.parent}: was made with another CLIP: {changed}; {cure}")
