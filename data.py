"""All that touches the disk: scenes read, drawn, split and saved; and what all scripts share.

A data set is one uint8 tensor (N, C, H, W) with a label for each image. RESISC45 at 64 px is 387 MB, so it
lives on the device as it is: a batch is an index draw, and there are no workers to wait for.
"""
import argparse
import csv
import hashlib
import json
import math
import os
import re
import sys
import uuid
import zlib
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import timedelta
from functools import cached_property
from itertools import product
from multiprocessing import get_context, parent_process
from pathlib import Path
from time import sleep
from typing import get_args

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from PIL import Image, ImageDraw
from tqdm import tqdm

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"}
HOW_TO_GET = """RESISC45 (Cheng et al. 2017), 45 classes of 700 images of 256 x 256 pixels, zip of 427 MB:
https://hf.co/datasets/isaaccorley/resisc45/resolve/883edc0eee77b2c84225472f10f126e3ed83fa6e/NWPU-RESISC45.zip
md5 75206b2e16446591afa88e2628744886
Unpack it to data/NWPU-RESISC45, one folder per class, and if you like put resisc45-train.txt, -val.txt and
-test.txt (the official 60/20/20 lists, same address) into it. Any other tree with a folder per class does
as well."""


# ---- what all scripts share

class Problem(Exception):
    """Something that the user can mend. Its text is one line: what is wrong, where, what to do."""


def flag(default, help, bare=False):
    """A field of a script's Config, which is also its --flag, or if bare an argument without a name."""
    return field(default=default, metadata={"help": help, "bare": bare})


def numbers(text):
    """"10,40" -> (10, 40)."""
    return tuple(int(part) for part in text.split(","))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")

    def exit(self, status=0, message=None):
        if int(os.environ.get("RANK", 0)):
            sleep(2)                 # process 0 most likely says the same, and torchrun then ends this one
        super().exit(status, message)


def launch(main, config, argv=None, several=False):
    """Run a script, with one argument per field of its Config; with `several`, torchrun may run it too.

    A mistake of the user is one line on stderr and exit code 2.
    """
    parser = _Parser(description=sys.modules[main.__module__].__doc__.split("\n\n")[0], allow_abbrev=False,
                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(config):
        kind = (dict(action=argparse.BooleanOptionalAction) if isinstance(f.default, bool) else
                dict(type=numbers, metavar="N,N") if isinstance(f.default, tuple) else
                dict(type=get_args(f.type)[0]) if f.default is None else                       # float | None
                dict(type=type(f.default)))
        name = "--" + f.name.replace("_", "-")
        if f.metadata["bare"]:
            name, kind["nargs"] = f.name, "?"
        parser.add_argument(name, default=f.default, help=f.metadata["help"], **kind)
    arguments = vars(parser.parse_args(argv))
    try:
        settings = config(**arguments)                                 # its __post_init__ looks at the values
    except ValueError as error:
        parser.error(error)
    try:
        with processes(several):
            return main(settings)
    except Problem as problem:
        parser.exit(2, f"{parser.prog}: {problem}\n")


def pick_device():
    """The fastest device that this machine has (with several processes, "cuda" is the process's own)."""
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
    return (images / 127.5).sub_(1)


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
    saved = load_checkpoint(path, kind) if path and Path(path).exists() else None
    agree((saved and saved["step"], repr(identity)), f"the processes do not see the same images, or the same "
          f"{path}: --data and --out must be folders that all machines share")
    if not saved:
        return None
    if differ := [name for name in identity if saved.get(name) != identity[name]]:
        old, new = saved.get("config", {}), identity["config"]
        what = ", ".join(k for k in new if old.get(k) != new[k]) if differ[0] == "config" else differ[0]
        raise Problem(f"{path} is of a run with another {what}: give another --out, or remove it")
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


# ---- several processes: torchrun --nproc-per-node N SCRIPT.py ...
# All of them run the whole script and make the same draws. Each computes its part of every batch, sums over
# the processes bring the parts together, and process 0 alone writes and talks. Run without torchrun, there
# is one process, and all of this does nothing.

@contextmanager
def processes(several=True):
    """Join the processes that torchrun started, if it did. GPUs talk by nccl, CPUs by gloo.

    After an error this process simply ends: torchrun then ends the others, which may be waiting for it.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    local, device = int(os.environ["LOCAL_RANK"]), None
    if not several:
        raise Problem("runs in one process: start it with python, not with torchrun")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise Problem(f"no GPU for process {local}: --nproc-per-node {torch.cuda.device_count()} at most")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # A process may well wait while the first one reads a large tree, or draws or saves many pictures.
    dist.init_process_group("nccl" if device else "gloo", timeout=timedelta(hours=2), device_id=device)
    if rank():
        sys.stdout = open(os.devnull, "w")
    yield
    dist.barrier()
    dist.destroy_process_group()


def rank():
    """Which of the processes this one is: 0 writes and talks."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(n):
    """This process's part of n images, as a slice. The parts differ by one image at most."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return slice(n * rank() // world, n * (rank() + 1) // world)


def total(x):
    """x, summed in place over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def sum_gradients(model):
    """Add up the gradients of all processes, in one message.

    Each of them is of the sum over that process's images, divided by the images of all: so the sum is the
    gradient of the whole batch, even if it does not divide evenly. DistributedDataParallel takes means, and
    hides the sending behind the backward pass; that pays between machines, and costs a wrapped model.
    """
    if dist.is_initialized():
        gradients = [p.grad for p in model.parameters()]
        summed = total(torch.cat([g.flatten() for g in gradients])).split([g.numel() for g in gradients])
        for g, s in zip(gradients, summed, strict=True):
            g.copy_(s.view_as(g))


def agree(what, hint):
    """Raise Problem unless all processes have the same."""
    if dist.is_initialized():
        said = [None] * dist.get_world_size()
        dist.all_gather_object(said, what)
        if any(other != what for other in said):
            raise Problem(hint)


@contextmanager
def first_alone():
    """The first process of a machine does this block (or function) before the others, who find its files."""
    others_wait = dist.is_initialized() and int(os.environ["LOCAL_RANK"]) > 0
    if others_wait:
        dist.barrier()
    yield
    if dist.is_initialized() and not others_wait:
        dist.barrier()


def progress(items, title, *args, **how):
    """Iterate with a progress bar on a terminal."""
    quiet = rank() or parent_process()                   # other processes, ours or torchrun's, do not talk
    return tqdm(items, title, *args, disable=True if quiet else None, leave=False, **how)


# ---- several tasks at a time: the small networks of a CPU comparison gain nothing from a second core each

def jobs(asked):
    """How many tasks to run at a time if so many are asked for: 0 stands for a core each, or 1 on a GPU."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return asked or (allowed if pick_device().type == "cpu" else 1)


class Inline:
    """The pool of one: a call is done at once, in this process."""

    def submit(self, function, *args):
        """Call function(*args). -> a Future that is done; an exception is raised here."""
        future = Future()
        future.set_result(function(*args))
        return future


def _enter(enter, *args):
    """Prepare a process of a pool: it computes in one thread, and is silent."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    enter(*args)


@contextmanager
def pool(jobs, enter, *args):
    """Have `submit(function, *args) -> Future` done by `jobs` processes, each after a call of enter(*args).

    One job is this process itself, which must have entered. On a CPU every task computes in one thread,
    however many jobs there are, so that results do not depend on them. Raises Problem if a process dies.
    """
    threads = torch.get_num_threads()
    try:
        if pick_device().type == "cpu":
            torch.set_num_threads(1)
        if jobs == 1:
            yield Inline()
        else:
            with ProcessPoolExecutor(jobs, get_context("spawn"), _enter, (enter, *args)) as processes:
                yield processes
    except BrokenProcessPool:
        raise Problem(f"one of {jobs} processes died, perhaps for want of memory: start again with fewer "
                      "--jobs; what is done is kept") from None
    finally:
        torch.set_num_threads(threads)


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
        """The scenes at these places, index (M,) int64, or where a mask (N,) bool is true."""
        if index.dtype == torch.bool:
            index = index.nonzero().flatten()
        names = [self.names[i] for i in index.tolist()]
        return Scenes(self.images[index], self.labels[index], self.classes, names, self.groups[index])

    @cached_property
    def digest(self):
        """A short name for exactly these names, labels and pixels, in this order (read once)."""
        what = repr((self.names, self.labels.tolist(), self.classes, self.images.shape)).encode()
        told = hashlib.sha256(what)
        told.update(self.images.contiguous().numpy())                    # gigabytes, perhaps: no copy of them
        return told.hexdigest()[:12]


def decode(path, size):
    """One picture as (3, size, size) uint8: the central square, reduced with antialiasing.

    Grey, palette and 16 bits become RGB.
    """
    with Image.open(path) as pil:
        if pil.mode == "F":
            raise ValueError("pixels are fractions, of which nobody says where white is: save 8 or 16 bits")
        if pil.mode.startswith("I"):                             # 16 bits: 65535 = 257 * 255
            grey = np.asarray(pil, dtype=np.float32) / 257
            pil = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))     # as the PNG standard, 13.12
        # A JPEG decoder can halve for free; twice the size is left to filter.
        pil.draft("RGB", (2 * size, 2 * size))
        if pil.mode == "P":
            pil = pil.convert("RGBA")                            # a palette may hold a transparent colour
        w, h = pil.size
        side = min(w, h)
        box = ((w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2)
        pil = pil.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)
        return rearrange(np.array(pil), "h w c -> c h w")


