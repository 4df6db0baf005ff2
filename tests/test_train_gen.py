"""train_gen.py: a generator learns, a killed run ends as others do, images follow from their number."""
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import data
import train_gen
from augment import compose
from data import Problem, Scenes
from experiment import SCALES
from train_gen import Config, divide, edges, generate, load_generator, lowres, noise_of, train, update_ema
from unet import Condition
from vit import LENGTH, Text, word_tokens

TINY = Config(size=8, width=16, mults=(1, 2), blocks=1, timesteps=100, steps=6, batch=8, lr=1e-3, warmup=2,
              augment="none")


def halves(n=64, noise=0.1):
    """8 x 8 grey images: of class 0 the left half is bright, of class 1 the right one."""
    y = torch.arange(n) % 2
    sign = torch.where(torch.arange(8) < 4, 1.0, -1.0)
    grain = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = (1 - 2.0 * y).view(-1, 1, 1, 1) * sign * 0.8 + noise * grain
    return Scenes(data.to_uint8(x), y, ["left", "right"], [f"{k}.png" for k in range(n)], torch.arange(n))


def test_a_diffusion_model_learns_which_half_is_bright():
    generator = train(halves(), replace(TINY, steps=60, batch=16, lr=4e-3, warmup=10, ema=0.95))
    y = torch.tensor([0, 1]).repeat(20)
    x = data.to_float(generate(generator, y, seed=1, calls=20, w=1.5))
    pattern = torch.where(torch.arange(8) < 4, 1.0, -1.0) * (1 - 2.0 * y).view(-1, 1, 1, 1)
    likeness = (x * pattern / 0.8).mean((1, 2, 3))
    assert likeness[y == 0].mean() > 0.7 and likeness[y == 1].mean() > 0.7
    plain, swapped = (generate(generator, which, seed=1, calls=5, w=0.0) for which in (y, 1 - y))
    assert_close(plain, swapped, rtol=0, atol=0)                         # w = 0 does not know the class


def test_folded_pixels_leave_a_checkerboard_unless_x0_is_predicted_as_the_small_comparison_does():
    """The energy of the pattern + - / - +, in grey levels squared; the images to learn have none of it."""
    energy, sign = {}, torch.tensor([1.0, -1.0]).repeat(4)
    for predict in ("v", "x0"):
        cfg = replace(TINY, timesteps=1000, steps=50, batch=16, lr=2e-3, ema=0.95, patch=2, predict=predict)
        images = generate(train(halves(noise=0.0), cfg), torch.arange(40) % 2, seed=1).float()
        energy[predict] = (images * sign * sign[:, None]).mean((2, 3)).square().mean()
    assert energy["x0"] < 1 and energy["v"] > 20
    left, right = images[::2, ..., :4].mean(), images[::2, ..., 4:].mean()
    assert left > right + 100                                            # x0 has learned what to make
    small = [scales["small"].gen for scales in SCALES.values()]
    assert [(gen.patch, gen.predict) for gen in small] == [(2, "x0")] * len(small)


def spoken(n=64, **kw):
    """Halves with one to three sentences each."""
    real = halves(n, **kw)
    sides = ["LEFT.", "left side", "bright left"], ["right", "Right side"]
    real.captions = [tuple(sides[y][:1 + k % 3]) for k, y in enumerate(real.labels.tolist())]
    return real


