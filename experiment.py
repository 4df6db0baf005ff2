"""Do images from a diffusion model improve a classifier of overhead imagery, and compared with what?

    python experiment.py                             drawn pictures: minutes on a CPU; a test of the method
    python experiment.py --data data/NWPU-RESISC45   the question itself, of scenes
    python experiment.py --data data/xbd             and of buildings: damage is rare_only, every disaster new

For each number of real images and each draw of them from the training split: train a generator on exactly
these, of buildings on their rarer classes, and make a synthetic set with it. Then for each seed train the
same classifier once per arm, and score it on the test split. The rules:

    equal budget   every network takes the same optimizer steps and images per step: a synthetic image takes
                   the place of a real one
    no leak        a generator is trained on its arm's real training images alone; nothing is chosen on test
    paired         a seed fixes images, weights and batches in all arms: differences are per seed and image

In this order: what is compared; the runs; statistics; what synthetic images are like; the page.
"""
import base64
import functools
import hashlib
import html
import io
import itertools
import json
import math
import os
import re
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
from data import UserError, Scenes, flag, listed
from train_cls import accuracy, f1, harmonic_f1, macro_f1, counts_per_group, class_counts

SCORES = {"accuracy": accuracy, "macro-F1": macro_f1, "harmonic F1": harmonic_f1}


# ---- what is compared

@dataclass(frozen=True)
class Arm:
    """What a classifier is trained on; steps and images per step are the same in all."""
    source: str = ""              # of images in the place of real ones: generator, fresh or copies
    share: float = 0.0            # probability that one does
    augment: str = "none"         # augmentations by name, of real images and of those in their place
    balance: bool = False         # all classes equally often, however rare_only
    model: str = "vit"            # one of train_cls.MODELS; clip: --init under a head; zero-shot: untrained
    pretrain: bool = False        # synthetic images first, then real ones, in the same number of steps
    shuffle: bool = False         # each image of the source gets the label of another one
    clip_filter: bool = False           # CLIP picks the images of the source, and softens their labels
    guidance: float | None = None        # guidance scale; here, at sampling_steps and generated, the default is --scale's
    sampling_steps: int = 0                # network sampling_steps per synthetic image
    generated: int = 0                 # synthetic images per class, and fresh ones at most
    strength: float = 0.0            # each synthetic image starts at this share of the chain from a real one


@dataclass(frozen=True)
class Task:
    """One half of the comparison: what is recognised, by which arms, and what is claimed of them."""
    arms: dict
    main_arm: str                      # the arm that the studies vary
    bases: tuple                  # the table says what each arm gains over these
    claims: tuple                 # (arm, base): does it help?
    scores: tuple                 # of SCORES; claims are about the first
    unit: str                      # what --counts counts
    rare_only: bool = False            # a generator makes images of the rarer classes only


AUGMENTED, BALANCED = Arm(augment=OVERHEAD), Arm(augment=OVERHEAD, balance=True)
TUNED = Arm("generator", 0.5, model="clip")
TASKS = {
    "scenes": Task(
        arms={
            "real":                            Arm(),
            "real + augmentation":             AUGMENTED,
            "synthetic only":                  replace(AUGMENTED, source="generator", share=1.0),
            "real + synthetic":                Arm("generator", 0.5),
            "real + synthetic + augmentation": replace(AUGMENTED, source="generator", share=0.5),
            "real + fresh real":               replace(AUGMENTED, source="fresh", share=0.5),      # ceiling
            "real + copies":                   replace(AUGMENTED, source="copies", share=0.5),     # no news
            "linear: real":                    Arm(model="linear"),
            "linear: synthetic only":          Arm("generator", 1.0, model="linear"),
            "linear: real + synthetic":        Arm("generator", 0.5, model="linear"),
        },
        main_arm="real + synthetic + augmentation", bases=("real", "real + augmentation"),
        claims=(("real + synthetic + augmentation", "real + augmentation"),
                ("real + synthetic", "real"),
                ("real + fresh real", "real + augmentation"),
                ("real + copies", "real + augmentation"),
                ("clip: synthetic only", "clip: zero-shot"),
                ("clip: real + synthetic", "clip: real"),
                ("clip: real + edited", "clip: real"),
                ("clip: real + fresh real", "clip: real"),
                ("clip: real + copies", "clip: real")),
        scores=("accuracy",), unit="real images per class"),
    "buildings": Task(
        arms={
            "real":                            AUGMENTED,
            "balanced":                        BALANCED,
            "balanced + synthetic":            replace(BALANCED, source="generator", share=0.5),
            "balanced + copy-paste":           replace(BALANCED, augment=f"{OVERHEAD},copypaste"),
            "balanced + fresh real":           replace(BALANCED, source="fresh", share=0.5),
            "balanced + copies":               replace(BALANCED, source="copies", share=0.5),
            "linear: balanced":                Arm(balance=True, model="linear"),
            "linear: balanced + synthetic":    Arm("generator", 0.5, balance=True, model="linear"),
        },
        main_arm="balanced + synthetic", bases=("balanced", "balanced + copy-paste"),
        claims=(("balanced + synthetic", "balanced"),
                ("balanced + fresh real", "balanced"),
                ("balanced + copies", "balanced")),
        scores=("macro-F1", "harmonic F1"), unit="training tiles", rare_only=True),
}
# The protocols of He et al. 2023, with --init: CLIP under a head that the names of classes begin, trained on
# synthetic images that it recognises, with soft targets; on few real images and synthetic ones, generated from
# noise or from the real ones. (Their third, synthetic images first, is among the controls.)
CLIP = {
    "clip: zero-shot":         Arm(model="zero-shot"),
    "clip: real":              Arm(model="clip"),
    "clip: synthetic only":    replace(TUNED, share=1.0, clip_filter=True),
    "clip: real + synthetic":  TUNED,
    "clip: real + edited":     replace(TUNED, strength=0.35),
    "clip: real + fresh real": replace(TUNED, source="fresh"),
    "clip: real + copies":     replace(TUNED, source="copies"),
}
ALONE = dict(source="", share=0.0)                                   # no image of a source
STUDIES = {       # what an arm does not say here is as in its task's main_arm of real and synthetic images
    "share": {str(p): dict(share=p) for p in (0.25, 0.75, 1.0)},
    "generated": {f"{n} {how}": dict(generated=n, share=p)
             for n in (10, 30, 100, 300) for how, p in (("mixed", 0.5), ("alone", 1.0))},
    "guidance": {str(w): dict(guidance=w) for w in (1.0, 3.0, 5.0)},
    "sampling-steps": {str(n): dict(sampling_steps=n, share=1.0) for n in (4, 8, 20, 50)},
    "strength": {f"{t:.2f}": dict(strength=t) for t in (0.15, 0.3, 0.5, 0.7, 0.9)},
    "augment": {name: dict(augment=name, **ALONE) for name in ("none", *AUGMENTATIONS)},
    "model": {f"{model}, {how}": dict(model=model, **more) for model in ("resnet", "patches")
              for how, more in (("real", ALONE), ("real + synthetic", {}))},
    "controls": {"shuffled labels": dict(shuffle=True), "synthetic first, then real": dict(pretrain=True)},
}


