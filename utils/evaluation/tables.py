"""Tables of results: on the screen, as markdown and as CSV.

Results are {Row: [Results, one per seed]}. A table is {Figure: {Row: (mean, std) over seeds}}. A
mean is None where the metric is undefined, and NaN where it does not apply; the standard deviation
of a single seed is None.
"""

import csv
import io

import numpy as np

from utils.evaluation.bootstrap import Estimate
from utils.evaluation.figures import DIRECTIONS, SECTIONS, guarantees, hierarchy
from utils.evaluation.scorers import PUBLISHED
from utils.evaluation.training_free import TRAINING_FREE

CSV_COLUMNS = (
    "dataset",
    "split",
    "section",
    "method",
    "score",
    "recipe",
    "seed",
    "metric",
    "value",
)
MOST_BEST = 3  # rows that may share the best value of a column and be bold
WITHOUT_TRAINING = "*without training*"
TRAINED = "*trained heads*"
DASH = "A dash: undefined, or it does not apply."
COMPARED = [section for section in SECTIONS if section.compared]
DETAILED = [section for section in SECTIONS if not section.compared]
NOTE = """The intervals are of the mean over seeds, and hold for other images and other seeds: they
add the variance over resampled images, each with all its captions, and the variance over seeds
(Student's t). With a single seed they are the bootstrap's over images, and hold for this seed only;
then those of S, R2 and -S*R2 lie towards the worse side and may not contain the metric itself,
since a resample is noisier than the sample. No interval is corrected for the number of
comparisons."""

KEPT = """Answers are kept up to a threshold of uncertainty. It is chosen on half of the images so
that, with confidence {:g}, the share of wrong answers among those kept is at most the number in the
column's name. Coverage (the share of answers that are kept) and error (the share of these that are
wrong) are measured on the other half. If no threshold passes the test in a seed, its coverage
counts as 0, and the mean threshold and error are undefined. With more images, one might pass.

The guarantee holds for captions drawn like the data set's, and for one row, k and risk that were
chosen beforehand. If you pick the row with the largest coverage from the table, you have no
guarantee; so nothing is bold."""


# Names of rows, and cells.


def row_label(row, score=PUBLISHED):
    """The printed name of a Row, such as "pfe" or "probvlm, frozen score".

    Args:
        score: what ranks in the whole table, which the names then leave out.
    """
    is_named = row.score not in (PUBLISHED, score)
    return f"{row.method}, {row.score} score" if is_named else row.method


def labels_of(results):
    """The printed names of rows: {Row: name}. A score that all trained heads share is left out."""
    scores = {row.score for row, runs in results.items() if runs[0].needs == "training"}
    shared_score = scores.pop() if len(scores) == 1 else PUBLISHED
    return {row: row_label(row, shared_score) for row in results}


def recipe_label(config):
    """How a head was trained, "small, 10 epochs", by the config of its results; "" if unknown."""
    if "recipe" not in config or "epochs" not in config:
        return ""
    epochs = config["epochs"]
    planned = config.get("planned_epochs")
    if planned:
        return f"{config['recipe']}, {epochs} of {planned} epochs"
    return f"{config['recipe']}, {epochs} {'epoch' if epochs == 1 else 'epochs'}"


def recipes_of(results):
    """How the rows were trained: {label: [Row, ...]}, without rows that are not trained."""
    recipes = {}
    for row, runs in results.items():
        label = recipe_label(runs[0].content.get("config") or {})
        if label:
            recipes.setdefault(label, []).append(row)
    return recipes


def recipe_title(results):
    """What a title says of the training, such as "recipe small, 10 epochs"; "" if unknown."""
    recipes = recipes_of(results)
    if not recipes:
        return ""
    if len(recipes) == 1:
        return f"recipe {next(iter(recipes))}"
    parts = []
    for label, rows in recipes.items():
        methods = dict.fromkeys(row.method for row in rows)
        parts.append(f"{', '.join(methods)}: {label}")
    return f"recipes {'; '.join(parts)}"


def seeds_title(seeds):
    """What a title says of the seeds: "seed 0" or "seeds 0, 1, 2"."""
    return f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"


def number(mean, std=None, form=".3f"):
    """A metric as text: "0.613", or "0.613 ± 0.004"; "-" if it is undefined (None, NaN)."""
    if not is_number(mean):
        return "-"
    if std is None:
        return f"{mean:{form}}"
    return f"{mean:{form}} ± {std:{form}}"


def interval_text(estimate, form=".3f"):
    """The 95 % interval of an Estimate as text, " [0.388, 0.412]"; "" if undefined."""
    limits = estimate.interval()
    if limits is None:
        return ""
    low, high = limits
    return f" [{low:{form}}, {high:{form}}]"


