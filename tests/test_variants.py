"""AsymVLM's variants: what each does otherwise, against draws, quadrature, mpmath, and AsymVLM itself."""

import json
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from scipy import special, stats

import eval as eval_script
import train as train_script
from datasets.embedding import EmbeddingCache
from models import GROUPS, METHODS
from models.asymvlm import distributions
from models.base import SMALL
from models.layers import unit
from tests.conftest import load_result, make_cache
from utils.checkpoint import load_adaptor, save_adaptor
from utils.cli import UserError
from utils.evaluation import plots
from utils.evaluation.results import load_results
from utils.evaluation.scorers import AdaptorScorer, FrozenScorer, Row, answer
from utils.questions.prompts import describe_prompts

DIM = 16
mpmath.mp.dps = 50
EACH = pytest.mark.parametrize("name", ["psd", "vmf"])


def make(method, dim=DIM):
    torch.manual_seed(0)
    return METHODS[method](dim)


def embeddings(n, dim=DIM, seed=0, dtype=torch.float64):
    return torch.randn(
        n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


# -frozen.


class Cache:
    """What a scorer and `answer` need of an EmbeddingCache."""

    def __init__(self, image, text, image_of_caption):
        self.image, self.text, self.image_of_caption = image, text, image_of_caption
        self.device, self.captions, self.judgements, self.meta = torch.device("cpu"), None, {}, {}


def crowded(dtype, dim=512):
    """Images in crowds that are alike, or alike but for one number's last bits, and captions near to them."""
    centres = embeddings(150, dim)
    image = centres.repeat(4, 1).to(dtype)  # 600 images: more than a tile
    for copy in range(1, 3):  # the fourth is the first again
        row = torch.arange(150) + 150 * copy
        integer, step = (torch.int32, 256) if dtype == torch.float32 else (torch.int16, 1)
        image[row, copy] = (image[row, copy].view(integer) + copy * step).view(dtype)
    text = (centres[torch.arange(300) % 150] + 0.5 * embeddings(300, dim, seed=1)).to(dtype)
    return Cache(image, text, torch.randperm(600, generator=torch.Generator().manual_seed(2))[:300])


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_frozen_ranks_images_exactly_as_the_frozen_clip_ties_too(name, dtype, scale):
    cache, adaptor = crowded(dtype), make(f"asymvlm-{name}-frozen", 512)
    with torch.no_grad():
        adaptor.text_mlp[-1].weight.mul_(scale)  # kappa from small to large
        adaptor.text_mlp[-1].bias.mul_(scale)
    frozen, ours = FrozenScorer(cache), AdaptorScorer(adaptor, cache)
    for field in ("rank", "top1"):
        assert (answer(ours, cache)["t2i"][field] == answer(frozen, cache)["t2i"][field]).all(), (
            field
        )
    everything = torch.arange(600), torch.arange(300)
    exact, found = (
        scorer.score(*everything).argsort(dim=0, descending=True, stable=True)
        for scorer in (frozen, ours)
    )
    assert torch.equal(exact, found)
    cosine = frozen.score(*everything)
    assert (cosine[:150] == cosine[450:]).all()  # ties there are
    assert len(cosine[:, 0].unique()) > 300  # and neighbours


@EACH
def test_frozen_scores_with_the_density_and_its_own_mean(name):
    adaptor = make(f"asymvlm-{name}-frozen").double()
    z_image, z_text = embeddings(5), embeddings(7, seed=1)
    mean, uncertainty = adaptor.adapt_text(z_text)
    torch.testing.assert_close(mean, unit(z_text), rtol=0, atol=0)
    kappa = adaptor.text_mlp(z_text).norm(dim=1)
    torch.testing.assert_close(uncertainty, 1 / kappa)
    log_prob = METHODS[f"asymvlm-{name}"].log_prob
    expected = log_prob(unit(z_image), kappa[:, None] * unit(z_text))
    torch.testing.assert_close(
        adaptor.similarity(z_image, z_text), expected, rtol=1e-12, atol=1e-12
    )


# -anchored.


@EACH
def test_anchored_is_the_scaled_direction_of_the_clip_moved_by_a_linear_step(name):
    adaptor, z = make(f"asymvlm-{name}-anchored").double(), embeddings(50)
    hidden = z
    for layer in adaptor.text_mlp[:-1]:
        hidden = layer(hidden)
    (eta,) = adaptor.encode_text(z)
    for row in range(50):
        a = hidden[row] @ adaptor.log_kappa.weight[0] + adaptor.log_kappa.bias[0]
        b = adaptor.text_mlp[-1].weight @ hidden[row] + adaptor.text_mlp[-1].bias
        expected = 20 * (0.3 * a).exp() * (z[row] / z[row].norm() + 0.2 * b / DIM**0.5)
        torch.testing.assert_close(eta[row], expected, rtol=1e-10, atol=0)


@EACH
def test_anchored_starts_with_the_ranking_of_the_clip_and_one_kappa(name):
    adaptor, z = make(f"asymvlm-{name}-anchored", 512), embeddings(200, 512, dtype=torch.float32)
    mean, uncertainty = adaptor.adapt_text(z)
    assert (mean * unit(z)).sum(dim=1).min() > 0.9999
    assert ((1 / uncertainty > 18) & (1 / uncertainty < 22)).all()
    assert torch.isfinite(
        adaptor.adapt_text(1e6 * z)[1]
    ).all()  # unlike anything that it was trained on


# -image.


@EACH
def test_image_is_asymvlm_with_the_roles_exchanged(name):
    adaptor, plain = make(f"asymvlm-{name}-image").double(), make(f"asymvlm-{name}").double()
    plain.text_mlp.load_state_dict(adaptor.image_mlp.state_dict())
    z_image, z_text = embeddings(5), embeddings(7, seed=1)
    exchanged = plain.similarity(z_text, z_image).T
    torch.testing.assert_close(
        adaptor.similarity(z_image, z_text), exchanged, rtol=1e-12, atol=1e-12
    )
    assert adaptor(z_image, z_text[:5]).item() == pytest.approx(
        plain(z_text[:5], z_image).item(), rel=1e-12
    )
    assert torch.equal(adaptor.adapt_image(z_image)[1], plain.adapt_text(z_image)[1])
    assert adaptor.adapt_text(z_text)[1] is None


# -both.


def beta_quadrature(a, b, points=60):
    """Nodes in [-1, 1] and weights of 2 Beta(a, b) - 1 (Golub & Welsch, from the recurrence of Jacobi polynomials)."""
    p, q, k = b - 1, a - 1, np.arange(1.0, points)
    s = p + q
    diagonal = np.r_[(q - p) / (s + 2), (q**2 - p**2) / ((2 * k + s) * (2 * k + s + 2))]
    beside = 4 * k * (k + p) * (k + q) * (k + s) / ((2 * k + s) ** 2 * ((2 * k + s) ** 2 - 1))
    beside[0] = 4 * (1 + p) * (1 + q) / ((2 + s) ** 2 * (3 + s))
    nodes, vectors = np.linalg.eigh(
        np.diag(diagonal) + np.diag(np.sqrt(beside), 1) + np.diag(np.sqrt(beside), -1)
    )
    return nodes, vectors[0] ** 2


def expected_log(cosine, kappa, dim):
    """E log(1 + mu_text.x) by quadrature over x's part along mu_image and its part along the rest of mu_text."""
    along, along_weight = beta_quadrature((dim - 1) / 2 + kappa, (dim - 1) / 2)
    around, around_weight = beta_quadrature((dim - 2) / 2, (dim - 2) / 2)
    t = cosine * along[:, None] + np.sqrt((1 - cosine**2) * (1 - along[:, None] ** 2)) * around
    return np.sum(along_weight[:, None] * around_weight * np.log1p(t))


def towards(kappa, cosine=1.0, dim=DIM):
    """eta (1, D) of this concentration, whose direction has this cosine with the first axis."""
    eta = torch.zeros(1, dim, dtype=torch.float64)
    eta[0, 0], eta[0, 1] = kappa * cosine, kappa * (1 - cosine**2) ** 0.5
    return eta


@pytest.mark.parametrize(("dim", "error"), [(16, 8e-4), (64, 5e-5), (512, 6e-7)])
def test_expected_power_spherical_kernel_is_as_exact_as_it_says(dim, error):
    log_c = distributions.power_spherical_log_normalizer(torch.ones(1, dtype=torch.float64), dim)
    for kappa in (1e-3, 1.0, 10.0, 100.0, 400.0, 1e3, 1e4):
        for cosine in (-1.0, -0.99, -0.9, -0.5, 0.0, 0.3, 0.6, 0.9, 1.0):
            image, text = towards(kappa, dim=dim), towards(1.0, cosine, dim)
            found = distributions.expected_power_spherical_log_prob(image, text) - log_c
            exact = expected_log(cosine, kappa, dim)
            assert abs(found.item() - exact) <= error, (kappa, cosine)
            if abs(cosine) == 1:  # a Beta itself: the quadrature is right, too
                a, b = (dim - 1) / 2 + kappa * (cosine > 0), (dim - 1) / 2 + kappa * (cosine < 0)
                assert np.log(2) + special.digamma(a) - special.digamma(a + b) == pytest.approx(
                    exact, abs=1e-9
                )


@pytest.mark.parametrize("dim", [2, 3, 16, 64, 512, 1152])
def test_mean_resultant_length_is_the_ratio_of_bessel_functions(dim):
    kappa = torch.tensor(
        [1e-6, 1e-3, 0.1, 1.0, 8.0, 50.0, 300.0, 3000.0, 1e4],
        dtype=torch.float64,
        requires_grad=True,
    )
    found = distributions.mean_resultant_length(kappa, dim)
    (gradient,) = torch.autograd.grad(found.sum(), kappa)
    for k, value, slope in zip(kappa.tolist(), found.tolist(), gradient.tolist(), strict=True):
        exact = mpmath.besseli(mpmath.mpf(dim) / 2, k) / mpmath.besseli(mpmath.mpf(dim) / 2 - 1, k)
        assert value == pytest.approx(float(exact), rel=1e-8)
        exact_slope = 1 - exact**2 - (dim - 1) * exact / mpmath.mpf(k)  # Mardia & Jupp, appendix 1
        assert slope == pytest.approx(float(exact_slope), rel=1e-6)


def draw(name, eta, count, rng):
    """Draws (count, D) from the distribution of eta (D,)."""
    kappa = np.linalg.norm(eta)
    if name == "vmf":
        return stats.vonmises_fisher(eta / kappa, kappa).rvs(count, random_state=rng)
    dim = len(eta)
    along = 2 * rng.beta((dim - 1) / 2 + kappa, (dim - 1) / 2, size=(count, 1)) - 1
    rest = rng.normal(size=(count, dim))
    rest -= (rest @ eta / kappa**2)[:, None] * eta
    return along * eta / kappa + np.sqrt(1 - along**2) * rest / np.linalg.norm(
        rest, axis=1, keepdims=True
    )


@EACH
def test_both_scores_and_learns_by_the_mean_log_likelihood_of_draws(name):
    batch, count, rng = 6, 100_000, np.random.default_rng(0)
    adaptor, log_prob = make(f"asymvlm-{name}-both").double(), METHODS[f"asymvlm-{name}"].log_prob
    adaptor.temperature.data.fill_(0.7)
    eta_image, eta_text = (
        2 * embeddings(batch),
        3 * embeddings(batch, seed=1),
    )  # kappa around 8 and 12
    mean, error = np.empty((2, batch, batch))
    for row, eta in enumerate(eta_image.numpy()):
        density = log_prob(
            torch.from_numpy(draw(name, eta, count, rng)), eta_text
        ).numpy()  # (draws, texts)
        mean[row], error[row] = density.mean(axis=0), density.std(axis=0) / count**0.5
    found = adaptor.score((eta_image,), (eta_text,)).numpy()
    assert (np.abs(found - mean) <= 5 * error + 1e-2 * (name == "psd")).all()
    assert error.max() < 0.02
    logits = torch.from_numpy(0.7 * mean)
    loss = -(logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()).mean() / 2
    assert adaptor.loss(eta_image, eta_text).item() == pytest.approx(loss.item(), abs=0.03)
    of_points = make(f"asymvlm-{name}").double().loss(unit(eta_image), eta_text).item()
    assert abs(of_points - loss.item()) > 0.3  # that a draw is not its mean is seen


@EACH
def test_both_of_a_certain_image_is_asymvlm_and_its_uncertainty_lowers_the_best_score(name):
    both, point = METHODS[f"asymvlm-{name}"].expected_log_prob, METHODS[f"asymvlm-{name}"].log_prob
    x, eta = unit(embeddings(5)), 20 * embeddings(7, seed=1)
    torch.testing.assert_close(both(1e9 * x, eta), point(x, eta), rtol=1e-5, atol=1e-4)
    scores = [both(towards(kappa), towards(50.0)).item() for kappa in (1e5, 1e3, 1e2, 1e1, 1e0)]
    assert scores == sorted(scores, reverse=True)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 1.0, 1e4, 1e7])
