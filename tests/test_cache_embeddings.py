"""cache_embeddings.py from its flags to its files, on a small data set and a tiny CLIP; and what can go wrong."""

import hashlib
import importlib.metadata
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from open_clip import CLIP
from PIL import Image
from safetensors.torch import save_file

import cache_embeddings
from cache_embeddings import main
from datasets.embedding import EmbeddingCache
from datasets.registry import DATASETS
from datasets.texts import load_texts
from tests.conftest import (
    CONFIG,
    TRAIN_IDS,
    VAL_IDS,
    all_bytes,
    direct_texts,
    draw_data,
    plain_split,
    write_tiny_clip,
)
from utils.cli import run_script


def direct_images(model, files):
    """Embeddings one picture at a time with open_clip's own transform."""
    import open_clip

    transform = open_clip.image_transform(32, is_train=False)
    with torch.no_grad():
        return torch.cat([model.encode_image(transform(Image.open(file))[None]) for file in files])


def test_every_row_is_its_own_picture_or_text_encoded(call, data, tiny):
    assert call("--precision", "fp32", "--dtype", "float32")[:2] == (0, "")
    for split, count in (("train", 3), ("val", 70)):
        cache = EmbeddingCache("shapes", split)
        images, annotations, image_of_caption = plain_split(data, split)
        assert cache.images == [image["file_name"] for image in images]
        assert cache.captions == [annotation["caption"] for annotation in annotations]
        assert cache.image_of_caption.tolist() == image_of_caption
        expected = direct_images(tiny[2], [data / split / name for name in cache.images])
        assert cache.image.shape == (count, 16)
        torch.testing.assert_close(cache.image.read(), expected, atol=1e-5, rtol=1e-5)
        assert (
            torch.cdist(expected, expected).fill_diagonal_(9).min() > 1e-2
        )  # so that no row fits another picture
        texts = direct_texts(tiny[2], cache.captions)
        assert cache.text.shape == (2 * count, 16)
        torch.testing.assert_close(cache.text.read(), texts, atol=1e-5, rtol=1e-5)
        assert torch.unique(texts.round(decimals=3), dim=0).shape[0] == len(set(cache.captions))


def test_embeddings_are_float16_and_not_normalised_by_default(call, data, tiny):
    assert call()[0] == 0
    for split in ("train", "val"):
        cache = EmbeddingCache("shapes", split)
        assert cache.image.dtype == cache.text.dtype == torch.float16
        expected, found = (
            direct_images(tiny[2], [data / split / name for name in cache.images]),
            cache.image.read().float(),
        )
        torch.testing.assert_close(
            found, expected, atol=0.05, rtol=0.05
        )  # bfloat16 where the machine computes it
        norms = expected.norm(dim=1)
        assert (norms - 1).abs().min() > 0.1
        assert ((found.norm(dim=1) - norms).abs() < 0.05 * norms).all()


def test_captions_of_one_text_have_one_embedding(call):
    assert call("--split", "val")[0] == 0
    cache = EmbeddingCache("shapes", "val")
    cats = cache.text[
        [row for row, text in enumerate(cache.captions) if text == "a photo of a cat"]
    ]
    assert len(cats) == 70
    assert (cats == cats[0]).all()


def test_bytes_depend_on_neither_batch_size_nor_workers(call, workdir):
    caches = []
    for name, flags in {
        "a": "",
        "b": "--batch-size 1",
        "c": "--batch-size 65 --workers 2",
        "d": "--batch-size 9999",
    }.items():
        assert call("--name", name, *flags.split())[0] == 0
        caches.append(all_bytes(workdir / "embeddings" / name))
    assert caches[0] == caches[1] == caches[2] == caches[3]
    assert len(caches[0]) == 6 + 7 + 2  # train, val with its relevance, the ladder


