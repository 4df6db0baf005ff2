"""Do images of a diffusion model help a classifier of remote-sensing images, and compared with what?

    python experiment.py                             drawn scenes: minutes on a CPU, says nothing of the world
    python experiment.py --data data/NWPU-RESISC45   the question itself

For each number of real images per class and each seed: draw a subset of the training split, train a
generator on exactly this subset, make a synthetic set with it, then train the same classifier once per arm
and score it on the test split. The rules:

    equal budget   every arm takes the same optimizer steps and images per step: a synthetic image takes the
                   place of a real one
    no leak        a generator sees its arm's real training images and nothing else; nothing is chosen on test
    paired         a seed fixes subset, weights and batches in all arms: differences are per seed and image
"""
import base64
import csv
import hashlib
import html
import json
import math
import shlex
import subprocess
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw

import data
import train_cls
import train_gen
from augment import OVERHEAD
from data import Problem, Scenes, flag

ARMS = {                             # share: probability of a synthetic image;   augment: by name, augment.py
    "real":                            dict(share=0.0, augment="none"),
    "real + augmentation":             dict(share=0.0, augment=OVERHEAD),
    "synthetic only":                  dict(share=1.0, augment="none"),
    "real + synthetic":                dict(share=0.5, augment="none"),
    "real + synthetic + augmentation": dict(share=0.5, augment=OVERHEAD),
}
CLAIMS = [("real + synthetic", "real"), ("real + synthetic + augmentation", "real + augmentation")]


@dataclass
class Scale:
    """How large a comparison is."""
    counts: tuple                             # real training images per class
    seeds: int                             # repetitions: weights, batches, and a subset as the next line says
    subsets: int                              # different draws of the training images, each with a generator
    made: int                                 # synthetic images per class
    calls: int                                # network calls per synthetic image
    w: float                                  # guidance scale
    drawn: int                                # scenes per class, where no data are given
    gen: train_gen.Config
    cls: train_cls.Config


SCALES = {
    "smoke": Scale(
        counts=(4, 8), seeds=2, subsets=2, made=8, calls=4, w=1.5, drawn=20,
        gen=train_gen.Config(size=16, width=16, mults=(1, 2), blocks=1, steps=10, batch=16, warmup=5),
        cls=train_cls.Config(size=16, patch=4, dim=32, depth=2, heads=2, steps=10, batch=32, warmup=5)),
    "small": Scale(
        counts=(5, 20), seeds=3, subsets=1, made=60, calls=12, w=1.5, drawn=160,
        gen=train_gen.Config(size=24, width=32, mults=(1, 2, 4), blocks=1, patch=2, steps=1600, batch=32,
                             lr=2e-3, warmup=50, ema=0.99, augment="none"),
        cls=train_cls.Config(size=24, patch=6, dim=64, depth=3, heads=2, steps=300, batch=64, warmup=50)),
    "full": Scale(
        counts=(10, 70, 400), seeds=5, subsets=5, made=700, calls=20, w=1.5, drawn=700,
        gen=train_gen.Config(), cls=train_cls.Config()),
}


