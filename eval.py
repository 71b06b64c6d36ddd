"""Checkpoint and embeddings in, retrieval by uncertainty level out: results/<name>/<seed>/<method>.json and .npz, tables, plots.

    python eval.py --uncer_levels 10
    python eval.py --dataset shapes --method all --seed 0 1 2
    python eval.py --dataset shapes --seed 0 1 2 --compare asymvlm-psd prolip
    python eval.py --dataset shapes --prompts "a picture" "a picture of a red star"
    python eval.py --dataset shapes --most-uncertain 5 --least-uncertain 5

An .npz has one entry a query; every figure, table and plot is a function of these files.
"""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch

from datasets.embedding import EmbeddingCache, clip_id
from datasets.texts import LADDER, load_chains, load_texts
from models import METHODS
from models.layers import cosine_similarity
from utils.bootstrap import LEVEL, RESAMPLES, bootstrap_ambiguity, bootstrap_relevance, bootstrap_retrieval, interval
from utils.checkpoint import checkpoint_path, load_adaptor
from utils.cli import Parser, UserError, folder_name, positive, run, seed_number, torchrun_rank, whole_number
from utils.device import pick_device
from utils.files import load_arrays, load_json, save_json, written_aside
from utils.metrics import (
    ambiguity_metrics,
    asymmetry_metrics,
    hierarchy_metrics,
    level_sweep,
    only_annotated,
    rank_queries,
    rank_relevant,
    recall_metrics,
    relevance_metrics,
    retrieval_metrics,
    uncertainty_by_depth,
)
from utils.prompts import CHUNK, describe_captions, describe_prompts, prompts_from, text_uncertainty
from utils.report import comma_separated, compare, details, index, intervals, markdown, paired, rows_as_tables, screen

ROOT = Path("results")
LOGIT_SCALE = 100.0  # of the frozen CLIP's cosines where meta.json does not know it: CLIP's own upper bound, which OpenAI's models reach
DIRECTIONS = ("t2i", "i2t")
BASELINES = ("softmax-entropy", "caption-length")
FIELDS = {"query", "top1", "rank", "uncertainty"}  # of every query


def main(argv=None):
    args = parse(argv)
    if args.compare:
        return compare_two(args)
    device = pick_device(args.device)
    cache = EmbeddingCache(args.dataset, args.split).to(device)
    asking = args.prompts or args.most_uncertain or args.least_uncertain
    if not asking:
        check_counts(args, cache)
    adaptors = load_adaptors(args, cache, device)
    if asking:
        return ask(args, cache, adaptors, device)
    ladder = load_texts(args.dataset, LADDER, cache.embed_dim, meta=cache.meta)
    chains = load_chains(args.dataset, cache.embed_dim, meta=cache.meta)
    results, draws = evaluate_baselines(cache, args, chains)
    for (method, seed), adaptor in adaptors.items():
        result, answers = evaluate(adaptor, cache, args.uncer_levels, ladder, chains, args.folds)
        draws.setdefault(method, []).append(
            save(result, answers, args, method, seed, ROOT / args.dataset / str(seed) / method)
        )
        results.setdefault(method, []).append(result)
    report(results, draws, cache, args)


