"""Train a classifier on real scenes, synthetic ones or a mixture, and score it.

    python train_cls.py --data data/NWPU-RESISC45 --augment hflip,rot90,crop,color
    python train_cls.py --data data/NWPU-RESISC45 --synthetic runs/made --share 0.5 --out runs/mixed
    torchrun --nproc-per-node 4 train_cls.py ...               # same numbers, on 4 GPUs
    python train_cls.py --predict photos --out runs/mixed      # with runs/mixed/classifier.pt: a csv
    python train_cls.py --data data/UCM_captions --learn clip --out runs/clip    # from images and sentences
    python train_cls.py --data data/NWPU-RESISC45 --init runs/clip/clip.pt --tune head

On a CPU add: --size 32 --patch 4 --dim 64 --depth 1 --heads 2 --steps 1500 --batch 64 --lr 4e-3 --warmup 50
Everything is counted in optimizer steps, never in epochs: more images must not mean more training.
"""
import math
from dataclasses import dataclass, replace
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
from data import UserError, flag
from vit import CLIP, LENGTH, MAE, Convolutions, Patches, TextEncoder, ViT, head, mean_token, word_tokens, zero

MODELS = "vit", "patches", "resnet", "linear"          # patches: a ViT without convolutions
TUNES = "all", "head", "none"
LEARNS = "classes", "clip", "mae"                      # of the classes, of sentences, of images alone
ENCODER_LR_SCALE = 0.1                                             # of a encoder that is tuned: a part of its head's rate


@dataclass
class Config(data.Settings):
    """Everything that makes a classifier but the images."""
    model: str = flag("vit", "classifier", choices=MODELS)
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
    tune: str = flag("all", "what to train of --init; a head learns without augmentation", choices=TUNES)

    def __post_init__(self):
        super().__post_init__()
        compose(self.augment)
        if not self.init:
            with torch.device("meta"):
                make_classifier(self, 2, 3)                                   # it says which sizes do not fit


@dataclass
class Script(Config):
    """Config, and the settings that only the command line needs."""
    data: str = flag("data/NWPU-RESISC45", "tree with a folder per class, caption set or xBD tree")
    synthetic: str = flag("", "tree of synthetic images, same class names, as train_gen.py --sample makes")
    skip_broken: bool = flag(False, "leave out pictures that do not decode")
    per_class: int = flag(0, "real training images per class, or tiles of an xBD tree (0: all)", 0)
    out: str = flag("runs/cls", "folder for classifier.pt, or where it is")
    predict: str = flag("", "classify the pictures of a folder instead of training: predictions.csv in --out")
    test: bool = flag(False, "score on the test split too: once, when nothing is left to choose")
    learn: str = flag("classes", "learn from; clip: sentences of a caption set; mae: images alone",
                      choices=LEARNS)

    def __post_init__(self):
        super().__post_init__()
        mixes, alone = {*data.listed(self.augment)}, self.learn != "classes"
        for wrong, why in (
                (alone and (self.init or self.share), f"--learn {self.learn}: leave out --init, --share"),
                (self.model == "linear" and alone or self.model == "resnet" and self.learn == "mae",
                 f"--learn {self.learn} is not for --model {self.model}"),
                ("copypaste" in mixes, "--augment copypaste needs masks, which only experiment.py gives"),
                ("cutmix" in mixes and self.learn == "clip", "--augment cutmix makes sentences untrue"),
                (bool(self.synthetic) != (self.share > 0), "--synthetic and --share belong together: "
                 "give the tree, and the probability of its images")):
            if wrong:
                raise ValueError(why)


