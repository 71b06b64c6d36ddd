"""ProbVLM: raw CLIP embeddings in, generalised Gaussians that reconstruct them out (arXiv 2307.00398, sec. 3)."""

from torch import nn

from models.base import SMALL, Adaptor, Recipe
from models.layers import HIDDEN, at_least_float32
from models.probvlm.loss import mean_variance, positive, probvlm_loss


class BayesCap(nn.Module):
    """The network of one modality: a residual trunk on z, and three heads for the parameters of the generalised Gaussian."""

    def __init__(self, embed_dim, hidden=HIDDEN):
        super().__init__()
        self.mod = nn.Sequential(
            nn.Linear(embed_dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(0.0),  # drops nothing; it keeps the indices of the paper's checkpoints
            nn.Linear(hidden, embed_dim),
        )
        self.block_mu = _head(embed_dim)
        self.block_alpha = _head(embed_dim)
        self.block_beta = _head(embed_dim)

    def forward(self, z):
        """(N, D) -> mean, 1/alpha > 0 and beta > 0, (N, D) each."""
        h = self.mod(z) + z  # (N, D)
        return at_least_float32(self.block_mu(h)), positive(self.block_alpha(h)), positive(self.block_beta(h))


class ProbVLMAdaptor(Adaptor):
    """mean, 1/alpha and beta from a BayesCap a modality; uncertainty = 1 / mean_d var, or mean_d var with `inverted = False`.

    The inverse of a variance is what the published evaluations of ProbVLM call its uncertainty, the authors' as well as the AsymVLM paper's,
    so it is the default here, for comparison with their tables. `adaptor.inverted = False` makes `adapt_image` and `adapt_text` report
    the variance itself; it reverses every ranking by uncertainty. `models.probvlm.loss.mean_variance` computes it from what they encode.
    """

    recipes = {"paper": Recipe("adamw", lr=1e-4, weight_decay=5e-4), "small": SMALL}
    inverted = True

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.image_bayescap = BayesCap(embed_dim)
        self.text_bayescap = BayesCap(embed_dim)

    def encode_image(self, z):
        """(N, D) -> (mean, 1/alpha, beta, z), (N, D) each; z is what the loss reconstructs."""
        return *self.image_bayescap(z), z

    def encode_text(self, z):
        """(N, D) -> (mean, 1/alpha, beta, z), (N, D) each; z is what the loss reconstructs."""
        return *self.text_bayescap(z), z

    def describe_image(self, mean, inv_alpha, beta, z):
        """mean (N, D) and 1 / mean_d var (N,), or mean_d var if not `inverted`."""
        return mean, self._uncertainty(inv_alpha, beta)

    def describe_text(self, mean, inv_alpha, beta, z):
        """mean (N, D) and 1 / mean_d var (N,), or mean_d var if not `inverted`."""
        return mean, self._uncertainty(inv_alpha, beta)

    def loss(self, mean_image, inv_alpha_image, beta_image, z_image, mean_text, inv_alpha_text, beta_text, z_text):
        """Each modality reconstructs its own embedding and, with little weight, its partner's; there are no negatives."""
        return probvlm_loss(
            mean_image, inv_alpha_image, beta_image, z_image, mean_text, inv_alpha_text, beta_text, z_text
        )

    def _uncertainty(self, inv_alpha, beta):
        variance = mean_variance(inv_alpha, beta)
        return 1 / variance if self.inverted else variance


def _head(embed_dim):
    return nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, embed_dim))
