"""Where images come from (folders, captions, xBD, drawings), how they are split, and tools of all scripts.

A data set is one uint8 tensor (N, C, H, W) with a label for each image. RESISC45 at 64 px is 387 MB, so it
lives on the device as it is: a batch is an index draw, and there are no workers to wait for.
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from collections import Counter
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import cached_property, lru_cache
from http.client import HTTPException
from itertools import product
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Lock, RLock, Thread
from time import perf_counter, sleep
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                      # on Windows
    fcntl = None

tqdm.set_lock(RLock())                                   # its own outlives a process that is killed
PARTS = "train", "val", "test"
OPACITY = "opacity is a mask"                            # what our own PNGs say of theirs
HOST = platform.node()                                   # in names of temporary files
FILED = 2**30                                            # bytes of images from which on they lie in a file
TRAIN, TEST, UNSAID = 0, 2, -1                           # places in PARTS; -1: the data set does not say


class Problem(Exception):
    """A mistake the user can fix. Its text is one line: what is wrong, where, what to do."""


# ---- scenes

@dataclass
class Scenes:
    """A labelled set of images, all of one tree."""
    images: torch.Tensor                                 # (N, C, H, W) uint8
    labels: torch.Tensor                                 # (N,) int64, an index into classes
    classes: list[str]
    names: list[str]                                     # "river/river_001.jpg": who was in which split
    groups: torch.Tensor                                 # (N,) int64: same group, same split
    official: torch.Tensor = None                        # (N,) int64, its part, if said: TRAIN ... UNSAID
    tiles: bool = False                                  # groups are tiles of xBD, else exact doubles
    numbers: torch.Tensor = None                         # (N, M) float32, metadata; nan where unknown
    measures: tuple = ()                                 # M names of these numbers
    captions: list = None                                # [N]: the sentences of each image, a tuple

    def __post_init__(self):
        if self.captions is None:
            self.captions = [()] * len(self.labels)
        if self.official is None:
            self.official = torch.full_like(self.labels, UNSAID)
        if self.numbers is None:
            self.numbers = torch.zeros(len(self.labels), 0)
        if odd := [name for name in self.classes if not is_name(name)]:  # it is printed, and a folder
            raise Problem(f"a class is named {odd[0]!r}: give it a name of letters")

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """Select the images at these indices, (M,) int64, or where a mask, (N,) bool, is true."""
        index = torch.arange(len(self))[index]
        some = {name: getattr(self, name)[index] for name in ("labels", "groups", "official", "numbers")}
        return replace(self, **some, images=take(self.images, index),
                       names=[self.names[i] for i in index.tolist()],
                       captions=[self.captions[i] for i in index.tolist()])

    def __add__(self, other):
        """Join two sets of one tree: a group of both is one group. ValueError if the classes differ."""
        if (self.classes, self.tiles) != (other.classes, other.tiles):
            raise ValueError("Scenes of different trees cannot be joined: their groups would mix")
        both = {name: torch.cat([getattr(self, name), getattr(other, name)])
                for name in ("labels", "groups", "official", "numbers")}
        both["images"] = roomy(self.images.dtype, len(self) + len(other), *self.images.shape[1:])
        torch.cat([self.images, other.images], out=both["images"])
        return replace(self, names=self.names + other.names, captions=self.captions + other.captions, **both)

    @cached_property
    def digest(self):
        """Hash names, labels, classes, captions and pixels: 12 hexadecimal digits."""
        about = repr((self.names, self.labels.tolist(), self.classes, self.images.shape,
                      *filter(None, self.captions)))
        hashed = hashlib.sha256(about.encode())
        hashed.update(self.images.contiguous().numpy())                  # gigabytes, perhaps: no copy of them
        return hashed.hexdigest()[:12]


def roomy(dtype, *shape):
    """Make a tensor of this shape; a large one in a nameless file (TMPDIR), which takes disk, not memory."""
    count = math.prod(shape)
    if count * dtype.itemsize < FILED or not hasattr(os, "posix_fallocate"):
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)     # a full disk is noticed here
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)


def take(images, index, dim=0):
    """Select along a dimension, as images[index]: of many images into a roomy tensor."""
    shape = [*images.shape[:dim], len(index), *images.shape[dim + 1:]]
    return torch.index_select(images, dim, index, out=roomy(images.dtype, *shape))


def read(root, size, skip_broken=False, pre=False, mask=False, cache="runs/cache", least=2):
    """Read Scenes: of an xBD tree buildings by damage; of a caption set or class folders RGB alone."""
    if is_xbd(root):
        return read_xbd(root, size, pre=pre, mask=mask, cache=cache)
    if captions := [path for name in ("dataset*.json", "captions.json") for path in Path(root).glob(name)]:
        if len(captions) > 1:
            raise Problem(f"{root} has several caption sets ({some_of(captions)}): leave one")
        return read_captions(captions[0], size, skip_broken, cache)
    return read_folder(root, size, skip_broken, cache, least)


def cached(make, root, cache, how, files):
    """Return make(), a dict; a copy is kept in the folder `cache` until `how` or the tree's files change."""
    place = hashlib.sha256(os.fsencode(f"{root.resolve()} {how}")).hexdigest()[:12]
    stats = [(p.relative_to(root).as_posix(), about.st_size, about.st_mtime_ns, about.st_ctime_ns)
             for p in files for about in [p.stat() if p.exists() else p.lstat()]]        # a link to nothing
    tree = hashlib.sha256(repr((how, stats)).encode()).hexdigest()
    store = Path(cache) / f"{root.resolve().name}-{how['size']}-{place}.pt"
    waits = dist.is_initialized() and int(os.environ["LOCAL_RANK"]) > 0  # for the machine's first process
    if waits:
        dist.barrier()
    content = kept(store, tree, make, f"{root} has changed")
    if dist.is_initialized() and not waits:
        dist.barrier()
    return content


# ---- a folder per class

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif"}
BESIDE = "numbers.csv", "grid.png", *(f"resisc45-{part}.txt" for part in PARTS)    # the folders of classes
OUTPUT = "generator.pt", "classifier.pt", "report.html", "grid.png"                # of a run in its --out
FORMATS = "JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF"    # no format that starts a program, as EPS does
MOST_PIXELS, LARGE = 50_000_000, 4_000_000               # in a picture; in those read side by side
ONE_LARGE = Lock()
DOWNLOADS = {"resisc45": (
    "https://hf.co/datasets/isaaccorley/resisc45/resolve/883edc0eee77b2c84225472f10f126e3ed83fa6e",
    {"NWPU-RESISC45.zip": "75206b2e16446591afa88e2628744886",                              # file: its md5
     "NWPU-RESISC45/resisc45-train.txt": "b5a4c05a37de15e4ca886696a85c403e",
     "NWPU-RESISC45/resisc45-val.txt": "a0770cee4c5ca20b8c32bbd61e114805",
     "NWPU-RESISC45/resisc45-test.txt": "3dda9e4988b47eb1de9f07993653eb08"})}
HOW_TO_GET = f"""RESISC45 (Cheng et al. 2017), 45 classes of 700 images of 256 x 256 pixels, zip of 427 MB:
python data.py --download resisc45 data
fetches it and the official 60/20/20 lists, and unpacks it to data/NWPU-RESISC45, a folder per class; it is
{DOWNLOADS["resisc45"][0]}/NWPU-RESISC45.zip (md5 {DOWNLOADS["resisc45"][1]["NWPU-RESISC45.zip"]}).
Any tree with a folder per class will do."""


def download(name, folder):
    """Fetch the files of a data set into a folder, and unpack a zip."""
    address, files = DOWNLOADS[name]
    for file, md5 in files.items():
        target = Path(folder) / file.removesuffix(".zip")
        if target.exists():
            continue
        part = fetch(f"{address}/{Path(file).name}", Path(folder) / f"{Path(file).name}.part", md5)
        if not file.endswith(".zip"):
            os.replace(part, target)
            continue
        unpacked = part.with_suffix(".new")
        with refusing(part, "does not unpack", "remove it"), zipfile.ZipFile(part) as archive:
            archive.extractall(unpacked)                                 # of "/x" and "../x" it makes x
        os.replace(unpacked / target.name, target)
        shutil.rmtree(unpacked)
        part.unlink()
    print(f"{name}, with the right checksums, is in {folder}")


