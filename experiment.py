"""Do images from a diffusion model improve a classifier of overhead imagery, and compared with what?

    python experiment.py                             drawn pictures: minutes on a CPU; a test of the method
    python experiment.py --data data/NWPU-RESISC45   the question itself, of scenes
    python experiment.py --data data/xbd             and of buildings: damage is rare, every disaster new

For each number of real images and each draw of them (--subsets) from the training split: train a generator
on exactly these, of buildings on their rarer classes, and make a synthetic set with it. Then for each seed
train the same classifier once per arm, and score it on the test split. The rules:

    equal budget   every network takes the same optimizer steps and images per step: a synthetic image takes
                   the place of a real one
    no leak        a generator is trained on its arm's real training images alone; nothing is chosen on test.
                   Only simulated damage, with an event held out, starts from how its buildings look before
    paired         a seed fixes subset, weights and batches in all arms: differences are per seed and image

In this order: what is compared; the runs; statistics; what synthetic images are like; answers; the page.
"""
import base64
import functools
import hashlib
import html
import io
import itertools
import json
import math
import re
import shlex
import subprocess
import textwrap
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import data
import train_cls
import train_gen
from augment import AUGMENTATIONS, OVERHEAD
from data import Problem, Scenes, flag
from train_cls import accuracy, f1, harmonic_f1, macro_f1, macro_precision, macro_recall, tally, totals

SCORES = dict(accuracy=accuracy, macro_f1=macro_f1, harmonic_f1=harmonic_f1, macro_precision=macro_precision,
              macro_recall=macro_recall)
TITLES = dict(accuracy="accuracy", macro_f1="macro-F1", harmonic_f1="harmonic F1")
SYNTHETIC = "generator", "simulated"                     # sources of synthetic images


@dataclass(frozen=True)
class Arm:
    """What a classifier is trained on; steps and images per step are the same in all."""
    source: str = ""              # of images in the place of real ones: generator, simulated, fresh, copies
    share: float = 0.0            # probability that one does
    augment: str = "none"         # augmentations by name, of real images and of those in their place
    balance: bool = False         # all classes equally often, however rare
    model: str = ""               # recogniser; here, at w, calls and made, the default is --scale's
    wide: float = 1.0             # its width, in units of what --scale has
    pretrain: bool = False        # synthetic images first, then real ones, in the same number of steps
    shuffle: bool = False         # each image of the source gets the label of another one
    grey: bool = False            # grey all that is not the building, in training and in test
    w: float | None = None        # guidance scale
    calls: int = 0                # network calls per synthetic image
    made: int = 0                 # synthetic images per class, and fresh ones at most
    generator: int = 0            # which of several generators of the same images
    start: float = 0.0            # each synthetic image starts at this share of the chain from a real one
    keep: float = 0.0             # only images to whose class a teacher gives more than keep / K
    soft: bool = False            # teach, with the class of a synthetic image, what the teacher says of it
    tune: str = ""                # begin from the weights --init: "none", as they are; "head", a head learns

    def __post_init__(self):
        # A new source is also known to run_id(), by what decides its images, and to replacements().
        assert self.source in ("", *SYNTHETIC, "fresh", "copies"), f"unknown source {self.source}"


@dataclass(frozen=True)
class Leg:
    """One half of the comparison: what is recognised, by which arms, and what is claimed of them."""
    arms: dict
    mix: str                      # the arm that the studies vary, and the first claim is about
    bases: tuple                  # the table says what each arm gains over these
    claims: tuple                 # the verdict: (arm, base, what is in question)
    controls: dict                # of --study controls, changes of the mix
    scores: tuple                 # of SCORES; claims are about the first
    per: str                      # what --counts counts
    rare: bool = False            # a generator makes images of the rarer classes only


AUGMENTED, BALANCED = Arm(augment=OVERHEAD), Arm(augment=OVERHEAD, balance=True)
PASTED = replace(BALANCED, augment=f"{OVERHEAD},copypaste")
ALONE = dict(source="", share=0.0)                       # no image of a source
LINEAR, RESNET, CLIP = "linear: ", "resnet: ", "clip: "  # how names of arms with these recognisers begin
CONTROLS = {"shuffled labels": dict(shuffle=True), "synthetic first, then real": dict(pretrain=True)}
LEGS = {
    "scenes": Leg(
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
        mix="real + synthetic + augmentation", bases=("real", "real + augmentation", "clip: real"),
        claims=(("real + synthetic + augmentation", "real + augmentation", "synthetic images"),
                ("real + synthetic", "real", "synthetic images"),
                ("real + fresh real", "real + augmentation", "fresh real images"),
                ("real + copies", "real + augmentation", "copies of the real images"),
                ("clip: synthetic only", "clip: zero-shot", "synthetic images, to CLIP"),
                ("clip: real + synthetic", "clip: real", "synthetic images, to CLIP"),
                ("clip: real + edited", "clip: real", "edited images, to CLIP"),
                ("clip: real + fresh real", "clip: real", "fresh real images, to CLIP"),
                ("clip: real + copies", "clip: real", "copies of the real images, to CLIP")),
        controls=CONTROLS, scores=("accuracy",), per="real images per class"),
    "buildings": Leg(
        arms={
            "real":                            AUGMENTED,
            "balanced":                        BALANCED,
            "balanced + synthetic":            replace(BALANCED, source="generator", share=0.5),
            "balanced + simulated damage":     replace(BALANCED, source="simulated", share=0.5),
            "balanced + copy-paste":           PASTED,
            "balanced + pasted synthetic":     replace(PASTED, source="generator", share=0.5),
            "balanced + fresh real":           replace(BALANCED, source="fresh", share=0.5),
            "balanced + copies":               replace(BALANCED, source="copies", share=0.5),
            "linear: balanced":                Arm(balance=True, model="linear"),
            "linear: balanced + synthetic":    Arm("generator", 0.5, balance=True, model="linear"),
        },
        mix="balanced + synthetic", bases=("balanced", "balanced + copy-paste"),
        claims=(("balanced + synthetic", "balanced", "synthetic images of the rare classes"),
                ("balanced + simulated damage", "balanced", "simulated damage"),
                ("balanced + fresh real", "balanced", "fresh real images"),
                ("balanced + copies", "balanced", "copies of the real images")),
        controls=CONTROLS | {"surroundings greyed": dict(grey=True),
                             "surroundings greyed, real": dict(grey=True, **ALONE)},
        scores=("macro_f1", "harmonic_f1"), per="training tiles", rare=True),
}

MODELS = {"linear": dict(model="linear"), "small ResNet": dict(model="resnet"),
          "ViT on plain patches": dict(model="patches"), "ViT half as wide": dict(wide=0.5),
          "ViT twice as wide": dict(wide=2.0)}
STUDIES = {       # what an arm does not say here is as in its leg's mix of real and synthetic images
    "share": {str(p): dict(share=p) for p in (0.25, 0.5, 0.75, 1.0)},
    "made": {f"{n} {how}": dict(made=n, share=p)
             for n in (10, 30, 100, 300) for how, p in (("mixed", 0.5), ("alone", 1.0))},
    "guidance": {str(w): dict(w=w) for w in (1.0, 1.5, 3.0, 5.0)},
    "calls": {str(n): dict(calls=n, share=1.0) for n in (4, 8, 12, 20, 50)},
    "filter": {str(k): dict(keep=k) for k in (0.0, 1.0, 3.0)},
    "soft": {str(on): dict(soft=on) for on in (False, True)},
    "generator": {str(k): dict(generator=k) for k in (0, 1, 2)},
    "start": {f"{t:.2f}": dict(start=t) for t in (0.15, 0.3, 0.5, 0.7, 0.9)},
    "augment": {name: dict(augment=name, **ALONE) for name in ("none", *AUGMENTATIONS)},
    "model": {f"{name}, {how}": change | more for name, change in MODELS.items()
              for how, more in (("real", ALONE), ("real + synthetic", {}))},
    # The protocols of He et al. 2023. CLIP (--init) under a head that the names of classes begin: trained on
    # synthetic images that it recognises, with soft targets; on few real images and synthetic ones, made from
    # noise or from the real ones. (Their third, synthetic images first, is among the controls.)
    "clip": {"zero-shot": dict(tune="none", **ALONE), "real": dict(tune="head", **ALONE),
             "synthetic only": dict(tune="head", share=1.0, keep=1.0, soft=True),
             "real + synthetic": dict(tune="head"), "real + edited": dict(tune="head", start=0.35),
             "real + fresh real": dict(tune="head", source="fresh"),
             "real + copies": dict(tune="head", source="copies")},
    "controls": {},                                                 # those of the leg
    "counts": {},                                                   # all arms, at the counts of Scale.curve
}


@dataclass
class Scale:
    """How large a comparison is."""
    counts: tuple                             # real training images per class, or training tiles (0: all)
    seeds: int                                # repetitions: weights, batches, subset as the next line says
    subsets: int                              # different draws of the training images, each with a generator
    made: int                                 # synthetic images per class
    calls: int                                # network calls per synthetic image
    w: float                                  # guidance scale
    drawn: int                                # scenes per class, or tiles, where no data are given
    curve: tuple                              # the counts of --study counts
    gen: train_gen.Config
    cls: train_cls.Config
    arms: tuple = ()                          # which arms are run if none are asked for (empty: all)


_SMOKE = Scale(
    counts=(4, 8), seeds=2, subsets=2, made=8, calls=4, w=1.5, drawn=30, curve=(2, 4),
    gen=train_gen.Config(size=16, width=16, mults=(1, 2), blocks=1, steps=10, batch=16, warmup=5,
                         augment="none"),
    cls=train_cls.Config(size=16, patch=4, dim=32, depth=1, heads=2, steps=10, batch=32, warmup=5))
_SMALL = Scale(
    counts=(4,), seeds=5, subsets=1, made=60, calls=12, w=1.5, drawn=160, curve=(2, 4, 10, 20, 40),
    gen=train_gen.Config(size=24, width=32, mults=(1, 2, 4), blocks=1, patch=2, predict="x0", steps=800,
                         batch=32, lr=2e-3, warmup=50, ema=0.99, augment="none"),
    cls=train_cls.Config(size=24, patch=4, dim=64, depth=1, heads=2, steps=200, batch=64, lr=4e-3, warmup=50))
_MEDIUM = replace(
    _SMALL, counts=(20,), subsets=5, curve=(5, 10, 40),
    gen=train_gen.Config(mults=(1, 2, 4), blocks=1, patch=2, predict="x0", steps=3000, batch=64, lr=1e-3,
                         warmup=100, ema=0.995, augment="none"),
    cls=train_cls.Config(patch=8, dim=128, depth=2, heads=4, steps=2000, batch=64, lr=2e-3, warmup=100))
# A generator that saw its images turned and flipped would bring this augmentation to arms that have none.
_FULL = Scale(
    counts=(10, 70, 400), seeds=5, subsets=5, made=700, calls=12, w=1.5, drawn=700, curve=(5, 20, 40, 150),
    gen=train_gen.Config(augment="none"), cls=train_cls.Config())
