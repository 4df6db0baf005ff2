"""The U-Net that predicts v, eps or x0 (Ho et al. 2020, appendix B), and the `Condition` it is given.

Letters: B batch, C image channels, J channels of a hint, H W image sides, D width of the embedding,
K classes, M numbers, L tokens of a text.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from vit import Attention, zero


@dataclass
class Condition:
    """Everything a generator can be told of each image. What is not told is -1 or nan (`nothing`).

    y: (B,) int64, class 0 .. K - 1; numbers: (B, M), metadata; hint: (B, J, H, W), pixels beside the image;
    text: (B, L) int64, tokens. A part that the generator does not know is None.
    """
    y: torch.Tensor
    numbers: torch.Tensor | None = None
    hint: torch.Tensor | None = None
    text: torch.Tensor | None = None

    def each(self, change):
        """Return the Condition whose parts are change(part)."""
        parts = [getattr(self, f.name) for f in fields(self)]
        return Condition(*(None if part is None else change(part) for part in parts))

    def __getitem__(self, index):
        """Select the images of index, a slice or (M,) int64."""
        return self.each(lambda part: part[index])

    def hide(self, mask):
        """Tell nothing of the images in mask, (B,) bool."""
        return self.each(lambda part: torch.where(mask.view(-1, *[1] * (part.ndim - 1)), nothing(part), part))

    def hide_each(self, share, generator=None):
        """Hide each part, and each of the numbers, of a share of the images: any may then be missing."""
        def hide(part):
            shape = part.shape[:2] if part is self.numbers else part.shape[:1]
            mask = torch.rand(shape, device=part.device, generator=generator) < share
            return torch.where(mask.view(*shape, *[1] * (part.ndim - len(shape))), nothing(part), part)
        return self.each(hide)

    def and_null(self):
        """Append as many rows that tell nothing, (2 B,): the null condition of guidance."""
        return self.each(lambda part: torch.cat([part, nothing(part).expand_as(part)]))


def nothing(part):
    """The value that says of a part of a Condition that it is not told."""
    return torch.full((), math.nan if part.is_floating_point() else -1, dtype=part.dtype, device=part.device)


def timestep_embedding(t, dim):
    """Embed t (B,) as sines and cosines at dim / 2 wavelengths from 2 pi to nearly 20,000 pi, (B, dim).

    Vaswani et al. 2017, section 3.5.
    """
    omega = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Numbers(nn.Module):
    """Metadata (B, M), nan where it is not told, to an embedding (B, D): DiffusionSat, section 3.1.

    Sinusoids of each number, which is scaled to 0 .. 1000 over the training images, then two layers. A number
    that is not told has sinusoids of its own, which are learned. (Khanna et al. 2024, 2312.03606.)
    """

    def __init__(self, M, width, D):
        super().__init__()
        self.register_buffer("least", torch.zeros(M))
        self.register_buffer("most", torch.ones(M))                    # see fit()
        self.untold = nn.Parameter(torch.randn(M, width))
        self.layers = nn.Sequential(nn.Linear(M * width, D), nn.SiLU(), nn.Linear(D, D))

    def fit(self, numbers):
        """Take the range of each number from the training images, (N, M); one never told keeps 0 .. 1."""
        told = ~numbers.isnan()
        self.least.copy_(torch.where(told, numbers, math.inf).amin(0).nan_to_num(posinf=0))
        self.most.copy_(torch.where(told, numbers, -math.inf).amax(0).nan_to_num(neginf=1))

    def forward(self, numbers):
        M, width = self.untold.shape
        scaled = 1000 * (numbers - self.least) / (self.most - self.least).clamp(min=1e-9)
        waves = timestep_embedding(scaled.nan_to_num().flatten(), width).view(-1, M, width)
        waves = torch.where(numbers.isnan()[..., None], self.untold, waves)
        return self.layers(waves.flatten(1))


class Words(nn.Module):
    """What a tower (vit.Text) reads in token ids (B, L), -1 where no text is told: GLIDE, section 2.3.

    Features of the tokens (B, L, D); which of them count, (B, L) bool: those up to the end, which has the
    largest id, as padding follows; and of the text (B, D), their sum, of the variance of one. GLIDE takes the
    end, which sees no word before the tower has learned to look: here the text would hardly be heard in short
    runs. A text that is not told is one token, which is learned. (Nichol et al. 2021, 2112.10741.)
    """

    def __init__(self, tower, D):
        super().__init__()
        width = tower.embed.embedding_dim
        self.tower, self.untold, self.project = tower, nn.Parameter(torch.randn(width)), nn.Linear(width, D)
        nn.init.normal_(self.project.weight, std=width**-0.5)                        # as loud as the class

    def forward(self, ids):
        told = ids[:, :1] >= 0                                     # (B, 1); all -1: argmax is the first, 0
        count = torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(1, keepdim=True)
        tokens = self.project(torch.where(told[..., None], self.tower(ids.clamp(min=0)), self.untold))
        return tokens, count, (tokens * count[..., None]).sum(1) / count.sum(1, keepdim=True).sqrt()


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
    """Two convolutions beside a skip; between them the embedding scales and shifts (AdaGN).

    (B, C_in, H, W), (B, D) -> (B, C_out, H, W). With attention, every pixel then looks at every other, and
    with text at its tokens (B, L, D) that count, (B, L). AdaGN: Dhariwal & Nichol 2021. A block starts as
    its skip, and the U-Net as 0 (Ho et al.).
    """

    def __init__(self, c_in, c_out, emb, attention=False, text=False):
        super().__init__()
        self.norm1 = Norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.scale_shift = nn.Linear(emb, 2 * c_out)
        self.norm2 = Norm(c_out)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.norm3 = Norm(c_out) if attention else None
        self.attention = Attention(c_out, heads=max(1, c_out // 64)) if attention else None
        self.words = nn.Linear(emb, c_out) if attention and text else None
        if attention:
            zero(self.attention.out)

    def forward(self, x, emb, text=None):
        scale, shift = rearrange(self.scale_shift(F.silu(emb)), "b (n c) -> n b c 1 1", n=2)
        h = self.conv1(F.silu(self.norm1(x)))                                        # (B, C_out, H, W)
        h = self.norm2(h) * (1 + scale) + shift
        x = self.skip(x) + self.conv2(F.silu(h))                                     # (B, C_out, H, W)
        if self.attention:
            tokens = rearrange(self.norm3(x), "b c h w -> b (h w) c")                # (B, H W, C_out)
            if self.words:
                text = self.words(text[0]), F.pad(text[1], (tokens.shape[1], 0), value=True)
            x = x + rearrange(self.attention(tokens, *text or ()), "b (h w) c -> b c h w", h=x.shape[2])
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
    A hint is stacked onto x, with one channel more that says whether it is told; numbers join the embedding.
    So does a text, read by the tower `text`; the pixels look at its tokens too, wherever they look at pixels.
    """

    def __init__(self, classes, channels=3, width=64, mults=(1, 2, 4), blocks=2, patch=1, hint=0, numbers=0,
                 text=None):
        super().__init__()
        if width % 8:
            raise ValueError(f"the U-Net's width must be divisible by 8, for its norms, and {width} is not")
        self.classes, self.channels, self.width, self.patch, self.hint = classes, channels, width, patch, hint
        D, last = 4 * width, len(mults) - 1
        self.time = nn.Sequential(nn.Linear(width, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Embedding(classes + 1, D)                 # the last row stands for y = -1
        self.numbers = Numbers(numbers, width, D) if numbers else None
        self.text = Words(text, D) if text else None
        how = dict(emb=D, text=bool(text))
        self.stem = nn.Conv2d((channels + hint + (hint > 0)) * patch**2, width, 3, padding=1)

        c, skips = width, []                                # skips: their channels; in forward, their tensors
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, m in enumerate(mults):
            level = []
            for _ in range(blocks):
                level.append(Block(c, m * width, attention=i > 0, **how))
                c = m * width
                skips.append(c)
            halve = nn.Conv2d(c, c, 3, stride=2, padding=1)
            self.down.append(Level(level, halve if i < last else nn.Identity()))
        self.mid = Block(c, c, attention=True, **how)
        for i, m in reversed(list(enumerate(mults))):
            double = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1))
            level = []
            for _ in range(blocks):
                level.append(Block(c + skips.pop(), m * width, attention=i > 0, **how))
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
        if self.numbers:
            emb = emb + self.numbers(cond.numbers)
        text = None
        if self.text:
            *text, whole = self.text(cond.text)                                  # (B, L, D), (B, L); (B, D)
            emb = emb + whole
        if self.hint:
            told = 1.0 - cond.hint[:, :1].isnan().to(x.dtype)                        # (B, 1, H, W)
            x = torch.cat([x, cond.hint.nan_to_num(0.0), told], dim=1)               # (B, C + J + 1, H, W)

        h = self.stem(rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=p, q=p))    # (B, width, H/p, W/p)
        skips = []
        for level in self.down:
            for block in level.blocks:
                h = block(h, emb, text)                           # (B, m width, H/p/2^i, W/p/2^i), level i
                skips.append(h)
            h = level.resize(h)                                                      # halves both sides
        h = self.mid(h, emb, text)
        for level in self.up:
            h = level.resize(h)                                                      # doubles both sides
            for block in level.blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb, text)             # as on the way down
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
