"""Two densities on the unit sphere, given a parameter eta = kappa mu and a direction x.

Both log densities are log_normalizer(kappa) + kappa * kernel, where the kernel is log(1 + mu.x) for
the Power Spherical distribution and mu.x for the von Mises-Fisher distribution. kappa >= 0 is the
concentration: 0 is the uniform distribution, and 1/kappa is the uncertainty. Each also has an
expectation, for images that are distributions themselves.

Densities are relative to the uniform one: log C(kappa) - log C(0) replaces the papers'
log C(kappa), so that the log density at kappa = 0 is 0. Neither the loss nor the ranking depends on
log C(0), which is 868 at D = 512. Added to it, log densities in float32 would be rounded to 6e-5.
For a density per unit of area, add log C(0) = lgamma(D/2) - log 2 - (D/2) log pi. This is minus the
log of the sphere's area (DLMF 5.19.4).
"""

import functools
import math

import torch
from numpy.polynomial import Polynomial
from torch.nn import functional as F

from models.layers import full_precision, pairwise_products, widest

KAPPA_MIN = 1e-6  # keeps mu = eta / kappa and 1/kappa finite if eta = 0
LEAST_ORDER = 7  # v at D = 16, the smallest order for which TERMS terms suffice
# Terms of the Bessel function's expansion. At D = 16, log C is off by 6e-8 (with 4: 1.2e-6).
TERMS = 6


@full_precision
def concentration(eta):
    """kappa = ||eta||, (M, D) -> (M,), at least 1e-6."""
    return torch.linalg.vector_norm(eta, dim=-1).clamp_min(KAPPA_MIN)


@full_precision
def power_spherical_log_prob(x, eta, temperature=1.0):
    """Log density of every image under every text's Power Spherical distribution.

    temperature * (log C(kappa) - log C(0) + kappa log(1 + mu.x)). The temperature multiplies the
    (M,) parameters instead of the (N, M) densities, which saves three passes over those per step.

    Args: x (N, D): unit vectors. eta (M, D): kappa mu. temperature: scalar.
    Returns: (N, M), relative to the uniform density. It and its gradient are finite even if
        rounding brings mu.x to -1 or below.
    Source: De Cao & Aziz, "The Power Spherical distribution", arXiv 2006.04437, eq. 6.
    """
    kappa = concentration(eta)  # (M,)
    mu = eta / kappa[:, None]  # (M, D)
    kernel = power_spherical_kernel(pairwise_products(x, mu))  # (N, M)
    log_normalizer = power_spherical_log_normalizer(kappa, eta.shape[-1])  # (M,)
    return torch.addcmul(temperature * log_normalizer, temperature * kappa, kernel)


def power_spherical_kernel(cosine):
    """log(1 + mu.x), of any shape.

    It and its gradient are finite even if rounding brings mu.x to -1 or below.
    """
    smallest = torch.finfo(cosine.dtype).eps  # log(0) is -inf
    shifted = F.threshold(1 + cosine, smallest, smallest)  # its backward is faster than clamp_min's
    return shifted.log()


@full_precision
def von_mises_fisher_log_prob(x, eta, temperature=1.0, log_normalizer=None):
    """Log density of every image under every text's von Mises-Fisher distribution.

    temperature * (log C(kappa) - log C(0) + kappa mu.x).

    Args: as for the Power Spherical distribution. log_normalizer: a function of kappa (M,) and D.
        None selects the exact one.
    Returns: (N, M), relative to the uniform density.
    Source: Mardia & Jupp, "Directional Statistics", eq. 9.3.4.
    """
    if log_normalizer is None:
        log_normalizer = von_mises_fisher_log_normalizer
    kappa = concentration(eta)  # (M,)
    log_c = log_normalizer(kappa, eta.shape[-1])  # (M,)
    return temperature * log_c + pairwise_products(x, temperature * eta)


