"""Train a classifier on real images, synthetic ones or a mixture of both, and score it.

    python train_cls.py --data data/NWPU-RESISC45 --augment hflip,rot90,crop,color
    python train_cls.py --data data/NWPU-RESISC45 --synthetic runs/synthetic --share 0.5
    python train_cls.py --predict photos --out runs/cls         # writes predictions.csv
    python train_cls.py --data data/RSICD --learn clip --out runs/clip
    python train_cls.py --data data/NWPU-RESISC45 --init runs/clip/clip.pt --tune head

On a CPU add: --size 32 --patch 4 --dim 64 --depth 1 --heads 2 --steps 1500 --batch 64 --lr 4e-3
Training is counted in steps, not in epochs: with epochs, more images would mean more training.
"""
import math
import sys
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
from vit import LENGTH, Convolutions, Patches, TextEncoder, ViT, head, mean_token, word_tokens, zero

MODELS = "vit", "patches", "cnn", "linear"     # patches: a ViT whose stem has no convolutions
ENCODER_LR_SCALE = 0.1                            # on the learning rate of a pretrained encoder


@dataclass
class Config(data.Settings):
    """All that decides a classifier, except the images."""
    model: str = flag("vit", "classifier", choices=MODELS)
    size: int = flag(64, "side of the images in pixels", 1, 1024)
    patch: int = flag(8, "side of a patch in pixels: each patch is a token", 1, 1024)
    dim: int = flag(192, "width of a token", 16, 8192)
    depth: int = flag(6, "transformer blocks", 0, 100)
    heads: int = flag(3, "attention heads", 1, 512)
    steps: int = flag(5000, "optimizer steps", 1)
    batch: int = flag(128, "images per step, real and synthetic together", 1, 65_536)
    lr: float = flag(1e-3, "peak learning rate", 1e-9)
    warmup: int = flag(200, "steps until the learning rate reaches its peak", 0)
    decay: float = flag(0.1, "weight decay, on matrices only", 0, 100)
    smoothing: float = flag(0.1, "label smoothing", 0, 0.99)
    share: float = flag(0.0, "probability that a synthetic image replaces a real one", 0, 1)
    pretrain: bool = flag(False, "synthetic images in the first --share of the steps, then real")
    balance: bool = flag(False, "draw all classes equally often, also rare ones")
    augment: str = flag(OVERHEAD, "names of augmentations, in this order; or none")
    seed: int = flag(0, "fixes initial weights, batches and --per-class", 0, 2**32 - 1)
    init: str = flag("", "start from these weights, instead of a new --model of --size, --dim ...")
    tune: str = flag("all", "part of --init to train", choices=("all", "head", "none"))

    def __post_init__(self):
        super().__post_init__()
        compose(self.augment)                     # ValueError for an unknown name
        if not self.init:
            with torch.device("meta"):            # ValueError for sizes that do not fit together
                make_classifier(self, 2, 3)


# ---- where synthetic images replace real ones

