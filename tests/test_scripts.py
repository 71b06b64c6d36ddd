"""train.py and eval.py as a user calls them: what they write, that they repeat themselves, and what they say when something is wrong."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special, stats

import eval as eval_script
import train as train_script
from datasets.embedding import EmbeddingCache
from models import METHODS
from models.base import SMALL, Adaptor
from models.layers import mlp
from tests.conftest import REPOSITORY, load_result, make_cache
from utils.checkpoint import load_adaptor, save_adaptor
from utils.cli import UserError

PLAIN = ("--no-plots", "--resamples", 20)
QUICK = ("--dataset", "tiny", "--recipe", "small", "--epochs", 2, "--batch-size", 50)


def test_the_users_two_commands_parse_and_say_what_is_missing(workdir):
    for command in (["train.py", "--method", "asymvlm-psd"], ["eval.py", "--uncer_levels", "10"]):
        done = subprocess.run([sys.executable, REPOSITORY / command[0], *command[1:]], cwd=workdir, capture_output=True, text=True)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "cache_embeddings.py --dataset coco" in done.stderr
        assert "--dataset shapes" in done.stderr
    assert not list(workdir.iterdir())


def test_training_writes_a_checkpoint_and_a_log_of_every_epoch(script):
    make_cache("tiny")
    status, _, _ = script(train_script.main, *QUICK, "--method", "asymvlm-psd", "--seed", 3)
    assert status == 0
    content = torch.load("checkpoints/tiny/3/asymvlm-psd.pt", weights_only=True)
    assert set(content) == {"state_dict", "method", "embed_dim", "recipe", "config"}
    assert content["method"] == "asymvlm-psd"
    assert content["embed_dim"] == 64
    assert content["recipe"] == asdict(replace(SMALL, batch_size=50, epochs=2))
    log = [json.loads(line) for line in Path("checkpoints/tiny/3/asymvlm-psd.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in log] == [1, 2]
    assert all(np.isfinite(record["loss"]) and len(record["ladder"]) == 3 for record in log)
    assert log[-1]["lr"] == pytest.approx(1e-6)
    assert log[-1]["temperature"] == pytest.approx(content["state_dict"]["temperature"].item())


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(script):
    make_cache("tiny")
    written = []
    for seed in (0, 0, 1):
        assert script(train_script.main, *QUICK, "--seed", seed)[0] == 0
        assert script(eval_script.main, "--dataset", "tiny", *PLAIN, "--uncer_levels", 5, "--seed", seed)[0] == 0
        files = (f"checkpoints/tiny/{seed}/asymvlm-psd.pt", f"results/tiny/{seed}/asymvlm-psd.json", f"results/tiny/{seed}/asymvlm-psd.npz")
        written.append([Path(file).read_bytes() for file in files])
    assert written[0] == written[1]
    assert all(a != b for a, b in zip(written[0], written[2], strict=True))


def test_the_paper_recipe_is_the_default(script):
    make_cache("tiny")
    assert script(train_script.main, "--dataset", "tiny", "--epochs", 1)[0] == 0
    recipe = torch.load("checkpoints/tiny/0/asymvlm-psd.pt", weights_only=True)["recipe"]
    assert (recipe["optimizer"], recipe["lr"], recipe["weight_decay"], recipe["batch_size"]) == ("sgd", 1e-2, 5e-4, 2048)


def test_uncertainty_learns_how_noisy_a_caption_is(script):
    make_cache("noisy", images=400, captions_per_image=4, dim=32)
    assert script(train_script.main, "--dataset", "noisy", "--recipe", "small", "--epochs", 12, "--batch-size", 400)[0] == 0
    cache = EmbeddingCache("noisy", "train")
    noise = -torch.nn.functional.cosine_similarity(cache.text.float(), cache.image[cache.image_of_caption].float())
    adaptor = load_adaptor("checkpoints/noisy/0/asymvlm-psd.pt")
    with torch.no_grad():
        uncertainty = adaptor.adapt_text(cache.text)[1]
    assert stats.spearmanr(noise, uncertainty).statistic > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_results_equal_a_plain_evaluation_with_the_full_matrix(method, script):
    make_cache("tiny", images=30, captions_per_image=4)
    assert script(train_script.main, *QUICK, "--method", method)[0] == 0
    status, printed, _ = script(eval_script.main, "--dataset", "tiny", *PLAIN, "--method", method, "--uncer_levels", 10)
    assert status == 0
    assert method in printed
    result, queries = load_result("tiny", 0, method)
    cache, adaptor = EmbeddingCache("tiny", "val"), load_adaptor(f"checkpoints/tiny/0/{method}.pt")
    with torch.no_grad():
        similarity = adaptor.similarity(cache.image, cache.text).numpy()
        uncertainty = adaptor.adapt_text(cache.text)[1].numpy()
    image_of_caption = cache.image_of_caption.numpy()
    t2i = similarity.argmax(0) == image_of_caption
    retrieved = similarity.argmax(1)
    i2t = image_of_caption[retrieved] == np.arange(30)
    assert result["t2i"] == pytest.approx([part.mean() for part in np.split(t2i[np.argsort(uncertainty, kind="stable")], 10)])
    assert result["i2t"] == pytest.approx([part.mean() for part in np.split(i2t[np.argsort(uncertainty[retrieved], kind="stable")], 10)])
    assert result["metrics"]["t2i"]["R@1"] == pytest.approx(t2i.mean())
    assert set(result["metrics"]["i2t"]) == {"R@1", "R@5", "R@10", "S", "R2", "-S*R2", "AURC", "E-AURC", "ties"}
    assert (queries["t2i_top1"] == similarity.argmax(0)).all()
    assert (queries["i2t_top1"] == retrieved).all()
    np.testing.assert_allclose(queries["t2i_uncertainty"], uncertainty, rtol=1e-5)


def test_relevance_gives_the_figures_against_exact_ambiguity(script):
    relevance = [sorted({i // 3, (i * 7) % 40, (i * i) % 40}) for i in range(120)]
    make_cache("tiny", relevance=relevance)
    assert script(train_script.main, *QUICK)[0] == 0
    assert script(eval_script.main, "--dataset", "tiny", *PLAIN)[0] == 0
    result, queries = load_result("tiny", 0, "asymvlm-psd")
    own = EmbeddingCache("tiny", "val").image_of_caption.tolist()  # always right, listed or not
    described = np.mean([top in (*rows, image) for top, rows, image in zip(queries["t2i_top1"], relevance, own, strict=True)])
    assert set(result["metrics"]["ambiguity"]) == {"spearman", "partial_spearman_given_length", "R@1_described"}
    assert result["metrics"]["ambiguity"]["R@1_described"] == pytest.approx(described)


def test_several_methods_and_seeds_give_one_table(script):
    make_cache("tiny")
    assert script(train_script.main, *QUICK, "--method", "asymvlm-psd", "asymvlm-vmf", "--seed", 0, 1)[0] == 0
    status, printed, _ = script(eval_script.main, "--dataset", "tiny", *PLAIN, "--method", "asymvlm-psd", "asymvlm-vmf", "--seed", 0, 1)
    assert status == 0
    table = Path("results/tiny/comparison.md").read_text()
    for row in ("frozen cosine", "softmax-entropy", "caption-length", "asymvlm-psd", "asymvlm-vmf"):
        assert table.count(f"| {row} |") == 2
        assert row in printed
    runs = [load_result("tiny", seed, "asymvlm-vmf")[0]["metrics"]["t2i"]["AURC"] for seed in (0, 1)]
    assert f"{np.mean(runs):.3f} ± {np.std(runs, ddof=1):.3f}" in table
    line = next(line for line in Path("results/tiny/comparison.csv").read_text().splitlines() if line.startswith("text-to-image,asymvlm-vmf,AURC,"))
    assert [float(value) for value in line.split(",")[3:]] == pytest.approx([np.mean(runs), np.std(runs, ddof=1)])


def test_softmax_entropy_baseline_equals_scipys(script):
    make_cache("tiny")
    assert script(train_script.main, *QUICK)[0] == 0
    assert script(eval_script.main, "--dataset", "tiny", *PLAIN)[0] == 0
    cache = EmbeddingCache("tiny", "val")
    image, text = (z.double().numpy() / np.linalg.norm(z.double().numpy(), axis=1, keepdims=True) for z in (cache.image, cache.text))
    expected = stats.entropy(special.softmax(100 * image @ text.T, axis=0), axis=0)
    found = np.load("results/tiny/baselines/softmax-entropy.npz")["t2i_uncertainty"]
    np.testing.assert_allclose(found, expected, atol=1e-4)


class Toy(Adaptor):
    """The README's example of a method of one's own: a text's uncertainty is its distance from a learned centre."""

    recipes = {"paper": SMALL, "small": SMALL}

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.trunk = mlp(embed_dim)

    def encode_image(self, z):
        return (z,)

    def encode_text(self, z):
        return z, self.trunk(z)

    def describe_text(self, z, shift):
        return z, shift.square().mean(dim=1)

    def loss(self, z_image, z_text, shift):
        return (z_image - z_text - shift).square().mean()


