"""Uncertainties of texts that need no training: from the frozen CLIP, or from the text alone.

All of them rank as the frozen CLIP does. A new one is a class here and an entry in SCORERS.
"""

import functools
import logging
import math

import torch

from models.layers import pairwise_products, unit
from utils.cli import UserError, need
from utils.evaluation.scorers import (
    FROZEN,
    PUBLISHED,
    AdaptorRankedByFrozen,
    AdaptorScorer,
    FrozenScorer,
    RankedByFrozen,
    Row,
    count_words,
    read,
)

LOGIT_SCALE = 100.0  # if meta.json does not know it: its upper bound, reached by OpenAI's models
GALLERY_TEXTS = 512  # texts compared with a gallery at a time: for 5,000 images, 10 MB of cosines
REFERENCE_TILE = 2048  # reference images that are read and compared at a time
REFERENCE_TEXTS = 1024  # texts that are compared with them at a time
FITTED_ON = 1024  # captions; on shapes the scale is within 2 % of that of all 50,000
MIN_SCALE = 1.0  # a fitted scale ends here if pairs match no better than at random
MAX_SCALE = 1000.0  # and here if a larger one would still fit better
ROUNDING = 1e-6  # of a mean cosine


class TrainingFree(RankedByFrozen):
    """A training-free uncertainty; a subclass has `name`, `needs` and `text_uncertainty`."""

    name: str

    def __init__(self, frozen):
        super().__init__(frozen, Row(self.name))


class CaptionLength(TrainingFree):
    """The fewer words a text has, the more uncertain it is: minus the number of words."""

    name = "caption-length"

    def text_uncertainty(self, texts, z):
        return -count_words(texts)


# Uncertainties from the gallery, the images that are searched.


class GalleryScore(TrainingFree):
    """An uncertainty from the cosines of a text with the gallery's images.

    Args:
        gallery: Gallery.
    """

    needs = "gallery"

    def __init__(self, frozen, gallery):
        super().__init__(frozen)
        self.gallery = gallery

    def caption_uncertainty(self):
        return self.gallery.of_captions[self.name]

    def text_uncertainty(self, texts, z):
        return self.gallery.compare(z)[self.name]


class SoftmaxEntropy(GalleryScore):
    """The entropy of a text's softmax over the gallery's images, in nats."""

    name = "softmax-entropy"


class Top1Cosine(GalleryScore):
    """Minus the cosine of a text and its best image."""

    name = "top1-cosine"


class Margin(GalleryScore):
    """-tanh(d), where d estimates how far z is from a text that would retrieve another image.

    d = (s1 - s2) / (|gradient by z of s1 - s2| + 1e-8), with s1 and s2 the cosines of z with its
    two best images, unit vectors g1 and g2; |gradient| = sqrt(2 - 2 g1.g2 - (s1 - s2)^2) / |z|.
    Source: uCLIP, UAI 2025.
    """

    name = "margin"


class Gallery:
    """Compares texts with the images of the frozen CLIP, for all three gallery scores at once."""

    def __init__(self, frozen):
        self.frozen = frozen
        self.scale = logit_scale(frozen.cache)

    @functools.cached_property
    def of_captions(self):
        """What `compare` returns for the captions of the cache."""
        return self.compare(read(self.frozen.cache.text))

    @torch.inference_mode()
    def compare(self, z):
        """The uncertainties of texts with embeddings z (T, D): {name: float64 array (T,)}."""
        entropy = []
        top1 = []
        margin = []
        for batch in z.split(GALLERY_TEXTS):
            text = unit(batch.to(self.frozen.image.device))
            cosine = pairwise_products(self.frozen.image, text)  # (N, t)
            softmax = empty_softmax(len(text))
            add_to_softmax(softmax, cosine, self.scale)
            entropy.append(softmax_entropy(softmax, self.scale))
            best = cosine.topk(min(2, len(cosine)), dim=0).indices  # (2, t), or (1, t)
            # In float64, since the margin is a small difference of two cosines.
            best_image = self.frozen.image[best[0]].cpu().double()
            second_image = self.frozen.image[best[-1]].cpu().double()
            z_batch = batch.cpu().double()
            top1.append((unit(z_batch) * best_image).sum(dim=1))
            margin.append(margin_of(z_batch, best_image, second_image))
        return {
            SoftmaxEntropy.name: torch.cat(entropy).numpy(),
            Top1Cosine.name: -torch.cat(top1).numpy(),
            Margin.name: -torch.cat(margin).numpy(),
        }


