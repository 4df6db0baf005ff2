"""data.py: every picture read right, splits that do not leak, files whole or not at all, mistakes told."""
import os
import runpy
import sys
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data
import experiment
import train_cls
import train_gen
from data import Problem, Scenes, flag


def tree(root, classes=("forest", "river"), count=6, size=20):
    """Random pictures in class folders."""
    g = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for k in range(count):
            pixels = g.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name}_{k}.png")
    return root


def scenes(groups, labels):
    n = len(labels)
    return Scenes(torch.zeros(n, 3, 2, 2, dtype=torch.uint8), torch.tensor(labels), ["a", "b"],
                  [f"x/{i}.jpg" for i in range(n)], torch.tensor(groups))


# ---- numbers

def test_all_256_values_survive_the_way_to_float_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(values)
    assert x[0] == -1 and x[255] == 1
    assert_close(data.to_uint8(x), values)
    assert_close(data.to_uint8(x + 0.9 / 255), values)                   # less than half a level is nothing
    assert_close(data.to_uint8(x - 0.9 / 255), values)


def test_values_out_of_range_are_cut_off_not_wrapped():
    assert data.to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine():
    lr = [data.lr_at(step, 110, 2.0, 10) for step in range(110)]
    assert lr[:10] == pytest.approx([0.2 * k for k in range(1, 11)])
    assert lr[60] == pytest.approx(1.0) and lr[109] < 1e-3
    assert lr == sorted(lr[:10]) + sorted(lr[10:], reverse=True)


def test_randomness_by_name_is_repeatable_and_every_part_of_the_name_counts():
    names = (0, 1), (0, 1), (1, 0), (0, 2), (0, 1, 0), (2**32, 1)
    draws = [torch.rand(1, generator=data.rng(*name)).item() for name in names]
    assert draws[0] == draws[1] and len(set(draws)) == 5


# ---- reading

def test_every_kind_of_picture_becomes_rgb(tmp_path):
    ramp = np.linspace(0, 255, 16, dtype=np.uint8).repeat(16).reshape(16, 16)
    grey, deep = Image.fromarray(ramp), Image.fromarray(ramp.astype(np.uint16) * 257)
    pictures = {"grey.png": grey, "palette.png": grey.convert("P"), "alpha.png": grey.convert("LA"),
                "rgb.tif": grey.convert("RGB"), "deep.png": deep, "deep.tif": deep}
    expected = torch.tensor(ramp).expand(3, 16, 16)
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        assert_close(torch.tensor(data.decode(tmp_path / name, 16)), expected, rtol=0, atol=1)


