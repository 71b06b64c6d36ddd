"""Pictures and captions in, frozen CLIP embeddings out: embeddings/<name>/<split>/ (datasets/embedding.py).

    python cache_embeddings.py --dataset shapes
    python cache_embeddings.py --dataset coco --data-root data/coco
    python cache_embeddings.py --name coco --texts my_prompts.txt

The embeddings are raw, not normalised. This is the only script that loads CLIP, but for eval.py --prompts.
"""

import contextlib
import logging
import os
import sys
import time
from pathlib import Path

import torch

from datasets import embedding
from datasets.embedding import ROOT
from datasets.registry import DATASETS
from datasets.texts import CHAINS, LADDER, are_written, flatten, read_texts, write_texts
from datasets.units import UnitStore, check_other_splits, is_finished, lock_file
from utils.cli import Parser, folder_name, need, positive, run_script, torchrun_rank, whole_number
from utils.device import PRECISIONS, pick_device, pick_precision, precision_name
from utils.distributed import PATIENCE, first_rank_first, is_first, joined, stop_together, sum_over_ranks
from utils.embed import CHUNK, embed_units, encode_texts, to_dtype, versions
from utils.files import locked
from utils.preprocess import ClipId, load_clip

DTYPES = ("float16", "float32")
WORKERS = max(1, min(16, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))  # a rank


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    if args.texts:
        cache_texts(args, device)
        return
    with joined(torch.device("cpu"), PATIENCE):  # ranks tell each other that they are done, never tensors of a GPU
        cache_data_set(args, DATASETS[args.dataset], device)
        logging.info("next: python train.py --dataset %s --method asymvlm-psd", args.name)


def parse(argv):
    parser = Parser(description="Store the CLIP embeddings of a data set.")
    add = parser.add_argument
    add("--dataset", default="coco", choices=sorted(DATASETS))
    add("--data-root", help="folder of the data set's files, or a pattern of tars (default: data/<dataset>)")
    add("--split", nargs="+", type=folder_name, default=["train", "val"])
    add("--model", help="open_clip model or a .json configuration (default: ViT-B-32-quickgelu; shapes: its own)")
    add("--pretrained", help="open_clip tag or a local weights file (default: openai; shapes: its own)")
    add(
        "--name", type=folder_name, help="folder under embeddings/, --dataset to the other scripts (default: --dataset)"
    )
    add("--batch-size", type=positive, default=CHUNK, help="pictures that a worker hands over at a time")
    add("--workers", type=whole_number, default=WORKERS, help="processes that decode pictures, a rank; 0: none")
    add("--device", default="auto")
    add("--precision", default="auto", choices=("auto", *PRECISIONS))
    add("--dtype", default="float16", choices=DTYPES, help="of the stored embeddings")
    add("--overwrite", action="store_true", help="make a cache anew; the old one stays until the new one is complete")
    broken = parser.add_mutually_exclusive_group()
    broken.add_argument("--max-broken", type=whole_number, default=0, help="so many broken samples are left out")
    broken.add_argument("--skip-broken", action="store_true", help="all of them are, and listed in meta.json")
    add("--shard-rows", type=positive, help="write files of so many rows, which train.py reads without loading them")
    add("--texts", help="embed these for an existing cache: a text a line, or a .csv with a column 'captions'")
    add("--csv-img-key", default="filepath", help="--dataset csv: the column of the image files (default: filepath)")
    add("--csv-caption-key", default="title", help="--dataset csv: the column of the captions (default: title)")
    add("--csv-group-key", help="--dataset csv: rows with one value here are right for each other, such as of a class")
    add("--csv-separator", help="--dataset csv: what parts the columns (default: a comma in .csv, a tab in .tsv)")
    args = parser.parse_args(argv)
    args.name = args.name or args.dataset
    args.max_broken = float("inf") if args.skip_broken else args.max_broken
    if args.texts and torchrun_rank()[1] > 1:
        parser.error("--texts: takes a moment; call it without torchrun")
    if DATASETS[args.dataset].one_split and not args.texts:
        if len(args.split) > 1:
            parser.error(f"--dataset {args.dataset}: the tars are one split; name it, such as --split train")
        if args.shard_rows:
            parser.error(f"--shard-rows: --dataset {args.dataset} has a file a tar instead")
    return args


