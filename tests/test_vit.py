"""vit.py against explicit formulas, and its invariants."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import vit
from vit import Attention, Block, Convolutions, Patches, ViT, sincos_positions


def awake(module, scale=0.3):
    """The module in float64, all its weights moved, also those that start at 0 or 1: as after training."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p))
    return module.double()


def small(**kw):
    return awake(ViT(**{"classes": 5, "size": 16, "patch": 4, "dim": 16, "depth": 2, "heads": 4, **kw}))


def rand64(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ---- the formulas

def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def layer_norm(layer, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def attention_by_hand(layer, x):
    """Vaswani et al. 2017, Eq. 1, head by head."""
    heads, d = [], x.shape[-1] // layer.heads
    for h in range(layer.heads):
        q, k, v = (z[..., h * d:(h + 1) * d] for z in linear(layer.qkv, x).chunk(3, -1))
        heads.append((q @ k.transpose(1, 2) / math.sqrt(d)).softmax(-1) @ v)
    return linear(layer.out, torch.cat(heads, -1))


def block_by_hand(block, x):
    """Dosovitskiy et al. 2021, Eqs. 2 and 3."""
    x = x + attention_by_hand(block.attention, layer_norm(block.norm1, x))
    up, _, down = block.mlp
    return x + linear(down, F.gelu(linear(up, layer_norm(block.norm2, x))))


def patches_by_hand(stem, x):
    """A linear map of the patches is a convolution whose stride is its size."""
    p, D = stem.patch, stem.embed.out_features
    kernel = stem.embed.weight.view(D, p, p, -1).permute(0, 3, 1, 2)     # pixels first, then their channels
    return F.conv2d(x, kernel, stem.embed.bias, stride=p).flatten(2).transpose(1, 2)


def convolutions_by_hand(stem, x):
    """Xiao et al. 2021: strides 2, 1, 2, 2 ..., each convolution followed by GroupNorm and GELU."""
    *layers, last = stem.layers
    for k in range(0, len(layers), 3):
        x = F.conv2d(x, layers[k].weight, stride=1 if k == 3 else 2, padding=1)
        x = F.gelu(F.group_norm(x, 8, layers[k + 1].weight, layers[k + 1].bias))
    return F.conv2d(x, last.weight, last.bias).flatten(2).transpose(1, 2)


def positions_by_hand(rows, cols, dim):
    """Of every token, row by row: sines, then cosines, first of its column, then of its row."""
    lengths = [10_000 ** (k / (dim // 4 - 1)) for k in range(dim // 4)]
    return torch.tensor([[f(place / length) for place in (col, row) for f in (math.sin, math.cos)
                          for length in lengths] for row in range(rows) for col in range(cols)])


def test_attention_is_vaswani_eq_1_head_by_head():
    attention, x = awake(Attention(12, 3)), rand64(2, 5, 12)
    assert_close(attention(x), attention_by_hand(attention, x))


def test_a_block_normalises_before_it_attends_and_before_it_computes():
    block, x = awake(Block(16, 2)), rand64(2, 6, 16)
    assert_close(block(x), block_by_hand(block, x))


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_the_stem_is_convolutions_with_norms_and_gelus_between(patch):
    stem, x = awake(Convolutions(3, patch, 16)), rand64(2, 3, 16, 24)
    assert_close(stem(x), convolutions_by_hand(stem, x))


def test_a_plain_patch_is_mapped_linearly():
    stem, x = awake(Patches(3, 4, 16)), rand64(2, 3, 16, 24)
    assert_close(stem(x), patches_by_hand(stem, x))


@pytest.mark.parametrize("stem, by_hand", [(Convolutions, convolutions_by_hand), (Patches, patches_by_hand)])
def test_the_whole_is_stem_and_a_tenth_of_the_positions_then_blocks_norm_mean_and_head(stem, by_hand):
    model, x = small(stem=stem), rand64(2, 3, 16, 16)
    tokens = by_hand(model.stem, x) + 0.1 * positions_by_hand(4, 4, 16)
    for block in model.blocks:
        tokens = block_by_hand(block, tokens)
    features = layer_norm(model.norm, tokens).sum(1) / 16
    assert_close(model.features(x), features)
    assert_close(model(x), linear(model.head, features))


def test_positions_are_sines_and_cosines_of_the_row_and_of_the_column():
    assert_close(sincos_positions(3, 4, 8), positions_by_hand(3, 4, 8))


# ---- what follows

def test_a_fresh_block_is_the_identity():
    torch.manual_seed(0)
    block, x = Block(16, 2), torch.randn(2, 6, 16)
    assert_close(block(x), x, rtol=0, atol=0)


def test_a_fresh_vit_sees_what_its_stem_sees():
    torch.manual_seed(0)
    model, x = ViT(5, size=16, patch=4, dim=16, depth=3, heads=2), torch.randn(2, 3, 16, 16)
    assert_close(model.features(x), model.norm(model.stem(x) + model.positions).mean(1))


def test_without_positions_tokens_are_a_set():
    block, x, order = awake(Block(16, 2)), rand64(1, 6, 16), torch.tensor([3, 0, 5, 1, 4, 2])
    assert_close(block(x)[:, order], block(x[:, order]))


def test_with_positions_it_matters_where_a_patch_is():
    model, x = small(stem=Patches), rand64(1, 3, 16, 16)
    assert (model(x.flip(3).unflatten(3, (4, 4)).flip(4).flatten(3)) - model(x)).abs().max() > 1e-4


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_every_stem_makes_a_token_per_patch(patch):
    for stem in (Convolutions(4, patch, 32), Patches(4, patch, 32)):
        assert stem(torch.zeros(2, 4, 16, 24)).shape == (2, (16 // patch) * (24 // patch), 32)


def test_a_convolutional_token_sees_beyond_its_patch_and_a_plain_one_does_not():
    for stem, beyond in ((Convolutions(3, 4, 16), True), (Patches(3, 4, 16), False)):
        x = torch.randn(1, 3, 16, 16, requires_grad=True)
        stem(x)[0, 5].sum().backward()                                   # of rows 4 to 7, columns 4 to 7
        assert x.grad[0, :, 4:8, 4:8].any() and x.grad[0, :, 3, 4:8].any().item() is beyond


def test_the_first_loss_is_ln_K_but_for_a_percent_and_its_gradient_reaches_the_stem():
    torch.manual_seed(0)
    model, y = ViT(5, size=16, patch=4, dim=32, depth=1, heads=2), torch.arange(60) % 5
    loss = F.cross_entropy(model(torch.randn(60, 3, 16, 16)), y)
    assert loss.item() == pytest.approx(math.log(5), rel=0.01)
    loss.backward()
    assert model.stem.layers[0].weight.grad.abs().max() > 1e-6


def test_with_a_mask_tokens_count_by_how_much_of_the_building_they_show():
    tokens, x = rand64(3, 4, 16), torch.full((3, 4, 8, 8), -1.0, dtype=torch.float64)
    x[0, 3, :4, :4] = x[1, 3, :4, 2:8] = 1          # all of the first patch; half of it, all of the second
    mean = vit.mean_token(tokens, x)                # and no building at all: every token alike
    for found, parts in zip(mean, (tokens[0, 0], (tokens[1, 0] + 2 * tokens[1, 1]) / 3), strict=False):
        assert_close(found, parts, rtol=0, atol=0.01)
    assert_close(mean[2], tokens[2].mean(0))
    assert_close(vit.mean_token(tokens, x[:, :3]), tokens.mean(1))


def test_a_model_of_masked_images_reads_its_features_by_the_mask():
    model, x = small(channels=4), rand64(2, 4, 16, 16)
    x[:, 3] = x[:, 3].sign()
    seen = []
    model.norm.register_forward_hook(lambda _, args, out: seen.append(out))
    assert_close(model.features(x), vit.mean_token(seen[0], x))
    assert (model.features(x) - seen[0].mean(1)).abs().max() > 0.01


def test_positions_are_a_buffer_that_checkpoints_leave_out():
    model = small()
    assert "positions" in dict(model.named_buffers()) and "positions" not in model.state_dict()
    assert model.positions.dtype == model(rand64(1, 3, 16, 16)).dtype == torch.float64


@pytest.mark.parametrize("stem", [Convolutions, Patches])
def test_every_parameter_gets_a_gradient(stem):
    model = small(channels=4, stem=stem)
    model(rand64(3, 4, 16, 16)).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_images_of_a_batch_do_not_see_each_other():
    model, x = small(), rand64(4, 3, 16, 16)
    assert_close(model(x)[2:3], model(x[2:3]))


@pytest.mark.parametrize("kw, message", [
    (dict(patch=5), "patches of 5"), (dict(heads=5), "5 attention heads"),
    (dict(size=18, patch=6), "2, 4, 8 ... pixels .* not 6 and 16"), (dict(patch=1), "not 1 and 16"),
    (dict(dim=24), "divisible by 16, not 4 and 24"),
    (dict(dim=30, heads=2, stem=Patches), "divisible by 4")])
def test_bad_sizes_are_told(kw, message):
    with pytest.raises(ValueError, match=message):
        small(**kw)


def test_plain_patches_may_be_of_any_size():
    assert small(size=18, patch=6, dim=24, stem=Patches)(rand64(1, 3, 18, 18)).shape == (1, 5)


def test_the_demo_prints_the_shapes_on_the_way_through(capsys):
    vit.main()
    said = capsys.readouterr().out
    assert "stem.layers.0              (2, 3, 64, 64) -> (2, 96, 32, 32)" in said
    assert "stem                       (2, 3, 64, 64) -> (2, 64, 192)" in said
    assert said.endswith("ViT                        (2, 3, 64, 64) -> (2, 45)\n")
