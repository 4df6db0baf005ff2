"""experiment.py: statistics by their formulas, then fair runs that go on, verdicts and the page.

Nearly all of it goes through main(Config), on small drawn data.
"""
import csv
import html
import json
import math
import re
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import experiment
import train_cls
import train_gen
from experiment import LEVELS, STUDIES, TASKS, Config, Gain, NearDuplicates, Run, gain, student
from train_cls import accuracy, counts_per_group, macro_f1

QUICK = dict(scale="smoke", size=8, gen_steps=5, cls_steps=5, jobs=1)


# ---- the interval

def test_the_variances_are_those_of_a_two_way_layout():
    """An effect of each seed, one of each image, and the residual, each by its sum of squares."""
    S, G, rng = 5, 30, np.random.default_rng(0)
    values = rng.standard_normal((S, 1)) + rng.standard_normal((1, G)) + rng.standard_normal((S, G))
    mean, of_seed, of_image = values.mean(), values.mean(1), values.mean(0)
    squares = 0
    for s in range(S):
        for g in range(G):
            squares += (values[s, g] - of_seed[s] - of_image[g] + mean) ** 2
    V_residual = squares / ((S - 1) * (G - 1)) / (S * G)
    V_seeds = ((of_seed - mean) ** 2).sum() / (S - 1) / S
    V_images = ((of_image - mean) ** 2).sum() / (G - 1) / G - V_residual
    half = math.sqrt(2.776445**2 * V_seeds + 2.045230**2 * V_images)               # t of 4, of 29
    assert gain(of_seed, values).half == pytest.approx(half, rel=1e-5)
    for edge in (-half, half):                      # p is below 5 % where the interval leaves 0 out
        inside, outside = (gain(of_seed - mean + k * edge, values).p for k in (0.999, 1.001))
        assert outside < 0.05 < inside


def test_t_is_that_of_the_tables():
    for dof, t in ((1, 12.7062), (2, 4.30265), (4, 2.77645), (10, 2.22814), (10_000, 1.96020)):
        assert student(dof)[LEVELS == 0.05].item() == pytest.approx(t, rel=1e-5)
    closed_form = 1 / np.tan(np.pi / 2 * LEVELS)                          # of one degree of freedom
    assert student(1) == pytest.approx(closed_form, rel=1e-5, abs=1e-9)


def test_pseudo_values_delete_one_group_at_a_time_and_are_answers_for_accuracy():
    rng, counts = np.random.default_rng(0), []
    for _ in range(2):
        labels, answers = rng.integers(3, size=(2, 40))
        counts.append(counts_per_group(labels, answers, np.arange(40) // 4, 3))
    score, values = experiment.jackknife(np.stack(counts), macro_f1)
    assert score == pytest.approx(macro_f1(np.sum(counts, 1)))
    for g in range(10):
        without = macro_f1(np.delete(counts, g, 1).sum(1))
        assert values[:, g] == pytest.approx(10 * score - 9 * without)
    single = counts_per_group(labels, answers, np.arange(40), 3)
    _, values = experiment.jackknife(single[None], accuracy)
    assert values[0] == pytest.approx((labels == answers).astype(float))


def test_no_spread_is_certain_but_seeds_that_agree_by_chance_are_not():
    """Three seeds have 6 of 10 right, but never the same six: V_seeds is that of single answers."""
    none, sure = (gain(np.full(3, value), np.full((3, 20), value)) for value in (0.0, 0.1))
    assert none == (0, 0, 1, 3) and sure.half < 1e-9 and sure.p < 1e-6
    hits = np.array([[1, 1, 1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 0, 0],
                     [1, 1, 0, 0, 0, 0, 1, 1, 1, 1]])
    V_residual = ((hits - hits.mean(0)) ** 2).sum() / (2 * 9) / 30
    result = gain((hits - 0.6).mean(1), hits - 0.6)
    assert result.half == pytest.approx(4.302653 * math.sqrt(V_residual)) and result.p > 0.9


@pytest.mark.parametrize("seeds", [3, 8])
@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8),
                                    (1 / 3, 1 / 3, 1 / 3)])
def test_the_interval_covers_whatever_varies_most(shares, seeds, n=1000, images=30):
    """Shares of the variance: seeds (uniform), images and single answers (both normal)."""
    rng, covered = np.random.default_rng(0), 0
    a, b, c = np.sqrt(shares) * np.sqrt([seeds, images, seeds * images])
    for _ in range(n):
        values = (a * rng.uniform(-(3**0.5), 3**0.5, (seeds, 1)) + b * rng.standard_normal(images)
                  + c * rng.standard_normal((seeds, images)))
        result = gain(values.mean(1), values)
        covered += abs(result.mean) <= result.half
    assert 0.93 <= covered / n <= 0.985


def test_holm_is_the_worked_example():
    assert experiment.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert experiment.holm([0.7, 0.6]) == [1, 1] and experiment.holm([]) == []


# ---- near-duplicates

