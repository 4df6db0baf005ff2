"""Do images of a diffusion model help to recognise what is seen from above, and compared with what?

    python experiment.py                             drawn pictures: minutes on a CPU, no news of the world
    python experiment.py --data data/NWPU-RESISC45   the question itself, of scenes
    python experiment.py --data data/xbd             and of buildings: damage is rare, every disaster new

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
from train_cls import accuracy, f1, harmonic_f1, macro_f1, tally, totals

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
            "real + fresh real":               Arm("fresh", 0.5),     # the ceiling of what a generator can do
            "real + copies":                   Arm("copies", 0.5),    # the floor: there is nothing to gain
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
    "calls": [dict(calls=n) for n in (4, 8, 12, 20, 50)],
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
    seeds: int                                # repetitions: weights, batches, subset as the next line says
    subsets: int                              # different draws of the training images, each with a generator
    made: int                                 # synthetic images per class
    calls: int                                # network calls per synthetic image
    w: float                                  # guidance scale
    drawn: int                                # scenes per class, or tiles, where no data are given
    curve: tuple                              # the counts of the study of that name
    gen: train_gen.Config
    cls: train_cls.Config


_SMOKE = Scale(
    counts=(4, 8), seeds=2, subsets=2, made=8, calls=4, w=1.5, drawn=30, curve=(2, 4),
    gen=train_gen.Config(size=16, width=16, mults=(1, 2), blocks=1, steps=10, batch=16, warmup=5,
                         augment="none"),
    cls=train_cls.Config(size=16, patch=4, dim=32, depth=2, heads=2, steps=10, batch=32, warmup=5))
_SMALL = Scale(
    counts=(10,), seeds=3, subsets=1, made=60, calls=12, w=1.5, drawn=160, curve=(3, 5, 10, 20, 40),
    gen=train_gen.Config(size=24, width=32, mults=(1, 2, 4), blocks=1, patch=2, steps=1500, batch=32,
                         lr=2e-3, warmup=50, ema=0.99, augment="none"),
    cls=train_cls.Config(size=24, patch=6, dim=64, depth=3, heads=2, steps=200, batch=64, warmup=50))
# A generator that saw its images turned and flipped would bring this augmentation to arms that have none.
_FULL = Scale(
    counts=(10, 70, 400), seeds=5, subsets=5, made=700, calls=12, w=1.5, drawn=700, curve=(5, 20, 40, 150),
    gen=train_gen.Config(augment="none"), cls=train_cls.Config())
SCALES = {
    "scenes": dict(smoke=_SMOKE, small=_SMALL, full=_FULL),
    "buildings": dict(
        smoke=replace(_SMOKE, counts=(12,), drawn=64, curve=(8, 16)),
        small=replace(_SMALL, counts=(20,), drawn=256, curve=(10, 20, 40, 80),
                      gen=replace(_SMALL.gen, steps=900)),
        full=replace(_FULL, counts=(0,), made=5000, drawn=1000, subsets=1, curve=(100, 400, 1600))),
}


LABELS = "damage", "type"


def listed(text):
    """"a, b" -> ["a", "b"]; "" -> []."""
    return [name.strip() for name in text.split(",") if name.strip()]


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
        for what, asked, allowed in (("arm", listed(self.arms), known),
                                     ("study", listed(self.study), STUDIES),
                                     ("scale", [self.scale], ["", *SCALES["scenes"]]),
                                     ("leg", [self.leg], ["", *LEGS]), ("label", [self.label], LABELS)):
            if unknown := set(asked) - set(allowed):
                unknown, allowed = (", ".join(filter(None, some)) for some in (sorted(unknown), allowed))
                raise ValueError(f"unknown {what} {unknown}; known: {allowed}")
        if self.counts and not (self.data or self.leg):
            raise ValueError(f"--counts {self.counts}: of which --leg, scenes or buildings?")
        s = self.resolved("scenes")           # a bad size or count is told before anything is done
        if min(s.counts) < 0:
            raise ValueError(f"--counts {self.counts}: below 0")
        if 1 < s.subsets < s.seeds:           # neither one draw nor independent ones: no interval fits
            raise ValueError(f"--subsets {s.subsets}: 1, or one for each of the {s.seeds} seeds")

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
        if "counts" in listed(self.study):
            counts += s.curve
        given["counts"] = tuple(sorted(set(counts), key=lambda n: n or math.inf))       # 0, all, is the most
        seeds = given.get("seeds", s.seeds)
        given.setdefault("subsets", s.subsets if s.subsets == 1 else seeds)
        given["subsets"] = min(given["subsets"], seeds)
        size = self.size or s.gen.size
        patch = s.cls.patch * size // s.gen.size                              # as many tokens at any size
        return replace(s, **given, gen=replace(s.gen, size=size, steps=self.gen_steps or s.gen.steps),
                       cls=replace(s.cls, size=size, patch=patch, steps=self.cls_steps or s.cls.steps))

    def wanted(self, leg):
        """The arms of a leg that are asked for, {name: Arm}, those of the studies last."""
        arms = {name: arm for name, arm in leg.arms.items() if not self.arms or name in listed(self.arms)}
        for study in listed(self.study):
            for change in STUDIES[study]:
                if leg.rare or change.get("augment") != "copypaste":            # scenes have no masks
                    *_, value = change.values()
                    arms[f"{study}: {value}"] = replace(leg.arms[leg.mix], **change)
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
    out: Path
    rows: list = field(default_factory=list)                             # of results.csv
    judged: dict = field(default_factory=dict)                           # {count: what judge() found}
    shown: tuple = ()                                                    # real, synthetic Scenes for the page
    memory: dict = field(default_factory=dict)                           # of sampled()

    def choose(self, count, draw):
        """The real training images; in random order, those of the training split that are not among them."""
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
    """The script: run what is missing, renew the page on the way, print tables and answers. -> [Case]."""
    out = Path(cfg.out)
    cases = [prepare(cfg, name, out) for name in cfg.legs()]
    stored = read_results(out)                           # all runs; those of this comparison: case.rows
    for case in cases:
        plan(case, stored)
    if cfg.dry_run:
        return cases
    for case in cases:
        for each in cells(case):
            cell(case, stored, *each)
            report(cases, cfg, out)                      # a comparison half done has its page already
        budgets = {(row["steps"], row["images"]) for row in case.rows}
        assert len(budgets) == 1, f"arms of unequal budget: {budgets}"
    print("", *map(told, cases), sep="\n\n")
    print(f"\nThe page: {out / 'report.html'}   Every run: {out / 'results.csv'}")
    return cases


def prepare(cfg, name, out):
    """Read the images of a leg and split them. -> Case. What cannot work is told before anything is run."""
    leg, s, cache = LEGS[name], cfg.resolved(name), out / "cache"
    root = Path(cfg.data) if cfg.data else out / f"drawn-{name}-{s.drawn}"
    if not cfg.data:
        (data.draw_xbd if leg.rare else data.draw_tree)(root, s.drawn)
    if leg.rare:
        scenes = data.read_xbd(root, s.cls.size, cfg.label, mask=True, cache=cache)
    else:
        scenes = data.read_folder(root, s.cls.size, cfg.skip_broken, cache)
    parts = data.split(scenes, root, hold_out=cfg.hold_out)
    title = "/".join(root.resolve().parts[-2:]) if cfg.data else f"drawn {name}"
    title += f" with {cfg.hold_out} held out" if cfg.hold_out else ""
    case = Case(name, leg, cfg.wanted(leg), s, cfg, title, scenes, parts, scenes[parts["test"]], out)
    if not case.arms:
        raise Problem(f"--arms {cfg.arms}: no arm for {name} among them; these are: {', '.join(leg.arms)}")
    if not cfg.counts and not leg.rare:                  # a scale's own counts give way to smaller data sets
        least = int(scenes.labels[parts["train"]].bincount().min())
        s.counts = tuple(n for n in s.counts if n <= least) or (least,)
    for count in s.counts:
        case.choose(count, 0)
    return case


def cells(case):
    """What there is to run, seed by seed and count by count: (count, seed, draw, real, fresh, runs).

    runs: {name: (Arm, run id)}. Without as many fresh images as real ones there is no ceiling: few of them,
    drawn again and again, would rather hurt.
    """
    for seed in range(case.s.seeds):
        for count in case.s.counts:
            draw = seed % case.s.subsets
            real, fresh = case.choose(count, draw)
            have, need = (x.labels.bincount(minlength=len(real.classes)) for x in (fresh, real))
            runs = {name: (arm, run_id(case, arm, real, fresh, draw, seed)) for name, arm in case.arms.items()
                    if arm.source != "fresh" or (have >= need)[wanted(case, real)].all()}
            yield count, seed, draw, real, fresh, runs


def cell(case, stored, count, seed, draw, real, fresh, runs):
    """Run what is missing of a cell."""
    check_leaks(case, real)
    check_leaks(case, fresh)
    what, scored = f"{case.name}, {amount(case, count)}, seed {seed + 1} of {case.s.seeds}", []
    if any(arm.source == "generator" for arm in case.arms.values()):
        synthetic = synthesize(case, recipe(case, case.leg.arms[case.leg.mix], real, draw), real, what)
        case.shown = real, synthetic
        if count not in case.judged:
            case.judged[count] = judge(case, real, synthetic, fresh, what)
    for name, (arm, run) in runs.items():
        if run not in stored or not (case.out / "predicted" / run).exists():
            row = dict(run=run, leg=case.name, arm=name, count=count, seed=seed, data=case.title)
            pool, soft = source(case, arm, real, fresh, draw, seed, what)
            stored[run] = row | score(case, run, arm, real, pool, soft, seed, f"{name}, {what}")
            write_results(case.out, stored)
        case.rows.append(stored[run] | dict(arm=name, count=count, seed=seed))
        scored.append(f"{name} {100 * stored[run][case.leg.scores[0]]:.1f}")
    print(f"{what}: {', '.join(scored)}", flush=True)


def check_leaks(case, real):
    """RuntimeError if training and test images have a group in common, or the event that is held out."""
    seen, tested = ({*scenes.groups.tolist()} for scenes in (real, case.test))
    if seen & tested:
        raise RuntimeError("a training image, its double or its neighbour is in the test split")
    if event := case.cfg.hold_out:
        if {*map(data.event_of, case.test.names)} != {event} or event in map(data.event_of, real.names):
            raise RuntimeError(f"{event} is to be held out, but is trained on, or is not what is tested on")


def run_id(case, arm, real, fresh, draw, seed):
    """A name for all that decides a run's result, but this code: what bears it need not be run again."""
    how = recipe(case, arm, real, draw)
    made = {"": (), "generator": (how,), "copies": (), "fresh": (how["made"], fresh.digest)}
    arm = replace(arm, w=0.0, calls=0, ratio=0.0, generator=0)                       # the recipe tells these
    return digest(arm, case.s.cls, made[arm.source], real.digest, case.test.digest, seed)


