"""The optimiser and the learning-rate schedule of a recipe."""

import math

import torch

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def make_optimizer(adaptor, recipe, steps):
    """Make the optimiser of an adaptor's parameters and its learning-rate schedule.

    Args:
        steps: the number of steps of the whole run.
    Returns: optimiser, schedule.
    """
    decayed = []
    not_decayed = []
    for parameter in adaptor.parameters():
        if parameter.ndim >= recipe.decayed_from:
            decayed.append(parameter)
        else:
            not_decayed.append(parameter)
    groups = [{"params": decayed}]
    if not_decayed:
        groups.append({"params": not_decayed, "weight_decay": 0.0})

    options = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "sgd":
        options["momentum"] = recipe.momentum
    else:
        options["betas"] = recipe.betas
        options["eps"] = recipe.eps
    optimizer = OPTIMIZERS[recipe.optimizer](groups, **options)

    if recipe.drops is None and recipe.warm_up == 0:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, recipe.min_lr)
        return optimizer, schedule

    def factor(step):
        return _lr_factor(recipe, step / steps)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _lr_factor(recipe, progress):
    """What the learning rate is multiplied by after this fraction of the steps."""
    if progress < recipe.warm_up:
        return progress / recipe.warm_up
    if recipe.drops is not None:
        drops_so_far = sum(progress >= drop for drop in recipe.drops)
        return 0.1**drops_so_far
    progress_after_warm_up = (progress - recipe.warm_up) / (1 - recipe.warm_up)
    cosine = (1 + math.cos(math.pi * progress_after_warm_up)) / 2
    smallest = recipe.min_lr / recipe.lr if recipe.lr > 0 else 0.0
    return smallest + (1 - smallest) * cosine
