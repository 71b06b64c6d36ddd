"""Results of methods and their variants in, one table of them out: results/<name>/ablation.md.

python -m utils.evaluation.ablation --dataset shapes --method all variants --seed 0 1 2
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from models import GROUPS, expand_groups
from utils.cli import Parser, folder_name, run_script, seed_number, whole_number
from utils.evaluation.bootstrap import RESAMPLES, interval, over_seeds
from utils.evaluation.figures import DIRECTIONS, SECTIONS, views_of
from utils.evaluation.results import load_results, save_texts
from utils.evaluation.tables import number

SHOWN = ("R@1", "AURC")


def main(argv=None):
    parser = Parser(description="One table of what is evaluated already: R@1 and AURC with their intervals.")
    add = parser.add_argument
    add("--dataset", type=folder_name, default="coco", help="folder under results/ (default: coco)")
    rows = "methods, rows without training, groups of methods (default: %(default)s)"
    add("--method", nargs="+", type=folder_name, default=[*GROUPS], help=rows)
    add("--seed", nargs="+", type=seed_number, default=[0])
    add("--split", type=folder_name, default="val")
    add("--resamples", type=whole_number, default=RESAMPLES, help="of the intervals; 0: none (default: %(default)s)")
    args = parser.parse_args(argv)
    folder, seeds = Path("results") / args.dataset, list(dict.fromkeys(args.seed))
    runs = {method: load_results(folder, method, seeds, args.split) for method in expand_groups(args.method)}
    title = f"{args.dataset}/{args.split}, {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
    text = table(runs, title, args.resamples)
    save_texts({"ablation.md": text}, folder)
    print(text, end="")


def table(results, title, resamples):
    """A markdown table of {row name: [Results, one a seed]}: means over seeds, the best in bold, and 95 % intervals.

    A resample draws images, each with all its captions, and, of several seeds, the seeds (bootstrap.py).
    """
    sections = [
        replace(section, figures=tuple(figure for figure in section.figures if figure.name in SHOWN))
        for section in SECTIONS
        if section.key in DIRECTIONS
    ]
    columns = [(section, figure) for section in sections for figure in section.figures]
    means, intervals = {}, {}
    for name, runs in results.items():
        views = [views_of(run.answers, levels=1) for run in runs]
        for section in sections:
            values = [section.measure(view[section.view]) for view in views]
            draws = [section.resample(view[section.view], resamples) for view in views]
            for figure in section.figures:
                means[name, section, figure] = float(np.mean([value[figure.name] for value in values]))
                limits = interval(over_seeds([draw[figure.name] for draw in draws])) if resamples else None
                intervals[name, section, figure] = f" [{number(limits[0])}, {number(limits[1])}]" if limits else ""

    def cell(name, section, figure):
        best = (max if figure.more_is_better else min)(means[other, section, figure] for other in results)
        mean = number(means[name, section, figure])
        return (f"**{mean}**" if mean == number(best) else mean) + intervals[name, section, figure]

    rows = [[title, *(f"{figure.name} {section.key}" for section, figure in columns)]]
    rows += [[name, *(cell(name, *column) for column in columns)] for name in results]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * len(columns), *lines[1:]]) + "\n"


if __name__ == "__main__":
    sys.exit(run_script(main))
