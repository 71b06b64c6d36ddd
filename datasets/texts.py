"""Further texts of a cache, embeddings/<name>/texts/: the prompt ladder, chains, your own.

<stem>.pt    (T, D), raw, as the cache's own
<stem>.json  {"texts": T strings, "chains": lists of rows, general first, or null,
              "clip": what embedded them}
"""

from datasets.checks import are_rows, is_list, load_embeddings
from datasets.delimited import SEPARATORS, read_lines
from datasets.embedding import ROOT
from utils.cli import UserError, need
from utils.files import load_json, save_json, save_tensors, text_lines
from utils.preprocess import ClipId

LADDER = "ladder"  # the stem of the prompt ladder
CHAINS = "chains"  # that of a data set's own chains
AGAIN = "run cache_embeddings.py again (for texts of your own with --texts FILE)"
OTHER_FORMATS = (".json", ".jsonl", ".ndjson", ".parquet", ".xlsx", ".gz", ".zip")


def write_texts(name, stem, embeddings, texts, meta, chains=None):
    """Write further texts of a cache. The .json is written last.

    Args:
        name: of the cache.
        stem: of the files.
        embeddings: (T, D).
        texts: T strings.
        meta: the info of their Clip.
        chains: lists of rows, or None.
    """
    folder = ROOT / name / "texts"
    (folder / f"{stem}.json").unlink(missing_ok=True)
    save_tensors(embeddings, folder / f"{stem}.pt")
    save_json({"texts": texts, "chains": chains, "clip": meta}, folder / f"{stem}.json", indent=1)


def load_texts(name, stem, embed_dim=None, meta=None):
    """Further texts of a cache, embeddings/<name>/texts/<stem>.pt.

    Args:
        embed_dim: the width that they must have, if any.
        meta: meta.json of the split that they are compared with; its CLIP must be theirs.
    Returns: (texts, (T, D) embeddings, chains or None), or None if the files do not exist.
    Raises: UserError if the files do not fit each other or the cache.
    """
    path = ROOT / name / "texts" / f"{stem}.pt"
    json_path = path.with_suffix(".json")
    if not path.exists() or not json_path.exists():
        return None
    z = load_embeddings(path)
    document = load_json(json_path)
    if not isinstance(document, dict):
        document = {}
    texts = document.get("texts")
    chains = document.get("chains")
    need(is_list(texts, str, len(z)), f"{json_path}: expected {len(z)} texts; {AGAIN}")
    problem = f"{z.shape[1]} wide, the cache is {embed_dim} wide"
    need(embed_dim in (None, z.shape[1]), f"{path}: {problem}; {AGAIN}")
    _check_clip(path, document.get("clip"), meta)
    problem = f"its chains are not lists of rows from 0 to {len(z) - 1}"
    need(chains is None or _are_chains(chains, len(z)), f"{json_path}: {problem}; {AGAIN}")
    return texts, z, chains


def _check_clip(path, text_meta, cache_meta):
    """Raise a UserError if texts and cache are of different CLIPs, as far as both know theirs."""
    for meta in (text_meta, cache_meta):
        if not isinstance(meta, dict) or "pretrained_sha256" not in meta:
            return
    changed = ClipId.of_meta(text_meta).difference(ClipId.of_meta(cache_meta))
    problem = f"embedded with another CLIP than the cache: {changed}"
    need(not changed, f"{path}: {problem}; embed it again, or remove it")


def _are_chains(chains, texts):
    """Whether a value is a list of lists of rows of so many texts."""
    return isinstance(chains, list) and all(are_rows(chain, texts) for chain in chains)


def load_chains(name, embed_dim, meta=None):
    """All texts of a cache that form chains, general first: {stem: what `load_texts` returns}."""
    chains = {}
    for path in sorted((ROOT / name / "texts").glob("*.pt")):
        content = load_texts(name, path.stem, embed_dim, meta)
        if content is not None and content[2]:
            chains[path.stem] = content
    return chains


def are_written(name, stem, texts, chains, clip_id):
    """Whether these texts exist, embedded by the CLIP with this ClipId in its precision."""
    try:
        saved = load_texts(name, stem)
        if saved is None:
            return False
        saved_texts, _, saved_chains = saved
        if saved_texts != texts or saved_chains != chains:
            return False
        document = load_json(ROOT / name / "texts" / f"{stem}.json")
        made_by = ClipId.of_meta(document["clip"])
    except (UserError, KeyError, TypeError, AttributeError):  # then they are made again
        return False
    is_same_clip = made_by.readable() == clip_id.readable()
    return is_same_clip and made_by.precision == clip_id.precision


def read_texts(path, quoting="minimal"):
    """The texts of a file: a text per line, or the column "captions" of a .csv or .tsv file.

    In that column, " => " joins the texts of a chain, general first.

    Args: quoting: "minimal" or "none", as `read_lines` has it.
    Returns: (texts, chains); chains are lists of rows of the texts, or None.
    Raises: UserError that names file and line.
    """
    need(path.is_file(), f"--texts {path}: no such file")
    suffix = path.suffix.lower()
    if suffix in SEPARATORS:
        texts, chains = flatten(list(_read_chains(path, SEPARATORS[suffix], quoting)))
    else:
        expected = (
            "give a text file with a text per line, or a .csv or .tsv with a column 'captions'"
        )
        need(
            suffix not in OTHER_FORMATS, f"--texts {path}: {suffix} files are not read; {expected}"
        )
        texts, chains = text_lines(path), None
    need(texts, f"--texts {path}: holds no text; give one text per line")
    return texts, chains


def _read_chains(path, separator, quoting):
    """Yield the chains of a table, lists of strings."""
    for line in read_lines(path, separator, {"": "captions"}, quoting):
        place = f"--texts {path}: line {line.number}"
        need(not line.problem, f"{place} {line.problem}")
        chain = [text.strip() for text in line.values["captions"].split("=>")]
        need(all(chain), f"{place} has an empty caption in its chain; fill it in or remove it")
        yield chain


def flatten(chains):
    """Chains, lists of strings, as one list of texts, and the rows of each chain in it."""
    texts = []
    rows = []
    for chain in chains:
        first = len(texts)
        texts += chain
        rows.append(list(range(first, len(texts))))
    return texts, rows