# ---- the classifiers beside the ViT

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

    def solve(self, mixture, share, penalty=0.01):
        """Minimise the average loss over all batches of a mixture, plus penalty / 2 |W|^2, by L-BFGS."""
        f = torch.cat([colours_and_edges(data.to_float(images)) for images in mixture.images.split(512)])
        p = mixture.probabilities(share)                                      # of each image to be drawn
        self.mean = p @ f
        self.std = (p @ (f - self.mean) ** 2).sqrt().clamp(min=1e-3)     # some never vary
        f = (f - self.mean) / self.std
        optimizer = torch.optim.LBFGS(self.head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            each = F.cross_entropy(self.head(f), mixture.targets, reduction="none")
            loss = p @ each + penalty / 2 * self.head.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    def features(self, x):
        """Return the standardised histograms, (B, 160) or (B, 320)."""
        return (colours_and_edges(x) - self.mean) / self.std

    def forward(self, x):
        return self.head(self.features(x))


def make_classifier(cfg, K, channels):
    """Make the classifier that cfg names, for K classes."""
    if cfg.model == "linear":
        return Linear(K, channels)
    if cfg.model == "resnet":
        return ResNet(K, cfg.dim // 2, channels)
    stem = Patches if cfg.model == "patches" else Convolutions
    return ViT(K, cfg.size, cfg.patch, cfg.dim, cfg.depth, cfg.heads, channels, stem)


def initial_model(cfg, classes, channels):
    """Make a classifier of these classes: fresh, its weights fixed by the seed, or begun from cfg.init."""
    start = load_weights(cfg.init) if cfg.init else None                 # which has a seed of its own
    torch.manual_seed(cfg.seed)
    return Tuned(*start, classes) if start else make_classifier(cfg, len(classes), channels)


# ---- training

def adamw(model, decay):
    """AdamW with decay on matrices only; a encoder that was trained before goes slower than its new head."""
    kinds = {}
    for name, p in model.named_parameters():
        lr_scale, is_matrix = ENCODER_LR_SCALE if name.startswith("encoder.") else 1.0, p.ndim > 1
        kinds.setdefault((lr_scale, is_matrix), []).append(p)
    return torch.optim.AdamW([dict(params=params, weight_decay=decay * is_matrix, lr_scale=lr_scale)
                              for (lr_scale, is_matrix), params in kinds.items()], fused=True)


class Mixture:
    """Real and synthetic images on a device, to draw batches from.

    First a real image is drawn, each as often, or if balanced each class. Then with probability `share` a
    synthetic image of its class takes its place, if there is one: whatever the share, the same real images
    are drawn, and the others are what they would have been.
    """

    def __init__(self, real, synthetic, cfg, soft, device):
        K, made = len(real.classes), synthetic or real[:0]
        p = 1 / real.labels.bincount(minlength=K)[real.labels] if cfg.balance else torch.ones(len(real))
        order = made.labels.argsort(stable=True)                         # class by class
        count = made.labels.bincount(minlength=K)
        soft = F.one_hot(made.labels, K).float() if soft is None else soft
        self.images = torch.cat([real.images, made.images[order]]).to(device)            # (N, C, H, W) uint8
        self.labels = torch.cat([real.labels, made.labels[order]]).to(device)            # (N,)
        self.targets = torch.cat([F.one_hot(real.labels, K).float(), soft[order]]).to(device)    # (N, K)
        self.p = (p / p.sum()).to(device)                                # (R,), of each real image
        self.cdf = p.double().cumsum(0).div(p.sum()).float().to(device)
        self.count = count.to(device)                                    # (K,), of synthetic images; these
        self.first = (len(real) + count.cumsum(0) - count).to(device)    # of a class begin at first[c]

    def draw(self, n, share, generator):
        """Draw the indices of n images, (n,). The random numbers do not depend on the share."""
        u_real, u_replace, u_synthetic = torch.rand(3, n, device=self.cdf.device, generator=generator)
        index = torch.searchsorted(self.cdf, u_real).clamp(max=len(self.cdf) - 1)
        c = self.labels[index]
        replaced = (u_replace < share) & (self.count[c] > 0)
        return torch.where(replaced, self.first[c] + (u_synthetic * self.count[c]).long(), index)

    def probabilities(self, share):
        """Return the probability of each image to be the next one drawn, (N,)."""
        real, made = self.labels.split([len(self.p), len(self.labels) - len(self.p)])
        share = share * (self.count > 0).float()                                        # (K,)
        of_class = torch.zeros_like(share).index_add(0, real, self.p)
        return torch.cat([self.p * (1 - share)[real], (of_class * share / self.count)[made]])


def fit(real, synthetic, cfg, path=None, soft=None, title="classifier", model=None):
    """Train model, or else a fresh classifier, on real and synthetic (Scenes, or None). -> it, in eval mode

    soft (N, K): what to teach of synthetic images, not their class; path: a checkpoint.
    """
    device = data.pick_device()
    mixture, channels = Mixture(real, synthetic, cfg, soft, device), real.images.shape[1]
    model = initial_model(cfg, real.classes, channels) if model is None else model
    model.to(device, memory_format=torch.channels_last)                                  # a tenth faster
    identity = identity_of(cfg, real, synthetic, soft)
    if isinstance(model, Linear):                             # solved, without steps, seed and augmentation
        model.solve(mixture, cfg.share)
        return keep(path, model, identity)
    augment, batch = compose(cfg.augment), data.own_share(cfg.batch)                     # of this process

    def loss(step, g):
        share = cfg.share
        if cfg.pretrain:                                              # synthetic images first, then real ones
            share = float(step < cfg.share * cfg.steps)
        index = mixture.draw(batch, share, g)
        x, y = augment(as_float(mixture.images[index]), mixture.targets[index], g)
        with data.autocast(device):
            return F.cross_entropy(model(x), y, label_smoothing=cfg.smoothing)

    return train(model, loss, cfg, path, "classifier", identity, title)


def train(model, loss, cfg, path, kind, identity, title, every=1000):
    """Take cfg.steps steps of AdamW on loss(step, generator). -> the model in eval mode

    Its randomness follows from (seed, step): a run that was killed goes on from its checkpoint at path, and ends with equal weights.
    """
    device, optimizer = data.pick_device(), adamw(model, cfg.decay)
    parts = dict(model=model, optimizer=optimizer)
    done = data.resume(path, kind, identity, parts, dict(step=0))["step"]
    for step in data.progress(range(done, cfg.steps), title, cfg.steps, initial=done):
        value = loss(step, data.step_rng(cfg.seed, step, device))
        value.backward()
        data.average_gradients(model)                                        # over all processes
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)                # no odd batch throws the weights far
        for group in optimizer.param_groups:
            group["lr"] = data.lr_at(step, cfg) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0 or step + 1 == cfg.steps:
            data.check_finite(model, value.item(), step + 1)
            if path and data.rank() == 0:
                data.save_checkpoint(path, kind, identity, step + 1, parts)
    return model.eval()


def keep(path, model, identity):
    """Save a classifier that is made in one go at path, if that holds no other run. -> it, in eval mode"""
    data.resume(path, "classifier", identity, {}, dict(step=0))
    if path and data.rank() == 0:
        data.save_checkpoint(path, "classifier", identity, 0, dict(model=model))
    return model.eval()


def identity_of(cfg, real, synthetic=None, soft=None):
    """Say what decides a classifier: its settings and images."""
    images = [some.digest for some in (real, synthetic) if some]
    return dict(config=data.settings_of(cfg, Config), classes=real.classes, channels=real.images.shape[1],
                images=images, soft=soft is not None and soft.tolist())


def as_float(x):
    """Turn images into floats; features, which stand in their place when a head is tuned, are floats."""
    return x if x.is_floating_point() else data.to_float(x)


@torch.no_grad()
def outputs(function, images, batch=512):
    """Apply a model, or its features, to images (N, C, H, W) uint8: (N, D) float32 on the CPU."""
    device, parts = data.pick_device(), images.split(batch)
    with data.autocast(device):
        return torch.cat([function(as_float(part.to(device))).float().cpu() for part in parts])


def load(path, *kinds):
    """Read a checkpoint of these kinds. -> the model in eval mode, its Config, all that was saved"""
    saved = data.load_checkpoint(path, *kinds)
    with data.one_line_error(path):
        cfg = Config(**saved["config"])
        make = dict(clip=lambda: clip(cfg, saved["words"]), mae=lambda: mae(cfg),
                    classifier=lambda: initial_model(cfg, saved["classes"], saved["channels"]))
        model = make[saved["kind"]]()
        model.load_state_dict(saved["model"])
    return model.to(data.pick_device()).eval(), cfg, saved


# ---- without classes: CLIP, from images and their sentences; MAE, from images alone

def clip(cfg, words):
    """Make a fresh CLIP: equal towers, the E = cfg.dim axes as 'classes'; words [V] for text."""
    return CLIP(initial_model(cfg, range(cfg.dim), 3), TextEncoder(len(words) + 3, LENGTH, cfg.dim, cfg.depth, cfg.heads))


def mae(cfg):
    """Make a fresh MAE."""
    return MAE(initial_model(cfg, [""], 3), cfg.dim, cfg.heads, cfg.patch)


def fit_clip(scenes, cfg, path=None):
    """Train a CLIP from scratch on Scenes with sentences. -> it, in eval mode, and its tokenizer"""
    if not all(scenes.captions):
        raise UserError("--learn clip needs sentences for every image: --data must be a caption set")
    device, augment = data.pick_device(), compose(cfg.augment)
    texts = [text for some in scenes.captions for text in some]
    count = torch.tensor([len(some) for some in scenes.captions], device=device)
    first, words = count.cumsum(0) - count, vit.vocabulary(texts)        # first: of each image's sentences
    ids, images = word_tokens(texts, words).to(device), scenes.images.to(device)
    model = clip(cfg, words).to(device, memory_format=torch.channels_last)

    def loss(step, g):                                       # no image twice, with one of its sentences each
        index = torch.randperm(len(images), device=device, generator=g)[:cfg.batch]
        u = torch.rand(len(index), device=device, generator=g)
        x, _ = augment(data.to_float(images[index]), torch.zeros(len(index), 1, device=device), g)
        with data.autocast(device):
            return vit.contrastive(model(x, ids[first[index] + (u * count[index]).long()]))

    identity = identity_of(cfg, scenes) | dict(words=words)
    return train(model, loss, cfg, path, "clip", identity, "CLIP"), partial(word_tokens, words=words)


def fit_mae(scenes, cfg, path=None):
    """Train a ViT as MAE does, on images (Scenes) whose labels it does not see. -> the ViT in eval mode"""
    device, augment = data.pick_device(), compose(cfg.augment)
    images, model = scenes.images.to(device), mae(cfg).to(device, memory_format=torch.channels_last)

    def loss(step, g):
        index = torch.randint(len(images), (cfg.batch,), device=device, generator=g)
        x, _ = augment(data.to_float(images[index]), torch.zeros(cfg.batch, 1, device=device), g)
        with data.autocast(device):
            return model(x, g)

    return train(model, loss, cfg, path, "mae", identity_of(cfg, scenes), "MAE").vit


# ---- tuning: a classifier that begins from weights trained before

def load_weights(path):
    """Read weights to begin from. -> a CLIP and its tokenizer, or a classifier and None; image size"""
    if not Path(path).is_file():
        try:
            model = vit.Published(path).to(data.pick_device()).eval()
        except Exception as error:                                       # theirs are of many kinds
            raise UserError(f"--init {path} is no file, nor published weights: {error}") from error
        return model, model.tokens, model.size
    model, cfg, saved = load(path, "clip", "classifier", "mae")
    tokens = partial(word_tokens, words=saved["words"]) if saved["kind"] == "clip" else None
    return model.vit if saved["kind"] == "mae" else model, tokens, cfg.size


class Tuned(nn.Module):
    """Weights trained before, under a new head: images (B, 3, H, W) in [-1, 1] to class logits (B, K).

    Those of a CLIP, with its tokenizer, make features of length 1, and the head begins as the names of
    classes say (zero-shot classification; He et al. 2023: "CT w. init"). With others it begins small.
    """

    def __init__(self, encoder, tokens, size, classes):
        super().__init__()
        self.encoder, self.size, self.reads = encoder, size, tokens is not None
        if self.reads:
            names = vit.zero_shot(encoder, tokens, [data.in_words(name) for name in classes])           # (K, E)
            self.head = zero(nn.Linear(names.shape[1], len(classes)))
            self.head.weight.data = encoder.log_scale.exp().item() * names
        else:
            self.head, encoder.head = head(encoder.head.in_features, len(classes)), nn.Identity()

    def features(self, x):
        """Return what the encoder makes of images, (B, D), which are brought to the size that it knows."""
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        return self.encoder.encode_image(x) if self.reads else self.encoder(x)

    def forward(self, x):
        return self.head(self.features(x))


def embed(model, scenes):
    """Return scenes with their features (N, D) in place of images, to be tuned on; of None, None."""
    return scenes and replace(scenes, images=outputs(model.features, scenes.images))


def tune(real, synthetic, cfg, path):
    """Make a classifier from cfg.init, of which cfg.tune says what is trained. It is kept at path."""
    model = initial_model(cfg, real.classes, 3).to(data.pick_device()).eval()
    if cfg.tune == "head":                                   # no augmentation: 8 views each gained nothing
        fit(embed(model, real), embed(model, synthetic), replace(cfg, augment="none"), model=model.head)
    elif not model.reads:
        raise UserError(f"--tune none goes by names, and {cfg.init} has read no texts: give a CLIP")
    return keep(path, model, identity_of(cfg, real, synthetic))


# ---- scores: from labels and predictions, both (N,), or from counts (..., 3, K) of them

def adjust_logits(logits, labels, counts):
    """Find what to add to the logits of a classifier that drew all classes equally often, (K,).

    To true log-likelihoods Bayes' rule would add the logarithm of the frequency of classes, counts (K,) of
    the training images over their sum (Menon et al. 2021, 2007.07314). To those of a initial_model that knows its
    few images by heart it is tau times that, tau of 0, 1/4 ... 1 by macro-F1 on held-out logits (N, K).
    """
    log_freq = (counts.clamp(min=1) / counts.sum()).log()
    shifts = [k / 4 * log_freq for k in range(5)]
    return max(shifts, key=lambda shift: macro_f1(class_counts(labels, (logits + shift).argmax(1), len(counts))))


def counts_per_group(labels, predicted, groups, K):
    """Count, for each group and class, the hits, the actual and the predicted images: (G, 3, K) float64.

    Every score follows from them. labels, predicted (N,) in 0..K-1; groups (N,) any integers, in whose order
    the counts come: images of a group (the buildings of a tile) stay together when test sets are resampled.
    """
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    group, right = np.unique(groups, return_inverse=True)[1], labels == predicted
    counts = np.zeros((group.max() + 1, 3, K))
    np.add.at(counts, (group[right], 0, labels[right]), 1)
    np.add.at(counts, (group, 1, labels), 1)
    np.add.at(counts, (group, 2, predicted), 1)
    return counts


def class_counts(labels, predicted, K):
    """Count the hits, the actual and the predicted images of each class: (3, K) float64."""
    return counts_per_group(labels, predicted, np.zeros(len(labels)), K)[0]


def accuracy(counts):
    """Share of images classified correctly, (..., 3, K) -> (...)."""
    return counts[..., 0, :].sum(-1) / counts[..., 1, :].sum(-1)


def f1(counts):
    """F1 of each class, 2 P R / (P + R), (..., 3, K) -> (..., K); 0 without images and predictions."""
    hits, actual, predicted = np.moveaxis(counts, -2, 0)
    return 2 * hits / np.maximum(actual + predicted, 1)


def occurring(counts):
    """Keep the classes of counts (..., 3, K) that have an image in any of them.

    One without says nothing: it is left out of means. This is decided once for all seeds and resampled test
    sets that are handed in, so that all means are over equal classes.
    """
    there = counts[..., 1, :].reshape(-1, counts.shape[-1]).any(0)
    return counts[..., there]


def macro_f1(counts):
    """Mean F1 of the classes that occur, (..., 3, K) -> (...)."""
    return f1(occurring(counts)).mean(-1)


def harmonic_f1(counts):
    """Harmonic mean of the F1 of the classes that occur, (..., 3, K) -> (...): the damage score of xView2."""
    each = f1(occurring(counts))
    with np.errstate(divide="ignore"):
        return each.shape[-1] / (1 / each).sum(-1)                       # 1 / 0 = inf, and K / inf = 0


# ---- the script

def predict_folder(cfg):
    """Classify the pictures in the folder --predict and those below it. Writes predictions.csv."""
    path, table = Path(cfg.out) / "classifier.pt", Path(cfg.out) / "predictions.csv"
    model, how, saved = load(path, "classifier")
    scenes = data.read_pictures(cfg.predict, how.size, cfg.skip_broken)
    probability, predicted = outputs(model, scenes.images).softmax(1).max(1)
    rows = [[name, saved["classes"][k], f"{p:.4f}"]
            for name, k, p in zip(scenes.names, predicted.tolist(), probability.tolist(), strict=True)]
    data.save_csv(table, ["picture", "predicted", "probability"], rows)
    print(f"{len(rows)} pictures of {cfg.predict}, classified by {path}: {table}")


def read_synthetic(cfg, classes):
    """Read the tree --synthetic, if any: Scenes, with classes numbered as in `classes`, or None."""
    if not cfg.synthetic:
        return None
    if Path(cfg.synthetic).resolve() == Path(cfg.data).resolve():
        raise UserError(f"--synthetic {cfg.synthetic} is --data itself, test images and all: give another tree")
    synthetic = data.read(cfg.synthetic, cfg.size, cfg.skip_broken)
    if unknown := sorted(set(synthetic.classes) - set(classes)):
        raise UserError(f"{cfg.synthetic} has classes that {cfg.data} has not: {', '.join(unknown)}")
    labels = torch.tensor([classes.index(name) for name in synthetic.classes])[synthetic.labels]
    return replace(synthetic, labels=labels, classes=classes)


def score(model, scenes, parts, test):
    """Print how well a classifier does on val, and if test, on test."""
    for part in ("val", "test") if test else ("val",):
        held = scenes[parts[part]]
        counts = class_counts(held.labels, outputs(model, held.images).argmax(1), len(scenes.classes))
        each = ", ".join(f"{name} {v:.2f}" for name, v in zip(scenes.classes, f1(counts), strict=True))
        print(f"{part}: accuracy {accuracy(counts):.3f}, macro-F1 {macro_f1(counts):.3f} on {len(held)} "
              f"images; F1 {each}")


def main(cfg):
    """Train on the training split of a tree, score on val, and only if asked to on test. Or predict."""
    if cfg.predict:
        return predict_folder(cfg)
    if cfg.learn != "classes" and data.dist.is_initialized():            # they look at whole batches
        raise UserError(f"--learn {cfg.learn} runs in one process: start it with python, not with torchrun")
    if cfg.init:
        cfg = replace(cfg, size=load_weights(cfg.init)[2])
    scenes, out = data.read(cfg.data, cfg.size, cfg.skip_broken), Path(cfg.out)
    parts = data.split(scenes)
    index = data.choose(scenes, parts["train"], cfg.per_class, cfg.seed) if cfg.per_class else parts["train"]
    real = scenes[index]
    if cfg.learn == "mae":
        return fit_mae(real, cfg, out / "mae.pt")
    if cfg.learn == "clip":
        model, tokens = fit_clip(real, cfg, out / "clip.pt")
        print("zero-shot, by the names of the classes:")
        model = Tuned(model, tokens, cfg.size, scenes.classes).to(data.pick_device())
        return score(model, scenes, parts, cfg.test)
    synthetic = read_synthetic(cfg, scenes.classes)
    print(f"{len(real)} real, {len(synthetic or [])} synthetic images of {len(scenes.classes)} classes")
    make = fit if cfg.tune == "all" else tune
    score(make(real, synthetic, cfg, out / "classifier.pt"), scenes, parts, cfg.test)


if __name__ == "__main__":
    data.launch(main, Script)
