"""A scorer in, what its evaluation finds out, in two files: .json (figures, intervals) and .npz (one entry a query)."""

import itertools
import logging
from dataclasses import dataclass, field

import numpy as np
import torch

from utils.cli import need
from utils.evaluation.bootstrap import interval
from utils.evaluation.figures import (
    DIRECTIONS,
    FOLDS,
    guarantees,
    hierarchy,
    measure,
    measure_resamples,
    uncertainty_of,
)
from utils.evaluation.metrics import recall_by_level, uncertainty_by_depth
from utils.evaluation.selective import split_queries
from utils.evaluation.scorers import BASELINES, PUBLISHED, SCORES, answer, recall_in_folds
from utils.files import load_arrays, load_json, save_json, written_aside

SUFFIXES = {score: "" if score == PUBLISHED else f".{score}" for score in SCORES}  # of the name of a method's results
FIELDS = ("query", "rank", "top1")  # of every query, which has an uncertainty, too


@dataclass
class Results:
    """The results of one method and seed.

    The content of the .json is "t2i" and "i2t", recall by level; "by_image", the same by the image's uncertainty, by
    which "t2i" and "i2t" go too where texts have none; "metrics", as `measure` gives them; "ladder", "depth",
    "risk", as `guarantees` takes it, "intervals", "config".
    """

    answers: dict  # {"t2i", "i2t"}, as `answer` gives them
    content: dict
    draws: dict = field(default_factory=dict)  # as `measure_resamples` gives them
    needs: str = ""  # as `Scorer` has it; not in the files

    @classmethod
    def of(cls, answers, levels):
        """The results that follow from answers alone."""
        by_query, by_image = (
            {d: recall_by_level(a["rank"] == 1, of(a), levels) for d, a in answers.items() if of(a) is not None}
            for of in (uncertainty_of, lambda fields: fields.get("image_uncertainty"))
        )
        return cls(answers, {"metrics": measure(answers, levels), "by_image": by_image} | by_query)

    @property
    def is_uncertain(self):
        """Whether the scorer has an uncertainty."""
        return "t2i" in self.content

    @property
    def has_uncertain_texts(self):
        """Whether it is the text's."""
        return "uncertainty" in self.answers["t2i"]

    def bootstrap(self, levels, resamples):
        """Add draws and intervals; gives itself back."""
        self.draws = measure_resamples(self.answers, levels, resamples)
        self.content["intervals"] = {k: {n: interval(d) for n, d in draws.items()} for k, draws in self.draws.items()}
        return self

    def save(self, folder, config):
        """Write the two files to results/<name>/; config says how they were made, as `Scorer.config` among it."""
        name = config["method"] + SUFFIXES[config.get("score", PUBLISHED)]
        document, table = result_files(folder, name, config["seed"])
        save_json(self.content | {"config": config}, document, indent=1)
        arrays = {f"{d}_{name}": values for d, fields in self.answers.items() for name, values in fields.items()}
        with written_aside(table) as file:
            np.savez_compressed(file, **arrays)
        if "risk" in self.content:
            save_json(self.thresholds(config), threshold_file(folder, name, config["seed"]), indent=1)

    def thresholds(self, config):
        """What `selective.load_threshold` reads, of texts: thresholds, what they keep, and what they were calibrated on."""
        given, metrics, known = self.content["risk"], self.content["metrics"], []
        for k, risk in itertools.product(given["at"], given["risks"]):
            figures = metrics[f"risk_t2i_at_{k}"]
            found = {entry: figures[f"{entry} at {risk:g}"] for entry in ("threshold", "coverage", "error")}
            known.append({"risk": risk, "k": k} | found)
        calibrated = len(split_queries(self.answers["t2i"]["image"])[0])
        facts = {key: config.get(key) for key in ("dataset", "split", "cache", "method", "seed", "checkpoint")}
        facts |= {"score": config.get("score", PUBLISHED), "captions": calibrated}
        return {"direction": "t2i", "confidence": given["confidence"], "guarantees": known, "calibrated_on": facts}

    @classmethod
    def load(cls, document, table, split):
        """Read what `save` wrote, a .json and an .npz.

        Raises: UserError if it is something else, or of another split.
        """
        content, arrays = load_json(document), load_arrays(table)
        config = content.get("config") if isinstance(content, dict) else None
        is_of = config.get("split") if isinstance(config, dict) else None
        need(is_of == split, f"{document}: results of the split {is_of}, not {split}; evaluate again")
        answers = {d: {key[4:]: values for key, values in arrays.items() if key[:4] == f"{d}_"} for d in DIRECTIONS}
        wanted = f"{', '.join(FIELDS)}, uncertainty"
        problem = f"{table}: has not one entry a query of {wanted} in both directions; evaluate again"
        for fields in answers.values():
            shapes = {values.shape for values in fields.values()}
            is_whole = fields.keys() >= {*FIELDS} and uncertainty_of(fields) is not None
            need(is_whole and len(shapes) == 1 and len(*shapes) == 1, problem)
        return cls(answers, content)


