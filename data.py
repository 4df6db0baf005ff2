"""Images: where they come from (class folders, captions, xBD, drawings) and how they are split.
Then what all scripts share: checkpoints, several processes, the command line.

A data set is one uint8 tensor (N, C, H, W) with a label for each image. RESISC45 at 64 px is 387 MB,
so it lives on the device as it is: a batch is an index draw, and there are no workers to wait for.
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import urllib.request
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import product
from multiprocessing import parent_process
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

PARTS = "train", "val", "test"
TRAIN, TEST, NO_PART = 0, 2, -1            # places in PARTS; -1: the data set does not say


class UserError(Exception):
    """A mistake the user can fix: what is wrong, where, what to do."""


# ---- scenes

@dataclass
class Scenes:
    """A labelled set of images."""
    images: torch.Tensor                  # (N, C, H, W) uint8
    labels: torch.Tensor                  # (N,) int64, an index into classes
    classes: list
    names: list                           # "river/river_001.jpg"
    groups: torch.Tensor                  # (N,) int64: same group, same split
    official: torch.Tensor = None         # (N,) int64, its place in PARTS, if the data set says
    tiles: bool = False                   # groups are tiles of xBD, else exact doubles
    metadata: torch.Tensor = None          # (N, M) float32, metadata; nan where unknown
    metadata_names: tuple = ()                  # M names of these metadata
    captions: list = None                 # [N]: the sentences of each image, a tuple

    def __post_init__(self):
        if self.captions is None:
            self.captions = [()] * len(self.labels)
        if self.official is None:
            self.official = torch.full_like(self.labels, NO_PART)
        if self.metadata is None:
            self.metadata = torch.zeros(len(self.labels), 0)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """Select the images at these indices, (M,) int64, or where a mask, (N,) bool, is true."""
        index = torch.arange(len(self))[index]
        tensors = {name: getattr(self, name)[index] for name in TENSORS}
        lists = {name: [getattr(self, name)[i] for i in index.tolist()] for name in ("names", "captions")}
        return replace(self, **tensors, **lists)

    def __add__(self, other):
        """Join two selections of one data set."""
        tensors = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in TENSORS}
        lists = {name: getattr(self, name) + getattr(other, name) for name in ("names", "captions")}
        return replace(self, **tensors, **lists)

    @cached_property
    def digest(self):
        """Hash names, labels, classes, captions and pixels: 12 hexadecimal digits."""
        about = repr((self.names, self.labels.tolist(), self.classes, self.images.shape,
                      *filter(None, self.captions)))
        hashed = hashlib.sha256(about.encode())
        hashed.update(self.images.contiguous().numpy())
        return hashed.hexdigest()[:12]


TENSORS = "images", "labels", "groups", "official", "metadata"


def read(root, size, skip_broken=False, pre=False, mask=False, cache="runs/cache"):
    """Read a tree: the buildings of xBD; else RGB pictures of a caption set, or of class folders."""
    root = Path(root)
    if is_xbd(root):
        return read_xbd(root, size, pre=pre, mask=mask, cache=cache)
    captions = [*root.glob("dataset*.json"), *root.glob("captions.json")]
    rows = caption_rows(captions[0], skip_broken) if captions else folder_rows(root)
    return read_rows(root, rows, size, skip_broken, cache)


def read_pictures(path, size, skip_broken=False, pre=False, mask=False, cache="runs/cache"):
    """Read the buildings of an xBD tree; or pictures of no class: one, or all in and below a folder."""
    root = Path(path)
    if is_xbd(root):
        return read_xbd(root, size, pre=pre, mask=mask, cache=cache)
    root, names = (root.parent, [root.name]) if root.is_file() else (root, below(root, "**/*"))
    if not names:
        raise UserError(f"no pictures in {root}: give one ({', '.join(SUFFIXES)}) or a folder of them")
    return read_rows(root, {name: ("", NO_PART, ()) for name in names}, size, skip_broken, cache)


# ---- pictures in files

SUFFIXES = ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif"
FORMATS = "JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF"    # none that starts a program, as EPS does


def below(root, pattern):
    """List the pictures below root that match, sorted, as "river/river_001.jpg"."""
    files = sorted(path for path in root.glob(pattern) if path.suffix.lower() in SUFFIXES)
    names = [path.relative_to(root).as_posix() for path in files]
    return [name for name in names if "/." not in f"/{name}"]            # hidden files and folders


def decode(path, size):
    """Decode the central square of a picture, reduced with antialiasing: (3, size, size) uint8."""
    with Image.open(path, formats=FORMATS) as pil:
        if pil.mode.startswith(("I", "F")):          # Pillow would cut 16 bits off at 255: all white
            raise ValueError("more than 8 bits per channel: convert it")
        pil.draft("RGB", (2 * size, 2 * size))       # a JPEG decoder reduces it, if it is larger
        upright = ImageOps.exif_transpose(pil).convert("RGB")
    square = ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC)
    return rearrange(np.array(square), "h w c -> c h w")


def decode_all(root, names, size, skip_broken=False):
    """Decode pictures on all cores -> images (n, 3, size, size) uint8, and their names."""
    def attempt(name):
        try:
            return torch.from_numpy(decode(root / name, size)), name
        except Exception as error:                   # Pillow raises a dozen kinds
            return error, name

    found = in_threads(attempt, names, f"reading {root.name}")
    whole = [pair for pair in found if torch.is_tensor(pair[0])]
    broken = [f"{root / name}: {error}" for error, name in found if not torch.is_tensor(error)]
    if broken and not (skip_broken and whole):
        raise UserError(f"{len(broken)} of {len(names)} pictures do not decode (the first: {broken[0]}): "
                      "mend or remove them, or give --skip-broken")
    for said in broken:
        print(f"skipped {said}", file=sys.stderr)
    images, names = zip(*whole, strict=True)
    return torch.stack(images), [*names]


def read_rows(root, rows, size, skip_broken=False, cache="runs/cache"):
    """Read pictures root/name, for rows {name: (class, place in PARTS, sentences)} -> Scenes.

    Exact doubles are a group. Metadata come from root/metadata.csv, if it is there.
    """
    def make():
        images, names = decode_all(root, [*rows], size, skip_broken)
        first, groups = {}, []                               # {pixels: the first image that has them}
        for k, image in enumerate(images):
            groups.append(first.setdefault(hashlib.sha256(image.numpy()).digest(), k))
        return dict(images=images, names=names, groups=torch.tensor(groups))

    files = [root / name for name in rows]
    found = cached_tree(make, root, files, cache, size=size, skip_broken=skip_broken)
    kinds, parts, captions = zip(*[rows[name] for name in found["names"]], strict=True)
    return Scenes(**found, **numbered(kinds), **read_metadata(root, found["names"]),
                  official=torch.tensor(parts), captions=[*captions])


def numbered(kinds, classes=None):
    """Number the classes of images, in this order or by name -> labels and classes of Scenes."""
    classes = classes or sorted(set(kinds))
    return dict(labels=torch.tensor([classes.index(kind) for kind in kinds]), classes=classes)


def read_metadata(root, names):
    """Read root/metadata.csv, if any: a header, then a row per picture, its name first."""
    path = root / "metadata.csv"
    if not path.exists():
        return {}
    with one_line_error(path), open(path, newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file)
        known = {row[0]: [float(cell or "nan") for cell in row[1:]] for row in rows if row}
        unknown = [math.nan] * len(header[1:])
        metadata = torch.tensor([known.get(name, unknown) for name in names])
        return dict(metadata_names=tuple(header[1:]), metadata=metadata)


def cached_tree(make, root, files, cache, **how):
    """Return make(); a copy is kept in the folder `cache` until a file or `how` changes."""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    hashed = hashlib.sha256(repr((root.resolve(), how, stats)).encode()).hexdigest()[:12]
    return cached(Path(cache) / f"{root.resolve().name}-{hashed}.pt", make)


def to_pil(image):
    """Convert (C, H, W) uint8 to PIL: RGB, or RGBA if C = 4, where the mask becomes the opacity."""
    return Image.fromarray(rearrange(image.cpu(), "c h w -> h w c").numpy())


def grid(images, columns, zoom=1):
    """Arrange (N, C, H, W) uint8 in so many columns, with white lines between: PIL."""
    images = torch.nn.functional.pad(images[:, :3].cpu(), (1, 1, 1, 1), value=255)
    gap = -len(images) % columns
    images = torch.cat([images, images.new_full((gap, *images.shape[1:]), 255)])
    whole = to_pil(rearrange(images, "(r k) c h w -> c (r h) (k w)", k=columns))
    return whole.resize((whole.width * zoom, whole.height * zoom), Image.Resampling.NEAREST)


def save_picture(pil, path, **how):
    """Save a PIL picture atomically."""
    kind, file = Image.registered_extensions().get(Path(path).suffix.lower()), io.BytesIO()
    if kind not in FORMATS:
        raise UserError(f"{path} is no name of a picture: end it in .png or .jpg")
    pil.save(file, kind, **how)
    write(path, file.getvalue())


# ---- a folder per class

ADDRESS = ("https://hf.co/datasets/isaaccorley/resisc45/resolve/"
           "883edc0eee77b2c84225472f10f126e3ed83fa6e/")
RESISC45 = {"NWPU-RESISC45.zip": "75206b2e16446591afa88e2628744886",               # file: its md5
            "resisc45-train.txt": "b5a4c05a37de15e4ca886696a85c403e",
            "resisc45-val.txt": "a0770cee4c5ca20b8c32bbd61e114805",
            "resisc45-test.txt": "3dda9e4988b47eb1de9f07993653eb08"}


def download(folder):
    """Fetch RESISC45 (Cheng et al. 2017), 427 MB, and its official lists to folder/NWPU-RESISC45."""
    tree = Path(folder) / "NWPU-RESISC45"
    for name, md5 in RESISC45.items():
        path = tree / name if name.endswith("txt") else Path(folder) / name
        if not path.exists():
            with atomic(path) as new, open(new, "wb") as file:
                shutil.copyfileobj(urllib.request.urlopen(ADDRESS + name, timeout=60), file)
        if hashlib.md5(path.read_bytes()).hexdigest() != md5:
            raise UserError(f"{path} has not the md5 {md5}: remove it, and try again")
        if name.endswith("zip"):
            shutil.unpack_archive(path, folder)
    print(f"RESISC45 is in {tree}")


def folder_rows(root):
    """List the pictures root/<class>/*, and their parts, if the lists of RESISC45 are there: read_rows."""
    names, part_of = below(root, "*/*"), {}
    if not names:
        deeper = below(root, "*/*/*")
        hint = f"; did you mean {root / deeper[0].split('/')[0]}?" if deeper else ""
        raise UserError(f"{root} has no folders with pictures, one for each class{hint}; "
                      "python data.py --help tells how to get or to draw some")
    for k, part in enumerate(PARTS):
        path = root / f"resisc45-{part}.txt"
        if path.exists():
            part_of |= dict.fromkeys(path.read_text().split(), k)
    return {name: (name.split("/")[0], part_of.get(name.split("/")[1], NO_PART), ()) for name in names}


