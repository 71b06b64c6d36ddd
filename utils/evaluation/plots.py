"""Plots of results, as PNG and PDF."""

import itertools
import math
import textwrap
import warnings

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from PIL import Image, ImageOps

from utils.evaluation.figures import DIRECTIONS, only_judged, uncertainty_of
from utils.evaluation.metrics import rank_values, risk_coverage
from utils.evaluation.paper_table import line_label
from utils.evaluation.selective import predict_right
from utils.evaluation.tables import labels_of, names_of_chains
from utils.evaluation.training_free import TRAINING_FREE
from utils.files import written_aside

BEST = "best order (frozen ranking)"
CALIBRATED = "perfectly calibrated"
# Name of a line -> colour, marker, dashes. Trained heads have colours of Okabe & Ito, which people
# with any common form of colour vision can tell apart. Training-free lines share three colours and
# differ in dashes. In grey, markers tell lines apart; risk-coverage has none.
LOOKS = {
    "asymvlm-psd": ("#0072B2", "o", "-"),
    "asymvlm-vmf": ("#56B4E9", "s", "-"),
    "probvlm": ("#D55E00", "D", "-"),
    "pfe": ("#CC79A7", "v", "-"),
    "pcmepp": ("#E69F00", "^", "-"),
    "prolip": ("#009E73", "P", "-"),
    "softmax-entropy": ("#000000", "x", "--"),
    "top1-cosine": ("#7A4A1E", "2", "--"),
    "margin": ("#7A4A1E", "3", "-."),
    "reference-entropy": ("#000000", "+", "-."),
    "reference-entropy-fitted": ("#7F7F7F", "1", "-."),
    "caption-length": ("#7F7F7F", "|", "--"),
    BEST: ("#7F7F7F", "", ":"),
    CALIBRATED: ("#7F7F7F", "", ":"),
}
# Lines without an entry in LOOKS take these in turn: Tol's muted colours, then other dashes.
OTHER_COLOURS = (
    "#882255",
    "#332288",
    "#CC6677",
    "#117733",
    "#AA4499",
    "#999933",
    "#44AA99",
    "#88CCEE",
    "#DDCC77",
)
OTHER_MARKERS = "*ph<>X8dH"
OTHER_DASHES = ("-.", "-", "--")
RIGHT = "#009E73"  # frame of a correct image
WRONG = "#bbbbbb"
TEXT_WIDTH = 5.5  # inches, of a page of most venues; plots are as wide
STYLE = {
    "font.size": 8,  # venues ask for at least 7
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # TrueType, which venues accept
    "ps.fonttype": 42,
}
DPI = 300  # of the .png files
MAX_LINES = 7  # in a panel; with more, training-free lines have panels of their own
MIN_COVERAGE = 0.05  # below it, the risk is that of a few queries, and jumps
POINTS = 200  # of a risk-coverage curve
BINS = 12
AMONG = "in percentiles among the captions; band: the middle half of the captions"
PLOT_CAPTIONS = {
    "levels": "Recall by uncertainty level, most certain queries first; "
    "band: standard deviation over seeds",
    "levels-image": "The same by the image's uncertainty, for methods whose images have one",
    "risk-coverage": "Error among the most certain queries against the share of queries kept",
    "reliability": "Share of right answers against the probability of being right that "
    "the uncertainty alone gives",
    "length": f"Uncertainty against caption length, {AMONG}",
    "ambiguity": f"Uncertainty against exact ambiguity, {AMONG}",
    "captions": "Captions from the most certain fifth to the least certain, and their best "
    "matching images; correct images are framed",
    "ladder": "The prompt ladder: uncertainty relative to the first prompt, "
    "geometric mean over seeds",
}