def test_both_is_finite_at_the_extremes(name, dtype, scale):
    adaptor = make(f"asymvlm-{name}-both", 512).to(dtype)
    x = unit(embeddings(4, 512, dtype=dtype))
    image, text = (
        (scale * x).requires_grad_(),
        torch.cat([x[:2], -x[2:]]).mul(scale + 1).requires_grad_(),
    )
    loss = adaptor.loss(image, text)
    gradients = torch.autograd.grad(loss, (image, text))
    assert all(torch.isfinite(part).all() for part in (loss, *gradients))


# -fixed-temperature, -approximate.


@EACH
def test_a_fixed_temperature_is_no_parameter_stays_one_and_is_in_the_checkpoint(name, script):
    method = f"asymvlm-{name}-fixed-temperature"
    adaptor, plain = make(method), make(f"asymvlm-{name}")
    assert [n for n, _ in adaptor.named_parameters()] == [
        n for n, _ in plain.named_parameters() if n != "temperature"
    ]
    adaptor.load_state_dict(plain.state_dict())  # a learnt one's weights fit
    z = embeddings(4, dtype=torch.float32), embeddings(4, seed=1, dtype=torch.float32)
    assert adaptor(*z).item() == plain(*z).item()  # which starts at 1
    make_cache("tiny")
    run = (
        "--dataset",
        "tiny",
        "--recipe",
        "small",
        "--epochs",
        2,
        "--batch-size",
        50,
        "--method",
        method,
    )
    assert script(train_script.main, *run)[0] == 0
    assert load_adaptor(f"checkpoints/tiny/0/{method}.pt").temperature.item() == 1
    assert "temperature" not in json.loads(
        Path(f"checkpoints/tiny/0/{method}.jsonl").read_text().splitlines()[-1]
    )