def best_mean(figure, cells):
    """The best mean of a column {Row: (mean, std)}; None if none is defined."""
    means = [mean for mean, _ in cells.values() if is_number(mean)]
    if figure.more_is_better:
        return max(means, default=None)
    return min(means, default=None)


def is_best(figure, row, cells):
    """Whether a row's mean, as it is printed, is the best of a column {Row: (mean, std)}.

    No row is best if more than MOST_BEST rows share the best value, or if the best value of a
    metric of which more is better is 0.
    """
    best = best_mean(figure, cells)
    sharing = sum(number(mean) == number(best) for mean, _ in cells.values())
    is_nothing = figure.more_is_better and best == 0
    mean, _ = cells[row]
    return number(mean) == number(best) and sharing <= MOST_BEST and not is_nothing


def is_number(mean):
    return mean is not None and not np.isnan(mean)


def _plain_cell(section, figure, row, cells):
    return number(*cells[row], form=figure.form)


def _bold_cell(section, figure, row, cells):
    """The text of a cell, in bold if it is the best of its column."""
    text = _plain_cell(section, figure, row, cells)
    has_best = figure.bold and figure.more_is_better is not None and len(cells) > 1
    return f"**{text}**" if has_best and is_best(figure, row, cells) else text


# From results to tables.


def tables_of(results, sections=COMPARED):
    """{Section: table}, without metrics that no row has."""
    tables = {}
    for section in sections:
        rows = {}
        for row, runs in results.items():
            if section.key in runs[0].content["metrics"]:
                rows[row] = runs
        table = {}
        for figure in section.figures:
            cells = {row: mean_and_std(runs, section, figure) for row, runs in rows.items()}
            if figure.column and any(is_number(mean) for mean, _ in cells.values()):
                table[figure] = cells
        if table:
            tables[section] = table
    return tables


def mean_and_std(runs, section, figure):
    """The mean of a metric over seeds and its standard deviation, None for a single seed."""
    values = [run.content["metrics"][section.key].get(figure.name, np.nan) for run in runs]
    return over_seeds(values)


def over_seeds(values):
    """The mean of the values of several seeds and their standard deviation, or (None, None)."""
    if None in values:
        return None, None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), std


def estimate_of(runs, section, figure):
    """The Estimate of a metric over seeds; None if it is undefined or has no resamples."""
    if figure.name not in runs[0].draws.get(section.key, {}):
        return None
    values = [run.content["metrics"][section.key][figure.name] for run in runs]
    if None in values:
        return None
    return Estimate.over_seeds(values, [run.draws[section.key][figure.name] for run in runs])


def risk_settings(results):
    """The arguments of `guarantees` that results were evaluated with, or None."""
    for runs in results.values():
        for run in runs:
            if "risk" in run.content:
                return run.content["risk"]
    return None


def risk_sections(results):
    """The sections of selective retrieval that results have."""
    settings = risk_settings(results)
    return guarantees(**settings) if settings else []


# The files of a results folder.


def all_texts(results, title):
    """The texts of a results folder: {file name: text}."""
    hierarchies = [hierarchy(name) for name in names_of_chains(results)]
    compared = tables_of(results)
    detailed = tables_of(results, [*DETAILED, *hierarchies])
    selective = tables_of(results, risk_sections(results))
    return {
        "comparison.md": f"{markdown(compared, results, has_needs=True)}\n{DASH}\n",
        "t2i.md": markdown(short_table(results), results, has_needs=True),
        "risk.md": risk_text(results),
        "details.md": markdown(detailed, results) + interval_tables(results),
        "comparison.csv": comma_separated({**compared, **detailed, **selective}, results),
        "report.txt": f"{title}\n\n{screen(results)}\n",
    }


def names_of_chains(results):
    """The names of the files of caption chains that results have, in order."""
    names = {}
    for runs in results.values():
        names.update(runs[0].content.get("depth", {}))
    return list(names)


def suffix_of(results):
    """What the title of every table says of the training: ", small, 10 epochs"."""
    recipes = recipes_of(results)
    if len(recipes) > 1:
        return ", several recipes"
    return "".join(f", {label}" for label in recipes)


def short_table(results):
    """The text-to-image comparison. With risks, their coverage takes the place of S, R2, -S*R2."""
    section, *_ = COMPARED
    table = tables_of(results, [section]).get(section)
    if table is None:
        return {}
    coverage = {}
    first_risk_section = risk_sections(results)[:1]  # text-to-image, at the first k
    for risk_table in tables_of(results, first_risk_section).values():
        coverage = {f: cells for f, cells in risk_table.items() if f.name.startswith("coverage")}
    if coverage:
        table = {f: cells for f, cells in table.items() if f.name not in ("S", "R2", "-S*R2")}
    rows = next(iter(table.values()))
    not_applicable = dict.fromkeys(rows, (np.nan, None))
    for figure, cells in coverage.items():
        table[figure] = {**not_applicable, **cells}
    return {section: table}


