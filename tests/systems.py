"""The lecture's systems in small, each with its figure beside an honest baseline: a script run by hand.

    python tests/systems.py [WORD ...]        the systems with WORD in the name; 1 to 4 minutes each,
                                              text_to_image 25

Seen on 2026-11-26 on 2 cores beside other work, torch 2.13 CPU: drawn data of 24 px, 768 scenes of 8 classes
(948 buildings) to train on, 256 (350) held out, 1000 steps of 32 images, 12 calls, w 1.5 unless it is given.
One generator of each kind, so no intervals: small differences say nothing. The pictures are in runs/systems.

    system, files and functions   what we saw
    super-resolution              class not told, w 1: PSNR 23.2 dB of a sample, 24.8 of the mean of 8, 24.9
      (DiffusionSat)              of bicubic: the generator does not win. Feature distance 1.9, 5.3, 18.4
      train_gen.lowres,           (other real images .24); the right class in .84, .80, .62 (real .95).
      unet.UNet: hint             Samples are grainier than real scenes.
    in-painting (RePaint)         0 known pixels changed. Mean step over the seam, and within the holes: real
      Diffusion.sample: known     9.9, 10.1; DDIM 14.4, 9.0; DDPM 11.8, 8.1; of 10 rounds DDIM 15.8, 14.3,
                                  DDPM 17.1, 15.5; a pasted sample 35.6 over the seam. More rounds make it
                                  worse: they leave bright and dark spots (for a perfect network they help,
                                  tests/test_ddpm.py). w 1.
    CRS-Diff, edges               F1 within 1 px .83, .88, .93 at w 1, 1.5, 3 (exactly there .58, .64, .69);
      train_gen.edges, divide     class alone .51, edges of other scenes .47, the edges as a picture 1. They
                                  cost likeness: feature distance 4.8, 2.8, 2.9 (class alone 1.1), the right
                                  class in .69, .77, .80 (.87). At w 3 colours are too strong.
    CRS-Diff, mask                IoU of a segmenter of real pairs with the mask .80, .86, .88 at w 1, 1.5, 3;
      data.read_xbd: mask,        on the real images .81; with another's mask .67 to .68, as all houses are in
      train_gen.divide            the middle. Above the real ones: samples are plainer, not better.
    metadata                      correlation within classes with the light .51 (real .57, shuffled asks .04),
      data.read_numbers,          with the haze -.56 (-.49, .01). Told one number alone from least to most,
      data.measure, unet.Numbers  images get 12 grey levels lighter (real ones 36) and 8 less saturated (12).
                                  The 5 real xBD labels tell all six numbers.
    SatSynth                      IoU of a segmenter (three convolutions, 3 seeds) on held-out pairs: trained
      C = 4, nothing given        on 200 real pairs .72 (.68 to .75), on 600 synthetic ones of a generator of
                                  these 200 .73 (.71 to .74), on both .76 (.75 to .76), on 800 real .74 (.73
                                  to .76). No loss, and a gain within the spread of the seeds; the masks of
                                  two houses share .70, so all of this is near the floor.
    real guidance (He et al.)     t* .15, .3, .45, .6, .75, .9: 13, 17, 20, 23, 28, 35 grey levels from the
      ddpm.sample: start,         picture (from noise 45, two of a class 44); the right class in .90, .87,
      Diffusion.plan              .85, .87, .88, .89 (from noise .87, real .95). Feature distance .8, 1.2,
                                  1.4, 1.8, 1.7, 1.4, from noise 1.1: between real and noise it is no better.
    text to image (Text2Earth)    UCM-Captions, 32 px, 1680 images, 2000 steps (at 8803c2c, 25 minutes of a
      --given text, --prompts,    core in all). Of 20 images of each of 21 classes, asked for as "an aerial
      unet.Words, vit.Text,       photo of a ...", a CLIP of the same training images finds the name in, at w
      vit.Attention: more         1, 1.5, 3: told the class .21, .33, .43; sentences .10, .15, .22; sentences
                                  that this CLIP reads, frozen, .06, .06, .10 (real ones .39, chance .05). A
                                  linear recogniser of these 420 has on real test images .25, .26, .23; .10,
                                  .11, .13; .05, .08, .12 (of as many real ones .32): in as many steps a class
                                  is learned, a sentence half, and a tower trained along beats a frozen one.
                                  With test sentences, w 3, cosine .73 to the own, .15 to a shuffled one
                                  (frozen .75, .14; real .68, .16). Beaches, harbours, diamonds, golf courses
                                  and orange roofs can be told apart; airplanes, courts, runways and rivers
                                  are textures; brown and green farmland look alike.
"""
import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import experiment  # noqa: E402
import train_cls  # noqa: E402
import train_gen  # noqa: E402
from train_gen import edges, generate, lowres  # noqa: E402
from unet import Condition  # noqa: E402

