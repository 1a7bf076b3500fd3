"""Uni-Rep: one unambiguous token layout for images of any size (arXiv 2408.02657).

An image of `rows` x `cols` codes becomes `start, size(height), size(width), (cols codes, end-of-line) x rows, end`.
This is the ground floor: nothing else knows an id, a row end or a bucket. `ImageLayout` is what the decoder needs (its
ids, sizes, grammar); `UniRep` adds the order of the codes, which only the processor needs. The grammar works on whole
batches, one image state per row, and never leaves the device. All ids and codes are int64.
"""

import re
from dataclasses import dataclass, field, fields
from itertools import takewhile
from numbers import Integral
from reprlib import repr as excerpt
from typing import Any

import torch
from torch import Tensor

MAX_ASPECT_RATIO = 4
MAX_SIZE_UNITS = 128  # the names go on in Chameleon's vocabulary, as thousands of unused reserved tokens
START, END, END_OF_LINE, END_OF_TURN = "<racm3:break>", "<eoss>", "<reserved08799>", "<reserved08706>"
CODE_NAME = re.compile(r"IMGIMG(?P<letters>[A-J]+)Z|<MOVQGAN(?P<digits>\d+)>")
TEXT, HEIGHT, WIDTH, CODES = range(4)  # what the next token may be