SCALES = {
    "scenes": dict(smoke=_SMOKE, small=_SMALL, medium=_MEDIUM, full=_FULL),
    "buildings": dict(
        smoke=replace(_SMOKE, counts=(12,), drawn=64, curve=(8, 16)),
        small=replace(_SMALL, counts=(8,), drawn=256, curve=(8, 16, 32, 64),
                      gen=replace(_SMALL.gen, steps=700), cls=replace(_SMALL.cls, steps=550),
                      arms=("balanced", "balanced + synthetic", "balanced + fresh real", "balanced + copies",
                            "linear: balanced", "linear: balanced + synthetic")),
        medium=replace(_MEDIUM, counts=(32,), subsets=1, drawn=256, curve=(8, 16, 64)),
        full=replace(_FULL, counts=(0,), made=5000, drawn=1000, subsets=1, curve=(100, 400, 1600))),
}


def listed(text):
    """"a, b" -> ["a", "b"]; "" -> []."""
    return [name.strip() for name in text.split(",") if name.strip()]


@dataclass
class Config(data.Settings):
    """What may be asked for on the command line. 0, empty or None: as --scale has it; --w 0 is a scale."""
    data: str = flag("", "tree with a folder per class, or xBD tree (empty: both are drawn)")
    out: str = flag("runs/experiment", "folder for results.csv, report.html, images, generators", alone=True)
    scale: str = flag("", "smoke, small, medium or full (empty: medium for --data on a GPU, else small)")
    smoke: bool = flag(False, "every stage in under a minute, the same as --scale smoke")
    dry_run: bool = flag(False, "print the plan: runs, steps, time, disk; draw what is missing, run nothing")
    leg: str = flag("", "without --data: scenes or buildings only (empty: both)")
    arms: str = flag("", "which arms, by comma, or all (empty: those of --scale)")
    study: str = flag("", f"more arms, by comma: {', '.join(STUDIES)}")
    counts: str = flag("", "real images per class, or for buildings training tiles (0: all), by comma")
    seeds: int = flag(0, "repetitions", 0, 1000)
    subsets: int = flag(0, "draws of training images, each with its generator (at most --seeds)", 0, 1000)
    size: int = flag(0, "side of the images in pixels, a multiple of 8", 0, 512)
    made: int = flag(0, "synthetic images per class", 0, 1_000_000)
    w: float | None = flag(None, "guidance scale (1: no guidance, 0: no class)", 0, 100)
    gen_steps: int = flag(0, "optimizer steps of a generator", 0)
    cls_steps: int = flag(0, "optimizer steps of a classifier", 0)
    label: str = flag("damage", "what to tell of a building: damage, or the type of disaster: type")
    init: str = flag("", "weights of --study clip: of train_cls.py --captions, or published ones")
    hold_out: str = flag("", "xBD event to test on, never to train on")
    skip_broken: bool = flag(False, "leave out pictures that do not decode")
    jobs: int = flag(0, "runs at a time, each a process of one thread (0: a core each; 1 on a GPU)", 0, 256)

    def __post_init__(self):
        super().__post_init__()
        known = list(dict.fromkeys(["all", *(name for leg in LEGS.values() for name in leg.arms)]))
        for what, asked, allowed in (("arm", listed(self.arms), known),
                                     ("study", listed(self.study), STUDIES),
                                     ("scale", [self.scale], ["", *SCALES["scenes"]]),
                                     ("leg", [self.leg], ["", *LEGS]),
                                     ("label", [self.label], ["damage", "type"])):
            if unknown := sorted(set(asked) - set(allowed)):
                raise ValueError(f"unknown {what} {unknown[0]}; known: {', '.join(filter(None, allowed))}")
        if ("clip" in listed(self.study)) != bool(self.init):
            raise ValueError("--study clip and --init WEIGHTS: both or none of them")
        if self.counts and not (self.data or self.leg):
            raise ValueError(f"--counts {self.counts}: of which --leg, scenes or buildings?")
        data.without_effect(self, ["scale"] if self.smoke else [], "with --smoke")
        if self.size % 8:
            raise ValueError(f"--size {self.size} is not a multiple of 8")
        s = self.resolved("scenes")           # a bad size or count is told before anything is done
        if min(s.counts) < 0:
            raise ValueError(f"--counts {self.counts}: below 0")
        if self.subsets > s.seeds:
            raise ValueError(f"--subsets {self.subsets}: at most one for each of the {s.seeds} seeds")
        if 1 < s.subsets < s.seeds:           # neither one draw nor independent ones: no interval fits
            raise ValueError(f"--subsets {s.subsets}: 1, or one for each of the {s.seeds} seeds")

    def legs(self):
        """List the names of the legs to run."""
        if self.data and self.leg:
            raise Problem(f"--leg {self.leg}: --data decides which leg it is; give one of them")
        named = self.leg or (self.data and ("buildings" if data.is_xbd(self.data) else "scenes"))
        if named == "buildings" and self.init:
            raise Problem("--study clip is for scenes: CLIP knows no masks")
        if self.init:
            weights(self.init)                               # told at once if they are missing
        if named == "scenes" and self.label != "damage" or named == "buildings" and self.skip_broken:
            raise Problem(f"--label is for buildings, --skip-broken for scenes, and these are {named}")
        return [named] if named else list(LEGS)

    def resolved(self, leg):
        """Find the Scale of a leg that these flags stand for."""
        usual = "medium" if self.data and torch.cuda.is_available() else "small"
        s = SCALES[leg]["smoke" if self.smoke else self.scale or usual]
        counts = data.integers(self.counts) if self.counts else s.counts
        if "counts" in listed(self.study):
            counts += s.curve
        counts = tuple(sorted(set(counts), key=lambda n: n or math.inf))                # 0, all, is the most
        seeds = self.seeds or s.seeds
        subsets = min(self.subsets or (1 if s.subsets == 1 else seeds), seeds)
        size = self.size or s.gen.size
        scaled = int(s.cls.patch * 2.0 ** round(math.log2(size / s.gen.size)))
        patch = math.gcd(size, max(2, scaled))                         # about as many tokens at any size
        return replace(s, counts=counts, seeds=seeds, subsets=subsets, made=self.made or s.made,
                       w=s.w if self.w is None else self.w,
                       gen=replace(s.gen, size=size, steps=self.gen_steps or s.gen.steps),
                       cls=replace(s.cls, size=size, patch=patch, steps=self.cls_steps or s.cls.steps))

    def wanted(self, leg):
        """List the arms of a leg that are asked for, {name: Arm}, those of the studies last."""
        asked = listed(self.arms) or self.resolved("buildings" if leg.rare else "scenes").arms or ["all"]
        arms = {name: arm for name, arm in leg.arms.items() if name in asked or "all" in asked}
        for study in listed(self.study):
            for name, change in (leg.controls if study == "controls" else STUDIES[study]).items():
                lacks = "tune" in change if leg.rare else change.get("augment") == "copypaste"
                if not lacks:                                # CLIP knows no masks, and scenes have none
                    arms[f"{study}: {name}"] = replace(leg.arms[leg.mix], **change)
        return arms


# ---- the runs

@dataclass
class Case:
    """A leg with its images, and the runs that are done."""
    name: str
    leg: Leg
    arms: dict
    s: Scale
    cfg: Config
    title: str                                # of the data
    scenes: Scenes
    parts: dict
    out: Path
    runs: list = field(default_factory=list)                             # Tasks, done or not
    rows: list = field(default_factory=list)                             # of these runs, with their answers
    judged: dict = field(default_factory=dict)                           # {count: what judge() found}
    memory: dict = field(default_factory=dict)                           # of once() and cell()

    def __post_init__(self):
        self.metric = self.leg.scores[0]                                 # the score that claims are about
        self.val = self.at(self.parts["val"])                            # chosen on: recogniser and tau
        self.test = self.at(self.parts["test"])                          # what all arms are scored on
        self.G = len(self.test.groups.unique())                          # its groups
        of = np.array([data.event_of(name) for name in self.test.names] if self.leg.rare else [])
        events = np.unique(of)                                           # {name: (N,) bool} if several
        self.events = {event: of == event for event in events} if len(events) > 1 else {}

    def once(self, key, make):
        """Return make(), which is called for a key once: the page is written many times."""
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]

    def collect(self, stored):
        """Take the rows of the runs from all that are stored; a run may serve arms of several names."""
        self.rows = [stored[run.name] | dict(arm=run.title, count=run.cell[1], seed=run.cell[2])
                     for run in self.runs if run.name in stored]

    def cell(self, count, seed):
        """Return the Cell of a count and a seed. The last one is kept: its images may be large."""
        subset = seed % self.s.subsets
        if self.memory.get("subset") != (count, subset):
            self.memory |= dict(subset=(count, subset), chosen=self.choose(count, subset))
        return Cell(self, count, seed, subset, *self.memory["chosen"])

    def at(self, index):
        """Return the images at these indices as recognisers see them: without the picture from before."""
        scenes = self.scenes[index]
        if self.leg.rare:
            scenes.images = data.take(scenes.images, torch.tensor([0, 1, 2, 6]), dim=1)
        return scenes

    def choose(self, count, subset):
        """Choose training images -> their indices, they, and all others, shuffled, but for their doubles."""
        train = self.parts["train"]
        index = data.choose(self.scenes, train, count, subset)
        others = train[~torch.isin(self.scenes.groups[train], self.scenes.groups[index])]
        others = others[torch.randperm(len(others), generator=data.rng(subset))]
        return index, self.at(index), self.at(others)


@dataclass
class Cell:
    """What all arms of a count and a seed share."""
    case: Case
    count: int
    seed: int
    subset: int                               # which choice of the training images
    index: torch.Tensor                       # where these are in case.scenes
    real: Scenes                              # that choice
    fresh: Scenes                             # what it left of the training split

    @property
    def title(self):
        """Say in words which one it is."""
        seed = f"seed {self.seed + 1} of {self.case.s.seeds}"
        return f"{self.case.name}, {amount(self.case, self.count)}, {seed}"

    def possible(self, arm):
        """Can it be run here? Fewer fresh images than real ones, drawn again and again, would rather hurt."""
        have, need = (x.labels.bincount(minlength=len(self.real.classes)) for x in (self.fresh, self.real))
        return {"fresh": bool((have >= need).all()),
                "simulated": self.real.classes == data.DAMAGE}.get(arm.source, True)

    def like(self, arm, classes):
        """Choose the real images that synthetic ones of these classes (N,) start from. -> Scenes or None."""
        if not (arm.start or arm.source == "simulated"):
            return None
        some, index = self.real, torch.zeros_like(classes)
        if arm.source == "simulated":                        # on intact buildings, or of the event held out
            intact = self.index[self.real.labels == 0]
            some = self.case.scenes[self.case.parts["test"] if self.case.cfg.hold_out else intact]
            some.images[:, :3] = 128                         # the picture from after it
            some.labels[:] = -1                              # and the damage are not told
        for c in classes.unique():
            mine = (some.labels == c).nonzero().flatten() if arm.start else torch.arange(len(some))
            index[classes == c] = mine[torch.arange(int((classes == c).sum())) % len(mine)]
        return some[index]


