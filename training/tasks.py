"""Records of datasets -> conversations: turns with `<|image|>` placeholders, and the pictures that fill them.

One adapter for each kind of record. Datasets that differ in names only share one: a source's `columns` say what they
call a column. What a user will be asked to say comes from the processor, so training and use have the same words.
"""

import inspect
import random
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from modeling_lumina_mgpt.processing_lumina_mgpt import IMAGE
from modeling_lumina_mgpt.uni_rep import best_bucket

from . import drawing
from .degradation import degrade
from .records import ColumnError, Record, RecordError, has_column, missing_column

Conversation = tuple[list[str], list[Any]]
QUESTIONERS, ANSWERERS = ("human", "user"), ("gpt", "assistant")


# Text


def chat(record: Record) -> Conversation:
    """`conversations` or `messages`, [{from, value}] or [{role, content}]; a system's words open the first turn."""
    turns = _turns(record)
    if any(IMAGE in turn for turn in turns):
        raise RecordError(f"a turn has {IMAGE} in it, which stands for a picture")
    return turns, []


def image_to_text(record: Record) -> Conversation:
    """`image` (none, one or a list) and `conversations` in which `<image>` or `<|image|>` stand for it.

    Content may also be items, [{type, text}].
    """
    held = record.get("image") if record.has("image") else None
    held = held if isinstance(held, list) else [] if held is None else [held]
    turns = [_with_one_space(turn) for turn in _turns(record)]
    if held and not any(IMAGE in turn for turn in turns):
        turns[0] = f"{IMAGE} {turns[0]}"
    num_places = sum(turn.count(IMAGE) for turn in turns)
    if num_places != len(held):
        raise RecordError(f"{len(held)} pictures for {num_places} places in the conversation")
    return turns, [record.as_picture("image", picture) for picture in held]


def caption(record: Record) -> Conversation:
    return [record.prompt(), record.text("caption")], [record.picture("image")]


def vqa(record: Record) -> Conversation:
    return [record.prompt(record.text("question")), record.text("answer")], [record.picture("image")]


# Pictures


def text_to_image(record: Record, drop_size: float = 0.0) -> Conversation:
    """The prompt names the size that the picture will be cropped to, but for a share `drop_size` of the records."""
    _check_shares("drop_size", drop_size)
    picture = record.picture("image")
    width_px, height_px = record.bucket(picture)
    size = {} if record.rng.random() < drop_size else {"height": height_px, "width": width_px}
    return [record.prompt(record.text("caption"), **size), IMAGE], [picture]


def edit(record: Record) -> Conversation:
    """One edit or several in turn: `source_img`, `target_img` and `instruction`, the last two perhaps lists.

    Or `images`, with the source first, and `instructions`.
    """
    if record.has("images") and "source_img" not in record.columns:
        pictures, words = record.get("images") or [], record.get("instructions") or []
    else:
        source, targets, words = (record.get(name) for name in ("source_img", "target_img", "instruction"))
        targets, words = (value if isinstance(value, list) else [value] for value in (targets, words))
        pictures = [source, *targets]
    if not words or len(pictures) != len(words) + 1:
        raise RecordError(f"{len(words)} instructions for {len(pictures)} pictures, the source included")
    first, *others = (record.as_text("instruction", instruction) for instruction in words)
    turns = [turn for question in (record.prompt(first), *others) for turn in (question, IMAGE)]
    names = ["source_img", *["target_img"] * len(words)]
    return turns, [record.as_picture(*held) for held in zip(names, pictures, strict=True)]


def predicted_map(record: Record, **drawn: Any) -> Conversation:
    """The map of `image` that the task is named after, from the column of that name."""
    picture = record.picture("image")
    return [record.prompt(), IMAGE], [picture, _aligned(record.task, MAPS[record.task](record, **drawn), picture)]