def test_the_probability_of_near_duplicates_is_their_share_of_all_orders(monkeypatch):
    """2 classes of 3 synthetic and 3 held-out images: every order of nearness, counted."""
    def nearer(order):
        """Count the synthetic images, 0 to 2, that are nearer than all held-out ones, 3 to 5."""
        last = max(order.index(k) for k in (3, 4, 5))
        return sum(order.index(k) > last for k in range(3))

    def nearest(images, known):
        return images[:, 0, 0, 0].float(), torch.zeros(len(images), dtype=torch.int64), images

    def scenes(values):
        images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
        labels = torch.tensor([0, 0, 0, 1, 1, 1])
        return data.Scenes(images, labels, ["a", "b"], ["x"] * 6, torch.arange(6))

    one = [nearer(order) for order in permutations(range(6))]
    both = np.add.outer(one, one)
    monkeypatch.setattr(experiment, "nearest", nearest)
    held_out = scenes([3, 7, 5, 3, 7, 5])
    for values, k in (([9, 9, 1, 8, 2, 7], 3), ([1, 2, 3, 4, 5, 7], 0), ([8, 8, 8, 9, 9, 9], 6)):
        found = experiment.find_near_duplicates(held_out, scenes(values), [held_out])
        assert found[:2] == (6, k)
        expected = both.mean(), (both >= k).mean(), (both == 6).mean()
        assert (found.expected, found.p, found.least_p) == pytest.approx(expected)


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Draw the scenes and the buildings of the smoke scale, but smaller."""
    out = tmp_path_factory.mktemp("trees")
    data.draw_tree(out / "scenes", 30, size=32)
    data.draw_xbd(out / "buildings", 48, seed=3, side=160)
    return out


@pytest.fixture(scope="module")
def thirds(trees):
    """Drawn scenes, 10 of each class to train a generator, 10 held out, 10 new."""
    scenes = data.read(trees / "scenes", 24, cache=trees / "cache")
    return [scenes[torch.arange(len(scenes)) % 3 == k] for k in range(3)]


def test_planted_copies_are_found_and_new_images_are_not(thirds):
    real, held_out, new = thirds
    planted = replace(new, images=new.images.clone())
    planted.images[::4] = (0.7 * real.images[::4].rot90(1, (2, 3)).flip(2) + 30).to(torch.uint8)
    found = experiment.find_near_duplicates(real, planted, [held_out[:30], held_out[30:]])
    assert found.total == 80 and found.p < 0.01 and found.found >= 20
    assert (found.synthetic.float() - 0.7 * found.nearest - 30).abs().max() <= 1   # turned back
    moved = replace(planted, labels=(planted.labels + 1) % 8)             # copies of another class
    for images in (new, moved):
        assert experiment.find_near_duplicates(real, images, [held_out]).p > 0.01
    assert experiment.find_near_duplicates(real, new, [held_out], most=40).total == 40
    assert experiment.find_near_duplicates(real, new, [held_out[:0]]) is None
    flat = (100 + torch.rand(20, 3, 24, 24, generator=data.rng(0))).round().to(torch.uint8)
    assert experiment.nearest(flat, real.images)[0].max() < 0.05          # near to nothing


# ---- runs: what each arm is trained on

def rows_of(out):
    """Read results.csv, and what each run answered: {run: row}, without its seconds."""
    rows = {}
    with open(out / "results.csv", newline="") as file:
        for row in csv.DictReader(file):
            del row["seconds"]
            path = out / row["task"] / row["count"] / f"seed{row['seed']}"
            path /= f"{row['arm'].replace(': ', ' - ')}.json"
            row["answers"] = json.loads(path.read_text())["answers"]
            rows[row["task"], row["count"], row["seed"], row["arm"]] = row
    return rows


def watched(**flags):
    """Run a comparison. Return it, and the calls of fit() by (seed, arm), of train, generate ..."""
    calls = {"fit": [], "adjust_logits": [], "train": [], "generate": []}

    def record(name, function):
        def recorded(*args, **more):
            calls[name].append(args)
            if name == "fit":
                arm = re.split(", [0-9]+ (real|training)", more["title"])[0]
                fitted[args[2].seed, arm] = SimpleNamespace(real=args[0], pool=args[1], cfg=args[2])
            return function(*args, **more)
        return recorded

    fitted = {}
    with pytest.MonkeyPatch.context() as m:
        for name in calls:
            module = train_gen if name in ("train", "generate") else train_cls
            m.setattr(module, name, record(name, getattr(module, name)))
        comparison, = experiment.main(Config(**QUICK | flags))
    return SimpleNamespace(comparison=comparison, fitted=fitted, out=Path(comparison.cfg.out),
                           generators=calls["train"], generated=calls["generate"],
                           adjusted=calls["adjust_logits"])


@pytest.fixture(scope="module")
def scenes(trees, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("scenes"))
    return watched(data=str(trees / "scenes"), out=out, counts=(4,), arms="all", study="controls",
                   generated=6)


@pytest.fixture(scope="module")
def buildings(trees, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("buildings"))
    return watched(data=str(trees / "buildings"), out=out, counts=(12,), seeds=1, arms="all",
                   generated=60)


def test_arms_of_a_seed_have_the_same_images_weights_batches_and_steps(scenes, buildings):
    for ran in (scenes, buildings):
        by_seed = {}
        for (seed, _), given in ran.fitted.items():
            cfg = replace(given.cfg, share=0, augment="", balance=0, pretrain=0, model="vit")
            by_seed.setdefault(seed, []).append((given.real.digest, cfg))
        for given in by_seed.values():
            assert all(pair == given[0] for pair in given) and given[0][1].steps == 5
    rows = rows_of(scenes.out).values()
    assert {(row["steps"], "linear" in row["arm"]) for row in rows} == {("0", True), ("5", False)}
    linear = [row for row in rows if row["arm"] == "linear: real"]
    assert all(float(row["train"]) == 1 > float(row["accuracy"]) for row in linear)
    shares = {arm: given.cfg.share for (_, arm), given in scenes.fitted.items()}
    assert shares["real"] == 0 and shares["synthetic + augmentation"] == 1
    assert shares["real + copies + augmentation"] == 0.5


def test_generators_see_the_training_images_of_their_arm_and_no_test_image(scenes, buildings):
    for ran in (scenes, buildings):
        names, parts = ran.comparison.scenes.names, ran.comparison.parts
        held = {names[k] for part in ("val", "test") for k in parts[part].tolist()}
        for real, cfg, *_ in ran.generators:
            chosen = ran.fitted[cfg.seed, next(iter(ran.comparison.arms))].real
            assert set(real.names) <= set(chosen.names) and not set(chosen.names) & held
    sets = {(real.digest, len(real), cfg.seed) for real, cfg, *_ in scenes.generators}
    assert sorted(row[1:] for row in sets) == [(4 * 8, 0), (4 * 8, 1)]    # each seed has its own


def test_fresh_images_are_new_training_images_and_copies_are_the_real_ones(scenes, monkeypatch):
    comparison, fitted = scenes.comparison, scenes.fitted
    train = {comparison.scenes.names[k] for k in comparison.parts["train"].tolist()}
    real = set(fitted[0, "real"].real.names)
    fresh = fitted[0, "real + fresh real + augmentation"].pool
    copies = fitted[0, "real + copies + augmentation"].pool
    assert set(fresh.names) <= train - real and fresh.labels.bincount().tolist() == [6] * 8
    assert set(copies.names) == real and len(copies) == 4 * 8
    monkeypatch.setattr(experiment, "COMPARISONS", {"scenes": comparison})
    monkeypatch.setattr(experiment, "find_near_duplicates", lambda *sets: sets[2])
    new, val = experiment.make_synthetic(("scenes", 4, 0))
    assert {*new.names, *val.names} == train - real | {*comparison.val.names}
    groups = comparison.scenes.groups.clone()
    groups[comparison.parts["train"]] = -1                    # all are duplicates: none is new
    duplicates = replace(comparison, scenes=replace(comparison.scenes, groups=groups))
    assert len(experiment.choose_subset(duplicates, 4, 0).fresh) == 0


def test_only_rare_buildings_are_replaced_whatever_replaces_them(buildings):
    subset = experiment.choose_subset(buildings.comparison, 12, 0)
    count = subset.real.labels.bincount(minlength=4)
    rare = [c for c in range(4) if count[c] < len(subset.real) / 4]
    assert 0 < len(rare) < 4
    for source in ("generator", "fresh", "copies"):
        pool = experiment.replacements(subset, experiment.Arm(source, 0.5))
        assert set(pool.labels.tolist()) <= set(rare) and len(pool) > 0
    assert set(pool.names) == {subset.real.names[k] for k in range(len(subset.real))
                               if subset.real.labels[k] in rare}


def test_controls_shuffle_labels_or_give_synthetic_images_first(scenes):
    plain = scenes.fitted[0, "real + synthetic + augmentation"].pool
    shuffled = scenes.fitted[0, "controls: shuffled labels"].pool
    assert torch.equal(plain.images, shuffled.images)
    assert torch.equal(plain.labels.bincount(), shuffled.labels.bincount())
    assert (plain.labels == shuffled.labels).float().mean() < 0.4         # an eighth by chance
    assert scenes.fitted[0, "controls: synthetic first, then real"].cfg.pretrain


def test_a_generator_makes_rare_classes_only_with_masks_that_are_black_and_white(buildings):
    real = buildings.fitted[0, "balanced"].real.labels.bincount(minlength=4)
    pool = buildings.fitted[0, "balanced + synthetic"].pool
    rare = {c for c in range(4) if real[c] < real.sum() / 4}
    assert set(pool.labels.tolist()) == rare == set(buildings.generators[0][0].labels.tolist())
    assert set(pool.images[:, 3].unique().tolist()) <= {0, 255} and 0 not in rare
    val = buildings.comparison.val.labels                     # of all arms but "real": prior of val
    assert len(buildings.adjusted) == 7
    assert all(torch.equal(labels, val) for _, labels, _ in buildings.adjusted)


def test_scores_are_those_of_the_answers(buildings):
    test = buildings.comparison.test
    row = rows_of(buildings.out)["buildings", "12", "0", "balanced + synthetic"]
    counts = train_cls.class_counts(test.labels.numpy(), np.array(row["answers"]), 4)
    assert float(row["accuracy"]) == pytest.approx(accuracy(counts)) and int(row["added"]) > 0
    assert float(row["macro-F1"]) == pytest.approx(macro_f1(counts))
    f1 = dict(zip(test.classes, train_cls.f1(counts), strict=True))
    assert [float(row[f"F1 {name}"]) for name in f1] == pytest.approx(list(f1.values()))
    cells = {cell[0]: cell for cell in experiment.arms_table(buildings.comparison)[1]}
    assert cells["balanced + synthetic"][2] == f"{100 * macro_f1(counts):.1f}"


def test_a_test_image_among_the_training_images_stops_the_run(trees, tmp_path, monkeypatch):
    split = data.split
    def leak(scenes, **more):
        parts = split(scenes, **more)
        return parts | dict(train=torch.cat([parts["train"], parts["test"][:1]]))
    monkeypatch.setattr(data, "split", leak)
    with pytest.raises(RuntimeError, match="in both the train and the test split"):
        watched(data=str(trees / "scenes"), out=str(tmp_path), counts=(4,))


@pytest.mark.parametrize("count, possible", [(9, True), (10, False)])       # of 18 in each class
def test_the_upper_bound_takes_as_many_fresh_images_as_real_ones(trees, tmp_path, count, possible):
    watched(data=str(trees / "scenes"), out=str(tmp_path), counts=(count,), seeds=1,
            arms="real + fresh real + augmentation,linear: real")
    ran = {arm for *_, arm in rows_of(tmp_path)}
    assert ("real + fresh real + augmentation" in ran) is possible


def test_an_event_can_be_held_out(trees, tmp_path):
    ran = watched(data=str(trees / "buildings"), out=str(tmp_path), counts=(8,), seeds=1,
                  arms="balanced + synthetic", hold_out="drawn-wildfire")
    assert all("wildfire" in name for name in ran.comparison.test.names)
    for scenes in (ran.comparison.val, ran.generators[0][0]):
        assert scenes.names and not any("wildfire" in name for name in scenes.names)
    assert "drawn-wildfire held out" in (tmp_path / "report.html").read_text()


# ---- runs: stopped, and going on

def test_seeds_with_one_draw_share_a_generator_and_nothing_else(trees, tmp_path, monkeypatch):
    one_draw = replace(experiment.SCALES["scenes"]["smoke"], redraw=False)
    monkeypatch.setitem(experiment.SCALES["scenes"], "smoke", one_draw)
    flags = dict(data=str(trees / "scenes"), out=str(tmp_path), counts=(4,))
    ran = watched(**flags, arms="real + synthetic")
    a, b = (ran.fitted[seed, "real + synthetic"] for seed in (0, 1))
    assert a.real.digest == b.real.digest and a.pool.digest == b.pool.digest
    answers = [row["answers"] for row in rows_of(tmp_path).values()]
    assert len(ran.generators) == 1 and answers[0] != answers[1]
    assert "with the same training images" in (tmp_path / "report.html").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="equal to the bit on a CPU only")
def test_a_stopped_run_goes_on_with_1_and_2_jobs_to_equal_rows(scenes, tmp_path, monkeypatch,
                                                               capsys):
    arms = "real,real + synthetic,linear: synthetic only"
    cfg = replace(scenes.comparison.cfg, out=str(tmp_path), arms=arms, study="")
    fit, fits = train_cls.fit, []
    def stop_at_every_third(*args, **more):
        fits.append(args)
        if len(fits) % 3 == 0:
            raise KeyboardInterrupt
        return fit(*args, **more)

    monkeypatch.setattr(train_cls, "fit", stop_at_every_third)
    for done in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            experiment.main(cfg)
        assert len([*tmp_path.rglob("seed*/*.json")]) == done
    assert "Unfinished: 0 of 2 seeds" in (tmp_path / "report.html").read_text()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("seed*/*.json")}
    (tmp_path / "scenes/4/draw1/generator.pt").unlink()
    for path in tmp_path.glob("scenes/4/draw1/synthetic*"):
        path.unlink()
    for runs in ("1 generators of 5 steps, then 2", "0 generators of 5 steps, then 0"):
        experiment.main(replace(cfg, jobs=2))            # the second time all is there
        assert f"{runs} classifiers of 5 steps" in capsys.readouterr().out
    reference, rows = rows_of(scenes.out), rows_of(tmp_path)
    assert len(rows) == 8 and rows == {run: reference[run] for run in rows}   # + linear: real
    assert all(path.stat().st_mtime_ns == changed for path, changed in files.items())


@pytest.mark.parametrize("change, name", [
    (dict(cls_steps=6), "cls"), (dict(gen_steps=6), "gen"), (dict(generated=7), "generated"),
    (dict(scale="small"), "redraw")])
def test_other_settings_are_refused_in_the_same_folder(scenes, change, name):
    with pytest.raises(data.UserError, match=rf"seed0/.*\.json has another {name}: give another"):
        experiment.main(replace(scenes.comparison.cfg, **change))


def test_other_parts_are_refused_in_the_same_folder(scenes, monkeypatch):
    swapped = scenes.comparison.parts | dict(val=scenes.comparison.parts["test"])
    monkeypatch.setattr(data, "split", lambda *_, **__: swapped)
    with pytest.raises(data.UserError, match="has another images"):
        experiment.main(scenes.comparison.cfg)


def test_synthetic_images_of_other_settings_are_never_read(scenes, monkeypatch):
    """Not even where no classifier was finished, whose row would refuse them."""
    asked, subset = [], experiment.choose_subset(scenes.comparison, 4, 0)
    arm, scale = scenes.comparison.arms["real + synthetic"], scenes.comparison.scale
    monkeypatch.setattr(train_gen, "train", lambda *args, **more: None)
    monkeypatch.setattr(train_gen, "generate", lambda *args, **more: asked.append(args) or 1 / 0)
    pool = scenes.fitted[0, "real + synthetic"].pool
    assert experiment.synthesize(subset, arm).digest == pool.digest and not asked
    changes = dict(guidance=0.0), dict(strength=0.5), dict(generated=5)
    others = [(scale, replace(arm, **change)) for change in changes]
    others += [(replace(scale, sampling_steps=3), arm)]
    others += [(replace(scale, gen=train_gen.Config()), arm)]
    for changed, arm in others:
        with pytest.raises(ZeroDivisionError):
            comparison = replace(scenes.comparison, scale=changed)
            experiment.synthesize(subset._replace(comparison=comparison), arm)
    with pytest.raises(ZeroDivisionError):
        experiment.synthesize(subset._replace(real=subset.real[1:]), arm)
    assert asked[0][4] == 0.0 and asked[1][6] == 0.5 and len(asked[2][1]) == 40 and asked[3][3] == 3


def test_a_dry_run_says_what_takes_the_time_and_runs_nothing(trees, tmp_path, capsys):
    flags = dict(data=str(trees / "scenes"), out=str(tmp_path))
    experiment.main(Config(scale="smoke", dry_run=True, **flags))
    printed = capsys.readouterr().out
    assert "(144 train, 48 val, 48 test)" in printed and "4 and 8 real images per class" in printed
    assert "4 generators of 10 steps, then 28 classifiers of 10 steps" in printed
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


# ---- the protocols of He et al. 2023

@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Train a small CLIP on grey and red pictures with sentences, then run all its arms."""
    root, rng = tmp_path_factory.mktemp("clip"), np.random.default_rng(0)
    for name, k in product(("ash", "brick"), range(60)):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        pixels[..., 0] = pixels[..., 0] // 4 + (192 if name == "brick" else 0)
        data.save_picture(Image.fromarray(pixels), root / "tree" / name / f"{k}.png")
    scenes = data.read(root / "tree", 16, cache=root)
    scenes.captions = [(f"an aerial photo of {name.split('/')[0]}",) for name in scenes.names]
    cfg = train_cls.Config(size=16, patch=4, dim=32, depth=1, heads=2, steps=50, batch=16, warmup=5,
                           lr=3e-3, augment="none")
    train_cls.fit_clip(scenes[data.split(scenes)["train"]], cfg, root / "clip.pt")
    return watched(data=str(root / "tree"), out=str(root / "out"), init=str(root / "clip.pt"),
                   counts=(4,), seeds=3, size=16, arms="linear: real")