@dataclass
class Config:
    """What may be asked for on the command line. 0 or empty: as --scale has it."""
    data: str = flag("", "tree with a folder per class (empty: scenes are drawn)")
    out: str = flag("runs/experiment", "folder for results.csv, report.html, pictures and generators")
    scale: str = flag("", "smoke, small or full (empty: full for --data on a GPU, else small)")
    smoke: bool = flag(False, "every stage in under a minute, the same as --scale smoke")
    arms: str = flag(",".join(ARMS), "which arms, by comma")
    counts: str = flag("", "real training images per class, by comma")
    seeds: int = flag(0, "repetitions")
    subsets: int = flag(0, "different draws of training images, each with its generator (at most --seeds)")
    size: int = flag(0, "side of the images in pixels, a multiple of 8")
    made: int = flag(0, "synthetic images per class")
    w: float = flag(0.0, "guidance scale (1: none)")
    gen_steps: int = flag(0, "optimizer steps of a generator")
    cls_steps: int = flag(0, "optimizer steps of a classifier")
    skip_broken: bool = flag(False, "leave out pictures that do not decode")

    def __post_init__(self):
        if unknown := set(self.arms.split(",")) - set(ARMS):
            raise ValueError(f"unknown arm {', '.join(sorted(unknown))}; the arms are {', '.join(ARMS)}")
        if self.scale not in ("", *SCALES):
            raise ValueError(f"--scale {self.scale}: smoke, small or full")
        self.resolved()                       # a bad size or count is told before anything is done

    def resolved(self):
        """The Scale that these flags stand for."""
        usual = "full" if self.data and torch.cuda.is_available() else "small"
        s = SCALES["smoke" if self.smoke else self.scale or usual]
        given = {k: getattr(self, k) for k in ("seeds", "subsets", "made", "w") if getattr(self, k)}
        if self.counts:
            given["counts"] = tuple(sorted(set(data.numbers(self.counts))))
        size = self.size or s.gen.size
        patch = s.cls.patch * size // s.gen.size                              # as many tokens at any size
        return replace(s, **given, gen=replace(s.gen, size=size, steps=self.gen_steps or s.gen.steps),
                       cls=replace(s.cls, size=size, patch=patch, steps=self.cls_steps or s.cls.steps))


# ---- the runs

def main(cfg):
    """The script: run what is missing, renew the page on the way, print the table and the verdict."""
    s, out, arms = cfg.resolved(), Path(cfg.out), list(dict.fromkeys(cfg.arms.split(",")))
    root = Path(cfg.data) if cfg.data else data.draw_tree(out / f"drawn-{s.drawn}", s.drawn)
    if data.is_xbd(root):                     # accuracy would say little where three of four are undamaged
        raise Problem(f"{root} is an xBD tree, whose arms and scores are not built yet: train_gen.py and "
                      "train_cls.py do read it")
    scenes = data.read_folder(root, s.cls.size, cfg.skip_broken, cache=out / "cache")
    parts = data.split(scenes, root)
    val, test = scenes[parts["val"]], scenes[parts["test"]]
    for count in s.counts:
        data.subset(scenes, parts["train"], count, seed=0)   # too few images are told before anything is run
    plan(s, arms, scenes, parts)

    stored, rows, shown = read_results(out), [], None    # all runs; those of this comparison; for the page
    for seed in range(s.seeds):
        for count in s.counts:
            draw = seed % s.subsets
            real, synthetic = scenes[data.subset(scenes, parts["train"], count, draw)], None
            leaked = set(real.groups.tolist()) & set(test.groups.tolist())
            assert not leaked, "training images in the test split"
            what = f"{count} per class, seed {seed + 1} of {s.seeds}"
            if any(ARMS[arm]["share"] for arm in arms):
                synthetic = synthesize(real, s, draw, out, what)
                shown = real, synthetic, val
            for arm in arms:
                run = run_id(arm, s, real, test, seed)
                if run not in stored:
                    title, path = f"{arm}, {what}", out / "predicted" / run
                    about = dict(run=run, arm=arm, count=count, seed=seed, data=cfg.data or "drawn")
                    stored[run] = about | score(arm, real, synthetic, test, s, seed, title, path)
                    write_results(out, stored)
                rows.append(stored[run])
            copied = report(out, cfg, s, test, rows, shown)
    assert len({(row["steps"], row["images"]) for row in rows}) == 1, "arms of unequal budget"
    print(table(rows, out, test), verdict(rows, out, test, cfg, s) + copied, sep="\n\n")
    print(f"\nThe page: {out / 'report.html'}   Every run: {out / 'results.csv'}")


def run_id(arm, s, real, test, seed):
    """A name for everything that decides a run's result: what bears it need not be run again."""
    makes = (s.gen, s.made, s.calls, s.w) if ARMS[arm]["share"] else ()
    return digest(ARMS[arm], s.cls, makes, real.digest, test.digest, seed)


