"""What models/base.py promises, for every entry of METHODS."""

from dataclasses import replace

import pytest
import torch

from models import GROUPS, METHODS, recipes_for
from models.base import SMALL, GaussianAdaptor, total_loss
from models.layers import cosine_similarity
from tests.conftest import recipe_of
from utils.checkpoint import load_adaptor, save_adaptor

OURS = [*GROUPS["all"], *GROUPS["variants"], *GROUPS["originals"]]
EVERY = pytest.mark.parametrize("method", METHODS)


def make(method, dim=64, dtype=torch.float32):
    """An untrained adaptor in eval mode, so that nothing is drawn, and a row's results depend on no other row."""
    torch.manual_seed(0)
    return METHODS[method](dim).to(dtype).eval()


def embeddings(n, dim=64, dtype=torch.float32, seed=0):
    """Raw embeddings, of a norm like CLIP's."""
    generator = torch.Generator().manual_seed(seed)
    return (10 * dim**-0.5 * torch.randn(n, dim, generator=generator, dtype=torch.float64)).to(
        dtype
    )


def described(adaptor, z_image, z_text):
    """The uncertainties that there are, of images and of texts; one of them at least."""
    uncertainties = [adaptor.adapt_image(z_image)[1], adaptor.adapt_text(z_text)[1]]
    assert any(x is not None for x in uncertainties)
    return [x for x in uncertainties if x is not None]


def assert_every_parameter_is_trained(adaptor):
    for name, parameter in adaptor.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_methods_are_the_six_of_the_paper_the_variants_and_the_originals():
    assert GROUPS["all"] == ("asymvlm-psd", "asymvlm-vmf", "probvlm", "pfe", "pcmepp", "prolip")
    assert GROUPS["originals"] == (
        "probvlm-original",
        "probvlm-original-default-weight",
        "pfe-original",
        "pcmepp-original",
        "prolip-original",
    )
    assert list(METHODS)[: len(OURS)] == OURS  # a reader may have added some


@pytest.mark.parametrize("method", GROUPS["all"])
def test_recipes_are_the_papers_and_the_small_one(method):
    optimizer, lr, weight_decay = {
        "asymvlm-psd": ("sgd", 1e-2, 5e-4),
        "asymvlm-vmf": ("sgd", 1e-2, 5e-4),
        "probvlm": ("adamw", 1e-4, 5e-4),
        "pfe": ("sgd", 1e-3, 5e-4),
        "pcmepp": ("adamw", 5e-4, 1e-4),
        "prolip": ("adamw", 5e-4, 5e-4),
    }[method]
    paper = METHODS[method].recipes["paper"]
    assert (paper.optimizer, paper.lr, paper.weight_decay, paper.batch_size, paper.epochs) == (
        optimizer,
        lr,
        weight_decay,
        2048,
        200,
    )
    small, demo = (METHODS[method].recipes[name] for name in ("small", "demo"))
    assert replace(demo, epochs=small.epochs, batch_size=small.batch_size, lr=small.lr) == small
    assert (small.epochs, small.batch_size) == (
        SMALL.epochs,
        SMALL.batch_size,
    )  # the same budget for all


@EVERY
def test_a_recipe_starts_the_variances_where_the_method_has_any(method):
    adaptor, z = make(method, 64), embeddings(200, 64)
    before = [part.clone() for part in adaptor.encode(z, z)]
    adaptor.start_at(None)
    assert all(torch.equal(a, b) for a, b in zip(adaptor.encode(z, z), before, strict=True))
    if not isinstance(adaptor, GaussianAdaptor):
        assert all(recipe.start_variance is None for recipe in adaptor.recipes.values())
        with pytest.raises(NotImplementedError, match="start_variance"):
            adaptor.start_at(1.0)
        return
    adaptor.start_at(2.0)
    for mean, uncertainty in (adaptor.adapt_image(z), adaptor.adapt_text(z)):
        assert torch.equal(mean, before[0])
        total = (
            uncertainty if "-original" in method else 64 * uncertainty
        )  # all dimensions together
        assert ((total > 1.5) & (total < 2.6)).all()