def test_16_bits_are_rounded_to_8(tmp_path):
    deep = np.arange(0, 65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    off = data.decode(tmp_path / "deep.png", 256).astype(float) - deep / 257
    assert abs(off).max() <= 0.5 and abs(off.mean()) < 0.001             # grey levels


def test_the_central_square_is_kept_and_reduced_without_aliasing(tmp_path):
    wide = np.zeros((32, 64, 3), dtype=np.uint8)
    wide[:, 16:48] = (np.indices((32, 32)).sum(0) % 2 * 255)[..., None]  # a checkerboard with black margins
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert abs(data.decode(tmp_path / "wide.png", 8).astype(int)[:, 2:-2, 2:-2] - 127).max() < 6


@pytest.mark.parametrize("size", [32, 64, 100])              # of 256
def test_decoding_a_jpeg_at_reduced_scale_loses_nothing_to_speak_of(tmp_path, size):
    scene = data.draw_scene("dense_residential", np.random.default_rng(0), 256)[0]
    data.save_picture(scene, tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as whole:
        slow = np.asarray(whole.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)).astype(float)
    fast = data.decode(tmp_path / "x.jpg", size).transpose(1, 2, 0)
    assert np.sqrt(((fast - slow) ** 2).mean()) < 2.5                    # grey levels


def test_read_folder_gives_sorted_classes_names_and_right_labels(tmp_path):
    s = data.read_folder(tree(tmp_path / "t", ("river", "beach", "forest")), 20, cache=tmp_path / "cache")
    assert s.classes == ["beach", "forest", "river"] and len(s) == 18
    assert all(s.classes[label] == name.split("/")[0] for label, name in zip(s.labels, s.names, strict=True))
    assert_close(data.picture(s.images[7]).tobytes(), Image.open(tmp_path / "t" / s.names[7]).tobytes())


def test_a_mask_is_saved_as_opacity_and_leaves_the_picture_as_it_is(tmp_path):
    image = torch.randint(256, (4, 8, 8), dtype=torch.uint8, generator=data.rng(0))
    data.save_picture(data.picture(image), tmp_path / "a.png")
    assert (torch.from_numpy(data.decode(tmp_path / "a.png", 8)) == image[:3]).all()
    with Image.open(tmp_path / "a.png") as pil:
        assert (torch.from_numpy(np.array(pil.getchannel("A"))) == image[3]).all()


def test_the_cache_is_used_and_a_stale_one_noticed(tmp_path, monkeypatch, capsys):
    root, cache = tree(tmp_path / "t"), tmp_path / "cache"
    first = data.read_folder(root, 8, cache=cache)
    monkeypatch.setattr(data, "decode", lambda *_: pytest.fail("decoded again"))
    again = data.read_folder(root, 8, cache=cache)
    assert_close(again.images, first.images)
    assert again.names == first.names and capsys.readouterr().err == ""
    monkeypatch.undo()
    Image.new("RGB", (20, 20), "white").save(root / "river" / "river_3.png")
    assert "changed" not in capsys.readouterr().err
    third = data.read_folder(root, 8, cache=cache)
    assert (third.images[third.names.index("river/river_3.png")] == 255).all()
    assert "changed" in capsys.readouterr().err


def test_a_broken_picture_is_counted_and_named_and_skipped_only_if_asked(tmp_path, capsys):
    root = tree(tmp_path / "t")
    (root / "river" / "river_2.png").write_bytes(b"no picture")
    with pytest.raises(Problem, match=r"1 of 12 .*river_2\.png.*--skip-broken"):
        data.read_folder(root, 8, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))
    s = data.read_folder(root, 8, skip_broken=True, cache=tmp_path / "cache")
    assert len(s) == 11 and "river/river_2.png" not in s.names and "river_2" in capsys.readouterr().err
    for path in (root / "river").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(Problem, match="fewer than 2 classes"):
        data.read_folder(root, 8, skip_broken=True, cache=tmp_path / "cache")


@pytest.mark.parametrize("make, message", [
    (lambda p: p / "none", "no folder"),
    (lambda p: tree(p / "t", ("river",)), "only one class"),
    (lambda p: tree(p / "t", ()) if (p / "t" / "empty").mkdir(parents=True) else p / "t", "no pictures"),
    (lambda p: tree(p / "t" / "Images").parent, "did you mean .*Images"),
])
def test_a_tree_that_will_not_do_is_told_why(tmp_path, make, message):
    with pytest.raises(Problem, match=message):
        data.read_folder(make(tmp_path), 8, cache=tmp_path / "cache")


# ---- splits

def test_numbers_belong_to_their_pictures_and_a_missing_one_is_not_known(tmp_path):
    root, nan = tree(tmp_path / "t", count=2), float("nan")
    for read in (lambda: data.read_folder(root, 8, cache=tmp_path / "cache"),
                 lambda: data.read_pictures(root, 8)):
        (root / "numbers.csv").unlink(missing_ok=True)
        assert read().measures == () and read().numbers.shape == (4, 0)
        (root / "numbers.csv").write_text("picture,gsd,month\nriver/river_1.png,.5,\n\nelsewhere.png,7,7\n"
                                          "forest/forest_1.png,-2e1,12\nforest/forest_0.png,,nan\n")
        s = read()                                                       # also from the cache of the pictures
        assert s.measures == ("gsd", "month")
        assert_close(dict(zip(s.names, s.numbers.tolist(), strict=True)), {
            "forest/forest_0.png": [nan, nan], "forest/forest_1.png": [-20.0, 12.0],
            "river/river_0.png": [nan, nan], "river/river_1.png": [0.5, nan]}, equal_nan=True)
        assert_close(s[torch.tensor([3, 1])].numbers, torch.tensor([[0.5, nan], [-20, 12]]), equal_nan=True)