@dataclass(frozen=True)
class Task:
    """Something to do in one go; the names are short hashes of all that decides its result."""
    cell: tuple                               # leg, count, seed
    kind: str                                 # make: train a generator, make images; judge them; run: an arm
    title: str                                # of a run, its arm's name
    arms: tuple                               # the Arm, or those that need the generator
    name: str                                 # of a run, its file; of make, the generator
    after: str = ""                           # the generator that it waits for


CASES = {}                                               # of this process, by name


def main(cfg):
    """Run what is missing, renew the page on the way, print tables and answers. -> [Case]."""
    out, jobs = Path(cfg.out), data.jobs(cfg.jobs)
    CASES.clear()
    enter(cfg)
    cases, stored = list(CASES.values()), read_runs(out)
    if cfg.init:
        tuned(cases[0])                                      # told at once if it is no CLIP
    for case in cases:
        case.runs = runs(case, case.arms, case.s.counts)
    with data.pool(jobs, enter, cfg) as pool:
        for case in cases:
            plan(case, stored, jobs)
        if cfg.dry_run:
            return cases
        run_all(cases, stored, pool, jobs)
        for case in cases:
            case.runs += second_opinion(case)
        run_all(cases, stored, pool, jobs)
    for case in cases:
        budgets = {(row["steps"], row["images"]) for row in case.rows if row["steps"]}
        assert len(budgets) <= 1, f"arms of unequal budget: {budgets}"
    save_table(out, stored)
    report(cases, cfg, out)
    tell(cases, out)
    return cases


def enter(cfg):
    """Read the images of all legs, so that this process can do tasks."""
    CASES.update({name: prepare(cfg, name, Path(cfg.out)) for name in cfg.legs()})


def prepare(cfg, name, out):
    """Read the images of a leg and split them. -> Case. What cannot work is told before anything is run."""
    leg, s, cache = LEGS[name], cfg.resolved(name), out / "cache"
    root = Path(cfg.data) if cfg.data else out / f"drawn-{name}-{s.drawn}"
    if not cfg.data:
        (data.draw_xbd if leg.rare else data.draw_tree)(root, s.drawn)
    if leg.rare:
        scenes = data.read_xbd(root, s.cls.size, cfg.label, pre=True, mask=True, cache=cache)
    else:
        scenes = data.read(root, s.cls.size, cfg.skip_broken, cache=cache)
    parts = data.split(scenes, hold_out=cfg.hold_out)
    title = "/".join(root.resolve().parts[-2:]) if cfg.data else f"drawn {name}"
    title += f" with {cfg.hold_out} held out" if cfg.hold_out else ""
    case = Case(name, leg, cfg.wanted(leg), s, cfg, title, scenes, parts, out)
    odd = [arm for arm in listed(cfg.arms) if arm not in ("all", *leg.arms)]
    if odd and (cfg.leg or cfg.data or not case.arms):
        raise Problem(f"--arms {odd[0]}: no arm for {name}; these are: {', '.join(leg.arms)}")
    if not cfg.counts and not leg.rare:                  # a scale's own counts give way to smaller data sets
        least = int(scenes.labels[parts["train"]].bincount().min())
        s.counts = tuple(n for n in s.counts if n <= least) or (least,)
    return case


def runs(case, arms, counts):
    """List the runs of arms {name: Arm}, seed by seed. -> [Task]."""
    found = []
    for seed, count in itertools.product(range(case.s.seeds), counts):
        cell = case.cell(count, seed)
        for name, arm in arms.items():
            if cell.possible(arm):
                after = generator_id(cell, arm) if arm.source in SYNTHETIC else ""
                found.append(Task((case.name, count, seed), "run", name, (arm,), run_id(cell, arm), after))
    return found


def second_opinion(case):
    """List the runs of the claims' arms by a small ResNet, where the ViT is below the linear floor on val."""
    weak = [count for count in case.s.counts if case.rows and not able(case, count, "", "val")]
    claimed = [name for claim in case.leg.claims for name in claim[:2] if not name.startswith(CLIP)]
    arms = {RESNET + name: replace(case.arms[name], model="resnet") for name in claimed if name in case.arms}
    return runs(case, arms, weak)


def whole(cases, stored):
    """List the tasks of all runs not stored, seed by seed: generators, what needs none, the rest."""
    todo = {run.name: run for case in cases for run in case.runs if run.name not in stored}
    looks = {run.cell: replace(run, kind="judge", name="") for case in cases for run in case.runs
             if run.arms[0] == case.leg.arms[case.leg.mix] and run.cell[2] == 0
             and run.cell[1] not in case.judged}
    todo, looks = list(todo.values()), list(looks.values())      # arms of several names may be the same run
    waiting = {}
    for task in todo + looks:
        waiting.setdefault(task.after, []).append(task)
    makes = [Task(mine[0].cell, "make", "", tuple(dict.fromkeys(task.arms[0] for task in mine)), generator)
             for generator, mine in waiting.items() if generator]
    return sorted(makes + looks + todo, key=lambda task: (task.cell[2], task.kind != "make", task.after > ""))


def run_all(cases, stored, pool, jobs):
    """Do the runs that are not stored, `jobs` tasks at a time, each when what it needs is there."""
    waiting, running, done = whole(cases, stored), {}, {""}
    left, progress = Counter(task.cell for task in waiting), data.progress(None, "comparison", len(waiting))
    for case in cases:
        case.collect(stored)
    while waiting or running:
        for task in [task for task in waiting if task.after in done][:jobs - len(running)]:
            waiting.remove(task)
            running[pool.submit(work, task)] = task
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task, found = running.pop(future), future.result()
            name, count, seed = task.cell
            case = CASES[name]
            if task.kind == "judge":
                case.judged[count] = found
            elif task.kind == "run":
                stored[task.name] = found
                case.collect(stored)
            done.add(task.name)
            left[task.cell] -= 1
            progress.update()
            if not left[task.cell]:                                     # half done, it has its table and page
                scored = [f"{row['arm']} {100 * row[case.metric]:.1f}" for row in case.rows
                          if (row["count"], row["seed"]) == (count, seed)]
                print(f"{case.cell(count, seed).title}: {', '.join(scored)}", flush=True)
                save_table(case.out, stored)
                report(cases, case.cfg, case.out)
    progress.close()


def work(task):
    """Do a task in a process that has entered. -> of a run its row, of judge what it found."""
    name, count, seed = task.cell
    cell = CASES[name].cell(count, seed)
    check_leaks(cell)
    if task.kind == "run":
        row = dict(run=task.name, leg=name, arm=task.title, count=count, seed=seed, data=cell.case.title)
        row |= score(cell, task.arms[0], f"{task.title}, {cell.title}")
        data.write(cell.case.out / "runs" / f"{task.name}.json", json.dumps(row | dict(check=digest(row))))
        return row
    for arm in task.arms:
        synthetic = synthesize(cell, arm)
    if task.kind == "judge":
        return judge(cell, synthetic)


def read_runs(out):
    """Read the runs that were done before, {name: row with its answers}: a file each, as it was written."""
    stored = {}
    for path in sorted((out / "runs").glob("[!.]*.json")):
        with data.refusing(path, "is not as it was written", "remove it, and this run is done again"):
            row = json.loads(path.read_bytes())
            if row.pop("check", digest(row)) != digest(row) or row["run"] != path.stem:
                raise ValueError("something in it was changed")
            stored[path.stem] = row
    return stored


def save_table(out, stored):
    """Write all runs as one tidy table, results.csv, a row per run; answers stay in the runs' own files."""
    header = list(dict.fromkeys(k for row in stored.values() for k in row if k != "answers"))
    data.save_csv(out / "results.csv", header, [[row.get(k, "") for k in header] for row in stored.values()])


def check_leaks(cell):
    """Raise RuntimeError if training and test images share a group, or the event that is held out."""
    test, event = cell.case.test, cell.case.cfg.hold_out
    for scenes in (cell.real, cell.fresh):
        if {*scenes.groups.tolist()} & {*test.groups.tolist()}:
            raise RuntimeError("a training image, its double or its neighbour is in the test split")
        trained, tested = ({*map(data.event_of, x.names)} for x in (scenes, test)) if event else ({}, {event})
        if event in trained or tested != {event}:
            raise RuntimeError(f"{event} is to be held out, but is trained on, or is not what is tested on")


def run_id(cell, arm):
    """Hash everything but the code that determines a run's result: a stored run is not repeated."""
    how = recipe(cell, arm)
    by = {"": (), "generator": (how,), "simulated": (how,), "copies": (how["classes"],),
          "fresh": (how["classes"], how["made"], cell.fresh.digest)}
    arm = replace(arm, w=None, calls=0, made=0, generator=0, start=0.0)              # the recipe tells these
    held = cell.case.val.digest, cell.case.test.digest
    begun = arm.tune and weights(cell.case.cfg.init)
    return digest(arm, begun, cell.case.s.cls, by[arm.source], cell.real.digest, held, cell.seed)


def generator_id(cell, arm):
    """Hash all that determines the generator of an arm."""
    how = recipe(cell, arm)
    return digest(how["gen"], how["gen"].given and how["like"], cell.real.digest)


def digest(*what):
    """Shorten the arguments' repr to a hash."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def recipe(cell, arm):
    """Say how the images in place of real ones are made: settings of the generator, and of the images."""
    s, like = cell.case.s, arm.start
    gen = replace(s.gen, seed=cell.subset + 1000 * arm.generator)
    # Of fresh images of rare classes alone, a classifier would learn that what lies elsewhere is damaged.
    only_rare = cell.case.leg.rare and arm.source == "generator"
    classes = rare(cell.real) if only_rare else list(range(len(cell.real.classes)))
    if arm.source == "simulated":
        gen, like = replace(gen, given="pre,mask"), (cell.case.cfg.hold_out, cell.case.scenes.digest)
    return dict(gen=gen, classes=classes, w=s.w if arm.w is None else arm.w,
                calls=arm.calls or s.calls, made=arm.made or s.made, like=like)


def rare(scenes):
    """List the classes that have fewer images than the mean of all classes."""
    count = scenes.labels.bincount(minlength=len(scenes.classes))
    return (count < count.float().mean()).nonzero().flatten().tolist()


def synthesize(cell, arm):
    """Make Scenes by a generator trained on the cell's real images alone, or read them if they are there."""
    how, out = recipe(cell, arm), cell.case.out
    store = out / "synthetic" / f"{digest(how, cell.real.digest)}.pt"
    y = torch.tensor(how["classes"]).repeat_interleave(how["made"])

    def make():
        like = cell.like(arm, y)
        real = cell.case.scenes[cell.index] if arm.source == "simulated" else cell.real
        real = real[torch.isin(real.labels, torch.tensor(how["classes"]))]       # others would take its steps
        generator = train_gen.train(real, how["gen"], out / "generators" / f"{generator_id(cell, arm)}.pt",
                                    title=f"generator, {cell.title}")
        images = train_gen.generate(generator, y, how["gen"].seed, how["calls"], how["w"], like, arm.start,
                                    title=f"synthetic images, {cell.title}")
        if arm.source == "simulated":
            images = torch.cat([images, like.images[:, -1:]], 1)                # the mask is that of before
        if images.shape[1] == 4:                               # a grey mask would tell them from real ones
            images[:, 3] = 255 * (images[:, 3] > 127)
        return images

    return Scenes(data.kept(store, store.stem, make), y, cell.real.classes,
                  [f"synthetic {k}" for k in range(len(y))], torch.arange(len(y)))


