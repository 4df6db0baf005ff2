"""train_cls.py: fair mixtures, honest scores."""
import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import data
import train_cls
from augment import AUGMENTATIONS, OVERHEAD, compose
from data import Problem, Scenes
from train_cls import Config, Mixture, Residual, ResNet, colours_and_edges, confusion, fit, predict
from vit import Convolutions, Patches, ViT

TINY = Config(size=8, patch=4, dim=16, depth=1, heads=2, steps=6, batch=16, warmup=2, augment="none")


def numbered(n, start=0):
    """Images that are one grey level each, so that a batch tells where it came from; two classes."""
    level = torch.arange(start, start + n, dtype=torch.uint8)
    return Scenes(level.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous(), torch.arange(n) % 2, ["a", "b"],
                  [f"{k}.png" for k in range(start, start + n)], torch.arange(n))


def batches(monkeypatch, *args):
    """The grey levels of every batch that fit(*args) trains on, (steps, batch), and what fit returns."""
    seen = []

    def spy(_):
        return lambda x, y, g: (seen.append(data.to_uint8(x[:, 0, 0, 0])) or x, y)

    with monkeypatch.context() as m:
        m.setattr(train_cls, "compose", spy)
        model, counts = fit(*args)
    return torch.stack(seen), counts


def test_a_synthetic_image_takes_the_place_of_a_real_one_and_nothing_else_changes(monkeypatch):
    real, synthetic, cfg = numbered(100), numbered(50, start=200), replace(TINY, steps=40, batch=64)
    alone, seen_alone = batches(monkeypatch, real, None, cfg)
    mixed, seen_mixed = batches(monkeypatch, real, synthetic, replace(cfg, share=0.3))
    pure, seen_pure = batches(monkeypatch, None, synthetic, replace(cfg, share=1.0))
    taken = mixed >= 200
    assert abs(taken.float().mean() - 0.3) < 0.03
    assert_close(mixed[~taken], alone[~taken])
    assert_close(mixed[taken], pure[taken])
    assert alone.max() < 100 and pure.min() >= 200
    assert set(alone.flatten().tolist()) == set(range(100))
    assert set(pure.flatten().tolist()) == set(range(200, 250))
    for seen, n in ((seen_alone, 0), (seen_mixed, taken.sum()), (seen_pure, 40 * 64)):
        assert seen == dict(steps=40, images=40 * 64, synthetic=n)


def test_copies_of_the_real_images_are_other_draws_of_them(monkeypatch):
    real, copies, cfg = numbered(50), numbered(50, start=200), replace(TINY, steps=20)
    alone, _ = batches(monkeypatch, real, None, cfg)
    mixed, _ = batches(monkeypatch, real, copies, replace(cfg, share=1.0))
    assert (mixed - 200 == alone).float().mean() < 0.15                  # 1 in 25 by chance
    assert ((mixed - 200) % 2 == alone % 2).all()                        # of the same class


def rare():
    """90 images of class 0, 9 of class 1, 1 of class 3: grey levels 0 to 89, 90 to 98, 99. No class 2."""
    labels = torch.tensor([0] * 90 + [1] * 9 + [3])
    return replace(numbered(100), labels=labels, classes=list("abcd"))


def test_classes_are_drawn_as_they_occur_or_all_equally_often(monkeypatch):
    cfg = replace(TINY, steps=40, batch=64)
    for balance, expected in ((False, [0.9, 0.09, 0.01]), (True, [1 / 3] * 3)):
        levels, _ = batches(monkeypatch, rare(), None, replace(cfg, balance=balance))
        ranges = (0, 90), (90, 99), (99, 100)
        shares = [((a <= levels) & (levels < b)).float().mean().item() for a, b in ranges]
        assert np.allclose(shares, expected, atol=0.03)
        assert len(levels.unique()) > 95                                 # within a class, every image


def test_synthetic_images_of_rare_classes_leave_the_others_alone(monkeypatch):
    cfg, two = replace(TINY, steps=40, batch=64, balance=True), numbered(10, start=200)
    synthetic = replace(two, labels=torch.ones(10, dtype=torch.int64), classes=list("abcd"))
    alone, _ = batches(monkeypatch, rare(), None, cfg)
    mixed, seen = batches(monkeypatch, rare(), synthetic, replace(cfg, share=0.5))
    ones = (alone >= 90) & (alone < 99)                                  # the places of class 1
    assert_close(mixed[~ones], alone[~ones])
    assert abs((mixed[ones] >= 200).float().mean() - 0.5) < 0.06 and seen["synthetic"] == (mixed >= 200).sum()