def read(root, size, skip_broken=False, cache="runs/cache"):
    """The scenes of a tree: the buildings of an xBD tree by damage, or a folder per class."""
    return read_xbd(root, size, cache=cache) if is_xbd(root) else read_folder(root, size, skip_broken, cache)


@first_alone()
def cached(make, root, cache, how, stats):
    """What make() returns, from a file in the folder `cache` if it was made before with the same `how`.

    stats are names, sizes and times of the tree's files: a cache that no longer fits them is made anew.
    """
    place = hashlib.sha256(f"{root.resolve()} {how}".encode()).hexdigest()[:12]
    tree = hashlib.sha256(repr(stats).encode()).hexdigest()
    store = Path(cache) / f"{root.resolve().name}-{how['size']}-{place}.pt"
    if store.exists():
        content = torch.load(store, mmap=True, weights_only=True)
        if content.pop("tree") == tree:
            return content
        print(f"{root} has changed since it was cached: reading it again", file=sys.stderr)
    content = make()
    with replacing(store) as temporary:
        torch.save({**content, "tree": tree}, temporary)
    return content


def read_folder(root, size, skip_broken=False, cache="runs/cache"):
    """A tree with a folder per class, decoded once and cached."""
    root = Path(root)
    files = find_pictures(root)
    stats = [(p.relative_to(root).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    how = dict(size=size, skip_broken=skip_broken)
    return Scenes(**cached(lambda: decode_tree(root, files, **how), root, cache, how, stats))


def decode_tree(root, files, size, skip_broken):
    """What Scenes holds of these files."""
    images, broken = decode_all(files, size, f"reading {root.name}")
    if broken and not skip_broken:
        names = ", ".join(str(files[i]) for i in sorted(broken)[:3]) + " ..." * (len(broken) > 3)
        raise Problem(f"{len(broken)} of {len(files)} pictures do not decode ({names}): "
                      "mend them, or give --skip-broken")
    for i, error in sorted(broken.items()):
        print(f"skipped {files[i]}: {error}", file=sys.stderr)
    keep = [i for i in range(len(files)) if i not in broken]
    classes = sorted({files[i].parent.name for i in keep})
    if len(classes) < 2:
        raise Problem(f"{root}: fewer than two classes have pictures that decode: mend or replace them")
    first, groups = {}, []                                               # exact doubles form a group
    for i in keep:
        groups.append(first.setdefault(images[i].numpy().tobytes(), i))
    return dict(images=images[keep], labels=torch.tensor([classes.index(files[i].parent.name) for i in keep]),
                classes=classes, names=[files[i].relative_to(root).as_posix() for i in keep],
                groups=torch.tensor(groups))


def decode_all(files, size, title):
    """Decode on all cores: images (N, 3, size, size) uint8, and what failed, {index: error}."""
    images, broken = torch.empty(len(files), 3, size, size, dtype=torch.uint8), {}

    def read(i):
        try:
            images[i] = torch.from_numpy(decode(files[i], size))
        except Exception as error:                                       # Pillow raises a dozen kinds
            broken[i] = error

    with ThreadPoolExecutor(os.cpu_count()) as pool:              # Pillow lets go of the GIL while it decodes
        list(progress(pool.map(read, range(len(files))), title, len(files)))
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


def split(scenes, root=None, seed=0, shares=(0.6, 0.2, 0.2), hold_out=""):
    """Indices of train, val and test, {name: (n,) int64}.

    By the official lists if they lie beside the images, else by seed, stratified by class. Exact doubles
    never straddle: a group goes where its first image goes; with the official lists, training and val give
    up what test also holds, and training what val holds. Buildings of an xBD tree: see split_tiles, which
    alone can hold out an event. Raises Problem if a part would be empty.
    """
    if root and is_xbd(root):
        parts = split_tiles(scenes, hold_out, seed, shares)
    elif hold_out:
        raise Problem(f"--hold-out {hold_out}: only an xBD tree has events to hold out, {root} is none")
    elif root and (lists := official_lists(scenes, Path(root))):
        held = [set(scenes.groups[lists["test"]].tolist())]
        held.append(held[0] | set(scenes.groups[lists["val"]].tolist()))
        for name, taken in (("val", held[0]), ("train", held[1])):
            listed = lists[name].tolist()
            kept = [i for i in listed if int(scenes.groups[i]) not in taken]
            lists[name] = torch.tensor(kept, dtype=torch.int64)
        return lists
    else:
        parts = split_by_seed(scenes, seed, shares)
    if short := [name for name, index in parts.items() if len(index) == 0]:
        raise Problem(f"too few images for a {' and a '.join(short)} split ({len(scenes)} in all): "
                      "five per class will do")
    return parts


def split_by_seed(scenes, seed, shares):
    """The same for a tree without lists: the groups of each class are shuffled, then cut by the shares."""
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


def split_tiles(scenes, hold_out, seed, shares):
    """The same for buildings: a tile is never cut, since neighbours look alike and suffer alike.

    Test is the event held out (Problem if there is none of that name), else the official test split, else
    some tiles by seed; val is some of the other tiles.
    """
    events = [event_of(name) for name in scenes.names]
    if hold_out and hold_out not in events:
        raise Problem(f"--hold-out {hold_out}: no such event; there are {', '.join(sorted(set(events)))}")
    test = torch.tensor([event == hold_out if hold_out else name.startswith("test/")
                         for event, name in zip(events, scenes.names, strict=True)])
    taken = scenes.groups[test].unique()
    tiles = scenes.groups.unique()
    tiles = tiles[~torch.isin(tiles, taken)]
    tiles = tiles[torch.randperm(len(tiles), generator=rng(seed))]
    shares = shares[:2] if len(taken) else shares                        # the rest is to be divided
    cuts = [round(len(tiles) * sum(shares[:k]) / sum(shares)) for k in range(1, len(shares))]
    train, val, *more = tiles.tensor_split(cuts)
    cut = dict(train=train, val=val, test=torch.cat([taken, *more]))
    return {part: torch.isin(scenes.groups, mine).nonzero().flatten() for part, mine in cut.items()}


def event_of(name):
    """The disaster of a building: "train/joplin-tornado_00000050/<uid>" -> "joplin-tornado"."""
    return name.split("/")[1].rpartition("_")[0]


def official_lists(scenes, root):
    """The 60/20/20 lists of Neumann et al. 2019 (resisc45-train.txt ...) as indices, None if not there."""
    by_name = {Path(name).name: i for i, name in enumerate(scenes.names)}
    lists = {}
    for part in ("train", "val", "test"):
        path = root / f"resisc45-{part}.txt"
        if not path.is_file():
            return None
        wanted = [Path(line).name for line in path.read_text().split()]
        lists[part] = torch.tensor([by_name[name] for name in wanted if name in by_name], dtype=torch.int64)
        if len(lists[part]) == 0:
            raise Problem(f"{path} names no picture of {root}: "
                          "remove the list or give the data set that it belongs to")
    return lists


def subset(scenes, index, count, seed):
    """`count` images of each class (0: all) out of index, by seed; those for 10 are among those for 40."""
    chosen = []
    for c, name in enumerate(scenes.classes):
        mine = index[scenes.labels[index] == c]
        if len(mine) < count:
            raise Problem(f"class {name} has {len(mine)} training images, fewer than the {count} asked for: "
                          "ask for fewer")
        chosen.append(mine[torch.randperm(len(mine), generator=rng(seed, c))[:count or None]])
    return torch.cat(chosen)


def some_tiles(scenes, index, count, seed):
    """The buildings of `count` tiles out of index, by seed, nested as above; of all tiles if count is 0."""
    tiles = scenes.groups[index].unique()
    if count > len(tiles):
        raise Problem(f"{count} training tiles asked for, of {len(tiles)}: ask for fewer, or for all (0)")
    some = tiles[torch.randperm(len(tiles), generator=rng(seed))][:count or None]
    chosen = index[torch.isin(scenes.groups[index], some)]
    if absent := set(range(len(scenes.classes))) - set(scenes.labels[chosen].tolist()):
        names = ", ".join(scenes.classes[c] for c in sorted(absent))
        raise Problem(f"no building is {names} in {len(some)} training tiles: ask for more tiles, or hold "
                      "out another event")
    return chosen


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


# ---- xBD: buildings before and after a disaster (Gupta et al. 2019, arXiv 1911.09296)

SPLITS = ("train", "tier3", "test", "hold")
DAMAGE = ["no-damage", "minor-damage", "major-damage", "destroyed"]
UNKNOWN = "un-classified"                                                # under a cloud, say: of no class


def is_xbd(root):
    """Does this folder look like an xBD tree: a split with images/ and labels/ in it?"""
    return any((Path(root) / s / "images").is_dir() and (Path(root) / s / "labels").is_dir() for s in SPLITS)


def find_tiles(root):
    """The files of each tile: {"train/joplin-tornado_00000050": {"post.png": path, "pre.json": path}}."""
    tiles = {}
    for folder in [Path(root) / s / part for s in SPLITS for part in ("images", "labels")]:
        for path in folder.iterdir() if folder.is_dir() else ():
            if found := re.fullmatch(r"([^.].*_\d+)_(pre|post)_disaster\.(png|json)", path.name):
                tile, time, kind = found.groups()
                tiles.setdefault(f"{folder.parent.name}/{tile}", {})[f"{time}.{kind}"] = path
    return dict(sorted(tiles.items()))


def find_gaps(tiles, pre):
    """Which tiles cannot be read: {what is wrong: [tile, ...]}, and the same in words."""
    gaps = {}
    for tile, files in tiles.items():
        if "post.json" not in files and {"pre.png", "post.png"} & files.keys():
            gaps.setdefault("pictures without labels", []).append(tile)
        elif "post.png" not in files:
            gaps.setdefault("labels without pictures", []).append(tile)
        elif pre and "pre.png" not in files:
            gaps.setdefault("no picture from before the disaster", []).append(tile)
    told = [f"{what}: {len(names)} ({', '.join(names[:3])}{' ...' * (len(names) > 3)})"
            for what, names in gaps.items()]
    return gaps, "; ".join(told)


def wkt_polygon(text):
    """"POLYGON ((x y, ...), (x y, ...))" -> its rings, (n, 2) float64: the outline, then the holes.

    Raises Problem if it is anything else.
    """
    found = re.fullmatch(r"\s*POLYGON\s*\(\s*\((.*)\)\s*\)\s*", str(text))
    try:
        rings = [np.array([[float(v) for v in point.split()] for point in ring.split(",")])
                 for ring in re.split(r"\)\s*,\s*\(", found[1])]
        if all(ring.shape[1] == 2 and np.isfinite(ring).all() for ring in rings):
            return rings
    except (TypeError, ValueError):                                      # no match; no numbers; a ragged list
        pass
    raise Problem(f"{str(text)[:50]!r} is no polygon in WKT: unpack its file again")


def read_label(path):
    """A label file -> its polygons [(uid, subtype, rings)], the type of the disaster, (width, height).

    Points off the tile are moved to its edge. Raises Problem if the file is broken. metadata.gsd is that of
    another band than the pictures': lengths are in pixels everywhere.
    """
    try:
        content = json.loads(path.read_bytes())
        about, polygons = content["metadata"], []
        extent = about["width"], about["height"]
        for p in content["features"]["xy"]:
            uid, subtype = p["properties"]["uid"], p["properties"].get("subtype")
            if subtype not in (*DAMAGE, UNKNOWN) and "_post_" in path.name:
                raise ValueError(f"no subtype {subtype!r} is known")
            polygons.append((uid, subtype, [ring.clip(0, extent) for ring in wkt_polygon(p["wkt"])]))
        return polygons, about["disaster_type"], extent
    except (ValueError, KeyError, TypeError, Problem) as error:
        raise Problem(f"{path} is not an xBD label ({error!r}): unpack it again") from None


def area(rings):
    """Square pixels within the outline and outside of the holes (shoelace formula)."""
    sizes = [abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2 for x, y in (ring.T for ring in rings)]
    return sizes[0] - sum(sizes[1:])


def usable(polygons, min_area):
    """The polygons that are buildings with a damage class, and large enough."""
    return [(uid, subtype, rings) for uid, subtype, rings in polygons
            if subtype in DAMAGE and area(rings) >= min_area]


def draw_mask(rings, box, size):
    """Return 255 where a pixel's centre is in the building, else 0: (size, size, 1) uint8.

    rings [(n, 2)]: outline and holes; box: a square (left, top, right, bottom). Even-odd rule: a point is
    inside if the line from the left edge to it crosses the rings an odd number of times. (Pillow's polygon
    draws the outline too: even at four times the size, a house 12 pixels wide gains 4 to 8 % in area.)
    """
    crossed, centres = np.zeros((size, size + 1), dtype=int), np.arange(size) + 0.5
    for ring in rings:
        x, y = ((ring - box[:2]) * size / (box[2] - box[0])).T
        to_x, to_y = np.roll(x, -1), np.roll(y, -1)
        side, row = ((y[:, None] <= centres) != (to_y[:, None] <= centres)).nonzero()    # meets this row
        slope = (to_x - x)[side] / (to_y - y)[side]
        at = x[side] + (centres[row] - y[side]) * slope
        np.add.at(crossed, (row, np.ceil(at - 0.5).clip(0, size).astype(int)), 1)       # first centre beyond
    inside = crossed[:, :size].cumsum(1) % 2
    return (255 * inside).astype(np.uint8)[..., None]


def cut_tile(files, images, pre, mask, pad, min_side, min_area):
    """Fill images (n, C, size, size) with the n usable buildings of a tile.

    Raises Problem if a picture is broken.
    """
    if not len(images):                                              # many tiles are empty: nothing to decode
        return
    polygons, _, extent = read_label(files["post.json"])
    polygons, size = [rings for _, _, rings in usable(polygons, min_area)], images.shape[-1]
    low, high = (np.array([edge(rings[0], 0) for rings in polygons]) for edge in (np.min, np.max))
    side = (high - low).max(1, keepdims=True) * (1 + 2 * pad)
    middle, half = (low + high) / 2, side.clip(min_side) / 2
    boxes = np.concatenate([middle - half, middle + half], 1)
    margin = 1 + math.ceil(max(0, -boxes.min(), (boxes[:, 2:] - extent).max()))
    layers = []
    for path in [files[f"{time}.png"] for time in ("post", "pre")[:1 + pre]]:
        try:
            with Image.open(path) as pil:
                pixels = np.asarray(pil.convert("RGB"))
        except Exception as error:                                       # Pillow raises a dozen kinds
            raise Problem(f"{path} does not decode ({error}): unpack it again, or remove the tile") from None
        if pixels.shape[1::-1] != extent:
            raise Problem(f"{path} has {pixels.shape[1::-1]} pixels, its label says {extent}: "
                          "give the original picture")
        # Mirrored beyond its edges, so that a building on the edge is in the middle of its crop as well.
        tile = Image.fromarray(np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), "reflect"))
        layers.append([tile.resize((size, size), Image.Resampling.BICUBIC, box=box)
                       for box in (boxes + margin).tolist()])
    if mask:
        layers.append([draw_mask(rings, box, size) for rings, box in zip(polygons, boxes, strict=True)])
    for image, *parts in zip(images, *layers, strict=True):
        image.copy_(torch.from_numpy(rearrange(np.concatenate(parts, 2), "h w c -> c h w")))


