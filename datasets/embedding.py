"""The embeddings on disk: what cache_embeddings.py computed in, one folder a split out; and the way back, checked, for train.py and eval.py.

    embeddings/<name>/<split>/image.pt  text.pt             (N, D) and (M, D), raw, float16 or float32
                              cap_id_to_img_id.json         {caption row as a string: image row}
                              captions.json  images.json    texts and file names, in row order
                              relevance.json                a list of image rows for every caption, where more than one is right
                              meta.json                     how they were made; written last
                              .parts/                       while they are unfinished (datasets/parts.py)
    embeddings/<name>/texts/<stem>.{pt,json}                further texts, the prompt ladder among them

The first three files are the paper repository's; a cache that has only these is accepted. What is too large for one file lies in many
(datasets/shards.py), and is read through the same class.
"""

import functools
import hashlib
from pathlib import Path

import numpy as np
import torch

from datasets import DATASETS
from datasets.shards import (
    BUFFER,
    Shards,
    check_finite,
    check_index,
    compare_sum,
    finish_shards,
    in_batches,
    remove_shards,
    shuffled,
    write_shards,
)
from utils.cli import UserError
from utils.files import differences, load_json, load_tensors, save_json, save_tensors
from utils.files import digest as sums_of
from utils.preprocess import known_as

ROOT = Path("embeddings")
LADDER = "ladder"  # the stem of the prompt ladder among the texts
CHAINS = "chains"  # that of a data set's own chains
FIRST = ("image.pt", "image-00000.pt")  # one of them is in every split
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what an embedding may be stored in


