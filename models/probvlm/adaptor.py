"""ProbVLM: raw CLIP embeddings in, generalised Gaussians that reconstruct them out (arXiv 2307.00398, sec. 3)."""

from torch import nn

from models.base import Adaptor, Recipe, recipes_of
from models.layers import HIDDEN, Dropout, at_least_float32
from models.probvlm.loss import mean_variance, positive, probvlm_loss


class BayesCap(nn.Module):
    """The network of one modality: a residual trunk, and heads for the three parameters of a generalised Gaussian."""

    hidden, dropout = HIDDEN, 0.0  # width of the hidden layers; share of them that is dropped in training
    positive = staticmethod(positive)  # what makes 1/alpha and beta positive

    def __init__(self, embed_dim):
        super().__init__()
        layers = [nn.Linear(embed_dim, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.hidden), nn.ReLU()]
        self.mod = nn.Sequential(*layers, Dropout(self.dropout), nn.Linear(self.hidden, embed_dim))
        self.block_mu, self.block_alpha, self.block_beta = (
            nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, embed_dim)) for _ in range(3)
        )

    def forward(self, z):
        """(N, D) -> mean, 1/alpha > 0 and beta > 0, (N, D) each."""
        return self.heads(self.mod(z) + z)

    def heads(self, h):
        """The same from what the trunk gives, (N, D)."""
        mean, inv_alpha, beta = self.block_mu(h), self.block_alpha(h), self.block_beta(h)
        return at_least_float32(mean), self.positive(inv_alpha), self.positive(beta)


class ProbVLMAdaptor(Adaptor):
    """mean, 1/alpha and beta from a BayesCap a modality, beside the z that they reconstruct, (N, D) each.

    uncertainty = 1 / mean_d var, inverted as in the AsymVLM paper's repository (its authors invert the text's alone);
    with `adaptor.inverted = False` it is the variance, which reverses every ranking.
    """

    recipes = recipes_of(Recipe("adamw", lr=1e-4, weight_decay=5e-4), lr=3e-4)
    bayescap = BayesCap
    inverted = True

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.image_bayescap = self.bayescap(embed_dim)
        self.text_bayescap = self.bayescap(embed_dim)

    def encode_image(self, z):
        return *self.image_bayescap(z), z

    def encode_text(self, z):
        return *self.text_bayescap(z), z

    def describe_text(self, mean, inv_alpha, beta, z):
        variance = mean_variance(inv_alpha, beta)  # (N,)
        return mean, 1 / variance if self.inverted else variance

    describe_image = describe_text

    loss = staticmethod(probvlm_loss)  # of the true pairs; there are no negatives
