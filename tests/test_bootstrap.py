"""Resamples, intervals and p-values, against the metrics of the drawn queries."""

import doctest

import numpy as np
import pytest

from utils.evaluation import bootstrap
from utils.evaluation.bootstrap import interval, over_seeds, p_value, resample
from utils.evaluation.figures import measure, measure_resamples


def random_answers(queries=60, ties=True, seed=0):
    """Answers of one direction with everything that a query may have."""
    rng = np.random.default_rng(seed)
    uncertainty = rng.integers(0, 12, queries) / 10 if ties else rng.random(queries)
    return {
        "rank": rng.integers(1, 12, queries),
        "uncertainty": uncertainty,
        "image_uncertainty": rng.random(queries),
        "words": rng.integers(1, 9, queries).astype(float),
        "relevant": rng.integers(1, 30, queries),
        "relevant_rank": rng.integers(1, 12, queries),
        "r_precision": rng.random(queries),
        "ap_at_r": rng.random(queries),
    }


def draw_weights(images, resamples):
    """The weights of all resamples, (resamples, Q)."""
    weights = []

    def keep(weight):
        weights.extend(weight)
        return {"queries": weight.sum(axis=1)}

    total = resample(keep, images, resamples)["queries"]
    weights = np.array(sorted(map(tuple, weights)))
    assert sorted(weights.sum(axis=1)) == sorted(total)
    return weights


def test_a_resample_has_as_many_images_with_all_their_queries_and_is_the_same_at_every_call():
    images = np.array([7, 3, 3, 9, 7, 7])
    counts = draw_weights(images, 20)
    assert (counts[:, [0, 1, 3]].sum(axis=1) == 3).all()  # of images
    assert (counts[:, 1] == counts[:, 2]).all() and (counts[:, [0]] == counts[:, [4, 5]]).all()
    assert (counts == draw_weights(images, 20)).all()
    assert len({tuple(count) for count in counts}) > 5
    assert (draw_weights(np.arange(50), 20).sum(axis=1) == 50).all()


def test_captions_of_one_image_that_are_all_alike_tell_no_more_than_one():
    one = random_answers(queries=200)
    five = {field: np.repeat(values, 5) for field, values in one.items()} | {
        "image": np.repeat(np.arange(200), 5)
    }
    draws = [measure_resamples({"t2i": answers}, 10, 50)["t2i"]["R@1"] for answers in (one, five)]
    np.testing.assert_allclose(*draws)


def test_an_interval_has_the_seeds_variance_in_it():
    rng = np.random.default_rng(0)
    draws = np.stack(
        [rng.normal(0.7, 0.01, 1000), rng.normal(0.9, 0.01, 1000)]
    )  # one of two seeds has collapsed
    low, high = interval(over_seeds(draws))
    assert (low, high) == (pytest.approx(0.69, abs=0.02), pytest.approx(0.91, abs=0.02))
    assert (over_seeds(draws[:1]) == draws[0]).all()
    assert set(np.round(over_seeds(np.array([[0.0] * 500, [1.0] * 500])), 9)) == {0.0, 0.5, 1.0}
    assert (over_seeds(draws) == over_seeds(draws)).all()
    assert (over_seeds(draws) != over_seeds(draws, side=1)).any()


@pytest.mark.parametrize("ties", [False, True])
def test_every_figure_of_a_resample_is_that_of_the_drawn_queries(ties):
    answers = {
        d: random_answers(queries=97, ties=ties, seed=seed) for seed, d in enumerate(("t2i", "i2t"))
    }
    images = {
        "t2i": np.random.default_rng(5).integers(40, size=97),
        "i2t": np.arange(97),
    }  # of one to seven captions
    answers["t2i"]["image"] = images["t2i"]
    draws = measure_resamples(answers, 10, 25)
    assert set(draws) == {"t2i", "i2t", "ambiguity", "relevance_t2i", "relevance_i2t"}
    assert set(draws["i2t"]) == {"R@1", "R@5", "R@10", "AURC", "E-AURC", "S", "R2", "-S*R2"}
    assert set(draws["ambiguity"]) == {"spearman", "partial_spearman_given_length", "R@1_described"}
    assert set(draws["relevance_t2i"]) == {"R@1", "R@5", "R@10", "mAP@R", "R-Precision"}
    _, image_of = np.unique(images["t2i"], return_inverse=True)
    drawn_images = {"t2i": bootstrap._draw(image_of.max() + 1, 25), "i2t": bootstrap._draw(97, 25)}
    counts = {"t2i": drawn_images["t2i"][:, image_of], "i2t": drawn_images["i2t"]}
    for i in range(25):
        drawn = {
            d: {key: np.repeat(v, counts[d][i]) for key, v in fields.items()}
            for d, fields in answers.items()
        }
        expected = measure(drawn, 10)
        for section, figures in draws.items():
            for figure, values in figures.items():
                # A query that is drawn twice counts once, doubly, in the mean over the risk-coverage curve.
                near = 0.02 if "AURC" in figure else 1e-12
                assert values[i] == pytest.approx(expected[section][figure], abs=near), (
                    section,
                    figure,
                )


def test_what_is_undefined_in_a_resample_has_no_interval():
    answers = random_answers() | {"rank": np.ones(60, dtype=int), "words": np.ones(60)}
    draws = measure_resamples({"t2i": answers}, 10, 10)
    assert interval(draws["t2i"]["S"]) is None
    assert interval(draws["ambiguity"]["partial_spearman_given_length"]) is None
    assert p_value(np.array([0.1, np.nan])) is None
    assert interval(np.array([])) is None


def test_the_interval_of_recall_is_about_the_binomial_one():
    rng = np.random.default_rng(1)
    answers = random_answers(queries=2000) | {"rank": 1 + (rng.random(2000) > 0.3)}
    low, high = interval(measure_resamples({"t2i": answers}, 10, 1000)["t2i"]["R@1"])
    mean = np.mean(answers["rank"] == 1)
    half = 1.96 * np.sqrt(mean * (1 - mean) / 2000)
    assert low == pytest.approx(mean - half, abs=0.15 * half)
    assert high == pytest.approx(mean + half, abs=0.15 * half)


def test_p_values_count_the_rarer_sign_twice():
    assert p_value(np.array([0.1, 0.2, 0.3, -0.1])) == 0.8  # 2 (1 + 1) / (4 + 1)
    assert p_value(np.zeros(4)) == 1.0
    assert p_value(np.ones(999)) == 0.002  # never 0


def test_a_paired_difference_is_tighter_than_two_intervals():
    answers = random_answers(queries=500)
    better = answers | {"rank": np.where(np.arange(500) % 10 == 0, 1, answers["rank"])}
    a, b = (measure_resamples({"t2i": x}, 10, 300)["t2i"]["R@1"] for x in (better, answers))
    low, high = interval(a - b)
    assert low > 0
    assert high - low < np.diff(interval(a))[0]


def test_docstring_examples_hold():
    assert doctest.testmod(bootstrap).failed == 0
