"""The rows of an embedding matrix (N, D) behind one interface, in memory or on the disk.

    rows[indices] -> (B, D)   len(rows), rows.shape, rows.dtype   rows.to(device)   rows.read() -> (N, D)
    rows.order(generator, buffer): the row numbers of an epoch, at random

On the disk they lie in many files: what web-scale data are cached in, one file for each tar.
"""

from collections import OrderedDict

import torch

from datasets.checks import check_finite, check_index, check_sum, load_embeddings
from utils.cli import UserError
from utils.files import load_tensors

BUFFER = 2**20  # rows: 2 GB of embeddings 512 wide in float16, images and texts, which the system's file cache may hold
OPEN = 512  # files that are open at a time


def open_rows(folder, kind, meta, mapped=False):
    """The rows of a split.

    Args: folder: the split's. kind: "image" or "text". meta: of its meta.json. mapped: leave many files on the disk.
    Returns: RowsInMemory or RowsOnDisk.
    Raises: UserError that names the file and what is wrong with it.
    """
    if "shards" not in meta:
        return RowsInMemory(load_embeddings(folder / f"{kind}.pt"))
    width, dtype = check_index(folder / "meta.json", meta)
    rows = RowsOnDisk(folder, kind, meta["shards"][kind], width, dtype)
    return rows if mapped else RowsInMemory(rows.read())


class RowsInMemory:
    """A tensor (N, D). Row numbers are to be on its device."""

    def __init__(self, z):
        self._z, self.shape, self.dtype, self.device = z, tuple(z.shape), z.dtype, z.device

    def __len__(self):
        return len(self._z)

    def __getitem__(self, rows):
        return self._z[rows]

    def to(self, device):
        """Move to a device. Returns: self."""
        self._z = self._z.to(device)
        self.device = self._z.device
        return self

    def read(self):
        """All of them, (N, D)."""
        return self._z

    def order(self, generator, buffer=BUFFER):
        """Yield the row numbers of an epoch, (N,) int64, at random. Args: generator: torch.Generator on the CPU."""
        yield torch.randperm(len(self), generator=generator).to(self.device)


class RowsOnDisk:
    """The rows of many files, each read when it is asked for; row numbers are on the CPU.

    A file is compared with its SHA-256 when it is first opened, a row is looked at for what is not finite when it is
    read.
    Args: folder: the split's. kind: "image" or "text". index: its [rows, SHA-256] pairs. width: D. dtype: as stored.
    Raises: UserError if a file is missing; later, if one is not what the index says.
    """

    device = torch.device("cpu")  # where row numbers are looked up

    def __init__(self, folder, kind, index, width, dtype):
        self.files = [shard_file(folder, kind, number) for number in range(len(index))]
        missing = next((file for file in self.files if not file.exists()), None)
        if missing:
            raise UserError(f"{missing}: no such file; make the cache anew")
        self.sizes = [rows for rows, _ in index]
        self.ends = torch.tensor(self.sizes).cumsum(dim=0)  # (S,)
        self.starts = self.ends - torch.tensor(self.sizes)  # (S,)
        self.shape, self.dtype = (int(self.ends[-1]), width), dtype
        self._sums, self._checked, self._open = [total for _, total in index], set(), OrderedDict()
        self._target = torch.device("cpu")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        """Args: rows (B,) int64. Returns: (B, D), on the device of `to`."""
        found = torch.empty(len(rows), self.shape[1], dtype=self.dtype)
        shard_of = torch.bucketize(rows, self.ends, right=True)  # (B,)
        for shard in shard_of.unique().tolist():
            there = shard_of == shard
            found[there] = self._shard(shard)[rows[there] - self.starts[shard]]
        finite = torch.isfinite(found).all(dim=1)
        if not finite.all():
            row = rows[int((~finite).nonzero()[0])]
            shard = int(torch.bucketize(row, self.ends, right=True))
            where = f"{self.files[shard]}: row {int(row - self.starts[shard])}"
            raise UserError(f"{where} is not finite; make the cache anew, in --precision fp32")
        return found.to(self._target, non_blocking=True)

    def to(self, device):
        """Rows that are read go to this device from now on. Returns: self."""
        self._target = torch.device(device)
        return self

    def read(self):
        """All of them, (N, D), in memory."""
        shards = [self._shard(number) for number in range(len(self.files))]
        for z, file in zip(shards, self.files, strict=True):
            check_finite(z, file)
        return torch.cat(shards).to(self._target)

    def order(self, generator, buffer=BUFFER):
        """Yield the row numbers of an epoch, a buffer at a time: files shuffled, then rows within as many as fill it.

        What that costs: a batch holds rows of one buffer's files only. Where files are alike inside, as those of one
        crawl or topic are, the negatives of a batch are more alike than under a full shuffle, and the gradient varies
        more from batch to batch; every epoch draws other files together. A buffer of all rows is a full shuffle.
        Args: generator: torch.Generator on the CPU. buffer: rows, of which there are as many numbers in memory.
        """
        return shuffled(self.sizes, buffer, generator)

    def _shard(self, number):
        if number not in self._open:
            if number not in self._checked:
                check_sum(self.files[number], self._sums[number])
                self._checked.add(number)
            z = load_tensors(self.files[number], check_sums=False)
            expected = (self.sizes[number], self.shape[1])
            if not isinstance(z, torch.Tensor) or (z.shape, z.dtype) != (expected, self.dtype):
                what = f"the tensor of shape {expected}, {self.dtype}, that meta.json names"
                raise UserError(f"{self.files[number]}: not {what}; make the cache anew")
            self._open[number] = z.detach()
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


def shard_file(folder, kind, number):
    """<folder>/<kind>-00000.pt, or .json for captions and file names."""
    return folder / f"{kind}-{number:05d}.{'pt' if kind in ('image', 'text') else 'json'}"


def shuffled(sizes, buffer, generator):
    """The rows of many files at random, as `RowsOnDisk.order` has them. Args: sizes: rows of each file."""
    starts = torch.tensor(sizes).cumsum(dim=0) - torch.tensor(sizes)
    waiting, count = [], 0
    for position, shard in enumerate(torch.randperm(len(sizes), generator=generator).tolist(), start=1):
        waiting.append(torch.arange(starts[shard], starts[shard] + sizes[shard]))
        count += sizes[shard]
        if count and (count >= buffer or position == len(sizes)):
            yield torch.cat(waiting)[torch.randperm(count, generator=generator)]
            waiting, count = [], 0


def in_batches(orders, size):
    """Row numbers a batch at a time, over the borders of buffers; only the last batch may be smaller.

    Args: orders: iterable of (n,) int64, as `order` yields. size: B.
    Yields: (B,) int64.
    """
    left = None
    for rows in orders:
        *batches, left = (rows if left is None else torch.cat([left, rows])).split(size)
        if len(left) == size:
            batches, left = [*batches, left], None
        yield from batches
    if left is not None and len(left):
        yield left