@pytest.mark.usefixtures("on_cpu")
def test_soft_targets_are_taught_instead_of_the_class_of_synthetic_images(monkeypatch):
    taught, real, synthetic = [], numbered(10), numbered(10, start=200)
    monkeypatch.setattr(train_cls, "compose", lambda _: lambda x, y, g: (taught.append((x, y)) or x, y))
    soft = torch.rand(10, 2).softmax(1)
    fit(real, synthetic, replace(TINY, share=0.5), soft=soft)
    x, y = (torch.cat(parts) for parts in zip(*taught, strict=True))
    level = data.to_uint8(x[:, 0, 0, 0]).long()
    assert_close(y[level >= 200], soft[level[level >= 200] - 200])
    assert_close(y[level < 200], torch.eye(2)[level[level < 200] % 2])
    fit(real, None, replace(TINY, share=0.0), soft=soft[:0])             # a filter has let nothing through


def coloured(labels, classes, seed=0):
    """Random pictures with these labels, all reddish: their features agree, so gradients add up."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (len(labels), 3, 8, 8), dtype=torch.uint8, generator=g)
    images[:, 0] = images[:, 0] // 4 + 192
    return Scenes(images, torch.tensor(labels), classes, [f"{k}.png" for k in range(len(labels))],
                  torch.arange(len(labels)))


@pytest.mark.usefixtures("on_cpu")
def test_training_is_this_loop_written_out(adamw_by_hand, in_float64):
    """Draw, augment, cross-entropy with smoothed labels, clip, learning rate, AdamW."""
    real, synthetic = coloured([0, 0, 2, 0, 1, 0, 0], list("abc")), coloured([2, 0, 0, 1], list("abc"), 1)
    cfg = replace(TINY, steps=4, warmup=2, lr=4e-3, decay=0.5, smoothing=0.2, share=0.4, seed=7,
                  augment="hflip,rot90,color,cutmix")
    model, _ = fit(real, synthetic, cfg)

    torch.manual_seed(7)
    twin = ViT(3, size=8, patch=4, dim=16, depth=1, heads=2)
    by_hand, norms = adamw_by_hand(twin.parameters(), (0.9, 0.999), lambda p: 0.5 * (p.ndim > 1)), []
    for step, rate in enumerate((2e-3, 4e-3, 4e-3, 2e-3)):               # 2 steps up, then along a cosine
        g = data.rng(7, step)
        x, y = [], []
        for place, kind, u, v in torch.rand(4, 16, generator=g).T.tolist():
            c = sorted(real.labels.tolist())[int(place * 7)]             # a class, as often as it occurs
            pool, chance = (synthetic, v) if kind < 0.4 else (real, u)
            mine = pool.images[pool.labels == c]
            x.append(mine[int(chance * len(mine))] / 127.5 - 1)
            y.append(torch.eye(3)[c])
        x, y = compose(cfg.augment)(torch.stack(x), torch.stack(y), g)
        loss = -((0.8 * y + 0.2 / 3) * twin(x).log_softmax(1)).sum(1).mean()
        gradients = torch.autograd.grad(loss, by_hand.parameters)
        norms.append(sum(d.square().sum() for d in gradients).sqrt().item())
        by_hand.move([d / max(1.0, norms[-1] + 1e-6) for d in gradients], rate)
    assert min(norms) < 1 < max(norms)                                   # some are clipped, some are not
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")


def test_synthetic_images_come_first_and_then_only_real_ones_in_as_many_steps(monkeypatch):
    real, synthetic, cfg = numbered(100), numbered(50, start=200), replace(TINY, steps=10, share=0.3)
    levels, seen = batches(monkeypatch, real, synthetic, replace(cfg, pretrain=True))
    mixed, seen_mixed = batches(monkeypatch, real, synthetic, cfg)
    assert (levels[:3] >= 200).all() and (levels[3:] < 100).all()
    assert seen == dict(steps=10, images=10 * 16, synthetic=3 * 16) and levels.shape == mixed.shape
    assert seen_mixed["images"] == seen["images"] and 0 < (mixed >= 200).sum() < mixed.numel()


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_chances_are_how_often_each_image_is_drawn(share, balance):
    """With classes of different sizes, of which one has no synthetic images and one has no images at all."""
    real = coloured([0, 0, 0, 1, 3, 3], list("abcd"))
    synthetic, n = coloured([3, 0, 0, 3, 3], list("abcd")), 200_000
    mixture = Mixture(real, synthetic, replace(TINY, share=share, balance=balance), None, "cpu")
    chances = mixture.chances()
    index, fake = mixture.draw(n, data.rng(0))
    often = index.bincount(minlength=len(chances)) / n
    assert chances.sum().item() == pytest.approx(1, abs=1e-6)
    assert ((often - chances).abs() <= 5 * (chances * (1 - chances) / n).sqrt()).all()  # 5 standard errors
    assert_close(fake, index >= len(mixture.images) - 5 if share else torch.zeros_like(fake))
    per_class = torch.stack([chances[mixture.targets[:, c] == 1].sum() for c in range(4)])
    assert_close(per_class, torch.tensor([1, 1, 0, 1] if balance else [3, 1, 0, 2]) / (3 if balance else 6))


def test_seed_and_nothing_else_decides_the_weights(monkeypatch):
    real = numbered(20)
    weights = [fit(real, None, replace(TINY, seed=seed))[0].head.weight.detach() for seed in (0, 0, 1)]
    assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert (weights[0] != weights[2]).any()


def test_matrices_decay_and_biases_and_norms_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    matrices, vectors = train_cls.adamw(model, 0.3).param_groups
    assert matrices["params"] == [model[0].weight] and matrices["weight_decay"] == 0.3
    assert len(vectors["params"]) == 3 and vectors["weight_decay"] == 0


def test_it_learns_and_predict_does_not_depend_on_the_batch():
    y = torch.arange(64) % 2
    level = torch.where(y.bool(), 200, 50).to(torch.uint8)
    images = level.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    s = Scenes(images, y, ["dark", "light"], [str(k) for k in range(64)], torch.arange(64))
    model, _ = fit(s, None, replace(TINY, steps=30, lr=3e-3))
    assert_close(predict(model, images), y)
    assert_close(predict(model, images, batch=7), predict(model, images))


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path, monkeypatch):
    real, synthetic, cfg = numbered(20), numbered(20, 100), replace(TINY, share=0.5, augment="hflip,cutmix")
    whole, seen = fit(real, synthetic, cfg, tmp_path / "a.pt", every=3)
    save = data.save_checkpoint

    def save_and_die(*args, **kw):
        save(*args, **kw)
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(train_cls.data, "save_checkpoint", save_and_die)
        fit(real, synthetic, cfg, tmp_path / "b.pt", every=3)
    again, seen_again = fit(real, synthetic, cfg, tmp_path / "b.pt", every=3)
    assert seen == seen_again
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=0)
    finished, seen_finished = fit(real, synthetic, cfg, tmp_path / "b.pt")
    assert seen_finished == seen
    assert_close(finished.head.weight, whole.head.weight)
    assert not finished.training and data.load_checkpoint(tmp_path / "b.pt", "classifier")["step"] == 6


def test_a_checkpoint_of_other_images_or_settings_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    fit(numbered(20), None, TINY, path)
    with pytest.raises(Problem, match="another images"):
        fit(numbered(20, start=1), None, TINY, path)
    with pytest.raises(Problem, match="another lr"):
        fit(numbered(20), None, replace(TINY, lr=0.1), path)


def test_no_step_waits_for_the_device(hasty_steps):
    every = ",".join(set(AUGMENTATIONS) - {"copypaste"})                 # which needs a mask
    fit(numbered(20), numbered(20, 100), replace(TINY, share=0.5, augment=every))
    assert hasty_steps == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(Problem, match="--lr"):
        fit(numbered(20), None, replace(TINY, lr=1e30))


# ---- the recognisers beside the ViT

def moved(module):
    """The module in float64 with all its weights moved, also those that start at 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module.double()


