"""Sharp pictures -> what cameras, networks and years leave of them, and how bad it is in words.

Two rounds of blur, resizing, noise and JPEG, with the ranges of Real-ESRGAN (arXiv 2107.10833, 3.2). Everything is
drawn from one `random.Random`, so a record is degraded the same way each time.
"""

import io
import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import pad

FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
DEGREES = ("slightly", "clearly", "heavily")  # each of a third of all pictures, at a scale of 4


@dataclass(frozen=True)
class Round:
    """Ranges and chances of one round.

    Attributes:
        blur: chance of a blur.
        sigma_px: of its Gaussian.
        up, down: chances of enlarging and shrinking.
        scale: of the sides.
        noise: standard deviation of Gaussian noise, in steps of 8 bits.
        poisson: strength of shot noise.
    """

    blur: float
    sigma_px: tuple[float, float]
    up: float
    down: float
    scale: tuple[float, float]
    noise: tuple[float, float]
    poisson: tuple[float, float]


ROUNDS = (
    Round(1.0, (0.2, 3.0), 0.2, 0.7, (0.15, 1.5), (1, 30), (0.05, 3.0)),
    Round(0.8, (0.2, 1.5), 0.3, 0.4, (0.3, 1.2), (1, 25), (0.05, 2.5)),
)
ANISOTROPIC, GRAY_NOISE, SINC = 0.4, 0.4, 0.8  # chances: of a blur that is not round, noise without color, ringing
JPEG_QUALITY = (30, 95)


@dataclass
class Degradation:
    """What was done to a picture.

    Attributes:
        blur_px: standard deviation of all blurs together, in pixels of the sharp picture.
        noise: standard deviation of what is left of all noise, in steps of 8 bits.
        jpeg_quality: the lower one.
    """

    blur_px: float = 0.0
    noise: float = 0.0
    jpeg_quality: int = 100

    def __str__(self) -> str:
        """One sentence, such as "The image is clearly blurred, slightly noisy and heavily compressed."."""
        blurred, noisy = _degree(self.blur_px, 2.7, 3.5), _degree(self.noise, 12.0, 18.0)
        return f"The image is {blurred} blurred, {noisy} noisy and {_degree(-self.jpeg_quality, -60, -40)} compressed."

    def add_blur(self, blur_px: float) -> None:
        self.blur_px = math.hypot(self.blur_px, blur_px)


def degrade(picture: Image.Image, scale: float, rng: random.Random) -> tuple[Image.Image, Degradation]:
    """A picture `scale` times smaller, after two rounds of degradation, and what was done."""
    done, noises = Degradation(), np.random.default_rng(rng.getrandbits(64))
    small = round(picture.width / scale), round(picture.height / scale)
    result = picture
    for ranges in ROUNDS:
        is_first = ranges is ROUNDS[0]
        if rng.random() < ranges.blur:
            along_px, across_px = rng.uniform(*ranges.sigma_px), rng.uniform(*ranges.sigma_px)
            across_px = across_px if rng.random() < ANISOTROPIC else along_px
            result = _filtered(result, _gaussian(along_px, across_px, rng.uniform(0, math.pi)))
            done.add_blur(math.sqrt(along_px * across_px) * picture.width / result.width)
        sides = rng.uniform(1, ranges.scale[1]), rng.uniform(ranges.scale[0], 1), 1.0
        (side,) = rng.choices(sides, (ranges.up, ranges.down, 1 - ranges.up - ranges.down))
        width, height = (max(1, round(px * side)) for px in (picture.size if is_first else small))
        result = _resized(result, (width, height), picture.width, done, rng)
        result = _noisy(result, ranges, done, rng, noises)
        if is_first:
            result = _compressed(result, done, rng)
    return _finished(result, small, picture.width, done, rng), done


def _finished(
    picture: Image.Image, size: tuple[int, int], sharp_width_px: int, done: Degradation, rng: random.Random
) -> Image.Image:
    """The last resize with its ringing, and JPEG before or after."""
    jpeg_first = rng.random() < 0.5
    picture = _compressed(picture, done, rng) if jpeg_first else picture
    picture = _resized(picture, size, sharp_width_px, done, rng)
    if rng.random() < SINC:
        picture = _filtered(picture, _sinc(rng.uniform(math.pi / 3, math.pi)))
    return picture if jpeg_first else _compressed(picture, done, rng)


def _gaussian(sigma_x: float, sigma_y: float, angle: float, radius: int = 10) -> torch.Tensor:
    """A Gaussian (21, 21), turned by `angle`, that sums to 1."""
    y, x = torch.meshgrid(*[torch.arange(-radius, radius + 1.0)] * 2, indexing="ij")
    along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    kernel = torch.exp(-0.5 * ((along / sigma_x) ** 2 + (across / sigma_y) ** 2))
    return kernel / kernel.sum()


def _sinc(cutoff: float, radius: int = 10) -> torch.Tensor:
    """A circular low-pass filter (21, 21), which rings around edges; `cutoff` in radians a pixel."""
    y, x = torch.meshgrid(*[torch.arange(-radius, radius + 1.0)] * 2, indexing="ij")
    distance = torch.hypot(x, y)
    kernel = cutoff * torch.special.bessel_j1(cutoff * distance) / (2 * math.pi * distance)
    kernel[radius, radius] = cutoff**2 / (4 * math.pi)
    return kernel / kernel.sum()


def _filtered(picture: Image.Image, kernel: torch.Tensor) -> Image.Image:
    """Convolved through Fourier space, where a large kernel costs no more than a small one."""
    radius = len(kernel) // 2
    x = pad(torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1), (radius,) * 4, mode="replicate")
    size = x.shape[-2:]
    kernel = pad(kernel, (0, size[1] - len(kernel), 0, size[0] - len(kernel))).roll((-radius, -radius), (0, 1))
    x = torch.fft.irfft2(torch.fft.rfft2(x) * torch.fft.rfft2(kernel), size)
    x = x[:, radius:-radius, radius:-radius].round().clamp(0, 255).byte()
    return Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())


def _resized(
    picture: Image.Image, size: tuple[int, int], sharp_width_px: int, done: Degradation, rng: random.Random
) -> Image.Image:
    """By a filter of chance. Shrinking evens out noise; what is smaller than a pixel is lost."""
    done.noise /= max(1.0, picture.width / size[0])
    done.add_blur(sharp_width_px / size[0] / math.sqrt(12))  # the deviation within a pixel
    return picture.resize(size, rng.choice(FILTERS))


def _noisy(
    picture: Image.Image, ranges: Round, done: Degradation, rng: random.Random, noises: np.random.Generator
) -> Image.Image:
    """With Gaussian or shot noise, colored or gray."""
    clean = np.array(picture, np.float32)
    channels = 1 if rng.random() < GRAY_NOISE else 3
    if rng.random() < 0.5:
        noise = noises.normal(0, rng.uniform(*ranges.noise), (*clean.shape[:2], channels))
    else:
        light = (clean if channels == 3 else clean.mean(-1, keepdims=True)) / 255
        noise = (noises.poisson(light * 256) / 256 - light) * 255 * rng.uniform(*ranges.poisson)
    done.noise = math.hypot(done.noise, noise.std())
    return Image.fromarray((clean + noise).round().clip(0, 255).astype(np.uint8))


def _compressed(picture: Image.Image, done: Degradation, rng: random.Random) -> Image.Image:
    quality = rng.randint(*JPEG_QUALITY)
    done.jpeg_quality = min(done.jpeg_quality, quality)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def _degree(value: float, clear: float, heavy: float) -> str:
    return DEGREES[(value >= clear) + (value >= heavy)]
