"""embed_units on units that know no data set and an encoder whose outputs tell: what is encoded, kept and left out."""

import os
import signal
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from tqdm import tqdm

from datasets.units import UnitStore
from utils import embed
from utils.cli import UserError
from utils.embed import (
    CHUNK,
    Samples,
    distinct_texts,
    embed_units,
    encode_tokens,
    in_chunks,
    to_dtype,
)


@pytest.fixture
def clip(monkeypatch):
    """Embeds a picture as (its mean, 1) and a text as (its length, 2); seen: how many rows each call had."""
    seen = []

    def encode_image(pictures):
        seen.append(len(pictures))
        return torch.stack([pictures.mean(dim=(1, 2, 3)), torch.ones(len(pictures))], dim=1)

    def encode_text(tokens):
        seen.append(len(tokens))
        return torch.stack([tokens[:, 0].float(), torch.full((len(tokens),), 2.0)], dim=1)

    def tokenize(tokenizer, texts):
        lengths = torch.tensor([[len(text), "?" in text] for text in texts])
        return lengths, [len(text) > 9 for text in texts]

    monkeypatch.setattr(embed, "tokenize", tokenize)
    monkeypatch.setattr(
        embed, "have_unknown_words", lambda clip, tokens: (tokens[:, 1] == 1).tolist()
    )
    model = SimpleNamespace(encode_image=encode_image, encode_text=encode_text)
    info = {"context_length": 9}
    return SimpleNamespace(
        model=model,
        transform=float,
        tokenizer=None,
        device="cpu",
        dtype=torch.float32,
        info=info,
        seen=seen,
    )


class Unit:
    """Pictures of one value each, given as texts, or what is broken about one; it keeps what it became in `kept`."""

    def __init__(self, title, values=(), texts=None, kept=None):
        self.title, self.values, self.texts, self.kept = title, list(values), texts, kept
        self.image_count = len(self.values)

    def streams(self, size):
        return [self._stream(start, size) for start in range(0, len(self.values), size)]

    def _stream(self, first, size):
        def stream(transform):
            rows = range(first, min(first + size, len(self.values)))
            errors = [
                value if value.startswith("broken") else None
                for value in (self.values[row] for row in rows)
            ]
            whole = [
                0.0 if error else transform(self.values[row])
                for row, error in zip(rows, errors, strict=True)
            ]
            pictures = np.tile(np.float32(whole)[:, None, None, None], (1, 3, 2, 2))
            yield Samples(
                list(rows),
                [[f"of {row}"] for row in rows] if self.texts == () else [],
                pictures,
                errors,
            )

        return stream

    def describe(self, key, reason):
        return f"{self.title} {key}: {reason}"

    def name(self, key):
        return f"{self.title} {key}"

    def left_out(self, folder):
        return None if self.kept is None else self.kept.left_out

    def save(self, folder, embedded):
        assert (folder / "settings.json").exists()
        self.kept = embedded


@pytest.fixture
def store(tmp_path):
    """Makes a UnitStore of float32 in which so many samples may be broken."""
    return lambda max_broken=0: UnitStore(tmp_path / "split", {}, torch.float32, max_broken)


def test_every_picture_and_text_becomes_a_row_in_its_order(clip, store):
    pictures = Unit("a", [str(n) for n in range(150)])
    texts = Unit("b", texts=["longer", "one", "longer", "four"])
    embed_units([pictures, texts], clip, store())
    assert pictures.kept.keys == list(range(150))
    assert pictures.kept.image.tolist() == [[float(n), 1.0] for n in range(150)]
    assert pictures.kept.text is None
    assert texts.kept.text.tolist() == [[6.0, 2.0], [3.0, 2.0], [6.0, 2.0], [4.0, 2.0]]
    assert texts.kept.notes == {"cut": 0, "unknown": 0, "example": ""}
    assert len(texts.kept.image) == 0
    assert set(clip.seen) == {CHUNK}  # whatever there is, the encoders see chunks of one size


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, CHUNK + 1, 1000])
def test_rows_depend_on_neither_batch_size_nor_workers(clip, store, batch_size, workers):
    units = [
        Unit(str(n), [str(1000 * n + m) for m in range(200)], texts=() if n else None)
        for n in range(2)
    ]
    embed_units(units, clip, store(), batch_size, workers)
    for n, unit in enumerate(units):
        assert unit.kept.keys == list(range(200))
        assert unit.kept.image[:, 0].tolist() == [1000.0 * n + m for m in range(200)]
    assert units[1].kept.captions == [f"of {m}" for m in range(200)]
    assert units[1].kept.text[:, 0].tolist() == [float(len(f"of {m}")) for m in range(200)]