def detection(record: Record, box_format: str = "ltrb", relative: bool = False) -> Conversation:
    """`image` with a frame around what `phrase` means.

    Args:
        box_format: of `box`, "ltrb" (left, top, right, bottom) or "xywh" (left, top, width, height).
        relative: whether `box` is in parts of the picture's sides instead of pixels.
    """
    if box_format not in ("ltrb", "xywh"):
        raise ValueError(f"box_format {box_format!r}: accepted are 'ltrb' and 'xywh'")
    picture, box = record.picture("image"), np.array(record.get("box"), dtype=object)
    if box.shape != (4,) or not all(isinstance(side, int | float) and np.isfinite(side) for side in box):
        raise RecordError(f"box {box.tolist()}: accepted are four numbers")
    left, top, right, bottom = box.astype(float) * (np.array([*picture.size] * 2) if relative else 1)
    if box_format == "xywh":
        right, bottom = left + right, top + bottom
    # What is cut off must not be framed, or not at the edge that it leaves: a picture of the box is cropped alike.
    marked = Image.new("L", picture.size)
    marked.paste(255, tuple(round(side) for side in (left, top, right, bottom)))
    size = record.bucket(picture)
    picture, marked = record.cropped(picture, *size), record.cropped(marked, *size)
    try:
        framed = drawing.draw_box(picture, marked.point(lambda value: value // 128).getbbox() or (0, 0, 0, 0))
    except ValueError as error:
        raise RecordError(f"of box {box.tolist()} is left: {error}") from error
    return [record.prompt(record.text("phrase")), IMAGE], [picture, framed]


def control(record: Record, condition: str | Sequence[str] | None = None, **drawn: Any) -> Conversation:
    """`image` from a map of it: `condition`, one drawn from a list, or from those that the record has."""
    picture = record.picture("image")
    shown, _ = _condition(record, picture, condition, drawn)
    return [record.prompt(record.text("caption")), IMAGE], [shown, picture]


def refine(record: Record, share: Sequence[float] = (0.05, 0.5)) -> Conversation:
    """`image` from its own codes, of which a share (from, to) is replaced by any others."""
    _check_shares("share", *share)
    picture = record.picture("image")
    codes = record.processor.encode_image(record.cropped(picture, *record.bucket(picture)), record.target_px)
    generator = torch.Generator().manual_seed(record.rng.getrandbits(63))
    replaced = torch.rand(codes.shape, generator=generator) < record.rng.uniform(*share)
    others = torch.randint(len(record.processor.uni_rep.code_ids), codes.shape, generator=generator)
    return [record.prompt(), IMAGE], [torch.where(replaced, others, codes), codes]


def restore(record: Record, scale: float = 4.0) -> Conversation:
    """How bad a degraded `image` is, its `caption`, and the sharp square again. (PURE, arXiv 2503.11073)

    Args:
        scale: how much smaller the degraded picture is, before it is stretched to the size of the sharp one.
    """
    if not isinstance(scale, int | float) or not 1 <= scale <= 16:
        raise ValueError(f"scale {scale!r}: accepted is 1 to 16")
    side_px = record.target_px
    sharp = record.cropped(record.picture("image"), side_px, side_px)
    degraded, degradation = degrade(sharp, scale, record.rng)
    stretched = degraded.resize(sharp.size, Image.Resampling.BICUBIC)
    return [record.prompt(), f"{degradation} {record.text('caption')} {IMAGE}"], [stretched, sharp]


def panels(record: Record, condition: str | Sequence[str] | None = None, **drawn: Any) -> Conversation:
    """`image` and its condition, one above the other, in one picture. (Lumina-mGPT 2.0, arXiv 2507.17801)

    The condition is above if the model will be given it ("panel"), else below ("pair"). "subject" is a condition in
    words, `subject`, shown in `reference`.
    """
    picture = record.picture("image")
    width_px, height_px = best_bucket(*picture.size, panel_sizes(record.processor, record.target_px))
    shown, words = _condition(record, picture, condition, drawn)
    halves = [shown, picture] if record.processor.tasks[record.task].continues else [picture, shown]
    both = Image.new("RGB", (width_px, 2 * height_px))
    for i, half in enumerate(halves):
        both.paste(record.cropped(half, width_px, height_px), (0, i * height_px))
    prompt = record.prompt(record.text("caption"), height=both.height, width=both.width, condition=words)
    return [prompt, IMAGE], [both]


# Conditions, each drawn from the column of its name


def depth_map(
    record: Record, metres_per_unit: float = 1.0, range_m: Sequence[float] | None = None, linear: bool = False
) -> Image.Image:
    """Numbers are drawn as `drawing.draw_depth` says; a picture in color is taken as drawn."""
    depth = record.numbers("depth")
    if depth is None:
        return record.picture("depth")
    if not (np.isfinite(depth) & (depth > 0)).any():
        raise RecordError("depth is not known anywhere")
    return drawing.draw_depth(depth, metres_per_unit, range_m, linear)


def normal_map(record: Record, flip: str = "") -> Image.Image:
    """As `drawing.draw_normals` says, from vectors or from a picture of them."""
    normals = record.numbers("normal", num_dims=3)
    if normals is None:
        normals = np.asarray(record.picture("normal")) / 127.5 - 1
    return drawing.draw_normals(normals, flip)


def pose_map(record: Record) -> Image.Image:
    """`pose`, a picture, or the skeletons of `keypoints`: a list for each person, flat or [17][3]."""
    if record.holds("pose"):
        return record.picture("pose")
    keypoints, size = record.get("keypoints"), record.picture("image").size
    try:
        people = np.array(keypoints, float).reshape(-1, drawing.NUM_KEYPOINTS, 3)
    except (ValueError, TypeError) as error:
        raise RecordError(f"keypoints: accepted are {drawing.NUM_KEYPOINTS} x, y and visibility a person") from error
    drawn = drawing.draw_skeletons(people, *size)
    if drawn.getbbox() is None:
        raise RecordError("keypoints of nobody in the picture")
    return drawn


def segmentation_map(record: Record, palette: str | Sequence[Sequence[Any]] | None = None) -> Image.Image:
    """Labels in the colors of `palette`; a picture in color is taken as drawn.

    Args:
        palette: [red, green, blue] or [name, red, green, blue] of each label; "voc"; None: the checkpoint's own.
    """
    labels = record.numbers("segmentation", are_labels=True)
    if labels is None:
        return record.picture("segmentation")
    colors: Any = record.processor.image_processor.check_palette() if palette is None else palette
    if isinstance(colors, str):
        if colors != "voc":
            raise ValueError(f"palette {palette!r}: accepted is 'voc', or a list of colors")
        colors = drawing.voc_palette()
    return drawing.draw_labels(labels, [color[-3:] for color in colors])


def canny_map(record: Record) -> Image.Image:
    return record.processor.image_processor.canny(record.picture("image"))


def hed_map(record: Record) -> Image.Image:
    return record.picture("hed")


def subject_map(record: Record) -> Image.Image:
    return record.picture("reference")


MAPS: dict[str, Callable[..., Image.Image]] = {
    "depth": depth_map,
    "normal": normal_map,
    "pose": pose_map,
    "segmentation": segmentation_map,
    "canny": canny_map,
    "hed": hed_map,
    "subject": subject_map,
}
MAP_COLUMNS = {"canny": (), "pose": ("pose", "keypoints"), "subject": ("reference", "subject")}  # others: their name


@dataclass(frozen=True)
class Adapter:
    """How a kind of record becomes a conversation.

    Attributes:
        function: called with a `Record` and a source's options.
        columns: names that a record must have.
        alternative: names that it may have instead of them.
        optional: further ones that are used if they are there.
        conditions: keys of `MAPS` that it may be asked for.
    """

    function: Callable[..., Conversation]
    columns: tuple[str, ...]
    alternative: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()


def _columns_of(*conditions: str) -> tuple[str, ...]:
    return tuple(name for condition in conditions for name in MAP_COLUMNS.get(condition, (condition,)))


CONTROLS, PANELS = ("depth", "normal", "pose", "segmentation"), ("depth", "canny", "hed", "pose", "subject")
ADAPTERS = {
    "text-to-image": Adapter(text_to_image, ("image", "caption")),
    "chat": Adapter(chat, ("conversations",), ("messages",)),
    "image-to-text": Adapter(image_to_text, ("conversations",), ("messages",), ("image",)),
    "caption": Adapter(caption, ("image", "caption")),
    "vqa": Adapter(vqa, ("image", "question", "answer")),
    "edit": Adapter(edit, ("source_img", "target_img", "instruction"), ("images", "instructions")),
    "depth": Adapter(predicted_map, ("image", "depth")),
    "normal": Adapter(predicted_map, ("image", "normal")),
    "pose": Adapter(predicted_map, ("image", "pose"), ("image", "keypoints")),
    "segmentation": Adapter(predicted_map, ("image", "segmentation")),
    "detection": Adapter(detection, ("image", "phrase", "box")),
    "control": Adapter(control, ("image", "caption"), optional=_columns_of(*CONTROLS), conditions=CONTROLS),
    "refine": Adapter(refine, ("image",)),
    "restore": Adapter(restore, ("image", "caption")),
    "pair": Adapter(panels, ("image", "caption"), optional=_columns_of(*PANELS), conditions=PANELS),
    "panel": Adapter(panels, ("image", "caption"), optional=_columns_of(*PANELS), conditions=PANELS),
}


def conversation(
    task: str,
    record: Mapping[str, Any],
    processor,
    rng: random.Random,
    columns: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    target_px: int | None = None,
    random_crop: bool = False,
) -> Conversation:
    """A record as a conversation.

    Args:
        task: a key of `ADAPTERS`.
        rng: everything random is drawn from it.
        columns: adapter's name of a column -> the dataset's, where they differ; as in `Record`.
        options: keyword arguments of the adapter; and `folder` and `crop`, as in `Record`.
        target_px: side of the square whose area pictures will be cropped to; the processor's if not given.
        random_crop: crop the pictures here, each to its bucket, and those of one size all at one place. Else the
            processor crops them, at the centre.

    Returns:
        The turns, user first, and a picture (PIL, or codes int64 (rows, cols)) for each `<|image|>` in them.

    Raises:
        RecordError: for a record that cannot be used.
        ColumnError: for a wrong or missing column.
        ValueError: for an unknown task, or wrong options.
    """
    given = dict(options or {})
    own = {name: given.pop(name) for name in ("folder", "crop") if name in given}
    target_px = processor.target_px if target_px is None else target_px
    crop_seed = rng.getrandbits(63) if random_crop else None
    view = Record(record, columns or {}, task, processor, rng, target_px, crop_seed, **own)
    turns, pictures = _adapter(task).function(view, **given)
    if random_crop:
        pictures = [p if processor.is_codes(p) else view.cropped(p, *view.bucket(p)) for p in pictures]
    return turns, pictures


def check_columns(
    task: str, found: Sequence[str], columns: Mapping[str, str] | None = None, options: Mapping[str, Any] | None = None
) -> None:
    """ColumnError or ValueError unless a source with these columns suits a task, its mapping and its options."""
    adapter, columns, options = _adapter(task), columns or {}, options or {}
    accepted = dict.fromkeys((*adapter.columns, *adapter.alternative, *adapter.optional))
    if unknown := columns.keys() - accepted.keys():
        raise ColumnError(f"columns {sorted(unknown)}: task {task!r} has {', '.join(accepted)}")
    known = _options_of(task)
    if wrong := options.keys() - known:
        raise ValueError(f"options {sorted(wrong)}: task {task!r} has {', '.join(known)}")
    if wrong := _wrong_crops(options.get("crop"), accepted):
        raise ValueError(
            f"crop {wrong!r}: accepted is {{column: [left, top, right, bottom]}}, of {', '.join(accepted)}"
        )
    absent = {name for name in accepted if not has_column(columns.get(name, name), found)}
    for name in adapter.columns:
        if name in absent and (not adapter.alternative or absent & {*adapter.alternative}):
            raise missing_column(name, columns.get(name, name), found)
    chosen = options.get("condition")
    if adapter.conditions and chosen is None and absent >= {*adapter.optional}:
        raise ColumnError(f"task {task!r} needs one of {', '.join(adapter.optional)}: there is {', '.join(found)}")
    for condition in [chosen] if isinstance(chosen, str) else chosen or []:
        _check_condition(task, condition)
        names = _columns_of(condition)
        if absent & {*names} and (condition != "pose" or absent >= {*names}):
            name = next(name for name in names if name in absent)
            raise missing_column(name, columns.get(name, name), found)


def _adapter(task: str) -> Adapter:
    if task not in ADAPTERS:
        raise ValueError(f"task {task!r}: accepted are {', '.join(ADAPTERS)}")
    return ADAPTERS[task]


def _check_condition(task: str, condition: Any) -> None:
    if condition not in ADAPTERS[task].conditions:
        raise ValueError(f"condition {condition!r}: accepted for {task!r} are {', '.join(ADAPTERS[task].conditions)}")


def _wrong_crops(crop: Any, accepted: Container[str]) -> Any:
    """What of the option is no box of a column; None if all is right."""
    if crop is None or not isinstance(crop, Mapping):
        return crop
    boxes = {name: box for name, box in crop.items() if name in accepted and isinstance(box, list) and len(box) == 4}
    right = {name for name, (left, top, right, bottom) in boxes.items() if 0 <= left < right and 0 <= top < bottom}
    return {name: box for name, box in crop.items() if name not in right} or None


def _options_of(task: str) -> list[str]:
    """Names of the options that a task takes."""
    drawn = ADAPTERS[task].conditions or [name for name in MAPS if name == task]
    functions = [ADAPTERS[task].function, *(MAPS[name] for name in drawn)]
    parameters = [p for function in functions for p in inspect.signature(function).parameters.values()]
    names = (p.name for p in parameters if p.name != "record" and p.kind is not p.VAR_KEYWORD)
    return [*dict.fromkeys((*names, "folder", "crop"))]


def _condition(
    record: Record, picture: Image.Image, condition: str | Sequence[str] | None, drawn: Mapping[str, Any]
) -> tuple[Image.Image, str]:
    """One of the conditions as a picture, and how it is called in prompts."""
    if condition is None:
        condition = [name for name in ADAPTERS[record.task].conditions if any(map(record.holds, _columns_of(name)))]
        if not condition:
            raise RecordError(f"none of {', '.join(ADAPTERS[record.task].optional)} is there")
    name: Any = condition if isinstance(condition, str) else record.rng.choice(list(condition) or [None])
    _check_condition(record.task, name)
    options = inspect.signature(MAPS[name]).parameters.keys() & drawn.keys()
    shown = MAPS[name](record, **{option: drawn[option] for option in options})
    if name == "subject":
        return shown, record.text("subject")
    return _aligned(name, shown, picture), name


def _aligned(name: str, shown: Image.Image, picture: Image.Image) -> Image.Image:
    """A map as large as its picture, so that both are cropped alike."""
    if not 0.98 < shown.width / picture.width * picture.height / shown.height < 1.02:
        sizes = f"{shown.width}x{shown.height} px for a picture of {picture.width}x{picture.height}"
        raise RecordError(f"{name} of {sizes}: accepted are two of one shape")
    return shown if shown.size == picture.size else shown.resize(picture.size, Image.Resampling.NEAREST)


def _check_shares(name: str, *values: Any) -> None:
    if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in values):
        raise ValueError(f"{name} {values}: accepted are 0 to 1")


def panel_sizes(processor, target_px: int) -> list[tuple[int, int]]:
    """Sizes `(width_px, height_px)` of each of two panels, such that both together are a bucket."""
    step_px = 2 * processor.uni_rep.size_unit_px
    return [(w, h // 2) for w, h in processor.uni_rep.buckets(target_px) if h % step_px == 0]


def _turns(record: Record) -> list[str]:
    """Question and answer in turn, from either form of messages."""
    has_messages = record.has("messages") and "conversations" not in record.columns
    messages = record.get("messages" if has_messages else "conversations") or []
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ColumnError(
            f"conversations {messages!r:.100}: accepted are lists of {{from, value}} or {{role, content}}"
        )
    pairs = [(m.get("from") or m.get("role"), _content(m.get("value") or m.get("content"))) for m in messages]
    pairs = [(role, text) for role, text in pairs if role != "system" or text]  # datasets have empty ones
    if not all(isinstance(text, str) and text.strip() for _, text in pairs):
        raise RecordError("a turn of the conversation is empty, or no text")
    rules = [text.strip() for role, text in pairs if role == "system"]
    said = [(role, text.strip()) for role, text in pairs if role != "system"]
    expected = [(QUESTIONERS, ANSWERERS)[i % 2] for i in range(len(said))]
    if not said or len(said) % 2 or any(role not in roles for (role, _), roles in zip(said, expected, strict=True)):
        raise RecordError(f"roles {[role for role, _ in pairs]}: accepted are questions and answers in turn")
    return ["\n\n".join([*rules, said[0][1]]), *(text for _, text in said[1:])]


def _content(content: Any) -> Any:
    """The text of a message whose content may be items."""
    if not isinstance(content, list):
        return content
    kinds = [item.get("type") if isinstance(item, Mapping) else type(item).__name__ for item in content]
    if other := {*kinds} - {"text", "image", "image_url"}:
        raise RecordError(f"content of type {other.pop()!r}: accepted are items {{type: text}} and {{type: image}}")
    return " ".join(
        item.get("text") or "" if kind == "text" else IMAGE for kind, item in zip(kinds, content, strict=True)
    )


def _with_one_space(turn: str) -> str:
    """With placeholders as they are here, and one space between them and their neighbours."""
    parts = re.split(r"(<\|image\|>)", turn.replace("<image>", IMAGE))
    return " ".join(part.strip() for part in parts if part.strip())
