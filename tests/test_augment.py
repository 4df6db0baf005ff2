"""What augment.py promises, checked against textbook formulas, loops over pixels, and exact identities."""

import math

import pytest
import torch
from torch.testing import assert_close

import augment
from augment import AUGMENTATIONS, compose


def images(B=3, C=3, H=8, W=8, seed=0):
    """Random images in float64; a mask channel holds a square object, at another place in each image."""
    x = torch.rand(B, C, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    if C % 3 == 1:
        x[:, -1] = -1
        for i in range(B):
            x[i, -1, 1 + i % 3:4 + i % 3, 2:5] = 1
    return x


def ramp(H=8, W=8):
    """Red rises to the right, green downwards."""
    v, u = torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij")
    return torch.stack((u, v, 0 * u))[None].double()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def parameters_of(name, monkeypatch, function, x):
    """What the draw called `name` hands to the function, after x."""
    seen = []
    monkeypatch.setattr(augment, function, lambda x, *parameters: seen.extend(parameters) or x)
    AUGMENTATIONS[name](x, None, seeded())
    return seen


def each(*values):
    return torch.tensor(values, dtype=torch.float64)


def look_up(image, row, col):
    """Bilinear value between pixel centres, with mirrored borders: the definition, one pixel at a time."""
    def mirrored(i, n):
        i %= 2 * n
        return min(i, 2 * n - 1 - i)
    r, c, total = math.floor(row), math.floor(col), 0
    for i, wi in ((r, r + 1 - row), (r + 1, row - r)):
        for j, wj in ((c, c + 1 - col), (c + 1, col - c)):
            total = total + wi * wj * image[:, mirrored(i, image.shape[1]), mirrored(j, image.shape[2])]
    return total


# ---- geometry

def test_rotating_by_ninety_degrees_is_a_quarter_turn_counter_clockwise():
    x = images(4)
    turned = augment.rotate(x, each(0, 90, 180, -90))
    assert_close(turned, augment.rot90(x, torch.tensor([0, 1, 2, 3])))
    assert_close(augment.rot90(ramp(), torch.tensor([1]))[0, 0, 0, 0], ramp()[0, 0, 0, -1])   # right -> top


def test_quarter_turns_are_exact_per_image_and_four_are_the_identity():
    x = images(6)
    turned = augment.rot90(x, torch.arange(6) - 1)
    assert all(torch.equal(turned[i], x[i].rot90(i - 1, (-2, -1))) for i in range(6))
    assert not torch.equal(turned[0], x[0])


def test_rot90_refuses_images_that_are_not_square():
    with pytest.raises(ValueError, match="4 x 6"):
        augment.rot90(images(H=4, W=6), torch.zeros(3, dtype=torch.long))


def test_flips_mirror_the_right_axis():
    assert augment.hflip(ramp())[0, 0, 0, 0] == 1 and augment.hflip(ramp())[0, 1, 0, 0] == -1
    assert augment.vflip(ramp())[0, 1, 0, 0] == 1 and augment.vflip(ramp())[0, 0, 0, 0] == -1


def test_neutral_parameters_change_nothing():
    x, zero, one = images(H=6, W=10), each(0, 0, 0), each(1, 1, 1)
    for same in (augment.rotate(x, zero), augment.scale(x, one), augment.translate(x, zero, zero),
                 augment.crop(x, zero, zero, 6 * one, 10 * one), augment.adjust_brightness(x, one),
                 augment.adjust_contrast(x, one), augment.adjust_saturation(x, one),
                 augment.adjust_hue(x, zero), augment.adjust_hue(x, one), augment.add_noise(x, x, zero)):
        assert_close(same, x)


def test_translation_moves_right_and_down_by_whole_pixels_and_mirrors_the_rest():
    x = images(H=6, W=9)
    moved = augment.translate(x, each(2, 2, 2), each(1, 1, 1))
    assert_close(moved[:, :, 1:, 2:], x[:, :, :-1, :-2])
    assert_close(moved[:, :, 1:, :2], x[:, :, :-1, :2].flip(-1))


def test_scale_two_shows_the_middle_half_like_the_crop_of_it():
    x = images(H=8, W=12)
    two = each(2, 2, 2)
    window = (each(2, 2, 2), each(3, 3, 3), each(4, 4, 4), each(6, 6, 6))
    assert_close(augment.scale(x, two), augment.crop(x, *window))
    assert_close(augment.scale(x, two)[0, :, 1, 2], look_up(x[0], 2.25, 3.75))


def test_crop_is_the_window_of_each_image_pixel_by_pixel():
    x, H, W = images(2, H=6, W=9), 6, 9
    windows = [(1.0, 2.5, 4.0, 5.0), (0.0, 0.0, 3.0, 9.0)]                   # top, left, height, width
    got = augment.crop(x, *torch.tensor(windows, dtype=torch.float64).T)
    for i, (top, left, height, width) in enumerate(windows):
        for r in range(H):
            for c in range(W):
                there = (top + (r + 0.5) * height / H - 0.5, left + (c + 0.5) * width / W - 0.5)
                assert_close(got[i, :, r, c], look_up(x[i], *there))


def test_rotation_is_the_textbook_map_pixel_by_pixel():
    x, cos, sin = images(1, H=5, W=8), 0.75**0.5, 0.5
    got = augment.rotate(x, each(30))
    for r in range(5):
        for c in range(8):
            right, up = c - 3.5, 2 - r                                       # turned back, clockwise
            row = 2 - (up * cos - right * sin)
            assert_close(got[0, :, r, c], look_up(x[0], row, 3.5 + right * cos + up * sin))


def test_a_turned_disc_stays_a_disc_on_a_picture_that_is_not_square():
    v, u = torch.meshgrid(torch.arange(24) - 11.5, torch.arange(48) - 23.5, indexing="ij")
    inner = u**2 + v**2 < 144                                                # the corners are reflections
    disc = torch.exp(-(u**2 + v**2) / 18).expand(1, 3, 24, 48).double()
    assert_close(augment.rotate(disc, each(37))[..., inner], disc[..., inner], atol=0.03, rtol=0)


def test_the_mask_moves_with_the_picture():
    x = images(C=4)
    x[:, 0] = x[:, 3]                                                        # red is the mask
    for name in ("hflip", "vflip", "rot90", "rotate", "scale", "translate", "crop", "cutmix"):
        out, _ = AUGMENTATIONS[name](x, torch.eye(3), seeded())
        assert torch.equal(out[:, 3], out[:, 0])


# ---- colour

def textbook(x, kind, amount):
    """One of the four on one picture (3, H, W) in [-1, 1], pixel by pixel; cut off only by the caller."""
    rgb = (x + 1) / 2
    shade = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    if kind == "hue":                                                        # Rodrigues' formula
        axis, angle = torch.full((3, 1), 3**-0.5, dtype=x.dtype), 2 * math.pi * amount
        v = rgb.flatten(1)
        turned = (v * math.cos(angle) + torch.cross(axis.expand_as(v), v, dim=0) * math.sin(angle)
                  + axis * (axis * v).sum(0) * (1 - math.cos(angle)))
        return turned.view_as(rgb) * 2 - 1
    other = {"brightness": torch.zeros_like(shade), "contrast": shade.mean(), "saturation": shade}[kind]
    return (amount * rgb + (1 - amount) * other) * 2 - 1


@pytest.mark.parametrize("kind, amounts", [
    ("brightness", (0.4, 1.0, 1.7)), ("contrast", (0.0, 0.6, 1.9)), ("saturation", (0.0, 0.5, 1.8)),
    ("hue", (0.2, -0.45, 0.8))])
@pytest.mark.parametrize("C", (3, 4, 6, 7))
def test_colours_are_the_textbook_formulas_on_every_picture_of_a_stack(kind, amounts, C):
    x = images(3, C, H=6, W=10)
    x[:, :3, :2] = 0.3                                                       # the pictures have other means
    before, out = x.clone(), getattr(augment, f"adjust_{kind}")(x, each(*amounts))
    for i, amount in enumerate(amounts):
        for rgb in (slice(0, 3), slice(3, 6))[:C // 3]:
            assert_close(out[i, rgb], textbook(x[i, rgb], kind, amount).clamp(-1, 1))
    assert torch.equal(out[:, C - C % 3:], x[:, C - C % 3:]) and torch.equal(x, before)


def test_a_third_of_a_turn_makes_red_green_green_blue_and_blue_red():
    x = images(2)
    assert_close(augment.adjust_hue(x, each(1 / 3, -2 / 3)), x[:, [2, 0, 1]])
    assert_close(augment.adjust_hue(x, each(2 / 3, -1 / 3)), x[:, [1, 2, 0]])


def test_hue_keeps_the_mean_and_the_distance_to_grey_and_leaves_grey_alone():
    x = images() * 0.4                                                       # nothing is cut off
    turned = augment.adjust_hue(x, each(0.1, -0.3, 0.5))
    for some in (lambda x: x.mean(1), lambda x: (x - x.mean(1, keepdim=True)).norm(dim=1)):
        assert_close(some(turned), some(x))
    assert (turned - x).norm(dim=1).mean() > 0.1
    grey = x[:, :1].expand(-1, 3, -1, -1)
    assert_close(augment.adjust_hue(grey, each(0.1, -0.3, 0.5)), grey)


def test_the_colour_of_all_four_is_hue_saturation_contrast_brightness_in_turn():
    x = images(3, C=7) * 0.3 - 0.2
    amounts = dict(brightness=each(1.2, 0.7, 1.1), contrast=each(0.8, 1.3, 0.6),
                   saturation=each(1.3, 0.5, 1.1), shift=each(0.04, -0.05, 0.3))
    out, kinds = augment.adjust_color(x, **amounts), ("hue", "saturation", "contrast", "brightness")
    for i in range(3):
        for rgb in (slice(0, 3), slice(3, 6)):
            for order in (kinds, ("hue", *kinds[:0:-1]), ("hue", "contrast", "saturation", "brightness")):
                step = x[i, rgb]
                for kind in order:
                    step = textbook(step, kind, amounts["shift" if kind == "hue" else kind][i].item())
                assert step.abs().max() < 1                                  # so no clamp takes part
                assert_close(out[i, rgb], step)
    assert torch.equal(out[:, 6], x[:, 6])


def test_the_colour_of_all_four_is_cut_off_once_at_the_end():
    x, one = images(1), each(1)
    out = augment.adjust_color(x, 3 * one, 0.3 * one, one, 0 * one)          # times 3 and back would lose
    expected = textbook(textbook(x[0], "contrast", 0.3), "brightness", 3)
    assert expected.max() > 1 and (textbook(x[0], "brightness", 3) > 1).float().mean() > 0.5
    assert_close(out[0], expected.clamp(-1, 1))


def test_random_colour_draws_each_parameter_from_its_range(monkeypatch):
    *factors, shift = parameters_of("color", monkeypatch, "adjust_color", torch.zeros(2000, 3, 2, 2))
    for low, high, values in (*((0.7, 1.3, f) for f in factors), (-0.05, 0.05, shift)):
        edge = 0.01 * (high - low)
        assert low <= values.min() < low + edge and high - edge < values.max() <= high
    assert len({values[0].item() for values in (*factors, shift)}) == 4


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_colour_keeps_its_precision_whatever_autocast_says(dtype):
    x, amounts = images(4, 6).to(dtype), torch.tensor([[0.7], [1.2], [1.1], [0.04]]).expand(4, 4)
    plain = augment.adjust_color(x, *amounts)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment.adjust_color(x, *amounts), plain)
    assert plain.dtype == dtype
    exact = augment.adjust_color(x.double(), *(a.double() for a in amounts))
    assert_close(plain.double(), exact, rtol=0, atol=0.02 if dtype == torch.bfloat16 else 1e-6)


# ---- noise, holes, mixtures

def test_noise_has_the_strength_that_was_asked_for_and_is_cut_off():
    x = torch.zeros(2, 4, 64, 64)
    noise = torch.randn(x.shape, generator=seeded())
    out = augment.add_noise(x, noise, torch.tensor([0.05, 5.0]))
    assert_close(out[0, :3].std() / 2, torch.tensor(0.05), atol=0.001, rtol=0)
    assert out.abs().max() == 1 and not out[:, 3].any()


def test_cutout_is_a_mid_grey_square_that_the_border_may_cut():
    x = images(3, C=7, H=8, W=10).clamp(min=0.1)
    centres, side = [(4, 5), (0, 9), (7, 1)], 4
    cy, cx = torch.tensor(centres).T
    out = augment.cutout(x, cy, cx, torch.full((3,), side))
    for i, (y0, x0) in enumerate(centres):
        expected = x[i].clone()
        for r in range(8):
            for c in range(10):
                if y0 - 2 <= r < y0 + 2 and x0 - 2 <= c < x0 + 2:
                    expected[:6, r, c] = 0
        assert torch.equal(out[i], expected)
    assert [(o[0] == 0).sum().item() for o in out] == [16, 6, 9]


def test_random_cutout_puts_the_centre_anywhere_so_some_holes_are_cut():
    out, _ = AUGMENTATIONS["cutout"](torch.ones(300, 3, 12, 18), None, seeded())
    areas = (out[:, 0] == 0).sum((1, 2))
    assert areas.max() == 16 and areas.min() == 4
    assert abs((areas < 16).float().mean() - (1 - 9 / 12 * 15 / 18)) < 0.1


def test_cutmix_fills_the_box_from_the_partner_and_its_lambda_is_the_exact_area():
    x, y = images(3, C=4, H=8, W=12), torch.eye(3, dtype=torch.float64)
    before, partner = x.clone(), torch.tensor([1, 2, 0])
    boxes = [(4, 6, 4, 6), (0, 11, 5, 5), (7, 0, 0, 8)]                      # cy, cx, height, width
    out, mixed = augment.cutmix(x, y, partner, *torch.tensor(boxes).T)
    for i, (cy, cx, height, width) in enumerate(boxes):
        expected, taken = before[i].clone(), 0
        for r in range(max(cy - height // 2, 0), min(cy - height // 2 + height, 8)):
            for c in range(max(cx - width // 2, 0), min(cx - width // 2 + width, 12)):
                expected[:, r, c], taken = before[partner[i], :, r, c], taken + 1
        assert torch.equal(out[i], expected)
        assert_close(mixed[i], y[i] * (1 - taken / 96) + y[partner[i]] * taken / 96)
    assert [round(96 * (1 - m)) for m in mixed.diagonal().tolist()] == [24, 9, 0] and torch.equal(x, before)


def test_random_cutmix_has_uniform_areas_on_half_of_the_images_and_a_box_for_each(monkeypatch):
    seen = parameters_of("cutmix", monkeypatch, "cutmix", torch.zeros(4000, 1, 32, 64))
    height, width = seen[-2:]
    on = height > 0
    area = (height * width)[on] / (32 * 64)
    assert abs(on.float().mean() - 0.5) < 0.05 and len(area.unique()) > 20
    assert abs(area.mean() - 0.5) < 0.05 and abs(area.median() - 0.5) < 0.05    # Beta(1, 1)
    assert (width - 2 * height).abs().max() <= 1                             # the shape of the image


def test_random_copypaste_takes_half_of_the_images():
    _, y = AUGMENTATIONS["copypaste"](torch.ones(400, 4, 2, 2), torch.eye(400), seeded())
    assert 0.4 < y.diagonal().mean() < 0.6


def test_partners_are_others():
    for B in range(2, 65):
        partner = augment.partners(torch.zeros(B, 1), seeded())
        assert (partner != torch.arange(B)).all() and torch.equal(partner.sort().values, torch.arange(B))


def test_copy_paste_brings_the_object_its_label_and_its_mask():
    x, y = images(3, C=7), torch.eye(3, dtype=torch.float64)
    x[2, 6] = -1                                                             # nothing to paste from image 2
    before, partner = x.clone(), torch.tensor([1, 2, 0])
    out, label = augment.copy_paste(x, y, partner)
    for i, j, pasted in ((0, 1, True), (1, 2, False), (2, 0, True)):
        expected = before[i].clone()
        for r in range(8):
            for c in range(8):
                if before[j, 6, r, c] > 0:
                    expected[:6, r, c] = before[j, :6, r, c]
        expected[6] = before[j if pasted else i, 6]     # the old object is background now
        assert torch.equal(out[i], expected) and torch.equal(label[i], y[j if pasted else i])


def test_copy_paste_refuses_images_without_a_mask():
    for C in (3, 6):
        with pytest.raises(ValueError, match="mask"):
            compose("hflip,copypaste")(images(C=C), torch.eye(3), seeded())


# ---- the dice and their composition

@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_works_keeps_its_inputs_and_follows_its_seed(name):
    for B, C in ((B, C) for B in (1, 5) for C in (3, 4, 6, 7)):
        if name == "copypaste" and C % 3 == 0:
            continue
        x, y = images(B, C, 16, 16).float(), torch.eye(5)[:B]
        runs = [AUGMENTATIONS[name](x, y, seeded(seed)) for seed in (0, 0, *range(1, 9))]
        for out, label in runs:
            assert out.shape == x.shape and out.dtype == x.dtype and out.abs().max() <= 1
            assert_close(label.sum(1), torch.ones(B))
        assert torch.equal(x, images(B, C, 16, 16).float()) and torch.equal(y, torch.eye(5)[:B])
        assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
        alone = B == 1 and name in ("cutmix", "copypaste")                   # no other image to mix with
        assert alone == all(torch.equal(out, x) for out, _ in runs)
        assert alone or len({out.numpy().tobytes() for out, _ in runs}) > 1


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name not in ("cutmix", "copypaste")])
def test_every_image_has_its_own_parameters(name):
    x = images(1, 4, 16, 16).repeat(32, 1, 1, 1)
    out, _ = AUGMENTATIONS[name](x, None, seeded())
    different = len(out.unique(dim=0))
    outcomes = {"hflip": 2, "vflip": 2, "rot90": 4}                          # of those that have few
    assert different == outcomes[name] if name in outcomes else different > 25


GEOMETRY = {"hflip", "vflip", "rot90", "rotate", "scale", "translate", "crop"}


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS.keys() - GEOMETRY - {"cutmix", "copypaste"}))
def test_what_moves_nothing_leaves_the_mask_alone(name):
    x = images(5, 7)
    assert torch.equal(AUGMENTATIONS[name](x, None, seeded())[0][:, 6], x[:, 6])


def test_crop_windows_lie_inside_and_have_the_promised_areas_and_ratios(monkeypatch):
    top, left, height, width = parameters_of("crop", monkeypatch, "crop", torch.zeros(20000, 1, 32, 48))
    assert top.min() >= 0 and (top + height).max() <= 32.001
    assert left.min() >= 0 and (left + width).max() <= 48.001
    area, ratio = height * width / (32 * 48), width / height
    assert 0.39 < area.min() < 0.45 and area.max() > 0.9
    whole = area < 0.5                                                       # no side is shortened here
    assert 0.749 < ratio[whole].min() < 0.78 and 1.28 < ratio[whole].max() < 1.34
    assert abs(ratio[whole].log().mean()) < 0.01                             # linear would be 0.03


def test_moves_and_zooms_stay_in_their_ranges(monkeypatch):
    dx, dy = parameters_of("translate", monkeypatch, "translate", torch.zeros(500, 1, 20, 40))
    assert 3.8 < dx.max() <= 4 and -4 <= dx.min() < -3.8 and 1.9 < dy.max() <= 2 and -2 <= dy.min() < -1.9
    factor, = parameters_of("scale", monkeypatch, "scale", torch.zeros(20000, 1, 2, 2))
    assert 0.799 < factor.min() < 0.82 and 1.23 < factor.max() < 1.251
    assert abs(factor.log().mean()) < 0.005                                  # linear would be 0.017


@pytest.mark.parametrize("name, change, low, high", [
    ("rotate", augment.rotate, -180, 180), ("brightness", augment.adjust_brightness, 0.7, 1.3),
    ("contrast", augment.adjust_contrast, 0.7, 1.3), ("saturation", augment.adjust_saturation, 0.7, 1.3),
    ("hue", augment.adjust_hue, -0.05, 0.05)])
def test_a_name_stands_for_its_change_between_its_bounds(name, change, low, high):
    x = images(5)
    expected = change(x, augment.uniform(x, low, high, seeded()))
    assert_close(AUGMENTATIONS[name](x, None, seeded())[0], expected)


def test_noise_is_at_most_a_tenth_of_the_way_from_black_to_white(monkeypatch):
    noise, sigma = parameters_of("noise", monkeypatch, "add_noise", torch.zeros(2000, 3, 2, 2))
    assert 0 <= sigma.min() < 0.002 and 0.098 < sigma.max() <= 0.1
    assert noise.shape == (2000, 3, 2, 2) and abs(noise.std() - 1) < 0.02


def test_compose_applies_the_names_in_order_from_one_generator():
    x, y, dice = images(5, 4), torch.eye(5), seeded(3)
    by_hand = x, y
    for name in ("crop", "rot90", "cutmix"):
        by_hand = AUGMENTATIONS[name](*by_hand, dice)
    composed = compose("crop, rot90,cutmix")(x, y, seeded(3))
    assert torch.equal(composed[0], by_hand[0]) and torch.equal(composed[1], by_hand[1])
    assert not torch.equal(compose("cutmix,rot90,crop")(x, y, seeded(3))[0], composed[0])


def test_compose_of_nothing_is_the_identity():
    x, y = images(), torch.eye(3)
    for names in ("", "none"):
        out, label = compose(names)(x, y, seeded())
        assert torch.equal(out, x) and torch.equal(label, y)


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    for names in ("hflip,mixup", "hflip,,crop"):
        with pytest.raises(ValueError, match="unknown augmentation '(mixup)?'; known: hflip, vflip"):
            compose(names)


def test_strange_channels_are_an_error():
    with pytest.raises(ValueError, match="RGB"):
        compose(augment.OVERHEAD)(images(C=5), torch.eye(3), seeded())


def test_the_default_for_overhead_images_makes_all_eight_views_of_a_square():
    views, _ = compose("hflip,rot90")(images(1).repeat(100, 1, 1, 1), None, seeded())
    assert len(views.unique(dim=0)) == 8 and augment.OVERHEAD.startswith("hflip,rot90,")


# ---- the demo

def test_the_demo_writes_a_contact_sheet(tmp_path, capsys):
    augment.main(augment.Script(out=str(tmp_path / "new" / "sheet.png")))
    sheet = augment.Image.open(tmp_path / "new" / "sheet.png")
    assert sheet.size == (80 + 8 * 96, (1 + len(AUGMENTATIONS)) * 96)
    assert "copypaste" in capsys.readouterr().out
    augment.main(augment.Script(str(tmp_path / "new" / "sheet.png"), str(tmp_path / "again.png")))
    assert augment.Image.open(tmp_path / "again.png").tobytes() != sheet.tobytes()


def test_a_bad_path_is_one_line_and_exit_code_two(tmp_path, launch):
    same, loop = [tmp_path / "x.png", "--out", tmp_path / "x.png"], tmp_path / "loop.png"
    loop.symlink_to(loop)
    for arguments in ([tmp_path / "none.png"], [augment.__file__], ["--out", tmp_path], same, [loop]):
        told = launch(augment, *arguments)
        assert told.returncode == 2 and len(told.stderr.strip().splitlines()) == 1
