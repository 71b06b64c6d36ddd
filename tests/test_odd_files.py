"""Files and terminals as people have them, through what users call: names, encodings, exports, packages, devices."""

import csv
import io
import re
import subprocess
import sys
import types
import unicodedata
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image, PngImagePlugin

import eval as eval_script
from datasets import eccv
from datasets.images import decode_file
from models import METHODS
from models.base import SMALL
from tests.conftest import REPOSITORY, draw, make_cache
from utils.checkpoint import save_adaptor
from utils.cli import UserError
from utils.files import clean_text, text_lines

ODD = [
    "a\rcarriage return",
    "two\nlines",
    "both\r\nof them",
    'a "quoted" word',
    "comma, separated",
    " spaces ",
    "\ta tab",
    "'=1+1",
    "\u2028 separators \x0c",
    "caf\xe9 \U0001f408",
    "\x00 null",
    "",
]


def as_array(image):
    return torch.from_numpy(np.array(image))


@pytest.fixture
def evaluated(workdir):
    captions = [ODD[i % len(ODD)] or "none" for i in range(120)]
    make_cache("tiny", captions=captions)
    path = Path("checkpoints/tiny/0/asymvlm-psd.pt")
    save_adaptor(METHODS["asymvlm-psd"](64), "asymvlm-psd", SMALL, {}, path)
    return captions


def test_an_export_comes_back_whatever_a_caption_holds(evaluated, script):
    flags = ("--dataset", "tiny", "--export", "scores.csv")
    assert script(eval_script.main, *flags)[0] == 0
    with open("scores.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    captions = [row["text"] for row in rows if row["kind"] == "caption"]
    assert captions == evaluated
    frame = pandas.read_csv("scores.csv", keep_default_na=False)
    assert frame[frame.kind == "caption"].text.tolist() == evaluated
    numbers = pandas.read_csv("scores.csv")[["row", "uncertainty", "percentile", "rank"]]
    assert all(kind.kind in "if" for kind in numbers.dtypes)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_of_few_characters_gets_what_it_can_show(evaluated, encoding):
    flags = "--dataset tiny --most-uncertain 120 --device cpu".split()
    command = [sys.executable, str(REPOSITORY / "eval.py"), *flags]
    done = subprocess.run(command, capture_output=True, env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert rb"\U0001f408" in done.stdout


def test_prompts_that_are_half_a_character_are_cleaned():
    assert clean_text("a \ud83d cat") == "a \ufffd cat"
    assert clean_text("a \ud83d\udc08") == "a \U0001f408"
    assert clean_text("caf\udce9") == "caf\ufffd"  # a byte of the command line


def test_lines_of_texts_and_prompts_end_where_editors_end_them(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\rthree\u2028still\x0cthree\n\n  four \n".encode())
    assert text_lines(path) == ["one", "two", "three\u2028still\x0cthree", "four"]
    path.write_bytes(b"one\ntw\xff\n")
    with pytest.raises(UserError, match=r"a\.txt: line 2: byte 0xff"):
        text_lines(path)


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_names_in_another_unicode_form_are_found(tmp_path, on_disk):
    draw(tmp_path / unicodedata.normalize(on_disk, "caf\xe9.png"), 1)
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "caf\xe9.png")
        assert decode_file(tmp_path / name, as_array)[1] is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("images\\a.png", "backslashes"),
        ("http://x.org/a.png", "URL"),
        ("https://x.org/a.png", "URL"),
        ("a.png ", "ends in a space"),
        ("b.png", "no such file"),
    ],
)
def test_a_missing_file_says_what_is_likely(tmp_path, name, words):
    draw(tmp_path / "a.png", 1)
    image, reason = decode_file(tmp_path / name, as_array)
    assert image is None and words in reason


@pytest.mark.parametrize("kind", ["text", "compressed text", "profile"])
def test_a_png_with_much_text_is_read(tmp_path, kind):
    text = PngImagePlugin.PngInfo()
    profile = None
    if kind == "profile":
        profile = np.random.default_rng(0).bytes(3 * 2**20)
    else:
        text.add_text("comment", "a" * (3 * 2**20), zip=kind == "compressed text")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png", pnginfo=text, icc_profile=profile)
    image, reason = decode_file(tmp_path / "a.png", as_array)
    assert reason is None and image.shape == (8, 8, 3)


def test_an_image_over_the_limit_says_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    draw(tmp_path / "a.png", 1)
    assert "exceeds limit of" in decode_file(tmp_path / "a.png", as_array)[1]


class Unusable:
    def __init__(self):
        raise FileNotFoundError("eccv_caption/data.json")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (types.SimpleNamespace(Metrics=Unusable), "data.json"),
        (types.SimpleNamespace(), "Metrics"),
    ],
)
def test_an_eccv_caption_that_cannot_be_used_is_named(monkeypatch, module, words):
    monkeypatch.setitem(sys.modules, "eccv_caption", module)
    with pytest.raises(UserError, match=rf"installed, but cannot be used .*{words}"):
        eccv.judgements([1], [1], [0], "x.json")


def test_a_package_that_eccv_caption_needs_is_not_taken_for_itself(monkeypatch, tmp_path):
    folder = tmp_path / "eccv_caption"
    folder.mkdir()
    (folder / "__init__.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "eccv_caption", raising=False)
    with pytest.raises(UserError, match="a_package_that_is_not_there"):
        eccv.judgements([1], [1], [0], "x.json")
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    assert eccv.judgements([1], [1], [0], "x.json") == {}


def test_nothing_asks_a_device_for_float64():
    """Apple's GPU has none: numbers become float64 on the CPU, or by models.layers.widest."""
    for path in [*REPOSITORY.glob("models/**/*.py"), *REPOSITORY.glob("utils/**/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            is_widest = path.name == "layers.py" and "return x.double()" in line
            if re.search(r"\.double\(\)|\.to\(torch\.float64", line) and not is_widest:
                assert ".cpu().double()" in line, f"{path}: line {number}"


def test_messages_stand_on_lines_of_their_own_beside_a_progress_bar(capsys):
    from utils.cli import run_script

    def main(argv):
        import logging

        from tqdm import tqdm

        with tqdm(total=3, file=sys.stderr) as bar:
            for _ in range(3):
                bar.update()
                bar.refresh()
                logging.warning("a message")

    assert run_script(main, []) == 0
    err = capsys.readouterr().err
    lines = re.split(r"[\r\n]", err)
    assert lines.count("a message") == 3
    assert io.StringIO(err).getvalue()
