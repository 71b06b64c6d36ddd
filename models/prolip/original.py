"""ProLIP as its own authors train it: `prolip-original` (arXiv 2410.18857, and their code)."""

import math

import torch
from torch import nn

from models.base import Recipe
from models.layers import total_variance
from models.prolip.adaptor import ProLIPAdaptor
from models.prolip.loss import original_loss

# Initial values of the learned scale and bias of the logit.
LOG_SCALE = math.log(1 / 0.07)
BIAS = -10.0
LARGEST_LOG_SCALE = math.log(100)
START_LOG_VAR = -10.0  # the bias of the heads


class ProLIPOriginal(ProLIPAdaptor):
    """Scale and bias of the logit are learned, and the image should be included in its text.

    log_var is linear in unit(z); uncertainty = sum_d var. The inclusion losses of masked views are
    left out, because they need the encoder.
    """

    # The 200 epochs and the warm-up of a fiftieth of the steps are ours: theirs is pre-training,
    # with 512 pairs on each of 32 GPUs. The batch here is 512 on all ranks together.
    recipes = {
        "original": Recipe(
            "adamw",
            lr=5e-4,
            weight_decay=0.2,
            batch_size=512,
            betas=(0.9, 0.95),
            decayed_from=2,
            warm_up=0.02,
            eps=1e-6,
        )
    }

    @staticmethod
    def trunk(embed_dim):
        return nn.Sequential(nn.Linear(embed_dim, embed_dim))

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.set_last_bias(START_LOG_VAR)
        self.log_scale = nn.Parameter(torch.tensor(LOG_SCALE))
        self.bias = nn.Parameter(torch.tensor(BIAS))

    def describe_text(self, mean, log_var):
        return mean, total_variance(log_var)

    describe_image = describe_text

    def loss(self, *encoded):
        """The terms of the loss of all B^2 pairs, with the learned scale and bias."""
        # The parameter itself is clamped. A clamp inside the loss would have the gradient 0 outside
        # the range, and the parameter would stay there.
        with torch.no_grad():
            self.log_scale.clamp_(0, LARGEST_LOG_SCALE)
        return original_loss(*encoded, self.log_scale, self.bias)
