"""What synthetic images are like: distances between sets, and whether they are copies."""
import math
from itertools import combinations

import pytest
import torch

from train_gen import frechet, mann_whitney, nearest, prdc, symmetries


def normal(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def whitened(x):
    """x with mean 0 and covariance 1 to rounding, so that closed forms hold without sampling noise."""
    x = x.double() - x.double().mean(0)
    return torch.linalg.qr(x).Q * math.sqrt(len(x) - 1)


# ---- Fréchet distance

def test_of_diagonal_gaussians_it_is_the_closed_form():
    mean, a, b = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 0.5, 3.0]), torch.tensor([2.0, 0.5, 0.1])
    expected = (mean**2).sum() + ((a - b) ** 2).sum()                    # of the means, of the deviations
    distance = frechet(whitened(normal(50, 3, 0)) * a + mean, whitened(normal(40, 3, 1)) * b)
    assert distance == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("n, d", [(300, 6), (20, 50)])                  # the second without full rank
def test_it_is_the_formula_with_a_root_of_the_product(n, d):
    a, b = normal(n, d, 0) * torch.linspace(0.5, 2, d), normal(n, d, 1) @ normal(d, d, 2) / d**0.5
    A, B = (torch.cov(x.double().T) for x in (a, b))
    root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * root
    assert frechet(a, b) == pytest.approx(expected.item(), rel=1e-4) == pytest.approx(frechet(b, a))


@pytest.mark.parametrize("n, d", [(300, 6), (20, 50)])
def test_of_a_set_to_itself_it_is_0_and_turning_the_space_changes_nothing(n, d):
    a, b = normal(n, d, 0).double(), 2 * normal(n, d, 1).double() + 1
    turn = torch.linalg.qr(normal(d, d, 2).double()).Q
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a @ turn, b @ turn) == pytest.approx(frechet(a, b), rel=1e-9)


# ---- precision, recall, density, coverage

def expected_coverage(N, M, k):
    """Naeem et al. 2020, Lemma 2: 1 less the probability that the k next images are all real ones."""
    return 1 - math.prod((N - i) / (M + N - i) for i in range(1, k + 1))


def test_of_two_samples_of_one_distribution_precision_and_recall_are_far_from_1_the_others_not():
    """10,000 x 1,000 take 20 s: .473 .488 1.003 .973; README of clovaai/generative-evaluation-prdc, which
    draws others: .477 .471 1.056 .974. Precision and recall fall with N and with D, here to .56."""
    got = [prdc(normal(1500, 1000, 2 * s), normal(1500, 1000, 2 * s + 1)) for s in range(2)]
    mean = {key: sum(g[key] for g in got) / 2 for key in got[0]}
    assert 0.5 < mean["precision"] < 0.63 and 0.5 < mean["recall"] < 0.63
    assert mean["density"] == pytest.approx(1, abs=0.1)
    assert mean["coverage"] == pytest.approx(expected_coverage(1500, 1500, 5), abs=0.01)


@pytest.mark.parametrize("N, M, k", [(60, 60, 5), (60, 15, 3), (40, 90, 1)])
def test_coverage_and_density_of_one_distribution_are_the_closed_form_in_any_number(N, M, k):
    got = [prdc(normal(N, 3, 2 * s), normal(M, 3, 2 * s + 1), k) for s in range(600)]
    assert sum(g["density"] for g in got) / 600 == pytest.approx(1, abs=0.03)
    assert sum(g["coverage"] for g in got) / 600 == pytest.approx(expected_coverage(N, M, k), abs=0.012)


def test_by_hand():
    """Real 0 1 3 7 with k = 1: balls of radius 1 1 2 4. Fake .5 2.5 20: radius 2 2 17.5."""
    real, fake = (torch.tensor(x)[:, None] for x in ([0.0, 1.0, 3.0, 7.0], [0.5, 2.5, 20.0]))
    # .5 is in the balls of 0 and 1; 2.5 in that of 3; 20 in none. 7 is covered by none, but in the ball of 20
    assert prdc(real, fake, k=1) == pytest.approx(dict(precision=2 / 3, recall=1, density=1, coverage=3 / 4))


def test_fakes_of_one_kind_only_cover_and_recall_little():
    real = normal(300, 8, 0)
    got = prdc(real, real[0] + 0.3 * normal(300, 8, 1))
    assert got["coverage"] < 0.2 and got["recall"] < 0.1


def test_an_outlier_lifts_precision_and_hardly_density():
    """Fakes about a lonely real image, away from all others: each is in one ball, that of the outlier."""
    real = torch.cat([normal(300, 4, 0), torch.full((1, 4), 30.0)])
    got = prdc(real, 20 + normal(300, 4, 1))
    assert got["precision"] == 1 and got["density"] == pytest.approx(1 / 5) and got["coverage"] < 0.01


