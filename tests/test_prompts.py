"""Prompts and captions by their uncertainty: eval.py --prompts, --most-uncertain, example captions."""

import json
import re

import numpy as np
import pytest
import torch

import cache_embeddings
import eval as eval_script
import train as train_script
from datasets.embedding import EmbeddingCache
from datasets.shapes import world
from tests.conftest import REPOSITORY, TRAIN, load_result, make_cache, picture_files
from utils.checkpoint import load_adaptor
from utils.questions.prompts import example_captions

PLAIN = ("--no-plots", "--resamples", 100)


EVAL = ("--dataset", "tiny", *PLAIN)


def test_example_captions_go_from_certain_to_vague_with_the_pictures_that_match_best(
    trained, workdir
):
    cache = EmbeddingCache("tiny", "val")
    picture_files(cache, workdir / "pictures")
    adaptor = load_adaptor("checkpoints/tiny/0/asymvlm-psd.pt")
    examples = example_captions(adaptor, cache, levels=3, per_level=2)
    with torch.no_grad():
        uncertainty = adaptor.adapt_text(cache.text.read())[1]
        similarity = adaptor.similarity(cache.image.read(), cache.text.read())
    rows = [cache.captions.index(example["caption"]) for example in examples]
    assert [example["level"] for example in examples] == [1, 1, 2, 2, 3, 3]
    assert torch.equal(uncertainty[rows], uncertainty[rows].sort()[0])
    assert (
        uncertainty < uncertainty[rows[0]]
    ).sum() == 10  # the middle of the first of six parts of 120 captions
    for row, example in zip(rows, examples, strict=True):
        best = similarity[:, row].topk(3).indices.tolist()
        assert example["images"] == [workdir / "pictures" / cache.images[image] for image in best]
        assert example["right"] == [
            image in cache.relevance[row] or image == cache.image_of_caption[row] for image in best
        ]
    assert any(any(example["right"]) for example in examples)


def test_a_caption_that_several_images_carry_is_listed_once(script):
    captions = ["the same"] * 60 + [f"caption {i}" for i in range(60)]
    make_cache("tiny", images=40, captions_per_image=3, captions=captions)
    assert script(train_script.main, *TRAIN, "--method", "asymvlm-psd")[0] == 0
    listing = ("--dataset", "tiny", "--most-uncertain", 200, "--json")
    rows = json.loads(script(eval_script.main, *listing)[1])["asymvlm-psd, seed 0"]
    assert len(rows) == len({row["caption"] for row in rows}) == 61
    image_of_caption = EmbeddingCache("tiny", "val").image_of_caption[:60].tolist()
    same = next(row for row in rows if row["caption"] == "the same")
    assert (same["images"], same["image"]) == (
        len(set(image_of_caption)),
        f"{image_of_caption[0]:04d}.png",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--compare", "pfe", "nothing"), ["--compare nothing", "prolip", "softmax-entropy"]),
        (("--compare", "pfe", "pfe"), ["--compare", "two different methods"]),
        (
            ("--compare", "pfe", "prolip"),
            ["results/tiny/0/prolip.npz", "eval.py --dataset tiny --method prolip"],
        ),
        (("--compare", "pfe", "asymvlm-psd", "--seed", 7), ["results/tiny/7", "--seed 7"]),
        (("--compare", "pfe", "asymvlm-psd", "--split", "train"), ["split val, not of train"]),
        (("--compare", "pfe", "asymvlm-psd", "--uncer_levels", 41), ["--uncer_levels 41", "fewer"]),
        (("--folds", 41), ["--folds 41", "40 image queries"]),
        (("--resamples", -1), ["--resamples", "at least 0"]),
        (("--prompts", " "), ["--prompts", "blank"]),
        (("--prompts", "@nothing.txt"), ["nothing.txt", "No such file"]),
        (("--prompts", "@/dev/null"), ["--prompts @/dev/null: holds no text; give one prompt"]),
        (("--prompts", "a cat"), ["meta.json"]),
    ],
)
def test_wrong_questions_are_one_line(script, trained, arguments, words):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    status, printed, error = script(eval_script.main, *EVAL, *arguments)
    assert status == 2
    assert not printed
    assert all(word in error for word in words), error


