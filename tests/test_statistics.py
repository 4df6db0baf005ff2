"""Scores from counts, and intervals of their differences that cover what they should."""
import math

import numpy as np
import pytest
import torch

import experiment as stats
from train_cls import (
    accuracy,
    confusion,
    f1,
    harmonic_f1,
    macro_f1,
    macro_precision,
    macro_recall,
    precision,
    recall,
    tally,
    topk,
    weakest,
)

LABELS = np.array([0, 0, 0, 1, 1, 2])
ANSWERS = np.array([0, 0, 1, 1, 2, 2])                                   # F1: 4/5, 1/2, 2/3


def worlds(hits):
    """Counts (S, G, 3, 1) of one class and one image per group, from its hits (S, G)."""
    return np.stack([hits, np.ones_like(hits), np.ones_like(hits)], -1)[..., None].astype(float)


# ---- scores

def test_a_tally_counts_hits_truth_and_calls_of_each_group_and_class():
    counts = tally(LABELS, ANSWERS, groups=np.array([7, 7, 3, 3, 7, 3]), K=4)
    assert counts.dtype == np.float64 and counts.tolist() == [
        [[0, 1, 1, 0], [1, 1, 1, 0], [0, 2, 1, 0]],                                   # group 3
        [[2, 0, 0, 0], [2, 1, 0, 0], [2, 0, 1, 0]]]                                   # group 7


def test_scores_are_those_counted_by_hand():
    counts = tally(LABELS, ANSWERS, np.arange(6), 3).sum(0)
    assert f1(counts) == pytest.approx([4 / 5, 1 / 2, 2 / 3])
    assert recall(counts) == pytest.approx([2 / 3, 1 / 2, 1])
    assert precision(counts) == pytest.approx([1, 1 / 2, 1 / 2])
    assert macro_recall(counts) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert macro_precision(counts) == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert accuracy(counts) == pytest.approx(4 / 6)
    assert macro_f1(counts) == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)
    assert harmonic_f1(counts) == pytest.approx(3 / (5 / 4 + 2 + 3 / 2))


def test_scores_are_those_of_a_confusion_matrix():
    rng = np.random.default_rng(0)
    labels, answers = rng.integers(6, size=(2, 300))
    counts = tally(labels, answers, rng.integers(9, size=300), 6).sum(0)
    matrix = confusion(*map(torch.as_tensor, (labels, answers)), 6).numpy()
    assert counts.tolist() == [matrix.diagonal().tolist(), matrix.sum(1).tolist(), matrix.sum(0).tolist()]
    P, R = matrix.diagonal() / matrix.sum(0), matrix.diagonal() / matrix.sum(1)
    assert recall(counts) == pytest.approx(R) and precision(counts) == pytest.approx(P)
    assert f1(counts) == pytest.approx(2 * P * R / (P + R))


def test_the_harmonic_mean_is_0_where_one_class_is_never_found():
    counts = tally(LABELS, np.array([0, 0, 0, 1, 1, 1]), np.arange(6), 3).sum(0)
    assert harmonic_f1(counts) == 0 and macro_f1(counts) == pytest.approx((1 + 4 / 5 + 0) / 3)


def test_a_class_without_test_images_is_left_out_even_if_it_is_called():
    answers = np.array([0, 0, 3, 1, 2, 2])                               # F1: 4/5, 2/3, 2/3; class 4 of 5
    counts = tally(LABELS, answers, np.arange(6), 5).sum(0)
    assert macro_f1(counts) == pytest.approx((4 / 5 + 2 / 3 + 2 / 3) / 3)
    assert harmonic_f1(counts) == pytest.approx(3 / (5 / 4 + 3 / 2 + 3 / 2))
    assert macro_precision(counts) == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert macro_recall(counts) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert accuracy(counts) == pytest.approx(4 / 6)


def test_the_weakest_class_is_one_that_has_a_test_image():
    assert weakest(tally([0, 0, 2], [0, 0, 2], [0, 0, 0], 4)[0]) == 0                  # not 1 or 3
    assert weakest(tally([1, 1, 3], [1, 0, 3], [0, 0, 0], 4)[0]) == 1


