"""How fast this is beside the peers: a table of ratios, never a test.

    python tests/bench.py                  # all rows; python tests/bench.py WORD: those with WORD in the name
    pip install diffusers denoising-diffusion-pytorch timm torchvision    # the peers, in a venv of their own

Every ratio is the median of pairs measured in turns in one process, so that a busy machine slows both sides.
Peers do what their own examples do, at our sizes, precision and batch; one that is not installed is named.
Measured on 2 cores of an AMD EPYC, torch 2.13 CPU, beside other work, and on an NVIDIA H200, torch 2.11
(commit 64fd9df), where small steps wait for its slow processor:

    row                                                                target        CPU         H200
    sampling loop / its bare network calls                             at most 1.03  1.02        1.03
    CUDA graph of the loop / without, small network                    2                         3.2
    images sampled per second / diffusers, denoising-diffusion-pytorch 1.2, 2        1.34, 2.11  1.56, 1.18
    generator training step / diffusers, denoising-diffusion-pytorch   1.1, 1.5      1.31, 1.45  1.36, 1.29
    ViT training step (plain patches) / timm                           1.1           1.04        1.09
    default augmentation of a batch / torchvision v2 image by image    8             6.2 to 7.8  176
    decoding 256-px JPEG to 64 px / Pillow one by one                  3             1.9 to 2.1  2.1
    network calls for the quality of 100 of DDIM                       at most 0.2   0.07        0.07
    memory of training at the default size, of 8 GiB                   1             0.79        0.88
"""
import importlib
import os
import platform
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path[:0] = [str(Path(__file__).parent.parent)]
warnings.filterwarnings("ignore")

import data  # noqa: E402
import ddpm  # noqa: E402
import train_cls  # noqa: E402
import train_gen  # noqa: E402
from augment import OVERHEAD, compose  # noqa: E402
from unet import Condition  # noqa: E402

DEVICE = data.pick_device()
GPU = DEVICE.type == "cuda"
GEN = train_gen.Config(augment="none", **({} if GPU else dict(size=32, width=32, batch=16)))
CLS = train_cls.Config(augment="none", **({} if GPU else dict(batch=64)))
CALLS, ROUNDS = (12, 9) if GPU else (5, 5)


class Absent(Exception):
    pass


def peer(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name} is not installed") from error


def seconds(run):
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(ours, theirs, rounds=ROUNDS):
    """Median seconds of ours and of theirs, and the median of theirs / ours."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return median(a for a, _ in pairs), median(b for _, b in pairs), median(b / a for a, b in pairs)


def steps_in_turns(train, theirs, rounds=ROUNDS):
    """The same for a real training loop of ours: the peer takes a step between two of its steps.

    train(steps) must run the loop; the first two steps and the last, which logs, are not counted.
    """
    pairs = []

    def progress(items, *_, **__):
        for step in items:
            start = time.perf_counter()
            yield step
            ours = seconds(lambda: None) + time.perf_counter() - start
            pairs.append((ours, seconds(theirs)))

    original, data.progress = data.progress, progress
    try:
        train(rounds + 3)
    finally:
        data.progress = original
    pairs = pairs[2:-1]
    return median(a for a, _ in pairs), median(b for _, b in pairs), median(b / a for a, b in pairs)


def scenes(n, size, classes=45):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=g)
    return data.Scenes(images, torch.arange(n) % classes, [str(c) for c in range(classes)],
                       [str(k) for k in range(n)], torch.arange(n))


def our_generator(cfg=GEN):
    """With a network whose weights are not the zeros that it starts with."""
    diffusion, model = train_gen.networks(cfg, 45, 3)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.01)
    return diffusion.to(DEVICE), model.to(DEVICE).eval()


def millions(model):
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"


# ---- our own loops

def loop():
    """The sampler against the network calls it makes, with guidance."""
    diffusion, model = our_generator()
    y = torch.arange(GEN.batch, device=DEVICE) % 45
    noise = train_gen.noise_of(range(GEN.batch), (3, GEN.size, GEN.size), DEVICE)
    x, t, cond = noise(), torch.full((2 * GEN.batch,), 500, device=DEVICE), Condition(y).and_null()

    @torch.no_grad()
    def bare():
        with data.autocast(DEVICE):
            for _ in range(CALLS):
                model(torch.cat([x, x]), t, cond)

    def ours():
        with data.autocast(DEVICE):
            diffusion.sample(model, Condition(y), noise, CALLS, w=1.5)

    ours_s, bare_s, ratio = in_turns(ours, bare)
    return 1 / ratio, f"{ours_s * 1e3:.0f} ms for {CALLS} calls at batch 2 x {GEN.batch}"


def graph():
    """A graph's replays against our plain loop, for a small network."""
    if not GPU:
        raise Absent("needs CUDA")
    cfg = train_gen.Config(size=32, width=32)
    diffusion, model = our_generator(cfg)
    cond = Condition(torch.arange(16, device=DEVICE))
    noise = train_gen.noise_of(range(16), (3, 32, 32), DEVICE)

    def run(graph):
        with data.autocast(DEVICE):
            diffusion.sample(model, cond, noise, 12, graph=graph)

    ours, plain, ratio = in_turns(partial(run, True), partial(run, False))
    return ratio, f"{ours * 1e3:.0f} ms with the recording, {plain * 1e3:.0f} ms without a graph"