def read_tree(tiles, size, label, min_area, **how):
    """Two passes over tiles that lack nothing -> what Scenes holds, and what polygons are left out.

    The labels tell how many buildings there are, so that the tensor is made once; then each thread holds one
    tile at a time: the memory is that of the crops.
    """
    names, answers, groups, ends, dropped, places = [], [], [], [], Counter(), {}
    for tile, files in progress(tiles.items(), "counting buildings"):
        polygons, kind, _ = read_label(files["post.json"])
        found = usable(polygons, min_area)
        names += [f"{tile}/{uid}" for uid, _, _ in found]
        answers += [dict(damage=subtype, type=kind)[label] for _, subtype, _ in found]
        groups += [places.setdefault(tile.split("/")[1], len(places))] * len(found)
        ends.append(len(names))
        unknown = sum(subtype == UNKNOWN for _, subtype, _ in polygons)
        dropped += Counter({UNKNOWN: unknown, "too small": len(polygons) - len(found) - unknown})
    left_out = ", ".join(f"{n} {why}" for why, n in dropped.items()) or "none"
    if not names:
        raise Problem(f"no building with a damage class in {len(tiles)} tiles, {next(iter(tiles))} ... "
                      f"(polygons left out: {left_out}): give more tiles")
    images = torch.empty(len(names), 3 + 3 * how["pre"] + how["mask"], size, size, dtype=torch.uint8)
    jobs = list(zip(tiles.values(), images.tensor_split(ends[:-1]), strict=True))
    with ThreadPoolExecutor(os.cpu_count()) as pool:              # Pillow lets go of the GIL while it decodes
        cutting = pool.map(lambda job: cut_tile(*job, min_area=min_area, **how), jobs)
        list(progress(cutting, "cutting buildings", len(jobs)))
    classes = DAMAGE if label == "damage" else sorted(set(answers))
    return dict(images=images, labels=torch.tensor([classes.index(a) for a in answers]), classes=classes,
                names=names, groups=torch.tensor(groups)), left_out