def margin_of(z, best_image, second_image):
    """The margin tanh(d) of texts (see `Margin`), all (T, D) and float64: (T,)."""
    difference = best_image - second_image
    lead = (unit(z) * difference).sum(dim=1)  # s1 - s2
    squared_slope = difference.square().sum(dim=1) - lead**2
    slope = squared_slope.clamp(min=0).sqrt() / z.norm(dim=1)  # clamp: rounding
    return torch.tanh(lead / (slope + 1e-8))


# Uncertainties from fixed reference images.


class ReferenceEntropy(TrainingFree):
    """The entropy of a text's softmax over fixed reference images, in nats.

    Args:
        reference: Reference.
        scale: logit scale; None: the CLIP's.
    """

    name = "reference-entropy"
    needs = "reference"

    def __init__(self, frozen, reference, scale=None):
        super().__init__(frozen)
        self.reference = reference
        self.scale = logit_scale(frozen.cache) if scale is None else scale
        self.config["reference"] = len(reference)
        self.config["reference_cache"] = reference.train.digest
        self.config["logit_scale"] = self.scale

    def text_uncertainty(self, texts, z):
        return self.reference.entropies(z, [self.scale])[0].numpy()


class FittedReferenceEntropy(ReferenceEntropy):
    """The same at the logit scale at which the true pairs of the reference set are most likely."""

    name = "reference-entropy-fitted"
    needs = "reference, pairs"


SCORERS = (
    SoftmaxEntropy,
    Top1Cosine,
    Margin,
    ReferenceEntropy,
    FittedReferenceEntropy,
    CaptionLength,
)
TRAINING_FREE = tuple(scorer.name for scorer in SCORERS)


def every_scorer(cache, adaptors, score=PUBLISHED, reference=None):
    """Yield every row of an evaluation, one Scorer at a time.

    First the frozen CLIP, then the training-free uncertainties, then the adaptors. Under PUBLISHED,
    an adaptor that does not rank by the frozen cosine is followed by its AdaptorRankedByFrozen.

    Args:
        cache: EmbeddingCache.
        adaptors: {(method, seed): Adaptor}.
        score: what ranks, of SCORES.
        reference: Reference, or None.
    """
    frozen = FrozenScorer(cache)
    yield frozen
    gallery = Gallery(frozen)
    for scorer in SCORERS:
        if issubclass(scorer, GalleryScore):
            yield scorer(frozen, gallery)
        elif issubclass(scorer, ReferenceEntropy):
            if reference is None:
                continue
            if scorer is not FittedReferenceEntropy:
                yield scorer(frozen, reference)
            elif reference.fitted_scale is not None:
                yield scorer(frozen, reference, reference.fitted_scale)
        elif cache.captions is not None:
            yield scorer(frozen)
    for (method, seed), adaptor in adaptors.items():
        scorer = AdaptorScorer(adaptor, cache, method, seed, score)
        if score == FROZEN:
            yield AdaptorRankedByFrozen(frozen, scorer)
            continue
        if score == PUBLISHED and adaptor.ranks_by_frozen_cosine:
            scorer.ranking = frozen.ranking
        yield scorer
        if score == PUBLISHED and not adaptor.ranks_by_frozen_cosine:
            yield AdaptorRankedByFrozen(frozen, scorer)


def logit_scale(cache):
    """What the CLIP of a cache multiplies its cosines by."""
    return cache.meta.get("logit_scale") or LOGIT_SCALE


# A softmax over images that are seen a tile at a time.


def empty_softmax(text_count):
    """What we keep of the softmax of T texts, before the first image, (2, T) float64.

    Row 0 is the log normaliser log sum_i exp(s c_i), row 1 the mean cosine sum_i p_i c_i.
    """
    softmax = torch.zeros(2, text_count, dtype=torch.float64)
    softmax[0] = -torch.inf
    return softmax


def add_to_softmax(softmax, cosine, scale):
    """Add images with cosines (n, T) to a softmax (2, T) of logits scale * cosine, in place."""
    highest = cosine.amax(dim=0)
    logits = (cosine - highest) * scale  # at most 0, so that exp cannot overflow
    weights = logits.exp()
    weighted_logits = (weights * logits).sum(dim=0).cpu().double()
    total_weight = weights.sum(dim=0).cpu().double()
    highest = highest.cpu().double()
    log_normaliser = total_weight.log() + scale * highest
    # c = highest + logits / scale, averaged with the weights exp(logits).
    mean_cosine = highest + weighted_logits / (total_weight * scale)
    new_log_normaliser = torch.logaddexp(softmax[0], log_normaliser)
    share_before = (softmax[0] - new_log_normaliser).exp()
    share_added = (log_normaliser - new_log_normaliser).exp()
    softmax[1] = share_before * softmax[1] + share_added * mean_cosine
    softmax[0] = new_log_normaliser


