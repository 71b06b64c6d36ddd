"""Store the frozen CLIP embeddings of a data set in embeddings/<name>/<split>/.

    python cache_embeddings.py --dataset shapes
    python cache_embeddings.py --dataset coco --data-root data/coco
    python cache_embeddings.py --name coco --texts my_prompts.txt

The embeddings are raw, not normalised. Besides eval.py --prompts, this is the only script that
loads a CLIP. datasets/embedding.py describes the files.
"""

import contextlib
import logging
import os
import sys
import time
from pathlib import Path

import torch

from datasets import embedding
from datasets.arrays import ARRAY_SUFFIXES, read_text_arrays
from datasets.embedding import ARRAYS, ROOT, SMALL_CACHE
from datasets.registry import DATASETS
from datasets.texts import CHAINS, LADDER, are_written, flatten, read_texts, write_texts
from datasets.units import UnitStore, check_other_splits, is_finished, lock_file
from utils.cli import (
    Parser,
    folder_name,
    need,
    non_negative,
    positive,
    run_script,
    torchrun_rank,
    whole_number,
)
from utils.device import PRECISIONS, device_name, pick_device, pick_precision, precision_name
from utils.distributed import (
    PATIENCE,
    first_rank_first,
    is_first,
    joined,
    stop_together,
    sum_over_ranks,
)
from utils.embed import CHUNK, embed_units, encode_texts, to_dtype, versions
from utils.files import load_json, locked
from utils.preprocess import ClipId, load_clip

DTYPES = ("float16", "float32")
RANKS_HERE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this machine, as torchrun says
WORKERS = max(1, min(32, (os.cpu_count() or 1) // RANKS_HERE))  # per rank


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    if args.texts:
        cache_texts(args, device)
        return
    # The ranks exchange only counts, on the CPU.
    with joined(torch.device("cpu"), PATIENCE):
        try:
            cache_data_set(args, DATASETS[args.dataset], device)
        except KeyboardInterrupt:
            cure = "run the same command again to continue"
            if args.overwrite:
                cure += "; leave out of --split what is finished"
            raise KeyboardInterrupt(cure) from None
        is_trained = any(Path("checkpoints", args.name).glob("*/*.pt"))
        meta = ROOT / args.name / "train" / "meta.json"
        if meta.exists() and not is_trained:
            logging.info("next: %s", next_command(args.name, load_json(meta)))


def next_command(name, meta):
    """The command that trains on a cache, with the recipe for its size.

    Args: meta: content of the meta.json of its train split.
    """
    command = f"python train.py --dataset {name} --method asymvlm-psd"
    captions = meta.get("caption_count")
    if isinstance(captions, int) and captions < SMALL_CACHE:
        command += " --recipe small"
    return command


def parse(argv):
    parser = Parser(description="Store the CLIP embeddings of a data set.")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="coco", choices=sorted(DATASETS), help="data set (default: coco)")
    add(
        "--data-root",
        help="folder of the data set's files, or a pattern of tars (default: data/<dataset>)",
    )
    add("--split", nargs="+", type=folder_name, default=["train", "val"], help="splits to cache")
    add(
        "--name",
        type=folder_name,
        help="folder in embeddings/, which the other scripts call --dataset (default: --dataset)",
    )
    add(
        "--texts",
        help="add the texts of a file to an existing cache: one per line, or a .csv or .tsv with a "
        "column 'captions'; or their embeddings, FILE.npy, with FILE.txt beside it",
    )
    broken = parser.add_mutually_exclusive_group()
    broken.add_argument(
        "--max-broken",
        type=whole_number,
        default=0,
        help="leave out up to this many broken samples (default: 0)",
    )
    broken.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out all broken samples; meta.json lists them",
    )
    add_table_flags(parser)
    add_array_flags(parser)
    add_folder_flags(parser)
    add_model_flags(parser)
    args = parser.parse_args(argv)
    args.name = args.name or args.dataset
    if args.skip_broken:
        args.max_broken = float("inf")
    check_flags(parser, args)
    return args


def add_table_flags(parser):
    add = parser.add_argument_group("--dataset csv").add_argument
    add(
        "--csv-img-key",
        default="filepath",
        help="column of the image files (default: filepath)",
    )
    add(
        "--csv-caption-key",
        default="title",
        help="column of the captions (default: title)",
    )
    add(
        "--csv-group-key",
        help="column of groups, such as classes: images and captions of one group are right for "
        "each other",
    )
    add(
        "--csv-quoting",
        choices=("minimal", "none"),
        default="minimal",
        help="none: quotation marks are part of the text, as in CC3M and CC12M (default: minimal)",
    )
    add(
        "--csv-caption-lists",
        action="store_true",
        help="take a caption that is a list in JSON as several captions of the image",
    )
    add(
        "--csv-separator",
        help="what separates the columns (default: a comma in .csv, a tab in .tsv)",
    )


