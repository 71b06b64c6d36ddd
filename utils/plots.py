"""Results in, pictures out: one PNG and one PDF each, in one style that is readable in print and without colour vision."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from utils.files import written_aside
from utils.metrics import only_annotated, risk_coverage
from utils.report import DIRECTIONS

# Okabe & Ito's colours, which all common forms of colour vision tell apart; markers and dashes tell lines apart in grey too.
COLOURS = {
    "asymvlm-psd": "#0072B2",
    "asymvlm-vmf": "#56B4E9",
    "probvlm": "#D55E00",
    "pfe": "#CC79A7",
    "pcmepp": "#E69F00",
    "prolip": "#009E73",
    "softmax-entropy": "#000000",
    "caption-length": "#7F7F7F",
}
MARKERS = dict(zip(COLOURS, "osDv^Pxx", strict=True))
DASHED = ("softmax-entropy", "caption-length")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}
POINTS = 200  # of a risk-coverage curve


def draw_all(results, runs, folder):
    """Draw every picture that the results allow.

    Args: results: {row name: list of results, one a seed}, as for `report.compare`. runs: {row name: list of answers, one a seed}: "t2i" and
    "i2t", arrays with one entry a query. folder: where the files go.
    Returns: {file name of the PNG: caption}.
    """
    pictures = {
        "levels": (
            draw_levels(results),
            "Recall by level of uncertainty, most certain queries first; band: standard deviation over seeds",
        ),
        "levels-image": (
            draw_levels(results, by_image=True),
            "The same by the image's uncertainty, for methods whose images have one",
        ),
        "risk-coverage": (
            draw_risk_coverage(runs),
            "Error among the most certain queries against the share of queries kept",
        ),
        "length": (
            draw_against(runs, "words", "words in the caption", False),
            "Uncertainty against caption length, in percentiles among the captions; band: the middle half of the captions",
        ),
        "ambiguity": (
            draw_against(runs, "relevant", "images that the caption describes", True),
            "Uncertainty against exact ambiguity, in percentiles among the captions; band: the middle half of the captions",
        ),
        "ladder": (
            draw_ladder(results),
            "The prompt ladder: uncertainty relative to the first prompt, geometric mean over seeds",
        ),
    }
    stems = dict.fromkeys(stem for of_method in results.values() for run in of_method for stem in run.get("depth", {}))
    for stem in stems:
        pictures[f"hierarchy-{stem}"] = (
            draw_depth(results, stem),
            f"Uncertainty by depth in the chains of {stem}, general first, in percentiles",
        )
    drawn = {}
    for name, (figure, caption) in pictures.items():
        for suffix in (".png", ".pdf"):
            (Path(folder) / f"{name}{suffix}").unlink(
                missing_ok=True
            )  # one from before would not belong to these results
        if figure is None:
            continue
        for suffix in (".png", ".pdf"):
            with written_aside(Path(folder) / f"{name}{suffix}") as file:
                figure.savefig(
                    file, format=suffix[1:], metadata={"CreationDate": None} if suffix == ".pdf" else {"Software": None}
                )
        plt.close(figure)
        drawn[f"{name}.png"] = caption
    return drawn


def _line_style(name):
    return {
        "color": COLOURS.get(name, "#882255"),
        "marker": MARKERS.get(name, "*"),
        "linestyle": "--" if name in DASHED else "-",
    }


def _panels(count, titles=(None,), width=3.4, height=2.9, sharey=False):
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, count, figsize=(width * count + 1.5, height), squeeze=False, layout="constrained", sharey=sharey
        )
    for axis, title in zip(axes[0], titles, strict=True):
        if title:
            axis.set_title(title, loc="left")
    return figure, axes[0]


def _legend(figure, axis):
    """One legend at the right of all panels."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)


def _band(axis, x, curves, name, **options):
    """Mean over seeds as a line, its standard deviation as a band. Args: curves: one a seed."""
    curves = np.asarray(curves, dtype=np.float64)
    mean = curves.mean(axis=0)
    axis.plot(x, mean, label=name, **_line_style(name) | options)
    if len(curves) > 1:
        deviation = curves.std(axis=0, ddof=1)
        axis.fill_between(
            x, mean - deviation, mean + deviation, color=_line_style(name)["color"], alpha=0.18, linewidth=0
        )


def draw_levels(results, by_image=False):
    """Recall against the level of uncertainty, a panel a direction. Returns: figure, or None if there is nothing to draw."""

    def levels(run, direction):
        return (
            run["by_image"].get(direction)
            if by_image and "by_image" in run
            else None
            if by_image
            else run.get(direction)
        )

    lines = {name: runs for name, runs in results.items() if all(levels(run, "t2i") for run in runs)}
    if not lines:
        return None
    with plt.rc_context(STYLE):
        figure, axes = _panels(2, DIRECTIONS.values())
        for axis, direction in zip(axes, DIRECTIONS, strict=True):
            for name, runs in lines.items():
                curves = [levels(run, direction) for run in runs]
                _band(axis, np.arange(1, len(curves[0]) + 1), curves, name)
            axis.set_xlabel(f"level of {'image' if by_image else 'text'} uncertainty (1 = most certain)")
            axis.set_ylim(bottom=0)
            axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, nbins=10))
        axes[0].set_ylabel("R@1")
        _legend(figure, axes[0])
    return figure


