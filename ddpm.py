"""Denoising diffusion (DDPM): a network learns to guess the clean image in a noisy one. To make a
new image, start from pure noise and repeat: guess, move a little towards the guess, add some noise.

The process q adds noise, step by step or all at once:

    one step          x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps    (new eps at every step)
    all steps to t    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps         (in short a x0 + s eps)
    where             abar_t = product of (1 - beta_i) over all i <= t     (so a^2 + s^2 = 1)

Both are the same. A step multiplies a^2 by 1 - beta. It turns s^2, the variance of the noise, into
(1 - beta) s^2 + beta, so a^2 + s^2 stays 1. And a sum of independent normal noises is normal.

The process p goes back, from x_t to x_{t-1}. The network's guess x0 gives eps = (x - a x0) / s:

    one step back     x_{t-1} = a' x0 + sqrt(s'^2 - sigma^2) eps + sigma noise     (' is t-1)

Its two noises together have variance s'^2, for any sigma up to s'. The way back takes many steps,
because a network trained by squared error answers with the mean of all images that may have become
x_t. At high noise this mean is a blur. A small step towards it leaves fewer images possible, and
the next guess is sharper. DDPM takes 1,000 steps, with new noise in all but the last. DDIM adds
none, sigma = 0, and takes 20 to 100; corrected by a rule of second order, it takes 12.

    x0   an image in [-1, 1], (B, C, H, W), or the network's guess of it
    x    the noisy image x_t = a x0 + s eps    eps  normal noise N(0, I)
    t    0 (a little noise) .. T - 1 (noise)   v    a eps - s x0, see `target`
    w    scale of guidance, 1 is none          eta  1: new noise as in DDPM, 0: none (DDIM)

DDPM: Ho et al. 2020 (2006.11239), who count t from 1. DDIM: Song et al. 2021 (2010.02502).
"""
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import nn

# ---- noise schedules: abar for every t, (T,) float64

