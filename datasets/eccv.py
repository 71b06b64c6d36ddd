"""The captions and images of COCO's Karpathy test split in; what people found right for each of them, out.

The judgements are those of the package eccv_caption (Chun et al., "ECCV Caption", arXiv 2204.03359, and Parekh et al.,
"Crisscrossed Captions", arXiv 2004.15020), which is optional: pip install eccv-caption. Its ids are COCO's own:
annotation ids, which are the sentids of dataset_coco.json, and image ids, the cocoids. For every caption that the
package knows, it is checked that both name the same image.

Both directions are read. What people found right for an image is not the inverse of what they found for captions.
"""

import warnings

from utils.cli import UserError

SETS = {"eccv": "eccv_gts", "cxc": "cxc_gts"}  # ECCV Caption: 1,332 captions, 1,261 images; CxC: 24,972 and 5,000


def judgements(image_ids, caption_ids, image_of_caption, path):
    """Which answers are right for each caption and each image.

    Args:
        image_ids, caption_ids: N cocoids and M sentids.
        image_of_caption: M image rows.
        path: the file they are from, for messages.
    Returns: {"eccv": {"t2i": M lists of image rows, "i2t": N lists of caption rows}, "cxc": the same}; a list is
        empty where nobody looked. {} if the package knows no such caption, or is not there.
    Raises: UserError if a caption belongs to another image than the package has it, or the package is another one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns where the optional ujson is missing
            from eccv_caption import Metrics  # optional: most data sets have no use for it
    except ImportError:
        return {}
    metrics = Metrics()
    try:
        cocoids_of = dict(metrics.coco_gts["t2i"])
        sets = {name: getattr(metrics, attribute) for name, attribute in SETS.items()}
        sets = {name: (dict(both["t2i"]), dict(both["i2t"])) for name, both in sets.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"the package eccv_caption is not as version 0.1.0 has it ({error})"
        raise UserError(f"{what}; pip install eccv-caption==0.1.0") from None
    for caption_id, row in zip(caption_ids, image_of_caption, strict=True):
        theirs = cocoids_of.get(caption_id, [image_ids[row]])
        if theirs != [image_ids[row]]:
            theirs = f"cocoid {', '.join(map(str, theirs))} in the package eccv_caption"
            wrong = f"sentid {caption_id} belongs to cocoid {image_ids[row]} here and to {theirs}"
            raise UserError(f"{path}: {wrong}; use Karpathy's own file, or uninstall eccv-caption")
    lists = {
        name: {"t2i": _rows(t2i, caption_ids, image_ids), "i2t": _rows(i2t, image_ids, caption_ids)}
        for name, (t2i, i2t) in sets.items()
    }
    return {name: both for name, both in lists.items() if any(both["t2i"]) and any(both["i2t"])}


def _rows(right, queries, answers):
    """The rows of the right answers of every query, ascending. right: {query id: answer ids}."""
    row_of = {answer: row for row, answer in enumerate(answers)}
    return [sorted({row_of[answer] for answer in right.get(query, ()) if answer in row_of}) for query in queries]
