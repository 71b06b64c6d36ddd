"""WebDataset tar files: their images and captions, and the cache that they become.

A sample is <key>.jpg (or .jpeg, .png, .webp) and <key>.txt, or a <key>.json with a "caption", side
by side in the tar, as img2dataset writes them. Each line of the .txt, or each entry of a list in
the .json, is a caption. A key has no dot, as everywhere in WebDataset. Nothing is unpickled.
"""

import glob
import io
import itertools
import json
import logging
import re
from functools import partial
from pathlib import Path

import torch

from datasets.checks import check_widths, has_fields, listing
from datasets.images import collate, decode
from datasets.rows import shard_file
from datasets.source import TEXT_NOTES, Split
from datasets.write import move_shards
from utils.cli import UserError, need
from utils.embed import Samples, say_notes, versions
from utils.files import clean_text, digest, load_json, save_json, save_tensors, sha256

IMAGES = ("jpg", "jpeg", "png", "webp")
NO_IMAGE = "no image beside it in the tar, where links are not followed"
NO_CAPTION = "no caption in UTF-8 beside it in the tar"
MISSING = (NO_IMAGE, NO_CAPTION)
# A complete tar ends in 1 KB of zeros or more. With more than 1 MB of them it is a download that
# reserved its space and was not finished.
END = 1024
MOST = 2**20
# How gzip, bzip2, xz and zstd files begin; these formats know their own end.
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
KINDS = ("image", "text", "images", "captions")  # the files that a tar becomes: a shard
NOTES = {
    "tar": list,
    "rows": int,
    "width": list,
    "sums": list,
    "left_out": list,
    **TEXT_NOTES,
}


class TarSplit(Split):
    """The tars of a split; each is a unit, and a shard of the cache.

    Args:
        root: a folder with .tar files, or their paths or URLs, with braces or, of paths, * and ?:
            "path/{00000..00099}.tar", "pipe:aws s3 cp s3://bucket/{00000..00099}.tar -".
        split, layout: of no use here.
    Raises: UserError if a file is missing or cut off, or the package webdataset is not there.
    """

    def __init__(self, root, split=None, layout=None):
        self.root, folder = str(root), Path(root)
        if folder.is_dir():
            self.urls = sorted(str(path) for path in folder.glob("[!.]*.tar"))
        elif _is_file(self.root) and ("*" in self.root or "?" in self.root):
            self.urls = sorted(glob.glob(self.root))
        else:
            self.urls = _expand(self.root)
        if not self.urls:
            found = listing(folder if folder.is_dir() else folder.parent)
            raise UserError(f"--data-root {root}: expected .tar files, found {found}")
        for url in filter(_is_file, self.urls):
            _check_end(Path(url))

    def fingerprint(self):
        """The names of the tars."""
        names = [Path(url).name if _is_file(url) else url for url in self.urls]
        return {"tars": f"{len(names)} tars, {digest(names)}"}

    def state(self):
        """What the files are now, since tars of the same names may be others."""
        tars = [_identity(url) for url in self.urls]
        return {"tar_files": f"{sum(size for _, size, _ in tars)} bytes, {digest(tars)}"}

    def units(self):
        """One unit per tar."""
        return [TarUnit(number, url) for number, url in enumerate(self.urls)]

    def assemble(self, store, folder, meta):
        """Move the files of all tars to the split; a run that is stopped here can go on."""
        notes = store.load(self.units())
        skipped = []  # [tar and key, reason]
        for note in notes:
            for key, reason in note["left_out"]:
                skipped.append([f"{note['tar'][0]}: {key}", reason])
        store.check_broken(": ".join(sample) for sample in skipped)
        say_notes(notes, meta["context_length"])
        image_of_caption = _image_of_caption(notes)
        count = sum(note["rows"] for note in notes)
        need(
            count,
            f"--data-root {self.root}: holds no sample; a sample is an image and "
            "a .txt or .json of one name",
        )
        check_widths(meta, *notes[0]["width"])
        meta["embed_dim"] = notes[0]["width"][0]
        meta["image_count"] = count
        meta["caption_count"] = len(image_of_caption)
        meta.update(self.state())
        meta["skipped"] = skipped
        meta["versions"] = versions()
        index = {"image": [], "text": []}
        for note in notes:
            sums = dict(zip(KINDS, note["sums"], strict=True))
            index["image"].append([note["rows"], sums["image"]])
            index["text"].append([note.get("captions", note["rows"]), sums["text"]])
        move_shards(store.folder, folder, index, image_of_caption, meta)
        self._tell_repeated_keys(folder, len(notes))
        return meta

    def _tell_repeated_keys(self, folder, tars):
        """Note it if a key is in more than one tar: a filter by keys would not tell them apart."""
        seen = set()
        repeated = []
        for number in range(tars):
            keys = load_json(shard_file(folder, "images", number))
            repeated += [key for key in keys if key in seen]
            seen.update(keys)
        if repeated:
            message = "note: %d keys are in more than one tar, such as %s; tell their rows apart "
            logging.warning(message + "by the row, not by the key", len(repeated), repeated[0])


