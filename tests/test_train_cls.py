"""train_cls.py: fair mixtures, honest scores."""
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import data
import train_cls
from augment import AUGMENTATIONS, OVERHEAD
from data import Problem, Scenes
from train_cls import Config, confusion, fit, load_classifier, predict

TINY = Config(size=8, patch=4, dim=16, depth=1, heads=2, steps=6, batch=16, warmup=2, augment="none")


def numbered(n, start=0):
    """Images that are one grey level each, so that a batch tells where it came from; two classes."""
    level = torch.arange(start, start + n, dtype=torch.uint8)
    return Scenes(level.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous(), torch.arange(n) % 2, ["a", "b"],
                  [f"{k}.png" for k in range(start, start + n)], torch.arange(n))


def batches(monkeypatch, *args):
    """The grey levels of every batch that fit(*args) trains on, (steps, batch), and what fit returns."""
    seen = []

    def spy(_):
        return lambda x, y, g: (seen.append(data.to_uint8(x[:, 0, 0, 0])) or x, y)

    with monkeypatch.context() as m:
        m.setattr(train_cls, "compose", spy)
        model, counts = fit(*args)
    return torch.stack(seen), counts


def test_a_synthetic_image_takes_the_place_of_a_real_one_and_nothing_else_changes(monkeypatch):
    real, synthetic, cfg = numbered(100), numbered(50, start=200), replace(TINY, steps=40, batch=64)
    alone, seen_alone = batches(monkeypatch, real, None, cfg)
    mixed, seen_mixed = batches(monkeypatch, real, synthetic, replace(cfg, share=0.3))
    pure, seen_pure = batches(monkeypatch, None, synthetic, replace(cfg, share=1.0))
    taken = mixed >= 200
    assert abs(taken.float().mean() - 0.3) < 0.03
    assert_close(mixed[~taken], alone[~taken])
    assert_close(mixed[taken], pure[taken])
    assert alone.max() < 100 and pure.min() >= 200
    assert set(alone.flatten().tolist()) == set(range(100))
    assert set(pure.flatten().tolist()) == set(range(200, 250))
    for seen, n in ((seen_alone, 0), (seen_mixed, taken.sum()), (seen_pure, 40 * 64)):
        assert seen == dict(steps=40, images=40 * 64, synthetic=n)


def test_copies_of_the_real_images_are_other_draws_of_them(monkeypatch):
    real, copies, cfg = numbered(50), numbered(50, start=200), replace(TINY, steps=20)
    alone, _ = batches(monkeypatch, real, None, cfg)
    mixed, _ = batches(monkeypatch, real, copies, replace(cfg, share=1.0))
    assert (mixed - 200 == alone).float().mean() < 0.15                  # 1 in 25 by chance
    assert ((mixed - 200) % 2 == alone % 2).all()                        # of the same class


def rare():
    """90 images of class 0, 9 of class 1, 1 of class 3: grey levels 0 to 89, 90 to 98, 99. No class 2."""
    labels = torch.tensor([0] * 90 + [1] * 9 + [3])
    return replace(numbered(100), labels=labels, classes=list("abcd"))


def test_classes_are_drawn_as_they_occur_or_all_equally_often(monkeypatch):
    cfg = replace(TINY, steps=40, batch=64)
    for balance, expected in ((False, [0.9, 0.09, 0.01]), (True, [1 / 3] * 3)):
        levels, _ = batches(monkeypatch, rare(), None, replace(cfg, balance=balance))
        ranges = (0, 90), (90, 99), (99, 100)
        shares = [((a <= levels) & (levels < b)).float().mean().item() for a, b in ranges]
        assert np.allclose(shares, expected, atol=0.03)
        assert len(levels.unique()) > 95                                 # within a class, every image


def test_synthetic_images_of_rare_classes_leave_the_others_alone(monkeypatch):
    cfg, two = replace(TINY, steps=40, batch=64, balance=True), numbered(10, start=200)
    synthetic = replace(two, labels=torch.ones(10, dtype=torch.int64), classes=list("abcd"))
    alone, _ = batches(monkeypatch, rare(), None, cfg)
    mixed, seen = batches(monkeypatch, rare(), synthetic, replace(cfg, share=0.5))
    ones = (alone >= 90) & (alone < 99)                                  # the places of class 1
    assert_close(mixed[~ones], alone[~ones])
    assert abs((mixed[ones] >= 200).float().mean() - 0.5) < 0.06 and seen["synthetic"] == (mixed >= 200).sum()


def test_soft_targets_are_taught_instead_of_the_class_of_synthetic_images(monkeypatch):
    taught, real, synthetic = [], numbered(10), numbered(10, start=200)
    monkeypatch.setattr(train_cls, "compose", lambda _: lambda x, y, g: (taught.append((x, y)) or x, y))
    soft = torch.rand(10, 2).softmax(1)
    fit(real, synthetic, replace(TINY, share=0.5), soft=soft)
    x, y = (torch.cat(parts) for parts in zip(*taught, strict=True))
    level = data.to_uint8(x[:, 0, 0, 0]).long()
    assert_close(y[level >= 200], soft[level[level >= 200] - 200])
    assert_close(y[level < 200], torch.eye(2)[level[level < 200] % 2])


def test_seed_and_nothing_else_decides_the_weights(monkeypatch):
    real = numbered(20)
    weights = [fit(real, None, replace(TINY, seed=seed))[0].head.weight.detach() for seed in (0, 0, 1)]
    assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert (weights[0] != weights[2]).any()


