"""Does synthetic data from a generative model help image recognition in remote sensing?

    python experiment.py                             drawn pictures: tests the method, in minutes
    python experiment.py --data data/NWPU-RESISC45   scenes: the question itself
    python experiment.py --data data/xbd             damaged buildings, where most classes are rare

An *arm* is one way to train the classifier: on real images, with augmentation, with synthetic
images and so on. The experiment chooses a few real training images (N per class, or N tiles of
xBD), trains a generator on them alone, and makes images with it. Then for each seed and arm it
trains and scores the same classifier, and says what one arm gains over another. README.md, "What
the comparison promises", has the rules that make this fair.

This file in order: arms, runs, statistics, near-duplicates, scales and flags, page, terminal.
"""
import base64
import functools
import html
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
import train_cls
import train_gen
from augment import AUGMENTATIONS, OVERHEAD
from data import Scenes, UserError, flag, listed
from train_cls import accuracy, class_counts, counts_per_group, f1, macro_f1

SCORES = {"accuracy": accuracy, "macro-F1": macro_f1}


# ---- arms

@dataclass(frozen=True)
class Arm:
    """One way to train the classifier. The steps and the images per step are equal in all arms."""
    source: str = ""                 # what replaces real images: "generator", "fresh" or "copies"
    share: float = 0.0               # probability that a drawn real image is replaced
    augment: str = "none"            # augmentations by name, of real images and replacements
    balance: bool = False            # draw all classes equally often, however rare they are
    model: str = "vit"               # one of train_cls.MODELS, "clip" or "zero-shot"
    pretrain: bool = False           # first `share` of the steps replacements alone, then none
    shuffle: bool = False            # each replacement gets the label of another one
    clip_filter: bool = False        # keep only the replacements that CLIP recognises
    guidance: float | None = None    # guidance scale of the generator (None: that of --scale)
    generated: int = 0               # replacements per class, at most (0: that of --scale)
    strength: float = 0.0            # sampling starts from real images, noised by this share of T


@dataclass(frozen=True)
class Task:
    """One of the two comparisons: its arms, and the claims about them that are tested."""
    arms: dict                       # {name: Arm}
    main_arm: str                    # the arm with synthetic images that the studies vary
    bases: tuple                     # the page says what every arm gains over these
    claims: tuple                    # (arm, base): does arm score higher than base?
    score: str                       # of SCORES: what claims are about
    unit: str                        # what --counts counts
    rare_only: bool = False          # generate only the classes that are rarer than the mean


TASKS = {
    "scenes": Task(
        arms={                                   # source, share, augment
            "real": Arm(),
            "real + augmentation": Arm(augment=OVERHEAD),
            "synthetic + augmentation": Arm("generator", 1.0, OVERHEAD),
            "real + synthetic": Arm("generator", 0.5),
            "real + synthetic + augmentation": Arm("generator", 0.5, OVERHEAD),
            # The upper bound (a perfect generator), and the negative control (nothing new)
            "real + fresh real + augmentation": Arm("fresh", 0.5, OVERHEAD),
            "real + copies + augmentation": Arm("copies", 0.5, OVERHEAD),
            # The linear baseline, on colours and edges
            "linear: real": Arm(model="linear"),
            "linear: synthetic only": Arm("generator", 1.0, model="linear"),
            "linear: real + synthetic": Arm("generator", 0.5, model="linear"),
        },
        main_arm="real + synthetic + augmentation", bases=("real", "real + augmentation"),
        claims=(("real + synthetic + augmentation", "real + augmentation"),
                ("real + synthetic", "real"),
                ("real + fresh real + augmentation", "real + augmentation"),
                ("real + copies + augmentation", "real + augmentation"),
                ("clip: synthetic only", "clip: zero-shot"),
                ("clip: real + synthetic", "clip: real"), ("clip: real + edited", "clip: real"),
                ("clip: real + fresh real", "clip: real"), ("clip: real + copies", "clip: real")),
        score="accuracy", unit="real images per class"),
    "buildings": Task(
        arms={
            "real": Arm(augment=OVERHEAD),
            "balanced": Arm(augment=OVERHEAD, balance=True),
            "balanced + synthetic": Arm("generator", 0.5, OVERHEAD, balance=True),
            "balanced + copy-paste": Arm(augment=f"{OVERHEAD},copypaste", balance=True),
            "balanced + fresh real": Arm("fresh", 0.5, OVERHEAD, balance=True),
            "balanced + copies": Arm("copies", 0.5, OVERHEAD, balance=True),
            "linear: balanced": Arm(balance=True, model="linear"),
            "linear: balanced + synthetic": Arm("generator", 0.5, balance=True, model="linear"),
        },
        main_arm="balanced + synthetic", bases=("balanced", "balanced + copy-paste"),
        claims=(("balanced + synthetic", "balanced"),
                ("balanced + fresh real", "balanced"), ("balanced + copies", "balanced")),
        score="macro-F1", unit="training tiles", rare_only=True),
}

# --init WEIGHTS adds the protocols of He et al. 2023: a frozen CLIP under a linear head that begins
# with the embedded names of the classes. "clip" trains the head alone, "zero-shot" nothing.
CLIP_ARMS = {
    "clip: zero-shot": Arm(model="zero-shot"),
    "clip: real": Arm(model="clip"),
    "clip: synthetic only": Arm("generator", 1.0, model="clip", clip_filter=True),
    "clip: real + synthetic": Arm("generator", 0.5, model="clip"),
    "clip: real + edited": Arm("generator", 0.5, model="clip", strength=0.35),
    "clip: real + fresh real": Arm("fresh", 0.5, model="clip"),
    "clip: real + copies": Arm("copies", 0.5, model="clip"),
}

# --study adds arms: the main arm of the task, with these changes.
STUDIES = {
    "share": {f"{share:g}": dict(share=share) for share in (0.25, 0.75, 1.0)},
    "generated": {f"{n} {name}": dict(generated=n, share=share) for n in (10, 30, 100, 300)
                  for name, share in (("mixed", 0.5), ("alone", 1.0))},
    "guidance": {f"{w:g}": dict(guidance=w) for w in (1.0, 3.0, 5.0)},
    "strength": {f"{s:.2f}": dict(strength=s) for s in (0.15, 0.3, 0.5, 0.7, 0.9)},
    "augment": {a: dict(augment=a, source="", share=0.0) for a in ("none", *AUGMENTATIONS)},
    "model": {"cnn, real": dict(model="cnn", source="", share=0.0),
              "cnn, real + synthetic": dict(model="cnn"),
              "patches, real": dict(model="patches", source="", share=0.0),
              "patches, real + synthetic": dict(model="patches")},
    "controls": {"shuffled labels": dict(shuffle=True),
                 "synthetic first, then real": dict(pretrain=True)},
}


# ---- runs

