"""The noise process of denoising diffusion: q drowns an image in noise step by step, p brings one back.

There are no weights in this file; the network is an argument. The letters are those of the papers:

    x0   an image in [-1, 1], (B, C, H, W)        x    the same after t + 1 steps of noise
    eps  standard normal noise                    t    0 (least noise) .. T - 1 (nothing but noise)
    abar the share of the image's variance left   eta  1: fresh noise at every step (DDPM), 0: none (DDIM)
    v    sqrt(abar) eps - sqrt(1 - abar) x0       w    guidance scale; w = 1 is no guidance

DDPM: Ho et al. 2020 (2006.11239). DDIM: Song et al. 2021 (2010.02502). Cosine schedule: Nichol & Dhariwal
2021 (2102.09672). v: Salimans & Ho 2022 (2202.00512). Guidance: Ho & Salimans 2022 (2207.12598).
DPM-Solver++(2M): Lu et al. 2022 (2211.01095).
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn


def linear_abar(T):
    """The schedule of the lecture (Ho et al., section 4): beta from 1e-4 to 0.02 at T = 1000. (T,) float64.

    Shorter chains get proportionally larger betas, or x_T would still show the image: at T = 100
    sqrt(abar_T) would be .60.
    """
    if T <= 20:
        raise ValueError(f"the linear schedule needs T > 20, not {T}: below, beta reaches 1; use cosine")
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    return (1 - beta).cumprod(0)                                    # Eq. 4: abar_t = prod_{s<=t} (1 - beta_s)


def cosine_abar(T):
    """Nichol & Dhariwal Eq. 17, with their limit beta <= .999: the image fades evenly. (T,) float64."""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return (1 - beta).cumprod(0)


SCHEDULES = {"cosine": cosine_abar, "linear": linear_abar}


def posterior(abar, abar_prev, eta=1.0):
    """q(x_prev | x_t, x0) = N(a x_t + b x0, sigma^2): returns a, b, sigma, shaped as abar.

    DDIM Eq. 7 and 16, for any two noise levels of the chain. With eta = 1 and neighbouring levels this is
    Ho et al. Eq. 6-7.
    """
    sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
    a = ((1 - abar_prev - sigma**2).clamp(min=0) / (1 - abar)).sqrt()
    b = abar_prev.sqrt() - a * abar.sqrt()
    return a, b, sigma


def guided(model, x, t, cond, w):
    """Classifier-free guidance (Eq. 6 there, w = 1 + their w): null + w (told - null), in one batch.

    The network may answer in bfloat16; the difference of two answers is taken in the precision of x.
    """
    if w == 1:
        return model(x, t, cond).to(x.dtype)
    told, null = model(torch.cat([x, x]), torch.cat([t, t]), cond.and_null()).to(x.dtype).chunk(2)
    return null + w * (told - null)


def noise_of(seeds, shape, device="cpu"):
    """A source of N(0, I): every call returns (B, *shape), B = len(seeds).

    Each image has a generator of its own, so that it does not depend on which others share its batch.
    """
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g, device=device) for g in generators])


def record(run):
    """What run() does on the GPU, as a CUDA graph: play(), and the results, which play() fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):        # waits for the GPU once, then takes down the kernels without a run
        results = run()
    return graph.replay, results


class Replay:
    """`step`, from tensors of fixed shapes to tensors, for a GPU: the same results from a recording.

    Python takes longer to launch the few hundred kernels of a small network than the GPU to run them; a graph
    is one launch. The first call is the plain one: it sets up cuDNN and cuBLAS, which must not be recorded,
    and as nothing here needs gradients it needs no side stream for that. The second call records.

    A graph reads and writes fixed places: arguments are copied there, and a call overwrites the results of
    the call before. What `step` takes from elsewhere (weights, and their bfloat16 copies, which autocast
    keeps to the end of its block) must stay where it is: so a Replay lives as long as one call of `sample`.
    Each call then pays one recording, about what Python takes for one step, and keeps no memory afterwards.
    (Written without a GPU at hand, its logic tested on the CPU: on one, run tests/test_ddpm.py first.)
    """

    def __init__(self, step):
        self.step, self.warm, self.play = step, False, None

    def __call__(self, *inputs):
        if not self.warm:
            self.warm = True
            return self.step(*inputs)
        if self.play is None:
            self.inputs = [z.clone() for z in inputs]
            self.play, self.results = record(lambda: self.step(*self.inputs))
        for mine, z in zip(self.inputs, inputs, strict=True):
            mine.copy_(z)
        self.play()
        return self.results


