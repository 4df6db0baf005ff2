"""Train a diffusion model on labelled scenes, and generate images with it.

    python train_gen.py --data data/NWPU-RESISC45 --out runs/gen
    python train_gen.py --sample runs/gen/generator.pt --classes river,forest --out runs/synthetic
    python train_gen.py --data data/xbd --condition pre,mask --out runs/xbd
    python train_gen.py --sample runs/xbd/generator.pt --reference TILES --count 1 --out runs/hit
    torchrun --nproc-per-node 4 train_gen.py ...                          # train on 4 GPUs

On a CPU add --size 32 --width 32 --mults 1,2,4 --blocks 1 --patch 2 --predict x0 --steps 2400
--batch 32 --lr 2e-3 --warmup 50 --ema 0.99. Look at samples-*.png in --out, a row of images per
class: the loss hardly falls after the first minutes, and a lower one may go with worse images.
"""
import copy
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
from augment import compose
from data import UserError, flag
from ddpm import PREDICTS, SCHEDULES, Diffusion
from unet import Condition, UNet
from vit import LENGTH, TextEncoder, vocabulary, word_tokens, words_of

# ---- control images: conditions in pixels, computed from the batch itself

def lowres(x, factor=4):
    """Return x (B, 3, H, W) as a coarser satellite sees it: averaged, then enlarged bilinearly."""
    return F.interpolate(F.avg_pool2d(x, factor), scale_factor=factor, mode="bilinear")


def edges(x, threshold=0.15):
    """Return (B, 1, H, W): 1 where the grey of x (B, 3, H, W) in [-1, 1] has an edge, -1 elsewhere.

    At an edge the grey changes by more than `threshold` per pixel, by Sobel's differences.
    """
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    sobel = x.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8          # d/dx; transposed, d/dy
    gradient = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None])       # (B, 2, H, W)
    return 2.0 * (gradient.square().sum(1, keepdim=True).sqrt() > threshold) - 1


CONTROLS = {"lowres": lowres, "edges": edges}
CONDITIONS = "pre", "mask", *CONTROLS, "metadata", "text", "class"
ABOUT = "classes", "channels", "metadata", "words"          # of a Generator, also in its checkpoint
SAVE_SECONDS = 120                                          # a killed run loses at most this


@dataclass
class Config(data.Settings):
    """All settings of a generator: the same Config and images give the same generator."""
    size: int = flag(64, "side of the images in pixels", 1, 1024)
    width: int = flag(64, "channels at the finest resolution", 8, 4096)
    mults: tuple = flag((1, 2, 3, 4), "width of each resolution in units of --width", 1, 64)
    blocks: int = flag(2, "blocks per resolution, down and up", 1, 64)
    patch: int = flag(1, "side of squares folded into channels (CPU: 2, --predict x0)", 1, 64)
    schedule: str = flag("cosine", "noise schedule", choices=SCHEDULES)
    predict: str = flag("v", "what the network predicts", choices=PREDICTS)
    gamma: float = flag(5.0, "cap of the min-SNR weight of the loss (inf: L_simple)", 1e-3)
    timesteps: int = flag(1000, "length T of the chain", 2, 100_000)
    steps: int = flag(20_000, "optimizer steps", 1)
    batch: int = flag(128, "images per step", 1, 65_536)
    lr: float = flag(2e-4, "peak learning rate", 1e-9)
    warmup: int = flag(500, "steps until the peak learning rate", 0)
    ema: float = flag(0.999, "decay of the averaged weights, which generate", 0, 0.999999)
    drop: float = flag(0.1, "chance to drop all conditions (--condition: also each alone)", 0, 0.9)
    condition: str = flag("", "pre,mask,lowres,edges,metadata add to the class; text replaces it")
    augment: str = flag("hflip,rot90", "augmentations, which the generator learns to imitate")
    seed: int = flag(0, "fixes the choice of images, weights and noise", 0, 2**32 - 1)

    def __post_init__(self):
        super().__post_init__()
        compose(self.augment)                                # ValueError if there is no such name
        self.given = data.listed(self.condition)             # list of names
        if not set(self.given) <= set(CONDITIONS):
            raise ValueError(f"--condition {self.condition}: known are {', '.join(CONDITIONS)}")
        if self.width % 8:
            raise ValueError(f"--width {self.width} must be divisible by 8")
        factor = self.patch * 2 ** (len(self.mults) - 1)
        if self.size % factor or (self.size % 4 and "lowres" in self.given):
            raise ValueError(f"--size {self.size} must be divisible by {factor} for --patch and "
                             "--mults, and lowres divides it by 4")
        if {"cutmix", "copypaste"} & set(data.listed(self.augment)):
            raise ValueError(f"--augment {self.augment} mixes classes, which must stay apart here")


