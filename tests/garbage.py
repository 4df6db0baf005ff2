"""Feed the scripts all bad files, flags and endings that we can think of: by hand, half an hour on two cores.

    python tests/garbage.py [a part of the name of a kind]

Each is tried in a process of its own. Counted are: answers in one line with exit code 2 (or 130, 143),
tracebacks, hangs (two minutes), more than a gibibyte above the baseline, code of a file that ran, and results
that are silently wrong: a bad flag that is taken, a finished comparison that ends with other numbers.
"""
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import bad  # noqa: E402

import augment  # noqa: E402
import data  # noqa: E402
import experiment  # noqa: E402
import train_cls  # noqa: E402
import train_gen  # noqa: E402

SCRIPTS = {"data": (data, data.Script), "augment": (augment, augment.Script),
           "train_gen": (train_gen, train_gen.Script), "train_cls": (train_cls, train_cls.Script),
           "experiment": (experiment, experiment.Config)}
STEPS = "--size 16 --steps 2 --batch 4 --warmup 1".split()
TINY = {"train_gen": [*STEPS, *"--width 16 --mults 1,2 --blocks 1".split()],
        "train_cls": [*STEPS, *"--patch 8 --dim 16 --depth 1 --heads 2".split()],
        "data": ["--size", "16"], "augment": []}
EXPERIMENT = "--smoke --leg scenes --counts 4 --seeds 2 --jobs 1".split()
FIGURES = "tried", "one line", "done", "traceback", "hang", "memory", "code ran", "silently wrong"


def streams(encoding):
    """Make stdout and stderr for this encoding."""
    return (io.TextIOWrapper(open(number, "wb", closefd=False), encoding) for number in (1, 2))


def child(name, argv, folder, before):
    """In a forked process: run a script in a folder, its output in files."""
    os.chdir(folder)
    for number, path in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 70
    try:
        sys.stdout, sys.stderr = streams("utf-8")
        before()
        module, config = SCRIPTS[name]
        module.__name__ = module.__spec__.name
        data.launch(module.main, config, [str(a) for a in argv], several=False)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


def run(name, argv, folder, before=lambda: None, kill=None, limit=120):
    """Run a script -> exit code (or "hang"), its stderr, its peak of memory, MiB. kill: (seconds, signal)."""
    pid = os.fork()
    if not pid:
        child(name, argv, folder, before)
    end = time.time() + (kill[0] if kill else limit)
    while not (done := os.wait4(pid, os.WNOHANG))[0]:
        if time.time() > end:
            os.kill(pid, kill[1] if kill else signal.SIGKILL)
            if not kill:
                os.wait4(pid, 0)
                return "hang", "", 0
            kill, end = None, time.time() + limit
        time.sleep(0.01)
    _, status, usage = done
    said = (folder / "stderr").read_text(errors="replace") if (folder / "stderr").exists() else ""
    return os.waitstatus_to_exitcode(status), said, usage.ru_maxrss / 1024


class Table:
    """Count what came out, by kind."""

    def __init__(self):
        self.rows = {}

    def add(self, kind, name, result, wrong=""):
        """Count a result of run(); wrong: what is silently wrong about it."""
        code, said, memory = result
        last = said.strip().splitlines()[-1] if said.strip() else ""
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        ended = code in (0, 2, 130, 143, -9) and "Traceback" not in said
        found = ("hang" if code == "hang" else "traceback" if not ended else "silently wrong" if wrong else
                 "memory" if memory > base + 1024 else "done" if code in (0, -9) else
                 "one line" if re.match(r"\S+: .+", last) else "traceback")
        row = self.rows.setdefault(kind, Counter())
        row.update(["tried", found])
        if found not in ("one line", "done"):
            print(f"! {kind}: {name}: {found} {wrong} ({code}, {memory:.0f} MiB) {said[-1500:]}", flush=True)
        elif os.environ.get("SHOW"):
            print(f"{kind}: {name}: {code} {last[:230]}", flush=True)

    def __str__(self):
        total = sum(self.rows.values(), Counter())
        lines = ["| kind | " + " | ".join(FIGURES) + " |", "|---" * (1 + len(FIGURES)) + "|"]
        for kind, row in [*self.rows.items(), ("all", total)]:
            lines.append(f"| {kind} | " + " | ".join(str(row[figure]) for figure in FIGURES) + " |")
        return "\n".join(lines)


