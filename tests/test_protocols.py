"""He et al.'s protocols: CLIP, zero-shot and tuned, without and with synthetic images."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data
import experiment
import train_cls
from experiment import LEGS, STUDIES, Arm, Config

SIDE = 16


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A caption set of grey and of red pictures, NWPU's layout, and a CLIP that has read it."""
    root, g = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    rows = {"ash": [], "brick": []}
    for k in range(120):
        name, part = ("ash", "brick")[k % 2], ("train", "train", "train", "val", "test")[k // 2 % 5]
        pixels = g.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        pixels[..., 0] = pixels[..., 0] // 4 + (192 if name == "brick" else 0)
        Image.fromarray(pixels).save(root / f"{name}_{k}.png")
        rows[name].append(dict(filename=f"{name}_{k}.png", split=part, raw=f"an aerial photo of {name} ."))
    (root / "dataset_nwpu.json").write_text(json.dumps(rows))
    scenes = data.read(root, SIDE, cache=root / "cache")
    cfg = train_cls.Config(size=SIDE, patch=4, dim=32, depth=1, heads=2, steps=60, batch=16, warmup=5,
                           lr=3e-3, augment="none")
    train_cls.fit_clip(scenes[data.split(scenes)["train"]], cfg, root / "clip.pt")
    return root


@pytest.fixture(scope="module")
def done(captioned, tmp_path_factory):
    """The study, small."""
    out = tmp_path_factory.mktemp("protocols")
    cfg = Config(data=str(captioned), init=str(captioned / "clip.pt"), smoke=True, study="clip", counts="4",
                 arms="linear: real", out=str(out), jobs=1, seeds=3, subsets=1)
    (case,) = experiment.main(cfg)
    return case


def test_zero_shot_is_what_the_names_of_the_classes_say(done):
    names = train_cls.network(replace(done.s.cls, init=done.cfg.init), done.scenes.classes, 3).eval()
    said = names(data.to_float(done.test.images)).argmax(1).tolist()
    rows = [row for row in done.rows if row["arm"] == "clip: zero-shot"]
    assert len(rows) == 3 and all(row["answers"] == said and row["steps"] == 0 for row in rows)
    assert rows[0]["accuracy"] > 0.8                                     # colours are easy


def test_all_arms_are_tuned_in_as_many_steps_and_their_towers_looked_at_each_image_once(done):
    arms = {f"clip: {name}": change for name, change in STUDIES["clip"].items()}
    rows = {row["arm"]: row for row in done.rows}
    assert set(arms) | {"linear: real"} == set(rows)
    assert {row["steps"] for name, row in rows.items() if arms.get(name, {}).get("tune") == "head"} == {
        done.s.cls.steps}
    kept = [data.load(path)["content"] for path in (done.out / "features").glob("*.pt")]
    assert all(features.shape[1] == 32 for features in kept)
    assert len(kept) == len({features.double().sum().item() for features in kept})


def test_the_table_has_he_et_als_columns(done):
    header, rows = experiment.protocol_rows(done)
    assert header[1:] == ["without", "with", "difference"]
    names = [row[0] for row in rows]
    assert {"zero-shot / synthetic only", "real / real + synthetic", "real / real + edited"} <= set(names)
    for _, without, those, gain in rows:
        assert float(gain.split()[0]) == pytest.approx(float(those) - float(without), abs=0.11)
    assert any("A recogniser that has read" in block for block in experiment.blocks(done)
               if isinstance(block, str))


def test_clip_keeps_what_it_recognises_and_teaches_half_of_what_it_says_at_temperature_2(done):
    cell = done.cell(4, 0)
    arm = done.arms["clip: synthetic only"]
    pool = experiment.synthesize(cell, arm)
    logits = experiment.tuned(done)(data.to_float(pool.images)).detach()
    sure = [z.softmax(0)[c].item() > 1 / 2 for z, c in zip(logits, pool.labels, strict=True)]
    kept, soft = experiment.replacements(cell, arm)
    assert 0 < len(kept) < len(pool) and kept.digest == pool[torch.tensor(sure)].digest
    expected = torch.eye(2)[kept.labels] / 2 + (logits[torch.tensor(sure)] / 2).softmax(1) / 2
    assert_close(soft, expected, rtol=0, atol=1e-5)


def test_the_answer_stands_on_clip_where_no_vit_was_run(done, monkeypatch):
    monkeypatch.setattr(experiment, "bar", lambda *_: 50.0)
    warning, summary = experiment.footing(done, 4)
    assert not warning and "CLIP" in summary and "the ViT" not in summary
    monkeypatch.setattr(experiment, "bar", lambda *_: 101.0)
    assert experiment.footing(done, 4)[0].startswith("No network reaches")


def test_other_weights_are_another_run(done, tmp_path, monkeypatch):
    cell, arm = done.cell(4, 0), done.arms["clip: real"]
    mine = experiment.run_id(cell, arm)
    monkeypatch.setattr(experiment, "weights", lambda path: "others")
    assert experiment.run_id(cell, arm) != mine
    assert experiment.run_id(cell, Arm()) == experiment.run_id(cell, replace(Arm(), tune=""))


@pytest.mark.parametrize("flags", [dict(study="clip"), dict(init="clip.pt")])
def test_the_study_and_its_weights_go_together(flags):
    with pytest.raises(ValueError, match="--study clip and --init"):
        Config(**flags)


def test_clip_is_for_scenes():
    with pytest.raises(data.Problem, match="knows no masks"):
        Config(study="clip", init="clip.pt", leg="buildings").legs()
    cfg = Config(study="clip", init="clip.pt")
    assert not [name for name in cfg.wanted(LEGS["buildings"]) if name.startswith("clip")]


def test_claims_of_clip_have_arms():
    leg = LEGS["scenes"]
    names = {f"clip: {name}" for name in STUDIES["clip"]}
    claimed = {name for claim in leg.claims for name in claim[:2] if name.startswith("clip: ")}
    assert claimed == names
