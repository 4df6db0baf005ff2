"""unet.py against its formulas, and: what goes in decides what comes out, nothing is built in vain."""
import copy
from dataclasses import replace
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import data
import unet
from unet import Block, Condition, UNet, Words, timestep_embedding
from vit import Text


def awake(**kw):
    """A small U-Net whose zero-initialised layers have been moved, as after some training."""
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
    """Wu & He 2018, Eq. 7, 8 groups: each to mean 0 and variance 1, then each channel scaled and shifted."""
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


def block_by_hand(block, x, emb, words=None):
    """Dhariwal & Nichol 2021, section 4.4: AdaGN(h, y) = y_s GroupNorm(h) + y_b; here y_s is 1 + scale.

    Words (B, M, D) are keys and values beside the pixels: Nichol et al. 2021, section 2.3.
    """
    scale, shift = linear(block.scale_shift, silu(emb))[:, :, None, None].chunk(2, dim=1)
    h = conv(block.conv1, silu(norm(block.norm1, x)))
    h = conv(block.conv2, silu((1 + scale) * norm(block.norm2, h) + shift))
    x = h + (x if isinstance(block.skip, nn.Identity) else conv(block.skip, x))
    if block.attention:
        tokens = norm(block.norm3, x).flatten(2).mT
        q, k, v = linear(block.attention.qkv, tokens).chunk(3, dim=-1)
        if words is not None:
            _, *more = linear(block.attention.qkv, linear(block.words, words)).chunk(3, dim=-1)
            k, v = (torch.cat(pair, 1) for pair in zip((k, v), more, strict=True))
        seen = linear(block.attention.out, (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)      # of one head
        x = x + seen.mT.view_as(x)
    return x


def unet_by_hand(model, x, t, y):
    """Ho et al. 2020, appendix B: down, across and up, each block up seeing the one at its height down."""
    angle = t[:, None] * torch.tensor([10_000 ** (-k / 8) for k in range(8)])                    # width 16
    first, _, last = model.time
    emb = linear(last, silu(linear(first, torch.cat([angle.sin(), angle.cos()], 1)))) + model.label.weight[y]
    h = conv(model.stem, F.pixel_unshuffle(x, model.patch))
    (fine,), (coarse,) = (level.blocks for level in model.down)
    a = block_by_hand(fine, h, emb)
    b = block_by_hand(coarse, conv(model.down[0].resize, a, stride=2), emb)
    h = block_by_hand(model.mid, b, emb)
    (coarse,), (fine,) = (level.blocks for level in model.up)
    h = block_by_hand(coarse, torch.cat([h, b], 1), emb)
    h = conv(model.up[1].resize[1], h.repeat_interleave(2, 2).repeat_interleave(2, 3))           # nearest
    h = block_by_hand(fine, torch.cat([h, a], 1), emb)
    return F.pixel_shuffle(conv(model.head[2], silu(norm(model.head[0], h))), model.patch)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("c_in", [16, 24])
def test_a_block_is_two_convolutions_the_embedding_between_and_attention_after(c_in, attention, in_float64):
    torch.manual_seed(0)
    block = Block(c_in, 16, 12, attention)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    x, emb = torch.randn(2, c_in, 6, 4), torch.randn(2, 12)
    assert_close(block(x, emb), block_by_hand(block, x, emb))


@pytest.mark.parametrize("patch", [1, 2])
def test_the_whole_is_blocks_down_and_up_with_skips_between_them(patch, in_float64):
    model, (x, t, cond) = awake(patch=patch), inputs()
    cond.y[1] = -1                                                       # the last row of the classes
    assert_close(model(x, t, cond), unet_by_hand(model, x, t, cond.y))


# ---- what follows

@pytest.mark.parametrize("channels, H, W, patch", [
    (3, 16, 16, 1), (1, 8, 24, 1), (4, 16, 32, 2), (7, 32, 16, 4)])
def test_any_channels_and_sides_that_fit_come_back_in_their_shape(channels, H, W, patch):
    x, t, cond = inputs(2, channels, H, W)
    assert awake(channels=channels, patch=patch)(x, t, cond).shape == x.shape


def test_it_starts_by_predicting_nothing():
    torch.manual_seed(0)
    out = UNet(3, width=16, mults=(1, 2), blocks=1)(*inputs())
    assert_close(out, torch.zeros_like(out))


def test_time_class_and_image_each_change_the_answer():
    model, (x, t, cond) = awake(), inputs()
    base = model(x, t, cond)
    for other in (model(x, t + 1, cond), model(x, t, Condition((cond.y + 1) % 3)), model(x + 0.1, t, cond)):
        assert ((other - base).abs().amax((1, 2, 3)) > 1e-4).all()


def test_a_hidden_class_leaves_no_trace():
    model, (x, t, _) = awake(), inputs()
    a, b = (Condition(torch.tensor(y)).hide(torch.tensor([True, False])) for y in ([0, 1], [2, 1]))
    assert_close(model(x, t, a), model(x, t, b))
    assert (model(x, t, a) != model(x, t, Condition(torch.tensor([0, 1]))))[0].any()


def test_condition_and_null_is_itself_and_then_nothing():
    assert Condition(torch.tensor([2, 0])).and_null().y.tolist() == [2, 0, -1, -1]


def test_every_parameter_gets_a_gradient():
    model, (x, t, _) = awake(blocks=2, mults=(1, 2, 2)), inputs(4)
    model(x, t, Condition(torch.tensor([0, 1, 2, -1]))).square().mean().backward()
    rows = {name: p.grad.flatten(1).abs().sum(1) for name, p in model.named_parameters() if p.ndim > 1}
    assert not [name for name, row in rows.items() if not (row > 0).all()]           # scale and shift alike
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_images_of_a_batch_do_not_see_each_other():
    model, (x, t, cond) = awake(), inputs(3)
    alone = model(x[1:2], t[1:2], Condition(cond.y[1:2]))
    assert_close(model(x, t, cond)[1:2], alone, rtol=1e-4, atol=1e-5)


def test_a_deep_copy_is_independent():
    model, (x, t, cond) = awake(), inputs()
    twin, before = copy.deepcopy(model), model(x, t, cond)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_close(twin(x, t, cond), before)


def test_timestep_embedding_is_sines_and_cosines_of_geometric_frequencies():
    e = timestep_embedding(torch.tensor([0, 7]), 8)
    w = 10_000 ** (-torch.arange(4) / 4)
    assert_close(e, torch.stack([torch.cat([(t * w).sin(), (t * w).cos()]) for t in (0, 7)]))


def test_bad_sizes_are_told():
    with pytest.raises(ValueError, match="divisible by 8"):
        UNet(3, width=20)
    with pytest.raises(AssertionError, match="divisible by 4"):
        awake(mults=(1, 2, 2))(*inputs(H=18))


def test_the_demo_prints_the_shapes_on_the_way_through(capsys):
    unet.main()
    said = capsys.readouterr().out
    assert "mid              (2, 256, 16, 16) -> (2, 256, 16, 16)" in said
    assert said.endswith("UNet             (2, 3, 64, 64) -> (2, 3, 64, 64)\n")


def test_norms_keep_the_precision_of_their_input_and_are_group_norm():
    device = data.pick_device()
    norm, x = unet.Norm(16).to(device), torch.randn(2, 16, 4, 4, device=device) + 3
    with torch.autocast(device.type, torch.bfloat16):
        half = norm(x.bfloat16())                       # on a GPU, autocast would make this float32
    plain = nn.functional.group_norm(x, 8, norm.weight, norm.bias)
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), plain, rtol=0, atol=0.05)
    assert_close(norm(x), plain)


