"""Train a generator on labelled scenes, and make images with it.

    python train_gen.py --data data/NWPU-RESISC45 --out runs/gen
    python train_gen.py --sample runs/gen/generator.pt --classes river,forest --count 16 --out runs/made
    python train_gen.py --data data/xbd --given pre,mask --out runs/damage      # told how it looks before
    python train_gen.py --data data/RSICD --given text --out runs/text          # sentences, not classes
    python train_gen.py --sample runs/text/generator.pt --prompts "a river;two tennis courts" --out runs/said
    torchrun --nproc-per-node 4 train_gen.py ...               # same numbers, on 4 GPUs

The loss barely moves after the first minutes, and a lower one is no better image: look at samples-*.png.
"""
import copy
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from augment import compose
from data import Problem, flag
from ddpm import PREDICTS, SCHEDULES, Diffusion
from unet import Condition, UNet
from vit import LENGTH, Text, vocabulary, word_tokens, words_of

SMALL = ("--size 32 --width 32 --mults 1,2,4 --blocks 1 --patch 2 --predict x0 --steps 2400 --batch 32 "
         "--lr 2e-3 --warmup 50 --ema 0.99")


# ---- hints: what a generator is told in pixels, made from the batch that is on the device

def lowres(x, factor=4):
    """Reduce x (B, 3, H, W) by area, and enlarge it again bilinearly: what a coarser satellite sees."""
    return F.interpolate(F.avg_pool2d(x, factor), scale_factor=factor, mode="bilinear")


def edges(x, threshold=0.15):
    """Mark where the grey of x (B, 3, H, W) in [-1, 1] rises by more than threshold per pixel: (B, 1, H, W).

    1 at an edge, -1 elsewhere. Sobel's filter: central differences, smoothed 1 2 1 across.
    """
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    slope, smooth = x.new_tensor([-0.5, 0, 0.5]), x.new_tensor([0.25, 0.5, 0.25])
    kernels = torch.stack([smooth[:, None] * slope, slope[:, None] * smooth])[:, None]          # d/dx, d/dy
    strength = F.conv2d(grey, kernels).square().sum(1, keepdim=True).sqrt()
    return 2.0 * (strength > threshold) - 1


HINTS = {"lowres": lowres, "edges": edges}                    # made of the picture (B, 3, H, W) itself
GIVEN = "pre", "mask", *HINTS, "numbers", "text", "class"


# ---- settings

@dataclass
class Config(data.Settings):
    """Everything that makes a generator: equal Config and images, equal generator."""
    size: int = flag(64, "side of the images in pixels", 1, 1024)
    width: int = flag(64, "channels at the finest resolution", 8, 4096)
    mults: tuple = flag((1, 2, 3, 4), "width of each resolution in units of --width", 1, 64)
    blocks: int = flag(2, "blocks per resolution, down and up", 1, 64)
    patch: int = flag(1, "fold squares of so many pixels a side into channels (CPU: 2, --predict x0)", 1, 64)
    schedule: str = flag("cosine", "noise schedule: cosine, linear, flow")
    predict: str = flag("v", "what the network predicts: v, eps, x0")
    gamma: float = flag(5.0, "cap of the min-SNR weight of the loss (inf: L_simple, all t alike)", 1e-3)
    timesteps: int = flag(1000, "length T of the chain", 2, 100_000)
    steps: int = flag(20_000, "optimizer steps", 1)
    batch: int = flag(128, "images per step", 1, 65_536)
    lr: float = flag(2e-4, "peak learning rate", 1e-9)
    warmup: int = flag(500, "steps to reach it", 0)
    ema: float = flag(0.999, "decay of the averaged weights, with which images are made", 0, 0.999999)
    drop: float = flag(0.1, "share of images told nothing, for guidance; with --given as many of each part "
                       "alone", 0, 0.9)
    given: str = flag("", f"what it is told beside the class, by comma: {', '.join(GIVEN[:-2])}; "
                      "text instead of the class; text,class")
    tower: str = flag("", "with --given text: checkpoint of a CLIP whose text tower reads it, frozen (empty: "
                      "one of its own learns along)")
    augment: str = flag("hflip,rot90", "augmentations that keep images plausible: a generator learns them")
    seed: int = flag(0, "fixes the choice of images, weights and noise", 0, 2**32 - 1)

    def __post_init__(self):
        super().__post_init__()
        compose(self.augment)
        if mixing := {"cutmix", "copypaste"} & set(self.augment.split(",")):
            raise ValueError(f"--augment {mixing.pop()}: it mixes classes, which a generator keeps apart")
        if unknown := set(self.told) - set(GIVEN):
            raise ValueError(f"--given {', '.join(sorted(unknown))}: known are {', '.join(GIVEN)}")
        if self.tower and "text" not in self.told:
            raise ValueError(f"--tower {self.tower} is for --given text")
        if "lowres" in self.told and self.size % 4:
            raise ValueError(f"--given lowres: --size {self.size} must be divisible by 4")
        if self.width % 8:
            raise ValueError(f"--width {self.width} must be divisible by 8")
        if self.schedule == "linear" and self.timesteps <= 20:
            raise ValueError(f"--timesteps {self.timesteps}: the linear schedule needs more than 20")
        if self.schedule not in SCHEDULES or self.predict not in PREDICTS:
            raise ValueError(f"--schedule {self.schedule} --predict {self.predict}: "
                             "cosine, linear or flow, and v, eps or x0, are known")
        factor = self.patch * 2 ** (len(self.mults) - 1)
        if self.size % factor:
            raise ValueError(f"--size {self.size} must be divisible by {factor}: --patch, "
                             "times 2 for every resolution in --mults after the first")

    @property
    def told(self):
        """List the names in --given."""
        return [name.strip() for name in self.given.split(",") if name.strip()]

    @property
    def classless(self):
        """Is it told sentences instead of classes?"""
        return "text" in self.told and "class" not in self.told

    @property
    def shown(self):
        """List the names in --given that need a picture or numbers: all but text and class."""
        return [name for name in self.told if name not in ("text", "class")]


