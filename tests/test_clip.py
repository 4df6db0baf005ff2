"""CLIP against explicit formulas; weights and vocabularies in the layouts of their publishers, made small."""
import gzip
import itertools
import json
import math
import os
import pickle
import runpy
import struct
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F
from test_vit import awake, rand64
from torch import nn
from torch.testing import assert_close

import vit
from train_cls import Tuned
from vit import CLIP, Attention, Probe, QuickGELU, Text, Tower, load_pretrained

GREY = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def tower(**kw):
    return Tower(**{"classes": 6, "size": 8, "patch": 4, "dim": 16, "depth": 2, "heads": 2, **GREY, **kw})


def model(sigmoid=False, **kw):
    image = tower(token=not sigmoid, classes=0 if sigmoid else 6, **kw)
    return awake(CLIP(image, Text(20, 7, 16, 2, 2, causal=not sigmoid), sigmoid))


IDS = torch.tensor([[17, 3, 4, 19, 0, 0, 0], [17, 5, 6, 7, 8, 9, 19], [17, 19, 0, 0, 0, 0, 0]])


# ---- the formulas

def test_no_token_of_a_causal_tower_sees_a_later_one():
    for causal in (True, False):
        text, changed = awake(Text(20, 7, 16, 2, 2, causal=causal)), IDS.clone()
        changed[:, 4] = 11
        before, after = text(IDS), text(changed)
        assert torch.equal(before[:, :4], after[:, :4]) is causal
        assert (before[:, 4:] - after[:, 4:]).abs().amax(2).gt(1e-6).all()


def test_attention_to_more_tokens_leaves_out_those_that_do_not_count():
    attention, x, more = awake(Attention(12, 3)), rand64(2, 3, 12), rand64(2, 4, 12) + 1
    everything = torch.cat([x, more], 1)
    assert_close(attention(x, more), attention(everything)[:, :3])
    count = torch.tensor([[1, 0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 0, 1, 1]]).bool()
    q, k, v = attention.qkv(everything).view(2, 7, 3, 3, 4).permute(2, 0, 3, 1, 4)
    for b in range(2):
        seen = [(q[b, :, :3] @ k[b][:, count[b]].mT / 2).softmax(-1) @ v[b][:, count[b]]]
        assert_close(attention(x, more, count)[b], attention.out(seen[0].transpose(0, 1).reshape(3, 12)))


def test_a_probe_attends_to_the_tokens_and_not_to_itself():
    probe, x = awake(Probe(16, 2)), rand64(3, 5, 16)
    a, query = probe.attention, probe.token.expand(3, 1, 16).transpose(0, 1)
    y, _ = F.multi_head_attention_forward(
        query, x.transpose(0, 1), x.transpose(0, 1), 16, 2, a.qkv.weight, a.qkv.bias, None, None, False, 0.0,
        a.out.weight, a.out.bias)
    h = F.layer_norm(y[0], (16,), probe.norm2.weight, probe.norm2.bias)
    up, _, down = probe.mlp
    assert_close(probe(x), y[0] + F.linear(F.gelu(F.linear(h, up.weight, up.bias)), down.weight, down.bias))


def test_quick_gelu_is_nearly_gelu():
    x = torch.linspace(-4, 4, 99)
    assert_close(QuickGELU()(x), x / (1 + torch.exp(-1.702 * x)))
    assert 0.01 < (QuickGELU()(x) - F.gelu(x)).abs().max() < 0.03


def test_contrastive_finds_the_text_of_each_image_and_the_image_of_each_text():
    s, B = rand64(4, 4), 4
    texts = sum(-math.log(s[i, i].exp() / s[i].exp().sum()) for i in range(B)) / B
    images = sum(-math.log(s[i, i].exp() / s[:, i].exp().sum()) for i in range(B)) / B
    assert vit.contrastive(s).item() == pytest.approx((texts + images) / 2)