def replacements(cell, arm):
    """Choose what takes the place of real images, Scenes or None, and its soft labels, (N, K) or None."""
    if not arm.source:
        return None, None
    how = recipe(cell, arm)
    if arm.source in SYNTHETIC:
        pool = synthesize(cell, arm)
    else:
        pool, most = dict(copies=(cell.real, None), fresh=(cell.fresh, how["made"]))[arm.source]
        pool = pool[torch.cat([(pool.labels == c).nonzero().flatten()[:most] for c in how["classes"]])]
    if arm.shuffle:
        order = torch.randperm(len(pool), generator=data.rng(cell.subset))
        pool = replace(pool, labels=pool.labels[order])
    if not (arm.keep or arm.soft):
        return pool, None
    if arm.tune:                                              # CLIP by names alone is the teacher
        model = tuned(cell.case)
    else:                                                     # or one that was trained on the real images
        cfg = replace(cell.case.s.cls, seed=cell.seed, augment=OVERHEAD, balance=arm.balance)
        path = cell.case.out / "teachers" / f"{digest(cfg, cell.real.digest)}.pt"
        model, _ = train_cls.fit(cell.real, None, cfg, path, title=f"teacher, {cell.title}")
    logits = train_cls.outputs(model, pool.images)
    of_class = F.one_hot(pool.labels, logits.shape[1])
    kept = (logits.softmax(1) * of_class).sum(1) > arm.keep / logits.shape[1]
    soft = (of_class + (logits / 2).softmax(1)) / 2                     # He et al. 2023: T = 2, half and half
    return pool[kept], soft[kept] if arm.soft else None


def tuned(case):
    """Read the weights --init, under a head that the names of the classes begin."""
    model = train_cls.network(replace(case.s.cls, init=case.cfg.init), case.scenes.classes, 3)
    if not model.reads:
        raise Problem(f"--init {case.cfg.init} has read no texts: --study clip needs a CLIP")
    return model.to(data.pick_device()).eval()


def featured(case, model, scenes):
    """Put the features of a frozen model in the place of images. The disk keeps them: it sees each once."""
    stamp = digest(weights(case.cfg.init), scenes.digest)
    path = case.out / "features" / f"{stamp}.pt"
    return replace(scenes, images=data.kept(path, stamp, lambda: train_cls.embed(model, scenes).images))


@functools.cache
def weights(path):
    """Hash the file that --init names."""
    if not Path(path).is_file():
        raise Problem(f"--init {path}: no such file; python train_cls.py --captions makes one")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def grey_outside(scenes):
    """Grey the pixels outside the mask of the building in Scenes (C = 4)."""
    colours, mask = scenes.images.split([3, 1], 1)
    return replace(scenes, images=torch.cat([torch.where(mask > 0, colours, 128), mask], 1))


def score(cell, arm, title):
    """Train the classifier of an arm. -> its row: scores, circumstances, answers on the test split."""
    start, case = time.perf_counter(), cell.case
    real, (pool, soft) = cell.real, replacements(cell, arm)
    test, val = case.test, case.val
    if arm.grey:
        real, pool, test, val = (scenes and grey_outside(scenes) for scenes in (real, pool, test, val))

    cls, share = case.s.cls, arm.share if pool else 0.0    # a filter may let nothing through
    cfg = replace(cls, seed=cell.seed, share=share, augment=arm.augment, balance=arm.balance,
                  pretrain=arm.pretrain, model=arm.model or cls.model, dim=round(cls.dim * arm.wide))
    if arm.tune:
        clip = tuned(case)
        real, pool, test, val = (some and featured(case, clip, some) for some in (real, pool, test, val))
        model, seen = clip.head, dict(steps=0, images=0, synthetic=0)
        if arm.tune == "head":
            model, seen = train_cls.tune(clip.head, real, pool, cfg, soft, title)
    else:
        model, seen = train_cls.fit(real, pool, cfg, soft=soft, title=title)

    K, parts = len(test.classes), dict(train=real, val=val, test=test)               # train: the real images
    logits = {part: train_cls.outputs(model, some.images).log_softmax(1) for part, some in parts.items()}
    if arm.balance:
        shift = train_cls.put_back(logits["val"], val.labels, real.labels.bincount(minlength=K))
        logits = {part: each + shift for part, each in logits.items()}

    counts = {part: totals(some.labels, logits[part].argmax(1), K) for part, some in parts.items()}
    predicted = logits["test"].argmax(1)
    row = {name: float(of(counts["test"])) for name, of in SCORES.items()}
    row["top5"] = train_cls.topk(logits["test"], test.labels)
    row |= {part: float(SCORES[case.metric](counts[part])) for part in ("train", "val")}
    row |= {f"f1 {name}": float(v) for name, v in zip(test.classes, f1(counts["test"]), strict=True)}
    for event, mine in case.events.items():
        row[f"macro_f1 {event}"] = float(macro_f1(totals(test.labels[mine], predicted[mine], K)))
    settings = dict(scale=asdict(case.s), arm=asdict(arm), label=case.cfg.label, hold_out=case.cfg.hold_out)
    return dict(**row, **seen, added=len(pool or []), seconds=round(time.perf_counter() - start, 1),
                device=str(data.pick_device()), commit=commit(), settings=json.dumps(settings),
                answers=predicted.tolist())


@functools.cache
def commit():
    """Find the commit of this code, with a + if it has been changed since; empty outside a checkout."""
    git = ["git", "describe", "--always", "--dirty=+", "--abbrev=7"]
    try:
        return subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:                                                  # no git on this machine
        return ""


def amount(case, *counts):
    """Put numbers of real images into words: "5 and 20 real images per class", "all training tiles"."""
    per = re.sub("(image|tile)s", r"\1", case.leg.per) if counts == (1,) else case.leg.per
    return f"{' and '.join(str(n or 'all') for n in counts)} {per}"


def plan(case, stored, jobs):
    """Say what is to be run, and from a few steps of each kind how long it takes here."""
    s, made, missing = case.s, {}, {run.name: run for run in case.runs if run.name not in stored}
    for run in missing.values():
        if run.after:                                        # several arms may take the same images
            how = recipe(case.cell(*run.cell[1:]), run.arms[0])
            made[run.after, repr(how)] = how, how["made"] * len(how["classes"])
    networks = sum(run.arms[0].model != "linear" for run in missing.values())
    generators, images = len({name for name, _ in made}), sum(n for _, n in made.values())
    sizes = ", ".join(f"{len(index)} {part}" for part, index in case.parts.items())
    print(f"{case.title}: {len(case.scenes)} images of {len(case.scenes.classes)} classes at {s.cls.size} px "
          f"({sizes})\n  {amount(case, *s.counts)} x {s.seeds} seeds x {len(case.arms)} arms; to be run: "
          f"{networks} classifiers of {s.cls.steps} steps, {generators} generators of {s.gen.steps} steps, "
          f"{images} synthetic images")
    if not networks:
        return
    probe = case.at(case.parts["train"][:64])
    gen = data.seconds_per_step(lambda cfg: train_gen.train(probe, cfg), s.gen)
    cls = data.seconds_per_step(lambda cfg: train_cls.fit(probe, None, cfg), s.cls)
    calls = sum(n * how["calls"] * (1 + (how["w"] != 1)) for how, n in made.values())
    seconds = (networks + len(s.counts)) * s.cls.steps * cls               # one for the features that judge
    seconds += (generators * s.gen.steps + calls / s.gen.batch / 3) * gen        # a call is a third of a step
    _, model = train_gen.networks(s.gen, len(case.scenes.classes), case.test.images.shape[1])
    disk = generators * 16 * sum(p.numel() for p in model.parameters())       # weights, average, two moments
    disk += (images + len(case.scenes)) * case.scenes.images[0].numel()
    print(f"  about {seconds / 60 / jobs:.1f} minutes on {data.pick_device()}, {jobs} at a time; "
          f"disk: {disk / 1e6:.0f} MB", flush=True)


# ---- the statistics: counts of answers, resampled; differences of two arms

def replicates(counts, statistic, B=1000, seed=0):
    """Apply a statistic to counts (S seeds, G groups, 3, K) and B resampled test sets: (S, 1 + B).

    Column 0 is the test set itself. The others are bootstrap samples (Efron 1979): as many groups, drawn
    with replacement, the same for all rows. They follow from (G, seed): two arms with the same test set
    meet the same samples, column by column.
    """
    S, G, _, K = counts.shape
    flat = counts.transpose(1, 0, 2, 3).reshape(G, -1)
    rng, totals = np.random.default_rng(seed), [flat.sum(0, keepdims=True)]
    for start in range(0, B, 100):                           # so many samples at a time: memory stays small
        draws = rng.integers(G, size=(min(100, B - start), G))
        times = np.stack([np.bincount(draw, minlength=G) for draw in draws])    # each group is in a sample
        totals.append(times.astype(float) @ flat)
    return statistic(np.concatenate(totals).reshape(1 + B, S, 3, K).transpose(1, 0, 2, 3))


@functools.cache
def student(dof):
    """Make the function of p >= .5 that is the p-quantile of Student's t: scipy is not among our packages."""
    u = np.linspace(0, 20, 20_001)
    x = np.sinh(u)                                           # dense at 0, and as far as the heaviest tails
    density = np.exp(-(dof + 1) / 2 * np.log1p(x**2 / dof)) * np.cosh(u)   # of u, but for a constant
    tail = np.append((density[1:] + density[:-1])[::-1].cumsum()[::-1], 0)
    tail = tail / tail[0] / 2                                              # P(T > 0) = 1/2 is the constant
    return lambda p: float(np.interp(p - 1, -tail, x))


@dataclass
class Gain:
    """What one arm gains over another, -1..1, with what seeds and test images leave open."""
    mean: float                               # over the seeds
    parts: tuple                              # of the variance of this mean: ((variance, dof), ...)

    def reach(self, alpha):
        """Return the half width of the 1 - alpha interval, 0 < alpha < 1: those of the parts in quadrature.

        Satterthwaite 1946 instead takes one t, with degrees of freedom estimated from the variances. With 3
        seeds that estimate is too noisy: for uniform seed effects his interval covered the truth in 90.5 % of
        cases, this one in 94.2 %. The price: where seeds and images matter alike it covers 97 %.
        """
        return np.sqrt(sum(student(dof)(1 - alpha / 2) ** 2 * variance for variance, dof in self.parts))

    @property
    def half(self):
        """Return the half width of the 95 % interval."""
        return self.reach(0.05)

    @property
    def p(self):
        """Find the alpha whose interval just touches 0: p < .05 exactly where the 95 % one leaves 0 out."""
        low, high = 0.0, 1.0
        for _ in range(50):                                          # bisection: alpha is known to 2^-50
            middle = (low + high) / 2
            if self.reach(middle) < abs(self.mean):
                high = middle
            else:
                low = middle
        return high

    def detectable(self, family=1):
        """Return the smallest difference that would be found in 4 of 5 such cases, at most 1: Bloom 1995."""
        alpha = 0.05 / family                                            # as in Holm's first step
        return min(self.reach(alpha) + self.reach(0.4), 1.0)             # t_(1 - alpha/2) and t_.8 errors


