"""Two densities on the unit sphere, from a text's natural parameter eta = kappa mu and an image's direction x.

Both are log_normalizer(kappa) + kernel: kappa log(1 + mu.x) for the Power Spherical distribution, kappa mu.x for the
von Mises-Fisher distribution. kappa >= 0 is the concentration: 0 is uniform, and 1/kappa is the uncertainty.
"""

import functools
import math
from collections import Counter
from fractions import Fraction

import torch
from torch.nn import functional as F

from models.layers import full_precision, pairwise_products

KAPPA_MIN = 1e-6  # keeps mu = eta / kappa and 1/kappa finite where eta = 0
LEAST_ORDER = 7  # v of D = 16, from which on six terms suffice
TERMS = 6  # of the expansion of the Bessel function; 4 are off by 1.7e-9 in the loss at D = 16, 6 by 2e-11


@full_precision
def concentration(eta):
    """kappa = ||eta||, (M, D) -> (M,), at least 1e-6."""
    return torch.linalg.vector_norm(eta, dim=-1).clamp_min(KAPPA_MIN)


@full_precision
def power_spherical_log_prob(x, eta, temperature=1.0):
    """Log density of every image under every text's Power Spherical distribution, times a temperature.

    log C(kappa) + kappa log(1 + mu.x). The temperature meets the (M,) parameters rather than the (N, M) densities: it
    saves three passes over those in a training step.
    Args: x (N, D): unit vectors. eta (M, D): kappa mu. temperature: scalar.
    Returns: (N, M), finite also where rounding brings mu.x to -1 (or below), as is its gradient.
    Source: De Cao & Aziz, "The Power Spherical distribution", arXiv 2006.04437, eq. 6.
    """
    kappa = concentration(eta)  # (M,)
    least = torch.finfo(x.dtype).eps  # log(0) is -inf; clamp_min would take longer back than threshold
    one_plus_cosine = F.threshold(1 + pairwise_products(x, eta / kappa[:, None]), least, least)  # (N, M)
    log_normalizer = power_spherical_log_normalizer(kappa, eta.shape[-1])  # (M,)
    return torch.addcmul(temperature * log_normalizer, temperature * kappa, one_plus_cosine.log())


@full_precision
def von_mises_fisher_log_prob(x, eta, temperature=1.0):
    """The same for the von Mises-Fisher distribution, log C(kappa) + kappa mu.x.

    Source: Mardia & Jupp, "Directional Statistics", eq. 9.3.4.
    """
    log_normalizer = von_mises_fisher_log_normalizer(concentration(eta), eta.shape[-1])  # (M,)
    return temperature * log_normalizer + pairwise_products(x, temperature * eta)


def power_spherical_log_normalizer(kappa, dim):
    """log C(kappa) = -[(a + b) log 2 + lgamma(a) - lgamma(a + b) + b log pi], with a = (D-1)/2 + kappa, b = (D-1)/2.

    Domain: kappa >= 0, D >= 2. Limits: uniform as kappa -> 0; b log(kappa / 4 pi), less (kappa log 2), as kappa -> inf.
    Accuracy: computed in float64 where the device has it, as in float32 it would be off by up to 2e-3 at small kappa.
    Args: kappa (M,), dim D.
    Returns: (M,) in kappa's type.
    Source: arXiv 2006.04437, eq. 6.
    """
    wide = _widest(kappa)
    b = (dim - 1) / 2
    a = b + wide
    return -((a + b) * math.log(2) + torch.lgamma(a) - torch.lgamma(a + b) + b * math.log(math.pi)).to(kappa.dtype)


def von_mises_fisher_log_normalizer(kappa, dim):
    """log C(kappa) = v log kappa - (D/2) log 2 pi - log I_v(kappa), with v = D/2 - 1, without a Bessel function.

    I_v is replaced by its uniform expansion for large order, and v log kappa cancels against the expansion's by hand:
    nothing diverges as kappa -> 0. With s = sqrt(1 + (kappa/v)^2),
        log C = v log v - (D/2) log 2 pi - v s + v log(1 + s) + log(2 pi v)/2 + log(s)/2 - log sum_k U_k(1/s) / v^k.
    Below D = 16, where six terms are too few, the same at v + n, and n steps down: with F_v = kappa^-v I_v,
        F_{v-1} = 2 v F_v + kappa^2 F_{v+1}.
    Domain: kappa >= 0, D >= 2. Limits: uniform as kappa -> 0; (v + 1/2) log(kappa / 2 pi) - kappa as kappa -> inf.
    Accuracy, against mpmath at D = 2 to 1152 and kappa in (0, 1e4]: 1e-6 max(1, |log C|) in float64, 2e-3 absolute in
    float32; the gradient, -I_{D/2}(kappa) / I_{D/2-1}(kappa), 1e-6 relative in float64 (tests/test_asymvlm.py).
    Args: kappa (M,), dim D.
    Returns: (M,) in kappa's type.
    Source: DLMF 10.41.3 and 10.29.1 (https://dlmf.nist.gov/10.41).
    """
    wide = _widest(kappa)
    v = dim / 2 - 1
    steps = max(0, math.ceil(LEAST_ORDER - v))
    log_f = _log_scaled_bessel(wide, v + steps)
    above = _log_scaled_bessel(wide, v + steps + 1) if steps else None
    for step in range(steps, 0, -1):
        log_f, above = log_f + torch.log(2 * (v + step) + wide.square() * torch.exp(above - log_f)), log_f
    return -(log_f + (dim / 2) * math.log(2 * math.pi)).to(kappa.dtype)


def _log_scaled_bessel(kappa, v):
    """log(kappa^-v I_v(kappa)), (M,), by the uniform expansion: the larger v, the more accurate."""
    s = torch.sqrt(1 + (kappa / v) ** 2)
    powers, coefficients = _series(v, kappa.dtype, kappa.device)  # (P,) each
    series = ((1 / s)[..., None] ** powers * coefficients).sum(dim=-1)
    constant = v * math.log(v) + math.log(2 * math.pi * v) / 2
    return -(constant - v * s + v * torch.log1p(s) + torch.log(s) / 2 - torch.log1p(series))


def _widest(x):
    return x if x.device.type == "mps" else x.double()  # Apple's GPU has no float64


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
