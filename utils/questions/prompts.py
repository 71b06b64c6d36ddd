"""How uncertain given texts are, and which captions of a cache are most or least uncertain."""

import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch

from models.layers import cosine_similarity
from utils.cli import UserError, need
from utils.evaluation import selective
from utils.evaluation.scorers import FROZEN, PUBLISHED, AdaptorScorer, FrozenScorer
from utils.files import clean_text, load_json, text_lines

CLOSEST = 3  # images that are named for a text
GUARANTEE = (
    "note: the guarantee behind keep and ask back is for captions drawn like the data set's, and "
    "for a method, k and risk chosen beforehand; it does not cover prompts that you make up"
)


def prompts_from(arguments):
    """The texts of --prompts; "@FILE" stands for the lines of a file.

    Raises: UserError if a text is blank, or a file is not text.
    """
    texts = []
    for argument in arguments:
        if argument.startswith("@"):
            lines = text_lines(Path(argument[1:]))
            need(lines, f"--prompts {argument}: holds no text; give one prompt per line")
            texts += lines
        else:
            need(argument.strip(), "--prompts: a prompt is blank; give texts that are not")
            texts.append(clean_text(argument))
    return texts


@torch.inference_mode()
def describe_prompts(adaptor, cache, texts, z, score=PUBLISHED, decide=None):
    """How uncertain prompts are among the captions of a cache, and which images match them best.

    Args:
        adaptor: Adaptor of the cache's width.
        cache: EmbeddingCache.
        texts: T strings.
        z: their embeddings, (T, D).
        score: what ranks, of SCORES.
        decide: function of an uncertainty, as `decision` returns it, or None.
    Returns: dicts, most uncertain first: "prompt"; "uncertainty"; "percentile", how many percent of
        the captions are more certain; "decision", if there is a function; "closest", the file
        names (or rows) of the best images, best first.
    Raises: UserError if the adaptor's texts have no uncertainty.
    """
    scorer = AdaptorScorer(adaptor, cache, score=score)
    uncertainty = scorer.text_uncertainty(texts, z)
    check_uncertain(adaptor, uncertainty)
    caption_uncertainty = scorer.caption_uncertainty()
    similarity = similarity_of_texts(scorer, z, score)  # (N, T)
    closest = similarity.topk(min(CLOSEST, len(similarity)), dim=0).indices.T.tolist()  # (T, 3)
    answers = []
    for row in np.argsort(-uncertainty, kind="stable").tolist():
        is_more_certain = caption_uncertainty < uncertainty[row]
        answer = {
            "prompt": texts[row],
            "uncertainty": float(uncertainty[row]),
            "percentile": float(np.mean(is_more_certain) * 100),
        }
        if decide is not None:
            answer["decision"] = decide(answer["uncertainty"])
        answer["closest"] = [_image_name(cache, image) for image in closest[row]]
        answers.append(answer)
    return answers


def similarity_of_texts(scorer, z, score):
    """How well the images of a cache match further texts.

    Args:
        scorer: AdaptorScorer of the cache.
        z: embeddings of the texts, (T, D).
        score: what ranks, of SCORES.
    Returns: (N, T), larger = better match.
    """
    if score == FROZEN:
        return cosine_similarity(scorer.cache.image.read(), z.to(scorer.cache.device).float())
    text = scorer.encode(scorer.adaptor.encode_text, z)
    return scorer.match(scorer.image, text)


def check_uncertain(adaptor, uncertainty):
    """Raise a UserError if texts have no uncertainty."""
    method = getattr(adaptor, "method", "an adaptor")
    problem = "its images are uncertain, its texts are not"
    need(uncertainty is not None, f"--method {method}: {problem}; leave it out")


def decision(file, adaptor, cache, risk, k, confidence):
    """A function that decides whether to answer or to ask back, by a .threshold.json of eval.py.

    Args:
        file: the .threshold.json.
        adaptor: that it must have been calibrated for.
        cache: that it must have been calibrated on.
        risk, k, confidence: as `selective.load_threshold` has them.
    Returns: a function of a text's uncertainty, which always asks back if no threshold keeps the
        risk; None, and a line in the log, if there is no such file.
    """
    try:
        cure = "evaluate first, without --prompts"
        need(file.exists(), f"{file} is not there; {cure}")
        threshold = selective.load_threshold(file, risk, k, confidence)
        calibrated_on = load_json(file).get("calibrated_on")
        is_known = isinstance(calibrated_on, dict)
        need(is_known, f"{file} does not say what it was calibrated on; {cure}")
        is_same_head = calibrated_on.get("checkpoint") == adaptor.checkpoint
        is_same_cache = calibrated_on.get("cache") == cache.digest
        problem = f"{file} is of another checkpoint or other embeddings"
        need(is_same_head and is_same_cache, f"{problem}; {cure}")
    except (UserError, OSError) as error:
        logging.info("note: no decisions, since they need a threshold: %s", error)
        return None
    return partial(selective.decide, threshold=threshold)