class Diffusion(nn.Module):
    """The chain: T noise levels, and what the network predicts from x_t, "v" or (as in the lecture) "eps"."""

    def __init__(self, T=1000, schedule="cosine", predict="v", gamma=5.0):
        super().__init__()
        assert predict in ("v", "eps"), predict
        self.T, self.predict, self.gamma = T, predict, gamma
        self.abar = SCHEDULES[schedule](T)                        # float64, stays on the CPU; the models use:
        self.register_buffer("signal", self.abar.sqrt().float(), persistent=False)         # (T,)
        self.register_buffer("noise", (1 - self.abar).sqrt().float(), persistent=False)    # (T,)

    def q_sample(self, x0, t, eps):
        """q(x_t | x0), Ho et al. Eq. 4: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps. t: (B,) int64."""
        signal, noise = self._at(t)
        return signal * x0 + noise * eps

    def loss(self, model, x0, cond, drop=0.1, generator=None, part=slice(None)):
        """Algorithm 1: how wrong the network is about each image, (B,), and at which t, (B,).

        With gamma = inf the mean is L_simple (Eq. 14), the squared error of eps, whatever is predicted. A
        share `drop` of the images is trained without its condition, which guidance needs. Everything is drawn
        for the whole batch, then only `part` of it is computed: the rest is for other processes.
        """
        kw = dict(device=x0.device, generator=generator)
        t = torch.randint(self.T, (len(x0),), **kw)
        eps = torch.randn(x0.shape, **kw)
        cond = cond.hide(torch.rand(len(x0), **kw) < drop)
        x0, t, eps, cond = x0[part], t[part], eps[part], cond[part]
        out = model(self.q_sample(x0, t, eps), t, cond)
        error = F.mse_loss(out, self._target(x0, t, eps), reduction="none").mean((1, 2, 3))
        return self.weight(t) * error, t

    def weight(self, t):
        """What the error at t counts, (B,): min-SNR (Hang et al. 2023, 2303.09556).

        It is min(SNR, gamma) in units of x0, with SNR = abar / (1 - abar). One unit of x0 is SNR units of eps
        and SNR + 1 of v, so without the cap this is L_simple. That spends most of the gradient on small t,
        where only the grain of the image is left to learn.
        """
        snr = (self.signal[t] / self.noise[t]) ** 2
        return snr.clamp(max=self.gamma) / (snr if self.predict == "eps" else snr + 1)

    @torch.no_grad()
    def sample(self, model, cond, noise, steps=20, eta=0.0, order=2, w=1.0, clip=True, graph=None):
        """Images (B, C, H, W) in [-1, 1]; `noise()` returns N(0, I) of that shape at every call.

        order=2 is DPM-Solver++(2M), for 10 to 25 steps; order=1, eta=0 is DDIM; order=1, eta=1, steps=T is
        DDPM (Algorithm 2). Few steps with eta > 0 lose variance (of a Gaussian with std .2, 50 steps return
        .176): keep eta = 0 there. graph: replay the steps from a CUDA graph (None: wherever there is CUDA).
        """
        assert not model.training, "call model.eval() first: dropout would stay on"

        def step(x, x0_last, t, row):
            signal, noise_t, a, b, _, c = row
            x0 = self._x0(x, guided(model, x, t.expand(len(x)), cond, w), signal, noise_t)
            # The clip is not in Algorithm 2, but in Ho's code: where abar is tiny, a small error of the
            # network is a huge one in x0. The step below takes the eps of this x0.
            if clip:
                x0 = x0.clamp(-1, 1)
            return a * x + b * (x0 + c * (x0 - x0_last)), x0          # Eq. 7 of DDPM and DDIM; with c, 2M

        x = noise()
        x0_last = torch.zeros_like(x)
        ts, table = self.plan(steps, eta, order)
        ts, table = ts.to(x.device), table.to(x.dtype).to(x.device)
        if graph or (graph is None and x.is_cuda):
            step = Replay(step)
        for t, row in zip(ts, table, strict=True):               # nothing in here waits for the GPU's answer
            x, x0_last = step(x, x0_last, t, row)
            if eta:
                x = x + row[4] * noise()                            # row[4] is sigma
        return x

    def plan(self, steps, eta=0.0, order=2):
        """Which t are visited, (steps,), and the numbers of each step, (steps, 6) float64.

        That is all that the loop needs to know. The t are dense near 0, where the image is decided (t ~ k^2),
        and all T of them if steps = T. The last step leads to abar = 1, the image itself: there a = sigma = 0
        and b = 1.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"{steps} sampling steps: must be 1 to T = {self.T}")
        assert order == 1 or (order == 2 and eta == 0), "order 2 is for sampling without fresh noise: eta = 0"
        k = torch.arange(steps, dtype=torch.float64)
        ts = torch.maximum((self.T - 1) * (k / max(steps - 1, 1)) ** 2, k).round().long()
        ts[-1] = self.T - 1                                         # always from pure noise, even in one step
        abar = self.abar[ts]
        abar_prev = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        a, b, sigma = posterior(abar, abar_prev, eta)

        # 2M: x0 is extrapolated to the middle of the step, linearly in lambda = log(signal / noise), from two
        # estimates. c = 0 (DDIM) in the first step, which has only one, and in the last, where lambda ends.
        c = torch.zeros_like(abar)
        if order == 2:
            h = -(abar / (1 - abar)).log().diff() / 2        # h[k]: lambda's way from ts[k + 1] down to ts[k]
            c[1:-1] = h[:-1] / (2 * h[1:])
        return ts.flip(0), torch.stack([abar.sqrt(), (1 - abar).sqrt(), a, b, sigma, c], dim=1).flip(0)

    def _at(self, t):
        """sqrt(abar_t) and sqrt(1 - abar_t), (B, 1, 1, 1)."""
        return self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)

    def _target(self, x0, t, eps):
        """What the network should have answered."""
        signal, noise = self._at(t)
        return eps if self.predict == "eps" else signal * eps - noise * x0

    def _x0(self, x, out, signal, noise):
        """The image that the network's answer stands for: Eq. 4, or the definition of v, solved for x0."""
        return (x - noise * out) / signal if self.predict == "eps" else signal * x - noise * out


