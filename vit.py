"""The vision transformer that classifies images.

ViT (Dosovitskiy et al. 2021, 2010.11929) in the plain form of Beyer et al. 2022 (2205.01580): fixed sin-cos
positions instead of learned ones, and the mean of all tokens instead of a class token. Two changes let it
learn from a few hundred images. Convolutions make the tokens (Xiao et al. 2021, 2106.14881): plain patches
would have to learn from the data that neighbouring pixels belong together. And every block starts as the
identity, so that training begins with these convolutions, and attention joins in as far as it helps.

Letters: B batch, C channels, H W image sides, P patch side, L tokens, D width of a token, K classes.
"""
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
    """Multi-head self-attention, (B, L, D) -> (B, L, D).

    softmax(q k^T / sqrt(d)) v in every head (Vaswani et al. 2017, Eq. 1). If causal, no token looks at
    later ones.
    """

    def __init__(self, dim, heads, causal=False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} attention heads do not divide a width of {dim}")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b l (n h d) -> n b h l d", n=3, h=self.heads)   # (B, heads, L, d)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(rearrange(x, "b h l d -> b l (h d)"))


class Block(nn.Module):
    """Pre-norm transformer block, (B, L, D) -> (B, L, D).

    Tokens exchange information (attention), then each is processed alone (MLP). Starts as the identity.
    """

    def __init__(self, dim, heads, causal=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, causal)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), zero(nn.Linear(4 * dim, dim)))
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

    def __init__(self, channels, patch, dim):
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(channels * patch * patch, dim)

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


class Text(nn.Module):
    """Token ids (B, L) -> features of every token, (B, L, D); each has seen those before it only."""

    def __init__(self, vocabulary=END + 1, length=96, dim=192, depth=4, heads=3):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(0.01 * torch.randn(length, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads, causal=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids):
        x = self.embed(ids) + self.positions[:ids.shape[1]]                                      # (B, L, D)
        return self.norm(self.blocks(x))


class CLIP(nn.Module):
    """An image tower and a text tower, trained to agree (Radford et al. 2021, 2103.00020, figure 3).

    image: a ViT whose K logits are the axes of the common space; text: a Text.
    """

    def __init__(self, image, text):
        super().__init__()
        self.image, self.text = image, text
        self.project = nn.Linear(text.embed.embedding_dim, image.head.out_features, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def encode_image(self, x):
        """Place images (B, C, H, W) on the unit sphere, (B, K)."""
        return F.normalize(self.image(x), dim=1)

    def encode_text(self, ids):
        """Place texts, ids (B, L), on the unit sphere, (B, K): at their END, which has seen them whole."""
        end = self.text(ids)[torch.arange(len(ids)), ids.argmax(1)]                              # (B, D)
        return F.normalize(self.project(end), dim=1)

    def forward(self, x, ids):
        """Score every image with every text: (B, B)."""
        return self.log_scale.exp() * self.encode_image(x) @ self.encode_text(ids).T


def contrastive(logits):
    """Cross-entropy of finding the text of each image and the image of each text; logits (B, B)."""
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def main():
    """Print the shapes on the way through a ViT of one block, for two images of 64 px."""
    model = ViT(classes=45, depth=1)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name or "ViT": print(
            f"{name:26} {tuple(args[0].shape)} -> {tuple(out.shape)}"))
    model(torch.zeros(2, 3, 64, 64))


if __name__ == "__main__":
    main()
