"""Train a classifier on real scenes, synthetic ones or a mixture, and score it.

    python train_cls.py --data data/NWPU-RESISC45 --augment hflip,rot90,crop,color
    python train_cls.py --data data/NWPU-RESISC45 --synthetic runs/made --share 0.5 --out runs/mixed
    torchrun --nproc-per-node 4 train_cls.py ...               # same numbers, on 4 GPUs
    python train_cls.py --predict photos --out runs/mixed      # with runs/mixed/classifier.pt: a csv
    python train_cls.py --data data/UCM_captions --captions --out runs/clip    # a CLIP from scratch
    python train_cls.py --data data/NWPU-RESISC45 --init WEIGHTS --tune head   # ours, or published ones

Everything is counted in optimizer steps, never in epochs: more images must not mean more training.
"""
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import data
import vit
from augment import OVERHEAD, compose
from data import Problem, flag
from vit import CLIP, LENGTH, Block, Convolutions, Patches, Text, ViT, head, mean_token, word_tokens, zero

SMALL = "--size 32 --patch 4 --dim 64 --depth 1 --heads 2 --steps 1500 --batch 64 --lr 4e-3 --warmup 50"
MODELS = "vit", "patches", "resnet", "linear"          # patches: a ViT without convolutions
TUNES = "all", "head", "none"
PACE = 0.1                                             # of a tower that is tuned: a part of its head's rate


@dataclass
class Config(data.Settings):
    """Everything that makes a classifier but the images."""
    model: str = flag("vit", f"recogniser: {', '.join(MODELS)}")
    size: int = flag(64, "side of the images in pixels", 1, 1024)
    patch: int = flag(8, "pixels a side of a token", 1, 1024)
    dim: int = flag(192, "width of a token", 16, 8192)
    depth: int = flag(6, "transformer blocks", 0, 100)
    heads: int = flag(3, "attention heads", 1, 512)
    steps: int = flag(5000, "optimizer steps", 1)
    batch: int = flag(128, "images per step, real and synthetic together", 1, 65_536)
    lr: float = flag(1e-3, "peak learning rate", 1e-9)
    warmup: int = flag(200, "steps to reach it", 0)
    decay: float = flag(0.1, "weight decay, on matrices only", 0, 100)
    smoothing: float = flag(0.1, "label smoothing", 0, 0.99)
    share: float = flag(0.0, "probability that a synthetic image stands in for a real one of its class", 0, 1)
    pretrain: bool = flag(False, "only synthetic images for the first --share of the steps, then real ones")
    balance: bool = flag(False, "draw all classes equally often, however rare they are")
    augment: str = flag(OVERHEAD, "augmentations by name, in order; none is none")
    seed: int = flag(0, "fixes the choice of images, weights and batches", 0, 2**32 - 1)
    init: str = flag("", "weights to begin from, instead of --model of this --size, --patch, --dim ...")
    tune: str = flag("all", "what to train of --init: all, head (without augmentation) or none")

    def __post_init__(self):
        super().__post_init__()
        compose(self.augment)
        if self.tune not in TUNES:
            raise ValueError(f"--tune {self.tune}: known are {', '.join(TUNES)}")
        if self.init:                                                    # the weights tell their shapes
            return
        if self.model not in MODELS:
            raise ValueError(f"--model {self.model}: known are {', '.join(MODELS)}")
        if self.size % self.patch:
            raise ValueError(f"--size {self.size} is not divisible by --patch {self.patch}")
        if self.model == "vit" and self.patch not in (2, 4, 8, 16, 32):
            raise ValueError(f"--patch {self.patch}: convolutions halve, so 2, 4, 8, 16 or 32")
        if self.dim % 16 or self.model in ("vit", "patches") and self.dim % self.heads:
            raise ValueError(f"--dim {self.dim} must be divisible by 16 and by --heads {self.heads}")


