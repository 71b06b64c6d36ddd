"""Comparisons of methods that have already been evaluated, from their saved results.

`eval.py --compare A B` prints the paired bootstrap of two methods. This module, as a script, writes
one table of many methods to results/<dataset>/<--name>.md. With --against, it also tells whether
the leads of one method survive.

python -m utils.questions.compare --dataset shapes --method all variants --seed 0 1 2
python -m utils.questions.compare --dataset shapes --method all originals \
    --score published frozen own --name fair --against asymvlm-psd --seed 0 1 2
"""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from models import expand_groups, untagged
from utils.cli import Parser, folder_name, need, run_script, seed_number, whole_number
from utils.evaluation.bootstrap import MIN_RESAMPLES, RESAMPLES
from utils.evaluation.figures import DIRECTIONS, SECTIONS, measure, measure_resamples
from utils.evaluation.metrics import COUNT
from utils.evaluation.results import Results, check_same_queries, load_results, save_texts
from utils.evaluation.scorers import OWN, PUBLISHED, SCORES, Row
from utils.evaluation.tables import (
    differences,
    estimate_of,
    interval_text,
    is_best,
    markdown_table,
    number,
    recipes_of,
    seeds_title,
    tables_of,
)
from utils.evaluation.training_free import TRAINING_FREE

METRICS = ("R@1", "AURC")  # that the table shows


def _shown_sections():
    """The sections of both directions, with METRICS alone."""
    sections = []
    for section in SECTIONS:
        if section.key in DIRECTIONS:
            figures = tuple(figure for figure in section.figures if figure.name in METRICS)
            sections.append(replace(section, figures=figures))
    return sections


def _columns():
    """The title of each column, with its section and figure."""
    columns = {}
    for section in SHOWN:
        for figure in section.figures:
            columns[f"{figure.name} {section.key}"] = (section, figure)
    return columns


SHOWN = _shown_sections()
COLUMNS = _columns()
ROUNDING = 1e-3  # share of queries whose answers may differ through rounding alone
SURVIVES = "survives"
TIED = "tied"
REVERSED = "reversed"
RESERVED_NAMES = (  # of files that eval.py writes
    "README",
    "comparison",
    "t2i",
    "details",
    "risk",
    "paper",
    "zero-shot",
    "zero-shot-all",
)
OWN_SCORES = "`models/README.md` says what each method's own score is and how it is computed.\n"
HOW = """Differences, {leader} minus the baseline, are of means over seeds. Their 95 % intervals
are over resampled images, each with all its captions, and with several seeds also over the seeds of
both (Student's t). They are not corrected for the number of comparisons. A lead survives if the
whole interval favours {leader}, is tied if the interval contains 0, and is reversed if the whole
interval favours the baseline. A baseline is represented by its row that is best in the metric on
these very queries; this favours the baseline.
"""


def paired_bootstrap(results, levels, resamples, levels_by=COUNT):
    """How two methods differ over the same queries, as `tables.differences` writes it.

    Args:
        results: {Row: [Results, one per seed]}, of two rows.
        levels: number of uncertainty levels.
        resamples: how many.
        levels_by: how the queries are cut into levels (`metrics.recall_by_level`).
    Raises: UserError if the queries or the caches are not the same, or if there are fewer queries
        than levels.
    """
    queries = min(check_same_queries(results, "--compare"))
    problem = f"--uncer_levels {levels}: there are only {queries} queries in the results"
    need(levels <= queries, f"{problem}; choose fewer levels")
    resampled = {}
    for row, runs in results.items():
        resampled[row] = [
            Results.of(run.answers, levels, levels_by).bootstrap(levels, resamples, levels_by)
            for run in runs
        ]
    return differences(resampled)