def draw_risk_coverage(runs):
    """Error rate among the most certain share of the queries, a panel a direction, with the best possible order of the first method."""
    with plt.rc_context(STYLE):
        figure, axes = _panels(2, DIRECTIONS.values())
        for axis, direction in zip(axes, DIRECTIONS, strict=True):
            for name, of_method in runs.items():
                curves = [_curve(run[direction]["rank"] == 1, run[direction]["uncertainty"])[1] for run in of_method]
                coverage = _curve(of_method[0][direction]["rank"] == 1, of_method[0][direction]["uncertainty"])[0]
                _band(axis, coverage, curves, name, marker="")
            first = next(iter(runs.values()))[0][direction]["rank"] == 1
            coverage, best = _curve(first, ~first)
            axis.plot(coverage, best, color="#7F7F7F", linestyle=":", linewidth=1.2, label="best possible order")
            axis.set_xlabel("coverage: share of queries kept")
            axis.set_ylim(0, 1)
        axes[0].set_ylabel("risk: 1 - R@1 among those kept")
        _legend(figure, axes[0])
    return figure


def _curve(correct, uncertainty):
    """`metrics.risk_coverage` at 200 points. Returns: (coverage, risk), two arrays in [0, 1]."""
    risk = risk_coverage(correct, uncertainty)
    at = np.unique(np.ceil(np.linspace(0.005, 1, POINTS) * len(risk)).astype(int)) - 1
    return (at + 1) / len(risk), risk[at]


def draw_against(runs, field, label, logarithmic):
    """The percentile of a caption's uncertainty against something known about the caption, a panel a method: the median, and a band for the
    middle half of the captions. Returns: figure, or None where it is not known."""
    known_in = {
        name: [only_annotated(run["t2i"]) if field == "relevant" else run["t2i"] for run in of_method]
        for name, of_method in runs.items()
    }
    runs = {name: of_method for name, of_method in known_in.items() if all(field in run for run in of_method)}
    if not runs:
        return None
    columns = min(4, len(runs))
    with plt.rc_context(STYLE):
        size = (2.0 * columns + 0.4, 1.9 * -(-len(runs) // columns) + 0.4)
        figure, axes = plt.subplots(
            -(-len(runs) // columns),
            columns,
            figsize=size,
            squeeze=False,
            layout="constrained",
            sharex=True,
            sharey=True,
        )
        for axis in axes.flat[len(runs) :]:
            axis.set_visible(False)
        for axis, (name, of_method) in zip(axes.flat, runs.items(), strict=False):
            known = of_method[0][field].astype(np.float64)
            edges = _edges(known, logarithmic)
            bins = np.clip(np.searchsorted(edges, known, side="right") - 1, 0, len(edges) - 2)
            filled = [b for b in range(len(edges) - 1) if (bins == b).any()]
            percentile = np.mean([100 * stats.rankdata(run["uncertainty"]) / len(known) for run in of_method], axis=0)
            low, median, high = np.array([np.percentile(percentile[bins == b], [25, 50, 75]) for b in filled]).T
            x = [known[bins == b].mean() for b in filled]
            axis.plot(x, median, **_line_style(name))
            axis.fill_between(x, low, high, color=_line_style(name)["color"], alpha=0.18, linewidth=0)
            axis.set_title(name, loc="left", fontsize=9)
            axis.set_ylim(0, 100)
            if logarithmic:
                axis.set_xscale("log", base=4)
                axis.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        figure.supxlabel(label, fontsize=9)
        figure.supylabel("percentile of uncertainty", fontsize=9)
    return figure


def _edges(values, logarithmic):
    """Borders of at most a dozen bins, narrow at first where logarithmic, of equally many values otherwise."""
    if logarithmic:
        return 2.0 ** np.arange(0, np.ceil(np.log2(values.max() + 1)) + 1)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, 13)))
    return edges if len(edges) > 1 else np.array([edges[0], edges[0] + 1])


def draw_ladder(results):
    """Uncertainty of every prompt of the ladder relative to the first one. Returns: figure, or None where there is no ladder."""
    lines = {name: runs for name, runs in results.items() if all("ladder" in run for run in runs)}
    if not lines:
        return None
    prompts = [rung["prompt"] for rung in next(iter(lines.values()))[0]["ladder"]]
    with plt.rc_context(STYLE):
        figure, axes = _panels(1, width=7.0, height=0.36 * len(prompts) + 1.2)
        for name, runs in lines.items():
            values = np.array([[rung["uncertainty"] for rung in run["ladder"]] for run in runs])
            axes[0].plot(
                np.exp(np.log(values / values[:, :1]).mean(axis=0)),
                range(len(prompts)),
                label=name,
                **_line_style(name),
            )
        axes[0].set_yticks(range(len(prompts)), prompts)
        axes[0].invert_yaxis()
        axes[0].set_xscale("log")
        axes[0].set_xlabel("uncertainty / uncertainty of the first prompt")
        _legend(figure, axes[0])
    return figure


def draw_depth(results, stem):
    """Mean percentile of uncertainty by depth in caption chains. Returns: figure."""
    lines = {name: runs for name, runs in results.items() if all(stem in run.get("depth", {}) for run in runs)}
    with plt.rc_context(STYLE):
        figure, axes = _panels(1, width=3.8)
        for name, runs in lines.items():
            curves = [run["depth"][stem] for run in runs]
            _band(axes[0], np.arange(1, len(curves[0]) + 1), curves, name)
        axes[0].set_xlabel("depth in the chain (1 = most general)")
        axes[0].set_ylabel("percentile of uncertainty")
        axes[0].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        _legend(figure, axes[0])
    return figure