def gain(a, b, G):
    """Estimate what an arm gains: a, b (S, 1 + B) replicates of it and its base, same seeds; G groups.

    Seeds and groups of test images are both samples of what might have been. The variance of the mean is told
    apart as in a two-way analysis of variance,

        seed:     what varies over the seeds / S, on S - 1 degrees of freedom
        group:    what the mean varies over the resampled test sets, on G - 1
        rest:     what varies over seed and group at once / (S G), which seed and group both contain

    and the half width of the 1 - alpha interval adds up in quadrature, rest being counted once:

        half^2 = t(1 - alpha/2, S - 1)^2 seed + t(1 - alpha/2, G - 1)^2 max(group - rest, 0)

    Of a mean over answers, like accuracy, these are the classical estimates up to the noise of the bootstrap,
    of another statistic to first order. With 3 seeds or more the 95 % interval covers the truth in 94 to 98 %
    of cases, whichever is the largest, with normal seed effects or uniform ones (92 % if these are all there
    is). Against b = 0 it is that of an arm's own score. ValueError for fewer than two seeds.
    """
    d = np.asarray(a) - b
    S = len(d)
    if S < 2:
        raise ValueError("an interval takes two seeds")
    per_seed, d = d[:, 0], d[:, 1:]
    both = d.mean(0)                                                     # of each resampled test set
    unbiased = G / (G - 1)                          # a bootstrap variance is smaller by this, as std(ddof=0)
    seed, group = per_seed.var(ddof=1) / S, unbiased * both.var(ddof=1)
    rest = unbiased * (d - both).var(1, ddof=1).sum() / (S - 1) / S
    dof = S - 1
    if seed < 1e-9 * rest:           # few seeds that agree do so by chance: rest, which seed contains, stays
        seed, dof = rest, (S - 1) * (G - 1)
    parts = (float(seed), dof), (float(max(group - rest, 0)), G - 1)
    return Gain(float(per_seed.mean()), parts)


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


# ---- what the synthetic images are like: their distance from real ones, and whether they are copies

CELLS = 6            # copies are looked for in 6 x 6 cells: in finer ones a new but blurred image seems one
FLAT = 2.0           # grey levels: a picture of this deviation over its cells is half structure, half noise
ALARM = 0.01         # p below which there are copies: a false alarm in at most one of a hundred comparisons


def judge(cell, synthetic):
    """Compare synthetic images with real ones that their generator never saw. -> {name: number}, or {}.

    These, what training leaves over and val, are divided by group. A half trains a classifier for its
    features. The other half tests it: a quarter is the reference, and a quarter is compared to it as the
    synthetic images are, the floor of every number. {} if fewer than ten images would be compared.
    """
    case, real, unseen = cell.case, cell.real, cell.fresh + cell.case.val
    unseen = unseen[torch.isin(unseen.labels, synthetic.labels)]
    unseen = unseen[torch.randperm(len(unseen), generator=data.rng(0))]
    heads, group = unseen.groups.unique(return_inverse=True)
    part = (torch.randperm(len(heads), generator=data.rng(1)) % 4)[group]             # a group is in one part
    teach, held, a, b = (unseen[which] for which in (part < 2, part >= 2, part == 2, part == 3))
    a, b, some = alike(a, b, synthetic)
    if len(a) < 10:
        return {}
    name = digest("likeness", case.s.cls, real.digest, synthetic.digest, unseen.digest)
    path, sheet = (case.out / "judged" / f"{name}.{kind}" for kind in ("pt", "png"))

    def make():
        cfg = replace(case.s.cls, augment=OVERHEAD, balance=case.leg.rare)
        model, _ = train_cls.fit(teach, None, cfg, title=f"features, {cell.title}")
        right = (train_cls.predict(model, held.images) == held.labels).sum().item()
        found = dict(tested=len(held), right=right, commonest=held.labels.bincount().max().item())
        return found | compare(model.features, a, b, some) | copies(real, *alike(synthetic, held), sheet)

    if not data.decodes(sheet):
        path.unlink(missing_ok=True)                         # both are made at once
    return data.kept(path, name, make) | dict(sheet=str(sheet))


