"""Rows: an embedding matrix (N, D) behind one interface, in memory or on disk.

    rows[indices] -> (B, D)
    rows.read() -> (N, D)
    rows.to(device)
    rows.order(generator, buffer): the row numbers of an epoch, at random
    rows.load(indices, max_rows): make ready rows that will be read soon
    len(rows), rows.shape, rows.dtype, rows.device

On disk they lie in shards, for example one per tar.
"""

import functools

import torch

from datasets.checks import (
    ANEW,
    CURE_OF_ROW,
    check_index,
    check_rows,
    check_sum,
    existing,
    first_bad_row,
    load_embeddings,
)
from utils.cli import UserError, need
from utils.device import sent
from utils.files import load_tensors

# Rows that are shuffled together. 2**20 images and 2**20 texts, 512 wide in float16, take 2 GB in
# all, which the system's page cache can hold.
BUFFER = 2**20
OPEN = 512  # shards that are open at a time
NOT_LOADED = torch.iinfo(torch.int64).max


def open_rows(folder, kind, meta, mapped=False):
    """The rows of a split.

    Args:
        kind: "image" or "text".
        meta: content of meta.json.
        mapped: leave shards on disk.
    """
    if "shards" not in meta:
        return RowsInMemory(load_embeddings(folder / f"{kind}.pt"))
    width, dtype = check_index(folder / "meta.json", meta)
    rows = RowsOnDisk(folder, kind, meta["shards"][kind], width, dtype)
    return rows if mapped else RowsInMemory(rows.read())


class RowsInMemory:
    """A tensor (N, D). Row numbers must be on its device."""

    def __init__(self, z):
        self._z = z
        self.shape = tuple(z.shape)
        self.dtype = z.dtype
        self.device = z.device

    def __len__(self):
        return len(self._z)

    def __getitem__(self, rows):
        return self._z[rows]

    def to(self, device):
        """These rows, moved to a device."""
        self._z = self._z.to(device)
        self.device = self._z.device
        return self

    def read(self):
        """All of them, (N, D)."""
        return self._z

    def load(self, rows, max_rows):
        """They are at hand already."""

    def order(self, generator, buffer=BUFFER):
        """Yield the row numbers of an epoch, (N,) int64, in random order.

        Args:
            generator: on the CPU.
        """
        yield torch.randperm(len(self), generator=generator).to(self.device)


class RowsOnDisk:
    """The rows of many shards, each read when it is asked for; row numbers are on the CPU.

    A shard is compared with its SHA-256 when it is first opened, and a row is checked when it is
    read: it is finite, and not zero.

    Args: folder, kind as for `open_rows`, index [rows, SHA-256] of each, width D, dtype.
    Raises: UserError if a shard is missing; later, if one is not what the index says.
    """

    device = torch.device("cpu")  # where row numbers are looked up

    def __init__(self, folder, kind, index, width, dtype):
        self.files = [existing(shard_file(folder, kind, number)) for number in range(len(index))]
        self.sizes = [rows for rows, _ in index]
        self.ends = torch.tensor(self.sizes).cumsum(dim=0)  # (S,)
        self.starts = self.ends - torch.tensor(self.sizes)  # (S,)
        self.shape = (int(self.ends[-1]), width)
        self.dtype = dtype
        self._sums = [file_sum for _, file_sum in index]
        self._checked = set()  # numbers of shards
        self._shard = functools.lru_cache(OPEN)(self._open_shard)  # number -> tensor
        self._target = torch.device("cpu")
        self._loaded = None  # rows of some shards on the device
        # For each shard: what to add to a row number to get its place in _loaded.
        self._shift = torch.full((len(index),), NOT_LOADED)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        shard_of = torch.bucketize(rows, self.ends, right=True)  # (B,)
        shift = self._shift[shard_of]
        if len(rows) and (shift != NOT_LOADED).all():
            return self._loaded[sent(rows + shift, self._target)]
        z = torch.empty(len(rows), self.shape[1], dtype=self.dtype)
        for shard in shard_of.unique().tolist():
            there = shard_of == shard
            z[there] = self._shard(shard)[rows[there] - self.starts[shard]]
        bad, problem = first_bad_row(z)
        if problem:
            shard = shard_of[bad]
            row = rows[bad] - self.starts[shard]
            raise UserError(f"{self.files[shard]}: row {row} {problem}; {CURE_OF_ROW}")
        return sent(z, self._target)  # (B, D)

    def to(self, device):
        """These rows, which go to a device from now on when they are read."""
        self._target = torch.device(device)
        return self

    def load(self, rows, max_rows):
        """Copy the shards that hold these rows to a GPU, if they have at most max_rows rows in all.

        Batches of these rows are then read there. On the CPU nothing is to be gained.
        """
        self._shift.fill_(NOT_LOADED)
        self._loaded = None
        shards = torch.bucketize(rows, self.ends, right=True).unique().tolist()
        size = sum(self.sizes[shard] for shard in shards)
        if self._target.type == "cpu" or not 0 < size <= max_rows:
            return
        self._loaded = self._read(shards)
        first = 0
        for shard in shards:
            self._shift[shard] = first - self.starts[shard]
            first += self.sizes[shard]

    def read(self):
        """All of them, (N, D), in memory."""
        return self._read(range(len(self.files)))

    def _read(self, shards):
        """All rows of some shards on the device."""
        parts = []
        for number in shards:
            z = self._shard(number)
            check_rows(z, self.files[number])
            parts.append(z)
        return torch.cat(parts).to(self._target)

    def order(self, generator, buffer=BUFFER):
        """Yield the row numbers of an epoch, one buffer at a time.

        Shards are shuffled, and then the rows of as many shards as fill a buffer. So the rows of a
        batch come from the shards of one buffer, or of several where a buffer ends. If the rows of
        a shard are alike, as those of one crawl or topic are, the negatives of a batch are more
        alike than under a full shuffle, and the gradient varies more from batch to batch. Every
        epoch draws other shards together. A buffer of all rows is a full shuffle.

        Args:
            generator: on the CPU.
            buffer: rows.
        """
        return shuffled(self.sizes, buffer, generator)

    def _open_shard(self, number):
        """The rows of a shard, mapped to memory. `_shard` keeps the last OPEN shards open."""
        if number not in self._checked:
            check_sum(self.files[number], self._sums[number])
            self._checked.add(number)
        z = load_tensors(self.files[number], check_sums=False)
        expected = (self.sizes[number], self.shape[1])
        fits = isinstance(z, torch.Tensor) and (z.shape, z.dtype) == (expected, self.dtype)
        what = f"the tensor of shape {expected}, {self.dtype}, that meta.json names"
        need(fits, f"{self.files[number]}: not {what}; {ANEW}")
        return z.detach()


