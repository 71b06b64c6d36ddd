"""ProLIP: raw CLIP embeddings in, diagonal Gaussians around their directions out (arXiv 2410.18857, sec. 3)."""

from models.base import GaussianAdaptor, Recipe, recipes_of
from models.prolip.loss import prolip_loss


class ProLIPAdaptor(GaussianAdaptor):
    """Variance lowers the logit of every pair that an image or a text is in."""

    recipes = recipes_of(Recipe("adamw", lr=5e-4, weight_decay=5e-4), lr=3e-4, start_variance=1.0)
    loss = staticmethod(prolip_loss)