@dataclass
class Script(Config):
    """Config, and the settings that only the command line needs."""
    data: str = flag("data/NWPU-RESISC45", "tree with a folder per class, caption set or xBD tree")
    per_class: int = flag(0, "training images per class, or tiles of an xBD tree (0: all)", 0)
    out: str = flag("runs/gen", "folder for generator.pt, its log and samples, or for --sample")
    every: int = flag(1000, "steps between log lines, samples and checkpoints", 1)
    sample: str = flag("", "generate images with this checkpoint, by the flags below")
    classes: str = flag("", "classes to generate, separated by commas (empty: all)")
    prompts: str = flag("an aerial photo of a {}", "sentences, by semicolon; {}: all classes")
    count: int = flag(16, "images per class or sentence (and picture of --reference)", 1, 1_000_000)
    reference: str = flag("", "picture, folder or xBD tree: other conditions, or where to start")
    strength: float = flag(0.0, "start from --reference, noised by this part of the chain", 0, 1)
    inpaint: str = flag("", "picture that is white where --reference is to be painted anew")
    sampling_steps: int = flag(12, "calls of the network per image", 1)
    guidance: float = flag(1.5, "guidance scale (1: no guidance, 0: no condition)", 0, 100)


# ---- the generator and its conditions

def split_channels(x, names):
    """Split a batch (B, C, H, W) into the images to generate, x0, and their control image.

    The channels are RGB, RGB from before the disaster (C = 6, 7), mask of a building (C = 4, 7).
    Control image (B, J, H, W) or None: pre and mask, cut out of x0; lowres, edges of its RGB.
    """
    x0, controls = x, []
    if "mask" in names:
        x0, controls = x0[:, :-1], [x[:, -1:]]
    if "pre" in names:
        x0 = torch.cat([x0[:, :3], x0[:, 6:]], 1)           # 6: the mask, unless cut above
        controls.insert(0, x[:, 3:6])
    controls += [control(x[:, :3]) for name, control in CONTROLS.items() if name in names]
    return x0, torch.cat(controls, 1) if controls else None


