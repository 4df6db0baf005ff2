"""The vision transformer that classifies images; then its blocks in CLIP, and in models of published weights.

ViT (Dosovitskiy et al. 2021, 2010.11929) in the plain form of Beyer et al. 2022 (2205.01580): fixed sin-cos
positions instead of learned ones, and the mean of all tokens instead of a class token. Two changes let it
learn from a few hundred images. Convolutions make the tokens (Xiao et al. 2021, 2106.14881): plain patches
would have to learn from the data that neighbouring pixels belong together. And every block starts as the
identity, so that training begins with these convolutions, and attention joins in as far as it helps.

Letters: B batch, C channels, H W image sides, L tokens, M further tokens, D width of a token, K classes,
E axes of the space that images and texts share.
"""
import argparse
import gzip
import html
import itertools
import json
import math
import pickle
import re
import string
import struct
import sys
import unicodedata
import zipfile
from functools import cache, partial
from pathlib import Path

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


class Text(nn.Module):
    """Token ids (B, L) to features of every token, (B, L, D); if causal, of it and those before it only."""

    def __init__(self, vocabulary, length, dim, depth, heads, causal=True, **details):
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

        That is its end, the largest id. Where all tokens see all, the last one.
        """
        end = ids.argmax(1) if self.text.causal else torch.full_like(ids[:, 0], ids.shape[1] - 1)
        features = self.text(ids).take_along_dim(end[:, None, None], dim=1)[:, 0]                # (B, D)
        return F.normalize(self.project(features), dim=1)

    def forward(self, x, ids):
        """Score every image with every text: (B, B)."""
        return self.log_scale.exp() * self.encode_image(x) @ self.encode_text(ids).T + self.bias


def contrastive(logits):
    """Cross-entropy of finding the text of each image and the image of each text; logits (B, B)."""
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def pairwise(logits):
    """Cross-entropy of telling which pairs belong together; logits (B, B). SigLIP, algorithm 1."""
    own = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    return F.binary_cross_entropy_with_logits(logits, own, reduction="sum") / len(logits)


# What CLIP is asked for RESISC45 (openai/CLIP, data/prompts.md): 18 ways to say it
TEMPLATES = [f"{view} {kind} of {article}{{}}." for view in ("satellite", "aerial")
             for kind in ("imagery", "photo", "view") for article in ("", "a ", "the ")]


@torch.no_grad()
def zero_shot(clip, encode, classes, templates=TEMPLATES):
    """Make a classifier of class names: (K, E), unit vectors. An image is of the class that is nearest.

    Each is the normalised mean of its texts' unit vectors (Radford et al. 3.1.4); encode makes ids.
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
        self.token = nn.Parameter(0.02 * torch.randn(1, dim))

    def forward(self, x):
        probe = self.token.expand(len(x), 1, -1)
        others = torch.arange(1 + x.shape[1], device=x.device).expand(len(x), -1) > 0            # not itself
        x = self.attention(probe, x, others)
        return (x + self.mlp(self.norm2(x)))[:, 0]


class Tower(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to logits (B, K): the ViT of published weights (Dosovitskiy et al.).

    Positions are learned. The head sees a class token that went along with the others (token), or what a
    Probe takes from them. CLIP norms once more before the blocks and has no biases around them (pre).
    Without classes there is no head. mean, std: of the RGB values, in [0, 1], that the weights know.
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
        self.head = nn.Linear(dim, classes, bias=not pre) if classes else nn.Identity()

    def features(self, x):
        """Return what the head sees, (B, D)."""
        x = self.stem(((x + 1) / 2 - self.mean) / self.std)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        x = self.norm(self.blocks(self.pre(x + self.positions)))                                 # (B, L, D)
        return self.pool(x) if self.pool else x[:, 0]

    def forward(self, x):
        return self.head(self.features(x))                                                       # (B, K)


# ---- published weights: the file

DTYPES = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
              FloatStorage=torch.float32, HalfStorage=torch.float16, BFloat16Storage=torch.bfloat16,
              DoubleStorage=torch.float64, LongStorage=torch.int64, IntStorage=torch.int32,
              ByteStorage=torch.uint8, BoolStorage=torch.bool)


class Stub(dict):
    """Stands for every class and function that a pickle names: it keeps attributes, and does nothing."""

    def __init__(self, *_, **__):
        super().__init__()

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})


