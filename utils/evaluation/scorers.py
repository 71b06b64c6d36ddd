"""What ranks images and captions, baselines and adaptors alike, behind one interface; its answers to all queries."""

import functools
from functools import partial

import numpy as np
import torch

from models.base import Adaptor
from models.layers import pairwise_products, unit
from utils.evaluation.figures import FOLDS
from utils.evaluation.ranking import rank_queries, rank_relevant
from utils.evaluation.reference import add_to_softmax, empty_softmax

ROWS_AT_ONCE = 4096  # that are encoded
TEXTS_AT_ONCE = 512  # that are compared with a gallery: of 5,000 images, 10 MB of cosines
LOGIT_SCALE = 100.0  # of CLIP's cosines where meta.json does not know it: its upper bound, which OpenAI's models reach
PUBLISHED, FROZEN, OWN = "published", "frozen", "own"
SCORES = {  # what ranks, and what titles say of it
    PUBLISHED: "",  # as in the paper's repository
    FROZEN: "all ranked by the frozen cosine",
    OWN: "each ranked by its authors' own score",
}
SOME, ALIKE = 256, 1e-3  # rows that tell whether scores are the same cosines, and how much rounding may change them
SAME = 1e-6  # by how much rounding may change an entry of a unit vector


class Scorer:
    """How well a cache's images and captions match, and how uncertain they are; this one is the frozen CLIP: it is not.

    Attributes:
        name: of its row.
        needs: what its uncertainty takes beside the text: "gallery", "reference" images, true "pairs", "training".
        on_ladder: whether ratios of its uncertainties mean something.
        config: what its results' config says of it.
        neighbours: Neighbours of the captions, which see what it computes to rank them, or None.
    """

    name, needs, on_ladder, neighbours = "frozen cosine", "-", False, None

    def __init__(self, cache):
        self.cache, self.image, self.text = cache, unit(_read(cache.image)), unit(_read(cache.text))
        self.config = {"method": self.name, "seed": None, "checkpoint": None}

    @functools.cached_property
    def ranking(self):
        """What `rank` finds by this score."""
        return rank(self.score, self.cache, self.neighbours and self.neighbours.add)

    def score(self, images, captions):
        """Similarities (N, M), larger = better, of rows of the cache: images (N,), captions (M,), or slices."""
        return pairwise_products(self.image[images], self.text[captions])

    def text_uncertainty(self, texts, z):
        """Uncertainty (T,) of T texts with embeddings z (T, D): a float64 array, or None."""
        return None

    def image_uncertainty(self):
        """Uncertainty (N,) of the cache's images, a float64 array, or None."""
        return None


class RankedByFrozen(Scorer):
    """What ranks as the frozen CLIP does, a Scorer whose ranking it shares; a subclass has the uncertainty."""

    def __init__(self, frozen):
        self.cache, self.frozen, self.score = frozen.cache, frozen, frozen.score
        self.config = frozen.config | {"method": self.name}

    @property
    def ranking(self):
        return self.frozen.ranking


class SoftmaxEntropy(RankedByFrozen):
    """Uncertain is a text whose softmax over the gallery's images has a large entropy, in nats.

    Args: found: function of embeddings (T, D), as `compare_with_gallery`.
    """

    name, needs = "softmax-entropy", "gallery"

    def __init__(self, frozen, found):
        super().__init__(frozen)
        self.found = found

    def text_uncertainty(self, texts, z):
        return self.found(z)[self.name]


class Top1Cosine(SoftmaxEntropy):
    """Uncertain is a text whose best image of the gallery is not like it: the negative cosine."""

    name = "top1-cosine"


class Margin(SoftmaxEntropy):
    """Uncertain is a text that a small step makes match another image best: the negative margin.

    d = (s1 - s2) / (|gradient by z of s1 - s2| + 1e-8), s1 and s2 being the cosines of z with its two best images, g1
    and g2; |gradient| = sqrt(2 - 2 g1.g2 - (s1 - s2)^2) / |z|. The margin is tanh(d).
    Source: uCLIP, UAI 2025.
    """

    name = "margin"


