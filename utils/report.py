"""Results in, tables that a person can read out: on the screen, as markdown and as CSV.

    python -m utils.report README.md

renews the tables in a markdown file: what stands between <!-- FILE --> and <!-- end of FILE --> becomes the content of FILE, a path relative to
the current folder.
"""

import csv
import io
import re
import sys
from pathlib import Path

import numpy as np

from utils.bootstrap import interval, p_value

# The columns of a comparison: name -> whether more is better. They are read from result["metrics"]["t2i"] and ["i2t"].
RETRIEVAL = {"R@1": True, "AURC": False, "E-AURC": False, "S": False, "R2": True, "-S*R2": True}
AMBIGUITY = {"spearman": True, "partial_spearman_given_length": True, "R@1_described": True}
DIRECTIONS = {"t2i": "text-to-image", "i2t": "image-to-text"}
RECALL = {f"{direction} R@{k}": True for direction in DIRECTIONS for k in (1, 5, 10)} | {"RSUM": True}
RELEVANCE = {"R@1": True, "R@5": True, "R@10": True, "mAP@R": True}
SWEEP = {f"{figure}@{k}": figure != "S" for figure in ("S", "-S*R2") for k in (5, 10, 20, 50)}

# What stands in a comparison, and what stands behind it: title -> (key of result["metrics"], columns).
SECTIONS = {title: (key, RETRIEVAL) for key, title in DIRECTIONS.items()} | {
    "exact ambiguity": ("ambiguity", AMBIGUITY)
}
DETAILS = (
    {"recall": ("recall", RECALL), "recall, mean over the folds": ("recall_folds", RECALL)}
    | {f"{title}, all right answers": (f"relevance_{key}", RELEVANCE) for key, title in DIRECTIONS.items()}
    | {f"{title}, 5 to 50 levels": (f"sweep_{key}", SWEEP) for key, title in DIRECTIONS.items()}
    | {f"{title}, by the image's uncertainty": (f"image_{key}", RETRIEVAL) for key, title in DIRECTIONS.items()}
    | {
        f"asymmetry: {figure} by whose uncertainty": (
            "asymmetry",
            {f"{direction} {figure} by {modality}": more for direction in DIRECTIONS for modality in ("text", "image")},
        )
        for figure, more in (("AURC", False), ("AUROC", True))
    }
)
HIERARCHY = {"falling": True, "tau": True}


def number(mean, deviation=None, digits=3):
    """A figure as text: "0.613", with a deviation "0.613 ± 0.004"; "undefined" for None, "-" for a figure that does not apply (nan)."""
    if mean is None:
        return "undefined"
    if np.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def mean_and_deviation(values):
    """Mean and sample standard deviation over seeds.

    Args: values: floats, or None where undefined. Returns: (mean, deviation); deviation is None for a single value, both are if any is
    undefined.
    """
    if any(value is None for value in values):
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def compare(results, sections=None):
    """The figures of several methods, one row a method, mean and standard deviation over seeds.

    Args: results: {row name: list of results, one a seed}, results as eval.py writes them; a figure that is missing does not apply.
    sections: {section title: (key of result["metrics"], {column: whether more is better})}; those of the comparison unless told otherwise.
    Returns: {section title: (column names, {row name: [(mean, deviation), ...]}, [whether more is better, ...])}.
    """
    tables = {}
    for title, (key, columns) in (sections or SECTIONS).items():
        rows = {
            name: [mean_and_deviation([run["metrics"][key].get(column, np.nan) for run in runs]) for column in columns]
            for name, runs in results.items()
            if all(run["metrics"].get(key) for run in runs)
        }
        known = [
            i
            for i in range(len(columns))
            if any(cells[i] != (None, None) and not np.isnan(cells[i][0]) for cells in rows.values())
        ]
        if known:
            rows = {name: [cells[i] for i in known] for name, cells in rows.items()}
            tables[title] = ([list(columns)[i] for i in known], rows, [list(columns.values())[i] for i in known])
    return tables


