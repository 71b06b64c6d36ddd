"""Results in, pictures out: a PNG and a PDF each, in one style that is readable in print and without colour vision."""

import itertools
import textwrap
import warnings

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from PIL import Image, ImageOps

from utils.evaluation.figures import DIRECTIONS, only_judged, uncertainty_of
from utils.evaluation.metrics import rank_values, risk_coverage
from utils.evaluation.selective import predict_right
from utils.evaluation.scorers import BASELINES, BESIDE
from utils.files import written_aside

# Okabe & Ito's colours, which all common forms of colour vision tell apart; markers and dashes tell them apart in grey.
NAMES = ("asymvlm-psd", "asymvlm-vmf", "probvlm", "pfe", "pcmepp", "prolip", *BASELINES)
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#CC79A7", "#E69F00", "#009E73")
COLOURS += ("#000000", "#7A4A1E", "#7A4A1E", "#000000", "#7F7F7F", "#7F7F7F")
LOOKS = {name: {"color": c, "marker": m} for name, c, m in zip(NAMES, COLOURS, "osDv^Px23+1|", strict=True)}
DASHES = ("--", "--", "-.", "-.", "-.", "--")
LOOKS |= {name: LOOKS[name] | {"linestyle": d} for name, d in zip(BASELINES, DASHES, strict=True)}
BEST = "best possible order"
LOOKS[BEST] = {"color": "#7F7F7F", "linestyle": ":", "linewidth": 1.2}
CALIBRATED = "perfectly calibrated"
LOOKS[CALIBRATED] = LOOKS[BEST]
RIGHT = "#009E73"  # the frame of a right answer
# Of rows whose names are not known here, in their order: Tol's muted colours, other markers and dashes.
OTHERS = ("#882255", "#332288", "#CC6677", "#117733", "#AA4499", "#999933", "#44AA99", "#88CCEE", "#DDCC77")
OTHERS = [(colour, "*ph<>X8dH"[i], dashes) for dashes in ("-.", "-", "--") for i, colour in enumerate(OTHERS)]
OTHERS = [dict(zip(("color", "marker", "linestyle"), look, strict=True)) for look in OTHERS]
_others = {}  # name -> look, of the rows that are being drawn
STYLE = {"font.size": 9, "lines.linewidth": 1.4, "lines.markersize": 4, "axes.axisbelow": True, "axes.grid": True}
STYLE |= {"grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.titley": 1.0}  # where it would stand anyhow: else every drawing looks for what is in its way
POINTS = 200  # of a risk-coverage curve
DEPTH = "Uncertainty by depth in the chains of {}, general first, in percentiles"
AMONG = "in percentiles among the captions; band: the middle half of the captions"
CAPTIONS = {
    "levels": "Recall by level of uncertainty, most certain queries first; band: standard deviation over seeds",
    "levels-image": "The same by the image's uncertainty, for methods whose images have one",
    "risk-coverage": "Error among the most certain queries against the share of queries kept",
    "reliability": "Share of right answers against the probability of being right that uncertainty alone gives",
    "length": f"Uncertainty against caption length, {AMONG}",
    "ambiguity": f"Uncertainty against exact ambiguity, {AMONG}",
    "captions": "Captions from the most certain fifth to the least, and the images that match them best; framed: right",
    "ladder": "The prompt ladder: uncertainty relative to the first prompt, geometric mean over seeds",
}


def draw_all(results, examples, folder):
    """Draw every picture that the results allow, without second rows of a method, and remove those from before.

    Args:
        results: {row name: [Results, one a seed]}.
        examples: as `questions.example_captions` gives them.
        folder: where the files go.
    Returns: {file name of the PNG: caption}.
    """
    results = {name: runs for name, runs in results.items() if runs[0].is_uncertain and not name.endswith(BESIDE)}
    of_texts = {name: runs for name, runs in results.items() if runs[0].has_uncertain_texts}
    stems = dict.fromkeys(stem for runs in results.values() for stem in runs[0].content.get("depth", {}))
    _others.clear()
    _others.update(zip((name for name in results if name not in LOOKS), itertools.cycle(OTHERS), strict=False))
    with plt.rc_context(STYLE):
        pictures = {
            "levels": _levels(of_texts, "text", lambda run: run.content),
            "levels-image": _levels(results, "image", lambda run: run.content["by_image"]),
            "risk-coverage": _risk_coverage(results),
            "reliability": _reliability(results),
            "length": _against(of_texts, "words", "words in the caption"),
            "ambiguity": _against(of_texts, "relevant", "images that the caption describes", logarithmic=True),
            "captions": _captions(examples),
            "ladder": _ladder(results),
        } | {f"hierarchy-{stem}": _depth(of_texts, stem) for stem in stems}
    for name, picture in pictures.items():
        paths = [folder / f"{name}{suffix}" for suffix in (".png", ".pdf")]
        for path in paths:
            path.unlink(missing_ok=True)
        if picture is not None:  # a caption may have a character that the font has not
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                _save(picture, *paths)
        plt.close(picture)
    captions = {f"hierarchy-{stem}": DEPTH.format(stem) for stem in stems}
    return {f"{name}.png": caption for name, caption in (CAPTIONS | captions).items() if pictures[name] is not None}