def parse(argv):
    parser = Parser(
        description="Cross-modal retrieval by uncertainty level, and what else there is to ask of a caption's uncertainty."
    )
    parser.add_argument("--dataset", type=folder_name, default="coco", help="folder under embeddings/ (default: coco)")
    names = ", ".join(METHODS)
    parser.add_argument(
        "--method",
        nargs="+",
        default=["asymvlm-psd"],
        choices=[*METHODS, "all"],
        metavar="METHOD",
        help=f"{names}, or all",
    )
    parser.add_argument("--seed", nargs="+", type=seed_number, default=[0])
    parser.add_argument("--split", type=folder_name, default="val")
    parser.add_argument(
        "--uncer_levels",
        "--uncer-levels",
        type=positive,
        default=10,
        help="levels of equally many queries (default: 10)",
    )
    parser.add_argument(
        "--folds",
        type=positive,
        default=1,
        help="also the mean recall over parts of the gallery (COCO 1K: 5 of the 5K test)",
    )
    parser.add_argument(
        "--resamples",
        type=whole_number,
        default=RESAMPLES,
        help="of the bootstrap intervals over queries; 0: none (default: %(default)s)",
    )
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    parser.add_argument("--device", default="auto")
    ask = parser.add_argument_group("instead of an evaluation")
    ask.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help=f"paired bootstrap of two methods evaluated before, or of {', '.join(BASELINES)}",
    )
    ask.add_argument("--prompts", nargs="+", metavar="TEXT", help="how uncertain these texts are; @FILE: a text a line")
    ask.add_argument("--most-uncertain", type=positive, metavar="N", help="list captions of the split")
    ask.add_argument("--least-uncertain", type=positive, metavar="N", help="list captions of the split")
    ask.add_argument(
        "--json", action="store_true", help="answer --prompts, --most-uncertain and --least-uncertain in JSON"
    )
    args = parser.parse_args(argv)
    args.method = list(METHODS) if "all" in args.method else list(dict.fromkeys(args.method))
    args.seed = list(dict.fromkeys(args.seed))
    if torchrun_rank()[1] > 1:
        parser.error("eval.py runs alone; call it without torchrun")
    for method in args.compare or ():
        if method not in (*METHODS, *BASELINES):
            parser.error(f"--compare {method}: choose from {names}, {', '.join(BASELINES)}")
    listing = args.most_uncertain or args.least_uncertain
    if sum(map(bool, (args.compare, args.prompts, listing))) > 1:
        parser.error("--compare, --prompts and the lists of captions are questions of their own; ask one at a time")
    if args.json and not (args.prompts or listing):
        parser.error(
            "--json: goes with --prompts, --most-uncertain and --least-uncertain; results/ holds the JSON of an evaluation"
        )
    if args.compare and not args.resamples:
        parser.error("--resamples 0: a comparison needs resamples")
    if args.compare and args.compare[0] == args.compare[1]:
        parser.error(f"--compare {args.compare[0]} {args.compare[1]}: give two different methods")
    return args


def check_counts(args, cache):
    """Raise a UserError if there are more levels or folds than queries to fill them."""
    queries = len(cache.image_of_caption.unique())
    if args.uncer_levels > queries:
        raise UserError(
            f"--uncer_levels {args.uncer_levels}: there are only {queries} image queries in {cache.folder}; choose fewer levels"
        )
    if args.folds > queries:
        raise UserError(
            f"--folds {args.folds}: there are only {queries} image queries in {cache.folder}; choose fewer folds"
        )


def load_adaptors(args, cache, device):
    """The adaptors of all methods and seeds: {(method, seed): Adaptor}. Raises: UserError if one is missing or does not fit the cache."""
    paths = {
        (method, seed): checkpoint_path(args.dataset, seed, method) for method in args.method for seed in args.seed
    }
    for (method, seed), path in paths.items():
        if not path.exists():
            raise UserError(
                f"{path}: no such checkpoint; make it with python train.py --dataset {args.dataset} --method {method} --seed {seed}"
            )
    adaptors = {}
    for (method, seed), path in paths.items():
        adaptor = adaptors[method, seed] = load_adaptor(path, device, method)
        if adaptor.embed_dim != cache.embed_dim:
            widths = (
                f"trained on embeddings {adaptor.embed_dim} wide, those of {args.dataset} are {cache.embed_dim} wide"
            )
            raise UserError(f"{path}: {widths}; train again")
    return adaptors


