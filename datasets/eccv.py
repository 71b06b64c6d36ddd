"""Human judgements of COCO's Karpathy test split: which captions and images match.

They are those of the package eccv_caption (Chun et al., "ECCV Caption", arXiv 2204.03359, and
Parekh et al., "Crisscrossed Captions", arXiv 2004.15020), which is optional
(`pip install eccv-caption`). Its ids are COCO's own: annotation ids, which are the sentids of
dataset_coco.json, and image ids, the cocoids. For every caption that the package knows, we check
that the package and dataset_coco.json name the same image.

Both directions are read: the judgements of images are not the inverse of those of captions.
"""

import warnings

from utils.cli import UserError, reason_of

SETS = {  # name -> attribute of the package's Metrics
    "eccv": "eccv_gts",  # ECCV Caption: 1,332 captions, 1,261 images
    "cxc": "cxc_gts",  # CxC: 24,972 captions, 5,000 images
}


def judgements(image_ids, caption_ids, image_of_caption, path):
    """Which answers are right for each caption and each image.

    Args:
        image_ids: N cocoids.
        caption_ids: M sentids.
        image_of_caption: M image rows.
        path: the file they are from, for messages.
    Returns: {"eccv": {"t2i": M lists of image rows, "i2t": N lists of caption rows}, "cxc": the
        same}; a list is empty if nobody judged the query. {} if the package knows none of the
        captions, or is not installed.
    Raises: UserError if a caption belongs to another image in the package, or if the package is of
        another version.
    """
    metrics = _load_metrics()
    if metrics is None:
        return {}
    sets = {}
    try:
        images_of_caption_id = dict(metrics.coco_gts["t2i"])
        for name, attribute in SETS.items():
            directions = getattr(metrics, attribute)
            sets[name] = (dict(directions["t2i"]), dict(directions["i2t"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"the package eccv_caption is not as version 0.1.0 has it ({error})"
        raise UserError(f"{problem}; pip install eccv-caption==0.1.0") from None
    for caption_id, row in zip(caption_ids, image_of_caption, strict=True):
        own_images = [image_ids[row]]
        package_images = images_of_caption_id.get(caption_id, own_images)
        if package_images != own_images:
            images = ", ".join(map(str, package_images))
            theirs = f"cocoid {images} in the package eccv_caption"
            problem = f"sentid {caption_id} belongs to cocoid {image_ids[row]} here and to {theirs}"
            cure = "use Karpathy's own file, or uninstall eccv-caption"
            raise UserError(f"{path}: {problem}; {cure}")
    found = {}
    for name, (t2i, i2t) in sets.items():
        right_images = _rows(t2i, caption_ids, image_ids)
        right_captions = _rows(i2t, image_ids, caption_ids)
        if any(right_images) and any(right_captions):
            found[name] = {"t2i": right_images, "i2t": right_captions}
    return found


def _load_metrics():
    """The Metrics of the package, or None if it is not installed.

    Raises: UserError if it is installed, but cannot be used.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns if the optional ujson is missing
            from eccv_caption import Metrics
        return Metrics()
    except Exception as error:  # noqa: BLE001  a package or a file that it needs is missing
        if isinstance(error, ModuleNotFoundError) and error.name == "eccv_caption":
            return None
        reason = reason_of(error)
        problem = f"the package eccv_caption is installed, but cannot be used ({reason})"
        cure = "pip install --force-reinstall eccv-caption==0.1.0, or uninstall it"
        raise UserError(f"{problem}; {cure}") from None


def _rows(right, queries, answers):
    """The rows of the right answers of each query, ascending.

    Args:
        right: {query id: answer ids}.
        queries, answers: all ids.
    """
    row_of_answer = {answer: row for row, answer in enumerate(answers)}
    rows = []
    for query in queries:
        right_answers = right.get(query, ())
        rows_of_query = {row_of_answer[a] for a in right_answers if a in row_of_answer}
        rows.append(sorted(rows_of_query))
    return rows