@full_precision
def expected_power_spherical_log_prob(eta_image, eta_text, temperature=1.0):
    """E log p(x | text) for x drawn from p(x | image), both Power Spherical.

    temperature * (log C(kappa_text) - log C(0) + kappa_text E log(1 + t)), t = mu_text.x. With the
    image's kappa, c = mu_image.mu_text, s = D - 1 + kappa and r = kappa / s, t has exactly
        mean r c,   variance (D - 1 + 2 kappa) (1 - r c^2) / (s (s + 1)),
    because mu_image.x is 2 Beta((D-1)/2 + kappa, (D-1)/2) - 1 and the rest of x is uniform around
    mu_image. (1 + t)/2 is approximated by the Beta(a, n - a) of that mean m and variance v, where
    n = (1 - m^2) / v - 1 and a = n (1 + m) / 2. This is exact at kappa = 0 and at c = 1 and -1:
        E log(1 + t) = log 2 + digamma(a) - digamma(n)
                     = log(1 + r c) - (1/a - 1/n)/2 - (1/a^2 - 1/n^2)/12 + O(a^-4).
    Accuracy of E log(1 + t), against quadrature, for kappa up to 1e4: 8e-4 at D = 16, 5e-5 at
    D = 64, 6e-7 at D = 512.

    Args: eta_image (N, D), eta_text (M, D). temperature: scalar.
    Returns: (N, M), relative to the uniform density, from one matrix product.
    Source: the distribution of x is arXiv 2006.04437, algorithm 1. The expectation, which is minus
        the cross-entropy of the two distributions, is our own in this form.
    """
    dim = eta_text.shape[-1]
    kappa = concentration(eta_image)[:, None]  # (N, 1)
    kappa_text = concentration(eta_text)  # (M,)
    mu_text = eta_text / kappa_text[:, None]  # (M, D)
    cosine = pairwise_products(eta_image / kappa, mu_text).clamp(-1, 1)  # (N, M)

    s = dim - 1 + kappa  # (N, 1)
    mean = kappa / s * cosine  # (N, M)
    variance = (dim - 1 + 2 * kappa) / (s * (s + 1)) * (1 - mean * cosine)
    n = (1 - mean.square()) / variance - 1
    n = n.clamp_min((dim - 1) / 2)  # n is about D - 1 or more; rounding may bring it to 0
    log_of_mean = power_spherical_kernel(mean)
    ratio = 2 * torch.exp(-log_of_mean)  # n / a, as a = n (1 + mean) / 2
    first_order = (ratio - 1) / (2 * n)
    second_order = (ratio.square() - 1) / (12 * n.square())
    kernel = log_of_mean - first_order - second_order

    log_normalizer = power_spherical_log_normalizer(kappa_text, dim)  # (M,)
    return torch.addcmul(temperature * log_normalizer, temperature * kappa_text, kernel)


@full_precision
def expected_von_mises_fisher_log_prob(eta_image, eta_text, temperature=1.0):
    """E log p(x | text) for x drawn from p(x | image), both von Mises-Fisher.

    temperature * (log C(kappa_text) - log C(0) + kappa_text A_D(kappa_image) mu_image.mu_text). It
    is exact, because the mean of x is A_D(kappa_image) mu_image and the log density is linear in x.

    Args, Returns: as for the Power Spherical distribution.
    Source: Mardia & Jupp, sec. 9.3.2; minus the cross-entropy, as in Diethe, arXiv 1502.07104.
    """
    kappa = concentration(eta_image)  # (N,)
    resultant_length = mean_resultant_length(kappa, eta_image.shape[-1])  # (N,)
    mean = (resultant_length / kappa)[:, None] * eta_image  # (N, D)
    return von_mises_fisher_log_prob(mean, eta_text, temperature)


def power_spherical_log_normalizer(kappa, dim):
    """log C(kappa) - log C(0) = lgamma(a + b) - lgamma(a) - lgamma(2b) + lgamma(b) - kappa log 2.

    log C(kappa) = -[(a + b) log 2 + lgamma(a) - lgamma(a + b) + b log pi], with a = (D-1)/2 + kappa
    and b = (D-1)/2.
    Domain: kappa >= 0, D >= 2. Limits: 0 as kappa -> 0. As kappa -> inf, log C(kappa) tends to
    b log(kappa / 4 pi) - kappa log 2.
    Accuracy: computed in float64 if the device supports it; in float32 it would be off by up to
    4e-3, at kappa = 1e4.

    Args: kappa (M,), dim D.
    Returns: (M,) in kappa's type.
    Source: arXiv 2006.04437, eq. 6.
    """
    wide_kappa = widest(kappa)
    b = (dim - 1) / 2
    a = b + wide_kappa
    at_zero = math.lgamma(b) - math.lgamma(2 * b)
    log_c = torch.lgamma(a + b) - torch.lgamma(a) + at_zero - wide_kappa * math.log(2)
    return log_c.to(kappa.dtype)


def von_mises_fisher_log_normalizer(kappa, dim):
    """log C(kappa) - log C(0), log C(kappa) = v log kappa - (D/2) log 2 pi - log I_v(kappa).

    v = D/2 - 1. No Bessel function is evaluated: I_v is replaced by its uniform expansion for large
    order, in which v log kappa cancels by hand, so that nothing diverges as kappa -> 0. With
    s = sqrt(1 + (kappa/v)^2),
        log C = v log v - (D/2) log 2 pi - v s + v log(1 + s) + log(2 pi v)/2 + log(s)/2
                - log sum_k U_k(1/s) / v^k.
    Below D = 16, where six terms are too few, it is evaluated at the order v + n and brought down
    by n steps of a recurrence (`_log_scaled_bessel`).
    Domain: kappa >= 0, D >= 2. Limits: 0 as kappa -> 0. As kappa -> inf, log C(kappa) tends to
    (v + 1/2) log(kappa / 2 pi) - kappa.
    Accuracy, against mpmath at D = 2 to 1152 and kappa in (0, 1e4]: 1e-6 max(1, |log C|) in
    float64, 2e-3 absolute in float32; the gradient, -I_{D/2}(kappa) / I_{D/2-1}(kappa), 1e-6
    relative in float64 (tests/test_asymvlm.py).

    Args: kappa (M,), dim D.
    Returns: (M,) in kappa's type.
    Source: DLMF 10.41.3, 10.29.1 and, at 0, 10.25.2 (https://dlmf.nist.gov/10).
    """
    v = dim / 2 - 1
    log_f_at_zero = -v * math.log(2) - math.lgamma(v + 1)
    log_f = _log_scaled_bessel(widest(kappa), v)
    return (log_f_at_zero - log_f).to(kappa.dtype)


