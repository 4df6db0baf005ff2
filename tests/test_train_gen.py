"""train_gen.py: a generator learns, a killed run ends as others do, images follow from their number."""
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import data
import train_gen
from augment import compose
from data import Problem, Scenes
from experiment import SCALES
from train_gen import Config, generate, load_generator, noise_of, train, update_ema
from unet import Condition

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
    generator = train(halves(), replace(TINY, steps=200, batch=32, lr=2e-3, warmup=20, ema=0.95))
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
        cfg = replace(TINY, timesteps=1000, steps=50, batch=32, lr=2e-3, ema=0.95, patch=2, predict=predict)
        images = generate(train(halves(noise=0.0), cfg), torch.arange(40) % 2, seed=1).float()
        energy[predict] = (images * sign * sign[:, None]).mean((2, 3)).square().mean()
    assert energy["x0"] < 1 and energy["v"] > 20
    small = [scales["small"].gen for scales in SCALES.values()]
    assert [(gen.patch, gen.predict) for gen in small] == [(2, "x0")] * len(small)


def test_training_is_this_loop_written_out(adamw_by_hand, in_float64):
    """Draw, augment, loss, clip, learning rate, AdamW, and an average that forgets its start sooner."""
    real = halves(12, noise=0.5)
    cfg = replace(TINY, steps=4, warmup=2, lr=2e-2, ema=0.2, drop=0.4, seed=7, augment="hflip,rot90,crop")
    generator = train(real, cfg)

    diffusion, model = train_gen.networks(cfg, 2, channels=1)
    by_hand, norms = adamw_by_hand(model.parameters(), (0.9, 0.99), lambda p: 0.01), []
    average = [p.detach().clone() for p in by_hand.parameters]
    for step, rate in enumerate((1e-2, 2e-2, 2e-2, 1e-2)):               # 2 steps up, then along a cosine
        g = data.rng(7, step)
        places = torch.randint(12, (8,), generator=g)
        x0, _ = compose(cfg.augment)(real.images[places] / 127.5 - 1, None, g)
        loss, _ = diffusion.loss(model, x0, Condition(real.labels[places]), 0.4, g)
        gradients = torch.autograd.grad(loss.mean(), by_hand.parameters)
        norms.append(sum(d.square().sum() for d in gradients).sqrt().item())
        by_hand.move([d / max(1.0, norms[-1] + 1e-6) for d in gradients], rate)
        decay = (0.1, 2 / 11, 0.2, 0.2)[step]                            # (1 + step) / (10 + step), up to .2
        average = [decay * a + (1 - decay) * p.detach()
                   for a, p in zip(average, by_hand.parameters, strict=True)]
    assert min(norms) < 1 < max(norms)                                   # some are clipped, some are not
    for (name, a), b in zip(generator.model.named_parameters(), average, strict=True):
        assert_close(a, b, rtol=0, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path, monkeypatch):
    cfg = replace(TINY, augment="hflip,rot90")
    whole = train(halves(), cfg, tmp_path / "a" / "g.pt", every=3)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(train_gen.data, "save_csv", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train(halves(), cfg, tmp_path / "b" / "g.pt", every=3)
    assert data.load_checkpoint(tmp_path / "b" / "g.pt", "generator")["step"] == 3
    torch.manual_seed(99)
    again = train(halves(), cfg, tmp_path / "b" / "g.pt", every=3)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=0)
    assert (tmp_path / "a" / "g.csv").read_text() == (tmp_path / "b" / "g.csv").read_text()


def test_no_step_waits_for_the_device(hasty_steps):
    train(halves(), replace(TINY, augment="hflip,rot90"))
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
    train(halves(), replace(TINY, steps=40, batch=32), tmp_path / "g.pt", every=20)
    rows = [list(map(float, line.split(","))) for line in (tmp_path / "g.csv").read_text().split("\n")[1:-1]]
    assert [row[0] for row in rows] == [20, 40]
    assert all(min(row[2:]) < row[1] < max(row[2:]) for row in rows) and rows[1][1] < rows[0][1] < 1.1


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


def run(*argv):
    return subprocess.run([sys.executable, "train_gen.py", *map(str, argv)], capture_output=True, text=True)


def test_the_commands_train_and_make_pictures_that_can_be_read_back(tmp_path, launch):
    root = data.draw_tree(tmp_path / "t", 5, size=16)
    flags = "--size 16 --width 16 --mults 1,2 --blocks 1 --steps 4 --batch 4 --warmup 2 --every 2".split()
    trained = run("--data", root, "--out", tmp_path / "gen", *flags, "--per-class", 2)
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
    wrong = launch(train_gen, "--sample", checkpoint, "--classes", "moon")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert "moon" in wrong.stderr and "river" in wrong.stderr
