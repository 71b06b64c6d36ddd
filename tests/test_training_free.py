"""The entropy over reference images and its fitted temperature, against scipy and a grid over the whole matrix."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special, stats

import eval as eval_script
from datasets.embedding import EmbeddingCache
from models import METHODS
from models.base import SMALL
from tests.conftest import load_result, make_cache
from utils.checkpoint import save_adaptor
from utils.cli import run_script
from utils.evaluation import training_free
from utils.evaluation.training_free import MAX_SCALE, MIN_SCALE, Reference

EVAL = ("--dataset", "tiny", "--no-plots", "--resamples", 20)
ROWS = ("reference-entropy", "reference-entropy-fitted")


def train_split(mapped=False):
    return EmbeddingCache("tiny", "train", mapped=mapped)


def cosines(cache, text):
    """Of the images of a cache and texts, (N, T), in float64."""
    image, text = (z.double().numpy() for z in (cache.image.read(), text))
    return (image / np.linalg.norm(image, axis=1)[:, None]) @ (
        text / np.linalg.norm(text, axis=1)[:, None]
    ).T


def entropy(cosine, scale):
    """In nats, of the softmax over each column."""
    return stats.entropy(special.softmax(scale * cosine, axis=0), axis=0)


def mean_log_likelihood(cosine, own, scale):
    """Of the images own (T,) of the texts, over all images of cosine (N, T)."""
    return special.log_softmax(scale * cosine, axis=0)[own, np.arange(len(own))].mean()


@pytest.fixture
def trained(script):
    """A cache, and a checkpoint of any weights."""
    make_cache("tiny")
    save_adaptor(
        METHODS["asymvlm-psd"](64),
        "asymvlm-psd",
        SMALL,
        {},
        Path("checkpoints/tiny/0/asymvlm-psd.pt"),
    )


def make_noisy_cache(noise):
    """A cache of 60 images whose captions have more noise still."""
    make_cache("tiny", images=60)
    text = train_split().text.read().float()
    text += noise * torch.randn(text.shape, generator=torch.Generator().manual_seed(0))
    make_cache("tiny", images=60, text=text)
    return train_split()


@pytest.mark.parametrize("tile", [1, 7, 40, 2048])
def test_entropies_in_tiles_equal_scipys_over_the_whole_matrix(workdir, monkeypatch, tile):
    make_cache("tiny")
    monkeypatch.setattr(training_free, "REFERENCE_TILE", tile)
    monkeypatch.setattr(training_free, "REFERENCE_TEXTS", tile)
    text, scales = EmbeddingCache("tiny", "val").text.read(), [1.0, 30.0, 300.0]
    found = Reference(train_split()).entropies(text, scales)
    assert found.shape == (3, 120)
    for row, scale in zip(found.numpy(), scales, strict=True):
        np.testing.assert_allclose(row, entropy(cosines(train_split(), text), scale), atol=2e-4)


@pytest.mark.parametrize("size", [None, 15])
@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_the_fitted_scale_is_the_best_of_a_grid(workdir, size, noise):
    cache = make_noisy_cache(noise)
    images = Reference(cache, size)
    rows = images.rows.tolist()
    captions = [row for row, image in enumerate(cache.image_of_caption.tolist()) if image in rows]
    own = [rows.index(cache.image_of_caption[caption]) for caption in captions]
    cosine = cosines(cache, cache.text.read()[captions])[rows]
    grid = np.geomspace(MIN_SCALE, MAX_SCALE, 4001)
    likelihood = [mean_log_likelihood(cosine, own, scale) for scale in grid]
    best = grid[np.argmax(likelihood)]
    fitted = images.fit_scale()
    assert 2 < fitted < 100
    assert fitted == pytest.approx(best, rel=5e-3)
    assert mean_log_likelihood(cosine, own, fitted) > max(likelihood) - 1e-6


def test_pairs_that_tell_nothing_or_everything_end_the_fit(workdir):
    pairs = {"images": 40, "captions_per_image": 1, "splits": ["train"]}
    make_cache("tiny", **pairs)
    cache = train_split()
    z = cache.image.read()[cache.image_of_caption]
    make_cache("tiny", **pairs, text=-z)
    assert Reference(train_split()).fit_scale() == MIN_SCALE
    make_cache(
        "tiny", **pairs, text=z
    )  # told apart without an error at any scale that is large enough
    fitted = Reference(train_split()).fit_scale()
    assert fitted < MAX_SCALE
    assert mean_log_likelihood(cosines(cache, z), cache.image_of_caption.numpy(), fitted) > -1e-4


def test_a_fit_takes_so_many_captions_and_always_the_same(workdir, monkeypatch):
    make_noisy_cache(2.0)
    everything = Reference(train_split()).fit_scale()
    monkeypatch.setattr(training_free, "FITTED_ON", 60)
    some = Reference(train_split()).fit_scale()
    assert some != everything
    assert some == Reference(train_split()).fit_scale()
    assert some == pytest.approx(everything, rel=0.5)


def test_a_set_is_drawn_once_and_for_all(workdir):
    make_cache("tiny")
    images = Reference(train_split(), 15)
    assert len(images) == 15
    assert torch.equal(images.rows, Reference(train_split(), 15).rows)
    assert images.rows.tolist() == sorted(set(images.rows.tolist())) != list(range(15))
    for size in (None, 40, 10**9):
        assert Reference(train_split(), size).rows.tolist() == list(range(40))


def test_a_train_split_in_shards_is_read_where_it_lies(workdir, monkeypatch):
    make_cache("tiny")
    text = EmbeddingCache("tiny", "val").text.read()
    images = Reference(train_split(mapped=True))
    expected = images.entropies(text, [50.0]), images.fit_scale()
    make_cache("tiny", shard_rows=7, meta={"embed_dim": 64, "dtype": "float16"})
    mapped = train_split(mapped=True)
    assert mapped.mapped
    monkeypatch.setattr(type(mapped.image), "read", None)  # all rows at once
    assert torch.equal(Reference(mapped).entropies(text, [50.0]), expected[0])
    assert Reference(mapped).fit_scale() == expected[1]


def test_both_rows_are_evaluated_like_any_other(script, trained):
    status, printed, _ = script(eval_script.main, *EVAL, "--reference", 30)
    assert status == 0
    rows = Reference(train_split(), 30).rows
    cosine = cosines(train_split(), EmbeddingCache("tiny", "val").text.read())[rows]
    scales = []
    for name in ROWS:
        result, arrays = load_result("tiny", "baselines", name)
        assert result["config"]["reference"] == 30
        scales.append(result["config"]["logit_scale"])
        np.testing.assert_allclose(
            arrays["t2i_uncertainty"], entropy(cosine, scales[-1]), atol=2e-4
        )
        assert (arrays["i2t_uncertainty"] == arrays["t2i_uncertainty"][arrays["i2t_top1"]]).all()
        assert (
            arrays["t2i_rank"] == load_result("tiny", "baselines", "softmax-entropy")[1]["t2i_rank"]
        ).all()
        assert (
            printed.count(f"\n{name} ") == 5
        )  # by level, and compared, in both directions; and kept
    assert scales == [100.0, pytest.approx(Reference(train_split(), 30).fit_scale())]
    assert (
        script(
            eval_script.main,
            *EVAL[:3],
            "--resamples",
            100,
            "--compare",
            "reference-entropy",
            "asymvlm-psd",
        )[0]
        == 0
    )


def test_the_logit_scale_is_that_of_the_cache(script):
    make_cache("tiny", meta={"logit_scale": 20.0})
    save_adaptor(
        METHODS["asymvlm-psd"](64),
        "asymvlm-psd",
        SMALL,
        {},
        Path("checkpoints/tiny/0/asymvlm-psd.pt"),
    )
    assert script(eval_script.main, *EVAL)[0] == 0
    result, arrays = load_result("tiny", "baselines", "reference-entropy")
    assert result["config"]["logit_scale"] == 20.0
    cosine = cosines(train_split(), EmbeddingCache("tiny", "val").text.read())
    np.testing.assert_allclose(arrays["t2i_uncertainty"], entropy(cosine, 20.0), atol=2e-4)


def without_train(cache):
    for file in (cache / "train").iterdir():
        file.unlink()


def of_another_clip(cache):
    make_cache("tiny", splits=["train"], meta={"model": "none", "pretrained": "other"})


def of_another_width(cache):
    make_cache("tiny", splits=["train"], dim=32)
    (cache / "texts" / "ladder.pt").unlink()
    (cache / "texts" / "ladder.json").unlink()


def torn(cache):
    (cache / "train" / "image.pt").write_bytes(b"torn")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_train, ["no train split", "--split train"]),
        (of_another_clip, ["different CLIPs"]),
        (of_another_width, ["different CLIPs"]),
        (torn, ["train/image.pt"]),
    ],
)
def test_without_a_train_split_of_the_same_clip_the_rows_are_left_out_in_one_line(
    trained, capsys, change, words
):
    change(Path("embeddings/tiny"))
    assert run_script(eval_script.main, [str(argument) for argument in EVAL]) == 0
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if "left out" in line]
    assert all(word in line for word in words), line
    assert not any(name in captured.out for name in ROWS)
    assert "softmax-entropy" in captured.out
    assert not list(Path("results/tiny/baselines").glob("reference*"))
