"""Does synthetic data from a diffusion model help a classifier of remote-sensing images, and compared with
what?

    python experiment.py                              drawn scenes, minutes on a CPU: shows the method, says nothing of the world
    python experiment.py --data data/NWPU-RESISC45    the question itself

For each number of real images per class and each seed: draw a subset of the training split, train a
generator on exactly this subset, make a synthetic set with it, then train the same classifier once per arm
and score it on the test split. The rules:

    equal budget   every arm takes the same optimizer steps and images per step; synthetic images take the place of real ones
    no leak        a generator sees its arm's real training images and nothing else; nothing is chosen by the test split
    paired         a seed fixes subset, weights and batches in all arms, so differences are taken per seed and test image
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
from data import Scenes, flag

ARMS = {                             # share: probability of a synthetic image;   augment: by name, augment.py
    "real":                            dict(share=0.0, augment="none"),
    "real + augmentation":             dict(share=0.0, augment=OVERHEAD),
    "synthetic only":                  dict(share=1.0, augment="none"),
    "real + synthetic":                dict(share=0.5, augment="none"),
    "real + synthetic + augmentation": dict(share=0.5, augment=OVERHEAD),
}
CLAIMS = [("real + synthetic", "real"), ("real + synthetic + augmentation", "real + augmentation")]     # what against what


@dataclass
class Scale:
    """How large a comparison is."""
    counts: tuple                                                        # real training images per class
    seeds: int
    made: int                                                            # synthetic images per class
    calls: int                                                           # network calls per synthetic image
    w: float                                                             # guidance scale
    drawn: int                                                      # scenes per class where no data are given
    gen: train_gen.Config
    cls: train_cls.Config


SCALES = {
    "smoke": Scale((4, 8), 2, 8, 4, 1.5, 30, train_gen.Config(
        size=16, width=16, mults=(1, 2), blocks=1, patch=2, steps=20, batch=16, lr=2e-3, warmup=5), train_cls.Config(
        size=16, patch=4, dim=32, depth=2, heads=2, steps=20, batch=32, warmup=5)),
    "cpu": Scale((10, 40), 3, 60, 12, 1.5, 150, train_gen.Config(
        size=32, width=32, mults=(1, 2, 4), blocks=1, patch=2, steps=500, batch=32, lr=2e-3, warmup=50), train_cls.Config(
        size=32, patch=8, dim=64, depth=4, heads=2, steps=300, batch=64, warmup=50)),
    "gpu": Scale((10, 70, 420), 5, 700, 20, 1.5, 700, train_gen.Config(), train_cls.Config()),
}


@dataclass
class Config:
    """What may be asked for on the command line; 0 or empty means: as --scale has it."""
    data: str = flag("", "tree with a folder per class (empty: scenes are drawn)")
    out: str = flag("runs/experiment", "folder for results.csv, report.html, pictures, generators")
    scale: str = flag("", "smoke, cpu or gpu (empty: gpu where there is one, else cpu)")
    smoke: bool = flag(False, "every stage in under a minute: the same as --scale smoke")
    arms: str = flag(",".join(ARMS), "which arms, by comma")
    counts: str = flag("", "real training images per class, by comma")
    seeds: int = flag(0, "repetitions")
    size: int = flag(0, "side of the images in pixels")
    made: int = flag(0, "synthetic images per class")
    gen_steps: int = flag(0, "optimizer steps of each generator")
    cls_steps: int = flag(0, "optimizer steps of each classifier")
    w: float = flag(0.0, "guidance scale (1: none)")
    skip_broken: bool = flag(False, "leave out pictures that do not decode")

    def __post_init__(self):
        if unknown := set(self.arms.split(",")) - set(ARMS):
            raise ValueError(f"unknown arm {', '.join(sorted(unknown))}; the arms are {', '.join(ARMS)}")
        if self.scale not in ("", *SCALES):
            raise ValueError(f"--scale {self.scale}: smoke, cpu or gpu")
        self.resolved()                                          # so that a bad size or count is told at once

    def resolved(self):
        """The Scale that these flags stand for."""
        name = "smoke" if self.smoke else self.scale or ("gpu" if torch.cuda.is_available() else "cpu")
        s = SCALES[name]
        size = self.size or s.gen.size
        return replace(s, counts=data.numbers(self.counts) if self.counts else s.counts, seeds=self.seeds or s.seeds,
                       made=self.made or s.made, w=self.w or s.w,
                       gen=replace(s.gen, size=size, steps=self.gen_steps or s.gen.steps),
                       cls=replace(s.cls, size=size, steps=self.cls_steps or s.cls.steps))


# ---- the runs

def comparison(cfg):
    """The script: everything that is still missing is run, then the table, the verdict and the page are
    written.
    """
    s, out, arms = cfg.resolved(), Path(cfg.out), cfg.arms.split(",")
    root = Path(cfg.data) if cfg.data else data.draw_tree(out / "drawn", s.drawn)
    scenes = data.read_folder(root, s.cls.size, cfg.skip_broken, cache=out / "cache")
    parts = data.split(scenes, root)
    test = scenes[parts["test"]]
    plan(s, arms, scenes, parts)
    rows = read_results(out)

    mine, shown = [], None                                  # the rows of this comparison; what the page shows
    for seed in range(s.seeds):
        for count in s.counts:
            real, synthetic = scenes[data.subset(scenes, parts["train"], count, seed)], None
            assert not set(real.groups.tolist()) & set(test.groups.tolist()), "training images in the test split"
            for arm in arms:
                run = run_id(arm, s, real, test, seed)
                if run not in rows:
                    what = f"{count} per class, seed {seed + 1} of {s.seeds}"
                    if ARMS[arm]["share"] and synthetic is None:
                        synthetic = synthesize(real, s, seed, out, what)
                    rows[run] = score(arm, real, synthetic, test, s, seed, f"{arm}, {what}", out / "predicted" / f"{run}.npy")
                    rows[run] = dict(run=run, arm=arm, count=count, seed=seed, data=cfg.data or "drawn", **rows[run])
                    write_results(out, rows)
                mine.append(rows[run])
            if synthetic:
                shown = real, synthetic
            report(out, cfg, s, test, mine, shown)
    assert len({(row["steps"], row["images"]) for row in mine}) == 1, "arms of unequal budget"
    print(table(mine, out, test))
    print(verdict(mine, out, test, cfg, s))
    print(f"\npage: {out / 'report.html'}   runs: {out / 'results.csv'}")


def run_id(arm, s, real, test, seed):
    """A name for everything that decides a run's result: with the same name it need not be run again."""
    makes = (s.gen, s.made, s.calls, s.w) if ARMS[arm]["share"] else ()
    return hashlib.sha256(repr((ARMS[arm], s.cls, makes, real.names, test.names, seed)).encode()).hexdigest()[:12]