class Generator(nn.Module):
    """A noise process (diffusion) and a U-Net (network) with random weights by config.seed.

    channels: of a training image. metadata: how many values it has. words: the vocabulary.
    """

    def __init__(self, config, classes, channels, metadata=0, words=()):
        super().__init__()
        self.config, self.classes, self.channels = config, classes, channels
        self.metadata, self.words = metadata, words
        torch.manual_seed(config.seed)
        x0, control = split_channels(torch.zeros(1, channels, 8, 8), config.given)
        control_channels = 0 if control is None else control.shape[1]
        heads = max(1, config.width // 32)
        encoder = TextEncoder(len(words) + 3, LENGTH, 2 * config.width, 2, heads) if words else None
        self.diffusion = Diffusion(config.timesteps, config.schedule, config.predict, config.gamma)
        self.network = UNet(len(classes), x0.shape[1], config.width, config.mults, config.blocks,
                            config.patch, control_channels, metadata, encoder)
        self.to(data.pick_device(), memory_format=torch.channels_last)      # a quarter faster

    def condition(self, y, scenes=None, texts=None, turn=0):
        """Return the Condition of N images, without control image; y (N,): classes, -1 if missing.

        scenes: N Scenes, for metadata and captions. turn: which caption. texts [N] replace them.
        """
        device, names = data.pick_device(), self.config.given
        if "text" in names and "class" not in names:
            y = torch.full_like(y, -1)
        cond = Condition(y.to(device))
        if self.metadata:
            cond.metadata = scenes.metadata.to(device)
        if self.words:
            texts = texts or [sentences[turn % len(sentences)] for sentences in scenes.captions]
            is_empty = torch.tensor([[not text] for text in texts])
            cond.text = word_tokens(texts, self.words).masked_fill(is_empty, -1).to(device)
        return cond


def new_generator(real, cfg):
    """Return a Generator for Scenes. Raises UserError if they lack what cfg.condition names."""
    C = real.images.shape[1]
    lacks = dict(pre=C < 6, mask=C not in (4, 7), text=not all(real.captions),
                 metadata=real.metadata.isnan().all())
    if missing := [name for name in cfg.given if lacks.get(name)]:
        raise UserError(f"--condition {', '.join(missing)}: the data have none; pre and mask are "
                        "of an xBD tree, as are metadata; text is of a caption set")
    metadata = real.metadata.shape[1] if "metadata" in cfg.given else 0
    words = vocabulary(map(" ".join, real.captions)) if "text" in cfg.given else []
    generator = Generator(cfg, real.classes, C, metadata, words)
    if metadata:
        generator.network.metadata.fit(real.metadata)
    return generator.eval()


# ---- training

def draw_batch(images, condition, augment, cfg, rng):
    """Draw images at random and augment them. Returns x0 (B, C, H, W) and its Condition."""
    rows = torch.randint(len(images), [data.own_share(cfg.batch)], device=rng.device, generator=rng)
    x, _ = augment(data.to_float(images[rows]), None, rng)
    cond = condition[rows]
    x0, cond.control = split_channels(x, cfg.given)
    if cfg.given:
        cond = cond.drop_each(cfg.drop, rng)                # so any may be missing at sampling
    return x0, cond


def train(real, cfg, path=None, every=1000, preview=0, title="generator"):
    """Train on real (Scenes) by cfg (Config). Returns a Generator with averaged weights.

    Every `every` steps it logs the mean loss and saves `preview` images per class beside path. It
    saves a checkpoint at path then, and every two minutes. A killed run goes on from it to the same
    weights (on a CPU bit for bit), as random numbers depend on (seed, step, rank) alone.
    """
    device, augment = data.pick_device(), compose(cfg.augment)
    generator = new_generator(real, cfg)
    averaged = generator.network                            # averaged weights: better images
    model = copy.deepcopy(averaged).train()                 # the weights that are trained
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=True)
    images = real.images.to(device)
    turns = max(map(len, real.captions)) if generator.words else 1      # captions per image
    conditions = [generator.condition(real.labels, real, turn=turn) for turn in range(turns)]

    state = dict(model=model, ema=averaged, optimizer=optimizer)
    identity = dict(config=data.settings_of(cfg, Config), images=real.digest, seen=real.seen())
    identity |= {name: getattr(generator, name) for name in ABOUT}
    saved = data.resume(path, "generator", identity, state,
                        fresh=dict(step=0, losses=torch.zeros(cfg.steps)))
    done, losses, last_save = saved["step"], saved["losses"].to(device), time.monotonic()
    for step in data.progress(range(done, cfg.steps), title, cfg.steps, initial=done):
        rng = data.step_rng(cfg.seed, step, device)
        x0, cond = draw_batch(images, conditions[step % turns], augment, cfg, rng)
        with data.autocast(device):
            loss = generator.diffusion.loss(model, x0, cond, cfg.drop, rng)     # drop: for guidance
        loss.backward()
        data.average_gradients(model)                       # over the processes of torchrun
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)   # no odd batch throws the weights far
        for group in optimizer.param_groups:
            group["lr"] = data.lr_at(step, cfg)
        optimizer.step()
        optimizer.zero_grad()

        decay = min(cfg.ema, (1 + step) / (10 + step))      # small at first, to forget the start
        with torch.no_grad():
            for average, weight in zip(averaged.parameters(), model.parameters(), strict=True):
                average.lerp_(weight, 1 - decay)            # decay average + (1 - decay) weight

        losses[step] = loss.detach()                        # without waiting for the GPU
        is_log_step = (step + 1) % every == 0 or step + 1 == cfg.steps
        if is_log_step or time.monotonic() - last_save > SAVE_SECONDS:
            means = [part.mean().item() for part in losses[:step + 1].cpu().split(every)]
            data.check_finite(model, means[-1], step + 1)
            if path and data.rank() == 0:
                if is_log_step and preview:
                    save_samples(generator, real, preview, path, step + 1)
                steps = [*range(every, step + 1, every), step + 1]      # the last part may be short
                data.save_csv(Path(path).with_suffix(".csv"), ["step", "loss"],
                              zip(steps, means, strict=True))
                data.save_checkpoint(path, "generator", identity, step + 1, state, losses=losses)
            last_save = time.monotonic()
    return generator


