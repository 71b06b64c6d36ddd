"""A cache of embeddings, as cache_embeddings.py writes it and train.py and eval.py read it.

    embeddings/<name>/<split>/image.pt  text.pt        (N, D), (M, D), raw, float16 or float32
                              cap_id_to_img_id.json    {caption row as a string: image row}
                              captions.json            M texts
                              images.json              N file names
                              relevance.json           if several answers are right (source.py)
                              meta.json                how they were made; written last
                              .parts/                  while they are unfinished (units.py)

The first three files are those of the paper's repository; a cache that has only these is accepted.
Caches of tars or arrays, and those made with --shard-rows, are stored in shards instead,
image-00000.pt and so on (write.py). The same class reads them.
"""

import copy
import functools
import hashlib
from pathlib import Path

import torch

from datasets.checks import ANEW, check_meta, load_image_of_caption, load_list, load_relevance
from datasets.rows import BUFFER, RowsInMemory, SomeRows, in_batches, open_rows, shard_file
from utils.cli import UserError, need
from utils.files import clean_text, digest, load_json
from utils.preprocess import ClipId

ROOT = Path("embeddings")
ARRAYS = "arrays"  # the model of a cache that no CLIP made (arrays.py)
NORMALISED = (
    "note: the embeddings of %s have norm 1; heads are made for raw embeddings and train worse on "
    "normalised ones: use raw ones if you can"
)
SMALL_CACHE = 100_000  # captions; for fewer, --recipe small is the better choice
HELD_OUT = 20_000  # images at most; more would only make every epoch longer


