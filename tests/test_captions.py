"""Captions: sets of them read right, a CLIP trained on them, and a classifier begun from what it learned."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import TEST, TRAIN, UNSAID, Problem


def pictures(folder, names):
    """Save a small random picture under each name; not the same twice."""
    g = np.random.default_rng(len(names))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name)


def karpathy(*images):
    """Karpathy's layout of images (file name, part, sentences)."""
    return dict(dataset="x", images=[
        dict(filename=name, imgid=k, split=part, sentids=[],
             sentences=[dict(raw=text, tokens=text.split(), imgid=k, sentid=0) for text in texts])
        for k, (name, part, texts) in enumerate(images)])


KARPATHY = karpathy(("a_1.png", "train", ["a river .", "water"]), ("7.png", "val", ["trees ."]),
                    ("8.png", "test", [" a beach . "]))
NWPU = {"river": [dict(filename="river_1.png", imgid=0, split="train", raw="a river .", raw_1="water",
                       sentids=[0], sentids_1=[1])],
        "dense_forest": [dict(filename="forest_1.png", imgid=1, split="val", raw="trees .", raw_1=" "),
                         dict(filename="forest_2.png", imgid=2, split="test", raw="a beach .")]}
RSICAP = dict(annotations=[dict(image_id="0", filename=f"P{k}.png", text_input="Describe.", text_output=text)
                           for k, text in enumerate(["a river .", "trees .", "a beach ."])])


@pytest.mark.parametrize("content, file, folders, classes, parts", [
    (KARPATHY, "dataset_rsicd.json", ["imgs"] * 3, ["river", "forest", ""], [TRAIN, 1, TEST]),
    (KARPATHY, "dataset.json", ["imgs/deep", "imgs", "."], [""] * 3, [TRAIN, 1, TEST]),
    (NWPU, "dataset_nwpu.json", ["river", "dense_forest", "dense_forest"],
     ["river", "dense_forest", "dense_forest"], [TRAIN, 1, TEST]),
    (RSICAP, "captions.json", ["images"] * 3, [""] * 3, [UNSAID] * 3)])
def test_every_layout_gives_pictures_sentences_classes_and_parts(tmp_path, content, file, folders, classes,
                                                                 parts):
    root, names = tmp_path / "t", [name for name, *_ in rows_of(tmp_path, content)]
    paths = [f"{folder}/{name}".removeprefix("./") for folder, name in zip(folders, names, strict=True)]
    pictures(root, [*paths, "imgs/of_no_sentence.png"])
    (root / file).write_text(json.dumps(content))
    if "rsicd" in file:
        (root / "txtclasses_rsicd").mkdir()
        (root / "txtclasses_rsicd/river.txt").write_text("a_1.png\nelse.png\n")
        (root / "txtclasses_rsicd/forest.txt").write_text("7.png")
    for _ in range(2):                                                   # the second time from the cache
        s = data.read(root, 8, cache=tmp_path / "cache")
        assert s.names == paths and s.given.tolist() == parts
        assert [s.classes[c] for c in s.labels] == classes and s.classes == sorted(set(classes))
        assert s.captions[1:] == [("trees .",), ("a beach .",)] and s.captions[0][0] == "a river ."
        assert (s.images[2] == torch.from_numpy(data.decode(root / paths[2], 8))).all()
    if file != "captions.json":
        assert s.captions[0] == ("a river .", "water")
        assert {part: index.tolist() for part, index in data.split(s).items()} == dict(train=[0], val=[1],
                                                                                        test=[2])


def rows_of(folder, content):
    """What caption_rows finds in a JSON of this content."""
    (folder / "some.json").write_text(json.dumps(content))
    return data.caption_rows(folder / "some.json")


def test_ucm_captions_are_numbered_in_the_order_of_the_classes_of_uc_merced(tmp_path):
    images = [(f"{n}.tif", "train", ["x"]) for n in range(2100, 0, -1)]
    kinds = {name: kind for name, _, kind, _ in rows_of(tmp_path, karpathy(*images))}
    for n, kind in ((1, "agricultural"), (100, "agricultural"), (101, "airplane"), (2000, "storagetanks"),
                    (2001, "tenniscourt"), (2100, "tenniscourt")):
        assert kinds[f"{n}.tif"] == kind
    assert len(set(kinds.values())) == 21
    assert {kind for _, _, kind, _ in rows_of(tmp_path, karpathy(*images[1:]))} == {""}      # another set


