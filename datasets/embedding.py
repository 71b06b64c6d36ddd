"""The embeddings on disk: what cache_embeddings.py computed in, checked, for train.py and eval.py.

    embeddings/<name>/<split>/image.pt  text.pt             (N, D) and (M, D), raw, float16 or float32
                              cap_id_to_img_id.json         {caption row as a string: image row}
                              captions.json  images.json    texts and file names, in row order
                              relevance.json                where more than one answer is right (datasets/source.py)
                              meta.json                     how they were made; written last
                              .parts/                       while they are unfinished (datasets/units.py)

The first three files are the paper repository's; a cache that has only these is accepted. What is too large for one
file lies in shards, image-00000.pt and so on (datasets/write.py), and is read through the same class.
"""

import copy
import functools
import hashlib
from pathlib import Path

import torch

from datasets.checks import ANEW, check_meta, load_image_of_caption, load_list, load_relevance
from datasets.rows import BUFFER, RowsInMemory, SomeRows, in_batches, open_rows, shard_file
from utils.cli import UserError, need
from utils.files import digest, load_json
from utils.preprocess import ClipId

ROOT = Path("embeddings")
HELD_OUT = 20_000  # images at most: more make R@1 no surer, and every epoch longer


class EmbeddingCache:
    """One split of a cache.

    Args:
        name, split: folders, as in embeddings/shapes/val.
        root: the folder embeddings/ itself.
        mapped: leave embeddings that lie in shards on the disk, and their captions and file names unread.
    Attributes:
        image, text: Rows (N, D) and (M, D) of raw embeddings.
        image_of_caption: image rows, (M,) int64.
        captions, images: M texts, and N file names; each may be None.
        meta: of meta.json; {} without one.
        relevance: as `ListSplit.relevance` has it; `judgements` has it in one form.
        mapped: whether the embeddings are on the disk.
        device: where pairs are given.
    Raises: UserError that names the file and what is wrong with it, or the command that makes a missing cache.
    """

    def __init__(self, name, split, root=ROOT, mapped=False):
        self.folder, self.device = Path(root) / name / split, torch.device("cpu")
        meta_file, relevance_file = self.folder / "meta.json", self.folder / "relevance.json"
        cure = "run cache_embeddings.py again with the same flags, and it goes on where it stopped"
        is_unfinished = units_folder(self.folder).exists() and not meta_file.exists()
        need(not is_unfinished, f"{self.folder}: unfinished; {cure}")
        if not is_cache(self.folder):
            raise UserError(_missing(name, split, Path(root)))
        self.meta = load_json(meta_file) if meta_file.exists() else {}
        need(isinstance(self.meta, dict), f"{meta_file}: not an object; {ANEW}")
        self.mapped = mapped and "shards" in self.meta
        self.image, self.text = (open_rows(self.folder, kind, self.meta, mapped) for kind in ("image", "text"))
        (images, image_width), (captions, text_width) = self.image.shape, self.text.shape
        widths = f"image.pt and text.pt are {image_width} and {text_width} wide"
        need(image_width == text_width, f"{self.folder}: {widths}; image and text embeddings must come from one CLIP")
        self.image_of_caption = load_image_of_caption(self.folder, self.meta, captions, images)
        check_meta(meta_file, self.meta, captions)
        self.captions = self.images = self.relevance = None
        if not self.mapped:
            self.captions, self.images = self.names("captions", "text"), self.names("images", "image")
            self.relevance = load_relevance(relevance_file, captions, images) if relevance_file.exists() else None
        missing = f"{self.folder / 'captions.json'}: no such file, and relevance.json is of use only with it"
        need(self.relevance is None or self.captions is not None, f"{missing}; {ANEW}")

    def names(self, kind, of):
        """The texts or file names of all rows of "text" or "image", or None where there are none."""
        if "shards" in self.meta:
            shards = enumerate(self.meta["shards"][of])
            lists = [load_list(shard_file(self.folder, kind, n), rows, str) for n, (rows, _) in shards]
            return [entry for names in lists for entry in names]
        path = self.folder / f"{kind}.json"
        return load_list(path, len(getattr(self, of)), str) if path.exists() else None

    @property
    def clip_id(self):
        """The ClipId that meta.json names, as far as it does."""
        return ClipId.of_meta(self.meta)

    @property
    def embed_dim(self):
        """D."""
        return self.image.shape[1]

    def image_file(self, row):
        """The path of an image's picture as it was when it was embedded; None if that is not known."""
        folder = self.meta.get("image_folder")
        return Path(folder) / self.images[row] if isinstance(folder, str) and self.images else None

    @functools.cached_property
    def digest(self):
        """A name for what training reads, the same for the same embeddings and map: 16 hexadecimal digits."""
        if "shards" in self.meta:
            return digest(self.meta["shards"])
        sums = hashlib.sha256()
        for tensor in (self.image.read(), self.text.read(), self.image_of_caption):
            sums.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            sums.update(tensor.cpu().view(torch.uint8).numpy())
        return sums.hexdigest()[:16]

    def to(self, device):
        """This cache, which gives pairs on a device from now on."""
        self.device = torch.device(device)
        self.image.to(device), self.text.to(device)
        self.image_of_caption = self.image_of_caption.to(self.text.device)
        return self

    def of_images(self, chosen):
        """The part of this cache that is of some images: an EmbeddingCache that reads this one's rows.

        Args: chosen: bool, one an image, (N,).
        Returns: images and captions in the order that they have here, numbered anew. It has this cache's digest, and
            nobody looked for further right answers.
        """
        chosen = chosen.to(self.image_of_caption.device)
        images, captions = chosen.nonzero().flatten(), chosen[self.image_of_caption].nonzero().flatten()
        need(len(captions), f"{self.folder}: the {len(images)} images that were drawn have no caption; draw more")
        part = copy.copy(self)
        part.image, part.text = SomeRows(self.image, images), SomeRows(self.text, captions)
        part.image_of_caption = torch.searchsorted(images, self.image_of_caption[captions])
        part.captions = self.captions and [self.captions[row] for row in captions.tolist()]
        part.images = self.images and [self.images[row] for row in images.tolist()]
        part.digest, part.relevance, part.judgements = self.digest, None, {}
        return part

    def hold_out(self, share, seed=0):
        """Draw a share of the images, with their captions, that is not to be trained on.

        Args: share: in (0, 1); at most HELD_OUT images are drawn.
        Returns: EmbeddingCaches of the others, and of those that were drawn, whose embeddings are in memory.
        """
        images = len(self.image)
        count = min(max(round(share * images), 1), HELD_OUT)
        need(count < images, f"{self.folder}: of {images} images, {share:g} leave none to train on; hold out fewer")
        is_held = torch.zeros(images, dtype=torch.bool)
        is_held[torch.randperm(images, generator=torch.Generator().manual_seed(seed))[:count]] = True
        others, held_out = self.of_images(~is_held), self.of_images(is_held)
        held_out.image, held_out.text = (RowsInMemory(rows.read()) for rows in (held_out.image, held_out.text))
        held_out.mapped = False
        return others, held_out.to(self.device)

    def pairs(self, captions):
        """The pairs of captions (B,), int64 rows as `batches` yields them: (z_image (B, D), z_text (B, D))."""
        return self.image[self.image_of_caption[captions]], self.text[captions]

    def batches(self, size, generator, buffer=BUFFER):
        """The caption rows of an epoch in random order, in batches (B,) int64 of a size; the last may be smaller.

        Args:
            generator: torch.Generator on the CPU.
            buffer: captions that are shuffled at a time on the disk; `RowsOnDisk.order` says at what cost.
        """
        return in_batches(self.text.order(generator, buffer), size)

    @functools.cached_property
    def judgements(self):
        """The right answers, where more than one may be: {set: {"t2i": M lists of rows, "i2t": N lists of rows}}.

        Rows ascend; a list is empty where nobody looked. What was found for captions alone is inverted for images.
        """
        if self.relevance is None or isinstance(self.relevance, dict):
            return self.relevance or {}
        image_of_caption = self.image_of_caption.tolist()
        t2i = [sorted({*rows, image}) for rows, image in zip(self.relevance, image_of_caption, strict=True)]
        i2t = [[] for _ in range(len(self.image))]
        for caption, images in enumerate(t2i):
            for image in images:
                i2t[image].append(caption)
        if self.meta.get("annotated"):  # a cache from before both directions were read
            judged = set(self.meta["annotated"])
            judged_images = {image_of_caption[caption] for caption in judged}
            t2i = [rows if caption in judged else [] for caption, rows in enumerate(t2i)]
            i2t = [rows if image in judged_images else [] for image, rows in enumerate(i2t)]
        return {"relevance": {"t2i": t2i, "i2t": i2t}}


