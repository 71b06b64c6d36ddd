"""train.py as a user calls it: what it writes, that it repeats itself, what a stopped run leaves, what it refuses."""

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import eval as eval_script
import train as train_script
from datasets.embedding import EmbeddingCache
from datasets.write import write_split
from models import GROUPS, METHODS, expand_groups
from models.base import SMALL, Adaptor
from models.layers import mlp
from tests.conftest import REPOSITORY, load_result, make_cache, recipe_of
from tests.ranks import Ranks
from utils.checkpoint import load_adaptor, load_run, save_adaptor
from utils.cli import UserError
from utils.device import pick_precision
from utils.files import locked, save_tensors

PLAIN = ("--no-plots", "--resamples", 20)
BASELINES = ("pcmepp", "pfe", "probvlm", "prolip")
QUICK = ("--dataset", "tiny", "--recipe", "small", "--epochs", 2, "--batch-size", 50)


def test_the_users_command_parses_and_says_what_is_missing(workdir):
    command = [sys.executable, REPOSITORY / "train.py", "--method", "asymvlm-psd"]
    done = subprocess.run(command, cwd=workdir, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "cache_embeddings.py --dataset coco" in done.stderr
    assert "--dataset shapes" in done.stderr
    assert not list(workdir.iterdir())


def test_groups_stand_for_their_methods_each_once():
    assert GROUPS["all"] == ("asymvlm-psd", "asymvlm-vmf", "probvlm", "pfe", "pcmepp", "prolip")
    assert expand_groups(["pfe", "asymvlm-psd", "pfe"]) == ["pfe", "asymvlm-psd"]
    assert expand_groups(["prolip", "all"]) == list(GROUPS["all"])


def test_models_and_runs_load_no_library_of_data_sets_or_plots():
    heavy = {"datasets", "matplotlib", "open_clip", "PIL", "pycocotools", "scipy"}
    code = f"import sys, models, utils.run; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not done.stdout.split()


def test_training_reads_at_most_24_of_our_files():
    """Those of the baselines are not counted: a run of one method needs none of the others."""
    code = "import sys, train; print(*(getattr(m, '__file__', None) or '' for m in sys.modules.values()), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    files = [Path(line) for line in done.stdout.splitlines()]
    ours = {
        str(file.relative_to(REPOSITORY))
        for file in files
        if file.is_relative_to(REPOSITORY) and file.stat().st_size
    }
    ours = {
        file
        for file in ours
        if not file.startswith((".venv", *(f"models/{name}/" for name in BASELINES)))
    }
    assert {"train.py", "models/asymvlm/adaptor.py", "utils/run.py"} <= ours
    assert not any(file.startswith("utils/evaluation") for file in ours)
    assert len(ours) <= 24, sorted(ours)


def test_training_writes_a_checkpoint_and_a_log_of_every_epoch(script):
    make_cache("tiny")
    status, _, _ = script(train_script.main, *QUICK, "--method", "asymvlm-psd", "--seed", 3)
    assert status == 0
    content = torch.load("checkpoints/tiny/3/asymvlm-psd.pt", weights_only=True)
    assert set(content) == {"state_dict", "method", "embed_dim", "recipe", "config"}
    assert content["method"] == "asymvlm-psd"
    assert content["embed_dim"] == 64
    assert content["recipe"] == asdict(
        replace(METHODS["asymvlm-psd"].recipes["small"], batch_size=50, epochs=2)
    )
    log = [
        json.loads(line)
        for line in Path("checkpoints/tiny/3/asymvlm-psd.jsonl").read_text().splitlines()
    ]
    assert [record["epoch"] for record in log] == [1, 2]
    assert all(np.isfinite(record["loss"]) and len(record["ladder"]) == 3 for record in log)
    assert log[-1]["lr"] == pytest.approx(1e-6)
    assert log[-1]["temperature"] == pytest.approx(content["state_dict"]["temperature"].item())


def test_a_run_ends_with_its_checkpoint_loss_and_the_next_command(script):
    make_cache("tiny")
    status, _, last = script(train_script.main, *QUICK, "--seed", 3)
    assert status == 0
    loss = json.loads(Path("checkpoints/tiny/3/asymvlm-psd.jsonl").read_text().splitlines()[-1])
    assert last.startswith("checkpoints/tiny/3/asymvlm-psd.pt: 2 epochs in ")
    assert f"loss {loss['loss']:.4f}" in last
    command = "next: python eval.py --dataset tiny --method asymvlm-psd --seed 3"
    assert last.endswith(command)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(script):
    make_cache("tiny")
    written = []
    for seed in (0, 0, 1):
        assert script(train_script.main, *QUICK, "--seed", seed)[0] == 0
        assert (
            script(
                eval_script.main, "--dataset", "tiny", *PLAIN, "--uncer_levels", 5, "--seed", seed
            )[0]
            == 0
        )
        files = (
            f"checkpoints/tiny/{seed}/asymvlm-psd.pt",
            f"results/tiny/{seed}/asymvlm-psd.json",
            f"results/tiny/{seed}/asymvlm-psd.npz",
        )
        written.append([Path(file).read_bytes() for file in files])
    assert written[0] == written[1]
    assert all(a != b for a, b in zip(written[0], written[2], strict=True))


def test_the_paper_recipe_is_the_default(script):
    make_cache("tiny")
    assert script(train_script.main, "--dataset", "tiny", "--epochs", 1)[0] == 0
    recipe = torch.load("checkpoints/tiny/0/asymvlm-psd.pt", weights_only=True)["recipe"]
    assert (recipe["optimizer"], recipe["lr"], recipe["weight_decay"], recipe["batch_size"]) == (
        "sgd",
        1e-2,
        5e-4,
        2048,
    )


def test_uncertainty_learns_how_noisy_a_caption_is(script):
    make_cache("noisy", images=400, captions_per_image=4, dim=32)
    assert (
        script(
            train_script.main,
            "--dataset",
            "noisy",
            "--recipe",
            "small",
            "--epochs",
            12,
            "--batch-size",
            400,
        )[0]
        == 0
    )
    cache = EmbeddingCache("noisy", "train")
    noise = -torch.nn.functional.cosine_similarity(
        cache.text.read().float(), cache.image[cache.image_of_caption].float()
    )
    adaptor = load_adaptor("checkpoints/noisy/0/asymvlm-psd.pt")
    with torch.no_grad():
        uncertainty = adaptor.adapt_text(cache.text.read())[1]
    assert stats.spearmanr(noise, uncertainty).statistic > 0.5


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


class Named(Toy):
    """The same with a loss whose terms have names."""

    def loss(self, z_image, z_text, shift):
        return {
            "distance": (z_image - z_text - shift).square().mean(),
            "size": 0.5 * shift.square().mean(),
        }


def test_the_terms_of_a_loss_are_logged_by_name_resumed_or_not(script, monkeypatch, one_thread):
    monkeypatch.setitem(METHODS, "named", Named)
    make_cache("tiny")
    steps, step = [], train_script.step

    def look(*arguments):
        loss, terms = step(*arguments)
        assert not loss.requires_grad
        assert not any(term.requires_grad for term in terms.values())
        steps.append((loss, terms))
        return loss, terms

    monkeypatch.setattr(train_script, "step", look)
    run = (*LONG, "--method", "named", "--precision", "fp32")
    assert script(train_script.main, *run)[0] == 0
    log = read_log("named")
    for number, record in enumerate(log):
        epoch = steps[3 * number : 3 * number + 3]  # 120 captions: three steps an epoch
        assert list(record["terms"]) == ["distance", "size"]
        for name, mean in record["terms"].items():
            assert mean == pytest.approx(
                sum(terms[name].item() for _, terms in epoch) / 3, rel=1e-5
            )
        assert sum(record["terms"].values()) == pytest.approx(record["loss"], rel=1e-5)
    path = Path("checkpoints/tiny/0/named.pt")
    whole = path.read_bytes()
    path.unlink()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_epoch(patch, 4, die)
        script(train_script.main, *run)
    assert script(train_script.main, *run, "--resume")[0] == 0
    assert path.read_bytes() == whole
    assert read_log("named") == log


def test_the_log_of_a_loss_without_names_has_no_terms(script):
    make_cache("tiny")
    assert script(train_script.main, *QUICK)[0] == 0
    assert not any("terms" in record for record in read_log())


class Normalized(Toy):
    """The same with a batch norm, which counts its batches in an integer."""

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.norm = torch.nn.BatchNorm1d(embed_dim)

    def encode_text(self, z):
        return z, self.trunk(self.norm(z))


def test_counts_of_batches_are_kept_and_older_files_lack_them(script, monkeypatch, one_thread):
    recipe = replace(SMALL, averaged_after=0.5)
    monkeypatch.setattr(Normalized, "recipes", {"small": recipe})
    monkeypatch.setitem(METHODS, "normalized", Normalized)
    make_cache("tiny")
    run = (*LONG, "--method", "normalized")
    assert script(train_script.main, *run)[0] == 0
    path = Path("checkpoints/tiny/0/normalized.pt")
    content = torch.load(path, weights_only=True)
    assert (
        load_adaptor(path).norm.num_batches_tracked
        == content["state_dict"]["norm.num_batches_tracked"]
        == 21
    )
    for older in (
        dict(content["state_dict"]),
        METHODS["normalized"](64).state_dict(),
    ):  # a plain dict, and torch's
        del older["norm.num_batches_tracked"]
        torch.save(content | {"state_dict": older}, path)
        assert load_adaptor(path).norm.num_batches_tracked == 0
    for key, value in (
        ("norm.num_batches_tracked", torch.tensor(1.5)),
        ("norm.running_mean", torch.ones(64).long()),
    ):
        torch.save(content | {"state_dict": content["state_dict"] | {key: value}}, path)
        with pytest.raises(UserError, match=key):
            load_adaptor(path)
    path.unlink()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_epoch(patch, 7, die)
        script(train_script.main, *run)
    state = torch.load(path.with_suffix(".resume.pt"), weights_only=True)
    for weights in (state["state_dict"], state["average"]):
        del weights["norm.num_batches_tracked"]
    torch.save(state, path.with_suffix(".resume.pt"))
    assert script(train_script.main, *run, "--resume")[0] == 0
    resumed = torch.load(path, weights_only=True)["state_dict"]
    assert resumed.pop("norm.num_batches_tracked") == 3
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in resumed.items())


