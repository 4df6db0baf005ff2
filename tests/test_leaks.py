"""Nothing that is tested was trained on, whichever way it came in; no guess is silent."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import house, karpathy, pictures, tile

import data
import experiment
import train_cls
import train_gen

SIDES = dict(png=64, jpg=64, tif=40, bmp=150)            # of pictures, by their encodings
CLS = train_cls, "--size 16 --patch 8 --dim 16 --depth 1 --heads 1 --steps 2 --batch 4 --data"
GEN, PLAN = (train_gen, "--data"), (experiment, "--scale smoke --counts 2 --dry-run --data")


def plant(root, layout, part="train", codes=("png",), numbers=range(40), shift=0):
    """Write pictures of noise as class folders, a caption set or tiles of xBD."""
    for k in numbers:
        label, code = data.DAMAGE[k % 4], codes[k % len(codes)]
        side, path = SIDES[code], Path(root, part, label, f"{part}-{code}_{k:08d}.{code}")
        if layout == "captions":
            data.write(f"{root}/txtclasses-{path.stem}/{label}.txt", path.name)
        if layout == "tiles":
            box = side / 4 * np.r_[1, 1, 3, 3] - shift
            tile(Path(root), path.stem, [house(label, box)], part, side)
            path = Path(root, part, f"images/{path.stem}_post_disaster.png")
        noise = np.random.default_rng(k).integers(60, 200, (8, 8, 3), np.uint8)
        if part == "test":                               # turned and mirrored, in all eight ways
            noise = np.rot90(noise, k // 4)
            noise = noise[:, ::-1] if k > 16 else noise
        data.save_picture(Image.fromarray(noise).resize((side, side)), path, quality=70)
    if layout == "captions":
        entries = [(path.name, path.parts[1], "x") for path in Path(root).glob("*/*/*.*")]
        data.write(f"{root}/dataset.json", json.dumps(karpathy(*entries)))


@pytest.fixture
def run(launch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda script, *flags: launch(script, *" ".join(flags).split())


@pytest.mark.parametrize("layout, other, learn, weights, said", [
    ("folders", "captions", "clip", "a/clip.pt", "40 pictures of other, classified by c/"),
    ("captions", "tiles", "classes", "a/classifier.pt", "c/classifier.pt classifies whole"),
    ("tiles", "folders", "classes", "a/classifier.pt", "c/classifier.pt classifies crops of")])
def test_no_picture_is_trained_on_and_tested(layout, other, learn, weights, said, run, monkeypatch):
    plant("real", layout)
    plant("copy", layout, codes=[*SIDES])
    plant("other", other, codes=["jpg"])
    plant("new", "folders", numbers=range(40, 80))
    done = run(*CLS, "real --synthetic copy --share .5 --model linear --test --out c")
    assert "left out 16 of 40 pictures of copy, " in done.stderr and done.stderr.count(", ") == 3
    scores = [float(text[:5]) for text in done.stdout.split("accuracy ")[1:]]
    assert len(scores) == 2 and sum(scores) < 1          # by chance 0.25 each
    assert said in str(run(train_cls, "--predict other --out c"))
    for flags in (f"other --learn {learn} --out a", f"new --init {weights} --out b"):
        assert run(*CLS, flags).returncode == 0
    for path in (weights, "b/classifier.pt"):            # b: trained from a, on new pictures
        for script in (CLS, PLAN)[:1 + (layout != "tiles")]:
            assert f"{path} was trained on" in run(*script, "real --init", path).stderr
    assert run(*CLS, "real --init c/classifier.pt").returncode == 0
    plant("real", layout, "test", [*SIDES, "png"], range(3, 40, 4))
    for script in (CLS, GEN, PLAN):                  # duplicates of all that train has of a class
        assert "no image to train on is destroyed" in run(*script, "real").stderr
    found = data.read("real", 20, cache="k")
    places = [name.split("_")[1][:8] for name in found.names]
    pairs = set(zip(places, found.groups.tolist(), strict=True))
    assert len(pairs) == len(found.groups.unique()) == 40 == len(found) - 10
    monkeypatch.setattr(data, "__file__", __file__)      # other code reads anew; no folder, too
    assert data.read("real", 20, cache=__file__).digest == data.read("real", 20, cache="k").digest
    assert len([*Path("k").iterdir()]) == 2


def test_what_a_generator_has_seen_follows_its_images(run):
    plant("real", "folders")
    plant("new", "folders", numbers=range(40, 80))
    small = "--size 16 --width 8 --mults 1,2 --blocks 1 --steps 1 --batch 2 --out"
    sample = "--count 1 --out"
    for data_set, out in (("new", "g"), ("real", "h")):
        assert run(*GEN, data_set, small, out).returncode == 0
    start = "--sample g/generator.pt --reference real/train/destroyed --strength .1"
    assert run(train_gen, start, sample, "a").returncode == 0        # shows it test pictures
    for which in ("h/generator.pt --classes destroyed", "g/generator.pt --classes no-damage"):
        assert run(train_gen, "--sample", which, sample, "b").returncode == 0
    start = start.replace("real/train", "a")                         # and to another, second hand
    assert run(train_gen, start, sample, "e").returncode == 0
    os.mkdir("m")
    os.symlink("../a", "m/train")                                    # or as a part of the real set
    plant("m", "folders", "val", numbers=range(20))
    plant("m", "folders", "test", numbers=range(20, 40))
    for script in (CLS, PLAN):
        assert "a generator in m was trained on 10 of" in run(*script, "m").stderr
    for folder in ("destroyed", "major-damage"):             # the real set changes its split
        for path in sorted(Path("real/train", folder).iterdir())[:5]:
            path.unlink()
    for name in "abe":
        refused = run(*CLS, f"real --synthetic {name} --share 1").stderr
        assert f"the generator of {name} was trained on" in refused
    assert run(*CLS, "new --synthetic b --share 1 --out c").returncode == 0
    assert "c/classifier.pt was trained on" in run(*CLS, "real --init c/classifier.pt").stderr
    train_gen.train(data.read("b", 8, cache="k"), train_gen.Config(8, 8, (1,), 1, steps=1), "k.pt")
    h, k = ({*map(tuple, data.load(path)["seen"].tolist())} for path in ("h/generator.pt", "k.pt"))
    assert h < k


def test_crops_of_a_tested_tile_are_its_crops_wherever_they_are_cut(run):
    plant("real", "tiles")
    plant("moved", "tiles", shift=6)
    done = run(*CLS, "real --synthetic moved --share .5")
    assert "left out 16 of 40 pictures of moved, " in done.stderr
    plant("fewer", "tiles", numbers=range(8, 40), shift=6)           # so its parts are others
    assert run(*CLS, "fewer --out c").returncode == 0
    refused = run(*CLS, "real --init c/classifier.pt --out d").stderr
    assert "c/classifier.pt was trained on" in refused


@pytest.mark.parametrize("folders, text", [
    ("Train/a Train/b Test/a", "12 train, 4 val, 8 test"), ("images masks", "t/masks is no class"),
    ("train/a validation/a", "6 train, 2 val, 8 test"), ("a run", "t/run is no class"),
    ("TRAINING/a Valid/a testing/a", "8 train, 8 val, 8 test"),
    ("train/a train/b c", "9 not in a class folder or list: c/0"), ("images gt", "gt is no class"),
    ("train/a holdout/a", "9 not in a class folder or list: holdout/"), ("A label", "is no class"),
    ("a b c/c", "9 not in a class folder or list: c/c/0"), ("images targets", "is no class"),
    ("Train/a Train/Masks", "t/Train/Masks is no class"),
    ("train test", "no folders with pictures")])
def test_parts_of_a_set_and_own_output_are_no_classes(folders, text, run):
    pictures(Path("t"), *[f"{folder}/{k}.png" for folder in folders.split() for k in range(8)])
    data.write("t/run/classifier.pt", "")
    data.write("t/test.txt" if "rain" in folders else "t/note.txt", "x")     # folders beat lists
    assert text in str(run(data, "--data t --size 8"))


def test_a_mask_must_be_white_somewhere_and_a_run_outlasts_its_reader(run):
    for colour, text in (((255, 255, 255, 0), "is transparent"), ("black", "is black")):
        Image.new("RGBA", (9, 9), colour).save("m.png")
        with pytest.raises(data.UserError, match=text):
            train_gen.read_mask("m.png", 8)
    reader, writer = os.pipe()
    os.close(reader)
    for stream in (open(writer, "w"), None):
        print("more\nand more", file=data.Lasting(stream), flush=True)
