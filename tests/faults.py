"""Kills, full disks and broken files in; counts of what came out, and every finding, printed.

    python -m tests.faults            the full campaign (make faults)

It works in a folder of its own. Kill targets are forked from this process, so that they need not import torch anew;
they are killed after a random time, or just before or after a random one of their renames, which is where files come
and go. Then the same command runs until it ends by itself, and all bytes are compared with those of an unbroken run.

A broken file must end in exit status 2 with one line, or in success, and never in a traceback, a hang or a changed
input. Success is judged by a reading of the file that is not the code under test: plain json, csv, Pillow, safetensors
or torch.load.
- Files with checksums (image.pt, text.pt, ladder.pt, checkpoints, the state of a run, units): what comes out must equal
  what came out before.
- JSON and csv: the changed file, plainly read, must be valid, and the output must say what it says. Another number or
  letter that is valid in its place cannot be told from a right one.
- Pictures: Pillow must decode the file, and all other rows must be as before. Pixels of another colour cannot be told
  from right ones.
- CLIP weights: safetensors must read the file, with the same names and shapes, and meta.json must have the sum of the
  changed file.
"""

import contextlib
import copy
import csv
import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

import cache_embeddings
import eval as eval_script
import train as train_script
from datasets import source as split_source
from datasets.embedding import EmbeddingCache
from datasets.registry import DATASETS
from datasets.shapes import world
from tests.conftest import all_bytes, make_cache, write_tiny_clip
from tests.ranks import LIMIT, finish, start
from utils import preprocess
from utils.cli import UserError, run_script

UNIT = 64  # rows, so that a small data set has several units
EVAL = tuple("--dataset tiny --device cpu --no-plots --resamples 5".split())
CACHE = tuple("--dataset shapes --data-root data --device cpu --precision fp32".split())
TRAIN = tuple("--dataset tiny --recipe small --batch-size 50 --device cpu --precision fp32".split())
VALIDATED = tuple("--validation 0.2 --keep best".split())


class Hang(BaseException):
    pass


@contextlib.contextmanager
def workshop(folder, images=(240, 60)):
    """A folder with a drawn data set to work in; one thread, small units, a CLIP that is loaded once."""
    before, threads, unit = Path.cwd(), torch.get_num_threads(), split_source.UNIT
    source = DATASETS["shapes"]
    DATASETS["shapes"] = dataclasses.replace(
        source, chains=functools.partial(world.write_chains, count=3)
    )
    os.chdir(folder)
    torch.set_num_threads(1)
    split_source.UNIT = UNIT
    load, built_in = preprocess.load_clip, functools.cache(preprocess.load_clip)

    def load_clip(model, *args):
        return (built_in if model == source.model else load)(model, *args)

    cache_embeddings.load_clip = preprocess.load_clip = (
        load_clip  # of the data sets, and of --texts
    )
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        world.make("data", train=images[0], val=images[1])
        load_clip(source.model, source.pretrained, torch.device("cpu"), torch.float32)
        yield
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
        split_source.UNIT = unit
        DATASETS["shapes"] = source
        cache_embeddings.load_clip = preprocess.load_clip = load


# Kills.


def at_call(name, number, act, after=False):
    """A sabotage: the number-th call of os.<name> acts, before what it does or after it."""

    def sabotage():
        original, calls = getattr(os, name), iter(range(1, 10**9))

        def call(*args, **kwargs):
            last = next(calls) == number
            if last and not after:
                act()
            result = original(*args, **kwargs)
            if last:
                act()
            return result

        setattr(os, name, call)

    return sabotage


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def count_calls(main, argv, name):
    """How often an unbroken run calls os.<name>, and its seconds. It leaves what it made."""
    counter = Path("calls.txt")

    def sabotage():
        original = getattr(os, name)

        def call(*args, **kwargs):
            with open(counter, "a") as file:
                file.write(".")
            return original(*args, **kwargs)

        setattr(os, name, call)

    counter.write_text("")
    begin = time.monotonic()
    status = finish(start(main, argv, sabotage))
    assert status == 0, Path("output.txt").read_text()
    return len(counter.read_text()), time.monotonic() - begin


