"""Checkpoint and embeddings in, retrieval by level of uncertainty out: results/<name>/, .json and .npz, tables, plots.

python eval.py --uncer_levels 10
python eval.py --dataset shapes --method all --seed 0 1 2
python eval.py --dataset shapes --seed 0 1 2 --compare asymvlm-psd prolip
python eval.py --dataset shapes --method all --score own
python eval.py --dataset shapes --prompts "a picture" "a picture of a red star"
python eval.py --dataset shapes --most-uncertain 5 --least-uncertain 5
"""

import json
import logging
import sys
from functools import partial
from pathlib import Path

from datasets.embedding import EmbeddingCache, clip_id
from datasets.texts import LADDER, load_chains, load_texts
from models import GROUPS, METHODS, expand_groups
from utils.checkpoint import load_adaptors
from utils.cli import Parser, chance, folder_name, need, positive, run_script, seed_number, torchrun_rank, whole_number
from utils.device import pick_device
from utils.embed import encode_texts, to_dtype
from utils.evaluation import questions, tables
from utils.evaluation.bootstrap import CONFIDENCE, MIN_RESAMPLES, RESAMPLES
from utils.evaluation.export import export, export_file
from utils.evaluation.reference import open_reference
from utils.evaluation.results import SUFFIXES, evaluate, load_results, result_name, save_texts, threshold_file
from utils.evaluation.selective import CONFIDENCE as SURE
from utils.evaluation.selective import RANKS, RISKS
from utils.evaluation.scorers import BASELINES, PUBLISHED, SCORES, every_scorer
from utils.lazy import Lazy
from utils.report import results_page

plots = Lazy("utils.evaluation.plots")


def main(argv=None):
    args = parse(argv)
    folder, split = Path("results") / args.dataset, f"{args.dataset}/{args.split}"
    seeds = f"{'seeds' if len(args.seed) > 1 else 'seed'} {', '.join(map(str, args.seed))}"
    if args.compare:
        runs = {name: load_results(folder, name, args.seed, args.split) for name in args.compare}
        heading = f"{split}, {' against '.join(args.compare)}, {seeds}"
        return compare(runs, heading, args.uncer_levels, args.resamples, folder)
    device = pick_device(args.device)
    cache = EmbeddingCache(args.dataset, args.split, mapped=bool(args.export)).to(device)
    if not (args.export or args.prompts or args.most_uncertain or args.least_uncertain):
        check_counts(cache, args.uncer_levels, args.folds)
    adaptors = load_adaptors(args.dataset, args.method, args.seed, cache, args.other_clip)
    if args.export:
        return export(args.export, adaptors, cache, args.score, args.texts, partial(load_texts, args.dataset))
    if args.prompts or args.most_uncertain or args.least_uncertain:
        lists, sought = (args.most_uncertain, args.least_uncertain), (args.risk[0], args.risk_at[0], args.confidence)
        answers = ask(adaptors, cache, folder, args.score, args.prompts, lists, sought)
        return print(json.dumps(answers, indent=1) if args.json else tables.rows_as_tables(answers))
    ladder = load_texts(args.dataset, LADDER, cache.embed_dim, meta=cache.meta)
    chains = load_chains(args.dataset, cache.embed_dim, meta=cache.meta)
    config = {key: getattr(args, key) for key in ("dataset", "split", "uncer_levels", "resamples", "folds")}
    config["cache"] = cache.digest
    risk = {"risks": args.risk, "confidence": args.confidence, "at": args.risk_at}
    train = partial(EmbeddingCache, args.dataset, "train", mapped=True)
    results, reference = {}, open_reference(train, cache, args.reference)
    for scorer in every_scorer(cache, adaptors, args.score, reference):
        run = evaluate(scorer, cache, args.uncer_levels, args.folds, ladder, chains, risk)
        if run.is_uncertain:
            run.bootstrap(args.uncer_levels, args.resamples)
            run.save(folder, config | scorer.config)
        results.setdefault(scorer.name, []).append(run)
    title = f"{split}: {len(cache.image)} images, {len(cache.text)} captions; {seeds}"
    flags = ["dataset", "method", "seed", "split", "uncer_levels", "folds", "resamples"]
    usual = {"score": PUBLISHED, "reference": None, "risk": RISKS, "confidence": SURE, "risk_at": RANKS}
    flags += [flag for flag, value in usual.items() if getattr(args, flag) != value]
    if args.score != PUBLISHED:
        title, folder = f"{title}; {SCORES[args.score]}", folder / args.score
    first = next(iter(adaptors.values()))
    examples = None if args.no_plots else questions.example_captions(first, cache, score=args.score)
    report(results, title, {flag: getattr(args, flag) for flag in flags}, folder, examples)