def details(results):
    """Everything that is not in `compare`: in the same form."""
    keys = dict.fromkeys(
        key for runs in results.values() for run in runs for key in run["metrics"] if key.startswith("hierarchy ")
    )
    return compare(results, DETAILS | {f"{key}: from general to specific": (key, HIERARCHY) for key in keys})


def _mean_draws(draws, key, figure):
    """A figure in every resample, averaged over seeds. Args: draws: one dict a seed. Returns: (resamples,)."""
    return np.mean([run[key][figure] for run in draws], axis=0)


def intervals(results, draws):
    """The figures of `compare` with 95 % bootstrap intervals over queries, as markdown; over several seeds, of their mean.

    Args: results: as for `compare`. draws: {row name: [draws of the bootstrap, one a seed]}. Returns: text.
    """
    parts = []
    for title, (columns, rows, _) in compare(results).items():
        key = SECTIONS[title][0]
        lines = [
            f"| {title}, 95 % interval over queries | " + " | ".join(columns) + " |",
            "|---|" + "---:|" * len(columns),
        ]
        for name in (name for name in rows if name in draws):
            cells = []
            for column, (mean, _) in zip(columns, rows[name], strict=True):
                limits = interval(_mean_draws(draws[name], key, column)) if column in draws[name][0][key] else None
                cells.append(
                    number(mean)
                    + (f" [{number(limits[0])}, {number(limits[1])}]" if limits and mean is not None else "")
                )
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    note = "A resample is noisier than the sample: intervals of S, R2 and -S*R2 lie towards the worse side and may leave out the figure itself."
    return "\n" + "\n\n".join([*parts, note]) + "\n"


def paired(values, draws):
    """How two methods differ over the same queries.

    Args: values: {method: [result["metrics"], one a seed]}, two of them. draws: {method: [draws of the bootstrap, one a seed]}.
    Returns: text: a table a section, with a row a figure: both methods, difference first - second, its 95 % interval, p-value.
    """
    (a, values_a), (b, values_b) = values.items()
    parts = []
    for title, (key, columns) in SECTIONS.items():
        rows = []
        for column in columns if key in draws[a][0] and key in draws[b][0] else ():
            means = [mean_and_deviation([run[key][column] for run in runs])[0] for runs in (values_a, values_b)]
            difference = _mean_draws(draws[a], key, column) - _mean_draws(draws[b], key, column)
            limits, p = interval(difference), p_value(difference)
            if None in means or limits is None:
                rows.append([column, *map(number, means), "undefined", "", ""])
            else:
                rows.append(
                    [
                        column,
                        *map(number, means),
                        f"{means[0] - means[1]:+.3f}",
                        f"[{limits[0]:+.3f}, {limits[1]:+.3f}]",
                        f"{p:.3f}",
                    ]
                )
        if rows:
            parts.append(text_table([title, a, b, "difference", "interval", "p"], rows))
    return "\n\n".join(parts)


def rows_as_tables(found):
    """What eval.py answers to questions about single texts, as a person reads it.

    Args: found: {title: [row of plain types, ...]}, every row with the same keys, the text first. Returns: text.
    """

    def cell(key, value):
        if isinstance(value, float):
            return f"{value:.1f}" if key == "percentile" else f"{value:.4e}"
        return ", ".join(value) if isinstance(value, list) else str(value)

    return "\n\n".join(
        f"{title}\n" + text_table(list(rows[0]), [[cell(key, value) for key, value in row.items()] for row in rows])
        for title, rows in found.items()
    )


def index(title, command, texts, plots):
    """The README.md of a results folder: its tables and plots together.

    Args: title, command: what was evaluated, and how. texts: {file name: content}. plots: {file name of a PNG: caption}. Returns: markdown.
    """
    pictures = "\n\n".join(f"{caption}\n\n![{caption}]({name})" for name, caption in plots.items())
    tables = f"{texts['comparison.md']}\n{pictures}\n\n## Details\n\n{texts['details.md']}"
    levels = f"## As on the screen\n\n```\n{texts['report.txt'].rstrip()}\n```\n"
    return f"# {title}\n\nWritten by `{command}`; mean \u00b1 standard deviation over seeds, best in bold.\n\n{tables}\n{levels}"


