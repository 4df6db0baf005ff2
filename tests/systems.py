"""The systems of the lecture in small, on drawn data: each prints figures and what to look for.

    python tests/systems.py                all of them, one to four minutes each on two cores
    python tests/systems.py edges text     those with one of these words in their name
    python tests/systems.py --quick        to see them run: 10 steps of training teach nothing

One generator each and no intervals, so small differences say nothing. runs/systems/ has the first
16 pictures of each row, in the order of the rows, with masks beneath.
"""
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import train_cls  # noqa: E402
import train_gen  # noqa: E402
from experiment import SCALES  # noqa: E402
from train_gen import generate  # noqa: E402


class Lab:
    """Drawn data of 24 px, and networks: count scenes of each class, steps of a generator."""

    def __init__(self, count=160, steps=1000):
        small, self.out, self.steps = SCALES["scenes"]["small"], Path("runs/systems"), steps
        self.out /= f"{count}-{steps}"
        self.gen, self.cls = replace(small.gen, steps=steps), replace(small.cls, steps=steps // 2)
        real = data.read(data.draw_tree(self.out / "scenes", count), 24, cache=self.out / "cache")
        light = brightness(real.images)
        pairs = zip(real.labels, light > light.median(), strict=True)
        captions = [(sentence(*pair),) for pair in pairs]
        self.scenes = halves(replace(real, metadata=light[:, None], captions=captions))
        self.classifier = train_cls.fit(self.scenes[0], None, self.cls)

        xbd = data.draw_xbd(self.out / "xbd", 3 * count // 5)        # RGB after, RGB before, mask
        self.buildings = halves(data.read_xbd(xbd, 24, True, True, cache=self.out / "cache"))

    def generator(self, real, condition="", name="class"):
        """Train a generator, or take the one of an earlier run."""
        path = self.out / f"{condition or name}.pt"
        return train_gen.train(real, replace(self.gen, condition=condition), path, title=path.stem)

    def show(self, title, rows, measure):
        """Print measure(images), a dict, for each of rows {name: images}; save the first 16."""
        for name, images in rows.items():
            figures = [f"{what} {float(value):.3f}" for what, value in measure(images).items()]
            print(f"  {name:16} {', '.join(figures)}", flush=True)
        parts = [part for images in rows.values() for part in images[:16].split(3, 1)]
        pictures = torch.cat([part.expand(-1, 3, -1, -1) for part in parts])
        data.save_picture(data.grid(pictures, 16, zoom=3), self.out / f"{title}.png")


def halves(real):                                            # to train on, to test on
    parts = data.split(real)
    return real[parts["train"]], real[parts["test"]]


def sentence(c, bright):
    return f"a {'bright' if bright else 'dark'} {data.in_words(sorted(data.SCENES)[c])}"


def right(model, images, labels):                            # share of images
    return (train_cls.outputs(model, images).argmax(1) == labels).float().mean().item()


def brightness(images):                                      # of each, grey levels
    return images.float().mean((1, 2, 3))


def rms(a, b):                                               # grey levels
    return (a.float() - b.float()).square().mean().sqrt().item()


def super_resolution(lab):
    """DiffusionSat, 6 px to 24: a sample is sharp but not the truth; the mean of 8 is nearer."""
    train, test = lab.scenes
    generator, y = lab.generator(train, "lowres"), torch.full((len(test),), -1)
    x = F.avg_pool2d(data.to_float(test.images), 4)
    samples = torch.stack([generate(generator, y, seed, 12, 1.0, test) for seed in range(8)])
    rows = {"bicubic": data.to_uint8(F.interpolate(x, scale_factor=4, mode="bicubic")),
            "one sample": samples[0], "mean of 8": samples.float().mean(0).round().byte()}
    lab.show("super-resolution", rows, lambda images: {
        "grey levels off": rms(images, test.images),
        "right class": right(lab.classifier, images, test.labels)})


def metadata(lab):
    """DiffusionSat, given the brightness: images follow it more closely than by class alone."""
    train, test = lab.scenes
    rows = {"class alone": generate(lab.generator(train), test.labels, 1),
            "metadata": generate(lab.generator(train, "metadata"), test.labels, 1, reference=test)}
    lab.show("metadata", rows, lambda images: {"correlation": torch.corrcoef(
        torch.stack([test.metadata[:, 0], brightness(images)]))[0, 1]})


def inpainting(lab):
    """RePaint: known pixels stay, and the step over the seam is nearer to real than pasted."""
    train, test = lab.scenes
    hole = F.pad(torch.ones(len(test), 1, 8, 8, dtype=torch.bool), (8, 8, 8, 8))
    sample = partial(generate, lab.generator(train), test.labels, 1)
    rows = {"real": test.images, "inpainted": sample(100, 1.0, test, inpaint=hole),
            "pasted": torch.where(hole, sample(), test.images)}
    lab.show("inpainting", rows, lambda images: {
        "known pixels changed": ((images != test.images) & ~hole).sum(),
        "seam": (images[:, :, 8:16, 7].float() - images[:, :, 8:16, 8]).abs().mean()})


def edges(lab):
    """CRS-Diff, given edges: recall and precision within a pixel are above the class alone."""
    def agreement(images):
        seen = train_gen.edges(data.to_float(images))
        near_seen, near_asked = (F.max_pool2d(mask, 3, 1, 1) > 0 for mask in (seen, asked))
        return {"recall": near_seen[asked > 0].float().mean(),
                "precision": near_asked[seen > 0].float().mean(),
                "right class": right(lab.classifier, images, test.labels)}
    train, test = lab.scenes
    generator, asked = lab.generator(train, "edges"), train_gen.edges(data.to_float(test.images))
    rows = {"real": test.images, "class alone": generate(lab.generator(train), test.labels, 1)}
    rows |= {f"w {w}": generate(generator, test.labels, 1, 12, w, test) for w in (1.0, 1.5, 3.0)}
    lab.show("edges", rows, agreement)


def satsynth(lab):
    """SatSynth, images with masks: they train a segmenter nearly as well as the few real pairs."""
    def score(pairs):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 7, padding=3)]
        model, x, g = nn.Sequential(*layers), data.to_float(pairs), data.rng(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(lab.steps // 2):
            batch = x[torch.randint(len(x), (32,), generator=g)]
            target = (batch[:, 3:] > 0).float()
            F.binary_cross_entropy_with_logits(model(batch[:, :3]), target).backward()
            optimizer.step()
            optimizer.zero_grad()
        seen, true = model(data.to_float(test.images[:, :3])) > 0, test.images[:, 3:] > 127
        return {"IoU": (seen & true).sum() / (seen | true).sum()}
    train, test = (replace(real, images=real.images[:, [0, 1, 2, 6]]) for real in lab.buildings)
    few = train[torch.randperm(len(train), generator=data.rng(0))[:200]]
    images = generate(lab.generator(few, name="satsynth"), few.labels.repeat(3), 1)
    rows = {"few real": few.images, "synthetic": images, "all real": train.images,
            "few and synthetic": torch.cat([few.images.repeat(3, 1, 1, 1), images])}
    lab.show("satsynth", rows, score)


def before_after(lab):
    """NeDS, given the picture before and a mask: another damage is seen, at the same place."""
    train, test = lab.buildings
    classifier = train_cls.fit(replace(train, images=train.images[:, :3]), None, lab.cls)
    asked, before = (test.labels + 1) % 4, test.images[:, 3:6]
    rows = {"before": before, "real after": test.images[:, :3],
            "generated after": generate(lab.generator(train, "pre,mask"), asked, 1, reference=test)}
    lab.show("before-after", rows, lambda images: {
        "asked damage": right(classifier, images, asked), "from before": rms(images, before),
        "from another place": rms(images, before.roll(1, 0))})


def text(lab):
    """Text2Earth: sentences decide the light and the class, it less surely than its label does."""
    train, _ = lab.scenes
    generator, y = lab.generator(train, "text"), torch.arange(len(train.classes)).repeat(16)
    rows = {"by label": generate(lab.generator(train), y, 1)}
    for name, bright, w in (("dark", 0, 1.5), ("bright", 1, 1.5), ("bright, w 3", 1, 3.0)):
        texts = [sentence(c, bright) for c in y]
        rows[name] = generate(generator, torch.full_like(y, -1), 1, 12, w, texts=texts)
    lab.show("text", rows, lambda images: {"right class": right(lab.classifier, images, y),
                                           "grey level": images.float().mean()})


def clip(lab):
    """He et al., CLIP tuned on 4 real images a class, and on ones that start from them at t*."""
    train, test = lab.scenes
    few, path = train[data.choose(train, torch.arange(len(train)), 4, 0)], lab.out / "clip.pt"
    train_cls.fit_clip(train, lab.cls, path)
    cfg = replace(lab.cls, init=str(path), tune="head", share=0.5)
    zero_shot = train_cls.tune(few, None, replace(cfg, tune="none"), None)
    print(f"  zero-shot        accuracy {right(zero_shot, test.images, test.labels):.3f}")
    start = few[torch.arange(8 * len(few)) // 8]
    rows = {"real": start.images}
    for t in (0.15, 0.35, 0.7, 1.0):
        rows[f"t* {t}"] = generate(lab.generator(train), start.labels, 1, 12, 1.5, start, t)
    lab.show("clip", rows, lambda images: {
        "accuracy": right(train_cls.tune(few, replace(start, images=images), cfg, None),
                          test.images, test.labels), "from real": rms(images, start.images)})


if __name__ == "__main__":
    lab = Lab(count=20, steps=10) if "--quick" in sys.argv else Lab()
    words = [word for word in sys.argv[1:] if word != "--quick"] or [""]
    for system in super_resolution, metadata, inpainting, edges, satsynth, before_after, text, clip:
        if any(word in system.__name__ for word in words):
            print(f"\n{system.__name__}: {system.__doc__}", flush=True)
            system(lab)