# ---- the kinds

def flags(table, root):
    """Values out of range or of another type, and settings that exclude each other."""
    for name, (_, config) in SCRIPTS.items():
        for f in fields(config):
            about, flag = f.metadata, data.spelled(f)
            number = not isinstance(f.default, str | bool)
            values = ["x", "", "1e400", "--", "nan"] if number else []
            values += [f"{about['least'] - 1:g}"] if about["least"] > -math.inf else []
            values += [f"{about['most'] + 1:.12g}"] if about["most"] < math.inf else []
            values += ["inf"] if number and about["most"] < math.inf else []
            for value in values if not about["bare"] else []:
                extra = ["--sample", "x"] if about["help"].startswith("with --sample") else []
                result = run(name, [*extra, f"{flag}={value}"], root)
                table.add("flags", f"{name} {flag}={value}", result, "taken" if result[0] == 0 else "")
    for line in (root / "exclusions.txt").read_text().splitlines():
        name, *argv = line.split()
        result = run(name, argv, root)
        table.add("flags that exclude each other", line, result, "taken" if result[0] == 0 else "")


EXCLUSIONS = """train_gen --data t --classes river
train_gen --data t --count 3
train_gen --data t --w 2
train_gen --data t --calls 4
train_gen --data t --augment cutmix
train_gen --data t --augment copypaste
train_gen --data t --augment blur
train_gen --sample gen/generator.pt --out new --steps 5
train_gen --sample gen/generator.pt --out new --size 32
train_gen --sample gen/generator.pt --out new --start .5
train_gen --sample gen/generator.pt --out new --paint x
train_gen --sample gen/generator.pt --out new --rounds 4
train_gen --sample gen/generator.pt --out new --calls 5000
train_gen --sample gen/generator.pt --out new --classes moon
train_gen --sample cls/classifier.pt --out new
train_gen --sample dropless/generator.pt --out new
train_gen --sample dropless/generator.pt --out new --classes any --w 1
train_gen --data t --given edgs
train_gen --data t --given pre
train_gen --data t --size 20
train_gen --data t --schedule square
train_gen --data t --predict y
train_gen --data t --mults
train_gen --data t --widht 3
train_cls --data t --share .5
train_cls --data t --synthetic t
train_cls --data t --pretrain
train_cls --data t --augment copypaste
train_cls --data t --model linear --steps 7
train_cls --data t --model resnet --depth 3
train_cls --data t --patch 7
train_cls --data t --dim 20
train_cls --data t --model mlp
train_cls --predict t --out cls --steps 3
train_cls --predict t --out cls --test
train_cls --predict t --out gen
data t --xbd
data t --download moon
augment t
augment nothing.png
experiment --smoke --scale full
experiment --data t --leg scenes
experiment --counts 3
experiment --data t --label type
experiment --data t --hold-out x
experiment --data xbd --skip-broken
experiment --data t --arms balanced
experiment --data t --seeds 5 --subsets 2
experiment --data t --size 20
experiment --study size
experiment --leg scenes --counts ten
experiment --data t --counts 4000
experiment --data nothing
"""


def readers(root, picture):
    """The commands that read a picture, and where it lies."""
    return {"data.py": ("data", ["t", "--size", 16], root / "t" / picture),
            "augment.py": ("augment", [root / "t" / picture], root / "t" / picture),
            "train_cls.py --predict": ("train_cls", ["--predict", "t", "--out", "cls"], root / "t" / picture),
            "xBD": ("data", ["xbd", "--size", 16], next((root / "xbd/train/images").glob("*_post_*")))}


def try_file(table, kind, name, write, command, path, root):
    """Put a bad file in a place, run a command, and put the good one back."""
    script, argv = command
    good = path.read_bytes()
    write(path)
    (root / "harmed").unlink(missing_ok=True)
    result = run(script, argv, root)
    table.add(kind, name, result, "code ran" if (root / "harmed").exists() else "")
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(good)


