"""Files that are written whole or not at all, locks, and files that are checked when read."""

import contextlib
import errno
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

from utils.cli import UserError, need, reason_of

# Errors of file systems that do not support these calls (NFS, Lustre, FUSE).
WITHOUT_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
WITHOUT_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
LFS_POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not fetched


@contextlib.contextmanager
def written_aside(path):
    """Write a file beside its final path, and move it there when the block ends without an error.

    Args: path: where the file will be. Its folder is made if needed.
    Yields: a binary file object, flushed to disk at the end.
    Raises: OSError from the file system. Nothing is left behind then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    aside = partial_path(path)
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            _sync(file)
        os.replace(aside, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


def _sync(file):
    """Force a file to the disk, where the file system can do so."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in WITHOUT_FSYNC:
            raise


def partial_path(path):
    """Where this process writes the file or folder that will be at a path."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_leftovers(path):
    """Remove the unfinished files and folders that dead processes left for a path."""
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        process = aside.name.split(".")[-2]
        if not process.isdecimal() or _is_alive(int(process)):
            continue
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def _is_alive(process):
    if os.name == "nt":  # where os.kill ends the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # another user's process, or a number too large for one
    return True


@contextlib.contextmanager
def locked(path, what):
    """Hold a lock while the block runs.

    Where the file system has flock, the lock ends with its process, however that ends. Elsewhere
    (some network file systems) the lock is that a file beside it exists, which a killed process
    leaves behind.

    Args:
        path: the file, removed at the end together with folders that were made for it and are
            still empty.
        what: what the lock is for, for the message.
    Raises: UserError if another process holds it.
    """
    path = Path(path)
    new_folders = [folder for folder in path.parents if not folder.exists()]  # deepest first
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _acquire(path, what)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not remove an open file
            path.unlink(missing_ok=True)
        lock.release()
        for folder in new_folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


def is_locked(path):
    """Whether a process, this one or another, holds the lock `locked(path, ...)`."""
    path = Path(path)
    if _soft_lock_file(path).exists():
        return True
    if not path.exists():
        return False
    try:
        _acquire(path, path).release()
    except UserError:
        return True
    except OSError:  # a read-only folder, where nothing is at work
        return False
    return False


def _acquire(path, what):
    """Acquire a lock without waiting, and return it."""
    from filelock import FileLock, SoftFileLock, Timeout

    problem = f"{what}: another process is at work on it; wait until it has ended"
    try:
        lock = FileLock(path, timeout=0)
        lock.acquire()
        return lock
    except Timeout:
        raise UserError(problem) from None
    except NotImplementedError:  # an older filelock, where there is no flock
        pass
    except OSError as error:
        if error.errno not in WITHOUT_FLOCK:
            raise
    path.unlink(missing_ok=True)
    soft_file = _soft_lock_file(path)
    try:
        lock = SoftFileLock(soft_file, timeout=0)
        lock.acquire()
        return lock
    except Timeout:
        raise UserError(f"{problem}; or, if none is, remove {soft_file}") from None


def _soft_lock_file(path):
    """The file that is the lock itself where there is no flock."""
    return path.with_name(f"{path.name}-held")


def not_utf8(path):
    """The UserError of a text file that is not UTF-8; it names the first line that is not."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x}"
                return UserError(f"{path}: line {number}: {byte} is not UTF-8; save it as UTF-8")
    return UserError(f"{path}: not readable as UTF-8 text; save it as UTF-8")


def text_lines(path):
    """The lines of a text file without space around them; blank ones are left out.

    A line ends in \\n, \\r or both, not in Unicode's other line separators.

    Raises: UserError if it is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    return [line for line in lines if line]


def clean_text(text):
    """A text that can be encoded: half a surrogate pair becomes U+FFFD, a whole one its character.

    >>> clean_text("a \\ud83d cat") == "a \\ufffd cat"
    True
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def differences(saved, current):
    """How the entries of a dict differ from saved ones: "dtype was float32, now float16; ..."."""
    changes = []
    for key, value in current.items():
        if key not in saved or saved[key] != value:
            changes.append(f"{key} was {saved.get(key)}, now {value}")
    return "; ".join(changes)


