"""Pictures and captions in, frozen CLIP embeddings out: embeddings/<name>/<split>/, in the format of datasets/embedding.py.

    python cache_embeddings.py --dataset shapes
    python cache_embeddings.py --dataset coco --data-root data/coco
    python cache_embeddings.py --name coco --texts my_prompts.txt

The embeddings are raw, not normalised. This is the only script that loads CLIP, but for eval.py --prompts.
"""

import contextlib
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
from datasets.coco import without
from datasets.embedding import CHAINS, FIRST, LADDER, ROOT, EmbeddingCache, load_texts, write_split, write_texts
from datasets.parts import Parts, TarParts, part_rows
from datasets.shards import finish_shards
from datasets.tars import TarSamples
from utils.cli import Parser, UserError, folder_name, positive, run, torchrun_rank, whole_number
from utils.device import PRECISIONS, pick_device, pick_precision, precision_name
from utils.distributed import (
    PATIENCE,
    broadcast_flag,
    first_rank_first,
    is_first,
    joined,
    rank,
    stop_together,
    world_size,
)
from utils.encode import (
    CHUNK,
    encode_distinct,
    encode_images,
    encode_texts,
    in_chunks,
    leave_interrupts,
    note_texts,
    stored,
)
from utils.files import differences, digest, load_json, locked
from utils.preprocess import identity, known_as, load_clip

DTYPES = ("float16", "float32")
WORKERS = max(1, min(16, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))  # a rank
VERSIONS = ("torch", "torchvision", "open_clip_torch", "pillow")  # what the embeddings' last bits depend on


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    if args.texts:
        return cache_texts(args, device)
    with joined(torch.device("cpu"), PATIENCE):
        cache_splits(args, device)


def cache_splits(args, device):
    """Cache the splits of a data set, and its texts; the ranks of torchrun share the work."""
    source, name = DATASETS[args.dataset], args.name or args.dataset
    root = args.data_root or f"data/{args.dataset}"
    with first_rank_first():
        if source.make and not Path(root).exists():
            source.make(Path(root))
    flags = {flag: getattr(args, flag) for flag in source.flags}
    splits = {
        split: source.reader(root, split, source.layout, **flags) for split in args.split
    }  # every file is checked before CLIP is loaded
    texts = {LADDER: (list(source.ladder), None)} | ({CHAINS: flatten(source.chains())} if source.chains else {})
    model, pretrained, precision = (
        args.model or source.model,
        args.pretrained or source.pretrained,
        pick_precision(args.precision, device),
    )
    clip_settings = known_as(identity(model, pretrained)) | {"precision": precision_name(precision)}
    check_other_splits(name, args.split, clip_settings)
    settings = {split: split_settings(args, data, clip_settings) for split, data in splits.items()}
    allowed = args.max_broken if args.dataset == "webdataset" else float("inf") if args.skip_broken else 0
    finished = {
        split: settings[split] | (data.state() if args.dataset == "webdataset" else {})
        for split, data in splits.items()
    }
    waiting = [split for split in splits if args.overwrite or not is_whole(name, split, finished[split], allowed)]
    waiting_texts = [stem for stem in texts if waiting or not texts_are_whole(name, stem, *texts[stem], clip_settings)]
    if waiting or waiting_texts:
        clip = load_clip(model, pretrained, device, precision)
        for split in waiting:
            folder = ROOT / name / split
            with locked(_lock(folder), folder) if is_first() else contextlib.nullcontext():
                with stop_together():  # another run may have ended since
                    ended = is_first() and not args.overwrite and is_whole(name, split, finished[split], allowed)
                if broadcast_flag(ended):
                    continue
                (cache_tars if args.dataset == "webdataset" else cache_split)(
                    args, folder, splits[split], clip, settings[split]
                )
        for stem in waiting_texts if is_first() else ():
            lines, chains = texts[stem]
            write_texts(
                name,
                stem,
                stored(encode_texts(clip, lines), getattr(torch, args.dtype), lines),
                lines,
                clip.info,
                chains,
            )
    logging.info("next: python train.py --dataset %s --method asymvlm-psd", name)