def synthesize(real, s, seed, out, what):
    """Train a generator on real (or take the one that was) and make s.made images per class with it:
    Scenes.
    """
    name = hashlib.sha256(repr((s.gen, real.names, seed)).encode()).hexdigest()[:12]
    generator = train_gen.train(real, replace(s.gen, seed=seed), out / "generators" / f"{name}.pt", title=f"generator, {what}")
    y = torch.arange(len(real.classes)).repeat_interleave(s.made)
    images = train_gen.generate(generator, y, seed, s.calls, s.w, title=f"synthetic images, {what}")
    return Scenes(images, y, real.classes, [f"synthetic {k}" for k in range(len(y))], torch.arange(len(y)))


def score(arm, real, synthetic, test, s, seed, title, path):
    """Train one classifier, keep its answers on the test split in `path`, return its part of a row."""
    start = time.perf_counter()
    model, seen = train_cls.fit(real, synthetic, replace(s.cls, seed=seed, **ARMS[arm]), title=title)
    predicted = train_cls.predict(model, test.images)
    with data.replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, predicted.numpy().astype(np.int16))
    scores = train_cls.scores(train_cls.confusion(test.labels, predicted, len(test.classes)))
    recall = {f"recall {name}": round(r, 4) for name, r in zip(test.classes, scores.pop("recall"), strict=True)}
    return dict(**scores, **seen, seconds=round(time.perf_counter() - start, 1), device=str(data.pick_device()),
                commit=commit(), settings=json.dumps(asdict(replace(s, cls=replace(s.cls, seed=seed, **ARMS[arm])))), **recall)