def kill_and_go_on(rng, main, argv, renames, seconds, check):
    """Start a run, kill it once to three times, and let it end.

    Args: check: called after every kill.
    Returns: (kills, findings).
    """
    kills, findings = 0, []
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5:
            status = finish(start(main, argv), rng.uniform(0, seconds))
        else:
            sabotage = at_call("replace", rng.randint(1, renames), die, after=rng.random() < 0.5)
            status = finish(start(main, argv, sabotage))
        kills += status is None
        if status not in (None, 0):
            findings.append(
                f"exit status {status} after a kill: {Path('output.txt').read_text()[-300:]}"
            )
        findings += check()
    status = finish(start(main, argv))
    if status != 0:
        findings.append(
            f"exit status {status} of the last run: {Path('output.txt').read_text()[-300:]}"
        )
    return kills, findings


def kill_caching(rng, kills):
    """Returns: (killed runs, caches, findings)."""
    renames, seconds = count_calls(
        cache_embeddings.main, (*CACHE, "--name", "whole", "--workers", 0), "replace"
    )
    whole, done, caches, findings = all_bytes("embeddings/whole"), 0, 0, []
    assert (
        finish(start(cache_embeddings.main, (*CACHE, "--name", "older", "--dtype", "float32"))) == 0
    )
    while done < kills:
        flags = (*CACHE, "--name", "killed", "--workers", rng.choice((0, 0, 2)))
        shutil.rmtree("embeddings/killed", ignore_errors=True)
        older = rng.random() < 0.3
        if older:
            shutil.copytree("embeddings/older", "embeddings/killed")
            flags = (*flags, "--overwrite")
        check = functools.partial(check_splits, older)
        died, found = kill_and_go_on(rng, cache_embeddings.main, flags, renames, seconds, check)
        done, caches = done + died, caches + 1
        findings += found
        if all_bytes("embeddings/killed") != whole:
            findings.append(f"{flags}: the cache differs from that of an unbroken run")
    return done, caches, findings


def check_splits(older):
    """What a killed run left: every split is a whole one, old or new, or is refused."""
    findings = []
    for split in ("train", "val"):
        try:
            cache = EmbeddingCache("killed", split)
            files = {
                path.name: path.read_bytes() for path in cache.folder.iterdir() if path.is_file()
            }
            if files not in [
                all_bytes(Path("embeddings", name, split)) for name in ("whole", "older")
            ]:
                findings.append(
                    f"a killed run left a {split} that is neither old nor new and is accepted"
                )
        except UserError:
            if older and not (Path("embeddings/killed") / split / ".parts").exists():
                findings.append(f"a killed run lost the older {split}")
    return findings


def kill_training(rng, kills):
    """Returns: (killed runs, trainings, findings)."""
    make_cache("tiny")
    flags = (*TRAIN, "--epochs", 12, "--save-every", 2, "--resume")
    done, trainings, findings = 0, 0, []
    while done < kills:
        method = rng.choice(
            ("asymvlm-psd", "asymvlm-vmf-both", "asymvlm-psd-image", "pcmepp", "probvlm")
        )
        argv = (*flags, "--method", method, *(VALIDATED if trainings % 2 else ()))
        shutil.rmtree("checkpoints", ignore_errors=True)
        renames, seconds = count_calls(train_script.main, argv, "replace")
        whole = without_logs("checkpoints")
        log = read_log(method)
        shutil.rmtree("checkpoints")
        died, found = kill_and_go_on(rng, train_script.main, argv, renames, seconds, list)
        done, trainings = done + died, trainings + 1
        findings += found
        if without_logs("checkpoints") != whole:
            findings.append(f"{method}: the checkpoint differs from that of an unbroken run")
        if read_log(method) != log:
            findings.append(f"{method}: the log differs from that of an unbroken run")
    return done, trainings, findings


def without_logs(folder):
    """The content of all files but the logs, which tell seconds."""
    return {
        name: content for name, content in all_bytes(folder).items() if not name.endswith(".jsonl")
    }


def read_log(method):
    lines = Path(f"checkpoints/tiny/0/{method}.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key != "seconds"}
        for line in lines
    ]


