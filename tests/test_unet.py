"""unet.py against its formulas, and: every input changes the output, no part is without use."""
import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import data
import unet
from unet import Block, Condition, Metadata, TextCondition, UNet, timestep_embedding
from vit import TextEncoder

EVERYONE = torch.tensor([True, True, True])


def awake(**kw):
    """A small U-Net, all of whose weights have been moved, also those that start at 0."""
    torch.manual_seed(0)
    model = UNet(**{"classes": 3, "width": 16, "mults": (1, 2), "blocks": 1, **kw})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def inputs(B=2, C=3, H=16, W=16):
    return torch.randn(B, C, H, W), torch.arange(B) * 100, Condition(torch.arange(B) % 3)


# ---- the formulas

def norm(layer, x):
    """Wu & He 2018, Eq. 7: 8 groups, each to mean 0, variance 1; then channels scaled, shifted."""
    groups = x.unflatten(1, (8, -1)).flatten(2)
    centred = groups - groups.mean(2, keepdim=True)
    normed = centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()
    return normed.reshape(x.shape) * layer.weight[:, None, None] + layer.bias[:, None, None]


def conv(layer, x, stride=1):
    return F.conv2d(x, layer.weight, layer.bias, stride, padding=layer.weight.shape[-1] // 2)


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def silu(x):
    return x / (1 + (-x).exp())


def block_by_hand(block, x, emb, text=None):
    """Dhariwal & Nichol 2021: AdaGN(h, y) = y_s GroupNorm(h) + y_b; here y_s is 1 + scale.

    The tokens of a text (B, L, D) are keys and values beside the pixels: Nichol et al. 2021.
    """
    scale, shift = linear(block.scale_shift, silu(emb))[:, :, None, None].chunk(2, dim=1)
    h = conv(block.conv1, silu(norm(block.norm1, x)))
    h = conv(block.conv2, silu((1 + scale) * norm(block.norm2, h) + shift))
    x = h + (x if isinstance(block.skip, nn.Identity) else conv(block.skip, x))
    if block.attention:
        pixels = norm(block.norm3, x).flatten(2).mT
        q, k, v = linear(block.attention.qkv, pixels).chunk(3, dim=-1)
        if text is not None:
            tokens = linear(block.project_text, text)
            _, k_text, v_text = linear(block.attention.qkv, tokens).chunk(3, dim=-1)
            k, v = torch.cat([k, k_text], 1), torch.cat([v, v_text], 1)
        seen = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v                       # of one head
        x = x + linear(block.attention.out, seen).mT.view_as(x)
    return x


def unet_by_hand(model, x, t, y):
    """Ho et al. 2020, appendix B: a block on the way up also sees that of its height going down."""
    angle = t[:, None] * torch.tensor([10_000 ** (-k / 8) for k in range(8)])        # width 16
    first, _, last = model.time_embedding
    time = linear(last, silu(linear(first, torch.cat([angle.sin(), angle.cos()], 1))))
    emb = time + model.class_embedding.weight[y]
    (fine_down,), (coarse_down,) = (level["blocks"] for level in model.down)
    (coarse_up,), (fine_up,) = (level["blocks"] for level in model.up)

    h = conv(model.stem, F.pixel_unshuffle(x, model.patch))
    a = block_by_hand(fine_down, h, emb)
    b = block_by_hand(coarse_down, conv(model.down[0]["resize"], a, stride=2), emb)
    h = block_by_hand(model.mid, b, emb)
    h = block_by_hand(coarse_up, torch.cat([h, b], 1), emb)
    h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)                            # nearest
    h = block_by_hand(fine_up, torch.cat([conv(model.up[1]["resize"][1], h), a], 1), emb)
    return F.pixel_shuffle(conv(model.head[2], silu(norm(model.head[0], h))), model.patch)


@pytest.mark.parametrize("channels, heads", [(32, 1), (64, 1), (128, 2), (256, 4)])
def test_a_head_of_attention_is_64_channels_wide(channels, heads):
    assert Block(16, channels, 8, attention=True).attention.heads == heads


