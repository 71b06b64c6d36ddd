"""The rivals as their own authors build them: each term against a slow loop over pairs and coordinates, in float64."""

import math

import numpy as np
import pytest
import torch

from models import GROUPS, METHODS, expand_groups
from models.base import Recipe, total_loss
from models.layers import unit
from models.pcmepp import loss as pcmepp
from models.pfe import loss as pfe
from models.prolip import loss as prolip


def gaussians(batch=6, dim=5, rows=None):
    """mean and log_var of images and texts in float64, of which images 0, 3 and 5, and 1 and 4 are the same."""
    generator = torch.Generator().manual_seed(1)
    mean_image, mean_text = unit(
        torch.randn(2, batch, dim, generator=generator, dtype=torch.float64)
    ).unbind()
    log_var_image, log_var_text = (
        torch.randn(2, batch, dim, generator=generator, dtype=torch.float64) - 2
    )
    images = torch.tensor([0, 1, 2, 0, 1, 0])
    return mean_image[images], log_var_image[images], mean_text, log_var_text


def agree(fast, slow, arguments):
    """Whether two functions of tensors have the same value and gradients, none of which is 0."""
    arguments = [x.clone().requires_grad_() for x in arguments]
    values = total_loss(fast(*arguments)), slow(*arguments)
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-9)
    gradients = [torch.autograd.grad(value, arguments) for value in values]
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())


def same_image(mean_image, i, j):
    return bool((mean_image[i] == mean_image[j]).all())


# PFE.


def slow_pfe(mean_image, var_image, mean_text, var_text):
    def one(mean, var, other_mean, other_var):
        total = 0
        for d in range(len(mean)):
            v = var[d] + other_var[d]
            total = total + (mean[d] - other_mean[d]) ** 2 / (1e-10 + v) + torch.log(v)
        return total

    pairs = [
        one(mean_image[b], var_image[b], mean_text[b], var_text[b]) for b in range(len(mean_image))
    ]
    for i in range(len(mean_image)):
        for j in range(i + 1, len(mean_image)):
            if same_image(mean_image, i, j):
                pairs.append(one(mean_text[i], var_text[i], mean_text[j], var_text[j]))
    assert len(pairs) == 6 + 3 + 1
    return sum(pairs) / len(pairs)


def test_pfes_loss_is_over_all_pairs_of_an_image():
    mean_image, log_var_image, mean_text, log_var_text = gaussians()
    arguments = mean_image, log_var_image.exp(), mean_text, log_var_text.exp()
    agree(pfe.mutual_likelihood_loss_within_images, slow_pfe, arguments)


def test_pfes_loss_of_different_images_is_that_of_the_true_pairs():
    z = torch.randn(4, 7, 5, dtype=torch.float64).exp().unbind()
    of_all_pairs = pfe.mutual_likelihood_loss_within_images(*z)
    assert of_all_pairs.item() == pytest.approx(pfe.mutual_likelihood_loss(*z).item(), rel=1e-8)


@pytest.mark.parametrize("largest", [3.0, 1e6])  # variance; the least is its inverse
def test_mutual_likelihood_score_equals_a_slow_loop(largest, monkeypatch):
    monkeypatch.setattr(pfe, "BLOCK", (3, 4))  # 5 x 7 pairs are several, and the last are smaller
    generator = torch.Generator().manual_seed(0)
    mean_image, mean_text = (
        torch.randn(n, 40, generator=generator, dtype=torch.float64) for n in (5, 7)
    )
    var_image, var_text = (
        largest ** (2 * torch.rand(n, 40, generator=generator).double() - 1) for n in (5, 7)
    )
    slow = torch.zeros(5, 7, dtype=torch.float64)
    for i in range(5):
        for j in range(7):
            for d in range(40):
                v = var_image[i, d] + var_text[j, d]
                slow[i, j] -= (mean_image[i, d] - mean_text[j, d]) ** 2 / v + math.log(v)
    arguments = mean_image, var_image, mean_text, var_text
    np.testing.assert_allclose(pfe.mutual_likelihood_score(*arguments), slow, rtol=1e-9)
    np.testing.assert_allclose(
        pfe.mutual_likelihood_score(*(x.float() for x in arguments)), slow, rtol=1e-5
    )
    assert pfe.mutual_likelihood_score(
        mean_image, var_image, mean_text[:0], var_text[:0]
    ).shape == (5, 0)