def digest(*what):
    """A short name for anything whose repr tells all about it."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def recipe(case, arm, real, draw):
    """How the synthetic images of an arm are made: settings of the generator, then of the images."""
    s, classes = case.s, wanted(case, real)
    each = torch.isin(real.labels, torch.tensor(classes)).sum().item() / len(classes)
    return dict(gen=replace(s.gen, seed=draw + 1000 * arm.generator), classes=classes, w=arm.w or s.w,
                calls=arm.calls or s.calls, made=max(1, round(arm.ratio * each)) if arm.ratio else s.made)


def wanted(case, real):
    """The classes in which images of a source take the place of real ones."""
    return rare(real) if case.leg.rare else list(range(len(real.classes)))


def rare(scenes):
    """The classes that have fewer images than the mean of all classes."""
    count = scenes.labels.bincount(minlength=len(scenes.classes))
    return (count < count.float().mean()).nonzero().flatten().tolist()


def synthesize(case, how, real, what):
    """Scenes by a generator trained on real and nothing else; taken from the disk if they are there.

    Of rare classes by a generator of these classes: the common one would take most of its steps.
    """
    real = real[torch.isin(real.labels, torch.tensor(how["classes"]))]
    path = case.out / "generators" / f"{digest(how['gen'], real.digest)}.pt"
    store = case.out / "synthetic" / f"{digest(how, real.digest)}.pt"
    y = torch.tensor(how["classes"]).repeat_interleave(how["made"])
    if not store.exists():
        generator = train_gen.train(real, how["gen"], path, title=f"generator, {what}")
        images = train_gen.generate(generator, y, how["gen"].seed, how["calls"], how["w"],
                                    title=f"synthetic images, {what}")
        with data.replacing(store) as temporary:
            torch.save(images, temporary)
    return Scenes(torch.load(store, weights_only=True), y, real.classes,
                  [f"synthetic {k}" for k in range(len(y))], torch.arange(len(y)))


def source(case, arm, real, fresh, draw, seed, what):
    """What takes the place of real images, Scenes or None, and what to teach of each, (N, K) or None."""
    if not arm.source:
        return None, None
    how = recipe(case, arm, real, draw)
    if arm.source == "generator":
        pool = synthesize(case, how, real, what)
    else:
        pool, most = (real, None) if arm.source == "copies" else (fresh, how["made"])
        pool = pool[torch.cat([(pool.labels == c).nonzero().flatten()[:most] for c in how["classes"]])]
    if not (arm.keep or arm.soft):
        return pool, None
    cfg = replace(case.s.cls, seed=seed, augment=OVERHEAD, balance=arm.balance)
    path = case.out / "teachers" / f"{digest(cfg, real.digest)}.pt"
    teacher, _ = train_cls.fit(real, None, cfg, path, title=f"teacher, {what}")
    p = train_cls.outputs(teacher, pool.images).softmax(1)
    kept = p.gather(1, pool.labels[:, None])[:, 0] > arm.keep / p.shape[1]
    return pool[kept], p[kept] if arm.soft else None


def score(case, run, arm, real, pool, soft, seed, title):
    """Train the classifier of an arm, keep its answers on the test split, return its row of results.csv."""
    start, test = time.perf_counter(), case.test
    share = arm.share if pool and len(pool) else 0.0                # a filter may have let nothing through
    cfg = replace(case.s.cls, seed=seed, share=share, augment=arm.augment, balance=arm.balance)
    model, seen = train_cls.fit(real, pool, cfg, soft=soft, title=title)
    predicted = train_cls.predict(model, test.images)
    with data.replacing(case.out / "predicted" / run) as temporary, open(temporary, "wb") as file:
        np.save(file, predicted.numpy().astype(np.int16))
    K = len(test.classes)
    counts = totals(test.labels, predicted, K)
    row = {name: float(SCORES[name](counts)) for name in SCORES}
    row |= {f"f1 {name}": float(v) for name, v in zip(test.classes, f1(counts), strict=True)}
    for event, mine in case.events.items():
        row[f"macro_f1 {event}"] = float(macro_f1(totals(test.labels[mine], predicted[mine], K)))
    settings = dict(scale=asdict(case.s), arm=asdict(arm), label=case.cfg.label, hold_out=case.cfg.hold_out)
    return dict(**row, **seen, added=len(pool or []), seconds=round(time.perf_counter() - start, 1),
                device=str(data.pick_device()), commit=commit(), settings=json.dumps(settings))


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
    kinds |= dict.fromkeys(("count", "seed", "steps", "images", "synthetic", "added"), int)
    return {row["run"]: {k: kinds.get(k, float)(v) for k, v in row.items() if v != ""} for row in rows}


def write_results(out, rows):
    """All runs as one tidy table, a row per run."""
    header = list(dict.fromkeys(k for row in rows.values() for k in row))
    data.save_csv(out / "results.csv", header, [[row.get(k, "") for k in header] for row in rows.values()])


def amount(case, *counts):
    """Numbers of real images in words: "5 and 20 real images per class", "all training tiles"."""
    return f"{' and '.join(str(n or 'all') for n in counts)} {case.leg.per}"


def plan(case, stored):
    """Say what is to be run, and from a few steps of each kind how long it takes here."""
    s, missing, made = case.s, 0, {}
    for _, _, draw, real, _, runs in cells(case):
        for arm, run in runs.values():
            if run not in stored:
                missing += 1
                if arm.source == "generator":
                    how = recipe(case, arm, real, draw)
                    made[digest(how, real.digest)] = how, digest(how["gen"], real.digest)
    images = [how["made"] * len(how["classes"]) for how, _ in made.values()]
    generators = len({name for _, name in made.values()})
    sizes = ", ".join(f"{len(index)} {part}" for part, index in case.parts.items())
    print(f"{case.title}: {len(case.scenes)} images of {len(case.scenes.classes)} classes at {s.cls.size} px "
          f"({sizes})\n  {amount(case, *s.counts)} x {s.seeds} seeds "
          f"x {len(case.arms)} arms; to be run: {missing} classifiers of {s.cls.steps} steps, {generators} "
          f"generators of {s.gen.steps} steps, {sum(images)} synthetic images")
    if not missing:
        return
    gen, cls = step_times(case)
    calls = sum(n * how["calls"] * (1 if how["w"] == 1 else 2)
                for n, (how, _) in zip(images, made.values(), strict=True))
    minutes = {"generators": generators * s.gen.steps * gen / 60,
               "sampling": calls * gen / 3 / s.gen.batch / 60,           # a forward pass is a third of a step
               "classifiers": (missing + len(s.counts)) * s.cls.steps * cls / 60}      # one for the features
    _, model = train_gen.networks(s.gen, len(case.scenes.classes), case.scenes.images.shape[1])
    disk = generators * 16 * sum(p.numel() for p in model.parameters())       # weights, average, two moments
    disk += (sum(images) + len(case.scenes)) * case.scenes.images[0].numel()
    each = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
    print(f"  minutes on {data.pick_device()}: {each}, in all about {sum(minutes.values()):.1f}; "
          f"disk: {disk / 1e6:.0f} MB", flush=True)


def step_times(case):
    """Seconds per step of a generator and of a classifier."""
    probe = case.scenes[case.parts["train"][:64]]

    def seconds(run, config):
        """What a longer run takes more than a shorter one, after one that only warms up."""
        marks = []
        for steps in (1, 2, 6):
            start = time.perf_counter()
            run(replace(config, steps=steps))
            marks.append(time.perf_counter() - start)
        return max(0.0, marks[2] - marks[1]) / 4

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
    u = np.linspace(0, 20, 20_001)
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

    def detectable(self, family=1):
        """The smallest difference that such a comparison would have found in 4 of 5 cases.

        As one claim of a family: Holm's first step divides the 5 % by their number.
        """
        return (t_quantile(1 - 0.025 / family, self.dof) + t_quantile(0.8, self.dof)) * self.se


def gain(a, b, groups):
    """Gain of an arm over another: a, b (S, 1 + B) their replicates, same seeds; groups: G of the test set.

    Both the seeds and the groups of test images are samples of what might have been, and the variance of the
    mean over both is told apart as in a two-way analysis of variance,

        seed + group - rest:    what varies over the seeds / S, what the mean varies over the resampled test
                                sets, and the share that both contain: what varies over seed and group at once

    with the degrees of freedom of Satterthwaite 1946, at least those of the scarcer sample. For a mean over
    answers, like accuracy, this is the classical estimate up to the noise of the bootstrap; for any other
    statistic, the same to first order. With 5 seeds or more the 95 % interval covers the truth in 94 to 95 %
    of cases, whichever of the three variances is the largest; with 3 seeds in 93 % and with 2 in 88 % where
    the seeds' is, because so few often agree by chance. Against b = 0 it is the interval of an arm's own
    score.
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

