"""AsymVLM: raw CLIP embeddings in, log-likelihoods of images under texts' distributions out (arXiv 2505.11029, sec. 3).

The image stays a point x = z_image / ||z_image||; the text becomes a distribution with eta = MLP(z_text), kappa = ||eta||, mu = eta / kappa.
"""

import torch
from torch import nn

from models.asymvlm.distributions import concentration, power_spherical_log_prob, von_mises_fisher_log_prob
from models.base import SMALL, Adaptor, Recipe
from models.layers import mlp, unit

TEMPERATURE = 1.0  # initial value, as in the paper's code


class AsymVLM(Adaptor):
    """What both distributions share; a subclass names its `log_prob`: (x (N, D), eta (M, D), temperature) -> (N, M)."""

    recipes = {"paper": Recipe("sgd", lr=1e-2, weight_decay=5e-4), "small": SMALL}
    log_prob = None

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.text_mlp = mlp(embed_dim)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))

    def encode_image(self, z):
        """(N, D) -> (x (N, D),), unit vectors."""
        return (unit(z),)

    def encode_text(self, z):
        """(N, D) -> (eta (N, D),), the natural parameter kappa mu."""
        return (self.text_mlp(z),)

    def describe_text(self, eta):
        """mu (N, D) and 1/kappa (N,)."""
        kappa = concentration(eta)
        return eta / kappa[:, None], 1 / kappa

    def score(self, image, text):
        """log p(x_i | text_j), (N, M): for a fixed text the normaliser does not change the ranking, for a fixed image it does."""
        return self.log_prob(*image, *text)

    def loss(self, x, eta):
        """Mean of the two cross-entropies, over rows and over columns, of temperature * log p(x_i | text_j) against the diagonal."""
        return symmetric_cross_entropy(self.log_prob(x, eta, self.temperature))


class PowerSphericalAdaptor(AsymVLM):
    """AsymVLM with the Power Spherical distribution (`asymvlm-psd`)."""

    log_prob = staticmethod(power_spherical_log_prob)


class VonMisesFisherAdaptor(AsymVLM):
    """AsymVLM with the von Mises-Fisher distribution (`asymvlm-vmf`)."""

    log_prob = staticmethod(von_mises_fisher_log_prob)


def symmetric_cross_entropy(logits):
    """InfoNCE in both directions, (B, B) -> (): -mean_b [log softmax over the row + log softmax over the column]_{bb} / 2."""
    by_row, by_column = logits.log_softmax(dim=1), logits.log_softmax(dim=0)  # (B, B) each
    return -(by_row.diagonal() + by_column.diagonal()).mean() / 2
