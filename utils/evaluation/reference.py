"""Embeddings of reference images in, softmaxes of texts over them out, a tile at a time; and their temperature."""

import functools
import logging
import math

import torch

from models.layers import pairwise_products, unit
from utils.cli import UserError, need
from utils.lazy import Lazy

optimize = Lazy("scipy.optimize")
TILE = 2048  # reference images that are read and compared at a time, each tile once
TEXTS = 1024  # texts that are compared at a time
FITTED_ON = 1024  # captions: on shapes the scale is some 2 % of that of all 50,000
LEAST_SCALE, MOST_SCALE = 1.0, 1000.0  # where a fit ends: pairs matched no better than at random, or without an error
ROUNDING = 1e-6  # of a mean cosine: the likelihood of pairs that are all told apart rises without end, ever more slowly


def open_reference(load, cache, size=None):
    """The reference images for a cache; None, and a line in the log, where there are none of its CLIP.

    Args:
        load: function that returns the train split of the cache, an EmbeddingCache.
        size: as `Reference` has it.
    """
    try:
        train = load()
        is_of = train.embed_dim == cache.embed_dim and not train.clip_id.contradicts(cache.clip_id)
        need(is_of, f"{train.folder} and {cache.folder} are of different CLIPs; make one of them anew")
    except UserError as error:
        logging.info("reference-entropy is left out: %s", error)
        return None
    return Reference(train, size, cache.device)


def empty_softmax(texts):
    """The softmax of so many texts over no images, (2, T) float64: log sum_i exp(s c_i), and the mean cosine."""
    return torch.tensor([[-torch.inf], [0]], dtype=torch.float64).repeat(1, texts)


def add_to_softmax(known, cosine, scale):
    """Take further images, with these cosines (n, T), into the softmax of T texts at a logit scale: known (2, T)."""
    most = cosine.amax(dim=0)
    logits = (cosine - most).mul_(scale)
    weight = logits.exp()
    weights, most = weight.sum(dim=0).cpu().double(), most.cpu().double()
    log_sum = weights.log() + scale * most
    mean = most + weight.mul_(logits).sum(dim=0).cpu().double() / (weights * scale)
    total = torch.logaddexp(known[0], log_sum)
    known[1] = (known[0] - total).exp() * known[1] + (log_sum - total).exp() * mean
    known[0] = total


class Reference:
    """A fixed set of a split's images, which texts are compared with.

    Args:
        train: EmbeddingCache, which may be mapped.
        size: of the set, drawn with a fixed seed; None, or more than there are: all images.
        device: where to compute.
    Attributes:
        rows: of the images, ascending, (R,) int64.
    """

    def __init__(self, train, size=None, device="cpu"):
        self.train, self.device = train, device
        everyone = torch.randperm(len(train.image), generator=torch.Generator().manual_seed(0))
        self.rows = everyone[:size].sort().values

    def __len__(self):
        return len(self.rows)

    @torch.inference_mode()
    def softmax(self, text, scales):
        """The softmaxes of texts over the set, p_i = exp(s c_i) / sum_k exp(s c_k), c_i the cosine with image i.

        Args:
            text (T, D): embeddings.
            scales: logit scales s, or inverse temperatures, S of them.
        Returns: (S, 2, T) float64 on the CPU: log sum_i exp(s c_i), and the mean cosine sum_i p_i c_i.
        """
        parts, image_rows = unit(text.to(self.device)).split(TEXTS), self.rows.to(self.train.image.device)
        found = torch.stack([empty_softmax(len(text))] * len(scales))
        for tile in image_rows.split(TILE):
            image = unit(self.train.image[tile].to(self.device))
            for part, so_far in zip(parts, found.split(TEXTS, dim=2), strict=True):
                cosine = pairwise_products(image, part)  # (tile, part)
                for scale, known in zip(scales, so_far, strict=True):
                    add_to_softmax(known, cosine, scale)
        return found

    def entropies(self, text, scales):
        """The entropy of each softmax in nats, log sum_i exp(s c_i) - s sum_i p_i c_i: (S, T) float64."""
        total, mean = self.softmax(text, scales).unbind(dim=1)
        return total - torch.tensor(scales, dtype=torch.float64)[:, None] * mean

    @torch.inference_mode()
    def fit_scale(self):
        """The logit scale that makes the own images of captions of the split most likely, or None without captions.

        Maximises mean_j [s c_jj - log sum_i exp(s c_ij)] over captions j of images in the set, at most 1,024, drawn
        with a fixed seed. It is concave in s: the scale is where its derivative, mean_j [c_jj - sum_i p_ij c_ij],
        falls through zero, sought between 1 and 1,000 on a logarithmic scale.
        """
        captions = torch.isin(self.train.image_of_caption.cpu(), self.rows).nonzero().flatten()
        drawn = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0))[:FITTED_ON]
        captions = captions[drawn].sort().values
        if not len(captions):
            return None
        image, text = (z.cpu() for z in self.train.pairs(captions.to(self.train.text.device)))
        own = (unit(image) * unit(text)).sum(dim=1).double().mean().item()

        @functools.cache  # the ends are asked for twice
        def slope(log_scale):  # of the mean log likelihood
            return own - self.softmax(text, [math.exp(log_scale)])[0, 1].mean().item() - ROUNDING

        low, high = math.log(LEAST_SCALE), math.log(MOST_SCALE)
        if slope(low) <= 0:
            return LEAST_SCALE
        return math.exp(optimize.brentq(slope, low, high, xtol=1e-3)) if slope(high) < 0 else MOST_SCALE