def runs_of(case, arm, count):
    """The rows of an arm, seed by seed; [] if it was not run."""
    mine = [r for r in case.rows if r["arm"] == arm and r["count"] == count]
    return sorted(mine, key=lambda r: r["seed"])


def answers(case, run):
    """What a run's classifier said of the test split, (N,) int64."""
    return np.load(case.out / "predicted" / run).astype(np.int64)


def sampled(case, arm, count, statistic):
    """Replicates of a statistic of an arm, (seeds, 1 + B, ...); None if it was not run."""
    runs, test = [r["run"] for r in runs_of(case, arm, count)], case.test
    key = statistic, *runs
    if runs and key not in case.memory:
        counts = [tally(test.labels, answers(case, run), test.groups, len(test.classes)) for run in runs]
        case.memory[key] = replicates(np.stack(counts), statistic)
    return case.memory.get(key)


def difference(case, arm, base, count, statistic):
    """What arm gains over base, a list with a Gain per class if the statistic is of classes, else one Gain.

    None unless both ran the same seeds, at least two, and there are two groups of test images.
    """
    a, b = (sampled(case, name, count, statistic) for name in (arm, base))
    groups = len(case.test.groups.unique())
    if arm == base or a is None or b is None or len(a) != len(b) or len(a) < 2 or groups < 2:
        return None
    a, b = (x.reshape(*x.shape[:2], -1) for x in (a, b))
    gains = [gain(a[..., k], b[..., k], groups) for k in range(a.shape[2])]
    return gains if statistic is f1 else gains[0]