# ---- captions: RSICD (Lu et al. 2018), UCM-Captions and Sydney (Qu et al. 2016), RSICap (Hu et al. 2025)

# The classes of UC Merced in words, as UCM-Captions numbers 100 images of each.
UC_MERCED = """agricultural, airplane, baseball diamond, beach, buildings, chaparral,
dense residential, forest, freeway, golf course, harbor, intersection, medium residential,
mobile home park, overpass, parking lot, river, runway, sparse residential, storage tanks,
tennis court""".replace("\n", " ").split(", ")


def in_words(name):
    """Write a class name as words: "denseresidential", "DenseResidential" -> "dense residential"."""
    known = {words.replace(" ", ""): words for words in UC_MERCED}
    return known.get(name) or re.sub("(?<=[a-z])(?=[A-Z])|_", " ", name).lower()


def caption_rows(path, skip_broken=False):
    """List the pictures of a caption set, in the folder of its JSON or below: read_rows."""
    kind_of = {}
    with one_line_error(path):
        content = json.loads(path.read_bytes())
        if "annotations" in content:                                     # RSICap
            found = [(a["filename"], NO_PART, [a["text_output"].strip()]) for a in content["annotations"]]
        else:                                                            # as Karpathy's MS COCO
            found = [(i["filename"], PARTS.index(i["split"]), [s["raw"].strip() for s in i["sentences"]])
                     for i in content["images"]]
        names = {name for name, *_ in found}
    for file in path.parent.glob("txtclasses*/*.txt"):                   # RSICD: a list per class
        kind_of |= dict.fromkeys(file.read_text().split(), file.stem)
    if names == {f"{n + 1}.tif" for n in range(2100)}:        # UCM-Captions
        kind_of = {f"{n + 1}.tif": UC_MERCED[n // 100].replace(" ", "") for n in range(2100)}

    there = {name.split("/")[-1]: name for name in below(path.parent, "**/*")}
    missing = [name for name, *_ in found if name not in there]
    if missing and not skip_broken:
        raise UserError(f"{len(missing)} pictures of {path} are not below its folder, {missing[0]} first: "
                      "unpack them, or give --skip-broken")
    rows = {}
    for file, part, sentences in found:
        if name := there.get(file):
            said = rows[name][2] if name in rows else ()
            rows[name] = kind_of.get(file, "scene"), part, said + tuple(sentences)
    return rows


# ---- xBD: buildings before and after a disaster (Gupta et al. 2019, arXiv 1911.09296)

FOLDERS = "train", "tier3", "test", "hold"
DAMAGE = ["no-damage", "minor-damage", "major-damage", "destroyed"]
UNKNOWN = "un-classified"                 # under a cloud, say: of no class
CONTEXT = 0.5                             # of a building's longer side, around it in its crop
MIN_SIDE, MIN_AREA = 32, 64               # of a crop and of a building, in pixels of the tile
XBD_METADATA = "longitude", "latitude", "gsd", "off_nadir_angle", "sun_elevation", "month"


def is_xbd(root):
    """Does this folder look like an xBD tree: a split with images/ and labels/ in it?"""
    return any((Path(root) / s / "images").is_dir() and (Path(root) / s / "labels").is_dir()
               for s in FOLDERS)


def read_xbd(root, size, pre=False, mask=False, cache="runs/cache"):
    """Cut a square around each classified building of an xBD tree: Scenes whose groups are tiles.

    images (N, C, size, size) are RGB after the disaster, with pre also before it, with mask at last
    the building's own mask: C is 3, 4, 6 or 7.
    """
    root, tiles = Path(root), find_tiles(Path(root))
    files = [path for tile in tiles.values() for path in tile.values()]
    how = dict(size=size, pre=pre, mask=mask)
    content = cached_tree(lambda: crop_tree(root, tiles, **how), root, files, cache, **how)
    print(content.pop("summary"))
    official = [TEST if name.startswith("test/") else NO_PART for name in content["names"]]
    return Scenes(**content, official=torch.tensor(official), tiles=True, metadata_names=XBD_METADATA)


def find_tiles(root):
    """List the files of each tile: {"train/joplin-tornado_00000050": {"post.png": path, ...}}."""
    tiles = {}
    for path in sorted(root.glob("[!.]*/*/[!.]*")):
        folder, part, name = path.parts[-3:]
        found = re.fullmatch(r"(.+_\d+)_(pre|post)_disaster\.(png|json)", name)
        if found and folder in FOLDERS and part in ("images", "labels"):
            tile, time, kind = found.groups()
            tiles.setdefault(f"{folder}/{tile}", {})[f"{time}.{kind}"] = path
    return dict(sorted(tiles.items()))


def event_of(name):
    """Return the disaster of a building: "train/joplin-tornado_00000050/<uid>" -> "joplin-tornado"."""
    return name.split("/")[1].rpartition("_")[0]


def crop_tree(root, tiles, size, pre, mask):
    """Cut all buildings of all tiles -> the fields of Scenes, and a summary of what is left out."""
    needed = {"post.json", "post.png", *["pre.png"] * pre}
    whole = [tile for tile, files in tiles.items() if needed <= files.keys()]
    found = in_threads(lambda tile: crop_tile(tile, tiles[tile], size, pre, mask), whole, "cutting buildings")
    rows = [row for some, _ in found for row in some]
    left_out = Counter({"tiles without all files": len(tiles) - len(whole)})
    left_out.update(reason for _, reasons in found for reason in reasons)
    reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items() if n) or "nothing"
    summary = f"{root.name}: {len(rows)} buildings of {len(whole)} tiles; left out: {reasons}"
    if not rows:
        raise UserError(f"{summary}: give images and labels of the same split, side by side")
    images, names, kinds, metadata = zip(*rows, strict=True)
    tile_of = [name.split("/")[1] for name in names]         # one that is in two splits is one group
    place = {tile: k for k, tile in enumerate(dict.fromkeys(tile_of))}
    return dict(images=torch.stack(images), names=[*names], metadata=torch.tensor(metadata),
                groups=torch.tensor([place[tile] for tile in tile_of]), summary=summary,
                **numbered(kinds, DAMAGE))


def crop_tile(tile, files, size, pre, mask):
    """Cut the buildings of a tile -> [(image, name, class, metadata)], [why another was left out]."""
    polygons, extent, metadata = read_label(files["post.json"])
    usable, boxes, left_out = [], [], []
    for uid, subtype, rings in polygons:
        if subtype in DAMAGE and area(rings) >= MIN_AREA:
            usable.append((uid, subtype, rings))
            boxes.append(crop_square(rings[0]))
        else:
            left_out.append("too small" if subtype in DAMAGE else str(subtype))
    if not usable:                                           # many tiles have no building to decode for
        return [], left_out

    margin = 1 + math.ceil(max(0, -np.min(boxes), (np.array(boxes)[:, 2:] - extent).max()))
    pictures = [tile_picture(files[f"{time}.png"], extent, margin) for time in ("post", "pre")[:1 + pre]]
    rows = []
    for (uid, subtype, rings), box in zip(usable, boxes, strict=True):
        where = [*(box + margin)]
        parts = [pil.resize((size, size), Image.Resampling.BICUBIC, box=where) for pil in pictures]
        parts += [draw_mask(rings, box, size)] * mask
        image = torch.from_numpy(rearrange(np.concatenate(parts, 2), "h w c -> c h w"))
        rows.append((image, f"{tile}/{uid}", subtype, metadata))
    return rows, left_out


def crop_square(outline):
    """Find the square to cut for a building (n, 2): left, top, right, bottom; it may leave the tile."""
    low, high = outline.min(0), outline.max(0)
    middle, half = (low + high) / 2, max((high - low).max() * (1 + 2 * CONTEXT), MIN_SIDE) / 2
    return np.concatenate([middle - half, middle + half])


def tile_picture(path, extent, margin):
    """Decode the picture of a tile, mirrored beyond its edges: buildings there are amid their crops, too."""
    with one_line_error(path), Image.open(path, formats=FORMATS) as pil:
        if pil.size != extent:
            raise ValueError(f"it has {pil.size} pixels, its label says {extent}")
        pixels = np.asarray(pil.convert("RGB"))
    return Image.fromarray(np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), "reflect"))


