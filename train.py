"""Embeddings in, checkpoint out: checkpoints/<name>/<seed>/<method>.pt, with its log beside it.

python train.py --method asymvlm-psd
python train.py --dataset shapes --method all --seed 0 1 2 --recipe small
"""

import json
import logging
import sys
import time
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

from datasets.embedding import LADDER, EmbeddingCache, load_texts
from models import METHODS
from utils.checkpoint import checkpoint_path, save_adaptor
from utils.cli import Parser, UserError, non_negative, positive, run
from utils.device import lowered, pick_device, pick_precision, precision_name
from utils.seed import seed_everything

OPTIMIZERS = {
    "sgd": lambda parameters, recipe: torch.optim.SGD(parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True),
    "adamw": lambda parameters, recipe: torch.optim.AdamW(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True),
}

SMALL_CACHE = 100_000  # captions, under which --recipe small is the better choice


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    cache = EmbeddingCache(args.dataset, "train").to(device)
    ladder = load_texts(args.dataset, LADDER, cache.embed_dim)
    if args.recipe == "paper" and len(cache.text) < SMALL_CACHE:
        logging.warning("note: the paper's recipe is made for COCO and starves on %d captions; try --recipe small", len(cache.text))
    for seed in args.seed:
        for method in args.method:
            train(method, seed, args, cache, ladder, device, precision)


def parse(argv):
    parser = Parser(description="Train adaptors on cached embeddings. What a flag does not say, the recipe does.")
    parser.add_argument("--dataset", default="coco", help="folder under embeddings/ (default: coco)")
    names = ", ".join(METHODS)
    parser.add_argument("--method", nargs="+", default=["asymvlm-psd"], choices=[*METHODS, "all"], metavar="METHOD", help=f"{names}, or all")
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--recipe", default="paper", help="paper (made for COCO) or small (caches under some 100,000 captions)")
    parser.add_argument("--epochs", type=positive)
    parser.add_argument("--batch-size", type=positive)
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS))
    parser.add_argument("--lr", type=non_negative)
    parser.add_argument("--weight-decay", type=non_negative)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="of the matrix products")
    args = parser.parse_args(argv)
    args.method = list(METHODS) if "all" in args.method else list(dict.fromkeys(args.method))
    if min(args.seed) < 0:
        parser.error("--seed: give whole numbers of at least 0")
    for method in args.method:
        if args.recipe not in METHODS[method].recipes:
            parser.error(f"--recipe {args.recipe}: {method} has {', '.join(METHODS[method].recipes)}")
    return args


def train(method, seed, args, cache, ladder, device, precision):
    """Train one adaptor and save it."""
    seed_everything(seed)
    adaptor = METHODS[method](cache.embed_dim).to(device)
    flags = {key: getattr(args, key) for key in ("epochs", "batch_size", "optimizer", "lr", "weight_decay")}
    recipe = replace(adaptor.recipes[args.recipe], **{key: value for key, value in flags.items() if value is not None})
    steps = -(-len(cache.text) // recipe.batch_size)  # an epoch; the last batch may be smaller
    optimizer, schedule = make_optimizer(adaptor, recipe, steps * recipe.epochs)
    order = torch.Generator().manual_seed(seed)
    path = checkpoint_path(args.dataset, seed, method)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(path.with_suffix(".jsonl"), "w", encoding="utf-8") as log,
        tqdm(total=recipe.epochs * len(cache.text), desc=f"{method}, seed {seed}", unit="pair", unit_scale=True) as bar,
    ):
        for epoch in range(1, recipe.epochs + 1):
            start = time.perf_counter()
            captions = torch.randperm(len(cache.text), generator=order).to(device)
            losses = torch.stack(
                [step(adaptor, cache.pairs(batch), optimizer, schedule, precision, bar) for batch in captions.split(recipe.batch_size)]
            )
            check_finite(losses, method, epoch)
            record = {"epoch": epoch, "loss": losses.mean().item(), "lr": optimizer.param_groups[0]["lr"], "seconds": time.perf_counter() - start}
            record |= {name: value.item() for name, value in adaptor.named_parameters() if value.numel() == 1}
            record["ladder"] = ladder_uncertainty(adaptor, ladder, device)
            log.write(json.dumps(record) + "\n")
            log.flush()
            bar.set_postfix(epoch=f"{epoch}/{recipe.epochs}", loss=f"{record['loss']:.4f}")
    config = {"dataset": args.dataset, "seed": seed, "recipe": args.recipe, "precision": precision_name(precision), "device": device.type}
    config |= {"captions": len(cache.text), "images": len(cache.image), "clip": {key: cache.meta.get(key) for key in ("model", "pretrained")}}
    save_adaptor(adaptor, method, recipe, config, path)
    logging.info("%s: %s", path, json.dumps(asdict(recipe)))


def make_optimizer(adaptor, recipe, steps):
    """The optimiser of a recipe, and the cosine from lr to min_lr over so many steps."""
    optimizer = OPTIMIZERS[recipe.optimizer](adaptor.parameters(), recipe)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, recipe.min_lr)


def step(adaptor, pairs, optimizer, schedule, precision, bar):
    """One optimiser step on B pairs. Returns: the loss, (), still on the device: nothing here waits for it."""
    with lowered(pairs[0].device, precision):
        encoded = adaptor.encode(*pairs)
    loss = adaptor.loss(*encoded)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    bar.update(len(pairs[0]))
    return loss.detach()


def check_finite(losses, method, epoch):
    """Raise a UserError that names the first step of the epoch whose loss is not finite."""
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        where = f"{method}, epoch {epoch}, step {int(bad[0]) + 1}"
        raise UserError(
            f"{where}: the loss is {losses[bad[0]].item()}; the learning rate is the likely cause: try a smaller --lr or --precision fp32"
        )


@torch.no_grad()
def ladder_uncertainty(adaptor, ladder, device):
    """The uncertainty of every prompt of the ladder, in its order; None where the cache has no ladder."""
    return None if ladder is None else adaptor.adapt_text(ladder[1].to(device))[1].tolist()


if __name__ == "__main__":
    sys.exit(run(main))
