"""PCME++ as its own author trains it: `pcmepp-original` (arXiv 2305.18171, sec. 3, and the author's code)."""

from torch import nn

from models.base import Recipe
from models.layers import total_variance
from models.pcmepp.adaptor import PCMEPPAdaptor
from models.pcmepp.loss import original_loss

START_LOG_VAR = 0.0  # the last bias of the trunk, which stands in for a transformer block over tokens


class PCMEPPOriginal(PCMEPPAdaptor):
    """With the VIB, pseudo-positives, smoothed labels, and captions of one image as matches; uncertainty = sum_d var.

    AdamW stands in for AdamP, and pictures are not mixed: a cache has embeddings alone.
    """

    recipes = {
        "original": Recipe(
            "adamw",
            lr=5e-4,
            weight_decay=1e-4,
            batch_size=128,
            epochs=25,
            drops=(15 / 25,),
            decayed_from=1,
            clip_norm=2.0,
            ramped_epoch=3,  # after two epochs of warming up
            averaged_after=16 / 25,
        )
    }

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        for head in (self.image_head, self.text_head):
            nn.init.constant_(head["log_var"][-1].bias, START_LOG_VAR)

    def describe_text(self, mean, log_var):
        return mean, total_variance(log_var)

    describe_image = describe_text

    def loss(self, mean_image, log_var_image, mean_text, log_var_text):
        """The loss over all B^2 pairs, with the learnt shift and scale."""
        return original_loss(mean_image, log_var_image, mean_text, log_var_text, self.shift, self.negative_scale)
