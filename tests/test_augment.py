"""augment.py against textbook formulas, loops over pixels and exact identities, in float64."""
import math
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import augment
from augment import AUGMENTATIONS, compose

GEOMETRY = "hflip", "vflip", "rot90", "rotate", "scale", "translate", "crop"
MIXING = "cutmix", "copypaste"
KINDS = "brightness", "contrast", "saturation", "hue"
MATRICES = {kind: getattr(augment, f"{kind}_matrix") for kind in KINDS}


def images(B=3, C=3, H=8, W=8):
    """Random images in float64; a mask channel holds a square, at another place in each image."""
    x = torch.rand(B, C, H, W, generator=seeded(), dtype=torch.float64) * 2 - 1
    if C % 3 == 1:
        x[:, -1] = -1
        for i in range(B):
            x[i, -1, 1 + i % 3:4 + i % 3, 2:5] = 1
    return x


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- geometry: the formulas

def bilinear(image, row, column):
    """The value of image (C, H, W) between pixel centres; beyond the border it is mirrored."""
    def mirrored(i, n):
        i %= 2 * n
        return min(i, 2 * n - 1 - i)

    H, W = image.shape[1:]
    top, left, value = math.floor(row), math.floor(column), 0
    for r, c in product((top, top + 1), (left, left + 1)):
        weight = (1 - abs(row - r)) * (1 - abs(column - c))
        value = value + weight * image[:, mirrored(r, H), mirrored(c, W)]
    return value


def assert_looked_up(out, x, place):
    """Every pixel of out is x at place(image, row, column), which returns a row and a column."""
    B, _, H, W = x.shape
    for i, row, column in product(range(B), range(H), range(W)):
        assert_close(out[i, :, row, column], bilinear(x[i], *place(i, row, column)))


def test_warp_is_bilinear_interpolation_at_the_mapped_place():
    def place(i, row, column):
        u, v = column - 3.5, row - 2                                  # from the centre of 5 x 8
        right, down = a[i] * u + b * v + c[i], d * u + e[i] * v + f
        return 2 + down, 3.5 + right

    a, b, c = [0.8, 1.1], -0.3, [0.5, -2.25]
    d, e, f = 0.4, [1.2, 0.7], 1.0
    x = images(2, H=5, W=8)
    out = augment.warp(x, (float64(*a), b, float64(*c)), (d, float64(*e), f))
    assert_looked_up(out, x, place)


def test_rotation_is_the_textbook_map():
    def place(i, row, column):
        right, up = column - 3.5, 2 - row
        cos, sin = 0.75**0.5, 0.5                                     # turned back, clockwise
        return 2 - (up * cos - right * sin), 3.5 + right * cos + up * sin

    x = images(1, H=5, W=8)
    assert_looked_up(augment.rotate(x, float64(30)), x, place)


def test_crop_is_the_window_of_each_image_and_scale_two_is_the_middle():
    def place(i, row, column):
        top, left, height, width = windows[i]                         # from centre to centre
        return top + (row + 0.5) * height / 6 - 0.5, left + (column + 0.5) * width / 9 - 0.5

    windows = [(1.0, 2.5, 4.0, 5.0), (0.0, 0.0, 3.0, 9.0), (1.5, 2.25, 3.0, 4.5)]
    x = images(3, H=6, W=9)
    out = augment.crop(x, *float64(*windows).T)
    assert_looked_up(out, x, place)
    assert_close(augment.scale(x, float64(1, 1, 2))[2], out[2])


def test_rotation_by_90_degrees_is_a_quarter_turn_counter_clockwise():
    x = images(4)
    turned = augment.rot90(x, torch.tensor([0, 1, 2, -1]))
    assert_close(turned, augment.rotate(x, float64(0, 90, 180, -90)))
    for quarters in range(4):
        assert torch.equal(turned[quarters], x[quarters].rot90(quarters, (-2, -1)))
    with pytest.raises(ValueError, match="square images, not 4 x 6"):
        augment.rot90(images(H=4, W=6), torch.zeros(3, dtype=torch.long))


def test_translation_moves_right_and_down_by_pixels_and_mirrors_the_rest():
    x = images(1, H=6, W=9)
    moved = augment.translate(x, float64(2), float64(1))
    assert_close(moved[:, :, 1:, 2:], x[:, :, :-1, :-2])
    assert_close(moved[:, :, 1:, :2], x[:, :, :-1, :2].flip(-1))


# ---- colour: the formulas

