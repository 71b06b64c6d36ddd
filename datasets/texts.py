"""Further texts of a cache, the prompt ladder and chains from general to specific among them: embeddings/<name>/texts/.

<stem>.pt    (T, D), raw, as the cache's own
<stem>.json  {"texts": T strings, "chains": lists of rows, general first, or null, "clip": what embedded them}
"""

import csv

from datasets.checks import are_rows, is_list, load_embeddings
from datasets.embedding import ROOT
from utils.cli import UserError, need
from utils.files import load_json, save_json, save_tensors
from utils.preprocess import ClipId

LADDER = "ladder"  # the stem of the prompt ladder
CHAINS = "chains"  # that of a data set's own chains
AGAIN = "run cache_embeddings.py again"


def write_texts(name, stem, embeddings, texts, meta, chains=None):
    """Write further texts, T strings with (T, D) embeddings, and the info of their Clip; the .json comes last."""
    folder = ROOT / name / "texts"
    (folder / f"{stem}.json").unlink(missing_ok=True)
    save_tensors(embeddings, folder / f"{stem}.pt")
    save_json({"texts": texts, "chains": chains, "clip": meta}, folder / f"{stem}.json", indent=1)


def load_texts(name, stem, embed_dim=None, meta=None):
    """Further texts of a cache, embeddings/<name>/texts/<stem>.pt.

    Args:
        embed_dim: the width that they must have, if any.
        meta: meta.json of the split that they are compared with: its CLIP must be theirs.
    Returns: (texts, (T, D) embeddings, chains or None), or None where there are none.
    Raises: UserError if the files do not fit each other or the cache.
    """
    path = ROOT / name / "texts" / f"{stem}.pt"
    names = path.with_suffix(".json")
    if not path.exists() or not names.exists():
        return None
    z, document = load_embeddings(path), load_json(names)
    document = document if isinstance(document, dict) else {}
    texts, chains, made_by = (document.get(key) for key in ("texts", "chains", "clip"))
    need(is_list(texts, str, len(z)), f"{names}: expected {len(z)} texts; {AGAIN}")
    need(embed_dim in (None, z.shape[1]), f"{path}: {z.shape[1]} wide, the cache is {embed_dim} wide; {AGAIN}")
    if meta and isinstance(made_by, dict) and "pretrained_sha256" in made_by and "pretrained_sha256" in meta:
        changed = ClipId.of_meta(made_by).difference(ClipId.of_meta(meta))
        need(not changed, f"{path}: embedded with another CLIP than the cache: {changed}; embed it again, or remove it")
    are_chains = chains is None or (isinstance(chains, list) and all(are_rows(chain, len(z)) for chain in chains))
    need(are_chains, f"{names}: its chains are not lists of rows from 0 to {len(z) - 1}; {AGAIN}")
    return texts, z, chains


def load_chains(name, embed_dim, meta=None):
    """All texts of a cache that form chains from general to specific: {stem: what `load_texts` returns}."""
    stems = sorted(path.stem for path in (ROOT / name / "texts").glob("*.pt"))
    loaded = {stem: load_texts(name, stem, embed_dim, meta) for stem in stems}
    return {stem: content for stem, content in loaded.items() if content is not None and content[2]}


def are_written(name, stem, texts, chains, clip_id):
    """Whether these texts are there, embedded by the CLIP with this ClipId in its precision."""
    try:
        found = load_texts(name, stem)
        if found is None or (found[0], found[2]) != (texts, chains):
            return False
        made_by = ClipId.of_meta(load_json(ROOT / name / "texts" / f"{stem}.json")["clip"])
        return (made_by.readable(), made_by.precision) == (clip_id.readable(), clip_id.precision)
    except (UserError, KeyError, TypeError, AttributeError):  # they are made again: that takes a moment
        return False


def read_texts(path):
    """The texts of a file: one a line, or a .csv whose column "captions" joins a chain, general first, by " => ".

    Returns: (texts, chains): chains are lists of rows of the texts, or None.
    Raises: UserError naming file and row.
    """
    need(path.is_file(), f"--texts {path}: no such file")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                texts, chains = flatten(list(_read_chains(path, csv.DictReader(file))))
            else:
                texts, chains = [line.strip() for line in file if line.strip()], None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--texts {path}: not readable as UTF-8 text ({error})") from None
    need(texts, f"--texts {path}: holds no text")
    return texts, chains


def _read_chains(path, reader):
    columns = reader.fieldnames or ("nothing",)
    need("captions" in columns, f"--texts {path}: no column 'captions' (found: {', '.join(columns)})")
    for row in reader:
        chain = [text.strip() for text in (row["captions"] or "").split("=>")]
        need(all(chain), f"--texts {path}: line {reader.line_num} has an empty caption in its chain")
        yield chain


def flatten(chains):
    """Chains, lists of strings, as one list of texts, and the rows of each chain in it: (texts, lists of rows)."""
    texts, rows = [], []
    for chain in chains:
        rows.append(list(range(len(texts), len(texts) + len(chain))))
        texts += chain
    return texts, rows