def parse(argv):
    names, baselines = ", ".join(METHODS), ", ".join(BASELINES)
    parser = Parser(description="Retrieval by uncertainty level, and what else to ask of a caption's uncertainty.")
    add = parser.add_argument
    add("--dataset", type=folder_name, default="coco", help="folder under embeddings/ (default: coco)")
    choices = {"choices": [*METHODS, *GROUPS], "metavar": "METHOD", "help": f"{names}, or {', '.join(GROUPS)}"}
    add("--method", nargs="+", default=["asymvlm-psd"], **choices)
    add("--seed", nargs="+", type=seed_number, default=[0])
    add("--split", type=folder_name, default="val")
    add("--uncer_levels", "--uncer-levels", type=positive, default=10, help="equally many queries each (default: 10)")
    folds = "also the mean recall over parts of the gallery (COCO 1K: 5 of the 5K test)"
    add("--folds", type=positive, default=1, help=folds)
    resamples = "of the bootstrap intervals over queries; 0: none (default: %(default)s)"
    add("--resamples", type=whole_number, default=RESAMPLES, help=resamples)
    score = "what ranks: as in the paper's repository, the frozen CLIP, or its authors (default: published)"
    add("--score", choices=SCORES, default=PUBLISHED, help=score)
    reference = "train images that reference-entropy compares texts with (default: all)"
    add("--reference", type=positive, metavar="N", help=reference)
    risk = "shares of wrong answers among those kept that are allowed (default: 0.1 0.2 0.3); --prompts takes the first"
    add("--risk", nargs="+", type=chance, default=RISKS, metavar="R", help=risk)
    add("--confidence", type=chance, default=SURE, help="that no more are wrong (default: %(default)s)")
    at = "right is a right answer among the first K (default: 1 5); --prompts takes the first"
    add("--risk-at", "--risk_at", nargs="+", type=positive, default=RANKS, metavar="K", help=at)
    add("--no-plots", action="store_true", help="tables only")
    add("--other-clip", action="store_true", help="evaluate heads on the embeddings of another CLIP than theirs")
    add("--device", default="auto")
    add = parser.add_argument_group("instead of an evaluation").add_argument
    pair = f"paired bootstrap of two methods evaluated before (by another --score: METHOD.own), or of {baselines}"
    add("--compare", nargs=2, metavar=("A", "B"), default=(), help=pair)
    add("--prompts", nargs="+", metavar="TEXT", help="how uncertain these texts are; @FILE: a text a line")
    add("--most-uncertain", type=positive, default=0, metavar="N", help="list captions of the split")
    add("--least-uncertain", type=positive, default=0, metavar="N", help="list captions of the split")
    add("--json", action="store_true", help="answer --prompts, --most-uncertain and --least-uncertain in JSON")
    add("--export", type=export_file, metavar="FILE", help="the scores of the split's captions; .csv, .jsonl, .parquet")
    add("--texts", type=folder_name, metavar="NAME", help="--export those of further embedded texts, texts/NAME")
    args = parser.parse_args(argv)
    args.method = expand_groups(args.method)
    args.seed, args.risk, args.risk_at = (list(dict.fromkeys(of)) for of in (args.seed, args.risk, args.risk_at))
    args.compare = [result_name(name, args.score) for name in args.compare]
    known = {*BASELINES, *(method + suffix for method in METHODS for suffix in SUFFIXES.values())}
    unknown = next((name for name in args.compare if name not in known), None)
    asks = bool(args.prompts) + bool(args.most_uncertain or args.least_uncertain)
    several = bool(args.compare) + bool(args.export) + asks > 1
    asking = "--prompts, --most-uncertain and --least-uncertain"
    for is_wrong, message in (
        (torchrun_rank()[1] > 1, "eval.py runs alone; call it without torchrun"),
        (unknown, f"--compare {unknown}: choose from {names}, {baselines}"),
        (several, "--compare, --export, --prompts and lists of captions are questions of their own; ask one at a time"),
        (args.texts and not args.export, "--texts: goes with --export"),
        (args.json and not asks, f"--json: goes with {asking}; results/ holds the JSON of an evaluation"),
        (args.compare and args.resamples < MIN_RESAMPLES, f"--resamples {args.resamples}: a comparison needs {MIN_RESAMPLES} at least"),
        (len(set(args.compare)) == 1, f"--compare {' '.join(args.compare)}: give two different methods"),
    ):
        if is_wrong:
            parser.error(message)
    return args


