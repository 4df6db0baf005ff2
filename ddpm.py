"""The noise process of denoising diffusion: q drowns an image in noise step by step, p brings one back.

The network is an argument; a tiny one is trained at the end. The letters are those of the papers:

    x0   an image in [-1, 1], (B, C, H, W)        x    this image after t + 1 steps of noise
    eps  standard normal noise                    t    0 (least noise) .. T - 1 (nothing but noise)
    abar the share of the image's variance left   eta  1: fresh noise at every step (DDPM), 0: none (DDIM)
    v    sqrt(abar) eps - sqrt(1 - abar) x0       w    guidance scale; w = 1 is no guidance

DDPM: Ho et al. 2020 (2006.11239). DDIM: Song et al. 2021 (2010.02502). Cosine schedule: Nichol & Dhariwal
2021 (2102.09672). v: Salimans & Ho 2022 (2202.00512). Guidance: Ho & Salimans 2022 (2207.12598).
Flow matching: Lipman et al. 2023 (2210.02747); rectified flow: Liu et al. 2023 (2209.03003). UniPC: Zhao
et al. 2023 (2302.04867).
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

# ---- schedules: abar of every t, (T,) float64

def linear_abar(T):
    """Ho et al., section 4: beta from 1e-4 to 0.02; if T is not 1000 in proportion, to end in noise too."""
    if T <= 20:
        raise ValueError(f"the linear schedule needs T > 20, not {T}: below, beta reaches 1")
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    return (1 - beta).cumprod(0)                                    # Eq. 4: abar_t = prod_{s<=t} (1 - beta_s)


def cosine_abar(T):
    """Nichol & Dhariwal Eq. 17, with their limit beta <= .999: the image fades evenly."""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return (1 - beta).cumprod(0)


def flow_abar(T):
    """Flow matching, rectified flow: x is (1 - s) x0 + s eps, scaled to variance 1, s = (t + 1) / (T + 1).

    So its straight line from the image to the noise is one more schedule, with SNR = ((1 - s) / s)^2. Its
    velocity eps - x0 is a weighted sum of v and x, and its Euler step that of DDIM (a test shows both).
    """
    s = torch.arange(1, T + 1, dtype=torch.float64) / (T + 1)
    return (1 - s) ** 2 / ((1 - s) ** 2 + s**2)


SCHEDULES = {"cosine": cosine_abar, "linear": linear_abar, "flow": flow_abar}

# In today's words: from x and t, each of eps, v, x0 and the velocity of flow matching gives the others by a
# linear equation. So the lecture's DDPM and flow matching train the same denoiser, with another schedule and
# another weight of the errors (Kingma & Gao 2023, 2303.00848); and sampling takes fresh noise or none (eta).
# What the network itself answers still matters: images lie near a surface of few dimensions, eps and v fill
# the whole space. x0 asks least of a small network whose tokens hold many pixels (Li & He 2025, 2511.13720).
PREDICTS = ("v", "eps", "x0")


class Diffusion(nn.Module):
    """The chain: T noise levels, and what the network predicts from x_t: "v", "eps" (Ho et al.) or "x0"."""

    def __init__(self, T=1000, schedule="cosine", predict="v", gamma=5.0):
        super().__init__()
        assert predict in PREDICTS, predict
        self.T, self.predict, self.gamma = T, predict, gamma
        self.abar = SCHEDULES[schedule](T)                        # float64, stays on the CPU; the models use:
        self.register_buffer("signal", self.abar.sqrt().float(), persistent=False)         # (T,)
        self.register_buffer("noise", (1 - self.abar).sqrt().float(), persistent=False)    # (T,)

    # ---- training: from x0 to x_t, Algorithm 1

    def q_sample(self, x0, t, eps):
        """q(x_t | x0), Ho et al. Eq. 4: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps. t: (B,) int64."""
        return self.signal[t].view(-1, 1, 1, 1) * x0 + self.noise[t].view(-1, 1, 1, 1) * eps

    def target(self, x0, t, eps):
        """Return the right answer, (B, C, H, W): x0, eps, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0."""
        return {"x0": x0, "eps": eps, "v": self.q_sample(eps, t, -x0)}[self.predict]

    def loss(self, model, x0, cond, drop=0.1, generator=None, part=slice(None)):
        """Algorithm 1: the network's weighted error on each image of `part`, (b,), and its t, (b,).

        A share `drop` of the images is trained without its condition, as guidance needs. Random numbers are
        drawn for the whole batch, then only `part` of it is computed: the rest is for other processes.
        """
        kw = dict(device=x0.device, generator=generator)
        t = torch.randint(self.T, (len(x0),), **kw)
        eps = torch.randn(x0.shape, **kw)
        cond = cond.hide(torch.rand(len(x0), **kw) < drop)
        x0, t, eps, cond = x0[part], t[part], eps[part], cond[part]
        out = model(self.q_sample(x0, t, eps), t, cond)
        error = F.mse_loss(out, self.target(x0, t, eps), reduction="none").mean((1, 2, 3))
        return self.weight(t) * error, t

    def weight(self, t):
        """Weigh the error at t, (B,): min-SNR (Hang et al. 2023, 2303.09556).

        It is min(SNR, gamma) on squared errors of x0, SNR = abar / (1 - abar). Those of eps are SNR times as
        large, of v SNR + 1: with gamma = inf the mean is L_simple (Ho Eq. 14) for all three.
        """
        snr = (self.signal[t] / self.noise[t]) ** 2
        return snr.clamp(max=self.gamma) / {"x0": 1, "eps": snr, "v": snr + 1}[self.predict]

    def x0_of(self, x, out, signal, noise):
        """Solve the definition of eps (Eq. 4) or of v for the image: the x0 that the answer `out` implies."""
        if self.predict == "x0":
            return out
        return (x - noise * out) / signal if self.predict == "eps" else signal * x - noise * out

    # ---- sampling: from noise to x0, Algorithm 2 and its shortcuts

    @torch.no_grad()
    def sample(self, model, cond, fresh, steps=12, eta=0.0, order=2, w=1.0, clip=True, graph=None,
               start=None, known=None, rounds=10):
        """Draw images (B, C, H, W) in [-1, 1]; fresh() returns new noise N(0, I) of this shape at every call.

        order=2 is UniPC-2, for 8 to 20 steps; order=1, eta=0 is DDIM; order=1, eta=1, steps=T is DDPM
        (Algorithm 2). Few steps with eta > 0 lose variance (of a Gaussian with std .2, 12 steps return .141
        and 50 .185). graph: replay the steps from a CUDA graph (None: where there is CUDA).

        start = (x0, t) begins at the images x0 with the noise of t instead of at pure noise, and takes those
        of the steps that are left (SDEdit, Meng et al. 2022, 2108.01073). known = (x0, mask) keeps x0 where
        mask (B, 1, H, W) is 1 and paints the rest, by RePaint (Lugmayr et al. 2022, 2201.09865, Algorithm 1):
        every step is done in so many rounds, between which noise brings x back, so that both parts agree. It
        needs order = 1.
        """
        assert not model.training, "call model.eval() first: dropout would stay on"
        assert order == 1 or not known, "known needs order = 1, as it breaks the line through the last x0"

        def step(x, x0s, t, row):
            signal, noise, a, b0, b1, b2 = row
            x0 = self.x0_of(x, guided(model, x, t.expand(len(x)), cond, w), signal, noise)
            # Ho's code clips, Algorithm 2 does not: where abar is tiny, small errors of eps are huge in x0.
            x0s = torch.stack([x0.clamp(-1, 1) if clip else x0, x0s[0], x0s[1]])
            # With b1 = b2 = 0 this is Eq. 7 of DDPM and of DDIM; UniPC-2 knows better from the last three x0.
            return a * x + b0 * x0s[0] + b1 * x0s[1] + b2 * x0s[2], x0s

        x = fresh()
        x0s = torch.zeros(3, *x.shape, dtype=x.dtype, device=x.device)            # the newest first
        ts, rows, sigmas = self.plan(steps, eta, order, start[1] if start else None)
        ts, rows, sigmas = ts.to(x.device), rows.to(x.dtype).to(x.device), sigmas.to(x.dtype).to(x.device)
        if start:
            x = rows[0, 0] * start[0] + rows[0, 1] * x                                              # Eq. 4
        levels = torch.cat([rows[:, :2], rows.new_tensor([[1.0, 0.0]])])        # the last: the image itself
        if graph or (graph is None and x.is_cuda):
            step = Replay(step)
        for k, (t, row, sigma) in enumerate(zip(ts, rows, sigmas, strict=True)):
            for left in reversed(range(rounds if known else 1)):         # nothing in here waits for the GPU
                x, x0s = step(x, x0s, t, row)
                if eta:
                    x = x + sigma * fresh()
                if known:
                    (x0, mask), (signal, noise) = known, levels[k + 1]
                    x = torch.where(mask > 0, signal * x0 + noise * fresh(), x)
                if left:
                    x = renoised(x, levels[k], levels[k + 1], fresh)
        return x

    def plan(self, steps, eta=0.0, order=2, start=None):
        """Tabulate the steps of the loop, the noisiest first: t (steps,), rows (steps, 6) and sigma (steps,).

        Columns of rows: signal, noise = sqrt(abar), sqrt(1 - abar) at t, and a, b0, b1, b2, the weights of x
        and of the last three x0 in the next x, to which sigma times fresh noise is added. All but t are
        float64. The last step leads to abar = 1, the image itself: there b0 = 1, and the other weights are 0.
        With start, a t, it takes the place of the first level not above it; those above are not visited.
        """
        assert order == 1 or (order == 2 and eta == 0), "order 2 is for sampling without fresh noise: eta = 0"
        ts = self.levels(steps)
        if start is not None:
            ts = torch.cat([torch.tensor([start]), ts[ts <= start][1:]])
        abar = self.abar[ts]
        abar_next = torch.cat([abar[1:], torch.ones(1, dtype=torch.float64)])
        a, b, sigma = posterior(abar, abar_next, eta)
        signal, noise = abar.sqrt(), (1 - abar).sqrt()
        b = unipc2(signal, noise) if order == 2 else F.pad(b[:, None], (0, 2))
        return ts, torch.cat([torch.stack([signal, noise, a], 1), b], 1), sigma

    def levels(self, steps):
        """Choose the t to visit, (steps,) falling: T - 1, then levels of noise / signal in equal ratios.

        The brightness of an image is decided at high noise, as its N numbers average out noise by sqrt(N).
        With t ~ k^2, noise / signal fell from 20,000 to 4 in one of 12 steps: half of its variation was lost.
        So the second level is 40. The last is .015, two grey levels. If steps = T all t are visited.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"{steps} sampling steps: must be 1 to T = {self.T}")
        level = ((1 - self.abar) / self.abar).log() / 2                        # log(noise / signal), rising
        first, last = math.log(40), math.log(0.015)
        ideal = torch.linspace(last, first, max(steps - 1, 1), dtype=torch.float64)
        ideal = torch.cat([ideal, level[-1:]])[-steps:]
        k = torch.arange(steps)
        near = (level - ideal[:, None]).abs().argmin(1)
        return ((near - k).cummax(0).values.clamp(0, self.T - steps) + k).flip(0)           # each t only once