@torch.inference_mode()
def evaluate(adaptor, cache, levels, ladder=None, chains=None, folds=1):
    """All figures of one adaptor on one split.

    Args: adaptor: Adaptor on the cache's device. cache: EmbeddingCache. levels: K. ladder: what `load_texts` returned. chains: what
    `load_chains` returned. folds: parts of the gallery over which recall is averaged, 1: none.
    Returns: (dict as it is written to results/, answers: {"t2i", "i2t"} of arrays with one entry a query).
    """
    image = in_chunks(adaptor.encode_image, cache.image.read())
    text = in_chunks(adaptor.encode_text, cache.text.read())
    uncertainty = adaptor.describe_text(*text)[1].double().cpu().numpy()
    image_uncertainty = adaptor.describe_image(*image)[1]

    def score(images, captions):
        return adaptor.score([part[images] for part in image], [part[captions] for part in text])

    answers = answer(
        score, cache, uncertainty, None if image_uncertainty is None else image_uncertainty.double().cpu().numpy()
    )
    result = figures(answers, levels)
    result["metrics"] |= recall_in_folds(score, cache, folds)
    if ladder is not None:
        values = text_uncertainty(adaptor, ladder[1]).tolist()
        result["ladder"] = [
            {"prompt": prompt, "uncertainty": value} for prompt, value in zip(ladder[0], values, strict=True)
        ]
    add_hierarchies(result, chains, lambda texts, z: text_uncertainty(adaptor, z))
    return result, answers


@torch.inference_mode()
def evaluate_baselines(cache, args, chains):
    """What the frozen CLIP's cosine gives: without an uncertainty, and with two that need no training.

    softmax-entropy: the entropy of a caption's softmax over the gallery's images. It needs the gallery; 1/kappa needs the text alone.
    caption-length: a caption of fewer words is less certain.
    Returns: ({row name: [result]}, {row name: [draws of the bootstrap]}), as for `report`.
    """
    image, text = cache.image.read().float(), cache.text.read().float()

    def score(images, captions):
        return cosine_similarity(image[images], text[captions])

    def entropy(texts, z):
        return gallery_entropy(image, z.to(image.device).float(), cache.meta.get("logit_scale") or LOGIT_SCALE)

    def shortness(texts, z):
        return -words(texts)

    measures = {"softmax-entropy": entropy, "caption-length": shortness}
    answers = answer(score, cache, np.zeros(len(text)))
    frozen = figures(answers, args.uncer_levels)
    recall = recall_in_folds(score, cache, args.folds)
    only_recall = {
        key: {
            figure: value
            for figure, value in frozen["metrics"][key].items()
            if "R@" in figure or figure in ("RSUM", "mAP@R")
        }
        for key in frozen["metrics"]
        if not key.startswith("sweep")
    }
    results, draws = (
        {"frozen cosine": [{"metrics": {key: values for key, values in only_recall.items() if values} | recall}]},
        {},
    )
    for name in BASELINES if cache.captions is not None else BASELINES[:1]:
        uncertainty = measures[name](cache.captions, cache.text.read())
        answers["t2i"]["uncertainty"], answers["i2t"]["uncertainty"] = uncertainty, uncertainty[answers["i2t"]["top1"]]
        result = figures(answers, args.uncer_levels)
        result["metrics"] |= recall
        add_hierarchies(result, chains, measures[name])
        draws[name] = [save(result, answers, args, name, None, ROOT / args.dataset / "baselines" / name)]
        results[name] = [result]
    return results, draws


def gallery_entropy(image, text, scale):
    """Entropy, in nats, of every caption's softmax over the gallery. Args: image (N, D), text (M, D), scale of the cosines. Returns: (M,) array."""
    parts = []
    for part in text.split(CHUNK):
        log_p = (scale * cosine_similarity(image, part)).log_softmax(dim=0)  # (N, chunk)
        parts.append(-(log_p.exp() * log_p).sum(dim=0))
    return torch.cat(parts).double().cpu().numpy()