class Run(NamedTuple):
    """One classifier: the arm of a task, with a number of real images and a seed."""
    task: str
    count: int                       # training images per class, or tiles (0: all)
    draw: int                        # of the training images, and of the generator that they train
    seed: int                        # of the classifier
    arm: str

    def path(self):
        """Return its file, such as runs/experiment/scenes/4/seed0/real + copies.json."""
        folder = COMPARISONS[self.task].folder(self.count) / f"seed{self.seed}"
        return folder / f"{self.arm.replace(': ', ' - ')}.json"

    def settings(self):
        """Return all that decides its row, but the code."""
        comparison = COMPARISONS[self.task]
        return comparison.settings | dict(arm=asdict(comparison.arms[self.arm]))

    def read(self):
        """Return its row if it is finished, else None. UserError if it had other settings."""
        if not self.path().exists():
            return None
        with data.one_line_error(self.path()):
            row = json.loads(self.path().read_bytes())
            old = row["settings"]
        for name, value in self.settings().items():
            if old.get(name) != value:
                raise UserError(f"{self.path()} has another {name}: give another --out, or move it")
        return row


@dataclass(eq=False)                 # compared by identity, so that choose_subset can be cached
class Comparison:
    """A task on a data set, and the rows of its finished runs."""
    name: str                        # of the task
    task: Task
    arms: dict                       # {name: Arm} that are asked for
    scale: "Scale"
    cfg: "Config"
    title: str                       # of the data set
    scenes: Scenes
    parts: dict                      # {"train", "val", "test": indices into scenes}
    rows: dict = field(default_factory=dict)                 # {Run: row}
    near_duplicates: dict = field(default_factory=dict)      # {count: NearDuplicates or None}

    def __post_init__(self):
        self.out = Path(self.cfg.out) / self.name
        self.val, self.test = self.scenes[self.parts["val"]], self.scenes[self.parts["test"]]

    @functools.cached_property
    def settings(self):
        """Everything that decides a row besides its Run and its Arm, as JSON stores it."""
        scale, init = asdict(self.scale), self.cfg.init
        for name in ("counts", "seeds", "arms", "drawn"):
            del scale[name]
        for name in ("share", "augment", "balance", "pretrain", "model"):
            del scale["cls"][name]                           # which the arm decides
        weights = Path(init).read_bytes() if Path(init).is_file() else init.encode()
        return json.loads(json.dumps(scale | dict(
            images=[self.scenes[self.parts["train"]].digest, self.val.digest, self.test.digest],
            weights=data.hash_of(weights))))

    def folder(self, count):
        """Return the folder for a number of real images."""
        return self.out / str(count or "all")

    def amount(self, count):
        """Write a number of real images in words: "20 real images per class"."""
        return f"{count or 'all'} {self.task.unit}"

    def label(self, name, count):
        """Return the name of an arm or claim, with its number of real images if several."""
        return f"{name} ({count or 'all'})" if len(self.scale.counts) > 1 else name

    def seeds_done(self):
        """Return how many seeds all arms have (arms with fresh images may lack some)."""
        arms = [name for name, arm in self.arms.items() if arm.source != "fresh"]
        return min(len(self.rows_of(arm, count)) for arm in arms for count in self.scale.counts)

    def rows_of(self, arm, count):
        """Return the rows of an arm, seed by seed; an empty list if it was not run."""
        runs = sorted(run for run in self.rows if (run.arm, run.count) == (arm, count))
        return [self.rows[run] for run in runs]

    def mean(self, arm, count, column=""):
        """Return the mean of the score, or of a column, in %; nan if the arm was not run."""
        values = [row[column or self.task.score] for row in self.rows_of(arm, count)]
        return 100 * float(np.mean(values or [math.nan]))


class Subset(NamedTuple):
    """The training images of a count and a draw, which all arms share."""
    comparison: Comparison
    real: Scenes                     # the chosen training images
    fresh: Scenes                    # the other ones, without duplicates of the chosen
    out: Path                        # folder of its generator
    draw: int

    def replaced(self):
        """Return the classes whose images are replaced, (n,): all, or in buildings the rare ones.

        The generator is trained on these alone: common ones would take most of its steps.
        """
        count = self.real.labels.bincount(minlength=len(self.real.classes))
        rare_only = self.comparison.task.rare_only
        return (count < (count.float().mean() if rare_only else math.inf)).nonzero().flatten()


COMPARISONS = {}                     # {task: Comparison}, filled by load_comparisons


def main(cfg):
    """Run what is missing, renew the page on the way, print the answers. Return the Comparisons."""
    comparisons = load_comparisons(cfg)
    jobs = cfg.jobs or (os.cpu_count() if data.pick_device().type == "cpu" else 1)
    runs = list_runs(comparisons)
    for run in runs:
        if row := run.read():
            COMPARISONS[run.task].rows[run] = row
    missing = [run for run in runs if run not in COMPARISONS[run.task].rows]
    generators = list(dict.fromkeys(                         # their task, count and draw
        run[:3] for run in runs if COMPARISONS[run.task].arms[run.arm].source == "generator"))
    if cfg.init:
        train_cls.check_init(cfg.init, comparisons[0].scenes, comparisons[0].parts)
        load_clip(comparisons[0])                # fails now, not after an hour, if it is no CLIP
    for comparison in comparisons:
        print_plan(comparison, missing, generators, jobs)
    if cfg.dry_run:
        return comparisons
    with workers(jobs, cfg) as pool:
        found = data.progress(pool.map(make_synthetic, generators), "generators", len(generators))
        for (task, count, draw), near_duplicates in zip(generators, found, strict=True):
            if draw == 0:
                COMPARISONS[task].near_duplicates[count] = near_duplicates

        rows = data.progress(pool.map(train_and_score, missing), "classifiers", len(missing))
        written = -math.inf
        for run, row in zip(missing, rows, strict=True):
            COMPARISONS[run.task].rows[run] = row
            if time.monotonic() > written + 60:              # renew the page once a minute
                write_page(comparisons)
                written = time.monotonic()
    write_page(comparisons)
    print_answers(comparisons)
    return comparisons


def load_comparisons(cfg):
    """Read and split the images of all tasks, once in each process. Return the Comparisons."""
    COMPARISONS.clear()
    for name in cfg.tasks():
        task, scale, cache = TASKS[name], cfg.resolved(name), Path(cfg.out) / "cache"
        root, title = Path(cfg.data), "/".join(Path(cfg.data).resolve().parts[-2:])
        if not cfg.data:
            root, title = Path(cfg.out) / f"drawn-{name}-{scale.drawn}", f"drawn {name}"
            (data.draw_xbd if task.rare_only else data.draw_tree)(root, scale.drawn)
        title += f" with {cfg.hold_out} held out" * bool(cfg.hold_out)
        scenes = data.read(root, scale.cls.size, mask=True, cache=cache)
        parts, arms = data.split(scenes, hold_out=cfg.hold_out), cfg.selected_arms(task, scale.arms)
        train_cls.check_seen(f"a generator in {root}", scenes.generator_saw, scenes, parts)
        if not arms:
            raise UserError(f"--arms {cfg.arms}: none is of {name}; give {', '.join(task.arms)}")
        if len(scenes.labels[parts["test"]].unique()) < 2:
            raise UserError(f"{title}: all test images are of one class: nothing can be compared")
        COMPARISONS[name] = Comparison(name, task, arms, scale, cfg, title, scenes, parts)
    return list(COMPARISONS.values())