def posterior(abar, abar_prev, eta=1.0):
    """Return a, b, sigma of q(x_prev | x_t, x0) = N(a x_t + b x0, sigma^2), each shaped as abar.

    DDIM Eq. 7 and 16, for any two levels of the chain; with eta = 1 and neighbours, Ho et al. Eq. 6-7.
    """
    sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
    a = ((1 - abar_prev - sigma**2).clamp(min=0) / (1 - abar)).sqrt()
    b = abar_prev.sqrt() - a * abar.sqrt()
    return a, b, sigma


def renoised(x, level, last, fresh):
    """Take x from its last level (signal, noise) back to a noisier one: q(x_t | x_s), t > s."""
    ratio = level[0] / last[0]
    return ratio * x + (1 - ratio**2).sqrt() * fresh()


def unipc2(signal, noise):
    """Weights of the last three estimates of x0, newest first, in each of K steps: (K, 3) float64.

    To be skipped at first: all of DDPM and DDIM is order = 1.
    signal, noise (K,): of the levels, the noisiest first. In the time lambda = log(signal / noise) the way
    between two levels is an integral of x0 (Lu et al. 2022, 2211.01095, Eq. 9); DDIM takes x0 as constant.
    UniPC-2 (Zhao et al., Algorithms 5 to 8, B(h) = e^-h - 1) first takes the line through the last two
    estimates, P: that alone is DPM-Solver++(2M). After the next call it would go this way again with one
    estimate more, C. That costs no call: the next step, x times a, adds a * signal * (C - P).
    """
    h = (signal / noise).log().diff()                            # (K - 1,), of the ways between the levels
    r = torch.cat([h.new_full((1,), -math.inf), -h[:-1] / h[1:]])[:len(h)]   # -inf: nothing before the first
    B = torch.expm1(-h)
    c1 = -B / h - 1
    c2 = -c1 / h - 1 / 2
    rho1 = (c1 / B - 2 * c2 / B) / (1 - r)                    # solves [[1, 1], [r, 1]] rho = (c1, 2 c2) / B
    rho2 = c1 / B - rho1
    rho2[:1] = 1 / 2                                                # their choice for the line of two points
    # Both (K - 1, 3), over x0 at the end of a way, at its start, and one level before.
    P = -B[:, None] * torch.stack([torch.zeros_like(h), 1 - 0.5 / r, 0.5 / r], 1)
    C = -B[:, None] * torch.stack([rho2, 1 - rho1 / r - rho2, rho1 / r], 1)
    a = noise[1:] / noise[:-1]
    b = torch.zeros(len(signal), 3, dtype=torch.float64)
    b[:-1, :2] = signal[1:, None] * P[:, 1:]
    b[1:-1] += (a * signal[:-1])[1:, None] * (C - P)[:-1]
    b[-1, 0] = 1                                                                        # the image itself
    return b


