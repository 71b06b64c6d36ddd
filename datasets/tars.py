"""WebDataset tar files in; pictures and captions, a tar after the other, out.

A sample is <key>.jpg (or .jpeg, .png, .webp) and <key>.txt, or a <key>.json with a "caption", side by side in the tar, as img2dataset writes
them: one caption an image. A key has no dot, as everywhere in WebDataset. Nothing is unpickled.
"""

import glob
import io
import itertools
import json
import re
from pathlib import Path

from torch.utils.data import IterableDataset, get_worker_info

from datasets.coco import collate, read_rgb
from utils.cli import UserError
from utils.files import digest, listing

PICTURES = ("jpg", "jpeg", "png", "webp")
END = 1024  # bytes: a whole tar ends in so many zeros at least
MOST = (
    2**20
)  # bytes: in so many at most; one that does not is a download that made room for itself and was not finished
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd, which know their own ends


class TarShards:
    """The tars of a split.

    Args: root: a folder with .tar files, or their paths or URLs, with braces or, of paths, * and ?: "path/{00000..00099}.tar",
    "pipe:aws s3 cp s3://bucket/{00000..00099}.tar -". split: what they are to be called; layout: of no use here.
    Attributes: urls: T strings.
    Raises: UserError if a file is missing or cut off, or the package webdataset is.
    """

    def __init__(self, root, split, layout):
        folder = Path(root)
        if folder.is_dir():
            self.urls = sorted(str(path) for path in folder.glob("*.tar"))
        elif _is_file(str(root)) and any(character in str(root) for character in "*?"):
            self.urls = sorted(glob.glob(str(root)))
        else:
            self.urls = _expand(root)
        if not self.urls:
            raise UserError(
                f"--data-root {root}: expected .tar files, found {listing(folder if folder.is_dir() else folder.parent)}"
            )
        for url in self.urls:
            if _is_file(url):
                _check_end(Path(url))

    def settings(self):
        """What the tars are called, for meta.json."""
        return {"tars": f"{len(self.urls)} tars, {digest([_name(url) for url in self.urls])}"}

    def state(self):
        """What they are now, for meta.json: other tars of the same names are others."""
        files = [self.identity(number) for number in range(len(self.urls))]
        return {"tar_files": f"{sum(size for _, size, _ in files)} bytes, {digest(files)}"}

    def identity(self, number):
        """What tells a tar from one that was mended since. Returns: [name, bytes, time of the last change]; of a URL [URL, 0, 0]."""
        url = self.urls[number]
        return [_name(url), Path(url).stat().st_size, Path(url).stat().st_mtime_ns] if _is_file(url) else [url, 0, 0]

    def may_have_changed(self, number):
        """Whether a tar can be another one without its identity telling."""
        return not _is_file(self.urls[number])


