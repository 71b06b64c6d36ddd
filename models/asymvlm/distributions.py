"""Two densities on the unit sphere, from a text's natural parameter eta = kappa mu and an image's direction x.

Both are log_normalizer(kappa) + kernel: kappa log(1 + mu.x) for the Power Spherical distribution, kappa mu.x for the
von Mises-Fisher distribution. kappa >= 0 is the concentration: 0 is uniform, and 1/kappa is the uncertainty. Each has
an expectation too, for images that are distributions themselves.

Densities are relative to the uniform one: log C(kappa) - log C(0) stands where the papers have log C(kappa), and the
log density at kappa = 0 is 0. Neither loss nor ranking depends on log C(0), which is 868 at D = 512: beside it, float32
would tell log densities apart only by 6e-5. `log_uniform_density` is what to add for a density per unit of area.
"""

import functools
import math
from collections import Counter
from fractions import Fraction

import torch
from torch.nn import functional as F

from models.layers import full_precision, pairwise_products, widest

KAPPA_MIN = 1e-6  # keeps mu = eta / kappa and 1/kappa finite where eta = 0
LEAST_ORDER = 7  # v of D = 16, from which on six terms suffice
TERMS = 6  # of the expansion of the Bessel function; 4 are off by 1.7e-9 in the loss at D = 16, 6 by 2e-11


@full_precision
def concentration(eta):
    """kappa = ||eta||, (M, D) -> (M,), at least 1e-6."""
    return torch.linalg.vector_norm(eta, dim=-1).clamp_min(KAPPA_MIN)


@full_precision
def power_spherical_log_prob(x, eta, temperature=1.0):
    """Log density, relative to the uniform one, of every image under every text's Power Spherical distribution.

    temperature (log C(kappa) - log C(0) + kappa log(1 + mu.x)). The temperature meets the (M,) parameters rather than
    the (N, M) densities: it saves three passes over those in a training step.
    Args: x (N, D): unit vectors. eta (M, D): kappa mu. temperature: scalar.
    Returns: (N, M), finite also where rounding brings mu.x to -1 (or below), as is its gradient.
    Source: De Cao & Aziz, "The Power Spherical distribution", arXiv 2006.04437, eq. 6.
    """
    kappa = concentration(eta)  # (M,)
    kernel = power_spherical_kernel(pairwise_products(x, eta / kappa[:, None]))  # (N, M)
    log_normalizer = power_spherical_log_normalizer(kappa, eta.shape[-1])  # (M,)
    return torch.addcmul(temperature * log_normalizer, temperature * kappa, kernel)


def power_spherical_kernel(cosine):
    """log(1 + mu.x), of any shape, finite also where rounding brings mu.x to -1 (or below), as is its gradient."""
    least = torch.finfo(cosine.dtype).eps  # log(0) is -inf; clamp_min would take longer back than threshold
    return F.threshold(1 + cosine, least, least).log()


@full_precision
def von_mises_fisher_log_prob(x, eta, temperature=1.0, log_normalizer=None):
    """The same for the von Mises-Fisher distribution, log C(kappa) - log C(0) + kappa mu.x.

    Args: log_normalizer: function of kappa (M,) and D; None: the exact one.
    Source: Mardia & Jupp, "Directional Statistics", eq. 9.3.4.
    """
    log_c = (log_normalizer or von_mises_fisher_log_normalizer)(concentration(eta), eta.shape[-1])  # (M,)
    return temperature * log_c + pairwise_products(x, temperature * eta)