@dataclass
class Scale:
    """How large a comparison is."""
    counts: tuple                             # real training images per class, or training tiles (0: all)
    seeds: int                                # repetitions: weights, batches
    redraw: bool                              # has each seed training images and a generator of its own?
    generated: int                                 # synthetic images per class
    sampling_steps: int                                # network sampling_steps per synthetic image
    guidance: float                                  # guidance scale
    drawn: int                                # scenes per class, or tiles, where no data are given
    gen: train_gen.Config
    cls: train_cls.Config
    arms: tuple = ()                          # which arms are run if none are asked for (empty: all)


_SMOKE = Scale(
    counts=(4, 8), seeds=2, redraw=True, generated=8, sampling_steps=4, guidance=1.5, drawn=30,
    gen=train_gen.Config(size=16, width=16, mults=(1, 2), blocks=1, steps=10, batch=16, warmup=5,
                         augment="none"),
    cls=train_cls.Config(size=16, patch=4, dim=32, depth=1, heads=2, steps=10, batch=32, warmup=5))
_SMALL = Scale(
    counts=(4,), seeds=5, redraw=False, generated=60, sampling_steps=12, guidance=1.5, drawn=160,
    gen=train_gen.Config(size=24, width=32, mults=(1, 2, 4), blocks=1, patch=2, predict="x0", steps=800,
                         batch=32, lr=2e-3, warmup=50, ema=0.99, augment="none"),
    cls=train_cls.Config(size=24, patch=4, dim=64, depth=1, heads=2, steps=200, batch=64, lr=4e-3, warmup=50))
_MEDIUM = replace(
    _SMALL, counts=(20,), redraw=True,
    gen=train_gen.Config(mults=(1, 2, 4), blocks=1, patch=2, predict="x0", steps=3000, batch=64, lr=1e-3,
                         warmup=100, ema=0.995, augment="none"),
    cls=train_cls.Config(patch=8, dim=128, depth=2, heads=4, steps=2000, batch=64, lr=2e-3, warmup=100))
# A generator that saw its images turned and flipped would bring this augmentation to arms that have none.
_FULL = Scale(
    counts=(10, 70, 400), seeds=5, redraw=True, generated=700, sampling_steps=12, guidance=1.5, drawn=700,
    gen=train_gen.Config(augment="none"), cls=train_cls.Config())
SCALES = {
    "scenes": dict(smoke=_SMOKE, small=_SMALL, medium=_MEDIUM, full=_FULL),
    "buildings": dict(
        smoke=replace(_SMOKE, counts=(12,), drawn=64),
        small=replace(_SMALL, counts=(8,), drawn=256,
                      gen=replace(_SMALL.gen, steps=700), cls=replace(_SMALL.cls, steps=550),
                      arms=("balanced", "balanced + synthetic", "balanced + fresh real", "balanced + copies",
                            "linear: balanced", "linear: balanced + synthetic")),
        medium=replace(_MEDIUM, counts=(32,), redraw=False, drawn=256),
        full=replace(_FULL, counts=(0,), generated=5000, drawn=1000, redraw=False)),
}


@dataclass
class Config(data.Settings):
    """What may be asked for on the command line. 0, empty or None: as --scale has it; --guidance 0 is a scale."""
    data: str = flag("", "tree with a folder per class, or xBD tree (empty: both are drawn)")
    out: str = flag("runs/experiment", "folder for results.csv, report.html, runs, generators")
    scale: str = flag("", "size (empty: medium for --data on a GPU, else small)", choices=SCALES["scenes"])
    dry_run: bool = flag(False, "print the plan: runs, steps, time; draw what is missing, run nothing")
    task: str = flag("", "without --data: only one (empty: both)", choices=TASKS)
    arms: str = flag("", "which arms, by comma, or all (empty: those of --scale)")
    study: str = flag("", f"more arms, by comma: {', '.join(STUDIES)}")
    counts: str = flag("", "real images per class, or for buildings training tiles (0: all), by comma")
    seeds: int = flag(0, "repetitions", 0, 1000)
    redraw: bool = flag(False, "new training images and a new generator for each seed (always if not small)")
    size: int = flag(0, "side of the images in pixels, a multiple of 8", 0, 512)
    generated: int = flag(0, "synthetic images per class", 0, 1_000_000)
    guidance: float | None = flag(None, "guidance scale (1: no guidance, 0: no class)", 0, 100)
    gen_steps: int = flag(0, "optimizer steps of a generator", 0)
    cls_steps: int = flag(0, "optimizer steps of a classifier", 0)
    init: str = flag("", "weights of a CLIP, ours or published ones: adds the arms of He et al. 2023")
    hold_out: str = flag("", "xBD event to test on, never to train on")
    skip_broken: bool = flag(False, "leave out pictures that do not decode")
    jobs: int = flag(0, "runs at a time, each a process of one thread (0: a core each; 1 on a GPU)", 0, 256)

    def __post_init__(self):
        super().__post_init__()
        arms = dict.fromkeys(["all", *(name for task in TASKS.values() for name in task.arms)])
        for what, asked, known in (("arms", self.arms, arms), ("study", self.study, STUDIES)):
            if unknown := [name for name in listed(asked) if name not in known]:
                raise ValueError(f"--{what} {unknown[0]}: known are {', '.join(known)}")
        if self.counts and not (self.data or self.task):
            raise ValueError(f"--counts {self.counts}: of which --key, scenes or buildings?")
        if self.size % 8:
            raise ValueError(f"--size {self.size} is not a multiple of 8")
        if min(self.resolved("scenes").counts) < 0:          # a bad size is told here, too
            raise ValueError(f"--counts {self.counts}: below 0")

    def tasks(self):
        """List the names of the tasks to run."""
        if self.data and self.task:
            raise UserError(f"--key {self.task}: --data decides which task it is; give one of them")
        named = self.task or (self.data and ("buildings" if data.is_xbd(self.data) else "scenes"))
        if self.init and named != "scenes":
            raise UserError("--init is for scenes, as CLIP knows no masks: give --key scenes, or --data")
        return [named] if named else list(TASKS)

    def resolved(self, task):
        """Find the Scale of a task that these flags stand for."""
        usual = "medium" if self.data and torch.cuda.is_available() else "small"
        s = SCALES[task][self.scale or usual]
        counts = data.integers(self.counts) if self.counts else s.counts
        size = self.size or s.gen.size
        scaled = int(s.cls.patch * 2.0 ** round(math.log2(size / s.gen.size)))
        patch = math.gcd(size, max(2, scaled))                         # about as many tokens at any size
        return replace(s, counts=tuple(sorted(set(counts), key=lambda n: n or math.inf)),
                       seeds=self.seeds or s.seeds, redraw=self.redraw or s.redraw,
                       generated=self.generated or s.generated, guidance=s.guidance if self.guidance is None else self.guidance,
                       gen=replace(s.gen, size=size, steps=self.gen_steps or s.gen.steps),
                       cls=replace(s.cls, size=size, patch=patch, steps=self.cls_steps or s.cls.steps))

    def wanted(self, task, usual):
        """List the arms of a task that are asked for, {name: Arm}, those of the studies last."""
        asked = listed(self.arms) or usual or ["all"]
        arms = {name: arm for name, arm in task.arms.items() if name in asked or "all" in asked}
        for study in listed(self.study):
            for name, change in STUDIES[study].items():
                if task.rare_only or change.get("augment") != "copypaste":                 # scenes have no masks
                    arms[f"{study}: {name}"] = replace(task.arms[task.main_arm], **change)
        return arms | (CLIP if self.init else {})