def answer(score, cache, uncertainty, image_uncertainty=None):
    """Answer every query of a cache.

    Args: score: (image rows, caption rows) -> similarities. uncertainty (M,) of the captions, image_uncertainty (N,) of the images or None.
    Returns: what `rank_queries` returns, with "image_uncertainty", "words" and what `rank_relevant` returns where they are known.
    """
    device = cache.text.device
    answers = rank_queries(
        lambda images, captions: score(images.to(device), captions.to(device)),
        cache.image_of_caption.cpu().numpy(),
        len(cache.image),
        uncertainty,
    )
    t2i, i2t = answers["t2i"], answers["i2t"]
    if cache.captions is not None:
        t2i["words"] = words(cache.captions)
    if image_uncertainty is not None:
        t2i["image_uncertainty"], i2t["image_uncertainty"] = (
            image_uncertainty[t2i["top1"]],
            image_uncertainty[i2t["query"]],
        )
    if cache.relevance is not None:
        asked = torch.from_numpy(i2t["query"])
        t2i |= rank_relevant(
            lambda q, images: score(images.to(device), q.to(device)).T, cache.right_images, len(cache.image)
        )
        right_captions = [cache.right_captions[row] for row in asked]
        i2t |= rank_relevant(
            lambda q, captions: score(asked[q].to(device), captions.to(device)), right_captions, len(cache.text)
        )
        if cache.annotated is not None:
            t2i["annotated"] = np.isin(t2i["query"], cache.annotated)
            i2t["annotated"] = np.isin(i2t["query"], cache.image_of_caption.cpu().numpy()[cache.annotated])
    return answers


def words(texts):
    """How many words each text has. Returns: (M,) float64 array."""
    return np.array([len(text.split()) for text in texts], dtype=np.float64)


def figures(answers, levels):
    """All figures of some answers, in the form in which they are written: "t2i", "i2t", "by_image", "metrics"."""
    result = {"metrics": {}, "by_image": {}}
    for direction in DIRECTIONS:
        result[direction], result["metrics"][direction] = retrieval_metrics(answers[direction], levels)
        result["metrics"][f"sweep_{direction}"] = level_sweep(answers[direction])
        if "image_uncertainty" in answers[direction]:
            result["by_image"][direction], result["metrics"][f"image_{direction}"] = retrieval_metrics(
                answers[direction], levels, "image_uncertainty"
            )
        if "relevant" in answers[direction]:
            result["metrics"][f"relevance_{direction}"] = relevance_metrics(only_annotated(answers[direction]))
    result["metrics"]["recall"] = recall_metrics(answers["t2i"]["rank"], answers["i2t"]["rank"])
    result["metrics"]["asymmetry"] = asymmetry_metrics(answers)
    if "relevant" in answers["t2i"]:
        result["metrics"]["ambiguity"] = ambiguity_metrics(only_annotated(answers["t2i"]))
    return result


def recall_in_folds(score, cache, folds):
    """Recall within each of so many consecutive parts of the gallery, averaged: {"recall_folds": ...}, or {} for one fold."""
    found, device, owner = [], cache.text.device, cache.image_of_caption.cpu()
    for images in torch.arange(len(cache.image)).tensor_split(folds) if folds > 1 else ():
        captions = ((owner >= images[0]) & (owner <= images[-1])).nonzero().flatten()
        part = rank_queries(
            lambda i, j, images=images, captions=captions: score(images[i].to(device), captions[j].to(device)),
            (owner[captions] - images[0]).numpy(),
            len(images),
            np.zeros(len(captions)),
        )
        found.append(recall_metrics(part["t2i"]["rank"], part["i2t"]["rank"]))
    return {"recall_folds": {key: float(np.mean([fold[key] for fold in found])) for key in found[0]}} if found else {}


def add_hierarchies(result, chains, measure):
    """The figures of every file of caption chains. Args: chains: what `load_chains` returned. measure: (texts, z (T, D)) -> uncertainty (T,)."""
    for stem, (texts, z, rows) in (chains or {}).items():
        uncertainty = measure(texts, z)
        result["metrics"][f"hierarchy {stem}"] = hierarchy_metrics(uncertainty, rows)
        result.setdefault("depth", {})[stem] = uncertainty_by_depth(uncertainty, rows)


