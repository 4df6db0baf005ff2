"""Captions: sets of them read right, a CLIP trained on them, and a classifier begun from what it learned."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data
import train_cls
from augment import compose
from data import TEST, TRAIN, UNSAID, Problem, Scenes
from train_cls import (
    LENGTH,
    chances,
    encode_texts,
    fit_clip,
    load_clip,
    recalls,
    sentences_of,
    word_tokens,
)
from vit import CLIP, Text, ViT


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


# ---- a CLIP from captions

TINY = train_cls.Config(size=8, patch=4, dim=16, depth=1, heads=2, steps=6, batch=4, warmup=2, augment="none")
SAID = [("A river.", "water, 2 boats"), ("trees",), ("A beach", "sand; a river", "trees!"), ("a Road",),
        ("trees",), ("houses", "a road")]


def captioned(seed=0):
    """Six random pictures with sentences, of classes a and b."""
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=data.rng(seed))
    return Scenes(images, torch.arange(6) % 2, ["a", "b"], [f"{k}.png" for k in range(6)], torch.arange(6),
                  captions=SAID)


def test_words_are_their_places_and_what_is_not_known_is_left_out():
    words = ["2", "boats", "river"]
    ids = word_tokens(["River, 2 (boats)!", "a boat", "", "river " * 100], words)
    assert ids.shape == (4, LENGTH) and ids[3].tolist() == [4, *[3] * (LENGTH - 2), 5]
    assert ids[:3, :5].tolist() == [[4, 3, 1, 2, 5], [4, 5, 0, 0, 0], [4, 5, 0, 0, 0]]
    assert not ids[:3, 5:].any()
    assert word_tokens(["river", "a"], words).tolist() == [[4, 3, 5], [4, 5, 0]]     # no longer than need be


def test_clip_training_is_this_loop_written_out(adamw_by_hand, in_float64):
    """Of every image one of its sentences; each must find the other in the batch."""
    scenes, cfg = captioned(), replace(TINY, steps=3, lr=4e-3, decay=0.5, seed=7, augment="hflip,color")
    model, tokens = fit_clip(scenes, cfg)
    words = tokens.keywords["words"]
    assert words == "2 a beach boats houses river road sand trees water".split()

    torch.manual_seed(7)
    twin = CLIP(ViT(16, 8, 4, 16, 1, 2), Text(13, LENGTH, 16, 1, 2))
    by_hand = adamw_by_hand(twin.parameters(), (0.9, 0.999), lambda p: 0.5 * (p.ndim > 1))
    for step, rate in enumerate((2e-3, 4e-3, 4e-3)):
        g = data.rng(7, step)
        chosen = torch.randperm(6, generator=g)[:4].tolist()
        dice = torch.rand(4, generator=g).tolist()
        texts = [SAID[k][int(u * len(SAID[k]))] for k, u in zip(chosen, dice, strict=True)]
        x, _ = compose(cfg.augment)(scenes.images[chosen] / 127.5 - 1, None, g)
        z, t = twin.encode_image(x), twin.encode_text(word_tokens(texts, words))
        scores = twin.log_scale.exp() * z @ t.T
        loss = -(scores.log_softmax(1).diag().mean() + scores.log_softmax(0).diag().mean()) / 2
        gradients = torch.autograd.grad(loss, by_hand.parameters)
        norm = sum(d.square().sum() for d in gradients).sqrt().item()
        by_hand.move([d / max(1.0, norm + 1e-6) for d in gradients], rate)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")


def test_a_killed_clip_goes_on_and_is_read_again(tmp_path, monkeypatch):
    whole, tokens = fit_clip(captioned(), TINY)
    save = data.save_checkpoint
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(data, "save_checkpoint", lambda *args: [save(*args), exec("raise KeyboardInterrupt")])
        fit_clip(captioned(), TINY, tmp_path / "clip.pt", every=3)
    fit_clip(captioned(), TINY, tmp_path / "clip.pt", every=3)
    again, same, size = load_clip(tmp_path / "clip.pt")
    assert same.keywords == tokens.keywords and size == 8 and not again.training and not whole.training
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=0)
    other = replace(captioned(), captions=[*SAID[:-1], ("trees",)])
    with pytest.raises(Problem, match="another --out"):
        fit_clip(other, TINY, tmp_path / "clip.pt")


def test_images_and_sentences_that_belong_together_are_found_together():
    scenes = captioned()
    scenes.captions = [("red",), ("green",), ("blue",), ("red red",), ("blue green",), ("green red",)]
    model, tokens = fit_clip(scenes, replace(TINY, steps=90, batch=6, lr=1e-2))
    texts, owner = sentences_of(scenes)
    scores = model.encode_image(data.to_float(scenes.images)) @ encode_texts(model, tokens, texts).T
    assert recalls(scores, owner, (1,)) == ([1.0], [1.0])


def test_recall_is_what_a_loop_over_the_sorted_finds():
    g = torch.Generator().manual_seed(0)
    owner = torch.cat([torch.arange(7), torch.randint(7, (13,), generator=g)])
    scores = torch.randn(7, 20, generator=g)
    to_text, to_image = recalls(scores, owner, (1, 3))
    for k, a, b in zip((1, 3), to_text, to_image, strict=True):
        best_texts, best_images = scores.argsort(1, True)[:, :k], scores.argsort(0, True)[:k]
        assert a == pytest.approx(np.mean([n in owner[best_texts[n]] for n in range(7)]))
        assert b == pytest.approx(np.mean([owner[m] in best_images[:, m] for m in range(20)]))
    assert recalls(torch.zeros(7, 20), owner, (1, 3)) == ([0, 0], [0, 0])    # who says nothing finds nothing
    by_chance = [recalls(torch.randn(7, 20, generator=g), owner, (1, 3)) for _ in range(500)]
    assert np.allclose(np.mean(by_chance, 0), chances(owner, 7, (1, 3)), atol=0.02)
