"""Embeddings of a split in, its folder under embeddings/ out: one file of images and one of texts, or many.

In many, image-00000.pt, text-00000.pt and so on are (n, D) each; captions-00000.json and images-00000.json have their
texts and file names (of tars: sample keys), image_of_caption.pt is (M,) int64 over all files, meta.json has an index:

    "shards": {"image": [[rows, SHA-256], ...], "text": the same, "image_of_caption": SHA-256}
"""

from pathlib import Path

import torch

from datasets.rows import shard_file
from utils.files import save_json, save_tensors, sha256

IN_ONE = ("image.pt", "text.pt", "cap_id_to_img_id.json", "captions.json", "images.json")  # files of a split
NAMES_OF = {"image": "images", "text": "captions"}


def write_split(folder, image, text, image_of_caption, captions, images, relevance, meta, shard_rows=None):
    """Write one split. meta.json comes last: where it is, the split is finished.

    Args:
        folder: the split's.
        image (N, D), text (M, D): tensors as they are to be stored.
        image_of_caption: M image rows. captions: M texts. images: N file names.
        relevance: M lists of image rows, or None.
        meta: dict of plain types.
        shard_rows: rows of a file of a split in many; None: one file.
    """
    folder = Path(folder)
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
    image_of_caption = {str(caption): int(row) for caption, row in enumerate(image_of_caption)}
    save_json(image_of_caption, folder / "cap_id_to_img_id.json")
    save_json(captions, folder / "captions.json")
    save_json(images, folder / "images.json")
    save_json(meta, folder / "meta.json", indent=1)


def clear_meta(folder):
    """Begin to write a split: without its meta.json it is unfinished."""
    for file in ("meta.json", "relevance.json"):
        (folder / file).unlink(missing_ok=True)


def finish_shards(folder, index, image_of_caption, meta):
    """Write what stands beside the files of a split in many, meta.json last, and remove what an older cache left.

    Args: index: {"image": [[rows, SHA-256], ...], "text"}. image_of_caption (M,) int64. meta: dict of plain types.
    """
    for file in IN_ONE:
        (folder / file).unlink(missing_ok=True)
    _remove_shards(folder, {kind: len(shards) for kind, shards in index.items()})
    save_tensors(image_of_caption, folder / "image_of_caption.pt")
    index = index | {"image_of_caption": sha256(folder / "image_of_caption.pt")}
    save_json(meta | {"shards": index}, folder / "meta.json", indent=1)


def _write_shards(folder, kind, z, names, rows):
    """Write embeddings (N, D) in files of so many rows, each with its rows' names. Returns: [rows, SHA-256] pairs."""
    index = []
    for number, part in enumerate(z.split(rows)):
        file = shard_file(folder, kind, number)
        save_tensors(part.clone(), file)  # a view would drag its whole storage along
        names_of_part = names[number * rows : number * rows + len(part)]
        save_json(names_of_part, shard_file(folder, NAMES_OF[kind], number))
        index.append([len(part), sha256(file)])
    return index


def _remove_shards(folder, kept=None):
    """Remove the files of a split in many but the first ones: {"image": how many stay, "text"}; None: none."""
    (folder / "image_of_caption.pt").unlink(missing_ok=True)
    for kind, names in NAMES_OF.items():
        for file in (*folder.glob(f"{kind}-*.pt"), *folder.glob(f"{names}-*.json")):
            number = file.stem.partition("-")[2]
            if number.isdecimal() and int(number) >= (kept or {}).get(kind, 0):
                file.unlink()
