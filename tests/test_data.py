"""data.py: pixels are exact, splits do not leak, every layout is read as its authors meant it."""
import importlib
import io
import json
import math
import os
import runpy
import shutil
import sys
import zlib
from collections import Counter
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data
import train_cls
import train_gen
from data import Scenes, UserError

NAN = float("nan")
REAL = [p / "shared/data/xbd" for p in Path(__file__).parents if (p / "shared/data/xbd").is_dir()]
RED, GREEN, BLUE, GREY = (200, 40, 40), (40, 160, 60), (30, 60, 190), (128, 128, 128)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def pictures(root, *names):
    for name, pixels in zip(names, noise(len(names), 20, 20, 3), strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name)
    return root


def tree(root, classes=("forest", "river"), count=6):
    return pictures(root, *[f"{name}/{name}_{k}.png" for name in classes for k in range(count)])


def scenes(groups, labels, official=None, **more):
    """Black images of the classes a and b, with these groups and parts."""
    n = len(labels)
    official = torch.tensor(official or [-1] * n)
    return Scenes(torch.zeros(n, 3, 2, 2, dtype=torch.uint8), torch.tensor(labels), ["a", "b"],
                  [str(k) for k in range(n)], torch.tensor(groups), official, **more)


@pytest.fixture
def read(tmp_path):
    return lambda root, size=8, **flags: data.read(root, size, cache=tmp_path / "cache", **flags)


# ---- numbers and pictures

def test_to_float_is_affine_and_to_uint8_its_rounded_inverse():
    values = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(values)
    assert data.to_float(x) is x                                          # such as features
    assert_close(x, 2 * values.float() / 255 - 1, rtol=0, atol=1e-6)
    for shift in (0, 0.9 / 255, -0.9 / 255):                     # less than half a level
        assert (data.to_uint8(x + shift) == values).all()
    assert data.to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]      # cut off, not wrapped


def test_random_numbers_follow_from_the_whole_key():
    keys = (0, 1), (0, 1), (1, 0), (0, 2), (0, 1, 0), (2**32, 1)
    draws = [torch.rand(1, generator=data.rng(*key)).item() for key in keys]
    assert draws[0] == draws[1] and len(set(draws)) == 5
    assert data.rng(1, 2).initial_seed() == 2946223120           # all results hang on it
    assert data.step_rng(1, 2, "cpu").initial_seed() == 2946223120


def test_decode_takes_the_upright_central_square_and_reduces_it_with_antialiasing(tmp_path):
    pixels, exif = noise(32, 64, 3), Image.Exif()
    pixels[:, 16:48] = np.indices((32, 32)).sum(0)[..., None] % 2 * 255       # a fine checkerboard
    wide = Image.fromarray(pixels)
    wide.save(tmp_path / "wide.png")
    exif[0x112] = 6                                              # the camera was held sideways
    wide.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    found = data.decode(tmp_path / "wide.png", 8)
    square = wide.resize((8, 8), Image.Resampling.BICUBIC, (16, 0, 48, 32))
    assert (found == np.asarray(square).transpose(2, 0, 1)).all() and found.dtype == np.uint8
    assert abs(found.astype(int) - 127)[:, 2:-2, 2:-2].max() < 6              # grey, no pattern
    assert (data.decode(tmp_path / "turned.png", 8) == found).all()
    for side in (256, 257):                                      # a JPEG decoder may reduce it
        path = data.draw_tree(tmp_path / str(side), 1, size=side) / "forest/forest_001.jpg"
        slow = np.asarray(Image.open(path).resize((32, 32)), float).transpose(2, 0, 1)
        assert np.sqrt(((data.decode(path, 32) - slow)**2).mean()) < 2.5      # grey levels


