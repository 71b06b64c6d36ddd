"""An adaptor in training and held-out images in, how well it does on them out, once an epoch."""

import logging

import torch

from utils.cli import UserError
from utils.device import autocast
from utils.evaluation.metrics import aurc, recall_at
from utils.evaluation.scorers import AdaptorScorer, Scorer, answer

FALLS = 0.1  # of the frozen CLIP's R@1: a loss that is told
FELL = "note: %s: R@1 on the held-out images is %.3f, the frozen CLIP's %.3f; eval.py --score frozen keeps the CLIP's"


class HeldOut:
    """Images that are held out of training. Args: cache: EmbeddingCache, in memory; precision: as in training."""

    def __init__(self, cache, precision):
        self.cache, self.precision = cache, precision
        self.frozen = retrieval(Scorer(cache), cache)["t2i"]["R@1"]

    @torch.no_grad()
    def measure(self, adaptor, batch_size):
        """Of an adaptor in eval mode, the mean loss over batches, the same every time, and text-to-image.

        Returns: {"loss", "R@1", "AURC"}, floats.

        Raises: UserError if a similarity is not a number.
        """
        batches = self.cache.batches(batch_size, torch.Generator().manual_seed(0))
        with autocast(self.cache.device, self.precision):
            losses = [adaptor(*self.cache.pairs(rows)) for rows in batches]
        try:
            found = retrieval(AdaptorScorer(adaptor, self.cache), self.cache)["t2i"]
        except ValueError as error:
            raise UserError(f"--validation: {error} on the held-out images; try a smaller --lr") from None
        return {"loss": torch.stack(losses).mean().item()} | found

    def compare(self, record, path):
        """Say so if the weights that are kept, with this record, find by far fewer images than the frozen CLIP."""
        recall = record["validation"]["R@1"]
        if recall < (1 - FALLS) * self.frozen:
            logging.warning(FELL, path, recall, self.frozen)


def retrieval(scorer, cache):
    """R@1 and AURC of both directions, {"t2i", "i2t": {"R@1", "AURC"}}, AURC where there is an uncertainty.

    The uncertainty is the caption's, or the image's where captions have none. Args: scorer: Scorer of the cache.
    """
    figures = {}
    for direction, fields in answer(scorer, cache).items():
        correct, uncertainty = fields["rank"] == 1, fields.get("uncertainty", fields.get("image_uncertainty"))
        figures[direction] = {"R@1": recall_at(fields["rank"], 1)}
        figures[direction] |= {} if uncertainty is None else {"AURC": aurc(correct, uncertainty)}
    return figures