@pytest.mark.parametrize("given", ["", "edges", "text", "text,class"])
@pytest.mark.usefixtures("on_cpu")
def test_training_is_this_loop_written_out(adamw_by_hand, in_float64, given):
    """Draw, augment, say, hide each part if there are several, loss, clip, rate, AdamW, average."""
    real = spoken(12, noise=0.5)
    cfg = replace(TINY, steps=4, warmup=2, lr=2e-2, ema=0.2, drop=0.4, seed=7, given=given,
                  augment="hflip,rot90,crop")
    generator = train(real, cfg)

    tower = (len(generator.words) + 3, LENGTH, 32, 2, 1) if "text" in given else ()
    diffusion, model = train_gen.networks(cfg, 2, channels=1, tower=tower)
    by_hand, norms = adamw_by_hand(model.parameters(), (0.9, 0.99), lambda p: 0.01), []
    average = [p.detach().clone() for p in by_hand.parameters]
    for step, rate in enumerate((1e-2, 2e-2, 2e-2, 1e-2)):               # 2 steps up, then along a cosine
        g = data.rng(7, step)
        places = torch.randint(12, (8,), generator=g)
        x0, _ = compose(cfg.augment)(real.images[places] / 127.5 - 1, None, g)
        cond = Condition(real.labels[places], hint=edges(x0) if given == "edges" else None)
        if "text" in given:
            rounds = torch.randint(3, (8,), generator=g)
            some = [real.captions[k] for k in places]
            texts = [said[r % len(said)] for said, r in zip(some, rounds.tolist(), strict=True)]
            cond.text = word_tokens(texts, generator.words)
        if given == "text":
            cond.y = -torch.ones_like(cond.y)
        if given:
            cond = cond.hide_each(0.4, g)
        loss, _ = diffusion.loss(model, x0, cond, 0.4, g)
        gradients = torch.autograd.grad(loss.mean(), by_hand.parameters)
        norms.append(sum(d.square().sum() for d in gradients).sqrt().item())
        by_hand.move([d / max(1.0, norms[-1] + 1e-6) for d in gradients], rate)
        decay = (0.1, 2 / 11, 0.2, 0.2)[step]                            # (1 + step) / (10 + step), up to .2
        average = [decay * a + (1 - decay) * p.detach()
                   for a, p in zip(average, by_hand.parameters, strict=True)]
    assert min(norms) < 1 < max(norms)                                   # some are clipped, some are not
    for (name, a), b in zip(generator.model.named_parameters(), average, strict=True):
        assert_close(a, b, rtol=0, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("given", ["", "text"])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path, monkeypatch, given):
    cfg, real = replace(TINY, augment="hflip,rot90", given=given), spoken()
    whole = train(real, cfg, tmp_path / "a" / "g.pt", every=3)
    save = data.save_checkpoint

    def save_and_die(*args, **kw):
        save(*args, **kw)
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(train_gen.data, "save_checkpoint", save_and_die)
        train(real, cfg, tmp_path / "b" / "g.pt", every=3)
    assert data.load_checkpoint(tmp_path / "b" / "g.pt", "generator")["step"] == 3
    torch.manual_seed(99)
    again = train(real, cfg, tmp_path / "b" / "g.pt", every=3)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=0)
    assert (tmp_path / "a" / "g.csv").read_text() == (tmp_path / "b" / "g.csv").read_text()


@pytest.mark.parametrize("given", ["", "text"])
def test_no_step_waits_for_the_device(hasty_steps, given):
    train(spoken(), replace(TINY, augment="hflip,rot90", given=given))
    assert hasty_steps == [1, 2, 3, 4]


def test_a_checkpoint_of_other_settings_or_images_is_refused(tmp_path):
    train(halves(), TINY, tmp_path / "g.pt")
    others = halves(noise=0.2)                                           # the same names, but other pixels
    longer = replace(TINY, lr=2e-3, steps=7)
    runs = (halves(), longer, "steps, lr"), (halves(32), TINY, "names"), (others, TINY, "images")
    for real, cfg, what in runs:
        with pytest.raises(Problem, match=f"another {what}:"):
            train(real, cfg, tmp_path / "g.pt")


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path):
    with pytest.raises(Problem, match="--lr"):
        train(halves(), replace(TINY, lr=1e30, steps=20), tmp_path / "g.pt")
    assert not (tmp_path / "g.pt").exists()


def test_the_log_says_how_the_loss_of_each_quarter_of_t_went(tmp_path):
    train(halves(), replace(TINY, steps=40, batch=16), tmp_path / "g.pt", every=20)
    rows = [list(map(float, line.split(","))) for line in (tmp_path / "g.csv").read_text().split("\n")[1:-1]]
    assert [row[0] for row in rows] == [20, 40]
    assert all(min(row[2:]) < row[1] < max(row[2:]) for row in rows) and rows[1][1] < rows[0][1] < 1.1


def test_the_grid_has_a_row_of_images_for_each_class(tmp_path):
    rgb = replace(halves(), images=halves().images.repeat(1, 3, 1, 1))
    train(rgb, TINY, tmp_path / "g.pt", look=5)
    with Image.open(tmp_path / "samples-000006.png") as grid:
        assert grid.size == (5 * 8 * 10, 2 * 8 * 10)                 # 8 px, a line around, 8 times as large


def test_ema_is_the_weighted_mean_of_all_weights_so_far():
    model, ema = nn.Linear(2, 1), nn.Linear(2, 1)
    model.register_buffer("count", torch.zeros(1))
    ema.register_buffer("count", torch.zeros(1))
    expected = ema.weight.detach().clone()
    for k in range(5):
        with torch.no_grad():
            model.weight.fill_(k)
            model.count.fill_(k)
        update_ema(ema, model, 0.9)
        expected = 0.9 * expected + 0.1 * k
    assert_close(ema.weight.detach(), expected)
    assert ema.count == 4


