"""xBD: each building with a class and no other, in the middle of its crop; nothing is lost without a word."""
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data
from data import DAMAGE, UNKNOWN, Problem, draw_mask, draw_xbd, read_label, read_xbd, wkt_polygon

REAL = next((p / "shared/data/xbd" for p in Path(__file__).resolve().parents
             if (p / "shared/data/xbd").is_dir()), None)
real = pytest.mark.skipif(REAL is None, reason="needs shared/data/xbd")
RED, GREEN, BLUE, GREY = (200, 40, 40), (40, 160, 60), (30, 60, 190), (128, 128, 128)
ELL = np.array([(-1, -1), (1, -1), (1, 0.1), (0.1, 0.1), (0.1, 1), (-1, 1)])


def wkt(*rings):
    return f"POLYGON (({'), ('.join(', '.join(f'{x} {y}' for x, y in ring) for ring in rings)}))"


def rectangle(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]


def tile(root, name, buildings, split="train", kind="wind", size=128, after=GREY, before=GREY, extent=None):
    """One tile; buildings [(subtype, rings, colour)] are rectangles of one colour in the post picture."""
    pixels = np.full((size, size, 3), after, np.uint8)
    features = []
    for k, (subtype, rings, colour) in enumerate(buildings):
        (x0, y0), (x1, y1) = np.array(rings[0]).min(0).clip(0), np.array(rings[0]).max(0).clip(0)
        pixels[int(y0):int(y1), int(x0):int(x1)] = colour
        features.append({"properties": {"feature_type": "building", "subtype": subtype, "uid": f"{name}-{k}"},
                         "wkt": wkt(*rings)})
    w = h = extent or size
    metadata = dict(gsd=2.4, disaster=name.rpartition("_")[0], disaster_type=kind, width=w, height=h)
    for part in ("images", "labels"):
        (root / split / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / split / "images" / f"{name}_post_disaster.png")
    Image.new("RGB", (size, size), before).save(root / split / "images" / f"{name}_pre_disaster.png")
    content = json.dumps({"features": {"lng_lat": [], "xy": features}, "metadata": metadata})
    (root / split / "labels" / f"{name}_post_disaster.json").write_text(content)
    return root


def house(subtype="no-damage", box=(40, 40, 60, 60), colour=RED):
    return subtype, [rectangle(*box)], colour


@pytest.fixture
def read(tmp_path):
    """read_xbd of tmp_path/tree with a cache of its own."""
    return lambda size=32, **how: read_xbd(tmp_path / "tree", size, cache=tmp_path / "cache", **how)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_xbd(tmp_path_factory.mktemp("drawn") / "tree", tiles=24, side=192)


# ---- polygons

def test_a_polygon_is_its_outline_and_then_its_holes():
    outline, hole = wkt_polygon("POLYGON ((0 0, 9.5 0, 9.5 8e0, -1e-07 8, 0 0), (2 2, 4 2, 4 4, 2 2))")
    assert outline.tolist() == [[0, 0], [9.5, 0], [9.5, 8], [-1e-7, 8], [0, 0]]
    assert hole.tolist() == [[2, 2], [4, 2], [4, 4], [2, 2]]
    assert [len(ring) for ring in wkt_polygon(" POLYGON((0 0,1 0,1 1),(0 0,1 0),(0 0,1 1))")] == [3, 2, 2]


@pytest.mark.parametrize("text", ["", "POINT (1 2)", "POLYGON EMPTY", "POLYGON ((1 2, 3))", "POLYGON ((1 b))",
                                  "POLYGON ((1 2 3, 4 5 6))", "POLYGON ((1 2, nan 4))", "POLYGON ((", None])
def test_other_text_is_no_polygon_and_its_file_is_named(tmp_path, read, text):
    with pytest.raises((ValueError, TypeError)):
        wkt_polygon(text)
    tile(tmp_path / "tree", "a_00000001", [house()])
    path = tmp_path / "tree/train/labels/a_00000001_post_disaster.json"
    content = json.loads(path.read_bytes())
    content["features"]["xy"][0]["wkt"] = text
    path.write_text(json.dumps(content))
    with pytest.raises(Problem, match="a_00000001_post_disaster.json is not an xBD label") as problem:
        read()
    assert "\n" not in str(problem.value)


