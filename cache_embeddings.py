"""Pictures and captions in, frozen CLIP embeddings out: embeddings/<name>/<split>/, in the format of datasets/embedding.py.

    python cache_embeddings.py --dataset shapes
    python cache_embeddings.py --dataset coco --data-root data/coco
    python cache_embeddings.py --name coco --texts my_prompts.txt

The embeddings are raw, not normalised. This is the only script that loads CLIP, but for eval.py --prompts.
"""

import csv
import importlib.metadata
import logging
import os
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import DATASETS
from datasets.coco import CocoImages
from datasets.embedding import LADDER, ROOT, write_split, write_texts
from utils.cli import Parser, UserError, positive, run
from utils.device import PRECISIONS, pick_device, pick_precision
from utils.files import load_json
from utils.preprocess import load_clip, tokenize

DTYPES = ("float16", "float32")
CHUNK = 64  # rows that go through the encoder at a time: always as many, so that --batch-size does not change the bytes
VERSIONS = ("torch", "torchvision", "open_clip_torch", "pillow")  # what the embeddings' last bits depend on


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    if args.texts:
        return cache_texts(args, device)
    source = DATASETS[args.dataset]
    root = Path(args.data_root or Path("data") / args.dataset)
    if source.make and not root.exists():
        source.make(root)
    flags = {flag: getattr(args, flag) for flag in source.flags}
    splits = {split: source.reader(root, split, source.layout, **flags) for split in args.split}  # every file is checked before CLIP is loaded
    precision = pick_precision(args.precision, device)
    clip = load_clip(args.model or source.model, args.pretrained or source.pretrained, device, precision)
    for split, data in splits.items():
        cache_split(args, split, data, clip)
    write_texts(args.name or args.dataset, LADDER, encode_texts(clip, source.ladder).half(), list(source.ladder), clip.info)
    if source.chains is not None:
        texts, chains = flatten(source.chains())
        write_texts(args.name or args.dataset, "chains", encode_texts(clip, texts).half(), texts, clip.info, chains)
    logging.info("next: python train.py --dataset %s --method asymvlm-psd", args.name or args.dataset)


def parse(argv):
    parser = Parser(description="Store the CLIP embeddings of a data set.")
    parser.add_argument("--dataset", default="coco", choices=sorted(DATASETS))
    parser.add_argument("--data-root", help="folder of the data set's files (default: data/<dataset>)")
    parser.add_argument("--split", nargs="+", default=["train", "val"])
    parser.add_argument("--model", help="open_clip model or a .json configuration (default: ViT-B-32-quickgelu; shapes: its own)")
    parser.add_argument("--pretrained", help="open_clip tag or a local weights file (default: openai; shapes: its own)")
    parser.add_argument("--name", help="folder under embeddings/, which train.py and eval.py call --dataset (default: the data set's name)")
    parser.add_argument("--batch-size", type=positive, default=256, help="pictures that a worker hands over at a time")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes that decode pictures; 0: none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS))
    parser.add_argument("--dtype", default="float16", choices=DTYPES, help="of the stored embeddings")
    parser.add_argument("--texts", help="embed these texts with the CLIP of an existing cache: a text a line, or a .csv with a column 'captions'")
    parser.add_argument("--csv-img-key", default="filepath", help="--dataset csv: the column of the image files (default: filepath)")
    parser.add_argument("--csv-caption-key", default="title", help="--dataset csv: the column of the captions (default: title)")
    parser.add_argument("--csv-separator", help="--dataset csv: what parts the columns (default: a comma in .csv, a tab in .tsv)")
    args = parser.parse_args(argv)
    if args.workers < 0:
        parser.error("--workers: give a whole number of at least 0")
    return args


def cache_split(args, split, data, clip):
    """Embed one split and write it."""
    start = time.perf_counter()
    dtype = getattr(torch, args.dtype)
    image = stored(encode_images(clip, data.image_files, args.batch_size, args.workers), dtype, "image")
    text = stored(encode_texts(clip, data.captions), dtype, "text")
    if image.shape[1] != text.shape[1]:
        raise UserError(f"--model {clip.info['model']}: image embeddings are {image.shape[1]} wide, text embeddings {text.shape[1]}; choose a CLIP")
    meta = {
        "dataset": args.dataset,
        "split": split,
        **clip.info,
        "embed_dim": image.shape[1],
        "dtype": args.dtype,
        "image_count": len(image),
        "caption_count": len(text),
        "image_ids": data.image_ids,
        "caption_ids": data.caption_ids,
        **({"annotated": data.annotated} if data.annotated else {}),  # caption rows
        "versions": {package: importlib.metadata.version(package) for package in VERSIONS},
    }
    folder = ROOT / (args.name or args.dataset) / split
    write_split(folder, image, text, data.image_of_caption, data.captions, data.image_names, data.relevance, meta)
    logging.info("%s: %d images, %d captions, %d wide, in %.0f s", folder, len(image), len(text), image.shape[1], time.perf_counter() - start)


def stored(z, dtype, kind):
    """Embeddings (N, D) as they are stored. Raises: UserError if that leaves something that is not finite."""
    z = z.to(dtype)
    bad = (~torch.isfinite(z).all(dim=1)).nonzero()
    if len(bad):
        raise UserError(f"the {kind} embedding in row {int(bad[0])} is not finite; try --precision fp32 --dtype float32")
    return z


