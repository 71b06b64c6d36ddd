"""ProLIP: raw CLIP embeddings in, diagonal Gaussians around their directions out (arXiv 2410.18857, sec. 3)."""

from models.base import GaussianAdaptor, Recipe, recipes_of
from models.prolip.loss import pairwise_logits, prolip_loss


class ProLIPAdaptor(GaussianAdaptor):
    """Variance lowers the logit of every pair that an image or a text is in."""

    recipes = recipes_of(Recipe("adamw", lr=5e-4, weight_decay=5e-4), lr=3e-4, start_variance=1.0)
    loss = staticmethod(prolip_loss)

    def own_score(self, image, text):
        """mean_i . mean_j - sum_d (exp log_var_i + exp log_var_j) / 2, (N, M).

        Its authors subtract the gallery's variance alone: the query's is the same for all of its answers.
        """
        return pairwise_logits(*image, *text)
