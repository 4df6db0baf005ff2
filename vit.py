"""The vision transformer that classifies images; then its blocks in CLIP, and in models of published weights.

ViT (Dosovitskiy et al. 2021, 2010.11929) in the plain form of Beyer et al. 2022 (2205.01580): fixed sin-cos
positions instead of learned ones, and the mean of all tokens instead of a class token. Two changes let it
learn from a few hundred images. Convolutions make the tokens (Xiao et al. 2021, 2106.14881): plain patches
would have to learn from the data that neighbouring pixels belong together. And every block starts as the
identity, so that training begins with these convolutions, and attention joins in as far as it helps.

Letters: B batch, C channels, H W image sides, L tokens, M further tokens, D width of a token, K classes,
E axes of the space that images and texts share.
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
    later ones. With more tokens (B, M, D), all look at them too; with count (B, L + M) bool, only at those
    that count.
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
        q, k, v = rearrange(self.qkv(x), "b l (n h d) -> n b h l d", n=3, h=self.heads)   # (B, h, L + M, d)
        x = F.scaled_dot_product_attention(q[:, :, :L], k, v, mask, is_causal=self.causal)
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

    def __init__(self, channels, patch, dim, bias=True):
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(channels * patch * patch, dim, bias)

    def forward(self, x):
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)
        return self.embed(patches)


class Convolutions(nn.Module):
    """A token per patch, by convolutions: (B, C, H, W) -> (B, L, D). Xiao et al. 2021.

    They are 3 x 3, of stride 2, 1, then 2 for each further halving; a 1 x 1 ends them. GroupNorm
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

    The first loss is within a percent of ln K. Positions are added at a tenth of their length: at full length
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


# ---- the same blocks without labels: MAE

class MAE(nn.Module):
    """A ViT that sees a quarter of the patches, and a decoder that draws the others.

    He et al. 2022, 2111.06377. Its convolutions see grey in place of what is hidden.
    """

    def __init__(self, vit, dim, heads, patch):
        super().__init__()
        self.vit, self.patch = vit, patch
        self.hidden = nn.Parameter(0.02 * torch.randn(dim))              # the token of what is hidden
        self.decoder = nn.Sequential(Block(dim, heads), nn.LayerNorm(dim), nn.Linear(dim, 3 * patch**2))

    def forward(self, x, generator):
        """Return the mean squared error on what is hidden of images (B, 3, H, W).

        Targets are a patch's pixels less their mean, over their standard deviation (norm_pix_loss).
        """
        p, net, rows = self.patch, self.vit, x.shape[2] // self.patch
        pixels = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)                    # (B, L, P)
        B, L, _ = pixels.shape
        shown = torch.rand(B, L, device=x.device, generator=generator).argsort(1) < L // 4       # (B, L)
        cover = rearrange(shown, "b (h w) -> b 1 h w", h=rows).repeat_interleave(p, 2).repeat_interleave(p, 3)
        tokens = (net.stem(x * cover) + net.positions)[shown].view(B, L // 4, -1)                # (B, L/4, D)
        tokens = net.norm(net.blocks(tokens))
        every = self.hidden.to(tokens.dtype).expand(B, L, -1).masked_scatter(shown[..., None], tokens)
        error = self.decoder(every + net.positions) - F.layer_norm(pixels, pixels.shape[-1:], eps=1e-4)
        return error.square()[~shown].mean()


# ---- the same blocks for language: CLIP

LENGTH = 64                                            # tokens of a text at most


def padded(texts, length, start, end, pad):
    """Put lists of ids between start [int] and end, then pad: (B, length) int64. What is too long is cut."""
    rows = [[*start, *ids[:length - 1 - len(start)], end] for ids in texts]
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])


def words_of(text):
    """Split a text into its words, [str], in small letters."""
    return re.findall(r"[^\W_]+", text.lower())


def vocabulary(texts):
    """List the words of texts, [V], in order."""
    return sorted({word for text in texts for word in words_of(text)})


def word_tokens(texts, words):
    """Encode texts by the places of their words in a vocabulary [V]: (B, L) int64, L <= LENGTH.

    0 pads, V + 1 starts, V + 2 ends. Words that are not in it are left out: nobody could have learned them.
    """
    place = {word: k for k, word in enumerate(words, 1)}
    known = [[place[word] for word in words_of(text) if word in place] for text in texts]
    return padded(known, min(LENGTH, 2 + max(map(len, known))), [len(words) + 1], len(words) + 2, 0)


