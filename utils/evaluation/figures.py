"""Every metric of an evaluation, one row each: result files, tables and intervals follow from them.

A `Figure` is one metric. A `Section` is a table of them. All metrics of a section are computed from
one view, a dict of arrays with one entry per query and of the settings "levels" and "levels_by".
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from utils.evaluation import bootstrap, metrics, selective

DIRECTIONS = {"t2i": "text-to-image", "i2t": "image-to-text"}


@dataclass(frozen=True)
class Figure:
    """A metric (a number, not a plot), and the arrays that it is computed from."""

    name: str  # its column in tables
    more_is_better: bool | None  # None: it is neither good nor bad, and has no interval
    fields: tuple  # of the view; if one of them is missing, the metric is left out
    function: Callable  # (*fields) -> float, or None where it is undefined
    takes_weight: bool = True  # of its resamples; False if the fields are weighted already
    column: bool = True  # whether tables show it
    bold: bool = True  # whether tables set the best in bold
    min_queries: int = 1  # with fewer queries it is left out
    form: str = ".3f"  # how tables format it

    def is_available(self, view):
        """Whether a view, {field: array}, has what the metric needs."""
        if not all(field in view for field in self.fields):
            return False
        return len(view["rank"]) >= self.min_queries if "rank" in view else True

    def compute(self, view, weight=None):
        """The metric of a view; with a weight (r, Q), its r resamples (metrics.py)."""
        values = [view[field] for field in self.fields]
        if weight is not None and self.takes_weight:
            return self.function(*values, weight=weight)
        return self.function(*values)


@dataclass(frozen=True)
class Section:
    """Metrics of one view, stored under one key and shown in one table."""

    key: str  # of the metrics in the .json file
    title: str  # of the table
    direction: str | None  # "t2i", "i2t", or None for both
    view: Callable | None  # (answers, direction) -> {field: array}
    figures: tuple
    compared: bool = False  # whether its table is in comparison.md; others: details.md, risk.md
    resampled: bool = False  # whether its metrics have intervals

    def measure(self, view):
        """The metrics that can be computed from a view: {name: float or None}."""
        view = self._with_shared_fields(view)
        return {f.name: f.compute(view) for f in self.figures if f.is_available(view)}

    def resample(self, view, resamples):
        """Resamples of its metrics that have intervals: {name: (resamples,)}; NaN: undefined."""
        if not (self.resampled and view and resamples):
            return {}

        def measure(weight):
            weighted_view = self._with_shared_fields(view, weight)
            values = {}
            for figure in self.figures:
                if figure.more_is_better is not None and figure.is_available(weighted_view):
                    values[figure.name] = figure.compute(weighted_view, weight)
            return values

        return bootstrap.resample(measure, view["image"], resamples)

    def _with_shared_fields(self, view, weight=None):
        """A view with what several metrics share: the recall by level, and the AURC."""
        needed = set()
        for figure in self.figures:
            needed.update(figure.fields)
        view = dict(view)
        if "uncertainty" not in view:
            return view
        if "recall_by_level" in needed:
            view["recall_by_level"] = metrics.recall_by_level(
                view["correct"], view["uncertainty"], view["levels"], weight, view["levels_by"]
            )
        if "aurc" in needed:
            view["aurc"] = metrics.aurc(view["correct"], view["uncertainty"], weight)
        return view


# Views: what the metrics of a section are computed from.


def all_queries(answers, direction):
    """All queries of a direction; "uncertainty" is the text's, else the image's, if there is one.

    Args:
        answers: {"t2i", "i2t"}, as `scorers.answer` returns them.
        direction: one of these.
    Returns: {field: (Q,) array}. "image" is what is resampled: the image of the caption, or the
        query itself.
    """
    view = _answers_with_image(answers, direction)
    view["correct"] = view["rank"] == 1
    uncertainty = uncertainty_of(view)
    if uncertainty is not None:
        view["uncertainty"] = uncertainty
    return view


def queries_by_image(answers, direction):
    """All queries of a direction; "uncertainty" is the image's. {} if images have none."""
    view = all_queries(answers, direction)
    if "image_uncertainty" not in view:
        return {}
    view["uncertainty"] = view["image_uncertainty"]
    return view


def judged_queries(answers, direction):
    """The queries for which relevance.json lists all right answers; {} if there are none."""
    return only_judged(_answers_with_image(answers, direction))


def cxc_queries(answers, direction):
    """The queries of a direction that CxC judges, with its judgements; {} if there are none."""
    answered = _answers_with_image(answers, direction)
    view = {"image": answered["image"]}
    for field, values in answered.items():
        if field.startswith("cxc_"):
            view[field.removeprefix("cxc_")] = values
    return only_judged(view)


def both_directions(answers, direction):
    """All queries of both directions: fields "t2i_rank", "i2t_correct" and so on.

    "uncertainty" is the text's here; it is missing if texts have none.
    """
    view = {}
    for name, answered in answers.items():
        for field, values in answered.items():
            view[f"{name}_{field}"] = values
        view[f"{name}_correct"] = answered["rank"] == 1
    return view


