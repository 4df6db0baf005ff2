"""How fast this is beside the peers: a table of ratios, never a test.

    python tests/bench.py [WORD]           all measures, or those with WORD in their function's name
    pip install diffusers denoising-diffusion-pytorch timm torchvision    # in their own environment

A ratio is the median over pairs that are timed in turns, so that a busy machine slows both sides.
Peers do what their own examples do, with our sizes, precision and batch. On a CPU all is smaller.
"""
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import ddpm  # noqa: E402
import train_cls  # noqa: E402
import train_gen  # noqa: E402
from augment import OVERHEAD, compose  # noqa: E402
from unet import Condition  # noqa: E402

DEVICE = data.pick_device()
GPU = DEVICE.type == "cuda"
SMALL = train_gen.Config(size=32, width=32, batch=16, augment="none")
GEN = train_gen.Config(augment="none") if GPU else SMALL
CLS = train_cls.Config(model="patches", augment="none", batch=128 if GPU else 64)
STEPS, ROUNDS = (12, 9) if GPU else (5, 5)                   # sampling steps; pairs of times
WAIT = torch.cuda.synchronize if GPU else int                # until the GPU has finished
SHAPE, Y = (3, GEN.size, GEN.size), torch.arange(GEN.batch, device=DEVICE) % 45


def seconds(run):
    start = time.perf_counter()
    run()
    WAIT()
    return time.perf_counter() - start


def report(name, target, pairs, unit):
    """Print a row of the table, from pairs of seconds (ours, theirs)."""
    ours, theirs = (1000 * median(times) for times in zip(*pairs, strict=True))
    ratio = median(b / a for a, b in pairs)
    print(f"{name:35} {target:4} {ratio:6.2f} {'MISSED' * (ratio < target):6} "
          f"{ours:6.0f} {theirs:6.0f} ms for {unit}", flush=True)


def in_turns(ours, theirs):
    """Time two functions in turns, after a call of each."""
    with torch.no_grad(), data.autocast(DEVICE):
        return [(seconds(ours), seconds(theirs)) for _ in range(ROUNDS + 1)][1:]


def steps_in_turns(train, rounds, net, loss, update_ema=int):
    """Time the steps of our real training loop, train(steps), and after each a step of a peer."""
    def theirs():
        with data.autocast(DEVICE):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_ema()

    def progress(items, *_, **__):
        for step in items:
            start = time.perf_counter()
            yield step
            WAIT()
            pairs.append((time.perf_counter() - start, seconds(theirs)))
    optimizer, pairs = torch.optim.AdamW(net.train().parameters()), []
    with patch.object(data, "progress", progress):
        train(rounds + 3)
    return pairs[2:-1]                                       # the last one also checks the weights


def scenes(n, size):
    """Return n images of noise, of 45 classes."""
    images, k = torch.randint(256, (n, 3, size, size), dtype=torch.uint8), torch.arange(n)
    return data.Scenes(images, k % 45, [f"class {c}" for c in range(45)], k.tolist(), k)


def sampler(cfg, **how):
    """Return a function that samples a batch of ours, and the network."""
    generator = train_gen.Generator(cfg, range(45), 3).eval()
    noise = train_gen.noise_source(range(cfg.batch), (3, cfg.size, cfg.size), DEVICE)
    inputs = generator.network, Condition(Y[:cfg.batch]), noise, STEPS
    return lambda: generator.diffusion.sample(*inputs, **how), generator.network


def loop():
    """Our sampler beside the calls of the network in it; on a GPU beside itself without a graph."""
    ours, network = sampler(GEN, w=1.5)
    x, t = torch.randn(2 * GEN.batch, *SHAPE, device=DEVICE), Y.repeat(2)
    pairs = in_turns(ours, lambda: [network(x, t, Condition(Y).and_null()) for _ in range(STEPS)])
    report("network calls : our sampling loop", 0.97, pairs, f"{STEPS} steps with guidance")
    if GPU:
        ours, _ = sampler(SMALL)
        plain = patch.object(ddpm, "Replay", lambda network: network)(ours)
        report("no CUDA graph : CUDA graph", 2, in_turns(ours, plain), "a small network")


def against(name, targets, net, sample, loss, update_ema):
    """Compare with a peer's sample() of a batch, and its loss(x0) of a batch."""
    pairs = in_turns(sampler(GEN)[0], sample)
    report(f"{name} : sampling", targets[0], pairs, f"{GEN.batch} images, {STEPS} steps")
    pool, x0 = scenes(4 * GEN.batch, GEN.size), torch.rand(GEN.batch, *SHAPE, device=DEVICE) * 2 - 1
    pairs = steps_in_turns(lambda steps: train_gen.train(pool, replace(GEN, steps=steps)), ROUNDS,
                           net, lambda: loss(x0), update_ema)
    report(f"{name} : training", targets[1], pairs, f"a step of {GEN.batch} images")


