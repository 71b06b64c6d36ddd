"""The six losses as a textbook writes them: float32 throughout, all pairs' differences in one tensor, at any cost.

An oracle for the tests at small sizes, and the baseline of tests/benchmarks/. Each is a function of an adaptor's
parameters by name and of raw embeddings (B, D), so that it shares no code with the adaptor.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def run_mlp(weights, prefix, z, activations=(0, 2, 4, 6)):
    """The linear layers <prefix>.<i>, with ReLU between them."""
    for i in activations:
        z = F.linear(z, weights[f"{prefix}.{i}.weight"], weights[f"{prefix}.{i}.bias"])
        z = z if i == activations[-1] else F.relu(z)
    return z


def asymvlm(weights, z_image, z_text, log_prob):
    x, eta = F.normalize(z_image, dim=1), run_mlp(weights, "text_mlp", z_text)
    logits = weights["temperature"] * log_prob(x, eta)
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def power_spherical(x, eta):
    kappa, dim = eta.norm(dim=1), x.shape[1]
    b = (dim - 1) / 2
    a = b + kappa
    log_normalizer = -(
        (a + b) * math.log(2) + torch.lgamma(a) - torch.lgamma(a + b) + b * math.log(math.pi)
    )
    return log_normalizer + kappa * torch.log1p(x @ F.normalize(eta, dim=1).T)


def von_mises_fisher(x, eta):
    kappa, dim = eta.norm(dim=1), x.shape[1]
    v = dim / 2 - 1
    root = (kappa**2 + v**2).sqrt()
    log_bessel = (
        root - v * torch.asinh(v / kappa) - torch.log(2 * math.pi * root) / 2
    )  # the expansion's leading term
    return (
        v * kappa.log()
        - dim / 2 * math.log(2 * math.pi)
        - log_bessel
        + kappa * (x @ F.normalize(eta, dim=1).T)
    )


def gaussians(weights, z_image, z_text):
    mean_image, mean_text = F.normalize(z_image, dim=1), F.normalize(z_text, dim=1)
    return (
        mean_image,
        run_mlp(weights, "image_head.log_var", mean_image),
        mean_text,
        run_mlp(weights, "text_head.log_var", mean_text),
    )


def pcmepp(weights, z_image, z_text):
    mean_image, log_var_image, mean_text, log_var_text = gaussians(weights, z_image, z_text)
    between = (mean_image[:, None] - mean_text) ** 2  # (B, B, D)
    variances = log_var_image.exp()[:, None] + log_var_text.exp()  # (B, B, D)
    logits = -weights["negative_scale"] * (between + variances).sum(dim=2) + weights["shift"]
    return 2 * F.binary_cross_entropy_with_logits(
        logits, torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    )


def prolip(weights, z_image, z_text):
    mean_image, log_var_image, mean_text, log_var_text = gaussians(weights, z_image, z_text)
    variances = (log_var_image.exp()[:, None] + log_var_text.exp()).sum(dim=2)  # of (B, B, D)
    logits = mean_image @ mean_text.T - variances / 2
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    bottleneck = sum(
        -0.5 * (1 + v / 2 - m**2 - torch.exp(v / 2)).mean()
        for m, v in ((mean_image, log_var_image), (mean_text, log_var_text))
    )
    return -F.logsigmoid(signs * logits).sum() / len(logits) + 1e-5 * bottleneck


def pfe(weights, z_image, z_text):
    var = F.softplus(run_mlp(weights, "image_mlp", z_image)) + F.softplus(
        run_mlp(weights, "text_mlp", z_text)
    )
    return ((z_image - z_text) ** 2 / var + var.log()).sum(dim=1).mean()


def probvlm(weights, z_image, z_text):
    def adapt(name, z):
        h = run_mlp(weights, f"{name}_bayescap.mod", z, (0, 2, 5)) + z
        mean, alpha, beta = (
            run_mlp(weights, f"{name}_bayescap.block_{block}", h, (0, 2))
            for block in ("mu", "alpha", "beta")
        )
        return mean, F.softplus(alpha), F.softplus(beta)

    def fit(mean, alpha, beta, target):
        a, b = alpha + 1e-4, beta + 1e-4
        likelihood = (
            ((mean - target).abs() * a * b).clamp(1e-4, 1e3)
            - a.log()
            + torch.lgamma(1 / b)
            - b.log()
        )
        return (mean - target).abs().mean() + 0.05 * likelihood.mean()

    image, text = adapt("image", z_image), adapt("text", z_text)
    return (
        fit(*image, z_image)
        + fit(*text, z_text)
        + 1e-4 * (fit(*image, z_text) + fit(*text, z_image))
    )


LOSSES = {
    "asymvlm-psd": lambda weights, z_image, z_text: asymvlm(
        weights, z_image, z_text, power_spherical
    ),
    "asymvlm-vmf": lambda weights, z_image, z_text: asymvlm(
        weights, z_image, z_text, von_mises_fisher
    ),
    "probvlm": probvlm,
    "pfe": pfe,
    "pcmepp": pcmepp,
    "prolip": prolip,
}


def parameters(adaptor):
    """Copies of an adaptor's parameters by name, to be trained apart from it."""
    return {
        name: nn.Parameter(value.detach().clone()) for name, value in adaptor.named_parameters()
    }