def _answers_with_image(answers, direction):
    """The answers to the queries of a direction, with the "image" that each belongs to."""
    answered = answers[direction]
    # Image-to-text: the query itself. Text-to-image has an "image", which replaces this one.
    image = answered.get("query", np.arange(len(answered["rank"])))
    return {"image": image, **answered}


def uncertainty_of(answered):
    """The uncertainty of the queries, (Q,): the text's, else the image's, else None."""
    if "uncertainty" in answered:
        return answered["uncertainty"]
    return answered.get("image_uncertainty")


def only_judged(view):
    """The part of a view whose queries have judged answers; {} if there is none."""
    is_judged = np.asarray(view.get("relevant", ())) > 0
    if "annotated" in view:  # in older result files, this field says which queries are judged
        is_judged = is_judged & view["annotated"]
    if not is_judged.any():
        return {}
    return {field: values[is_judged] for field, values in view.items()}


# Figures.


def recall(name, field, k, column=True):
    """Recall@k of a field of ranks."""
    return Figure(name, True, (field,), partial(metrics.recall_at, k=k), column=column)


def sweep(name, more_is_better, metric_of_recall, levels):
    """A metric of the recall by level, at another number of levels, always cut by count."""

    def function(correct, uncertainty):
        return metric_of_recall(metrics.recall_by_level(correct, uncertainty, levels))

    figure_name = f"{name}@{levels}"
    return Figure(
        figure_name, more_is_better, ("correct", "uncertainty"), function, min_queries=levels
    )


def itself(value):
    """A metric that the view has already."""
    return value


RETRIEVAL = (
    recall("R@1", "rank", 1),
    recall("R@5", "rank", 5, column=False),
    recall("R@10", "rank", 10, column=False),
    Figure("AURC", False, ("aurc",), itself, takes_weight=False),
    Figure("E-AURC", False, ("aurc", "correct"), metrics.excess_aurc),
    Figure("S", False, ("recall_by_level",), metrics.level_spearman, takes_weight=False),
    Figure("R2", True, ("recall_by_level",), metrics.level_r2, takes_weight=False),
    Figure("-S*R2", True, ("recall_by_level",), metrics.level_score, takes_weight=False),
    Figure("ties", None, ("uncertainty",), metrics.share_of_ties, column=False),
)
AMBIGUITY = (  # "relevant" is the exact ambiguity: how many images a caption describes
    Figure("spearman", True, ("uncertainty", "relevant"), metrics.spearman),
    Figure(
        "partial_spearman_given_length",
        True,
        ("uncertainty", "relevant", "words"),
        metrics.partial_spearman,
    ),
    recall("R@1_described", "relevant_rank", 1),
)
RECALL = (
    recall("t2i R@1", "t2i_rank", 1),
    recall("t2i R@5", "t2i_rank", 5),
    recall("t2i R@10", "t2i_rank", 10),
    recall("i2t R@1", "i2t_rank", 1),
    recall("i2t R@5", "i2t_rank", 5),
    recall("i2t R@10", "i2t_rank", 10),
    Figure("RSUM", True, ("t2i_rank", "i2t_rank"), metrics.rsum),
)
ALL_RIGHT = (
    recall("R@1", "relevant_rank", 1),
    recall("R@5", "relevant_rank", 5),
    recall("R@10", "relevant_rank", 10),
)
RELEVANCE = (
    *ALL_RIGHT,
    Figure("mAP@R", True, ("ap_at_r",), metrics.mean),
    Figure("R-Precision", True, ("r_precision",), metrics.mean),
)
SWEEP = (  # 10 levels hide noise that 50 show
    sweep("S", False, metrics.level_spearman, 5),
    sweep("S", False, metrics.level_spearman, 10),
    sweep("S", False, metrics.level_spearman, 20),
    sweep("S", False, metrics.level_spearman, 50),
    sweep("-S*R2", True, metrics.level_score, 5),
    sweep("-S*R2", True, metrics.level_score, 10),
    sweep("-S*R2", True, metrics.level_score, 20),
    sweep("-S*R2", True, metrics.level_score, 50),
)
CALIBRATION = (
    Figure("Brier", False, ("correct", "uncertainty", "image"), selective.brier),
    Figure("ECE", False, ("correct", "uncertainty", "image"), selective.expected_calibration_error),
)
ASYMMETRY_AURC = (
    Figure("t2i AURC by text", False, ("t2i_correct", "t2i_uncertainty"), metrics.aurc),
    Figure("t2i AURC by image", False, ("t2i_correct", "t2i_image_uncertainty"), metrics.aurc),
    Figure("i2t AURC by text", False, ("i2t_correct", "i2t_uncertainty"), metrics.aurc),
    Figure("i2t AURC by image", False, ("i2t_correct", "i2t_image_uncertainty"), metrics.aurc),
)
ASYMMETRY_AUROC = (
    Figure("t2i AUROC by text", True, ("t2i_correct", "t2i_uncertainty"), metrics.auroc),
    Figure("t2i AUROC by image", True, ("t2i_correct", "t2i_image_uncertainty"), metrics.auroc),
    Figure("i2t AUROC by text", True, ("i2t_correct", "i2t_uncertainty"), metrics.auroc),
    Figure("i2t AUROC by image", True, ("i2t_correct", "i2t_image_uncertainty"), metrics.auroc),
)
HIERARCHY = (
    Figure("falling", True, ("uncertainty", "chains"), metrics.share_falling),
    Figure("tau", True, ("uncertainty", "chains"), metrics.mean_tau),
)


