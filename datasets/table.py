"""A table of image files and captions: one .csv or .tsv with a header per split, as for open_clip.

The expected layout:

    <root>/train.csv  <root>/val.csv (or .tsv)  and image files, named by their paths from <root>
"""

import json
import logging
from pathlib import Path

from datasets.checks import image_path, listing, one_file
from datasets.delimited import SEPARATORS, read_lines
from datasets.source import ListSplit, images_of_group
from utils.cli import need


class TableCaptions(ListSplit):
    """The captions of a split in the order of the table, and their images by first appearance.

    Rows that name the same file are one image with several captions. Ids are row numbers.

    Args:
        layout: the names that the table may have, with "{split}" in them.
        csv_img_key: the column of image files.
        csv_caption_key: the column of captions.
        csv_separator: one character; None: it follows from the table's suffix.
        csv_quoting: "minimal" or "none", as `read_lines` has it.
        csv_caption_lists: whether a caption that is a JSON list of texts is several captions.
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
        csv_quoting="minimal",
        csv_caption_lists=False,
    ):
        root = Path(root)
        table_names = [name.format(split=split) for name in layout]
        path = one_file(root, table_names)
        expected = f"expected {' or '.join(table_names)}, found {listing(root)}"
        need(path is not None, f"--data-root {root}: {expected}")
        columns = {"--csv-img-key": csv_img_key, "--csv-caption-key": csv_caption_key}
        if csv_group_key:
            columns["--csv-group-key"] = csv_group_key
        lines = list(read_lines(path, _separator(csv_separator, path), columns, csv_quoting))
        need(lines, f"{path}: it has no rows; give one per caption, or choose another --split")
        rows, broken = _sound_rows(path, lines, columns, csv_caption_lists)
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
                files.append(image_path(root, name, f"{path}: line {line}"))
            captions.append(values[1])
            image_of_caption.append(row_of_image[image])
        super().__init__(
            image_ids=list(range(len(names))),
            image_files=files,
            image_names=names,
            caption_ids=list(range(len(captions))),
            captions=captions,
            image_of_caption=image_of_caption,
            broken=broken,
        )
        if csv_group_key:
            groups = [values[2] for _, values in rows]
            own_images = [[row] for row in image_of_caption]
            self.relevance = images_of_group(groups, own_images)


def _sound_rows(path, lines, columns, take_lists_apart):
    """The rows of a table that can be used, (line, values of the columns), and what is broken.

    The values are the image file, the caption and, if asked for, the group.

    Args:
        take_lists_apart: give a row for each caption of a JSON list.
    """
    rows = []
    broken = []
    listed = []  # lines whose caption looks like a list of captions
    for line in lines:
        problem = line.problem
        values = [line.values.get(name, "") for name in columns.values()]
        blank = [
            name for name, value in zip(columns.values(), values, strict=True) if not value.strip()
        ]
        if not problem and blank:
            problem = f"has a blank {blank[0]!r}; fill it in or remove the row"
        if problem:
            broken.append([f"{path}: line {line.number}", problem])
            continue
        captions = _list_of_texts(values[1])
        if captions and take_lists_apart:
            for caption in captions:
                rows.append((line.number, [values[0], caption, *values[2:]]))
            continue
        rows.append((line.number, values))
        if captions:
            listed.append(line.number)
    if listed:
        logging.warning(
            "note: %s: %d captions, such as that of line %d, are lists of captions in JSON; each "
            "is taken as one caption: give --csv-caption-lists to take them apart",
            path,
            len(listed),
            listed[0],
        )
    return rows, broken


def _list_of_texts(text):
    """The texts of a cell that is a JSON list of texts, without blank ones; else an empty list."""
    if not text.lstrip().startswith("["):
        return []
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return []
    is_list = isinstance(content, list) and all(isinstance(entry, str) for entry in content)
    return [entry for entry in content if entry.strip()] if is_list else []


def _separator(flag, path):
    """The separator of a table; the shell passes a tab as \\t."""
    separator = SEPARATORS[path.suffix] if flag is None else flag.replace("\\t", "\t")
    is_separator = len(separator) == 1 and separator not in '"\r\n'
    cure = "give one character that is no quotation mark, or \\t for a tab"
    need(is_separator, f"--csv-separator {flag!r}: {cure}")
    return separator
