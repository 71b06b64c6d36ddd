"""PFE, PCME++, ProLIP and ProbVLM against the golden file, slow loops from the equations, scipy, and float32's ends."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch

from models import GROUPS, METHODS
from models.base import total_loss
from models.layers import pairwise_sigmoid_loss, total_variance, unit
from models.pcmepp.adaptor import NEGATIVE_SCALE, SHIFT
from models.pcmepp.loss import closed_form_sampled_distance, matching_loss
from models.pfe.loss import VARIANCE_MIN, mutual_likelihood_loss, softplus_variance
from models.probvlm.adaptor import BayesCap
from models.probvlm.loss import mean_variance, positive, probvlm_loss
from models.prolip.loss import (
    LOGIT_BIAS,
    LOGIT_SCALE,
    VIB_BETA,
    information_bottleneck,
    pairwise_logits,
    prolip_loss,
)

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((REPOSITORY / "tests" / "golden" / "losses.json").read_text())
MODALITIES = ("image", "text")
ARGUMENTS = {
    "pfe": [f"{name}_{m}" for m in MODALITIES for name in ("mean", "var")],
    "pcmepp": [f"{name}_{m}" for m in MODALITIES for name in ("mean", "log_var")]
    + ["shift", "negative_scale"],
    "prolip": [f"{name}_{m}" for m in MODALITIES for name in ("mean", "log_var")],
    "probvlm": [f"{name}_{m}" for m in MODALITIES for name in ("mean", "inv_alpha", "beta", "z")],
}


def total(loss):
    """A loss whose terms are added up."""
    return lambda *arguments: total_loss(loss(*arguments))


LOSSES = {
    "pfe": mutual_likelihood_loss,
    "pcmepp": matching_loss,
    "prolip": total(prolip_loss),
    "probvlm": total(probvlm_loss),
}
MEMORY_LIMIT = (
    0.7 * 1024
)  # MB above the interpreter with torch imported, for a step at D = 512, where a
# (B, B, D) tensor takes 8 GB at B = 2048 and 2 GB at B = 1024
MEMORY_SCRIPT = """
import re, sys, torch
from models import METHODS
def memory(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
torch.set_num_threads(1)
before = memory("VmRSS")
for method in sys.argv[2:]:
    adaptor = METHODS[method](512)
    optimizer = torch.optim.AdamW(adaptor.parameters())
    adaptor(*torch.randn(2, int(sys.argv[1]), 512)).backward()
    optimizer.step()
print(memory("VmHWM") - before)
"""


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def golden(method, *names):
    return [torch.tensor(GOLDEN[method][name], dtype=torch.float64) for name in names]


@pytest.mark.parametrize("method", LOSSES)
def test_loss_matches_the_golden_file(method):
    assert LOSSES[method](*golden(method, *ARGUMENTS[method])).item() == pytest.approx(
        GOLDEN[method]["loss"], rel=1e-9
    )


@pytest.mark.parametrize("method", LOSSES)
def test_adaptor_gives_the_golden_loss(method):
    names = [name for name in ARGUMENTS[method] if name not in ("shift", "negative_scale")]
    loss = METHODS[method](16).double().loss(*golden(method, *names))
    assert total_loss(loss).item() == pytest.approx(GOLDEN[method]["loss"], rel=1e-9)


def test_probvlm_variance_matches_the_golden_file():
    value = mean_variance(*golden("probvlm", "inv_alpha_text", "beta_text"))
    np.testing.assert_allclose(value.numpy(), GOLDEN["probvlm"]["mean_variance_text"], rtol=1e-9)


# Slow loops over pairs and coordinates, from the equations of the papers.


def slow_pfe(mean_image, var_image, mean_text, var_text):
    """Twice the negative log-likelihood of the difference under N(0, var_image + var_text), without its constant."""
    total = 0
    for b in range(len(mean_image)):
        for d in range(mean_image.shape[1]):
            agreement = torch.distributions.Normal(
                mean_text[b, d], torch.sqrt(var_image[b, d] + var_text[b, d])
            )
            total = total - 2 * agreement.log_prob(mean_image[b, d]) - math.log(2 * math.pi)
    return total / len(mean_image)


def slow_pcmepp(mean_image, log_var_image, mean_text, log_var_text, shift, negative_scale):
    """Cross-entropy of the matching probability sigmoid(-a d + b), with d the sampled distance in closed form."""
    total, batch = 0, len(mean_image)
    for i in range(batch):
        for j in range(batch):
            distance = 0
            for d in range(mean_image.shape[1]):
                distance = (
                    distance
                    + (mean_image[i, d] - mean_text[j, d]) ** 2
                    + torch.exp(log_var_image[i, d])
                    + torch.exp(log_var_text[j, d])
                )
            p = 1 / (1 + torch.exp(negative_scale * distance - shift))
            total = total - (torch.log(p) if i == j else torch.log(1 - p))
    return 2 * total / batch**2


def slow_prolip(mean_image, log_var_image, mean_text, log_var_text):
    """PPCL at scale 1 and bias 0, and the information bottleneck in the authors' form."""
    contrast, bottleneck, (batch, dim) = 0, 0, mean_image.shape
    for i in range(batch):
        for j in range(batch):
            logit = 0
            for d in range(dim):
                logit = (
                    logit
                    + mean_image[i, d] * mean_text[j, d]
                    - (torch.exp(log_var_image[i, d]) + torch.exp(log_var_text[j, d])) / 2
                )
            contrast = contrast + torch.log(1 + torch.exp(-logit if i == j else logit))
    for mean, log_var in [(mean_image, log_var_image), (mean_text, log_var_text)]:
        for b in range(batch):
            for d in range(dim):
                v = log_var[b, d]
                bottleneck = bottleneck - (1 + v / 2 - mean[b, d] ** 2 - torch.exp(v / 2)) / (
                    2 * batch * dim
                )
    return contrast / batch + 1e-5 * bottleneck


def slow_probvlm(
    mean_image, inv_alpha_image, beta_image, z_image, mean_text, inv_alpha_text, beta_text, z_text
):
    """Absolute error and generalised-Gaussian likelihood of each modality's embedding and, 1e-4 of it, the other's."""
    total, (batch, dim) = 0, mean_image.shape
    image, text = (mean_image, inv_alpha_image, beta_image), (mean_text, inv_alpha_text, beta_text)
    for weight, (mean, inv_alpha, beta), target in [
        (1, image, z_image),
        (1, text, z_text),
        (1e-4, image, z_text),
        (1e-4, text, z_image),
    ]:
        for n in range(batch):
            for d in range(dim):
                error = torch.abs(mean[n, d] - target[n, d])
                a, b = inv_alpha[n, d] + 1e-4, beta[n, d] + 1e-4
                residual = error * a * b
                residual = 1e-4 if residual < 1e-4 else 1e3 if residual > 1e3 else residual
                likelihood = residual - torch.log(a) + torch.lgamma(1 / b) - torch.log(b)
                total = total + weight * (error + 0.05 * likelihood) / (batch * dim)
    return total


SLOW = {"pfe": slow_pfe, "pcmepp": slow_pcmepp, "prolip": slow_prolip, "probvlm": slow_probvlm}


def random_arguments(method, batch=4, dim=5):
    """Arguments of a loss in float64, by name, drawn so that matches are neither sure nor hopeless."""
    generator = torch.Generator().manual_seed(3)
    arguments = {}
    for name in ARGUMENTS[method]:
        x = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
        if name.startswith("mean") and method in ("pcmepp", "prolip"):
            x = unit(x)
        elif name.startswith("log_var"):
            x = x - 2.5
        elif name.startswith(("var", "inv_alpha", "beta")):
            x = x.exp()
        elif name in ("shift", "negative_scale"):
            x = torch.tensor({"shift": 4.0, "negative_scale": 1.7}[name], dtype=torch.float64)
        arguments[name] = x
    if method == "probvlm":  # both ends of the clamp on the residual
        arguments["mean_image"][0, 0] = arguments["z_image"][0, 0] + 1e-7
        arguments["mean_text"][1, 2], arguments["beta_text"][1, 2] = 900.0, 40.0
    return {name: x.requires_grad_() for name, x in arguments.items()}


@pytest.mark.parametrize("method", LOSSES)
def test_loss_and_gradient_equal_a_slow_loop(method):
    arguments = random_arguments(method)
    fast, slow = LOSSES[method](*arguments.values()), SLOW[method](*arguments.values())
    assert fast.item() == pytest.approx(slow.item(), rel=1e-9)
    gradients = (torch.autograd.grad(value, list(arguments.values())) for value in (fast, slow))
    for name, one, other in zip(arguments, *gradients, strict=True):
        assert other.abs().max() > 0, name
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-8, atol=1e-12, err_msg=name)


