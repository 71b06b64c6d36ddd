"""PFE as its own authors build, train and score it: `pfe-original` (arXiv 1904.09658, sec. 3, and their code)."""

import torch
from torch import nn

from models.base import Adaptor, Recipe
from models.layers import BatchNorm, unit
from models.pfe.adaptor import PFEAdaptor
from models.pfe.loss import exponential_variance, mutual_likelihood_loss_of_all_pairs

GAIN, BIAS = 1e-4, -7.0  # initial values of the learnt scalars
BATCH_NORM = {"decay": 0.995, "eps": 1e-3}


class ScaledHead(nn.Module):
    """var = 1e-6 + exp(gain x + bias), x = FC(D)-BN-ReLU-FC(D)-BN(no affine) of z: (N, D) -> (N, D).

    It reads z as it is, as theirs reads features before they become a unit vector. The FCs have no bias, which the
    batch norm would take away.
    """

    def __init__(self, embed_dim):
        super().__init__()
        first, second = (nn.Linear(embed_dim, embed_dim, bias=False) for _ in range(2))
        norms = BatchNorm(embed_dim, **BATCH_NORM), BatchNorm(embed_dim, **BATCH_NORM, affine=False)
        self.layers = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1])
        self.gain, self.bias = nn.Parameter(torch.tensor(GAIN)), nn.Parameter(torch.tensor(BIAS))

    def forward(self, z):
        return exponential_variance(self.gain * self.layers(z) + self.bias)


class PFEOriginal(PFEAdaptor):
    """mean = unit(z), var from a ScaledHead; uncertainty = sum_d var. All pairs of one image are in the loss.

    The recipe's decay of the FC weights is the L2 penalty of their code; 12,000 steps of 256 pairs are 5.2 epochs of
    COCO.
    """

    recipes = {
        "original": Recipe("sgd", lr=1e-3, weight_decay=5e-4, batch_size=256, epochs=5, drops=(2 / 3,), decayed_from=2)
    }

    def __init__(self, embed_dim=512):
        Adaptor.__init__(self, embed_dim)  # without the MLPs
        self.image_head, self.text_head = ScaledHead(embed_dim), ScaledHead(embed_dim)

    def encode_image(self, z):
        return unit(z), self.image_head(z)

    def encode_text(self, z):
        return unit(z), self.text_head(z)

    def describe_text(self, mean, var):
        return mean, var.sum(dim=-1)

    describe_image = describe_text

    loss = staticmethod(mutual_likelihood_loss_of_all_pairs)
