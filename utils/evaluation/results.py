"""The evaluation of a scorer, and its two files: .json (metrics, intervals) and .npz (answers)."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from utils.cli import need
from utils.evaluation.bootstrap import percentile_interval
from utils.evaluation.figures import (
    DIRECTIONS,
    FOLDS,
    guarantees,
    hierarchy,
    measure,
    measure_resamples,
    uncertainty_of,
)
from utils.evaluation.metrics import COUNT, recall_by_level, uncertainty_by_depth
from utils.evaluation.ranking import rank_queries
from utils.evaluation.scorers import PUBLISHED, SCORES, Row, answer
from utils.evaluation.selective import split_queries
from utils.evaluation.training_free import TRAINING_FREE
from utils.files import load_arrays, load_json, save_json, written_aside
from utils.trained import difference_of_settings

TRAINED_ON = "trained-on-"  # prefix of a folder: its heads were trained on another data set
FIELDS = ("query", "rank", "top1")  # that the answers of both directions have


@dataclass
class Results:
    """The results of one method and seed.

    Attributes:
        answers: {"t2i", "i2t"}, as `scorers.answer` returns them.
        content: of the .json file. "t2i" and "i2t": recall by level of the text's uncertainty, or
            of the image's if texts have none; "by_image": {direction: recall by level of the
            image's uncertainty}; "metrics": as `measure` returns them; "intervals"; "ladder":
            uncertainty of each prompt of the ladder; "depth": uncertainty by depth in caption
            chains; "risk": the arguments of `guarantees`; "config": how the results were made,
            with the scorer's own config.
        draws: as `measure_resamples` returns them.
        needs: as `Scorer` has it; it is not saved.
    """

    answers: dict
    content: dict
    draws: dict = field(default_factory=dict)
    needs: str = ""

    @classmethod
    def of(cls, answers: dict, levels: int, levels_by: str = COUNT) -> "Results":
        """The results that follow from answers alone."""
        content = {"metrics": measure(answers, levels, levels_by=levels_by), "by_image": {}}
        for direction, answered in answers.items():
            correct = answered["rank"] == 1
            if "image_uncertainty" in answered:
                by_image = answered["image_uncertainty"]
                recall = recall_by_level(correct, by_image, levels, by=levels_by)
                content["by_image"][direction] = _without_nan(recall)
            uncertainty = uncertainty_of(answered)
            if uncertainty is not None:
                recall = recall_by_level(correct, uncertainty, levels, by=levels_by)
                content[direction] = _without_nan(recall)
        return cls(answers, content)

    @property
    def is_uncertain(self) -> bool:
        """Whether the scorer has an uncertainty, of texts or of images."""
        return "t2i" in self.content

    @property
    def has_uncertain_texts(self) -> bool:
        """Whether texts have an uncertainty."""
        return "uncertainty" in self.answers["t2i"]

    def bootstrap(self, levels: int, resamples: int, levels_by: str = COUNT) -> "Results":
        """Add resamples and intervals; returns itself."""
        self.draws = measure_resamples(self.answers, levels, resamples, levels_by=levels_by)
        intervals = {}
        for key, draws in self.draws.items():
            intervals[key] = {name: percentile_interval(values) for name, values in draws.items()}
        self.content["intervals"] = intervals
        return self

    def save(self, folder: Path) -> None:
        """Write the files of these results, with their config, to results/<name>/ or one in it."""
        config = self.content["config"]
        row = Row(config["method"], config.get("score", PUBLISHED))
        document, table = result_files(folder, row, config["seed"])
        save_json(self.content, document, indent=1)
        arrays = {}
        for direction, answered in self.answers.items():
            for name, values in answered.items():
                arrays[f"{direction}_{name}"] = values
        with written_aside(table) as file:
            np.savez_compressed(file, **arrays)
        if "risk" in self.content:
            path = threshold_file(folder, row, config["seed"])
            save_json(self.thresholds(), path, indent=1)

    def thresholds(self) -> dict:
        """What `selective.load_threshold` reads: text-to-image thresholds and calibration set."""
        config = self.content["config"]
        settings = self.content["risk"]
        guaranteed = []
        for k in settings["at"]:
            metrics = self.content["metrics"][f"risk_t2i_at_{k}"]
            for risk in settings["risks"]:
                guaranteed.append(
                    {
                        "risk": risk,
                        "k": k,
                        "threshold": metrics[f"threshold at {risk:g}"],
                        "coverage": metrics[f"coverage at {risk:g}"],
                        "error": metrics[f"error at {risk:g}"],
                    }
                )
        calibration, _, _ = split_queries(self.answers["t2i"]["image"])
        calibrated_on = {
            "dataset": config.get("dataset"),
            "split": config.get("split"),
            "cache": config.get("cache"),
            "method": config.get("method"),
            "seed": config.get("seed"),
            "checkpoint": config.get("checkpoint"),
            "score": config.get("score", PUBLISHED),
            "captions": len(calibration),
        }
        return {
            "direction": "t2i",
            "confidence": settings["confidence"],
            "guarantees": guaranteed,
            "calibrated_on": calibrated_on,
        }

    @classmethod
    def load(cls, document: Path, table: Path, split: str) -> "Results":
        """Read the .json and .npz that `save` wrote.

        Raises: UserError if they are something else, or of another split.
        """
        content = load_json(document)
        arrays = load_arrays(table)
        config = content.get("config") if isinstance(content, dict) else None
        found_split = config.get("split") if isinstance(config, dict) else None
        problem = f"these are results of the split {found_split}, not of {split}"
        need(found_split == split, f"{document}: {problem}; evaluate again")
        answers = {}
        for direction in DIRECTIONS:
            prefix = f"{direction}_"
            answers[direction] = {
                name.removeprefix(prefix): values
                for name, values in arrays.items()
                if name.startswith(prefix)
            }
            _check_answers(answers[direction], table)
        return cls(answers, content)


def _without_nan(values):
    """A list with None for NaN, which JSON does not have."""
    return [None if np.isnan(value) else value for value in values]


def _check_answers(answered, table):
    """Raise a UserError if the answers of one direction are not complete."""
    names = f"{', '.join(FIELDS)} and uncertainty"
    problem = f"{table}: {names} must have one entry per query in both directions"
    has_all = all(name in answered for name in FIELDS) and uncertainty_of(answered) is not None
    need(has_all, f"{problem}; evaluate again")
    shapes = {values.shape for values in answered.values()}
    is_one_entry_per_query = len(shapes) == 1 and len(answered["rank"].shape) == 1
    need(is_one_entry_per_query, f"{problem}; evaluate again")


# Files.


def results_folder(dataset, trained_on=None):
    """results/<dataset>/, or a folder in it if the heads were trained on another data set."""
    folder = Path("results") / dataset
    return folder / f"{TRAINED_ON}{trained_on}" if trained_on else folder


def row_name(row):
    """The name of a row's files, such as "pfe", or "pfe.own" if its own score ranks."""
    return row.method if row.score == PUBLISHED else f"{row.method}.{row.score}"