@torch.inference_mode()
def encode_images(clip, files, batch_size, workers):
    """Decode and embed pictures. Args: files: N paths. Returns: (N, D) float32 on the CPU.

    Raises: UserError after all broken files have been found and named.
    """
    batch_size = -(-batch_size // CHUNK) * CHUNK
    loader = DataLoader(CocoImages(files, clip.transform), batch_size, num_workers=workers, collate_fn=_collate)
    rows, broken = [], []
    with tqdm(total=len(files), desc="images", unit="image") as bar:
        for pictures, count, errors in loader:
            broken += errors
            if not broken:
                rows += _in_chunks(clip.model.encode_image, pictures.to(clip.dtype), clip.device)
            bar.update(count)
    for error in broken[:-1]:
        logging.error(error)
    if broken:
        raise UserError(f"{broken[-1]} ({len(broken)} broken image files in all; mend them or take them out of the captions file)")
    return torch.cat(rows)


def _collate(batch):
    """What CocoImages gave for some rows as (pictures (B, 3, H, W) or None if one is broken, B, reasons).

    One tensor a batch: every tensor that a worker hands over takes an open file, of which there may be 1024, and without any the loader hangs.
    """
    errors = [error for _, error in batch if error]
    return None if errors else torch.stack([picture for picture, _ in batch]), len(batch), errors


@torch.inference_mode()
def encode_texts(clip, texts):
    """Embed texts, each distinct one once. Args: texts: M strings. Returns: (M, D) float32 on the CPU."""
    distinct = list(dict.fromkeys(texts))
    row_of = {text: row for row, text in enumerate(distinct)}
    rows, cut, unknown = [], 0, []
    for start in tqdm(range(0, len(distinct), CHUNK), desc="texts", unit_scale=CHUNK, unit="text"):
        part = distinct[start : start + CHUNK]
        tokens, part_cut, part_unknown = tokenize(clip, part)
        cut += sum(part_cut)
        unknown += [text for text, is_unknown in zip(part, part_unknown, strict=True) if is_unknown]
        rows += _in_chunks(clip.model.encode_text, tokens, clip.device)
    if cut:
        logging.warning("note: %d texts are longer than the model reads (%d tokens); their ends are left out", cut, tokens.shape[1])
    if unknown:
        logging.warning(
            "note: %d texts have words that this CLIP has never seen, such as %r; do not trust their embeddings", len(unknown), unknown[0]
        )
    return torch.cat(rows)[[row_of[text] for text in texts]]


def _in_chunks(encode, inputs, device):
    """Encode rows CHUNK at a time, the last chunk filled up: a row's last bits depend on the size of its chunk. Returns: list of (n, D)."""
    outputs = []
    for part in inputs.split(CHUNK):
        full = torch.cat([part, part[-1:].expand(CHUNK - len(part), *part.shape[1:])]) if len(part) < CHUNK else part
        outputs.append(encode(full.to(device))[: len(part)].float().cpu())
    return outputs


def cache_texts(args, device):
    """Embed the texts of a file with the CLIP that made the cache, in the precision that it was made in."""
    name = args.name or args.dataset
    texts, chains = read_texts(Path(args.texts))
    clip, dtype = clip_of_cache(name, device, args.model, args.pretrained, args.precision)
    write_texts(name, Path(args.texts).stem, stored(encode_texts(clip, texts), dtype, "text"), texts, clip.info, chains)
    logging.info("%s: %d texts", ROOT / name / "texts" / Path(args.texts).stem, len(texts))


def clip_of_cache(name, device, model=None, pretrained=None, precision="auto"):
    """The CLIP that made a cache, as its meta.json names it.

    Args: name: folder under embeddings/. device. model, pretrained, precision: what is to be used instead.
    Returns: (Clip, dtype that the cache stores). Raises: UserError if the cache does not tell, or its CLIP cannot be loaded.
    """
    meta_file = next(iter(sorted((ROOT / name).glob("*/meta.json"))), None)
    if meta_file is None:
        raise UserError(f"no cache with a meta.json in {ROOT / name} to take the CLIP from; make it with cache_embeddings.py first")
    meta = load_json(meta_file)
    known = meta if isinstance(meta, dict) else {}
    has_clip = isinstance(known.get("model"), str) and isinstance(known.get("pretrained"), str)
    if not has_clip or known.get("precision") not in tuple(PRECISIONS) or known.get("dtype") not in DTYPES:
        raise UserError(f"{meta_file}: does not tell with which CLIP, precision and dtype the cache was made; make it anew")
    chosen = pick_precision(meta["precision"] if precision == "auto" else precision, device)
    return load_clip(model or meta["model"], pretrained or meta["pretrained"], device, chosen), getattr(torch, meta["dtype"])


def read_texts(path):
    """The texts of a file: a text a line, or a .csv whose column "captions" joins a chain, general to specific, by " => ".

    Returns: (texts, chains): chains is a list of lists of text rows, or None. Raises: UserError naming file and row.
    """
    if not path.is_file():
        raise UserError(f"--texts {path}: no such file")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix != ".csv":
                texts = [line.strip() for line in file if line.strip()]
                chains = None
            else:
                reader = csv.DictReader(file)
                if "captions" not in (reader.fieldnames or ()):
                    raise UserError(f"--texts {path}: no column 'captions' (found: {', '.join(reader.fieldnames or ('nothing',))})")
                found = []
                for row in reader:
                    found.append([text.strip() for text in (row["captions"] or "").split("=>")])
                    if not all(found[-1]):
                        raise UserError(f"--texts {path}: line {reader.line_num} has an empty caption in its chain")
                texts, chains = flatten(found)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--texts {path}: not readable as UTF-8 text ({error})") from None
    if not texts:
        raise UserError(f"--texts {path}: holds no text")
    return texts, chains


def flatten(chains):
    """Chains of texts as one list of texts, and each chain's rows in it. Args: chains: lists of strings. Returns: (texts, lists of rows)."""
    texts, rows = [], []
    for chain in chains:
        rows.append(list(range(len(texts), len(texts) + len(chain))))
        texts += chain
    return texts, rows


if __name__ == "__main__":
    sys.exit(run(main))
