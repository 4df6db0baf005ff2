"""Train a generator on labelled scenes, and make images with it.

    python train_gen.py --data data/NWPU-RESISC45 --out runs/gen
    python train_gen.py --sample runs/gen/generator.pt --classes river,forest --count 16 --out runs/made
    torchrun --nproc-per-node 4 train_gen.py ...               # the same, on 4 GPUs

The loss barely moves after the first minutes, and a lower one is no better image: look at samples-*.png.
"""
import copy
import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn

import data
from augment import compose
from data import Problem, flag
from ddpm import PREDICTS, SCHEDULES, Diffusion, noise_of
from unet import Condition, UNet


@dataclass
class Config:
    """What makes a generator. Two with the same Config and the same images are the same."""
    size: int = flag(64, "side of the images in pixels")
    width: int = flag(64, "channels at the finest resolution")
    mults: tuple = flag((1, 2, 3, 4), "width of each resolution in units of --width")
    blocks: int = flag(2, "blocks per resolution, down and up")
    patch: int = flag(1, "fold so many pixels a side into channels (2 on a CPU)")
    schedule: str = flag("cosine", "noise schedule: cosine, linear, flow")
    predict: str = flag("v", "what the network predicts: v, eps, x0")
    gamma: float = flag(5.0, "cap of the min-SNR weight of the loss (inf: L_simple, all t alike)")
    timesteps: int = flag(1000, "length T of the chain")
    steps: int = flag(20_000, "optimizer steps")
    batch: int = flag(128, "images per step")
    lr: float = flag(2e-4, "peak learning rate")
    warmup: int = flag(500, "steps to reach it")
    ema: float = flag(0.999, "decay of the averaged weights, with which images are made")
    drop: float = flag(0.1, "share of the images trained without their class, for guidance")
    augment: str = flag("hflip,rot90", "augmentations that keep images likely: the generator learns them")
    seed: int = flag(0, "fixes the choice of images, weights and noise")

    def __post_init__(self):
        compose(self.augment)
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


@dataclass
class Script(Config):
    """What only the command line needs."""
    data: str = flag("data/NWPU-RESISC45", "tree with a folder per class, or xBD tree")
    skip_broken: bool = flag(False, "leave out pictures that do not decode")
    per_class: int = flag(0, "training images per class (0: the whole training split)")
    out: str = flag("runs/gen", "folder for generator.pt, its log and sample grids, or for the images made")
    every: int = flag(1000, "steps between checkpoints, log lines and sample grids")
    sample: str = flag("", "make images with this checkpoint instead of training one")
    classes: str = flag("", "with --sample: which classes, by comma (empty: all)")
    count: int = flag(16, "with --sample: images per class")
    calls: int = flag(12, "network calls per image")
    w: float = flag(1.5, "guidance scale (1: none)")


@dataclass
class Generator:
    """A trained generator: noise process, averaged network in eval mode, and what it was made with."""
    diffusion: Diffusion
    model: nn.Module
    classes: list[str]
    config: Config


def networks(cfg, classes, channels):
    """The noise process and a fresh network, weights fixed by the seed."""
    torch.manual_seed(cfg.seed)
    model = UNet(classes, channels, cfg.width, cfg.mults, cfg.blocks, cfg.patch)
    model = model.to(memory_format=torch.channels_last)                  # a quarter faster, also on a CPU
    return Diffusion(cfg.timesteps, cfg.schedule, cfg.predict, cfg.gamma), model


@torch.no_grad()
def update_ema(ema, model, decay):
    """Move the averaged weights a step towards the model's; copy what is not learned.

    torch's AveragedModel does the same, but copies its counter to the GPU at every step and waits for it.
    """
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for a, b in zip(ema.buffers(), model.buffers(), strict=True):
        a.copy_(b)