@pytest.mark.parametrize(("kappa", "error"), [(50.0, 0.0023), (300.0, 0.043), (5000.0, 0.096)])
def test_the_approximate_normaliser_is_off_by_what_is_known_of_it(kappa, error):
    kappa = torch.tensor([1e-9, kappa], dtype=torch.float64)
    exact = distributions.von_mises_fisher_log_normalizer(kappa, 512)
    none, off = (
        exact - distributions.approximate_von_mises_fisher_log_normalizer(kappa, 512)
    ).tolist()
    assert none == pytest.approx(0, abs=1e-9)
    assert off == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("dim", [16, 512])
def test_its_slope_is_the_mean_of_two_bounds_of_the_exact_one(dim):
    for k in (0.1, 8.0, 300.0, 1e4):
        kappa = torch.tensor([k], dtype=torch.float64, requires_grad=True)
        approximate = distributions.approximate_von_mises_fisher_log_normalizer(kappa, dim)
        (slope,) = torch.autograd.grad(approximate.sum(), kappa)
        a = (dim - 1) / 2
        high, low = (k / (a + (b**2 + k**2) ** 0.5) for b in (a, a + 1))
        assert low < distributions.mean_resultant_length(kappa, dim).item() < high
        assert -slope.item() == pytest.approx((low + high) / 2, rel=1e-12)


