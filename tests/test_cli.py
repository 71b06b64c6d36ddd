"""What flags accept, and how a script ends."""

import argparse
import errno
import logging

import pytest

from utils import cli
from utils.cli import UserError, reason_of, run_script


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (cli.whole_number, {"0": 0, "7": 7}, ("-1", "1.5", "x", "")),
        (cli.positive, {"1": 1}, ("0", "-1", "1e3")),
        (cli.seed_number, {"0": 0, str(2**63 - 1): 2**63 - 1}, (str(2**63), "-1")),
        (cli.non_negative, {"0": 0.0, "1e-3": 1e-3}, ("-1", "inf", "nan", "x")),
        (cli.share, {"0": 0.0, "0.5": 0.5}, ("1", "-0.1", "nan")),
        (cli.chance, {"0.95": 0.95}, ("0", "1", "nan")),
        (cli.folder_name, {"coco-2": "coco-2"}, ("", "a/b", "..", ".a", "texts", "a\n")),
        (cli.tag_name, {"demo_1-b": "demo_1-b"}, ("", "a.b", "a@b", "a b")),
    ],
)
def test_a_flag_takes_what_it_says_and_nothing_else(kind, good, bad):
    for text, value in good.items():
        assert kind(text) == value
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=r"."):
            kind(text)


def full_disk(_):
    raise OSError(errno.ENOSPC, "No space left on device", "a.pt")


def no_permission(_):
    raise PermissionError(errno.EACCES, "Permission denied", "a.pt")


def user_error(_):
    raise UserError("a.pt: of\nanother run; name it b.pt")


def interrupted(_):
    raise KeyboardInterrupt("saved after epoch 3")


@pytest.mark.parametrize(
    ("main", "status", "words"),
    [
        (full_disk, 2, "error: the disk is full while writing a.pt; free some space"),
        (no_permission, 2, "error: a.pt: Permission denied"),
        (user_error, 2, "error: a.pt: of another run; name it b.pt"),
        (interrupted, 130, "interrupted: saved after epoch 3"),
        (lambda _: None, 0, ""),
    ],
)
def test_a_script_ends_with_one_line_and_a_status(main, status, words, capsys):
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        assert run_script(main, []) == status
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
    error = capsys.readouterr().err
    assert error.count("\n") == (1 if words else 0)
    assert words in error


def test_other_errors_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda _: 1 / 0, [])


def test_a_reason_is_one_short_line():
    assert reason_of(ValueError("a\n  b")) == "a b"
    assert reason_of(ValueError()) == "ValueError"
    assert len(reason_of(ValueError("x" * 1000))) == 160