def read_xbd(root, size, label="damage", pre=False, mask=False, pad=0.5, min_side=32, min_area=64,
             cache="runs/cache"):
    """A square crop around each classified building, post-disaster RGB, as Scenes grouped by tile; cached.

    With pre the same square of the pre-disaster picture follows, with mask the building's own mask: C is 3,
    4, 6 or 7. The square's side is (1 + 2 pad) times the building's longer one, at least min_side pixels of
    the tile. label: "damage" (4 classes), or "type", that of the disaster.
    """
    root, tiles = Path(root), find_tiles(root)
    how = dict(size=size, label=label, pre=pre, mask=mask, pad=pad, min_side=min_side, min_area=min_area)
    stats = [(tile, name, path.stat().st_size, path.stat().st_mtime_ns)
             for tile, files in tiles.items() for name, path in sorted(files.items())]

    def make():
        gaps, told = find_gaps(tiles, pre)
        lost = {tile for names in gaps.values() for tile in names}
        whole = {tile: files for tile, files in tiles.items() if tile not in lost}
        if not whole:
            raise Problem(f"{root}: no tile has both picture and label ({told or 'there is none at all'}): "
                          "unpack images and labels of the same split side by side")
        content, left_out = read_tree(whole, **how)
        summary = (f"{root.name}: {len(content['names'])} buildings of {len(whole)} tiles; "
                   f"polygons left out: {left_out}; tiles left out: {told or 'none'}")
        return {**content, "summary": summary}

    content = cached(make, root, cache, how, stats)
    print(content.pop("summary"))
    return Scenes(**content)


