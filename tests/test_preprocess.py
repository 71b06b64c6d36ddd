"""A CLIP is loaded from weights in every form, differs from others, and takes any text; nothing touches a network."""

import hashlib
import json
import logging
import pickle
import shutil
import socket
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tests.conftest import CONFIG, Trap, write_tiny_clip
from utils import preprocess
from utils.cli import UserError
from utils.preprocess import HUB_VARIABLES, ClipId, have_unknown_words, load_clip, tokenize

EXTRAS = {
    "input_resolution": 32,
    "context_length": 16,
    "vocab_size": 49408,
}  # in OpenAI's archives beside the weights


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(*args, **kwargs):
        raise AssertionError("a test touched the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def tiny_quick(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("quick"), "tiny-quickgelu", quick_gelu=True)


@pytest.fixture(scope="module")
def clip(tiny):
    return load_clip(str(tiny[0]), str(tiny[1]))


def refusal(name, pretrained):
    """The message with which a CLIP is refused; as the command line prints it, it is one line."""
    with pytest.raises(UserError) as caught:
        load_clip(str(name), str(pretrained))
    assert len(str(caught.value)) < 600
    return " ".join(str(caught.value).split())


def assert_same_weights(found, expected):
    found = found.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value.float()), key


def torchscript_archive(weights, path):
    """An archive as OpenAI's: a scripted module whose state_dict is the weights in float16 and three whole numbers."""
    root = nn.Module()
    for key, value in (
        weights | {key: torch.tensor(value) for key, value in EXTRAS.items()}
    ).items():
        module, (*folders, name) = root, key.split(".")
        for folder in folders:
            if folder not in dict(module.named_children()):
                module.add_module(folder, nn.Module())
            module = getattr(module, folder)
        module.register_buffer(name, value.half() if value.is_floating_point() else value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        torch.jit.save(torch.jit.script(root), str(path))
    return path


# Weights in every form.


def test_safetensors_are_loaded(tiny, clip):
    assert_same_weights(clip.model, tiny[2].state_dict())


@pytest.mark.parametrize("form", ["plain", "training checkpoint", "older format"])
def test_a_pt_file_is_loaded(tiny, tmp_path, form):
    weights = tiny[2].state_dict()
    if form == "training checkpoint":  # as open_clip's own training writes it
        prefixed = {f"module.{key}": value for key, value in weights.items()}
        torch.save({"epoch": 3, "state_dict": prefixed}, tmp_path / "w.pt")
    else:
        torch.save(weights, tmp_path / "w.pt", _use_new_zipfile_serialization=form == "plain")
    assert_same_weights(load_clip(str(tiny[0]), str(tmp_path / "w.pt")).model, weights)


def test_a_torchscript_archive_is_loaded(tiny_quick, tmp_path):
    config, _, model = tiny_quick
    archive = torchscript_archive(model.state_dict(), tmp_path / "ViT-B-32.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert EXTRAS.keys() <= torch.jit.load(str(archive)).state_dict().keys()
    found = load_clip(str(config), str(archive))
    assert_same_weights(
        found.model, {key: value.half() for key, value in model.state_dict().items()}
    )
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.float32}


def test_a_torchscript_archive_is_refused_for_a_model_without_quick_gelu(tiny, tmp_path):
    archive = torchscript_archive(tiny[2].state_dict(), tmp_path / "ViT-B-32.pt")
    message = refusal(tiny[0], archive)
    assert "ViT-B-32.pt" in message
    assert "-quickgelu" in message


def test_a_torchscript_archive_of_other_weights_is_refused(tiny_quick, tmp_path):
    weights = tiny_quick[2].state_dict()
    del weights["text_projection"]
    assert "text_projection" in refusal(
        tiny_quick[0], torchscript_archive(weights, tmp_path / "a.pt")
    )


def test_the_activation_is_that_of_the_configuration(tiny, tiny_quick):
    x = torch.randn(5, 3, 32, 32)
    for config, weights, model in (tiny, tiny_quick):
        found = load_clip(str(config), str(weights)).model
        torch.testing.assert_close(
            found.encode_image(x), model.encode_image(x), atol=1e-5, rtol=1e-5
        )
    difference = tiny[2].encode_image(x) - tiny_quick[2].encode_image(x)
    assert difference.abs().max() > 1e-3  # same weights, other activation


def test_the_model_is_frozen_and_ready_for_evaluation(clip):
    assert not clip.model.training
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())