def test_sampled_distance_is_the_expected_squared_distance_of_draws():
    generator = torch.Generator().manual_seed(0)
    mean_image, log_var_image, mean_text, log_var_text = (
        torch.randn(n, 6, generator=generator) for n in (2, 2, 3, 3)
    )
    noise_image, noise_text = (
        torch.randn(200_000, 2, 1, 6, generator=generator),
        torch.randn(200_000, 1, 3, 6, generator=generator),
    )
    image = mean_image[:, None] + noise_image * (log_var_image / 2).exp()[:, None]
    sampled = (
        (image - (mean_text + noise_text * (log_var_text / 2).exp()))
        .square()
        .sum(dim=-1)
        .mean(dim=0)
    )  # (2, 3)
    torch.testing.assert_close(
        closed_form_sampled_distance(mean_image, log_var_image, mean_text, log_var_text),
        sampled,
        rtol=0.02,
        atol=0,
    )


# The ends.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("image_log_var", [-50.0, 0.0, 50.0])
@pytest.mark.parametrize("text_log_var", [-50.0, 50.0])
@pytest.mark.parametrize("means", ["random", "equal", "zero"])
@pytest.mark.parametrize("method", ["pcmepp", "prolip"])
def test_gaussian_losses_are_finite_at_the_extremes(
    method, means, image_log_var, text_log_var, dtype
):
    mean = unit(torch.randn(8, 512, dtype=dtype, generator=torch.Generator().manual_seed(0)))
    mean_image, mean_text = {
        "random": (mean, mean.roll(1, 0)),
        "equal": (mean, mean),
        "zero": (0 * mean, 0 * mean),
    }[means]
    log_var_image = torch.full_like(mean, image_log_var).requires_grad_()
    log_var_text = torch.full_like(mean, text_log_var).requires_grad_()
    adaptor = METHODS[method](512).to(dtype)
    loss = total_loss(adaptor.loss(mean_image, log_var_image, mean_text, log_var_text))
    loss.backward()
    assert torch.isfinite(loss)
    trained = [
        log_var_image,
        log_var_text,
        *(p for name, p in adaptor.named_parameters() if "head" not in name),
    ]
    assert all(torch.isfinite(x.grad).all() for x in trained)
    assert torch.isfinite(adaptor.describe_text(mean_text, log_var_text)[1]).all()


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_squared_distance_is_never_negative(scale):
    mean = scale * unit(torch.randn(256, 512, generator=torch.Generator().manual_seed(0)))
    none = torch.full_like(mean, -100.0)  # exp(-100) is 0 beside the rounding of the squares
    assert (2 * scale**2 - 2 * mean @ mean.T).min() < 0  # the rounding is there
    assert closed_form_sampled_distance(mean, none, mean, none).min() >= 0


