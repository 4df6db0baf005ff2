"""Images: how they are split, and where they come from (class folders, captions, xBD, drawings).
Then the tools that all scripts share: files, checkpoints, processes, the command line.

A data set is one uint8 tensor (N, C, H, W) with a label for each image. It lives on the device as
it is (RESISC45 at 64 px: 387 MB), so a batch is an index draw, and there are no loading processes.
`grep "^# ----" data.py` lists the sections of this file.
"""
import argparse
import csv
import glob
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
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
from PIL import Image, ImageColor, ImageDraw, ImageOps
from tqdm import tqdm

PARTS = "train", "val", "test"
TRAIN, TEST, NO_PART = 0, 2, -1          # places in PARTS; -1: the data set names no part
NO_PRINTS = torch.zeros(0, dtype=torch.uint8)            # no fingerprints, see fingerprint()


class UserError(Exception):
    """A mistake that the user can fix: the message says what is wrong, where, and what to do."""


# ---- Scenes: a labelled set of images

@dataclass
class Scenes:
    """N images with their labels."""
    images: torch.Tensor                 # (N, C, H, W) uint8
    labels: torch.Tensor                 # (N,) int64, places in classes
    classes: list                        # the names of the classes
    names: list                          # of each image, such as "river/river_001.jpg"
    groups: torch.Tensor                 # (N,) int64: images of one group go into the same part
    official: torch.Tensor = None        # (N,) int64, places in PARTS, or NO_PART
    tiles: bool = False                  # the groups are the tiles of xBD, else duplicates
    metadata: torch.Tensor = None        # (N, M) float32, nan where unknown: of xBD, XBD_METADATA
    captions: list = None                # of each image, a tuple of sentences
    tile_prints: torch.Tensor = NO_PRINTS        # (T, 192): the fingerprint of each group of tiles
    generator_saw: torch.Tensor = NO_PRINTS      # (S, 192): fingerprints, if they are synthetic

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
        """Select images by their indices, (M,) int64, or by a mask, (N,) bool."""
        index = torch.arange(len(self))[index]
        per_image = "images", "labels", "groups", "official", "metadata"
        tensors = {name: getattr(self, name)[index] for name in per_image}
        names = [self.names[k] for k in index.tolist()]
        captions = [self.captions[k] for k in index.tolist()]
        return replace(self, **tensors, names=names, captions=captions)

    @cached_property
    def digest(self):
        """A hash of all but groups and parts: 12 hexadecimal digits."""
        text = repr((self.names, self.labels.tolist(), self.classes, self.images.shape,
                     *filter(None, self.captions)))
        hashed = hashlib.sha256(text.encode())
        hashed.update(self.images.contiguous().numpy())
        hashed.update(self.metadata.numpy().tobytes())
        return hashed.hexdigest()[:12]

    def prints(self):
        """Return the fingerprints of the images, then those of their tiles: (N or 2 N, 192)."""
        tiles = self.tile_prints[self.groups] if self.tiles else NO_PRINTS
        return torch.cat([fingerprint(self.images), tiles])

    def seen(self):
        """Return the fingerprints of all that a network sees by training on these images."""
        return torch.cat([self.prints(), self.generator_saw]).unique(dim=0)


# ---- split: how images get into train, val and test; and choose: some of them to train on

def split(scenes, seed=0, hold_out=""):
    """Split into train, val and test: {"train": (n,) int64 indices, "val": ..., "test": ...}.

    Official parts are kept (of xBD test/ and hold/). A group (duplicates, or the buildings of a
    tile) is never cut. Other groups are divided 3 : 1 : 1 by seed, or 3 : 1 if there is a test
    part: images within each class, tiles at random. With a train part they are left out instead.
    hold_out, a disaster of xBD, becomes the test part; the rest, also of test/, is train and val.
    """
    official = scenes.official
    if hold_out:
        tiles = [name.split("/")[1] if scenes.tiles else "" for name in scenes.names]
        events = [tile.rpartition("_")[0] for tile in tiles]         # joplin-tornado_00000050
        if hold_out not in events:
            known = ", ".join(sorted(set(events))) or "none but in an xBD tree"
            raise UserError(f"--hold-out {hold_out}: no such event; there are {known}")
        official = torch.tensor([TEST if event == hold_out else NO_PART for event in events])

    # The part of each group: if its images are in several, test beats val, and val beats train.
    # That is the largest of NO_PART = -1, train = 0, val = 1, test = 2.
    groups = scenes.groups.tolist()
    part_of, first_of = {}, {}                           # of each group: its part, its first image
    for image, part in enumerate(official.tolist()):
        group = groups[image]
        part_of[group] = max(part, part_of.get(group, NO_PART))
        first_of.setdefault(group, image)

    divide_rest = TRAIN not in official
    if divide_rest:
        free = [group for group in sorted(part_of) if part_of[group] == NO_PART]
        first = torch.tensor([first_of[group] for group in free]).long()
        whole = 0.8 if TEST in official else 1.0         # 3 : 1, or 3 : 1 : 1
        for pool in shuffled(scenes, torch.tensor(free).long(), first, seed):
            ends = [round(len(pool) * share / whole) for share in (0.6, 0.8)]
            for part, chunk in enumerate(pool.tensor_split(ends)):
                part_of |= dict.fromkeys(chunk.tolist(), part)

    part = torch.tensor([part_of[group] for group in groups])            # now for each image
    kept = (official == part) | ((official == NO_PART) & divide_rest)    # no duplicate across parts
    parts = {name: (kept & (part == k)).nonzero().flatten() for k, name in enumerate(PARTS)}
    unused = (~kept | (part == NO_PART)).nonzero().flatten().tolist()
    if unused:
        names = [scenes.names[k] for k in unused]
        print(f"left out {len(names)} of {len(scenes)} images, which are in no part, or duplicates "
              f"of val or test images: {preview(names)}")
    check_classes(scenes, parts["train"])
    for name, index in parts.items():
        if len(index) == 0:
            raise UserError(f"too few images for a {name} split: five per class will do")
        if names := lacking(scenes, index):
            print(f"no {name} image of {preview(names)}")
    return parts


def shuffled(scenes, units, images, seed):
    """Shuffle units (n,), images or groups, by seed: [the units of class 0, those of class 1, ...].
    images (n,): an image of each unit, which gives its class. Tiles hold several: [all units].
    """
    if scenes.tiles:
        return [units[torch.randperm(len(units), generator=rng(seed))]]
    pools = []
    for c in range(len(scenes.classes)):
        pool = units[scenes.labels[images] == c]
        pools.append(pool[torch.randperm(len(pool), generator=rng(seed, c))])
    return pools


