"""Markdown documents that show files: the tables in READMEs, and the README.md of a results folder.

    python -m utils.report README.md datasets/README.md

renews what stands between <!-- FILE --> and <!-- end of FILE -->: it becomes the content of FILE, a
path relative to the current folder.
"""

import re
import sys
from pathlib import Path

from utils.files import written_aside


def insert_files(document):
    """A markdown text with its <!-- FILE --> sections renewed.

    A .txt file is shown as code. If a file is missing, its section stays as it is.
    """
    pattern = r"<!-- (\S+) -->\n.*?<!-- end of \1 -->"
    return re.sub(pattern, _renewed_section, document, flags=re.DOTALL)


def _renewed_section(match):
    name = match[1]
    if not Path(name).exists():
        print(f"{name}: no such file; its section stays as it is", file=sys.stderr)
        return match[0]
    content = Path(name).read_text(encoding="utf-8").rstrip("\n")
    if name.endswith(".txt"):
        content = f"```\n{content}\n```"
    return f"<!-- {name} -->\n{content}\n<!-- end of {name} -->"


def results_page(title, command, texts, plots):
    """The README.md of a results folder: its tables and plots on one page.

    Args:
        title: one line.
        command: that makes them, one line.
        texts: {file name: content}, as `tables.all_texts` returns them.
        plots: {file name of a PNG: caption}, as `plots.draw_all` returns them.
    Returns: markdown.
    """
    note = "mean ± standard deviation over seeds, best in bold"
    parts = [
        f"# {title}\n\nWritten by `{command}`; {note}.\n",
        texts["comparison.md"],
    ]
    for name, caption in plots.items():
        parts.append(f"{caption}\n\n![{caption}]({name})\n")
    if texts.get("risk.md"):
        parts.append(f"## Coverage at each risk\n\n{texts['risk.md']}")
    parts.append(f"## Details\n\n{texts['details.md']}")
    parts.append(f"## As on the screen\n\n```\n{texts['report.txt'].rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        renewed = insert_files(Path(name).read_text(encoding="utf-8"))
        with written_aside(name) as document:
            document.write(renewed.encode())
