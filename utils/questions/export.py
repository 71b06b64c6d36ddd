"""Export: a table with one row per caption, image or further text of a cache.

Columns (empty where there is no value):
- method, seed
- kind: "caption", "image" or "text"; row: of the cache, or of the texts
- text; image: a file name, for a caption that of its image
- uncertainty
- percentile: how many percent of the split's captions (for an image: its images) are more certain
- first: the first answer, an image's file name or a caption
- rank: of the first right answer, 1 = best
- p_right: probability that the first answer is right, from the uncertainty alone; fitted on all
  queries of the split
"""

import argparse
import csv
import importlib.util
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from utils.evaluation.ranking import TILE, rank_queries
from utils.evaluation.scorers import BATCH, FROZEN, PUBLISHED, AdaptorScorer, FrozenScorer
from utils.evaluation.selective import calibrate
from utils.files import written_aside
from utils.questions.prompts import check_uncertain, similarity_of_texts

COLUMNS = {
    "method": "string",
    "seed": "int64",
    "kind": "string",
    "row": "int64",
    "text": "string",
    "image": "string",
    "uncertainty": "float64",
    "percentile": "float64",
    "first": "string",
    "rank": "int64",
    "p_right": "float64",
}


def export_file(text):
    """An argparse type: a file that can be exported to."""
    path = Path(text)
    if path.suffix not in WRITERS:
        suffixes = ", ".join(WRITERS)
        raise argparse.ArgumentTypeError(f"{text!r} ends in none of {suffixes}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        cure = "pip install pyarrow, or export .csv or .jsonl"
        raise argparse.ArgumentTypeError(f"{text!r} needs pyarrow: {cure}")
    return path


@torch.inference_mode()
def export(path, adaptors, cache, score=PUBLISHED, texts=None):
    """Write the captions and images of a split that have an uncertainty, or further texts.

    A split whose shards stay on disk (mapped) is not ranked: first, rank and p_right are empty.

    Args:
        path: as `export_file` returns it; it is replaced as a whole.
        adaptors: {(method, seed): Adaptor}.
        cache: EmbeddingCache.
        score: what ranks, of SCORES.
        texts: further texts and their embeddings, as `load_texts` returns them; None: the split's
            captions and images.
    Returns: how many rows were written, {"caption", "image" or "text": rows}.
    Raises: UserError if `texts` are given and an adaptor gives texts no uncertainty.
    """
    if texts is not None:
        for adaptor in adaptors.values():
            first_text = texts[1][:1]
            check_uncertain(adaptor, text_uncertainty(adaptor, first_text, cache))
    written = Counter()

    def counted_tables():
        for table in _all_tables(adaptors, cache, score, texts):
            written.update(table["kind"])
            yield table

    with written_aside(path) as file:
        WRITERS[path.suffix](file, counted_tables())
    return dict(written)


def _all_tables(adaptors, cache, score, texts):
    """Yield the tables of all adaptors: {column: list of values, or None}."""
    for (method, seed), adaptor in adaptors.items():
        if texts is None:
            tables = tables_of_split(adaptor, cache, score)
        else:
            tables = [table_of_texts(adaptor, cache, score, *texts[:2])]
        for table in tables:
            table["method"] = [method] * len(table["row"])
            table["seed"] = [seed] * len(table["row"])
            yield table


def tables_of_split(adaptor, cache, score):
    """Yield the table of captions and that of images, if they have an uncertainty."""
    t2i = None
    i2t = None
    if not cache.mapped:
        answers = _rank(AdaptorScorer(adaptor, cache, score=score), score)
        t2i = answers["t2i"]
        i2t = answers["i2t"]
    images = image_names(cache)
    captions = cache.captions
    if captions is None and cache.mapped:
        captions = cache.names("captions", "text")
    uncertainty = text_uncertainty(adaptor, cache.text, cache)
    if uncertainty is not None:
        table = _table("caption", uncertainty, uncertainty, t2i)
        _add_answers(table, t2i, images)
        table["text"] = captions
        table["image"] = [images[row] for row in cache.image_of_caption.tolist()]
        yield table
    uncertainty = image_uncertainty(adaptor, cache.image, cache)
    if uncertainty is not None:
        table = _table("image", uncertainty, uncertainty, i2t)
        rows = [str(row) for row in range(len(cache.text))]
        _add_answers(table, i2t, captions or rows)
        table["image"] = images
        yield table


def table_of_texts(adaptor, cache, score, texts, z):
    """The table of further texts with embeddings z (T, D)."""
    uncertainty_of_captions = text_uncertainty(adaptor, cache.text, cache)
    uncertainty = text_uncertainty(adaptor, z, cache)
    if cache.mapped:
        table = _table("text", uncertainty, uncertainty_of_captions, None)
    else:
        scorer = AdaptorScorer(adaptor, cache, score=score)
        answers = _rank(scorer, score)
        table = _table("text", uncertainty, uncertainty_of_captions, answers["t2i"])
        images = image_names(cache)
        table["first"] = [images[row] for row in _best_images(scorer, z, score)]
    table["text"] = texts
    return table


def image_names(cache):
    """The file names of the images of a cache, or their rows as texts."""
    names = cache.images
    if names is None and cache.mapped:
        names = cache.names("images", "image")
    return names or [str(row) for row in range(len(cache.image))]


def text_uncertainty(adaptor, z, cache):
    """The uncertainty of text embeddings, Rows or a tensor (N, D): float64 (N,), or None."""
    return _uncertainty(adaptor.encode_text, adaptor.describe_text, z, cache)


def image_uncertainty(adaptor, z, cache):
    """The uncertainty of image embeddings, Rows or a tensor (N, D): float64 (N,), or None."""
    return _uncertainty(adaptor.encode_image, adaptor.describe_image, z, cache)


def _uncertainty(encode, describe, z, cache):
    """The uncertainty of embeddings, read one batch at a time."""
    is_tensor = isinstance(z, torch.Tensor)
    device = z.device if is_tensor else cache.image_of_caption.device
    parts = []
    for rows in torch.arange(len(z), device=device).split(BATCH):
        _, uncertainty = describe(*encode(z[rows].to(cache.device).float()))
        if uncertainty is None:
            return None
        parts.append(uncertainty.cpu().double().numpy())
    return np.concatenate(parts)


def _rank(scorer, score):
    """What `rank_queries` returns for a cache."""
    cache = scorer.cache
    ranker = FrozenScorer(cache) if score == FROZEN else scorer
    image_of_caption = cache.image_of_caption.cpu().numpy()
    return rank_queries(ranker.score, image_of_caption, len(cache.image))


def _table(kind, uncertainty, uncertainty_of_queries, answers):
    """The columns that follow from the uncertainty.

    Args:
        uncertainty: of the rows, (T,).
        uncertainty_of_queries: of the split's captions or images, (Q,).
        answers: what `rank_queries` found for these, or None.
    """
    more_certain = np.searchsorted(np.sort(uncertainty_of_queries), uncertainty)
    percentile = more_certain * 100 / len(uncertainty_of_queries)
    table = dict.fromkeys(COLUMNS)
    table["kind"] = [kind] * len(uncertainty)
    table["row"] = list(range(len(uncertainty)))
    table["uncertainty"] = uncertainty.tolist()
    table["percentile"] = percentile.tolist()
    if answers is not None:
        calibration = uncertainty_of_queries[answers["query"]]
        probability_of_right = calibrate(calibration, answers["rank"] == 1)
        table["p_right"] = probability_of_right(uncertainty).tolist()
    return table


def _add_answers(table, answers, names):
    """Add the first answer and the rank of each query; an image without captions has neither.

    Args:
        answers: what `rank_queries` found, or None.
        names: of what there is to find.
    """
    if answers is None:
        return
    first = [None] * len(table["row"])
    rank = [None] * len(table["row"])
    queries = zip(answers["query"], answers["top1"], answers["rank"].tolist(), strict=True)
    for query, top1, rank_of_right in queries:
        first[query] = names[top1]
        rank[query] = rank_of_right
    table["first"] = first
    table["rank"] = rank


def _best_images(scorer, z, score):
    """The row of the best image for each text with embeddings z (T, D): a list."""
    best = []
    for batch in z.split(TILE):
        similarity = similarity_of_texts(scorer, batch, score)  # (N, t)
        best += similarity.max(dim=0).indices.tolist()  # of equal ones, the smaller row
    return best


# Files.


def _rows(tables):
    """Yield the rows of tables, tuples in the order of COLUMNS."""
    for table in tables:
        yield from zip(*_columns(table).values(), strict=True)


def _columns(table):
    """The columns of a table in order; one without values is a list of None."""
    empty = [None] * len(table["row"])
    return {name: empty if table[name] is None else table[name] for name in COLUMNS}


def _write_csv(file, tables):
    text = io.TextIOWrapper(file, "utf-8", "backslashreplace", newline="", write_through=True)
    # All texts are quoted: a lone carriage return in one would end the row otherwise.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(COLUMNS)
    writer.writerows(_rows(tables))
    text.detach()  # flushes, and leaves the file open


def _write_jsonl(file, tables):
    for row in _rows(tables):
        record = dict(zip(COLUMNS, row, strict=True))
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        file.write(f"{line}\n".encode("utf-8", "backslashreplace"))


def _write_parquet(file, tables):
    import pyarrow
    from pyarrow import parquet

    types = [(name, pyarrow.type_for_alias(kind)) for name, kind in COLUMNS.items()]
    schema = pyarrow.schema(types)
    with parquet.ParquetWriter(file, schema) as writer:
        for table in tables:
            writer.write_table(pyarrow.table(_columns(table), schema))


WRITERS = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