@EVERY
@pytest.mark.parametrize("dim", [64, 512, 1152])
def test_shapes_at_any_width(method, dim):
    adaptor = make(method, dim)
    z_image, z_text = embeddings(3, dim), embeddings(5, dim, seed=1)
    assert adaptor.embed_dim == dim
    assert all(len(x) == 3 for x in adaptor.encode(z_image, z_text[:3]))
    assert adaptor(z_image, z_text[:3]).shape == ()
    assert adaptor.similarity(z_image, z_text).shape == (3, 5)
    described = {
        "image": (3, *adaptor.adapt_image(z_image)),
        "text": (5, *adaptor.adapt_text(z_text)),
    }
    for rows, mean, uncertainty in described.values():
        assert mean.shape == (rows, dim)
        assert torch.isfinite(mean).all()
        assert uncertainty is None or (uncertainty.shape == (rows,) and (uncertainty > 0).all())
    uncertain = tuple(
        modality for modality, (*_, uncertainty) in described.items() if uncertainty is not None
    )
    assert uncertain
    if method in OURS:
        # AsymVLM's "spread" is by default the text alone.
        assert uncertain == getattr(adaptor, "spread", ("image", "text"))


@EVERY
def test_loss_is_finite_and_reaches_every_parameter(method):
    adaptor = make(method).train()
    assert all(parameter.requires_grad for parameter in adaptor.parameters())
    loss = adaptor(embeddings(32), embeddings(32, seed=1))
    loss.backward()
    assert torch.isfinite(loss)
    assert_every_parameter_is_trained(adaptor)


@EVERY
def test_forward_is_the_loss_of_what_encode_returns(method):
    adaptor = make(method)
    z_image, z_text = embeddings(8), embeddings(8, seed=1)
    loss = adaptor.loss(*adaptor.encode(z_image, z_text))
    assert torch.equal(adaptor(z_image, z_text), total_loss(loss))
    encoded = (*adaptor.encode_image(z_image), *adaptor.encode_text(z_text))
    assert all(
        torch.equal(x, y) for x, y in zip(adaptor.encode(z_image, z_text), encoded, strict=True)
    )


@EVERY
def test_similarity_is_the_score_of_what_the_encoders_return(method):
    adaptor = make(method)
    z_image, z_text = embeddings(4), embeddings(6, seed=1)
    assert torch.equal(
        adaptor.similarity(z_image, z_text),
        adaptor.score(adaptor.encode_image(z_image), adaptor.encode_text(z_text)),
    )


TERMS = {
    "probvlm": {"intra_image", "intra_text", "cross_image", "cross_text"},
    "probvlm-original": {"intra_image", "intra_text", "cross_image", "cross_text"},
    "probvlm-original-default-weight": {"intra_image", "intra_text", "cross_image", "cross_text"},
    "pcmepp": {"matching"},
    "pcmepp-original": {"matching", "pseudo_positives", "kl_image", "kl_text"},
    "prolip": {"contrastive", "kl_image", "kl_text"},
    "prolip-original": {"contrastive", "kl_image", "kl_text", "inclusion"},
}


@EVERY
def test_losses_of_several_terms_name_them(method):
    adaptor = make(method)
    loss = adaptor.loss(*adaptor.encode(embeddings(8), embeddings(8, seed=1)))
    if method not in TERMS:
        assert isinstance(loss, torch.Tensor)
        assert total_loss(loss) is loss
        return
    assert set(loss) == TERMS[method]
    assert {term.shape for term in loss.values()} == {()}
    assert total_loss(loss).item() == pytest.approx(
        sum(term.item() for term in loss.values()), rel=1e-6
    )