def test_every_kind_of_picture_becomes_rgb_and_more_than_8_bits_are_refused(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = Image.fromarray(ramp)
    for name, mode in (("grey.png", "L"), ("palette.png", "P"), ("alpha.png", "LA"),
                       ("colour.tif", "RGB"), ("web.webp", "RGB"), ("a.bmp", "L")):
        grey.convert(mode).save(tmp_path / name, lossless=True)
        assert (data.decode(tmp_path / name, 16) == ramp).all()
    for kind in (np.uint16, np.int32, np.float32):
        Image.fromarray(ramp.astype(kind)).save(tmp_path / f"{kind.__name__}.tif")
    header = bytearray((tmp_path / "grey.png").read_bytes())
    header[24:26] = 16, 2                                        # its bits per channel, and RGB
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (tmp_path / "rgb.png").write_bytes(header)
    for name in ("uint16.tif", "int32.tif", "float32.tif", "rgb.png"):
        with pytest.raises(ValueError, match="8 bits"):
            data.decode(tmp_path / name, 16)


def test_a_mask_is_saved_as_opacity_and_a_grid_has_white_lines(tmp_path):
    image = noise(4, 8, 8)
    data.save_picture(data.to_pil(torch.from_numpy(image)), tmp_path / "a.png")
    assert (data.decode(tmp_path / "a.png", 8) == image[:3]).all()            # colours as they were
    with Image.open(tmp_path / "a.png") as pil:
        assert (np.array(pil.getchannel("A")) == image[3]).all()
    images, expected = noise(3, 3, 4, 4), np.full((3, 12, 12), 255, np.uint8)
    expected[:, 1:5, 1:5], expected[:, 1:5, 7:11], expected[:, 7:11, 1:5] = images
    large = np.asarray(data.grid(torch.from_numpy(images), 2, zoom=3))
    assert (large == expected.transpose(1, 2, 0).repeat(3, 0).repeat(3, 1)).all()
    named = np.asarray(data.grid(torch.from_numpy(images), 2, zoom=3, names=["one", "", "three"]))
    assert (named[:, 56:] == large).all() and (named[:, :8] == 255).all()
    assert all((row[:, :56] < 128).any() for row in np.split(named, 2))   # one, three


# ---- the split

def groups_of(found, parts):
    """Return the groups of train, val and test, after a check that these share none."""
    train, val, test = (set(found.groups[index].tolist()) for index in parts.values())
    assert not (train & val or train & test or val & test)
    return train, val, test


def test_a_split_is_3_to_1_to_1_in_each_class_and_follows_from_its_seed():
    ours = scenes(list(range(200)), [0] * 150 + [1] * 50)
    parts = data.split(ours, seed=3)
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(200))
    shares = {part: ours.labels[index].bincount().tolist() for part, index in parts.items()}
    assert shares == dict(train=[90, 30], val=[30, 10], test=[30, 10])
    again, other = (data.split(ours, seed=seed)["test"].tolist() for seed in (3, 4))
    assert parts["test"].tolist() == again != other
    given = scenes(list(range(100)), [0, 1] * 50, [2] * 20 + [-1] * 80)       # 3 : 1 beside a test
    assert [len(index) for index in data.split(given).values()] == [60, 20, 20]


def test_the_split_and_the_digest_are_those_of_the_published_results():
    images = torch.arange(240).reshape(20, 3, 2, 2).to(torch.uint8)
    ours = replace(scenes(list(range(20)), [0] * 10 + [1] * 10), images=images)
    parts = {part: index.tolist() for part, index in data.split(ours, seed=3).items()}
    assert parts == dict(train=[1, 2, 3, 5, 6, 8, 12, 13, 15, 16, 17, 19], val=[0, 7, 10, 11],
                         test=[4, 9, 14, 18])                    # the classes are shuffled apart
    assert data.choose(ours, torch.tensor(parts["train"]), 2, 1).tolist() == [2, 6, 12, 16]
    assert ours.digest == "c0a8f5c62976"


@pytest.mark.parametrize("known", [(-1,), (-1, 2), (-1, 1, 2), (-1, 0, 1, 2), (0, 1, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_no_group_is_ever_cut_and_official_parts_are_kept(known, seed):
    g = np.random.default_rng(seed)
    groups, labels, official = g.integers(0, 70, 200), g.integers(0, 2, 200), g.choice(known, 200)
    ours = scenes(groups.tolist(), labels.tolist(), official.tolist())
    parts, place = data.split(ours, seed), np.full(200, -1)
    groups_of(ours, parts)
    for k, index in enumerate(parts.values()):
        place[index.numpy()] = k
    assert (place[official == 2] == 2).all()                     # test keeps all that it has
    named, lost = official != -1, place == -1
    assert (lost | (place == official))[named].all()
    for k in np.flatnonzero(lost & named):                       # a duplicate is in test, or in val
        assert official[k] < official[groups == groups[k]].max()
    assert (lost[~named] == (0 in known)).all()                  # lists leave the others out


def test_smaller_choices_are_part_of_larger_ones():
    ours, index = scenes(list(range(100)), [0, 1] * 50), torch.arange(20, 100)
    small, large, every, other = (set(data.choose(ours, index, n, seed).tolist())
                                  for n, seed in ((5, 1), (20, 1), (0, 1), (5, 2)))
    assert small < large < every == set(index.tolist()) and small != other
    assert ours.labels[[*large]].bincount().tolist() == [20, 20]


def test_scenes_keep_what_belongs_to_each_image_and_their_digest_sees_it():
    ours = scenes([5, 5, 7], [0, 1, 1], [0, 2, -1], captions=[("one", "two"), ("three",), ()],
                  metadata=torch.tensor([[1.0], [2.0], [3.0]]))
    two = ours[torch.tensor([2, 0])]
    assert two.names == ["2", "0"] and len(two) == len(two.images) == 2
    assert (two.groups.tolist(), two.labels.tolist()) == ([7, 5], [1, 0])
    assert (two.official.tolist(), two.metadata.tolist()) == ([-1, 0], [[3], [1]])
    assert two.captions == [(), ("one", "two")]
    assert ours[torch.tensor([False, True, False])].names == ["1"]
    ours, pixels = scenes([0, 1], [0, 1]), torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    pixels[1, 2, 1, 1] = 1
    changes = [dict(labels=torch.tensor([1, 0])), dict(classes=["a", "c"]), dict(names=["0", "y"]),
               dict(images=pixels), dict(images=ours.images.view(2, 3, 1, 4)),
               dict(captions=[("one", "two"), ()]), dict(captions=[("one",), ("two",)])]
    assert len({ours.digest, *(replace(ours, **change).digest for change in changes)}) == 8


# ---- xBD

SQUARE = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
CIRCLE = np.array([(math.cos(k / 16 * math.pi), math.sin(k / 16 * math.pi)) for k in range(32)])
ELL = np.array([(-1, -1), (1, -1), (1, 0.1), (0.1, 0.1), (0.1, 1), (-1, 1)])


def rectangle(left, top, right, bottom):
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)])