def test_clip_arms_tune_a_head_on_features_and_zero_shot_is_what_the_names_of_classes_say(clip):
    comparison = clip.comparison
    model = experiment.load_clip(comparison)
    expected = model(data.to_float(comparison.test.images)).argmax(1).tolist()
    rows = comparison.rows_of("clip: zero-shot", 4)
    assert len(rows) == 3 and rows[0]["accuracy"] > 0.8                   # colours are easy
    assert all(row["answers"] == expected and row["steps"] == 0 for row in rows)
    assert {row["steps"] for row in comparison.rows.values()} == {0, comparison.scale.cls.steps}
    assert set(comparison.arms) == {"linear: real", *experiment.CLIP_ARMS}
    assert {arm for claim in TASKS["scenes"].claims for arm in claim} >= set(experiment.CLIP_ARMS)
    paths = [*(comparison.out / "features").glob("*.pt")]
    assert all(comparison.settings["weights"] in path.name for path in paths)
    kept = [data.load(path) for path in paths]
    assert all(features.shape[1] == 32 for features in kept)              # computed once
    assert len(kept) == len({features.double().sum().item() for features in kept})
    found = experiment.claims(comparison)
    answer, = experiment.answers(comparison, found)
    assert len(found) == 5 and "(clip: real + copies against clip: real)" in answer


