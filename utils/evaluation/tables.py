"""Results in, tables that a person can read out: on the screen, as markdown and as CSV.

Results are {row name: [Results, one a seed]}. A table is {Figure: {row name: (mean, deviation) over seeds}}: None where
undefined, nan where a figure does not apply; the deviation of a single seed is None.
"""

import csv
import io

import numpy as np

from utils.evaluation.bootstrap import interval, over_seeds, p_value
from utils.evaluation.figures import DIRECTIONS, SECTIONS, guarantees, hierarchy
from utils.evaluation.scorers import BASELINES, BESIDE

COMPARED = [section for section in SECTIONS if section.compared]
NOTE = """Resampled: images, each with all its captions, and, of several seeds, the seeds; the interval is of the mean
over seeds. Three seeds tell little of their variance: it is understated by a third. A resample is noisier than the
sample: intervals of S, R2 and -S*R2 lie towards the worse side and may leave out the figure itself."""

KEPT = """Answers are kept up to a threshold of uncertainty, chosen on half of the images so that at most a share of
0.1, ... of those kept is wrong, with {:.0%} confidence. Coverage (the share kept) and error (the share of these that is
wrong) are measured on the other half. Coverage 0, threshold undefined: none qualifies, or not of every seed."""


def tables_of(results, sections=COMPARED):
    """{Section: table}, without figures that no row has."""
    tables = {}
    for section in sections:
        rows = {name: runs for name, runs in results.items() if section.key in runs[0].content["metrics"]}
        for figure in section.figures:
            cells = {name: _over_seeds(runs, section, figure) for name, runs in rows.items()}
            if figure.column and any(map(_is_defined, cells.values())):
                tables.setdefault(section, {})[figure] = cells
    return tables


def _over_seeds(runs, section, figure):
    values = [run.content["metrics"][section.key].get(figure.name, np.nan) for run in runs]
    if None in values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _is_defined(cell):
    return cell[0] is not None and not np.isnan(cell[0])


def draws_of(runs, section, figure, side=0):
    """A figure in every resample, averaged over the seeds drawn; None where it was not resampled."""
    if figure.name not in runs[0].draws.get(section.key, {}):
        return None
    return over_seeds([run.draws[section.key][figure.name] for run in runs], side)


def paired_draws(runs, others, section, figure):
    """A figure's difference of two methods in resamples of both, of seeds drawn for each; None without draws."""
    draws = [draws_of(of_one, section, figure, side) for side, of_one in enumerate((runs, others))]
    return None if any(of_one is None for of_one in draws) else draws[0] - draws[1]


def between(draws, form=".3f"):
    """The 95 % interval of a figure's draws as text, " [0.388, 0.412]"; "" where undefined."""
    limits = interval(draws)
    return f" [{limits[0]:{form}}, {limits[1]:{form}}]" if limits else ""


def number(mean, deviation=None, form=".3f"):
    """A figure as text: "0.613", with a deviation "0.613 ± 0.004"; "undefined" for None, "-" for nan."""
    if mean is None:
        return "undefined"
    if np.isnan(mean):
        return "-"
    return f"{mean:{form}}" + ("" if deviation is None else f" ± {deviation:{form}}")


def write_all(results, title):
    """The texts of a results folder: {file name: text}."""
    stems = dict.fromkeys(stem for runs in results.values() for stem in runs[0].content.get("depth", {}))
    compared, needs = tables_of(results), needs_of(results)
    detailed = tables_of(results, [*(section for section in SECTIONS if not section.compared), *map(hierarchy, stems)])
    return {
        "comparison.md": markdown(compared, needs=needs),
        "t2i.md": markdown(in_short(results), needs=needs),
        "risk.md": selective(results),
        "details.md": markdown(detailed) + intervals(results),
        "comparison.csv": comma_separated(compared | detailed | tables_of(results, selections(results))),
        "report.txt": f"{title}\n\n{screen(results)}\n",
    }


def selections(results):
    """The sections of selective retrieval that results have, that of the first direction and rank first."""
    given = _given(results)
    return guarantees(**given) if given else ()


def _given(results):
    """The risks, the confidence and the ranks that results were evaluated with, or None."""
    return next((run.content["risk"] for runs in results.values() for run in runs if "risk" in run.content), None)


def in_short(results):
    """The table of text-to-image, with what is kept at each risk in place of figures of levels: {Section: table}."""
    kept = next(iter(tables_of(results, selections(results)[:1]).values()), {})
    short = {}
    for section, table in tables_of(results, [section for section in COMPARED if section.key == "t2i"]).items():
        none = dict.fromkeys(next(iter(table.values())), (np.nan, None))
        short[section] = {f: cells for f, cells in table.items() if not kept or "recall_by_level" not in f.fields}
        short[section] |= {f: none | cells for f, cells in kept.items() if f.more_is_better}
    return short


def selective(results):
    """What is kept at each risk, and what of it is wrong, as markdown; "" without an uncertainty."""
    tables = tables_of(results, selections(results))
    head = KEPT.format(_given(results)["confidence"]) if tables else ""
    return head and f"{head}\n\n{markdown(tables, needs=needs_of(results))}"


def needs_of(results):
    """What the uncertainty of each row takes beside the text: {row name: str}."""
    return {name: runs[0].needs for name, runs in results.items()}


def _plain(section, figure, name, cells):
    return number(*cells[name], form=figure.form)


def _bold(section, figure, name, cells):
    text, is_compared = _plain(section, figure, name, cells), len(cells) > 1 and figure.more_is_better is not None
    return f"**{text}**" if is_compared and is_best(figure, name, cells) else text


def is_best(figure, name, cells):
    """Whether a row's mean, as it is printed, is the best of its column {row name: (mean, deviation)}."""
    best = (max if figure.more_is_better else min)(cell[0] for cell in cells.values() if _is_defined(cell))
    return number(cells[name][0]) == number(best)


