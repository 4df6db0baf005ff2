"""All that touches the disk: scenes read, drawn, split and saved; and what all scripts share.

A data set is one uint8 tensor (N, C, H, W) with a label for each image. RESISC45 at 64 px is 387 MB, so it
lives on the device as it is: a batch is an index draw, and there are no workers to wait for.
"""
import argparse
import csv
import hashlib
import math
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from tqdm import tqdm

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"}
HOW_TO_GET = """RESISC45 (Cheng et al. 2017), 45 classes of 700 images of 256 x 256 pixels, zip of 427 MB:
https://hf.co/datasets/isaaccorley/resisc45/resolve/883edc0eee77b2c84225472f10f126e3ed83fa6e/NWPU-RESISC45.zip
md5 75206b2e16446591afa88e2628744886
Unpack it to data/NWPU-RESISC45, one folder per class, and if you like put resisc45-train.txt, -val.txt and
-test.txt (the official 60/20/20 lists, same address) beside them. Any other tree with a folder per class does
as well."""


# ---- what all scripts share

class Problem(Exception):
    """Something that the user can mend. Its text is one line: what is wrong, where, what to do."""


def flag(default, help):
    """A field of a script's Config, which is also its --flag."""
    return field(default=default, metadata={"help": help})


def numbers(text):
    """"10,40" -> (10, 40)."""
    return tuple(int(part) for part in text.split(","))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def launch(main, config, argv=None):
    """Run a script, with one --flag per field of its Config.

    A mistake of the user is one line on stderr and exit code 2.
    """
    parser = _Parser(description=sys.modules[main.__module__].__doc__.split("\n\n")[0], allow_abbrev=False,
                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(config):
        kind = (dict(action=argparse.BooleanOptionalAction) if isinstance(f.default, bool) else
                dict(type=numbers, metavar="N,N") if isinstance(f.default, tuple) else
                dict(type=type(f.default)))
        name = "--" + f.name.replace("_", "-")
        parser.add_argument(name, default=f.default, help=f.metadata["help"], **kind)
    arguments = vars(parser.parse_args(argv))
    try:
        settings = config(**arguments)                                 # its __post_init__ looks at the values
    except ValueError as error:
        parser.error(error)
    try:
        return main(settings)
    except Problem as problem:
        parser.exit(2, f"{parser.prog}: {problem}\n")


def pick_device():
    """The fastest device that this machine has."""
    return torch.device("cuda" if torch.cuda.is_available() else
                        "mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device):
    """bfloat16 where it pays, on a GPU: the range of float32, so no gradient scaler."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def rng(*key, device="cpu"):
    """Randomness by name: a generator for this key of whole numbers, say (seed, step).

    A run that was stopped then goes on with the same numbers without having saved any state. The hash is
    there because torch's CPU generator looks at 32 bits of its seed only.
    """
    hashed = np.random.SeedSequence((len(key), *key)).generate_state(1)
    return torch.Generator(device).manual_seed(int(hashed[0]))


def lr_at(step, steps, lr, warmup):
    """The learning rate of a step: up linearly for `warmup` steps, then down to 0 along a cosine."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def to_float(images):
    """uint8 -> float in [-1, 1]. With to_uint8 the only crossing, for real and synthetic images alike."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """Float in [-1, 1] -> uint8.

    Rounds: truncation would darken synthetic images by half a grey level, a cue to learn.
    """
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@contextmanager
def replacing(path):
    """A temporary name beside path.

    What is written there takes path's place at the end, or, after an error, nothing does.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_csv(path, header, rows):
    """A table, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def save_checkpoint(path, kind, identity, step, parts, **more):
    """One file with all of a run: what it is (identity), how far it is (step), the state of its parts."""
    states = {name: part.state_dict() for name, part in parts.items()}
    with replacing(path) as temporary:
        torch.save({"kind": kind, **identity, "step": step, **states, **more}, temporary)


def resume(path, kind, identity, parts):
    """Give the parts {name: module or optimizer} the state they had, if there is a checkpoint.

    Returns the checkpoint, or None. Raises Problem if it is of a run with another identity {name: value}.
    """
    if not path or not Path(path).exists():
        return None
    saved = load_checkpoint(path, kind)
    if differ := [name for name in identity if saved[name] != identity[name]]:
        raise Problem(f"{path} is of a run with another {differ[0]}: give another --out, or remove it")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved


def load_checkpoint(path, kind):
    """What save_checkpoint wrote. Nothing in the file is executed (weights_only)."""
    if not Path(path).is_file():
        raise Problem(f"no checkpoint at {path}: train one first, or give another path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        content = None
    found = content.get("kind", "something else") if isinstance(content, dict) else "no checkpoint of ours"
    if found != kind:
        raise Problem(f"{path} is {found}, a {kind} is needed: give another path")
    return content


# ---- scenes

@dataclass
class Scenes:
    """A labelled set of images."""
    images: torch.Tensor                                                 # (N, C, H, W) uint8
    labels: torch.Tensor                                                 # (N,) int64, an index into classes
    classes: list[str]
    names: list[str]                                           # "river/river_001.jpg": who was in which split
    groups: torch.Tensor                                                 # (N,) int64: same group, same split

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """The scenes at these places, index (M,) int64."""
        names = [self.names[i] for i in index.tolist()]
        return Scenes(self.images[index], self.labels[index], self.classes, names, self.groups[index])

    def digest(self):
        """A short name for exactly these names, labels and pixels, in this order."""
        what = repr((self.names, self.labels.tolist(), self.classes, self.images.shape)).encode()
        return hashlib.sha256(what + self.images.contiguous().numpy().tobytes()).hexdigest()[:12]


def decode(path, size):
    """One picture as (3, size, size) uint8: the central square, reduced with antialiasing.

    Grey, palette and 16 bits become RGB.
    """
    with Image.open(path) as pil:
        if pil.mode == "F":
            raise ValueError("pixels are fractions, of which nobody says where white is: save 8 or 16 bits")
        if pil.mode.startswith("I"):                             # 16 bits: the upper 8 count
            pil = Image.fromarray((np.asarray(pil, dtype=np.float32) / 257).clip(0, 255).astype(np.uint8))
        # A JPEG decoder can halve for free; twice the size is left to filter.
        pil.draft("RGB", (2 * size, 2 * size))
        if pil.mode == "P":
            pil = pil.convert("RGBA")                            # a palette may hold a transparent colour
        w, h = pil.size
        side = min(w, h)
        box = ((w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2)
        pil = pil.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)
        return rearrange(np.array(pil), "h w c -> c h w")


def read_folder(root, size, skip_broken=False, cache="runs/cache"):
    """A tree with a folder per class, decoded once and cached; a cache that no longer fits is made anew."""
    root = Path(root)
    files = find_pictures(root)
    stats = [(p.relative_to(root).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    print_of_tree = hashlib.sha256(repr((size, skip_broken, stats)).encode()).hexdigest()
    place = hashlib.sha256(f"{root.resolve()} {size}".encode()).hexdigest()[:12]
    store = Path(cache) / f"{root.resolve().name}-{size}-{place}.pt"
    if store.exists():
        content = torch.load(store, mmap=True, weights_only=True)
        if content.pop("tree") == print_of_tree:
            return Scenes(**content)
        print(f"{root} has changed since it was cached: decoding it again", file=sys.stderr)

    images, broken = decode_all(files, size, f"reading {root.name}")
    if broken and not skip_broken:
        names = ", ".join(str(files[i]) for i in sorted(broken)[:3]) + " ..." * (len(broken) > 3)
        raise Problem(f"{len(broken)} of {len(files)} pictures do not decode ({names}): "
                      "mend them, or give --skip-broken")
    for i, error in sorted(broken.items()):
        print(f"skipped {files[i]}: {error}", file=sys.stderr)
    keep = torch.tensor([i for i in range(len(files)) if i not in broken], dtype=torch.int64)

    classes = sorted({files[i].parent.name for i in keep.tolist()})
    if len(classes) < 2:
        raise Problem(f"{root}: fewer than two classes have pictures that decode: mend or replace them")
    first, groups = {}, []                                               # exact doubles form a group
    for i in keep.tolist():
        groups.append(first.setdefault(images[i].numpy().tobytes(), i))
    labels = torch.tensor([classes.index(files[i].parent.name) for i in keep.tolist()])
    content = dict(images=images[keep], labels=labels, classes=classes,
                   names=[stats[i][0] for i in keep.tolist()], groups=torch.tensor(groups))
    with replacing(store) as temporary:
        torch.save({**content, "tree": print_of_tree}, temporary)
    return Scenes(**content)


def decode_all(files, size, title):
    """Decode on all cores: images (N, 3, size, size) uint8, and what failed, {index: error}."""
    images, broken = torch.empty(len(files), 3, size, size, dtype=torch.uint8), {}

    def read(i):
        try:
            images[i] = torch.from_numpy(decode(files[i], size))
        except Exception as error:                                       # Pillow raises a dozen kinds
            broken[i] = error

    with ThreadPoolExecutor(os.cpu_count()) as pool:              # Pillow lets go of the GIL while it decodes
        list(tqdm(pool.map(read, range(len(files))), title, len(files), disable=None, leave=False))
    return images, broken


def find_pictures(root):
    """The pictures in the class folders of root, by class, then by name."""
    if not root.is_dir():
        raise Problem(f"no folder {root}: give one with a folder of pictures per class "
                      "(python data.py tells how to get RESISC45)")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [p for f in folders for p in sorted(f.iterdir())
             if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    found = sorted({p.parent.name for p in files})
    if len(found) < 2:
        inside = [f for f in folders if any(p.is_dir() for p in f.iterdir())]
        hint = f"; did you mean {inside[0]}?" if inside else ""
        what = f"only one class with pictures, {found[0]}" if found else "no pictures in class folders"
        raise Problem(f"{root}: {what}; a folder per class, at least two, is needed{hint}")
    return files


def split(scenes, root=None, seed=0, shares=(0.6, 0.2, 0.2)):
    """Indices of train, val and test, {name: (n,) int64}.

    By the official lists if they lie beside the images, else by seed, stratified by class. Exact doubles
    never straddle: a group goes where its first image goes; with the official lists, training and val give
    up what test also holds, and training what val holds.
    """
    if root and (lists := official_lists(scenes, Path(root))):
        held = [set(scenes.groups[lists["test"]].tolist())]
        held.append(held[0] | set(scenes.groups[lists["val"]].tolist()))
        for name, taken in (("val", held[0]), ("train", held[1])):
            listed = lists[name].tolist()
            kept = [i for i in listed if int(scenes.groups[i]) not in taken]
            lists[name] = torch.tensor(kept, dtype=torch.int64)
        return lists
    heads, inverse = scenes.groups.unique(return_inverse=True)
    places = torch.arange(len(scenes))
    first = torch.full((len(heads),), len(scenes)).scatter_reduce(0, inverse, places, "amin")
    part = torch.empty(len(heads), dtype=torch.int64)                    # 0 train, 1 val, 2 test
    for c in range(len(scenes.classes)):
        mine = (scenes.labels[first] == c).nonzero().flatten()
        mine = mine[torch.randperm(len(mine), generator=rng(seed, c))]
        cuts = [round(len(mine) * shares[0]), round(len(mine) * (shares[0] + shares[1]))]
        for k, chunk in enumerate(mine.tensor_split(cuts)):
            part[chunk] = k
    return {name: (part[inverse] == k).nonzero().flatten() for k, name in enumerate(("train", "val", "test"))}


def official_lists(scenes, root):
    """The 60/20/20 lists of Neumann et al. 2019 (resisc45-train.txt ...) as indices, None if not there."""
    by_name = {Path(name).name: i for i, name in enumerate(scenes.names)}
    lists = {}
    for part in ("train", "val", "test"):
        places = [folder / f"resisc45-{part}.txt" for folder in (root, root.parent)]
        found = [p for p in places if p.is_file()]
        if not found:
            return None
        wanted = [Path(line).name for line in found[0].read_text().split()]
        lists[part] = torch.tensor([by_name[name] for name in wanted if name in by_name], dtype=torch.int64)
        if len(lists[part]) == 0:
            raise Problem(f"{found[0]} names no picture of {root}: "
                          "remove the list or give the data set that it belongs to")
    return lists


def subset(scenes, index, count, seed):
    """`count` images of each class out of index, by seed. Nested: those for 10 are among those for 40."""
    chosen = []
    for c, name in enumerate(scenes.classes):
        mine = index[scenes.labels[index] == c]
        if len(mine) < count:
            raise Problem(f"class {name} has {len(mine)} training images, fewer than the {count} asked for: "
                          "ask for fewer")
        chosen.append(mine[torch.randperm(len(mine), generator=rng(seed, c))[:count]])
    return torch.cat(chosen)


def picture(image):
    """(C, H, W) uint8 -> PIL; of more than three channels the first three."""
    return Image.fromarray(rearrange(image[:3].cpu(), "c h w -> h w c").numpy())


def grid(images, columns, zoom=1):
    """(N, C, H, W) uint8 as one picture of so many columns, row by row, with white lines between."""
    images = torch.nn.functional.pad(images[:, :3].cpu(), (1, 1, 1, 1), value=255)
    gap = -len(images) % columns
    images = torch.cat([images, images.new_full((gap, *images.shape[1:]), 255)])
    whole = picture(rearrange(images, "(r k) c h w -> c (r h) (k w)", k=columns))
    return whole.resize((whole.width * zoom, whole.height * zoom), Image.Resampling.NEAREST)


def save_picture(pil, path, **how):
    """A PIL picture, whole or not at all."""
    with replacing(path) as temporary:
        pil.save(temporary, **how)


# ---- drawn scenes: a stand-in for RESISC45 where there are no data

# Muted colours; each use picks one and moves it a little. A fourth number makes a colour translucent.
LAND = [(90, 108, 62), (142, 128, 88), (114, 94, 72), (66, 84, 50), (156, 146, 122), (124, 130, 76)]
WATER, SAND = [(36, 64, 80), (60, 82, 68), (64, 108, 118)], [(200, 183, 146), (174, 156, 124)]
PAVING = [(82, 82, 84), (122, 120, 116), (166, 162, 150)]
ROOFS = [(150, 96, 76), (166, 122, 98), (122, 114, 108), (94, 90, 90), (188, 180, 168), (132, 104, 86)]
CROWNS = [(54, 76, 38), (70, 88, 46), (40, 62, 40), (50, 70, 46), (90, 90, 44), (120, 84, 48), (92, 88, 68)]
CARS = [(214, 214, 210), (46, 48, 54), (130, 60, 54)]
LIDS = [(204, 204, 200), (176, 176, 172), (160, 154, 144)]
WHITE, FOAM = [(224, 220, 208)], [(238, 240, 234, 200)]
SHADE, LIT, PALE, DARK = [(10, 12, 26, 120)], [(236, 240, 190, 50)], [(160, 180, 160, 40)], [(30, 30, 10, 50)]
SQUARE = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 33)), np.sin(np.linspace(0, 2 * np.pi, 33))], 1)


class Canvas:
    """A picture at twice its final size; points (u, v) run about -1..1 along axes turned at random."""

    def __init__(self, rng, size):
        self.rng, self.image = rng, Image.new("RGB", (2 * size, 2 * size))
        self.draw = ImageDraw.Draw(self.image, "RGBA")
        turn, sun = rng.uniform(0, 2 * np.pi), CIRCLE[rng.integers(32)]
        a, b = np.cos(turn), np.sin(turn)
        self.axes = size * rng.uniform(0.75, 1.25) * np.array([(a, b), (-b, a)])
        self.origin = size * rng.uniform(0.75, 1.25, 2)
        self.shadow = rng.uniform(0.5, 1.3) * sun  # cast by one unit of height
        self.crowns = [CROWNS[i] for i in rng.integers(0, len(CROWNS), 3)]
        self.paint(4 * SQUARE, LAND)

    def paint(self, points, colours, amount=8):
        """A polygon in one of the colours."""
        *moved, together = (self.rng.standard_normal(4) * amount).tolist() if amount else (0, 0, 0, 0)
        red, green, blue, *alpha = colours[int(self.rng.random() * len(colours))]
        colour = [int(c + together + m / 3) for c, m in zip((red, green, blue), moved, strict=True)]
        points = np.asarray(points) @ self.axes + self.origin
        self.draw.polygon(points.ravel().tolist(), (*(min(max(c, 0), 255) for c in colour), *alpha))

    def solid(self, spot, outline, colours, height=0.06, top=(1, 0.5)):
        """A house, tree or tank: its shadow, its body, and a lighter top moved towards the sun."""
        off = (np.dot(spot, self.axes) + self.origin) / self.image.width - 0.5
        if abs(off).max() > 0.55 + 0.7 * outline.max():  # out of sight
            return
        shift = np.sign(self.shadow) * outline.max(0) * (1 - np.array(top))
        self.paint(spot + outline + height * self.shadow, SHADE, 0)
        self.paint(spot + outline, colours)
        self.paint(spot + outline * top - shift, LIT, 0)

    def tree(self, spot, radius):
        self.solid(spot, radius * CIRCLE[::3], self.crowns, radius, (0.75, 0.75))

    def dashes(self, start, end, count, half_width, part=0.5, colours=WHITE):
        """Marks, or cars, along the line from start to end."""
        for t in np.arange(count) / count:
            ends = np.array(start) + np.outer([t, t + part / count], np.subtract(end, start))
            self.paint(band(ends, half_width), colours)


def band(line, half_width):
    """The outline of a thick curve; its half width may vary along it."""
    along = np.gradient(line, axis=0)
    across = along[:, ::-1] * [-1, 1] / np.hypot(*along.T)[:, None] * np.reshape(half_width, (-1, 1))
    return np.concatenate([line + across, (line - across)[::-1]])


def path(rng, bend=0.0, level=0.0, angle=0.0, start=-3.0):
    """A curve (straight where bend is 0) out of the picture, along u before it is turned by the angle."""
    u = np.linspace(start, 3, 90)
    v = np.full(90, float(level))
    for k in (1, 2, 4):
        v += rng.normal(0, bend / k) * np.sin(k * rng.uniform(1, 2) * u + rng.uniform(0, 6))
    return np.stack([u, v], 1) @ [(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))]


def clutter(c, rng, rich):
    """What may lie anywhere: fields, tracks, groups of trees, buildings."""
    for _ in range(rng.poisson(0.7 * rich)):
        c.paint(rng.uniform(-1.2, 1.2, 2) + rng.uniform(0.25, 0.9, 2) * SQUARE, LAND)
    for _ in range(rng.poisson(0.3 * rich)):
        track = path(rng, 0, rng.uniform(-1, 1), rng.uniform(0, 6))
        c.paint(band(track, rng.uniform(0.01, 0.05)), PAVING + SAND)
    for _ in range(rng.poisson(1.5 * rich)):
        for spot in rng.normal(rng.uniform(-1.2, 1.2, 2), rng.uniform(0.03, 0.3), (rng.integers(1, 14), 2)):
            c.tree(spot, rng.uniform(0.02, 0.07))
    for _ in range(rng.poisson(0.8 * rich)):
        c.solid(rng.uniform(-1.2, 1.2, 2), rng.uniform(0.04, 0.16, 2) * SQUARE, ROOFS)


# The scenes: each draws the main thing of its class over the clutter.
def beach(c, rng):
    shore, beyond = path(rng, 0.16, rng.uniform(-0.4, 0.3)), [(3, 4), (-3, 4)]
    back = shore - [0, rng.uniform(0.15, 0.7)] + path(rng, 0.06) * [0, 1]
    c.paint([*back, *beyond], SAND)
    c.paint([*shore, *beyond], WATER)
    for reach in (0.06, 0.12, 0.2):  # shallow water is lighter
        c.paint(band(shore + [0, reach], reach), PALE, 0)
    for out in np.cumsum(rng.uniform(0.02, 0.15, rng.integers(1, 4))):  # breaking waves
        c.paint(band(shore + [0, out], 0.006 + abs(path(rng, 0.03)[:, 1])), FOAM)


def circular_farmland(c, rng):
    radius = rng.uniform(0.45, 0.95)
    for cell in [(0, 0), (1, 0), (0, 1), (1, 1), (-1, 0)][:rng.choice([1, 1, 2, 4, 5])]:
        middle, crops = 2.15 * radius * np.array(cell), rng.permutation(LAND).tolist()
        c.paint(middle + 1.04 * radius * SQUARE, crops[:1])
        for i, j in [(0, 32), *np.sort(rng.integers(0, 33, (rng.integers(3), 2)))]:  # sectors of other crops
            c.paint(middle + radius * np.array([(0, 0), *CIRCLE[i:j + 1]]), crops[1:])
        for r in np.linspace(0, radius, rng.integers(5, 12))[1:]:  # wheel tracks
            c.paint(band(middle + r * CIRCLE, 0.008), DARK, 0)
        c.dashes(middle, middle + radius * CIRCLE[rng.integers(32)], 1, 0.01, 1)  # the watering arm


def dense_residential(c, rng):
    plot, block, green = rng.uniform(0.3, 0.45), rng.uniform(0.38, 0.5), rng.uniform(0, 0.5)
    paving = [PAVING[rng.integers(3)]]
    for v in np.arange(-2, 3) * 2 * block:
        for u, side in [(u, side) for u in np.arange(-1.5, 1.5, plot) for side in (-0.5, 0.5)]:
            half = rng.uniform((0.32 * plot, 0.26 * block), (0.46 * plot, 0.36 * block))
            c.solid((u, v + side * block * rng.uniform(1, 1.2)), half * SQUARE, ROOFS)
            if rng.random() < green:
                c.tree((u + plot / 2, v + side * rng.uniform(0.2, 0.5)), rng.uniform(0.03, 0.07))
        c.paint(band(path(rng, 0, v), 0.06), paving, 3)
        c.dashes((-1.5, v + 0.035), (1.5, v + 0.035), rng.integers(1, 14), 0.016, 0.06, CARS)
    c.paint(band(path(rng, 0, rng.uniform(-0.6, 0.6), np.pi / 2), 0.06), paving, 3)


def forest(c, rng):
    size, gap = rng.uniform(0.12, 0.2), rng.choice([0, 0, 0.05, 0.1])
    edge, track = path(rng, 0.3, rng.choice([0.5, 0.9, 3, 3])), path(rng, 0.3)
    c.paint([*edge, (3, -4), (-3, -4)], [(30, 44, 24, 190)])
    c.paint(band(track, gap), SAND + LAND)
    for u, v in rng.uniform(-1.5, 1.5, (int(rng.uniform(2.5, 4) / size ** 2), 2)):
        if v < np.interp(u, *edge.T) and abs(v - np.interp(u, *track.T)) >= gap * 1.4:
            c.tree((u, v), size * rng.uniform(0.6, 1.3))


def intersection(c, rng):
    paving, crossing = [PAVING[rng.integers(3)]], (rng.uniform(0.7, 2.4), rng.choice([-3, -3, 0]))  # 0: a T
    roads = [(angle, start, rng.uniform(0.16, 0.28)) for angle, start in ((0, -3), crossing)]
    for kerb, colours in ((0.04, PAVING[1:]), (0, paving)):
        for angle, start, half in roads:
            c.paint(band(path(rng, 0, 0, angle, start), half + kerb), colours, 3)
    arms = [(angle + turn, half) for angle, start, half in roads for turn in ((0, np.pi) if start else (0,))]
    for angle, half in arms:
        along = np.array([np.cos(angle), np.sin(angle)])
        across = 0.85 * half * along[::-1] * [-1, 1]
        c.dashes(0.4 * along, 2.2 * along, rng.integers(6, 14), 0.015)
        c.dashes(0.32 * along - across, 0.32 * along + across, 5, 0.045)  # where people walk across
        c.dashes(0.5 * across, 2 * along + 0.5 * across, rng.integers(3, 14), 0.022, 0.05, CARS)


def river(c, rng):
    line = path(rng, rng.uniform(0.15, 0.36))
    half = rng.uniform(0.12, 0.27) * (1 + 0.35 * np.sin(rng.uniform(1, 3) * line[:, 0] + rng.uniform(0, 6)))
    c.paint(band(line, half + rng.uniform(0.01, 0.14)), LAND + SAND)
    c.paint(band(line, half), WATER)
    for i in rng.integers(0, len(line), rng.integers(0, 60)):  # trees on the banks
        bank = rng.choice([-1, 1]) * (half[i] + rng.uniform(0.03, 0.2))
        c.tree(line[i] + [0, bank], rng.uniform(0.03, 0.07))
    if rng.random() < 0.25:  # a bridge
        c.paint(band(path(rng, 0, rng.uniform(-0.7, 0.7), rng.uniform(1, 2)), 0.05), PAVING)


def runway(c, rng):
    half, end, paving = rng.uniform(0.16, 0.3), rng.choice([-3, -1, -0.6]), [PAVING[rng.integers(3)]]
    c.paint(band(path(rng), half + rng.uniform(0.15, 0.4)), LAND)
    if rng.random() < 0.5:  # a taxiway and the link to it
        c.paint(band(path(rng, 0, half + 0.4), 0.08), paving, 3)
        c.paint(band(np.array([(0.4, 0), (rng.uniform(-0.3, 0.8), half + 0.4)]), 0.07), paving, 3)
    c.paint(band(path(rng, start=end - 0.1), half), paving, 3)
    for v in (-0.9 * half, 0.9 * half):
        c.dashes((end, v), (3, v), 1, 0.014, 1)
    c.dashes((end + 0.4, 0), (3, 0), 9, 0.022)
    c.dashes((end + 0.18, -0.8 * half), (end + 0.18, 0.8 * half), 7, 0.12)  # the threshold


def storage_tank(c, rng):
    n, lid, top = rng.integers(1, 4), [LIDS[rng.integers(3)]], rng.uniform(0.8, 0.97)
    radius = rng.uniform(0.55, 0.8) / n
    pitch = radius * rng.uniform(2.2, 2.7)
    c.paint(n * pitch * 0.54 * SQUARE, PAVING + LAND + SAND)
    for cell in np.ndindex(n, n):
        if rng.random() < 0.85 or n == 1:
            c.solid((np.array(cell) - (n - 1) / 2) * pitch, radius * CIRCLE, lid, 0.4 * radius, (top, top))


SCENES = {"beach": beach, "circular_farmland": circular_farmland, "dense_residential": dense_residential,
          "forest": forest, "intersection": intersection, "river": river, "runway": runway,
          "storage_tank": storage_tank}


def noise(rng, size):
    """A natural texture: noise of four scales, the coarse the strongest; about -1..1."""
    grids = [Image.fromarray(rng.standard_normal((n, n), np.float32)) for n in (4, 11, 37, 101)]
    return sum(np.asarray(g.resize((size, size), Image.BICUBIC)) / g.width ** 0.3 for g in grids)[..., None]


def draw_scene(name, rng, size=128):
    """One RGB scene; all chance comes from `rng`."""
    canvas = Canvas(rng, size)
    clutter(canvas, rng, {"intersection": 2, "dense_residential": 0, "forest": 0}.get(name, 1))
    SCENES[name](canvas, rng)
    pixels = np.asarray(canvas.image.reduce(2), np.float32)
    ground = noise(rng, size)
    pixels *= 1 + rng.uniform(0.03, 0.09) * ground
    pixels += rng.uniform(0, 10) * ground[::-1] * (0.8, 0.2, -0.8)                   # dry and lush places
    grey = pixels.mean(2, keepdims=True)
    pixels = grey + rng.uniform(0.6, 1.1) * (pixels - grey)                          # season
    pixels = 115 + rng.uniform(0.75, 1.2) * (pixels - 110) + rng.uniform(-25, 30)    # light
    pixels += rng.uniform(0, 0.25) * (np.array([190, 198, 206]) - pixels)            # haze
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_tree(root, per_class, seed=0, size=128):
    """Draw root/<class>/<class>_001.jpg and so on, unless they are there. -> root

    Scene k follows from (seed, class, k).
    """
    wanted = [(name, k, Path(root) / name / f"{name}_{k:03d}.jpg")
              for name in SCENES for k in range(1, per_class + 1)]
    missing = [(name, k, path) for name, k, path in wanted if not path.exists()]
    for name, k, path in tqdm(missing, "drawing scenes", disable=None, leave=False):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), k])
        save_picture(draw_scene(name, rng, size), path, quality=90)
    return Path(root)


# ---- python data.py DIR: what is there

@dataclass
class Script:
    """The flags of this script."""
    data: str = flag("data/NWPU-RESISC45", "tree with a folder per class")
    size: int = flag(64, "side to which the pictures are reduced")
    draw: int = flag(0, "first draw so many scenes per class into --data")
    out: str = flag("runs/data.png", "where a sheet of examples goes")
    skip_broken: bool = flag(False, "leave out pictures that do not decode")


def main(cfg):
    """Say what there is in a tree, and show it."""
    if cfg.draw:
        draw_tree(cfg.data, cfg.draw)
    if not Path(cfg.data).is_dir():
        print(HOW_TO_GET)
        raise Problem(f"no folder {cfg.data}: get one as above, give another --data, "
                      "or draw one with --draw 100")
    scenes = read_folder(cfg.data, cfg.size, cfg.skip_broken)
    parts = split(scenes, cfg.data)
    for c, name in enumerate(scenes.classes):
        print(f"{(scenes.labels == c).sum():7} {name}")
    doubles = len(scenes) - len(scenes.groups.unique())
    print(f"{len(scenes):7} pictures of {len(scenes.classes)} classes, {doubles} of them exact doubles; "
          f"{', '.join(f'{len(index)} {part}' for part, index in parts.items())}")
    rows = torch.cat([(scenes.labels == c).nonzero().flatten()[:10] for c in range(len(scenes.classes))])
    save_picture(grid(scenes.images[rows], 10), cfg.out)
    print(f"examples: {cfg.out}")


if __name__ == "__main__":
    launch(main, Script)
