"""The vision transformer that classifies images.

ViT (Dosovitskiy et al. 2021, 2010.11929) in the plain form of Beyer et al. 2022 (2205.01580): fixed sin-cos
positions instead of learned ones, and the mean of all tokens instead of a class token. Two changes let it
learn from a few hundred images. Convolutions make the tokens (Xiao et al. 2021, 2106.14881): plain patches
would have to learn from the data that neighbouring pixels belong together. And every block starts as the
identity, so that training begins with these convolutions, and attention joins in as far as it helps.

Letters: B batch, C channels, H W image sides, P patch side, L tokens, D width of a token, K classes.
"""
import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


def zero(layer):
    """Return the layer with all weights 0: a residual branch that ends with it starts as nothing."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def head(dim, classes):
    """Make the linear head of a classifier. Its first logits are small, so that the first loss is near ln K.

    At 0 no gradient would reach the other layers at first: short runs then found the classes later.
    """
    linear = zero(nn.Linear(dim, classes))
    nn.init.normal_(linear.weight, std=0.02)
    return linear


class Attention(nn.Module):
    """Multi-head attention, (B, L, D) -> (B, L, D).

    softmax(q k^T / sqrt(d)) v in every head (Vaswani et al. 2017, Eq. 1). If causal, no token looks at
    later ones. With more tokens (B, M, D), all look at them too; where count (B, L + M) is given, at what
    is True there.
    """

    def __init__(self, dim, heads, causal=False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} attention heads do not divide a width of {dim}")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, more=None, count=None):
        L = x.shape[1]
        if more is not None:
            x = torch.cat([x, more], dim=1)
        mask = None if count is None else count[:, None, None]                            # (B, 1, 1, L + M)
        q, k, v = rearrange(self.qkv(x), "b l (n h d) -> n b h l d", n=3, h=self.heads)   # (B, heads, L, d)
        x = F.scaled_dot_product_attention(q[:, :, :L], k, v, mask, is_causal=self.causal)
        return self.out(rearrange(x, "b h l d -> b l (h d)"))


class Block(nn.Module):
    """Pre-norm transformer block, (B, L, D) -> (B, L, D).

    Tokens exchange information (attention), then each is processed alone (MLP). Starts as the identity.
    """

    def __init__(self, dim, heads, causal=False, gelu=nn.GELU, eps=1e-5):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attention = Attention(dim, heads, causal)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), gelu(), zero(nn.Linear(4 * dim, dim)))
        zero(self.attention.out)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sincos_positions(rows, cols, dim):
    """Encode the place of each token, (L, D): sines and cosines of its column and its row.

    They have dim / 4 wavelengths from 2 pi to 20,000 pi.
    """
    if dim % 4:
        raise ValueError(f"2-D sin-cos positions need a width divisible by 4, not {dim}")
    omega = 10_000 ** -torch.linspace(0, 1, dim // 4)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    angles = [p.reshape(-1, 1) * omega for p in (x, y)]                  # 2 of (L, D/4)
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)


class Patches(nn.Module):
    """A token per patch, a linear map of its pixels: (B, C, H, W) -> (B, L, D). Dosovitskiy et al. Eq. 1."""

    def __init__(self, channels, patch, dim, bias=True):
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(channels * patch * patch, dim, bias)

    def forward(self, x):
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)
        return self.embed(patches)


class Convolutions(nn.Module):
    """A token per patch, by convolutions: (B, C, H, W) -> (B, L, D). Xiao et al. 2021.

    They are 3 x 3: one of stride 2, one of stride 1, then one of stride 2 for each further halving. GroupNorm
    instead of BatchNorm, whose statistics would depend on how many images of a batch are synthetic. Raises
    ValueError if the patch is not a power of 2, or the width not divisible by 16 (8 groups in half of it).
    """

    def __init__(self, channels, patch, dim):
        super().__init__()
        halvings = int(patch).bit_length() - 1
        if halvings < 1 or patch != 2**halvings or dim % 16:
            raise ValueError(f"convolutions need a patch of 2, 4, 8 ... pixels and a width divisible by 16, "
                             f"not {patch} and {dim}")
        widths = [channels, dim // 2, dim // 2, *[dim] * (halvings - 1)]
        strides = [2, 1, *[2] * (halvings - 1)]
        layers = []
        for c_in, c_out, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers.append(nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False))
            layers += [nn.GroupNorm(8, c_out), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], dim, 1))

    def forward(self, x):
        return rearrange(self.layers(x), "b d h w -> b (h w) d")


def mean_token(tokens, x):
    """Average tokens (B, L, D), in rows of a square, over the image x (B, C, H, W): (B, D).

    Where x has a mask after its RGB channels, over the mask: the building decides, its surroundings through
    attention only. Without this, the few pixels that show damage took twice as many steps to be found.
    """
    if x.shape[1] % 3 == 0:
        return tokens.mean(dim=1)
    side = round(tokens.shape[1] ** 0.5)
    weights = F.adaptive_avg_pool2d(x[:, -1:] + 1, side).flatten(1) + 1e-3       # of an empty mask, all alike
    return torch.einsum("bl,bld->bd", weights / weights.sum(1, keepdim=True), tokens)


class ViT(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to class logits (B, K); stem: Convolutions or Patches.

    The first loss is ln K but for a percent. Positions are added at a tenth of their length: at full length
    they drown the features that a stem of convolutions brings.
    """

    def __init__(self, classes, size=64, patch=8, dim=192, depth=6, heads=3, channels=3, stem=Convolutions):
        super().__init__()
        if size % patch:
            raise ValueError(f"an image of {size} px cannot be cut into patches of {patch} px")
        self.stem = stem(channels, patch, dim)
        positions = 0.1 * sincos_positions(size // patch, size // patch, dim)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = head(dim, classes)

    def features(self, x):
        """Return the mean token, (B, D), from which the head decides and distances are measured."""
        tokens = self.stem(x) + self.positions                                                   # (B, L, D)
        return mean_token(self.norm(self.blocks(tokens)), x)                                     # (B, D)

    def forward(self, x):
        return self.head(self.features(x))                                                       # (B, K)


# ---- the same blocks for language: CLIP

PAD, START, END = 0, 257, 258


def byte_tokens(texts, length):
    """Encode texts as their UTF-8 bytes plus 1, between START and END, then PAD: (B, length) int64.

    What is too long is cut. END is the largest of all ids, as in CLIP, which finds it by argmax.
    """
    rows = [[START, *[b + 1 for b in text.encode()[:length - 2]], END] for text in texts]
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])


