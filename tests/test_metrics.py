"""What synthetic images are like: distances between sets, and whether they are copies."""
import math
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import torch
from PIL import Image

import data
import experiment
import train_cls
from data import Scenes
from experiment import blur, compare, copies, copying, frechet, nearest, prdc, structure, symmetries, wilson


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


def test_it_is_what_counting_gives():
    real, fake = normal(150, 4, 0), normal(130, 4, 1) + 0.5
    own, across = torch.cdist(real.double(), real.double()), torch.cdist(fake.double(), real.double())
    balls = across < own.sort(1).values[:, 5]
    got = prdc(real, fake)
    assert got["density"] == pytest.approx(balls.sum().item() / 5 / 130)
    assert got["coverage"] == pytest.approx(balls.any(0).double().mean().item())
    swapped = prdc(fake, real)
    assert (got["recall"], got["precision"]) == pytest.approx((swapped["precision"], swapped["recall"]))


# ---- drawn scenes, for planted faults

@pytest.fixture(scope="module")
def pool():
    """50 drawn scenes of each of 8 classes at 24 px, subsets of which the trials take."""
    drawn = [np.array(data.draw_scene(name, np.random.default_rng([c, k]), 48)[0].resize((24, 24), Image.BOX))
             for c, name in enumerate(data.SCENES) for k in range(50)]
    images = torch.from_numpy(np.stack(drawn)).movedim(3, 1).contiguous()
    labels = torch.arange(8).repeat_interleave(50)
    return Scenes(images, labels, list(data.SCENES), [str(k) for k in range(400)], torch.arange(400))


def deal(pool, sizes, seed):
    """Disjoint subsets of the pool with so many scenes of each class."""
    order = torch.stack([50 * c + torch.randperm(50, generator=data.rng(seed, c)) for c in range(8)])
    return [pool[part.flatten()] for part in order[:, :sum(sizes)].split(sizes, 1)]


# ---- fidelity

def test_blur_is_the_gaussian_it_says():
    point = torch.zeros(1, 2, 9, 9, dtype=torch.uint8)
    point[0, 1, 4, 4] = 255
    got = blur(point, 1.0)
    x = torch.arange(-4, 5)
    expected = 255 * torch.exp(-(x[:, None] ** 2 + x**2) / 2) / (2 * math.pi)
    assert (got[0, 1] - expected).abs().max() < 1 and not got[0, 0].any()


def test_a_planted_blur_lowers_precision_density_and_coverage_and_raises_the_distance(pool):
    """Of other real images, and by a classifier whose own features hardly see it."""
    teach, a, b = deal(pool, (20, 15, 15), 0)
    cfg = train_cls.Config(size=24, patch=4, dim=32, depth=1, heads=2, steps=60, batch=64, warmup=20)
    embed = train_cls.fit(teach, None, cfg)[0].features
    blurred = replace(b, images=blur(b.images, 1.0))
    for got in (compare(embed, a, b, b), compare(embed, a, b, blurred)):
        assert got["real frechet"] < 0.3 and got["real density"] > 0.8 and got["real coverage"] > 0.8
        assert got["blurred frechet"] > 4 * got["real frechet"]
        for name, least in (("precision", 0.85), ("density", 0.5), ("coverage", 0.5)):
            assert got[f"blurred {name}"] < least * got[f"real {name}"]
    for name in ("frechet", "precision", "recall", "density", "coverage"):       # the last: blurred ones
        assert got[f"synthetic {name}"] == pytest.approx(got[f"blurred {name}"])


def test_the_unit_of_the_features_does_not_count(pool):
    a, b, c = deal(pool, (15, 15, 15), 1)
    colours = [compare(lambda x, unit=unit: unit * x.mean((2, 3)), a, b, c) for unit in (1, 1000)]
    assert colours[0] == pytest.approx(colours[1], rel=1e-3)