def draw_all(results, examples, folder):
    """Draw every plot that the results allow, and remove older files of the others.

    The second row of a method, "..., frozen score", is left out: it has the same uncertainty.

    Args:
        results: {Row: [Results, one per seed]}.
        examples: as `prompts.example_captions` returns them.
        folder: where the files go.
    Returns: {file name of the PNG: caption}.
    """
    labels = labels_of(results)
    uncertain = {}  # method -> its runs
    for row, runs in results.items():
        is_first_row = labels[row] == row.method
        if runs[0].is_uncertain and is_first_row:
            uncertain[row.method] = runs
    text_uncertain = {name: runs for name, runs in uncertain.items() if runs[0].has_uncertain_texts}
    image_uncertain = {}
    for name, runs in uncertain.items():
        if runs[0].content["by_image"]:
            image_uncertain[name] = runs
    with plt.rc_context(STYLE):
        plots = {
            "levels": draw_levels(text_uncertain, "text"),
            "levels-image": draw_levels(image_uncertain, "image"),
            "risk-coverage": draw_risk_coverage(uncertain),
            "reliability": draw_reliability(uncertain),
            "length": draw_against(text_uncertain, "words", "words in the caption"),
            "ambiguity": draw_against(
                text_uncertain, "relevant", "images that the caption describes", logarithmic=True
            ),
            "captions": draw_captions(examples),
            "ladder": draw_ladder(uncertain),
        }
        plot_captions = dict(PLOT_CAPTIONS)
        for chains in names_of_chains(uncertain):
            name = f"hierarchy-{chains}"
            plots[name] = draw_depth(text_uncertain, chains)
            plot_captions[name] = (
                f"Uncertainty by depth in the chains of {chains}, general first, in percentiles"
            )
        for name, plot in plots.items():
            _save(plot, folder, name)
    return {f"{name}.png": plot_captions[name] for name, plot in plots.items() if plot is not None}


def _save(plot, folder, name):
    """Write a plot as PNG and PDF, and close it. Without a plot (None), remove the files."""
    png = folder / f"{name}.png"
    pdf = folder / f"{name}.pdf"
    if plot is None:
        png.unlink(missing_ok=True)
        pdf.unlink(missing_ok=True)
        return
    # A caption may have characters that the font does not have.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        with written_aside(png) as file:
            plot.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
        plot.set_layout_engine("none")  # writing the PNG has laid it out
        with written_aside(pdf) as file:
            plot.savefig(file, format="pdf", metadata={"CreationDate": None})
    plt.close(plot)


# Lines over seeds, one panel per direction.


def draw_levels(results, modality):
    """Recall against the level of uncertainty, None without results.

    Args: modality: whose uncertainty, "text" or "image".
    """
    if not results:
        return None
    panels = {}
    for direction, title in DIRECTIONS.items():
        panels[title] = {}
        for name, runs in results.items():
            curves = []
            for run in runs:
                recall = run.content["by_image"] if modality == "image" else run.content
                curves.append(_numbered(recall[direction]))
            panels[title][name] = curves
    label = f"level of {modality} uncertainty (1 = most certain)"
    plot, _ = _draw_lines(panels, label, "R@1", y_limits=(0, None), has_integer_x=True)
    return plot


def draw_risk_coverage(results):
    """The error rate among the most certain queries.

    One more line is the lowest that any uncertainty could have with the first row's ranking.
    """
    panels = {}
    for direction, title in DIRECTIONS.items():
        panels[title] = {}
        for name, runs in results.items():
            curves = []
            for run in runs:
                answers = run.answers[direction]
                curves.append(_risk_curve(answers["rank"] == 1, uncertainty_of(answers)))
            panels[title][name] = curves
        first_runs = next(iter(results.values()))
        is_right = first_runs[0].answers[direction]["rank"] == 1
        panels[title][BEST] = [_risk_curve(is_right, ~is_right)]  # all right answers first
    plot, _ = _draw_lines(
        panels,
        "coverage: share of queries kept",
        "risk: 1 - R@1 among those kept",
        y_limits=(0, 1),
        marker="",
    )
    return plot


def _risk_curve(correct, uncertainty):
    """`risk_coverage` at 200 coverages from 5 % on: coverage and risk, two arrays in [0, 1]."""
    risk = risk_coverage(correct, uncertainty)
    coverage = np.linspace(MIN_COVERAGE, 1, POINTS)
    kept = np.unique(np.ceil(coverage * len(risk)).astype(int))  # number of queries
    return kept / len(risk), risk[kept - 1]


