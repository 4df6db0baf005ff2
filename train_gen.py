"""Train a generator on labelled scenes, and make images with it.

    python train_gen.py --data data/NWPU-RESISC45 --out runs/gen
    python train_gen.py --sample runs/gen/generator.pt --classes river,forest --count 16 --out runs/made
    python train_gen.py --data data/xbd --condition pre,mask --out runs/damage      # told how it looks before
    python train_gen.py --data data/RSICD --condition text --out runs/text          # sentences, not classes
    python train_gen.py --sample runs/text/generator.pt --prompts "a river;two tennis courts" --out runs/said
    torchrun --nproc-per-node 4 train_gen.py ...               # same training, on 4 GPUs

On a CPU add: --size 32 --width 32 --mults 1,2,4 --blocks 1 --patch 2 --predict x0 --steps 2400 --batch 32
--lr 2e-3 --warmup 50 --ema 0.99. The loss barely moves after the first minutes, and a lower one is no better
image: look at samples-*.png.
"""
import copy
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
from augment import compose
from data import UserError, flag
from ddpm import PREDICTS, SCHEDULES, Diffusion
from unet import Condition, UNet
from vit import LENGTH, TextEncoder, vocabulary, word_tokens, words_of

# ---- control: what a generator is told in pixels, made from the batch that is on the device

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


CONTROLS = {"lowres": lowres, "edges": edges}                    # made of the picture (B, 3, H, W) itself
CONDITIONS = "pre", "mask", *CONTROLS, "metadata", "text", "class"


# ---- settings

@dataclass
class Config(data.Settings):
    """Everything that makes a generator: equal Config and images, equal generator."""
    size: int = flag(64, "side of the images in pixels", 1, 1024)
    width: int = flag(64, "channels at the finest resolution", 8, 4096)
    mults: tuple = flag((1, 2, 3, 4), "width of each resolution in units of --width", 1, 64)
    blocks: int = flag(2, "blocks per resolution, down and up", 1, 64)
    patch: int = flag(1, "fold squares of so many pixels a side into channels (CPU: 2, --predict x0)", 1, 64)
    schedule: str = flag("cosine", "noise schedule", choices=SCHEDULES)
    predict: str = flag("v", "what the network predicts", choices=PREDICTS)
    gamma: float = flag(5.0, "cap of the min-SNR weight of the loss (inf: L_simple, all t alike)", 1e-3)
    timesteps: int = flag(1000, "length T of the chain", 2, 100_000)
    steps: int = flag(20_000, "optimizer steps", 1)
    batch: int = flag(128, "images per step", 1, 65_536)
    lr: float = flag(2e-4, "peak learning rate", 1e-9)
    warmup: int = flag(500, "steps to reach it", 0)
    ema: float = flag(0.999, "decay of the averaged weights, with which images are made", 0, 0.999999)
    drop: float = flag(0.1, "share of images told nothing, for guidance; with --condition as many of each part "
                       "alone", 0, 0.9)
    condition: str = flag("", f"what it is told beside the class, by comma: {', '.join(CONDITIONS[:-2])}; "
                      "text instead of the class; text,class")
    augment: str = flag("hflip,rot90", "augmentations that keep images plausible: a generator learns them")
    seed: int = flag(0, "fixes the choice of images, weights and noise", 0, 2**32 - 1)

    def __post_init__(self):
        super().__post_init__()
        compose(self.augment)
        SCHEDULES[self.schedule](self.timesteps)                         # it says how short is too short
        factor = self.patch * 2 ** (len(self.mults) - 1)
        for wrong, why in (
                (set(self.conditions) - set(CONDITIONS), f"--condition {self.condition}: known are {', '.join(CONDITIONS)}"),
                (self.width % 8, f"--width {self.width} must be divisible by 8"),
                (self.size % factor, f"--size {self.size} must be divisible by {factor}: --patch, times 2 "
                 "for every resolution in --mults after the first"),
                ("lowres" in self.conditions and self.size % 4, f"--size {self.size}: lowres divides it by 4"),
                ({"cutmix", "copypaste"} & {*data.listed(self.augment)}, f"--augment {self.augment} mixes "
                 "classes, which a generator keeps apart")):
            if wrong:
                raise ValueError(why)

    @property
    def conditions(self):
        """List the names in --condition."""
        return data.listed(self.condition)


