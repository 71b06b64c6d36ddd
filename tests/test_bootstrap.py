"""Resamples, intervals and p-values, against the metrics of the drawn queries."""

import doctest

import numpy as np
import pytest
from scipy import stats

from tests.benchmarks import coverage
from utils.evaluation import bootstrap
from utils.evaluation.bootstrap import Estimate, bootstrap_p_value, percentile_interval, resample
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


def estimate_of(seeds, rng, resamples=1000, mean=0.7, seed_spread=0.1, image_spread=0.02):
    values = mean + seed_spread * rng.standard_normal(seeds)
    return Estimate.over_seeds(
        values, values[:, None] + image_spread * rng.standard_normal((seeds, resamples))
    )


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_an_interval_over_seeds_is_the_formulas(seeds):
    rng = np.random.default_rng(0)
    values = rng.normal(0.7, 0.1, seeds)
    draws = values[:, None] + rng.normal(0, 0.02, (seeds, 500))
    low, high = Estimate.over_seeds(values, draws).interval()
    v = np.var(draws.mean(axis=0), ddof=1)
    t = stats.t(seeds - 1).ppf(0.975)
    half_width = np.sqrt(stats.norm.ppf(0.975) ** 2 * v + t**2 * np.var(values, ddof=1) / seeds)
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width))


def test_a_difference_adds_the_variances_of_both_seeds_and_pairs_the_images():
    rng = np.random.default_rng(1)
    values = rng.normal(0.7, 0.1, (2, 3))
    noise = rng.normal(0, 0.5, 800)  # the same images are easy for both
    draws = values[:, :, None] + noise + rng.normal(0, 0.01, (2, 3, 800))
    first, second = map(Estimate.over_seeds, values, draws)
    difference = first - second
    v = np.var(draws[0].mean(axis=0) - draws[1].mean(axis=0), ddof=1)
    s2 = np.var(values, axis=1, ddof=1).sum() / 3
    half_width = np.sqrt(stats.norm.ppf(0.975) ** 2 * v + stats.t(4).ppf(0.975) ** 2 * s2)
    low, high = difference.interval()
    assert (high - low) / 2 == pytest.approx(half_width)
    assert (high + low) / 2 == pytest.approx(values[0].mean() - values[1].mean())


def test_one_seed_has_the_percentile_interval_and_a_collapsed_one_widens_it():
    rng = np.random.default_rng(2)
    draws = rng.normal(0.7, 0.01, (2, 1000))
    one = Estimate.over_seeds([0.7], draws[:1])
    assert one.interval() == percentile_interval(draws[0])
    assert one.p_value() == bootstrap_p_value(draws[0])
    low, high = Estimate.over_seeds([0.7, 0.9], draws).interval()
    assert low < 0 and high > 1  # two seeds that disagree say nothing: t = 12.7


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_p_value_is_the_level_at_which_zero_leaves_the_interval(seeds, monkeypatch):
    rng = np.random.default_rng(seeds)
    difference = estimate_of(seeds, rng) - estimate_of(seeds, rng, mean=0.6)
    p = difference.p_value()
    assert 1e-6 < p < 1
    monkeypatch.setattr(bootstrap, "CONFIDENCE", 1 - p)
    assert min(map(abs, difference.interval())) == pytest.approx(0, abs=1e-6)


def test_equal_rows_have_a_p_value_of_one_and_rows_without_noise_nearly_none():
    same = estimate_of(3, np.random.default_rng(0))
    assert Estimate(0.0, np.zeros(100), 0.0, 2).p_value() == 1.0
    assert Estimate(0.1, np.full(100, 0.1), 0.0, 2).p_value() == pytest.approx(1e-12)
    undefined = Estimate(0.1, np.array([np.nan, 0.1]), same.seed_variance, 2)
    assert undefined.interval() is None and undefined.p_value() is None


@pytest.mark.parametrize("spread", [0.003, 0.1])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover_the_truth_and_equal_methods_rarely_differ(seeds, spread):
    assert coverage.coverage(seeds, spread, 200) >= 0.93
    by_interval, by_p_value = coverage.false_positives(seeds, spread, 200)
    assert by_interval <= 0.07
    assert by_p_value == by_interval


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
    assert percentile_interval(draws["t2i"]["S"]) is None
    assert percentile_interval(draws["ambiguity"]["partial_spearman_given_length"]) is None
    assert bootstrap_p_value(np.array([0.1, np.nan])) is None
    assert percentile_interval(np.array([])) is None


def test_the_interval_of_recall_is_about_the_binomial_one():
    rng = np.random.default_rng(1)
    answers = random_answers(queries=2000) | {"rank": 1 + (rng.random(2000) > 0.3)}
    low, high = percentile_interval(measure_resamples({"t2i": answers}, 10, 1000)["t2i"]["R@1"])
    mean = np.mean(answers["rank"] == 1)
    half = 1.96 * np.sqrt(mean * (1 - mean) / 2000)
    assert low == pytest.approx(mean - half, abs=0.15 * half)
    assert high == pytest.approx(mean + half, abs=0.15 * half)


def test_p_values_count_the_rarer_sign_twice():
    assert bootstrap_p_value(np.array([0.1, 0.2, 0.3, -0.1])) == 0.8  # 2 (1 + 1) / (4 + 1)
    assert bootstrap_p_value(np.zeros(4)) == 1.0
    assert bootstrap_p_value(np.ones(999)) == 0.002  # never 0


def test_a_paired_difference_is_tighter_than_two_intervals():
    answers = random_answers(queries=500)
    better = answers | {"rank": np.where(np.arange(500) % 10 == 0, 1, answers["rank"])}
    a, b = (measure_resamples({"t2i": x}, 10, 300)["t2i"]["R@1"] for x in (better, answers))
    low, high = percentile_interval(a - b)
    assert low > 0
    assert high - low < np.diff(percentile_interval(a))[0]


def test_docstring_examples_hold():
    assert doctest.testmod(bootstrap).failed == 0
