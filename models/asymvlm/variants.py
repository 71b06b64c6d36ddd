"""AsymVLM's claims, one taken away at a time: raw CLIP embeddings in, likelihoods of one modality under the other out.

Each class lists what it does otherwise than AsymVLM (adaptor.py); everything else, the recipe too, is the same.
"""

import math
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from models.asymvlm.adaptor import TEMPERATURE, AsymVLM, PowerSphericalAdaptor, VonMisesFisherAdaptor
from models.asymvlm.distributions import (
    approximate_von_mises_fisher_log_normalizer,
    concentration,
    von_mises_fisher_log_prob,
    widest,
)
from models.layers import HIDDEN, at_least_float32, pairwise_products, unit

START_KAPPA, RATE, REACH = 20.0, 0.3, 0.2  # of Anchored, chosen on a held-out tenth of the train images of `shapes`
MOST_LOG_KAPPA = 10.0  # of Anchored: guards exp against a text unlike all that it was trained on


class Frozen(AsymVLM):
    """mu = unit(z) and kappa = ||MLP(z)|| for a text: the frozen CLIP ranks images, and kappa alone is learnt."""

    def encode_text(self, z):
        return unit(z), concentration(self.text_mlp(z))

    def describe_text(self, mu, kappa):
        return mu, 1 / kappa

    def log_likelihood(self, x, mu, kappa, temperature=1.0):
        return self.log_prob(x, kappa[:, None] * mu, temperature)

    def score(self, image, text):
        """log p(x_i | text_j), (N, M), from the frozen CLIP's own cosines, in float64 where the device has it.

        It grows with the cosine: float64 keeps apart what float32 cosines above -1 keep apart, and equal ones equal, so
        that images are ranked as by the frozen CLIP, ties too. In float32 neighbours would merge.
        """
        (x,), (mu, kappa) = image, text
        cosine, kappa = widest(pairwise_products(x, mu)), widest(kappa)
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
    """Both are distributions, and a text scores by the log-likelihood that it gives to draws of the image.

    S_ij = E_{x ~ p(x | image_i)} log p(x | text_j), minus the cross-entropy of the two: log p(x_i | text_j) where the
    image's kappa is infinite. Equations and accuracy: distributions.py, `expected_..._log_prob`.
    eta = D MLP(z) for an image: its mean depends on kappa / D alone, and the product of two small kappas would make all
    logits alike at the start.
    """

    spread = ("image", "text")

    def encode_image(self, z):
        return (self.embed_dim * at_least_float32(self.image_mlp(z)),)

    describe_image = AsymVLM.describe_text

    def log_likelihood(self, eta_image, eta_text, temperature=1.0):
        return self.expected_log_prob(eta_image, eta_text, temperature)


class FixedTemperature(AsymVLM):
    """temperature = 1, a constant: S_ij is the log density itself. It stays in the checkpoint, under its name."""

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        del self.temperature
        self.register_buffer("temperature", torch.tensor(TEMPERATURE))


class Anchored(AsymVLM):
    """A text starts where the frozen CLIP has it, and is moved from there by a short step that weight decay shortens.

    eta = START_KAPPA exp(RATE a) (unit(z) + REACH b / sqrt(D)), a (N, 1) and b (N, D) linear in the MLP's last hidden
    layer and near 0 at the start; kappa = ||eta|| and mu = eta / kappa, as ever. REACH holds mu back where kappa
    learns, so that the CLIP's ranking stays nearly as it is where data are few; RATE holds log kappa back.
    """

    recipes = AsymVLM.recipes | {"small": replace(AsymVLM.recipes["small"], lr=1e-3)}

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.log_kappa = nn.Linear(HIDDEN, 1)

    def encode_text(self, z):
        hidden = self.text_mlp[:-1](z)  # (N, 1024)
        log_kappa = math.log(START_KAPPA) + RATE * at_least_float32(self.log_kappa(hidden))
        step = REACH / self.embed_dim**0.5 * at_least_float32(self.text_mlp[-1](hidden))
        return (log_kappa.clamp_max(MOST_LOG_KAPPA).exp() * (unit(z) + step),)


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
    """`asymvlm-vmf-approximate`: the paper's normaliser without a Bessel function.

    Exactness changes log C by up to 0.1 at D = 512, which moves texts of
    different kappa against each other for an image; images for a text keep their order.
    """

    log_normalizer = staticmethod(approximate_von_mises_fisher_log_normalizer)
    log_prob = staticmethod(
        partial(von_mises_fisher_log_prob, log_normalizer=approximate_von_mises_fisher_log_normalizer)
    )