class Unpickler(pickle.Unpickler):
    """Read the tensors of a torch archive, also those of a TorchScript program; nothing in it is run."""

    def __init__(self, archive):
        pickled, = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        super().__init__(archive.open(pickled))
        self.storage = lambda key: bytearray(archive.read(pickled.replace("data.pkl", f"data/{key}")))

    def find_class(self, _, name):
        """Stand in for what the pickle names: how a tensor is put together, a type of numbers, or nothing."""
        if name == "_rebuild_tensor_v2":
            return lambda data, start, shape, stride, *_: data.as_strided(shape, stride, start)
        if name == "_rebuild_parameter":
            return lambda tensor, *_: tensor
        return DTYPES.get(name, Stub)

    def persistent_load(self, pid):
        """Read the numbers of a tensor, which lie in a file of their own."""
        return torch.frombuffer(self.storage(pid[2]), dtype=pid[1])


def flat(tree, prefix=""):
    """Collect the tensors of nested dicts, {names joined by dots: tensor}."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{name}"] = value
    return found


def read_tensors(path):
    """Read what torch.save, torch.jit.save or safetensors wrote, {name: tensor}."""
    if Path(path).suffix == ".safetensors":                  # the size of a header, the header, the numbers
        content = Path(path).read_bytes()
        start, found = 8 + int.from_bytes(content[:8], "little"), {}
        for name, about in json.loads(content[8:start]).items():
            if name != "__metadata__":
                numbers = bytearray(content[slice(*(start + k for k in about["data_offsets"]))])
                found[name] = torch.frombuffer(numbers, dtype=DTYPES[about["dtype"]]).reshape(about["shape"])
        return found
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            tree = Unpickler(archive).load()
    else:
        tree = torch.load(path, "cpu", weights_only=True)    # from before torch 1.6
    if not isinstance(tree, dict):
        raise ValueError("it holds no tensors with names")
    if tree.get("kind") in ("clip", "classifier", "mae"):
        raise ValueError(f"a {tree['kind']} of ours, which train_cls.py --init reads")
    tree = tree.get("state_dict", tree.get("model", tree))
    return {name.removeprefix("module."): tensor for name, tensor in flat(tree).items()}


# How the names of all layouts become ours, one rule after the other. What becomes nothing is not needed; .T
# is to be transposed; .q, .k and .v are parts of qkv.
RULES = {"^(input_resolution|context_length|vocab_size)$|.*(attn_mask|position_ids)$": "",
         r"^visual\.proj$": "image.head.weight.T", "^visual_projection": "image.head",
         "^text_projection$": "project.weight.T", r"^text_(projection|model\.head)": "project",
         r"^vision_model\.head": "image.pool", r"^(visual|vision_model)\.": "image.",
         r"^(text_model\.|(?=transformer|token_|positional|ln_))": "text.",
         r"embeddings\.": "", r"transformer\.resblocks|encoder\.layers": "blocks",
         r"conv1|patch_embedding|patch_embed\.proj": "stem.embed", "class_embedding|cls_token|probe": "token",
         r"positional_embedding|position_embedding\.weight|pos_embed": "positions",
         "token_embedding": "embed", "ln_pre|pre_layrnorm": "pre", r"pool\.layernorm": "pool.norm2",
         "ln_post|ln_final|ln_|post_layernorm|final_layer_norm|layer_norm": "norm",
         "self_attn|attn": "attention", r"attention\.(out_)?proj": "attention.out", "in_proj_": "qkv.",
         r"([qkv])_proj\.(weight|bias)": r"qkv.\2.\1", "c_fc|fc1": "0", "c_proj|fc2": "2",
         "logit_scale": "log_scale", "logit_bias": "bias"}
RGB = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), eps=1e-5)
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), eps=1e-6)
QUICK, TANH = dict(gelu=QuickGELU), dict(gelu=partial(nn.GELU, approximate="tanh"))
LAYOUTS = {                           # a name that only this layout has: what it is, and what no tensor tells
    "input_resolution": ("OpenAI CLIP", RGB | QUICK),
    "visual.class_embedding": ("open_clip CLIP", RGB),
    "vision_model.embeddings.class_embedding": ("Hugging Face CLIP", RGB | QUICK),
    "vision_model.head.probe": ("SigLIP", HALF | TANH),
    "cls_token": ("timm ViT", HALF)}


def renamed(tensors):
    """Give the tensors of a file, {name: tensor}, our names and shapes."""
    found = {}
    for name, tensor in tensors.items():
        name = f"image.{name}" if "cls_token" in tensors else name           # timm's are of one tower
        for theirs, ours in RULES.items():
            name = re.sub(theirs, ours, name)
        if tensor.ndim == 4:                                 # a convolution of patches, a linear map of each
            tensor = rearrange(tensor, "d c p q -> d (p q c)")
        if name.endswith(".T"):
            name, tensor = name[:-2], tensor.T
        if name and name in found:
            raise ValueError(f"two tensors are {name}")
        found[name] = tensor
    for name in [name for name in found if name.endswith(".q")]:
        found[name[:-2]] = torch.cat([found.pop(name[:-1] + part) for part in "qkv"])
    return {name: tensor for name, tensor in found.items() if name}


def build(weights, mean, std, **details):
    """Make the model in which weights of our names fit, a CLIP or a Tower: their shapes tell its sizes."""
    def sizes(tower):
        dim = len(weights[f"{tower}.norm.weight"])
        depth = len({name.split(".")[2] for name in weights if name.startswith(f"{tower}.blocks.")})
        heads = 16 if dim == 1280 else max(1, dim // 64)     # no tensor tells: 64 wide, but for the ViT-H
        return dict(dim=dim, depth=depth, heads=heads, **details)

    token, sigmoid = "image.token" in weights, "bias" in weights
    patch = math.isqrt(weights["image.stem.embed.weight"].shape[1] // 3)
    side = math.isqrt(weights["image.positions"].shape[-2] - token)
    image = Tower(len(weights.get("image.head.weight", ())), side * patch, patch, mean=mean, std=std,
                  token=token, pre="image.pre.weight" in weights, **sizes("image"))
    if "text.embed.weight" not in weights:
        return image
    counts = len(weights["text.embed.weight"]), len(weights["text.positions"])
    return CLIP(image, Text(*counts, causal=not sigmoid, **sizes("text")), sigmoid)


def load_pretrained(path, **other):
    """Read published weights: a CLIP, or its image tower (Tower) where there are no more; in eval mode.

    What no tensor tells is as in LAYOUTS, unless other says it: gelu=QuickGELU, mean=..., std=... Raises
    ValueError, one line, if the file is none of these, or weights are missing, left over or of another shape.
    """
    try:
        tensors = read_tensors(path)
        kind, details = next((LAYOUTS[sign] for sign in LAYOUTS if sign in tensors), (None, {}))
        if not kind:
            raise ValueError(f"no ViT of {', '.join(kind for kind, _ in LAYOUTS.values())}")
        weights = renamed(tensors)
        model = build(weights, **{**details, **other})
        own = model.state_dict(prefix="" if isinstance(model, CLIP) else "image.")
        wrong = {"missing": own.keys() - weights.keys(), "left over": weights.keys() - own.keys(),
                 "of another shape": [name for name in own.keys() & weights.keys()
                                      if own[name].squeeze().shape != weights[name].squeeze().shape]}
        if any(wrong.values()):
            raise ValueError("; ".join(f"{what}: {', '.join(sorted(names)[:4])}{' ...' * (len(names) > 4)}"
                                       for what, names in wrong.items() if names))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except KeyError as error:
        raise ValueError(f"{path}: missing: {error.args[0]}") from None
    except Exception as error:                               # whatever a broken or hostile file leads to
        raise ValueError(f"{path}: {str(error).partition(chr(10))[0] or type(error).__name__}") from None
    for name, parameter in own.items():
        parameter.copy_(weights[name].reshape(parameter.shape))
    model.kind = kind
    return model.eval()


# ---- published weights: the vocabulary

@cache
def numbers():
    """Join all characters that are numbers and no letters: what other languages write as \\p{N}."""
    return "".join(c for c in map(chr, range(sys.maxunicode + 1)) if c.isnumeric() and not c.isalpha())


def bpe(path, count):
    """Read CLIP's byte-pair encoding (Sennrich et al. 2016, 1508.07909): a function of a text to its ids.

    The ids, count in all: bytes, bytes that end a word, what pairs are merged to, start and end. CLIP first
    lets ftfy mend a text: what that changes beyond NFC, as curly quotes and ligatures, gets other ids here.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    merges = [tuple(line.split()) for line in content.decode().split("\n")[1:count - 513]]
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]        # bytes that stand for themselves
    order = shown + [b for b in range(256) if b not in shown]
    letters = {b: chr(b if k < len(shown) else 256 + k - len(shown)) for k, b in enumerate(order)}
    tokens = [*letters.values(), *(letter + "</w>" for letter in letters.values()), *map("".join, merges)]
    if len(tokens) != count - 2:
        raise ValueError(f"{path} makes {len(tokens)} tokens, but the weights know {count - 2}")
    ids, rank = {token: k for k, token in enumerate(tokens)}, {pair: k for k, pair in enumerate(merges)}
    words = re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d|[^\W_{numbers()}]+|[{numbers()}]|(?:[^\w\s]|_)+", re.I)

    @cache
    def merged(word):
        parts = [letters[b] for b in word.encode()]
        parts[-1] += "</w>"
        while found := [(rank[pair], k) for k, pair in enumerate(itertools.pairwise(parts)) if pair in rank]:
            _, k = min(found)
            parts[k:k + 2] = [parts[k] + parts[k + 1]]
        return [ids[part] for part in parts]

    def encode(text):
        text = html.unescape(html.unescape(unicodedata.normalize("NFC", text))).lower()
        return [k for word in words.findall(text) for k in merged(word)]

    return encode