class EmbeddingCache:
    """One split of a cache.

    Args: name: the folder under embeddings/. split: "train", "val", ... root: the folder embeddings/ itself. mapped: leave embeddings that lie in
    many files on the disk, and their captions and file names unread; without it they are loaded, like any others.
    Attributes:
        image (N, D), text (M, D): raw embeddings. image_of_caption (M,) int64: image rows. mapped: whether they are on the disk.
        captions: M texts or None. images: N file names or None. relevance: M lists of image rows or None. meta: dict, empty if unknown.
        annotated: the caption rows for which relevance was looked into, as meta.json has them, or None: for all.
    Raises: UserError that names the file and what is wrong with it, or the command that makes a missing cache.
    """

    def __init__(self, name, split, root=ROOT, mapped=False):
        self.name, self.split, self.folder, self.device = name, split, Path(root) / name / split, torch.device("cpu")
        if (self.folder / ".parts").exists() and not (self.folder / "meta.json").exists():
            raise UserError(
                f"{self.folder}: unfinished; run cache_embeddings.py again with the same flags, and it goes on where it stopped"
            )
        if not any((self.folder / file).exists() for file in FIRST):
            raise UserError(_missing(name, split, Path(root)))
        self.meta = load_json(self.folder / "meta.json") if (self.folder / "meta.json").exists() else {}
        if not isinstance(self.meta, dict):
            raise UserError(f"{self.folder / 'meta.json'}: not an object; make the cache anew")
        self.mapped = mapped and "shards" in self.meta
        self.captions = self.images = None
        if "shards" in self.meta:
            self._open_shards()
        else:
            self.image = _load_embeddings(self.folder / "image.pt")
            self.text = _load_embeddings(self.folder / "text.pt")
            if self.image.shape[1] != self.text.shape[1]:
                widths = f"{self.image.shape[1]} and {self.text.shape[1]} wide"
                raise UserError(
                    f"{self.folder}: image.pt and text.pt are {widths}; image and text embeddings must come from one CLIP"
                )
            self.image_of_caption = _load_map(self.folder / "cap_id_to_img_id.json", len(self.text), len(self.image))
            self.captions = self._optional_list("captions.json", len(self.text), str)
            self.images = self._optional_list("images.json", len(self.image), str)
        self.relevance = None if self.mapped else self._optional_list("relevance.json", len(self.text), list)
        if self.relevance is not None:
            _check_relevance(self.folder / "relevance.json", self.relevance, len(self.image))
            if self.captions is None:
                raise UserError(
                    f"{self.folder / 'captions.json'}: no such file, and relevance.json is of use only with it; make the cache anew"
                )
        self.annotated = self.meta.get("annotated")
        if self.annotated is not None:
            _check_annotated(self.folder / "meta.json", self.annotated, len(self.text))
        scale = self.meta.get("logit_scale")
        if scale is not None and not (isinstance(scale, int | float) and 0 < scale < float("inf")):
            raise UserError(
                f"{self.folder / 'meta.json'}: logit_scale is {scale!r}, expected a positive number; make the cache anew"
            )

    @property
    def embed_dim(self):
        """D."""
        return self.image.shape[1]

    def _open_shards(self):
        """Find the files of a cache in many, and read them unless it is mapped."""
        index, path = self.meta["shards"], self.folder / "meta.json"
        check_index(path, index)
        width, dtype = self.meta.get("embed_dim"), getattr(torch, str(self.meta.get("dtype")), None)
        if type(width) is not int or width < 1 or dtype not in FLOATS:
            raise UserError(f"{path}: does not tell embed_dim and dtype of its files; make the cache anew")
        self.image, self.text = (Shards(self.folder, kind, index[kind], width, dtype) for kind in ("image", "text"))
        self.image_of_caption = _load_rows(
            self.folder / "image_of_caption.pt", len(self.text), len(self.image), index["image_of_caption"]
        )
        if not self.mapped:
            self.image, self.text = (shards.whole() for shards in (self.image, self.text))
            self.captions, self.images = (
                self._lists(kind, index[of]) for kind, of in (("captions", "text"), ("images", "image"))
            )

    def _lists(self, kind, index):
        """The texts or file names of all files."""
        return [
            entry
            for n, (rows, _) in enumerate(index)
            for entry in self._optional_list(f"{kind}-{n:05d}.json", rows, str, needed=True)
        ]

    @functools.cached_property
    def digest(self):
        """A name for what training reads, the same for the same embeddings and map. Returns: 16 hexadecimal digits."""
        if "shards" in self.meta:
            return sums_of(self.meta["shards"])
        digest = hashlib.sha256()
        for tensor in (self.image, self.text, self.image_of_caption):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def to(self, device):
        """Move embeddings and map to a device; mapped ones follow a batch at a time. Returns: self."""
        self.device = torch.device(device)
        if not self.mapped:
            self.image, self.text, self.image_of_caption = (
                x.to(device) for x in (self.image, self.text, self.image_of_caption)
            )
        return self

    def pairs(self, captions):
        """The pairs of some captions. Args: captions (B,) int64 caption rows. Returns: (z_image (B, D), z_text (B, D)) on the cache's device."""
        image, text = self.image[self.image_of_caption[captions]], self.text[captions]
        return image.to(self.device, non_blocking=True), text.to(self.device, non_blocking=True)

    def batches(self, size, generator, buffer=BUFFER):
        """The captions of an epoch in random order, (B,) int64 rows at a time; the last batch may be smaller.

        Args: size: B. generator: torch.Generator on the CPU. buffer: captions that are shuffled together if the cache is mapped
        (`datasets.shards.shuffled` says what that costs).
        """
        if self.mapped:
            return in_batches(shuffled([rows for rows, _ in self.meta["shards"]["text"]], buffer, generator), size)
        return torch.randperm(len(self.text), generator=generator).to(self.device).split(size)

    @functools.cached_property
    def right_images(self):
        """The images that are right for each caption, its own among them, where more than one may be: M ascending arrays of image rows."""
        return [
            np.unique([*rows, own]) for rows, own in zip(self.relevance, self.image_of_caption.tolist(), strict=True)
        ]

    @functools.cached_property
    def right_captions(self):
        """The captions that are right for each image: N ascending arrays of caption rows, empty for an image that no caption describes."""
        captions = np.repeat(np.arange(len(self.right_images)), [len(rows) for rows in self.right_images])
        images = np.concatenate(self.right_images)
        return np.split(
            captions[np.argsort(images, kind="stable")], np.cumsum(np.bincount(images, minlength=len(self.image)))[:-1]
        )

    def _optional_list(self, file, length, kind, needed=False):
        path = self.folder / file
        if not path.exists() and not needed:
            return None
        content = load_json(path)
        if (
            not isinstance(content, list)
            or len(content) != length
            or not all(isinstance(entry, kind) for entry in content)
        ):
            raise UserError(f"{path}: expected a list of {length} entries; make the cache anew")
        return content