def test_the_encoders_see_the_same_chunks_of_one_size_whatever_the_batch_size(call, monkeypatch):
    """Where a row's last bits depend on the rows beside it, equal chunks are what keeps the bytes equal."""
    seen = []

    def recorded(encode):
        return lambda model, inputs: (seen[-1].append(inputs.clone()), encode(model, inputs))[1]

    for name in ("encode_image", "encode_text"):
        monkeypatch.setattr(CLIP, name, recorded(getattr(CLIP, name)))
    for batch_size in (1, 64, 65, 1000):
        seen.append([])
        assert call("--split", "val", "--batch-size", batch_size, "--overwrite")[0] == 0
        assert {len(inputs) for inputs in seen[-1]} == {64}
        assert [inputs.ndim for inputs in seen[-1]].count(4) == 2  # 70 pictures
        assert {inputs.shape[1] for inputs in seen[-1] if inputs.ndim == 2} == {
            4,
            8,
            12,
            16,
        }  # texts by their length
        assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[-1], strict=True))


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="counts the open files of the process in /proc"
)
def test_a_batch_takes_a_worker_no_open_file_a_picture(call):
    def give_up(*_):
        raise TimeoutError("the loader hangs")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        status, _, last = call("--split", "val", "--batch-size", 64, "--workers", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert status == 0, last
    assert len(EmbeddingCache("shapes", "val").image) == 70


def test_relevance_passes_through_as_image_rows(call, data):
    assert call()[0] == 0
    images, annotations, image_of_caption = plain_split(data, "val")
    expected = [
        list(range(len(images))) if annotation["caption"] == "a photo of a cat" else [row]
        for annotation, row in zip(annotations, image_of_caption, strict=True)
    ]
    assert EmbeddingCache("shapes", "val").relevance == expected
    assert EmbeddingCache("shapes", "train").relevance is None


def test_the_ladder_is_embedded_with_the_same_clip(call, tiny):
    assert call("--precision", "fp32")[0] == 0
    texts, z, chains = load_texts("shapes", "ladder", 16)
    assert texts == list(DATASETS["shapes"].ladder)
    assert chains is None
    torch.testing.assert_close(z.float(), direct_texts(tiny[2], texts), atol=2e-3, rtol=2e-3)


def test_meta_tells_all_that_the_embeddings_depend_on(call, data, tiny):
    assert call("--precision", "bf16", "--dtype", "float32")[0] == 0
    for split, ids in (("train", TRAIN_IDS), ("val", VAL_IDS)):
        meta = EmbeddingCache("shapes", split).meta
        _, annotations, _ = plain_split(data, split)
        assert meta == {
            "dataset": "shapes",
            "split": split,
            "model": str(tiny[0]),
            "model_sha256": hashlib.sha256(tiny[0].read_bytes()).hexdigest(),
            "pretrained": str(tiny[1]),
            "pretrained_sha256": hashlib.sha256(tiny[1].read_bytes()).hexdigest(),
            "image_list": meta["image_list"],
            "caption_list": meta["caption_list"],
            "skipped": [],
            "image_folder": f"{data / split}/",
            "embed_dim": 16,
            "image_size": [32, 32],
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
            "context_length": 16,
            "logit_scale": pytest.approx(1 / 0.07),
            "precision": "bf16",
            "dtype": "float32",
            "image_count": len(ids),
            "caption_count": 2 * len(ids),
            "image_ids": sorted(ids),
            "caption_ids": [annotation["id"] for annotation in annotations],
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("torch", "torchvision", "open_clip_torch", "pillow")
            },
        }


def test_lower_precision_is_close_but_not_equal(call, tiny):
    for precision in ("fp32", "bf16"):
        assert (
            call(
                "--split",
                "train",
                "--name",
                precision,
                "--precision",
                precision,
                "--dtype",
                "float32",
            )[0]
            == 0
        )
    full, low = EmbeddingCache("fp32", "train"), EmbeddingCache("bf16", "train")
    assert not torch.equal(full.image.read(), low.image.read())
    torch.testing.assert_close(low.image.read(), full.image.read(), atol=0.05, rtol=0.05)


