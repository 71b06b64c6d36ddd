"""Evaluate heads: cross-modal retrieval by uncertainty level; tables and plots in results/<name>/.

python eval.py --uncer_levels 10
python eval.py --dataset shapes --method all --seed 0 1 2
python eval.py --dataset shapes --method all --score own

eval.py can also answer questions about what has already been evaluated or cached:

python eval.py --dataset shapes --seed 0 1 2 --compare asymvlm-psd prolip
python eval.py --dataset shapes --prompts "a picture" "a picture of a red star"
python eval.py --dataset shapes --most-uncertain 5 --least-uncertain 5
python eval.py --dataset shapes --export scores.csv
"""

import argparse
import json
import logging
import sys

from datasets.embedding import EmbeddingCache, clip_id
from datasets.texts import LADDER, load_chains, load_texts
from models import GROUPS, METHODS, expand_groups, untagged
from utils.cli import (
    Parser,
    chance,
    folder_name,
    need,
    positive,
    run_script,
    seed_number,
    torchrun_rank,
    whole_number,
)
from utils.device import pick_device
from utils.embed import encode_texts, to_dtype
from utils.evaluation import paper_table, selective, tables
from utils.evaluation.bootstrap import CONFIDENCE, MIN_RESAMPLES, RESAMPLES
from utils.evaluation.metrics import COUNT, SPACING
from utils.evaluation.results import (
    evaluate,
    load_results,
    parse_row,
    results_folder,
    row_name,
    save_texts,
    threshold_file,
)
from utils.evaluation.scorers import PUBLISHED, SCORES, Row
from utils.evaluation.tables import seeds_title
from utils.evaluation.training_free import TRAINING_FREE, every_scorer, open_reference
from utils.questions import prompts, zero_shot, zero_shot_tables
from utils.questions.compare import paired_bootstrap
from utils.questions.export import export, export_file
from utils.report import results_page
from utils.trained import load_adaptors

# Flags in the command that makes the results again.
ALWAYS_NAMED = ("dataset", "method", "seed", "split", "uncer_levels", "folds", "resamples")
NAMED_IF_CHANGED = (
    "trained_on",
    "levels_by",
    "score",
    "reference",
    "risk",
    "confidence",
    "risk_at",
)


def main(argv=None):
    args = parse(argv)
    folder = results_folder(args.dataset, args.trained_on)
    if args.compare:
        compare(args, folder)
        return
    device = pick_device(args.device)
    # --export reads a cache in shards batch by batch.
    cache = EmbeddingCache(args.dataset, args.split, mapped=bool(args.export)).to(device)
    if not (asks_for_captions(args) or asks_other_question(args)):
        check_counts(cache, args.uncer_levels, args.folds)
    trained_on = args.trained_on or args.dataset
    adaptors = load_adaptors(trained_on, args.method, args.seed, cache, args.other_clip)
    if args.export:
        export_scores(args, adaptors, cache)
    elif args.prompts:
        print_answers(ask_prompts(args, adaptors, cache, folder), args.json)
    elif args.zero_shot:
        classify(args, adaptors, cache, folder)
    elif asks_for_captions(args):
        print_answers(list_captions(args, adaptors, cache), args.json)
    else:
        results = evaluate_all(args, adaptors, cache, folder)
        report(args, results, adaptors, cache, folder)


def parse(argv):
    parser = Parser(
        description="Evaluate retrieval by uncertainty level, or answer a question about the "
        "uncertainty of captions."
    )
    add_evaluation_flags(parser)
    add_question_flags(parser)
    args = parser.parse_args(argv)
    args.method = expand_groups(args.method)
    args.seed = list(dict.fromkeys(args.seed))
    args.risk = list(dict.fromkeys(args.risk))
    args.risk_at = list(dict.fromkeys(args.risk_at))
    check_flags(parser, args)
    return args