def fill_disk(rng, times):
    """Every run meets a full disk at one of its flushes; then there is room again. Returns: (runs, findings)."""
    make_cache("tiny")
    runs, findings = 0, []
    commands = {
        "embeddings/full": (cache_embeddings.main, (*CACHE, "--name", "full", "--workers", 0)),
        "checkpoints": (train_script.main, (*TRAIN, "--epochs", 6, "--save-every", 1, "--resume")),
    }
    for folder, (main, argv) in commands.items():
        shutil.rmtree(folder, ignore_errors=True)
        flushes, _ = count_calls(main, argv, "fsync")
        whole = without_logs(folder)
        for number in rng.sample(range(1, flushes + 1), min(flushes, times)):
            shutil.rmtree(folder)
            runs += 1
            status = finish(start(main, argv, at_call("fsync", number, disk_full)))
            last = Path("output.txt").read_text().splitlines()[-1]
            if status != 2 or "disk is full" not in last or list(Path(folder).rglob("*.partial")):
                findings.append(
                    f"a full disk at flush {number} of {folder}: exit status {status}, {last}"
                )
            status = finish(start(main, argv))
            if status != 0 or without_logs(folder) != whole:
                where = f"after flush {number} of {folder}"
                findings.append(f"with room again {where}: exit status {status}, or other bytes")
    return runs, findings


def fill_real_disk():
    """The same on a file system of 300 kB, which then grows, if this process may mount one.

    Returns: (what to say of it, findings).
    """
    shutil.rmtree("embeddings", ignore_errors=True)
    Path("embeddings").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", "embeddings"], capture_output=True
    )
    if mounted.returncode:
        return "not tried on a small file system: no right to mount one", []
    try:
        flags = (*CACHE, "--name", "whole", "--workers", 0)
        status = finish(start(cache_embeddings.main, flags))
        last = Path("output.txt").read_text().splitlines()[-1]
        is_told = status == 2 and "disk is full" in last
        findings = [] if is_told else [f"on a full file system: exit status {status}, {last}"]
        subprocess.run(["mount", "-o", "remount,size=64m", "embeddings"], check=True)
        status = finish(start(cache_embeddings.main, flags))
        found = all_bytes("embeddings/whole")
        status = status or finish(start(cache_embeddings.main, (*flags, "--overwrite")))
        if status != 0 or found != all_bytes("embeddings/whole"):
            findings.append(
                f"with room again on the file system: exit status {status}, or other bytes"
            )
        return f"a file system of 300 kB: {last}", findings
    finally:
        subprocess.run(["umount", "embeddings"], check=True)


def fill_training_disks(rng, times):
    """Trainings on file systems of 1 to 60 MB, which fill up in the middle of a write, and then grow.

    Returns: (what to say of it, findings).
    """
    make_cache("tiny")
    argv = (*TRAIN, "--epochs", 4, "--save-every", 1)
    shutil.rmtree("checkpoints", ignore_errors=True)
    finish(start(train_script.main, argv))
    whole = without_logs("checkpoints")
    full = 0
    findings = []
    for _ in range(times):
        size = rng.randint(1, 60)
        shutil.rmtree("checkpoints", ignore_errors=True)
        Path("checkpoints").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", "checkpoints"]
        if subprocess.run(mount, capture_output=True).returncode:
            return "no training on small file systems: no right to mount one", findings
        try:
            status = finish(start(train_script.main, argv))
            last = Path("output.txt").read_text().splitlines()[-1]
            full += status == 2
            if status != 0 and (status != 2 or "disk is full" not in last):
                findings.append(f"training on {size} MB: exit status {status}, {last}")
            if list(Path("checkpoints").rglob("*.partial")):
                findings.append(f"training on {size} MB leaves a part of a file")
            subprocess.run(["mount", "-o", "remount,size=300m", "checkpoints"], check=True)
            status = finish(start(train_script.main, (*argv, "--resume")))
            if status != 0 or without_logs("checkpoints") != whole:
                findings.append(f"training on {size} MB, then with room: {status}, or other bytes")
        finally:
            subprocess.run(["umount", "checkpoints"], check=True)
    return f"{times} trainings on 1 to 60 MB, {full} of which filled them", findings


