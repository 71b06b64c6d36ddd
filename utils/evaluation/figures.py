"""Every figure of an evaluation, a row each: result files, tables, intervals and comparisons follow. A new figure is a new row."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from utils.evaluation import bootstrap, metrics

DIRECTIONS = {"t2i": "text-to-image", "i2t": "image-to-text"}


@dataclass(frozen=True)
class Figure:
    """A number, and what it is a function of.

    Args:
        name: its column. more_is_better: None if neither is better; then it has no interval. fields: of a view (`views_of`); where one is
            missing, the figure is left out. function: (*fields) -> float, or None where undefined.
        resampled: (counts, *fields) -> (resamples,), the same for all resamples at once; None: function is called for each.
        column: whether tables show it. queries: with fewer of them it is left out.
    """

    name: str
    more_is_better: bool | None
    fields: tuple
    function: Callable
    resampled: Callable | None = None
    column: bool = True
    queries: int = 1

    def is_known(self, view):
        """Whether a view, {field: array}, has what it needs."""
        return all(field in view for field in self.fields) and len(view[self.fields[0]]) >= self.queries

    def of(self, view):
        """Its value: float or None."""
        return self.function(*(view[field] for field in self.fields))

    def of_resamples(self, view, counts):
        """Its values (resamples,), nan where undefined. Args: counts: as `bootstrap.resample` gives them."""
        values = [view[field] for field in self.fields]
        if self.resampled:
            return self.resampled(counts, *values)
        drawn = ([np.repeat(v, count) if np.ndim(v) else v for v in values] for count in counts)
        return np.array([self.function(*values) for values in drawn], dtype=np.float64)


def entry(function, name):
    """The function that gives one entry of the dict that another gives."""
    return lambda *values, **options: function(*values, **options)[name]


def by_level(correct, uncertainty, levels):
    """`level_statistics` of `recall_by_level`."""
    return metrics.level_statistics(metrics.recall_by_level(correct, uncertainty, levels))


def recall(name, field, k, **options):
    """The row of a recall at k. Args: field: of ranks."""
    return Figure(name, True, (field,), partial(metrics.recall_at, k=k), **options)


RANKED = ("correct", "uncertainty")
LEVELED = (*RANKED, "levels")
DESCRIBED = ("uncertainty", "relevant")  # relevant: exact ambiguity, how many images a caption describes
RETRIEVAL = (
    *(recall(f"R@{k}", "rank", k, column=k == 1) for k in (1, 5, 10)),
    Figure("AURC", False, RANKED, entry(metrics.aurc, "AURC"), entry(bootstrap.aurc, "AURC")),
    Figure("E-AURC", False, RANKED, entry(metrics.aurc, "E-AURC"), entry(bootstrap.aurc, "E-AURC")),
    Figure("S", False, LEVELED, entry(by_level, "S"), entry(bootstrap.by_level, "S")),
    Figure("R2", True, LEVELED, entry(by_level, "R2"), entry(bootstrap.by_level, "R2")),
    Figure("-S*R2", True, LEVELED, entry(by_level, "-S*R2"), entry(bootstrap.by_level, "-S*R2")),
    Figure("ties", None, ("uncertainty",), metrics.share_of_ties, column=False),
)
AMBIGUITY = (
    Figure("spearman", True, DESCRIBED, metrics.spearman, bootstrap.spearman),
    Figure(
        "partial_spearman_given_length",
        True,
        (*DESCRIBED, "words"),
        metrics.partial_spearman,
        bootstrap.partial_spearman,
    ),
    recall("R@1_described", "relevant_rank", 1),
)
RECALL = (
    *(recall(f"{d} R@{k}", f"{d}_rank", k) for d in DIRECTIONS for k in (1, 5, 10)),
    Figure("RSUM", True, ("t2i_rank", "i2t_rank"), metrics.recall_sum),
)
RELEVANCE = (
    *(recall(f"R@{k}", "relevant_rank", k) for k in (1, 5, 10)),
    Figure("mAP@R", True, ("ap_at_r",), lambda precision: float(np.mean(precision)), bootstrap.mean),
)
SWEEP = tuple(  # S is easily had at 10 levels
    Figure(f"{name}@{k}", name != "S", RANKED, entry(partial(by_level, levels=k), name), queries=k)
    for name in ("S", "-S*R2")
    for k in (5, 10, 20, 50)
)
AURC, AUROC = (  # which modality's uncertainty predicts the errors
    tuple(
        Figure(f"{d} {name} by {modality}", name == "AUROC", (f"{d}_correct", f"{d}_{field}"), function)
        for d in DIRECTIONS
        for modality, field in (("text", "uncertainty"), ("image", "image_uncertainty"))
    )
    for name, function in (("AURC", entry(metrics.aurc, "AURC")), ("AUROC", metrics.auroc))
)
HIERARCHY = (
    Figure("falling", True, ("uncertainty", "chains"), metrics.share_falling),
    Figure("tau", True, ("uncertainty", "chains"), metrics.mean_tau),
)


@dataclass(frozen=True)
class Section:
    """Figures of one view, under one key of the metrics and in one table: of the comparison or the details, with intervals or without."""

    key: str
    title: str
    view: str
    figures: tuple
    compared: bool = False
    resampled: bool = False

    def measure(self, view):
        """Those of its figures that are known: {name: float or None}."""
        return {figure.name: figure.of(view) for figure in self.figures if figure.is_known(view)}


FOLDS = Section("recall_folds", "recall, mean over the folds", "folds", RECALL)
SECTIONS = (
    *(Section(d, title, d, RETRIEVAL, True, True) for d, title in DIRECTIONS.items()),
    Section("ambiguity", "exact ambiguity", "known t2i", AMBIGUITY, True, True),
    Section("recall", "recall", "both", RECALL),
    FOLDS,
    *(
        Section(f"relevance_{d}", f"{DIRECTIONS[d]}, all right answers", f"known {d}", RELEVANCE, resampled=True)
        for d in DIRECTIONS
    ),
    *(Section(f"sweep_{d}", f"{DIRECTIONS[d]}, 5 to 50 levels", d, SWEEP) for d in DIRECTIONS),
    *(
        Section(f"image_{d}", f"{DIRECTIONS[d]}, by the image's uncertainty", f"image {d}", RETRIEVAL)
        for d in DIRECTIONS
    ),
    Section("asymmetry", "asymmetry: AURC by whose uncertainty", "both", AURC),
    Section("asymmetry", "asymmetry: AUROC by whose uncertainty", "both", AUROC),
)


def hierarchy(stem):
    """The section of a file of caption chains."""
    return Section(f"hierarchy {stem}", f"hierarchy {stem}: from general to specific", "chains", HIERARCHY)


def views_of(answers, levels):
    """What figures are functions of.

    Args: answers: {"t2i", "i2t"}, as `scorers.answer` gives them. levels: K.
    Returns: {view: {field: array, "levels": K}}: "t2i" and "i2t"; "known t2i", ..., of the queries whose right answers were looked into;
        "image t2i", ..., whose uncertainty is the image's; "both": fields <direction>_<field>.
    """
    views = {d: fields | {"levels": levels, "correct": fields["rank"] == 1} for d, fields in answers.items()}
    both = {f"{d}_{field}": values for d in answers for field, values in views[d].items()}
    known = {f"known {d}": only_annotated(fields) for d, fields in answers.items()}
    image = {
        f"image {d}": fields | {"uncertainty": fields["image_uncertainty"]}
        for d, fields in views.items()
        if "image_uncertainty" in fields
    }
    return views | known | image | {"both": both}


def only_annotated(fields):
    """The answers to the queries whose right answers were looked into; all where it is not said which."""
    return {field: values[fields["annotated"]] for field, values in fields.items()} if "annotated" in fields else fields


def measure(answers, levels):
    """All figures. Args: as for `views_of`. Returns: {section key: {figure name: float or None}}."""
    views, found = views_of(answers, levels), {}
    for section in SECTIONS:
        if values := section.measure(views.get(section.view, {})):
            found.setdefault(section.key, {}).update(values)
    return found


def measure_resamples(answers, levels, resamples):
    """The figures that have an interval, for every resample of the queries: {section key: {figure name: (resamples,) array}}; {} for none."""
    views, found = views_of(answers, levels), {}
    for section in SECTIONS:
        view = views.get(section.view, {})
        figures = [figure for figure in section.figures if figure.is_known(view) and figure.more_is_better is not None]
        if section.resampled and figures and resamples:
            counts = bootstrap.resample(len(view[figures[0].fields[0]]), resamples)
            found[section.key] = {figure.name: figure.of_resamples(view, counts) for figure in figures}
    return found
