"""Denoising diffusion (DDPM). A network learns to guess the clean image in a noisy one. To sample,
start from pure noise, then repeat: guess, move a little towards the guess, add a little noise.

    one step of q     x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps     (new eps at every step)
    t steps at once   x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps          (written a x0 + s eps)
    where             abar_t = product of (1 - beta_i) over all i <= t      (so that a^2 + s^2 = 1)

Why many steps: trained by squared error, the best guess is the mean of all images that may have
become x_t, at high noise a blur. A step towards it makes x_t more definite, the next guess sharper.

    x0   an image in [-1, 1], (B, C, H, W), or the network's guess of it
    x    the noisy image x_t                eps  standard normal noise
    t    0 (least noise) .. T - 1 (noise)   v    a eps - s x0
    eta  1: new noise at every step, 0: none    w    guidance scale, 1: no guidance

The network is an argument; a tiny one is trained at the end. DDPM: Ho et al. 2020 (2006.11239), who
count t from 1. DDIM: Song et al. 2021 (2010.02502). Cosine schedule: Nichol & Dhariwal 2021
(2102.09672). v: Salimans & Ho 2022 (2202.00512). Guidance: Ho & Salimans 2022 (2207.12598).
Rectified flow: Liu et al. 2023 (2209.03003). Order 2: DPM-Solver++(2M), Lu et al. 2022
(2211.01095), with the corrector of UniPC-1, Zhao et al. 2023 (2302.04867).
"""
import math
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import nn

# ---- noise schedules: abar for every t, (T,) float64


def linear_abar(T):
    """Schedule of Ho et al., section 4: beta rises from 1e-4 to 0.02 (for T = 1000)."""
    if T <= 20:
        raise ValueError(f"the linear schedule needs T > 20, not {T}: beta would reach 1")
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    return (1 - beta * 1000 / T).cumprod(0)               # fewer steps, each with more noise


def cosine_abar(T):
    """Schedule of Nichol & Dhariwal, Eq. 17: the image fades evenly; beta is at most .999."""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return (1 - beta).cumprod(0)


def flow_abar(T):
    """Schedule of rectified flow: x = (1 - u) x0 + u eps with u = (t + 1) / (T + 1), over its norm.

    Flow models predict eps - x0, a weighted sum of v and x: a network for one serves the other. The
    Euler step of a flow is the step of DDIM.
    """
    u = torch.arange(1, T + 1, dtype=torch.float64) / (T + 1)
    return (1 - u) ** 2 / ((1 - u) ** 2 + u**2)


SCHEDULES = {"cosine": cosine_abar, "linear": linear_abar, "flow": flow_abar}
PREDICTS = ("v", "eps", "x0")           # with x_t given, each of them determines the other two