@EVERY
def test_what_ranks_by_the_frozen_cosine_says_so(method):
    adaptor = make(method)
    expected = adaptor.ranks_by_frozen_cosine
    if method in OURS:
        assert expected is (method.removesuffix("-original") in ("pfe", "pcmepp", "prolip"))
    z_image, z_text = embeddings(20), embeddings(30, seed=1)
    same = torch.allclose(
        adaptor.similarity(z_image, z_text).float(), cosine_similarity(z_image, z_text), atol=1e-5
    )
    assert same == expected


@EVERY
def test_own_score_is_of_all_pairs_as_they_stand(method):
    adaptor = make(method, dtype=torch.float64)
    z_image, z_text = embeddings(7, dtype=torch.float64), embeddings(9, dtype=torch.float64, seed=1)
    rows, columns = torch.randperm(7), torch.randperm(9)
    score = adaptor.own_score(adaptor.encode_image(z_image), adaptor.encode_text(z_text))
    assert score.shape == (7, 9)
    assert score.dtype == torch.float64
    shuffled = adaptor.own_score(
        adaptor.encode_image(z_image[rows]), adaptor.encode_text(z_text[columns])
    )
    torch.testing.assert_close(shuffled, score[rows][:, columns], rtol=1e-10, atol=1e-12)


@EVERY
def test_bfloat16_autocast_trains_close_to_float32(method):
    adaptor = make(method)
    z_image, z_text = embeddings(32), embeddings(32, seed=1)
    exact = adaptor(z_image, z_text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = adaptor(z_image, z_text)
        similarity = adaptor.similarity(z_image, z_text)
        (mean_image, of_image), (mean, of_text) = (
            adaptor.adapt_image(z_image),
            adaptor.adapt_text(z_text),
        )
        trained = adaptor.train()(z_image, z_text)
    trained.backward()
    assert_every_parameter_is_trained(adaptor.eval())
    assert {x.dtype for x in (loss, trained, mean, mean_image)} == {torch.float32}
    assert similarity.dtype in (torch.float32, torch.float64)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    for found, expected in (
        (of_image, adaptor.adapt_image(z_image)[1]),
        (of_text, adaptor.adapt_text(z_text)[1]),
    ):
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=0)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_are_raised_first(method, dtype):
    adaptor = make(method)
    z_image, z_text = embeddings(16, dtype=dtype), embeddings(16, dtype=dtype, seed=1)
    loss = adaptor(z_image, z_text)
    loss.backward()
    assert_every_parameter_is_trained(adaptor)
    assert torch.equal(loss, adaptor(z_image.float(), z_text.float()))
    assert torch.equal(
        adaptor.similarity(z_image, z_text), adaptor.similarity(z_image.float(), z_text.float())
    )
    for describe, z in ((adaptor.adapt_image, z_image), (adaptor.adapt_text, z_text)):
        torch.testing.assert_close(describe(z), describe(z.float()), rtol=0, atol=0)
    assert adaptor.adapt_image(z_image)[0].dtype == torch.float32


@EVERY
def test_float64_stays_float64(method):
    adaptor = make(method, dtype=torch.float64)
    z_image, z_text = embeddings(8, dtype=torch.float64), embeddings(8, dtype=torch.float64, seed=1)
    outputs = [
        *adaptor.encode(z_image, z_text),
        adaptor(z_image, z_text),
        adaptor.similarity(z_image, z_text),
    ]
    outputs += [
        x for x in (*adaptor.adapt_image(z_image), *adaptor.adapt_text(z_text)) if x is not None
    ]
    assert {x.dtype for x in outputs} == {torch.float64}


@EVERY
def test_permuting_the_pairs_leaves_the_loss_unchanged(method):
    adaptor = make(method, dtype=torch.float64)
    z_image, z_text = (
        embeddings(12, dtype=torch.float64),
        embeddings(12, dtype=torch.float64, seed=1),
    )
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    loss = adaptor(z_image, z_text).item()
    assert adaptor(z_image[order], z_text[order]).item() == pytest.approx(loss, rel=1e-10)
    assert adaptor(z_image[order], z_text).item() != pytest.approx(
        loss, rel=1e-10
    )  # broken pairs are other pairs


