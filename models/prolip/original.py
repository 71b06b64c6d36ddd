"""ProLIP as its own authors train it: `prolip-original` (arXiv 2410.18857, sec. 3, and their code)."""

import math

import torch
from torch import nn

from models.base import Recipe
from models.layers import total_variance
from models.prolip.adaptor import ProLIPAdaptor
from models.prolip.loss import original_loss

LOG_SCALE, BIAS = math.log(1 / 0.07), -10.0  # initial values of what is learnt of the logit
LOG_SCALE_RANGE = 0.0, math.log(100)
START_LOG_VAR = -10.0  # the bias of the heads


class ProLIPOriginal(ProLIPAdaptor):
    """Scale and bias of the logit are learnt, log_var is linear in unit(z), an image is to be included in its text.

    uncertainty = sum_d var. The masked views of the inclusion losses are left out: they need the encoder.
    """

    recipes = {  # 200 epochs and a fiftieth of the steps to warm up are ours: theirs is pre-training
        "original": Recipe(
            "adamw", lr=5e-4, weight_decay=0.2, batch_size=512, betas=(0.9, 0.95), decayed_from=2, warm_up=0.02
        )
    }

    @staticmethod
    def trunk(embed_dim):
        return nn.Sequential(nn.Linear(embed_dim, embed_dim))

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        for head in (self.image_head, self.text_head):
            nn.init.constant_(head["log_var"][-1].bias, START_LOG_VAR)
        self.log_scale = nn.Parameter(torch.tensor(LOG_SCALE))
        self.bias = nn.Parameter(torch.tensor(BIAS))

    def describe_text(self, mean, log_var):
        return mean, total_variance(log_var)

    describe_image = describe_text

    def loss(self, mean_image, log_var_image, mean_text, log_var_text):
        """The loss over all B^2 pairs, with the learnt scale and bias; the scale is kept within its range."""
        with torch.no_grad():  # the parameter itself, so that its gradient does not vanish at the ends
            self.log_scale.clamp_(*LOG_SCALE_RANGE)
        return original_loss(mean_image, log_var_image, mean_text, log_var_text, self.log_scale, self.bias)
