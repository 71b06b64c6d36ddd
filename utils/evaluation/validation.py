"""Held-out images during training: how well an adaptor does on them after each epoch."""

import logging

import torch

from utils.cli import UserError
from utils.device import autocast
from utils.evaluation.figures import uncertainty_of
from utils.evaluation.metrics import aurc, recall_at
from utils.evaluation.scorers import AdaptorScorer, FrozenScorer, answer

WARN_BELOW = 0.9  # of the frozen CLIP's R@1


class HeldOut:
    """Images that are held out of training.

    Args:
        cache: EmbeddingCache, in memory.
        precision: dtype of the matrix products, as in training.
    """

    def __init__(self, cache, precision):
        self.cache = cache
        self.precision = precision
        self.frozen_recall = retrieval(FrozenScorer(cache), cache)["t2i"]["R@1"]

    @torch.no_grad()
    def measure(self, adaptor, batch_size):
        """The mean loss, and text-to-image metrics. The batches are the same in every epoch.

        Args:
            adaptor: Adaptor, in eval mode.
        Returns: {"loss", "R@1", "AURC"}, floats.
        Raises: UserError if a similarity is not a number.
        """
        losses = []
        with autocast(self.cache.device, self.precision):
            for rows in self.cache.batches(batch_size, torch.Generator().manual_seed(0)):
                losses.append(adaptor(*self.cache.pairs(rows)))
        try:
            metrics = retrieval(AdaptorScorer(adaptor, self.cache), self.cache)["t2i"]
        except ValueError as error:
            cure = "try a smaller --lr"
            raise UserError(f"--validation: {error} on the held-out images; {cure}") from None
        return {"loss": torch.stack(losses).mean().item(), **metrics}

    def warn_if_poor(self, record, path):
        """Warn if R@1 in a record of the log of a checkpoint is far below the frozen CLIP's."""
        recall = record["validation"]["R@1"]
        if recall < WARN_BELOW * self.frozen_recall:
            logging.warning(
                "note: %s: R@1 on the held-out images is %.3f, the frozen CLIP's is %.3f; "
                "eval.py --score frozen ranks by the CLIP",
                path,
                recall,
                self.frozen_recall,
            )


def retrieval(scorer, cache):
    """R@1 and AURC of both directions: {"t2i", "i2t": {"R@1", "AURC"}}.

    AURC is by the uncertainty of the caption, or of the image if captions have none; it is missing
    if neither has one.

    Args:
        scorer: Scorer of the cache.
    """
    metrics = {}
    for direction, answered in answer(scorer, cache).items():
        metrics[direction] = {"R@1": recall_at(answered["rank"], 1)}
        uncertainty = uncertainty_of(answered)
        if uncertainty is not None:
            metrics[direction]["AURC"] = aurc(answered["rank"] == 1, uncertainty)
    return metrics