def survey_xbd(root):
    """What there is in an xBD tree, readable or not: counts {...}, and the lines that tell them."""
    tiles, polygons, events = find_tiles(root), {}, {}
    for tile, files in progress(tiles.items(), "reading labels"):
        event = events.setdefault(tile.split("/")[1].rpartition("_")[0], Counter())
        event["tiles"] += 1
        for name in sorted({"pre.json", "post.json"} & files.keys()):
            found, _, _ = read_label(files[name])
            polygons[files[name].name] = len(found)
            event.update("before" if name == "pre.json" else subtype for _, subtype, _ in found)
    gaps, told = find_gaps(tiles, pre=True)
    alone = [tiles[tile] for tile in gaps.get("pictures without labels", [])]
    pairs = sum({"pre.png", "post.png"} <= files.keys() for files in alone)
    columns = ["tiles", "before", *DAMAGE, UNKNOWN]
    rows = [*sorted(events.items()), ("all", sum(events.values(), Counter()))]
    lines = ["".join(f"{column:>14}" for column in columns) + "  event"]
    lines += ["".join(f"{count[column]:14}" for column in columns) + f"  {event}" for event, count in rows]
    lines += [f"{len(polygons)} label files with {sum(polygons.values())} polygons; "
              f"{pairs} pairs of pictures without labels", f"missing: {told or 'nothing'}"]
    return dict(tiles=len(tiles), polygons=polygons, events=events, pairs=pairs, gaps=gaps), lines


# ---- drawn pictures: a stand-in for RESISC45 and xBD where there are no data

