"""Checkpoints and caches as the paper's repository writes them are read as they are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import eval as eval_script
from models import GROUPS, METHODS
from tests.conftest import load_result, make_cache
from utils.checkpoint import load_adaptor
from utils.cli import UserError

DIM = 48


class Branch(nn.Module):
    """One branch of an adaptor as that repository names it: four linear layers under one name."""

    def __init__(self, name, temperature=False):
        super().__init__()
        layers = [
            nn.Linear(DIM, 1024),
            nn.ReLU(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
            nn.Linear(1024, DIM),
        ]
        setattr(self, name, nn.Sequential(*layers))
        if temperature:
            self.temperature = nn.Parameter(torch.tensor(2.5))


class Bayes(nn.Module):
    def __init__(self):
        super().__init__()
        self.mod = nn.Sequential(
            nn.Linear(DIM, 1024),
            nn.ReLU(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
            nn.Dropout(0.0),
            nn.Linear(1024, DIM),
        )
        for block in ("block_mu", "block_alpha", "block_beta"):
            setattr(self, block, nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM)))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift, self.negative_scale = (
            nn.Parameter(torch.full((1,), 4.0)),
            nn.Parameter(torch.full((1,), 6.0)),
        )


def their_model(method):
    torch.manual_seed(0)
    if method.startswith("asymvlm"):
        return nn.ModuleDict({"text_adaptor": Branch("etta", temperature=True)})
    if method == "pfe":
        return nn.ModuleDict({"image_adaptor": Branch("logvar"), "text_adaptor": Branch("logvar")})
    if method == "probvlm":
        return nn.ModuleDict({"img_BayesCap": Bayes(), "txt_BayesCap": Bayes()})
    encoders = {"img_enc": Branch("logvar"), "txt_enc": Branch("logvar")}
    return nn.ModuleDict(encoders | ({"loss_func": Scale()} if method == "pcmepp" else {}))


def their_uncertainty(model, method, z):
    """The uncertainty of texts z (N, D), computed with their modules."""
    if method.startswith("asymvlm"):
        return 1 / model["text_adaptor"].etta(z).norm(dim=1)
    if method == "pfe":
        return nn.functional.softplus(model["text_adaptor"].logvar(z)).mean(dim=1)
    if method == "probvlm":
        net = model["txt_BayesCap"]
        h = net.mod(z) + z
        inv_alpha, beta = (
            nn.functional.softplus(block(h)) for block in (net.block_alpha, net.block_beta)
        )
        alpha, b = (1 / (inv_alpha + 1e-5)).clamp(1e-4, 5), (beta + 0.1).clamp(0.1, 5)
        return 1 / (alpha**2 * (torch.lgamma(3 / b) - torch.lgamma(1 / b)).exp()).mean(dim=1)
    return model["txt_enc"].logvar(nn.functional.normalize(z, dim=1)).exp().mean(dim=1)


@pytest.mark.parametrize("method", GROUPS["all"])
def test_a_checkpoint_of_the_papers_repository_evaluates_as_it_is(method, script):
    make_cache("paper", images=20, captions_per_image=2, dim=DIM)
    for file in Path("embeddings/paper/val").glob("*.json"):
        if file.name != "cap_id_to_img_id.json":  # their caches have three files
            file.unlink()
    model, path = their_model(method), Path("checkpoints/paper/0") / f"{method}.pt"
    path.parent.mkdir(parents=True)
    torch.save(model.state_dict(), path)
    assert (
        script(eval_script.main, "--dataset", "paper", "--method", method, "--uncer_levels", 4)[0]
        == 0
    )
    result, queries = load_result("paper", 0, method)
    text = torch.load("embeddings/paper/val/text.pt", weights_only=True).float()
    with torch.no_grad():
        expected = their_uncertainty(model, method, text).numpy()
    np.testing.assert_allclose(queries["t2i_uncertainty"], expected, rtol=1e-4)
    owners = json.loads(Path("embeddings/paper/val/cap_id_to_img_id.json").read_text())
    right = queries["t2i_top1"] == np.array([owners[str(row)] for row in range(40)])
    levels = np.array_split(
        right[np.argsort(expected, kind="stable")], 4
    )  # their protocol, on our answers
    assert result["t2i"] == pytest.approx([level.mean() for level in levels])
    assert len(result["i2t"]) == 4


def test_the_two_asymvlm_methods_are_told_apart_by_name_or_by_argument(workdir):
    torch.save(their_model("asymvlm-psd").state_dict(), "asymvlm-vmf.pt")
    assert type(load_adaptor("asymvlm-vmf.pt")) is METHODS["asymvlm-vmf"]
    torch.save(their_model("asymvlm-psd").state_dict(), "final.pt")
    with pytest.raises(UserError, match=r"final\.pt: may be of asymvlm-psd or of asymvlm-vmf"):
        load_adaptor("final.pt")
    adaptor = load_adaptor("final.pt", method="asymvlm-psd")
    assert type(adaptor) is METHODS["asymvlm-psd"]
    assert adaptor.temperature.item() == 2.5
    assert adaptor.embed_dim == DIM


def test_scale_and_shift_of_pcmepp_are_taken_over(workdir):
    torch.save(their_model("pcmepp").state_dict(), "any.pt")
    adaptor = load_adaptor("any.pt")
    assert (adaptor.shift.item(), adaptor.negative_scale.item()) == (4.0, 6.0)


def test_a_state_dict_of_something_else_is_refused(workdir):
    for content in (
        {"conv.weight": torch.zeros(3)},
        {"img_enc.logvar.0.weight": torch.zeros(3)},
        {},
        [1],
        {"text_adaptor.etta.6.bias": 3},
    ):
        torch.save(content, "asymvlm-psd.pt")
        with pytest.raises(UserError, match=r"asymvlm-psd\.pt"):
            load_adaptor("asymvlm-psd.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_checkpoint_under_ddp_or_torch_compile_is_read(workdir, prefix):
    weights = {
        f"{prefix}text_adaptor.{name}": value
        for name, value in Branch("etta", True).state_dict().items()
    }
    torch.save(weights, "asymvlm-psd.pt")
    adaptor = load_adaptor("asymvlm-psd.pt")
    assert adaptor.method == "asymvlm-psd"
    assert adaptor.temperature.item() == 2.5


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "the file is empty"), (b"version https://git-lfs.github.com/spec/v1", "git lfs pull")],
)
def test_a_checkpoint_that_was_not_fetched_is_named(workdir, content, words):
    Path("asymvlm-psd.pt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_adaptor("asymvlm-psd.pt")
