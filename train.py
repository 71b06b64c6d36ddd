"""Train adaptors on cached embeddings; write checkpoints/<name>/<seed>/<method>.pt and a log.

python train.py --method asymvlm-psd
python train.py --dataset shapes --method all --seed 0 1 2 --recipe small
"""

import itertools
import logging
import sys
import time
from dataclasses import replace

import torch

from datasets.embedding import NORMALISED, SMALL_CACHE, EmbeddingCache
from datasets.rows import BUFFER
from datasets.texts import LADDER, load_texts
from models import (
    GROUPS,
    METHODS,
    expand_groups,
    former_recipe,
    recipes_for,
    tagged,
    untagged,
)
from models.base import total_loss
from utils.checkpoint import check_replaceable, checkpoint_path
from utils.cli import (
    Parser,
    folder_name,
    non_negative,
    positive,
    run_script,
    seed_number,
    share,
    tag_name,
    torchrun_rank,
)
from utils.cuda_graph import GraphedGradients
from utils.device import autocast, pick_device, pick_precision, precision_name
from utils.distributed import average_gradients, gather, joined, share_of_rank, world_size
from utils.optimizer import OPTIMIZERS, make_optimizer
from utils.run import Run, check_finite
from utils.seed import seed_everything
from utils.trained import RECIPE_FLAGS


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    cache = EmbeddingCache(args.dataset, "train", mapped=True).to(device)
    ladder = load_texts(args.dataset, LADDER, cache.embed_dim, meta=cache.meta)
    prompts = None
    if ladder is not None:
        _, embeddings, _ = ladder
        prompts = embeddings.to(device)
    held_out = None
    if args.validation:
        from utils.evaluation.validation import HeldOut  # needs metrics, which training does not

        cache, held_out_cache = cache.hold_out(args.validation)
        held_out = HeldOut(held_out_cache, precision)
    if args.recipe == "paper" and len(cache.text) < SMALL_CACHE:
        logging.warning(
            "note: the paper's recipe is made for COCO and takes too few steps on %d captions; "
            "try --recipe small",
            len(cache.text),
        )

    if cache.is_normalised():
        logging.warning(NORMALISED, cache.folder)

    runs = planned_runs(args, cache, precision)
    if not args.resume and not args.overwrite:
        for run in runs:
            check_replaceable(run.path, run.recipe, run.config)
    if len(runs) > 1:
        logging.info("%s", plan_of(runs, len(cache.text)))
    with joined(device):
        for run in runs:
            with run:
                train(
                    run,
                    cache,
                    prompts,
                    precision,
                    args.shuffle_buffer,
                    held_out,
                    use_graph=not args.no_cuda_graph,
                )


def planned_runs(args, cache, precision):
    """The Runs of all seeds and methods, a list."""
    runs = []
    captions = len(cache.text)
    for seed in args.seed:
        config = run_config(args, seed, cache, precision)
        for method in args.method:
            path = checkpoint_path(args.dataset, seed, tagged(method, args.tag))
            recipe = settle(METHODS[method].recipes[args.recipe], args.changes, captions)
            # A run that an earlier version began is resumed with the recipe of that version.
            former = former_recipe(method, args.recipe)
            if former is not None:
                former = settle(former, args.changes, captions)
            runs.append(Run(path, recipe, config, args.resume, args.save_every, former))
    return runs


def plan_of(runs, captions):
    """One line on what several runs will do."""
    epochs = sum(run.recipe.epochs for run in runs)
    return (
        f"{len(runs)} runs with {epochs} epochs in all, over {captions} captions each; "
        "the bar shows how long a run will take"
    )


def settle(recipe, changes, captions):
    """The recipe of a run over this many captions, with the flags' changes {field: value}."""
    return replace(recipe, **changes).fitted_to(captions, fixed=changes)


def run_config(args, seed, cache, precision):
    """The data and settings that a result depends on, apart from the recipe's values.

    It is saved with the checkpoint; --resume refuses a saved run with another one.
    """
    config = {
        "dataset": args.dataset,
        "seed": seed,
        "recipe": args.recipe,
        "precision": precision_name(precision),
        "device": cache.device.type,
        "captions": len(cache.text),
        "images": len(cache.image),
        "clip": cache.clip_id.identity(),
        "cache": cache.digest,
    }
    if cache.mapped:
        config["shuffle_buffer"] = args.shuffle_buffer
    if args.validation:
        config["validation"] = args.validation
        config["keep"] = args.keep
    return config