@pytest.mark.parametrize("text, said", [
    ("", "not enough values"), ("picture,a\nforest/forest_0.png,high\n", "high"),
    ("picture,a,b\nforest/forest_0.png,1\n", "several lengths"),
    ("picture,a\nforest/forest_0.png\n", "several lengths"),
    ("forest/forest_0.png,1\nriver/river_0.png,1\n", "no header"),
    ("picture,a\nforest/forest_0.png,1e300\n", "infinite"), ("picture,a\nx,1\nx,2\n", "two rows of one"),
    ("picture,a\nforest_0.png,1\n", "names no picture of .* like forest/forest_0.png"),
    (b"picture,a\n\xff\xfe,1\n", "give a header")])
def test_a_broken_table_of_numbers_is_named(tmp_path, text, said):
    root = tree(tmp_path / "t", count=1)
    (root / "numbers.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Problem, match=f"numbers.csv.*{said}") as problem:
        data.read_pictures(root, 8)
    assert "\n" not in str(problem.value)


def test_pictures_are_read_one_alone_or_all_below_a_folder(tmp_path, capsys):
    root = tree(tmp_path / "t", count=2)
    (root / "river/deep").mkdir()
    (root / ".trash").mkdir()
    for name in ("river/deep/x.PNG", "top.png", ".hidden.png", ".trash/old.png"):
        Image.new("RGB", (20, 20), "white").save(root / name)
    s = data.read_pictures(root, 8)
    assert s.names == ["forest/forest_0.png", "forest/forest_1.png", "river/deep/x.PNG", "river/river_0.png",
                       "river/river_1.png", "top.png"]
    assert s.images.shape == (6, 3, 8, 8) and (s.labels == -1).all()
    assert_close(s.images[3], torch.from_numpy(data.decode(root / "river/river_0.png", 8)))
    one = data.read_pictures(root / "river/river_0.png", 8)
    assert one.names == ["river_0.png"] and (one.images[0] == s.images[3]).all()
    (root / "top.png").write_text("no picture")
    with pytest.raises(Problem, match="1 of 6 .*top.png"):
        data.read_pictures(root, 8)
    assert len(data.read_pictures(root, 8, skip_broken=True)) == 5 and "top.png" in capsys.readouterr().err
    with pytest.raises(Problem, match="no picture decodes"):
        data.read_pictures(root / "top.png", 8, skip_broken=True)


def test_a_drawn_scene_is_as_light_and_hazy_as_its_numbers_say(tmp_path):
    root = data.draw_tree(tmp_path / "t", 16, size=32)
    s = data.read_folder(root, 16, cache=tmp_path / "cache")
    assert s.measures == ("scale", "light", "haze") and s.numbers.isfinite().all()
    light = s.images.float().mean((1, 2, 3))
    saturation = (s.images.amax(1) - s.images.amin(1)).float().mean((1, 2))
    for seen, name, sign in ((light, "light", 1), (saturation, "haze", -1)):
        told = s.numbers[:, s.measures.index(name)]
        a, b = (torch.cat([z[s.labels == c] - z[s.labels == c].mean() for c in range(8)])
                for z in (seen, told))
        assert sign * torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.4
    before = (root / "numbers.csv").read_text()
    data.draw_tree(root, 16, size=32)                                    # nothing to draw: the same table
    assert (root / "numbers.csv").read_text() == before


def test_nothing_is_drawn_into_a_folder_of_other_pictures(tmp_path):
    (tmp_path / "river").mkdir()
    (tmp_path / "river/river_001.jpg").write_bytes(b"mine")
    for draw in (data.draw_tree, data.draw_xbd):
        with pytest.raises(Problem, match="holds what was not drawn"):
            draw(tmp_path, 1)
    assert [p.name for p in tmp_path.rglob("*")] == ["river", "river_001.jpg"]


def test_a_lost_picture_and_a_lost_table_are_drawn_again(tmp_path):
    root = data.draw_tree(tmp_path / "t", 1, size=16)
    whole = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for file in ("river/river_001.jpg", "numbers.csv"):
        (root / file).unlink()
        data.draw_tree(root, 1, size=16)
        assert whole == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_links_to_folders_are_left_out_and_said(tmp_path, capsys):
    root = tree(tmp_path / "t", count=2)
    (root / "moor").symlink_to(root / "river")
    assert data.read_folder(root, 8, cache=tmp_path / "cache").classes == ["forest", "river"]
    assert "links to folders are not followed: " in capsys.readouterr().err


def test_a_folder_without_a_picture_is_no_class_and_said(tmp_path, capsys):
    root = tree(tmp_path / "t", count=2)
    (root / "desert").mkdir()
    assert data.read_folder(root, 8, cache=tmp_path / "cache").classes == ["forest", "river"]
    assert capsys.readouterr().err == f"{root}: folders without a picture are no classes: desert\n"


def test_a_wrong_level_of_a_tree_is_told_where_to_go(tmp_path):
    for part in data.PARTS:
        tree(tmp_path / "t" / part, count=1)
    with pytest.raises(Problem, match="these are parts of a set: put all pictures of a class in a folder"):
        data.read_folder(tmp_path / "t", 8)
    xbd = data.draw_xbd(tmp_path / "x", 1, side=96)
    (tmp_path / "c/images").mkdir(parents=True)
    (tmp_path / "c/dataset_rsicd.json").write_text("{}")
    for wrong, right in ((xbd / "train/images", xbd), (tmp_path / "c/images", tmp_path / "c")):
        with pytest.raises(Problem, match=f"did you mean {right}\\?"):
            data.read_folder(wrong, 8)


def test_pictures_that_change_places_are_read_again(tmp_path):
    root, a, b = tree(tmp_path / "t", count=1), "forest/forest_0.png", "river/river_0.png"
    for name, colour in ((a, "red"), (b, "blue")):
        Image.new("RGB", (8, 8), colour).save(root / name.replace("png", "bmp"))
        (root / name).unlink()
        os.utime(root / name.replace("png", "bmp"), (1, 1))
    before = data.read_folder(root, 8, cache=tmp_path / "cache")
    a, b = (root / name.replace("png", "bmp") for name in (a, b))
    a.rename(root / "c")
    b.rename(a)
    (root / "c").rename(b)
    assert (data.read_folder(root, 8, cache=tmp_path / "cache").images == before.images.flip(0)).all()


@pytest.mark.parametrize("file", ("river/river_003.jpg", "numbers.csv", ".crc32.csv"))
def test_a_drawn_tree_of_which_a_file_is_bad_is_made_whole_again(tmp_path, file):
    root = data.draw_tree(tmp_path / "t", 3, size=16)
    whole = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for bad in (b"", whole[root / file][::-1], whole[root / file].replace(b"5", b"6")):
        (root / file).write_bytes(bad)
        data.draw_tree(root, 3, size=16)
        assert whole == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_classes_are_shuffled_apart():
    parts = data.split(scenes(list(range(100)), [0] * 50 + [1] * 50))
    a, b = parts["test"].view(2, -1).tolist()
    assert a != [k - 50 for k in b]


def test_a_split_is_stratified_disjoint_complete_and_by_seed():
    s = scenes(list(range(200)), [0] * 150 + [1] * 50)
    parts = data.split(s, seed=3)
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(200))
    assert {k: [(s.labels[v] == c).sum().item() for c in (0, 1)] for k, v in parts.items()} == dict(
        train=[90, 30], val=[30, 10], test=[30, 10])
    again, other = (data.split(s, seed=seed)["test"].tolist() for seed in (3, 4))
    assert parts["test"].tolist() == again != other


