"""The command line's manners: bad input ends in one line on stderr and exit status 2, whatever the script."""

import argparse
import atexit
import contextlib
import errno
import functools
import gc
import logging
import os
import sys

RIGHTS = "; give yourself the right to it, or work in another folder"
BLOCKED = "; a file stands where a folder must be: move it away"
CURES = {errno.EACCES: RIGHTS, errno.EPERM: RIGHTS, errno.EROFS: RIGHTS, errno.EEXIST: BLOCKED, errno.ENOTDIR: BLOCKED}


class UserError(Exception):
    """Something that the user can put right: the message names the file or flag and says what to do, in one line."""


def need(condition, message):
    """Raise a UserError with this message unless a condition holds."""
    if not condition:
        raise UserError(message)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like every other error of ours."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def torchrun_rank():
    """Which process of how many this is: (rank, number of ranks), as torchrun's environment says; (0, 1) without it."""
    rank, ranks = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return (int(rank), int(ranks)) if rank.isdecimal() and ranks.isdecimal() else (0, 1)


def whole_number(text, least=0):
    """An argparse type: a whole number of at least 0."""
    with contextlib.suppress(ValueError):
        if int(text) >= least:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")


positive = functools.partial(whole_number, least=1)  # an argparse type, too


def seed_number(text):
    """An argparse type: a whole number that every generator takes, from 0 to 2^63 - 1."""
    value = whole_number(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not below 2^63")
    return value


def non_negative(text):
    """An argparse type: a finite number of at least 0."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")


def share(text):
    """An argparse type: a number of at least 0 and below 1."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a share of at least 0 and below 1")


def chance(text):
    """An argparse type: a probability above 0 and below 1."""
    if number := share(text):
        return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and below 1")


def folder_name(text):
    """An argparse type: the name of a folder, which leads nowhere else; "texts" is that of a cache's further texts."""
    if text != os.path.basename(text) or text in ("", "texts") or text.startswith(".") or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be the name of a folder here; give a plain name")
    return text


def run_script(main, argv=None):
    """Call main(argv) as a script does.

    Args:
        main: function of a list of arguments.
        argv: the list; None: the process's.
    Returns: exit status: 0; 2 after a UserError or an OSError, of a full disk or a forbidden file; 130 after Ctrl-C.
    """
    rank, ranks = torchrun_rank()
    level = logging.ERROR if rank else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("httpx", "huggingface_hub", "open_clip", "matplotlib", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    name = (os.path.basename(sys.argv[0]) or "python") + (f", rank {rank}" if ranks > 1 else "")
    if argv is None:  # a process of its own: what it has imported is no garbage, nor is what it ends with worth a look
        gc.freeze()
        atexit.register(gc.freeze)
    try:
        main(argv)
    except (UserError, OSError) as error:
        print(f"{name}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"{name}: interrupted{': ' + str(interrupt) if str(interrupt) else ''}", file=sys.stderr)
        return 130
    return 0


def _one_line(error):
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; make room and run the same command again"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}{CURES.get(error.errno, '')}"
    return " ".join(str(error).split())