def make_parser():
    parser = Parser(
        description="Train adaptors on cached embeddings. The recipe decides what no flag sets."
    )
    add = parser.add_argument
    add(
        "--dataset",
        type=folder_name,
        default="coco",
        help="the cache to train on, a folder under embeddings/ (default: coco)",
    )
    add(
        "--method",
        nargs="+",
        default=["asymvlm-psd"],
        choices=[*METHODS, *GROUPS],
        metavar="METHOD",
        help=f"one or more of {', '.join(METHODS)}, or of the groups {', '.join(GROUPS)}",
    )
    add("--seed", nargs="+", type=seed_number, default=[0], help="one run per seed (default: 0)")
    add(
        "--tag",
        type=tag_name,
        help="a name for a second run of a method beside the first: NAME makes METHOD@NAME",
    )
    add(
        "--recipe",
        default="paper",
        help="paper (made for COCO), original (by the authors of the baseline), small (for fewer "
        "than about 100,000 captions) or demo (small, with fewer epochs); default: paper",
    )
    add("--epochs", type=positive, help="the number of passes over the captions")
    add("--batch-size", type=positive, help="the number of pairs per step")
    add("--optimizer", choices=sorted(OPTIMIZERS))
    add("--lr", type=non_negative, help="the learning rate")
    add("--weight-decay", type=non_negative)
    add(
        "--shuffle-buffer",
        type=positive,
        default=BUFFER,
        help=f"how many captions of a sharded cache are shuffled together (default: {BUFFER})",
    )
    add(
        "--validation",
        type=share,
        default=0,
        metavar="SHARE",
        help="hold out this share of the images, such as 0.1, and evaluate every epoch on them",
    )
    add(
        "--keep",
        default="last",
        choices=("last", "best"),
        help="keep the weights of the last epoch (or their average, if the recipe averages), or of "
        "the epoch with the lowest held-out AURC",
    )
    add(
        "--save-every",
        type=positive,
        default=10,
        help="save the training state every so many epochs, or sooner if five minutes have "
        "passed (default: 10)",
    )
    add(
        "--resume",
        action="store_true",
        help="continue from the saved state; the result equals that of an unbroken run",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace finished checkpoints that were trained with other settings",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 and so on (default: auto)")
    add(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="the precision of matrix products (default: auto)",
    )
    add(
        "--no-cuda-graph",
        action="store_true",
        help="launch the kernels of every step one by one: slower, with the same result",
    )
    return parser


def parse(argv):
    parser = make_parser()
    args = parser.parse_args(argv)
    args.method = expand_groups(args.method, args.recipe)  # pfe may become pfe-original
    args.seed = list(dict.fromkeys(args.seed))  # each seed once
    flags = vars(args)
    args.changes = {name: flags[name] for name in RECIPE_FLAGS if flags[name] is not None}

    if args.precision == "fp16":
        parser.error("--precision fp16: training would need loss scaling; choose bf16 or fp32")
    if args.keep == "best" and not args.validation:
        parser.error("--keep best: needs held-out images to choose an epoch; add --validation 0.1")
    _, ranks = torchrun_rank()
    for method in args.method:
        if args.recipe not in METHODS[method].recipes:
            recipes = ", ".join(recipes_for(method))
            parser.error(f"--recipe {args.recipe}: the recipes of {method} are {recipes}")
        if ranks > 1 and METHODS[method].single_process_only:
            parser.error(
                f"--method {method}: trains in a single process only; start it without torchrun"
            )
    return args


