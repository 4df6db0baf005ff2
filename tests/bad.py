"""A seeded generator of bad files, for the suite (a few of each kind) and for garbage.py (all of them).

Each function yields (name, write): write(path) puts a bad file in the place of a good one at path.
"""
import copy
import io
import json
import os
import random
import struct
import zipfile
import zlib

import numpy as np
import torch
from PIL import Image


def png(width, height, depth, colour, rows=None, palette=b""):
    """Make a PNG of so many bits by hand: what Pillow does not write, and what is not there."""
    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + (chunk(b"PLTE", palette) if palette else b"")
            + chunk(b"IDAT", zlib.compress(rows or b"\0" * 99)) + chunk(b"IEND", b""))


def encoded(pixels, kind, **how):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **how)
    return file.getvalue()


def flipped(content, dice):
    """Change a few bytes, cut some off, or insert some."""
    content = bytearray(content)
    for _ in range(dice.randint(1, 8)):
        content[dice.randrange(len(content))] = dice.randrange(256)
    if dice.random() < 0.3:
        del content[dice.randrange(len(content)):]
    if dice.random() < 0.2:
        content[dice.randrange(len(content) + 1):0] = dice.randbytes(dice.randint(1, 50))
    return bytes(content)


def written(content):
    """Return a function that writes these bytes."""
    def write(path):
        path.unlink(missing_ok=True)
        path.write_bytes(content)
    return write


def in_place(make):
    """Return a function that makes something else than a file."""
    def write(path):
        path.unlink(missing_ok=True)
        make(path)
    return write