# ---- diffusers and denoising-diffusion-pytorch

def diffusers_net():
    deep = len(GEN.mults) - 1
    return peer("diffusers").UNet2DModel(
        sample_size=GEN.size, block_out_channels=[m * GEN.width for m in GEN.mults],
        layers_per_block=GEN.blocks, down_block_types=["DownBlock2D"] + ["AttnDownBlock2D"] * deep,
        up_block_types=["AttnUpBlock2D"] * deep + ["UpBlock2D"], attention_head_dim=64, norm_num_groups=8,
        num_class_embeds=46).to(DEVICE)


def lucidrains_net():
    package = peer("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    package.tqdm = lambda items, **_: items
    net = package.Unet(dim=GEN.width, dim_mults=GEN.mults).to(DEVICE)
    return net, package.GaussianDiffusion(net, image_size=GEN.size, sampling_timesteps=CALLS).to(DEVICE)


def compare_sampling(theirs, net):
    diffusion, model = our_generator()
    y, shape = torch.arange(GEN.batch) % 45, (3, GEN.size, GEN.size)
    noise = train_gen.noise_of(range(GEN.batch), shape, DEVICE)

    def ours():
        with data.autocast(DEVICE):
            diffusion.sample(model, Condition(y.to(DEVICE)), noise, CALLS)

    def autocast():
        with data.autocast(DEVICE), torch.no_grad():
            theirs()

    ours_s, theirs_s, ratio = in_turns(ours, autocast)
    return ratio, (f"{GEN.batch / ours_s:.2f} and {GEN.batch / theirs_s:.2f} images/s, {CALLS} calls, "
                   f"{GEN.size} px; {millions(model)} and {millions(net)} parameters")


def sample_diffusers():
    net, scheduler = diffusers_net().eval(), peer("diffusers").DDIMScheduler()
    y = torch.arange(GEN.batch, device=DEVICE) % 45

    def theirs():                                            # the loop of DDIMPipeline
        x = torch.randn(GEN.batch, 3, GEN.size, GEN.size, device=DEVICE)
        scheduler.set_timesteps(CALLS)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t, class_labels=y).sample, t, x).prev_sample

    return compare_sampling(theirs, net)


def sample_lucidrains():
    net, diffusion = lucidrains_net()
    return compare_sampling(lambda: diffusion.sample(batch_size=GEN.batch), net)


def compare_training(loss_of, net, optimizer, update_ema):
    """Their step on a batch that is there already; ours is train_gen.train itself, which draws its own."""
    x = data.to_float(scenes(GEN.batch, GEN.size).images).to(DEVICE)

    def theirs():
        with data.autocast(DEVICE):
            loss = loss_of(x)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_ema()

    def train(steps):
        train_gen.train(scenes(4 * GEN.batch, GEN.size), replace(GEN, steps=steps))

    ours_s, theirs_s, ratio = steps_in_turns(train, theirs)
    return ratio, (f"{ours_s * 1e3:.0f} and {theirs_s * 1e3:.0f} ms a step of {GEN.batch} images, "
                   f"{GEN.size} px")


