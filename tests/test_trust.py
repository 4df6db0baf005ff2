"""Killed, starved, cut off, fed garbage or mistyped: nothing is lost or run, and one line says what is wrong.

A few of each kind; all that we can think of are in garbage.py.
"""
import hashlib
import io
import json
import math
import os
import resource
import signal
import threading
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import bad
import numpy as np
import pytest
import torch
from PIL import Image

import augment
import data
import experiment
import train_cls
import train_gen
from data import Problem, Scenes, Settings, flag

CONFIGS = train_gen.Script, train_cls.Script, experiment.Config, data.Script, augment.Script


# ---- one way in for flags

@dataclass
class Flags(Settings):
    """For the tests of launch."""
    batch: int = flag(5, "a number", 1, 9)
    lr: float = flag(0.1, "a rate", 0)
    counts: tuple = flag((1, 2), "some numbers", 1, 4)
    w: float | None = flag(None, "a number, or none", 0, 3)
    out: str = flag("", "a folder", alone=True)


@pytest.mark.parametrize("argv, said", [
    ("--batch 0", "--batch 0: 1 to 9"), ("--batch 10", "--batch 10: 1 to 9"), ("--lr nan", "at least 0"),
    ("--lr=-1", "at least 0"), ("--counts 1,5", "1 to 4"), ("--w 4", "--w 4: 0 to 3"), ("--w nan", "0 to 3")])
def test_a_number_out_of_range_is_refused_before_anything_is_read(argv, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        data.launch(lambda cfg: pytest.fail("it ran"), Flags, argv.split())
    assert said in (err := capsys.readouterr().err) and err.count("\n") == 1


@pytest.mark.parametrize("wrong", [dict(batch=1.5), dict(batch=True), dict(batch="3"), dict(lr=None),
                                   dict(counts=5), dict(out=7)])
def test_a_value_of_another_type_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} .*not of type"):
        Flags(**wrong)


def test_every_number_says_its_range():
    for config in CONFIGS:
        for f in fields(config):
            assert isinstance(f.default, str | bool) or f.metadata["least"] > -math.inf, f.name


@pytest.mark.parametrize("config, kw", [
    (train_gen.Script, dict(classes="a")), (train_gen.Script, dict(count=2)), (train_gen.Script, dict(w=2.0)),
    (train_gen.Script, dict(sample="x", steps=5)), (train_gen.Script, dict(sample="x", rounds=2)),
    (train_gen.Script, dict(sample="x", data="t")), (train_cls.Script, dict(predict="x", steps=5)),
    (train_cls.Script, dict(predict="x", test=True)), (train_cls.Script, dict(model="linear", lr=1.0)),
    (train_cls.Script, dict(model="resnet", depth=2)), (train_cls.Script, dict(pretrain=True)),
    (data.Script, dict(xbd=True)), (experiment.Config, dict(smoke=True, scale="full"))])
def test_a_flag_without_effect_is_refused(config, kw):
    with pytest.raises(ValueError, match="has no effect with"):
        config(**kw)


@pytest.mark.parametrize("config, kw, said", [
    (train_gen.Script, dict(augment="hflip,cutmix"), "mixes classes"),
    (train_gen.Script, dict(augment="copypaste"), "mixes classes"),
    (train_cls.Script, dict(augment="copypaste"), "needs masks"),
    (train_cls.Script, dict(share=0.5), "belong together"), (data.Script, dict(download="moon"), "resisc45")])
def test_what_cannot_work_is_refused(config, kw, said):
    with pytest.raises(ValueError, match=said):
        config(**kw)


# ---- one way in for pictures

@pytest.mark.parametrize("name, write", [(name, write) for name, write in bad.pictures(flips=0)
                                         if "177" not in name])
def test_a_bad_picture_is_an_error_and_neither_hangs_nor_comes_out_black(tmp_path, name, write):
    write(tmp_path / "x.jpg")
    with pytest.raises(Exception) as error:
        data.decode(tmp_path / "x.jpg", 8)
    assert data.reason(error.value) and not data.decodes(tmp_path / "x.jpg")