def add_folder_flags(parser):
    add = parser.add_argument_group("--dataset imagefolder").add_argument
    add(
        "--templates",
        metavar="FILE",
        help='prompts for the classes, one per line, such as "a photo of a {}" (default: five)',
    )


def add_array_flags(parser):
    add = parser.add_argument_group("--dataset arrays").add_argument
    add(
        "--logit-scale",
        type=non_negative,
        help="what the encoder multiplies its cosines by (default: not known; eval.py takes 100)",
    )


def add_model_flags(parser):
    add = parser.add_argument_group("CLIP and cache").add_argument
    add(
        "--model",
        help="open_clip model, a .json configuration, hf-hub:OWNER/NAME or local-dir:FOLDER "
        "(default: ViT-B-32-quickgelu; shapes has its own)",
    )
    add(
        "--pretrained",
        help="open_clip tag or a local weights file (default: openai; shapes has its own)",
    )
    add(
        "--batch-size",
        type=positive,
        default=CHUNK,
        help="images that a worker hands over at a time, rounded up to a multiple of 64, or of 256 "
        "on a GPU",
    )
    add(
        "--workers",
        type=whole_number,
        default=WORKERS,
        help="processes per rank that decode images; 0: the main process decodes them",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    add("--precision", default="auto", choices=("auto", *PRECISIONS), help="of matrix products")
    add("--dtype", default="float16", choices=DTYPES, help="of the stored embeddings")
    add(
        "--shard-rows",
        type=positive,
        help="write files of this many rows, which train.py reads without loading all of them",
    )
    add(
        "--overwrite",
        action="store_true",
        help="rebuild a cache; the old one stays until all new embeddings are computed",
    )


def check_flags(parser, args):
    """Exit with a message if the flags do not fit together."""
    _, ranks = torchrun_rank()
    if args.texts:
        if ranks > 1:
            parser.error("--texts: takes a moment; call it without torchrun")
        return
    if args.logit_scale == 0:
        parser.error("--logit-scale 0: give a number above 0")
    if args.shard_rows and args.dataset in ("arrays", "webdataset"):
        cure = "leave it out"
        parser.error(f"--shard-rows: --dataset {args.dataset} has shards of its own; {cure}")
    if DATASETS[args.dataset].one_split and len(args.split) > 1:
        cure = "name it, such as --split train"
        parser.error(f"--dataset {args.dataset}: the tars are one split; {cure}")


def cache_data_set(args, data_set, device):
    """Cache the splits of a data set that are not cached yet, and its texts.

    The ranks of torchrun share the work.
    """
    splits = open_splits(args, data_set)
    precision = pick_precision(args.precision, device)
    clip_id = clip_of(args, data_set, precision)
    check_other_splits(args.name, args.split, clip_id)
    settings = {name: settings_of(args, split, clip_id) for name, split in splits.items()}
    waiting = [
        name for name, split in splits.items() if not is_cached(args, name, split, settings[name])
    ]
    texts = texts_of(data_set)
    if not waiting:  # When a split is embedded, its texts are embedded again, too.
        texts = missing_texts(args.name, texts, clip_id)
    if not waiting and not texts:
        return
    clip = None
    if data_set.model is not None:
        clip = load_clip(clip_id.model, clip_id.pretrained, device, precision)
    for name in waiting:
        cache_split(args, name, splits[name], clip, settings[name])
    if is_first():
        for stem, (lines, chains) in texts.items():
            z = to_dtype(encode_texts(clip, lines), getattr(torch, args.dtype), lines)
            write_texts(args.name, stem, z, lines, clip.info, chains)


def clip_of(args, data_set, precision):
    """The ClipId of the CLIP that embeds a data set, or of none if it has embeddings already."""
    if data_set.model is None:
        flags = [flag for flag in ("model", "pretrained") if getattr(args, flag)]
        problem = f"--dataset {args.dataset}: its embeddings are there already"
        cure = "leave out --model and --pretrained"
        need(not flags, f"--{' --'.join(flags)}: {problem}; {cure}")
        return ClipId(ARRAYS, None)
    model = args.model or data_set.model
    return ClipId.of(model, args.pretrained or data_set.pretrained, precision_name(precision))


def open_splits(args, data_set):
    """The splits of --split, {name: Split}, with their lists read and checked.

    A built-in data set is generated first if its folder does not exist.
    """
    root = args.data_root or f"data/{args.dataset}"
    with first_rank_first():  # the others find what it has made
        if data_set.make and not Path(root).exists():
            data_set.make(Path(root))
    flags = {flag: getattr(args, flag) for flag in data_set.flags}
    splits = {}
    for name in args.split:
        splits[name] = data_set.reader(root, name, data_set.layout, **flags)
        splits[name].check_broken(args.max_broken)
    return splits


def settings_of(args, split, clip_id):
    """The settings of a cache of this split. A finished cache with other settings is refused."""
    settings = {
        "dataset": args.dataset,
        **clip_id.readable(),
        "precision": clip_id.precision,
        "dtype": args.dtype,
        **split.fingerprint(),
    }
    if args.shard_rows:
        settings["shard_rows"] = args.shard_rows
    return settings


def texts_of(data_set):
    """The further texts of a data set: {stem: (texts, chains or None)}."""
    texts = {}
    if data_set.ladder:
        texts[LADDER] = (list(data_set.ladder), None)
    if data_set.chains:
        texts[CHAINS] = flatten(data_set.chains())
    return texts


def missing_texts(name, texts, clip_id):
    """The texts, in the form of `texts_of`, that a cache does not have yet from this CLIP."""
    missing = {}
    for stem, (lines, chains) in texts.items():
        if not are_written(name, stem, lines, chains, clip_id):
            missing[stem] = (lines, chains)
    return missing


def is_cached(args, name, split, settings):
    """Whether a split is cached already and is to stay."""
    if args.overwrite:
        return False
    return is_finished(args.name, name, settings, split.state(), args.max_broken)


def cache_split(args, name, split, clip, settings):
    """Embed and write one split, under a lock, unless another run has done so in the meantime."""
    folder = ROOT / args.name / name
    with locked(lock_file(folder), folder) if is_first() else contextlib.nullcontext():
        with stop_together():  # the first rank holds the lock, and decides for all
            is_cached_now = is_first() and is_cached(args, name, split, settings)
        if not sum_over_ranks(is_cached_now):
            embed_split(args, folder, split, clip, settings)


def embed_split(args, folder, split, clip, settings):
    """Embed a split unit by unit, and write it when all are finished.

    After a run was killed, the same command goes on with the missing units. Every rank embeds its
    share of them, and keeps them in one shared folder; the first rank makes the cache.
    """
    start = time.perf_counter()
    # Units that other devices or versions made are not mixed in.
    device = torch.device("cpu" if clip is None else clip.device)
    made_with = {"device": device_name(device), "versions": versions()}
    with first_rank_first():  # the others compare their settings with what it has begun
        store = UnitStore(
            folder,
            {**settings, **made_with},
            getattr(torch, args.dtype),
            args.max_broken,
            args.overwrite,
        )
    with stop_together():  # an error of one rank stops all
        if clip is not None:
            embed_units(split.units(), clip, store, args.batch_size, args.workers)
    with stop_together():
        if is_first():
            meta = {"split": folder.name, **settings, **(clip.info if clip else {})}
            meta = split.assemble(store, folder, meta)
            store.remove()
            report(folder, meta, time.perf_counter() - start)


def report(folder, meta, seconds):
    """Log what was cached."""
    if meta["skipped"]:
        logging.warning(
            "note: broken samples left out: %d; meta.json lists them under 'skipped'",
            len(meta["skipped"]),
        )
    logging.info(
        "%s: %d images, %d captions, %d wide, in %.0f s",
        folder,
        meta["image_count"],
        meta["caption_count"],
        meta["embed_dim"],
        seconds,
    )


def cache_texts(args, device):
    """Add the texts of a file, embedded with the cache's CLIP or with embeddings of their own.

    The precision is the cache's unless --precision is given.
    """
    path = Path(args.texts)
    stem = path.stem
    problem = f"{stem!r} is a name that the cache uses itself"
    is_free = stem not in (LADDER, CHAINS, "meta")
    need(is_free, f"--texts {args.texts}: {problem}; give the file another name")
    if path.suffix.lower() in ARRAY_SUFFIXES:
        z, texts = read_text_arrays(path)
        check_width(path, z.shape[1], ROOT / args.name)
        chains = None
        made_by = {}
    else:
        texts, chains = read_texts(path, args.csv_quoting)
        clip_id = embedding.clip_id(args.name)
        clip = clip_id.load(device, args.model, args.pretrained, args.precision)
        z = to_dtype(encode_texts(clip, texts), clip_id.dtype, texts)
        made_by = clip.info
    folder = ROOT / args.name / "texts"
    with locked(folder / f".{stem}.lock", f"--texts {args.texts}"):
        write_texts(args.name, stem, z, texts, made_by, chains)
    logging.info("%s: %d texts", folder / stem, len(texts))


def check_width(file, width, cache):
    """Raise a UserError if there is no cache in a folder, or one of another width than a file."""
    splits = [folder.name for folder in sorted(cache.glob("*")) if embedding.is_cache(folder)]
    cure = "make the cache first, or give its --name"
    need(splits, f"--texts {file}: there is no cache in {cache} to add it to; {cure}")
    expected = embedding.EmbeddingCache(cache.name, splits[0], mapped=True).embed_dim
    problem = f"its embeddings are {width} wide, those of the cache {expected}"
    need(width == expected, f"--texts {file}: {problem}; embed the texts with the cache's model")


if __name__ == "__main__":
    sys.exit(run_script(main))
