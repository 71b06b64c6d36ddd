"""Checkpoint and embeddings in, retrieval by uncertainty level out: tables, results/<name>/<seed>/<method>.json and .npz.

python eval.py --uncer_levels 10
python eval.py --dataset shapes --method all --seed 0 1 2
"""

import logging
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
from utils.report import comma_separated, compare, markdown, screen

ROOT = Path("results")
CHUNK = 4096  # rows that are encoded at a time
LOGIT_SCALE = 100.0  # of the frozen CLIP's cosines where meta.json does not know it: CLIP's own upper bound, which OpenAI's models reach


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    cache = EmbeddingCache(args.dataset, args.split).to(device)
    queries = len(cache.image_of_caption.unique())
    if args.uncer_levels > queries:
        raise UserError(f"--uncer_levels {args.uncer_levels}: there are only {queries} image queries in {cache.folder}; choose fewer levels")
    paths = {(method, seed): checkpoint_path(args.dataset, seed, method) for method in args.method for seed in args.seed}
    for (method, seed), path in paths.items():
        if not path.exists():
            raise UserError(f"{path}: no such checkpoint; make it with python train.py --dataset {args.dataset} --method {method} --seed {seed}")
    ladder = load_texts(args.dataset, LADDER, cache.embed_dim)
    folder = ROOT / args.dataset
    results = evaluate_baselines(cache, args, folder)
    for (method, seed), path in paths.items():
        adaptor = load_adaptor(path, device, method)
        if adaptor.embed_dim != cache.embed_dim:
            widths = f"trained on embeddings {adaptor.embed_dim} wide, those of {args.dataset} are {cache.embed_dim} wide"
            raise UserError(f"{path}: {widths}; train again")
        result, answers = evaluate(adaptor, cache, args.uncer_levels, ladder)
        save(result, answers, args, method, seed, folder / str(seed) / method)
        results.setdefault(method, []).append(result)
    tables = compare(results)
    seeds = f"{'seeds' if len(args.seed) > 1 else 'seed'} {', '.join(map(str, args.seed))}"
    report = f"{args.dataset}/{args.split}: {len(cache.image)} images, {len(cache.text)} captions; {seeds}\n\n{screen(results)}\n"
    for name, text in (("comparison.md", markdown(tables)), ("comparison.csv", comma_separated(tables)), ("report.txt", report)):
        with written_aside(folder / name) as file:
            file.write(text.encode())
    logging.info("written to %s: a .json and .npz for every method and seed, comparison.md, comparison.csv and what follows, report.txt\n", folder)
    print(report, end="")


def parse(argv):
    parser = Parser(description="Cross-modal retrieval by uncertainty level.")
    parser.add_argument("--dataset", default="coco", help="folder under embeddings/ (default: coco)")
    names = ", ".join(METHODS)
    parser.add_argument("--method", nargs="+", default=["asymvlm-psd"], choices=[*METHODS, "all"], metavar="METHOD", help=f"{names}, or all")
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--split", default="val")
    parser.add_argument("--uncer_levels", "--uncer-levels", type=positive, default=10, help="levels of equally many queries (default: 10)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    args.method = list(METHODS) if "all" in args.method else list(dict.fromkeys(args.method))
    args.seed = list(dict.fromkeys(args.seed))
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

    def score(images, captions):
        return adaptor.score([part[images] for part in image], [part[captions] for part in text])

    answers = rank(score, cache, uncertainty)
    result = figures(answers, cache, levels)
    if ladder is not None:
        texts, z, _ = ladder
        values = adaptor.adapt_text(z.to(cache.text.device))[1].tolist()
        result["ladder"] = [{"prompt": prompt, "uncertainty": value} for prompt, value in zip(texts, values, strict=True)]
    return result, answers


@torch.inference_mode()
def evaluate_baselines(cache, args, folder):
    """What the frozen CLIP's cosine gives: without an uncertainty, and with two that need no training.

    softmax-entropy: the entropy of a caption's softmax over the gallery's images. It needs the gallery; 1/kappa needs the text alone.
    caption-length: a caption of fewer words is less certain.
    Returns: {row name: [result]}, as for `compare`.
    """
    image, text = cache.image.float(), cache.text.float()

    def score(images, captions):
        return cosine_similarity(image[images], text[captions])

    scale = cache.meta.get("logit_scale") or LOGIT_SCALE
    uncertainties = {"frozen cosine": None, "softmax-entropy": gallery_entropy(image, text, scale)}
    if cache.captions is not None:
        uncertainties["caption-length"] = -np.array([len(caption.split()) for caption in cache.captions], dtype=np.float64)
    answers = rank(score, cache, np.zeros(len(text)))
    results = {}
    for name, uncertainty in uncertainties.items():
        if uncertainty is None:
            result = figures(answers, cache, args.uncer_levels)
            recall_only = {key: {k: v for k, v in result["metrics"][key].items() if k.startswith("R@")} for key in result["metrics"]}
            results[name] = [{"metrics": recall_only}]
            continue
        answers["t2i"]["uncertainty"] = uncertainty
        answers["i2t"]["uncertainty"] = uncertainty[answers["i2t"]["top1"]]
        result = figures(answers, cache, args.uncer_levels)
        save(result, answers, args, name, None, folder / "baselines" / name)
        results[name] = [result]
    return results


def gallery_entropy(image, text, scale):
    """Entropy, in nats, of every caption's softmax over the gallery. Args: image (N, D), text (M, D), scale of the cosines. Returns: (M,) array."""
    parts = []
    for part in text.split(CHUNK):
        log_p = (scale * cosine_similarity(image, part)).log_softmax(dim=0)  # (N, chunk)
        parts.append(-(log_p.exp() * log_p).sum(dim=0))
    return torch.cat(parts).double().cpu().numpy()


def rank(score, cache, uncertainty):
    """`rank_queries` over a cache, with scores from torch."""

    def on_device(images, captions):
        return score(images.to(cache.text.device), captions.to(cache.text.device))

    return rank_queries(on_device, cache.image_of_caption.cpu().numpy(), len(cache.image), uncertainty)


def figures(answers, cache, levels):
    """The figures of some answers, in the form in which they are written: "t2i", "i2t", "metrics"."""
    result = {"metrics": {}}
    for direction in ("t2i", "i2t"):
        result[direction], result["metrics"][direction] = retrieval_metrics(answers[direction], levels)
    if cache.relevance is not None:
        lengths = [len(caption.split()) for caption in cache.captions]
        result["metrics"]["ambiguity"] = ambiguity_metrics(answers["t2i"], cache.relevance, lengths, cache.annotated)
    return result


def in_chunks(encode, z):
    """Encode (N, D) embeddings CHUNK rows at a time. Returns: list of (N, ...) tensors."""
    parts = [encode(part.float()) for part in z.split(CHUNK)]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def save(result, answers, args, method, seed, path):
    """Write <path>.json and <path>.npz: one entry a query, <direction>_<what> for all that `rank_queries` returns."""
    result["config"] = {"dataset": args.dataset, "split": args.split, "method": method, "seed": seed, "uncer_levels": args.uncer_levels}
    save_json(result, path.with_suffix(".json"), indent=1)
    with written_aside(path.with_suffix(".npz")) as file:
        np.savez_compressed(file, **{f"{direction}_{key}": values for direction, fields in answers.items() for key, values in fields.items()})


if __name__ == "__main__":
    sys.exit(run(main))