def read_pieces(path):
    """Read a sentencepiece vocabulary, [(piece, log-probability)], from tokenizer.json or spiece.model."""
    content, pieces, k = path.read_bytes(), [], 0
    if path.suffix == ".json":
        return [tuple(row) for row in json.loads(content)["model"]["vocab"]]
    while content[k:k + 1] == b"\n":                         # 10, size of both, 10, size, piece, 21, number
        end = k + 4 + content[k + 3]
        pieces.append((content[k + 4:end].decode(), *struct.unpack("<f", content[end + 1:end + 5])))
        k += 2 + content[k + 1]
    return pieces


def unigram(path, count):
    """Read SigLIP's vocabulary of count pieces: a function of a text, without punctuation, to its ids.

    Of all ways to cut a text into pieces the most probable is taken (Kudo 2018, 1804.10959, section 3.2), by
    the Viterbi algorithm. The text is made NFKC before, as sentencepiece does unless told otherwise.
    """
    pieces = read_pieces(path)
    if len(pieces) != count:
        raise ValueError(f"{path} has {len(pieces)} pieces, but the weights know {count}")
    scores, ids = dict(pieces), {piece: k for k, (piece, _) in enumerate(pieces)}
    longest, unknown, rare = max(map(len, ids)), ids["<unk>"], min(scores.values()) - 10

    def score(piece):
        return scores.get(piece, rare if len(piece) == 1 else -math.inf)

    def encode(text):
        text = text.lower().translate(str.maketrans("", "", string.punctuation))
        text = "".join("\u2581" + word for word in unicodedata.normalize("NFKC", text).split())
        best = [(0.0, [])]                                   # up to each end: the best score, and its ids
        for end in range(1, len(text) + 1):
            starts = range(max(0, end - longest), end)
            total, start = max((best[start][0] + score(text[start:end]), start) for start in starts)
            best.append((total, [*best[start][1], ids.get(text[start:end], unknown)]))
        found = best[-1][1]
        return [k for k, before in zip(found, [None, *found], strict=False) if not k == before == unknown]

    return encode