def parse(argv):
    parser = Parser(description="Store the CLIP embeddings of a data set.")
    parser.add_argument("--dataset", default="coco", choices=sorted(DATASETS))
    parser.add_argument(
        "--data-root", help="folder of the data set's files, or a pattern of tars (default: data/<dataset>)"
    )
    parser.add_argument("--split", nargs="+", type=folder_name, default=["train", "val"])
    parser.add_argument(
        "--model", help="open_clip model or a .json configuration (default: ViT-B-32-quickgelu; shapes: its own)"
    )
    parser.add_argument("--pretrained", help="open_clip tag or a local weights file (default: openai; shapes: its own)")
    parser.add_argument(
        "--name",
        type=folder_name,
        help="folder under embeddings/, --dataset to the other scripts (default: the data set's name)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=CHUNK, help="pictures that a worker hands over at a time"
    )
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes that decode pictures, a rank; 0: none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS))
    parser.add_argument("--dtype", default="float16", choices=DTYPES, help="of the stored embeddings")
    parser.add_argument(
        "--overwrite", action="store_true", help="make a cache anew; the old one stays until the new one is complete"
    )
    parser.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave broken image files and their captions out, and record them in meta.json",
    )
    parser.add_argument(
        "--max-broken",
        type=whole_number,
        default=0,
        help="--dataset webdataset: samples that may be broken and are left out (default: 0)",
    )
    parser.add_argument(
        "--shard-rows",
        type=positive,
        help="write the cache in files of so many rows, from which train.py reads without loading them",
    )
    parser.add_argument(
        "--texts",
        help="embed these texts with the CLIP of an existing cache: a text a line, or a .csv with a column 'captions'",
    )
    parser.add_argument(
        "--csv-img-key", default="filepath", help="--dataset csv: the column of the image files (default: filepath)"
    )
    parser.add_argument(
        "--csv-caption-key", default="title", help="--dataset csv: the column of the captions (default: title)"
    )
    parser.add_argument(
        "--csv-separator", help="--dataset csv: what parts the columns (default: a comma in .csv, a tab in .tsv)"
    )
    args = parser.parse_args(argv)
    if args.texts and torchrun_rank()[1] > 1:
        parser.error("--texts: takes a moment; call it without torchrun")
    if args.workers < 0:
        parser.error("--workers: give a whole number of at least 0")
    if args.dataset == "webdataset" and not args.texts:
        if len(args.split) > 1:
            parser.error("--dataset webdataset: the tars are one split; name it, such as --split train")
        if args.skip_broken or args.shard_rows:
            parser.error(
                "--dataset webdataset: takes --max-broken instead of --skip-broken, and has a file a tar instead of --shard-rows"
            )
    elif args.max_broken:
        parser.error("--max-broken: goes with --dataset webdataset; other data sets take --skip-broken")
    return args


def split_settings(args, data, clip_settings):
    """What the embeddings of a split are made with and from, readable; with other settings they are others. Returns: dict of plain types."""
    if args.dataset == "webdataset":
        return {"dataset": args.dataset, **clip_settings, "dtype": args.dtype, **data.settings()}
    images = digest([data.image_ids, data.image_names])
    captions = digest([data.caption_ids, data.captions, data.image_of_caption, data.relevance, data.annotated])
    image_list, caption_list = f"{len(data.image_ids)} images, {images}", f"{len(data.captions)} captions, {captions}"
    settings = {
        "dataset": args.dataset,
        **clip_settings,
        "dtype": args.dtype,
        "image_list": image_list,
        "caption_list": caption_list,
    }
    return settings | ({"shard_rows": args.shard_rows} if args.shard_rows else {})


def is_whole(name, split, settings, allowed):
    """Whether a split is there already, made with these settings. Args: allowed: broken images that may have been left out.

    Raises: UserError that names the difference if it was made with others.
    """
    folder = ROOT / name / split
    if not (folder / "meta.json").exists():
        if any((folder / file).exists() for file in FIRST) and not (folder / ".parts").exists():
            raise UserError(
                f"{folder}: holds a cache without a meta.json, so nothing tells what it is; give another --name, or --overwrite it"
            )
        return False
    meta = EmbeddingCache(name, split, mapped=True).meta
    changed = differences(meta | known_as(meta), settings)
    if not changed and len(meta.get("skipped") or ()) > allowed:
        changed = (
            f"{len(meta['skipped'])} broken images were left out; --skip-broken, or of tars --max-broken, leaves it so"
        )
    if changed:
        raise UserError(f"{folder}: was made with other settings: {changed}; give another --name, or --overwrite it")
    if (folder / ".parts").exists() and is_first():  # of a run that was killed at its very end
        with contextlib.suppress(UserError), locked(_lock(folder), folder):
            Parts(folder, settings).remove()
    logging.info("%s: whole already; --overwrite makes it anew", folder)
    return True