def check_counts(cache, levels, folds):
    """Raise a UserError if there are more levels or folds than queries to fill them."""
    queries = len(cache.image_of_caption.unique())  # images that have a caption: there are no fewer captions
    for flag, count, what in (("uncer_levels", levels, "levels"), ("folds", folds, "folds")):
        there = f"there are only {queries} image queries in {cache.folder}"
        need(count <= queries, f"--{flag} {count}: {there}; choose fewer {what}")


def report(results, title, flags, folder, examples):
    """Write tables and plots of {row name: [Results, one a seed]}, made with these flags; print the short ones.

    Args: examples: as `questions.example_captions` gives them; None: no plots.
    """
    texts = tables.write_all(results, title)
    pictures = {} if examples is None else plots.draw_all(results, examples, folder)
    words = (f"--{flag} {' '.join(map(str, v)) if isinstance(v, list) else v}" for flag, v in flags.items())
    page = results_page(title, f"python eval.py {' '.join(words)}", texts, pictures)
    save_texts(texts | {"README.md": page}, folder)
    logging.info("written to %s: README.md, tables and plots; and a .json and .npz for every method and seed\n", folder)
    print(texts["report.txt"], end="")


def compare(runs, heading, levels, resamples, folder):
    """Print and write how two methods, {method: [Results, one a seed]}, differ over the same queries."""
    text = f"{heading}: {resamples} paired resamples of the images and, each by itself, of the seeds; "
    text += f"{CONFIDENCE:.0%} intervals\n\n{questions.paired_bootstrap(runs, levels, resamples)}\n"
    save_texts({f"{'-against-'.join(runs)}.txt": text}, folder)
    print(text, end="")


def ask(adaptors, cache, folder, score, prompts, lists, sought):
    """How uncertain prompts are, or else the most and least uncertain captions: {method, seed: [dict, one a text]}.

    Args: lists: how many of these; sought: risk, k and confidence that thresholds in results/<name>/ are for.
    """
    if prompts:
        texts, clip = questions.prompts_from(prompts), clip_id(folder.name)
        z = to_dtype(encode_texts(clip.load(cache.device), texts), clip.dtype, texts)
    answers = {}
    for (method, seed), adaptor in adaptors.items():
        if prompts:
            file = threshold_file(folder, result_name(method, score), seed)
            decide = questions.decision(file, adaptor, cache, *sought)
            rows = questions.describe_prompts(adaptor, cache, texts, z, score, decide)
        else:
            rows = questions.describe_captions(adaptor, cache, *lists)
        answers[f"{method}, seed {seed}"] = rows
    return answers


if __name__ == "__main__":
    sys.exit(run_script(main))