def parse_row(name, score=PUBLISHED):
    """The Row of a name such as "pfe" or "pfe.own"; without a suffix, this score ranks.

    Training-free rows always rank by the published score.
    """
    method, dot, suffix = name.rpartition(".")
    if dot and suffix in SCORES:
        return Row(method, suffix)
    return Row(name) if name in TRAINING_FREE else Row(name, score)


def result_files(folder, row, seed):
    """The .json and .npz of a Row under results/<name>/; training-free rows have no seed."""
    subfolder = "baselines" if row.method in TRAINING_FREE else str(seed)
    name = row_name(row)
    return folder / subfolder / f"{name}.json", folder / subfolder / f"{name}.npz"


def threshold_file(folder, row, seed):
    """The .threshold.json of a Row, beside its .json and .npz."""
    document, _ = result_files(folder, row, seed)
    return document.with_name(f"{row_name(row)}.threshold.json")


def load_results(folder, row, seeds, split):
    """The saved results of a Row: a list of Results, one per seed.

    Raises: UserError if a file is missing, or as `Results.load`.
    """
    # --method takes no training-free rows, but every evaluation makes them.
    method = "all" if row.method in TRAINING_FREE else row.method
    flags = f"--dataset {folder.name}"
    if folder.name.startswith(TRAINED_ON):
        flags = (
            f"--dataset {folder.parent.name} --trained-on {folder.name.removeprefix(TRAINED_ON)}"
        )
    command = f"python eval.py {flags} --method {method}"
    if split != "val":
        command += f" --split {split}"
    command += f" --seed {' '.join(map(str, seeds))}"
    if row.score != PUBLISHED:
        command += f" --score {row.score}"
    # A training-free row has the same files for every seed.
    files = dict.fromkeys(result_files(folder, row, seed) for seed in seeds)
    results = []
    for document, table in files:
        for path in (table, document):
            need(path.exists(), f"{path}: no such results; make them with {command}")
        results.append(Results.load(document, table, split))
    check_seeds_alike(results, files, command)
    return results