def test_clip_keeps_what_it_recognises_and_edits_real_images(clip):
    comparison = clip.comparison
    subset = experiment.choose_subset(comparison, 4, 0)
    arm = comparison.arms["clip: synthetic only"]
    pool = experiment.synthesize(subset, arm)
    logits = experiment.load_clip(comparison)(data.to_float(pool.images)).detach()
    right = logits.argmax(1) == pool.labels                              # of two classes: above 1/2
    kept = experiment.replacements(subset, arm)
    assert 0 < len(kept) < len(pool) and kept.digest == pool[right].digest
    edited = [pair for pair in zip(clip.generated, clip.generators, strict=True) if pair[0][6]]
    assert len(edited) == 3
    for (_, y, *_, reference, strength), (real, *_) in edited:           # from real images, in turn
        assert torch.equal(reference.labels, y) and set(reference.names) == set(real.names)
        assert strength == 0.35


def test_weights_are_a_part_of_the_settings_and_must_be_those_of_a_clip(clip, tmp_path):
    cfg, saved = clip.comparison.cfg, data.load(clip.comparison.cfg.init)
    data.save(tmp_path / "other.pt", saved | dict(step=saved["step"] + 1))
    with pytest.raises(data.UserError, match="has another weights"):
        experiment.main(replace(cfg, init=str(tmp_path / "other.pt")))
    vit = train_cls.Config(size=16, patch=4, dim=16, depth=1, heads=1, steps=1, batch=2)
    train_cls.fit(clip.comparison.test, None, vit, tmp_path / "test.pt")
    with pytest.raises(data.UserError, match="trained on .* of the val and test pictures"):
        experiment.main(replace(cfg, init=str(tmp_path / "test.pt"), out=str(tmp_path / "new")))