def test_pairwise_judges_every_pair_alone():
    s, B = rand64(4, 4), 4
    loss = sum(math.log(1 + math.exp(-s[i, j] if i == j else s[i, j])) for i in range(B) for j in range(B))
    assert vit.pairwise(s).item() == pytest.approx(loss / B)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_scores_are_cosines_of_where_image_and_text_end(sigmoid):
    clip, x = model(sigmoid), rand64(3, 3, 8, 8)
    tokens, ends = clip.text(IDS), [6, 6, 6] if sigmoid else [3, 6, 1]
    texts = torch.stack([clip.project(tokens[b, end]) for b, end in enumerate(ends)])
    images = clip.image(x)
    cosines = torch.stack([torch.stack([i @ t / i.norm() / t.norm() for t in texts]) for i in images])
    assert_close(clip(x, IDS), cosines * clip.log_scale.exp() + clip.bias)


@pytest.mark.parametrize("sigmoid, loss, first", [
    (False, vit.contrastive, math.log(3)), (True, vit.pairwise, 10)])
def test_training_starts_from_chance_and_reaches_every_parameter(sigmoid, loss, first):
    torch.manual_seed(0)
    text = Text(20, 7, 16, 2, 2, causal=not sigmoid)
    fresh = CLIP(tower(token=not sigmoid, classes=0 if sigmoid else 6), text, sigmoid)
    assert loss(fresh(torch.randn(3, 3, 8, 8), IDS)).item() == pytest.approx(first, rel=0.5)
    clip = model(sigmoid)
    loss(clip(rand64(3, 3, 8, 8), IDS)).backward()
    assert not [name for name, p in clip.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_scores_begin_as_sharp_as_their_papers_say():
    clip = CLIP(tower(), Text(20, 7, 16, 1, 2))                          # Radford et al., section 2.5
    siglip = CLIP(tower(token=False, classes=0), Text(20, 7, 16, 1, 2, causal=False), sigmoid=True)
    assert clip.log_scale.exp().item() == pytest.approx(1 / 0.07) and clip.bias == 0.0
    assert (siglip.log_scale.exp().item(), siglip.bias.item()) == pytest.approx((10, -10))       # Zhai, 3.2


def test_there_are_18_ways_to_ask_for_a_scene():
    assert len(set(vit.TEMPLATES)) == 18
    assert {"satellite imagery of {}.", "aerial view of the {}.", "aerial photo of a {}."} < {*vit.TEMPLATES}


def test_zero_shot_is_the_mean_of_unit_vectors_made_a_unit_vector():
    clip, templates = model(), ["a {}.", "of {}", "the {} !"]

    def encode(texts):
        return vit.padded([[1 + len(word) for word in text.split(" ")] for text in texts], 7, [17], 19, 0)

    rows = []
    for name in ("sea ice", "runway"):
        units = [clip.encode_text(encode([template.replace("{}", name)]))[0] for template in templates]
        mean = sum(unit / unit.norm() for unit in units) / 3
        rows.append(mean / mean.norm())
    assert_close(vit.zero_shot(clip, encode, ["sea_ice", "runway"], templates), torch.stack(rows).detach())
    assert len(encode(["x y"] * 18)) == 18 and vit.zero_shot(clip, encode, ["a"]).shape == (1, 6)


# ---- small weights in the layouts of the publishers, and what their models make of them

D, T, E, SIDE, PATCH, WORDS, LENGTH = 128, 64, 24, 3, 4, 40, 6           # two heads in the image tower


class File(dict):
    """Tensors by name, drawn when they are put in."""

    def draw(self, name, *shape):
        self[name] = 0.1 * torch.randn(*shape) + ("norm" in name or "ln_" in name) * name.endswith("weight")

    def affine(self, name, *shape):
        self.draw(f"{name}.weight", *shape)
        self.draw(f"{name}.bias", shape[0])

    def linear(self, name, x):
        return F.linear(x, self[f"{name}.weight"], self.get(f"{name}.bias"))

    def norm(self, name, x, eps):
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], eps)


def attend(q, k, v, causal=False):
    """By hand, heads of 64."""
    q, k, v = (z.unflatten(-1, (-1, 64)).transpose(1, 2) for z in (q, k, v))
    scores = q @ k.mT / 8
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


