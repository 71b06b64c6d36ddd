"""Checkpoint and embeddings in, retrieval by level of uncertainty out: results/<name>/, .json and .npz, tables, plots.

python eval.py --uncer_levels 10
python eval.py --dataset shapes --method all --seed 0 1 2
python eval.py --dataset shapes --seed 0 1 2 --compare asymvlm-psd prolip
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
from utils.checkpoint import check_fits, checkpoint_path, load_adaptor
from utils.cli import Parser, UserError, folder_name, positive, run_script, seed_number, torchrun_rank, whole_number
from utils.device import pick_device
from utils.embed import encode_texts, to_dtype
from utils.evaluation import questions, tables
from utils.evaluation.bootstrap import CONFIDENCE, LEAST, RESAMPLES
from utils.evaluation.results import evaluate, load_results, save_texts
from utils.evaluation.scorers import BASELINES, every_scorer
from utils.report import results_page


def main(argv=None):
    args = parse(argv)
    folder = Path("results") / args.dataset
    if args.compare:
        return compare(args, folder)
    device = pick_device(args.device)
    cache = EmbeddingCache(args.dataset, args.split).to(device)
    if args.asks:
        return ask(args, cache, load_adaptors(args, cache, device))
    check_counts(args, cache)
    adaptors = load_adaptors(args, cache, device)
    ladder = load_texts(args.dataset, LADDER, cache.embed_dim, meta=cache.meta)
    chains = load_chains(args.dataset, cache.embed_dim, meta=cache.meta)
    config = {key: getattr(args, key) for key in ("dataset", "split", "uncer_levels", "resamples", "folds")}
    config["cache"] = cache.digest
    results = {}
    for scorer in every_scorer(cache, adaptors):
        found = evaluate(scorer, cache, args.uncer_levels, args.folds, ladder, chains)
        if found.is_uncertain:
            found.bootstrap(args.uncer_levels, args.resamples)
            found.save(folder, config | {"method": scorer.name, "seed": scorer.seed, "checkpoint": scorer.checkpoint})
        results.setdefault(scorer.name, []).append(found)
    report(results, args, cache, folder)


def parse(argv):
    names, baselines = ", ".join(METHODS), ", ".join(BASELINES)
    about = "Cross-modal retrieval by uncertainty level, and what else there is to ask of a caption's uncertainty."
    parser = Parser(description=about)
    add = parser.add_argument
    add("--dataset", type=folder_name, default="coco", help="folder under embeddings/ (default: coco)")
    choices = {"choices": [*METHODS, *GROUPS], "metavar": "METHOD", "help": f"{names}, or {', '.join(GROUPS)}"}
    add("--method", nargs="+", default=["asymvlm-psd"], **choices)
    add("--seed", nargs="+", type=seed_number, default=[0])
    add("--split", type=folder_name, default="val")
    levels = "levels of equally many queries (default: 10)"
    add("--uncer_levels", "--uncer-levels", type=positive, default=10, help=levels)
    folds = "also the mean recall over parts of the gallery (COCO 1K: 5 of the 5K test)"
    add("--folds", type=positive, default=1, help=folds)
    resamples = "of the bootstrap intervals over queries; 0: none (default: %(default)s)"
    add("--resamples", type=whole_number, default=RESAMPLES, help=resamples)
    add("--no-plots", action="store_true", help="tables only")
    add("--other-clip", action="store_true", help="evaluate heads on the embeddings of another CLIP than theirs")
    add("--device", default="auto")
    add = parser.add_argument_group("instead of an evaluation").add_argument
    pair = f"paired bootstrap of two methods evaluated before, or of {baselines}"
    add("--compare", nargs=2, metavar=("A", "B"), default=(), help=pair)
    add("--prompts", nargs="+", metavar="TEXT", help="how uncertain these texts are; @FILE: a text a line")
    add("--most-uncertain", type=positive, default=0, metavar="N", help="list captions of the split")
    add("--least-uncertain", type=positive, default=0, metavar="N", help="list captions of the split")
    add("--json", action="store_true", help="answer --prompts, --most-uncertain and --least-uncertain in JSON")
    args = parser.parse_args(argv)
    args.method = expand_groups(args.method)
    args.seed = list(dict.fromkeys(args.seed))
    args.seeds = f"{'seeds' if len(args.seed) > 1 else 'seed'} {', '.join(map(str, args.seed))}"  # in titles
    args.asks = args.prompts or args.most_uncertain or args.least_uncertain
    unknown = next((method for method in args.compare if method not in (*METHODS, *BASELINES)), None)
    several = bool(args.compare) + bool(args.prompts) + bool(args.most_uncertain or args.least_uncertain) > 1
    asking = "--prompts, --most-uncertain and --least-uncertain"
    for is_wrong, message in (
        (torchrun_rank()[1] > 1, "eval.py runs alone; call it without torchrun"),
        (unknown, f"--compare {unknown}: choose from {names}, {baselines}"),
        (several, "--compare, --prompts and the lists of captions are questions of their own; ask one at a time"),
        (args.json and not args.asks, f"--json: goes with {asking}; results/ holds the JSON of an evaluation"),
        (args.compare and args.resamples < LEAST, f"--resamples {args.resamples}: a comparison needs {LEAST} at least"),
        (len(set(args.compare)) == 1, f"--compare {' '.join(args.compare)}: give two different methods"),
    ):
        if is_wrong:
            parser.error(message)
    return args


def check_counts(args, cache):
    """Raise a UserError if there are more levels or folds than queries to fill them."""
    queries = len(cache.image_of_caption.unique())  # images that have a caption: there are no fewer captions
    for flag, count, what in (("uncer_levels", args.uncer_levels, "levels"), ("folds", args.folds, "folds")):
        if count > queries:
            there = f"there are only {queries} image queries in {cache.folder}"
            raise UserError(f"--{flag} {count}: {there}; choose fewer {what}")


def load_adaptors(args, cache, device):
    """{(method, seed): Adaptor}. Raises: UserError if one is missing or does not fit the cache."""
    adaptors = {}
    for method, seed in [(method, seed) for method in args.method for seed in args.seed]:
        path = checkpoint_path(args.dataset, seed, method)
        if not path.exists():
            command = f"python train.py --dataset {args.dataset} --method {method} --seed {seed}"
            raise UserError(f"{path}: no such checkpoint; make it with {command}")
        adaptor = adaptors[method, seed] = load_adaptor(path, device, method)
        check_fits(adaptor, path, cache, args.other_clip)
    return adaptors


def report(results, args, cache, folder):
    """Write the tables and plots of results/<name>/ and print the short ones."""
    title = f"{args.dataset}/{args.split}: {len(cache.image)} images, {len(cache.text)} captions; {args.seeds}"
    texts, plots = tables.write_all(results, title), {}
    if not args.no_plots:
        from utils.evaluation.plots import draw_all  # matplotlib takes a second to import

        plots = draw_all(results, folder)
    flags = {"dataset": [args.dataset], "method": args.method, "seed": args.seed, "split": [args.split]}
    flags |= {key: [getattr(args, key)] for key in ("uncer_levels", "folds", "resamples")}
    command = " ".join(["python eval.py", *(f"--{key} {' '.join(map(str, values))}" for key, values in flags.items())])
    save_texts(texts | {"README.md": results_page(title, command, texts, plots)}, folder)
    what = "a .json and .npz for every method and seed, tables and plots; README.md there shows them together"
    logging.info("written to %s: %s\n", folder, what)
    print(texts["report.txt"], end="")


def compare(args, folder):
    """Print how two methods differ over the same queries, from results written before."""
    runs = {method: load_results(folder, method, args.seed, args.split) for method in args.compare}
    title = f"{args.dataset}/{args.split}, {' against '.join(args.compare)}, {args.seeds}: "
    title += f"{args.resamples} paired resamples of the images and, each by itself, of the seeds; {CONFIDENCE:.0%} intervals"
    text = f"{title}\n\n{questions.compare_runs(runs, args.uncer_levels, args.resamples)}\n"
    save_texts({f"{'-against-'.join(args.compare)}.txt": text}, folder)
    print(text, end="")


def ask(args, cache, adaptors):
    """Print how uncertain prompts are among the captions of the split, or the most and least uncertain captions."""
    if args.prompts:
        texts = questions.prompts_from(args.prompts)
        made_by = clip_id(args.dataset)
        z = to_dtype(encode_texts(made_by.load(cache.device), texts), made_by.dtype, texts)
        describe = partial(questions.describe_prompts, texts=texts, z=z)
    else:
        describe = partial(questions.describe_captions, most=args.most_uncertain, least=args.least_uncertain)
    found = {f"{method}, seed {seed}": describe(adaptor, cache) for (method, seed), adaptor in adaptors.items()}
    print(json.dumps(found, indent=1) if args.json else tables.rows_as_tables(found))


if __name__ == "__main__":
    sys.exit(run_script(main))