def test_pairwise_sigmoid_loss_is_accurate_for_sure_pairs_in_float32():
    logits = torch.tensor([[30.0, -30.0], [-40.0, 30.0]])
    exact = 3 * math.log1p(math.exp(-30)) + math.log1p(math.exp(-40))
    assert pairwise_sigmoid_loss(logits).item() == pytest.approx(exact, rel=1e-5, abs=0)
    assert pairwise_sigmoid_loss(-1e25 * torch.eye(2)).item() == pytest.approx(2e25, rel=1e-6)


def test_pairwise_losses_in_float32_agree_with_float64():
    generator = torch.Generator().manual_seed(0)
    mean_image, mean_text = (unit(torch.randn(64, 512, generator=generator)) for _ in range(2))
    arguments = [
        mean_image,
        torch.randn(64, 512, generator=generator) - 7,
        mean_text,
        torch.randn(64, 512, generator=generator) - 7,
    ]
    wide = [x.double() for x in arguments]
    for function in (closed_form_sampled_distance, pairwise_logits):
        torch.testing.assert_close(
            function(*arguments).double(), function(*wide), rtol=1e-5, atol=1e-6
        )
    for loss, extra in [
        (matching_loss, (torch.tensor(5.0), torch.tensor(5.0))),
        (LOSSES["prolip"], ()),
    ]:
        assert loss(*arguments, *extra).item() == pytest.approx(
            loss(*wide, *(x.double() for x in extra)).item(), rel=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("raw", [-1e4, -104.0, 0.0, 1e4])
@pytest.mark.parametrize("difference", [0.0, 1.0, 100.0])
def test_pfe_is_finite_at_the_extremes(raw, difference, dtype):
    mean = torch.randn(4, 64, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x = torch.full_like(mean, raw).requires_grad_()
    var = softplus_variance(x)
    loss = mutual_likelihood_loss(mean + difference, var, mean, var)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()
    assert var.min() >= VARIANCE_MIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inv_alpha", [-1e4, 0.0, 1e4, 1e20])
@pytest.mark.parametrize("beta", [-1e4, 0.0, 1e4, 1e20])
@pytest.mark.parametrize("means", ["random", "equal", "zero"])
def test_probvlm_is_finite_at_the_extremes(means, inv_alpha, beta, dtype):
    z = torch.randn(4, 64, dtype=dtype, generator=torch.Generator().manual_seed(0)) * (
        means != "zero"
    )
    mean = (z.roll(1, 0) if means == "random" else z).clone().requires_grad_()
    raw = [torch.full_like(z, value).requires_grad_() for value in (inv_alpha, beta)]
    parameters = [positive(x) for x in raw]
    loss = LOSSES["probvlm"](mean, *parameters, z, mean, *parameters, z)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(x.grad).all() for x in (mean, *raw))
    uncertainty = mean_variance(*parameters)
    assert torch.isfinite(uncertainty).all()
    assert torch.isfinite(1 / uncertainty).all()


# What is reported as uncertainty.


def exact_variance(inv_alpha, beta):
    """alpha^2 Gamma(3/b) / Gamma(1/b) with the published clips, (N, D) -> (N,)."""
    alpha = np.clip(1 / (inv_alpha + 1e-5), 1e-4, 5)
    b = np.clip(beta + 0.1, 0.1, 5)
    return (alpha**2 * scipy.special.gamma(3 / b) / scipy.special.gamma(1 / b)).mean(axis=-1)


def test_probvlm_variance_equals_the_ratio_of_gammas():
    rng = np.random.default_rng(0)
    inv_alpha = np.concatenate(
        [rng.uniform(0, 3, (30, 7)), rng.uniform(0, 1e-4, (5, 7)), rng.uniform(5e3, 5e5, (5, 7))]
    )
    beta = np.concatenate([rng.uniform(0, 8, (20, 7)), rng.uniform(0, 0.01, (20, 7))])
    exact = exact_variance(inv_alpha, beta)
    wide = mean_variance(torch.tensor(inv_alpha), torch.tensor(beta))
    np.testing.assert_allclose(wide.numpy(), exact, rtol=1e-10)
    np.testing.assert_allclose(
        mean_variance(*(torch.tensor(x, dtype=torch.float32) for x in (inv_alpha, beta))).numpy(),
        exact,
        rtol=1e-3,
    )


def test_probvlm_variance_is_that_of_the_normal_and_the_laplace_distribution():
    one = torch.tensor([[1.0]], dtype=torch.float64)
    assert mean_variance(one - 1e-5, 2 * one - 0.1).item() == pytest.approx(
        0.5
    )  # exp(-r^2) has the variance 1/2
    assert mean_variance(one - 1e-5, one - 0.1).item() == pytest.approx(
        2.0
    )  # exp(-|r|) has the variance 2


@pytest.mark.parametrize("modality", MODALITIES)
def test_probvlm_reports_the_inverse_variance_unless_told_otherwise(modality):
    adaptor = METHODS["probvlm"](16).double()
    z = 5 * torch.randn(9, 16, dtype=torch.float64)
    encode, adapt = getattr(adaptor, f"encode_{modality}"), getattr(adaptor, f"adapt_{modality}")
    _, inv_alpha, beta, _ = (x.detach().numpy() for x in encode(z))
    exact = exact_variance(inv_alpha, beta)
    assert np.ptp(exact) > 0
    np.testing.assert_allclose(adapt(z)[1].detach().numpy(), 1 / exact, rtol=1e-10)
    adaptor.inverted = False
    np.testing.assert_allclose(adapt(z)[1].detach().numpy(), exact, rtol=1e-10)
    assert METHODS["probvlm"].inverted is True


def test_bayescap_adds_the_embedding_to_its_trunk():
    bayescap = METHODS["probvlm"](16).text_bayescap
    z = torch.randn(5, 16)
    with torch.no_grad():
        for parameter in bayescap.mod.parameters():
            parameter.zero_()
    mean, inv_alpha, beta = bayescap(z)
    torch.testing.assert_close(mean, bayescap.block_mu(z))
    torch.testing.assert_close(inv_alpha, torch.log1p(bayescap.block_alpha(z).exp()))
    torch.testing.assert_close(beta, torch.log1p(bayescap.block_beta(z).exp()))


def test_pfe_keeps_the_embedding_and_reports_its_mean_variance():
    adaptor = METHODS["pfe"](16).double()
    z = 3 * torch.randn(5, 16, dtype=torch.float64)
    mean, uncertainty = adaptor.adapt_image(z)
    torch.testing.assert_close(mean, z, rtol=0, atol=0)
    torch.testing.assert_close(uncertainty, torch.log1p(adaptor.image_mlp(z).exp()).mean(dim=-1))


@pytest.mark.parametrize("method", ["pcmepp", "prolip"])
def test_gaussian_head_reads_the_direction_of_the_embedding_alone(method):
    adaptor = METHODS[method](16).double()
    z = torch.randn(5, 16, dtype=torch.float64)
    mean, uncertainty = adaptor.adapt_text(z)
    torch.testing.assert_close(mean, z / z.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(uncertainty, adaptor.text_head.log_var(mean).exp().mean(dim=-1))
    torch.testing.assert_close(adaptor.adapt_text(7 * z)[1], uncertainty)


@pytest.mark.parametrize("method", LOSSES)
def test_similarity_is_the_cosine_of_the_means(method):
    adaptor = METHODS[method](16).double()
    z_image, z_text = (
        torch.randn(4, 16, dtype=torch.float64),
        torch.randn(6, 16, dtype=torch.float64),
    )
    image, text = adaptor.adapt_image(z_image)[0], adaptor.adapt_text(z_text)[0]
    cosine = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(adaptor.similarity(z_image, z_text), cosine)
    if method != "probvlm":  # the others rank as the frozen embeddings do
        torch.testing.assert_close(
            cosine, torch.nn.functional.cosine_similarity(z_image[:, None], z_text[None], dim=-1)
        )


def test_half_precision_is_raised_before_it_is_summed():
    log_var = torch.full((1, 512), 5.0, dtype=torch.float16)  # the sum, 75,988, is beyond float16
    assert total_variance(log_var).item() == pytest.approx(512 * math.exp(5.0), rel=1e-5)
    ones = torch.ones(1, 512, dtype=torch.float16)
    assert mutual_likelihood_loss(20 * ones, ones, 0 * ones, ones).item() == pytest.approx(
        512 * (200 + math.log(2)), rel=1e-5
    )


@pytest.mark.parametrize(
    ("function", "method", "start", "stop"),
    [
        *((LOSSES[method], method, 0, None) for method in LOSSES),
        (closed_form_sampled_distance, "pcmepp", 0, 4),
        (pairwise_logits, "prolip", 0, 4),
        (information_bottleneck, "prolip", 0, 2),
        (mean_variance, "probvlm", 1, 3),
        (positive, "probvlm", 0, 1),
        (softplus_variance, "pfe", 0, 1),
    ],
)
def test_autocast_lowers_the_products_of_the_pairs_and_nothing_else(
    function, method, start, stop, monkeypatch
):
    arguments = [
        x.detach().bfloat16() for x in random_arguments(method, batch=16, dim=64).values()
    ][start:stop]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = function(*arguments)
    assert lowered.dtype == torch.float32
    for module in ("pcmepp", "prolip"):
        monkeypatch.setattr(
            f"models.{module}.loss.pairwise_products",
            lambda x, y: (x.bfloat16() @ y.bfloat16().T).float(),
        )
    assert torch.equal(lowered, function(*(x.float() for x in arguments)))


def test_constants_are_those_of_the_golden_file():
    prolip, pcmepp = GOLDEN["prolip"], GOLDEN["pcmepp"]
    assert (prolip["logit_scale"], prolip["logit_bias"], prolip["vib_beta"]) == (
        LOGIT_SCALE,
        LOGIT_BIAS,
        VIB_BETA,
    )
    assert (pcmepp["shift"], pcmepp["negative_scale"]) == (SHIFT, NEGATIVE_SCALE)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="no /proc: peak memory cannot be read"
)
@pytest.mark.parametrize(
    "words", [*((2048, method) for method in LOSSES), (1024, *GROUPS["originals"])]
)
def test_a_step_of_a_large_batch_stays_within_its_memory(words):
    command = [sys.executable, "-c", MEMORY_SCRIPT, *map(str, words)]
    script = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert 50 < float(script.stdout) < MEMORY_LIMIT


def test_probvlms_mean_is_not_rounded_to_bfloat16():
    """|mean - z| is small after training: of a rounded mean, its gradient would have the wrong sign."""
    torch.manual_seed(0)
    bayescap = BayesCap(16)
    h = torch.randn(8, 16)
    mean, inv_alpha, _ = bayescap.heads(h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered_mean, lowered_inv_alpha, _ = bayescap.heads(h)
    assert torch.equal(lowered_mean, mean)
    assert not torch.equal(lowered_inv_alpha, inv_alpha)  # autocast was on
