"""PFE: an embedding gets a variance for each of its coordinates (arXiv 1904.09658)."""

from models.base import Adaptor, Recipe, recipes_of
from models.layers import mlp
from models.pfe.loss import mutual_likelihood_loss, mutual_likelihood_score, softplus_variance


class PFEAdaptor(Adaptor):
    """mean = z, not normalised; var = softplus(MLP(z)), (N, D) each; uncertainty = mean_d var.

    Source: arXiv 1904.09658, sec. 3.
    """

    recipes = recipes_of(Recipe("sgd", lr=1e-3, weight_decay=5e-4))
    ranks_by_frozen_cosine = True
    has_fixed_kernels = True

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.image_mlp = mlp(embed_dim)
        self.text_mlp = mlp(embed_dim)

    def encode_image(self, z):
        return z, softplus_variance(self.image_mlp(z))

    def encode_text(self, z):
        return z, softplus_variance(self.text_mlp(z))

    def variance_of(self, mean, var):
        return var

    def describe_text(self, mean, var):
        return mean, var.mean(dim=-1)

    describe_image = describe_text

    def loss(self, *encoded):
        """The mutual likelihood loss of the true pairs. There are no negatives."""
        return mutual_likelihood_loss(*encoded)

    def own_score(self, image, text):
        """The mutual likelihood score, (N, M), without a gradient."""
        return mutual_likelihood_score(*image, *text)