# Sections.


FOLDS = Section("recall_folds", "recall, mean over the folds", None, None, RECALL)


def for_both_directions(key, title, view, figures, resampled=False):
    """The same section of both directions, [text-to-image, image-to-text]."""
    sections = []
    for direction, name in DIRECTIONS.items():
        section = Section(
            f"{key}_{direction}",
            f"{name}, {title}",
            direction,
            view,
            figures,
            resampled=resampled,
        )
        sections.append(section)
    return sections


SECTIONS = (
    Section("t2i", "text-to-image", "t2i", all_queries, RETRIEVAL, compared=True, resampled=True),
    Section("i2t", "image-to-text", "i2t", all_queries, RETRIEVAL, compared=True, resampled=True),
    Section(
        "ambiguity",
        "exact ambiguity",
        "t2i",
        judged_queries,
        AMBIGUITY,
        compared=True,
        resampled=True,
    ),
    Section("recall", "recall", None, both_directions, RECALL),
    FOLDS,
    *for_both_directions(
        "relevance", "all right answers", judged_queries, RELEVANCE, resampled=True
    ),
    *for_both_directions("cxc", "all right answers of CxC", cxc_queries, ALL_RIGHT, resampled=True),
    *for_both_directions("sweep", "5 to 50 levels", all_queries, SWEEP),
    *for_both_directions("image", "by the image's uncertainty", queries_by_image, RETRIEVAL),
    *for_both_directions("calibration", "probability of being right", all_queries, CALIBRATION),
    Section(
        "asymmetry",
        "asymmetry: AURC by whose uncertainty",
        None,
        both_directions,
        ASYMMETRY_AURC,
    ),
    Section(
        "asymmetry",
        "asymmetry: AUROC by whose uncertainty",
        None,
        both_directions,
        ASYMMETRY_AUROC,
    ),
)


def hierarchy(stem):
    """The section of a file of caption chains."""
    title = f"hierarchy {stem}: from general to specific"
    return Section(f"hierarchy {stem}", title, None, None, HIERARCHY)


def guarantees(risks, confidence, at):
    """The sections of selective retrieval, a list: one per direction and per k in `at`.

    Args:
        risks: the shares of wrong answers that are allowed.
        confidence: with which the error stays below the risk.
        at: a query is right if a right answer is among its first k; one section per k.
    """
    sections = []
    for direction, direction_title in DIRECTIONS.items():
        for k in at:
            figures = []
            for risk in risks:
                figures += _guarantee(risk, confidence, k)
            key = f"risk_{direction}_at_{k}"
            title = f"{direction_title}, right among the first {k}"
            sections.append(Section(key, title, direction, all_queries, tuple(figures)))
    return sections


def _guarantee(risk, confidence, k):
    """Coverage, error and threshold at one risk: three figures."""
    fields = ("rank", "uncertainty", "image")
    settings = {"risk": risk, "confidence": confidence, "k": k}
    coverage = partial(selective.coverage, **settings)
    error = partial(selective.error, **settings)
    threshold = partial(selective.calibrated_threshold, **settings)
    return [
        Figure(f"coverage at {risk:g}", True, fields, coverage, bold=False),
        Figure(f"error at {risk:g}", None, fields, error),
        Figure(f"threshold at {risk:g}", None, fields, threshold, form=".3g"),
    ]


def measure(answers, levels, sections=SECTIONS, levels_by=metrics.COUNT):
    """The metrics of sections: {section key: {metric name: float or None}}.

    Args:
        answers: {"t2i", "i2t"}, as `scorers.answer` returns them.
        levels: number of uncertainty levels.
        levels_by: how the queries are cut into levels (`metrics.recall_by_level`).
    """
    measured = {}
    for section in sections:
        values = section.measure(_view_of(section, answers, levels, levels_by))
        if values:
            measured.setdefault(section.key, {}).update(values)
    return measured


def measure_resamples(answers, levels, resamples, sections=SECTIONS, levels_by=metrics.COUNT):
    """The metrics of resampled queries: {section key: {metric name: (resamples,)}}.

    NaN means undefined. Sections without intervals are left out.
    """
    draws = {}
    for section in sections:
        values = section.resample(_view_of(section, answers, levels, levels_by), resamples)
        if values:
            draws[section.key] = values
    return draws


def _view_of(section, answers, levels, levels_by):
    """What the metrics of a section are computed from; {} if the answers do not have it."""
    if section.view is None:
        return {}
    if section.direction is not None and section.direction not in answers:
        return {}
    view = section.view(answers, section.direction)
    return {**view, "levels": levels, "levels_by": levels_by} if view else {}