def test_the_area_is_that_of_the_outline_less_the_holes_whichever_way_they_turn():
    outline, hole = np.array(rectangle(0, 0, 20, 10)), np.array(rectangle(2, 2, 5, 4))
    for rings in ([outline, hole], [outline[::-1], hole], [outline[:-1] + 1000, hole[::-1]]):
        assert data.area(rings) == pytest.approx(200 - 6)


def test_a_mask_is_white_inside_black_outside_and_in_holes():
    rings = [np.array(rectangle(2, 2, 14, 10)), np.array(rectangle(4, 4, 8, 6))[::-1]]
    mask = draw_mask(rings, np.array([0, 0, 16, 16]), 16)
    expected = np.zeros((16, 16, 1), np.uint8)
    expected[2:10, 2:14] = 255
    expected[4:6, 4:8] = 0
    assert (mask == expected).all()


def test_masks_lie_where_their_polygons_do_to_a_fraction_of_a_pixel():
    off = []
    for middle in np.random.default_rng(0).uniform(7, 9, (200, 2)):
        mask = draw_mask([middle + 5.3 * data.CIRCLE], np.array([0, 0, 16, 16]), 16)[..., 0] > 0
        off.append(np.argwhere(mask)[:, ::-1].mean(0) + 0.5 - middle)
        assert mask.sum() == pytest.approx(np.pi * 5.3**2, rel=0.1)
    assert abs(np.mean(off, 0)).max() < 0.03


@pytest.mark.parametrize("shape", [data.CIRCLE, data.SQUARE, ELL])
def test_masks_have_the_area_of_their_polygons(shape):
    """Houses of 8 to 16 pixels a side in crops of 24, turned at random; a third have a courtyard."""
    rng, counted, true = np.random.default_rng(0), 0, 0
    for k in range(600):
        angle, half = rng.uniform(0, np.pi), rng.uniform(4, 8, 2)
        turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
        shapes, middle = [shape, 0.3 * data.SQUARE - 0.35][:1 + (k % 3 == 0)], rng.uniform(11, 13, 2)
        rings = [middle + half * points @ turn for points in shapes]
        counted += (draw_mask(rings, np.array([0, 0, 24, 24]), 24) > 0).sum()
        true += data.area(rings)
    assert counted / true == pytest.approx(1, abs=0.003)


# ---- which buildings

def test_only_buildings_with_a_class_are_read_and_the_others_are_counted(tmp_path, read, capsys):
    boxes = [(10 * k, 10 * k, 10 * k + 9, 10 * k + 9) for k in range(5)]
    subtypes = ["destroyed", "un-classified", "no-damage", "major-damage", "minor-damage"]
    tile(tmp_path / "tree", "storm_00000001", [house(s, box) for s, box in zip(subtypes, boxes, strict=True)])
    scenes = read()
    assert scenes.classes == ["no-damage", "minor-damage", "major-damage", "destroyed"]
    assert scenes.labels.tolist() == [3, 0, 2, 1]
    assert scenes.names == [f"train/storm_00000001/storm_00000001-{k}" for k in (0, 2, 3, 4)]
    assert "4 buildings of 1 tiles" in (out := capsys.readouterr().out) and "1 un-classified" in out


def test_too_small_ones_are_dropped_and_so_is_what_lies_off_the_tile(tmp_path, read, capsys, monkeypatch):
    boxes = (10, 10, 18, 18), (30, 30, 37.9, 38), (-40, 50, -10, 80), (100, 135, 150, 180), (120, -30, 160, 8)
    ring = [rectangle(60, 60, 70, 70), rectangle(61, 61, 69, 69)]        # 36 pixels are left of this one
    tile(tmp_path / "tree", "a_00000001", [*(house(box=b) for b in boxes), ("destroyed", ring, RED)])
    assert [name[-1] for name in read().names] == ["0", "4"]
    assert "4 too small" in capsys.readouterr().out
    monkeypatch.setattr(data, "MIN_AREA", 30)
    assert len(read(size=16)) == 4