def linear_abar(T):
    """Return the schedule of Ho et al., section 4: beta rises from 1e-4 to 0.02 (for T = 1000)."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T   # the same sum for any T
    return (1 - beta.clamp(max=0.999)).cumprod(0)


def cosine_abar(T):
    """Return the schedule of Nichol & Dhariwal 2021 (2102.09672), Eq. 17: a squared cosine."""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2        # .008: no tiny beta at first
    beta = 1 - f[1:] / f[:-1]
    return (1 - beta.clamp(max=0.999)).cumprod(0)                # f ends at 0: beta would be 1


SCHEDULES = {"cosine": cosine_abar, "linear": linear_abar}
PREDICTS = ("v", "eps", "x0")           # given x_t, each of them determines the other two


class Diffusion(nn.Module):
    """A chain of T noise levels, and what the network predicts from x_t: "v", "eps" or "x0"."""

    def __init__(self, T=1000, schedule="cosine", predict="v", gamma=5.0):
        super().__init__()
        self.T, self.predict, self.gamma = T, predict, gamma
        self.abar = SCHEDULES[schedule](T)                # (T,) float64, stays on the CPU
        abar = self.abar.view(-1, 1, 1, 1)
        self.register_buffer("sqrt_abar", abar.sqrt().float())
        self.register_buffer("sqrt_1m_abar", (1 - abar).sqrt().float())

    # ---- training: Algorithm 1

    def q_sample(self, x0, t, eps):
        """Return a sample x_t of q(x_t | x0), Ho et al. Eq. 4, for t (B,) int64 and eps like x0."""
        return self.sqrt_abar[t] * x0 + self.sqrt_1m_abar[t] * eps

    def target(self, x0, t, eps):
        """Return what the network should predict, (B, C, H, W).

        x0 = (x - s eps) / a, so at high noise, where a is small, an error in eps is a huge one in
        x0. eps = (x - a x0) / s, so at low noise it is the other way round. v, Salimans & Ho 2022
        (2202.00512), is about -x0 at high noise and eps at low noise, the part that x hides.
        """
        v = self.sqrt_abar[t] * eps - self.sqrt_1m_abar[t] * x0
        return {"v": v, "eps": eps, "x0": x0}[self.predict]

    def x0_from(self, x, out, a, s):
        """Return x0: solve x = a x0 + s eps, where the network's output is v, eps or x0."""
        from_v = a * x - s * out                          # = (a^2 + s^2) x0
        return {"v": from_v, "eps": (x - s * out) / a, "x0": out}[self.predict]

    def loss(self, model, x0, cond, drop=0.1, rng=None):
        """Return the loss of Algorithm 1 on images x0 (B, C, H, W): the weighted squared error.

        `guided` needs a network that can do without the condition. So a share `drop` of the images
        is trained without it: cond.drop(mask) drops it where mask, (B,) bool, is true.
        """
        t = torch.randint(self.T, (len(x0),), device=x0.device, generator=rng)
        eps = torch.randn(x0.shape, device=x0.device, generator=rng)
        dropped = torch.rand(len(x0), device=x0.device, generator=rng) < drop

        out = model(self.q_sample(x0, t, eps), t, cond.drop(dropped))
        error = (out - self.target(x0, t, eps)) ** 2
        return (self.weight(t) * error.mean((1, 2, 3))).mean()

    def weight(self, t):
        """Return the weight of the error at t, (B,), that gives one loss for v, eps and x0.

        That loss is min(SNR, gamma) times the squared error of x0, where SNR = (a / s)^2. As x is
        given, an error of 1 in x0 is one of a / s in eps and of 1 / s in v: `scale` is the square
        of that (1 / s^2 = SNR + 1). With gamma = inf it is the plain error of eps, L_simple
        (Ho et al. Eq. 14). Else low noise weighs less: min-SNR, Hang et al. 2023 (2303.09556).
        """
        snr = (self.sqrt_abar[t] / self.sqrt_1m_abar[t]).flatten() ** 2
        scale = {"x0": 1, "eps": snr, "v": snr + 1}[self.predict]
        return snr.clamp(max=self.gamma) / scale

    # ---- sampling: Algorithm 2 as in the paper, to be read; then the same in few steps

    @torch.no_grad()
    def sample_ddpm(self, model, cond, randn):
        """Return images (B, C, H, W) by Algorithm 2; randn() draws N(0, I) of this shape."""
        x = randn()
        for t in reversed(range(self.T)):
            abar = self.abar[t].item()
            abar_prev = self.abar[t - 1].item() if t > 0 else 1.0
            beta = 1 - abar / abar_prev                          # as abar = abar_prev (1 - beta)
            out = model(x, torch.full((len(x),), t, device=x.device), cond)
            x0 = self.x0_from(x, out, math.sqrt(abar), math.sqrt(1 - abar))      # the guess

            # If the guess is right, two things are known of x_{t-1}. It is sqrt(abar_prev) x0 plus
            # noise of variance 1 - abar_prev. And as x is one step of q from it, it is
            # x / sqrt(1 - beta) plus noise of variance beta / (1 - beta). Weigh each by the inverse
            # of its variance: this is the mean, Eq. 7 (Algorithm 2 writes it with eps). sigma^2 is
            # 1 over the sum of the inverses (the smaller of the two choices that the paper offers).
            # Put in x = a x0 + s eps, and it is the step back at the top.
            mean = math.sqrt(abar_prev) * beta / (1 - abar) * x0
            mean += math.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar) * x
            sigma = math.sqrt((1 - abar_prev) / (1 - abar) * beta)
            x = mean + sigma * randn() if t > 0 else mean
        return x

    @torch.no_grad()
    def sample(self, model, cond, randn, steps=12, w=1.0, eta=0.0, order=2, clip=True,
               start=None, known=None):
        """Return images (B, C, H, W) in [-1, 1]; each call of randn() draws N(0, I) like them.

            order=2                   12 steps are as exact as 100 or more of DDIM
            order=1, eta=0            DDIM: no new noise, the first x decides the image
            order=1, eta=1, steps=T   DDPM: with clip=False, w=1 the same as sample_ddpm

        w: see `guided`. start=(x0, t): begin at these images, noised to t (SDEdit, Meng et al.
        2022, 2108.01073). known=(x0, mask): keep x0 where mask (B, 1, H, W) is 1, paint the rest
        (RePaint, Lugmayr et al. 2022, 2201.09865, without its repeats). Order 2 redoes each step,
        which would undo new noise and known pixels, so it refuses both.
        """
        if order == 2 and (eta or known):
            raise ValueError("order 2 needs eta = 0, and no known pixels")
        ts = self.levels(steps, start[1] if start else None)
        abar = [*self.abar[ts].tolist(), 1.0]            # one more level, at the end, is the image
        level = [(math.sqrt(value), math.sqrt(1 - value)) for value in abar]             # [(a, s)]

        network = partial(guided, model, cond=cond, w=w)
        x = randn()
        if x.is_cuda:
            network = Replay(network)        # the same numbers, sooner
        if start:
            a, s = level[0]
            x = a * start[0] + s * x
        x_before = x0_before = None
        for k, t in enumerate(ts):           # no .item() in here: it would wait for the GPU
            (a, s), (a_next, s_next) = level[k], level[k + 1]
            out = network(x, torch.full((len(x),), t, device=x.device))
            x0 = self.x0_from(x, out, a, s)
            if clip:
                x0 = x0.clamp(-1, 1)         # no pixel is outside; Ho's code does so, too

            x0_ahead = x0
            if order == 2 and k > 0:
                x, x0_ahead = second_order(x0, x_before, x0_before, *level[k - 1:k + 2])
            x_before, x0_before = x, x0

            beta = 1 - (a / a_next) ** 2                     # of q from level k + 1 to k
            sigma = eta * s_next / s * math.sqrt(beta)       # DDIM Eq. 16: eta times that of DDPM
            x = ddim(x, x0_ahead, level[k], level[k + 1], sigma)
            if sigma > 0:
                x = x + sigma * randn()
            if known:
                x0_known, mask = known       # known pixels are x0_known, noised to level k + 1
                x = torch.where(mask > 0, a_next * x0_known + s_next * randn(), x)
        return x

    def levels(self, steps, start=None):
        """Return the t to visit, [int] falling: s / a, noise to signal, falls by equal factors.

        The first is T - 1, where x starts, or `start`, a t. Above s / a = 60 nearly all is noise:
        one step crosses it. s / a ends at .01, one grey level. If steps = T, all t are visited.

        Why equal factors: a shape twice as wide has 4 times the pixels, and their mean half the
        noise. So it emerges at twice the noise, and all doublings of s / a get as many steps. 12
        equal steps of t (cosine) jump to s / a = 7 first: images come out too alike in brightness.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"{steps} sampling steps: must be 1 to T = {self.T}")
        log_ratio = ((1 - self.abar) / self.abar).log() / 2      # log(s / a), (T,) rising
        start = self.T - 1 if start is None else start
        steps = min(steps, start + 1)
        top, high, low = log_ratio[start].item(), math.log(60), math.log(0.01)
        first = [top] if top > high else []
        wanted = [*first, *torch.linspace(min(top, high), low, steps - len(first)).tolist()]

        ts, t = [], start + 1
        for k, value in enumerate(wanted):
            nearest = (log_ratio - value).abs().argmin().item()
            t = max(min(nearest, t - 1), steps - 1 - k)      # falling; each later step gets a t
            ts.append(t)
        return ts


def ddim(x, x0, now, after, sigma=0.0):
    """Return x after a step of DDIM, Eq. 12, from the level now = (a, s) to the level after.

    It leaves room for new noise of variance sigma^2, which the caller adds.
    """
    a, s = now
    eps = (x - a * x0) / s
    a, s = after
    return a * x0 + math.sqrt(s**2 - sigma**2) * eps


def second_order(x0, x_before, x0_before, before, now, after):
    """Return a better x at the level now, and the x0 to step towards: no new call of the network.

    A step of DDIM is exact, however long, if the guess x0 is the same all the way. It is not. So
    take the step from `before` again, with the mean of the guesses at its ends (as UniPC-1 does,
    Zhao et al. 2023, 2302.04867). And for the next step extend the line through these two guesses
    to that step's middle (DPM-Solver++ 2M, Lu et al. 2022, 2211.01095). Time is log(a / s).
    """
    x = ddim(x_before, (x0_before + x0) / 2, before, now)
    if after[1] == 0:                                        # the last step ends at x0 itself
        return x, x0
    t_before, t_now, t_after = (math.log(a / s) for a, s in (before, now, after))
    return x, x0 + (t_after - t_now) / (t_now - t_before) / 2 * (x0 - x0_before)


def guided(model, x, t, cond, w):
    """Return the output with classifier-free guidance: Ho & Salimans 2022 (2207.12598), Eq. 6.

    Go w times the way from the output without the condition to the one with it (w is their w + 1).
    If x_t has density p, the mean of eps is -s grad log p(x_t) (Tweedie's formula). So in terms of
    eps, with_cond - without is -s grad log p(cond | x_t), by Bayes' rule, and the result is -s grad
    log of p(x_t) p(cond | x_t)^w. With w > 1 images show their condition more clearly, and vary
    less. A step is twice the work: cond.and_null() is cond, then as many dropped, (2 B).
    """
    if w == 1:
        return model(x, t, cond).to(x.dtype)                 # a network may compute in bfloat16
    both = model(torch.cat([x, x]), torch.cat([t, t]), cond.and_null()).to(x.dtype)
    with_cond, without = both.chunk(2)
    return without + w * (with_cond - without)


# ---- a whole program, python ddpm.py. Its images are points: one pixel, with two channels

@dataclass
class Classes:
    """The toy's condition: the class y (B,) of every point, 0 or 1, or -1 if dropped."""
    y: torch.Tensor

    def drop(self, mask):
        """Return the classes, dropped where mask, (B,) bool, is true."""
        return Classes(self.y.masked_fill(mask, -1))

    def and_null(self):
        """Return these classes, then as many dropped ones, (2 B,)."""
        return Classes(torch.cat([self.y, torch.full_like(self.y, -1)]))


class Toy(nn.Sequential):
    """A network for points (B, 2, 1, 1)."""
    def forward(self, x, t, cond):
        numbers = torch.cat([x.flatten(1), t[:, None] / 1000, cond.y[:, None]], dim=1)   # (B, 4)
        return super().forward(numbers).view_as(x)


def spiral(y):
    """Return points (B, 2, 1, 1) of classes y (B,), about -1..1: the two classes are two arms."""
    angle = 6 * torch.rand(len(y)).sqrt()
    arm = (1 - 2 * y) * angle / 6 * torch.stack([angle.cos(), angle.sin()])
    return (arm + 0.05 * torch.randn_like(arm)).T.reshape(-1, 2, 1, 1)


def train_toy(steps, y):
    """Return a Diffusion, and a network that was trained on points of the classes y (B,)."""
    diffusion = Diffusion(gamma=math.inf)           # L_simple, as in the paper
    model = Toy(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(),
                nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(1, steps + 1):
        loss = diffusion.loss(model, spiral(y), Classes(y))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 100, steps // 2, steps):
            print(f"step {step:4}: loss {loss.item():.2f}")
    return diffusion, model.eval()


def dots(points):
    """Draw points (B, 2, 1, 1) of classes 0, 1, 0, 1 ... in blue and red: image (3, 128, 128)."""
    image = torch.ones(3, 130, 130)
    column, row = (points.flatten(1) / 3 * 128 + 65).long().clamp(0, 129).T         # -1.5 .. 1.5
    image[:2, row[::2], column[::2]] = -1
    image[1:, row[1::2], column[1::2]] = -1
    return image[:, 1:-1, 1:-1]                     # without the edge, where outliers lie


def main(path="runs/ddpm.png", steps=1500):
    """Draw labelled rows: q by each schedule, then p of the toy, plain and with guidance."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 128).expand(128, 128)
    x0 = torch.stack([x, 1.4 * (x**2 + x.T**2 < 0.3) - 0.7, x.T])[None]
    rows = {}
    for name in SCHEDULES:
        row = rows[f"q, {name} schedule: t = 0 ... 999, data -> noise"] = {}
        for t in torch.linspace(0, 999, 8).long():
            row[f"t = {t}"] = Diffusion(1000, name).q_sample(x0, t[None], torch.randn_like(x0))[0]

    y = torch.arange(1000) % 2
    diffusion, model = train_toy(steps, y)
    seen = {}                                       # the x that the network was given at each t
    model.register_forward_pre_hook(lambda _, inputs: seen.update({int(inputs[1][0]): inputs[0]}))
    for name, sampler in (("Algorithm 2, 1,000 steps", diffusion.sample_ddpm),
                          ("the fast sampler, 12 steps", diffusion.sample),
                          ("the same with guidance, w = 3", partial(diffusion.sample, w=3))):
        samples = sampler(model, Classes(y), partial(torch.randn, 1000, 2, 1, 1))
        row = {f"t = {t}": dots(seen[t]) for t in diffusion.levels(12)[4:10]}
        row |= {"samples": dots(samples), "data": dots(spiral(y))}
        rows[f"p by {name}: noise -> data"] = row

    sheet = Image.new("RGB", (1088, len(rows) * 172), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (title, row) in enumerate(rows.items()):
        pen.text((4, 172 * k + 4), title, fill="black", font_size=13)
        for j, (caption, image) in enumerate(row.items()):
            pen.text((136 * j + 4, 172 * k + 22), caption, fill="black", font_size=12)
            pixels = ((image.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0)
            sheet.paste(Image.fromarray(pixels.numpy()), (136 * j + 4, 172 * k + 40))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"look at {path}")


# ---- to be skipped at first: a CUDA graph

class Replay:
    """A network whose kernels are recorded at its second call, and then launched together.

    Python takes longer to launch the kernels of a small network than a GPU to run them. The first
    call sets up cuDNN and cuBLAS, which must not be recorded. A graph reads and writes fixed
    places: x and t are copied there, and a Replay lives only as long as one call of `sample`.
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


if __name__ == "__main__":
    main()
