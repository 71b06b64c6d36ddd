"""Several ranks against one: losses, gradients, trained weights and cached bytes; and what happens when a rank dies."""

import json
import os
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import cache_embeddings
import train as train_script
from datasets.embedding import EmbeddingCache
from datasets.shapes import world
from models import GROUPS, METHODS
from tests.conftest import make_cache, write_tiny_clip
from tests.ranks import (
    BATCHES,
    REPOSITORY,
    STEPPED,
    Ranks,
    cache,
    new_adaptor,
    random_pairs,
    ranks_of,
    torchrun,
    wait_for,
)
from tests.ranks import steps as steps_of_ranks
from utils.cli import UserError
from utils.device import pick_device
from utils.distributed import gather, share_of_rank

EPOCHS = 12  # of a run that is killed after its second
TRAIN = ("--dataset", "it", "--recipe", "small", "--precision", "fp32", "--device", "cpu")


def relative(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def files_in(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def one_thread():
    """This process has one thread, as the ranks have: on many cores the last bits depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Training.


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """{ranks: [what each rank found]} of one step of every method and batch."""
    folder = tmp_path_factory.mktemp("steps")
    for ranks in (2, 4):
        with Ranks(ranks, steps_of_ranks, [folder]) as started:
            assert started.wait() == [0] * ranks, started.output()
    yield {
        ranks: [
            torch.load(folder / f"{rank}-of-{ranks}.pt", weights_only=True, mmap=True)
            for rank in range(ranks)
        ]
        for ranks in (2, 4)
    }
    shutil.rmtree(folder)  # a GB


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("method", STEPPED)
def test_a_step_of_several_ranks_is_that_of_one(method, ranks, batch, steps):
    adaptor = new_adaptor(method)
    loss = adaptor(*random_pairs(batch))
    loss.backward()
    found = [rank[f"{method} {batch}"] for rank in steps[ranks]]
    shares = [rank["share"] for rank in found]
    assert (sum(shares), max(shares)) == (batch, -(-batch // ranks))  # none has the whole batch
    for rank in found:
        assert rank["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        exact = {name: parameter.grad for name, parameter in adaptor.named_parameters()}
        assert relative(flat(rank["gradients"]), flat(exact)) <= 1e-5
        for (
            name,
            gradient,
        ) in exact.items():  # of 3 pairs, a temperature's is a small difference of large numbers
            assert relative(rank["gradients"][name], gradient) <= (1e-5 if batch == 37 else 1e-4), (
                name
            )
        for name, buffer in adaptor.named_buffers():
            assert relative(rank["buffers"][name], buffer) <= 1e-6, name
    assert all(
        torch.equal(rank["gradients"][name], found[0]["gradients"][name])
        for rank in found
        for name in rank["gradients"]
    )


def test_two_epochs_of_two_ranks_give_the_weights_of_one_and_only_the_first_writes(workdir, script):
    make_cache("it", images=97, captions_per_image=2, dim=32)
    epochs = (
        "--method",
        "all",
        "--epochs",
        2,
        "--batch-size",
        64,
    )  # 194 captions: the last of 4 batches has 2
    assert script(train_script.main, *TRAIN, *epochs)[0] == 0
    os.rename("checkpoints", "alone")
    with Ranks(2, train_script.main, (*TRAIN, *epochs)) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    assert files_in("checkpoints").keys() == {
        f"it/0/{method}.{suffix}" for method in GROUPS["all"] for suffix in ("pt", "jsonl")
    }
    for method in GROUPS["all"]:
        one, two = (
            torch.load(f"{folder}/it/0/{method}.pt", weights_only=True)
            for folder in ("alone", "checkpoints")
        )
        assert (one["config"], one["recipe"]) == (two["config"], two["recipe"])
        for name, weight in one["state_dict"].items():
            assert relative(two["state_dict"][name], weight) <= 2e-3, (method, name)
        assert len(Path(f"checkpoints/it/0/{method}.jsonl").read_text().splitlines()) == 2


def kill_a_fork(run, rank, number, begun):
    with Ranks(2, train_script.main, run, "train.py") as ranks:
        wait_for(begun)
        os.kill(ranks.numbers[rank], number)
        assert 0 not in ranks.wait()
        return ranks.output()


def kill_below_torchrun(run, rank, number, begun):
    process = torchrun(2, REPOSITORY / "train.py", *run, wait=False)
    wait_for(begun, process)
    os.kill(ranks_of(process)[rank], number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    return output


@pytest.mark.parametrize(
    ("kill", "rank", "number"),
    [
        (kill_a_fork, 0, signal.SIGTERM),
        pytest.param(
            *(kill_below_torchrun, 1, signal.SIGKILL),
            marks=pytest.mark.skipif(
                not Path("/proc/self/environ").exists(), reason="no /proc to tell ranks apart by"
            ),
        ),
    ],
)
def test_a_rank_that_dies_stops_the_run_and_another_number_of_ranks_goes_on(
    workdir, script, kill, rank, number
):
    make_cache("it", images=100, dim=32)
    log = Path("checkpoints/it/0/pcmepp.jsonl")
    run = (*TRAIN, "--method", "pcmepp", "--epochs", EPOCHS, "--batch-size", 50)
    output = kill(
        run, rank, number, lambda: log.exists() and len(log.read_text().splitlines()) >= 2
    )
    assert (
        "train.py, rank 0: interrupted: saved after epoch" in output
        or "train.py, rank 0: error: lost another process of this run" in output
    )
    assert "--resume" in output
    assert not any("lock" in name or "partial" in name for name in files_in("checkpoints"))
    before = json.loads(log.read_text().splitlines()[0])
    done = len(torch.load(log.with_name("pcmepp.resume.pt"), weights_only=True)["log"])
    assert 1 <= done < EPOCHS  # the log may be a line ahead of what can be saved
    assert script(train_script.main, *run, "--resume")[0] == 0
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(1, EPOCHS + 1))
    assert records[0] == before
    assert torch.load(log.with_suffix(".pt"), weights_only=True)["recipe"] == asdict(
        METHODS["pcmepp"].recipes["small"]
    ) | {
        "epochs": EPOCHS,
        "batch_size": 50,
    }


def test_every_rank_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "77")
    with pytest.raises(UserError, match="--device cuda:77: not available here"):
        pick_device("cuda")


def test_a_share_is_of_consecutive_rows_and_alone_it_is_all():
    assert share_of_rank(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]
    encoded = (torch.ones(2), torch.zeros(2))
    assert gather(encoded, 2) is encoded


def test_methods_with_batch_norm_or_dropout_are_for_one_process(workdir, monkeypatch):
    layers = (torch.nn.BatchNorm1d, torch.nn.Dropout)
    for adaptor_class in METHODS.values():
        modules = adaptor_class(8).modules()
        active = [m for m in modules if isinstance(m, layers) and getattr(m, "p", 1) > 0]
        assert adaptor_class.single_process_only == bool(active)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for method in ("pfe-original", "probvlm-original"):
        assert METHODS[method].single_process_only
        with pytest.raises(UserError, match=f"--method {method}: .* single process"):
            train_script.parse(["--method", "pcmepp-original", method, "--recipe", "original"])
    train_script.parse(["--method", "asymvlm-psd", "pcmepp", "prolip", "--recipe", "original"])


def test_an_error_of_every_rank_names_its_rank(workdir):
    done = torchrun(2, REPOSITORY / "train.py", "--dataset", "nowhere")
    assert done.returncode != 0
    assert any(
        f"train.py, rank {rank}: error: --dataset nowhere: no cache" in done.stdout
        for rank in (0, 1)
    )


# Caching.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip"), "tiny-ranks")


@pytest.fixture
def flags(workdir, tiny):
    """Flags of a small data set and CLIP, of whose images and texts parts of 64 make several."""
    world.make("small", train=150, val=20)
    shapes = (
        "--dataset",
        "shapes",
        "--data-root",
        "small",
        "--split",
        "train",
        "--device",
        "cpu",
        "--workers",
        "0",
    )
    return (*shapes, "--model", str(tiny[0]), "--pretrained", str(tiny[1]))


def test_ranks_share_the_parts_and_write_the_bytes_of_one(flags, script):
    assert script(cache_embeddings.main, *flags)[0] == 0
    os.rename("embeddings", "alone")
    done = torchrun(2, "-m", "tests.ranks", 64, *flags)
    assert done.returncode == 0, done.stdout
    assert files_in("embeddings") == files_in("alone")


def test_broken_pictures_are_counted_over_all_ranks_and_looked_at_again_once_mended(flags, script):
    pictures = sorted(Path("small/train").glob("*.png"))
    broken = {
        picture: picture.read_bytes() for picture in (pictures[3], pictures[100])
    }  # one of each rank
    for picture in broken:
        picture.write_bytes(b"no picture")
    for _ in range(2):  # each rank has no more than may be left out, both together have
        with Ranks(2, cache, (64, *flags, "--max-broken", 1)) as ranks:
            assert ranks.wait() == [2, 2], ranks.output()
            assert "2 broken samples so far" in ranks.output()
    for picture, content in broken.items():
        picture.write_bytes(content)
    with Ranks(2, cache, (64, *flags, "--max-broken", 1)) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    assert EmbeddingCache("shapes", "train").meta["skipped"] == []


def test_a_broken_picture_of_one_rank_stops_all_and_the_rest_is_kept(flags, script):
    pictures = sorted(Path("small/train").glob("*.png"))
    whole = pictures[100].read_bytes()  # of the second part, which is rank 1's
    pictures[100].write_bytes(b"no picture")
    with Ranks(2, cache, (64, *flags)) as ranks:
        assert ranks.wait() == [2, 2], ranks.output()
        assert f"rank 1: error: {pictures[100]}: " in ranks.output()
        assert (
            "rank 0: error: stopped, as another process of this run had to stop" in ranks.output()
        )
    assert not Path("embeddings/shapes/train/meta.json").exists()
    assert {path.name for path in Path("embeddings/shapes/train/.parts").glob("image*")} == {
        "image-00000.pt",
        "image-00002.pt",
    }
    pictures[100].write_bytes(whole)
    with Ranks(3, cache, (64, *flags)) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.output()
    os.rename("embeddings", "fixed")
    assert script(cache_embeddings.main, *flags)[0] == 0
    assert files_in("embeddings") == files_in("fixed")