@pytest.mark.parametrize("model, kind", [("vit", Convolutions), ("patches", Patches)])
def test_the_settings_name_the_stem_of_the_vit(model, kind):
    assert isinstance(train_cls.network(replace(TINY, model=model), ["a", "b"], 3).stem, kind)


@pytest.mark.parametrize("model, more", [("vit", {}), ("patches", {}), ("resnet", dict(lr=1e-2))])
def test_every_recogniser_learns_what_a_glance_tells(model, more):
    s = coloured([0, 1] * 16, ["dull", "green"])
    s.images[1::2, 1] = 255
    trained, _ = fit(s, None, replace(TINY, model=model, steps=50, **more))
    assert_close(predict(trained, s.images), s.labels)


def test_a_residual_is_he_et_al_eq_2_with_a_norm_after_each_convolution():
    block, x = moved(Residual(8, 16, stride=2)), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    h = F.conv2d(x, block.conv1.weight, stride=2, padding=1)
    h = F.group_norm(h, 8, block.norm1.weight, block.norm1.bias).relu()
    h = F.group_norm(F.conv2d(h, block.conv2.weight, padding=1), 8, block.norm2.weight, block.norm2.bias)
    assert_close(block(x), (h + F.conv2d(x, block.skip.weight, block.skip.bias, stride=2)).relu())