class Mixture:
    """Real and synthetic training images, from which batches are drawn.

    Each place of a batch first draws a real image. With probability `share`, a random synthetic
    image of the same class replaces it; where its class has none, the real image stays.

    Equal budget: synthetic images replace real ones and are never added. Whatever the share, a run
    takes as many steps, with as many images per step, and each class occurs as often.
    Paired arms: a place uses three random numbers, whatever the share. So runs with equal seeds
    draw the same real images, and differ only where one was replaced.

    real, synthetic: Scenes with the same classes; synthetic may be None.
    """

    def __init__(self, real, synthetic, cfg, device):
        K, empty = len(real.classes), real[:0]
        synthetic = synthetic or empty

        # Real images are all equally likely; with cfg.balance, all classes are.
        per_class = real.labels.bincount(minlength=K)
        weight = 1 / per_class[real.labels] if cfg.balance else torch.ones(len(real))
        self.p_real = (weight / weight.sum()).to(device)                            # (R,)
        self.cdf = (weight.double().cumsum(0) / weight.sum()).float().to(device)    # (R,)

        # Synthetic images follow, sorted by class: class c has count[c] of them, from first[c] on.
        order = synthetic.labels.argsort(stable=True)
        self.count = synthetic.labels.bincount(minlength=K).to(device)              # (K,)
        self.first = len(real) + self.count.cumsum(0) - self.count                  # (K,)
        self.images = torch.cat([real.images, synthetic.images[order]]).to(device)  # (N, C, H, W)
        self.labels = torch.cat([real.labels, synthetic.labels[order]]).to(device)  # (N,)
        self.targets = F.one_hot(self.labels, K).float()                            # (N, K)

    def draw(self, n, share, rng):
        """Return the indices of n images to train on, (n,) int64."""
        u_real, u_replace, u_synthetic = torch.rand(3, n, device=self.cdf.device, generator=rng)

        real = torch.searchsorted(self.cdf, u_real).clamp(max=len(self.cdf) - 1)
        c = self.labels[real]
        synthetic = self.first[c] + (u_synthetic * self.count[c]).long()

        replaced = (u_replace < share) & (self.count[c] > 0)
        return torch.where(replaced, synthetic, real)

    def probabilities(self, share):
        """Return the probability that `draw` picks each image, (N,), for the linear baseline."""
        c_real, c_synthetic = self.labels.tensor_split([len(self.p_real)])
        share = share * (self.count > 0).float()      # (K,): 0 for classes without synthetic images
        p_class = torch.zeros_like(share).index_add(0, c_real, self.p_real)
        p_synthetic = p_class * share / self.count    # nan where there is none: never looked up
        return torch.cat([self.p_real * (1 - share)[c_real], p_synthetic[c_synthetic]])


# ---- training

def fit(real, synthetic, cfg, path=None, title="classifier", model=None):
    """Train a classifier on real and synthetic images, and return it in eval mode.

    real, synthetic: see Mixture; features (N, D) may stand in the place of images. path: the
    checkpoint file, or None to keep none. model: what to train, by default a new one as cfg says.
    """
    device = data.pick_device()
    mixture = Mixture(real, synthetic, cfg, device)
    if model is None:
        model = initial_model(cfg, real.classes, real.images.shape[1])
    model.to(device, memory_format=torch.channels_last)            # a tenth faster
    identity = identity_of(cfg, real, synthetic) if path else {}   # needed to save it
    if isinstance(model, LinearBaseline):                          # is solved, not trained in steps
        model.solve(mixture, cfg.share)
        return save_finished(path, model, identity)

    augment = compose(cfg.augment)

    def loss(step, rng):
        share = cfg.share
        if cfg.pretrain:                                           # first all synthetic, then real
            share = float(step < cfg.share * cfg.steps)
        index = mixture.draw(data.own_share(cfg.batch), share, rng)
        x, y = data.to_float(mixture.images[index]), mixture.targets[index]
        x, y = augment(x, y, rng)                                  # (B, C, H, W), (B, K)
        with data.autocast(device):
            return F.cross_entropy(model(x), y, label_smoothing=cfg.smoothing)

    return train(model, loss, cfg, path, "classifier", identity, title)


def train(model, loss, cfg, path, kind, identity, title, every=1000):
    """Train a model for cfg.steps steps, and return it in eval mode.

    loss(step, rng) draws a batch and returns its mean loss. rng depends on seed, step and rank. So
    a run that was killed continues from its checkpoint (every `every` steps) to the same weights.
    kind, identity: they name the run. UserError if the file at `path` is of another run.
    """
    device = data.pick_device()
    optimizer = adamw(model, cfg.decay)
    state = dict(model=model, optimizer=optimizer)
    done = data.resume(path, kind, identity, state, dict(step=0))["step"]

    for step in data.progress(range(done, cfg.steps), title, cfg.steps, initial=done):
        rng = data.step_rng(cfg.seed, step, device)
        value = loss(step, rng)
        value.backward()
        data.average_gradients(model)                              # over the processes of torchrun
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)          # limits the step of an odd batch

        for group in optimizer.param_groups:
            group["lr"] = data.lr_at(step, cfg) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()

        if (step + 1) % every == 0 or step + 1 == cfg.steps:
            data.check_finite(model, value.item(), step + 1)
            if path and data.rank() == 0:
                data.save_checkpoint(path, kind, identity, step + 1, state)
    return model.eval()