def test_captions_go_with_their_images_and_count_in_the_digest():
    def scenes(captions):
        images = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
        return data.Scenes(images, torch.tensor([0, 0, 0]), ["a"], list("xyz"), torch.arange(3),
                           captions=captions)

    s = scenes([("one", "two"), ("three",), ()])
    assert s[torch.tensor([2, 0])].captions == [(), ("one", "two")]
    assert s[torch.tensor([False, True, False])].captions == [("three",)]
    assert (s + scenes(None)).captions == [("one", "two"), ("three",), (), (), (), ()]
    assert len({scenes(c).digest for c in (None, [("one", "two"), (), ()], [("one",), ("two",), ()])}) == 3


def test_two_texts_of_one_picture_are_both_its_sentences_and_doubles_are_a_group(tmp_path):
    content = dict(annotations=[dict(filename=f, text_output=t) for f, t in
                                [("b.png", "one"), ("a.png", "two"), ("b.png", "three"), ("c.png", "four")]])
    (tmp_path / "captions.json").write_text(json.dumps(content))
    pictures(tmp_path, ["a.png", "b.png"])
    (tmp_path / "c.png").write_bytes((tmp_path / "b.png").read_bytes())
    s = data.read(tmp_path, 8, cache=tmp_path / "cache")
    assert s.names == ["b.png", "a.png", "c.png"] and s.captions == [("one", "three"), ("two",), ("four",)]
    assert s.groups.tolist() == [0, 1, 0]


@pytest.mark.parametrize("text, said", [
    ("{", "no caption set.*JSON"), ("[1]", "no caption set"), ('{"images": [{"filename": "a"}]}', "'split'"),
    (json.dumps(karpathy(("a.png", "trian", ["x"]))), "trian"), ('{"river": 3}', "no caption set"),
    (json.dumps(karpathy(("a.png", "train", [" "]), ("b.png", "train", []))), "no sentence for a.png, b.png"),
    (json.dumps(dict(annotations=[dict(filename="a.png", text_output=None)])), "no caption set"),
    (json.dumps(karpathy(("a.png", "train", ["x"]), ("gone.png", "train", ["x"]))),
     r"has not 1 of the 2 pictures of dataset.json \(gone.png\)")])
def test_an_odd_caption_set_is_told_in_one_line(tmp_path, text, said):
    pictures(tmp_path, ["a.png"])
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(Problem, match=said) as problem:
        data.read(tmp_path, 8, cache=tmp_path / "cache")
    assert "\n" not in str(problem.value)


def test_pictures_that_are_missing_or_broken_are_left_out_with_their_sentences_if_asked(tmp_path):
    names = ["gone.png", "broken.png", "a.png"]
    (tmp_path / "dataset.json").write_text(json.dumps(karpathy(*[(n, "train", [n]) for n in names])))
    pictures(tmp_path, names[1:])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(Problem, match="--skip-broken"):
        data.read(tmp_path, 8, cache=tmp_path / "cache")
    s = data.read(tmp_path, 8, skip_broken=True, cache=tmp_path / "cache")
    assert s.names == ["a.png"] and s.captions == [("a.png",)]


def test_data_tells_the_sentences_of_a_caption_set(tmp_path, launch):
    names = [f"{k}.png" for k in range(3)]
    parts = "train", "val", "test"
    (tmp_path / "dataset.json").write_text(json.dumps(karpathy(
        *[(name, part, ["a river .", "b"]) for name, part in zip(names, parts, strict=True)])))
    pictures(tmp_path, names)
    said = launch(data, tmp_path, "--size", 8, "--out", tmp_path / "sheet/x.png").stdout
    assert "6 sentences, the first: a river ." in said and "1 train, 1 val, 1 test" in said


def test_a_tree_is_read_by_its_folders_again_when_the_sentences_are_gone(tmp_path):
    root = tmp_path / "t"
    pictures(root, ["river/river_1.png", "dense_forest/forest_1.png", "dense_forest/forest_2.png"])
    for _ in range(2):
        (root / "dataset_nwpu.json").write_text(json.dumps(dict(sorted(NWPU.items()))))
        assert data.read(root, 8, cache=tmp_path / "cache").captions[0] == ("trees .",)
        (root / "dataset_nwpu.json").unlink()
        assert data.read(root, 8, cache=tmp_path / "cache").captions == [()] * 3