@full_precision
def expected_power_spherical_log_prob(eta_image, eta_text, temperature=1.0):
    """E log p(x | text), x drawn from p(x | image), both Power Spherical, relative to the uniform one.

    log C(kappa_text) - log C(0) + kappa_text E log(1 + t), times a temperature, t = mu_text.x. With kappa the image's,
    c = mu_image.mu_text, s = D - 1 + kappa and M = kappa / s, t has, exactly,
        mean M c,   variance (D - 1 + 2 kappa) (1 - M c^2) / (s (s + 1)),
    as mu_image.x is 2 Beta((D-1)/2 + kappa, (D-1)/2) - 1 and the rest of x is uniform around mu_image. (1 + t)/2 is
    taken for the Beta(a, n - a) of that mean and variance, which it is at kappa = 0 and at c = 1 and -1, and
        E log(1 + t) = log 2 + digamma(a) - digamma(n) = log(1 + M c) - (1/a - 1/n)/2 - (1/a^2 - 1/n^2)/12 + O(a^-4).
    Accuracy of E log(1 + t), against quadrature, kappa up to 1e4: 8e-4 at D = 16, 5e-5 at D = 64, 6e-7 at D = 512.
    Args: eta_image (N, D), eta_text (M, D). temperature: scalar.
    Returns: (N, M), from one matrix product.
    Source: of x, arXiv 2006.04437, algorithm 1; minus the cross-entropy of two distributions, in this form our own.
    """
    dim, kappa, kappa_text = eta_text.shape[-1], concentration(eta_image)[:, None], concentration(eta_text)
    cosine = pairwise_products(eta_image / kappa, eta_text / kappa_text[:, None]).clamp(-1, 1)  # (N, M)
    s = dim - 1 + kappa  # (N, 1)
    mean = kappa / s * cosine
    variance = (dim - 1 + 2 * kappa) / (s * (s + 1)) * (1 - mean * cosine)
    n = ((1 - mean.square()) / variance - 1).clamp_min((dim - 1) / 2)  # less by rounding only
    log = power_spherical_kernel(mean)
    ratio = 2 * torch.exp(-log)  # n / a
    kernel = log - (ratio - 1) / (2 * n) - (ratio.square() - 1) / (12 * n.square())
    log_normalizer = power_spherical_log_normalizer(kappa_text, dim)  # (M,)
    return torch.addcmul(temperature * log_normalizer, temperature * kappa_text, kernel)


@full_precision
def expected_von_mises_fisher_log_prob(eta_image, eta_text, temperature=1.0):
    """The same for von Mises-Fisher, log C(kappa_text) - log C(0) + kappa_text A_D(kappa_image) mu_image.mu_text.

    The mean of x is A_D(kappa_image) mu_image, and the log density is linear in x: this is exact.
    Source: Mardia & Jupp, sec. 9.3.2; minus the cross-entropy, as in Diethe, arXiv 1502.07104.
    """
    kappa = concentration(eta_image)  # (N,)
    mean = (mean_resultant_length(kappa, eta_image.shape[-1]) / kappa)[:, None] * eta_image  # (N, D)
    return von_mises_fisher_log_prob(mean, eta_text, temperature)


def log_uniform_density(dim):
    """log C(0) = lgamma(D/2) - log 2 - (D/2) log pi, of the uniform density: one over the sphere's area.

    Args: dim D >= 2.
    Returns: float.
    Source: DLMF 5.19.4 (https://dlmf.nist.gov/5.19).
    """
    return math.lgamma(dim / 2) - math.log(2) - dim / 2 * math.log(math.pi)


def power_spherical_log_normalizer(kappa, dim):
    """log C(kappa) - log C(0) = lgamma(a + b) - lgamma(a) - lgamma(2b) + lgamma(b) - kappa log 2.

    log C(kappa) = -[(a + b) log 2 + lgamma(a) - lgamma(a + b) + b log pi], with a = (D-1)/2 + kappa, b = (D-1)/2.
    Domain: kappa >= 0, D >= 2. Limits: 0 as kappa -> 0; b log(kappa / 4 pi) - kappa log 2 - log C(0) as kappa -> inf.
    Accuracy: computed in float64 where the device has it, as in float32 it would be off by up to 2e-3 at small kappa.
    Args: kappa (M,), dim D.
    Returns: (M,) in kappa's type.
    Source: arXiv 2006.04437, eq. 6.
    """
    wide = widest(kappa)
    b = (dim - 1) / 2
    a = b + wide
    uniform = math.lgamma(b) - math.lgamma(2 * b)  # the terms at kappa = 0
    return (torch.lgamma(a + b) - torch.lgamma(a) + uniform - wide * math.log(2)).to(kappa.dtype)


def von_mises_fisher_log_normalizer(kappa, dim):
    """log C(kappa) - log C(0), log C(kappa) = v log kappa - (D/2) log 2 pi - log I_v(kappa), v = D/2 - 1.

    There is no Bessel function: I_v is replaced by its uniform expansion for large order, and v log kappa cancels
    against the expansion's by hand: nothing diverges as kappa -> 0. With s = sqrt(1 + (kappa/v)^2),
        log C = v log v - (D/2) log 2 pi - v s + v log(1 + s) + log(2 pi v)/2 + log(s)/2 - log sum_k U_k(1/s) / v^k.
    Below D = 16, where six terms are too few, the same at v + n, and n steps down (`_log_scaled_bessel`).
    Domain: kappa >= 0, D >= 2. Limits: 0 as kappa -> 0; (v + 1/2) log(kappa / 2 pi) - kappa - log C(0) as kappa -> inf.
    Accuracy, against mpmath at D = 2 to 1152 and kappa in (0, 1e4]: 1e-6 max(1, |log C|) in float64, 2e-3 absolute in
    float32; the gradient, -I_{D/2}(kappa) / I_{D/2-1}(kappa), 1e-6 relative in float64 (tests/test_asymvlm.py).
    Args: kappa (M,), dim D.
    Returns: (M,) in kappa's type.
    Source: DLMF 10.41.3, 10.29.1 and, at 0, 10.25.2 (https://dlmf.nist.gov/10).
    """
    v = dim / 2 - 1
    uniform = -v * math.log(2) - math.lgamma(v + 1)  # log F_v(0)
    return (uniform - _log_scaled_bessel(widest(kappa), v)).to(kappa.dtype)