def test_points_off_the_tile_move_to_its_edge_also_where_it_is_not_square(tmp_path):
    tile(tmp_path, "a_00000001", [house(box=(-7, -1e-7, 300, 200))])
    path = tmp_path / "train/labels/a_00000001_post_disaster.json"
    path.write_text(path.read_text().replace('"height": 128', '"height": 64'))
    [(_, _, [ring])], kind, extent, _ = read_label(path)
    assert extent == (128, 64) and kind == "wind"
    assert ring.min(0).tolist() == [0, 0] and ring.max(0).tolist() == [128, 64]


def test_empty_tiles_and_uids_that_occur_twice_are_fine(tmp_path, read):
    tile(tmp_path / "tree", "a_00000001", [])
    tile(tmp_path / "tree", "a_00000002", [house(), house("destroyed", (80, 80, 99, 99))])
    tile(tmp_path / "tree", "a_00000003", [])
    path = tmp_path / "tree/train/labels/a_00000002_post_disaster.json"
    path.write_text(path.read_text().replace("00000002-1", "00000002-0"))
    scenes = read()
    assert scenes.labels.tolist() == [0, 3] and len(set(scenes.names)) == 1


def test_groups_are_tiles_whatever_the_split(tmp_path, read):
    two = [house(), house("destroyed", (80, 80, 99, 99))]
    tile(tmp_path / "tree", "a_00000001", two, split="tier3")
    tile(tmp_path / "tree", "a_00000001", two, split="hold")
    tile(tmp_path / "tree", "a_00000002", two)
    tile(tmp_path / "tree", "b_00000001", two, split="test")
    scenes = read()
    by_tile = {}
    for name, group in zip(scenes.names, scenes.groups.tolist(), strict=True):
        by_tile.setdefault(name.split("/")[1], set()).add(group)
    assert len(scenes) == 8 and sorted(map(len, by_tile.values())) == [1, 1, 1]
    assert len(set.union(*by_tile.values())) == 3 and scenes.groups.dtype == torch.int64


def test_the_type_of_the_disaster_comes_from_the_metadata(tmp_path, read):
    for k, kind in enumerate(("wind", "fire", "flooding")):
        tile(tmp_path / "tree", f"storm_{k:08d}", [house("destroyed")], kind=kind)
    scenes = read(label="type")
    assert scenes.classes == ["fire", "flooding", "wind"] and scenes.labels.tolist() == [2, 0, 1]


# ---- the crops

@pytest.mark.parametrize("box", [(40, 50, 60, 70), (0, 0, 20, 20), (108, 108, 128, 128), (-9, 60, 21, 78),
                                 (1, 5, 13, 35)])
def test_the_building_is_in_the_middle_of_its_crop_also_at_the_edge_of_the_tile(tmp_path, read, box):
    tile(tmp_path / "tree", "a_00000001", [house(box=box)])
    image = read(mask=True).images[0].long()
    rows, columns = (image[3] > 0).nonzero().T
    for places in (rows, columns):
        assert abs(places.min() + places.max() - 31) <= 1
    assert (image[:3, 16, 16] - torch.tensor(RED)).abs().max() < 8
    inside = image[3] > 0
    assert image[0][inside].float().mean() > 185                         # the mask lies on the building
    assert image[3].unique().tolist() == [0, 255]


@pytest.mark.parametrize("sides, share", [((40, 20), 1 / 2), ((20, 40), 1 / 2), ((16, 10), 1 / 2),
                                          ((10, 10), 10 / 32)])
def test_a_crop_is_the_longer_side_and_its_surroundings_but_not_too_small(tmp_path, read, sides, share):
    w, h = sides
    tile(tmp_path / "tree", "a_00000001", [house(box=(44, 44, 44 + w, 44 + h))])
    mask = read(size=64, mask=True).images[0, 3] > 0
    assert abs(mask.any(0).sum() - 64 * share * w / max(w, h)) <= 1.5
    assert abs(mask.any(1).sum() - 64 * share * h / max(w, h)) <= 1.5