def test_a_polygon_is_its_outline_less_its_holes_and_so_are_its_area_and_its_mask():
    text = "POLYGON ((0 0, 9.5 0, 9.5 8e0, -1e-07 8, 0 0), (2 2, 4 2, 4 4, 2 2))"
    outline, hole = data.wkt_polygon(text)
    assert outline.tolist() == [[0, 0], [9.5, 0], [9.5, 8], [-1e-7, 8], [0, 0]]
    assert hole.tolist() == [[2, 2], [4, 2], [4, 4], [2, 2]]
    for text in ("CIRCLE ((0 0, 1 1))", "POLYGON EMPTY", "POLYGON ((0 nan, 1 1))", "POLYGON ((1))"):
        with pytest.raises(ValueError):
            data.wkt_polygon(text)
    outline, hole = rectangle(0, 0, 20, 10), rectangle(2, 2, 5, 4)
    for rings in ([outline, hole], [outline[::-1], hole], [outline[:-1] + 1000, hole[::-1]]):
        assert data.area(rings) == pytest.approx(200 - 6)        # whichever way they turn
    rings = [rectangle(2, 2, 14, 10), rectangle(4, 4, 8, 6)[::-1]]
    expected = np.zeros((16, 16, 1))
    expected[2:10, 2:14], expected[4:6, 4:8] = 255, 0
    assert (data.draw_mask(rings, np.array([0, 0, 16, 16]), 16) == expected).all()
    assert (expected > 0).sum() == data.area(rings)
    enlarged = data.draw_mask(rings, np.array([2, 2, 10, 10]), 16)            # 2 : 1
    assert (enlarged > 0).sum() == 2**2 * (8 * 8 - 4 * 2)


@pytest.mark.parametrize("shape", [CIRCLE, SQUARE, ELL])
def test_masks_have_the_area_and_the_place_of_their_polygons(shape):
    """Houses of 8 to 16 pixels a side, turned at random; a third have a courtyard."""
    g, counted, true, shifts = np.random.default_rng(0), 0, 0, []
    for k in range(300):
        angle, half, middle = g.uniform(0, np.pi), g.uniform(4, 8, 2), g.uniform(11, 13, 2)
        turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
        outlines = [shape, 0.3 * SQUARE - 0.35][:1 + (k % 3 == 0)]
        rings = [middle + half * points @ turn for points in outlines]
        mask = data.draw_mask(rings, np.array([0, 0, 24, 24]), 24)[..., 0] > 0
        counted, true = counted + mask.sum(), true + data.area(rings)
        if len(rings) == 1 and shape is not ELL:
            shifts.append(np.argwhere(mask)[:, ::-1].mean(0) + 0.5 - middle)
    assert counted / true == pytest.approx(1, abs=0.004)
    assert abs(np.mean(shifts or [0], 0)).max() < 0.03           # pixels


def test_the_square_around_a_building_is_its_longer_side_and_half_of_it_on_each_side():
    square = data.crop_square(rectangle(100, 40, 140, 60))
    assert square.tolist() == [120 - 40, 50 - 40, 120 + 40, 50 + 40]
    square = data.crop_square(rectangle(-2, 3, 8, 13))           # 32 pixels at least
    assert square.tolist() == [3 - 16, 8 - 16, 3 + 16, 8 + 16]