def pictures(table, root):
    """Bad pictures in all readers."""
    for reader, (script, argv, path) in readers(root, "river/river_001.jpg").items():
        for name, write in bad.pictures(flips=8):
            try_file(table, "pictures", f"{reader}: {name}", write, (script, argv), path, root)


def texts(table, root):
    """Bad labels, tables of numbers and lists."""
    label = next((root / "xbd/train/labels").glob("*_post_*"))
    for name, write in bad.labels(label.read_text(), edits=60):
        try_file(table, "labels", name, write, ("data", ["xbd", "--size", 16]), label, root)
    for name, write in bad.tables(edits=20):
        try_file(table, "tables", name, write, ("data", ["t", "--size", 16]), root / "t/numbers.csv", root)


def checkpoints(table, root):
    """Bad checkpoints of generators and classifiers, to make images with, to predict with, to go on from."""
    tree = ["--data", "t"]
    commands = {
        "gen/generator.pt": {"sample": ("train_gen", ["--sample", "gen/generator.pt", "--out", "made",
                                                      "--count", 1, "--calls", 1]),
                             "resume": ("train_gen", [*tree, "--out", "gen", *TINY["train_gen"]])},
        "cls/classifier.pt": {"predict": ("train_cls", ["--predict", "t", "--out", "cls"]),
                              "resume": ("train_cls", [*tree, "--out", "cls", *TINY["train_cls"]])}}
    for file, uses in commands.items():
        good = (root / file).read_bytes()
        for use, command in uses.items():
            for name, write in bad.checkpoints(good, edits=6):
                shutil.rmtree(root / "made", ignore_errors=True)
                try_file(table, "checkpoints", f"{use}: {name}", write, command, root / file, root)
                outside = [p for p in (root / "x", root.parent / "x", Path("/x")) if p.exists()]
                table.rows["checkpoints"]["code ran"] += len(outside)


def folders(table, root):
    """Wrong roots, and names that files may have."""
    def tried(name, argv, make=lambda: None, script="data"):
        shutil.rmtree(root / "odd", ignore_errors=True)
        shutil.copytree(root / "t", root / "odd")
        make()
        table.add("folders", name, run(script, argv, root))

    odd, first = root / "odd", "river/river_001.jpg"
    for wrong in ("nothing", "t/river", "xbd/train", "xbd/train/images", f"t/{first}", "exp", "gen", ".",
                  "/dev", "/proc/self", "a\nb", "\udcff", "x" * 300):
        tried(f"root {wrong!r}", [wrong, "--size", 16])
        tried(f"root {wrong!r}", ["--data", wrong, *TINY["train_cls"]], script="train_cls")
    for name in ("a\nb.jpg", "\x1b[31mx.jpg", "\udcff.jpg", "é.jpg", "x" * 200 + ".jpg", "x.webp", "x.heic",
                 "deep/x.jpg"):
        def make(name=name):
            (odd / "river" / name).parent.mkdir(exist_ok=True)
            shutil.copy(odd / first, odd / "river" / name)
        tried(f"picture {name!r}", ["odd", "--size", 16], make)
        tried(f"class {name!r}", ["odd", "--size", 16],
              lambda name=name: shutil.copytree(odd / "river", odd / name.replace("/", "_")))
    parts = {part: "".join(f"river_{k:03}.jpg\nforest_{k:03}.jpg\n" for k in ks)
             for part, ks in (("train", (1, 2, 3)), ("val", (4,)), ("test", (5,)))}
    edits = {"as they are": {}, "BOM": {"train": "\ufeff" + parts["train"]}, "one missing": {"val": None},
             "blank lines": {"test": "\n\n" + parts["test"] + " \n"}, "others": {"test": "moon.jpg\n"},
             "binary": {"train": "\0\1\udcff"}, "empty": {"val": ""}}
    for name, change in edits.items():
        def make(change=change):
            for part, text in (parts | change).items():
                if text is not None:
                    (odd / f"resisc45-{part}.txt").write_text(text, "utf-8", "surrogateescape")
        tried(f"lists: {name}", ["odd", "--size", 16], make)
    tried("link loop", ["odd", "--size", 16], lambda: (odd / "river/loop").symlink_to(odd))
    tried("own output in it", ["odd", "--size", 16], lambda: shutil.copytree(root / "gen", odd / "gen"))


