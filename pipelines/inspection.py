"""Looking inside: what a picture's last code attends to, how sure the model was of each code, what its settings do.

Measured on a loaded pipeline, drawn with PIL alone. Heat maps go from black (low) over red to pale yellow (high).
"""

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from modeling_lumina_mgpt.decoding_lumina_mgpt import MIN_DECAYED_SCALE, entropy

from .pipeline_lumina_mgpt import default_task

if TYPE_CHECKING:
    from .pipeline_lumina_mgpt import LuminaMGPTPipeline

SINK_RATIO, MAX_SINKS = 5, 12  # a sink gets over so many times the uniform share; the largest ones are marked
SETTINGS: dict[str, tuple] = {
    "image_temperature": (0.2, 0.6, 1.0, 1.5),
    "image_top_k": (1, 10, 100, 1000),
    "guidance_scale": (1.0, 2.0, 4.0, 8.0),
}
HEAT = np.array([(8, 6, 30), (90, 20, 110), (190, 55, 85), (245, 130, 40), (252, 250, 190)])
INK, MARK = "#222222", "#0a7d8c"
PANEL_PX, CELL_PX, STRIP_PX, LIST_PX, LABEL_PX = 384, 192, 1060, 300, 64
LINE_PX, LAYER_PX, GAP_PX, HEADING_PX = 18, 14, 16, 80


@dataclass
class Watched:
    """A picture and how it came about.

    Attributes:
        prompt, picture: what was asked for, what was drawn.
        ids: `(length)` of both, up to the picture's last code.
        codes_at: `(rows, cols)` where in `ids` each code of the picture is.
        entropy: float32 `(rows, cols)` nats of the distribution over codes as guided, before top-k and temperature:
            what PURE's top-k is made from (2503.11073). 0 for a code that was given.
    """

    prompt: str
    picture: Image.Image
    ids: Tensor
    codes_at: Tensor
    entropy: Tensor


def watch(pipe: "LuminaMGPTPipeline", prompt: str | None, **call: Any) -> Watched:
    """Draws `prompt`; `call` are further arguments of the pipeline for one picture, which may be of any task.

    ValueError if the model drew none, or restored one in more than one square.
    """
    uni_rep = pipe.processor.uni_rep
    ids, entropies = torch.empty(0), {}  # by place; an end of a line has none

    def see(ids_so_far: Tensor, scores: Tensor) -> Tensor:
        place = ids_so_far.shape[1]
        if place in entropies:
            raise ValueError(
                f"a picture that is restored in squares: accepted is one of {pipe.processor.target_px} px"
            )
        entropies[place] = float(entropy(scores[:, uni_rep.code_ids.to(scores.device)]))
        return scores

    def keep(ids_so_far: Tensor, _) -> Tensor:
        nonlocal ids
        ids = ids_so_far[0].cpu()
        return torch.zeros(1, dtype=torch.bool, device=ids_so_far.device)

    output: Any = pipe(prompt, logits_processor=[see], stopping_criteria=[keep], **call)
    picture = output.images[0]
    if picture is None or output.panels is not None:
        raise ValueError(
            f"prompt {prompt!r}: accepted are tasks whose answer is one picture; this drew none, or panels"
        )
    start = int((ids == uni_rep.start_id).nonzero()[-1])
    rows, cols = (int(size) * uni_rep.codes_per_size_unit for size in uni_rep.size_of_id(ids[start + 1 : start + 3]))
    codes_at = start + 3 + torch.arange(rows)[:, None] * (cols + 1) + torch.arange(cols)
    if codes_at.max() >= len(ids):
        raise ValueError(f"prompt {prompt!r}: the picture was cut short")
    nats = torch.tensor([[entropies.get(place, 0.0) for place in line] for line in codes_at.tolist()])
    return Watched(prompt or str(call.get("task")), picture, ids[: codes_at.max() + 1], codes_at, nats)


