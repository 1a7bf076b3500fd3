"""Every task of a checkpoint on Tabletop's test split, by its field's metric, beside what that can be held against.

    lumina-mgpt evaluate --all --output-dir runs/tabletop/scoreboard

The cases and the answers are in `trials.py`, the measures in `metrics.py`. Intervals are of 95%, by bootstrap over
cases. What is scored stays in scoreboard.json, and the same command goes on with what is missing.

The conventions: AbsRel and delta1 are of depth in table units; mIoU and the median angle are each picture's, then the
mean; PCK@0.2 is of the longer side of the figure's box; edits are three in a row of one picture, each scored against
the scene as it should be by then, and "rest untouched" are all objects that the edit does not speak of.
"""

import hashlib
import json
import platform
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw

from modeling_lumina_mgpt.generation_lumina_mgpt import ContextTooShort, DecodingSettings

from . import metrics
from .evaluate import scene_splits
from .files import write_whole
from .trials import COLUMN_NAMES, CURVES, SCORED, Board, Trials

if TYPE_CHECKING:
    from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline

NUM_SHOWN = 10
MEASURES = 2  # one more whenever cases or measures change: scores before and after are not to be mixed
UNITS = {  # others are shares, and more is better
    "AbsRel": ("", "lower"),
    "mean angle": ("°", "lower"),
    "median angle": ("°", "lower"),
    "PSNR": (" dB", "higher"),
    "PSNR outside": (" dB", "higher"),
    "SSIM": ("", "higher"),
    "GMS": ("", "higher"),
}
INK, MARK, BAND = "#222222", "#0a7d8c", "#cfe8ea"
NEEDED = {"sizes": "text-to-image", "curves": "text-to-image"}  # others need themselves; to chat is never left out


def run_scoreboard(
    pipe: "LuminaMGPTPipeline",
    output_dir: str | Path,
    num_cases: int = 200,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    split: str = "test",
) -> dict:
    """Scores a pipeline on every task that it was trained for, and writes and prints the table.

    What it was not trained for, or cannot do (three edits may not fit into its context), is left out with the reason.
    In `output_dir`: scoreboard.json, rewritten after each task; scoreboard.md; curves.png; sheets/TASK.png.

    Args:
        num_cases: of each task; of each kind of questions in words, as far as there are so many. Sentences come in
            equal numbers of each category, at most 60 for each size and each point of a curve.
        height, width: in pixels; the model's default size if None.
        seed: of the cases and of what is drawn.
        split: "test", or "validation": scenes that no training has either, but of combinations that it has.

    Returns:
        What is in scoreboard.json.

    Raises:
        ValueError: for another split; for a size that is no bucket of the checkpoint's, as pictures that it is given
            are cropped to these; and if `output_dir` has scores with other settings, or of other weights.
    """
    config, folder = pipe.transformer.config, Path(output_dir)
    size = width or config.default_width_px, height or config.default_height_px
    buckets = pipe.processor.uni_rep.buckets(pipe.processor.target_px)
    if size not in buckets:
        accepted = ", ".join(f"{w}x{h}" for w, h in buckets)
        raise ValueError(f"size {size[0]}x{size[1]}: this checkpoint crops what it is given to {accepted}")
    scene_splits(split)  # raises for what is none
    report = _opened(folder, pipe, {"num_cases": num_cases, "size": [*size], "seed": seed, "split": split})
    pipe.set_progress_bar_config(disable=True)  # one for each batch says little
    board, trained = Board(pipe, num_cases, size, seed, split), pipe.processor.trained_tasks
    report["left_out"] = {
        task: "the checkpoint was not trained for it"
        for task in SCORED
        if trained is not None and NEEDED.get(task, task) not in (*trained, "chat")
    }
    for task, why in report["left_out"].items():
        print(f"{task}: left out: {why}")
    (folder / "sheets").mkdir(parents=True, exist_ok=True)
    for task, trials_of in SCORED.items():
        if task in report["left_out"] or task in report["tasks"]:
            continue
        start = time.monotonic()
        try:
            trials = trials_of(board)
        except ContextTooShort as error:  # which may have room for one edit, but not for three
            report["left_out"][task] = str(error)
            print(f"{task}: left out: {error}")
            continue
        scores = _scores(trials)
        draw_sheet(task, trials).save(folder / "sheets" / f"{task}.png")
        report["tasks"][task] = {"seconds": round(time.monotonic() - start, 1), "scores": scores}
        _write(folder, report)
    _write(folder, report)
    if "curves" in report["tasks"]:
        draw_curves(report["tasks"]["curves"]["scores"]).save(folder / "curves.png")
    (folder / "scoreboard.md").write_text(format_table(report))
    print(format_table(report))
    return report


def _write(folder: Path, report: dict) -> None:
    write_whole(folder / "scoreboard.json", (json.dumps(report, indent=2) + "\n").encode())


def _opened(folder: Path, pipe: "LuminaMGPTPipeline", asked: dict) -> dict:
    """The report so far, of the same settings."""
    dtype = str(pipe.transformer.dtype)
    settings = {**asked, "measures": MEASURES, "weights": _digest(pipe), "dtype": dtype, "sampling": _sampling(pipe)}
    device, path = pipe.transformer.device, folder / "scoreboard.json"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machine = {"device": f"{device.type} ({name})", "torch": torch.__version__}
    if not path.exists():
        model = pipe.transformer.config.name_or_path
        return {"model": model, "settings": settings, "machine": machine, "left_out": {}, "tasks": {}}
    report = json.loads(path.read_text())
    for key, value in settings.items():
        if (before := report["settings"].get(key)) != value:
            raise ValueError(f"{path} is of {key} {before!r}, this is {value!r}: take another output_dir")
    return report