def points(g):
    """+3.1 [+0.4, +5.8], in percentage points."""
    low, mean, high = 100 * (g.mean - g.half), 100 * g.mean, 100 * (g.mean + g.half)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def values(case, arm, count, column):
    """A column of results.csv for each seed, per cent; [] if it was not run."""
    return [100 * r[column] for r in runs_of(case, arm, count)]


def present(case):
    """(count, arm) of all that was run, in the order of counts and arms."""
    there = {(r["count"], r["arm"]) for r in case.rows}
    return [(count, arm) for count in case.s.counts for arm in case.arms if (count, arm) in there]


def main_rows(case):
    """The table: its header, and cells for each count and arm, after those of always the commonest class."""
    leg, test, score = case.leg, case.test, case.leg.scores[0]
    c = case.scenes.labels[case.parts["train"]].bincount().argmax()
    counts = totals(test.labels, c.expand(len(test)), len(test.classes))
    rows = [["", f"always {test.classes[c]}", *(f"{100 * SCORES[name](counts):.1f}" for name in leg.scores)]]
    for count, arm in present(case):
        rows.append([str(count or "all"), arm])
        for name in leg.scores:
            found = values(case, arm, count, name)
            spread = f" ± {np.std(found, ddof=1):.1f}" if len(found) > 1 else ""
            rows[-1].append(f"{np.mean(found):.1f}{spread}")
        for base in leg.bases:
            g = difference(case, arm, base, count, SCORES[score])
            rows[-1].append(points(g) if g else "")
    return [leg.per, "arm", *(f"{TITLES[name]}, %" for name in leg.scores),
            *(f"{TITLES[score]} against {base}" for base in leg.bases)], rows


