"""train.py --tag: a second run of a method beside the first, wherever a method is named."""

import doctest
from pathlib import Path

import torch

import eval as eval_script
import models
import train as train_script
from models import expand_groups
from tests.conftest import load_result, make_cache
from utils.questions import compare

TRAIN = ("--dataset", "tiny", "--recipe", "small", "--batch-size", 50)
EVAL = ("--dataset", "tiny", "--resamples", 100)


def test_names_of_methods_and_groups_take_a_tag():
    assert doctest.testmod(models).failed == 0
    assert expand_groups(["pfe", "all@demo"])[:2] == ["asymvlm-psd@demo", "asymvlm-vmf@demo"]
    assert expand_groups(["pfe@a", "pfe", "pfe@a"]) == ["pfe@a", "pfe"]


def test_two_runs_of_a_method_lie_side_by_side(script):
    make_cache("tiny")
    assert script(train_script.main, *TRAIN, "--epochs", 2, "--seed", 0, 1)[0] == 0
    first = Path("checkpoints/tiny/0/asymvlm-psd.pt").read_bytes()
    second = ("--tag", "slow", "--lr", 1e-4, "--epochs", 3)
    assert script(train_script.main, *TRAIN, *second, "--seed", 0)[0] == 0
    assert "eval.py --dataset tiny --method asymvlm-psd@slow" in script.stderr
    content = torch.load("checkpoints/tiny/0/asymvlm-psd@slow.pt", weights_only=True)
    assert (content["method"], content["recipe"]["lr"]) == ("asymvlm-psd", 1e-4)
    assert Path("checkpoints/tiny/0/asymvlm-psd.pt").read_bytes() == first
    both = ("--method", "asymvlm-psd", "asymvlm-psd@slow")
    status, _, message = script(eval_script.main, *EVAL, *both, "--seed", 0, 1)
    assert status == 2
    assert "--method asymvlm-psd --seed 1 --tag slow --recipe small --epochs 3" in message
    assert script(train_script.main, *TRAIN, *second, "--seed", 1)[0] == 0
    assert script(eval_script.main, *EVAL, *both, "--seed", 0, 1)[0] == 0, script.stderr
    page = Path("results/tiny/comparison.md").read_text()
    assert "| asymvlm-psd |" in page and "| asymvlm-psd@slow |" in page
    assert "AsymVLM (PSD), slow" in Path("results/tiny/paper.tex").read_text()
    assert load_result("tiny", 1, "asymvlm-psd@slow")[0]["config"]["epochs"] == 3
    flags = ("--dataset", "tiny", "--seed", 0, 1, "--resamples", 100)
    names = ("asymvlm-psd", "asymvlm-psd@slow")
    assert script(eval_script.main, *flags, "--compare", *names)[0] == 0
    assert script(compare.main, *flags, "--method", *names)[0] == 0
    assert script(eval_script.main, *flags[:2], "--method", names[1], "--export", "a.csv")[0] == 0
    assert script(train_script.main, *TRAIN, *second, "--seed", 0, "--resume")[0] == 0
    assert "finished already" in script.stderr


def test_a_tag_or_method_that_is_none_is_refused(script, workdir):
    make_cache("tiny")
    status, _, message = script(train_script.main, *TRAIN, "--tag", "a/b")
    assert (status, "is no tag" in message) == (2, True)
    status, _, message = script(eval_script.main, *EVAL, "--method", "clip@x")
    assert (status, "is not a method: choose from asymvlm-psd" in message) == (2, True)
