"""experiment.py: fair arms, intervals that cover, a page that stands alone, runs that can go on."""
import csv
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import experiment
from data import Scenes
from experiment import ARMS, Config, interval, nearest, symmetries, t_quantile


def run(*argv):
    return subprocess.run([sys.executable, "experiment.py", *map(str, argv)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One smoke run of all arms, shared by the tests below: (folder, what it printed)."""
    out = tmp_path_factory.mktemp("smoke")
    done = run("--smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def results(out):
    with open(out / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---- the whole

def test_the_smoke_run_prints_plan_table_verdict_and_page(smoke):
    out, done = smoke
    assert "20 classifiers of 10 steps" in done.stdout and "minutes on" in done.stdout
    assert len(re.findall(r"^ +[48]  (?:real|synthetic)", done.stdout, re.M)) == 10
    assert done.stdout.count("synthetic images ") >= 4 and "they say nothing about the world" in done.stdout
    assert "Are they copies? Distance to the nearest of 64 training images" in done.stdout
    assert str(out / "report.html") in done.stdout
    assert done.stderr == ""                                        # no progress bars where nobody watches


def test_every_run_is_a_row_and_all_arms_have_the_same_budget(smoke):
    rows = results(smoke[0])
    assert len(rows) == 20 and len({(r["arm"], r["count"], r["seed"]) for r in rows}) == 20
    assert {(r["steps"], r["images"]) for r in rows} == {("10", "320")}
    for r in rows:
        share = int(r["synthetic"]) / int(r["images"])
        assert abs(share - ARMS[r["arm"]]["share"]) < (0.15 if 0 < share < 1 else 1e-9)
        recalls = [float(v) for k, v in r.items() if k.startswith("recall ")]
        assert np.mean(recalls) == pytest.approx(float(r["accuracy"]))  # the test split is balanced


def test_a_second_start_runs_nothing_and_says_the_same(smoke, capsys):
    out, done = smoke
    before = {p: p.stat().st_mtime_ns for p in [*out.rglob("*.pt"), *(out / "predicted").iterdir()]}
    experiment.main(Config(smoke=True, out=str(out)))
    assert capsys.readouterr().out.split("per class  arm")[1] == done.stdout.split("per class  arm")[1]
    assert before == {p: p.stat().st_mtime_ns for p in [*out.rglob("*.pt"), *(out / "predicted").iterdir()]}


def test_a_lost_run_is_run_again_with_the_same_result(smoke):
    out, rows = smoke[0], results(smoke[0])
    kept = [r for r in rows if not (r["arm"] == "real + synthetic" and r["count"] == "8")]
    data.save_csv(out / "results.csv", list(rows[0]), [list(r.values()) for r in kept])
    experiment.main(Config(smoke=True, out=str(out)))
    score = {r["run"]: r["accuracy"] for r in rows}
    assert {r["run"]: r["accuracy"] for r in results(out)} == score


def test_generators_saw_the_training_images_of_their_arm_and_nothing_else(smoke):
    out = smoke[0]
    scenes = data.read_folder(out / "drawn-20", 16, cache=out / "cache")
    parts = data.split(scenes, out / "drawn-20")
    saved = [data.load_checkpoint(p, "generator") for p in (out / "generators").glob("*.pt")]
    trained = {tuple(sorted(generator["names"])) for generator in saved}
    subsets = {tuple(sorted(scenes[data.subset(scenes, parts["train"], count, draw)].names))
               for count in (4, 8) for draw in (0, 1)}
    assert trained == subsets and len(trained) == 4
    assert not {name for names in trained for name in names} & set(scenes[parts["test"]].names)


def test_without_git_the_commit_is_left_empty(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert experiment.commit() == ""


def test_the_page_needs_nothing_but_itself(smoke):
    page = (smoke[0] / "report.html").read_text()
    assert "http" not in page and "<script" not in page
    assert page.count("data:image/png;base64,") == 2 == page.count("<img alt=\"") and "<svg" in page
    assert "python experiment.py --smoke --out" in page and page.count("<tr>") == 11
    assert Image.open(smoke[0] / "grid.png").width > Image.open(smoke[0] / "grid.png").height


def test_sharing_a_subset_trains_one_generator_per_count_and_the_verdict_says_so(tmp_path, capsys):
    cfg = Config(smoke=True, out=str(tmp_path), subsets=1, arms="real,real + synthetic", counts="4")
    experiment.main(cfg)
    said = capsys.readouterr().out
    assert "1 draw of the training images" in said and "do not cover another draw" in said
    assert len(list((tmp_path / "generators").glob("*.pt"))) == 1 and len(results(tmp_path)) == 4


@pytest.mark.parametrize("argv, message", [
    (["--arms", "real,fake"], "unknown arm fake"), (["--seed", "3"], "--seed"), (["--counts", "ten"], "ten"),
    (["--scale", "huge"], "--scale huge"), (["--data", "/nowhere"], "no folder /nowhere"),
    (["--smoke", "--size", "18"], "--size 18"), (["--smoke", "--counts", "4,99"], "fewer than the 99")])
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        data.launch(experiment.main, Config, [*argv, "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert error.value.code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "results.csv").exists() and not (tmp_path / "generators").exists()


def test_an_xbd_tree_is_not_compared_by_accuracy(tmp_path):
    root = data.draw_xbd(tmp_path / "xbd", 4, side=64)
    with pytest.raises(data.Problem, match="xBD tree"):
        experiment.main(Config(smoke=True, data=str(root), out=str(tmp_path / "x")))


def test_drawn_scenes_stay_small_and_data_on_a_gpu_are_compared_in_full(monkeypatch):
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert Config().resolved() == experiment.SCALES["small"]
        assert Config(data="x").resolved() == experiment.SCALES["full" if gpu else "small"]


def test_flags_change_what_they_name_and_nothing_else():
    base = Config(scale="small").resolved()
    s = Config(scale="small", counts="5", seeds=7, subsets=2, made=9, w=3.0).resolved()
    assert s == replace(base, counts=(5,), seeds=7, subsets=2, made=9, w=3.0)
    assert Config(counts="8,4,8").resolved().counts == (4, 8)
    s = Config(scale="full", size=32, gen_steps=11, cls_steps=12).resolved()
    assert (s.gen.size, s.cls.size, s.cls.patch, s.gen.steps, s.cls.steps) == (32, 32, 4, 11, 12)
    assert experiment.command(Config(counts="5", w=3.0)) == "python experiment.py --counts 5 --w 3.0"


# ---- statistics

@pytest.mark.parametrize("dof, q", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (10, 2.2281), (1000, 1.9623)])
def test_t_quantile_is_the_tables(dof, q):
    assert t_quantile(0.975, dof) == pytest.approx(q, rel=2e-3)


def test_the_interval_is_students_where_only_seeds_differ_and_where_only_images_do():
    seeds = np.array([0.1, 0.3, 0.2, 0.5])
    mean, half = interval(np.repeat(seeds[:, None], 50, axis=1))
    assert mean == pytest.approx(0.275) and half == pytest.approx(3.1824 * seeds.std(ddof=1) / 2, rel=1e-3)
    images = np.tile([1.0, 0.0, 0.0, -1.0, 1.0], 20)
    mean, half = interval(np.repeat(images[None], 3, axis=0))
    assert mean == pytest.approx(0.2) and half == pytest.approx(1.9842 * images.std(ddof=1) / 10, rel=1e-3)


def test_the_interval_covers_a_known_difference_in_95_of_100_cases():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(600):
        seed, image = 0.02 * rng.standard_normal((5, 1)), 0.2 * rng.standard_normal((1, 150))
        mean, half = interval(0.03 + seed + image + 0.3 * rng.standard_normal((5, 150)))
        covered += abs(mean - 0.03) <= half
    assert 0.93 <= covered / 600 <= 0.975


def test_no_difference_at_all_is_no_difference():
    assert interval(np.zeros((3, 20))) == (0.0, 0.0) and "no difference" in experiment.in_words((0.0, 0.0))


def test_words_follow_the_interval():
    said = [experiment.in_words(gain).split()[0] for gain in ((0.03, 0.02), (-0.03, 0.02), (0.01, 0.02))]
    assert said == ["help", "hurt", "make"] and experiment.points((0.031, 0.027)) == "+3.1 [+0.4, +5.8]"


# ---- copies

def test_the_8_symmetries_are_all_there_and_differ():
    x = torch.arange(2 * 3 * 16, dtype=torch.uint8).view(2, 3, 4, 4)
    eight = symmetries(x)
    assert eight.shape == (8, 2, 3, 4, 4) and len({s.numpy().tobytes() for s in eight}) == 8
    again = symmetries(x.rot90(1, (2, 3)).flip(2))
    assert {s.numpy().tobytes() for s in again} == {s.numpy().tobytes() for s in eight}


def test_a_turned_copy_is_found_and_turned_back():
    g = torch.Generator().manual_seed(0)
    pool = torch.randint(256, (20, 3, 8, 8), generator=g, dtype=torch.uint8)
    distance, which, turned = nearest(torch.stack([pool[7].rot90(3, (1, 2)).flip(2), pool[3]]), pool)
    assert which.tolist() == [7, 3] and distance.max() < 0.1 and (turned == pool[which]).all()
    brighter = (pool[:1] // 2 + 10)
    expected = (brighter.float() - pool[0].float()).square().mean().sqrt()
    assert nearest(brighter, pool[:1])[0].item() == pytest.approx(expected.item(), rel=1e-3)


def test_copies_are_told_from_new_images():
    g = torch.Generator().manual_seed(0)

    def scenes(images):
        n = len(images)
        return Scenes(images, torch.zeros(n, dtype=torch.long), ["a"], [""] * n, torch.arange(n))

    drawn = (torch.randint(256, (40, 3, 8, 8), generator=g, dtype=torch.uint8) for _ in range(3))
    real, held, new = map(scenes, drawn)
    copied = scenes((real.images.int() + 3).clamp(0, 255).to(torch.uint8))
    said = [experiment.copies(real, s, held)[1] for s in (copied, new)]
    share = [int(re.search(r"in (\d+) % of pairs", sentence)[1]) for sentence in said]
    assert share[0] == 100 and 35 < share[1] < 65
