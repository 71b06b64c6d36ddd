"""The paper's table: methods x (S, R2, -S*R2, R@1, AURC) x both directions, for print.

paper.md, paper.csv and paper.tex (booktabs); mean ± standard deviation over seeds. The best mean
of a column, as it is printed, is bold; ties are all bold.
"""

import csv
import io
import re

import numpy as np

from models import TAG
from utils.evaluation.figures import DIRECTIONS, SECTIONS
from utils.evaluation.scorers import FROZEN_COSINE
from utils.evaluation.training_free import TRAINING_FREE

COLUMNS = ("S", "R2", "-S*R2", "R@1", "AURC")
LATEX = {"S": "$S$", "R2": "$R^2$", "-S*R2": "$-SR^2$", "R@1": "R@1", "AURC": "AURC"}
PAPER_NAMES = {
    "asymvlm-psd": "AsymVLM (PSD)",
    "asymvlm-vmf": "AsymVLM (vMF)",
    "probvlm": "ProbVLM",
    "pfe": "PFE",
    "pcmepp": "PCME++",
    "prolip": "ProLIP",
}


def paper_name(row):
    """A Row's name as papers write it, such as "AsymVLM (PSD)"."""
    method, at, tag = row.method.partition(TAG)
    name = PAPER_NAMES.get(method, method)
    if at:
        name += f", {tag}"
    return name if row.score == "published" else f"{name}, {row.score} score"


def line_label(name):
    """The name of a line of a plot as papers write it.

    >>> line_label("asymvlm-psd, frozen score"), line_label("pcmepp@demo"), line_label("margin")
    ('AsymVLM (PSD), frozen score', 'PCME++@demo', 'margin')
    """
    method, *rest = re.split(f"({TAG}|, )", name, maxsplit=1)
    return "".join([PAPER_NAMES.get(method, method), *rest])


def texts(results):
    """The files of the table: {file name: text}; {} without a method that has an uncertainty.

    Args:
        results: {Row: [Results, one per seed]}.
    """
    if not any(runs[0].is_uncertain for runs in results.values()):
        return {}
    cells = {}
    for row, runs in results.items():
        cells[row] = [_mean_and_std(runs, *column) for column in _columns()]
    best = [_best_text(cells, number) for number in range(len(_columns()))]
    return {
        "paper.md": _markdown(cells, best),
        "paper.csv": _comma_separated(cells),
        "paper.tex": _latex(cells, best),
    }


def _columns():
    """(direction, Figure) of every column."""
    sections = {section.key: section for section in SECTIONS if section.key in DIRECTIONS}
    columns = []
    for direction in DIRECTIONS:
        figures = {figure.name: figure for figure in sections[direction].figures}
        columns += [(direction, figures[name]) for name in COLUMNS]
    return columns


def _mean_and_std(runs, direction, figure):
    """Mean and standard deviation over seeds; (None, None) if the metric is undefined."""
    values = [run.content["metrics"][direction].get(figure.name) for run in runs]
    if None in values:
        return None, None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), std


def _best_text(cells, number):
    """How the best mean of a column is printed; None if there is none."""
    _, figure = _columns()[number]
    means = [row[number][0] for row in cells.values() if row[number][0] is not None]
    if not means:
        return None
    best = max(means) if figure.more_is_better else min(means)
    return f"{best:.3f}"


def _cell(mean, std, best, bold, plus_minus):
    """The text of a cell.

    Args:
        bold: function that sets a text in bold.
        plus_minus: what stands between mean and deviation.
    """
    if mean is None:
        return "-"
    text = f"{mean:.3f}"
    is_best = text == best
    if std is not None:
        text += f"{plus_minus}{std:.3f}"
    return bold(text) if is_best else text


def _markdown(cells, best):
    names = [f"{name} {direction}" for direction in DIRECTIONS for name in COLUMNS]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for row, values in cells.items():
        texts = []
        for (mean, std), text in zip(values, best, strict=True):
            texts.append(_cell(mean, std, text, lambda cell: f"**{cell}**", " ± "))
        lines.append(f"| {paper_name(row)} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _comma_separated(cells):
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", "score", "direction", "metric", "mean", "std"])
    for row, values in cells.items():
        for (direction, figure), (mean, std) in zip(_columns(), values, strict=True):
            numbers = ["" if value is None else repr(value) for value in (mean, std)]
            writer.writerow([*row, direction, figure.name, *numbers])
    return file.getvalue()


def _latex(cells, best):
    directions = list(DIRECTIONS.values())
    width = len(COLUMNS)
    lines = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'r' * (2 * width)}}}",
        "\\toprule",
        f" & \\multicolumn{{{width}}}{{c}}{{{directions[0]}}}"
        f" & \\multicolumn{{{width}}}{{c}}{{{directions[1]}}} \\\\",
        f"\\cmidrule(lr){{2-{width + 1}}}\\cmidrule(lr){{{width + 2}-{2 * width + 1}}}",
        f" & {' & '.join([LATEX[name] for name in COLUMNS] * 2)} \\\\",
        "\\midrule",
    ]
    was_trained = False
    for row, values in cells.items():
        is_trained = row.method not in (FROZEN_COSINE, *TRAINING_FREE)
        if is_trained and not was_trained and row != next(iter(cells)):
            lines.append("\\midrule")  # between scores without training and trained heads
        was_trained = is_trained
        texts = []
        for (mean, std), text in zip(values, best, strict=True):
            cell = _cell(mean, std, text, lambda cell: f"\\mathbf{{{cell}}}", " \\pm ")
            texts.append("--" if cell == "-" else f"${cell}$")
        lines.append(f"{paper_name(row)} & {' & '.join(texts)} \\\\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join(lines) + "\n"