@pytest.mark.parametrize("attention, text", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("c_in", [16, 24])
def test_a_block_is_two_convolutions_with_adagn_then_attention(c_in, attention, text, in_float64):
    torch.manual_seed(0)
    block = Block(c_in, 16, 12, attention, text)
    x, emb, tokens = torch.randn(2, c_in, 6, 4), torch.randn(2, 12), torch.randn(2, 5, 12)
    mask = torch.tensor([True, True, True, False, False]).expand(2, -1)
    given = (x, emb, tokens, mask) if text else (x, emb)
    assert_close(block(*given), block.skip(x))                       # before training
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    by_hand = block_by_hand(block, x, emb, tokens[:, :3] if text else None)
    assert_close(block(*given), by_hand)


@pytest.mark.parametrize("patch", [1, 2])
def test_the_whole_is_blocks_down_and_up_with_skips_between_them(patch, in_float64):
    model, (x, t, cond) = awake(patch=patch), inputs()
    cond.y[1] = -1                                                   # the last row: the null class
    assert_close(model(x, t, cond), unet_by_hand(model, x, t, cond.y))


def test_a_text_is_read_up_to_its_end_and_embedded_as_the_sum_of_its_tokens():
    torch.manual_seed(0)
    module, ids = TextCondition(encoder(), 60), torch.tensor([[7, 4, 8, 0], [7, 1, 2, 8], [-1] * 4])
    tokens, mask, embedding = module(ids)
    assert mask.tolist() == [[True, True, True, False], [True] * 4, [True, False, False, False]]
    for k, end in ((0, 2), (1, 3)):
        features = linear(module.project, module.encoder(ids[k:k + 1, :end + 1]))[0]
        assert_close(tokens[k, :end + 1], features)
        assert_close(embedding[k], features.sum(0) / len(features) ** 0.5)
    assert_close(tokens[2, 0], linear(module.project, module.missing))
    assert_close(embedding[2], tokens[2, 0])
    assert module.project.weight.std() > 0.8 * 8**-0.5               # as large as of a class


def test_metadata_are_scaled_to_the_range_of_the_training_images_and_become_sinusoids():
    metadata = Metadata(3, 8, 16)
    metadata.fit(torch.tensor([[1.0, 3, math.nan], [math.nan, 1, math.nan], [1.5, 2, math.nan]]))
    seen = []
    metadata.layers = nn.Sequential(nn.Identity())
    metadata.layers.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    metadata(torch.tensor([[1.25, math.nan, 0.25]]))               # in 1 .. 1.5, 1 .. 3 and 0 .. 1
    assert_close(seen[0][0, :8], timestep_embedding(torch.tensor([500.0]), 8)[0])
    assert_close(seen[0][0, 8:16], metadata.missing[1].detach())
    assert_close(seen[0][0, 16:], timestep_embedding(torch.tensor([250.0]), 8)[0])


def test_norms_keep_the_precision_of_their_input_and_are_group_norm():
    device = data.pick_device()
    layer, x = unet.Norm(8, 16).to(device), torch.randn(2, 16, 4, 4, device=device) + 3
    with torch.autocast(device.type, torch.bfloat16):
        half = layer(x.bfloat16())                      # on a GPU, autocast would make this float32
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), layer(x), rtol=0, atol=0.05)
    assert_close(layer(x), F.group_norm(x, 8, layer.weight, layer.bias))


# ---- what follows

def without_gradient(model):
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("channels, H, W, patch", [
    (3, 16, 16, 1), (1, 8, 24, 1), (4, 16, 32, 2), (7, 32, 16, 4)])
def test_any_channels_and_sides_come_back_in_their_shape_first_as_zeros(channels, H, W, patch):
    x, t, cond = inputs(2, channels, H, W)
    assert awake(channels=channels, patch=patch)(x, t, cond).shape == x.shape
    before_training = UNet(3, channels, width=16, mults=(1, 2), blocks=1, patch=patch)
    assert not before_training(x, t, cond).any()


def test_every_parameter_gets_a_gradient():
    model, (x, t, _) = awake(blocks=2, mults=(1, 2, 2)), inputs(4)
    model(x, t, Condition(torch.tensor([0, 1, 2, -1]))).square().mean().backward()
    assert not without_gradient(model)
    for name, p in model.named_parameters():
        assert p.ndim == 1 or p.grad.flatten(1).any(1).all(), name              # scale and shift


def test_sizes_that_do_not_fit_are_refused():
    for sides in (dict(H=18), dict(W=18)):
        with pytest.raises(AssertionError, match="divisible by 4"):
            awake(mults=(1, 2, 2))(*inputs(**sides))


def test_the_demo_prints_the_shapes_on_the_way_through(capsys):
    unet.main()
    out = capsys.readouterr().out
    assert "class_embedding  (2,) -> (2, 256)" in out
    assert "mid              (2, 256, 16, 16) -> (2, 256, 16, 16)" in out
    assert out.endswith("head             (2, 64, 64, 64) -> (2, 3, 64, 64)\n")


# ---- conditions

def encoder():
    return TextEncoder(9, length=12, dim=8, depth=1, heads=2)


def conditioned():
    """A U-Net conditioned on everything, and inputs of 3 images for it."""
    model, (x, t, cond) = awake(control=2, metadata=3, text=encoder()), inputs(3)
    cond.text = torch.tensor([[7, 1, 2, 3, 8], [7, 4, 8, 0, 0], [7, 1, 8, 0, 0]])
    model.metadata.fit(torch.tensor([[0.0, -5, 10], [1, 5, 20]]))
    cond.metadata = torch.rand(3, 3) * torch.tensor([1.0, 10, 10]) + torch.tensor([0.0, -5, 10])
    cond.control = torch.rand(3, 2, 16, 16)
    return model, x, t, cond