def _save(picture, png, pdf):
    """Draw a picture once for each of its files, and lay it out once; savefig would do both twice for each."""
    with written_aside(png) as file:
        FigureCanvasAgg(picture).print_png(file, metadata={"Software": None})
    picture.set_layout_engine("none")  # it is laid out
    with written_aside(pdf) as file:
        FigureCanvasPdf(picture).print_pdf(file, metadata={"CreationDate": None})


def _levels(results, modality, recall_of):
    """Recall against the level of uncertainty, `recall_of(run)` being {direction: recall by level}."""
    rows = {name: [recall_of(run) for run in runs] for name, runs in results.items() if recall_of(runs[0])}
    if not rows:
        return None
    panels = {t: {name: [_steps(run[d]) for run in runs] for name, runs in rows.items()} for d, t in DIRECTIONS.items()}
    return _lines(panels, f"level of {modality} uncertainty (1 = most certain)", "R@1", ylim=(0, None))[0]


def _risk_coverage(results):
    """Error rate among the most certain share of the queries, and in the best possible order of the first method."""
    panels = {}
    for direction, title in DIRECTIONS.items():
        answers = {name: [run.answers[direction] for run in runs] for name, runs in results.items()}
        rows = {name: [_curve(a["rank"] == 1, uncertainty_of(a)) for a in runs] for name, runs in answers.items()}
        correct = next(iter(answers.values()))[0]["rank"] == 1
        panels[title] = rows | {BEST: [_curve(correct, ~correct)]}
    labels = ("coverage: share of queries kept", "risk: 1 - R@1 among those kept")
    return _lines(panels, *labels, ylim=(0, 1), marker="")[0]


def _curve(correct, uncertainty):
    """`risk_coverage` at 200 points: coverage and risk, two arrays in [0, 1]."""
    risk = risk_coverage(correct, uncertainty)
    at = np.unique(np.ceil(np.linspace(0.005, 1, POINTS) * len(risk)).astype(int)) - 1
    return (at + 1) / len(risk), risk[at]


def _reliability(results):
    """How often answers are right by how probable that was, on the half that is not calibrated on, of all seeds."""
    panels = {}
    for d, title in DIRECTIONS.items():
        panels[title] = {CALIBRATED: [(np.linspace(0, 1, 2), np.linspace(0, 1, 2))]}
        for name, runs in results.items():
            answers = [{"image": run.answers[d]["query"]} | run.answers[d] for run in runs]
            found = [predict_right(a["rank"] == 1, uncertainty_of(a), a["image"]) for a in answers]
            probability, right, weight = map(np.concatenate, zip(*found, strict=True))
            groups = _bins(probability, logarithmic=False) if len(weight) else []
            points = [[np.average(of[g], weights=weight[g]) for g in groups] for of in (probability, right)]
            panels[title][name] = [tuple(points)]
    return _lines(panels, "probability of being right", "share that is right", ylim=(0, 1))[0]


def _captions(examples):
    """A row a level, from the most certain: captions, each above the pictures that match it best, the right framed."""
    if not examples:
        return None
    levels = examples[-1]["level"]
    each, shown = len(examples) // levels, len(examples[0]["pictures"])
    figure = plt.figure(figsize=(1.25 * each * shown, 1.62 * levels), layout="constrained")
    for part, example in zip(figure.subfigures(levels, each).flat, examples, strict=True):
        lines = textwrap.wrap(example["caption"], 52, max_lines=3, placeholder=" ...")
        part.suptitle("\n".join(lines), fontsize=7.5, x=0.02, ha="left")
        for axis, file, is_right in zip(part.subplots(1, shown), example["pictures"], example["right"], strict=True):
            with Image.open(file) as picture:
                axis.imshow(ImageOps.fit(picture.convert("RGB"), (160, 160)))
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            for spine in axis.spines.values():
                spine.set(visible=True, color=RIGHT if is_right else "#bbbbbb", linewidth=3.5 if is_right else 0.6)
    return figure


