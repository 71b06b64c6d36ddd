"""Plots: which are drawn, and the captions among them."""

from pathlib import Path

import numpy as np
from PIL import Image

import eval as eval_script
from datasets.embedding import EmbeddingCache
from tests.conftest import load_result, picture_files
from utils.cli import run_script
from utils.files import save_json


def test_plots_and_an_index_that_shows_them(script, trained):
    assert script(eval_script.main, "--dataset", "tiny", "--resamples", 20, *trained)[0] == 0
    index = Path("results/tiny/README.md").read_text()
    names = "levels levels-image risk-coverage reliability length ambiguity ladder hierarchy-steps"
    for name in names.split():
        assert f"({name}.png)" in index
        with Image.open(f"results/tiny/{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5
        assert Path(f"results/tiny/{name}.pdf").read_bytes().startswith(b"%PDF")
    for row in ("frozen cosine", "softmax-entropy", "asymvlm-psd", "pfe"):
        assert f"| {row} |" in index
    assert "python eval.py --dataset tiny --method asymvlm-psd pfe --seed 0 1" in index


def test_a_missing_picture_leaves_the_captions_out_in_one_line(script, trained, workdir, capsys):
    cache = EmbeddingCache("tiny", "val")
    picture_files(cache, workdir / "pictures")
    save_json(cache.meta, cache.folder / "meta.json")
    assert script(eval_script.main, "--dataset", "tiny", "--resamples", 0, *trained)[0] == 0
    assert "(captions.png)" in Path("results/tiny/README.md").read_text()
    with Image.open("results/tiny/captions.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    (workdir / "pictures" / cache.images[7]).unlink()
    capsys.readouterr()
    assert (
        run_script(eval_script.main, ["--dataset", "tiny", "--resamples", "0", *map(str, trained)])
        == 0
    )
    assert capsys.readouterr().err.count("captions.png is left out") == 1
    assert not Path("results/tiny/captions.png").exists()
    assert "captions.png" not in Path("results/tiny/README.md").read_text()


def test_plots_that_the_results_do_not_allow_are_not_there(script, trained):
    assert script(eval_script.main, "--dataset", "tiny", "--resamples", 20, *trained)[0] == 0
    assert (
        script(eval_script.main, "--dataset", "tiny", "--resamples", 0, "--method", "asymvlm-psd")[
            0
        ]
        == 0
    )
    assert not Path("results/tiny/levels-image.png").exists()
    assert "levels-image" not in Path("results/tiny/README.md").read_text()
    assert load_result("tiny", 0, "asymvlm-psd")[0]["intervals"] == {}
