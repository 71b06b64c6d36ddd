"""Held-out images: how they are drawn, what is measured on them, which epoch's weights are kept, and resumed runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train as train_script
from datasets import embedding
from datasets.embedding import EmbeddingCache
from models import GROUPS, METHODS
from tests.conftest import REPOSITORY, die, interrupt, make_cache, read_log, stop_in_epoch
from tests.ranks import Ranks
from utils.cli import UserError, run_script
from utils.evaluation import validation
from utils.evaluation.validation import HeldOut, retrieval

HELD = ("--validation", 0.2)
RUN = (
    "--dataset",
    "tiny",
    "--recipe",
    "small",
    "--epochs",
    7,
    "--batch-size",
    50,
    "--save-every",
    2,
    *HELD,
)
IN_SHARDS = {"shard_rows": 13, "meta": {"embed_dim": 64, "dtype": "float16"}}
BEST = ("--keep", "best")
PATH = Path("checkpoints/tiny/0/asymvlm-psd.pt")


def pairs_of(cache, rows=None):
    """The pairs of a cache as a set of bytes."""
    rows = torch.arange(len(cache.text)) if rows is None else rows
    return sorted(z.numpy().tobytes() for z in torch.cat(cache.pairs(rows), dim=1))


@pytest.mark.parametrize("mapped", [False, True])
def test_held_out_images_take_their_captions_with_them_and_no_other(workdir, mapped):
    make_cache("tiny", **(IN_SHARDS if mapped else {}))
    whole = EmbeddingCache("tiny", "train", mapped=mapped)
    rest, held_out = whole.hold_out(0.2)
    assert (len(whole.image), len(rest.image), len(held_out.image)) == (40, 32, 8)
    assert (len(rest.text), len(held_out.text)) == (96, 24)
    assert (whole.mapped, rest.mapped, held_out.mapped) == (mapped, mapped, False)
    assert sorted(pairs_of(rest) + pairs_of(held_out)) == pairs_of(whole)
    assert not set(pairs_of(rest)) & set(pairs_of(held_out))
    for part in (rest, held_out):
        assert part.digest == whole.digest
        assert part.image_of_caption.bincount().tolist() == [3] * len(part.image)
        order = torch.cat(list(part.batches(7, torch.Generator().manual_seed(0), buffer=20)))
        assert sorted(order.tolist()) == list(range(len(part.text)))
        if not mapped:
            names = {
                tuple(z.tolist()): name
                for z, name in zip(whole.image.read(), whole.images, strict=True)
            }
            assert part.images == [names[tuple(z.tolist())] for z in part.image.read()]
            texts = {
                tuple(z.tolist()): text
                for z, text in zip(whole.text.read(), whole.captions, strict=True)
            }
            assert part.captions == [texts[tuple(z.tolist())] for z in part.text.read()]
    again, other = whole.hold_out(0.2)[1], whole.hold_out(0.2, seed=1)[1]
    assert torch.equal(held_out.image.read(), again.image.read())
    assert not torch.equal(held_out.image.read(), other.image.read())


def test_what_lies_in_many_files_is_held_out_as_if_it_lay_in_one(workdir):
    make_cache("tiny")
    alone = EmbeddingCache("tiny", "train").hold_out(0.2)[1]
    make_cache("tiny", **IN_SHARDS)
    held_out = EmbeddingCache("tiny", "train", mapped=True).hold_out(0.2)[1]
    assert torch.equal(alone.image.read(), held_out.image.read())
    assert torch.equal(alone.text.read(), held_out.text.read())
    assert torch.equal(alone.image_of_caption, held_out.image_of_caption)


def test_no_more_images_are_held_out_than_can_be_compared_every_epoch(workdir, monkeypatch):
    make_cache("tiny")
    monkeypatch.setattr(embedding, "HELD_OUT", 5)
    rest, held_out = EmbeddingCache("tiny", "train").hold_out(0.5)
    assert (len(rest.image), len(held_out.image)) == (35, 5)


def test_images_without_a_caption_are_held_out_too_and_a_part_without_any_is_refused(workdir):
    make_cache("tiny", image_of_caption=[0] * 120)
    cache = EmbeddingCache("tiny", "train")
    with pytest.raises(
        UserError, match=r"embeddings/tiny/train: the 8 images that were drawn have no caption"
    ):
        cache.hold_out(0.2, seed=0)
    with pytest.raises(UserError, match=r"a share of 0\.99 of 40 images leaves none"):
        cache.hold_out(0.99)


def recall_and_aurc_by_a_slow_loop(similarity, image_of_caption, uncertainty):
    """Text-to-image, one query after the other: of equal uncertainties there are none here."""
    right = [
        int(np.argmax(similarity[:, m])) == image_of_caption[m] for m in range(similarity.shape[1])
    ]
    errors, risks = 0, []
    for number, m in enumerate(np.argsort(uncertainty), start=1):
        errors += not right[m]
        risks.append(errors / number)
    return sum(right) / len(right), sum(risks) / len(risks)


@pytest.mark.parametrize("method", GROUPS["all"])
def test_an_epochs_record_is_what_its_weights_do_on_the_held_out_images(method, script):
    make_cache("tiny")
    assert script(train_script.main, *RUN, "--method", method)[0] == 0
    log = [json.loads(line) for line in PATH.with_name(f"{method}.jsonl").read_text().splitlines()]
    assert [sorted(record["validation"]) for record in log] == [["AURC", "R@1", "loss"]] * 7
    held_out = EmbeddingCache("tiny", "train").hold_out(0.2)[1]
    adaptor = METHODS[method](64)
    adaptor.load_state_dict(
        torch.load(PATH.with_name(f"{method}.pt"), weights_only=True)["state_dict"]
    )
    z_image, z_text = held_out.image.read(), held_out.text.read()
    with torch.no_grad():
        similarity = adaptor.similarity(z_image, z_text).numpy()
        uncertainty = adaptor.adapt_text(z_text)[1].numpy()
        loss = adaptor(z_image[held_out.image_of_caption], z_text).item()  # 24 pairs are one batch
    expected = recall_and_aurc_by_a_slow_loop(
        similarity, held_out.image_of_caption.tolist(), uncertainty
    )
    found = log[-1]["validation"]
    assert (found["R@1"], found["AURC"]) == pytest.approx(expected, abs=1e-12)
    assert found["loss"] == pytest.approx(loss, rel=2e-2)  # bfloat16 where the machine has it


def test_held_out_images_are_not_trained_on(script, monkeypatch):
    make_cache("tiny")
    seen, step = [], train_script.step

    def look(adaptor, pairs, *others):
        seen.append(torch.cat(pairs, dim=1))
        return step(adaptor, pairs, *others)

    monkeypatch.setattr(train_script, "step", look)
    assert script(train_script.main, *RUN)[0] == 0
    rest = EmbeddingCache("tiny", "train").hold_out(0.2)[0]
    assert sorted({z.numpy().tobytes() for z in torch.cat(seen)}) == pairs_of(rest)


def test_measuring_changes_nothing_in_training(script, monkeypatch):
    make_cache("tiny")
    assert script(train_script.main, *RUN)[0] == 0
    measured = torch.load(PATH, weights_only=True)
    assert measured["config"]["validation"] == 0.2
    assert measured["config"]["keep"] == "last"
    monkeypatch.setattr(HeldOut, "measure", lambda *_: {"loss": 0.0, "R@1": 1.0, "AURC": 0.0})
    assert script(train_script.main, *RUN)[0] == 0
    weights = torch.load(PATH, weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in measured["state_dict"].items())


def scripted(monkeypatch, aurcs):
    """Let the epochs have these AURCs; gives a list that will hold their weights."""
    weights = []

    def measure(self, adaptor, batch_size):
        weights.append({name: value.clone() for name, value in adaptor.state_dict().items()})
        return {"loss": 0.0, "R@1": 1.0, "AURC": aurcs[len(weights) - 1]}

    monkeypatch.setattr(HeldOut, "measure", measure)
    return weights


@pytest.mark.parametrize(
    ("aurcs", "best"), [([5, 3, 4, 2, 2, 6, 7], 4), ([7, 6, 5, 4, 3, 2, 1], 7), ([1] * 7, 1)]
)
def test_the_first_epoch_of_the_least_aurc_is_kept(script, monkeypatch, aurcs, best):
    make_cache("tiny")
    weights = scripted(monkeypatch, aurcs)
    assert script(train_script.main, *RUN, *BEST)[0] == 0
    kept = torch.load(PATH, weights_only=True)["state_dict"]
    same = [
        all(torch.equal(value, kept[name]) for name, value in epoch.items()) for epoch in weights
    ]
    assert [epoch for epoch, is_same in enumerate(same, start=1) if is_same] == [best]


@pytest.mark.parametrize("method", ["asymvlm-psd", "probvlm"])
@pytest.mark.parametrize("stop", [die, interrupt])
def test_a_resumed_run_that_keeps_the_best_equals_an_unbroken_one(
    method, stop, script, monkeypatch
):
    make_cache("tiny")
    path = PATH.with_name(f"{method}.pt")
    run = (*RUN, *BEST, "--method", method, "--lr", 0.1)  # too fast: the best is not the last
    assert script(train_script.main, *run)[0] == 0
    whole, log = path.read_bytes(), read_log(method)
    assert min(range(7), key=lambda epoch: log[epoch]["validation"]["AURC"]) < 6
    path.unlink()
    for flags, epoch in (((), 4), (("--resume",), 7)):
        with monkeypatch.context() as patch:
            stop_in_epoch(patch, epoch, stop)
            if stop is die:
                with pytest.raises(SystemExit):
                    script(train_script.main, *run, *flags)
            else:
                assert script(train_script.main, *run, *flags)[0] == 130
        assert not path.exists()
    assert script(train_script.main, *run, "--resume")[0] == 0
    assert path.read_bytes() == whole
    assert read_log(method) == log


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--validation", 0.4), "validation was 0.2, now 0.4"),
        (("--validation", 0), "validation was 0.2, now None"),
        (("--keep", "last"), "keep was best, now last"),
    ],
)
def test_a_state_of_another_share_is_refused_and_the_share_named(
    script, monkeypatch, flags, expected
):
    make_cache("tiny")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_epoch(patch, 4, die)
        script(train_script.main, *RUN, *BEST)
    more = (*flags, "--keep", "last") if flags[1] == 0 else flags
    status, _, last = script(train_script.main, *RUN, *BEST, "--resume", *more)
    assert status == 2
    assert expected in last
    assert script(train_script.main, *RUN, *BEST)[0] == 0  # and of a finished run
    assert expected in script(train_script.main, *RUN, *BEST, "--resume", *more)[2]


def test_a_run_that_began_without_held_out_images_does_not_go_on_with_them(script, monkeypatch):
    make_cache("tiny")
    without = RUN[: -len(HELD)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_epoch(patch, 4, die)
        script(train_script.main, *without)
    assert "validation was None, now 0.2" in script(train_script.main, *RUN, "--resume")[2]
    assert script(train_script.main, *without, "--resume")[0] == 0


@pytest.mark.parametrize("change", [{"best": None}, {"best": {}}, {"log": [{"loss": 1.0}]}])
def test_a_state_without_its_best_is_refused(script, monkeypatch, change):
    make_cache("tiny")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_epoch(patch, 4, die)
        script(train_script.main, *RUN, *BEST)
    state = PATH.with_suffix(".resume.pt")
    torch.save(torch.load(state, weights_only=True) | change, state)
    status, _, last = script(train_script.main, *RUN, *BEST, "--resume")
    assert status == 2
    assert f"{state}: not the state of such a run" in last


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--validation", 1), ["--validation", "below 1"]),
        (("--validation", "nan"), ["--validation", "below 1"]),
        (("--validation", -0.1), ["--validation", "at least 0"]),
        (
            ("--validation", 0.999),
            ["embeddings/tiny/train: a share of 0.999 of 40 images", "none to train on"],
        ),
        (("--validation", 0, "--keep", "best"), ["--keep best", "--validation 0.1"]),
        (("--keep", "first"), ["--keep", "last"]),
    ],
)
def test_wrong_shares_are_one_line_that_names_them(flags, words, script):
    make_cache("tiny")
    status, printed, error = script(train_script.main, *RUN, *flags)
    assert (status, printed) == (2, "")
    assert all(word in error for word in words), error
    assert not Path("checkpoints").exists()


def test_a_similarity_that_is_not_a_number_is_one_line(script, monkeypatch):
    make_cache("tiny")
    monkeypatch.setattr(
        METHODS["asymvlm-psd"], "score", lambda self, image, text: torch.full((8, 24), torch.nan)
    )
    status, _, error = script(train_script.main, *RUN)
    assert status == 2
    assert (
        "--validation: a similarity is not a number on the held-out images; try a smaller --lr"
        in error
    )


@pytest.mark.parametrize(("recall", "is_told"), [(0.89, True), (0.91, False)])
def test_that_r1_fell_by_a_tenth_is_told_once_a_run(recall, is_told, workdir, monkeypatch, capsys):
    make_cache("tiny")
    measured = {"loss": 0.0, "R@1": recall * 0.5, "AURC": 0.5}
    monkeypatch.setattr(HeldOut, "measure", lambda *_: measured)
    frozen = {"t2i": {"R@1": 0.5}}
    monkeypatch.setattr(validation, "retrieval", lambda *_: frozen)
    assert run_script(train_script.main, [*map(str, RUN), "--seed", "0", "1"]) == 0
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "R@1 on the held-out images" in line
    ]
    assert len(lines) == (2 if is_told else 0)
    if is_told:
        assert (
            f"{PATH}: R@1 on the held-out images is 0.445, the frozen CLIP's is 0.500" in lines[0]
        )


def test_the_frozen_recall_is_that_of_the_cosine(workdir):
    make_cache("tiny")
    held_out = EmbeddingCache("tiny", "train").hold_out(0.2)[1]
    z_image, z_text = (
        torch.nn.functional.normalize(rows.read().float(), dim=1)
        for rows in (held_out.image, held_out.text)
    )
    right = (z_text @ z_image.T).argmax(dim=1) == held_out.image_of_caption
    assert HeldOut(held_out, torch.float32).frozen_recall == right.float().mean().item()


def test_where_captions_have_no_uncertainty_the_images_counts(monkeypatch):
    fields = {"rank": np.array([1, 2]), "image_uncertainty": np.array([0.1, 0.2])}
    monkeypatch.setattr(
        validation, "answer", lambda *_: {"t2i": fields, "i2t": {"rank": np.array([1, 1])}}
    )
    assert retrieval(None, None) == {"t2i": {"R@1": 0.5, "AURC": 0.25}, "i2t": {"R@1": 1.0}}


def test_ranks_hold_the_same_images_out_and_keep_the_same_epoch(script):
    make_cache("tiny", **IN_SHARDS)
    run = (*RUN, *BEST, "--method", "pcmepp", "--precision", "fp32")
    assert script(train_script.main, *run)[0] == 0
    path = PATH.with_name("pcmepp.pt")
    alone, log = torch.load(path, weights_only=True), read_log("pcmepp")
    with Ranks(2, train_script.main, run, "train.py") as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    together = torch.load(path, weights_only=True)
    assert together["config"] == alone["config"]
    for name, value in alone["state_dict"].items():
        torch.testing.assert_close(together["state_dict"][name], value, atol=2e-3, rtol=2e-3)
    for one, two in zip(log, read_log("pcmepp"), strict=True):
        assert one["validation"]["loss"] == pytest.approx(two["validation"]["loss"], rel=1e-3)


def test_training_loads_no_library_of_figures_plots_or_pictures():
    heavy = {"matplotlib", "open_clip", "PIL", "pycocotools", "scipy"}
    code = f"import sys, train; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not done.stdout.split()
