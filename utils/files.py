"""Files that appear whole or not at all, locks that die with their process, and content that is checked when read."""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from utils.cli import UserError, need


@contextlib.contextmanager
def written_aside(path):
    """Open a file for writing beside its place, which it takes, flushed to disk, when the block ends without an error.

    Args: path: where the file is to stand; its folder is made if needed.
    Yields: a binary file object.
    Raises: OSError as the file system gives it; nothing is left behind then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    aside = partial(path)
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


def partial(path):
    """Where this process writes what is to stand at a path."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_leftovers(path):
    """Remove what processes that are no more began to write for a path: files and folders."""
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        process = aside.name.split(".")[-2]
        if process.isdecimal() and not _is_alive(int(process)):
            shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)


def _is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's
        pass
    return True


_locks = set()  # open files of the locks that this process holds


@contextlib.contextmanager
def locked(path, what):
    """Hold a lock while the block runs. It is the file's flock, not the file, and dies with its process.

    Args:
        path: the lock's file, removed at the end together with folders made for it that are still empty.
        what: is at work, for the message.
    Raises: UserError if another process holds it.
    """
    path = Path(path)
    made = [folder for folder in path.parents if not folder.exists()]  # the deepest first
    file = None
    while file is None or not _stands_at(path, file):  # its last holder may remove it between our open and our flock
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115  open for as long as the block runs
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"{what}: another process is at work on it; wait for its end") from None
    _locks.add(file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        _locks.discard(file)
        file.close()
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _stands_at(path, file):
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    return False


def _leave_locks():
    """A worker that outlives its killed parent for a moment must not keep the parent's locks."""
    while _locks:
        _locks.pop().close()


os.register_at_fork(after_in_child=_leave_locks)


def differences(found, wanted):
    """What keeps one dict from being another: "dtype was float32, now float16; ...", or ""."""
    changed = [key for key in wanted if key not in found or found[key] != wanted[key]]
    return "; ".join(f"{key} was {found.get(key)}, now {wanted[key]}" for key in changed)


def digest(content):
    """A name for what JSON can hold, the same for the same content: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def sha256(path):
    """The SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(content, path):
    """Write tensors and plain types, whole or not at all. The same content gives the same bytes under any name."""
    with written_aside(path) as file:
        torch.save(content, file)


def save_json(content, path, indent=None):
    """Write JSON, whole or not at all; NaN and infinity, which JSON does not have, raise ValueError."""
    with written_aside(path) as file:
        file.write((json.dumps(content, indent=indent, allow_nan=False) + "\n").encode())


def load_tensors(path, check_sums=True):
    """Read a file of tensors and plain types without running anything that may be in it.

    Args: check_sums: compare all of it with the checksums that torch writes into it and does not read.
    Returns: its content, memory-mapped where it can be.
    Raises: UserError if it is no such file, or declares more values than it holds; FileNotFoundError if there is none.
    """
    with open(path, "rb") as file:  # a missing or forbidden file says so itself
        is_zip = file.read(4) == b"PK\x03\x04"  # older files cannot be memory-mapped
    try:
        if is_zip and check_sums:
            with zipfile.ZipFile(path) as archive:
                changed = archive.testzip()
            need(changed is None, f"{changed} is not what was written: its checksum differs")
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on odd files
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # noqa: BLE001  junk raises nearly anything when it is read
        reason = str(error).splitlines()[0].split(". ")[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a file of tensors that can be read safely ({reason})") from None
    for tensor in (leaf for _, leaf in leaves(content) if isinstance(leaf, torch.Tensor)):
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_contiguous()
        if not plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            problem = f"holds a tensor of shape {tuple(tensor.shape)} that is not stored in full"
            raise UserError(f"{path}: {problem}; write it again with torch.save")
    return content


def leaves(tree, key=None):
    """Yield whatever stands in nested dicts, lists and tuples: (the key of the innermost dict around it, it)."""
    if isinstance(tree, dict | list | tuple):
        for inner, value in tree.items() if isinstance(tree, dict) else ((key, value) for value in tree):
            yield from leaves(value, inner)
    else:
        yield key, tree


def load_arrays(path):
    """Read an .npz of plain arrays, {name: array}.

    Raises: UserError if it is none; FileNotFoundError if there is none.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except FileNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001  as above
        reason = " ".join(str(error).split())[:120]
        what = f"{path}: not a file of arrays that can be read safely"
        raise UserError(f"{what} ({reason}); evaluate again") from None


def load_json(path):
    """Read JSON.

    Raises: UserError if the file is not JSON; FileNotFoundError if there is none.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
