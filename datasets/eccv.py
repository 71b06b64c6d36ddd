"""The captions and images of COCO's Karpathy test split in; the images that people found right for a caption, out.

The judgements are those of the package eccv_caption (Chun et al., "ECCV Caption", arXiv 2204.03359), which is optional:
pip install eccv-caption. It looks into 1,332 of the split's captions. Its ids are COCO's own: annotation ids, which are
the sentids of dataset_coco.json, and image ids, the cocoids. So no further file is needed; for every caption that the
package knows, it is checked that both name the same image.
"""

import warnings

from utils.cli import UserError


def relevance(image_ids, caption_ids, image_of_caption, path):
    """Which images are right for each caption.

    Args:
        image_ids, caption_ids: N cocoids and M sentids. image_of_caption: M image rows.
        path: the file they are from, for messages.
    Returns: (relevance, annotated); both are None if the package knows no such caption, or is not there.
        relevance: M lists of image rows, ascending, the caption's own among them; for a caption that nobody looked
        into, its own alone, which says nothing about how many are right.
        annotated: the rows of the captions that were looked into, ascending; figures about relevance are over these.
    Raises: UserError if a caption belongs to another image than the package has it, or the package is another one.
    """
    judged = _judgements()
    if judged is None:
        return None, None
    original, right = judged
    row_of_image = {image_id: row for row, image_id in enumerate(image_ids)}
    lists, annotated = [], []
    for caption, (caption_id, owner) in enumerate(zip(caption_ids, image_of_caption, strict=True)):
        if original.get(caption_id, [image_ids[owner]]) != [image_ids[owner]]:
            theirs = f"cocoid {', '.join(map(str, original[caption_id]))} in the package eccv_caption"
            wrong = f"sentid {caption_id} belongs to cocoid {image_ids[owner]} here and to {theirs}"
            raise UserError(f"{path}: {wrong}; use Karpathy's own file, or uninstall eccv-caption")
        if caption_id in right:
            annotated.append(caption)
        lists.append(sorted({owner} | {row_of_image[i] for i in right.get(caption_id, ()) if i in row_of_image}))
    return (lists, annotated) if annotated else (None, None)


def _judgements():
    """({sentid: [its own cocoid]}, {sentid: [all right cocoids]}) of the package, or None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns where the optional ujson is missing
            from eccv_caption import Metrics
    except ImportError:
        return None
    try:
        metrics = Metrics()
        return dict(metrics.coco_gts["t2i"]), dict(metrics.eccv_gts["t2i"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the package eccv_caption is not as version 0.1.0 has it ({error}); pip install eccv-caption==0.1.0"
        ) from None