def check_seeds_alike(results, files, command):
    """Raise a UserError if the seeds of a row were trained differently.

    Args:
        results: list of Results, one per seed.
        files: the .json and .npz of each.
        command: that makes them.
    """
    settings = [(run.content["config"] or {}).get("training", {}) for run in results]
    for number, (document, _) in enumerate(files):
        changed = difference_of_settings(settings[0], settings[number])
        problem = f"{document}: its head has other settings than the first seed's ({changed})"
        need(not changed, f"{problem}; train it again, and evaluate with {command}")


def check_same_queries(results, flag):
    """Check that rows answered the same queries of the same cache.

    Args:
        results: {row: [Results, one per seed]}.
        flag: of the command line, for the message.
    Returns: how many queries each direction has, (t2i, i2t).
    Raises: UserError if they differ.
    """
    caches = set()
    sizes = set()
    for runs in results.values():
        for run in runs:
            config = run.content.get("config") or {}
            caches.add(config.get("cache"))
            sizes.add(tuple(len(answered["rank"]) for answered in run.answers.values()))
    names = ", ".join(sorted(map(str, caches)))
    cure = "evaluate them again"
    need(len(caches) == 1, f"{flag}: the results are of different caches ({names}); {cure}")
    need(len(sizes) == 1, f"{flag}: the results are of different queries ({sorted(sizes)}); {cure}")
    return sizes.pop()


def save_texts(texts, folder):
    """Write {file name: text} to a folder."""
    for name, text in texts.items():
        with written_aside(folder / name) as file:
            file.write(text.encode())


# Evaluation.


@torch.inference_mode()
def evaluate(scorer, cache, levels, folds=1, ladder=None, chains=None, risk=None, levels_by=COUNT):
    """All metrics of one scorer on one split.

    Args:
        scorer: Scorer of the cache.
        cache: EmbeddingCache.
        levels: number of uncertainty levels.
        folds: parts of the gallery; 1: none.
        ladder: prompts, as `load_texts` returns them, or None.
        chains: caption chains, as `load_chains` returns them, or None.
        risk: arguments of `guarantees`, a dict; None: no thresholds.
        levels_by: how the queries are cut into levels (`metrics.recall_by_level`).
    Returns: Results.
    """
    results = Results.of(answer(scorer, cache), levels, levels_by)
    results.needs = scorer.needs
    metrics = results.content["metrics"]
    if folds > 1:
        metrics[FOLDS.key] = recall_in_folds(scorer, cache, folds)
    if not results.is_uncertain:
        return results
    if risk:
        results.content["risk"] = risk
        metrics.update(measure(results.answers, levels, guarantees(**risk)))
    if results.has_uncertain_texts:
        add_texts(results, scorer, ladder, chains or {})
    else:
        logging.info(
            "%s: its texts have no uncertainty; levels are by the image's, "
            "the prompt ladder and caption chains are left out",
            scorer.row.method,
        )
    return results


def add_texts(results, scorer, ladder, chains):
    """Add the uncertainty of further texts to results: the prompt ladder and caption chains."""
    content = results.content
    if ladder is not None and scorer.on_ladder:
        prompts, z = ladder[:2]
        values = scorer.text_uncertainty(prompts, z).tolist()
        content["ladder"] = [
            {"prompt": prompt, "uncertainty": value}
            for prompt, value in zip(prompts, values, strict=True)
        ]
    for stem, (texts, z, rows) in chains.items():
        uncertainty = scorer.text_uncertainty(texts, z)
        section = hierarchy(stem)
        view = {"uncertainty": uncertainty, "chains": rows}
        content["metrics"][section.key] = section.measure(view)
        content.setdefault("depth", {})[stem] = uncertainty_by_depth(uncertainty, rows)


def recall_in_folds(scorer, cache, folds):
    """Recall in each of several consecutive parts of the gallery, averaged: {metric name: float}.

    COCO 1K is the mean over 5 folds of the 5K test images.
    """
    image_of_caption = cache.image_of_caption.cpu()
    measured = []
    for images in torch.arange(len(cache.image)).tensor_split(folds):
        is_in_fold = (image_of_caption >= images[0]) & (image_of_caption <= images[-1])
        captions = is_in_fold.nonzero().flatten()
        answers = _rank_fold(scorer, images, captions, image_of_caption)
        ranks = {f"{direction}_rank": answers[direction]["rank"] for direction in answers}
        measured.append(FOLDS.measure(ranks))
    return {name: float(np.mean([fold[name] for fold in measured])) for name in measured[0]}


def _rank_fold(scorer, images, captions, image_of_caption):
    """What `rank_queries` returns for some consecutive images and their captions."""

    def score(image_rows, caption_rows):
        return scorer.score(images[image_rows], captions[caption_rows])

    return rank_queries(score, image_of_caption[captions] - images[0], len(images))