def test_a_method_of_ones_own_goes_through_both_scripts(script, monkeypatch):
    monkeypatch.setitem(METHODS, "toy", Toy)
    make_cache("tiny")
    assert script(train_script.main, *QUICK, "--method", "toy")[0] == 0
    assert script(eval_script.main, "--dataset", "tiny", *PLAIN, "--method", "toy")[0] == 0
    assert load_result("tiny", 0, "toy")[0]["config"]["method"] == "toy"


def test_a_loss_that_is_not_finite_stops_with_method_epoch_and_step(script):
    make_cache("tiny")
    status, _, error = script(train_script.main, *QUICK, "--optimizer", "sgd", "--lr", 1e30)
    assert status == 2
    assert "asymvlm-psd, epoch 1, step" in error
    assert "--lr" in error
    assert not Path("checkpoints/tiny/0/asymvlm-psd.pt").exists()


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (train_script.main, ("--dataset", "nothing"), ["embeddings/nothing", "found caches: tiny"]),
        (train_script.main, ("--dataset", "tiny", "--method", "clip"), ["--method", "asymvlm-psd"]),
        (train_script.main, ("--dataset", "tiny", "--recipe", "huge"), ["--recipe huge", "paper, small"]),
        (train_script.main, ("--dataset", "tiny", "--epochs", 0), ["--epochs", "at least 1"]),
        (train_script.main, ("--dataset", "tiny", "--batch-size", -1), ["--batch-size", "at least 1"]),
        (train_script.main, ("--dataset", "tiny", "--lr", "nan"), ["--lr", "nan"]),
        (train_script.main, ("--dataset", "tiny", "--seed", -1), ["--seed"]),
        (train_script.main, ("--dataset", "tiny", "--device", "cuda:9"), ["--device cuda:9", "cpu"]),
        (eval_script.main, ("--dataset", "tiny"), ["checkpoints/tiny/0/asymvlm-psd.pt", "train.py --dataset tiny --method asymvlm-psd --seed 0"]),
        (eval_script.main, ("--dataset", "tiny", "--uncer_levels", 0), ["--uncer_levels", "at least 1"]),
        (eval_script.main, ("--dataset", "tiny", "--uncer_levels", 41), ["--uncer_levels 41", "40"]),
        (eval_script.main, ("--dataset", "tiny", "--split", "test"), ["no test split", "train, val"]),
    ],
)
def test_wrong_input_is_one_line_that_names_it(main, arguments, words, script, workdir):
    make_cache("tiny")
    before = sorted(workdir.rglob("*"))
    status, printed, error = script(main, *arguments)
    assert status == 2
    assert not printed
    assert all(word in error for word in words), error
    assert sorted(workdir.rglob("*")) == before


