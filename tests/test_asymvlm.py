"""AsymVLM's densities and loss against mpmath, the golden file, and slow loops from the equations."""

import json
import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.asymvlm import distributions
from models.asymvlm.adaptor import PowerSphericalAdaptor, VonMisesFisherAdaptor
from models.asymvlm.distributions import (
    KAPPA_MIN,
    concentration,
    power_spherical_log_normalizer,
    power_spherical_log_prob,
    von_mises_fisher_log_normalizer,
    von_mises_fisher_log_prob,
)
from models.layers import symmetric_cross_entropy, unit

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())
DIMS = [2, 3, 4, 5, 8, 12, 16, 64, 128, 512, 768, 1152]  # below 16 by recurrence
KAPPAS = [1e-6, 1e-3, 0.1, 1.0, 8.0, 50.0, 300.0, 3000.0, 1e4]
mpmath.mp.dps = 50


def log_uniform_density(dim):
    """log C(0), minus the log of the sphere's area (DLMF 5.19.4)."""
    return math.lgamma(dim / 2) - math.log(2) - dim / 2 * math.log(math.pi)


def exact_vmf(kappa, dim):
    v = mpmath.mpf(dim) / 2 - 1
    return (
        v * mpmath.log(kappa)
        - mpmath.mpf(dim) / 2 * mpmath.log(2 * mpmath.pi)
        - mpmath.log(mpmath.besseli(v, kappa))
    )


def exact_vmf_gradient(kappa, dim):
    v = mpmath.mpf(dim) / 2
    return -mpmath.besseli(v, kappa) / mpmath.besseli(v - 1, kappa)


def exact_power_spherical(kappa, dim):
    b = mpmath.mpf(dim - 1) / 2
    a = b + kappa
    return -(
        (a + b) * mpmath.log(2)
        + mpmath.loggamma(a)
        - mpmath.loggamma(a + b)
        + b * mpmath.log(mpmath.pi)
    )


def exact_uniform(dim):
    half = mpmath.mpf(dim) / 2
    return (
        mpmath.loggamma(half) - mpmath.log(2) - half * mpmath.log(mpmath.pi)
    )  # 1 / surface of the sphere


@pytest.mark.parametrize("dim", DIMS)
def test_vmf_normalizer_is_exact_in_value_and_gradient(dim):
    kappa = torch.tensor(KAPPAS, dtype=torch.float64, requires_grad=True)
    value = von_mises_fisher_log_normalizer(kappa, dim)
    (gradient,) = torch.autograd.grad(value.sum(), kappa)
    single = von_mises_fisher_log_normalizer(kappa.detach().float(), dim)
    for k, v, g, s in zip(KAPPAS, value.tolist(), gradient.tolist(), single.tolist(), strict=True):
        exact = float(exact_vmf(k, dim) - exact_uniform(dim))
        exact_gradient = float(exact_vmf_gradient(k, dim))
        assert abs(v - exact) <= 1e-6 * max(1, abs(exact))
        assert g == pytest.approx(exact_gradient, rel=1e-6)
        assert abs(s - exact) <= 2e-3


@pytest.mark.parametrize("dim", DIMS)
def test_power_spherical_normalizer_is_exact_in_value_and_gradient(dim):
    kappa = torch.tensor(KAPPAS, dtype=torch.float64, requires_grad=True)
    value = power_spherical_log_normalizer(kappa, dim)
    (gradient,) = torch.autograd.grad(value.sum(), kappa)
    single = power_spherical_log_normalizer(kappa.detach().float(), dim)
    for k, v, g, s in zip(KAPPAS, value.tolist(), gradient.tolist(), single.tolist(), strict=True):
        exact = float(exact_power_spherical(k, dim) - exact_uniform(dim))
        exact_gradient = float(
            -(
                mpmath.log(2)
                + mpmath.digamma((dim - 1) / mpmath.mpf(2) + k)
                - mpmath.digamma(dim - 1 + mpmath.mpf(k))
            )
        )
        assert abs(v - exact) <= 1e-9 * max(1, abs(exact))
        assert g == pytest.approx(exact_gradient, rel=1e-9)
        assert abs(s - exact) <= 1e-5 * max(1, abs(exact))


def test_vmf_normalizer_matches_golden_values():
    for entry in GOLDEN["vmf_log_normalizer_exact"]:
        kappa = torch.tensor(entry["kappa"], dtype=torch.float64)
        value = von_mises_fisher_log_normalizer(kappa, entry["dim"]).item() + log_uniform_density(
            entry["dim"]
        )
        assert abs(value - entry["value"]) <= 1e-6 * max(1, abs(entry["value"]))


@pytest.mark.parametrize(
    "log_normalizer", [power_spherical_log_normalizer, von_mises_fisher_log_normalizer]
)
@pytest.mark.parametrize("dim", [16, 512])
def test_normalizers_tend_to_the_uniform_density(log_normalizer, dim):
    assert log_uniform_density(dim) == pytest.approx(float(exact_uniform(dim)), rel=1e-14)
    assert log_normalizer(torch.tensor(1e-9, dtype=torch.float64), dim).item() == pytest.approx(
        0, abs=1e-7
    )