def digest(*what):
    """A short name for anything whose repr tells all about it."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def synthesize(real, s, draw, out, what):
    """Scenes by a generator trained on real and nothing else; taken from the disk if they are there."""
    cfg = replace(s.gen, seed=draw)
    path = out / "generators" / f"{digest(cfg, real.digest)}.pt"
    store = out / "synthetic" / f"{digest(cfg, real.digest, s.made, s.calls, s.w)}.pt"
    y = torch.arange(len(real.classes)).repeat_interleave(s.made)
    if not store.exists():
        generator = train_gen.train(real, cfg, path, title=f"generator, {what}")
        images = train_gen.generate(generator, y, draw, s.calls, s.w, title=f"synthetic images, {what}")
        with data.replacing(store) as temporary:
            torch.save(images, temporary)
    return Scenes(torch.load(store, weights_only=True), y, real.classes,
                  [f"synthetic {k}" for k in range(len(y))], torch.arange(len(y)))


def score(arm, real, synthetic, test, s, seed, title, path):
    """Train the classifier of an arm, keep its answers on the test split in `path`, return its results."""
    start = time.perf_counter()
    cfg = replace(s.cls, seed=seed, **ARMS[arm])
    model, seen = train_cls.fit(real, synthetic, cfg, title=title)
    predicted = train_cls.predict(model, test.images)
    with data.replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, predicted.numpy().astype(np.int16))
    scores = train_cls.scores(train_cls.confusion(test.labels, predicted, len(test.classes)))
    recall = dict(zip((f"recall {name}" for name in test.classes), scores.pop("recall"), strict=True))
    seconds = round(time.perf_counter() - start, 1)
    return dict(**scores, **seen, seconds=seconds, device=str(data.pick_device()), commit=commit(),
                settings=json.dumps(asdict(replace(s, cls=cfg))), **recall)


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
    kinds = dict.fromkeys(("run", "arm", "data", "device", "commit", "settings"), str)
    kinds |= dict.fromkeys(("count", "seed", "steps", "images", "synthetic"), int)
    return {row["run"]: {k: kinds.get(k, float)(v) for k, v in row.items() if v != ""} for row in rows}


def write_results(out, rows):
    """All runs as one tidy table, a row per run."""
    header = list(dict.fromkeys(k for row in rows.values() for k in row))
    data.save_csv(out / "results.csv", header, [[row.get(k, "") for k in header] for row in rows.values()])


def plan(s, arms, scenes, parts):
    """Say what will be run, and from a few steps of each kind how long it takes here."""
    probe = scenes[parts["train"][:64]]

    def seconds(run, config):
        """Of one step: what a longer run takes more than a shorter one, after one that only warms up."""
        marks = []
        for steps in (1, 2, 8):
            start = time.perf_counter()
            run(replace(config, steps=steps))
            marks.append(time.perf_counter() - start)
        return max(0.0, marks[2] - marks[1]) / 6

    cells, synthetic = len(s.counts) * s.seeds, any(ARMS[arm]["share"] for arm in arms)
    generators = len(s.counts) * min(s.subsets, s.seeds) * synthetic
    images = generators * s.made * len(scenes.classes)
    gen = seconds(lambda cfg: train_gen.train(probe, cfg), s.gen)
    cls = seconds(lambda cfg: train_cls.fit(probe, None, cfg), s.cls)
    call = gen / 3 / s.gen.batch * (1 if s.w == 1 else 2)     # per image; a forward pass is a third of a step
    total = generators * s.gen.steps * gen + images * s.calls * call + cells * len(arms) * s.cls.steps * cls
    print(f"{len(scenes)} scenes of {len(scenes.classes)} classes at {s.cls.size} px: "
          f"{len(parts['train'])} to train, {len(parts['val'])} kept aside, {len(parts['test'])} to test")
    print(f"Plan: {' and '.join(map(str, s.counts))} real images per class x {s.seeds} seeds x {len(arms)} "
          f"arms = {cells * len(arms)} classifiers of {s.cls.steps} steps;\n{generators} generators of "
          f"{s.gen.steps} steps, {images} synthetic images: about {total / 60:.1f} minutes on "
          f"{data.pick_device()}, less what is there already\n", flush=True)


# ---- the statistics

def t_quantile(p, dof):
    """The p-quantile of Student's t, p > .5, by adding up its density: scipy is not among our packages."""
    x = np.linspace(0, 400, 40_001)
    log = math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2) - math.log(dof * math.pi) / 2
    density = np.exp(log - (dof + 1) / 2 * np.log1p(x**2 / dof))
    return float(np.interp(p - 0.5, np.cumsum((density[1:] + density[:-1]) / 2) * x[1], x[1:]))