class EmbeddingCache:
    """One split of a cache.

    Args:
        name, split: folders, as in embeddings/shapes/val.
        root: the folder embeddings/ itself.
        mapped: if the embeddings are in shards, leave them on disk, and do not read captions,
            file names and relevance.
    Attributes:
        image, text: Rows (N, D) and (M, D) of raw embeddings.
        image_of_caption: image rows, (M,) int64.
        captions: M texts, or None.
        images: N file names, or None.
        meta: content of meta.json; {} without one.
        relevance: as `ListSplit.relevance` has it; `judgements` has the same as lists of rows, for
            both directions.
        mapped: whether the embeddings are on disk.
        device: where `pairs` returns them.
    Raises: UserError that names the file and what is wrong with it, or the command that makes a
        missing cache.
    """

    image_of_caption: torch.Tensor
    captions: list[str] | None
    images: list[str] | None
    meta: dict
    mapped: bool
    device: torch.device

    def __init__(self, name: str, split: str, root: Path = ROOT, mapped: bool = False):
        self.folder = Path(root) / name / split
        self.device = torch.device("cpu")
        self._check_exists(name, split, Path(root))
        meta_file = self.folder / "meta.json"
        self.meta = load_json(meta_file) if meta_file.exists() else {}
        need(isinstance(self.meta, dict), f"{meta_file}: not an object; {ANEW}")
        self.mapped = mapped and "shards" in self.meta
        self.image = open_rows(self.folder, "image", self.meta, mapped)
        self.text = open_rows(self.folder, "text", self.meta, mapped)
        images, image_width = self.image.shape
        captions, text_width = self.text.shape
        problem = f"image.pt and text.pt are {image_width} and {text_width} wide"
        cure = "image and text embeddings must come from one CLIP"
        need(image_width == text_width, f"{self.folder}: {problem}; {cure}")
        self.image_of_caption = load_image_of_caption(self.folder, self.meta, captions, images)
        check_meta(meta_file, self.meta, captions)
        self.captions = None
        self.images = None
        self.relevance = None
        if not self.mapped:
            self.captions = self.names("captions", "text")
            self.images = self.names("images", "image")
            self._load_relevance(captions, images)

    def _check_exists(self, name, split, root):
        has_units = units_folder(self.folder).exists()
        is_finished = (self.folder / "meta.json").exists() or not has_units
        cure = "run cache_embeddings.py again with the same flags; it goes on where it stopped"
        need(is_finished, f"{self.folder}: unfinished; {cure}")
        if not is_cache(self.folder):
            raise UserError(_missing(name, split, root))

    def _load_relevance(self, captions, images):
        path = self.folder / "relevance.json"
        if not path.exists():
            return
        self.relevance = load_relevance(path, captions, images)
        problem = "no such file, and relevance.json is of use only with it"
        has_captions = self.captions is not None
        need(has_captions, f"{self.folder / 'captions.json'}: {problem}; {ANEW}")

    def names(self, stem: str, kind: str) -> list[str] | None:
        """The texts or file names of all rows, or None if there are none.

        Args:
            stem: of the file, "captions" or "images".
            kind: of the rows, "text" or "image".
        """
        names = []
        if "shards" in self.meta:
            for number, (rows, _) in enumerate(self.meta["shards"][kind]):
                names += load_list(shard_file(self.folder, stem, number), rows, str)
        else:
            path = self.folder / f"{stem}.json"
            if not path.exists():
                return None
            names = load_list(path, len(getattr(self, kind)), str)
        # Older caches may hold texts that cannot be written as UTF-8.
        return [name if name.isascii() else clean_text(name) for name in names]

    @property
    def clip_id(self) -> ClipId:
        """The ClipId that meta.json names, as far as it does."""
        return ClipId.of_meta(self.meta)

    def is_normalised(self) -> bool:
        """Whether the first 1,000 images and captions all have norm 1."""
        for rows in (self.image, self.text):
            first_rows = torch.arange(min(1000, len(rows)), device=rows.device)
            if not have_norm_1(rows[first_rows]):
                return False
        return True

    @property
    def embed_dim(self) -> int:
        """D."""
        return self.image.shape[1]

    def image_file(self, row: int) -> Path | None:
        """The path of an image file when it was embedded; None if it is not known."""
        folder = self.meta.get("image_folder")
        if not isinstance(folder, str) or not self.images:
            return None
        return Path(folder) / self.images[row]

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits, which change if the embeddings or image_of_caption change."""
        if "shards" in self.meta:
            return digest(self.meta["shards"])
        sums = hashlib.sha256()
        for tensor in (self.image.read(), self.text.read(), self.image_of_caption):
            sums.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            sums.update(tensor.cpu().view(torch.uint8).numpy())
        return sums.hexdigest()[:16]

    def to(self, device: str | torch.device) -> "EmbeddingCache":
        """This cache, which from now on returns pairs on a device."""
        self.device = torch.device(device)
        self.image.to(device)
        self.text.to(device)
        self.image_of_caption = self.image_of_caption.to(self.text.device)
        return self

    def of_images(self, chosen: torch.Tensor) -> "EmbeddingCache":
        """The part of this cache that belongs to some images, which reads this cache's rows.

        Args:
            chosen: (N,) bool.
        Returns: images and captions in their order here, with new row numbers. The part has the
            digest of this cache, and no judgements.
        """
        chosen = chosen.to(self.image_of_caption.device)
        images = chosen.nonzero().flatten()
        captions = chosen[self.image_of_caption].nonzero().flatten()
        problem = f"the {len(images)} images that were drawn have no caption"
        need(len(captions), f"{self.folder}: {problem}; draw more")
        part = copy.copy(self)
        part.image = SomeRows(self.image, images)
        part.text = SomeRows(self.text, captions)
        part.image_of_caption = torch.searchsorted(images, self.image_of_caption[captions])
        if self.captions:
            part.captions = [self.captions[row] for row in captions.tolist()]
        if self.images:
            part.images = [self.images[row] for row in images.tolist()]
        part.digest = self.digest
        part.relevance = None
        part.judgements = {}
        return part

    def hold_out(self, share: float, seed: int = 0) -> tuple["EmbeddingCache", "EmbeddingCache"]:
        """Draw a share of the images, with their captions, that is not trained on.

        Args:
            share: in (0, 1); at most HELD_OUT images are drawn.
        Returns: the caches of the other images, and of those that were drawn, whose embeddings are
            in memory.
        """
        images = len(self.image)
        count = min(max(round(share * images), 1), HELD_OUT)
        problem = f"a share of {share:g} of {images} images leaves none to train on"
        need(count < images, f"{self.folder}: {problem}; hold out less")
        generator = torch.Generator().manual_seed(seed)
        is_held_out = torch.zeros(images, dtype=torch.bool)
        is_held_out[torch.randperm(images, generator=generator)[:count]] = True
        others = self.of_images(~is_held_out)
        held_out = self.of_images(is_held_out)
        held_out.image = RowsInMemory(held_out.image.read())
        held_out.text = RowsInMemory(held_out.text.read())
        held_out.mapped = False
        return others, held_out.to(self.device)

    def pairs(self, captions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pairs of captions (B,), int64 rows: z_image (B, D) and z_text (B, D)."""
        return self.image[self.image_of_caption[captions]], self.text[captions]

    def batches(self, size: int, generator: torch.Generator, buffer: int = BUFFER):
        """Yield the caption rows of an epoch in random order, in batches (B,) int64.

        Args:
            size: B; the last batch may be smaller.
            generator: on the CPU.
            buffer: captions that are shuffled together if the rows are on disk; see
                `RowsOnDisk.order`.
        """
        return in_batches(self._load_each(self.text.order(generator, buffer), buffer), size)

    def _load_each(self, buffers, buffer):
        """Yield each tensor of row numbers, after the embeddings of these pairs were made ready."""
        max_rows = 2 * buffer  # images may lie in more shards than their captions
        for rows in buffers:
            self.text.load(rows, max_rows)
            self.image.load(self.image_of_caption[rows], max_rows)
            yield rows

    @functools.cached_property
    def judgements(self) -> dict:
        """The right answers, if there can be several.

        {set: {"t2i": M lists, "i2t": N lists of rows}}. Rows ascend; a list is empty if nobody
        judged the query. If only captions were judged, the lists of the images are their inverse.
        """
        if self.relevance is None or isinstance(self.relevance, dict):
            return self.relevance or {}
        image_of_caption = self.image_of_caption.tolist()
        t2i = []
        i2t = [[] for _ in range(len(self.image))]
        for caption, (rows, own) in enumerate(zip(self.relevance, image_of_caption, strict=True)):
            images = sorted({*rows, own})
            t2i.append(images)
            for image in images:
                i2t[image].append(caption)
        if self.meta.get("annotated"):  # a cache from before both directions were read
            judged = set(self.meta["annotated"])
            judged_images = {image_of_caption[caption] for caption in judged}
            t2i = _only(t2i, judged)
            i2t = _only(i2t, judged_images)
        return {"relevance": {"t2i": t2i, "i2t": i2t}}