def test_more_than_a_chunk_is_as_one():
    real, fake = normal(1500, 4, 0), normal(1300, 4, 1) + 0.5
    own, across = torch.cdist(real.double(), real.double()), torch.cdist(fake.double(), real.double())
    around = own.sort(1).values[:, 5]
    balls = across < around
    got = prdc(real, fake)
    assert got["density"] == pytest.approx(balls.sum().item() / 5 / 1300)
    assert got["coverage"] == pytest.approx(balls.any(0).double().mean().item())
    swapped = prdc(fake, real)
    assert (got["recall"], got["precision"]) == pytest.approx((swapped["precision"], swapped["recall"]))


# ---- copies

def pixels(n, seed, side=8):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, side, side), generator=g, dtype=torch.uint8)


def test_the_8_symmetries_are_all_there_and_differ():
    x = torch.arange(2 * 3 * 16, dtype=torch.uint8).view(2, 3, 4, 4)
    eight = symmetries(x)
    assert eight.shape == (8, 2, 3, 4, 4) and len({s.numpy().tobytes() for s in eight}) == 8
    again = symmetries(x.rot90(1, (2, 3)).flip(2))
    assert {s.numpy().tobytes() for s in again} == {s.numpy().tobytes() for s in eight}
    assert (eight[0] == x).all()


def test_a_turned_copy_is_found_and_turned_back():
    pool = pixels(20, 0)
    turned = symmetries(torch.stack([pool[7].rot90(3, (1, 2)).flip(2), pool[3], pool[19].flip(1)]))
    distance, which, turn = nearest(turned.flatten(2), pool.flatten(1))
    assert which.tolist() == [7, 3, 19] and (distance == 0).all()
    assert (turned[turn, torch.arange(3)] == pool[which]).all()


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_chunks_change_nothing_and_the_distance_is_the_root_mean_square(chunk):
    a, pool = normal(8 * 7, 12, 0).view(8, 7, 12), normal(50, 12, 1)
    d = (a[:, :, None] - pool).square().mean(3).sqrt()                                        # (8, 7, 50)
    distance, which, turn = nearest(a, pool, chunk)
    assert distance == pytest.approx(d.amin((0, 2)), rel=1e-5)
    assert (d[turn, torch.arange(7), which] == d.amin((0, 2))).all()


def test_memorised_images_are_caught_and_new_ones_are_not_in_pixels_and_in_features():
    train, held, new = pixels(150, 0), pixels(60, 1), pixels(60, 2)
    turn = torch.randint(8, (60,), generator=torch.Generator().manual_seed(3))
    noise = (20 * normal(60, 3 * 64, 4)).view(60, 3, 8, 8)
    copied = symmetries(train[:60])[turn, torch.arange(60)].float().add(noise).clamp(0, 255).byte()
    embed = normal(3 * 64, 16, 5)
    for features in (lambda x: x.flatten(-3), lambda x: x.flatten(-3).float() @ embed):
        copy, fresh, floor = (nearest(features(symmetries(x)), features(train)) for x in (copied, new, held))
        share, p = mann_whitney(copy[0], floor[0])
        assert share > 0.95 and p < 1e-6 and (copy[1] == torch.arange(60)).float().mean() > 0.9
        share, p = mann_whitney(fresh[0], floor[0])
        assert 0.35 < share < 0.65 and p > 0.05


# ---- Mann-Whitney

def test_the_worked_example_of_scipy():
    """Ages at diagnosis: U = 3 of 20, two-sided p = .11134688653 with the correction for continuity."""
    females, males = torch.tensor([20.0, 11, 17, 12]), torch.tensor([19.0, 22, 16, 29, 24])
    share, p = mann_whitney(females, males)
    assert share == pytest.approx(17 / 20) and 2 * p == pytest.approx(0.11134688653314041)
    assert mann_whitney(males, females)[0] == pytest.approx(3 / 20)


def all_splits(values, n):
    """U of every way to choose n of the values as a, by counting pairs."""
    everything = set(range(len(values)))
    for chosen in combinations(everything, n):
        pairs = [(values[i], values[j]) for i in chosen for j in everything - set(chosen)]
        yield sum((x < y) + (x == y) / 2 for x, y in pairs)


@pytest.mark.parametrize("values, n", [([3.0, 1, 4, 15, 9, 2, 6, 5, 35, 8, 97, 93], 6),
                                       ([1.0, 2, 2, 4, 3, 1, 2, 4, 5, 5, 5, 5], 5)])
def test_it_is_close_to_the_exact_test_and_its_variance_is_exact_with_ties(values, n):
    share, p = mann_whitney(torch.tensor(values[:n]), torch.tensor(values[n:]))
    U, every = share * n * (12 - n), torch.tensor(list(all_splits(values, n)))
    assert U == pytest.approx(every[0].item())                              # the first split is this one
    assert p == pytest.approx((every >= U).double().mean().item(), abs=0.015)
    z = (U - n * (12 - n) / 2 - 0.5) / every.double().std(correction=0).item()
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)) / 2, rel=1e-6)


def test_extremes():
    low, high = torch.arange(10.0), torch.arange(20.0, 30)
    assert mann_whitney(low, high)[0] == 1 and mann_whitney(high, low)[0] == 0
    assert mann_whitney(low, high)[1] < 1e-3 and mann_whitney(high, low)[1] > 0.999
    assert mann_whitney(torch.ones(5), torch.ones(4)) == (0.5, 1.0)
