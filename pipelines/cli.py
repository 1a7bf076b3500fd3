"""The `lumina-mgpt` command: draw, edit, chat, train, evaluate, push.

Nothing heavy is imported before a command runs. What a user may have got wrong is one line on stderr and exit code 2.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

if TYPE_CHECKING:
    from .pipeline_lumina_mgpt import LuminaMGPTPipeline


class OneLineErrors(typer.core.TyperGroup):
    """Shows the errors of a command without a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            message = f"{error}; pip install 'lumina-mgpt[train]' brings what training and evaluation need"
        except (ValueError, OSError) as error:
            message = " ".join(str(error).split())
        typer.echo(f"Error: {message}", err=True)
        raise typer.Exit(2)


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Pictures and text with Lumina-mGPT, Lumina-mGPT 2.0 and PURE.",
)

Prompt = Annotated[str, typer.Argument(help="What to draw.")]
ImageFile = Annotated[Path, typer.Argument(help="The picture to start from.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the picture goes.")]
Model = Annotated[str | None, typer.Option(help="Folder or repo; the small model that comes along if not given.")]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels, such as 112x80.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same picture.")]
Guidance = Annotated[float | None, typer.Option(help="How much the words count; 1 is without guidance.")]


@app.command()
def generate(
    prompt: Prompt,
    output: Output = Path("picture.png"),
    size: Size = None,
    seed: Seed = None,
    guidance_scale: Guidance = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to stay away from.")] = None,
    model: Model = None,
):
    """Draw a picture of what PROMPT says."""
    _draw(output, model, size, seed, prompt=prompt, guidance_scale=guidance_scale, negative_prompt=negative_prompt)


@app.command()
def edit(
    image: ImageFile,
    instruction: Annotated[str, typer.Argument(help="What to change.")],
    output: Output = Path("picture.png"),
    seed: Seed = None,
    guidance_scale: Guidance = None,
    model: Model = None,
):
    """Change IMAGE as INSTRUCTION says."""
    _draw(output, model, None, seed, image=image, prompt=instruction, guidance_scale=guidance_scale)


@app.command()
def control(
    image: Annotated[Path, typer.Argument(help="A depth, normal, pose or segmentation map.")],
    prompt: Prompt,
    output: Output = Path("picture.png"),
    seed: Seed = None,
    guidance_scale: Guidance = None,
    model: Model = None,
):
    """Draw PROMPT in the shape that IMAGE gives."""
    _draw(output, model, None, seed, image=image, prompt=prompt, task="control", guidance_scale=guidance_scale)


@app.command()
def predict(
    task: Annotated[str, typer.Argument(help="depth, normal, pose, segmentation, detection, caption, vqa, ...")],
    image: ImageFile,
    prompt: Annotated[str | None, typer.Option(help="What to detect or to ask.")] = None,
    output: Output = Path("prediction.png"),
    seed: Seed = None,
    model: Model = None,
):
    """Predict something of IMAGE: a picture, or text that is printed."""
    _draw(output, model, None, seed, image=image, prompt=prompt, task=task)


@app.command()
def restore(image: ImageFile, output: Output = Path("restored.png"), seed: Seed = None, model: Model = None):
    """Restore a degraded IMAGE, and print what is the matter with it."""
    _draw(output, model, None, seed, image=image, task="restore")


@app.command()
def chat(
    output_dir: Annotated[Path, typer.Option(help="Where the answers' pictures go.")] = Path("."),
    seed: Seed = None,
    model: Model = None,
):
    """Talk with the model, a line at a time; <photo.png> in a line shows it that file. An empty line ends the talk."""
    pipe, generator = _load(model), _generator(seed)
    messages: Any = []
    num_pictures = 0
    while line := typer.prompt(">", default="", show_default=False, prompt_suffix=" "):
        parts = re.split(r"<([^<>\s][^<>]*\.\w+)>", line)  # text and file names in turn
        content = [{"type": ("text", "image")[i % 2], ("text", "image")[i % 2]: x} for i, x in enumerate(parts) if x]
        try:
            answer = pipe.chat([*messages, {"role": "user", "content": content}], generator=generator)
        except (ValueError, OSError) as error:  # a mistyped file name must not end the talk
            typer.echo(f"Error: {error}", err=True)
            continue
        messages = answer.messages
        typer.echo(answer.text[0])
        for picture in answer.images:
            num_pictures += 1
            _save(picture, output_dir / f"chat-{num_pictures}.png")


