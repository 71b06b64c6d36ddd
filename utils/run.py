"""A training run on disk: checkpoint, log and, until it ends, a lock and a state to resume from."""

import contextlib
import json
import logging
import os
import signal
import time
from copy import deepcopy
from dataclasses import asdict

import torch
from tqdm import tqdm

from models import untagged
from utils.checkpoint import describe, load_run, lock_path, on_cpu, save_adaptor
from utils.cli import UserError, reason_of
from utils.distributed import barrier, is_first
from utils.files import locked, save_tensors

SAVE_AFTER = 300  # seconds; a process that is killed loses at most these and one epoch


class Run:
    """One training run, as a context.

        with Run(path, recipe, config) as run:
            ...                      # make the adaptor and its optimizer as run.recipe says
            run.restore(adaptor, optimizer, schedule, shuffling)
            for epoch, bar in run.epochs():
                ...                  # train for an epoch
                run.record({"epoch": epoch, "loss": loss})

    If a signal or a UserError (also that of a lost rank) ends the block, the last good epoch is
    saved.

    Args:
        path: the checkpoint, <method>.pt or <method>@<tag>.pt. The log (.jsonl) and the state
            (.resume.pt) lie beside it.
        recipe: the Recipe to train with.
        config: dict of plain types, with "seed" and "captions": what the run depends on besides
            its recipe. With "keep": "best" the checkpoint has the weights of the epoch that did
            best on held-out images (`kept_record`). Otherwise it has those of the last epoch, or
            the average that the recipe asks for.
        resume: continue a saved run with this recipe and config.
        save_every: save the state every so many epochs, and at the end of any epoch by which
            SAVE_AFTER seconds have passed since the last save.
        former_recipe: what the recipe was in earlier versions; a run that was begun with it is
            continued with it. None: the same.
    Attributes:
        recipe: the Recipe that applies, settled when the block is entered. A run that was begun
            before the recipe had some of its fields is continued with their defaults.
        log: one record per finished epoch.
    Raises: UserError on entry if another process has this run locked, or if the saved run is a
        different one.
    """

    def __init__(self, path, recipe, config, resume=False, save_every=10, former_recipe=None):
        self.path = path
        self.state_path = path.with_suffix(".resume.pt")
        self.method = path.stem
        self.recipe = recipe
        self.config = config
        self.resume = resume
        self.save_every = save_every
        self.accepted_recipes = [recipe] if former_recipe is None else [recipe, former_recipe]
        self.keeps_best = config.get("keep") == "best"
        self.is_finished = False
        self.log = []
        self.saved_at = time.monotonic()  # when the state was saved last
        self.saved = None  # the content of the state file that the run is resumed from
        self.state = None  # the next content of that file: the last epoch of this process
        self.best = None  # weights of the best epoch so far
        self.average = None  # of the weights after each of the epochs that the recipe averages

    def __enter__(self):
        with contextlib.ExitStack() as exits:
            if is_first():
                exits.enter_context(locked(lock_path(self.path), self.path))
            # torchrun and Slurm stop a process with SIGTERM. It is treated like Ctrl-C.
            handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
            exits.callback(signal.signal, signal.SIGTERM, handler)
            if self.resume:
                self._find_saved()
            self.exits = exits.pop_all()
        return self

    def __exit__(self, kind, error, traceback):
        with self.exits:
            if not isinstance(error, KeyboardInterrupt | UserError):
                return
            # Nothing may interrupt the saving: torchrun may send both signals.
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.signal(number, signal.SIG_IGN)
                self.exits.callback(signal.signal, number, handler)
            if self.state is not None and is_first():
                self._save_state()
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(self._outcome()) from None

    def _outcome(self):
        """What was saved when the run was interrupted, and how to go on."""
        if self.state is not None:
            saved = f"saved after epoch {len(self.state['log'])}"
        elif self.resume and self.state_path.exists():
            saved = f"no epoch was finished, and {self.state_path} is as it was"
        else:
            return "no epoch was finished, and nothing was saved; give the same command again"
        return f"{saved}; the same command with --resume goes on from there"

    def _find_saved(self):
        """Read the state of an unfinished run, or see that the run is finished."""
        cure = "resume it with the settings that it was begun with, or start again without --resume"
        self.saved = load_run(self.state_path, self.accepted_recipes, self.config, cure)
        if self.saved is None:
            cure = "give --overwrite in place of --resume to replace it"
            checkpoint = load_run(self.path, self.accepted_recipes, self.config, cure)
            self.is_finished = checkpoint is not None
            return
        with self._refuse_unfit_state():
            # A recipe from before some fields existed is completed with their defaults.
            self.recipe = type(self.recipe)(**self.saved["recipe"])

    @contextlib.contextmanager
    def _refuse_unfit_state(self):
        """Turn any error in the block into a UserError: other content can raise almost anything."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            reason = reason_of(error)
            raise UserError(
                f"{self.state_path}: not the state of such a run ({reason}); "
                "start again without --resume"
            ) from None

    def restore(self, adaptor, optimizer, schedule, shuffling):
        """Load the saved state, if there is one. From now on the run saves these objects.

        Args: shuffling: torch.Generator that orders the pairs of every epoch.
        Raises: UserError if the state does not fit them.
        """
        self.adaptor = adaptor
        self.optimizer = optimizer
        self.schedule = schedule
        self.shuffling = shuffling
        barrier()  # All ranks have read the files that the first one changes from here on.
        if self.saved is not None:
            with self._refuse_unfit_state():
                self._load(self.saved)
            self.saved = None

    def _load(self, saved):
        """Continue from the content of a state file. Weights that do not fit raise an error."""
        for epoch, record in enumerate(saved["log"], start=1):
            self.log.append({"epoch": epoch, **record})
        if self.keeps_best:
            self.best = saved["best"]
            self.kept_record()  # fails if an epoch was not validated
            self.adaptor.load_state_dict(self.best)  # fails if they do not fit
        self.average = saved.get("average")
        if self.average is not None:
            self.adaptor.load_state_dict(self.average)  # fails if they do not fit
            self.average = deepcopy(self.adaptor.state_dict())  # on its device
        self.adaptor.load_state_dict(saved["state_dict"])
        progress = saved["progress"]
        self.optimizer.load_state_dict(progress["optimizer"])
        self.schedule.load_state_dict(progress["schedule"])
        self.shuffling.set_state(progress["order"])
        torch.set_rng_state(progress["random"])
        if "cuda_random" in progress and torch.cuda.is_available():  # dropout draws from it
            torch.cuda.set_rng_state(progress["cuda_random"])

    def epochs(self):
        """The epochs that are left. After the last one the checkpoint is written.

        Yields: the number of the epoch, from 1, and the run's progress bar, which counts pairs.
        """
        if self.is_finished:
            logging.info("%s: finished already; without --resume it is trained again", self.path)
            return
        self._open_log()
        bar = self._open_bar()
        for epoch in range(len(self.log) + 1, self.recipe.epochs + 1):
            yield epoch, bar
            bar.set_postfix(self._progress())
        bar.close()
        self._finish()

    def _open_log(self):
        """Start the log with the epochs of the saved run. Ranks but the first write none."""
        path = self.path.with_suffix(".jsonl") if is_first() else os.devnull
        file = open(path, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
        self.log_file = self.exits.enter_context(file)
        self.log_file.writelines(json.dumps(record) + "\n" for record in self.log)

    def _open_bar(self):
        captions = self.config["captions"]
        pairs = min(captions, self.recipe.steps(captions) * self.recipe.batch_size)  # per epoch
        bar = tqdm(
            desc=f"{self.method}, seed {self.config['seed']}",
            initial=len(self.log) * pairs,
            total=self.recipe.epochs * pairs,
            unit=" captions",
            mininterval=0.5,
            disable=not is_first(),
        )
        return self.exits.enter_context(bar)

    def _progress(self):
        """What the progress bar says of the last epoch, {name: text}."""
        record = self.log[-1]
        progress = {
            "epoch": f"{record['epoch']}/{self.recipe.epochs}",
            "loss": f"{record['loss']:.4f}",
        }
        for name, value in record.get("validation", {}).items():
            progress[f"held-out {name}"] = f"{value:.4f}"
        return progress

    def record(self, record):
        """Log a finished epoch, and save the state if that is due.

        The first record also holds the recipe.

        Args: record: dict of plain types with "epoch" and "loss". To keep the best epoch it needs
            "validation", a dict with "AURC".
        """
        if not self.log:
            record = {**record, "recipe": asdict(self.recipe)}
        self.log.append(record)
        self.log_file.write(json.dumps(record) + "\n")
        content = describe(self.adaptor, untagged(self.method), self.recipe, self.config)
        weights = content["state_dict"]
        progress = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "order": self.shuffling.get_state(),
            "random": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            progress["cuda_random"] = torch.cuda.get_rng_state()
        self.state = {**content, "progress": deepcopy(progress), "log": list(self.log)}
        if self.keeps_best:
            if self.kept_record() is record:
                self.best = weights
            self.state["best"] = self.best
        epochs_before_average = round(self.recipe.averaged_after * self.recipe.epochs)
        averaged_epochs = len(self.log) - epochs_before_average
        if averaged_epochs > 0:
            self.average = running_mean(self.average, weights, averaged_epochs)
            self.state["average"] = self.average
        is_due = len(self.log) % self.save_every == 0
        is_late = time.monotonic() - self.saved_at > SAVE_AFTER
        if (is_due or is_late) and is_first():
            self._save_state()

    def _save_state(self):
        save_tensors(on_cpu(self.state), self.state_path)
        self.saved_at = time.monotonic()

    def kept_record(self):
        """The record of the epoch whose weights are kept so far.

        It is the last epoch or, to keep the best, the first of those with the lowest held-out AURC.
        AURC is preferred to the loss for two reasons. The tables compare methods by it, and it is
        low only if right answers are found and wrong ones are uncertain. And a contrastive loss
        depends on the batch size.
        """
        if not self.keeps_best:
            return self.log[-1]
        return min(self.log, key=lambda record: record["validation"]["AURC"])

    def _finish(self):
        """Write the checkpoint and remove the state."""
        if self.keeps_best:
            self.adaptor.load_state_dict(self.best)
            epoch = self.kept_record()["epoch"]
            logging.info("%s: the weights of epoch %d, the best in validation", self.path, epoch)
        elif self.average is not None:
            self.adaptor.load_state_dict(self.average)
        if is_first():
            save_adaptor(self.adaptor, untagged(self.method), self.recipe, self.config, self.path)
            self.state_path.unlink(missing_ok=True)
        logging.info("%s: %s", self.path, self._summary())

    def _summary(self):
        """What the finished run says: epochs, last loss, seconds of training, the next command."""
        epochs = len(self.log)
        seconds = sum(record.get("seconds", 0) for record in self.log)
        # checkpoints/<dataset>/<seed>/<method>.pt
        dataset = self.config.get("dataset", self.path.parent.parent.name)
        evaluate = f"python eval.py --dataset {dataset} --method {self.method}"
        if self.config["seed"]:
            evaluate += f" --seed {self.config['seed']}"
        loss = self.log[-1]["loss"]
        unit = "epoch" if epochs == 1 else "epochs"
        return f"{epochs} {unit} in {seconds:.0f} s, loss {loss:.4f}; next: {evaluate}"


def running_mean(mean, weights, count):
    """The mean of the weights of `count` epochs.

    Args:
        mean: of those before the last, a state dict; None if there are none.
        weights: of the last, a state dict.
    """
    if mean is None:
        return weights
    means = {}
    for name, weight in weights.items():
        means[name] = weight  # integers, such as a count of batches, are not averaged
        if weight.is_floating_point():
            means[name] = torch.lerp(mean[name], weight, 1 / count)
    return means


def check_finite(losses, adaptor, method, epoch):
    """Check the losses (S,) of an epoch's steps and the weights after it.

    Raises: UserError that names the first step with a loss that is not finite.
    """
    bad_steps = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if bad_steps:
        step = bad_steps[0]
        problem = f"the loss is {losses[step].item()}"
    elif not all(torch.isfinite(weight).all() for weight in adaptor.parameters()):
        step = len(losses) - 1
        problem = "it leaves weights that are not finite"
    else:
        return
    raise UserError(
        f"{method}, epoch {epoch}, step {step + 1}: {problem}; "
        "the learning rate is the likely cause: try a smaller --lr or --precision fp32"
    )
