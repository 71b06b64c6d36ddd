"""Single questions in, answers out: how uncertain texts are, which captions are most uncertain, how methods differ."""

import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch

from models.layers import cosine_similarity
from utils.cli import UserError, need
from utils.evaluation.results import Results, check_same_queries
from utils.evaluation.selective import decide, load_threshold
from utils.evaluation.scorers import FROZEN, PUBLISHED, AdaptorScorer, Scorer
from utils.evaluation.tables import differences
from utils.files import load_json

CLOSEST = 3  # images that are named for a prompt


def prompts_from(arguments):
    """The texts of --prompts; "@FILE" stands for the lines of a file.

    Raises: UserError if one is blank.
    """
    texts = []
    for argument in arguments:
        is_file = argument.startswith("@")
        try:
            lines = Path(argument[1:]).read_text(encoding="utf-8-sig").splitlines() if is_file else ()
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts {argument}: not readable as UTF-8 text ({error})") from None
        texts += [line.strip() for line in lines if line.strip()] if is_file else [argument]
    need(texts and all(text.strip() for text in texts), "--prompts: a prompt is blank; give texts that are not")
    return texts


@torch.inference_mode()
def describe_prompts(adaptor, cache, texts, z, score=PUBLISHED, decide=None):
    """How uncertain prompts are among a cache's captions, and what they match.

    Args:
        adaptor, cache: of one width.
        texts: T strings.
        z (T, D): their embeddings.
        score: what ranks, of SCORES.
        decide: function of an uncertainty, as `decision` gives it, or None.
    Returns: dicts, most certain last: "prompt", "uncertainty", "percentile" of captions that are more certain,
        "decision", where there is a function of it, and "closest", file names (rows where there are none) of the images
        that match best, best first.
    Raises: UserError if the adaptor's texts have no uncertainty.
    """
    scorer = AdaptorScorer(adaptor, cache, score=score)
    uncertainty, captions = (_uncertainty(scorer, *of) for of in ((texts, z), (cache.captions, cache.text)))
    if score == FROZEN:
        similarity = cosine_similarity(cache.image.read(), z.to(cache.device))  # (N, T)
    else:
        similarity = scorer.match(scorer.image, scorer.encode(adaptor.encode_text, z))  # (N, T)
    closest = similarity.topk(min(CLOSEST, len(similarity)), dim=0).indices.T.tolist()  # (T, 3)
    answers = []
    for row in np.argsort(-uncertainty, kind="stable").tolist():
        answer = {"prompt": texts[row], "uncertainty": float(uncertainty[row])}
        answer["percentile"] = float(np.mean(captions < uncertainty[row]) * 100)
        answer |= {"decision": decide(answer["uncertainty"])} if decide else {}
        answer["closest"] = [_image_name(cache, image) for image in closest[row]]
        answers.append(answer)
    return answers


def decision(file, adaptor, cache, *sought):
    """A function of a text's uncertainty, whether to keep the answer or ask back, by a .threshold.json of eval.py.

    Args:
        file: where it is.
        adaptor, cache: that it must have been calibrated for.
        sought: risk, k and confidence, as `load_threshold` has them.
    Returns: the function; None, and a line in the log, where there is no such file of them.
    """
    try:
        need(file.exists(), f"{file} is not there")
        threshold, made_for = load_threshold(file, *sought), load_json(file).get("calibrated_on")
        need(isinstance(made_for, dict), f"{file}: does not tell what it was calibrated on")
        is_for = (made_for.get("checkpoint"), made_for.get("cache")) == (adaptor.checkpoint, cache.digest)
        need(is_for, f"{file}: of another checkpoint or other embeddings")
    except (UserError, OSError) as error:
        logging.info("note: no decisions, which need a threshold: %s; evaluate, without --prompts, first", error)
        return None
    return partial(decide, threshold=threshold)