def add_evaluation_flags(parser):
    add = parser.add_argument_group("what is evaluated").add_argument
    add("--dataset", type=folder_name, default="coco", help="folder in embeddings/ (default: coco)")
    add(
        "--method",
        nargs="+",
        default=["asymvlm-psd"],
        type=method_name,
        metavar="METHOD",
        help=f"{', '.join(METHODS)}, or {', '.join(GROUPS)}; METHOD@TAG for what train.py --tag "
        "made (default: asymvlm-psd)",
    )
    add("--seed", nargs="+", type=seed_number, default=[0], help="seeds of the training")
    add(
        "--trained-on",
        type=folder_name,
        metavar="NAME",
        help="evaluate the heads of checkpoints/NAME (default: those of --dataset)",
    )
    add("--split", type=folder_name, default="val", help="split of the data set (default: val)")
    add(
        "--score",
        choices=SCORES,
        default=PUBLISHED,
        help="what ranks: published, the score of the paper's repository; frozen, the frozen "
        "CLIP's cosine; own, the score of each method's authors (default: published)",
    )
    add(
        "--reference",
        type=positive,
        metavar="N",
        help="number of training images that reference-entropy compares texts with (default: all)",
    )
    add(
        "--other-clip",
        action="store_true",
        help="accept heads that were trained on the embeddings of a different CLIP",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")

    add = parser.add_argument_group("how it is evaluated").add_argument
    add(
        "--uncer_levels",
        "--uncer-levels",
        type=positive,
        default=10,
        help="number of uncertainty levels (default: 10)",
    )
    add(
        "--levels-by",
        "--levels_by",
        choices=(COUNT, SPACING),
        default=COUNT,
        help="cut the levels by count, equally many queries each, or by spacing, intervals of "
        "uncertainty of equal width (default: count)",
    )
    add(
        "--folds",
        type=positive,
        default=1,
        metavar="N",
        help="also report the recall averaged over N parts of the gallery (COCO 1K: 5 parts of the "
        "5K test split)",
    )
    add(
        "--resamples",
        type=whole_number,
        default=RESAMPLES,
        help="bootstrap resamples for the intervals; 0: no intervals (default: %(default)s)",
    )
    add(
        "--risk",
        nargs="+",
        type=chance,
        default=selective.RISKS,
        metavar="R",
        help="allowed shares of wrong answers among the kept answers (default: 0.1 0.2 0.3); "
        "--prompts uses only the first",
    )
    add(
        "--confidence",
        type=chance,
        default=selective.CONFIDENCE,
        metavar="P",
        help="the probability that the share of wrong answers stays within --risk (default: "
        "%(default)s)",
    )
    add(
        "--risk-at",
        "--risk_at",
        nargs="+",
        type=positive,
        default=selective.RANKS,
        metavar="K",
        help="an answer counts as right if a right one is among the first K (default: 1 5); "
        "--prompts uses only the first",
    )
    add("--no-plots", action="store_true", help="write tables only")


def method_name(text):
    """An argparse type: a method or a group of methods, with or without a tag."""
    names = [*METHODS, *GROUPS]
    if untagged(text) not in names:
        choices = ", ".join(names)
        raise argparse.ArgumentTypeError(f"{text!r} is not a method: choose from {choices}")
    return text


def add_question_flags(parser):
    group = parser.add_argument_group("questions, instead of an evaluation")
    group.add_argument(
        "--most-uncertain",
        type=positive,
        default=0,
        metavar="N",
        help="list the N most uncertain captions",
    )
    group.add_argument(
        "--least-uncertain",
        type=positive,
        default=0,
        metavar="N",
        help="list the N least uncertain captions; can be combined with --most-uncertain",
    )
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="compare two methods that have already been evaluated, by a paired bootstrap; "
        "METHOD.own or METHOD.frozen for another --score, or one of "
        f"{', '.join(TRAINING_FREE)}",
    )
    one.add_argument(
        "--prompts",
        nargs="+",
        metavar="TEXT",
        help="how uncertain these texts are; @FILE stands for the lines of a file",
    )
    one.add_argument(
        "--export",
        type=export_file,
        metavar="FILE",
        help="write the scores of the split's captions to a .csv, .jsonl or .parquet file",
    )
    one.add_argument(
        "--zero-shot",
        action="store_true",
        help="classify images by uncertain prompts; the cache must have classes",
    )
    group.add_argument(
        "--texts",
        type=folder_name,
        metavar="NAME",
        help="with --export: write the scores of the embedded texts in texts/NAME instead",
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="answer --prompts, --most-uncertain and --least-uncertain in JSON",
    )


def check_flags(parser, args):
    """Exit with a message if the flags do not fit together."""
    if torchrun_rank()[1] > 1:
        parser.error("eval.py runs in a single process; call it without torchrun")
    if asks_for_captions(args) and asks_other_question(args):
        parser.error(
            "--most-uncertain and --least-uncertain are not allowed with another question; "
            "ask one at a time"
        )
    if args.texts and not args.export:
        parser.error("--texts: goes with --export")
    if args.json and not (args.prompts or asks_for_captions(args)):
        parser.error(
            "--json: goes with --prompts, --most-uncertain and --least-uncertain; results/ holds "
            "the JSON of an evaluation"
        )
    if args.compare:
        check_comparison(parser, args)


