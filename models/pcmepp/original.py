"""PCME++ as its own author trains it: `pcmepp-original` (arXiv 2305.18171, and the code)."""

from models.base import Recipe
from models.layers import total_variance
from models.pcmepp.adaptor import PCMEPPAdaptor
from models.pcmepp.loss import original_loss

# The initial log variance. Our MLP replaces the author's transformer block over tokens.
START_LOG_VAR = 0.0


class PCMEPPOriginal(PCMEPPAdaptor):
    """With the VIB, pseudo-positives and smoothed labels; captions of one image are matches.

    uncertainty = sum_d var. AdamW replaces AdamP. There is no Mixup or CutMix, because a cache
    holds embeddings, not images.
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
            ramped_epoch=3,  # as in the author's code, which freezes the image encoder until then
            averaged_after=16 / 25,
        )
    }

    has_fixed_kernels = False  # equal images are searched for in every batch

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.set_last_bias(START_LOG_VAR)

    def describe_text(self, mean, log_var):
        return mean, total_variance(log_var)

    describe_image = describe_text

    def loss(self, *encoded):
        """The terms of the loss of all B^2 pairs, with the learned shift and scale."""
        return original_loss(*encoded, self.shift, self.negative_scale)