@torch.no_grad()
def attention_over_sequence(pipe: "LuminaMGPTPipeline", ids: Tensor) -> Tensor:
    """What share of its attention the last of `ids (length)` gives to each, mean over heads. float32 (layers, length)

    Only that row of the attention is ever made: the others go through the cache, in the usual implementation.
    """
    model = pipe.transformer
    ids, usual = ids[None].to(model.device), model.config._attn_implementation
    cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    model.set_attn_implementation("eager")  # the one that returns its weights
    try:
        layers = model(ids[:, -1:], past_key_values=cache, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(usual)
    return torch.stack([weights[0, :, 0].float().mean(0).cpu() for weights in layers])  # of (1, heads, 1, length)


def find_sinks(attention: Tensor) -> list[int]:
    """Positions that get over `SINK_RATIO` times the uniform share, at most `MAX_SINKS`, of attention `(length)`."""
    largest = attention.topk(min(MAX_SINKS, len(attention))).indices
    return sorted(largest[attention[largest] * len(attention) > SINK_RATIO].tolist())


def describe_token(pipe: "LuminaMGPTPipeline", watched: Watched, position: int) -> str:
    """Says in words what the token at a position of `watched.ids` is."""
    uni_rep, id_ = pipe.processor.uni_rep, int(watched.ids[position])
    for row, col in (watched.codes_at == position).nonzero().tolist():
        return f"code in row {row + 1}, column {col + 1}"
    if size := int(uni_rep.size_of_id(watched.ids[position])):
        return f"size, {size * uni_rep.size_unit_px} px"
    names = {uni_rep.start_id: "start of picture", uni_rep.end_of_line_id: "end of line"}
    return names.get(id_, f"text {pipe.processor.tokenizer.decode([id_])!r}")


def draw_attention(pipe: "LuminaMGPTPipeline", watched: Watched) -> tuple[Image.Image, list[str]]:
    """The last code's attention over picture and sequence, and its sinks in words (2408.02657, 4.6 and figure 10)."""
    layers = attention_over_sequence(pipe, watched.ids)
    mean, length = layers.mean(0), layers.shape[1]
    on_codes, sinks = mean[watched.codes_at], find_sinks(mean)
    found = [f"{i}: {describe_token(pipe, watched, i)}, {mean[i]:.1%}" for i in sinks]
    shown, column_px = _fit(watched.picture, PANEL_PX), max(1, STRIP_PX // length)
    top = HEADING_PX + max(shown.height, (len(found) + 1) * LINE_PX) + 3 * LINE_PX
    bottom = top + (len(layers) + 1) * LAYER_PX
    width = max(LABEL_PX + column_px * length, 2 * PANEL_PX + LIST_PX) + 3 * GAP_PX
    title = f"What the last code attends to, among the {length} tokens up to itself"
    caption = "Mean over heads, and over layers but where one is named. Color: square root of the share."
    sheet, pen = _page(watched.prompt, title, caption, (width, bottom + 3 * LINE_PX))

    # 1. The picture, the attention to its codes, the sinks
    sheet.paste(shown, (GAP_PX, HEADING_PX))
    left = 2 * GAP_PX + shown.width
    _paste_heat(sheet, on_codes.sqrt(), shown.size, (left, HEADING_PX))
    text = f"{on_codes.sum():.0%} goes to codes, {on_codes.max():.1%} to the brightest"
    _write(pen, (left, HEADING_PX + shown.height + 4), text)
    left += shown.width + GAP_PX
    _write(pen, (left, HEADING_PX), f"Sinks: over {SINK_RATIO} times the uniform share, {1 / length:.2%}")
    for n, text in enumerate(found, 1):
        _write(pen, (left, HEADING_PX + n * LINE_PX), f"({n})  {text}", MARK)

    # 2. The sequence, a row for each layer
    left = GAP_PX + LABEL_PX
    for row, values in enumerate([*layers, mean]):
        y = top + row * LAYER_PX
        _write(pen, (GAP_PX, y - 2), f"layer {row + 1}" if row < len(layers) else "mean")
        _paste_heat(sheet, values[None].sqrt(), (column_px * length, LAYER_PX - 1), (left, y))
    start_x = left + (int(watched.codes_at.min()) - 3) * column_px
    pen.line((start_x, top - LINE_PX, start_x, top - 2), INK)
    _write(pen, (start_x - 4, top - LINE_PX), "prompt", anchor="ra")
    _write(pen, (start_x + 4, top - LINE_PX), "picture")
    for n, position in enumerate(sinks, 1):
        x = left + position * column_px + column_px // 2
        y = bottom + 4 + -n % 3 * LAYER_PX  # a line ends above the number to its left
        pen.line((x, bottom, x, y), MARK)
        _write(pen, (x, y), f"({n})", MARK, "ma")
    return sheet, found


def draw_entropy(watched: Watched) -> Image.Image:
    """The picture beside the entropy of the distribution that each of its codes was drawn from (PURE, 2503.11073)."""
    low, high, shown = float(watched.entropy.min()), float(watched.entropy.max()), _fit(watched.picture, PANEL_PX)
    title = f"How open each code was: {watched.entropy.mean():.2f} nats on average"
    caption = "Entropy of the guided scores of all codes, before top-k and temperature."
    left, below = 2 * GAP_PX + shown.width, HEADING_PX + shown.height + 8
    sheet, pen = _page(watched.prompt, title, caption, (left + shown.width + GAP_PX, below + LINE_PX))
    sheet.paste(shown, (GAP_PX, HEADING_PX))
    _paste_heat(sheet, watched.entropy - low, shown.size, (left, HEADING_PX))
    _write(pen, (left, below), f"{low:.2f} nats")
    _paste_heat(sheet, torch.linspace(0, 1, 64)[None], (128, LAYER_PX), (left + LABEL_PX, below))
    _write(pen, (left + LABEL_PX + 136, below), f"{high:.2f} nats")
    return sheet


def draw_settings(pipe: "LuminaMGPTPipeline", prompt: str | None, seed: int, **call: Any) -> Image.Image:
    """The same prompt and seed over temperature, top-k and guidance, the checkpoint's own framed (2408.02657, fig. 8).

    Each row varies one setting, in one batch of the pipeline; `call` are its further arguments for one picture. What a
    checkpoint's schedule sets by itself is left out.
    """
    task = pipe.processor.tasks[call.get("task") or default_task(call.get("image"))]
    after_image = pipe.sampling_after_images() if task.follows_image else {}
    usual, rows = pipe.transformer._decoding_settings(None, after_image), []
    varied = {name: {*choices, getattr(usual, name)} for name, choices in SETTINGS.items()}
    if usual.top_k_schedule is not None:
        del varied["image_top_k"]
    if usual.guidance_schedule == "decay":  # never to less than this, whatever it began with
        varied["guidance_scale"] -= {scale for scale in varied["guidance_scale"] if 1 < scale < MIN_DECAYED_SCALE}
    for name, choices in varied.items():
        values = sorted(choices)
        generators = [torch.Generator().manual_seed(seed) for _ in values]
        settings: dict[str, Any] = {"prompt": [prompt] * len(values), name: values} | call
        output: Any = pipe(generator=generators, **settings)
        if None in output.images:
            raise ValueError(f"prompt {prompt!r}: the model drew no picture with every {name} of {values}")
        rows.append((name, values, [_fit(picture, CELL_PX) for picture in output.images]))
    width, height = (side + GAP_PX for side in rows[0][2][0].size)
    most, row_px = max(len(values) for _, values, _ in rows), height + 2 * LINE_PX
    title, caption = f"One setting at a time, seed {seed}", "Framed: the checkpoint's own, as in all other rows."
    sheet, pen = _page(
        prompt or str(call.get("task")),
        title,
        caption,
        (most * width + GAP_PX, HEADING_PX + len(rows) * row_px - GAP_PX),
    )
    for row, (name, values, pictures) in enumerate(rows):
        top = HEADING_PX + row * row_px + LINE_PX + 4
        _write(pen, (GAP_PX, top - LINE_PX - 4), name)
        for column, (value, picture) in enumerate(zip(values, pictures, strict=True)):
            left, is_own = GAP_PX + column * width, value == getattr(usual, name)
            if is_own:
                pen.rectangle((left - 3, top - 3, left + picture.width + 2, top + picture.height + 2), fill=MARK)
            sheet.paste(picture, (left, top))
            _write(pen, (left, top + picture.height + 4), f"{value:g}", MARK if is_own else INK)
    return sheet


def _page(prompt: str, title: str, caption: str, size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white page, at least as wide as its heading of `HEADING_PX`, and a pen."""
    sheet = Image.new("RGB", (max(size[0], 640), size[1] + GAP_PX), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP_PX, 10), title, INK, font_size=17)
    _write(pen, (GAP_PX, 34), textwrap.shorten(prompt, 80, placeholder="..."), MARK)
    _write(pen, (GAP_PX, 52), caption)
    return sheet, pen


def _write(pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, color=INK, anchor: str = "la") -> None:
    pen.text(place, text, color, font_size=13, anchor=anchor)


def _fit(picture: Image.Image, side_px: int) -> Image.Image:
    """Small pictures as a whole multiple with their pixels to be seen, large ones scaled down."""
    picture = picture.copy()
    picture.thumbnail((side_px, side_px))
    times = side_px // max(picture.size)
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def _paste_heat(sheet: Image.Image, values: Tensor, size: tuple[int, int], corner: tuple[int, int]) -> None:
    """Pastes nonnegative values `(rows, cols)` in color, the largest one brightest, each as a block."""
    shares = (values / values.max().clamp(min=1e-9)).numpy()
    colors = np.stack([np.interp(shares, np.linspace(0, 1, len(HEAT)), channel) for channel in HEAT.T], -1)
    sheet.paste(Image.fromarray(colors.astype(np.uint8)).resize(size, Image.Resampling.NEAREST), corner)
