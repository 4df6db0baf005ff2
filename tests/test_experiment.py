"""experiment.py: fair arms, intervals that cover, a page that stands alone, runs that can go on."""
import csv
import html
import json
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import experiment
from experiment import LEGS, STUDIES, Arm, Config

QUICK = dict(smoke=True, size=8, gen_steps=5, cls_steps=5, jobs=1)


def unwrapped(text):
    """What was printed, without its lines."""
    return " ".join(text.split())


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch):
    """In this process the plan does not try out how long steps take; in the smoke run it does."""
    monkeypatch.setattr(data, "seconds_per_step", lambda *_: 0)


def begin(folder, start):
    """Start main() below."""
    return [start(folder)]


def main(out):
    """Make a quick run of all arms. It draws the last picture of each class and the last tile itself."""
    data.draw_tree(out / "drawn-scenes-30", 29, size=32)
    data.draw_xbd(out / "drawn-buildings-64", 63, side=224)
    flags = "--smoke --size 8 --gen-steps 5 --cls-steps 5 --jobs 2".split()
    data.launch(experiment.main, Config, [*flags, "--out", str(out)])


@pytest.fixture(scope="module")
def smoke(begun):
    """The quick run: (folder, what it printed, its errors)."""
    out, _, ((said, errors),) = begun
    return out, said, errors


