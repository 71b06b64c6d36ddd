"""A table of image files and captions in; checked images and captions, in the table's order, out.

A .csv or .tsv a split, with a header, as open_clip trains from. The expected layout:

    <root>/train.csv  <root>/val.csv (or .tsv)  and the image files, which the tables name by their paths from <root>
"""

import csv
from pathlib import Path

from datasets.checks import inside, listing
from datasets.source import ListSplit
from utils.cli import UserError, need

SEPARATORS = {".csv": ",", ".tsv": "\t"}  # unless --csv-separator says otherwise


class TableCaptions(ListSplit):
    """The captions of a split in the order of the table, and their images in that of their first appearance there.

    Rows that name the same file are one image with several captions. Ids are the rows themselves.
    Args:
        layout: the names that the table may have, with "{split}" in them.
        csv_img_key, csv_caption_key: the columns.
        csv_separator: one character, or None: by the table's suffix.
        csv_group_key: the column of a class, a product or a label: images and captions of one are right for each
            other; without: an image is right for its own captions alone.
    Raises: UserError that says what was expected and what was found.
    """

    def __init__(
        self, root, split, layout, csv_img_key="filepath", csv_caption_key="title", csv_separator=None, csv_group_key=""
    ):
        root = Path(root)
        tables = [name.format(split=split) for name in layout]
        there = [table for table in tables if (root / table).is_file()]
        need(len(there) < 2, f"--data-root {root}: found {' and '.join(there)}; keep one of them")
        if not there:
            raise UserError(f"--data-root {root}: expected {' or '.join(tables)}, found {listing(root)}")
        path = root / there[0]
        columns = {"--csv-img-key": csv_img_key, "--csv-caption-key": csv_caption_key}
        columns |= {"--csv-group-key": csv_group_key} if csv_group_key else {}
        rows = list(_rows(path, columns, _separator(csv_separator, path)))
        need(rows, f"{path}: holds no row; give a row for every caption, or choose another --split")
        row_of_image, names, files, image_of_caption, images_of_group = {}, [], [], [], {}
        for line, (name, _, *group) in rows:
            if Path(name) not in row_of_image:  # a Path, so that ./a.png is a.png
                row_of_image[Path(name)] = len(row_of_image)
                names.append(name)
                files.append(inside(root, name, f"{path}: line {line}"))
            image_of_caption.append(row_of_image[Path(name)])
            images_of_group.setdefault(tuple(group), set()).add(image_of_caption[-1])
        captions = [caption for _, (_, caption, *_) in rows]
        super().__init__(list(range(len(names))), files, names, list(range(len(captions))), captions, image_of_caption)
        if csv_group_key:
            self.relevance = [sorted(images_of_group[tuple(group)]) for _, (_, _, *group) in rows]


def _separator(given, path):
    """The separator of a table; what the shell passes as \\t is a tab."""
    separator = SEPARATORS[path.suffix] if given is None else given.replace("\\t", "\t")
    cure = "give one character that is no quotation mark, or \\t for a tab"
    need(len(separator) == 1 and separator not in '"\r\n', f"--csv-separator {given!r}: {cure}")
    return separator


def _rows(path, wanted, separator):
    """Yield (line, the values of the wanted columns, {flag: column}) for every row of a table."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=separator, strict=True)
            columns = reader.fieldnames or []
            found = ", ".join(map(repr, columns)) or "nothing"
            for flag, key in wanted.items():
                what = f"{'more than one' if key in columns else 'no'} column {key!r}, parted by {separator!r}"
                cure = f"name the right one with {flag}, and what parts the columns with --csv-separator"
                need(columns.count(key) == 1, f"{path}: {what} (found: {found}); {cure}")
            for row in reader:
                where = f"{path}: line {reader.line_num}"
                if None in row or None in row.values():
                    fields = len(columns) + len(row.get(None, ())) - sum(value is None for value in row.values())
                    cure = "quote a text that holds the separator"
                    raise UserError(f"{where} has {fields} fields, the header {len(columns)}; {cure}")
                for key in wanted.values():
                    if not row[key].strip():
                        raise UserError(f"{where} has a blank {key!r}; fill it in or take the row out")
                yield reader.line_num, [row[key] for key in wanted.values()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not readable as UTF-8 text ({error}); save it as UTF-8") from None
    except csv.Error as error:
        where = f"{path}: line {reader.reader.line_num}"
        raise UserError(f"{where}: not readable as a table ({error}); mend the quotation marks") from None
