"""PCME++: an embedding becomes a diagonal Gaussian around its direction (arXiv 2305.18171)."""

import torch
from torch import nn

from models.base import GaussianAdaptor, Recipe, recipes_of
from models.pcmepp.loss import closed_form_sampled_distance, matching_loss

# Initial values, as in AsymVLM's repository.
SHIFT = 5.0
NEGATIVE_SCALE = 5.0


class PCMEPPAdaptor(GaussianAdaptor):
    """A pair matches if its expected distance is small (arXiv 2305.18171, sec. 3).

    As in AsymVLM's repository, without the terms for the VIB and the pseudo-positives.
    """

    recipes = recipes_of(
        Recipe("adamw", lr=5e-4, weight_decay=1e-4),
        lr=3e-3,
        start_variance=1.0,
    )

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.shift = nn.Parameter(torch.tensor(SHIFT))
        self.negative_scale = nn.Parameter(torch.tensor(NEGATIVE_SCALE))

    def loss(self, *encoded):
        """The matching loss of all B^2 pairs, with the learned shift and scale."""
        return {"matching": matching_loss(*encoded, self.shift, self.negative_scale)}

    def own_score(self, image, text):
        """Minus the expected squared distance d(i, j), (N, M)."""
        return -closed_form_sampled_distance(*image, *text)