def interval(d):
    """Mean of d (seeds, images), one arm's hits less another's, and half width of its 95 % interval.

    Both the seeds and the test images are samples of what might have been. Their variances are told apart
    as in a two-way analysis of variance, var = (MS_seed + MS_image - MS_rest) / (S N), and the degrees of
    freedom are those of Satterthwaite 1946.
    """
    S, N = d.shape
    seed, image, mean = d.mean(1), d.mean(0), d.mean()
    freedom = np.array([S - 1, N - 1, (S - 1) * (N - 1)])
    ms = np.array([N * ((seed - mean) ** 2).sum(), S * ((image - mean) ** 2).sum(),
                   ((d - seed[:, None] - image + mean) ** 2).sum()]) / freedom
    total = ms @ [1, 1, -1]
    if total > ms[2]:
        dof = total**2 / (ms**2 / freedom).sum()
    else:                                     # seeds and images differ no more than single answers do
        total, dof = ms[2], freedom[2]
    return mean, t_quantile(0.975, dof) * math.sqrt(total / (S * N))


def hits(rows, arm, count, out, test):
    """Which test images an arm got right, (seeds, images) float, or None if it was not run."""
    mine = sorted((r for r in rows if r["arm"] == arm and r["count"] == count), key=lambda r: r["seed"])
    if not mine:
        return None
    answers = np.stack([np.load(out / "predicted" / r["run"]) for r in mine])
    return (answers == test.labels.numpy()).astype(float)


def difference(rows, arm, base, count, out, test):
    """What arm gains over base, (mean, half width) in shares of 1; None unless both ran the same seeds."""
    a, b = hits(rows, arm, count, out, test), hits(rows, base, count, out, test)
    if arm == base or a is None or b is None or len(a) != len(b) or len(a) < 2:
        return None
    return interval(a - b)


def in_words(gain):
    """help, hurt, or make no difference that so few runs could show."""
    mean, half = gain
    return ("help" if mean > half else "hurt" if mean < -half else
            "make no difference that so few runs could show")


def points(gain):
    """+3.1 [+0.4, +5.8], in percentage points."""
    if gain is None:
        return ""
    mean, half = 100 * gain[0], 100 * gain[1]
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def table_rows(rows, out, test):
    """For each count and arm: count, arm, accuracies by seed, gains over real and real + augmentation."""
    bases = "real", "real + augmentation"
    for count in sorted({r["count"] for r in rows}):
        for arm in ARMS:
            if mine := [r["accuracy"] for r in rows if r["arm"] == arm and r["count"] == count]:
                yield count, arm, mine, *(difference(rows, arm, base, count, out, test) for base in bases)


def table(rows, out, test):
    """The results as text."""
    lines = [f"{'per class':>9}  {'arm':32} {'accuracy, %':>12}   {'against real':22} "
             "against real + augmentation"]
    for count, arm, accuracies, *gains in table_rows(rows, out, test):
        spread = f"± {100 * np.std(accuracies, ddof=1):.1f}" if len(accuracies) > 1 else ""
        mean = f"{100 * np.mean(accuracies):.1f} {spread}"
        lines.append(f"{count:>9}  {arm:32} {mean:>12}   {points(gains[0]):22} {points(gains[1])}".rstrip())
    return "\n".join(lines)


