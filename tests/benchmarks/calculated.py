"""What one H100 should take for a training step, an epoch, a cache and an evaluation: calculated.

    python -m tests.benchmarks.calculated > results/benchmarks/calculated.md

Operations are counted as torch dispatches them, on tensors that have a shape and no content. The
host launches one kernel per operation that is neither a view nor an allocation. Meanwhile the GPU
works, so a call takes the larger of two times: that of its launches, and that of its matrix
products plus that of the bytes that its operations read and write. In a CUDA graph the host
launches all kernels at once, but each takes the GPU some time to begin and to end. Nothing of this is measured but
how fast this machine decodes images and hands them over; tests/benchmarks/gpu.py measures the rest.
"""

import math
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.flop_counter import FlopCounterMode

from datasets.images import decode_file
from models import GROUPS
from tests.benchmarks.caching import MODEL, make_pictures
from tests.benchmarks.machine import describe, markdown_table, seconds
from tests.benchmarks.train_step import make_step
from utils.embed import CHUNK_ON_GPU as CHUNK
from utils.embed import as_bytes, shortened
from utils.evaluation.ranking import TILE, rank_queries

# The GPU: an H100 SXM.
RATE = {torch.bfloat16: 989e12, torch.float32: 67e12}  # FLOP/s, dense; from the data sheet
SHARE = 0.5  # of these rates, assumed: what products of this size usually reach
MEMORY = 3.35e12  # bytes per second; from the data sheet
LAUNCH = 5e-6  # seconds, assumed: what eager PyTorch takes on the host for one operation
KERNEL = 2e-6  # seconds, assumed: what a kernel takes to begin and to end, whatever it computes
TRANSFER = 10e9  # bytes per second, assumed: from ordinary memory to the GPU over PCIe 5.0
CORES = 16  # beside the GPU

# The sizes.
BATCH = 2048
DIM = 512
EPOCHS = 200  # of the paper's recipe
COCO = (118_287, 591_753)  # images, captions of the train split
TEST = (5_000, 25_000)  # of the test split
TOKENS = 16  # per caption: COCO's have 13.6, and are encoded at the next multiple of 4
DATA_SETS = {  # images, captions, as published
    "COCO": COCO,
    "CC3M": (3_318_333,) * 2,
    "CC12M": (12_423_374,) * 2,
    "LAION-400M": (413_871_335,) * 2,
}

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
SYNCHRONISING = {
    "_local_scalar_dense",  # item() and tolist()
    "is_nonzero",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
}


# Counting.


@dataclass
class Counts:
    """What the dispatched operations of a call come to.

    Attributes:
        launches: operations that launch a kernel.
        flops: of the matrix products.
        bytes: of the tensors that the operations read and write.
        synchronisations: operations that wait for the GPU.
    """

    launches: int
    flops: int
    bytes: int
    synchronisations: int

    def launch_seconds(self):
        """What the host takes to launch everything."""
        return self.launches * LAUNCH

    def work_seconds(self, dtype=torch.bfloat16):
        """What the GPU takes for products in this dtype and for reading and writing."""
        return self.flops / (RATE[dtype] * SHARE) + self.bytes / MEMORY

    def seconds(self, dtype=torch.bfloat16):
        """What the call takes: host and GPU work at the same time, so the slower one counts."""
        return max(self.launch_seconds(), self.work_seconds(dtype))

    def graph_seconds(self, dtype=torch.bfloat16):
        """What the call takes as a CUDA graph."""
        return self.launches * KERNEL + self.work_seconds(dtype)


class _Operations(TorchDispatchMode):
    """Counts the operations that are dispatched in the block, backward and optimiser included."""

    def __init__(self):
        super().__init__()
        self.launches = 0
        self.bytes = 0
        self.synchronisations = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if operation.namespace != "aten" or operation.is_view or name in ALLOCATIONS:
            return result
        self.launches += 1
        self.synchronisations += name in SYNCHRONISING
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                self.bytes += stored_bytes(value)
        return result


def stored_bytes(tensor):
    """The bytes of a tensor's elements; those that a broadcast repeats count once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride:
            elements *= size
    return elements * tensor.element_size()


def count(call):
    """The Counts of a call."""
    with _Operations() as operations, FlopCounterMode(display=False) as products:
        call()
    flops = products.get_total_flops()
    return Counts(operations.launches, flops, operations.bytes, operations.synchronisations)


# Training.


def step_counts(method, batch=BATCH, embed_dim=DIM):
    """The Counts of a training step in bfloat16, as train.py does it with the paper's recipe."""
    # Tensors without content cannot be waited for, so waits are counted on a few real pairs. This
    # also makes the constants that the models keep, which must be real ones.
    real_step = make_step(method, 8, embed_dim, "bf16", "cpu")
    real_step()
    waits = count(real_step).synchronisations
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = make_step(method, batch, embed_dim, "bf16", "cpu")
        step()  # makes the optimiser's state
        counts = count(step)
    return replace(counts, synchronisations=waits)


