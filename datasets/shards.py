"""A split in many files: what web-scale data are cached in, one file of images and one of texts for each tar, read without being loaded.

embeddings/<name>/<split>/image-00000.pt text-00000.pt ...   (n, D) each: one caption an image in the caches of tars, any in others
                          captions-00000.json images-00000.json ...   texts and file names (of tars: sample keys), in row order
                          image_of_caption.pt                (M,) int64: the image row of every caption, over all files
                          meta.json                          as of every split, with an index under "shards":
                                                             {"image": [[rows, SHA-256], ...], "text": the same, "image_of_caption": SHA-256}
"""

from collections import OrderedDict

import torch

from utils.cli import UserError
from utils.files import load_tensors, save_json, save_tensors, sha256

BUFFER = (
    2**20
)  # captions: 2 GB of embeddings 512 wide in float16, images and texts, which the system's file cache holds if it has room
OPEN = 512  # files that are open at a time


class Shards:
    """The rows of many files as one (N, D) tensor that is never in memory: rows are read when they are asked for.

    A file is compared with its SHA-256 when it is first opened, a row is looked at for what is not finite when it is read.
    Args: folder: the split's. kind: "image" or "text". index: its [rows, SHA-256] pairs. embed_dim: D. dtype: of the stored embeddings.
    Raises: UserError if a file is missing; later, if one is not what the index says.
    """

    def __init__(self, folder, kind, index, embed_dim, dtype):
        self.files = [shard_file(folder, kind, number) for number in range(len(index))]
        missing = next((file for file in self.files if not file.exists()), None)
        if missing:
            raise UserError(f"{missing}: no such file; make the cache anew")
        self.ends = torch.tensor([rows for rows, _ in index]).cumsum(dim=0)  # (S,)
        self.starts = self.ends - torch.tensor([rows for rows, _ in index])  # (S,)
        self.shape, self.dtype = (int(self.ends[-1]), embed_dim), dtype
        self._sums, self._compared, self._open = [total for _, total in index], set(), OrderedDict()

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        """Args: rows (B,) int64. Returns: (B, D), in memory."""
        found = torch.empty(len(rows), self.shape[1], dtype=self.dtype)
        shard_of = torch.bucketize(rows, self.ends, right=True)  # (B,)
        for shard in shard_of.unique().tolist():
            there = shard_of == shard
            found[there] = self._shard(shard)[rows[there] - self.starts[shard]]
        finite = torch.isfinite(found).all(dim=1)
        if not finite.all():
            row = rows[int((~finite).nonzero()[0])]
            shard = int(torch.bucketize(row, self.ends, right=True))
            raise UserError(
                f"{self.files[shard]}: row {int(row - self.starts[shard])} is not finite; make the cache anew, in --precision fp32"
            )
        return found

    def whole(self):
        """All rows, (N, D), in memory."""
        shards = [self._shard(shard) for shard in range(len(self.files))]
        for z, file in zip(shards, self.files, strict=True):
            check_finite(z, file)
        return torch.cat(shards)

    def _shard(self, number):
        if number not in self._open:
            if number not in self._compared:
                compare_sum(self.files[number], self._sums[number])
                self._compared.add(number)
            z = load_tensors(self.files[number], check_sums=False)
            expected = (int(self.ends[number] - self.starts[number]), self.shape[1])
            if not isinstance(z, torch.Tensor) or (z.shape, z.dtype) != (expected, self.dtype):
                raise UserError(
                    f"{self.files[number]}: not the tensor of shape {expected}, {self.dtype}, that meta.json names; make the cache anew"
                )
            self._open[number] = z.detach()
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


def check_finite(z, file):
    """Raise a UserError that names the first row of a file, (n, D), that is not finite."""
    for start in range(0, len(z), 65536):  # in pieces: the check needs a copy of what it looks at
        finite = torch.isfinite(z[start : start + 65536]).all(dim=1)
        if not finite.all():
            raise UserError(
                f"{file}: row {start + int((~finite).nonzero()[0])} is not finite; make the cache anew, in --precision fp32"
            )


def compare_sum(file, expected):
    """Raise a UserError if a file has not the SHA-256 that it should have."""
    if sha256(file) != expected:
        raise UserError(f"{file}: not the file that meta.json names: its SHA-256 differs; make the cache anew")


