"""What a user gets wrong is one line and exit code 2. Nothing is lost, nothing in a file is run."""
import errno
import os
import resource
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import pictures

import augment
import data
import experiment
import train_cls
import train_gen
from data import UserError

SCRIPTS = {module.__name__: module for module in (augment, data, train_gen, train_cls, experiment)}
GEN = train_gen.Config(size=16, width=8, mults=(1, 2), blocks=1, steps=2, batch=2, warmup=1)
CLS = train_cls.Config(size=16, patch=8, dim=16, depth=1, heads=1, steps=2, batch=4)
SMALL = {"GEN": "--data good --size 16 --width 8 --mults 1,2 --blocks 1 --batch 2 --warmup 1",
         "CLS": "--data good --size 16 --patch 8 --dim 16 --depth 1 --heads 1 --batch 4",
         "SMOKE": "--scale smoke --counts 2"}

# A script, its flags, and what the line must name.
CASES = """
data | --data none | none
data | --data good/forest | good/forest
data | --data deep | deep/Images?
data | --data few | too few
data | --data broken | broken/forest/3.png
data | --data sixteen | sixteen/forest/3.png
data | --data json | json/dataset.json
data | --data gone | gone/dataset.json
data | --data xbd-wkt | drawn-flood_00000001_post_disaster.json
data | --data xbd-size | drawn-flood_00000001_post_disaster.png
data | --data xbd-holes | xbd-holes
data | --data good --size 0 | --size 0
data | --data good --sizes 16 | --sizes
data | --dat good | --dat
data | good | good
data | --data good --out good/x.png | good/x.png
data | --data good --out x.pdf | x.pdf
data | --data good --out note/x.png | note
data | --data good --out x.txt | x.txt
train_gen | --lr nan | --lr nan
train_gen | --batch 1e3 | --batch
train_gen | --width 12 | divisible by 8
train_gen | --size 20 | --size 20
train_gen | --schedule cubic | --schedule cubic
train_gen | --augment hflip,zoom | zoom
train_gen | --augment cutmix | cutmix mixes classes
train_gen | --augment hflip,,crop | unknown augmentation ''; known: hflip, vflip
train_gen | --size 10 --mults 1,2 --condition lowres | lowres
train_gen | --condition edgs | known are pre, mask, lowres
train_gen | GEN --condition pre,mask | pre, mask
train_gen | GEN --steps 3 --out done | done/generator.pt
train_gen | GEN --steps 2 --out done | another images, classes:
train_gen | GEN --steps 2 --out parts | parts/generator.pt cannot be read (KeyError: 'ema')
train_gen | GEN --lr 1e30 --steps 9 --out x | --lr
train_gen | --sample none.pt | none.pt
train_gen | --sample cut.pt | cut.pt cannot be read
train_gen | --sample bomb.pt | bomb.pt
train_gen | --sample parts/generator.pt | parts/generator.pt
train_gen | --sample later.pt | later.pt
train_gen | --sample cls/classifier.pt | cls/classifier.pt
train_gen | --sample gen.pt --classes forest,moon | knows no moon: give forest, river
train_gen | --sample gen.pt --sampling-steps 2000 | --sampling-steps 2000
train_gen | --sample gen.pt --reference good | is not needed
train_gen | --sample gen.pt --strength 0.5 | --reference
train_gen | --sample gen.pt --inpaint none.png --reference good/forest/1.png | none.png
train_gen | --sample gen.pt --out made | made
train_gen | --sample sure.pt --guidance 2 | sure.pt
train_gen | --sample evil.pt | ../x
train_gen | --sample pre.pt | --reference
train_gen | --sample pre.pt --reference good | needs an xBD tree
train_gen | --sample metadata.pt --reference good | needs an xBD tree
train_gen | --sample text.pt --prompts xyzzy | --prompts
train_cls | --share 0.5 | need each other
train_cls | --patch 5 | patches of 5
train_cls | --augment copypaste | needs masks
train_cls | --augment blur | unknown augmentation 'blur'
train_cls | --synthetic good | need each other
train_cls | --share 2 --synthetic good | --share 2
train_cls | --tune some | all, head, none
train_cls | --model mlp | cnn
train_cls | --learn clip --augment cutmix | goes without
train_cls | --learn clip --model linear | goes without
train_cls | --learn clip --init x | goes without
train_cls | CLS --learn clip | caption set
train_cls | CLS --share 0.5 --synthetic foreign | good lacks: moon
train_cls | CLS --steps 3 --out cls | cls/classifier.pt is of a run with another steps:
train_cls | CLS --steps 2 --out shape | shape/classifier.pt cannot be read (RuntimeError
train_cls | CLS --steps 2 --out wrong | wrong/classifier.pt is no checkpoint of a classifier
train_cls | CLS --lr 1e30 --steps 9 --out x | --lr
train_cls | --data good --init none.pt | none.pt
train_cls | --data good --init gen.pt | gen.pt
train_cls | --data good --init cls/classifier.pt --tune none | is not a CLIP
train_cls | --predict good --out x | x/classifier.pt
train_cls | --predict good --out wrong | wrong/classifier.pt
experiment | --dry-run --arms real,moon | --arms moon
experiment | --dry-run --study moon | --study moon: known are share
experiment | --dry-run --scale huge | --scale huge
experiment | --dry-run --counts 4 | needs --task
experiment | --dry-run --counts=-1 --task scenes | -1
experiment | --dry-run --size 20 | --size 20
experiment | --dry-run --data good --task scenes | --data
experiment | --dry-run --init gen.pt --task buildings | --init is not for buildings
experiment | SMOKE --data none | none
experiment | SMOKE --data good --counts 99 | 99 asked
experiment | SMOKE --data good --arms balanced | none is of
experiment | SMOKE --data good --hold-out flood | no such event
experiment | SMOKE --data xbd --hold-out moon | moon
experiment | SMOKE --data good --init cls/classifier.pt | has no text encoder
experiment | SMOKE --data good --out exp | exp/scenes/2/seed0/real.json
train_cls | CLS --data one --steps 2 --out one-class | one
experiment | SMOKE --data one --dry-run | one
experiment | --counts 4,x --task scenes | --counts
"""