STYLES = {         # blocks; norm, qkv, out, norm, up, down
    "openai": ("transformer.resblocks.", "ln_1", "attn.in_proj_", "attn.out_proj", "ln_2", "mlp.c_fc",
               "mlp.c_proj"),
    "hf": ("encoder.layers.", "layer_norm1", "self_attn.", "self_attn.out_proj", "layer_norm2", "mlp.fc1",
           "mlp.fc2"),
    "timm": ("blocks.", "norm1", "attn.qkv.", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}


def draw_blocks(s, prefix, style, dim, depth=2):
    blocks, norm1, qkv, out, norm2, up, down = STYLES[style]
    for p in (f"{prefix}{blocks}{i}." for i in range(depth)):
        if style == "hf":
            for part in "qkv":
                s.affine(f"{p}{qkv}{part}_proj", dim, dim)
        else:
            s.draw(f"{p}{qkv}weight", 3 * dim, dim)
            s.draw(f"{p}{qkv}bias", 3 * dim)
        for name, *shape in ((norm1, dim), (norm2, dim), (out, dim, dim), (up, 4 * dim, dim),
                             (down, dim, 4 * dim)):
            s.affine(p + name, *shape)


def run_blocks(s, prefix, style, x, gelu, eps, causal=False):
    blocks, norm1, qkv, out, norm2, up, down = STYLES[style]
    for i in itertools.count():
        p = f"{prefix}{blocks}{i}."
        if f"{p}{norm1}.weight" not in s:
            return x
        h = s.norm(p + norm1, x, eps)
        if style == "hf":
            parts = [s.linear(f"{p}{qkv}{part}_proj", h) for part in "qkv"]
        else:
            parts = F.linear(h, s[f"{p}{qkv}weight"], s[f"{p}{qkv}bias"]).chunk(3, -1)
        x = x + s.linear(p + out, attend(*parts, causal))
        x = x + s.linear(p + down, gelu(s.linear(p + up, s.norm(p + norm2, x, eps))))


def patches(s, name, x):
    return F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), stride=PATCH).flatten(2).transpose(1, 2)


def classed(token, x):
    return torch.cat([token.view(1, 1, -1).expand(len(x), 1, -1), x], 1)


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def ends(tokens, ids):
    return tokens[torch.arange(len(ids)), ids.argmax(1)]


def quick(x):
    return x * torch.sigmoid(1.702 * x)


def openai():
    s = File(logit_scale=torch.tensor(2.0))
    s.draw("visual.conv1.weight", D, 3, PATCH, PATCH)
    for name, *shape in (("visual.class_embedding", D), ("visual.positional_embedding", SIDE**2 + 1, D),
                         ("visual.proj", D, E), ("positional_embedding", LENGTH, T),
                         ("token_embedding.weight", WORDS, T), ("text_projection", T, E)):
        s.draw(name, *shape)
    for name, dim in (("visual.ln_pre", D), ("visual.ln_post", D), ("ln_final", T)):
        s.affine(name, dim)
    draw_blocks(s, "visual.", "openai", D)
    draw_blocks(s, "", "openai", T, 1)
    return s


def openai_by_hand(s, x, ids, gelu):
    x = classed(s["visual.class_embedding"], patches(s, "visual.conv1", x)) + s["visual.positional_embedding"]
    x = run_blocks(s, "visual.", "openai", s.norm("visual.ln_pre", x, 1e-5), gelu, 1e-5)
    image = s.norm("visual.ln_post", x[:, 0], 1e-5) @ s["visual.proj"]
    t = s["token_embedding.weight"][ids] + s["positional_embedding"]
    t = s.norm("ln_final", run_blocks(s, "", "openai", t, gelu, 1e-5, causal=True), 1e-5)
    return s["logit_scale"].exp() * unit(image) @ unit(ends(t, ids) @ s["text_projection"]).T