def _image_of_caption(notes):
    """The image row of every caption of a split, (M,) int64.

    Args:
        notes: of all tars. Older ones have one caption per image.
    """
    parts = []
    first_image = 0
    for note in notes:
        rows = note.get("image_of_caption", range(note["rows"]))
        parts.append(torch.tensor(list(rows), dtype=torch.int64) + first_image)
        first_image += note["rows"]
    return torch.cat(parts)


class TarUnit:
    """One tar: a `Unit` of utils/embed.py.

    It is kept as a shard of the finished split, and notes-00000.json.
    """

    texts = ()  # they come with the images
    pictures = None  # only reading tells how many there are

    def __init__(self, number, url):
        self.number = number
        self.url = url

    def streams(self, size):
        """The tar itself: it is read by one process."""
        return [partial(tar_stream, self.url, size)]

    def name(self, key):
        """A sample in a message."""
        return key

    def describe(self, key, reason):
        """A broken sample in a message."""
        return f"{self.url}: {key}: {reason}"

    def load(self, folder):
        """What was noted of it, a dict as NOTES has it, or None."""
        try:
            notes = load_json(folder / f"notes-{self.number:05d}.json")
        except (UserError, FileNotFoundError):
            return None
        fits = has_fields(notes, NOTES) and all(
            isinstance(pair, list) and len(pair) == 2 for pair in notes["left_out"]
        )
        return notes if fits else None

    def left_out(self, folder):
        """The broken samples that it was kept without; None if it is missing or of another tar."""
        notes = self.load(folder)
        if notes is None or notes["tar"] != _identity(self.url):
            return None
        if notes["left_out"] and not _is_file(self.url):
            return None  # a URL has no size or date, so its broken samples may be mended
        for kind, file_sum in zip(KINDS, notes["sums"], strict=False):
            file = shard_file(folder, kind, self.number)
            if not file.exists():
                file = folder.parent / file.name  # `assemble` may have moved it already
            if not file.exists() or sha256(file) != file_sum:
                return None
        return dict(notes["left_out"]) if len(notes["sums"]) == len(KINDS) else None

    def save(self, folder, embedded):
        """Keep what it became, an Embedded, in the folder of units; the notes come last."""
        files = [shard_file(folder, kind, self.number) for kind in KINDS]
        contents = (embedded.image, embedded.text, embedded.keys, embedded.captions)
        for file, content in zip(files, contents, strict=True):
            if isinstance(content, torch.Tensor):
                save_tensors(content, file)
            else:
                save_json(content, file)
        notes = {
            "tar": _identity(self.url),
            "rows": len(embedded.image),
            "captions": len(embedded.text),
            "image_of_caption": embedded.image_of_caption,
            "width": [embedded.image.shape[1], embedded.text.shape[1]],
            "left_out": [list(sample) for sample in embedded.left_out.items()],
            **embedded.notes,
            "sums": [sha256(file) for file in files],
        }
        save_json(notes, folder / f"notes-{self.number:05d}.json")


def tar_stream(url, size, transform):
    """Yield the samples of a tar as `Samples` of `size`.

    If the tar cannot be read to its end, the last has no keys, but the reason.
    """
    error = []
    samples = _decoded(url, transform, error)
    while group := list(itertools.islice(samples, size)):
        keys, captions, decoded = zip(*group, strict=True)
        yield Samples(list(keys), list(captions), *collate(decoded))
    if error:
        yield Samples([], [], None, error)


def _decoded(url, transform, error):
    """Yield (key, captions, what `decode` gives of the image) for every sample of a tar.

    Incomplete samples come last: only then it is known whether their other half lay elsewhere. If
    the tar cannot be read, the reason is appended to the list error.
    """
    seen = set()
    incomplete = {}  # key -> what is missing
    try:
        for key, members in _read(url):
            dotted = _dotted_images(members)
            for suffix in dotted:
                yield f"{key}.{suffix}", [], (None, "it has a dot in its key; name it without")
            if dotted:
                continue
            problem = _problem(key, members)
            if key in seen:
                need_sorted(key, problem, incomplete)
                problem = "its key comes twice in the tar; give every sample its own"
                yield f"{key} (again)", [], (None, problem)
                continue
            seen.add(key)
            if problem in MISSING:
                incomplete[key] = problem
            elif problem:
                yield key, [], (None, problem)
            else:
                content = next(content for suffix, content in members if suffix in IMAGES)
                image, reason = decode(io.BytesIO(content), transform)
                yield key, captions_of(members), (image, reason and reason[:200])
        for key, problem in incomplete.items():
            yield key, [], (None, problem)
    except Exception as broken:  # noqa: BLE001  a broken tar, a lost connection, ...
        reason = " ".join(str((broken.args or (broken,))[0]).split())
        reason = re.sub(r" @ <.*", "", reason)[:200] or type(broken).__name__
        error.append(f"{url}: cannot be used to its end: {reason}; mend it, or fetch it again")