class TextEncoder(nn.Module):
    """Token ids (B, L) to features of every token, (B, L, D); if causal, of it and those before it only."""

    def __init__(self, vocabulary, length, dim, depth, heads):
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

    image: a model of E logits, the axes of the space that images and texts share; text: a Text.
    """

    def __init__(self, image, text):
        super().__init__()
        self.image, self.text = image, text
        self.project = nn.Linear(text.embed.embedding_dim, image.head.out_features, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def encode_image(self, x):
        """Place images (B, C, H, W) on the unit sphere, (B, E)."""
        return F.normalize(self.image(x), dim=1)

    def encode_text(self, ids):
        """Place texts, ids (B, L), on the unit sphere, (B, E): by their end, the largest id."""
        end = ids.argmax(1)[:, None, None]
        features = self.text(ids).take_along_dim(end, dim=1)[:, 0]                               # (B, D)
        return F.normalize(self.project(features), dim=1)

    def forward(self, x, ids):
        """Score every image with every text: (B, B)."""
        return self.log_scale.exp() * self.encode_image(x) @ self.encode_text(ids).T


def contrastive(logits):
    """Cross-entropy of finding the text of each image and the image of each text; logits (B, B)."""
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


# What CLIP is asked for RESISC45 (openai/CLIP, data/prompts.md): 18 ways to say it
TEMPLATES = [f"{view} {kind} of {article}{{}}." for view in ("satellite", "aerial")
             for kind in ("imagery", "photo", "view") for article in ("", "a ", "the ")]


@torch.no_grad()
def zero_shot(clip, encode, classes, templates=TEMPLATES):
    """Make a classifier of class names: (K, E), unit vectors. An image is of the class that is nearest.

    Each is the normalised mean of its texts' unit vectors (Radford et al. 3.1.4); encode makes ids.
    """
    device = clip.log_scale.device
    texts = [[template.format(name.replace("_", " ")) for template in templates] for name in classes]
    means = [clip.encode_text(encode(some).to(device)).mean(0) for some in texts]
    return F.normalize(torch.stack(means), dim=1)


# ---- published weights, as baselines

class Published(nn.Module):
    """A published CLIP with the methods of ours: encode_image, encode_text, tokens; size is its images' side.

    "ViT-B-32-quickgelu:openai" and "ViT-B-32:RemoteCLIP-ViT-B-32.pt" are MODEL:WEIGHTS of open_clip; any
    other name is a folder or hub name of transformers, as "lcybuaa/Git-RSCLIP". ValueError if that is not
    installed.
    """

    def __init__(self, name):
        super().__init__()
        model, _, weights = name.partition(":")
        try:
            if weights:
                import open_clip
                self.model = open_clip.create_model(model, weights)
                self.tokens = open_clip.get_tokenizer(model)
                about = open_clip.get_model_preprocess_cfg(self.model)
                self.size, mean, std = about["size"], about["mean"], about["std"]
                self.image, self.text = self.model.encode_image, self.model.encode_text
            else:
                from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
                self.model, tokenizer = AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
                about, shape = AutoImageProcessor.from_pretrained(name), self.model.config
                self.size, mean, std = shape.vision_config.image_size, about.image_mean, about.image_std
                self.image, self.text = self.model.get_image_features, self.model.get_text_features
                how = dict(padding="max_length", truncation=True, return_tensors="pt",
                           max_length=shape.text_config.max_position_embeddings)
                self.tokens = lambda texts: tokenizer(texts, **how).input_ids
        except ImportError:
            needed = "open_clip_torch" if weights else "transformers"
            raise ValueError(f"to read published weights, pip install {needed}") from None
        self.size = max(self.size) if isinstance(self.size, tuple) else self.size
        self.log_scale = self.model.logit_scale
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def encode_image(self, x):
        """Place images (B, 3, H, W) in [-1, 1] on the unit sphere, (B, E)."""
        found = self.image(((x + 1) / 2 - self.mean) / self.std)
        return F.normalize(getattr(found, "pooler_output", found), dim=1)     # transformers 5 wraps it

    def encode_text(self, ids):
        """Place texts, ids (B, L), on the unit sphere, (B, E)."""
        found = self.text(ids)
        return F.normalize(getattr(found, "pooler_output", found), dim=1)


def main():
    """Print the shapes on the way of two images through a small ViT."""
    model = ViT(classes=45, depth=1)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name or "ViT": print(
            f"{name:26} {tuple(args[0].shape)} -> {tuple(out.shape)}"))
    model(torch.zeros(2, 3, 64, 64))


if __name__ == "__main__":
    main()