def test_what_is_worth_writing_down_is_plain(tiny, clip):
    info = json.loads(json.dumps(clip.info))
    assert info == clip.info
    assert info["model"] == str(tiny[0])
    assert info["pretrained"] == str(tiny[1])
    assert info["image_size"] == [32, 32]
    assert info["context_length"] == 16
    assert info["logit_scale"] == pytest.approx(float(tiny[2].logit_scale.detach().exp()))
    assert info["mean"] == [0.48145466, 0.4578275, 0.40821073]  # OpenAI's, CLIP's usual ones
    assert info["std"] == [0.26862954, 0.26130258, 0.27577711]


def test_the_transform_takes_the_middle_at_the_models_size_and_normalises(clip):
    picture = Image.new("RGB", (96, 32), (255, 0, 0))
    picture.paste((0, 255, 0), (32, 0, 64, 32))  # the middle third
    found = clip.transform(picture)
    assert found.shape == (3, 32, 32)
    for channel, value in enumerate((0.0, 1.0, 0.0)):
        expected = (value - clip.info["mean"][channel]) / clip.info["std"][channel]
        assert found[channel].tolist() == [[pytest.approx(expected, abs=1e-5)] * 32] * 32


def test_a_file_named_as_a_tag_is_the_file(workdir, monkeypatch):
    import open_clip

    torch.save({"a": torch.ones(2)}, workdir / "openai")
    asked = []
    fail = lambda name, pretrained, precision: asked.append(pretrained) or 1 / 0  # noqa: E731
    monkeypatch.setattr(open_clip, "create_model", fail)
    refusal("ViT-B-32-quickgelu", "openai")
    assert asked == [str(workdir / "openai")]  # open_clip takes a bare name for the tag


def test_a_relative_path_is_found_in_the_current_folder(tiny, workdir):
    torch.save(tiny[2].state_dict(), workdir / "w.pt")
    assert_same_weights(load_clip(str(tiny[0]), "w.pt").model, tiny[2].state_dict())


def test_a_link_to_a_file_without_a_suffix_is_loaded(tiny, tmp_path):
    """As in the cache of the Hugging Face hub."""
    (tmp_path / "0123abcd").write_bytes(tiny[1].read_bytes())
    (tmp_path / "w.safetensors").symlink_to(tmp_path / "0123abcd")
    assert_same_weights(
        load_clip(str(tiny[0]), str(tmp_path / "w.safetensors")).model, tiny[2].state_dict()
    )


def test_two_configurations_of_one_name_do_not_mix(tiny, tmp_path):
    other = write_tiny_clip(tmp_path, "tiny", embed_dim=24)
    for config, weights, model in (tiny, other, tiny):
        assert_same_weights(load_clip(str(config), str(weights)).model, model.state_dict())


# Refusals.


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 8, b"hello, world", bytes(range(256)) * 40, b"PK\x03\x04" + bytes(100)],
)
def test_a_file_that_holds_no_weights_is_refused(tiny, tmp_path, suffix, content):
    (tmp_path / f"w{suffix}").write_bytes(content)
    problem = "not " if content else "the file is empty"
    assert f"--pretrained {tmp_path / f'w{suffix}'}: {problem}" in refusal(
        tiny[0], tmp_path / f"w{suffix}"
    )