def test_exactness_moves_texts_and_no_images():
    approximate, exact = (
        make(method).double() for method in ("asymvlm-vmf-approximate", "asymvlm-vmf")
    )
    assert approximate.state_dict().keys() == exact.state_dict().keys()
    x, eta = (
        unit(embeddings(50)),
        10 ** torch.linspace(0, 3, 60, dtype=torch.float64)[:, None] * embeddings(60, seed=1),
    )
    by_text = [adaptor.score((x,), (eta,)) for adaptor in (approximate, exact)]
    assert torch.equal(*(scores.argsort(dim=0) for scores in by_text))
    difference = by_text[0] - by_text[1]
    torch.testing.assert_close(
        difference, difference[:1].expand_as(difference), rtol=0, atol=1e-9
    )  # a text's own
    assert 0.01 < torch.diff(difference[0]).abs().max() < 1


# Through the scripts.


@pytest.fixture
def evaluated(script):
    """A cache with trained and evaluated variants, plots too, the first of them without uncertain texts."""
    make_cache("tiny", relevance=[[i // 3] for i in range(120)])
    names = (
        "--dataset",
        "tiny",
        "--method",
        "asymvlm-psd-image",
        "asymvlm-psd",
        "asymvlm-psd-both",
    )
    assert script(train_script.main, *names, "--recipe", "small", "--epochs", 2)[0] == 0
    status, printed, error = script(eval_script.main, *names, "--resamples", 100)
    assert status == 0, error
    return printed


def test_a_method_of_uncertain_images_alone_is_evaluated_by_them(evaluated, script):
    result, queries = load_result("tiny", 0, "asymvlm-psd-image")
    assert result["t2i"] == result["by_image"]["t2i"]
    assert not {"t2i_uncertainty", "i2t_uncertainty"} & queries.keys()
    assert {"AURC", "S"} <= result["metrics"]["t2i"].keys()
    assert set(result["metrics"]["asymmetry"]) == {
        f"{d} {f} by image" for d in ("t2i", "i2t") for f in ("AURC", "AUROC")
    }
    assert set(result["metrics"]["ambiguity"]) == {
        "R@1_described"
    }  # the caption's ambiguity has no counterpart
    assert "ladder" not in result
    assert len(load_result("tiny", 0, "asymvlm-psd-both")[0]["metrics"]["asymmetry"]) == 8
    assert (
        evaluated.count("asymvlm-psd-image") == 12
    )  # levels, directions, ambiguity, kept, of both scores; no ladder
    assert "| asymvlm-psd-image | -" in Path("results/tiny/comparison.md").read_text()
    assert all(
        Path(f"results/tiny/{name}.png").exists()
        for name in ("levels", "levels-image", "length", "ladder")
    )
    compared = script(
        eval_script.main,
        "--dataset",
        "tiny",
        "--resamples",
        100,
        "--compare",
        *GROUPS["variants"][2::-2],
    )
    assert compared[0] == 2
    for pair in (("asymvlm-psd-image", "asymvlm-psd"), ("softmax-entropy", "asymvlm-psd-image")):
        status, printed, _ = script(
            eval_script.main, "--dataset", "tiny", "--resamples", 100, "--compare", *pair
        )
        assert status == 0
        assert "AURC" in printed
        assert "spearman" not in printed
    lines = Path("checkpoints/tiny/0/asymvlm-psd-image.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["ladder"] is None


@pytest.mark.parametrize("question", [("--most-uncertain", 2), ("--least-uncertain", 2)])
def test_what_asks_for_the_uncertainty_of_a_text_says_that_there_is_none(question, script):
    make_cache("tiny")
    path = Path("checkpoints/tiny/0/asymvlm-vmf-image.pt")
    save_adaptor(make("asymvlm-vmf-image", 64), "asymvlm-vmf-image", SMALL, {}, path)
    status, printed, error = script(
        eval_script.main, "--dataset", "tiny", "--method", "asymvlm-vmf-image", *question
    )
    assert (status, printed) == (2, "")
    assert "--method asymvlm-vmf-image: its images are uncertain, its texts are not" in error
    adaptor, cache = load_adaptor(path), EmbeddingCache("tiny", "val")
    with pytest.raises(UserError, match="asymvlm-vmf-image"):
        describe_prompts(adaptor, cache, ["a"], cache.text[:1])


def test_rows_of_unknown_names_look_different(evaluated, tmp_path):
    names = [f"unknown {number}" for number in range(20)]
    runs = load_results(Path("results/tiny"), Row("asymvlm-psd-both"), [0], "val")
    rows = {Row(name): runs for name in ("asymvlm-psd", *names)}
    assert "levels.png" in plots.draw_all(rows, [], tmp_path)
    seen = plots.looks_of(["asymvlm-psd", *names])
    assert (*seen["asymvlm-psd"].values(),) == plots.LOOKS["asymvlm-psd"]
    assert len({tuple(seen[name].items()) for name in names}) == 20
    assert not {seen[name]["color"] for name in names} & {
        colour for colour, _, _ in plots.LOOKS.values()
    }
