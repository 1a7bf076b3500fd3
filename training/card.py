"""The default checkpoint's card: what it is, its pictures, its scores and where they come from."""

import json
import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from PIL import Image, ImageDraw

from .scoreboard import format_table
from .tabletop import TabletopSource

if TYPE_CHECKING:
    from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline

TEMPLATE = Path(__file__).parent.parent / "model_cards" / "tabletop.md"
HEADLINES = {  # metrics for the Hub: task, as the scoreboard calls it -> metric -> the Hub's task and metric
    ("text-to-image", "overall"): ("text-to-image", "geneval"),
    ("caption", "objects, precision"): ("image-to-text", "precision"),
    ("caption", "objects, recall"): ("image-to-text", "recall"),
    ("vqa", "accuracy"): ("visual-question-answering", "accuracy"),
    ("depth", "delta1"): ("depth-estimation", "delta1"),
    ("normal", "mean angle"): ("image-to-image", "mean_angle"),
    ("segmentation", "mIoU"): ("image-segmentation", "mean_iou"),
    ("pose", "PCK@0.2"): ("keypoint-detection", "pck"),
    ("detection", "box IoU"): ("object-detection", "iou"),
    ("edit", "done and rest untouched, turn 1"): ("image-to-image", "accuracy"),
    ("restore", "PSNR"): ("image-to-image", "psnr"),
}
SENTENCES = (
    "a large red sphere",
    "a small green cone in front of a large blue cylinder",
    "three yellow cubes",
    "a large purple wooden cube on a white table",
    "a pink cone right of a cyan sphere",
    "two orange cylinders and a blue sphere",
    "a large green metal sphere on a dark table",
    "four small spheres",
)
SHOWN = ("edit", "depth", "normal", "segmentation", "pose", "detection", "control", "vqa")  # below the sentences
ZOOM, GAP_PX, TEXT_PX = 2, 8, 64
INK = "#222222"


def write_card(pipe: "LuminaMGPTPipeline", scores: str | Path, minutes: dict[str, float], folder: str | Path) -> None:
    """Writes `README.md`, `pictures/` and `scoreboard.json` into the checkpoint's folder.

    Args:
        scores: the folder that `run_scoreboard` has written.
        minutes: that each stage of its training took, by name.
    """
    scores, pictures = Path(scores), Path(folder) / "pictures"
    pictures.mkdir(exist_ok=True)
    draw_gallery(pipe).save(pictures / "gallery.png", optimize=True)
    report = json.loads((scores / "scoreboard.json").read_text())
    for task in report["tasks"]:
        with Image.open(scores / ("curves.png" if task == "curves" else f"sheets/{task}.png")) as picture:
            picture.save(pictures / f"{task}.png", optimize=True)  # a repo keeps them for ever
    stages = "\n".join(f"| {name} | {spent:.0f} |" for name, spent in minutes.items())
    card = TEMPLATE.read_text().format(
        metadata=_metadata(report).to_yaml(),
        table=format_table(report),
        stages=stages,
        total=round(sum(minutes.values())),
        num_weights=f"{pipe.transformer.num_parameters() / 1e6:.1f}",
        num_codes=f"{pipe.vqvae.config['num_vq_embeddings']:,}",
        curves=_shown("guidance and temperature", "curves") if "curves" in report["tasks"] else "",
        sheets="\n\n".join(f"### {task}\n\n{_shown(task)}" for task in report["tasks"] if task != "curves"),
        device=report["machine"]["device"],
        **report["settings"] | {"size": "{}x{}".format(*report["settings"]["size"])},
    )
    (Path(folder) / "README.md").write_text(card)
    shutil.copyfile(scores / "scoreboard.json", Path(folder) / "scoreboard.json")


def _shown(text: str, picture: str | None = None) -> str:
    return f"![{text}](pictures/{picture or text}.png)"


def _metadata(report: dict) -> ModelCardData:
    results = []
    for task, result in report["tasks"].items():
        for score in result["scores"]:
            kind, value = HEADLINES.get((task, score["metric"])), score["ours"]["value"]
            if kind is not None and value is not None:  # precision of nothing said is none
                data, name = ("tabletop", "Tabletop, test split"), f"{task}: {score['metric']}"
                results.append(EvalResult(kind[0], *data, kind[1], round(value, 4), metric_name=name))
    return ModelCardData(
        model_name="lumina-mgpt-tabletop",
        library_name="transformers",
        pipeline_tag="text-to-image",
        license="apache-2.0",
        language="en",
        tags=["lumina-mgpt", "autoregressive", "any-to-any", "diffusers"],
        eval_results=results,
    )


def draw_gallery(pipe: "LuminaMGPTPipeline", seed: int = 0) -> Image.Image:
    """What the checkpoint draws of eight sentences, and below, what it makes of test pictures; nothing is chosen."""

    def generators(count: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed + i) for i in range(count)]

    drawn = pipe(list(SENTENCES), generator=generators(len(SENTENCES))).images
    cells = [([picture], sentence) for picture, sentence in zip(drawn, SENTENCES, strict=True)]
    size = drawn[0].size
    for task, generator in zip(SHOWN, generators(len(SHOWN)), strict=True):
        (record,) = TabletopSource(task, [size], seed, "test", 1).fetch([0])
        words: Any = record.get("question") or record.get("phrase") or record.get("caption")
        given = record["depth"] if task == "control" else record.get("image")
        if task == "edit":
            given, words = record["images"][0], record["instructions"][0]
        output: Any = pipe(words, image=given, task=task, generator=generator)
        answer = [output.images[0]] if output.images[0] is not None else []
        said = [part for part in (words, output.text[0]) if part]
        cells.append(([given, *answer], f"{task}: {' -> '.join(said)}".strip(": ")))
    return _grid(cells, len(SENTENCES))


def _grid(cells: list[tuple[list[Image.Image], str]], columns: int) -> Image.Image:
    """Rows of so many cells: pictures above each other, with a text below."""
    width, height = (ZOOM * side for side in cells[0][0][0].size)
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(len(pictures) for pictures, _ in row) * (height + GAP_PX) + TEXT_PX for row in rows]
    grid = Image.new("RGB", (columns * (width + GAP_PX) + GAP_PX, sum(heights) + GAP_PX), "white")
    pen, top = ImageDraw.Draw(grid), GAP_PX
    for row, row_px in zip(rows, heights, strict=True):
        for i, (pictures, text) in enumerate(row):
            left = GAP_PX + i * (width + GAP_PX)
            for j, picture in enumerate(pictures):
                grid.paste(
                    picture.resize((width, height), Image.Resampling.NEAREST), (left, top + j * (height + GAP_PX))
                )
            lines = textwrap.wrap(text, width // 6, max_lines=5, placeholder="...")
            pen.multiline_text((left, top + row_px - TEXT_PX), "\n".join(lines), INK, font_size=10, spacing=1)
        top += row_px
    return grid
