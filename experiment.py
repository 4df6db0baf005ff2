"""Do images of a diffusion model help to recognise what is seen from above, and compared with what?

    python experiment.py                             drawn pictures: minutes on a CPU, says nothing of the world
    python experiment.py --data data/NWPU-RESISC45   the question itself: scenes
    python experiment.py --data data/xbd             the same for buildings: damage is rare, disasters are new

For each number of real images and each seed: draw a subset of the training split, train a generator on
exactly this subset, make a synthetic set with it, then train the same classifier once per arm and score it
on the test split. The rules:

    equal budget   every arm takes the same optimizer steps and images per step: a synthetic image takes the
                   place of a real one
    no leak        a generator sees its arm's real training images and nothing else; nothing is chosen on test
    paired         a seed fixes subset, weights and batches in all arms: differences are per seed and image
"""
import base64
import csv
import functools
import hashlib
import html
import io
import json
import math
import shlex
import subprocess
import time
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data
import train_cls
import train_gen
from augment import AUGMENTATIONS, OVERHEAD
from data import Problem, Scenes, flag
from train_cls import accuracy, f1, harmonic_f1, macro_f1, tally

SCORES = dict(accuracy=accuracy, macro_f1=macro_f1, harmonic_f1=harmonic_f1)
TITLES = dict(accuracy="accuracy", macro_f1="macro-F1", harmonic_f1="harmonic F1")


@dataclass(frozen=True)
class Arm:
    """What a classifier is trained on; steps and images per step are the same in all."""
    source: str = ""              # of images that take the place of real ones: generator, fresh or copies
    share: float = 0.0            # with which probability one does
    augment: str = "none"         # augmentations by name
    balance: bool = False         # all classes equally often, however rare
    w: float = 0.0                # guidance scale                                 0: as --scale has it
    calls: int = 0                # network calls per synthetic image
    ratio: float = 0.0            # synthetic images per real one
    generator: int = 0            # which of several generators of the same images
    keep: float = 0.0             # only images to whose class a teacher gives more than keep / K
    soft: bool = False            # teach what the teacher says of a synthetic image, not its class


@dataclass(frozen=True)
class Leg:
    """One half of the comparison: what is recognised, by which arms, and what is claimed of them."""
    arms: dict
    mix: str                      # the arm that the studies vary
    bases: tuple                  # the table says what each arm gains over these
    claims: tuple                 # the verdict: (arm, base, what is in question), a family for Holm
    scores: tuple                 # of SCORES; claims are about the first
    per: str                      # what --counts counts
    rare: bool = False            # images of a source take places of the rarer classes only


BALANCED = Arm(balance=True)
LEGS = {
    "scenes": Leg(
        arms={
            "real":                            Arm(),
            "real + augmentation":             Arm(augment=OVERHEAD),
            "synthetic only":                  Arm("generator", 1.0),
            "real + synthetic":                Arm("generator", 0.5),
            "real + synthetic + augmentation": Arm("generator", 0.5, OVERHEAD),
            "real + fresh real":               Arm("fresh", 0.5),   # the ceiling: a generator can do no better
            "real + copies":                   Arm("copies", 0.5),  # the floor: there is nothing to gain
        },
        mix="real + synthetic", bases=("real", "real + augmentation"),
        claims=(("real + synthetic", "real", "synthetic images"),
                ("real + synthetic + augmentation", "real + augmentation", "synthetic images"),
                ("real + fresh real", "real", "fresh real images"),
                ("real + copies", "real", "copies of the real images")),
        scores=("accuracy",), per="real images per class"),
    "buildings": Leg(
        arms={
            "real":                              Arm(),
            "balanced":                          BALANCED,
            "balanced + synthetic":              replace(BALANCED, source="generator", share=0.5),
            "balanced + copy-paste":             replace(BALANCED, augment="copypaste"),
            "balanced + synthetic + copy-paste": Arm("generator", 0.5, "copypaste", balance=True),
            "balanced + fresh real":             replace(BALANCED, source="fresh", share=0.5),
        },
        mix="balanced + synthetic", bases=("balanced", "balanced + copy-paste"),
        claims=(("balanced + synthetic", "balanced", "synthetic images of the rare classes"),
                ("balanced + synthetic + copy-paste", "balanced + copy-paste",
                 "synthetic images of the rare classes"),
                ("balanced + fresh real", "balanced", "fresh real images of the rare classes")),
        scores=("macro_f1", "harmonic_f1"), per="training tiles", rare=True),
}

STUDIES = {       # what an arm does not say here is as in its leg's mix of real and synthetic images
    "share": [dict(share=p) for p in (0.25, 0.5, 0.75, 1.0)],
    "ratio": [dict(ratio=r) for r in (0.5, 1.0, 3.0, 10.0)],
    "guidance": [dict(w=w) for w in (1.0, 1.5, 3.0, 5.0)],
    "calls": [dict(calls=n) for n in (4, 8, 12, 25, 50)],
    "filter": [dict(keep=k) for k in (0.0, 1.0, 3.0)],
    "soft": [dict(soft=on) for on in (False, True)],
    "generator": [dict(generator=k) for k in (0, 1, 2)],
    "augment": [dict(source="", share=0.0, augment=name) for name in ("none", *AUGMENTATIONS)],
    "counts": [],                                                   # all arms, at the counts of Scale.curve
}


@dataclass
class Scale:
    """How large a comparison is."""
    counts: tuple                             # real training images per class, or training tiles (0: all)
    seeds: int                                # repetitions: weights, batches, and a subset as the next line says
    subsets: int                              # different draws of the training images, each with a generator
    made: int                                 # synthetic images per class
    calls: int                                # network calls per synthetic image
    w: float                                  # guidance scale
    drawn: int                                # scenes per class, or tiles, where no data are given
    curve: tuple                              # the counts of the study of that name
    gen: train_gen.Config
    cls: train_cls.Config


_SMOKE = Scale(
    counts=(4, 8), seeds=2, subsets=2, made=8, calls=4, w=1.5, drawn=20, curve=(2, 4),
    gen=train_gen.Config(size=16, width=16, mults=(1, 2), blocks=1, steps=10, batch=16, warmup=5),
    cls=train_cls.Config(size=16, patch=4, dim=32, depth=2, heads=2, steps=10, batch=32, warmup=5))
_SMALL = Scale(
    counts=(5, 20), seeds=3, subsets=1, made=60, calls=12, w=1.5, drawn=160, curve=(3, 5, 10, 20, 40),
    gen=train_gen.Config(size=24, width=32, mults=(1, 2, 4), blocks=1, patch=2, steps=1600, batch=32,
                         lr=2e-3, warmup=50, ema=0.99, augment="none"),
    cls=train_cls.Config(size=24, patch=6, dim=64, depth=3, heads=2, steps=300, batch=64, warmup=50))
