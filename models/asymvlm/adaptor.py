"""AsymVLM: raw CLIP embeddings in, likelihoods of images under texts' distributions out (arXiv 2505.11029, sec. 3)."""

import torch
from torch import nn

from models.asymvlm.distributions import concentration, power_spherical_log_prob, von_mises_fisher_log_prob
from models.base import Adaptor, Recipe, recipes_of
from models.layers import mlp, unit

TEMPERATURE = 1.0  # initial value, as in the paper's code


class AsymVLM(Adaptor):
    """An image stays a point x = unit(z) on the sphere, a text becomes a distribution on it, which a subclass names.

    eta = MLP(z), kappa = ||eta||, mu = eta / kappa; mean = mu, uncertainty = 1 / kappa.
    """

    recipes = recipes_of(Recipe("sgd", lr=1e-2, weight_decay=5e-4), lr=3e-3)
    log_prob = None  # (x (N, D), eta (M, D), temperature) -> (N, M)

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.text_mlp = mlp(embed_dim)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))

    def encode_image(self, z):
        return (unit(z),)

    def encode_text(self, z):
        return (self.text_mlp(z),)

    def describe_text(self, eta):
        kappa = concentration(eta)  # (N,)
        return eta / kappa[:, None], 1 / kappa

    def score(self, image, text):
        """log p(x_i | text_j), (N, M): the normaliser changes the ranking of texts for an image, not that of images."""
        return self.log_prob(*image, *text)

    def loss(self, x, eta):
        """InfoNCE in both directions: -mean_b [log softmax over the row + log softmax over the column]_{bb} / 2."""
        logits = self.log_prob(x, eta, self.temperature)  # (B, B)
        by_row, by_column = logits.log_softmax(dim=1), logits.log_softmax(dim=0)
        return -(by_row.diagonal() + by_column.diagonal()).mean() / 2


class PowerSphericalAdaptor(AsymVLM):
    """AsymVLM with the Power Spherical distribution (`asymvlm-psd`)."""

    log_prob = staticmethod(power_spherical_log_prob)


class VonMisesFisherAdaptor(AsymVLM):
    """AsymVLM with the von Mises-Fisher distribution (`asymvlm-vmf`)."""

    log_prob = staticmethod(von_mises_fisher_log_prob)