@dataclass
class Script(Config):
    """Config, and the settings that only the command line needs."""
    data: str = flag("data/NWPU-RESISC45", "tree with a folder per class, caption set or xBD tree")
    skip_broken: bool = flag(False, "leave out pictures that do not decode")
    per_class: int = flag(0, "training images per class, or tiles of an xBD tree (0: all)", 0)
    out: str = flag("runs/gen", "folder for generator.pt, its log and sample grids, or for the images made",
                     alone=True)
    every: int = flag(1000, "steps between checkpoints, log lines and sample grids", 1)
    sample: str = flag("", "make images with this checkpoint instead of training one")
    classes: str = flag("", "with --sample: which classes, by comma (empty: all)")
    prompts: str = flag("an aerial photo of a {}", "with --sample of one that is told text: sentences, by "
                        "semicolon, or a file with one per line; {} stands for each class in turn")
    count: int = flag(16, "with --sample: images per class and sentence, with --like of each picture", 1,
                      1_000_000)
    like: str = flag("", "with --sample: picture, folder or xBD tree that tells the rest, or where to start")
    start: float = flag(0.0, "with --like: share of the chain at which to start from it (0: noise)", 0, 1)
    paint: str = flag("", "with --like: picture that is white where to paint anew")
    rounds: int = flag(1, "with --paint: rounds of each step (RePaint: 10; for small ones 1)", 1, 1000)
    calls: int = flag(12, "with --sample: network calls per image", 1)
    w: float = flag(1.5, "with --sample: guidance scale (1: no guidance, 0: no class)", 0, 100)

    def __post_init__(self):
        super().__post_init__()
        kept = {f.name for f in fields(Config)} - {"seed"} | {"data", "per_class", "every"}
        made = ["classes", "prompts", "count", "like", "start", "paint", "rounds", "calls", "w"]
        data.without_effect(self, kept if self.sample else [], "with --sample")
        data.without_effect(self, [] if self.sample else made, "without --sample")
        data.without_effect(self, [] if self.paint else ["rounds"], "without --paint")


# ---- what a generator is told

def divide(x, told):
    """Divide a batch (B, C, H, W) into what is generated of it, and the hint, (B, J, H, W) or None.

    C is 3, RGB; 4 with the mask of a building; 6 with the picture from before the disaster; 7 with both.
    """
    x0, hints = x, []
    if "mask" in told:
        x0, hints = x0[:, :-1], [x[:, -1:]]
    if "pre" in told:
        x0, hints = torch.cat([x0[:, :3], x0[:, 6:]], 1), [x[:, 3:6], *hints]
    hints += [make(x[:, :3]) for name, make in HINTS.items() if name in told]
    return x0, torch.cat(hints, 1) if hints else None