def step_seconds(method, batch=BATCH, embed_dim=DIM):
    """The seconds of a training step, by a CUDA graph as train.py does it."""
    return step_counts(method, batch, embed_dim).graph_seconds()


def epoch_seconds(method, captions=COCO[1]):
    """The seconds of an epoch over so many captions."""
    return math.ceil(captions / BATCH) * step_seconds(method)


# Caching.


def encoder_counts(model, rows=CHUNK, tokens=TOKENS):
    """The Counts of one call of the image and of the text encoder in bfloat16: {kind: Counts}.

    Args:
        model: name of an open_clip model.
        rows: images or texts per call.
        tokens: per text.
    """
    import open_clip

    with torch.device("meta"), torch.inference_mode():
        clip = open_clip.create_model(model, pretrained=None, precision="bf16", device="meta")
        clip.eval()
        size = clip.visual.image_size[0]
        images = torch.empty(rows, 3, size, size, dtype=torch.bfloat16)
        texts = torch.empty(rows, tokens, dtype=torch.int64)
        text_encoder = shortened(clip, tokens)
        return {
            "image": count(lambda: clip.encode_image(images)),
            "text": count(lambda: text_encoder.encode_text(texts)),
        }


def encoding_rates(model, rows=CHUNK):
    """Images and texts that the GPU encodes per second, once they are there: {kind: rate}."""
    counts = encoder_counts(model, rows)
    return {kind: rows / counts[kind].seconds() for kind in counts}


def caching_rate(model, decoded, handed_over, cores=CORES, size=224):
    """Images that cache_embeddings.py embeds per second.

    The cores decode while the main process takes images over and moves them to the GPU, one after
    the other, and the GPU encodes them.

    Args:
        decoded: images that one core decodes per second.
        handed_over: images that the main process takes over per second.
        size: height and width of the encoder's images.
    """
    moved = TRANSFER / (3 * size**2 * 2)  # images of bfloat16 per second
    encoded = encoding_rates(model)["image"]
    taken_over = 1 / (1 / handed_over + 1 / moved)  # images per second
    return min(cores * decoded, taken_over, encoded)


def decoding_rate(images=64):
    """Images of 640 x 480 that one core of this machine decodes and resizes per second."""
    import open_clip

    with tempfile.TemporaryDirectory() as folder:
        files = make_pictures(Path(folder), images)
        transform = open_clip.image_transform(224, is_train=False)
        _, fastest, _ = seconds(lambda: [decode_file(path, transform) for path in files], 3)
        return images / fastest


class _Ready(IterableDataset):
    """The bytes of CHUNK images of 224 x 224 in bfloat16, which need no decoding."""

    def __init__(self, chunks):
        self.chunks = chunks

    def __iter__(self):
        images = torch.zeros(CHUNK, 3, 224, 224).numpy()
        for _ in range(self.chunks):
            yield as_bytes(images, torch.bfloat16)


def handover_rate(chunks=16):
    """Images per second that the main process gets from one other process.

    It is done as utils/embed.py does it, on this machine, with nothing decoded or encoded.
    """
    rates = []
    for _ in range(3):  # The best counts, as others may be at work on the machine for a while.
        ready = _Ready(chunks + 1)
        received = iter(DataLoader(ready, batch_size=None, num_workers=1, collate_fn=_as_it_is))
        next(received)  # The other process has started.
        start = time.perf_counter()
        for images in received:
            torch.as_tensor(images).view(torch.bfloat16)
        rates.append(chunks * CHUNK / (time.perf_counter() - start))
    return max(rates)


def _as_it_is(item):
    return item


# Evaluation.


def ranking_counts(images=TEST[0], captions=TEST[1], embed_dim=DIM):
    """The Counts of ranking images and captions both ways, as eval.py does for a row of a table.

    Two by two tiles are counted, and as many times as many as the similarities have. Copies to the
    CPU are not seen here.
    """
    per_image = captions // images
    side = 2 * TILE  # images of two tiles
    x = torch.randn(side, embed_dim)
    y = torch.randn(side * per_image, embed_dim)
    owner = torch.arange(len(y)) // per_image
    counted = count(lambda: rank_queries(lambda i, j: x[i] @ y[j].T, owner.numpy(), side))
    tiles = math.ceil(images / TILE) ** 2
    pairs = images * captions / (len(x) * len(y))
    return Counts(
        round(counted.launches * tiles / 4),
        round(counted.flops * pairs),
        round(counted.bytes * pairs),
        0,
    )