def test_exact_doubles_never_straddle(tmp_path):
    root = tree(tmp_path / "t", count=20)
    for k in range(10):                                                  # across classes too, as in RESISC45
        (root / "river" / f"copy_{k}.png").write_bytes((root / "forest" / f"forest_{k}.png").read_bytes())
    s = data.read_folder(root, 20, cache=tmp_path / "cache")
    assert len(s.groups.unique()) == len(s) - 10
    for seed in range(5):
        parts = data.split(s, seed=seed)
        sets = [set(s.groups[index].tolist()) for index in parts.values()]
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_the_official_lists_are_used_and_training_gives_up_what_test_holds(tmp_path):
    root = tree(tmp_path / "t", count=10)
    (root / "forest" / "forest_0.png").write_bytes((root / "forest" / "forest_9.png").read_bytes())
    for part, ks in (("train", range(6)), ("val", (6, 7)), ("test", (8, 9))):
        lines = [f"{name}_{k}.png" for name in ("forest", "river") for k in ks]
        (root / f"resisc45-{part}.txt").write_text("\n".join(lines))
    s = data.read_folder(root, 20, cache=tmp_path / "cache")
    names = {part: sorted(s.names[i] for i in index) for part, index in data.split(s).items()}
    assert names["test"] == [f"{name}/{name}_{k}.png" for name in ("forest", "river") for k in (8, 9)]
    assert len(names["val"]) == 4 and len(names["train"]) == 11
    assert "forest/forest_0.png" not in names["train"]
    with pytest.raises(Problem, match="--hold-out flood: no such event; only an xBD tree has events"):
        data.split(s, hold_out="flood")
    (root / "resisc45-val.txt").write_text("beach_1.png")
    with pytest.raises(Problem, match="resisc45-val.txt .*names no picture"):
        data.read_folder(root, 20, cache=tmp_path / "cache")