@torch.inference_mode()
def describe_captions(adaptor, cache, most, least):
    """The most and the least uncertain captions of a cache; each distinct caption counts once.

    Args:
        adaptor: Adaptor of the cache's width.
        cache: EmbeddingCache.
        most, least: how many of each.
    Returns: dicts, most uncertain first: "caption"; "uncertainty"; "images", how many have this
        caption; "image", the first of them.
    Raises: UserError if the cache does not know its captions, or texts have no uncertainty.
    """
    problem = "has no captions.json, so its captions cannot be listed"
    cure = "make the cache with cache_embeddings.py"
    need(cache.captions is not None, f"{cache.folder}: {problem}; {cure}")
    uncertainty = AdaptorScorer(adaptor, cache).caption_uncertainty()
    check_uncertain(adaptor, uncertainty)
    uncertainty_of = {}
    images_of = {}
    rows = zip(cache.captions, uncertainty.tolist(), cache.image_of_caption.tolist(), strict=True)
    for caption, value, image in rows:
        uncertainty_of.setdefault(caption, value)
        images_of.setdefault(caption, [])
        if image not in images_of[caption]:
            images_of[caption].append(image)
    ordered = sorted(uncertainty_of, key=uncertainty_of.get, reverse=True)
    listed = ordered[:most] + ordered[max(0, len(ordered) - least) :]
    answers = []
    for caption in dict.fromkeys(listed):
        answers.append(
            {
                "caption": caption,
                "uncertainty": uncertainty_of[caption],
                "images": len(images_of[caption]),
                "image": _image_name(cache, images_of[caption][0]),
            }
        )
    return answers


@torch.inference_mode()
def example_captions(adaptor, cache, levels=5, per_level=2, score=PUBLISHED):
    """Captions from the most certain to the least, and the images that match them best.

    Args:
        adaptor: Adaptor of the cache's width.
        cache: EmbeddingCache.
        levels: of equally many captions.
        per_level: captions of each level.
        score: what ranks, of SCORES.
    Returns: dicts: "caption"; "level", from 1; "uncertainty"; "images", paths, best first; "right",
        a bool for each of them. An empty list, and a line in the log, if captions, their
        uncertainty or the image files are missing.
    """
    files = [cache.image_file(row) for row in range(len(cache.image))] if cache.images else []
    has_files = bool(files) and all(file is not None and file.exists() for file in files)
    if cache.captions is None or not has_files:
        logging.info(
            "captions.png is left out: %s has no captions.json, or its image files are not found",
            cache.folder,
        )
        return []
    scorer = AdaptorScorer(adaptor, cache, score=score)
    uncertainty = scorer.caption_uncertainty()
    if uncertainty is None:
        logging.info("captions.png is left out: the texts of the first method have no uncertainty")
        return []
    most_certain_first = np.argsort(uncertainty, kind="stable")
    count = levels * per_level
    places = (np.arange(count) + 0.5) / count * len(most_certain_first)
    captions = torch.from_numpy(most_certain_first[places.astype(int)])
    ranker = FrozenScorer(cache) if score == FROZEN else scorer
    similarity = ranker.score(torch.arange(len(cache.image)), captions)  # (N, captions)
    closest = similarity.topk(min(CLOSEST, len(similarity)), dim=0).indices.T.tolist()
    answers = []
    for number, (caption, images) in enumerate(zip(captions.tolist(), closest, strict=True)):
        right_images = _right_images(cache, caption)
        answers.append(
            {
                "caption": cache.captions[caption],
                "level": number // per_level + 1,
                "uncertainty": uncertainty[caption],
                "right": [image in right_images for image in images],
                "images": [files[image] for image in images],
            }
        )
    return answers


def _right_images(cache, caption):
    """The rows of the right images of a caption, by the first set of judgements if there is one."""
    own_image = cache.image_of_caption[caption].item()
    first_set = next(iter(cache.judgements.values()), None)
    judged = first_set["t2i"][caption] if first_set else []
    return {own_image, *judged}


def _image_name(cache, image):
    return cache.images[image] if cache.images is not None else str(image)
