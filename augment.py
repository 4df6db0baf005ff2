"""The traditional augmentations of the lecture, from first principles.

Augmentation changes a picture in ways that keep its meaning: so a classifier learns what does not matter.
It is the yardstick for synthetic data, as a generator must help more than a flip and a crop, which are free.

Everything works on whole batches, on their device, with parameters drawn per image, in two layers:

    rotate(x, degrees)                 the mathematics: nothing random, each parameter is a tensor (B,)
    draw(x, y, generator) -> (x, y)    the dice: AUGMENTATIONS["rotate"]; compose("hflip,rotate") chains them

    x   images, float (B, C, H, W) in [-1, 1]. Channels are RGB triples (one picture; or two, after and before
        a disaster: C = 6), then perhaps one mask, > 0 on the object (C = 4 or 7).
    y   labels, float (B, K), a distribution over the classes per image, because two augmentations mix them.

Geometry moves all channels together. Colour and Cutout change both pictures examples, noise each by itself; they
leave the mask.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw

from data import Settings, flag, launch, save_picture


def per_image(values, like):
    """(B,) -> (B, 1, 1, ...), to broadcast over a tensor with the axes of `like`, in its precision."""
    values = values.to(like.dtype) if values.is_floating_point() else values
    return values.view(-1, *[1] * (like.dim() - 1))


# ---- geometry: one inverse map; flips and quarter turns are exact without it ----

def warp(x, column, row):
    """Give each output pixel what lies at another place of its image (bilinear).

    u, v are the output pixel's centre, in pixels to the right of and below the image's centre. The place is
    a u + b v + c to the right and d u + e v + f below; column = (a, b, c), row = (d, e, f), numbers or (B,).
    Outside, the image goes on as its own reflection: black corners would tell which images were augmented.
    """
    H, W = x.shape[-2:]
    u = torch.arange(W, device=x.device, dtype=x.dtype)[:, None] - (W - 1) / 2         # (W, 1)
    v = torch.arange(H, device=x.device, dtype=x.dtype)[:, None, None] - (H - 1) / 2   # (H, 1, 1)

    # grid_sample counts from edge to edge as -1 .. 1 (align_corners=False). We convert to that only after
    # the map in pixels, so angles are right on images that are not square.
    zero = x.new_zeros(len(x))
    by_u, by_v, shift = (torch.stack((p * (2 / W) + zero, q * (2 / H) + zero), dim=-1).to(x)[:, None, None]
                         for p, q in zip(column, row, strict=True))                    # each (B, 1, 1, 2)
    grid = (by_u * u + shift) + by_v * v                                               # (B, H, W, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def rotate(x, degrees):
    """Turn about the centre, counter-clockwise as seen on the picture (in which rows count downwards)."""
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    return warp(x, (cos, -sin, 0), (sin, cos, 0))


def scale(x, factor):
    """Zoom about the centre; factor > 1 magnifies. Far below 1 it would alias: nothing is smoothed before."""
    return warp(x, (1 / factor, 0, 0), (0, 1 / factor, 0))


def translate(x, dx, dy):
    """Move dx pixels to the right and dy pixels down; fractions are allowed."""
    return warp(x, (1, 0, -dx), (0, 1, -dy))


def crop(x, top, left, height, width):
    """Stretch the window [top, top + height) x [left, left + width), in (parts of) pixels, to H x W."""
    H, W = x.shape[-2:]
    return warp(x, (width / W, 0, left + (width - W) / 2), (0, height / H, top + (height - H) / 2))


def hflip(x):
    """Flip left and right."""
    return x.flip(-1)


def vflip(x):
    """Flip top and bottom."""
    return x.flip(-2)


def rot90(x, turns):
    """Turn by quarters counter-clockwise, integers (B,). Raises ValueError unless the images are square."""
    if x.shape[-2] != x.shape[-1]:
        raise ValueError(f"rot90 needs square images, not {x.shape[-2]} x {x.shape[-1]}")
    pixel = torch.arange(x.shape[-1] ** 2, device=x.device).view(x.shape[-2:])
    views = torch.stack([pixel.rot90(k).flatten() for k in range(4)])                  # (4, H W): source
    index = views[turns % 4][:, None].expand(-1, x.shape[1], -1)                       # (B, C, H W)
    return x.flatten(-2).gather(-1, index).view(x.shape)


# ---- colour: a 3 x 3 matrix on each pixel's red, green and blue ----
# Seen from black each change is linear, so several are one matrix, the product, and one pass over the pixels.
# Only contrast looks at the rest of the picture too: take a pixel as its picture's mean colour and a detail
# on top of it. Contrast f is brightness f on the detail and saturation f on the mean, whose grey it keeps.

BLACK = -1
GREY = 0.299, 0.587, 0.114      # red, green and blue in the brightness that the eye sees (ITU-R BT.601)


def take_apart(x):
    """Take (B, C, H, W) apart: its P pictures, (B, P, 3, H, W), and its mask, (B, 0 or 1, H, W).

    Raises ValueError if the channels are not as the top of this file says.
    """
    C = x.shape[1]
    if C < 3 or C % 3 == 2:
        raise ValueError(f"channels must be RGB triples and at most one mask, not {C} in all")
    return rearrange(x[:, :C - C % 3], "b (p c) h w -> b p c h w", c=3), x[:, C - C % 3:]


def put_together(rgb, mask):
    """Undo `take_apart`."""
    x = rearrange(rgb, "b p c h w -> b (p c) h w")
    return torch.cat((x, mask), dim=1) if mask.shape[1] else x


def brightness_matrix(factor):
    """f I, (B, 3, 3)."""
    return factor.view(-1, 1, 1) * torch.eye(3, dtype=factor.dtype, device=factor.device)


def saturation_matrix(factor):
    """f I + (1 - f) times the matrix whose three rows are GREY, (B, 3, 3)."""
    row = torch.stack([(1 - factor) * weight for weight in GREY], dim=-1)              # (B, 3)
    return brightness_matrix(factor) + row[:, None]


def contrast_matrices(factor):
    """One for the detail, one for the mean colour, (2, B, 3, 3)."""
    return torch.stack((brightness_matrix(factor), saturation_matrix(factor)))


def hue_matrix(shift):
    """The rotation about the grey axis (1, 1, 1), from red towards green, by `shift` turns, (B, 3, 3)."""
    k = torch.arange(3, dtype=shift.dtype, device=shift.device)
    return (1 + 2 * torch.cos(2 * math.pi * (shift.view(-1, 1, 1) - (k[:, None] - k) / 3))) / 3


def recolour(x, *matrices):
    """Multiply each pixel by the product of the matrices, the last one first; cut off at black and at full.

    Each is (B, 3, 3), or (2, B, 3, 3) with one for the detail and one for the mean colour of the picture.
    """
    rgb, mask = take_apart(x)
    with torch.autocast(x.device.type, enabled=False):    # bfloat16 is coarser than 8-bit colour
        product = functools.reduce(torch.matmul, matrices).to(x.dtype)
        on_detail, on_mean = product.expand(2, -1, -1, -1)[:, :, None]                 # each (B, 1, 3, 3)
        mean = rgb.mean((-2, -1))[..., None]                                           # (B, P, 3, 1)
        offset = on_mean @ (mean - BLACK) + BLACK - on_detail @ mean
        out = (on_detail @ rgb.flatten(-2)).add_(offset).clamp_(BLACK, 1)
    return put_together(out.view(rgb.shape), mask)


def adjust_brightness(x, factor):
    """0 gives black, 1 the image itself."""
    return recolour(x, brightness_matrix(factor))


def adjust_contrast(x, factor):
    """0 gives the picture's mean grey all over, 1 the image itself."""
    return recolour(x, contrast_matrices(factor))


