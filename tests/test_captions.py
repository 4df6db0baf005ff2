"""Captions: sets of them read right, a CLIP trained on them, and a classifier begun from what it learned."""
import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import data
import train_cls
from augment import compose
from data import TEST, TRAIN, UNSAID, Problem, Scenes, in_words
from train_cls import (
    LENGTH,
    Mixture,
    Tuned,
    begin_and_tune,
    embed,
    encode_texts,
    fit_clip,
    fit_mae,
    load_classifier,
    load_weights,
    recalls,
    recalls_by_chance,
    sentences_of,
    tune,
)
from vit import CLIP, TEMPLATES, Text, Tower, ViT, load_pretrained, tokenizer, word_tokens, zero_shot


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
    (KARPATHY, "dataset_rsicd.json", ["imgs"] * 3, ["river", "forest", "scene"], [TRAIN, 1, TEST]),
    (KARPATHY, "dataset.json", ["imgs/deep", "imgs", "."], ["scene"] * 3, [TRAIN, 1, TEST]),
    (NWPU, "dataset_nwpu.json", ["river", "dense_forest", "dense_forest"],
     ["river", "dense_forest", "dense_forest"], [TRAIN, 1, TEST]),
    (RSICAP, "captions.json", ["images"] * 3, ["scene"] * 3, [UNSAID] * 3)])
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
        assert s.names == paths and s.official.tolist() == parts
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
    assert {kind for _, _, kind, _ in rows_of(tmp_path, karpathy(*images[1:]))} == {"scene"}  # another set


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
    ("{", "no caption set.*Expecting"),
    ("[1]", "no caption set"), ('{"images": [{"filename": "a"}]}', "'split'"),
    (json.dumps(karpathy(("a.png", "trian", ["x"]))), "trian"), ('{"river": 3}', "no caption set"),
    (json.dumps(karpathy(("a.png", "train", [" "]), ("b.png", "train", []))), "no sentence for a.png, b.png"),
    (json.dumps(dict(annotations=[dict(filename="a.png", text_output=None)])), "no caption set"),
    (json.dumps(dict(annotations=[dict(filename=["a.png"], text_output="x")])), "is no name of a file"),
    (json.dumps(karpathy(("a.png", "train", ["x"]), ("gone.png", "train", ["x"]))),
     r"lacks 1 of the 2 pictures of dataset.json \(gone.png\)")])
def test_an_odd_caption_set_is_told_in_one_line(tmp_path, text, said):
    pictures(tmp_path, ["a.png"])
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(Problem, match=said) as problem:
        data.read(tmp_path, 8, cache=tmp_path / "cache")
    assert "\n" not in str(problem.value)


def test_two_caption_sets_or_two_pictures_of_one_name_are_refused(tmp_path):
    pictures(tmp_path, ["a.png"])
    (tmp_path / "dataset.json").write_text(json.dumps(karpathy(("a.png", "train", ["x"]))))
    (tmp_path / "old").mkdir()
    (tmp_path / "old/a.png").write_bytes((tmp_path / "a.png").read_bytes())
    with pytest.raises(Problem, match="several pictures of one name .a.png"):
        data.read(tmp_path, 8, cache=tmp_path / "cache")
    (tmp_path / "captions.json").write_text("{}")
    with pytest.raises(Problem, match="several caption sets"):
        data.read(tmp_path, 8, cache=tmp_path / "cache")