@pytest.mark.parametrize("form", ["safetensors", "pt", "archive"])
def test_half_a_file_is_refused(tiny_quick, tmp_path, form):
    whole = tmp_path / f"whole.{'safetensors' if form == 'safetensors' else 'pt'}"
    if form == "archive":
        torchscript_archive(tiny_quick[2].state_dict(), whole)
    else:
        (save_file if form == "safetensors" else torch.save)(tiny_quick[2].state_dict(), whole)
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) // 2])
    assert str(whole) in refusal(tiny_quick[0], whole)


def test_weights_of_another_model_are_refused(tiny, tmp_path):
    _, wider, _ = write_tiny_clip(tmp_path, "wider", embed_dim=24)
    assert f"--pretrained {wider}: not weights of tiny" in refusal(tiny[0], wider)
    torch.save({"only": torch.zeros(3)}, tmp_path / "w.pt")
    assert "not weights of tiny" in refusal(tiny[0], tmp_path / "w.pt")
    torch.save([1, 2], tmp_path / "w.pt")
    assert "it holds a list, not weights" in refusal(tiny[0], tmp_path / "w.pt")


@pytest.mark.parametrize("saved_by", ["torch", "pickle"])
def test_code_in_a_weights_file_is_not_run(tiny, tmp_path, saved_by):
    sprung = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works
    sprung.unlink()
    if saved_by == "torch":
        torch.save(Trap(sprung), tmp_path / "w.pt")
    else:
        (tmp_path / "w.pt").write_bytes(pickle.dumps(Trap(sprung)))
    refusal(tiny[0], tmp_path / "w.pt")
    assert not sprung.exists()


@pytest.mark.parametrize(
    "name", ["absent.pt", "folder/absent", "~nosuchuser/w.pt", "~/absent-from-home.safetensors"]
)
def test_a_missing_weights_file_is_said_to_be_missing(tiny, workdir, name):
    assert refusal(tiny[0], name) == f"--pretrained {name}: no such file"


def test_a_folder_is_no_weights_file(tiny, tmp_path):
    assert "no such file" in refusal(tiny[0], tmp_path)


@pytest.mark.parametrize("pretrained", ["", None])
def test_no_weights_are_refused(tiny, pretrained):
    with pytest.raises(UserError, match="--pretrained is empty"):
        load_clip(str(tiny[0]), pretrained)


def test_an_unknown_tag_lists_the_tags():
    import open_clip

    message = refusal("ViT-B-32-quickgelu", "opena1")
    assert "opena1" in message
    for tag in open_clip.list_pretrained_tags_by_model("ViT-B-32-quickgelu"):
        assert tag in message


def test_a_tag_of_a_configuration_file_is_refused(tiny):
    assert "it has no published weights" in refusal(tiny[0], "openai")


def test_an_unknown_model_lists_its_like():
    message = refusal("ViT-B-23-quickgelu", "openai")
    assert "--model ViT-B-23-quickgelu" in message
    assert "ViT-B-32-quickgelu" in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        "3",
        '"embed_dim vision_cfg text_cfg"',
        "{}",
        '{"embed_dim": 16, "vision_cfg": {}}',
        '["embed_dim", "vision_cfg", "text_cfg"]',
    ],
)
def test_a_broken_configuration_is_refused_and_forgotten(tiny, tmp_path, text):
    (tmp_path / "broken.json").write_text(text)
    assert "broken.json" in refusal(tmp_path / "broken.json", tiny[1])
    load_clip(str(tiny[0]), str(tiny[1]))


@pytest.mark.parametrize(
    "changes",
    [
        {"embed_dim": "wide"},
        {"vision_cfg": 3},
        {"text_cfg": {"heads": 7, "width": 32}},
        {"text_cfg": None},
        {"nonsense": 1},
    ],
)
def test_a_configuration_of_nonsense_is_refused(tiny, tmp_path, changes):
    (tmp_path / "odd.json").write_text(json.dumps(CONFIG | changes))
    assert "odd" in refusal(tmp_path / "odd.json", tiny[1])