def detail_rows(case):
    """F1 of each class, and macro-F1 of each event, per cent: header and rows."""
    tested = [name for c, name in enumerate(case.test.classes) if (case.test.labels == c).any()]
    columns = {f"f1 {name}": f"F1 {name}" for name in tested}
    columns |= {f"macro_f1 {event}": f"macro-F1 in {event}" for event in case.events}
    return [case.leg.per, "arm", *columns.values()], [
        [str(count or "all"), arm, *(f"{np.mean(values(case, arm, count, name)):.1f}" for name in columns)]
        for count, arm in present(case)]


def class_rows(case):
    """What the first claim's arm gains in each class at the largest count, the largest gain first."""
    (arm, base, _), count = case.leg.claims[0], case.s.counts[-1]
    gains = difference(case, arm, base, count, f1) or []
    there = [k for k in range(len(gains)) if (case.test.labels == k).any()]
    order = sorted(there, key=lambda k: -gains[k].mean)
    rows = []
    for k in order:
        name = case.test.classes[k]
        means = [np.mean(values(case, who, count, f"f1 {name}")) for who in (base, arm)]
        rows.append([name, *(f"{mean:.1f}" for mean in means), points(gains[k])])
    return ["class", f"F1, {base}", f"F1, {arm}", "gain"], rows


def claims(case):
    """What is claimed of each count: [(count, arm, base, what, Gain, p after Holm)]."""
    found = [(count, *claim, difference(case, *claim[:2], count, SCORES[case.leg.scores[0]]))
             for count in case.s.counts for claim in case.leg.claims]
    found = [claim for claim in found if claim[-1]]
    return [(*claim, p) for claim, p in zip(found, holm([g.p for *_, g in found]), strict=True)]


def claim_rows(case):
    """The claims as a table: header and rows."""
    found = claims(case)
    header = [case.leg.per, "claim", "gain", "p after Holm", "p by sign flips", "detectable gain"]
    return header, [[str(count or "all"), f"{arm} against {base}", points(g), f"{p:.3f}", f"{g.flip:.2f}",
                     f"{100 * g.detectable(len(found)):.1f}"] for count, arm, base, _, g, p in found]


def answer(case):
    """The answer in a sentence for each thing that takes the place of real images."""
    said = {}
    for count, arm, base, what, g, p in claims(case):
        word = "help" if g.mean > 0 else "hurt"
        word = word if p < 0.05 else "make no difference that so few runs could show"
        where = f"{arm} against {base} with {amount(case, count)}"
        said.setdefault(what, {}).setdefault(word, []).append(where)
    sentences = [f"{what[0].upper()}{what[1:]} " + "; they ".join(
        word if len(words) == 1 else f"{word} ({', '.join(where)})" for word, where in words.items()) + "."
        for what, words in said.items()]
    done = len({r["seed"] for r in case.rows})
    so_far = f"So far, with {done} of {case.s.seeds} seeds: " * (done < case.s.seeds)
    if not sentences:
        return "No answer yet: it takes two seeds, and arms to compare."
    return so_far + " ".join(sentences)


def conditions(case):
    """What the answer holds for."""
    s, test, n = case.s, case.test, case.s.subsets
    unit = "tiles" if case.leg.rare else "images"
    tiles = f" of {len(test.groups.unique())} tiles" * case.leg.rare
    told = (f"Conditions: {case.title} at {s.cls.size} px, {len(test.classes)} classes, "
            f"{amount(case, *s.counts)}, {len(test)} test images{tiles}; seeds: {s.seeds}; draws of training "
            f"images: {n}, each with a generator of {s.gen.steps} steps and {s.made} synthetic images per "
            f"class; classifiers of {s.cls.steps} steps. In brackets: 95 % intervals over seeds and test "
            f"{unit}")
    told += ", which do not cover another draw of the training images" * (n == 1) + "."
    done = {row["arm"] for row in case.rows}
    if any(arm.source == "fresh" and name not in done for name, arm in case.arms.items()):
        told += " No ceiling: fewer real images are left over than are trained on."
    return told + f" Drawn {case.name} show that the method works; they say nothing about the world." * (
        not case.cfg.data)