def test_beyond_the_edge_the_picture_is_mirrored(tmp_path, read):
    stripe = "un-classified", [rectangle(0, 50, 4, 60)], BLUE
    tile(tmp_path / "tree", "a_00000001", [house(box=(0, 40, 20, 60)), stripe])
    image = read(size=40).images[0].long()                               # 1 : 1, the tile starts at column 10
    assert (image[:, 25, 11] - torch.tensor(BLUE)).abs().max() < 3
    assert (image[:, 25, 8] - torch.tensor(BLUE)).abs().max() < 3
    assert (image[:, 25, 2] - torch.tensor(RED)).abs().max() < 3


def test_reduction_is_antialiased(tmp_path, read):
    tile(tmp_path / "tree", "a_00000001", [house(box=(0, 0, 128, 128))])
    path = tmp_path / "tree/train/images/a_00000001_post_disaster.png"
    board = 255 * (np.indices((128, 128)).sum(0) % 2)
    Image.fromarray(np.repeat(board[..., None], 3, 2).astype(np.uint8)).save(path)
    assert (read(size=16).images.float() - 127.5).abs().max() < 8


def test_after_comes_first_then_before_then_the_mask(tmp_path, read):
    tile(tmp_path / "tree", "a_00000001", [house()], before=BLUE, after=GREEN)
    for pre, mask, C in ((False, False, 3), (False, True, 4), (True, False, 6), (True, True, 7)):
        image = read(pre=pre, mask=mask).images[0]
        assert image.shape == (C, 32, 32) and image.dtype == torch.uint8
        assert tuple(image[:3, 1, 1].tolist()) == GREEN and tuple(image[:3, 16, 16].tolist()) == RED
        if pre:
            assert tuple(image[3:6, 16, 16].tolist()) == BLUE
        if mask:
            assert image[-1, 16, 16] == 255 and image[-1, 1, 1] == 0


def test_the_mask_is_of_this_building_alone_and_leaves_out_its_courtyard(tmp_path, read):
    ring = [rectangle(30, 30, 60, 60), rectangle(40, 40, 50, 50)]
    tile(tmp_path / "tree", "a_00000001", [("no-damage", ring, RED), house(box=(62, 30, 80, 60))])
    mask = read(size=60, mask=True).images[0, 3] > 0                     # 1 : 1
    assert not mask[25:35, 25:35].any() and mask[15:45, 15:25].all() and not mask[:, 46:].any()
    assert abs(mask.sum() - 800) < 20


# ---- what is not there, or not as it should be

def test_tiles_with_a_part_missing_are_left_out_and_counted(tmp_path, read, capsys):
    for k in range(5):
        tile(tmp_path / "tree", f"a_{k:08d}", [house(DAMAGE[k % 4])])
    train = tmp_path / "tree/train"
    (train / "labels/a_00000001_post_disaster.json").unlink()
    (train / "images/a_00000002_post_disaster.png").unlink()
    (train / "images/a_00000003_pre_disaster.png").unlink()
    (train / "images/._a_00000009_post_disaster.png").touch()            # as macOS leaves behind
    assert read().labels.tolist() == [0, 3, 0]
    assert "left out: 1 tiles without post.json, 1 tiles without post.png\n" in capsys.readouterr().out
    assert read(pre=True).labels.tolist() == [0, 0]
    assert "1 tiles without pre.png" in capsys.readouterr().out


def test_a_tree_without_a_whole_tile_or_without_a_class_is_a_problem(tmp_path, read):
    with pytest.raises(Problem, match="no building .* in 0 tiles .left out: nothing."):
        read()
    tile(tmp_path / "tree", "a_00000001", [house("un-classified"), house(box=(1, 1, 3, 3))])
    with pytest.raises(Problem, match="in 1 tiles .left out: 1 un-classified, 1 too small."):
        read()
    (tmp_path / "tree/train/images/a_00000001_post_disaster.png").unlink()
    with pytest.raises(Problem, match="left out: 1 tiles without post.png.*unpack") as problem:
        read()
    assert "\n" not in str(problem.value) and str(tmp_path) in str(problem.value)


@pytest.mark.parametrize("old, new", [
    ('"subtype": "no-damage"', '"subtype": "fine"'), ('"subtype": "no-damage", ', ""), ("POLYGON", "CIRCLE"),
    ('"uid"', '"id"'), ('"width"', '"w"'), ('"metadata"', '"meta"'), ("}", ""), ('"xy"', '"yx"'),
    ('"width": ', '"width": -'), ('"disaster_type": "', '"disaster_type": "../'),
    ('"disaster_type": ', '"sun_elevation": Infinity, "disaster_type": ')])
