"""PFE: raw CLIP embeddings in, the same embeddings with a variance of each coordinate out (arXiv 1904.09658, sec. 3)."""

from models.base import SMALL, Adaptor, Recipe
from models.layers import mlp
from models.pfe.loss import mutual_likelihood_loss, variance


class PFEAdaptor(Adaptor):
    """mean = z, raw; var = softplus(MLP(z)); uncertainty = mean_d var. Retrieval is that of the frozen embeddings."""

    recipes = {"paper": Recipe("sgd", lr=1e-3, weight_decay=5e-4), "small": SMALL}

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.image_mlp = mlp(embed_dim)
        self.text_mlp = mlp(embed_dim)

    def encode_image(self, z):
        """(N, D) -> (mean (N, D), var (N, D))."""
        return z, variance(self.image_mlp(z))

    def encode_text(self, z):
        """(N, D) -> (mean (N, D), var (N, D))."""
        return z, variance(self.text_mlp(z))

    def describe_image(self, mean, var):
        """z (N, D) and mean_d var (N,)."""
        return mean, var.mean(dim=-1)

    def describe_text(self, mean, var):
        """z (N, D) and mean_d var (N,)."""
        return mean, var.mean(dim=-1)

    def loss(self, mean_image, var_image, mean_text, var_text):
        """The mutual likelihood loss of the B true pairs; it has no negatives."""
        return mutual_likelihood_loss(mean_image, var_image, mean_text, var_text)