@dataclass
class Script(Config):
    """Config, and the settings that only the command line needs."""
    data: str = flag("data/NWPU-RESISC45", "tree with a folder per class, caption set or xBD tree")
    synthetic: str = flag("", "tree of synthetic images, same class names, as train_gen.py --sample makes")
    skip_broken: bool = flag(False, "leave out pictures that do not decode")
    per_class: int = flag(0, "real training images per class, or tiles of an xBD tree (0: all)", 0)
    out: str = flag("runs/cls", "folder for classifier.pt, or where it is", alone=True)
    predict: str = flag("", "classify the pictures of a folder instead of training: predictions.csv in --out")
    test: bool = flag(False, "score on the test split too: once, when nothing is left to choose")
    captions: bool = flag(False, "train a CLIP on the sentences of a caption set instead: clip.pt in --out")
    mae: bool = flag(False, "train a ViT to draw what is hidden of an image instead: mae.pt in --out")

    def __post_init__(self):
        super().__post_init__()
        if self.captions + self.mae + bool(self.init) > 1:
            raise ValueError("--captions, --mae and --init: give one of them")
        if (self.captions or self.mae) and self.share:
            raise ValueError("--captions and --mae take real images alone: leave out --share")
        if self.mae and self.model not in ("vit", "patches"):
            raise ValueError(f"--mae needs the tokens of a ViT, which --model {self.model} has not")
        if self.captions and self.model == "linear":
            raise ValueError("--captions trains a network: --model linear is none")
        idle = {"linear": ["patch", "dim", "depth", "heads", "steps", "batch", "lr", "warmup", "decay",
                           "smoothing", "pretrain", "augment"], "resnet": ["patch", "depth", "heads"]}
        trained = {f.name for f in fields(self)} - {"skip_broken", "out", "predict"}
        data.without_effect(self, trained if self.predict else [], "with --predict")
        data.without_effect(self, idle.get(self.model, []), f"with --model {self.model}")
        shape = ["model", "patch", "dim", "depth", "heads"]
        data.without_effect(self, shape if self.init else [], "with --init")
        data.without_effect(self, ["balance", "smoothing", "test"] if self.mae else [], "with --mae")
        data.without_effect(self, ["balance", "smoothing"] if self.captions else [], "with --captions")
        data.without_effect(self, [] if self.init else ["tune"], "without --init")
        data.without_effect(self, [] if self.share else ["pretrain"], "without --share")
        if "copypaste" in self.augment.split(","):
            raise ValueError("--augment copypaste needs masks, which only experiment.py gives a classifier")
        if bool(self.synthetic) != (self.share > 0):
            raise ValueError("--synthetic and --share belong together: "
                             "give the tree and the probability of its images")


# ---- the recognisers beside the ViT

class Residual(nn.Module):
    """Two convolutions beside a skip: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).

    He et al. 2016, Eq. 2. The second norm starts at 0, the block as its skip (Goyal et al. 2017).
    """

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = zero(nn.GroupNorm(8, c_out))
        self.skip = nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.skip(x) + self.norm2(self.conv2(h)))


class ResNet(nn.Module):
    """A small residual network: images (B, C, H, W) in [-1, 1] to class logits (B, K). No attention."""

    def __init__(self, classes, width=32, channels=3):
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            Residual(width, width, stride=1),
            Residual(width, 2 * width, stride=2),
            Residual(2 * width, 4 * width, stride=2))
        self.head = head(4 * width, classes)

    def features(self, x):
        """Return the mean over all places, (B, 4 width)."""
        return mean_token(rearrange(self.blocks(x), "b c h w -> b (h w) c"), x)

    def forward(self, x):
        return self.head(self.features(x))


def histogram(index, weights, bins):
    """Sum the weights (B, P) that fall into each bin, index (B, P) int64: (B, bins)."""
    return weights.new_zeros(len(index), bins).scatter_add_(1, index, weights)


def colours_and_edges(x):
    """Describe images (B, C, H, W) in [-1, 1] without learning: (B, 160), or with a mask in C (B, 320).

    Histograms of each of R, G, B in 8 bins, of all three together in 4 x 4 x 4, and of the directions of
    edges (8 bins, weighted by strength) in each of 3 x 3 cells (Dalal & Triggs 2005); of all of them square
    roots, whose distance is Hellinger's. With a mask all of it once more, of the building alone.
    """
    B, _, H, W = x.shape
    rgb = data.to_uint8(x[:, :3]).long().flatten(2)                                         # (B, 3, H W)
    level = rgb // 32 + 8 * torch.arange(3, device=x.device)[:, None]
    colour = (rgb // 64 * torch.tensor([[16], [4], [1]], device=x.device)).sum(1)           # (B, H W)

    grey = F.pad(x[:, :3].mean(1), (1, 1, 1, 1), "replicate")
    dx = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]
    dy = grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
    strength = torch.hypot(dx, dy).flatten(1)                                               # (B, H W)
    direction = (torch.atan2(dy, dx) / math.pi * 4).floor().long() % 8
    row, column = torch.arange(H, device=x.device) * 3 // H, torch.arange(W, device=x.device) * 3 // W
    cell = (8 * (3 * row[:, None] + column) + direction).flatten(1)

    found = []
    for region in [torch.ones_like(x[:, 0]), *(x[:, 3:] > 0).float().unbind(1)]:
        w = (region / region.sum((1, 2), keepdim=True).clamp(min=1)).flatten(1)             # (B, H W)
        found += [histogram(level.flatten(1), w.repeat(1, 3), 24), histogram(colour, w, 64),
                  histogram(cell, w * strength, 72)]
    return torch.cat(found, 1).sqrt()


