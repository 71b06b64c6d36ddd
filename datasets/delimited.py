"""Tables in text files, .csv and .tsv: rows that Python's csv module reads, and what is wrong.

A stray quotation mark would swallow the rows up to the next one without a word. So a field that
goes on over several lines and holds the separator is refused.
"""

import csv
import logging
from typing import NamedTuple

from utils.cli import UserError, need
from utils.files import not_utf8

SEPARATORS = {".csv": ",", ".tsv": "\t"}
QUOTING = {"minimal": csv.QUOTE_MINIMAL, "none": csv.QUOTE_NONE}
MARK = '"'

csv.field_size_limit(2**31 - 1)  # long captions are no error


class Line(NamedTuple):
    """A row of a table."""

    number: int  # of its last line in the file, from 1
    values: dict  # {column: text}; empty if there is a problem
    problem: str  # what is wrong with it; "" if nothing is


def read_lines(path, separator, columns, quoting="minimal"):
    """Yield a Line for every row of a table with a header.

    Args:
        columns: {flag that names it, or "": name of a column that must be there}.
        quoting: "minimal": quotation marks may enclose a field; "none": they are part of the text.
    Raises: UserError if the file is no table, or a quotation mark swallows rows.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=separator, quoting=QUOTING[quoting], strict=True)
            header = next(reader, [])
            _check_header(path, header, columns, separator)
            told = False
            last_number = reader.line_num
            for fields in reader:
                first = last_number + 1
                last_number = reader.line_num
                if not fields:  # an empty line
                    continue
                _check_swallowed(path, first, last_number, fields, separator)
                if not told and quoting != "none" and _has_space_before_mark(fields):
                    told = True
                    logging.warning(
                        "note: %s: line %d: a space stands before a quotation mark, so the marks "
                        "belong to the text; remove the space if they enclose it",
                        path,
                        last_number,
                    )
                yield _line(last_number, fields, header)
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except csv.Error as error:
        raise UserError(
            f"{path}: line {reader.line_num}: not readable as a table ({error}); fix the "
            "quotation marks, or read them as text with --csv-quoting none"
        ) from None


def _line(number, fields, header):
    if len(fields) == len(header):
        return Line(number, dict(zip(header, fields, strict=True)), "")
    problem = f"has {len(fields)} fields, the header {len(header)}"
    return Line(number, {}, f"{problem}; quote a text that contains the separator")


def _check_swallowed(path, first, last, fields, separator):
    """Raise a UserError if a field of the lines first to last seems to have swallowed rows."""
    if first == last:
        return
    swallows = any(separator in field and ("\n" in field or "\r" in field) for field in fields)
    problem = "a quotation mark opens a field that holds the separator and goes on over these lines"
    cure = "remove or close it, or read quotation marks as text with --csv-quoting none"
    need(not swallows, f"{path}: lines {first} to {last}: {problem}; {cure}")


def _has_space_before_mark(fields):
    return any(field != field.lstrip() and field.lstrip().startswith(MARK) for field in fields)


def _check_header(path, header, columns, separator):
    """Raise a UserError if a column does not appear exactly once."""
    found = ", ".join(map(repr, header)) or "nothing"
    for flag, name in columns.items():
        how_many = "more than one" if name in header else "no"
        problem = f"{how_many} column {name!r}, separated by {separator!r} (found: {found})"
        cure = "rename all but one" if name in header else "give the table a header with it"
        if flag:
            cure += f", or name the right column with {flag} and the separator with --csv-separator"
        need(header.count(name) == 1, f"{path}: {problem}; {cure}")
