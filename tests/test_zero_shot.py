"""Zero-shot classification: image folders, every equation against a slow loop, and the script."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import cache_embeddings
import eval as eval_script
import train as train_script
from datasets.embedding import EmbeddingCache
from tests.conftest import draw
from utils.questions import zero_shot
from utils.questions.zero_shot import Answers, Prompts

C, P, N, D = 3, 4, 12, 5


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Prompts(
        text=torch.nn.functional.normalize(random(C, P, D), dim=-1),
        image=torch.nn.functional.normalize(random(N, D), dim=-1),
        uncertainty=random(C, P).exp(),
        text_variance=(random(C, P, D) - 3).exp(),
        image_variance=(random(N, D) - 3).exp(),
        log_likelihood=random(N, C, P),
        scale=7.0,
    )


@pytest.fixture
def weights():
    values = torch.rand(C, P, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return values / values.sum(dim=1, keepdim=True)


def slow_vector(prompts, weights, c):
    return [
        sum(weights[c, p].item() * prompts.text[c, p, d].item() for p in range(P)) for d in range(D)
    ]


def test_plain_and_unit_scores_equal_slow_loops(prompts, weights):
    plain = zero_shot.plain_logits(prompts, weights)
    renormalised = zero_shot.unit_logits(prompts, weights)
    for n in range(N):
        for c in range(C):
            w = slow_vector(prompts, weights, c)
            dot = sum(prompts.image[n, d].item() * w[d] for d in range(D))
            assert plain[n, c].item() == pytest.approx(7.0 * dot)
            norm = math.sqrt(sum(x * x for x in w))
            assert renormalised[n, c].item() == pytest.approx(7.0 * dot / norm)


def test_variance_aware_scores_equal_slow_loops(prompts, weights):
    found = zero_shot.variance_logits(prompts, weights)
    for n in range(N):
        for c in range(C):
            expected = sum(weights[c, p] * prompts.log_likelihood[n, c, p] for p in range(P))
            assert found[n, c].item() == pytest.approx(expected.item())
    prompts.log_likelihood = None
    found = zero_shot.variance_logits(prompts, weights)
    for n in range(N):
        for c in range(C):
            w = slow_vector(prompts, weights, c)
            expected = 100 * sum(prompts.image[n, d].item() * w[d] for d in range(D))
            for p in range(P):
                for d in range(D):
                    expected -= 50 * (weights[c, p] ** 2 * prompts.text_variance[c, p, d]).item()
            assert found[n, c].item() == pytest.approx(expected)
    prompts.text_variance = None
    assert zero_shot.variance_logits(prompts, weights) is None
    assert zero_shot.probit_logits(prompts, weights) is None


def test_probit_scores_equal_a_slow_loop(prompts, weights):
    found = zero_shot.probit_logits(prompts, weights)
    for n in range(N):
        for c in range(C):
            z_text = slow_vector(prompts, weights, c)
            a_text = [
                sum((weights[c, p] ** 2 * prompts.text_variance[c, p, d]).item() for p in range(P))
                for d in range(D)
            ]
            z_image, a_image = prompts.image[n].tolist(), prompts.image_variance[n].tolist()
            n_image = sum(z * z + a for z, a in zip(z_image, a_image, strict=True))
            n_text = sum(z * z + a for z, a in zip(z_text, a_text, strict=True))
            e = sum(x * y for x, y in zip(z_image, z_text, strict=True))
            e /= math.sqrt(n_image * n_text)
            v = 0.0
            for d in range(D):
                v += (z_image[d] ** 2 + a_image[d]) * a_text[d] + a_image[d] * z_text[d] ** 2
            v /= n_image * n_text
            expected = 7.0 * e / math.sqrt(1 + math.pi * 49.0 * v / 8)
            assert found[n, c].item() == pytest.approx(expected)


def test_weights_equal_slow_loops(prompts):
    u = prompts.uncertainty
    found = zero_shot.weightings_of(prompts)
    names = ["uniform", "top 1", "top 2", "top 3", "top 4", "threshold", "inverse", "BPRW"]
    assert list(found) == names
    for weights in found.values():
        assert weights.sum(dim=1).tolist() == pytest.approx([1.0] * C)
    for c in range(C):
        order = sorted(range(P), key=lambda p: u[c, p].item())
        for count in range(1, P + 1):
            chosen = {p for p in range(P) if found[f"top {count}"][c, p] > 0}
            assert chosen == set(order[:count])
        limit = np.mean(u[c].tolist())
        kept = [p for p in range(P) if u[c, p] <= limit]
        for p in range(P):
            expected = 1 / len(kept) if p in kept else 0.0
            assert found["threshold"][c, p].item() == pytest.approx(expected)
            inverse = (1 / u[c, p]) / sum(1 / u[c, q] for q in range(P))
            assert found["inverse"][c, p].item() == pytest.approx(inverse.item())
    assert torch.equal(found["top 4"], found["uniform"])


def test_mixture_weights_equal_a_slow_em_and_find_the_prompt_that_made_the_samples(prompts):
    rng = np.random.default_rng(0)
    mean, variance = prompts.text[0].numpy(), prompts.text_variance[0].numpy() + 0.02
    samples = mean[2] + np.sqrt(variance[2]) * rng.normal(size=(40, D))
    start = 1 / variance.mean(axis=1)
    weights = start / start.sum()
    for _ in range(2000):
        total = np.zeros(P)
        for sample in samples:
            density = np.array(
                [
                    weights[p] * stats.norm.pdf(sample, mean[p], np.sqrt(variance[p])).prod()
                    for p in range(P)
                ]
            )
            total += density / density.sum()
        new = np.clip((total + 5 - 1) / (len(samples) + P * (5 - 1)), 0, None)
        new /= new.sum()
        if np.abs(new - weights).max() < 1e-12:
            break
        weights = new
    found = zero_shot.fit_mixture(*map(torch.from_numpy, (samples, mean, variance, start)))
    np.testing.assert_allclose(found.numpy(), new, atol=1e-9)
    assert found.argmax() == 2


def test_metrics_equal_plain_ones():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(200, 7)))
    label = rng.integers(7, size=200)
    u = torch.from_numpy(rng.random(7))
    found = Answers.of(logits, label, u).measure()
    p = torch.softmax(logits, dim=1).numpy()
    answer = p.argmax(axis=1)
    order = np.argsort(-p, axis=1)
    assert found["top-1"] == np.mean(answer == label)
    assert found["top-5"] == np.mean([label[i] in order[i, :5] for i in range(200)])
    assert found["NLL"] == pytest.approx(-np.mean(np.log(p[np.arange(200), label])))
    confidence, ece = p.max(axis=1), 0.0
    for low in range(20):
        inside = (confidence >= low / 20) & (confidence < (low + 1) / 20)
        if inside.any():
            gap = (answer == label)[inside].mean() - confidence[inside].mean()
            ece += inside.mean() * abs(gap)
    assert found["ECE"] == pytest.approx(ece)
    weight = rng.integers(0, 3, (4, 200))
    together = Answers.of(logits, label, u).measure(weight)
    for row, value in zip(weight, together["top-1"], strict=True):
        assert value == pytest.approx(np.average(answer == label, weights=row))


# Folders of images.


def folders(root, classes=("a_cat", "dog"), images=3, split="val"):
    for number, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for image in range(images):
            draw(root / split / name / f"{image}.png", 10 * number + image)
    return root


# Through the scripts.


@pytest.fixture
def cached(script, tiny):
    root = folders(Path("mine"), images=12)
    folders(root, images=12, split="train")
    Image.new("RGB", (4, 4)).save(root / "val" / "dog" / "z.png")
    (root / "val" / "dog" / "broken.png").write_bytes(b"x")
    clip = ("--model", tiny[0], "--pretrained", tiny[1], "--device", "cpu", "--workers", 0)
    flags = ("--dataset", "imagefolder", "--data-root", root, "--name", "mine", *clip)
    assert script(cache_embeddings.main, *flags)[0] == 2
    assert script(cache_embeddings.main, *flags, "--skip-broken")[0] == 0


def test_a_folder_of_images_is_classified_by_methods_of_all_kinds(script, cached):
    methods = ("asymvlm-psd", "asymvlm-psd-image", "asymvlm-vmf-both", "probvlm", "pfe", "pcmepp")
    train = ("--dataset", "mine", "--recipe", "small", "--epochs", 1, "--batch-size", 5)
    run = (*train, "--method", *methods, "--seed", 0, 1)
    assert script(train_script.main, *run)[0] == 0, script.stderr
    flags = ("--dataset", "mine", "--method", *methods, "--seed", 0, 1)
    run = (*flags, "--resamples", 20, "--no-plots")
    assert script(eval_script.main, *run)[0] == 0, script.stderr
    status, printed, _ = script(eval_script.main, *flags, "--zero-shot", "--resamples", 20)
    assert status == 0
    folder = Path("results/mine")
    assert printed == (folder / "zero-shot.md").read_text()
    assert printed.splitlines()[2].startswith("| frozen CLIP | uniform | unit |")
    rows = {tuple(line.split(" | ")[:2]) for line in printed.splitlines()[2:]}
    assert ("| pfe", "BPRW") in rows and ("| probvlm", "inverse") in rows
    assert ("| asymvlm-psd-image", "uniform") in rows
    assert ("| asymvlm-psd-image", "inverse") not in rows
    every = (folder / "zero-shot-all.md").read_text()
    assert "| pcmepp | top 5 | probit |" in every and "| asymvlm-psd | top 1 | variance |" in every
    assert (folder / "zero-shot.png").stat().st_size > 1000
    lines = (folder / "zero-shot.csv").read_text().splitlines()
    assert lines[0] == "method,weighting,score,metric,mean,std,low,high"
    assert len(lines) > 100
    cache = EmbeddingCache("mine", "val")
    assert len(cache.text) == 10 and cache.meta["skipped"][0][0] == "dog/broken.png"


def test_a_cache_without_classes_says_how_to_make_one(script, workdir):
    from tests.conftest import make_cache

    make_cache("tiny")
    train = ("--dataset", "tiny", "--recipe", "small", "--epochs", 1)
    assert script(train_script.main, *train)[0] == 0
    status, _, line = script(eval_script.main, "--dataset", "tiny", "--zero-shot")
    assert status == 2
    assert "it has no classes; make a cache with --dataset imagefolder" in line
