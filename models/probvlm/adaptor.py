"""ProbVLM: generalised Gaussians that reconstruct the embeddings (arXiv 2307.00398)."""

import torch
from torch import nn

from models.base import Adaptor, Recipe, recipes_of
from models.layers import HIDDEN, at_least_float32
from models.probvlm.loss import LIKELIHOOD_WEIGHT, mean_variance, positive, probvlm_loss


class BayesCap(nn.Module):
    """The network of one modality: a residual trunk and a head for each of the three parameters."""

    hidden = HIDDEN  # width of the trunk's hidden layers
    dropout = 0.0  # fraction of the second hidden layer
    positive = staticmethod(positive)  # keeps 1/alpha and beta from being negative

    def __init__(self, embed_dim):
        super().__init__()
        self.mod = nn.Sequential(
            nn.Linear(embed_dim, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, self.hidden),
            nn.ReLU(),
            nn.Dropout(self.dropout),
            nn.Linear(self.hidden, embed_dim),
        )
        self.block_mu = self.make_head(embed_dim)
        self.block_alpha = self.make_head(embed_dim)
        self.block_beta = self.make_head(embed_dim)

    @staticmethod
    def make_head(embed_dim):
        """A network for one parameter, (N, D) -> (N, D)."""
        return nn.Sequential(
            nn.Linear(embed_dim, embed_dim),
            nn.ReLU(),
            nn.Linear(embed_dim, embed_dim),
        )

    def forward(self, z):
        """(N, D) -> mean, 1/alpha >= 0 and beta >= 0, (N, D) each."""
        return self.heads(self.mod(z) + z)

    def heads(self, h):
        """The same from the output of the trunk, (N, D)."""
        # The gradient of |mean - z| is a sign, which rounding to bfloat16 would often flip.
        with torch.autocast(h.device.type, enabled=False):
            mean = self.block_mu(at_least_float32(h))
        inv_alpha = self.positive(self.block_alpha(h))
        beta = self.positive(self.block_beta(h))
        return mean, inv_alpha, beta


class ProbVLMAdaptor(Adaptor):
    """mean, 1/alpha and beta from a BayesCap per modality, which reconstruct z, (N, D) each.

    uncertainty = 1 / mean_d var, the inverse of a variance, as in the AsymVLM paper's repository.
    The authors of ProbVLM invert it for texts alone. With `adaptor.inverted = False` it is
    mean_d var, which reverses the order of the uncertainties. Retrieval does not depend on it.
    Source: arXiv 2307.00398, sec. 3.
    """

    recipes = recipes_of(Recipe("adamw", lr=1e-4, weight_decay=5e-4))
    has_fixed_kernels = True
    bayescap = BayesCap
    inverted = True
    likelihood_weight = LIKELIHOOD_WEIGHT

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.image_bayescap = self.bayescap(embed_dim)
        self.text_bayescap = self.bayescap(embed_dim)

    def encode_image(self, z):
        return (*self.image_bayescap(z), z)

    def encode_text(self, z):
        return (*self.text_bayescap(z), z)

    def describe_text(self, mean, inv_alpha, beta, z):
        variance = mean_variance(inv_alpha, beta)  # (N,)
        if self.inverted:
            return mean, 1 / variance
        return mean, variance

    describe_image = describe_text

    def loss(self, *encoded):
        """The terms of the loss of the true pairs. There are no negatives."""
        return probvlm_loss(*encoded, self.likelihood_weight)