def test_normalizers_tend_to_their_limits_at_large_kappa():
    kappa = torch.tensor(1e7, dtype=torch.float64)
    b, v = (16 - 1) / 2, 16 / 2 - 1
    power_spherical = b * math.log(1e7 / (4 * math.pi)) - 1e7 * math.log(2)
    uniform = log_uniform_density(16)
    assert power_spherical_log_normalizer(
        kappa, 16
    ).item() + uniform - power_spherical == pytest.approx(0, abs=1e-4)
    von_mises_fisher = (v + 0.5) * math.log(1e7 / (2 * math.pi)) - 1e7
    assert von_mises_fisher_log_normalizer(
        kappa, 16
    ).item() + uniform - von_mises_fisher == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("log_prob", [power_spherical_log_prob, von_mises_fisher_log_prob])
@pytest.mark.parametrize("kappa", [0.5, 20.0, 400.0])
@pytest.mark.parametrize("dim", [16, 64])
def test_density_integrates_to_one(log_prob, kappa, dim):
    t = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[
        1:-1
    ]  # mu.x; the sphere is cut into rings of constant t
    x = torch.zeros(len(t), dim, dtype=torch.float64)
    x[:, 0], x[:, 1] = t, torch.sqrt(1 - t**2)
    eta = torch.zeros(1, dim, dtype=torch.float64)
    eta[0, 0] = kappa
    ring = (
        math.log(2) + (dim - 1) / 2 * math.log(math.pi) - math.lgamma((dim - 1) / 2)
    )  # surface of a ring's sphere
    density = torch.exp(
        log_prob(x, eta)[:, 0]
        + log_uniform_density(dim)
        + ring
        + (dim - 3) / 2 * torch.log1p(-(t**2))
    )
    assert torch.trapezoid(density, t).item() == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize(
    ("method", "log_prob"),
    [("asymvlm-psd", power_spherical_log_prob), ("asymvlm-vmf", von_mises_fisher_log_prob)],
)
def test_similarity_and_loss_match_the_golden_file(method, log_prob):
    golden = GOLDEN[method]
    adaptor = {"asymvlm-psd": PowerSphericalAdaptor, "asymvlm-vmf": VonMisesFisherAdaptor}[method](
        16
    ).double()
    adaptor.temperature.data.fill_(golden["temperature"])
    (x,) = adaptor.encode_image(torch.tensor(golden["z_image"], dtype=torch.float64))
    eta = torch.tensor(golden["eta"], dtype=torch.float64)
    similarity = np.array(golden["similarity"]) - log_uniform_density(16)
    np.testing.assert_allclose(
        log_prob(x, eta).numpy(), similarity, rtol=1e-9, atol=1e-8
    )  # logs cancel where kappa is small
    np.testing.assert_allclose(
        adaptor.score((x,), (eta,)).numpy(), similarity, rtol=1e-9, atol=1e-8
    )
    assert adaptor.loss(x, eta).item() == pytest.approx(golden["loss"], rel=1e-9)