@dataclass
class Script(Config):
    """Config, and the settings that only the command line needs."""
    data: str = flag("data/NWPU-RESISC45", "tree with a folder per class, caption set or xBD tree")
    skip_broken: bool = flag(False, "leave out pictures that do not decode")
    per_class: int = flag(0, "training images per class, or tiles of an xBD tree (0: all)", 0)
    out: str = flag("runs/gen", "folder for generator.pt, its log and sample grids, or for the images made")
    every: int = flag(1000, "steps between checkpoints, log lines and sample grids", 1)
    sample: str = flag("", "make images with this checkpoint instead of training one, by the flags below")
    classes: str = flag("", "which classes, by comma (empty: all)")
    prompts: str = flag("an aerial photo of a {}", "of one that is told text: sentences, by semicolon, or a "
                        "file with one per line; {} stands for each class in turn")
    count: int = flag(16, "images per class or sentence, and with --reference of each picture", 1, 1_000_000)
    reference: str = flag("", "picture, folder or xBD tree that tells the rest, or where to start")
    strength: float = flag(0.0, "share of the chain at which to start from --reference (0: noise)", 0, 1)
    inpaint: str = flag("", "picture that is white where to inpaint --reference anew")
    sampling_steps: int = flag(12, "calls of the network per image", 1)
    guidance: float = flag(1.5, "guidance scale (1: no guidance, 0: no class)", 0, 100)


# ---- what a generator is told

def split_channels(x, told):
    """Divide a batch (B, C, H, W) into what is generated of it, and the control, (B, J, H, W) or None.

    C is 3, RGB; 4 with the mask of a building; 6 with the picture from before the disaster; 7 with both.
    """
    x0, control = x, []
    if "mask" in told:
        x0, control = x0[:, :-1], [x[:, -1:]]
    if "pre" in told:
        x0, control = torch.cat([x0[:, :3], x0[:, 6:]], 1), [x[:, 3:6], *control]
    control += [make(x[:, :3]) for name, make in CONTROLS.items() if name in told]
    return x0, torch.cat(control, 1) if control else None


def encode(texts, words):
    """Turn texts into token ids (N, L); an empty one is not told, -1."""
    empty = torch.tensor([not text for text in texts])
    return word_tokens(texts, words).masked_fill(empty[:, None], -1)