@functools.lru_cache(1)                          # only the last one: its images may be large
def choose_subset(comparison, count, draw):
    """Choose the training images of a count and draw. RuntimeError if a test group is in train."""
    train, groups = comparison.parts["train"], comparison.scenes.groups
    chosen = data.choose(comparison.scenes, train, count, draw)
    if torch.isin(comparison.test.groups, groups[train]).any():
        raise RuntimeError("a group of images is in both the train and the test split")
    rest = train[~torch.isin(groups[train], groups[chosen])]
    rest = rest[torch.randperm(len(rest), generator=data.rng(draw))]
    out = comparison.folder(count) / f"draw{draw}"
    return Subset(comparison, comparison.scenes[chosen], comparison.scenes[rest], out, draw)


def list_runs(comparisons):
    """List the Runs of all tasks, seed by seed, so that a first answer comes early."""
    runs = []
    for comparison in comparisons:
        for seed in range(comparison.scale.seeds):
            for count in comparison.scale.counts:
                draw = seed if comparison.scale.redraw else 0
                subset = choose_subset(comparison, count, draw)
                real, fresh = (scenes.labels.bincount(minlength=len(scenes.classes))
                               for scenes in (subset.real, subset.fresh))
                enough = bool((fresh >= real).all())         # fewer would be drawn again and again
                runs += [Run(comparison.name, count, draw, seed, name) for name, arm
                         in comparison.arms.items() if enough or arm.source != "fresh"]
    return sorted(runs, key=lambda run: run.seed)


def make_synthetic(where):
    """Train the generator of (task, count, draw), make the images. Of draw 0: NearDuplicates."""
    task, count, draw = where
    comparison = COMPARISONS[task]
    subset = choose_subset(comparison, count, draw)
    for arm in comparison.arms.values():
        if arm.source == "generator":
            synthesize(subset, arm)
    if draw > 0:                                 # one generator is enough to look at
        return None
    synthetic = synthesize(subset, comparison.task.arms[comparison.task.main_arm])
    return find_near_duplicates(subset.real, synthetic, [subset.fresh, comparison.val])


def train_and_score(run):
    """Train and score the classifier of a run. Write its row to a file, and return it."""
    start, comparison = time.perf_counter(), COMPARISONS[run.task]
    arm, test = comparison.arms[run.arm], comparison.test
    subset = choose_subset(comparison, run.count, run.draw)
    replacing = replacements(subset, arm)
    cfg = replace(comparison.scale.cls, seed=run.seed, augment=arm.augment, balance=arm.balance,
                  pretrain=arm.pretrain, share=arm.share if replacing else 0.0)
    images = dict(train=subset.real, replacing=replacing, val=comparison.val, test=test)
    title = f"{run.arm}, {comparison.amount(run.count)}, seed {run.seed}"
    model, images = fit(comparison, arm, cfg, images, title)
    K, shift = len(test.classes), 0.0
    if arm.balance:                              # undo some of the balance: how much, val says
        logits = train_cls.outputs(model, images["val"].images).log_softmax(1)
        frequency = subset.real.labels.bincount(minlength=K)
        shift = train_cls.adjust_logits(logits, comparison.val.labels, frequency)
    answers, counts = {}, {}
    for part in ("test", "train"):
        logits = train_cls.outputs(model, images[part].images).log_softmax(1) + shift
        answers[part] = logits.argmax(1)
        counts[part] = class_counts(images[part].labels, answers[part], K)

    row = run._asdict() | dict(data=comparison.title)
    row |= {name: float(score(counts["test"])) for name, score in SCORES.items()}
    steps = 0 if arm.model in ("linear", "zero-shot") else cfg.steps
    row |= dict(train=float(SCORES[comparison.task.score](counts["train"])),
                added=len(replacing or []), steps=steps)
    row |= {f"F1 {name}": float(value)
            for name, value in zip(test.classes, f1(counts["test"]), strict=True)}
    row |= dict(answers=answers["test"].tolist(), seconds=round(time.perf_counter() - start, 1),
                device=str(data.pick_device()), commit=commit(), settings=run.settings())
    data.write(run.path(), json.dumps(row))
    return row


def fit(comparison, arm, cfg, images, title):
    """Train on images {part: Scenes or None}. Return model, images; of CLIP the head, features."""
    if arm.model not in ("clip", "zero-shot"):
        cfg = replace(cfg, model=arm.model)
        return train_cls.fit(images["train"], images["replacing"], cfg, title=title), images
    clip, weights = load_clip(comparison), comparison.settings["weights"]
    for part, scenes in images.items():
        if scenes:                               # CLIP sees each image once: its features are kept
            path = comparison.out / "features" / f"{scenes.digest}-{weights}.pt"
            compute = functools.partial(train_cls.outputs, clip.features, scenes.images)
            images[part] = replace(scenes, images=data.cached(path, compute))
    if arm.model == "clip":                      # without augmentation: features are computed once
        train_cls.fit(images["train"], images["replacing"], replace(cfg, augment="none"),
                      title=title, model=clip.head)
    return clip.head, images


def synthesize(subset, arm):
    """Return the synthetic images of an arm (Scenes), made on the first call and kept on disk."""
    scale, classes = subset.comparison.scale, subset.replaced()
    real = subset.real[torch.isin(subset.real.labels, classes)]
    cfg, steps = replace(scale.gen, seed=subset.draw), scale.sampling_steps
    generated = arm.generated or scale.generated
    guidance = scale.guidance if arm.guidance is None else arm.guidance
    y = classes.repeat_interleave(generated)

    def make():
        generator = train_gen.train(real, cfg, subset.out / "generator.pt",
                                    title=f"generator, {subset.out}")
        reference = train_gen.examples(real, y) if arm.strength else None
        images = train_gen.generate(generator, y, cfg.seed, steps, guidance, reference,
                                    arm.strength, title=f"synthetic images, {subset.out}")
        images[:, 3:] = 255 * (images[:, 3:] > 127)          # real masks have no grey pixels
        return images

    # The name holds all that decides the images, so that a set of other settings is never read.
    content = data.hash_of(repr((cfg, steps, real.digest)).encode())
    file = f"synthetic-{generated}-guidance{guidance:g}-strength{arm.strength:g}-{content}.pt"
    images, names = data.cached(subset.out / file, make), [f"synthetic {k}" for k in range(len(y))]
    return Scenes(images, y, real.classes, names, torch.arange(len(y)))