@EVERY
def test_permuting_the_rows_permutes_what_is_reported(method):
    adaptor = make(method, dtype=torch.float64)
    z_image, z_text = embeddings(7, dtype=torch.float64), embeddings(9, dtype=torch.float64, seed=1)
    rows, columns = (torch.randperm(n, generator=torch.Generator().manual_seed(2)) for n in (7, 9))
    similarity = adaptor.similarity(z_image, z_text)
    torch.testing.assert_close(
        adaptor.similarity(z_image[rows], z_text[columns]),
        similarity[rows][:, columns],
        rtol=1e-10,
        atol=1e-12,
    )
    for describe, z, order in (
        (adaptor.adapt_image, z_image, rows),
        (adaptor.adapt_text, z_text, columns),
    ):
        for before, after in zip(describe(z), describe(z[order]), strict=True):
            torch.testing.assert_close(
                after, before if before is None else before[order], rtol=1e-10, atol=1e-12
            )


@EVERY
@pytest.mark.parametrize("training", [True, False])
def test_batch_of_one(method, training):
    adaptor = make(method).train(training)
    z_image, z_text = embeddings(1), embeddings(1, seed=1)
    loss = adaptor(z_image, z_text)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in adaptor.parameters())
    assert torch.isfinite(adaptor.similarity(z_image, z_text)).all()
    assert {x.shape for x in described(adaptor, z_image, z_text)} == {(1,)}


@EVERY
@pytest.mark.parametrize("training", [True, False])
def test_zero_embeddings_are_finite(method, training):
    adaptor = make(method).train(training)
    zero = torch.zeros(4, 64)
    loss = adaptor(zero, zero)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in adaptor.parameters())
    assert torch.isfinite(adaptor.similarity(zero, zero)).all()
    assert all(torch.isfinite(x).all() for x in described(adaptor, zero, zero))


@EVERY
def test_a_few_steps_lower_the_loss(method):
    adaptor = make(method).train()
    z_image = embeddings(32)
    z_text = z_image + 3 * embeddings(
        32, seed=1
    )  # so that the CLIP's direction is not the answer already
    optimizer = torch.optim.AdamW(adaptor.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = adaptor(z_image, z_text)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@EVERY
def test_saved_adaptor_loads_as_it_was(method, tmp_path):
    adaptor = make(method)
    with torch.no_grad():
        for value in (*adaptor.parameters(), *adaptor.buffers()):
            value.add_(0.01)  # nothing is at its initial value
    path = tmp_path / f"{method}.pt"
    save_adaptor(adaptor, method, adaptor.recipes[recipe_of(method)], {"seed": 0}, path)
    loaded = load_adaptor(path)
    assert type(loaded) is METHODS[method]
    assert not loaded.training
    assert adaptor.state_dict().keys() == loaded.state_dict().keys()
    assert all(
        torch.equal(value, loaded.state_dict()[name])
        for name, value in adaptor.state_dict().items()
    )
    z_image, z_text = embeddings(5), embeddings(5, seed=1)
    assert torch.equal(adaptor(z_image, z_text), loaded(z_image, z_text))
    assert torch.equal(adaptor.similarity(z_image, z_text), loaded.similarity(z_image, z_text))
    pairs = zip(
        described(adaptor, z_image, z_text), described(loaded, z_image, z_text), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_recipes_for_a_method_are_its_own_and_those_of_its_further_form():
    assert recipes_for("pfe") == ["paper", "small", "demo", "original"]
    assert recipes_for("pfe-original") == ["original"]
    assert recipes_for("asymvlm-psd") == ["paper", "small", "demo", "original"]