class Generator(nn.Module):
    """A noise process and a network, with what it is told: classes, metadata (metadata_names), texts of these words.

    channels: of the images in training, as they are kept: with the mask and the picture from before.
    """

    def __init__(self, config, classes, channels, metadata_names=(), words=()):
        super().__init__()
        torch.manual_seed(config.seed)
        self.config, self.classes, self.channels = config, classes, channels
        self.metadata_names, self.words = metadata_names, words
        made, control = split_channels(torch.zeros(1, channels, 8, 8), config.conditions)
        heads = max(1, config.width // 32)
        encoder = TextEncoder(len(words) + 3, LENGTH, 2 * config.width, 2, heads) if words else None
        self.diffusion = Diffusion(config.timesteps, config.schedule, config.predict, config.gamma)
        self.network = UNet(len(classes), made.shape[1], config.width, config.mults, config.blocks,
                            config.patch, 0 if control is None else control.shape[1], len(metadata_names), encoder)
        self.to(data.pick_device(), memory_format=torch.channels_last)   # a quarter faster, also on a CPU

    def conditions(self, y, reference=None, texts=None):
        """Put in order what is told of N images but for control: classes y, metadata of reference, texts [N]."""
        device = data.pick_device()
        if "text" in self.config.conditions and "class" not in self.config.conditions:
            y = torch.full_like(y, -1)
        return Condition(y.to(device), reference.metadata.to(device) if self.metadata_names else None, None,
                         encode(texts, self.words).to(device) if self.words else None)


# ---- training

def new_generator(real, cfg):
    """Make a Generator for these Scenes. Raises UserError if they lack what --condition names."""
    C = real.images.shape[1]
    lacking = dict(pre=C < 6, mask=C not in (4, 7), metadata=real.metadata.isnan().all(),
                   text=not all(real.captions))
    if missing := [name for name in cfg.conditions if lacking.get(name)]:
        raise UserError(f"--condition {', '.join(missing)}: the data have none; pre and mask are those of an xBD "
                      "tree, metadata those of xBD and of a folder with a metadata.csv, text of a caption set")
    metadata_names = list(real.metadata_names) if "metadata" in cfg.conditions else []
    words = vocabulary(text for some in real.captions for text in some) if "text" in cfg.conditions else []
    generator = Generator(cfg, real.classes, C, metadata_names, words)
    if metadata_names:
        generator.network.metadata.fit(real.metadata)
    return generator.eval()


def train(real, cfg, path=None, every=1000, look=0, title="generator"):
    """Train on real (Scenes) by cfg (Config). Returns a Generator, whose weights are averages over the steps.

    With a path, a checkpoint is kept there, its log beside it, and with look > 0 a grid of `look` images per
    class. Every step draws its randomness from (seed, step): a run that was killed goes on at its last
    checkpoint, and ends with the weights of one that was not (on a CPU to the bit).
    """
    generator, device, augment = new_generator(real, cfg), data.pick_device(), compose(cfg.augment)
    diffusion, ema = generator.diffusion, generator.network
    model = copy.deepcopy(ema).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    parts = dict(model=model, ema=ema, optimizer=optimizer)
    identity = dict(config=data.settings_of(cfg, Config), classes=real.classes, images=real.digest,
                    channels=generator.channels, metadata_names=generator.metadata_names, words=generator.words)
    saved = data.resume(path, "generator", identity, parts, dict(step=0, log=[]))
    done, log = saved["step"], saved["log"]

    images = real.images.to(device)
    S = max(map(len, real.captions)) if generator.words else 1           # sentences in turn; some have fewer
    said = [[some[k % len(some)] for some in real.captions] if generator.words else None for k in range(S)]
    told = [generator.conditions(real.labels, real, texts) for texts in said]
    batch = data.own_share(cfg.batch)                                    # of this process
    losses = torch.zeros((), device=device)
    for step in data.progress(range(done, cfg.steps), title, cfg.steps, initial=done):
        g = data.step_rng(cfg.seed, step, device)
        index = torch.randint(len(images), (batch,), device=device, generator=g)
        x, _ = augment(data.to_float(images[index]), None, g)
        cond = told[step % S][index]
        x0, cond.control = split_channels(x, cfg.conditions)
        if cfg.conditions:
            cond = cond.drop_each(cfg.drop, g)
        with data.autocast(device):
            loss = diffusion.loss(model, x0, cond, cfg.drop, g)
        loss.backward()
        data.average_gradients(model)                                        # over all processes
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)                # no odd batch throws the weights far
        for group in optimizer.param_groups:
            group["lr"] = data.lr_at(step, cfg)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(cfg.ema, (1 + step) / (10 + step))                   # early, forget the start faster
        get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), step)
        losses += loss.detach()

        if (step + 1) % every == 0 or step + 1 == cfg.steps:
            mean = losses.item() / (step % every + 1)
            data.check_finite(model, mean, step + 1)
            log.append([step + 1, mean])
            losses.zero_()
            if path and look and data.rank() == 0:
                show(generator, real, look, Path(path).with_name(f"samples-{step + 1:06d}.png"))
            if path and data.rank() == 0:
                data.save_csv(Path(path).with_suffix(".csv"), ["step", "loss"], log)
                data.save_checkpoint(path, "generator", identity, step + 1, parts, log=log)
    return generator