def choose(scenes, index, count, seed):
    """Choose `count` images of each class, or `count` tiles of xBD, among the indices index (n,).
    0 chooses all. By one seed, the choice of 10 is a part of the choice of 40.
    """
    tiles = scenes.groups[index]
    pools = shuffled(scenes, tiles.unique() if scenes.tiles else index, index, seed)
    for c, pool in enumerate(pools):
        if len(pool) < count:
            kind = "tiles" if scenes.tiles else f"images of {scenes.classes[c]}"
            raise UserError(f"{count} asked for, of {len(pool)} {kind} to train on: give fewer")
    chosen = torch.cat([pool[:count or None] for pool in pools])
    if scenes.tiles:
        chosen = index[torch.isin(tiles, chosen)]
    check_classes(scenes, chosen)
    return chosen


def lacking(scenes, index):
    """List the classes that have no image among the indices index (n,)."""
    present = scenes.labels[index].unique().tolist()
    return [name for c, name in enumerate(scenes.classes) if c not in present]


def check_classes(scenes, index):
    """Raise UserError if a class has no image among the training images index (n,)."""
    if names := lacking(scenes, index):
        raise UserError(f"no image to train on is {names[0]}: give more, or other parts")


# ---- duplicates: pictures that are the same, however they were encoded

SAME_PICTURE = 2.0                       # root mean square difference of fingerprints, grey levels


def fingerprint(images):
    """Reduce images (N, C, H, W) uint8 to 8 x 8 pixels of RGB: (N, 192) uint8."""
    small = torch.nn.functional.interpolate(images[:, :3].float(), (8, 8), mode="bilinear",
                                            antialias=True)
    return small.round().clamp(0, 255).byte().flatten(1)


def same_pictures(a, b):
    """Find the same pictures by fingerprints a (N, 192) and b (M, 192): indices i and j, (P,) each.
    Turned and flipped copies, which are often kept beside the pictures, are the same, too.

    Measured on the 2,100 pictures of UC Merced: as JPEG of 128 px and as TIFF of 64 px they differ
    by at most 1.9, at JPEG quality 50 by at most 1.3. Different pictures differ by 2.2 or more
    (bare fields; for half of them by 20 or more). Sea or desert may be nearer. Crops are not found.
    """
    M, b = len(b), rearrange(b, "m (c h w) -> m c h w", h=8, w=8)
    quarters = [torch.rot90(b, k, (2, 3)) for k in range(4)]
    b = torch.cat(quarters + [quarter.flip(3) for quarter in quarters])  # 8 M, and M times itself
    a, b = a.float(), b.flatten(1).float()
    order = b.mean(1).argsort()
    mean = b.mean(1)[order].contiguous()
    pairs = [torch.zeros(2, 0, dtype=torch.int64)]
    for rows in a.mean(1).argsort().split(256):
        # Their means differ by less than two pictures do: compare only those of near means.
        low, high = a[rows].mean(1).aminmax()
        limits = torch.stack([low - SAME_PICTURE, high + SAME_PICTURE])
        near = order[slice(*torch.searchsorted(mean, limits).tolist())]
        distance = torch.cdist(a[rows], b[near]) / a.shape[1] ** 0.5
        i, j = (distance < SAME_PICTURE).nonzero(as_tuple=True)
        pairs.append(torch.stack([rows[i], near[j] % M]))
    return torch.cat(pairs, 1)


def group_duplicates(prints):
    """Give the same pictures the same number, that of the first of them: (N,) int64."""
    i, j = same_pictures(prints, prints)
    groups = torch.arange(len(prints))
    while True:                                          # duplicates of duplicates, too
        joined = groups.scatter_reduce(0, i, groups[j], "amin")
        if torch.equal(joined, groups):
            return groups
        groups = joined


# ---- sources: pictures in files

SUFFIXES = ".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif"
FORMATS = "JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF"    # none that starts a program, as EPS does


def read(root, size, labelled=True, pre=False, mask=False, cache="runs/cache"):
    """Read a data set as Scenes: an xBD tree, a caption set, or a tree with a folder per class.
    Images are (N, 3, size, size) RGB; in xBD, pre and mask add channels (see read_xbd). With
    labelled=False also a file, or a folder of pictures, which all get the class "". What was
    decoded is kept in the folder `cache`.
    """
    root = Path(root)
    if is_xbd(root):
        return read_xbd(root, size, pre=pre, mask=mask, cache=cache)
    if not labelled:
        names = below(root, "**/*")
        if root.is_file():
            root, names = root.parent, [root.name]
        if not names:
            raise UserError(f"no pictures in {root}: give one ({', '.join(SUFFIXES)}) or a folder")
        return read_rows(root, dict.fromkeys(names, ("", NO_PART, ())), size, cache)
    captions = [path for name in ("dataset.json", "dataset_*.json", "captions.json")
                for path in root.glob(name)]
    if len(captions) > 1:
        raise UserError(f"{root} has {preview(captions)}: keep one of them here")
    rows = caption_rows(captions[0]) if captions else folder_rows(root)
    return read_rows(root, rows, size, cache)


def read_rows(root, rows, size, cache):
    """Read pictures root/name as Scenes; rows are {name: (class, place in PARTS, sentences)}."""
    def make():
        images = decode_all(files, size)
        return dict(images=images, groups=group_duplicates(fingerprint(images)))

    files, names = [root / name for name in rows], list(rows)
    content = cached_tree(make, root, files, cache, size=size)
    labels, parts, captions = zip(*rows.values(), strict=True)
    classes = sorted(set(labels))
    labels = torch.tensor([classes.index(label) for label in labels])
    twice = (labels != labels[content["groups"]]).nonzero().flatten().tolist()
    if twice:
        print(f"{len(twice)} pictures are in two classes: {preview(names[k] for k in twice)}")
    largest = (content["groups"] == content["groups"].mode().values).nonzero().flatten().tolist()
    if len(largest) > 9:
        print(f"{len(largest)} look the same: one part has {preview(names[k] for k in largest)}")
    found = glob.glob("**/generator*.pt", root_dir=root, recursive=True)     # beside its images
    if classes == [""]:                                  # of a reference, they may lie above it
        found += glob.glob("../generator*.pt", root_dir=root)
    seen = [load_checkpoint(root / name, "generator")["seen"] for name in found]
    if TRAIN in parts and len(set(parts) - {NO_PART}) < 3:
        print(f"{root.name} lacks a part: the one beside train is test, a quarter of train val")
        parts = [TEST if part > TRAIN else NO_PART for part in parts]
    return Scenes(**content, labels=labels, classes=classes, names=names,
                  official=torch.tensor(parts), captions=list(captions),
                  generator_saw=torch.cat([NO_PRINTS, *seen]))


def below(root, pattern):
    """List the pictures below root that match the pattern, sorted: ["river/river_001.jpg", ...]."""
    found = glob.glob(pattern, root_dir=root, recursive=True)           # follows links; none hidden
    paths = sorted(path for path in map(Path, found) if path.suffix.lower() in SUFFIXES)
    return [path.as_posix() for path in paths]