# ---- the runs

@dataclass
class Comparison:
    """A task with its images, and the runs that are done."""
    name: str
    task: Task
    arms: dict
    s: Scale
    cfg: Config
    title: str                                # of the data
    scenes: Scenes
    parts: dict
    rows: dict = field(default_factory=dict)                             # {(count, seed, arm): row}
    fidelities: dict = field(default_factory=dict)                            # {count: what fidelity() found}

    def __post_init__(self):
        self.out = Path(self.cfg.out) / self.name
        self.val, self.test = (self.scenes[self.parts[part]] for part in ("val", "test"))
        self.metric = self.task.scores[0]                                 # the score that claims are about

    @functools.cached_property
    def settings(self):
        """Say what decides a run beside its count, seed and arm, as JSON has it."""
        init = self.cfg.init                                 # a file, or the name of published weights
        weights = hashed(Path(init).read_bytes() if Path(init).is_file() else init)
        scale = {k: v for k, v in asdict(self.s).items() if k not in ("counts", "seeds", "arms", "drawn")}
        return json.loads(json.dumps(scale | dict(images=self.scenes.digest, weights=weights,
                                                  hold_out=self.cfg.hold_out)))

    def draw(self, seed):
        """Number the draw of training images of a seed."""
        return seed if self.s.redraw else 0


class Subset(NamedTuple):
    """What all arms of a count and a draw share."""
    comparison: Comparison
    real: Scenes                              # the training images
    fresh: Scenes                             # what they leave of the training split, but for their doubles
    out: Path
    draw: int

    def possible(self, arm):
        """Can it be run here? Fewer fresh images than real ones, drawn again and again, would rather hurt."""
        have, need = (x.labels.bincount(minlength=len(self.real.classes)) for x in (self.fresh, self.real))
        return arm.source != "fresh" or bool((have >= need).all())


@functools.lru_cache(1)                                      # the last one is kept: its images may be large
def subset_of(name, count, draw):
    """Choose the training images of a count and a draw. -> Subset. RuntimeError if they leak."""
    comparison = COMPARISONS[name]
    train, groups = comparison.parts["train"], comparison.scenes.groups
    index = data.choose(comparison.scenes, train, count, draw)
    others = train[~torch.isin(groups[train], groups[index])]
    others = others[torch.randperm(len(others), generator=data.rng(draw))]
    if torch.isin(comparison.test.groups, groups[train]).any():
        raise RuntimeError("a training image, its double or its neighbour is in the test split")
    out = comparison.out / str(count or "all") / f"draw{draw}"
    return Subset(comparison, comparison.scenes[index], comparison.scenes[others], out, draw)


def hashed(content):
    """Name content, bytes or what repr() tells of it, by 12 hexadecimal digits."""
    return hashlib.sha256(content if isinstance(content, bytes) else repr(content).encode()).hexdigest()[:12]


COMPARISONS = {}                                                   # of this process, by name


def main(cfg):
    """Run what is missing, renew the page on the way, print tables and answers. -> [Comparison]."""
    enter(cfg)
    comparisons, usual = list(COMPARISONS.values()), os.cpu_count() if data.pick_device().type == "cpu" else 1
    jobs = cfg.jobs or usual
    runs = [(comparison.name, count, seed, arm)
             for comparison in comparisons for seed in range(comparison.s.seeds) for count in comparison.s.counts
             for arm, how in comparison.arms.items() if subset_of(comparison.name, count, comparison.draw(seed)).possible(how)]
    runs.sort(key=lambda key: key[2])                                 # seed by seed, in both tasks
    for name, count, seed, arm in runs:
        if row := read_run(COMPARISONS[name], count, seed, arm):
            COMPARISONS[name].rows[count, seed, arm] = row
    makes = list(dict.fromkeys((name, count, COMPARISONS[name].draw(seed)) for name, count, seed, arm in runs
                               if COMPARISONS[name].arms[arm].source == "generator"))
    missing = [key for key in runs if key[1:] not in COMPARISONS[key[0]].rows]
    if cfg.init:
        tuned(comparisons[0])                                      # told at once if it is no CLIP
    for comparison in comparisons:
        plan(comparison, missing, makes, jobs)
    if cfg.dry_run:
        return comparisons
    with workers(jobs, enter, cfg) as pool:
        fidelities = data.progress(pool.map(make, makes), "generators", len(makes))
        for (name, count, _), look in zip(makes, fidelities, strict=True):
            if look:
                COMPARISONS[name].fidelities[count] = look
        rows = data.progress(zip(missing, pool.map(run, missing), strict=True), "classifiers", len(missing))
        for (name, count, seed), some in itertools.groupby(rows, key=lambda pair: pair[0][:3]):
            comparison = COMPARISONS[name]
            comparison.rows |= {key[1:]: row for key, row in some}
            scored = [f"{arm} {100 * comparison.rows[count, seed, arm][comparison.metric]:.1f}" for arm in comparison.arms
                      if (count, seed, arm) in comparison.rows]
            print(f"{name}, {amount(comparison, count)}, seed {seed + 1} of {comparison.s.seeds}: {', '.join(scored)}",
                  flush=True)
            report(comparisons)
    report(comparisons)
    print_answer(comparisons)
    return comparisons


def enter(cfg):
    """Read the images of all tasks, so that this process can do runs."""
    COMPARISONS.clear()
    subset_of.cache_clear()
    COMPARISONS.update({name: prepare(cfg, name) for name in cfg.tasks()})


def prepare(cfg, name):
    """Read the images of a task and split them. -> Comparison. What cannot work is told before anything is run."""
    task, s, cache = TASKS[name], cfg.resolved(name), Path(cfg.out) / "cache"
    root = Path(cfg.data) if cfg.data else Path(cfg.out) / f"drawn-{name}-{s.drawn}"
    if not cfg.data:
        (data.draw_xbd if task.rare_only else data.draw_tree)(root, s.drawn)
    if task.rare_only:
        scenes = data.read_xbd(root, s.cls.size, mask=True, cache=cache)
    else:
        scenes = data.read(root, s.cls.size, cfg.skip_broken, cache=cache)
    parts = data.split(scenes, hold_out=cfg.hold_out)
    title = "/".join(root.resolve().parts[-2:]) if cfg.data else f"drawn {name}"
    title += f" with {cfg.hold_out} held out" if cfg.hold_out else ""
    arms = cfg.wanted(task, s.arms)
    if not arms:
        raise UserError(f"--arms {cfg.arms}: none for {name}; these are: {', '.join(task.arms)}")
    return Comparison(name, task, arms, s, cfg, title, scenes, parts)