@pytest.mark.parametrize("value", [2**21, -(2**21), float("nan"), float("inf"), float("-inf")])
def test_a_number_that_no_model_has_is_refused(tiny, tmp_path, value):
    config = CONFIG | {"text_cfg": CONFIG["text_cfg"] | {"ls_init_value": value}}
    (tmp_path / "odd.json").write_text(json.dumps(config))
    expected = f"odd.json: ls_init_value is {value}, which no model has; fix the configuration"
    assert expected in refusal(tmp_path / "odd.json", tiny[1])


def test_a_missing_configuration_is_said_to_be_missing(tiny, workdir):
    assert refusal("absent.json", tiny[1]) == "--model absent.json: no such file"


def test_a_tokenizer_that_cannot_be_had_is_one_line(tiny, tmp_path):
    config = CONFIG | {
        "text_cfg": CONFIG["text_cfg"] | {"hf_tokenizer_name": str(tmp_path / "absent")}
    }
    (tmp_path / "other-words.json").write_text(json.dumps(config))
    assert "--model other-words: its tokenizer cannot be loaded" in refusal(
        tmp_path / "other-words.json", tiny[1]
    )


def test_weights_trained_with_quick_gelu_are_refused_for_a_model_without_it():
    assert "--model ViT-B-32-quickgelu" in refusal("ViT-B-32", "openai")


def test_a_local_file_for_a_model_that_has_a_quick_gelu_twin_gives_a_note(tiny, tiny_quick, capsys):
    load_clip(str(tiny_quick[0]), str(tiny_quick[1]))
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger().addHandler(handler)
    try:
        load_clip(str(tiny[0]), str(tiny[1]))
    finally:
        logging.getLogger().removeHandler(handler)
    assert ["tiny-quickgelu" in record.getMessage() for record in records] == [True]


def test_loading_says_nothing_and_leaves_the_loggers_as_they_were(tiny_quick, capfd, recwarn):
    level = logging.getLogger().level
    load_clip(str(tiny_quick[0]), str(tiny_quick[1]))
    assert capfd.readouterr() == ("", "")
    assert len(recwarn) == 0
    assert logging.getLogger().level == level


# The hub.