def results(out):
    with open(out / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---- the whole

def test_the_smoke_run_prints_plan_table_answer_and_page_for_both_legs(smoke):
    out, printed, errors = smoke
    networks = sum(arm.model != "linear" for arm in LEGS["scenes"].arms.values())        # 2 counts, 2 seeds
    assert f"{4 * networks} classifiers of 5 steps, 4 generators" in printed and "minutes on" in printed
    tables = "\n".join(re.findall(r"^All arms\n\n(.*?)\n\n", printed, re.M | re.S))
    rows = re.findall(r"^((?!always).*?)  +[0-9]+\.[0-9]", tables, re.M)
    arms = LEGS["scenes"].arms, LEGS["buildings"].arms
    assert sorted(row for row in rows if "resnet" not in row) == sorted(
        [f"{arm} ({count})" for count in "48" for arm in arms[0]] + [*arms[1]])
    assert "always no-damage" in printed and "macro-F1 in drawn-flood" in printed
    said = unwrapped(printed)
    assert said.count("say nothing about the world") == 2
    assert said.count("Too few seeds to say (at least three)") == 2
    assert said.count("of one generator, are nearer to a training image of their class") == 3
    assert len(re.findall("gets [0-9]+ % of [0-9]+ held-out images right", said)) == 3
    assert str(out / "report.html") in printed
    assert len([*(out / "drawn-scenes-30").rglob("*.jpg")]) == 8 * 30
    assert len([*(out / "drawn-buildings-64").rglob("*.json")]) == 64
    assert errors == ""                                        # no progress bars where nobody watches


def test_every_run_is_a_row_and_all_arms_of_networks_have_the_same_budget(smoke):
    rows = results(smoke[0])
    assert len({(r["leg"], r["arm"], r["count"], r["seed"]) for r in rows}) == len(rows)
    expected = 4 * len(LEGS["scenes"].arms) + 2 * len(LEGS["buildings"].arms)
    assert len([r for r in rows if not r["arm"].startswith("resnet")]) == expected
    for r in rows:
        arm = LEGS[r["leg"]].arms[r["arm"].removeprefix("resnet: ")]
        budget = ("0", "0") if arm.model == "linear" else ("5", "160")
        assert (r["steps"], r["images"]) == budget
        rare = arm.balance and arm.source == "generator"                # three of four classes are rare
        expected = arm.share * (0.75 if rare else 1)
        share = int(r["synthetic"]) / 160 if arm.model != "linear" else expected
        assert abs(share - expected) < (0.15 if 0 < share < 1 else 1e-9)


def test_arms_of_unequal_budget_are_not_compared(smoke, monkeypatch, capsys):
    stored = experiment.read_runs(smoke[0])
    next(row for row in stored.values() if row["arm"] == "real + copies")["steps"] = 11
    monkeypatch.setattr(experiment, "read_runs", lambda out: stored)
    with pytest.raises(AssertionError, match="unequal budget"):
        experiment.main(Config(**QUICK, out=str(smoke[0])))


@pytest.mark.skipif(torch.cuda.is_available(), reason="equal to the bit on a CPU only")
def test_one_job_gives_the_same_results_as_two(smoke, tmp_path, capsys):
    (tmp_path / "drawn-scenes-30").symlink_to(smoke[0] / "drawn-scenes-30")
    arms = ["linear: real", "linear: synthetic only", "synthetic only"]
    experiment.main(Config(**QUICK, out=str(tmp_path), leg="scenes", arms=",".join(arms)))
    alone, two = ({r.pop("run"): r for r in results(out) if r.pop("seconds")} for out in (tmp_path, smoke[0]))
    assert sorted({row["arm"] for row in alone.values()}) == arms
    for name, row in alone.items():
        assert row == {column: two[name][column] for column in row}
        a, b = (json.loads((out / "runs" / f"{name}.json").read_text()) for out in (tmp_path, smoke[0]))
        assert a["answers"] == b["answers"]


def test_the_rows_are_the_scores_of_the_answers(smoke):
    scenes = data.read_xbd(smoke[0] / "drawn-buildings-64", 8, mask=True, cache=smoke[0] / "cache")
    test = scenes[data.split(scenes)["test"]]
    row = next(r for r in results(smoke[0]) if r["arm"] == "balanced")
    answers = np.array(experiment.read_runs(smoke[0])[row["run"]]["answers"])
    flood = np.array(["flood" in name for name in test.names])
    for mine, prefix in ((flood, "macro_f1 drawn-flood"), (flood | True, "macro_f1")):
        f1 = []
        for c in range(4):
            truth, called = test.labels.numpy()[mine] == c, answers[mine] == c
            if truth.any():
                f1.append(2 * (truth & called).sum() / (truth.sum() + called.sum()))
        assert float(row[prefix]) == pytest.approx(np.mean(f1))


def test_a_second_start_runs_nothing_and_says_the_same(smoke, capsys):
    out, printed, _ = smoke
    before = {p: p.stat().st_mtime_ns for p in [*out.rglob("*.pt"), *(out / "runs").iterdir()]}
    experiment.main(Config(**QUICK, out=str(out)))
    assert capsys.readouterr().out.split("\nDRAWN")[1:] == printed.split("\nDRAWN")[1:]
    assert before == {p: p.stat().st_mtime_ns for p in [*out.rglob("*.pt"), *(out / "runs").iterdir()]}


def test_a_lost_run_is_run_again_with_the_same_result(smoke):
    out, rows = smoke[0], results(smoke[0])
    (out / "results.csv").unlink()                                  # made of the runs, again and again
    for r in rows:
        if r["arm"] == "real + synthetic" and r["count"] == "8":
            (out / "runs" / f"{r['run']}.json").unlink()
    experiment.main(Config(**QUICK, out=str(out)))
    score = {r["run"]: r["macro_f1"] for r in rows}
    assert {r["run"]: r["macro_f1"] for r in results(out)} == score


def trees(out):
    """What the smoke run read: (scenes, parts, counts) of each leg."""
    scenes = data.read_folder(out / "drawn-scenes-30", 8, cache=out / "cache")
    buildings = data.read_xbd(out / "drawn-buildings-64", 8, mask=True, cache=out / "cache")
    return (scenes, data.split(scenes), (4, 8)), (buildings, data.split(buildings), (12,))


@pytest.mark.parametrize("leg, counts, words", [
    ("scenes", (1,), "1 real image per class"), ("scenes", (1, 4), "1 and 4 real images per class"),
    ("buildings", (1,), "1 training tile"), ("buildings", (0,), "all training tiles")])
def test_numbers_of_images_are_put_into_words(leg, counts, words):
    assert experiment.amount(SimpleNamespace(leg=LEGS[leg]), *counts) == words


def test_a_comparison_that_was_stopped_has_a_page_and_goes_on(smoke, tmp_path, monkeypatch, capsys):
    cfg = Config(**QUICK, data=str(smoke[0] / "drawn-scenes-30"), out=str(tmp_path), counts="4",
                 arms="real,real + augmentation")
    fit, calls = experiment.train_cls.fit, []

    def fit_thrice(real, synthetic, cfg, *args, **kw):
        if cfg.steps == 5 and calls.append(kw.get("title")) is None and len(calls) == 4:
            raise KeyboardInterrupt
        return fit(real, synthetic, cfg, *args, **kw)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(experiment.train_cls, "fit", fit_thrice)
        experiment.main(cfg)
    page = (tmp_path / "report.html").read_text()
    assert len(results(tmp_path)) == 2 and "No answer: no claim names these arms." in page
    assert "with a generator" not in page and "percentage points" not in page
    assert len(experiment.read_runs(tmp_path)) == 3
    experiment.main(cfg)
    assert len([r for r in results(tmp_path) if "resnet" not in r["arm"]]) == 4
    assert "1 classifiers of 5 steps" in capsys.readouterr().out


def test_generators_saw_the_training_images_of_their_arm_and_nothing_else(smoke):
    saved = [data.load_checkpoint(p, "generator") for p in (smoke[0] / "generators").glob("*.pt")]
    trained, expected = {tuple(sorted(generator["names"])) for generator in saved}, set()
    for scenes, parts, counts in trees(smoke[0]):
        for count in counts:
            for draw in (0, 1):
                real = scenes[data.choose(scenes, parts["train"], count, draw)]
                rare = experiment.rare(real) if scenes.tiles else range(8)
                names = zip(real.names, real.labels.tolist(), strict=True)
                expected.add(tuple(sorted(name for name, c in names if c in rare)))
                if scenes.tiles:
                    expected.add(tuple(sorted(real.names)))             # to simulate damage and its absence
        assert not {name for names in trained for name in names} & set(scenes[parts["test"]].names)
    assert trained == expected and len(trained) == 8


def test_without_git_the_commit_is_left_empty(monkeypatch):
    monkeypatch.setenv("PATH", "")
    experiment.commit.cache_clear()
    assert experiment.commit() == ""


def test_the_page_needs_nothing_but_itself(smoke):
    page = (smoke[0] / "report.html").read_text()
    assert "http" not in page and "<script" not in page and page.count("<h2>") == 3
    # per leg a grid and confusions, per count suspects, simulated damage; per leg the claims and all arms
    assert page.count("data:image/png;base64,") == page.count('<img alt="') == 8
    assert page.count("<svg") == 4 and page.count("<figcaption>") == 12
    assert re.search("python experiment.py --out [^ ]+ --smoke --size 8 --gen-steps 5 --cls-steps 5", page)
    for name in (*LEGS["scenes"].arms, *LEGS["buildings"].arms):
        name = html.escape(name) + " (8)" * (name in LEGS["scenes"].arms and name != "balanced")
        assert f"<td>{name}<td>" in page or f"<td>{name.removesuffix(' (8)')}<td>" in page


def test_sharing_a_subset_trains_one_generator_per_count_and_the_conditions_say_so(smoke, tmp_path, capsys):
    cfg = Config(**QUICK, data=str(smoke[0] / "drawn-scenes-30"), out=str(tmp_path), subsets=1, counts="4",
                 arms="real + synthetic")
    experiment.main(cfg)
    said = unwrapped(capsys.readouterr().out)
    assert "draws of training images: 1" in said and "not over other draws of" in said
    assert len(list((tmp_path / "generators").glob("*.pt"))) == 1
    assert len([r for r in results(tmp_path) if r["arm"] == "real + synthetic"]) == 2


def test_an_xbd_tree_is_compared_with_and_without_an_event_held_out(tmp_path, capsys):
    root = data.draw_xbd(tmp_path / "xbd", 32, side=160)
    flags = QUICK | dict(data=str(root), out=str(tmp_path / "x"), counts="12", seeds=1)
    experiment.main(Config(**flags, arms="real,balanced + copy-paste", label="type"))
    assert "always" in (said := capsys.readouterr().out) and "F1 flooding" in said
    held = dict(hold_out="drawn-wildfire", arms="balanced,balanced + synthetic")
    experiment.main(Config(**flags, **held))                        # so few images are judged by no distance
    said = capsys.readouterr().out
    assert "drawn-wildfire held out" in said and "macro-F1 in" not in said
    assert len([r for r in results(tmp_path / "x") if "resnet" not in r["arm"]]) == 4
    with pytest.raises(data.Problem, match="no such event"):
        experiment.main(Config(**flags, hold_out="joplin"))
    with pytest.raises(data.Problem, match="no image to train on is fire"):    # the only event of its type
        experiment.main(Config(**flags, **held, label="type"))


def test_a_dry_run_prints_the_plan_and_runs_nothing(smoke, tmp_path, capsys):
    root = smoke[0] / "drawn-buildings-64"
    experiment.main(Config(smoke=True, dry_run=True, data=str(root), out=str(tmp_path)))
    said = capsys.readouterr().out
    assert "4 generators of 10 steps" in said and "minutes on" in said and "MB" in said
    assert not (tmp_path / "results.csv").exists() and not (tmp_path / "generators").exists()


def test_studies_vary_the_mix_and_share_what_is_there(smoke, tmp_path, capsys):
    cfg = Config(**QUICK, data=str(smoke[0] / "drawn-scenes-30"), out=str(tmp_path), counts="4", seeds=1,
                 arms="real + synthetic", study="share,filter,soft")
    experiment.main(cfg)
    rows = results(tmp_path)
    said = capsys.readouterr().out
    # 1 + 4 + 3 + 2 arms, of which three are the same mix with augmentation
    assert len([r for r in rows if "resnet" not in r["arm"]]) == 1 + 4 + 2 + 1
    assert "share: 0.25" in said and "soft: True" in said
    page = (tmp_path / "report.html").read_text()
    assert "what share does" in page and "what filter does" in page
    assert len(list((tmp_path / "teachers").glob("*"))) == 1
    assert len(list((tmp_path / "generators").glob("*.pt"))) == 1


# ---- the pieces

def case_of(tmp_path, leg="scenes", **flags):
    """A case of the smallest kind, nothing run yet."""
    cfg = Config(smoke=True, out=str(tmp_path), leg=leg, jobs=1, **flags)
    return experiment.prepare(cfg, leg, tmp_path)


@pytest.fixture(scope="module")
def scenes_case(smoke):
    return case_of(smoke[0])


def case_by_hand(n, K):
    """A Case of n black images of K classes in turn, nothing run yet; K are val, and the last K test."""
    names = [f"c{c:02d}" for c in range(K)]
    scenes = data.Scenes(torch.zeros(n, 3, 8, 8, dtype=torch.uint8), torch.arange(n) % K, names,
                         [f"{k}.png" for k in range(n)], torch.arange(n))
    leg, cfg = LEGS["scenes"], Config(scale="smoke", leg="scenes")
    parts = torch.arange(n).split([n - 2 * K, K, K])
    parts = dict(zip(("train", "val", "test"), parts, strict=True))
    return experiment.Case("scenes", leg, leg.arms, cfg.resolved("scenes"), cfg, "", scenes, parts, None)


def test_a_source_that_nobody_knows_is_no_arm():
    with pytest.raises(AssertionError, match="unknown source noisy copies"):
        Arm(source="noisy copies")


def test_doubles_of_a_chosen_image_are_not_fresh():
    case = case_by_hand(40, 2)
    case.scenes.groups[:] = torch.arange(40) // 4                        # two of each class are doubles
    for draw in range(3):
        _, real, fresh = case.choose(3, draw)
        assert len(real) == 6 and len(fresh) > 8
        assert not set(real.groups.tolist()) & set(fresh.groups.tolist())


def test_w_0_is_a_guidance_scale_and_none_is_that_of_the_scale():
    cell = case_by_hand(40, 2).cell(4, 0)
    scales = [experiment.recipe(cell, Arm("generator", 0.5, w=w))["w"] for w in (None, 0.0, 3.0)]
    assert scales == [1.5, 0.0, 3.0]


def test_every_study_changes_what_a_run_is():
    cell = case_by_hand(40, 2).cell(4, 0)
    for name, leg in LEGS.items():
        plain = Config(leg=name, arms="all").wanted(leg)
        assert plain == leg.arms
        few = Config(leg=name, scale="small").wanted(leg)
        assert list(few) == list(experiment.SCALES[name]["small"].arms or leg.arms)
        for study, changes in (STUDIES | dict(controls=leg.controls)).items():
            cfg = Config(study=study, leg=name, arms="all", init=__file__ if study == "clip" else "")
            cell.case.cfg = cfg
            arms = {arm: how for arm, how in cfg.wanted(leg).items() if arm not in plain}
            lacking = {"augment": not leg.rare, "clip": leg.rare and len(changes)}.get(study, 0)
            assert len(arms) == len(changes) - lacking and all(arm.startswith(study) for arm in arms)
            assert len({experiment.run_id(cell, arm) for arm in arms.values()}) == len(arms)


def test_a_run_is_another_if_anything_that_decides_it_is():
    case = case_by_hand(40, 2)
    cell, arm = case.cell(4, 0), Arm("generator", 0.5)
    other = replace(case, s=replace(case.s, made=9))
    changes = dict(share=0.4, augment="hflip", balance=True, model="resnet", wide=2.0, pretrain=True,
                   shuffle=True, grey=True, w=3.0, calls=5, made=7, generator=1, keep=1.0, soft=True,
                   start=0.5, tune="head")
    case.cfg.init = __file__
    runs = [(case.cell(*where), arm) for where in ((4, 0), (4, 1), (8, 0))] + [(other.cell(4, 0), arm)]
    runs += [(cell, replace(arm, **{name: value})) for name, value in changes.items()]
    assert len({experiment.run_id(*run) for run in runs}) == len(runs)
    before = experiment.run_id(cell, arm)
    for part in ("val", "test"):                # the threshold is chosen on val, answers are those on test
        fewer = replace(case, parts=case.parts | {part: case.parts[part][1:]})
        assert experiment.run_id(fewer.cell(4, 0), arm) != before
    assert experiment.run_id(cell, Arm(w=3.0)) == experiment.run_id(cell, Arm())       # nothing is generated
    assert set(changes) | {"source"} == {f.name for f in fields(Arm)}


def test_the_grid_shows_every_class():
    scenes = case_by_hand(90, 45).scenes
    grid = experiment.side_by_side(scenes, scenes)
    assert grid.height == 45 * (8 + 2) * 8                             # 8 px and two lines, 8 times as large


def test_a_class_that_no_arm_ever_recognises_has_no_gain(monkeypatch):
    case = case_by_hand(40, 4)
    case.s.counts = (4,)
    arm, base, _ = case.leg.claims[0]
    scores = {base: (0.0, 0.5, 0.0, 0.2), arm: (0.0, 0.6, 0.3, 0.0)}
    for arm, f1 in scores.items():
        case.rows += [dict(arm=arm, count=4, seed=seed, **{f"f1 c{c:02d}": f1[c] for c in range(4)})
                      for seed in range(2)]
    monkeypatch.setattr(experiment, "difference", lambda *_: True)
    monkeypatch.setattr(experiment, "sampled", lambda case, arm, *_: np.array(scores[arm]))
    monkeypatch.setattr(experiment, "gain", lambda a, b, G: experiment.Gain(a - b, ((0.0, 1),)))
    _, rows = experiment.class_rows(case)
    assert sorted(rows) == [
        ["c00", "–", "–", "–"], ["c01", "50.0", "60.0", "+10.0 [+10.0, +10.0]"],
        ["c02", "–", "30.0", "+30.0 [+30.0, +30.0]"], ["c03", "20.0", "–", "-20.0 [-20.0, -20.0]"]]
    _, rows = experiment.detail_rows(case)
    assert [row[1:] for row in rows] == [["–", "50.0", "–", "20.0"], ["–", "60.0", "30.0", "–"]]


def test_a_source_gives_what_its_arm_says(scenes_case, smoke):
    case = replace(scenes_case, s=replace(scenes_case.s, made=3))
    cell = case.cell(4, 0)
    real, fresh = cell.real, cell.fresh
    assert not set(real.names) & set(fresh.names)
    train = {case.scenes.names[i] for i in case.parts["train"].tolist()}
    assert set(real.names) | set(fresh.names) == train
    for name, pool in (("copies", real), ("fresh", fresh)):
        got, soft = experiment.replacements(cell, Arm(name, 0.5))
        assert soft is None and set(got.names) <= set(pool.names)
        assert got.labels.bincount().tolist() == [4 if pool is real else 3] * 8           # all real, or made
    assert experiment.replacements(cell, Arm()) == (None, None)


def test_shuffled_labels_are_as_many_of_each_class_on_the_same_images_but_of_others(scenes_case):
    cell = scenes_case.cell(4, 0)
    plain, _ = experiment.replacements(cell, Arm("copies", 0.5))
    shuffled, _ = experiment.replacements(cell, Arm("copies", 0.5, shuffle=True))
    assert torch.equal(plain.images, shuffled.images) and plain.names == shuffled.names
    assert torch.equal(plain.labels.bincount(), shuffled.labels.bincount())
    assert (plain.labels == shuffled.labels).float().mean() < 0.4       # an eighth by chance
    assert torch.equal(plain.labels, experiment.replacements(cell, Arm("copies", 0.5))[0].labels)


def test_a_grey_surrounding_leaves_the_building_and_its_mask_as_they_were():
    images = torch.randint(256, (5, 4, 8, 8), dtype=torch.uint8, generator=data.rng(0))
    images[:, 3] = 255 * (images[:, 3] > 100)
    y, before = torch.arange(5), images.clone()
    plain = data.Scenes(images, y, list("abcde"), [""] * 5, y)
    grey = experiment.grey_outside(plain)
    inside = images[:, 3:] > 0
    assert torch.equal(plain.images, before) and torch.equal(grey.images[:, 3], images[:, 3])
    assert torch.equal(grey.images[:, :3] * inside, images[:, :3] * inside)
    assert (grey.images[:, :3][(~inside).expand(-1, 3, -1, -1)] == 128).all()


def test_a_greyed_arm_is_trained_and_tested_on_greyed_images(smoke, monkeypatch, tmp_path):
    cell = replace(case_of(smoke[0], "buildings"), out=tmp_path).cell(12, 0)
    seen, fit, outputs = [], experiment.train_cls.fit, experiment.train_cls.outputs
    monkeypatch.setattr(experiment.train_cls, "fit", lambda real, pool, *args, **kw: (
        seen.extend([real.images, pool.images]) or fit(real, pool, *args, **kw)))
    monkeypatch.setattr(experiment.train_cls, "outputs", lambda model, images, *args: (
        seen.append(images) or outputs(model, images, *args)))
    for grey in (False, True):
        seen.clear()
        arm = Arm("copies", 0.5, model="linear", grey=grey)
        experiment.score(cell, arm, "")
        assert len(seen) == 5                                   # real, copies, test, train again, val
        for images in seen:
            outside = images[:, :3][(images[:, 3:] == 0).expand(-1, 3, -1, -1)]
            assert (outside == 128).all().item() is grey


def test_the_shift_of_a_balanced_arm_is_chosen_on_val_and_not_on_test(smoke, monkeypatch):
    cell = case_of(smoke[0], "buildings").cell(12, 0)
    seen, put_back = [], experiment.train_cls.put_back
    monkeypatch.setattr(experiment.train_cls, "put_back", lambda logits, labels, counts: (
        seen.append(labels) or put_back(logits, labels, counts)))
    experiment.score(cell, Arm(balance=True, model="linear"), "")
    val, test = cell.case.val.labels, cell.case.test.labels
    assert len(seen) == 1 and torch.equal(seen[0], val) and not torch.equal(val, test)


def test_a_teacher_filters_and_teaches(scenes_case):
    cell = scenes_case.cell(4, 0)
    kept = [experiment.replacements(cell, Arm("fresh", 0.5, keep=k, soft=True)) for k in (0.0, 1.0, 8.0)]
    counts = [len(pool) for pool, _ in kept]
    assert counts[0] > counts[1] > counts[2] == 0
    for pool, soft in kept[:2]:
        assert soft.shape == (len(pool), 8) and torch.allclose(soft.sum(1), torch.ones(len(pool)))
    pool, soft = kept[1]
    assert (soft.gather(1, pool.labels[:, None]) > 1 / 8).all()


def test_each_choice_of_training_images_has_synthetic_images_of_its_own(scenes_case, monkeypatch, tmp_path):
    case, trained = replace(scenes_case, out=tmp_path, memory={}), []
    monkeypatch.setattr(experiment.train_gen, "train", lambda real, *args, **kw: (
        trained.append(real.digest) or real.images))
    monkeypatch.setattr(experiment.train_gen, "generate", lambda images, y, *args, **kw: (
        images[torch.zeros_like(y)]))
    cells = [case.cell(4, 0), case.cell(8, 0)]
    for cell in (*cells, *cells):
        synthetic = experiment.synthesize(cell, Arm("generator", 0.5))
        assert (synthetic.images == cell.real.images[0]).all()
    assert trained == [cell.real.digest for cell in cells]             # once each: then they are on the disk


def test_a_class_of_exactly_the_mean_is_not_rare():
    labels = torch.tensor([0] * 2 + [1] * 4 + [2] * 6)
    scenes = data.Scenes(torch.zeros(12, 3, 8, 8, dtype=torch.uint8), labels, ["a", "b", "c"],
                         [f"{k}.png" for k in range(12)], torch.arange(12))
    assert experiment.rare(scenes) == [0]


def test_rare_classes_are_those_below_the_mean_and_a_generator_makes_only_these(smoke):
    case = case_of(smoke[0], "buildings")
    cell = case.cell(12, 0)
    assert experiment.rare(cell.real) == [1, 2, 3]
    for name in ("copies", "fresh"):
        got, _ = experiment.replacements(cell, Arm(name, 0.5))
        assert set(got.labels.tolist()) == {0, 1, 2, 3}               # of rare ones only, elsewhere is damage
    assert experiment.recipe(cell, Arm("generator", 0.5))["classes"] == [1, 2, 3]


def test_damage_is_simulated_on_the_picture_from_before_and_the_building_stays(smoke, monkeypatch):
    """Of intact buildings of the training tiles, or with an event held out of all of that event."""
    for event in ("", "drawn-flood"):
        case = case_of(smoke[0], "buildings", hold_out=event)
        cell, arm = case.cell(12, 0), Arm("simulated", 0.5, balance=True)
        y = torch.arange(4).repeat_interleave(5)
        like = cell.like(arm, y)
        named = {name: k for k, name in enumerate(case.scenes.names)}
        origin = case.scenes[torch.tensor([named[name] for name in like.names])]
        assert (like.images[:, 3:] == origin.images[:, 3:]).all() and like.images.shape[1] == 7
        assert (like.images[:, :3] == 128).all() and (like.labels == -1).all()     # how it ended is not told
        if event:
            assert {data.event_of(name) for name in like.names} == {event}
        else:
            assert set(origin.labels.tolist()) == {0} and set(like.names) <= set(cell.real.names)
        told = {}
        monkeypatch.setattr(experiment.train_gen, "train", lambda real, cfg, *_, told=told, **kw: (
            told.update(real=real, given=cfg.given)))
        monkeypatch.setattr(experiment.train_gen, "generate", lambda _, y, *args, told=told, **kw: (
            told.update(like=args[3]) or torch.zeros(len(y), 3, 16, 16, dtype=torch.uint8)))
        case.out = smoke[0] / f"simulated-{event}"
        made = experiment.synthesize(cell, arm)
        assert told["given"] == "pre,mask" and set(told["real"].names) == set(cell.real.names)
        assert not {data.event_of(name) for name in told["real"].names} & {event}
        assert made.images.shape[1] == 4 and made.labels.unique().tolist() == [0, 1, 2, 3]
        assert (made.images[:, 3] == told["like"].images[:, 6]).all()              # the mask of before


def test_generated_masks_are_as_sharp_as_real_ones(smoke, monkeypatch, tmp_path):
    cell = replace(case_of(smoke[0], "buildings"), out=tmp_path).cell(12, 0)
    monkeypatch.setattr(experiment.train_gen, "train", lambda *_, **kw: None)
    monkeypatch.setattr(experiment.train_gen, "generate", lambda _, y, *args, **kw: (
        torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(len(y), 4, 16, 16).clone()))
    made = experiment.synthesize(cell, Arm("generator", 0.5)).images
    assert (made[:, 3].flatten(1) == 255 * (torch.arange(256) > 127)).all()
    assert (made[:, 0].flatten(1) == torch.arange(256)).all()                      # only the mask


def test_nothing_but_damage_can_be_simulated(smoke):
    for label, possible in (("damage", True), ("type", False)):
        cell = case_of(smoke[0], "buildings", label=label).cell(12, 0)
        assert cell.possible(Arm("simulated", 0.5)) is possible


def test_edited_images_start_from_real_ones_of_their_class(scenes_case, monkeypatch, tmp_path):
    cell, told = replace(scenes_case, out=tmp_path).cell(4, 0), {}
    monkeypatch.setattr(experiment.train_gen, "train", lambda *_, **kw: None)
    monkeypatch.setattr(experiment.train_gen, "generate", lambda _, y, *args, **kw: (
        told.update(y=y, like=args[3], start=args[4]) or torch.zeros(len(y), 3, 16, 16, dtype=torch.uint8)))
    experiment.synthesize(cell, Arm("generator", 0.5, start=0.3))
    assert told["start"] == 0.3 and (told["like"].labels == told["y"]).all()
    assert set(told["like"].names) == set(cell.real.names)                         # all of them, in turn
    assert cell.like(Arm("generator", 0.5), told["y"]) is None


def test_leaks_are_caught(smoke, scenes_case):
    cell = scenes_case.cell(4, 0)
    experiment.check_leaks(cell)
    for part in ("real", "fresh"):
        with pytest.raises(RuntimeError, match="in the test split"):
            experiment.check_leaks(replace(cell, **{part: scenes_case.test}))
    case = case_of(smoke[0], "buildings", hold_out="drawn-flood")
    cell = case.cell(12, 0)
    experiment.check_leaks(cell)
    smuggled = replace(cell.real, names=[case.test.names[0], *cell.real.names[1:]])
    with pytest.raises(RuntimeError, match="drawn-flood is to be held out"):
        experiment.check_leaks(replace(cell, real=smuggled))


def test_a_ceiling_takes_as_many_fresh_images_as_real_ones():
    case = case_by_hand(28, 2)                                           # 12 training images of each class
    for count, possible in ((4, True), (6, True), (7, False)):
        cell = case.cell(count, 0)
        assert cell.possible(Arm("fresh", 0.5)) is possible and cell.possible(Arm("copies", 0.5))


def test_the_conditions_say_that_there_is_no_ceiling(scenes_case):
    runs = experiment.runs(scenes_case, scenes_case.arms, (4, 8))
    fewer = [run for run in runs if "fresh" not in run.title or run.cell[1] == 4]
    for planned, said in ((runs, False), (fewer, True)):                   # whether or not they are done yet
        told = experiment.conditions(replace(scenes_case, runs=planned, rows=[]))
        assert ("No ceiling with 8 real images per class" in told) is ("No ceiling" in told) is said


def test_the_conditions_say_how_many_buildings_of_each_class_tiles_have_and_what_is_set_on_val(smoke):
    case = case_of(smoke[0], "buildings")
    case.runs = experiment.runs(case, case.arms, (12,))
    told = experiment.conditions(case)
    sizes = case.cell(12, 0).real.labels.bincount(minlength=4).tolist()
    listing = ", ".join(f"{n} {name}" for n, name in zip(sizes, data.DAMAGE, strict=True))
    assert f"12 training tiles (first draw: {listing})" in told and len({*sizes}) > 2
    assert "8 synthetic images per rarer class" in told and "fresh real images: at most 8 per class" in told
    assert f"weights are set on {len(case.val)} val images" in told


def test_a_class_without_synthetic_images_keeps_its_real_ones_at_share_1(smoke):
    case = case_of(smoke[0], "buildings")
    _, real, _ = case.choose(12, 0)
    rare = real[real.labels > 0]
    cfg = replace(case.s.cls, share=1.0, balance=True, batch=64)
    _, seen = experiment.train_cls.fit(real, rare, cfg)
    assert 0.6 < seen["synthetic"] / seen["images"] < 0.9


def test_a_generator_that_memorised_is_caught_and_one_that_did_not_is_not(scenes_case, tmp_path):
    """Copies that are turned and a little noisy, and fresh drawings in their place."""
    case = replace(scenes_case, out=tmp_path, parts=data.split(scenes_case.scenes))
    cell = case.cell(4, 0)
    real, fresh = cell.real, cell.fresh
    g = torch.Generator().manual_seed(0)
    noise = torch.randint(-8, 9, real.images.shape, generator=g)
    copied = replace(real, images=(real.images.rot90(1, (2, 3)).int() + noise).clamp(0, 255).to(torch.uint8))
    odd = torch.arange(len(fresh)) % 2 == 1
    for synthetic, answer in ((copied, "There are copies"), (fresh[~odd], "No sign of copies")):
        found = experiment.judge(replace(cell, fresh=fresh[odd]), synthetic)
        assert experiment.copying(found).startswith(answer) and Image.open(found["sheet"]).width > 16 * 16
        assert json.loads(json.dumps(found)) == found


def test_who_judges_and_what_is_compared_have_no_tile_in_common(smoke, monkeypatch, tmp_path):
    cell = replace(case_of(smoke[0], "buildings"), out=tmp_path).cell(12, 0)
    seen, alike, fit = [], experiment.alike, experiment.train_cls.fit
    monkeypatch.setattr(experiment, "alike", lambda *several: seen.append(several) or alike(*several))
    monkeypatch.setattr(experiment.train_cls, "fit", lambda teach, *args, **kw: (
        seen.append(teach) or fit(teach, *args, **kw)))
    assert experiment.judge(cell, cell.real)
    (a, b, _), teach, (_, held) = seen
    tiles = [{*some.groups.tolist()} for some in (teach, a, b, cell.real)]         # the last: the generator's
    assert len(set.union(*tiles)) == sum(map(len, tiles)) and min(map(len, tiles)) > 1
    assert {*held.groups.tolist()} == tiles[1] | tiles[2]


def test_the_floor_of_every_distance_is_measured_on_as_many_images_of_the_same_classes(scenes_case):
    s = scenes_case.scenes
    a, b = experiment.alike(s[s.labels < 5], s[torch.arange(0, len(s), 3)])
    assert a.labels.bincount().tolist() == b.labels.bincount().tolist()
    assert set(a.labels.tolist()) == {0, 1, 2, 3, 4}
    found = experiment.compare(lambda x: x.flatten(1)[:, :8], a, a, b)
    assert found["real frechet"] == pytest.approx(0, abs=1e-6) and found["synthetic frechet"] > 0.001


# ---- what can be said

def compared(out, rates, seeds=4, counts=(4,)):
    """A Case whose runs are done: rates are {arm: share of the test images told right}, exactly so per seed.

    A share may be a pair, for test and val, or a dict with one for each count.
    """
    parts = dict(zip(("train", "val", "test"), torch.arange(160).split([80, 40, 40]), strict=True))
    case = replace(case_by_hand(160, 4), parts=parts)
    case.out, case.s.counts, case.s.seeds = out, counts, seeds
    truth = case.test.labels.numpy()
    for k, (arm, rate) in enumerate(rates.items()):
        for count, each in (rate if isinstance(rate, dict) else dict.fromkeys(counts, rate)).items():
            right, val = each if isinstance(each, tuple) else (each, each)
            for seed in range(seeds):
                name = f"{arm} {count} {seed}"
                order = np.random.default_rng([k, count, seed]).permutation(40)
                answers = np.where(order < round(40 * right), truth, (truth + 1) % 4)
                case.rows.append(dict(run=name, arm=arm, count=count, seed=seed, accuracy=right, val=val,
                                      train=1.0, answers=answers.tolist(),
                                      **{f"f1 {c}": right for c in case.test.classes}))
    return case


def ask(what, case):
    """What is said of a case, given its claims."""
    return what(case, experiment.claims(case))


@pytest.mark.parametrize("base, arm, floor, seeds, word", [
    (0.3, 0.8, 0.5, 4, "help"), (0.8, 0.3, 0.5, 4, "hurt"), (0.6, 0.6, 0.5, 4, "none detected"),
    (0.5, 0.55, 0.5, 4, "none detected"),
    (0.3, 0.8, 0.9, 4, "no verdict"), (0.0, 0.2, 0.0, 4, "no verdict"),          # a quarter is the commonest
    (0.3, 0.8, 0.5, 2, "too few seeds"), (0.3, 0.8, 0.5, 3, "help")])
def test_a_verdict_takes_three_seeds_and_an_arm_above_the_floor(tmp_path, base, arm, floor, seeds, word):
    rates = {"real": base, "real + synthetic": arm, "linear: real": floor}
    claim, = experiment.claims(compared(tmp_path, rates, seeds))
    assert (claim.word, claim.arm, claim.base) == (word, "real + synthetic", "real")
    assert claim.gain.mean == pytest.approx(arm - base)


def test_the_ceiling_does_not_lift_a_recogniser_over_the_floor_and_the_floor_is_the_best_linear_arm(tmp_path):
    case = compared(tmp_path, {"real": 0.5, "real + fresh real": 0.9, "linear: real": 0.4,
                               "linear: real + synthetic": 0.6})
    assert experiment.standing(case, 4, "", "test") == ("real", 50)
    assert experiment.bar(case, 4) == pytest.approx(60) and not experiment.able(case, 4, "", "test")


def test_a_ceiling_above_the_floor_is_no_verdict_while_all_other_arms_are_below_it(tmp_path):
    rates = {"real + augmentation": 0.4, "real + fresh real": 0.75, "linear: real": 0.55}
    claim, = experiment.claims(compared(tmp_path, rates))
    assert claim.gain.p < 0.001 and claim.word == "no verdict"
    claim, = experiment.claims(compared(tmp_path, rates | {"linear: real": 0.35}))
    assert claim.word == "help"


def test_p_is_corrected_among_the_claims_on_synthetic_images_and_among_the_controls(tmp_path):
    rates = {"real": 0.4, "real + synthetic": 0.5, "real + augmentation": 0.5, "real + fresh real": 0.75,
             "real + copies": 0.6}
    alone, *controls = experiment.claims(compared(tmp_path, rates))
    assert alone.asks and alone.p == pytest.approx(alone.gain.p)
    small, large = sorted(controls, key=lambda claim: -claim.p)
    assert large.p == pytest.approx(2 * large.gain.p) and small.p == pytest.approx(small.gain.p)
    header, rows = ask(experiment.claim_rows, compared(tmp_path, rates))
    assert [row[2] for row in rows] == [experiment.points(claim.gain) for claim in (alone, *controls)]


def test_a_resnet_is_asked_only_where_the_vit_is_below_the_floor_on_val(tmp_path):
    case = compared(tmp_path, {"real": {4: (0.9, 0.2), 8: (0.1, 0.9)}, "linear: real": 0.5}, counts=(4, 8))
    tasks = experiment.second_opinion(case)
    claimed = {name for claim in case.leg.claims for name in claim[:2] if not name.startswith("clip: ")}
    assert {(task.cell[1:], task.title) for task in tasks} == {
        ((4, seed), f"resnet: {name}") for seed in range(4) for name in claimed}
    for task in tasks:
        name = task.title.removeprefix("resnet: ")
        assert task.arms == (replace(case.arms[name], model="resnet"),)
    assert experiment.second_opinion(replace(case, rows=[])) == []


RATES = {"real": 0.3, "real + synthetic": 0.2, "linear: real": 0.5,
         "resnet: real": 0.6, "resnet: real + synthetic": 0.9}


def test_the_verdict_then_follows_the_resnet_and_the_claim_of_the_vit_stands_beside_it(tmp_path):
    case = compared(tmp_path, RATES)
    _, rows = ask(experiment.claim_rows, case)
    assert [tuple(row[:2]) for row in rows] == [
        ("resnet: real + synthetic against resnet: real", "help"),
        ("real + synthetic against real", "(not followed)")]
    assert ask(experiment.answer, case) == (
        "The ViT stays below the linear floor, so the verdict is the ResNet's. With 4 real images per class, "
        "the best accuracy on test, but for fresh real images: the ViT 30.0 % (real), a small ResNet 90.0 % "
        "(real + synthetic), a linear classifier on colours and edges 50.0 % (real), always c00 25.0 %. "
        f"Synthetic images ({rows[0][2]}): help.")


def test_whose_verdict_counts_is_chosen_on_val_and_not_on_test(tmp_path):
    for vit, resnet, chosen in (((0.3, 0.6), 0.9, ""), ((0.9, 0.4), 0.6, "resnet: "), (0.3, (0.9, 0.4), "")):
        rates = RATES | {"real": vit, "resnet: real": resnet, "resnet: real + synthetic": (0.9, 0.1)}
        case = compared(tmp_path, rates)
        assert experiment.recogniser(case, 4) == chosen
        assert {claim.arm for claim in experiment.claims(case)} == {f"{chosen}real + synthetic"}
        assert ask(experiment.claim_rows, case)[1][-1][1] == "(not followed)"


def test_the_answer_begins_with_what_the_recognisers_can_do(tmp_path):
    strong = ask(experiment.answer, compared(tmp_path, RATES | {"real": 0.6}))
    assert ("With 4 real images per class, the best accuracy on test, but for fresh real images: the ViT "
            "60.0 % (real), a small") in strong
    assert not strong.startswith("With")                                 # the answer first, then its footing
    weak = ask(experiment.answer, compared(tmp_path, RATES | {"linear: real": 0.95}))
    assert weak.startswith("No network reaches what a linear classifier or the commonest class does")
    assert re.search(r"No verdict, as they are below the floor: synthetic images \(-10.0 \[.*\]\)\.$", weak)
    luck = ask(experiment.answer, compared(tmp_path, RATES | {"real": (0.3, 0.6)}))     # on val, not test
    assert luck.startswith("No network reaches")
    blocks = [*experiment.blocks(compared(tmp_path, RATES))]
    assert blocks[0].startswith("# ") and blocks[1].startswith("The ViT stays below")
    assert blocks[2][0].startswith("<svg")                           # then a picture that shows it


def test_the_answer_says_of_every_question_what_became_of_it(monkeypatch, scenes_case):
    words = {"+": "help", "-": "hurt", "0": "none detected", "?": "no verdict", "2": "too few seeds"}

    def said(signs, seeds=2):
        """The answer, but for its footing, if the verdicts on the claims are these, count by count."""
        found = [(count, *claim) for count in (4, 8) for claim in LEGS["scenes"].claims[:4]]
        both = [experiment.Claim(*claim, experiment.Gain(0.1, ()), True, word=words[sign])
                for claim, sign in zip(found, signs, strict=True)]
        monkeypatch.setattr(experiment, "footing", lambda case, count: ("", ""))
        rows = [dict(seed=seed) for seed in range(seeds)]
        text = experiment.answer(replace(scenes_case, rows=rows, judged=judged), both).strip()
        return text.replace(" (+10.0 [+10.0, +10.0], +10.0 [+10.0, +10.0])", "!")    # gains of two counts

    judged = {4: {}, 8: dict(copies=1, looked_at=8, copies_p=0.5)}
    assert said("++++++++") == "Synthetic images; fresh real images!; copies of the real images!: help."
    assert said("--+0--+0") == ("Fresh real images!: help. Synthetic images: hurt. "
                                "No difference detected with this many runs: copies of the real images!.")
    judged[8]["copies_p"] = 0.001
    assert said("++++++++").endswith(": help. 12.5 % of the synthetic images with 8 real images per class "
                                     "are near-copies of real ones.")
    judged = {}
    one, rest = said("+0000000").split(": help. ")
    assert one == ("Synthetic images (real + synthetic + augmentation against real + augmentation with 4 "
                   "real images per class)")
    assert rest.count("against") == 3 and rest.endswith("; fresh real images!; copies of the real images!.")
    assert said("??00??00").endswith("No verdict, as they are below the floor: synthetic images.")
    assert said("22222222", seeds=1).startswith("So far, with 1 of 2 seeds: Too few seeds to say")
    assert experiment.answer(scenes_case, []) == "No answer yet: it takes two seeds."


def worth(out, curve, mix, count=5):
    """What 5 real images with synthetic ones are worth, if the base scores `curve` at 5, 10 and 20."""
    rates = {"real + augmentation": dict(zip((5, 10, 20), curve, strict=False)),
             "real + synthetic + augmentation": {5: mix}}
    return experiment.worth(compared(out, rates, counts=(5, 10, 20)), count)


@pytest.mark.parametrize("curve, mix, expected", [
    ((0.3, 0.5, 0.7), 0.6, 10 * 2**0.5),                                 # half way, of their logarithms
    ((0.3, 0.5, 0.7), 0.35, 5 * 2**0.25), ((0.3, 0.5, 0.7), 0.5, 10),
    ((0.3, 0.5, 0.4), 0.45, 5 * 2**0.75), ((0.5, 0.3, 0.7), 0.4, 5),     # more images never hurt
    ((0.3, 0.5, 0.7), 0.95, 20), ((0.3, 0.5, 0.7), 0.1, 5)])             # the curve ends there
def test_images_are_worth_where_the_curve_reaches_their_score(tmp_path, curve, mix, expected):
    low, mean, high = worth(tmp_path, curve, mix)
    assert low <= mean <= high and 5 <= low and high <= 20
    assert mean == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("curve", [(0.5, 0.5, 0.5), (1.0, 1.0, 1.0)])
def test_where_more_images_bring_nothing_synthetic_ones_are_worth_nothing(tmp_path, curve):
    rates = {"real + augmentation": dict(zip((5, 10, 20), curve, strict=True))}
    case = compared(tmp_path, rates, counts=(5, 10, 20))
    case.rows += [row | dict(arm="real + synthetic + augmentation") for row in case.rows if row["count"] == 5]
    assert experiment.worth(case, 5)[1] == pytest.approx(5)            # the same answers: worth what they are


def test_what_images_are_worth_takes_a_curve(tmp_path):
    assert worth(tmp_path, (0.3, 0.5), 0.4) is None                      # at 20 the base was not run
    assert worth(tmp_path, (0.3, 0.5, 0.7), 0.4, count=10) is None       # at 10 the mix was not
    case = compared(tmp_path, {"real + augmentation": 0.5, "real + synthetic + augmentation": 0.6})
    assert experiment.worth(case, 4) is None and experiment.worths(case) == []
    line, = experiment.worths(compared(tmp_path, {"real + augmentation": {5: 0.3, 10: 0.5, 20: 0.7},
                                                  "real + synthetic + augmentation": {5: 0.6}},
                                       counts=(5, 10, 20)))
    assert line.startswith("5 real images per class with synthetic ones are worth 14 [")


# ---- what is said

def test_terminal_and_page_say_the_same_and_the_terminal_ends_with_the_answer(tmp_path, capsys):
    case = compared(tmp_path, RATES)
    case.rows = [row | dict(commit="", device="cpu") for row in case.rows]
    experiment.report([case], case.cfg, tmp_path)
    experiment.tell([case], tmp_path)
    page, printed = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    for block in experiment.blocks(case):
        if isinstance(block, str):
            assert html.escape(block.lstrip("# ")) in page
            assert unwrapped(block.lstrip("# ")).upper() in unwrapped(printed).upper()
        elif isinstance(block[1], list):
            cells = [cell for row in block[1] for cell in row]
            assert all(f"<td>{html.escape(cell)}" in page and cell in printed for cell in cells)
        else:
            assert html.escape(block[1]) in page and block[1] not in printed
    assert unwrapped(printed.split("The page")[0]).endswith(ask(experiment.answer, case))


def test_a_plot_puts_everything_where_its_value_is_and_its_axis_comes_from_what_is_shown():
    def gain(mean, half):
        return experiment.Gain(mean / 100, ((np.square(half / 100 / experiment.student(9)(0.975)), 9),))

    rows = {"a": {1: (gain(9, 13), [9.0, 11.0])}, "b": {1: (gain(3, 0), []), 2: (gain(5, 1), [5.0])}}
    svg = experiment.plot(rows, {1: "few", 2: "many"}, {"": 0, "floor <": 12}, -100)
    labels = re.findall(r'<text x="([0-9.]+)" [^>]*middle">(-?[0-9]+)', svg)
    ticks = {int(label): float(x) for x, label in labels}
    assert sorted(ticks) == [-5, 0, 5, 10, 15, 20, 25]                   # of -4 ... 22, not of 0 ... 100
    unit = (ticks[25] - ticks[0]) / 25

    def x(value):
        return pytest.approx(ticks[0] + unit * value, abs=0.06)

    spans = re.findall(r'<path d="M([0-9.]+) [0-9]+H([0-9.]+)"', svg)
    assert [tuple(map(float, span)) for span in spans] == [(x(-4), x(22)), (x(3), x(3)), (x(4), x(6))]
    means = re.findall(r'<path d="M([0-9.]+) [0-9]+v8"', svg)
    assert [float(mean) for mean in means] == [x(9), x(3), x(5)]
    assert [float(dot) for dot in re.findall(r'<circle cx="([0-9.]+)"', svg)] == [x(9), x(11), x(5)]
    marks = re.findall(r'<path d="M([0-9.]+) [0-9]+V[0-9]+" stroke-dasharray', svg)
    assert [float(mark) for mark in marks] == [x(0), x(12)] and "floor &lt;" in svg
    colours = re.findall(r'<g style="color: (.*?)"', svg)
    assert colours[0] == colours[1] != colours[2]                        # a colour for each of the legend
    svg = experiment.plot({"a": {1: (gain(9, 300), [])}}, {1: ""}, {}, 0)
    assert re.findall(r'middle">(-?[0-9]+)', svg) == ["0", "20", "40", "60", "80", "100", "120"]


def test_the_forest_shows_claims_and_linear_floor_with_the_gains_of_the_seeds(tmp_path, monkeypatch):
    case = compared(tmp_path, {"real": 0.4, "real + synthetic": 0.5, "real + augmentation": 0.5,
                               "real + fresh real": 0.75, "linear: real": 0.35})
    plotted = []
    monkeypatch.setattr(experiment, "plot", lambda rows, *more: plotted.extend([rows, *more]))
    experiment.forest(case, experiment.claims(case))
    rows, _, marks, least = plotted
    found = {name: (round(100 * g.mean, 6), np.round(dots, 6).tolist())
             for name, mine in rows.items() for g, dots in [mine[4]]}
    assert (marks, least) == ({"": 0}, -100) and found == {"synthetic images, against real": (10, [10] * 4),
                     "fresh real images, against real + augmentation": (25, [25] * 4),
                     "the linear floor, against real": (-5, [-5] * 4),
                     "the linear floor, against real + augmentation": (-15, [-15] * 4)}


def test_confusions_have_names_on_both_sides(tmp_path):
    case = compared(tmp_path, {"real + augmentation": 0.5, "real + synthetic + augmentation": 0.75})
    picture = np.array(experiment.confusions(case).convert("L"))
    left = 8 + 7 * 3                                                     # c00 ... c03, read from both sides
    cells = picture[left:, left:]
    assert cells.shape == (4 * 60, 9 * 60)
    assert all((part < 128).any() for part in (picture[left:, :left], picture[:left, left:left + 240],
                                               picture[:left, -240:]))
    middles = cells[30::60, 30::60]
    truth = case.test.labels.numpy()
    rows = [r for r in case.rows if r["arm"] == "real + augmentation"]
    share = np.mean([np.mean(np.array(r["answers"])[truth == 0] == 1) for r in rows])
    assert middles[0, 1] == pytest.approx(255 - 255 * share, abs=1) and (middles[:, 4] == 255).all()


# ---- tasks

def test_of_each_seed_generators_come_first_and_seeds_come_in_order(scenes_case):
    wanted = experiment.runs(scenes_case, scenes_case.arms, scenes_case.s.counts)
    tasks = experiment.whole([replace(scenes_case, runs=wanted)], {})
    need = sum(arm.source == "generator" for arm in scenes_case.arms.values())
    free = len(scenes_case.arms) - need
    assert len(wanted) == 4 * (need + free)                                          # 2 counts, 2 seeds
    assert [task.cell[2] for task in tasks] == sorted(task.cell[2] for task in tasks)
    for seed in (0, 1):
        kinds = [(task.kind == "make", bool(task.after)) for task in tasks if task.cell[2] == seed]
        looks = 2 * (seed == 0)
        assert kinds == ([(True, False)] * 2 + [(False, False)] * 2 * free
                         + [(False, True)] * (2 * need + looks))
    missing = {run.name: {} for run in wanted[1:]}
    assert experiment.whole([replace(scenes_case, runs=wanted[:1])], missing) == wanted[:1]


def test_arms_of_two_names_that_are_the_same_run_are_run_once(smoke):
    case = case_of(smoke[0], study="share,soft")
    wanted = experiment.runs(case, case.arms, (4,))
    tasks = [task for task in experiment.whole([replace(case, runs=wanted)], {}) if task.kind == "run"]
    arms = len(LEGS["scenes"].arms)
    assert len(wanted) == 2 * (arms + 6) and len(tasks) == 2 * (arms + 3)     # three of six are arms
    assert len({task.name for task in tasks}) == len(tasks)


def test_runs_of_different_seeds_are_not_compared(tmp_path):
    case = compared(tmp_path, {"real": 0.4, "real + synthetic": 0.6})
    assert experiment.difference(case, "real + synthetic", "real", 4)
    case.rows = [r for r in case.rows if (r["arm"], r["seed"]) not in (("real", 1), ("real + synthetic", 2))]
    assert experiment.difference(case, "real + synthetic", "real", 4) is None


def test_a_task_waits_for_its_generator_and_no_more_run_than_jobs(scenes_case, tmp_path, monkeypatch):
    case, events, lock = replace(scenes_case, out=tmp_path, rows=[], judged={}), [], threading.Lock()

    def work(task):
        with lock:
            events.append(("start", task))
        time.sleep(0.1 if task.kind == "make" else 0.001)
        with lock:
            events.append(("end", task))
        return dict(run=task.name, arm=task.title, accuracy=0.5)

    monkeypatch.setattr(experiment, "CASES", {case.name: case})
    monkeypatch.setattr(experiment, "work", work)
    monkeypatch.setattr(experiment, "report", lambda *_: None)
    case.runs, stored = experiment.runs(case, case.arms, case.s.counts), {}
    with ThreadPoolExecutor(8) as pool:
        experiment.run_all([case], stored, pool, 3)
    made = {task.name: k for k, (what, task) in enumerate(events) if what == "end" and task.kind == "make"}
    starts = {task: k for k, (what, task) in enumerate(events) if what == "start"}
    assert len(made) == 4 and all(made[task.after] < k for task, k in starts.items() if task.after)
    running = np.cumsum([1 if what == "start" else -1 for what, _ in events])
    assert running.max() == 3 and running[-1] == 0
    assert set(stored) == {run.name for run in case.runs} == {row["run"] for row in results(tmp_path)}
    assert len(case.rows) == len(case.runs)


def test_what_a_process_cannot_do_is_one_line(smoke, tmp_path, capsys):
    root, out = str(smoke[0] / "drawn-scenes-30"), str(tmp_path)
    flags = dict(data=root, counts="4", out=out, arms="real + synthetic")
    argv = ["--smoke", "--seeds=1", "--jobs=1", *(f"--{name}={value}" for name, value in flags.items())]
    case, = experiment.main(Config(smoke=True, seeds=1, **flags, dry_run=True))
    broken = tmp_path / "generators" / f"{experiment.generator_id(case.cell(4, 0), Arm('generator', 0.5))}.pt"
    broken.parent.mkdir()
    broken.write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit) as error:
        data.launch(experiment.main, Config, argv)
    err = capsys.readouterr().err
    assert error.value.code == 2 and f"{broken} is no checkpoint of ours" in err and err.count("\n") == 1
    assert "Traceback" not in err and not (tmp_path / "results.csv").exists()