@torch.inference_mode()
def describe_captions(adaptor, cache, most, least):
    """So many of the most and least uncertain captions of a cache, each distinct one once.

    Returns: dicts of "caption", "uncertainty", "images", how many carry it, and "image", the first; most certain last.
    Raises: UserError if the cache does not know its captions, or as `describe_prompts`.
    """
    lacks = "has no captions.json, so its captions cannot be listed; make the cache with cache_embeddings.py"
    need(cache.captions is not None, f"{cache.folder}: {lacks}")
    uncertainty = _uncertainty(AdaptorScorer(adaptor, cache), cache.captions, cache.text)
    images_of = {}
    for caption, image in zip(cache.captions, cache.image_of_caption.tolist(), strict=True):
        images_of.setdefault(caption, {})[image] = None
    uncertainty_of = dict(zip(reversed(cache.captions), uncertainty[::-1].tolist(), strict=True))  # of the first one
    order = sorted(images_of, key=uncertainty_of.get, reverse=True)
    answers = []
    for caption in dict.fromkeys([*order[:most], *order[max(0, len(order) - least) :]]):  # each once, in this order
        first, images = _image_name(cache, next(iter(images_of[caption]))), len(images_of[caption])
        answers.append({"caption": caption, "uncertainty": uncertainty_of[caption], "images": images, "image": first})
    return answers


@torch.inference_mode()
def example_captions(adaptor, cache, levels=5, each=2, score=PUBLISHED):
    """Captions from the most certain to the least, and the pictures that match them best.

    Args:
        adaptor, cache: of one width.
        levels, each: how many levels of equally many captions, and captions of each.
        score: what ranks, of SCORES.
    Returns: dicts: "caption", "level", from 1, "pictures", paths, best first, and "right", a bool for each of them;
        an empty list, and a line in the log, where captions, their uncertainty or pictures are not there.
    """
    files = [cache.image_file(row) for row in range(len(cache.image))] if cache.images else []
    if cache.captions is None or not files or None in files or not all(file.exists() for file in files):
        logging.info("captions.png is left out: the pictures of %s are not where they were embedded from", cache.folder)
        return []
    scorer, owners = AdaptorScorer(adaptor, cache, score=score), cache.image_of_caption.tolist()
    uncertainty = scorer.text_uncertainty(cache.captions, cache.text)
    if uncertainty is None:
        logging.info("captions.png is left out: the texts of the first method have no uncertainty")
        return []
    certain = np.argsort(uncertainty, kind="stable")
    places = (np.arange(levels * each) + 0.5) / (levels * each) * len(certain)
    captions = torch.from_numpy(certain[places.astype(int)])
    ranker = Scorer(cache) if score == FROZEN else scorer
    scores = ranker.score(torch.arange(len(cache.image)), captions)  # (N, captions)
    closest = scores.topk(min(CLOSEST, len(scores)), dim=0).indices.T.tolist()
    judged = next((judged["t2i"] for judged in cache.judgements.values()), [()] * len(owners))
    answers = []
    for number, (caption, images) in enumerate(zip(captions.tolist(), closest, strict=True)):
        right = [image == owners[caption] or image in judged[caption] for image in images]
        answer = {"caption": cache.captions[caption], "level": number // each + 1, "right": right}
        answers.append(answer | {"pictures": [files[image] for image in images]})
    return answers


def _uncertainty(scorer, texts, z):
    """Uncertainty (T,) of T texts; a UserError where texts have none."""
    uncertainty, method = scorer.text_uncertainty(texts, z), getattr(scorer.adaptor, "method", "an adaptor")
    need(uncertainty is not None, f"--method {method}: its images are uncertain, its texts are not; leave it out")
    return uncertainty


def _image_name(cache, image):
    return cache.images[image] if cache.images is not None else str(image)


def paired_bootstrap(runs, levels, resamples):
    """How two methods differ over the same queries, as `tables.differences` tells it.

    Args:
        runs: {method: [Results, one a seed]}, two of them.
        levels: K.
        resamples: how many.
    Raises: UserError if the queries or the caches are not the same, or there are fewer queries than levels.
    """
    sizes = check_same_queries(runs, "--compare")
    few = f"--uncer_levels {levels}: there are fewer queries in the results; choose fewer levels"
    need(levels <= min(sizes), few)
    again = lambda run: Results.of(run.answers, levels).bootstrap(levels, resamples)  # noqa: E731
    return differences({method: [again(run) for run in of_method] for method, of_method in runs.items()})