def test_what_the_lists_do_not_name_is_in_no_part():
    s = replace(scenes([0, 1, 2, 3, 4, 4], [0] * 6), official=torch.tensor([0, 1, 2, -1, 2, -1]))
    parts = {part: index.tolist() for part, index in data.split(s).items()}
    assert parts == dict(train=[0], val=[1], test=[2, 4])


def test_joined_scenes_keep_their_groups_and_parts():
    s = scenes([5, 5, 7], [0, 1, 1])
    both = s[torch.tensor([0, 2])] + s[torch.tensor([1])]
    assert both.names == ["x/0.jpg", "x/2.jpg", "x/1.jpg"] and both.groups.tolist() == [5, 7, 5]
    assert both.labels.tolist() == [0, 1, 1] and both.official.tolist() == [-1] * 3 and len(both.images) == 3
    with pytest.raises(ValueError, match="different trees"):
        s + replace(s, classes=["b", "a"])


def test_the_digest_changes_with_each_name_label_class_and_pixel():
    scenes = Scenes(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ["a", "b"],
                    ["a/1.png", "b/1.png"], torch.arange(2))
    images = scenes.images.clone()
    images[1, 2, 3, 3] = 1
    others = [replace(scenes, **change) for change in (
        dict(labels=torch.tensor([1, 0])), dict(classes=["a", "c"]), dict(names=["a/1.png", "b/2.png"]),
        dict(images=images), dict(images=scenes.images.view(2, 3, 2, 8)))]
    assert len({each.digest for each in (scenes, *others)}) == 6
    assert replace(scenes).digest == scenes.digest                       # it is of them alone


def test_a_tree_too_small_to_split_is_told():
    with pytest.raises(Problem, match="too few images for a val split"):
        data.split(scenes(list(range(6)), [0, 1] * 3))


def test_smaller_subsets_are_part_of_larger_ones_and_too_large_ones_are_refused():
    s = scenes(list(range(100)), [0, 1] * 50)
    index = torch.arange(20, 100)
    small, large = (set(data.choose(s, index, n, seed=1).tolist()) for n in (5, 20))
    assert small < large and min(large) >= 20 and len(large) == 40
    assert small != set(data.choose(s, index, 5, seed=2).tolist())
    assert set(data.choose(s, index, 0, seed=1).tolist()) == set(index.tolist())
    with pytest.raises(Problem, match="41 asked for, but there are 40 images of a, 40 images of b"):
        data.choose(s, index, 41, seed=1)


# ---- drawing

def test_scene_k_follows_from_seed_class_and_k_alone(tmp_path):
    three, five = data.draw_tree(tmp_path / "3", 3, size=32), data.draw_tree(tmp_path / "5", 5, size=32)
    files = sorted(p.relative_to(three) for p in three.rglob("*.jpg"))
    assert len(files) == 3 * len(data.SCENES) >= 24
    assert all((three / f).read_bytes() == (five / f).read_bytes() for f in files)
    assert len({(three / f).read_bytes() for f in files}) == len(files)


