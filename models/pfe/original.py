"""PFE as its own authors build, train and score it: `pfe-original` (arXiv 1904.09658)."""

import torch
from torch import nn
from torch.nn import functional as F

from models.base import Adaptor, Recipe
from models.layers import at_least_float32, unit
from models.pfe.adaptor import PFEAdaptor
from models.pfe.loss import exponential_variance, mutual_likelihood_loss_within_images

# Initial values of learned scalars.
GAIN = 1e-4
BIAS = -7.0
MOMENTUM = 1 - 0.995  # the authors' decay of the running averages is 0.995
EPS = 1e-3


class BatchNorm(nn.BatchNorm1d):
    """Batch norm that also trains on a batch of one, which it normalises by the running averages.

    It does not count batches, so that its state is the same as in earlier checkpoints. Its running
    variance is unbiased; that of the authors' TensorFlow is not, which makes a difference of 0.4 %
    at their batch size of 256.
    """

    def __init__(self, width, affine=True):
        super().__init__(width, eps=EPS, momentum=MOMENTUM, affine=affine)
        self.num_batches_tracked = None

    # BatchNorm1d's own would add the missing counter.
    _load_from_state_dict = nn.Module._load_from_state_dict

    def forward(self, x):
        x = at_least_float32(x)
        if len(x) > 1:
            return super().forward(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class ScaledHead(nn.Module):
    """var = 1e-6 + exp(gain x + bias), x = FC(D)-BN-ReLU-FC(D)-BN(no affine) of z, (N, D).

    It reads z without normalisation, as the authors' head reads features before they become unit
    vectors. The linear layers have no bias, because the batch norm would remove it.
    """

    def __init__(self, embed_dim):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(embed_dim, embed_dim, bias=False),
            BatchNorm(embed_dim),
            nn.ReLU(),
            nn.Linear(embed_dim, embed_dim, bias=False),
            BatchNorm(embed_dim, affine=False),
        )
        self.gain = nn.Parameter(torch.tensor(GAIN))
        self.bias = nn.Parameter(torch.tensor(BIAS))

    def forward(self, z):
        """(N, D) -> (N, D)."""
        return exponential_variance(self.gain * self.layers(z) + self.bias)


class PFEOriginal(PFEAdaptor):
    """mean = unit(z), var from a ScaledHead; uncertainty = sum_d var.

    The loss averages over all pairs within an image. The recipe's weight decay on matrices is the
    L2 penalty of the authors' code, and their 12,000 steps of 256 pairs are 5.2 epochs of COCO.
    """

    recipes = {
        "original": Recipe(
            "sgd",
            lr=1e-3,
            weight_decay=5e-4,
            batch_size=256,
            epochs=5,
            drops=(2 / 3,),
            decayed_from=2,
        )
    }
    single_process_only = True  # batch norm
    has_fixed_kernels = False  # how many pairs belong to one image differs from batch to batch

    def __init__(self, embed_dim=512):
        Adaptor.__init__(self, embed_dim)  # without PFEAdaptor's MLPs
        self.image_head = ScaledHead(embed_dim)
        self.text_head = ScaledHead(embed_dim)

    def encode_image(self, z):
        return unit(z), self.image_head(z)

    def encode_text(self, z):
        return unit(z), self.text_head(z)

    def describe_text(self, mean, var):
        return mean, var.sum(dim=-1)

    describe_image = describe_text

    def loss(self, *encoded):
        """The mutual likelihood loss of all pairs within an image. There are no negatives."""
        return mutual_likelihood_loss_within_images(*encoded)