def read_label(path):
    """Read a label -> polygons [(uid, subtype, rings)], (width, height), XBD_METADATA.

    Lengths are in pixels (metadata.gsd is of another band); points off the tile move to its edge.
    """
    with one_line_error(path):
        content = json.loads(path.read_bytes())
        about, features = content["metadata"], content["features"]
        extent = about["width"], about["height"]
        polygons = [(p["properties"]["uid"], p["properties"].get("subtype"),
                     [ring.clip(0, extent) for ring in wkt_polygon(p["wkt"])]) for p in features["xy"]]
        places = features.get("lng_lat")
        place = wkt_polygon(places[0]["wkt"])[0].mean(0) if places else (math.nan, math.nan)
        known = [*place, *map(about.get, XBD_METADATA[2:5]), (about.get("capture_date") or "")[5:7] or None]
        metadata = [math.nan if value is None else float(value) for value in known]
        return polygons, extent, metadata


def wkt_polygon(text):
    """Parse "POLYGON ((x y, ...), (x y, ...))" -> its rings, (n, 2): the outline, then the holes."""
    found = re.findall(r"\(([^()]+)\)", text) if text.strip().startswith("POLYGON") else []
    rings = [np.array([point.split() for point in ring.split(",")], float) for ring in found]
    if not rings or any(ring.shape[1] != 2 or not np.isfinite(ring).all() for ring in rings):
        raise ValueError(f"{text[:50]!r} is no polygon in WKT")
    return rings


