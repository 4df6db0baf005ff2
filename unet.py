"""The U-Net that predicts v, eps or x0 (Ho et al. 2020, appendix B), and the `Condition` it is given.

Letters: B batch, C image channels, H W image sides, D width of the embedding, K classes.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from vit import Attention, zero


@dataclass
class Condition:
    """Everything a generator is conditioned on, for B images; y = -1 is the null condition of guidance."""
    y: torch.Tensor                                                      # (B,) int64: class 0 .. K - 1, or -1

    def __getitem__(self, part):
        """Select the images in part, a slice or (M,) int64."""
        return Condition(y=self.y[part])

    def hide(self, mask):
        """Return the condition with that of the images in mask, (B,) bool, replaced by the null condition."""
        return Condition(y=torch.where(mask, -1, self.y))

    def and_null(self):
        """Return the condition, then the null condition as often: of 2 B images."""
        return Condition(y=torch.cat([self.y, torch.full_like(self.y, -1)]))


def timestep_embedding(t, dim):
    """Embed t (B,) as sines and cosines at dim / 2 wavelengths from 2 pi to 20,000 pi, (B, dim).

    Vaswani et al. 2017, section 3.5.
    """
    omega = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Norm(nn.GroupNorm):
    """GroupNorm of 8 groups in the precision of its input; inside, sums are float32 in any case.

    autocast would turn it into float32 on a GPU: twice the bytes to move, and 77 MB instead of 47 to keep for
    the backward pass, per image of 64 px at the default width.
    """

    def __init__(self, channels):
        super().__init__(8, channels)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, 8, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Block(nn.Module):
    """Two convolutions around a residual; between them the embedding scales and shifts (AdaGN).

    (B, C_in, H, W), (B, D) -> (B, C_out, H, W). With attention, every pixel then looks at every other.
    AdaGN: Dhariwal & Nichol 2021. A block starts as the identity, and the U-Net as 0 (Ho et al.).
    """

    def __init__(self, c_in, c_out, emb, attention=False):
        super().__init__()
        self.norm1 = Norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.scale_shift = nn.Linear(emb, 2 * c_out)
        self.norm2 = Norm(c_out)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.norm3 = Norm(c_out) if attention else None
        self.attention = Attention(c_out, heads=max(1, c_out // 64)) if attention else None
        if attention:
            zero(self.attention.out)

    def forward(self, x, emb):
        scale, shift = rearrange(self.scale_shift(F.silu(emb)), "b (n c) -> n b c 1 1", n=2)
        h = self.conv1(F.silu(self.norm1(x)))                                        # (B, C_out, H, W)
        h = self.norm2(h) * (1 + scale) + shift
        x = self.skip(x) + self.conv2(F.silu(h))                                     # (B, C_out, H, W)
        if self.attention:
            tokens = rearrange(self.norm3(x), "b c h w -> b (h w) c")                # (B, H W, C_out)
            x = x + rearrange(self.attention(tokens), "b (h w) c -> b c h w", h=x.shape[2])
        return x


class Level(nn.Module):
    """The blocks of one resolution, and the way to the next one (down: after the blocks; up: before them)."""

    def __init__(self, blocks, resize):
        super().__init__()
        self.blocks, self.resize = nn.ModuleList(blocks), resize


class UNet(nn.Module):
    """x_t (B, C, H, W), t (B,), Condition -> v, eps or x0, as it was trained, (B, C, H, W).

    mults are the widths of the resolutions in units of `width`, each half as fine as the one before;
    attention at all but the finest. With patch > 1, squares of patch x patch pixels are folded into channels
    first and unfolded at the end: at patch = 2 a quarter of the work, which makes 32 px feasible on a CPU.
    Then let it predict x0: with v, small networks leave a checkerboard, which neither overlapping squares nor
    a last convolution at full resolution removed.
    """

    def __init__(self, classes, channels=3, width=64, mults=(1, 2, 4), blocks=2, patch=1):
        super().__init__()
        if width % 8:
            raise ValueError(f"the U-Net's width must be divisible by 8, for its norms, and {width} is not")
        self.classes, self.channels, self.width, self.patch = classes, channels, width, patch
        D, last = 4 * width, len(mults) - 1
        self.time = nn.Sequential(nn.Linear(width, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Embedding(classes + 1, D)                 # the last row stands for y = -1
        self.stem = nn.Conv2d(channels * patch**2, width, 3, padding=1)

        c, skips = width, []                                # skips: their channels; in forward, their tensors
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, m in enumerate(mults):
            level = []
            for _ in range(blocks):
                level.append(Block(c, m * width, D, attention=i > 0))
                c = m * width
                skips.append(c)
            halve = nn.Conv2d(c, c, 3, stride=2, padding=1)
            self.down.append(Level(level, halve if i < last else nn.Identity()))
        self.mid = Block(c, c, D, attention=True)
        for i, m in reversed(list(enumerate(mults))):
            double = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1))
            level = []
            for _ in range(blocks):
                level.append(Block(c + skips.pop(), m * width, D, attention=i > 0))
                c = m * width
            self.up.append(Level(level, double if i < last else nn.Identity()))
        assert not skips
        out = zero(nn.Conv2d(c, channels * patch**2, 3, padding=1))
        self.head = nn.Sequential(Norm(c), nn.SiLU(), out)

    def forward(self, x, t, cond):
        factor = self.patch * 2 ** (len(self.down) - 1)
        assert x.shape[2] % factor == x.shape[3] % factor == 0, f"{x.shape}: sides not divisible by {factor}"
        p = self.patch
        y = torch.where(cond.y < 0, self.classes, cond.y)
        emb = self.time(timestep_embedding(t, self.width)) + self.label(y)           # (B, D)

        h = self.stem(rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=p, q=p))    # (B, width, H/p, W/p)
        skips = []
        for level in self.down:
            for block in level.blocks:
                h = block(h, emb)                                 # (B, m width, H/p/2^i, W/p/2^i) at level i
                skips.append(h)
            h = level.resize(h)                                                      # halves both sides
        h = self.mid(h, emb)
        for level in self.up:
            h = level.resize(h)                                                      # doubles both sides
            for block in level.blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)                   # as on the way down
        assert not skips
        return rearrange(self.head(h), "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)


def main():
    """Print the shapes on the way through the U-Net, for two images of 64 px."""
    model = UNet(classes=45, blocks=1)
    for name, module in model.named_modules():
        if isinstance(module, (Block, UNet)) or name == "stem" or name.endswith(("resize", "head")):
            module.register_forward_hook(lambda _, args, out, name=name or "UNet": print(
                f"{name:16} {tuple(args[0].shape)} -> {tuple(out.shape)}"))
    model(torch.zeros(2, 3, 64, 64), torch.tensor([0, 999]), Condition(torch.tensor([3, -1])))


if __name__ == "__main__":
    main()
