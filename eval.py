"""Checkpoint and embeddings in, retrieval by uncertainty level out: a table, results/<name>/<seed>/<method>.json and .npz.

python eval.py --uncer_levels 10
python eval.py --dataset shapes --method asymvlm-psd asymvlm-vmf --seed 0 1 2
"""

import sys
from pathlib import Path

import numpy as np
import torch

from datasets.embedding import LADDER, EmbeddingCache, load_texts
from models import METHODS
from models.layers import cosine_similarity
from utils.checkpoint import checkpoint_path, load_adaptor
from utils.cli import Parser, UserError, positive, run
from utils.device import pick_device
from utils.files import save_json, written_aside
from utils.metrics import ambiguity_metrics, rank_queries, retrieval_metrics
from utils.report import number, text_table

ROOT = Path("results")
CHUNK = 4096  # rows that are encoded at a time


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    paths = {(method, seed): checkpoint_path(args.dataset, seed, method) for seed in args.seed for method in args.method}
    cache = EmbeddingCache(args.dataset, args.split).to(device)
    queries = min(len(cache.text), len(cache.image_of_caption.unique()))
    if args.uncer_levels > queries:
        raise UserError(f"--uncer_levels {args.uncer_levels}: there are only {queries} queries; choose fewer levels")
    for (method, seed), path in paths.items():
        if not path.exists():
            raise UserError(f"{path}: no such checkpoint; make it with python train.py --dataset {args.dataset} --method {method} --seed {seed}")
    ladder = load_texts(args.dataset, LADDER, cache.embed_dim)
    for (method, seed), path in paths.items():
        adaptor = load_adaptor(path, device, method)
        if adaptor.embed_dim != cache.embed_dim:
            raise UserError(
                f"{path}: trained on embeddings {adaptor.embed_dim} wide, those of {args.dataset} are {cache.embed_dim} wide; train again"
            )
        result, answers = evaluate(adaptor, cache, args.uncer_levels, ladder)
        result["config"] = {"dataset": args.dataset, "split": args.split, "method": method, "seed": seed, "uncer_levels": args.uncer_levels}
        save(result, answers, ROOT / args.dataset / str(seed) / method)
        print(screen(result, cache), flush=True)


def parse(argv):
    parser = Parser(description="Cross-modal retrieval by uncertainty level.")
    parser.add_argument("--dataset", default="coco", help="folder under embeddings/ (default: coco)")
    parser.add_argument(
        "--method", nargs="+", default=["asymvlm-psd"], choices=[*METHODS, "all"], metavar="METHOD", help=f"{', '.join(METHODS)}, or all"
    )
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--split", default="val")
    parser.add_argument("--uncer_levels", "--uncer-levels", type=positive, default=10, help="levels of equally many queries (default: 10)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    args.method = list(METHODS) if "all" in args.method else list(dict.fromkeys(args.method))
    return args


@torch.inference_mode()
def evaluate(adaptor, cache, levels, ladder=None):
    """All figures of one adaptor on one split.

    Args: adaptor: Adaptor on the cache's device. cache: EmbeddingCache. levels: K. ladder: what `load_texts` returned.
    Returns: (dict as it is written to results/, the answers of `rank_queries`).
    """
    image = in_chunks(adaptor.encode_image, cache.image)
    text = in_chunks(adaptor.encode_text, cache.text)
    uncertainty = adaptor.describe_text(*text)[1].double().cpu().numpy()
    image_of_caption = cache.image_of_caption.cpu().numpy()

    def score(images, captions):
        return adaptor.score([part[images] for part in image], [part[captions] for part in text]).cpu().numpy()

    answers = rank_queries(score, image_of_caption, len(cache.image), uncertainty)
    result = {"metrics": {}}
    for direction in ("t2i", "i2t"):
        result[direction], result["metrics"][direction] = retrieval_metrics(answers[direction], levels)
    if cache.relevance is not None:
        lengths = [len(caption.split()) for caption in cache.captions]
        result["metrics"]["ambiguity"] = ambiguity_metrics(answers["t2i"], cache.relevance, lengths)
        result["metrics"]["ambiguity"]["R@1_described_frozen"] = described_by_cosine(cache, image_of_caption)
    if ladder is not None:
        texts, z, _ = ladder
        values = adaptor.adapt_text(z.to(cache.text.device))[1].tolist()
        result["ladder"] = [{"prompt": prompt, "uncertainty": value} for prompt, value in zip(texts, values, strict=True)]
    return result, answers


def in_chunks(encode, z):
    """Encode (N, D) embeddings CHUNK rows at a time. Returns: list of (N, ...) tensors."""
    parts = [encode(part.float()) for part in z.split(CHUNK)]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def described_by_cosine(cache, image_of_caption):
    """Share of captions that describe the image which the frozen CLIP's cosine ranks first."""

    def score(images, captions):
        return cosine_similarity(cache.image[images], cache.text[captions]).cpu().numpy()

    answers = rank_queries(score, image_of_caption, len(cache.image), np.zeros(len(image_of_caption)))
    return ambiguity_metrics(answers["t2i"], cache.relevance, np.zeros(len(image_of_caption)))["R@1_described"]


def save(result, answers, path):
    """Write <path>.json and <path>.npz: one entry a query, <direction>_<what> for all that `rank_queries` returns."""
    save_json(result, path.with_suffix(".json"), indent=1)
    with written_aside(path.with_suffix(".npz")) as file:
        np.savez_compressed(file, **{f"{direction}_{key}": values for direction, fields in answers.items() for key, values in fields.items()})


def screen(result, cache):
    """The result as a person reads it: the levels, the figures, the ambiguity where it is known, the ladder."""
    config, metrics = result["config"], result["metrics"]
    names = {"t2i": "text-to-image", "i2t": "image-to-text"}
    levels = len(result["t2i"])
    lines = [
        f"{config['method']}, seed {config['seed']}, on {config['dataset']}/{config['split']}: {len(cache.image)} images, {len(cache.text)} captions",
        "",
        "R@1 by uncertainty level, from the most certain queries (1) to the least",
        text_table(["", *map(str, range(1, levels + 1))], [[name, *(number(r, 2) for r in result[key])] for key, name in names.items()]),
        "",
        text_table(["", *metrics["t2i"]], [[name, *(number(value) for value in metrics[key].values())] for key, name in names.items()]),
    ]
    if "ambiguity" in metrics:
        ambiguity = metrics["ambiguity"]
        lines += [
            "",
            f"Spearman of uncertainty and exact ambiguity {number(ambiguity['spearman'])}, "
            f"given caption length {number(ambiguity['partial_spearman_given_length'])}",
            f"first image is one that the caption describes: {number(ambiguity['R@1_described'])}, "
            f"frozen CLIP {number(ambiguity['R@1_described_frozen'])}",
        ]
    if "ladder" in result:
        lines += ["", text_table(["prompt", "uncertainty"], [[rung["prompt"], f"{rung['uncertainty']:.4e}"] for rung in result["ladder"]])]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(run(main))