# ---- verdicts, and what is said of them

def compared(out, rates, seeds=4, counts=(4,), task="scenes"):
    """Return a Comparison whose runs are done: rates {arm: share of right answers in each seed}."""
    names, labels = [f"c{c:02d}" for c in range(4)], torch.arange(160) % 4
    images = data.Scenes(torch.zeros(160, 3, 8, 8, dtype=torch.uint8), labels, names,
                         [f"{k}.png" for k in range(160)], torch.arange(160))
    parts = dict(zip(("train", "val", "test"), torch.arange(160).split([80, 40, 40]), strict=True))
    cfg = Config(scale="smoke", task=task, out=str(out))
    scale = replace(cfg.resolved(task), counts=counts, seeds=seeds)
    arms = {name: TASKS[task].arms[name] for name in rates}
    comparison = experiment.Comparison(task, TASKS[task], arms, scale, cfg, "drawn", images, parts)
    truth = comparison.test.labels.numpy()
    for k, (arm, rate) in enumerate(rates.items()):
        for count, seed in product(counts, range(seeds)):
            order = np.random.default_rng([k, count, seed]).permutation(40)
            answers = np.where(order < round(40 * rate), truth, (truth + 1) % 4)
            row = dict(seed=seed, train=1.0, answers=answers.tolist())
            row |= dict.fromkeys((*experiment.SCORES, *(f"F1 {name}" for name in names)), rate)
            comparison.rows[Run(task, count, 0, seed, arm)] = row
    return comparison