def test_pictures_that_are_missing_or_broken_are_left_out_with_their_sentences_if_asked(tmp_path):
    names = ["gone.png", "broken.png", "a.png"]
    (tmp_path / "dataset.json").write_text(json.dumps(karpathy(*[(n, "train", [n]) for n in names])))
    pictures(tmp_path, names[1:])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(Problem, match="--skip-broken"):
        data.read(tmp_path, 8, cache=tmp_path / "cache")
    s = data.read(tmp_path, 8, skip_broken=True, cache=tmp_path / "cache")
    assert s.names == ["a.png"] and s.captions == [("a.png",)]
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(Problem, match="no picture of dataset.json decodes"):
        data.read(tmp_path, 8, skip_broken=True, cache=tmp_path / "cache")


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

    def save_and_die(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(data, "save_checkpoint", save_and_die)
        fit_clip(captioned(), TINY, tmp_path / "clip.pt", every=3)
    fit_clip(captioned(), TINY, tmp_path / "clip.pt", every=3)
    again, same, size = load_weights(tmp_path / "clip.pt")
    assert same.keywords == tokens.keywords and size == 8 and not again.training and not whole.training
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(ValueError, match="clip.pt: a clip of ours, which train_cls.py --init reads"):
        load_pretrained(tmp_path / "clip.pt")
    other = replace(captioned(), captions=[*SAID[:-1], ("a road", "houses")])    # the same words
    with pytest.raises(Problem, match="another --out"):
        fit_clip(other, TINY, tmp_path / "clip.pt")


def test_a_checkpoint_of_ours_that_is_broken_is_not_taken_for_published_weights(tmp_path):
    fit_clip(captioned(), TINY, tmp_path / "clip.pt")
    data.save(tmp_path / "clip.pt", data.load(tmp_path / "clip.pt") | dict(config=dict(colour=3)))
    with pytest.raises(Problem, match="clip.pt is broken .*colour.*: train it again"):
        load_weights(tmp_path / "clip.pt")


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
    tie = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 1]])                   # texts 0 and 1 are of image 0
    assert recalls(tie, torch.tensor([0, 0, 1, 1]), (1, 2)) == ([0.5, 1.0], [0.75, 1.0])
    by_chance = [recalls(torch.randn(7, 20, generator=g), owner, (1, 3)) for _ in range(500)]
    assert np.allclose(np.mean(by_chance, 0), recalls_by_chance(owner, 7, (1, 3)), atol=0.02)


def test_luck_draws_texts_without_putting_them_back():
    of_texts, of_images = recalls_by_chance(torch.tensor([0, 0, 1]), 2, (1, 2))
    assert of_texts == pytest.approx([(2 / 3 + 1 / 3) / 2, (1 + 2 / 3) / 2]) and of_images == [0.5, 1.0]


# ---- tuning

def trained(tmp_path, **kw):
    """The checkpoint of a small CLIP."""
    fit_clip(captioned(), replace(TINY, **kw), tmp_path / "clip.pt")
    return str(tmp_path / "clip.pt")


def begun(path, classes):
    """A recogniser of classes that begins from weights."""
    return Tuned(*load_weights(path), classes)


def floats(scenes):
    return data.to_float(scenes.images)


@pytest.mark.parametrize("name, words", [
    ("denseresidential", "dense residential"), ("dense_residential", "dense residential"), ("river", "river"),
    ("DenseResidential", "dense residential"), ("golfcourse", "golf course")])
def test_names_of_classes_are_written_as_words(name, words):
    assert in_words(name) == words


def test_the_head_begins_with_what_the_texts_say(tmp_path):
    path = trained(tmp_path, lr=1e-2)
    scenes, (clip, tokens, _) = captioned(), load_weights(path)
    names = ["SandRiver", "trees"]
    model = begun(path, names)
    texts = [[t.format(name) for t in TEMPLATES] for name in ("sand river", "trees")]
    means = torch.stack([encode_texts(clip, tokens, some).mean(0) for some in texts])
    expected = clip.log_scale.exp() * clip.encode_image(floats(scenes)) @ F.normalize(means, dim=1).T
    assert_close(model(floats(scenes)), expected)
    assert_close(model.features(floats(scenes)).norm(dim=1), torch.ones(6))
    tuned, _ = tune(model.head, embed(model, scenes), None, replace(TINY, steps=1, lr=1e-9))
    assert_close(tuned(model.features(floats(scenes))), expected)


def test_tuning_a_head_leaves_the_tower_as_it_was(tmp_path, monkeypatch):
    scenes = replace(captioned(), classes=["river", "trees"])
    cfg = replace(TINY, init=trained(tmp_path), tune="head", lr=0.1)
    before = begun(cfg.init, scenes.classes)
    looked, outputs = [], train_cls.outputs
    monkeypatch.setattr(train_cls, "outputs", lambda f, x: looked.append(len(x)) or outputs(f, x))
    model = begin_and_tune(scenes, None, replace(cfg, augment="noise,cutout"), tmp_path / "classifier.pt")
    assert looked == [6]                                                 # once, not at every step
    for a, b in zip(model.tower.parameters(), before.tower.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=0)
    assert (model.head.weight - before.head.weight).abs().min() > 0

    tuned, _ = tune(before.head, embed(before, scenes), None, cfg)
    assert_close(tuned.weight, model.head.weight)
    again, classes, size = load_classifier(tmp_path / "classifier.pt")
    assert (classes, size) == (["river", "trees"], 8)
    assert_close(again(floats(scenes)), model(floats(scenes)))


