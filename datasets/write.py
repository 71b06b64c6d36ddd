"""Write the cache of a split under embeddings/: one file of images and one of texts, or shards.

Shards are image-00000.pt, text-00000.pt and so on, (n, D) each. captions-00000.json and
images-00000.json have their texts and file names (for tars: sample keys), image_of_caption.pt is
(M,) int64 over all shards, and meta.json has an index:

    "shards": {"image": [[rows, SHA-256], ...], "text": the same, "image_of_caption": SHA-256}
"""

import os

import torch

from datasets.rows import shard_file
from utils.files import save_json, save_tensors, sha256

IN_ONE = (  # files of a cache that is not in shards
    "image.pt",
    "text.pt",
    "cap_id_to_img_id.json",
    "captions.json",
    "images.json",
)
NAMES_OF = {"image": "images", "text": "captions"}


def write_split(
    folder,
    image,
    text,
    image_of_caption,
    captions,
    images,
    relevance,
    meta,
    shard_rows=None,
):
    """Write one split. meta.json comes last: if it exists, the split is finished.

    Args:
        image: (N, D), as it is to be stored.
        text: (M, D), as it is to be stored.
        image_of_caption, captions, relevance: as `ListSplit` has them.
        images: N file names.
        meta: dict of plain types.
        shard_rows: rows per shard; None: no shards.
    """
    clear_meta(folder)
    if relevance is not None:
        save_json(relevance, folder / "relevance.json")
    if shard_rows:
        index = {
            "image": _write_shards(folder, "image", image, images, shard_rows),
            "text": _write_shards(folder, "text", text, captions, shard_rows),
        }
        finish_shards(folder, index, torch.as_tensor(image_of_caption, dtype=torch.int64), meta)
        return
    _remove_shards(folder)
    save_tensors(image, folder / "image.pt")
    save_tensors(text, folder / "text.pt")
    row_of_image = {str(caption): int(row) for caption, row in enumerate(image_of_caption)}
    save_json(row_of_image, folder / "cap_id_to_img_id.json")
    save_json(captions, folder / "captions.json")
    save_json(images, folder / "images.json")
    save_json(meta, folder / "meta.json", indent=1)


def clear_meta(folder):
    """Begin to write a split: without its meta.json it is unfinished."""
    for file in ("meta.json", "relevance.json"):
        (folder / file).unlink(missing_ok=True)


def move_shards(source, folder, index, image_of_caption, meta):
    """Move shards that are complete from another folder, and finish the split.

    A shard that is only in `folder` was moved there by a run that was stopped.

    Args: index, image_of_caption: as `finish_shards` has them.
    """
    clear_meta(folder)
    for kind, shards in index.items():
        for number in range(len(shards)):
            for stem in (kind, NAMES_OF[kind]):
                file = shard_file(source, stem, number)
                if file.exists():
                    os.replace(file, shard_file(folder, stem, number))
    finish_shards(folder, index, image_of_caption, meta)


def finish_shards(folder, index, image_of_caption, meta):
    """Write what stands beside the shards, meta.json last; remove what an older cache left.

    Args:
        index: {"image": [[rows, SHA-256], ...], "text": the same}.
        image_of_caption: (M,) int64.
    """
    for file in IN_ONE:
        (folder / file).unlink(missing_ok=True)
    _remove_shards(folder, {kind: len(shards) for kind, shards in index.items()})
    save_tensors(image_of_caption, folder / "image_of_caption.pt")
    map_sum = sha256(folder / "image_of_caption.pt")
    shards = {**index, "image_of_caption": map_sum}
    save_json({**meta, "shards": shards}, folder / "meta.json", indent=1)


def write_shard(folder, kind, number, z, names):
    """Write embeddings (n, D) and the names of their rows. Returns: their entry in the index."""
    file = shard_file(folder, kind, number)
    save_tensors(z.clone(), file)  # a view would save its whole storage
    save_json(names, shard_file(folder, NAMES_OF[kind], number))
    return [len(z), sha256(file)]


def _write_shards(folder, kind, z, names, rows):
    """Write embeddings (N, D) in shards with the names of their rows; returns their index."""
    index = []
    for number, part in enumerate(z.split(rows)):
        start = number * rows
        index.append(write_shard(folder, kind, number, part, names[start : start + rows]))
    return index


def _remove_shards(folder, kept=None):
    """Remove the shards of a split, except the first ones.

    Args:
        kept: {"image": how many stay, "text": how many}; None: none.
    """
    kept = kept or {}
    (folder / "image_of_caption.pt").unlink(missing_ok=True)
    for kind, names in NAMES_OF.items():
        for file in (*folder.glob(f"{kind}-*.pt"), *folder.glob(f"{names}-*.json")):
            _, _, number = file.stem.partition("-")
            if number.isdecimal() and int(number) >= kept.get(kind, 0):
                file.unlink()