def have_norm_1(z):
    """Whether all embeddings z (n, D) have norm 1, up to the rounding of float16."""
    norm = z.float().norm(dim=1)
    return bool(((norm - 1).abs() < 1e-3).all())


def _only(lists, queries):
    """The lists of some queries; those of the others are empty."""
    return [rows if query in queries else [] for query, rows in enumerate(lists)]


def clip_id(name):
    """The ClipId of what made a cache; `clip_id(name).load(device)` is the CLIP itself.

    Args:
        name: of the cache, embeddings/<name>.
    Raises: UserError if the cache does not say.
    """
    files = sorted((ROOT / name).glob("*/meta.json"))
    problem = f"no cache with a meta.json in {ROOT / name} to take the CLIP from"
    need(files, f"{problem}; make it with cache_embeddings.py first")
    made_by = ClipId.of_meta(load_json(files[0]), files[0].parent)
    problem = "it is made of arrays, without a CLIP, so words cannot be embedded"
    cure = (
        f"add embeddings of texts: python cache_embeddings.py --name {name} --texts FILE.npy, with "
    )
    cure += "FILE.txt beside it"
    need(made_by.model != ARRAYS, f"{ROOT / name}: {problem}; {cure}")
    problem = "does not give the CLIP, precision and dtype that made the cache"
    need(made_by.is_complete(), f"{files[0]}: {problem}; {ANEW}")
    return made_by


def is_cache(folder):
    """Whether a folder holds embeddings."""
    return (folder / "image.pt").exists() or (folder / "image-00000.pt").exists()


def units_folder(folder):
    """Where the finished units of an unfinished split are kept."""
    return folder / ".parts"


def _missing(name, split, root):
    """The message for a cache that does not exist."""
    command = f"python cache_embeddings.py --dataset {name}"
    renamed = f"--dataset DATA_SET --name {name} if the data set has another name"
    splits = sorted(path.name for path in (root / name).glob("*") if is_cache(path))
    if splits:
        problem = f"no {split} split in {root / name} (found {', '.join(splits)})"
        return f"--dataset {name}: {problem}; run {command} --split {split}, or {renamed}"
    problem = f"no cache in {root / name}"
    caches = sorted({path.parent.name for path in root.glob("*/*") if is_cache(path)})
    if caches:
        problem += f" (found caches: {', '.join(caches)})"
    message = f"--dataset {name}: {problem}; make it with {command}, or {renamed}"
    if name != "shapes":
        message += "; or start with python cache_embeddings.py --dataset shapes, "
        message += "which needs no download"
    return message