def write_split(folder, image, text, image_of_caption, captions, images, relevance, meta, shard_rows=None):
    """Write one split. meta.json comes last: where it is, the split is whole.

    Args: as EmbeddingCache's attributes; relevance may be None. shard_rows: rows of a file of a split in many; None: one file.
    """
    folder = Path(folder)
    (folder / "meta.json").unlink(missing_ok=True)
    if relevance is not None:
        save_json(relevance, folder / "relevance.json")
    else:
        (folder / "relevance.json").unlink(missing_ok=True)
    if shard_rows:
        index = {
            "image": write_shards(folder, image, images, "images", shard_rows),
            "text": write_shards(folder, text, captions, "captions", shard_rows),
        }
        finish_shards(folder, index, torch.as_tensor(image_of_caption, dtype=torch.int64), meta)
        return
    remove_shards(folder)
    save_tensors(image, folder / "image.pt")
    save_tensors(text, folder / "text.pt")
    save_json(
        {str(caption): int(row) for caption, row in enumerate(image_of_caption)}, folder / "cap_id_to_img_id.json"
    )
    save_json(captions, folder / "captions.json")
    save_json(images, folder / "images.json")
    save_json(meta, folder / "meta.json", indent=1)


def write_texts(name, stem, embeddings, texts, meta, chains=None, root=ROOT):
    """Write further texts: (T, D) embeddings, T texts; chains: lists of rows from general to specific, or None. The .json comes last."""
    folder = Path(root) / name / "texts"
    (folder / f"{stem}.json").unlink(missing_ok=True)
    save_tensors(embeddings, folder / f"{stem}.pt")
    save_json({"texts": texts, "chains": chains, "clip": meta}, folder / f"{stem}.json", indent=1)


def load_texts(name, stem, embed_dim=None, root=ROOT, meta=None):
    """Further texts of a cache.

    Args: embed_dim: the width that they must have, if any. meta: of the split that they are compared with: its CLIP must be theirs.
    Returns: (texts, (T, D) embeddings, chains or None), or None where there are none.

    Raises: UserError if the files do not fit each other or the cache.
    """
    path = Path(root) / name / "texts" / f"{stem}.pt"
    if not path.exists() or not path.with_suffix(".json").exists():
        return None
    z, document = _load_embeddings(path), load_json(path.with_suffix(".json"))
    texts = document.get("texts") if isinstance(document, dict) else None
    if not isinstance(texts, list) or len(texts) != len(z) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path.with_suffix('.json')}: expected {len(z)} texts; run cache_embeddings.py again")
    if embed_dim is not None and z.shape[1] != embed_dim:
        raise UserError(f"{path}: {z.shape[1]} wide, the cache is {embed_dim} wide; run cache_embeddings.py again")
    made_by = document.get("clip")
    if meta and isinstance(made_by, dict) and "pretrained_sha256" in made_by and "pretrained_sha256" in meta:
        changed = differences(known_as(made_by), known_as(meta))
        if changed:
            raise UserError(
                f"{path}: embedded with another CLIP than the cache: {changed}; embed it again, or remove it"
            )
    chains = document.get("chains")
    whole = isinstance(chains, list) and all(
        isinstance(c, list) and all(type(row) is int and 0 <= row < len(z) for row in c) for c in chains
    )
    if chains is not None and not whole:
        raise UserError(
            f"{path.with_suffix('.json')}: its chains are not lists of rows from 0 to {len(z) - 1}; run cache_embeddings.py again"
        )
    return texts, z, chains


