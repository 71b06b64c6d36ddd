"""What every script does alike: argument types, and errors that are one line and exit status 2."""

import argparse
import contextlib
import errno
import functools
import logging
import os
import re
import sys

from tqdm import tqdm

PERMISSION = "; change its permissions, or work in another folder"
BLOCKED = "; a file stands where a folder must be: move it away"
CURES = {
    errno.EACCES: PERMISSION,
    errno.EPERM: PERMISSION,
    errno.EROFS: PERMISSION,
    errno.EEXIST: BLOCKED,
    errno.ENOTDIR: BLOCKED,
}
NOISY_LOGGERS = ("httpx", "huggingface_hub", "open_clip", "matplotlib", "fontTools")


class UserError(Exception):
    """An error that the user can fix. Its message is one line: the file or flag, and what to do."""


def need(condition, message):
    """Raise a UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def reason_of(error):
    """What an exception of a library says, in one line of at most 160 characters."""
    return " ".join(str(error).split())[:160] or type(error).__name__


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like all our errors."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def torchrun_rank():
    """(rank, number of ranks) of this process, from torchrun's environment; (0, 1) without it."""
    rank = os.environ.get("RANK", "")
    ranks = os.environ.get("WORLD_SIZE", "")
    if rank.isdecimal() and ranks.isdecimal():
        return int(rank), int(ranks)
    return 0, 1


def whole_number(text, least=0):
    """An argparse type: a whole number of at least `least`."""
    with contextlib.suppress(ValueError):
        if int(text) >= least:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")


positive = functools.partial(whole_number, least=1)  # an argparse type as well


def seed_number(text):
    """An argparse type: a whole number that every generator accepts, from 0 to 2^63 - 1."""
    value = whole_number(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not below 2^63")
    return value


def non_negative(text, below=float("inf")):
    """An argparse type: a number of at least 0 and below `below`."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < below:
            return float(text)
    limit = "" if below == float("inf") else f" and below {below}"
    raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0{limit}")


share = functools.partial(non_negative, below=1)  # an argparse type as well


def chance(text):
    """An argparse type: a probability above 0 and below 1."""
    value = share(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def folder_name(text):
    """An argparse type: the plain name of a folder.

    "texts" is not allowed: it is the folder of a cache's further texts.
    """
    is_plain = text == os.path.basename(text) and text.isprintable()
    if not is_plain or text in ("", "texts") or text.startswith("."):
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be the name of a folder here; give a plain name, but not 'texts'"
        )
    return text


def tag_name(text):
    """An argparse type: letters, digits, - and _."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no tag: use letters, digits, - and _")
    return text


def run_script(main, argv=None):
    """Call main(argv) as a script does.

    Args:
        main: function of a list of arguments.
        argv: that list; None: the arguments of this process.
    Returns: the exit status: 0; 2 after a UserError or an OSError, such as a full disk or a file
        without permission; 130 after Ctrl-C.
    """
    rank, ranks = torchrun_rank()
    level = logging.INFO if rank == 0 else logging.ERROR
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal shows what it can
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=level, format="%(message)s", handlers=[_AboveBars()], force=True)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    script = os.path.basename(sys.argv[0]) or "python"
    if ranks > 1:
        script = f"{script}, rank {rank}"
    try:
        main(argv)
    except (UserError, OSError) as error:
        print(f"{script}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        outcome = f": {interrupt}" if str(interrupt) else ""
        print(f"{script}: interrupted{outcome}", file=sys.stderr)
        return 130
    return 0


class _AboveBars(logging.StreamHandler):
    """Writes to stderr, on lines of their own above a progress bar if there is one."""

    def emit(self, record):
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def _one_line(error):
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; free some space and run the same command again"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}{CURES.get(error.errno, '')}"
    return " ".join(str(error).split())