def test_a_residual_starts_as_relu_of_its_skip():
    torch.manual_seed(0)
    block, x = Residual(8, 16, stride=2), torch.randn(2, 8, 6, 6)
    assert_close(block(x), block.skip(x).relu(), rtol=0, atol=0)


def test_the_first_loss_of_the_resnet_is_ln_K_but_for_a_few_percent_and_reaches_its_first_layer():
    torch.manual_seed(0)
    model, x, y = ResNet(5, width=16), torch.randn(60, 3, 24, 24), torch.arange(60) % 5
    assert model.blocks(x).shape == (60, 64, 3, 3) and model.features(x).shape == (60, 64)
    loss = F.cross_entropy(model(x), y)
    assert loss.item() == pytest.approx(math.log(5), rel=0.03)
    loss.backward()
    assert model.blocks[0].weight.grad.abs().max() > 1e-6


def test_the_resnet_averages_over_all_places_or_over_those_of_the_building():
    for channels in (3, 4):
        model, x = moved(ResNet(5, 16, channels)), torch.randn(2, channels, 16, 16, dtype=torch.float64)
        x[:, 3:] = -1
        x[:, 3:, :8, :8] = 1                                             # of 2 x 2 places the first
        places = model.blocks(x)
        expected = places.mean((2, 3)) if channels == 3 else places[:, :, 0, 0]
        assert_close(model.features(x), expected, rtol=0.01, atol=0.01)


def test_every_parameter_of_the_resnet_gets_a_gradient_and_its_images_do_not_see_each_other():
    model, x = moved(ResNet(3, width=16)), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    assert_close(model(x)[2:3], model(x[2:3]))
    model(x).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if not p.grad.abs().sum() > 0]


# ---- the floor: colours and edges

def test_a_histogram_adds_up_the_weights_of_each_bin():
    index, weights = torch.tensor([[0, 2, 2], [1, 1, 1]]), torch.tensor([[1.0, 2, 4], [1, 1, 0.5]])
    assert train_cls.histogram(index, weights, 4).tolist() == [[1, 0, 6, 0], [0, 2.5, 0, 0]]