def alike(*several, most=4000):
    """Equalise the class counts of several Scenes, so that no class mix tells them apart."""
    K = len(several[0].classes)
    least = torch.stack([s.labels.bincount(minlength=K) for s in several]).amin(0).clamp(max=most // K)
    return [s[torch.cat([(s.labels == c).nonzero().flatten()[:least[c]] for c in range(K)])] for s in several]


def wilson(k, n, z=1.96):
    """Bound a share that was k of n: the 95 % interval (low, high) in [0, 1] of Wilson 1927."""
    middle = (k + z * z / 2) / (n + z * z)
    half = z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return middle - half, middle + half


def compare(embed, a, b, synthetic):
    """Compare with real images a: Fréchet distance, precision, recall, density, coverage. -> {name: number}

    Compared are synthetic images; other real ones b, the floor; and b blurred by 1 px in 24, a planted fault
    (Scenes of N images each). Features of a classifier, embed(), see classes; gradient energies see blur.
    Each kind is scaled to a variance of 1 over a, whatever its number of features.
    """
    N, blurred = len(a), blur(b.images, a.images.shape[-1] / 24)
    images = torch.cat([a.images, synthetic.images, b.images, blurred])
    kinds = train_cls.outputs(embed, images), gradient_energy(images)
    scaled = [(x - x[:N].mean(0)) / x[:N].std(0).clamp(min=1e-3) / x.shape[1] ** 0.5 for x in kinds]
    reference, *others = torch.cat(scaled, 1).split(N)
    found = dict(judged_by=N)
    for who, features in zip(("synthetic", "real", "blurred"), others, strict=True):
        numbers = dict(frechet=frechet(reference, features)) | prdc(reference, features)
        found |= {f"{who} {name}": value for name, value in numbers.items()}
    return found


def gradient_energy(images, scales=3):
    """Measure sharpness, (N, scales): log mean squared difference of pixels at 1, 1/2 and 1/4 of the size."""
    x, energies = images[:, :3].float(), []
    for _ in range(scales):
        energies.append(sum(x.diff(dim=d).square().mean((1, 2, 3)) for d in (2, 3)))
        x = F.avg_pool2d(x, 2)
    return torch.stack(energies, 1).add(1).log()                                # of a flat image 0


def blur(images, sigma):
    """Blur images (N, C, H, W) uint8 by a Gaussian of sigma pixels; edges are reflected."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * sigma**2))[None, None, :, None]
    x = F.pad(images.float(), (reach,) * 4, mode="reflect").flatten(0, 1)[:, None]         # (N C, 1, H', W')
    x = F.conv2d(F.conv2d(x, kernel / kernel.sum()), kernel.mT / kernel.sum())
    return x.view(images.shape).round().to(torch.uint8)


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


def prdc(real, fake, k=5):
    """Compare features fake (M, D) with real (N, D), N, M > k: {precision, recall, density, coverage}.

    A ball around each image reaches to its k-th nearest neighbour among its own kind.

        precision   share of the fakes inside the ball of any real image     Kynkäänniemi et al. 2019, Eq. 2
        recall      share of the real images inside the ball of any fake     the same
        density     in how many real balls a fake is, over k                 Naeem et al. 2020, section 3
        coverage    share of the real balls with a fake inside               the same

    One outlier with a large ball lifts precision to 1, but density by no more than 1 / k. For two samples of
    one distribution density is 1 on average and coverage 1 - 2^-k at N = M (their Lemmas 1 and 2), while
    precision and recall depend on it: .48 for Gaussians in 1,000 dimensions.
    """
    real, fake = real.double(), fake.double()
    around_real, around_fake = (torch.cdist(x, x).kthvalue(k + 1).values for x in (real, fake))  # 1st: itself
    d = torch.cdist(fake, real)                                                                  # (M, N)
    inside, recalled = d < around_real, d < around_fake[:, None]
    return dict(precision=inside.any(1).double().mean().item(), recall=recalled.any(0).double().mean().item(),
                density=inside.sum().item() / k / len(fake), coverage=inside.any(0).double().mean().item())


def copies(real, synthetic, held, sheet):
    """Count the synthetic images nearer to a training image of their class than any held-out image is.

    All are Scenes: real trained the generator; held it never saw. The 16 nearest are drawn to the file sheet
    above their training images. Were the s synthetic images of a class as new as its n held-out ones, all
    would be in random order of nearness, and

        P(at least k synthetic ones are nearer than all n) = C(s, k) / C(s + n, k)          Rosenbaum 1954

    The sum over classes has the convolution of their distributions. So p is exact, although the images of a
    class share the threshold that its held-out ones set.
    """
    over, null = 0, np.ones(1)                               # null[k]: probability of k such images by chance
    found = []
    for c in synthetic.labels.unique():
        known, mine, others = (x.images[x.labels == c] for x in (real, synthetic, held))
        similarity, which, images = nearest(mine, known)
        over += (similarity > nearest(others, known)[0].max()).sum().item()
        s, n = len(mine), len(others)
        at_least = [math.comb(s, k) / math.comb(s + n, k) for k in range(s + 1)]
        null = np.convolve(null, -np.diff(at_least, append=0))
        found.append((similarity, images, known[which]))
    similarity, images, closest = map(torch.cat, zip(*found, strict=True))
    worst = similarity.argsort(descending=True)[:16]
    rows = {"synthetic": images[worst], "nearest real": closest[worst]}
    data.save_picture(album(rows, 16), sheet)
    tail = null[::-1].cumsum()[::-1]                          # tail[k]: probability of at least k
    return dict(trained_on=torch.isin(real.labels, synthetic.labels).sum().item(), looked_at=len(synthetic),
                copies=over, by_chance=float(null @ np.arange(len(null))), copies_p=float(tail[over]),
                alarm_from=int((tail >= ALARM).sum()))


def structure(images):
    """Make rows whose dot product is the correlation of two images: (N, C, H, W) uint8 -> (N, D).

    Centring each channel of RGB removes brightness and tint, the norm contrast. What is left of a flat image
    is noise, near to others by chance: with FLAT under the root its row is short, and near to nothing.
    """
    x = F.adaptive_avg_pool2d(images[:, :3].float(), CELLS).flatten(2)                   # (N, 3, CELLS^2)
    x = (x - x.mean(2, keepdim=True)).flatten(1)
    return x / (x.square().sum(1, keepdim=True) + x.shape[1] * FLAT**2).sqrt()


def symmetries(images):
    """Turn and flip square images (N, C, H, W) in all 8 ways: (8, N, C, H, W), the first as they came."""
    turns = [images.rot90(k, (-2, -1)) for k in range(4)]
    return torch.stack(turns + [image.flip(-1) for image in turns])


def nearest(images, known):
    """Find the known image (M, C, H, W) that correlates most with each of images (N, C, H, W), in structure.

    -> the correlation (N,), largest over 8 turns and flips; which known one (N,); the images so turned.
    """
    device, eight = data.pick_device(), symmetries(images)
    target = structure(known.to(device)).T                                                       # (D, M)
    found = [(structure(turned.to(device)) @ target).max(1) for turned in eight]
    similarity, which = (torch.stack(values).cpu() for values in zip(*found, strict=True))        # (8, N)
    best, turn = similarity.max(0)
    place = torch.arange(len(images))
    return best, which[turn, place], eight[turn, place]


def fidelity(found):
    """Set synthetic beside real images, (header, rows), if features can tell; say who judges, how well."""
    n, names = found["tested"], ("precision", "recall", "density", "coverage")
    header, rows = ["images", "Fréchet distance (less is better)", *names], []
    # Features to which blurred images are as good, or classes the same, measure neither.
    sees = [found[f"blurred {name}"] < found[f"real {name}"] for name in names if name != "recall"]
    sees.append(found["blurred frechet"] > found["real frechet"])
    sees.append(wilson(found["right"], n)[0] > found["commonest"] / n)
    by = (f"features of a classifier that gets {100 * found['right'] / n:.0f} % of {n} held-out images right "
          f"(always the commonest class: {100 * found['commonest'] / n:.0f} %)")
    if not all(sees):
        return (header, []), (f"Fidelity is not shown. It would be judged by {by}, which cannot tell "
                              "classes or blurred images apart.")
    titles = dict(synthetic="synthetic", real="other real, as good as it gets", blurred="these, blurred")
    for who, title in titles.items():
        rows.append([title, *(f"{found[f'{who} {name}']:.2f}" for name in ("frechet", *names))])
    return (header, rows), (f"Each compared to {found['judged_by']} real images that the generator never "
                            f"saw, by {by} and by gradient energies at three scales, which see blur. "
                            "Distances compare within this table only; copies are as precise as real images.")


def copying(found):
    """Say in a few sentences whether there are copies, and how many would have been noticed."""
    k, n, enough = found["copies"], found["looked_at"], found["alarm_from"]
    low, high = wilson(k, n)
    share = (f"{100 * k / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {n} synthetic images, all of one "
             f"generator, are nearer to a training image of their class ({found['trained_on']} in all) than "
             f"any held-out real image of this class is (as many, {n} in all); were they as new, "
             f"{100 * found['by_chance'] / n:.1f} % would be (p {p_text(found['copies_p'])}). Near is what "
             f"correlates in {CELLS} x {CELLS} cells, whatever its light, turn or flip.")
    if found["copies_p"] < ALARM:
        return f"There are copies, or nearly so: {share}"
    if enough > n:
        return f"Too few images to look for copies: {share}"
    return f"No sign of copies: {share} {100 * enough / n:.1f} % or more would have been a sign."


# ---- the answers: what may be believed, what follows, and the tables

def runs_of(case, arm, count):
    """List the rows of an arm, seed by seed; [] if it was not run."""
    mine = [r for r in case.rows if r["arm"] == arm and r["count"] == count]
    return sorted(mine, key=lambda r: r["seed"])


def values(case, arm, count, column=""):
    """List a column of an arm's rows, or else the leg's first score, per cent; [] if it was not run."""
    return [100 * r[column or case.metric] for r in runs_of(case, arm, count)]


def sampled(case, arm, count, statistic=None):
    """Take an arm's replicates of a statistic, or else of the first score: (seeds, 1 + B, ...) or None."""
    rows, test = runs_of(case, arm, count), case.test
    statistic = statistic or SCORES[case.metric]

    def make():
        counts = [tally(test.labels, r["answers"], test.groups, len(test.classes)) for r in rows]
        return replicates(np.stack(counts), statistic)

    return case.once((statistic, *(r["run"] for r in rows)), make) if rows else None


def difference(case, arm, base, count):
    """Estimate a Gain of arm over base; None without the same seeds, two of them and of groups of images."""
    seeds, others = ([r["seed"] for r in runs_of(case, name, count)] for name in (arm, base))
    if arm == base or seeds != others or len(seeds) < 2 or case.G < 2:
        return None
    return gain(sampled(case, arm, count), sampled(case, base, count), case.G)


# What a recogniser can be believed about: one that is worse than a linear classifier on colours and edges, or
# than always the commonest class, has not learned the task, and its arms differ in how fast they begin to.

def standing(case, count, prefix, part="test"):
    """Find the best arm of a recogniser, but for the ceiling, and its mean score on a split, %; or "", 0."""
    arms = case.arms if prefix == CLIP else case.leg.arms
    names = [prefix + name if prefix == RESNET else name for name, arm in arms.items()
             if arm.source != "fresh" and (arm.model == "linear") == (prefix == LINEAR)
             and name.startswith(CLIP) == (prefix == CLIP)]
    column = "val" if part == "val" else ""
    means = {name: float(np.mean(found)) for name in names if (found := values(case, name, count, column))}
    best = max(means, key=means.get, default="")
    return best, means.get(best, 0.0)


def trivial(case, part="test"):
    """Answer always the commonest class of the training split: its name, its scores on a split, %."""
    held = case.scenes.labels[case.parts[part]]
    c = case.scenes.labels[case.parts["train"]].bincount().argmax()
    counts = totals(held, c.expand(len(held)), len(case.test.classes))
    return case.test.classes[c], [100 * float(SCORES[name](counts)) for name in case.leg.scores]


def bar(case, count, part="test"):
    """Find what a recogniser must reach on a split, %: the linear floor, and always the commonest class."""
    return max(standing(case, count, LINEAR, part)[1], trivial(case, part)[1][0])


def able(case, count, prefix, part):
    """Does the best arm of a recogniser reach the bar?"""
    return standing(case, count, prefix, part)[1] >= bar(case, count, part)


def recogniser(case, count):
    """Choose on val whose verdict counts: the ViT's (""), or the ResNet's where only that is able."""
    return RESNET if not able(case, count, "", "val") and able(case, count, RESNET, "val") else ""


@dataclass
class Claim:
    """What an arm gains over its base."""
    count: int
    arm: str
    base: str
    what: str                                 # in question: the images, in words
    gain: Gain
    asks: bool                                # is it about synthetic images, or about a control?
    p: float = 1.0                            # after Holm, among the claims of this kind
    family: int = 1                           # how many these are
    word: str = ""                            # the verdict


VERDICTS = {"help": "{}: help.", "hurt": "{}: hurt.",
            "none detected": "No difference detected with this many runs: {}.",
            "no verdict": "No verdict, as they are below the floor: {}.",
            "too few seeds": "Too few seeds to say (at least three): {}."}


def claims(case, prefix=None):
    """Decide all claims, [Claim]: for each count by the recogniser that is chosen, or by that of a prefix."""
    found = []
    for count in case.s.counts:
        chosen = recogniser(case, count) if prefix is None else prefix
        for arm, base, what in case.leg.claims:
            mine = "" if arm.startswith(CLIP) else chosen
            if g := difference(case, mine + arm, mine + base, count):
                asks = case.arms[arm].source in SYNTHETIC
                found.append(Claim(count, mine + arm, mine + base, what, g, asks))
    for asks in (True, False):                 # the question; and the controls, which only try the instrument
        family = [claim for claim in found if claim.asks == asks]
        for claim, p in zip(family, holm([claim.gain.p for claim in family]), strict=True):
            claim.p = p
            claim.family = len(family)
            claim.word = verdict(case, claim)
    return found


def verdict(case, claim):
    """Pick a verdict: none if both arms, or all of the recogniser but the ceiling, are below bar()."""
    scores = [values(case, name, claim.count) for name in (claim.arm, claim.base)]
    if len(scores[0]) < 3:
        return "too few seeds"
    prefix = next((prefix for prefix in (RESNET, CLIP) if claim.arm.startswith(prefix)), "")
    if max(map(np.mean, scores)) < bar(case, claim.count) or not able(case, claim.count, prefix, "test"):
        return "no verdict"
    return "none detected" if claim.p >= 0.05 else "help" if claim.gain.mean > 0 else "hurt"


def footing(case, count):
    """Say what the recognisers can do: a warning, "" if the ViT's verdict counts, and their best scores."""
    who = {"": "the ViT", RESNET: "a small ResNet", CLIP: "CLIP",
           LINEAR: "a linear classifier on colours and edges"}
    best = [f"{title} {score:.1f} % ({arm.removeprefix(prefix)})" for prefix, title in who.items()
            for arm, score in [standing(case, count, prefix)] if arm]
    common, (score, *_) = trivial(case)
    best.append(f"always {common} {score:.1f} %")
    summary = (f"With {amount(case, count)}, the best {TITLES[case.metric]} on test, but for fresh real "
               f"images: {', '.join(best)}.")
    chosen, warning = recogniser(case, count), ""
    if not (able(case, count, chosen, "test") or able(case, count, CLIP, "test")):
        warning = ("No network reaches what a linear classifier or the commonest class does, so nothing "
                   "follows from how its arms differ.")
    elif chosen == RESNET:
        warning = "The ViT stays below the linear floor, so the verdict is the ResNet's."
    return warning, summary


def answer(case, found):
    """Write the answer: what can be believed, then what helps, what hurts, and what cannot be told."""
    if not found:
        is_asked = any({arm, base} <= {*case.arms} for arm, base, _ in case.leg.claims)
        return "No answer yet: it takes two seeds." if is_asked else "No answer: no claim names these arms."
    sentences = []
    for word, sentence in VERDICTS.items():
        parts = []
        for what in dict.fromkeys(claim.what for claim in found if claim.word == word):
            asked = [claim for claim in found if claim.what == what]
            mine = [claim for claim in asked if claim.word == word]
            details = [points(claim.gain) for claim in mine if len(mine) <= 2]           # more are in a table
            if len(mine) < len(asked):
                details = [f"{claim.arm} against {claim.base} with {amount(case, claim.count)}"
                           for claim in mine]
            parts.append(f"{what} ({', '.join(details)})" if details else what)
        if parts:
            sentence = sentence.format("; ".join(parts))
            sentences.append(sentence[0].upper() + sentence[1:])

    for count in filter(case.judged.get, case.s.counts):
        if (seen := case.judged[count])["copies_p"] < ALARM:
            share = 100 * seen["copies"] / seen["looked_at"]
            where = f" with {amount(case, count)}" * (len(case.s.counts) > 1)
            sentences.append(f"{share:.1f} % of the synthetic images{where} are near-copies of real ones.")
    done = len({r["seed"] for r in case.rows})
    so_far = [f"So far, with {done} of {case.s.seeds} seeds:"] * (done < case.s.seeds)
    footings = {"": []}                                                  # {warning: it, and its summaries}
    for count in dict.fromkeys(claim.count for claim in found):
        warning, summary = footing(case, count)
        footings.setdefault(warning, [warning]).append(summary)
    assurances = footings.pop("")
    return " ".join([*so_far, *itertools.chain(*footings.values()), *sentences, *assurances])


def worth(case, count):
    """Find how many real images `count` of them with synthetic ones are worth, per class: (low, mean, high).

    The number at which the curve of the base, over the logarithm of the number of real images, first reaches
    the score of the mix; found in every seed and every resampled test set, so that its interval is like that
    of a gain. It ends where the curve ends. None unless two counts or more were run, in all of 3+ seeds.
    """
    arm, base, _ = case.leg.claims[0]
    counts = [n for n in case.s.counts if n]
    curve = [sampled(case, base, n) for n in counts]
    mix = sampled(case, arm, count)
    if len(counts) < 2 or any(c is None or len(c) < max(3, case.s.seeds) for c in [mix, *curve]):
        return None
    curve = np.maximum.accumulate(np.stack(curve, -1), -1)                       # more images never hurt
    logs = np.log(counts[::-1])        # backwards, since interp takes the last of equal scores, not the first
    found = [[np.interp(-score, -base[::-1], logs) for score, base in zip(*rows, strict=True)]
             for rows in zip(mix, curve, strict=True)]
    g = gain(np.array(found), 0, case.G)
    return tuple(float(np.exp(g.mean + side * g.half).clip(counts[0], counts[-1])) for side in (-1, 0, 1))


def worths(case):
    """Say what synthetic images are worth in real ones, a sentence for each count that allows it."""
    counts, lines = [n for n in case.s.counts if n], []
    for count in counts:
        if found := worth(case, count):
            low, mean, high = (f"{x:.0f}" for x in found)
            lines.append(f"{amount(case, count)} with synthetic ones are worth {mean} [{low}, {high}] real "
                         f"ones (the curve runs from {counts[0]} to {counts[-1]}).")
    return lines


def conditions(case):
    """Say what the answer holds for."""
    s, test, n, rare = case.s, case.test, case.s.subsets, case.leg.rare
    unit, tiles = ("tiles", f" of {case.G} tiles") if rare else ("images", "")
    trained = ", ".join(map(functools.partial(by_class, case), s.counts)) if rare else amount(case, *s.counts)
    makes = (f", {'each ' * (n > 1)}with a generator of {s.gen.steps} steps and {s.made} synthetic images "
             f"per {'rarer ' * rare}class" * any(run.after for run in case.runs))
    fresh = (f"; fresh real images: at most {s.made} per class"
             * any(run.arms[0].source == "fresh" for run in case.runs))
    prior = f"; in balanced arms the classes' weights are set on {len(case.val)} val images" * rare
    summary = (f"Conditions: {case.title} at {s.cls.size} px, {len(test.classes)} classes, {trained}, "
               f"{len(test)} test images{tiles}; seeds: {s.seeds}; draws of training images: {n}{makes}"
               f"{fresh}; classifiers of {s.cls.steps} steps{prior}. In brackets: 95 % intervals over seeds "
               f"and test {unit}")
    summary += ", not over other draws of the training images or other generators" * (n == 1) + "."
    ceilings = {run.cell[1] for run in case.runs if run.arms[0].source == "fresh"}
    asked = any(arm.source == "fresh" for arm in case.arms.values())
    if lacking := [n for n in s.counts if asked and n not in ceilings]:
        summary += (f" No ceiling with {amount(case, *lacking)}: fewer real images are left over than are "
                    "trained on.")
    if not case.cfg.data:
        summary += f" Drawn {case.name} try the comparison out; they say nothing about the world."
    return summary


def by_class(case, count):
    """Say how many training images of each class a number of tiles has, in the first draw."""
    labels = case.scenes.labels[data.choose(case.scenes, case.parts["train"], count, 0)]
    sizes = labels.bincount(minlength=len(case.test.classes)).tolist()
    listing = ", ".join(f"{size} {name}" for size, name in zip(sizes, case.test.classes, strict=True))
    return f"{amount(case, count)} (first draw: {listing})"


def points(g):
    """Format a Gain as "+3.1 [+0.4, +5.8]", in percentage points."""
    low, high = max(g.mean - g.half, -1), min(g.mean + g.half, 1)        # no scores in 0..1 differ by more
    return f"{100 * g.mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def p_text(p):
    """Format a p-value: ".016", or "< .001" below that."""
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def named(case, name, count):
    """Name an arm, with its number of real images where there are several of them."""
    return f"{name} ({count or 'all'})" if len(case.s.counts) > 1 else name


def mean_text(found):
    """Format the mean of scores in per cent, say F1 over seeds: "–" if nothing was ever recognised."""
    return f"{np.mean(found):.1f}" if any(found) else "–"


def present(case):
    """List (count, arm) of all that was run, in the order of counts and arms."""
    there = {(r["count"], r["arm"]) for r in case.rows}
    names = dict.fromkeys([*case.arms, *(run.title for run in case.runs)])
    return [(count, arm) for count in case.s.counts for arm in names if (count, arm) in there]


# Each table is (header, rows), all of text.

def main_rows(case):
    """Tabulate the scores of each arm and count, below those of always the commonest class."""
    leg, there = case.leg, {arm for _, arm in present(case)}
    bases = [base for base in leg.bases if base in there]
    name, scores = trivial(case)
    rows = [[f"always {name}", *(f"{score:.1f}" for score in scores)]]
    for count, arm in present(case):
        texts = []
        for column in (*leg.scores, "train"):
            found = values(case, arm, count, column)
            spread = f" ± {np.std(found, ddof=1):.1f}" if len({*found}) > 1 and column != "train" else ""
            texts.append(f"{np.mean(found):.1f}{spread}")
        gains = [difference(case, arm, base, count) for base in bases]
        rows.append([named(case, arm, count), *texts, *(points(g) if g else "" for g in gains)])
    return ["arm", *(f"{TITLES[score]}, %" for score in leg.scores), "on real training images, %",
            *(f"{TITLES[leg.scores[0]]} against {base}" for base in bases)], rows


def claim_rows(case, found):
    """Tabulate the claims, those of the recogniser that is not believed last."""
    others = [claim for prefix in ("", RESNET) for claim in claims(case, prefix)
              if claim.arm not in [mine.arm for mine in found if mine.count == claim.count]]
    header = ["claim", "verdict", "gain", "p after Holm", "detectable"]
    return header, [[named(case, f"{claim.arm} against {claim.base}", claim.count),
                     claim.word if claim in found else "(not followed)", points(claim.gain),
                     p_text(claim.p), f"{100 * claim.gain.detectable(claim.family):.1f}"]
                    for claim in found + others]


def detail_rows(case):
    """Tabulate F1 of each class, and macro-F1 of each event, per cent."""
    tested = [case.test.classes[c] for c in case.test.labels.unique()]
    columns = {f"f1 {name}": f"F1 {name}" for name in tested}
    columns |= {f"macro_f1 {event}": f"macro-F1 in {event}" for event in case.events}
    return ["arm", *columns.values()], [
        [named(case, arm, count), *(mean_text(values(case, arm, count, name)) for name in columns)]
        for count, arm in present(case)]


def class_rows(case):
    """Tabulate what the first claim's arm gains in each class at the largest count, most first."""
    (arm, base, _), count = case.leg.claims[0], case.s.counts[-1]
    gains, rows = {}, []
    if difference(case, arm, base, count):
        a, b = (sampled(case, who, count, f1) for who in (arm, base))                # (seeds, 1 + B, classes)
        gains = {k: gain(a[..., k], b[..., k], case.G) for k in case.test.labels.unique().tolist()}
    for k in sorted(gains, key=lambda k: -gains[k].mean):
        name = case.test.classes[k]
        means = [mean_text(values(case, who, count, f"f1 {name}")) for who in (base, arm)]
        never = set(means) == {"–"}                                      # no gain, and nothing known of one
        rows.append([name, *means, "–" if never else points(gains[k])])
    return ["class", f"F1, {base}", f"F1, {arm}", "gain"], rows


def protocol_rows(case):
    """Tabulate CLIP without and with synthetic images, as He et al. 2023 do in their table 1."""
    rows = []
    for claim in claims(case):
        if claim.arm.startswith(CLIP):
            means = [f"{np.mean(values(case, who, claim.count)):.1f}" for who in (claim.base, claim.arm)]
            pair = f"{claim.base.removeprefix(CLIP)} / {claim.arm.removeprefix(CLIP)}"
            rows.append([named(case, pair, claim.count), *means, points(claim.gain)])
    return ["CLIP, accuracy in %", "without", "with", "difference"], rows


# ---- what is said: one list of blocks, which the terminal and the page both print

def blocks(case):
    """Yield all there is to say of a leg: "# heading" or paragraph; (header, rows); (picture, caption)."""
    arm, base, _ = case.leg.claims[0]
    ran, score = dict.fromkeys(name for _, name in present(case)), TITLES[case.metric]
    found = claims(case)

    yield f"# {case.title}"
    yield answer(case, found)
    if found:
        yield forest(case, found), (f"Gains in {score}, points: a dot per seed, a bar at the mean, a line "
                                    "for the 95 % interval. Fresh real images: what more of them bring.")
    yield from worths(case)
    yield claim_rows(case, found)
    yield ("Gains in percentage points. Holm: among the claims about synthetic images, and among the "
           "controls. Detectable: what about 4 of 5 such comparisons would find, if these seeds vary as any "
           "would. " * bool(found) + conditions(case))
    if (protocol := protocol_rows(case))[1]:
        yield "## A recogniser that has read"
        yield protocol

    yield "## All arms"
    yield main_rows(case)
    augmented = [name for name, some in case.leg.arms.items()
                 if name in ran and some.augment != "none" and "augmentation" not in name]
    yield ("±: standard deviation over the seeds. Gains here are not corrected for their number."
           + f" Augmented too: {', '.join(augmented)}." * bool(augmented))
    for study in ["", *listed(case.cfg.study)]:
        mine = [name for name in ran if (name.startswith(f"{study}: ") if study else name in case.leg.arms)]
        if mine:
            yield standings(case, mine), (f"{score}, %{f': what {study} does' if study else ''}, with the "
                                          "interval of each arm's own score: whether two differ, the gains "
                                          "tell. Dashed: the floors.")

    if case.leg.rare:
        yield "## By class and event, %: means over the seeds; –: never recognised"
        yield detail_rows(case)
    header, rows = class_rows(case)
    if rows:
        yield f"## F1 by class, %, with {amount(case, case.s.counts[-1])}; gains as they are, uncorrected"
        yield header, rows
    if picture := confusions(case):
        yield picture, (f"What was taken for what: {base} left, {arm} right. A row is the truth, a column "
                        "the answer; black is always.")
    yield from likeness(case)


def likeness(case):
    """Yield what the synthetic images are like: pictures, and numbers where enough real ones are left."""
    if case.judged:
        yield "## What the synthetic images are like"
        count = [count for count in case.s.counts if count in case.judged][-1]

        def shown():
            cell = case.cell(count, 0)
            return side_by_side(cell.real, synthesize(cell, case.leg.arms[case.leg.mix]))

        yield case.once(("shown", count), shown), (
            "A row for each class that has synthetic images. Left: real training images. Right: images by a "
            "generator that saw nothing but such training images.")
    if picture := simulated(case):
        whose = "of the event held out" if case.cfg.hold_out else "that stay intact"
        yield picture, (f"Simulated damage: buildings {whose}, as they look before, and what the generator, "
                        "told this picture and the mask, makes of each.")
    for count in filter(case.judged.get, case.s.counts):
        found = case.judged[count]
        yield f"### With {amount(case, count)}"
        yield from fidelity(found)
        yield copying(found)
        yield Image.open(found["sheet"]), ("Are they copies? The 16 synthetic images nearest in structure to "
                                           "a training image of their class, turned as it is, and above it.")


def tell(cases, out):
    """Print all blocks, the answers last, where a reader of the terminal looks first."""
    heads = []
    for case in cases:
        title, summary, *rest = blocks(case)
        heads += [as_text(title), as_text(summary)]
        print(as_text(title), *filter(None, map(as_text, rest)), sep="\n\n", end="\n\n\n")
    print(*heads, sep="\n\n")
    print(f"\nThe page: {out / 'report.html'}   Every run: {out / 'results.csv'}")


def as_text(block):
    """Write a block for the terminal, which shows no pictures: "" for one."""
    if isinstance(block, str):
        text = textwrap.fill(block.lstrip("# "), 110)
        return text.upper() if block.startswith("# ") else text
    header, rows = block
    if not isinstance(rows, list) or not rows:
        return ""
    widths = [max(map(len, column)) for column in itertools.zip_longest(header, *rows, fillvalue="")]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in [header, *rows])