def decode(path, size):
    """Decode the central square of a picture, reduced with antialiasing: (3, size, size) uint8."""
    with Image.open(path, formats=FORMATS) as pil:
        if pil.mode[0] in "IF" or ";16" in str(pil.tile):        # read as white, or nearly black
            raise ValueError("more than 8 bits per channel: convert it")
        if pil.width % 8 == pil.height % 8 == 0:         # else it would stretch the last column
            pil.draft("RGB", (2 * size, 2 * size))       # a JPEG decoder may reduce large pictures
        upright = ImageOps.exif_transpose(pil).convert("RGB")
    square = ImageOps.fit(upright, (size, size), Image.BICUBIC)
    return rearrange(np.array(square), "h w c -> c h w")


def decode_all(paths, size):
    """Decode pictures on all cores: (N, 3, size, size) uint8. UserError if one does not decode."""
    def work(path):
        with one_line_error(path):
            return torch.from_numpy(decode(path, size))

    return torch.stack(in_threads(work, paths, "reading pictures"))


def cached_tree(make, root, files, cache, **settings):
    """Return make(), which `cache` keeps until one of the files of root or a setting changes."""
    stats = [(s.st_ino, s.st_size, s.st_mtime_ns) for s in map(Path.stat, files)]
    code = Path(__file__).read_bytes()                   # a mended reader reads anew
    key = hash_of(repr((root.resolve(), settings, files, stats, code)).encode())
    return cached(Path(cache) / f"{root.resolve().name}-{key}.pt", make)


# ---- sources: a folder per class

PART_NAMES = dict(train=0, training=0, val=1, valid=1, validation=1, test=2, testing=2)
NO_CLASSES = "mask masks label labels target targets annotations gt".split()     # nor with .pt


def listed_parts(root):
    """Read the lists of parts in root: {"river_001" or "river/river_001": its place in PARTS}."""
    part_of = {}
    for path in sorted(root.glob("*.*")):
        word = re.search(rf"(?<![a-z])({'|'.join(PART_NAMES)})(?![a-z])", path.stem.lower())
        if word and path.suffix.lower() == ".txt":       # such as resisc45-train.txt
            with one_line_error(path):
                lines = filter(str.strip, path.read_text("utf-8-sig").splitlines())
            for line in lines:
                key, part = str(Path(line.strip()).with_suffix("")), PART_NAMES[word[1]]
                part_of[key] = max(part, part_of.get(key, NO_PART))
        elif word and path.suffix.lower() in (".csv", ".json"):
            print(f"{path} is not read: a list of a part ends in .txt")
    return part_of


def folder_rows(root):
    """List the pictures root/<class>/* or root/<part>/<class>/*, for read_rows.
    Parts are folders, or lists in the root, by PART_NAMES.
    """
    names = below(root, "*/**/*")
    in_parts = any(name.split("/")[0].lower() in PART_NAMES for name in names)
    part_of, rows, others = listed_parts(root), {}, []
    for name in names:
        *above, label, file = name.split("/")
        first, stem = above[0].lower() if above else "", Path(file).stem
        part = part_of.get(f"{label}/{stem}", part_of.get(stem, NO_PART))
        unlisted = part_of and part == NO_PART and not in_parts
        if len(above) == in_parts and (first in PART_NAMES) == in_parts and not unlisted:
            rows[name] = label, PART_NAMES.get(first, part), ()
        else:
            others.append(name)
    if not rows:
        deeper = [name.split("/")[0] for name in others if name.count("/") > 1]
        hint = f"; did you mean {root / deeper[0]}?" if deeper else ""
        hint = "; no picture is in its lists" if part_of else hint
        raise UserError(f"{root} has no folders with pictures, one for each class{hint}; "
                        "the README tells how to get RESISC45")
    firsts = {name.split("/")[0] for name in names}
    others += [name for name in glob.glob("*/", root_dir=root) if name[:-1] not in firsts]
    if others:
        print(f"left out of {root}, {len(others)} not in a class folder or list: {preview(others)}")
    for folder in sorted({(root / name).parent for name in rows}):
        if folder.name.lower() in (*NO_CLASSES, *PART_NAMES) or any(folder.glob("*.pt")):
            raise UserError(f"{folder} is no class: give a tree with a folder for each class")
    return rows


# ---- sources: captions

# The classes of UC Merced in words. UCM-Captions numbers 100 images of each, in this order.
UC_MERCED = """agricultural, airplane, baseball diamond, beach, buildings, chaparral,
dense residential, forest, freeway, golf course, harbor, intersection, medium residential,
mobile home park, overpass, parking lot, river, runway, sparse residential, storage tanks,
tennis court""".replace("\n", " ").split(", ")


def in_words(name):
    """Write a class in words: "denseresidential", "DenseResidential" -> "dense residential"."""
    known = {words.replace(" ", ""): words for words in UC_MERCED}
    return known.get(name) or re.sub("(?<=[a-z])(?=[A-Z])|_", " ", name).lower()