# ---- flags

SCENES, BUILDINGS = ["--smoke", "--data", "drawn-scenes-30"], ["--smoke", "--data", "drawn-buildings-64"]


@pytest.mark.parametrize("argv, message", [
    (["--arms", "real,fake"], "unknown arm fake"), (["--seed", "3"], "--seed"),
    (["--leg", "scenes", "--counts", "ten"], "ten"), (["--counts", "3"], "of which --leg"),
    (["--study", "size"], "unknown study size"), (["--scale", "smoke,small"], "unknown scale smoke"),
    (["--smoke", "--subsets", "9"], "--subsets 9: at most one for each of the 2 seeds"),
    (["--leg", "scenes", "--counts=-3"], "--counts -3"), (["--seeds", "5", "--subsets", "2"], "--subsets 2"),
     (["--scale", "huge"], "unknown scale huge"),
    (["--data", "/nowhere"], "no folder /nowhere"), ([*SCENES, "--leg", "scenes"], "--leg scenes"),
    (["--smoke", "--size", "18"], "--size 18"), (["--label", "colour"], "unknown label colour"),
    ([*SCENES, "--arms", "balanced"], "--arms balanced: no arm for scenes"),
    ([*SCENES, "--arms", "real,balanced"], "--arms balanced: no arm for scenes"),
    (["--leg", "scenes", "--counts", "4,4,"], "'4,4,' is no list of integers"),
    ([*SCENES, "--study", "clip", "--init", "vit.pt"], "--init vit.pt has read no texts"),
    ([*SCENES, "--counts", "4,99"], "99 asked for"),
    ([*SCENES, "--hold-out", "flood"], "only an xBD tree has events"),
    ([*BUILDINGS, "--counts", "99"], "tiles to train on")])
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, smoke, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(smoke[0])
    if "--init" in argv:
        cfg = experiment.train_cls.Config(size=8, patch=4, dim=16, depth=1, heads=1, steps=1, batch=2)
        experiment.train_cls.fit(case_by_hand(4, 2).scenes, None, cfg, smoke[0] / "vit.pt")
    with pytest.raises(SystemExit) as error:
        data.launch(experiment.main, Config, [*argv, "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert error.value.code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "results.csv").exists() and not (tmp_path / "generators").exists()


def test_drawn_scenes_stay_small_and_data_on_a_gpu_are_compared_at_medium_scale(monkeypatch):
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        for leg, scales in experiment.SCALES.items():
            assert Config().resolved(leg) == scales["small"]
            assert Config(data="x").resolved(leg) == scales["medium" if gpu else "small"]


def test_flags_change_what_they_name_and_nothing_else():
    base = Config(scale="small").resolved("scenes")
    s = Config(scale="small", data="x", counts="5", seeds=7, subsets=7, made=9, w=3.0).resolved("scenes")
    assert s == replace(base, counts=(5,), seeds=7, subsets=7, made=9, w=3.0)
    assert Config(scale="small", w=0.0).resolved("scenes").w == 0 and base.w == 1.5
    assert Config(leg="buildings", counts="8,0,4,8").resolved("buildings").counts == (4, 8, 0)
    assert Config(study="counts").resolved("scenes").counts == (2, 4, 10, 20, 40)
    s = Config(scale="full", size=32, gen_steps=11, cls_steps=12).resolved("scenes")
    assert (s.gen.size, s.cls.size, s.cls.patch, s.gen.steps, s.cls.steps) == (32, 32, 4, 11, 12)
    patches = {size: Config(scale="small", size=size).resolved("scenes").cls.patch
               for size in range(8, 129, 8)}
    assert patches == {8: 2, 16: 2, 24: 4, 32: 4, 40: 8, 48: 8, 56: 8, 64: 8, 72: 8, 80: 16, 88: 8, 96: 16,
                       104: 8, 112: 16, 120: 8, 128: 16}              # powers of 2, as convolutions need them
    line = experiment.command(Config(data="my data", counts="5", w=3.0, dry_run=True))
    assert line == "python experiment.py --data 'my data' --dry-run --counts 5 --w 3.0"
    assert experiment.command(Config(w=0.0)) == "python experiment.py --w 0.0"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
