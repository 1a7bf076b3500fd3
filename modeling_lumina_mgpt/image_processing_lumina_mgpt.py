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

from .uni_rep import best_bucket

ACCEPTED = "a PIL image, a path, a URL, bytes, a uint8 or [0, 1] float array (numpy HWC or HW, torch CHW or HW)"


class LuminaMGPTImageProcessor(BaseImageProcessor):
    """Loads, crops and scales pictures.

    Args:
        round_pixels: whether `postprocess` rounds to 8 bits (Lumina-mGPT 2.0) or truncates (Lumina-mGPT, PURE).
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(self, round_pixels: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.round_pixels = round_pixels

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
        """Any picture as PIL in RGB, transparent parts on white; ValueError for what is no picture."""
        if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
            image = load_image(image)
        elif isinstance(image, str | os.PathLike | bytes):
            image = _open(image)
        elif isinstance(image, np.ndarray | torch.Tensor):
            image = _from_array(image)
        if not isinstance(image, Image.Image):
            raise ValueError(f"an image of type {type(image).__name__}: accepted is {ACCEPTED}, or codes (rows, cols)")
        if not image.width or not image.height:
            raise ValueError(f"an image of {image.width}x{image.height} px has no pixels")
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")

    def crop(
        self, image: Image.Image, width_px: int, height_px: int, generator: torch.Generator | None = None
    ) -> Image.Image:
        """Scales a picture until it covers the size, then cuts off what is too much."""
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


def _open(source: str | os.PathLike | bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source))
        image.load()  # a file that was cut short shows only now
        return image
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (OSError, SyntaxError) as error:
        what = f"{len(source)} bytes" if isinstance(source, bytes) else source
        raise ValueError(f"{what}: not a picture in a format that PIL reads") from error


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array  # numpy has no bfloat16
        array = (array.movedim(0, -1) if array.ndim == 3 else array).numpy()
    channels = array.shape[-1] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ValueError(f"an array of shape {array.shape}: accepted is {ACCEPTED}")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"a float array from {array.min()} to {array.max()}: accepted is [0, 1]")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"an array of {array.dtype}: accepted is {ACCEPTED}")
    return Image.fromarray(array.squeeze(-1) if array.ndim == 3 and channels == 1 else array)


LuminaMGPTImageProcessor.register_for_auto_class()
