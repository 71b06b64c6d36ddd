"""ProLIP: raw CLIP embeddings in, diagonal Gaussians around their directions out (arXiv 2410.18857, sec. 3)."""

from models.base import SMALL, Adaptor, Recipe
from models.layers import GaussianHead, total_variance
from models.prolip.loss import prolip_loss


class ProLIPAdaptor(Adaptor):
    """mean = unit(z), log_var = MLP(unit(z)); uncertainty = mean_d exp(log_var)."""

    recipes = {"paper": Recipe("adamw", lr=5e-4, weight_decay=5e-4), "small": SMALL}

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.image_head = GaussianHead(embed_dim)
        self.text_head = GaussianHead(embed_dim)

    def encode_image(self, z):
        """(N, D) -> (mean (N, D), log_var (N, D))."""
        return self.image_head(z)

    def encode_text(self, z):
        """(N, D) -> (mean (N, D), log_var (N, D))."""
        return self.text_head(z)

    def describe_image(self, mean, log_var):
        """mean (N, D) and mean_d exp(log_var) (N,)."""
        return mean, total_variance(log_var) / self.embed_dim

    def describe_text(self, mean, log_var):
        """mean (N, D) and mean_d exp(log_var) (N,)."""
        return mean, total_variance(log_var) / self.embed_dim

    def loss(self, mean_image, log_var_image, mean_text, log_var_text):
        """The contrastive loss over all B^2 pairs, plus the information bottleneck of both modalities."""
        return prolip_loss(mean_image, log_var_image, mean_text, log_var_text)
