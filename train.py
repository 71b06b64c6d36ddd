"""Embeddings in, checkpoint out: checkpoints/<name>/<seed>/<method>.pt, with its log beside it; while a run is unfinished, <method>.resume.pt.

python train.py --method asymvlm-psd
python train.py --dataset shapes --method all --seed 0 1 2 --recipe small
"""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import torch
from tqdm import tqdm

from datasets.embedding import EmbeddingCache
from datasets.rows import BUFFER
from datasets.texts import LADDER, load_texts
from models import METHODS
from utils.checkpoint import checkpoint_path, describe, describe_progress, load_run, restore_progress, save_adaptor
from utils.cli import Parser, UserError, folder_name, non_negative, positive, run, seed_number
from utils.device import lowered, pick_device, pick_precision, precision_name
from utils.distributed import average_gradients, gather, is_first, joined, own, wait
from utils.files import locked, save_tensors
from utils.seed import seed_everything

OPTIMIZERS = {
    "sgd": lambda parameters, recipe: torch.optim.SGD(
        parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
    ),
    "adamw": lambda parameters, recipe: torch.optim.AdamW(
        parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True
    ),
}

SMALL_CACHE = 100_000  # captions, under which --recipe small is the better choice


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    cache = EmbeddingCache(args.dataset, "train", mapped=True).to(device)
    ladder = load_texts(args.dataset, LADDER, cache.embed_dim, meta=cache.meta)
    with joined(device):
        if args.recipe == "paper" and len(cache.text) < SMALL_CACHE and is_first():
            logging.warning(
                "note: the paper's recipe is made for COCO and starves on %d captions; try --recipe small",
                len(cache.text),
            )
        for seed in args.seed:
            for method in args.method:
                train(method, seed, args, cache, ladder, device, precision)


def parse(argv):
    parser = Parser(description="Train adaptors on cached embeddings. What a flag does not say, the recipe does.")
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
    parser.add_argument(
        "--recipe", default="paper", help="paper (made for COCO) or small (caches under some 100,000 captions)"
    )
    parser.add_argument("--epochs", type=positive)
    parser.add_argument("--batch-size", type=positive)
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS))
    parser.add_argument("--lr", type=non_negative)
    parser.add_argument("--weight-decay", type=non_negative)
    parser.add_argument(
        "--shuffle-buffer",
        type=positive,
        default=BUFFER,
        help="captions shuffled together where a cache lies in many files",
    )
    parser.add_argument(
        "--save-every", type=positive, default=10, help="epochs after which the state of the run is saved (default: 10)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on where an interrupted run was saved; the result is that of an unbroken run",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="of the matrix products"
    )
    args = parser.parse_args(argv)
    args.method = list(METHODS) if "all" in args.method else list(dict.fromkeys(args.method))
    for method in args.method:
        if args.recipe not in METHODS[method].recipes:
            parser.error(f"--recipe {args.recipe}: {method} has {', '.join(METHODS[method].recipes)}")
    return args