def check_other_splits(name, splits, clip_settings):
    """Raise a UserError if a split that is not to be made now was made with another CLIP: a cache has only one."""
    for file in sorted((ROOT / name).glob("*/meta.json")):
        meta = load_json(file)
        known = {key: value for key, value in clip_settings.items() if key != "precision"}
        changed = differences(known_as(meta), known) if isinstance(meta, dict) else "its meta.json is not an object"
        if changed and file.parent.name not in splits:
            raise UserError(
                f"{file.parent}: was made with another CLIP: {changed}; give another --name, or all of its splits and --overwrite"
            )


def texts_are_whole(name, stem, texts, chains, clip_settings):
    """Whether further texts, such as the prompt ladder, are there, the same ones and by this CLIP."""
    try:
        found = load_texts(name, stem)
        made_by = (
            load_json(ROOT / name / "texts" / f"{stem}.json")["clip"]
            if found and (found[0], found[2]) == (texts, chains)
            else {}
        )
        return not differences(known_as(made_by) | {"precision": made_by.get("precision")}, clip_settings)
    except (UserError, KeyError, TypeError, AttributeError):  # they are made again: that takes a moment
        return False


def _lock(folder):
    return folder.with_name(f".{folder.name}.lock")


def cache_split(args, folder, data, clip, settings):
    """Embed one split part by part, and write it when all its parts are there: a run that is killed goes on with the part it was at."""
    start = time.perf_counter()
    with first_rank_first():
        parts = Parts(folder, settings | made_with(clip), args.overwrite)
    texts = list(dict.fromkeys(data.captions))  # each distinct one once
    with stop_together():
        make_image_parts(parts, clip, data.image_files, args)
        make_text_parts(parts, clip, texts, getattr(torch, args.dtype))
    if not is_first():
        return
    image, left_out = parts.join("image", len(data.image_files))
    text, notes = parts.join("text", len(texts))
    note_texts(notes, clip)
    broken = {row: reason for part in left_out for row, reason in part["left_out"].items()}
    skipped = [
        [data.image_names[row], reason.removeprefix(f"{data.image_files[row]}: ")] for row, reason in broken.items()
    ]
    row_of = {text: row for row, text in enumerate(texts)}
    data = without(data, broken)
    if not data.captions:
        raise UserError(f"{folder}: without the {len(broken)} broken image files no caption is left; mend them")
    text = text[[row_of[caption] for caption in data.captions]]
    check_widths(clip, image.shape[1], text.shape[1])
    meta = {
        "split": folder.name,
        **settings,
        **clip.info,
        "embed_dim": image.shape[1],
        "image_count": len(image),
        "caption_count": len(text),
        "image_ids": data.image_ids,
        "caption_ids": data.caption_ids,
        **({"annotated": data.annotated} if data.annotated else {}),  # caption rows
        "skipped": skipped,
        "versions": made_with(clip)["versions"],
    }
    write_split(
        folder,
        image,
        text,
        data.image_of_caption,
        data.captions,
        data.image_names,
        data.relevance,
        meta,
        args.shard_rows,
    )
    parts.remove()
    report_split(folder, len(image), len(text), image.shape[1], skipped, start)