def run_path(comparison, count, seed, arm):
    """Name the file of a run, for example runs/experiment/scenes/4/seed0/real + copies.json."""
    return comparison.out / str(count or "all") / f"seed{seed}" / f"{arm.replace(': ', ' - ')}.json"


def read_run(comparison, count, seed, arm):
    """Read a run that was done before. -> its row, or None. UserError if it was one of other settings."""
    path = run_path(comparison, count, seed, arm)
    if not path.exists():
        return None
    with data.one_line_error(path):
        row = json.loads(path.read_bytes())
        other = [name for name, value in comparison.settings.items() if row["settings"].get(name) != value]
    if other:
        raise UserError(f"{path} is of a run with another {other[0]}: give another --out, or remove it")
    return row


def make(key):
    """Train the generator of a count and a draw, and make the images of all arms. -> a look at them."""
    subset = subset_of(*key)
    comparison = subset.comparison
    for arm in dict.fromkeys(arm for arm in comparison.arms.values() if arm.source == "generator"):
        synthesize(subset, arm)
    return fidelity(subset, synthesize(subset, comparison.task.arms[comparison.task.main_arm])) if subset.draw == 0 else None


def run(key):
    """Train and score a classifier, in a process that has entered. -> its row, which is also kept."""
    name, count, seed, arm = key
    comparison, start = COMPARISONS[name], time.perf_counter()
    subset = subset_of(name, count, comparison.draw(seed))
    row = dict(task=name, arm=arm, count=count, seed=seed, data=comparison.title)
    row |= score(subset, comparison.arms[arm], seed, f"{arm}, {amount(comparison, count)}, seed {seed}")
    row |= dict(seconds=round(time.perf_counter() - start, 1), device=str(data.pick_device()),
                commit=commit(), settings=comparison.settings)
    data.write(run_path(comparison, count, seed, arm), json.dumps(row))
    return row


def synthesize(subset, arm):
    """Make Scenes by a generator trained on the subset's real images alone, or read them if they are there."""
    s, real = subset.comparison.s, subset.real
    if subset.comparison.task.rare_only:                                   # images of other classes would take its steps
        count = real.labels.bincount(minlength=len(real.classes))
        real = real[(count < count.float().mean())[real.labels]]
    generated, sampling_steps, w = arm.generated or s.generated, arm.sampling_steps or s.sampling_steps, s.guidance if arm.guidance is None else arm.guidance
    y = real.labels.unique().repeat_interleave(generated)
    gen = replace(s.gen, seed=subset.draw)
    store = f"synthetic-{generated}-sampling_steps{sampling_steps}-w{w:g}-start{arm.strength:g}-{hashed((gen, real.digest))}.pt"

    def images():
        generator = train_gen.train(real, gen, subset.out / "generator.pt", title=f"generator, {subset.out}")
        like = train_gen.examples(real, y) if arm.strength else None
        images = train_gen.generate(generator, y, gen.seed, sampling_steps, w, like, arm.strength,
                                    title=f"synthetic images, {subset.out}")
        images[:, 3:] = 255 * (images[:, 3:] > 127)            # a grey mask would tell them from real ones
        return images

    names = [f"synthetic {k}" for k in range(len(y))]
    return Scenes(data.cached(subset.out / store, images), y, real.classes, names, torch.arange(len(y)))


def replacements(subset, arm):
    """Choose what takes the place of real images, Scenes or None, and its soft labels, (N, K) or None."""
    if not arm.source:
        return None, None
    if arm.source == "generator":
        pool = synthesize(subset, arm)
    elif arm.source == "copies":
        pool = subset.real
    else:                            # of fresh images, of all classes, at most as many as of synthetic ones
        pool, most = subset.fresh, arm.generated or subset.comparison.s.generated
        first = [(pool.labels == c).nonzero().flatten()[:most] for c in range(len(pool.classes))]
        pool = pool[torch.cat(first)]
    if arm.shuffle:
        order = torch.randperm(len(pool), generator=data.rng(subset.draw))
        pool = replace(pool, labels=pool.labels[order])
    if not arm.clip_filter:
        return pool, None
    logits = train_cls.outputs(tuned(subset.comparison), pool.images)
    of_class = F.one_hot(pool.labels, logits.shape[1])
    sure = (logits.softmax(1) * of_class).sum(1) > 1 / logits.shape[1]
    soft = (of_class + (logits / 2).softmax(1)) / 2                     # He et al. 2023: T = 2, half and half
    return pool[sure], soft[sure]


def tuned(comparison):
    """Read the weights --init, under a head that the names of the classes begin."""
    model = train_cls.initial_model(replace(comparison.s.cls, init=comparison.cfg.init), comparison.scenes.classes, 3)
    if not model.reads:
        raise UserError(f"--init {comparison.cfg.init} has read no texts: a CLIP is needed")
    return model.to(data.pick_device()).eval()


def featured(comparison, clip, scenes):
    """Put the features of a frozen model in the place of images. The disk keeps them: it sees each once."""
    path = comparison.out / "features" / f"{scenes.digest}-{comparison.settings['weights']}.pt"
    make = functools.partial(train_cls.outputs, clip.features, scenes.images)
    return replace(scenes, images=data.cached(path, make))


def score(subset, arm, seed, title):
    """Train the classifier of an arm. -> scores, circumstances, answers on the test split."""
    comparison, K = subset.comparison, len(subset.real.classes)
    real, test, val = subset.real, comparison.test, comparison.val
    pool, soft = replacements(subset, arm)
    cfg = replace(comparison.s.cls, seed=seed, share=arm.share if pool else 0.0,           # CLIP may have kept none
                  augment=arm.augment, balance=arm.balance, pretrain=arm.pretrain)
    if arm.model in ("clip", "zero-shot"):
        clip = tuned(comparison)
        real, pool, test, val = (some and featured(comparison, clip, some) for some in (real, pool, test, val))
        model = clip.head
        if arm.model == "clip":                              # no augmentation: 8 views each gained nothing
            train_cls.fit(real, pool, replace(cfg, augment="none"), soft=soft, title=title, model=model)
    else:
        model = train_cls.fit(real, pool, replace(cfg, model=arm.model), soft=soft, title=title)

    shift = 0.0
    if arm.balance:                                          # chosen on val: how rare the classes really are
        logits = train_cls.outputs(model, val.images).log_softmax(1)
        shift = train_cls.adjust_logits(logits, val.labels, real.labels.bincount(minlength=K))
    answers = {who: (train_cls.outputs(model, some.images).log_softmax(1) + shift).argmax(1)
               for who, some in (("test", test), ("train", real))}
    counts = {who: class_counts(some.labels, answers[who], K) for who, some in (("test", test), ("train", real))}
    row = {name: float(of(counts["test"])) for name, of in SCORES.items()}
    row |= dict(train=float(SCORES[comparison.metric](counts["train"])), added=len(pool or []),
                steps=0 if arm.model in ("linear", "zero-shot") else cfg.steps)
    row |= {f"F1 {name}": float(v) for name, v in zip(test.classes, f1(counts["test"]), strict=True)}
    return row | dict(answers=answers["test"].tolist())