def test_a_head_is_tuned_as_this_loop_does_with_synthetic_images_and_soft_targets(tmp_path, adamw_by_hand,
                                                                                  in_float64):
    g = data.rng(0)
    real, synthetic = (replace(captioned(k), images=torch.randn(6, 5, generator=g)) for k in (0, 1))
    soft, cfg = torch.rand(6, 2, generator=g).softmax(1), replace(TINY, steps=5, share=0.5, smoothing=0.1)
    start = torch.nn.Linear(5, 2)
    by_hand, (tuned, _) = copy.deepcopy(start), tune(start, real, synthetic, cfg, soft)
    adam, mixture = adamw_by_hand(by_hand.parameters(), (0.9, 0.999), lambda p: 0.1 * (p.ndim > 1)), []
    for step in range(5):
        index, fake = Mixture(real, synthetic, cfg, soft, "cpu").draw(4, data.rng(0, step))
        mixture += fake.tolist()
        x = torch.stack([synthetic.images[k - 6] if k >= 6 else real.images[k] for k in index])
        y = torch.stack([soft[k - 6] if k >= 6 else torch.eye(2)[k % 2] for k in index])
        loss = -((0.9 * y + 0.05) * by_hand(x).log_softmax(1)).sum(1).mean()
        gradients = torch.autograd.grad(loss, adam.parameters)
        norm = sum(d.square().sum() for d in gradients).sqrt().item()
        adam.move([d / max(1.0, norm + 1e-6) for d in gradients], data.lr_at(step, 5, cfg.lr, 2))
    assert 0 < sum(mixture) < 20
    assert_close(tuned.weight, by_hand.weight)
    assert_close(tuned.bias, by_hand.bias)


def test_a_tower_is_tuned_at_a_tenth_of_the_rate_of_its_head(tmp_path, monkeypatch):
    scenes = replace(captioned(), classes=["river", "trees"])
    cfg = replace(TINY, init=trained(tmp_path), steps=1, warmup=1, decay=0.0, lr=0.01)
    before, after = begun(cfg.init, scenes.classes), begin_and_tune(scenes, None, cfg, tmp_path / "c.pt")
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        rate = 0.001 if name.startswith("tower") else 0.01               # of AdamW's first step, lr sign(g)
        assert (a - b).abs().max().item() == pytest.approx(rate, rel=0.02), name
    assert_close(load_classifier(tmp_path / "c.pt")[0](floats(scenes)), after(floats(scenes)))


def test_a_classifier_is_a_start_for_other_classes_but_knows_none_by_name(tmp_path):
    scenes = captioned()
    first, _ = train_cls.fit(scenes, None, TINY, tmp_path / "classifier.pt")
    cfg = replace(TINY, init=str(tmp_path / "classifier.pt"), tune="head")
    model = begun(cfg.init, ["x", "y", "z"])
    assert_close(model.features(floats(scenes)), first.features(floats(scenes)))
    assert model(floats(scenes)).shape == (6, 3) and model(floats(scenes)).abs().max() < 0.5
    heads = [train_cls.network(replace(cfg, seed=seed), "xyz", 3).head.weight for seed in (0, 0, 1)]
    assert_close(heads[0], heads[1])
    assert (heads[0] != heads[2]).all()                                  # the seed is cfg's, not the weights'
    with pytest.raises(Problem, match="--tune none goes by names"):
        begin_and_tune(scenes, None, replace(cfg, tune="none"), tmp_path / "other.pt")


FLAGS = "--size 16 --patch 8 --dim 16 --depth 1 --heads 2 --steps 4 --batch 8 --warmup 1".split()


def caption_tree(root):
    """A caption set of two classes, and its root."""
    rows = [(f"{kind}_{k}.png", part, [f"a {kind}", f"{kind} {k}"]) for kind in ("river", "forest")
            for k, part in enumerate(["train"] * 4 + ["val", "test"])]
    pictures(root, [name for name, *_ in rows])
    (root / "dataset.json").write_text(json.dumps(karpathy(*rows)))
    for kind in ("river", "forest"):
        (root / "txtclasses" / f"{kind}.txt").parent.mkdir(exist_ok=True)
        (root / "txtclasses" / f"{kind}.txt").write_text("\n".join(n for n, *_ in rows if kind in n))
    return root