def area(rings):
    """Measure the square pixels within the outline and outside of the holes (shoelace formula)."""
    sizes = [abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2 for x, y in (ring.T for ring in rings)]
    return sizes[0] - sum(sizes[1:])


def draw_mask(rings, box, size):
    """Draw rings [(n, 2)] in a square box (left, top, right, bottom): (size, size, 1), 255 inside, else 0.

    Inside are the centres whose line to the left edge crosses the rings an odd number of times.
    (Pillow's polygon draws the outline too: a house 12 pixels wide gains 4 to 8 % in area.)
    """
    centre, inside = np.arange(size) + 0.5, np.zeros((size, size), bool)
    for ring in rings:
        points = (ring - box[:2]) * size / (box[2] - box[0])
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
            if y0 != y1:
                meets = (y0 <= centre) != (y1 <= centre)                 # rows that this side crosses,
                at = x0 + (centre - y0) * (x1 - x0) / (y1 - y0)          # and where
                inside ^= meets[:, None] & (centre >= at[:, None])
    return np.where(inside, 255, 0).astype(np.uint8)[..., None]


# ---- which images to train on

def split(scenes, seed=0, hold_out=""):
    """Split into train, val and test, {name: (n,) int64 indices}. No group is ever cut.

    Parts that the data set gives are kept, and of doubles in several of them only those in test, or
    else in val; an event held out is test instead. Unless train is given too, the other groups are cut
    3 : 1 : 1 by seed, or 3 : 1 beside a given test: class by class, but tiles all together.
    """
    official = scenes.official
    if hold_out:
        events = [event_of(name) if scenes.tiles else "" for name in scenes.names]
        if hold_out not in events:
            known = ", ".join(sorted({*events})) or "none but in an xBD tree"
            raise UserError(f"--hold-out {hold_out}: no such event; there are {known}")
        official = torch.tensor([TEST if event == hold_out else NO_PART for event in events])
    ours = TRAIN not in official                         # are the images without a part ours to place?
    _, first, group = map(torch.from_numpy, np.unique(scenes.groups, return_index=True,
                                                      return_inverse=True))
    part = torch.full_like(first, NO_PART).scatter_reduce(0, group, official, "amax")    # of each group
    shares = (0.6, 0.2) if TEST in part else (0.6, 0.2, 0.2)
    free = (part == NO_PART).nonzero().flatten()
    for pool in shuffled(scenes, free, first[free], seed).values() if ours else ():
        cuts = [round(len(pool) * sum(shares[:k]) / sum(shares)) for k in range(1, len(shares))]
        for k, chunk in enumerate(pool.tensor_split(cuts)):
            part[chunk] = k
    kept = (official == part[group]) | ((official == NO_PART) & ours)
    parts = {name: (kept & (part[group] == k)).nonzero().flatten() for k, name in enumerate(PARTS)}
    if empty := [name for name, index in parts.items() if len(index) == 0]:
        raise UserError(f"too few images for a {empty[0]} split ({len(scenes)} in all): five per class "
                      "will do")
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
        raise UserError(f"{count} asked for, but there are {short[0]} to train on: ask for fewer")
    chosen = torch.cat([pool[:count or None] for pool in pools.values()])
    if scenes.tiles:
        chosen = index[torch.isin(tiles, chosen)]
    if absent := [name for c, name in enumerate(scenes.classes) if c not in scenes.labels[chosen]]:
        raise UserError(f"no image to train on is {absent[0]}: ask for more, or hold out another event")
    return chosen


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


