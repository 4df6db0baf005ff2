"""The vision transformer (ViT) that classifies images. Below it: CLIP, and published CLIPs.

The ViT (Dosovitskiy et al. 2021, 2010.11929) has the plain form of Beyer et al. 2022 (2205.01580):
fixed sin-cos positions instead of learned ones, the mean of all tokens instead of a class token.
Two changes let it learn from a few hundred images. Convolutions make the tokens (Xiao et al. 2021,
2106.14881), as plain patches would have to learn from the data that neighbouring pixels belong
together. And every block starts as the identity: attention joins in as far as it helps.

Letters: B batch, C image channels, H W image sides, L tokens, M context tokens, D width of a token,
K classes, P pixel values of a patch, E dimensions of the space that images and texts share.
"""
import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


def zero(layer):
    """Return the layer with all weights 0. A residual branch that ends in it starts as nothing."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def head(dim, classes):
    """Return the linear head of a classifier, with small weights: its first loss is near ln K.

    Weights of 0 would pass no gradient on in the first step, which slowed short runs down.
    """
    linear = zero(nn.Linear(dim, classes))
    nn.init.normal_(linear.weight, std=0.02)
    return linear


class Attention(nn.Module):
    """Multi-head attention, tokens (B, L, D) -> (B, L, D).

    softmax(q k^T / sqrt(d)) v in every head (Vaswani et al. 2017, Eq. 1). If causal, no token
    attends to a later one. context (B, M, D) gives further keys and values, but no queries; mask
    (B, L + M) bool is true for the keys that may be attended to.
    """
    def __init__(self, dim, heads, causal=False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} attention heads do not divide a width of {dim}")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, context=None, mask=None):
        L = x.shape[1]
        if context is not None:
            x = torch.cat([x, context], dim=1)                              # (B, L + M, D)
        if mask is not None:
            mask = mask[:, None, None]                                      # (B, 1, 1, L + M)
        q, k, v = rearrange(self.qkv(x), "b l (n h d) -> n b h l d", n=3, h=self.heads)
        x = F.scaled_dot_product_attention(q[:, :, :L], k, v, mask, is_causal=self.causal)
        return self.out(rearrange(x, "b h l d -> b l (h d)"))


class Block(nn.Module):
    """Pre-norm transformer block, (B, L, D) -> (B, L, D), which starts as the identity.

    Tokens exchange information (attention), then each is processed alone (MLP).
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
    """Return the position of each token as sines and cosines of its column and row, (L, D).

    They have dim / 4 wavelengths from 2 pi to 20,000 pi.
    """
    if dim % 4:
        raise ValueError(f"2-D sin-cos positions need a width divisible by 4, not {dim}")
    omega = 10_000 ** -torch.linspace(0, 1, dim // 4)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    angles_x = x.reshape(-1, 1) * omega                                     # (L, D / 4)
    angles_y = y.reshape(-1, 1) * omega
    return torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=1)


class Patches(nn.Module):
    """Make patches tokens by a linear map, (B, C, H, W) -> (B, L, D): Dosovitskiy et al. Eq. 1."""
    def __init__(self, channels, patch, dim):
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(channels * patch * patch, dim)

    def forward(self, x):
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)
        return self.embed(patches)


class Convolutions(nn.Module):
    """Make patches tokens by 3 x 3 convolutions, (B, C, H, W) -> (B, L, D): Xiao et al. 2021.

    Their strides are 2, 1, then 2 for each further halving of a patch; a 1 x 1 convolution follows.
    GroupNorm stands in place of BatchNorm, whose statistics would depend on how many images of a
    batch are synthetic.
    """
    def __init__(self, channels, patch, dim):
        super().__init__()
        halvings = int(patch).bit_length() - 1
        if halvings < 1 or patch != 2**halvings or dim % 16:
            raise ValueError("convolutions need a patch of 2, 4, 8 ... pixels and a width "
                             f"divisible by 16, not {patch} and {dim}")
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
    """Return the mean (B, D) of the tokens (B, L, D) of square images x (B, C, H, W).

    Where x has a mask after its RGB channels (4 or 7 channels), it is the mean over the mask: the
    building decides, and its surroundings only through attention. Without this, training took twice
    as many steps to find the few pixels that show damage.
    """
    if x.shape[1] % 3 == 0:
        return tokens.mean(dim=1)
    side = round(tokens.shape[1] ** 0.5)
    cover = F.adaptive_avg_pool2d(x[:, -1:] + 1, side).flatten(1)           # (B, L), from 0 to 2
    weights = cover + 1e-3                              # of an empty mask, all tokens are equal
    return torch.einsum("bl,bld->bd", weights / weights.sum(1, keepdim=True), tokens)