def train_diffusers():
    """As their examples/unconditional_image_generation does."""
    net, scheduler = diffusers_net().train(), peer("diffusers").DDPMScheduler()
    ema = peer("diffusers.training_utils").EMAModel(net.parameters())
    y = torch.arange(GEN.batch, device=DEVICE) % 45

    def loss_of(x):
        t, noise = torch.randint(1000, (len(x),), device=DEVICE), torch.randn_like(x)
        return F.mse_loss(net(scheduler.add_noise(x, noise, t), t, class_labels=y).sample.float(), noise)

    return compare_training(loss_of, net, torch.optim.AdamW(net.parameters()),
                            lambda: ema.step(net.parameters()))


def train_lucidrains():
    """As its Trainer does, which moves the EMA every tenth step."""
    net, diffusion = lucidrains_net()
    ema = peer("ema_pytorch").EMA(diffusion, update_every=10)
    optimizer = torch.optim.Adam(net.parameters())
    return compare_training(lambda x: diffusion((x + 1) / 2), net, optimizer, ema.update)


# ---- timm, torchvision, Pillow

def train_vit():
    net = peer("timm").models.VisionTransformer(
        CLS.size, CLS.patch, num_classes=45, embed_dim=CLS.dim, depth=CLS.depth, num_heads=CLS.heads,
        class_token=False, global_pool="avg").to(DEVICE)
    optimizer = peer("timm.optim").create_optimizer_v2(net, opt="adamw", lr=1e-3, weight_decay=0.1)
    pool = scenes(4 * CLS.batch, CLS.size)
    x, y = data.to_float(pool.images[:CLS.batch]).to(DEVICE), pool.labels[:CLS.batch].to(DEVICE)

    def theirs():
        with data.autocast(DEVICE):
            loss = F.cross_entropy(net(x), y, label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    plain = replace(CLS, model="patches")                    # timm's stem is a linear map of patches as well
    ours_s, theirs_s, ratio = steps_in_turns(
        lambda steps: train_cls.fit(pool, None, replace(plain, steps=steps)), theirs, 4 * ROUNDS)
    return ratio, (f"{ours_s * 1e3:.0f} and {theirs_s * 1e3:.0f} ms a step of {CLS.batch} images, "
                   f"{CLS.size} px")


def augmentation():
    v2 = peer("torchvision.transforms.v2")
    quarter = v2.RandomChoice([v2.RandomRotation((a, a)) for a in (0, 90, 180, 270)])
    one = v2.Compose([v2.RandomHorizontalFlip(), quarter, v2.RandomResizedCrop(64, (0.4, 1)),
                      v2.ColorJitter(0.3, 0.3, 0.3, 0.05), v2.ToDtype(torch.float32, scale=True),
                      v2.Normalize([0.5] * 3, [0.5] * 3)])
    pool = scenes(256, 64)
    images, y, g = pool.images.to(DEVICE), torch.zeros(256, 45, device=DEVICE), data.rng(0, device=DEVICE)
    augment = compose(OVERHEAD)
    ours_s, theirs_s, ratio = in_turns(lambda: augment(data.to_float(images), y, g),
                                       lambda: torch.stack([one(image) for image in images]))
    return ratio, f"{ours_s * 1e3:.0f} and {theirs_s * 1e3:.0f} ms for 256 images of 64 px: {OVERHEAD}"


def decode(count=300):
    """Drawn scenes of 256 px: real pictures have more detail, and cost both sides more."""
    def plain(files):
        for path in files:
            np.asarray(Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC))

    with tempfile.TemporaryDirectory() as folder:
        names = list(data.SCENES)
        files = [Path(folder) / names[k % len(names)] / f"{k}.jpg" for k in range(count)]
        for k, path in enumerate(files):
            scene = data.draw_scene(path.parent.name, np.random.default_rng(k), size=256)[0]
            data.save_picture(scene, path, quality=90)
        ours_s, theirs_s, ratio = in_turns(lambda: data.decode_all(files, 64, "decoding"),
                                           lambda: plain(files))
    return ratio, f"{count / ours_s:.0f} and {count / theirs_s:.0f} pictures/s on {os.cpu_count()} cores"


# ---- what needs no clock

