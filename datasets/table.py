"""A table of image files and captions: one .csv or .tsv with a header per split, as for open_clip.

The expected layout:

    <root>/train.csv  <root>/val.csv (or .tsv)  and image files, named by their paths from <root>
"""

import csv
from pathlib import Path

from datasets.checks import inside, listing
from datasets.source import ListSplit
from utils.cli import UserError, need

SEPARATORS = {".csv": ",", ".tsv": "\t"}  # unless --csv-separator says otherwise


class TableCaptions(ListSplit):
    """The captions of a split in the order of the table, and their images by first appearance.

    Rows that name the same file are one image with several captions. Ids are the rows themselves.

    Args:
        layout: the names that the table may have, with "{split}" in them.
        csv_img_key: the column of image files.
        csv_caption_key: the column of captions.
        csv_separator: one character; None: it follows from the table's suffix.
        csv_group_key: the column of a class, a product or a label. Images and captions of one group
            are right for each other; without it, an image is right for its own captions only.
    Raises: UserError that says what was expected and what was found.
    """

    def __init__(
        self,
        root,
        split,
        layout,
        csv_img_key="filepath",
        csv_caption_key="title",
        csv_separator=None,
        csv_group_key="",
    ):
        root = Path(root)
        path = _find_table(root, [name.format(split=split) for name in layout])
        columns = {"--csv-img-key": csv_img_key, "--csv-caption-key": csv_caption_key}
        if csv_group_key:
            columns["--csv-group-key"] = csv_group_key
        rows = list(_rows(path, columns, _separator(csv_separator, path)))
        need(rows, f"{path}: it has no rows; give one per caption, or choose another --split")
        row_of_image = {}
        names = []
        files = []
        captions = []
        image_of_caption = []
        for line, values in rows:
            name = values[0]
            image = Path(name)  # so that ./a.png is a.png
            if image not in row_of_image:
                row_of_image[image] = len(row_of_image)
                names.append(name)
                files.append(inside(root, name, f"{path}: line {line}"))
            captions.append(values[1])
            image_of_caption.append(row_of_image[image])
        super().__init__(
            image_ids=list(range(len(names))),
            image_files=files,
            image_names=names,
            caption_ids=list(range(len(captions))),
            captions=captions,
            image_of_caption=image_of_caption,
        )
        if csv_group_key:
            groups = [values[2] for _, values in rows]
            self.relevance = _images_of_group(groups, image_of_caption)


def _images_of_group(groups, image_of_caption):
    """The images of the group of each caption: M lists of image rows, ascending."""
    images_of_group = {}
    for group, image in zip(groups, image_of_caption, strict=True):
        images_of_group.setdefault(group, set()).add(image)
    return [sorted(images_of_group[group]) for group in groups]


def _find_table(root, names):
    """The one table of these names that exists."""
    existing = [name for name in names if (root / name).is_file()]
    cure = "keep one of them"
    need(len(existing) < 2, f"--data-root {root}: found {' and '.join(existing)}; {cure}")
    if not existing:
        expected = " or ".join(names)
        raise UserError(f"--data-root {root}: expected {expected}, found {listing(root)}")
    return root / existing[0]


def _separator(flag, path):
    """The separator of a table; the shell passes a tab as \\t."""
    separator = SEPARATORS[path.suffix] if flag is None else flag.replace("\\t", "\t")
    is_separator = len(separator) == 1 and separator not in '"\r\n'
    cure = "give one character that is no quotation mark, or \\t for a tab"
    need(is_separator, f"--csv-separator {flag!r}: {cure}")
    return separator


def _rows(path, columns, separator):
    """Yield (line, values of the columns) for every row of a table.

    Args:
        columns: {flag: name of the column}.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=separator, strict=True)
            header = reader.fieldnames or []
            _check_header(path, header, columns, separator)
            for row in reader:
                _check_row(row, header, columns, f"{path}: line {reader.line_num}")
                yield reader.line_num, [row[name] for name in columns.values()]
    except UnicodeDecodeError as error:
        message = f"{path}: not readable as UTF-8 text ({error}); save it as UTF-8"
        raise UserError(message) from None
    except csv.Error as error:
        place = f"{path}: line {reader.reader.line_num}"
        message = f"{place}: not readable as a table ({error}); mend the quotation marks"
        raise UserError(message) from None


def _check_header(path, header, columns, separator):
    """Raise a UserError if a column does not appear exactly once."""
    found = ", ".join(map(repr, header)) or "nothing"
    for flag, name in columns.items():
        how_many = "more than one" if name in header else "no"
        problem = f"{how_many} column {name!r}, separated by {separator!r} (found: {found})"
        cure = f"name the right one with {flag}, and the separator with --csv-separator"
        need(header.count(name) == 1, f"{path}: {problem}; {cure}")


def _check_row(row, header, columns, place):
    """Raise a UserError if a row has too many or too few fields, or a blank one."""
    missing = sum(value is None for value in row.values())
    extra = len(row.get(None, ()))  # csv.DictReader puts them under None
    if missing or extra:
        fields = len(header) + extra - missing
        cure = "quote a text that contains the separator"
        raise UserError(f"{place} has {fields} fields, the header {len(header)}; {cure}")
    for name in columns.values():
        is_blank = not row[name].strip()
        need(not is_blank, f"{place} has a blank {name!r}; fill it in or remove the row")