def test_pfes_head_is_scaled_batch_norms():
    torch.manual_seed(0)
    head = METHODS["pfe-original"](8).double().text_head
    z = 3 * torch.randn(50, 8, dtype=torch.float64)
    first, norm, _, second, _ = head.layers
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = z @ first.weight.T
    mean, var = x.mean(dim=0), x.var(dim=0, unbiased=False)
    x = ((x - mean) / (var + 1e-3).sqrt() * norm.weight + norm.bias).clamp_min(0) @ second.weight.T
    x = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-3).sqrt()
    torch.testing.assert_close(head(z), 1e-6 + (1e-4 * x - 7).exp(), rtol=1e-9, atol=0)
    torch.testing.assert_close(norm.running_mean, 0.005 * mean)  # from 0 and 1
    torch.testing.assert_close(
        norm.running_var, 0.995 + 0.005 * var * 50 / 49
    )  # torch keeps the unbiased one
    head.eval()
    torch.testing.assert_close(
        head(z)[:3], head(z[:3]), rtol=1e-12, atol=0
    )  # the running averages' turn


def test_pfes_batch_norm_takes_a_batch_of_one_by_the_running_averages():
    head = METHODS["pfe-original"](8).double().text_head
    for _ in range(100):
        head(3 * torch.randn(50, 8, dtype=torch.float64))
    before = {name: value.clone() for name, value in head.state_dict().items()}
    z = torch.randn(1, 8, dtype=torch.float64)
    one = head(z)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert torch.equal(one, head.eval()(z))


def test_the_state_of_pfes_batch_norm_is_as_it_always_was():
    """A checkpoint has the weights and running averages of both norms, and no count of batches."""
    adaptor = METHODS["pfe-original"](8)
    heads = ("image_head", "text_head")
    norms = (
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "4.running_mean",
        "4.running_var",
    )
    names = {f"{head}.layers.{norm}" for head in heads for norm in norms}
    names |= {
        f"{head}.{name}"
        for head in heads
        for name in ("layers.0.weight", "layers.3.weight", "gain", "bias")
    }
    assert set(adaptor.state_dict()) == names
    weights = {name: torch.rand_like(value) for name, value in adaptor.state_dict().items()}
    adaptor.load_state_dict(weights)  # a plain dict, as a file gives it
    assert all(torch.equal(value, weights[name]) for name, value in adaptor.state_dict().items())


# PCME++.


def slow_bce(logits, labels):
    total, batch = 0, len(logits)
    for i in range(batch):
        for j in range(batch):
            p = 1 / (1 + torch.exp(-logits[i, j]))
            total = total - labels[i][j] * torch.log(p) - (1 - labels[i][j]) * torch.log(1 - p)
    return total / batch**2


def slow_pcmepp(mean_image, log_var_image, mean_text, log_var_text, shift, negative_scale):
    batch, dim = mean_image.shape
    logits = torch.zeros(batch, batch, dtype=torch.float64)
    for i in range(batch):
        for j in range(batch):
            csd = (
                (mean_image[i] - mean_text[j]) ** 2 + log_var_image[i].exp() + log_var_text[j].exp()
            ).sum()
            logits[i, j] = -negative_scale * csd + shift
    match, rows, columns = ([[1e-4] * batch for _ in range(batch)] for _ in range(3))
    for i in range(batch):
        for j in range(batch):
            if same_image(mean_image, i, j):
                match[i][j] = rows[i][j] = columns[i][j] = 1 - 1e-4
            first_of_row = min(k for k in range(batch) if same_image(mean_image, i, k))
            first_of_column = min(k for k in range(batch) if same_image(mean_image, k, j))
            if logits[i, j] >= logits[i, first_of_row]:
                rows[i][j] = 1 - 1e-4
            if logits[i, j] >= logits[first_of_column, j]:
                columns[i][j] = 1 - 1e-4
    assert match != rows != columns != match
    kl = 0
    for mean, s in ((mean_image, log_var_image), (mean_text, log_var_text)):
        for b in range(batch):
            for d in range(dim):
                kl = kl - (1 + s[b, d] - mean[b, d] ** 2 - torch.exp(s[b, d])) / 2 / (batch * dim)
    pseudo = slow_bce(logits, rows) + slow_bce(logits, columns)
    return 2 * slow_bce(logits, match) + 1e-4 * kl + 0.1 * pseudo


def test_pcmepps_loss_equals_a_slow_loop():
    scalars = torch.tensor(4.0, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64)
    agree(pcmepp.original_loss, slow_pcmepp, (*gaussians(), *scalars))