def guided(model, x, t, cond, w):
    """Classifier-free guidance, Ho & Salimans Eq. 6 (w: theirs + 1): null + w (given - null) in a batch."""
    if w == 1:
        return model(x, t, cond).to(x.dtype)              # from bfloat16, if the network computes in that
    given, null = model(torch.cat([x, x]), torch.cat([t, t]), cond.and_null()).to(x.dtype).chunk(2)
    return null + w * (given - null)


# ---- CUDA graphs: nothing here changes a number

def record(run):
    """Record run() as a CUDA graph. Returns replay(), and the tensors that it writes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):        # waits for the GPU once, records kernels, does not run them
        results = run()
    return graph.replay, results


class Replay:
    """`step`, from tensors of fixed shapes to tensors, launched on a GPU as one recording.

    Python takes longer to launch the few hundred kernels of a small network than the GPU to run them. The
    first call is the plain one: it sets up cuDNN and cuBLAS, which must not be recorded. The second records.
    A graph reads and writes fixed places: arguments are copied there, and a call overwrites the last results.
    What `step` takes from elsewhere (weights, and their bfloat16 copies, which autocast keeps to the end of
    its block) must stay where it is: so a Replay lives as long as one call of `sample`.
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


# ---- python ddpm.py: a whole program. Its images are points of a plane: one pixel of two channels

