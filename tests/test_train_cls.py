"""train_cls.py: the mixture, the loop, the scores, the linear baseline, CLIP, tuning."""
import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import data
import train_cls
import vit
from augment import AUGMENTATIONS, compose
from data import Scenes, UserError
from train_cls import Config, Mixture, Script, fit, fit_clip, load_weights, outputs, tune

TINY = Config(size=8, patch=4, dim=16, depth=1, heads=2, steps=6, batch=16, warmup=2,
              augment="none")
SENTENCES = [("A river.", "water, 2 boats"), ("trees",), ("A beach", "sand; a river", "trees!"),
             ("a Road",), ("trees",), ("houses", "a road")]


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def coloured(labels, classes, seed=0):
    """Random pictures with these labels, all reddish: their features agree, so gradients add up."""
    N, names = len(labels), [f"{k}.png" for k in range(len(labels))]
    images = torch.randint(256, (N, 3, 8, 8), dtype=torch.uint8, generator=data.rng(seed))
    images[:, 0] = images[:, 0] // 4 + 192
    return Scenes(images, torch.tensor(labels), list(classes), names, torch.arange(N))


def numbered(n, start=0):
    """Images of two classes that are one grey level each, so that a batch shows its origin."""
    scenes = coloured([k % 2 for k in range(n)], "ab")
    scenes.images[:] = torch.arange(start, start + n).view(-1, 1, 1, 1)
    return scenes


@pytest.fixture
def captioned():
    """Six random pictures with sentences, of two classes."""
    return replace(coloured([0, 1] * 3, ["river", "trees"]), captions=SENTENCES)


@pytest.fixture
def clip(captioned):
    """The path of a small CLIP."""
    fit_clip(captioned, replace(TINY, batch=4, lr=1e-2), "clip.pt")
    return "clip.pt"


def batches(monkeypatch, *args):
    """The grey levels, (steps, batch), of all batches that fit(*args) trains on."""
    levels = []
    def spy(x, y, rng):
        levels.append(data.to_uint8(x[:, 0, 0, 0]).long().cpu())
        return x, y
    with monkeypatch.context() as m:
        m.setattr(train_cls, "compose", lambda names: spy)
        fit(*args)
    return torch.stack(levels)


