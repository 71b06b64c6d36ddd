"""Scores to take away: captions, images or further texts of a cache in, a table with a row for each out.

Columns: method, seed; kind ("caption", "image" or "text"), row (of the cache, or of the texts), text, image (file name,
of a caption its own); uncertainty; percentile (how many of a hundred captions of the split, or images for an image, are
more certain); first (the answer found first: an image's file name, or a caption); rank (of the first right answer, 1 =
best); p_right (probability that the first answer is right, from the uncertainty alone). What there is not is empty.
"""

import argparse
import csv
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import torch

from models.layers import pairwise_products, unit
from utils.cli import need
from utils.evaluation.ranking import TILE, rank_queries
from utils.evaluation.selective import calibrate
from utils.evaluation.scorers import FROZEN, PUBLISHED, ROWS_AT_ONCE, AdaptorScorer, Scorer
from utils.files import written_aside
from utils.lazy import Lazy

pyarrow, parquet = Lazy("pyarrow"), Lazy("pyarrow.parquet")  # optional
COLUMNS = {"method": "string", "seed": "int64", "kind": "string", "row": "int64", "text": "string", "image": "string"}
COLUMNS |= {"uncertainty": "float64", "percentile": "float64", "first": "string", "rank": "int64", "p_right": "float64"}