def test_a_tag_without_a_network_says_in_one_line_that_a_local_file_will_do(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("ViT-B-32-quickgelu", "openai")
    assert message.startswith("--pretrained openai: cannot be downloaded")
    assert "local weights file" in message
    assert "--dataset shapes" in message


@pytest.mark.parametrize("connected", [True, False])
def test_without_a_network_the_hub_is_told_so(monkeypatch, connected):
    for key in HUB_VARIABLES:
        monkeypatch.delenv(key, raising=False)
    asked = []

    def connect(address, timeout):
        asked.append(address)
        if not connected:
            raise OSError("no route")
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # so that it is put back afterwards
    preprocess._give_up_early_if_offline()
    assert preprocess.os.environ["HF_HUB_OFFLINE"] == ("" if connected else "1")
    assert len(asked) == 1


def test_a_local_file_needs_no_network(tiny):
    """The fixture `offline` fails any test that connects."""
    load_clip(str(tiny[0]), str(tiny[1]))


# What tells one CLIP from another.


@pytest.fixture
def clip_files(tmp_path):
    """A configuration and weights whose content does not matter."""
    for name, content in (
        ("a.json", "{}"),
        ("a.pt", "weights"),
        ("b.pt", "weights"),
        ("c.pt", "others"),
    ):
        (tmp_path / name).write_text(content)
    return tmp_path


def test_a_clip_does_not_differ_from_itself_however_it_is_named(tiny, clip, monkeypatch):
    config, weights, _ = tiny
    monkeypatch.chdir(config.parent)
    by_flags = ClipId.of(config.name, str(weights), "bf16")
    by_meta = ClipId.of_meta(clip.info | {"dtype": "float16"}, origin="meta.json")
    assert by_flags.difference(by_meta) == by_meta.difference(by_flags) == ""
    assert by_meta.identity() == {
        key: clip.info[key] for key in ("model", "model_sha256", "pretrained", "pretrained_sha256")
    }
    assert (by_meta.precision, by_meta.dtype, by_flags.dtype) == ("fp32", torch.float16, None)
    assert by_meta.is_complete() and not by_flags.is_complete()


def test_what_changes_from_one_clip_to_another_is_told(clip_files):
    def clip_id(model, weights):
        return ClipId.of(str(clip_files / model), str(clip_files / weights))

    sums = [
        hashlib.sha256((clip_files / name).read_bytes()).hexdigest()[:16]
        for name in ("a.pt", "c.pt")
    ]
    weights = f"pretrained was a.pt (SHA-256 {sums[0]}), now c.pt (SHA-256 {sums[1]})"
    assert clip_id("a.json", "a.pt").difference(clip_id("a.json", "c.pt")) == weights
    assert "pretrained was a.pt" in clip_id("a.json", "a.pt").difference(
        clip_id("a.json", "b.pt")
    )  # of another name
    by_tag = ClipId.of("ViT-B-32", "openai")
    assert (
        by_tag.difference(ClipId.of("ViT-B-32-quickgelu", "openai"))
        == "model was ViT-B-32, now ViT-B-32-quickgelu"
    )
    both = by_tag.difference(clip_id("a.json", "a.pt"))
    assert both.startswith("model was ViT-B-32, now a.json (SHA-256 ")
    assert "; pretrained was openai, now a.pt (SHA-256 " in both
    assert (
        by_tag.difference(ClipId.of("ViT-B-32", "openai", "bf16")) == ""
    )  # in another precision it is the same


@pytest.mark.parametrize(
    "meta", [None, 3, [], {}, {"model": "ViT-B-32", "pretrained": 7, "precision": "fp8"}]
)
def test_a_meta_that_does_not_tell_the_clip_is_not_complete(meta):
    found = ClipId.of_meta(meta)
    assert not found.is_complete()
    assert found.difference(ClipId.of("ViT-B-32", "openai"))


def test_a_cache_gives_back_the_clip_that_made_it_and_no_other(tiny, clip, tmp_path):
    meta = clip.info | {"dtype": "float32"}
    found = ClipId.of_meta(meta, origin="embeddings/it/val").load("cpu")
    assert_same_weights(found.model, tiny[2].state_dict())
    assert found.dtype == torch.float32
    assert ClipId.of_meta(meta).load("cpu", precision="bf16").dtype == torch.bfloat16
    _, other, _ = write_tiny_clip(tmp_path, "other")
    save_file(tiny[2].state_dict() | {"logit_scale": torch.tensor(1.0)}, other)
    with pytest.raises(
        UserError, match=r"embeddings/it/val: was made with another CLIP: pretrained was tiny\.safe"
    ):
        ClipId.of_meta(meta, origin="embeddings/it/val").load("cpu", pretrained=str(other))


# Texts.


def test_tokens_are_those_of_clips_vocabulary(clip):
    tokens, cut = tokenize(clip.tokenizer, ["a photo of a cat", "A  photo of\na CAT"])
    unknown = have_unknown_words(clip, tokens)
    assert (
        tokens[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407] + [0] * 9
    )  # from OpenAI's own tokenizer
    assert tokens[1].tolist() == tokens[0].tolist()
    assert cut == unknown == [False, False]


def test_texts_longer_than_the_context_are_cut_and_told(clip):
    texts = ["a " * n for n in (0, 1, 13, 14, 15, 16, 300)]
    tokens, cut = tokenize(clip.tokenizer, texts)
    assert tokens.shape == (7, 16)
    assert cut == [False, False, False, False, True, True, True]  # 16 places less start and end
    assert (
        tokens[3].tolist()
        == tokens[4].tolist()
        == tokens[6].tolist()
        == [49406] + [320] * 14 + [49407]
    )
    for text, expected in zip(texts, cut, strict=True):  # whatever stands beside it
        assert tokenize(clip.tokenizer, [text])[1] == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "🐈‍⬛ a cat 👩🏽‍🚀",
        "a\x00b\x07\x1b[31m",
        "\u202eright to left",
        "half a pair \ud800",
        "Ünïcödé 中文 العربية",
        " \n",
        "<b>&amp;amp;",
        "�",
    ],
)
def test_any_text_is_taken(clip, text):
    tokens, _ = tokenize(clip.tokenizer, [text])
    assert tokens[0, 0] == 49406
    assert (tokens[0] == 49407).sum() == 1
    assert torch.isfinite(clip.model.encode_text(tokens)).all()
    assert have_unknown_words(clip, tokens) == [False]