def amount(comparison, count):
    """Put a number of real images into words: "20 real images per class", "all training tiles"."""
    return f"{count or 'all'} {comparison.task.unit}"


def plan(comparison, missing, makes, jobs):
    """Say what is to be run, and from a few steps of each kind how long it takes here."""
    s, mine = comparison.s, [comparison.arms[arm] for name, _, _, arm in missing if name == comparison.name]
    networks = sum(arm.model != "linear" for arm in mine)
    generators = sum(not (comparison.out / str(count or "all") / f"draw{draw}" / "generator.pt").exists()
                     for name, count, draw in makes if name == comparison.name)
    sizes = ", ".join(f"{len(index)} {part}" for part, index in comparison.parts.items())
    print(f"{comparison.title}: {len(comparison.scenes)} images of {len(comparison.scenes.classes)} classes at {s.cls.size} px "
          f"({sizes})\n  {' and '.join(amount(comparison, n) for n in s.counts)} x {s.seeds} seeds x "
          f"{len(comparison.arms)} arms; to be run: {networks} classifiers of {s.cls.steps} steps, "
          f"{generators} generators of {s.gen.steps} steps")
    if networks:
        probe = comparison.scenes[comparison.parts["train"][:64]]
        seconds = networks * s.cls.steps * seconds_per_step(
            lambda cfg: train_cls.fit(probe, None, cfg), s.cls)
        images = s.generated * len(comparison.scenes.classes)                       # a call is a third of a step
        steps = generators * (s.gen.steps + images * s.sampling_steps * 2 / 3 / s.gen.batch)
        seconds += steps * seconds_per_step(lambda cfg: train_gen.train(probe, cfg), s.gen)
        print(f"  about {seconds / 60 / jobs:.1f} minutes on {data.pick_device()}, {jobs} at a time")


def seconds_per_step(run, cfg):
    """Measure the seconds that a step of run(cfg) takes, by what five steps more take."""
    marks = []
    for steps in (1, 1, 6):                                  # the first warms up
        start = time.perf_counter()
        run(replace(cfg, steps=steps))
        marks.append(time.perf_counter() - start)
    return max(0.0, marks[2] - marks[1]) / 5


@functools.cache
def commit():
    """Find the commit of this code, with a + if it has been changed since; empty outside a checkout."""
    git = ["git", "describe", "--always", "--dirty=+", "--abbrev=7"]
    try:
        return subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:                                          # no git on this machine
        return ""


# ---- several runs at a time

def _enter(enter, *args):
    """Prepare a process of a pool: one thread, silent, ends with the first process, even by a kill."""
    Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)             # Ctrl-C is for the first process
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    enter(*args)


@contextmanager
def workers(jobs, enter, *args):
    """Yield what has a map(function, runs), by `jobs` processes, each after a call of enter(*args)."""
    if data.pick_device().type == "cpu":                     # so results do not depend on the number of jobs,
        torch.set_num_threads(1)                             # and small networks gain nothing from threads
    if jobs == 1:                                            # this process itself, which must have entered
        yield SimpleNamespace(map=map)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), _enter, (enter, *args)) as pool:
        try:
            yield pool
        except BrokenExecutor:
            raise UserError("a process died, perhaps for want of memory: give fewer --jobs") from None
        except BaseException:                                # do not wait for what they do
            for child in active_children():
                child.terminate()
            raise


# ---- the statistics of a difference of two arms

class Gain(NamedTuple):
    """What one arm gains over another, -1..1."""
    mean: float                               # over the seeds
    half: float                               # half width of the 95 % interval over seeds and test images
    p: float                                  # the level whose interval just touches 0

    def __str__(self):
        """Write "+3.1 [+0.4, +5.8]", in percentage points."""
        low, high = max(self.mean - self.half, -1), min(self.mean + self.half, 1)
        return f"{100 * self.mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


LEVELS = np.sort(np.append(np.geomspace(1e-9, 1, 2000), 0.05))


@functools.cache
def student(dof):
    """Find what |T| exceeds with probability LEVELS, T of Student's t: scipy is not among our packages."""
    u = np.linspace(0, 20, 20_001)
    x = np.sinh(u)                                           # dense at 0, and as far as the heaviest tails
    density = np.exp(-(dof + 1) / 2 * np.log1p(x**2 / dof)) * np.cosh(u)   # of u, but for a constant
    tail = np.append((density[1:] + density[:-1])[::-1].cumsum()[::-1], 0)
    return np.interp(-LEVELS, -tail / tail[0], x)


def jackknife(counts, score):
    """Tell the share of each group of test images in a score: counts (S, G, 3, K) -> (S, ...), (S, G, ...).

    The score of all groups, and the pseudo-values of Tukey 1958, G score(all) - (G - 1) score(all but one).
    Of accuracy over single images they are the answers, right 1 and wrong 0; of macro-F1 what an image adds.
    """
    G, total = counts.shape[1], counts.sum(1, keepdims=True)
    each = G * score(total) - (G - 1) * score(total - counts)
    return score(total)[:, 0], each


def gain(a, b=(0, 0)):
    """Estimate what an arm gains over another; a, b of jackknife(), same seeds and images; or a's own score.

    Seeds and groups of test images are both samples of what might have been. As in a two-way analysis of
    variance the variance of the mean is told apart into what varies over S seeds, over G groups, and over
    both at once (rest, which seeds and groups both contain and which is counted once); half widths add up in
    quadrature:

        half^2 = t(1 - alpha/2, S - 1)^2 seed + t(1 - alpha/2, G - 1)^2 max(group - rest, 0)

    With 3 seeds or more the 95 % interval covers the truth in 94 to 99 % of cases, whichever is the largest.
    """
    score, d = a[0] - b[0], a[1] - b[1]                                              # (S,), (S, G)
    S, G = d.shape
    single = d - d.mean(0) - d.mean(1, keepdims=True) + d.mean()
    rest = (single**2).sum() / (S - 1) / (G - 1) / S / G
    seed, group = score.var(ddof=1) / S, d.mean(0).var(ddof=1) / G
    if np.ptp(score) < 1e-9:                                 # few seeds that agree do so by chance
        seed = rest
    reach = np.sqrt(seed * student(S - 1) ** 2 + max(group - rest, 0) * student(G - 1) ** 2)
    mean = float(score.mean())
    p = float(np.interp(-abs(mean), -reach, LEVELS)) if mean else 1.0
    return Gain(mean, float(reach[LEVELS == 0.05][0]), p)


def holm(ps):
    """Adjust p-values for being so many, in their order, by Holm 1979.

    The smallest times their number, the next times one less and so on, at most 1, and none below one that
    was smaller. To reject where this is at most 5 % errs in any of the family in at most 5 % of cases.
    """
    ps = np.asarray(ps, dtype=float)
    order = ps.argsort()
    adjusted = np.empty_like(ps)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(ps[order] * np.arange(len(ps), 0, -1)))
    return adjusted.tolist()