def test_what_is_kept_already_is_not_made_again(clip, store):
    first, second = Unit("a", "12", kept=SimpleNamespace(left_out={})), Unit("b", "34")
    embed_units([first, second], clip, store())
    assert clip.seen == [CHUNK]
    assert second.kept.image[:, 0].tolist() == [3.0, 4.0]


def test_broken_samples_within_the_limit_are_left_out_with_their_captions(clip, store):
    unit = Unit("a", ["0", "broken here", "2", "broken there"], texts=())
    embed_units([unit], clip, store(2))
    assert unit.kept.left_out == {1: "broken here", 3: "broken there"}
    assert (unit.kept.keys, unit.kept.captions) == ([0, 2], ["of 0", "of 2"])
    assert unit.kept.image[:, 0].tolist() == [0.0, 2.0]
    assert len(unit.kept.text) == 2


def test_broken_samples_beyond_the_limit_are_all_named_and_nothing_more_is_encoded(
    clip, store, caplog
):
    before, excess, after = (
        Unit("a", ["0", "broken"]),
        Unit("b", ["1", "broken", "broken"]),
        Unit("c", ["2", "broken"]),
    )
    texts = Unit("d", texts=["text"])
    with pytest.raises(UserError) as caught:
        embed_units([before, excess, after, texts], clip, store(2))
    cure = "fix them, or leave them out with --skip-broken, or --max-broken 4 or more"
    assert str(caught.value) == f"c 1: broken (4 broken samples so far; {cure})"
    assert [record.getMessage() for record in caplog.records] == [
        f"{name}: broken" for name in ("a 1", "b 1", "b 2", "c 1")
    ]
    assert clip.seen == [CHUNK]
    assert before.kept.left_out == {1: "broken"}  # was done before there were too many
    assert (excess.kept, after.kept, texts.kept) == (None, None, None)


@pytest.mark.parametrize(("allowed", "again"), [(0, True), (1, False)])
def test_samples_that_were_left_out_are_looked_at_again_if_they_are_too_many_now(
    clip, store, allowed, again
):
    unit = Unit("a", ["0", "1"], kept=SimpleNamespace(left_out={1: "broken"}))
    embed_units([unit], clip, store(allowed))
    assert (clip.seen == [CHUNK]) == again
    assert unit.kept.left_out == ({} if again else {1: "broken"})


def test_those_left_out_of_kept_units_count(clip, store):
    kept, new = (
        Unit("a", ["0", "1"], kept=SimpleNamespace(left_out={1: "broken"})),
        Unit("b", ["broken"]),
    )
    with pytest.raises(UserError, match="2 broken samples so far"):
        embed_units([kept, new], clip, store(1))


def test_a_stream_that_cannot_be_read_to_its_end_stops_at_once(clip, store):
    unit = Unit("a", ["0"])
    unit.streams = lambda size: [lambda transform: iter([Samples([], [], None, ["it is cut off"])])]
    with pytest.raises(UserError, match=r"^it is cut off$"):
        embed_units([unit], clip, store(5))
    assert unit.kept is None


def test_an_embedding_that_is_not_finite_is_refused_with_its_name(clip, store):
    with pytest.raises(
        UserError,
        match=r"the embedding of '.*1' is not finite; give .* --overwrite --precision fp32 --dtype float32",
    ):
        embed_units([Unit("a", ["0", "inf"])], clip, store())
    assert to_dtype(torch.tensor([[65504.0]]), torch.float16, ["a"]).tolist() == [[65504.0]]
    with pytest.raises(UserError, match="the embedding of 'b' is not finite"):
        to_dtype(torch.tensor([[1.0], [65536.0]]), torch.float16, ["a", "b"])