def tile(root, name, buildings, folder="train", size=128, colours=(GREY, GREY), places=(), **more):
    """Write a tile; its buildings are (subtype, rings, colour), rectangles in the picture after."""
    before, pixels = (np.full((size, size, 3), colour, np.uint8) for colour in colours)
    polygons = []
    for k, (subtype, rings, colour) in enumerate(buildings):
        left, top, right, bottom = rings[0][[0, 2]].ravel().clip(0).astype(int)
        pixels[top:bottom, left:right] = colour
        texts = [", ".join(f"{x} {y}" for x, y in ring) for ring in rings]
        polygons.append(dict(properties=dict(subtype=subtype, uid=f"{name}-{k}"),
                             wkt=f"POLYGON (({'), ('.join(texts)}))"))
    for part in ("images", "labels"):
        (root / folder / part).mkdir(parents=True, exist_ok=True)
    for time, picture in (("pre", before), ("post", pixels)):
        Image.fromarray(picture).save(root / f"{folder}/images/{name}_{time}_disaster.png")
    label = dict(features=dict(lng_lat=places, xy=polygons),
                 metadata=dict(gsd=2.4, width=size, height=size) | more)
    (root / f"{folder}/labels/{name}_post_disaster.json").write_text(json.dumps(label))
    return root


def house(subtype="no-damage", box=(40, 40, 60, 60), colour=RED):
    return subtype, [rectangle(*box)], colour


def test_buildings_of_a_class_and_64_pixels_are_read_the_others_counted(tmp_path, read, capsys):
    yard = "destroyed", [rectangle(60, 60, 70, 70), rectangle(61, 61, 69, 69)], RED    # 36 left
    subtypes = "destroyed", "un-classified", "no-damage", "major-damage", "minor-damage"
    boxes = [(10 * k, 10 * k, 10 * k + 8, 10 * k + 8) for k in range(5)]
    large = [house(*pair) for pair in zip(subtypes, boxes, strict=True)]
    boxes = (30, 30, 37.9, 38), (-40, 50, -10, 80), (100, 135, 150, 180)
    small = [house(box=box) for box in boxes]
    half_off = house(box=(120, -30, 160, 8))                     # 8 x 8 are left
    root = tile(tmp_path / "x", "storm_00000001", [*large, *small, yard, half_off])
    for _ in range(2):                                           # then from the cache
        found = read(root, 32)
        assert found.classes == ["no-damage", "minor-damage", "major-damage", "destroyed"]
        assert found.labels.tolist() == [3, 0, 2, 1, 0] and found.tiles
        assert found.names == [f"train/storm_00000001/storm_00000001-{k}" for k in (0, 2, 3, 4, 9)]
        printed = capsys.readouterr().out
        assert all(text in printed for text in ("5 buildings", "1 un-classified", "4 too small"))


@pytest.mark.parametrize("box", [(40, 50, 60, 70), (0, 0, 20, 20), (108, 108, 128, 128),
                                 (-9, 60, 21, 78), (1, 5, 13, 35)])
def test_a_building_is_in_the_middle_of_its_crop_also_at_the_edge_of_its_tile(tmp_path, box):
    root = tile(tmp_path / "x", "a_00000001", [house(box=box)])
    image = data.read_xbd(root, 32, mask=True, cache=tmp_path).images[0].long()
    inside = image[3] > 0
    for places in inside.nonzero().T:
        assert abs(places.min() + places.max() - 31) <= 1
    assert (image[:3, 16, 16] - torch.tensor(RED)).abs().max() < 8
    assert image[0][inside].float().mean() > 185                 # the mask lies on the building


def test_a_crop_is_mirrored_beyond_the_edge_and_antialiased(tmp_path, read):
    stripe = house("un-classified", (0, 50, 4, 60), BLUE)
    root = tile(tmp_path / "x", "a_00000001", [house(box=(0, 40, 20, 60)), stripe])
    image = read(root, 40).images[0].long()                      # 1 : 1, the tile begins at 10
    for column, colour in ((11, BLUE), (8, BLUE), (2, RED)):
        assert (image[:, 25, column] - torch.tensor(colour)).abs().max() < 3
    root = tile(tmp_path / "y", "a_00000001", [house(box=(0, 0, 128, 128))])
    board = np.indices((128, 128)).sum(0).astype(np.uint8) % 2 * 255
    Image.fromarray(board).save(root / "train/images/a_00000001_post_disaster.png")
    assert (read(root, 16).images.float() - 127.5).abs().max() < 8


def test_after_comes_first_then_before_then_the_mask_of_this_building_alone(tmp_path):
    yard = "no-damage", [rectangle(30, 30, 60, 60), rectangle(40, 40, 50, 50)], RED
    buildings = yard, house(box=(62, 30, 80, 60))
    root = tile(tmp_path / "x", "a_00000001", buildings, colours=(BLUE, GREEN))
    mask = torch.zeros(60, 60, dtype=torch.uint8)
    mask[15:45, 15:45], mask[25:35, 25:35] = 255, 0
    for pre, masked in product((False, True), (False, True)):
        image = data.read_xbd(root, 60, pre, masked, tmp_path).images[0]      # 1 : 1
        assert image.shape == (3 + 3 * pre + masked, 60, 60) and image.dtype == torch.uint8
        assert tuple(image[:3, 1, 1].tolist()) == GREEN and tuple(image[:3, 30, 30].tolist()) == RED
        assert not pre or tuple(image[3:6, 30, 30].tolist()) == BLUE
        assert not masked or (image[-1] == mask).all()