def _rows(section, table, text, needs=None):
    """A table's rows of strings, header first but without the first cell; with `needs_of`, these are the last column.

    Args: text: function (section, figure, row name, cells).
    """
    rows = [["", *(figure.name for figure in table)]]
    for name in next(iter(table.values())):
        rows.append([name, *(text(section, figure, name, cells) for figure, cells in table.items())])
    return [[*row, needs.get(row[0], "needs")] for row in rows] if needs else rows


def markdown(tables, text=_bold, suffix="", needs=None):
    """Tables, as `tables_of` gives them, as markdown, the best figure of every column in bold."""
    parts = []
    for section, table in tables.items():
        (_, *header), *rows = _rows(section, table, text, needs)
        parts.append(markdown_table([[section.title + suffix, *header], *rows], words=1 if needs else 0))
    return "\n".join(parts)


def markdown_table(rows, words=0):
    """Rows of strings, header first, as markdown; numbers, but for the first column and so many last ones."""
    lines = [f"| {' | '.join(row)} |\n" for row in rows]
    alignment = "|---|" + "---:|" * (len(rows[0]) - 1 - words) + "---|" * words
    return "".join([lines[0], f"{alignment}\n", *lines[1:]])


def intervals(results):
    """The comparison with 95 % bootstrap intervals, as markdown; "" without draws."""
    results = {name: runs for name, runs in results.items() if runs[0].draws}

    def with_interval(section, figure, name, cells):
        draws, mean = draws_of(results[name], section, figure), cells[name][0]
        return number(mean) + ("" if draws is None or mean is None else between(draws))

    suffix = ", 95 % interval"
    return f"\n{markdown(tables_of(results), with_interval, suffix)}\n{NOTE}\n" if results else ""


def differences(results):
    """How two methods, both resampled, differ over the same queries: a table a section, a row a figure, as text.

    A row has both methods, difference first - second, its 95 % interval, p-value. Of a single seed, the p-value is over
    queries, and tells nothing of other seeds; of two, there is none.
    """
    parts, seeds = [], {len(runs) for name, runs in results.items() if name not in BASELINES}
    p_title = "p over queries, this seed" if 1 in seeds else "" if 2 in seeds else "p"
    for section in COMPARED:
        rows = []
        for figure in section.figures if all(section.key in runs[0].draws for runs in results.values()) else ():
            if figure.column:
                a, b = (_over_seeds(runs, section, figure)[0] for runs in results.values())
                difference = paired_draws(*results.values(), section, figure)
                if difference is None:  # a figure that one of them has not
                    continue
                limits, row = between(difference, "+.3f").strip(), ["undefined", "", ""]
                if limits and None not in (a, b):
                    p = f"{p_value(difference):.3f}" if p_title else ""
                    row = [f"{a - b:+.3f}", limits, p]
                rows.append([figure.name, number(a), number(b), *row])
        if rows:
            parts.append(text_table([section.title, *results, "difference", "interval", p_title], rows))
    return "\n\n".join(parts)


def comma_separated(tables):
    """Tables, as `tables_of` gives them, as CSV in long form."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "method", "figure", "mean", "standard deviation"])
    for section, table in tables.items():
        for name in next(iter(table.values())):
            for figure, cells in table.items():
                values = ["" if value is None or np.isnan(value) else repr(value) for value in cells[name]]
                writer.writerow([section.title, name, figure.name, *values])
    return file.getvalue()


def screen(results):
    """What eval.py prints: recall by level, the comparison, the ladder; means over seeds."""
    parts = []
    for direction, title in DIRECTIONS.items():
        rows = _means(results, lambda run, direction=direction: run.content.get(direction))
        rows = [[name, *(number(recall, form=".2f") for recall in mean)] for name, mean in rows.items()]
        title = f"{title}: R@1 by uncertainty level, from the most certain queries (1) to the least\n"
        parts.append(title + text_table(["", *map(str, range(1, len(rows[0])))], rows))
    for section, table in (tables_of(results) | tables_of(results, selections(results)[:1])).items():
        header, *rows = _rows(section, table, _plain, needs_of(results))
        parts.append(f"{section.title}\n{text_table(header, rows)}")
    once = {name: runs for name, runs in results.items() if not name.endswith(BESIDE)}
    ladders = _means(once, lambda run: [rung["uncertainty"] for rung in run.content.get("ladder", ())])
    if ladders:
        prompts = [rung["prompt"] for rung in results[next(iter(ladders))][0].content["ladder"]]
        rows = [[prompt, *(f"{mean[i]:.4e}" for mean in ladders.values())] for i, prompt in enumerate(prompts)]
        parts.append("uncertainty of the prompt ladder, mean over seeds\n" + text_table(["", *ladders], rows))
    return "\n\n".join(parts)


def _means(results, values_of):
    """{row name: the mean over seeds of a list}, where there is one."""
    known = {name: [values_of(run) for run in runs] for name, runs in results.items() if values_of(runs[0])}
    return {name: np.mean(values, axis=0) for name, values in known.items()}


def rows_as_tables(answers):
    """Answers about texts, {title: [dict of plain types, ...]} with the same keys in every dict, as text."""

    def cell(key, value):
        if isinstance(value, float):
            return f"{value:.1f}" if key == "percentile" else f"{value:.4e}"
        return ", ".join(value) if isinstance(value, list) else str(value)

    texts = {title: [[cell(*item) for item in row.items()] for row in rows] for title, rows in answers.items()}
    return "\n\n".join(f"{title}\n{text_table(list(answers[title][0]), rows)}" for title, rows in texts.items())


def text_table(header, rows):
    """Aligned columns of strings, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in lines)