@pytest.mark.parametrize("base, arm, linear, seeds, verdict", [
    (0.3, 0.8, 0.5, 4, "helps"), (0.8, 0.3, 0.5, 4, "hurts"),
    (0.6, 0.6, 0.5, 4, "no difference shown"),
    (0.5, 0.55, 0.5, 4, "no difference shown"), (0.3, 0.8, 0.9, 4, "below the linear baseline"),
    (0.0, 0.2, 0.0, 4, "below the linear baseline"),           # always one class: a quarter
    (0.3, 0.8, 0.5, 2, "too few seeds"), (0.3, 0.8, 0.5, 3, "helps")])
def test_a_verdict_takes_3_seeds_and_an_arm_above_the_baseline(tmp_path, base, arm, linear, seeds,
                                                               verdict):
    rates = {"real": base, "real + synthetic": arm, "linear: real": linear,
             "linear: real + synthetic": 0.95}               # is no baseline: not of real images
    claim, = experiment.claims(compared(tmp_path, rates, seeds))
    assert (claim.verdict, claim.arm, claim.base) == (verdict, "real + synthetic", "real")
    assert claim.gain.mean == pytest.approx(arm - base)


def test_the_commonest_class_is_that_of_the_training_images(tmp_path):
    comparison = compared(tmp_path, {})
    comparison.parts["train"] = torch.arange(2, 80, 4)
    assert experiment.commonest(comparison) == ("c02", 25.0)


def test_p_is_corrected_among_claims_on_synthetic_images_and_among_controls(tmp_path):
    rates = {"real": 0.4, "real + synthetic": 0.5, "real + augmentation": 0.5,
             "real + fresh real + augmentation": 0.75, "real + copies + augmentation": 0.6}
    alone, *controls = experiment.claims(compared(tmp_path, rates))
    small, large = sorted(controls, key=lambda claim: -claim.p)
    assert alone.p == pytest.approx(alone.gain.p) and small.p == pytest.approx(small.gain.p)
    assert large.p == pytest.approx(2 * large.gain.p)