def caption_rows(path):
    """List the pictures of a caption set, in the folder of its JSON file or below, for read_rows.
    RSICD (Lu et al. 2018), UCM-Captions and Sydney (Qu et al. 2016), RSICap (Hu et al. 2025).
    """
    entries = []                                         # (file, place in PARTS, sentences)
    with one_line_error(path):
        content = json.loads(path.read_bytes())
        if "annotations" in content:                     # RSICap
            for item in content["annotations"]:
                entries.append((item["filename"], NO_PART, (item["text_output"].strip(),)))
        else:                                            # the others: Karpathy's layout of MS COCO
            for item in content["images"]:
                sentences = tuple(sentence["raw"].strip() for sentence in item["sentences"])
                entries.append((item["filename"], PARTS.index(item["split"]), sentences))

    label_of = {}                                        # {file: its class}
    for file in path.parent.glob("txtclasses*/*.txt"):   # RSICD: a list of files per class
        with one_line_error(file):
            listed = file.read_text("utf-8").split()
        if both := label_of.keys() & set(listed):
            raise UserError(f"{file} lists {min(both)}, and so does another class: keep one")
        label_of |= dict.fromkeys(listed, file.stem)
    numbered = {f"{n + 1}.tif": UC_MERCED[n // 100].replace(" ", "") for n in range(2100)}
    if numbered.keys() == {file for file, *_ in entries}:            # UCM-Captions
        label_of = numbered

    names = below(path.parent, "**/*")
    places = Counter(name.split("/")[-1] for name in names)
    twice = [file for file, *_ in entries if places[file] > 1]
    if twice:
        raise UserError(f"{path} names {twice[0]}, which is in several folders: keep one of them")
    name_of = {name.split("/")[-1]: name for name in names} | {name: name for name in names}
    missing = [file for file, *_ in entries if file not in name_of]
    if len(missing) == len(entries):
        raise UserError(f"no picture that {path} names is below its folder: unpack them there")
    if missing:
        print(f"left out {len(missing)} pictures of {path}, not in its folder: {preview(missing)}")
    unlabelled = [file for file, *_ in entries if label_of and file not in label_of]
    if unlabelled:
        raise UserError(f"{len(unlabelled)} pictures of {path} are in no class list, "
                        f"{unlabelled[0]} first: add them to one, or remove all lists")
    rows = {}
    for file, part, sentences in entries:
        if name := name_of.get(file):
            _, before, more = rows.get(name, ("", NO_PART, ()))          # test beats train
            rows[name] = label_of.get(file, "scene"), max(part, before), more + sentences
    return rows


# ---- sources: xBD, a crop around each building (Gupta et al. 2019, arXiv 1911.09296)

FOLDERS = "train", "tier1", "tier3", "test", "hold"
DAMAGE = ["no-damage", "minor-damage", "major-damage", "destroyed"]
UNKNOWN = "un-classified"                # no class, for example under a cloud
XBD_METADATA = "longitude", "latitude", "gsd", "off_nadir_angle", "sun_elevation", "month"


def is_xbd(root):
    """Does this folder look like an xBD tree: one of FOLDERS with images/ and labels/ in it?"""
    folders = [Path(root) / folder for folder in FOLDERS]
    return any((path / "images").is_dir() and (path / "labels").is_dir() for path in folders)


def read_xbd(root, size, pre=False, mask=False, cache="runs/cache"):
    """Read an xBD tree as Scenes: a crop around each classified building. The groups are the tiles.
    images (N, C, size, size) are RGB after the disaster; pre adds RGB before it, and mask the
    building's own mask (255 inside) as the last channel: C is 3, 4, 6 or 7.
    """
    root = Path(root)
    tiles = find_tiles(root)
    files = [path for tile in tiles.values() for path in tile.values()]
    content = cached_tree(lambda: crop_tree(root, tiles, size, pre, mask), root, files, cache,
                          size=size, pre=pre, mask=mask)
    print(content.pop("summary"))
    folders = [name.split("/")[0] for name in content["names"]]
    official = [TEST if folder in ("test", "hold") else NO_PART for folder in folders]
    return Scenes(**content, official=torch.tensor(official), tiles=True)


def find_tiles(root):
    """List the files of each tile: {"train/joplin-tornado_00000050": {"post.png": path, ...}}."""
    tiles = {}
    for path in sorted(root.glob("[!.]*/*/[!.]*")):
        folder, kind, name = path.parts[-3:]
        match = re.fullmatch(r"(.+_\d+)_(pre|post)_disaster\.(png|json)", name)
        if match and folder in FOLDERS and kind in ("images", "labels"):
            tile, time, suffix = match.groups()
            tiles.setdefault(f"{folder}/{tile}", {})[f"{time}.{suffix}"] = path
    return dict(sorted(tiles.items()))


def crop_tree(root, tiles, size, pre, mask):
    """Crop all buildings of all tiles: the fields of Scenes, and a summary of what is left out."""
    needed = {"post.json", "post.png", "pre.png" if pre else "post.png"}
    whole = [tile for tile, files in tiles.items() if needed <= files.keys()]
    left_out = Counter({"tiles without .png or .json": len(tiles) - len(whole)})
    crops = []
    for buildings, reasons in in_threads(lambda tile: crop_tile(tile, tiles[tile], size, pre, mask),
                                         whole, "cropping buildings"):
        crops += buildings
        left_out.update(reasons)
    reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items() if n) or "nothing"
    summary = f"{root.name}: {len(crops)} buildings of {len(whole)} tiles; left out: {reasons}"
    if not crops:
        raise UserError(f"{summary}: give images and labels of the same split, side by side")
    images, names, labels, metadata, prints = zip(*crops, strict=True)
    tile_of = [name.split("/")[1] for name in names]     # a tile in two folders is one group
    print_of = dict(zip(tile_of, prints, strict=True))
    number = {tile: k for k, tile in enumerate(print_of)}
    tile_prints = torch.cat(list(print_of.values()))
    groups = group_duplicates(tile_prints)
    return dict(images=torch.stack(images), names=list(names), metadata=torch.tensor(metadata),
                labels=torch.tensor([DAMAGE.index(label) for label in labels]), classes=DAMAGE,
                groups=groups[[number[tile] for tile in tile_of]], tile_prints=tile_prints,
                summary=summary)


def crop_tile(tile, files, size, pre, mask):
    """Crop the buildings of a tile: [(image, name, class, metadata, the tile's fingerprint)],
    and why some are left out: [reason].
    """
    polygons, extent, metadata = read_label(files["post.json"])
    usable, left_out = [], []
    for uid, subtype, rings in polygons:
        if subtype not in DAMAGE:
            left_out.append(str(subtype))
        elif area(rings) < MIN_AREA:
            left_out.append("too small")
        else:
            usable.append((uid, subtype, rings, crop_square(rings[0])))
    if not usable:                                       # of many tiles: spares decoding them
        return [], left_out

    squares = np.array([square for *_, square in usable])
    beyond = max(0, -squares.min(), (squares[:, 2:] - extent).max())     # how far off the tile
    margin = 1 + math.ceil(beyond)
    times = ("post", "pre") if pre else ("post",)
    pictures = [tile_picture(files[f"{time}.png"], extent, margin) for time in times]
    inner = margin, margin, margin + extent[0], margin + extent[1]
    small = np.array(pictures[0].resize((64, 64), Image.BOX, inner))
    tile_print = fingerprint(rearrange(torch.from_numpy(small), "h w c -> 1 c h w"))
    crops = []
    for uid, subtype, rings, square in usable:
        box = tuple(square + margin)                     # in a picture with its margin
        layers = [pil.resize((size, size), Image.BICUBIC, box) for pil in pictures]
        if mask:
            layers.append(draw_mask(rings, square, size))
        image = rearrange(np.concatenate(layers, 2), "h w c -> c h w")
        crops.append((torch.from_numpy(image), f"{tile}/{uid}", subtype, metadata, tile_print))
    return crops, left_out


CONTEXT = 0.5                            # share of its longer side shown around a building
MIN_SIDE, MIN_AREA = 32, 64              # of a crop and of a building, in pixels of the tile


def crop_square(outline):
    """Return the square to crop for a building with this outline (n, 2): left, top, right, bottom.
    In pixels of the tile. It may leave the tile, whose picture is mirrored there (tile_picture).
    """
    low, high = outline.min(0), outline.max(0)
    longer = (high - low).max()
    half = max(longer * (1 + 2 * CONTEXT), MIN_SIDE) / 2
    middle = (low + high) / 2
    return np.concatenate([middle - half, middle + half])


def tile_picture(path, extent, margin):
    """Decode a tile and mirror it at its edges, so that a building there is amid its crop, too."""
    with one_line_error(path), Image.open(path, formats=FORMATS) as pil:
        if pil.size != extent:
            raise ValueError(f"it has {pil.size} pixels, its label says {extent}")
        pixels = np.asarray(pil.convert("RGB"))
    edges = (margin, margin)
    return Image.fromarray(np.pad(pixels, (edges, edges, (0, 0)), "reflect"))


def read_label(path):
    """Read a label file: polygons [(uid, subtype, rings)], (width, height), and XBD_METADATA.
    Lengths are in pixels (metadata.gsd is of another band). Points off the tile move to its edge.
    """
    with one_line_error(path):
        content = json.loads(path.read_bytes())
        about, features = content["metadata"], content["features"]
        extent = about["width"], about["height"]
        polygons = []
        for item in features["xy"]:
            building = item["properties"]
            rings = [ring.clip(0, extent) for ring in wkt_polygon(item["wkt"])]
            polygons.append((building["uid"], building.get("subtype"), rings))
        places = features.get("lng_lat")
        place = wkt_polygon(places[0]["wkt"])[0].mean(0) if places else (None, None)
        month = (about.get("capture_date") or "")[5:7] or None
        known = [*place, *map(about.get, XBD_METADATA[2:5]), month]
        metadata = [math.nan if value is None else float(value) for value in known]
        return polygons, extent, metadata


def wkt_polygon(text):
    """Parse "POLYGON ((x y, ...), ...)" into rings [(n, 2), ...]: the outline, then the holes."""
    texts = re.findall(r"\(([^()]+)\)", text) if text.strip().startswith("POLYGON") else []
    rings = [np.array([point.split() for point in ring.split(",")], float) for ring in texts]
    if not rings or any(ring.shape[1] != 2 or not np.isfinite(ring).all() for ring in rings):
        raise ValueError(f"{text[:50]!r} is no polygon in WKT")
    return rings


def area(rings):
    """Return the square pixels inside the outline and outside the holes (shoelace formula)."""
    points = [ring.T for ring in rings]
    outline, *holes = [abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2 for x, y in points]
    return outline - sum(holes)


def draw_mask(rings, box, size):
    """Draw rings [(n, 2), ...] in a square box (left, top, right, bottom): (size, size, 1) uint8.
    255 inside, else 0. Scan conversion: a pixel is inside if the line from its centre to the left
    edge crosses the rings an odd number of times. (Pillow's polygon draws the outline, too: a house
    12 pixels wide would gain 4 to 8 % in area.)
    """
    centre = np.arange(size) + 0.5
    inside = np.zeros((size, size), bool)
    for ring in rings:
        corners = (ring - box[:2]) * size / (box[2] - box[0])
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0), strict=True):
            if y0 != y1:                                 # a level side crosses no row of centres
                crossed = (y0 <= centre) != (y1 <= centre)
                x = x0 + (centre - y0) * (x1 - x0) / (y1 - y0)           # where, in each row
                inside ^= crossed[:, None] & (centre >= x[:, None])
    return np.where(inside, 255, 0).astype(np.uint8)[..., None]


