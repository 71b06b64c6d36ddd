"""A training run on disk: its checkpoint, its log, and, until it ends, a lock and a state from which it can go on."""

import contextlib
import json
import logging
import os
import signal
from dataclasses import asdict

import torch
from tqdm import tqdm

from utils.checkpoint import copied, describe, load_run, save_adaptor
from utils.cli import UserError
from utils.distributed import barrier, is_first
from utils.files import locked, save_tensors


class Run:
    """One training run. If a signal, a UserError or a lost rank stops its block, the last good epoch is saved.

    Args:
        path: of the checkpoint, <method>.pt; <method>.jsonl, the log, and <method>.resume.pt, the state, lie beside it.
        config: dict of plain types: what else the run depends on, "seed" and "captions" among it. With "keep": "best"
            the checkpoint has the weights of the epoch that did best on held-out images (`kept`), else those of the
            last, or the average that the recipe asks for.
        resume: go on where a run with this recipe and config was saved.
        save_every: epochs after which the state is saved.
    Raises: UserError if another process is at work on it, or if what was saved is of another run.
    """

    def __init__(self, path, recipe, config, resume=False, save_every=10):
        self.path, self.state_path, self.method = path, path.with_suffix(".resume.pt"), path.stem
        self.recipe, self.config, self.resume, self.save_every = recipe, config, resume, save_every
        self.log, self.state = [], None  # a record an epoch; what there is to save of the last that this process did
        self.keeps_best, self.best = config.get("keep") == "best", None  # weights of the best epoch so far
        self.average = None  # of the weights at the ends of the epochs that the recipe averages

    def __enter__(self):
        self.exits = contextlib.ExitStack()
        if is_first():
            self.exits.enter_context(locked(self.path.with_name(f".{self.method}.lock"), self.path))
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # torchrun and Slurm send it
        self.exits.callback(signal.signal, signal.SIGTERM, handler)
        return self

    def __exit__(self, kind, stop, traceback):
        with self.exits:
            if not isinstance(stop, KeyboardInterrupt | UserError | ConnectionError):
                return
            for number in (signal.SIGINT, signal.SIGTERM):  # torchrun may send both
                self.exits.callback(signal.signal, number, signal.signal(number, signal.SIG_IGN))
            if self.state is not None and is_first():
                save_tensors(self.state, self.state_path)
            if isinstance(stop, KeyboardInterrupt):
                done = f"no epoch is done since; {self.state_path} is as it was"
                done = f"saved after epoch {len(self.state['log'])}" if self.state else done
                raise KeyboardInterrupt(f"{done}; the same command with --resume goes on from there") from None

    def restore(self, adaptor, optimizer, schedule, shuffling):
        """Put what changes in training where the run was saved, if it was; from now on the run saves it.

        Args: shuffling: torch.Generator that orders the pairs of every epoch.
        Raises: UserError if what was saved does not fit.
        """
        self.adaptor, self.optimizer, self.schedule, self.shuffling = adaptor, optimizer, schedule, shuffling
        saved = load_run(self.state_path, self.recipe, self.config) if self.resume else None
        finished = load_run(self.path, self.recipe, self.config) if self.resume and saved is None else None
        self.is_finished = finished is not None
        barrier()  # all ranks have read what the first changes from here on
        if saved is None:
            return
        try:
            # As it was begun: fields that came later are not set there, and keep their defaults.
            self.recipe = type(self.recipe)(**saved["recipe"])
            self.log = [{"epoch": epoch, **record} for epoch, record in enumerate(saved["log"], start=1)]
            if self.keeps_best:
                self.best, _ = saved["best"], self.kept()
                adaptor.load_state_dict(self.best)  # only to see that it fits
            self.average = saved.get("average")
            if self.average is not None:
                adaptor.load_state_dict(self.average)
            adaptor.load_state_dict(saved["state_dict"])
            optimizer.load_state_dict(saved["progress"]["optimizer"])
            schedule.load_state_dict(saved["progress"]["schedule"])
            shuffling.set_state(saved["progress"]["order"])
            torch.set_rng_state(saved["progress"]["random"])
        except Exception as error:  # noqa: BLE001  a file of other things raises nearly anything in this block
            reason = " ".join(str(error).split())[:120]
            what = f"{self.state_path}: not the state of such a run"
            raise UserError(f"{what} ({reason}); start anew, without --resume") from None

    def epochs(self):
        """The epochs that are still to be done; after the last, the checkpoint is written.

        Yields: number of the epoch, from 1, and the progress bar of the run, which counts pairs.
        """
        if self.is_finished:
            logging.info("%s: finished already; without --resume it is trained anew", self.path)
            return
        log_path = self.path.with_suffix(".jsonl") if is_first() else os.devnull
        self.log_file = self.exits.enter_context(open(log_path, "w", buffering=1, encoding="utf-8"))  # noqa: SIM115
        self.log_file.writelines(json.dumps(record) + "\n" for record in self.log)
        name, recipe = f"{self.method}, seed {self.config['seed']}", self.recipe
        captions = min(self.config["captions"], recipe.steps(self.config["captions"]) * recipe.batch_size)  # an epoch
        pairs = {"initial": len(self.log) * captions, "total": recipe.epochs * captions, "unit": "pair"}
        look = {"desc": name, "unit_scale": True, "mininterval": 0.5, "disable": not is_first()}
        bar = self.exits.enter_context(tqdm(**pairs, **look))
        for epoch in range(len(self.log) + 1, recipe.epochs + 1):
            yield epoch, bar
            held_out = self.log[-1].get("validation", {})
            found = {"loss": self.log[-1]["loss"]} | {f"held-out {name}": value for name, value in held_out.items()}
            found = {name: f"{value:.4f}" for name, value in found.items()}
            bar.set_postfix({"epoch": f"{epoch}/{recipe.epochs}"} | found)
        bar.close()
        if self.keeps_best:
            self.adaptor.load_state_dict(self.best)
            logging.info("%s: weights of epoch %d, the best on the held-out images", self.path, self.kept()["epoch"])
        elif self.average is not None:
            self.adaptor.load_state_dict(self.average)
        if is_first():
            save_adaptor(self.adaptor, self.method, self.recipe, self.config, self.path)
            self.state_path.unlink(missing_ok=True)
        logging.info("%s: %s", self.path, json.dumps(asdict(self.recipe)))

    def record(self, record):
        """Note an epoch that went well: a dict of plain types, for the log.

        Args: record: "epoch", "loss" and, to keep the best, "validation" among it, a dict that has "AURC".
        """
        self.log.append(record)
        self.log_file.write(json.dumps(record) + "\n")
        progress = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        progress |= {"order": self.shuffling.get_state(), "random": torch.get_rng_state()}
        content = describe(self.adaptor, self.method, self.recipe, self.config)
        self.state = content | {"progress": copied(progress), "log": list(self.log)}
        if self.keeps_best:
            self.best = content["state_dict"] if self.kept() is record else self.best
            self.state["best"] = self.best
        averaged = len(self.log) - round(self.recipe.averaged_after * self.recipe.epochs)  # epochs, this one included
        if averaged > 0:
            weights, average = content["state_dict"], self.average or content["state_dict"]
            self.average = {name: torch.lerp(average[name], weights[name], 1 / averaged) for name in weights}
            self.state["average"] = self.average
        if len(self.log) % self.save_every == 0 and is_first():
            save_tensors(self.state, self.state_path)

    def kept(self):
        """The record of the epoch whose weights are kept so far: the last, or the first of the least held-out AURC.

        AURC and not the loss: tables compare methods by it, and it falls only where the right answers are found and the
        wrong ones are known to be uncertain; a contrastive loss depends on the batch size.
        """
        return min(self.log, key=lambda record: record["validation"]["AURC"]) if self.keeps_best else self.log[-1]


def check_finite(losses, adaptor, method, epoch):
    """Raise a UserError that names the first step of an epoch whose loss, or after which a weight, is not finite."""
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if bad or not all(torch.isfinite(weight).all() for weight in adaptor.parameters()):
        step = bad[0] if bad else len(losses) - 1
        found = f"the loss is {losses[step].item()}" if bad else "it leaves weights that are not finite"
        cause = "the learning rate is the likely cause: try a smaller --lr or --precision fp32"
        raise UserError(f"{method}, epoch {epoch}, step {step + 1}: {found}; {cause}")