def risk_text(results):
    """Coverage, error and threshold at each risk as markdown; "" without an uncertainty."""
    tables = tables_of(results, risk_sections(results))
    if not tables:
        return ""
    head = KEPT.format(risk_settings(results)["confidence"])
    return f"{head}\n\n{markdown(tables, results, has_needs=True)}"


def interval_tables(results):
    """The comparison with 95 % intervals as markdown; "" without resamples."""
    results = {row: runs for row, runs in results.items() if runs[0].draws}
    if not results:
        return ""

    def with_interval(section, figure, row, cells):
        mean, _ = cells[row]
        estimate = estimate_of(results[row], section, figure)
        return number(mean) + (interval_text(estimate) if estimate is not None else "")

    text = markdown(tables_of(results), results, with_interval, suffix=", 95 % interval")
    return f"\n{text}\n{NOTE}\n"


def comma_separated(tables, results):
    """Tables as tidy CSV, one value per line.

    "seed" is a seed, or "mean" or "std" over the seeds, or "low" or "high", the ends of the 95 %
    interval if there is one.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for section, table in tables.items():
        for row in next(iter(table.values())):
            runs = results[row]
            config = runs[0].content.get("config") or {}
            facts = [config.get("dataset", ""), config.get("split", ""), section.key, *row]
            facts.append(config.get("recipe", ""))
            for figure in table:
                for seed, value in _values_over_seeds(runs, section, figure):
                    writer.writerow([*facts, seed, figure.name, repr(value)])
    return file.getvalue()


def _values_over_seeds(runs, section, figure):
    """Yield (seed, value) of a metric: of every seed, then "mean", "std", "low" and "high"."""
    for run in runs:
        value = run.content["metrics"][section.key].get(figure.name)
        if is_number(value):
            yield (run.content.get("config") or {}).get("seed"), value
    mean, std = mean_and_std(runs, section, figure)
    estimate = estimate_of(runs, section, figure)
    low, high = (estimate and estimate.interval()) or (None, None)
    for name, value in (("mean", mean), ("std", std), ("low", low), ("high", high)):
        if is_number(value):
            yield name, value


def differences(results):
    """How two methods, both resampled, differ over the same queries, as text.

    One table per section and one line per metric: both methods, their difference (first - second),
    its 95 % interval and its p-value. With one seed, the p-value is over images and says nothing of
    other seeds.
    """
    labels = [row_label(row) for row in results]
    p_title = _p_value_title(results)
    parts = []
    for section in COMPARED:
        if not all(section.key in runs[0].draws for runs in results.values()):
            continue
        lines = []
        for figure in section.figures:
            line = _difference_line(results, section, figure)
            if figure.column and line is not None:
                lines.append(line)
        if lines:
            header = [section.title, *labels, "difference", "interval", p_title]
            parts.append(text_table(header, lines))
    return "\n\n".join(parts)


def _p_value_title(results):
    """The title of the column of p-values."""
    for row, runs in results.items():
        if len(runs) == 1 and row.method not in TRAINING_FREE:
            return "p over images, this seed"
    return "p"


def _difference_line(results, section, figure):
    """The cells of one metric of two methods, or None if one of them does not have it."""
    means = []
    estimates = []
    for runs in results.values():
        if figure.name not in runs[0].draws.get(section.key, {}):
            return None
        mean, _ = mean_and_std(runs, section, figure)
        means.append(number(mean))
        estimates.append(estimate_of(runs, section, figure))
    line = [figure.name, *means]
    if None in estimates:
        return [*line, "-", "", ""]
    first, second = estimates
    difference = first - second
    limits = interval_text(difference, "+.3f").strip()
    if not limits:
        return [*line, "-", "", ""]
    return [*line, f"{difference.mean:+.3f}", limits, f"{difference.p_value():.3f}"]


def screen(results):
    """What eval.py prints: recall by level, the comparison, the first risk table and the ladder."""
    parts = [_level_text(results, direction) for direction in DIRECTIONS]
    tables = {**tables_of(results), **tables_of(results, risk_sections(results)[:1])}
    for section, table in tables.items():
        header, *rows = _text_rows(section, table, results, _plain_cell, has_needs=True)
        parts.append(f"{section.title}{suffix_of(results)}\n{text_table(header, rows)}")
    ladder = _ladder_text(results)
    if ladder:
        parts.append(ladder)
    return "\n\n".join(parts)


def _level_text(results, direction):
    """Recall by level as text, mean over seeds."""
    labels = labels_of(results)
    rows = []
    for row, runs in results.items():
        if runs[0].content.get(direction):
            recall_of_seeds = np.array([run.content[direction] for run in runs], dtype=float)
            recall = recall_of_seeds.mean(axis=0)
            rows.append([labels[row], *(number(value, form=".2f") for value in recall)])
    header = ["", *map(str, range(1, len(rows[0])))]
    title = f"{DIRECTIONS[direction]}: R@1 by uncertainty level"
    return f"{title}, from the most certain queries (1) to the least\n{text_table(header, rows)}"


def _ladder_text(results):
    """The uncertainty of the prompt ladder as text, mean over seeds; "" without a ladder."""
    labels = labels_of(results)
    columns = {}
    prompts = []
    for row, runs in results.items():
        is_second_row = labels[row] != row.method  # it has the same uncertainty
        if is_second_row or not runs[0].content.get("ladder"):
            continue
        ladders = [run.content["ladder"] for run in runs]
        prompts = [step["prompt"] for step in ladders[0]]
        values = [[step["uncertainty"] for step in ladder] for ladder in ladders]
        columns[labels[row]] = np.mean(values, axis=0)
    if not columns:
        return ""
    rows = []
    for number_of_prompt, prompt in enumerate(prompts):
        values = [f"{column[number_of_prompt]:.4e}" for column in columns.values()]
        rows.append([prompt, *values])
    title = "uncertainty of the prompt ladder, mean over seeds"
    return f"{title}\n{text_table(['', *columns], rows)}"


# From tables to text.


def _text_rows(section, table, results, cell, has_needs):
    """The lines of a table as lists of strings, header first.

    Args:
        cell: function of (section, figure, row, cells of the figure) that returns a string.
        has_needs: whether the last column is what the uncertainty needs besides the text.
    """
    labels = labels_of(results)
    header = ["", *(figure.name for figure in table)]
    if has_needs:
        header.append("needs")
    lines = [header]
    for row in next(iter(table.values())):
        line = [labels[row]]
        for figure, cells in table.items():
            line.append(cell(section, figure, row, cells))
        if has_needs:
            line.append(results[row][0].needs)
        lines.append(line)
    return lines


def markdown(tables, results, cell=_bold_cell, suffix="", has_needs=False):
    """Tables, as `tables_of` returns them, as markdown, the best of every column in bold."""
    parts = []
    for section, table in tables.items():
        header, *rows = _text_rows(section, table, results, cell, has_needs)
        header[0] = section.title + suffix_of(results) + suffix
        if has_needs:
            rows = _in_blocks(rows)
        parts.append(markdown_table([header, *rows], words=int(has_needs)))
    return "\n".join(parts)


def _in_blocks(rows):
    """Lines of a table whose last cell is what a row needs, with a title above each kind."""
    blocks = {WITHOUT_TRAINING: [], TRAINED: []}
    for row in rows:
        blocks[TRAINED if row[-1] == "training" else WITHOUT_TRAINING].append(row)
    if not all(blocks.values()):
        return rows
    lines = []
    for title, block in blocks.items():
        lines += [[title, *[""] * (len(block[0]) - 1)], *block]
    return lines


def markdown_table(rows, words=0):
    """Rows of strings, header first, as markdown.

    Args:
        words: how many of the last columns are text; the first is, too. All others are numbers.
    """
    columns = len(rows[0])
    header, *rows = [f"| {' | '.join(row)} |\n" for row in rows]
    alignment = "|---|" + "---:|" * (columns - 1 - words) + "---|" * words
    return "".join([header, f"{alignment}\n", *rows])


def text_table(header, rows):
    """Aligned columns of strings, the first to the left and the others to the right."""
    columns = zip(header, *rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    rule = ["-" * width for width in widths]
    lines = []
    for row in [header, rule, *rows]:
        first, *others = row
        cells = [first.ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def answers_text(answers):
    """Answers about texts as text.

    Args:
        answers: {title: [dict of plain types, ...]}, with the same keys in every dict.
    """
    parts = []
    for title, rows in answers.items():
        lines = []
        for row in rows:
            lines.append([_answer_cell(key, value) for key, value in row.items()])
        parts.append(f"{title}\n{text_table(list(rows[0]), lines)}")
    return "\n\n".join(parts)


def _answer_cell(key, value):
    if isinstance(value, float):
        return f"{value:.1f}" if key == "percentile" else f"{value:.4e}"
    if isinstance(value, list):
        return ", ".join(value)
    return str(value)