# Muted colours, in families: each use picks one and shifts it a little. A fourth number is its opacity.
LAND = [(90, 108, 62), (142, 128, 88), (114, 94, 72), (66, 84, 50), (156, 146, 122), (124, 130, 76)]
WATER, FOAM = [(36, 64, 80), (60, 82, 68), (64, 108, 118)], [(238, 240, 234, 200)]
SAND, PAVING = [(200, 183, 146), (180, 162, 128)], [(82, 82, 84), (122, 120, 116), (166, 162, 150)]
ROOFS = [(150, 96, 76), (166, 122, 98), (122, 114, 108), (94, 90, 90), (188, 180, 168)]
LIDS, MARKS = [(204, 204, 200), (176, 176, 172), (160, 154, 144)], [(224, 220, 208)]
CROWNS, CARS = [(54, 76, 38), (70, 88, 46), (90, 90, 44)], [(214, 214, 210), (46, 48, 54), (130, 60, 54)]
SHADE, LIT = [(10, 12, 26, 120)], [(236, 240, 190, 50)]
SQUARE = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 33)), np.sin(np.linspace(0, 2 * np.pi, 33))], 1)


def rotation(angle):
    """Return the (2, 2) matrix that turns points (n, 2) by an angle in radians: points @ rotation(angle)."""
    return np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])


def curve(dice, bend=0.0, level=0.0, angle=0.0, start=-3.0):
    """Draw a line (90, 2) from u = start out of the picture, about v = level, then turned by the angle."""
    u = np.linspace(start, 3, 90)
    waves = [dice.normal(0, bend / k) * np.sin(k * dice.uniform(1, 2) * u + dice.uniform(0, 6))
             for k in (1, 2, 4)]
    return np.stack([u, level + sum(waves)], 1) @ rotation(angle)


class Canvas:
    """A picture of some land, at twice its final size. All chance comes from dice, a numpy Generator.

    Points (u, v), about -1..1, are on axes turned at random: points @ axes + origin are pixels of the image.
    """

    def __init__(self, dice, size, land):
        self.dice = dice
        self.image = Image.new("RGB", (2 * size, 2 * size))
        self.pen = ImageDraw.Draw(self.image, "RGBA")
        self.axes = size * dice.uniform(0.75, 1.25) * rotation(dice.uniform(0, 2 * np.pi))
        self.origin = size * dice.uniform(0.75, 1.25, 2)
        self.shadow = dice.uniform(0.5, 1.3) * CIRCLE[dice.integers(32)]         # cast by one unit of height
        noise = [Image.fromarray(dice.standard_normal((n, n), np.float32)) for n in (4, 11, 37, 101)]
        self.texture = sum(np.asarray(grid.resize((size, size), Image.BICUBIC)) / grid.width ** 0.3
                           for grid in noise)                                    # the coarsest is strongest
        self.paint(4 * SQUARE, land)

    def paint(self, outline, colours, vary=8):
        """Fill a polygon (n, 2) with one of the colours, whose brightness varies by so many grey levels."""
        red, green, blue, *opacity = colours[self.dice.integers(len(colours))]
        shift = vary * (self.dice.standard_normal() + self.dice.standard_normal(3) / 3)
        colour = (shift + (red, green, blue)).clip(0, 255).astype(int).tolist()
        points = np.asarray(outline) @ self.axes + self.origin
        self.pen.polygon(points.ravel().tolist(), (*colour, *opacity))

    def strip(self, line, half_width, colours):
        """Paint a line (n, 2) so thick; half_width, a number or (n,), may vary along it."""
        along = np.gradient(line, axis=0)
        across = along[:, ::-1] * [-1, 1] / np.hypot(*along.T)[:, None]
        side = across * np.reshape(half_width, (-1, 1))
        self.paint(np.concatenate([line + side, (line - side)[::-1]]), colours)

    def dashes(self, start, end, count, half_width, colours=MARKS, part=0.5):
        """Paint lane marks, or cars, on the way from start to end: part of it is covered."""
        step = np.subtract(end, start) / count
        for k in range(count):
            self.strip(start + np.outer([k, k + part], step), half_width, colours)

    def solid(self, spot, outline, colours, height=0.06):
        """Paint a house, tree or tank: its shadow, its body, and the part of its top that faces the sun."""
        self.paint(spot + outline + height * self.shadow, SHADE, 0)
        self.paint(spot + outline, colours)
        self.paint(spot + 0.7 * outline - 0.3 * np.sign(self.shadow) * outline.max(0), LIT, 0)

    def photograph(self):
        """Return the picture at its final size, with texture, under some light and haze: PIL RGB."""
        pixels = np.asarray(self.image.reduce(2), np.float32)
        pixels *= 1 + self.dice.uniform(0.03, 0.09) * self.texture[..., None]
        pixels = 115 + self.dice.uniform(0.75, 1.2) * (pixels - 112) + self.dice.uniform(-22, 22)    # light
        pixels += self.dice.uniform(0, 0.25) * (np.array([190, 198, 206]) - pixels)                   # haze
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def clutter(c, dice, amount):
    """Paint what may lie anywhere: fields, houses, groups of trees."""
    for _ in range(dice.poisson(amount)):
        c.paint(dice.uniform(-1.2, 1.2, 2) + dice.uniform(0.25, 0.9, 2) * SQUARE, LAND)
        c.solid(dice.uniform(-1.2, 1.2, 2), dice.uniform(0.04, 0.16, 2) * SQUARE, ROOFS)
        for spot in dice.normal(dice.uniform(-1.2, 1.2, 2), 0.2, (dice.integers(1, 14), 2)):
            c.solid(spot, dice.uniform(0.02, 0.07) * CIRCLE[::3], CROWNS)


def beach(c, dice):
    """Paint sand, water, and the waves that break."""
    shore, sea = curve(dice, 0.16, dice.uniform(-0.4, 0.3)), [(3, 4), (-3, 4)]
    c.paint([*(shore - [0, dice.uniform(0.15, 0.7)]), *sea], SAND)
    c.paint([*shore, *sea], WATER)
    for reach in np.cumsum(dice.uniform(0.03, 0.15, dice.integers(1, 4))):
        c.strip(shore + [0, reach], dice.uniform(0.01, 0.03), FOAM)