def markdown(tables):
    """`compare`'s tables as markdown, the best figure of every column in bold. Returns: text."""
    parts = []
    for title, (columns, rows, more_is_better) in tables.items():
        best = [number(_best([cells[i][0] for cells in rows.values()], more)) for i, more in enumerate(more_is_better)]
        lines = [f"| {title} | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        for name, cells in rows.items():
            texts = [number(*cell) for cell in cells]
            texts = [
                f"**{text}**" if number(cell[0]) == top and len(rows) > 1 else text
                for text, cell, top in zip(texts, cells, best, strict=True)
            ]
            lines.append(f"| {name} | " + " | ".join(texts) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _best(means, more_is_better):
    """The best of some means; None and nan do not count."""
    defined = [mean for mean in means if mean is not None and not np.isnan(mean)]
    return (max if more_is_better else min)(defined) if defined else None


def comma_separated(tables):
    """`compare`'s tables as CSV in long form: table, method, figure, mean, standard deviation. Returns: text."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "method", "figure", "mean", "standard deviation"])
    for title, (columns, rows, _) in tables.items():
        for name, cells in rows.items():
            for column, (mean, deviation) in zip(columns, cells, strict=True):
                writer.writerow(
                    [
                        title,
                        name,
                        column,
                        *("" if value is None or np.isnan(value) else repr(value) for value in (mean, deviation)),
                    ]
                )
    return file.getvalue()


def screen(results, ladder=True):
    """What eval.py prints: recall by level, the figures, the ladder; means over seeds. Args: results: as for `compare`. Returns: text."""
    parts = []
    for key, title in DIRECTIONS.items():
        leveled = {
            name: np.mean([run[key] for run in runs], axis=0)
            for name, runs in results.items()
            if all(key in run for run in runs)
        }
        levels = len(next(iter(leveled.values())))
        rows = [[name, *(number(recall, digits=2) for recall in values)] for name, values in leveled.items()]
        parts.append(f"{title}: R@1 by uncertainty level, from the most certain queries (1) to the least\n")
        parts[-1] += text_table(["", *map(str, range(1, levels + 1))], rows)
    for title, (columns, rows, _) in compare(results).items():
        parts.append(
            f"{title}\n"
            + text_table(["", *columns], [[name, *(number(*cell) for cell in cells)] for name, cells in rows.items()])
        )
    climbed = {name: runs for name, runs in results.items() if all("ladder" in run for run in runs)}
    if ladder and climbed:
        prompts = [rung["prompt"] for rung in next(iter(climbed.values()))[0]["ladder"]]
        values = [
            np.mean([[rung["uncertainty"] for rung in run["ladder"]] for run in runs], axis=0)
            for runs in climbed.values()
        ]
        rows = [[prompt, *(f"{value[i]:.4e}" for value in values)] for i, prompt in enumerate(prompts)]
        parts.append("uncertainty of the prompt ladder, mean over seeds\n" + text_table(["", *climbed], rows))
    return "\n\n".join(parts)


def text_table(header, rows):
    """Aligned columns, the first to the left and the others to the right. Args: header: strings; rows: lists of strings. Returns: text."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def insert_files(document):
    """A markdown text with its <!-- FILE --> sections renewed; a .txt file is set as code. A section whose file is not there stays as it is."""

    def renew(match):
        if not Path(match[1]).exists():
            print(f"{match[1]}: no such file; its section stays as it is", file=sys.stderr)
            return match[0]
        content = Path(match[1]).read_text(encoding="utf-8").rstrip("\n")
        content = f"```\n{content}\n```" if match[1].endswith(".txt") else content
        return f"<!-- {match[1]} -->\n{content}\n<!-- end of {match[1]} -->"

    return re.sub(r"<!-- (\S+) -->\n.*?<!-- end of \1 -->", renew, document, flags=re.DOTALL)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(insert_files(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