def same_weights(a, b, atol=0.0):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert_close(p, q, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# ---- where synthetic images replace real ones

REAL, SYNTHETIC = [0, 0, 0, 1, 3, 3], [3, 0, 0, 3, 3]        # 1 has no synthetic image, 2 none


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_each_image_is_drawn_with_the_probability_of_the_formula(share, balance):
    """A real image of class c: p (1 - s_c). A synthetic one of M_c: p_c s_c / M_c."""
    s = {c: share if c in SYNTHETIC else 0.0 for c in range(4)}
    p_class = {c: (c in REAL) / 3 if balance else REAL.count(c) / 6 for c in range(4)}
    mixture = Mixture(coloured(REAL, "abcd"), coloured(SYNTHETIC, "abcd", 1),
                      replace(TINY, balance=balance), "cpu")
    expected = [p_class[c] / REAL.count(c) * (1 - s[c]) for c in REAL]
    expected += [p_class[c] * s[c] / SYNTHETIC.count(c) for c in sorted(SYNTHETIC)]
    p, n = torch.tensor(expected), 200_000
    assert_close(mixture.probabilities(share), p)
    often = mixture.draw(n, share, data.rng(0)).bincount(minlength=11) / n
    assert ((often - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()             # standard errors


@pytest.mark.parametrize("change", [dict(share=0.3), dict(share=1.0), dict(share=0.3, balance=True),
                                    dict(share=0.3, pretrain=True)])
def test_all_runs_take_as_many_steps_on_as_many_images(monkeypatch, change):
    cfg = replace(TINY, steps=20)
    alone = batches(monkeypatch, numbered(100), None, cfg)
    pure = batches(monkeypatch, numbered(100), numbered(50, 200), replace(cfg, share=1.0))
    levels = batches(monkeypatch, numbered(100), numbered(50, 200), replace(cfg, **change))
    assert levels.shape == alone.shape == (20, 16)
    synthetic = levels >= 200
    assert synthetic.float().mean().item() == pytest.approx(change["share"], abs=0.08)
    assert (levels[~synthetic] == alone[~synthetic]).all()   # where it is not replaced
    assert (levels[synthetic] == pure[synthetic]).all()      # by the same image, whatever the share
    assert (levels % 2 == alone % 2).all()                   # of the same class
    if "pretrain" in change:                                 # synthetic images first
        assert synthetic[:6].all() and not synthetic[6:].any()


# ---- the loop

def train_by_hand(parameters, loss, rates, adamw):
    """Gradients, clipped to norm 1, and AdamW with decay on matrices. The norms before clipping."""
    optimizer = adamw(parameters, (0.9, 0.999), lambda p: 0.5 * (p.ndim > 1))
    norms = []
    for step, rate in enumerate(rates):
        gradients = torch.autograd.grad(loss(data.rng(7, step)), optimizer.parameters)
        norms.append(sum(g.square().sum() for g in gradients).sqrt().item())
        optimizer.move([g / max(1.0, norms[-1] + 1e-6) for g in gradients], rate)
    return norms


LOOP = replace(TINY, steps=4, warmup=9, lr=4e-3, decay=0.5, seed=7)  # warmup: half of the steps
RATES = 2e-3, 4e-3, 4e-3, 2e-3                               # 2 steps up, then along a cosine


@pytest.mark.usefixtures("on_cpu", "in_float64")
def test_training_is_this_loop_written_out(adamw_by_hand):
    """Draw, augment, cross-entropy with smoothed labels, clip, learning rate, AdamW."""
    real, synthetic = coloured([0, 0, 2, 0, 1, 0, 0], "abc"), coloured([2, 0, 0, 1], "abc", 1)
    cfg = replace(LOOP, smoothing=0.2, share=0.4, augment="hflip,rot90,color,cutmix")
    model = fit(real, synthetic, cfg)
    torch.manual_seed(7)
    twin = vit.ViT(3, size=8, patch=4, dim=16, depth=1, heads=2)
    def loss(rng):
        x, y = [], []
        for u_real, u_replace, u_synthetic in torch.rand(3, 16, generator=rng).T.tolist():
            k = int(u_real * 7)
            image, target = real.images[k], torch.eye(3)[real.labels[k]]
            if u_replace < 0.4:
                same_class = (synthetic.labels == real.labels[k]).nonzero()
                j = same_class[int(u_synthetic * len(same_class)), 0]
                image = synthetic.images[j]
            x.append(image / 127.5 - 1)
            y.append(target)
        x, y = compose(cfg.augment)(torch.stack(x), torch.stack(y), rng)
        return -((0.8 * y + 0.2 / 3) * twin(x).log_softmax(1)).sum(1).mean()

    norms = train_by_hand(twin.parameters(), loss, RATES, adamw_by_hand)
    assert min(norms) < 1 < max(norms)                       # some are clipped, some are not
    same_weights(model, twin, atol=1e-6)
    fit(real, synthetic[:0], cfg)                            # a filter may leave none


@pytest.mark.usefixtures("on_cpu", "in_float64")
def test_clip_training_is_this_loop_written_out(captioned, adamw_by_hand):
    """Of every image one of its sentences; each must find the other in the batch."""
    model, tokens = fit_clip(captioned, replace(LOOP, batch=4, augment="hflip,color"))
    words = tokens.keywords["words"]
    assert words == "2 a beach boats houses river road sand trees water".split()
    torch.manual_seed(7)
    image = vit.ViT(16, 8, 4, 16, 1, 2)
    twin = vit.CLIP(image, vit.TextEncoder(13, vit.LENGTH, 16, 1, 2))
    def loss(rng):
        index = torch.randperm(6, generator=rng)[:4].tolist()
        u = torch.rand(4, generator=rng).tolist()
        texts = [SENTENCES[k][int(v * len(SENTENCES[k]))] for k, v in zip(index, u, strict=True)]
        x, _ = compose("hflip,color")(captioned.images[index] / 127.5 - 1, torch.zeros(4, 1), rng)
        images, sentences = twin.encode_image(x), twin.encode_text(vit.word_tokens(texts, words))
        scores = twin.log_scale.exp() * images @ sentences.T
        return -(scores.log_softmax(1).diag().mean() + scores.log_softmax(0).diag().mean()) / 2

    train_by_hand(twin.parameters(), loss, RATES, adamw_by_hand)
    same_weights(model, twin, atol=1e-6)


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(monkeypatch):
    run = numbered(20), numbered(20, 100), replace(TINY, share=0.5, augment="hflip,cutmix")
    whole, save, train = fit(*run), data.save_checkpoint, train_cls.train
    def save_and_die(*args):
        save(*args)
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(data, "save_checkpoint", save_and_die)
        m.setattr(train_cls, "train", lambda *args: train(*args, every=3))
        fit(*run, "a.pt")
    assert data.load("a.pt")["step"] == 3
    for _ in range(2):                                       # to the end; and when it is there
        finished = fit(*run, "a.pt")
        same_weights(whole, finished)
        assert data.load("a.pt")["step"] == 6 and not finished.training


@pytest.mark.parametrize("change", [dict(), dict(model="linear"), dict(tune="head"),
                                    dict(tune="none")])
def test_a_checkpoint_of_other_images_or_settings_is_refused_and_stays(tmp_path, clip, change):
    make, real, path = fit, numbered(20), tmp_path / "a.pt"
    if "tune" in change:
        make, change = tune, change | dict(init=clip)
    cfg = replace(TINY, **change)
    make(real, None, cfg, path)
    make(real, None, cfg, path)                              # its own it may replace
    before = path.read_bytes()
    for images, synthetic, settings, name in ((real, None, replace(cfg, lr=0.1), "lr"),
                                              (real[1:], None, cfg, "images"),
                                              (real, real, cfg, "images")):
        with pytest.raises(UserError, match=f"another {name}"):
            make(images, synthetic, settings, path)
    assert path.read_bytes() == before


def test_no_step_waits_for_the_device(hasty_steps, captioned):
    names = ",".join(set(AUGMENTATIONS) - {"copypaste"})     # which needs a mask
    fit(numbered(20), numbered(20, 100), replace(TINY, share=0.5, augment=names))
    fit_clip(captioned, replace(TINY, batch=4))
    assert hasty_steps == [1, 2, 3, 4] * 2


# ---- scores

LABELS, PREDICTED = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]


def test_scores_are_those_of_the_confusion_matrix():
    """P = TP / (TP + FP), R = TP / (TP + FN), F1 = 2 P R / (P + R), of 300 random answers.

    Of the classes 6 and 7 there is no image, though 6 is among the answers.
    """
    labels, predicted = np.random.default_rng(0).integers([[6], [7]], size=(2, 300))
    confusion = np.zeros((8, 8))
    for row, column in zip(labels, predicted, strict=True):
        confusion[row, column] += 1
    tp = confusion.diagonal()[:6]
    P, R = tp / confusion.sum(0)[:6], tp / confusion.sum(1)[:6]
    F = 2 * P * R / (P + R)
    counts = train_cls.class_counts(labels, predicted, 8)
    assert train_cls.f1(counts) == pytest.approx([*F, 0, 0])
    assert train_cls.accuracy(counts) == pytest.approx(tp.sum() / 300)
    assert train_cls.macro_f1(counts) == pytest.approx(F.mean())


def test_counts_of_groups_add_up_to_those_of_classes():
    groups = np.array([7, 7, 3, 3, 7, 3])
    counts = train_cls.counts_per_group(LABELS, PREDICTED, groups, K=4)
    assert counts.dtype == np.float64 and counts.tolist() == [
        [[0, 1, 1, 0], [1, 1, 1, 0], [0, 2, 1, 0]],          # group 3
        [[2, 0, 0, 0], [2, 1, 0, 0], [2, 0, 1, 0]]]          # group 7
    assert (counts.sum(0) == train_cls.class_counts(LABELS, PREDICTED, 4)).all()
    means = (0 + 2 / 3 + 1) / 3, (1 + 0 + 0) / 3             # of the same classes in all groups
    assert train_cls.macro_f1(counts) == pytest.approx(means)


@pytest.mark.parametrize("tau, margin", [(0, 0.0), (0.25, 0.2), (0.5, 0.6), (0.75, 0.9),
                                         (1, 1.3)])
def test_logits_are_adjusted_as_far_as_held_out_images_say(tau, margin):
    counts, labels = torch.tensor([80, 20, 0]), torch.tensor([0] * 8 + [1] * 2)
    log_p = torch.tensor([0.8, 0.2, 0.01]).log()             # a class without images counts as one
    logits = torch.tensor([0, margin, -9.0]).repeat(10, 1)   # too high for the rare class
    logits[:8, 0] += 0.05
    logits[8:, 1] += 9
    assert_close(train_cls.adjust_logits(logits, labels, counts), tau * log_p)


def test_logits_are_adjusted_for_macro_f1_and_not_for_accuracy():
    labels = torch.tensor([0] * 90 + [1] * 10)
    logits = torch.tensor([0.0, -9]).repeat(100, 1)
    logits[75:, 1] = 1                       # all of the rare class are found, with 15 of the other
    assert not train_cls.adjust_logits(logits, labels, torch.tensor([90, 10])).any()


# ---- the linear baseline, and the networks

def colours_and_edges_by_hand(image):
    """The same, pixel by pixel, of a uint8 image (C, H, W): a list."""
    features, (H, W) = [], image.shape[1:]
    pixel = (image.double() / 127.5 - 1).tolist()
    def grey(y, x):
        y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)  # the border goes on outside
        return sum(channel[y][x] for channel in pixel[:3]) / 3
    for region in ([[255] * W] * H, *image[3:].tolist()):
        inside = [(y, x) for y in range(H) for x in range(W) if region[y][x] > 127]
        bins = [0.0] * 160                                   # 3 x 8 levels, 64 colours, 9 x 8 edges
        for y, x in inside:
            r, g, b = image[:3, y, x].tolist()
            for k, level in enumerate((r, g, b)):
                bins[8 * k + level // 32] += 1 / len(inside)
            bins[24 + 16 * (r // 64) + 4 * (g // 64) + b // 64] += 1 / len(inside)
            dx, dy = grey(y, x + 1) - grey(y, x - 1), grey(y + 1, x) - grey(y - 1, x)
            angle = math.degrees(math.atan2(dy, dx)) % 360
            cell = 3 * (3 * y // H) + 3 * x // W
            bins[88 + 8 * cell + int(angle // 45)] += math.hypot(dx, dy) / len(inside)
        features += [math.sqrt(b) for b in bins]
    return features


def test_colours_and_edges_are_those_counted_pixel_by_pixel():
    images = torch.randint(256, (3, 4, 7, 8), dtype=torch.uint8, generator=data.rng(0))
    images[:, 3:] = (images[:, 3:] > 100) * 255
    images[2, 3:] = 0                                        # an empty mask
    expected = torch.tensor([colours_and_edges_by_hand(image) for image in images])
    x = data.to_float(images)
    assert_close(train_cls.colours_and_edges(x), expected, rtol=0, atol=1e-5)
    assert_close(train_cls.colours_and_edges(x[:, :3]), expected[:, :160], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("on_cpu")
def test_the_linear_baseline_is_at_its_optimum_where_the_gradient_is_0():
    """Of sum_i p_i CE(W f_i + b, y_i) + .01 / 2 |W|^2: sum_i p_i (softmax - y) f^T + .01 W."""
    real, synthetic = coloured([0, 0, 2, 0, 1], "abc"), coloured([2, 0, 0, 1], "abc", 1)
    cfg = replace(TINY, model="linear", share=0.4)
    model = fit(real, synthetic, cfg)
    images = torch.cat([real.images, synthetic.images])
    f = train_cls.colours_and_edges(data.to_float(images))
    f = ((f - model.mean) / model.std).double()
    y = torch.eye(3)[torch.cat([real.labels, synthetic.labels])].double()
    p = [0.2 * 0.6] * 5 + [0.2 * 0.4, 0.6 * 0.4 / 2, 0.6 * 0.4 / 2, 0.2 * 0.4]
    p = torch.tensor(p).double()[:, None]
    W, b = model.head.weight.detach().double(), model.head.bias.detach().double()
    error = p * ((f @ W.T + b).softmax(1) - y)               # d loss / d logits
    assert ((p * (1 / 3 - y)).T @ f).abs().max() > 0.1                # where W = 0, it is not
    assert (error.T @ f + 0.01 * W).abs().max() < 1e-4 and error.sum(0).abs().max() < 1e-4
    assert_close((p * f).sum(0), torch.zeros(160).double(), rtol=0, atol=1e-5)   # mean 0
    variance = (p * f**2).sum(0)
    assert ((variance - 1).abs() < 1e-4)[variance > 1e-6].all() and (variance > 0.9).sum() > 100
    other = replace(cfg, seed=3, augment="crop", steps=1)    # which it does not use
    same_weights(model, fit(real, synthetic, other))


@pytest.mark.parametrize("model", train_cls.MODELS)
def test_every_classifier_learns_what_a_glance_tells(model):
    scenes = coloured([0, 1] * 16, ["dull", "green"])
    scenes.images[1::2, 1] = 255
    trained = fit(scenes, None, replace(TINY, model=model, steps=50, lr=1e-2))
    logits = outputs(trained, scenes.images)
    assert_close(logits.argmax(1), scenes.labels)
    assert_close(outputs(trained, scenes.images, batch=7), logits)
    stems = dict(vit=vit.Convolutions, patches=vit.Patches)
    assert model not in stems or isinstance(trained.stem, stems[model])


def test_the_convnet_halves_the_sides_three_times_and_decides_by_the_mean():
    model, x = train_cls.ConvNet(3, 8).double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    h, weights = x, dict(model.named_parameters())
    for k, stride in ((0, 2), (3, 1), (6, 2), (9, 2)):
        h = F.conv2d(h, weights[f"layers.{k}.weight"], stride=stride, padding=1)
        h = F.group_norm(h, 8, weights[f"layers.{k + 1}.weight"], weights[f"layers.{k + 1}.bias"])
        h = h.relu()
    assert h.shape == (2, 32, 2, 2)
    assert_close(model(x), F.linear(h.mean((2, 3)), weights["head.weight"], weights["head.bias"]))


# ---- tuning

def test_the_head_starts_as_zero_shot_classification(clip, captioned, monkeypatch):
    encoder, tokens, size = load_weights(clip)
    model = train_cls.Tuned(encoder, tokens, size, ["SandRiver", "trees"])
    x = data.to_float(captioned.images).to(data.pick_device())
    means = []
    for name in ("sand river", "trees"):
        ids = tokens([template.format(name) for template in vit.TEMPLATES])
        means.append(encoder.encode_text(ids.to(x.device)).mean(0))
    cosines = encoder.encode_image(x) @ F.normalize(torch.stack(means), dim=1).T
    assert_close(model.to(x.device)(x), encoder.log_scale.exp() * cosines)
    assert len({*vit.TEMPLATES}) == 18 and "satellite photo of the {}." in vit.TEMPLATES
    large = F.interpolate(x, (12, 12), mode="bicubic")       # is reduced to what the encoder knows
    small = F.interpolate(large, (8, 8), mode="bicubic", antialias=True)
    assert_close(model.features(large), encoder.encode_image(small))
    encoder.tokens, encoder.size = tokens, size              # as published weights have them
    monkeypatch.setattr(vit, "Published", dict(RemoteCLIP=encoder).__getitem__)
    assert load_weights("RemoteCLIP") == (encoder, tokens, size)
    with pytest.raises(UserError, match="--init other is no file, .*KeyError"):
        load_weights("other")


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("part, encoder_rate, head_rate", [("none", 0, 0), ("head", 0, 0.01),
                                                           ("all", 0.001, 0.01)])
def test_an_encoder_is_tuned_at_a_tenth_of_the_rate_of_its_head_or_not_at_all(
        captioned, clip, part, encoder_rate, head_rate):
    cfg = replace(TINY, init=clip, tune=part, steps=1, warmup=1, decay=0.0, lr=0.01, share=0.5)
    before = train_cls.initial_model(cfg, captioned.classes, 3)
    make, synthetic = fit if part == "all" else tune, coloured([1, 0], captioned.classes, 1)
    after = make(captioned, synthetic, cfg, "classifier.pt")
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        if name.startswith(("head", "encoder.image")):       # the first step is lr sign(gradient)
            rate = head_rate if name.startswith("head") else encoder_rate
            assert (p - q).abs().max().item() == pytest.approx(rate, rel=0.02), name
    again, _, saved = train_cls.load("classifier.pt", "classifier")
    same_weights(again, after)
    assert saved["classes"] == ["river", "trees"]
    assert saved["seen"].shape == (2 * len(captioned) + 2, 192)          # also what the CLIP saw
    new = [replace(cfg, init="classifier.pt", seed=seed) for seed in (0, 1)]
    weights = {train_cls.identity_of(run, captioned)["weights"] for run in (cfg, *new, LOOP)}
    assert len(weights) == 3 and "" in weights               # the file's content, not its name
    first, second = (train_cls.initial_model(other, ["a", "b"], 3).head.weight for other in new)
    assert not torch.equal(first, second)                    # its seed, not that of --init
    if part == "head":                                       # is trained on features
        cfg = replace(cfg, steps=6, augment="none")
        features = [replace(scenes, images=outputs(before.features, scenes.images))
                    for scenes in (captioned, synthetic)]
        head = fit(*features, cfg, model=before.head)
        same_weights(tune(captioned, synthetic, cfg, "other.pt").head, head)


# ---- the command line

SMALL = "--size 16 --patch 8 --dim 16 --depth 1 --heads 2".split()
STEPS = "--steps 8 --batch 16 --warmup 2".split()


@pytest.mark.parametrize("model", train_cls.MODELS)
def test_from_a_mixture_to_scores_and_predictions(tmp_path, launch, model):
    data.draw_tree(tmp_path / "t", 5, size=16)
    data.draw_tree(tmp_path / "s", 2, seed=1, size=16)
    flags = "--data t --out c --synthetic s --share 0.5 --per-class 2 --seed 3".split()
    done = launch(train_cls, *flags, *SMALL, *STEPS, "--model", model, "--test")
    counted, first, second, test, _ = done.stdout.splitlines()
    assert counted == "16 real, 16 synthetic images of 8 classes"
    assert first.startswith("val: accuracy ") and ", macro-F1 " in first
    assert second.startswith("F1 per class: beach ") and second.count(",") == 7
    assert test.startswith("test: accuracy ")
    done = launch(train_cls, "--predict", "t", "--out", "c")     # other flags are in the checkpoint
    assert done.returncode == 0 and "40 pictures of t" in done.stdout
    with open("c/predictions.csv") as file:
        header, *rows = csv.reader(file)
    assert header == ["picture", "predicted", "probability"]
    scenes, (model, _, saved) = data.read("t", 16), train_cls.load("c/classifier.pt", "classifier")
    chosen = data.choose(scenes, data.split(scenes)["train"], 2, 3)
    assert saved["images"][0] == scenes[chosen].digest
    probability, predicted = outputs(model, scenes.images).softmax(1).max(1)
    names, classes, numbers = zip(*rows, strict=True)
    assert [*names] == scenes.names
    assert [*classes] == [scenes.classes[k] for k in predicted]
    assert [float(p) for p in numbers] == pytest.approx(probability.tolist(), abs=1e-4)


def test_a_synthetic_tree_has_the_class_numbers_of_the_real_one(tmp_path):
    (data.draw_tree(tmp_path / "s", 1) / "beach" / "beach_001.jpg").unlink()
    real = data.read(data.draw_tree(tmp_path / "t", 5, seed=1), 8)
    cfg = Script(data="t", synthetic="s", share=0.5, size=8, patch=4)
    scenes = train_cls.read_synthetic(cfg, real, data.split(real))
    assert scenes.classes == real.classes and scenes.labels.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_from_captions_to_a_tuned_classifier(launch):
    images = []
    for k, part in enumerate(["train"] * 8 + ["val", "test"] * 2):
        name, kind = f"{k}.png", ["river", "forest"][k % 2]
        data.save_picture(Image.new("RGB", (8, 8), (20 * k, 0, 0)), f"t/{name}")
        images.append(dict(filename=name, split=part, sentences=[dict(raw=f"a {kind}")]))
        data.write(f"t/txtclasses/{kind}.txt", " ".join(f"{i}.png" for i in range(k % 2, 12, 2)))
    data.write("t/dataset.json", json.dumps(dict(images=images)))
    flags = ["--data", "t", *STEPS]
    done = launch(train_cls, *flags, *SMALL, "--out", "clip", "--learn", "clip")
    assert "\nzero-shot, by" in done.stdout and "\nval: accuracy" in done.stdout
    assert "no val image of forest\n" in done.stdout and "forest 0" not in done.stdout
    assert "test:" not in done.stdout
    for part in ("none", "head", "all"):
        init = ["--init", "clip/clip.pt", "--tune", part, "--out", part]
        assert "val: accuracy" in launch(train_cls, *flags, *init).stdout
        done = launch(train_cls, "--predict", "t/0.png", "--out", part)
        assert done.stdout.startswith("1 pictures of t/0.png")