def softmax_entropy(softmax, scale):
    """The entropy in nats of softmaxes (2, T): log sum_i exp(s c_i) - s sum_i p_i c_i, (T,)."""
    log_normaliser, mean_cosine = softmax
    return log_normaliser - scale * mean_cosine


class Reference:
    """A fixed set of images, which texts are compared with.

    Args:
        train: EmbeddingCache of the images, which may be mapped.
        size: how many of its images, drawn with a fixed seed; None, or more than there are: all.
        device: where to compute.
    Attributes:
        rows: of the images, ascending, (R,) int64.
    """

    def __init__(self, train, size=None, device="cpu"):
        self.train = train
        self.device = device
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randperm(len(train.image), generator=generator)[:size].sort().values

    def __len__(self):
        return len(self.rows)

    @torch.inference_mode()
    def softmax(self, text, scales):
        """The softmaxes of texts over the set, p_i = exp(s c_i) / sum_k exp(s c_k).

        c_i is the cosine of the text and image i.

        Args:
            text: embeddings, (T, D).
            scales: S logit scales s, which are inverse temperatures.
        Returns: (S, 2, T) float64 on the CPU, as `empty_softmax` describes it.
        """
        text = unit(text.to(self.device))
        softmaxes = torch.stack([empty_softmax(len(text)) for _ in scales])
        rows = self.rows.to(self.train.image.device)
        for tile in rows.split(REFERENCE_TILE):
            image = unit(self.train.image[tile].to(self.device))
            for start in range(0, len(text), REFERENCE_TEXTS):
                batch = slice(start, start + REFERENCE_TEXTS)
                cosine = pairwise_products(image, text[batch])  # (tile, batch)
                for softmax, scale in zip(softmaxes, scales, strict=True):
                    add_to_softmax(softmax[:, batch], cosine, scale)
        return softmaxes

    def entropies(self, text, scales):
        """The entropy of each softmax in nats, (S, T) float64. Args: as `softmax`."""
        softmaxes = self.softmax(text, scales)
        pairs = zip(softmaxes, scales, strict=True)
        return torch.stack([softmax_entropy(softmax, scale) for softmax, scale in pairs])

    @functools.cached_property
    def fitted_scale(self):
        """What `fit_scale` returns."""
        return self.fit_scale()

    @torch.inference_mode()
    def fit_scale(self):
        """The logit scale at which captions match their own images best; None without captions.

        It maximises the mean log likelihood mean_j [s c_jj - log sum_i exp(s c_ij)] over captions j
        of images in the set, at most 1,024, drawn with a fixed seed. This is concave in s, so we
        look for the zero of its derivative, mean_j [c_jj - sum_i p_ij c_ij], between 1 and 1,000.
        """
        from scipy.optimize import brentq

        is_in_set = torch.isin(self.train.image_of_caption.cpu(), self.rows)
        captions = is_in_set.nonzero().flatten()
        if not len(captions):
            return None
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randperm(len(captions), generator=generator)[:FITTED_ON]
        captions = captions[drawn].sort().values
        image, text = self.train.pairs(captions.to(self.train.text.device))
        image = image.cpu()
        text = text.cpu()
        own_cosine = (unit(image) * unit(text)).sum(dim=1).cpu().double().mean().item()

        def slope(log_scale):
            _, mean_cosine = self.softmax(text, [math.exp(log_scale)])[0]
            # If no pair is confused, the slope falls towards 0 and never reaches it. We subtract
            # ROUNDING, so that the search ends.
            return own_cosine - mean_cosine.mean().item() - ROUNDING

        low = math.log(MIN_SCALE)
        high = math.log(MAX_SCALE)
        if slope(low) <= 0:
            return MIN_SCALE
        if slope(high) >= 0:
            return MAX_SCALE
        return math.exp(brentq(slope, low, high, xtol=1e-3))


def open_reference(load, cache, size=None):
    """The reference images for a cache; None, and a log line, without a train split of its CLIP.

    Args:
        load: function that returns the train split of the cache, an EmbeddingCache.
        size: as `Reference` has it.
    """
    try:
        train = load()
        is_same_clip = not train.clip_id.contradicts(cache.clip_id)
        is_same = train.embed_dim == cache.embed_dim and is_same_clip
        problem = f"{train.folder} and {cache.folder} are of different CLIPs"
        need(is_same, f"{problem}; make one of them anew")
    except UserError as error:
        logging.info("reference-entropy is left out: %s", error)
        return None
    return Reference(train, size, cache.device)
