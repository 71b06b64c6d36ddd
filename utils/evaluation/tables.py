"""Results in, tables that a person can read out: on the screen, as markdown and as CSV."""

import csv
import io
from dataclasses import dataclass

import numpy as np

from utils.evaluation.bootstrap import interval, p_value
from utils.evaluation.figures import DIRECTIONS, SECTIONS, Section, hierarchy_section

COMPARED = [section for section in SECTIONS if section.compared]
NOTE = "A resample is noisier than the sample: intervals of S, R2 and -S*R2 lie towards the worse side and may leave out the figure itself."


@dataclass(frozen=True)
class Table:
    """The figures of a section: columns: {Figure: {row name: (mean, deviation) over seeds}}, rows: the names."""

    section: Section
    rows: list
    columns: dict


def compare(results, sections=COMPARED):
    """The figures of several methods, a row a method; figures that no method has, and sections without figures, are left out.

    Args: results: {row name: [Results, one a seed]}. sections: which.
    Returns: list of Tables.
    """
    tables = []
    for section in sections:
        rows = {name: runs for name, runs in results.items() if section.key in runs[0].metrics}
        columns = {f: {name: over_seeds(runs, section, f) for name, runs in rows.items()} for f in section.columns}
        columns = {figure: cells for figure, cells in columns.items() if any(map(_is_defined, cells.values()))}
        if columns:
            tables.append(Table(section, list(rows), columns))
    return tables


def details(results):
    """Everything that is not in the comparison, in the same form."""
    keys = dict.fromkeys(key for runs in results.values() for key in runs[0].metrics if key.startswith("hierarchy "))
    return compare(results, [s for s in SECTIONS if not s.compared] + [hierarchy_section(key) for key in keys])


def over_seeds(runs, section, figure):
    """Mean and sample standard deviation of a figure over seeds.

    Returns: (mean, deviation): nan where the figure does not apply, None where it is undefined; the deviation of one seed is None.
    """
    values = [run.metrics[section.key].get(figure.name, np.nan) for run in runs]
    if None in values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def draws_over_seeds(runs, section, figure):
    """A figure in every resample, averaged over seeds. Returns: (resamples,), or None where it was not resampled."""
    if figure.name not in runs[0].draws.get(section.key, {}):
        return None
    return np.mean([run.draws[section.key][figure.name] for run in runs], axis=0)


def _is_defined(cell):
    return cell[0] is not None and not np.isnan(cell[0])


def number(mean, deviation=None, digits=3):
    """A figure as text: "0.613", with a deviation "0.613 ± 0.004"; "undefined" for None, "-" for nan."""
    if mean is None:
        return "undefined"
    if np.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def markdown(tables):
    """Tables as markdown, the best figure of every column in bold. Returns: text."""
    return "\n\n".join(_markdown(t.section.title, t.rows, t.columns, _bold) for t in tables) + "\n"


def _bold(figure, cells):
    best = (max if figure.more_is_better else min)(cell[0] for cell in cells.values() if _is_defined(cell))
    is_best = {name: len(cells) > 1 and number(cell[0]) == number(best) for name, cell in cells.items()}
    return {name: f"**{number(*cell)}**" if is_best[name] else number(*cell) for name, cell in cells.items()}


def intervals(results):
    """The figures of the comparison with 95 % bootstrap intervals over queries; over several seeds, of their mean. Returns: markdown."""
    parts = []
    for table in compare(results):

        def with_interval(figure, cells, section=table.section):
            found = {}
            for name, (mean, _) in cells.items():
                draws = draws_over_seeds(results[name], section, figure)
                limits = None if draws is None or mean is None else interval(draws)
                found[name] = number(mean) + (f" [{number(limits[0])}, {number(limits[1])}]" if limits else "")
            return found

        rows = [name for name in table.rows if results[name][0].draws]
        parts.append(
            _markdown(f"{table.section.title}, 95 % interval over queries", rows, table.columns, with_interval)
        )
    return "\n" + "\n\n".join([*parts, NOTE]) + "\n"


def _markdown(title, rows, columns, texts_of):
    """A table. Args: rows: names. columns: {Figure: {row name: cell}}. texts_of: (figure, cells) -> {row name: text}."""
    texts = [texts_of(figure, cells) for figure, cells in columns.items()]
    lines = [
        [title, *(figure.name for figure in columns)],
        *([name, *(column[name] for column in texts)] for name in rows),
    ]
    lines = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([lines[0], "|---|" + "---:|" * len(columns), *lines[1:]])