def _ladder(results):
    """Uncertainty of every prompt of the ladder relative to the first one."""
    rows, prompts = {}, []
    for name, runs in results.items():
        if "ladder" in runs[0].content:
            prompts = [rung["prompt"] for rung in runs[0].content["ladder"]]
            values = np.array([[rung["uncertainty"] for rung in run.content["ladder"]] for run in runs])
            with np.errstate(divide="ignore", invalid="ignore"):  # of an uncertainty that is 0, nothing is drawn
                rows[name] = [(np.exp(np.log(values / values[:, :1]).mean(axis=0)), range(len(prompts)))]
    if not rows:
        return None
    size = (6.0, 0.42 * len(prompts) + 1.2)
    figure, (axis,) = _lines({"": rows}, "uncertainty / uncertainty of the first prompt", "", size)
    axis.set_yticks(range(len(prompts)), [textwrap.fill(prompt, 26) for prompt in prompts], fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    return figure


def _depth(results, stem):
    """Mean percentile of uncertainty by depth in caption chains."""
    depths = {name: [run.content.get("depth") for run in runs] for name, runs in results.items()}
    rows = {name: [_steps(depth[stem]) for depth in runs] for name, runs in depths.items() if all(runs)}
    return _lines({"": rows}, "depth in the chain (1 = most general)", "percentile of uncertainty", (3.8, 2.9))[0]


def _against(results, field, label, logarithmic=False):
    """The percentile of a caption's uncertainty against something known about it, a panel a method: median, middle."""
    choose = only_judged if field == "relevant" else dict
    answers = {name: [choose(run.answers["t2i"]) for run in runs] for name, runs in results.items()}
    if not answers or any(field not in runs[0] for runs in answers.values()):
        return None
    columns, rows = min(4, len(answers)), -(-len(answers) // 4)
    size = {"figsize": (2.0 * columns + 0.4, 1.9 * rows + 0.4), "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, squeeze=False, sharex=True, sharey=True, **size)
    for axis in axes.flat[len(answers) :]:
        axis.set_visible(False)
    for axis, (name, runs) in zip(axes.flat, answers.items(), strict=False):
        known = runs[0][field].astype(np.float64)
        percentile = np.mean([100 * rank_values(run["uncertainty"]) / len(known) for run in runs], axis=0)
        bins = _bins(known, logarithmic)
        low, median, high = np.array([np.percentile(percentile[b], [25, 50, 75]) for b in bins]).T
        _line(axis, name, [known[b].mean() for b in bins], median, (low, high))
        axis.set_title(name, loc="left", fontsize=9)
        axis.set_ylim(0, 100)
        if logarithmic:
            axis.set_xscale("log", base=4)
            axis.xaxis.set_major_formatter(ScalarFormatter())
    figure.supxlabel(label, fontsize=9)
    figure.supylabel("percentile of uncertainty", fontsize=9)
    return figure


def _bins(values, logarithmic):
    """Masks of at most a dozen bins that hold something: narrow at first (logarithmic), or of equally many values."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, 13)))
    if logarithmic:
        edges = 2.0 ** np.arange(0, np.ceil(np.log2(values.max() + 1)) + 1)
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(0, len(edges) - 2))
    return [bins == b for b in np.unique(bins)]


def _steps(values):
    return np.arange(1, len(values) + 1), values


def _lines(panels, xlabel, ylabel, size=(3.4, 2.9), ylim=None, **options):
    """Means over seeds in bands of a deviation; panels: {title: {row name: [(x, y), one a seed]}}."""
    height = max(size[1], 0.18 * max(map(len, panels.values())) + 0.4)  # of the legend
    size = {"figsize": (size[0] * len(panels) + 1.5, height), "layout": "constrained"}
    figure, axes = plt.subplots(1, len(panels), squeeze=False, **size)
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        for name, curves in rows.items():
            x, y = curves[0][0], np.array([y for _, y in curves])
            deviation = y.std(axis=0, ddof=1) if len(curves) > 1 else None
            _line(axis, name, x, y.mean(axis=0), deviation, **options)
        axis.set_title(title, loc="left")
        axis.set(xlabel=xlabel, **({"ylim": ylim} if ylim else {}))
        if np.asarray(x).dtype == int:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes[0, 0].set_ylabel(ylabel)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure, axes[0]


def look_of(name):
    """The colour, marker and dashes of a row of the pictures that are being drawn."""
    return LOOKS.get(name) or _others[name]


def _line(axis, name, x, y, band=None, **options):
    """A method's line in its look, in a band (low, high) or of a deviation."""
    look = look_of(name)
    axis.plot(x, y, label=name, **look | options)
    if band is not None:
        low, high = band if isinstance(band, tuple) else (y - band, y + band)
        axis.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