def test_top_k_counts_the_images_whose_class_is_among_the_k_likeliest():
    logits = torch.tensor([[0.1, 0.2, 0.9, 0.5], [5.0, 4.0, -1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    labels = torch.tensor([2, 1, 0])                                     # first, second and last of four
    assert [topk(logits, labels, k) for k in (1, 2, 3, 4)] == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1])
    assert topk(logits, labels) == 1                                     # of fewer than five classes, always
    assert topk(torch.arange(7.0).expand(7, 7), torch.arange(7)) == pytest.approx(5 / 7)   # always 2 to 6


def test_a_class_that_a_resampled_test_set_lacks_stays_in_the_mean_as_0():
    """The second of two groups alone holds class 1: where it is not drawn, macro-F1 is half of class 0's."""
    counts = np.stack([tally([0, 0], [0, 0], [0, 0], 2), tally([1, 1], [1, 1], [0, 0], 2)], 1)
    assert set(stats.replicates(counts, macro_f1, 50)[0]) == {1.0, 0.5}
    assert set(stats.replicates(counts, harmonic_f1, 50)[0]) == {1.0, 0.0}


# ---- resampled test sets

def test_column_0_is_the_statistic_and_the_others_are_what_drawing_groups_gives():
    rng = np.random.default_rng(0)
    counts = np.stack([tally(*rng.integers(3, size=(2, 40)), np.arange(40) // 4, 3) for _ in range(2)])
    r = stats.replicates(counts, macro_f1, B=150, seed=3)
    assert r.shape == (2, 151) and r[:, 0] == pytest.approx(macro_f1(counts.sum(1)))
    rng = np.random.default_rng(3)
    draws = np.concatenate([rng.integers(10, size=(100, 10)), rng.integers(10, size=(50, 10))])
    for b in (0, 99, 100, 149):
        assert r[:, 1 + b] == pytest.approx(macro_f1(counts[:, draws[b]].sum(1)))


def test_two_arms_meet_the_same_samples_and_other_seeds_others():
    counts = worlds(np.random.default_rng(0).random((2, 30)) < 0.7)
    a = stats.replicates(counts, accuracy, 20)
    assert (a[0] == stats.replicates(counts[:1], accuracy, 20)).all()
    assert (a[:, 1:] != stats.replicates(counts, accuracy, 20, seed=1)[:, 1:]).mean() > 0.8


def test_the_spread_over_samples_is_the_standard_error():
    hits = np.random.default_rng(0).random((1, 400)) < 0.8
    spread = stats.replicates(worlds(hits), accuracy, 4000)[0, 1:].std()
    assert spread == pytest.approx(hits.std() / 20, rel=0.05)


# ---- intervals

def two_way(d):
    """The Gain of d (..., seeds, images) by the textbook's two-way layout, without a guard for no spread."""
    *_, S, G = d.shape
    seed, image, mean = d.mean(-1), d.mean(-2), d.mean((-1, -2))
    single = d - seed[..., :, None] - image[..., None, :] + mean[..., None, None]
    rest = (single**2).sum((-1, -2)) / ((S - 1) * (G - 1)) / (S * G)
    group = image.var(-1, ddof=1) / G - rest
    return stats.Gain(mean, ((seed.var(-1, ddof=1) / S, S - 1), (np.maximum(group, 0), G - 1)))


@pytest.mark.parametrize("dof, q975, q80", [
    (1, 12.7062, 1.37638), (2, 4.30265, 1.06066), (4, 2.77645, 0.94096), (10, 2.22814, 0.87906),
    (1e6, 1.95997, 0.84162)])
def test_t_is_the_tables(dof, q975, q80):
    assert stats.student(dof)(0.975) == pytest.approx(q975, rel=1e-5)
    assert stats.student(dof)(0.8) == pytest.approx(q80, rel=2e-5) and stats.student(dof)(0.5) == 0
    assert stats.Gain(-q975, ((1.0, dof),)).p == pytest.approx(0.05, rel=1e-4)
    closed_form = 1 - 4 / math.sqrt(2 + 16)                              # at 2 degrees of freedom
    assert stats.Gain(2.0, ((0.25, 2),)).p == pytest.approx(closed_form)


@pytest.mark.parametrize("seeds, images", [(0.05, 0.1), (0.0, 0.3), (0.0, 0.0)])
def test_for_accuracy_it_is_the_two_way_analysis_of_variance(seeds, images):
    rng = np.random.default_rng(1)
    p = 0.6 + seeds * rng.standard_normal((5, 1)) + images * rng.standard_normal((1, 500))
    a, b = rng.random((2, 5, 500)) < np.stack([p, np.full_like(p, 0.55)])
    g = stats.gain(*(stats.replicates(worlds(hits), accuracy, 4000) for hits in (a, b)), G=500)
    expected = two_way(a.astype(float) - b)
    assert g.mean == pytest.approx(expected.mean) and g.half == pytest.approx(expected.half, rel=0.08)
    assert g.parts[0] == pytest.approx(expected.parts[0])
    assert g.parts[1][0] == pytest.approx(expected.parts[1][0], abs=0.1 * g.half**2 / 4)


def test_only_seeds_or_only_groups():
    seeds = np.array([0.1, 0.3, 0.2, 0.5])
    g = stats.gain(np.repeat(seeds[:, None], 9, 1), 0, G=50)          # alike in all test sets
    se = seeds.std(ddof=1) / 2
    assert g.mean == pytest.approx(0.275)
    assert (g.half, g.detectable()) == pytest.approx((3.18245 * se, (3.18245 + 0.97847) * se))
    tiles = np.array([0.3, 0.9, 0.5, 0.1])
    alike = stats.replicates(worlds(np.tile(tiles, (3, 1))), accuracy, 20_000)        # in all seeds
    g = stats.gain(alike, 0, G=4)
    assert g.half == pytest.approx(3.18245 * tiles.std(ddof=1) / 2, rel=0.02)


def test_the_half_widths_of_seeds_and_groups_add_up_in_quadrature():
    g = stats.Gain(0.1, ((0.02**2, 2), (0.03**2, 49)))
    assert g.half == pytest.approx(math.hypot(4.30265 * 0.02, 2.00958 * 0.03), rel=1e-4)
    assert g.detectable() == pytest.approx(g.half + math.hypot(1.06066 * 0.02, 0.84887 * 0.03), rel=1e-4)
    assert g.detectable(3) > g.detectable() and stats.Gain(0.0, ((1.0, 1),)).detectable() == 1


def test_no_difference_is_no_difference_and_one_without_any_spread_is_certain():
    none, sure = (stats.gain(np.full((3, 20), value), 0, G=10) for value in (0.0, 0.1))
    assert (none.mean, none.half, none.p, none.detectable()) == (0, 0, 1, 0)
    assert sure.half == pytest.approx(0, abs=1e-12) and sure.p < 1e-9
    with pytest.raises(ValueError, match="two seeds"):
        stats.gain(np.zeros((1, 20)), 0, G=10)


def test_seeds_that_agree_by_chance_are_not_certain():
    """Three seeds with 6 of 10 right, but never the same six: single answers vary, and nothing else does."""
    hits = np.array([[1, 1, 1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 0, 0],
                     [1, 1, 0, 0, 0, 0, 1, 1, 1, 1]])
    rest = two_way(hits.astype(float))
    assert rest.half == pytest.approx(0, abs=1e-9)                       # what the formula alone would say
    g = stats.gain(stats.replicates(worlds(hits), accuracy, 4000) - 0.6, 0, G=10)
    single = hits - hits.mean(0) - hits.mean(1, keepdims=True) + hits.mean()
    se = math.sqrt((single**2).sum() / 18 / 30)
    assert g.half == pytest.approx(2.10092 * se, rel=0.05) and g.p > 0.9 and g.mean == pytest.approx(0)


def test_p_is_below_5_percent_exactly_where_the_interval_leaves_0_out():
    rng = np.random.default_rng(0)
    gains = [stats.gain(0.05 + 0.05 * rng.standard_normal((4, 30)), 0, G=40) for _ in range(60)]
    assert 5 < sum(g.p < 0.05 for g in gains) < 55
    assert all((g.p < 0.05) == (abs(g.mean) > g.half) for g in gains)
    for g in gains[:5]:                              # from a hair outside of its 95 % interval to one inside
        assert stats.Gain(-g.half * (1 + 1e-9), g.parts).p < 0.05 < stats.Gain(g.half * (1 - 1e-9), g.parts).p
        assert g.reach(g.p) == pytest.approx(abs(g.mean))


DESIGNS = {                                            # shares of the variance: seeds, images, single answers
    "seeds": (0.8, 0.1, 0.1), "images": (0.1, 0.8, 0.1), "single answers": (0.1, 0.1, 0.8),
    "all alike": (1 / 3, 1 / 3, 1 / 3)}


@pytest.mark.parametrize("effects", ["normal", "uniform"])
@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize("design", DESIGNS)
def test_the_interval_covers_whatever_varies_most_and_however_seeds_are_distributed(design, seeds, effects):
    rng, n, images = np.random.default_rng(0), 10_000, 30
    of_seeds, of_images, single = np.sqrt(DESIGNS[design])
    shape = n, seeds, 1
    effect = rng.standard_normal(shape) if effects == "normal" else rng.uniform(-3**0.5, 3**0.5, shape)
    g = two_way(seeds**0.5 * of_seeds * effect
                + images**0.5 * of_images * rng.standard_normal((n, 1, images))
                + (seeds * images) ** 0.5 * single * rng.standard_normal((n, seeds, images)))
    assert 0.93 <= np.mean(abs(g.mean) <= g.half) <= 0.98


def test_the_interval_covers_a_known_difference_of_accuracies_in_95_of_100_cases():
    """Arm a is better by .04, more in some seeds and images than in others; answers are right or wrong."""
    rng, covered, n = np.random.default_rng(0), 0, 1000
    for _ in range(n):
        seeds, images = rng.uniform(-0.05, 0.05, (5, 1)), rng.uniform(-0.3, 0.3, (1, 120))
        base = rng.uniform(0.35, 0.6, (1, 120))
        a, b = rng.random((2, 5, 120)) < np.stack([base + 0.04 + seeds + images, base + 0 * seeds])
        g = stats.gain(*(stats.replicates(worlds(hits), accuracy, 100) for hits in (a, b)), G=120)
        covered += abs(g.mean - 0.04) <= g.half
    assert 0.93 <= covered / n <= 0.97


def tiles(rng, S, G, gain_of_a):
    """Counts (S, G, 3, 4) of two arms on G tiles: rare damage in clusters, mistaken for the next class."""
    truth = rng.poisson(rng.gamma([1, 0.5, 0.3, 0.3], [6, 3, 3, 2], (G, 4)))
    hard, arms = rng.uniform(-0.15, 0.15, (G, 1)), []
    for better in (gain_of_a, 0):
        sometimes = rng.uniform(-0.05, 0.05, (S, 1, 4)) + rng.uniform(-0.07, 0.07, (G, 4))
        hits = rng.binomial(truth, np.array([0.7, 0.4, 0.5, 0.6]) + better + hard + sometimes)
        called = hits + np.roll(truth - hits, 1, -1)
        arms.append(np.stack([hits, np.broadcast_to(truth, hits.shape), called], 2).astype(float))
    return arms


def test_the_interval_covers_a_difference_of_macro_f1_over_clustered_tiles():
    """The truth is that of 100 seeds on 4,000 tiles."""
    rng, covered, n = np.random.default_rng(0), 0, 300
    a, b = tiles(rng, 100, 4000, 0.03)
    truth = (macro_f1(a.sum(1)) - macro_f1(b.sum(1))).mean()
    assert 0.02 < truth < 0.06
    for _ in range(n):
        a, b = tiles(rng, 5, 60, 0.03)
        g = stats.gain(*(stats.replicates(arm, macro_f1, 100) for arm in (a, b)), G=60)
        covered += abs(g.mean - truth) <= g.half
    assert 0.92 <= covered / n <= 0.98


# ---- many at once, and in words

def test_holm_is_the_worked_example():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.7, 0.6]) == [1, 1] and stats.holm([0.03]) == [0.03] and stats.holm([]) == []


def test_no_bound_lies_beyond_what_a_difference_of_scores_can_be():
    assert stats.points(stats.Gain(0.03125, ((1e-4 / 12.70620**2, 1),))) == "+3.1 [+2.1, +4.1]"
    assert stats.points(stats.Gain(-0.4, ((0.01, 1),))) == "-40.0 [-100.0, +87.1]"
    assert stats.points(stats.Gain(0.4, ((0.01, 1),))) == "+40.0 [-87.1, +100.0]"


def test_p_is_written_with_three_decimals_or_as_below_the_smallest_of_them():
    assert [stats.p_text(p) for p in (1, 0.5, 0.0164, 0.001, 0.00099, 0)] == [
        "1.000", ".500", ".016", ".001", "< .001", "< .001"]
