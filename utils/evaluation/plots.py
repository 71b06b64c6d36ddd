"""Results in, pictures out: one PNG and one PDF each, in one style that is readable in print and without colour vision."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from scipy import stats

from utils.evaluation.figures import DIRECTIONS, only_annotated
from utils.evaluation.metrics import risk_coverage
from utils.files import written_aside

# Okabe & Ito's colours, which all common forms of colour vision tell apart; markers and dashes tell lines apart in grey too.
LOOKS = {
    "asymvlm-psd": ("#0072B2", "o", "-"),
    "asymvlm-vmf": ("#56B4E9", "s", "-"),
    "probvlm": ("#D55E00", "D", "-"),
    "pfe": ("#CC79A7", "v", "-"),
    "pcmepp": ("#E69F00", "^", "-"),
    "prolip": ("#009E73", "P", "-"),
    "softmax-entropy": ("#000000", "x", "--"),
    "caption-length": ("#7F7F7F", "x", "--"),
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
}
POINTS = 200  # of a risk-coverage curve


PERCENTILES = "in percentiles among the captions; band: the middle half of the captions"
CAPTIONS = {
    "levels": "Recall by level of uncertainty, most certain queries first; band: standard deviation over seeds",
    "levels-image": "The same by the image's uncertainty, for methods whose images have one",
    "risk-coverage": "Error among the most certain queries against the share of queries kept",
    "length": f"Uncertainty against caption length, {PERCENTILES}",
    "ambiguity": f"Uncertainty against exact ambiguity, {PERCENTILES}",
    "ladder": "The prompt ladder: uncertainty relative to the first prompt, geometric mean over seeds",
}


def draw_all(results, folder):
    """Draw every picture that the results allow, and remove those from before.

    Args: results: {row name: [Results, one a seed]}. folder: where the files go.
    Returns: {file name of the PNG: caption}.
    """
    uncertain = {name: runs for name, runs in results.items() if "uncertainty" in runs[0].answers["t2i"]}
    stems = dict.fromkeys(stem for runs in uncertain.values() for stem in runs[0].content.get("depth", {}))
    captions = {
        f"hierarchy-{s}": f"Uncertainty by depth in the chains of {s}, general first, in percentiles" for s in stems
    }
    with plt.rc_context(STYLE):
        figures = {
            "levels": draw_levels({name: [run.content for run in runs] for name, runs in uncertain.items()}, "text"),
            "levels-image": draw_levels(
                {name: [run.content["by_image"] for run in runs] for name, runs in uncertain.items()}, "image"
            ),
            "risk-coverage": draw_risk_coverage(uncertain),
            "length": draw_against(uncertain, "words", "words in the caption"),
            "ambiguity": draw_against(uncertain, "relevant", "images that the caption describes", logarithmic=True),
            "ladder": draw_ladder(uncertain),
        } | {f"hierarchy-{stem}": draw_depth(uncertain, stem) for stem in stems}
    for name, figure in figures.items():
        for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):
            path = folder / f"{name}{suffix}"
            path.unlink(missing_ok=True)
            if figure is not None:
                with written_aside(path) as file:
                    figure.savefig(file, format=suffix[1:], metadata=metadata)
        plt.close(figure)
    return {f"{name}.png": caption for name, caption in (CAPTIONS | captions).items() if figures[name] is not None}


def draw_levels(recall, modality):
    """Recall against the level of uncertainty. Args: recall: {row name: [{direction: recall by level}, one a seed]}."""
    rows = {name: runs for name, runs in recall.items() if "t2i" in runs[0]}
    if not rows:
        return None
    figure, axes = _panels(2)
    for axis, direction in zip(axes, DIRECTIONS, strict=True):
        for name, runs in rows.items():
            curves = [run[direction] for run in runs]
            _mean(axis, np.arange(1, len(curves[0]) + 1), curves, name)
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    return _finish(figure, axes, f"level of {modality} uncertainty (1 = most certain)", "R@1")


def draw_risk_coverage(results):
    """Error rate among the most certain share of the queries, with the best possible order of the first method."""
    figure, axes = _panels(2)
    for axis, direction in zip(axes, DIRECTIONS, strict=True):
        for name, runs in results.items():
            answers = [run.answers[direction] for run in runs]
            curves = [_curve(fields["rank"] == 1, fields["uncertainty"]) for fields in answers]
            _mean(axis, curves[0][0], [risk for _, risk in curves], name, marker="")
        correct = next(iter(results.values()))[0].answers[direction]["rank"] == 1
        axis.plot(
            *_curve(correct, ~correct), color="#7F7F7F", linestyle=":", linewidth=1.2, label="best possible order"
        )
        axis.set_ylim(0, 1)
    return _finish(figure, axes, "coverage: share of queries kept", "risk: 1 - R@1 among those kept")


def _curve(correct, uncertainty):
    """`risk_coverage` at 200 points: coverage and risk, two arrays in [0, 1]."""
    risk = risk_coverage(correct, uncertainty)
    at = np.unique(np.ceil(np.linspace(0.005, 1, POINTS) * len(risk)).astype(int)) - 1
    return (at + 1) / len(risk), risk[at]


def draw_against(results, field, label, logarithmic=False):
    """The percentile of a caption's uncertainty against something known about the caption, a panel a method: median and middle half."""
    choose = only_annotated if field == "relevant" else dict
    answers = {name: [choose(run.answers["t2i"]) for run in runs] for name, runs in results.items()}
    if any(field not in runs[0] for runs in answers.values()):
        return None
    columns = min(4, len(answers))
    rows = -(-len(answers) // columns)
    size = {"figsize": (2.0 * columns + 0.4, 1.9 * rows + 0.4), "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, squeeze=False, sharex=True, sharey=True, **size)
    for axis in axes.flat[len(answers) :]:
        axis.set_visible(False)
    for axis, (name, runs) in zip(axes.flat, answers.items(), strict=False):
        known = runs[0][field].astype(np.float64)
        bins = _bins(known, logarithmic)
        members = [bins == b for b in np.unique(bins)]
        percentile = np.mean([100 * stats.rankdata(run["uncertainty"]) / len(known) for run in runs], axis=0)
        low, median, high = np.array([np.percentile(percentile[rows], [25, 50, 75]) for rows in members]).T
        _line(axis, [known[rows].mean() for rows in members], median, (low, high), name)
        axis.set_title(name, loc="left", fontsize=9)
        axis.set_ylim(0, 100)
        if logarithmic:
            axis.set_xscale("log", base=4)
            axis.xaxis.set_major_formatter(ScalarFormatter())
    figure.supxlabel(label, fontsize=9)
    figure.supylabel("percentile of uncertainty", fontsize=9)
    return figure


def _bins(values, logarithmic):
    """Which of at most a dozen bins every value is in: narrow at first where logarithmic, of equally many values otherwise."""
    if logarithmic:
        edges = 2.0 ** np.arange(0, np.ceil(np.log2(values.max() + 1)) + 1)
    else:
        edges = np.unique(np.quantile(values, np.linspace(0, 1, 13)))
    return np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(0, len(edges) - 2))


def draw_ladder(results):
    """Uncertainty of every prompt of the ladder relative to the first one."""
    rows = {name: runs for name, runs in results.items() if "ladder" in runs[0].content}
    if not rows:
        return None
    prompts = [rung["prompt"] for rung in next(iter(rows.values()))[0].content["ladder"]]
    figure, axes = _panels(1, width=7.0, height=0.36 * len(prompts) + 1.2)
    for name, runs in rows.items():
        values = np.array([[rung["uncertainty"] for rung in run.content["ladder"]] for run in runs])
        relative = np.exp(np.log(values / values[:, :1]).mean(axis=0))
        _line(axes[0], relative, range(len(prompts)), None, name)
    axes[0].set_yticks(range(len(prompts)), prompts)
    axes[0].invert_yaxis()
    axes[0].set_xscale("log")
    return _finish(figure, axes, "uncertainty / uncertainty of the first prompt")


def draw_depth(results, stem):
    """Mean percentile of uncertainty by depth in caption chains."""
    figure, axes = _panels(1, width=3.8)
    for name, runs in results.items():
        curves = [run.content["depth"][stem] for run in runs if stem in run.content.get("depth", {})]
        if curves:
            _mean(axes[0], np.arange(1, len(curves[0]) + 1), curves, name)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finish(figure, axes, "depth in the chain (1 = most general)", "percentile of uncertainty")


def _panels(count, width=3.4, height=2.9):
    """A figure of panels side by side, one a direction if there are two."""
    figure, axes = plt.subplots(1, count, figsize=(width * count + 1.5, height), squeeze=False, layout="constrained")
    for axis, title in zip(axes[0], DIRECTIONS.values() if count > 1 else (), strict=False):
        axis.set_title(title, loc="left")
    return figure, axes[0]


def _mean(axis, x, curves, name, **options):
    """The mean of curves, one a seed, and a band of their standard deviation."""
    mean, deviation = np.mean(curves, axis=0), np.std(curves, axis=0, ddof=1) if len(curves) > 1 else None
    _line(axis, x, mean, None if deviation is None else (mean - deviation, mean + deviation), name, **options)


def _line(axis, x, y, band, name, **options):
    """A method's line in its look, and a band around it."""
    colour, marker, dashes = LOOKS.get(name, ("#882255", "*", "-"))
    axis.plot(x, y, label=name, **{"color": colour, "marker": marker, "linestyle": dashes} | options)
    if band is not None:
        axis.fill_between(x, *band, color=colour, alpha=0.18, linewidth=0)


def _finish(figure, axes, xlabel, ylabel=None):
    """Label the axes, and put one legend at the right of all panels."""
    for axis in axes:
        axis.set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure
