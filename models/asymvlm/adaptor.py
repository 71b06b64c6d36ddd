"""AsymVLM: raw CLIP embeddings in, likelihoods of images under texts' distributions out (arXiv 2505.11029, sec. 3)."""

import torch
from torch import nn

from models.asymvlm import distributions
from models.asymvlm.distributions import concentration
from models.base import Adaptor, Recipe, recipes_of
from models.layers import mlp, symmetric_cross_entropy, unit

TEMPERATURE = 1.0  # initial value, as in the paper's code


class AsymVLM(Adaptor):
    """An image stays a point x = unit(z) on the sphere, a text becomes a distribution on it, which a subclass names.

    eta = MLP(z), kappa = ||eta||, mu = eta / kappa; mean = mu, uncertainty = 1 / kappa. models/asymvlm/variants.py has
    other choices of what is a point and what a distribution.
    """

    recipes = recipes_of(paper := Recipe("sgd", lr=1e-2, weight_decay=5e-4), lr=3e-3) | {"original": paper}
    spread = ("text",)  # the modalities whose embeddings become distributions
    log_prob = None  # (x (N, D), eta (M, D), temperature) -> (N, M), log C(kappa) - log C(0) + kappa kernel(mu.x)
    log_normalizer = kernel = None  # (kappa (M,), D) -> (M,); (cosine) -> the same shape
    expected_log_prob = None  # (eta_image (N, D), eta_text (M, D), temperature) -> (N, M)

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        for modality in self.spread:
            self.add_module(f"{modality}_mlp", mlp(embed_dim))
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))

    def encode_image(self, z):
        return (unit(z),)

    def encode_text(self, z):
        return (self.text_mlp(z),)

    def describe_text(self, eta):
        kappa = concentration(eta)  # (N,)
        return eta / kappa[:, None], 1 / kappa

    def log_likelihood(self, x, eta, temperature=1.0):
        """temperature log p(x_i | text_j), (N, M), of what the encoders return."""
        return self.log_prob(x, eta, temperature)

    def score(self, image, text):
        """log p(x_i | text_j), (N, M): the normaliser changes the ranking of texts for an image, not that of images."""
        return self.log_likelihood(*image, *text)

    def loss(self, *encoded):
        """InfoNCE in both directions: -mean_b [log softmax over the row + log softmax over the column]_{bb} / 2."""
        return symmetric_cross_entropy(self.log_likelihood(*encoded, temperature=self.temperature))


class PowerSphericalAdaptor(AsymVLM):
    """AsymVLM with the Power Spherical distribution (`asymvlm-psd`)."""

    log_prob = staticmethod(distributions.power_spherical_log_prob)
    log_normalizer = staticmethod(distributions.power_spherical_log_normalizer)
    kernel = staticmethod(distributions.power_spherical_kernel)
    expected_log_prob = staticmethod(distributions.expected_power_spherical_log_prob)


class VonMisesFisherAdaptor(AsymVLM):
    """AsymVLM with the von Mises-Fisher distribution (`asymvlm-vmf`)."""

    log_prob = staticmethod(distributions.von_mises_fisher_log_prob)
    log_normalizer = staticmethod(distributions.von_mises_fisher_log_normalizer)
    kernel = staticmethod(torch.positive)  # mu.x itself
    expected_log_prob = staticmethod(distributions.expected_von_mises_fisher_log_prob)