class TarSamples(IterableDataset):
    """The samples of some tars, decoded and transformed, for a DataLoader whose workers take a tar each.

    Args: tars: {number: URL}. transform: PIL image -> (3, H, W) tensor. size: samples that are handed over at a time, B.
    Yields: (number, keys, captions, pictures, errors): B keys and captions, pictures (B, 3, H, W) or None, and B reasons or None, as of
    `collate`. After the last of a tar, (number, [], [], None, []); if a tar cannot be read to its end, (number, [], [], None, [reason]).
    """

    def __init__(self, tars, transform, size):
        self.tars, self.transform, self.size = list(tars.items()), transform, size

    def __iter__(self):
        worker = get_worker_info()
        for number, url in self.tars if worker is None else self.tars[worker.id :: worker.num_workers]:
            error = []
            samples = self._samples(url, error)
            while batch := list(itertools.islice(samples, self.size)):
                keys, captions, decoded = zip(*batch, strict=True)
                yield number, list(keys), list(captions), *collate(decoded)
            yield number, [], [], None, error

    def _samples(self, url, error):
        """Yield (key, caption, (picture, None) or (None, reason)); what keeps a tar from being read goes into error."""
        try:
            for sample in _read(url):
                picture = next((sample[suffix] for suffix in PICTURES if suffix in sample), None)
                caption = _caption(sample)
                dotted = next(
                    (suffix for suffix in sample if suffix.rpartition(".")[2] in PICTURES and "." in suffix), None
                )
                if picture is None and dotted:
                    raise ValueError(f"{sample['__key__']}.{dotted} has a dot in its key; name it without")
                if picture is None or caption is None:
                    yield (
                        sample["__key__"],
                        "",
                        (None, f"no {'picture' if picture is None else 'caption in UTF-8'} beside it in the tar"),
                    )
                    continue
                try:
                    decoded = self.transform(read_rgb(io.BytesIO(picture))), None
                except Exception as broken:  # noqa: BLE001  Pillow raises nearly anything on a broken file
                    decoded = (
                        None,
                        re.sub(r"<_io.BytesIO.*?>", "the picture", str(broken))[:200] or type(broken).__name__,
                    )
                yield sample["__key__"], caption, decoded
        except Exception as broken:  # noqa: BLE001  as a broken tar, a lost connection and a missing command do
            reason = (
                re.sub(r" @ <.*", "", " ".join(str((broken.args or (broken,))[0]).split()))[:200]
                or type(broken).__name__
            )
            error.append(f"{url}: cannot be used to its end: {reason}; mend it, or fetch it again")


class _Watched:
    """A stream that remembers how it began and in how many zeros it ended."""

    def __init__(self, stream):
        self.stream, self.beginning, self.zeros = stream, b"", 0

    def read(self, size=-1):
        content = self.stream.read(size)
        self.beginning = self.beginning or content[:8]
        left = content.rstrip(b"\0")
        self.zeros = len(content) - len(left) + (0 if left else self.zeros)
        return content


def _read(url):
    """Yield the samples of a tar, dicts of bytes. Raises: whatever happens, also where it ends too soon or its command failed."""
    library = _library()
    with library.gopen(url) as stream:
        watched = _Watched(stream)
        files = library.tariterators.tar_file_expander(iter([{"url": url, "stream": watched}]))
        yield from library.tariterators.group_by_keys(files)
        while watched.read(2**16):
            pass
        if hasattr(stream, "wait_for_child"):
            stream.wait_for_child()
    if not watched.beginning.startswith(PACKED) and not END <= watched.zeros <= MOST:
        raise ValueError("it is cut off: it does not end as a tar")


def _library():
    """The package webdataset. Raises: UserError if it is not there."""
    try:
        import webdataset
    except ImportError:
        raise UserError("--dataset webdataset: needs the package of that name: pip install webdataset") from None
    return webdataset


def _expand(pattern):
    """The paths or URLs of a pattern with braces."""
    library = _library()
    try:
        return library.shardlists.expand_urls(str(pattern))
    except Exception as error:  # noqa: BLE001  its libraries raise many things
        raise UserError(
            f"--data-root {pattern}: not a pattern of paths ({' '.join(str(error).split())[:100]}); mend its braces"
        ) from None


def _is_file(url):
    return "://" not in url and not url.startswith("pipe:")


def _name(url):
    """The name of a file; a URL as it is."""
    return Path(url).name if _is_file(url) else url


def _check_end(path):
    """Raise a UserError if a tar is not there, or was cut off: now, and not after hours."""
    if not path.is_file():
        raise UserError(f"--data-root: {path}: no such file")
    with open(path, "rb") as file:
        packed = file.read(8).startswith(PACKED)
        size = file.seek(0, io.SEEK_END)
        file.seek(-min(END, size), io.SEEK_END)
        if not packed and (size < END or any(file.read())):
            raise UserError(f"{path}: is cut off, or no tar: it does not end as one; fetch it again")


def _caption(sample):
    """The caption of a sample, or None."""
    try:
        if "txt" in sample:
            return sample["txt"].decode("utf-8-sig").strip() or None
        caption = json.loads(sample.get("json", b"null"))["caption"]
        return caption.strip() or None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
