"""A recipe in, the optimiser and the learning rate of every step out."""

import math

import torch

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def make_optimizer(adaptor, recipe, steps):
    """The optimiser of an adaptor's parameters and the schedule of its learning rate, as a recipe has them.

    Args: steps: of the whole run.
    """
    options = {"momentum": recipe.momentum} if recipe.optimizer == "sgd" else {"betas": recipe.betas}
    options |= {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "fused": True}
    decayed = [parameter for parameter in adaptor.parameters() if parameter.ndim >= recipe.decayed_from]
    others = [parameter for parameter in adaptor.parameters() if parameter.ndim < recipe.decayed_from]
    groups = [{"params": decayed}, *([{"params": others, "weight_decay": 0.0}] if others else [])]
    optimizer = OPTIMIZERS[recipe.optimizer](groups, **options)
    if recipe.drops is None and not recipe.warm_up:
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, recipe.min_lr)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_lr(recipe, step / steps))


def _share_of_lr(recipe, done):
    """What lr is multiplied by when so large a share of the steps is done."""
    if done < recipe.warm_up:
        return done / recipe.warm_up
    if recipe.drops is not None:
        return 0.1 ** sum(done >= drop for drop in recipe.drops)
    least, done = recipe.min_lr / recipe.lr, (done - recipe.warm_up) / (1 - recipe.warm_up)
    return least + (1 - least) * (1 + math.cos(math.pi * done)) / 2
