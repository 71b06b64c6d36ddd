"""Tables in files in, markdown documents that show them out.

    python -m utils.report README.md datasets/README.md

renews what stands between <!-- FILE --> and <!-- end of FILE -->: it becomes the content of FILE, a path from here.
"""

import re
import sys
from pathlib import Path

from utils.files import written_aside


def insert_files(document):
    """A markdown text with its <!-- FILE --> sections renewed, a .txt as code; without its file a section stays."""

    def renew(match):
        if not Path(match[1]).exists():
            print(f"{match[1]}: no such file; its section stays as it is", file=sys.stderr)
            return match[0]
        content = Path(match[1]).read_text(encoding="utf-8").rstrip("\n")
        content = f"```\n{content}\n```" if match[1].endswith(".txt") else content
        return f"<!-- {match[1]} -->\n{content}\n<!-- end of {match[1]} -->"

    return re.sub(r"<!-- (\S+) -->\n.*?<!-- end of \1 -->", renew, document, flags=re.DOTALL)


def results_page(title, command, texts, plots):
    """The README.md of a results folder: its tables and plots in one page, and the command that makes them.

    Args:
        title, command: one line each.
        texts: {file name: content}, as `tables.write_all` gives them.
        plots: {file name of a PNG: caption}, as `plots.draw_all` gives them.
    Returns: markdown.
    """
    pictures = "\n\n".join(f"{caption}\n\n![{caption}]({name})" for name, caption in plots.items())
    head = (
        f"# {title}\n\nWritten by `{command}`; mean ± standard deviation over seeds, best in bold."
    )
    kept = f"## What is kept at a risk\n\n{texts['risk.md']}\n" if texts.get("risk.md") else ""
    tables = f"{texts['comparison.md']}\n{pictures}\n\n{kept}## Details\n\n{texts['details.md']}"
    return f"{head}\n\n{tables}\n## As on the screen\n\n```\n{texts['report.txt'].rstrip()}\n```\n"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        renewed = insert_files(Path(name).read_text(encoding="utf-8"))
        with written_aside(name) as document:
            document.write(renewed.encode())