def shrink_shared_memory():
    """Caching with two workers and 64 kB of shared memory. Returns: (what to say of it, findings)."""
    test = "test_small_disks.py::test_a_small_shared_memory_is_enough"
    file = Path(__file__).with_name(test.partition("::")[0])
    command = [sys.executable, "-m", "pytest", "-q", f"{file}::{test.partition('::')[2]}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent.parent)
    last = done.stdout.splitlines()[-1]
    return f"caching with 64 kB of shared memory: {last}", [last] if done.returncode else []


# Broken files.


def break_bytes(content, rng):
    """Other bytes: some flipped, cut, emptied, blanked, repeated or all random."""
    changed = bytearray(content)
    kind = rng.choice(("flip", "flip", "flip", "cut", "empty", "blank", "insert", "random"))
    if kind == "flip":
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[rng.randrange(len(changed)) :]
    elif kind == "empty":
        changed.clear()
    elif kind == "blank":
        begin = rng.randrange(len(changed))
        changed[begin : begin + 64] = bytes(len(changed[begin : begin + 64]))
    elif kind == "insert":
        begin = rng.randrange(len(changed))
        changed[begin:begin] = rng.randbytes(rng.randint(1, 20))
    else:
        changed = bytearray(rng.randbytes(rng.randint(1, 3000)))
    return bytes(changed)


ODD = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    10**7,
    1.5,
    1e308,
    10**30,
    float("nan"),
    float("inf"),
    [],
    {},
    [None],
    [[]],
]
ODD += [
    "",
    " ",
    "x",
    "0",
    "\x00",
    "\ud800",
    "🐈",
    "../../../etc/passwd",
    "/etc/passwd",
    {"a": 1},
    "long " * 300,
]


