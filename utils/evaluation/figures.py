"""Every figure of an evaluation, a row each: result files, tables, bootstrap and comparison follow from FIGURES. A new figure is a new row."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from utils.evaluation import bootstrap, metrics

DIRECTIONS = {"t2i": "text-to-image", "i2t": "image-to-text"}


@dataclass(frozen=True)
class Figure:
    """One number, and what has to be known for it.

    Args:
        group: the figures that it stands among. name: its column. more_is_better: None if neither is better, then it is in no table.
        fields: the arrays of a section's answers that function takes, or "levels": their number; without one of them the figure is left out.
        function: (*fields) -> float, or None where undefined.
        resampled: (counts, *fields) -> (resamples,), the same for all resamples at once; without it function is called for each.
        column: whether tables show it. queries: it is left out if there are fewer.
    """

    group: str
    name: str
    more_is_better: bool | None
    fields: tuple
    function: Callable
    resampled: Callable | None = None
    column: bool = True
    queries: int = 1

    def applies(self, answers):
        """Whether some answers, {field: array}, have what it needs."""
        return all(field in answers for field in self.fields) and len(answers[self.fields[0]]) >= self.queries

    def of(self, answers):
        """Its value for some answers."""
        return self.function(*(answers[field] for field in self.fields))

    def of_resamples(self, answers, counts):
        """Its value in every resample. Args: counts (resamples, Q). Returns: (resamples,), nan where undefined."""
        if self.resampled:
            return self.resampled(counts, *(answers[field] for field in self.fields))
        return np.array([self.of(drawn(answers, count)) for count in counts], dtype=np.float64)


def drawn(answers, count):
    """The answers in which every query stands as often as it is drawn."""
    return {field: np.repeat(values, count) if np.ndim(values) else values for field, values in answers.items()}


def recall_at(group, name, field, k, **options):
    """The row of a share of queries, from a field of ranks."""
    return Figure(group, name, True, (field,), lambda rank: metrics.recall_at(rank, k), **options)


def entry(function, name):
    """A function that gives one entry of what another returns."""
    return lambda *arrays: function(*arrays)[name]


def by_level(figure, levels=None):
    """A function that gives a level statistic of (correct, uncertainty) at so many levels; None: they are its third argument."""
    return lambda *arrays: metrics.level_statistics(metrics.recall_by_level(*arrays, *([levels] if levels else [])))[
        figure
    ]


RANKED = ("correct", "uncertainty")
BY_WHOM = [
    (d, whose, field) for d in DIRECTIONS for whose, field in (("text", "uncertainty"), ("image", "image_uncertainty"))
]

FIGURES = (
    *(recall_at("retrieval", f"R@{k}", "rank", k, column=k == 1) for k in (1, 5, 10)),
    Figure("retrieval", "AURC", False, RANKED, entry(metrics.aurc, "AURC"), entry(bootstrap.aurc, "AURC")),
    Figure("retrieval", "E-AURC", False, RANKED, entry(metrics.aurc, "E-AURC"), entry(bootstrap.aurc, "E-AURC")),
    *(
        Figure("retrieval", s, s != "S", (*RANKED, "levels"), by_level(s), entry(bootstrap.level_statistics, s))
        for s in ("S", "R2", "-S*R2")
    ),
    Figure("retrieval", "ties", None, ("uncertainty",), metrics.share_of_ties),
    Figure("ambiguity", "spearman", True, ("uncertainty", "relevant"), metrics.spearman, bootstrap.spearman),
    Figure(
        "ambiguity",
        "partial_spearman_given_length",
        True,
        ("uncertainty", "relevant", "words"),
        metrics.partial_spearman,
        bootstrap.partial_spearman,
    ),
    recall_at("ambiguity", "R@1_described", "relevant_rank", 1),
    *(recall_at("recall", f"{d} R@{k}", f"{d}_rank", k) for d in DIRECTIONS for k in (1, 5, 10)),
    Figure("recall", "RSUM", True, ("t2i_rank", "i2t_rank"), metrics.recall_sum),
    *(recall_at("relevance", f"R@{k}", "relevant_rank", k) for k in (1, 5, 10)),
    Figure("relevance", "mAP@R", True, ("ap_at_r",), lambda precision: float(np.mean(precision)), bootstrap.mean),
    *(
        Figure("sweep", f"{s}@{k}", s != "S", RANKED, by_level(s, k), queries=k)
        for s in ("S", "-S*R2")  # S is easily had at 10 levels
        for k in (5, 10, 20, 50)
    ),
    *(
        Figure(
            "AURC by whom", f"{d} AURC by {whose}", False, (f"{d}_correct", f"{d}_{field}"), entry(metrics.aurc, "AURC")
        )
        for d, whose, field in BY_WHOM
    ),
    *(
        Figure("AUROC by whom", f"{d} AUROC by {whose}", True, (f"{d}_correct", f"{d}_{field}"), metrics.auroc)
        for d, whose, field in BY_WHOM
    ),
    Figure("hierarchy", "falling", True, ("uncertainty", "chains"), metrics.share_falling),
    Figure("hierarchy", "tau", True, ("uncertainty", "chains"), metrics.mean_tau),
)


@dataclass(frozen=True)
class Section:
    """Figures of the same answers: an entry of the metrics in a result file, and a table.

    Args:
        key: in the result file. title: of the table. group: of its figures. direction: of its answers, None for both.
        by_image: the queries are ranked by the image's uncertainty. annotated: only queries whose right answers were looked into.
        compared: whether it stands in the comparison; otherwise in the details. resampled: whether it is bootstrapped.
    """

    key: str
    title: str
    group: str
    direction: str | None = None
    by_image: bool = False
    annotated: bool = False
    compared: bool = False
    resampled: bool = False

    @property
    def columns(self):
        """The figures that its table shows."""
        return [f for f in FIGURES if f.group == self.group and f.column and f.more_is_better is not None]

    def select(self, answers, levels):
        """What its figures are made from. Args: answers: both directions'; levels: K. Returns: {field: array, "levels": K}."""
        answers = {d: fields | {"correct": fields["rank"] == 1} for d, fields in answers.items()}
        if self.direction is None:
            return {f"{d}_{field}": values for d, fields in answers.items() for field, values in fields.items()}
        fields = only_annotated(answers[self.direction]) if self.annotated else answers[self.direction]
        if self.by_image:
            fields = fields | {"uncertainty": fields["image_uncertainty"]} if "image_uncertainty" in fields else {}
        return fields | {"levels": levels}