def adjust_saturation(x, factor):
    """0 gives the grey picture, 1 the image itself."""
    return recolour(x, saturation_matrix(factor))


def adjust_hue(x, shift):
    """Turn every hue by `shift` turns: 1/3 makes red green, green blue, and blue red.

    A pixel keeps the mean of its R, G and B; with torchvision it keeps the largest and the smallest (HSV).
    """
    return recolour(x, hue_matrix(shift))


def adjust_color(x, brightness, contrast, saturation, shift):
    """All four at once. The first three commute, and a small turn of the hue nearly does.

    So there is no order to draw. torchvision shuffles the four, and cuts off after each.
    """
    return recolour(x, brightness_matrix(brightness), contrast_matrices(contrast),
                    saturation_matrix(saturation), hue_matrix(shift))


# ---- noise, holes, and mixing two images ----

def add_noise(x, noise, sigma):
    """Noise injection: `noise` ~ N(0, 1) has the shape of x, sigma (B,) takes black to white as 1."""
    rgb, _ = take_apart(x + 2 * per_image(sigma, x) * noise)
    return put_together(rgb.clamp(BLACK, 1), take_apart(x)[1])


def box(x, cy, cx, height, width):
    """True (B, 1, H, W) in a height x width box about pixel (cy, cx), cut by the border; integers (B,)."""
    rows = torch.arange(x.shape[-2], device=x.device)[:, None]
    columns = torch.arange(x.shape[-1], device=x.device)
    top, left, height, width = (per_image(p, x) for p in (cy - height // 2, cx - width // 2, height, width))
    return (top <= rows) & (rows < top + height) & (left <= columns) & (columns < left + width)


def cutout(x, cy, cx, side):
    """Make a square mid-grey, which is 0 (DeVries and Taylor 2017, arXiv 1708.04552).

    It may stick out of the image, as in the paper; squares that were always inside would hide more.
    """
    rgb, mask = take_apart(x)
    return put_together(rgb.masked_fill(box(x, cy, cx, side, side)[:, None], 0), mask)


def cutmix(x, y, partner, cy, cx, height, width):
    """Fill a box of image i, mask and all, from image partner[i] (Yun et al. 2019, arXiv 1905.04899).

    The labels mix by the pixels that are really there from each, counted after the border has cut the box.
    """
    inside = box(x, cy, cx, height, width)
    kept = 1 - inside.to(y.dtype).mean((-2, -1))                                       # lambda, (B, 1)
    return torch.where(inside, x[partner], x), kept * y + (1 - kept) * y[partner]


def copy_paste(x, y, partner):
    """Put the object of image partner[i] onto image i (Ghiasi et al. 2021, arXiv 2012.07177).

    A label speaks of one object, so label and mask are the pasted object's, and the one that was there is now
    background. If the partner's mask is empty nothing happens. Raises ValueError if there is no mask channel.
    """
    if x.shape[1] % 3 != 1:
        raise ValueError(f"copypaste needs a mask channel after the pictures: C = 4 or 7, not {x.shape[1]}")
    pasted = x[partner]
    on_object = pasted[:, -1:] > 0                                                     # (B, 1, H, W)
    found = on_object.flatten(1).any(1)                                                # (B,)
    rgb, _ = take_apart(torch.where(on_object, pasted, x))
    _, mask = take_apart(torch.where(per_image(found, x), pasted, x))
    return put_together(rgb, mask), torch.where(per_image(found, y), y[partner], y)


# ---- the dice: nothing here waits for the device ----

def uniform(x, low, high, generator):
    """Draw one number per image, (B,)."""
    return low + (high - low) * torch.rand(len(x), generator=generator, device=x.device)


def anywhere(x, generator):
    """Draw the row and the column of a pixel per image, each (B,)."""
    return (torch.randint(n, (len(x),), generator=generator, device=x.device) for n in x.shape[-2:])


def partners(x, generator):
    """Draw another image for each, (B,): its neighbour in a random circle. One alone is its own."""
    circle = uniform(x, 0, 1, generator).argsort()
    return circle.roll(1)[circle.argsort()]


def sometimes(flip):
    """Make the draw that flips half of the images."""
    def draw(x, y, generator):
        flipped = flip(x)           # the result goes there too: on a CPU new memory costs more than the work
        return torch.where(per_image(uniform(x, 0, 1, generator) < 0.5, x), flipped, x, out=flipped), y
    return draw


def strength(change, low, high):
    """Make the draw that gives `change` a parameter between low and high."""
    def draw(x, y, generator):
        return change(x, uniform(x, low, high, generator)), y
    return draw


def random_rot90(x, y, generator):
    """An overhead image has no privileged direction, so this is the domain's own augmentation."""
    return rot90(x, torch.randint(4, (len(x),), generator=generator, device=x.device)), y


def random_scale(x, y, generator):
    """Little, as a pixel is so many metres; log-uniform: as often 1.25 times larger as 1.25 times smaller."""
    return scale(x, uniform(x, -math.log(1.25), math.log(1.25), generator).exp()), y


def random_translate(x, y, generator):
    """Up to a tenth of the image each way."""
    H, W = x.shape[-2:]
    return translate(x, uniform(x, -0.1, 0.1, generator) * W, uniform(x, -0.1, 0.1, generator) * H), y


def random_crop(x, y, generator):
    """Random resized crop: 40 to 100 % of the area, width to height 3 : 4 to 4 : 3 (log-uniform), inside.

    Szegedy et al. (2015, arXiv 1409.4842) go down to 8 %, which loses what a scene is about. A side longer
    than the image's is shortened to it. Pixels at the edge mix with their neighbours outside.
    """
    H, W = x.shape[-2:]
    area = uniform(x, 0.4, 1, generator) * H * W
    ratio = uniform(x, math.log(3 / 4), math.log(4 / 3), generator).exp()
    height, width = (area / ratio).sqrt().clamp(max=H), (area * ratio).sqrt().clamp(max=W)
    top, left = uniform(x, 0, 1, generator) * (H - height), uniform(x, 0, 1, generator) * (W - width)
    return crop(x, top, left, height, width), y


def random_color(x, y, generator):
    """Colour jitter, as strong as its four parts below."""
    factors = (uniform(x, 0.7, 1.3, generator) for _ in range(3))
    return adjust_color(x, *factors, uniform(x, -0.05, 0.05, generator)), y


def random_noise(x, y, generator):
    """A strength between none and a tenth of the way from black to white."""
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return add_noise(x, noise, uniform(x, 0, 0.1, generator)), y


def random_cutout(x, y, generator):
    """A third of the image's side: the paper has half of it for CIFAR-10, a quarter for CIFAR-100."""
    side = torch.full((len(x),), min(x.shape[-2:]) // 3, device=x.device)
    return cutout(x, *anywhere(x, generator), side), y


def random_cutmix(x, y, generator):
    """On half of the images, a box for each (the authors: one per batch), its area uniform: Beta(1, 1)."""
    on = uniform(x, 0, 1, generator) < 0.5
    side = (uniform(x, 0, 1, generator) * on).sqrt()
    height, width = ((side * n).long() for n in x.shape[-2:])
    return cutmix(x, y, partners(x, generator), *anywhere(x, generator), height, width)


def random_copypaste(x, y, generator):
    """On half of the images. The paper flips and rescales both images before: "hflip,scale,copypaste"."""
    itself = torch.arange(len(x), device=x.device)
    return copy_paste(x, y, torch.where(uniform(x, 0, 1, generator) < 0.5, partners(x, generator), itself))


AUGMENTATIONS = {
    "hflip": sometimes(hflip),
    "vflip": sometimes(vflip),
    "rot90": random_rot90,
    "rotate": strength(rotate, -180, 180),
    "scale": random_scale,
    "translate": random_translate,
    "crop": random_crop,
    "brightness": strength(adjust_brightness, 0.7, 1.3),
    "contrast": strength(adjust_contrast, 0.7, 1.3),
    "saturation": strength(adjust_saturation, 0.7, 1.3),
    "hue": strength(adjust_hue, -0.05, 0.05),    # little: another roof may be as red, but no meadow is
    "color": random_color,
    "noise": random_noise,
    "cutout": random_cutout,
    "cutmix": random_cutmix,
    "copypaste": random_copypaste,
}

# All eight ways to lay down a square picture (vflip adds none), then the frame, then the light.
OVERHEAD = "hflip,rot90,crop,color"


def compose(names):
    """A function (x, y, generator) -> (x, y) from names: "hflip,rot90,crop"; "" and "none" change nothing.

    generator: a torch.Generator on x's device, or None for torch's own. Raises ValueError for unknown names.
    """
    wanted = [] if names.strip() in ("", "none") else [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in AUGMENTATIONS]
    if unknown:
        known = ", ".join(AUGMENTATIONS)
        raise ValueError(f"unknown augmentation {', '.join(map(repr, unknown))}; known: {known}")

    def augment(x, y, generator):
        for name in wanted:
            x, y = AUGMENTATIONS[name](x, y, generator)
        return x, y
    return augment


# ---- python augment.py: a contact sheet ----

def settlement(size):
    """A red roof and, as the mask's object, a round white tank, seen from above: (1, 4, size, size)."""
    v, u = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    roof, tank = torch.maximum((u + 0.6).abs(), (v + 0.5).abs()) < 0.25, u**2 + v**2 < 0.1
    ground = torch.stack((0.3 + 0.5 * roof, 0.5 + 0.1 * u - 0.3 * roof, 0.25 + 0.1 * v))
    return torch.cat((torch.where(tank, 0.95, ground), tank[None]))[None] * 2 - 1


def contact_sheet(x):
    """A row of the batch x per augmentation, and its name: a PIL image."""
    size, generator = x.shape[-1], torch.Generator().manual_seed(0)
    rows = {"original": compose("none"), **AUGMENTATIONS}
    sheet = Image.new("RGB", (80 + len(x) * size, len(rows) * size), "white")
    for k, (name, draw) in enumerate(rows.items()):
        strip = rearrange(draw(x, torch.eye(len(x)), generator)[0][:, :3], "b c h w -> h (b w) c")
        sheet.paste(Image.fromarray(((strip + 1) * 127.5).round().byte().numpy()), (80, k * size))
        ImageDraw.Draw(sheet).text((8, k * size + size // 2), name, fill="black")
    return sheet


@dataclass
class Script(Settings):
    """The flags of this script."""
    out: str = flag("runs/augment.png", "where the sheet goes")


def main(cfg):
    """Draw a contact sheet of all augmentations."""
    one = settlement(96)
    other = adjust_hue(one.flip(-1).roll(24, -1), torch.tensor([0.5]))       # so that mixing two shows
    save_picture(contact_sheet(torch.cat((other, one)).repeat(4, 1, 1, 1)), cfg.out)
    print(f"{cfg.out}: a row each for {', '.join(AUGMENTATIONS)}")


if __name__ == "__main__":
    launch(main, Script)