_FULL = Scale(
    counts=(10, 70, 400), seeds=5, subsets=5, made=700, calls=20, w=1.5, drawn=700, curve=(5, 20, 40, 150, 400),
    gen=train_gen.Config(), cls=train_cls.Config())
SCALES = {
    "scenes": dict(smoke=_SMOKE, small=_SMALL, full=_FULL),
    "buildings": dict(
        smoke=replace(_SMOKE, counts=(12,), drawn=64, curve=(8, 16)),
        small=replace(_SMALL, counts=(40,), drawn=256, curve=(20, 40, 80),
                      gen=replace(_SMALL.gen, steps=800)),
        full=replace(_FULL, counts=(0,), made=5000, drawn=1000, subsets=1, curve=(100, 400, 1600))),
}


@dataclass
class Config:
    """What may be asked for on the command line. 0 or empty: as --scale has it."""
    data: str = flag("", "tree with a folder per class, or xBD tree (empty: both are drawn)")
    out: str = flag("runs/experiment", "folder for results.csv, report.html, pictures and generators")
    scale: str = flag("", "smoke, small or full (empty: full for --data on a GPU, else small)")
    smoke: bool = flag(False, "every stage in under a minute, the same as --scale smoke")
    dry_run: bool = flag(False, "print the plan: runs, steps, time, disk; run nothing")
    leg: str = flag("", "without --data: scenes or buildings only (empty: both)")
    arms: str = flag("", "which arms, by comma (empty: all)")
    study: str = flag("", f"more arms, by comma: {', '.join(STUDIES)}")
    counts: str = flag("", "real images per class, or for buildings training tiles (0: all), by comma")
    seeds: int = flag(0, "repetitions")
    subsets: int = flag(0, "different draws of training images, each with its generator (at most --seeds)")
    size: int = flag(0, "side of the images in pixels, a multiple of 8")
    made: int = flag(0, "synthetic images per class")
    w: float = flag(0.0, "guidance scale (1: none)")
    gen_steps: int = flag(0, "optimizer steps of a generator")
    cls_steps: int = flag(0, "optimizer steps of a classifier")
    label: str = flag("damage", "what to tell of a building: damage, or the type of disaster: type")
    hold_out: str = flag("", "xBD event to test on, of which nothing is trained on")
    skip_broken: bool = flag(False, "leave out pictures that do not decode")

    def __post_init__(self):
        known = list(dict.fromkeys(name for leg in LEGS.values() for name in leg.arms))
        for what, value, allowed in (("arm", self.arms, known), ("study", self.study, STUDIES),
                                     ("scale", self.scale, SCALES["scenes"]), ("leg", self.leg, LEGS),
                                     ("label", self.label, ("damage", "type"))):
            if unknown := set(filter(None, value.split(","))) - set(allowed):
                raise ValueError(f"--{what}: unknown {', '.join(sorted(unknown))}; there are {', '.join(allowed)}")
        if self.counts and not (self.data or self.leg):
            raise ValueError(f"--counts {self.counts}: of which --leg, scenes or buildings?")
        self.resolved("scenes")               # a bad size or count is told before anything is done

    def legs(self):
        """The names of the legs to run."""
        if self.data and self.leg:
            raise Problem(f"--leg {self.leg}: --data decides which leg it is; give one of them")
        named = self.leg or (self.data and ("buildings" if data.is_xbd(self.data) else "scenes"))
        return [named] if named else list(LEGS)

    def resolved(self, leg):
        """The Scale of a leg that these flags stand for."""
        usual = "full" if self.data and torch.cuda.is_available() else "small"
        s = SCALES[leg]["smoke" if self.smoke else self.scale or usual]
        given = {k: getattr(self, k) for k in ("seeds", "subsets", "made", "w") if getattr(self, k)}
        counts = data.numbers(self.counts) if self.counts else s.counts
        if "counts" in self.study.split(","):
            counts += s.curve
        given["counts"] = tuple(sorted(set(counts), key=lambda n: n or math.inf))       # 0, all, is the most
        size = self.size or s.gen.size
        patch = s.cls.patch * size // s.gen.size                              # as many tokens at any size
        return replace(s, **given, gen=replace(s.gen, size=size, steps=self.gen_steps or s.gen.steps),
                       cls=replace(s.cls, size=size, patch=patch, steps=self.cls_steps or s.cls.steps))

    def wanted(self, leg):
        """The arms of a leg that are asked for, {name: Arm}, those of the studies last."""
        named = [name.strip() for name in self.arms.split(",") if name.strip()]
        arms = {name: arm for name, arm in leg.arms.items() if not named or name in named}
        for study in filter(None, self.study.split(",")):
            for change in STUDIES[study]:
                if leg.rare or change.get("augment") != "copypaste":            # scenes have no masks
                    told = next(f"{k} {v}" for k, v in reversed(change.items()))
                    arms[f"{study}: {told}"] = replace(leg.arms[leg.mix], **change)
        return arms


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
    test: Scenes
    rows: list = field(default_factory=list)
    judged: dict = field(default_factory=dict)                           # {count: what judge() found}
    shown: tuple = ()                                                    # real, synthetic Scenes for the page
    memory: dict = field(default_factory=dict)                           # of sampled()

    def choose(self, count, draw):
        """The real training images, and in random order those of the training split that are not among them."""
        train = self.parts["train"]
        index = (data.some_tiles if self.leg.rare else data.subset)(self.scenes, train, count, draw)
        others = train[~torch.isin(train, index)]
        others = others[torch.randperm(len(others), generator=data.rng(draw))]
        return self.scenes[index], self.scenes[others]

    @functools.cached_property
    def events(self):
        """Which test images are of which disaster, {name: (N,) bool}, if there are several."""
        of = np.array([data.event_of(name) for name in self.test.names] if self.leg.rare else [])
        return {event: of == event for event in np.unique(of)} if len(np.unique(of)) > 1 else {}


# ---- the runs

def main(cfg):
    """The script: run what is missing, renew the page on the way, print tables and verdicts."""
    out = Path(cfg.out)
    cases = [prepare(cfg, name, out) for name in cfg.legs()]
    stored = read_results(out)                           # all runs; those of this comparison: case.rows
    for case in cases:
        plan(case, stored, out)
    if cfg.dry_run:
        return
    for case in cases:
        for seed in range(case.s.seeds):
            for count in case.s.counts:
                cell(case, count, seed, stored, out)
                report(cases, cfg, out)
    for case in cases:
        budgets = {(row["steps"], row["images"]) for row in case.rows}
        assert len(budgets) == 1, f"arms of unequal budget: {budgets}"
        print("", table(case, out), verdict(case, out), likeness(case), sep="\n\n")
    print(f"\nThe page: {out / 'report.html'}   Every run: {out / 'results.csv'}")