def fetch(address, part, md5):
    """Fetch a file of this md5 to part: in six attempts, each from where the last was cut off. -> part"""
    part.parent.mkdir(parents=True, exist_ok=True)
    size = math.inf
    for _ in range(6):
        with open(part, "ab+") as file:                                  # it writes at the end
            file.seek(0)
            if hashlib.file_digest(file, "md5").hexdigest() == md5:
                return part
            have = file.tell()
            if have >= size:
                part.unlink()
                raise Problem(f"{address} is not the file of md5 {md5}: fetch it elsewhere, by hand")
            try:
                request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
                with urllib.request.urlopen(request, timeout=30) as answer:
                    have *= answer.status == 206                         # else it comes from its beginning
                    size, why = have + int(answer.headers["Content-Length"]), "cut off"
                    file.truncate(have)
                    for _ in progress(range(have, size, 2**18), f"fetching {part.stem}, 256 kB each"):
                        file.write(answer.read(2**18))
            except (HTTPException, OSError, TypeError, ValueError) as error:     # refused, cut off, too slow
                why = reason(error)
                if getattr(error, "code", 0) == 416:                     # there is no more, and it is wrong
                    file.truncate(0)
    raise Problem(f"{address} does not come whole ({why}): the same command goes on where it was")


def read_folder(root, size, skip_broken=False, cache="runs/cache", least=2):
    """Read a tree with a folder for each of at least `least` classes: Scenes, images (N, 3, size, size)."""
    root = Path(root)
    found = decode_tree(root, find_pictures(root, least), size, skip_broken, cache)
    kinds = [name.split("/")[0] for name in found["names"]]
    if len({*kinds}) < least:
        raise Problem(f"{root}: fewer than {least} classes have pictures that decode: mend or replace them")
    scenes = Scenes(**found, **number(kinds), official=read_lists(root, found["names"]))
    return with_numbers(scenes, root)


def decode_tree(root, files, size, skip_broken, cache):
    """Decode files below root -> images, names and groups of Scenes, cached. Exact doubles are a group."""
    def make():
        images, whole = decode_all(files, size, f"reading {root.name}", skip_broken)
        names = [file.relative_to(root).as_posix() for file in whole]
        return dict(images=images, names=names, groups=doubles(images))

    return cached(make, root, cache, dict(size=size, skipped=skip_broken), files)


def number(kinds, classes=None):
    """Number the classes of images, in this order or by name -> labels and classes of Scenes."""
    classes = classes or sorted({*kinds})
    return dict(labels=torch.tensor([classes.index(kind) for kind in kinds]), classes=classes)


def read_lists(root, names):
    """Read the official lists (Neumann et al. 2019), if they are there -> the part of each picture, (N,)."""
    lists = [root / f"resisc45-{part}.txt" for part in PARTS]
    if not any(path.exists() for path in lists):
        return None
    part_of, known = {}, Counter(Path(name).name for name in names)
    for k, path in enumerate(lists):
        with refusing(path, "is no use", "give the three official lists of this data set, or none"):
            listed = {Path(line.strip()).name: k for line in path.read_text("utf-8-sig").splitlines()}
            part_of |= listed
            if not known.keys() & listed.keys():
                raise ValueError("it names no picture here")
            if several := sorted(name for name in listed if known[name] > 1):
                raise ValueError(f"it may mean several pictures by {some_of(several)}")
    if absent := sorted(part_of.keys() - known.keys() - {""}):
        warn(f"{root}: its lists name {len(absent)} pictures that are not there: {some_of(absent)}")
    return torch.tensor([part_of.get(Path(name).name, UNSAID) for name in names])


def read_pictures(path, size, skip_broken=False, pre=False, mask=False, cache="runs/cache"):
    """Read the buildings of an xBD tree; or a picture, or all in a folder and below it, of no class."""
    root = Path(path)
    if is_xbd(root):
        return read_xbd(root, size, pre=pre, mask=mask, cache=cache)
    images, files = decode_all(pictures_in(root), size, f"reading {root}", skip_broken)
    if not files:
        raise Problem(f"{root}: no picture decodes")
    names = [file.relative_to(root if root.is_dir() else root.parent).as_posix() for file in files]
    untold = torch.full((len(files),), -1)
    return with_numbers(Scenes(images, untold, [], names, torch.arange(len(files))), root)


def with_numbers(scenes, root):
    """Return scenes with the metadata of root/numbers.csv, if any, whose rows begin with a path in root."""
    path = root / "numbers.csv"
    if not path.is_file():
        return scenes
    measures, known = read_numbers(path)
    if not known.keys() & set(scenes.names):
        raise Problem(f"{path} names no picture of {root}: give paths in {root} like {scenes.names[0]}")
    unknown = [math.nan] * len(measures)
    numbers = torch.tensor([known.get(name, unknown) for name in scenes.names])
    return replace(scenes, measures=measures, numbers=numbers)


def read_numbers(path):
    """Read a table of metadata -> names of its columns but the first, {first cell: [float]}; nan if empty."""
    with (refusing(path, "is no table of numbers", "give a header, and in each row a picture and numbers"),
          open(path, newline="", encoding="utf-8-sig") as file):
        header, *rows = csv.reader(file)
        found = {row[0]: [float(cell or "nan") for cell in row[1:]] for row in rows if row}
        if any(len(values) != len(header) - 1 for values in found.values()):
            raise ValueError("rows of several lengths")
        if header[1:] and all(re.fullmatch(r"[-+.\deE]*", cell) for cell in header[1:]):
            raise ValueError("the first line is no header")
        if len(found) < sum(map(bool, rows)):
            raise ValueError("two rows of one picture")
        if any(abs(value) > 3e38 for values in found.values() for value in values):              # of float32
            raise ValueError("a number is infinite")
    return tuple(header[1:]), found


def below(root):
    """Collect all below a folder that is not hidden, nor in a hidden folder; say what links are left out."""
    there = {p for p in root.rglob("*") if "/." not in f"/{p.relative_to(root).as_posix()}"}
    if links := sorted(p for p in there if p.is_symlink() and p.is_dir()):
        warn(f"{root}: links to folders are not followed: {some_of(links)}")
    return there


def find_pictures(root, least):
    """List the pictures in folders of root, by class, then by name; count on stderr what else there is."""
    if not root.is_dir():
        raise Problem(f"no folder {root}: give one of class folders (python data.py tells how to get one)")
    if (root / "images").is_dir() and ((root / "labels").is_dir() or (root / "targets").is_dir()):
        raise Problem(f"{root} looks like a split of xBD: give what holds it as {' or '.join(FOLDERS)}")
    there = below(root)
    files = sorted(p for p in there if p.parent.parent == root and p.suffix.lower() in SUFFIXES)
    folders = sorted({p.parent for p in files})
    if own := [folder for folder in folders if any((folder / name).exists() for name in OUTPUT)]:
        raise Problem(f"{own[0]} is the output of a run, no class: move it elsewhere, or give another folder")
    if len(folders) < least:
        wrong = f"only one class with pictures, {files[0].parent.name}" if files else "no pictures in folders"
        inside = sorted(p.parent for p in root.glob("[!.]*/*") if p.is_dir())
        hint = f"; did you mean {inside[0]}?" if inside else ""
        if len({*PARTS} & {p.name for p in inside}) > 1:
            hint = "; these are parts of a set: put all pictures of a class in a folder, they are split here"
        elif not files and (above := [p for p in (root.parent, root.parent.parent)
                                      if is_xbd(p) or any(p.glob("dataset*.json"))]):
            hint = f"; did you mean {above[0]}?"
        raise Problem(f"{root}: {wrong}; a folder per class, at least {least}, is needed{hint}")
    if empty := sorted(p.name for p in there if p.parent == root and p.is_dir() and not any(p.iterdir())):
        warn(f"{root}: folders without a picture are no classes: {some_of(empty)}")
    beside = there - {*files} - {root / name for name in BESIDE}
    if rest := sorted(p.relative_to(root) for p in beside if not p.is_dir()):
        warn(f"{root}: {len(rest)} files are not read (no pictures, or not in a class): {some_of(rest)}")
    return files


def decode_all(files, size, title, skip_broken=False):
    """Decode files, on all cores -> images (n, 3, size, size) uint8, and their files; Problem if broken."""
    images = roomy(torch.uint8, len(files), 3, size, size)

    def fill(i):
        try:
            images[i] = torch.from_numpy(decode(files[i], size))
        except Exception as error:                                       # Pillow raises a dozen kinds
            return f"{files[i]}: {reason(error)}"

    told = in_threads(fill, len(files), title)
    broken = [wrong for wrong in told if wrong]
    if broken and not skip_broken:
        raise Problem(f"{len(broken)} of {len(files)} pictures do not decode ({some_of(broken)}): "
                      "mend or remove them, or give --skip-broken")
    for wrong in broken:
        warn(f"skipped {wrong}")
    keep = [i for i, wrong in enumerate(told) if not wrong]
    whole = take(images, torch.tensor(keep, dtype=torch.int64)) if broken else images
    return whole, [files[i] for i in keep]