def own(table, root):
    """A finished comparison of which one file is bad: it is made again with equal results, or refused."""
    argv = [*EXPERIMENT, "--out", "exp"]
    before = results(root)
    dice = random.Random(0)
    for pattern in ("cache/*.pt", "synthetic/*.pt", "judged/*.pt", "judged/*.png", "generators/*.pt",
                    "runs/*.json", "results.csv", "report.html", "drawn-scenes-30/numbers.csv",
                    "drawn-scenes-30/river/river_001.jpg"):
        path = sorted((root / "exp").glob(pattern))[0]
        others = sorted((root / "exp").glob(pattern))
        bads = [*bad.damaged(path.read_bytes(), 3, dice.random()), ("missing", lambda path: path.unlink()),
                ("a neighbour", bad.written(others[-1].read_bytes()))]
        if path.suffix == ".json":
            some = json.loads(path.read_bytes())
            bads += [(f"edit {k}", bad.written(json.dumps(bad.edited(some, dice)).encode()))
                     for k in range(6)]
        for name, write in bads:
            shutil.rmtree(root / "copy", ignore_errors=True)
            shutil.copytree(root / "exp", root / "copy")
            here = root / "copy" / path.relative_to(root / "exp")
            write(here)
            result = run("experiment", [*EXPERIMENT, "--out", "copy"], root, limit=200)
            same = result[0] or "has changed" in result[1] or results(root, "copy") == before
            table.add("own files", f"{pattern}: {name}", result, "" if same else "other results")
    assert run("experiment", argv, root)[0] == 0 and results(root) == before


def results(root, out="exp"):
    """The answers of all runs of a comparison."""
    files = sorted((root / out / "runs").glob("*.json"))
    rows = [json.loads(path.read_bytes()) for path in files]
    return [{k: v for k, v in row.items() if k not in ("seconds", "check", "commit")} for row in rows]


