"""WebDataset tar files in; pictures and captions, a tar after the other, out.

A sample is <key>.jpg (or .jpeg, .png, .webp) and <key>.txt, or a <key>.json with a "caption", as img2dataset writes them: one caption an image.
Nothing else in a tar is looked at, and nothing is unpickled.
"""

import io
import itertools
import json
from pathlib import Path

from torch.utils.data import IterableDataset, get_worker_info

from datasets.coco import collate, read_rgb
from utils.cli import UserError
from utils.files import digest, listing

PICTURES = ("jpg", "jpeg", "png", "webp")
END = 1024  # bytes: a whole tar ends in so many zeros


class TarShards:
    """The tars of a split.

    Args: root: a folder with .tar files, or their paths or URLs, with braces: "path/{00000..00099}.tar", "pipe:aws s3 cp s3://.../00000.tar -".
    split: what they are to be called; layout: of no use here.
    Attributes: urls: T strings.
    Raises: UserError if a file is missing or cut off, or the package webdataset is.
    """

    def __init__(self, root, split, layout):
        folder = Path(root)
        found = sorted(str(path) for path in folder.glob("*.tar")) if folder.is_dir() else _library().shardlists.expand_urls(str(root))
        if not found:
            raise UserError(f"--data-root {root}: expected .tar files, found {listing(folder)}")
        for url in found:
            if _is_file(url):
                _check_end(Path(url))
        self.urls = found

    def settings(self):
        """What the tars are called, for meta.json."""
        return {"tars": f"{len(self.urls)} tars, {digest([url.rsplit('/', 1)[-1] for url in self.urls])}"}

    def identity(self, number):
        """What tells a tar from one that was mended since: size and time of its last change, or only the URL. Returns: list of plain types."""
        url = self.urls[number]
        name = url.rsplit("/", 1)[-1]
        return [name, Path(url).stat().st_size, Path(url).stat().st_mtime_ns] if _is_file(url) else [name]


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
            for sample in _library().tariterators.tarfile_samples(iter([{"url": url}])):
                picture = next((sample[suffix] for suffix in PICTURES if suffix in sample), None)
                caption = _caption(sample)
                if picture is None or caption is None:
                    yield sample["__key__"], "", (None, "no picture" if picture is None else "no caption, or none in UTF-8")
                    continue
                try:
                    decoded = self.transform(read_rgb(io.BytesIO(picture))), None
                except Exception as broken:  # noqa: BLE001  Pillow raises nearly anything on a broken file
                    decoded = None, str(broken).replace(repr(picture), "the picture")[:200] or type(broken).__name__
                yield sample["__key__"], caption, decoded
        except Exception as broken:  # noqa: BLE001  as a broken tar, a lost connection and a missing command do
            error.append(f"{url}: cannot be read to its end ({' '.join(str(broken).split())[:160] or type(broken).__name__}); fetch it again")


def _library():
    """The package webdataset. Raises: UserError if it is not there."""
    try:
        import webdataset
    except ImportError:
        raise UserError("--dataset webdataset: needs the package of that name: pip install webdataset") from None
    return webdataset


def _is_file(url):
    return "://" not in url and not url.startswith("pipe:")


def _check_end(path):
    """Raise a UserError if a tar is not there, or was cut off, which could go unnoticed between two of its files."""
    if not path.is_file():
        raise UserError(f"--data-root: {path}: no such file")
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(-min(END, size), io.SEEK_END)
        if path.suffix == ".tar" and (size < END or any(file.read())):
            raise UserError(f"{path}: is cut off, or no tar: it does not end as one; fetch it again")


def _caption(sample):
    """The caption of a sample, or None."""
    try:
        if "txt" in sample:
            return sample["txt"].decode().strip() or None
        caption = json.loads(sample.get("json", b"null"))["caption"]
        return caption.strip() or None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
