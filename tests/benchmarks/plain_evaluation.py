"""An evaluation as a plain script has it: all similarities in one float32 matrix, the best ten both ways, recall by level.

    python -m tests.benchmarks.plain_evaluation embeddings/coco/val checkpoints/coco/0/asymvlm-psd.pt
    python -m tests.benchmarks.plain_evaluation embeddings/coco/val checkpoints/coco/0/asymvlm-psd.pt cuda

What eval.py is measured against, as a whole process too: the paper's protocol without baselines, intervals and plots.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from tests.textbook import power_spherical, run_mlp

LEVELS = 10


@torch.no_grad()
def evaluate(weights, z_image, z_text, image_of_caption):
    """Recalls and recall by level, text-to-image and image-to-text, of asymvlm-psd: two tuples.

    Args: weights: by name; z_image (N, D), z_text (M, D), image_of_caption (M,).
    """
    x, eta = F.normalize(z_image.float(), dim=1), run_mlp(weights, "text_mlp", z_text.float())
    similarity, uncertainty = power_spherical(x, eta), 1 / eta.norm(dim=1)
    images_found = similarity.topk(10, dim=0).indices.T  # (M, 10)
    captions_found = similarity.topk(10, dim=1).indices  # (N, 10)
    t2i = images_found == image_of_caption[:, None]
    i2t = image_of_caption[captions_found] == torch.arange(len(x), device=x.device)[:, None]
    return tuple(
        figures(*both) for both in ((t2i, uncertainty), (i2t, uncertainty[captions_found[:, 0]]))
    )


def figures(is_right, uncertainty):
    """R@1, R@5, R@10, R@1 of each level, and the correlation of these with the level."""
    recall = [is_right[:, :k].any(dim=1).float().mean().item() for k in (1, 5, 10)]
    order = uncertainty.argsort()
    first_is_right = is_right[order, 0].cpu().numpy()
    by_level = [float(part.mean()) for part in np.array_split(first_is_right, LEVELS)]
    with np.errstate(invalid="ignore"):  # undefined where recall is the same in all levels
        return *recall, by_level, np.corrcoef(np.arange(LEVELS), by_level)[0, 1]


def main(folder, checkpoint, device="cpu"):
    z_image, z_text = (
        torch.load(Path(folder) / f"{kind}.pt", weights_only=True).to(device)
        for kind in ("image", "text")
    )
    image_of_caption = json.loads((Path(folder) / "cap_id_to_img_id.json").read_text())
    image_of_caption = torch.tensor(
        [image_of_caption[str(caption)] for caption in range(len(z_text))], device=device
    )
    weights = torch.load(checkpoint, weights_only=True, map_location=device)["state_dict"]
    for direction, found in zip(
        ("t2i", "i2t"), evaluate(weights, z_image, z_text, image_of_caption), strict=True
    ):
        print(direction, *found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