# ---- drawings: a stand-in for RESISC45 and xBD where there are no data

SQUARE = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
ANGLES = np.linspace(0, 2 * np.pi, 33)
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)


def colours(codes):
    """Turn "#rrggbb #rrggbbaa" (with an opacity) into a list of tuples: a family of colours."""
    return [ImageColor.getrgb(code) for code in codes.split()]


# Muted colours. What is painted takes one of a family, a little brighter or darker.
LAND = colours("#5a6c3e #8e8058 #725e48 #425432 #9c927a #7c824c")
WATER, SAND = colours("#244050 #3c5244 #406c76"), colours("#c8b792 #b4a280")
PAVING, MARKS = colours("#525254 #7a7874 #a6a296"), colours("#e0dcd0")
ROOFS = colours("#96604c #a67a62 #7a726c #5e5a5a #bcb4a8 #464448")
TREES, LIDS = colours("#364c26 #46582e #5a5a2c"), colours("#ccccc8 #b0b0ac")
SHADOW, RUBBLE = colours("#0a0c1a78"), colours("#2c2622 #c4beb4 #968a7c #3c3632")


def rotation(angle):
    """Return the (2, 2) matrix that turns points (n, 2) by an angle: points @ rotation(angle)."""
    return np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])


class Canvas:
    """A picture of land, drawn at twice its size. random: a numpy Generator.

    Points (n, 2), about -1..1, are the pixels points @ axes + origin.
    """

    def __init__(self, random, size, land):
        self.random = random
        self.image = Image.new("RGB", (2 * size, 2 * size))
        self.pen = ImageDraw.Draw(self.image, "RGBA")
        self.axes = size * random.uniform(0.75, 1.25) * rotation(random.uniform(0, 2 * np.pi))
        self.origin = size * random.uniform(0.75, 1.25, 2)
        self.shadow = random.uniform(0.5, 1.3) * CIRCLE[random.integers(32)]     # of height 1
        self.texture = 0
        for n in (4, 11, 37, 101):
            noise = Image.fromarray(random.standard_normal((n, n), np.float32))
            self.texture += np.asarray(noise.resize((size, size), Image.BICUBIC)) / n ** 0.3
        self.paint(4 * SQUARE, land)

    def paint(self, outline, family, vary=8):
        """Fill a polygon (n, 2) with a colour of a family, which varies by some grey levels."""
        chosen = self.random.choice(family)
        shift = vary * (self.random.standard_normal() + self.random.standard_normal(3) / 3)
        rgb = (shift + chosen[:3]).clip(0, 255).astype(int)
        points = np.asarray(outline) @ self.axes + self.origin
        self.pen.polygon(points.ravel().tolist(), (*rgb, *chosen[3:]))

    def strip(self, line, half_width, family):
        """Paint a line (n, 2) of this half width."""
        along = np.gradient(line, axis=0)
        across = along[:, ::-1] * [-1, 1] / np.hypot(*along.T)[:, None]          # of length 1
        side = half_width * across
        self.paint(np.concatenate([line + side, (line - side)[::-1]]), family)

    def solid(self, outline, family, height=0.06):
        """Paint a house, tree or tank, and its shadow."""
        self.paint(outline + height * self.shadow, SHADOW, vary=0)
        self.paint(outline, family)

    def render(self):
        """Return the picture at its final size, with texture, light and haze: PIL RGB."""
        light, haze = self.random.uniform(-22, 22), self.random.uniform(0, 0.25)
        pixels = np.asarray(self.image.reduce(2), np.float32)
        pixels = pixels * (1 + self.random.uniform(0.03, 0.09) * self.texture[..., None])
        pixels = 115 + self.random.uniform(0.75, 1.2) * (pixels - 112) + light
        pixels += haze * (np.array([190, 198, 206]) - pixels)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


