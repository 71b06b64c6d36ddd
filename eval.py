"""Checkpoint and embeddings in, retrieval by uncertainty level out: results/<name>/<seed>/<method>.json and .npz, tables, plots.

    python eval.py --uncer_levels 10
    python eval.py --dataset shapes --method all --seed 0 1 2
    python eval.py --dataset shapes --seed 0 1 2 --compare asymvlm-psd prolip
    python eval.py --dataset shapes --prompts "a picture" "a picture of a red star"
    python eval.py --dataset shapes --most-uncertain 5 --least-uncertain 5

An .npz has one entry a query; every figure, table and plot is a function of these files.
"""

import json
import logging
import sys
from pathlib import Path

import torch

from datasets.embedding import LADDER, EmbeddingCache, load_chains, load_texts
from models import METHODS
from utils.checkpoint import checkpoint_path, load_adaptor
from utils.cli import Parser, UserError, folder_name, positive, run, seed_number, torchrun_rank, whole
from utils.device import pick_device
from utils.evaluation import tables
from utils.evaluation.bootstrap import LEVEL, RESAMPLES
from utils.evaluation.figures import FOLDS, hierarchy_section, measure_group
from utils.evaluation.metrics import uncertainty_by_depth
from utils.evaluation.questions import compare_methods, describe_captions, describe_prompts, prompts_from
from utils.evaluation.results import Results, result_path
from utils.evaluation.scorers import BASELINES, AdaptorScorer, FrozenCosine, answer, recall_in_folds
from utils.files import written_aside

ROOT = Path("results")


def main(argv=None):
    args = parse(argv)
    if args.compare:
        return compare(args)
    device = pick_device(args.device)
    cache = EmbeddingCache(args.dataset, args.split).to(device)
    if not args.question:
        check_counts(args, cache)
    adaptors = load_adaptors(args, cache, device)
    if args.question:
        return ask(args, cache, adaptors, device)
    ladder = load_texts(args.dataset, LADDER, cache.embed_dim, meta=cache.meta)
    chains = load_chains(args.dataset, cache.embed_dim, meta=cache.meta)
    results = {}
    for name, seed, scorer in every_scorer(cache, adaptors):
        found = evaluate(scorer, cache, args.uncer_levels, args.folds, ladder, chains)
        if scorer.is_uncertain:
            found.bootstrap(args.uncer_levels, args.resamples)
            found.content["config"] = {"dataset": args.dataset, "split": args.split, "method": name, "seed": seed} | {
                key: getattr(args, key) for key in ("uncer_levels", "resamples", "folds")
            }
            found.save(result_path(ROOT / args.dataset, name, seed))
        results.setdefault(name, []).append(found)
    report(results, args, cache)