def test_a_broken_label_is_named(tmp_path, read, old, new):
    tile(tmp_path / "tree", "a_00000001", [house()])
    path = tmp_path / "tree/train/labels/a_00000001_post_disaster.json"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(Problem, match="a_00000001_post_disaster.json is not an xBD label"):
        read()


@pytest.mark.parametrize("time", ["pre", "post"])
def test_a_broken_picture_is_named_and_nothing_is_cached(tmp_path, read, time):
    tile(tmp_path / "tree", "a_00000001", [house()])
    path = tmp_path / f"tree/train/images/a_00000001_{time}_disaster.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(Problem, match=f"a_00000001_{time}_disaster.png does not decode"):
        read(pre=True)
    assert not list(tmp_path.glob("cache/*"))


def test_a_picture_of_another_size_than_its_label_speaks_of_is_a_problem(tmp_path, read):
    tile(tmp_path / "tree", "a_00000001", [house()], size=128, extent=256)
    with pytest.raises(Problem, match=r"has \(128, 128\) pixels, its label says \(256, 256\)"):
        read()


# ---- the cache

def test_a_second_reading_takes_the_cache_and_says_the_same(tmp_path, read, capsys, monkeypatch):
    tile(tmp_path / "tree", "a_00000001", [house("major-damage"), house("un-classified", (80, 80, 99, 99))])
    first, said = read(), capsys.readouterr().out
    monkeypatch.setattr(data, "read_label", None)
    second = read()
    assert capsys.readouterr().out == said
    assert_close(first.images, second.images)
    assert (first.names, first.classes) == (second.names, second.classes)
    assert first.labels.tolist() == second.labels.tolist() and first.groups.tolist() == second.groups.tolist()


def test_a_tree_that_has_changed_is_read_again_and_each_option_has_its_own_cache(tmp_path, read, capsys):
    tile(tmp_path / "tree", "a_00000001", [house()])
    assert read().labels.tolist() == [0]
    path = tmp_path / "tree/train/labels/a_00000001_post_disaster.json"
    stat = path.stat()
    path.write_text(path.read_text().replace("no-damage", "destroyed"))  # the same length
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert read().labels.tolist() == [3] and "has changed" in capsys.readouterr().err
    tile(tmp_path / "tree", "a_00000002", [house()])
    assert read().labels.tolist() == [3, 0]
    capsys.readouterr()
    options = [dict(label="type"), dict(pre=True), dict(mask=True), dict(size=16)]
    shapes = [tuple(read(**how).images.shape) for how in options]
    assert shapes == [(2, 3, 32, 32), (2, 6, 32, 32), (2, 4, 32, 32), (2, 3, 16, 16)]
    assert len(list(tmp_path.glob("cache/*.pt"))) == 5 and "changed" not in capsys.readouterr().err


# ---- drawn disasters

def test_a_drawn_tree_is_an_xbd_tree_with_all_that_a_reader_may_meet(drawn):
    assert data.is_xbd(drawn) and not data.is_xbd(drawn / "train") and not data.is_xbd(drawn.parent)
    assert {p.name for p in drawn.iterdir()} == {"train", "test"}
    pictures = {path.relative_to(drawn) for path in drawn.glob("*/images/*")}
    labels = {path.relative_to(drawn) for path in drawn.glob("*/labels/*")}
    tiles = {path.parent.parent / path.name.removesuffix("_post_disaster.json") for path in labels}
    assert len(tiles) == 24 and pictures == {tile.parent / f"images/{tile.name}_{time}_disaster.png"
                                             for tile in tiles for time in ("pre", "post")}
    subtypes, kinds, points = set(), set(), []
    for path in labels:
        polygons, kind, extent, _ = read_label(drawn / path)
        assert extent == (192, 192) and kind == data.EVENTS[path.name[:path.name.index("_")]][0]
        subtypes |= {subtype for _, subtype, _ in polygons}
        kinds.add(kind)
        for polygon in json.loads((drawn / path).read_bytes())["features"]["xy"]:
            points += wkt_polygon(polygon["wkt"])
    assert subtypes == {*DAMAGE, UNKNOWN} and len(kinds) == 4
    assert np.concatenate(points).min() < 0 and np.concatenate(points).max() > 192