def doubles(images):
    """Return for each image (N, C, H, W) the first one that is exactly like it, (N,) int64."""
    first = {}
    hashes = (hashlib.sha256(image.numpy()).digest() for image in images)
    return torch.tensor([first.setdefault(hashed, i) for i, hashed in enumerate(hashes)])


def pictures_in(path):
    """List the pictures in a folder and below it, or the one that path is. Problem if there are none."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(p for p in below(path) if p.suffix.lower() in SUFFIXES)
    if not files:
        raise Problem(f"no pictures in {path}: give one ({', '.join(sorted(SUFFIXES))}) or a folder of them")
    return files


def decode(path, size):
    """Decode the central square of a picture, reduced with antialiasing, as RGB: (3, size, size) uint8."""
    with opened(path, draft=2 * size) as pil:
        square = ImageOps.fit(pil, (size, size), Image.Resampling.BICUBIC)
        return rearrange(np.array(square), "h w c -> c h w")


def decodes(path):
    """Is there a whole picture at path?"""
    with suppress(Exception):
        return decode(path, 8) is not None


@contextmanager
def opened(path, draft=0):
    """Yield the first picture of a file, PIL RGB: upright as its EXIF says, black where it is transparent."""
    if not Path(path).is_file():
        raise ValueError("no file" if not Path(path).exists() else "no regular file")
    with Image.open(path, formats=FORMATS) as pil:
        if pil.width * pil.height > MOST_PIXELS:
            raise ValueError(f"{pil.width} x {pil.height} pixels are more than {MOST_PIXELS:,}: cut it up")
        deep = re.search(";(12|16)", str([tile.args for tile in pil.tile]))                # bits in the file
        with ONE_LARGE if pil.width * pil.height > LARGE else nullcontext():
            if draft:                    # a JPEG decoder may reduce it, not below so many pixels a side
                pil.draft("RGB", (draft, draft))
            ImageOps.exif_transpose(pil, in_place=True)
            rgb = as_rgb(pil, 4095 if deep and deep[1] == "12" else 65535)
            if deep and 0 < np.asarray(rgb).max() < 16:
                raise ValueError("of its 16 bits the highest 4 are never used: scale it up, or save 8 bits")
            yield rgb


def as_rgb(pil, white):
    """Convert a PIL picture to RGB; white is the highest value of one of 16 bits."""
    if pil.mode in ("F", "I"):
        raise ValueError("nobody says which of its values is white: save 8 or 16 bits")
    if pil.mode.startswith("I;16"):                                      # 65535 = 257 * 255
        grey = np.asarray(pil, dtype=np.float32) / (white / 255)         # as the PNG standard, 13.12
        pil = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if pil.has_transparency_data and OPACITY not in pil.info:
        pil = Image.alpha_composite(Image.new("RGBA", pil.size, "black"), pil.convert("RGBA"))
    return pil.convert("RGB")


# ---- captions: RSICD (Lu et al. 2018), UCM-Captions and Sydney (Qu et al. 2016), NWPU-Captions, RSICap

# The classes of UC Merced in words (its folders have no blanks), as UCM-Captions numbers 100 images of each.
UC_MERCED = """agricultural, airplane, baseball diamond, beach, buildings, chaparral, dense residential,
forest, freeway, golf course, harbor, intersection, medium residential, mobile home park, overpass,
parking lot, river, runway, sparse residential, storage tanks, tennis court""".replace("\n", " ").split(", ")
NO_CLASS = "scene"                                       # of images of no class: a name, as of a folder


def in_words(name):
    """Write a class name as words: "denseresidential", "DenseResidential" -> "dense residential"."""
    known = {words.replace(" ", ""): words for words in UC_MERCED}
    return known.get(name) or re.sub("(?<=[a-z])(?=[A-Z])|_", " ", name).lower()


def read_captions(path, size, skip_broken=False, cache="runs/cache"):
    """Read a caption set, a JSON and images in its folder or below: Scenes with captions and given parts."""
    root, rows = path.parent, {}
    for name, part, kind, sentences in caption_rows(path):
        rows.setdefault(name, (part, kind, []))[2].extend(sentences)
    pictures = pictures_in(root)
    found = {file.name: file for file in pictures}
    count = Counter(file.name for file in pictures)
    if twice := [name for name in rows if count[name] > 1]:
        raise Problem(f"{root} has several pictures of one name ({some_of(twice)}): leave one of each")
    if (missing := [name for name in rows if name not in found]) and not skip_broken:
        raise Problem(f"{root} lacks {len(missing)} of the {len(rows)} pictures of {path.name} "
                      f"({some_of(missing)}): unpack them into it, or give --skip-broken")
    files = [found[name] for name in rows if name in found]
    content = decode_tree(root, files, size, skip_broken, cache)
    if not content["names"]:
        raise Problem(f"{root}: no picture of {path.name} decodes: unpack them again")
    parts, kinds, captions = zip(*[rows[Path(name).name] for name in content["names"]], strict=True)
    captions = [tuple(sentences) for sentences in captions]
    scenes = Scenes(**content, **number(kinds), official=torch.tensor(parts), captions=captions)
    return with_numbers(scenes, root)


def caption_rows(path):
    """Read the JSON of a caption set -> its images, [(file name, place in PARTS, class, sentences)]."""
    place = {part: k for k, part in enumerate(PARTS)}
    with refusing(path, "is no caption set in a known layout",
                  "unpack it again, or move it away to read the tree by its folders"):
        content = json.loads(path.read_bytes())
        if "annotations" in content:                                     # RSICap
            rows = [(a["filename"], UNSAID, NO_CLASS, [a["text_output"]]) for a in content["annotations"]]
        elif "images" in content:        # Karpathy: RSICD lists the classes beside it, UCM-Captions numbers
            kind_of = {name: file.stem for file in path.parent.glob("txtclasses*/*.txt")
                       for name in file.read_text("utf-8-sig").split()}
            if {i["filename"] for i in content["images"]} == {f"{n}.tif" for n in range(1, 2101)}:
                kind_of = {f"{n + 1}.tif": UC_MERCED[n // 100].replace(" ", "") for n in range(2100)}
            rows = [(i["filename"], place[i["split"]], kind_of.get(i["filename"], NO_CLASS),
                     [s["raw"] for s in i["sentences"]]) for i in content["images"]]
        else:                                                            # NWPU-Captions: raw, raw_1 ... raw_4
            rows = [(i["filename"], place[i["split"]], kind,
                     [text for key, text in i.items() if key.startswith("raw")])
                    for kind, images in content.items() for i in images]
        if odd := [name for name, *_ in rows if not isinstance(name, str)]:
            raise ValueError(f"{odd[0]!r} is no name of a file")
        rows = [(name, part, kind, [text.strip() for text in texts if text.strip()])
                for name, part, kind, texts in rows]
        if silent := [name for name, *_, texts in rows if not texts]:
            raise ValueError(f"no sentence for {some_of(silent)}")
        return rows


# ---- xBD: buildings before and after a disaster (Gupta et al. 2019, arXiv 1911.09296)

FOLDERS = "train", "tier3", "test", "hold"
DAMAGE = ["no-damage", "minor-damage", "major-damage", "destroyed"]
UNKNOWN = "un-classified"                                # under a cloud, say: of no class
CONTEXT = 0.5                                          # of a building's longer side, around it in its crop
MIN_SIDE, MIN_AREA = 32, 64                              # of a crop and of a building, in pixels of the tile
MEASURES = "longitude", "latitude", "gsd", "off_nadir_angle", "sun_elevation", "month"


def read_xbd(root, size, label="damage", pre=False, mask=False, cache="runs/cache"):
    """Cut a square around each classified building of an xBD tree: Scenes whose groups are tiles, cached.

    images (N, C, size, size) are RGB after the disaster, with pre also before it, with mask at last the
    building's own mask: C is 3, 4, 6 or 7. label: "damage" (4 classes), or "type", that of the disaster.
    """
    root, tiles = Path(root), find_tiles(root)
    how = dict(size=size, label=label, pre=pre, mask=mask)
    files = [path for tile in tiles.values() for _, path in sorted(tile.items())]
    content = cached(lambda: cut_tree(root, tiles, **how), root, cache, how, files)
    print(content.pop("summary"))
    official = [TEST if name.startswith("test/") else UNSAID for name in content["names"]]
    return Scenes(**content, official=torch.tensor(official), tiles=True, measures=MEASURES)


def is_xbd(root):
    """Does this folder look like an xBD tree: a split with images/ and labels/ in it?"""
    return any((Path(root) / s / "images").is_dir() and (Path(root) / s / "labels").is_dir() for s in FOLDERS)


def find_tiles(root):
    """List the files of each tile: {"train/joplin-tornado_00000050": {"post.png": path, ...}}."""
    tiles, rest = {}, []
    for path in Path(root).glob("[!.]*/*/[!.]*"):
        folder, part = path.parts[-3:-1]
        found = re.fullmatch(r"([\w.-]+_\d+)_(pre|post)_disaster\.(png|json)", path.name)
        if found and folder in FOLDERS and part in ("images", "labels"):
            tile, time, kind = found.groups()
            tiles.setdefault(f"{folder}/{tile}", {})[f"{time}.{kind}"] = path
        elif part != "targets":
            rest.append(path.relative_to(root))
    if rest:
        warn(f"{root}: {len(rest)} files are not read, as their names, or those of their folders, are not "
             f"xBD's: {some_of(sorted(rest))}; splits are named {', '.join(FOLDERS)}")
    return dict(sorted(tiles.items()))


def event_of(name):
    """Return the disaster of a building: "train/joplin-tornado_00000050/<uid>" -> "joplin-tornado"."""
    return name.split("/")[1].rpartition("_")[0]


def cut_tree(root, tiles, size, label, pre, mask):
    """Read all labels, then cut all buildings -> the fields of Scenes, and a summary of what is left out."""
    rows, tasks = [], []
    number_of, left_out = {}, Counter()                              # {tile: its group}, {reason: how many}
    needed = ["post.json", "post.png", "pre.png"][:2 + pre]
    for tile, files in progress(tiles.items(), "reading labels"):
        if missing := [file for file in needed if file not in files]:
            left_out[f"tiles without {missing[0]}"] += 1
            continue
        polygons, kind, extent, measured = read_label(files["post.json"])
        usable = [p for p in polygons if p[1] in DAMAGE and area(p[2]) >= MIN_AREA]
        unknown = sum(subtype == UNKNOWN for _, subtype, _ in polygons)
        left_out += Counter({UNKNOWN: unknown, "too small": len(polygons) - len(usable) - unknown})
        group = number_of.setdefault(tile.split("/")[1], len(number_of))
        rows += [(f"{tile}/{uid}", subtype if label == "damage" else kind, group, measured)
                 for uid, subtype, _ in usable]
        tasks.append((files, [rings for _, _, rings in usable], extent))

    reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "nothing"
    if not rows:
        raise Problem(f"{root}: no building with a damage class in {len(tiles)} tiles (left out: {reasons}): "
                      "unpack images and labels of the same split side by side")

    images = roomy(torch.uint8, len(rows), 3 + 3 * pre + mask, size, size)
    parts = images.split([len(buildings) for _, buildings, _ in tasks])
    in_threads(lambda k: cut_tile(parts[k], *tasks[k], pre, mask), len(tasks), "cutting buildings")
    names, kinds, groups, numbers = zip(*rows, strict=True)
    return dict(images=images, names=[*names], groups=torch.tensor(groups), numbers=torch.tensor(numbers),
                **number(kinds, DAMAGE if label == "damage" else None),
                summary=f"{root.name}: {len(rows)} buildings of {len(tasks)} tiles; left out: {reasons}")


def read_label(path):
    """Read a label -> its polygons [(uid, subtype, rings)], the disaster's type, (width, height), MEASURES.

    Lengths are in pixels (metadata.gsd is of another band); points off the tile are moved to its edge.
    """
    with refusing(path, "is not an xBD label", "unpack it again, or remove it"):
        content = json.loads(path.read_bytes())
        about, polygons = content["metadata"], []
        extent, kind = (about["width"], about["height"]), about["disaster_type"]
        if min(extent) < 1 or not is_name(kind):
            raise ValueError(f"no tile is of {extent} pixels and type {kind!r}")
        for p in content["features"]["xy"]:
            uid, subtype = p["properties"]["uid"], p["properties"].get("subtype")
            if subtype not in (*DAMAGE, UNKNOWN) and "_post_" in path.name:
                raise ValueError(f"no subtype {subtype!r} is known")
            polygons.append((uid, subtype, [ring.clip(0, extent) for ring in wkt_polygon(p["wkt"])]))
        places = content["features"].get("lng_lat")
        place = wkt_polygon(places[0]["wkt"])[0].mean(0).tolist() if places else [math.nan] * 2
        month = (about.get("capture_date") or "")[5:7]
        known = [about.get(name) for name in MEASURES[2:5]] + [month or None]
        measures = place + [math.nan if value is None else float(value) for value in known]
        if any(map(math.isinf, measures)):
            raise ValueError("a number is infinite")
        return polygons, kind, extent, measures


def wkt_polygon(text):
    """Parse "POLYGON ((x y, ...), (x y, ...))" -> its rings, (n, 2) float64: the outline, then the holes."""
    found = re.findall(r"\(([^()]+)\)", text) if re.match(r"\s*POLYGON", text) else []
    rings = [np.array([point.split() for point in ring.split(",")], float) for ring in found]
    if not rings or any(ring.shape[1] != 2 or not np.isfinite(ring).all() for ring in rings):
        raise ValueError(f"{text[:50]!r} is no polygon in WKT")
    return rings


def area(rings):
    """Measure the square pixels within the outline and outside of the holes (shoelace formula)."""
    sizes = [abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2 for x, y in (ring.T for ring in rings)]
    return sizes[0] - sum(sizes[1:])


def cut_tile(images, files, buildings, extent, pre, mask):
    """Fill images (n, C, size, size) with n buildings, [rings], of a tile of extent (width, height)."""
    if not buildings:                                                # many tiles are empty: nothing to decode
        return
    size = images.shape[-1]
    low, high = (np.array([edge(rings[0], 0) for rings in buildings]) for edge in (np.min, np.max))
    side = (high - low).max(1, keepdims=True) * (1 + 2 * CONTEXT)
    middle, half = (low + high) / 2, side.clip(MIN_SIDE) / 2
    boxes = np.concatenate([middle - half, middle + half], 1)        # (n, 4): left, top, right, bottom
    margin = 1 + math.ceil(max(0, -boxes.min(), (boxes[:, 2:] - extent).max()))
    tiles = []
    for path in [files[name] for name in ("post.png", "pre.png")[:1 + pre]]:
        with refusing(path, "does not decode", "unpack it again, or remove the tile"), opened(path) as pil:
            pixels = np.asarray(pil)
        if pil.size != extent:
            raise Problem(f"{path} has {pil.size} pixels, its label says {extent}: give the original picture")
        # Mirrored beyond its edges, so that a building on the edge is in the middle of its crop as well.
        padded = np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), "reflect")
        tiles.append(Image.fromarray(padded))
    for image, rings, box in zip(images, buildings, boxes, strict=True):
        parts = [tile.resize((size, size), Image.Resampling.BICUBIC, box=[*(box + margin)]) for tile in tiles]
        if mask:
            parts.append(draw_mask(rings, box, size))
        image.copy_(torch.from_numpy(rearrange(np.concatenate(parts, 2), "h w c -> c h w")))


def draw_mask(rings, box, size):
    """Draw rings [(n, 2)] in a square box (left, top, right, bottom): (size, size, 1), 255 inside, else 0.

    Even-odd rule: inside are the centres whose line to the left edge crosses rings an odd number of times.
    (Pillow's polygon draws the outline too: a house 12 pixels wide gains 4 to 8 % in area.)
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


# ---- which images to train on

def split(scenes, seed=0, hold_out=""):
    """Split into train, val and test, {name: (n,) int64 indices}. No group is ever cut.

    Parts that the data set gives are kept, and of doubles in several of them only those in test, or else in
    val; an event held out is test instead. Unless train is given too, the other groups are cut 3 : 1 : 1 by
    seed, or 3 : 1 beside a given test: class by class, but tiles all together. Problem if a part is empty.
    """
    official = scenes.official
    if hold_out:
        events = [event_of(name) for name in scenes.names] if scenes.tiles else []
        if hold_out not in events:
            hint = f"there are {', '.join(sorted(set(events)))}" if events else "only an xBD tree has events"
            raise Problem(f"--hold-out {hold_out}: no such event; {hint}")
        official = torch.tensor([TEST if event == hold_out else UNSAID for event in events])
    ours = TRAIN not in official                         # are the images without a part ours to place?
    _, first, group = map(torch.from_numpy, np.unique(scenes.groups, return_index=True, return_inverse=True))
    part = torch.full_like(first, UNSAID).scatter_reduce(0, group, official, "amax")       # of each group
    shares = (0.6, 0.2) if TEST in part else (0.6, 0.2, 0.2)
    free = (part == UNSAID).nonzero().flatten()
    for pool in shuffled(scenes, free, first[free], seed).values() if ours else ():
        cuts = [round(len(pool) * sum(shares[:k]) / sum(shares)) for k in range(1, len(shares))]
        for k, chunk in enumerate(pool.tensor_split(cuts)):
            part[chunk] = k
    kept = (official == part[group]) | ((official == UNSAID) & ours)
    parts = {name: (kept & (part[group] == k)).nonzero().flatten() for k, name in enumerate(PARTS)}
    if empty := " and a ".join(name for name, index in parts.items() if len(index) == 0):
        raise Problem(f"too few images for a {empty} split ({len(scenes)} in all): five per class will do")
    return parts


def shuffled(scenes, units, images, seed):
    """Shuffle units (n,), with an image of each, by seed: {"tiles": (n,)}, or {"images of a": (m,), ...}."""
    if scenes.tiles:
        return {"tiles": units[torch.randperm(len(units), generator=rng(seed))]}
    pools = {}
    for c, name in enumerate(scenes.classes):
        pool = units[scenes.labels[images] == c]
        pools[f"images of {name}"] = pool[torch.randperm(len(pool), generator=rng(seed, c))]
    return pools


def choose(scenes, index, count, seed):
    """Choose `count` images of each class, or tiles, of index by seed; 0: all. Nested: 10 are part of 40."""
    tiles = scenes.groups[index]
    pools = shuffled(scenes, tiles.unique() if scenes.tiles else index, index, seed)
    if short := [f"{len(pool)} {what}" for what, pool in pools.items() if len(pool) < count]:
        raise Problem(f"{count} asked for, but there are {some_of(short)} to train on: ask for fewer")
    chosen = torch.cat([pool[:count or None] for pool in pools.values()])
    if scenes.tiles:
        chosen = index[torch.isin(tiles, chosen)]
    if absent := [name for c, name in enumerate(scenes.classes) if c not in scenes.labels[chosen]]:
        raise Problem(f"no image to train on is {some_of(absent)}: ask for more, or hold out another event")
    return chosen


def picture(image):
    """Convert (C, H, W) uint8 to PIL: RGB, or RGBA if C = 4, where the mask becomes the opacity."""
    return Image.fromarray(rearrange(image.cpu(), "c h w -> h w c").numpy())


def grid(images, columns, zoom=1):
    """Arrange (N, C, H, W) uint8 in so many columns, row by row, with white lines between: PIL."""
    images = torch.nn.functional.pad(images[:, :3].cpu(), (1, 1, 1, 1), value=255)
    gap = -len(images) % columns
    images = torch.cat([images, images.new_full((gap, *images.shape[1:]), 255)])
    whole = picture(rearrange(images, "(r k) c h w -> c (r h) (k w)", k=columns))
    return whole.resize((whole.width * zoom, whole.height * zoom), Image.Resampling.NEAREST)


def save_picture(pil, path, **how):
    """Save a PIL picture atomically. The opacity of RGBA is noted to be a mask, which hides nothing."""
    kind, file, path = Image.registered_extensions().get(Path(path).suffix.lower()), io.BytesIO(), Path(path)
    if kind not in FORMATS:
        raise Problem(f"{path}: no format of pictures is known by this name; end it in .png or .jpg")
    if pil.mode == "RGBA":
        how["pnginfo"] = PngImagePlugin.PngInfo()
        how["pnginfo"].add_text(OPACITY, "a building")
    pil.save(file, kind, **how)
    write(path, file.getvalue())


# ---- drawn pictures: a stand-in for RESISC45 and xBD where there are no data

# Muted colours, in families: each use picks one and shifts it a little. A fourth number is its opacity.
LAND = [(90, 108, 62), (142, 128, 88), (114, 94, 72), (66, 84, 50), (156, 146, 122), (124, 130, 76)]
WATER, FOAM = [(36, 64, 80), (60, 82, 68), (64, 108, 118)], [(238, 240, 234, 200)]
SAND, PAVING = [(200, 183, 146), (180, 162, 128)], [(82, 82, 84), (122, 120, 116), (166, 162, 150)]
ROOFS = [(150, 96, 76), (166, 122, 98), (122, 114, 108), (94, 90, 90), (188, 180, 168), (70, 68, 72)]
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
    v = level + sum(dice.normal(0, bend / k) * np.sin(k * dice.uniform(1, 2) * u + dice.uniform(0, 6))
                    for k in (1, 2, 4))
    return np.stack([u, v], 1) @ rotation(angle)


class Canvas:
    """A picture of land at twice its size; points (n, 2), about -1..1, are pixels points @ axes + origin."""

    def __init__(self, dice, size, land):
        self.dice = dice
        self.image = Image.new("RGB", (2 * size, 2 * size))
        self.pen = ImageDraw.Draw(self.image, "RGBA")
        self.scale = dice.uniform(0.75, 1.25)
        self.axes = size * self.scale * rotation(dice.uniform(0, 2 * np.pi))
        self.origin = size * dice.uniform(0.75, 1.25, 2)
        self.shadow = dice.uniform(0.5, 1.3) * CIRCLE[dice.integers(32)]         # cast by one unit of height
        noise = [Image.fromarray(dice.standard_normal((n, n), np.float32)) for n in (4, 11, 37, 101)]
        self.texture = sum(np.asarray(x.resize((size, size), Image.BICUBIC)) / x.width ** 0.3 for x in noise)
        self.paint(4 * SQUARE, land)

    def paint(self, outline, colours, vary=8):
        """Fill a polygon (n, 2) with one of the colours, whose brightness varies by so many grey levels."""
        chosen = colours[self.dice.integers(len(colours))]
        shift = vary * (self.dice.standard_normal() + self.dice.standard_normal(3) / 3)
        colour = (shift + chosen[:3]).clip(0, 255).astype(int).tolist()
        points = np.asarray(outline) @ self.axes + self.origin
        self.pen.polygon(points.ravel().tolist(), (*colour, *chosen[3:]))

    def strip(self, line, half_width, colours):
        """Paint a line (n, 2) so thick; half_width, a number or (n,), may vary along it."""
        along = np.gradient(line, axis=0)
        across = along[:, ::-1] * [-1, 1] / np.hypot(*along.T)[:, None]          # of length 1
        side = across * np.reshape(half_width, (-1, 1))
        self.paint(np.concatenate([line + side, (line - side)[::-1]]), colours)

    def dashes(self, start, end, count, half_width, colours=MARKS, part=0.5):
        """Paint lane marks, or cars, from start to end; part of the way is covered."""
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
        contrast, self.light = self.dice.uniform(0.75, 1.2), self.dice.uniform(-22, 22)
        pixels = 115 + contrast * (pixels - 112) + self.light
        self.haze = self.dice.uniform(0, 0.25)
        pixels += self.haze * (np.array([190, 198, 206]) - pixels)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


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
    half, turn = dice.uniform(0.16, 0.28), dice.uniform(0.7, 2.4)
    roads = [curve(dice), curve(dice, angle=turn, start=dice.choice([-3, -3, 0]))]          # 0: a T
    for kerb, colours in ((0.04, PAVING[1:]), (0, [PAVING[dice.integers(3)]])):
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
    """Draw one scene of a class of SCENES by dice, a numpy Generator: PIL RGB, its scale, light and haze."""
    c = Canvas(dice, size, LAND)
    # What may lie anywhere: a field, a house, a group of trees.
    for _ in range(dice.poisson(0 if name in ("dense_residential", "forest") else 1)):
        c.paint(dice.uniform(-1.2, 1.2, 2) + dice.uniform(0.25, 0.9, 2) * SQUARE, LAND)
        c.solid(dice.uniform(-1.2, 1.2, 2), dice.uniform(0.04, 0.16, 2) * SQUARE, ROOFS)
        for spot in dice.normal(dice.uniform(-1.2, 1.2, 2), 0.2, (dice.integers(1, 14), 2)):
            c.solid(spot, dice.uniform(0.02, 0.07) * CIRCLE[::3], CROWNS)
    SCENES[name](c, dice)
    return c.photograph(), (c.scale, c.light, c.haze)


def drawn_only(root, sign):
    """Raise Problem if a folder holds something, but nothing that is the sign of what was drawn before."""
    if any(Path(root).glob("[!.]*")) and not any(Path(root).glob(sign)):
        raise Problem(f"{root} holds what was not drawn: draw into a folder of its own")


def draw_tree(root, per_class, seed=0, size=128):
    """Draw root/<class>/<class>_001.jpg ... by (seed, class, k), unless there, and numbers.csv. -> root"""
    def crc32(picture):                                                          # a JPEG has no checksum
        return [float(zlib.crc32((root / picture).read_bytes() + repr(known[picture]).encode()))]

    root, known, sums = Path(root), {}, {}
    drawn_only(root, ".crc32.csv")
    if not (root / ".crc32.csv").exists():
        save_csv(root / ".crc32.csv", ("picture", "crc32"), ())
    with suppress(OSError, Problem):                                             # else all are drawn again
        known, sums = (read_numbers(root / table)[1] for table in ("numbers.csv", ".crc32.csv"))
    for name, k in progress([*product(SCENES, range(1, per_class + 1))], "drawing scenes"):
        picture = f"{name}/{name}_{k:03d}.jpg"
        if picture not in known or not (root / picture).exists() or sums.get(picture) != crc32(picture):
            dice = np.random.default_rng([seed, zlib.crc32(name.encode()), k])
            pil, numbers = draw_scene(name, dice, size)
            save_picture(pil, root / picture, quality=90)
            known[picture] = [float(x) for x in numbers]
            sums[picture] = crc32(picture)
    save_csv(root / "numbers.csv", ("picture", "scale", "light", "haze"), [(k, *v) for k, v in known.items()])
    save_csv(root / ".crc32.csv", ("picture", "crc32"), [(k, *v) for k, v in sums.items()])
    return root


# Disasters: of each event its type, its land, and per cent of each class of DAMAGE and of UNKNOWN.
EVENTS = {"drawn-hurricane": ("wind", [LAND[0], LAND[1]], (52, 29, 9, 7, 3)),
          "drawn-flood": ("flooding", [LAND[3], LAND[5]], (73, 5, 16, 3, 3)),
          "drawn-wildfire": ("fire", [LAND[1], LAND[4]], (76, 1, 2, 18, 3)),
          "drawn-earthquake": ("earthquake", [LAND[2], LAND[4]], (94, 1, 1, 1, 3))}
LOT = 48                                                 # pixels from house to house
HOLE, FLOOD, CLOUD = [(44, 38, 34), (72, 62, 54)], [(122, 98, 66, 170)], [(236, 238, 242, 215)]
RUBBLE, SOIL, ASH = [(196, 190, 180), (150, 138, 124), (60, 54, 50)], [(128, 112, 90)], [(52, 46, 44)]


def strike(c, dice, damage, kind):
    """Paint over a house, the square of -1..1, what a disaster of this kind has done to it."""
    def scatter(count, reach, half, colours):
        for spot in dice.uniform(-reach, reach, (count, 2)):
            c.paint(spot + dice.uniform(0.5, 1, 2) * half * SQUARE, colours)

    scatter(dice.integers(5), 1.7, 0.12, RUBBLE)                                 # blown here from elsewhere
    if damage == "minor-damage":                                                 # tiles are off
        scatter(dice.integers(2, 6), 0.7, 0.25, HOLE)
    elif damage == "major-damage" and kind == "flooding":                        # it stands in the water
        c.strip(dice.uniform(1.4, 1.7) * CIRCLE, 0.4, FLOOD)
    elif damage == "major-damage":                                               # a part of the roof is gone
        part = SQUARE.clip((dice.uniform(-0.3, 0.3), -1))
        c.paint(part @ rotation(np.pi / 2 * dice.integers(4)), HOLE)
        scatter(8, 1.2, 0.15, RUBBLE)
    elif damage == "destroyed":
        c.paint(dice.uniform(1.3, 1.6) * CIRCLE, ASH if kind == "fire" else SOIL)
        scatter(dice.integers(15, 40), 1, 0.2, RUBBLE)
    elif damage == UNKNOWN:
        c.paint(1.5 * CIRCLE, CLOUD)


def draw_tile(event, dice, side):
    """Draw a tile, side x side pixels, before and after an event: two of PIL RGB, and its label, a dict."""
    kind, land, mix = EVENTS[event]
    c = Canvas(dice, side, land)
    for spot in dice.uniform(-1.5, 1.5, (side // 12, 2)):
        c.paint(spot + dice.uniform(0.05, 0.4, 2) * SQUARE, land)
    for spot in dice.uniform(-1.5, 1.5, (side // 6, 2)):
        c.solid(spot, dice.uniform(0.02, 0.05) * CIRCLE[::3], CROWNS)
    lots = LOT * np.argwhere(np.ones((side // LOT + 1, side // LOT + 1))) + dice.uniform(0, LOT, 2)
    lots = lots[(lots < side).all(1)]                                            # a house may cross the edge
    turn, houses, polygons = dice.uniform(0, np.pi / 2), [], []
    for k, spot in enumerate(dice.permutation(lots)[:dice.integers(len(lots) + 1)]):
        axes = dice.uniform(9, 17, (2, 1)) * rotation(turn + dice.normal(0, 0.05))
        damage = [*DAMAGE, UNKNOWN][dice.choice(5, p=np.array(mix) / 100)]
        houses.append((2 * axes, 2 * spot, damage))
        ring = ", ".join(f"{x} {y}" for x, y in spot + SQUARE[[0, 1, 2, 3, 0]] @ axes)
        polygons.append(dict(properties=dict(uid=str(k), subtype=damage), wkt=f"POLYGON (({ring}))"))
        c.axes, c.origin = 2 * axes, 2 * spot                                    # -1..1 is now this house
        c.solid(0, SQUARE, ROOFS, 0.3)
    before = c.photograph()                                                      # the rest is painted over it
    for axes, origin, damage in houses:
        c.axes, c.origin = axes, origin
        strike(c, dice, damage, kind)
    about = dict(disaster=event, disaster_type=kind, width=side, height=side,
                 sun_elevation=math.degrees(math.atan2(1, np.hypot(*c.shadow))))
    return before, c.photograph(), dict(features=dict(xy=polygons), metadata=about)


def draw_xbd(root, tiles=24, seed=0, side=256):
    """Draw tiles as an xBD tree, a quarter in test, each by (seed, k), unless they are there. -> root"""
    drawn_only(root, "*/images/drawn-*")
    for k in progress(range(tiles), "drawing disasters"):
        event = list(EVENTS)[k % len(EVENTS)]
        folder = Path(root) / ("test" if k // len(EVENTS) % 4 == 3 else "train")
        pre, post = (folder / "images" / f"{event}_{k:08d}_{time}_disaster.png" for time in ("pre", "post"))
        label = folder / "labels" / f"{post.stem}.json"
        if not (pre.exists() and post.exists() and label.exists()):
            before, after, content = draw_tile(event, np.random.default_rng([seed, k]), side)
            save_picture(before, pre, compress_level=1)
            save_picture(after, post, compress_level=1)
            write(label, json.dumps(content))
    return Path(root)


# ---- shared by all scripts

def rng(*key, device="cpu"):
    """Make a torch generator seeded by a key of integers, e.g. (seed, step): no state has to be saved."""
    hashed = np.random.SeedSequence((len(key), *key)).generate_state(1)  # torch's CPU seeds have 32 bits
    return torch.Generator(device).manual_seed(int(hashed[0]))


def to_float(images):
    """Turn uint8 into float in [-1, 1]: training images cross only here and in to_uint8."""
    return (images / 127.5).sub_(1)


def to_uint8(x):
    """Turn float in [-1, 1] into uint8. Rounds: truncation would darken images by half a level, a cue."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def lr_at(step, steps, lr, warmup):
    """Return the learning rate of a step: up linearly for `warmup` steps, then down to 0 along a cosine."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def descend(model, optimizer, loss, step, cfg):
    """Take one optimizer step; loss is a sum over this process's images, divided by the images of all."""
    rate = lr_at(step, cfg.steps, cfg.lr, cfg.warmup)
    if step % 50 == 49 and not loss.isfinite():              # to look at every step is to wait for the GPU
        raise Problem(f"the loss is {loss.item()} at step {step + 1}, at a rate of {rate:.1e}: lower --lr; "
                      "the last checkpoint is kept")
    loss.backward()
    sum_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)              # no odd batch throws the weights far
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("pace", 1)
    optimizer.step()
    optimizer.zero_grad()


def seconds_per_step(run, cfg):
    """Measure the seconds that a step of run(cfg) takes, by what five steps more take."""
    marks = []
    for steps in (1, 1, 6):                                  # the first warms up
        start = perf_counter()
        run(replace(cfg, steps=steps))
        marks.append(perf_counter() - start)
    return max(0.0, marks[2] - marks[1]) / 5


def forecast(run, cfg, small):
    """Say where run(cfg) trains; on a CPU, by a few steps, what it takes, and if long, flags for less."""
    said, kept, few = f"{cfg.steps} steps of {cfg.batch} images on {pick_device()}", {}, replace(cfg, batch=4)
    if pick_device().type == "cpu" and cfg.steps > 50 and not dist.is_initialized():
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept.setdefault(x.data_ptr(), [x.nbytes]) and x, lambda x: x):
            run(replace(few, steps=1))                       # what a step keeps for its way back
        minutes = seconds_per_step(run, few) * cfg.steps * cfg.batch / 4 / 60
        memory = sum(n for n, in kept.values()) * cfg.batch / 4
        said += f": at most some {minutes:.0f} minutes and {memory / 1e9:.1f} GB"
        said += f". For a CPU: {small}" if minutes > 60 else ""
    print(said, flush=True)


def pick_device():
    """Return the fastest device on this machine (with several processes, "cuda" is the process's own)."""
    return torch.device("cuda" if torch.cuda.is_available() else
                        "mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device):
    """Compute in bfloat16 where it pays, on a GPU: the range of float32, so no gradient scaler."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@contextmanager
def replacing(path):
    """Yield a temporary name beside path: its file takes path's place at the end, but not after an error."""
    path = Path(path)
    temporary = path.with_name(f".{HOST}-{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__       # torch.save says little
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None          # not the temporary name
    finally:
        with suppress(OSError):
            temporary.unlink()


@lru_cache(None)
def sweep(folder):
    """Remove, once, what processes of this machine that are dead left half-written in a folder."""
    for path in folder.glob(f".{HOST}-*.*"):
        pid = path.name.removeprefix(f".{HOST}-").partition(".")[0]
        if Path("/proc/self").exists() and not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)


@contextmanager
def alone(folder, tree=""):
    """Hold a folder until this process ends, however it does.

    Problem if another process holds it, or if it would be taken for a class of the tree that is read.
    """
    if not folder:
        raise Problem("--out is empty: give a folder")
    if tree and os.path.dirname(os.path.realpath(folder)) == os.path.realpath(tree):
        raise Problem(f"--out {folder} would be a class of {tree}: give a folder elsewhere")
    os.makedirs(folder, exist_ok=True)
    if fcntl:                                                            # Windows has no such locks
        held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"another run writes to {folder}: let it end, or give another --out") from None
        except OSError:                                                  # nor have some network folders
            pass
    try:
        yield
    finally:
        with suppress(OSError):
            os.rmdir(folder)                                             # if a mistake left it empty
        if fcntl:
            os.close(held)


def write(path, content):
    """Write bytes, or text as UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else
                              content.encode(errors="backslashreplace"))


def save_csv(path, header, rows):
    """Write a CSV atomically."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write(path, text.getvalue())


def save(path, content):
    """Write what torch.save() takes, atomically."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def load(path, mmap=False):
    """Read what save() wrote: nothing in it is executed or unpacked. Any kind of error if it is broken."""
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > os.stat(path).st_size:
            raise ValueError("it is compressed")                         # its size is what it takes in memory
        if broken := archive.testzip():
            raise ValueError(f"{broken} is not what was written")
    return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)


def kept(path, stamp, make, old="it is of something else"):
    """Return make(): from the file path, if that is whole and has this stamp, or else anew."""
    try:
        found = load(path, mmap=True)
        if found["stamp"] != stamp:
            raise ValueError(old)
        return found["content"]
    except FileNotFoundError:
        pass
    except Exception as error:                                           # files break in dozens of ways
        warn(f"{path} is made again: {reason(error)}")
    found = dict(stamp=stamp, content=make())
    save(path, found)
    return found["content"]


@contextmanager
def refusing(path, wrong, advice):
    """Turn an error in this block into a Problem of the file path: for what cannot be made again."""
    try:
        if path and Path(path).exists() and not Path(path).is_file():    # to read a pipe is to wait for ever
            raise ValueError("no regular file")
        yield
    except Problem:
        raise
    except Exception as error:                                           # files break in dozens of ways
        raise Problem(f"{path} {wrong} ({reason(error)}): {advice}") from None


def reason(error):
    """Return the first line of what an error says, or else its kind."""
    said = next(iter(str(error).strip().splitlines()), "")[:160]
    clear = said and isinstance(error, (OSError, ValueError))
    return said if clear else f"{type(error).__name__} {said}".strip()


def save_checkpoint(path, kind, identity, step, parts, **more):
    """Save all of a run: what it is (kind, identity), how far it is (step), the state of its parts."""
    states = {name: part.state_dict() for name, part in parts.items()}
    models = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
    if not all(p.isfinite().all() for model in models for p in model.parameters()):
        raise Problem(f"the weights are not finite at step {step}: lower --lr; the last checkpoint is kept")
    save(path, {"kind": kind, **identity, "step": step, **states, **more})


def load_checkpoint(path, *kinds):
    """Load what save_checkpoint wrote. Nothing in the file is executed. Problem if it is of no such kind."""
    if not Path(path).is_file():
        raise Problem(f"no checkpoint at {path}: train one first, or give another path")
    needed = f"a {' or '.join(kinds)} is needed, give another path"
    with refusing(path, "is no checkpoint of ours", needed):
        content = load(path)
        if not isinstance(content, dict):
            raise ValueError("it holds no dict")
        if str(content["kind"]) not in kinds:
            raise Problem(f"{path} is a {content['kind']}: {needed}")
        if odd := [name for name in content.get("classes", ()) if not is_name(name)]:    # they become folders
            raise Problem(f"{path} has a class {odd[0]!r}, which is no name of a folder: give another path")
    return content


def is_name(text):
    """Is text the name of a folder, and no path to another one?"""
    return (isinstance(text, str) and text.isprintable() and not {"/", "\\"} & {*text}
            and text.strip(". ") > "")


def resume(path, kind, identity, parts, fresh):
    """Give the parts {name: module or optimizer} the state they had in the checkpoint. -> it, or fresh.

    fresh: of a run that begins, {name: what else is in a checkpoint}. Problem if its identity is another.
    """
    saved = load_checkpoint(path, kind) if path and Path(path).exists() else None
    if dist.is_initialized():                                            # have all processes read the same?
        held = [None] * dist.get_world_size()
        dist.all_gather_object(held, (saved and saved["step"], repr(identity)))
        if any(other != held[0] for other in held):
            raise Problem(f"the processes do not see the same images, or the same {path}: "
                          "--data and --out must be folders that all machines share")
    if saved is None:
        return fresh
    advice = "give another --out, or remove it"
    with refusing(path, "is broken, or of other code than this", advice):
        if differ := [name for name in identity if saved.get(name) != identity[name]]:
            old, new = saved.get("config", {}), identity["config"]
            other = ", ".join(k for k in new if old.get(k) != new[k]) if differ[0] == "config" else differ[0]
            raise Problem(f"{path} is of a run with another {other}: {advice}")
        for name, value in fresh.items():
            if type(saved[name]) is not type(value):
                raise TypeError(f"{name} is {saved[name]!r}")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
            for p in [p for group in getattr(part, "param_groups", ()) for p in group["params"]]:
                if any(moment.shape not in (p.shape, ()) for moment in part.state[p].values()):
                    raise ValueError(f"the {name}'s moments are not those of the weights")
    return saved


# ---- shared by all scripts: several processes, by torchrun --nproc-per-node N SCRIPT.py ...
# Every process runs the whole script and draws the same random numbers. Each computes its part of every
# batch, sums over the processes bring the parts together, and process 0 alone writes and talks. Without
# torchrun there is one process, and all of this does nothing.

@contextmanager
def processes(several=True):
    """Join the processes that torchrun started, if it did. After an error, torchrun ends the others."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if not several:
        raise Problem("runs in one process: start it with python, not with torchrun")
    local, device = int(os.environ["LOCAL_RANK"]), None
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
    """Return the number of this process: 0 writes and talks."""
    return dist.get_rank() if dist.is_initialized() else 0


def own_slice(n):
    """Return this process's part of n images, as a slice. The parts differ by one image at most."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return slice(n * rank() // world, n * (rank() + 1) // world)


def total(x):
    """Sum x in place over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def sum_gradients(model):
    """Add up the gradients of all processes, in one message: the batch's gradient, however it is divided."""
    # DistributedDataParallel takes means, and sends during the backward pass: that pays between machines.
    if dist.is_initialized():
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        summed = total(torch.cat([g.flatten() for g in gradients])).split([g.numel() for g in gradients])
        for g, s in zip(gradients, summed, strict=True):
            g.copy_(s.view_as(g))


def progress(items, title, *args, **how):
    """Iterate with a progress bar on a terminal, or where it takes long with a line per minute in a log."""
    quiet = rank() or parent_process()                   # other processes, ours or torchrun's, do not talk
    if not sys.stderr.isatty():                          # in a log a line per minute
        how |= dict(bar_format="{desc}: {n_fmt} of {total_fmt}, {elapsed}, {remaining} to go\n", delay=60,
                    mininterval=60, maxinterval=600, leave=True)
    return tqdm(items, title, *args, disable=bool(quiet), **{"leave": False} | how)


# ---- shared by all scripts: several tasks at a time

def in_threads(work, n, title):
    """Return [work(0), ... work(n - 1)], on all cores: Pillow lets go of the GIL while it decodes."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(progress(threads.map(work, range(n)), title, n))


def jobs(asked):
    """Return how many tasks to run at a time: as many as asked, or for 0 one on a GPU, else one per core."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return asked or (allowed if pick_device().type == "cpu" else 1)


def at_once(function, *args):
    """Call function(*args) in this process. -> a Future that is done; an exception is raised here."""
    future = Future()
    future.set_result(function(*args))
    return future


def _enter(enter, *args):
    """Prepare a process of a pool: one thread, silent, leaves Ctrl-C to the first process, ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()       # even by a kill
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    enter(*args)


@contextmanager
def pool(jobs, enter, *args):
    """Have submit(function, *args) -> Future done by `jobs` processes, each after a call of enter(*args)."""
    threads = torch.get_num_threads()
    try:
        if pick_device().type == "cpu":                  # small networks gain nothing from several threads,
            torch.set_num_threads(1)                     # and results do not depend on `jobs`
        if jobs == 1:                                    # this process itself, which must have entered
            yield SimpleNamespace(submit=at_once)
        else:
            with ProcessPoolExecutor(jobs, get_context("spawn"), _enter, (enter, *args)) as workers:
                try:
                    yield workers
                except BaseException:                                    # do not wait for what they do
                    for child in active_children():
                        child.terminate()
                    raise
    except BrokenExecutor:
        raise Problem(f"one of {jobs} processes died, perhaps for want of memory: with fewer --jobs the same "
                      "command goes on where it was") from None
    finally:
        torch.set_num_threads(threads)


# ---- shared by all scripts: the command line

def flag(default, help, least=-math.inf, most=math.inf, bare=False, alone=False):
    """Declare a field of a Config and its --flag, or if bare an argument. alone: a folder of one run only."""
    bounds = (f"; {least:g} to {most:g}" if most < math.inf else
              f"; at least {least:g}" if least > -math.inf else "")
    kind = float if default is None else type(default)                                   # float | None
    return field(default=default, metadata=dict(help=help + bounds, kind=kind, least=least, most=most,
                                                bare=bare, alone=alone))


def spelled(f):
    """Return a field's flag."""
    return f.name if f.metadata["bare"] else "--" + f.name.replace("_", "-")


@dataclass
class Settings:
    """What all Configs have in common: a value not of its flag's type or range is a ValueError."""

    def __post_init__(self):
        for f in fields(self):
            value, kind = getattr(self, f.name), f.metadata["kind"]
            if value is None and f.default is None:
                continue
            if type(value) not in ((int, float) if kind is float else (kind,)):
                raise ValueError(f"{spelled(f)} {value!r} is not of type {kind.__name__}")
            for v in value if kind is tuple else () if kind is str else (value,):
                if not f.metadata["least"] <= v <= f.metadata["most"]:                   # nan is not, either
                    raise ValueError(f"{spelled(f)} {v:g}: {f.metadata['help'].rpartition('; ')[2]}")


def settings_of(cfg, config):
    """Return the fields of the dataclass `config` in cfg, which may have more, as a dict."""
    return {f.name: getattr(cfg, f.name) for f in fields(config)}


def without_effect(settings, names, when):
    """Raise ValueError if one of these flags, which change nothing then, is not at its default."""
    for f in fields(settings):
        if f.name in names and getattr(settings, f.name) != f.default:
            raise ValueError(f"{spelled(f)} has no effect {when}: leave it out")


def integers(text):
    """Parse "10,40" -> (10, 40)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is no list of integers like 10,40") from None


def some_of(things):
    """List the first three, for a message."""
    listed = [plain(thing) for thing in things]
    return ", ".join(listed[:3]) + " ..." * (len(listed) > 3)


def plain(text):
    """Return text as one line that a terminal shows as it is."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def warn(text):
    """Say something on stderr, once: not by each process."""
    if not (rank() or parent_process()):
        print(plain(text), file=sys.stderr)


def parser_of(config, title):
    """Make the parser of a Config's flags."""
    parser = argparse.ArgumentParser(description=title, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(config):
        kind = f.metadata["kind"]
        how = (dict(action=argparse.BooleanOptionalAction) if kind is bool else
               dict(type=integers, metavar="N,N") if kind is tuple else dict(type=kind))
        if f.metadata["bare"]:
            how["nargs"] = "?"
        parser.add_argument(spelled(f), default=f.default, help=f.metadata["help"], **how)
    return parser


def launch(main, config, argv=None, several=False):
    """Run main(config of these flags), if `several` by torchrun too.

    What ends it early is said in a line: a mistake or a full disk with exit code 2, Ctrl-C with 130, a
    SIGTERM with 143.
    """
    first = os.environ.get("RANK", "0") in ("", "0")

    def refuse(message, code=2):
        if not first:
            sleep(2)                 # process 0 most likely says the same, and torchrun then ends this one
        parser.exit(code, f"{parser.prog}: {plain(message)}\n")

    def stop(number, _):
        raise KeyboardInterrupt(number)

    parser = parser_of(config, sys.modules[main.__module__].__doc__.split("\n\n")[0])
    parser.error = lambda message: refuse(f"{message} (--help lists the flags)")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")                # a terminal may lack letters
    try:
        settings = config(**vars(parser.parse_args(argv)))             # its __post_init__ looks at the values
    except ValueError as error:
        parser.error(error)

    again = "the same command goes on where it was"
    before = signal.signal(signal.SIGTERM, stop)
    try:
        held = [getattr(settings, f.name) for f in fields(config) if f.metadata["alone"]]
        tree = getattr(settings, "data", "")
        with alone(held[0], tree) if held and first else nullcontext(), processes(several):
            return main(settings)
    except Problem as problem:
        refuse(problem)
    except KeyboardInterrupt as stopped:
        refuse(f"stopped; {again}", 128 + (stopped.args or (signal.SIGINT,))[0])
    except OSError as error:
        refuse(f"{error.filename or 'files'}: {error.strerror or error}; when that is mended, {again}")
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)):
            raise
        lower = [spelled(f) for f in fields(config) if f.name in ("batch", "jobs", "size")]
        refuse(f"out of memory: lower {' or '.join(lower)}; {again}")
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- python data.py DIR: what is there

@dataclass
class Script(Settings):
    """The flags of this script."""
    data: str = flag("data/NWPU-RESISC45", "tree with a folder per class, caption set or xBD tree", bare=True)
    size: int = flag(64, "side to which the pictures are reduced", 1, 1024)
    draw: int = flag(0, "first draw so many scenes per class, or with --xbd tiles, into it", 0, 100_000)
    xbd: bool = flag(False, "with --draw: an xBD-shaped tree")
    out: str = flag("runs/data.png", "where a sheet of examples goes")
    skip_broken: bool = flag(False, "leave out pictures that do not decode")
    download: str = flag("", f"first fetch one into it, of {', '.join(DOWNLOADS)}")

    def __post_init__(self):
        super().__post_init__()
        without_effect(self, [] if self.draw else ["xbd"], "without --draw")
        if self.download not in ("", *DOWNLOADS):
            raise ValueError(f"--download {self.download}: known are {', '.join(DOWNLOADS)}")


def main(cfg):
    """Count what there is in a tree, and show it."""
    if cfg.download:
        return download(cfg.download, cfg.data)
    if cfg.draw:
        (draw_xbd if cfg.xbd else draw_tree)(cfg.data, cfg.draw)
    if not Path(cfg.data).is_dir():
        print(HOW_TO_GET)
        raise Problem(f"no folder {cfg.data}: get one as above, name another, or draw one with --draw 100")
    scenes = read(cfg.data, cfg.size, cfg.skip_broken)
    parts = split(scenes)
    events = [event_of(name) if scenes.tiles else "" for name in scenes.names]
    for (event, c), n in sorted(Counter(zip(events, scenes.labels.tolist(), strict=True)).items()):
        print(f"{n:7} {event} {scenes.classes[c]}")
    sizes = ", ".join(f"{len(index)} {part}" for part, index in parts.items())
    groups = f"{len(scenes.groups.unique())} {'tiles' if scenes.tiles else 'of them without exact doubles'}"
    print(f"{len(scenes):7} pictures of {len(scenes.classes)} classes, {groups}; {sizes}")
    if any(scenes.captions):
        print(f"{sum(map(len, scenes.captions)):7} sentences, the first: {scenes.captions[0][0]}")
    rows = torch.cat([(scenes.labels == c).nonzero().flatten()[:10] for c in range(len(scenes.classes))])
    save_picture(grid(scenes.images[rows], 10), cfg.out)
    print(f"examples: {cfg.out}")


if __name__ == "__main__":
    launch(main, Script)