def test_numbers_are_shown_only_from_features_that_can_tell():
    numbers = {f"{who} {name}": value for who, value in (("real", 0.9), ("blurred", 0.5), ("synthetic", 0.7))
               for name in ("precision", "recall", "density", "coverage")}
    numbers |= {"real frechet": 0.1, "blurred frechet": 2.0, "synthetic frechet": 1.0, "judged_by": 60}
    good = numbers | dict(tested=100, right=40, commonest=20)
    (_, rows), said = experiment.fidelity(good)
    assert len(rows) == 3 and "gets 40 % of 100" in said and "commonest class: 20 %" in said
    for change in (dict(right=25), {"blurred frechet": 0.1}, {"blurred coverage": 0.9}):
        bad = good | change
        (_, rows), said = experiment.fidelity(bad)
        assert not rows and "not shown" in said and f"gets {bad['right']} % of 100" in said


# ---- copies

def test_the_8_symmetries_are_all_there_and_differ():
    x = torch.arange(2 * 3 * 16, dtype=torch.uint8).view(2, 3, 4, 4)
    eight = symmetries(x)
    assert eight.shape == (8, 2, 3, 4, 4) and len({s.numpy().tobytes() for s in eight}) == 8
    again = symmetries(x.rot90(1, (2, 3)).flip(2))
    assert {s.numpy().tobytes() for s in again} == {s.numpy().tobytes() for s in eight}
    assert (eight[0] == x).all()


def test_a_turned_copy_in_other_light_is_found_and_turned_back(pool):
    known = pool.images[::5]
    mine = torch.stack([known[7].rot90(3, (1, 2)).flip(2), known[3], known[79].flip(1)])
    darker = (0.6 * mine + torch.tensor([30.0, 0, 10])[:, None, None]).to(torch.uint8)
    for images in (mine, darker):
        similarity, which, turned = nearest(images, known)
        assert which.tolist() == [7, 3, 79] and (similarity > 0.98).all()
    assert (nearest(mine, known)[2] == known[which]).all() and turned.shape == darker.shape


def test_the_similarity_is_the_correlation_of_the_cells_and_a_fourth_channel_does_not_count():
    x = torch.randint(256, (2, 4, 12, 12), generator=data.rng(0), dtype=torch.uint8)
    cells = x[:, :3].double().view(2, 3, 6, 2, 6, 2).mean((3, 5)).flatten(2)
    one, other = (cells - cells.mean(2, keepdim=True)).flatten(1)
    expected = one @ other / one.norm() / other.norm()
    got = structure(x)
    assert (got[0] @ got[1]).item() == pytest.approx(expected.item(), abs=2e-3)
    assert (structure(x[:, :3]) == got).all()


def test_a_flat_image_is_near_to_nothing(pool):
    flat = (100 + torch.rand(20, 3, 24, 24, generator=data.rng(0))).round().to(torch.uint8)
    assert nearest(flat, torch.cat([flat, pool.images]))[0].max() < 0.05


def retouched(images, seed):
    """Each turned or flipped, in other light, a little noisy."""
    g = data.rng(seed)
    turned = symmetries(images)[torch.randint(8, (len(images),), generator=g), torch.arange(len(images))]
    contrast, brightness = torch.rand(2, len(images), 1, 1, 1, generator=g)
    noisy = turned + 6 * torch.randn(turned.shape, generator=g) - 128
    return (noisy * (0.7 + 0.6 * contrast) + 108 + 40 * brightness).clamp(0, 255).to(torch.uint8)


def trial(pool, share, seed, tmp_path, change=lambda images: images):
    """What is found where a share of 20 synthetic images of each class are copies of 10 training images."""
    real, held, made = deal(pool, (10, 20, 20), seed)
    made = replace(made, images=change(made.images.clone()))
    for c in range(8):
        n, mine = round(20 * share), (made.labels == c).nonzero().flatten()
        chosen = torch.randint(10, (n,), generator=data.rng(seed, c, 1))
        made.images[mine[:n]] = retouched(real.images[real.labels == c][chosen], seed)
    return copies(real, made, held, tmp_path / "sheet.png")