class ReferenceEntropy(RankedByFrozen):
    """Uncertain is a text whose softmax over fixed reference images, not the gallery's, has a large entropy, in nats.

    Args:
        entropies: function of embeddings (T, D), as `Reference.entropies` of some logit scales.
        number: which of them.
        facts: for the config.
    """

    name, needs = "reference-entropy", "reference"

    def __init__(self, frozen, entropies, number, facts):
        super().__init__(frozen)
        self.entropies, self.number, self.config = entropies, number, self.config | facts

    def text_uncertainty(self, texts, z):
        return self.entropies(z)[self.number].numpy()


class FittedReferenceEntropy(ReferenceEntropy):
    """The same at the logit scale that makes true pairs of the reference images' split most likely."""

    name, needs = "reference-entropy-fitted", "reference, pairs"


class CaptionLength(RankedByFrozen):
    """Uncertain is a text of few words."""

    name = "caption-length"

    def text_uncertainty(self, texts, z):
        return -count_words(texts)


class AdaptorScorer(Scorer):
    """An adaptor; the cache is encoded once. It ranks by `match`, its published score or, with score OWN, its own."""

    needs, on_ladder = "training", True

    @torch.inference_mode()
    def __init__(self, adaptor, cache, name=None, seed=None, score=PUBLISHED):
        self.cache, self.adaptor, self.name = cache, adaptor, name
        self.match = adaptor.own_score if score == OWN else adaptor.score
        self.config = {"method": name, "seed": seed, "checkpoint": getattr(adaptor, "checkpoint", None)}
        self.config |= {"score": OWN} if score == OWN else {}
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
        return self.match([part[images] for part in self.image], [part[captions] for part in self.text])

    def text_uncertainty(self, texts, z):
        encoded = self.text if z is self.cache.text else self.encode(self.adaptor.encode_text, z)
        return _array(self.adaptor.describe_text(*encoded)[1])

    def image_uncertainty(self):
        return _array(self.adaptor.describe_image(*self.image)[1])

    @torch.inference_mode()
    def ranks_by(self, frozen):
        """Whether it ranks by the cosine of its means, and these are the embeddings of the frozen CLIP, a Scorer."""
        if getattr(self.match, "__func__", None) is not Adaptor.score:
            return False
        pairs = ((self.image, frozen.image), (self.text, frozen.text))
        return all(torch.allclose(unit(means), there, rtol=0, atol=SAME) for (means, *_), there in pairs)

    @torch.inference_mode()
    def scores_like(self, other):
        """Whether its scores are those of another scorer, as far as some rows tell."""
        rows = [torch.arange(0, n, -(-n // SOME)) for n in map(len, (self.cache.image, self.cache.text))]
        return torch.allclose(self.score(*rows).double(), other.score(*rows).double(), rtol=0, atol=ALIKE)


class FrozenScore(RankedByFrozen):
    """The uncertainty of an adaptor, an AdaptorScorer, where the frozen CLIP ranks."""

    def __init__(self, frozen, scorer, name):
        super().__init__(frozen)
        self.name, self.needs, self.on_ladder = name, scorer.needs, scorer.on_ladder
        self.text_uncertainty, self.image_uncertainty = scorer.text_uncertainty, scorer.image_uncertainty
        self.config = scorer.config | {"score": FROZEN}


AGAINST_GALLERY = (SoftmaxEntropy, Top1Cosine, Margin)
KINDS = (*AGAINST_GALLERY, ReferenceEntropy, FittedReferenceEntropy, CaptionLength)
BASELINES = tuple(kind.name for kind in KINDS)
BESIDE = ", frozen score"  # the end of the name of a method's second row


def every_scorer(cache, adaptors, score=PUBLISHED, reference=None):
    """Yield a Scorer for each baseline and then for each adaptor, one at a time.

    Args:
        cache: EmbeddingCache.
        adaptors: {(method, seed): Adaptor}.
        score: what ranks, of SCORES; under PUBLISHED, an adaptor whose score is not the frozen CLIP's cosine is
            followed by its FrozenScore.
        reference: Reference, or None.
    """
    frozen = Scorer(cache)
    frozen.neighbours = Neighbours(frozen, len(cache.text))
    yield frozen
    found = functools.cache(partial(compare_with_gallery, frozen))
    yield from (kind(frozen, found) for kind in AGAINST_GALLERY)
    if reference is not None:
        yield from reference_entropies(frozen, reference)
    if cache.captions is not None:
        yield CaptionLength(frozen)
    for (method, seed), adaptor in adaptors.items():
        scorer = AdaptorScorer(adaptor, cache, method, seed, score)
        if score == FROZEN:
            yield FrozenScore(frozen, scorer, method)
            continue
        if scorer.ranks_by(frozen):
            scorer.ranking = frozen.ranking
        yield scorer
        if score == PUBLISHED and not scorer.scores_like(frozen):
            yield FrozenScore(frozen, scorer, method + BESIDE)


class Neighbours:
    """What T texts find in the gallery of a frozen Scorer, taken in a tile of their cosines at a time."""

    def __init__(self, frozen, texts):
        self.frozen, self.scale, self.softmax = frozen, logit_scale(frozen.cache), empty_softmax(texts)
        self.cosine = torch.full((2, texts), -torch.inf)  # of the two best images so far
        self.image = torch.zeros(2, texts, dtype=torch.int64)  # their rows

    def add(self, cosine, images, texts):
        """Take in cosines (n, t) of some images and texts, given by their rows."""
        known = self.softmax[:, texts]
        add_to_softmax(known, cosine, self.scale)
        self.softmax[:, texts] = known
        highest, best = (x.cpu() for x in cosine.topk(min(2, len(cosine)), dim=0))
        cosines = torch.cat([self.cosine[:, texts], highest.float()])
        self.cosine[:, texts], order = cosines.topk(2, dim=0)
        self.image[:, texts] = torch.cat([self.image[:, texts], images[best]]).gather(0, order)

    def uncertainty(self, z):
        """The uncertainty of the texts, whose embeddings are z (T, D): {row name: (T,) float64 array}."""
        total, mean = self.softmax
        parts, count = [], min(2, len(self.frozen.image))
        for part, best in zip(z.split(ROWS_AT_ONCE), self.image[:count].split(ROWS_AT_ONCE, dim=1), strict=True):
            part = part.to(self.frozen.image.device).double()
            first, second = (self.frozen.image[best[row]].double() for row in (0, -1))
            top1, lead = (unit(part) * first).sum(dim=1), (unit(part) * (first - second)).sum(dim=1)
            slope = ((first - second).square().sum(dim=1) - lead**2).clamp(min=0).sqrt() / part.norm(dim=1)
            parts.append(torch.stack([-top1, -(lead / (slope + 1e-8)).tanh()]))
        columns = (total - self.scale * mean, *torch.cat(parts, dim=1).cpu())
        return dict(zip((kind.name for kind in AGAINST_GALLERY), (x.numpy() for x in columns), strict=True))


def compare_with_gallery(frozen, z):
    """The uncertainty of texts with embeddings z (T, D) by their cosines with the images: {row name: (T,) float64}.

    Those of the cache's captions were seen when the frozen Scorer ranked them.
    """
    found, text = frozen.neighbours, _read(z)
    if found is not None and z is frozen.cache.text:
        _ = frozen.ranking
    else:
        found = Neighbours(frozen, len(text))
        for rows in torch.arange(len(text)).split(TEXTS_AT_ONCE):
            cosine = pairwise_products(frozen.image, unit(text[rows].to(frozen.image.device)))
            found.add(cosine, torch.arange(len(cosine)), rows)
    return found.uncertainty(text)


def reference_entropies(frozen, reference):
    """The two of them, which compare texts with the reference images at once: a list of Scorers."""
    kinds = [ReferenceEntropy, FittedReferenceEntropy]
    scales = [logit_scale(frozen.cache), reference.fit_scale()]
    scales = [scale for scale in scales if scale is not None]
    entropies = functools.cache(lambda z: reference.entropies(_read(z), scales))
    facts = [{"reference": len(reference), "reference_cache": reference.train.digest, "logit_scale": s} for s in scales]
    return [kind(frozen, entropies, number, facts[number]) for number, kind in enumerate(kinds[: len(scales)])]


def _read(rows):
    """Rows of a cache, wherever they lie, as a tensor; a tensor is one already."""
    return rows if isinstance(rows, torch.Tensor) else rows.read()


def logit_scale(cache):
    """What the CLIP of a cache multiplies its cosines by."""
    return cache.meta.get("logit_scale") or LOGIT_SCALE


def _array(uncertainty):
    """An uncertainty (N,) that may be None as a float64 array, or None."""
    return None if uncertainty is None else uncertainty.double().cpu().numpy()


def count_words(texts):
    """How many words each text has: a float64 array."""
    return np.array([len(text.split()) for text in texts], dtype=np.float64)


@torch.inference_mode()
def rank(score, cache, watch=None):
    """Answer every query of a cache, whatever the uncertainty.

    Args: score: as `Scorer.score`; watch: as for `rank_queries`.
    Returns: two dicts {"t2i", "i2t"} of arrays with one entry a query: what `rank_queries` gives; and what
        `rank_relevant` gives, 0 where nobody looked, of further sets of judgements with the set's name before it.
    """
    found = rank_queries(score, cache.image_of_caption.cpu().numpy(), len(cache.image), watch)
    judged = {"t2i": {}, "i2t": {}}
    score_of = {"t2i": lambda captions, images: score(images, captions).T, "i2t": score}
    for number, (name, right_of) in enumerate(cache.judgements.items()):
        for direction, gallery in (("t2i", cache.image), ("i2t", cache.text)):
            query, right, score_all = found[direction]["query"], right_of[direction], score_of[direction]
            rows = [row for row, asked in enumerate(query) if len(right[asked])]
            asked = torch.from_numpy(query[rows])
            score_asked = lambda q, rows, score=score_all, asked=asked: score(asked[q], rows)  # noqa: E731
            relevance = [right[one] for one in asked]
            for field, values in rank_relevant(score_asked, relevance, len(gallery)).items():
                everyone = np.zeros(len(query), values.dtype)
                everyone[rows] = values
                judged[direction][f"{name}_{field}" if number else field] = everyone
    return found, judged


def answer(scorer, cache):
    """The answer to every query of a cache, and how uncertain it is.

    Returns: {"t2i", "i2t"}, arrays with one entry a query: what `rank` gives and, where known, "uncertainty" of the
        caption asked (t2i) or retrieved (i2t), "image_uncertainty" of the image retrieved (t2i) or asked (i2t), "words"
        of the caption, and "image" that it is of.
    """
    found, judged = scorer.ranking
    uncertainty, image_uncertainty = scorer.text_uncertainty(cache.captions, cache.text), scorer.image_uncertainty()
    t2i, i2t = answers = {d: dict(fields) for d, fields in found.items()}.values()
    for fields, caption, image in ((t2i, "query", "top1"), (i2t, "top1", "query")):
        if uncertainty is not None:
            fields["uncertainty"] = uncertainty[fields[caption]]
        if fields is t2i and cache.captions is not None:
            fields["words"] = count_words(cache.captions)
        if image_uncertainty is not None:
            fields["image_uncertainty"] = image_uncertainty[fields[image]]
    t2i["image"] = cache.image_of_caption.cpu().numpy()
    return {d: fields | judged[d] for d, fields in zip(found, answers, strict=True)}


def recall_in_folds(scorer, cache, folds):
    """The figures of recall in each of so many consecutive parts of the gallery, averaged: {figure name: float}."""
    image_of_caption, measured = cache.image_of_caption.cpu(), []
    for images in torch.arange(len(cache.image)).tensor_split(folds):
        captions = ((image_of_caption >= images[0]) & (image_of_caption <= images[-1])).nonzero().flatten()
        score = lambda i, j, images=images, captions=captions: scorer.score(images[i], captions[j])  # noqa: E731
        part = rank_queries(score, image_of_caption[captions] - images[0], len(images))
        measured.append(FOLDS.measure({f"{d}_rank": fields["rank"] for d, fields in part.items()}))
    return {name: float(np.mean([fold[name] for fold in measured])) for name in measured[0]}
