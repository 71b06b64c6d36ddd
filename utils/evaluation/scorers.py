"""The frozen CLIP and an adaptor behind one interface: what ranks, and how uncertain it is.

A `Scorer` is one row of the tables. Training-free scorers are in training_free.py.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

from models.layers import pairwise_products, unit
from utils.evaluation.ranking import rank_queries, rank_relevant
from utils.trained import training_of

BATCH = 4096  # rows that are encoded at a time
FROZEN_COSINE = "frozen cosine"  # the row of the frozen CLIP, which has no uncertainty
PUBLISHED = "published"
FROZEN = "frozen"
OWN = "own"
SCORES = {  # what ranks, and what titles say of it
    PUBLISHED: "",  # as in the paper's repository
    FROZEN: "all ranked by the frozen cosine",
    OWN: "each ranked by its authors' own score",
}


class Row(NamedTuple):
    """What identifies a row of a table, apart from the seed."""

    method: str  # or the name of a training-free score
    score: str = PUBLISHED  # what ranks, of SCORES


class Scorer:
    """How well the images and captions of a cache match, and how uncertain they are.

    Attributes:
        cache: EmbeddingCache.
        row: Row of the tables.
        seed: of the training, or None.
        needs: what the uncertainty needs besides the text: "gallery", "reference" (images),
            "reference, pairs" (images with their captions) or "training"; "-" if it needs nothing,
            or if there is none.
        on_ladder: whether it is shown on the prompt ladder, which compares ratios of uncertainties.
        config: what the saved results say of it.
    """

    needs = "-"
    on_ladder = False

    def __init__(self, cache, row, seed=None, checkpoint=None):
        self.cache = cache
        self.row = row
        self.seed = seed
        self.config = {"method": row.method, "seed": seed, "checkpoint": checkpoint}
        if row.score != PUBLISHED:
            self.config["score"] = row.score

    @functools.cached_property
    def ranking(self):
        """What `rank` finds by this score."""
        return rank(self.score, self.cache)

    def score(self, images, captions):
        """Similarities (N, M) of rows of the cache; larger = better match.

        Args:
            images: (N,) int64, or a slice.
            captions: (M,) int64, or a slice.
        """
        raise NotImplementedError

    def caption_uncertainty(self):
        """The uncertainty of the captions of the cache, a float64 array (M,), or None."""
        return self.text_uncertainty(self.cache.captions, read(self.cache.text))

    def text_uncertainty(self, texts, z):
        """The uncertainty of T texts with embeddings z (T, D), a float64 array (T,), or None."""
        return None

    def image_uncertainty(self):
        """The uncertainty of the images of the cache, a float64 array (N,), or None."""
        return None


class FrozenScorer(Scorer):
    """The frozen CLIP, which ranks by cosine and has no uncertainty."""

    def __init__(self, cache):
        super().__init__(cache, Row(FROZEN_COSINE))
        self.image = unit(read(cache.image))
        self.text = unit(read(cache.text))

    def score(self, images, captions):
        return pairwise_products(self.image[images], self.text[captions])

    def caption_uncertainty(self):
        return None


class RankedByFrozen(Scorer):
    """A Scorer that ranks as the frozen CLIP does; a subclass has the uncertainty."""

    def __init__(self, frozen, row, seed=None, checkpoint=None):
        super().__init__(frozen.cache, row, seed, checkpoint)
        self.frozen = frozen

    @property
    def ranking(self):
        return self.frozen.ranking

    def score(self, images, captions):
        return self.frozen.score(images, captions)


class AdaptorScorer(Scorer):
    """An adaptor. With score OWN it ranks by its authors' score, else by its published score.

    The embeddings of the cache are encoded once, when it is made.
    """

    needs = "training"
    on_ladder = True

    @torch.inference_mode()
    def __init__(self, adaptor, cache, method=None, seed=None, score=PUBLISHED):
        row = Row(method, OWN if score == OWN else PUBLISHED)
        super().__init__(cache, row, seed, getattr(adaptor, "checkpoint", None))
        self.config.update(training_of(adaptor))
        self.adaptor = adaptor
        self.match = adaptor.own_score if score == OWN else adaptor.score
        self.image = self.encode(adaptor.encode_image, read(cache.image))
        self.text = self.encode(adaptor.encode_text, read(cache.text))

    @torch.inference_mode()
    def encode(self, encoder, z):
        """Encode embeddings z (N, D) by a function of the adaptor: a list of (N, ...) tensors."""
        batches = [encoder(batch.to(self.cache.device).float()) for batch in z.split(BATCH)]
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]

    def score(self, images, captions):
        image = [part[images] for part in self.image]
        text = [part[captions] for part in self.text]
        return self.match(image, text)

    def caption_uncertainty(self):
        _, uncertainty = self.adaptor.describe_text(*self.text)
        return to_array(uncertainty)

    def text_uncertainty(self, texts, z):
        _, uncertainty = self.adaptor.describe_text(*self.encode(self.adaptor.encode_text, z))
        return to_array(uncertainty)

    def image_uncertainty(self):
        _, uncertainty = self.adaptor.describe_image(*self.image)
        return to_array(uncertainty)


class AdaptorRankedByFrozen(RankedByFrozen):
    """The uncertainty of an AdaptorScorer, with the ranking of the frozen CLIP."""

    def __init__(self, frozen, scorer):
        checkpoint = scorer.config["checkpoint"]
        super().__init__(frozen, Row(scorer.row.method, FROZEN), scorer.seed, checkpoint)
        self.config.update(training_of(scorer.adaptor))
        self.needs = scorer.needs
        self.on_ladder = scorer.on_ladder
        self.caption_uncertainty = scorer.caption_uncertainty
        self.text_uncertainty = scorer.text_uncertainty
        self.image_uncertainty = scorer.image_uncertainty


def read(rows):
    """Rows of a cache as a tensor; a tensor stays as it is."""
    return rows if isinstance(rows, torch.Tensor) else rows.read()


def to_array(uncertainty):
    """An uncertainty (N,), a tensor or None, as a float64 array or None."""
    return None if uncertainty is None else uncertainty.cpu().double().numpy()


def count_words(texts):
    """The number of words of each text, a float64 array (T,)."""
    return np.array([len(text.split()) for text in texts], dtype=np.float64)


@torch.inference_mode()
def rank(score, cache):
    """Answer every query of a cache, whatever its uncertainty.

    Args:
        score: as `Scorer.score`.
    Returns: {"t2i", "i2t"}, each a dict of arrays with one entry per query: what `rank_queries`
        returns, and for each set of judgements of the cache what `rank_relevant` returns, 0 for
        queries without judgement. The second and later sets have their name before each field.
    """
    answers = rank_queries(score, cache.image_of_caption.cpu().numpy(), len(cache.image))

    def score_texts(captions, images):
        return score(images, captions).T

    for number, (name, judgement) in enumerate(cache.judgements.items()):
        prefix = f"{name}_" if number else ""
        t2i, i2t = answers["t2i"], answers["i2t"]
        _add_judged(t2i, prefix, score_texts, judgement["t2i"], len(cache.image))
        _add_judged(i2t, prefix, score, judgement["i2t"], len(cache.text))
    return answers


def _add_judged(answers, prefix, score, right_answers, gallery_size):
    """Add to the answers of one direction how well all right answers are found.

    Args:
        right_answers: for each row that may be asked, the list of right rows; empty: not judged.
    """
    query = answers["query"]
    judged = np.flatnonzero([len(right_answers[row]) > 0 for row in query])
    rows = torch.from_numpy(query[judged])

    def score_judged(queries, gallery):
        return score(rows[queries], gallery)

    relevance = [right_answers[row] for row in query[judged]]
    for field, values in rank_relevant(score_judged, relevance, gallery_size).items():
        of_all = np.zeros(len(query), values.dtype)
        of_all[judged] = values
        answers[f"{prefix}{field}"] = of_all


def answer(scorer, cache):
    """The answer to every query of a cache, and how uncertain it is.

    Returns: {"t2i", "i2t"}, each a dict of arrays with one entry per query: what `rank` returns
        and, where known,
        uncertainty: of the caption that was asked (t2i) or retrieved (i2t).
        image_uncertainty: of the image that was retrieved (t2i) or asked (i2t).
        image: row of the caption's image (t2i only).
        words: number of words of the caption (t2i only).
    """
    t2i = dict(scorer.ranking["t2i"])
    i2t = dict(scorer.ranking["i2t"])
    uncertainty = scorer.caption_uncertainty()
    if uncertainty is not None:
        t2i["uncertainty"] = uncertainty[t2i["query"]]
        i2t["uncertainty"] = uncertainty[i2t["top1"]]
    if cache.captions is not None:
        t2i["words"] = count_words(cache.captions)
    image_uncertainty = scorer.image_uncertainty()
    if image_uncertainty is not None:
        t2i["image_uncertainty"] = image_uncertainty[t2i["top1"]]
        i2t["image_uncertainty"] = image_uncertainty[i2t["query"]]
    t2i["image"] = cache.image_of_caption.cpu().numpy()
    return {"t2i": t2i, "i2t": i2t}