def export_file(text):
    """An argparse type: a file that can be exported to."""
    path = Path(text)
    if path.suffix not in WRITERS:
        raise argparse.ArgumentTypeError(f"{text!r} ends in none of {', '.join(WRITERS)}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise argparse.ArgumentTypeError(f"{text!r} needs pyarrow: pip install pyarrow, or export .csv or .jsonl")
    return path


@torch.inference_mode()
def export(path, adaptors, cache, score=PUBLISHED, stem=None, load=None):
    """Write the captions of a split and its images, as far as they have an uncertainty, or else further texts.

    A split that is mapped is not ranked: first, rank and p_right are empty, and its embeddings stay on the disk.
    Args:
        path: as `export_file` takes it; replaced as a whole.
        adaptors: {(method, seed): Adaptor}.
        cache: EmbeddingCache.
        score: what ranks, of SCORES.
        stem, load: name of further texts, and a function as `load_texts` of this cache, which is called with it.
    Raises: UserError if there are no such texts, or a method has no uncertainty for them.
    """
    texts = stem and load(stem, cache.embed_dim, meta=cache.meta)
    missing = f"--texts {stem}: none in {cache.folder.parent / 'texts'}; embed a file with cache_embeddings.py --texts"
    need(texts or not stem, missing)
    for (method, _), adaptor in adaptors.items() if stem else ():
        is_uncertain = _uncertainty(adaptor.encode_text, adaptor.describe_text, texts[1][:1], cache) is not None
        need(is_uncertain, f"--method {method}: its images are uncertain, its texts are not; leave it out")
    tables = (
        {"method": [method] * len(table["row"]), "seed": [seed] * len(table["row"])} | table
        for (method, seed), adaptor in adaptors.items()
        for table in _tables(adaptor, cache, score, texts)
    )
    with written_aside(path) as file:
        WRITERS[path.suffix](file, tables)


def _tables(adaptor, cache, score, texts):
    """Yield what is known of captions and images, or of texts: {column: list of values, or None where there are none}.

    Its columns are those of COLUMNS from kind on.
    """
    of_captions = _uncertainty(adaptor.encode_text, adaptor.describe_text, cache.text, cache)
    found = scorer = None
    if not cache.mapped:
        scorer = AdaptorScorer(adaptor, cache, score=score)
        ranker = Scorer(cache) if score == FROZEN else scorer
        found = rank_queries(ranker.score, cache.image_of_caption.cpu().numpy(), len(cache.image))
    images = cache.images or (cache.names("images", "image") if cache.mapped else None)
    images = images or [str(row) for row in range(len(cache.image))]
    if texts is not None:
        uncertainty = _uncertainty(adaptor.encode_text, adaptor.describe_text, texts[1], cache)
        table = _table("text", uncertainty, of_captions, found and found["t2i"]) | {"text": texts[0]}
        if scorer is not None:
            table["first"] = [images[row] for row in _first(scorer, texts[1], score)]
        yield table | {"rank": None}
        return
    captions = cache.captions or (cache.names("captions", "text") if cache.mapped else None)
    if of_captions is not None:
        table = _table("caption", of_captions, of_captions, found and found["t2i"], images)
        yield table | {"text": captions, "image": [images[row] for row in cache.image_of_caption.tolist()]}
    of_images = _uncertainty(adaptor.encode_image, adaptor.describe_image, cache.image, cache)
    if of_images is not None:
        answers = captions or [str(row) for row in range(len(cache.text))]
        yield _table("image", of_images, of_images, found and found["i2t"], answers) | {"image": images}


def _uncertainty(encode, describe, z, cache):
    """Uncertainty of embeddings, Rows or a tensor (N, D), a part at a time: a float64 array (N,), or None."""
    values, device = np.empty(len(z)), z.device if isinstance(z, torch.Tensor) else cache.image_of_caption.device
    for rows in torch.arange(len(z), device=device).split(ROWS_AT_ONCE):
        part = describe(*encode(z[rows].to(cache.device).float()))[1]
        if part is None:
            return None
        values[rows.cpu().numpy()] = part.double().cpu().numpy()
    return values


def _table(kind, uncertainty, among, found, answers=None):
    """The columns that follow from uncertainty (T,) and from that of the queries (Q,) that it is among.

    Args:
        found: what `rank_queries` found for those queries, or None.
        answers: names of what there is to find; None: the rows are no queries.
    """
    table = {"kind": [kind] * len(uncertainty), "row": list(range(len(uncertainty))), "text": None, "image": None}
    percentile = np.searchsorted(np.sort(among), uncertainty) * 100 / len(among)
    table |= {"uncertainty": uncertainty.tolist(), "percentile": percentile.tolist()}
    table |= {"first": None, "rank": None, "p_right": None}
    if found is not None:
        probability = calibrate(among[found["query"]], found["rank"] == 1)
        table["p_right"] = probability(uncertainty).tolist()
    if found is not None and answers is not None:
        first, rank = [None] * len(uncertainty), [None] * len(uncertainty)  # an image may have no caption
        for query, top1, place in zip(*(found[key].tolist() for key in ("query", "top1", "rank")), strict=True):
            first[query], rank[query] = answers[top1], place
        table |= {"first": first, "rank": rank}
    return table


def _first(scorer, z, score):
    """The rows of the images that match texts with embeddings z (T, D) best: a list; of equal ones, the lower row."""
    frozen, first = Scorer(scorer.cache) if score == FROZEN else None, []
    for part in z.split(TILE):
        part = part.to(scorer.cache.device)
        if frozen is not None:
            similarity = pairwise_products(frozen.image, unit(part.float()))  # (N, t)
        else:
            similarity = scorer.match(scorer.image, scorer.encode(scorer.adaptor.encode_text, part))
        first += similarity.max(dim=0).indices.tolist()
    return first


def _rows(tables):
    """The rows of tables, tuples in the order of COLUMNS."""
    for table in tables:
        nothing = [None] * len(table["row"])
        yield from zip(*(nothing if table[name] is None else table[name] for name in COLUMNS), strict=True)


def _write_csv(file, tables):
    text = io.TextIOWrapper(file, "utf-8", "backslashreplace", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_rows(tables))
    text.detach()  # flushes, and leaves the file open


def _write_jsonl(file, tables):
    for row in _rows(tables):
        line = json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False, allow_nan=False)
        file.write(f"{line}\n".encode("utf-8", "backslashreplace"))


def _write_parquet(file, tables):
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in COLUMNS.items()])
    with parquet.ParquetWriter(file, schema) as writer:
        for table in tables:
            nothing = [None] * len(table["row"])
            columns = {name: nothing if table[name] is None else table[name] for name in COLUMNS}
            writer.write_table(pyarrow.table(columns, schema))


WRITERS = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