def test_an_image_does_not_depend_on_which_others_share_its_batch():
    whole, part = noise_of([5, 6, 7], (3, 4, 4)), noise_of([6], (3, 4, 4))
    for _ in range(2):
        a, b = whole(), part()
        assert_close(a[1:2], b)
        assert (a[0] != a[1]).any() and (a[1] != a[2]).any()


def test_image_k_follows_from_seed_and_k_whatever_the_batch():
    generator = train(halves(), TINY)
    y = torch.tensor([0, 1, 0, 1, 0])
    whole = generate(generator, y, seed=3, calls=3)
    assert (whole.int() - generate(generator, y, seed=3, calls=3, batch=2).int()).abs().max() <= 1
    assert (whole[0] != whole[2]).any() and (whole != generate(generator, y, seed=4, calls=3)).any()


def test_neighbouring_seeds_have_no_image_in_common():
    generator, y = train(halves(), TINY), torch.zeros(4, dtype=torch.long)
    first, second = (generate(generator, y, seed, calls=3) for seed in (0, 1))
    assert not any(torch.equal(a, b) for a in first for b in second)


def test_a_loaded_generator_makes_the_same_images(tmp_path):
    made = train(halves(), TINY, tmp_path / "g.pt")
    loaded = load_generator(tmp_path / "g.pt")
    y = torch.tensor([0, 1])
    assert loaded.classes == ["left", "right"] and loaded.config == TINY and not loaded.model.training
    assert_close(generate(loaded, y, seed=0, calls=3), generate(made, y, seed=0, calls=3))


@pytest.mark.parametrize("kw, message", [
    (dict(augment="blur"), "blur"), (dict(schedule="x"), "flow"), (dict(predict="x"), "x0"),
    (dict(width=20), "--width 20"), (dict(schedule="linear", timesteps=20), "--timesteps 20"),
    (dict(size=18), "divisible by 4")])
def test_bad_settings_are_told(kw, message):
    with pytest.raises(ValueError, match=message):
        Config(**{"size": 16, "mults": (1, 2, 2), **kw})


# ---- what it is told beside the class

@pytest.mark.parametrize("C, told, made, hint", [
    (3, "", "012", ""), (4, "", "0123", ""), (6, "", "012345", ""), (7, "", "0123456", ""),
    (4, "mask", "012", "3"), (6, "pre", "012", "345"), (7, "mask", "012345", "6"),
    (7, "pre", "0126", "345"), (7, "pre,mask", "012", "3456"), (7, "mask,pre", "012", "3456")])
def test_each_channel_is_either_made_or_told(C, told, made, hint):
    x = torch.arange(C).view(1, C, 1, 1) + 10.0 * torch.rand(2, 1, 8, 8)
    x0, found = divide(x, told.split(","))
    assert_close(x0, x[:, [int(k) for k in made]])
    assert_close(found, x[:, [int(k) for k in hint]] if hint else None)


@pytest.mark.parametrize("C", [3, 4, 6, 7])
def test_hints_of_the_image_itself_are_of_its_rgb_and_take_nothing_from_it(C):
    x = torch.rand(2, C, 8, 8)
    x0, hint = divide(x, ["edges", "lowres"])
    assert_close(x0, x)
    assert_close(hint, torch.cat([lowres(x[:, :3]), edges(x[:, :3])], 1))
    if C == 7:
        x0, hint = divide(x, ["pre", "lowres", "edges"])
        assert_close(hint, torch.cat([x[:, 3:6], lowres(x[:, :3]), edges(x[:, :3])], 1))


def test_a_low_resolution_keeps_means_and_slopes_and_nothing_finer_than_four_pixels():
    x, ramp = torch.randn(2, 3, 16, 24), torch.arange(16.0).expand(1, 3, 16, 16)
    assert_close(lowres(x).mean((2, 3)), x.mean((2, 3)))
    assert_close(lowres(ramp)[..., 2:-2], ramp[..., 2:-2])               # from the first middle to the last
    assert_close(lowres(ramp)[..., :2], torch.full((1, 3, 16, 2), 1.5))
    fine = torch.tensor([1.0, -1.0]).repeat(8).expand(1, 3, 16, 16)
    assert_close(lowres(fine), torch.zeros(1, 3, 16, 16))
    assert lowres(x).shape == x.shape