def huggingface(sigmoid=False):
    s, K = File(logit_scale=torch.full((1,) * sigmoid, 2.0)), T if sigmoid else E
    s.draw("vision_model.embeddings.patch_embedding.weight", D if not sigmoid else T, 3, PATCH, PATCH)
    width = T if sigmoid else D
    s.draw("vision_model.embeddings.position_embedding.weight", SIDE**2 + (not sigmoid), width)
    s.draw("text_model.embeddings.token_embedding.weight", WORDS, T)
    s.draw("text_model.embeddings.position_embedding.weight", LENGTH, T)
    s["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]         # as older versions write it
    s.affine("vision_model.post_layernorm", width)
    s.affine("text_model.final_layer_norm", T)
    draw_blocks(s, "vision_model.", "hf", width)
    draw_blocks(s, "text_model.", "hf", T, 1)
    if not sigmoid:
        s.draw("vision_model.embeddings.class_embedding", D)
        s.affine("vision_model.pre_layrnorm", D)
        s.draw("visual_projection.weight", K, D)
        s.draw("text_projection.weight", K, T)
        return s
    s["logit_bias"] = torch.tensor([-3.0])
    s.draw("vision_model.embeddings.patch_embedding.bias", T)
    s.draw("vision_model.head.probe", 1, 1, T)
    s.draw("vision_model.head.attention.in_proj_weight", 3 * T, T)
    s.draw("vision_model.head.attention.in_proj_bias", 3 * T)
    for name, *shape in (("vision_model.head.attention.out_proj", T, T), ("vision_model.head.layernorm", T),
                         ("vision_model.head.mlp.fc1", 4 * T, T), ("vision_model.head.mlp.fc2", T, 4 * T),
                         ("text_model.head", T, T)):
        s.affine(name, *shape)
    return s


def clip_by_hand(s, x, ids):
    p = "vision_model.embeddings."
    x = classed(s[p + "class_embedding"], patches(s, p + "patch_embedding", x))
    x = x + s[p + "position_embedding.weight"]
    x = run_blocks(s, "vision_model.", "hf", s.norm("vision_model.pre_layrnorm", x, 1e-5), quick, 1e-5)
    image = s.linear("visual_projection", s.norm("vision_model.post_layernorm", x[:, 0], 1e-5))
    p = "text_model.embeddings."
    t = s[p + "token_embedding.weight"][ids] + s[p + "position_embedding.weight"]
    t = run_blocks(s, "text_model.", "hf", t, quick, 1e-5, causal=True)
    t = s.norm("text_model.final_layer_norm", t, 1e-5)
    return s["logit_scale"].exp() * unit(image) @ unit(s.linear("text_projection", ends(t, ids))).T


def siglip_by_hand(s, x, ids):
    def gelu(x):
        return F.gelu(x, approximate="tanh")
    p, h = "vision_model.embeddings.", "vision_model.head."
    x = patches(s, p + "patch_embedding", x) + s[p + "position_embedding.weight"]
    x = s.norm("vision_model.post_layernorm", run_blocks(s, "vision_model.", "hf", x, gelu, 1e-6), 1e-6)
    weights, biases = (s[f"{h}attention.in_proj_{kind}"].chunk(3) for kind in ("weight", "bias"))
    q, k, v = (F.linear(z, w, b) for z, w, b in
               zip((s[h + "probe"].expand(len(x), 1, T), x, x), weights, biases, strict=True))
    x = s.linear(h + "attention.out_proj", attend(q, k, v))
    image = x + s.linear(h + "mlp.fc2", gelu(s.linear(h + "mlp.fc1", s.norm(h + "layernorm", x, 1e-6))))
    p = "text_model.embeddings."
    t = s[p + "token_embedding.weight"][ids] + s[p + "position_embedding.weight"]
    t = s.norm("text_model.final_layer_norm", run_blocks(s, "text_model.", "hf", t, gelu, 1e-6), 1e-6)
    text = s.linear("text_model.head", t[:, -1])
    return s["logit_scale"].exp() * unit(image[:, 0]) @ unit(text).T + s["logit_bias"]


def timm():
    s = File()
    s.affine("patch_embed.proj", D, 3, PATCH, PATCH)
    s.draw("cls_token", 1, 1, D)
    s.draw("pos_embed", 1, SIDE**2 + 1, D)
    draw_blocks(s, "", "timm", D)
    s.affine("norm", D)
    s.affine("head", 1, D)                                               # one class: an axis of 1 that counts
    return s


def timm_by_hand(s, x, ids=None):
    x = classed(s["cls_token"], patches(s, "patch_embed.proj", x)) + s["pos_embed"]
    return s.linear("head", s.norm("norm", run_blocks(s, "", "timm", x, F.gelu, 1e-6), 1e-6)[:, 0])


def safetensors(tensors, path):
    """Write tensors as the library does: the size of a header, the header, the numbers."""
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, parts, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        offsets = [at, at + len(raw)]
        header[name] = dict(dtype=kinds[tensor.dtype], shape=list(tensor.shape), data_offsets=offsets)
        parts.append(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def program(tensors):
    """Nest tensors in modules by their names, and compile them."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *parents, last = name.split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        place.register_buffer(last, tensor) if tensor.ndim == 0 else place.register_parameter(
            last, nn.Parameter(tensor))
    return torch.jit.script(root)


def script(tensors, path):
    sizes = dict(input_resolution=12, context_length=LENGTH, vocab_size=WORDS)
    more = {name: torch.tensor(size) for name, size in sizes.items()}
    more["transformer.resblocks.0.attn_mask"] = torch.ones(2, 2)
    program(tensors | more).save(str(path))


def checkpoint(tensors, path):
    """What a training of open_clip leaves behind."""
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}
    weights = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": weights, "optimizer": optimizer}, path)


def old(tensors, path):
    torch.save(dict(tensors), path, _use_new_zipfile_serialization=False)


def saved(tensors, path):
    torch.save(dict(tensors), path)


OPENAI_RGB = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF_RGB = (0.5,) * 3, (0.5,) * 3
CASES = [
    ("OpenAI CLIP", openai, lambda *a: openai_by_hand(*a, quick), OPENAI_RGB, script, "a.pt"),
    ("open_clip CLIP", openai, lambda *a: openai_by_hand(*a, F.gelu), OPENAI_RGB, saved, "a.pt"),
    ("open_clip CLIP", openai, lambda *a: openai_by_hand(*a, F.gelu), OPENAI_RGB, checkpoint, "a.pt"),
    ("Hugging Face CLIP", huggingface, clip_by_hand, OPENAI_RGB, safetensors, "model.safetensors"),
    ("SigLIP", lambda: huggingface(True), siglip_by_hand, HALF_RGB, safetensors, "model.safetensors"),
    ("SigLIP", lambda: huggingface(True), siglip_by_hand, HALF_RGB, saved, "pytorch_model.bin"),
    ("timm ViT", timm, timm_by_hand, HALF_RGB, old, "vit.pth")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[4].__name__}")
def test_weights_of_every_layout_give_what_their_publishers_model_gives(case, tmp_path):
    kind, make, by_hand, rgb, write, name = case
    torch.manual_seed(0)
    tensors = make()
    write(tensors, tmp_path / name)
    found = load_pretrained(tmp_path / name)
    x, ids = torch.rand(3, 3, 12, 12), torch.randint(WORDS, (3, LENGTH))
    assert found.kind == kind and not found.training
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in rgb)
    image = (2 * x - 1,) if kind == "timm ViT" else (2 * x - 1, ids)
    assert_close(found(*image), by_hand(tensors, (x - mean) / std, ids), rtol=1e-4, atol=1e-5)
    count = sum(t.numel() for name, t in tensors.items() if "position_ids" not in name)
    assert sum(p.numel() for p in found.parameters()) == count


def test_what_no_tensor_tells_can_be_told(tmp_path):
    torch.manual_seed(0)
    tensors, x, ids = openai(), torch.rand(2, 3, 12, 12), torch.randint(WORDS, (2, LENGTH))
    saved(tensors, tmp_path / "a.pt")
    found = load_pretrained(tmp_path / "a.pt", gelu=QuickGELU, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert_close(found(2 * x - 1, ids), openai_by_hand(tensors, x, ids, quick), rtol=1e-4, atol=1e-5)


def test_weights_without_a_head_give_features(tmp_path):
    tensors, x = timm(), torch.rand(2, 3, 12, 12)
    saved({"model": {n: t for n, t in tensors.items() if "head" not in n}}, tmp_path / "mae.pth")
    found = load_pretrained(tmp_path / "mae.pth")
    assert_close(tensors.linear("head", found(x)), timm_by_hand(tensors, x), rtol=1e-4, atol=1e-5)
    assert torch.equal(found(x), found.features(x)) and found.size == 12
    tuned = Tuned(found, None, 12, ["river", "forest"])
    assert torch.equal(tuned.features(x), found(x)) and tuned(x).shape == (2, 2)


@pytest.mark.parametrize("dim, heads", [(192, 3), (768, 12), (1280, 16)])
def test_heads_are_64_wide_but_for_the_huge_tower(dim, heads):
    shapes = {"norm.weight": [dim], "blocks.0.norm1.weight": [dim], "stem.embed.weight": [dim, 12],
              "token": [1, dim], "positions": [5, dim]}
    weights = {f"image.{name}": torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    built = vit.build(weights, **GREY)
    assert built.blocks[0].attention.heads == heads and len(built.blocks) == 1 and built.size == 4


def test_half_precision_is_read_as_float32(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        tensors = {name: tensor.to(dtype) for name, tensor in timm().items()}
        safetensors(tensors, tmp_path / "a.safetensors")
        found = load_pretrained(tmp_path / "a.safetensors")
        assert found.head.weight.dtype == torch.float32
        assert torch.equal(found.head.weight, tensors["head.weight"].float())


def test_views_of_one_storage_are_read_as_they_are(tmp_path):
    tensors, store = timm(), torch.randn(3 * D, 2 * D)
    tensors |= {"blocks.0.attn.qkv.weight": store[:, ::2], "blocks.1.attn.proj.weight": store[D:2 * D, D:].T}
    saved(tensors, tmp_path / "a.pt")
    found = load_pretrained(tmp_path / "a.pt")
    assert torch.equal(found.blocks[0].attention.qkv.weight, store[:, ::2])
    assert torch.equal(found.blocks[1].attention.out.weight, store[D:2 * D, D:].T)


def refusal(path):
    with pytest.raises(ValueError) as caught:
        load_pretrained(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path):
    path = tmp_path / "a.pt"

    def said(change):
        tensors = openai()
        change(tensors)
        saved(tensors, path)
        return refusal(path)

    last = "visual.transformer.resblocks.1.ln_2.bias"
    assert "missing: image.blocks.1.norm2.bias" in said(lambda s: s.pop(last))
    assert "missing: text.norm.weight" in said(lambda s: s.pop("ln_final.weight"))
    assert "left over: image.fc_norm.bias" in said(lambda s: s.update({"visual.fc_norm.bias": torch.ones(D)}))
    wrong = {"visual.transformer.resblocks.0.mlp.c_fc.bias": torch.zeros(D), "new": torch.zeros(2)}
    told = "left over: new; of another shape: image.blocks.0.mlp.0.bias"
    assert said(lambda s: s.update(wrong)).endswith(told)
    twice = {"visual_projection.weight": torch.zeros(E, D)}              # as in another layout
    assert said(lambda s: s.update(twice)).endswith("two tensors are image.head.weight")
    many = {f"visual.{k}": torch.zeros(1) for k in range(9)}
    assert said(lambda s: s.update(many)).endswith("left over: image.0, image.1, image.2, image.3 ...")
    assert "no ViT of OpenAI CLIP, open_clip CLIP" in said(lambda s: s.pop("visual.class_embedding"))


def test_what_is_no_file_of_weights_is_refused_in_one_line(tmp_path):
    for name, content in (("a.pt", b"hello"), ("b.safetensors", b"\x05\0\0\0\0\0\0\0{}{}{"), ("c.pt", b"")):
        (tmp_path / name).write_bytes(content)
        refusal(tmp_path / name)
    refusal(tmp_path / "absent.pt")
    torch.save(torch.zeros(3), tmp_path / "bare.pt")
    refusal(tmp_path / "bare.pt")
    saved(timm(), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:9000])
    refusal(tmp_path / "cut.pt")


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_is_not_run(tmp_path, new):
    trace, path = tmp_path / "trace", tmp_path / "a.pt"
    torch.save({**timm(), "evil": Evil(trace)}, path, _use_new_zipfile_serialization=new)
    load_pretrained(path) if new else refusal(path)                      # in the new format it is a Stub
    assert not trace.exists()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Evil(trace)))
    refusal(path)
    assert not trace.exists()
    os.system(f"touch {trace}")
    assert trace.exists()


def test_a_file_of_weights_is_described(tmp_path, capsys):
    script(openai(), tmp_path / "a.pt")
    vit.main(tmp_path / "a.pt")
    said = capsys.readouterr().out.splitlines()
    count = sum(t.numel() for t in openai().values())
    assert said == [f"OpenAI CLIP: {count:,} parameters, QuickGELU()",
                    "images: 12 px in patches of 4 px, mean 0.481, 0.458, 0.408, "
                    "deviation 0.269, 0.261, 0.276",
                    "texts: 6 tokens of 40", "tower of the image: 2 blocks of 2 heads, width 128",
                    "tower of the text: 1 blocks of 1 heads, width 64"]


# ---- vocabularies

def words(ids):
    """Undo a byte-pair encoding without merges: the words."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = shown + [b for b in range(256) if b not in shown]
    found, word = [], []
    for k in ids:
        word.append(order[k % 256])
        if k >= 256:
            found.append(bytes(word).decode())
            word = []
    return found


@pytest.fixture(scope="module")
def bytes_only(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "merges.txt"
    path.write_text("#version: 0.2\n")
    return vit.bpe(path, 514)


@pytest.mark.parametrize("text, expected", [
    ("A photo of a River.", "a photo of a river ."), ("don't WE'LL o'clock", "don 't we 'll o ' clock"),
    ("3.14 x2", "3 . 1 4 x 2"), ("tennis_court", "tennis _ court"), ("\u00c9t\u00e9", "\u00e9t\u00e9"),
    ("cafe\u0301", "caf\u00e9"), ("&amp;lt; &quot;a&quot;", '< " a "'), (" a\n\tb\u00a0c ", "a b c"),
    ("", ""),
    ("x\u00b2\u00bd\u2167\u4e00\u4e8c", "x \u00b2 \u00bd \u2177 \u4e00\u4e8c"),
    ("\U0001f680!? 'S", "\U0001f680!? 's"), ("it'\u017f", "it '\u017f")])
def test_text_is_cut_into_words_digits_and_signs(bytes_only, text, expected):
    assert words(bytes_only(text)) == expected.split(" ") * bool(expected)


def test_pairs_are_merged_in_the_order_of_the_file(tmp_path):
    merges = ["t h", "th e</w>", "a a", "e r", "i n", "in g</w>", "th er", "aa a</w>", "o p", "n o"]
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress("\n".join(["version", *merges, "x y"]).encode()))
    encode = vit.bpe(path, 514 + len(merges))

    def ids(*tokens):
        letters = [chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]]
        known = {c: k for k, c in enumerate(letters)} | {c + "</w>": 256 + k for k, c in enumerate(letters)}
        known |= {pair.replace(" ", ""): 512 + k for k, pair in enumerate(merges)}
        return [known[token] for token in tokens]

    assert encode("the") == ids("the</w>") and encode("then") == ids("th", "e", "n</w>")
    assert encode("thering") == ids("ther", "ing</w>") and encode("ther") == ids("th", "e", "r</w>")
    assert encode("aaa aaaa") == ids("aaa</w>", "aa", "a", "a</w>")
    assert encode("nops") == ids("n", "op", "s</w>")                   # o p stands before n o in the file
    assert encode("xy") == ids("x", "y</w>")                            # a merge that the weights do not know
    with pytest.raises(ValueError, match="makes 523 tokens, but the weights know 598"):
        vit.bpe(path, 600)


PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0), ("\u2581a", -2.0), ("b", -4.0),
          ("c", -4.0), ("bc", -5.0), ("\u2581ab", -3.5), ("a", -4.0), ("abc", -9.5), ("1", -4.0),
          ("vw", -9.0)]