def test_a_method_for_a_single_process_refuses_ranks(script, monkeypatch):
    make_cache("tiny")
    monkeypatch.setattr(METHODS["pcmepp"], "single_process_only", True, raising=False)
    run = (*QUICK, "--method", "asymvlm-psd", "pcmepp")
    with Ranks(2, train_script.main, run, "train.py") as ranks:
        assert ranks.wait() == [2, 2]
        lines = [line for line in ranks.output().splitlines() if line]
    assert len(lines) == 2  # one per rank
    assert all("--method pcmepp" in line and "single process" in line for line in lines)
    assert not Path("checkpoints").exists()
    assert script(train_script.main, *run)[0] == 0


def test_a_loss_that_is_not_finite_stops_with_method_epoch_and_step(script):
    make_cache("tiny")
    status, _, error = script(train_script.main, *QUICK, "--optimizer", "sgd", "--lr", 1e30)
    assert status == 2
    assert "asymvlm-psd, epoch 1, step" in error
    assert "--lr" in error
    assert not Path("checkpoints/tiny/0/asymvlm-psd.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dataset", "nothing"), ["embeddings/nothing", "found caches: tiny"]),
        (("--dataset", "tiny", "--method", "clip"), ["--method", "asymvlm-psd"]),
        (("--dataset", "tiny", "--recipe", "huge"), ["--recipe huge", "paper, small"]),
        (("--dataset", "tiny", "--precision", "fp16"), ["--precision fp16", "bf16 or fp32"]),
        (("--dataset", "tiny", "--epochs", 0), ["--epochs", "at least 1"]),
        (("--dataset", "tiny", "--batch-size", -1), ["--batch-size", "at least 1"]),
        (("--dataset", "tiny", "--lr", "nan"), ["--lr", "nan"]),
        (("--dataset", "tiny", "--seed", -1), ["--seed", "at least 0"]),
        (("--dataset", "tiny", "--seed", 2**64), ["--seed", "below 2^63"]),
        (("--dataset", "../tiny"), ["--dataset", "plain name"]),
        (("--dataset", "tiny", "--device", "cuda:9"), ["--device cuda:9", "cpu"]),
    ],
)
def test_wrong_input_is_one_line_that_names_it(arguments, words, script, workdir):
    make_cache("tiny")
    before = sorted(workdir.rglob("*"))
    status, printed, error = script(train_script.main, *arguments)
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
        (b"", "the file is empty"),
        (b"PK\x03\x04" + bytes(range(256)), "can be read safely"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            load_adaptor(path)
    for change in (
        {"method": "clip"},
        {"embed_dim": 65},
        {"embed_dim": "64"},
        {"state_dict": {}},
        {"state_dict": 3},
    ):
        torch.save(
            {"state_dict": adaptor.state_dict(), "method": "asymvlm-psd", "embed_dim": 32} | change,
            path,
        )
        with pytest.raises(UserError, match=r"asymvlm-psd\.pt"):
            load_adaptor(path)
    weights = adaptor.state_dict()
    weights["temperature"] = torch.tensor(float("nan"))
    torch.save({"state_dict": weights, "method": "asymvlm-psd", "embed_dim": 32}, path)
    with pytest.raises(UserError, match="'temperature' is not finite"):
        load_adaptor(path)


# Stopped and resumed.


@pytest.fixture
def one_thread():
    """Small steps are fastest so, above all where other processes want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stop_in_epoch(monkeypatch, number, act):
    """Let training meet act(losses) when the losses of an epoch are looked at."""
    check = train_script.check_finite

    def check_or_act(losses, adaptor, method, epoch):
        check(act(losses) if epoch == number else losses, adaptor, method, epoch)

    monkeypatch.setattr(train_script, "check_finite", check_or_act)


def interrupt(_):
    raise KeyboardInterrupt


def die(_):
    raise SystemExit  # leaves what a kill leaves: nothing is saved on the way out


def read_log(method="asymvlm-psd"):
    lines = Path(f"checkpoints/tiny/0/{method}.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key != "seconds"}
        for line in lines
    ]


LONG = (
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
)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_equals_unbroken_run(method, script, monkeypatch, one_thread):
    make_cache("tiny")
    path = Path(f"checkpoints/tiny/0/{method}.pt")
    run = (*LONG, "--method", method, "--recipe", recipe_of(method))
    assert script(train_script.main, *run)[0] == 0
    whole, log = path.read_bytes(), read_log(method)
    path.unlink()
    for flags, epoch in (((), 4), (("--resume",), 6)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_in_epoch(patch, epoch, die)
            script(train_script.main, *run, *flags)
        assert not path.exists()
        assert len(torch.load(path.with_suffix(".resume.pt"), weights_only=True)["log"]) == (
            2 if epoch == 4 else 4
        )
    assert script(train_script.main, *run, "--resume")[0] == 0
    assert path.read_bytes() == whole
    assert read_log(method) == log
    assert sorted(file.name for file in path.parent.iterdir()) == sorted(
        [path.name, f"{method}.jsonl"]
    )


def test_ctrl_c_saves_the_last_finished_epoch_and_says_how_to_go_on(
    script, monkeypatch, one_thread
):
    make_cache("tiny")
    assert script(train_script.main, *LONG)[0] == 0
    path = Path("checkpoints/tiny/0/asymvlm-psd.pt")
    whole = path.read_bytes()
    path.unlink()
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 4, interrupt)
        status, _, last = script(train_script.main, *LONG)
    assert status == 130
    assert "saved after epoch 3; the same command with --resume goes on from there" in last
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 1, interrupt)  # not again
        assert script(train_script.main, *LONG, "--resume")[0] == 0
    assert path.read_bytes() == whole


def test_resume_without_a_saved_state_starts_fresh(script, monkeypatch, one_thread):
    make_cache("tiny")
    assert script(train_script.main, *LONG)[0] == 0
    path = Path("checkpoints/tiny/0/asymvlm-psd.pt")
    whole = path.read_bytes()
    path.unlink()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_epoch(patch, 2, die)
        script(train_script.main, *LONG)
    assert not path.with_suffix(".resume.pt").exists()
    assert script(train_script.main, *LONG, "--resume")[0] == 0
    assert path.read_bytes() == whole


def test_a_finished_run_is_not_trained_again_by_resume(script, one_thread):
    make_cache("tiny")
    assert script(train_script.main, *LONG)[0] == 0
    path = Path("checkpoints/tiny/0/asymvlm-psd.pt")
    before = path.stat().st_mtime_ns
    status, _, last = script(train_script.main, *LONG, "--resume")
    assert status == 0
    assert f"{path}: finished already" in last
    assert path.stat().st_mtime_ns == before
    status, _, last = script(train_script.main, *LONG, "--resume", "--lr", 0.5)
    assert status == 2
    assert f"{path}: belongs to a run with other settings: lr was 0.001, now 0.5" in last
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "changes", "expected"),
    [
        (("--lr", 0.5), {}, "lr was 0.001, now 0.5"),
        (("--epochs", 9), {}, "epochs was 7, now 9"),
        (("--precision", "bf16"), {}, "precision was fp32, now bf16"),
        ((), {"images": 41}, "captions was 120, now 123; images was 40, now 41"),
        ((), {"seed": 5}, "cache was "),
        ((), {"meta": {"model": "other"}}, "clip was "),
    ],
)
def test_a_state_of_other_settings_is_refused_with_the_difference(
    script, monkeypatch, one_thread, flags, changes, expected
):
    make_cache("tiny")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_epoch(patch, 4, die)
        script(train_script.main, *LONG, "--precision", "fp32")
    state = Path("checkpoints/tiny/0/asymvlm-psd.resume.pt")
    before = state.read_bytes()
    make_cache("tiny", **changes)
    status, _, last = script(train_script.main, *LONG, "--precision", "fp32", "--resume", *flags)
    assert status == 2
    assert expected in last
    assert state.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"progress": {}},
        {"log": 3},
        {"log": [1]},
        {"state_dict": {}},
        {"config": 3},
        {"recipe": None},
        {"progress": None},
    ],
)
def test_a_state_that_is_none_is_refused(script, monkeypatch, one_thread, change):
    make_cache("tiny")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_epoch(patch, 4, die)
        script(train_script.main, *LONG)
    state = Path("checkpoints/tiny/0/asymvlm-psd.resume.pt")
    torch.save(torch.load(state, weights_only=True) | change, state)
    status, _, last = script(train_script.main, *LONG, "--resume")
    assert status == 2
    assert f"{state}: " in last
    assert "without --resume" in last


@pytest.mark.parametrize("save_every", [2, 100])
def test_a_loss_that_is_not_finite_keeps_the_last_good_state(
    script, monkeypatch, one_thread, save_every
):
    make_cache("tiny")
    stop_in_epoch(monkeypatch, 6, lambda losses: losses * float("nan"))
    status, _, last = script(train_script.main, *LONG, "--save-every", save_every)
    assert status == 2
    assert "asymvlm-psd, epoch 6, step 1: the loss is nan" in last
    path = Path("checkpoints/tiny/0/asymvlm-psd.pt")
    assert not path.exists()
    state = torch.load(path.with_suffix(".resume.pt"), weights_only=True)
    assert len(state["log"]) == 5
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())


def test_weights_that_are_not_finite_are_not_saved(script, monkeypatch, one_thread):
    make_cache("tiny")

    def ruin(adaptor, *_):
        """A step whose loss is fine and whose update is not."""
        next(adaptor.parameters()).data.fill_(float("inf"))
        return torch.tensor(1.0), {}

    monkeypatch.setattr(train_script, "step", ruin)
    status, _, last = script(train_script.main, *LONG)
    assert status == 2
    assert "asymvlm-psd, epoch 1, step 3: it leaves weights that are not finite" in last
    assert [path.name for path in Path("checkpoints/tiny/0").iterdir()] == ["asymvlm-psd.jsonl"]


def test_two_runs_of_one_method_and_seed_are_refused(script, one_thread):
    make_cache("tiny")
    with locked(Path("checkpoints/tiny/0/.asymvlm-psd.lock"), "it"):
        status, _, last = script(train_script.main, *QUICK)
        assert status == 2
        assert "checkpoints/tiny/0/asymvlm-psd.pt: another process is at work on it" in last
        assert script(train_script.main, *QUICK, "--seed", 1)[0] == 0
    assert script(train_script.main, *QUICK)[0] == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_one_and_a_batch_all_alike_are_trained_on(method, script, one_thread):
    make_cache("tiny", images=3, captions_per_image=1)
    run = (*QUICK, "--method", method, "--recipe", recipe_of(method))
    assert script(train_script.main, *run, "--batch-size", 2)[0] == 0  # the last batch is one pair
    for split in ("train", "val"):
        alike = torch.ones(4, 64).half()
        write_split(
            Path("embeddings/alike") / split,
            alike,
            alike,
            [0, 1, 2, 3],
            ["a"] * 4,
            ["a.png"] * 4,
            None,
            {},
        )
    assert script(train_script.main, *run, "--dataset", "alike")[0] == 0


def test_bfloat16_that_is_not_native_is_told_to_be_slow(monkeypatch, caplog):
    monkeypatch.setattr("utils.device._computes_bfloat16", lambda device: False)
    assert pick_precision("bf16", torch.device("cpu")) == torch.bfloat16
    assert "--precision bf16: cpu does not compute it natively" in caplog.text
    caplog.clear()
    assert pick_precision("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setattr("utils.device._computes_bfloat16", lambda device: True)
    assert pick_precision("bf16", torch.device("cpu")) == torch.bfloat16
    assert not caplog.text


def test_a_state_from_before_sums_were_kept_is_resumed_and_one_of_another_clip_is_not(tmp_path):
    recipe, clip = (
        SMALL,
        {"model": "m", "model_sha256": "a", "pretrained": "p", "pretrained_sha256": "b"},
    )
    for stored, refused in (
        ({"model": "m", "pretrained": "p"}, False),
        (clip, False),
        (clip | {"model": "n"}, True),
    ):
        content = {"config": {"seed": 0, "clip": stored}, "recipe": asdict(recipe)}
        save_tensors(content, tmp_path / "state.pt")
        with (
            pytest.raises(UserError, match="other settings")
            if refused
            else contextlib.nullcontext()
        ):
            assert (
                load_run(tmp_path / "state.pt", [recipe], {"seed": 0, "clip": clip}, "cure")
                == content
            )


@pytest.mark.parametrize("lr", [3e-3, 2e-3])
def test_a_state_of_the_former_small_recipe_goes_on_as_it_was_begun(script, monkeypatch, lr):
    make_cache("tiny")
    run = ("--dataset", "tiny", "--recipe", "small")
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 4, interrupt)
        former = ("--lr", lr, "--batch-size", 1024, "--epochs", 10)
        assert script(train_script.main, *run, *former)[0] == 130
    path = Path("checkpoints/tiny/0/asymvlm-psd.pt")
    state = torch.load(path.with_suffix(".resume.pt"), weights_only=True)
    for field in ("batch_share", "min_steps", "eps"):
        del state["recipe"][field]
    save_tensors(state, path.with_suffix(".resume.pt"))
    status, _, last = script(train_script.main, *run, "--resume")
    if lr != 3e-3:  # that was never the recipe
        assert status == 2
        assert "lr was 0.002, now 0.001" in last
        return
    assert status == 0
    recipe = torch.load(path, weights_only=True)["recipe"]
    assert (recipe["lr"], recipe["batch_size"], recipe["epochs"]) == (3e-3, 1024, 10)
    assert script(train_script.main, *run, "--resume")[0] == 0  # finished already
    assert load_adaptor(path).recipe == recipe


@pytest.mark.parametrize(
    ("captions", "batch_size", "epochs"),
    [(1_400, 175, 19), (17_500, 1024, 10), (50_000, 1024, 10), (120, 15, 19), (10, 2, 30)],
)
def test_the_small_recipe_fits_the_cache(captions, batch_size, epochs):
    recipe = METHODS["asymvlm-psd"].recipes["small"].fitted_to(captions)
    assert (recipe.batch_size, recipe.epochs) == (batch_size, epochs)
    assert recipe.steps(captions) * recipe.epochs >= 150
    changed = train_script.settle(SMALL, {"epochs": 1, "batch_size": 7}, captions)
    assert (changed.batch_size, changed.epochs) == (7, 1)


def test_a_finished_checkpoint_is_not_replaced_by_another(script):
    make_cache("tiny")
    run = (*QUICK, "--precision", "fp32")
    assert script(train_script.main, *run)[0] == 0
    path = Path("checkpoints/tiny/0/asymvlm-psd.pt")
    first = path.read_bytes()
    assert script(train_script.main, *run)[0] == 0  # the same settings
    for change, words in (
        (("--epochs", 1), "epochs was 2, now 1"),
        (("--lr", 0.5), "lr was 0.001, now 0.5"),
        (("--precision", "bf16"), "precision was fp32, now bf16"),
        (("--validation", 0.1), "validation was None, now 0.1"),
    ):
        status, _, last = script(train_script.main, *run, "--method", "pfe", "asymvlm-psd", *change)
        assert status == 2
        assert words in last and "--overwrite" in last
        assert path.read_bytes() == first
        assert not path.with_name("pfe.pt").exists()  # nothing was trained before
    make_cache("tiny", seed=3)
    status, _, last = script(train_script.main, *run)
    assert status == 2 and "cache was" in last
    assert script(train_script.main, *run, "--overwrite")[0] == 0
    assert path.read_bytes() != first
    path.write_bytes(b"damaged")
    assert script(train_script.main, *run, "--epochs", 1)[0] == 0


def test_ctrl_c_before_the_first_epoch_says_that_nothing_was_saved(script, monkeypatch):
    make_cache("tiny")
    stop_in_epoch(monkeypatch, 1, interrupt)
    status, _, last = script(train_script.main, *LONG)
    assert status == 130
    assert "nothing was saved; give the same command again" in last


def test_normalised_embeddings_are_told_and_raw_ones_are_not(script):
    make_cache("tiny")
    assert script(train_script.main, *QUICK)[0] == 0
    assert "norm 1" not in script.stderr
    cache = EmbeddingCache("tiny", "train")
    z = [
        torch.nn.functional.normalize(rows.read().float(), dim=1)
        for rows in (cache.image, cache.text)
    ]
    make_cache("unit", image=z[0].half(), text=z[1].half())
    assert script(train_script.main, *QUICK, "--dataset", "unit")[0] == 0
    assert "the embeddings of embeddings/unit/train have norm 1" in script.stderr


def test_a_state_from_before_variances_could_be_started_goes_on_as_it_was_begun(script):
    make_cache("tiny")
    run = (
        "--dataset",
        "tiny",
        "--method",
        "pcmepp",
        "--recipe",
        "small",
        "--batch-size",
        50,
        "--epochs",
        3,
    )
    path = Path("checkpoints/tiny/0/pcmepp.pt")
    states = []

    def stop_after_two(content, file):
        states.append(content)
        save_tensors(content, file)
        if len(states) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.run.save_tensors", stop_after_two)
        assert script(train_script.main, *run, "--save-every", 1)[0] == 130
    state = torch.load(path.with_suffix(".resume.pt"), weights_only=True)
    assert state["recipe"].pop("start_variance") == 1.0
    save_tensors(state, path.with_suffix(".resume.pt"))
    assert script(train_script.main, *run, "--resume")[0] == 0
    content = torch.load(path, weights_only=True)
    assert content["recipe"] == state["recipe"] | {"start_variance": None}
    assert len(path.with_suffix(".jsonl").read_text().splitlines()) == 3