OUT, SMALL = Path("runs/systems"), experiment.SCALES["scenes"]["small"]
REAL = Path(__file__).resolve().parents[2] / "shared/data"


# ---- shared: data, networks, measures

@cache
def scenes():
    """Draw 8 classes of 160 scenes, 24 px -> 768 to train on, 256 to test with."""
    root = data.draw_tree(OUT / "scenes", 160)
    real = data.read_folder(root, 24, cache=OUT / "cache")
    parts = data.split(real)
    return real[parts["train"]], real[parts["test"]]


@cache
def buildings():
    """Draw 96 tiles of buildings with masks, 24 px -> those of 72 tiles to train on, of 24 to test with."""
    real = data.read_xbd(data.draw_xbd(OUT / "xbd", 96), 24, mask=True, cache=OUT / "cache")
    return real[real.official != data.TEST], real[real.official == data.TEST]


def trained(name, real, given="", steps=1000, size=24, tower=""):
    """Train a small generator, or go on with the one of an earlier run."""
    cfg = replace(SMALL.gen, given=given, steps=steps, size=size, tower=str(tower))
    return train_gen.train(real, cfg, OUT / f"{name}.pt", title=name)


@cache
def plain():
    """Train the generator that is told the class alone."""
    return trained("plain", scenes()[0])


@cache
def classifier():
    """Train a classifier on the real scenes."""
    return train_cls.fit(scenes()[0], None, replace(SMALL.cls, steps=500), title="classifier")[0]


def accuracy(images, labels):
    """Return the share of images that the classifier of real ones takes for what they should be."""
    return (train_cls.predict(classifier(), images) == labels).float().mean().item()


def distance(images, real):
    """Measure the Fréchet distance of the classifier's features, scaled to variance 1 over the real ones."""
    a, b = (train_cls.outputs(classifier().features, x) for x in (real, images))
    return experiment.frechet((a - a.mean(0)) / a.std(0), (b - a.mean(0)) / a.std(0))


def rmse(a, b):
    """Return the root mean square difference of uint8 images in grey levels."""
    return (a.float() - b.float()).square().mean().sqrt().item()


def tell(name, **figures):
    """Print a row of figures."""
    parts = [f"{what.replace('_', ' ')} {value:.3f}" for what, value in figures.items()]
    print(f"  {name:22}", ", ".join(parts), flush=True)


def sheet(name, rows):
    """Save pictures beneath each other, {what: (16, C, H, W) uint8}."""
    strips = [data.grid(images, 16) for images in rows.values()]
    data.save_picture(experiment.labelled(strips, list(rows), 3), OUT / f"{name}.png")