@pytest.mark.parametrize("part", ["y", "metadata", "control", "text"])
def test_each_part_of_a_condition_changes_the_output_and_once_dropped_leaves_no_trace(part):
    model, x, t, cond = conditioned()
    base, value = model(x, t, cond), getattr(cond, part)
    changed = dict(y=(value + 1) % 3, text=torch.where(value == 8, 8, (value + 2) % 7))
    other = replace(cond, **{part: changed.get(part, 0.5 * value + 0.2)})
    assert ((model(x, t, other) - base).abs().amax((1, 2, 3)) > 1e-4).all()
    assert_close(model(x, t, other.drop(EVERYONE)), model(x, t, cond.drop(EVERYONE)))
    alone = replace(cond, **{part: getattr(cond.drop(EVERYONE), part)})
    assert ((model(x, t, alone) - base).abs().amax((1, 2, 3)) > 1e-4).all()


@pytest.mark.parametrize("L", [1, 5, 9])
def test_a_missing_text_has_no_length_and_a_text_may_be_padded(L):
    model, x, t, cond = conditioned()
    wide = F.pad(cond.text, (0, 7))
    base = model(x, t, cond)
    assert_close(model(x, t, replace(cond, text=wide)), base)
    assert_close(model(x, t, replace(cond, text=wide[1:2].expand(3, -1)))[1], base[1])
    wide[1, 3:] = 5                                                  # in place of padding
    assert_close(model(x, t, replace(cond, text=wide)), base)
    dropped = replace(cond, text=cond.drop(EVERYONE).text)
    assert_close(model(x, t, dropped), model(x, t, replace(cond, text=torch.full((3, L), -1))))


def test_a_text_acts_through_every_attention_and_through_the_embedding_alone():
    model, x, t, cond = conditioned()
    model(x, t, cond).square().mean().backward()
    assert without_gradient(model) == ["metadata.missing", "text.missing"]      # nothing is missing
    into_attention = [p for name, p in model.named_parameters() if "project_text.weight" in name]
    assert len(into_attention) == 3
    with torch.no_grad():
        for p in into_attention:
            p.zero_()
    other = replace(cond, text=torch.where((cond.text > 0) & (cond.text < 7), 5, cond.text))
    assert ((model(x, t, other) - model(x, t, cond)).abs().amax((1, 2, 3)) > 1e-4).all()


def test_each_metadata_value_may_be_missing_alone_and_a_control_image_is_then_not_grey():
    model, x, t, cond = conditioned()
    conditions = [cond, *(replace(cond, control=k * cond.control) for k in (0, math.nan))]
    for k in range(3):
        absent = torch.arange(3) == k
        conditions.append(replace(cond, metadata=cond.metadata.masked_fill(absent, math.nan)))
    outputs = [model(x, t, condition) for condition in conditions]
    for a, b in combinations(outputs, 2):
        assert (a - b).abs().max() > 1e-4 and b.isfinite().all()


def test_every_part_is_indexed_dropped_and_followed_by_the_null_condition_alike():
    _, _, _, cond = conditioned()
    dropped, both = cond.drop(torch.tensor([False, True, False])), cond.and_null()
    for name in ("y", "metadata", "control", "text"):
        value, part, doubled = (getattr(z, name) for z in (cond, dropped, both))
        gone = torch.isnan if value.is_floating_point() else torch.tensor(-1).eq
        for index in (slice(1, 3), torch.tensor([1, 2])):
            assert torch.equal(getattr(cond[index], name), value[1:])
        assert gone(part[1]).all() and torch.equal(part[[0, 2]], value[[0, 2]])
        assert torch.equal(doubled[:3], value) and gone(doubled[3:]).all() and len(doubled) == 6
    assert Condition(cond.y).and_null().control is None


def test_drop_each_drops_each_part_and_each_metadata_value_by_itself():
    y, text = torch.zeros(4000, dtype=torch.long), torch.zeros(4000, 2, dtype=torch.long)
    cond = Condition(y, torch.zeros(4000, 3), torch.zeros(4000, 2, 1, 1), text)
    dropped, again = (cond.drop_each(0.2, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(dropped.y, again.y)
    gone = torch.cat([(dropped.y < 0)[:, None], dropped.metadata.isnan(),
                      dropped.control.isnan().flatten(1), dropped.text < 0], 1).double()
    assert_close(gone.mean(0), torch.full((8,), 0.2).double(), atol=0.03, rtol=0)
    together = torch.corrcoef(gone.T)
    for a, b in ((4, 5), (6, 7)):                   # channels of a control image, tokens of a text
        assert together[a, b] == pytest.approx(1)
        together[a, b] = together[b, a] = 0
    assert (together - torch.eye(8)).abs().max() < 0.06
