"""Tables in text files: lines, fields, quotation marks, and what is refused."""

import pytest

from datasets.delimited import read_lines
from utils.cli import UserError

COLUMNS = {"--csv-img-key": "file", "--csv-caption-key": "text"}


def lines_of(path, content, separator=",", quoting="minimal"):
    path.write_text(content, encoding="utf-8", newline="")
    return list(read_lines(path, separator, COLUMNS, quoting))


def test_rows_have_the_number_of_their_last_line(tmp_path):
    content = 'file,more,text\r\na,1,one\r\n\r\nb,2,"two\nlines"\r\nc,3\r\n'
    one, two, short = lines_of(tmp_path / "a.csv", content)
    assert (one.number, one.values["text"], one.problem) == (2, "one", "")
    assert (two.number, two.values["text"]) == (5, "two\nlines")
    assert (short.number, short.values) == (6, {})
    assert "has 2 fields, the header 3" in short.problem


def test_quotation_marks_enclose_or_are_text(tmp_path):
    (line,) = lines_of(tmp_path / "a.csv", 'file,text\na,"say ""hi"", all"\n')
    assert line.values["text"] == 'say "hi", all'
    (line,) = lines_of(tmp_path / "a.tsv", 'file\ttext\na\t"say\n', "\t", "none")
    assert line.values["text"] == '"say'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("file,file,text\na,b,c\n", ("more than one column 'file'", "rename all but one")),
        ("file,caption\na,b\n", ("no column 'text'", "--csv-caption-key")),
        ("", ("no column 'file'",)),
        ('file,text\na,"b,1\nc,d",2\n', ("lines 2 to 3", "--csv-quoting none")),
        ('file,text\na,"b" c\n', ("line 2", "--csv-quoting none")),
    ],
)
def test_what_is_no_table_is_named_with_a_cure(tmp_path, content, words):
    with pytest.raises(UserError) as error:
        lines_of(tmp_path / "a.csv", content)
    for word in (str(tmp_path / "a.csv"), *words):
        assert word in str(error.value)


def test_the_cures_are_no_empty_words(tmp_path):
    content = 'file,text\na,"b" c\n'
    (line,) = lines_of(tmp_path / "a.csv", content, quoting="none")
    assert line.values["text"] == '"b" c'
