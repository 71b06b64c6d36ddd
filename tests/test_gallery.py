"""What cosines with the gallery tell of a text's uncertainty, against the definitions in float64 and autograd."""

from pathlib import Path

import numpy as np
import pytest
import torch

import eval as eval_script
from datasets.embedding import EmbeddingCache
from models import METHODS
from models.base import SMALL
from tests.conftest import load_result, make_cache
from utils.checkpoint import save_adaptor
from utils.evaluation import training_free
from utils.evaluation.scorers import FrozenScorer
from utils.evaluation.training_free import Gallery, every_scorer

EVAL = ("--dataset", "tiny", "--no-plots", "--resamples", 100)


def differentiated(image, z):
    """The margin of one text with the gradient taken by autograd."""
    z = z.double().requires_grad_()
    cosine = torch.nn.functional.cosine_similarity(z[None], image.double())
    first, second = cosine.topk(2).values
    (gradient,) = torch.autograd.grad(first - second, z)
    return torch.tanh((first - second) / (gradient.norm() + 1e-8)).item()


@pytest.mark.parametrize("rows", [50, 4096])
def test_top1_and_margin_equal_their_definitions(workdir, monkeypatch, rows):
    monkeypatch.setattr(training_free, "GALLERY_TEXTS", rows)
    make_cache("tiny")
    cache = EmbeddingCache("tiny", "val")
    image, text = cache.image.read(), cache.text.read().clone()
    text *= torch.linspace(0.1, 20, len(text))[:, None].to(
        text.dtype
    )  # the margin knows how long a text's vector is
    found = Gallery(FrozenScorer(cache)).compare(text)
    unit = [
        z.double().numpy() / np.linalg.norm(z.double().numpy(), axis=1)[:, None]
        for z in (image, text)
    ]
    np.testing.assert_allclose(-found["top1-cosine"], (unit[0] @ unit[1].T).max(axis=0), atol=1e-5)
    expected = [differentiated(image, z) for z in text]
    np.testing.assert_allclose(-found["margin"], expected, atol=1e-4)
    assert np.ptp(expected) > 0.1


@pytest.mark.parametrize("texts", [1, 7, 640])
def test_captions_are_compared_as_any_texts_are_whatever_the_batch(workdir, monkeypatch, texts):
    make_cache("tiny")
    cache = EmbeddingCache("tiny", "val")
    expected = Gallery(FrozenScorer(cache)).compare(cache.text.read())
    monkeypatch.setattr(training_free, "GALLERY_TEXTS", texts)
    scorers = {scorer.row.method: scorer for scorer in every_scorer(cache, {})}
    for name, values in expected.items():
        of_captions = scorers[name].caption_uncertainty()
        np.testing.assert_allclose(of_captions, values, rtol=1e-5, atol=1e-5, err_msg=name)
        of_texts = scorers[name].text_uncertainty(cache.captions, cache.text.read())
        np.testing.assert_array_equal(of_texts, of_captions)
        assert np.ptp(values) > 0.1


def test_a_gallery_of_one_image_has_no_margin(workdir):
    make_cache("tiny", images=1)
    cache = EmbeddingCache("tiny", "val")
    found = Gallery(FrozenScorer(cache)).compare(cache.text.read())
    assert (found["margin"] == 0).all()
    assert (found["softmax-entropy"] == 0).all()


def test_both_are_evaluated_and_compared_like_any_baseline(script):
    make_cache("tiny")
    save_adaptor(
        METHODS["asymvlm-psd"](64),
        "asymvlm-psd",
        SMALL,
        {},
        Path("checkpoints/tiny/0/asymvlm-psd.pt"),
    )
    assert script(eval_script.main, *EVAL)[0] == 0
    for name in ("top1-cosine", "margin"):
        arrays = load_result("tiny", "baselines", name)[1]
        assert (arrays["i2t_uncertainty"] == arrays["t2i_uncertainty"][arrays["i2t_top1"]]).all()
        assert (
            arrays["t2i_rank"] == load_result("tiny", "baselines", "softmax-entropy")[1]["t2i_rank"]
        ).all()
    assert (
        "| gallery |" in Path("results/tiny/t2i.md").read_text().split("margin")[1].splitlines()[0]
    )
    assert script(eval_script.main, *EVAL, "--compare", "margin", "top1-cosine")[0] == 0