def break_json(content, rng):
    """Other JSON: a value changed, left out, repeated or swapped anywhere in the tree."""
    tree = json.loads(content)
    holder, places = tree, []
    while isinstance(holder, dict | list) and len(holder):
        key = rng.choice(sorted(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        places.append((holder, key))
        holder = holder[key]
    holder, key = rng.choice(places)
    kind = rng.choice(("change", "change", "change", "leave out", "repeat"))
    if kind == "change":
        holder[key] = copy.deepcopy(rng.choice(ODD))
    elif kind == "leave out":
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[f"{key} too"] = copy.deepcopy(holder[key])
    return json.dumps(tree).encode()


def break_text(content, rng):
    return (break_json if rng.random() < 0.6 else break_bytes)(content, rng)


def quiet(main, argv):
    """Call main(argv) as a script does.

    Returns: (exit status or None, what it wrote). None: it raised or hung, and the text says what.
    """

    def hang(*_):
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(LIMIT)
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            return run_script(main, [str(word) for word in argv]), out.getvalue()
    except Hang:
        return None, "hang"
    except BaseException:  # noqa: BLE001  whatever it is, it is a finding
        return None, traceback.format_exc()
    finally:
        signal.alarm(0)


def plain(path):
    """A JSON file as json reads it."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


class Target:
    """A file to break, and what must then come out. A subclass says which commands read it and when success is right.

    path: the file. inputs: folders or files that no command may change. breaking: function of (bytes, rng).
    """

    inputs, breaking = ("data",), staticmethod(break_bytes)

    def prepare(self):
        """Make the file whole and remember what comes out of it."""

    def commands(self):
        """Pairs (main, argv), called one after the other until one is refused."""

    def is_right(self):
        """Whether what came out is what the broken file says."""


class CacheTarget(Target):
    """What cache_embeddings.py reads: the output is compared by file name and caption with the one from whole files."""

    flags = ()

    def prepare(self):
        status, output = quiet(*self.commands()[0])
        assert status == 0, output
        self.cache = EmbeddingCache("fuzz", "val")
        self.image = dict(zip(self.cache.images, self.cache.image.read().clone(), strict=True))
        self.text = dict(zip(self.cache.captions, self.cache.text.read().clone(), strict=True))

    def commands(self):
        shutil.rmtree("embeddings/fuzz", ignore_errors=True)
        return [
            (
                cache_embeddings.main,
                (*CACHE, "--split", "val", "--workers", 0, "--name", "fuzz", *self.flags),
            )
        ]

    def rows_are_right(self, but=()):
        cache = EmbeddingCache("fuzz", "val")
        images = zip(cache.images, cache.image.read(), strict=True)
        texts = zip(cache.captions, cache.text.read(), strict=True)
        return all(
            torch.equal(z, self.image[n]) for n, z in images if n in self.image and n not in but
        ) and all(torch.equal(z, self.text[n]) for n, z in texts if n in self.text)


class Captions(CacheTarget):
    path, breaking = Path("data/annotations/captions_val.json"), staticmethod(break_text)

    def is_right(self):
        document = plain(self.path)
        images = sorted(document["images"], key=lambda entry: entry["id"])
        annotations = sorted(document["annotations"], key=lambda entry: entry["id"])
        row_of = {entry["id"]: row for row, entry in enumerate(images)}
        cache = EmbeddingCache("fuzz", "val")
        names = [entry["file_name"] for entry in images]
        expected = (
            [entry["caption"] for entry in annotations],
            [row_of[entry["image_id"]] for entry in annotations],
            names,
        )
        found = (cache.captions, cache.image_of_caption.tolist(), cache.images)
        return found == expected and self.rows_are_right(but=self._doubtful(names))

    def _doubtful(self, names):
        return {name for name in names if names.count(name) > 1}


class Relevance(CacheTarget):
    path, breaking = Path("data/annotations/relevance_val.json"), staticmethod(break_text)

    def is_right(self):
        content, cache = plain(self.path), EmbeddingCache("fuzz", "val")
        row_of = {image_id: row for row, image_id in enumerate(cache.meta["image_ids"])}
        captions = cache.meta["caption_ids"]
        expected = [
            sorted({row_of[image_id] for image_id in content[str(caption)]}) for caption in captions
        ]
        return cache.relevance == expected and self.rows_are_right()


class Picture(CacheTarget):
    path = Path("data/val/val_000003.png")

    def __init__(self, skip_broken=False, kind="PNG"):
        self.flags, self.kind = ("--skip-broken",) if skip_broken else (), kind

    def prepare(self):
        self.path = sorted(Path("data/val").iterdir())[3]
        quality = {"quality": 95} if self.kind == "JPEG" else {}
        Image.open(io.BytesIO(self.path.read_bytes())).save(self.path, format=self.kind, **quality)
        super().prepare()

    def is_right(self):
        cache = EmbeddingCache("fuzz", "val")
        skipped = self.path.name not in cache.images
        try:
            with Image.open(self.path) as image:
                image.convert("RGB")
                decodes = True
        except Exception:  # noqa: BLE001  as Pillow has it
            decodes = False
        is_listed = [name for name, _ in cache.meta["skipped"]] == [self.path.name] * skipped
        return decodes != skipped and is_listed and self.rows_are_right({self.path.name})


class Weights(CacheTarget):
    path, inputs = Path("clip/tiny-fuzz.safetensors"), ("data", "clip")

    def prepare(self):
        Path("clip").mkdir(exist_ok=True)
        config, weights, _ = write_tiny_clip(Path("clip"), "tiny-fuzz")
        self.flags = ("--model", config, "--pretrained", weights)
        self.shapes = {key: value.shape for key, value in load_file(weights).items()}
        super().prepare()

    def is_right(self):
        meta = EmbeddingCache("fuzz", "val").meta
        same = {key: value.shape for key, value in load_file(self.path).items()} == self.shapes
        return (
            same and meta["pretrained_sha256"] == hashlib.sha256(self.path.read_bytes()).hexdigest()
        )


class Config(Weights):
    path, breaking = Path("clip/tiny-fuzz.json"), staticmethod(break_text)

    def is_right(self):
        meta = EmbeddingCache("fuzz", "val").meta
        has_sum = meta["model_sha256"] == hashlib.sha256(self.path.read_bytes()).hexdigest()
        return has_sum and plain(self.path)["embed_dim"] == meta["embed_dim"]


class Unit(CacheTarget):
    """A unit or the settings of an unfinished split: what comes out must be what comes out without it."""

    inputs = ("data",)

    def __init__(self, file):
        self.path = Path("embeddings/fuzz/val/.parts") / file
        self.breaking = break_text if file.endswith(".json") else break_bytes

    def prepare(self):
        argv = super().commands()[0]
        assert quiet(*argv)[0] == 0
        self.whole = all_bytes("embeddings/fuzz")
        shutil.rmtree("embeddings/fuzz")
        finish(start(*argv, at_call("replace", 4, die)))  # the settings and two units are there
        self.begun = all_bytes("embeddings/fuzz")

    def commands(self):
        broken = self.path.read_bytes()
        shutil.rmtree("embeddings/fuzz", ignore_errors=True)
        for name, content in self.begun.items():
            path = Path("embeddings/fuzz") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.path.write_bytes(broken)
        return [
            (cache_embeddings.main, (*CACHE, "--split", "val", "--workers", 0, "--name", "fuzz"))
        ]

    def is_right(self):
        return all_bytes("embeddings/fuzz") == self.whole


class Embeddings(Target):
    """A file of a cache, read by train.py and eval.py."""

    inputs = ("embeddings/tiny",)
    argv = (*TRAIN, "--epochs", 1)

    def __init__(self, file):
        self.path = Path("embeddings/tiny") / file
        self.breaking = break_text if file.endswith(".json") else break_bytes

    def prepare(self):
        shutil.rmtree("checkpoints", ignore_errors=True)
        shutil.rmtree("embeddings/tiny", ignore_errors=True)
        make_cache("tiny", relevance=[sorted({i // 3, i % 40}) for i in range(120)])
        for command in self.commands():
            status, output = quiet(*command)
            assert status == 0, output
        self.results = {**all_bytes("checkpoints"), **all_bytes("results")}

    def commands(self):
        return [(train_script.main, self.argv), (eval_script.main, EVAL)]

    def same_results(self):
        found = {**all_bytes("checkpoints"), **all_bytes("results")}
        return all(
            found[name] == content
            for name, content in self.results.items()
            if not name.endswith(".jsonl")
        )

    def is_right(self):
        if self.path.suffix == ".pt":
            return self.same_results()
        content = plain(self.path)
        if self.path.name == "meta.json":
            return isinstance(content, dict)
        if self.path.name == "ladder.json":
            return len(content["texts"]) == 3 and all(
                isinstance(text, str) for text in content["texts"]
            )
        if self.path.name == "images.json":
            return len(content) == 40 and all(isinstance(name, str) for name in content)
        cache = EmbeddingCache("tiny", self.path.parent.name)
        if self.path.name == "cap_id_to_img_id.json":
            expected = [content[str(caption)] for caption in range(120)]
            return cache.image_of_caption.tolist() == expected and len(content) == 120
        return getattr(cache, self.path.stem) == content and len(content) == 120


class Checkpoint(Embeddings):
    inputs = ("embeddings/tiny", "checkpoints")

    def __init__(self):
        super().__init__("")
        self.path = Path("checkpoints/tiny/0/asymvlm-psd.pt")
        self.breaking = break_bytes

    def commands(self):
        if not self.path.exists():
            assert quiet(train_script.main, self.argv)[0] == 0
        return [(eval_script.main, EVAL)]

    def is_right(self):
        return self.same_results()


class State(Embeddings):
    """The state of a run that was killed."""

    inputs = ("embeddings/tiny",)

    def __init__(self):
        super().__init__("")
        self.path = Path("checkpoints/tiny/0/asymvlm-psd.resume.pt")
        self.breaking = break_bytes
        self.argv = (*TRAIN, "--epochs", 4, "--save-every", 1, "--resume")

    def prepare(self):
        super().prepare()
        shutil.rmtree("checkpoints")
        finish(start(train_script.main, self.argv, at_call("replace", 2, die, after=True)))

    def commands(self):
        self.path.with_name("asymvlm-psd.pt").unlink(missing_ok=True)
        return [(train_script.main, self.argv), *super().commands()[1:]]

    def is_right(self):
        return self.same_results()


class Texts(CacheTarget):
    path, inputs = Path("texts.csv"), ("texts.csv", "embeddings/fuzz/val")

    def prepare(self):
        shutil.rmtree("embeddings/fuzz", ignore_errors=True)  # of another target's CLIP
        chains = "id,captions\n1,table => a red table\n2,bird => a blue bird => a big blue bird\n"
        Path("texts.csv").write_text(chains, encoding="utf-8")
        super().prepare()

    def commands(self):
        if not Path("embeddings/fuzz/val/meta.json").exists():
            return super().commands()
        return [
            (
                cache_embeddings.main,
                (*CACHE[:2], "--device", "cpu", "--name", "fuzz", "--texts", "texts.csv"),
            )
        ]

    def is_right(self):
        with open(self.path, encoding="utf-8-sig", newline="") as file:
            chains = [
                [text.strip() for text in row["captions"].split("=>")]
                for row in csv.DictReader(file)
            ]
        return plain("embeddings/fuzz/texts/texts.json")["texts"] == [
            text for chain in chains for text in chain
        ]


def targets():
    """One of every file that a command reads."""
    files = "image.pt text.pt cap_id_to_img_id.json captions.json images.json relevance.json meta.json".split()
    caches = [Embeddings(f"{split}/{file}") for file in files for split in ("train", "val")]
    begun = [Unit(file) for file in ("image-00000.pt", "text-00000.pt", "settings.json")]
    pictures = [Picture(), Picture(skip_broken=True), Picture(kind="JPEG")]
    ladder = [Embeddings("texts/ladder.pt"), Embeddings("texts/ladder.json")]
    others = [Captions(), Relevance(), Weights(), Config(), Checkpoint(), State(), Texts()]
    return [*others, *pictures, *begun, *caches, *ladder]


def fuzz(rng, number):
    """Break files, as many as number in all.

    Returns: ({"inputs", "refused", "tracebacks", "hangs", "wrong", "changed": counts}, findings).
    """
    counts, findings = (
        dict.fromkeys(("inputs", "refused", "tracebacks", "hangs", "wrong", "changed"), 0),
        [],
    )
    chosen = targets()
    rng.shuffle(chosen)
    for index, target in enumerate(chosen):
        shares = number // len(chosen) + (index < number % len(chosen))
        if not shares:
            continue
        target.prepare()
        whole = target.path.read_bytes()
        for _ in range(shares):
            broken = target.breaking(whole, rng)
            target.path.write_bytes(broken)
            name = f"{type(target).__name__} {target.path}"
            commands = target.commands()
            before = {name: _content(name) for name in target.inputs}
            counts["inputs"] += 1
            status = 0
            for command in commands:
                if status == 0:
                    status, output = quiet(*command)
            last = (output.splitlines() or [""])[-1]
            if status is None:
                counts["hangs" if output == "hang" else "tracebacks"] += 1
                findings.append(f"{name}: {output[-700:]}")
            elif status == 2:
                counts["refused"] += 1
                if "error: " not in last or "Traceback" in output:
                    counts["tracebacks"] += 1
                    findings.append(f"{name}: {output[-300:]}")
            elif status != 0 or not _right(target):
                counts["wrong"] += 1
                keep(broken, target.path.name, counts["wrong"])
                findings.append(f"{name}: exit status {status}, wrong result")
            if {name: _content(name) for name in target.inputs} != before:
                counts["changed"] += 1
                findings.append(f"{name}: an input was changed")
            target.path.parent.mkdir(parents=True, exist_ok=True)
            target.path.write_bytes(whole)
    return counts, findings


def keep(content, name, number):
    """Keep a broken file for a look."""
    folder = os.environ.get("FAULTS_KEEP")
    if folder:
        (Path(folder) / f"{number}-{name}").write_bytes(content)


def _content(name):
    return Path(name).read_bytes() if Path(name).is_file() else all_bytes(name)


def _right(target):
    try:
        return target.is_right()
    except Exception:  # noqa: BLE001  the independent reading fails where the code under test did not
        traceback.print_exc()
        return False


def main():
    rng, findings = random.Random(int(os.environ.get("FAULTS_SEED", "0"))), []
    with tempfile.TemporaryDirectory() as folder, workshop(folder):
        killed, caches, found = kill_caching(rng, 20)
        findings += found
        print(
            f"{killed} killed runs of cache_embeddings.py: {caches} caches, {len(found)} findings",
            flush=True,
        )
        killed, trainings, found = kill_training(rng, 20)
        findings += found
        logs = f"{trainings} checkpoints with their logs"
        print(f"{killed} killed runs of train.py: {logs}, {len(found)} findings", flush=True)
        runs, found = fill_disk(rng, 8)
        findings += found
        print(f"{runs} runs on a full disk, and again with room: {len(found)} findings", flush=True)
        said, found = fill_real_disk()
        findings += found
        print(f"{said}; {len(found)} findings", flush=True)
        said, found = fill_training_disks(rng, 8)
        findings += found
        print(f"{said}; {len(found)} findings", flush=True)
        said, found = shrink_shared_memory()
        findings += found
        print(f"{said}; {len(found)} findings", flush=True)
    with tempfile.TemporaryDirectory() as folder, workshop(folder, images=(2, 8)):
        counts, found = fuzz(rng, 500)
        findings += found
        failed = ("tracebacks", "hangs", "silent wrong results", "changed inputs")
        kinds = zip(("tracebacks", "hangs", "wrong", "changed"), failed, strict=True)
        said = ", ".join(f"{counts[kind]} {what}" for kind, what in kinds)
        print(f"{counts['inputs']} broken files: {counts['refused']} refused, {said}")
    for finding in findings:
        print("finding:", finding)
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