@pytest.mark.parametrize("adaptor_class", [PowerSphericalAdaptor, VonMisesFisherAdaptor])
def test_loss_and_gradient_equal_a_slow_loop_over_pairs(adaptor_class):
    torch.manual_seed(0)
    batch, dim = 5, 8
    x = torch.nn.functional.normalize(torch.randn(batch, dim, dtype=torch.float64), dim=-1)
    eta = (7 * torch.randn(batch, dim, dtype=torch.float64)).requires_grad_()
    adaptor = adaptor_class(dim).double()
    (gradient,) = torch.autograd.grad(adaptor.loss(x, eta), eta)

    def slow(eta):
        """The paper's loss, pair by pair, in mpmath."""
        log_p = [[None] * batch for _ in range(batch)]
        for i in range(batch):
            for j in range(batch):
                row = [mpmath.mpf(value) for value in eta[j]]
                kappa = mpmath.sqrt(sum(value**2 for value in row))
                cosine = (
                    sum(mpmath.mpf(float(a)) * b for a, b in zip(x[i], row, strict=True)) / kappa
                )
                if adaptor_class is PowerSphericalAdaptor:
                    log_p[i][j] = exact_power_spherical(kappa, dim) + kappa * mpmath.log(1 + cosine)
                else:
                    log_p[i][j] = exact_vmf(kappa, dim) + kappa * cosine
        total = 0
        for i in range(batch):
            total -= log_p[i][i] - mpmath.log(sum(mpmath.exp(log_p[i][j]) for j in range(batch)))
            total -= log_p[i][i] - mpmath.log(sum(mpmath.exp(log_p[j][i]) for j in range(batch)))
        return total / (2 * batch)

    values = eta.detach().tolist()
    tolerance = (
        1e-9 if adaptor_class is PowerSphericalAdaptor else 2e-6
    )  # the expansion is less exact at D = 8 than at the widths of CLIPs
    assert adaptor.loss(x, eta).item() == pytest.approx(float(slow(values)), rel=tolerance)
    for j, d in [(0, 0), (2, 3), (4, 7)]:
        step = mpmath.mpf("1e-12")
        up, down = ([row[:] for row in values] for _ in range(2))
        up[j][d], down[j][d] = mpmath.mpf(values[j][d]) + step, mpmath.mpf(values[j][d]) - step
        assert gradient[j, d].item() == pytest.approx(
            float((slow(up) - slow(down)) / (2 * step)), rel=1e-4, abs=1e-8
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("adaptor_class", [PowerSphericalAdaptor, VonMisesFisherAdaptor])
@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-3, 1.0, 1e4])
def test_loss_and_gradient_are_finite_at_the_extremes(adaptor_class, scale, dtype):
    x = torch.nn.functional.normalize(
        torch.randn(4, 512, dtype=dtype, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    eta = (
        (-scale * x.roll(1, 0)).contiguous().requires_grad_()
    )  # mu.x = -1 for one pair of each text
    adaptor = adaptor_class(512).to(dtype)
    loss = adaptor.loss(x, eta)
    (gradient,) = torch.autograd.grad(loss, eta)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(adaptor.describe_text(eta)[0]).all()
    assert torch.isfinite(adaptor.describe_text(eta)[1]).all()


@pytest.mark.parametrize("log_prob", [power_spherical_log_prob, von_mises_fisher_log_prob])
def test_beside_the_uniform_density_float32_tells_log_densities_apart(log_prob):
    rng = torch.Generator().manual_seed(0)
    x, mu = (
        unit(torch.randn(rows, 512, generator=rng, dtype=torch.float64)) for rows in (100, 2000)
    )
    eta = mu * (
        50 + 60 * torch.rand(2000, 1, generator=rng, dtype=torch.float64)
    )  # of trained heads
    exact, found = log_prob(x, eta), log_prob(x.float(), eta.float())
    assert (found - exact).abs().max() < 2e-5
    absolute = found + log_uniform_density(512)
    ties, ties_of_absolute = (
        (of.sort(dim=1).values.diff(dim=1) == 0).sum().item() for of in (found, absolute)
    )
    assert ties_of_absolute > 500
    assert ties < ties_of_absolute / 30


def slow_symmetric_cross_entropy(logits):
    targets = torch.arange(len(logits))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
@pytest.mark.parametrize("scale", [0.1, 5.0, 2000.0])
def test_symmetric_cross_entropy_and_its_gradient_equal_two_cross_entropies(batch, scale):
    rng = torch.Generator().manual_seed(batch)
    logits = (
        scale * torch.randn(batch, batch, generator=rng, dtype=torch.float64)
    ).requires_grad_()
    for factor in (1.0, 0.3):  # the loss may be weighted
        losses = [loss(logits) for loss in (symmetric_cross_entropy, slow_symmetric_cross_entropy)]
        gradients = [torch.autograd.grad(factor * loss, logits)[0] for loss in losses]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    single = symmetric_cross_entropy(logits.detach().float())
    torch.testing.assert_close(single.double(), losses[0], rtol=1e-6, atol=1e-5)


def test_symmetric_cross_entropy_has_the_gradient_of_small_differences():
    logits = (
        3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).requires_grad_()
    assert torch.autograd.gradcheck(symmetric_cross_entropy, (logits,))


def test_cosine_beyond_minus_one_by_rounding_is_finite():
    x = torch.tensor([[1.0, 0, 0, 0]])
    eta = torch.tensor([[-5.0000005, 0, 0, 0]], requires_grad=True)
    value = power_spherical_log_prob(x * 1.0000002, eta)
    value.backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(eta.grad).all()


def test_uncertainty_is_the_inverse_concentration():
    adaptor = PowerSphericalAdaptor(16)
    eta = torch.tensor([[3.0, 4.0] + [0.0] * 14, [0.0] * 16])
    mean, uncertainty = adaptor.describe_text(eta)
    assert uncertainty[0].item() == pytest.approx(0.2)
    assert uncertainty[1].item() == pytest.approx(1 / KAPPA_MIN)
    assert mean[0, :2].tolist() == pytest.approx([0.6, 0.8])
    assert concentration(eta)[0].item() == pytest.approx(5.0)


def test_the_normaliser_trains_after_it_was_used_in_inference():
    distributions._series.cache_clear()
    with torch.inference_mode():
        distributions.von_mises_fisher_log_normalizer(torch.tensor([1.0]), 64)
    kappa = torch.tensor([1.0], requires_grad=True)
    distributions.von_mises_fisher_log_normalizer(kappa, 64).backward()
    assert kappa.grad.item() < 0