def protobuf(pieces):
    """Write a sentencepiece model: per piece its text, score and kind; then the settings of the trainer."""
    found = b""
    for piece, score in pieces:
        text = piece.encode()
        body = b"\n" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score) + b"\x18\x01"
        found += b"\n" + bytes([len(body)]) + body
    return found + b"\x12\x02\x08\x01"


@pytest.fixture(params=["tokenizer.json", "spiece.model"])
def pieces(request, tmp_path):
    path = tmp_path / request.param
    path.write_bytes(protobuf(PIECES) if path.suffix == ".model" else
                     json.dumps(dict(model=dict(type="Unigram", vocab=PIECES))).encode())
    return path


@pytest.mark.parametrize("text, expected", [
    ("abc", "\u2581a bc"), ("AB. c", "\u2581ab \u2581 c"), ("a?!", "\u2581a"), ("", ""),
    (" b  b ", "\u2581 b \u2581 b"), ("axyzb", "\u2581a <unk> b"), ("avwv", "\u2581a vw <unk>"),
    ("\uff41\u00b9", "\u2581a 1")])
def test_text_is_cut_into_the_most_probable_pieces(pieces, text, expected):
    names = [name for name, _ in PIECES]
    assert vit.unigram(pieces, 13)(text) == [names.index(piece) for piece in expected.split()]