class Linear(nn.Module):
    """Multinomial logistic regression on colours and edges: the floor, which learns no features."""

    def __init__(self, classes, channels=3):
        super().__init__()
        dim = 160 * (channels - 2)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.head = zero(nn.Linear(dim, classes))

    def solve(self, mixture, penalty=0.01):
        """Minimise the average loss over all batches of a mixture, plus penalty / 2 |W|^2, by L-BFGS."""
        f = torch.cat([colours_and_edges(data.to_float(images)) for images in mixture.images.split(512)])
        chances = mixture.chances()[:, None]
        self.mean = (chances * f).sum(0)
        self.std = (chances * (f - self.mean) ** 2).sum(0).sqrt().clamp(min=1e-3)    # some never vary
        f = (f - self.mean) / self.std
        optimizer = torch.optim.LBFGS(self.head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            each = F.cross_entropy(self.head(f), mixture.targets, reduction="none")
            loss = (chances[:, 0] * each).sum() + penalty / 2 * self.head.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    def features(self, x):
        """Return the standardised histograms, (B, 160) or (B, 320)."""
        return (colours_and_edges(x) - self.mean) / self.std

    def forward(self, x):
        return self.head(self.features(x))


def network(cfg, classes, channels):
    """Make a fresh recogniser of these classes, weights fixed by the seed; or one begun from cfg.init."""
    start = load_weights(cfg.init) if cfg.init else None                 # which has a seed of its own
    torch.manual_seed(cfg.seed)
    if start:
        return Tuned(*start, classes)
    if cfg.model == "linear":
        return Linear(len(classes), channels)
    if cfg.model == "resnet":
        return ResNet(len(classes), cfg.dim // 2, channels)
    stem = Patches if cfg.model == "patches" else Convolutions
    return ViT(len(classes), cfg.size, cfg.patch, cfg.dim, cfg.depth, cfg.heads, channels, stem)


# ---- training

def adamw(model, decay):
    """AdamW with decay on matrices only; a tower that was trained before goes slower than its new head."""
    kinds = {}
    for name, p in model.named_parameters():
        pace, is_matrix = PACE if name.startswith("tower.") else 1.0, p.ndim > 1
        kinds.setdefault((pace, is_matrix), []).append(p)
    return torch.optim.AdamW([dict(params=params, weight_decay=decay * is_matrix, pace=pace)
                              for (pace, is_matrix), params in kinds.items()], fused=True)


class ByClass:
    """An index of images by their class, labels (N,) int64 in 0..K-1."""

    def __init__(self, labels, K):
        self.order = labels.argsort(stable=True)
        self.count = labels.bincount(minlength=K)                        # (K,)
        self.first = self.count.cumsum(0) - self.count

    def draw(self, c, u):
        """Pick an image of class c by u, uniform in [0, 1), both (B,): its index; any if there is none."""
        place = self.first[c] + (u * self.count[c]).long()
        return self.order[place.clamp(max=len(self.order) - 1)]


class Mixture:
    """Real and synthetic images on a device, to draw batches from."""

    def __init__(self, real, synthetic, cfg, soft, device):
        without = real and synthetic and set(real.labels.tolist()) - set(synthetic.labels.tolist())
        real_too = cfg.share < 1 or without             # a class without synthetic images keeps the real ones
        used = (real, real_too), (synthetic, cfg.share > 0)
        self.pools = [pool for pool, is_used in used if is_used]
        first, last = self.pools[0], self.pools[-1]
        self.share, self.K = cfg.share, len(first.classes)

        self.images = torch.cat([pool.images for pool in self.pools]).to(device)         # (N, C, H, W) uint8
        targets = [F.one_hot(pool.labels, self.K).float() for pool in self.pools]
        if soft is not None and cfg.share > 0:
            targets[-1] = soft
        self.targets = torch.cat(targets).to(device)                                     # (N, K)
        self.labels = [pool.labels.to(device) for pool in (first, last)]
        self.real, self.synthetic = (ByClass(labels, self.K) for labels in self.labels)
        self.offset = len(self.images) - len(last)                       # where the synthetic images start
        labels = self.labels[0].sort().values
        self.classes = labels.unique() if cfg.balance else labels        # a class is drawn from these

    def chances(self):
        """Return the probability of each image to be the next one drawn, (N,): it sums to 1."""
        class_p = self.classes.bincount(minlength=self.K) / len(self.classes)                # (K,)
        share = self.share * (self.synthetic.count > 0)
        chances = torch.zeros(len(self.images), device=self.classes.device)
        real, synthetic = self.labels
        chances[:len(real)] += (class_p * (1 - share) / self.real.count.clamp(min=1))[real]
        chances[self.offset:] += (class_p * share / self.synthetic.count.clamp(min=1))[synthetic]
        return chances

    def draw(self, n, generator):
        """Draw n images. Returns their indices, and which of them are synthetic, both (n,).

        First a class, as often as it occurs or all equally often, then an image of this class: a synthetic
        one with probability `share`, if there is any. The random numbers do not depend on the share.
        """
        which, kind, u, v = torch.rand(4, n, device=self.classes.device, generator=generator)
        c = self.classes[(which * len(self.classes)).long()]
        fake = (kind < self.share) & (self.synthetic.count[c] > 0)
        return torch.where(fake, self.offset + self.synthetic.draw(c, v), self.real.draw(c, u)), fake


def train(model, loss, cfg, path, kind, about, every, title, **tallies):
    """Take cfg.steps steps of AdamW on loss(step, generator), whose randomness follows from (seed, step).

    loss is this process's sum, divided by the images of all; tallies are tensors in which it counts. All is
    kept at path, a checkpoint of this kind, cfg and about, from which a killed run goes on. -> model.eval()
    """
    device, optimizer = data.pick_device(), adamw(model, cfg.decay)
    identity = dict(config=data.settings_of(cfg, Config), **about)
    parts = dict(model=model, optimizer=optimizer)
    saved = data.resume(path, kind, identity, parts, dict(step=0, **tallies))
    for name, tally in tallies.items():
        tally.copy_(saved[name])
    for step in data.progress(range(saved["step"], cfg.steps), title, cfg.steps, initial=saved["step"]):
        value = loss(step, data.rng(cfg.seed, step, device=device))
        data.descend(model, optimizer, value, step, cfg)
        if (step + 1) % every == 0 or step + 1 == cfg.steps:
            if not math.isfinite(mean := data.total(value.detach()).item()):
                raise Problem(f"the loss is {mean} at step {step + 1}: lower --lr")
            if path and data.rank() == 0:
                data.save_checkpoint(path, kind, identity, step + 1, parts, **tallies)
    return model.eval()


@contextmanager
def kept_whole(path, model, cfg, about, step):
    """Keep a classifier that this block makes in one go; one of another run is refused before, and stays."""
    identity = dict(config=data.settings_of(cfg, Config), **about)
    data.resume(path, "classifier", identity, {}, dict(step=0))
    yield
    if path and data.rank() == 0:
        data.save_checkpoint(path, "classifier", identity, step, dict(model=model))


def fit(real, synthetic, cfg, path=None, soft=None, every=1000, title="classifier", model=None):
    """Train model, or else a fresh recogniser, on real and synthetic (Scenes; what is not used may be None).

    soft (N, K): what to teach of synthetic images, not their class; path: a checkpoint. -> model, counts
    """
    device = data.pick_device()
    mixture = Mixture(real, synthetic, cfg, soft, device)
    channels, classes = mixture.images.shape[1], mixture.pools[0].classes
    model = network(cfg, classes, channels) if model is None else model
    model.to(device, memory_format=torch.channels_last)                                  # a tenth faster
    about = dict(classes=classes, channels=channels, images=[pool.digest for pool in mixture.pools],
                 soft=soft is not None and soft.tolist())
    if isinstance(model, Linear):                             # solved, without steps, seed and augmentation
        with kept_whole(path, model, cfg, about, 0):
            model.solve(mixture)
        return model.eval(), dict(steps=0, images=0, synthetic=0)
    augment, synthetic_seen = compose(cfg.augment), torch.zeros((), device=device)
    part = data.own_slice(cfg.batch)                              # of several processes, each computes a part

    def loss(step, g):
        if cfg.pretrain:                                              # synthetic images first, then real ones
            mixture.share = float(step < cfg.share * cfg.steps)
        index, fake = mixture.draw(cfg.batch, g)
        synthetic_seen.add_(fake.sum())
        x, y = augment(as_float(mixture.images[index]), mixture.targets[index], g)
        with data.autocast(device):
            each = F.cross_entropy(model(x[part]), y[part], reduction="sum", label_smoothing=cfg.smoothing)
        return each / cfg.batch

    train(model, loss, cfg, path, "classifier", about, every, title, synthetic_seen=synthetic_seen)
    return model, dict(steps=cfg.steps, images=cfg.steps * cfg.batch, synthetic=int(synthetic_seen))


def as_float(x):
    """Turn images into floats; features, which stand in their place when a head is tuned, are floats."""
    return x if x.is_floating_point() else data.to_float(x)


@torch.no_grad()
def outputs(function, images, batch=512):
    """Apply a model, or its features, to images (N, C, H, W) uint8: (N, D) float32 on the CPU."""
    device, parts = data.pick_device(), images.split(batch)
    with data.autocast(device):
        return torch.cat([function(as_float(part.to(device))).float().cpu() for part in parts])


def predict(model, images, batch=512):
    """Classify images (N, C, H, W) uint8: (N,) int64 on the CPU."""
    return outputs(model, images, batch).argmax(1)


def build(path, saved):
    """Make the model of a checkpoint that was read from path, in eval mode. Returns it and its Config."""
    with data.refusing(path, "is broken", "train it again, or give another path"):
        cfg = Config(**saved["config"])
        model = (clip(cfg, saved["words"]) if saved["kind"] == "clip" else
                 MAE(cfg) if saved["kind"] == "mae" else network(cfg, saved["classes"], saved["channels"]))
        model.load_state_dict(saved["model"])
    return model.to(data.pick_device()).eval(), cfg


def load_classifier(path):
    """Read a checkpoint. Returns the model in eval mode, its classes and image size."""
    saved = data.load_checkpoint(path, "classifier")
    model, cfg = build(path, saved)
    return model, saved["classes"], cfg.size


# ---- CLIP, from images and their sentences

def sentences_of(scenes):
    """List the sentences of all images, [M], and for each the number of its image, (M,) int64."""
    owner = [k for k, texts in enumerate(scenes.captions) for _ in texts]
    return [text for texts in scenes.captions for text in texts], torch.tensor(owner)


def clip(cfg, words):
    """Make a fresh CLIP: equal towers, the E = cfg.dim axes as 'classes'; words [V] for text."""
    return CLIP(network(cfg, range(cfg.dim), 3), Text(len(words) + 3, LENGTH, cfg.dim, cfg.depth, cfg.heads))


def fit_clip(scenes, cfg, path=None, every=1000):
    """Train a CLIP from scratch on Scenes with sentences. -> model.eval() and its tokenizer"""
    if not all(scenes.captions):
        raise Problem("--captions needs sentences for every image: --data must be a caption set")
    if mixes := [name for name in ("cutmix", "copypaste") if name in cfg.augment]:
        raise Problem(f"--augment {mixes[0]} makes sentences untrue: leave it out with --captions")
    device, (texts, owner) = data.pick_device(), sentences_of(scenes)
    words = vit.vocabulary(texts)
    ids, images = word_tokens(texts, words).to(device), scenes.images.to(device)
    sentences = ByClass(owner.to(device), len(scenes))
    model = clip(cfg, words).to(device, memory_format=torch.channels_last)
    augment = compose(cfg.augment)

    def loss(step, g):                                       # no image twice, with one of its sentences each
        index = torch.randperm(len(images), device=device, generator=g)[:cfg.batch]
        text = sentences.draw(index, torch.rand(len(index), device=device, generator=g))
        x, _ = augment(data.to_float(images[index]), None, g)
        with data.autocast(device):
            return vit.contrastive(model(x, ids[text]))

    about = dict(words=words, images=scenes.digest)
    return train(model, loss, cfg, path, "clip", about, every, "CLIP"), partial(word_tokens, words=words)


@torch.no_grad()
def encode_texts(model, tokens, texts, batch=512):
    """Place texts on the unit sphere of a CLIP, (M, E) on the CPU."""
    parts = [texts[k:k + batch] for k in range(0, len(texts), batch)]
    return torch.cat([model.encode_text(tokens(part).to(data.pick_device())).float().cpu() for part in parts])


def recalls(scores, owner, ks=(1, 5, 10)):
    """Score retrieval by the similarity of N images and M texts, (N, M); text m is of image owner[m].

    -> the shares of images with a text among the k best, and of texts whose image is, both [len(ks)]. Ties
    count half.
    """
    def found(best, others):                                             # (R,), (R, Q): share in the best k
        rank = (others > best[:, None]).sum(1) + (others == best[:, None]).sum(1) / 2
        return [(rank < k).double().mean().item() for k in ks]

    own = owner == torch.arange(len(scores))[:, None]                    # (N, M)
    alien = scores.masked_fill(own, -math.inf)
    return found(scores.masked_fill(~own, -math.inf).amax(1), alien), found(scores.T[own.T], alien.T)


def recalls_by_chance(owner, N, ks=(1, 5, 10)):
    """Return what recalls would be of scores drawn at random, for N images."""
    M, counts = len(owner), owner.bincount(minlength=N).tolist()
    missed = [np.mean([math.comb(M - m, min(k, M)) / math.comb(M, min(k, M)) for m in counts]) for k in ks]
    return [1 - miss for miss in missed], [min(k / N, 1) for k in ks]


# ---- MAE, from images alone

class MAE(nn.Module):
    """A ViT under a decoder of one block, which draws what is hidden of an image: He et al. 2022, 2111.06377.

    The blocks see a quarter of the tokens, and the convolutions before them grey in place of the others.
    """

    def __init__(self, cfg):
        super().__init__()
        self.vit, self.patch = network(cfg, [""], 3), cfg.patch
        self.hidden = nn.Parameter(0.02 * torch.randn(cfg.dim))          # the token of what is hidden
        self.decoder = nn.Sequential(Block(cfg.dim, cfg.heads), nn.LayerNorm(cfg.dim),
                                     nn.Linear(cfg.dim, 3 * cfg.patch**2))

    def forward(self, x, generator, part=0.75):
        """Hide a part of the patches of images (B, 3, H, W). -> the mean squared error there, per patch

        Targets are a patch's pixels less their mean, over their standard deviation (norm_pix_loss).
        """
        p, net = self.patch, self.vit
        pixels = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)                    # (B, L, P)
        B, L, _ = pixels.shape
        order = torch.rand(B, L, device=x.device, generator=generator).argsort(1)
        seen = order[:, :round(L * (1 - part))]
        shown = x.new_zeros(B, L).scatter(1, seen, 1.0)                                          # 1 or 0
        cover = rearrange(shown, "b (h w) -> b 1 h w", h=x.shape[2] // p)
        x = x * cover.repeat_interleave(p, 2).repeat_interleave(p, 3)
        index = seen[..., None].expand(-1, -1, net.positions.shape[1])
        tokens = net.norm(net.blocks((net.stem(x) + net.positions).gather(1, index)))            # (B, L/4, D)
        every = self.hidden.to(tokens.dtype).expand(B, L, -1).scatter(1, index, tokens) + net.positions
        target = F.layer_norm(pixels, pixels.shape[-1:], eps=1e-4)
        error = (self.decoder(every) - target).square().mean(2)                                  # (B, L)
        return (error * (1 - shown)).sum() / (1 - shown).sum()


def fit_mae(scenes, cfg, path=None, every=1000):
    """Train a ViT as MAE does, on images (Scenes) whose labels it does not see. -> the ViT in eval mode."""
    device, images = data.pick_device(), scenes.images.to(data.pick_device())
    model = MAE(cfg).to(device, memory_format=torch.channels_last)
    augment = compose(cfg.augment)

    def loss(step, g):
        index = torch.randint(len(images), (cfg.batch,), device=device, generator=g)
        x, _ = augment(data.to_float(images[index]), torch.zeros(cfg.batch, 1, device=device), g)
        with data.autocast(device):
            return model(x, g)

    return train(model, loss, cfg, path, "mae", dict(images=scenes.digest), every, "MAE").vit


# ---- tuning: a classifier that begins from weights trained before

def load_weights(path):
    """Read weights to begin from. -> a CLIP and its tokenizer, or a recogniser and None; image size."""
    try:
        saved = data.load_checkpoint(path, "clip", "classifier", "mae")
    except Problem:
        if not Path(path).is_file():
            raise
        try:
            model = vit.load_pretrained(path).to(data.pick_device())
            tokens = vit.tokenizer(path, model) if isinstance(model, CLIP) else None
            return model, tokens, getattr(model, "image", model).size
        except ValueError as error:
            raise Problem(f"--init {error}") from None
    model, cfg = build(path, saved)
    tokens = partial(word_tokens, words=saved["words"]) if saved["kind"] == "clip" else None
    return model.vit if saved["kind"] == "mae" else model, tokens, cfg.size


class Tuned(nn.Module):
    """Weights trained before, under a new head: images (B, 3, H, W) in [-1, 1] to class logits (B, K).

    Those of a CLIP, with its tokenizer, make features of length 1, and the head begins as the names of
    classes say (zero-shot classification; He et al. 2023: "CT w. init"). With others it begins small.
    """

    def __init__(self, model, tokens, size, classes):
        super().__init__()
        self.size, self.reads = size, tokens is not None
        if self.reads:
            self.tower, self.head = model.image, zero(nn.Linear(model.project.out_features, len(classes)))
            names = vit.zero_shot(model, tokens, [data.in_words(name) for name in classes])           # (K, E)
            self.head.weight.data = model.log_scale.exp().item() * names
        else:
            width = getattr(model.head, "in_features", None) or len(model.norm.bias)     # some have no head
            self.tower, self.head = model, head(width, len(classes))
            model.head = nn.Identity()

    def features(self, x):
        """Return what the tower makes of images, (B, D), which are brought to the size that it knows."""
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        z = self.tower(x)
        return F.normalize(z, dim=1) if self.reads else z

    def forward(self, x):
        return self.head(self.features(x))


def embed(model, scenes):
    """Return scenes with their features (N, D) in place of images, to be tuned on; of None, None."""
    return scenes and replace(scenes, images=outputs(model.features, scenes.images))


def tune(linear, real, synthetic, cfg, soft=None, title="head"):
    """Fit a head on features, Scenes of embed. No augmentation: 8 views of every image gained nothing."""
    return fit(real, synthetic, replace(cfg, augment="none"), soft=soft, title=title, model=linear)


def begin_and_tune(real, synthetic, cfg, path):
    """Make a recogniser, fresh or from cfg.init, and train what cfg.tune says. It is kept at path."""
    if cfg.tune == "all":
        return fit(real, synthetic, cfg, path)[0]
    model = network(cfg, real.classes, 3).to(data.pick_device()).eval()
    about = dict(classes=real.classes, channels=3, images=[some.digest for some in (real, synthetic) if some])
    with kept_whole(path, model, cfg, about, cfg.steps):
        if cfg.tune == "head":
            tune(model.head, embed(model, real), embed(model, synthetic), cfg)
        elif not model.reads:
            raise Problem(f"--tune none goes by names, and {cfg.init} has read no texts: give a CLIP")
    return model


# ---- scores: from labels and predictions, both (N,), or from counts (..., 3, K) of them

def put_back(logits, labels, counts):
    """Find what to add to the logits of a classifier that drew all classes equally often, (K,).

    To true log-likelihoods Bayes' rule would add the logarithm of the frequency of classes, counts (K,) of
    the training images over their sum (Menon et al. 2021, 2007.07314). To those of a network that knows its
    few images by heart it is tau times that, tau of 0, 1/4 ... 1 by macro-F1 on held-out logits (N, K).
    """
    log_freq = (counts.clamp(min=1) / counts.sum()).log()
    shifts = [k / 4 * log_freq for k in range(5)]
    return max(shifts, key=lambda shift: macro_f1(totals(labels, (logits + shift).argmax(1), len(counts))))


def topk(logits, labels, k=5):
    """Return the share of images whose class is among the k largest logits; logits (N, K), labels (N,)."""
    best = logits.topk(min(k, logits.shape[1])).indices                  # (N, k)
    return (best == labels[:, None]).any(1).double().mean().item()


def confusion(labels, predicted, K):
    """Count the images of class i that were predicted to be j: (K, K) int64, a row per actual class."""
    return torch.bincount(labels * K + predicted, minlength=K * K).view(K, K)


def tally(labels, predicted, groups, K):
    """Count, for each group and class, the hits, the actual and the predicted images: (G, 3, K) float64.

    Every score follows from them. labels, predicted (N,) in 0..K-1; groups (N,) any integers, in whose order
    the counts come: images of a group (the buildings of a tile) stay together when test sets are resampled.
    """
    labels, predicted, groups = (np.asarray(v) for v in (labels, predicted, groups))
    group = np.unique(groups, return_inverse=True)[1]
    counts = np.zeros((group.max() + 1, 3, K))
    right = labels == predicted
    np.add.at(counts, (group[right], 0, labels[right]), 1)
    np.add.at(counts, (group, 1, labels), 1)
    np.add.at(counts, (group, 2, predicted), 1)
    return counts


def totals(labels, predicted, K):
    """Count the hits, the actual and the predicted images of each class: (3, K) float64."""
    return tally(labels, predicted, np.zeros(len(labels), dtype=int), K)[0]


def accuracy(counts):
    """Share of images classified correctly, (..., 3, K) -> (...)."""
    return counts[..., 0, :].sum(-1) / counts[..., 1, :].sum(-1)


def precision(counts):
    """Precision of each class, (..., 3, K) -> (..., K); 0 for a class that is never predicted."""
    return counts[..., 0, :] / np.maximum(counts[..., 2, :], 1)


def recall(counts):
    """Recall of each class, (..., 3, K) -> (..., K); 0 for a class without images."""
    return counts[..., 0, :] / np.maximum(counts[..., 1, :], 1)


def f1(counts):
    """F1 of each class, 2 P R / (P + R), (..., 3, K) -> (..., K); 0 without images and predictions."""
    hits, actual, predicted = np.moveaxis(counts, -2, 0)
    return 2 * hits / np.maximum(actual + predicted, 1)


def weakest(counts):
    """Find the class of the lowest recall among those with a test image, from counts (3, K)."""
    there = counts[1].nonzero()[0]
    return there[recall(counts)[there].argmin()]


def occurring(counts):
    """Keep the classes of counts (..., 3, K) that have an image in any of them.

    A class without a single test image says nothing: it is left out of means. This is decided once for all
    seeds and resampled test sets that are handed in, so that all means are over equal classes. A class that
    is in some of these sets has an F1 of 0 in the others, in both arms: a difference of 0, and not noise.
    """
    there = counts[..., 1, :].reshape(-1, counts.shape[-1]).any(0)
    return counts[..., there]


def macro(score, counts):
    """Mean of f1, precision or recall over the classes that occur, (..., 3, K) -> (...)."""
    return score(occurring(counts)).mean(-1)


macro_f1 = partial(macro, f1)
macro_precision = partial(macro, precision)
macro_recall = partial(macro, recall)                                    # or balanced accuracy


def harmonic_f1(counts):
    """Harmonic mean of the F1 of the classes that occur, (..., 3, K) -> (...): the damage score of xView2."""
    each = f1(occurring(counts))
    with np.errstate(divide="ignore"):
        return each.shape[-1] / (1 / each).sum(-1)                       # 1 / 0 = inf, and K / inf = 0


# ---- the script

def predict_folder(cfg):
    """Classify the pictures in the folder --predict and those below it. Writes predictions.csv."""
    folder, path = Path(cfg.predict), Path(cfg.out) / "classifier.pt"
    model, classes, size = load_classifier(path)
    files = data.pictures_in(folder)
    images, files = data.decode_all(files, size, f"reading {folder}", cfg.skip_broken)
    probability, predicted = outputs(model, images).softmax(1).max(1)
    names = [file.relative_to(folder).as_posix() if folder.is_dir() else file.name for file in files]
    rows = [[name, classes[k], f"{p:.4f}"]
            for name, k, p in zip(names, predicted.tolist(), probability.tolist(), strict=True)]
    table = Path(cfg.out) / "predictions.csv"
    if data.rank() == 0:
        data.save_csv(table, ["picture", "predicted", "probability"], rows)
    print(f"{len(rows)} pictures of {folder}, classified by {path}: {table}")


def read_synthetic(cfg, classes):
    """Read the tree --synthetic, if any: Scenes, with classes numbered as in `classes`, or None."""
    if not cfg.synthetic:
        return None
    if os.path.realpath(cfg.synthetic) == os.path.realpath(cfg.data):
        raise Problem(f"--synthetic {cfg.synthetic} is --data itself, test images and all: give another tree")
    synthetic = data.read(cfg.synthetic, cfg.size, cfg.skip_broken, least=1)
    if unknown := sorted(set(synthetic.classes) - set(classes)):
        raise Problem(f"{cfg.synthetic} has classes that {cfg.data} has not: {', '.join(unknown)}")
    if without := len(classes) - len(synthetic.classes):
        print(f"{without} of {len(classes)} classes have no synthetic images")
    labels = torch.tensor([classes.index(name) for name in synthetic.classes])[synthetic.labels]
    return replace(synthetic, labels=labels, classes=classes)


def score(model, scenes, parts, test):
    """Print how well a recogniser does on val, and if test, on test."""
    for part in ("val", "test") if test else ("val",):
        held = scenes[parts[part]]
        counts = totals(held.labels, predict(model, held.images), len(scenes.classes))
        worst = weakest(counts)
        absent = [name for c, name in enumerate(scenes.classes) if c not in held.labels]
        print(f"{part}: accuracy {accuracy(counts):.3f}, macro-F1 {macro_f1(counts):.3f} on {len(held)} "
              f"images; weakest class {scenes.classes[worst]} ({recall(counts)[worst]:.2f})"
              + f"; no image of {data.some_of(absent)}" * bool(absent))


def teach_clip(scenes, parts, index, cfg):
    """Train a CLIP on images of a caption set, and score it on val: its retrieval, and it as a classifier."""
    seen = scenes[index]
    print(f"{len(seen)} images, {sum(map(len, seen.captions))} sentences, on {data.pick_device()}")
    model, tokens = fit_clip(seen, cfg, Path(cfg.out) / "clip.pt")
    for part in ("val", "test") if cfg.test else ("val",):
        held = scenes[parts[part]]
        texts, owner = sentences_of(held)
        scores = outputs(model.encode_image, held.images) @ encode_texts(model, tokens, texts).T
        asked = (f"a sentence, of {len(texts)}, for an image", f"the image, of {len(held)}, for a sentence")
        lists = recalls(scores, owner), recalls_by_chance(owner, len(held))
        for what, *both in zip(asked, *lists, strict=True):
            found, luck = (", ".join(f"{100 * r:.1f}" for r in some) for some in both)
            print(f"{part}: {what} is among the best 1, 5, 10 in {found} %, by chance {luck}")
    if len(scenes.classes) > 1:
        print("zero-shot, by the names of the classes:")
        score(Tuned(model, tokens, cfg.size, scenes.classes).to(data.pick_device()), scenes, parts, cfg.test)


def main(cfg):
    """Train on the training split of a tree, score on val, and only if asked to on test. Or predict."""
    if cfg.predict:
        return predict_folder(cfg)
    if (cfg.captions or cfg.mae) and data.dist.is_initialized():         # they look at whole batches
        raise Problem("--captions and --mae run in one process: start them with python, not with torchrun")
    path = Path(cfg.out) / "classifier.pt"
    if cfg.init:
        if os.path.realpath(path) == os.path.realpath(cfg.init):
            raise Problem(f"--init {cfg.init} would be written over: give another --out")
        cfg = replace(cfg, size=load_weights(cfg.init)[2])
    scenes = data.read(cfg.data, cfg.size, cfg.skip_broken)
    parts = data.split(scenes)
    index = data.choose(scenes, parts["train"], cfg.per_class, cfg.seed) if cfg.per_class else parts["train"]
    if cfg.captions:
        return teach_clip(scenes, parts, index, cfg)
    if cfg.mae:
        print(f"{len(index)} images without their classes, on {data.pick_device()}")
        return fit_mae(scenes[index], cfg, Path(cfg.out) / "mae.pt")
    if len(scenes.classes) < 2:
        raise Problem(f"{cfg.data} tells no classes: train on its sentences with --captions")
    synthetic = read_synthetic(cfg, scenes.classes)
    real = scenes[index]
    print(f"{len(real)} real, {len(synthetic or [])} synthetic images of {len(scenes.classes)} classes")
    if cfg.model != "linear" and cfg.tune == "all":           # the others take a second
        data.forecast(lambda cfg: fit(real, synthetic, cfg), cfg, SMALL)
    score(begin_and_tune(real, synthetic, cfg, path), scenes, parts, cfg.test)


if __name__ == "__main__":
    data.launch(main, Script, several=True)
