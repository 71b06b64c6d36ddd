"""Every figure of an evaluation, one row each: result files, tables, intervals and comparisons follow from them."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from utils.evaluation import bootstrap, metrics, risk

DIRECTIONS = {"t2i": "text-to-image", "i2t": "image-to-text"}


@dataclass(frozen=True)
class Figure:
    """A number, and what it is a function of."""

    name: str  # its column
    more_is_better: bool | None  # None: neither is, and it has no interval
    fields: tuple  # of a view (`views_of`), what function takes; where one is missing, the figure is left out
    function: Callable  # (*fields) -> float, or None where undefined
    resampled: Callable | None = None  # (Resamples, *fields) -> (R,), of all resamples at once; None: one by one
    entry: str | None = None  # which figure of a dict, where the functions give several; they are called once for all
    column: bool = True  # whether tables show it
    queries: int = 1  # with fewer of them it is left out
    form: str = ".3f"  # in which tables show it

    def is_known(self, view):
        """Whether a view, {field: array}, has what it needs."""
        return all(field in view for field in self.fields) and len(view[self.fields[0]]) >= self.queries

    def of(self, call, function):
        """What one of its two functions gives, `call` being that of a view (`once_each`)."""
        result = call(function, self.fields)
        return result[self.entry] if self.entry else result


def once_each(view, *first):
    """A function `call(function, fields)` of fields of a view, after first arguments; it calls each function once."""
    return functools.cache(lambda function, fields: function(*first, *(view[field] for field in fields)))


def recall(name, field, k, column=True):
    """The row of a recall at k of a field of ranks."""
    functions = (partial(module.recall_at, k=k) for module in (metrics, bootstrap))
    return Figure(name, True, (field,), *functions, column=column)


def mean(values):
    """The mean of values (Q,)."""
    return float(np.mean(values))


def rsum(*ranks):
    """All recalls in per cent, summed."""
    return 100 * sum(metrics.recall_at(rank, k) for rank in ranks for k in (1, 5, 10))


def by_modality(name, more_is_better, function, entry=None):
    """The rows of a figure that says how well the uncertainty of text or image predicts the errors of a direction."""
    return tuple(
        Figure(f"{d} {name} by {modality}", more_is_better, (f"{d}_correct", f"{d}_{field}"), function, entry=entry)
        for d in DIRECTIONS
        for modality, field in (("text", "uncertainty"), ("image", "image_uncertainty"))
    )


RANKED = ("correct", "uncertainty")
DESCRIBED = ("uncertainty", "relevant")  # relevant: exact ambiguity, how many images a caption describes
GIVEN = (*DESCRIBED, "words")
RETRIEVAL = (
    recall("R@1", "rank", 1),
    recall("R@5", "rank", 5, column=False),
    recall("R@10", "rank", 10, column=False),
    *(
        Figure(name, more_is_better, (*RANKED, "levels"), metrics.by_order, bootstrap.by_order, entry=name)
        for name, more_is_better in (("AURC", False), ("E-AURC", False), ("S", False), ("R2", True), ("-S*R2", True))
    ),
    Figure("ties", None, ("uncertainty",), metrics.share_of_ties, column=False),
)
AMBIGUITY = (
    Figure("spearman", True, DESCRIBED, metrics.spearman, bootstrap.spearman),
    Figure("partial_spearman_given_length", True, GIVEN, metrics.partial_spearman, bootstrap.partial_spearman),
    recall("R@1_described", "relevant_rank", 1),
)
RECALL = (
    *(recall(f"{d} R@{k}", f"{d}_rank", k) for d in DIRECTIONS for k in (1, 5, 10)),
    Figure("RSUM", True, ("t2i_rank", "i2t_rank"), rsum),
)
ALL_RIGHT = tuple(recall(f"R@{k}", "relevant_rank", k) for k in (1, 5, 10))
RELEVANCE = (
    *ALL_RIGHT,
    Figure("mAP@R", True, ("ap_at_r",), mean, bootstrap.mean),
    Figure("R-Precision", True, ("r_precision",), mean, bootstrap.mean),
)
SWEEP = tuple(  # S is easily had at 10 levels
    Figure(f"{name}@{k}", name != "S", RANKED, partial(metrics.by_level, levels=k), entry=name, queries=k)
    for name in ("S", "-S*R2")
    for k in (5, 10, 20, 50)
)
CALIBRATION = tuple(
    Figure(name, False, ("correct", "uncertainty", "image"), risk.calibration, entry=name) for name in ("Brier", "ECE")
)
HIERARCHY = (
    Figure("falling", True, ("uncertainty", "chains"), metrics.share_falling),
    Figure("tau", True, ("uncertainty", "chains"), metrics.mean_tau),
)


@dataclass(frozen=True)
class Section:
    """Figures of one view, under one key and in one table."""

    key: str  # of the metrics in a .json
    title: str  # of the table
    view: str  # what its figures are functions of (`views_of`)
    figures: tuple
    compared: bool = False  # whether its table is in the comparison; else it is in the details
    resampled: bool = False  # whether its figures have intervals

    def measure(self, view):
        """Those of its figures that are known: {name: float or None}."""
        call = once_each(view)
        return {f.name: f.of(call, f.function) for f in self.figures if f.is_known(view)}

    def resample(self, view, resamples):
        """Those of its figures that have intervals: {name: (resamples,)}, nan where undefined."""
        figures = [f for f in self.figures if f.is_known(view) and f.more_is_better is not None]
        if not (self.resampled and figures and resamples):
            return {}
        call = once_each(view, bootstrap.Resamples(view["image"], resamples))
        return {f.name: f.of(call, f.resampled or partial(bootstrap.one_by_one, f.function)) for f in figures}


FOLDS = Section("recall_folds", "recall, mean over the folds", "folds", RECALL)


SECTIONS = (
    *(Section(d, title, d, RETRIEVAL, compared=True, resampled=True) for d, title in DIRECTIONS.items()),
    Section("ambiguity", "exact ambiguity", "known t2i", AMBIGUITY, compared=True, resampled=True),
    Section("recall", "recall", "both", RECALL),
    FOLDS,
    *(
        Section(f"{key}_{d}", f"{title}, {kind}", f"{view} {d}".strip(), figures, resampled=resampled)
        for key, kind, view, figures, resampled in (
            ("relevance", "all right answers", "known", RELEVANCE, True),
            ("cxc", "all right answers of CxC", "cxc", ALL_RIGHT, True),
            ("sweep", "5 to 50 levels", "", SWEEP, False),
            ("image", "by the image's uncertainty", "image", RETRIEVAL, False),
        )
        for d, title in DIRECTIONS.items()
    ),
    *(
        Section(f"calibration_{d}", f"{title}, probability of being right", d, CALIBRATION)
        for d, title in DIRECTIONS.items()
    ),
    Section(
        "asymmetry", "asymmetry: AURC by whose uncertainty", "both", by_modality("AURC", False, metrics.aurc, "AURC")
    ),
    Section("asymmetry", "asymmetry: AUROC by whose uncertainty", "both", by_modality("AUROC", True, metrics.auroc)),
)


def hierarchy(stem):
    """The section of a file of caption chains."""
    return Section(f"hierarchy {stem}", f"hierarchy {stem}: from general to specific", "chains", HIERARCHY)


def guarantees(risks, confidence, at):
    """The sections of selective retrieval at risks; right: a right answer among the first k, of `at`. A tuple."""
    sections = []
    for d, k in itertools.product(DIRECTIONS, at):
        figures = []
        for one in risks:
            function = partial(risk.guarantee, risk=one, confidence=confidence, k=k)
            for entry, more_is_better, form in (
                ("coverage", True, ".3f"),
                ("error", None, ".3f"),
                ("threshold", None, ".3g"),
            ):
                name = f"{entry} at {one:g}"
                fields = ("rank", "uncertainty", "image")
                figures.append(Figure(name, more_is_better, fields, function, entry=entry, form=form))
        title = f"{DIRECTIONS[d]}, right among the first {k}"
        sections.append(Section(f"risk_{d}_at_{k}", title, d, tuple(figures)))
    return tuple(sections)


def views_of(answers, levels):
    """What figures are functions of.

    Args:
        answers: {"t2i", "i2t"}, as `scorers.answer` gives them.
        levels: K.
    Returns: {view: {field: array, "levels": K}}. Views: "t2i", "i2t"; "known t2i", ..., if their right answers were
        looked into; "cxc t2i", ..., the same of CxC; "image t2i", ..., whose uncertainty is the image's;
        "both": fields <direction>_<field>, where "uncertainty" is the text's, if texts have any.
    """
    views, both = {}, {}
    for d, fields in answers.items():
        asked = fields.get("query", np.arange(len(fields["rank"])))
        fields = {"image": asked} | fields  # the caption's, or the image asked: what is resampled
        cxc = {field.removeprefix("cxc_"): values for field, values in fields.items() if field.startswith("cxc_")}
        views[d] = fields | {"correct": fields["rank"] == 1, "levels": levels}
        both |= {f"{d}_{field}": values for field, values in views[d].items()}
        if (uncertainty := uncertainty_of(fields)) is not None:
            views[d]["uncertainty"] = uncertainty
        views[f"known {d}"] = only_judged(fields)
        views[f"cxc {d}"] = only_judged(cxc | {"image": fields["image"]})
        if "image_uncertainty" in fields:
            views[f"image {d}"] = views[d] | {"uncertainty": fields["image_uncertainty"]}
    return views | {"both": both}


def uncertainty_of(fields):
    """What queries are ordered by (Q,): the text's uncertainty, the image's where texts have none, or None."""
    return fields.get("uncertainty", fields.get("image_uncertainty"))


def only_judged(fields):
    """The answers to the queries whose right answers were looked into; none if nobody looked."""
    judged = np.asarray(fields.get("relevant", ())) > 0
    judged = judged & fields.get("annotated", True)  # of results from before, where it is not said by 0
    return {field: values[judged] for field, values in fields.items()} if judged.any() else {}


def measure(answers, levels, sections=SECTIONS):
    """The figures of sections: {section key: {figure name: float or None}}; takes what `views_of` takes."""
    views, measured = views_of(answers, levels), {}
    for section in sections:
        if values := section.measure(views.get(section.view, {})):
            measured.setdefault(section.key, {}).update(values)
    return measured


def measure_resamples(answers, levels, resamples, sections=SECTIONS):
    """The figures of resampled queries: {section key: {figure name: (resamples,)}}, nan: undefined; {} for none."""
    views = views_of(answers, levels)
    draws = {section.key: section.resample(views.get(section.view, {}), resamples) for section in sections}
    return {key: values for key, values in draws.items() if values}