class Toy(nn.Sequential):
    """A network for points x (B, 2, 1, 1) at t (B,): layers that see waves of both, (B, 24)."""

    def forward(self, x, t, cond):
        place = torch.cat([x.flatten(1), t[:, None] / 1000], dim=1)                              # (B, 3)
        angle = math.pi * (place[:, :, None] * torch.tensor([0.25, 0.5, 1, 2])).flatten(1)       # (B, 12)
        return super().forward(torch.cat([angle.sin(), angle.cos()], dim=1)).view_as(x)


class Nothing:
    """The condition of a network that has none."""

    def hide(self, _):
        """Return itself: there is nothing to hide, and nothing to select."""
        return self
    __getitem__ = hide


def spiral(n):
    """Draw n points of the data, (n, 2, 1, 1) in [-1, 1]."""
    angle = 10 * torch.rand(n).sqrt()
    points = angle / 10 * torch.stack([angle.cos(), angle.sin()]) + 0.02 * torch.randn(2, n)
    return points.T.reshape(n, 2, 1, 1)


def train_toy(steps):
    """Train, then sample. Returns 1,000 points at every stage of sampling, (1000, 2, 1, 1), noise first."""
    diffusion = Diffusion(gamma=math.inf)
    model = Toy(nn.Linear(24, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(),
                nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(1, steps + 1):
        loss = diffusion.loss(model, spiral(256), Nothing())[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step in (1, 100, steps // 2, steps):
            print(f"step {step:4}: loss {torch.tensor(losses[-100:]).mean():.2f}")
    stages = []
    model.eval().register_forward_pre_hook(lambda _, inputs: stages.append(inputs[0]))
    samples = diffusion.sample(model, Nothing(), lambda: torch.randn(1000, 2, 1, 1), steps=12)
    return [*stages, samples]


def main(path="runs/ddpm.png", steps=4000):
    """Draw an image on its way into the noise, and sqrt(abar), by each schedule; then the toy's way back."""
    torch.manual_seed(0)
    x, y = torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128)[:, None]
    x0 = torch.stack([(3 * y).sin() * x, (x**2 + y**2 < 0.3) * 1.4 - 0.7, y - 0.3 * x])[None]
    eps = torch.randn_like(x0)
    rows = []
    for schedule in SCHEDULES:
        diffusion = Diffusion(1000, schedule)
        rows.append([diffusion.q_sample(x0, t[None], eps)[0] for t in torch.linspace(0, 999, 8).long()])
        height = (50 * diffusion.signal[torch.linspace(0, 999, 1024).long()]).long()
        curve = height == torch.arange(57, -7, -1)[:, None]                                  # (64, 1024)
        rows.append([1 - 2.0 * curve.expand(3, -1, -1)])
    stages = train_toy(steps)
    shown = [*(stages[k] for k in (0, 5, 7, 8, 9, 10, 12)), spiral(1000)]
    counts = [torch.histogramdd(z.flatten(1), 128, range=[-1.5, 1.5, -1.5, 1.5]).hist.T for z in shown]
    rows.append([1 - 2.0 * (count > 0).expand(3, -1, -1) for count in counts])
    sheet = torch.cat([torch.cat(row, dim=2) for row in rows], dim=1).clamp(-1, 1)           # (3, H, 1024)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(((sheet + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(path)
    print(f"{path}: q from t = 0 to 999 and sqrt(abar), by {', '.join(SCHEDULES)}; last p, and the data")


if __name__ == "__main__":
    main()
