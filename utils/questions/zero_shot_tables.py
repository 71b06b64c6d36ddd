"""Tables and a plot of zero-shot classification.

zero-shot.md has the most important rows. zero-shot-all.md and zero-shot.csv have all rows.
zero-shot.png shows the accuracy by the number of prompts.
"""

import csv
import io

from utils.evaluation.bootstrap import Estimate
from utils.evaluation.paper_table import line_label
from utils.evaluation.tables import interval_text, markdown_table, number, over_seeds

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
SHORT_WEIGHTINGS = ("uniform", "top 1", "threshold", "inverse", "BPRW")  # rows of zero-shot.md
SHORT_SCORE = "unit"  # of these rows, and of the plot


def rows_of(results):
    """Collect the seeds of every row.

    Args:
        results: {(method, seed): what `zero_shot.classify` returns}.
    Returns: {(method, weighting, score): list of (metrics, their resamples), one per seed}.
    """
    rows = {}
    for (method, _), results_of_run in results.items():
        for (weighting, score), measured in results_of_run.items():
            runs = rows.setdefault((method, weighting, score), [])
            runs.append(measured)
    return rows


def summary(runs, name):
    """Summarise a metric over seeds.

    Args:
        runs: list of (metrics, their resamples), one per seed.
        name: of the metric.
    Returns:
        mean: float, or None if a seed does not have the metric.
        std: float, or None if there is one seed.
        estimate: Estimate, or None if there are no resamples.
    """
    values = [metrics.get(name) for metrics, _ in runs]
    mean, std = over_seeds(values)
    estimate = None
    if mean is not None and all(name in draws for _, draws in runs):
        estimate = Estimate.over_seeds(values, [draws[name] for _, draws in runs])
    return mean, std, estimate


def markdown(results, title, is_short=False):
    """The table: mean ± std over seeds, and the 95 % interval of the accuracy.

    Args:
        results: as for `rows_of`.
        is_short: leave out all scores but SHORT_SCORE, and all weightings but SHORT_WEIGHTINGS.
    """
    lines = [[title, "weighting", "score", *COLUMNS]]
    for (method, weighting, score), runs in rows_of(results).items():
        is_in_short_table = weighting in SHORT_WEIGHTINGS and score == SHORT_SCORE
        if is_short and not is_in_short_table:
            continue
        line = [method, weighting, score]
        for name in COLUMNS:
            mean, std, estimate = summary(runs, name)
            text = number(mean, std)
            if name == "top-1" and estimate is not None:  # the .csv has the other intervals
                text += interval_text(estimate)
            line.append(text)
        lines.append(line)
    return markdown_table(lines)


def comma_separated(results):
    """All metrics as CSV, one line per row and metric: mean, standard deviation and interval."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", "weighting", "score", "metric", "mean", "std", "low", "high"])
    for row, runs in rows_of(results).items():
        for name in COLUMNS:
            mean, std, estimate = summary(runs, name)
            if mean is None:
                continue
            interval = None
            if estimate is not None:
                interval = estimate.interval()
            low, high = interval or (None, None)
            writer.writerow([*row, name, mean, std, low, high])  # None becomes an empty field
    return file.getvalue()


def plot(results, path):
    """Plot the accuracy of every method against K, the number of least uncertain prompts.

    The frozen CLIP, which has no uncertainty, is a horizontal line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axis = figure.add_subplot()
    frozen_clip, _ = next(iter(results))
    accuracy = {}  # method -> {K: mean accuracy}
    for (method, weighting, score), runs in rows_of(results).items():
        if score != SHORT_SCORE:
            continue
        mean, _, _ = summary(runs, "top-1")
        if method == frozen_clip:
            axis.axhline(mean, color="grey", linewidth=1, linestyle=":", label=method)
        elif weighting.startswith("top "):
            count = int(weighting.removeprefix("top "))
            accuracy.setdefault(method, {})[count] = mean
    for method, by_count in accuracy.items():
        label = line_label(method)
        axis.plot(list(by_count), list(by_count.values()), marker="o", ms=3, label=label)
    axis.set_xlabel("number of least uncertain prompts per class")
    axis.set_ylabel("top-1 accuracy")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=200)
