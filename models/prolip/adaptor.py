"""ProLIP: an embedding becomes a diagonal Gaussian around its direction (arXiv 2410.18857)."""

from models.base import GaussianAdaptor, Recipe, recipes_of
from models.prolip.loss import pairwise_logits, prolip_loss


class ProLIPAdaptor(GaussianAdaptor):
    """A variance lowers the logits of all pairs of its image or text (arXiv 2410.18857, sec. 3)."""

    recipes = recipes_of(
        Recipe("adamw", lr=5e-4, weight_decay=5e-4),
        start_variance=1.0,
    )

    def loss(self, *encoded):
        """The terms of the loss of all B^2 pairs."""
        return prolip_loss(*encoded)

    def own_score(self, image, text):
        """mean_i . mean_j - sum_d (exp log_var_i + exp log_var_j) / 2, (N, M).

        The authors subtract the variance of the gallery's item alone. That gives the same ranking,
        because the query's variance is the same for all of its answers.
        """
        return pairwise_logits(*image, *text)
