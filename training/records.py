"""One record of any dataset, as the adapters in `tasks.py` see it: by their names, checked, pictures opened.

What is wrong with one record (`RecordError`) is kept apart from what is wrong with the whole source (`ColumnError`):
the first is skipped and counted, the second ends the run before it begins.
"""

import os
import random
import struct
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from modeling_lumina_mgpt.processing_lumina_mgpt import IMAGE

SINTEL_DEPTH = b"PIEH"  # how its files begin
NUMBER_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "F")  # of PIL


class RecordError(ValueError):
    """This record cannot be used: a damaged picture, an empty caption, nobody in it."""


class ColumnError(ValueError):
    """A source has no such column, or has something else in it."""


@dataclass
class Record:
    """A dataset's record under the names that the adapters have for its columns.

    Attributes:
        values: the record.
        columns: adapter's name -> the dataset's, where they differ. A dotted name reaches into structs (and lists of
            them); one with a `*` stands for the list of the columns numbered 1, 2, ... in its place.
        task: a key of `ADAPTERS`.
        target_px: side of the square whose area pictures will be cropped to.
        crop_seed: draws where pictures are cropped; None: centred.
        folder: where relative paths of pictures start.
        crop: by name of a picture's column, the part (left, top, right, bottom; pixels) that is meant.
    """

    values: Mapping[str, Any]
    columns: Mapping[str, str]
    task: str
    processor: Any
    rng: random.Random
    target_px: int
    crop_seed: int | None = None
    folder: str = ""
    crop: Mapping[str, Sequence[int]] | None = None

    def has(self, name: str) -> bool:
        return has_column(self.columns.get(name, name), self.values)

    def holds(self, name: str) -> bool:
        """Whether there is such a column, and something in it."""
        return self.has(name) and self.get(name) is not None

    def get(self, name: str) -> Any:
        """A column's value, None where it is null; ColumnError if there is no such column."""
        path = self.columns.get(name, name)
        if not has_column(path, self.values):
            raise missing_column(name, path, self.values)
        return _reach(self.values, path)

    def text(self, name: str) -> str:
        """A text, or one drawn from a list of them."""
        value = self.get(name)
        if isinstance(value, list | tuple):
            value = self.rng.choice([text for text in value if text] or [None])
        return self.as_text(name, value)

    def as_text(self, name: str, value: Any) -> str:
        if not isinstance(value, str | None):
            raise ColumnError(f"column {name!r} holds {type(value).__name__}: accepted is text")
        if not (text := (value or "").strip()):
            raise RecordError(f"{name} is empty")
        if IMAGE in text:
            raise RecordError(f"{name} has {IMAGE} in it, which stands for a picture")
        return text

    def picture(self, name: str) -> Image.Image:
        """A picture in RGB."""
        return self.as_picture(name, self.get(name))

    def as_picture(self, name: str, value: Any) -> Image.Image:
        picture = self._load(name, self._source(name, value))
        if self.crop and name in self.crop:
            left, top, right, bottom = self.crop[name]
            if right > picture.width or bottom > picture.height:
                raise RecordError(
                    f"{name} of {picture.width}x{picture.height} px: crop {self.crop[name]} is beyond it"
                )
            return picture.crop((left, top, right, bottom))
        return picture

    def numbers(self, name: str, num_dims: int = 2, are_labels: bool = False) -> np.ndarray | None:
        """What a map says of each pixel, (height, width) or (height, width, 3); None for a drawn picture.

        In color it is a drawn one, and in 8 bits too, unless these are labels.
        """
        source = self._source(name, self.get(name))
        try:
            source = _opened(source) if isinstance(source, Path | bytes) else source
        except Exception as error:  # each decoder has errors of its own
            raise RecordError(f"{name}: {error}") from error
        if isinstance(source, str) or (isinstance(source, Image.Image) and source.mode not in NUMBER_MODES):
            return None
        values = np.asarray(source)
        values = values.squeeze(0) if values.ndim == 3 and len(values) == 1 else values
        if values.dtype == np.uint8 and not (are_labels and values.ndim == 2):
            return None
        if values.ndim != num_dims:
            raise ColumnError(f"column {name!r} holds numbers of shape {values.shape}: accepted are {num_dims} axes")
        return values

    def cropped(self, picture: Image.Image, width_px: int, height_px: int) -> Image.Image:
        """Crops that a record's pictures of one size all get alike."""
        generator = None if self.crop_seed is None else torch.Generator().manual_seed(self.crop_seed)
        return self.processor.image_processor.crop(picture, width_px, height_px, generator)

    def bucket(self, picture: Image.Image) -> tuple[int, int]:
        """The size `(width_px, height_px)` that a picture will be cropped to."""
        return self.processor.uni_rep.best_bucket(picture.width, picture.height, self.target_px)

    def prompt(self, words: str | None = None, **options: Any) -> str:
        return self.processor.task_prompt(self.task, words, **options)

    def _source(self, name: str, value: Any) -> Any:
        """A picture as PIL, path, URL, bytes or array."""
        if isinstance(value, Mapping):  # as `datasets` has one that is not decoded
            value = value.get("bytes") or value.get("path")
        if value is None:
            raise RecordError(f"{name} is empty")
        if isinstance(value, str) and not value.startswith(("http://", "https://", "data:")):
            return Path(self.folder, value)
        if isinstance(value, list | np.ndarray | torch.Tensor):
            array = np.asarray(value)
            if array.ndim == 3 and 3 in array.shape and np.issubdtype(array.dtype, np.integer):
                array = array.astype(np.uint8)
            return np.moveaxis(array, 0, -1) if array.ndim == 3 and len(array) == 3 != array.shape[-1] else array
        if not isinstance(value, str | os.PathLike | bytes | Image.Image):
            raise ColumnError(f"column {name!r} holds {type(value).__name__}: accepted is a picture")
        return value

    def _load(self, name: str, source: Any) -> Image.Image:
        try:
            return self.processor.image_processor.load(source)
        except (ValueError, OSError) as error:
            raise RecordError(f"{name}: {error}") from error


