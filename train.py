"""Embeddings in, checkpoint out: checkpoints/<name>/<seed>/<method>.pt, with its log beside it.

python train.py --method asymvlm-psd
python train.py --dataset shapes --method all --seed 0 1 2 --recipe small
"""

import itertools
import logging
import sys
import time
from dataclasses import replace

import torch

from datasets.embedding import EmbeddingCache
from datasets.rows import BUFFER
from datasets.texts import LADDER, load_texts
from models import GROUPS, METHODS, expand_groups, recipes_for
from utils.checkpoint import checkpoint_path
from utils.cli import Parser, folder_name, non_negative, positive, run_script, seed_number, share
from utils.device import autocast, pick_device, pick_precision, precision_name
from utils.distributed import average_gradients, gather, joined, share_of_rank
from utils.evaluation.validation import HeldOut
from utils.optimizer import OPTIMIZERS, make_optimizer
from utils.run import Run, check_finite
from utils.seed import seed_everything

SMALL_CACHE = 100_000  # captions, under which --recipe small is the better choice
STARVES = "note: the paper's recipe is made for COCO and starves on %d captions; try --recipe small"


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    cache = EmbeddingCache(args.dataset, "train", mapped=True).to(device)  # one in many files stays on the disk
    ladder, held_out = load_texts(args.dataset, LADDER, cache.embed_dim, meta=cache.meta), None
    if args.validation:
        cache, held_out = cache.hold_out(args.validation)
        held_out = HeldOut(held_out, precision)
    config = {"dataset": args.dataset, "seed": None, "recipe": args.recipe, "precision": precision_name(precision)}
    config |= {"device": device.type, "captions": len(cache.text), "images": len(cache.image)}
    config |= {"clip": cache.clip_id.sums(), "cache": cache.digest}
    config |= {"shuffle_buffer": args.shuffle_buffer} if cache.mapped else {}  # --resume refuses another config
    config |= {"validation": args.validation, "keep": args.keep} if held_out else {}
    if args.recipe == "paper" and len(cache.text) < SMALL_CACHE:
        logging.warning(STARVES, len(cache.text))
    with joined(device):
        for seed, method in itertools.product(args.seed, args.method):
            path = checkpoint_path(args.dataset, seed, method)
            recipe = replace(METHODS[method].recipes[args.recipe], **args.changes)
            with Run(path, recipe, config | {"seed": seed}, args.resume, args.save_every) as run:
                train(run, cache, ladder, precision, args.shuffle_buffer, held_out)


def parse(argv):
    parser = Parser(description="Train adaptors on cached embeddings. What a flag does not say, the recipe does.")
    add = parser.add_argument
    add("--dataset", type=folder_name, default="coco", help="folder under embeddings/ (default: coco)")
    names, choices = f"{', '.join(METHODS)}, or {', '.join(GROUPS)}", [*METHODS, *GROUPS]
    add("--method", nargs="+", default=["asymvlm-psd"], choices=choices, metavar="METHOD", help=names)
    add("--seed", nargs="+", type=seed_number, default=[0])
    recipes = "paper (made for COCO), original (the methods' own authors'), small (under some 100,000 captions), demo"
    add("--recipe", default="paper", help=recipes)
    add("--epochs", type=positive)
    add("--batch-size", type=positive)
    add("--optimizer", choices=sorted(OPTIMIZERS))
    add("--lr", type=non_negative)
    add("--weight-decay", type=non_negative)
    add("--shuffle-buffer", type=positive, default=BUFFER, help="captions shuffled together in a cache of many files")
    add("--validation", type=share, default=0, metavar="SHARE", help="of the images that is held out, as 0.1")
    add("--keep", default="last", choices=("last", "best"), help="epoch; best: of the least held-out AURC")
    add("--save-every", type=positive, default=10, help="epochs between two saved states of the run (default: 10)")
    add("--resume", action="store_true", help="go on where a run was saved; the result is that of an unbroken run")
    add("--device", default="auto")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="of the matrix products")
    args = parser.parse_args(argv)
    args.method, args.seed = expand_groups(args.method, args.recipe), list(dict.fromkeys(args.seed))
    changes = {key: getattr(args, key) for key in ("epochs", "batch_size", "optimizer", "lr", "weight_decay")}
    args.changes = {key: value for key, value in changes.items() if value is not None}
    if args.keep == "best" and not args.validation:
        parser.error("--keep best: needs held-out images to judge by; add --validation 0.1")
    for method in args.method:
        if args.recipe not in METHODS[method].recipes:
            parser.error(f"--recipe {args.recipe}: {method} has {', '.join(recipes_for(method))}")
    return args