def save_samples(generator, real, preview, path, step):
    """Save a grid of `preview` images per class beside path, always from the same noise."""
    y, cfg = real.labels.unique().repeat_interleave(preview), generator.config
    steps, guidance = min(12, cfg.timesteps), (1.5 if cfg.drop else 1.0)
    images = generate(generator, y, 0, steps, guidance, examples(real, y))
    names = [generator.classes[c] for c in y.tolist()]
    grid = data.grid(images, preview, max(1, 64 // cfg.size), names)
    data.save_picture(grid, Path(path).with_name(f"samples-{step:06d}.png"))


def examples(scenes, labels):
    """Select an image of scenes for each of these labels (N,), the images of a class in turn."""
    index = torch.zeros_like(labels)
    for c in labels.unique():
        of_class = (scenes.labels == c).nonzero().flatten()
        wanted = (labels == c).nonzero().flatten()
        index[wanted] = of_class[torch.arange(len(wanted)) % len(of_class)]
    return scenes[index]


def load_generator(path):
    """Return the Generator of a checkpoint. Raises UserError if the file is none."""
    saved = data.load_checkpoint(path, "generator")
    with data.one_line_error(path):
        generator = Generator(Config(**saved["config"]), *[saved[name] for name in ABOUT])
        generator.network.load_state_dict(saved["ema"])
        generator.seen = saved["seen"]                      # goes with its images
    return generator.eval()


# ---- sampling

def noise_source(seeds, shape, device="cpu"):
    """Return a function that draws noise N(0, I), (B, *shape), each image by one of B seeds."""
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g, device=device) for g in generators])


@torch.no_grad()
def generate(generator, y, seed, sampling_steps=12, guidance=1.5, reference=None, strength=None,
             inpaint=None, texts=None, batch=256, title="images"):
    """Generate images of the classes y (N,) int64, -1 if missing: uint8 (N, C, H, W) on the CPU.

    reference: N real images (Scenes), for all other conditions. texts [N] replace their sentences.
    strength: start from reference with the noise of this part of the chain. inpaint (N, 1, H, W)
    bool: where to repaint reference (eta = 1). Image k follows from (seed, k), whatever the batch.
    """
    cfg, device = generator.config, data.pick_device()
    condition = generator.condition(y, reference, texts)
    options = dict(steps=sampling_steps, w=guidance)
    shape = generator.network.channels, cfg.size, cfg.size
    images = torch.zeros(len(y), *shape, dtype=torch.uint8, device=device)

    for first in data.progress(range(0, len(y), batch), title):
        part = slice(first, min(first + batch, len(y)))
        cond = condition[part]
        if reference is not None:
            x = data.to_float(reference.images[part]).to(device)
            x0, cond.control = split_channels(x, cfg.given)
        if strength:
            options["start"] = x0, round(strength * (cfg.timesteps - 1))
        if inpaint is not None:
            options |= dict(known=(x0, ~inpaint[part].to(device)), order=1, eta=1.0)
        seeds = [(seed * 1_000_003 + k) % 2**32 for k in range(part.start, part.stop)]
        randn = noise_source(seeds, shape, device)
        with data.autocast(device):
            x = generator.diffusion.sample(generator.network, cond, randn, **options)
        images[part] = data.to_uint8(x)
    return images.cpu()


# ---- the script

def requests(cfg, generator):
    """List what --classes and --prompts ask for: [(folder, class or -1, text)]."""
    known = generator.classes
    names = data.listed(cfg.classes) or known
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{cfg.sample} knows no {data.preview(unknown)}: give {', '.join(known)}")
    if not generator.words:
        return [(name, known.index(name), "") for name in names]

    rows = []
    for line in filter(None, map(str.strip, re.split("[;\n]", cfg.prompts))):
        for name in names if cfg.classes or "{}" in line else [""]:
            text = line.replace("{}", data.in_words(name))
            folder = name if "{}" in line else re.sub(r"\W+", "_", text)[:60]
            rows.append((folder, known.index(name) if name else -1, text))
    unread = [text for *_, text in rows if not set(words_of(text)) & set(generator.words)]
    if unread or not rows:
        raise UserError(f"--prompts {data.preview(unread)}: no word that {cfg.sample} has read")
    return rows