def has_column(path: str, columns: Container[str]) -> bool:
    """Whether there is a column, whatever may be in it, for a dotted or numbered name."""
    return path in columns or path.partition(".")[0].replace("*", "1") in columns


def missing_column(name: str, path: str, found: Iterable[str]) -> ColumnError:
    """The error that an adapter's column `name`, here called `path`, is not there."""
    held = ", ".join(found)
    return ColumnError(f"column {name!r}: the dataset has no {path!r}, it has {held}; `columns` names another for it")


def _reach(values: Mapping[str, Any], path: str) -> Any:
    """What a dotted or numbered name stands for."""
    if "*" in path:
        numbered = (path.replace("*", str(number)) for number in range(1, len(values) + 1))
        return [*takewhile(lambda value: value is not None, (values.get(name) for name in numbered))]
    if path in values:
        return values[path]
    first, *keys = path.split(".")
    found: Any = values[first]
    for key in keys:
        found = [_field(item, key, path) for item in found] if isinstance(found, list) else _field(found, key, path)
    return found


def _field(struct_: Any, key: str, path: str) -> Any:
    if struct_ is None:
        return None
    if not isinstance(struct_, Mapping) or key not in struct_:
        held = ", ".join(struct_) if isinstance(struct_, Mapping) else type(struct_).__name__
        raise ColumnError(f"column {path!r}: no {key!r} in {held}")
    return struct_[key]


def _opened(source: Path | bytes) -> Image.Image | np.ndarray:
    """A picture as it is, or the numbers of a NumPy or Sintel depth file."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    if data.startswith(SINTEL_DEPTH):
        width, height = struct.unpack_from("<2i", data, 4)
        return np.frombuffer(data, "<f4", width * height, offset=12).reshape(height, width)
    if data.startswith(b"\x93NUMPY"):
        return np.load(BytesIO(data), allow_pickle=False)
    picture = Image.open(BytesIO(data))
    picture.load()
    return picture