# ---- files

def test_nothing_half_written_is_left_behind(tmp_path):
    (tmp_path / "x.txt").write_text("old")
    with pytest.raises(RuntimeError), data.replacing(tmp_path / "x.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "x.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"junk" * 99, {"kind": "classifier"}, [1, 2]])
def test_a_checkpoint_of_something_else_is_told(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(Problem, match="a generator is needed"):
        data.load_checkpoint(path, "generator")
    with pytest.raises(Problem, match="no checkpoint at"):
        data.load_checkpoint(tmp_path / "none.pt", "generator")


# ---- flags

@dataclass
class Flags:
    """For the tests of launch."""
    steps: int = flag(5, "a number")
    lr: float = flag(1e-3, "a rate")
    fast: bool = flag(False, "a switch")
    counts: tuple = flag((1, 2), "several numbers")
    w: float | None = flag(None, "a number, or none at all")

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError("--steps below 0")


def test_fields_become_flags_with_their_types():
    cfg = data.launch(lambda cfg: cfg, Flags, ["--steps", "7", "--lr", "2e-4", "--fast", "--counts", "3,4,5"])
    assert cfg == Flags(7, 2e-4, True, (3, 4, 5))
    assert data.launch(lambda cfg: cfg, Flags, ["--no-fast"]) == Flags() and Flags().w is None
    assert data.launch(lambda cfg: cfg, Flags, ["--w", "0"]).w == 0.0


def problem(_):
    raise Problem("no such thing: do that")


@pytest.mark.parametrize("script", [(data.main, data.Script), (train_gen.main, train_gen.Script),
                                    (train_cls.main, train_cls.Script), (experiment.main, experiment.Config)])
def test_every_script_explains_its_arguments(script, capsys):
    with pytest.raises(SystemExit) as done:
        data.launch(*script, ["--help"])
    said = capsys.readouterr().out
    assert done.value.code == 0 and all(f.metadata["help"].split()[0] in said for f in fields(script[1]))


@pytest.mark.parametrize("argv, message", [
    (["--bogus"], "--bogus"), (["--ste", "5"], "--ste"), (["--steps", "1e3"], "1e3"),
    (["--steps", "-1"], "--steps below 0"), (["--counts", "3,x"], "3,x"), (["--w", "None"], "None"),
    ([], "no such thing: do that")])
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        data.launch(problem, Flags, argv)
    err = capsys.readouterr().err
    assert error.value.code == 2 and message in err and err.count("\n") == 1


# ---- the script

@pytest.mark.parametrize("script", ["augment", "data", "train_gen", "train_cls", "experiment"])
def test_a_script_runs_on_its_own(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(f"{script}.py", run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: {script}.py")


@pytest.mark.parametrize("script, first, last", [
    ("unet", "stem (2, 3, 64, 64) -> (2, 64, 64, 64)", "UNet (2, 3, 64, 64) -> (2, 3, 64, 64)"),
    ("vit", "stem.layers.0 (2, 3, 64, 64) -> (2, 96, 32, 32)", "ViT (2, 3, 64, 64) -> (2, 45)")])
def test_a_network_shows_its_shapes_when_run_on_its_own(script, first, last, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    runpy.run_path(f"{script}.py", run_name="__main__")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert (lines[0], lines[-1]) == (first, last)


def test_data_py_draws_a_tree_and_says_what_is_in_it(tmp_path, launch):
    command = data, tmp_path / "t", "--size", 16, "--out", tmp_path / "x.png"
    absent = launch(*command)
    assert absent.returncode == 2 and absent.stderr.count("\n") == 1
    assert "75206b2e16446591afa88e2628744886" in absent.stdout
    drawn = launch(*command, "--draw", 5)
    assert "40 pictures of 8 classes, 40 of them without exact doubles; 24 train, 8 val" in drawn.stdout
    assert Image.open(tmp_path / "x.png").width == 10 * 18