def circular_farmland(c, dice):
    """Paint round fields, each with its watering arm, on square ones."""
    radius = dice.uniform(0.45, 0.95)
    for cell in [(0, 0), (1, 0), (0, 1), (1, 1)][:dice.choice([1, 1, 2, 4])]:
        middle = 2.15 * radius * np.array(cell)
        rim = middle + radius * CIRCLE
        c.paint(middle + 1.04 * radius * SQUARE, LAND)
        c.paint(rim, LAND)
        c.paint([middle, *rim[:dice.integers(2, 33)]], LAND)                     # a sector of another crop
        c.dashes(middle, rim[dice.integers(32)], 1, 0.012, part=1)


def dense_residential(c, dice):
    """Paint rows of houses along parallel streets."""
    plot, block = dice.uniform(0.3, 0.45), dice.uniform(0.38, 0.5)
    for v in 2 * block * np.arange(-2, 3):
        c.strip(curve(dice, level=v), 0.06, PAVING)
        for u, side in product(np.arange(-1.5, 1.5, plot), (-0.55, 0.55)):
            half = dice.uniform((0.3 * plot, 0.25 * block), (0.46 * plot, 0.36 * block))
            c.solid((u, v + side * block), half * SQUARE, ROOFS)


def forest(c, dice):
    """Paint crowns beside crowns, perhaps up to an edge."""
    size, edge = dice.uniform(0.12, 0.2), curve(dice, 0.3, dice.choice([0.5, 0.9, 3]))
    c.paint([*edge, (3, -4), (-3, -4)], [(30, 44, 24, 190)])
    for u, v in dice.uniform(-1.5, 1.5, (int(3 / size ** 2), 2)):
        if v < np.interp(u, *edge.T):
            c.solid((u, v), size * dice.uniform(0.6, 1.3) * CIRCLE[::3], CROWNS, size)


def intersection(c, dice):
    """Paint two roads that cross, or a T, with lane marks and cars."""
    half, paving = dice.uniform(0.16, 0.28), [PAVING[dice.integers(3)]]
    turn, start = dice.uniform(0.7, 2.4), dice.choice([-3, -3, 0])               # 0: a T
    roads = [curve(dice), curve(dice, angle=turn, start=start)]
    for kerb, colours in ((0.04, PAVING[1:]), (0, paving)):
        for road in roads:
            c.strip(road, half + kerb, colours)
    for road, angle in zip(roads, (0, turn), strict=True):
        lane = half / 2 * rotation(angle)[1]
        c.dashes(road[0], road[-1], 24, 0.015)
        c.dashes(road[0] + lane, road[-1] + lane, dice.integers(8, 20), 0.03, CARS, 0.2)


def river(c, dice):
    """Paint a winding band of water between its banks."""
    line = curve(dice, dice.uniform(0.15, 0.36))
    half = dice.uniform(0.12, 0.27) * (1 + 0.35 * np.sin(dice.uniform(1, 3) * line[:, 0]))
    c.strip(line, half + dice.uniform(0.01, 0.14), LAND + SAND)
    c.strip(line, half, WATER)


def runway(c, dice):
    """Paint a marked strip in mown grass, perhaps with its end."""
    half, end = dice.uniform(0.16, 0.3), dice.choice([-3, -1, -0.6])
    c.strip(curve(dice), half + dice.uniform(0.15, 0.4), LAND)
    c.strip(curve(dice, start=end - 0.1), half, PAVING)
    c.dashes((end + 0.4, 0), (3, 0), 9, 0.022)
    c.dashes((end + 0.2, -0.8 * half), (end + 0.2, 0.8 * half), 7, 0.12)         # the threshold
    for v in (-0.9 * half, 0.9 * half):
        c.dashes((end, v), (3, v), 1, 0.014, part=1)


def storage_tank(c, dice):
    """Paint one, four or nine round tanks in rows."""
    n, lid = dice.integers(1, 4), [LIDS[dice.integers(3)]]
    radius = dice.uniform(0.55, 0.8) / n
    pitch = radius * dice.uniform(2.2, 2.7)
    c.paint(n * pitch * 0.54 * SQUARE, PAVING + LAND + SAND)
    for cell in np.ndindex(n, n):
        c.solid((np.array(cell) - (n - 1) / 2) * pitch, radius * CIRCLE, lid, 0.4 * radius)


SCENES = {paint.__name__: paint for paint in (beach, circular_farmland, dense_residential, forest,
                                              intersection, river, runway, storage_tank)}


def draw_scene(name, dice, size=128):
    """Draw one scene of a class of SCENES, PIL RGB; all chance comes from dice, a numpy Generator."""
    c = Canvas(dice, size, LAND)
    clutter(c, dice, {"dense_residential": 0, "forest": 0}.get(name, 1))
    SCENES[name](c, dice)
    return c.photograph()


def draw_tree(root, per_class, seed=0, size=128):
    """Draw root/<class>/<class>_001.jpg and so on, unless they are there. -> root

    Scene k follows from (seed, class, k).
    """
    for name, k in progress([*product(SCENES, range(1, per_class + 1))], "drawing scenes"):
        path = Path(root) / name / f"{name}_{k:03d}.jpg"
        if not path.exists():
            dice = np.random.default_rng([seed, zlib.crc32(name.encode()), k])
            save_picture(draw_scene(name, dice, size), path, quality=90)
    return Path(root)


# Disasters: of each event its type, its land, and per cent of each class of DAMAGE and of UNKNOWN.
EVENTS = {"drawn-hurricane": ("wind", [LAND[0], LAND[1]], (52, 29, 9, 7, 3)),
          "drawn-flood": ("flooding", [LAND[3], LAND[5]], (73, 5, 16, 3, 3)),
          "drawn-wildfire": ("fire", [LAND[1], LAND[4]], (76, 1, 2, 18, 3)),
          "drawn-earthquake": ("earthquake", [LAND[2], LAND[4]], (94, 1, 1, 1, 3))}
LOT = 48                                                                         # pixels from house to house
HOLE, FLOOD, CLOUD = [(44, 38, 34), (72, 62, 54)], [(122, 98, 66, 170)], [(236, 238, 242, 215)]
RUBBLE, SOIL, ASH = [(196, 190, 180), (150, 138, 124), (60, 54, 50)], [(128, 112, 90)], [(52, 46, 44)]


