"""Training and evaluation on a device that is not the CPU, without one: tests/devices.py pretends to be it.

"cuda" stands for a GPU, "mps" for one without float64.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train as train_script
from datasets.embedding import EmbeddingCache
from models import GROUPS, METHODS, layers
from models.asymvlm import distributions, variants
from models.base import total_loss
from models.pfe.adaptor import PFEAdaptor
from models.probvlm.adaptor import BayesCap
from tests.conftest import make_cache, recipe_of, write_tiny_clip
from tests.devices import PretendedDevice, WrongDevice
from utils.checkpoint import load_adaptor
from utils.embed import CHUNK, embed_texts, in_chunks
from utils.evaluation import ranking
from utils.evaluation.scorers import (
    FROZEN,
    OWN,
    PUBLISHED,
    AdaptorRankedByFrozen,
    AdaptorScorer,
    FrozenScorer,
    answer,
)
from utils.evaluation.training_free import Reference, every_scorer
from utils.evaluation.validation import HeldOut
from utils.optimizer import make_optimizer
from utils.preprocess import load_clip
from utils.questions import zero_shot
from utils.questions.export import export
from utils.questions.prompts import describe_captions, describe_prompts
from utils.run import Run

D, B = 16, 8
IMAGES, CAPTIONS_PER_IMAGE = 8, 2
EVERY = pytest.mark.parametrize("method", METHODS)
DEVICES = pytest.mark.parametrize("name", ["cuda", "mps"])
# Every method whose texts are uncertain by its own score, and one by the other scores too.
QUESTIONS = [
    *((method, "mps", OWN) for method in METHODS if "-image" not in method),
    *(("asymvlm-psd", name, score) for name in ("cuda", "mps") for score in (PUBLISHED, FROZEN)),
]
# What a step waits for, and why: of the paper's six methods, nothing.
EXPECTED_WAITS = {
    # same_rows finds the captions of one image; it does not know how many images there are.
    "pcmepp-original": ["unique_dim at models/layers.py"],
    # Nor how many pairs of captions of one image there are, which nonzero lists.
    "pfe-original": ["unique_dim at models/layers.py", "nonzero at models/pfe/loss.py"],
}


@pytest.fixture(autouse=True)
def narrow_layers(monkeypatch):
    """Hidden layers of width 32, which take half the time."""
    monkeypatch.setattr(layers, "HIDDEN", 32)
    monkeypatch.setattr(variants, "HIDDEN", 32)
    monkeypatch.setattr(BayesCap, "hidden", 32)


@pytest.fixture(autouse=True)
def nothing_is_kept():
    """A test of a device leaves no tensors of it to the tests after it."""
    distributions._series.cache_clear()
    yield
    distributions._series.cache_clear()


@pytest.fixture
def cache_files(workdir, monkeypatch):
    """A cache ./embeddings/tiny of 8 images, which are ranked 5 at a time so that there are several tiles."""
    monkeypatch.setattr(ranking, "TILE", 5)
    captions = IMAGES * CAPTIONS_PER_IMAGE
    relevance = [sorted({row // 2, row * 3 % IMAGES}) for row in range(captions)]
    make_cache("tiny", IMAGES, CAPTIONS_PER_IMAGE, D, relevance=relevance)


def make(method, device):
    torch.manual_seed(0)
    return METHODS[method](D).to(device)


def embeddings(device, seed=0, rows=B):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, D, generator=generator).to(device)


def without_lines(waits):
    return [wait.rpartition(":")[0] for wait in waits]


def on(name):
    """The block in which a device can be used; the CPU needs none."""
    return nullcontext() if name == "cpu" else PretendedDevice(name)


# The pretended device itself: it computes what the CPU does, and finds what it is there to find.


class CopiesToTheCPU(PFEAdaptor):
    def loss(self, *encoded):
        return super().loss(*encoded).cpu()


class AsksForAValue(PFEAdaptor):
    def loss(self, *encoded):
        loss = super().loss(*encoded)
        return loss / max(1.0, loss.item())


class MakesATensorOfAValue(PFEAdaptor):
    def loss(self, *encoded):
        return super().loss(*encoded) * torch.tensor(2.0, device=encoded[0].device)


class IndexesByTruthValues(PFEAdaptor):
    def loss(self, *encoded):
        some = encoded[0][:, 0] > 0
        return super().loss(*(x[some] for x in encoded))


class IndexesByRowsOnTheCPU(PFEAdaptor):
    def loss(self, *encoded):
        return super().loss(*(x[torch.arange(4)] for x in encoded))


class AddsATensorOnTheCPU(PFEAdaptor):
    def loss(self, *encoded):
        mean, *others = encoded
        return super().loss(mean + torch.zeros(D), *others)


class IndexesATensorOnTheCPU(PFEAdaptor):
    def loss(self, *encoded):
        rows = torch.arange(B, device=encoded[0].device)
        return super().loss(*encoded) + torch.ones(B)[rows].sum()


class UsesFloat64(PFEAdaptor):
    def loss(self, *encoded):
        return super().loss(*(x.double() for x in encoded))


class AddsANumberOnTheCPU(PFEAdaptor):
    def loss(self, *encoded):
        return super().loss(*encoded) + torch.tensor(1.0)


def two_steps(adaptor, recipe, name, device=None):
    """Two optimizer steps as train.py takes them; only the second one is counted.

    The first one makes what is made once: the state of the optimizer and the terms of a series.

    Returns: loss and terms of the second step.
    """
    optimizer, schedule = make_optimizer(adaptor, recipe, 10)
    pairs = embeddings(name), embeddings(name, seed=1)
    arguments = (adaptor.train(), pairs, B, optimizer, schedule, torch.float32, 0.5)
    train_script.step(*arguments, recipe.clip_norm)
    if device is not None:
        device.forget()
    return train_script.step(*arguments, recipe.clip_norm)


@pytest.mark.parametrize(
    "fault, expected",
    [
        (CopiesToTheCPU, "copy to the CPU"),
        (AsksForAValue, "_local_scalar_dense"),
        (MakesATensorOfAValue, "copy from the CPU"),
        (IndexesByTruthValues, "index by truth values"),
        (IndexesByRowsOnTheCPU, "index by rows on the CPU"),
    ],
)
def test_a_step_that_waits_is_found_at_its_line(fault, expected):
    with PretendedDevice("cuda") as device:
        two_steps(fault(D).to("cuda"), fault.recipes["paper"], "cuda", device)
    assert f"{expected} at tests/test_devices.py" in without_lines(device.waits)


@pytest.mark.parametrize("fault", [AddsATensorOnTheCPU, IndexesATensorOnTheCPU])
@DEVICES
def test_a_step_that_mixes_devices_is_refused(fault, name):
    with PretendedDevice(name):
        adaptor = fault(D).to(name)
        with pytest.raises(WrongDevice, match=r"on the CPU.*at tests/test_devices\.py"):
            two_steps(adaptor, fault.recipes["paper"], name)


def test_float64_is_refused_where_there_is_none():
    with PretendedDevice("mps"):
        adaptor = UsesFloat64(D).to("mps")
        with pytest.raises(WrongDevice, match=r"float64 on mps, at tests/test_devices\.py"):
            two_steps(adaptor, adaptor.recipes["paper"], "mps")
        for make_one in (torch.zeros, torch.rand):
            with pytest.raises(WrongDevice, match="float64 on mps"):
                make_one(3, dtype=torch.float64, device="mps")
        with pytest.raises(WrongDevice, match="float64 on mps"):
            torch.ones(3, dtype=torch.float64).to("mps")
    with PretendedDevice("cuda"):
        two_steps(UsesFloat64(D).to("cuda"), adaptor.recipes["paper"], "cuda")


def test_what_a_gpu_allows_is_allowed():
    with PretendedDevice("cuda") as device:
        two_steps(AddsANumberOnTheCPU(D).to("cuda"), PFEAdaptor.recipes["paper"], "cuda", device)
        x = torch.ones(3, device="cuda")
        assert x.device == torch.device("cuda:0")
        assert (x + x).tolist() == [2, 2, 2]
        torch.ones(3).to("cuda", non_blocking=True)
    assert without_lines(device.waits) == ["copy to the CPU at tests/test_devices.py"]  # tolist


def test_numpy_and_the_end_of_the_block_refuse_its_tensors():
    with PretendedDevice("cuda"):
        x = torch.ones(3, device="cuda")
        with pytest.raises((TypeError, RuntimeError)):
            x.numpy()
    with pytest.raises(WrongDevice, match="outside"):
        x + 1


@EVERY
def test_a_step_there_computes_what_it_computes_on_the_cpu(method):
    recipe = METHODS[method].recipes[recipe_of(method)]
    results = []
    for name in ("cpu", "cuda"):
        with on(name):
            adaptor = make(method, name)
            torch.manual_seed(0)  # dropout
            loss, _ = two_steps(adaptor, recipe, name)
            results.append([loss.cpu(), *(p.detach().cpu() for p in adaptor.parameters())])
    torch.testing.assert_close(*results)


# Adaptors.


@EVERY
@DEVICES
def test_an_adaptor_stays_on_its_device(method, name):
    with PretendedDevice(name):
        adaptor = make(method, name)
        z_image, z_text = embeddings(name), embeddings(name, seed=1)
        loss = total_loss(adaptor.loss(*adaptor.encode(z_image, z_text)))
        loss.backward()
        results = [loss, *(parameter.grad for parameter in adaptor.parameters())]
        adaptor.eval()
        image, text = adaptor.encode_image(z_image), adaptor.encode_text(z_text)
        results += [adaptor.score(image, text), adaptor.own_score(image, text)]
        results += [*adaptor.describe_image(*image), *adaptor.describe_text(*text)]
        results += [*adaptor.adapt_image(z_image), *adaptor.adapt_text(z_text)]
        results += [adaptor.variance_of(*image), adaptor.variance_of(*text)]
        results += [adaptor.similarity(z_image, z_text), adaptor(z_image, z_text)]
        for x in results:
            if x is not None:
                is_refused_there = name == "mps" and x.dtype == torch.float64
                assert x.device.type == ("cpu" if is_refused_there else name)


@EVERY
@DEVICES
def test_uncertainties_are_finite_and_positive_on_any_device(method, name):
    with PretendedDevice(name):
        adaptor = make(method, name).eval()
        described = adaptor.adapt_image(embeddings(name)), adaptor.adapt_text(embeddings(name))
        for _, uncertainty in described:
            if uncertainty is not None:
                uncertainty = uncertainty.detach().cpu()
                assert torch.isfinite(uncertainty).all()
                assert (uncertainty > 0).all()


# Training.


@EVERY
@DEVICES
def test_a_step_waits_for_nothing(method, name):
    recipes = METHODS[method].recipes
    for recipe in {recipe.optimizer: recipe for recipe in recipes.values()}.values():
        with PretendedDevice(name) as device:
            loss, terms = two_steps(make(method, name), recipe, name, device)
            assert {x.device.type for x in (loss, *terms.values())} == {name}
        assert without_lines(device.waits) == EXPECTED_WAITS.get(method, [])
        assert sum(device.operations.values()) > 50  # they were seen


def test_all_six_methods_of_the_paper_are_to_wait_for_nothing():
    assert not set(GROUPS["all"]) & set(EXPECTED_WAITS)


@pytest.mark.parametrize(
    "method, name", [*((method, "cuda") for method in GROUPS["all"]), ("asymvlm-vmf", "mps")]
)
def test_a_training_waits_once_an_epoch_and_not_once_a_step(method, name, cache_files):
    waits = []
    for batch_size in (8, 4):
        distributions._series.cache_clear()
        recipe = replace(METHODS[method].recipes["small"], epochs=1, batch_size=batch_size)
        path = Path(f"checkpoints/tiny/0/{method}-{batch_size}.pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        with PretendedDevice(name) as device:
            cache = EmbeddingCache("tiny", "train").to(name)
            config = {"seed": 0, "captions": len(cache.text)}
            with Run(path, recipe, config) as run:
                run.method = method
                prompts = embeddings(name)
                train_script.train(run, cache, prompts, torch.float32, 100, use_graph=False)
        waits.append(sorted(device.waits))
        assert load_adaptor(path).recipe["batch_size"] == batch_size
    assert waits[0] == waits[1]


@DEVICES
def test_held_out_images_are_measured_there(name, cache_files):
    with PretendedDevice(name):
        others, held_out = EmbeddingCache("tiny", "train").to(name).hold_out(0.5)
        assert others.image.device.type == held_out.image.device.type == name
        measured = HeldOut(held_out, torch.float32).measure(make("pfe", name).eval(), B)
    assert all(np.isfinite(value) for value in measured.values())


# Evaluation. What is on the device comes to the CPU at the end; nothing on the way is mixed.


def answers_of(scorers, cache):
    return {scorer.row: answer(scorer, cache) for scorer in scorers}


def scorers_of(method, name, cache):
    """The Scorers of one adaptor: published, own and frozen score."""
    frozen = FrozenScorer(cache)
    adaptor = make(method, name).eval()
    published = AdaptorScorer(adaptor, cache, method)
    own = AdaptorScorer(adaptor, cache, method, score=OWN)
    return [published, own, AdaptorRankedByFrozen(frozen, published)]


@EVERY
def test_an_adaptor_answers_as_on_the_cpu(method, cache_files):
    answers = []
    for name in ("cpu", "cuda"):
        with on(name):
            cache = EmbeddingCache("tiny", "val").to(name)
            answers.append(answers_of(scorers_of(method, name, cache), cache))
    assert len(answers[0]) == 3
    torch.testing.assert_close(*answers)


@EVERY
def test_an_adaptor_answers_without_float64(method, cache_files):
    with PretendedDevice("mps"):
        cache = EmbeddingCache("tiny", "val").to("mps")
        assert len(answers_of(scorers_of(method, "mps", cache), cache)) == 3


@DEVICES
def test_training_free_uncertainties_are_those_of_the_cpu(name, cache_files):
    answers = []
    for device in ("cpu", name):
        with on(device):
            cache = EmbeddingCache("tiny", "val").to(device)
            reference = Reference(EmbeddingCache("tiny", "train").to(device), 6, cache.device)
            answers.append(answers_of(every_scorer(cache, {}, reference=reference), cache))
    assert len(answers[0]) == 7
    torch.testing.assert_close(*answers)


@pytest.mark.parametrize("method, name, score", QUESTIONS)
def test_questions_are_answered_there(method, name, score, cache_files):
    texts = ["a", "b", "c"]
    with PretendedDevice(name):
        cache = EmbeddingCache("tiny", "val").to(name)
        adaptor = make(method, name).eval()
        export(Path("split.csv"), {(method, 0): adaptor}, cache, score)
        for z in (embeddings("cpu", rows=3), embeddings(name, rows=3)):
            export(Path("texts.csv"), {(method, 0): adaptor}, cache, score, (texts, z))
            assert len(describe_prompts(adaptor, cache, texts, z, score)) == 3
        assert describe_captions(adaptor, cache, 2, 2)
    lines = Path("split.csv").read_text().splitlines()
    assert len(lines) >= 1 + len(cache.text)


@EVERY
@DEVICES
def test_zero_shot_classification_works_there(method, name, cache_files):
    with PretendedDevice(name):
        cache = EmbeddingCache("tiny", "val").to(name)
        cache.images = [f"{'abcd'[row % 4]}/{row}.png" for row in range(IMAGES)]
        cache.meta["classes"] = [[letter, letter] for letter in "abcd"]
        cache.meta["prompts_per_class"] = 4
        adaptors = {(method, 0): make(method, name).eval()}
        assert len(zero_shot.classify_with_all(cache, adaptors, 0)) == 2


# The encoder.


@DEVICES
def test_a_clip_encodes_there_what_it_encodes_on_the_cpu(name, tmp_path):
    config, weights, _ = write_tiny_clip(tmp_path)
    texts = ["a photo", "a big red house by a river, and a small blue car", *"abcdefgh"] * 10
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(CHUNK + 6, 3, 32, 32, generator=generator)
    encoded = []
    for device_name in ("cpu", name):
        with on(device_name) as device:
            clip = load_clip(str(config), str(weights), torch.device(device_name))
            text, _ = embed_texts(clip, texts, Silent())
            if device is not None:
                device.forget()
            with torch.inference_mode():
                image = in_chunks(clip.model.encode_image, images, clip.device)
            if device is not None:
                assert len(device.waits) == (name == "mps")  # the copy of one chunk to it
            encoded.append([image.cpu(), text])
    torch.testing.assert_close(*encoded)


class Silent:
    def update(self, count):
        """No bar."""
