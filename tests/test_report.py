"""Generated tables in documents."""

from pathlib import Path

from utils.report import insert_files


def test_only_the_marked_tables_of_a_document_are_renewed(workdir, capsys):
    Path("a.md").write_text("| a |\n")
    Path("b.txt").write_text("b\n")
    marked = (
        "text\n<!-- a.md -->\n{}\n<!-- end of a.md -->\n<!-- b.txt -->\n{}\n<!-- end of b.txt -->\n"
    )
    missing = "<!-- c.md -->\nold\n<!-- end of c.md -->\nend\n"
    renewed = insert_files(marked.format("old", "old") + missing)
    assert renewed == marked.format("| a |", "```\nb\n```") + missing
    assert insert_files(renewed) == renewed
    assert "c.md: no such file" in capsys.readouterr().err