def test_a_tile_follows_from_seed_and_number_and_only_what_is_missing_is_drawn(tmp_path, drawn, monkeypatch):
    again = draw_xbd(tmp_path / "again", tiles=5, side=192)
    other = draw_xbd(tmp_path / "other", tiles=1, side=192, seed=1)
    files = {p.relative_to(again): p.read_bytes() for p in again.glob("*/*/*")}
    assert len(files) == 15 and all((drawn / name).read_bytes() == content for name, content in files.items())
    assert not [p for p in other.glob("*/*/*") if p.read_bytes() == files[p.relative_to(other)]]
    redrawn, tile = [], data.draw_tile
    monkeypatch.setattr(data, "draw_tile", lambda event, *how: redrawn.append(event) or tile(event, *how))
    (again / "train/images/drawn-flood_00000001_pre_disaster.png").unlink()
    (again / "train/labels/drawn-wildfire_00000002_post_disaster.json").unlink()
    draw_xbd(again, tiles=5, side=192)
    assert redrawn == ["drawn-flood", "drawn-wildfire"]
    assert {p.relative_to(again): p.read_bytes() for p in again.glob("*/*/*")} == files


def test_a_tile_looks_before_as_after_but_for_the_light_and_the_damage(monkeypatch):
    monkeypatch.setattr(data, "strike", lambda *_: None)
    before, after, _ = data.draw_tile("drawn-flood", np.random.default_rng(5), 96)
    x, y = (np.asarray(picture, float).reshape(-1, 3) for picture in (before, after))
    for channel in range(3):
        assert np.corrcoef(x[:, channel], y[:, channel])[0, 1] > 0.98


def test_damage_shows_after_the_disaster_and_the_rarer_classes_are_rare(drawn, tmp_path):
    scenes = read_xbd(drawn, 32, pre=True, mask=True, cache=tmp_path)
    count = scenes.labels.bincount(minlength=4) / len(scenes)
    assert 0.65 < count[0] < 0.87 and (count[1:] > 0.02).all() and (count[1:] < 0.18).all()
    x, inside = scenes.images.float(), scenes.images[:, 6:] > 0
    after, before = ((x[:, k:k + 3] - x[:, k:k + 3].mean((2, 3), keepdim=True)) for k in (0, 3))
    change = ((after - before).abs() * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3))
    none, minor, _, destroyed = (change[scenes.labels == c].median() for c in range(4))
    assert minor > 1.3 * none and destroyed > 2 * none


@pytest.mark.parametrize("kind", ["wind", "flooding", "fire", "earthquake"])
def test_each_class_of_damage_looks_unlike_the_others(kind):
    views = []
    for damage in DAMAGE:
        c = data.Canvas(np.random.default_rng(0), 64, [GREEN])
        c.axes, c.origin = 28 * np.eye(2), np.array([64, 64])
        c.solid(0, data.SQUARE, [RED])
        data.strike(c, np.random.default_rng(0), damage, kind)
        views.append(np.asarray(c.image, float)[20:108, 20:108])
    apart = [abs(a - b).mean() for k, a in enumerate(views) for b in views[:k]]
    assert min(apart) > 3, apart


# ---- the real labels

@real
def test_the_real_labels_are_counted_as_they_are():
    assert data.is_xbd(REAL)
    counts = {}
    for tile, files in data.find_tiles(REAL).items():
        for name in {"pre.json", "post.json"} & files.keys():
            polygons, _, extent, _ = read_label(files[name])
            assert extent == (1024, 1024)
            counts[tile.split("/")[1], name] = Counter(subtype for _, subtype, _ in polygons)
    assert sorted(count.total() for count in counts.values()) == [15, 15, 39, 43, 84]
    assert counts["joplin-tornado_00000050", "pre.json"] == {None: 15}
    assert counts["joplin-tornado_00000050", "post.json"] == {"major-damage": 3, "destroyed": 11, UNKNOWN: 1}
    assert {"no-damage": 20, "destroyed": 21, UNKNOWN: 2} in counts.values()
    assert {UNKNOWN: 84} in counts.values()