def cache_data_set(args, data_set, device):
    """Cache the splits of a data set that are not cached yet, and its texts; the ranks of torchrun share the work."""
    flags = {flag: getattr(args, flag) for flag in data_set.flags}
    splits = open_splits(data_set, args.data_root or f"data/{args.dataset}", args.split, flags)
    precision = pick_precision(args.precision, device)
    clip_id = ClipId.of(args.model or data_set.model, args.pretrained or data_set.pretrained, precision_name(precision))
    check_other_splits(args.name, args.split, clip_id)
    # what two caches must share to be the same: data set, CLIP, precision, dtype, and what the split is made of
    common = {"dataset": args.dataset, **clip_id.readable(), "precision": clip_id.precision, "dtype": args.dtype}
    shards = {"shard_rows": args.shard_rows} if args.shard_rows else {}
    settings = {name: common | split.fingerprint() | shards for name, split in splits.items()}
    waiting = [name for name, split in splits.items() if not is_cached(args, name, split, settings[name])]
    texts = {LADDER: (list(data_set.ladder), None)}  # stem -> (texts, chains or None)
    texts |= {CHAINS: flatten(data_set.chains())} if data_set.chains else {}
    texts = {stem: text for stem, text in texts.items() if waiting or not are_written(args.name, stem, *text, clip_id)}
    if not waiting and not texts:
        return
    clip = load_clip(clip_id.model, clip_id.pretrained, device, precision)
    for name in waiting:
        cache_split(args, name, splits[name], clip, settings[name])
    if is_first():
        for stem, (lines, chains) in texts.items():
            z = to_dtype(encode_texts(clip, lines), getattr(torch, args.dtype), lines)
            write_texts(args.name, stem, z, lines, clip.info, chains)


def open_splits(data_set, root, names, flags):
    """The splits of these names, {name: Split}, with their lists read and checked; drawn if the data set can be."""
    with first_rank_first():  # the others find what it has made
        if data_set.make and not Path(root).exists():
            data_set.make(Path(root))
    return {name: data_set.reader(root, name, data_set.layout, **flags) for name in names}


def is_cached(args, name, split, settings):
    """Whether a split is there already and is to stay."""
    return not args.overwrite and is_finished(args.name, name, settings, split.state(), args.max_broken)


def cache_split(args, name, split, clip, settings):
    """Embed and write one split, under a lock, unless another run has done it since this one looked."""
    folder = ROOT / args.name / name
    with locked(lock_file(folder), folder) if is_first() else contextlib.nullcontext():
        with stop_together():  # the first rank holds the lock, and says whether the split is still to be made
            is_cached_now = is_first() and is_cached(args, name, split, settings)
        if not sum_over_ranks(is_cached_now):
            embed_split(args, folder, split, clip, settings)


def embed_split(args, folder, split, clip, settings):
    """Embed a split unit by unit, and write it when all are there: a run that was killed goes on with the others.

    Every rank embeds its share of the units and keeps them in one shared folder; the first makes the cache of them.
    """
    start = time.perf_counter()
    made_with = {"device": torch.device(clip.device).type, "versions": versions()}  # units of others are not mixed in
    with first_rank_first():  # the others compare their settings with what it has begun
        store = UnitStore(folder, settings | made_with, getattr(torch, args.dtype), args.max_broken, args.overwrite)
    with stop_together():  # an error of one rank stops all
        embed_units(split.units(), clip, store, args.batch_size, args.workers)
    with stop_together():
        if is_first():
            meta = split.assemble(store, folder, {"split": folder.name, **settings, **clip.info})
            store.remove()
            if meta["skipped"]:
                note = "note: %d broken images and their captions are left out; meta.json lists them under 'skipped'"
                logging.warning(note, len(meta["skipped"]))
            counts = (meta["image_count"], meta["caption_count"], meta["embed_dim"])
            seconds = time.perf_counter() - start
            logging.info("%s: %d images, %d captions, %d wide, in %.0f s", folder, *counts, seconds)


def cache_texts(args, device):
    """Embed the texts of a file with the CLIP that made the cache, in the precision that it was made in."""
    stem = Path(args.texts).stem
    taken = f"{stem!r} is the name of the data set's own texts; give the file another name"
    need(stem not in (LADDER, CHAINS), f"--texts {args.texts}: {taken}")
    texts, chains = read_texts(Path(args.texts))
    clip_id = embedding.clip_id(args.name)
    clip = clip_id.load(device, args.model, args.pretrained, args.precision)
    z = to_dtype(encode_texts(clip, texts), clip_id.dtype, texts)
    with locked(ROOT / args.name / "texts" / f".{stem}.lock", f"--texts {args.texts}"):
        write_texts(args.name, stem, z, texts, clip.info, chains)
    logging.info("%s: %d texts", ROOT / args.name / "texts" / stem, len(texts))


if __name__ == "__main__":
    sys.exit(run_script(main))
