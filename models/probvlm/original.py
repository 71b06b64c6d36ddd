"""ProbVLM as its own authors build and train it: `probvlm-original` (arXiv 2307.00398).

Their commands weight the likelihood by 1e-4, with which the uncertainty is learned slowly, so they
train for 500 epochs. Their function's default is 0.05, the weight of
`probvlm-original-default-weight`.
"""

import torch

from models.base import Recipe
from models.layers import full_precision, unit
from models.probvlm.adaptor import BayesCap, ProbVLMAdaptor
from models.probvlm.loss import (
    LIKELIHOOD_WEIGHT,
    ORIGINAL_LIKELIHOOD_WEIGHT,
    variance_of_passes,
)

LOGIT_SCALE = 100.0  # exp(logit scale) of OpenAI's CLIPs; an adaptor does not know the cache's own

# For an uncertainty.
PASSES = 15
PASS_DROPOUT = 0.3  # fraction of the hidden layer that each pass drops
ROWS_AT_ONCE = 512  # (15, 512, 512) numbers take 31 MB in float64


class NarrowBayesCap(BayesCap):
    """A BayesCap with hidden layers of width 256 and dropout; 1/alpha and beta end in a ReLU."""

    hidden = 256
    dropout = 0.05
    positive = staticmethod(full_precision(torch.relu))

    def passes(self, z):
        """mean, 1/alpha and beta of 15 passes through the network with dropout, (15, N, D) each.

        Each pass has one mask over the 256 hidden units, the same for all rows and in every call,
        so that the result for a row depends on no other row.
        """
        generator = torch.Generator().manual_seed(0)
        kept = torch.rand(PASSES, self.hidden, generator=generator) >= PASS_DROPOUT  # (15, 256)
        hidden = self.mod[:4](z)  # (N, 256)
        masks = kept.to(hidden) / (1 - PASS_DROPOUT)
        masked = masks[:, None] * hidden  # (15, N, 256)
        return self.heads(self.mod[5](masked) + z)


class ProbVLMOriginal(ProbVLMAdaptor):
    """Reads and reconstructs unit(z) for a text and 100 unit(z) for an image.

    With u = aleatoric + epistemic (`variance_of_passes`), the uncertainty is 1 / mean_d u for a
    text and mean_d u for an image, both without a gradient. With `adaptor.inverted = False` it is
    mean_d u for both.
    """

    recipes = {
        "original": Recipe(
            "adam",
            lr=8e-5,
            weight_decay=0,
            batch_size=64,
            epochs=500,
            drops=(),
            max_steps=2001,
        )
    }
    bayescap = NarrowBayesCap
    likelihood_weight = ORIGINAL_LIKELIHOOD_WEIGHT
    single_process_only = True  # dropout
    has_fixed_kernels = False

    def encode_image(self, z):
        return super().encode_image(LOGIT_SCALE * unit(z))

    def encode_text(self, z):
        return super().encode_text(unit(z))

    def describe_image(self, mean, inv_alpha, beta, z):
        return mean, _uncertainty(self.image_bayescap, z)

    def describe_text(self, mean, inv_alpha, beta, z):
        uncertainty = _uncertainty(self.text_bayescap, z)
        if self.inverted:
            return mean, 1 / uncertainty
        return mean, uncertainty


class ProbVLMOriginalDefaultWeight(ProbVLMOriginal):
    """ProbVLMOriginal with the default weight of its authors' function, 0.05."""

    likelihood_weight = LIKELIHOOD_WEIGHT


@torch.no_grad()
def _uncertainty(bayescap, z):
    """mean_d u, where u is the `variance_of_passes` of what the network reads, (N, D) -> (N,).

    Coordinates with beta = 0, whose variance is the largest that the clips allow, dominate the
    mean. The texts differ by about 1e-5 of it, so float32 would keep only two digits of the
    differences. So the mean is taken in float64.
    """
    uncertainties = []
    for rows in z.split(ROWS_AT_ONCE):
        u = variance_of_passes(*bayescap.passes(rows))  # (n, D)
        uncertainties.append(u.mean(dim=-1))
    return torch.cat(uncertainties)