def asks_for_captions(args):
    """Whether eval.py lists the most or least uncertain captions."""
    return bool(args.most_uncertain or args.least_uncertain)


def asks_other_question(args):
    """Whether --compare, --prompts, --export or --zero-shot is given."""
    return bool(args.compare or args.prompts or args.export or args.zero_shot)


def check_comparison(parser, args):
    """Turn --compare into two Rows; exit with a message if they cannot be compared."""
    rows = [parse_row(name, args.score) for name in args.compare]
    for row in rows:
        if untagged(row.method) not in METHODS and row.method not in TRAINING_FREE:
            choices = ", ".join([*METHODS, *TRAINING_FREE])
            parser.error(f"--compare {row_name(row)}: choose from {choices}")
    if rows[0] == rows[1]:
        parser.error(f"--compare {' '.join(args.compare)}: give two different methods")
    if args.resamples < MIN_RESAMPLES:
        parser.error(f"--resamples {args.resamples}: a comparison needs at least {MIN_RESAMPLES}")
    args.compare = rows


def check_counts(cache, levels, folds):
    """Raise a UserError if there are more levels or folds than queries to fill them."""
    # Images with captions are the queries. There are as many captions, or more.
    queries = len(cache.image_of_caption.unique())
    reason = f"there are only {queries} image queries in {cache.folder}"
    need(levels <= queries, f"--uncer_levels {levels}: {reason}; choose fewer levels")
    need(folds <= queries, f"--folds {folds}: {reason}; choose fewer folds")


# Evaluation.


def evaluate_all(args, adaptors, cache, folder):
    """Evaluate every row, and save those that have an uncertainty.

    Returns: {Row: [Results, one per seed]}.
    """
    ladder = load_texts(args.dataset, LADDER, cache.embed_dim, meta=cache.meta)
    chains = load_chains(args.dataset, cache.embed_dim, meta=cache.meta)
    risk = {"risks": args.risk, "confidence": args.confidence, "at": args.risk_at}
    config = {
        "dataset": args.dataset,
        "split": args.split,
        "uncer_levels": args.uncer_levels,
        "levels_by": args.levels_by,
        "resamples": args.resamples,
        "folds": args.folds,
        "cache": cache.digest,
    }
    if args.trained_on:
        config["trained_on"] = args.trained_on

    def load_train_split():
        return EmbeddingCache(args.dataset, "train", mapped=True)

    reference = open_reference(load_train_split, cache, args.reference)
    results = {}
    for scorer in every_scorer(cache, adaptors, args.score, reference):
        run = evaluate(
            scorer, cache, args.uncer_levels, args.folds, ladder, chains, risk, args.levels_by
        )
        run.content["config"] = {**config, **scorer.config}
        if run.is_uncertain:
            run.bootstrap(args.uncer_levels, args.resamples, args.levels_by)
            run.save(folder)
        results.setdefault(scorer.row, []).append(run)
    return results


def report(args, results, adaptors, cache, folder):
    """Write the tables and plots of all rows; print the short ones."""
    images = len(cache.image)
    captions = len(cache.text)
    title = f"{args.dataset}/{args.split}: {images} images, {captions} captions"
    title += f"; {seeds_title(args.seed)}"
    trained = tables.recipe_title(results)
    if trained:
        title += f"; {trained}"
    if args.trained_on:
        title += f"; heads trained on {args.trained_on}"
    tables_folder = folder
    if args.score != PUBLISHED:
        title += f"; {SCORES[args.score]}"
        tables_folder = folder / args.score
    texts = {**tables.all_texts(results, title), **paper_table.texts(results)}
    plot_captions = {}
    if not args.no_plots:
        from utils.evaluation import plots

        first_adaptor = next(iter(adaptors.values()))
        examples = prompts.example_captions(first_adaptor, cache, score=args.score)
        plot_captions = plots.draw_all(results, examples, tables_folder)
    page = results_page(title, command_of(args), texts, plot_captions)
    save_texts({**texts, "README.md": page}, tables_folder)
    logging.info("written to %s: README.md, tables and plots", tables_folder)
    logging.info("and to %s: the .json and .npz files of all rows with an uncertainty\n", folder)
    print(texts["report.txt"], end="")