def prepare(cfg, name, out):
    """Read the images of a leg and split them. -> Case. What cannot work is told before anything is run."""
    leg, s, cache = LEGS[name], cfg.resolved(name), out / "cache"
    root = Path(cfg.data) if cfg.data else out / f"drawn-{name}-{s.drawn}"
    if not leg.rare:
        scenes = data.read_folder(root if cfg.data else data.draw_tree(root, s.drawn), s.cls.size,
                                  cfg.skip_broken, cache)
    else:
        scenes = data.read_xbd(root if cfg.data else data.draw_xbd(root, s.drawn), s.cls.size, cfg.label,
                               mask=True, cache=cache)
    parts = data.split(scenes, root, hold_out=cfg.hold_out if cfg.data or leg.rare else "")
    title = root.resolve().name if cfg.data else f"drawn {name}"
    title += f", {cfg.hold_out} held out" * bool(cfg.hold_out and leg.rare)
    case = Case(name, leg, cfg.wanted(leg), s, cfg, title, scenes, parts, scenes[parts["test"]])
    if not case.arms:
        raise Problem(f"--arms {cfg.arms}: none of these is an arm of the {name}: {', '.join(leg.arms)}")
    for count in s.counts:
        case.choose(count, 0)
    return case


def cell(case, count, seed, stored, out):
    """All arms for a number of real images and a seed."""
    s, draw = case.s, seed % case.s.subsets
    real, fresh = case.choose(count, draw)
    check_leaks(case, real)
    what, told = f"{case.name}, {amount(case, count)}, seed {seed + 1} of {s.seeds}", []
    if any(arm.source == "generator" for arm in case.arms.values()) and seed < s.subsets:
        mix = case.leg.arms[case.leg.mix]
        synthetic = synthesize(recipe(case, mix, real, draw), real, out, what)
        case.shown = real, synthetic
        if draw == 0:
            case.judged[count] = judge(case, real, synthetic, fresh, out, what)
    for name, arm in case.arms.items():
        if arm.source == "fresh" and not len(fresh):
            continue                                        # all real images are in use: no ceiling to be seen
        run = run_id(case, arm, real, fresh, draw, seed)
        if run not in stored:
            row = dict(run=run, leg=case.name, arm=name, count=count, seed=seed, data=case.title)
            pool, soft = source(case, arm, real, fresh, draw, seed, out, what)
            stored[run] = row | score(case, arm, real, pool, soft, seed, f"{name}, {what}", out / "predicted" / run)
            write_results(out, stored)
        case.rows.append(stored[run] | dict(arm=name, count=count, seed=seed))
        told.append(f"{name} {100 * stored[run][case.leg.scores[0]]:.1f}")
    print(f"{what}: {', '.join(told)}", flush=True)


def check_leaks(case, real):
    """Raise AssertionError if training and test images have a group, or an event that is held out, in common."""
    seen, tested = ({*scenes.groups.tolist()} for scenes in (real, case.test))
    assert not seen & tested, "a training image, its double or its neighbour is in the test split"
    if case.cfg.hold_out and case.leg.rare:
        assert {*map(data.event_of, case.test.names)} == {case.cfg.hold_out}, "another event in the test split"
        assert case.cfg.hold_out not in {*map(data.event_of, real.names)}, "the event held out is trained on"


def run_id(case, arm, real, fresh, draw, seed):
    """A name for everything that decides a run's result: what bears it need not be run again."""
    made = {"": lambda: None, "generator": lambda: recipe(case, arm, real, draw), "copies": lambda: case.s.made,
            "fresh": lambda: (case.s.made, fresh.digest)}[arm.source]()
    return digest(arm, case.s.cls, made, real.digest, case.test.digest, real.classes, seed)