def as_text(header, rows):
    """Cells below each other; nothing if there are no rows."""
    if not rows:
        return ""
    rows = [row + [""] * (len(header) - len(row)) for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def told(case):
    """All that the terminal says of a leg that was run."""
    blocks = [case.name.upper() + "\n" + as_text(*main_rows(case))]
    if case.leg.rare:
        blocks.append(as_text(*detail_rows(case)))
    for count, found in likeness(case):
        blocks += [f"Synthetic images with {amount(case, count)}:\n{as_text(*judged_rows(found))}".rstrip(),
                   copying(found)]
    blocks += [as_text(*claim_rows(case)), answer(case), conditions(case)]
    return "\n\n".join(filter(None, blocks))


# ---- what the synthetic images are like

def judge(case, real, synthetic, fresh, what):
    """How synthetic images differ from real ones, and if they are copies: {name: number}, or {}.

    The features are those of a classifier trained on real images that the generator never saw: one half of
    what training leaves over and of val. The other half is what synthetic images are compared to, and half of
    that stands in for them once more: what another real sample would score is the floor of every number.
    {} if fewer than ten images would be compared.
    """
    unseen = join(fresh, case.scenes[case.parts["val"]])
    unseen = unseen[torch.isin(unseen.labels, synthetic.labels)]
    unseen = unseen[torch.randperm(len(unseen), generator=data.rng(0))]
    heads, group = unseen.groups.unique(return_inverse=True)
    part = (torch.randperm(len(heads), generator=data.rng(1)) % 4)[group]             # a group is in one part
    teach, a, b = (unseen[which] for which in (part < 2, part == 2, part == 3))
    sets = alike(a, b, synthetic)
    if len(sets[0]) < 10:
        return {}
    name = digest("judge", case.s.cls, real.digest, synthetic.digest, unseen.digest)
    path, sheet = (case.out / "judged" / f"{name}.{kind}" for kind in ("json", "png"))
    if not (path.exists() and sheet.exists()):
        cfg = replace(case.s.cls, augment=OVERHEAD, balance=case.leg.rare)
        eye = train_cls.fit(teach, None, cfg, title=f"features, {what}")[0].features
        held, some = (spread(x) for x in alike(unseen[part >= 2], synthetic))
        found = compare(eye, *sets) | suspects(eye, real, some, held, sheet)
        with data.replacing(path) as temporary:
            temporary.write_text(json.dumps(found))
    return json.loads(path.read_text()) | dict(sheet=str(sheet))


def likeness(case):
    """(count, what judge() found) wherever it had enough images."""
    return [(count, found) for count, found in case.judged.items() if found]


def spread(scenes, most=400):
    """At most so many of the scenes, from all over them."""
    return scenes[torch.linspace(0, len(scenes) - 1, min(len(scenes), most)).long()]


def join(a, b):
    """Two Scenes of the same classes as one."""
    both = [torch.cat([getattr(x, part) for x in (a, b)]) for part in ("images", "labels", "groups")]
    return Scenes(*both[:2], a.classes, a.names + b.names, both[2])


def alike(*several, most=4000):
    """Of each Scenes as many images of every class as the others have: no class mix to tell them apart by."""
    K = len(several[0].classes)
    least = torch.stack([s.labels.bincount(minlength=K) for s in several]).amin(0).clamp(max=most // K)
    return [s[torch.cat([(s.labels == c).nonzero().flatten()[:least[c]] for c in range(K)])] for s in several]


def compare(eye, a, b, synthetic):
    """Fréchet distance, precision, recall, density and coverage of synthetic and of other real images b."""
    reference, *others = (train_cls.outputs(eye, s.images) for s in (a, b, synthetic))
    found = dict(judged_by=len(a))
    for who, features in zip(("real", "synthetic"), others, strict=True):
        numbers = dict(frechet=train_gen.frechet(reference, features)) | train_gen.prdc(reference, features)
        found |= {f"{who} {name}": float(value) for name, value in numbers.items()}
    return found


def suspects(eye, real, some, held, sheet):
    """Are they copies? Distances to the nearest training image, some synthetic against held-out real images.

    By pixels (rms, grey levels) and by features, over turns and flips. The 16 most suspicious are drawn
    above their nearest real images.
    """
    real = real[torch.isin(real.labels, some.labels)]
    found, device = dict(trained_on=len(real)), data.pick_device()
    for space, embed in (("pixels", lambda x: x.flatten(1)),
                         ("features", lambda x: train_cls.outputs(eye, x))):
        near, (distance, which, turn) = [], (None, None, None)
        for scenes in (held, some):
            turned = torch.stack([embed(x) for x in train_gen.symmetries(scenes.images)])
            closest = train_gen.nearest(turned.to(device), embed(real.images).to(device))
            distance, which, turn = (part.cpu() for part in closest)
            near.append(distance)
        share, p = train_gen.mann_whitney(near[1], near[0])
        found |= {f"{space} share": share, f"{space} p": p}
        if space == "pixels":
            worst = distance.argsort()[:16]
            copies = train_gen.symmetries(some.images)[turn[worst], worst]
            strips = [data.grid(images, 16) for images in (copies, real.images[which[worst]])]
            zoom = max(1, 64 // real.images.shape[-1])
            data.save_picture(labelled(strips, ["synthetic", "nearest real"], zoom), sheet)
    return found


def judged_rows(found):
    """Synthetic beside real images: header and rows."""
    names = "frechet", "precision", "recall", "density", "coverage"
    rows = [[title, *(f"{found[f'{who} {name}']:.2f}" for name in names)]
            for who, title in (("synthetic", "synthetic"), ("real", "other real (floor)"))]
    return ["images", "Fréchet distance", *names[1:]], rows


def copying(found):
    """Are they copies? A few sentences."""
    spaces = [(name, found[f"{name} share"], found[f"{name} p"]) for name in ("pixels", "features")]
    caught = any(share > 0.75 and p < 0.01 for _, share, p in spaces)
    each = " and ".join(f"{100 * share:.0f} % by {name} (p {p:.1g})" for name, share, p in spaces)
    return (f"{'Many may be copies' if caught else 'No sign of copies'}. Of a synthetic and a held-out real "
            f"image, the synthetic one is nearer to one of {found['trained_on']} training images in {each} "
            "of pairs, p by Mann and Whitney: near 100 % if they are copies, about 50 % if they are as new "
            "as real ones. Smooth or dull images are near to everything: look at the pairs.")


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


def confusions(case):
    """What was taken for what, rows adding up to 1: the first claim's base left, its arm right; or None."""
    test, K, both = case.test, len(case.test.classes), []
    for who in reversed(case.leg.claims[0][:2]):
        runs = runs_of(case, who, case.s.counts[-1])
        if not runs:
            return None
        said = torch.from_numpy(np.concatenate([answers(case, r["run"]) for r in runs]))
        matrix = train_cls.confusion(test.labels.repeat(len(runs)), said, K).double()
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
            scores = [v / 100 for v in values(case, arm, count, score)]
            y, color = 34 * i + 28 + 24 * ((k + 0.5) / len(counts) - 0.5), f"c{k % 6}"
            parts += [f'<circle cx="{x(v)}" cy="{y}" r="3" class="{color}"/>' for v in scores]
            if scores:
                mean = x(float(np.mean(scores)))
                parts.append(f'<line x1="{mean}" x2="{mean}" y1="{y - 5}" y2="{y + 5}" '
                             f'class="mean {color}"/>')
    return svg(parts, foot, [amount(case, n) for n in counts], title)


def curve(case, names, title):
    """The first score over the number of real images as SVG, with bands: 95 % intervals over the seeds."""
    counts, parts = [n for n in case.s.counts if n], []
    low, high = math.log(counts[0]), math.log(counts[-1])

    def place(count, per_cent):
        return f"{60 + 600 * (math.log(count) - low) / (high - low):.1f},{252 - 2.4 * per_cent:.1f}"

    for tick in range(0, 101, 20):
        y = 252 - 2.4 * tick
        parts.append(f'<line x1="60" x2="660" y1="{y}" y2="{y}" class="tick"/>'
                     f'<text x="50" y="{y + 4}" text-anchor="end">{tick} %</text>')
    for n in counts:
        parts.append(f'<text x="{place(n, 0).split(",")[0]}" y="272" text-anchor="middle">{n}</text>')
    for k, arm in enumerate(names):
        line, upper, lower = [], [], []
        for n in counts:
            if found := values(case, arm, n, case.leg.scores[0]):
                mean, dof = np.mean(found), len(found) - 1
                half = t_quantile(0.975, dof) * np.std(found, ddof=1) / len(found) ** 0.5 if dof else 0
                for corners, value in ((line, mean), (upper, mean + half), (lower, mean - half)):
                    corners.append(place(n, min(max(value, 0), 100)))
        parts.append(f'<polygon points="{" ".join(upper + lower[::-1])}" class="band c{k % 6}"/>'
                     f'<polyline points="{" ".join(line)}" class="curve c{k % 6}"/>')
    return svg(parts, 264, names, title)


def svg(parts, foot, legend, title):
    """A picture of the page: its parts, below them a legend in the colours c0, c1 ..., and a text."""
    for k, name in enumerate(legend):
        parts.append(f'<text x="60" y="{foot + 38 + 18 * k}"><tspan class="c{k % 6}">●</tspan> '
                     f'{html.escape(name)}</text>')
    title, height = html.escape(title), foot + 30 + 18 * len(legend)
    return (f'<figure><div class="scroll"><svg viewBox="0 0 700 {height}" role="img" aria-label="{title}">'
            f'{"".join(parts)}</svg></div><figcaption>{title}</figcaption></figure>')


STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --line: #d5dae1;
        --c0: #0b6bcb; --c1: #c2410c; --c2: #0f7b4f; --c3: #7c3aed; --c4: #a16207; --c5: #be185d }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --paper: #14181f; --line: #3a424e;
          --c0: #6cb2ff; --c1: #ff9d66; --c2: #5fd3a0; --c3: #b79bff; --c4: #e3b341; --c5: #f78fb3 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
.scroll { overflow-x: auto } pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line) }
table { border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line) }
th { white-space: normal; vertical-align: bottom } .lead { font-size: 1.2rem }
figure { margin: 1.5rem 0 } img { max-width: 100% } figcaption { opacity: .8 }
svg { width: 100%; min-width: 34rem; max-width: 44rem; font-size: 13px }
text { fill: var(--ink) } .tick { stroke: var(--line) }
.c0 { fill: var(--c0); stroke: var(--c0) } .c1 { fill: var(--c1); stroke: var(--c1) }
.c2 { fill: var(--c2); stroke: var(--c2) } .c3 { fill: var(--c3); stroke: var(--c3) }
.c4 { fill: var(--c4); stroke: var(--c4) } .c5 { fill: var(--c5); stroke: var(--c5) }
circle { fill-opacity: .5; stroke: none } .mean { stroke-width: 3 } tspan { stroke: none }
.band { fill-opacity: .15; stroke: none } .curve { fill: none; stroke-width: 2 }
"""


def figure(picture, text):
    """A picture (PIL, or the path of a PNG) as part of a page."""
    file = io.BytesIO()
    if isinstance(picture, Path):
        file.write(picture.read_bytes())
    else:
        picture.save(file, "png")
    png, text = base64.b64encode(file.getvalue()).decode(), html.escape(text)
    return (f'<figure><img alt="{text}" src="data:image/png;base64,{png}">'
            f'<figcaption>{text}</figcaption></figure>')


def as_html(header, rows):
    """A table of the page; nothing if there are no rows."""
    if not rows:
        return ""
    lines = [f"<tr><th>{'<th>'.join(map(html.escape, header))}"]
    lines += [f"<tr><td>{'<td>'.join(map(html.escape, row))}" for row in rows]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def grid_of(case):
    """Where the picture of real and synthetic images is."""
    return case.out / f"grid-{case.name}.png"


def section(case):
    """What the page says of a leg."""
    run = [arm for arm in case.arms if any(r["arm"] == arm for r in case.rows)]
    score, most = TITLES[case.leg.scores[0]], case.s.counts[-1]
    arm, base, _ = case.leg.claims[0]
    parts = [f"<h2>{html.escape(case.title)}</h2><p class=lead>{html.escape(answer(case))}",
             as_html(*claim_rows(case)), "<p>Gains in percentage points; detectable: what would have been "
             "found in 4 of 5 such comparisons. With fewer than 6 seeds sign flips cannot reach 5 %.",
             f"<p>{html.escape(conditions(case))}", "<h3>All arms</h3>",
             as_html(*main_rows(case)),
             chart(case, [name for name in run if name in case.leg.arms],
                   f"{score} on the test split: a dot per seed, a bar at the mean")]
    for study in listed(case.cfg.study):
        if mine := [name for name in run if name.startswith(f"{study}:")]:
            parts += [f"<h3>Study: {study}</h3>", chart(case, mine, f"{score}: what {study} does")]
    if len([n for n in case.s.counts if n]) > 1:
        main = *case.leg.bases, *(arm for arm, *_ in case.leg.claims[:2])
        parts.append(curve(case, [name for name in run if name in main],
                           f"{score} over {case.leg.per}; bands: 95 % intervals over seeds"))
    if case.leg.rare:
        parts += ["<h3>By class and event</h3>", as_html(*detail_rows(case))]
    if table := as_html(*class_rows(case)):
        parts += [f"<h3>Which classes gain</h3><p>With {amount(case, most)}. The intervals are of single "
                  "classes, not corrected for their number.", table]
    if picture := confusions(case):
        parts.append(figure(picture, f"What was taken for what: {base} left, {arm} right. A row is the "
                                     "truth, a column the answer, in the same order; black is always."))
    if case.shown:
        parts += ["<h3>What the synthetic images are like</h3>", figure(grid_of(case), (
            "Left: real training images. Right: synthetic images of the same class, by a generator that saw "
            "nothing but such training images."))]
    for count, found in likeness(case):
        parts += [f"<h4>With {amount(case, count)}</h4>", as_html(*judged_rows(found)),
                  f"<p>Each compared to {found['judged_by']} real images, by the features of a classifier "
                  "trained on real images that the generator never saw.",
                  figure(Path(found["sheet"]), f"Are they copies? The most suspicious. {copying(found)}")]
    return "\n".join(parts)


def report(cases, cfg, out):
    """Write report.html, which needs no other file, from what was run so far; grids beside it."""
    title = "Does synthetic data help to recognise what is seen from above?"
    for case in cases:
        if case.shown:
            data.save_picture(side_by_side(*case.shown), grid_of(case))
    body = "\n".join(section(case) for case in cases if case.rows)
    rows = [row for case in cases for row in case.rows]
    made_by = sorted({f"{row.get('commit', 'unknown')} on {row['device']}" for row in rows})
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style>
<h1>{title}</h1>{body}
<h2>Again</h2><pre>{html.escape(command(cfg))}</pre>
<p>Classifiers trained by commit {", ".join(made_by)}; page by commit {commit() or "unknown"}, torch
{torch.__version__}. Every run, with all its settings, is a row of results.csv.</html>"""
    with data.replacing(out / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def command(cfg):
    """The command line that repeats this comparison."""
    line = ["python experiment.py"]
    for f in fields(Config):
        if (value := getattr(cfg, f.name)) != f.default:
            line += [f"--{f.name.replace('_', '-')}", *([] if value is True else [shlex.quote(str(value))])]
    return " ".join(line)


if __name__ == "__main__":
    data.launch(main, Config)