def train(run, cache, ladder, precision, shuffle_buffer, held_out=None):
    """Train one adaptor as its run says, from its seed on, or from where the run was saved.

    Args:
        ladder: prompts as `load_texts` returns them, or None; their uncertainties go into the log.
        held_out: HeldOut, which is measured after every epoch, or None.
    """
    seed_everything(run.config["seed"])
    adaptor = METHODS[run.method](cache.embed_dim).to(cache.device)
    adaptor.start_at(run.recipe.start_variance)
    steps = run.recipe.steps(len(cache.text))  # an epoch
    optimizer, schedule = make_optimizer(adaptor, run.recipe, steps * run.recipe.epochs)
    shuffling = torch.Generator().manual_seed(run.config["seed"])
    run.restore(adaptor, optimizer, schedule, shuffling)
    recipe = run.recipe
    for epoch, bar in run.epochs():
        start, losses = time.perf_counter(), []
        adaptor.train()
        batches = itertools.islice(cache.batches(recipe.batch_size, shuffling, shuffle_buffer), steps)
        for number, rows in enumerate(batches):
            # Every rank draws the same rows and encodes its share; the loss is that of all rows (utils/distributed.py).
            pairs = cache.pairs(share_of_rank(rows))
            weight = number / steps if epoch == recipe.ramped_epoch else 1.0
            losses.append(step(adaptor, pairs, len(rows), optimizer, schedule, precision, weight, recipe.clip_norm))
            bar.update(len(rows))
        losses = torch.stack(losses)
        check_finite(losses, adaptor.eval(), run.method, epoch)
        record = {"epoch": epoch, "loss": losses.mean().item(), "lr": optimizer.param_groups[0]["lr"]}
        record |= {"seconds": time.perf_counter() - start}
        record |= {name: value.item() for name, value in adaptor.named_parameters() if value.numel() == 1}  # scalars
        record |= {"validation": held_out.measure(adaptor, recipe.batch_size)} if held_out else {}
        uncertainty = adaptor.adapt_text(ladder[1].to(cache.device))[1] if ladder else None  # nor have all texts one
        run.record(record | {"ladder": None if uncertainty is None else uncertainty.tolist()})
    if held_out and run.log:
        held_out.compare(run.kept(), run.path)


def step(adaptor, pairs, total, optimizer, schedule, precision, weight=1.0, clip_norm=None):
    """One optimiser step on B pairs.

    Args:
        pairs: this rank's share of them, (b, D) and (b, D).
        total: B.
        weight: of the loss.
        clip_norm: what the gradient's norm is cut to; None: not cut.
    Returns: the loss, (), still on the device: nothing here waits for it.
    """
    with autocast(pairs[0].device, precision):
        loss = adaptor.loss(*gather(adaptor.encode(*pairs), total))
    optimizer.zero_grad()
    (weight * loss).backward()
    average_gradients(adaptor.parameters())
    if clip_norm:
        torch.nn.utils.clip_grad_norm_(adaptor.parameters(), clip_norm)
    optimizer.step()
    schedule.step()
    return loss.detach()


if __name__ == "__main__":
    sys.exit(run_script(main))
