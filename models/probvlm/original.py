"""ProbVLM as its own authors build and train it: `probvlm-original` (arXiv 2307.00398, sec. 3, and their code)."""

import torch

from models.base import Recipe
from models.layers import full_precision, unit
from models.probvlm.adaptor import BayesCap, ProbVLMAdaptor
from models.probvlm.loss import variance_of_passes

LOGIT_SCALE = 100.0  # exp(logit scale) of OpenAI's CLIPs; an adaptor does not see the cache's own
PASSES, PASS_DROPOUT = 15, 0.3  # for an uncertainty, and the share of the hidden layer that each leaves out
ROWS_AT_ONCE = 4096  # that are passed


class NarrowBayesCap(BayesCap):
    """A hidden layer of 256 with dropout; 1/alpha and beta end in a ReLU."""

    hidden, dropout = 256, 0.05
    positive = staticmethod(full_precision(torch.relu))

    def passes(self, z):
        """Yield mean, 1/alpha and beta, (N, D) each, of 15 passes through the network with dropout.

        Each has a mask of its own over the 256 hidden units, the same in every call and for all rows: what a row's
        passes give depends on no other row.
        """
        kept = torch.rand(PASSES, self.hidden, generator=torch.Generator().manual_seed(0)) >= PASS_DROPOUT
        hidden = self.mod[:4](z)  # (N, 256)
        for mask in kept.to(hidden) / (1 - PASS_DROPOUT):
            yield self.heads(self.mod[5](hidden * mask) + z)


class ProbVLMOriginal(ProbVLMAdaptor):
    """Reconstructs unit(z) of a text and 100 unit(z) of an image, which are what its networks read.

    uncertainty = 1 / mean_d u of a text, mean_d u of an image, u = aleatoric + epistemic (`variance_of_passes`),
    without a gradient; with `adaptor.inverted = False` it is mean_d u of both.
    """

    recipes = {"original": Recipe("adam", lr=8e-5, weight_decay=0, batch_size=64, epochs=500, drops=(), max_steps=2001)}
    bayescap = NarrowBayesCap

    def encode_image(self, z):
        return super().encode_image(LOGIT_SCALE * unit(z))

    def encode_text(self, z):
        return super().encode_text(unit(z))

    def describe_image(self, mean, inv_alpha, beta, z):
        return mean, _uncertainty(self.image_bayescap, z)

    def describe_text(self, mean, inv_alpha, beta, z):
        uncertainty = _uncertainty(self.text_bayescap, z)
        return mean, 1 / uncertainty if self.inverted else uncertainty


@torch.no_grad()
def _uncertainty(bayescap, z):
    """mean_d u of what a network reads, (N, D) -> (N,), in float64 where the device has it.

    Coordinates with beta = 0, whose variance is the greatest that the clips allow, make up nearly all of it: texts
    differ by 1e-5 of it, which float32 would make ties.
    """
    return torch.cat([variance_of_passes(bayescap.passes(rows)).mean(dim=-1) for rows in z.split(ROWS_AT_ONCE)])