def paired(results):
    """How two methods differ over the same queries.

    Args: results: {method: [Results, one a seed]}, two of them.
    Returns: text: a table a section, with a row a figure: both methods, difference first - second, its 95 % interval, p-value.
    """
    parts = []
    for section in COMPARED:
        rows = []
        for figure in section.columns:
            a, b = (draws_over_seeds(runs, section, figure) for runs in results.values())
            if a is None or b is None:
                continue
            means = [over_seeds(runs, section, figure)[0] for runs in results.values()]
            limits, p = interval(a - b), p_value(a - b)
            row = ["undefined", "", ""]
            if limits is not None and None not in means:
                row = [f"{means[0] - means[1]:+.3f}", f"[{limits[0]:+.3f}, {limits[1]:+.3f}]", f"{p:.3f}"]
            rows.append([figure.name, *map(number, means), *row])
        if rows:
            parts.append(text_table([section.title, *results, "difference", "interval", "p"], rows))
    return "\n\n".join(parts)


def comma_separated(tables):
    """Tables as CSV in long form: table, method, figure, mean, standard deviation. Returns: text."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "method", "figure", "mean", "standard deviation"])
    for table in tables:
        for name in table.rows:
            for figure, cells in table.columns.items():
                values = ["" if value is None or np.isnan(value) else repr(value) for value in cells[name]]
                writer.writerow([table.section.title, name, figure.name, *values])
    return file.getvalue()


def screen(results):
    """What eval.py prints: recall by level, the figures, the ladder; means over seeds. Returns: text."""
    parts = []
    for direction, title in DIRECTIONS.items():
        rows = {
            name: [run.content[direction] for run in runs]
            for name, runs in results.items()
            if direction in runs[0].content
        }
        rows = [[name, *(number(recall, digits=2) for recall in np.mean(runs, axis=0))] for name, runs in rows.items()]
        header = ["", *map(str, range(1, len(rows[0])))]
        caption = f"{title}: R@1 by uncertainty level, from the most certain queries (1) to the least"
        parts.append(f"{caption}\n{text_table(header, rows)}")
    for table in compare(results):
        rows = [[name, *(number(*cells[name]) for cells in table.columns.values())] for name in table.rows]
        parts.append(f"{table.section.title}\n{text_table(['', *(f.name for f in table.columns)], rows)}")
    ladders = {
        name: [run.content["ladder"] for run in runs] for name, runs in results.items() if "ladder" in runs[0].content
    }
    if ladders:
        rows = []
        for i, rung in enumerate(next(iter(ladders.values()))[0]):
            means = [np.mean([ladder[i]["uncertainty"] for ladder in runs]) for runs in ladders.values()]
            rows.append([rung["prompt"], *(f"{mean:.4e}" for mean in means)])
        parts.append("uncertainty of the prompt ladder, mean over seeds\n" + text_table(["", *ladders], rows))
    return "\n\n".join(parts)


def rows_as_tables(found):
    """What eval.py answers to questions about single texts, as a person reads it.

    Args: found: {title: [row of plain types, ...]}, every row with the same keys, the text first.
    Returns: text.
    """

    def cell(key, value):
        if isinstance(value, float):
            return f"{value:.1f}" if key == "percentile" else f"{value:.4e}"
        return ", ".join(value) if isinstance(value, list) else str(value)

    return "\n\n".join(
        f"{title}\n" + text_table(list(rows[0]), [[cell(*item) for item in row.items()] for row in rows])
        for title, rows in found.items()
    )


def text_table(header, rows):
    """Aligned columns, the first to the left and the others to the right. Args: header: strings; rows: lists of strings."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def index(title, command, texts, plots):
    """The README.md of a results folder: its tables and plots together.

    Args: title, command: what was evaluated, and how. texts: {file name: content}. plots: {file name of a PNG: caption}.
    Returns: markdown.
    """
    pictures = "\n\n".join(f"{caption}\n\n![{caption}]({name})" for name, caption in plots.items())
    head = f"Written by `{command}`; mean \u00b1 standard deviation over seeds, best in bold."
    tables = f"{texts['comparison.md']}\n{pictures}\n\n## Details\n\n{texts['details.md']}"
    return f"# {title}\n\n{head}\n\n{tables}\n## As on the screen\n\n```\n{texts['report.txt'].rstrip()}\n```\n"
