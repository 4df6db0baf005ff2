"""train_gen.py: one step of training in formulas, and what generators do with their conditions.

One step, on a batch drawn by (seed, step), with q and the loss of ddpm.py:

    g  = gradient of the loss / max(1, |g|)                     clipped to a norm of 1
    m  = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2            AdamW, b = 0.9, 0.99
    p  = p - lr (0.01 p + m' / (sqrt(v') + 1e-8))               x' = x / (1 - b^step); lr: warmup
    a  = d a + (1 - d) p,  d = min(ema, (1 + step) / (10 + step))           the averaged weights
"""
import json
import math
from dataclasses import replace
from itertools import accumulate, count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_data import karpathy
from torch.testing import assert_close

import data
import train_gen
from augment import compose
from data import Scenes, UserError
from train_gen import Config, edges, generate, load_generator, lowres, split_channels, train
from unet import Condition
from vit import word_tokens

TINY = Config(size=8, width=16, mults=(1, 2), blocks=1, timesteps=100, steps=6, batch=8, lr=1e-3,
              warmup=2, augment="none")


def halves(n=64, noise=0.1):
    """Grey images of 8 x 8: class 0 is bright at the left, class 1 at the right. With captions."""
    y = torch.arange(n) % 2
    sign = torch.where(torch.arange(8) < 4, 1.0, -1.0)
    grain = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = (1 - 2.0 * y).view(-1, 1, 1, 1) * sign * 0.8 + noise * grain
    sentences = ["LEFT.", "left side", "bright left"], ["right", "Right side"]
    captions = [tuple(sentences[k % 2][:1 + k % 3]) for k in range(n)]       # one to three
    names = [f"{k}.png" for k in range(n)]
    return Scenes(data.to_uint8(x), y, ["left", "right"], names, torch.arange(n), captions=captions)