def verdict(rows, out, test, cfg, s):
    """The answer in sentences, with its conditions."""
    claims = []
    for count in sorted({r["count"] for r in rows}):
        for arm, base in CLAIMS:
            if gain := difference(rows, arm, base, count, out, test):
                claims.append(f"With {count} real images per class, synthetic images {in_words(gain)}: {arm} "
                              f"against {base} {points(gain)} points of accuracy.")
    if not claims:
        return "No verdict: it takes two seeds, and real arms beside those with synthetic images."
    name, subsets = Path(cfg.data).resolve().name if cfg.data else "drawn scenes", min(s.subsets, s.seeds)
    missed = ", which do not cover another draw of the training images" if subsets == 1 else ""
    claims.append(
        f"Conditions: {name} at {s.cls.size} px, {len(test.classes)} classes, {len(test)} test images; "
        f"{s.seeds} seeds; {subsets} draw{'s' * (subsets > 1)} of the training images, each with its "
        f"generator of {s.gen.steps} steps; classifiers of {s.cls.steps} steps. In brackets: 95 % intervals "
        f"over seeds and test images{missed}.")
    if not cfg.data:
        claims.append("Drawn scenes show that the method works; they say nothing about the world.")
    return "\n".join(claims)


# ---- the pictures and the page

def symmetries(images):
    """The 8 turns and flips of square images: (8, N, C, H, W)."""
    turns = [images.rot90(k, (-2, -1)) for k in range(4)]
    return torch.stack(turns + [image.flip(-1) for image in turns])