@real
def test_the_real_tree_cannot_be_trained_on_and_says_why(tmp_path):
    with pytest.raises(Problem, match="4 tiles without post.png, 6 tiles without post.json"):
        read_xbd(REAL, 32, cache=tmp_path)


@real
@pytest.mark.parametrize("time", ["pre", "post"])
def test_real_polygons_cover_what_the_masks_beside_them_cover(time):
    label = REAL / f"train/labels/joplin-tornado_00000050_{time}_disaster.json"
    polygons, kind, extent, _ = read_label(label)
    assert kind == "wind" and extent == (1024, 1024)
    with Image.open(REAL / f"joplin-tornado_00000050_{time}_disaster_b1.png") as pil:
        expected = np.asarray(pil)
    drawn = np.zeros_like(expected)
    for _, subtype, rings in polygons:
        value = 1 if time == "pre" else {"major-damage": 3, "destroyed": 4, "un-classified": 5}[subtype]
        drawn[draw_mask(rings, np.array([0, 0, 1024, 1024]), 1024)[..., 0] > 0] = value
    both, any_of_them = (drawn > 0) & (expected > 0), (drawn > 0) | (expected > 0)
    assert both.sum() / any_of_them.sum() >= 0.93
    assert (drawn == expected)[both].mean() > 0.99


@real
def test_a_real_tile_gives_a_crop_of_its_pixels(tmp_path):
    tree, name = tmp_path / "tree", "santa-rosa-wildfire_00000329"
    tile(tree, name, [("destroyed", [rectangle(500, 300, 532, 332)], RED)], size=1024)
    for time in ("pre", "post"):
        path = tree / f"train/images/{name}_{time}_disaster.png"
        path.write_bytes((REAL / f"train/images/{path.name}").read_bytes())
    images = read_xbd(tree, 64, pre=True, cache=tmp_path / "cache").images[0]       # 1 : 1
    for k, time in ((0, "post"), (3, "pre")):
        with Image.open(tree / f"train/images/{name}_{time}_disaster.png") as pil:
            expected = torch.from_numpy(np.array(pil)[284:348, 484:548]).permute(2, 0, 1)
        assert_close(images[k:k + 3], expected)


@real
def test_the_measures_of_a_real_label_are_its_own():
    """As `python -m json.tool` shows them; the place is Joplin, Missouri."""
    found = dict(zip(data.MEASURES, read_label(
        REAL / "train/labels/joplin-tornado_00000050_post_disaster.json")[3], strict=True))
    assert found["longitude"] == pytest.approx(-94.5, abs=0.1)
    assert found["latitude"] == pytest.approx(37.07, abs=0.1)
    assert found["gsd"] == 2.35255861282349 and found["month"] == 5
    assert (found["off_nadir_angle"], found["sun_elevation"]) == (28.4302768707275, 71.8531799316406)


def test_measures_that_a_label_lacks_are_not_known_and_each_building_has_those_of_its_tile(tmp_path, read):
    root = tile(tmp_path / "tree", "a_00000001", [house(), house(box=(80, 80, 99, 99))])
    tile(root, "b_00000002", [house()])
    path = root / "train/labels/b_00000002_post_disaster.json"
    content = json.loads(path.read_bytes())
    content["metadata"] |= dict(capture_date="2018-09-20T16:04:41.000Z", sun_elevation=61.5)
    content["features"]["lng_lat"] = [dict(wkt="POLYGON ((-78 34, -78 36, -80 36, -80 34))")]
    path.write_text(json.dumps(content))
    s, nan = read(), float("nan")
    assert s.measures == ("longitude", "latitude", "gsd", "off_nadir_angle", "sun_elevation", "month")
    a, b = [nan, nan, 2.4, nan, nan, nan], [-79, 35, 2.4, nan, 61.5, 9]
    assert_close(s.numbers, torch.tensor([a, a, b]), equal_nan=True)
    content["metadata"]["sun_elevation"] = "high"
    path.write_text(json.dumps(content))
    with pytest.raises(Problem, match="b_00000002_post_disaster.json is not an xBD label"):
        read()


