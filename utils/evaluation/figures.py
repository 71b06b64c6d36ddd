"""Every figure of an evaluation, one row each: result files, tables, intervals and comparisons follow from them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from utils.evaluation import bootstrap, metrics

DIRECTIONS = {"t2i": "text-to-image", "i2t": "image-to-text"}
TITLES = DIRECTIONS.items()


@dataclass(frozen=True)
class Figure:
    """A number, and what it is a function of.

    Args:
        name: its column. more_is_better: None if neither is better; then it has no interval.
        fields: of a view (`views_of`), what function takes; where one is missing, the figure is left out.
        function: (*fields) -> float, or None where undefined.
        resampled: (counts, *fields) -> (resamples,), the same of all resamples at once; None: function of each.
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

    def of_resamples(self, view, counts):
        """Its values (resamples,), nan where undefined. Args: counts: as `bootstrap.resample` gives them."""
        values = [view[field] for field in self.fields]
        if self.resampled:
            return self.resampled(counts, *values)
        drawn = ([np.repeat(v, count) if np.ndim(v) else v for v in values] for count in counts)
        return np.array([self.function(*values) for values in drawn], dtype=np.float64)


def recall(name, field, k, **options):
    """The row of a recall at k. Args: field: of ranks."""
    return Figure(name, True, (field,), partial(metrics.recall_at, k=k), **options)


def mean(values):
    """The mean of values (Q,)."""
    return float(np.mean(values))


def rsum(*ranks):
    """All recalls in per cent, summed."""
    return 100 * sum(metrics.recall_at(rank, k) for rank in ranks for k in (1, 5, 10))


def by_level(correct, uncertainty, levels):
    """`level_statistics` of `recall_by_level`."""
    return metrics.level_statistics(metrics.recall_by_level(correct, uncertainty, levels))


def entry(function, name):
    """The function that gives one entry of the dict that another gives."""
    return lambda *values, **options: function(*values, **options)[name]


RANKED = ("correct", "uncertainty")
LEVELED = (*RANKED, "levels")
DESCRIBED = ("uncertainty", "relevant")  # relevant: exact ambiguity, how many images a caption describes
GIVEN = (*DESCRIBED, "words")
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
    """Figures of a view, under one key of the metrics and in one table, of the comparison or else of the details."""

    key: str
    title: str
    view: str
    figures: tuple
    compared: bool = False
    resampled: bool = False

    def measure(self, view):
        """Those of its figures that are known: {name: float or None}."""
        return {f.name: f.function(*(view[field] for field in f.fields)) for f in self.figures if f.is_known(view)}


FOLDS = Section("recall_folds", "recall, mean over the folds", "folds", RECALL)
SECTIONS = (
    *(Section(d, title, d, RETRIEVAL, True, True) for d, title in TITLES),
    Section("ambiguity", "exact ambiguity", "known t2i", AMBIGUITY, True, True),
    Section("recall", "recall", "both", RECALL),
    FOLDS,
    *(Section(f"relevance_{d}", f"{t}, all right answers", f"known {d}", RELEVANCE, False, True) for d, t in TITLES),
    *(Section(f"cxc_{d}", f"{t}, all right answers of CxC", f"cxc {d}", ALL_RIGHT, False, True) for d, t in TITLES),
    *(Section(f"sweep_{d}", f"{t}, 5 to 50 levels", d, SWEEP) for d, t in TITLES),
    *(Section(f"image_{d}", f"{t}, by the image's uncertainty", f"image {d}", RETRIEVAL) for d, t in TITLES),
    Section("asymmetry", "asymmetry: AURC by whose uncertainty", "both", AURC),
    Section("asymmetry", "asymmetry: AUROC by whose uncertainty", "both", AUROC),
)


def hierarchy(stem):
    """The section of a file of caption chains."""
    return Section(f"hierarchy {stem}", f"hierarchy {stem}: from general to specific", "chains", HIERARCHY)


def views_of(answers, levels):
    """What figures are functions of.

    Args: answers: {"t2i", "i2t"}, as `scorers.answer` gives them. levels: K.
    Returns: {view: {field: array, "levels": K}}. Views: "t2i", "i2t"; "known t2i", ..., if their right answers were
        looked into; "cxc t2i", ..., the same of CxC; "image t2i", ..., whose uncertainty is the image's;
        "both": fields <direction>_<field>.
    """
    views = {}
    for d, fields in answers.items():
        nearest = fields.get("query", np.arange(len(fields["rank"])))
        fields = {"image": nearest} | fields  # the caption's, or the image asked: what is resampled
        cxc = {field.removeprefix("cxc_"): values for field, values in fields.items() if field.startswith("cxc_")}
        views[d] = fields | {"correct": fields["rank"] == 1, "levels": levels}
        views[f"known {d}"] = only_judged(fields)
        views[f"cxc {d}"] = only_judged(cxc | {"image": fields["image"]})
        if "image_uncertainty" in fields:
            views[f"image {d}"] = views[d] | {"uncertainty": fields["image_uncertainty"]}
    return views | {"both": {f"{d}_{field}": values for d in answers for field, values in views[d].items()}}


def only_judged(fields):
    """The answers to the queries whose right answers were looked into; none if nobody looked."""
    judged = np.asarray(fields.get("relevant", ())) > 0
    judged = judged & fields.get("annotated", True)  # of results from before, where it is not said by 0
    return {field: values[judged] for field, values in fields.items()} if judged.any() else {}


def measure(answers, levels):
    """All figures. Args: as for `views_of`. Returns: {section key: {figure name: float or None}}."""
    views, found = views_of(answers, levels), {}
    for section in SECTIONS:
        if values := section.measure(views.get(section.view, {})):
            found.setdefault(section.key, {}).update(values)
    return found


def measure_resamples(answers, levels, resamples):
    """The figures of resampled queries: {section key: {figure name: (resamples,)}}, nan: undefined; {} for none."""
    views, found = views_of(answers, levels), {}
    for section in SECTIONS:
        view = views.get(section.view, {})
        figures = [figure for figure in section.figures if figure.is_known(view) and figure.more_is_better is not None]
        if section.resampled and figures and resamples:
            counts = bootstrap.resample(view["image"], resamples)
            found[section.key] = {figure.name: figure.of_resamples(view, counts) for figure in figures}
    return found