def parse(argv):
    about = "Cross-modal retrieval by uncertainty level, and what else there is to ask of a caption's uncertainty."
    names, baselines = ", ".join(METHODS), ", ".join(BASELINES)
    parser = Parser(description=about)
    add = parser.add_argument
    add("--dataset", type=folder_name, default="coco", help="folder under embeddings/ (default: coco)")
    methods = {"choices": [*METHODS, "all"], "metavar": "METHOD", "help": f"{names}, or all"}
    add("--method", nargs="+", default=["asymvlm-psd"], **methods)
    add("--seed", nargs="+", type=seed_number, default=[0])
    add("--split", type=folder_name, default="val")
    levels = "levels of equally many queries (default: 10)"
    add("--uncer_levels", "--uncer-levels", type=positive, default=10, help=levels)
    folds = "also the mean recall over parts of the gallery (COCO 1K: 5 of the 5K test)"
    add("--folds", type=positive, default=1, help=folds)
    resamples = "of the bootstrap intervals over queries; 0: none (default: %(default)s)"
    add("--resamples", type=whole, default=RESAMPLES, help=resamples)
    add("--no-plots", action="store_true", help="tables only")
    add("--device", default="auto")
    add = parser.add_argument_group("instead of an evaluation").add_argument
    pair = f"paired bootstrap of two methods evaluated before, or of {baselines}"
    add("--compare", nargs=2, metavar=("A", "B"), help=pair)
    add("--prompts", nargs="+", metavar="TEXT", help="how uncertain these texts are; @FILE: a text a line")
    add("--most-uncertain", type=positive, metavar="N", help="list captions of the split")
    add("--least-uncertain", type=positive, metavar="N", help="list captions of the split")
    add("--json", action="store_true", help="answer --prompts, --most-uncertain and --least-uncertain in JSON")
    args = parser.parse_args(argv)
    args.method = list(METHODS) if "all" in args.method else list(dict.fromkeys(args.method))
    args.seed = list(dict.fromkeys(args.seed))
    listing = args.most_uncertain or args.least_uncertain
    args.question = args.prompts or listing
    if torchrun_rank()[1] > 1:
        parser.error("eval.py runs alone; call it without torchrun")
    for method in args.compare or ():
        if method not in (*METHODS, *BASELINES):
            parser.error(f"--compare {method}: choose from {names}, {baselines}")
    if sum(map(bool, (args.compare, args.prompts, listing))) > 1:
        parser.error("--compare, --prompts and the lists of captions are questions of their own; ask one at a time")
    if args.json and not args.question:
        wanted = "--prompts, --most-uncertain and --least-uncertain; results/ holds the JSON of an evaluation"
        parser.error(f"--json: goes with {wanted}")
    if args.compare and not args.resamples:
        parser.error("--resamples 0: a comparison needs resamples")
    if args.compare and args.compare[0] == args.compare[1]:
        parser.error(f"--compare {args.compare[0]} {args.compare[1]}: give two different methods")
    return args


def check_counts(args, cache):
    """Raise a UserError if there are more levels or folds than queries to fill them."""
    queries = len(cache.image_of_caption.unique())
    for flag, value, what in (("uncer_levels", args.uncer_levels, "levels"), ("folds", args.folds, "folds")):
        if value > queries:
            there = f"there are only {queries} image queries in {cache.folder}"
            raise UserError(f"--{flag} {value}: {there}; choose fewer {what}")


def load_adaptors(args, cache, device):
    """{(method, seed): Adaptor} of all methods and seeds. Raises: UserError if one is missing or does not fit the cache."""
    runs = [(method, seed) for method in args.method for seed in args.seed]
    paths = {(method, seed): checkpoint_path(args.dataset, seed, method) for method, seed in runs}
    for (method, seed), path in paths.items():
        if not path.exists():
            command = f"python train.py --dataset {args.dataset} --method {method} --seed {seed}"
            raise UserError(f"{path}: no such checkpoint; make it with {command}")
    adaptors = {key: load_adaptor(path, device, key[0]) for key, path in paths.items()}
    for key, adaptor in adaptors.items():
        if adaptor.embed_dim != cache.embed_dim:
            widths = f"{adaptor.embed_dim} wide, those of {args.dataset} are {cache.embed_dim} wide"
            raise UserError(f"{paths[key]}: trained on embeddings {widths}; train again")
    return adaptors


@torch.inference_mode()
def evaluate(scorer, cache, levels, folds=1, ladder=None, chains=None):
    """All figures of one scorer on one split.

    Args: levels: K. folds: parts of the gallery, 1: none. ladder, chains: what load_texts and load_chains return.
    Returns: Results.
    """
    results = Results.of(answer(scorer, cache), levels)
    if folds > 1:
        results.metrics[FOLDS.key] = recall_in_folds(scorer, cache, folds)
    if ladder is not None and scorer.on_ladder:
        values = scorer.text_uncertainty(*ladder[:2]).tolist()
        results.content["ladder"] = [{"prompt": p, "uncertainty": u} for p, u in zip(ladder[0], values, strict=True)]
    for stem, (texts, z, rows) in (chains or {}).items():
        uncertainty = scorer.text_uncertainty(texts, z)
        if uncertainty is not None:
            section = hierarchy_section(f"hierarchy {stem}")
            results.metrics[section.key] = measure_group(section.group, {"uncertainty": uncertainty, "chains": rows})
            results.content.setdefault("depth", {})[stem] = uncertainty_by_depth(uncertainty, rows)
    return results