class SomeRows:
    """Some rows of other Rows, with new numbers.

    Args:
        rows: Rows.
        chosen: their numbers, (n,), ascending.
    """

    def __init__(self, rows, chosen):
        self._rows = rows
        self._chosen = chosen.to(rows.device)
        self.shape = (len(chosen), rows.shape[1])
        self.dtype = rows.dtype
        self.device = rows.device

    def __len__(self):
        return len(self._chosen)

    def __getitem__(self, rows):
        return self._rows[self._chosen[rows]]

    def to(self, device):
        """These rows, on a device, or read to it from now on."""
        self._rows = self._rows.to(device)
        self.device = self._rows.device
        self._chosen = self._chosen.to(self.device)
        return self

    def read(self):
        """All of them, (n, D), in memory."""
        return self._rows[self._chosen]

    def load(self, rows, max_rows):
        """Make some rows ready, as the other Rows do."""
        self._rows.load(self._chosen[rows], max_rows)

    def order(self, generator, buffer=BUFFER):
        """Yield the row numbers of an epoch, in the order of the other Rows."""
        for rows in self._rows.order(generator, buffer):
            place = torch.searchsorted(self._chosen, rows).clamp(max=len(self) - 1)
            yield place[self._chosen[place] == rows]


def shard_file(folder, kind, number):
    """<folder>/<kind>-00000.pt, or .json for captions and file names."""
    return folder / f"{kind}-{number:05d}.{'pt' if kind in ('image', 'text') else 'json'}"


def shuffled(sizes, buffer, generator):
    """The row numbers of shards of these sizes at random, as `RowsOnDisk.order` has them."""
    starts = torch.tensor(sizes).cumsum(dim=0) - torch.tensor(sizes)
    waiting = []
    count = 0
    for position, shard in enumerate(
        torch.randperm(len(sizes), generator=generator).tolist(), start=1
    ):
        waiting.append(torch.arange(starts[shard], starts[shard] + sizes[shard]))
        count += sizes[shard]
        if count and (count >= buffer or position == len(sizes)):
            yield torch.cat(waiting)[torch.randperm(count, generator=generator)]
            waiting = []
            count = 0


def in_batches(buffers, size):
    """Yield row numbers in batches (B,) int64 of this size; the last may be smaller.

    Args: buffers: tensors of row numbers, as `order` yields them. A batch may span several.
    """
    left = None
    for rows in buffers:
        if left is not None:
            rows = torch.cat([left, rows])
        *batches, left = rows.split(size)
        yield from batches
    if left is not None and len(left):
        yield left