def digest(*what):
    """A short name for anything whose repr tells all about it."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def recipe(case, arm, real, draw):
    """How the synthetic images of an arm are made: settings of the generator, then of the images."""
    s, K = case.s, len(real.classes)
    wanted = rare(real) if case.leg.rare else list(range(K))
    return dict(gen=replace(s.gen, seed=draw + 1000 * arm.generator), classes=wanted, calls=arm.calls or s.calls,
                w=arm.w or s.w, made=round(arm.ratio * len(real) / K) or s.made)


def rare(scenes):
    """The classes that have fewer images than the mean of all classes."""
    count = scenes.labels.bincount(minlength=len(scenes.classes))
    return (count < count.float().mean()).nonzero().flatten().tolist()


def synthesize(how, real, out, what):
    """Scenes by a generator trained on real and nothing else; taken from the disk if they are there.

    Of rare classes by a generator of these classes: the common one would take most of its steps.
    """
    real = real[torch.isin(real.labels, torch.tensor(how["classes"]))]
    path = out / "generators" / f"{digest(how['gen'], real.digest)}.pt"
    store = out / "synthetic" / f"{digest(how, real.digest)}.pt"
    y = torch.tensor(how["classes"]).repeat_interleave(how["made"])
    if not store.exists():
        generator = train_gen.train(real, how["gen"], path, title=f"generator, {what}")
        images = train_gen.generate(generator, y, how["gen"].seed, how["calls"], how["w"],
                                    title=f"synthetic images, {what}")
        with data.replacing(store) as temporary:
            torch.save(images, temporary)
    return Scenes(torch.load(store, weights_only=True), y, real.classes,
                  [f"synthetic {k}" for k in range(len(y))], torch.arange(len(y)))


def source(case, arm, real, fresh, draw, seed, out, what):
    """The images that take the place of real ones, Scenes or None, and what to teach of each, (N, K) or None."""
    if not arm.source:
        return None, None
    how = recipe(case, arm, real, draw)
    if arm.source == "generator":
        pool = synthesize(how, real, out, what)
    else:
        pool = real if arm.source == "copies" else fresh
        pool = pool[torch.cat([(pool.labels == c).nonzero().flatten()[:how["made"]] for c in how["classes"]])]
    if not (arm.keep or arm.soft):
        return pool, None
    cfg = replace(case.s.cls, seed=seed, augment=OVERHEAD, balance=arm.balance)
    path = out / "teachers" / f"{digest(cfg, real.digest)}.pt"
    teacher, _ = train_cls.fit(real, None, cfg, path, title=f"teacher, {what}")
    p = train_cls.outputs(teacher, pool.images).softmax(1)
    kept = (p.gather(1, pool.labels[:, None])[:, 0] > arm.keep / p.shape[1]).nonzero().flatten()
    return pool[kept], p[kept] if arm.soft else None


def score(case, arm, real, pool, soft, seed, title, path):
    """Train the classifier of an arm, keep its answers on the test split in `path`, return its results."""
    start, test = time.perf_counter(), case.test
    share = arm.share if pool and len(pool) else 0.0                # a filter may have let nothing through
    cfg = replace(case.s.cls, seed=seed, share=share, augment=arm.augment, balance=arm.balance)
    model, seen = train_cls.fit(real, pool, cfg, soft=soft, title=title)
    predicted = train_cls.predict(model, test.images)
    with data.replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, predicted.numpy().astype(np.int16))
    counts = tally(test.labels, predicted, test.groups, len(test.classes))
    row = {name: float(SCORES[name](counts.sum(0))) for name in SCORES}
    row |= {f"f1 {name}": float(v) for name, v in zip(test.classes, f1(counts.sum(0)), strict=True)}
    for event, mine in case.events.items():
        counts = tally(test.labels[mine], predicted[mine], test.groups[mine], len(test.classes))
        row[f"macro_f1 {event}"] = float(macro_f1(counts.sum(0)))
    seconds = round(time.perf_counter() - start, 1)
    return dict(**row, **seen, seconds=seconds, device=str(data.pick_device()), commit=commit(),
                settings=json.dumps(asdict(replace(case.s, cls=cfg)) | asdict(arm)))


@functools.cache
def commit():
    """The commit of this code, with a + if it has been changed since; empty outside a checkout."""
    git = ["git", "describe", "--always", "--dirty=+", "--abbrev=7"]
    try:
        return subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:                                                  # no git on this machine
        return ""


def read_results(out):
    """The runs that results.csv holds, {run: row}."""
    if not (out / "results.csv").exists():
        return {}
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = dict.fromkeys(("run", "leg", "arm", "data", "device", "commit", "settings"), str)
    kinds |= dict.fromkeys(("count", "seed", "steps", "images", "synthetic"), int)
    return {row["run"]: {k: kinds.get(k, float)(v) for k, v in row.items() if v != ""} for row in rows}


def write_results(out, rows):
    """All runs as one tidy table, a row per run."""
    header = list(dict.fromkeys(k for row in rows.values() for k in row))
    data.save_csv(out / "results.csv", header, [[row.get(k, "") for k in header] for row in rows.values()])


def amount(case, count):
    """A number of real images in words: "20 real images per class", "all training tiles"."""
    return f"{count or 'all'} {case.leg.per}"


def plan(case, stored, out):
    """Say what will be run, and from a few steps of each kind how long it takes here."""
    s, runs, made = case.s, 0, {}
    for seed in range(s.seeds):
        for count in s.counts:
            real, fresh = case.choose(count, seed % s.subsets)
            for arm in case.arms.values():
                missing = run_id(case, arm, real, fresh, seed % s.subsets, seed) not in stored
                runs += missing
                if missing and arm.source == "generator":
                    how = recipe(case, arm, real, seed % s.subsets)
                    made[digest(how, real.digest)] = how, digest(how["gen"], real.digest)
    images = sum(how["made"] * len(how["classes"]) for how, _ in made.values())
    generators = len({name for _, name in made.values()})
    sizes = ", ".join(f"{len(index)} {part}" for part, index in case.parts.items())
    print(f"{case.title}: {len(case.scenes)} images of {len(case.scenes.classes)} classes at {s.cls.size} px "
          f"({sizes})\n  {' and '.join(str(n or 'all') for n in s.counts)} {case.leg.per} x {s.seeds} seeds x "
          f"{len(case.arms)} arms; to be run: {runs} classifiers of {s.cls.steps} steps, {generators} generators "
          f"of {s.gen.steps} steps, {images} synthetic images")
    if runs:
        gen, cls = step_times(case)
        calls = sum(how["made"] * len(how["classes"]) * how["calls"] * (1 if how["w"] == 1 else 2)
                    for how, _ in made.values())
        stages = dict(generators=generators * s.gen.steps * gen, sampling=calls * gen / 3 / s.gen.batch,
                      classifiers=runs * s.cls.steps * cls)       # a forward pass is a third of a step
        told = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in stages.items())
        _, model = train_gen.networks(s.gen, len(case.scenes.classes), case.scenes.images.shape[1])
        disk = generators * 16 * sum(p.numel() for p in model.parameters())    # weights, average, two moments
        disk += (images + len(case.scenes)) * case.scenes.images[0].numel()
        print(f"  minutes on {data.pick_device()}: {told}, in all about {sum(stages.values()) / 60:.1f}; "
              f"disk: {disk / 1e6:.0f} MB", flush=True)


def step_times(case):
    """Seconds per step of a generator and of a classifier."""
    probe = case.scenes[case.parts["train"][:64]]

    def seconds(run, config):
        """What a longer run takes more than a shorter one, after one that only warms up."""
        marks = []
        for steps in (1, 2, 8):
            start = time.perf_counter()
            run(replace(config, steps=steps))
            marks.append(time.perf_counter() - start)
        return max(0.0, marks[2] - marks[1]) / 6

    return (seconds(lambda cfg: train_gen.train(probe, cfg), case.s.gen),
            seconds(lambda cfg: train_cls.fit(probe, None, cfg), case.s.cls))


# ---- the statistics: counts of answers, resampled; differences of two arms

def replicates(counts, statistic, B=1000, seed=0):
    """The statistic of counts (S, G, 3, K), and of B test sets that might have been: (S, 1 + B).

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


def student(dof):
    """x from 0 up, and P(T > x) for Student's t, by adding up its density: scipy is not among our packages.

    With x = sinh(u) and u evenly spaced, the grid is dense at 0 and reaches as far as the heaviest tails.
    """
    u = np.linspace(0, 40, 40_001)
    x = np.sinh(u)
    density = np.exp(-(dof + 1) / 2 * np.log1p(x**2 / dof)) * np.cosh(u)   # of u, but for a constant
    tail = np.append((density[1:] + density[:-1])[::-1].cumsum()[::-1], 0)
    return x, tail / tail[0] / 2                                           # P(T > 0) = 1/2 is the constant


def t_quantile(p, dof):
    """The p-quantile of Student's t, p >= .5."""
    x, tail = student(dof)
    return float(np.interp(p - 1, -tail, x))


@dataclass
class Gain:
    """What one arm gains over another, with what seeds and test images leave open."""
    mean: float                               # over the seeds
    se: float                                 # standard error of this mean
    dof: float                                # its degrees of freedom
    p: float                                  # two-sided, of a mean so far from 0 if there is no difference
    flip: float                               # the same, by flipping the signs of the seeds: see sign_flip
    per_seed: list[float]

    @property
    def half(self):
        """Half width of the 95 % interval."""
        return t_quantile(0.975, self.dof) * self.se

    @property
    def detectable(self):
        """The smallest difference that such a comparison would have found in 4 of 5 cases."""
        return (t_quantile(0.975, self.dof) + t_quantile(0.8, self.dof)) * self.se