def curve(rng, bend=0.0, level=0.0, angle=0.0, start=-3.0):
    """Draw a line (90, 2) from u = start out of the picture, about v = level, then turned by the angle."""
    u = np.linspace(start, 3, 90)
    v = level + sum(rng.normal(0, bend / k) * np.sin(k * rng.uniform(1, 2) * u + rng.uniform(0, 6))
                    for k in (1, 2, 4))
    return np.stack([u, v], 1) @ rotation(angle)


class Canvas:
    """A picture of land at twice its size; points (n, 2), about -1..1, are pixels points @ axes + origin."""

    def __init__(self, rng, size, land):
        self.rng = rng
        self.image = Image.new("RGB", (2 * size, 2 * size))
        self.pen = ImageDraw.Draw(self.image, "RGBA")
        self.scale = rng.uniform(0.75, 1.25)
        self.axes = size * self.scale * rotation(rng.uniform(0, 2 * np.pi))
        self.origin = size * rng.uniform(0.75, 1.25, 2)
        self.shadow = rng.uniform(0.5, 1.3) * CIRCLE[rng.integers(32)]         # cast by one unit of height
        noise = [Image.fromarray(rng.standard_normal((n, n), np.float32)) for n in (4, 11, 37, 101)]
        self.texture = sum(np.asarray(x.resize((size, size), Image.BICUBIC)) / x.width ** 0.3 for x in noise)
        self.paint(4 * SQUARE, land)

    def paint(self, outline, colours, vary=8):
        """Fill a polygon (n, 2) with one of the colours, whose brightness varies by so many grey levels."""
        chosen = colours[self.rng.integers(len(colours))]
        shift = vary * (self.rng.standard_normal() + self.rng.standard_normal(3) / 3)
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

    def render(self):
        """Return the picture at its final size, with texture, under some light and haze: PIL RGB."""
        pixels = np.asarray(self.image.reduce(2), np.float32)
        pixels *= 1 + self.rng.uniform(0.03, 0.09) * self.texture[..., None]
        contrast, self.light = self.rng.uniform(0.75, 1.2), self.rng.uniform(-22, 22)
        pixels = 115 + contrast * (pixels - 112) + self.light
        self.haze = self.rng.uniform(0, 0.25)
        pixels += self.haze * (np.array([190, 198, 206]) - pixels)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def beach(c, rng):
    """Paint sand, water, and the waves that break."""
    shore, sea = curve(rng, 0.16, rng.uniform(-0.4, 0.3)), [(3, 4), (-3, 4)]
    c.paint([*(shore - [0, rng.uniform(0.15, 0.7)]), *sea], SAND)
    c.paint([*shore, *sea], WATER)
    for reach in np.cumsum(rng.uniform(0.03, 0.15, rng.integers(1, 4))):
        c.strip(shore + [0, reach], rng.uniform(0.01, 0.03), FOAM)


def circular_farmland(c, rng):
    """Paint round fields, each with its watering arm, on square ones."""
    radius = rng.uniform(0.45, 0.95)
    for cell in [(0, 0), (1, 0), (0, 1), (1, 1)][:rng.choice([1, 1, 2, 4])]:
        middle = 2.15 * radius * np.array(cell)
        rim = middle + radius * CIRCLE
        c.paint(middle + 1.04 * radius * SQUARE, LAND)
        c.paint(rim, LAND)
        c.paint([middle, *rim[:rng.integers(2, 33)]], LAND)                     # a sector of another crop
        c.dashes(middle, rim[rng.integers(32)], 1, 0.012, part=1)


def dense_residential(c, rng):
    """Paint rows of houses along parallel streets."""
    plot, block = rng.uniform(0.3, 0.45), rng.uniform(0.38, 0.5)
    for v in 2 * block * np.arange(-2, 3):
        c.strip(curve(rng, level=v), 0.06, PAVING)
        for u, side in product(np.arange(-1.5, 1.5, plot), (-0.55, 0.55)):
            half = rng.uniform((0.3 * plot, 0.25 * block), (0.46 * plot, 0.36 * block))
            c.solid((u, v + side * block), half * SQUARE, ROOFS)


def forest(c, rng):
    """Paint crowns beside crowns, perhaps up to an edge."""
    size, edge = rng.uniform(0.12, 0.2), curve(rng, 0.3, rng.choice([0.5, 0.9, 3]))
    c.paint([*edge, (3, -4), (-3, -4)], [(30, 44, 24, 190)])
    for u, v in rng.uniform(-1.5, 1.5, (int(3 / size ** 2), 2)):
        if v < np.interp(u, *edge.T):
            c.solid((u, v), size * rng.uniform(0.6, 1.3) * CIRCLE[::3], CROWNS, size)


def intersection(c, rng):
    """Paint two roads that cross, or a T, with lane marks and cars."""
    half, turn = rng.uniform(0.16, 0.28), rng.uniform(0.7, 2.4)
    roads = [curve(rng), curve(rng, angle=turn, start=rng.choice([-3, -3, 0]))]          # 0: a T
    for kerb, colours in ((0.04, PAVING[1:]), (0, [PAVING[rng.integers(3)]])):
        for road in roads:
            c.strip(road, half + kerb, colours)
    for road, angle in zip(roads, (0, turn), strict=True):
        lane = half / 2 * rotation(angle)[1]
        c.dashes(road[0], road[-1], 24, 0.015)
        c.dashes(road[0] + lane, road[-1] + lane, rng.integers(8, 20), 0.03, CARS, 0.2)


def river(c, rng):
    """Paint a winding band of water between its banks."""
    line = curve(rng, rng.uniform(0.15, 0.36))
    half = rng.uniform(0.12, 0.27) * (1 + 0.35 * np.sin(rng.uniform(1, 3) * line[:, 0]))
    c.strip(line, half + rng.uniform(0.01, 0.14), LAND + SAND)
    c.strip(line, half, WATER)


def runway(c, rng):
    """Paint a marked strip in mown grass, perhaps with its end."""
    half, end = rng.uniform(0.16, 0.3), rng.choice([-3, -1, -0.6])
    c.strip(curve(rng), half + rng.uniform(0.15, 0.4), LAND)
    c.strip(curve(rng, start=end - 0.1), half, PAVING)
    c.dashes((end + 0.4, 0), (3, 0), 9, 0.022)
    c.dashes((end + 0.2, -0.8 * half), (end + 0.2, 0.8 * half), 7, 0.12)         # the threshold