def commit():
    """The commit of this code, with a + if it has been changed since; empty outside a checkout."""
    git = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=7"], cwd=Path(__file__).parent,
                         capture_output=True, text=True)
    return git.stdout.strip()


def read_results(out):
    """The runs that results.csv holds, {run: row}."""
    path = out / "results.csv"
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    whole = {"count", "seed", "steps", "images", "synthetic"}
    text = {"run", "arm", "data", "device", "commit", "settings"}
    return {r["run"]: {k: v if k in text else int(v) if k in whole else float(v or "nan") for k, v in r.items()} for r in rows}


def write_results(out, rows):
    """All runs as one tidy table, a row per run."""
    header = list(dict.fromkeys(k for row in rows.values() for k in row))
    data.save_csv(out / "results.csv", header, [[row.get(k, "") for k in header] for row in rows.values()])


def plan(s, arms, scenes, parts):
    """Say what will be run, and about how long it takes here, from a few steps of each kind."""
    device = data.pick_device()
    probe = scenes[parts["train"][:64]]

    def seconds(run, config):
        """Of one step: the first ones warm up, so the difference of a longer and a shorter run."""
        marks = []
        for steps in (2, 6):
            start = time.perf_counter()
            run(replace(config, steps=steps))
            marks.append(time.perf_counter() - start)
        return max(0.0, marks[1] - marks[0]) / 4

    cells = len(s.counts) * s.seeds
    generators = cells if any(ARMS[arm]["share"] for arm in arms) else 0
    images = generators * s.made * len(scenes.classes)
    gen = seconds(lambda c: train_gen.train(probe, c), s.gen)
    cls = seconds(lambda c: train_cls.fit(probe, None, c), s.cls)
    call = gen / 3 / s.gen.batch * (1 if s.w == 1 else 2)                # a forward pass is a third of a step
    total = generators * s.gen.steps * gen + images * s.calls * call + cells * len(arms) * s.cls.steps * cls
    print(f"{len(scenes)} scenes of {len(scenes.classes)} classes at {s.cls.size} px: {len(parts['train'])} to train, "
          f"{len(parts['val'])} kept aside, {len(parts['test'])} to test")
    print(f"plan: {' and '.join(map(str, s.counts))} real images per class x {s.seeds} seeds x {len(arms)} arms = "
          f"{cells * len(arms)} classifiers of {s.cls.steps} steps,\n      {generators} generators of {s.gen.steps} steps, "
          f"{images} synthetic images; about {total / 60:.1f} minutes on {device}, less what is there already\n")


# ---- the statistics

def t_quantile(p, dof):
    """The p-quantile of Student's t, p > .5, by adding up its density: scipy is not among our packages."""
    x = np.linspace(0, 400, 4_000_001)
    log = math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2) - math.log(dof * math.pi) / 2
    density = np.exp(log - (dof + 1) / 2 * np.log1p(x**2 / dof))
    return float(np.interp(p - 0.5, np.cumsum((density[1:] + density[:-1]) / 2) * (x[1] - x[0]), x[1:]))


def interval(d):
    """Mean and half width of its 95 % interval, for d (seeds, images): one arm's hits minus another's, -1,
    0 or 1.

    Both the seeds and the test images are samples of what might have been. Their variances are told apart
    as in a two-way analysis of variance without repetition, var = (MS_seed + MS_image - MS_rest) / (S N),
    and the degrees of freedom are those of Satterthwaite 1946.
    """
    S, N = d.shape
    seed, image, mean = d.mean(1), d.mean(0), d.mean()
    ms = np.array([N * seed.var(ddof=1), S * image.var(ddof=1),
                   ((d - seed[:, None] - image + mean) ** 2).sum() / ((S - 1) * (N - 1))])
    total = ms @ [1, 1, -1]
    if total <= ms[2]:                                            # nothing beyond the noise of single answers
        total, dof = ms[2], (S - 1) * (N - 1)
    else:
        dof = total**2 / (ms**2 / [S - 1, N - 1, (S - 1) * (N - 1)]).sum()
    return mean, t_quantile(0.975, dof) * math.sqrt(total / (S * N)) if total > 0 else 0.0