# The tables.


def step_rows():
    """A row per method of the table of training steps."""
    rows = []
    for method in GROUPS["all"]:
        counts = step_counts(method)
        epoch = math.ceil(COCO[1] / BATCH) * counts.graph_seconds()
        rows.append(
            [
                method,
                f"{counts.launches}",
                f"{counts.synchronisations}",
                f"{counts.flops / 1e9:.1f}",
                f"{counts.bytes / 1e6:.0f}",
                f"{1000 * counts.launch_seconds():.2f}",
                f"{1000 * counts.work_seconds():.2f}",
                f"{1000 * counts.graph_seconds():.2f}",
                f"{epoch:.2f}",
                f"{EPOCHS * epoch / 60:.1f}",
            ]
        )
    return rows


def large_run_rows(decoded, handed_over):
    """A row per data set of the table of large runs.

    Args: as `caching_rate`.
    """
    image_rate = caching_rate(MODEL, decoded, handed_over)
    text_rate = encoding_rates(MODEL)["text"]
    rows = []
    for name, (images, captions) in DATA_SETS.items():
        rows.append(
            [
                name,
                f"{images:,}",
                f"{captions:,}",
                f"{images / image_rate / 3600:.2g}",
                f"{captions / text_rate / 3600:.2g}",
                f"{(images + captions) * DIM * 2 / 1e9:.1f}",
                f"{epoch_seconds('asymvlm-psd', captions) / 60:.2g}",
            ]
        )
    return rows


def print_assumptions(decoded, handed_over):
    """What the tables assume, one line each."""
    print("Calculated for one H100 SXM, not measured. From its data sheet:")
    print(f"{RATE[torch.bfloat16] / 1e12:.0f} TFLOP/s of bfloat16 products,")
    print(f"{RATE[torch.float32] / 1e12:.0f} of float32, {MEMORY / 1e12:.2f} TB/s of memory.")
    print(f"Assumed: products reach {SHARE:.0%} of these rates, a launch takes the host")
    print(f"{LAUNCH * 1e6:.0f} microseconds, a kernel {KERNEL * 1e6:.0f} to begin and to end in a")
    print(f"CUDA graph, and {TRANSFER / 1e9:.0f} GB/s move to the GPU.")
    print(f"Of the machine that calculates: a core decodes {decoded:.0f} images of 640 x 480 a")
    print(f"second, and the main process takes over {handed_over:.0f} of 224 x 224 a second from")
    print(f"the processes that decode. {CORES} cores are assumed.\n")


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(describe(), "\n")
    decoded = decoding_rate()
    handed_over = handover_rate()
    print_assumptions(decoded, handed_over)
    header = [
        f"a step, B = {BATCH}, D = {DIM}",
        "launches",
        "synchronisations",
        "GFLOP",
        "MB read and written",
        "launches, ms",
        "products and memory, ms",
        "step as a CUDA graph, ms",
        "epoch of COCO, s",
        f"{EPOCHS} epochs, minutes",
    ]
    print(markdown_table(header, step_rows()))

    rates = encoding_rates(MODEL)
    image_rate = caching_rate(MODEL, decoded, handed_over)
    ranking = ranking_counts()
    rows = [
        [f"images per second that {MODEL} encodes", f"{rates['image']:,.0f}"],
        ["images per second that the cores decode", f"{CORES * decoded:,.0f}"],
        ["images per second that cache_embeddings.py embeds", f"{image_rate:,.0f}"],
        [f"texts of {TOKENS} tokens per second that it encodes", f"{rates['text']:,.0f}"],
        ["minutes to cache the images of COCO", f"{COCO[0] / image_rate / 60:.1f}"],
        ["minutes to cache the captions of COCO", f"{COCO[1] / rates['text'] / 60:.1f}"],
        [
            "seconds to rank 5,000 x 25,000 both ways, for each row of a table",
            f"{ranking.seconds(torch.float32):.3f}",
        ],
        ["its launches", f"{ranking.launches:,}"],
        ["its GFLOP, in float32", f"{ranking.flops / 1e9:.0f}"],
        ["its GB read and written", f"{ranking.bytes / 1e9:.1f}"],
    ]
    print(f"\n{markdown_table(['caching and evaluation', 'calculated'], rows)}")

    header = [
        "one GPU",
        "images",
        "captions",
        "caching images, h",
        "caching captions, h",
        "embeddings, GB",
        "an epoch of asymvlm-psd, minutes",
    ]
    print(f"\n{markdown_table(header, large_run_rows(decoded, handed_over))}")


if __name__ == "__main__":
    sys.exit(main())
