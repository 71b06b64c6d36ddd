"""Renews the tables in markdown files.

    python -m utils.report README.md datasets/README.md

What stands between <!-- FILE --> and <!-- end of FILE --> becomes the content of FILE, a path relative to the current folder.
"""

import re
import sys
from pathlib import Path


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