def result_files(folder, name, seed):
    """The .json and .npz of results under results/<name>/, named as by `result_name`; baselines have no seed."""
    path = folder / ("baselines" if name in BASELINES else str(seed)) / name
    return path.with_name(f"{name}.json"), path.with_name(f"{name}.npz")


def threshold_file(folder, name, seed):
    """The .threshold.json beside them."""
    document = result_files(folder, name, seed)[0]
    return document.with_name(f"{name}.threshold.json")


def result_name(method, score):
    """A name of results, such as "pfe.own" where its own score ranks; what is such a name stays, as a baseline does."""
    return method if method in BASELINES or "." in method else method + SUFFIXES[score]


def load_results(folder, name, seeds, split):
    """What was saved under a name: a list of Results, one a seed.

    Raises: UserError if one is missing, or as `Results.load`.
    """
    files = dict.fromkeys(result_files(folder, name, seed) for seed in seeds)
    method, _, score = name.partition(".")
    flags = f"--method {'all' if name in BASELINES else method} --seed {' '.join(map(str, seeds))}"
    command = f"python eval.py --dataset {folder.name} {flags}{score and f' --score {score}'}"
    for pair in files:
        missing = next((file for file in reversed(pair) if not file.exists()), None)
        need(missing is None, f"{missing}: no such results; make them with {command}")
    return [Results.load(*pair, split) for pair in files]


def check_same_queries(results, flag):
    """How many queries each direction of {name: [Results, one a seed]} has.

    Raises: UserError, which names the flag, if the queries or the caches are not the same.
    """
    everything = [run for runs in results.values() for run in runs]
    caches = {(run.content.get("config") or {}).get("cache") for run in everything}
    named, cure = ", ".join(sorted(map(str, caches))), "evaluate them again"
    need(len(caches) == 1, f"{flag}: the results are of different caches ({named}); {cure}")
    sizes = {tuple(len(fields["rank"]) for fields in run.answers.values()) for run in everything}
    need(len(sizes) == 1, f"{flag}: the results are of different queries ({sorted(sizes)}); {cure}")
    return sizes.pop()


@torch.inference_mode()
def evaluate(scorer, cache, levels, folds=1, ladder=None, chains=None, risk=None):
    """All figures of one scorer on one split.

    Args:
        scorer: Scorer of the cache.
        cache: EmbeddingCache.
        levels: K.
        folds: parts of the gallery; 1: none.
        ladder, chains: what load_texts and load_chains return.
        risk: what `guarantees` takes, a dict; None: no thresholds.
    Returns: Results.
    """
    results = Results.of(answer(scorer, cache), levels)
    if folds > 1:
        results.content["metrics"][FOLDS.key] = recall_in_folds(scorer, cache, folds)
    if results.is_uncertain and risk:
        results.content["risk"] = risk
        results.content["metrics"] |= measure(results.answers, levels, guarantees(**risk))
    results.needs = scorer.needs
    if results.is_uncertain and not results.has_uncertain_texts:
        logging.info("%s: its texts have no uncertainty: levels are the image's, and prompts left out", scorer.name)
        ladder = chains = None
    if ladder is not None and scorer.on_ladder:
        values = scorer.text_uncertainty(*ladder[:2]).tolist()
        results.content["ladder"] = [{"prompt": p, "uncertainty": u} for p, u in zip(ladder[0], values, strict=True)]
    for stem, (texts, z, rows) in (chains or {}).items() if results.is_uncertain else ():
        uncertainty, section = scorer.text_uncertainty(texts, z), hierarchy(stem)
        results.content["metrics"][section.key] = section.measure({"uncertainty": uncertainty, "chains": rows})
        results.content.setdefault("depth", {})[stem] = uncertainty_by_depth(uncertainty, rows)
    return results


def save_texts(texts, folder):
    """Write {file name: text} to a folder."""
    for name, text in texts.items():
        with written_aside(folder / name) as file:
            file.write(text.encode())