def storage_tank(c, rng):
    """Paint one, four or nine round tanks in rows."""
    n, lid = rng.integers(1, 4), [LIDS[rng.integers(3)]]
    radius = rng.uniform(0.55, 0.8) / n
    pitch = radius * rng.uniform(2.2, 2.7)
    c.paint(n * pitch * 0.54 * SQUARE, PAVING + LAND + SAND)
    for cell in np.ndindex(n, n):
        c.solid((np.array(cell) - (n - 1) / 2) * pitch, radius * CIRCLE, lid, 0.4 * radius)


SCENES = {paint.__name__: paint for paint in (beach, circular_farmland, dense_residential, forest,
                                              intersection, river, runway, storage_tank)}


def draw_scene(name, rng, size=128):
    """Draw one scene of a class of SCENES by rng, a numpy Generator: PIL RGB, its scale, light and haze."""
    c = Canvas(rng, size, LAND)
    # What may lie anywhere: a field, a house, a group of trees.
    for _ in range(rng.poisson(0 if name in ("dense_residential", "forest") else 1)):
        c.paint(rng.uniform(-1.2, 1.2, 2) + rng.uniform(0.25, 0.9, 2) * SQUARE, LAND)
        c.solid(rng.uniform(-1.2, 1.2, 2), rng.uniform(0.04, 0.16, 2) * SQUARE, ROOFS)
        for spot in rng.normal(rng.uniform(-1.2, 1.2, 2), 0.2, (rng.integers(1, 14), 2)):
            c.solid(spot, rng.uniform(0.02, 0.07) * CIRCLE[::3], CROWNS)
    SCENES[name](c, rng)
    return c.render(), (c.scale, c.light, c.haze)


def draw_tree(root, per_class, seed=0, size=128):
    """Draw root/<class>/<class>_001.jpg ... by (seed, class, k), and metadata.csv, unless root is there."""
    root, new, rows = Path(root), Path(f"{root}.part"), []   # the latter of a run that was killed: drawn over
    if root.exists():
        return root
    for name, k in progress([*product(SCENES, range(1, per_class + 1))], "drawing scenes"):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), k])
        pil, metadata = draw_scene(name, rng, size)
        save_picture(pil, new / name / f"{name}_{k:03d}.jpg", quality=90)
        rows.append((f"{name}/{name}_{k:03d}.jpg", *map(float, metadata)))
    save_csv(new / "metadata.csv", ("picture", "scale", "light", "haze"), rows)
    return new.replace(root)


# Disasters: of each event its type, its land, and per cent of each class of DAMAGE and of UNKNOWN.
EVENTS = {"drawn-hurricane": ("wind", [LAND[0], LAND[1]], (52, 29, 9, 7, 3)),
          "drawn-flood": ("flooding", [LAND[3], LAND[5]], (73, 5, 16, 3, 3)),
          "drawn-wildfire": ("fire", [LAND[1], LAND[4]], (76, 1, 2, 18, 3)),
          "drawn-earthquake": ("earthquake", [LAND[2], LAND[4]], (94, 1, 1, 1, 3))}
LOT = 48                                                 # pixels from house to house
HOLE, FLOOD, CLOUD = [(44, 38, 34), (72, 62, 54)], [(122, 98, 66, 170)], [(236, 238, 242, 215)]
RUBBLE, SOIL, ASH = [(196, 190, 180), (150, 138, 124), (60, 54, 50)], [(128, 112, 90)], [(52, 46, 44)]


def draw_damage(c, rng, damage, kind):
    """Paint over a house, the square of -1..1, what a disaster of this kind has done to it."""
    def scatter(count, reach, half, colours):
        for spot in rng.uniform(-reach, reach, (count, 2)):
            c.paint(spot + rng.uniform(0.5, 1, 2) * half * SQUARE, colours)

    scatter(rng.integers(5), 1.7, 0.12, RUBBLE)                                 # blown here from elsewhere
    if damage == "minor-damage":                                                 # tiles are off
        scatter(rng.integers(2, 6), 0.7, 0.25, HOLE)
    elif damage == "major-damage" and kind == "flooding":                        # it stands in the water
        c.strip(rng.uniform(1.4, 1.7) * CIRCLE, 0.4, FLOOD)
    elif damage == "major-damage":                                               # a part of the roof is gone
        part = SQUARE.clip((rng.uniform(-0.3, 0.3), -1))
        c.paint(part @ rotation(np.pi / 2 * rng.integers(4)), HOLE)
        scatter(8, 1.2, 0.15, RUBBLE)
    elif damage == "destroyed":
        c.paint(rng.uniform(1.3, 1.6) * CIRCLE, ASH if kind == "fire" else SOIL)
        scatter(rng.integers(15, 40), 1, 0.2, RUBBLE)
    elif damage == UNKNOWN:
        c.paint(1.5 * CIRCLE, CLOUD)