SCENES = ("beach", "circular_farmland", "dense_residential", "forest", "intersection", "river",
          "runway", "storage_tank")


def draw_scene(name, random, size=128):
    """Draw a scene of a class of SCENES: PIL RGB of size x size pixels."""
    c = Canvas(random, size, LAND)
    for spot in random.uniform(-1.3, 1.3, (random.poisson(4), 2)):       # what may lie anywhere
        c.paint(spot + random.uniform(0.1, 0.6, 2) * SQUARE, LAND)
        c.solid(-spot + random.uniform(0.03, 0.15, 2) * SQUARE, ROOFS + TREES)

    u = np.linspace(-3, 3, 90)
    straight = np.stack([u, 0 * u], 1)
    winding = straight.copy()
    for k in (1, 2, 4):
        waves = np.sin(k * random.uniform(1, 2) * u + random.uniform(0, 6))
        winding[:, 1] += random.normal(0, 0.25 / k) * waves
    match name:
        case "beach":
            c.paint([*winding, (3, 4), (-3, 4)], WATER)
            c.strip(winding, random.uniform(0.05, 0.3), SAND)
        case "circular_farmland":
            radius = random.uniform(0.45, 0.95)
            for cell in [(0, 0), (1, 0), (0, 1), (1, 1)][:random.choice([1, 1, 2, 4])]:
                c.paint(2.1 * radius * np.array(cell) + radius * CIRCLE, LAND)
        case "dense_residential":
            street, plot = random.uniform(0.75, 1.0), random.uniform(0.3, 0.45)
            for v in street * np.arange(-2, 3):
                c.strip(straight + [0, v], 0.06, PAVING)
                for spot in product(np.arange(-1.8, 1.8, plot), v + 0.27 * street * SQUARE[:2, 0]):
                    c.solid(spot + random.uniform(0.1, 0.45 * plot, 2) * SQUARE, ROOFS)
        case "forest":
            for spot in random.uniform(-1.6, 1.6, (random.integers(60, 200), 2)):
                c.solid(spot + random.uniform(0.08, 0.22) * CIRCLE, TREES, height=0.15)
        case "intersection":
            for angle in (0, random.uniform(0.7, 2.4)):
                c.strip(straight @ rotation(angle), random.uniform(0.14, 0.26), PAVING)
        case "river":
            c.strip(winding, random.uniform(0.2, 0.35), LAND + SAND)     # its banks
            c.strip(winding, random.uniform(0.12, 0.25), WATER)
        case "runway":
            end = random.choice([0, 25, 40])
            c.strip(straight[end:], random.uniform(0.16, 0.3), PAVING)
            for k in range(end + 4, 88, 4):
                c.strip(straight[k:k + 2], 0.03, MARKS)
        case "storage_tank":
            n = random.integers(1, 4)
            radius, lid = random.uniform(0.5, 0.75) / n, [random.choice(LIDS)]
            for cell in np.ndindex(n, n):
                spot = 2.4 * radius * (np.array(cell) - (n - 1) / 2)
                c.solid(spot + radius * CIRCLE, lid, 0.4 * radius)
    return c.render()


def draw_tree(root, per_class, seed=0, size=128):
    """Draw scenes, root/<class>/<class>_001.jpg ..., unless root is there."""
    root, new = Path(root), Path(f"{root}.part")         # .part of a killed run is drawn over
    if root.exists():
        return root
    for name, k in progress([*product(SCENES, range(1, per_class + 1))], "drawing scenes"):
        random = np.random.default_rng([seed, SCENES.index(name), k])
        pil = draw_scene(name, random, size)
        save_picture(pil, new / f"{name}/{name}_{k:03d}.jpg", quality=90)
    return new.replace(root)


# {disaster: (its type, its land, per cent of each class of DAMAGE and of UNKNOWN)}
EVENTS = {"drawn-hurricane": ("wind", LAND[:2], (52, 29, 9, 7, 3)),
          "drawn-flood": ("flooding", LAND[3:], (73, 5, 16, 3, 3)),
          "drawn-wildfire": ("fire", LAND[1:5:3], (76, 1, 2, 18, 3)),
          "drawn-earthquake": ("earthquake", LAND[2:5:2], (94, 1, 1, 1, 3))}
LOT = 48                                                 # pixels from house to house


def draw_damage(c, random, damage):
    """Paint over a house, the square of -1..1, what a disaster has done to it."""
    count, reach, half = random.integers(5), 1.7, 0.12   # blown here from elsewhere
    if damage == "minor-damage":                         # tiles are off
        count, reach, half = random.integers(2, 6), 0.7, 0.25
    elif damage == "major-damage":                       # a part of the roof is gone
        part = SQUARE.clip((random.uniform(-0.3, 0.3), -1))
        c.paint(part @ rotation(np.pi / 2 * random.integers(4)), RUBBLE[:1])
        count, reach, half = 8, 1.2, 0.15
    elif damage == "destroyed":
        c.paint(random.uniform(1.3, 1.6) * CIRCLE, RUBBLE)
        count, reach, half = random.integers(15, 40), 1, 0.2
    for spot in random.uniform(-reach, reach, (count, 2)):
        c.paint(spot + half * random.uniform(0.5, 1, 2) * SQUARE, RUBBLE)