def pictures(flips=3, seed=0):
    """Bad pictures, and odd ones that a reader may take or refuse in a line."""
    dice, rng = random.Random(seed), np.random.default_rng(seed)
    colour = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    jpeg, good = encoded(colour, "JPEG"), encoded(colour, "PNG")
    tiff = encoded(colour, "TIFF", compression="tiff_lzw")
    dark = np.full((20, 20), 2000, np.uint16)
    for name, content in {
            "empty": b"", "junk": rng.bytes(500), "text": b"a picture\n", "html": b"<html></html>",
            "half a JPEG": jpeg[:len(jpeg) // 2], "half a PNG": good[:len(good) // 2],
            "head of a JPEG": jpeg[:30],
            "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n",
            "PDF": b"%PDF-1.4\n", "zip": b"PK\5\6" + b"\0" * 18, "SVG": b"<svg xmlns='x'/>",
            "60,000 pixels a side": png(60_000, 60_000, 8, 0), "no pixels": png(0, 0, 8, 0),
            "12 bits in 16, grey": encoded(dark, "PNG"), "12 bits in 16, TIFF": encoded(dark, "TIFF"),
            "12 bits in 16, RGB": png(4, 4, 16, 2, (b"\0" + b"\7\0" * 12) * 4),
            "32 bits": encoded(dark.astype(np.int32), "TIFF"),
            "fractions": encoded(dark / np.float32(9e3), "TIFF"),
    }.items():
        yield name, written(content)
    yield "palette of 177 megapixels", in_place(lambda path: path.write_bytes(
        png(13_300, 13_300, 8, 3, bytes(13_300 * 13_301), b"\1\2\3")))
    yield "pipe", in_place(os.mkfifo)
    yield "link to nothing", in_place(lambda path: path.symlink_to("nothing"))
    yield "link to itself", in_place(lambda path: path.symlink_to(path.name))
    yield "device", in_place(lambda path: path.symlink_to("/dev/zero"))
    for k in range(flips):
        for kind, content in (("JPEG", jpeg), ("PNG", good), ("TIFF", tiff)):
            yield f"{kind} {k} with flipped bytes", written(flipped(content, dice))


VALUES = None, True, -1, 10**30, 1e308, float("nan"), "", "x", "../../x", [], [[]], {}, {"x": 1}


def edited(content, dice):
    """Drop, add, rename or change something somewhere in a tree of dicts and lists."""
    content = copy.deepcopy(content)
    place = content
    while True:
        if not isinstance(place, dict | list) or not place:
            return edited(content, dice)
        key = dice.choice(list(place)) if isinstance(place, dict) else dice.randrange(len(place))
        if dice.random() < 0.5 and isinstance(place[key], dict | list) and place[key]:
            place = place[key]
            continue
        what = dice.choice(["drop", "change", "change", "rename"])
        if what == "drop":
            del place[key]
        elif what == "rename" and isinstance(place, dict):
            place[f"{key}_"] = place.pop(key)
        else:
            place[key] = dice.choice(VALUES)
        return content


def labels(text, edits=3, seed=0):
    """Bad labels of xBD, from a good one."""
    dice, good = random.Random(seed), json.loads(text)
    for name, wkt in {"several polygons": "MULTIPOLYGON (((0 0, 9 0, 9 9)))", "point": "POINT (1 2)",
                      "empty polygon": "POLYGON EMPTY", "no numbers": "POLYGON ((a b, c d))",
                      "infinite": "POLYGON ((0 0, inf 0, 9 9))"}.items():
        house = dict(properties=dict(uid="a", subtype="destroyed"), wkt=wkt)
        yield name, written(json.dumps(dict(good, features=dict(xy=[house]))).encode())
    for name, content in {"empty": b"", "a list": b"[]", "null": b"null", "not UTF-8": b'{"a": "\xff\xfe"}',
                          "nested": b"[" * 100_000, "half": text[:len(text) // 2].encode(),
                          "number": b"7"}.items():
        yield name, written(content)
    for k in range(edits):
        yield f"edit {k}", written(json.dumps(edited(good, dice)).encode())


def tables(edits=3, seed=0):
    """Bad tables of numbers of pictures."""
    dice, good = random.Random(seed), b"picture,a,b\nforest/forest_001.jpg,1,2\nriver/river_001.jpg,3,\n"
    for name, content in {"empty": b"", "header alone": b"picture,a\n", "words": b"picture,a\nx,high\n",
                          "NUL": b"a\0b\n", "spreadsheet": b"PK\3\4" + b"\0" * 60,
                          "a column too many": b"picture,a\nforest/forest_001.jpg,1,2\n",
                          "UTF-16": good.decode().encode("utf-16")}.items():
        yield name, written(content)
    for k in range(edits):
        yield f"edit {k}", written(flipped(good, dice))


class Harm:
    """Pickled, it runs a command where it is read."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


def saved(content):
    """Return what torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def repacked(content, compression=zipfile.ZIP_DEFLATED, twice=False):
    """Return a zip with the members of another, compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist() * (1 + twice):
            new.writestr(name, old.read(name))
    return file.getvalue()


def damaged(content, edits=3, seed=0):
    """Damaged files, of the bytes of a good one."""
    dice = random.Random(seed)
    yield "empty", written(b"")
    yield "junk", written(dice.randbytes(999))
    yield "half", written(content[:len(content) // 2])
    yield "text", written(b"nothing\n")
    yield "JSON of another kind", written(b"[1, 2]")
    yield "folder", in_place(lambda path: path.mkdir())
    for k in range(edits):
        yield f"{k} with flipped bytes", written(flipped(content, dice))


def checkpoints(content, edits=3, seed=0):
    """Bad checkpoints, from the bytes of a good one: damaged, or such as ours would not write."""
    dice, good = random.Random(seed), torch.load(io.BytesIO(content), weights_only=True)
    yield from damaged(content, edits, seed)
    yield "code", written(saved(dict(good, more=Harm())))
    yield "compressed", written(repacked(content))
    yield "a large one in a small one", written(repacked(saved(dict(good, more=torch.zeros(2**24)))))
    for name in ("../../x", "/x", "", "..", "a/b", "a\nb", "\x1b[31m", 7, None):
        yield f"class {name!r}", written(saved(dict(good, classes=[name, *good["classes"][1:]])))
    for key in good:
        yield f"without {key}", written(saved({k: v for k, v in good.items() if k != key}))
    for key, value in good["config"].items():
        new = "x" if not isinstance(value, str) else 7
        yield f"config {key} of another type", written(saved(dict(good, config=good["config"] | {key: new})))
    yield "another key in config", written(saved(dict(good, config=good["config"] | {"more": 1})))
    tensors = [(part, key) for part in ("model", "ema") for key in good.get(part, {})]
    for k in range(edits):
        yield f"edit {k}", written(saved(edited({k: v for k, v in good.items() if k != "names"}, dice)))
        part, key = dice.choice(tensors)
        for what, value in {"shape": good[part][key][..., None], "type": 1.5}.items():
            changed = good[part] | {key: value}
            yield f"{part} {key}: another {what}", written(saved(good | {part: changed}))