def replacements(subset, arm):
    """Return the images that replace real ones in an arm: Scenes, or None."""
    if not arm.source:
        return None
    if arm.source == "generator":
        scenes = synthesize(subset, arm)
    else:                                        # at most as many of a class as synthetic images
        scenes = subset.real if arm.source == "copies" else subset.fresh
        most = arm.generated or subset.comparison.scale.generated
        first = [(scenes.labels == c).nonzero()[:most, 0] for c in subset.replaced()]
        scenes = scenes[torch.cat(first)]
    if arm.shuffle:
        order = torch.randperm(len(scenes), generator=data.rng(subset.draw))
        scenes = replace(scenes, labels=scenes.labels[order])
    if arm.clip_filter:                          # He et al. 2023, CF: CLIP must not doubt the class
        logits = train_cls.outputs(load_clip(subset.comparison), scenes.images)
        p = logits.softmax(1)[torch.arange(len(scenes)), scenes.labels]
        scenes = scenes[p > 1 / logits.shape[1]]
    return scenes


def load_clip(comparison):
    """Return the CLIP of --init under a linear head, which begins as the names of the classes."""
    cfg = replace(comparison.scale.cls, init=comparison.cfg.init)
    model = train_cls.initial_model(cfg, comparison.scenes.classes, 3)
    if not model.reads:
        raise UserError(f"--init {cfg.init} has no text encoder: give a CLIP")
    return model.to(data.pick_device()).eval()


@functools.cache
def commit():
    """Return the commit of this code, with a + if files have changed since; "" without git."""
    git = f"git -C {shlex.quote(str(Path(__file__).resolve().parent))}"
    failed, text = subprocess.getstatusoutput(f"{git} describe --always --dirty=+ --abbrev=7")
    return "" if failed else text


@contextmanager
def workers(jobs, cfg):
    """Yield a pool with map(function, items), of so many processes with their own COMPARISONS."""
    if data.pick_device().type == "cpu":         # so that results do not depend on the jobs; small
        torch.set_num_threads(1)                 # networks gain nothing from more threads
    if jobs == 1:
        yield SimpleNamespace(map=map)           # in this process, where COMPARISONS are loaded
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), init_worker, (cfg,)) as pool:
        try:
            yield pool
        except BrokenExecutor:
            raise UserError("a process died, perhaps out of memory: give fewer --jobs") from None
        except BaseException:
            for child in active_children():      # do not wait for what they are doing
                child.terminate()
            raise


def init_worker(cfg):
    """Prepare a worker process: one thread, no output, COMPARISONS of its own."""
    end_with_parent = Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True)
    end_with_parent.start()                      # also if the parent is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)             # Ctrl-C is for the parent
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    load_comparisons(cfg)


# ---- statistics

LEVELS = np.sort(np.append(np.geomspace(1e-9, 1, 2000), 0.05))         # a grid of p-values


class Gain(NamedTuple):
    """What one arm gains over another, as a difference of scores in -1..1."""
    mean: float                      # over the seeds
    half: float                      # half the width of the 95 % interval
    p: float                         # the level whose interval just touches 0
    seeds: int                       # how many pairs of runs were compared

    def text(self, unit=""):
        """Write percentage points, "+3.1 [+0.4, +5.8]", with a unit after the first number."""
        low, high = max(self.mean - self.half, -1), min(self.mean + self.half, 1)
        return f"{100 * self.mean:+.1f}{unit} [{100 * low:+.1f}, {100 * high:+.1f}]"


def jackknife(counts, score):
    """Return the scores of S seeds (S,), and the pseudo-values of G groups of test images (S, G).

    counts (S, G, 3, K) come from train_cls.counts_per_group. A group is an image, or the buildings
    of a tile. Its pseudo-value (Tukey 1958) is G score(all) - (G - 1) score(all but this group).
    For accuracy on single images it is 1 if the answer is right and 0 if it is wrong.
    """
    G, total = counts.shape[1], counts.sum(1, keepdims=True)
    values = G * score(total) - (G - 1) * score(total - counts)
    return score(total)[:, 0], values


def gain(scores, values):
    """Return the Gain of one arm over another from their differences, for S, G of 2 or more.

    scores (S,): the difference of the scores for each seed. values (S, G): the same difference for
    each seed and group of test images, by jackknife(). Other seeds and images would give another
    mean. As in a two-way analysis of variance, the variance of the mean has three parts:

        V_residual = sum (values - seed mean - image mean + mean)^2 / ((S - 1) (G - 1)) / (S G)
        V_seeds    = var(scores) / S
        V_images   = var(image means) / G - V_residual,  at least 0

    Both measured variances, of scores and of image means, contain the residual. V_images drops it,
    so that it counts once. With Student's t the interval is mean +- half,

        half = sqrt(t(S - 1)^2 V_seeds + t(G - 1)^2 V_images)

    An example, S = 3 and G = 4: values 1 0 0 0 / 1 1 0 0 / 1 1 1 0 have scores .25 .50 .75, image
    means 1 .67 .33 0. V_residual = .833 / 6 / 12 = .0116, V_seeds = .0625 / 3 = .0208, V_images =
    .185 / 4 - .0116 = .0347, half = sqrt(4.303^2 .0208 + 3.182^2 .0347) = .859: .50 +- .86.

    In simulations of accuracy with 3 and 8 seeds the interval holds the true gain in 93 to 98.5 %.
    """
    (S, G), of_image = values.shape, values.mean(0)
    residual = values - values.mean(1, keepdims=True) - of_image + values.mean()
    V_residual = (residual**2).sum() / ((S - 1) * (G - 1)) / (S * G)
    V_seeds = scores.var(ddof=1) / S
    V_images = max(of_image.var(ddof=1) / G - V_residual, 0)
    if np.ptp(scores) < 1e-9:                    # equal by chance, as they are few
        V_seeds = V_residual

    # Half the width at each level. p is the level at which it equals |mean|.
    half = np.sqrt(student(S - 1) ** 2 * V_seeds + student(G - 1) ** 2 * V_images)
    mean = float(scores.mean())
    p = float(np.interp(abs(mean), half[::-1], LEVELS[::-1])) if mean else 1.0
    return Gain(mean, half[LEVELS == 0.05].item(), p, S)


@functools.cache
def student(dof):
    """Return the two-sided critical value of Student's t for each p of LEVELS.

    Substitute t = sqrt(dof) / tan(angle): the density is sin(angle)^(dof - 1) but for a factor, and
    p is its integral from angle 0, where t is infinite, on. At pi / 2 t is 0 and p is 1.
    """
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.sin(angle) ** (dof - 1)
    integral = np.append(0, (density[1:] + density[:-1]).cumsum())       # by trapezoids
    return np.sqrt(dof) / np.tan(np.interp(LEVELS, integral / integral[-1], angle))


