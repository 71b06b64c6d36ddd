"""Results in, one table of many out, and whether the leads in it survive: results/<name>/<NAME>.md.

python -m utils.evaluation.overview --dataset shapes --method all variants --seed 0 1 2
python -m utils.evaluation.overview --dataset shapes --method all originals --score published frozen own \
    --name fair --against asymvlm-psd --seed 0 1 2
"""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from models import expand_groups
from utils.cli import Parser, folder_name, need, run_script, seed_number, whole_number
from utils.evaluation.bootstrap import MIN_RESAMPLES, RESAMPLES, interval
from utils.evaluation.figures import DIRECTIONS, SECTIONS, measure, measure_resamples
from utils.evaluation.results import Results, check_same_queries, load_results, result_name, save_texts
from utils.evaluation.scorers import BASELINES, OWN, PUBLISHED, SCORES
from utils.evaluation.tables import between, draws_of, is_best, markdown_table, number, paired_draws, tables_of

SHOWN = [
    replace(section, figures=tuple(figure for figure in section.figures if figure.name in ("R@1", "AURC")))
    for section in SECTIONS
    if section.key in DIRECTIONS
]
COLUMNS = {f"{figure.name} {section.key}": (section, figure) for section in SHOWN for figure in section.figures}
ROUNDING = 1e-3  # share of the queries that rounding may answer otherwise where two scores are the same
SURVIVES, LEVEL, REVERSED = "survives", "level", "reversed"
OWN_SCORES = "`models/README.md` says what each method's own score is and how it is computed."
HOW = """Differences, {leader} less the rival, are of means over seeds, over the same resamples of the images, each with
all its captions; each side's seeds are resampled by themselves; 95 % intervals, not corrected for how many they are. A
lead survives where the interval is on its side of 0, is level where 0 is in it, and reversed where it is on the other
side. For a rival stands that row of it which is best in the figure on these very queries: that favours the rival."""


def main(argv=None):
    args = parse(argv)
    folder, leader = Path("results") / args.dataset, args.against
    rows = {method: load_rows(folder, method, args.score, args.seed, args.split) for method in args.method}
    results = {name: runs for rows_of_one in rows.values() for name, runs in rows_of_one.items()}
    if leader is not None:
        check_same_queries(results, "--against")
    results = {name: [shown(run, args.resamples) for run in runs] for name, runs in results.items()}
    seeds = f"{'seeds' if len(args.seed) > 1 else 'seed'} {', '.join(map(str, args.seed))}"
    parts = [table(results, f"{args.dataset}/{args.split}, {seeds}")]
    parts += [f"{OWN_SCORES}\n"] if OWN in args.score else []
    if leader is not None:
        rivals = {}
        for method in args.method:
            rivals.setdefault(family(method), []).extend(rows[method])
        del rivals[family(leader)]
        parts += [*(leads(results, name, rivals) for name in rows[leader]), f"{HOW.format(leader=leader)}\n"]
    text = "\n".join(parts)
    save_texts({f"{args.name}.md": text}, folder)
    print(text, end="")


def parse(argv):
    parser = Parser(description="One table of what is evaluated already: R@1 and AURC with their intervals.")
    add = parser.add_argument
    add("--dataset", type=folder_name, default="coco", help="folder under results/ (default: coco)")
    rows = "methods, rows without training, groups of methods (default: %(default)s)"
    add("--method", nargs="+", type=folder_name, default=["all", "variants"], help=rows)
    add("--score", nargs="+", choices=SCORES, default=[PUBLISHED], help="what ranks, a row each (default: published)")
    add("--seed", nargs="+", type=seed_number, default=[0])
    add("--split", type=folder_name, default="val")
    add("--resamples", type=whole_number, default=RESAMPLES, help="of the intervals; 0: none (default: %(default)s)")
    add("--against", metavar="METHOD", help="also whether this one's leads over methods of other families survive")
    add("--name", type=folder_name, default="ablation", help="of the file (default: %(default)s)")
    args = parser.parse_args(argv)
    args.method = expand_groups(args.method)
    args.score, args.seed = (list(dict.fromkeys(given)) for given in (args.score, args.seed))
    taken, leader = args.name in ("README", "comparison", "t2i", "details"), args.against
    need(not taken, f"--name {args.name}: a file of that name is eval.py's; choose another")
    if leader is not None:
        need(leader in args.method, f"--against {leader}: not in the table; add it to --method")
        others = any(family(method) != family(leader) for method in args.method)
        need(others, f"--against {leader}: no method of another family is in the table; add one to --method")
        need(args.resamples >= MIN_RESAMPLES, f"--resamples {args.resamples}: --against needs {MIN_RESAMPLES} at least")
    return args