def draw_tile(event, random, side):
    """Draw a tile before and after an event: two PIL RGB of side x side pixels, and its label."""
    kind, land, mix = EVENTS[event]
    c = Canvas(random, side, land)
    for spot in random.uniform(-1.5, 1.5, (side // 8, 2)):
        c.paint(spot + random.uniform(0.05, 0.4, 2) * SQUARE, land)
        c.solid(-spot + random.uniform(0.02, 0.05) * CIRCLE, TREES)

    n = side // LOT + 1
    lots = LOT * np.array([*np.ndindex(n, n)]) + random.uniform(0, LOT, 2)
    lots = lots[(lots < side).all(1)]                    # a house may cross the edge
    turn = random.uniform(0, np.pi / 2)
    houses, polygons = [], []
    for k, spot in enumerate(random.permutation(lots)[:random.integers(len(lots) + 1)]):
        axes = random.uniform(9, 17, (2, 1)) * rotation(turn + random.normal(0, 0.05))
        damage = random.choice([*DAMAGE, UNKNOWN], p=np.array(mix) / 100)
        ring = ", ".join(f"{x} {y}" for x, y in spot + SQUARE[[0, 1, 2, 3, 0]] @ axes)
        properties = dict(uid=str(k), subtype=damage)
        polygons.append(dict(properties=properties, wkt=f"POLYGON (({ring}))"))
        houses.append((2 * axes, 2 * spot, damage))
        c.axes, c.origin = 2 * axes, 2 * spot            # -1..1 is now this house
        c.solid(SQUARE, ROOFS, 0.3)
    before = c.render()
    for axes, origin, damage in houses:
        c.axes, c.origin = axes, origin
        draw_damage(c, random, damage)
    about = dict(disaster=event, disaster_type=kind, width=side, height=side,
                 sun_elevation=math.degrees(math.atan2(1, np.hypot(*c.shadow))))
    return before, c.render(), dict(features=dict(xy=polygons), metadata=about)


def draw_xbd(root, tiles=24, seed=0, side=256):
    """Draw an xBD tree, with a quarter of its tiles in test, unless root is there."""
    root, new = Path(root), Path(f"{root}.part")         # .part of a killed run is drawn over
    if root.exists():
        return root
    for k in progress(range(tiles), "drawing disasters"):
        event = list(EVENTS)[k % len(EVENTS)]
        folder = new / ("test" if k // len(EVENTS) % 4 == 3 else "train")
        name = f"{event}_{k:08d}"
        before, after, label = draw_tile(event, np.random.default_rng([seed, k]), side)
        save_picture(before, folder / f"images/{name}_pre_disaster.png", compress_level=1)
        save_picture(after, folder / f"images/{name}_post_disaster.png", compress_level=1)
        write(folder / f"labels/{name}_post_disaster.json", json.dumps(label))
    return new.replace(root)


# ---- tools: numbers and pictures

def rng(*key, device="cpu"):
    """Return a torch generator seeded by a key of integers, such as (seed, step)."""
    hashed = np.random.SeedSequence((len(key), *key)).generate_state(1)  # torch: 32 bits on a CPU
    return torch.Generator(device).manual_seed(int(hashed[0]))


def to_float(images):
    """Turn uint8 into float in [-1, 1]; what is float stays as it is, such as features."""
    return images if images.is_floating_point() else (images / 127.5).sub_(1)


def to_uint8(x):
    """Turn float in [-1, 1] into uint8. Truncation would darken images by half a level: a cue."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def pick_device():
    """Return the fastest device of this machine; "cuda" is the GPU of this process."""
    cpu = "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device("cuda" if torch.cuda.is_available() else cpu)


def autocast(device):
    """Compute in bfloat16 on a GPU. It has the range of float32, so gradients need no scaling."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def lr_at(step, cfg):
    """Return the learning rate of a step: linear warm-up, then down to 0 along a cosine."""
    warmup = min(cfg.warmup, cfg.steps // 2)             # a short run reaches its rate, too
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    angle = math.pi * (step - warmup) / (cfg.steps - warmup)
    return cfg.lr * 0.5 * (1 + math.cos(angle))


def check_finite(model, loss, step):
    """Raise UserError if the loss or a weight is not finite, before such weights are saved."""
    if not math.isfinite(loss) or not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"loss {loss:.3g} at step {step}, or a weight is not finite: lower --lr")


def to_pil(image):
    """Turn (C, H, W) uint8 into PIL: RGB, or RGBA if C = 4, where the mask is the opacity."""
    return Image.fromarray(rearrange(image.cpu(), "c h w -> h w c").numpy())


def grid(images, columns, zoom=1, names=()):
    """Arrange (N, C, H, W) uint8 in so many columns, with white lines between them: PIL.
    names [N]: that of the first image of each row is written at its left.
    """
    images = torch.nn.functional.pad(images[:, :3].cpu(), (1, 1, 1, 1), value=255)
    white = images.new_full((-len(images) % columns, *images.shape[1:]), 255)
    pil = to_pil(rearrange(torch.cat([images, white]), "(r k) c h w -> c (r h) (k w)", k=columns))
    pil = pil.resize((pil.width * zoom, pil.height * zoom), Image.NEAREST)
    left = 8 * max(map(len, names), default=-2) + 16     # 14 px letters are at most 8 px wide
    sheet = Image.new("RGB", (left + pil.width, pil.height), "white")
    sheet.paste(pil, (left, 0))
    for k, name in enumerate(names[::columns]):
        middle = (k + 0.5) * zoom * images.shape[2]
        ImageDraw.Draw(sheet).text((8, middle), name, "black", anchor="lm", font_size=14)
    return sheet


def save_picture(pil, path, **options):
    """Save a PIL picture atomically, in the format that its suffix names."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in FORMATS:
        raise UserError(f"{path} is no name of a picture: end it in .png or .jpg")
    file = io.BytesIO()
    pil.save(file, kind, **options)
    write(path, file.getvalue())


# ---- tools: files and checkpoints

@contextmanager
def atomic(path):
    """Yield a temporary path, which is renamed to `path` at the end, unless there was an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:             # RuntimeError: torch.save, on a full disk
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write(path, content):
    """Write bytes, or text as UTF-8, atomically."""
    with atomic(path) as temporary:
        if isinstance(content, str):
            content = content.encode(errors="replace")
        temporary.write_bytes(content)


def hash_of(content):
    """Return 12 hexadecimal digits that tell these bytes from any others."""
    return hashlib.sha256(content).hexdigest()[:12]


def save_csv(path, header, rows):
    """Write a CSV file atomically."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write(path, text.getvalue())


def save(path, content):
    """Write with torch.save, atomically."""
    with atomic(path) as temporary:
        torch.save(content, temporary)


def load(path, mmap=False):
    """Read what save() wrote. Nothing in the file is executed."""
    with one_line_error(path):
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)


def cached(path, make):
    """Return make(), which the file path keeps. Its name must say all that decides the result."""
    if Path(path).exists():
        try:
            return load(path, mmap=True)                 # several processes share its memory
        except UserError:
            print(f"{path} does not load: it is made again", file=sys.stderr)
    content = make()
    try:
        save(path, content)
    except (UserError, OSError) as error:                # of a folder that cannot be written
        print(f"{error}: it is made again next time", file=sys.stderr)
        return content
    return load(path, mmap=True)


@contextmanager
def one_line_error(path):
    """Turn any error while a file is read, of dozens of kinds, into a UserError that names it."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"           # torch.load says a page
        raise UserError(f"{path} cannot be read ({reason}): "
                        "mend it, remove it, or give another") from error


# How a killed run goes on, when the same command is given again:
# - Generators and classifiers save a checkpoint at intervals and resume() from it. The random
#   numbers of a step follow from (seed, step), so they end like a run that was not killed.
# - experiment.py keeps a JSON file for each run of a classifier and a .pt file for each synthetic
#   set, and skips what is there. Its generators resume; its classifiers, which are short, do not.
# - Every file is written under a temporary name and renamed: it is there whole, or not at all.

def save_checkpoint(path, kind, identity, step, parts, **more):
    """Save a run: what it is (kind, identity), how far it is (step), and the state of its parts."""
    states = {name: part.state_dict() for name, part in parts.items()}
    save(path, {"kind": kind, **identity, "step": step, **states, **more})


def load_checkpoint(path, *kinds):
    """Read what save_checkpoint() wrote. UserError if it is not of one of these kinds."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: train one first, or give another path")
    content = load(path)
    if not isinstance(content, dict) or content.get("kind") not in kinds:
        raise UserError(f"{path} is no checkpoint of a {' or '.join(kinds)}: give another")
    return content


def resume(path, kind, identity, parts, fresh):
    """Load the checkpoint at path into parts, {name: module or optimizer}, and return its content.
    Returns `fresh` if there is none. UserError if it is of another run: if its kind, or an item of
    identity (a dict, with the settings in "config"), is different.
    """
    if not path or not Path(path).exists():
        return fresh
    saved = load_checkpoint(path, kind)
    old, new = ({**run, **run["config"], "config": 0, "seen": 0} for run in (saved, identity))
    if different := [name for name in new if old.get(name) != new[name]]:
        raise UserError(f"{path} is of a run with another {preview(different)}: "
                        "give another --out, or remove it")
    with one_line_error(path):
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    return saved


# ---- tools: processes
# torchrun --nproc-per-node N SCRIPT.py ... starts N processes, which train the same weights: each
# draws its own share of a batch, and the gradients are averaged. Process 0 writes and prints.

def join_processes():
    """Join the processes that torchrun started, if it did."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")


def rank():
    """Return the number of this process, which is 0 if there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def own_share(batch):
    """Return how many images of a batch this process draws."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    return max(1, batch // processes)


def step_rng(seed, step, device):
    """Return the generator of a training step: rng(seed, step), but another in each process."""
    key = (seed, step, rank()) if rank() else (seed, step)
    return rng(*key, device=device)


def average_gradients(model):
    """Replace each gradient by its mean over all processes: the gradient of the whole batch."""
    if dist.is_initialized():
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()


def progress(items, title, *args, **options):
    """Iterate with a progress bar, in process 0 alone; in a log file, with a line per minute."""
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt}, {remaining} to go\n"
        options |= dict(bar_format=line, delay=60, mininterval=60, maxinterval=600, leave=True)
    silent = bool(rank() or parent_process())
    return tqdm(items, title, *args, disable=silent, **{"leave": False} | options)


def in_threads(work, items, title):
    """Return [work(item) for item in items], on all cores: Pillow decodes without the GIL."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(progress(threads.map(work, items), title, len(items)))


# ---- tools: the command line

def flag(default, help, least=-math.inf, most=math.inf, choices=()):
    """Declare a field of a Config, which is also a --flag, with its help and its limits."""
    help += f": {', '.join(choices)}" * bool(choices)
    return field(default=default, metadata=dict(help=help, least=least, most=most, choices=choices))


@dataclass
class Settings:
    """The base of all Configs. ValueError if a value is out of its range or none of its choices."""

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            least, most = f.metadata["least"], f.metadata["most"]
            for v in value if isinstance(value, tuple) else (value,):
                if isinstance(v, int | float) and not least <= v <= most:        # nor is nan
                    raise ValueError(f"{spelled(f)} {v}: give one of {least} to {most}")
            if value and choices and value not in choices:
                raise ValueError(f"{spelled(f)} {value}: known are {', '.join(choices)}")


def settings_of(cfg, config):
    """Return the fields of the dataclass `config`, with their values in cfg, as a dict."""
    return {f.name: getattr(cfg, f.name) for f in fields(config)}


def spelled(f):
    """Return the flag of a dataclass field, such as "--per-class"."""
    return "--" + f.name.replace("_", "-")


def integers(text):
    """Parse "10,40" -> (10, 40)."""
    return tuple(int(part) for part in text.split(","))


def listed(text):
    """Parse "a, b" -> ["a", "b"], and "" -> []."""
    return [name.strip() for name in text.split(",") if name.strip()]


def preview(items):
    """Name the first three items, for a message."""
    texts = [str(item) for item in items]
    return ", ".join(texts[:3]) + " ..." * (len(texts) > 3)


class Lasting:
    """A stream like stdout. If its reader goes away, as in `| head`, a run goes on in silence."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")    # None: it was closed from the start

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Write text at once, or to nowhere."""
        try:
            encoding = self.stream.encoding or "utf-8"           # of a pipe, it may lack letters
            self.stream.write(text.encode(encoding, "replace").decode(encoding))
            self.stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def launch(main, config, argv=None):
    """Run main(config of the flags). A mistake of the user is one line and exit code 2."""
    title = sys.modules[main.__module__].__doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=title, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def refuse(message):
        parser.exit(2, f"{parser.prog}: {' '.join(str(message).split())}\n")

    parser.error = refuse                                # its own error prints the usage, too
    for f in fields(config):
        kind = type(f.default)
        options = dict(type=integers if kind is tuple else kind)
        if kind is bool:
            options = dict(action="store_true")
        parser.add_argument(spelled(f), default=f.default, help=f.metadata["help"], **options)
    try:
        cfg = config(**vars(parser.parse_args(argv)))    # its __post_init__ checks the values
    except ValueError as error:
        refuse(error)

    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)            # ends like Ctrl-C
    try:
        tree = getattr(cfg, "data", "")
        if tree and Path(cfg.out).resolve().is_relative_to(Path(tree).resolve()):
            raise UserError(f"--out {cfg.out} is inside of {tree}: give a folder elsewhere")
        join_processes()
        return main(cfg)
    except (UserError, OSError) as error:
        refuse(error)
    except (MemoryError, RuntimeError) as error:         # RuntimeError: torch's, on a CPU
        if type(error) is RuntimeError and "allocate memory" not in str(error):
            raise
        refuse("out of memory: lower --batch, --size or --jobs")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on where it was\n")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- script: python data.py --data TREE shows what is there

@dataclass
class Script(Settings):
    """The flags of this script."""
    data: str = flag("data/NWPU-RESISC45", "tree with a folder per class, caption set or xBD tree")
    size: int = flag(64, "side to which the pictures are reduced", 1, 1024)
    out: str = flag("runs/data.png", "where a sheet of examples goes")


def main(cfg):
    """Print how many images a tree has, and save a sheet of examples."""
    scenes, examples = read(cfg.data, cfg.size), []
    for c, name in enumerate(scenes.classes):
        index = (scenes.labels == c).nonzero().flatten()
        print(f"{len(index):7} {name}")
        examples.append(index[:10])
    groups = f"{len(scenes.groups.unique())} {'tiles' if scenes.tiles else 'without duplicates'}"
    sizes = ", ".join(f"{len(index)} {part}" for part, index in split(scenes).items())
    print(f"{len(scenes):7} images of {len(scenes.classes)} classes, {groups}; {sizes}")
    index = torch.cat(examples)
    names = [scenes.classes[c] for c in scenes.labels[index].tolist()]
    save_picture(grid(scenes.images[index], 10, names=names), cfg.out)
    print(f"examples: {cfg.out}")


if __name__ == "__main__":
    launch(main, Script)