def test_a_group_is_a_tile_in_whichever_folder_and_has_its_metadata(tmp_path, read, capsys):
    two = [house(), house("destroyed", (80, 80, 99, 99))]
    tiles = dict(tier3=["a_00000001"], hold=["a_00000001"], test=["b_00000001"],
                 train=["a_00000002", "b_00000002", "b_00000003"])
    for k, (folder, name) in enumerate((f, name) for f, names in tiles.items() for name in names):
        root = tile(tmp_path / "x", name, two, folder, colours=(GREY, (40 * k,) * 3))
    tile(root, "c_00000001", [])
    (root / "train/images/b_00000002_post_disaster.png").unlink()
    (root / "train/labels/b_00000003_post_disaster.json").unlink()
    (root / "train/images/._a_00000009_post_disaster.png").touch()            # macOS leaves such
    found, pairs = read(root, 32), set()
    for name, group in zip(found.names, found.groups.tolist(), strict=True):
        pairs.add((name.split("/")[1], group))
    assert len(found) == 8 and len(pairs) == 3 == len({group for _, group in pairs})
    in_test = [name.startswith(("test/", "hold/")) for name in found.names]
    assert (found.official == 2).tolist() == in_test and sum(in_test) == 4
    assert "2 tiles" in capsys.readouterr().out
    place = dict(wkt="POLYGON ((-78 34, -78 36, -80 36, -80 34))")
    about = dict(places=[place], sun_elevation=61.5, capture_date="2018-09-20T16:04")
    found = read(tile(tile(tmp_path / "y", "a_00000001", two), "b_00000002", two[:1], **about))
    names = " ".join(data.XBD_METADATA)
    assert names == "longitude latitude gsd off_nadir_angle sun_elevation month"
    first, second = [NAN, NAN, 2.4, NAN, NAN, NAN], [-79, 35, 2.4, NAN, 61.5, 9]
    assert_close(found.metadata, torch.tensor([first, first, second]), equal_nan=True)