def test_edges_are_where_the_grey_rises_by_more_than_the_threshold_per_pixel():
    def marked(grey, *threshold):
        x = torch.tensor([0.5, 1.0, 1.5]).view(1, 3, 1, 1) * grey        # its grey is the mean
        found = edges(x, *threshold)
        assert found.shape == (1, 1, 9, 9) and set(found.unique().tolist()) <= {-1.0, 1.0}
        return found[0, 0] > 0

    step = (torch.arange(9) >= 4).float().expand(9, 9)                   # half of it in each of two columns
    two = ((torch.arange(9) == 3) | (torch.arange(9) == 4)).expand(9, 9)
    assert_close(marked(0.31 * step), two)
    assert_close(marked(-0.31 * step.T), two.T)
    assert not marked(0.29 * step).any() and marked(0.29 * step, 0.14).any()
    assert not marked(torch.ones(9, 9)).any()                            # nor is the border one
    slope = torch.arange(9).float()[:, None] + torch.arange(9)           # sqrt 2 per pixel
    assert marked(0.11 * slope)[1:-1, 1:-1].all() and not marked(0.10 * slope).any()
    spot = torch.zeros(9, 9)
    spot[4, 4] = 0.61                                                    # beside it 1/4, diagonally .177
    assert marked(spot).nonzero().tolist() == [[3, 4], [4, 3], [4, 5], [5, 4]]


def steps_of(side, light, column):
    """Grey images with a step of .6 up at this column or down, about so much light: Scenes with numbers."""
    x = torch.where(torch.arange(8) < column[:, None], -0.3, 0.3) * side[:, None] + light[:, None]
    x = x[:, None, None].expand(-1, 1, 8, 8)
    n, numbers = len(light), torch.stack([5 + 3 * light, torch.full_like(light, float("nan"))], 1)
    return Scenes(data.to_uint8(x), (side > 0).long(), ["down", "up"], [f"{k}" for k in range(n)],
                  torch.arange(n), numbers=numbers, measures=("light", "haze"))


def some_steps(n, seed):
    g = torch.Generator().manual_seed(seed)
    side, light, column = (torch.rand(n, generator=g) for _ in range(3))
    return steps_of(2.0 * (side > 0.5) - 1, 1.2 * light - 0.6, torch.where(column > 0.5, 2, 6))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A generator that is told where the edge is, and how light it is; and where its checkpoint is."""
    path = tmp_path_factory.mktemp("told") / "g.pt"
    cfg = replace(TINY, mults=(1,), steps=200, batch=32, lr=1e-2, warmup=20, ema=0.95, predict="x0",
                  given="edges,numbers")
    return train(some_steps(128, 0), cfg, path), path


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.float(), b.float()]))[0, 1].item()


def test_what_is_made_follows_the_hint_and_the_number_it_was_told(told):
    generator, like = told[0], some_steps(60, 1)

    def found(images):
        x = data.to_float(images)[:, 0]
        return x.diff(dim=2).mean(1).abs().argmax(1), x.mean((1, 2))     # where the step is, how light it is

    asked, light = found(like.images)[0], like.numbers[:, 0]
    where, bright = found(generate(generator, like.labels, 2, calls=8, w=1.0, like=like))
    assert correlation(where, asked) > 0.9 and correlation(bright, light) > 0.8
    mute = replace(like, numbers=float("nan") * like.numbers)            # edges alone do not say how light
    where, bright = found(generate(generator, like.labels, 2, calls=8, w=1.0, like=mute))
    assert correlation(where, asked) > 0.9 and abs(correlation(bright, light)) < 0.5
    others = like[torch.arange(60).roll(1)]                              # the one that was asked, no other
    where, bright = found(generate(generator, like.labels, 2, calls=8, w=1.0, like=others))
    assert correlation(where, asked.roll(1)) > 0.9 and correlation(bright, light.roll(1)) > 0.8
    assert max(abs(correlation(where, asked)), abs(correlation(bright, light))) < 0.5


def test_a_start_near_the_image_gives_it_back_and_one_at_the_end_of_the_chain_does_not():
    generator, like = train(halves(), TINY), halves(6, noise=0.5)
    near, half, whole, none = (generate(generator, like.labels, 1, like=like, start=share).int()
                               for share in (0.02, 0.5, 1.0, None))
    off = [(images - like.images.int()).abs().float().mean() for images in (near, half, whole)]
    assert off[0] < 6 < off[1] < off[2] - 10
    assert (whole - none).abs().max() <= 2


def test_painting_keeps_the_known_pixels_exactly_and_changes_the_others():
    generator, like = train(halves(), TINY), halves(6, noise=0.5)
    paint = torch.zeros(6, 1, 8, 8, dtype=torch.bool)
    for k in range(6):
        paint[k, :, k:k + 3, 2:5] = True                                 # of each image another hole
    images = generate(generator, like.labels, 1, calls=5, like=like, paint=paint)
    assert (images == like.images)[~paint].all()
    more = generate(generator, like.labels, 1, calls=5, like=like, paint=paint, rounds=3)
    assert (more == like.images)[~paint].all() and (more != images)[paint].float().mean() > 0.5
    assert ((images.int() - like.images.int()).abs()[paint].view(6, 9) > 3).float().mean(1).min() > 0.5


@pytest.mark.parametrize("more", [{}, dict(start=0.5), dict(paint=True)])
def test_image_k_follows_from_seed_and_k_also_if_it_is_told_or_begins_somewhere(told, more):
    like, more = some_steps(5, 1), dict(more)
    if "paint" in more:
        more["paint"] = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    whole = generate(told[0], like.labels, 3, calls=3, like=like, **more)
    parts = generate(told[0], like.labels, 3, calls=3, like=like, batch=2, **more)
    assert (whole.int() - parts.int()).abs().max() <= 1 and (whole[0] != whole[1]).any()
    assert (whole != generate(told[0], like.labels, 4, calls=3, like=like, **more)).any()


def test_a_checkpoint_knows_what_it_must_be_told(told):
    made, path = told
    loaded, like = load_generator(path), some_steps(4, 1)
    assert loaded.config.told == ["edges", "numbers"] and loaded.measures == ["light", "haze"]
    assert_close(generate(loaded, like.labels, 0, calls=3, like=like),
                 generate(made, like.labels, 0, calls=3, like=like), rtol=0, atol=0)
    assert (loaded.model.numbers.least[0], loaded.model.numbers.most[0]) != (0, 1)        # the range it saw
    with pytest.raises(AssertionError, match="like what"):
        generate(loaded, like.labels, 0, calls=3)


# ---- sentences

@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A generator that is told sentences instead of classes, and where its checkpoint is."""
    path = tmp_path_factory.mktemp("text") / "g.pt"
    cfg = replace(TINY, steps=100, batch=32, lr=4e-3, warmup=10, ema=0.9, predict="x0", given="text")
    return train(spoken(), cfg, path), path