def rows_of(comparison, arm, count):
    """List the rows of an arm, seed by seed; [] if it was not run."""
    return [row for (n, _, name), row in sorted(comparison.rows.items()) if (n, name) == (count, arm)]


def mean_of(comparison, arm, count, column=""):
    """Average a column of an arm's rows, or else the task's first score, in per cent; nan if not run."""
    values = [row[column or comparison.metric] for row in rows_of(comparison, arm, count)]
    return 100 * float(np.mean(values or [math.nan]))


def difference(comparison, arm, base, count):
    """Estimate the Gain of arm over base; None without the same seeds, two or more of them."""
    seeds, others = ([row["seed"] for row in rows_of(comparison, name, count)] for name in (arm, base))
    if arm == base or seeds != others or min(len(seeds), len(comparison.test.groups.unique())) < 2:
        return None
    both = []
    for name in (arm, base):
        counts = [counts_per_group(comparison.test.labels, row["answers"], comparison.test.groups, len(comparison.test.classes))
                  for row in rows_of(comparison, name, count)]
        both.append(jackknife(np.stack(counts), SCORES[comparison.metric]))
    return gain(*both)


def trivial(comparison):
    """Answer always the commonest class of the training split: its name, its scores on test."""
    c = comparison.scenes.labels[comparison.parts["train"]].bincount().argmax()
    counts = class_counts(comparison.test.labels, c.expand(len(comparison.test)), len(comparison.test.classes))
    return comparison.test.classes[c], [100 * float(SCORES[name](counts)) for name in comparison.task.scores]


def linear_baseline(comparison, count):
    """Find what a network must reach on test, %: the best linear classifier, the commonest class.

    One that is worse has not learned the task, and its arms differ in how fast they begin to.
    """
    linear = [mean_of(comparison, name, count) for name, arm in comparison.arms.items() if arm.model == "linear"]
    return float(np.nanmax([trivial(comparison)[1][0], *linear]))


@dataclass
class Claim:
    """What an arm gains over its base, and the verdict."""
    count: int
    arm: str
    base: str
    gain: Gain
    p: float                                  # after Holm, among the claims of this kind
    verdict: str


def claims(comparison):
    """Decide all claims that can be. -> [Claim], those about synthetic images first."""
    asked = [(count, arm, base, difference(comparison, arm, base, count))
             for count in comparison.s.counts for arm, base in comparison.task.claims]
    found = []
    for controls in (False, True):             # the question; and the controls, which only try the instrument
        family = [(count, arm, base, g) for count, arm, base, g in asked
                  if g and (comparison.arms[arm].source != "generator") == controls]
        for (count, arm, base, g), p in zip(family, holm([g.p for *_, g in family]), strict=True):
            better = max(mean_of(comparison, name, count) for name in (arm, base))
            verdict = ("too few seeds" if len(rows_of(comparison, arm, count)) < 3 else
                       "below the floor" if better < linear_baseline(comparison, count) else
                       "no difference found" if p >= 0.05 else "helps" if g.mean > 0 else "hurts")
            found.append(Claim(count, arm, base, g, p, verdict))
    return found


# ---- what the synthetic images are like: their distance from real ones, and whether they are copies

CELLS = 6            # copies are looked for in 6 x 6 cells: in finer ones a new but blurred image seems one
FLAT = 2.0           # grey levels: a picture of this deviation over its cells is half structure, half noise
ALARM = 0.01         # p below which there are copies: a false alarm in at most one of a hundred comparisons


def fidelity(subset, synthetic):
    """Compare synthetic images with real ones that their generator never saw. -> {name: number}, or {}.

    These, what training leaves over and val, are halved by group: one half is the reference, the other is
    compared to it as the synthetic images are, and is the best that there can be. {} if they are too few.
    """
    unseen = subset.fresh + subset.comparison.val
    unseen = unseen[torch.isin(unseen.labels, synthetic.labels)]
    heads, group = unseen.groups.unique(return_inverse=True)
    half = (torch.randperm(len(heads), generator=data.rng(1)) % 2)[group]             # a group is in one half
    reference, other, some = equalised(unseen[half == 0], unseen[half == 1], synthetic)
    if len(other) < 10:
        return {}
    blurred = F.avg_pool2d(other.images.float(), 3, 1, 1, count_include_pad=False).to(torch.uint8)
    names = "synthetic", "other real images, the best there is", "these, blurred by 3 x 3 pixels"
    images = torch.cat([reference.images, some.images, other.images, blurred])
    N, kinds = len(other), []
    for describe in (train_cls.colours_and_edges, gradient_energy):      # each kind has a variance of 1
        x = train_cls.outputs(describe, images)
        kinds.append((x - x[:N].mean(0)) / x[:N].std(0).clamp(min=1e-3) / x.shape[1]**0.5)
    a, *others = torch.cat(kinds, 1).split(N)
    distances = {name: frechet(a, b) for name, b in zip(names, others, strict=True)}
    return dict(distances=distances, compared=N, **copies(subset.real, *equalised(synthetic, unseen)))


def gradient_energy(x, scales=3):
    """Measure sharpness, (B, scales): log mean squared difference of pixels at 1, 1/2, 1/4 of the size."""
    x, energies = 127.5 * x[:, :3], []
    for _ in range(scales):
        energies.append(sum(x.diff(dim=d).square().mean((1, 2, 3)) for d in (2, 3)))
        x = F.avg_pool2d(x, 2)
    return torch.stack(energies, 1).add(1).log()                         # of a flat image 0


def equalised(*several, most=4000):
    """Equalise the class counts of several Scenes, so that no class mix tells them apart."""
    K = len(several[0].classes)
    least = torch.stack([s.labels.bincount(minlength=K) for s in several]).amin(0).clamp(max=most // K)
    return [s[torch.cat([(s.labels == c).nonzero().flatten()[:least[c]] for c in range(K)])] for s in several]


def frechet(a, b):
    """Measure the Fréchet distance of Gaussians fitted to a (N, D) and b (M, D): Heusel et al. 2017, Eq. 6.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): a squared distance, 0 if both moments are equal.
    With C_a = A'A and C_b = B'B the trace of the root is the sum of the singular values of A B', exact also
    where N < D leaves C_a without full rank. Fewer images read as a larger distance: compare at equal N only.
    """
    a, b = a.double(), b.double()
    A, B = (torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R for x in (a, b))
    root = torch.linalg.svdvals(A @ B.mT).sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, (shift + A.square().sum() + B.square().sum() - 2 * root).item())


