"""Texts in, how uncertain they are and what they match out: rows of plain types, most certain last."""

from pathlib import Path

import numpy as np

from utils.cli import UserError

CHUNK = 4096  # rows that are encoded at a time
CLOSEST = 3  # images that are named for a prompt


def prompts_from(arguments):
    """The texts of --prompts; "@FILE" stands for the lines of a file. Returns: list of strings, at least one. Raises: UserError."""
    texts = []
    for argument in arguments:
        if not argument.startswith("@"):
            texts.append(argument)
            continue
        try:
            texts += [
                line.strip() for line in Path(argument[1:]).read_text(encoding="utf-8-sig").splitlines() if line.strip()
            ]
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts {argument}: not readable as UTF-8 text ({error})") from None
    if not texts or not all(text.strip() for text in texts):
        raise UserError("--prompts: a prompt is blank; give texts that are not")
    return texts


def text_uncertainty(adaptor, z):
    """The uncertainty of texts, some thousand rows at a time, on the adaptor's device. Args: z (T, D). Returns: (T,) float64 array."""
    device = next(adaptor.parameters()).device
    return np.concatenate([adaptor.adapt_text(part.to(device))[1].double().cpu().numpy() for part in z.split(CHUNK)])


def describe_prompts(adaptor, texts, z, cache):
    """How uncertain prompts are among a cache's captions, and what they match.

    Args: adaptor. texts: T strings. z (T, D): their embeddings. cache: EmbeddingCache.
    Returns: list of T dicts, most certain last: "prompt", "uncertainty", "percentile": share of the captions that are more certain, in
    [0, 100]; "closest": file names (rows where there are none) of the images that match best, best first.
    """
    uncertainty, known = text_uncertainty(adaptor, z), text_uncertainty(adaptor, cache.text.read())
    similarity = adaptor.similarity(cache.image.read(), z.to(cache.image.device))  # (N, T)
    closest = similarity.topk(min(CLOSEST, len(similarity)), dim=0).indices.T.tolist()  # (T, 3)
    return [
        {
            "prompt": texts[row],
            "uncertainty": float(uncertainty[row]),
            "percentile": float(np.mean(known < uncertainty[row]) * 100),
            "closest": [_name(cache, image) for image in closest[row]],
        }
        for row in np.argsort(-uncertainty, kind="stable").tolist()
    ]


def describe_captions(adaptor, cache, most, least):
    """The most and the least uncertain captions of a cache.

    Args: adaptor, cache; most, least: how many. Returns: list of dicts, most certain last: "caption", "uncertainty", "image": file name.
    Raises: UserError if the cache does not know its captions.
    """
    if cache.captions is None:
        raise UserError(
            f"{cache.folder}: has no captions.json, so its captions cannot be listed; make the cache with cache_embeddings.py"
        )
    uncertainty = text_uncertainty(adaptor, cache.text.read())
    order = np.argsort(-uncertainty, kind="stable").tolist()
    rows = dict.fromkeys([*order[:most], *order[max(0, len(order) - least) :]])  # each once, in this order
    return [
        {
            "caption": cache.captions[row],
            "uncertainty": float(uncertainty[row]),
            "image": _name(cache, int(cache.image_of_caption[row])),
        }
        for row in rows
    ]


def _name(cache, image):
    return cache.images[image] if cache.images is not None else str(image)
