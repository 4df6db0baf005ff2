"""The traditional augmentations of the lecture, from first principles.

An augmentation changes a picture but not its meaning, so that a classifier learns what does not
matter. It is the yardstick for synthetic data: a flip and a crop are free, a generator is not.

Everything works on whole batches, on their device, in two layers:

    rotate(x, degrees)                  the formula: each parameter is a tensor (B,)
    AUGMENTATIONS["rotate"](x, y, rng)  draws a parameter for each image; returns new x, y

    x   images, float (B, C, H, W) in [-1, 1]. Channels are RGB triples: one picture, or two, after
        and before a disaster (C = 6). A mask, > 0 on the object, may follow (C = 4 or 7).
    y   labels, float (B, K): for each image a distribution over the classes, as CutMix mixes two.

Geometry moves all channels together. Colour and Cutout change two pictures in the same way, noise
differs between them, and all three leave the mask as it is.
"""
import functools
import math

import torch
import torch.nn.functional as F
from einops import rearrange

from data import grid, save_picture, to_uint8


def per_image(values, x):
    """Return values (B,) as (B, 1, 1, ...), to broadcast over x (B, ...), in the precision of x."""
    values = values.to(x.dtype) if values.is_floating_point() else values
    return values.view(-1, *[1] * (x.dim() - 1))


# ---- geometry: one map for all, but flips and quarter turns are exact without it

def warp(x, column, row):
    """Return images whose pixels are looked up at other places of x, bilinearly: (B, C, H, W).

    Let (u, v) be a pixel's place, in pixels to the right of the image's centre and below it. Its
    value is looked up at (a u + b v + c, d u + e v + f). column = (a, b, c) and row = (d, e, f)
    hold numbers or tensors (B,). Beyond its border the image goes on as its own reflection: black
    corners would tell which images were augmented.
    """
    H, W = x.shape[-2:]
    u = torch.arange(W, device=x.device, dtype=x.dtype) - (W - 1) / 2
    v = torch.arange(H, device=x.device, dtype=x.dtype) - (H - 1) / 2
    zero = x.new_zeros(len(x))

    def grid_units(right, down):
        # grid_sample counts from -1 at one edge to 1 at the other (align_corners=False). We convert
        # only after the map in pixels, so that angles are right on images that are not square.
        pair = torch.stack((right * (2 / W) + zero, down * (2 / H) + zero), dim=-1)
        return pair.to(x)[:, None, None]                                           # (B, 1, 1, 2)

    by_u, by_v, shift = map(grid_units, column, row)
    place = (by_u * u[:, None] + shift) + by_v * v[:, None, None]                  # (B, H, W, 2)
    return F.grid_sample(x, place, "bilinear", padding_mode="reflection", align_corners=False)


def rotate(x, degrees):
    """Return images turned about their centre, counter-clockwise as one looks at the picture."""
    cos = degrees.deg2rad().cos()
    sin = degrees.deg2rad().sin()
    return warp(x, (cos, -sin, 0), (sin, cos, 0))


def scale(x, factor):
    """Return images magnified by a factor about their centre; far below 1 there is aliasing."""
    return warp(x, (1 / factor, 0, 0), (0, 1 / factor, 0))


def translate(x, dx, dy):
    """Return images moved dx pixels to the right and dy pixels down; fractions are allowed."""
    return warp(x, (1, 0, -dx), (0, 1, -dy))


def crop(x, top, left, height, width):
    """Return the window [top, top + height) x [left, left + width), in pixels, resized to H x W."""
    H, W = x.shape[-2:]
    return warp(x, (width / W, 0, left + (width - W) / 2), (0, height / H, top + (height - H) / 2))


def rot90(x, turns):
    """Return images turned by quarters counter-clockwise, integers (B,). They must be square."""
    H, W = x.shape[-2:]
    if H != W:
        raise ValueError(f"rot90 needs square images, not {H} x {W}")
    place = torch.arange(H * W, device=x.device).view(H, W)                        # of each pixel
    source = torch.stack([place.rot90(k).flatten() for k in range(4)])             # (4, H W)
    index = source[turns % 4][:, None].expand(-1, x.shape[1], -1)                  # (B, C, H W)
    return x.flatten(-2).gather(-1, index).view(x.shape)


# ---- colour: a 3 x 3 matrix on each pixel's red, green and blue
# Measured from black, each change of colour is a matrix M. Several in a row are the product of
# their matrices, so all of them cost one pass over the pixels.
#
# Contrast f looks at the rest of the picture too. Take a pixel as m + d: the mean colour m of its
# picture, and a detail d on top. Contrast makes it (f m + (1 - f) grey(m)) + f d, which is
# saturation f for the mean and brightness f for the detail: one matrix for each of them.
BLACK = -1
GREY = 0.299, 0.587, 0.114      # weights of R, G, B in the brightness that we see (ITU-R BT.601)


