"""ddpm.py against the formulas of its papers, and on data whose perfect denoiser is known."""
import math
from contextlib import ExitStack, nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import ddpm
from ddpm import PREDICTS, SCHEDULES, Classes, Diffusion, cosine_abar, guided
from train_gen import noise_source
from unet import Condition, UNet


def source(*shape, seed=0):
    """Return a function that draws new noise at every call, the same sequence for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(*shape, dtype=torch.float64, generator=generator)


def noise(*shape, seed=0):
    """Return N(0, I)."""
    return source(*shape, seed=seed)()


def wild(x, t, cond):
    """Return what a network far from the truth might: something of x, t and the class."""
    return 2 * torch.sin(2 * x) + t.view(-1, 1, 1, 1) / 1000 + cond.y.view(-1, 1, 1, 1)


wild.training = False
TWO = Classes(torch.tensor([1, 0]))


# ---- q: the forward process

def test_t_plus_1_single_steps_of_q_are_one_jump():
    """Ho et al. Eq. 2, t + 1 times: x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) eps; and Eq. 4."""
    diffusion = Diffusion(100, "linear")
    x0, eps = noise(1, 1, 2, 2), noise(1, 1, 2, 2, seed=1)
    a = 1.0
    variance = 0.0
    for t in range(100):
        beta = 0.001 + (0.2 - 0.001) * t / 99
        a = math.sqrt(1 - beta) * a
        variance = (1 - beta) * variance + beta              # independent noises: variances add up
        expected = a * x0 + math.sqrt(variance) * eps
        assert_close(diffusion.q_sample(x0, torch.tensor([t]), eps), expected, rtol=0, atol=1e-6)


def test_schedules_have_the_published_values():
    """Linear: Ho et al. section 4. Cosine: Nichol & Dhariwal Eq. 17."""
    product = 1.0
    for t, abar in enumerate(ddpm.linear_abar(1000).tolist()):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert abar == pytest.approx(product, rel=1e-12)
    assert product == pytest.approx(4.036e-5, rel=1e-3)

    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    assert_close(cosine_abar(1000)[:990], torch.tensor(f[1:991], dtype=torch.float64) / f[0])
    kept = cosine_abar(1000)[1:] / cosine_abar(1000)[:-1]                # 1 - beta
    assert kept.min() == kept[-1] == pytest.approx(0.001)

    for schedule in SCHEDULES.values():
        for abar in map(schedule, (20, 50, 1000)):
            assert (abar.diff() < 0).all() and abar[0] > 0.99 and 0 < abar[-1].sqrt() < 0.02


# ---- p: Algorithm 2

def test_the_mean_and_sigma_of_a_step_follow_from_bayes():
    """p(x_{t-1} | x_t, x0) is proportional to q(x_{t-1} | x0) q(x_t | x_{t-1}): on a fine grid."""
    diffusion, seen = Diffusion(30, predict="x0"), []
    abar = diffusion.abar.tolist()
    def network(x, t, cond):
        seen.append(x.item())
        return torch.full_like(x, 0.7)
    ones = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    diffusion.sample_ddpm(network, None, lambda: ones)       # so x_{t-1} is mean + sigma
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)         # of x_{t-1}
    for k, t in enumerate(range(29, 0, -1)):
        beta = 1 - abar[t] / abar[t - 1]
        prior = -((grid - math.sqrt(abar[t - 1]) * 0.7) ** 2) / (2 * (1 - abar[t - 1]))
        likelihood = -((seen[k] - math.sqrt(1 - beta) * grid) ** 2) / (2 * beta)
        p = (prior + likelihood).softmax(0)
        mean = (p * grid).sum()
        sigma = (p * (grid - mean) ** 2).sum().sqrt()
        assert seen[k + 1] == pytest.approx((mean + sigma).item(), abs=1e-8)


@pytest.mark.parametrize("predict", PREDICTS)
def test_sample_ddpm_is_algorithm_2_as_printed_and_so_is_sample_with_order_1_and_eta_1(predict):
    """x <- (x - beta / sqrt(1 - abar) eps) / sqrt(1 - beta) + sigma z, with z = 0 at the last."""
    diffusion = Diffusion(50, predict=predict)
    ours = diffusion.sample_ddpm(wild, TWO, source(2, 1, 2, 2))

    z = source(2, 1, 2, 2)
    abar = cosine_abar(50).tolist()
    x = z()
    for t in reversed(range(50)):
        abar_prev = abar[t - 1] if t else 1.0
        beta = 1 - abar[t] / abar_prev
        a, s = math.sqrt(abar[t]), math.sqrt(1 - abar[t])
        out = wild(x, torch.full((2,), t), TWO)
        eps = {"eps": out, "x0": (x - a * out) / s, "v": a * out + s * x}[predict]
        x = (x - beta / s * eps) / math.sqrt(1 - beta)
        if t > 0:
            x = x + math.sqrt((1 - abar_prev) / (1 - abar[t]) * beta) * z()
    assert_close(ours, x, rtol=1e-9, atol=1e-9)
    fast = diffusion.sample(wild, TWO, source(2, 1, 2, 2), steps=50, order=1, eta=1, clip=False)
    assert_close(fast, x, rtol=1e-9, atol=1e-9)
    z = torch.randn(2, 1, 2, 2, requires_grad=True)                      # no graph is kept
    for sample in (diffusion.sample, diffusion.sample_ddpm):
        assert not sample(wild, TWO, lambda: z).requires_grad


@pytest.mark.parametrize("eta", [0.0, 0.4])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("inpaint", [False, True])
@pytest.mark.parametrize("strength", [None, 60])
def test_order_1_is_ddim_eq_12_with_sigma_of_eq_16(eta, clip, inpaint, strength):
    """SDEdit: it begins at an image with the noise of t = 60.
    RePaint, Algorithm 1 with one round: known pixels are overwritten, as noisy as the others.
    """
    diffusion = Diffusion(100, predict="eps")
    x0_known = noise(2, 3, 2, 2, seed=7)
    mask = torch.tensor([[[[1, 0], [0, 1]]], [[[0, 0], [0, 1]]]]) * inpaint
    ours = diffusion.sample(wild, TWO, source(2, 3, 2, 2), 7, eta=eta, order=1, clip=clip,
                            known=(x0_known, mask) if inpaint else None,
                            start=(x0_known, strength) if strength else None)
    z = source(2, 3, 2, 2)
    ts = diffusion.levels(7, strength)
    abar = [*cosine_abar(100)[ts].tolist(), 1.0]
    x = z()
    if strength:
        x = math.sqrt(abar[0]) * x0_known + math.sqrt(1 - abar[0]) * x
    for t, now, after in zip(ts, abar, abar[1:], strict=False):
        eps = wild(x, torch.full((2,), t), TWO)
        x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
        sigma = eta * math.sqrt((1 - after) / (1 - now)) * math.sqrt(1 - now / after)
        x = math.sqrt(after) * x0 + math.sqrt(1 - after - sigma**2) * eps
        if sigma > 0:
            x = x + sigma * z()
        if inpaint:
            x = mask * (math.sqrt(after) * x0_known + math.sqrt(1 - after) * z()) + (1 - mask) * x
    assert_close(ours, x, rtol=1e-9, atol=1e-9)
    known = mask.bool().expand_as(ours)
    assert (ours[known] == x0_known[known]).all() and (ours[~known] != x0_known[~known]).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_order_2_is_dpm_solver_2m_with_the_corrector_of_unipc_1(steps):
    """As their papers write them, in lambda = log(a / s), for a network that gives x0.

    Predict: x_t = s_t / s_s x_s - a_t (e^-h - 1) D, D = (1 + 1 / 2r) x0_s - 1 / 2r x0_before; h is
    the step in lambda, r h the one before. Correct: the same with D = x0_s + (x0_t - x0_s) / 2.
    """
    diffusion = Diffusion(1000, predict="x0")
    ours = diffusion.sample(wild, TWO, source(2, 1, 2, 2), steps, clip=False)

    ts = diffusion.levels(steps)
    a, s = diffusion.abar[ts].sqrt(), (1 - diffusion.abar[ts]).sqrt()
    h = (a / s).log().diff()
    predicted = corrected = source(2, 1, 2, 2)()
    x0 = []
    for k, t in enumerate(ts):
        x0.append(wild(predicted, torch.full((2,), t), TWO))
        if k > 0:
            D = x0[k - 1] + (x0[k] - x0[k - 1]) / 2
            corrected = s[k] / s[k - 1] * corrected - a[k] * torch.expm1(-h[k - 1]) * D
        if k < steps - 1:
            D = x0[k]
            if k > 0:
                r = h[k - 1] / h[k]
                D = (1 + 1 / (2 * r)) * x0[k] - 1 / (2 * r) * x0[k - 1]
            predicted = s[k + 1] / s[k] * corrected - a[k + 1] * torch.expm1(-h[k]) * D
    assert_close(ours, x0[-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_of_ddim_is_the_euler_step_of_rectified_flow(schedule):
    """z = (1 - u) x0 + u eps has the velocity eps - x0 in u, Liu et al. 2023; for any schedule."""
    diffusion = Diffusion(100, schedule)
    ours = diffusion.sample(wild, TWO, source(2, 1, 2, 2), steps=7, order=1, clip=False)
    ts = diffusion.levels(7)
    a, s = diffusion.abar[ts].sqrt(), (1 - diffusion.abar[ts]).sqrt()
    u = [*(s / (a + s)), 0]
    z = source(2, 1, 2, 2)() / (a[0] + s[0])
    for k, t in enumerate(ts):
        x = (a[k] + s[k]) * z
        v = wild(x, torch.full((2,), t), TWO)
        velocity = (a[k] + s[k]) * v - (a[k] - s[k]) * x                 # eps - x0
        z = z + (u[k + 1] - u[k]) * velocity
    assert_close(ours, z, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gamma", [math.inf, 5.0])
@pytest.mark.parametrize("predict", PREDICTS)
def test_the_loss_is_l_simple_or_min_snr_whatever_the_network_predicts(predict, gamma):
    """Ho et al. Eq. 14: |eps - guess|^2. Hang et al.: min(SNR, gamma) |x0 - guess|^2."""
    torch.manual_seed(0)
    x0, seen = noise(300, 1, 2, 2), []

    def network(x, t, cond):
        seen.extend([x, t, wild(x, t, cond)])
        return seen[-1]

    y = Classes(torch.zeros(300, dtype=torch.long))
    loss = Diffusion(1000, predict=predict, gamma=gamma).loss(network, x0, y)
    x, t, out = seen
    abar = cosine_abar(1000)[t].view(-1, 1, 1, 1)
    a, s = abar.sqrt(), (1 - abar).sqrt()
    eps = (x - a * x0) / s                                               # the noise that was added
    eps_guess = {"x0": (x - a * out) / s, "eps": out, "v": s * x + a * out}[predict]
    x0_guess = {"x0": out, "eps": (x - s * out) / a, "v": a * x - s * out}[predict]
    snr = abar / (1 - abar)
    l_simple = ((eps_guess - eps) ** 2).mean()
    min_snr = (snr.clamp(max=5) * (x0_guess - x0) ** 2).mean()
    assert_close(loss, l_simple if gamma == math.inf else min_snr, rtol=1e-3, atol=0)
    assert abs(eps.mean()) < 0.1 and abs(eps.std() - 1) < 0.1
    assert (snr > 5).any() and (snr < 5).any()


def test_v_is_minus_x0_in_noise_and_eps_in_the_image():
    diffusion, x0, eps = Diffusion(), noise(1, 1, 2, 2), noise(1, 1, 2, 2, seed=1)
    assert_close(diffusion.target(x0, torch.tensor([999]), eps), -x0, rtol=0, atol=1e-3)
    assert_close(diffusion.target(x0, torch.tensor([0]), eps), eps, rtol=0, atol=0.02)


def test_loss_trains_all_t_and_drops_the_class_of_a_tenth_of_the_images_one_by_one():
    ts, ys = [], []

    def network(x, t, cond):
        ts.append(t)
        ys.append(cond.y)
        return x

    for _ in range(20):
        Diffusion(20).loss(network, torch.zeros(500, 1, 1, 1), Classes(torch.full((500,), 3)))
    t, y = torch.stack(ts), torch.stack(ys)
    assert set(t.unique().tolist()) == set(range(20)) and set(y.unique().tolist()) == {-1, 3}
    assert abs((y == -1).double().mean() - 0.1) < 0.01 and (y == -1).any(1).all()


# ---- data whose perfect denoiser is known

class Mixture(nn.Module):
    """The perfect network for equally likely Gaussians N(mu_k, C_k); an image is (D, 1, 1)."""

    def __init__(self, diffusion, mu, C):
        super().__init__()
        self.diffusion = diffusion
        self.mu = torch.as_tensor(mu, dtype=torch.float64)                           # (K, D)
        self.L, self.V = torch.linalg.eigh(torch.as_tensor(C, dtype=torch.float64))
        self.eval()

    def forward(self, x, t, cond=None):
        abar = self.diffusion.abar[t[0]]
        a, s = abar.sqrt(), (1 - abar).sqrt()
        variance = (abar * self.L + s**2)[:, None]                                   # (K, 1, D)
        y = (x.flatten(1) - a * self.mu[:, None]) @ self.V                           # (K, B, D)
        weight = (-(y**2 / variance + variance.log()).sum(-1) / 2).softmax(0)        # (K, B)
        x0 = self.mu[:, None] + (y * a * self.L[:, None] / variance) @ self.V.mT
        x0 = (weight[..., None] * x0).sum(0).view_as(x)
        eps = (x - a * x0) / s
        return {"x0": x0, "eps": eps, "v": a * eps - s * x0}[self.diffusion.predict]


def test_algorithm_2_and_12_steps_return_the_gaussian_that_the_data_are():
    diffusion = Diffusion()
    network = Mixture(diffusion, [[0.3]], [[[0.2**2]]])
    slow = diffusion.sample_ddpm(network, None, source(10_000, 1, 1, 1))
    fast = diffusion.sample(network, None, source(10_000, 1, 1, 1))
    assert abs(slow.mean() - 0.3) < 0.006 and abs(slow.std() - 0.2) < 0.004
    assert abs(fast.mean() - 0.3) < 0.006 and abs(fast.std() - 0.2) < 0.006


def kept(diffusion, std, **how):
    """Return the share of its std that sampling keeps of a Gaussian: the way is linear in x."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    network = Mixture(diffusion, [[0.0]], [[[std**2]]])
    return diffusion.sample(network, None, lambda: one, clip=False, **how).item() / std