def cache_tars(args, folder, data, clip, settings):
    """Embed the tars of a split one by one, and put their files in place when all are there: a run that is killed goes on with the tar it was at."""
    start = time.perf_counter()
    with first_rank_first():
        parts = TarParts(folder, settings | made_with(clip), args.overwrite)
    with stop_together():
        make_tar_parts(parts, clip, data, args)
    if not is_first():
        return
    notes = [parts.read_notes(number) for number in range(len(data.urls))]
    skipped = [[f"{note['tar'][0]}: {key}", reason] for note in notes for key, reason in note["left_out"]]
    check_broken(skipped, args.max_broken)
    note_texts(notes, clip)
    count = sum(note["rows"] for note in notes)
    if not count:
        raise UserError(
            f"--data-root {args.data_root}: holds no sample; a sample is a picture and a .txt or .json of one name"
        )
    check_widths(clip, *notes[0]["width"])
    index = {
        kind: [[note["rows"], note["sums"][place]] for note in notes] for place, kind in enumerate(("image", "text"))
    }
    meta = {
        "split": folder.name,
        **settings,
        **clip.info,
        "embed_dim": notes[0]["width"][0],
        "image_count": count,
        "caption_count": count,
    }
    (folder / "meta.json").unlink(missing_ok=True)
    (folder / "relevance.json").unlink(missing_ok=True)
    parts.publish(len(data.urls))
    finish_shards(
        folder,
        index,
        torch.arange(count),
        meta | data.state() | {"skipped": skipped, "versions": made_with(clip)["versions"]},
    )
    parts.remove()
    report_split(folder, count, count, meta["embed_dim"], skipped, start)


def made_with(clip):
    """What the embeddings' last bits depend on beside the settings. Returns: dict of plain types."""
    return {
        "device": torch.device(clip.device).type,
        "versions": {package: importlib.metadata.version(package) for package in VERSIONS},
    }


def check_widths(clip, image, text):
    """Raise a UserError if a model gives images and texts of different widths."""
    if image != text:
        raise UserError(
            f"--model {clip.info['model']}: image embeddings are {image} wide, text embeddings {text}; choose a CLIP"
        )


def report_split(folder, images, captions, width, skipped, start):
    """Say what was written."""
    if skipped:
        logging.warning(
            "note: %d broken images and their captions are left out; meta.json lists them under 'skipped'", len(skipped)
        )
    logging.info(
        "%s: %d images, %d captions, %d wide, in %.0f s", folder, images, captions, width, time.perf_counter() - start
    )