def main(argv=None):
    args = parse(argv)
    folder = Path("results") / args.dataset
    results = {}
    labels = {}
    for method in args.method:
        for row, scores, runs in load_rows(folder, method, args.score, args.seed, args.split):
            results[row] = runs
            labels[row] = label(method, scores)
    if args.against is not None:
        check_same_queries(results, "--against")
    for row, runs in results.items():
        results[row] = [with_shown_metrics(run, args.resamples) for run in runs]
    title = f"{args.dataset}/{args.split}, {seeds_title(args.seed)}"
    recipes = recipes_of(results)
    if len(recipes) == 1:
        title += f", {next(iter(recipes))}"
    else:
        for recipe, rows in recipes.items():
            for row in rows:
                labels[row] += f" ({recipe})"
    parts = [table(results, labels, title)]
    if OWN in args.score:
        parts.append(OWN_SCORES)
    if args.against is not None:
        parts += lead_tables(results, labels, args.against)
        parts.append(HOW.format(leader=args.against))
    text = "\n".join(parts)
    save_texts({f"{args.name}.md": text}, folder)
    print(text, end="")


def parse(argv):
    parser = Parser(
        description="Make one table of methods that have already been evaluated: R@1 and AURC with "
        "their intervals."
    )
    add = parser.add_argument
    add("--dataset", type=folder_name, default="coco", help="folder in results/ (default: coco)")
    add(
        "--method",
        nargs="+",
        type=folder_name,
        default=["all", "variants"],
        help="methods, training-free rows, groups of methods (default: %(default)s)",
    )
    add(
        "--score",
        nargs="+",
        choices=SCORES,
        default=[PUBLISHED],
        help="what ranks, one row each (default: published)",
    )
    add("--seed", nargs="+", type=seed_number, default=[0])
    add("--split", type=folder_name, default="val")
    add(
        "--resamples",
        type=whole_number,
        default=RESAMPLES,
        help="resamples for the intervals; 0: no intervals (default: %(default)s)",
    )
    add(
        "--against",
        metavar="METHOD",
        help="also tell whether the leads of this method over other methods survive, without those "
        "of its own family (pfe and pfe-original are one)",
    )
    add(
        "--name",
        type=folder_name,
        default="ablation",
        help="name of the file (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    args.method = expand_groups(args.method)
    args.score = list(dict.fromkeys(args.score))
    args.seed = list(dict.fromkeys(args.seed))
    is_free = args.name not in RESERVED_NAMES
    need(is_free, f"--name {args.name}: eval.py writes a file of this name; choose another")
    if args.against is not None:
        check_leader(args.against, args.method, args.resamples)
    return args


def check_leader(leader, methods, resamples):
    """Raise a UserError if --against cannot be answered."""
    flag = f"--against {leader}"
    need(leader in methods, f"{flag}: not in the table; add it to --method")
    others = [method for method in methods if family(method) != family(leader)]
    need(others, f"{flag}: no method of another family is in the table; add one to --method")
    is_enough = resamples >= MIN_RESAMPLES
    need(is_enough, f"--resamples {resamples}: --against needs at least {MIN_RESAMPLES}")


def load_rows(folder, method, scores, seeds, split):
    """The rows of a method, one for each score by which it answers differently.

    Returns: a list of (Row, names of the scores that answer alike, [Results, one per seed]).
    Raises: UserError as `load_results`.
    """
    if method in TRAINING_FREE:
        scores = [PUBLISHED]
    rows = []
    for score in scores:
        runs = load_results(folder, Row(method, score), seeds, split)
        for _, scores_of_row, runs_of_row in rows:
            if all(map(answers_alike, runs, runs_of_row)):
                scores_of_row.append(score)
                break
        else:
            rows.append((Row(method, score), [score], runs))
    return rows


def answers_alike(results, others):
    """Whether two Results agree, but for ROUNDING, in rank, first answer and uncertainty."""
    for direction, answered in results.answers.items():
        answered_by_other = others.answers[direction]
        if len(answered["rank"]) != len(answered_by_other["rank"]):
            return False
        differs = np.zeros(len(answered["rank"]), dtype=bool)
        for name in ("rank", "top1", "uncertainty", "image_uncertainty"):
            if (name in answered) != (name in answered_by_other):
                return False
            if name in answered:
                differs |= answered[name] != answered_by_other[name]
        if differs.mean() > ROUNDING:
            return False
    return True


def label(method, scores):
    """The name of a row that answers alike by these scores: "pfe, published and frozen score"."""
    if scores == [PUBLISHED]:
        return method
    *first, last = scores
    joined = f"{', '.join(first)} and {last}" if first else last
    return f"{method}, {joined} score"


def family(method):
    """`pfe` for `pfe` and `pfe-original`; a training-free row is a family by itself."""
    return method if method in TRAINING_FREE else untagged(method).partition("-")[0]


def with_shown_metrics(run, resamples):
    """The Results of the same answers with the metrics of the table, resampled."""
    levels = 1  # these metrics need no levels
    content = {
        "metrics": measure(run.answers, levels, SHOWN),
        "config": run.content.get("config"),
    }
    draws = measure_resamples(run.answers, levels, resamples, SHOWN)
    return Results(run.answers, content, draws)


def table(results, labels, title):
    """A markdown table: means over seeds, the best in bold, and 95 % intervals.

    Args:
        results: {Row: [Results, one per seed]}.
        labels: {Row: name}.
    """
    tables = tables_of(results, SHOWN)
    lines = [[title, *COLUMNS]]
    for row, runs in results.items():
        line = [labels[row]]
        for section, figure in COLUMNS.values():
            cells = tables[section][figure]
            mean, _ = cells[row]
            text = number(mean)
            if is_best(figure, row, cells):
                text = f"**{text}**"
            estimate = estimate_of(runs, section, figure)
            if estimate is not None:
                text += interval_text(estimate)
            line.append(text)
        lines.append(line)
    return markdown_table(lines)


def lead_tables(results, labels, leader):
    """For each row of the leader, `lead_table` over the baselines of other families."""
    baselines = {}
    for row in results:
        if family(row.method) != family(leader):
            baselines.setdefault(family(row.method), []).append(row)
    rows_of_leader = [row for row in results if row.method == leader]
    return [lead_table(results, labels, row, baselines) for row in rows_of_leader]


def lead_table(results, labels, leader, baselines):
    """Whether the leads of a row survive: a markdown table and a sentence that sums it up.

    Args:
        results: {Row: [Results, one per seed]}, resampled.
        labels: {Row: name}.
        leader: its Row.
        baselines: {family: [Row, ...]}; the best row in each metric represents the family.
    """
    counts = Counter()
    lines = [[f"lead of {labels[leader]} over", *COLUMNS]]
    for name, rows in baselines.items():
        line = [name]
        for column in COLUMNS:
            verdict, text = _compare_with_best(results, labels, leader, rows, column)
            counts[column, verdict] += 1
            line.append(text)
        lines.append(line)
    sums = []
    for column in COLUMNS:
        survived = counts[column, SURVIVES]
        tied = counts[column, TIED]
        reversed_ = counts[column, REVERSED]
        sums.append(f"over {survived} in {column} ({tied} tied, {reversed_} reversed)")
    summary = f"its lead survives {', '.join(sums)}."
    sentence = f"{labels[leader]}: of {len(baselines)} baselines, {summary}"
    return f"{markdown_table(lines, words=len(COLUMNS))}\n{sentence}\n"


def _compare_with_best(results, labels, leader, rows, column):
    """The verdict on a lead over the best of some rows in one column, and the cell."""
    section, figure = COLUMNS[column]
    cells = tables_of(results, SHOWN)[section][figure]

    def mean_of(row):
        mean, _ = cells[row]
        return mean

    best = max(rows, key=mean_of) if figure.more_is_better else min(rows, key=mean_of)
    estimate_of_leader = estimate_of(results[leader], section, figure)
    difference = estimate_of_leader - estimate_of(results[best], section, figure)
    verdict = verdict_of(difference, figure.more_is_better)
    text = f"{difference.mean:+.3f}{interval_text(difference, '+.3f')}"
    return verdict, f"{verdict}, {text}, over {labels[best]}"


def verdict_of(difference, more_is_better):
    """What becomes of a lead, the Estimate of a difference: SURVIVES, TIED or REVERSED."""
    low, high = difference.interval()
    if low <= 0 <= high:
        return TIED
    is_more = low > 0
    return SURVIVES if is_more == more_is_better else REVERSED


if __name__ == "__main__":
    sys.exit(run_script(main))