def head(images, masks, seed, steps=300):
    """Train a segmenter, three convolutions (15 px wide in all), on RGB (N, 3, H, W) and masks (N, H, W)."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=2, dilation=2),
              nn.ReLU(), nn.Conv2d(32, 1, 3, padding=4, dilation=4)]
    model, g = nn.Sequential(*layers), data.rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        index = torch.randint(len(images), (32,), generator=g)
        out = model(data.to_float(images[index]))[:, 0]
        F.binary_cross_entropy_with_logits(out, masks[index].float()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def iou(a, b):
    """Return intersection over union of masks (N, H, W) bool, of all pixels together."""
    return ((a & b).sum() / (a | b).sum()).item()


def marked(model, images):
    """Segment RGB images: (N, H, W) bool."""
    return train_cls.outputs(lambda x: model(x)[:, 0].flatten(1), images).view(-1, 24, 24) > 0


# ---- the systems

def super_resolution():
    """Enlarge 6 px to 24: one sample, and the mean of 8, beside interpolation (class not told)."""
    train, test = scenes()
    model, y = trained("lowres", train, "lowres"), torch.full((len(test),), -1)
    x = data.to_float(test.images)
    several = torch.stack([generate(model, y, seed, w=1.0, like=test) for seed in range(8)])
    cubic = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="bicubic")
    rows = {"bilinear": data.to_uint8(lowres(x)), "bicubic": data.to_uint8(cubic), "one sample": several[0],
            "mean of 8": several.float().mean(0).round().to(torch.uint8), "real": test.images}
    for name, images in rows.items():
        asked, found = (F.avg_pool2d(z.float(), 4) for z in (test.images, images))
        tell(name, PSNR=20 * math.log10(255 / max(rmse(images, test.images), 1e-9)),
             error_of_the_asked=rmse(asked, found), features=distance(images, test.images),
             right_class=accuracy(images, test.labels))
    tell("other real images", features=distance(train.images[::3], test.images))
    sheet("super-resolution", {name: images[::16] for name, images in rows.items()})


def painting():
    """Paint three holes of 6 x 6 pixels anew: the known region, the seam, and the error inside."""
    (_, test), model = scenes(), plain()
    test = test[torch.arange(0, 256, 2)]
    g, hole = data.rng(0), torch.zeros(len(test), 1, 24, 24, dtype=torch.bool)
    for k, (row, column) in enumerate(torch.randint(1, 17, (3 * len(test), 2), generator=g).tolist()):
        hole[k // 3, 0, row:row + 6, column:column + 6] = True
    found = {"real": test.images, "holes": torch.where(hole, 128, test.images).to(torch.uint8)}
    for rounds, eta in ((1, 0.0), (10, 0.0), (1, 1.0), (10, 1.0)):
        noise = train_gen.noise_of(range(len(test)), (3, 24, 24))
        out = model.diffusion.sample(model.model, Condition(test.labels), noise, order=1, eta=eta,
                                     known=(data.to_float(test.images), ~hole), rounds=rounds)
        found[f"rounds {rounds}, eta {eta:.0f}"] = data.to_uint8(out)
    found["pasted sample"] = torch.where(hole, generate(model, test.labels, 1, w=1), test.images)
    for name, images in found.items():
        slope = [images.float().diff(dim=d).abs().mean(1, keepdim=True) for d in (2, 3)]
        both = [hole.narrow(d, 0, 23).int() + hole.narrow(d, 1, 23).int() for d in (2, 3)]
        seam, inner = (torch.cat([z[n == k] for z, n in zip(slope, both, strict=True)]).mean()
                       for k in (1, 2))
        off = (images.float() - test.images.float()) * torch.where(hole, 1, 0)
        tone = (off.sum((2, 3)) / hole.sum((2, 3))).square().mean().sqrt()
        wrong = (images != test.images).amax(1, True)[~hole].sum()
        tell(name, known_pixels_changed=wrong, step_over_the_seam=seam, within_the_holes=inner,
             error_of_the_holes_mean=tone)
    sheet("painting", {name: images[::8] for name, images in found.items()})


def f1(asked, found, reach):
    """Return F1 of edges (N, 1, H, W) in {-1, 1}; one within `reach` pixels counts as found."""
    a, b = asked > 0, found > 0
    wide_a, wide_b = (F.max_pool2d(z.float(), 2 * reach + 1, 1, reach) > 0 for z in (a, b))
    precision, recall = (b & wide_a).sum() / b.sum(), (a & wide_b).sum() / a.sum()
    return (2 * precision * recall / (precision + recall)).item()


def crs_diff_edges():
    """Ask for the edges of held-out scenes, beside the class alone, and the edges themselves as a picture."""
    train, test = scenes()
    model, asked = trained("edges", train, "edges"), edges(data.to_float(test.images))
    near = torch.stack([((edges(data.to_float(train.images)) != a).sum((1, 2, 3))).argmin() for a in asked])
    rows = {"asked": data.to_uint8(asked.expand(-1, 3, -1, -1)), "real": test.images,
            "nearest in training": train.images[near], "class alone": generate(plain(), test.labels, 1)}
    rows |= {f"edges, w {w}": generate(model, test.labels, 1, w=w, like=test) for w in (1, 1.5, 3)}
    rows["edges, no class, w 1"] = generate(model, torch.full_like(test.labels, -1), 1, w=1, like=test)
    for name, images in rows.items():
        found = edges(data.to_float(images))
        tell(name, F1=f1(asked, found, 0), within_1_px=f1(asked, found, 1), share=(found > 0).float().mean(),
             right_class=accuracy(images, test.labels), features=distance(images, test.images))
    other = asked.roll(1, 0)
    tell("edges of other scenes", F1=f1(asked, other, 0), within_1_px=f1(asked, other, 1))
    sheet("crs-diff-edges", {name: images[::16] for name, images in rows.items()})


def crs_diff_mask():
    """Ask for the mask of held-out buildings; a segmenter of real pairs says what came out."""
    train, test = buildings()
    print(f"{len(train)} buildings to train on, {len(test)} to test with")
    test = test[torch.arange(min(256, len(test)))]
    asked, model = test.images[:, 3] > 0, trained("mask", train, "mask")
    segment = head(train.images[:, :3], train.images[:, 3] > 0, 0, 600)
    rows = {"asked": test.images[:, 3:].expand(-1, 3, -1, -1), "real": test.images[:, :3]}
    rows |= {f"mask, w {w}": generate(model, test.labels, 1, w=w, like=test) for w in (1, 1.5, 3)}
    for name, images in list(rows.items())[1:]:
        found = marked(segment, images)
        tell(name, IoU_with_the_asked=iou(found, asked), with_another=iou(found, asked.roll(1, 0)))
    tell("masks of two buildings", IoU=iou(asked, asked.roll(1, 0)))
    sheet("crs-diff-mask", {name: images[::16] for name, images in rows.items()})


def within(values, labels):
    """Take the mean of its class from each value."""
    means = torch.stack([values[labels == c].mean() for c in range(int(labels.max()) + 1)])
    return values - means[labels]


def metadata():
    """Ask for the light and the haze of held-out scenes; correlations within classes, and a sweep of each."""
    train, test = scenes()
    model = trained("numbers", train, "numbers")
    measures = {"light": lambda x: x.float().mean((1, 2, 3)),                           # brightness
                "haze": lambda x: (x.amax(1).float() - x.amin(1)).mean((1, 2))}         # saturation
    many = [test.images, *(generate(model, test.labels, 1, w=w, like=test) for w in (1.5, 1.0))]
    order = torch.randperm(len(test), generator=data.rng(0))
    for column, name in ((test.measures.index(name), name) for name in measures):
        numbers, measure = train.numbers[:, column], measures[name]
        asked = within(test.numbers[:, column], test.labels)
        found = [within(measure(images), test.labels) for images in many]
        r = [torch.corrcoef(torch.stack([asked, z]))[0, 1] for z in [*found, found[1][order]]]
        tell(name, correlation_real=r[0], generated=r[1], with_w_1=r[2], shuffled=r[3])
        rows = []
        for value in torch.linspace(numbers.min(), numbers.max(), 5):
            told = torch.full((128, len(test.measures)), math.nan)
            told[:, column] = value
            like = replace(test[torch.arange(128)], numbers=told)
            rows.append(generate(model, torch.arange(8).repeat_interleave(16), 2, w=1.0, like=like))
        slope = (asked @ found[0] / (asked @ asked)).item()
        tell("one noise, this told", **{f"step_{k}": measure(z).mean() for k, z in enumerate(rows)},
             real_difference=slope * (numbers.max() - numbers.min()))
        sheet(f"metadata-{name}", {f"{name} {k + 1} of 5": images[::8] for k, images in enumerate(rows)})
    for path in sorted(REAL.glob("xbd/train/labels/*.json")):
        read = zip(data.MEASURES, data.read_label(path)[3], strict=True)
        tell(path.stem[:22], **dict(read))


def satsynth():
    """Make images with their masks; a segmenter of real, of synthetic and of both pairs, on held-out ones."""
    train, test = buildings()
    few = train[torch.randperm(len(train), generator=data.rng(0))[:200]]
    real = few.images
    made = generate(trained("satsynth", few), few.labels.repeat(3), 1)
    pairs = {"real": real, "synthetic": made, "both": torch.cat([real.repeat(3, 1, 1, 1), made]),
             "four times as many real": train.images[:800]}
    for name, images in pairs.items():
        scores = [iou(marked(head(images[:, :3], images[:, 3] > 127, seed), test.images[:, :3]),
                      test.images[:, 3] > 127) for seed in range(3)]
        tell(name, IoU=sum(scores) / 3, least=min(scores), most=max(scores))
    middle = (made[:, 3] > 25) & (made[:, 3] < 230)
    covered = [(images[:, 3] > 127).float().mean() for images in (made, real)]
    tell("masks", neither_black_nor_white=middle.float().mean(), covers=covered[0], real_covers=covered[1])
    sheet("satsynth", {f"{who} {what}": some[:16, part].expand(-1, 3, -1, -1)
                       for who, some in (("real", real), ("synthetic", made))
                       for what, part in (("image", slice(3)), ("mask", slice(3, 4)))})


def real_guidance():
    """Start from held-out images at t* of the chain: how far it goes from them, and what class comes out."""
    (_, test), model = scenes(), plain()
    rows = {"real": test.images}
    rows |= {f"t* {t}": generate(model, test.labels, 1, like=test, start=t)
             for t in (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)}
    rows["from noise"] = generate(model, test.labels, 1)
    for name, images in rows.items():
        tell(name, distance=rmse(images, test.images), right_class=accuracy(images, test.labels),
             features=distance(images, test.images))
    order = [(test.labels == c).nonzero().flatten() for c in range(8)]
    two = (test.images[torch.cat(list(z))] for z in (order, [index.roll(1) for index in order]))
    tell("two real of a class", distance=rmse(*two))
    sheet("real-guidance", {name: images[::16] for name, images in rows.items()})


def two_stages():
    """Make images of 48 px from those of 24 (which tell 12), or at once: what are they worth in training?"""
    root = data.draw_tree(OUT / "scenes", 160)
    real = data.read_folder(root, 48, cache=OUT / "cache")
    parts = data.split(real)
    train, test = real[data.choose(real, parts["train"], 10, 0)], real[parts["test"]]
    small = replace(train, images=F.avg_pool2d(train.images.float(), 2).round().to(torch.uint8))
    y = torch.arange(8).repeat_interleave(60)
    kind = dict(images=generate(trained("first-24", small), y, 0), labels=y, classes=real.classes,
                names=[str(k) for k in range(len(y))], groups=torch.arange(len(y)))
    first = data.Scenes(**kind)
    like = replace(first, images=F.interpolate(first.images, scale_factor=2))
    second = generate(trained("second-48", train, "lowres", 600, 48), y, 0, like=like)
    at_once = generate(trained("at-once-48", train, "", 720, 48), y, 0)
    cls = replace(SMALL.cls, size=48, patch=8, steps=600, augment=experiment.OVERHEAD)
    sets = {"nothing": None, "bilinear": data.to_uint8(lowres(data.to_float(like.images))),
            "two stages": second, "at once": at_once}
    for name, images in sets.items():
        pool = images if images is None else replace(first, images=images)
        for share in (0.5, 1.0) if pool else (0.0,):
            models = [train_cls.fit(train, pool, replace(cls, seed=k, share=share))[0] for k in range(3)]
            right = [train_cls.predict(model, test.images) == test.labels for model in models]
            tell(f"{name}, share {share}", **{f"seed_{k}": r.float().mean() for k, r in enumerate(right)})
    rows = {"real": train.images[::5], "first": like.images[::30], "two stages": second[::30]}
    sheet("two-stages", rows | {"at once": at_once[::30]})


PROMPTS = """a river with dense green trees on both banks; a beach with blue sea and white sand
a dense forest; many boats docked neatly at the harbor; two airplanes at the airport
many cars in the parking lot; a tennis court; an old baseball diamond; a piece of brown farmland
a piece of green farmland; a straight runway; an intersection; houses with orange roofs
three white storage tanks; a golf course with green turfs and sand""".replace("\n", "; ").split("; ")


def text_to_image(steps=2000):
    """Train on UCM-Captions, 32 px: told the class, sentences, sentences that a frozen CLIP reads."""
    real = data.read(REAL / "UCM_captions", 32, cache=OUT / "cache")
    train, _, test = (real[index] for index in data.split(real).values())
    cls = replace(SMALL.cls, size=32, dim=64, depth=2, steps=1000)
    clip, tokens = train_cls.fit_clip(train, cls, OUT / "clip.pt")
    words = [data.in_words(name) for name in real.classes]
    said = [f"an aerial photo of a {name}" for name in words]
    names = train_cls.encode_texts(clip, tokens, words)
    captions = [some[0] for some in test.captions]
    sentences = train_cls.encode_texts(clip, tokens, captions)

    def judge(name, images, labels):
        seen = train_cls.outputs(clip.encode_image, images)
        synthetic = replace(train, images=images, labels=labels, names=[""] * len(labels), groups=labels,
                            captions=None, official=None, numbers=None)
        fitted = train_cls.fit(synthetic, None, replace(cls, model="linear"))[0]
        tell(name, CLIP_finds_its_name=((seen @ names.T).argmax(1) == labels).float().mean(),
             teaches=(train_cls.predict(fitted, test.images) == test.labels).float().mean())

    def compare(name, images):
        likeness = train_cls.outputs(clip.encode_image, images) @ sentences.T                    # (N, N)
        shuffled = likeness[:, torch.randperm(len(images), generator=data.rng(0))]
        (best, *_), _ = train_cls.recalls(likeness, torch.arange(len(images)))
        tell(name, likeness=likeness.diag().mean(), shuffled=shuffled.diag().mean(), found_of_210=best)

    few = torch.cat([(train.labels == c).nonzero().flatten()[:20] for c in range(len(words))])
    judge("real, 20 of a class", train.images[few], train.labels[few])
    compare("real", test.images)
    y = torch.arange(len(words)).repeat_interleave(20)
    for name, given, tower in (("class", "", ""), ("text", "text", ""),
                               ("text-by-a-frozen-CLIP", "text", OUT / "clip.pt")):
        model = trained(f"ucm-{name}", train, given, steps, 32, tower)
        for w in (1.0, 1.5, 3.0):
            judge(f"told {name}, w {w}", generate(model, y, 1, w=w, texts=[said[c] for c in y]), y)
            if given:
                compare(f"sentences to {name}, w {w}", generate(model, test.labels, 1, w=w, texts=captions))
                sheet(f"{name}-to-image-{w}", {text: generate(model, torch.full((16,), -1), 2, w=w,
                                                                 texts=[text] * 16) for text in PROMPTS})


SYSTEMS = (super_resolution, two_stages, painting, crs_diff_edges, crs_diff_mask, metadata, satsynth,
           real_guidance, text_to_image)


def main(words):
    """Run the systems with one of the words in the name, or all."""
    torch.manual_seed(0)
    for system in SYSTEMS:
        if not words or any(word in system.__name__ for word in words):
            print(f"\n{system.__name__}: {system.__doc__}", flush=True)
            system()


if __name__ == "__main__":
    main(sys.argv[1:])