BRIGHTNESS = 18 / 127.5 * math.sqrt(3 * 64 * 64)     # 18 grey levels, the same in all pixels


@pytest.mark.parametrize("predict", PREDICTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_12_steps_keep_the_brightness_of_images_and_the_contrast_of_pixels(schedule, predict):
    diffusion = Diffusion(schedule=schedule, predict=predict)
    for std in (0.055, 0.15, 0.5, 2.0, 7.0, BRIGHTNESS, 20.0):
        assert 0.97 < kept(diffusion, std) < 1.03, std


BOUNDS = dict(cosine={8: 0.05, 10: 0.06, 12: 0.045, 20: 0.016},
              linear={8: 0.14, 10: 0.08, 12: 0.04, 20: 0.005})


@pytest.mark.parametrize("schedule", BOUNDS)
def test_12_calls_on_a_wide_mixture_are_nearer_to_the_limit_than_400_of_ddim(schedule):
    """Error against 1,000 calls of DDIM, rms of 200 points, where the data have std 3.

    6 Gaussians with the spectrum of images: 48 directions with std 16 to .05, as k^-1.5. Measured
    at 8, 10, 12, 20: cosine .042 .050 .038 .013, linear .129 .070 .036 .003.
    """
    generator = torch.Generator().manual_seed(0)
    std = 16 / torch.arange(1, 49, dtype=torch.float64) ** 1.5
    mu = std * torch.randn(6, 48, dtype=torch.float64, generator=generator) / 2
    root = std[:, None] * torch.randn(6, 48, 96, dtype=torch.float64, generator=generator) / 96**0.5
    diffusion, x = Diffusion(schedule=schedule), noise(200, 48, 1, 1)
    network = Mixture(diffusion, mu, root @ root.mT)

    def sample(steps, order=2):
        return diffusion.sample(network, None, lambda: x, steps, order=order, clip=False)

    def error(steps, order=2):
        return (sample(steps, order) - limit).square().mean().sqrt()

    limit = sample(1000, order=1)
    for steps, bound in BOUNDS[schedule].items():
        assert error(steps) < bound, steps
    assert error(12) < error(400, order=1)


def test_guidance_is_a_straight_line_in_w_from_the_dropped_to_the_given_class():
    x, t, y = noise(3, 1, 2, 2), torch.tensor([1, 5, 9]), Classes(torch.tensor([1, 2, 3]))
    null, plain = wild(x, t, y.drop(torch.ones(3, dtype=torch.bool))), wild(x, t, y)
    assert (null != plain).all()
    assert_close(guided(wild, x, t, y, 1), plain)
    for w in (0.0, 0.5, 3.0):
        assert_close(guided(wild, x, t, y, w), w * plain - (w - 1) * null)           # Eq. 6


def two_classes(diffusion):
    """Return the perfect network for the classes 0, N(-1, 1), and 1, N(1, 1), or for both."""
    networks = [Mixture(diffusion, mu, [[[1.0]]]) for mu in ([[-1.0]], [[1.0]], [[-1.0], [1.0]])]

    def network(x, t, cond):
        return torch.stack([one(x, t) for one in networks])[cond.y, torch.arange(len(x))]

    network.training = False
    return network


def test_guided_eps_is_of_p_of_x_and_w_times_its_class_so_samples_are_clearer_and_less_varied():
    """It is -s d/dx log(p(x) p(c | x)^w), where p(c | x) = p(x | c) p(c) / p(x)."""
    diffusion, t, x = Diffusion(predict="eps"), 600, noise(20, 1, 1, 1).requires_grad_()
    a, s = diffusion.abar[t].sqrt(), (1 - diffusion.abar[t]).sqrt()
    log_0, log_1 = (-((x - a * mu) ** 2) / 2 for mu in (-1, 1))          # the variance of x is 1
    log_p = torch.logaddexp(log_0, log_1)
    y = Classes(torch.ones(20, dtype=torch.long))
    for w in (0.0, 1.0, 3.0):
        gradient, = torch.autograd.grad((log_p + w * (log_1 - log_p)).sum(), x, retain_graph=True)
        eps = guided(two_classes(diffusion), x, torch.full((20,), t), y, w)
        assert_close(eps, -s * gradient)

    diffusion, y = Diffusion(), Classes(torch.ones(4000, dtype=torch.long))
    plain, strong = (diffusion.sample(two_classes(diffusion), y, source(4000, 1, 1, 1), w=w,
                                      clip=False) for w in (1, 3))
    assert plain.mean() == pytest.approx(1, abs=0.05) and plain.std() == pytest.approx(1, abs=0.04)
    assert strong.mean() > 1.4 and strong.std() < 0.9
    assert (strong < 0).double().mean() < 0.3 * (plain < 0).double().mean()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_fall_by_equal_factors_of_noise_to_signal_from_60_to_a_hundredth(schedule):
    diffusion = Diffusion(schedule=schedule)
    ratio = ((1 - diffusion.abar) / diffusion.abar).sqrt()
    first, *others = diffusion.levels(8)
    wanted = torch.linspace(math.log(60), math.log(0.01), 7, dtype=torch.float64)
    assert first == 999 and (ratio[others].log() - wanted).abs().max() < 0.15
    ts = diffusion.levels(8, start=400)
    wanted = torch.linspace(ratio[400].log().item(), math.log(0.01), 8, dtype=torch.float64)
    assert ts[0] == 400 and (ratio[ts].log() - wanted).abs().max() < 0.15


@pytest.mark.parametrize("T", [21, 100, 1000])
def test_levels_begin_at_the_start_and_fall_and_are_as_many_as_fit(T):
    diffusion = Diffusion(T)
    for start in (None, T - 1, T // 2, 3, 0):
        first = T - 1 if start is None else start
        for steps in (1, 2, 5, 20, T - 1, T):
            ts = diffusion.levels(steps, start)
            assert ts[0] == first and ts[-1] >= 0 and len(ts) == min(steps, first + 1)
            assert all(after < now for now, after in zip(ts, ts[1:], strict=False))
    assert diffusion.levels(T) == list(reversed(range(T)))


def test_impossible_requests_are_refused():
    z = source(2, 1, 2, 2)
    with pytest.raises(KeyError, match="noise"):
        Diffusion(100, predict="noise").sample(wild, TWO, z)
    for how, words in [(dict(steps=0), "sampling steps"), (dict(steps=101), "sampling steps"),
                       (dict(eta=0.5), "order 2"), (dict(known=(z(), z())), "order 2")]:
        with pytest.raises(ValueError, match=words):
            Diffusion(100).sample(wild, TWO, z, **how)


@pytest.mark.parametrize("how", [dict(w=2.0), dict(w=1.0, eta=0.4, order=1)])
def test_from_the_first_call_on_nothing_waits_for_the_device(no_waiting, monkeypatch, how):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(ddpm, "Replay", lambda network: network)         # recording has to wait
    network, y = UNet(3, 3, 16, (1, 2), 1).to(device).eval(), torch.tensor([1, 0], device=device)
    with ExitStack() as stack:
        network.register_forward_pre_hook(lambda *_: stack.enter_context(no_waiting()))
        randn = noise_source([0, 1], (3, 8, 8), device)
        Diffusion(100).to(device).sample(network, Condition(y), randn, 5, **how)


def test_a_replay_gives_the_numbers_of_its_network_and_calls_it_twice(monkeypatch):
    """On the CPU: a recording that fills the places that it was made with when it is replayed."""
    class Graph:
        def replay(self):
            replay.out.copy_(replay.x * replay.t[:, None])

    def network(x, t):
        calls.append(t)
        return x * t[:, None]

    calls = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    replay = ddpm.Replay(network)
    inputs = [(noise(3, 2, seed=k), torch.full((3,), k)) for k in range(5)]
    outputs = [replay(x, t) for x, t in inputs]
    assert_close(outputs, [x * t[:, None] for x, t in inputs])
    assert len(calls) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("bf16", [False, True])
def test_on_a_gpu_a_replay_makes_the_images_of_the_plain_network(monkeypatch, bf16):
    torch.manual_seed(0)
    network, diffusion = UNet(3, 3, 16, (1, 2), 1).cuda().eval(), Diffusion(100).cuda()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)                              # or its output would be 0
    calls = []
    network.register_forward_pre_hook(lambda *_: calls.append(1))

    def sample(seed):
        y, randn = torch.tensor([1, 0]).cuda(), noise_source([seed, seed + 1], (3, 8, 8), "cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            return diffusion.sample(network, Condition(y), randn, steps=8, w=2.0)

    replayed = [sample(seed) for seed in (0, 5)]
    assert len(calls) == 2 * 2
    monkeypatch.setattr(ddpm, "Replay", lambda network: network)
    for seed, images in zip((0, 5), replayed, strict=True):
        assert_close(images, sample(seed), rtol=0, atol=2e-2 if bf16 else 1e-4)


def test_the_demo_learns_its_arms_draws_its_rows_and_prints_losses_and_the_path(tmp_path, capsys):
    path = tmp_path / "new" / "ddpm.png"
    ddpm.main(path, steps=500)
    sheet = np.asarray(Image.open(path)).astype(float)
    assert sheet.shape == (5 * 172, 8 * 136, 3)
    for k, row in enumerate(sheet.reshape(5, 172, 8, 136, 3).transpose(0, 2, 1, 3, 4)):
        assert (row[0, :20] < 128).any() and (row[:, :4] == 255).all()   # a title, not cut off
        assert (row[:, 22:40] < 128).any((1, 2, 3)).all() and (row[:, 22:40, :2] == 255).all()
        assert (row[:, [20, 21, 22, 38, 39]] == 255).all()               # captions touch nothing
        panels = row[:, 40:168, 4:132]
        if k < 2:                                            # q: smooth, then ever rougher
            rough = abs(np.diff(panels, axis=1)).mean((1, 2, 3))
            assert rough[0] == rough.min() < 12 < 60 < rough[-1]
            continue
        cloud, samples, points = (torch.as_tensor(panel) for panel in panels[[0, 6, 7]])
        assert abs((points < 255).any(-1).nonzero().double().mean(0) - 64).max() < 3
        for ink in ([0, 0, 255], [255, 0, 0]):               # p: from noise to the data of a class
            arm, first, last = ((z == torch.tensor(ink)).all(-1).nonzero().double()
                                for z in (points, cloud, samples))
            far = [torch.cdist(z, arm).amin(1).mean() for z in (first, last)]
            assert len(arm) > 200 and far[1] < 3 < 10 < far[0]
    first, *_, last, end = capsys.readouterr().out.splitlines()
    assert "step    1: loss " in first and "step  500: loss " in last and end == f"look at {path}"