def hits(rows, arm, count, out, test):
    """Which test images an arm got right, (seeds, images) float, or None if it was not run."""
    mine = sorted((r for r in rows if r["arm"] == arm and r["count"] == count), key=lambda r: r["seed"])
    if not mine:
        return None
    return np.stack([np.load(out / "predicted" / f"{r['run']}.npy") == test.labels.numpy() for r in mine]).astype(float)


def difference(rows, arm, base, count, out, test):
    """(mean, half width) of what arm gains over base, as shares of 1; None unless both have the same two
    seeds or more.
    """
    a, b = hits(rows, arm, count, out, test), hits(rows, base, count, out, test)
    if arm == base or a is None or b is None or len(a) != len(b) or len(a) < 2:
        return None
    return interval(a - b)


def in_words(gain):
    """helps, hurts, or makes no difference that this many runs could show."""
    mean, half = gain
    return "helps" if mean > half else "hurts" if mean < -half else "makes no difference that so few runs could show"


def points(gain):
    """+3.1 [+0.4, +5.8], in percentage points."""
    return "" if gain is None else f"{100 * gain[0]:+.1f} [{100 * (gain[0] - gain[1]):+.1f}, {100 * (gain[0] + gain[1]):+.1f}]"


def table_rows(rows, out, test):
    """For each count and arm: count, arm, accuracies by seed, gain over real, gain over real +
    augmentation.
    """
    for count in sorted({r["count"] for r in rows}):
        for arm in ARMS:
            mine = [r["accuracy"] for r in rows if r["arm"] == arm and r["count"] == count]
            if mine:
                yield count, arm, mine, *(difference(rows, arm, base, count, out, test) for base in ("real", "real + augmentation"))


def table(rows, out, test):
    """The results as text."""
    lines = [f"{'per class':>9}  {'arm':32} {'accuracy':>14}   {'against real':24} against real + augmentation"]
    for count, arm, accuracies, *gains in table_rows(rows, out, test):
        spread = f"± {100 * np.std(accuracies, ddof=1):.1f}" if len(accuracies) > 1 else ""
        score = f"{100 * np.mean(accuracies):.1f} {spread}"
        lines.append(f"{count:>9}  {arm:32} {score:>14}   {points(gains[0]):24} {points(gains[1])}")
    return "\n".join(lines)


def verdict(rows, out, test, cfg, s):
    """The answer in sentences, with its conditions."""
    claims = []
    for count in sorted({r["count"] for r in rows}):
        for arm, base in CLAIMS:
            if gain := difference(rows, arm, base, count, out, test):
                claims.append(f"With {count} real images per class, synthetic images {in_words(gain)} ({arm} against {base}: "
                              f"{points(gain)} points of accuracy).")
    if not claims:
        return "No verdict: it takes two seeds, and real arms beside those with synthetic images."
    data_name = f"{Path(cfg.data).name} at {s.cls.size} px" if cfg.data else "scenes drawn by data.py"
    claims.append(f"Conditions: {data_name}, {len(test.classes)} classes, {len(test)} test images, {s.seeds} seeds, classifiers "
                  f"of {s.cls.steps} steps, generators of {s.gen.steps} steps. In brackets: 95 % intervals over seeds and test "
                  "images.")
    if not cfg.data:
        claims.append("Drawn scenes show that the method works; they say nothing about the world.")
    return "\n".join(claims)


# ---- the pictures and the page

def symmetries(images):
    """The 8 turns and flips of square images: (8, N, C, H, W)."""
    turns = [images.rot90(k, (-2, -1)) for k in range(4)]
    return torch.stack(turns + [image.flip(-1) for image in turns])