def test_captions_are_listed_most_certain_last(script, trained):
    status, printed, _ = script(
        eval_script.main,
        "--dataset",
        "tiny",
        "--most-uncertain",
        3,
        "--least-uncertain",
        2,
        "--json",
    )
    assert status == 0
    rows = json.loads(printed)["asymvlm-psd, seed 0"]
    cache = EmbeddingCache("tiny", "val")
    with torch.no_grad():
        uncertainty = (
            load_adaptor("checkpoints/tiny/0/asymvlm-psd.pt")
            .adapt_text(cache.text.read())[1]
            .tolist()
        )
    ordered = sorted(uncertainty, reverse=True)
    assert [row["uncertainty"] for row in rows] == pytest.approx(ordered[:3] + ordered[-2:])
    row = cache.captions.index(rows[0]["caption"])
    assert uncertainty[row] == pytest.approx(rows[0]["uncertainty"])
    assert rows[0]["image"] == cache.images[cache.image_of_caption[row]]
    printed = script(eval_script.main, "--dataset", "tiny", "--most-uncertain", 200)[1]
    assert len(printed.splitlines()) == 3 + 120


def test_prompts_are_placed_among_the_captions(script, workdir):
    world.make("data/shapes", train=20, val=20)
    assert script(cache_embeddings.main, "--dataset", "shapes")[0] == 0
    assert (
        script(
            train_script.main,
            "--dataset",
            "shapes",
            "--recipe",
            "small",
            "--epochs",
            2,
            "--batch-size",
            50,
        )[0]
        == 0
    )
    (workdir / "prompts.txt").write_text("a picture\n\na big red star in the middle\n")
    status, printed, _ = script(
        eval_script.main, "--dataset", "shapes", "--prompts", "something", "@prompts.txt", "--json"
    )
    assert status == 0
    rows = json.loads(printed)["asymvlm-psd, seed 0"]
    assert {row["prompt"] for row in rows} == {
        "something",
        "a picture",
        "a big red star in the middle",
    }
    assert [row["uncertainty"] for row in rows] == sorted(
        (row["uncertainty"] for row in rows), reverse=True
    )
    cache = EmbeddingCache("shapes", "val")
    with torch.no_grad():
        uncertainty = (
            load_adaptor("checkpoints/shapes/0/asymvlm-psd.pt")
            .adapt_text(cache.text.read())[1]
            .numpy()
        )
    for row in rows:
        assert row["percentile"] == pytest.approx(
            100 * np.mean(uncertainty < row["uncertainty"]), abs=100 / len(uncertainty)
        )
        assert len(row["closest"]) == 3 and set(row["closest"]) <= set(cache.images)
    caption = cache.captions[7]
    printed = script(eval_script.main, "--dataset", "shapes", "--prompts", caption, "--json")[1]
    assert json.loads(printed)["asymvlm-psd, seed 0"][0]["uncertainty"] == pytest.approx(
        uncertainty[7], rel=1e-2
    )
    assert "percentile" in script(eval_script.main, "--dataset", "shapes", "--prompts", caption)[1]
    assert script(eval_script.main, "--dataset", "shapes", *PLAIN)[0] == 0
    assert "hierarchy chains" in load_result("shapes", 0, "asymvlm-psd")[0]["metrics"]
    example = next(
        block
        for block in re.findall(
            r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL
        )
        if "adapt_text" in block
    )
    printed = []
    shared = {"print": printed.append}
    exec(example, shared)
    known = next(row["uncertainty"] for row in rows if row["prompt"] == "a picture")
    assert shared["uncertainty"][0].item() == pytest.approx(known, rel=1e-2)
    assert printed == [["ask back", "ask back"]]  # 20 images are too few for any threshold
