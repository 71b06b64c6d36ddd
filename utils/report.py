"""Figures in, tables that a person can read out."""


def number(value, digits=3):
    """A float for a table: fixed digits; "undefined" for None."""
    return "undefined" if value is None else f"{value:.{digits}f}"


def text_table(header, rows):
    """Aligned columns, the first to the left and the others to the right. Args: header: strings; rows: lists of strings. Returns: text."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in [header, *rows]
    ]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(line).rstrip() for line in lines)