def need_sorted(key, problem, incomplete):
    """Raise a ValueError if image and text of a key lie apart, because the tar is not sorted."""
    if {problem, incomplete.get(key)} == set(MISSING):
        raise ValueError(
            f"image and text of {key} lie apart: it is not sorted by name; make it with "
            "tar --sort=name"
        )


def _dotted_images(members):
    """The suffixes of images whose key has a dot, such as "000.png"; empty if one has none."""
    suffixes = [suffix for suffix, _ in members]
    if any(suffix in IMAGES for suffix in suffixes):
        return []
    return [suffix for suffix in suffixes if suffix.rpartition(".")[2] in IMAGES]


def _problem(key, members):
    """What is wrong with a sample, before its image is decoded; "" if nothing is.

    Args:
        members: its files, a list of (suffix, bytes).
    """
    suffixes = [suffix for suffix, _ in members]
    for suffix in suffixes:
        if suffixes.count(suffix) > 1:
            return f"{key}.{suffix} is twice in the tar; keep one"
    images = [suffix for suffix in suffixes if suffix in IMAGES]
    if len(images) > 1:
        return f"it has several images ({', '.join(images)}); keep one"
    if not images:
        return NO_IMAGE
    return "" if captions_of(members) else NO_CAPTION


def captions_of(members):
    """The captions of a sample: the lines of its .txt, else the "caption" of its .json.

    Args:
        members: its files, a list of (suffix, bytes).
    Returns: list of texts that are not blank; empty if there are none, or they are not UTF-8.
    """
    contents = dict(members)
    try:
        captions = re.split(r"\r\n|\r|\n", contents.get("txt", b"").decode("utf-8-sig"))
        if not any(caption.strip() for caption in captions):
            captions = json.loads(contents.get("json", b"null"))["caption"]
        if isinstance(captions, str):
            captions = [captions]
        return [clean_text(caption.strip()) for caption in captions if caption.strip()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


class _Watched:
    """A stream that remembers how it began and in how many zeros it ended."""

    def __init__(self, stream):
        self.stream = stream
        self.beginning = b""
        self.zeros = 0

    def read(self, size=-1):
        content = self.stream.read(size)
        self.beginning = self.beginning or content[:8]
        left = content.rstrip(b"\0")
        self.zeros = len(content) - len(left) + (0 if left else self.zeros)
        return content


def _read(url):
    """Yield (key, files) of the samples of a tar, files as a list of (suffix, bytes).

    Raises: whatever happens on the way.
    """
    webdataset = _webdataset()
    with webdataset.gopen(url) as stream:
        watched = _Watched(stream)
        tars = iter([{"url": url, "stream": watched}])
        files = webdataset.tariterators.tar_file_expander(tars, select_files=_is_visible)
        for key, group in itertools.groupby(filter(None, files), lambda file: _split_name(file)[0]):
            if key is not None:
                yield (
                    clean_text(key),
                    [(_split_name(file)[1].lower(), file["data"]) for file in group],
                )
        while watched.read(2**16):
            pass
        if hasattr(stream, "wait_for_child"):
            stream.wait_for_child()
    if not watched.beginning.startswith(PACKED) and not END <= watched.zeros <= MOST:
        raise ValueError("it is cut off: it does not end as a tar")


def _is_visible(name):
    """Whether a file is none of those that macOS adds, ._0.jpg or .DS_Store."""
    return not name.rpartition("/")[2].startswith(".")


def _split_name(file):
    """The name of a file up to the first dot, with its folder, and the rest; None without a dot."""
    return _webdataset().tariterators.base_plus_ext(file["fname"])


def _webdataset():
    """The package of that name, which only this data set needs."""
    try:
        import webdataset
    except ImportError:
        raise UserError(
            "--dataset webdataset: needs the package of that name: pip install webdataset"
        ) from None
    return webdataset


def _expand(pattern):
    """The paths or URLs of a pattern with braces."""
    webdataset = _webdataset()
    try:
        return webdataset.shardlists.expand_urls(pattern)
    except Exception as error:  # noqa: BLE001  its libraries raise many things
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"--data-root {pattern}: not a pattern of paths ({reason}); mend its braces"
        ) from None


def _is_file(url):
    return "://" not in url and not url.startswith("pipe:")


def _identity(url):
    """What distinguishes a tar from one that was mended since: [name, bytes, time of last change].

    For a URL it is [URL, 0, 0].
    """
    path = Path(url)
    return (
        [path.name, path.stat().st_size, path.stat().st_mtime_ns] if _is_file(url) else [url, 0, 0]
    )


def _check_end(path):
    """Raise a UserError if a tar is not there, or was cut off: now, and not after hours."""
    need(path.is_file(), f"--data-root: {path}: no such file")
    with open(path, "rb") as file:
        packed = file.read(8).startswith(PACKED)
        size = file.seek(0, io.SEEK_END)
        file.seek(-min(END, size), io.SEEK_END)
        is_whole = packed or (size >= END and not any(file.read()))
    need(is_whole, f"{path}: is cut off, or no tar: it does not end as one; fetch it again")