def copies(real, synthetic, held):
    """Count the synthetic images nearer to a training image of their class than any held-out image is.

    All are Scenes: real trained the generator; held it never saw. Were the s synthetic images of a class as
    new as its n held-out ones, all would be in random order of nearness, and

        P(at least k synthetic ones are nearer than all n) = C(s, k) / C(s + n, k)          Rosenbaum 1954

    The sum over classes has the convolution of their distributions. So p is exact, although the images of a
    class share the threshold that its held-out ones set. Also the 16 nearest pairs, to be looked at.
    """
    over, null, pairs = 0, np.ones(1), []                    # null[k]: probability of k such images by chance
    for c in synthetic.labels.unique():
        known, mine, others = (x.images[x.labels == c] for x in (real, synthetic, held))
        similarity, which, turned = nearest(mine, known)
        over += int((similarity > nearest(others, known)[0].max()).sum())
        s, n = len(mine), len(others)
        at_least = [math.comb(s, k) / math.comb(s + n, k) for k in range(s + 1)]
        null = np.convolve(null, -np.diff(at_least, append=0))
        pairs.append((similarity, turned, known[which]))
    similarity, turned, closest = map(torch.cat, zip(*pairs, strict=True))
    worst = similarity.argsort(descending=True)[:16]
    tail = null[::-1].cumsum()[::-1]                         # tail[k]: probability of at least k
    return dict(looked_at=len(synthetic), copies=over, by_chance=float(null @ np.arange(len(null))),
                p=float(tail[over]), least_p=float(tail[-1]),
                pairs={"synthetic": turned[worst], "nearest real": closest[worst]})


def structure(images):
    """Make rows whose dot product is the correlation of two images: (N, C, H, W) uint8 -> (N, D).

    Centring each channel of RGB removes brightness and tint, the norm contrast. What is left of a flat image
    is noise, near to others by chance: with FLAT under the root its row is short, and near to nothing.
    """
    x = F.adaptive_avg_pool2d(images[:, :3].float(), CELLS).flatten(2)                   # (N, 3, CELLS^2)
    x = (x - x.mean(2, keepdim=True)).flatten(1)
    return x / (x.square().sum(1, keepdim=True) + x.shape[1] * FLAT**2).sqrt()


def nearest(images, known):
    """Find the known image (M, C, H, W) that correlates most with each of images (N, C, H, W), in structure.

    -> the correlation (N,), largest over 8 turns and flips; which known one (N,); the images so turned.
    """
    turns = [images.rot90(k, (-2, -1)) for k in range(4)]
    eight = torch.stack(turns + [image.flip(-1) for image in turns])                     # (8, N, C, H, W)
    similar = torch.stack([structure(turned) @ structure(known).T for turned in eight])  # (8, N, M)
    best, which = similar.max(2)
    similarity, turn = best.max(0)
    place = torch.arange(len(images))
    return similarity, which[turn, place], eight[turn, place]


def copying(found):
    """Say in a sentence or two whether there are copies."""
    n, p, part, luck = found["looked_at"], found["p"], 100 * found["copies"], 100 * found["by_chance"]
    answer = ("There are copies, or nearly so" if p < ALARM else
              "No sign of copies" if found["least_p"] < ALARM else "Too few images to look for copies")
    return (f"{answer}: {part / n:.1f} % of {n} synthetic images of one generator are nearer to a training "
            f"image of their class than any held-out real image of this class is (as many, {n} in all); were "
            f"they as new, {luck / n:.1f} % would be (p {p_text(p)}). Near is what correlates in {CELLS} x "
            f"{CELLS} cells, whatever its light, turn or flip.")


# ---- the page, and the terminal: both print one list of page_blocks, text, tables (header, rows) and pictures

def p_text(p):
    """Format a p-value: ".016", or "< .001" below that."""
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def named(comparison, name, count):
    """Name an arm, with its number of real images where there are several of them."""
    return f"{name} ({count or 'all'})" if len(comparison.s.counts) > 1 else name


def page_blocks(comparison):
    """Yield all there is to say of a task: "# heading" or paragraph; (header, rows); Picture."""
    found, task = claims(comparison), comparison.task
    yield f"# {comparison.title}"
    yield answer(comparison, found)
    if found:
        yield Picture(f"Gains in {comparison.metric}, points: a bar at the mean, a line for the 95 % interval.",
                      svg=interval_plot(comparison, found))
    rows = [[named(comparison, f"{c.arm} against {c.base}", c.count), c.verdict, str(c.gain), p_text(c.p)]
            for c in found]
    yield ["claim", "verdict", "gain", "p after Holm"], rows
    yield conditions(comparison)
    yield "## All arms"
    yield arms_table(comparison)
    yield "±: standard deviation over the seeds. Gains here are not corrected for their number."
    count = comparison.s.counts[-1]
    shown = [arm for arm in task.arms if rows_of(comparison, arm, count)]
    yield f"## F1 by class, %, with {amount(comparison, count)}"
    yield ["class", *shown], [
        [name, *(f"{mean_of(comparison, arm, count, f'F1 {name}'):.1f}" for arm in shown)]
        for name in (comparison.test.classes[c] for c in comparison.test.labels.unique())]
    for count, look in comparison.fidelities.items():
        subset = subset_of(comparison.name, count, 0)
        generated = synthesize(subset, task.arms[task.main_arm])
        yield f"## What the synthetic images are like, with {amount(comparison, count)}"
        for title, some in (("Real training images", subset.real), ("Synthetic images", generated)):
            rows = {some.classes[c]: some.images[some.labels == c][:8] for c in generated.labels.unique()}
            yield Picture(f"{title}, a row per class.", rows)
        if look:
            yield ["images", "Fréchet distance (less is better)"], [
                [name, f"{distance:.3f}"] for name, distance in look["distances"].items()]
            yield (f"Each compared to {look['compared']} real images that the generator never saw, by "
                   "histograms of colours and edges, and by sharpness at three scales. How well a network "
                   "learns from them alone says the arm of synthetic images only.")
            yield copying(look)
            yield Picture("Are they copies? The 16 synthetic images nearest in structure to a training image "
                          "of their class, turned as it is, and this.", look["pairs"])


def answer(comparison, found):
    """Write the answer, verdict by verdict."""
    if not found:
        return "No answer: it takes two seeds of two arms of which something is claimed."
    sentences = []
    for verdict, mine in itertools.groupby(sorted(found, key=lambda c: c.verdict), key=lambda c: c.verdict):
        each = [f"{named(comparison, c.arm, c.count)} against {c.base} ({c.gain})" for c in mine]
        sentences.append(f"{verdict.capitalize()}: {'; '.join(each)}.")
    for count, look in comparison.fidelities.items():
        if look and look["p"] < ALARM:
            sentences.append(f"{100 * look['copies'] / look['looked_at']:.1f} % of the synthetic images with "
                             f"{amount(comparison, count)} are near-copies of real ones.")
    seeds = len({seed for _, seed, _ in comparison.rows})
    return f"So far, with {seeds} seeds. " * (seeds < comparison.s.seeds) + " ".join(sentences)