def test_20_per_cent_of_copies_are_caught_in_19_of_20_trials_and_none_raise_1_alarm_at_most(pool, tmp_path):
    for share, alarms in ((0.2, (19, 20)), (0.0, (0, 1))):
        found = [trial(pool, share, seed, tmp_path) for seed in range(20)]
        raised = [copying(f).startswith("There are copies") for f in found]
        assert alarms[0] <= sum(raised) <= alarms[1]
        assert sum(copying(f).startswith("No sign of copies") for f in found) == 20 - sum(raised)
        mean = sum(f["copies"] / f["looked_at"] for f in found) / 20
        assert mean == pytest.approx(share + (1 - share) / 21, abs=0.02)
        assert found[0]["trained_on"] == 80 and found[0]["by_chance"] == pytest.approx(160 / 21)


def test_new_images_that_are_blurred_are_no_copies(pool, tmp_path):
    found = [trial(pool, 0, seed, tmp_path, lambda x: blur(x, 1.0)) for seed in range(20)]
    assert sum(f["copies_p"] < experiment.ALARM for f in found) <= 1


def test_only_training_images_of_its_class_make_an_image_a_copy(pool, tmp_path):
    real, held = deal(pool, (10, 20), 0)
    for shift, low, high in ((0, 80, 80), (1, 0, 8)):
        moved = replace(real, labels=(real.labels + shift) % 8)
        assert low <= copies(real, moved, held, tmp_path / "sheet.png")["copies"] <= high


def test_the_nearest_in_structure_is_shown_first_and_not_the_flattest(pool, tmp_path):
    real, held, made = deal(pool, (10, 20, 20), 0)
    made.images[:60] = 120
    made.images[77] = real.images[35].rot90(1, (1, 2))                             # both of class 3
    copies(real, made, held, tmp_path / "sheet.png")
    page = np.array(Image.open(tmp_path / "sheet.png"))
    strips = page[:, 8 + 7 * len("nearest real"):].reshape(2, len(page) // 2, -1, 3)
    shown = [strip[2:50:2, 2:50:2] for strip in strips]
    for picture in shown:
        assert (picture == real.images[35].movedim(0, 2).numpy()).all()


def test_p_is_the_share_of_all_orders(monkeypatch, pool, tmp_path):
    """2 classes of 3 synthetic and 2 held-out images: every order of nearness, counted."""
    def above(order):
        """How many of the synthetic ones, 0 to 2, are nearer than both held-out ones, 3 and 4."""
        return sum(order.index(k) > max(order.index(3), order.index(4)) for k in range(3))

    orders = list(permutations(range(5)))
    counts = [above(a) + above(b) for a, b in product(orders, repeat=2)]
    monkeypatch.setattr(experiment, "nearest", lambda images, known: (
        images[:, 0, 0, 0].float(), torch.zeros(len(images), dtype=torch.int64), images))
    labels = torch.tensor([0, 0, 0, 1, 1, 1])

    def scenes(values, labels):
        images = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
        return Scenes(images, labels, ["a", "b"], ["x"] * len(values), torch.arange(len(values)))

    held = scenes([3, 7, 3, 7], torch.tensor([0, 0, 1, 1]))
    for values, k in (([9, 9, 1, 8, 2, 7], 3), ([1, 2, 3, 4, 5, 7], 0), ([8, 8, 8, 9, 9, 9], 6)):    # 7 ties
        found = copies(held, scenes(values, labels), held, tmp_path / "sheet.png")
        assert found["copies"] == k
        assert found["copies_p"] == pytest.approx(np.mean(np.array(counts) >= k))
        assert found["by_chance"] == pytest.approx(np.mean(counts))
    rare = [k for k in range(8) if np.mean(np.array(counts) >= k) < experiment.ALARM]
    assert found["alarm_from"] == min(rare) == 7                              # more than there are images


def test_too_few_images_say_so():
    found = dict(copies=1, looked_at=2, trained_on=4, by_chance=0.7, copies_p=0.5, alarm_from=3)
    assert copying(found).startswith("Too few images to look for copies: 50.0 %")
    said = copying(found | dict(looked_at=100, by_chance=2.0, alarm_from=7))
    assert said.startswith("No sign of copies: 1.0 % [0.2, 5.4] of 100")
    assert said.endswith("7.0 % or more would have been a sign.")


def test_the_interval_of_a_share_is_the_worked_example():
    """81 of 263: [.2553, .3662], Newcombe 1998, Table I; and the ends."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 10)[0] == pytest.approx(0) and wilson(10, 10)[1] == pytest.approx(1)