def approximate_von_mises_fisher_log_normalizer(kappa, dim):
    """An approximation of log C(kappa) - log C(0) from two bounds of the Bessel functions' ratio.

    sum_b [a log((a + r_b) / (a + b)) - (r_b - b)] / 2 with a = (D-1)/2, r_b = sqrt(b^2 + kappa^2)
    and b = a, a + 1. Its derivative is minus the mean of the upper and the lower bound
    kappa / (a + r_b) of I_{D/2} / I_{D/2-1}.
    Domain: kappa >= 0, D >= 2. Error at D = 512: 0.002 at kappa = 50, 0.04 at 300, 0.1 at 5000.

    Args, Returns: as for the exact one.
    Source: Scott, Gallagher & Mozer, "von Mises-Fisher loss", arXiv 2103.15718, with which
        AsymVLM's authors train.
    """
    a = (dim - 1) / 2
    total = 0
    for b in (a, a + 1):
        root = torch.sqrt(b**2 + widest(kappa).square())  # (M,)
        total = total + a * torch.log((a + root) / (a + b)) - (root - b)
    return (total / 2).to(kappa.dtype)


def mean_resultant_length(kappa, dim):
    """A_D(kappa) = I_{D/2}(kappa) / I_{D/2-1}(kappa), in [0, 1).

    It is the length of the mean of x under the von Mises-Fisher distribution and minus the
    derivative of log C; here, kappa F_{v+1} / F_v with v = D/2 - 1 and F as in
    `_log_scaled_bessel`. Limits: kappa / D as kappa -> 0; 1 - (D-1) / (2 kappa) as kappa -> inf.
    Accuracy, against mpmath, in the range where log C is tested: 1e-6 relative, and 1e-4 for its
    gradient.

    Args: kappa (N,), dim D.
    Returns: (N,) in kappa's type.
    Source: Mardia & Jupp, sec. 9.3.2.
    """
    v = dim / 2 - 1
    wide_kappa = widest(kappa)
    log_ratio = _log_scaled_bessel(wide_kappa, v + 1) - _log_scaled_bessel(wide_kappa, v)
    return (wide_kappa * torch.exp(log_ratio)).to(kappa.dtype)


def _log_scaled_bessel(kappa, v):
    """log F_v, F_v = kappa^-v I_v(kappa), (M,), of order v >= 0.

    Below order 7, by the recurrence F_{v-1} = 2 v F_v + kappa^2 F_{v+1}.
    """
    steps = max(0, math.ceil(LEAST_ORDER - v))
    log_f = _expansion(kappa, v + steps)
    if steps == 0:
        return log_f
    log_f_above = _expansion(kappa, v + steps + 1)
    for step in reversed(range(1, steps + 1)):
        ratio = torch.exp(log_f_above - log_f)
        log_f_below = log_f + torch.log(2 * (v + step) + kappa.square() * ratio)
        log_f_above = log_f
        log_f = log_f_below
    return log_f


def _expansion(kappa, v):
    """log F_v, (M,), by the uniform expansion, which is more accurate the larger v is."""
    s = torch.sqrt(1 + (kappa / v) ** 2)  # (M,)
    coefficients = _series(v, kappa.dtype, kappa.device)  # (P,)
    powers = torch.arange(len(coefficients), device=kappa.device)
    series = ((1 / s)[..., None] ** powers * coefficients).sum(dim=-1)  # (M,)
    constant = v * math.log(v) + math.log(2 * math.pi * v) / 2
    return v * s - v * torch.log1p(s) - torch.log(s) / 2 - constant + torch.log1p(series)


@functools.cache  # creating the tensor makes a GPU wait
def _series(v, dtype, device):
    """The coefficients of sum_k U_k(p) / v^k, k = 1 .. TERMS, a polynomial in p: (P,), p^0 first.

    U_0 = 1, U_{k+1}(p) = p^2 (1 - p^2) U_k'(p) / 2 + (1/8) integral_0^p (1 - 5 t^2) U_k(t) dt
    (DLMF 10.41.10).
    """
    p = Polynomial([0, 1])
    u = Polynomial([1])
    series = Polynomial([0])
    for k in range(1, TERMS + 1):
        u = p**2 * (1 - p**2) * u.deriv() / 2 + ((1 - 5 * p**2) * u).integ() / 8
        series = series + u / v**k
    with torch.inference_mode(False):  # the cached tensor is used in training too
        return torch.tensor(series.coef, dtype=dtype, device=device)