def test_a_drawn_label_tells_the_height_of_the_sun_which_the_shadows_show(drawn):
    heights = [read_label(path)[3][4] for path in drawn.glob("*/labels/*_post_disaster.json")]
    assert len(set(heights)) > 20 and 35 < min(heights) < 45 and 55 < max(heights) < 65    # atan 1/1.3, 1/.5


# ---- splits

@pytest.fixture(scope="module")
def sixty_four(tmp_path_factory):
    """The buildings of 64 drawn tiles, 16 of which are in test."""
    root = data.draw_xbd(tmp_path_factory.mktemp("drawn") / "xbd", 64, side=128)
    return data.read_xbd(root, 8, cache=root.parent / "cache")


def folders(scenes, index):
    return {scenes.names[i].split("/")[0] for i in index.tolist()}


def events(scenes, index):
    return {data.event_of(scenes.names[i]) for i in index.tolist()}


@pytest.mark.parametrize("hold_out", ["", "drawn-flood"])
def test_no_tile_is_cut_and_every_building_is_in_one_part(sixty_four, hold_out):
    scenes = sixty_four
    parts = data.split(scenes, hold_out=hold_out)
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(len(scenes)))
    tiles = [set(scenes.groups[index].tolist()) for index in parts.values()]
    assert not (tiles[0] & tiles[1] or tiles[0] & tiles[2] or tiles[1] & tiles[2])
    assert 0.7 < len(tiles[0]) / (len(tiles[0]) + len(tiles[1])) < 0.8
    if hold_out:
        assert events(scenes, parts["test"]) == {hold_out}
        assert hold_out not in events(scenes, parts["train"]) | events(scenes, parts["val"])
    else:
        assert folders(scenes, parts["test"]) == {"test"} and folders(scenes, parts["train"]) == {"train"}


def test_without_an_official_test_split_some_tiles_are_it(sixty_four):
    scenes = sixty_four
    mine = scenes[torch.tensor([name.startswith("train/") for name in scenes.names])]
    parts = data.split(mine)
    tiles = [len(mine.groups[parts[part]].unique()) for part in ("train", "val", "test")]
    total = len(mine.groups.unique())
    assert sum(tiles) == total and np.allclose(np.array(tiles) / total, [0.6, 0.2, 0.2], atol=0.03)


@pytest.mark.parametrize("tiles", range(2, 14))
def test_however_few_the_other_tiles_none_goes_to_the_test_split_of_the_event_held_out(tiles):
    names = [f"train/a_{k:08d}/u" for k in range(tiles)] + ["train/b_00000000/u"]
    n = len(names)
    scenes = data.Scenes(torch.zeros(n, 3, 8, 8, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64), ["x"],
                         names, torch.arange(n), tiles=True)
    parts = data.split(scenes, hold_out="b")
    assert parts["test"].tolist() == [tiles] and len(parts["train"]) + len(parts["val"]) == tiles


def test_a_subset_of_tiles_is_whole_nested_and_tells_what_is_missing(sixty_four):
    scenes = sixty_four
    train = data.split(scenes)["train"]
    few, more, every = (set(data.choose(scenes, train, n, 0).tolist()) for n in (12, 24, 0))
    assert few < more < every == set(train.tolist())
    few = torch.tensor(sorted(few))
    assert len(scenes.groups[few].unique()) == 12
    assert torch.isin(scenes.groups[train], scenes.groups[few]).sum() == len(few)
    assert data.choose(scenes, train, 12, 1).tolist() != few.tolist()
    with pytest.raises(Problem, match="99 asked for, but there are .* tiles to train on"):
        data.choose(scenes, train, 99, 0)
    with pytest.raises(Problem, match="no image to train on is .*: ask for more, or hold out another event"):
        data.choose(scenes, train, 1, 0)


def test_a_subset_of_tiles_takes_nothing_that_was_not_offered(sixty_four):
    offered = torch.arange(0, len(sixty_four), 2)                        # every other building
    assert set(data.choose(sixty_four, offered, 30, 0).tolist()) < set(offered.tolist())


def test_an_event_that_is_not_there_cannot_be_held_out(sixty_four):
    with pytest.raises(Problem, match="no such event; there are drawn-earthquake, drawn-flood"):
        data.split(sixty_four, hold_out="joplin-tornado")