def strike(c, dice, damage, kind):
    """Paint over a house, the square of -1..1, what a disaster of this kind has done to it."""
    def scatter(count, reach, half, colours):
        for spot in dice.uniform(-reach, reach, (count, 2)):
            c.paint(spot + dice.uniform(0.5, 1, 2) * half * SQUARE, colours)

    scatter(dice.integers(5), 1.7, 0.12, RUBBLE)                                 # blown here from elsewhere
    if damage == "destroyed":
        c.paint(dice.uniform(1.3, 1.6) * CIRCLE, ASH if kind == "fire" else SOIL)
        scatter(30, 1, 0.2, RUBBLE)
    elif damage == "major-damage" and kind == "flooding":                        # it stands in the water
        c.strip(dice.uniform(1.5, 1.7) * CIRCLE, 0.4, FLOOD)
    elif damage == "major-damage":                                               # half of the roof is gone
        c.paint(SQUARE * (0.5, 1) + (0.5, 0), HOLE)
        scatter(8, 1, 0.15, RUBBLE)
    elif damage == "minor-damage":                                               # tiles are off
        scatter(3, 0.7, 0.25, HOLE)
    elif damage == UNKNOWN:
        c.paint(1.5 * CIRCLE, CLOUD)


def draw_tile(event, dice, side):
    """Draw a tile of side x side pixels in an event of EVENTS.

    Returns the pictures from before and after, PIL RGB, and as much of the label file from after as
    read_label reads. The disaster is painted over the picture from before, so that the two fit.
    """
    kind, land, mix = EVENTS[event]
    c = Canvas(dice, side, land)
    for spot in dice.uniform(-1.5, 1.5, (side // 12, 2)):
        c.paint(spot + dice.uniform(0.05, 0.4, 2) * SQUARE, land)
    for spot in dice.uniform(-1.5, 1.5, (side // 6, 2)):
        c.solid(spot, dice.uniform(0.02, 0.05) * CIRCLE[::3], CROWNS)
    lots = LOT * np.argwhere(np.ones((side // LOT + 1, side // LOT + 1))) + dice.uniform(0, LOT, 2)
    lots = lots[(lots < side).all(1)]                                            # a house may cross the edge
    turn, houses, polygons = dice.uniform(0, np.pi / 2), [], []
    for spot in dice.permutation(lots)[:dice.integers(len(lots) + 1)]:
        axes = dice.uniform(9, 17, (2, 1)) * rotation(turn + dice.normal(0, 0.05))
        damage = [*DAMAGE, UNKNOWN][dice.choice(5, p=np.array(mix) / 100)]
        c.axes, c.origin = 2 * axes, 2 * spot                                    # the house's own
        c.solid(0, SQUARE, ROOFS, 0.3)
        houses.append((c.axes, c.origin, damage))
        ring = ", ".join(f"{x} {y}" for x, y in spot + SQUARE[[0, 1, 2, 3, 0]] @ axes)
        about = dict(uid=str(uuid.UUID(bytes=dice.bytes(16))), subtype=damage)
        polygons.append(dict(properties=about, wkt=f"POLYGON (({ring}))"))
    before = c.photograph()
    for axes, origin, damage in houses:
        c.axes, c.origin = axes, origin
        strike(c, dice, damage, kind)
    about = dict(disaster=event, disaster_type=kind, width=side, height=side)
    return before, c.photograph(), dict(features=dict(xy=polygons), metadata=about)


def draw_xbd(root, tiles=24, seed=0, side=256):
    """Draw so many tiles of an xBD-shaped tree, unless they are there. -> root

    Tile k follows from (seed, k); of sixteen, four are in test and the others in train.
    """
    for k in progress(range(tiles), "drawing disasters"):
        event = list(EVENTS)[k % len(EVENTS)]
        folder = Path(root) / ("test" if k // len(EVENTS) % 4 == 3 else "train")
        pre, post = (folder / "images" / f"{event}_{k:08d}_{time}_disaster.png" for time in ("pre", "post"))
        label = folder / "labels" / f"{post.stem}.json"
        if not (pre.exists() and post.exists() and label.exists()):
            before, after, content = draw_tile(event, np.random.default_rng([seed, k]), side)
            save_picture(before, pre, compress_level=1)
            save_picture(after, post, compress_level=1)
            with replacing(label) as temporary:
                temporary.write_text(json.dumps(content))
    return Path(root)


# ---- python data.py DIR: what is there

@dataclass
class Script:
    """The flags of this script."""
    data: str = flag("data/NWPU-RESISC45", "tree with a folder per class, or xBD tree", bare=True)
    size: int = flag(64, "side to which the pictures are reduced")
    draw: int = flag(0, "first draw so many scenes per class, or with --xbd tiles, into it")
    xbd: bool = flag(False, "with --draw: an xBD-shaped tree")
    out: str = flag("runs/data.png", "where a sheet of examples goes")
    skip_broken: bool = flag(False, "leave out pictures that do not decode")


def main(cfg):
    """Say what there is in a tree, and show it."""
    if cfg.draw:
        (draw_xbd if cfg.xbd else draw_tree)(cfg.data, cfg.draw)
    if not Path(cfg.data).is_dir():
        print(HOW_TO_GET)
        raise Problem(f"no folder {cfg.data}: get one as above, name another, or draw one with --draw 100")
    if is_xbd(cfg.data):
        print(*survey_xbd(cfg.data)[1], sep="\n")
    scenes = read(cfg.data, cfg.size, cfg.skip_broken)
    parts = split(scenes, cfg.data)
    for c, name in enumerate(scenes.classes):
        print(f"{(scenes.labels == c).sum():7} {name}")
    sizes, groups = ", ".join(f"{len(index)} {part}" for part, index in parts.items()), scenes.groups.unique()
    what = "tiles" if is_xbd(cfg.data) else "of them without exact doubles"
    print(f"{len(scenes):7} pictures of {len(scenes.classes)} classes, {len(groups)} {what}; {sizes}")
    rows = torch.cat([(scenes.labels == c).nonzero().flatten()[:10] for c in range(len(scenes.classes))])
    save_picture(grid(scenes.images[rows], 10), cfg.out)
    print(f"examples: {cfg.out}")


if __name__ == "__main__":
    launch(main, Script)