def colours_and_edges_by_hand(image):
    """The same, pixel by pixel, of a uint8 image (C, H, W): a list."""
    found, (H, W) = [], image.shape[1:]
    pixel = (image.double() / 127.5 - 1).tolist()
    whole = [[255] * W for _ in range(H)]
    for region in (whole, *image[3:].tolist()):
        inside = [(y, x) for y in range(H) for x in range(W) if region[y][x] > 127]
        bins = [0.0] * 160                                             # 3 x 8 levels, 64 colours, 9 x 8 edges
        for y, x in inside:
            r, g, b = image[:3, y, x].tolist()
            for k, level in enumerate((r, g, b)):
                bins[8 * k + level // 32] += 1 / len(inside)
            bins[24 + 16 * (r // 64) + 4 * (g // 64) + b // 64] += 1 / len(inside)

            def grey(y, x):
                y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)      # the border goes on outside
                return sum(channel[y][x] for channel in pixel[:3]) / 3

            across, down = grey(y, x + 1) - grey(y, x - 1), grey(y + 1, x) - grey(y - 1, x)
            angle = math.degrees(math.atan2(down, across)) % 360
            cell = 3 * (3 * y // H) + 3 * x // W
            bins[88 + 8 * cell + int(angle // 45)] += math.hypot(across, down) / len(inside)
        found += [math.sqrt(b) for b in bins]
    return found


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_and_edges_are_those_counted_pixel_by_pixel(channels):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, channels, 7, 8), dtype=torch.uint8, generator=g)
    images[:, 3:] = (images[:, 3:] > 100) * 255
    expected = torch.tensor([colours_and_edges_by_hand(image) for image in images])
    assert expected.shape == (3, 160 * (channels - 2))
    assert_close(colours_and_edges(data.to_float(images)), expected, rtol=0, atol=1e-5)


def described(*rows):
    """Colours and edges of a grey picture, its levels row by row: (24,), (4, 4, 4), (3, 3, 8)."""
    image = torch.tensor(rows, dtype=torch.uint8).expand(1, 3, -1, -1)
    levels, colours, edges = colours_and_edges(data.to_float(image))[0].split([24, 64, 72])
    return levels, colours.view(4, 4, 4), edges.view(3, 3, 8)


def test_a_flat_picture_has_one_colour_and_no_edges():
    levels, colours, edges = described(*[[200] * 6] * 6)
    expected = torch.zeros(24), torch.zeros(4, 4, 4)
    expected[0][[6, 14, 22]] = expected[1][3, 3, 3] = 1                  # 200 // 32 and 200 // 64
    assert_close((levels, colours, edges), (*expected, torch.zeros(3, 3, 8)))


@pytest.mark.parametrize("turns, direction", [(0, 0), (1, 6), (2, 4), (3, 2)])
def test_an_edge_falls_into_the_direction_from_dark_to_bright_and_into_its_cells(turns, direction):
    picture = torch.tensor([[40, 40, 40, 220, 220, 220]] * 6).rot90(turns)             # against the clock
    edges = described(*picture.tolist())[2]
    cells, directions = edges.sum(2), edges.sum((0, 1))
    assert directions.nonzero().flatten().tolist() == [direction]
    middle = torch.zeros(3, 3)
    middle[:, 1] = 1
    assert_close((cells > 0).float(), middle.rot90(turns))


def test_colours_do_not_tell_where_a_pixel_is_and_edges_do():
    x = torch.rand(1, 3, 6, 6, generator=data.rng(0)) * 2 - 1
    mixed = x.flatten(2)[:, :, torch.randperm(36, generator=data.rng(1))].view_as(x)
    a, b = colours_and_edges(x)[0], colours_and_edges(mixed)[0]
    assert_close(a[:88], b[:88])
    assert (a[88:] - b[88:]).abs().max() > 0.1


def test_edges_do_not_tell_how_bright_a_picture_is_and_colours_do():
    x = torch.rand(1, 3, 6, 6, generator=data.rng(0)) - 0.8
    a, b = colours_and_edges(x)[0], colours_and_edges(x + 0.5)[0]
    assert (a[:88] - b[:88]).abs().max() > 0.1
    assert_close(a[88:], b[88:], rtol=0, atol=1e-3)


def test_with_a_mask_the_second_half_sees_the_building_alone():
    x = torch.rand(2, 4, 12, 12, generator=data.rng(0)) * 2 - 1
    x[:, 3] = -1
    x[0, 3, 4:8, 4:8] = 1                                                # the second image has an empty mask
    other = torch.where(F.pad(torch.ones(6, 6), (3, 3, 3, 3)) > 0, x, -x)        # the mask and a pixel around
    other[:, 3] = x[:, 3]
    a, b = colours_and_edges(x), colours_and_edges(other)
    assert a.shape == (2, 320) and (a[0, :160] - b[0, :160]).abs().max() > 0.1
    assert_close(a[0, 160:], b[0, 160:])
    assert not a[1, 160:].any()
    whole = colours_and_edges(torch.cat([x[:, :3], torch.ones(2, 1, 12, 12)], 1))
    assert_close(whole[:, 160:], whole[:, :160])


def linear(real, synthetic=None, soft=None, **kw):
    return fit(real, synthetic, replace(TINY, model="linear", **kw), soft=soft)


@pytest.mark.usefixtures("on_cpu")
def test_the_linear_one_is_solved_its_gradient_is_0():
    """Of what it says it minimises: the chances times the cross-entropies, plus .01 / 2 |W|^2."""
    real, synthetic = coloured([0, 0, 2, 0, 1], list("abc")), coloured([2, 0, 0, 1], list("abc"), 1)
    model, seen = linear(real, synthetic, share=0.4)
    assert seen == dict(steps=0, images=0, synthetic=0) and not model.training
    f = model.features(data.to_float(torch.cat([real.images, synthetic.images]))).double()
    y = torch.eye(3, dtype=torch.float64)[torch.cat([real.labels, synthetic.labels])]
    chance = torch.tensor([0.2 * 0.6] * 5 + [0.2 * 0.4, 0.6 * 0.4 / 2, 0.6 * 0.4 / 2, 0.2 * 0.4]).double()
    W, b = model.head.weight.detach().double(), model.head.bias.detach().double()
    off = chance[:, None] * ((f @ W.T + b).softmax(1) - y)               # d loss / d logits
    start = chance[:, None] * (1 / 3 - y)
    assert (start.T @ f).abs().max() > 0.1                               # where W = 0, it is not
    assert (off.T @ f + 0.01 * W).abs().max() < 1e-4 and off.sum(0).abs().max() < 1e-4
    assert_close((chance[:, None] * f).sum(0), torch.zeros(160).double(), rtol=0, atol=1e-5)      # mean 0
    spread = (chance[:, None] * f**2).sum(0)
    assert ((spread - 1).abs() < 1e-4)[spread > 1e-6].all() and (spread > 0.9).sum() > 100        # variance 1


@pytest.mark.usefixtures("on_cpu")
def test_chances_count_like_images_that_are_there_more_than_once():
    """Half of the places to four synthetic images is what two real ones twice each beside them would be."""
    real, synthetic = coloured([0, 0, 1, 1], list("ab")), coloured([0, 1, 0, 1, 0, 1, 0, 1], list("ab"), 1)
    repeated = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    images, labels = (torch.cat([getattr(real, part)[repeated], getattr(synthetic, part)])
                      for part in ("images", "labels"))
    both = Scenes(images, labels, real.classes, [""] * 16, torch.arange(16))
    a, b = linear(real, synthetic, share=0.5)[0], linear(both)[0]
    x = data.to_float(coloured([0] * 20, list("ab"), 2).images)
    assert_close(a(x), b(x), rtol=0, atol=1e-3)
    assert a(x).abs().max() > 0.5


@pytest.mark.usefixtures("on_cpu")
def test_the_linear_one_knows_no_augmentation_and_no_seed_and_is_taught_soft_labels(monkeypatch):
    real, synthetic = coloured([0, 0, 1, 1], list("ab")), coloured([0, 1, 0, 1], list("ab"), 1)
    weights = [linear(real, synthetic, share=0.5, **kw)[0].head.weight.detach()
               for kw in (dict(), dict(seed=3), dict(augment="crop,color"), dict(steps=1))]
    assert all(torch.equal(w, weights[0]) for w in weights)
    soft = torch.tensor([[0.8, 0.2]]).expand(4, 2)
    said = linear(real, synthetic, share=1.0, soft=soft)[0](data.to_float(real.images)).softmax(1)
    assert_close(said, soft, rtol=0, atol=1e-3)


# ---- scores and commands

def test_confusion_counts_truth_by_row_and_answer_by_column():
    matrix = confusion(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 1, 1]), 3)
    assert matrix.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]