def digest(content):
    """16 hexadecimal digits that are the same for the same content, anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def sha256(path):
    """The SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(content, path):
    """Write tensors and plain types. The same content gives the same bytes under any name.

    Raises: OSError from the file system, or KeyboardInterrupt; torch.save alone turns them into a
        RuntimeError.
    """
    with written_aside(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            cause = error.__context__  # what the write itself raised
            if isinstance(cause, (OSError, KeyboardInterrupt)):
                raise cause from None
            raise


def save_json(content, path, indent=None):
    """Write JSON.

    Raises: ValueError if there is a NaN or an infinity, which JSON does not have.
    """
    text = json.dumps(content, indent=indent, allow_nan=False)
    with written_aside(path) as file:
        file.write((text + "\n").encode())


def check_is_fetched(path, what):
    """Raise a UserError if a file is empty, or stands for one that was not fetched.

    Args: what: the file in the message.
    """
    with open(path, "rb") as file:  # This raises if the file is missing or forbidden.
        beginning = file.read(len(LFS_POINTER))
    need(beginning, f"{what}: the file is empty; fetch or make it again")
    problem = "this is a Git LFS pointer, not the file itself"
    need(beginning != LFS_POINTER, f"{what}: {problem}; run git lfs pull there")


def without_prefixes(weights):
    """A state dict without what DDP, torch.compile or a trainer put before all of its names."""
    for prefix in ("module.", "_orig_mod.", "model."):
        if weights and all(str(name).startswith(prefix) for name in weights):
            plain = {name.removeprefix(prefix): value for name, value in weights.items()}
            return without_prefixes(plain)
    return weights


def load_tensors(path, check_sums=True):
    """Read a file of tensors and plain types without running any code that may be in it.

    Args: check_sums: compare the file with the checksums that torch.save wrote into it.
    Returns: its content, memory-mapped if possible.
    Raises: UserError if it is no such file, or if it declares more values than it holds;
        FileNotFoundError if there is none.
    """
    check_is_fetched(path, path)
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # Older formats cannot be memory-mapped.
    try:
        if is_zip and check_sums:
            _check_sums(path)
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # noqa: BLE001  A broken file can raise almost anything.
        reason = type(error).__name__
        if str(error):
            reason = str(error).splitlines()[0].split(". ")[0][:120]
        raise UserError(
            f"{path}: not a file of tensors that can be read safely ({reason})"
        ) from None
    for _, leaf in leaves(content):
        if isinstance(leaf, torch.Tensor) and not _is_stored_in_full(leaf):
            raise UserError(
                f"{path}: holds a tensor of shape {tuple(leaf.shape)} that is not stored in full; "
                "write it again with torch.save"
            )
    return content


def _check_sums(path):
    with zipfile.ZipFile(path) as archive:
        changed = archive.testzip()
    need(changed is None, f"{changed} is not what was written: its checksum differs")


def _is_stored_in_full(tensor):
    """Whether a tensor has a value of its own in the file for each of its entries."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    stored_bytes = tensor.untyped_storage().nbytes()
    return tensor.is_contiguous() and stored_bytes >= tensor.numel() * tensor.element_size()


def leaves(tree, key=None):
    """Yield (key, value) for all values in nested dicts, lists and tuples.

    The key is that of the innermost dict around the value.
    """
    if isinstance(tree, dict):
        for inner_key, value in tree.items():
            yield from leaves(value, inner_key)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from leaves(value, key)
    else:
        yield key, tree


def load_arrays(path):
    """Read an .npz of plain arrays: {name: array}.

    Raises: UserError if it is no such file; FileNotFoundError if there is none.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except FileNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001  A broken file can raise almost anything.
        problem = f"not a file of arrays that can be read safely ({reason_of(error)})"
        raise UserError(f"{path}: {problem}; evaluate again") from None


def load_json(path):
    """Read JSON.

    Raises: UserError if the file is not JSON; FileNotFoundError if there is none.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