def nearest(images, pool):
    """For each image the pool's most similar one over the 8 turns and flips: distances, indices, turned
    images.

    images (N, C, H, W), pool (M, C, H, W) uint8; the distance is the root mean square of pixel differences
    in grey levels.
    """
    a = rearrange(symmetries(images).float(), "s n c h w -> s n (c h w)")
    b = rearrange(pool.float(), "m c h w -> m (c h w)")
    d = torch.cdist(a, b) / a.shape[-1] ** 0.5                           # (8, N, M)
    best, which = d.amin(0).min(1)                                       # over the pool, after the best turn
    turn = d[:, torch.arange(len(images)), which].argmin(0)
    return best, which, symmetries(images)[turn, torch.arange(len(images))]


def labelled(strips, names, zoom):
    """Grids of pictures below each other, a name at the left of each."""
    left = 8 + 7 * max(map(len, names))
    height = sum(strip.height for strip in strips) * zoom
    page = Image.new("RGB", (left + zoom * max(strip.width for strip in strips), height), "white")
    y = 0
    for strip, name in zip(strips, names, strict=True):
        strip = strip.resize((strip.width * zoom, strip.height * zoom), Image.Resampling.NEAREST)
        ImageDraw.Draw(page).text((4, y + strip.height / 2 - 6), name, fill="black")
        page.paste(strip, (left, y))
        y += strip.height
    return page