def test_pcmepps_loss_of_an_image_that_is_twice_in_the_batch_is_the_authors():
    angles = {"image": [0.0, 0.0, np.pi / 2], "text": [0.1, 0.9, 0.5]}
    image, text = (
        torch.tensor(np.stack([np.cos(angle), np.sin(angle)], axis=1)) for angle in angles.values()
    )
    log_var = torch.full((3, 2), -5.0, dtype=torch.float64)
    terms = pcmepp.original_loss(image, log_var, text, log_var, 5.0, 5.0)
    assert sum(terms.values()).item() == pytest.approx(2.6932, abs=5e-5)


def test_pseudo_positives_are_what_beats_the_first_match_of_a_row():
    logits = torch.tensor([[1.0, 2.0, 0.0], [3.0, 3.0, -1.0], [0.0, 0.0, 0.5]])
    twice = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    assert pcmepp.pseudo_positives(logits.T, twice).tolist() == [
        [True, True, False],
        [True, True, False],
        [False, False, True],
    ]
    assert pcmepp.pseudo_positives(logits.T, torch.eye(3, dtype=bool)).tolist() == [
        [True, True, False],
        [False, True, False],
        [False, False, True],
    ]
    assert pcmepp.pseudo_positives(logits, torch.eye(3, dtype=bool)).tolist() == [
        [True, True, False],
        [True, True, False],
        [False, False, True],
    ]


# ProLIP.


def slow_inclusion(mean, s, other_mean, other_s):
    """H(1, 2) of one coordinate."""
    p, q = torch.exp(-s - 20), torch.exp(-other_s - 20)
    a, b, c = p + q / 2, 2 * mean * p + other_mean * q, mean**2 * p + other_mean**2 * q / 2
    return -2 * s - other_s - torch.log(a) / 2 + b**2 / (4 * a) - c


def slow_prolip(mean_image, log_var_image, mean_text, log_var_text, log_scale, bias):
    (batch, dim), contrast, kl, inclusion = mean_image.shape, 0, 0, 0
    for i in range(batch):
        for j in range(batch):
            variances = log_var_image[i].exp().sum() + log_var_text[j].exp().sum()
            logit = log_scale.exp() * ((mean_image[i] * mean_text[j]).sum() - variances / 2) + bias
            contrast = contrast + torch.log(1 + torch.exp(-logit if i == j else logit)) / batch
    for b in range(batch):
        for d in range(dim):
            image, text = (
                (mean_image[b, d], log_var_image[b, d]),
                (mean_text[b, d], log_var_text[b, d]),
            )
            for mean, s in (image, text):
                kl = kl - (1 + s / 2 - mean**2 - torch.exp(s / 2)) / 2 / (batch * dim)
            difference = slow_inclusion(*image, *text) - slow_inclusion(*text, *image)
            x = -1000 * difference  # -log sigmoid(-x) = log(1 + exp(x)), which overflows beyond 700
            inclusion = inclusion + (x if x > 600 else torch.log(1 + torch.exp(x))) / (batch * dim)
    return contrast + 1e-4 * kl + 1e-7 * inclusion


def test_prolips_loss_equals_a_slow_loop():
    scalars = torch.tensor(0.8, dtype=torch.float64), torch.tensor(-1.5, dtype=torch.float64)
    agree(prolip.original_loss, slow_prolip, (*gaussians(), *scalars))


def test_inclusion_equals_its_definition_a_coordinate():
    mean_image, log_var_image, mean_text, log_var_text = gaussians()
    arguments = (
        mean_image,
        log_var_image - 18,
        mean_text,
        log_var_text - 18,
    )  # so that the means' part counts, too
    moved = mean_image + 1, *arguments[1:]
    assert (prolip.inclusion(*arguments) - prolip.inclusion(*moved)).abs().max() > 0.1
    agree(lambda *x: prolip.inclusion(*x).sum(), lambda *x: slow_inclusion(*x).sum(), arguments)


def test_a_narrow_gaussian_is_included_in_a_wide_one():
    mean, narrow, wide = torch.zeros(1, 4), torch.full((1, 4), -8.0), torch.full((1, 4), -2.0)
    assert (
        prolip.inclusion_loss(mean, narrow, mean, wide)
        < 1e-3
        < prolip.inclusion_loss(mean, wide, mean, narrow)
    )


@pytest.mark.parametrize("log_var", [-50.0, 50.0])
def test_inclusion_loss_is_finite_at_the_extremes(log_var):
    mean, other = torch.zeros(2, 4), torch.ones(2, 4)
    s = torch.full((2, 4), log_var, requires_grad=True)
    for arguments in ((mean, s, other, 0 * s), (mean, s, mean, s), (mean, 0 * s, other, s)):
        loss = prolip.inclusion_loss(*arguments)
        (gradient,) = torch.autograd.grad(loss, s)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