def test_frequencies_are_put_back_as_far_as_the_held_out_images_say():
    counts, labels = torch.tensor([80, 20, 0]), torch.tensor([0] * 8 + [1] * 2)
    frequency = torch.tensor([0.8, 0.2, 0.01]).log()              # a class without images counts as one
    sure = 9 * torch.eye(3)[labels]
    assert_close(train_cls.put_back(sure, labels, counts), torch.zeros(3))        # right already: tau = 0
    for tau, margin in ((0.25, 0.2), (0.5, 0.6), (1.0, 1.3)):    # by so much too much for the rare class
        wrong = torch.tensor([0, margin, -9.0]).repeat(10, 1)
        wrong[8:, 1] += 9
        assert_close(train_cls.put_back(wrong, labels, counts), tau * frequency)


def test_frequencies_are_put_back_for_the_sake_of_macro_f1_and_not_of_accuracy():
    labels = torch.tensor([0] * 90 + [1] * 10)
    logits = torch.tensor([0.0, -9]).repeat(100, 1)
    logits[75:, 1] = 1                       # all of the rare class are found, with 15 of the common one
    assert_close(train_cls.put_back(logits, labels, torch.tensor([90, 10])), torch.zeros(2))
    assert (labels == 0).double().mean() > (labels == logits.argmax(1)).double().mean()      # more accurate