def holm(ps):
    """Return p-values, in their order, corrected for being so many (Holm 1979).

    The smallest is multiplied by their number, the next by one less, and so on. None ends above 1
    or below the one before. If those below .05 are claimed, the chance of any false claim is 5 %.
    """
    ps = np.asarray(ps, dtype=float)
    order, corrected = ps.argsort(), np.empty_like(ps)
    multiplied = ps[order] * np.arange(len(ps), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(multiplied))
    return corrected.tolist()


def difference(comparison, arm, base, count):
    """Return the Gain of arm over base for the seeds of both. None if 2 seeds or groups lack."""
    both = [{row["seed"]: row for row in comparison.rows_of(name, count)} for name in (arm, base)]
    seeds, test = sorted(both[0].keys() & both[1].keys()), comparison.test
    if arm == base or len(seeds) < 2 or len(test.groups.unique()) < 2:
        return None
    counts = [counts_per_group(test.labels, rows[seed]["answers"], test.groups, len(test.classes))
              for rows in both for seed in seeds]
    scores, values = jackknife(np.stack(counts), SCORES[comparison.task.score])
    S = len(seeds)
    return gain(scores[:S] - scores[S:], values[:S] - values[S:])


def commonest(comparison):
    """Return the commonest class of the training split, and the score (%) of always giving it."""
    test = comparison.test
    c = comparison.scenes.labels[comparison.parts["train"]].bincount().argmax()
    counts = class_counts(test.labels, c.expand(len(test)), len(test.classes))
    return test.classes[c], 100 * float(SCORES[comparison.task.score](counts))


def linear_baseline(comparison, count):
    """Return the score (%) of the linear arm on real images, or of the commonest class if higher.

    Nobody would use a network below it, so what its arms gain decides nothing.
    """
    linear = [comparison.mean(name, count) for name, arm in comparison.arms.items()
              if arm.model == "linear" and not arm.source]
    return float(np.nanmax([commonest(comparison)[1], *linear]))


@dataclass
class Claim:
    """What an arm gains over its base, and the verdict."""
    count: int
    arm: str
    base: str
    gain: Gain
    p: float = math.nan              # after Holm's correction
    verdict: str = ""


def claims(comparison):
    """Return the Claims whose arms have been run: those on synthetic images, then the controls."""
    families = {True: [], False: []}             # synthetic images, controls: corrected apart
    for count in comparison.scale.counts:
        for arm, base in comparison.task.claims:
            if gain := difference(comparison, arm, base, count):
                asks = comparison.arms[arm].source == "generator"
                families[asks].append(Claim(count, arm, base, gain))
    for family in families.values():
        for claim, p in zip(family, holm([claim.gain.p for claim in family]), strict=True):
            claim.p, claim.verdict = p, verdict(comparison, claim, p)
    return families[True] + families[False]


def verdict(comparison, claim, p):
    """Return the verdict on a Claim, whose p is corrected."""
    scores = [comparison.mean(name, claim.count) for name in (claim.arm, claim.base)]
    if claim.gain.seeds < 3:
        return "too few seeds"
    if max(scores) < linear_baseline(comparison, claim.count):
        return "below the linear baseline"
    if p >= 0.05:
        return "no difference shown"
    return "helps" if claim.gain.mean > 0 else "hurts"


# ---- near-duplicates: has the generator memorised its training images?

CELLS = 6            # images are compared in 6 x 6 cells, so that blur does not matter
FLAT = 2.0           # grey levels: an image that deviates so little over its cells is half noise
ALARM = 0.01         # p below which we say so


class NearDuplicates(NamedTuple):
    """How many synthetic images are near-duplicates, and how many would be by chance."""
    total: int                       # synthetic images that were compared
    found: int                       # near-duplicates among them
    expected: float                  # so many of as many new images would be, by chance
    p: float                         # probability of so many, or more, by chance
    least_p: float                   # the smallest p that so few images can give
    synthetic: torch.Tensor          # the 16 nearest (N, C, H, W), turned like their real image
    nearest: torch.Tensor            # the training image that each of them is nearest to


