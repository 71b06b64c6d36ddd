"""Plots of results, a PNG and a PDF each, that are readable in print and without colour vision."""

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
from utils.evaluation.selective import predict_right
from utils.evaluation.tables import labels_of
from utils.evaluation.training_free import TRAINING_FREE
from utils.files import written_aside

BEST = "best possible order"
CALIBRATED = "perfectly calibrated"
# Name of a row: colour, marker, dashes. The colours are Okabe & Ito's, which all common forms of
# colour vision tell apart; markers and dashes tell lines apart in grey.
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
# Rows without an entry there take these in turn: Tol's muted colours, then other dashes.
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
STYLE = {
    "font.size": 9,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
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
MOST_LINES = 7  # in a panel
LEAST_COVERAGE = 0.05  # from which risk-coverage curves are drawn
POINTS = 200  # of a risk-coverage curve
BINS = 12
AMONG = "in percentiles among the captions; band: the middle half of the captions"
CAPTIONS = {
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
    """Draw every plot that the results allow, and remove older ones.

    The second row of a method, "..., frozen score", is left out: it has the same uncertainty.

    Args:
        results: {Row: [Results, one per seed]}.
        examples: as `prompts.example_captions` returns them.
        folder: where the files go.
    Returns: {file name of the PNG: caption}.
    """
    labels = labels_of(results)
    drawn = {}
    for row, runs in results.items():
        if runs[0].is_uncertain and labels[row] == row.method:
            drawn[row.method] = runs
    with_texts = {name: runs for name, runs in drawn.items() if runs[0].has_uncertain_texts}
    with plt.rc_context(STYLE):
        plots = {
            "levels": draw_levels(with_texts),
            "levels-image": draw_image_levels(drawn),
            "risk-coverage": draw_risk_coverage(drawn),
            "reliability": draw_reliability(drawn),
            "length": draw_against(with_texts, "words", "words in the caption"),
            "ambiguity": draw_against(
                with_texts, "relevant", "images that the caption describes", logarithmic=True
            ),
            "captions": draw_captions(examples),
            "ladder": draw_ladder(drawn),
        }
        captions = dict(CAPTIONS)
        for stem in _stems(drawn):
            name = f"hierarchy-{stem}"
            plots[name] = draw_depth(with_texts, stem)
            captions[name] = f"Uncertainty by depth in the chains of {stem}, general first, "
            captions[name] += "in percentiles"
        for name, plot in plots.items():
            _save(plot, folder, name)
    return {f"{name}.png": captions[name] for name, plot in plots.items() if plot is not None}


def _stems(results):
    """The files of caption chains that results have, in order."""
    stems = {}
    for runs in results.values():
        stems.update(dict.fromkeys(runs[0].content.get("depth", {})))
    return list(stems)


def _save(plot, folder, name):
    """Write a plot as PNG and PDF, and close it; without a plot (None), remove the files."""
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
        plot.set_layout_engine("none")  # it is laid out already
        with written_aside(pdf) as file:
            plot.savefig(file, format="pdf", metadata={"CreationDate": None})
    plt.close(plot)


# Lines over seeds, one panel per direction.


def draw_levels(results):
    """Recall against the uncertainty level."""
    recall = {name: [run.content for run in runs] for name, runs in results.items()}
    return _draw_recall(recall, "text")


def draw_image_levels(results):
    """Recall against the level of the image's uncertainty."""
    recall = {}
    for name, runs in results.items():
        if runs[0].content["by_image"]:
            recall[name] = [run.content["by_image"] for run in runs]
    return _draw_recall(recall, "image")


def _draw_recall(recall, modality):
    """Recall by level; recall is {name: [{direction: recall by level}, one per seed]}."""
    if not recall:
        return None
    panels = {}
    for direction, title in DIRECTIONS.items():
        panels[title] = {}
        for name, runs in recall.items():
            panels[title][name] = [_steps(run[direction]) for run in runs]
    label = f"level of {modality} uncertainty (1 = most certain)"
    plot, _ = _draw_lines(panels, label, "R@1", y_limits=(0, None))
    return plot


def draw_risk_coverage(results):
    """The error rate among the most certain queries, and that of the best possible order."""
    if not results:
        return None
    panels = {}
    for direction, title in DIRECTIONS.items():
        panels[title] = {}
        for name, runs in results.items():
            answers = [run.answers[direction] for run in runs]
            panels[title][name] = [
                _risk_curve(answered["rank"] == 1, uncertainty_of(answered)) for answered in answers
            ]
        first_runs = next(iter(results.values()))
        correct = first_runs[0].answers[direction]["rank"] == 1
        panels[title][BEST] = [_risk_curve(correct, ~correct)]
    plot, _ = _draw_lines(
        panels,
        "coverage: share of queries kept",
        "risk: 1 - R@1 among those kept",
        y_limits=(0, 1),
        marker="",
    )
    return plot


def _risk_curve(correct, uncertainty):
    """`risk_coverage` at 200 points: coverage and risk, two arrays in [0, 1].

    Below 5 % of coverage the risk is that of a few queries, and jumps.
    """
    risk = risk_coverage(correct, uncertainty)
    kept = np.ceil(np.linspace(LEAST_COVERAGE, 1, POINTS) * len(risk)).astype(int)
    kept = np.unique(kept)
    return kept / len(risk), risk[kept - 1]


def draw_reliability(results):
    """How often answers are right against how probable that was, of all seeds together.

    On the half of the images that is not calibrated on.
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
    predictions = []
    for answered in answers:
        image = answered.get("image", answered["query"])
        correct = answered["rank"] == 1
        predictions.append(predict_right(correct, uncertainty_of(answered), image))
    probability, is_right, weight = map(np.concatenate, zip(*predictions, strict=True))
    bins = _bins(probability) if len(weight) else []
    mean_probability = [np.average(probability[b], weights=weight[b]) for b in bins]
    share_right = [np.average(is_right[b], weights=weight[b]) for b in bins]
    return mean_probability, share_right


def draw_depth(results, stem):
    """The mean percentile of uncertainty by depth in caption chains."""
    rows = {}
    for name, runs in results.items():
        if all("depth" in run.content for run in runs):
            rows[name] = [_steps(run.content["depth"][stem]) for run in runs]
    plot, _ = _draw_lines(
        {"": rows}, "depth in the chain (1 = most general)", "percentile of uncertainty", (3.8, 2.9)
    )
    return plot


def draw_ladder(results):
    """The uncertainty of every prompt of the ladder relative to the first one."""
    rows = {}
    prompts = []
    for name, runs in results.items():
        if "ladder" not in runs[0].content:
            continue
        prompts = [step["prompt"] for step in runs[0].content["ladder"]]
        values = [[step["uncertainty"] for step in run.content["ladder"]] for run in runs]
        uncertainty = np.array(values)  # (seeds, prompts)
        with np.errstate(divide="ignore", invalid="ignore"):  # an uncertainty of 0 is not drawn
            log_ratio = np.log(uncertainty / uncertainty[:, :1])
            ratio = np.exp(log_ratio.mean(axis=0))
        rows[name] = [(ratio, range(len(prompts)))]
    if not rows:
        return None
    size = (6.0, 0.42 * len(prompts) + 1.2)
    label = "uncertainty / uncertainty of the first prompt"
    plot, axes = _draw_lines({"": rows}, label, "", size)
    axis = axes[-1]  # training-free scores have no ladder: there is one panel
    prompt_labels = [textwrap.fill(prompt, 26) for prompt in prompts]
    axis.set_yticks(range(len(prompts)), prompt_labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    return plot


# Other plots.


def draw_captions(examples):
    """Captions, most certain level first, each above its best images; correct ones are framed."""
    if not examples:
        return None
    levels = examples[-1]["level"]
    per_level = len(examples) // levels
    images = len(examples[0]["images"])
    size = (1.25 * per_level * images, 1.62 * levels)
    plot = plt.figure(figsize=size, layout="constrained")
    for part, example in zip(plot.subfigures(levels, per_level).flat, examples, strict=True):
        lines = textwrap.wrap(example["caption"], 52, max_lines=3, placeholder=" ...")
        part.suptitle("\n".join(lines), fontsize=7.5, x=0.02, ha="left")
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
    colour = RIGHT if is_right else "#bbbbbb"
    width = 3.5 if is_right else 0.6
    for spine in axis.spines.values():
        spine.set(visible=True, color=colour, linewidth=width)


def draw_against(results, field, label, logarithmic=False):
    """The percentile of a caption's uncertainty against a field of the answers.

    One panel per method: median and middle half of the captions in each bin.
    """
    answers = {}
    for name, runs in results.items():
        captions = [run.answers["t2i"] for run in runs]
        if field == "relevant":
            captions = [only_judged(answered) for answered in captions]
        if field not in captions[0]:
            return None
        answers[name] = captions
    if not answers:
        return None
    columns = min(4, len(answers))
    rows = -(-len(answers) // columns)
    plot, axes = plt.subplots(
        rows,
        columns,
        squeeze=False,
        sharex=True,
        sharey=True,
        figsize=(2.0 * columns + 0.4, 1.9 * rows + 0.4),
        layout="constrained",
    )
    for axis in axes.flat[len(answers) :]:
        axis.set_visible(False)
    looks = looks_of(answers)
    for axis, (name, captions) in zip(axes.flat, answers.items(), strict=False):
        _draw_percentiles(axis, looks[name], captions, field, logarithmic)
        axis.set_title(name, loc="left", fontsize=9)
    plot.supxlabel(label, fontsize=9)
    plot.supylabel("percentile of uncertainty", fontsize=9)
    return plot


def _draw_percentiles(axis, look, captions, field, logarithmic):
    """One panel of `draw_against`; captions are the answers of each seed."""
    values = captions[0][field].astype(np.float64)
    percentiles = [100 * rank_values(c["uncertainty"]) / len(values) for c in captions]
    percentile = np.mean(percentiles, axis=0)  # over seeds
    bins = _logarithmic_bins(values) if logarithmic else _bins(values)
    centres = [values[b].mean() for b in bins]
    low, median, high = np.array([np.percentile(percentile[b], [25, 50, 75]) for b in bins]).T
    _draw_line(axis, "", look, centres, median, (low, high))
    axis.set_ylim(0, 100)
    if logarithmic:
        axis.set_xscale("log", base=4)
        axis.xaxis.set_major_formatter(ScalarFormatter())


def _bins(values):
    """Masks of at most 12 bins of about equally many values; empty bins are left out."""
    return _masks(values, np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1))))


def _logarithmic_bins(values):
    """Masks of bins from one power of 2 to the next; empty bins are left out."""
    highest = np.ceil(np.log2(values.max() + 1))
    return _masks(values, 2.0 ** np.arange(0, highest + 1))


def _masks(values, edges):
    bin_of_value = np.searchsorted(edges, values, side="right") - 1
    bin_of_value = np.clip(bin_of_value, 0, max(0, len(edges) - 2))
    return [bin_of_value == number for number in np.unique(bin_of_value)]


# Lines.


def looks_of(names):
    """The colour, marker and dashes of the rows of a plot: {name: options of a line}."""
    looks = {}
    others = 0
    for name in names:
        if name in LOOKS:
            colour, marker, dashes = LOOKS[name]
        else:
            colour = OTHER_COLOURS[others % len(OTHER_COLOURS)]
            marker = OTHER_MARKERS[others % len(OTHER_MARKERS)]
            dashes = OTHER_DASHES[others // len(OTHER_COLOURS) % len(OTHER_DASHES)]
            others += 1
        looks[name] = {"color": colour, "marker": marker, "linestyle": dashes}
        if name in (BEST, CALIBRATED):
            looks[name]["linewidth"] = 1.2
    return looks


def _steps(values):
    """Values against 1, 2, ..."""
    return np.arange(1, len(values) + 1), np.array(values, dtype=float)


def _draw_lines(panels, x_label, y_label, size=(2.9, 2.4), y_limits=None, marker=None):
    """Means over seeds, with a band of one standard deviation.

    Where there are more than MOST_LINES lines, training-free ones have a row of panels of their
    own, above that of the trained heads. The panels of a row have one range of y.

    Args:
        panels: {title: {name: [(x, y), one per seed]}}.
        size: of a panel, in inches.
        marker: of all lines; None: each has its own.
    Returns: the figure and its axes.
    """
    panel_rows = _rows_of_panels(panels)
    width, height = size
    heights = []
    for panel_row in panel_rows:
        lines = max(len(rows) for rows in panel_row.values())
        heights.append(max(height, 0.17 * lines + 0.4))
    plot, axes = plt.subplots(
        len(panel_rows),
        len(panels),
        squeeze=False,
        sharey="row",
        figsize=(width * len(panels) + 1.5, sum(heights)),
        height_ratios=heights,
        layout="constrained",
    )
    for panel_row, axes_of_row in zip(panel_rows, axes, strict=True):
        for axis, (title, rows) in zip(axes_of_row, panel_row.items(), strict=True):
            looks = looks_of(rows)
            for name, curves in rows.items():
                if marker is not None:
                    looks[name]["marker"] = marker
                _draw_mean(axis, name, looks[name], curves)
            axis.set_title(title, loc="left")
            if y_limits is not None:
                axis.set_ylim(y_limits)
            if x_label.startswith(("level", "depth")):
                axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axes_of_row[0].set_ylabel(y_label)
        axes_of_row[-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
    if len(panels) == 1:
        axes[-1, 0].set_xlabel(x_label)
    else:
        plot.supxlabel(x_label, fontsize=STYLE["font.size"])
    return plot, axes.flatten()


def _rows_of_panels(panels):
    """Panels as one row, or as a row of training-free lines and one of trained heads.

    Args and Returns: panels as `_draw_lines` has them; a list of such.
    """
    if max(len(rows) for rows in panels.values()) <= MOST_LINES:
        return [panels]
    training_free = {}
    trained = {}
    for title, rows in panels.items():
        training_free[title] = {}
        trained[title] = {}
        for name, curves in rows.items():
            if name in TRAINING_FREE or name in (BEST, CALIBRATED):
                training_free[title][name] = curves
            if name not in TRAINING_FREE:
                trained[title][name] = curves
    rows_of_panels = [training_free, trained]
    is_mixed = all(any(rows.values()) for rows in rows_of_panels)
    return rows_of_panels if is_mixed else [panels]


def _draw_mean(axis, name, look, curves):
    """The mean of curves [(x, y), one per seed] and a band of one standard deviation."""
    x, _ = curves[0]
    y = np.array([y for _, y in curves])
    mean = y.mean(axis=0)
    band = None
    if len(curves) > 1:
        std = y.std(axis=0, ddof=1)
        band = (mean - std, mean + std)
    _draw_line(axis, name, look, x, mean, band)


def _draw_line(axis, name, look, x, y, band=None):
    """A line in its look, with a band (low, high) around it."""
    axis.plot(x, y, label=name, **look)
    if band is not None:
        low, high = band
        axis.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