def test_from_captions_to_a_tuned_classifier_on_the_command_line(tmp_path, launch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = caption_tree(tmp_path / "t")
    done = launch(train_cls, *FLAGS, "--data", root, "--out", "clip", "--captions")
    assert done.returncode == 0 and "8 images, 16 sentences" in done.stdout and "test:" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[1].startswith("val: a sentence, of 4, for an image is among the best 1, 5, 10 in ")
    assert lines[1].endswith(" 100.0, 100.0 %, by chance 50.0, 100.0, 100.0")
    assert "of 2, for a sentence" in lines[2] and lines[2].endswith("by chance 50.0, 100.0, 100.0")
    for what in ("none", "head", "all"):
        done = launch(train_cls, "--data", root, "--init", "clip/clip.pt", "--tune", what, "--out", what,
                      "--steps", 4, "--batch", 4, "--test")
        assert done.returncode == 0 and "test: accuracy" in done.stdout, done.stderr
        if what == "none":
            assert lines[-1] in done.stdout                              # as --captions said already
        assert launch(train_cls, "--predict", root / "river_0.png", "--out", what).returncode == 0
    again = launch(train_cls, *FLAGS, "--data", root, "--out", "clip", "--captions", "--test")
    assert "test: a sentence, of 4" in again.stdout
    few = launch(train_cls, *FLAGS, "--data", root, "--out", "few", "--captions", "--per-class", 1)
    assert "2 images, 4 sentences" in few.stdout
    (root / "txtclasses/river.txt").unlink()
    (root / "txtclasses/forest.txt").unlink()
    assert "tells no classes" in launch(train_cls, *FLAGS, "--data", root, "--out", "c").stderr
    done = launch(train_cls, *FLAGS, "--data", root, "--out", "d", "--captions")
    assert done.returncode == 0 and "accuracy" not in done.stdout


@pytest.mark.parametrize("flags, said", [
    (["--tune", "some"], "--tune some: known are all, head, none"),
    (["--init", "none.pt"], "no checkpoint at none.pt"),
    (["--init", "t/dataset.json"], "--init t/dataset.json: "),
    (["--init", "runs/cls/classifier.pt"], "would be written over: give another --out"),
    (["--captions", "--mae"], "give one of them"), (["--mae", "--init", "x"], "give one of them"),
    (["--captions", "--share", "0.5"], "real images alone"),
    (["--mae", "--share", "0.5"], "real images alone"),
    (["--captions", "--init", "x"], "give one of them"), (["--mae", "--model", "resnet"], "tokens of a ViT"),
    (["--captions", "--model", "linear"], "trains a network"),
    (["--captions", "--augment", "hflip,cutmix"], "cutmix makes sentences untrue"),
    (["--init", "x", "--dim", "32"], "--dim has no effect with --init"),
    (["--mae", "--balance"], "--balance has no effect with --mae"),
    (["--mae", "--test"], "--test has no effect with --mae"),
    (["--captions", "--smoothing", "0.2"], "--smoothing has no effect with --captions")])
def test_what_cannot_be_tuned_is_one_line(tmp_path, launch, flags, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual = [] if "--init" in flags else FLAGS                           # those of a network
    done = launch(train_cls, "--data", caption_tree(tmp_path / "t"), *usual, *flags)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", ["captions", "mae"])
def test_whole_batches_are_for_one_process(monkeypatch, flag):
    monkeypatch.setattr(data.dist, "is_initialized", lambda: True)
    with pytest.raises(Problem, match="run in one process"):
        train_cls.main(train_cls.Script(data="nowhere", **{flag: True}))


def test_a_tree_without_sentences_teaches_no_clip():
    with pytest.raises(Problem, match="--captions needs sentences"):
        fit_clip(replace(captioned(), captions=[*SAID[:-1], ()]), TINY)


# ---- MAE

def test_the_loss_of_mae_is_that_of_the_hidden_patches_alone():
    """Written out, patch by patch: 3 of 4 are hidden, the blocks see the fourth."""
    torch.manual_seed(0)
    model = train_cls.MAE(TINY).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))                            # also those that start at 0
    x, vit, errors = torch.randn(5, 3, 8, 8).double(), model.vit, []
    order = torch.rand(5, 4, generator=data.rng(3)).argsort(1)
    corners = [(0, 0), (0, 4), (4, 0), (4, 4)]
    for image, (seen, *hidden) in zip(x, order.tolist(), strict=True):
        patches = [image[:, i:i + 4, j:j + 4] for i, j in corners]
        i, j = corners[seen]
        shown = torch.zeros_like(image)
        shown[:, i:i + 4, j:j + 4] = patches[seen]
        token = vit.norm(vit.blocks((vit.stem(shown[None]) + vit.positions)[:, seen:seen + 1]))
        every = torch.stack([token[0, 0] if k == seen else model.hidden for k in range(4)]) + vit.positions
        drawn = model.decoder(every[None])[0]
        for k in hidden:
            pixels = patches[k].permute(1, 2, 0).flatten()
            target = (pixels - pixels.mean()) / (pixels.var(correction=0) + 1e-4).sqrt()
            errors.append((drawn[k] - target).square().mean())
    assert_close(model(x, data.rng(3)), torch.stack(errors).mean())