def finish_shards(folder, index, image_of_caption, meta):
    """Write what stands beside the files of a split, meta.json last, and remove what an older cache left.

    Args: index: {"image": [[rows, SHA-256], ...], "text"}. image_of_caption (M,) int64. meta: dict of plain types.
    """
    for file in ("image.pt", "text.pt", "cap_id_to_img_id.json", "captions.json", "images.json"):
        (folder / file).unlink(missing_ok=True)
    remove_shards(folder, {"image": len(index["image"]), "text": len(index["text"])})
    save_tensors(image_of_caption, folder / "image_of_caption.pt")
    save_json(
        meta | {"shards": index | {"image_of_caption": sha256(folder / "image_of_caption.pt")}},
        folder / "meta.json",
        indent=1,
    )


def write_shards(folder, z, names, kind, rows):
    """Write embeddings in files of so many rows, each with the names of its rows. Args: z (N, D). names: N strings. kind: "images" or "captions".

    Returns: their [rows, SHA-256] pairs.
    """
    index, tensors = [], "image" if kind == "images" else "text"
    for number, part in enumerate(z.split(rows)):
        file = shard_file(folder, tensors, number)
        save_tensors(part.clone(), file)  # a view would drag its whole storage along
        save_json(names[number * rows : number * rows + len(part)], shard_file(folder, kind, number))
        index.append([len(part), sha256(file)])
    return index


def remove_shards(folder, kept=None):
    """Remove the files of a split in many. Args: kept: how many of {"image", "text"} stay, the first ones; None: none."""
    (folder / "image_of_caption.pt").unlink(missing_ok=True)
    for kind, of in (("image", "image"), ("images", "image"), ("text", "text"), ("captions", "text")):
        for file in folder.glob(f"{kind}-*.*"):
            number = file.stem.removeprefix(f"{kind}-")
            if number.isdecimal() and int(number) >= (kept or {}).get(of, 0):
                file.unlink()


def shard_file(folder, kind, number):
    """<folder>/<kind>-00000.pt, or .json for captions and file names."""
    return folder / f"{kind}-{number:05d}.{'pt' if kind in ('image', 'text') else 'json'}"


def check_index(path, index):
    """Raise a UserError if what stands under "shards" in a meta.json is no index. Args: path: of the meta.json, for the message."""

    def is_list(shards):
        return isinstance(shards, list) and all(
            isinstance(shard, list) and [type(part) for part in shard] == [int, str] and shard[0] >= 0
            for shard in shards
        )

    whole = isinstance(index, dict) and all(
        is_list(index.get(kind)) and sum(rows for rows, _ in index[kind]) for kind in ("image", "text")
    )
    if not whole or not isinstance(index.get("image_of_caption"), str):
        raise UserError(f"{path}: 'shards' is not the index of a cache in many files; make the cache anew")


def shuffled(sizes, buffer, generator):
    """The rows of many files in random order: the files are shuffled, and the rows of so many consecutive ones as fill the buffer.

    What that costs: a batch holds rows of one buffer's files only. Where files are alike inside, as those of one crawl or one topic are, the
    negatives of a batch are more alike than under a full shuffle, and the gradient varies more from batch to batch; over an epoch every row comes
    once, and every epoch draws other files together. With a buffer of all rows it is a full shuffle.

    Args: sizes: rows of each file. buffer: rows, of which there are as many indices in memory. generator: torch.Generator.
    Yields: (n,) int64 row numbers, a buffer at a time.
    """
    starts = torch.tensor(sizes).cumsum(dim=0) - torch.tensor(sizes)
    waiting, count = [], 0
    for shard in torch.randperm(len(sizes), generator=generator).tolist():
        waiting.append(torch.arange(starts[shard], starts[shard] + sizes[shard]))
        count += sizes[shard]
        if count >= buffer:
            yield torch.cat(waiting)[torch.randperm(count, generator=generator)]
            waiting, count = [], 0
    if count:
        yield torch.cat(waiting)[torch.randperm(count, generator=generator)]


def in_batches(buffers, size):
    """Row numbers a batch at a time, over the borders of the buffers; only the last batch may be smaller. Args: buffers: of `shuffled`. size: B."""
    left = torch.empty(0, dtype=torch.int64)
    for rows in buffers:
        *batches, left = torch.cat([left, rows]).split(size)
        if len(left) == size:
            batches, left = [*batches, left], left[:0]
        yield from batches
    if len(left):
        yield left