# ---- numbers and hints

def tower(V=9):
    return Text(V, length=12, dim=8, depth=1, heads=2)


def told(B=3):
    """A U-Net that is told three numbers, a hint of two channels and a text, and inputs for it."""
    model, (x, t, cond) = awake(hint=2, numbers=3, text=tower()), inputs(B)
    cond.text = torch.tensor([[7, 1, 2, 3, 8], [7, 4, 8, 0, 0], [7, 1, 8, 0, 0]]).repeat(B // 3, 1)
    model.numbers.fit(torch.tensor([[0.0, -5, 10], [1, 5, 20]]))
    cond.numbers = torch.rand(B, 3) * torch.tensor([1.0, 10, 10]) + torch.tensor([0.0, -5, 10])
    cond.hint = torch.rand(B, 2, 16, 16)
    return model, x, t, cond


@pytest.mark.parametrize("part", ["y", "numbers", "hint", "text"])
def test_each_part_of_a_condition_changes_the_answer_and_hidden_it_leaves_no_trace(part):
    model, x, t, cond = told()
    base, value = model(x, t, cond), getattr(cond, part)
    changed = dict(y=(value + 1) % 3, text=torch.where(value == 8, 8, (value + 2) % 7))
    other = replace(cond, **{part: changed.get(part, 0.5 * value + 0.2)})
    assert ((model(x, t, other) - base).abs().amax((1, 2, 3)) > 1e-4).all()
    everyone = torch.tensor([True, True, True])
    assert_close(model(x, t, other.hide(everyone)), model(x, t, cond.hide(everyone)))
    assert (model(x, t, cond.hide(everyone)) - base).abs().max() > 1e-4


@pytest.mark.parametrize("L", [1, 5, 9])
def test_a_text_not_told_has_no_length_and_one_that_is_told_may_be_padded(L):
    model, x, t, cond = told()
    wide = F.pad(cond.text, (0, 7))
    assert_close(model(x, t, replace(cond, text=wide)), model(x, t, cond))
    assert_close(model(x, t, replace(cond, text=wide[1:2].expand(3, -1)))[1], model(x, t, cond)[1])
    wide[1, 3:] = 5                                                      # what stands in place of padding
    assert_close(model(x, t, replace(cond, text=wide)), model(x, t, cond))
    hidden = cond.hide(torch.tensor([True, True, True])).text
    assert_close(model(x, t, replace(cond, text=hidden)),
                 model(x, t, replace(cond, text=torch.full((3, L), -1))))


def test_words_are_the_features_up_to_the_end_and_the_text_is_their_sum():
    torch.manual_seed(0)
    words, ids = Words(tower(), 6), torch.tensor([[7, 4, 8, 0], [7, 1, 2, 8], [-1, -1, -1, -1]])
    tokens, count, whole = words(ids)
    assert count.tolist() == [[True, True, True, False], [True] * 4, [True, False, False, False]]
    for k, end in ((0, 2), (1, 3)):
        read = linear(words.project, words.tower(ids[k:k + 1, :end + 1]))[0]
        assert_close(tokens[k, :end + 1], read)
        assert_close(whole[k], read.sum(0) / len(read) ** 0.5)
    assert_close(tokens[2, 0], linear(words.project, words.untold))
    assert_close(whole[2], tokens[2, 0])


def test_pixels_look_at_the_words_that_count_as_at_pixels(in_float64):
    torch.manual_seed(0)
    block = Block(16, 16, 12, attention=True, text=True)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    x, emb, words = torch.randn(2, 16, 6, 4), torch.randn(2, 12), torch.randn(2, 5, 12)
    count = torch.tensor([True, True, True, False, False]).expand(2, -1)
    assert_close(block(x, emb, (words, count)), block_by_hand(block, x, emb, words[:, :3]))


def test_the_text_reaches_the_embedding_and_every_attention_and_the_tower_learns():
    model, x, t, cond = told()
    model(x, t, cond).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == ["numbers.untold", "text.untold"]                   # all three were told something
    assert sum(name.endswith("words.weight") for name, _ in model.named_parameters()) == 3
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".words." in name:
                p.zero_()
    other = replace(cond, text=torch.where((cond.text > 0) & (cond.text < 7), 5, cond.text))
    assert ((model(x, t, other) - model(x, t, cond)).abs().amax((1, 2, 3)) > 1e-4).all()


def test_each_number_alone_may_be_missing():
    model, x, t, cond = told()
    base = model(x, t, cond)
    answers = [base]
    for k in range(3):
        less = cond.numbers.clone()
        less[:, k] = float("nan")
        answers.append(model(x, t, replace(cond, numbers=less)))
        assert answers[-1].isfinite().all()
    for a, b in combinations(answers, 2):
        assert (a - b).abs().max() > 1e-4


def test_a_hint_that_is_not_told_differs_from_one_of_grey():
    model, x, t, cond = told()
    grey, hidden = replace(cond, hint=0 * cond.hint), replace(cond, hint=float("nan") * cond.hint)
    assert (model(x, t, grey) - model(x, t, hidden)).abs().max() > 1e-4


def test_numbers_are_scaled_to_the_range_of_the_training_images():
    numbers = unet.Numbers(2, 8, 16)
    numbers.fit(torch.tensor([[0.0, 3], [float("nan"), 1], [5, 2]]))
    assert numbers.least.tolist() == [0, 1] and numbers.most.tolist() == [5, 3]
    seen = []
    numbers.layers = nn.Sequential(nn.Identity())
    numbers.layers.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    numbers(torch.tensor([[2.5, float("nan")]]))
    assert_close(seen[0][0, :8], timestep_embedding(torch.tensor([500.0]), 8)[0])
    assert_close(seen[0][0, 8:], numbers.untold[1].detach())


def test_every_part_is_sliced_hidden_and_followed_by_nothing_alike():
    _, _, _, cond = told()
    for index in (slice(1, 3), torch.tensor([1, 2])):
        part = cond[index]
        assert_close((part.y, part.numbers, part.hint), (cond.y[1:], cond.numbers[1:], cond.hint[1:]))
        assert_close(part.text, cond.text[1:])
    hidden = cond.hide(torch.tensor([False, True, False]))
    assert hidden.y.tolist() == [0, -1, 2] and (hidden.text[1] == -1).all()
    assert (hidden.text == cond.text)[[0, 2]].all()
    for a, b in ((hidden.numbers, cond.numbers), (hidden.hint, cond.hint)):
        assert a[1].isnan().all() and (a[[0, 2]] == b[[0, 2]]).all()
    both = cond.and_null()
    assert both.y.tolist() == [0, 1, 2, -1, -1, -1] and both.numbers[3:].isnan().all()
    assert (both.text[:3] == cond.text).all() and (both.text[3:] == -1).all()
    assert (both.hint[:3] == cond.hint).all() and both.hint[3:].isnan().all()
    assert Condition(cond.y).and_null().hint is None


def test_each_part_and_each_number_is_hidden_alone():
    cond = Condition(torch.zeros(4000, dtype=torch.long), torch.zeros(4000, 3), torch.zeros(4000, 2, 1, 1),
                     torch.zeros(4000, 2, dtype=torch.long))
    hidden = cond.hide_each(0.2, torch.Generator().manual_seed(0))
    gone = torch.cat([(hidden.y < 0)[:, None], hidden.numbers.isnan(), hidden.hint.isnan().flatten(1),
                      hidden.text < 0], 1)
    gone = gone.double()
    assert_close(gone.mean(0), torch.full((8,), 0.2).double(), atol=0.03, rtol=0)
    together = torch.corrcoef(gone.T)
    for a, b in ((4, 5), (6, 7)):                            # the channels of a hint, the tokens of a text
        assert together[a, b] == pytest.approx(1)
        together[a, b] = together[b, a] = 0
    assert (together - torch.eye(8)).abs().max() < 0.06
