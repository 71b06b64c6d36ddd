"""AsymVLM with one design choice changed at a time, to test what the paper claims for it.

The docstring of a class says what it does differently from AsymVLM (adaptor.py). Everything else,
including the recipe, is the same.
"""

import math

import torch
from torch import nn

from models.asymvlm import distributions
from models.asymvlm.adaptor import (
    TEMPERATURE,
    AsymVLM,
    PowerSphericalAdaptor,
    VonMisesFisherAdaptor,
)
from models.asymvlm.distributions import (
    approximate_von_mises_fisher_log_normalizer,
    concentration,
)
from models.layers import HIDDEN, at_least_float32, pairwise_products, unit, widest

# Constants of Anchored, chosen on a held-out tenth of the train images of `shapes`.
START_KAPPA = 20.0
RATE = 0.3
REACH = 0.2
LARGEST_LOG_SCALE = 10.0  # guards exp against texts unlike those of the training set


class Frozen(AsymVLM):
    """mu = unit(z) and kappa = ||MLP(z)|| for a text: only kappa is learned.

    Images are ranked as by the frozen CLIP.
    """

    def encode_text(self, z):
        return unit(z), concentration(self.text_mlp(z))

    def describe_text(self, mu, kappa):
        return mu, 1 / kappa

    def log_likelihood(self, x, mu, kappa, temperature=1.0):
        eta = kappa[:, None] * mu
        return self.log_prob(x, eta, temperature)

    def score(self, image, text):
        """log p(x_i | text_j), (N, M), in float64 if the device supports it.

        It increases with the frozen CLIP's cosine. In float64, different cosines give different
        scores and equal cosines equal ones, so that images are ranked exactly as by the frozen
        CLIP, ties included. In float32, close cosines would become ties.
        """
        (x,) = image
        mu, kappa = text
        cosine = widest(pairwise_products(x, mu))  # (N, M)
        kappa = widest(kappa)  # (M,)
        return self.log_normalizer(kappa, self.embed_dim) + kappa * self.kernel(cosine)


class Image(AsymVLM):
    """The roles exchanged: p(x_text | image), and a text is a point without uncertainty."""

    spread = ("image",)

    def encode_image(self, z):
        return (self.image_mlp(z),)

    def encode_text(self, z):
        return (unit(z),)

    describe_image = AsymVLM.describe_text

    def describe_text(self, x):
        return x, None

    def log_likelihood(self, eta, x, temperature=1.0):
        return self.log_prob(x, eta, temperature).T


class Both(AsymVLM):
    """Both are distributions, and a text is scored by its expected log-likelihood of the image.

    S_ij = E_{x ~ p(x | image_i)} log p(x | text_j), which is minus the cross-entropy of the two
    and tends to log p(x_i | text_j) as the image's kappa tends to infinity. Equations and
    accuracy: `expected_..._log_prob` in distributions.py.
    For an image, eta = D MLP(z), because the length of the distribution's mean depends almost only
    on kappa / D. Without the factor D, all logits would be nearly equal before training.
    """

    spread = ("image", "text")

    def encode_image(self, z):
        return (self.embed_dim * at_least_float32(self.image_mlp(z)),)

    describe_image = AsymVLM.describe_text

    def log_likelihood(self, eta_image, eta_text, temperature=1.0):
        return self.expected_log_prob(eta_image, eta_text, temperature)


class FixedTemperature(AsymVLM):
    """temperature = 1, a constant: S_ij is the log density itself.

    The temperature is a buffer, so that checkpoints hold it under the usual name.
    """

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        del self.temperature
        self.register_buffer("temperature", torch.tensor(TEMPERATURE))


class Anchored(AsymVLM):
    """A text starts at its direction in the frozen CLIP, and weight decay keeps it near.

    eta = START_KAPPA exp(RATE a) (unit(z) + REACH b / sqrt(D)), where a (N, 1) and b (N, D) are
    linear in the MLP's last hidden layer and near 0 before training; kappa = ||eta|| and
    mu = eta / kappa as usual. REACH slows mu down relative to kappa, so that the CLIP's ranking
    changes little if there are few data. RATE slows log kappa down.
    """

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.log_kappa = nn.Linear(HIDDEN, 1)

    def encode_text(self, z):
        hidden = self.text_mlp[:-1](z)  # (N, 1024)
        a = at_least_float32(self.log_kappa(hidden))  # (N, 1)
        b = at_least_float32(self.text_mlp[-1](hidden))  # (N, D)
        log_scale = math.log(START_KAPPA) + RATE * a
        scale = log_scale.clamp_max(LARGEST_LOG_SCALE).exp()
        step = REACH * b / self.embed_dim**0.5
        return (scale * (unit(z) + step),)


class PowerSphericalFrozen(Frozen, PowerSphericalAdaptor):
    """`asymvlm-psd-frozen`"""


class VonMisesFisherFrozen(Frozen, VonMisesFisherAdaptor):
    """`asymvlm-vmf-frozen`"""


class PowerSphericalImage(Image, PowerSphericalAdaptor):
    """`asymvlm-psd-image`"""


class VonMisesFisherImage(Image, VonMisesFisherAdaptor):
    """`asymvlm-vmf-image`"""


class PowerSphericalBoth(Both, PowerSphericalAdaptor):
    """`asymvlm-psd-both`"""


class VonMisesFisherBoth(Both, VonMisesFisherAdaptor):
    """`asymvlm-vmf-both`"""


class PowerSphericalFixedTemperature(FixedTemperature, PowerSphericalAdaptor):
    """`asymvlm-psd-fixed-temperature`"""


class VonMisesFisherFixedTemperature(FixedTemperature, VonMisesFisherAdaptor):
    """`asymvlm-vmf-fixed-temperature`"""


class PowerSphericalAnchored(Anchored, PowerSphericalAdaptor):
    """`asymvlm-psd-anchored`"""


class VonMisesFisherAnchored(Anchored, VonMisesFisherAdaptor):
    """`asymvlm-vmf-anchored`"""


class VonMisesFisherApproximate(VonMisesFisherAdaptor):
    """`asymvlm-vmf-approximate`: the paper's approximation of the normaliser.

    It differs from the exact log C by up to 0.1 at D = 512. That changes the ranking of texts of
    different kappa for an image, but not of images for a text.
    """

    @staticmethod
    def log_prob(x, eta, temperature=1.0):
        return distributions.von_mises_fisher_log_prob(
            x, eta, temperature, approximate_von_mises_fisher_log_normalizer
        )
