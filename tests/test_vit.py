"""vit.py against explicit formulas, and its invariants."""
import math

import pytest
import torch
from torch.testing import assert_close

import vit
from vit import Attention, Block, ViT, sincos_positions


def small(**kw):
    torch.manual_seed(0)
    model = ViT(**{"classes": 5, "size": 16, "patch": 4, "dim": 32, "depth": 2, "heads": 4, **kw})
    with torch.no_grad():
        model.head.weight.normal_()
    return model


def test_attention_is_vaswani_eq_1_head_by_head():
    torch.manual_seed(0)
    attention, x = Attention(12, 3).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split(12, dim=-1)
    heads = []
    for h in range(3):
        qh, kh, vh = (z[..., 4 * h:4 * h + 4] for z in (q, k, v))
        heads.append((qh @ kh.transpose(1, 2) / math.sqrt(4)).softmax(-1) @ vh)
    assert_close(attention(x), torch.cat(heads, -1) @ attention.out.weight.T + attention.out.bias)


def test_without_positions_tokens_are_a_set():
    torch.manual_seed(0)
    block, x, order = Block(16, 2), torch.randn(1, 6, 16), torch.tensor([3, 0, 5, 1, 4, 2])
    assert_close(block(x)[:, order], block(x[:, order]))


def test_positions_tell_rows_from_columns():
    p = sincos_positions(3, 4, 8)
    w = torch.tensor([1.0, 1e-4])
    for row in range(3):
        for col in range(4):
            expected = torch.cat([f(z * w) for z in (col, row) for f in (torch.sin, torch.cos)])
            assert_close(p[row * 4 + col], expected)


def test_patches_are_what_their_pixels_are():
    model, x = small(), torch.randn(1, 3, 16, 16)
    seen = []
    model.embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    patch = x[0, :, 4:8, 8:12].permute(1, 2, 0).flatten()               # second row, third column
    assert_close(seen[0][0, 1 * 4 + 2], patch)


def test_the_first_loss_is_ln_K():
    torch.manual_seed(0)
    logits = ViT(5, size=16, patch=4, dim=32, depth=1, heads=2)(torch.randn(7, 3, 16, 16))
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(7) % 5)
    assert loss.item() == pytest.approx(math.log(5), abs=1e-6)


def test_positions_are_a_buffer_that_checkpoints_leave_out():
    model = small()
    assert "positions" in dict(model.named_buffers()) and "positions" not in model.state_dict()
    assert model.double()(torch.randn(1, 3, 16, 16, dtype=torch.float64)).dtype == torch.float64


def test_every_parameter_gets_a_gradient():
    model = small(channels=4)
    model(torch.randn(3, 4, 16, 16)).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_images_of_a_batch_do_not_see_each_other():
    model, x = small().eval(), torch.randn(4, 3, 16, 16)
    assert_close(model(x)[2:3], model(x[2:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kw, message", [
    (dict(patch=5), "patches of 5"), (dict(heads=5), "5 attention heads"),
    (dict(dim=30, heads=2), "divisible by 4")])
def test_bad_sizes_are_told(kw, message):
    with pytest.raises(ValueError, match=message):
        small(**kw)


def test_the_demo_prints_the_shapes_on_the_way_through(capsys):
    vit.main()
    said = capsys.readouterr().out
    assert "embed                      (2, 64, 192) -> (2, 64, 192)" in said
    assert said.endswith("ViT                        (2, 3, 64, 64) -> (2, 45)\n")