def report(results, args, cache):
    """Write the tables and plots of results/<name>/ and print the short ones."""
    folder = ROOT / args.dataset
    title = (
        f"{args.dataset}/{args.split}: {len(cache.image)} images, {len(cache.text)} captions; {name_seeds(args.seed)}"
    )
    compared, detailed = tables.compare(results), tables.details(results)
    texts = {
        "comparison.md": tables.markdown(compared),
        "details.md": tables.markdown(detailed) + (tables.intervals(results) if args.resamples else ""),
        "comparison.csv": tables.comma_separated(compared + detailed),
        "report.txt": f"{title}\n\n{tables.screen(results)}\n",
    }
    plots = {}
    if not args.no_plots:
        from utils.evaluation.plots import draw_all  # matplotlib takes a second to import

        plots = draw_all(results, folder)
    command = f"python eval.py --dataset {args.dataset} --method {' '.join(args.method)}"
    command += f" --seed {' '.join(map(str, args.seed))} --split {args.split} --uncer_levels {args.uncer_levels}"
    command += f" --folds {args.folds} --resamples {args.resamples}"
    texts["README.md"] = tables.index(title, command, texts, plots)
    for name, text in texts.items():
        save_text(text, folder / name)
    what = "a .json and .npz for every method and seed, tables and plots; README.md there shows them together"
    logging.info("written to %s: %s\n", folder, what)
    print(texts["report.txt"], end="")


def compare(args):
    """Print how two methods differ over the same queries, from results written before."""
    folder = ROOT / args.dataset
    runs = {
        method: [load_result(args, method, seed) for seed in ([None] if method in BASELINES else args.seed)]
        for method in args.compare
    }
    text = compare_methods(runs, args.uncer_levels, args.resamples)
    title = f"{args.dataset}/{args.split}, {' against '.join(args.compare)}, {name_seeds(args.seed)}: "
    title += f"{args.resamples} paired resamples of the queries, {LEVEL:.0%} intervals"
    save_text(f"{title}\n\n{text}\n", folder / f"{'-against-'.join(args.compare)}.txt")
    print(f"{title}\n\n{text}")


def load_result(args, method, seed):
    path = result_path(ROOT / args.dataset, method, seed)
    if not path.with_suffix(".npz").exists() or not path.with_suffix(".json").exists():
        how = f"--method {method if method in METHODS else 'all'} --seed {' '.join(map(str, args.seed))}"
        raise UserError(f"{path}.npz: no such results; make them with python eval.py --dataset {args.dataset} {how}")
    return Results.load(path, args.split)


def save_text(text, path):
    with written_aside(path) as file:
        file.write(text.encode())


def name_seeds(seeds):
    return f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"


def every_scorer(cache, adaptors):
    """The baselines, then the adaptors: (row name, seed, Scorer)."""
    yield "frozen cosine", None, FrozenCosine(cache)
    for name, baseline in BASELINES.items():
        if name != "caption-length" or cache.captions is not None:
            yield name, None, baseline(cache)
    for (method, seed), adaptor in adaptors.items():
        yield method, seed, AdaptorScorer(adaptor, cache)


@torch.inference_mode()
def ask(args, cache, adaptors, device):
    """Print how uncertain prompts are among the captions of the split, or the most and least uncertain captions."""
    if args.prompts:
        texts = prompts_from(args.prompts)
        z = embed_prompts(args.dataset, texts, device)
    found = {}
    for (method, seed), adaptor in adaptors.items():
        scorer = AdaptorScorer(adaptor, cache)
        rows = (
            describe_prompts(scorer, texts, z)
            if args.prompts
            else describe_captions(scorer, args.most_uncertain or 0, args.least_uncertain or 0)
        )
        found[f"{method}, seed {seed}"] = rows
    print(json.dumps(found, indent=1) if args.json else tables.rows_as_tables(found))


def embed_prompts(name, texts, device):
    """The embeddings (T, D) of texts by the CLIP that made a cache, in the cache's type."""
    from cache_embeddings import clip_of_cache, encode_texts  # seam: clip_id(name).load(device), utils.embed

    clip, dtype = clip_of_cache(name, device)
    return encode_texts(clip, texts).to(dtype)


if __name__ == "__main__":
    sys.exit(run(main))