def draw_reliability(results):
    """The share of right answers against the predicted probability that they are right.

    The answers of all seeds are taken together. They belong to the half of the images that is not
    used for calibration (`selective.predict_right`).
    """
    panels = {}
    for direction, title in DIRECTIONS.items():
        panels[title] = {CALIBRATED: [(np.array([0, 1]), np.array([0, 1]))]}
        for name, runs in results.items():
            panels[title][name] = [_reliability_curve([run.answers[direction] for run in runs])]
    plot, _ = _draw_lines(
        panels, "probability of being right", "share that is right", y_limits=(0, 1)
    )
    return plot


def _reliability_curve(answers):
    """Mean probability and share of right answers in each bin of the probability."""
    predictions = []  # (probability, is_right, weight) of each seed
    for answers_of_seed in answers:
        image = answers_of_seed.get("image", answers_of_seed["query"])
        is_right = answers_of_seed["rank"] == 1
        predictions.append(predict_right(is_right, uncertainty_of(answers_of_seed), image))
    probability, is_right, weight = map(np.concatenate, zip(*predictions, strict=True))
    mean_probability = []
    share_right = []
    if len(weight) == 0:  # there is only one image, which is calibrated on
        return mean_probability, share_right
    for in_bin in _bins(probability):
        weight_in_bin = weight[in_bin]
        mean_probability.append(np.average(probability[in_bin], weights=weight_in_bin))
        share_right.append(np.average(is_right[in_bin], weights=weight_in_bin))
    return mean_probability, share_right


def draw_depth(results, chains):
    """The mean percentile of uncertainty by depth in the caption chains of a file."""
    curves = {}
    for name, runs in results.items():
        if all("depth" in run.content for run in runs):
            curves[name] = [_numbered(run.content["depth"][chains]) for run in runs]
    plot, _ = _draw_lines(
        {"": curves},
        "depth in the chain (1 = most general)",
        "percentile of uncertainty",
        height=2.9,
        has_integer_x=True,
    )
    return plot


def draw_ladder(results):
    """The uncertainty of every prompt of the ladder relative to the first one."""
    curves = {}
    prompts = []
    for name, runs in results.items():
        if "ladder" not in runs[0].content:
            continue
        prompts = [step["prompt"] for step in runs[0].content["ladder"]]
        seeds = []
        for run in runs:
            seeds.append([step["uncertainty"] for step in run.content["ladder"]])
        uncertainty = np.array(seeds)  # (seeds, prompts)
        with np.errstate(divide="ignore", invalid="ignore"):  # an uncertainty of 0 is not drawn
            log_ratio = np.log(uncertainty / uncertainty[:, :1])
            ratio = np.exp(log_ratio.mean(axis=0))
        curves[name] = [(ratio, range(len(prompts)))]
    if not curves:
        return None
    label = "uncertainty / uncertainty of the first prompt"
    plot, axes = _draw_lines({"": curves}, label, "", height=0.36 * len(prompts) + 0.9)
    axis = axes[-1]  # training-free scores have no ladder: there is one panel
    prompt_labels = [textwrap.fill(prompt, 26) for prompt in prompts]
    axis.set_yticks(range(len(prompts)), prompt_labels)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    return plot


# Other plots.


def draw_captions(examples):
    """Captions, most certain level first, each above its best images; correct ones are framed."""
    if not examples:
        return None
    levels = examples[-1]["level"]
    per_level = len(examples) // levels
    images = len(examples[0]["images"])
    size_of_image = TEXT_WIDTH / (per_level * images)
    height_of_level = size_of_image + 0.57  # with up to four lines of text
    plot = plt.figure(figsize=(TEXT_WIDTH, height_of_level * levels), layout="constrained")
    parts = plot.subfigures(levels, per_level)
    for part, example in zip(parts.flat, examples, strict=True):
        lines = [f"level {example['level']} of {levels}, uncertainty {example['uncertainty']:.3g}"]
        lines += textwrap.wrap(example["caption"], 46, max_lines=3, placeholder=" ...")
        part.suptitle("\n".join(lines), fontsize=7, x=0.02, ha="left")
        axes = part.subplots(1, images)
        for axis, file, is_right in zip(axes, example["images"], example["right"], strict=True):
            with Image.open(file) as image:
                axis.imshow(ImageOps.fit(image.convert("RGB"), (160, 160)))
            _frame(axis, is_right)
    return plot