def check(cfg, scenes):
    """Raise Problem if scenes lack what --given names."""
    C = scenes.images.shape[1]
    lacking = dict(pre=C < 6, mask=C not in (4, 7), numbers=scenes.numbers.isnan().all(),
                   text=not all(scenes.captions))
    if missing := [name for name in cfg.told if lacking.get(name)]:
        raise Problem(f"--given {', '.join(missing)}: the data have none; pre and mask are those of an xBD "
                      "tree, numbers those of xBD and of a folder with a numbers.csv, text of a caption set")


# ---- sentences

def reader(cfg, captions):
    """Return the words that the text tower knows, [V], arguments of vit.Text, and its weights or None."""
    if "text" not in cfg.told:
        return [], (), None
    if not cfg.tower:
        words = vocabulary(text for some in captions for text in some)
        return words, (len(words) + 3, LENGTH, 2 * cfg.width, 2, max(1, cfg.width // 32)), None
    saved = data.load_checkpoint(cfg.tower, "clip")
    shape = len(saved["words"]) + 3, LENGTH, *(saved["config"][name] for name in ("dim", "depth", "heads"))
    weights = {name[5:]: w for name, w in saved["model"].items() if name.startswith("text.")}
    return saved["words"], shape, weights


def encode(texts, words):
    """Turn texts into token ids (N, L); an empty one is not told, -1."""
    empty = torch.tensor([not text for text in texts])
    return word_tokens(texts, words).masked_fill(empty[:, None], -1)


def sentences(captions, words):
    """Encode all sentences of N images: (N, S, L). An image with fewer than S repeats its first ones."""
    S = max(map(len, captions))
    return encode([some[k % len(some)] for some in captions for k in range(S)], words).unflatten(0, (-1, S))


@dataclass
class Generator:
    """A trained generator: noise process, averaged network in eval mode, its classes and settings."""
    diffusion: Diffusion
    model: nn.Module
    classes: list[str]
    config: Config
    channels: int                             # of the images in training as they are kept: with pre and mask
    measures: list[str]                       # the numbers that it is told, by name
    words: list[str]                          # that it has read
    tower: tuple                              # arguments of the vit.Text that reads them


def networks(cfg, classes, channels, numbers=0, tower=()):
    """Make the noise process and a fresh network by the seed, told so many numbers, and texts by a tower."""
    torch.manual_seed(cfg.seed)
    made, hint = divide(torch.zeros(1, channels, 8, 8), cfg.told)
    model = UNet(classes, made.shape[1], cfg.width, cfg.mults, cfg.blocks, cfg.patch,
                 0 if hint is None else hint.shape[1], numbers, Text(*tower) if tower else None)
    model = model.to(memory_format=torch.channels_last)                  # a quarter faster, also on a CPU
    return Diffusion(cfg.timesteps, cfg.schedule, cfg.predict, cfg.gamma), model


def untrained(real, cfg):
    """Make a Generator for these Scenes on the device, and the network whose average it will hold."""
    check(cfg, real)
    measures = list(real.measures) if "numbers" in cfg.told else []
    words, tower, weights = reader(cfg, real.captions)
    diffusion, model = networks(cfg, len(real.classes), real.images.shape[1], len(measures), tower)
    if measures:
        model.numbers.fit(real.numbers)
    if weights:
        model.text.tower.requires_grad_(False).load_state_dict(weights)
    device = data.pick_device()
    diffusion, model = diffusion.to(device), model.to(device)
    ema = copy.deepcopy(model).eval()
    return Generator(diffusion, ema, real.classes, cfg, real.images.shape[1], measures, words, tower), model


@torch.no_grad()
def update_ema(ema, model, decay):
    """Move the averaged weights a step towards the model's; copy what is not learned.

    torch's AveragedModel does so too, but copies its counter to the GPU at every step and waits for it.
    """
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for a, b in zip(ema.buffers(), model.buffers(), strict=True):
        a.copy_(b)


def drawer(real, cfg, generator):
    """Put real (Scenes) on the device. -> a function of a torch generator to a batch x0 and its Condition."""
    device, augment, words = data.pick_device(), compose(cfg.augment), generator.words
    images, labels, numbers = (part.to(device) for part in (real.images, real.labels, real.numbers))
    labels = torch.full_like(labels, -1) if cfg.classless else labels
    said = sentences(real.captions, words).to(device) if words else None                         # (N, S, L)

    def draw(g):
        index = torch.randint(len(images), (cfg.batch,), device=device, generator=g)
        x, _ = augment(data.to_float(images[index]), None, g)
        x0, hint = divide(x, cfg.told)
        cond = Condition(labels[index], numbers[index] if generator.measures else None, hint)
        if words:
            cond.text = said[index, torch.randint(said.shape[1], index.shape, device=device, generator=g)]
        return x0, cond.hide_each(cfg.drop, g) if cfg.told else cond

    return draw


def train(real, cfg, path=None, every=1000, look=0, title="generator"):
    """Train on real (Scenes) by cfg (Config). Returns a Generator.

    With a path, a checkpoint is kept there, its log beside it, and with look > 0 a grid of `look` images per
    class, always from one noise. Every step draws its randomness from (seed, step): a run that was killed
    goes on at its last checkpoint and ends with the numbers of one that was not (on a CPU to the bit). Raises
    Problem if the checkpoint is of other settings or images, or if the loss is not finite.
    """
    device, (generator, model) = data.pick_device(), untrained(real, cfg)
    diffusion, ema = generator.diffusion, generator.model
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    parts = dict(model=model, ema=ema, optimizer=optimizer)
    identity = dict(config=data.settings_of(cfg, Config), classes=real.classes, names=real.names,
                    images=real.digest, channels=real.images.shape[1], measures=generator.measures,
                    words=generator.words, tower=generator.tower,
                    numbers=repr(real.numbers.tolist()) if generator.measures else "")
    saved = data.resume(path, "generator", identity, parts, dict(step=0, log=[]))
    start, log = saved["step"], saved["log"]

    draw = drawer(real, cfg, generator)
    part = data.own_slice(cfg.batch)                              # of several processes, each computes a part
    quarters = torch.zeros(2, 4, device=device)                       # per quarter of t: sum of losses, count
    for step in data.progress(range(start, cfg.steps), title, cfg.steps, initial=start):
        g = data.rng(cfg.seed, step, device=device)
        x0, cond = draw(g)
        with data.autocast(device):
            loss, t = diffusion.loss(model, x0, cond, cfg.drop, g, part)
        data.descend(model, optimizer, loss.sum() / cfg.batch, step, cfg)
        update_ema(ema, model, min(cfg.ema, (1 + step) / (10 + step)))    # early, forget the start faster
        quarters.index_add_(1, t * 4 // cfg.timesteps, torch.stack([loss.detach(), torch.ones_like(loss)]))

        if (step + 1) % every == 0 or step + 1 == cfg.steps:
            log.append(log_row(step + 1, data.total(quarters)))
            quarters.zero_()
            if path:
                save(generator, Path(path), identity, parts, log, real, look)
    return generator


def save(generator, path, identity, parts, log, real, look):
    """Write the checkpoint, the log as a table, and with look > 0 a grid with a row of images per class."""
    step, cfg = log[-1][0], generator.config
    if look:
        y = torch.arange(len(generator.classes)).repeat_interleave(look)
        mine = [(real.labels == c).nonzero().flatten() for c in range(len(generator.classes))]
        some = [m if len(m) else torch.arange(len(real)) for m in mine]
        like = real[torch.cat([m[torch.arange(look) % len(m)] for m in some])] if cfg.told else None
        calls, w = min(12, cfg.timesteps), 1.5 if cfg.drop else 1.0
        images = generate(generator, y, 0, calls, w, like=like)                         # by all processes
        if data.rank() == 0:
            grid = data.grid(images, look, zoom=max(1, 64 // cfg.size))
            data.save_picture(grid, path.with_name(f"samples-{step:06d}.png"))
    if data.rank() == 0:                                     # the checkpoint last: with it, all is there
        data.save_csv(path.with_suffix(".csv"), ["step", "loss", "t_1", "t_2", "t_3", "t_4"], log)
        data.save_checkpoint(path, "generator", identity, step, parts, log=log)


def log_row(step, quarters):
    """Return [step, mean loss, mean loss of each quarter of t], from their sums and counts, (2, 4).

    Raises Problem if the loss is not finite.
    """
    total, count = quarters.tolist()
    if not math.isfinite(sum(total)):
        raise Problem(f"the loss is {sum(total)} at step {step}: lower --lr")
    return [step, sum(total) / sum(count), *(s / max(n, 1) for s, n in zip(total, count, strict=True))]


def load_generator(path):
    """Read the Generator of a checkpoint. Raises Problem if the file is none."""
    saved, device = data.load_checkpoint(path, "generator"), data.pick_device()
    with data.refusing(path, "is broken", "train it again, or give another path"):
        cfg = Config(**saved["config"])
        classes, C, measures = (saved[name] for name in ("classes", "channels", "measures"))
        words, tower = (saved[name] for name in ("words", "tower"))
        diffusion, model = networks(cfg, len(classes), C, len(measures), tower)
        model.load_state_dict(saved["ema"])
    return Generator(diffusion.to(device), model.to(device).eval(), classes, cfg, C, measures, words, tower)


def noise_of(seeds, shape, device="cpu"):
    """Make a source of N(0, I): every call returns (B, *shape), B = len(seeds).

    Each image has its own torch.Generator, so it does not depend on which others share its batch.
    """
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g, device=device) for g in generators])


def generate(generator, y, seed, calls=12, w=1.5, like=None, start=None, paint=None, rounds=1,
             texts=None, batch=256, title="images"):
    """Make images of the classes y (N,) int64, -1: not told. -> uint8 (N, C, H, W) on the CPU.

    like: Scenes of N real images, for what else the generator is told. start: share of the chain, in 0..1, at
    which to begin, from `like` plus noise. paint (N, 1, H, W) bool: what to repaint of `like`, by DDPM
    steps in so many rounds (those of DDIM fitted worse). texts [N]: None takes sentences of like.
    Image k follows from (seed, k), whatever the batch and the number of processes. Each process makes its
    part, and all get all of them.
    """
    diffusion, model, cfg = generator.diffusion, generator.model, generator.config
    silent = generator.words and not texts
    assert like is not None or not (cfg.shown or silent or start or paint is not None), "like what?"
    device = diffusion.signal.device
    shape = (model.channels, cfg.size, cfg.size)
    images = torch.zeros(len(y), *shape, dtype=torch.uint8, device=device)
    part, how = data.own_slice(len(y)), dict(steps=calls, w=w)
    everyone = Condition((torch.full_like(y, -1) if cfg.classless else y).to(device))
    if generator.words:
        texts = texts or [some[k % len(some)] for k, some in enumerate(like.captions)]
        everyone.text = encode(texts, generator.words).to(device)

    for first in data.progress(range(part.start, part.stop, batch), title):
        these = slice(first, min(first + batch, part.stop))
        seeds = [(seed * 1_000_003 + k) % 2**32 for k in range(these.start, these.stop)]
        noise = noise_of(seeds, shape, device)
        cond = everyone[these]
        if like is not None:
            x0, cond.hint = divide(data.to_float(like.images[these]).to(device), cfg.told)
            if generator.measures:
                cond.numbers = like.numbers[these].to(device)
            if start:
                how["start"] = x0, round(start * (cfg.timesteps - 1))
            if paint is not None:
                how |= dict(known=(x0, ~paint[these].to(device)), rounds=rounds, order=1, eta=1.0)
        with data.autocast(device):
            images[these] = data.to_uint8(diffusion.sample(model, cond, noise, **how))
    return data.total(images).cpu()                      # zeros stand where the others' images go


# ---- the script

def read_like(cfg, generator):
    """Read what --like names, with the size and channels that the generator knows. -> Scenes or None."""
    gen, C = generator.config, generator.channels
    if not cfg.like:
        if wanted := gen.shown or ["--start"] * (cfg.start > 0) + ["--paint"] * bool(cfg.paint):
            raise Problem(f"--like is missing: a picture, a folder or an xBD tree for {', '.join(wanted)}")
        return None
    if not (gen.shown or cfg.start or cfg.paint):
        raise Problem(f"--like {cfg.like}: {cfg.sample} need not be shown any; give --start or --paint too")
    like = data.read_pictures(cfg.like, gen.size, cfg.skip_broken, pre=C >= 6, mask=C in (4, 7))
    if like.images.shape[1] != C:
        raise Problem(f"--like {cfg.like}: pictures alone; {cfg.sample} must be given an xBD tree")
    if generator.measures and list(like.measures) != generator.measures:
        raise Problem(f"--like {cfg.like}: {cfg.sample} must be told {', '.join(generator.measures)}, here "
                      f"are {', '.join(like.measures) or 'none'}; give a folder with such a numbers.csv")
    return like


def asked(cfg, generator):
    """List what to make by --classes and --prompts: [(folder, class, text)]."""
    known = {"any": -1} | {name: c for c, name in enumerate(generator.classes)}
    names = [*dict.fromkeys(map(str.strip, cfg.classes.split(",")))] if cfg.classes else generator.classes
    if unknown := set(names) - set(known):
        raise Problem(f"{cfg.sample} knows no class {', '.join(sorted(unknown))}; "
                      f"it knows {', '.join(generator.classes)}, and any")
    if not generator.words:
        if cfg.prompts != Script.prompts:
            raise Problem(f"--prompts {cfg.prompts}: {cfg.sample} is told no text")
        return [(name, known[name], "") for name in names]
    rows, lines = [], cfg.prompts.split(";")
    if os.path.isfile(cfg.prompts):                                      # Path.is_file() fails of a long text
        with data.refusing(cfg.prompts, "is no text in UTF-8", "save it as such"):
            lines = Path(cfg.prompts).read_text("utf-8-sig").splitlines()
    if not any(map(str.strip, lines)):
        raise Problem(f"--prompts {cfg.prompts}: there is no sentence")
    for text in filter(str.strip, lines):
        for name in names if cfg.classes or "{}" in text else ["any"]:
            said = text.replace("{}", data.in_words(name)).strip()
            rows.append((name if "{}" in text else re.sub(r"\W+", "_", said)[:60], known[name], said))
    read = {text: set(words_of(text)) & set(generator.words) for *_, text in rows}
    if silent := [text for text, words in read.items() if not words]:
        raise Problem(f"--prompts: {cfg.sample} has read no word of {silent[0]!r}; it knows "
                      f"{data.some_of(generator.words)}")
    if unread := {word for text in read for word in words_of(text)} - set(generator.words):
        print(f"{cfg.sample} has never read {', '.join(sorted(unread))}: left out", file=sys.stderr)
    return rows


def sample(cfg):
    """Write images of a checkpoint as a tree with a folder per class or sentence, and a grid of them."""
    generator = load_generator(cfg.sample)
    names, classes, texts = zip(*asked(cfg, generator), strict=True)
    if not 1 <= cfg.calls <= generator.config.timesteps:
        raise Problem(f"--calls {cfg.calls}: {cfg.sample} has a chain of {generator.config.timesteps} steps")
    if not generator.config.drop and (cfg.w != 1 or "any" in names):
        raise Problem(f"{cfg.sample} was trained with --drop 0, always told a class: give --w 1, and no any")
    out = Path(cfg.out)
    if full := [name for name in names if any((out / name).glob("*"))]:
        raise Problem(f"{out} holds files of {full[0]} already: give another --out, or remove them")
    like, paint = read_like(cfg, generator), None
    each = cfg.count * len(like or [0])                                  # images of a class
    y = torch.tensor(classes).repeat_interleave(each)
    texts = [text for text in texts for _ in range(each)]
    if like:
        like = like[torch.arange(len(like)).repeat_interleave(cfg.count).repeat(len(names))]
    if cfg.paint:
        if not Path(cfg.paint).is_file():
            raise Problem(f"--paint {cfg.paint}: give one picture, white where to paint")
        hole = data.read_pictures(cfg.paint, generator.config.size).images[0]
        paint = (hole.float().mean(0) > 127).expand(len(y), 1, -1, -1)
    images = generate(generator, y, cfg.seed, cfg.calls, cfg.w, like, cfg.start, paint, cfg.rounds, texts)
    if data.rank():
        return
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as new:        # the tree is there whole, or not
        for k, image in enumerate(images):
            name = names[k // each]
            data.save_picture(data.picture(image), Path(new) / name / f"{name}_{k + 1:05d}.png")
        for name in dict.fromkeys(names):
            os.replace(Path(new) / name, out / name)
    data.save_picture(data.grid(images, min(each, 16)), out / "grid.png")
    print(f"{len(images)} images in {cfg.out}, all of them in {cfg.out}/grid.png")


def main(cfg):
    """Train on the training split of a tree, or make images with a checkpoint."""
    if cfg.sample:
        return sample(cfg)
    scenes = data.read(cfg.data, cfg.size, cfg.skip_broken, pre="pre" in cfg.told, mask=True)
    index = data.split(scenes)["train"]
    if cfg.per_class:
        index = data.choose(scenes, index, cfg.per_class, cfg.seed)
    path = Path(cfg.out) / "generator.pt"
    print(f"{len(index)} images of {len(scenes.classes)} classes; look at {cfg.out}/samples-*.png")
    real = scenes[index]
    data.forecast(lambda cfg: train(real, cfg), cfg, SMALL)
    train(real, cfg, path, cfg.every, look=8)
    print(f"done: python train_gen.py --sample {path} makes images with it")


if __name__ == "__main__":
    data.launch(main, Script, several=True)