def test_every_way_to_cut_is_weighed(pieces):
    score, names = dict(PIECES), [name for name, _ in PIECES]
    encode = vit.unigram(pieces, 13)
    for text in map("".join, itertools.product("abc", repeat=5)):
        ways = []
        for cuts in itertools.product([0, 1], repeat=5):
            at = [0, *(k + 1 for k in range(5) if cuts[k]), 6]
            parts = [("\u2581" + text)[i:j] for i, j in itertools.pairwise(at)]
            if all(part in score for part in parts):
                ways.append(sum(score[part] for part in parts))
        assert sum(score[names[k]] for k in encode(text)) == pytest.approx(max(ways))


def test_a_vocabulary_of_another_size_is_refused(pieces):
    with pytest.raises(ValueError, match="has 13 pieces, but the weights know 14"):
        vit.unigram(pieces, 14)


def fake(count, length, causal):
    return CLIP(tower(), Text(count, length, 16, 1, 2, causal=causal))


def test_the_vocabulary_lies_beside_the_weights(tmp_path, bytes_only):
    clip = fake(514, 5, True)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    encode = vit.tokenizer(tmp_path / "a.pt", clip)
    short, long = [512, *bytes_only("b"), 513, 0, 0], [512, *bytes_only("abcdef")[:3], 513]
    assert encode(["b", "abcdef"]).tolist() == [short, long]
    assert clip.encode_text(encode(["b"])).shape == (1, 6)


def test_siglip_ends_a_text_and_pads_it_with_the_same_token(pieces):
    encode = vit.tokenizer(pieces.parent / "a.pt", fake(13, 4, False))
    assert encode(["a", "bbbbb"]).tolist() == [[4, 1, 1, 1], [3, 5, 5, 1]]


def test_without_a_vocabulary_it_is_told_what_is_needed(tmp_path):
    for causal, needed in ((True, "16e6.txt.gz or merges.txt"), (False, "spiece.model or tokenizer.json")):
        with pytest.raises(ValueError, match=needed):
            vit.tokenizer(tmp_path / "a.pt", fake(514, 5, causal))


@pytest.mark.parametrize("given, said", (
    (["x.pt"], "x.pt: No such file or directory\n"),
    (["x.pt", "y.pt"], "usage: vit.py [-h] [weights]\nvit.py: error: unrecognized arguments: y.pt\n")))
def test_what_is_wrong_with_the_file_asked_for_is_told_with_exit_code_2(capsys, monkeypatch, given, said):
    monkeypatch.setattr(sys, "argv", ["vit.py", *given])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(vit.__file__, run_name="__main__")
    assert error.value.code == 2 and capsys.readouterr().err == said