def as_html(block):
    """Write a block for the page."""
    if isinstance(block, str):
        tag = ("p", "h2", "h3", "h4")[len(block) - len(block.lstrip("#"))]
        return f"<{tag}>{html.escape(block.lstrip('# '))}</{tag}>"
    first, second = block
    if isinstance(second, list):
        lines = [f"<tr><th>{'<th>'.join(map(html.escape, first))}"] * bool(second)
        lines += [f"<tr><td>{'<td>'.join(map(html.escape, row))}" for row in second]
        return f"<table>{''.join(lines)}</table>"
    if not isinstance(first, str):                                       # not SVG but PIL
        file = io.BytesIO()
        first.save(file, "png")
        png = base64.b64encode(file.getvalue()).decode()
        first = f'<img alt="{html.escape(second)}" src="data:image/png;base64,{png}">'
    return f"<figure>{first}<figcaption>{html.escape(second)}</figcaption></figure>"


HEAD = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
h2 + p { font-size: 1.2rem } figure { margin: 1.5rem 0 } pre { overflow-x: auto }
table { display: block; overflow-x: auto; border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8886 }
td + td { white-space: nowrap }
:is(th, td):first-child { position: sticky; left: 0; min-width: 9rem; background: Canvas }
svg { width: 100%; max-width: 36rem; font-size: 11px; fill: currentColor; display: block }
text { paint-order: stroke; stroke: Canvas; stroke-width: 4px } path { stroke: currentColor; fill: none }
figure { overflow-x: auto } img { max-width: 100%; image-rendering: pixelated }
@media (max-width: 40rem) { img { max-width: none } td + td { white-space: normal } }
</style><title>Does synthetic data help to recognise what is seen from above?</title>
<h1>Does synthetic data help to recognise what is seen from above?</h1>"""


def report(cases, cfg, out):
    """Write report.html, which needs no other file, from what was run so far."""
    by = sorted({f"{row['commit'] or 'unknown'} on {row['device']}" for case in cases for row in case.rows})
    body = [as_html(block) for case in cases if case.rows for block in blocks(case)]
    body += ["<h2>Again</h2>", f"<pre>{html.escape(command(cfg))}</pre>", as_html(
        f"Classifiers trained by commit {', '.join(by)}; page by commit {commit() or 'unknown'}, torch "
        f"{torch.__version__}. Every run, with all its settings, is a row of results.csv.")]
    data.write(out / "report.html", HEAD + "\n".join(body))


def command(cfg):
    """Write the command line that repeats this comparison."""
    line = ["python", "experiment.py"]
    for f in fields(Config):
        if (value := getattr(cfg, f.name)) != f.default:
            line += [data.spelled(f)] + [str(value)] * (value is not True)
    return shlex.join(line)


def forest(case, found):
    """Plot the gains of the claims, and below them where the linear floor is."""
    rows, floors = {}, []
    for count, base in dict.fromkeys((claim.count, claim.base) for claim in found):
        floor = standing(case, count, LINEAR)[0]
        if floor and (g := difference(case, floor, base, count)):
            floors.append(Claim(count, floor, base, "the linear floor", g, asks=False))
    for claim in found + floors:
        a, b = (np.array(values(case, who, claim.count)) for who in (claim.arm, claim.base))
        rows.setdefault(f"{claim.what}, against {claim.base}", {})[claim.count] = claim.gain, a - b
    return plot(rows, {count: amount(case, count) for count in case.s.counts}, {"": 0}, -100)


def standings(case, names):
    """Plot the first score of arms, with the bars that a recogniser must reach."""
    rows = {name: {} for name in names}
    for name, count in itertools.product(names, case.s.counts):
        dots = values(case, name, count)
        if len(dots) > 1 and case.G > 1:
            rows[name][count] = gain(sampled(case, name, count), 0, case.G), dots
        elif dots:
            rows[name][count] = Gain(float(np.mean(dots)) / 100, ()), dots
    common, (score, *_) = trivial(case)
    marks = {f"always {common}": score}
    if floor := standing(case, case.s.counts[-1], LINEAR)[1]:
        marks[named(case, "linear floor", case.s.counts[-1])] = floor
    return plot(rows, {count: amount(case, count) for count in case.s.counts}, marks, 0)


def plot(rows, legend, marks, least):
    """Plot intervals as SVG, in per cent, cut off at `least` and 100; the axis comes from what is shown.

    rows: {name: {key of the legend: (Gain, [dot per seed])}}; legend: {key: its words}; marks: vertical
    lines, {name: place}.
    """
    spans = {}
    for name, mine in rows.items():
        for key, (g, dots) in mine.items():
            bounds = 100 * (g.mean - g.half), 100 * (g.mean + g.half)
            spans[name, key] = 100 * g.mean, *np.clip(bounds, least, 100).tolist(), *dots
    ends = [*itertools.chain(*spans.values()), *marks.values()]
    step = next(step for step in (1, 2, 5, 10, 20, 50) if max(ends) - min(ends) <= 6 * step)
    first, last = math.floor(min(ends) / step), math.floor(max(ends) / step) + 1          # in steps

    def x(value):
        return round(20 + 360 * (value / step - first) / (last - first), 1)

    top = 8 + 14 * sum(name > "" for name in marks)
    tall, parts = 20 + 10 * len(legend), []                              # a row is as high as its spans
    foot = top + tall * len(rows) + 4
    for tick in range(first, last + 1):
        parts.append(f'<path d="M{x(tick * step)} {top}V{foot}" stroke-opacity=".15"/>'
                     f'<text x="{x(tick * step)}" y="{foot + 14}" text-anchor="middle">{tick * step}</text>')
    for k, (name, place) in enumerate(marks.items()):
        side = "start" if x(place) < 200 else "end"
        parts.append(f'<path d="M{x(place)} {14 * k + 4}V{foot}" stroke-dasharray="{3 * k + 2} 3"/>'
                     f'<text x="{x(place)}" y="{14 * k + 12}" dx="{4 if side == "start" else -4}" '
                     f'text-anchor="{side}">{html.escape(name)}</text>')
    for k, name in enumerate(rows):
        parts.append(f'<text x="4" y="{top + tall * k + 12}">{html.escape(name)}</text>')
    for n, (key, words) in enumerate(legend.items()):
        colour = f'style="color: hsl({210 + 360 * n // len(legend)} 70% 50%)"'
        parts.append(f'<text x="4" y="{foot + 32 + 15 * n}"><tspan {colour} fill="currentColor">●</tspan> '
                     f'{html.escape(words)}</text>')
        for k, name in enumerate(rows):
            if (name, key) in spans:
                (mean, low, high, *dots), at = spans[name, key], top + tall * k + 20 + 10 * n
                circles = [f'<circle cx="{x(dot)}" cy="{at}" r="2.5" opacity=".6"/>' for dot in dots]
                parts.append(f'<g {colour}><path d="M{x(low)} {at}H{x(high)}" stroke-width="2"/>'
                             f'<path d="M{x(mean)} {at - 4}v8" stroke-width="3"/>{"".join(circles)}</g>')
    return f'<svg viewBox="0 0 400 {foot + 24 + 15 * len(legend)}" role="img">{"".join(parts)}</svg>'


def labelled(strips, names, zoom, heads=()):
    """Stack pictures, each with its name on its left; heads: names above the columns, read upwards."""
    strips = [s.resize((s.width * zoom, s.height * zoom), Image.Resampling.NEAREST) for s in strips]
    left, top = (max((8 + 7 * len(name) for name in some), default=0) for some in (names, heads))
    width, y = left + max(s.width for s in strips), top
    page = Image.new("RGB", (width, top + sum(s.height for s in strips)), "white")
    for strip, name in zip(strips, names, strict=True):
        ImageDraw.Draw(page).text((4, y + strip.height // 2 - 6), name, fill="black")
        page.paste(strip, (left, y))
        y += strip.height
    for k, name in enumerate(heads):
        text = Image.new("RGB", (top, 12), "white")
        ImageDraw.Draw(text).text((4, 0), name, fill="black")
        page.paste(text.rotate(90, expand=True), (left + k * zoom + zoom // 2 - 6, 0))
    return page


def album(rows, columns):
    """Draw a row of pictures, (N, C, H, W), for each name: {name: pictures}."""
    zoom = max(1, 64 // next(iter(rows.values())).shape[-1])
    return labelled([data.grid(images, columns) for images in rows.values()], [*rows], zoom)


def side_by_side(real, synthetic, columns=8):
    """Draw a row per class that has synthetic images: real ones left, synthetic ones right."""
    rows, blank = {}, real.images.new_full((columns, *real.images.shape[1:]), 255)
    for c in synthetic.labels.unique():
        left, right = (torch.cat([s.images[s.labels == c], blank])[:columns] for s in (real, synthetic))
        rows[real.classes[c]] = torch.cat([left, blank[:1], right])
    return album(rows, 2 * columns + 1)


def simulated(case, columns=16):
    """Draw intact buildings above what the generator made of them, a row per class; None if nothing."""
    done = {row["run"] for row in case.rows}
    run = next((run for run in case.runs if run.arms[0].source == "simulated" and run.name in done), None)
    if not run:
        return None
    cell = case.cell(*run.cell[1:])
    made = synthesize(cell, run.arms[0])
    rows = {"before": cell.like(run.arms[0], made.labels).images[:columns, 3:6]}
    rows |= {made.classes[c]: made.images[made.labels == c][:columns] for c in made.labels.unique()}
    return album(rows, columns)


def confusions(case):
    """Draw what was taken for what, rows adding up to 1: the first claim's base left, its arm right."""
    test, K, both = case.test, len(case.test.classes), []
    for who in reversed(case.leg.claims[0][:2]):
        predicted = [torch.tensor(r["answers"]) for r in runs_of(case, who, case.s.counts[-1])]
        if not predicted:
            return None
        matrix = sum(train_cls.confusion(test.labels, each, K) for each in predicted).double()
        both.append(matrix / matrix.sum(1, keepdim=True).clamp(min=1))
    shades = 255 - (255 * torch.cat([both[0], torch.zeros(K, 1), both[1]], 1)).round().to(torch.uint8)
    strips = [Image.fromarray(row.numpy()[None]).convert("RGB") for row in shades]
    return labelled(strips, test.classes, max(13, 240 // K), [*test.classes, "", *test.classes])


if __name__ == "__main__":
    data.launch(main, Config)