def diffusers():
    """The loop of DDIMPipeline, the training of its examples (5.6 M weights on a CPU, ours 4.5)."""
    import diffusers as package
    from diffusers.training_utils import EMAModel
    ddim, noising, deep = package.DDIMScheduler(), package.DDPMScheduler(), len(GEN.mults) - 1
    net = package.UNet2DModel(
        sample_size=GEN.size, block_out_channels=[m * GEN.width for m in GEN.mults],
        layers_per_block=GEN.blocks, attention_head_dim=64, norm_num_groups=8, num_class_embeds=46,
        down_block_types=["DownBlock2D"] + ["AttnDownBlock2D"] * deep,
        up_block_types=["AttnUpBlock2D"] * deep + ["UpBlock2D"]).to(DEVICE)
    def sample():
        x = torch.randn(GEN.batch, *SHAPE, device=DEVICE)
        ddim.set_timesteps(STEPS)
        for t in ddim.timesteps:
            x = ddim.step(net(x, t, class_labels=Y).sample, t, x).prev_sample

    def loss(x0):
        t, eps = torch.randint(1000, Y.shape, device=DEVICE), torch.randn_like(x0)
        return F.mse_loss(net(noising.add_noise(x0, eps, t), t, class_labels=Y).sample.float(), eps)
    ema = EMAModel(net.parameters())
    against("diffusers", (1.2, 1.1), net, sample, loss, lambda: ema.step(net.parameters()))


def lucidrains():
    """denoising-diffusion-pytorch; its Trainer moves the EMA every 10th step (3.9 M weights)."""
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as package
    from ema_pytorch import EMA
    package.tqdm = lambda items, **_: items
    net = package.Unet(GEN.width, dim_mults=GEN.mults)
    model = package.GaussianDiffusion(net, image_size=GEN.size, sampling_timesteps=STEPS).to(DEVICE)
    against("lucidrains", (2, 1.5), net, lambda: model.sample(batch_size=GEN.batch),
            lambda x0: model((x0 + 1) / 2), EMA(model, update_every=10).update)


def timm():
    """VisionTransformer; ours has a stem of plain patches here, too."""
    from timm.models import VisionTransformer
    net = VisionTransformer(CLS.size, CLS.patch, num_classes=45, embed_dim=CLS.dim, depth=CLS.depth,
                            num_heads=CLS.heads, class_token=False, global_pool="avg").to(DEVICE)
    pool = scenes(CLS.batch, CLS.size)
    x, y = data.to_float(pool.images).to(DEVICE), pool.labels.to(DEVICE)
    pairs = steps_in_turns(lambda steps: train_cls.fit(pool, None, replace(CLS, steps=steps)),
                           4 * ROUNDS, net, lambda: F.cross_entropy(net(x), y, label_smoothing=0.1))
    report("timm : training the ViT", 1.1, pairs, f"a step of {CLS.batch} images")


def torchvision():
    """Transforms v2, image by image, as in a data loader."""
    from torchvision.transforms import v2
    quarter = v2.RandomChoice([v2.RandomRotation((a, a)) for a in (0, 90, 180, 270)])
    one = v2.Compose([v2.RandomHorizontalFlip(), quarter, v2.RandomResizedCrop(64, (0.4, 1)),
                      v2.ColorJitter(0.3, 0.3, 0.3, 0.05), v2.ToDtype(torch.float32, scale=True),
                      v2.Normalize([0.5] * 3, [0.5] * 3)])
    images, y, augment = scenes(256, 64).images.to(DEVICE), Y[:1, None], compose(OVERHEAD)
    pairs = in_turns(lambda: augment(data.to_float(images), y, None), lambda: [*map(one, images)])
    report("torchvision : augmentation", 8, pairs, f"256 images of 64 px, {OVERHEAD}")


def pillow():
    """JPEG files of 256 px to 64 px, one by one; drawn ones are faster to decode than real ones."""
    with tempfile.TemporaryDirectory() as folder:
        root = data.draw_tree(Path(folder) / "scenes", 38, size=256)
        paths = [root / name for name in data.below(root, "*/*")]
        pairs = in_turns(lambda: data.decode_all(paths, 64), lambda: [
            Image.open(path).convert("RGB").resize((64, 64)) for path in paths])
    report("Pillow : decoding", 3, pairs, f"{len(paths)} pictures")


if __name__ == "__main__":
    names = "torch", "diffusers", "denoising-diffusion-pytorch", "timm", "torchvision"
    versions = [f"{p.name} {p.version}" for p in distributions() if p.name in names]
    print(torch.cuda.get_device_name() if GPU else "CPU", *versions, sep=", ")
    print(f"{'theirs : ours':35} goal  ratio          ours theirs")
    for measure in (loop, diffusers, lucidrains, timm, torchvision, pillow):
        try:
            if "".join(sys.argv[1:]) in measure.__name__:
                measure()
        except ImportError as error:
            print(f"{measure.__name__:35}    - {error}")