@pytest.mark.skipif(not REAL, reason="needs shared/data/xbd")
def test_a_real_label_gives_its_classes_metadata_and_the_masks_beside_it(tmp_path, read):
    name = "joplin-tornado_00000050_post_disaster"               # its picture lies elsewhere
    root = tile(tmp_path / "x", name[:-14], [], size=1024)
    content = (REAL[0] / f"train/labels/{name}.json").read_bytes()
    (root / f"train/labels/{name}.json").write_bytes(content)
    found = read(root)
    assert found.labels.bincount(minlength=4).tolist() == [0, 0, 3, 11]
    expected = torch.tensor([-94.47, 37.07, 2.35256, 28.43028, 71.85318, 5])
    assert_close(found.metadata[0], expected, rtol=0, atol=0.01)
    drawn, values = np.zeros((1024, 1024)), {"major-damage": 3, "destroyed": 4, "un-classified": 5}
    for polygon in json.loads(content)["features"]["xy"]:
        mask = data.draw_mask(data.wkt_polygon(polygon["wkt"]), np.array([0, 0, 1024, 1024]), 1024)
        drawn[mask[..., 0] > 0] = values[polygon["properties"]["subtype"]]
    with Image.open(REAL[0] / f"{name}_b1.png") as pil:
        theirs = np.asarray(pil)
    both, either = (drawn > 0) & (theirs > 0), (drawn > 0) | (theirs > 0)
    assert both.sum() / either.sum() >= 0.93 and (drawn == theirs)[both].mean() > 0.99


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Draw 64 tiles, 16 of which are in test: the tree, and its buildings."""
    root = data.draw_xbd(tmp_path_factory.mktemp("drawn") / "xbd", 64, side=192)
    return root, data.read_xbd(root, 16, pre=True, mask=True, cache=root.parent / "cache")


@pytest.mark.parametrize("hold_out", ["", "drawn-flood"])
def test_no_tile_is_cut_and_an_event_held_out_is_in_test_alone(drawn, hold_out):
    _, found = drawn
    parts = data.split(found, hold_out=hold_out)
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(len(found)))
    train, val, _ = groups_of(found, parts)
    assert len(train) / (len(train) + len(val)) == pytest.approx(0.75, abs=0.02)
    test, place = hold_out or "test", 1 if hold_out else 0       # test/drawn-flood_00000001/7
    folders = {part: {found.names[i].split("/")[place].split("_")[0] for i in index}
               for part, index in parts.items()}
    assert folders["test"] == {test} and test not in folders["train"] | folders["val"]


def test_a_choice_of_tiles_is_whole_and_nested_and_takes_only_what_is_offered(drawn):
    _, found = drawn
    train = data.split(found)["train"]
    few, more, every = (set(data.choose(found, train, n, 0).tolist()) for n in (12, 24, 0))
    assert few < more < every == set(train.tolist())
    tiles = found.groups[sorted(few)].unique()
    assert len(tiles) == 12 and torch.isin(found.groups[train], tiles).sum() == len(few)
    offered = set(range(0, len(found), 2))
    assert set(data.choose(found, torch.tensor(sorted(offered)), 30, 0).tolist()) < offered
    for count, text in ((1, "no image to train on is"), (99, "99 asked .* tiles")):
        with pytest.raises(UserError, match=text):
            data.choose(found, train, count, 0)


def test_a_drawing_follows_from_its_seed_its_class_and_its_number_alone(tmp_path, read):
    for draw, count, files in ((data.draw_tree, 2, "*/*.jpg"), (data.draw_xbd, 5, "*/*/*")):
        folder = tmp_path / draw.__name__
        roots = [draw(folder / str(how), *how) for how in ((count,), (count + 3,), (count, 1))]
        names = [path.relative_to(roots[0]) for path in roots[0].glob(files)]
        first, more, other = ([(root / name).read_bytes() for name in names] for root in roots)
        assert first == more and len(set(first)) in (16, 15) and not set(first) & set(other)
    if PIL.__version__ == "13.0.0":                              # another one may round differently
        assert read(data.draw_tree(tmp_path / "t", 2, size=32), 16).digest == "c4ee9423c370"
        assert read(data.draw_xbd(tmp_path / "x", 4, side=128), 16).digest == "89334c6dd236"


def test_drawn_damage_is_as_frequent_as_stated_and_shows_after_the_disaster(drawn):
    (root, found), counts = drawn, {}
    for path in root.glob("*/labels/*.json"):
        content = json.loads(path.read_bytes())
        count = counts.setdefault(content["metadata"]["disaster"], Counter())
        count.update(polygon["properties"]["subtype"] for polygon in content["features"]["xy"])
    stated = {"drawn-hurricane": (52, 29, 9, 7, 3), "drawn-flood": (73, 5, 16, 3, 3),
              "drawn-wildfire": (76, 1, 2, 18, 3), "drawn-earthquake": (94, 1, 1, 1, 3)}
    for event, percents in stated.items():
        seen = [100 * counts[event][name] / counts[event].total()
                for name in (*found.classes, "un-classified")]
        assert seen == pytest.approx(percents, abs=7)
    x, inside = found.images.float(), found.images[:, 6:] > 0
    x = x - x.mean((2, 3), keepdim=True)
    change = ((x[:, :3] - x[:, 3:6]).abs() * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3))
    none, minor, _, destroyed = (change[found.labels == c].median() for c in range(4))
    assert minor > 1.3 * none and destroyed > 2 * none


# ---- folders and captions

def test_a_class_is_a_folder_and_what_is_no_double_a_group(tmp_path, read, capsys):
    root = tree(tmp_path / "t", ("river", "beach", "forest"))
    pictures(root, "river/.hidden.png", ".trash/x.png", "river/deep/y.png", "top.png")
    (root / "river").rename(tmp_path / "elsewhere")              # links are followed
    (root / "river").symlink_to("../elsewhere")
    assert len(read(root, labelled=False)) == 18 + 2
    found = read(root, 20)
    assert found.classes == ["beach", "forest", "river"] and found.groups.tolist() == [*range(18)]
    for image, label, name in zip(found.images, found.labels, found.names, strict=True):
        assert found.classes[label] == name.split("/")[0]
        assert (data.decode(root / name, 20) == image.numpy()).all()
    chain = torch.tensor([[0], [1], [2], [9]]).expand(-1, 192)
    assert data.group_duplicates(chain).tolist() == [0, 0, 0, 3]         # duplicates of duplicates
    for k in range(9):
        shutil.copy(root / "forest/forest_0.png", root / f"river/copy_{k}.png")
    assert len(read(root)) == 27 and (out := capsys.readouterr().out)
    assert "9 pictures are in two classes: river/copy_0.png" in out and "10 look the same" in out
    (root / "river/river_2.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"river/river_2\.png cannot be read .*remove"):
        read(root)


def test_pictures_may_have_no_class(tmp_path, read):
    names = "a/1.png", "b/2.PNG", "b/deep/3.jpg"
    root = pictures(tmp_path / "t", *names, ".hidden.png", ".bin/4.png")
    every = read(root, labelled=False)
    assert every.names == [*names] and read(root).metadata.shape == (2, 0)
    one = read(root / "b/2.PNG", labelled=False)
    assert one.names == ["2.PNG"] and (one.images[0] == every.images[1]).all()


def test_lists_name_the_parts_and_what_they_leave_out_is_left_out(tmp_path, read, capsys):
    root = pictures(tmp_path / "t", *[f"{label}/{k}.png" for label in "ab" for k in range(5)],
                    "b/other.png", "a/more.png")
    names = "Test.txt", "Train_list.txt", "VALID.TXT", "test.csv", "trainval.txt"
    for k, name in enumerate(names):
        (root / name).write_text(f"a/{k}.JPG\nb/{2 - k}.png \n\nother.png\n")
    found = read(root)
    assert "test.csv is not read" in capsys.readouterr().out
    parts = [[found.names[k] for k in index] for index in data.split(found).values()]
    assert parts == [["a/1.png", "b/1.png"], ["a/2.png", "b/0.png"],
                     ["a/0.png", "b/2.png", "b/other.png"]]
    (root / "Test.txt").unlink()                     # what it has named is not trained on
    assert {"a/0.png", "b/2.png"}.isdisjoint(read(root).names)
    assert "7 not in a class folder or list: a/0.png" in capsys.readouterr().out
    for path in root.glob("*.[tT]*"):
        path.write_text("x.png")
    with pytest.raises(UserError, match="no picture is in its lists"):
        read(root)
    (root / "any-train.txt").write_bytes("a/0.png".encode("utf-16"))
    with pytest.raises(UserError, match="any-train.txt cannot be read"):
        read(root)


def karpathy(*images):
    """Describe images (file, part, sentences) in Karpathy's layout, but for what nobody reads."""
    return dict(images=[
        dict(filename=name, split=part, sentences=[dict(raw=text) for text in texts])
        for name, part, texts in images])