@pytest.mark.parametrize("rows", [1, CHUNK, CHUNK + 1, 3 * CHUNK - 1])
def test_chunks_are_filled_up_and_cut_again(rows):
    sizes = []
    z = torch.randn(rows, 3)
    found = in_chunks(lambda x: (sizes.append(len(x)), x.half())[1], z, "cpu")
    assert torch.equal(found, z.half().float())
    assert sizes == [CHUNK] * -(-rows // CHUNK)


def test_distinct_texts_stand_in_the_order_of_their_first_appearance():
    assert distinct_texts(["b", "a", "b", "c", "a"]) == (["b", "a", "c"], [0, 1, 0, 2, 1])
    assert distinct_texts([]) == ([], [])


# Texts no longer than they are.


def small_clip(**text):
    """A random CLIP of open_clip whose text tower reads 20 tokens; text: what else its configuration says."""
    torch.manual_seed(0)
    text = {"context_length": 20, "vocab_size": 300, "width": 32, "heads": 2, "layers": 2} | text
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    custom = text.pop("custom", False)
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(24, vision, text)
    return model.eval().requires_grad_(False)


def random_tokens(count, most=20, end=299):
    """Rows of token ids of random length: some words, the end-of-text token, padding."""
    generator, tokens = (
        torch.Generator().manual_seed(1),
        torch.zeros(count, most, dtype=torch.int64),
    )
    for row in tokens:
        length = int(torch.randint(1, most, (), generator=generator))
        row[:length] = torch.randint(3, 299, (length,), generator=generator)
        row[length] = end
    return tokens


SHORT = {
    "OpenAI's": {},
    "custom": {"custom": True},
    "end-of-text by its id": {"pool_type": "eos", "eos_id": 299},
    "custom, by its id": {"custom": True, "pool_type": "eos", "eos_id": 299},
}
LONG = {
    "reads the last token": {"custom": True, "pool_type": "last"},
    "sees all tokens": {"custom": True, "no_causal_mask": True},
    "has a class token": {"custom": True, "embed_cls": True},
}


@pytest.mark.parametrize("text", [*SHORT.values(), *LONG.values()], ids=[*SHORT, *LONG])
def test_texts_encoded_at_their_length_are_what_they_are_at_full_length(text):
    model, tokens = small_clip(**text), random_tokens(150)
    full, seen = in_chunks(model.encode_text, tokens, "cpu"), []
    words = getattr(model, "text", model).token_embedding
    words.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    z = encode_tokens(SimpleNamespace(model=model, device="cpu"), tokens, tqdm(disable=True))
    assert ((z - full).norm(dim=1) <= 1e-6 * full.norm(dim=1)).all()
    assert sorted(set(seen)) == ([4, 8, 12, 16, 20] if text in SHORT.values() else [20])
    assert full.std(dim=0).min() > 0.01  # the texts differ


def test_the_last_bit_of_a_text_does_not_depend_on_the_texts_beside_it():
    clip, tokens, bar = (
        SimpleNamespace(model=small_clip(), device="cpu"),
        random_tokens(300),
        tqdm(disable=True),
    )
    z, order = encode_tokens(clip, tokens, bar), torch.randperm(300)
    assert torch.equal(encode_tokens(clip, tokens[order], bar), z[order])
    assert torch.equal(encode_tokens(clip, tokens[:7], bar), z[:7])


def test_a_killed_worker_ends_the_run_in_one_line(clip, store):
    def die(transform):
        os.kill(os.getpid(), signal.SIGKILL)
        yield

    unit = Unit("a", ["1"] * 3)
    unit.streams = lambda size: [die]
    with pytest.raises(UserError, match=r"was killed.*--workers 0"):
        embed_units([unit], clip, store(), workers=1)
