"""Tables and a plot of zero-shot classification.

zero-shot.md has the plainest rows, zero-shot-all.md and zero-shot.csv have all, and zero-shot.png
shows the accuracy by the number of prompts.
"""

import csv
import io

import numpy as np

from utils.evaluation.bootstrap import Estimate
from utils.evaluation.tables import between, markdown_table, number

COLUMNS = (
    "top-1",
    "top-5",
    "NLL",
    "ECE",
    "AURC by p",
    "AURC by class",
    "AUROC by p",
    "AUROC by class",
)
SHORT = ("uniform", "top 1", "threshold", "inverse", "BPRW")  # weightings of zero-shot.md
SHORT_SCORE = "unit"  # and its score
WITH_INTERVAL = ("top-1",)  # the others have it in the .csv


def rows_of(results):
    """{(method, weighting, score): list of (metrics, draws), one per seed}.

    Args:
        results: {(method, seed): what `zero_shot.classify` returns}.
    """
    rows = {}
    for (method, _), by_weighting in results.items():
        for (weighting, score), measured in by_weighting.items():
            rows.setdefault((method, weighting, score), []).append(measured)
    return rows


def summary(runs, name):
    """Mean, standard deviation (None for one seed) and Estimate (or None) over seeds."""
    values = [values.get(name) for values, _ in runs]
    if None in values:
        return None, None, None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    draws = [draws.get(name) for _, draws in runs]
    estimate = None
    if all(draw is not None for draw in draws):
        estimate = Estimate.over_seeds(values, draws)
    return float(np.mean(values)), std, estimate


def markdown(results, title, is_short=False):
    """The table: mean ± std over seeds, and the 95 % interval of the accuracy.

    Args: is_short: leave out all scores but one, and all weightings but SHORT.
    """
    lines = [[title, "prompts", "score", *COLUMNS]]
    for (method, weighting, score), runs in rows_of(results).items():
        if is_short and (weighting not in SHORT or score != SHORT_SCORE):
            continue
        line = [method, weighting, score]
        for name in COLUMNS:
            mean, std, estimate = summary(runs, name)
            text = "-" if mean is None else number(mean, std)
            if name in WITH_INTERVAL and estimate is not None:
                text += between(estimate)
            line.append(text)
        lines.append(line)
    return markdown_table(lines)


def comma_separated(results):
    """One line per row and metric: mean, standard deviation and interval."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", "weighting", "score", "metric", "mean", "std", "low", "high"])
    for row, runs in rows_of(results).items():
        for name in COLUMNS:
            mean, std, estimate = summary(runs, name)
            if mean is None:
                continue
            low, high = (estimate and estimate.interval()) or ("", "")
            writer.writerow([*row, name, mean, "" if std is None else std, low, high])
    return file.getvalue()


def plot(results, path):
    """Accuracy against K, the number of least uncertain prompts, of every method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axis = figure.add_subplot()
    accuracy = {}  # method -> {K: mean accuracy}
    for (method, weighting, score), runs in rows_of(results).items():
        if score != "unit":
            continue
        mean, _, _ = summary(runs, "top-1")
        if weighting.startswith("top "):
            accuracy.setdefault(method, {})[int(weighting.removeprefix("top "))] = mean
        elif method not in accuracy and weighting == "uniform":
            accuracy.setdefault(method, {})
            if method == next(iter(results))[0]:
                axis.axhline(mean, color="grey", linewidth=1, linestyle=":", label=method)
    for method, by_count in accuracy.items():
        if by_count:
            axis.plot(list(by_count), list(by_count.values()), marker="o", ms=3, label=method)
    axis.set_xlabel("least uncertain prompts of each class")
    axis.set_ylabel("top-1 accuracy")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=200)