def textbook(x, kind, amount):
    """One change of colour of one picture (3, H, W) in [-1, 1], not yet clipped.

    Brightness, contrast and saturation blend with another picture, as torchvision and Pillow do.
    Hue turns about the grey axis by Rodrigues' formula.
    """
    rgb = (x + 1) / 2
    if kind == "hue":
        axis, angle = torch.full_like(rgb, 3**-0.5), 2 * math.pi * amount
        along = axis * (axis * rgb).sum(0)
        across = torch.cross(axis, rgb, dim=0)
        turned = rgb * math.cos(angle) + across * math.sin(angle) + along * (1 - math.cos(angle))
        return turned * 2 - 1

    grey = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    other = {"brightness": 0 * grey, "contrast": grey.mean(), "saturation": grey}[kind]
    return (amount * rgb + (1 - amount) * other) * 2 - 1


@pytest.mark.parametrize("kind, amounts", [
    ("brightness", (0.4, 1.0, 1.7)), ("contrast", (0.0, 0.6, 1.9)),
    ("saturation", (0.0, 0.5, 1.8)), ("hue", (0.2, -0.45, 0.8))])
@pytest.mark.parametrize("pictures, mask", [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_each_matrix_is_its_formula_on_every_picture(kind, amounts, pictures, mask):
    x = images(3, 3 * pictures + mask, H=6, W=10)
    x[:, :3, :2] = 0.3                                                # the pictures' means differ
    out = augment.recolour(x, MATRICES[kind](float64(*amounts)))
    for i, p in product(range(3), range(pictures)):
        rgb = slice(3 * p, 3 * p + 3)
        assert_close(out[i, rgb], textbook(x[i, rgb], kind, amounts[i]).clamp(-1, 1))
    assert torch.equal(out[:, 3 * pictures:], x[:, 3 * pictures:])


@pytest.mark.parametrize("kinds", [KINDS, (*KINDS[2::-1], "hue"), ("hue", *KINDS[:3])])
def test_a_product_of_matrices_is_the_changes_in_turn_the_last_one_first(kinds):
    expected = x = images(1)[0] * 0.3 - 0.2
    amounts = dict(brightness=1.2, contrast=0.8, saturation=1.3, hue=0.3)
    for kind in reversed(kinds):
        expected = textbook(expected, kind, amounts[kind])
    assert expected.abs().max() < 1                                   # so nothing is clipped
    matrices = [MATRICES[kind](float64(amounts[kind])) for kind in kinds]
    assert_close(augment.recolour(x[None], *matrices)[0], expected)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_colour_keeps_its_precision_under_autocast(dtype, error):
    x = images(1, 6).to(dtype)
    matrices = [MATRICES[kind](torch.tensor([0.8])) for kind in KINDS]
    plain = augment.recolour(x, *matrices)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment.recolour(x, *matrices), plain) and plain.dtype == dtype
    exact = augment.recolour(x.double(), *(matrix.double() for matrix in matrices))
    assert_close(plain.double(), exact, rtol=0, atol=error)


# ---- noise, holes, and mixing two images: the formulas

def test_noise_has_its_deviation_and_is_clipped():
    x = torch.zeros(2, 4, 64, 64)
    out = augment.add_noise(x, torch.randn(x.shape, generator=seeded()), torch.tensor([0.05, 5.0]))
    assert_close(out[0, :3].std() / 2, torch.tensor(0.05), atol=0.001, rtol=0)   # from -1 to 1 is 1
    assert out.abs().max() == 1 and not out[:, 3].any()


def pixels_of(cy, cx, height, width, H, W):
    """The pixels (row, column) in a box about (cy, cx) that are in the image."""
    top, left = cy - height // 2, cx - width // 2
    return [(row, column) for row in range(H) for column in range(W)
            if top <= row < top + height and left <= column < left + width]


def test_cutout_is_a_mid_grey_square_that_the_border_cuts():
    x, area = images(3, C=7, H=8, W=10).clamp(min=0.1), [16, 6, 9]
    centres = [(4, 5), (0, 9), (7, 1)]
    out = augment.cutout(x, *torch.tensor(centres).T, torch.full((3,), 4))
    for i, centre in enumerate(centres):
        hole, expected = pixels_of(*centre, 4, 4, 8, 10), x[i].clone()
        for r, c in hole:
            expected[:6, r, c] = 0                                    # both pictures, not the mask
        assert torch.equal(out[i], expected) and len(hole) == area[i]


def test_cutmix_mixes_the_labels_by_counted_pixels():
    x, y = images(3, C=4, H=8, W=12), torch.eye(3, dtype=torch.float64)
    partner, area = torch.tensor([1, 2, 0]), [24, 9, 0]
    boxes = [(4, 6, 4, 6), (0, 11, 5, 5), (7, 0, 0, 8)]               # cy, cx, height, width
    out, mixed = augment.cutmix(x, y, partner, *torch.tensor(boxes).T)
    for i, box in enumerate(boxes):
        inside, expected = pixels_of(*box, 8, 12), x[i].clone()
        for r, c in inside:
            expected[:, r, c] = x[partner[i], :, r, c]                # the mask, too
        assert torch.equal(out[i], expected) and len(inside) == area[i]
        lam = 1 - len(inside) / (8 * 12)
        assert_close(mixed[i], lam * y[i] + (1 - lam) * y[partner[i]])


def test_copy_paste_brings_the_object_its_label_and_its_mask():
    x, y = images(3, C=7), torch.eye(3, dtype=torch.float64)
    x[2, 6] = -1                                                      # image 2 has no object
    out, label = augment.copy_paste(x, y, torch.tensor([1, 2, 0]))
    for i, j, source in ((0, 1, 1), (1, 2, 1), (2, 0, 0)):            # source: of label and mask
        expected, pasted = x[i].clone(), x[j, 6] > 0
        expected[:6, pasted] = x[j, :6, pasted]
        expected[6] = x[source, 6]
        assert torch.equal(out[i], expected) and torch.equal(label[i], y[source])
    with pytest.raises(ValueError, match="C = 4 or 7 channels, not 6"):
        compose("hflip,copypaste")(images(C=6), y, seeded())
    with pytest.raises(ValueError, match="RGB triples and at most one mask, not 5"):
        compose("color")(images(C=5), None, seeded())


def test_each_image_is_the_partner_of_another_one_and_half_of_them_are_pasted():
    for B in range(2, 65):
        partner = augment.partners(torch.zeros(B, 1), seeded())
        assert (partner != torch.arange(B)).all() and len(partner.unique()) == B
    _, y = AUGMENTATIONS["copypaste"](torch.ones(400, 4, 2, 2), torch.eye(400), seeded())
    assert 0.4 < y.diagonal().mean() < 0.6


# ---- what all of them promise

@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_keeps_its_inputs_its_range_and_its_seed(name, no_waiting):
    for C in (4, 7) if name == "copypaste" else (3, 4, 6, 7):
        dtype = torch.bfloat16 if C == 6 else torch.float32
        x, y = images(5, C, 16, 16).to(dtype), torch.eye(5)
        with no_waiting():                                            # for the device
            runs = [AUGMENTATIONS[name](x, y, seeded(seed)) for seed in (0, 0, 1, 2, 3)]
        assert torch.equal(x, images(5, C, 16, 16).to(dtype)) and torch.equal(y, torch.eye(5))
        for out, label in runs:
            assert out.shape == x.shape and out.dtype == dtype and out.abs().max() <= 1
            assert_close(label.sum(1), torch.ones(5))
        assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
        assert not all(torch.equal(runs[0][0], out) for out, _ in runs)
        assert (name in MIXING) != all(torch.equal(label, y) for _, label in runs)
        if name in MIXING:                                            # there is nothing to mix with
            alone = AUGMENTATIONS[name](x[:1], y[:1], seeded())
            assert torch.equal(alone[0], x[:1]) and torch.equal(alone[1], y[:1])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_mask_moves_with_the_picture_and_colour_leaves_it(name):
    x = images(5, C=4)
    x[:, 0] = x[:, 3]                                                 # red is the mask
    out, _ = AUGMENTATIONS[name](x, torch.eye(5), seeded())
    if name in GEOMETRY or name == "cutmix":
        assert torch.equal(out[:, 3], out[:, 0]) and not torch.equal(out[:, 3], x[:, 3])
    elif name != "copypaste":
        assert torch.equal(out[:, 3], x[:, 3]) and not torch.equal(out[:, 0], x[:, 0])


def test_flips_mirror_half_of_the_images_and_with_rot90_show_all_eight_views():
    x = float64(0, 1, 2, 3).view(1, 1, 2, 2).repeat(1000, 1, 1, 1)
    for name, mirrored in (("hflip", [1, 0, 3, 2]), ("vflip", [2, 3, 0, 1])):
        out, _ = AUGMENTATIONS[name](x, None, seeded())
        flipped = (out.flatten(1) == float64(*mirrored)).all(1)
        assert torch.equal(out[~flipped], x[~flipped]) and abs(flipped.double().mean() - 0.5) < 0.05
    views, _ = compose("hflip,rot90")(x, None, seeded())
    assert len(views.unique(dim=0)) == 8 and augment.OVERHEAD.startswith("hflip,rot90,")


# ---- how the parameters are drawn

def parameters_of(name, monkeypatch, function, *shape):
    """What the augmentation called `name` hands to the function for so many images, after x."""
    seen = []
    monkeypatch.setattr(augment, function, lambda x, *parameters: seen.extend(parameters) or x)
    AUGMENTATIONS[name](torch.zeros(shape), None, seeded())
    return seen


def assert_fills(values, low, high):
    edge = 0.02 * (high - low)
    assert low <= values.min() < low + edge and high - edge < values.max() <= high + 1e-6


@pytest.mark.parametrize("kind", MATRICES)
def test_a_colour_is_drawn_between_its_bounds_alone_and_in_color(kind, monkeypatch):
    x, (low, high) = images(5), (-0.05, 0.05) if kind == "hue" else (0.7, 1.3)
    expected = augment.recolour(x, MATRICES[kind](augment.uniform(x, low, high, seeded())))
    assert_close(AUGMENTATIONS[kind](x, None, seeded())[0], expected)
    for name in MATRICES:
        monkeypatch.setattr(augment, f"{name}_matrix", lambda values: values)
    drawn = parameters_of("color", monkeypatch, "recolour", 2000, 3, 2, 2)
    assert_fills(drawn[KINDS.index(kind)], low, high)
    assert len({values[0].item() for values in drawn}) == 4


def test_moves_zooms_and_noise_fill_their_ranges(monkeypatch):
    shape = 20000, 1, 20, 40
    assert_fills(*parameters_of("rotate", monkeypatch, "rotate", *shape), -180, 180)
    dx, dy = parameters_of("translate", monkeypatch, "translate", *shape)
    assert_fills(dx, -4, 4)
    assert_fills(dy, -2, 2)
    noise, sigma = parameters_of("noise", monkeypatch, "add_noise", *shape)
    assert_fills(sigma, 0, 0.1)
    assert noise.shape == shape and abs(noise.std() - 1) < 0.01
    factor, = parameters_of("scale", monkeypatch, "scale", *shape)
    assert_fills(factor, 1 / 1.25, 1.25)
    assert abs(factor.log().mean()) < 0.005                           # uniform would be 0.017


def test_crop_windows_lie_inside_and_have_their_areas_and_ratios(monkeypatch):
    top, left, height, width = parameters_of("crop", monkeypatch, "crop", 20000, 1, 32, 48)
    assert min(top.min(), left.min()) >= 0
    assert (top + height).max() <= 32.001 and (left + width).max() <= 48.001
    area, ratio = height * width / (32 * 48), width / height
    assert 0.39 < area.min() < 0.41 and area.max() > 0.9
    uncut = area < 0.5                                                # no side is shortened here
    assert_fills(ratio[uncut], 0.75 - 1e-6, 4 / 3)
    assert abs(ratio[uncut].log().mean()) < 0.01                      # uniform would be 0.03


def test_cutout_puts_a_third_of_the_side_anywhere_so_the_border_cuts_some():
    out, _ = AUGMENTATIONS["cutout"](torch.ones(300, 3, 12, 18), None, seeded())
    areas = (out[:, 0] == 0).sum((1, 2))
    assert areas.max() == 16 and areas.min() == 4
    assert abs((areas < 16).float().mean() - (1 - 9 / 12 * 15 / 18)) < 0.1


def test_cutmix_has_uniform_areas_on_half_of_the_images(monkeypatch):
    *_, cy, cx, height, width = parameters_of("cutmix", monkeypatch, "cutmix", 4000, 1, 32, 64)
    on = height > 0
    area = (height * width)[on] / (32 * 64)
    assert abs(on.float().mean() - 0.5) < 0.05 and len(area.unique()) > 20
    assert abs(area.mean() - 0.5) < 0.05 and abs(area.median() - 0.5) < 0.05      # Beta(1, 1)
    assert (width - 2 * height).abs().max() <= 1                      # the shape of the image
    assert cy.unique().tolist() == [*range(32)] and cx.unique().tolist() == [*range(64)]


# ---- names, the contact sheet

def test_compose_applies_the_names_in_order_from_one_generator():
    x, y, generator = images(5, 4), torch.eye(5), seeded(3)
    by_hand = x, y
    for name in ("crop", "rot90", "cutmix"):
        by_hand = AUGMENTATIONS[name](*by_hand, generator)
    composed = compose("crop, rot90,cutmix")(x, y, seeded(3))
    assert torch.equal(composed[0], by_hand[0]) and torch.equal(composed[1], by_hand[1])
    assert all(compose(names)(x, y, seeded())[0] is x for names in ("", "none"))


def test_the_script_draws_a_row_for_every_augmentation(tmp_path):
    path, rows = tmp_path / "new" / "sheet.png", 1 + len(AUGMENTATIONS)
    augment.main(path)
    sheet = np.array(Image.open(path)).reshape(rows, 98, 96 + 8 * 98, 3)
    assert len({row[:, :96].tobytes() for row in sheet}) == rows      # every name and
    assert len({row[:, 96:].tobytes() for row in sheet}) == rows      # every effect is another
