"""AsymVLM: a text becomes a distribution on the sphere, an image a point (arXiv 2505.11029)."""

import torch
from torch import nn

from models.asymvlm import distributions
from models.asymvlm.distributions import concentration
from models.base import Adaptor, Recipe, recipes_of
from models.layers import mlp, symmetric_cross_entropy, unit

TEMPERATURE = 1.0  # initial value, as in AsymVLM's repository; it multiplies the logits
PAPER_RECIPE = Recipe("sgd", lr=1e-2, weight_decay=5e-4)


class AsymVLM(Adaptor):
    """An image stays a point x = unit(z) on the sphere, a text becomes a distribution on it.

    eta = MLP(z), kappa = ||eta||, mu = eta / kappa: the mean direction. uncertainty = 1 / kappa.
    A subclass sets the distribution. The variants in variants.py each change one design choice.
    Source: arXiv 2505.11029, sec. 3.
    """

    recipes = {**recipes_of(PAPER_RECIPE), "original": PAPER_RECIPE}
    has_fixed_kernels = True
    spread = ("text",)  # the modalities whose embeddings become distributions

    # The distribution: log p = log_normalizer(kappa) + kappa kernel(mu.x).
    log_prob = None  # (x (N, D), eta (M, D), temperature) -> (N, M)
    # The two parts of log_prob, for variants.Frozen.
    log_normalizer = None  # (kappa (M,), D) -> (M,)
    kernel = None  # cosine -> a tensor of the same shape
    # (eta_image (N, D), eta_text (M, D), temperature) -> (N, M); only variants.Both uses it
    expected_log_prob = None

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
        mu = eta / kappa[:, None]  # (N, D)
        return mu, 1 / kappa

    def log_likelihood(self, x, eta, temperature=1.0):
        """temperature * log p(x_i | text_j), (N, M), of what the encoders return."""
        return self.log_prob(x, eta, temperature)

    def score(self, image, text):
        """log p(x_i | text_j), (N, M).

        The normaliser changes the ranking of texts for an image, but not of images for a text.
        """
        return self.log_likelihood(*image, *text)

    def loss(self, *encoded):
        """InfoNCE in both directions, of the logits temperature * log p(x_i | text_j)."""
        logits = self.log_likelihood(*encoded, temperature=self.temperature)  # (B, B)
        return symmetric_cross_entropy(logits)


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