def train(method, seed, args, cache, ladder, device, precision):
    """Train one adaptor and save it; with --resume, go on where an interrupted run was saved."""
    seed_everything(seed)
    adaptor = METHODS[method](cache.embed_dim).to(device)
    flags = {key: getattr(args, key) for key in ("epochs", "batch_size", "optimizer", "lr", "weight_decay")}
    recipe = replace(adaptor.recipes[args.recipe], **{key: value for key, value in flags.items() if value is not None})
    config = {
        "dataset": args.dataset,
        "seed": seed,
        "recipe": args.recipe,
        "precision": precision_name(precision),
        "device": device.type,
    }
    config |= {
        "captions": len(cache.text),
        "images": len(cache.image),
        "clip": {key: cache.meta.get(key) for key in ("model", "pretrained")},
    }
    config |= {"cache": cache.digest} | ({"shuffle_buffer": args.shuffle_buffer} if cache.mapped else {})
    path = checkpoint_path(args.dataset, seed, method)
    state_path = path.with_suffix(".resume.pt")
    lock = locked(path.with_name(f".{method}.lock"), path) if is_first() else contextlib.nullcontext()
    with lock, saved_when_stopped(state_path) as stopped:
        state = load_run(state_path, recipe, config) if args.resume else None
        if args.resume and state is None and load_run(path, recipe, config):
            logging.info("%s: finished already; without --resume it is trained anew", path)
            return
        wait()  # from here on the first rank changes these files
        steps = -(-len(cache.text) // recipe.batch_size)  # an epoch; the last batch may be smaller
        optimizer, schedule = make_optimizer(adaptor, recipe, steps * recipe.epochs)
        order = torch.Generator().manual_seed(seed)
        log = restore_progress(state, state_path, adaptor, optimizer, schedule, order) if state else []
        with (
            open(path.with_suffix(".jsonl") if is_first() else os.devnull, "w", encoding="utf-8") as file,
            tqdm(
                total=recipe.epochs * len(cache.text),
                desc=f"{method}, seed {seed}",
                unit="pair",
                unit_scale=True,
                disable=not is_first(),
            ) as bar,
        ):
            bar.update(len(log) * len(cache.text))
            file.writelines(json.dumps(record) + "\n" for record in log)
            for epoch in range(len(log) + 1, recipe.epochs + 1):
                start = time.perf_counter()
                batches = cache.batches(recipe.batch_size, order, args.shuffle_buffer)
                losses = [
                    step(adaptor, cache.pairs(own(rows)), len(rows), optimizer, schedule, precision, bar)
                    for rows in batches
                ]
                losses = torch.stack(losses)
                check_finite(losses, adaptor, method, epoch)
                log.append(describe_epoch(adaptor, epoch, losses, optimizer, ladder, time.perf_counter() - start))
                file.write(json.dumps(log[-1]) + "\n")
                file.flush()
                stopped.state = describe(adaptor, method, recipe, config) | describe_progress(
                    optimizer, schedule, order, log
                )
                if epoch % args.save_every == 0 and is_first():
                    save_tensors(stopped.state, state_path)
                bar.set_postfix(epoch=f"{epoch}/{recipe.epochs}", loss=f"{log[-1]['loss']:.4f}")
        if is_first():
            save_adaptor(adaptor, method, recipe, config, path)
            state_path.unlink(missing_ok=True)
    logging.info("%s: %s", path, json.dumps(asdict(recipe)))


def describe_epoch(adaptor, epoch, losses, optimizer, ladder, seconds):
    """What the log says of an epoch. Returns: dict of plain types."""
    record = {"epoch": epoch, "loss": losses.mean().item(), "lr": optimizer.param_groups[0]["lr"], "seconds": seconds}
    record |= {name: value.item() for name, value in adaptor.named_parameters() if value.numel() == 1}
    return record | {"ladder": ladder_uncertainty(adaptor, ladder, losses.device)}


@contextlib.contextmanager
def saved_when_stopped(path):
    """Save the state of the last good epoch when the block is stopped: by Ctrl-C, by SIGTERM, as torchrun and Slurm send it, by a loss that is not
    finite or by another rank's end.

    Yields: an object whose attribute `state` the block sets after every good epoch.
    """
    kept = SimpleNamespace(state=None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield kept
    except (KeyboardInterrupt, UserError) as stop:
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)  # torchrun may send both
        if kept.state is not None and is_first():
            save_tensors(kept.state, path)
        if not isinstance(stop, KeyboardInterrupt):
            raise
        done = (
            f"no epoch is done since; {path} is as it was"
            if kept.state is None
            else f"saved after epoch {len(kept.state['log'])}"
        )
        raise KeyboardInterrupt(f"{done}; the same command with --resume goes on from there") from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def make_optimizer(adaptor, recipe, steps):
    """The optimiser of a recipe, and the cosine from lr to min_lr over so many steps."""
    optimizer = OPTIMIZERS[recipe.optimizer](adaptor.parameters(), recipe)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, recipe.min_lr)


def step(adaptor, pairs, rows, optimizer, schedule, precision, bar):
    """One optimiser step on B pairs.

    Args: pairs: this rank's share of them. rows: B, of all ranks together. Returns: the loss, (), still on the device: nothing here waits for it.
    """
    with lowered(pairs[0].device, precision):
        loss = adaptor.loss(*gather(adaptor.encode(*pairs), rows))
    optimizer.zero_grad()
    loss.backward()
    average_gradients(adaptor.parameters())
    optimizer.step()
    schedule.step()
    bar.update(rows)
    return loss.detach()


def check_finite(losses, adaptor, method, epoch):
    """Raise a UserError that names the first step of the epoch whose loss is not finite, or the last if it left weights that are not."""
    bad = (~torch.isfinite(losses)).nonzero()
    cause = "the learning rate is the likely cause: try a smaller --lr or --precision fp32"
    if len(bad):
        raise UserError(
            f"{method}, epoch {epoch}, step {int(bad[0]) + 1}: the loss is {losses[bad[0]].item()}; {cause}"
        )
    if not all(torch.isfinite(value).all() for value in adaptor.parameters()):
        raise UserError(f"{method}, epoch {epoch}, step {len(losses)}: it leaves weights that are not finite; {cause}")


@torch.no_grad()
def ladder_uncertainty(adaptor, ladder, device):
    """The uncertainty of every prompt of the ladder, in its order; None where the cache has no ladder."""
    return None if ladder is None else adaptor.adapt_text(ladder[1].to(device))[1].tolist()


if __name__ == "__main__":
    sys.exit(run(main))