def test_the_folders_of_coco_are_read(call, tmp_path, data, tiny):
    root = draw_data(
        tmp_path / "mine", splits=(("train", TRAIN_IDS),), layout=DATASETS["coco"].layout
    )
    assert call("--dataset", "coco", "--data-root", root, "--split", "train")[0] == 0
    assert EmbeddingCache("coco", "train").image.shape == (3, 16)
    assert load_texts("coco", "ladder", 16)[0] == list(DATASETS["coco"].ladder)


def test_the_default_data_root_is_under_data(call, workdir):
    draw_data(
        workdir / "data" / "coco", splits=(("val", TRAIN_IDS),), layout=DATASETS["coco"].layout
    )
    flags = [flag for flag in call.flags if flag not in ("--data-root", call.flags[3])]
    assert run_script(main, [*flags, "--dataset", "coco", "--split", "val"]) == 0
    assert len(EmbeddingCache("coco", "val").text) == 6


# What can go wrong.


@pytest.mark.parametrize("workers", [0, 2])
def test_all_broken_pictures_are_named_and_nothing_is_written(call, tmp_path, workdir, workers):
    root = draw_data(tmp_path / "mine", splits=(("val", VAL_IDS),))
    files = sorted((root / "val").iterdir())
    files[0].write_bytes(b"")
    files[30].write_bytes(files[30].read_bytes()[:60])
    files[50].write_text("no picture")
    files[69].unlink()
    status, err = call.stderr("--data-root", root, "--split", "val", "--workers", workers)
    assert status == 2
    for row, path in enumerate(files):
        assert (path.name in err) == (row in (0, 30, 50, 69))
    assert "(4 broken samples so far" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (workdir / "embeddings").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--dataset", "nosuch"], ["nosuch", "coco", "shapes"]),
        (["--model", "ViT-B-33"], ["--model ViT-B-33", "ViT-B-32"]),
        (["--model", "absent.json"], ["--model absent.json", "no such file"]),
        (["--pretrained", "absent.pt"], ["--pretrained absent.pt", "no such file"]),
        (["--pretrained", "nosuch"], ["--pretrained nosuch", "no published weights"]),
        (
            ["--model", "ViT-B-32-quickgelu", "--pretrained", "nosuch"],
            ["--pretrained nosuch", "openai", "metaclip_400m"],
        ),
        (
            ["--data-root", ".", "--split", "val"],
            ["--data-root .", "annotations/captions_val.json", "empty folder"],
        ),
        (["--split", "test"], ["annotations/captions_test.json"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--batch-size", "many"], ["--batch-size"]),
        (["--workers", "-1"], ["--workers"]),
        (["--device", "nosuch"], ["--device nosuch"]),
        (["--precision", "fp16"], ["--precision fp16"]),
        (["--precision", "fp8"], ["--precision", "fp8"]),
        (["--name", "../mine"], ["--name", "plain name"]),
        (["--split", "texts"], ["--split", "plain name"]),
        (["--texts", "ladder.txt"], ["ladder.txt", "another name"]),
        (["--texts", "absent.txt"], ["--texts absent.txt", "no such file"]),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_what_the_user_can_put_right_ends_in_one_line_and_status_2(call, workdir, flags, expected):
    status, err = call.stderr(*flags)
    assert status == 2
    (line,) = err.splitlines()
    for part in expected:
        assert part in line
    assert list(workdir.iterdir()) == []


def test_a_tag_without_a_network_ends_in_one_line(call, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    status, err = call.stderr("--model", "ViT-B-32-quickgelu", "--pretrained", "openai")
    assert status == 2
    (line,) = err.splitlines()
    assert "cannot be downloaded" in line
    assert "local weights file" in line


def test_pretrained_given_as_nothing_is_the_data_sets_own(call, monkeypatch):
    """--pretrained '' falls back to the data set's weights; random weights are never used."""
    asked = []
    fail = lambda model, pretrained, device, dtype: asked.append((model, pretrained)) or 1 / 0  # noqa: E731
    monkeypatch.setattr(cache_embeddings, "load_clip", fail)
    with pytest.raises(ZeroDivisionError):
        call("--pretrained", "", "--model", "")
    assert asked == [("datasets/shapes/clip.json", "datasets/shapes/clip.safetensors")]


def test_embeddings_too_large_for_float16_are_refused(call, data, tiny, tmp_path):
    weights = tiny[2].state_dict() | {"visual.proj": tiny[2].visual.proj.detach() * 1e7}
    save_file(weights, tmp_path / "large.safetensors")
    status, _, last = call("--pretrained", tmp_path / "large.safetensors", "--split", "train")
    assert status == 2
    assert "--dtype float32" in last
    assert (
        f"the embedding of '{data / 'train' / plain_split(data, 'train')[0][0]['file_name']}' is not finite"
        in last
    )
    assert (
        call(
            "--pretrained", tmp_path / "large.safetensors", "--split", "train", "--dtype", "float32"
        )[0]
        == 0
    )


def test_long_captions_and_unknown_words_are_told_once(call, tmp_path, tiny):
    root = draw_data(tmp_path / "mine", splits=(("val", TRAIN_IDS),))
    file = root / "annotations" / "captions_val.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["caption"] = "a photo of a cat " * 10
    document["annotations"][1]["caption"] = "a zebra 🐈 \u0000 \ud800"
    file.write_text(json.dumps(document))
    weights = tiny[2].state_dict() | {
        "token_embedding.weight": tiny[2].token_embedding.weight.detach().clone()
    }
    weights["token_embedding.weight"][22548] = 0  # zebra
    save_file(weights, tmp_path / "w.safetensors")
    status, err = call.stderr(
        "--data-root", root, "--split", "val", "--pretrained", tmp_path / "w.safetensors"
    )
    assert status == 0
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 4  # the last is on the ladder, whose last prompt is too long for this CLIP
    assert notes.pop(0).startswith("note: 1 captions have half a character")
    assert notes[0].startswith("note: 1 texts are longer than the model reads (16 tokens)")
    assert notes[1].startswith(
        "note: 1 texts have words that this CLIP has never seen, such as 'a zebra"
    )


def test_the_splits_of_a_cache_come_from_one_clip(call, tiny, tmp_path):
    _, other, _ = write_tiny_clip(tmp_path, "other", text_cfg=CONFIG["text_cfg"] | {"layers": 2})
    assert call("--split", "train")[0] == 0
    status, _, last = call(
        "--split", "val", "--model", other.with_suffix(".json"), "--pretrained", other
    )
    assert status == 2
    assert "embeddings/shapes/train: was made with another CLIP: model was tiny-cache.json" in last
    assert not Path("embeddings/shapes/val").exists()


def test_a_cache_of_broken_pictures_only_is_refused(call, tmp_path):
    root = draw_data(tmp_path / "mine", splits=(("train", TRAIN_IDS),))
    for path in (root / "train").iterdir():
        path.write_bytes(b"")
    status, _, last = call("--data-root", root, "--split", "train", "--skip-broken")
    assert status == 2
    assert "no caption is left" in last


def test_a_data_set_goes_into_files_of_so_many_rows(call):
    assert call("--name", "one")[0] == 0
    assert call("--name", "many", "--shard-rows", 16)[0] == 0
    one, many = (EmbeddingCache(name, "val") for name in ("one", "many"))
    assert torch.equal(one.image.read(), many.image.read())
    assert torch.equal(one.text.read(), many.text.read())
    for attribute in ("captions", "images", "relevance"):
        assert getattr(one, attribute) == getattr(many, attribute)
    assert one.meta["caption_ids"] == many.meta["caption_ids"]
    assert EmbeddingCache("many", "val", mapped=True).mapped
    status, err = call.stderr("--name", "many", "--shard-rows", 16)
    assert (status, err.count("cached already")) == (0, 2)