class ViT(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to class logits (B, K). stem: Convolutions or Patches.

    Positions are added at a tenth of their length, because at full length they drown the features
    of the convolutions. The first loss is within a percent of ln K.
    """
    def __init__(self, classes, size=64, patch=8, dim=192, depth=6, heads=3, channels=3,
                 stem=Convolutions):
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
        """Return the mean token, (B, D): from it the head decides, and distances are measured."""
        tokens = self.stem(x) + self.positions                              # (B, L, D)
        return mean_token(self.norm(self.blocks(tokens)), x)                # (B, D)

    def forward(self, x):
        return self.head(self.features(x))                                  # (B, K)


# ---- CLIP: the same blocks for images and language

LENGTH = 64                                     # no text has more tokens


def words_of(text):
    """Return the words of a text in small letters, a list of str."""
    return re.findall(r"[^\W_]+", text.lower())


def vocabulary(texts):
    """Return all words of the texts, sorted, a list [V] of str."""
    return sorted({word for text in texts for word in words_of(text)})


def word_tokens(texts, words):
    """Return the texts as token ids (B, L) int64, L <= LENGTH, for a vocabulary `words` [V].

    A word is 1 + its place in the vocabulary; V + 1 starts a text, V + 2 ends it, and 0 pads it.
    Unknown words are left out, and what exceeds LENGTH is cut off before the end.
    """
    ids = {word: k for k, word in enumerate(words, 1)}
    start, end = len(words) + 1, len(words) + 2
    rows = []
    for text in texts:
        known = [ids[word] for word in words_of(text) if word in ids]
        rows.append([start, *known[:LENGTH - 2], end])
    L = max(map(len, rows))
    return torch.tensor([row + [0] * (L - len(row)) for row in rows])


class TextEncoder(nn.Module):
    """Token ids (B, L) to features of every token, (B, L, D). No token sees a later one."""
    def __init__(self, vocabulary, length, dim, depth, heads):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(0.01 * torch.randn(length, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads, causal=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids):
        x = self.embed(ids) + self.positions[:ids.shape[1]]                 # (B, L, D)
        return self.norm(self.blocks(x))


class CLIP(nn.Module):
    """An image encoder and a text encoder, trained to agree (Radford et al. 2021, 2103.00020).

    image: a classifier whose E logits are the axes of the shared space. text: a TextEncoder.
    """
    def __init__(self, image, text):
        super().__init__()
        self.image, self.text = image, text
        self.project = nn.Linear(text.embed.embedding_dim, image.head.out_features, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())         # section 2.5

    def encode_image(self, x):
        """Return images (B, C, H, W) as unit vectors, (B, E)."""
        return F.normalize(self.image(x), dim=1)

    def encode_text(self, ids):
        """Return texts, token ids (B, L), as unit vectors, (B, E): by their last token."""
        end = ids.argmax(1)[:, None, None]                  # the largest id ends a text
        features = self.text(ids).take_along_dim(end, dim=1)[:, 0]          # (B, D)
        return F.normalize(self.project(features), dim=1)

    def forward(self, x, ids):
        """Return the score of every image with every text: cosines times the scale, (B, B)."""
        return self.log_scale.exp() * self.encode_image(x) @ self.encode_text(ids).T


def contrastive(logits):
    """Return CLIP's loss for the scores (B, B) of images and their texts (figure 3 of the paper).

    Each image must find its text, in a row, and each text its image, in a column.
    """
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


# The prompts of CLIP for RESISC45 (openai/CLIP, data/prompts.md)
TEMPLATES = [f"{source} {kind} of {article}{{}}." for source in ("satellite", "aerial")
             for kind in ("imagery", "photo", "view") for article in ("", "a ", "the ")]


@torch.no_grad()
def zero_shot(clip, encode, classes, templates=TEMPLATES):
    """Return the weights of a classifier made of class names alone: unit vectors, (K, E).

    The row of a class is the normalised mean of the vectors of its prompts (Radford et al. 3.1.4).
    An image belongs to the class with the largest cosine. encode turns texts into token ids.
    """
    rows = []
    for name in classes:
        texts = [template.format(name.replace("_", " ")) for template in templates]
        ids = encode(texts).to(clip.log_scale.device)
        rows.append(clip.encode_text(ids).mean(0))
    return F.normalize(torch.stack(rows), dim=1)


# ---- published weights, as baselines

class Published(nn.Module):
    """A published CLIP with what ours has: encode_image, encode_text, log_scale.

    tokens(texts) makes token ids; size is the side of its images. name is MODEL:WEIGHTS of
    open_clip ("ViT-B-32-quickgelu:openai", "ViT-B-32:RemoteCLIP-ViT-B-32.pt"), or a folder or a hub
    name of transformers ("lcybuaa/Git-RSCLIP"). Raises ValueError if that library is missing.
    """
    def __init__(self, name):
        super().__init__()
        model, _, weights = name.partition(":")
        try:
            if weights:
                mean, std = self.load_open_clip(model, weights)
            else:
                mean, std = self.load_transformers(name)
        except ImportError as error:
            library = "open_clip_torch" if weights else "transformers"
            raise ValueError(f"published weights need pip install {library} ({error})") from error
        self.log_scale = self.model.logit_scale
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def load_open_clip(self, model, weights):
        """Load a model of open_clip. Return mean and standard deviation of its inputs, 3 each."""
        import open_clip
        self.model = open_clip.create_model(model, weights)
        self.tokens = open_clip.get_tokenizer(model)
        self.image, self.text = self.model.encode_image, self.model.encode_text
        config = open_clip.get_model_preprocess_cfg(self.model)
        self.size = int(torch.tensor(config["size"]).max())             # a number or a pair
        return config["mean"], config["std"]

    def load_transformers(self, name):
        """Load a model of transformers. Return mean and standard deviation of its inputs."""
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
        self.model = AutoModel.from_pretrained(name)
        self.image, self.text = self.model.get_image_features, self.model.get_text_features
        config = self.model.config
        self.size = config.vision_config.image_size
        tokenizer = AutoTokenizer.from_pretrained(name)
        options = dict(padding="max_length", truncation=True, return_tensors="pt",
                       max_length=config.text_config.max_position_embeddings)
        self.tokens = lambda texts: tokenizer(texts, **options).input_ids
        processor = AutoImageProcessor.from_pretrained(name)
        return processor.image_mean, processor.image_std

    def encode_image(self, x):
        """Return images (B, 3, H, W) in [-1, 1] as unit vectors, (B, E)."""
        features = self.image(((x + 1) / 2 - self.mean) / self.std)         # (B, E), or an object
        return F.normalize(getattr(features, "pooler_output", features), dim=1)

    def encode_text(self, ids):
        """Return texts, token ids (B, L), as unit vectors, (B, E)."""
        features = self.text(ids)
        return F.normalize(getattr(features, "pooler_output", features), dim=1)


def main():
    """Print the shapes on the way of two images of 64 px through a ViT of one block."""
    model = ViT(classes=45, depth=1)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, inputs, output, name=name or "ViT": print(
            f"{name:26} {tuple(inputs[0].shape)} -> {tuple(output.shape)}"))
    model(torch.zeros(2, 3, 64, 64))


if __name__ == "__main__":
    main()