def test_words_whose_embedding_is_zero_are_unknown(tiny, tmp_path):
    config, _, model = tiny
    weights = model.state_dict() | {
        "token_embedding.weight": model.token_embedding.weight.detach().clone()
    }
    weights["token_embedding.weight"][2368] = 0  # cat
    weights["token_embedding.weight"][0] = 0  # padding: says nothing about a word
    save_file(weights, tmp_path / "w.safetensors")
    clip = load_clip(str(config), str(tmp_path / "w.safetensors"))
    tokens, _ = tokenize(clip.tokenizer, ["a dog", "a cat", "a photo of a CAT.", "cats"])
    assert have_unknown_words(clip, tokens) == [False, True, True, False]


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path):
    config, weights, _ = write_tiny_clip(
        tmp_path, "few-words", text_cfg=CONFIG["text_cfg"] | {"vocab_size": 1000}
    )
    clip = load_clip(str(config), str(weights))
    tokens, _ = tokenize(clip.tokenizer, ["a photo of a cat"])
    with pytest.raises(UserError, match="vocab"):
        have_unknown_words(clip, tokens)


# Weights as people have them.


def as_training_saves(weights):
    return {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in weights.items()}}


FORMS = {
    "DDP": lambda weights: {f"module.{name}": value for name, value in weights.items()},
    "torch.compile": lambda weights: {f"_orig_mod.{name}": v for name, v in weights.items()},
    "both": lambda weights: {f"module._orig_mod.{name}": v for name, v in weights.items()},
    "a trainer": lambda weights: {f"model.{name}": value for name, value in weights.items()},
    "a training checkpoint": as_training_saves,
    "numpy scalars": lambda weights: as_training_saves(weights) | {"best": np.float64(0.3)},
    "nested": lambda weights: {"model": dict(weights), "step": 7},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_under_what_training_adds(tiny, tmp_path, form):
    config, _, model = tiny
    path = tmp_path / "w.pt"
    torch.save(FORMS[form](model.state_dict()), path)
    clip = load_clip(str(config), str(path))
    for name, value in model.state_dict().items():
        assert torch.equal(clip.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"<html>", "save its state dict alone as .safetensors"),
    ],
)
def test_files_that_are_no_weights_are_named(tiny, tmp_path, content, words):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_clip(str(tiny[0]), str(path))


def test_weights_with_the_names_of_transformers_are_named(tiny, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(
        {"text_model.x.weight": torch.ones(2), "visual_projection.weight": torch.ones(2)}, path
    )
    with pytest.raises(UserError, match="the package transformers"):
        load_clip(str(tiny[0]), str(path))


def test_a_folder_with_configuration_and_weights_is_a_model(tiny, tmp_path):
    config, weights, model = tiny
    name = f"local-dir:{tmp_path}"
    with pytest.raises(UserError, match=r"open_clip_config\.json"):
        load_clip(name, name)
    document = {"model_cfg": json.loads(config.read_text()), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="cannot be loaded"):  # no weights: not random ones
        load_clip(name, name)
    shutil.copy(weights, tmp_path / "open_clip_model.safetensors")
    clip = load_clip(name, name)
    assert torch.equal(clip.model.text_projection, model.text_projection)
    assert ClipId.of_meta(clip.info).model == name
