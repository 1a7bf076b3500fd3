"""Pictures of any kind -> pixels in [-1, 1], cropped to a bucket; and back.

Unlike stock image processors there is no fixed size: each picture keeps its own shape, so pixels come as lists. PIL
does the work: halving with a box filter before the bicubic step is what the models were trained on.
"""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import load_image

from .uni_rep import best_bucket, is_whole

MAX_SIDES_RATIO = 100  # beyond it a strip of a few pixels would be blown up to gigabytes
URL_TIMEOUT_S = 30
BOX_CONTRASTS = (0.08, 0.12, 0.18, 0.27)  # changes of a pixel, in [0, 1], from which on it may count as drawn
ACCEPTED = "a PIL image, a path, a URL, bytes, a uint8 or [0, 1] float array (numpy HWC or HW, torch CHW or HW)"


class LuminaMGPTImageProcessor(BaseImageProcessor):
    """Loads, crops and scales pictures.

    Args:
        round_pixels: whether `postprocess` rounds to 8 bits (Lumina-mGPT 2.0) or truncates (Lumina-mGPT, PURE).
        palette: `[name, red, green, blue]` (0 to 255) of each class that the checkpoint draws in a segmentation.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(self, round_pixels: bool = False, palette: list[list[Any]] | None = None, **kwargs):
        super().__init__(**kwargs)
        self.round_pixels, self.palette = round_pixels, palette

    def preprocess(
        self,
        images: Any,
        buckets: list[tuple[int, int]],
        generator: torch.Generator | None = None,
        return_tensors: Any = None,
    ) -> BatchFeature:
        """Pixels of pictures, each cropped to the bucket that loses least of it.

        Args:
            images: one picture or a list: PIL, path, URL, bytes or array.
            buckets: sizes `(width_px, height_px)` to choose from.
            generator: draws the crops' offsets, as in training; without it they are centred.

        Returns:
            `pixel_values`: list of float32 (3, height_px, width_px) in [-1, 1].
        """
        if not buckets or not all(isinstance(b, tuple | list) and len(b) == 2 and min(b) > 0 for b in buckets):
            raise ValueError(f"buckets {buckets!r}: accepted is a list of (width_px, height_px)")
        images = images if isinstance(images, list | tuple) else [images]
        pixels = []
        for image in map(self.load, images):
            picture = self.crop(image, *best_bucket(image.width, image.height, buckets), generator)
            pixels.append(torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1) / 255 * 2 - 1)
        return BatchFeature({"pixel_values": pixels})

    def postprocess(self, pixels: torch.Tensor) -> list[Image.Image]:
        """Pixels (batch, 3, height_px, width_px) in [-1, 1] -> PIL images."""
        values = (pixels.detach().float().clamp(-1, 1) + 1) / 2 * 255
        values = values.round() if self.round_pixels else values
        return [Image.fromarray(v) for v in values.byte().permute(0, 2, 3, 1).cpu().numpy()]

    def load(self, image: Any) -> Image.Image:
        """Any picture as PIL in RGB, transparent parts on white.

        ValueError for what is no picture, is damaged, or has one side over 100 times as long as the other; OSError for
        a file that cannot be read.
        """
        if isinstance(image, np.ndarray | torch.Tensor):
            image = _from_array(image)
        if not isinstance(image, str | os.PathLike | bytes | Image.Image):
            raise ValueError(f"an image of type {type(image).__name__}: accepted is {ACCEPTED}, or codes (rows, cols)")
        image = _opened(image)
        sides = sorted(image.size)
        if not sides[0]:
            raise ValueError(f"an image of {image.width}x{image.height} px has no pixels")
        if sides[1] > MAX_SIDES_RATIO * sides[0]:
            size = f"{image.width}x{image.height}"
            raise ValueError(f"an image of {size} px: accepted are sides of at most {MAX_SIDES_RATIO} to 1")
        if image.mode.startswith("I;16"):  # PIL would cut off what is above 255
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        elif image.mode == "F":
            image = _from_array(np.asarray(image))
        elif image.mode == "I" and not 0 <= (extrema := image.getextrema())[0] <= extrema[1] <= 255:
            raise ValueError(f"an image of numbers from {extrema[0]} to {extrema[1]}: accepted are 0 to 255")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")

    def to_array(self, picture: Image.Image, task: str = "") -> np.ndarray:
        """What a picture that was drawn for a task says of each of its pixels.

        Returns:
            For "depth" float32 (height, width) in [0, 1], the brightness; the default checkpoint draws near bright.
            For "normal" float32 (height, width, 3), unit vectors (right, up, toward the viewer), drawn as (n + 1) / 2.
            For "segmentation" uint8 (height, width), the nearest color's place in `palette`; ValueError without.
            For all others float32 (height, width, 3), red, green and blue in [0, 1].
        """
        values = np.asarray(self.load(picture), np.float32) / 255
        if task == "depth":
            return values.mean(-1)
        if task == "normal":
            vectors = 2 * values - 1
            return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(min=1e-6)
        if task == "segmentation":
            colors = np.array([color for _, *color in self.check_palette()], np.float32) / 255  # (classes, 3)
            return np.stack([np.square(values - color).sum(-1) for color in colors]).argmin(0).astype(np.uint8)
        return values

    def check_palette(self) -> list[list[Any]]:
        """`palette`; ValueError if there is none, or it is no palette."""
        if not self.palette:
            raise ValueError(
                "no palette is known to tell classes by: set `image_processor.palette` to [[name, red, green, blue]]"
            )
        if not all(len(entry) == 4 and all(isinstance(value, int) for value in entry[1:]) for entry in self.palette):
            raise ValueError(f"palette {self.palette}: accepted is a list of [name, red, green, blue]")
        if len(self.palette) > 256:
            raise ValueError(f"a palette of {len(self.palette)} classes: accepted are up to 256")
        return self.palette

    def find_box(self, drawn: Image.Image, source: Image.Image) -> tuple[int, int, int, int] | None:
        """The box (left, top, right, bottom; pixels, ends excluded) that a picture has and its source has not.

        Its sides are where changes line up, and must be closed for the most part; None if there is no such box. What
        is below a frame may be nearly of its color, and more may have changed a little: several contrasts are tried.
        """
        after, before = _two_of_a_size(drawn, source)
        change = (after - before).abs().amax(0).numpy()  # (height, width)
        return max((_frame(change > contrast) for contrast in BOX_CONTRASTS), key=lambda found: found[1])[0]

    def canny(self, image: Any, low: int = 100, high: int = 200) -> Image.Image:
        """The edges of a picture by OpenCV's Canny, white on black; one in pure black and white is taken for edges."""
        picture = self.load(image)
        gray = np.asarray(picture.convert("L"))
        if ((gray < 16) | (gray > 239)).mean() > 0.95 and np.ptp(np.asarray(picture), axis=-1).mean() < 4:
            return picture
        try:
            import cv2
        except ImportError as error:
            raise ImportError("edges are found by OpenCV: pip install opencv-python-headless") from error
        return Image.fromarray(cv2.Canny(gray, low, high)).convert("RGB")

    def tile(self, image: Any, side_px: int) -> "Tiling":
        """Any picture as squares of 8 px or more."""
        if not is_whole(side_px, 8):
            raise ValueError(f"side_px {side_px!r}: accepted are 8 and more")
        return Tiling(self.load(image), side_px)

    def fix_colors(self, picture: Image.Image, source: Image.Image, method: str) -> Image.Image:
        """The picture with the colors of its source, by "wavelet" or "adain"; both of one size."""
        self.check_color_fix(method)
        return COLOR_FIXES[method](picture, source)

    def check_color_fix(self, method: str) -> None:
        """ValueError for what `fix_colors` does not know."""
        if not isinstance(method, str) or method not in COLOR_FIXES:
            raise ValueError(f"color fix {method!r}: accepted are {', '.join(COLOR_FIXES)}")

    def crop(
        self, image: Image.Image, width_px: int, height_px: int, generator: torch.Generator | None = None
    ) -> Image.Image:
        """Scales a picture until it covers the size, then cuts off what is too much."""
        if not isinstance(generator, torch.Generator | None):
            raise ValueError(f"generator {generator!r}: accepted is a torch.Generator")
        image = self.resize_to_cover(image, width_px, height_px)
        margins = image.width - width_px, image.height - height_px
        if generator is None:
            left, top = (margin // 2 for margin in margins)
        else:
            left, top = (int(torch.randint(margin + 1, (), generator=generator)) for margin in margins)
        return image.crop((left, top, left + width_px, top + height_px))

    def resize_to_cover(self, image: Image.Image, width_px: int, height_px: int) -> Image.Image:
        """The smallest picture of the same shape that covers the size."""
        while image.width >= 2 * width_px and image.height >= 2 * height_px:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = max(width_px / image.width, height_px / image.height)
        size = round(image.width * scale), round(image.height * scale)
        return image.resize(size, Image.Resampling.BICUBIC)


class Tiling:
    """A picture as overlapping squares, for a model that draws squares of one size.

    One that fits into a square is stretched to it (and comes back as large as the square); others are cut up, after
    scaling the shorter side up to the square's if it is shorter.

    Args:
        picture: in RGB.
        side_px: of the squares.
    """

    def __init__(self, picture: Image.Image, side_px: int):
        width, height = picture.size
        self.side_px, self.overlap_px = side_px, side_px // 8
        if max(width, height) <= side_px:
            scale = side_px / max(width, height)
            self.size_px, scaled = (round(width * scale), round(height * scale)), (side_px, side_px)
        else:
            scale = max(1, side_px / min(width, height))
            self.size_px, scaled = (width, height), (round(width * scale), round(height * scale))
        self.picture = picture.resize(scaled, Image.Resampling.BICUBIC)
        self.corners = tile_corners(*scaled, self.side_px, self.overlap_px)

    def cut(self) -> list[Image.Image]:
        """The squares."""
        return [self.picture.crop((x, y, x + self.side_px, y + self.side_px)) for x, y in self.corners]

    def merge(self, tiles: list[Image.Image]) -> Image.Image:
        """The whole from squares in the order of `cut`, faded into each other where they overlap."""
        pixels = [torch.from_numpy(np.array(tile)).movedim(-1, 0).double() for tile in tiles]
        whole = blend_tiles(pixels, self.corners, *self.picture.size, self.overlap_px)
        merged = Image.fromarray(whole.round().byte().movedim(0, -1).numpy())
        return merged.resize(self.size_px, Image.Resampling.BICUBIC)


def tile_corners(width: int, height: int, side: int, overlap: int) -> list[tuple[int, int]]:
    """`(left, top)` of evenly spread tiles that cover a whole, of `side` or, where that is shorter, its own side."""

    def starts(length: int) -> list[int]:
        num_steps = max(0, -(-(length - side) // (side - overlap)))
        return [i * (length - side) // max(num_steps, 1) for i in range(num_steps + 1)]

    return [(left, top) for top in starts(height) for left in starts(width)]


def blend_tiles(
    tiles: list[torch.Tensor], corners: list[tuple[int, int]], width: int, height: int, overlap: int
) -> torch.Tensor:
    """The whole (3, height, width) from tiles (3, ...) at their corners, faded into each other where they overlap."""
    total, weights = (tiles[0].new_zeros(num_channels, height, width) for num_channels in (3, 1))
    for (x, y), tile in zip(corners, tiles, strict=True):
        vertical, horizontal = (_ramp(length, overlap).to(tile) for length in tile.shape[1:])
        place = ..., slice(y, y + len(vertical)), slice(x, x + len(horizontal))
        weight = vertical[:, None] * horizontal
        total[place] += weight * tile
        weights[place] += weight
    return total / weights


def _ramp(length: int, overlap: int) -> torch.Tensor:
    """Weights that rise from either end to 1."""
    distance = torch.arange(1, length + 1)  # to the end
    return torch.minimum(distance, distance.flip(0)).clamp(max=overlap) / overlap


def wavelet_color_fix(picture: Image.Image, source: Image.Image) -> Image.Image:
    """The picture's details over the source's colors; both of one size. (PURE, arXiv 2503.11073)

    Five levels of an undecimated wavelet transform part the two.
    """
    (details, _), (_, colors) = (_wavelet_bands(x) for x in _two_of_a_size(picture, source))
    return _to_picture(details + colors)


def adain_color_fix(picture: Image.Image, source: Image.Image) -> Image.Image:
    """The picture with its channels shifted and scaled to the source's means and deviations; both of one size."""
    x, target = _two_of_a_size(picture, source)
    (deviation, mean), (wanted_deviation, wanted_mean) = (torch.std_mean(y, (1, 2), keepdim=True) for y in (x, target))
    return _to_picture((x - mean) / deviation.clamp(min=1e-5) * wanted_deviation + wanted_mean)


def _wavelet_bands(x: torch.Tensor, num_levels: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low frequencies of (3, height, width), which sum to it."""
    weights = torch.tensor([1.0, 2.0, 1.0])
    kernel = (weights[:, None] * weights / 16).expand(3, 1, 3, 3)
    low = x[None]
    for dilation in (2**level for level in range(num_levels)):
        padded = torch.nn.functional.pad(low, (dilation,) * 4, mode="replicate")
        low = torch.nn.functional.conv2d(padded, kernel, groups=3, dilation=dilation)
    return x - low[0], low[0]


def _two_of_a_size(*pictures: Image.Image) -> list[torch.Tensor]:
    """Float32 (3, height, width) in [0, 1] of each."""
    if not all(isinstance(picture, Image.Image) for picture in pictures):
        raise ValueError(f"pictures {pictures!r}: accepted are two PIL images")
    if len({picture.size for picture in pictures}) > 1:
        raise ValueError(
            f"pictures of {' and '.join(map(str, (p.size for p in pictures)))}: accepted are two of one size"
        )
    return [torch.from_numpy(np.array(p.convert("RGB"), np.float32)).permute(2, 0, 1) / 255 for p in pictures]


def _to_picture(x: torch.Tensor) -> Image.Image:
    return Image.fromarray((x.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


def _frame(changed: np.ndarray) -> tuple[tuple[int, int, int, int] | None, float]:
    """The box that changed pixels `(height, width)` make the sides of, if any, and how closed and hollow it is."""
    if not changed.any():
        return None, 0.0
    (left, right), (top, bottom) = (_extent_of_lines(changed.sum(axis)) for axis in (0, 1))
    box = changed[top:bottom, left:right]
    height, width = box.shape
    band = max(1, min(height, width) // 4)
    sides = box[:band].any(0), box[-band:].any(0), box[:, :band].any(1), box[:, -band:].any(1)
    closed = min(side.mean() for side in sides)
    middle = box[height * 3 // 8 : height * 5 // 8, width * 3 // 8 : width * 5 // 8]
    filled = middle.mean() if middle.size else 1.0
    if closed <= 0.7 or filled >= 0.5:
        return None, 0.0
    return (left, top, right, bottom), closed - filled


def _extent_of_lines(counts: np.ndarray) -> tuple[int, int]:
    """First and last place, the end excluded, where at least half as much changed as where most did."""
    places = np.flatnonzero(counts >= counts.max() / 2)
    return int(places[0]), int(places[-1]) + 1


COLOR_FIXES = {"wavelet": wavelet_color_fix, "adain": adain_color_fix}


def _opened(source: str | os.PathLike | bytes | Image.Image) -> Image.Image:
    """With all pixels read and the right side up."""
    what = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)[:200]
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        what = what.partition("?")[0]  # what follows may be a key
        try:
            source = load_image(source, timeout=URL_TIMEOUT_S)
        except Exception as error:  # of the network, or of the decoder
            raise ValueError(f"{what}: cannot be fetched, or no picture: {type(error).__name__}") from error
    try:
        if what.startswith("data:"):
            image = load_image(source)
        elif isinstance(source, Image.Image):
            image = source
        else:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source))
        image.load()  # a file that was cut short shows only now
        return ImageOps.exif_transpose(image)
    except Exception as error:  # there is no end to what decoders stumble over
        if isinstance(error, OSError) and error.errno is not None and not isinstance(source, Image.Image):
            raise type(error)(error.errno, error.strerror, str(source)) from error
        reason = f": {error}" if isinstance(error, Image.DecompressionBombError) else ""
        raise ValueError(f"{what}: not a picture in a format that PIL reads, or damaged{reason}") from error


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    shape = tuple(array.shape)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array  # numpy has no bfloat16
        array = (array.movedim(0, -1) if array.ndim == 3 else array).numpy()
    channels = array.shape[-1] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        raise ValueError(f"an array of shape {shape}: accepted is {ACCEPTED}")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"a float array from {array.min()} to {array.max()}: accepted is [0, 1]")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"an array of {array.dtype}: accepted is {ACCEPTED}")
    return Image.fromarray(array.squeeze(-1) if array.ndim == 3 and channels == 1 else array)


LuminaMGPTImageProcessor.register_for_auto_class()