def nearest(images, pool):
    """For each image the most similar one of the pool: distances, indices, turned images.

    images (N, C, H, W), pool (M, C, H, W) uint8. Every image is tried in its 8 turns and flips; the distance
    is the root mean square of pixel differences, in grey levels.
    """
    turned = symmetries(images)
    a = rearrange(turned.float(), "s n c h w -> s n (c h w)")
    b = rearrange(pool.float(), "m c h w -> m (c h w)")
    d = torch.cdist(a.flatten(0, 1), b).view(8, len(images), -1) / a.shape[-1] ** 0.5        # (8, N, M)
    distance, which = d.amin(0).min(1)
    every = torch.arange(len(images))
    return distance, which, turned[d[:, every, which].argmin(0), every]


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
    for c in range(min(most, len(real.classes))):
        left, right = (torch.cat([s.images[s.labels == c], blank])[:columns] for s in (real, synthetic))
        strips.append(data.grid(torch.cat([left, blank[:1], right]), 2 * columns + 1))
    return labelled(strips, real.classes[:most], zoom=max(1, 64 // real.images.shape[-1]))


def copies(real, synthetic, held):
    """Are the synthetic images copies? The most suspicious above their nearest real ones; a sentence."""
    some = torch.linspace(0, len(synthetic) - 1, min(len(synthetic), 400)).long()
    distance, which, turned = nearest(synthetic.images[some], real.images)
    floor, _, _ = nearest(held.images[:400], real.images)
    worst = distance.argsort()[:16]
    strips = [data.grid(images, 16) for images in (turned[worst], real.images[which[worst]])]
    nearer = (distance[:, None] < floor).float().mean().item()
    return labelled(strips, ["synthetic", "nearest real"], zoom=max(1, 64 // real.images.shape[-1])), (
        f"Distance to the nearest of {len(real)} training images, over turns and flips: median "
        f"{distance.median():.0f} grey levels for synthetic images, {floor.median():.0f} for real ones that "
        f"were held out. A synthetic image is nearer than a held-out one in {100 * nearer:.0f} % of pairs "
        "(copies: near 100 %; 50 % or less is no sign of copying).")


def chart(rows):
    """Accuracy of each arm as SVG: a dot per seed, a bar at the mean, a colour of the page per count."""
    counts = sorted({r["count"] for r in rows})
    arms = [arm for arm in ARMS if any(r["arm"] == arm for r in rows)]
    parts, foot = [], 34 * len(arms) + 12

    def x(share):
        return round(230 + 440 * share, 1)

    for tick in range(0, 101, 20):
        at = x(tick / 100)
        parts.append(f'<line x1="{at}" x2="{at}" y1="8" y2="{foot}" class="tick"/>'
                     f'<text x="{at}" y="{foot + 16}" text-anchor="middle">{tick} %</text>')
    for i, arm in enumerate(arms):
        parts.append(f'<text x="222" y="{34 * i + 32}" text-anchor="end">{arm}</text>')
        for k, count in enumerate(counts):
            scores = [r["accuracy"] for r in rows if r["arm"] == arm and r["count"] == count]
            y, color = 34 * i + 28 + 12 * (k - (len(counts) - 1) / 2), f"c{k % 4}"
            parts += [f'<circle cx="{x(v)}" cy="{y}" r="3" class="{color}"/>' for v in scores]
            if scores:
                mean = x(float(np.mean(scores)))
                parts.append(f'<line x1="{mean}" x2="{mean}" y1="{y - 5}" y2="{y + 5}" '
                             f'class="mean {color}"/>')
    legend = " ".join(f'<tspan class="c{k % 4}">● {n} per class</tspan>' for k, n in enumerate(counts))
    parts.append(f'<text x="230" y="{foot + 38}">{legend}</text>')
    return (f'<svg viewBox="0 0 700 {foot + 46}" role="img" '
            'aria-label="Accuracy of each arm, a dot per seed">' + "".join(parts) + "</svg>")


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
th { white-space: normal; vertical-align: bottom }
figure { margin: 1.5rem 0 } img { max-width: 100% } figcaption { opacity: .8 }
svg { width: 100%; max-width: 44rem; font-size: 13px } text { fill: var(--ink) } .tick { stroke: var(--line) }
.c0 { fill: var(--c0); stroke: var(--c0) } .c1 { fill: var(--c1); stroke: var(--c1) }
.c2 { fill: var(--c2); stroke: var(--c2) } .c3 { fill: var(--c3); stroke: var(--c3) }
circle { fill-opacity: .5; stroke: none } .mean { stroke-width: 3 } tspan { stroke: none }
"""


def figure(path, picture, text):
    """Save a picture, and return it as part of a page."""
    data.save_picture(picture, path)
    png, text = base64.b64encode(path.read_bytes()).decode(), html.escape(text)
    return (f'<figure><img alt="{text}" src="data:image/png;base64,{png}">'
            f'<figcaption>{text}</figcaption></figure>')


def report(out, cfg, s, test, rows, shown):
    """Write report.html, which needs no other file, from what was run so far.

    shown: (real, synthetic, held-out real) Scenes, or None. Returns what was found of copies, a line or "".
    """
    figures, sentence = "<p>No synthetic images in these arms.", ""
    if shown:
        suspects, sentence = copies(*shown)
        caption = ("Left: real training images. Right: synthetic images of the same class, by a generator "
                   "that saw nothing but such training images.")
        figures = figure(out / "grid.png", side_by_side(*shown[:2]), caption)
        caption = f"Are they copies? The most suspicious 16. {sentence}"
        figures += figure(out / "copies.png", suspects, caption)
    title = "Does synthetic data help to recognise scenes from above?"
    answer = html.escape(verdict(rows, out, test, cfg, s)).replace("\n", "<p>")
    body = "".join(f"<tr><td>{count}<td>{arm}<td>{100 * np.mean(a):.1f}<td>{'<td>'.join(map(points, gains))}"
                   for count, arm, a, *gains in table_rows(rows, out, test))
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style>
<h1>{title}</h1><p>{answer}
<h2>Accuracy on the test split</h2>{chart(rows)}
<div class="scroll"><table><tr><th>real per class<th>arm<th>accuracy, %<th>against real, points
<th>against real + augmentation{body}</table></div>
<h2>What the images are like</h2>{figures}
<h2>Again</h2><pre>{html.escape(command(cfg))}</pre>
<p>Commit {commit() or "unknown"}, torch {torch.__version__} on {data.pick_device()}. Every run, with all its
settings, is a row of results.csv.</html>"""
    with data.replacing(out / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return sentence and f"\nAre they copies? {sentence}"


def command(cfg):
    """The command line that repeats this comparison."""
    given = [f"--{f.name.replace('_', '-')} {shlex.quote(str(getattr(cfg, f.name)))}" for f in fields(Config)
             if f.name != "smoke" and getattr(cfg, f.name) != f.default]
    return " ".join(["python experiment.py", *["--smoke"] * cfg.smoke, *given])


if __name__ == "__main__":
    data.launch(main, Config)
