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

# The columns of a comparison: name -> whether more is better. They are read from result["metrics"]["t2i"] and ["i2t"].
RETRIEVAL = {"R@1": True, "AURC": False, "E-AURC": False, "S": False, "R2": True, "-S*R2": True}
AMBIGUITY = {"spearman": True, "partial_spearman_given_length": True, "R@1_described": True}
DIRECTIONS = {"t2i": "text-to-image", "i2t": "image-to-text"}


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


def compare(results):
    """The figures of several methods, one row a method, mean and standard deviation over seeds.

    Args: results: {row name: list of results, one a seed}, results as eval.py writes them; a figure that is missing does not apply.
    Returns: {section title: (column names, {row name: [(mean, deviation), ...]}, [whether more is better, ...])}.
    """
    sections = {title: (key, RETRIEVAL) for key, title in DIRECTIONS.items()} | {"exact ambiguity": ("ambiguity", AMBIGUITY)}
    tables = {}
    for title, (key, columns) in sections.items():
        rows = {
            name: [mean_and_deviation([run["metrics"][key].get(column, np.nan) for run in runs]) for column in columns]
            for name, runs in results.items()
            if all(key in run["metrics"] for run in runs)
        }
        if rows:
            tables[title] = (list(columns), rows, list(columns.values()))
    return tables


def markdown(tables):
    """`compare`'s tables as markdown, the best figure of every column in bold. Returns: text."""
    parts = []
    for title, (columns, rows, more_is_better) in tables.items():
        best = [_best([cells[i][0] for cells in rows.values()], more) for i, more in enumerate(more_is_better)]
        lines = [f"| {title} | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        for name, cells in rows.items():
            texts = [number(*cell) for cell in cells]
            texts = [f"**{text}**" if cell[0] == top and len(rows) > 1 else text for text, cell, top in zip(texts, cells, best, strict=True)]
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
                writer.writerow([title, name, column, *("" if value is None or np.isnan(value) else repr(value) for value in (mean, deviation))])
    return file.getvalue()


def screen(results, ladder=True):
    """What eval.py prints: recall by level, the figures, the ladder; means over seeds. Args: results: as for `compare`. Returns: text."""
    parts = []
    for key, title in DIRECTIONS.items():
        leveled = {name: np.mean([run[key] for run in runs], axis=0) for name, runs in results.items() if all(key in run for run in runs)}
        levels = len(next(iter(leveled.values())))
        rows = [[name, *(number(recall, digits=2) for recall in values)] for name, values in leveled.items()]
        parts.append(f"{title}: R@1 by uncertainty level, from the most certain queries (1) to the least\n")
        parts[-1] += text_table(["", *map(str, range(1, levels + 1))], rows)
    for title, (columns, rows, _) in compare(results).items():
        parts.append(f"{title}\n" + text_table(["", *columns], [[name, *(number(*cell) for cell in cells)] for name, cells in rows.items()]))
    climbed = {name: runs for name, runs in results.items() if all("ladder" in run for run in runs)}
    if ladder and climbed:
        prompts = [rung["prompt"] for rung in next(iter(climbed.values()))[0]["ladder"]]
        values = [np.mean([[rung["uncertainty"] for rung in run["ladder"]] for run in runs], axis=0) for runs in climbed.values()]
        parts.append(
            "uncertainty of the prompt ladder\n" + text_table(["", *climbed], [[p, *(f"{v[i]:.4e}" for v in values)] for i, p in enumerate(prompts)])
        )
    return "\n\n".join(parts)


def text_table(header, rows):
    """Aligned columns, the first to the left and the others to the right. Args: header: strings; rows: lists of strings. Returns: text."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines)


def insert_files(document):
    """A markdown text with its <!-- FILE --> sections renewed; a .txt file is set as code. Raises: FileNotFoundError if one is missing."""

    def renew(match):
        content = Path(match[1]).read_text(encoding="utf-8").rstrip("\n")
        content = f"```\n{content}\n```" if match[1].endswith(".txt") else content
        return f"<!-- {match[1]} -->\n{content}\n<!-- end of {match[1]} -->"

    return re.sub(r"<!-- (\S+) -->\n.*?<!-- end of \1 -->", renew, document, flags=re.DOTALL)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(insert_files(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
