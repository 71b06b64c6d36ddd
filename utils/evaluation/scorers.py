"""What ranks pictures and captions, adaptors and baselines alike, behind one interface; and what it answers to every query of a cache."""

import numpy as np
import torch

from models.layers import cosine_similarity
from utils.evaluation.figures import measure_group
from utils.evaluation.ranking import rank_queries, rank_relevant

CHUNK = 4096  # rows that are encoded at a time
LOGIT_SCALE = 100.0  # of CLIP's cosines where meta.json does not know it: its upper bound, which OpenAI's models reach


class Scorer:
    """Scores the images and captions of a cache, and says how uncertain they are.

    Args: cache: EmbeddingCache.
    Attributes: on_ladder: whether its uncertainty is a positive quantity whose ratios say something: it is measured on the prompt ladder.
    """

    on_ladder, is_uncertain = False, True

    def __init__(self, cache):
        self.cache = cache

    def score(self, images, captions):
        """How well pictures and captions match. Args: rows of the cache, int64, N and M. Returns: (N, M), larger = better."""
        raise NotImplementedError

    def text_uncertainty(self, texts, z):
        """How uncertain texts are. Args: texts: T strings. z (T, D): their embeddings. Returns: (T,) float64 array, or None."""
        return None

    def image_uncertainty(self):
        """How uncertain the cache's images are. Returns: (N,) float64 array, or None."""
        return None


class AdaptorScorer(Scorer):
    """An adaptor on the embeddings of a cache, which are encoded once."""

    on_ladder = True

    def __init__(self, adaptor, cache):
        super().__init__(cache)
        self.adaptor = adaptor
        self.image, self.text = (
            self._encode(adaptor.encode_image, cache.image),
            self._encode(adaptor.encode_text, cache.text),
        )

    def _encode(self, encode, z):
        """(N, D) embeddings, CHUNK rows at a time, to a list of (N, ...) tensors."""
        parts = [encode(part.to(self.cache.text.device).float()) for part in z.split(CHUNK)]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def score(self, images, captions):
        return self.adaptor.score([part[images] for part in self.image], [part[captions] for part in self.text])

    def score_texts(self, z):
        """How well all images match further texts. Args: z (T, D). Returns: (N, T)."""
        return self.adaptor.score(self.image, self._encode(self.adaptor.encode_text, z))

    def text_uncertainty(self, texts, z):
        encoded = self.text if z is self.cache.text else self._encode(self.adaptor.encode_text, z)
        return self.adaptor.describe_text(*encoded)[1].double().cpu().numpy()

    def image_uncertainty(self):
        uncertainty = self.adaptor.describe_image(*self.image)[1]
        return None if uncertainty is None else uncertainty.double().cpu().numpy()


class FrozenCosine(Scorer):
    """The cosine of the frozen CLIP's embeddings, without an uncertainty."""

    is_uncertain = False

    def __init__(self, cache):
        super().__init__(cache)
        self.image, self.text = cache.image.float(), cache.text.float()

    def score(self, images, captions):
        return cosine_similarity(self.image[images], self.text[captions])


class SoftmaxEntropy(FrozenCosine):
    """The frozen cosine; uncertain is a text whose softmax over the gallery's images has a large entropy, in nats.

    It needs the gallery; an adaptor's uncertainty needs the text alone.
    """

    is_uncertain = True

    def text_uncertainty(self, texts, z):
        scale, entropy = self.cache.meta.get("logit_scale") or LOGIT_SCALE, []
        for part in z.to(self.image.device).float().split(CHUNK):
            log_p = (scale * cosine_similarity(self.image, part)).log_softmax(dim=0)  # (N, chunk)
            entropy.append(-(log_p.exp() * log_p).sum(dim=0))
        return torch.cat(entropy).double().cpu().numpy()


class CaptionLength(FrozenCosine):
    """The frozen cosine; uncertain is a text of few words."""

    is_uncertain = True

    def text_uncertainty(self, texts, z):
        return -count_words(texts)


BASELINES = {"softmax-entropy": SoftmaxEntropy, "caption-length": CaptionLength}


def count_words(texts):
    """How many words each text has. Returns: (M,) float64 array."""
    return np.array([len(text.split()) for text in texts], dtype=np.float64)


def answer(scorer, cache):
    """Answer every query of a cache, in both directions.

    Returns: {"t2i", "i2t"} of arrays with one entry a query: what `rank_queries` returns; "words", of the caption; "image_uncertainty", of the image
        retrieved (t2i) or the query (i2t); what `rank_relevant` returns; "annotated", whether all right answers were looked into: each where known.
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
    if cache.relevance is not None:
        asked = torch.from_numpy(i2t["query"])
        right_captions = [cache.right_captions[image] for image in i2t["query"]]
        t2i |= rank_relevant(lambda q, images: scorer.score(images, q).T, cache.right_images, len(cache.image))
        i2t |= rank_relevant(lambda q, captions: scorer.score(asked[q], captions), right_captions, len(cache.text))
        if cache.annotated is not None:
            t2i["annotated"] = np.isin(t2i["query"], cache.annotated)
            i2t["annotated"] = np.isin(i2t["query"], image_of_caption[cache.annotated])
    return answers


def recall_in_folds(scorer, cache, folds):
    """The figures of recall within each of so many consecutive parts of the gallery, averaged. Returns: {figure: float}."""
    image_of_caption, found = cache.image_of_caption.cpu(), []
    for images in torch.arange(len(cache.image)).tensor_split(folds):
        captions = ((image_of_caption >= images[0]) & (image_of_caption <= images[-1])).nonzero().flatten()
        score = lambda i, j, images=images, captions=captions: scorer.score(images[i], captions[j])  # noqa: E731
        part = rank_queries(score, image_of_caption[captions] - images[0], len(images))
        found.append(measure_group("recall", {f"{d}_rank": fields["rank"] for d, fields in part.items()}))
    return {name: float(np.mean([fold[name] for fold in found])) for name in found[0]}