def test_arms_of_other_seeds_or_of_one_seed_or_group_are_not_compared(tmp_path):
    rates, pair = {"real": 0.4, "real + synthetic": 0.6}, ("real + synthetic", "real", 4)
    comparison = compared(tmp_path, rates)
    assert experiment.difference(comparison, *pair).mean == pytest.approx(0.2)
    assert experiment.difference(compared(tmp_path, rates, seeds=1), *pair) is None
    one_group = replace(comparison)
    one_group.test = replace(comparison.test, groups=torch.zeros(40, dtype=torch.int64))
    assert experiment.difference(one_group, *pair) is None
    assert comparison.seeds_done() == 4
    del comparison.rows[Run("scenes", 4, 0, 1, "real")]
    del comparison.rows[Run("scenes", 4, 0, 2, "real + synthetic")]       # as many, but others
    assert comparison.seeds_done() == 3
    fewer, few = experiment.difference(comparison, *pair), compared(tmp_path, rates)
    few.rows = {run: row for run, row in few.rows.items() if run.seed in (0, 3)}
    assert fewer == experiment.difference(few, *pair) and fewer.seeds == 2
    del comparison.rows[Run("scenes", 4, 0, 0, "real")]
    assert experiment.difference(comparison, *pair) is None


RATES = {"real": 0.5, "real + augmentation": 0.5, "real + synthetic": 0.55, "linear: real": 0.3,
         "real + synthetic + augmentation": 0.5, "real + fresh real + augmentation": 0.8,
         "real + copies + augmentation": 0.2}


def test_the_answer_is_a_paragraph_per_number_of_images_and_explains_controls_once(tmp_path):
    comparison = compared(tmp_path, RATES, counts=(4, 20))
    found = experiment.claims(comparison)
    first, second = experiment.answers(comparison, found)
    assert re.fullmatch(
        r"With 4 real images per class, synthetic images made no difference that 4 seeds could show"
        r": \+0\.0 points \[-[0-9.]+, \+[0-9.]+\] of accuracy \(95 % interval\)\. Without "
        r"augmentation, synthetic images made no .*?: \+5\.0 points .*?\. Fresh real images "
        r"instead \(the upper bound: .*?\) add 30\.0 points \[\+.*?\]\. Copies of the real images "
        r"\(the negative control: .*?\) hurt: -30\.0 points \[-.*?\]\.", first)
    assert second.startswith("With 20 real images per class, synthetic images made no difference")
    assert "upper bound" not in second and "Fresh real images instead add 30.0 points" in second
    below = [replace(claim, verdict="below the linear baseline") for claim in found]
    paragraph = experiment.answers(comparison, below)[0]
    assert "get no verdict, as the linear baseline is higher" in paragraph
    assert experiment.answers(comparison, []) == [
        "No answer: a claim needs two seeds of both its arms."]
    comparison.scale = replace(comparison.scale, seeds=6)
    del comparison.rows[Run("scenes", 4, 0, 3, "real + fresh real + augmentation")]
    assert experiment.answers(comparison, found)[0] == "Unfinished: 4 of 6 seeds are done."


@pytest.mark.parametrize("p, least_p, text", [
    (0.001, 0.001, "a sign of memorised images. 12.5 %"), (0.5, 0.001, "No sign of memorised"),
    (0.5, 0.3, "Too few images to say whether")])
def test_near_duplicates_are_on_the_page(scenes, p, least_p, text):
    pair = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    near = {4: NearDuplicates(8, 1, 0.4, p, least_p, pair, pair)}
    comparison = replace(scenes.comparison, near_duplicates=near)
    page = "".join(experiment.task_html(comparison))
    assert f"{text}" in page and "12.5 % of 8 synthetic images are near-duplicates: each" in page
    assert "5.0 % would be (p " in page and page.count("<img") == 8 * 2 + 2
    answer = " ".join(experiment.answers(comparison, experiment.claims(comparison)))
    assert ("12.5 % of the synthetic images are near-duplicates of" in answer) is (p < 0.01)
    page = "".join(experiment.task_html(replace(comparison, near_duplicates={4: None})))
    assert page.count("<img") == 8 * 2 and "near-duplicates" not in page  # nothing to compare