def split_mask(x):
    """Return the P pictures in x (B, C, H, W), (B, P, 3, H, W), and its mask, (B, 0 or 1, H, W)."""
    C = x.shape[1]
    if C < 3 or C % 3 == 2:
        raise ValueError(f"channels must be RGB triples and at most one mask, not {C} in all")
    rgb = rearrange(x[:, :C - C % 3], "b (p c) h w -> b p c h w", c=3)
    return rgb, x[:, C - C % 3:]


def join_mask(rgb, mask):
    """Return the x (B, C, H, W) that `split_mask` took apart."""
    x = rearrange(rgb, "b p c h w -> b (p c) h w")
    return torch.cat((x, mask), dim=1) if mask.shape[1] else x


def brightness_matrix(factor):
    """Return f I, (B, 3, 3), for factors f (B,): 0 gives black, 1 changes nothing."""
    return factor.view(-1, 1, 1) * torch.eye(3, dtype=factor.dtype, device=factor.device)


def saturation_matrix(factor):
    """Return f I + (1 - f) G, (B, 3, 3); each row of G is GREY, so 0 gives the grey picture."""
    row = torch.stack([(1 - factor) * weight for weight in GREY], dim=-1)          # (B, 3)
    return brightness_matrix(factor) + row[:, None]


def contrast_matrix(factor):
    """Return two, for the detail and for the mean, (2, B, 3, 3); 0 leaves the grey of the mean."""
    return torch.stack((brightness_matrix(factor), saturation_matrix(factor)))


def hue_matrix(shift):
    """Return the rotation by `shift` turns about the grey axis, (B, 3, 3): 1/3 makes red green.

    A pixel keeps the mean of its R, G and B. (In torchvision it keeps the largest and smallest.)
    """
    k = torch.arange(3, dtype=shift.dtype, device=shift.device)
    thirds = (k[:, None] - k) / 3
    return (1 + 2 * torch.cos(2 * math.pi * (shift.view(-1, 1, 1) - thirds))) / 3


def recolour(x, *matrices):
    """Return x with each pixel multiplied by the product of the matrices, clipped to [-1, 1].

    The last matrix acts first. Each is (B, 3, 3), or (2, B, 3, 3) as that of contrast.
    """
    rgb, mask = split_mask(x)
    with torch.autocast(x.device.type, enabled=False):      # bfloat16 is coarser than 8-bit colour
        product = functools.reduce(torch.matmul, matrices).to(x.dtype)
        on_detail, on_mean = product.expand(2, -1, -1, -1)[:, :, None]             # (B, 1, 3, 3)

        # on_detail (pixel - mean) + on_mean (mean - BLACK) + BLACK, as one product and one sum
        mean = rgb.mean((-2, -1))[..., None]                                       # (B, P, 3, 1)
        offset = on_mean @ (mean - BLACK) + BLACK - on_detail @ mean
        out = (on_detail @ rgb.flatten(-2)).add_(offset).clamp_(BLACK, 1)
    return join_mask(out.view(rgb.shape), mask)


# ---- noise, holes, and mixing two images

def add_noise(x, noise, sigma):
    """Return x plus sigma (B,) times noise N(0, 1), in units of the way from black to white."""
    rgb, _ = split_mask(x + 2 * per_image(sigma, x) * noise)
    _, mask = split_mask(x)
    return join_mask(rgb.clamp(BLACK, 1), mask)