def cases():
    for line in CASES.strip().splitlines():
        script, flags, place = (column.strip() for column in line.split("|"))
        for short, long in SMALL.items():
            flags = flags.replace(short, long)
        yield pytest.param(SCRIPTS[script], shlex.split(flags), place, id=line)


class Bomb:
    def __reduce__(self):
        """Run a command where a pickle of this is read."""
        return os.system, ("touch harmed",)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """All that the cases name: good data and weights, and such in which one thing is bad."""
    w = tmp_path_factory.mktemp("world")
    pictures(w, *[f"good/{name}/{k}.png" for name in ("forest", "river") for k in range(10)])
    pictures(w, *[f"one/forest/{k}.png" for k in range(20)], "few/forest/1.png", "few/river/2.png")
    pictures(w, "deep/Images/forest/1.png", "made/forest/1.png", "foreign/moon/1.png")
    for folder in ("json", "gone", "wrong", "exp/scenes/2/seed0"):
        (w / folder).mkdir(parents=True)
    for name in ("broken", "sixteen"):
        shutil.copytree(w / "good", w / name)
    Image.fromarray(np.full((16, 16), 2000, np.uint16)).save(w / "sixteen/forest/3.png")
    data.draw_xbd(w / "xbd", 4, side=96)
    for name in ("wkt", "size", "holes"):
        shutil.copytree(w / "xbd", w / f"xbd-{name}")
    label = "train/labels/drawn-flood_00000001_post_disaster.json"
    text = (w / "xbd" / label).read_text().replace("POLYGON", "CIRCLE")
    contents = {"note": "x", "broken/forest/3.png": "x", "json/dataset.json": '{"images": [',
                f"xbd-wkt/{label}": text, "exp/scenes/2/seed0/real.json": '{"accuracy":',
                "gone/dataset.json": '{"annotations": [{"filename": "2.png", "text_output": "x"}]}'}
    for name, text in contents.items():
        (w / name).write_text(text)
    picture = label.replace("labels", "images").replace("json", "png")
    Image.new("RGB", (50, 50)).save(w / "xbd-size" / picture)
    for path in w.glob("xbd-holes/train/labels/*"):
        path.unlink()
    real = data.read(w / "good", 16, cache=w / "cache")
    said = replace(real, captions=[("a river",)] * len(real))
    twice = replace(real, images=torch.cat([real.images] * 2, 1))
    measured = replace(real, metadata=real.labels[:, None].float())
    evil = replace(real, classes=["../x", "river"])
    train = real[data.choose(real, data.split(real)["train"], 0, 0)]
    for name, scenes, change in (
            ("gen", real, {}), ("parts/generator", train, {}), ("done/generator", evil, {}),
            ("evil", evil, {}),
            ("sure", real, dict(drop=0.0)), ("pre", twice, dict(condition="pre")),
            ("text", said, dict(condition="text")),
            ("metadata", measured, dict(condition="metadata"))):
        train_gen.train(scenes, replace(GEN, **change), w / f"{name}.pt")
    train_cls.fit(train, None, CLS, w / "cls/classifier.pt")
    good, content = data.load(w / "gen.pt"), (w / "gen.pt").read_bytes()
    (w / "wrong/classifier.pt").write_bytes(content)
    (w / "cut.pt").write_bytes(content[:9999])
    torch.save(good | dict(more=Bomb()), w / "bomb.pt")
    torch.save(good | dict(config=good["config"] | dict(colour=3)), w / "later.pt")
    parts = data.load(w / "parts/generator.pt")
    del parts["ema"]
    data.save(w / "parts/generator.pt", parts)
    model = dict(model={"head.bias": torch.zeros(9)})
    data.save(w / "shape/classifier.pt", data.load(w / "cls/classifier.pt") | model)
    return w