def test_the_first_command_shown_augments_as_the_default_does():
    assert f"--augment {OVERHEAD}\n" in train_cls.__doc__ and Config().augment == OVERHEAD


@pytest.mark.parametrize("kw, message", [
    (dict(augment="blur"), "blur"), (dict(patch=5), "--patch 5"), (dict(share=1.5), "--share"),
    (dict(dim=18), "--dim 18"), (dict(dim=24), "--dim 24"), (dict(model="mlp"), "resnet, linear"),
    (dict(size=18, patch=6), "convolutions halve")])
def test_bad_settings_are_told(kw, message):
    with pytest.raises(ValueError, match=message):
        Config(**{"size": 16, "patch": 4, **kw})


def test_buildings_of_xbd_are_classified_by_damage(tmp_path, launch):
    small = "--steps 2 --batch 4 --size 16 --patch 8 --dim 16 --depth 1 --heads 2".split()
    root = data.draw_xbd(tmp_path / "xbd", 16)
    done = launch(train_cls, "--data", root, "--out", tmp_path / "x", *small)
    assert done.returncode == 0 and "of 4 classes" in done.stdout and "macro-F1" in done.stdout


def test_the_command_trains_on_a_mixture_and_reads_test_only_if_asked(tmp_path, launch):
    root = data.draw_tree(tmp_path / "t", 5, size=16)
    synthetic = data.draw_tree(tmp_path / "s", 2, seed=1, size=16)
    for k in (1, 2):                                        # synthetic trees need not hold every class
        (synthetic / "runway" / f"runway_00{k}.jpg").unlink()
    flags = "--size 16 --patch 8 --dim 16 --depth 1 --heads 2 --steps 4 --batch 8 --warmup 1".split()
    flags += ["--data", root]
    plain = launch(train_cls, *flags, "--out", tmp_path / "a")
    assert plain.returncode == 0 and "val: accuracy" in plain.stdout and "test:" not in plain.stdout
    half = ("--synthetic", synthetic, "--share", 0.5)
    mixed = launch(train_cls, *flags, "--out", tmp_path / "b", *half, "--test")
    assert mixed.returncode == 0 and "14 synthetic" in mixed.stdout and "test: accuracy" in mixed.stdout
    inside = launch(train_cls, *flags, "--out", root / "c")
    assert inside.returncode == 2 and "would be a class of" in inside.stderr and not (root / "c").exists()
    for k in (2, 3, 4, 5):
        (root / "river" / f"river_00{k}.jpg").unlink()
    few = launch(train_cls, *flags, "--out", tmp_path / "f")
    assert few.returncode == 0 and few.stdout.endswith("; no image of river\n")
    same = launch(train_cls, *flags, "--out", tmp_path / "c", "--synthetic", root, "--share", 0.5)
    assert same.returncode == 2 and "is --data itself" in same.stderr and same.stderr.count("\n") == 1
    alone = launch(train_cls, *flags, "--out", tmp_path / "c", "--synthetic", synthetic)
    assert alone.returncode == 2 and "--share" in alone.stderr and alone.stderr.count("\n") == 1


SMALL = "--size 16 --patch 8 --dim 16 --depth 1 --heads 2 --steps 30 --batch 16 --warmup 3 --lr 3e-3".split()