def by_hand(real, cfg, adamw, processes=1):
    """Return the averaged weights {name: p}, the mean loss of each step, and the gradient norms."""
    generator = train_gen.new_generator(real, cfg)
    model, losses, norms = generator.network.train(), [], []
    optimizer = adamw(model.parameters(), (0.9, 0.99), lambda p: 0.01)
    averages = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(cfg.steps):
        loss = 0
        for rank in range(processes):                    # each draws its share of the batch
            g = data.rng(cfg.seed, step, *[rank] * (rank > 0))
            index = torch.randint(len(real), (cfg.batch // processes,), generator=g)
            x0, _ = compose(cfg.augment)(real.images[index] / 127.5 - 1, None, g)
            cond = Condition(real.labels[index])
            if cfg.condition == "edges":
                cond.control = edges(x0)
            if cfg.condition == "text":                  # instead of the class
                cond.y = -torch.ones_like(cond.y)
            if "text" in cfg.condition:                  # the sentences of an image take turns
                turns = [sentences[step % 3 % len(sentences)] for sentences in real.captions]
                cond.text = word_tokens(turns, generator.words)[index]
            if cfg.condition:
                cond = cond.drop_each(cfg.drop, g)
            loss = loss + generator.diffusion.loss(model, x0, cond, cfg.drop, g) / processes
        gradients = torch.autograd.grad(loss, optimizer.parameters)
        losses.append(loss.item())
        norms.append(sum(d.square().sum() for d in gradients).sqrt().item())

        lr = cfg.lr * (step + 1) / cfg.warmup
        if step >= cfg.warmup:
            done = (step - cfg.warmup) / (cfg.steps - cfg.warmup)
            lr = cfg.lr * (1 + math.cos(math.pi * done)) / 2
        optimizer.move([d / max(1.0, norms[-1] + 1e-6) for d in gradients], lr)
        decay = min(cfg.ema, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            averages[name] = decay * averages[name] + (1 - decay) * p.detach()
    return averages, losses, norms


@pytest.mark.parametrize("condition", ["", "edges", "text", "text,class"])
@pytest.mark.usefixtures("on_cpu", "in_float64")
def test_training_is_these_formulas_and_logs_the_mean_loss(adamw_by_hand, tmp_path, condition):
    cfg = replace(TINY, steps=5, lr=2e-2, ema=0.25, drop=0.4, seed=7, condition=condition,
                  augment="hflip,rot90,crop")
    averages, losses, norms = by_hand(halves(12, noise=0.5), cfg, adamw_by_hand)
    assert min(norms) < 1 < max(norms)                   # some are clipped, others are not
    network = train(halves(12, noise=0.5), cfg, tmp_path / "g.pt", every=2).network
    for name, p in network.named_parameters():
        assert_close(p.detach(), averages[name], rtol=0, atol=1e-6, msg=lambda m, n=name: n + m)
    assert not network.training
    header, *rows = [line.split(",") for line in (tmp_path / "g.csv").read_text().split()]
    means = [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert header == ["step", "loss"] and [row[0] for row in rows] == ["2", "4", "5"]
    assert [float(row[1]) for row in rows] == pytest.approx(means, rel=1e-6)


# ---- a run that is killed, or goes astray

def clock(*late):
    """Stands in for the module time: two minutes pass before the readings in `late` alone."""
    times = accumulate(121 * (reading in late) for reading in count(1))
    return SimpleNamespace(monotonic=lambda: next(times))


@pytest.mark.parametrize("condition, every, saves", [
    ("text", 3, [3]),                                    # killed at the first line of the log
    ("", 4, [2, 4]),                                     # at the second one, after a late one
    ("", 100, [2, 4])])                                  # late ones alone
@pytest.mark.usefixtures("on_cpu")
def test_a_killed_run_ends_as_another_does(tmp_path, monkeypatch, condition, every, saves):
    cfg, real = replace(TINY, augment="hflip,rot90", condition=condition), halves()
    whole = train(real, cfg, tmp_path / "a/g.pt", every)
    save, saved = data.save_checkpoint, []

    def save_and_die(path, kind, identity, step, *args, **kw):
        save(path, kind, identity, step, *args, **kw)
        saved.append(step)
        if saved == saves:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "save_checkpoint", save_and_die)
        if saves[0] == 2:                                # it is read at the start, after every step
            patch.setattr(train_gen, "time", clock(3, 6))        # without a log line, and by saves
        train(real, cfg, tmp_path / "b/g.pt", every)
    torch.manual_seed(99)                                # its state does not matter
    again = train(real, cfg, tmp_path / "b/g.pt", every)
    assert_close(again.network.state_dict(), whole.network.state_dict(), rtol=0, atol=0)
    assert (tmp_path / "a/g.csv").read_text() == (tmp_path / "b/g.csv").read_text()


@pytest.mark.parametrize("late, step", [((), 20), ((9,), 8)])
def test_a_loss_that_is_not_finite_is_not_saved(tmp_path, monkeypatch, late, step):
    monkeypatch.setattr(train_gen, "time", clock(*late))
    with pytest.raises(UserError, match=f"at step {step}, .*lower --lr"):
        train(halves(), replace(TINY, lr=1e30, steps=20), tmp_path / "g.pt")
    assert not (tmp_path / "g.pt").exists()


def test_no_step_waits_for_the_device(hasty_steps):
    train(halves(), replace(TINY, augment="hflip,rot90", condition="text"))
    assert hasty_steps == [1, 2, 3, 4]


# ---- control images

@pytest.mark.parametrize("C, names, generated, control", [
    (3, "", "012", ""), (4, "", "0123", ""), (7, "", "0123456", ""), (4, "mask", "012", "3"),
    (6, "pre", "012", "345"), (7, "mask", "012345", "6"), (7, "pre", "0126", "345"),
    (7, "pre,mask", "012", "3456"), (7, "mask,pre", "012", "3456")])
def test_each_channel_is_either_generated_or_a_condition(C, names, generated, control):
    x = torch.arange(C).view(1, C, 1, 1) + 10.0 * torch.rand(2, 1, 8, 8)
    expected = x[:, [int(k) for k in control]]
    x0, result = split_channels(x, names.split(","))
    assert_close(x0, x[:, [int(k) for k in generated]])
    assert_close(result, expected if control else None)
    same, result = split_channels(x, [*names.split(","), "edges", "lowres"])
    assert_close(same, x0)                               # these are made of RGB, and take nothing
    assert_close(result, torch.cat([expected, lowres(x[:, :3]), edges(x[:, :3])], 1))


def test_a_low_resolution_keeps_means_and_slopes_and_nothing_finer_than_four_pixels():
    x, ramp = torch.randn(2, 3, 16, 24), torch.arange(16.0).expand(1, 3, 16, 16)
    assert_close(lowres(x).mean((2, 3)), x.mean((2, 3)))
    assert_close(lowres(ramp)[0, 0, 0], torch.arange(16.0).clamp(1.5, 13.5))
    fine = torch.tensor([1.0, -1.0]).repeat(8).expand(1, 3, 16, 16)
    assert_close(lowres(fine), torch.zeros(1, 3, 16, 16))


def test_edges_are_where_the_grey_rises_by_more_than_the_threshold_per_pixel():
    def marked(grey, *threshold):
        x = torch.tensor([0.5, 1.0, 1.5]).view(1, 3, 1, 1) * grey        # its grey is the mean
        result = edges(x, *threshold)
        assert result.abs().eq(1).all()
        return result[0, 0] > 0
    step = (torch.arange(9) >= 4).float().expand(9, 9)   # half of it in each of two columns
    assert marked(0.31 * step).all(0).tolist() == [3 <= k <= 4 for k in range(9)]
    assert_close(marked(-0.31 * step.T), marked(0.31 * step).T)
    assert not marked(0.29 * step).any() and marked(0.29 * step, 0.14).any()
    assert not marked(torch.ones(9, 9)).any()            # the border is no edge, either
    slope = torch.arange(9).float()[:, None] + torch.arange(9)           # sqrt 2 per pixel
    assert marked(0.11 * slope)[1:-1, 1:-1].all() and not marked(0.10 * slope).any()
    spot = torch.zeros(9, 9)
    spot[4, 4] = 0.61                                    # beside it 1/4, diagonally sqrt 2 / 8
    assert marked(spot).nonzero().tolist() == [[3, 4], [4, 3], [4, 5], [5, 4]]


# ---- what it learns

@pytest.fixture(scope="module")
def plain():
    """A generator of halves, conditioned on the class alone."""
    return train(halves(), replace(TINY, steps=40, batch=16, lr=6e-3, warmup=10, ema=0.9))


def test_a_diffusion_model_learns_which_half_is_bright(plain):
    y = torch.arange(40) % 2
    x = data.to_float(generate(plain, y, seed=1, sampling_steps=12))
    side = (x[..., :4] - x[..., 4:]).mean((1, 2, 3))     # of real images 1.6 or -1.6
    assert side[y == 0].mean() > 1.1 and side[y == 1].mean() < -1.1
    assert train_gen.new_generator(stairs(2, 1), TINY).metadata == 0     # not asked for
    first, second = (generate(plain, labels, 1, 5, guidance=0.0) for labels in (y, 1 - y))
    assert_close(first, second, rtol=0, atol=0)          # at guidance 0 it does not know the class


def stairs(n, seed):
    """Grey images with an edge at column 2 or 6. Metadata tell the light, captions up or down."""
    up, light, column = torch.rand(3, n, generator=data.rng(seed))
    light, column, y = 1.2 * light - 0.6, torch.where(column > 0.5, 2, 6), (up > 0.5).long()
    x = torch.where(torch.arange(8) < column[:, None], -0.3, 0.3) * (2.0 * y - 1)[:, None]
    x = (x + light[:, None])[:, None, None].expand(-1, 1, 8, 8)
    metadata = torch.stack([5 + 3 * light, torch.full_like(light, math.nan)], 1)
    sentences = ("falls", "It falls!"), ("It rises.", "rises to the right")
    return Scenes(data.to_uint8(x), y, ["down", "up"], [f"{k}" for k in range(n)], torch.arange(n),
                  metadata=metadata, captions=[sentences[c] for c in y.tolist()])


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory):
    """A generator conditioned on edges, light and sentences, read from its checkpoint."""
    cfg = replace(TINY, mults=(1,), steps=200, batch=32, lr=8e-3, warmup=20, ema=0.9, predict="x0",
                  condition="edges,metadata,text")
    path = tmp_path_factory.mktemp("stairs") / "g.pt"
    trained, loaded = train(stairs(128, 0), cfg, path), load_generator(path)
    assert loaded.config == cfg and not loaded.network.training
    assert loaded.network.metadata.low[0] > 3          # the range that it has seen
    assert_close(loaded.network.state_dict(), trained.network.state_dict(), rtol=0, atol=0)
    return loaded


def test_images_follow_the_control_image_the_metadata_and_the_sentence(conditioned):
    def measured(images):
        x = data.to_float(images)[:, 0]
        jump = x.diff(dim=2).mean(1)
        column = jump.abs().argmax(1)
        return column, x.mean((1, 2)), jump[torch.arange(len(x)), column]

    def correlations(scenes, **kw):                      # of another class: it must not matter
        images = generate(conditioned, 1 - scenes.labels, 2, 8, 2.0, reference=scenes, **kw)
        pairs = zip(measured(images), measured(scenes.images), strict=True)
        return [torch.corrcoef(torch.stack(pair).float())[0, 1].item() for pair in pairs]

    real = stairs(60, 1)
    assert min(correlations(real)) > 0.8
    edge, light, up = correlations(replace(real, metadata=math.nan * real.metadata))
    assert min(edge, up) > 0.8 and abs(light) < 0.5      # what is missing is not known
    edge, light, up = correlations(real, texts=[""] * 60)
    assert edge > 0.8 and abs(up) < 0.5
    assert (conditioned.condition(real.labels, real, [""] * 60).text == -1).all()
    assert correlations(real, texts=[texts[0] for texts in real.captions]) == correlations(real)


@pytest.mark.parametrize("options", [
    {}, dict(strength=0.5), dict(inpaint=torch.rand(5, 1, 8, 8, generator=data.rng(0)) < 0.3)])
def test_image_k_follows_from_seed_and_k_whatever_the_batch(conditioned, options):
    reference = stairs(5, 1)[torch.tensor([0, 1, 2, 0, 0])]
    def images(seed, **kw):
        how = dict(reference=reference, **options, **kw)
        return generate(conditioned, reference.labels, seed, 3, **how).int()
    whole = images(3)
    assert (whole - images(3, batch=2)).abs().max() <= 1
    assert len({tuple(x.flatten().tolist()) for x in [*whole, *images(4)]}) == 10    # no two alike


def test_a_start_near_the_image_returns_it_and_one_at_the_end_of_the_chain_does_not(plain):
    reference, images = halves(6, noise=0.5), []
    for strength in (0.01, 0.5, 1.0, None):
        x = generate(plain, 1 - reference.labels, 1, reference=reference, strength=strength)
        images.append(x.int())
    off = [(x - reference.images.int()).abs().float().mean() for x in images]
    assert off[0] < 6 < off[1] < off[2] - 10
    assert (images[2] - images[3]).abs().max() <= 2      # the end of the chain is noise


def test_inpainting_keeps_the_known_pixels_exactly_and_changes_the_others(plain):
    reference = halves(6, noise=0.5)
    inpaint = torch.zeros(6, 1, 8, 8, dtype=torch.bool)
    for k in range(6):
        inpaint[k, :, k:k + 3, 2:5] = True               # of each image another hole
    images = generate(plain, reference.labels, 1, 5, reference=reference, inpaint=inpaint)
    off = (images.int() - reference.images.int()).abs()
    assert (off[~inpaint] == 0).all() and (off[inpaint].view(6, 9) > 3).float().mean(1).min() > 0.5


def test_samples_are_guided_only_if_the_condition_was_dropped(plain, monkeypatch, tmp_path):
    scales, images = [], torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(train_gen, "generate", lambda *args: scales.append(args[4]) or images)
    for drop in (0.0, 0.1):
        monkeypatch.setattr(plain, "config", replace(TINY, drop=drop))
        train_gen.save_samples(plain, halves(2), 1, tmp_path / "g.pt", 1)
    assert scales == [1.0, 1.5]


def test_examples_are_of_these_classes_and_those_of_a_class_take_turns():
    chosen = train_gen.examples(halves(6), torch.tensor([1, 1, 0, 1, 1, 0]))
    assert chosen.names == ["1.png", "3.png", "0.png", "5.png", "1.png", "2.png"]


# ---- the command line

SMALL = "--size 8 --width 16 --mults 1,2 --blocks 1 --timesteps 20 --steps 2 --batch 4 --warmup 1"
SAMPLE = "--sample gen/generator.pt --sampling-steps 2 --count"


@pytest.fixture
def run(launch, tmp_path, monkeypatch):
    """Run train_gen.py in tmp_path. Returns what it wrote as an error: nothing, or one line."""
    monkeypatch.chdir(tmp_path)

    def call(flags, *more):
        result = launch(train_gen, *flags.split(), *more)
        assert (result.returncode, result.stderr.count("\n")) in ((0, 0), (2, 1)), result.stderr
        return result.stderr
    return call


def pictures(folder):
    """Decode the pictures in a folder, in order: (N, 3, 8, 8)."""
    paths = sorted(Path(folder).glob("*.png"))
    return torch.stack([torch.from_numpy(data.decode(path, 8)) for path in paths])


def test_class_folders_are_learned_and_classes_are_sampled(run):
    tree = data.draw_tree("tree", 5, size=16)
    assert not run(f"--data {tree} --out gen {SMALL} --every 1 --per-class 2 --seed 3")
    written = {path.name for path in Path("gen").iterdir()}
    assert written == {"generator.pt", "generator.csv", "samples-000001.png", "samples-000002.png"}
    scenes = data.read(tree, 8, mask=True)
    chosen = data.choose(scenes, data.split(scenes)["train"], 2, 3)
    assert data.load("gen/generator.pt")["images"] == scenes[chosen].digest
    with Image.open("gen/samples-000002.png") as grid:   # 8 images of 8 classes, in white frames
        assert grid.size == (8 * 17 + 16 + 8 * 8 * 10, 8 * 8 * 10)        # circular_farmland: 17
    assert not run(f"{SAMPLE} 3 --classes river,forest --seed 5 --guidance 3 --out out")
    generator = load_generator("gen/generator.pt")
    y = torch.tensor([generator.classes.index(name) for name in ("river", "forest")])
    images = generate(generator, y.repeat_interleave(3), 5, 2, guidance=3.0)
    assert_close(torch.cat([pictures("out/river"), pictures("out/forest")]), images)


def test_buildings_of_a_reference_give_conditions_and_are_changed_a_little_or_in_a_hole(run):
    tree, tiles = data.draw_xbd("tree", 24), data.draw_xbd("tiles", 1, seed=1)
    assert not run(f"--data {tree} --out gen {SMALL} --condition pre,mask,lowres,edges,metadata")
    real = data.read(tiles, 8, pre=True, mask=True).images[:, :3].repeat_interleave(2, 0)
    flags = f"{SAMPLE} 2 --classes destroyed,no-damage --reference {tiles} --out"
    assert not run(f"{flags} a --strength 0.01")
    assert 0 < (pictures("a/destroyed").int() - real.int()).abs().float().mean() < 20
    hole = torch.zeros(3, 8, 8, dtype=torch.uint8)
    hole[:, 2:5, 2:5] = 255
    data.save_picture(data.to_pil(hole), "hole.png")
    assert not run(f"{flags} b --inpaint hole.png")
    same = pictures("b/no-damage") == real               # two of each building, in order
    assert same[..., hole[0] == 0].all() and not same[..., 2:5, 2:5].all()


def test_sentences_of_a_caption_set_and_of_prompts(run):
    images = []
    for k, part in enumerate(["train", "train", "val", "test"]):
        data.save_picture(Image.linear_gradient("L").rotate(50 * k), f"set/{k}.png")
        images.append((f"{k}.png", part, ["A left half.", "one side"]))
    data.write("set/dataset.json", json.dumps(karpathy(*images)))
    data.write("set/txtclasses/left.txt", "0.png 2.png")
    data.write("set/txtclasses/right.txt", "1.png 3.png")
    assert not run(f"--data set --out gen {SMALL} --condition text,class")
    assert not run(f"{SAMPLE} 1 --out a --prompts", "a LEFT half;{} side; One {}, shiny")
    written = sorted(path.name for path in Path("a").glob("*/*.png"))
    assert written == ["a_LEFT_half_00001.png", "left_00002.png", "left_00004.png",
                       "right_00003.png", "right_00005.png"]
    generator = load_generator("gen/generator.pt")
    for flags, y in (("--out b", -1), ("--out c --classes right", 1)):
        assert not run(f"{SAMPLE} 1 {flags} --prompts", "a left half\n\n")
        image = generate(generator, torch.tensor([y]), 0, 2, texts=["a left half"])
        assert_close(pictures(f"{flags[6]}/a_left_half"), image)