def show(generator, real, look, path):
    """Make a row of `look` images for each class, always from the same noise: a picture at path."""
    y, cfg = real.labels.unique().repeat_interleave(look), generator.config
    sampling_steps, guidance = min(12, cfg.timesteps), 1.5 if cfg.drop else 1.0
    images = generate(generator, y, 0, sampling_steps, guidance, examples(real, y))
    data.save_picture(data.grid(images, look, zoom=max(1, 64 // cfg.size)), path)


def examples(scenes, labels):
    """Take an image of each of these labels (N,) from scenes, those of a class in turn."""
    index = torch.zeros_like(labels)
    for c in labels.unique():
        mine = (scenes.labels == c).nonzero().flatten()
        index[labels == c] = mine[torch.arange(int((labels == c).sum())) % len(mine)]
    return scenes[index]


def load_generator(path):
    """Read the Generator of a checkpoint. Raises UserError if the file is none."""
    saved = data.load_checkpoint(path, "generator")
    with data.one_line_error(path):
        about = [saved[name] for name in ("classes", "channels", "metadata_names", "words")]
        generator = Generator(Config(**saved["config"]), *about)
        generator.network.load_state_dict(saved["ema"])
    return generator.eval()


# ---- sampling

def noise_source(seeds, shape, device="cpu"):
    """Make a source of N(0, I): every call returns (B, *shape), B = len(seeds).

    Each image has its own torch.Generator, so it does not depend on which others share its batch.
    """
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g, device=device) for g in generators])


@torch.no_grad()
def generate(generator, y, seed, sampling_steps=12, guidance=1.5, reference=None, strength=None, inpaint=None, texts=None, batch=256,
             title="images"):
    """Make images of the classes y (N,) int64, -1: not told. -> uint8 (N, C, H, W) on the CPU.

    reference: Scenes of N real images, for what else the generator is told. strength: share of the chain, in 0..1,
    at which to begin, from `reference` plus noise. inpaint (N, 1, H, W) bool: what to repaint of `reference`, by steps
    of DDPM. texts [N]: None takes the first sentences of reference. Image k follows from (seed, k), whatever the
    batch.
    """
    diffusion, model, cfg = generator.diffusion, generator.network, generator.config
    device = data.pick_device()
    shape = (model.channels, cfg.size, cfg.size)
    images = torch.zeros(len(y), *shape, dtype=torch.uint8, device=device)
    if generator.words and not texts:
        texts = [some[0] for some in reference.captions]
    everyone, how = generator.conditions(y, reference, texts), dict(steps=sampling_steps, w=guidance)
    for first in data.progress(range(0, len(y), batch), title):
        these = slice(first, min(first + batch, len(y)))
        seeds = [(seed * 1_000_003 + k) % 2**32 for k in range(these.start, these.stop)]
        cond = everyone[these]
        if reference is not None:
            x0, cond.control = split_channels(data.to_float(reference.images[these]).to(device), cfg.conditions)
        if strength:
            how["start"] = x0, round(strength * (cfg.timesteps - 1))
        if inpaint is not None:
            how |= dict(known=(x0, ~inpaint[these].to(device)), order=1, eta=1.0)
        noise = noise_source(seeds, shape, device)
        with data.autocast(device):
            images[these] = data.to_uint8(diffusion.sample(model, cond, noise, **how))
    return images.cpu()


# ---- the script

def requests(cfg, generator):
    """List what to make by --classes and --prompts: [(folder, class, text)]."""
    known = generator.classes
    names = data.listed(cfg.classes) or known
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{cfg.sample} knows no class {data.preview(unknown)}; it knows {', '.join(known)}")
    if not generator.words:
        return [(name, known.index(name), "") for name in names]
    lines, rows = cfg.prompts.split(";"), []
    if os.path.isfile(cfg.prompts):                                      # Path.is_file() fails of a long text
        with data.one_line_error(cfg.prompts):
            lines = Path(cfg.prompts).read_text("utf-8").splitlines()
    for line in filter(None, map(str.strip, lines)):
        for name in names if cfg.classes or "{}" in line else [""]:
            text = line.replace("{}", data.in_words(name))
            folder = name if "{}" in line else re.sub(r"\W+", "_", text)[:60]
            rows.append((folder, known.index(name) if name else -1, text))
    unread = [text for *_, text in rows if not {*words_of(text)} & {*generator.words}]
    if unread or not rows:
        known = data.preview(generator.words)
        raise UserError(f"--prompts {data.preview(unread)}: no word that {cfg.sample} has read, as {known}")
    return rows


