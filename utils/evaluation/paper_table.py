"""The paper's table: methods x (S, R2, -S*R2, R@1, AURC) x both directions, for print.

paper.md, paper.csv and paper.tex (booktabs); mean ± standard deviation over seeds. The best mean
of a column, as it is printed, is bold; ties are all bold.
"""

import csv
import io
import re

from models import TAG
from utils.evaluation.figures import DIRECTIONS, SECTIONS
from utils.evaluation.scorers import FROZEN_COSINE
from utils.evaluation.tables import best_mean, is_number, markdown_table, mean_and_std, number
from utils.evaluation.training_free import TRAINING_FREE

COLUMNS = ("S", "R2", "-S*R2", "R@1", "AURC")
# The columns are COLUMNS, of both directions.
LATEX_HEAD = r"""% needs \usepackage{booktabs}
\begin{tabular}{lrrrrrrrrrr}
\toprule
 & \multicolumn{5}{c}{text-to-image} & \multicolumn{5}{c}{image-to-text} \\
\cmidrule(lr){2-6}\cmidrule(lr){7-11}
 & $S$ & $R^2$ & $-SR^2$ & R@1 & AURC & $S$ & $R^2$ & $-SR^2$ & R@1 & AURC \\
\midrule"""
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
    table = {}  # (Section, Figure) -> {Row: (mean, std)}
    for section in SECTIONS:
        if section.key not in DIRECTIONS:
            continue
        figures = {figure.name: figure for figure in section.figures}
        for name in COLUMNS:
            figure = figures[name]
            cells = {row: mean_and_std(runs, section, figure) for row, runs in results.items()}
            table[section, figure] = cells
    return {
        "paper.md": _markdown(table, results),
        "paper.csv": _comma_separated(table, results),
        "paper.tex": _latex(table, results),
    }


def _cells_of(row, table, bold):
    """The cells of a Row as text. Args: bold: a format for the best means of a column."""
    texts = []
    for (_, figure), cells in table.items():
        mean, std = cells[row]
        text = number(mean, std)
        if is_number(mean) and number(mean) == number(best_mean(figure, cells)):
            text = bold.format(text)
        texts.append(text)
    return texts


def _markdown(table, rows):
    lines = [["", *(f"{figure.name} {section.key}" for section, figure in table)]]
    for row in rows:
        lines.append([paper_name(row), *_cells_of(row, table, "**{}**")])
    return markdown_table(lines)


def _comma_separated(table, rows):
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", "score", "direction", "metric", "mean", "std"])
    for row in rows:
        for (section, figure), cells in table.items():
            numbers = [repr(value) if is_number(value) else "" for value in cells[row]]
            writer.writerow([*row, section.key, figure.name, *numbers])
    return file.getvalue()


def _latex(table, rows):
    lines = [LATEX_HEAD]
    was_trained = True  # so that no rule follows the head
    for row in rows:
        is_trained = row.method not in (FROZEN_COSINE, *TRAINING_FREE)
        if is_trained and not was_trained:
            lines.append("\\midrule")  # between scores without training and trained heads
        was_trained = is_trained
        line = paper_name(row)
        for text in _cells_of(row, table, "\\mathbf{{{}}}"):
            cell = text.replace("±", "\\pm")
            line += " & --" if text == "-" else f" & ${cell}$"
        lines.append(f"{line} \\\\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join(lines) + "\n"