FOLDS = Section(
    "recall_folds", "recall, mean over the folds", "recall"
)  # of several galleries: scorers.recall_in_folds
SECTIONS = (
    *(Section(d, title, "retrieval", d, compared=True, resampled=True) for d, title in DIRECTIONS.items()),
    Section("ambiguity", "exact ambiguity", "ambiguity", "t2i", annotated=True, compared=True, resampled=True),
    Section("recall", "recall", "recall"),
    FOLDS,
    *(
        Section(f"relevance_{d}", f"{title}, all right answers", "relevance", d, annotated=True, resampled=True)
        for d, title in DIRECTIONS.items()
    ),
    *(Section(f"sweep_{d}", f"{title}, 5 to 50 levels", "sweep", d) for d, title in DIRECTIONS.items()),
    *(
        Section(f"image_{d}", f"{title}, by the image's uncertainty", "retrieval", d, by_image=True)
        for d, title in DIRECTIONS.items()
    ),
    *(Section("asymmetry", f"asymmetry: {name} by whose uncertainty", f"{name} by whom") for name in ("AURC", "AUROC")),
)


def hierarchy_section(key):
    """The section of a file of caption chains, whose key is "hierarchy " and the file's stem."""
    return Section(key, f"{key}: from general to specific", "hierarchy")


def only_annotated(answers):
    """The answers to the queries whose right answers were looked into; all where it is not said which."""
    return {key: values[answers["annotated"]] for key, values in answers.items()} if "annotated" in answers else answers


def measure_group(group, answers):
    """All figures of a group that apply to some answers. Args: answers: {field: array}. Returns: {figure: float or None}."""
    return {f.name: f.of(answers) for f in FIGURES if f.group == group and f.applies(answers)}


def measure(answers, levels):
    """All figures of all sections.

    Args: answers: {"t2i", "i2t"}, as `scorers.answer` gives them. levels: K.
    Returns: {section key: {figure: float or None}}.
    """
    found = {}
    for section in SECTIONS:
        if section is not FOLDS and (values := measure_group(section.group, section.select(answers, levels))):
            found.setdefault(section.key, {}).update(values)
    return found


def measure_resamples(answers, levels, resamples):
    """The figures that have an interval, for every resample of the queries.

    Args: as for `measure`. resamples: how many, 0: none.
    Returns: {section key: {figure: (resamples,) array, nan where undefined}}.
    """
    found = {}
    for section in SECTIONS if resamples else ():
        selected = section.select(answers, levels)
        figures = [
            f for f in FIGURES if f.group == section.group and f.more_is_better is not None and f.applies(selected)
        ]
        if section.resampled and figures:
            counts = bootstrap.resample(len(selected["rank"]), resamples)
            found[section.key] = {figure.name: figure.of_resamples(selected, counts) for figure in figures}
    return found