@torch.inference_mode()
def make_tar_parts(parts, clip, data, args):
    """Embed the tars that are missing and this rank's."""
    mine = range(rank(), len(data.urls), world_size())
    notes = {number: parts.read_notes(number, data.identity(number)) for number in mine}
    missing = [
        number for number, of in notes.items() if of is None or (of["left_out"] and data.may_have_changed(number))
    ]
    if not missing:
        return
    dtype, quiet = getattr(torch, args.dtype), tqdm(disable=True)
    width = encode_distinct(clip, ["a"], quiet)["rows"].shape[1]
    samples = TarSamples(
        {number: data.urls[number] for number in missing}, clip.transform, -(-args.batch_size // CHUNK) * CHUNK
    )
    loader = DataLoader(
        samples, batch_size=None, num_workers=min(args.workers, len(missing)), worker_init_fn=leave_interrupts
    )
    open_tars, broken = {}, []
    with tqdm(desc=f"{len(missing)} tars", unit="sample", disable=not is_first()) as bar:
        for number, keys, captions, pictures, errors in loader:
            tar = open_tars.setdefault(
                number, {"rows": [torch.empty(0, width)], "images": [], "captions": [], "left_out": []}
            )
            if pictures is not None:
                whole = torch.tensor([not error for error in errors])
                tar["rows"].append(
                    torch.cat(in_chunks(clip.model.encode_image, pictures.to(clip.dtype), clip.device))[whole]
                )
            elif not keys and errors:
                raise UserError(errors[0])
            for key, caption, error in zip(keys, captions, errors, strict=False):
                if error:
                    tar["left_out"].append([key, error])
                else:
                    tar["images"].append(key)
                    tar["captions"].append(caption)
            bar.update(len(keys))
            if not keys:  # its end
                done = open_tars.pop(number)
                write_tar(parts, clip, number, data.identity(number), done, dtype)
                broken += [[f"{data.urls[number]}: {key}", error] for key, error in done["left_out"]]
                check_broken(broken, args.max_broken)


def write_tar(parts, clip, number, identity, tar, dtype):
    """Embed the captions of a tar and keep it. Args: identity: of the tar. tar: {"rows": list of (n, D), "images", "captions", "left_out"}."""
    image, captions = stored(torch.cat(tar["rows"]), dtype, tar["images"]), tar["captions"]
    distinct = list(dict.fromkeys(captions))
    row_of = {text: row for row, text in enumerate(distinct)}
    content = encode_distinct(clip, distinct or ["a"], tqdm(disable=True))
    rows = content.pop("rows")
    text = stored(rows[[row_of[caption] for caption in captions]] if captions else rows[:0], dtype, captions)
    notes = {
        "tar": identity,
        "rows": len(image),
        "width": [image.shape[1], text.shape[1]],
        "left_out": tar["left_out"],
        **content,
    }
    parts.write_tar(number, (image, text, tar["images"], captions), notes)


def check_broken(broken, allowed):
    """Raise a UserError, after all broken samples have been named, if there are more than allowed. Args: broken: [sample, reason] pairs."""
    if len(broken) > allowed:
        for sample, reason in broken[:-1]:
            logging.error("%s: %s", sample, reason)
        sample, reason = broken[-1]
        raise UserError(
            f"{sample}: {reason} ({len(broken)} broken samples so far; mend them, or leave so many out with --max-broken)"
        )


def make_image_parts(parts, clip, files, args):
    """Embed the pictures of the parts that are missing."""
    missing = parts.missing("image", len(files), strict=not args.skip_broken)
    for part, rows, left_out in encode_images(clip, files, missing, args.batch_size, args.workers, args.skip_broken):
        names = [files[row] for row in part_rows(part, len(files)) if row not in left_out]
        parts.write("image", part, {"rows": stored(rows, getattr(torch, args.dtype), names), "left_out": left_out})


def make_text_parts(parts, clip, texts, dtype):
    """Embed the distinct texts of the parts that are missing."""
    missing = parts.missing("text", len(texts))
    with tqdm(
        total=sum(len(part_rows(part, len(texts))) for part in missing),
        desc="texts",
        unit="text",
        disable=not is_first(),
    ) as bar:
        for part in missing:
            rows = part_rows(part, len(texts))
            names = texts[rows.start : rows.stop]
            content = encode_distinct(clip, names, bar)
            parts.write("text", part, content | {"rows": stored(content["rows"], dtype, names)})


def cache_texts(args, device):
    """Embed the texts of a file with the CLIP that made the cache, in the precision that it was made in."""
    name, stem = args.name or args.dataset, Path(args.texts).stem
    if stem in (LADDER, CHAINS):
        raise UserError(
            f"--texts {args.texts}: {stem!r} is the name of the data set's own texts; give the file another name"
        )
    texts, chains = read_texts(Path(args.texts))
    clip, dtype = clip_of_cache(name, device, args.model, args.pretrained, args.precision)
    z = stored(encode_texts(clip, texts), dtype, texts)
    with locked(ROOT / name / "texts" / f".{stem}.lock", f"--texts {args.texts}"):
        write_texts(name, stem, z, texts, clip.info, chains)
    logging.info("%s: %d texts", ROOT / name / "texts" / stem, len(texts))


def clip_of_cache(name, device, model=None, pretrained=None, precision="auto"):
    """The CLIP that made a cache, as its meta.json names it.

    Args: name: folder under embeddings/. device. model, pretrained, precision: what is to be used instead.
    Returns: (Clip, dtype that the cache stores). Raises: UserError if the cache does not tell, or its CLIP cannot be loaded.
    """
    meta_file = next(iter(sorted((ROOT / name).glob("*/meta.json"))), None)
    if meta_file is None:
        raise UserError(
            f"no cache with a meta.json in {ROOT / name} to take the CLIP from; make it with cache_embeddings.py first"
        )
    meta = load_json(meta_file)
    known = meta if isinstance(meta, dict) else {}
    has_clip = isinstance(known.get("model"), str) and isinstance(known.get("pretrained"), str)
    if not has_clip or known.get("precision") not in tuple(PRECISIONS) or known.get("dtype") not in DTYPES:
        raise UserError(
            f"{meta_file}: does not tell with which CLIP, precision and dtype the cache was made; make it anew"
        )
    chosen = pick_precision(meta["precision"] if precision == "auto" else precision, device)
    clip = load_clip(model or meta["model"], pretrained or meta["pretrained"], device, chosen)
    changed = differences(known_as(meta), known_as(clip.info))
    if changed:
        raise UserError(
            f"{meta_file.parent}: was made with another CLIP: {changed}; embed texts with the CLIP of their cache"
        )
    return clip, getattr(torch, meta["dtype"])


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
                    raise UserError(
                        f"--texts {path}: no column 'captions' (found: {', '.join(reader.fieldnames or ('nothing',))})"
                    )
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