def test_the_page_needs_nothing_else_and_has_the_answer_first(scenes):
    page = (scenes.out / "report.html").read_text()
    title = "Does synthetic data from a generative model help image recognition in remote sensing?"
    assert page.count(title) == 2 and "http" not in page and "<script" not in page
    order = [page.index(text) for text in (
        "<p class=answer>With 4 real images per class, synthetic images", "<svg", "<h3>Synthetic",
        "near-duplicates: each", "<h3>Claims", "<h3>All arms", "Run it again")]
    assert order == sorted(order)
    for term in ("(the upper bound: ", "(the negative control: ", "arms, which are ways to train",
                 "the linear baseline: the better of a linear", "over seeds and test images"):
        assert term in page
    for arm in scenes.comparison.arms:
        assert f"<td>{html.escape(arm)}<td" in page
    assert scenes.comparison.near_duplicates[4].total == 48               # of the first draw
    assert page.count("<table") == page.count("<div class=scroll><table") == 4
    first, second = (100 * row["accuracy"] for row in scenes.comparison.rows_of("linear: real", 4))
    text = f"{(first + second) / 2:.1f} ± {abs(first - second) / 2**0.5:.1f}"
    assert f"<td>{text}<td>" in page and "<th>F1" not in page            # of 8 classes
    assert (experiment.shown(0.00099), experiment.shown(0.0444)) == ("< 0.001", "0.044")
    assert "share" not in scenes.comparison.settings["cls"]


def test_the_plot_puts_an_interval_where_its_axis_says(tmp_path):
    claims = [experiment.Claim(4, "a <", "b", Gain(0.09, 0.13, 0.2, 3)),
              experiment.Claim(4, "c", "b", Gain(0.02, 3.0, 0.9, 3))]
    assert claims[0].gain.text() == "+9.0 [-4.0, +22.0]"
    assert claims[1].gain.text(" points") == "+2.0 points [-100.0, +100.0]"       # at most
    svg = experiment.interval_plot(compared(tmp_path, {}), claims)
    ticks = re.findall(r'<text x="([0-9.]+)"[^>]*middle">(-?[0-9]+)', svg)
    x = {int(points): float(place) for place, points in ticks}
    spans = re.findall(r'd="M([0-9.]+) [0-9]+H([0-9.]+)M([0-9.]+)', svg)
    left, right, mean = (x[0] + (x[40] - x[0]) / 40 * points for points in (-4, 22, 9))
    assert [float(place) for place in spans[0]] == pytest.approx([left, right, mean], abs=0.15)
    assert spans[1][:2] == ("20.0", "420.0") and "a &lt; against b" in svg       # 50 points at most


def test_the_terminal_ends_with_the_answers_and_the_claims_in_25_lines(tmp_path, capsys):
    rates = dict.fromkeys(experiment.SCALES["buildings"]["small"].arms, 0.5)
    rates |= {"linear: balanced": 0.3, "balanced + fresh real": 0.9}
    comparisons = [compared(tmp_path, RATES, 5), compared(tmp_path, rates, 5, (8,), "buildings")]
    pair = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for comparison in comparisons:
        near = NearDuplicates(480, 479, 4.0, 1e-9, 1e-9, pair, pair)
        comparison.near_duplicates[comparison.scale.counts[0]] = near
    experiment.print_answers(comparisons)
    printed = capsys.readouterr().out
    assert len(printed.rstrip().splitlines()) <= 25 and str(tmp_path / "report.html") in printed
    for comparison in comparisons:
        found, header = experiment.claims(comparison), experiment.arms_table(comparison)[0]
        bases = [base for base in comparison.task.bases if "copy-paste" not in base]   # not run
        assert header[3:3 + len(bases)] == [f"points against {base}" for base in bases]
        assert experiment.answers(comparison, found)[0] in " ".join(printed.split())
        assert len(found) >= 3
        for claim in found:
            assert re.search(rf"{re.escape(claim.arm)} against .*\[.*{claim.verdict} ", printed)


# ---- flags

def test_flags_change_what_they_name_and_nothing_else(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base = Config(scale="small").resolved("scenes")
    assert base == Config(data="x").resolved("scenes") == experiment.SCALES["scenes"]["small"]
    flags = dict(seeds=7, redraw=True, generated=9)
    asked = Config(scale="small", data="x", counts=(20, 5, 0, 5), **flags).resolved("scenes")
    assert asked == replace(base, counts=(5, 20, 0), **flags)
    full = Config(scale="full", size=32, gen_steps=11, cls_steps=12).resolved("scenes")
    assert (full.gen.size, full.cls.size, full.gen.steps, full.cls.steps) == (32, 32, 11, 12)
    patches = {size: Config(scale="small", size=size).resolved("scenes").cls.patch
               for size in (8, 16, 24, 40, 80, 88, 128)}
    assert patches == {8: 2, 16: 2, 24: 4, 40: 8, 80: 16, 88: 8, 128: 16}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)         # real data: medium
    assert Config().resolved("scenes") == base
    assert Config(data="x").resolved("scenes") == experiment.SCALES["scenes"]["medium"]


def test_studies_add_arms_that_change_the_main_arm():
    for (name, task), (study, changes) in product(TASKS.items(), STUDIES.items()):
        arms = Config(task=name, study=study, arms="all").selected_arms(task, ())
        without = study == "augment" and name == "scenes"                 # scenes have no masks
        assert len(arms) == len(task.arms) + len(changes) - without == len(task.arms | arms)
        for change in changes.keys() - {"copypaste"}:
            expected = replace(task.arms[task.main_arm], **changes[change])
            assert arms[f"{study}: {change}"] == expected