@dataclass(eq=False)
class ImageLayout:
    """Ids and sizes of images in a token sequence.

    Attributes:
        start_id, end_id, end_of_line_id, end_of_turn_id: the control tokens.
        size_ids: entry `n - 1` is the token of size `n`, in size units.
        code_id_ranges: `[first, last + 1]` of each run of image-code ids.
        size_unit_px: pixels of one step of the size tokens.
        codes_per_size_unit: codes on each side of a size unit.
    """

    start_id: int
    end_id: int
    end_of_line_id: int
    end_of_turn_id: int
    size_ids: list[int]
    code_id_ranges: list[list[int]]
    size_unit_px: int
    codes_per_size_unit: int
    _tensors: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def code_px(self) -> int:
        """Pixels on each side of a code."""
        return self.size_unit_px // self.codes_per_size_unit

    def layout_dict(self) -> dict[str, Any]:
        """The plain values that restore this layout: `ImageLayout(**layout_dict)`."""
        return {f.name: getattr(self, f.name) for f in fields(ImageLayout) if f.init}

    # Sizes

    def grid(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Code rows and columns of an image; ValueError for a size that has no representation."""
        for name, px in (("height", height_px), ("width", width_px)):
            limit = len(self.size_ids) * self.size_unit_px
            if not is_whole(px, 1) or px % self.size_unit_px or px > limit:
                raise ValueError(f"{name} {px!r} px: accepted are multiples of {self.size_unit_px} up to {limit}")
        rows, cols = (px // self.size_unit_px * self.codes_per_size_unit for px in (height_px, width_px))
        return rows, cols

    def num_tokens(self, rows, cols):
        """Length of a whole image, for ints or tensors."""
        return rows * (cols + 1) + 4

    def header(self, rows: int, cols: int) -> list[int]:
        """The start and size tokens of an image; ValueError for a grid that has no representation."""
        ids = [self.start_id]
        for num_codes in (rows, cols):
            units, rest = divmod(num_codes, self.codes_per_size_unit)
            if rest or not 1 <= units <= len(self.size_ids):
                step, limit = self.codes_per_size_unit, len(self.size_ids) * self.codes_per_size_unit
                raise ValueError(f"{rows}x{cols} codes: accepted sides are multiples of {step} up to {limit}")
            ids.append(self.size_ids[units - 1])
        return ids

    def buckets(self, target_px: int) -> list[tuple[int, int]]:
        """Sizes `(width_px, height_px)` of about `target_px` squared pixels, widest first, aspect ratio at most 4."""
        if not is_whole(target_px, 1) or target_px % self.size_unit_px:
            raise ValueError(f"target {target_px!r} px: accepted are multiples of {self.size_unit_px}")
        area = (target_px // self.size_unit_px) ** 2
        sizes, width, height = [], area, 1
        while width > 0:
            if max(width, height) <= min(MAX_ASPECT_RATIO * min(width, height), len(self.size_ids)):
                sizes.append((width * self.size_unit_px, height * self.size_unit_px))
            if width * (height + 1) <= area:
                height += 1
            else:
                width -= 1
        if not sizes:
            largest = len(self.size_ids) * self.size_unit_px
            raise ValueError(f"target {target_px} px: no size of that area has sides of at most {largest} px")
        return sizes

    def best_bucket(self, width_px: int, height_px: int, target_px: int) -> tuple[int, int]:
        """The bucket `(width_px, height_px)` that loses least of an image to cropping."""
        return best_bucket(width_px, height_px, self.buckets(target_px))

    # Grammar

    def size_of_id(self, ids: Tensor) -> Tensor:
        """Size in units that each id stands for, 0 for other ids. (batch) -> (batch)"""
        matches = ids[..., None] == self._sizes(ids.device)  # (batch, sizes)
        return (matches * self._units(ids.device)).sum(-1)

    def is_beginning(self, ids: Tensor, rows: int, cols: int) -> bool:
        """Whether an image of so many code rows and columns, 0 where not known, may begin with ids `(length)`."""
        if ids[0] != self.start_id or not all((rows, cols)[: len(ids) - 1]):
            return False
        if len(ids) <= 3:
            return True
        step, codes = torch.arange(3, len(ids)), torch.cat([torch.arange(*ends) for ends in self.code_id_ranges])
        forced = self.forced_next(step, torch.full_like(step, rows), torch.full_like(step, cols))
        fits = torch.where(forced >= 0, ids[3:] == forced, torch.isin(ids[3:], codes))
        return len(ids) < self.num_tokens(rows, cols) and bool(fits.all())

    def forced_next(self, step: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """The id that must come next, or -1 where there is a choice.

        Args:
            step: (batch) tokens since and including the start token, 0 outside of an image.
            rows, cols: (batch) code rows and columns of the image, 0 where not known yet.
        """
        offset = step - 3
        forced = torch.where(offset % (cols + 1) == cols, self.end_of_line_id, -1)
        forced = torch.where(offset == rows * (cols + 1), self.end_id, forced)
        side = torch.where(step == 1, rows, cols)
        size = self._sizes(step.device)[(side // self.codes_per_size_unit - 1).clamp(min=0)]
        forced = torch.where(step < 3, torch.where(side > 0, size, -1), forced)
        return torch.where(step > 0, forced, -1)

    def allowed(self, step: Tensor, rows: Tensor, room: Tensor, vocab_size: int) -> Tensor:
        """What may come next where `forced_next` leaves a choice, as booleans (batch, vocab_size).

        Outside of an image everything that is no part of one, and the start token while the smallest image fits; then
        the sizes that fit; then the codes. An image that was started with room for it never runs out of choices.

        Args:
            step, rows: (batch) as in `forced_next`.
            room: (batch) tokens left, the next one included.
        """
        mask = self._masks(vocab_size, step.device)[step.clamp(max=CODES)]  # (batch, vocab)
        mask[:, self.start_id] &= room >= self.num_tokens(*[self.codes_per_size_unit] * 2)
        units, sizes = self._units(step.device) * self.codes_per_size_unit, self._sizes(step.device)
        height_first = self.num_tokens(units, self.codes_per_size_unit).expand(len(step), -1)  # (batch, sizes)
        needed = torch.where(step[:, None] == 1, height_first, self.num_tokens(rows[:, None], units)) - step[:, None]
        mask[:, sizes] &= needed <= room[:, None]
        return mask

    def _once(self, key: Any, make) -> Tensor:
        if key not in self._tensors:
            self._tensors[key] = make()
        return self._tensors[key]

    def _sizes(self, device) -> Tensor:
        return self._once(("sizes", device), lambda: torch.tensor(self.size_ids, device=device))

    def _units(self, device) -> Tensor:
        return self._once(("units", device), lambda: torch.arange(1, len(self.size_ids) + 1, device=device))

    def _masks(self, vocab_size: int, device) -> Tensor:
        """(4, vocab_size) what may come next by phase, the room left aside."""

        def make():
            mask = torch.zeros(4, vocab_size, dtype=torch.bool)
            mask[[HEIGHT, WIDTH]] = mask[[HEIGHT, WIDTH]].index_fill(1, torch.tensor(self.size_ids), True)
            for first, end in self.code_id_ranges:
                mask[CODES, first:end] = True
            mask[TEXT] = ~mask.any(0)
            mask[TEXT, [self.end_of_line_id, self.end_id]] = False
            return mask.to(device)

        return self._once(("masks", vocab_size, device), make)


@dataclass(eq=False)
class UniRep(ImageLayout):
    """An `ImageLayout` that also knows which id each image code has, so that it can write and read images.

    Attributes:
        code_ids: (codes) id of each code. Ids are not in code order in Chameleon's vocabulary.
    """

    code_ids: Tensor

    def __post_init__(self):
        self._code_of_id = torch.full((int(self.code_ids.max()) + 2,), -1)  # the last entry stands for all others
        self._code_of_id[self.code_ids] = torch.arange(len(self.code_ids))

    @classmethod
    def from_tokenizer(cls, tokenizer, size_unit_px: int = 32, codes_per_size_unit: int = 2) -> "UniRep":
        """Finds every id by its name in the tokenizer's vocabulary; ValueError naming the first one missing."""
        if not hasattr(tokenizer, "get_vocab"):
            raise ValueError(f"tokenizer {excerpt(tokenizer)}: accepted is a tokenizer of transformers")
        for name, value in (("size_unit_px", size_unit_px), ("codes_per_size_unit", codes_per_size_unit)):
            if not is_whole(value, 1):
                raise ValueError(f"{name} {value!r}: accepted are 1, 2, 3, ...")
        vocab = tokenizer.get_vocab()
        code_ids = _code_ids(vocab)
        size_names = (f"<reserved{8800 + n:05d}>" for n in range(1, MAX_SIZE_UNITS + 1))
        size_ids = [vocab[name] for name in takewhile(vocab.__contains__, size_names)]
        for name in (START, END, END_OF_LINE, END_OF_TURN, "<reserved08801>"):
            if name not in vocab:
                raise ValueError(f"the tokenizer has no token {name}")
        return cls(
            start_id=vocab[START],
            end_id=vocab[END],
            end_of_line_id=vocab[END_OF_LINE],
            end_of_turn_id=vocab[END_OF_TURN],
            size_ids=size_ids,
            code_id_ranges=_runs(sorted(code_ids)),
            size_unit_px=size_unit_px,
            codes_per_size_unit=codes_per_size_unit,
            code_ids=torch.tensor(code_ids),
        )

    def encode(self, codes, rows: int | None = None) -> Tensor:
        """Ids of an image. Codes (rows, cols) -> (rows * (cols + 1) + 4)

        Given `rows`, the codes are the upper part of an image of that many rows and the ids stop after them: what a
        model completes, as the lower half of a dual panel. ValueError where the grid is no multiple of the size unit,
        has no size token, or a code does not exist.
        """
        codes = self.checked_codes(codes)
        if rows is not None and not is_whole(rows, len(codes)):
            raise ValueError(f"{len(codes)} rows of codes for an image of {rows!r} rows")
        head = self.header(rows or len(codes), codes.shape[1])
        lines = torch.nn.functional.pad(self.code_ids[codes], (0, 1), value=self.end_of_line_id)  # (rows, cols + 1)
        tail = [] if rows else [self.end_id]
        return torch.cat([torch.tensor(head), lines.flatten(), torch.tensor(tail, dtype=torch.long)])

    def checked_codes(self, codes) -> Tensor:
        """Codes as int64 (rows, cols) on the CPU; ValueError for another shape, and where a code does not exist."""
        codes = whole_numbers(codes, "codes")
        if codes.ndim != 2 or not codes.numel():
            raise ValueError(f"codes of shape {tuple(codes.shape)}: accepted is (rows, cols)")
        if codes.min() < 0 or codes.max() >= len(self.code_ids):
            raise ValueError(f"codes {codes.min()} to {codes.max()}: accepted are 0 to {len(self.code_ids) - 1}")
        return codes

    def decode(self, ids) -> Tensor:
        """Codes (rows, cols) of one image; of one that was cut short, its finished rows.

        ValueError that says where and what, if the ids break the layout.
        """
        ids = whole_numbers(ids, "ids").flatten()
        sizes, step = self.size_of_id(ids[1:3]), torch.arange(len(ids))
        rows, cols = [*(sizes * self.codes_per_size_unit).tolist(), 0, 0][:2]
        wanted = self.forced_next(step, torch.full_like(step, rows), torch.full_like(step, cols))
        codes = self._code_of_id[ids.clamp(-1, len(self._code_of_id) - 1)]
        fits = torch.where(wanted >= 0, ids == wanted, codes >= 0) & (step < self.num_tokens(rows, cols))
        fits[:1], fits[1:3] = ids[:1] == self.start_id, sizes > 0
        if not fits.all():
            raise ValueError(self._complaint(ids, int(fits.int().argmin()), wanted, self.num_tokens(rows, cols)))
        num_lines = min(max(len(ids) - 3, 0) // (cols + 1), rows)
        return codes[3 : 3 + num_lines * (cols + 1)].view(num_lines, cols + 1)[:, :cols]

    def _complaint(self, ids: Tensor, position: int, wanted: Tensor, num_tokens: int) -> str:
        expected = f"token {int(wanted[position])}" if wanted[position] >= 0 else "an image code"
        if position < 3:
            expected = f"the start token {self.start_id}" if position == 0 else "a size token"
        elif position >= num_tokens:
            expected = "nothing, the image has ended"
        return f"malformed image: token {int(ids[position])} at position {position}, expected {expected}"


def is_whole(value: Any, lowest: float) -> bool:
    """Whether a value is a whole number of at least `lowest`; True and 2.0 are none."""
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= lowest


def whole_numbers(values: Any, name: str) -> Tensor:
    """Ids or codes as int64 on the CPU; ValueError for what is not whole numbers, as is, not rounded."""
    try:
        numbers = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} {excerpt(values)}: accepted are whole numbers in a tensor, array or list") from error
    if numbers.numel() and (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool):
        raise ValueError(f"{name} of {numbers.dtype}: accepted are whole numbers")
    return numbers.long().cpu()


def best_bucket(width_px: int, height_px: int, buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket `(width_px, height_px)` that keeps most of an image when it is cropped; ties go to the wider one."""

    def kept(bucket):
        scales = bucket[0] / width_px, bucket[1] / height_px
        return min(scales) / max(scales), bucket

    return max(buckets, key=kept)


def _code_ids(vocab: dict[str, int]) -> list[int]:
    """Id of each code, in code order, from names such as `IMGIMGBCZ` (12) or `<MOVQGAN12>`."""
    ids = {}
    for name, id_ in vocab.items():
        if match := CODE_NAME.fullmatch(name):
            digits = match["digits"] or "".join(str(ord(letter) - ord("A")) for letter in match["letters"])
            ids[int(digits)] = id_
    missing = next((code for code in range(max(len(ids), 1)) if code not in ids), None)
    if missing is not None:
        raise ValueError(f"the tokenizer has no token for image code {missing}")
    return [ids[code] for code in range(len(ids))]


def _runs(ids: list[int]) -> list[list[int]]:
    """`[first, last + 1]` of each run of consecutive numbers in a sorted list."""
    starts = [i for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1] + 1]
    return [[ids[start], ids[end - 1] + 1] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