def files(folder):
    """Describe all files, but for the whole ones in a cache."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")
            if path.is_file() and (path.parent.name != "cache" or path.name.startswith("."))}


@pytest.mark.parametrize("script, argv, place", [*cases()])
def test_a_mistake_is_one_line_naming_its_place(script, argv, place, world, launch, monkeypatch):
    monkeypatch.chdir(world)
    before = files(world)
    done = launch(script, *argv)
    assert done.returncode == 2 and place in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert files(world) == before                                # and nothing was executed


@pytest.mark.parametrize("error, code, place", [
    (UserError("no\nsuch thing"), 2, "no such thing"), (MemoryError(), 2, "out of memory"),
    (OSError(errno.ENOSPC, "No space left on device", "runs/x.pt"), 2, "runs/x.pt"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 2, "out of memory"),
    (KeyboardInterrupt(), 130, "stopped"), (signal.SIGTERM, 130, "stopped"),
    (RuntimeError("a mistake of ours"), None, "")])
def test_every_ending_is_one_line_but_a_mistake_of_ours(error, code, place, capsys):
    def main(_):
        if error is signal.SIGTERM:
            signal.raise_signal(error)
        raise error

    with pytest.raises(SystemExit if code else RuntimeError) as end:
        data.launch(main, data.Settings, [])
    line = capsys.readouterr().err
    assert getattr(end.value, "code", None) == code
    assert place in line and line.count("\n") == (code is not None)


def test_a_bad_cache_is_made_again_and_nothing_in_it_is_executed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, calls = tmp_path / "deep/x.pt", []

    def make():
        calls.append(1)
        return dict(a=torch.arange(3), b=["x"])

    torch.save(Bomb(), tmp_path / "bomb.pt")
    bomb = (tmp_path / "bomb.pt").read_bytes()
    for content, count in ((None, 1), (None, 1), (b"", 2), (b"junk" * 99, 3), (bomb, 4)):
        if content is not None:
            path.write_bytes(content)
        found = data.cached(path, make)
        assert found["a"].tolist() == [0, 1, 2] and found["b"] == ["x"] and len(calls) == count
    assert capsys.readouterr().err.count(str(path)) == 3 and not Path("harmed").exists()


def test_an_error_and_a_kill_leave_the_old_file_as_it_was(tmp_path):
    def write_half(end, argument):
        with data.atomic(path) as temporary:
            temporary.write_text("half")
            end(argument)

    path = tmp_path / "x.txt"
    data.write(path, "old é\udce4")                             # not UTF-8: from a file name
    with pytest.raises(ValueError):
        write_half(int, "no number")
    assert [*tmp_path.iterdir()] == [path]                       # no half of it either
    if (child := os.fork()) == 0:
        try:
            write_half(signal.raise_signal, signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.read_bytes() == "old é?".encode()


@pytest.mark.parametrize("name, save", [
    ("x.csv", lambda path: data.save_csv(path, ["a"], [["x" * 9999]])),
    ("x.png", lambda path: data.save_picture(Image.effect_noise((99, 99), 50), path)),
    ("x.pt", lambda path: data.save(path, torch.zeros(9999)))])
def test_on_a_full_disk_the_old_file_stays_and_one_line_names_it(tmp_path, capsys, name, save):
    (tmp_path / name).write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))  # no file can be longer
    try:
        with pytest.raises(SystemExit, match="2"):
            data.launch(lambda _: save(tmp_path / name), data.Settings, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / name).read_text() == "old" and len([*tmp_path.iterdir()]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and name in line, line