def box(x, cy, cx, height, width):
    """Return True in a box about pixel (cy, cx), cut by the border, (B, 1, H, W); integers (B,)."""
    row = torch.arange(x.shape[-2], device=x.device)[:, None]                      # (H, 1)
    column = torch.arange(x.shape[-1], device=x.device)                            # (W,)
    top = per_image(cy - height // 2, x)
    left = per_image(cx - width // 2, x)
    in_rows = (top <= row) & (row < top + per_image(height, x))
    return in_rows & (left <= column) & (column < left + per_image(width, x))


def cutout(x, cy, cx, side):
    """Return x with a mid-grey square, perhaps cut by the border (DeVries & Taylor, 1708.04552)."""
    rgb, mask = split_mask(x)
    inside = box(x, cy, cx, side, side)[:, None]
    return join_mask(rgb.masked_fill(inside, 0), mask)


def cutmix(x, y, partner, cy, cx, height, width):
    """Return x, y with a box of image i filled from image partner[i], the mask included.

    Labels are mixed by the number of pixels from each, counted after the border has cut the box:
    lambda y_i + (1 - lambda) y_partner (Yun et al. 2019, 1905.04899).
    """
    inside = box(x, cy, cx, height, width)
    mixed = torch.where(inside, x[partner], x)
    lam = 1 - inside.to(y.dtype).mean((-2, -1))                                    # (B, 1)
    return mixed, lam * y + (1 - lam) * y[partner]


def copy_paste(x, y, partner):
    """Return x, y with the object of image partner[i] on image i (Ghiasi et al. 2021, 2012.07177).

    A label describes one object, so label and mask are those of the pasted object, and the old
    object becomes background. If the partner's mask is empty, nothing changes.
    """
    if x.shape[1] % 3 != 1:
        raise ValueError(f"copypaste needs a mask in x: C = 4 or 7 channels, not {x.shape[1]}")
    other = x[partner]
    on_object = other[:, -1:] > 0                                                  # (B, 1, H, W)
    pasted = on_object.flatten(1).any(1)                                           # (B,)
    rgb, _ = split_mask(torch.where(on_object, other, x))
    _, mask = split_mask(torch.where(per_image(pasted, x), other, x))
    return join_mask(rgb, mask), torch.where(per_image(pasted, y), y[partner], y)


# ---- random parameters: nothing here waits for the device

def uniform(x, low, high, rng):
    """Return a random number between low and high for each image of x, (B,)."""
    return low + (high - low) * torch.rand(len(x), generator=rng, device=x.device)


def integer(x, n, rng):
    """Return a random integer in 0 .. n - 1 for each image of x, (B,)."""
    return torch.randint(n, (len(x),), generator=rng, device=x.device)


def partners(x, rng):
    """Return another image's index for each, (B,): its neighbour in a random circle."""
    circle = uniform(x, 0, 1, rng).argsort()
    return circle.roll(1)[circle.argsort()]


def random_flip(axis):
    """Return the augmentation that flips each image along an axis with probability 1/2."""
    def augment(x, y, rng):
        flipped = x.flip(axis)
        chosen = per_image(uniform(x, 0, 1, rng) < 0.5, x)
        return torch.where(chosen, flipped, x, out=flipped), y      # new memory would cost more
    return augment


def random_rot90(x, y, rng):
    """Turn by 0 to 3 quarters. This suits overhead images, in which no direction is special."""
    return rot90(x, integer(x, 4, rng)), y


def random_rotate(x, y, rng):
    """Turn by any angle."""
    return rotate(x, uniform(x, -180, 180, rng)), y


def random_scale(x, y, rng):
    """Scale by 0.8 to 1.25, log-uniformly: more would belie the size of a pixel on the ground."""
    return scale(x, uniform(x, -math.log(1.25), math.log(1.25), rng).exp()), y


def random_translate(x, y, rng):
    """Move by up to a tenth of the image in each direction."""
    H, W = x.shape[-2:]
    dx = uniform(x, -0.1, 0.1, rng) * W
    dy = uniform(x, -0.1, 0.1, rng) * H
    return translate(x, dx, dy), y


def random_crop(x, y, rng):
    """Crop 40 to 100 % of the area, width to height 3 : 4 to 4 : 3 (log-uniform), and resize it.

    Szegedy et al. (2015, 1409.4842) go down to 8 % of the area, which loses what a scene is about.
    """
    H, W = x.shape[-2:]
    area = uniform(x, 0.4, 1, rng) * H * W
    ratio = uniform(x, math.log(3 / 4), math.log(4 / 3), rng).exp()
    height = (area / ratio).sqrt().clamp(max=H)
    width = (area * ratio).sqrt().clamp(max=W)

    top = uniform(x, 0, 1, rng) * (H - height)
    left = uniform(x, 0, 1, rng) * (W - width)
    return crop(x, top, left, height, width), y


def jitter(matrix, low, high):
    """Return the augmentation that recolours by a matrix, its parameter between low and high."""
    def augment(x, y, rng):
        return recolour(x, matrix(uniform(x, low, high, rng))), y
    return augment


def random_color(x, y, rng):
    """Change brightness, contrast, saturation and hue at once, as strongly as each one alone.

    The first three commute, and a small turn of the hue nearly does, so no order is drawn.
    (torchvision shuffles the four, and clips after each.)
    """
    return recolour(x, brightness_matrix(uniform(x, 0.7, 1.3, rng)),
                    contrast_matrix(uniform(x, 0.7, 1.3, rng)),
                    saturation_matrix(uniform(x, 0.7, 1.3, rng)),
                    hue_matrix(uniform(x, -0.05, 0.05, rng))), y


def random_noise(x, y, rng):
    """Add noise of a deviation between 0 and a tenth of the way from black to white."""
    noise = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
    return add_noise(x, noise, uniform(x, 0, 0.1, rng)), y


def random_cutout(x, y, rng):
    """Cut out a square of a third of the side. (The paper: 1/2 for CIFAR-10, 1/4 for CIFAR-100.)"""
    H, W = x.shape[-2:]
    side = torch.full((len(x),), min(H, W) // 3, device=x.device)
    return cutout(x, integer(x, H, rng), integer(x, W, rng), side), y


def random_cutmix(x, y, rng):
    """Mix half of the images, each by a box of its own (the authors: one box for a batch).

    The box has the shape of the image, and its area is uniform, which is Beta(1, 1).
    """
    H, W = x.shape[-2:]
    mixed = uniform(x, 0, 1, rng) < 0.5
    side = (uniform(x, 0, 1, rng) * mixed).sqrt()                                  # 0 mixes nothing
    partner = partners(x, rng)
    cy = integer(x, H, rng)
    cx = integer(x, W, rng)
    return cutmix(x, y, partner, cy, cx, (side * H).long(), (side * W).long())


def random_copypaste(x, y, rng):
    """Paste onto half of the images. The paper flips and scales before: "hflip,scale,copypaste"."""
    itself = torch.arange(len(x), device=x.device)
    pasted = uniform(x, 0, 1, rng) < 0.5
    return copy_paste(x, y, torch.where(pasted, partners(x, rng), itself))


AUGMENTATIONS = {
    "hflip": random_flip(-1),
    "vflip": random_flip(-2),
    "rot90": random_rot90,
    "rotate": random_rotate,
    "scale": random_scale,
    "translate": random_translate,
    "crop": random_crop,
    "brightness": jitter(brightness_matrix, 0.7, 1.3),
    "contrast": jitter(contrast_matrix, 0.7, 1.3),
    "saturation": jitter(saturation_matrix, 0.7, 1.3),
    "hue": jitter(hue_matrix, -0.05, 0.05),     # little: meadows must stay green
    "color": random_color,
    "noise": random_noise,
    "cutout": random_cutout,
    "cutmix": random_cutmix,
    "copypaste": random_copypaste,
}

# All eight ways to lay down a square picture (vflip adds none), then the frame, then the light.
OVERHEAD = "hflip,rot90,crop,color"


def compose(names):
    """Return a function (x, y, rng) -> (x, y) for names such as "hflip,rot90,crop".

    "" and "none" change nothing. rng: a torch.Generator on x's device, or None for the global one
    of torch. Raises ValueError for unknown names.
    """
    wanted = [] if names.strip() in ("", "none") else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in AUGMENTATIONS:
            raise ValueError(f"unknown augmentation {name!r}; known: {', '.join(AUGMENTATIONS)}")

    def augment(x, y, rng):
        for name in wanted:
            x, y = AUGMENTATIONS[name](x, y, rng)
        return x, y
    return augment


# ---- python augment.py: a contact sheet

def settlement(size):
    """Return a red roof and, as the object of the mask, a round tank: (1, 4, size, size)."""
    v, u = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    roof = torch.maximum((u + 0.6).abs(), (v + 0.5).abs()) < 0.25
    tank = u**2 + v**2 < 0.1
    ground = torch.stack((0.3 + 0.5 * roof, 0.5 - 0.3 * roof, 0.25 + 0.1 * v))
    return torch.cat((torch.where(tank, 0.95, ground), tank[None]))[None] * 2 - 1


def contact_sheet(x):
    """Return a PIL image with a row for each augmentation: its name, and the batch x after it."""
    rng = torch.Generator().manual_seed(0)
    names = ["none", *AUGMENTATIONS]
    rows = [compose(name)(x, torch.eye(len(x)), rng)[0] for name in names]
    pictures = to_uint8(torch.cat(rows))
    labels = [name for name in names for _ in x]
    return grid(pictures, len(x), names=labels)


def main(path="runs/augment.png"):
    """Draw a contact sheet of all augmentations, on two pictures, four times each."""
    one = settlement(96)
    other = crop(one, *torch.tensor([[0], [0], [70], [70]]))
    other = recolour(other, brightness_matrix(torch.tensor([0.8])), hue_matrix(torch.tensor([0.9])))
    save_picture(contact_sheet(torch.cat((one, other)).repeat_interleave(4, 0)), path)
    print(f"look at {path}: a row each for {', '.join(AUGMENTATIONS)}")


if __name__ == "__main__":
    main()