def test_other_formats_are_not_opened_whatever_their_name(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "x.png", "PPM")
    with pytest.raises(OSError, match="cannot identify"):
        data.decode(tmp_path / "x.png", 8)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.new("RGB", (30, 40)).save(tmp_path / "x.png")
    monkeypatch.setattr(data, "MOST_PIXELS", 1199)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="30 x 40 pixels"):
        data.decode(tmp_path / "x.png", 8)


def test_of_large_pictures_one_is_decoded_at_a_time(tmp_path, monkeypatch):
    Image.new("RGB", (30, 40)).save(tmp_path / "x.png")
    monkeypatch.setattr(data, "LARGE", 1199)
    with data.opened(tmp_path / "x.png"):
        assert data.ONE_LARGE.locked()
    assert not data.ONE_LARGE.locked()


def test_pictures_stand_upright_and_hidden_colours_stay_hidden(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x112] = 6                                                      # taken with the camera on its side
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert (data.decode(tmp_path / "turned.png", 16) == np.rot90(pixels, -1).transpose(2, 0, 1)).all()
    clear = Image.fromarray(np.dstack([pixels, np.full((16, 16), 255, np.uint8)]))
    clear.paste((200, 100, 50, 0), (0, 0, 8, 16))
    clear.save(tmp_path / "clear.png")
    found = data.decode(tmp_path / "clear.png", 16)
    assert (found[..., :8] == 0).all() and (found[..., 8:] == pixels.transpose(2, 0, 1)[..., 8:]).all()


def test_12_bits_that_the_file_tells_are_scaled_to_8(tmp_path):
    deep = np.linspace(0, 4095, 256).astype(np.uint16).reshape(16, 16)
    packed = bytes(byte for a, b in deep.reshape(-1, 2).tolist()
                   for byte in (a >> 4, (a & 15) << 4 | b >> 8, b & 255))
    head = {256: 16, 257: 16, 258: 12, 259: 1, 262: 1, 273: 200, 277: 1, 278: 16, 279: len(packed)}
    entries = b"".join(k.to_bytes(2, "little") + (4).to_bytes(2, "little") + (1).to_bytes(4, "little")
                       + v.to_bytes(4, "little") for k, v in head.items())
    content = b"II*\0\x08\0\0\0" + len(head).to_bytes(2, "little") + entries + bytes(4)
    (tmp_path / "x.tif").write_bytes(content.ljust(200, b"\0") + packed)
    assert abs(data.decode(tmp_path / "x.tif", 16)[0] - deep / 4095 * 255).max() <= 0.5


def test_all_readers_use_the_one_opener(tmp_path, monkeypatch, launch):
    seen, opened = [], data.opened
    monkeypatch.setattr(data, "opened",
                        lambda path, **how: seen.append(Path(path).name) or opened(path, **how))
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    assert launch(augment, tmp_path / "a.png", "--out", tmp_path / "sheet.png").returncode == 0
    data.read_xbd(data.draw_xbd(tmp_path / "xbd", 5, side=96), 8, pre=True, cache=tmp_path / "cache")
    before, after = (sum(f"_{time}_" in name for name in seen) for time in ("pre", "post"))
    assert "a.png" in seen and before == after > 0


# ---- what is left out is said, and a wrong root refused

def tree(root, names=("forest/a.png", "forest/b.png", "river/c.png", "river/d.png")):
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * k, 9, 9)).save(root / name)
    return root


def test_what_is_not_read_is_counted_and_named(tmp_path, capsys):
    root = tree(tmp_path / "t")
    assert len(data.read_folder(root, 8, cache=tmp_path)) == 4 and capsys.readouterr().err == ""
    tree(root, ["river/deep/x.png", "top.png", "grid.png", ".hidden/x.png"])
    (root / "river/notes.txt").write_text("x")
    (root / "river/x.heic").write_bytes(b"x")
    assert len(data.read_folder(root, 8, cache=tmp_path)) == 4
    assert "4 files are not read" in (said := capsys.readouterr().err) and "river/deep/x.png" in said


def test_pictures_of_more_suffixes_are_read(tmp_path):
    root = tree(tmp_path / "t", ["a/x.webp", "a/y.jpe", "b/z.gif", "b/x.PNG"])
    Image.new("RGB", (9, 9)).save(root / "b/w.jfif", "JPEG")
    assert len(data.read_folder(root, 8, cache=tmp_path)) == 5