def in_chunks(encode, z):
    """Encode (N, D) embeddings CHUNK rows at a time. Returns: list of (N, ...) tensors."""
    parts = [encode(part.float()) for part in z.split(CHUNK)]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def save(result, answers, args, method, seed, path):
    """Write <path>.json, with its bootstrap intervals, and <path>.npz: one entry a query, <direction>_<what> for all that was answered.

    Returns: the draws of the bootstrap: {"t2i", "i2t", "ambiguity", ...: {figure: (resamples,)}}.
    """
    draws = bootstrap(answers, args.uncer_levels, args.resamples)
    result["intervals"] = {
        key: {figure: interval(values) for figure, values in found.items()} for key, found in draws.items()
    }
    result["config"] = {
        "dataset": args.dataset,
        "split": args.split,
        "method": method,
        "seed": seed,
        "uncer_levels": args.uncer_levels,
    }
    result["config"] |= {"resamples": args.resamples, "folds": args.folds}
    save_json(result, path.with_suffix(".json"), indent=1)
    with written_aside(path.with_suffix(".npz")) as file:
        np.savez_compressed(
            file,
            **{f"{direction}_{key}": values for direction, fields in answers.items() for key, values in fields.items()},
        )
    return draws


def bootstrap(answers, levels, resamples):
    """All figures that have an interval, for every resample: {"t2i", "i2t", "ambiguity", ...: {figure: (resamples,)}}; {} for none."""
    if not resamples:
        return {}
    draws = {direction: bootstrap_retrieval(answers[direction], levels, resamples) for direction in DIRECTIONS}
    if "relevant" in answers["t2i"]:
        known = {direction: only_annotated(answers[direction]) for direction in DIRECTIONS}
        draws["ambiguity"] = bootstrap_ambiguity(known["t2i"], resamples)
        draws |= {
            f"relevance_{direction}": bootstrap_relevance(known[direction], resamples) for direction in DIRECTIONS
        }
    return draws


def report(results, draws, cache, args):
    """Write the tables and plots of results/<name>/ and print the short ones."""
    folder = ROOT / args.dataset
    title = f"{args.dataset}/{args.split}: {len(cache.image)} images, {len(cache.text)} captions; {name_seeds(args)}"
    tables = compare(results)
    texts = {
        "comparison.md": markdown(tables),
        "details.md": markdown(details(results)) + (intervals(results, draws) if args.resamples else ""),
        "comparison.csv": comma_separated(tables | details(results)),
        "report.txt": f"{title}\n\n{screen(results)}\n",
    }
    plots = {}
    if not args.no_plots:
        from utils.plots import draw_all  # matplotlib takes a second to import

        plots = draw_all(results, load_runs(args, results), folder)
    command = f"python eval.py --dataset {args.dataset} --method {' '.join(args.method)} --seed {' '.join(map(str, args.seed))}"
    command += (
        f" --split {args.split} --uncer_levels {args.uncer_levels} --folds {args.folds} --resamples {args.resamples}"
    )
    for name, text in (texts | {"README.md": index(title, command, texts, plots)}).items():
        with written_aside(folder / name) as file:
            file.write(text.encode())
    logging.info(
        "written to %s: a .json and .npz for every method and seed, tables and plots; README.md there shows them together\n",
        folder,
    )
    print(texts["report.txt"], end="")


def name_seeds(args):
    """ "seed 0" or "seeds 0, 1"."""
    return f"{'seeds' if len(args.seed) > 1 else 'seed'} {', '.join(map(str, args.seed))}"


def result_paths(args, method):
    """Where the results of a method lie, without suffix: one path a seed, one in all for a baseline."""
    folder = ROOT / args.dataset
    return (
        [folder / "baselines" / method] if method in BASELINES else [folder / str(seed) / method for seed in args.seed]
    )