def _frame(axis, is_right):
    """Frame an image, thick and green if it is correct."""
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)
    colour = RIGHT if is_right else WRONG
    width = 3.5 if is_right else 0.6
    for spine in axis.spines.values():
        spine.set(visible=True, color=colour, linewidth=width)


def draw_against(results, field, label, logarithmic=False):
    """The percentile of a caption's uncertainty against a field of the answers.

    One panel per method: median and middle half of the captions in each bin.

    Args:
        results: {name: [Results, one per seed]}.
        field: "words" or "relevant", the number of images that the caption describes.
        label: of the horizontal axis.
        logarithmic: whether the horizontal axis is.
    Returns: the plot, or None if the answers do not have the field.
    """
    answers = {}  # name -> the text-to-image answers of each seed
    for name, runs in results.items():
        answers[name] = [run.answers["t2i"] for run in runs]
        if field == "relevant":
            answers[name] = [only_judged(answers_of_seed) for answers_of_seed in answers[name]]
        if field not in answers[name][0]:
            return None
    columns = min(3, len(answers))
    rows = math.ceil(len(answers) / columns)
    plot, axes = plt.subplots(
        rows,
        columns,
        squeeze=False,
        sharex=True,
        sharey=True,
        figsize=(TEXT_WIDTH, 1.6 * rows + 0.4),
        layout="constrained",
    )
    for axis in axes.flat[len(answers) :]:
        axis.set_visible(False)
    looks = looks_of(answers)
    for axis, name in zip(axes.flat, answers, strict=False):
        _draw_percentiles(axis, looks[name], answers[name], field, logarithmic)
        axis.set_title(line_label(name), loc="left")
    plot.supxlabel(label, fontsize=STYLE["font.size"])
    plot.supylabel("percentile of uncertainty", fontsize=STYLE["font.size"])
    return plot


def _draw_percentiles(axis, look, answers, field, logarithmic):
    """Draw one panel of `draw_against`. Args: answers: one dict per seed."""
    values = answers[0][field].astype(np.float64)  # the same for all seeds
    percentiles_of_seeds = []
    for answers_of_seed in answers:
        rank = rank_values(answers_of_seed["uncertainty"])
        percentiles_of_seeds.append(100 * rank / len(values))
    percentile = np.mean(percentiles_of_seeds, axis=0)
    bins = _logarithmic_bins(values) if logarithmic else _bins(values)
    centres = [values[in_bin].mean() for in_bin in bins]
    quartiles = [np.percentile(percentile[in_bin], [25, 50, 75]) for in_bin in bins]
    low, median, high = np.transpose(quartiles)
    _draw_line(axis, "", look, centres, median, (low, high))
    axis.set_ylim(0, 100)
    if logarithmic:
        axis.set_xscale("log", base=4)
        axis.xaxis.set_major_formatter(ScalarFormatter())


def _bins(values):
    """Masks of at most 12 bins of about equally many values. Empty bins are left out."""
    edges = np.quantile(values, np.linspace(0, 1, BINS + 1))
    return _masks(values, np.unique(edges))


def _logarithmic_bins(values):
    """Masks of bins from one power of 2 to the next. Empty bins are left out."""
    highest = np.ceil(np.log2(values.max() + 1))
    edges = 2.0 ** np.arange(0, highest + 1)
    return _masks(values, edges)


def _masks(values, edges):
    """One mask per bin that has values. The last bin includes its upper edge."""
    last_bin = max(0, len(edges) - 2)
    bin_of_value = np.searchsorted(edges, values, side="right") - 1
    bin_of_value = np.clip(bin_of_value, 0, last_bin)
    return [bin_of_value == number for number in np.unique(bin_of_value)]


# Lines.