def approximate_von_mises_fisher_log_normalizer(kappa, dim):
    """log C(kappa) - log C(0) from the mean of two bounds of the Bessel functions' ratio.

    sum_b [a log((a + r_b) / (a + b)) - (r_b - b)] / 2 with a = (D-1)/2, r_b = sqrt(b^2 + kappa^2) and b = a, a + 1: its
    derivative is minus the mean of the upper and the lower bound kappa / (a + r_b) of I_{D/2} / I_{D/2-1}.
    Domain: kappa >= 0, D >= 2. Error at D = 512: 0.003 at kappa = 50, 0.05 at 300, 0.1 at 5000.
    Args, Returns: as for the exact one.
    Source: Scott, Gallagher & Mozer, "von Mises-Fisher loss", arXiv 2103.15718; what AsymVLM's authors train with.
    """
    wide, a = widest(kappa), (dim - 1) / 2
    roots = [(b, torch.sqrt(b**2 + wide.square())) for b in (a, a + 1)]
    return sum((a * torch.log((a + root) / (a + b)) - (root - b)) / 2 for b, root in roots).to(kappa.dtype)


def mean_resultant_length(kappa, dim):
    """A_D(kappa) = I_{D/2}(kappa) / I_{D/2-1}(kappa), the length of the mean of x under von Mises-Fisher: in [0, 1).

    It is minus the derivative of log C, kappa F_{v+1} / F_v with v and F as there. Limits: kappa / D as kappa -> 0;
    1 - (D-1) / (2 kappa) as kappa -> inf. Accuracy, against mpmath, where log C has been tested: 1e-6 relative, and of
    its gradient 1e-4.
    Args: kappa (N,), dim D.
    Returns: (N,) in kappa's type.
    Source: Mardia & Jupp, sec. 9.3.2.
    """
    wide, v = widest(kappa), dim / 2 - 1
    return (wide * torch.exp(_log_scaled_bessel(wide, v + 1) - _log_scaled_bessel(wide, v))).to(kappa.dtype)


def _log_scaled_bessel(kappa, v):
    """log F_v, F_v = kappa^-v I_v(kappa), (M,), of order v >= 0, below 7 by F_{v-1} = 2 v F_v + kappa^2 F_{v+1}."""
    steps = max(0, math.ceil(LEAST_ORDER - v))
    log_f = _expansion(kappa, v + steps)
    above = _expansion(kappa, v + steps + 1) if steps else None
    for step in range(steps, 0, -1):
        log_f, above = log_f + torch.log(2 * (v + step) + kappa.square() * torch.exp(above - log_f)), log_f
    return log_f


def _expansion(kappa, v):
    """log F_v, (M,), by the uniform expansion: the larger v, the more accurate."""
    s = torch.sqrt(1 + (kappa / v) ** 2)
    powers, coefficients = _series(v, kappa.dtype, kappa.device)  # (P,) each
    series = ((1 / s)[..., None] ** powers * coefficients).sum(dim=-1)
    constant = v * math.log(v) + math.log(2 * math.pi * v) / 2
    return -(constant - v * s + v * torch.log1p(s) + torch.log(s) / 2 - torch.log1p(series))


@functools.cache  # making it stops a GPU
def _series(v, dtype, device):
    """sum_k U_k(p) / v^k, k = 1 .. TERMS, as a polynomial in p: its powers and their coefficients, (P,) each."""
    # U_0 = 1, U_{k+1}(p) = p^2 (1 - p^2) U_k'(p) / 2 + (1/8) integral_0^p (1 - 5 t^2) U_k(t) dt (DLMF 10.41.10)
    polynomial, total = {0: Fraction(1)}, Counter()  # power -> coefficient
    for k in range(1, TERMS + 1):
        following = Counter()
        for power, c in polynomial.items():
            following[power + 1] += c * power / 2 + c / (8 * (power + 1))
            following[power + 3] -= c * power / 2 + 5 * c / (8 * (power + 3))
        polynomial = following
        for power, c in polynomial.items():
            total[power] += float(c) / v**k
    with torch.inference_mode(False):  # cached for training too
        return torch.tensor(sorted(total.items()), dtype=dtype, device=device).T.contiguous()
