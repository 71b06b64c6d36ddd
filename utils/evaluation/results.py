"""What an evaluation finds for one method and seed, and its two files: .json (figures, intervals) and .npz (one entry a query)."""

from dataclasses import dataclass, field

import numpy as np

from utils.cli import UserError
from utils.evaluation.bootstrap import interval
from utils.evaluation.figures import DIRECTIONS, measure, measure_resamples
from utils.evaluation.metrics import recall_by_level
from utils.evaluation.scorers import BASELINES
from utils.files import load_arrays, load_json, save_json, written_aside

FIELDS = {"query", "top1", "rank", "uncertainty"}  # of every query


@dataclass
class Results:
    """The results of one method and seed.

    Args:
        content: as it is written: "t2i" and "i2t", recall by level; "by_image", the same by the image's uncertainty; "metrics", as `measure` gives them;
            "ladder", "depth", "intervals", "config" where they are known.
        answers: {"t2i", "i2t"} of arrays with one entry a query, from which all the rest follows.
        draws: what `measure_resamples` returns; not written.
    """

    content: dict
    answers: dict
    draws: dict = field(default_factory=dict)

    @property
    def metrics(self):
        """{section key: {figure: float or None}}."""
        return self.content["metrics"]

    @classmethod
    def of(cls, answers, levels):
        """The results that follow from answers alone. Args: levels: K."""
        content = {"metrics": measure(answers, levels), "by_image": {}}
        for direction, fields in answers.items():
            correct = fields["rank"] == 1
            if "uncertainty" in fields:
                content[direction] = recall_by_level(correct, fields["uncertainty"], levels)
            if "image_uncertainty" in fields:
                content["by_image"][direction] = recall_by_level(correct, fields["image_uncertainty"], levels)
        return cls(content, answers)

    def bootstrap(self, levels, resamples):
        """Add the intervals of the figures. Returns: self."""
        self.draws = measure_resamples(self.answers, levels, resamples)
        self.content["intervals"] = {
            key: {name: interval(values) for name, values in figures.items()} for key, figures in self.draws.items()
        }
        return self

    def save(self, path):
        """Write <path>.json and <path>.npz, whose entries are <direction>_<field>."""
        save_json(self.content, path.with_suffix(".json"), indent=1)
        entries = {f"{d}_{name}": values for d, fields in self.answers.items() for name, values in fields.items()}
        with written_aside(path.with_suffix(".npz")) as file:
            np.savez_compressed(file, **entries)

    @classmethod
    def load(cls, path, split):
        """Read the two files.

        Raises: UserError if they are of another split, or not what `save` writes; FileNotFoundError if one is missing.
        """
        content, arrays = load_json(path.with_suffix(".json")), load_arrays(path.with_suffix(".npz"))
        config = content.get("config") if isinstance(content, dict) else None
        found = config.get("split") if isinstance(config, dict) else None
        if found != split:
            raise UserError(f"{path}.json: results of the split {found}, not {split}; evaluate again")
        answers = {
            d: {n.removeprefix(f"{d}_"): v for n, v in arrays.items() if n.startswith(f"{d}_")} for d in DIRECTIONS
        }
        for fields in answers.values():
            shapes = {values.shape for values in fields.values()}
            if not (fields.keys() >= FIELDS and len(shapes) == 1 and len(*shapes) == 1):
                named = ", ".join(sorted(FIELDS))
                raise UserError(f"{path}.npz: has not one entry a query of {named} in both directions; evaluate again")
        return cls(content, answers)


def result_path(folder, method, seed):
    """Where a method's results lie under results/<name>/, without suffix: a baseline has no seed."""
    return folder / ("baselines" if method in BASELINES else str(seed)) / method
