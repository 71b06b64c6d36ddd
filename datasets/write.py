"""Embeddings of a split in, its folder under embeddings/ out: one file of images and one of texts, or shards.

As shards, image-00000.pt, text-00000.pt and so on are (n, D) each; captions-00000.json and images-00000.json have their
texts and file names (of tars: sample keys), image_of_caption.pt is (M,) int64 over all shards, meta.json has an index:

    "shards": {"image": [[rows, SHA-256], ...], "text": the same, "image_of_caption": SHA-256}
"""

import torch

from datasets.rows import shard_file
from utils.files import save_json, save_tensors, sha256

IN_ONE = ("image.pt", "text.pt", "cap_id_to_img_id.json", "captions.json", "images.json")  # not in shards
NAMES_OF = {"image": "images", "text": "captions"}


def write_split(folder, image, text, image_of_caption, captions, images, relevance, meta, shard_rows=None):
    """Write one split. meta.json comes last: where it is, the split is finished.

    Args:
        image (N, D), text (M, D): tensors as they are to be stored.
        images: N file names.
        image_of_caption, captions, relevance: as `ListSplit` has them.
        meta: dict of plain types.
        shard_rows: rows of a shard; None: no shards.
    """
    clear_meta(folder)
    if relevance is not None:
        save_json(relevance, folder / "relevance.json")
    if shard_rows:
        contents = {"image": (image, images), "text": (text, captions)}
        index = {kind: _write_shards(folder, kind, *content, shard_rows) for kind, content in contents.items()}
        finish_shards(folder, index, torch.as_tensor(image_of_caption, dtype=torch.int64), meta)
        return
    _remove_shards(folder)
    save_tensors(image, folder / "image.pt")
    save_tensors(text, folder / "text.pt")
    save_json({str(row): int(image) for row, image in enumerate(image_of_caption)}, folder / "cap_id_to_img_id.json")
    save_json(captions, folder / "captions.json")
    save_json(images, folder / "images.json")
    save_json(meta, folder / "meta.json", indent=1)


def clear_meta(folder):
    """Begin to write a split: without its meta.json it is unfinished."""
    for file in ("meta.json", "relevance.json"):
        (folder / file).unlink(missing_ok=True)


def finish_shards(folder, index, image_of_caption, meta):
    """Write what stands beside the shards of a split, meta.json last, and remove what an older cache left.

    Args: index {"image": [[rows, SHA-256], ...], "text": the same}, image_of_caption (M,) int64.
    """
    for file in IN_ONE:
        (folder / file).unlink(missing_ok=True)
    _remove_shards(folder, {kind: len(shards) for kind, shards in index.items()})
    save_tensors(image_of_caption, folder / "image_of_caption.pt")
    index = index | {"image_of_caption": sha256(folder / "image_of_caption.pt")}
    save_json(meta | {"shards": index}, folder / "meta.json", indent=1)


def _write_shards(folder, kind, z, names, rows):
    """Write embeddings (N, D) in shards of so many rows, each with its rows' names; the [rows, SHA-256] of each."""
    index = []
    for number, part in enumerate(z.split(rows)):
        file = shard_file(folder, kind, number)
        save_tensors(part.clone(), file)  # a view would drag its whole storage along
        save_json(names[number * rows : (number + 1) * rows], shard_file(folder, NAMES_OF[kind], number))
        index.append([len(part), sha256(file)])
    return index


def _remove_shards(folder, kept=None):
    """Remove the shards of a split but the first ones. kept: {"image": how many stay, "text"}; None: none."""
    (folder / "image_of_caption.pt").unlink(missing_ok=True)
    for kind, names in NAMES_OF.items():
        for file in (*folder.glob(f"{kind}-*.pt"), *folder.glob(f"{names}-*.json")):
            number = file.stem.partition("-")[2]
            if number.isdecimal() and int(number) >= (kept or {}).get(kind, 0):
                file.unlink()