@pytest.mark.parametrize("model", train_cls.MODELS)
def test_pictures_of_a_folder_are_classified_as_the_trained_model_does(tmp_path, launch, model, monkeypatch):
    root, out = data.draw_tree(tmp_path / "t", 5, size=16), ["--out", tmp_path / "c"]
    made, fit = [], train_cls.fit
    monkeypatch.setattr(train_cls, "fit", lambda *args: made.append(fit(*args)) or made[-1])
    flags = SMALL[:2] if model == "linear" else SMALL
    flags = [*SMALL[:2], *SMALL[4:6], *SMALL[10:]] if model == "resnet" else flags
    assert launch(train_cls, "--data", root, *out, *flags, "--model", model).returncode == 0
    done = launch(train_cls, "--predict", root, *out)                    # no other flags: they are remembered
    assert done.returncode == 0 and "40 pictures of" in done.stdout
    with open(tmp_path / "c" / "predictions.csv") as file:
        header, *rows = csv.reader(file)
    assert header == ["picture", "predicted", "probability"]
    scenes = data.read_folder(root, 16, cache=tmp_path / "cache")
    probability, predicted = train_cls.outputs(made[-1][0], scenes.images).softmax(1).max(1)
    assert [row[0] for row in rows] == scenes.names
    assert [row[1] for row in rows] == [scenes.classes[k] for k in predicted]
    assert_close(torch.tensor([float(row[2]) for row in rows]), probability, rtol=0, atol=1e-4)
    assert len({row[1] for row in rows}) > 1


@pytest.mark.parametrize("kind", [dict(model="linear"), dict(tune="head"), dict(tune="none")])
def test_what_takes_no_steps_does_not_write_over_another_run_either(tmp_path, kind):
    real, path = numbered(20), tmp_path / "c" / "classifier.pt"
    if "tune" in kind:
        kind = kind | dict(init=str(tmp_path / "clip.pt"))
        train_cls.fit_clip(replace(real, captions=[("a river",)] * len(real)), TINY, tmp_path / "clip.pt")
    cfg = replace(TINY, **kind)
    for _ in range(2):                                       # its own it does
        train_cls.begin_and_tune(real, None, cfg, path)
    whole = path.read_bytes()
    with pytest.raises(Problem, match="another seed"):
        train_cls.begin_and_tune(real, None, replace(cfg, seed=1), path)
    with pytest.raises(Problem, match="another images"):
        train_cls.begin_and_tune(real[torch.arange(1, len(real))], None, cfg, path)
    assert path.read_bytes() == whole


def test_what_cannot_be_predicted_is_one_line_and_leaves_the_table_as_it_was(tmp_path, launch):
    root, out = data.draw_tree(tmp_path / "t", 5, size=16), ["--out", tmp_path / "c"]
    pictures, table = tmp_path / "new", tmp_path / "c" / "predictions.csv"
    pictures.mkdir()

    def refusal():
        done = launch(train_cls, "--predict", pictures, *out)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        return done.stderr

    assert "no checkpoint" in refusal()
    launch(train_cls, "--data", root, *out, *SMALL)
    assert "no pictures in" in refusal() and not table.exists()
    (root / "river" / "river_001.jpg").rename(pictures / "a.jpg")
    (pictures / "b.png").write_bytes(b"broken")
    assert "b.png" in refusal() and "--skip-broken" in refusal() and not table.exists()
    assert launch(train_cls, "--predict", pictures, *out, "--skip-broken").returncode == 0
    assert table.read_text().splitlines()[1].startswith("a.jpg,") and table.read_text().count("\n") == 2


def test_the_weakest_class_named_is_one_that_was_tested(tmp_path, launch, monkeypatch):
    root, split = data.draw_tree(tmp_path / "t", 5, size=16), data.split

    def without_beaches(scenes):
        parts = split(scenes)
        return parts | dict(val=parts["val"][scenes.labels[parts["val"]] > 0])

    monkeypatch.setattr(data, "split", without_beaches)
    flags = "--size 16 --patch 8 --dim 16 --depth 1 --heads 2 --steps 2 --batch 8".split()
    said = launch(train_cls, "--data", root, "--out", tmp_path / "x", *flags).stdout
    assert "on 7 images; weakest class " in said and "weakest class beach" not in said