KARPATHY = karpathy(("a_1.png", "train", ["a river .", "water"]), ("7.png", "val", ["trees ."]),
                    ("8.png", "test", [" a beach . "]))
TWO_PARTS = json.loads(json.dumps(KARPATHY).replace('"test"', '"val"'))
RSICAP = dict(annotations=[dict(filename=name, text_output=text) for name, text in (
    ("a_1.png", "a river ."), ("a_1.png", "water"), ("7.png", "trees ."), ("8.png", "a beach ."))])


@pytest.mark.parametrize("content, file, folder, classes, official", [
    (KARPATHY, "dataset_rsicd.json", "RSICD_images", ["river", "forest", "beach"], [0, 1, 2]),
    (KARPATHY, "dataset.json", "deep/imgs", ["scene"] * 3, [0, 1, 2]),
    (TWO_PARTS, "dataset.json", "images", ["scene"] * 3, [-1, 2, 2]),     # val becomes test
    (RSICAP, "captions.json", "images", ["scene"] * 3, [-1] * 3)])
def test_a_caption_set_gives_sentences_parts_and_classes(tmp_path, read, content, file, folder,
                                                         classes, official):
    names = [f"{folder}/{name}" for name in ("a_1.png", "7.png", "8.png")]
    root = pictures(tmp_path / "t", *names, "imgs/without_a_sentence.png")
    (root / file).write_text(json.dumps(content))
    if "rsicd" in file:
        for name in ("forest", "lake"):
            data.write(root / f"txtclasses_rsicd/{name}.txt", "7.png")
        with pytest.raises(UserError, match="lists 7.png, and so does another class"):
            read(root)
        (root / "txtclasses_rsicd/lake.txt").unlink()
        with pytest.raises(UserError, match="2 pictures of .* in no class list, a_1.png first"):
            read(root)
        for name, files in dict(river="a_1.png\nelse.png\n", beach="8.png").items():
            data.write(root / f"txtclasses_rsicd/{name}.txt", files)
    for _ in range(2):                                           # then from the cache
        found = read(root)
        assert found.names == names and found.official.tolist() == official
        assert [found.classes[c] for c in found.labels] == classes
        assert found.captions == [("a river .", "water"), ("trees .",), ("a beach .",)]
        assert (data.decode(root / names[2], 8) == found.images[2].numpy()).all()


def test_captions_say_which_picture_and_which_list_they_mean(tmp_path, read, capsys):
    root = pictures(tmp_path / "t", *[f"{part}/{k}.png" for part in data.PARTS for k in range(2)])
    entries = [("0.png", part, ["x"]) for part in data.PARTS]
    (root / "dataset.json").write_text(json.dumps(karpathy(*entries)))
    with pytest.raises(UserError, match="0.png, which is in several folders"):
        read(root)
    entries = [(f"{part}/{k}.png", part, ["x"]) for part in data.PARTS for k in range(2)]
    (root / "dataset.json").write_text(json.dumps(karpathy(*entries)))
    shutil.copy(root / "test/0.png", root / "train/0.png")
    parts = data.split(read(root))
    assert [len(index) for index in parts.values()] == [1, 2, 2]
    assert "left out 1 of 6 images" in capsys.readouterr().out
    entries += [("val/1.png", "test", ["y"]), ("val/1.png", "train", ["z"])]
    (root / "dataset.json").write_text(json.dumps(karpathy(*entries)))
    found = read(root)                                           # test beats val and train
    assert (found.official[3], found.captions[3]) == (2, ("x", "y", "z"))
    data.split(scenes([0, 1, 2, 3, 4, 5], [0, 1] * 3, [0, 0, 1, 2, -1, -1]))
    assert "left out 2 of 6 images" in capsys.readouterr().out
    (root / "dataset_new.json").write_text("{}")
    with pytest.raises(UserError, match="keep one of them"):
        read(root)