def conditions(comparison):
    """Say what the answer holds for."""
    s, test = comparison.s, comparison.test
    draws = (f"{s.seeds} draws of the training images, a generator each" if s.redraw else "one draw of the "
             "training images and one generator, so that the intervals are not over other ones")
    generated = "rarer class" if comparison.task.rare_only else "class"
    groups = len(test.groups.unique())
    summary = (
        f"Conditions: {comparison.title} at {s.cls.size} px, {len(test.classes)} classes; {len(test)} test "
        f"images in {groups} groups; {s.seeds} seeds, {draws}; generators of {s.gen.steps} steps, "
        f"{s.generated} synthetic images per {generated}, at most as many fresh real ones per class; "
        f"classifiers of {s.cls.steps} steps. In brackets: 95 % intervals over seeds and test images, "
        "in percentage points. Holm's correction: among the claims about synthetic images, and among "
        "the controls. Below the floor: both arms are worse than a linear classifier or the commonest "
        "class.")
    if not comparison.cfg.data:
        summary += f" Drawn {comparison.name} try the comparison out; they say nothing about the world."
    return summary


def arms_table(comparison):
    """Tabulate the scores of each arm and count, below those of always the commonest class."""
    name, scores = trivial(comparison)
    rows = [[f"always {name}", *(f"{score:.1f}" for score in scores)]]
    for count, arm in itertools.product(comparison.s.counts, comparison.arms):
        if mine := rows_of(comparison, arm, count):
            texts = []
            for column in comparison.task.scores:
                values = [100 * row[column] for row in mine]
                spread = f" ± {np.std(values, ddof=1):.1f}" if len({*values}) > 1 else ""
                texts.append(f"{np.mean(values):.1f}{spread}")
            gains = [difference(comparison, arm, base, count) for base in comparison.task.bases]
            rows.append([named(comparison, arm, count), *texts, f"{mean_of(comparison, arm, count, 'train'):.1f}",
                         *(str(g or "") for g in gains)])
    return ["arm", *(f"{score}, %" for score in comparison.task.scores), "on real training images, %",
            *(f"{comparison.metric} against {base}" for base in comparison.task.bases)], rows


@dataclass
class Picture:
    """A figure: rows of images, {name: (N, C, H, W)}, or SVG."""
    caption: str
    rows: dict = field(default_factory=dict)
    svg: str = ""


def interval_plot(comparison, found):
    """Plot the gains of the claims as SVG, an axis of points below."""
    ends = [100 * (c.gain.mean + side * min(c.gain.half, 0.5)) for c in found for side in (-1, 1)] + [0]
    low, high = min(ends), max(ends)
    step = next((step for step in (1, 2, 5, 10) if high - low <= 6 * step), 20)

    def x(points):
        return round(20 + 560 * (points - low) / (high - low or 1), 1)

    foot, parts = 40 * len(found) + 4, []
    for tick in range(math.ceil(low / step), math.floor(high / step) + 1):
        parts.append(f'<path d="M{x(tick * step)} 0V{foot}" stroke-opacity="{0.2 if tick else 1}"/>'
                     f'<text x="{x(tick * step)}" y="{foot + 16}" text-anchor="middle">{tick * step}</text>')
    for k, c in enumerate(found):
        title = html.escape(named(comparison, f"{c.arm} against {c.base}", c.count))
        mean, half = 100 * c.gain.mean, 100 * min(c.gain.half, 0.5)
        parts.append(f'<text x="4" y="{40 * k + 14}">{title}</text><path stroke-width="3" '
                     f'd="M{x(mean - half)} {40 * k + 26}H{x(mean + half)}M{x(mean)} {40 * k + 20}v12"/>')
    return f'<svg viewBox="0 0 600 {foot + 20}" role="img">{"".join(parts)}</svg>'


def print_answer(comparisons):
    """Print the answer and the claims of each task: all else is on the page."""
    for comparison in comparisons:
        for block in page_blocks(comparison):
            if text := as_text(block):
                print(text, end="\n\n")
            if isinstance(block, tuple):
                break
    out = Path(comparisons[0].cfg.out)
    print(f"The page: {out / 'report.html'}   Every run: {out / 'results.csv'}")


def as_text(block):
    """Write a block for the terminal, which shows no pictures: "" for one."""
    if isinstance(block, Picture):
        return ""
    if isinstance(block, str):
        text = textwrap.fill(block.lstrip("# "), 110)
        return text.upper() if block.startswith("# ") else text
    header, rows = block
    widths = [max(map(len, column)) for column in itertools.zip_longest(header, *rows, fillvalue="")]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in [header, *rows]]
    return "\n".join(lines) if rows else ""


def as_html(block):
    """Write a block for the page."""
    if isinstance(block, str):
        tag = ("p", "h2", "h3")[len(block) - len(block.lstrip("#"))]
        return f"<{tag}>{html.escape(block.lstrip('# '))}</{tag}>"
    if isinstance(block, Picture):
        rows = "".join(f"<tr><td>{html.escape(name)}<td>{as_img(images)}"
                       for name, images in block.rows.items())
        return (f"<figure>{block.svg}<table class=pictures>{rows}</table>"
                f"<figcaption>{html.escape(block.caption)}</figcaption></figure>")
    header, rows = block
    lines = ["".join(f"<th>{html.escape(text)}" for text in header)] * bool(rows)
    lines += ["".join(f"<td{bar(text)}>{html.escape(text)}" for text in row) for row in rows]
    return f"<table>{''.join('<tr>' + line for line in lines)}</table>"


def bar(text):
    """Draw a bar behind a score in per cent, "79.3 ± 1.2"."""
    score = re.match(r"\d+\.\d(?= ±|$)", text)
    return f' style="background: linear-gradient(90deg, #48f4 {score[0]}%, transparent 0)"' if score else ""


def as_img(images):
    """Write a row of images as PNG in HTML."""
    file = io.BytesIO()
    data.grid(images, len(images), zoom=max(1, 64 // images.shape[-1])).save(file, "png")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


HEAD = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
h2 + p { font-size: 1.2rem } figure { margin: 1.5rem 0; overflow-x: auto } pre { overflow-x: auto }
table { display: block; overflow-x: auto; border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8886 }
svg { width: 100%; max-width: 40rem; fill: currentColor } path { stroke: currentColor }
img { max-width: 100%; image-rendering: pixelated; display: block }
.pictures td { border: 0; padding: 0 .5rem 0 0 }
</style><title>Does synthetic data help to recognise what is seen from above?</title>
<h1>Does synthetic data help to recognise what is seen from above?</h1>"""


def report(comparisons):
    """Write what was run so far: report.html, which needs no other file, and results.csv, a row per run."""
    out, rows = Path(comparisons[0].cfg.out), [row for comparison in comparisons for row in comparison.rows.values()]
    body = [as_html(block) for comparison in comparisons if comparison.rows for block in page_blocks(comparison)]
    body += [f"<h2>Again</h2><pre>{html.escape(shlex.join(['python', *sys.argv]))}</pre>",
             f"<p>torch {torch.__version__}. Every run, with all its settings, is a row of results.csv.</p>"]
    data.write(out / "report.html", HEAD + "\n".join(body))
    header = list(dict.fromkeys(k for row in rows for k in row if k != "answers"))
    data.save_csv(out / "results.csv", header, [[row.get(k, "") for k in header] for row in rows])


if __name__ == "__main__":
    data.launch(main, Config)