def side_by_side(real, synthetic, columns=8, most=24):
    """A row per class: real images left, synthetic ones right."""
    strips = []
    for c in range(min(most, len(real.classes))):
        pair = [scenes.images[scenes.labels == c][:columns] for scenes in (real, synthetic)]
        blank = pair[0].new_full((columns, *pair[0].shape[1:]), 255)
        pair = [torch.cat([images, blank])[:columns] for images in pair]
        strips.append(data.grid(torch.cat([pair[0], blank[:1], pair[1]]), 2 * columns + 1))
    return labelled(strips, real.classes[:most], zoom=max(1, 64 // real.images.shape[-1]))


def copies(real, synthetic, held):
    """Are the synthetic images copies? The most suspicious ones over their nearest training images, and
    a sentence.
    """
    some = torch.linspace(0, len(synthetic) - 1, min(len(synthetic), 400)).long()
    distance, which, turned = nearest(synthetic.images[some], real.images)
    floor, _, _ = nearest(held.images[:400], real.images)
    worst = distance.argsort()[:16]
    strips = [data.grid(turned[worst], 16), data.grid(real.images[which[worst]], 16)]
    share = (distance[:, None] < floor).float().mean().item()
    return labelled(strips, ["synthetic", "nearest real"], zoom=max(1, 64 // real.images.shape[-1])), (
        f"Root mean square distance to the nearest of {len(real)} training images, over turns and flips: median "
        f"{distance.median():.0f} grey levels for synthetic images, {floor.median():.0f} for real ones that were held out. A "
        f"synthetic image is nearer than a held-out one in {100 * share:.0f} % of pairs (copies: near 100 %; 50 % is no sign).")


def chart(rows):
    """Accuracy of each arm: a dot per seed, a bar at the mean, a colour per count. SVG, which reads the
    page's colours.
    """
    counts = sorted({r["count"] for r in rows})
    arms = [arm for arm in ARMS if any(r["arm"] == arm for r in rows)]
    parts, x = [], lambda share: 230 + 440 * share
    for tick in range(0, 101, 20):
        parts.append(f'<line x1="{x(tick / 100)}" x2="{x(tick / 100)}" y1="8" y2="{34 * len(arms) + 12}" class="tick"/>'
                     f'<text x="{x(tick / 100)}" y="{34 * len(arms) + 28}" text-anchor="middle">{tick} %</text>')
    for i, arm in enumerate(arms):
        parts.append(f'<text x="222" y="{34 * i + 32}" text-anchor="end">{arm}</text>')
        for k, count in enumerate(counts):
            scores = [r["accuracy"] for r in rows if r["arm"] == arm and r["count"] == count]
            y, color = 34 * i + 28 + 8 * (k - (len(counts) - 1) / 2), f"c{k % 4}"
            parts += [f'<circle cx="{x(v):.1f}" cy="{y}" r="3" class="{color}"/>' for v in scores]
            if scores:
                mean = x(float(np.mean(scores)))
                parts.append(f'<line x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 6}" y2="{y + 6}" class="mean {color}"/>')
    legend = " ".join(f'<tspan class="c{k % 4}">● {count} per class</tspan>' for k, count in enumerate(counts))
    parts.append(f'<text x="230" y="{34 * len(arms) + 48}">{legend}</text>')
    return (f'<svg viewBox="0 0 700 {34 * len(arms) + 56}" role="img" aria-label="Accuracy of each arm, a dot per seed">'
            + "".join(parts) + "</svg>")


STYLE = """:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --line: #d5dae1; --c0: #0b6bcb; --c1: #c2410c;
  --c2: #0f7b4f; --c3: #7c3aed }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --paper: #14181f; --line: #3a424e; --c0: #6cb2ff; --c1: #ff9d66;
  --c2: #5fd3a0; --c3: #b79bff } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line) }
img { max-width: 100%; image-rendering: pixelated } figure { margin: 1.5rem 0 } figcaption { opacity: .8 }
svg { width: 100%; max-width: 44rem; font-size: 13px } svg text { fill: var(--ink) } .tick { stroke: var(--line) }
.c0 { fill: var(--c0); stroke: var(--c0) } .c1 { fill: var(--c1); stroke: var(--c1) } .c2 { fill: var(--c2); stroke: var(--c2) }
.c3 { fill: var(--c3); stroke: var(--c3) } circle { fill-opacity: .5; stroke: none } .mean { stroke-width: 3 }
tspan { stroke: none } pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line) }"""


def report(out, cfg, s, test, rows, shown):
    """Write report.html, one file that needs no other, from what has been run so far. shown: (real,
    synthetic) or None.
    """
    figures = []
    if shown:
        suspects, sentence = copies(*shown, test)
        for name, picture, text in (("grid.png", side_by_side(*shown), "Left: real training images. Right: synthetic images of "
                                     "the same class, made by a generator that saw only such images."),
                                    ("copies.png", suspects, f"Are they copies? The 16 most suspicious. {sentence}")):
            data.save_picture(picture, out / name)
            figures.append(f'<figure><img alt="{html.escape(text)}" src="data:image/png;base64,'
                           f'{base64.b64encode((out / name).read_bytes()).decode()}"><figcaption>{text}</figcaption></figure>')
    body = "".join(f"<tr><td>{count}<td>{arm}<td>{100 * np.mean(a):.1f}<td>{points(g)}<td>{points(h)}"
                   for count, arm, a, g, h in table_rows(rows, out, test))
    title = "Does synthetic data help to recognise scenes from above?"
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>
<p>{html.escape(verdict(rows, out, test, cfg, s)).replace(chr(10), "<p>")}
<h2>Accuracy on the test split</h2>{chart(rows)}
<div class="scroll"><table><tr><th>real per class<th>arm<th>accuracy, %<th>against real, points<th>against real + augmentation
{body}</table></div><h2>What the images are like</h2>{"".join(figures) or "<p>None yet."}
<h2>Again</h2><pre>{html.escape(command(cfg))}</pre><p>Commit {commit() or "unknown"}, torch {torch.__version__} on
{data.pick_device()}. Every run, with all its settings, is a row of results.csv.</html>"""
    with data.replacing(out / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def command(cfg):
    """The command line that repeats this comparison."""
    given = [f"--{f.name.replace('_', '-')} {shlex.quote(str(getattr(cfg, f.name)))}" for f in fields(Config)
             if getattr(cfg, f.name) != f.default and f.name != "smoke"]
    return " ".join(["python experiment.py", *["--smoke"] * cfg.smoke, *given])


if __name__ == "__main__":
    data.launch(comparison, Config)