LENGTH = 64                                            # tokens of a text at most


def words_of(text):
    """Split a text into its words, [str], in small letters."""
    return re.findall(r"[^\W_]+", text.lower())


def word_tokens(texts, words):
    """Encode texts by the places of their words in a vocabulary [V]: (B, L) int64, L <= LENGTH.

    0 pads, V + 1 starts and V + 2 ends, the largest as in CLIP. Words that are not in it are left out: no
    model could have learned them.
    """
    place, start, end = {word: k for k, word in enumerate(words, 1)}, len(words) + 1, len(words) + 2
    known = [[place[word] for word in words_of(text) if word in place] for text in texts]
    rows = [[start, *ids[:LENGTH - 2], end] for ids in known]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


class Text(nn.Module):
    """Token ids (B, L) to features of every token, (B, L, D); if causal, of it and those before it only."""

    def __init__(self, vocabulary=END + 1, length=96, dim=192, depth=4, heads=3, causal=True, **details):
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(0.01 * torch.randn(length, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads, causal, **details) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, details.get("eps", 1e-5))

    def forward(self, ids):
        x = self.embed(ids) + self.positions[:ids.shape[1]]                                      # (B, L, D)
        return self.norm(self.blocks(x))


class CLIP(nn.Module):
    """An image tower and a text tower, trained to agree (Radford et al. 2021, 2103.00020, figure 3).

    image: a model of E logits, the axes of the common space; text: a Text. With sigmoid, every pair of an
    image and a text is judged alone (SigLIP: Zhai et al. 2023, 2303.15343), for which scores need a bias.
    """

    def __init__(self, image, text, sigmoid=False):
        super().__init__()
        self.image, self.text = image, text
        D = text.embed.embedding_dim
        E = getattr(image.head, "out_features", D)                       # SigLIP's image tower has no head
        self.project = nn.Linear(D, E, bias=sigmoid)
        self.log_scale = nn.Parameter(torch.tensor(10.0 if sigmoid else 1 / 0.07).log())
        self.bias = nn.Parameter(torch.tensor(-10.0)) if sigmoid else 0.0

    def encode_image(self, x):
        """Place images (B, C, H, W) on the unit sphere, (B, E)."""
        return F.normalize(self.image(x), dim=1)

    def encode_text(self, ids):
        """Place texts, ids (B, L), on the unit sphere, (B, E): at the token that has seen them whole.

        That is END, the largest id. Where all tokens see all, the last one.
        """
        end = ids.argmax(1) if self.text.causal else -1
        return F.normalize(self.project(self.text(ids)[torch.arange(len(ids)), end]), dim=1)

    def forward(self, x, ids):
        """Score every image with every text: (B, B)."""
        return self.log_scale.exp() * self.encode_image(x) @ self.encode_text(ids).T + self.bias