def find_near_duplicates(real, synthetic, held_out, most=4000):
    """Count synthetic images nearer to a training image of their class than any held-out image is.

    All are Scenes. The generator was trained on real and never saw those of the list held_out. Of
    each class as many synthetic as held-out images are compared, up to `most` in all; None if there
    are none. If the s synthetic images are as new as the n held-out ones, their order is random:

        P(at least k synthetic ones are nearer than all n) = C(s, k) / C(s + n, k)    Rosenbaum 1954

    The sum over classes has the convolution of their distributions, so p is exact.
    """
    found, chance, pairs = 0, np.ones(1), []     # chance[k]: probability of k near-duplicates
    for c in synthetic.labels.unique():
        known, made, *others = (scenes.images[scenes.labels == c]
                                for scenes in (real, synthetic, *held_out))
        others = torch.cat(others)
        s = n = min(len(made), len(others), most // len(real.classes))
        if n == 0:
            continue
        similarity, index, turned = nearest(made[:s], known)
        found += int((similarity > nearest(others[:n], known)[0].max()).sum())
        pairs.append((similarity, turned, known[index]))
        at_least = [math.comb(s, k) / math.comb(s + n, k) for k in range(s + 1)]
        chance = np.convolve(chance, -np.diff(at_least, append=0))
    if not pairs:
        return None
    similarity, turned, closest = map(torch.cat, zip(*pairs, strict=True))
    worst = similarity.argsort(descending=True)[:16]
    tail = chance[::-1].cumsum()[::-1]           # tail[k]: probability of at least k
    return NearDuplicates(len(similarity), found, float(chance @ np.arange(len(chance))),
                          float(tail[found]), float(tail[-1]), turned[worst], closest[worst])


def structure(images):
    """Turn images (N, C, H, W) uint8 into rows (N, D) whose dot product is their correlation.

    Centring channels removes brightness and tint, dividing by the length contrast. What is then
    left of a flat image is noise, near to other noise by chance: FLAT makes its row short.
    """
    x = F.adaptive_avg_pool2d(images[:, :3].float(), CELLS).flatten(2)           # (N, 3, CELLS^2)
    x = (x - x.mean(2, keepdim=True)).flatten(1)
    return x / (x.square().sum(1, keepdim=True) + x.shape[1] * FLAT**2).sqrt()


def nearest(images, known):
    """Find the known image (M, C, H, W) that correlates most with each of images (N, C, H, W).

    Returns the correlation (N,), the largest over 8 turns and flips; its index; the turned images.
    """
    turns = [images.rot90(k, (-2, -1)) for k in range(4)]
    eight = torch.stack(turns + [image.flip(-1) for image in turns])             # (8, N, C, H, W)
    rows = structure(known)
    similarity = torch.stack([structure(turned) @ rows.T for turned in eight])   # (8, N, M)
    best, index = similarity.max(2)
    similarity, turn = best.max(0)
    place = torch.arange(len(images))
    return similarity, index[turn, place], eight[turn, place]


# ---- scales and flags

@dataclass
class Scale:
    """How large a comparison is."""
    counts: tuple                    # real training images per class, or training tiles (0: all)
    seeds: int                       # repetitions with other weights and batches
    redraw: bool                     # whether each seed has its own training images and generator
    generated: int                   # synthetic images per class
    sampling_steps: int              # calls of the network per synthetic image
    guidance: float                  # guidance scale
    drawn: int                       # scenes per class, or tiles, if there are no data
    gen: train_gen.Config
    cls: train_cls.Config
    arms: tuple = ()                 # the arms that are run by default (empty: all)


# augment="none", else synthetic images would bring turns into arms without augmentation.
_SMOKE = Scale(
    counts=(4, 8), seeds=2, redraw=True, generated=8, sampling_steps=4, guidance=1.5, drawn=30,
    gen=train_gen.Config(size=16, width=16, mults=(1, 2), blocks=1, steps=10, batch=16, warmup=5,
                         augment="none"),
    cls=train_cls.Config(size=16, patch=4, dim=32, depth=1, heads=2, steps=10, batch=32, warmup=5))
_SMALL = Scale(
    counts=(4,), seeds=5, redraw=False, generated=60, sampling_steps=12, guidance=1.5, drawn=160,
    gen=train_gen.Config(size=24, width=32, mults=(1, 2, 4), blocks=1, patch=2, predict="x0",
                         steps=800, batch=32, lr=2e-3, warmup=50, ema=0.99, augment="none"),
    cls=train_cls.Config(size=24, patch=4, dim=64, depth=1, heads=2, steps=200, batch=64, lr=4e-3,
                         warmup=50))
_MEDIUM = replace(
    _SMALL, counts=(20,), redraw=True,
    gen=train_gen.Config(mults=(1, 2, 4), blocks=1, patch=2, predict="x0", steps=3000, batch=64,
                         lr=1e-3, warmup=100, ema=0.995, augment="none"),
    cls=train_cls.Config(patch=8, dim=128, depth=2, heads=4, steps=2000, batch=64, lr=2e-3,
                         warmup=100))
_FULL = replace(_MEDIUM, counts=(10, 70, 400), generated=700, drawn=700,
                gen=train_gen.Config(augment="none"), cls=train_cls.Config())
SCALES = {
    "scenes": dict(smoke=_SMOKE, small=_SMALL, medium=_MEDIUM, full=_FULL),
    "buildings": dict(
        smoke=replace(_SMOKE, counts=(12,), drawn=64),
        small=replace(_SMALL, counts=(8,), drawn=256, gen=replace(_SMALL.gen, steps=700),
                      cls=replace(_SMALL.cls, steps=550),
                      arms=tuple(name for name in TASKS["buildings"].arms
                                 if name not in ("real", "balanced + copy-paste"))),
        medium=replace(_MEDIUM, counts=(32,), redraw=False, drawn=256),
        full=replace(_FULL, counts=(300, 0), generated=5000, drawn=1000, redraw=False)),
}


@dataclass
class Config(data.Settings):
    """The flags. Where one is empty or 0, --scale decides."""
    data: str = flag("", "tree with a folder per class, caption set or xBD tree (empty: draw both)")
    out: str = flag("runs/experiment", "folder for report.html, results.csv, runs and generators")
    scale: str = flag("", "empty: medium for --data on a GPU, else small", choices=SCALES["scenes"])
    dry_run: bool = flag(False, "print the plan and run nothing")
    task: str = flag("", "without --data: run only this one (empty: both)", choices=TASKS)
    arms: str = flag("", "which arms, by comma, or all (empty: those of --scale)")
    study: str = flag("", f"more arms, by comma: {', '.join(STUDIES)}")
    counts: tuple = flag((), "by comma: real images per class, or of buildings tiles (0: all)", 0)
    seeds: int = flag(0, "repetitions", 0, 1000)
    redraw: bool = flag(False, "new training images and a new generator for each seed")
    size: int = flag(0, "side of the images in pixels", 0, 512)
    generated: int = flag(0, "synthetic images per class", 0, 1_000_000)
    gen_steps: int = flag(0, "optimizer steps of a generator", 0)
    cls_steps: int = flag(0, "optimizer steps of a classifier", 0)
    init: str = flag("", "weights of a CLIP, ours or published: adds the arms of He et al. 2023")
    hold_out: str = flag("", "xBD event to test on: none of its images is trained on")
    jobs: int = flag(0, "processes of one thread each (0: one per core; on a GPU: 1)", 0, 256)

    def __post_init__(self):
        super().__post_init__()
        arms = dict.fromkeys(["all", *(name for task in TASKS.values() for name in task.arms)])
        for name, asked, known in (("arms", self.arms, arms), ("study", self.study, STUDIES)):
            if unknown := [word for word in listed(asked) if word not in known]:
                raise ValueError(f"--{name} {unknown[0]}: known are {', '.join(known)}")
        if self.counts and not (self.data or self.task):
            raise ValueError("--counts needs --task, scenes or buildings")
        self.resolved("scenes")                              # refuses sizes that do not fit

    def tasks(self):
        """Return the names of the tasks to run."""
        if self.data and self.task:
            raise UserError(f"--task {self.task}: --data decides which it is; give one of them")
        task = self.task
        if self.data:
            task = "buildings" if data.is_xbd(self.data) else "scenes"
        if self.init and task != "scenes":
            raise UserError("--init is not for buildings, which have masks; give --task scenes")
        return [task] if task else list(TASKS)

    def resolved(self, task):
        """Return the Scale of a task, changed by these flags."""
        default = "medium" if self.data and torch.cuda.is_available() else "small"
        scale = SCALES[task][self.scale or default]
        counts = self.counts or scale.counts
        # The patch doubles as the image does: the number of tokens stays about equal.
        size = self.size or scale.gen.size
        growth = 2.0 ** round(math.log2(size / scale.gen.size))
        patch = math.gcd(size, max(2, int(scale.cls.patch * growth)))
        return replace(
            scale, counts=tuple(sorted(set(counts), key=lambda count: count or math.inf)),
            seeds=self.seeds or scale.seeds, redraw=self.redraw or scale.redraw,
            generated=self.generated or scale.generated,
            gen=replace(scale.gen, size=size, steps=self.gen_steps or scale.gen.steps),
            cls=replace(scale.cls, size=size, patch=patch, steps=self.cls_steps or scale.cls.steps))

    def selected_arms(self, task, default):
        """Return the arms of a task that are asked for, {name: Arm}, with those of studies last."""
        asked = listed(self.arms) or default or ["all"]
        arms = {name: arm for name, arm in task.arms.items() if name in asked or "all" in asked}
        if arms:                                 # every verdict needs the linear baseline
            arms |= {name: arm for name, arm in task.arms.items()
                     if arm.model == "linear" and not arm.source}
        for study in listed(self.study):
            for name, change in STUDIES[study].items():
                if task.rare_only or change.get("augment") != "copypaste":   # scenes have no masks
                    arms[f"{study}: {name}"] = replace(task.arms[task.main_arm], **change)
        return arms | (CLIP_ARMS if self.init else {})


# ---- the page

SUBJECTS = {"generator": ("synthetic images", ""),
            "fresh": ("fresh real images instead", " (the upper bound: a perfect generator)"),
            "copies": ("copies of the real images", " (the negative control: nothing new)")}


def answers(comparison, found):
    """Return the answer in words, a paragraph per number of real images; found are the claims()."""
    paragraphs, seeds = [], comparison.seeds_done()
    if seeds < comparison.scale.seeds:
        paragraphs.append(f"Unfinished: {seeds} of {comparison.scale.seeds} seeds are done.")
    for count in comparison.scale.counts:
        explain = count == comparison.scale.counts[0]
        sentences = [sentence(comparison, claim, explain) for claim in found
                     if claim.count == count]
        near = comparison.near_duplicates.get(count)
        if near and near.p < ALARM:
            sentences.append(f"{100 * near.found / near.total:.1f} % of the synthetic images are "
                             "near-duplicates of training images")
        if sentences:
            sentences[0] = f"with {comparison.amount(count)}, {sentences[0]}"
            paragraphs.append(" ".join(f"{text[0].upper()}{text[1:]}." for text in sentences))
    return paragraphs or ["No answer: a claim needs two seeds of both its arms."]


def sentence(comparison, claim, explain):
    """Write a Claim as a sentence; explain: say in half a sentence what a control is."""
    points = claim.gain.text(" points")
    if explain and claim.arm == comparison.task.main_arm:
        points += f" of {comparison.task.score} (95 % interval)"
    subject, role = SUBJECTS[comparison.arms[claim.arm].source]
    if claim.arm == comparison.task.main_arm and not comparison.scale.redraw:
        subject += " of one generator"
    subject += role if explain else ""
    if claim.base == "real":
        subject = f"without augmentation, {subject}"
    elif claim.base != dict(comparison.task.claims)[comparison.task.main_arm]:
        subject += f" ({claim.arm} against {claim.base})"
    nothing = f"made no difference that {claim.gain.seeds} seeds could show"
    return f"{subject} " + {
        "helps": f"add {points.lstrip('+')}", "hurts": f"hurt: {points}",
        "no difference shown": f"{nothing}: {points}",
        "too few seeds": f"get no verdict, as it takes three seeds: {points}",
        "below the linear baseline": f"get no verdict, as the linear baseline is higher: {points}",
    }[claim.verdict]


def conditions(comparison):
    """Return what the claims of a Comparison mean, and what they hold for, as two paragraphs."""
    scale, scenes, test = comparison.scale, comparison.scenes, comparison.test
    draws = "the same training images and one generator (others may give another gain)"
    if scale.redraw:
        draws = "training images and a generator each, from one pool, so that they overlap"
    together, tiles = f"Duplicates ({len(scenes) - len(scenes.groups.unique())} were found)", ""
    rest = "" if comparison.cfg.data else "Drawn pictures say nothing about the world."
    if scenes.tiles:
        together = "The buildings of a tile, and of its duplicates,"
        tiles = f" of {len(test.groups.unique())} tiles"
        rest += (" A building is seen after the disaster, with its mask. Here synthetic, fresh or "
                 "copied images replace half of rarer classes only. Balanced: classes are drawn "
                 "equally often; then the logits are shifted towards common classes, as far as is "
                 f"best on {len(comparison.val)} val images. Macro-F1: the mean F1 of the classes.")
    return (
        "A claim compares two arms, which are ways to train the classifier. Steps and images per "
        "step are equal: synthetic images (or fresh ones, or copies) replace half of the real "
        "ones, or all if the arm is synthetic alone. p: how often equal arms would differ this "
        "much by chance, corrected by Holm's method, for controls separately. No interval is "
        "corrected. No verdict if both arms are below the linear baseline: the better of a linear "
        "classifier on real images (colours and edges) and always answering the commonest class.",
        f"This holds for {comparison.title} at {scale.cls.size} px, {len(test)} test images"
        f"{tiles}, {comparison.seeds_done()} seeds (repetitions) with "
        f"{draws}; {scale.gen.steps} steps of a generator, {scale.generated} synthetic images per "
        f"class, {scale.cls.steps} steps of a classifier. {together} stay in one part, never in "
        f"both training and test. {rest}")


def shown(p):
    """Write a p-value with two digits."""
    return f"{p:.2g}" if p >= 0.001 else "< 0.001"


def claim_table(comparison, found):
    """Return the header and the rows of the table of claims."""
    rows = []
    for claim in found:
        name = comparison.label(f"{claim.arm} against {claim.base}", claim.count)
        rows.append([name, claim.gain.text(), claim.verdict, shown(claim.p)])
    return ["claim", f"points of {comparison.task.score} [95 %]", "verdict", "p after Holm"], rows


def arms_table(comparison):
    """Return the header and the rows of the table of all arms, below always the commonest class."""
    test, score, (name, trivial) = comparison.test, comparison.task.score, commonest(comparison)
    columns = [f"F1 {test.classes[c]}" for c in test.labels.unique()]
    columns *= len(columns) <= 5                 # of more, results.csv has them
    bases = [base for base in comparison.task.bases if base in comparison.arms]
    rows = [[f"always {name}", "", f"{trivial:.1f}"]]
    for count in comparison.scale.counts:
        for arm in comparison.arms:
            values = [100 * row[score] for row in comparison.rows_of(arm, count)]
            if not values:
                continue
            augmented = "" if comparison.arms[arm].augment == "none" else "yes"
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells = [comparison.label(arm, count), augmented, f"{np.mean(values):.1f}{spread}"]
            gains = [difference(comparison, arm, base, count) for base in bases]
            cells += [gain.text() if gain else "" for gain in gains]
            means = [comparison.mean(arm, count, column) for column in ("train", *columns)]
            rows.append(cells + [f"{mean:.1f}" for mean in means])
    return ["arm", "augmented", f"{score}, %", *(f"points against {base}" for base in bases),
            f"{score} on real training images, %", *(f"{column}, %" for column in columns)], rows


def write_page(comparisons):
    """Write what has been run so far: report.html, which needs no other file, and results.csv."""
    out, body, rows = Path(comparisons[0].cfg.out), [], []
    for comparison in comparisons:
        if comparison.rows:
            body += task_html(comparison)
            rows += comparison.rows.values()
    commits = sorted({row["commit"] for row in rows})
    body += [tag("h2", "Run it again"), tag("pre", shlex.join(["python", *sys.argv])),
             tag("p", f"torch {torch.__version__}, commit {', '.join(commits)}; see results.csv")]
    data.write(out / "report.html", HEAD + "\n".join(body))
    header = list(dict.fromkeys(name for row in rows for name in row if name != "answers"))
    cells = [[row.get(name, "") for name in header] for row in rows]
    data.save_csv(out / "results.csv", header, cells)


def task_html(comparison):
    """Return what the page says of a task, in pieces of HTML: the answer, then its grounds."""
    found = claims(comparison)
    body = [tag("h2", comparison.title)]
    body += [tag("p class=answer", paragraph) for paragraph in answers(comparison, found)]
    body += [interval_plot(comparison, found)] if found else []
    for count, near in comparison.near_duplicates.items():
        body += synthetic_html(comparison, count, near)
    return [*body, tag("h3", "Claims"), table(*claim_table(comparison, found)),
            *(tag("p", text) for text in conditions(comparison)),
            tag("h3", "All arms"), table(*arms_table(comparison)),
            tag("p", "±: standard deviation over seeds")]


def synthetic_html(comparison, count, near):
    """Show synthetic images of a count beside real ones; say whether they are near-duplicates."""
    subset, rows = choose_subset(comparison, count, 0), []
    synthetic = synthesize(subset, comparison.task.arms[comparison.task.main_arm])
    for c in synthetic.labels.unique():
        real, made = (scenes.images[scenes.labels == c][:8] for scenes in (subset.real, synthetic))
        rows += [[f"{synthetic.classes[c]}: real", real], ["synthetic", made]]
    body = [tag("h3", f"Synthetic images, with {comparison.amount(count)}"),
            table(["", "real training images, and synthetic ones (of the first seed)"], rows)]
    if not near:
        return body
    answer = ("More near-duplicates than by chance: a sign of memorised images" if near.p < ALARM
              else "No sign of memorised training images" if near.least_p < ALARM
              else "Too few images to say whether the generator has memorised training images")
    found, expected = 100 * near.found / near.total, 100 * near.expected / near.total
    text = (f"{answer}. {found:.1f} % of {near.total} synthetic images are near-duplicates: each "
            "is more like a training image of its class than any held-out image is. By chance "
            f"{expected:.1f} % would be (p {shown(near.p)}). The nearest pairs:")
    pairs = [["synthetic", near.synthetic[:8]], ["nearest real", near.nearest[:8]]]
    return [*body, tag("p", text), table(["", ""], pairs)]


def interval_plot(comparison, found):
    """Plot the gains of Claims as SVG, with an axis of points below."""
    spans = []
    for claim in found:
        mean, half = 100 * claim.gain.mean, 100 * min(claim.gain.half, 0.5)
        spans.append((mean - half, mean, mean + half))
    low, high = min(0, np.min(spans)), max(0, np.max(spans))
    step = next((step for step in (1, 2, 5, 10) if high - low <= 6 * step), 20)
    def x(points):
        return round(20 + 400 * (points - low) / (high - low or 1), 1)

    foot, parts = 40 * len(found) + 4, []
    for tick in range(step * math.ceil(low / step), step * math.floor(high / step) + 1, step):
        parts.append(f'<path d="M{x(tick)} 0V{foot}" stroke-opacity="{0.2 if tick else 1}"/>'
                     f'<text x="{x(tick)}" y="{foot + 16}" text-anchor="middle">{tick}</text>')
    for k, (claim, (left, mean, right)) in enumerate(zip(found, spans, strict=True)):
        name = html.escape(comparison.label(f"{claim.arm} against {claim.base}", claim.count))
        y = 40 * k + 26
        parts.append(f'<text x="4" y="{y - 12}">{name}</text><path stroke-width="3" '
                     f'd="M{x(left)} {y}H{x(right)}M{x(mean)} {y - 6}v12"/>')
    caption = f"Gain in points of {comparison.task.score}; 95 % interval over seeds and test images"
    return (f'<figure><svg viewBox="0 0 440 {foot + 20}" role="img">{"".join(parts)}</svg>'
            f"{tag('figcaption', caption)}</figure>")


def tag(name, text):
    """Write an HTML element: its name, perhaps with attributes, and its text."""
    return f"<{name}>{html.escape(text)}</{name.split()[0]}>"


def table(header, rows):
    """Write an HTML table of text and images (N, C, H, W), in a box in which it can be scrolled."""
    lines = ["".join(tag("th", text) for text in header)]
    lines += ["".join(map(cell, row)) for row in rows]
    return f"<div class=scroll><table><tr>{'<tr>'.join(lines)}</table></div>"


def cell(content):
    """Write a cell of an HTML table: text, or images (N, C, H, W) side by side."""
    if torch.is_tensor(content):
        file = io.BytesIO()
        data.grid(content, len(content), zoom=max(1, 64 // content.shape[-1])).save(file, "png")
        source = base64.b64encode(file.getvalue()).decode()
        return f'<td><img alt="" src="data:image/png;base64,{source}">'
    return f"<td>{html.escape(content)}"


HEAD = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
.answer { font-size: 1.2rem } figure { margin: 1.5rem 0 } pre, .scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8886 }
td:first-child { min-width: 8rem } td + td { white-space: nowrap }
svg { width: 100%; max-width: 36rem; font-size: 13px; fill: currentColor; stroke: currentColor }
text { paint-order: stroke; stroke: Canvas; stroke-width: 5px }
img { image-rendering: pixelated; display: block }
</style><title>QUESTION</title><h1>QUESTION</h1>""".replace("QUESTION", __doc__.split("\n")[0])


# ---- the terminal

def print_plan(comparison, missing, generators, jobs):
    """Print what is compared, and what of it takes the time."""
    scale, scenes, arms = comparison.scale, comparison.scenes, comparison.arms
    sizes = ", ".join(f"{len(index)} {part}" for part, index in comparison.parts.items())
    counts = " and ".join(str(count or "all") for count in scale.counts)
    networks = [run for run in missing if run.task == comparison.name
                and arms[run.arm].model not in ("linear", "zero-shot")]
    untrained = [draw for task, count, draw in generators if task == comparison.name
                 and not (comparison.folder(count) / f"draw{draw}" / "generator.pt").exists()]
    print(f"{comparison.title}: {len(scenes)} images of {len(scenes.classes)} classes at "
          f"{scale.cls.size} px ({sizes})\n  {counts} {comparison.task.unit} x {scale.seeds} seeds "
          f"x {len(arms)} arms\n  time goes into {len(untrained)} generators of {scale.gen.steps} "
          f"steps, then {len(networks)} classifiers of {scale.cls.steps} steps, {jobs} at a time")


def print_answers(comparisons):
    """Print the answer and the claims of each task. Everything else is on the page."""
    for comparison in comparisons:
        found = claims(comparison)
        header, rows = claim_table(comparison, found)
        print(f"\n{comparison.title.upper()}")
        for paragraph in answers(comparison, found):
            print(textwrap.fill(paragraph, 110))
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in [header, *rows] if rows else []:
            print("  ".join(map(str.ljust, row, widths)).rstrip())
    out = Path(comparisons[0].cfg.out)
    print(f"\nThe page: {out / 'report.html'}   Every run: {out / 'results.csv'}")


if __name__ == "__main__":
    data.launch(main, Config)