def side(images):
    """How much brighter the left half is, (N,)."""
    x = data.to_float(images)
    return (x[..., :4] - x[..., 4:]).mean((1, 2, 3))


def test_what_is_made_follows_the_sentence_and_not_the_class(speaker):
    y, texts = torch.arange(40) % 2, ["bright left"] * 20 + ["right"] * 20
    images = generate(speaker[0], y, seed=1, calls=5, w=3.0, texts=texts)
    assert (side(images)[:20] > 0.3).float().mean() > 0.7 and (side(images)[20:] < -0.3).float().mean() > 0.7
    assert_close(generate(speaker[0], 1 - y, seed=1, calls=5, w=3.0, texts=texts), images, rtol=0, atol=0)
    mute, empty = (generate(speaker[0], y, seed=1, calls=5, w=w, texts=some)
                   for w, some in ((0.0, texts), (1.0, [""] * 40)))
    assert_close(mute, empty, rtol=0, atol=1)                            # guidance is over the text
    like = spoken(40)
    texts = [some[k % len(some)] for k, some in enumerate(like.captions)]
    assert_close(generate(speaker[0], y, 1, calls=3, like=like),
                 generate(speaker[0], y, 1, calls=3, texts=texts), rtol=0, atol=0)


def test_image_k_follows_from_seed_k_and_its_text_and_a_loaded_generator_makes_it_too(speaker):
    y, texts = torch.zeros(5, dtype=torch.long), ["left", "", "Its right side!", "right", "left"]
    whole = generate(speaker[0], y, 3, calls=3, texts=texts)
    assert (whole.int() - generate(speaker[0], y, 3, calls=3, texts=texts, batch=2).int()).abs().max() <= 1
    with pytest.raises(AssertionError, match="like what"):
        generate(speaker[0], y, 3, calls=3)
    loaded = load_generator(speaker[1])
    assert loaded.words == ["bright", "left", "right", "side"]
    assert_close(generate(loaded, y, 3, calls=3, texts=texts), whole, rtol=0, atol=0)


