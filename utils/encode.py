"""Pictures and texts through a frozen CLIP: the same bytes whatever the batch size, the number of workers or the number of ranks."""

import logging
import signal

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.coco import CocoImages, collate
from datasets.parts import part_rows
from utils.cli import UserError
from utils.distributed import is_first
from utils.preprocess import tokenize

CHUNK = 64  # rows that go through the encoder at a time: always as many


@torch.inference_mode()
def encode_images(clip, files, parts, batch_size, workers, skip_broken=False):
    """Decode and embed pictures, part by part. Args: files: N paths. parts: the numbers of some parts of them, ascending.

    Yields: (part, (n, D) float32 on the CPU, {row: reason} of the broken files among them, which have no embedding).
    Raises: UserError after all broken files have been found and named, unless skip_broken. Nothing is encoded after the first.
    """
    batch_size = -(-batch_size // CHUNK) * CHUNK
    part_ending_at = {part_rows(part, len(files)).stop: part for part in parts}
    ranges = [part_rows(part, len(files)) for part in parts]
    batches = [rows[start : start + batch_size] for rows in ranges for start in range(0, len(rows), batch_size)]
    images = CocoImages(files, clip.transform)
    loader = DataLoader(
        images, batch_sampler=batches, num_workers=workers, collate_fn=collate, worker_init_fn=leave_interrupts
    )
    encoded, broken, failed = [], {}, []
    with tqdm(total=sum(map(len, ranges)), desc="images", unit="image", disable=not is_first()) as bar:
        for batch, (pictures, errors) in zip(batches, loader, strict=True):
            broken |= {row: error for row, error in zip(batch, errors, strict=True) if error}
            failed += [error for error in errors if error and not skip_broken]
            if pictures is not None and not failed:
                whole = torch.tensor([not error for error in errors])
                encoded.append(
                    torch.cat(in_chunks(clip.model.encode_image, pictures.to(clip.dtype), clip.device))[whole]
                )
            bar.update(len(batch))
            if batch.stop in part_ending_at and not failed:
                yield part_ending_at[batch.stop], torch.cat(encoded) if encoded else torch.empty(0), broken
                encoded, broken = [], {}
    for error in failed[:-1]:
        logging.error(error)
    if failed:
        raise UserError(
            f"{failed[-1]} ({len(failed)} broken image files in all; mend them, or leave them out with --skip-broken)"
        )


def leave_interrupts(worker):
    """Ctrl-C is the main process's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def encode_texts(clip, texts):
    """Embed texts, each distinct one once. Args: texts: M strings. Returns: (M, D) float32 on the CPU."""
    distinct = list(dict.fromkeys(texts))
    row_of = {text: row for row, text in enumerate(distinct)}
    with tqdm(total=len(distinct), desc="texts", unit="text") as bar:
        content = encode_distinct(clip, distinct, bar)
    note_texts([content], clip)
    return content["rows"][[row_of[text] for text in texts]]


@torch.inference_mode()
def encode_distinct(clip, texts, bar):
    """Embed texts. Returns: {"rows": (M, D) float32 on the CPU, "cut", "unknown": how many are too long or have unknown words, "example"}."""
    rows, cut, unknown = [], 0, []
    for start in range(0, len(texts), CHUNK):
        part = texts[start : start + CHUNK]
        tokens, part_cut, part_unknown = tokenize(clip, part)
        cut += sum(part_cut)
        unknown += [text for text, is_unknown in zip(part, part_unknown, strict=True) if is_unknown]
        rows += in_chunks(clip.model.encode_text, tokens, clip.device)
        bar.update(len(part))
    return {"rows": torch.cat(rows), "cut": cut, "unknown": len(unknown), "example": (unknown or [""])[0]}


def note_texts(contents, clip):
    """Say how many texts the CLIP cannot read to the end, or has no words for. Args: contents: what `encode_distinct` returned."""
    cut, unknown = (sum(content[key] for content in contents) for key in ("cut", "unknown"))
    if cut:
        length = clip.info["context_length"]
        logging.warning(
            "note: %d texts are longer than the model reads (%d tokens); their ends are left out", cut, length
        )
    if unknown:
        example = next(content["example"] for content in contents if content["unknown"])[:80]
        logging.warning(
            "note: %d texts have words that this CLIP has never seen, such as %r; do not trust their embeddings",
            unknown,
            example,
        )


def in_chunks(encode, inputs, device):
    """Encode rows CHUNK at a time, the last chunk filled up: a row's last bits depend on the size of its chunk. Returns: list of (n, D)."""
    outputs = []
    for part in inputs.split(CHUNK):
        full = torch.cat([part, part[-1:].expand(CHUNK - len(part), *part.shape[1:])]) if len(part) < CHUNK else part
        outputs.append(encode(full.to(device))[: len(part)].float().cpu())
    return outputs


def stored(z, dtype, names):
    """Embeddings (N, D) as they are stored. Args: names: of the N images or texts. Raises: UserError if one of them is not finite then."""
    z = z.to(dtype)
    bad = (~torch.isfinite(z.flatten(1)).all(dim=1)).nonzero() if len(z) else ()
    if len(bad):
        raise UserError(
            f"the embedding of {str(names[int(bad[0])])[:200]!r} is not finite; try --precision fp32 --dtype float32"
        )
    return z