@app.command()
def train(recipe: Annotated[Path, typer.Argument(help="A YAML file, as in training/recipes.")]):
    """Train a model by a RECIPE."""
    import yaml

    try:
        values = yaml.safe_load(recipe.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{recipe} is not YAML: {error}") from error
    trainer = values.pop("trainer", "sft") if isinstance(values, dict) else None
    if trainer == "vq":
        from modeling_lumina_mgpt.training.train_vq import VQRecipe as Recipe
        from modeling_lumina_mgpt.training.train_vq import train as run
    elif trainer == "sft":
        from modeling_lumina_mgpt.training.sft import SFTRecipe as Recipe
        from modeling_lumina_mgpt.training.sft import train as run
    else:
        raise ValueError(f"{recipe}: trainer {trainer!r}; accepted are 'vq' and 'sft'")
    try:
        loaded = Recipe(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{recipe}: {error}; accepted are {', '.join(Recipe.__dataclass_fields__)}") from error
    run(loaded)


@app.command()
def evaluate(
    output_dir: Annotated[Path, typer.Option(help="Where scores.json and contact_sheet.png go.")] = Path("scores"),
    num_per_category: Annotated[int, typer.Option(min=1, help="Sentences in each of the six categories.")] = 50,
    size: Size = None,
    seed: Annotated[int, typer.Option(help="Chooses the sentences.")] = 0,
    guidance_scale: Guidance = None,
    model: Model = None,
):
    """Draw held-out sentences of the Tabletop world and judge the pictures."""
    from modeling_lumina_mgpt.training.evaluate import run_evaluation

    options: dict[str, Any] = {"seed": seed, "guidance_scale": guidance_scale, **_size(size)}
    run_evaluation(_load(model), output_dir, num_per_category, **options)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or repo of a published checkpoint.")],
    out: Annotated[Path | None, typer.Argument(help="Folder to make.")] = None,
    vq: Annotated[Path | None, typer.Option(help="Its VQ model's file, if SOURCE does not hold it.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; as in SOURCE if not given.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Its tokenizer, if SOURCE does not hold it.")] = None,
    name: Annotated[str | None, typer.Option(help="The published checkpoint, if SOURCE is called otherwise.")] = None,
    from_chameleon: Annotated[bool, typer.Option("--from-chameleon", help="Zero the head's image rows.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only verify the converted folder SOURCE.")] = False,
):
    """Convert a published checkpoint to a folder that every loader reads, and verify it."""
    from modeling_lumina_mgpt import convert_lumina_mgpt_checkpoint as converter

    if check == (out is not None):
        raise ValueError("convert takes SOURCE and OUT, or --check and the folder to verify")
    if out is None:
        found = converter.check(source)
    else:
        found = converter.convert(source, out, vq, dtype, tokenizer, name, from_chameleon)
    typer.echo("\n".join(found))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="What training or `save_pretrained` wrote.")],
    repo_id: Annotated[str, typer.Argument(help="NAMESPACE/NAME on the Hub.")],
):
    """Upload FOLDER, with its model card and its code, to the Hub."""
    from huggingface_hub import HfApi

    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} has no model_index.json: not a model's folder")
    api, ignored = HfApi(), ["trainer/*", "data/*", "*__pycache__*"]
    repo = api.create_repo(repo_id, exist_ok=True)
    typer.echo(api.upload_folder(repo_id=repo.repo_id, folder_path=folder, ignore_patterns=ignored).commit_url)


def _draw(output: Path, model: str | None, size: str | None, seed: int | None, **call: Any) -> None:
    """Calls the pipeline, prints what it says and saves what it draws."""
    call |= _size(size)
    if output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"output {output}: accepted is a name with a picture's ending, such as picture.png")
    answer: Any = _load(model)(generator=_generator(seed), **call)
    if answer.text[0]:
        typer.echo(answer.text[0])
    if answer.images[0] is not None:
        _save(answer.images[0], output)


def _save(picture, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    typer.echo(f"{path} ({picture.width}x{picture.height})", err=True)


def _size(size: str | None) -> dict[str, int]:
    """`width` and `height` from WIDTHxHEIGHT, nothing from None."""
    if size is None:
        return {}
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if match is None:
        raise ValueError(f"size {size!r}: accepted is WIDTHxHEIGHT, such as 112x80")
    return {"width": int(match[1]), "height": int(match[2])}


def _generator(seed: int | None):
    import torch

    return None if seed is None else torch.Generator().manual_seed(seed)


def _load(model: str | None) -> "LuminaMGPTPipeline":
    """The pipeline on an accelerator if there is one, in bfloat16 there and in float32 on the CPU."""
    import torch
    from transformers.utils import logging

    from modeling_lumina_mgpt.checkpoints import default_checkpoint

    from .pipeline_lumina_mgpt import LuminaMGPTPipeline

    if model is not None and not Path(model).exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise ValueError(f"model {model!r}: neither a folder nor a repo NAMESPACE/NAME")
    logging.disable_progress_bar()  # the one that is left shows the drawing
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return LuminaMGPTPipeline.from_pretrained(model or default_checkpoint(), dtype=dtype).to(device)