def test_checkpoints_that_do_not_fit_are_refused(workdir, script):
    make_cache("tiny")
    path = workdir / "checkpoints" / "tiny" / "0" / "asymvlm-psd.pt"
    adaptor = METHODS["asymvlm-psd"](32)
    save_adaptor(adaptor, "asymvlm-psd", SMALL, {}, path)
    assert "32 wide" in script(eval_script.main, "--dataset", "tiny")[2]
    save_adaptor(METHODS["asymvlm-vmf"](64), "asymvlm-vmf", SMALL, {}, path)
    assert "asymvlm-vmf, not of asymvlm-psd" in script(eval_script.main, "--dataset", "tiny")[2]
    for content, words in [
        (b"\x00" * 100, "can be read safely"),
        (b"", "can be read safely"),
        (b"PK\x03\x04" + bytes(range(256)), "can be read safely"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            load_adaptor(path)
    for change in ({"method": "clip"}, {"embed_dim": 65}, {"embed_dim": "64"}, {"state_dict": {}}, {"state_dict": 3}):
        torch.save({"state_dict": adaptor.state_dict(), "method": "asymvlm-psd", "embed_dim": 32} | change, path)
        with pytest.raises(UserError, match=r"asymvlm-psd\.pt"):
            load_adaptor(path)
    weights = adaptor.state_dict()
    weights["temperature"] = torch.tensor(float("nan"))
    torch.save({"state_dict": weights, "method": "asymvlm-psd", "embed_dim": 32}, path)
    with pytest.raises(UserError, match="'temperature' is not finite"):
        load_adaptor(path)
