"""WebDataset tar files: their images and captions, and the cache that they become.

A sample is an image <key>.jpg (or .jpeg, .png, .webp) and a <key>.txt, or a <key>.json with a
"caption". They stand side by side in the tar, as img2dataset writes them. Each line of the .txt, or
each entry of a list in the .json, is a caption. A key has no dot, as everywhere in WebDataset.
Nothing is unpickled.
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
from utils.cli import UserError, need, reason_of
from utils.embed import Samples, say_notes, versions
from utils.files import clean_text, digest, load_json, save_json, save_tensors, sha256

IMAGES = ("jpg", "jpeg", "png", "webp")
NO_IMAGE = "no image beside it in the tar, where links are not followed"
NO_CAPTION = "no caption in UTF-8 beside it in the tar"
MISSING = (NO_IMAGE, NO_CAPTION)
MIN_ZEROS = 1024  # at the end of a complete tar
MAX_ZEROS = 2**20  # with more, it is an unfinished download that has reserved its space
# How gzip, bzip2, xz and zstd files begin. These formats know their own end.
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
KINDS = ("image", "text", "images", "captions")  # the files of a shard, which a tar becomes
NOTES = {  # the fields that every notes-00000.json has, and their types; older ones have no others
    "tar": list,
    "rows": int,
    "width": list,
    "sums": list,
    "left_out": list,
    **TEXT_NOTES,
}


class TarSplit(Split):
    """The tars of a split. Each is a unit, and becomes a shard of the cache.

    Args:
        root: a folder with .tar files, or a pattern of their paths or URLs:
            "path/{00000..00099}.tar", "pipe:aws s3 cp s3://bucket/{00000..00099}.tar -". A pattern
            of paths may have * and ? instead of braces.
        split, layout: not used here.
    Raises: UserError if a file is missing or cut off, or the package webdataset is not installed.
    """

    def __init__(self, root, split=None, layout=None):
        self.root = str(root)
        folder = Path(root)
        has_wildcard = "*" in self.root or "?" in self.root  # in a URL, ? begins the query
        if folder.is_dir():
            self.urls = sorted(str(path) for path in folder.glob("[!.]*.tar"))
        elif has_wildcard and _is_path(self.root):
            self.urls = sorted(glob.glob(self.root))
        else:
            self.urls = _expand(self.root)
        if not self.urls:
            found = listing(folder if folder.is_dir() else folder.parent)
            raise UserError(f"--data-root {root}: expected .tar files, found {found}")
        for url in self.urls:
            if _is_path(url):
                _check_end(Path(url))

    def fingerprint(self):
        """The names of the tars."""
        names = [Path(url).name if _is_path(url) else url for url in self.urls]
        return {"tars": f"{len(names)} tars, {digest(names)}"}

    def state(self):
        """The sizes and dates of the tars, since tars of the same names may have other contents."""
        tars = [_identity(url) for url in self.urls]
        total_bytes = sum(size for _, size, _ in tars)
        return {"tar_files": f"{total_bytes} bytes, {digest(tars)}"}

    def units(self):
        """One unit per tar."""
        return [TarUnit(number, url) for number, url in enumerate(self.urls)]

    def assemble(self, store, folder, meta):
        """Move the files of all tars to the split. A run that is stopped here can go on."""
        notes = store.load(self.units())
        skipped = []  # [tar and key, reason]
        for note in notes:
            tar_name = note["tar"][0]
            for key, reason in note["left_out"]:
                skipped.append([f"{tar_name}: {key}", reason])
        store.check_broken(": ".join(sample) for sample in skipped)
        say_notes(notes, meta["context_length"])
        image_of_caption = _image_of_caption(notes)
        image_count = sum(note["rows"] for note in notes)
        problem = "holds no sample; a sample is an image and a .txt or .json of one name"
        need(image_count, f"--data-root {self.root}: {problem}")
        image_width, text_width = notes[0]["width"]
        check_widths(meta, image_width, text_width)
        meta["embed_dim"] = image_width
        meta["image_count"] = image_count
        meta["caption_count"] = len(image_of_caption)
        meta.update(self.state())
        meta["skipped"] = skipped
        meta["versions"] = versions()
        index = {"image": [], "text": []}  # [rows, SHA-256] of each shard
        for note in notes:
            image_sum, text_sum, _, _ = note["sums"]
            captions = note.get("captions", note["rows"])
            index["image"].append([note["rows"], image_sum])
            index["text"].append([captions, text_sum])
        move_shards(store.folder, folder, index, image_of_caption, meta)
        self._warn_of_repeated_keys(folder)
        return meta

    def _warn_of_repeated_keys(self, folder):
        """Log it if a key is in more than one tar, since a filter by keys would confuse them."""
        seen = set()
        repeated = []
        for number in range(len(self.urls)):
            keys = load_json(shard_file(folder, "images", number))
            repeated += [key for key in keys if key in seen]
            seen.update(keys)
        if repeated:
            message = "note: %d keys, such as %s, are in more than one tar; identify these samples "
            logging.warning(message + "by row number, not by key", len(repeated), repeated[0])


def _image_of_caption(notes):
    """The image row of every caption of a split, (M,) int64.

    Args: notes: of all tars.
    """
    parts = []
    first_image = 0  # of the tar
    for note in notes:
        one_per_image = range(note["rows"])  # in notes that older versions wrote
        rows_in_tar = list(note.get("image_of_caption", one_per_image))
        parts.append(torch.tensor(rows_in_tar, dtype=torch.int64) + first_image)
        first_image += note["rows"]
    return torch.cat(parts)


class TarUnit:
    """One tar: a `Unit` of utils/embed.py.

    Its files are a shard of the finished split, and notes-00000.json.
    """

    texts = ()  # they come with the images
    image_count = None  # their number is not known before the tar is read

    def __init__(self, number, url):
        self.number = number
        self.url = url

    def streams(self, size):
        """One stream, since a tar is read from beginning to end by one process."""
        return [partial(tar_stream, self.url, size)]

    def name(self, key):
        """The name of a sample in messages."""
        return f"{self.url}: {key}"

    def load(self, folder):
        """Read its notes, a dict with the fields of NOTES; None if they are missing or damaged."""
        try:
            notes = load_json(folder / f"notes-{self.number:05d}.json")
        except (UserError, FileNotFoundError):
            return None
        if not has_fields(notes, NOTES):
            return None
        for pair in notes["left_out"]:
            if not isinstance(pair, list) or len(pair) != 2:
                return None
        return notes

    def left_out(self, folder):
        """The broken samples that were left out, {key: reason}.

        Returns: None if the unit is missing or damaged, or the tar has changed since.
        """
        notes = self.load(folder)
        if notes is None or notes["tar"] != _identity(self.url):
            return None
        if notes["left_out"] and not _is_path(self.url):
            return None  # a URL has no size or date, so its broken samples may be fixed
        if len(notes["sums"]) != len(KINDS):
            return None
        for kind, file_sum in zip(KINDS, notes["sums"], strict=True):
            file = shard_file(folder, kind, self.number)
            if not file.exists():
                file = folder.parent / file.name  # `assemble` may have moved it already
            if not file.exists() or sha256(file) != file_sum:
                return None
        return dict(notes["left_out"])

    def save(self, folder, embedded):
        """Keep an `Embedded` in the folder of units. The notes come last and make it valid."""
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


# Samples.


def tar_stream(url, size, transform):
    """Yield the samples of a tar as `Samples`, at most `size` at once.

    If the tar cannot be read to its end, the last `Samples` have no keys, but the reason.
    """
    samples = _decoded(url, transform)
    is_finished = False
    while not is_finished:
        batch, error = _take(samples, size)
        if batch:
            keys, captions, decoded = zip(*batch, strict=True)
            images, reasons = collate(decoded)
            yield Samples(list(keys), list(captions), images, reasons)
        if error is not None:
            problem = f"cannot be read to its end: {_reason(error)}"
            message = f"{url}: {problem}; if it is not a whole download, fetch it again"
            yield Samples([], [], None, [message])
        is_finished = error is not None or len(batch) < size


def _take(samples, size):
    """The next samples, at most `size`, and the error that ended them early, or None."""
    batch = []
    try:
        for sample in itertools.islice(samples, size):
            batch.append(sample)
    except Exception as error:  # noqa: BLE001  a broken tar, a lost connection, ...
        return batch, error
    return batch, None


def _reason(error):
    """What an exception says, in one line of at most 200 characters."""
    first_argument = error.args[0] if error.args else error
    text = " ".join(str(first_argument).split())
    text = re.sub(r" @ <.*", "", text)  # webdataset adds where it happened
    return text[:200] or type(error).__name__


def _decoded(url, transform):
    """Yield (key, captions, (image, reason)) for every sample of a tar, as `decode` returns them.

    Incomplete samples come last, since only then is it known whether their other half lay elsewhere
    in the tar.

    Raises: whatever happens if the tar cannot be read, or is not sorted.
    """
    seen = set()
    incomplete = {}  # key -> what is missing
    for key, files in _read(url):
        dotted = _dotted_images(files)
        if dotted:
            for suffix in dotted:
                yield f"{key}.{suffix}", [], (None, "it has a dot in its key; name it without")
            continue
        problem = _problem(key, files)
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
            yield key, captions_of(files), _decode_image(files, transform)
    for key, problem in incomplete.items():
        yield key, [], (None, problem)


def _decode_image(files, transform):
    """The transformed image of a sample and None; or None and what is wrong with it."""
    content = next(content for suffix, content in files if suffix in IMAGES)
    image, reason = decode(io.BytesIO(content), transform)
    if reason is not None:
        reason = reason[:200]
    return image, reason


def need_sorted(key, problem, incomplete):
    """Raise a ValueError if image and text of a key lie apart, because the tar is not sorted.

    Args:
        problem: what is missing where the key comes again.
        incomplete: {key: what was missing before}.
    """
    if {problem, incomplete.get(key)} == {NO_IMAGE, NO_CAPTION}:
        problem = f"image and text of {key} lie apart: it is not sorted by name"
        raise ValueError(f"{problem}; make it anew: tar --sort=name -cf NEW.tar -C FOLDER .")


def _dotted_images(files):
    """The suffixes of images whose key has a dot, such as "000.png" of the image "a.000.png".

    Args: files: a list of (suffix, bytes).
    Returns: list, empty if the sample has an image whose key has no dot.
    """
    suffixes = [suffix for suffix, _ in files]
    if any(suffix in IMAGES for suffix in suffixes):
        return []
    return [suffix for suffix in suffixes if suffix.rpartition(".")[2] in IMAGES]


def _problem(key, files):
    """What is wrong with a sample, before its image is decoded; "" if nothing is.

    Args: files: a list of (suffix, bytes).
    """
    suffixes = [suffix for suffix, _ in files]
    for suffix in suffixes:
        if suffixes.count(suffix) > 1:
            return f"{key}.{suffix} is twice in the tar; keep one"
    images = [suffix for suffix in suffixes if suffix in IMAGES]
    if len(images) > 1:
        return f"it has several images ({', '.join(images)}); keep one"
    if not images:
        return NO_IMAGE
    if not captions_of(files):
        return NO_CAPTION
    return ""


def captions_of(files):
    """The captions of a sample: the lines of its .txt, else the "caption" of its .json.

    Args: files: a list of (suffix, bytes).
    Returns: list of texts that are not blank; empty if there are none, or they are not UTF-8.
    """
    content_of = dict(files)
    try:
        text = content_of.get("txt", b"").decode("utf-8-sig")
        captions = re.split(r"\r\n|\r|\n", text)
        if not text.strip():
            captions = json.loads(content_of.get("json", b"null"))["caption"]
        if isinstance(captions, str):
            captions = [captions]
        return [clean_text(caption.strip()) for caption in captions if caption.strip()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


# Files of a tar.


class _Watched:
    """A stream that remembers its first bytes, and how many zeros it has ended in so far."""

    def __init__(self, stream):
        self.stream = stream
        self.beginning = b""
        self.zeros = 0

    def read(self, size=-1):
        content = self.stream.read(size)
        if not self.beginning:
            self.beginning = content[:8]
        zeros = len(content) - len(content.rstrip(b"\0"))
        if zeros == len(content):  # all of it
            self.zeros += zeros
        else:
            self.zeros = zeros
        return content


def _read(url):
    """Yield (key, files) of the samples of a tar; files is a list of (suffix, bytes).

    Files of one sample stand side by side. Those without a dot in their name are ignored.

    Raises: whatever happens if the tar cannot be read; ValueError if it is cut off.
    """
    webdataset = _webdataset()
    with webdataset.gopen(url) as stream:
        watched = _Watched(stream)
        tars = iter([{"url": url, "stream": watched}])
        members = webdataset.tariterators.tar_file_expander(tars, select_files=_is_visible)
        for key, members_of_key in itertools.groupby(filter(None, members), _key_of):
            if key is None:
                continue
            files = []
            for member in members_of_key:
                _, suffix = _split_name(member)
                files.append((suffix.lower(), member["data"]))
            yield clean_text(key), files
        while watched.read(2**16):  # to the end, where the zeros are
            pass
        if hasattr(stream, "wait_for_child"):
            stream.wait_for_child()  # of "pipe:", which raises an error if the command failed
    is_packed = watched.beginning.startswith(PACKED)
    if not is_packed and not MIN_ZEROS <= watched.zeros <= MAX_ZEROS:
        raise ValueError("it is cut off: it does not end as a tar")


def _is_visible(name):
    """Whether a file is not one that macOS adds, such as ._0.jpg or .DS_Store."""
    return not name.rpartition("/")[2].startswith(".")


def _key_of(member):
    key, _ = _split_name(member)
    return key


def _split_name(member):
    """The name of a file up to the first dot, with its folder, and the rest after the dot.

    Returns: (None, None) without a dot.
    """
    return _webdataset().tariterators.base_plus_ext(member["fname"])


def _webdataset():
    """Import the package webdataset, which only this data set needs."""
    try:
        import webdataset
    except ImportError:
        cure = "pip install webdataset"
        raise UserError(f"--dataset webdataset: needs the package of that name: {cure}") from None
    return webdataset


# Paths and URLs.


def _expand(pattern):
    """The paths or URLs of a pattern with braces."""
    webdataset = _webdataset()
    try:
        return webdataset.shardlists.expand_urls(pattern)
    except Exception as error:  # noqa: BLE001  its libraries raise many things
        problem = f"not a pattern of paths ({reason_of(error)})"
        raise UserError(f"--data-root {pattern}: {problem}; fix its braces") from None


def _is_path(url):
    """Whether it is the path of a file on this machine, rather than a URL or a command."""
    return "://" not in url and not url.startswith("pipe:")


def _identity(url):
    """What distinguishes a tar from one that was fixed since: [name, bytes, time of last change].

    For a URL it is [URL, 0, 0].
    """
    if not _is_path(url):
        return [url, 0, 0]
    path = Path(url)
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def _check_end(path):
    """Raise a UserError if a tar is missing or cut off, before hours of work on other tars."""
    need(path.is_file(), f"--data-root: {path}: no such file")
    with open(path, "rb") as file:
        is_packed = file.read(8).startswith(PACKED)
        size = file.seek(0, io.SEEK_END)
        file.seek(-min(MIN_ZEROS, size), io.SEEK_END)
        end = file.read()
    is_tar = len(end) == MIN_ZEROS and not any(end)
    problem = "is cut off, or no tar: it does not end as one"
    need(is_packed or is_tar, f"{path}: {problem}; fetch it again")