def test_prolips_scale_is_kept_in_its_range_and_keeps_its_gradient():
    torch.manual_seed(0)
    adaptor = METHODS["prolip-original"](8)
    for start, end in ((9.0, math.log(100)), (-1.0, 0.0)):
        torch.nn.init.constant_(adaptor.log_scale, start)
        adaptor(torch.randn(4, 8), torch.randn(4, 8)).backward()
        assert adaptor.log_scale.item() == pytest.approx(end)
        assert adaptor.log_scale.grad.abs() > 0


# ProbVLM.


def gg_variance(inv_alpha, beta):
    alpha, b = min(max(1 / (inv_alpha + 1e-5), 1e-4), 5.0), min(max(beta + 0.1, 0.1), 5.0)
    return alpha**2 * math.exp(math.lgamma(3 / b) - math.lgamma(1 / b))


@pytest.fixture
def probvlm():
    torch.manual_seed(0)
    return METHODS["probvlm-original"](6).double().eval()


def test_probvlm_adds_what_passes_with_the_same_masks_disagree_on(probvlm):
    z, bayescap = torch.randn(5, 6, dtype=torch.float64), probvlm.text_bayescap
    masks = torch.rand(15, 256, generator=torch.Generator().manual_seed(0)) >= 0.3
    assert 0.65 < masks.double().mean() < 0.75
    x = z / z.norm(dim=-1, keepdim=True)
    for scale, target, adapt in (
        (1, bayescap, probvlm.adapt_text),
        (100, probvlm.image_bayescap, probvlm.adapt_image),
    ):
        passes = []
        for mask in masks:
            first, _, second, _, _, third = target.mod
            h = torch.relu(second(torch.relu(first(scale * x))))
            h = third(h * mask.double() / 0.7) + scale * x
            alpha, beta = torch.relu(target.block_alpha(h)), torch.relu(target.block_beta(h))
            passes.append(torch.stack([target.block_mu(h), alpha, beta]))
        passes = torch.stack(passes).detach().numpy()  # (15, 3, N, D)
        u = np.zeros((5, 6))
        for n in range(5):
            for d in range(6):
                mean, inv_alpha, beta = passes[:, :, n, d].T
                variances = [gg_variance(a, b) for a, b in zip(inv_alpha, beta, strict=True)]
                epistemic = math.sqrt(np.var(variances, ddof=1) * np.var(mean, ddof=1))
                assert epistemic > 0
                u[n, d] = gg_variance(inv_alpha.mean(), beta.mean()) + epistemic
        expected = u.mean(axis=-1) if scale == 100 else 1 / u.mean(axis=-1)
        np.testing.assert_allclose(adapt(z)[1], expected, rtol=1e-9)


def test_probvlms_passes_depend_on_no_other_row_nor_on_what_was_drawn_before(probvlm, monkeypatch):
    z = torch.randn(9, 6, dtype=torch.float64)
    before = probvlm.adapt_text(z)[1]
    order = torch.randperm(9)
    np.testing.assert_allclose(probvlm.adapt_text(z[order])[1], before[order], rtol=1e-12)
    monkeypatch.setattr("models.probvlm.original.ROWS_AT_ONCE", 2)
    np.testing.assert_allclose(probvlm.adapt_text(z)[1], before, rtol=1e-12)
    state = torch.get_rng_state()
    assert torch.equal(probvlm.train().adapt_text(z)[1], probvlm.adapt_text(z)[1])
    probvlm.describe_text(*probvlm.encode_text(z))
    assert not torch.equal(torch.get_rng_state(), state)  # dropout in training is drawn


def test_probvlm_reconstructs_unit_texts_and_images_a_hundred_times_as_long(probvlm):
    z = torch.randn(5, 6, dtype=torch.float64)
    direction = z / z.norm(dim=-1, keepdim=True)
    *_, of_image = probvlm.encode_image(z)
    *_, of_text = probvlm.encode_text(z)
    torch.testing.assert_close(of_image, 100 * direction)
    torch.testing.assert_close(of_text, direction)


def test_dropout_drops_its_share_in_training_alone():
    torch.manual_seed(0)
    bayescap = METHODS["probvlm-original"](6).text_bayescap
    dropped = bayescap.mod[4](torch.ones(100, 256))
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.95)]
    assert (dropped == 0).float().mean() == pytest.approx(0.05, abs=0.01)
    assert torch.equal(bayescap.eval().mod[4](torch.ones(3, 256)), torch.ones(3, 256))


# What they rank by, and how they are trained.


def mutual_likelihood(mean, var, other_mean, other_var, *_):
    return -((mean - other_mean) ** 2 / (var + other_var) + (var + other_var).log()).sum()