def test_the_text_tower_of_a_clip_reads_what_it_did_and_does_not_learn(tmp_path):
    torch.manual_seed(1)
    clip = nn.ModuleDict(dict(text=Text(6, LENGTH, 8, 1, 2), image=nn.Linear(1, 1)))
    words, shape = ["half", "left", "right"], dict(dim=8, depth=1, heads=2)
    data.save_checkpoint(tmp_path / "clip.pt", "clip", dict(config=shape, words=words), 0, dict(model=clip))
    cfg = replace(TINY, given="text", tower=str(tmp_path / "clip.pt"))
    made = train(spoken(), cfg, tmp_path / "g.pt", every=3)
    (tmp_path / "clip.pt").unlink()
    loaded = load_generator(tmp_path / "g.pt")
    for generator in (made, loaded):
        assert generator.words == words
        for a, b in zip(generator.model.text.tower.parameters(), clip["text"].parameters(), strict=True):
            assert_close(a, b, rtol=0, atol=0)
    y = torch.zeros(2, dtype=torch.long)
    assert_close(*(generate(g, y, 0, calls=2, texts=["a left half", "right"]) for g in (made, loaded)))


def test_what_does_not_learn_has_no_gradient_to_sum(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1))
    monkeypatch.setattr(data.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(data, "total", lambda x: 3 * x)                  # three processes, all alike
    model(torch.ones(1, 2)).sum().backward()
    data.sum_gradients(model)
    assert model[1].bias.grad.item() == 3 and model[0].weight.grad is None


# ---- the command line

def test_the_commands_train_and_make_pictures_that_can_be_read_back(tmp_path, launch):
    root = data.draw_tree(tmp_path / "t", 5, size=16)
    flags = "--size 16 --width 16 --mults 1,2 --blocks 1 --timesteps 5 --steps 4 --batch 4 --warmup 2".split()
    trained = launch(train_gen, "--data", root, "--out", tmp_path / "gen", *flags, "--every", 2,
                     "--per-class", 2)
    assert trained.returncode == 0, trained.stderr
    written = {p.name for p in (tmp_path / "gen").iterdir()}
    assert written == {"generator.pt", "generator.csv", "samples-000002.png", "samples-000004.png"}
    checkpoint = tmp_path / "gen" / "generator.pt"
    made = launch(train_gen, "--sample", checkpoint, "--classes", "river,forest", "--count", 3, "--calls", 2,
                  "--out", tmp_path / "made")
    assert made.returncode == 0, made.stderr
    back = data.read_folder(tmp_path / "made", 16, cache=tmp_path / "cache")
    assert back.classes == ["forest", "river"] and back.images.shape == (6, 3, 16, 16)
    assert len(back.groups.unique()) == 6
    assert Path(tmp_path / "made" / "grid.png").exists()
    twice = launch(train_gen, "--sample", checkpoint, "--calls", 2, "--out", tmp_path / "made")
    assert twice.returncode == 2 and "already" in twice.stderr and twice.stderr.count("\n") == 1
    once = launch(train_gen, "--sample", checkpoint, "--classes", "river, river", "--count", 1, "--calls", 2,
                  "--out", tmp_path / "once")
    assert once.returncode == 0 and once.stdout.startswith("1 images")
    wrong = launch(train_gen, "--sample", checkpoint, "--classes", "moon")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert "moon" in wrong.stderr and "river" in wrong.stderr


def test_a_tree_is_made_whole_or_not_at_all(checkpoints, tmp_path, monkeypatch, launch):
    argv = ["--sample", checkpoints / "plain.pt", "--count", 2, "--calls", 2, "--out", tmp_path / "m"]
    kept, save = [], data.save_picture

    def once(*args, **kw):
        if kept:
            raise KeyboardInterrupt
        kept.append(save(*args, **kw))

    monkeypatch.setattr(data, "save_picture", once)
    assert launch(train_gen, *argv).returncode == 130 and not [*tmp_path.rglob("*.png")]
    monkeypatch.setattr(data, "save_picture", save)
    assert launch(train_gen, *argv).returncode == 0 and len([*tmp_path.rglob("*_*.png")]) == 4


def test_a_class_that_is_named_any_is_told(tmp_path):
    real = replace(halves(8), classes=["any", "other"])
    generator = train(real, replace(TINY, steps=1), tmp_path / "g.pt")
    (name, number, _), _ = train_gen.asked(train_gen.Script(sample="g.pt"), generator)
    assert (name, number) == ("any", 0)


def picture(path, size=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((size, size)).convert("RGB").save(path)
    return path


def test_the_commands_tell_a_generator_edges_and_numbers_of_pictures_and_say_where_to_start(tmp_path, launch):
    root, flags = data.draw_tree(tmp_path / "t", 5, size=16), "--given edges,numbers --augment none --size 16"
    flags = f"{flags} --width 16 --mults 1,2 --blocks 1 --timesteps 5 --steps 2 --batch 4 --warmup 1".split()
    trained = launch(train_gen, "--data", root, "--out", tmp_path / "gen", *flags)
    assert trained.returncode == 0, trained.stderr
    like = data.draw_tree(tmp_path / "like", 1, seed=1, size=16)
    hole = tmp_path / "hole.png"
    pixels = torch.zeros(3, 16, 16, dtype=torch.uint8)
    pixels[:, 4:9, 4:9] = 255
    data.save_picture(data.picture(pixels), hole)
    made = launch(train_gen, "--sample", tmp_path / "gen/generator.pt", "--classes", "river,any",
                  "--count", 2, "--calls", 3, "--like", like, "--paint", hole, "--out", tmp_path / "made")
    assert made.returncode == 0, made.stderr
    real = data.read_pictures(like, 16)
    assert len(real) == 8 and real.measures == ("scale", "light", "haze")
    for name in ("river", "any"):                                        # of each picture two, in its order
        files = sorted((tmp_path / "made" / name).glob("*.png"))
        images = torch.stack([torch.from_numpy(data.decode(path, 16)) for path in files])
        same = images == real.images.repeat_interleave(2, 0)
        assert len(images) == 16 and same[..., pixels[0] == 0].all() and not same[..., 4:9, 4:9].all()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Generators of 8 x 8 pixels that were told nothing, numbers, and the picture from before."""
    root, rgb = tmp_path_factory.mktemp("made"), halves(12).images.expand(-1, 3, -1, -1)
    numbers = replace(halves(12), images=rgb, numbers=torch.rand(12, 1), measures=("light",))
    six = replace(halves(12), images=rgb.repeat(1, 2, 1, 1))
    text = replace(numbers, captions=[("the left", "a half"), ("its right side",)] * 6)
    for real, given in ((numbers, ""), (numbers, "numbers"), (six, "pre"), (text, "text")):
        train(real, replace(TINY, steps=1, given=given), root / f"{given or 'plain'}.pt")
    return root


@pytest.mark.parametrize("which, flags, said", [
    ("numbers", "", "--like is missing: .* numbers"),
    ("plain", "--start .5", "--like is missing: .* --start"),
    ("plain", "--paint ok/a.png", "--like is missing: .* --paint"),
    ("plain", "--like ok --start 1.5", "--start 1.5: 0 to 1"),
    ("plain", "--like ok --start -.1", "--start -0.1"),
    ("plain", "--like ok --paint ok/a.png --rounds 0", "--rounds 0: 1 to 1000"),
    ("plain", "--like nowhere --start .5", "no pictures in nowhere"),
    ("plain", "--like empty --start .5", "no pictures in empty"),
    ("plain", "--like broken --start .5", "do not decode .*b.png"),
    ("plain", "--like broken/b.png --start .5 --skip-broken", "no picture decodes"),
    ("plain", "--like ok --paint broken/b.png", "do not decode .*b.png"),
    ("plain", "--like ok --paint nowhere.png", "--paint nowhere.png: give one picture"),
    ("plain", "--like ok --paint ok", "--paint ok: give one picture"),
    ("numbers", "--like ok", "must be told light, here are none"),
    ("numbers", "--like others", "must be told light, here are haze"),
    ("numbers", "--like strangers", "numbers.csv names no picture"),
    ("pre", "--like ok", "--like ok: pictures alone; .*xBD tree"),
    ("plain", "--prompts river", "--prompts river: .*plain.pt is told no text"),
    ("text", "--like ok --prompts left", "--like ok: .*give --start or --paint"),
    ("text", "--prompts ;", "--prompts ;: there is no sentence"),
    ("text", "--prompts left;moon", "no word of 'moon'"),
    ("text", "--prompts empty.txt", "there is no sentence"),
    ("text", "--prompts latin.txt", "latin.txt is no text in UTF-8"),
    ("text", "--prompts " + "moon;" * 100, "no word of 'moon'"),
])
def test_a_wrong_or_missing_like_is_one_line_and_nothing_is_written(checkpoints, tmp_path, monkeypatch,
                                                                    launch, which, flags, said):
    monkeypatch.chdir(tmp_path)
    for folder in ("ok", "others", "strangers"):
        picture(tmp_path / folder / "a.png")
    (tmp_path / "others/numbers.csv").write_text("picture,haze\na.png,1\n")
    (tmp_path / "strangers/numbers.csv").write_text("picture,light\nx.png,1\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/b.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"a riv\xe9r")
    before = sorted(tmp_path.rglob("*"))
    told = launch(train_gen, "--sample", checkpoints / f"{which}.pt", "--out", "made", "--calls", 2,
                  *flags.split())
    *skipped, line = told.stderr.splitlines()
    assert told.returncode == 2 and re.search(said, line), told.stderr
    assert all(other.startswith("skipped") for other in skipped) and sorted(tmp_path.rglob("*")) == before


def test_the_commands_tell_a_generator_sentences_and_numbers_of_a_caption_set(tmp_path, launch):
    images, rows = [], ["picture,gsd"]
    for k, part in enumerate(["train", "train", "val", "test"]):
        picture(tmp_path / f"t/{k}.png", size=16 + k)
        sentences = [dict(raw="A river."), dict(raw="trees")]
        images.append(dict(filename=f"{k}.png", split=part, sentences=sentences))
        rows.append(f"{k}.png,{k}")
    (tmp_path / "t/dataset.json").write_text(json.dumps(dict(images=images)))
    (tmp_path / "t/numbers.csv").write_text("\n".join(rows))
    flags = "--size 8 --width 16 --mults 1,2 --blocks 1 --steps 2 --batch 4 --warmup 1 --given text,numbers"
    trained = launch(train_gen, "--data", tmp_path / "t", "--out", tmp_path / "gen", *flags.split())
    assert trained.returncode == 0, trained.stderr
    made = launch(train_gen, "--sample", tmp_path / "gen/generator.pt", "--prompts", "trees;a river",
                  "--count", 2, "--calls", 2, "--like", tmp_path / "t", "--out", tmp_path / "made")
    assert made.returncode == 0, made.stderr
    assert len(list(tmp_path.glob("made/trees/*.png"))) == len(list(tmp_path.glob("made/a_river/*.png"))) == 8


def test_the_commands_say_what_to_make_and_of_which_class(tmp_path, launch, checkpoints):
    path = checkpoints / "text.pt"
    made = launch(train_gen, "--sample", path, "--count", 2, "--calls", 2, "--out", tmp_path / "a",
                  "--prompts", "a LEFT half;{} side; The {}, shiny")
    assert made.returncode == 0, made.stderr
    assert made.stderr == f"{path} has never read shiny: left out\n"
    found = sorted(p.relative_to(tmp_path / "a").as_posix() for p in tmp_path.glob("a/*/*.png"))
    assert found == ["a_LEFT_half/a_LEFT_half_00001.png", "a_LEFT_half/a_LEFT_half_00002.png",
                     *(f"{name}/{name}_{k:05d}.png" for name, ks in (("left", (3, 4, 7, 8)),
                                                                     ("right", (5, 6, 9, 10))) for k in ks)]
    (tmp_path / "prompts.txt").write_text("left\nits right half\n")
    made = launch(train_gen, "--sample", path, "--count", 1, "--calls", 2, "--out", tmp_path / "b",
                  "--prompts", tmp_path / "prompts.txt")
    assert made.returncode == 0 and not made.stderr, made.stderr
    texts = ["left", "its right half"]
    images = generate(load_generator(path), torch.tensor([-1, -1]), 0, calls=2, texts=texts)
    for name, image in zip(("left", "its_right_half"), images, strict=True):
        with Image.open(next((tmp_path / "b" / name).glob("*.png"))) as pil:
            assert (np.asarray(pil) == image.permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("given, said", [
    ("edgs", "--given edgs: known are pre, mask, lowres, edges, numbers, text, class"),
    ("text", "--given text: the data have none"), ("text,edges --tower t/a/0.png", "--given text: the data"),
    ("edges --tower x.pt", "--tower x.pt is for --given text"),
    ("pre", "--given pre: the data have"),
    ("mask,edges", "--given mask: the data have"), ("numbers", "--given numbers: the data have"),
    ("lowres --size 6", "--size 6 must be divisible by 4")])
def test_what_the_data_lack_cannot_be_given(tmp_path, monkeypatch, launch, given, said):
    monkeypatch.chdir(tmp_path)
    for k in range(10):
        picture(tmp_path / f"t/{'ab'[k % 2]}/{k}.png", size=16 + k)
    told = launch(train_gen, "--data", "t", "--out", "gen", "--size", 8, "--mults", "1,2", "--steps", 1,
                  "--width", 8, "--given", *given.split())
    assert told.returncode == 2 and said in told.stderr and told.stderr.count("\n") == 1
    assert not (tmp_path / "gen").exists()
