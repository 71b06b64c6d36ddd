"""What eval.py answers beyond the tables: comparisons, plots, hierarchies, folds, prompts, captions."""

import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cache_embeddings
import eval as eval_script
import train as train_script
from datasets.embedding import EmbeddingCache
from datasets.shapes import world
from datasets.texts import write_texts
from tests.conftest import REPOSITORY, load_result, make_cache
from utils.checkpoint import load_adaptor
from utils.cli import run_script
from utils.evaluation.figures import hierarchy
from utils.evaluation.results import Results
from utils.files import save_json, sha256
from utils.preprocess import ClipId
from utils.questions.prompts import example_captions
from utils.report import insert_files

PLAIN = ("--no-plots", "--resamples", 100)
TRAIN = ("--dataset", "tiny", "--recipe", "small", "--epochs", 1, "--batch-size", 60)
EVAL = ("--dataset", "tiny", *PLAIN)


@pytest.fixture
def trained(script):
    """A small cache with two seeds of a method whose images are points and of one whose images are uncertain."""
    make_cache(
        "tiny",
        relevance=[
            [i // 3, 39 - i // 3] if i // 3 != 39 - i // 3 else [i // 3] for i in range(120)
        ],
    )
    rng = np.random.default_rng(0)
    z = torch.tensor(rng.normal(size=(12, 64)), dtype=torch.float16)
    write_texts(
        "tiny",
        "steps",
        z,
        [f"text {i}" for i in range(12)],
        {},
        [[0, 1, 2, 3], [4, 5], [6, 7, 8], [9, 10, 11]],
    )
    assert (
        script(train_script.main, *TRAIN, "--method", "asymvlm-psd", "pfe", "--seed", 0, 1)[0] == 0
    )
    return ("--method", "asymvlm-psd", "pfe", "--seed", 0, 1)


def test_plots_and_an_index_that_shows_them(script, trained):
    assert script(eval_script.main, "--dataset", "tiny", "--resamples", 20, *trained)[0] == 0
    index = Path("results/tiny/README.md").read_text()
    names = "levels levels-image risk-coverage reliability length ambiguity ladder hierarchy-steps"
    for name in names.split():
        assert f"({name}.png)" in index
        with Image.open(f"results/tiny/{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5
        assert Path(f"results/tiny/{name}.pdf").read_bytes().startswith(b"%PDF")
    for row in ("frozen cosine", "softmax-entropy", "asymvlm-psd", "pfe"):
        assert f"| {row} |" in index
    assert "python eval.py --dataset tiny --method asymvlm-psd pfe --seed 0 1" in index


def picture_files(cache, folder):
    """Write a picture for every image of a cache, its row as its grey, and tell the cache where they are."""
    folder.mkdir()
    for row, name in enumerate(cache.images):
        Image.new("RGB", (8, 8), (row, row, row)).save(folder / name)
    cache.meta["image_folder"] = f"{folder}/"


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


def test_a_missing_picture_leaves_the_captions_out_in_one_line(script, trained, workdir, capsys):
    cache = EmbeddingCache("tiny", "val")
    picture_files(cache, workdir / "pictures")
    save_json(cache.meta, cache.folder / "meta.json")
    assert script(eval_script.main, "--dataset", "tiny", "--resamples", 0, *trained)[0] == 0
    assert "(captions.png)" in Path("results/tiny/README.md").read_text()
    with Image.open("results/tiny/captions.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    (workdir / "pictures" / cache.images[7]).unlink()
    capsys.readouterr()
    assert (
        run_script(eval_script.main, ["--dataset", "tiny", "--resamples", "0", *map(str, trained)])
        == 0
    )
    assert capsys.readouterr().err.count("captions.png is left out") == 1
    assert not Path("results/tiny/captions.png").exists()
    assert "captions.png" not in Path("results/tiny/README.md").read_text()


def test_plots_that_the_results_do_not_allow_are_not_there(script, trained):
    assert script(eval_script.main, "--dataset", "tiny", "--resamples", 20, *trained)[0] == 0
    assert (
        script(eval_script.main, "--dataset", "tiny", "--resamples", 0, "--method", "asymvlm-psd")[
            0
        ]
        == 0
    )
    assert not Path("results/tiny/levels-image.png").exists()
    assert "levels-image" not in Path("results/tiny/README.md").read_text()
    assert load_result("tiny", 0, "asymvlm-psd")[0]["intervals"] == {}


def test_intervals_hold_the_figures_of_the_run(script, trained):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    result, _ = load_result("tiny", 1, "pfe")
    for section, figure in (
        ("t2i", "R@1"),
        ("i2t", "AURC"),
        ("ambiguity", "R@1_described"),
        ("relevance_i2t", "mAP@R"),
    ):
        low, high = result["intervals"][section][figure]
        assert low <= high
        assert low - 0.1 <= result["metrics"][section][figure] <= high + 0.1


def test_all_figures_follow_from_the_file_of_queries(script, trained):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    result, arrays = load_result("tiny", 0, "pfe")
    answers = {
        d: {
            key.removeprefix(f"{d}_"): values for key, values in arrays.items() if key.startswith(d)
        }
        for d in ("t2i", "i2t")
    }
    again = Results.of(answers, 10).content
    assert again["t2i"] == result["t2i"]
    assert all(result["metrics"][key] == values for key, values in again["metrics"].items())


def test_right_answers_of_both_directions_equal_a_sort_of_the_full_matrix(script, trained):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    _, arrays = load_result("tiny", 0, "pfe")
    cache = EmbeddingCache("tiny", "val")
    with torch.no_grad():
        similarity = load_adaptor("checkpoints/tiny/0/pfe.pt").similarity(
            cache.image.read(), cache.text.read()
        )
    right = torch.zeros(40, 120, dtype=torch.bool)
    for caption, (rows, own) in enumerate(
        zip(cache.relevance, cache.image_of_caption.tolist(), strict=True)
    ):
        right[[*rows, own], caption] = True
    for direction, scores, hits in (("t2i", similarity.T, right.T), ("i2t", similarity, right)):
        ranks = [
            int(torch.nonzero(h[s.argsort(descending=True)])[0]) + 1
            for s, h in zip(scores, hits, strict=True)
        ]
        assert arrays[f"{direction}_relevant_rank"].tolist() == ranks
        assert arrays[f"{direction}_relevant"].tolist() == hits.sum(dim=1).tolist()


def test_uncertainty_of_images_is_that_of_the_query_and_of_the_image_retrieved(script, trained):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    result, arrays = load_result("tiny", 0, "pfe")
    with torch.no_grad():
        images = EmbeddingCache("tiny", "val").image.read()
        uncertainty = load_adaptor("checkpoints/tiny/0/pfe.pt").adapt_image(images)[1].numpy()
    np.testing.assert_allclose(
        arrays["i2t_image_uncertainty"], uncertainty[arrays["i2t_query"]], rtol=1e-6
    )
    np.testing.assert_allclose(
        arrays["t2i_image_uncertainty"], uncertainty[arrays["t2i_top1"]], rtol=1e-6
    )
    assert len(result["by_image"]["i2t"]) == 10
    assert "by_image" in result and load_result("tiny", 0, "asymvlm-psd")[0]["by_image"] == {}


def test_hierarchies_are_measured_for_every_row_of_the_table(script, trained):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    result, _ = load_result("tiny", 0, "asymvlm-psd")
    texts, chains = [
        torch.load("embeddings/tiny/texts/steps.pt", weights_only=True),
        json.loads(Path("embeddings/tiny/texts/steps.json").read_text()),
    ]
    with torch.no_grad():
        uncertainty = (
            load_adaptor("checkpoints/tiny/0/asymvlm-psd.pt").adapt_text(texts)[1].double().numpy()
        )
    assert result["metrics"]["hierarchy steps"] == hierarchy("steps").measure(
        {"uncertainty": uncertainty, "chains": chains["chains"]}
    )
    assert len(result["depth"]["steps"]) == 4
    details = Path("results/tiny/details.md").read_text()
    table = details[details.index("hierarchy steps") :].split("\n\n")[0]
    assert all(
        f"| {row} |" in table for row in ("softmax-entropy", "caption-length", "asymvlm-psd", "pfe")
    )


def test_folds_average_the_recall_within_parts_of_the_gallery(script, trained):
    assert script(eval_script.main, *EVAL, *trained, "--folds", 4)[0] == 0
    found = load_result("tiny", 0, "asymvlm-psd")[0]["metrics"]["recall_folds"]
    cache = EmbeddingCache("tiny", "val")
    with torch.no_grad():
        similarity = load_adaptor("checkpoints/tiny/0/asymvlm-psd.pt").similarity(
            cache.image.read(), cache.text.read()
        )
    hits = []
    for start in range(0, 40, 10):
        captions = [
            j for j, own in enumerate(cache.image_of_caption.tolist()) if start <= own < start + 10
        ]
        best = similarity[start : start + 10][:, captions].argmax(dim=0) + start
        hits.append((best == cache.image_of_caption[captions]).float().mean().item())
    assert found["t2i R@1"] == pytest.approx(np.mean(hits))
    assert "mean over the folds" in Path("results/tiny/details.md").read_text()


def test_two_methods_are_compared_over_the_same_queries(script, trained):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    status, printed, _ = script(
        eval_script.main, *EVAL, "--seed", 0, 1, "--compare", "asymvlm-psd", "softmax-entropy"
    )
    assert status == 0
    runs = [
        load_result("tiny", seed, "asymvlm-psd")[0]["metrics"]["t2i"]["AURC"] for seed in (0, 1)
    ]
    other = json.loads(Path("results/tiny/baselines/softmax-entropy.json").read_text())["metrics"][
        "t2i"
    ]["AURC"]
    line = next(line for line in printed.splitlines() if line.startswith("AURC"))
    assert line.split()[1:4] == [
        f"{np.mean(runs):.3f}",
        f"{other:.3f}",
        f"{np.mean(runs) - other:+.3f}",
    ]
    assert (
        Path("results/tiny/asymvlm-psd-against-softmax-entropy.txt").read_text().strip()
        == printed.strip()
    )


def table_of(printed, section):
    """The lines of a section of what --compare prints, its header first."""
    return next(part.splitlines() for part in printed.split("\n\n") if part.startswith(section))


def test_a_p_value_of_one_seed_says_so(script, trained):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    compare = (*EVAL, "--compare", "asymvlm-psd", "softmax-entropy")
    header, _, *rows = table_of(script(eval_script.main, *compare)[1], "text-to-image")
    assert header.endswith("p over images, this seed")
    assert 0 < float(rows[1].split()[-1]) <= 1
    header, _, *rows = table_of(
        script(eval_script.main, *compare, "--seed", 0, 1)[1], "text-to-image"
    )
    assert header.split()[-2:] == ["interval", "p"]
    assert 0 < float(rows[1].split()[-1]) <= 1
    assert script(eval_script.main, *compare, "--resamples", 99)[2].count(
        "a comparison needs at least 100"
    )


def test_results_of_different_caches_are_not_paired(script, trained):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    make_cache("tiny", seed=1)
    assert script(eval_script.main, *EVAL, "--method", "pfe", "--seed", 0)[0] == 0
    status, _, line = script(eval_script.main, *EVAL, "--compare", "pfe", "asymvlm-psd")
    assert status == 2
    assert "results are of different caches" in line
    assert load_result("tiny", 0, "pfe")[0]["config"]["checkpoint"] == sha256(
        Path("checkpoints/tiny/0/pfe.pt")
    )


def test_a_head_on_the_cache_of_another_clip_is_refused_unless_insisted(script, trained):
    for meta, status in (
        ({"model": "elsewhere/none", "pretrained": "none"}, 0),  # a file's folder does not matter
        ({"model": "none", "pretrained": "other"}, 2),
        ({}, 0),
    ):
        make_cache("tiny", meta=meta)
        assert script(eval_script.main, *EVAL, "--method", "pfe")[0] == status
    make_cache("tiny", meta={"model": "none", "pretrained": "other"})
    line = script(eval_script.main, *EVAL, "--method", "pfe")[2]
    assert (
        "'pretrained': 'none'" in line
        and "'pretrained': 'other'" in line
        and "--other-clip" in line
    )
    assert script(eval_script.main, *EVAL, "--method", "pfe", "--other-clip")[0] == 0


def test_sums_tell_clips_of_one_name_apart_where_both_are_known():
    one, other = (ClipId("m.json", "w.pt", "a", sum_) for sum_ in ("b", "c"))
    unknown = ClipId("x/m.json", "y/w.pt")
    assert one.contradicts(other) and not one.contradicts(one)
    assert not one.contradicts(unknown) and not unknown.contradicts(one)
    assert not one.contradicts(ClipId("renamed.json", "w.pt", "a", "b"))
    assert unknown.contradicts(ClipId("m.json", "v.pt"))
    nothing = ClipId(None, None)
    assert not nothing.contradicts(one) and not one.contradicts(nothing)


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


@pytest.mark.parametrize(
    ("arrays", "document"),
    [
        ({"t2i_rank": np.array([{"a": 1}], dtype=object)}, None),
        ({"t2i_rank": np.ones(3)}, None),
        (
            {
                f"{d}_{key}": np.ones(4 + (key == "rank"))
                for d in ("t2i", "i2t")
                for key in ("query", "top1", "rank", "uncertainty")
            },
            None,
        ),
        (
            {
                f"{d}_{key}": np.float64(1)
                for d in ("t2i", "i2t")
                for key in ("query", "top1", "rank", "uncertainty")
            },
            None,
        ),
        (None, []),
        (None, {"config": 3}),
    ],
)
def test_results_that_were_tampered_with_are_refused(script, trained, arrays, document):
    assert script(eval_script.main, *EVAL, *trained)[0] == 0
    if arrays is not None:
        np.savez("results/tiny/0/pfe.npz", **arrays)
    if document is not None:
        Path("results/tiny/0/pfe.json").write_text(json.dumps(document))
    status, _, error = script(eval_script.main, *EVAL, "--compare", "pfe", "asymvlm-psd")
    assert status == 2
    assert "results/tiny/0/pfe" in error


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


def test_only_the_marked_tables_of_a_document_are_renewed(workdir, capsys):
    Path("a.md").write_text("| a |\n")
    Path("b.txt").write_text("b\n")
    marked = (
        "text\n<!-- a.md -->\n{}\n<!-- end of a.md -->\n<!-- b.txt -->\n{}\n<!-- end of b.txt -->\n"
    )
    missing = "<!-- c.md -->\nold\n<!-- end of c.md -->\nend\n"
    renewed = insert_files(marked.format("old", "old") + missing)
    assert renewed == marked.format("| a |", "```\nb\n```") + missing
    assert insert_files(renewed) == renewed
    assert "c.md: no such file" in capsys.readouterr().err


def test_every_step_of_a_chain_is_true_and_says_more():
    scenes = [world.draw_scene(random.Random(f"gallery/{i}")) for i in range(400)]
    for i in range(60):
        rng = random.Random(i)
        scene = world.draw_scene(rng)
        chain = world.write_chain(scene, rng)
        assert len(chain) == 6
        assert all(world.describes(caption, scene) for caption in chain)
        described = [
            {k for k, other in enumerate(scenes) if world.describes(caption, other)}
            for caption in chain
        ]
        assert all(narrow <= wide for wide, narrow in itertools.pairwise(described))
        assert len({caption.text for caption in chain}) == 6
    assert world.write_chains(count=3) == world.write_chains(count=5)[:3]