def negative_distance(mean, log_var, other_mean, other_log_var):
    return -((mean - other_mean) ** 2 + log_var.exp() + other_log_var.exp()).sum()


def product_less_variances(mean, log_var, other_mean, other_log_var):
    return (mean * other_mean - (log_var.exp() + other_log_var.exp()) / 2).sum()


def cosine(mean, _, other_mean, __):
    return (mean * other_mean).sum() / mean.norm() / other_mean.norm()


SCORES = {
    "pfe": mutual_likelihood,
    "pcmepp": negative_distance,
    "prolip": product_less_variances,
    "probvlm": cosine,
}


@pytest.mark.parametrize("suffix", ["", "-original"])
@pytest.mark.parametrize("method", SCORES)
def test_own_scores_are_their_authors(method, suffix):
    torch.manual_seed(0)
    z_image, z_text = torch.randn(4, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    adaptor = METHODS[method + suffix](6).double().eval()
    image, text = adaptor.encode_image(z_image), adaptor.encode_text(z_text)
    found = adaptor.own_score(image, text).detach()
    score = SCORES[method]
    expected = [
        [score(image[0][i], image[1][i], text[0][j], text[1][j]).item() for j in range(5)]
        for i in range(4)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_own_scores_are_autocast_alone_where_they_are_products():
    z = torch.randn(2, 30, 64)
    for method in GROUPS["originals"]:
        torch.manual_seed(0)
        adaptor = METHODS[method](64).eval()
        image, text = adaptor.encode_image(z[0]), adaptor.encode_text(z[1])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = adaptor.own_score(image, text)
        torch.testing.assert_close(found, adaptor.own_score(image, text), rtol=1e-2, atol=1e-2)
        assert found.dtype == torch.float32


def test_recipes_are_the_authors():
    expected = {
        "probvlm": Recipe(
            "adam", lr=8e-5, weight_decay=0, batch_size=64, epochs=500, drops=(), max_steps=2001
        ),
        "pfe": Recipe(
            "sgd",
            1e-3,
            5e-4,
            batch_size=256,
            epochs=5,
            momentum=0.9,
            drops=(2 / 3,),
            decayed_from=2,
        ),
        "pcmepp": Recipe(
            *("adamw", 5e-4, 1e-4),
            **{"batch_size": 128, "epochs": 25, "drops": (0.6,), "decayed_from": 1},
            **{"clip_norm": 2.0, "ramped_epoch": 3, "averaged_after": 0.64},
        ),
        "prolip": Recipe(
            "adamw",
            5e-4,
            0.2,
            batch_size=512,
            betas=(0.9, 0.95),
            decayed_from=2,
            warm_up=0.02,
            eps=1e-6,
        ),
    }
    for method, recipe in expected.items():
        assert METHODS[f"{method}-original"].recipes == {"original": recipe}
    assert expand_groups(["pfe", "asymvlm-psd"], "original") == ["pfe-original", "asymvlm-psd"]
    assert expand_groups(["originals"], "original") == list(GROUPS["originals"])


def test_what_is_learnt_starts_where_the_authors_start():
    scalars = {"pfe": {}, "pcmepp": {"shift": 5, "negative_scale": 5}, "probvlm": {}}
    scalars["pfe"] = {
        f"{m}_head.{name}": x
        for m in ("image", "text")
        for name, x in (("gain", 1e-4), ("bias", -7))
    }
    scalars["prolip"] = {"log_scale": math.log(1 / 0.07), "bias": -10}
    for method, expected in scalars.items():
        adaptor = METHODS[f"{method}-original"](8)
        found = {name: x.item() for name, x in adaptor.named_parameters() if not x.ndim}
        assert found == pytest.approx(expected)
        for modality in ("image", "text") if method in ("pcmepp", "prolip") else ():
            bias = adaptor.get_parameter(
                f"{modality}_head.log_var.{6 if method == 'pcmepp' else 0}.bias"
            )
            assert (bias == (0 if method == "pcmepp" else -10)).all()


@pytest.mark.parametrize("method", ["pfe", "pcmepp", "prolip"])
def test_uncertainty_is_the_sum_of_the_variances(method):
    torch.manual_seed(0)
    adaptor, z = (
        METHODS[f"{method}-original"](8).double().eval(),
        torch.randn(5, 8, dtype=torch.float64),
    )
    spread = adaptor.encode_text(z)[1]
    var = spread if method == "pfe" else spread.exp()
    for found, expected in zip(adaptor.adapt_text(z), (unit(z), var.sum(dim=-1)), strict=True):
        torch.testing.assert_close(found, expected)