def read_reference(cfg, generator):
    """Read what --reference names, with the size and channels that the generator knows. -> Scenes or None"""
    C, metadata_names, given = generator.channels, generator.metadata_names, generator.config.condition
    needed = set(generator.config.conditions) - {"text", "class"} or cfg.strength or cfg.inpaint
    if bool(needed) != bool(cfg.reference):
        raise UserError(f"--reference is {'missing' if needed else 'not needed'}: {cfg.sample} is told "
                      f"{given or 'classes alone'}, and --strength and --inpaint begin from it")
    if not cfg.reference:
        return None
    reference = data.read_pictures(cfg.reference, generator.config.size, cfg.skip_broken, pre=C >= 6, mask=C in (4, 7))
    if reference.images.shape[1] != C or metadata_names and list(reference.metadata_names) != metadata_names:
        raise UserError(f"--reference {cfg.reference}: {cfg.sample} needs pictures of {C} channels (more than 3: an xBD "
                      "tree)" + f", with {', '.join(metadata_names)} in a metadata.csv" * bool(metadata_names))
    return reference


def sample(cfg):
    """Write images of a checkpoint as a tree with a folder per class or sentence, and a grid of them."""
    generator, out = load_generator(cfg.sample), Path(cfg.out)
    names, classes, texts = zip(*requests(cfg, generator), strict=True)
    if cfg.sampling_steps > generator.config.timesteps:
        raise UserError(f"--sampling-steps {cfg.sampling_steps}: {cfg.sample} has a chain of {generator.config.timesteps} steps")
    if cfg.guidance != 1 and not generator.config.drop:
        raise UserError(f"{cfg.sample} was trained with --drop 0, always told a class: give --guidance 1")
    for name in names:
        if not re.match(r"\w[^/\\]*$", name):
            raise UserError(f"{cfg.sample} has a class {name!r}, which is no name of a folder")
        if (out / name).exists():
            raise UserError(f"{out} holds images of {name} already: give another --out, or remove them")
    reference, inpaint = read_reference(cfg, generator), None
    each = cfg.count * len(reference or [0])                                  # images of a class
    y = torch.tensor(classes).repeat_interleave(each)
    texts = [text for text in texts for _ in range(each)]
    if reference:
        reference = reference[torch.arange(len(reference)).repeat_interleave(cfg.count).repeat(len(names))]
    if cfg.inpaint:
        hole = data.read_pictures(cfg.inpaint, generator.config.size).images[0]
        inpaint = (hole.float().mean(0) > 127).expand(len(y), 1, -1, -1)
    images = generate(generator, y, cfg.seed, cfg.sampling_steps, cfg.guidance, reference, cfg.strength, inpaint, texts)
    for k, image in enumerate(images):
        name = names[k // each]
        data.save_picture(data.to_pil(image), out / name / f"{name}_{k + 1:05d}.png")
    data.save_picture(data.grid(images, min(each, 16)), out / "grid.png")
    print(f"{len(images)} images in {cfg.out}, all of them in {cfg.out}/grid.png")


def main(cfg):
    """Train on the training split of a tree, or make images with a checkpoint."""
    if cfg.sample and data.dist.is_initialized():
        raise UserError("--sample runs in one process: start it with python, not with torchrun")
    if cfg.sample:
        return sample(cfg)
    scenes = data.read(cfg.data, cfg.size, cfg.skip_broken, pre="pre" in cfg.conditions, mask=True)
    index = data.split(scenes)["train"]
    if cfg.per_class:
        index = data.choose(scenes, index, cfg.per_class, cfg.seed)
    path = Path(cfg.out) / "generator.pt"
    print(f"{len(index)} images of {len(scenes.classes)} classes; look at {cfg.out}/samples-*.png")
    train(scenes[index], cfg, path, cfg.every, look=8)
    print(f"done: python train_gen.py --sample {path} makes images with it")


if __name__ == "__main__":
    data.launch(main, Script)