def test_mae_learns_to_draw_and_its_vit_is_a_start(tmp_path, monkeypatch):
    g, cfg = data.rng(0), replace(TINY, steps=50, batch=16, lr=1e-2, augment="hflip")
    flat = torch.randint(256, (40, 3, 1, 1), dtype=torch.uint8, generator=g).expand(-1, -1, 8, 8).clone()
    flat[:, :, :, ::2] = flat[:, :, :, ::2] // 2                         # stripes, which are in every patch
    scenes = Scenes(flat, torch.arange(40) % 2, ["a", "b"], list(map(str, range(40))), torch.arange(40))
    losses, descend = [], data.descend
    monkeypatch.setattr(data, "descend", lambda *a: losses.append(a[2].item()) or descend(*a))
    vit = fit_mae(scenes, cfg, tmp_path / "mae.pt")
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    start = begun(tmp_path / "mae.pt", ["x", "y", "z"])
    assert_close(start.features(floats(scenes)), vit.features(floats(scenes)), rtol=0, atol=1e-3)


def test_no_step_waits_for_the_device(hasty_steps):
    fit_clip(captioned(), TINY)
    fit_mae(captioned(), replace(TINY, augment="hflip,cutmix"))
    assert hasty_steps == [1, 2, 3, 4] * 2


def test_mae_runs_from_the_command_line(tmp_path, launch):
    root = data.draw_tree(tmp_path / "t", 5, size=16)
    assert "24 images without" in launch(train_cls, "--data", root, *FLAGS, "--mae", "--out", tmp_path).stdout
    done = launch(train_cls, "--data", root, "--init", tmp_path / "mae.pt", "--steps", 2, "--out", tmp_path)
    assert done.returncode == 0 and "val: accuracy" in done.stdout


# ---- published weights

def published(text=True):
    """What load_pretrained makes of a file: a CLIP, or a Tower alone, of images of 12 px."""
    torch.manual_seed(0)
    tower = Tower(16, 12, 4, 16, 1, 2, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), pre=text)
    return CLIP(tower, Text(514, 96, 16, 1, 2)) if text else tower


def test_images_of_another_size_are_brought_to_that_of_the_weights(tmp_path):
    model = begun(trained(tmp_path), ["river", "trees"])
    x = floats(captioned())
    twice = F.interpolate(x, scale_factor=2)
    assert_close(model(twice), model(x), rtol=0, atol=0.3)               # bicubic, which smooths a little
    assert (model(twice) - model(x.flip(0))).abs().max() > 0.5


@pytest.mark.parametrize("text", [True, False])
def test_published_weights_are_a_start_and_tell_the_size_of_images(tmp_path, launch, monkeypatch, text):
    monkeypatch.setattr(train_cls.vit, "load_pretrained", lambda path: published(text).eval())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"published")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")              # of bytes alone: 514 tokens
    root = caption_tree(tmp_path / "t")
    flags = "--init", "weights.pt", "--steps", 3, "--batch", 4, "--warmup", 1, "--out"
    for what in ("none", "head", "all"):
        done = launch(train_cls, "--data", root, *flags, what, "--tune", what)
        if what == "none" and not text:
            assert done.returncode == 2 and "--tune none goes by names" in done.stderr
            continue
        assert done.returncode == 0, done.stderr
        model, classes, size = load_classifier(tmp_path / what / "classifier.pt")
        x = data.to_float(data.read(root, 12, cache=tmp_path / "cache").images)
        start = published(text)
        expected = start.encode_image(x) if text else start.features(x)
        assert classes == ["forest", "river"] and size == 12
        if what != "all":
            assert_close(model.features(x), expected)
        if what == "none":
            names = zero_shot(start, tokenizer("weights.pt", start), ["forest", "river"])
            assert_close(model(x), start.log_scale.exp() * expected @ names.T)
