"""What a recipe says of optimiser, learning rate, loss and weights, against its words done by hand."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train as train_script
from datasets.embedding import EmbeddingCache
from datasets.rows import BUFFER
from models import METHODS
from models.base import Recipe
from tests.conftest import make_cache
from utils.checkpoint import load_adaptor
from utils.optimizer import make_optimizer
from utils.run import Run

RECIPE = Recipe("adamw", lr=2e-3, weight_decay=0.05, batch_size=50, epochs=5)


def rates(recipe, steps):
    """The learning rate of every step."""
    weight = torch.nn.Linear(1, 1)
    optimizer, schedule = make_optimizer(weight, recipe, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_learning_rate_falls_on_a_cosine():
    expected = [
        1e-6 + (2e-3 - 1e-6) * (1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)
    ]
    assert rates(RECIPE, 40) == pytest.approx(expected, rel=1e-9)


def test_the_learning_rate_rises_on_a_line_before_the_cosine():
    warm = rates(replace(RECIPE, warm_up=0.25), 40)
    assert warm[:10] == pytest.approx([2e-3 * step / 10 for step in range(10)], rel=1e-9)
    expected = [
        1e-6 + (2e-3 - 1e-6) * (1 + math.cos(math.pi * step / 30)) / 2 for step in range(30)
    ]
    assert warm[10:] == pytest.approx(expected, rel=1e-9)


def test_the_learning_rate_drops_to_a_tenth_or_stays():
    assert rates(replace(RECIPE, drops=()), 6) == [2e-3] * 6
    dropped = rates(replace(RECIPE, drops=(0.5, 2 / 3)), 6)
    assert dropped == pytest.approx([2e-3] * 3 + [2e-4] + [2e-5] * 2)


@pytest.mark.parametrize(("decayed_from", "decayed"), [(0, {0, 1, 2}), (1, {1, 2}), (2, {2})])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_weight_decay_is_on_parameters_of_so_many_dimensions(optimizer, decayed_from, decayed):
    adaptor = METHODS["pcmepp"](8)  # it has learnt scalars
    recipe = replace(RECIPE, optimizer=optimizer, decayed_from=decayed_from)
    groups = make_optimizer(adaptor, recipe, 10)[0].param_groups
    found = {
        parameter.ndim for group in groups if group["weight_decay"] for parameter in group["params"]
    }
    assert found == decayed
    assert sum(len(group["params"]) for group in groups) == len(list(adaptor.parameters()))


def test_betas_are_adams():
    assert make_optimizer(METHODS["pfe"](8), replace(RECIPE, betas=(0.9, 0.95)), 9)[0].defaults[
        "betas"
    ] == (0.9, 0.95)


def test_a_gradient_is_cut_to_its_norm():
    z = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))
    moved = {}
    for clip_norm in (None, 0.5, 1e9):
        torch.manual_seed(0)
        adaptor = METHODS["asymvlm-psd"](8)
        before = copy.deepcopy(list(adaptor.parameters()))
        optimizer, schedule = make_optimizer(
            adaptor, Recipe("sgd", lr=1.0, weight_decay=0, momentum=0), 9
        )
        train_script.step(adaptor, z, 20, optimizer, schedule, torch.float32, 1.0, clip_norm)
        steps = [
            (after - start).flatten()
            for start, after in zip(before, adaptor.parameters(), strict=True)
        ]
        moved[clip_norm] = torch.cat(steps)
    assert torch.equal(moved[None], moved[1e9])
    assert moved[None].norm() > 0.5
    torch.testing.assert_close(
        moved[0.5], moved[None] * (0.5 / moved[None].norm()), rtol=1e-3, atol=1e-7
    )


def run(recipe, method="asymvlm-psd", **options):
    """Train on the small cache, with the weights at the end of every epoch: adaptor, [state_dict]."""
    make_cache("tiny")
    cache, path = EmbeddingCache("tiny", "train"), Path("run", f"{method}.pt")
    config = {"seed": 0, "captions": len(cache.text)}
    weights = []
    with Run(path, recipe, config, **options) as this:
        record = this.record
        this.record = lambda what: (
            record(what),
            weights.append(copy.deepcopy(this.adaptor.state_dict())),
        )
        train_script.train(this, cache, None, torch.float32, BUFFER)
    return load_adaptor(path), weights


def test_the_weights_of_later_epochs_are_averaged_resumed_or_not(workdir):
    recipe = replace(RECIPE, averaged_after=0.4)  # of 5 epochs the last three
    plain, ends = run(RECIPE)
    averaged, same_ends = run(recipe)
    for name, weight in averaged.state_dict().items():
        assert torch.equal(
            ends[-1][name], same_ends[-1][name]
        )  # training itself goes on without it
        assert torch.equal(plain.state_dict()[name], ends[-1][name])
        expected = torch.stack([epoch[name] for epoch in ends[2:]]).mean(dim=0)
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)
    Path("run/asymvlm-psd.pt").unlink()

    check, epochs = train_script.check_finite, []

    def die_in_the_fifth(*arguments):
        epochs.append(arguments)
        if len(epochs) == 5:
            raise SystemExit

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train_script, "check_finite", die_in_the_fifth)
        run(recipe, save_every=2)
    assert train_script.check_finite is check
    resumed, ends = run(recipe, save_every=2, resume=True)
    assert len(ends) == 1  # it went on after the fourth
    for name, weight in averaged.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])


def test_the_weight_of_the_loss_rises_to_1_in_its_epoch(workdir, monkeypatch):
    weights, step = [], train_script.step
    monkeypatch.setattr(train_script, "step", lambda *a: (weights.append(a[6]), step(*a))[1])
    run(replace(RECIPE, ramped_epoch=3))  # 120 captions: three steps an epoch
    assert weights == pytest.approx([1.0] * 6 + [1 / 3, 2 / 3, 1.0] + [1.0] * 6)


def test_a_learning_rate_of_0_changes_nothing(workdir):
    adaptor, _ = run(replace(RECIPE, lr=0.0, warm_up=0.1, weight_decay=0.0))
    start, _ = run(replace(RECIPE, lr=0.0, warm_up=0.1, weight_decay=0.0, epochs=1))
    for name, weight in start.state_dict().items():
        assert torch.equal(weight, adaptor.state_dict()[name])


def test_an_epoch_has_no_more_steps_than_its_recipe_allows(workdir, monkeypatch):
    sizes, step = [], train_script.step
    monkeypatch.setattr(train_script, "step", lambda *a: (sizes.append(a[2]), step(*a))[1])
    run(replace(RECIPE, max_steps=2, epochs=2))
    assert sizes == [50, 50] * 2
    assert [RECIPE.steps(captions) for captions in (1, 50, 51)] == [1, 1, 2]