def main(path="runs/ddpm.png"):
    """Draw both schedules: an image on its way into the noise, and below it sqrt(abar) over t."""
    column, row = torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 96)[:, None]
    disc = (column**2 + row**2 < 0.3) * 1.4 - 0.7
    x0 = torch.stack([(3 * row).sin() * column, disc, row - 0.3 * column])[None]
    eps, sheet = torch.randn_like(x0), Image.new("RGB", (96 * 8, 2 * 160), "white")
    for top, name in zip((0, 160), SCHEDULES, strict=True):
        diffusion = Diffusion(1000, name)
        for k, t in enumerate(torch.linspace(0, 999, 8).long()):
            x = diffusion.q_sample(x0, t[None], eps)[0].clamp(-1, 1)
            pixels = ((x + 1) * 127.5).round().byte().permute(1, 2, 0)
            sheet.paste(Image.fromarray(pixels.numpy()), (96 * k, top))
        curve = [(96 * 8 * t / 1000, top + 154 - 50 * s) for t, s in enumerate(diffusion.signal.tolist())]
        ImageDraw.Draw(sheet).line(curve, fill="black", width=2)
        ImageDraw.Draw(sheet).text((8, top + 138), name, fill="black")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"{path}: t = 0 .. 999 from left to right; above {', below '.join(SCHEDULES)}")


if __name__ == "__main__":
    main()