def calls():
    """The fewest calls of UniPC-2 as near to the truth as 100 of DDIM, on test_ddpm.py's wide mixture."""
    from test_ddpm import Wide, gaussian
    diffusion, noise = ddpm.Diffusion(), gaussian(200, 1, 1, 48)
    exact = Wide(diffusion)
    truth = diffusion.sample(exact, None, lambda: noise, steps=1000, clip=False)

    def off(steps, order):
        x = diffusion.sample(exact, None, lambda: noise, steps, order=order, clip=False)
        return (x - truth).square().mean().sqrt().item()

    ddim = off(100, 1)
    few = next(n for n in range(2, 100) if off(n, 2) <= ddim)
    return few / 100, f"{few} calls of UniPC-2 are off by {off(few, 2):.3f}, 100 of DDIM by {ddim:.3f}"


def memory():
    """Bytes of training the default generator at 64 px on RESISC45, counted on the CPU as on a GPU in bf16.

    The peak of a step is where the forward pass ends, so what is saved for the backward pass is counted:
    per image and per network, from batches of 1 and 2. On a GPU, autocast makes upsampling float32, which is
    not saved, and norms would be, if unet.Norm did not keep them in bfloat16.
    """
    cfg, images = train_gen.Config(), 31_500
    diffusion, model = train_gen.networks(cfg, 45, 3)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def saved(batch):
        kept = {}

        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        y = torch.zeros(batch, dtype=torch.long)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            diffusion.loss(model, torch.zeros(batch, 3, cfg.size, cfg.size), Condition(y))
        return sum(n for place, n in kept.items() if place not in weights)

    one, two = saved(1), saved(2)
    P = sum(p.numel() for p in model.parameters())
    parts = {"weights, gradients, 2 moments, EMA": 5 * 4 * P, "their bf16 copies": 2 * one - two,
             "data set (all images; training takes 60 %)": images * 3 * cfg.size**2,
             f"saved for the backward pass, batch {cfg.batch}": (two - one) * cfg.batch}
    for name, n in parts.items():
        print(f"    {n / 1e9:6.2f} GB  {name}")
    print(f"    {sum(parts.values()) / 1e9:6.2f} GB  in all, {cfg.size} px, {P / 1e6:.1f} M parameters")
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        train_gen.train(scenes(images, cfg.size), replace(cfg, steps=3))
        print(f"    {torch.cuda.max_memory_allocated() / 1e9:6.2f} GB  measured on this GPU")
    return sum(parts.values()) / 2**33, "of 8 GiB, before CUDA's own 0.3 to 0.6 GB"


ROWS = [                                                     # name, target, measure
    ("sampling loop / its network calls", "<= 1.03", loop),
    ("CUDA graph loop, small net, batch 16 : plain loop", ">= 2", graph),
    ("images/s : diffusers, UNet2DModel + DDIMScheduler", ">= 1.2", sample_diffusers),
    ("images/s : denoising-diffusion-pytorch", ">= 2", sample_lucidrains),
    ("generator training step : diffusers", ">= 1.1", train_diffusers),
    ("generator training step : denoising-diffusion-pytorch", ">= 1.5", train_lucidrains),
    ("ViT training step : timm VisionTransformer", ">= 1.1", train_vit),
    ("augmentation : torchvision v2, image by image", ">= 8", augmentation),
    ("decoding 256-px JPEG : Pillow, one by one, full scale", ">= 3", decode),
    ("network calls for equal quality / DDIM", "<= 0.2", calls),
    ("memory, training at the default size", "<= 1", memory),
]


def main(word=""):
    versions = []
    for name in ("torch", "diffusers", "denoising_diffusion_pytorch", "timm", "torchvision", "PIL"):
        try:
            versions.append(f"{name} {getattr(peer(name), '__version__', 'here')}")
        except Absent as absent:
            versions.append(str(absent))
    where = torch.cuda.get_device_name() if GPU else f"{platform.processor() or platform.machine()} CPU"
    print(f"{where}, {torch.get_num_threads()} threads, Python {platform.python_version()}\n"
          f"{', '.join(versions)}\n"
          f"a : b is b's time over a's, the higher the better; a / b is a share, the lower the better\n")
    for name, target, measure in ROWS:
        if word not in name:
            continue
        try:
            ratio, note = measure()
        except Absent as absent:
            print(f"{name:54} {target:>7}       -  {absent}", flush=True)
            continue
        met = ratio <= float(target[3:]) if target[0] == "<" else ratio >= float(target[3:])
        print(f"{name:54} {target:>7} {ratio:7.3f} {'      ' if met else 'MISSED'}  {note}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