def gain(a, b, groups):
    """Gain of an arm over another: a, b (S, 1 + B) their replicates, same seeds; groups: G of the test set.

    Both the seeds and the groups of test images are samples of what might have been, and the variance of the
    mean over both is told apart as in a two-way analysis of variance,

        seed + group - rest:    what varies over the seeds / S, what the mean varies over the resampled test
                                sets, and the share that both contain: what varies over seed and group at once

    with the degrees of freedom of Satterthwaite 1946, at least those of the scarcer sample. For the mean of
    an answer's score, like accuracy, this is the classical estimate up to the noise of the bootstrap; for any
    other statistic, the same to first order. Against b = 0 it is the interval of an arm's own score.
    """
    d = np.asarray(a) - b
    S = len(d)
    if S < 2:
        raise ValueError("an interval takes two seeds")
    per_seed, d = d[:, 0], d[:, 1:]
    both = d.mean(0)                                                     # of each resampled test set
    unbiased = groups / (groups - 1)                # a bootstrap variance is smaller by this, as std(ddof=0)
    seed, group = per_seed.var(ddof=1) / S, unbiased * both.var(ddof=1)
    rest = unbiased * (d - both).var(1, ddof=1).sum() / (S - 1) / S
    parts, freedom = np.array([seed, group, rest]), np.array([S - 1, groups - 1, (S - 1) * (groups - 1)])
    total = seed + group - rest
    if total > rest:
        dof = max(total**2 / (parts**2 / freedom).sum(), freedom.min())
    else:                                     # seeds and groups differ no more than single answers do
        total, dof = rest, freedom[2]
    mean, se = per_seed.mean(), math.sqrt(total)
    return Gain(float(mean), se, float(dof), p_value(mean, se, dof), sign_flip(per_seed), per_seed.tolist())


def p_value(mean, se, dof):
    """P(|T| >= |mean| / se), two-sided; without any spread it is 1 if the mean is 0, else 0."""
    if se == 0:
        return float(mean == 0)
    x, tail = student(dof)
    return float(2 * np.interp(abs(mean) / se, x, tail))


def sign_flip(d):
    """Exact test that the differences d (S,) of paired seeds are as likely up as down (Fisher 1935).

    Share of the 2^S ways to give them signs whose sum is as far from 0 as theirs. It assumes no distribution,
    but the smallest value that it can take is 2^(1 - S): with fewer than 6 seeds it cannot reach 5 %, however
    clear the case, and it takes the test images as given. A verdict therefore follows the interval, and this
    stands beside it.
    """
    d = np.asarray(d)
    signs = np.array(list(product((1, -1), repeat=len(d))))
    return float((abs(signs @ d) >= abs(d.sum()) * (1 - 1e-9)).mean())


def holm(ps):
    """p-values adjusted for being so many, in their order, by Holm 1979.

    The smallest times their number, the next times one less and so on, at most 1, and none below one that
    was smaller. To reject where this is at most 5 % errs in any of the family in at most 5 % of cases.
    """
    ps = np.asarray(ps, dtype=float)
    order = ps.argsort()
    adjusted = np.empty_like(ps)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(ps[order] * np.arange(len(ps), 0, -1)))
    return adjusted.tolist()


# ---- the answers

def sampled(case, arm, count, statistic, out):
    """Replicates of a statistic of an arm, (seeds, 1 + B, ...), None if it was not run."""
    runs = sorted((r["seed"], r["run"]) for r in case.rows if r["arm"] == arm and r["count"] == count)
    if not runs:
        return None
    key = statistic, *runs
    if key not in case.memory:
        test, K = case.test, len(case.test.classes)
        answers = [torch.from_numpy(np.load(out / "predicted" / run).astype(np.int64)) for _, run in runs]
        counts = np.stack([tally(test.labels, answer, test.groups, K) for answer in answers])
        case.memory[key] = replicates(counts, statistic)
    return case.memory[key]


def difference(case, arm, base, count, statistic, out):
    """What arm gains over base, a Gain (or one per class); None unless both ran the same two seeds or more."""
    a, b = (sampled(case, name, count, statistic, out) for name in (arm, base))
    if arm == base or a is None or b is None or len(a) != len(b) or len(a) < 2:
        return None
    groups = len(case.test.groups.unique())
    return gain(a, b, groups) if a.ndim == 2 else [gain(a[..., k], b[..., k], groups) for k in range(a.shape[2])]


def points(g):
    """+3.1 [+0.4, +5.8], in percentage points."""
    return f"{100 * g.mean:+.1f} [{100 * (g.mean - g.half):+.1f}, {100 * (g.mean + g.half):+.1f}]" if g else ""


def present(case):
    """(count, arm) of all that was run, in order."""
    there = {(r["count"], r["arm"]) for r in case.rows}
    return [(count, arm) for count in case.s.counts for arm in case.arms if (count, arm) in there]


def mean_of(case, arm, count, column):
    """Mean and standard deviation (0 for one run) of a column of results.csv over the seeds, per cent."""
    values = [100 * r[column] for r in case.rows if r["arm"] == arm and r["count"] == count]
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0


def always(case):
    """The commonest training class, and the counts of whoever answers nothing else."""
    c = case.scenes.labels[case.parts["train"]].bincount().argmax()
    return case.test.classes[c], tally(case.test.labels, torch.full_like(case.test.labels, c), case.test.groups,
                                       len(case.test.classes)).sum(0)


def main_rows(case, out):
    """The table: its header, and a list of cells per count and arm."""
    header = [case.leg.per, "arm", *(f"{TITLES[name]}, %" for name in case.leg.scores),
              *(f"{TITLES[case.leg.scores[0]]} against {base}" for base in case.leg.bases)]
    common, counts = always(case)
    rows = [["", f"always {common}", *(f"{100 * SCORES[name](counts):.1f}" for name in case.leg.scores)]]
    for count, arm in present(case):
        scored = ["{:.1f} ± {:.1f}".format(*mean_of(case, arm, count, name)) for name in case.leg.scores]
        gains = [difference(case, arm, base, count, SCORES[case.leg.scores[0]], out) for base in case.leg.bases]
        rows.append([str(count or "all"), arm, *scored, *map(points, gains)])
    return header, rows


