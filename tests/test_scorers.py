"""--score: the frozen CLIP or the authors' own score ranks, the method is uncertain; published results stay."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as eval_script
from datasets.embedding import EmbeddingCache
from datasets.texts import write_texts
from models import GROUPS, METHODS
from models.base import SMALL, Adaptor
from models.layers import mlp
from tests.conftest import all_bytes, load_result, make_cache
from utils.checkpoint import load_adaptor, save_adaptor
from utils.evaluation import ranking
from utils.evaluation.scorers import OWN, rank
from utils.evaluation.training_free import every_scorer
from utils.questions.prompts import describe_prompts, example_captions

EVAL = ("--dataset", "tiny", "--no-plots", "--resamples", 100)
OWN_SCORE = [
    "asymvlm-psd",
    "asymvlm-vmf",
    "probvlm",
]  # of the six, those that do not rank by the frozen cosine


def save_methods(*methods, seeds=(0,)):
    """A cache, and a checkpoint of some weights of each method and seed; the flags that evaluate them."""
    relevance = [sorted({i // 3, (i * 7) % 40, (i * i) % 40}) for i in range(120)]
    make_cache("tiny", relevance=relevance)
    for method in methods:
        for seed in seeds:
            torch.manual_seed(seed)
            save_adaptor(
                METHODS[method](64), method, SMALL, {}, Path(f"checkpoints/tiny/{seed}/{method}.pt")
            )
    return (*EVAL, "--method", *methods, "--seed", *seeds)


def figures(folder):
    """{(table, method): {figure: mean}} of a comparison.csv."""
    rows = {}
    for row in csv.DictReader((Path(folder) / "comparison.csv").read_text().splitlines()):
        if row["seed"] == "mean":
            is_second = row["score"] != "published" and not folder.endswith(row["score"])
            name = f"{row['method']}, {row['score']} score" if is_second else row["method"]
            rows.setdefault((row["section"], name), {})[row["metric"]] = row["value"]
    return rows


@pytest.mark.parametrize("folds", [1, 4])
def test_under_the_frozen_score_recall_is_the_frozen_cosines_and_uncertainty_the_methods(
    script, folds
):
    flags = (*save_methods(*GROUPS["all"]), "--folds", folds)
    assert script(eval_script.main, *flags)[0] == 0
    assert script(eval_script.main, *flags, "--score", "frozen")[0] == 0
    found, cosine = (
        figures("results/tiny/frozen"),
        load_result("tiny", "baselines", "softmax-entropy")[1],
    )
    tables = {table for table, method in found if method == "frozen cosine"}
    assert {"t2i", "i2t", "ambiguity", "recall"} <= tables
    for method in GROUPS["all"]:
        for table in tables:
            for figure, mean in found[table, "frozen cosine"].items():
                if mean and ("R@" in figure or "RSUM" in figure or "Precision" in figure):
                    assert found[table, method][figure] == mean, (table, figure)
        published, frozen = (
            load_result("tiny", 0, method + suffix)[1] for suffix in ("", ".frozen")
        )
        for field in (
            "t2i_rank",
            "t2i_top1",
            "i2t_rank",
            "i2t_top1",
            "t2i_relevant_rank",
            "i2t_ap_at_r",
        ):
            assert (frozen[field] == cosine[field]).all()
        assert (frozen["t2i_uncertainty"] == published["t2i_uncertainty"]).all()
        assert (frozen["i2t_uncertainty"] == published["t2i_uncertainty"][frozen["i2t_top1"]]).all()
        if "i2t_image_uncertainty" in published:
            assert (frozen["i2t_image_uncertainty"] == published["i2t_image_uncertainty"]).all()


def test_published_results_stay_and_hold_both_rows_of_methods_with_a_score_of_their_own(script):
    flags = save_methods(*GROUPS["all"])
    status, printed, _ = script(eval_script.main, *flags)
    assert status == 0
    before, found = all_bytes("results"), figures("results/tiny")
    assert {method for _, method in found if method.endswith(", frozen score")} == {
        f"{m}, frozen score" for m in OWN_SCORE
    }
    for method in OWN_SCORE:
        for table in ("t2i", "i2t"):
            assert (
                found[table, f"{method}, frozen score"]["R@1"]
                == found[table, "frozen cosine"]["R@1"]
            )
            assert found[table, method]["R@1"] != found[table, "frozen cosine"]["R@1"]
        assert "score" not in load_result("tiny", 0, method)[0]["config"]
        assert load_result("tiny", 0, f"{method}.frozen")[0]["config"]["score"] == "frozen"
    assert {path.name for path in Path("results/tiny/0").glob("*.frozen.npz")} == {
        f"{m}.frozen.npz" for m in OWN_SCORE
    }
    assert "asymvlm-psd, frozen score" in printed
    status, printed, _ = script(eval_script.main, *flags, "--score", "frozen")
    assert status == 0
    assert "ranked by the frozen cosine" in printed.splitlines()[0]
    assert "frozen score" not in printed
    after = all_bytes("results")
    assert {name: content for name, content in after.items() if name in before} == before
    assert "--score frozen" in Path("results/tiny/frozen/README.md").read_text()


def test_plots_show_a_method_once(script):
    flags = save_methods("asymvlm-psd", "pfe")
    plots = [flag for flag in flags if flag != "--no-plots"]
    assert script(eval_script.main, *plots)[0] == 0
    assert script(eval_script.main, *plots, "--score", "frozen")[0] == 0
    for name in ("levels", "risk-coverage", "length", "ambiguity", "ladder"):
        assert b"frozen score" not in Path(f"results/tiny/{name}.pdf").read_bytes()
        assert Path(f"results/tiny/frozen/{name}.png").exists()


def test_the_comparison_says_what_each_uncertainty_needs(script):
    _, printed, _ = script(eval_script.main, *save_methods("asymvlm-psd", "pfe"))
    expected = {
        "frozen cosine": "-",
        "softmax-entropy": "gallery",
        "top1-cosine": "gallery",
        "margin": "gallery",
        "reference-entropy": "reference",
        "reference-entropy-fitted": "reference, pairs",
        "caption-length": "-",
        "asymvlm-psd": "training",
        "asymvlm-psd, frozen score": "training",
        "pfe": "training",
    }
    compared = printed.partition("\ntext-to-image\n")[2].partition("\ntext-to-image, right")[0]
    for text in (Path("results/tiny/comparison.md").read_text(), compared):
        lines = [line.strip("| ") for line in text.splitlines()]
        assert sum(line.endswith("needs") for line in lines) == 3
        for row, needs in expected.items():
            mine = [line for line in lines if line.startswith((f"{row} |", f"{row}  "))][:3]
            assert len(mine) == 3
            assert all(line.endswith((f"| {needs}", f" {needs}")) for line in mine)


def test_either_score_can_be_compared(script):
    flags = save_methods("asymvlm-psd", "pfe", seeds=(0, 1))
    assert script(eval_script.main, *flags)[0] == 0
    compare = (*EVAL, "--seed", 0, 1, "--compare")
    status, printed, _ = script(eval_script.main, *compare, "asymvlm-psd", "asymvlm-psd.frozen")
    assert status == 0
    assert "asymvlm-psd against asymvlm-psd.frozen" in printed
    assert Path("results/tiny/asymvlm-psd-against-asymvlm-psd.frozen.txt").read_text() == printed
    aurc = [
        np.mean([load_result("tiny", seed, name)[0]["metrics"]["t2i"]["AURC"] for seed in (0, 1)])
        for name in ("asymvlm-psd", "asymvlm-psd.frozen")
    ]
    assert next(line for line in printed.splitlines() if line.startswith("AURC")).split()[1:3] == [
        f"{x:.3f}" for x in aurc
    ]
    status, _, error = script(eval_script.main, *compare, "pfe.frozen", "asymvlm-psd.frozen")
    assert status == 2
    assert (
        "results/tiny/0/pfe.frozen.npz" in error
        and "--method pfe --seed 0 1 --score frozen" in error
    )
    assert script(eval_script.main, *flags, "--score", "frozen")[0] == 0
    named = script(eval_script.main, *compare, "pfe.frozen", "softmax-entropy")
    assert named[0] == 0
    assert (
        script(eval_script.main, *compare, "pfe", "softmax-entropy", "--score", "frozen") == named
    )
    error = script(eval_script.main, *compare, "pfe", "pfe.frozen", "--score", "frozen")[2]
    assert "two different methods" in error
    assert "choose from" in script(eval_script.main, *compare, "pfe.other", "pfe")[2]
    error = script(eval_script.main, *compare, "pfe", "pfe.frozen", "--score", "own")[2]
    assert "results/tiny/0/pfe.own.npz" in error and "--method pfe --seed 0 1 --score own" in error


def least_alike(self, image, text):
    """An own score whose order is turned round, and which variance enters."""
    assert min(len(image[0]), len(text[0])) <= ranking.TILE
    return -torch.nn.functional.normalize(image[0], dim=1) @ text[0].T + text[1].sum(dim=1)


def test_under_the_own_score_the_authors_rank_and_uncertainty_stays(script, monkeypatch):
    monkeypatch.setattr(METHODS["pfe"], "own_score", least_alike)
    monkeypatch.setattr(ranking, "TILE", 16)
    flags = save_methods("asymvlm-psd", "pfe")
    assert script(eval_script.main, *flags)[0] == 0
    before = all_bytes("results")
    status, printed, _ = script(eval_script.main, *flags, "--score", "own")
    assert status == 0
    assert printed.splitlines()[0].endswith("; each ranked by its authors' own score")
    assert "frozen score" not in printed
    assert {
        name: content for name, content in all_bytes("results").items() if name in before
    } == before
    assert "--score own" in Path("results/tiny/own/README.md").read_text()
    (document, own), published = load_result("tiny", 0, "pfe.own"), load_result("tiny", 0, "pfe")[1]
    assert document["config"]["score"] == "own"
    assert (own["t2i_uncertainty"] == published["t2i_uncertainty"]).all()
    assert (own["i2t_uncertainty"] == published["t2i_uncertainty"][own["i2t_top1"]]).all()
    cache, adaptor = EmbeddingCache("tiny", "val"), load_adaptor("checkpoints/tiny/0/pfe.pt")
    with torch.no_grad():
        image, text = (z.read().float() for z in (cache.image, cache.text))
        variance = adaptor.encode_text(text)[1].double().sum(dim=1)
        score = variance - torch.nn.functional.normalize(image.double(), dim=1) @ text.double().T
        right = score[cache.image_of_caption, torch.arange(len(text))]
    assert (own["t2i_rank"] == 1 + (score > right).sum(dim=0).numpy()).all()
    assert (own["i2t_top1"] == score.argmax(dim=1)[own["i2t_query"]].numpy()).all()
    same, alike = (
        load_result("tiny", 0, "asymvlm-psd.own")[1],
        load_result("tiny", 0, "asymvlm-psd")[1],
    )
    assert all((same[field] == alike[field]).all() for field in alike)
    compare = (*EVAL, "--compare", "pfe", "asymvlm-psd")
    named = script(eval_script.main, *EVAL, "--compare", "pfe.own", "asymvlm-psd.own")
    assert named[0] == 0
    assert script(eval_script.main, *compare, "--score", "own") == named
    (answer,) = describe_prompts(adaptor, cache, ["a prompt"], cache.text.read()[:1], score="own")
    assert answer["closest"] == [cache.images[i] for i in score[:, 0].topk(3).indices.tolist()]


def test_prompts_and_example_captions_are_answered_by_the_score_chosen(workdir, tmp_path):
    save_methods("asymvlm-psd")
    cache, adaptor = (
        EmbeddingCache("tiny", "val"),
        load_adaptor("checkpoints/tiny/0/asymvlm-psd.pt"),
    )
    texts, z = [f"prompt {i}" for i in range(20)], cache.text.read()[:20]
    image, text = (
        torch.nn.functional.normalize(x.double(), dim=1) for x in (cache.image.read(), z)
    )
    with torch.no_grad():
        scores = {"published": adaptor.similarity(cache.image.read(), z), "frozen": image @ text.T}
    answers = {score: describe_prompts(adaptor, cache, texts, z, score=score) for score in scores}
    for score, similarity in scores.items():
        for answer in answers[score]:
            row = int(answer["prompt"].split()[1])
            assert answer["closest"] == [
                cache.images[i] for i in similarity[:, row].topk(3).indices.tolist()
            ]
    told = [
        [(a["prompt"], a["uncertainty"], a["percentile"]) for a in answers[score]]
        for score in scores
    ]
    assert told[0] == told[1]
    assert answers["published"] != answers["frozen"]
    for name in cache.images:
        (tmp_path / name).touch()
    cache.meta["image_folder"] = str(tmp_path)
    similarity = image @ torch.nn.functional.normalize(cache.text.read().double(), dim=1).T
    for example in example_captions(adaptor, cache, score="frozen"):
        best = similarity[:, cache.captions.index(example["caption"])].topk(3).indices.tolist()
        assert example["images"] == [tmp_path / cache.images[image] for image in best]


class ImagesOnly(Adaptor):
    """Images are uncertain, texts are points."""

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.image_mlp = mlp(embed_dim)

    def encode_image(self, z):
        return z, self.image_mlp(z).square().mean(dim=1)

    def encode_text(self, z):
        return (z,)

    def describe_image(self, z, variance):
        return z, variance

    def describe_text(self, z):
        return z, None


def test_a_method_without_uncertainty_of_texts_is_evaluated_by_that_of_images(script, monkeypatch):
    monkeypatch.setitem(METHODS, "images-only", ImagesOnly)
    flags = save_methods("images-only", "asymvlm-psd")
    z = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).half()
    write_texts("tiny", "steps", z, [f"text {i}" for i in range(5)], {}, [[0, 1, 2], [3, 4]])
    plots = [flag for flag in flags if flag != "--no-plots"]
    assert script(eval_script.main, *plots)[0] == 0
    result, arrays = load_result("tiny", 0, "images-only")
    cache = EmbeddingCache("tiny", "val")
    with torch.no_grad():
        uncertainty = (
            load_adaptor("checkpoints/tiny/0/images-only.pt")
            .adapt_image(cache.image.read())[1]
            .numpy()
        )
    np.testing.assert_allclose(
        arrays["t2i_image_uncertainty"], uncertainty[arrays["t2i_top1"]], rtol=1e-5
    )
    np.testing.assert_allclose(
        arrays["i2t_image_uncertainty"], uncertainty[arrays["i2t_query"]], rtol=1e-5
    )
    assert result["metrics"]["t2i"]["AURC"] == result["metrics"]["image_t2i"]["AURC"]
    assert "ladder" not in result and "depth" not in result
    assert Path("results/tiny/hierarchy-steps.png").exists()
    assert script(eval_script.main, *EVAL, "--compare", "images-only", "asymvlm-psd")[0] == 0
    error = script(
        eval_script.main, "--dataset", "tiny", "--method", "images-only", "--most-uncertain", 3
    )[2]
    assert "--method" in error and "texts are not" in error


def test_methods_that_rank_by_the_frozen_cosine_share_its_ranking(workdir):
    make_cache("tiny")
    cache = EmbeddingCache("tiny", "val")
    adaptors = {(method, 0): METHODS[method](64).eval() for method in GROUPS["all"]}
    frozen, *others = every_scorer(cache, adaptors)
    shared = {
        s.row.method: s
        for s in others
        if s.row in {(m, "published") for m in METHODS} and s.ranking is frozen.ranking
    }
    assert shared.keys() == {"pfe", "pcmepp", "prolip"}
    for scorer in shared.values():
        own = rank(scorer.score, cache)
        assert all((own[d]["rank"] == frozen.ranking[d]["rank"]).all() for d in own)
    frozen, *others = every_scorer(cache, adaptors, OWN)
    assert (
        next(scorer for scorer in others if scorer.row.method == "pfe").ranking
        is not frozen.ranking
    )