def contrastive(logits):
    """Cross-entropy of finding the text of each image and the image of each text; logits (B, B)."""
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def pairwise(logits):
    """Cross-entropy of saying of each pair whether it belongs together; logits (B, B). SigLIP, algorithm 1."""
    own = torch.eye(len(logits), device=logits.device)
    return F.binary_cross_entropy_with_logits(logits, own.to(logits.dtype), reduction="sum") / len(logits)


# What CLIP is asked for RESISC45 (openai/CLIP, data/prompts.md): 18 ways to say it
TEMPLATES = [f"{view} {kind} of {article}{{}}." for view in ("satellite", "aerial")
             for kind in ("imagery", "photo", "view") for article in ("", "a ", "the ")]


@torch.no_grad()
def zero_shot(clip, encode, classes, templates=TEMPLATES):
    """Make a classifier of class names, with no image of them: (K, E), a unit vector per class.

    encode makes ids of texts. The mean over the templates of a class's unit vectors is made a unit vector
    again (Radford et al. section 3.1.4). An image is of the class whose vector is nearest to its own.
    """
    device = clip.project.weight.device
    texts = [[template.format(name.replace("_", " ")) for template in templates] for name in classes]
    means = [clip.encode_text(encode(some).to(device)).mean(0) for some in texts]
    return F.normalize(torch.stack(means), dim=1)


# ---- published weights: the towers in which they fit

class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the GELU of OpenAI's CLIP (Hendrycks & Gimpel 2016, 1606.08415, section 2)."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Probe(Block):
    """Pool tokens (B, L, D) -> (B, D): a learned one looks at all of them, as SigLIP does."""

    def __init__(self, dim, heads, **details):
        super().__init__(dim, heads, **details)
        self.norm1 = None
        self.token = nn.Parameter(0.02 * torch.randn(dim))

    def forward(self, x):
        probe = self.token.expand(len(x), 1, -1)
        others = torch.arange(1 + x.shape[1], device=x.device).expand(len(x), -1) > 0            # not itself
        x = self.attention(probe, x, others)
        return (x + self.mlp(self.norm2(x)))[:, 0]


class Tower(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to logits (B, K): the ViT of published weights (Dosovitskiy et al.).

    Positions are learned. The head sees a class token that went along with the others (token), or what a Probe
    takes from them; then there is no head, and K is D. CLIP norms once more before the blocks and has no
    biases around them (pre). mean, std: of the RGB values, in [0, 1], that the weights have learned from.
    """

    def __init__(self, classes, size, patch, dim, depth, heads, mean, std, token=True, pre=False, **details):
        super().__init__()
        self.size, eps = size, details.get("eps", 1e-5)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.stem = Patches(3, patch, dim, bias=not pre)
        self.token = nn.Parameter(0.02 * torch.randn(1, dim)) if token else None
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2 + token, dim))
        self.pre = nn.LayerNorm(dim, eps) if pre else nn.Identity()
        self.blocks = nn.Sequential(*[Block(dim, heads, **details) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps)
        self.pool = None if token else Probe(dim, heads, **details)
        self.head = nn.Linear(dim, classes, bias=not pre) if token else nn.Identity()

    def features(self, x):
        """Return what the head sees, (B, D)."""
        x = self.stem(((x + 1) / 2 - self.mean) / self.std)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        x = self.norm(self.blocks(self.pre(x + self.positions)))                                 # (B, L, D)
        return self.pool(x) if self.pool else x[:, 0]

    def forward(self, x):
        return self.head(self.features(x))                                                       # (B, K)


def main():
    """Print the shapes on the way through a ViT of one block, for two images of 64 px."""
    model = ViT(classes=45, depth=1)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name or "ViT": print(
            f"{name:26} {tuple(args[0].shape)} -> {tuple(out.shape)}"))
    model(torch.zeros(2, 3, 64, 64))


if __name__ == "__main__":
    main()