def load_chains(name, embed_dim, root=ROOT, meta=None):
    """All texts of a cache that form chains from general to specific. Returns: {stem: what `load_texts` returns}. Raises: as `load_texts`."""
    loaded = {
        path.stem: load_texts(name, path.stem, embed_dim, root, meta)
        for path in sorted((Path(root) / name / "texts").glob("*.pt"))
    }
    return {stem: content for stem, content in loaded.items() if content is not None and content[2]}


def _load_embeddings(path):
    if not path.exists():
        raise UserError(f"{path}: no such file; make the cache anew")
    z = load_tensors(path)
    if not isinstance(z, torch.Tensor) or z.ndim != 2 or z.dtype not in FLOATS or 0 in z.shape:
        kind = f"shape {tuple(z.shape)}, {z.dtype}" if isinstance(z, torch.Tensor) else type(z).__name__
        raise UserError(f"{path}: expected a float tensor of shape (rows, width), found {kind}")
    check_finite(z, path)
    return z.detach()  # a tensor that was saved with a gradient to come would get one in training


def _load_map(path, captions, images):
    if not path.exists():
        raise UserError(f"{path}: no such file; make the cache anew")
    content = load_json(path)
    if not isinstance(content, dict) or len(content) != captions:
        raise UserError(f"{path}: expected an object with {captions} entries, one for every row of text.pt")
    rows = []
    for caption in range(captions):
        row = content.get(str(caption))
        if not isinstance(row, int) or isinstance(row, bool) or not 0 <= row < images:
            raise UserError(
                f"{path}: caption {caption} belongs to {row!r}, expected an image row from 0 to {images - 1}"
            )
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64)


def _load_rows(path, captions, images, expected):
    """The image rows of all captions of a cache in many files, mapped."""
    if not path.exists():
        raise UserError(f"{path}: no such file; make the cache anew")
    compare_sum(path, expected)
    rows = load_tensors(path, check_sums=False)
    whole = isinstance(rows, torch.Tensor) and (rows.shape, rows.dtype) == ((captions,), torch.int64)
    if not whole or not all((part >= 0).all() and (part < images).all() for part in rows.split(2**20)):
        raise UserError(f"{path}: expected {captions} image rows from 0 to {images - 1}; make the cache anew")
    return rows


def _check_relevance(path, relevance, images):
    for caption, rows in enumerate(relevance):
        if not rows or not all(
            isinstance(row, int) and not isinstance(row, bool) and 0 <= row < images for row in rows
        ):
            raise UserError(
                f"{path}: entry {caption} is not a list of image rows from 0 to {images - 1} with at least one entry"
            )


def _check_annotated(path, annotated, captions):
    is_list = isinstance(annotated, list) and annotated
    if not is_list or not all(
        isinstance(row, int) and not isinstance(row, bool) and 0 <= row < captions for row in annotated
    ):
        raise UserError(
            f"{path}: 'annotated' is not a list of caption rows from 0 to {captions - 1}; make the cache anew"
        )


def _missing(name, split, root):
    made_by = f"--dataset {name}" if name in DATASETS else f"--dataset {{{','.join(sorted(DATASETS))}}} --name {name}"
    there = sorted({path.parent.name for file in FIRST for path in (root / name).glob(f"*/{file}")})
    if there:
        found = f"no {split} split in {root / name} (found {', '.join(there)})"
        return f"--dataset {name}: {found}; run python cache_embeddings.py {made_by} --split {split}"
    caches = sorted({path.parent.parent.name for file in FIRST for path in root.glob(f"*/*/{file}")})
    found = f" (found caches: {', '.join(caches)})" if caches else ""
    hint = (
        ""
        if name == "shapes"
        else ", or start with --dataset shapes, which needs no download: python cache_embeddings.py --dataset shapes"
    )
    return (
        f"--dataset {name}: no cache in {root / name}{found}; make it with python cache_embeddings.py {made_by}{hint}"
    )
