"""TableCaptions on small tables made here and on COCO pictures, through cache_embeddings.py."""

import csv
import shutil

import pytest

import cache_embeddings
import eval as eval_script
import train as train_script
from datasets.embedding import EmbeddingCache
from datasets.registry import DATASETS
from datasets.table import TableCaptions
from datasets.texts import load_texts
from tests.conftest import SHAPES_CLIP, check_rows, coco_sample, draw
from utils.cli import UserError

ROWS = [  # neither names nor texts are in order, and rows of an image do not stand together
    ("b/2.png", "a red square, big"),
    ("1.png", 'the "star"'),
    ("b/2.png", "  a picture"),
    ("3.png", "a\nstar 🐈"),
    ("./1.png", "a picture"),
]


def write(root, rows=ROWS, name="val.csv", header=("filepath", "title"), separator=","):
    """A table under root, with a picture for every file in it."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / name, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(header)
        writer.writerows(rows)
    return root


def write_text(root, text, name="val.csv"):
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def load(root, split="val", **flags):
    return TableCaptions(root, split, DATASETS["csv"].layout, **flags)


def refusal(root, **flags):
    """The message with which a data set is refused; it is one line."""
    with pytest.raises(UserError) as caught:
        load(root, **flags).check_broken(0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Order.


@pytest.mark.parametrize(("name", "separator"), [("val.csv", ","), ("val.tsv", "\t")])
def test_captions_keep_the_tables_order_and_images_that_of_their_first_appearance(
    tmp_path, name, separator
):
    data = load(write(tmp_path, name=name, separator=separator))
    assert data.image_names == ["b/2.png", "1.png", "3.png"]
    assert data.image_files == [tmp_path / image for image in data.image_names]
    assert data.captions == [text for _, text in ROWS]
    assert data.image_of_caption == [0, 1, 0, 2, 1]
    assert (data.image_ids, data.caption_ids) == ([0, 1, 2], [0, 1, 2, 3, 4])
    assert data.relevance is None


def test_the_columns_may_have_other_names_and_neighbours(tmp_path):
    rows = [(str(i), text, file) for i, (file, text) in enumerate(ROWS)]
    data = load(
        write(tmp_path, rows, header=("n", "caption", "image")),
        csv_img_key="image",
        csv_caption_key="caption",
    )
    assert data.captions == [text for _, text in ROWS]
    assert data.image_of_caption == [0, 1, 0, 2, 1]


def test_rows_of_one_group_are_right_for_each_other_in_both_directions(tmp_path, script):
    rows = [
        ("a.png", "one", "cat"),
        ("b.png", "two", "dog"),
        ("c.png", "three", "cat"),
        ("b.png", "four", "bird"),
    ]
    path = write(tmp_path, rows, header=("filepath", "title", "class"))
    data = load(path, csv_group_key="class")
    assert data.relevance == [[0, 2], [1], [0, 2], [1]]
    assert load(path).relevance is None
    assert "no column 'colour'" in refusal(path, csv_group_key="colour")


@pytest.mark.parametrize("given", ["\t", "\\t"])
def test_open_clips_tables_of_tabs_that_are_called_csv_are_read(tmp_path, given):
    data = load(write(tmp_path, separator="\t"), csv_separator=given)
    assert data.image_of_caption == [0, 1, 0, 2, 1]


def test_a_byte_order_mark_and_empty_lines_are_passed_over(tmp_path):
    data = load(write_text(tmp_path, b"\xef\xbb\xbffilepath,title\r\n\r\na.png,one\r\n\r\n"))
    assert (data.image_names, data.captions) == (["a.png"], ["one"])


# What can go wrong.


def test_a_wrong_root_says_what_was_expected_and_what_was_found(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path, name="dev.csv")
    assert "expected val.csv or val.tsv, found only dev.csv, elsewhere/" in refusal(tmp_path)
    assert "found no such folder" in refusal(tmp_path / "absent")


def test_two_tables_of_one_split_are_refused(tmp_path):
    write(write(tmp_path), name="val.tsv", separator="\t")
    assert "found val.csv and val.tsv; keep one of them" in refusal(tmp_path)


BROKEN = {
    "no row": ("filepath,title\n", ["it has no rows"]),
    "nothing": ("", ["no column 'filepath'", "found: nothing", "--csv-img-key"]),
    "another column for images": (
        "file,title\na.png,one\n",
        ["no column 'filepath'", "'file', 'title'", "--csv-img-key"],
    ),
    "another column for captions": (
        "filepath,text\na.png,one\n",
        ["no column 'title'", "'filepath', 'text'", "--csv-caption-key"],
    ),
    "another separator": (
        "filepath\ttitle\na.png\tone\n",
        ["no column 'filepath'", "'filepath\\ttitle'", "--csv-separator"],
    ),
    "a column twice": ("filepath,title,title\na.png,one,two\n", ["more than one column 'title'"]),
    "a blank caption": ("filepath,title\na.png,one\nb.png, \n", ["line 3", "blank 'title'"]),
    "a blank image file": ("filepath,title\n,one\n", ["line 2", "blank 'filepath'"]),
    "a field too few": (
        "filepath,title\na.png,one\nb.png\n",
        ["line 3 has 1 fields, the header 2"],
    ),
    "a field too many": (
        "filepath,title\na.png,one, or two\n",
        ["line 2 has 3 fields, the header 2", "quote"],
    ),
    "a quotation that does not end": (
        'filepath,title\na.png,"one\nb.png,two\n',
        ["line 3", "not readable"],
    ),
    "a quotation that ends too soon": (
        'filepath,title\na.png,"one" more\n',
        ["line 2", "not readable"],
    ),
    "bytes that are not UTF-8": (b"filepath,title\na.png,\xff\xfe\n", ["UTF-8"]),
    "the folder above": (
        "filepath,title\na.png,one\n../b.png,two\n",
        ["line 3", "'../b.png' leads out of"],
    ),
    "the folder above, on a detour": (
        "filepath,title\na/../../b.png,two\n",
        ["line 2", "'a/../../b.png' leads out of"],
    ),
    "marks that swallow rows": (
        'filepath,title\na.png,"the rest\nb.png,x\nc.png,this is 24"\nd.png,ok\n',
        ["lines 2 to 4", "quotation mark", "--csv-quoting none"],
    ),
    "marks that swallow rows in the image column": (
        'filepath,title\n"a.png,x\nb.png",y\n',
        ["lines 2 to 3", "quotation mark"],
    ),
    "a Latin-1 line": (b"filepath,title\na.png,one\nb.png,caf\xe9\n", ["line 3", "0xe9"]),
    "a null character": ("filepath,title\na\0.png,one\n", ["line 2"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_named(tmp_path, case):
    text, expected = BROKEN[case]
    message = refusal(write_text(tmp_path, text))
    for part in ["val.csv", *expected]:
        assert part in message


def test_links_and_absolute_names_are_read_wherever_they_lead(tmp_path):
    draw(tmp_path / "elsewhere.png", 1)
    (write(tmp_path / "root") / "1.png").symlink_to(tmp_path / "elsewhere.png")
    assert load(tmp_path / "root").image_files
    split = load(write_text(tmp_path, f"filepath,title\n{tmp_path}/elsewhere.png,one\n"))
    assert split.image_files == [tmp_path / "elsewhere.png"]


def test_quotation_marks_can_be_part_of_the_text(tmp_path):
    write_text(tmp_path, 'filepath,title\na.png,"big sale" sign\nb.png,24" screen\n')
    assert "--csv-quoting none" in refusal(tmp_path)
    assert load(tmp_path, csv_quoting="none").captions == ['"big sale" sign', '24" screen']


def test_a_quoted_text_may_go_on_over_lines_and_be_long(tmp_path):
    long = "a" * 200_000
    write_text(tmp_path, f'filepath,title\na.png,"two\nlines"\nb.png,{long}\n')
    assert load(tmp_path).captions == ["two\nlines", long]


def test_a_space_before_a_quotation_mark_is_told(tmp_path, caplog):
    write_text(tmp_path, 'filepath,title\na.png, "a dog"\nb.png, "a cat"\n')
    assert load(tmp_path).captions == [' "a dog"', ' "a cat"']
    assert caplog.text.count("a space stands before a quotation mark") == 1
    assert "line 2" in caplog.text


def test_lists_of_captions_are_told_and_taken_apart_on_demand(tmp_path, caplog):
    cell = '"[""a dog"", ""a big dog"", "" ""]"'
    write_text(tmp_path, f"filepath,title\na.png,{cell}\nb.png,[1] a cat\n")
    assert len(load(tmp_path).captions) == 2
    assert "1 captions, such as that of line 2, are lists" in caplog.text
    split = load(tmp_path, csv_caption_lists=True)
    assert split.captions == ["a dog", "a big dog", "[1] a cat"]
    assert split.image_of_caption == [0, 0, 1]


def test_broken_rows_are_left_out_if_they_may_be(tmp_path):
    text = "filepath|title|n\na.png|one|1\nb.png| 4   A dog runs\nc.png| |3\nd.png|four|4\n"
    split = load(write_text(tmp_path, text), csv_separator="|")
    assert split.captions == ["one", "four"]
    split.check_broken(2)
    with pytest.raises(UserError, match="2 broken samples so far"):
        split.check_broken(1)
    assert [place.rpartition(": ")[2] for place, _ in split.broken] == ["line 3", "line 4"]


@pytest.mark.parametrize("separator", ["", "ab", '"', "\n", "\\n"])
def test_a_separator_that_is_none_is_refused(tmp_path, separator):
    assert "--csv-separator" in refusal(write(tmp_path), csv_separator=separator)


# Through the scripts.


def test_small_tables_go_through_all_scripts(script, workdir):
    root = workdir / "data" / "csv"
    for split, offset in (("train", 0), ("val", 10)):
        write(root, [(f"{split}/{file}", text) for file, text in ROWS], f"{split}.csv")
        for shade, name in enumerate(("b/2.png", "1.png", "3.png")):
            draw(root / split / name, offset + shade)
    assert script(cache_embeddings.main, "--dataset", "csv", *SHAPES_CLIP)[0] == 0
    for split in ("train", "val"):
        check_rows(
            EmbeddingCache("csv", split),
            [(text, root / split / file) for file, text in _normal(ROWS)],
        )
    assert load_texts("csv", "ladder", EmbeddingCache("csv", "val").embed_dim)[0] == list(
        DATASETS["coco"].ladder
    )
    assert script(train_script.main, "--dataset", "csv", "--epochs", 1)[0] == 0
    assert script(eval_script.main, "--dataset", "csv", "--uncer_levels", 1)[0] == 0


def _normal(rows):
    return [(file.removeprefix("./"), text) for file, text in rows]


def test_a_cache_of_another_name_is_missed_with_the_flags_that_make_it(script, workdir):
    draw(write(workdir / "mine", [("1.png", "a picture")]) / "1.png", 1)
    call = (
        "--dataset",
        "csv",
        "--data-root",
        "mine",
        "--name",
        "mine",
        "--split",
        "val",
        *SHAPES_CLIP,
    )
    assert script(cache_embeddings.main, *call)[0] == 0
    status, _, last = script(train_script.main, "--dataset", "mine")
    assert status == 2
    renamed = "or --dataset DATA_SET --name mine if the data set has another name"
    assert f"run python cache_embeddings.py --dataset mine --split train, {renamed}" in last


def test_bad_tables_end_in_one_line_and_nothing_is_written(script, workdir):
    write(workdir / "mine", header=("image", "caption"))
    call = ("--dataset", "csv", "--data-root", "mine", "--split", "val", *SHAPES_CLIP)
    status, _, last = script(cache_embeddings.main, *call, "--csv-img-key", "image")
    assert status == 2
    assert "mine/val.csv: no column 'title', separated by ',' (found: 'image', 'caption')" in last
    assert [path.name for path in workdir.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("name", "separator", "flags"),
    [("val.tsv", "\t", ()), ("val.csv", ";", ("--csv-separator", ";"))],
)
def test_each_coco_caption_has_the_embedding_of_its_own_picture(
    coco_root, script, workdir, name, separator, flags
):
    sample = coco_sample(coco_root)
    rows = [
        (file, text)
        for k in range(5)
        for _, file, captions in sample
        for _, text in captions[k : k + 1]
    ]
    table = [(f"pictures/{file.name}", text) for file, text in rows]  # rows of an image stand apart
    write(workdir / "mine", table, name, ("image", "caption"), separator)
    (workdir / "mine" / "pictures").mkdir()
    for _, file, _ in sample:
        shutil.copy(file, workdir / "mine" / "pictures" / file.name)
    call = "--dataset csv --data-root mine --split val --csv-img-key image --csv-caption-key caption".split()
    assert script(cache_embeddings.main, *call, *flags, *SHAPES_CLIP)[0] == 0
    cache = EmbeddingCache("csv", "val")
    assert cache.images == [f"pictures/{file.name}" for _, file, _ in sample]
    check_rows(cache, [(text, file) for file, text in rows])