def command_of(args):
    """The command that makes these results again."""
    defaults = parse([])
    command = "python eval.py"
    if args.other_clip:
        command += " --other-clip"
    for flag in ALWAYS_NAMED + NAMED_IF_CHANGED:
        value = getattr(args, flag)
        if flag in NAMED_IF_CHANGED and value == getattr(defaults, flag):
            continue
        values = value if isinstance(value, list) else [value]
        command += f" --{flag.replace('_', '-')} {' '.join(map(str, values))}"
    return command


# Questions.


def compare(args, folder):
    """Print and save how two methods differ over the same queries."""
    results = {row: load_results(folder, row, args.seed, args.split) for row in args.compare}
    names = [row_name(row) for row in results]
    differences = paired_bootstrap(results, args.uncer_levels, args.resamples, args.levels_by)
    training = f", trained on {args.trained_on}" if args.trained_on else ""
    recipes = tables.recipe_title(results)
    if recipes:
        training += f", {recipes}"
    has_seeds = any(len(runs) > 1 for runs in results.values())  # training-free rows have none
    over_seeds = " and Student's t over the seeds" if has_seeds else ""
    text = (
        f"{args.dataset}/{args.split}, {' against '.join(names)}, "
        f"{seeds_title(args.seed)}{training}: "
        f"{CONFIDENCE:.0%} intervals, from {args.resamples} paired resamples of the images"
        f"{over_seeds}; not corrected for the number of comparisons\n\n{differences}\n"
    )
    save_texts({f"{'-against-'.join(names)}.txt": text}, folder)
    print(text, end="")


def export_scores(args, adaptors, cache):
    """Write the scores of the split, or of further texts, to a file."""
    texts = None
    if args.texts:
        texts = load_texts(args.dataset, args.texts, cache.embed_dim, meta=cache.meta)
        problem = f"there are none of this name in {cache.folder.parent / 'texts'}"
        cure = f"embed a file: python cache_embeddings.py --name {args.dataset} --texts FILE"
        need(texts, f"--texts {args.texts}: {problem}; {cure}")
    written = export(args.export, adaptors, cache, args.score, texts)
    rows = ", ".join(f"{count} rows of {kind}s" for kind, count in written.items())
    logging.info("written to %s: %s", args.export, rows)


def classify(args, adaptors, cache, folder):
    """Zero-shot classification: print and save the table, and draw the plot."""
    results = zero_shot.classify_with_all(cache, adaptors, args.resamples)
    classes, prompts_per_class = zero_shot.classes_of(cache)
    title = f"{args.dataset}/{args.split}, {len(classes)} classes, {prompts_per_class} prompts each"
    title += f", {seeds_title(args.seed)}, heads trained on {args.trained_on or args.dataset}"
    text = zero_shot_tables.markdown(results, title, is_short=True)
    files = {
        "zero-shot.md": text,
        "zero-shot-all.md": zero_shot_tables.markdown(results, title),
        "zero-shot.csv": zero_shot_tables.comma_separated(results),
    }
    save_texts(files, folder)
    if not args.no_plots:
        zero_shot_tables.plot(results, folder / "zero-shot.png")
    print(text, end="")


def ask_prompts(args, adaptors, cache, folder):
    """How uncertain the texts of --prompts are: {"method, seed 0": [dict, one per text]}."""
    texts = prompts.prompts_from(args.prompts)
    clip = clip_id(args.dataset)
    z = to_dtype(encode_texts(clip.load(cache.device), texts), clip.dtype, texts)
    answers = {}
    for (method, seed), adaptor in adaptors.items():
        file = threshold_file(folder, Row(method, args.score), seed)
        decide = prompts.decision(
            file, adaptor, cache, args.risk[0], args.risk_at[0], args.confidence
        )
        rows = prompts.describe_prompts(adaptor, cache, texts, z, args.score, decide)
        answers[f"{method}, seed {seed}"] = rows
    if any("decision" in row for rows in answers.values() for row in rows):
        logging.info(prompts.GUARANTEE)
    return answers


def list_captions(args, adaptors, cache):
    """The most and least uncertain captions: {"method, seed 0": [dict, one per caption]}."""
    answers = {}
    for (method, seed), adaptor in adaptors.items():
        rows = prompts.describe_captions(adaptor, cache, args.most_uncertain, args.least_uncertain)
        answers[f"{method}, seed {seed}"] = rows
    return answers


def print_answers(answers, as_json):
    if as_json:
        print(json.dumps(answers, indent=1))
    else:
        print(tables.answers_text(answers))


if __name__ == "__main__":
    sys.exit(run_script(main))