def load_rows(folder, method, scores, seeds, split):
    """The rows of a method, one for each score that it answers otherwise by: {row name: [Results, one a seed]}.

    Raises: UserError as `load_results`.
    """
    rows = []  # of scores, and their results
    for score in [PUBLISHED] if method in BASELINES else scores:
        runs = load_results(folder, result_name(method, score), seeds, split)
        alike = next((of for of, others in rows if all(map(answers_alike, runs, others))), None)
        if alike is None:
            rows.append(([score], runs))
        else:
            alike.append(score)
    return {row_name(method, of): runs for of, runs in rows}


def answers_alike(a, b):
    """Whether two Results answer alike: texts and images as uncertain, and ranked alike but for rounding."""
    for fields, others in zip(a.answers.values(), b.answers.values(), strict=True):
        compared = [field for field in ("rank", "top1", "uncertainty", "image_uncertainty") if field in fields | others]
        if len(fields["rank"]) != len(others["rank"]) or not fields.keys() & others.keys() >= {*compared}:
            return False
        if np.any([fields[field] != others[field] for field in compared], axis=0).mean() > ROUNDING:
            return False
    return True


def row_name(method, scores):
    """The row of a method that answers alike by these scores, such as "pfe, published and frozen score"."""
    *first, last = scores
    joined = f"{', '.join(first)} and {last}" if first else last
    return method if scores == [PUBLISHED] else f"{method}, {joined} score"


def family(method):
    """What methods are rivals by: `pfe` of `pfe` and `pfe-original`; a row without training is one by itself."""
    return method if method in BASELINES else method.partition("-")[0]


def shown(run, resamples):
    """The Results of the same answers with the figures that are shown, resampled."""
    content = {"metrics": measure(run.answers, 1, SHOWN)}
    return Results(run.answers, content, measure_resamples(run.answers, 1, resamples, SHOWN))


def table(results, title):
    """A markdown table of {row name: [Results, one a seed]}: means over seeds, the best in bold, and 95 % intervals.

    A resample draws images, each with all its captions, and, of several seeds, the seeds (bootstrap.py).
    """
    tables = tables_of(results, SHOWN)

    def cell(name, section, figure):
        mean, draws = number(tables[section][figure][name][0]), draws_of(results[name], section, figure)
        bold = f"**{mean}**" if is_best(figure, name, tables[section][figure]) else mean
        return bold + ("" if draws is None else between(draws))

    rows = [[name, *(cell(name, *column) for column in COLUMNS.values())] for name in results]
    return markdown_table([[title, *COLUMNS], *rows])


def leads(results, leader, rivals):
    """Whether a row's leads over rivals survive: a markdown table, and what it comes to, in a sentence.

    Args:
        results: {row name: [Results, one a seed]}, resampled.
        leader: the row.
        rivals: {rival: [row name, ...]}, of which the best in each figure stands for it.
    """
    tables, counts, lines = tables_of(results, SHOWN), Counter(), [[f"lead of {leader} over", *COLUMNS]]
    for rival, names in rivals.items():
        lines.append([rival])
        for column, (section, figure) in COLUMNS.items():
            mean_of = {name: cell[0] for name, cell in tables[section][figure].items()}
            best = (max if figure.more_is_better else min)(names, key=mean_of.get)
            draws = paired_draws(results[leader], results[best], section, figure)
            found = verdict(draws, figure.more_is_better)
            counts[column, found] += 1
            difference = f"{mean_of[leader] - mean_of[best]:+.3f}{between(draws, '+.3f')}"
            lines[-1].append(f"{found}, {difference}, over {best}")
    told = []
    for column in COLUMNS:
        kept, level, lost = (counts[column, found] for found in (SURVIVES, LEVEL, REVERSED))
        told.append(f"over {kept} in {column} ({level} level, {lost} reversed)")
    summary = f"{leader}: of {len(rivals)} rivals, its lead survives {', '.join(told)}."
    return f"{markdown_table(lines, words=len(COLUMNS))}\n{summary}\n"


def verdict(draws, more_is_better):
    """What becomes of a lead whose differences in resamples are these (resamples,): SURVIVES, LEVEL or REVERSED."""
    low, high = interval(draws if more_is_better else -draws)
    return SURVIVES if low > 0 else REVERSED if high < 0 else LEVEL


if __name__ == "__main__":
    sys.exit(run_script(main))
