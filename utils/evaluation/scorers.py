"""What ranks images and captions, baselines and adaptors alike, behind one interface; its answers to all queries."""

import numpy as np
import torch

from models.layers import pairwise_products, unit
from utils.evaluation.figures import FOLDS
from utils.evaluation.ranking import rank_queries, rank_relevant

ROWS_AT_ONCE = 4096  # that are encoded
LOGIT_SCALE = 100.0  # of CLIP's cosines where meta.json does not know it: its upper bound, which OpenAI's models reach


class Scorer:
    """How well a cache's images and captions match, and how uncertain they are; this one is the frozen CLIP: it is not.

    Attributes:
        name, seed: of its results.
        checkpoint: SHA-256 of an adaptor's file.
        on_ladder: whether ratios of its uncertainties mean something.
    """

    name, seed, checkpoint, on_ladder = "frozen cosine", None, None, False

    def __init__(self, cache):
        self.cache, self.image, self.text = cache, unit(_read(cache.image)), unit(_read(cache.text))

    def score(self, images, captions):
        """Similarities (N, M), larger = better, of rows of the cache: images (N,), captions (M,)."""
        return pairwise_products(self.image[images], self.text[captions])

    def text_uncertainty(self, texts, z):
        """Uncertainty (T,) of T texts with embeddings z (T, D): a float64 array, or None."""
        return None

    def image_uncertainty(self):
        """Uncertainty (N,) of the cache's images, a float64 array, or None."""
        return None


class SoftmaxEntropy(Scorer):
    """Uncertain is a text whose softmax over the gallery's images has a large entropy, in nats."""

    name = "softmax-entropy"

    def text_uncertainty(self, texts, z):
        scale, entropy = self.cache.meta.get("logit_scale") or LOGIT_SCALE, []
        for part in _read(z).to(self.cache.device).split(ROWS_AT_ONCE):
            log_p = (scale * pairwise_products(self.image, unit(part))).log_softmax(dim=0)  # (N, rows)
            entropy.append(-(log_p.exp() * log_p).sum(dim=0))
        return torch.cat(entropy).double().cpu().numpy()


class CaptionLength(Scorer):
    """Uncertain is a text of few words."""

    name = "caption-length"

    def text_uncertainty(self, texts, z):
        return -count_words(texts)


class AdaptorScorer(Scorer):
    """An adaptor; the cache is encoded once."""

    on_ladder = True

    @torch.inference_mode()
    def __init__(self, adaptor, cache, name=None, seed=None):
        self.cache, self.adaptor, self.name, self.seed = cache, adaptor, name, seed
        self.checkpoint = getattr(adaptor, "checkpoint", None)
        self.image = self.encode(adaptor.encode_image, cache.image)
        self.text = self.encode(adaptor.encode_text, cache.text)

    @torch.inference_mode()
    def encode(self, encoder, z):
        """What a function of the adaptor makes of embeddings (N, D): a list of (N, ...) tensors."""
        z, columns = _read(z), []
        for rows in torch.arange(len(z)).split(ROWS_AT_ONCE):
            encoded = encoder(z[rows].to(self.cache.device).float())
            columns = columns or [part.new_empty(len(z), *part.shape[1:]) for part in encoded]
            for column, part in zip(columns, encoded, strict=True):
                column[rows] = part
        return columns

    def score(self, images, captions):
        return self.adaptor.score([part[images] for part in self.image], [part[captions] for part in self.text])

    def text_uncertainty(self, texts, z):
        encoded = self.text if z is self.cache.text else self.encode(self.adaptor.encode_text, z)
        return _array(self.adaptor.describe_text(*encoded)[1])

    def image_uncertainty(self):
        return _array(self.adaptor.describe_image(*self.image)[1])


BASELINES = (SoftmaxEntropy.name, CaptionLength.name)  # those with an uncertainty


def every_scorer(cache, adaptors):
    """Yield a Scorer for each baseline and then for each adaptor of {(method, seed): Adaptor}, one at a time."""
    yield Scorer(cache)
    yield SoftmaxEntropy(cache)
    if cache.captions is not None:
        yield CaptionLength(cache)
    for (method, seed), adaptor in adaptors.items():
        yield AdaptorScorer(adaptor, cache, method, seed)


def _read(rows):
    """Rows of a cache, wherever they lie, as a tensor; a tensor is one already."""
    return rows if isinstance(rows, torch.Tensor) else rows.read()


def _array(uncertainty):
    """An uncertainty as a float64 array; None stays None."""
    return None if uncertainty is None else uncertainty.double().cpu().numpy()


def count_words(texts):
    """How many words each text has: a float64 array."""
    return np.array([len(text.split()) for text in texts], dtype=np.float64)


def answer(scorer, cache):
    """Answer every query of a cache.

    Returns: {"t2i", "i2t"}, arrays with one entry a query: what `rank_queries` gives and, where known, "words" of the
        caption, "image" that it is of, "image_uncertainty" of the image retrieved (t2i) or asked (i2t), and what
        `rank_relevant` gives, 0 where nobody looked; of further sets of judgements, with the set's name before it.
    """
    image_of_caption = cache.image_of_caption.cpu().numpy()
    uncertainty, image_uncertainty = scorer.text_uncertainty(cache.captions, cache.text), scorer.image_uncertainty()
    answers = rank_queries(scorer.score, image_of_caption, len(cache.image), uncertainty)
    t2i, i2t = answers["t2i"], answers["i2t"]
    if cache.captions is not None:
        t2i["words"] = count_words(cache.captions)
    if image_uncertainty is not None:
        t2i["image_uncertainty"] = image_uncertainty[t2i["top1"]]
        i2t["image_uncertainty"] = image_uncertainty[i2t["query"]]
    t2i["image"] = image_of_caption
    score_of = {"t2i": lambda captions, images: scorer.score(images, captions).T, "i2t": scorer.score}
    for number, (name, right_of) in enumerate(cache.judgements.items()):
        for direction, gallery in (("t2i", cache.image), ("i2t", cache.text)):
            fields, right, score = answers[direction], right_of[direction], score_of[direction]
            judged = [row for row, query in enumerate(fields["query"]) if len(right[query])]
            asked = torch.from_numpy(fields["query"][judged])
            relevance = [right[query] for query in asked]
            score_asked = lambda q, rows, score=score, asked=asked: score(asked[q], rows)  # noqa: E731
            for field, values in rank_relevant(score_asked, relevance, len(gallery)).items():
                everyone = fields[f"{name}_{field}" if number else field] = np.zeros(len(fields["query"]), values.dtype)
                everyone[judged] = values
    return answers


def recall_in_folds(scorer, cache, folds):
    """The figures of recall in each of so many consecutive parts of the gallery, averaged: {figure name: float}."""
    image_of_caption, measured = cache.image_of_caption.cpu(), []
    for images in torch.arange(len(cache.image)).tensor_split(folds):
        captions = ((image_of_caption >= images[0]) & (image_of_caption <= images[-1])).nonzero().flatten()
        score = lambda i, j, images=images, captions=captions: scorer.score(images[i], captions[j])  # noqa: E731
        part = rank_queries(score, image_of_caption[captions] - images[0], len(images))
        measured.append(FOLDS.measure({f"{d}_rank": fields["rank"] for d, fields in part.items()}))
    return {name: float(np.mean([fold[name] for fold in measured])) for name in measured[0]}