def load_runs(args, methods):
    """The answers of evaluations, read back: {method: [{"t2i": {field: array}, "i2t": ...}, one a seed]}.

    Raises: UserError if one is missing, or is of another split than --split.
    """
    runs = {}
    for method in methods:
        if method == "frozen cosine":
            continue
        for path in result_paths(args, method):
            if not path.with_suffix(".npz").exists() or not path.with_suffix(".json").exists():
                how = f"--method {method if method in METHODS else 'all'} --seed {' '.join(map(str, args.seed))}"
                raise UserError(
                    f"{path}.npz: no such results; make them with python eval.py --dataset {args.dataset} {how}"
                )
            result, arrays = load_json(path.with_suffix(".json")), load_arrays(path.with_suffix(".npz"))
            config = result.get("config") if isinstance(result, dict) else None
            split = config.get("split") if isinstance(config, dict) else None
            if split != args.split:
                raise UserError(f"{path}.json: results of the split {split}, not {args.split}; evaluate again")
            answers = {
                d: {key.removeprefix(f"{d}_"): values for key, values in arrays.items() if key.startswith(f"{d}_")}
                for d in DIRECTIONS
            }
            shapes = {d: {values.shape for values in fields.values()} for d, fields in answers.items()}
            if not all(
                answers[d].keys() >= FIELDS and len(shapes[d]) == 1 and len(*shapes[d]) == 1 for d in DIRECTIONS
            ):
                raise UserError(
                    f"{path}.npz: has not one entry a query of {', '.join(sorted(FIELDS))} in both directions; evaluate again"
                )
            runs.setdefault(method, []).append(answers)
    return runs


def compare_two(args):
    """Print how two methods differ over the same queries, from results written before; over several seeds, how their means differ."""
    runs = load_runs(args, args.compare)
    sizes = {tuple(len(run[d]["rank"]) for d in DIRECTIONS) for method in args.compare for run in runs[method]}
    if len(sizes) > 1:
        raise UserError(f"--compare: the results are of different queries ({sorted(sizes)}); evaluate both again")
    if args.uncer_levels > min(*sizes.pop()):
        raise UserError(
            f"--uncer_levels {args.uncer_levels}: there are fewer queries in the results; choose fewer levels"
        )
    values, draws = {}, {}
    for method in args.compare:
        values[method] = [figures(run, args.uncer_levels)["metrics"] for run in runs[method]]
        draws[method] = [bootstrap(run, args.uncer_levels, args.resamples) for run in runs[method]]
    text = paired(values, draws)
    title = f"{args.dataset}/{args.split}, {' against '.join(args.compare)}, {name_seeds(args)}: "
    title += f"{args.resamples} paired resamples of the queries, {LEVEL:.0%} intervals"
    path = ROOT / args.dataset / f"{args.compare[0]}-against-{args.compare[1]}.txt"
    with written_aside(path) as file:
        file.write(f"{title}\n\n{text}\n".encode())
    print(f"{title}\n\n{text}")


@torch.inference_mode()
def ask(args, cache, adaptors, device):
    """Print how uncertain prompts are among the captions of the split, or the most and least uncertain captions; most certain last."""
    if args.prompts:
        from utils.embed import encode_texts

        texts = prompts_from(args.prompts)
        made_by = clip_id(args.dataset)
        z = encode_texts(made_by.load(device), texts).to(made_by.dtype)

    def rows(adaptor):
        if args.prompts:
            return describe_prompts(adaptor, texts, z, cache)
        return describe_captions(adaptor, cache, args.most_uncertain or 0, args.least_uncertain or 0)

    found = {f"{method}, seed {seed}": rows(adaptor) for (method, seed), adaptor in adaptors.items()}
    print(json.dumps(found, indent=1) if args.json else rows_as_tables(found))


if __name__ == "__main__":
    sys.exit(run(main))