def test_a_split_of_xbd_an_own_output_and_odd_names_are_no_classes(tmp_path):
    xbd = data.draw_xbd(tmp_path / "xbd", 2, side=96)
    with pytest.raises(Problem, match="split of xBD"):
        data.read_folder(xbd / "train", 8, cache=tmp_path)
    root = tree(tmp_path / "t", ["forest/a.png", "river/c.png", "gen/samples.png"])
    (root / "gen/generator.pt").write_bytes(b"x")
    with pytest.raises(Problem, match="gen is the output of a run"):
        data.read_folder(root, 8, cache=tmp_path)
    root = tree(tmp_path / "u", ["forest/a.png", "\x1b[31m/c.png"])
    with pytest.raises(Problem, match=r"a class is named '\\x1b\[31m'"):
        data.read_folder(root, 8, cache=tmp_path)


def test_files_of_xbd_with_other_names_are_told(tmp_path, capsys):
    root = data.draw_xbd(tmp_path / "xbd", 4, side=96)
    data.find_tiles(root)
    assert capsys.readouterr().err == ""
    (root / "train").rename(root / "training")
    (root / "test/images").mkdir(parents=True)
    (root / "test/images/x.png").write_bytes(b"x")
    data.find_tiles(root)
    assert "files are not read" in (said := capsys.readouterr().err) and "splits are named train" in said


@pytest.mark.parametrize("change, said", [
    ({}, ""), ({"train": "\ufeffa.png\n\n c.png \n"}, ""),
    ({"val": None}, "resisc45-val.txt .*No such file"), ({"test": b"\xff\xfe"}, "resisc45-test.txt .*utf-8"),
    ({"val": "moon.png"}, "resisc45-val.txt .*names no picture")])
def test_official_lists_are_all_there_and_of_these_pictures(tmp_path, change, said):
    root = tree(tmp_path / "t")
    for part, text in (dict(train="a.png\nc.png", val="b.png", test="d.png") | change).items():
        if text is not None:
            (root / f"resisc45-{part}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    if not said:
        assert data.read_folder(root, 8, cache=tmp_path).official.tolist() == [0, 1, 0, 2]
        return
    with pytest.raises(Problem, match=said):
        data.read_folder(root, 8, cache=tmp_path)


def test_a_name_in_two_classes_makes_a_list_useless_and_other_names_are_told(tmp_path, capsys):
    root = tree(tmp_path / "t")
    for part, name in dict(train="a.png\nmoon.png", val="b.png", test="d.png").items():
        (root / f"resisc45-{part}.txt").write_text(name)
    data.read_folder(root, 8, cache=tmp_path)
    assert "1 pictures that are not there: moon.png" in capsys.readouterr().err
    tree(root, ["river/a.png"])
    with pytest.raises(Problem, match="several pictures by a.png"):
        data.read_folder(root, 8, cache=tmp_path)


@pytest.mark.parametrize("name, write", [*bad.labels('{"metadata": {}, "features": {"xy": []}}', edits=1)])
def test_a_bad_label_is_named(tmp_path, name, write):
    write(tmp_path / "x_post_disaster.json")
    with pytest.raises(Problem, match="x_post_disaster.json is not an xBD label .*again, or remove"):
        data.read_label(tmp_path / "x_post_disaster.json")


# ---- own files

def real(n=8, size=8):
    images = torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=data.rng(0))
    return Scenes(images, torch.arange(n) % 2, ["a", "b"], [str(k) for k in range(n)], torch.arange(n))


GEN = train_gen.Config(size=8, width=8, mults=(1, 2), blocks=1, steps=2, batch=2, warmup=1)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    path = tmp_path_factory.mktemp("gen") / "generator.pt"
    train_gen.train(real(), GEN, path)
    return path.read_bytes()