def disks(table, root):
    """A disk that is full after so many bytes, a file where a folder belongs, and the other way round."""
    commands = {"data": ["t", "--size", 16, "--out", "new/x.png"], "augment": ["--out", "new/x.png"],
                "train_gen": ["--data", "t", "--out", "new", *TINY["train_gen"]],
                "train_cls": ["--data", "t", "--out", "new", *TINY["train_cls"]],
                "experiment": [*EXPERIMENT, "--out", "new"]}
    for name, argv in commands.items():
        for size in (0, 100, 5_000, 60_000):
            shutil.rmtree(root / "new", ignore_errors=True)
            shutil.rmtree(root / "runs/cache", ignore_errors=True)

            def full(size=size):
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                for number, path in ((1, "stdout"), (2, "stderr")):      # these are not on that disk
                    os.dup2(os.open(f"/dev/shm/{path}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

            code, _, memory = run(name, argv, root, full)
            half = [p for p in (root / "new").rglob("*") if p.is_file() and not whole(p)]
            said = Path("/dev/shm/stderr").read_text()
            table.add("disks", f"{name}: {size} bytes", (code, said or "x: -", memory),
                      f"half written: {half}" if half else "")
        for what, make in {"file": lambda p: p.write_text("x"),
                           "read-only": lambda p: p.symlink_to("/proc/self"),
                           "link to nothing": lambda p: p.symlink_to("nowhere/x")}.items():
            shutil.rmtree(root / "new", ignore_errors=True)
            make(root / "new")
            table.add("disks", f"{name}: {what} in the place of its folder", run(name, argv, root))
            (root / "new").unlink(missing_ok=True)
    (root / "new/x.png").mkdir(parents=True)
    for name in ("data", "augment"):
        table.add("disks", f"{name}: a folder in the place of its file", run(name, commands[name], root))
    for name, file in (("train_gen", "generator.csv"), ("train_cls", "classifier.pt"),
                       ("experiment", "report.html")):
        shutil.rmtree(root / "new", ignore_errors=True)
        (root / "new" / file / "x").mkdir(parents=True)
        table.add("disks", f"{name}: a folder in the place of {file}", run(name, commands[name], root))
    shutil.rmtree(root / "new", ignore_errors=True)


def whole(path):
    """Is a file that was written complete?"""
    try:
        if path.suffix == ".pt":
            data.load(path)
        elif path.suffix in (".png", ".jpg"):
            data.decode(path, 8)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        return path.stat().st_size > 0
    except Exception:
        return False


def terminals(table, root):
    """A terminal that has no é and no ±, and one that goes away."""
    def ascii_only():
        sys.stdout, sys.stderr = streams("ascii")

    def gone():
        ends = os.pipe()
        os.close(ends[0])
        os.dup2(ends[1], 1)
        sys.stdout, sys.stderr = streams("utf-8")

    for name, argv in {"data": ["é", "--size", 16], "experiment": [*EXPERIMENT, "--out", "exp"],
                       "train_cls": ["--data", "é", "--out", "é/out", *TINY["train_cls"]],
                       "train_gen": ["--sample", "é", "--out", "new"], "augment": ["é.png"]}.items():
        for what, before in (("ASCII", ascii_only), ("gone", gone)):
            table.add("terminals", f"{name}: {what}", run(name, argv, root, before))


def two_at_once(table, root):
    """Two runs with one --out: the second says so, and the first ends as if alone."""
    for name, argv in {"train_gen": ["--data", "t", "--out", "two", *TINY["train_gen"], "--steps", 400],
                       "train_cls": ["--data", "t", "--out", "two", *TINY["train_cls"], "--steps", 900],
                       "experiment": [*EXPERIMENT, "--out", "two"]}.items():
        shutil.rmtree(root / "two", ignore_errors=True)
        (root / "first").mkdir(exist_ok=True)
        pid = os.fork()
        if not pid:
            here = [root / a if str(a) in ("t", "two") else a for a in argv]
            child(name, here, root / "first", lambda: None)
        while not (root / "two").exists():
            time.sleep(0.01)
        second = run(name, argv, root)
        table.add("two at once", name, second, "" if second[0] == 2 else "not refused")
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        table.add("two at once", f"{name}, the first", (code, "", 0), "it did not end" if code else "")


def kills(table, root):
    """Kill at random moments until it is done: equal results, and nothing half-written stays."""
    dice, before, k, begun = random.Random(0), results(root), 0, 0
    while k < 70:
        out, first, begun = f"killed{begun}", k, begun + 1
        while True:
            how = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            code, said, memory = run("experiment", [*EXPERIMENT, "--out", out], root,
                                     kill=(dice.uniform(0.3, 6 + k - first), how), limit=400)
            k += code != 0
            wrong = "" if code in (0, -9, 128 + how) else f"exit {code} after signal {how}"
            table.add("kills", f"signal {how}", (code, said, memory), wrong)
            if code == 0:
                break
        left = [*(root / out).rglob(f".{data.HOST}-*")]
        wrong = "other results" if results(root, out) != before else f"left: {left}" if left else ""
        table.add("kills", "the end", (0, "", 0), wrong)


def prepare(root):
    """Make the good files that are to be spoilt."""
    data.draw_tree(root / "t", 5, size=32)
    shutil.copytree(root / "t", root / "é")
    data.draw_xbd(root / "xbd", 16, side=96)
    (root / "exclusions.txt").write_text(EXCLUSIONS)
    for name, argv in (("train_gen", ["--data", "t", "--out", "gen", *TINY["train_gen"]]),
                       ("train_gen", ["--data", "t", "--out", "dropless", *TINY["train_gen"], "--drop", 0]),
                       ("train_cls", ["--data", "t", "--out", "cls", *TINY["train_cls"]]),
                       ("experiment", [*EXPERIMENT, "--out", "exp"])):
        result = run(name, argv, root, limit=600)
        assert result[0] == 0, result


KINDS = flags, pictures, texts, folders, checkpoints, own, disks, terminals, two_at_once, kills


def main(wanted=""):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "here"
        root.mkdir()
        prepare(root)
        table = Table()
        for kind in KINDS:
            if wanted in kind.__name__:
                start = time.time()
                kind(table, root)
                print(f"{kind.__name__}: {time.time() - start:.0f} s\n{table}\n", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