def train(run, cache, prompts, precision, shuffle_buffer, held_out=None, use_graph=True):
    """Train one adaptor from its seed, or from where the run was saved.

    Args:
        run: Run, inside its with block.
        cache: EmbeddingCache of the train split.
        prompts: embeddings (T, D) of the prompt ladder, whose uncertainties are logged, or None.
        precision: dtype of matrix products.
        shuffle_buffer: number of captions of a sharded cache that are shuffled together.
        held_out: HeldOut, measured after every epoch, or None.
        use_graph: compute gradients by a CUDA graph where that is possible.
    """
    recipe = run.recipe
    seed = run.config["seed"]
    seed_everything(seed)
    adaptor = METHODS[untagged(run.method)](cache.embed_dim).to(cache.device)
    adaptor.start_at(recipe.start_variance)
    steps = recipe.steps(len(cache.text))  # per epoch
    optimizer, schedule = make_optimizer(adaptor, recipe, steps * recipe.epochs)
    shuffling = torch.Generator().manual_seed(seed)
    run.restore(adaptor, optimizer, schedule, shuffling)
    graph = graph_of(adaptor, recipe.batch_size, precision, use_graph)

    for epoch, bar in run.epochs():
        start = time.perf_counter()
        losses = []
        terms = []
        adaptor.train()
        batches = cache.batches(recipe.batch_size, shuffling, shuffle_buffer)
        for number, rows in enumerate(itertools.islice(batches, steps)):
            # Every rank draws the same rows and encodes a share of them. The loss is that of all
            # rows (see utils/distributed.py).
            pairs = cache.pairs(share_of_rank(rows))
            weight = (number + 1) / steps if epoch == recipe.ramped_epoch else 1.0
            # The graph was made for a full batch and the weight 1.
            fits_graph = len(rows) == recipe.batch_size and weight == 1.0
            loss, loss_terms = step(
                adaptor,
                pairs,
                len(rows),
                optimizer,
                schedule,
                precision,
                weight,
                recipe.clip_norm,
                graph if fits_graph else None,
            )
            losses.append(loss)
            terms.append(loss_terms)
            bar.update(len(rows))

        losses = torch.stack(losses)
        adaptor.eval()  # for the measurements below
        check_finite(losses, adaptor, run.method, epoch)
        record = {
            "epoch": epoch,
            "loss": losses.mean().item(),
            "lr": optimizer.param_groups[0]["lr"],
            "seconds": time.perf_counter() - start,
            **learned_scalars(adaptor),
        }
        if terms[0]:
            record["terms"] = mean_terms(terms)
        if held_out:
            record["validation"] = held_out.measure(adaptor, recipe.batch_size)
        record["ladder"] = None if prompts is None else uncertainty_of(adaptor, prompts)
        run.record(record)

    if held_out and run.log:  # The log is empty if the run was finished before.
        held_out.warn_if_poor(run.kept_record(), run.path)


def step(
    adaptor,
    pairs,
    batch_size,
    optimizer,
    schedule,
    precision,
    weight=1.0,
    clip_norm=None,
    graph=None,
):
    """One optimizer step on a batch of B pairs.

    Args:
        pairs: this rank's share of the batch, image and text embeddings (b, D).
        batch_size: B.
        precision: dtype of matrix products.
        weight: factor of the gradient; the loss that is returned is without it.
        clip_norm: largest norm of the gradient; None: no limit.
        graph: what `graph_of` returned, to be used for this batch; None: no graph.
    Returns: the loss () and its terms {name: ()}, empty if the method names none. They are detached
        and still on the device, so that nothing here waits for it.
    """
    if graph is None:
        optimizer.zero_grad()
        loss, terms = backward(adaptor, pairs, batch_size, precision, weight)
    else:
        loss, terms = graph(pairs)
    average_gradients(adaptor.parameters())
    if clip_norm:
        torch.nn.utils.clip_grad_norm_(adaptor.parameters(), clip_norm)
    optimizer.step()
    schedule.step()
    return loss, terms


def backward(adaptor, pairs, batch_size, precision, weight=1.0):
    """Add a batch's gradients to those of the parameters. Args, Returns: as for `step`."""
    with autocast(pairs[0].device, precision):
        terms = adaptor.loss(*gather(adaptor.encode(*pairs), batch_size))
        loss = total_loss(terms)
    (weight * loss).backward()
    named_terms = terms if isinstance(terms, dict) else {}
    return loss.detach(), {name: term.detach() for name, term in named_terms.items()}


def graph_of(adaptor, batch_size, precision, is_wanted):
    """`backward` as a CUDA graph, for batches of this size; None if not wanted or not possible."""
    device = next(adaptor.parameters()).device
    is_possible = device.type == "cuda" and world_size() == 1 and adaptor.has_fixed_kernels
    if not (is_wanted and is_possible):
        return None

    def backward_of_batch(pairs):
        return backward(adaptor, pairs, batch_size, precision)

    return GraphedGradients(backward_of_batch, adaptor.parameters())


def mean_terms(steps):
    """The means {name: float} of the loss terms of an epoch, a list of {name: tensor ()}."""
    means = {}
    for name in steps[0]:
        values = torch.stack([terms[name] for terms in steps])
        means[name] = values.mean().item()
    return means


def learned_scalars(adaptor):
    """{name: value} of the parameters that are single numbers, such as a temperature."""
    return {name: value.item() for name, value in adaptor.named_parameters() if value.numel() == 1}


@torch.no_grad()
def uncertainty_of(adaptor, texts):
    """The uncertainties of text embeddings (T, D), a list; None if the method gives texts none."""
    _, uncertainty = adaptor.adapt_text(texts)
    return None if uncertainty is None else uncertainty.tolist()


if __name__ == "__main__":
    sys.exit(run_script(main))