def test_a_bad_checkpoint_is_refused_in_a_line_and_nothing_in_it_runs(generator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, refused = tmp_path / "g.pt", set()
    few = [case for case in bad.checkpoints(generator, edits=1)
           if case[0] != "folder" and "large" not in case[0]]
    for name, write in [case for k, case in enumerate(few) if k < 15 or k % 6 == 0]:
        write(path)
        for use in (train_gen.load_generator, lambda path: train_gen.train(real(), GEN, path)):
            try:
                use(path)
            except Problem as problem:
                refused.add(name)
                assert str(path) in str(problem) and len(str(problem)) < 500, name
        assert not (tmp_path / "harmed").exists()
        if name.startswith("class"):
            with pytest.raises(Problem, match="no name of a folder"):
                train_gen.load_generator(path)
    assert len(refused) > 15 and {"code", "compressed", "empty", "half", "class '../../x'"} <= refused


def test_a_checkpoint_whose_moments_are_others_is_refused(generator, tmp_path):
    good = torch.load(io.BytesIO(generator), weights_only=True)
    wrong = {k: dict(v, exp_avg=torch.zeros(3)) for k, v in good["optimizer"]["state"].items()}
    torch.save(good | dict(optimizer=dict(good["optimizer"], state=wrong)), tmp_path / "g.pt")
    with pytest.raises(Problem, match="g.pt is broken, or of other code .*moments"):
        train_gen.train(real(), GEN, tmp_path / "g.pt")


def test_a_checkpoint_is_not_unpacked(generator, tmp_path, monkeypatch):
    (tmp_path / "x.pt").write_bytes(bad.repacked(generator))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match="compressed"):
        data.load(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(generator[:9000] + bytes([generator[9000] ^ 1]) + generator[9001:])
    with pytest.raises(ValueError, match="not what was written"):
        data.load(tmp_path / "x.pt")


def test_what_can_be_made_again_is_when_it_is_broken_or_of_something_else(tmp_path, capsys):
    path, made = tmp_path / "x.pt", []

    def make():
        made.append(1)
        return dict(a=[1, 2])

    for _ in range(2):
        assert data.kept(path, "one", make) == dict(a=[1, 2]) and len(made) == 1
    assert data.kept(path, "two", make) == dict(a=[1, 2]) and len(made) == 2
    for k, (_, write) in enumerate([*bad.damaged(path.read_bytes(), edits=0)][:5]):
        write(path)
        assert data.kept(path, "two", make) == dict(a=[1, 2]) and len(made) == 3 + k
    assert "is made again" in capsys.readouterr().err


@contextmanager
def watched_memory():
    """Yield a function that says how many bytes of memory, files apart, were needed at most since then."""
    def now():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])

    before, most, over = now(), [0], threading.Event()

    def watch():
        while not over.wait(0.002):
            most[0] = max(most[0], now() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: most[0]
    finally:
        over.set()
        watcher.join()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_images_that_do_not_fit_into_memory_lie_on_the_disk(tmp_path, monkeypatch):
    """63 MB of them, read, grouped, kept, read again from the cache, selected, joined and cut."""
    for k in range(80):
        data.save_picture(Image.new("RGB", (8, 8), (k, 0, 0)), tmp_path / "ab"[k % 2] / f"{k:02}.png")
    monkeypatch.setattr(data, "FILED", 10**7)
    with watched_memory() as needed:
        for _ in range(2):
            scenes = data.read_folder(tmp_path, 512, cache=tmp_path / "cache")
        half = scenes[torch.arange(40)]
        both, one = half + half, data.take(half.images, torch.tensor([0]), dim=1)
        assert needed() < 2.5e7 < 6e7 < scenes.images.nbytes
    assert torch.equal(both.images[40:], scenes.images[:40]) and torch.equal(one, scenes.images[:40, :1])


def test_a_run_that_was_edited_is_refused_and_named(tmp_path):
    row = dict(run="r", accuracy=0.5, answers=[1, 2])
    data.write(tmp_path / "runs/r.json", json.dumps(row | dict(check=experiment.digest(row))))
    assert experiment.read_runs(tmp_path) == {"r": row}
    whole = (tmp_path / "runs/r.json").read_text()
    (tmp_path / "runs/.vm-7.s.json").write_text(whole[:20])              # of a process that was killed
    assert experiment.read_runs(tmp_path) == {"r": row}
    for wrong in (whole.replace("0.5", "0.9"), whole[:20], "", "[]", whole.replace("1", "3"), whole[:-9]):
        (tmp_path / "runs/r.json").write_text(wrong)
        with pytest.raises(Problem, match="r.json is not as it was written .*remove it"):
            experiment.read_runs(tmp_path)


# ---- one way out

def test_stale_files_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    data.sweep.cache_clear()
    dead = next(pid for pid in range(300_000, 400_000) if not Path(f"/proc/{pid}").exists())
    for pid in (dead, os.getppid()):
        (tmp_path / f".{data.HOST}-{pid}.x.pt").write_text("half")
    (tmp_path / f".elsewhere-{dead}.x.pt").write_text("half")
    data.write(tmp_path / "y.txt", "é")
    assert {p.name for p in tmp_path.iterdir()} == {
        "y.txt", f".{data.HOST}-{os.getppid()}.x.pt", f".elsewhere-{dead}.x.pt"}
    assert (tmp_path / "y.txt").read_bytes() == "é".encode()


@contextmanager
def full_disk():
    """Files cannot be longer than 3,000 bytes: in this block alone, as pytest's own log may be longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[0][1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])


def test_on_a_full_disk_the_old_file_stays_and_the_error_names_it(tmp_path):
    noise = Image.effect_noise((100, 100), 50)
    for name, save in {"x.pt": lambda path: data.save(path, torch.zeros(9999)),
                       "x.jpg": lambda path: data.save_picture(noise, path),
                       "x.png": lambda path: data.save_picture(noise, path),
                       "x.csv": lambda path: data.save_csv(path, ["a"], [["x" * 9999]])}.items():
        (tmp_path / name).write_text("old")
        with pytest.raises(OSError) as error, full_disk():
            save(tmp_path / name)
        assert error.value.filename == str(tmp_path / name) and "too large" in error.value.strerror
        assert (tmp_path / name).read_text() == "old"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("name", ["dataset.json", "resisc45-train.txt"])
def test_a_pipe_in_the_place_of_a_text_is_not_waited_for(tmp_path, name):
    for k in range(2):
        (tmp_path / f"t/{k}").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / f"t/{k}/a.png")
    os.mkfifo(tmp_path / "t" / name)
    with pytest.raises(Problem, match=f"{name} .*no regular file"):
        data.read(tmp_path / "t", 8, cache=tmp_path / "c")


def test_an_empty_name_is_no_folder(launch):
    told = launch(train_gen, "--data", "nothing", "--out", "")
    assert told.returncode == 2 and "--out is empty" in told.stderr and told.stderr.count("\n") == 1


def test_a_folder_is_held_by_one_run(tmp_path, launch):
    with data.alone(tmp_path / "x"), pytest.raises(Problem, match="another run writes to"), \
            data.alone(tmp_path / "x"):
        pass
    assert not (tmp_path / "x").exists()                                 # empty, so it was a mistake
    with data.alone(tmp_path / "x"):
        (tmp_path / "x/y").write_text("done")
        told = launch(train_gen, "--data", "nothing", "--out", tmp_path / "x")
        assert told.returncode == 2 and "another run writes to" in told.stderr
    assert (tmp_path / "x/y").exists()


@pytest.mark.parametrize("config, flag", [(train_gen.Script, "out"), (train_cls.Script, "out"),
                                          (experiment.Config, "out")])
def test_the_scripts_hold_their_folders(config, flag):
    assert next(f for f in fields(config) if f.name == flag).metadata["alone"]


def ends(*errors):
    """A main() that ends so."""
    def main(_):
        for error in errors:
            if isinstance(error, int):
                os.kill(os.getpid(), error)
            else:
                raise error
    return main


@pytest.mark.parametrize("error, code, said", [
    (Problem("no\nsuch \x1b[31mthing"), 2, "no\\nsuch \\x1b[31mthing"),
    (OSError(28, "No space left on device", "runs/x.pt"), 2, "runs/x.pt: No space left on device; when"),
    (KeyboardInterrupt(), 130, "stopped; the same command"), (signal.SIGTERM, 143, "stopped; the same"),
    (MemoryError(), 2, "out of memory: lower --batch"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory: lower --batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory: lower --batch")])
def test_every_ending_is_one_line(error, code, said, capsys, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        data.launch(ends(error), Flags, ["--out", str(tmp_path / "x")])
    assert stop.value.code == code and said in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) == before and not (tmp_path / "x").exists()


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="ours"):
        data.launch(ends(RuntimeError("ours")), Flags, ["--out", "."])


def test_a_terminal_without_a_letter_replaces_it(tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", stream)
    data.launch(lambda _: print("± é"), data.Script, [])
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xb1 \\xe9\n"


# ---- endings of training

@pytest.mark.parametrize("train", [
    lambda path: train_gen.train(real(), replace(GEN, lr=1e30, steps=10**6), path, every=10**6),
    lambda path: train_cls.fit(real(), None, train_cls.Config(
        size=8, patch=4, dim=16, depth=1, heads=1, steps=10**6, batch=4, lr=1e30, augment="none"), path,
        every=10**6)])
def test_a_loss_that_is_not_finite_ends_within_50_steps(tmp_path, train):
    with pytest.raises(Problem, match=r"the loss is \S+ at step 50, at a rate of .*: lower --lr"):
        train(tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    """The loss of a step is finite before the step that spoils the weights."""
    cfg = train_cls.Config(size=8, patch=4, dim=16, depth=1, heads=1, steps=1, batch=4, lr=1e38, warmup=0)
    for train in (lambda path: train_cls.fit(real(), None, cfg, path),
                  lambda path: train_gen.train(real(), replace(GEN, lr=1e38, steps=1, warmup=0), path)):
        with pytest.raises(Problem, match="weights are not finite at step 1: lower --lr"):
            train(tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_the_grid_is_there_before_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "save_checkpoint", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train_gen.train(real(), GEN, tmp_path / "g.pt", look=1)
    assert {p.name for p in tmp_path.iterdir()} == {"samples-000002.png", "g.csv"}


def test_a_script_says_first_what_it_takes_on_a_cpu_and_what_takes_less(capsys, monkeypatch):
    monkeypatch.setattr(data, "pick_device", lambda: torch.device("cpu"))
    asked, cfg, clock = [], replace(GEN, steps=600, batch=64), [0]
    monkeypatch.setattr(data, "perf_counter", lambda: clock[0])

    def run(cfg):
        asked.append((cfg.batch, cfg.steps))
        clock[0] += 2 + cfg.steps                                        # a second for a step of 4 images
        train_gen.train(real(), cfg)

    data.forecast(run, cfg, "--less")
    assert asked == [(4, 1), (4, 1), (4, 1), (4, 6)]
    said = capsys.readouterr().out
    assert "600 steps of 64 images on cpu: at most some 160 minutes and 0.0 GB. For a CPU: --less" in said
    data.forecast(None, replace(GEN, steps=50), "")                      # it would take as long to find out
    assert capsys.readouterr().out == "50 steps of 2 images on cpu\n"


@pytest.mark.parametrize("script", [train_gen, train_cls])
def test_what_is_proposed_for_a_cpu_is_possible(script, tmp_path):
    cfg = data.launch(lambda cfg: cfg, script.Script, [*script.SMALL.split(), "--out", str(tmp_path / "x")])
    assert cfg.size == 32 and cfg.steps > 1000


def test_in_a_log_progress_is_a_line_per_minute(monkeypatch, capsys):
    bar = data.progress(range(3), "training")
    assert (bar.delay, bar.mininterval) == (60, 60) and bar.bar_format.endswith("\n") and not bar.disable
    assert list(bar) == [0, 1, 2] and capsys.readouterr().err == ""


def test_synthetic_images_may_be_of_one_class(tmp_path):
    data.draw_tree(tmp_path / "t", 5, size=16)
    cfg = train_cls.Script(synthetic=str(tree(tmp_path / "s", ["river/a.png"])), share=0.5, size=16, patch=4)
    found = train_cls.read_synthetic(cfg, sorted(data.SCENES))
    assert found.labels.tolist() == [sorted(data.SCENES).index("river")]


def test_a_generator_that_was_always_told_is_not_asked_to_guess(tmp_path, launch):
    train_gen.train(real(), replace(GEN, drop=0.0), tmp_path / "g.pt", look=1)
    sample = ["--sample", tmp_path / "g.pt", "--count", 1, "--calls", 1, "--out", tmp_path / "made"]
    for flags in ([], ["--w", 0], ["--w", 1, "--classes", "any"]):
        told = launch(train_gen, *sample, *flags)
        assert told.returncode == 2 and "was trained with --drop 0" in told.stderr
    assert launch(train_gen, *sample, "--w", 1).returncode == 0


# ---- downloads


def archive(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, content in members.items():
            made.writestr(name, content)
    return file.getvalue()


@pytest.fixture
def server(monkeypatch):
    """Serve files {name: bytes}; mood(number of the request, bytes) -> what is sent, its length."""
    say = SimpleNamespace(files={}, mood=lambda k, part: (part, len(part)), ranges=True, asked=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content, start = say.files[self.path[1:]], self.headers.get("Range")
            say.asked.append(start)
            start = int(start[6:-1]) if start and say.ranges else 0
            if start and start >= len(content):
                self.send_error(416)
                return
            part, length = say.mood(len(say.asked), content[start:])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        say.set = archive(**{"set/forest/a.txt": b"a" * 3000, "set/river/b.txt": b"b" * 3000})
        say.files = {"set.zip": say.set, "list.txt": b"a.txt\n"}
        sums = {name: hashlib.md5(content).hexdigest() for name, content in say.files.items()}
        monkeypatch.setitem(data.DOWNLOADS, "resisc45", (f"http://127.0.0.1:{http.server_port}", {
            "set.zip": sums["set.zip"], "set/list.txt": sums["list.txt"]}))
        yield say
        http.shutdown()


def fetch(launch, folder):
    return launch(data, folder, "--download", "resisc45")


def test_a_data_set_is_fetched_checked_and_unpacked_and_not_twice(server, tmp_path, launch):
    done = fetch(launch, tmp_path)
    assert done.returncode == 0 and "right checksums" in done.stdout
    there = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert there == ["set/forest/a.txt", "set/list.txt", "set/river/b.txt"] and len(server.asked) == 2
    assert fetch(launch, tmp_path).returncode == 0 and len(server.asked) == 2


@pytest.mark.parametrize("ranges", [True, False])
def test_what_was_cut_off_goes_on_where_it_was(server, tmp_path, launch, ranges):
    server.ranges, half = ranges, len(server.set) // 2
    server.mood = lambda k, part: (part[:half] if k == 1 else part, len(part))
    assert fetch(launch, tmp_path).returncode == 0
    assert server.asked == [None, f"bytes={half}-", None] and (tmp_path / "set/list.txt").exists()


def test_a_download_that_never_comes_whole_is_one_line_and_keeps_what_came(server, tmp_path, launch):
    server.mood = lambda k, part: (part[:9], len(part))
    told = fetch(launch, tmp_path)
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and "goes on where it was" in told.stderr
    assert (tmp_path / "set.zip.part").read_bytes() == server.set[:54] and not (tmp_path / "set").exists()
    server.mood = lambda k, part: (part, len(part))
    assert fetch(launch, tmp_path).returncode == 0 and server.asked[6] == "bytes=54-"


@pytest.mark.parametrize("mood", [
    lambda k, part: (part[::-1], len(part)),                             # another file
    lambda k, part: (b"<html>not here</html>", 21),
    lambda k, part: (part, len(part) // 2)])                             # a lie, too short
def test_another_file_is_refused_and_not_used(server, tmp_path, launch, mood):
    server.mood = mood
    told = fetch(launch, tmp_path)
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and "is not the file" in told.stderr
    assert not list(tmp_path.rglob("*")) and len(server.asked) == 1


def test_a_lie_that_is_too_long_does_not_matter(server, tmp_path, launch):
    server.mood = lambda k, part: (part, len(part) + 99)
    assert fetch(launch, tmp_path).returncode == 0


def test_an_archive_cannot_leave_its_folder(server, tmp_path, launch, monkeypatch):
    evil = archive(**{"set/a.txt": b"a", "../../evil.txt": b"x", "/evil.txt": b"x"})
    server.files["set.zip"] = evil
    address, files = data.DOWNLOADS["resisc45"]
    files["set.zip"] = hashlib.md5(evil).hexdigest()
    assert fetch(launch, tmp_path / "deep/er").returncode == 0
    there = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert there == ["deep/er/set/a.txt", "deep/er/set/list.txt"]


def test_no_server_is_one_line(tmp_path, launch, monkeypatch):
    monkeypatch.setitem(data.DOWNLOADS, "resisc45", ("http://127.0.0.1:9", {"x.zip": "0"}))
    told = fetch(launch, tmp_path)
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and "refused" in told.stderr