def detail_rows(case):
    """F1 of each class, and the first score of each event, per cent: header and rows; for few classes only."""
    columns = [f"f1 {name}" for name in case.test.classes] + [f"macro_f1 {name}" for name in case.events]
    header = [case.leg.per, "arm", *(name.replace("macro_f1", "macro-F1 in").replace("f1", "F1") for name in columns)]
    rows = [[str(count or "all"), arm, *(f"{mean_of(case, arm, count, name)[0]:.1f}" for name in columns)]
            for count, arm in present(case)]
    return header, rows


def class_rows(case, out):
    """What the first claim's arm gains in each class at the largest count, the largest gain first."""
    arm, base, _ = case.leg.claims[0]
    gains = difference(case, arm, base, case.s.counts[-1], f1, out)
    if not gains:
        return [], []
    rows = [[name, *(f"{mean_of(case, who, case.s.counts[-1], f'f1 {name}')[0]:.1f}" for who in (base, arm)),
             points(g)] for g, name in sorted(zip(gains, case.test.classes, strict=True), key=lambda z: -z[0].mean)]
    return ["class", f"F1, {base}", f"F1, {arm}", "gain"], rows


def as_text(header, rows):
    """Cells below each other."""
    rows = [row + [""] * (len(header) - len(row)) for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def table(case, out):
    """The results as text."""
    more = "\n\n" + as_text(*detail_rows(case)) if case.leg.rare else ""
    return f"{case.name.upper()}\n{as_text(*main_rows(case, out))}{more}"


def verdict(case, out):
    """The answer in sentences, with its conditions."""
    score, s, found = case.leg.scores[0], case.s, []
    for count in s.counts:
        for arm, base, what in case.leg.claims:
            if g := difference(case, arm, base, count, SCORES[score], out):
                found.append((count, arm, base, what, g))
    if not found:
        return "No verdict: it takes two seeds, and arms to compare: " + ", ".join(
            f"{arm} with {base}" for arm, base, _ in case.leg.claims) + "."
    said = []
    for (count, arm, base, what, g), p in zip(found, holm([g.p for *_, g in found]), strict=True):
        said.append(f"With {amount(case, count)}, {what} {in_words(g.mean, p)}: {arm} against {base} {points(g)} "
                    f"points of {TITLES[score]} (p {p:.3f} after Holm, {g.flip:.2f} by sign flips of the seeds; "
                    f"a gain of {100 * g.detectable:.1f} would have been found in 4 of 5 cases).")
    draws, tested = min(s.subsets, s.seeds), len(case.test.groups.unique())
    missed = ", which do not cover another draw of the training images" if draws == 1 else ""
    made = ", ".join(f"{n} {part}" for part, n in (("classes", len(case.test.classes)), ("test images", len(case.test)),
                     ("of them independent" if not case.leg.rare else "test tiles", tested), ("seeds", s.seeds)))
    said.append(
        f"Conditions: {case.title} at {s.cls.size} px, {made}; {draws} draw{'s' * (draws > 1)} of the training "
        f"images, each with its generator of {s.gen.steps} steps and {s.made} synthetic images per class; "
        f"classifiers of {s.cls.steps} steps. In brackets: 95 % intervals over seeds and test "
        f"{'tiles' if case.leg.rare else 'images'}{missed}.")
    if not case.cfg.data:
        said.append(f"Drawn {case.name} show that the method works; they say nothing about the world.")
    return "\n".join(said)


def in_words(mean, p):
    """help, hurt, or make no difference that so few runs could show."""
    return "make no difference that so few runs could show" if p >= 0.05 else "help" if mean > 0 else "hurt"


# ---- what the synthetic images are like

def judge(case, real, synthetic, fresh, out, what):
    """How synthetic images differ from real ones, and whether they are copies: {name: number}.

    The features are those of a classifier trained on real images that the generator never saw, one half of
    what training leaves over and of val; the other half is what synthetic images are compared to. Half of
    that stands in for them once more: what another real sample would score is the floor of every number.
    """
    name = digest("judge", case.s.cls, real.digest, synthetic.digest, fresh.digest)
    path, sheet = out / "judged" / f"{name}.json", out / "judged" / f"{name}.png"
    if not path.exists():
        val = case.scenes[case.parts["val"]]
        unseen = join(fresh, val)
        unseen = unseen[torch.isin(unseen.labels, synthetic.labels)]
        tiles = unseen.groups.unique()
        part = torch.empty(int(tiles.max()) + 1, dtype=torch.int64)
        part[tiles] = torch.randperm(len(tiles), generator=data.rng(0)) % 4     # a group is in one part
        part = part[unseen.groups]
        teach, a, b = (unseen[keep.nonzero().flatten()] for keep in (part < 2, part == 2, part == 3))
        cfg = replace(case.s.cls, augment=OVERHEAD, balance=case.leg.rare)
        eye = train_cls.fit(teach, None, cfg, title=f"features, {what}")[0].features
        held, _ = alike(val[torch.isin(val.labels, synthetic.labels)], synthetic)
        found = compare(eye, *alike(a, b, synthetic)) | suspects(eye, real, synthetic, held, sheet)
        with data.replacing(path) as temporary:
            temporary.write_text(json.dumps(found))
    return json.loads(path.read_text()) | dict(sheet=str(sheet))


def join(a, b):
    """Two Scenes of the same classes as one."""
    return Scenes(torch.cat([a.images, b.images]), torch.cat([a.labels, b.labels]), a.classes, a.names + b.names,
                  torch.cat([a.groups, b.groups]))


def alike(*several, most=4000):
    """Of each Scenes as many images of every class as the others have: no class mix to tell them apart by."""
    K = len(several[0].classes)
    least = torch.stack([s.labels.bincount(minlength=K) for s in several]).amin(0).clamp(max=most // K)
    return [s[torch.cat([(s.labels == c).nonzero().flatten()[:least[c]] for c in range(K)])] for s in several]


def compare(eye, a, b, synthetic):
    """Frechet distance, precision, recall, density and coverage of synthetic and of other real images b."""
    reference, *others = (train_cls.outputs(eye, s.images) for s in (a, b, synthetic))
    found = dict(judged_by=len(a))
    for who, features in zip(("real", "synthetic"), others, strict=True):
        numbers = dict(frechet=train_gen.frechet(reference, features)) | train_gen.prdc(reference, features)
        found |= {f"{who} {name}": float(value) for name, value in numbers.items()}
    return found


def suspects(eye, real, synthetic, held, sheet, most=400):
    """Are they copies? Distances to the nearest training image, synthetic against held-out real images.

    By pixels (rms, grey levels) and by features, over turns and flips. The 16 most suspicious are drawn
    above their nearest real images.
    """
    real = real[torch.isin(real.labels, synthetic.labels)]
    some = synthetic[torch.linspace(0, len(synthetic) - 1, min(len(synthetic), most)).long()]
    found = dict(trained_on=len(real))
    for space, embed in (("pixels", lambda x: x.flatten(1)),
                         ("features", lambda x: train_cls.outputs(eye, x))):
        near, (distance, which, turn) = [], (None, None, None)
        for s in (held, some):
            turned = torch.stack([embed(x) for x in train_gen.symmetries(s.images[:most])])
            distance, which, turn = train_gen.nearest(turned, embed(real.images))
            near.append(distance)
        share, p = train_gen.mann_whitney(near[1], near[0])
        found |= {f"{space} share": share, f"{space} p": p, f"{space} held": float(near[0].median()),
                  f"{space} synthetic": float(near[1].median())}
        if space == "pixels":
            worst = distance.argsort()[:16]
            copies = train_gen.symmetries(some.images)[turn[worst], worst]
            strips = [data.grid(images, 16) for images in (copies, real.images[which[worst]])]
            zoom = max(1, 64 // real.images.shape[-1])
            data.save_picture(labelled(strips, ["synthetic", "nearest real"], zoom), sheet)
    return found


def likeness(case):
    """What judge() found, as text."""
    return "\n".join(line for count, found in case.judged.items() for line in
                     [f"{amount(case, count)}:", as_text(*judged_rows(found)), copying(found)])


def judged_rows(found):
    """Synthetic beside real images: header and rows."""
    names = "frechet", "precision", "recall", "density", "coverage"
    rows = [[who, *(f"{found[f'{who} {name}']:.2f}" for name in names)] for who in ("synthetic", "real")]
    rows[1][0] = "other real (floor)"
    return ["images", "Fréchet distance", *names[1:]], rows


def copying(found):
    """One sentence: are they copies?"""
    pixel, feature = found["pixels share"], found["features share"]
    caught = max(pixel, feature) > 0.75 and min(found["pixels p"], found["features p"]) < 0.01
    answer = "Many are copies" if caught else "No sign of copies"
    return (f"{answer}: of pairs of a synthetic and a held-out real image, the synthetic one is nearer to one of "
            f"the {found['trained_on']} training images in {100 * pixel:.0f} % by pixels (Mann-Whitney p "
            f"{found['pixels p']:.1g}) and {100 * feature:.0f} % by features (p {found['features p']:.1g}); "
            "50 % or less is no sign, copies come near 100 %.")


# ---- the pictures and the page

def labelled(strips, names, zoom):
    """Pictures below each other, a name at the left of each."""
    strips = [s.resize((s.width * zoom, s.height * zoom), Image.Resampling.NEAREST) for s in strips]
    left, y = 8 + 7 * max(map(len, names)), 0
    width, height = left + max(s.width for s in strips), sum(s.height for s in strips)
    page = Image.new("RGB", (width, height), "white")
    for strip, name in zip(strips, names, strict=True):
        ImageDraw.Draw(page).text((4, y + strip.height // 2 - 6), name, fill="black")
        page.paste(strip, (left, y))
        y += strip.height
    return page


def side_by_side(real, synthetic, columns=8, most=24):
    """A row per class (the first so many): real images left, synthetic ones right."""
    strips, blank = [], real.images.new_full((columns, *real.images.shape[1:]), 255)
    shown = [c for c in range(len(real.classes)) if (synthetic.labels == c).any()][:most]
    for c in shown:
        left, right = (torch.cat([s.images[s.labels == c], blank])[:columns] for s in (real, synthetic))
        strips.append(data.grid(torch.cat([left, blank[:1], right]), 2 * columns + 1))
    return labelled(strips, [real.classes[c] for c in shown], zoom=max(1, 64 // real.images.shape[-1]))


def confusions(case, out):
    """How often which class was taken for which, rows add up to 1: the base left, the first claim's arm right."""
    test, K, count = case.test, len(case.test.classes), case.s.counts[-1]
    both = []
    for arm in reversed(case.leg.claims[0][:2]):
        runs = [r["run"] for r in case.rows if r["arm"] == arm and r["count"] == count]
        if not runs:
            return None
        answers = torch.stack([torch.from_numpy(np.load(out / "predicted" / run).astype(np.int64)) for run in runs])
        matrix = train_cls.confusion(test.labels.repeat(len(runs)), answers.flatten(), K).double()
        both.append(matrix / matrix.sum(1, keepdim=True).clamp(min=1))
    cells = 255 - (255 * torch.cat([both[0], torch.zeros(K, 1), both[1]], 1)).round().to(torch.uint8)
    strips = [Image.fromarray(row.numpy()[None]).convert("RGB") for row in cells]
    return labelled(strips, test.classes, zoom=max(12, 240 // K))


def chart(case, names, title):
    """The first score of arms as SVG: a dot per seed, a bar at the mean, a colour of the page per count."""
    score, counts = case.leg.scores[0], case.s.counts
    parts, foot = [], 34 * len(names) + 12

    def x(share):
        return round(250 + 420 * share, 1)

    for tick in range(0, 101, 20):
        at = x(tick / 100)
        parts.append(f'<line x1="{at}" x2="{at}" y1="8" y2="{foot}" class="tick"/>'
                     f'<text x="{at}" y="{foot + 16}" text-anchor="middle">{tick} %</text>')
    for i, arm in enumerate(names):
        parts.append(f'<text x="242" y="{34 * i + 32}" text-anchor="end">{html.escape(arm)}</text>')
        for k, count in enumerate(counts):
            scores = [r[score] for r in case.rows if r["arm"] == arm and r["count"] == count]
            y, color = 34 * i + 28 + 24 * ((k + 0.5) / len(counts) - 0.5), f"c{k % 4}"
            parts += [f'<circle cx="{x(v)}" cy="{y}" r="3" class="{color}"/>' for v in scores]
            if scores:
                mean = x(float(np.mean(scores)))
                parts.append(f'<line x1="{mean}" x2="{mean}" y1="{y - 5}" y2="{y + 5}" class="mean {color}"/>')
    return svg(parts, foot, [f"{n or 'all'} {case.leg.per}" for n in counts], title)


def curve(case, names, title):
    """The first score over the number of real images as SVG, with bands: 95 % intervals over the seeds."""
    score, counts, parts = case.leg.scores[0], [n for n in case.s.counts if n], []
    low, high = math.log(counts[0]), math.log(counts[-1])

    def place(count, share):
        return f"{60 + 600 * (math.log(count) - low) / (high - low):.1f},{12 + 240 * (1 - share):.1f}"

    for tick in range(0, 101, 20):
        (left, y), (right, _) = (place(n, tick / 100).split(",") for n in (counts[0], counts[-1]))
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}" class="tick"/>'
                     f'<text x="50" y="{float(y) + 4}" text-anchor="end">{tick} %</text>')
    parts += [f'<text x="{place(n, 0).split(",")[0]}" y="272" text-anchor="middle">{n}</text>' for n in counts]
    for k, arm in enumerate(names):
        there = [(n, [r[score] for r in case.rows if r["arm"] == arm and r["count"] == n]) for n in counts]
        there = [(n, np.mean(v), t_quantile(0.975, len(v) - 1) * np.std(v, ddof=1) / len(v)**0.5 if v[1:] else 0)
                 for n, v in there if v]
        band = [place(n, m + h) for n, m, h in there] + [place(n, m - h) for n, m, h in reversed(there)]
        parts.append(f'<polygon points="{" ".join(band)}" class="band c{k}"/>'
                     f'<polyline points="{" ".join(place(n, m) for n, m, _ in there)}" class="curve c{k}"/>')
    return svg(parts, 264, names, title)


def svg(parts, foot, legend, title):
    """A picture of the page: its parts, and below them the legend, in the colours c0, c1 ..., and a text."""
    lines = [f'<text x="60" y="{foot + 38 + 18 * k}"><tspan class="c{k % 4}">●</tspan> {html.escape(name)}</text>'
             for k, name in enumerate(legend)]
    return (f'<figure><svg viewBox="0 0 700 {foot + 30 + 18 * len(lines)}" role="img" '
            f'aria-label="{html.escape(title)}">{"".join(parts + lines)}</svg>'
            f"<figcaption>{html.escape(title)}</figcaption></figure>")


STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --line: #d5dae1;
        --c0: #0b6bcb; --c1: #c2410c; --c2: #0f7b4f; --c3: #7c3aed }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --paper: #14181f; --line: #3a424e;
          --c0: #6cb2ff; --c1: #ff9d66; --c2: #5fd3a0; --c3: #b79bff } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
.scroll { overflow-x: auto } pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line) }
table { border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line) }
th { white-space: normal; vertical-align: bottom } .lead { font-size: 1.2rem }
figure { margin: 1.5rem 0 } img { max-width: 100% } figcaption { opacity: .8 }
svg { width: 100%; max-width: 44rem; font-size: 13px } text { fill: var(--ink) } .tick { stroke: var(--line) }
.c0 { fill: var(--c0); stroke: var(--c0) } .c1 { fill: var(--c1); stroke: var(--c1) }
.c2 { fill: var(--c2); stroke: var(--c2) } .c3 { fill: var(--c3); stroke: var(--c3) }
circle { fill-opacity: .5; stroke: none } .mean { stroke-width: 3 } tspan { stroke: none }
.band { fill-opacity: .15; stroke: none } .curve { fill: none; stroke-width: 2 }
"""


def figure(picture, text):
    """A picture, PIL or a path, as part of a page."""
    if isinstance(picture, Image.Image):
        file = io.BytesIO()
        picture.save(file, "png")
        picture = file.getvalue()
    else:
        picture = Path(picture).read_bytes()
    return (f'<figure><img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
            f'<figcaption>{html.escape(text)}</figcaption></figure>')


def as_html(header, rows):
    """A table of the page."""
    body = "".join("<tr><td>" + "<td>".join(map(html.escape, row)) for row in rows)
    return f'<div class="scroll"><table><tr><th>{"<th>".join(map(html.escape, header))}{body}</table></div>'


def section(case, out):
    """What the page says of a leg."""
    first, *others = html.escape(verdict(case, out)).split("\n")
    names = [arm for arm in case.arms if any(r["arm"] == arm for r in case.rows)]
    parts = [f"<h2>{case.name.capitalize()}: {html.escape(case.title)}</h2><p class=lead>{first}",
             *(f"<p>{line}" for line in others), as_html(*main_rows(case, out)),
             chart(case, [name for name in names if name in case.leg.arms],
                   f"{TITLES[case.leg.scores[0]].capitalize()} on the test split: a dot per seed, a bar at the mean")]
    for study in filter(None, case.cfg.study.split(",")):
        if mine := [name for name in names if name.startswith(f"{study}:")]:
            parts += [f"<h3>Study: {study}</h3>", chart(case, mine, f"What changes with {study}")]
    if len([n for n in case.s.counts if n]) > 1:
        parts.append(curve(case, [name for name in names if name in {*case.leg.bases, *case.leg.claims[0], *case.leg.claims[1]}],
                           f"The same over {case.leg.per}; the bands are 95 % intervals over seeds"))
    if case.leg.rare:
        parts += ["<h3>By class and event</h3>", as_html(*detail_rows(case))]
    header, rows = class_rows(case, out)
    if rows:
        parts += [f"<h3>Which classes gain</h3><p>{amount(case, case.s.counts[-1])}; intervals of single classes, "
                  "not corrected for their number.", as_html(header, rows)]
    if picture := confusions(case, out):
        base, arm = reversed(case.leg.claims[0][:2])
        parts.append(figure(picture, f"What was taken for what: {base} left, {arm} right. Rows are the truth, "
                                     "columns the answer in the same order; black is always, white never."))
    if case.shown:
        parts += ["<h3>What the synthetic images are like</h3>", figure(
            side_by_side(*case.shown), "Left: real training images. Right: synthetic images of the same class, by a "
            "generator that saw nothing but such training images.")]
    for count, found in case.judged.items():
        parts += [f"<h4>{amount(case, count)}</h4>", as_html(*judged_rows(found)),
                  f"<p>Each compared to {found['judged_by']} real images, in the features of a classifier trained on "
                  "real images that the generator never saw.", figure(found["sheet"], copying(found))]
    return "\n".join(parts)


def report(cases, cfg, out):
    """Write report.html, which needs no other file, from what was run so far; grids beside it."""
    title = "Does synthetic data help to recognise what is seen from above?"
    for case in cases:
        if case.shown:
            data.save_picture(side_by_side(*case.shown), out / f"grid-{case.name}.png")
    body = "\n".join(section(case, out) for case in cases if case.rows)
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style>
<h1>{title}</h1>{body}
<h2>Again</h2><pre>{html.escape(command(cfg))}</pre>
<p>Commit {commit() or "unknown"}, torch {torch.__version__} on {data.pick_device()}. Every run, with all its
settings, is a row of results.csv.</html>"""
    with data.replacing(out / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def command(cfg):
    """The command line that repeats this comparison."""
    given = [f"--{f.name.replace('_', '-')} {shlex.quote(str(getattr(cfg, f.name)))}" for f in fields(Config)
             if not isinstance(f.default, bool) and getattr(cfg, f.name) != f.default]
    bare = [f"--{f.name.replace('_', '-')}" for f in fields(Config) if f.default is False and getattr(cfg, f.name)]
    return " ".join(["python experiment.py", *bare, *given])


if __name__ == "__main__":
    data.launch(main, Config)