def train(real, cfg, path=None, every=1000, look=0, title="generator"):
    """Train on real (Scenes) by cfg (Config). -> Generator.

    Everything is kept in the checkpoint `path`, if any, its log beside it. Every step draws its randomness
    from (seed, step): a run that was killed goes on at its last checkpoint and ends with the numbers of one
    that was not (on a CPU to the bit). With look > 0 every checkpoint comes with a grid, `look` images per
    class from the same noise. Raises Problem if the checkpoint is of other settings or images, or if the loss
    is not finite.
    """
    device, path = data.pick_device(), path and Path(path)
    diffusion, model = networks(cfg, len(real.classes), real.images.shape[1])
    diffusion, model = diffusion.to(device), model.to(device)
    ema = copy.deepcopy(model).eval()
    generator = Generator(diffusion, ema, real.classes, cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.01,
                                  fused=True)
    parts = dict(model=model, ema=ema, optimizer=optimizer)
    settings = {f.name: getattr(cfg, f.name) for f in fields(Config)}
    identity = dict(config=settings, classes=real.classes, names=real.names, images=real.digest,
                    channels=real.images.shape[1])
    saved = data.resume(path, "generator", identity, parts)
    start, log = (saved["step"], saved["log"]) if saved else (0, [])

    augment = compose(cfg.augment)
    images, labels = real.images.to(device), real.labels.to(device)
    quarters = torch.zeros(2, 4, device=device)                       # per quarter of t: sum of losses, count
    part = data.share(cfg.batch)                                  # of several processes, each computes a part
    for step in data.progress(range(start, cfg.steps), title, cfg.steps, initial=start):
        g = data.rng(cfg.seed, step, device=device)
        index = torch.randint(len(images), (cfg.batch,), device=device, generator=g)
        x0, _ = augment(data.to_float(images[index]), None, g)
        with data.autocast(device):
            loss, t = diffusion.loss(model, x0, Condition(labels[index]), cfg.drop, g, part)
        (loss.sum() / cfg.batch).backward()
        data.sum_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = data.lr_at(step, cfg.steps, cfg.lr, cfg.warmup)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(cfg.ema, (1 + step) / (10 + step))              # a young average forgets the start sooner
        update_ema(ema, model, decay)
        quarters.index_add_(1, t * 4 // cfg.timesteps, torch.stack([loss.detach(), torch.ones_like(loss)]))

        if (step + 1) % every == 0 or step + 1 == cfg.steps:
            log.append(log_row(step + 1, data.total(quarters)))
            quarters.zero_()
            if path and data.rank() == 0:
                data.save_checkpoint(path, "generator", identity, step + 1, parts, log=log)
                data.save_csv(path.with_suffix(".csv"), ["step", "loss", "t_1", "t_2", "t_3", "t_4"], log)
            if path and look:
                save_samples(generator, look, path.with_name(f"samples-{step + 1:06d}.png"))
    return generator


def save_samples(generator, look, path):
    """A picture with a row of `look` images per class, from the same noise each time."""
    y, cfg = torch.arange(len(generator.classes)).repeat_interleave(look), generator.config
    made = generate(generator, y, seed=0, calls=min(12, cfg.timesteps))
    if data.rank() == 0:
        data.save_picture(data.grid(made, look, zoom=max(1, 64 // cfg.size)), path)


def log_row(step, quarters):
    """[step, mean loss, mean loss of each quarter of t], from their sums and counts, (2, 4).

    Raises Problem if the loss is not finite.
    """
    total, count = quarters.tolist()
    if not math.isfinite(sum(total)):
        raise Problem(f"the loss is {sum(total)} at step {step}: lower --lr")
    return [step, sum(total) / sum(count), *(s / max(n, 1) for s, n in zip(total, count, strict=True))]


def load_generator(path):
    """The Generator of a checkpoint, ready to make images. Raises Problem if the file is none."""
    saved = data.load_checkpoint(path, "generator")
    cfg, channels = Config(**saved["config"]), saved["channels"]
    diffusion, model = networks(cfg, len(saved["classes"]), channels)
    model.load_state_dict(saved["ema"])
    device = data.pick_device()
    return Generator(diffusion.to(device), model.to(device).eval(), saved["classes"], cfg)


def generate(generator, y, seed, calls=12, w=1.5, batch=256, title="images"):
    """Images of the classes y (N,) int64, as uint8 (N, C, H, W) on the CPU.

    Image k follows from (seed, k), whatever the batch and the number of processes. Each process makes its
    part, and all get all of them.
    """
    diffusion, model, cfg = generator.diffusion, generator.model, generator.config
    device, part = diffusion.signal.device, data.share(len(y))
    shape = (model.channels, cfg.size, cfg.size)
    images = torch.zeros(len(y), *shape, dtype=torch.uint8, device=device)
    for k in data.progress(range(part.start, part.stop, batch), title):
        now = slice(k, min(k + batch, part.stop))
        seeds = [(seed * 1_000_003 + i) % 2**32 for i in range(now.start, now.stop)]
        with data.autocast(device):
            cond, noise = Condition(y[now].to(device)), noise_of(seeds, shape, device)
            images[now] = data.to_uint8(diffusion.sample(model, cond, noise, calls, w=w))
    return data.total(images).cpu()                      # zeros stand where the others' images go


# ---- what the images are like: distances of two sets in some features, and copies

def frechet(a, b):
    """Fréchet distance of Gaussians fitted to features a (N, D) and b (M, D): Heusel et al. 2017, Eq. 6.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): a squared distance, 0 if both moments are equal.
    With C_a = A'A and C_b = B'B the trace of the root is the sum of the singular values of A B', which needs
    no root of a matrix and is exact where N < D leaves C_a without full rank. A is the triangle of the QR
    decomposition of the centred features. Fewer images read as a larger distance: compare at equal N only.
    """
    a, b = a.double(), b.double()
    A, B = (torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R for x in (a, b))
    root = torch.linalg.svdvals(A @ B.mT).sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, (shift + A.square().sum() + B.square().sum() - 2 * root).item())


def radii(x, k):
    """How far the k-th nearest other one of x (N, D) is from each: (N,). Itself is the nearest of all."""
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(1024)])


def prdc(real, fake, k=5):
    """Precision, recall, density and coverage of features fake (M, D) as an image of real (N, D), N, M > k.

    A ball around each image reaches to its k-th nearest neighbour among its own kind.

        precision   share of the fakes inside the ball of any real image     Kynkäänniemi et al. 2019, Eq. 2
        recall      share of the real images inside the ball of any fake     the same
        density     in how many real balls a fake is, over k                 Naeem et al. 2020, section 3
        coverage    share of the real balls with a fake inside               the same

    One outlier with a large ball lifts precision to 1, but density by no more than 1 / k. For two samples of
    one distribution density is 1 on average and coverage 1 - 2^-k at N = M (their Lemmas 1 and 2), while
    precision and recall depend on it: .48 for Gaussians in 1,000 dimensions. So print the same of held-out
    real images beside it, at equal N and M.
    """
    real, fake = real.double(), fake.double()
    around_real, around_fake = radii(real, k), radii(fake, k)
    balls, recalled = [], torch.zeros_like(around_real, dtype=torch.bool)
    closest = torch.full_like(around_real, math.inf)                         # fake of each real image
    for part, radius in zip(fake.split(1024), around_fake.split(1024), strict=True):
        d = torch.cdist(part, real)
        balls.append((d < around_real).sum(1))
        recalled |= (d < radius[:, None]).any(0)
        closest = torch.minimum(closest, d.amin(0))
    balls = torch.cat(balls).double()
    return dict(precision=(balls > 0).double().mean().item(), recall=recalled.double().mean().item(),
                density=balls.mean().item() / k, coverage=(closest < around_real).double().mean().item())


def symmetries(images):
    """The 8 turns and flips of square images (N, C, H, W): (8, N, C, H, W), the first as they came."""
    turns = [images.rot90(k, (-2, -1)) for k in range(4)]
    return torch.stack(turns + [image.flip(-1) for image in turns])


def nearest(turned, pool, chunk=256):
    """For each image the most similar one of the pool, whichever way it is turned: distance, which, turn.

    turned (8, N, D): pixels or features of symmetries(images); pool (M, D): of the images as they are, both
    uint8 or float. The distance (N,) is the root mean square difference of the D numbers, in their unit;
    which (N,) counts in the pool, turn (N,) in the 8. Only `chunk` images and four times as many of the pool
    are floats at a time: neither is copied as a whole.
    """
    found = []
    for part in turned.split(chunk, dim=1):
        rows = part.flatten(0, 1).float()                                             # (8 n, D)
        best = rows.new_full((len(rows),), math.inf)
        which = torch.zeros_like(best, dtype=torch.long)
        for start in range(0, len(pool), 4 * chunk):
            d, index = torch.cdist(rows, pool[start:start + 4 * chunk].float()).min(1)
            which = torch.where(d < best, start + index, which)
            best = torch.minimum(best, d)
        best, turn = best.view(part.shape[:2]).min(0)
        which = which.view(part.shape[:2]).gather(0, turn[None])[0]
        chosen = part[turn, torch.arange(part.shape[1], device=turn.device)]
        exact = (chosen.float() - pool[which].float()).square().mean(1).sqrt()  # cdist rounds small distances
        found.append((exact, which, turn))
    return tuple(torch.cat(values) for values in zip(*found, strict=True))


def mann_whitney(a, b):
    """How often a value of a (n,) is below one of b (m,), ties counting half, and how often chance does so.

    The share U / (n m) of pairs, .5 if neither is smaller, and the one-sided p-value of so large a share
    (Mann and Whitney 1947), in the normal approximation with corrections for ties and for continuity: good
    from 8 or so values each. With a the distances of synthetic images to their nearest training image and b
    those of held-out real images of the same classes, a share near 1 says copies and .5 or less does not
    (Meehan et al. 2020). Only distances are compared, and flat pictures are near to everything: look at the
    nearest pairs too.
    """
    a, b = a.double(), b.double().sort().values
    n, m = len(a), len(b)
    above = m - torch.searchsorted(b, a, right=True).double()                # how many of b, for each of a
    equal = m - torch.searchsorted(b, a).double() - above
    U = (above + equal / 2).sum().item()
    ties = torch.cat([a, b]).unique(return_counts=True)[1].double()
    variance = n * m / 12 * (n + m + 1 - ((ties**3 - ties).sum().item() / ((n + m) * (n + m - 1))))
    if variance == 0:                                                         # all values are the same
        return 0.5, 1.0
    z = (U - n * m / 2 - 0.5) / math.sqrt(variance)
    return U / (n * m), math.erfc(z / math.sqrt(2)) / 2


# ---- the script

def sample(cfg):
    """Write images of a checkpoint as a tree that every reader of class folders reads, and a grid of them."""
    generator = load_generator(cfg.sample)
    wanted = cfg.classes.split(",") if cfg.classes else generator.classes
    if unknown := set(wanted) - set(generator.classes):
        raise Problem(f"{cfg.sample} knows no class {', '.join(sorted(unknown))}; "
                      f"it knows {', '.join(generator.classes)}")
    y = torch.tensor([generator.classes.index(name) for name in wanted]).repeat_interleave(cfg.count)
    if not 1 <= cfg.calls <= generator.config.timesteps:
        raise Problem(f"--calls {cfg.calls}: {cfg.sample} has a chain of {generator.config.timesteps} steps")
    if there := [name for name in wanted if any((Path(cfg.out) / name).glob("*.png"))]:
        raise Problem(f"{cfg.out} holds pictures of {there[0]} already: give another --out, or remove them")
    images = generate(generator, y, cfg.seed, cfg.calls, cfg.w)
    if data.rank():
        return
    for k, image in enumerate(images):
        name = generator.classes[y[k]]
        data.save_picture(data.picture(image), Path(cfg.out) / name / f"{name}_{k % cfg.count + 1:05d}.png")
    data.save_picture(data.grid(images, cfg.count), Path(cfg.out) / "grid.png")
    print(f"{len(images)} images of {len(wanted)} classes in {cfg.out}, all of them in {cfg.out}/grid.png")


def main(cfg):
    """The script: train on the training split of a tree, or make images."""
    if cfg.sample:
        return sample(cfg)
    scenes = data.read(cfg.data, cfg.size, cfg.skip_broken)
    index = data.split(scenes, cfg.data)["train"]
    if cfg.per_class:
        index = data.subset(scenes, index, cfg.per_class, cfg.seed)
    path = Path(cfg.out) / "generator.pt"
    print(f"{len(index)} images of {len(scenes.classes)} classes, on {data.pick_device()}; "
          f"look at {cfg.out}/samples-*.png")
    train(scenes[index], cfg, path, cfg.every, look=8)
    print(f"done: python train_gen.py --sample {path} makes images with it")


if __name__ == "__main__":
    data.launch(main, Script, several=True)