class Diffusion(nn.Module):
    """A chain of T noise levels, and what the network predicts from x_t: "v", "eps" or "x0"."""

    def __init__(self, T=1000, schedule="cosine", predict="v", gamma=5.0):
        super().__init__()
        if predict not in PREDICTS:
            raise ValueError(f"predict is {predict}, must be one of {', '.join(PREDICTS)}")
        self.T, self.predict, self.gamma = T, predict, gamma
        self.abar = SCHEDULES[schedule](T)                # float64, stays on the CPU
        self.register_buffer("sqrt_abar", self.abar.sqrt().float(), persistent=False)
        self.register_buffer("sqrt_1m_abar", (1 - self.abar).sqrt().float(), persistent=False)

    # ---- training: Algorithm 1

    def q_sample(self, x0, t, eps):
        """Sample q(x_t | x0), Ho et al. Eq. 4: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps.

        x0, eps: (B, C, H, W); t: (B,) int64.
        """
        a, s = self.sqrt_abar[t].view(-1, 1, 1, 1), self.sqrt_1m_abar[t].view(-1, 1, 1, 1)
        return a * x0 + s * eps

    def target(self, x0, t, eps):
        """Return what the network should predict, (B, C, H, W).

        To get x0 from eps one divides by a: at high noise errors explode. To get eps from x0, by s:
        so at low noise. v is about -x0 at high noise and eps at low noise: what x does not show.
        """
        a, s = self.sqrt_abar[t].view(-1, 1, 1, 1), self.sqrt_1m_abar[t].view(-1, 1, 1, 1)
        return {"v": a * eps - s * x0, "eps": eps, "x0": x0}[self.predict]

    def x0_from(self, x, out, a, s):
        """Solve x = a x0 + s eps for x0; the network's output `out` is v, eps or x0 itself."""
        if self.predict == "v":
            return a * x - s * out                        # = (a^2 + s^2) x0
        return (x - s * out) / a if self.predict == "eps" else out

    def loss(self, model, x0, cond, drop=0.1, generator=None):
        """Algorithm 1: add noise to images x0 (B, C, H, W), predict, return the mean squared error.

        A share `drop` of the images is trained without its condition, as guidance needs:
        cond.drop(mask) is the condition without that of the images where mask, (B,) bool, is true.
        """
        t = torch.randint(self.T, (len(x0),), device=x0.device, generator=generator)
        eps = torch.randn(x0.shape, device=x0.device, generator=generator)
        dropped = torch.rand(len(x0), device=x0.device, generator=generator) < drop

        out = model(self.q_sample(x0, t, eps), t, cond.drop(dropped))
        error = (out - self.target(x0, t, eps)) ** 2
        return (self.weight(t) * error.mean((1, 2, 3))).mean()

    def weight(self, t):
        """Return the weight of the error at t, (B,): one loss, whatever the network predicts.

        It is min(SNR, gamma) times the squared error of x0, where SNR = (a / s)^2. As x = a x0 + s
        eps, the same error is a / s as large in eps, and 1 / s in v: `scale` divides by the square.
        With gamma = inf it is the plain error of eps, L_simple (Ho et al. Eq. 14); a finite gamma
        caps the weight of low noise: min-SNR, Hang et al. 2023 (2303.09556).
        """
        snr = (self.sqrt_abar[t] / self.sqrt_1m_abar[t]) ** 2
        scale = {"x0": 1, "eps": snr, "v": snr + 1}[self.predict]
        return snr.clamp(max=self.gamma) / scale

    # ---- sampling: Algorithm 2 as the paper has it, then the same in few steps

    @torch.no_grad()
    def sample_ddpm(self, model, cond, randn):
        """Algorithm 2, all T steps, to be read. Returns images (B, C, H, W).

        Each call of randn() draws new noise N(0, I) of this shape. `sample` returns the same with
        order=1, eta=1, steps=T, clip=False, and is the one to use.
        """
        x = randn()
        for t in reversed(range(self.T)):
            abar, abar_prev = self.abar[t].item(), self.abar[t - 1].item() if t > 0 else 1.0
            beta = 1 - abar / abar_prev                          # as abar = abar_prev (1 - beta)
            out = model(x, torch.full((len(x),), t, device=x.device), cond)
            x0 = self.x0_from(x, out, math.sqrt(abar), math.sqrt(1 - abar))      # the guess

            # Ho et al. Eq. 7. Two things are known of x_{t-1}: it is sqrt(abar_prev) x0 but for the
            # variance 1 - abar_prev, and x / sqrt(1 - beta) but for the variance beta / (1 - beta).
            # Each is weighed by the inverse of its variance; sigma^2 is the variance that is left.
            mean = math.sqrt(abar_prev) * beta / (1 - abar) * x0
            mean += math.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar) * x
            sigma = math.sqrt((1 - abar_prev) / (1 - abar) * beta)
            x = mean + sigma * randn() if t > 0 else mean
        return x

    @torch.no_grad()
    def sample(self, model, cond, randn, steps=12, w=1.0, eta=0.0, order=2, clip=True,
               start=None, known=None):
        """Return images (B, C, H, W) in [-1, 1]; each call of randn() draws new noise N(0, I).

            order=2                   8 to 20 steps do as well as hundreds of DDIM
            order=1, eta=0            DDIM: no new noise, the first x decides the image
            order=1, eta=1, steps=T   DDPM

        w: guidance scale. start=(x0, t) begins at given images with the noise of t: SDEdit, Meng et
        al. 2022 (2108.01073). known=(x0, mask) keeps x0 where mask (B, 1, H, W) is 1 and paints the
        rest; it needs order 1: RePaint, Lugmayr et al. 2022 (2201.09865).
        """
        if model.training:
            raise ValueError("call model.eval() first: dropout is still on")
        if order == 2 and (eta or known):
            raise ValueError("order 2 needs eta = 0, and no known pixels")
        ts = self.levels(steps, start[1] if start else None)
        # At level k, x = a[k] x0 + s[k] eps. One more level, at the end, is the image itself.
        a = [*self.abar[ts].sqrt().tolist(), 1.0]
        s = [*(1 - self.abar[ts]).sqrt().tolist(), 0.0]
        network = partial(guided, model, cond=cond, w=w)
        x = randn()
        if x.is_cuda:
            network = Replay(network)                        # the same numbers, faster
        if start:
            x = a[0] * start[0] + s[0] * x

        def ddim(x, x0, k, sigma=0.0):
            """Step from level k to k + 1, DDIM Eq. 12: find eps in x, add less of it to x0.

            Of the variance s^2 there, sigma^2 is left to new noise.
            """
            eps = (x - a[k] * x0) / s[k]
            return a[k + 1] * x0 + math.sqrt(s[k + 1] ** 2 - sigma**2) * eps

        x_last = x0_last = None
        for k, t in enumerate(ts):           # no .item() in here: Python runs ahead of the GPU
            out = network(x, torch.full((len(x),), t, device=x.device))
            x0 = self.x0_from(x, out, a[k], s[k])
            if clip:
                x0 = x0.clamp(-1, 1)         # as Ho's code: at high noise the guess is far off

            if order == 2:
                x, x0_ahead = self.second_order(x, x0, x_last, x0_last, ddim, a, s, k)
            else:
                x0_ahead = x0
            x_last, x0_last = x, x0

            beta = 1 - (a[k] / a[k + 1]) ** 2                # of the step from level k to k + 1
            sigma = eta * s[k + 1] / s[k] * math.sqrt(beta)  # DDIM Eq. 16: eta times that of DDPM
            x = ddim(x, x0_ahead, k, sigma)
            if sigma > 0:
                x = x + sigma * randn()
            if known:
                x0_known, mask = known       # overwrite the known pixels, as noisy as level k + 1
                x = torch.where(mask > 0, a[k + 1] * x0_known + s[k + 1] * randn(), x)
        return x

    @staticmethod
    def second_order(x, x0, x_last, x0_last, ddim, a, s, k):
        """Return a better x at level k, and the x0 to step towards; no more calls of the network.

        DDIM is Euler's method: the guess at the start of a step serves for all of it. Two repairs:
        behind, the last step is taken again with the mean of the guesses at its ends (UniPC-1's
        corrector); ahead, the guess is extrapolated to the middle of the next step, along the line
        through the last two (DPM-Solver++ 2M). Time is log(a / s), in which the steps are even.
        """
        if k == 0:
            return x, x0
        x = ddim(x_last, (x0_last + x0) / 2, k - 1)
        if s[k + 1] == 0:                                    # the last step ends at x0 itself
            return x, x0
        last, now, after = (math.log(a[j] / s[j]) for j in (k - 1, k, k + 1))
        return x, x0 + (after - now) / (now - last) / 2 * (x0 - x0_last)

    def levels(self, steps, start=None):
        """Choose the t to visit, [int] falling: s / a, noise to signal, falls by equal factors.

        The first is T - 1, pure noise, or `start`, a t; the others go from s / a = 60 to .01,
        about a grey level. If steps = T, all t are visited. Why so: the mean of N pixels has
        sqrt(N) times less noise than one of them, so the brightness of an image is settled at high
        noise. There 12 even t take such large steps that half of its variation is lost.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"{steps} sampling steps: must be 1 to T = {self.T}")
        log_ratio = ((1 - self.abar) / self.abar).log() / 2      # log(s / a), (T,) rising
        start = self.T - 1 if start is None else start
        steps = min(steps, start + 1)
        top, high, low = log_ratio[start].item(), math.log(60), math.log(0.01)
        if top > high:
            wanted = [top, *torch.linspace(high, low, steps - 1).tolist()]
        else:
            wanted = torch.linspace(top, low, steps).tolist()

        ts, t = [], start + 1
        for k, value in enumerate(wanted):
            nearest = (log_ratio - value).abs().argmin().item()
            t = max(min(nearest, t - 1), steps - 1 - k)      # below the last; the rest still fit
            ts.append(t)
        return ts


def guided(model, x, t, cond, w):
    """Predict with classifier-free guidance, Ho & Salimans Eq. 6 (their w is ours less 1).

    Go w times the way from the guess without the condition to the one with it, both in one batch:
    clearer images of the class, less varied ones. cond.and_null(): cond, then itself all hidden.
    """
    if w == 1:
        return model(x, t, cond).to(x.dtype)                     # a network may compute in bfloat16
    both = model(torch.cat([x, x]), torch.cat([t, t]), cond.and_null()).to(x.dtype)
    given, null = both.chunk(2)
    return null + w * (given - null)


# ---- a CUDA graph: the same numbers, sooner

class Replay:
    """A network whose kernels are recorded at its second call, and from then on launched at once.

    Python takes longer to launch the few hundred kernels of a small network than a GPU to run them.
    The first call is plain: it sets up cuDNN and cuBLAS, which must not be recorded. A graph reads
    and writes fixed places: x and t are copied there, and all else (weights, conditions) must stay
    where it is. So a Replay lives as long as one call of `sample`.
    """

    def __init__(self, network):
        self.network, self.calls = network, 0

    def __call__(self, x, t):
        self.calls += 1
        if self.calls == 1:
            return self.network(x, t)
        if self.calls == 2:
            self.x, self.t, self.graph = x.clone(), t.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):               # records kernels, does not run them
                self.out = self.network(self.x, self.t)
        self.x.copy_(x)
        self.t.copy_(t)
        self.graph.replay()
        return self.out.clone()                              # the next call overwrites it


# ---- a whole program: python ddpm.py. Its images are points of a plane, one pixel of two channels

class Toy(nn.Sequential):
    """A network for points (B, 2, 1, 1); it sees waves of x, y, t / 1000 at 4 frequencies."""

    def forward(self, x, t, cond):
        place = torch.cat([x.flatten(1), t[:, None] / 1000], dim=1)                      # (B, 3)
        angle = math.pi * place[:, :, None] * torch.tensor([0.25, 0.5, 1, 2])            # (B, 3, 4)
        waves = torch.cat([angle.sin(), angle.cos()], dim=1).flatten(1)                  # (B, 24)
        return super().forward(waves).view_as(x)


class NoCondition:
    """The condition of a network that has none."""

    def drop(self, mask):
        """Return itself: there is nothing to drop."""
        return self


def spiral(n):
    """Draw n points of the data, (n, 2, 1, 1) in [-1, 1]."""
    angle = 10 * torch.rand(n).sqrt()
    points = angle / 10 * torch.stack([angle.cos(), angle.sin()]) + 0.02 * torch.randn(2, n)
    return points.T.reshape(n, 2, 1, 1)


def train_toy(steps):
    """Train on the spiral, then sample. Returns 1,000 points at each sampling step, noise first."""
    diffusion = Diffusion(gamma=math.inf)
    hidden = [layer for width in (24, 64, 64) for layer in (nn.Linear(width, 64), nn.SiLU())]
    model = Toy(*hidden, nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(1, steps + 1):
        loss = diffusion.loss(model, spiral(256), NoCondition())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step in (1, 100, steps // 2, steps):
            print(f"step {step:4}: loss {torch.tensor(losses[-100:]).mean():.2f}")

    stages = []
    model.eval().register_forward_pre_hook(lambda _, inputs: stages.append(inputs[0]))
    samples = diffusion.sample(model, NoCondition(), lambda: torch.randn(1000, 2, 1, 1))
    return [*stages, samples]


def main(path="runs/ddpm.png", steps=4000):
    """Draw q on an image for each schedule, and p on the toy: a labelled row each."""
    torch.manual_seed(0)
    x, y = torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128)[:, None]
    x0 = torch.stack([(3 * y).sin() * x, (x**2 + y**2 < 0.3) * 1.4 - 0.7, y - 0.3 * x])[None]
    eps = torch.randn_like(x0)
    rows = {}
    for schedule in SCHEDULES:
        diffusion, ts = Diffusion(1000, schedule), torch.linspace(0, 999, 8).long()
        rows[f"q, {schedule}: t = 0 to 999"] = [diffusion.q_sample(x0, t[None], eps)[0] for t in ts]

    stages = train_toy(steps)
    shown = [stages[k] for k in (0, 4, 6, 7, 8, 9, 12)] + [spiral(1000)]
    edges = dict(bins=128, range=[-1.5, 1.5, -1.5, 1.5])
    counts = [torch.histogramdd(points.flatten(1), **edges).hist.T for points in shown]
    rows["p, a toy: from noise to samples; last, the data"] = [
        1 - 2.0 * (count > 0).expand(3, -1, -1) for count in counts]

    sheet = Image.new("RGB", (8 * 128, len(rows) * 148), "white")
    for k, (title, pictures) in enumerate(rows.items()):
        strip = torch.cat(pictures, dim=2).clamp(-1, 1)                          # (3, 128, 1024)
        strip = ((strip + 1) * 127.5).round().byte().permute(1, 2, 0)
        ImageDraw.Draw(sheet).text((4, 148 * k + 4), title, fill="black")
        sheet.paste(Image.fromarray(strip.numpy()), (0, 148 * k + 20))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"look at {path}")


if __name__ == "__main__":
    main()