def _sampling(pipe: "LuminaMGPTPipeline") -> dict:
    """Of the defaults that are sampled by, those that the checkpoint sets."""
    config = pipe.transformer.generation_config
    names = (*DecodingSettings.__dataclass_fields__, "top_k", "top_p", "temperature", "do_sample", "image_to_image")
    return {name: value for name in names if (value := getattr(config, name, None)) is not None}


def _digest(pipe: "LuminaMGPTPipeline") -> str:
    """Of all weights, with adapters."""
    digest = hashlib.sha256()
    for module in (pipe.transformer, pipe.vqvae):
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _scores(trials: Trials) -> list[dict]:
    """Each metric with all columns; those of most cases first."""
    measured = {
        column: [trials.measure(*case) for case in zip(trials.cases, answers, strict=True)]
        for column, answers in trials.answers.items()
    }
    scores = []
    for name in dict.fromkeys(name for values in measured["ours"] for name in values):
        unit, better = UNITS.get(name.split(",")[0], ("%", "higher"))
        columns = {c: metrics.interval([v[name] for v in values if name in v]) for c, values in measured.items()}
        scores.append({"metric": name, "unit": unit, "better": better, **columns})
    return sorted(scores, key=lambda score: -score["ours"]["of"])


def format_table(report: dict) -> str:
    """Markdown: a row for each metric, without the curves; then what was left out, and why."""
    lines = ["| task | metric | cases | trivial | ours | VQ ceiling |", "|---|---|---:|---:|---:|---:|"]
    for task, result in report["tasks"].items():
        for score in result["scores"] if task != "curves" else ():
            arrow, unit = {"higher": "↑", "lower": "↓"}[score["better"]], score["unit"]
            trivial, ours, ceiling = (score.get(column) or {"value": None} for column in COLUMN_NAMES)
            own = (
                f"{_number(ours['value'], unit)} [{_number(ours['low'], '', unit)}, {_number(ours['high'], '', unit)}]"
            )
            cells = [task, f"{score['metric']} {arrow}", ours["of"], _number(trivial["value"], unit), own]
            lines.append(f"| {' | '.join(map(str, [*cells, _number(ceiling['value'], unit)]))} |")
    if report["left_out"]:
        lines += ["", "Left out:", "", *(f"- {task}: {why}" for task, why in report["left_out"].items())]
    return "\n".join(lines) + "\n"


def _number(value: float | None, shown_unit: str, unit: str | None = None) -> str:
    """With as many places as its unit needs; a share in percent."""
    unit = shown_unit if unit is None else unit
    if value is None:
        return "–"
    return (f"{100 * value:.1f}" if unit == "%" else f"{value:.1f}" if unit else f"{value:.3f}") + shown_unit


def draw_sheet(task: str, trials: Trials) -> Image.Image:
    """Some cases, evenly spread: pictures under their headings, and what was said beside them."""
    rows = trials.shown[:: max(1, len(trials.shown) // NUM_SHOWN)][:NUM_SHOWN]
    times = max(1, 128 // max((p.height for _, pictures in rows for p in pictures), default=128))
    most = max(len(pictures) for _, pictures in rows)
    cell_w = times * max((p.width for _, pictures in rows for p in pictures), default=0) + 8
    row_px = max(times * max((p.height for _, pictures in rows for p in pictures), default=0) + 8, 96)
    sheet = Image.new("RGB", (most * cell_w + 420, 56 + len(rows) * row_px), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 6), task, INK, font_size=17)
    for i, heading in enumerate(trials.headings):
        pen.text((8 + i * cell_w, 34), heading, MARK, font_size=13)
    for row, (text, pictures) in enumerate(rows):
        top = 56 + row * row_px
        for i, picture in enumerate(pictures):
            large = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
            sheet.paste(large, (8 + i * cell_w, top))
        lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 60) or [""]]
        pen.multiline_text((16 + len(pictures) * cell_w, top), "\n".join(lines[: row_px // 17]), INK, font_size=13)
    return sheet


def draw_curves(scores: Sequence[dict]) -> Image.Image:
    """The share of sentences that pass over each setting, with its interval as a band."""
    width, height, left, top = 420, 240, 56, 44
    chart = Image.new("RGB", (len(CURVES) * (width + left) + 24, height + top + 48), "white")
    pen = ImageDraw.Draw(chart)
    for i, (setting, values) in enumerate(CURVES.items()):
        found = {score["metric"]: score["ours"] for score in scores}
        x0 = left + i * (width + left)
        xs = [x0 + 12 + (width - 24) * (v - values[0]) / (values[-1] - values[0]) for v in values]
        points = [found[f"{setting} {value:g}"] for value in values]
        low, middle, high = (
            [(x, top + height * (1 - p[end])) for x, p in zip(xs, points, strict=True)]
            for end in ("low", "value", "high")
        )
        pen.text((x0, 12), f"sentences that pass, by {setting}", INK, font_size=15)
        pen.polygon([*low, *high[::-1]], fill=BAND)
        for share in (0, 0.25, 0.5, 0.75, 1):
            y = top + height * (1 - share)
            pen.line((x0, y, x0 + width, y), "#dddddd")
            pen.text((x0 - 6, y), f"{share:.0%}", INK, font_size=12, anchor="rm")
        pen.line(middle, MARK, 2)
        for (x, y), value in zip(middle, values, strict=True):
            pen.circle((x, y), 3, MARK)
            pen.text((x, top + height + 8), f"{value:g}", INK, font_size=12, anchor="ma")
    return chart