def looks_of(names):
    """The colour, marker and dashes of the lines of a plot: {name: options of matplotlib}."""
    looks = {}
    pairs = zip(OTHER_COLOURS, OTHER_MARKERS, strict=True)
    others = itertools.cycle(itertools.product(OTHER_DASHES, pairs))
    for name in names:
        if name in LOOKS:
            colour, marker, dashes = LOOKS[name]
        else:
            dashes, (colour, marker) = next(others)
        looks[name] = {"color": colour, "marker": marker, "linestyle": dashes}
    return looks


def _numbered(values):
    """A curve of values against their number, 1, 2, ...: x and y."""
    return np.arange(1, len(values) + 1), np.array(values, dtype=float)


def _draw_lines(
    panels, x_label, y_label, height=2.0, y_limits=None, marker=None, has_integer_x=False
):
    """Means over seeds, with a band of one standard deviation.

    Where there are more than MAX_LINES lines, training-free ones have a row of panels of their
    own, above that of the trained heads. The panels of a row have the same range of y.

    Args:
        panels: {title: {name: [(x, y), one per seed]}}.
        height: of a panel, in inches.
        marker: of all lines; None: each has its own.
        has_integer_x: whether only integers are marked on the horizontal axis.
    Returns: the plot and its axes.
    """
    panel_rows = _rows_of_panels(panels)
    heights = []
    for panel_row in panel_rows:
        lines = max(map(len, panel_row.values()))
        height_of_legend = 0.15 * lines + 0.4
        heights.append(max(height, height_of_legend))
    plot, axes = plt.subplots(
        len(panel_rows),
        len(panels),
        squeeze=False,
        sharey="row",
        figsize=(TEXT_WIDTH, sum(heights)),
        height_ratios=heights,
        layout="constrained",
    )
    for panel_row, axes_of_row in zip(panel_rows, axes, strict=True):
        for axis, (title, curves) in zip(axes_of_row, panel_row.items(), strict=True):
            _draw_panel(axis, curves, marker)
            axis.set_title(title, loc="left")
            if y_limits is not None:
                axis.set_ylim(y_limits)
            if has_integer_x:
                axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axes_of_row[0].set_ylabel(y_label)
        axes_of_row[-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
    if len(panels) == 1:
        axes[-1, 0].set_xlabel(x_label)
    else:
        plot.supxlabel(x_label, fontsize=STYLE["font.size"])
    return plot, axes.flatten()


def _rows_of_panels(panels):
    """Split panels with many lines into training-free lines and trained heads.

    The lines BEST and CALIBRATED are in both.

    Args: panels: as for `_draw_lines`.
    Returns: list of such panels, one per row of the plot.
    """
    if max(map(len, panels.values())) <= MAX_LINES:
        return [panels]
    training_free = {}
    trained = {}
    for title, curves in panels.items():
        training_free[title] = {}
        trained[title] = {}
        for name in curves:
            if name in TRAINING_FREE or name in (BEST, CALIBRATED):
                training_free[title][name] = curves[name]
            if name not in TRAINING_FREE:
                trained[title][name] = curves[name]
    if any(training_free.values()) and any(trained.values()):
        return [training_free, trained]
    return [panels]


def _draw_panel(axis, curves, marker):
    """Draw the mean over seeds of each line, with a band of one standard deviation.

    Args: curves: {name: [(x, y), one per seed]}.
    """
    looks = looks_of(curves)
    for name, curves_of_seeds in curves.items():
        if marker is not None:
            looks[name]["marker"] = marker
        x, _ = curves_of_seeds[0]
        y = np.array([y for _, y in curves_of_seeds])
        mean = y.mean(axis=0)
        band = None
        if len(y) > 1:
            std = y.std(axis=0, ddof=1)
            band = (mean - std, mean + std)
        _draw_line(axis, name, looks[name], x, mean, band)


def _draw_line(axis, name, look, x, y, band=None):
    """Draw a line in its look, with a band (low, high) around it."""
    axis.plot(x, y, label=line_label(name), **look)
    if band is not None:
        low, high = band
        axis.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