def test_matrices_decay_and_biases_and_norms_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    matrices, vectors = train_cls.adamw(model, 0.3).param_groups
    assert matrices["params"] == [model[0].weight] and matrices["weight_decay"] == 0.3
    assert len(vectors["params"]) == 3 and vectors["weight_decay"] == 0


def test_it_learns_and_predict_does_not_depend_on_the_batch():
    y = torch.arange(64) % 2
    level = torch.where(y.bool(), 200, 50).to(torch.uint8)
    images = level.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    s = Scenes(images, y, ["dark", "light"], [str(k) for k in range(64)], torch.arange(64))
    model, _ = fit(s, None, replace(TINY, steps=30, lr=3e-3))
    assert_close(predict(model, images), y)
    assert_close(predict(model, images, batch=7), predict(model, images))


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path, monkeypatch):
    real, synthetic, cfg = numbered(20), numbered(20, 100), replace(TINY, share=0.5, augment="hflip,cutmix")
    whole, seen = fit(real, synthetic, cfg, tmp_path / "a.pt", every=3)
    save = data.save_checkpoint

    def save_and_die(*args, **kw):
        save(*args, **kw)
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(train_cls.data, "save_checkpoint", save_and_die)
        fit(real, synthetic, cfg, tmp_path / "b.pt", every=3)
    again, seen_again = fit(real, synthetic, cfg, tmp_path / "b.pt", every=3)
    assert seen == seen_again
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=0)
    finished, seen_finished = fit(real, synthetic, cfg, tmp_path / "b.pt")
    assert seen_finished == seen
    assert_close(finished.head.weight, whole.head.weight)
    loaded, classes = load_classifier(tmp_path / "b.pt")
    assert classes == ["a", "b"] and not loaded.training
    assert_close(loaded.head.weight, whole.head.weight)


def test_no_step_waits_for_the_device(hasty_steps):
    every = ",".join(set(AUGMENTATIONS) - {"copypaste"})                 # which needs a mask
    fit(numbered(20), numbered(20, 100), replace(TINY, share=0.5, augment=every))
    assert hasty_steps == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(Problem, match="--lr"):
        fit(numbered(20), None, replace(TINY, lr=1e30))


def test_confusion_counts_truth_by_row_and_answer_by_column():
    matrix = confusion(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 1, 1]), 3)
    assert matrix.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]


def test_the_first_command_shown_augments_as_the_default_does():
    assert f"--augment {OVERHEAD}\n" in train_cls.__doc__ and Config().augment == OVERHEAD


@pytest.mark.parametrize("kw, message", [
    (dict(augment="blur"), "blur"), (dict(patch=5), "--patch 5"), (dict(share=1.5), "--share"),
    (dict(dim=18), "--dim 18")])
def test_bad_settings_are_told(kw, message):
    with pytest.raises(ValueError, match=message):
        Config(**{"size": 16, "patch": 4, **kw})


def test_buildings_of_xbd_are_classified_by_damage(tmp_path, launch):
    small = "--steps 2 --batch 4 --size 16 --patch 8 --dim 16 --depth 1 --heads 2".split()
    root = data.draw_xbd(tmp_path / "xbd", 16)
    done = launch(train_cls, "--data", root, "--out", tmp_path / "x", *small)
    assert done.returncode == 0 and "of 4 classes" in done.stdout and "macro-F1" in done.stdout


def run(*argv):
    return subprocess.run([sys.executable, "train_cls.py", *map(str, argv)], capture_output=True, text=True)


def test_the_command_trains_on_a_mixture_and_reads_test_only_if_asked(tmp_path, launch):
    root = data.draw_tree(tmp_path / "t", 5, size=16)
    synthetic = data.draw_tree(tmp_path / "s", 2, seed=1, size=16)
    for k in (1, 2):                                        # synthetic trees need not hold every class
        (synthetic / "runway" / f"runway_00{k}.jpg").unlink()
    flags = "--size 16 --patch 8 --dim 16 --depth 1 --heads 2 --steps 4 --batch 8 --warmup 1".split()
    flags += ["--data", root]
    plain = run(*flags, "--out", tmp_path / "a")
    assert plain.returncode == 0 and "val: accuracy" in plain.stdout and "test:" not in plain.stdout
    half = ("--synthetic", synthetic, "--share", 0.5)
    mixed = launch(train_cls, *flags, "--out", tmp_path / "b", *half, "--test")
    assert mixed.returncode == 0 and "14 synthetic" in mixed.stdout and "test: accuracy" in mixed.stdout
    alone = launch(train_cls, *flags, "--out", tmp_path / "c", "--synthetic", synthetic)
    assert alone.returncode == 2 and "--share" in alone.stderr and alone.stderr.count("\n") == 1


def test_the_weakest_class_named_is_one_that_was_tested(tmp_path, launch, monkeypatch):
    root, split = data.draw_tree(tmp_path / "t", 5, size=16), data.split

    def without_beaches(scenes, root):
        parts = split(scenes, root)
        return parts | dict(val=parts["val"][scenes.labels[parts["val"]] > 0])

    monkeypatch.setattr(data, "split", without_beaches)
    flags = "--size 16 --patch 8 --dim 16 --depth 1 --heads 2 --steps 2 --batch 8".split()
    said = launch(train_cls, "--data", root, "--out", tmp_path / "x", *flags).stdout
    assert "on 7 images; weakest class " in said and "weakest class beach" not in said