def clip_id(name):
    """The ClipId of what made the cache embeddings/<name>; `clip_id(name).load(device)` is the CLIP itself.

    Raises: UserError if the cache does not tell.
    """
    files = sorted((ROOT / name).glob("*/meta.json"))
    cure = "make it with cache_embeddings.py first"
    need(files, f"no cache with a meta.json in {ROOT / name} to take the CLIP from; {cure}")
    made_by = ClipId.of_meta(load_json(files[0]), files[0].parent)
    what = "with which CLIP, precision and dtype the cache was made"
    need(made_by.is_complete(), f"{files[0]}: does not tell {what}; make it anew")
    return made_by


def is_cache(folder):
    """Whether a folder holds embeddings."""
    return any((folder / file).exists() for file in ("image.pt", "image-00000.pt"))


def units_folder(folder):
    """Where the finished units of an unfinished split wait."""
    return folder / ".parts"


def _missing(name, split, root):
    make = f"python cache_embeddings.py --dataset {name}"
    renamed = f"--dataset DATA_SET --name {name}, where the data set has another name"
    there = sorted(path.name for path in (root / name).glob("*") if is_cache(path))
    if there:
        found = f"no {split} split in {root / name} (found {', '.join(there)})"
        return f"--dataset {name}: {found}; run {make} --split {split}, or {renamed}"
    caches = sorted({path.parent.name for path in root.glob("*/*") if is_cache(path)})
    found = f" (found caches: {', '.join(caches)})" if caches else ""
    hint = "; or start with python cache_embeddings.py --dataset shapes, which needs no download"
    hint = "" if name == "shapes" else hint
    return f"--dataset {name}: no cache in {root / name}{found}; make it with {make}, or {renamed}{hint}"