def adamw(model, decay):
    """Return AdamW with weight decay on matrices only; a Tuned encoder is slower than its head."""
    groups = {}
    for name, p in model.named_parameters():
        lr_scale = ENCODER_LR_SCALE if name.startswith("encoder.") else 1.0
        is_matrix = p.ndim > 1
        empty = dict(params=[], lr_scale=lr_scale, weight_decay=decay * is_matrix)
        group = groups.setdefault((lr_scale, is_matrix), empty)
        group["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), fused=True)


def save_finished(path, model, identity):
    """Save a classifier at path, if any, and return it in eval mode. UserError as in `train`."""
    data.resume(path, "classifier", identity, {}, dict(step=0))
    if path and data.rank() == 0:
        data.save_checkpoint(path, "classifier", identity, 0, dict(model=model))
    return model.eval()


def identity_of(cfg, real, synthetic=None):
    """Return all that decides the weights of a run, and the fingerprints of what it has seen."""
    sets = [scenes for scenes in (real, synthetic) if scenes]
    seen = [scenes.seen() for scenes in sets]
    weights = ""
    if Path(cfg.init).is_file():
        seen.append(data.load(cfg.init)["seen"])
        weights = data.hash_of(Path(cfg.init).read_bytes())
    return dict(config=data.settings_of(cfg, Config), classes=real.classes, tiles=real.tiles,
                channels=real.images.shape[1], images=[scenes.digest for scenes in sets],
                weights=weights, seen=torch.cat(seen))


@torch.no_grad()
def outputs(function, images, batch=512):
    """Return function(x) of all images (N, C, H, W) uint8, such as a model: (N, D) on the CPU."""
    device = data.pick_device()
    with data.autocast(device):
        parts = [function(data.to_float(x.to(device))).float().cpu() for x in images.split(batch)]
    return torch.cat(parts)


# ---- scores, from the counts (..., 3, K) of hits, actual and predicted images of each class

def counts_per_group(labels, predicted, groups, K):
    """Return the hits, actual and predicted images of each group and class, (G, 3, K) float64.

    In terms of the confusion matrix: TP, TP + FN, TP + FP. labels, predicted (N,) in 0 .. K - 1.
    groups (N,): any integers, in whose order the result is; e.g. the tile of each building.
    """
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    _, group = np.unique(groups, return_inverse=True)              # numbered 0 .. G - 1
    hit = labels == predicted
    counts = np.zeros((group.max() + 1, 3, K))
    np.add.at(counts, (group[hit], 0, labels[hit]), 1)
    np.add.at(counts, (group, 1, labels), 1)
    np.add.at(counts, (group, 2, predicted), 1)
    return counts


def class_counts(labels, predicted, K):
    """Return the hits, actual and predicted images of each class, (3, K) float64."""
    return counts_per_group(labels, predicted, np.zeros(len(labels)), K)[0]


def accuracy(counts):
    """Return the fraction of images that are classified correctly, (..., 3, K) -> (...)."""
    return counts[..., 0, :].sum(-1) / counts[..., 1, :].sum(-1)


def f1(counts):
    """Return F1 = 2 TP / (2 TP + FP + FN) of each class, (..., 3, K) -> (..., K), 0 for 0 / 0."""
    hits, actual, predicted = np.moveaxis(counts, -2, 0)
    return 2 * hits / np.maximum(actual + predicted, 1)


def macro_f1(counts):
    """Return the mean F1 of the classes that have images, (..., 3, K) -> (...)."""
    has_images = counts[..., 1, :].reshape(-1, counts.shape[-1]).any(0)
    return f1(counts)[..., has_images].mean(-1)


def adjust_logits(logits, labels, counts):
    """Return what to add to the logits of a classifier trained with --balance, (K,).

    It takes all classes for equally frequent. To exact logits, Bayes' rule adds log p(class) (Menon
    et al. 2021, 2007.07314). A network that knows its few images by heart needs a part of it, tau
    log p(class): the tau of 0, 1/4 ... 1 with the best macro-F1 on held-out logits (N, K) and
    labels (N,). counts (K,): the training images of each class.
    """
    log_p = (counts.clamp(min=1) / counts.sum()).log()
    shifts = [tau * log_p for tau in (0, 0.25, 0.5, 0.75, 1)]
    answers = [(logits + shift).argmax(1) for shift in shifts]
    scores = [macro_f1(class_counts(labels, answer, len(counts))) for answer in answers]
    return shifts[np.argmax(scores)]


# ---- the linear baseline: what colours and edges alone can tell

def colours_and_edges(x):
    """Return features of images (B, C, H, W) in [-1, 1] that are not learned, (B, 160).

    Square roots of histograms, whose distance is Hellinger's: of each of R, G, B in 8 levels (24
    bins); of all three together in 4 x 4 x 4 levels (64); and of the directions of edges, weighted
    by strength, in 8 directions and 3 x 3 cells of the image (72; Dalal & Triggs 2005).
    If C = 4 the last channel is a mask, and the same follows for its pixels alone: (B, 320).
    """
    B, _, H, W = x.shape
    rgb = data.to_uint8(x[:, :3]).long().flatten(2)                                  # (B, 3, H W)
    level = (rgb // 32 + 8 * torch.arange(3, device=x.device)[:, None]).flatten(1)   # (B, 3 H W)
    red, green, blue = (rgb // 64).unbind(1)
    colour = 16 * red + 4 * green + blue                                             # (B, H W)

    grey = F.pad(x[:, :3].mean(1), (1, 1, 1, 1), "replicate")
    dx = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]
    dy = grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
    strength = torch.hypot(dx, dy).flatten(1)                                        # (B, H W)
    direction = (torch.atan2(dy, dx) / math.pi * 4).floor().long() % 8               # (B, H, W)
    row = torch.arange(H, device=x.device) * 3 // H
    column = torch.arange(W, device=x.device) * 3 // W
    edge = (8 * (3 * row[:, None] + column) + direction).flatten(1)                  # (B, H W)

    histograms = []
    for region in [torch.ones_like(x[:, 0]), *(x[:, 3:] > 0).float().unbind(1)]:
        area = region.sum((1, 2), keepdim=True).clamp(min=1)
        weight = (region / area).flatten(1)                                          # (B, H W)
        for index, weights, bins in ((level, weight.repeat(1, 3), 24),
                                     (colour, weight, 64),
                                     (edge, weight * strength, 72)):
            sums = x.new_zeros(B, bins).scatter_add_(1, index, weights)              # in each bin
            histograms.append(sums)
    return torch.cat(histograms, 1).sqrt()


class LinearBaseline(nn.Module):
    """Logistic regression on colours and edges: images (B, C, H, W) to class logits (B, K).

    It learns no features: nobody would use a network that scores lower.
    """

    def __init__(self, classes, channels=3):
        super().__init__()
        dim = 160 * (channels - 2)                                 # 320 with a mask
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.head = zero(nn.Linear(dim, classes))

    def solve(self, mixture, share, penalty=0.01):
        """Minimise the mean of CE(W f + b, y) over all draws, plus penalty / 2 |W|^2, by L-BFGS."""
        f = [colours_and_edges(data.to_float(part)) for part in mixture.images.split(512)]
        f, p = torch.cat(f), mixture.probabilities(share)
        self.mean = p @ f
        self.std = (p @ (f - self.mean) ** 2).sqrt().clamp(min=1e-3)     # some features never vary
        f = (f - self.mean) / self.std
        optimizer = torch.optim.LBFGS(self.head.parameters(), max_iter=200,
                                      line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            errors = F.cross_entropy(self.head(f), mixture.targets, reduction="none")
            loss = p @ errors + penalty / 2 * self.head.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    def forward(self, x):
        return self.head((colours_and_edges(x) - self.mean) / self.std)


# ---- a network of convolutions, and the choice of a classifier

class ConvNet(nn.Module):
    """An AlexNet (Krizhevsky et al. 2012) in small: images (B, C, H, W) to class logits (B, K)."""

    def __init__(self, classes, width=32, channels=3):
        super().__init__()
        layers = []
        for c_in, c_out, stride in ((channels, width, 2), (width, width, 1),
                                    (width, 2 * width, 2), (2 * width, 4 * width, 2)):
            conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
            layers += [conv, nn.GroupNorm(8, c_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = head(4 * width, classes)

    def forward(self, x):
        places = rearrange(self.layers(x), "b c h w -> b (h w) c")
        return self.head(mean_token(places, x))


def make_classifier(cfg, K, channels):
    """Return a new classifier of the kind cfg.model for K classes."""
    if cfg.model == "linear":
        return LinearBaseline(K, channels)
    if cfg.model == "cnn":
        return ConvNet(K, cfg.dim // 2, channels)
    stem = Patches if cfg.model == "patches" else Convolutions
    return ViT(K, cfg.size, cfg.patch, cfg.dim, cfg.depth, cfg.heads, channels, stem)


def initial_model(cfg, classes, channels):
    """Return the classifier that training starts from. Its new weights depend on cfg.seed alone."""
    weights = load_weights(cfg.init) if cfg.init else None         # first, as it may set a seed
    torch.manual_seed(cfg.seed)
    return Tuned(*weights, classes) if weights else make_classifier(cfg, len(classes), channels)


# ---- CLIP, from images and sentences, and tuning of trained weights

def new_model(kind, cfg, identity):
    """Return a "classifier" or a "clip" with new weights, for a run of this identity."""
    if kind == "classifier":
        return initial_model(cfg, identity["classes"], identity["channels"])
    image = initial_model(cfg, range(cfg.dim), 3)                  # axes in the place of classes
    text = TextEncoder(len(identity["words"]) + 3, LENGTH, cfg.dim, cfg.depth, cfg.heads)
    return vit.CLIP(image, text)


def fit_clip(scenes, cfg, path=None):
    """Train a CLIP on Scenes with sentences. Return it, in eval mode, and its tokenizer."""
    if not all(scenes.captions):
        raise UserError("--learn clip needs a sentence for every image: give --data a caption set")
    device, augment = data.pick_device(), compose(cfg.augment)
    images = scenes.images.to(device)
    texts = [text for sentences in scenes.captions for text in sentences]
    words = vit.vocabulary(texts)
    ids = word_tokens(texts, words).to(device)                     # (all sentences, L)
    count = torch.tensor([len(sentences) for sentences in scenes.captions], device=device)
    first = count.cumsum(0) - count                                # of the sentences of each image
    identity = identity_of(cfg, scenes) | dict(words=words)
    model = new_model("clip", cfg, identity).to(device, memory_format=torch.channels_last)

    def loss(step, rng):                                           # a batch has no image twice
        index = torch.randperm(len(images), device=device, generator=rng)[:cfg.batch]
        u = torch.rand(len(index), device=device, generator=rng)
        sentence = first[index] + (u * count[index]).long()        # one of each image's own
        x, _ = augment(data.to_float(images[index]), None, rng)
        with data.autocast(device):
            return vit.contrastive(model(x, ids[sentence]))

    train(model, loss, cfg, path, "clip", identity, "CLIP")
    return model, partial(word_tokens, words=words)


def load(path, *kinds):
    """Return a trained model, in eval mode, its Config, and all that its checkpoint holds."""
    saved = data.load_checkpoint(path, *kinds)
    with data.one_line_error(path):
        cfg = Config(**saved["config"])
        model = new_model(saved["kind"], cfg, saved)
        model.load_state_dict(saved["model"])
    return model.to(data.pick_device()).eval(), cfg, saved


def load_weights(path):
    """Return a pretrained model, its tokenizer (None if it is no CLIP), and its image size."""
    if not Path(path).is_file():                                   # published weights of a CLIP
        with data.one_line_error(f"--init {path} is no file, and as published weights it"):
            model = vit.Published(path).to(data.pick_device()).eval()
        return model, model.tokens, model.size
    model, cfg, saved = load(path, "clip", "classifier")
    is_clip = saved["kind"] == "clip"
    return model, partial(word_tokens, words=saved["words"]) if is_clip else None, cfg.size


def leaks(prints, scenes, parts):
    """Find which prints are of val or test pictures: indices into prints, names in scenes."""
    held_out = scenes[torch.cat([parts["val"], parts["test"]])]
    i, j = data.same_pictures(prints, held_out.prints())
    return i.unique(), [held_out.names[k] for k in (j % len(held_out)).unique().tolist()]


def check_init(path, scenes, parts):
    """Raise UserError if the checkpoint at path was trained on val or test pictures of scenes."""
    if not Path(path).is_file():                                   # published weights do not say
        return
    check_seen(path, data.load_checkpoint(path, "clip", "classifier")["seen"], scenes, parts)


def check_seen(what, seen, scenes, parts):
    """Raise UserError if `what`, by the fingerprints seen, has seen val or test pictures."""
    names = leaks(seen, scenes, parts)[1] if len(seen) else []
    if names:
        raise UserError(f"{what} was trained on {len(names)} of the val and test pictures "
                        f"({data.preview(names)}): give one that has not seen them")


class Tuned(nn.Module):
    """A pretrained encoder with a new head: images (B, 3, H, W) in [-1, 1] to class logits (B, K).

    A CLIP (`reads` is true) gives features of length 1, and the head starts as its zero-shot
    classifier (He et al. 2023: "CT w. init"). For other models the new head starts small.
    """

    def __init__(self, encoder, tokens, size, classes):
        super().__init__()
        self.encoder, self.size, self.reads = encoder, size, tokens is not None
        if self.reads:
            names = [data.in_words(name) for name in classes]
            directions = vit.zero_shot(encoder, tokens, names)                       # (K, E)
            self.head = zero(nn.Linear(directions.shape[1], len(classes)))
            self.head.weight.data = encoder.log_scale.exp().item() * directions
        else:
            self.head = head(encoder.head.in_features, len(classes))
            encoder.head = nn.Identity()

    def features(self, x):
        """Return the features of images, (B, D). The images are resized as the encoder needs."""
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        return self.encoder.encode_image(x) if self.reads else self.encoder(x)

    def forward(self, x):
        return self.head(self.features(x))


def tune(real, synthetic, cfg, path):
    """Return a Tuned model, saved at path. Its encoder is frozen, and sees each image only once."""
    model = initial_model(cfg, real.classes, 3).to(data.pick_device()).eval()
    if cfg.tune == "head":                       # 8 augmented views of each image gained nothing
        features = [scenes and replace(scenes, images=outputs(model.features, scenes.images))
                    for scenes in (real, synthetic)]
        fit(*features, replace(cfg, augment="none"), model=model.head)
    elif not model.reads:
        raise UserError(f"--tune none goes by the names of classes: {cfg.init} is not a CLIP")
    return save_finished(path, model, identity_of(cfg, real, synthetic))


# ---- the script

@dataclass
class Script(Config):
    """Config, and the flags that only the command line needs."""
    data: str = flag("data/NWPU-RESISC45", "folder per class, caption set or xBD tree")
    synthetic: str = flag("", "synthetic images, a folder per class: see train_gen.py --sample")
    per_class: int = flag(0, "real training images per class, or tiles of xBD (0: all)", 0)
    out: str = flag("runs/cls", "folder of classifier.pt")
    predict: str = flag("", "classify this folder: writes predictions.csv beside classifier.pt")
    test: bool = flag(False, "score on test too: once, when nothing is left to choose")
    learn: str = flag("classes", "what to learn", choices=("classes", "clip"))

    def __post_init__(self):
        super().__post_init__()
        if "copypaste" in data.listed(self.augment):
            raise ValueError("--augment copypaste needs masks, which only experiment.py gives")
        if self.learn != "classes":
            linear, cutmix = self.model == "linear", "cutmix" in data.listed(self.augment)
            if cutmix or linear or self.init or self.share:
                raise ValueError(f"--learn {self.learn} goes without --init, --synthetic, --share, "
                                 "cutmix and --model linear")
        if bool(self.synthetic) != (self.share > 0):
            raise ValueError("--synthetic and --share need each other: a tree, and a probability")


def predict_folder(cfg):
    """Classify all pictures in and below the folder cfg.predict, and write predictions.csv."""
    path, table = Path(cfg.out) / "classifier.pt", Path(cfg.out) / "predictions.csv"
    model, trained, saved = load(path, "classifier")
    scenes = data.read(cfg.predict, trained.size, labelled=False)
    if scenes.tiles != saved["tiles"]:
        kinds = "whole pictures", "crops of buildings, from an xBD tree with its labels"
        raise UserError(f"{path} classifies {kinds[saved['tiles']]}, and {cfg.predict} "
                        f"has {kinds[scenes.tiles]}")
    probability, predicted = outputs(model, scenes.images).softmax(1).max(1)
    rows = [[name, saved["classes"][k], f"{p:.4f}"] for name, k, p in zip(
        scenes.names, predicted.tolist(), probability.tolist(), strict=True)]
    data.save_csv(table, ["picture", "predicted", "probability"], rows)
    print(f"{len(rows)} pictures of {cfg.predict}, classified by {path}: {table}")


def read_synthetic(cfg, scenes, parts):
    """Return the Scenes of cfg.synthetic with the classes of scenes; None if it is empty.

    Pictures that are also in val or test are left out, with a message.
    """
    if not cfg.synthetic:
        return None
    classes = scenes.classes
    synthetic = data.read(cfg.synthetic, cfg.size)
    if unknown := sorted(set(synthetic.classes) - set(classes)):
        raise UserError(f"{cfg.synthetic} has classes that {cfg.data} lacks: {', '.join(unknown)}")
    check_seen(f"the generator of {cfg.synthetic}", synthetic.generator_saw, scenes, parts)
    number = torch.tensor([classes.index(name) for name in synthetic.classes])
    leaked, names = leaks(synthetic.prints(), scenes, parts)
    leaked = (leaked % len(synthetic)).unique()
    if len(leaked):
        print(f"left out {len(leaked)} of {len(synthetic)} pictures of {cfg.synthetic}, which are "
              f"val or test pictures of {cfg.data}: {data.preview(names)}", file=sys.stderr)
    synthetic = replace(synthetic, labels=number[synthetic.labels], classes=classes)
    return synthetic[~torch.isin(torch.arange(len(synthetic)), leaked)]


def score(model, scenes, parts, test):
    """Print the scores of a classifier on the val split, and if asked on the test split."""
    for part in ("val", "test") if test else ("val",):
        held_out = scenes[parts[part]]
        predicted = outputs(model, held_out.images).argmax(1)
        counts = class_counts(held_out.labels, predicted, len(scenes.classes))
        print(f"{part}: accuracy {accuracy(counts):.3f}, macro-F1 {macro_f1(counts):.3f}, "
              f"of {len(held_out)} images")
        rows = zip(scenes.classes, f1(counts), counts[1], strict=True)
        print("F1 per class:", ", ".join(f"{name} {value:.2f}" for name, value, n in rows if n))


def main(cfg):
    """Train on the training split and score on val, with --test also on test. Or predict."""
    if cfg.predict:
        return predict_folder(cfg)
    if cfg.learn != "classes" and data.dist.is_initialized():      # they need whole batches
        raise UserError(f"--learn {cfg.learn} runs in one process: use python, not torchrun")
    if cfg.init:
        cfg = replace(cfg, size=load_weights(cfg.init)[2])
    scenes, out = data.read(cfg.data, cfg.size), Path(cfg.out)
    parts = data.split(scenes)
    real = scenes[data.choose(scenes, parts["train"], cfg.per_class, cfg.seed)]

    if cfg.learn == "clip":
        model, tokens = fit_clip(real, cfg, out / "clip.pt")
        print("zero-shot, by the names of the classes:")
        model = Tuned(model, tokens, cfg.size, scenes.classes).to(data.pick_device())
        return score(model, scenes, parts, cfg.test)

    check_init(cfg.init, scenes, parts)
    check_seen(f"a generator in {cfg.data}", scenes.generator_saw, scenes, parts)
    if len(scenes.classes) < 2:
        raise UserError(f"{cfg.data} has one class, {scenes.classes[0]}: it takes two or more")
    synthetic = read_synthetic(cfg, scenes, parts)
    print(f"{len(real)} real, {len(synthetic or [])} synthetic images "
          f"of {len(scenes.classes)} classes")
    make = fit if cfg.tune == "all" else tune
    model = make(real, synthetic, cfg, out / "classifier.pt")
    score(model, scenes, parts, cfg.test)


if __name__ == "__main__":
    data.launch(main, Script)