def draw_tile(event, rng, side):
    """Draw a tile, side x side pixels, before and after an event: two of PIL RGB, and its label, a dict."""
    kind, land, mix = EVENTS[event]
    c = Canvas(rng, side, land)
    for spot in rng.uniform(-1.5, 1.5, (side // 12, 2)):
        c.paint(spot + rng.uniform(0.05, 0.4, 2) * SQUARE, land)
    for spot in rng.uniform(-1.5, 1.5, (side // 6, 2)):
        c.solid(spot, rng.uniform(0.02, 0.05) * CIRCLE[::3], CROWNS)
    lots = LOT * np.argwhere(np.ones((side // LOT + 1, side // LOT + 1))) + rng.uniform(0, LOT, 2)
    lots = lots[(lots < side).all(1)]                                            # a house may cross the edge
    turn, houses, polygons = rng.uniform(0, np.pi / 2), [], []
    for k, spot in enumerate(rng.permutation(lots)[:rng.integers(len(lots) + 1)]):
        axes = rng.uniform(9, 17, (2, 1)) * rotation(turn + rng.normal(0, 0.05))
        damage = [*DAMAGE, UNKNOWN][rng.choice(5, p=np.array(mix) / 100)]
        houses.append((2 * axes, 2 * spot, damage))
        ring = ", ".join(f"{x} {y}" for x, y in spot + SQUARE[[0, 1, 2, 3, 0]] @ axes)
        polygons.append(dict(properties=dict(uid=str(k), subtype=damage), wkt=f"POLYGON (({ring}))"))
        c.axes, c.origin = 2 * axes, 2 * spot                                    # -1..1 is now this house
        c.solid(0, SQUARE, ROOFS, 0.3)
    before = c.render()                                                      # the rest is painted over it
    for axes, origin, damage in houses:
        c.axes, c.origin = axes, origin
        draw_damage(c, rng, damage, kind)
    about = dict(disaster=event, disaster_type=kind, width=side, height=side,
                 sun_elevation=math.degrees(math.atan2(1, np.hypot(*c.shadow))))
    return before, c.render(), dict(features=dict(xy=polygons), metadata=about)


def draw_xbd(root, tiles=24, seed=0, side=256):
    """Draw tiles as an xBD tree, a quarter in test, each by (seed, k), unless root is there."""
    root, new = Path(root), Path(f"{root}.part")
    if root.exists():
        return root
    for k in progress(range(tiles), "drawing disasters"):
        event = list(EVENTS)[k % len(EVENTS)]
        folder = new / ("test" if k // len(EVENTS) % 4 == 3 else "train")
        before, after, label = draw_tile(event, np.random.default_rng([seed, k]), side)
        name = f"{event}_{k:08d}"
        save_picture(before, folder / f"images/{name}_pre_disaster.png", compress_level=1)
        save_picture(after, folder / f"images/{name}_post_disaster.png", compress_level=1)
        write(folder / f"labels/{name}_post_disaster.json", json.dumps(label))
    return new.replace(root)


# ---- shared by all scripts: numbers, and one step of training

def rng(*key, device="cpu"):
    """Make a torch generator seeded by a key of integers, e.g. (seed, step): no state has to be saved."""
    hashed = np.random.SeedSequence((len(key), *key)).generate_state(1)  # torch's CPU seeds have 32 bits
    return torch.Generator(device).manual_seed(int(hashed[0]))


def to_float(images):
    """Turn uint8 into float in [-1, 1]."""
    return (images / 127.5).sub_(1)


def to_uint8(x):
    """Turn float in [-1, 1] into uint8. Rounds: truncation would darken images by half a level, a cue."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def pick_device():
    """Return the fastest device on this machine (with several processes, "cuda" is the process's own)."""
    return torch.device("cuda" if torch.cuda.is_available() else
                        "mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device):
    """Compute in bfloat16 where it pays, on a GPU: the range of float32, so no gradient scaler."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def lr_at(step, cfg):
    """Return the learning rate of a step: up linearly for cfg.warmup steps, then down to 0 along a cosine."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - cfg.warmup) / (cfg.steps - cfg.warmup)))


def check_finite(model, loss, step):
    """Raise UserError if training went astray, before such weights are kept."""
    if not math.isfinite(loss) or not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"the loss is {loss:.3g} at step {step}, or a weight is not finite: lower --lr")


# ---- shared by all scripts: files, each there whole or not at all

@contextmanager
def atomic(path):
    """Yield a temporary name beside path: its file takes path's place, but not after an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path, content):
    """Write bytes, or text as UTF-8, atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def save_csv(path, header, rows):
    """Write a CSV atomically."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write(path, text.getvalue())


def save(path, content):
    """Write what torch.save() takes, atomically."""
    with atomic(path) as temporary:
        torch.save(content, temporary)


def load(path, mmap=False):
    """Read what save() wrote. Nothing in the file is executed."""
    with one_line_error(path):
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)


def cached(path, make):
    """Return make(): read from the file path if it is there and loads, else made and kept there."""
    if Path(path).exists():
        try:
            return load(path, mmap=True)                     # several processes share its memory
        except UserError:
            print(f"{path} does not load: it is made again", file=sys.stderr)
    save(path, make())
    return load(path, mmap=True)


@contextmanager
def one_line_error(path):
    """Turn any error while a file is read, of which there are dozens, into a UserError that names it."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:100]}"             # torch.load would say a page
        raise UserError(f"{path} cannot be read ({said}): mend it, remove it, or give another") from error


def save_checkpoint(path, kind, identity, step, parts, **more):
    """Save all of a run: what it is (kind, identity), how far it is (step), the state of its parts."""
    states = {name: part.state_dict() for name, part in parts.items()}
    save(path, {"kind": kind, **identity, "step": step, **states, **more})


def load_checkpoint(path, *kinds):
    """Load what save_checkpoint wrote, if it is of one of these kinds."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: train one first, or give another path")
    content = load(path)
    if not isinstance(content, dict) or content.get("kind") not in kinds:
        raise UserError(f"{path} is not the checkpoint of a {' or '.join(kinds)}: give another path")
    return content


def resume(path, kind, identity, parts, fresh):
    """Give the parts {name: module or optimizer} the state they had in the checkpoint. -> it, or fresh.

    fresh: of a run that begins, {name: what else is in a checkpoint}. UserError if its identity is another.
    """
    if not path or not Path(path).exists():
        return fresh
    saved = load_checkpoint(path, kind)
    old, new = ({**about, **about["config"], "config": None} for about in (saved, identity))
    if differ := [name for name in new if old.get(name) != new[name]]:
        raise UserError(f"{path} is of a run with another {preview(differ)}: give another --out, or remove it")
    with one_line_error(path):
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    return saved


# ---- shared by all scripts: several processes, by torchrun --nproc-per-node N SCRIPT.py ...
# Every process trains the same weights: it draws its own share of each batch, the gradients are averaged
# over the processes, and process 0 alone writes files and prints.

def join_processes():
    """Join the processes that torchrun started, if it did."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if rank():
            sys.stdout = open(os.devnull, "w")


def rank():
    """Return the number of this process: 0 writes and talks."""
    return dist.get_rank() if dist.is_initialized() else 0


def own_share(batch):
    """Return how many images of a batch this process draws."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return max(1, batch // world)


def step_rng(seed, step, device):
    """Return the random numbers of a training step, which differ from process to process."""
    return rng(seed, step, *[rank()] * (rank() > 0), device=device)


def average_gradients(model):
    """Replace each gradient by its mean over all processes, that of the whole batch."""
    if dist.is_initialized():
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()


# ---- shared by all scripts: several tasks at a time

def progress(items, title, *args, **how):
    """Iterate with a progress bar, in the first process alone; in a log with a line per minute."""
    if not sys.stderr.isatty():
        form = "{desc}: {n_fmt} of {total_fmt}, {remaining} to go\n"
        how |= dict(bar_format=form, delay=60, mininterval=60, maxinterval=600, leave=True)
    return tqdm(items, title, *args, disable=bool(rank() or parent_process()), **{"leave": False} | how)


def in_threads(work, items, title):
    """Return [work(item) for item in items], on all cores: Pillow lets go of the GIL while it decodes."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(progress(threads.map(work, items), title, len(items)))


# ---- shared by all scripts: the command line

def flag(default, help, least=-math.inf, most=math.inf, choices=()):
    """Declare a field of a Config and its --flag."""
    help += f": {', '.join(choices)}" * bool(choices)
    return field(default=default, metadata=dict(help=help, least=least, most=most, choices=choices))


@dataclass
class Settings:
    """What all Configs have in common: a value out of its range, or not of its choices, is a ValueError."""

    def __post_init__(self):
        for f in fields(self):
            value, least, most = getattr(self, f.name), f.metadata["least"], f.metadata["most"]
            for v in value if isinstance(value, tuple) else (value,):
                if isinstance(v, int | float) and not least <= v <= most:            # nan is not, either
                    raise ValueError(f"{spelled(f)} {v}: give one of {least} to {most}")
            if value and f.metadata["choices"] and value not in f.metadata["choices"]:
                raise ValueError(f"{spelled(f)} {value}: known are {', '.join(f.metadata['choices'])}")


def settings_of(cfg, config):
    """Return the fields of the dataclass `config` in cfg, which may have more, as a dict."""
    return {f.name: getattr(cfg, f.name) for f in fields(config)}


def spelled(f):
    """Return a field's flag."""
    return "--" + f.name.replace("_", "-")


def integers(text):
    """Parse "10,40" -> (10, 40)."""
    return tuple(int(part) for part in text.split(","))


def listed(text):
    """Parse "a, b" -> ["a", "b"], and "" -> []."""
    return [name.strip() for name in text.split(",") if name.strip()]


def preview(things):
    """List the first three, for a message."""
    texts = [str(thing) for thing in things]
    return ", ".join(texts[:3]) + " ..." * (len(texts) > 3)


def launch(main, config, argv=None):
    """Run main(config of these flags). A mistake is one line and exit code 2."""
    title = sys.modules[main.__module__].__doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=title, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def refuse(said):                                                    # in a line, without the usage
        parser.exit(2, f"{parser.prog}: {' '.join(str(said).split())}\n")

    parser.error = refuse
    for f in fields(config):
        kind = float if f.default is None else type(f.default)           # float | None
        how = dict(action="store_true") if kind is bool else dict(type=integers if kind is tuple else kind)
        parser.add_argument(spelled(f), default=f.default, help=f.metadata["help"], **how)
    try:
        cfg = config(**vars(parser.parse_args(argv)))                    # its __post_init__ checks values
    except ValueError as error:
        refuse(error)
    signal.signal(signal.SIGTERM, signal.default_int_handler)            # ends like Ctrl-C
    try:
        tree = getattr(cfg, "data", "")
        if tree and Path(cfg.out).resolve().is_relative_to(Path(tree).resolve()):
            raise UserError(f"--out {cfg.out} would be read as a part of {tree}: give a folder elsewhere")
        join_processes()
        return main(cfg)
    except (UserError, OSError) as error:
        refuse(error)
    except (MemoryError, RuntimeError) as error:                         # RuntimeError: torch's, on a CPU
        if type(error) is RuntimeError and "allocate memory" not in str(error):
            raise
        refuse("out of memory: lower --batch, --size or --jobs")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on where it was\n")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- python data.py --data TREE: what is there

@dataclass
class Script(Settings):
    """The flags of this script."""
    data: str = flag("data/NWPU-RESISC45", "tree with a folder per class, caption set or xBD tree")
    size: int = flag(64, "side to which the pictures are reduced", 1, 1024)
    draw: int = flag(0, "first draw so many scenes per class, or with --xbd tiles, into it", 0)
    xbd: bool = flag(False, "with --draw: an xBD-shaped tree")
    download: str = flag("", "first fetch RESISC45 into this folder: data makes data/NWPU-RESISC45")
    out: str = flag("runs/data.png", "where a sheet of examples goes")
    skip_broken: bool = flag(False, "leave out pictures that do not decode")


def main(cfg):
    """Count what there is in a tree, and show it."""
    if cfg.download:
        download(cfg.download)
    if cfg.draw:
        if Path(cfg.data).exists():
            raise UserError(f"{cfg.data} is there already: draw into a new folder")
        (draw_xbd if cfg.xbd else draw_tree)(cfg.data, cfg.draw)
    scenes = read(cfg.data, cfg.size, cfg.skip_broken)
    for c, n in enumerate(scenes.labels.bincount(minlength=len(scenes.classes)).tolist()):
        print(f"{n:7} {scenes.classes[c]}")
    sizes = ", ".join(f"{len(index)} {part}" for part, index in split(scenes).items())
    groups = f"{len(scenes.groups.unique())} {'tiles' if scenes.tiles else 'without exact doubles'}"
    print(f"{len(scenes):7} images of {len(scenes.classes)} classes, {groups}; {sizes}")
    if any(scenes.captions):
        print(f"{sum(map(len, scenes.captions)):7} sentences, the first: {scenes.captions[0][0]}")
    rows = [(scenes.labels == c).nonzero().flatten()[:10] for c in range(len(scenes.classes))]
    save_picture(grid(scenes.images[torch.cat(rows)], 10), cfg.out)
    print(f"examples: {cfg.out}")


if __name__ == "__main__":
    launch(main, Script)
