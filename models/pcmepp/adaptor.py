"""PCME++: raw CLIP embeddings in, diagonal Gaussians around their directions out (arXiv 2305.18171, sec. 3)."""

import torch
from torch import nn

from models.base import GaussianAdaptor, Recipe, recipes_of
from models.pcmepp.loss import closed_form_sampled_distance, matching_loss

SHIFT, NEGATIVE_SCALE = 5.0, 5.0  # initial values, as in the paper's code


class PCMEPPAdaptor(GaussianAdaptor):
    """A pair matches if its expected distance is small. Without the VIB and pseudo-positive terms of the paper."""

    recipes = recipes_of(Recipe("adamw", lr=5e-4, weight_decay=1e-4), lr=3e-3, start_variance=1.0)

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.shift = nn.Parameter(torch.tensor(SHIFT))
        self.negative_scale = nn.Parameter(torch.tensor(NEGATIVE_SCALE))

    def loss(self, mean_image, log_var_image, mean_text, log_var_text):
        """The matching loss over all B^2 pairs, with the learnt shift and scale."""
        return matching_loss(mean_image, log_var_image, mean_text, log_var_text, self.shift, self.negative_scale)

    def own_score(self, image, text):
        """-d(i, j), the expected squared distance, (N, M)."""
        return -closed_form_sampled_distance(*image, *text)