def test_ucm_captions_are_numbered_in_the_order_of_the_classes_of_uc_merced(tmp_path, read):
    kinds = {1: "agricultural", 100: "agricultural", 101: "airplane", 2000: "storagetanks",
             2001: "tenniscourt", 2100: "tenniscourt"}
    root = pictures(tmp_path / "t", *[f"imgs/{n}.tif" for n in kinds])
    images = [(f"{n}.tif", "train", ["x"]) for n in range(2100, 0, -1)]
    for listed, expected in ((images, kinds), (images[:-2], dict.fromkeys(kinds, "scene"))):
        (root / "dataset.json").write_text(json.dumps(karpathy(*listed)))
        found = read(root)                                       # most are not there
        for name, label in zip(found.names, found.labels, strict=True):
            assert found.classes[label] == expected[int(name[5:-4])]
    for name in ("storagetanks", "storage_tanks", "StorageTanks"):
        assert data.in_words(name) == "storage tanks"


# ---- what all scripts share

def test_a_cache_is_used_until_a_file_or_the_size_changes(tmp_path, read, monkeypatch):
    root = tree(tmp_path / "t")
    first = read(root).images
    with monkeypatch.context() as m:
        m.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded again"))
        assert (read(root).images == first).all()
    paths = [root / f"river/river_{k}.png" for k in (4, 5)]
    contents = [path.read_bytes() for path in paths]
    for path, other in zip(paths, reversed(contents), strict=True):           # they change places
        path.write_bytes(other)
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))
    assert (read(root).images[[10, 11]] == first[[11, 10]]).all()
    for path in paths:
        os.utime(path, ns=(1, 1))
    assert len(contents[0]) == len(contents[1]) and not (read(root).images == first).all()
    for old, new in ((paths[0], root / "x"), paths[::-1], (root / "x", paths[1])):       # again
        old.rename(new)
    assert (read(root).images == first).all()
    paths[1].unlink()
    assert (read(root).images == first[:11]).all()
    assert read(root, 4).images.shape == (11, 3, 4, 4)

    root = tile(tmp_path / "x", "a_00000001", [house()])
    assert read(root).labels.tolist() == [0]
    tile(root, "a_00000001", [house("destroyed")])               # as long as before
    path = root / "train/labels/a_00000001_post_disaster.json"
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))
    assert read(root).labels.tolist() == [3]


@pytest.mark.parametrize("name", ["data", "train_gen", "train_cls", "experiment"])
def test_a_script_explains_the_flags_that_its_fields_become(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(f"{name}.py", run_name="__main__")
    shown = capsys.readouterr().out
    module = importlib.import_module(name)
    for f in fields(getattr(module, "Script", None) or module.Config):
        assert f"--{f.name.replace('_', '-')} " in shown and f.metadata["help"].split()[0] in shown
    argv = "--steps 7 --lr 2e-4 --test --augment none".split()
    cfg = data.launch(lambda cfg: cfg, train_cls.Script, argv)
    assert cfg == train_cls.Script(steps=7, lr=2e-4, test=True, augment="none")
    cfg = data.launch(lambda cfg: cfg, train_gen.Script, ["--mults", "3,4"])
    assert cfg == train_gen.Script(mults=(3, 4))


def test_data_py_shows_what_is_in_a_tree(tmp_path, launch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.draw_tree("t", 5)
    data.draw_xbd("x", 8)
    shown = launch(data, "--data", "t", "--size", 16, "--out", "x.png").stdout
    assert "40 images of 8 classes" in shown and "24 train, 8 val, 8 test" in shown
    with Image.open("x.png") as sheet:
        assert sheet.size == (8 * 17 + 16 + 10 * 18, 4 * 18)     # ten in a row, after names
    assert "8 tiles" in launch(data, "--data", "x", "--size", 16).stdout


def test_a_pipe_that_lacks_letters_gets_question_marks():
    for encoding, expected in (("ascii", "Flu? ? 1"), ("utf-8", "Fluß ± 1")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        data.Lasting(stream).write("Fluß ± 1")
        assert stream.buffer.getvalue().decode(encoding) == expected