def read_reference(cfg, generator):
    """Return the Scenes of --reference, or None. Raises UserError if the generator needs others."""
    C, size = generator.channels, generator.config.size
    needs = [name for name in generator.config.given if name not in ("text", "class")]
    if bool(needs or cfg.strength or cfg.inpaint) != bool(cfg.reference):
        raise UserError(f"--reference is {'not needed' if cfg.reference else 'missing'}: it is for "
                        f"--strength, --inpaint and what {cfg.sample} needs: {needs or 'nothing'}")
    if not cfg.reference:
        return None
    reference = data.read(cfg.reference, size, labelled=False, pre=C >= 6, mask=C in (4, 7))
    if (C > 3 or generator.metadata) and not reference.tiles:
        raise UserError(f"--reference {cfg.reference}: {cfg.sample} needs an xBD tree")
    return reference


def read_mask(path, size):
    """Return where a picture is white, (size, size) bool."""
    white = data.read(path, size, labelled=False).images[0].float().mean(0) > 127
    with Image.open(path) as pil:
        transparent = pil.convert("RGBA").getextrema()[3][0] < 255
    if transparent or not white.any():
        raise UserError(f"--inpaint {path} is {'transparent' if transparent else 'black all over'}:"
                        " make it white where to paint, black elsewhere")
    return white


def sample(cfg):
    """Write images of a checkpoint as a tree with a folder per class or sentence, and a grid."""
    generator, out = load_generator(cfg.sample), Path(cfg.out)
    size, T = generator.config.size, generator.config.timesteps
    rows = requests(cfg, generator)
    if cfg.sampling_steps > T:
        raise UserError(f"--sampling-steps {cfg.sampling_steps}: {cfg.sample} has a chain of {T}")
    if cfg.guidance != 1 and not generator.config.drop:
        raise UserError(f"{cfg.sample} was trained with --drop 0: give --guidance 1")
    for name, _, _ in rows:
        if not re.match(r"\w[^/\\]*$", name):
            raise UserError(f"{cfg.sample} has a class {name!r}, which is no name of a folder")
        if (out / name).exists():
            raise UserError(f"{out} holds images of {name} already: give another --out")

    reference, inpaint = read_reference(cfg, generator), None
    per_row = cfg.count * len(reference or [0])             # count for every picture of reference
    names, classes, texts = zip(*[row for row in rows for _ in range(per_row)], strict=True)
    seen = torch.cat([generator.seen, reference.seen()]) if reference else generator.seen
    if reference:
        index = torch.arange(len(reference)).repeat_interleave(cfg.count)
        reference = reference[index.repeat(len(rows))]
    if cfg.inpaint:
        inpaint = read_mask(cfg.inpaint, size).expand(len(names), 1, -1, -1)
    data.save(out / f"generator-{data.hash_of(seen.numpy())}.pt", dict(kind="generator", seen=seen))
    images = generate(generator, torch.tensor(classes), cfg.seed, cfg.sampling_steps, cfg.guidance,
                      reference, cfg.strength, inpaint, texts)
    for k, (name, image) in enumerate(zip(names, images, strict=True), 1):
        data.save_picture(data.to_pil(image), out / name / f"{name}_{k:05d}.png")
    data.save_picture(data.grid(images, min(per_row, 16), names=names), out / "grid.png")
    print(f"{len(images)} images in {out}, all in {out}/grid.png; leave generator-*.pt with them")


def main(cfg):
    """Train on the training split of a tree, or generate images with a checkpoint."""
    if cfg.sample and data.dist.is_initialized():
        raise UserError("--sample runs in one process: start it with python, not with torchrun")
    if cfg.sample:
        return sample(cfg)
    scenes = data.read(cfg.data, cfg.size, pre="pre" in cfg.given, mask=True)
    index = data.choose(scenes, data.split(scenes)["train"], cfg.per_class, cfg.seed)
    path = Path(cfg.out) / "generator.pt"
    print(f"{len(index)} images of {len(scenes.classes)} classes; look at {cfg.out}/samples-*.png")
    train(scenes[index], cfg, path, cfg.every, preview=8)
    print(f"done: python train_gen.py --sample {path} generates images with it")


if __name__ == "__main__":
    data.launch(main, Script)