def tokenizer(path, clip):
    """Make a function of texts to ids (B, L) by the vocabulary beside the weights; ValueError if none is."""
    count, length, causal = clip.text.embed.num_embeddings, len(clip.text.positions), clip.text.causal
    names = ("bpe_simple_vocab_16e6.txt.gz", "merges.txt") if causal else ("spiece.model", "tokenizer.json")
    found = [file for name in names if (file := Path(path).parent / name).exists()]
    if not found:
        raise ValueError(f"{path}: texts need the vocabulary of the weights beside it, {' or '.join(names)}")
    encode = (bpe if causal else unigram)(found[0], count)
    ends = ([count - 2], count - 1, 0) if causal else ([], 1, 1)         # SigLIP pads with what ends a text
    return lambda texts: padded([encode(text) for text in texts], length, *ends)


def describe(model):
    """Say in lines what a model of load_pretrained is."""
    image, text = getattr(model, "image", model), getattr(model, "text", None)
    mean, std = (", ".join(f"{value:.3g}" for value in rgb.flatten()) for rgb in (image.mean, image.std))
    count = sum(p.numel() for p in model.parameters())
    print(f"{model.kind}: {count:,} parameters, {image.blocks[0].mlp[1]}")
    print(f"images: {image.size} px in patches of {image.stem.patch} px, mean {mean}, deviation {std}")
    if text:
        print(f"texts: {len(text.positions)} tokens of {text.embed.num_embeddings:,}")
    for name, tower in dict(image=image, text=text).items():
        if tower:
            depth, heads = len(tower.blocks), tower.blocks[0].attention.heads
            print(f"tower of the {name}: {depth} blocks of {heads} heads, width {len(tower.norm.bias)}")


def main(path=None):
    """Say what a file of weights is; without one, the shapes on the way of two images through a small ViT."""
    if path:
        return describe(load_pretrained(path))
    model = ViT(classes=45, depth=1)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name or "ViT": print(
            f"{name:26} {tuple(args[0].shape)} -> {tuple(out.shape)}"))
    model(torch.zeros(2, 3, 64, 64))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", nargs="?", help="file to describe (without: the shapes in a small ViT)")
    try:
        main(parser.parse_args().weights)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
