"""The `lumina-mgpt` command: draw, edit, chat, train, evaluate, push.

What only some commands need is imported when they run. What a user may have got wrong is one line on stderr and exit
code 2.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from PIL import Image

if TYPE_CHECKING:
    from .pipeline_lumina_mgpt import LuminaMGPTPipeline


class OneLineErrors(typer.core.TyperGroup):
    """Shows the errors of a command without a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # such as after --help
            raise
        except typer.exceptions.TyperException as error:
            where = getattr(error, "ctx", None) or ctx
            message = f"{error.format_message()} ({where.command_path} --help shows what is accepted)"
        except ModuleNotFoundError as error:
            message = f"{error}; `pip install -e '.[train]'` in this package's folder brings what training needs"
        except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
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


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("lumina-mgpt"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
):
    """Of the command itself."""


MAX_SEED = 2**64 - 1
Prompt = Annotated[str, typer.Argument(help="What to draw.")]
ImageFile = Annotated[Path, typer.Argument(help="The picture to start from.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the picture goes.")]
Model = Annotated[str | None, typer.Option(help="Folder or repo; the small model that comes along if not given.")]
Lora = Annotated[
    list[str] | None,
    typer.Option(help="Adapter's folder or repo, and :WEIGHT if not 1, such as runs/style:0.5; once for each."),
]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels, such as 112x80.")]
Seed = Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="The same seed draws the same picture.")]
Guidance = Annotated[float | None, typer.Option(help="How much the words count; 1 is without guidance.")]
AllowUntrained = Annotated[bool, typer.Option("--allow-untrained", help="Try what the model was not trained for.")]
BestOf = Annotated[int | None, typer.Option(min=1, help="Draw so many, keep the one that the verifier likes best.")]
Verifier = Annotated[str | None, typer.Option(help='"tabletop", or folder or repo of a CLIP model.')]
Enhancer = Annotated[str | None, typer.Option(help="A chat model that puts PROMPT into more words first.")]
EnhancerUrl = Annotated[str | None, typer.Option(help="Where it is served (OpenAI-compatible), if not to be loaded.")]


@app.command()
def generate(
    prompt: Prompt,
    output: Output = Path("picture.png"),
    size: Size = None,
    seed: Seed = None,
    guidance_scale: Guidance = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to stay away from.")] = None,
    condition: Annotated[str | None, typer.Option(help="Also draw its depth, canny, hed or pose map.")] = None,
    best_of: BestOf = None,
    verifier: Verifier = None,
    prompt_enhancer: Enhancer = None,
    prompt_enhancer_url: EnhancerUrl = None,
    model: Model = None,
    lora: Lora = None,
    allow_untrained: AllowUntrained = False,
):
    """Draw a picture of what PROMPT says."""
    call: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt, "guidance_scale": guidance_scale}
    if condition is not None:
        call |= {"task": "pair", "condition": condition}
    call |= {"best_of": best_of, "verifier": _verifier(verifier)}
    call["prompt_enhancer"] = _prompt_enhancer(prompt_enhancer, prompt_enhancer_url)
    _draw(output, model, lora, size, seed, allow_untrained, **call)


@app.command()
def complete(
    image: Annotated[Path, typer.Argument(help="What the picture begins with at its top.")],
    prompt: Prompt,
    output: Output = Path("completed.png"),
    size: Size = None,
    seed: Seed = None,
    guidance_scale: Guidance = None,
    model: Model = None,
    lora: Lora = None,
    allow_untrained: AllowUntrained = False,
):
    """Draw what is below IMAGE, as PROMPT says."""
    call = {"image": image, "prompt": prompt, "task": "complete", "guidance_scale": guidance_scale}
    _draw(output, model, lora, size, seed, allow_untrained, **call)


@app.command()
def edit(
    image: ImageFile,
    instruction: Annotated[str, typer.Argument(help="What to change.")],
    output: Output = Path("edited.png"),
    seed: Seed = None,
    guidance_scale: Guidance = None,
    model: Model = None,
    lora: Lora = None,
    allow_untrained: AllowUntrained = False,
):
    """Change IMAGE as INSTRUCTION says."""
    call = {"image": image, "prompt": instruction, "guidance_scale": guidance_scale}
    _draw(output, model, lora, None, seed, allow_untrained, **call)


@app.command()
def control(
    image: Annotated[Path, typer.Argument(help="A depth, normal, pose or segmentation map.")],
    prompt: Prompt,
    output: Output = Path("controlled.png"),
    condition: Annotated[
        str | None, typer.Option(help="What IMAGE is, for Lumina-mGPT 2.0: depth, canny (or a photo), hed, pose, ...")
    ] = None,
    size: Size = None,
    seed: Seed = None,
    guidance_scale: Guidance = None,
    model: Model = None,
    lora: Lora = None,
    allow_untrained: AllowUntrained = False,
):
    """Draw PROMPT in the shape that IMAGE gives."""
    call: dict[str, Any] = {"image": image, "prompt": prompt, "task": "panel" if condition else "control"}
    call |= {"condition": condition, "guidance_scale": guidance_scale}
    _draw(output, model, lora, size, seed, allow_untrained, **call)


@app.command()
def predict(
    task: Annotated[str, typer.Argument(help="depth, normal, pose, segmentation, detection, refine, caption or vqa.")],
    image: ImageFile,
    prompt: Annotated[str | None, typer.Argument(help="What to detect or to ask.")] = None,
    output: Output = Path("prediction.png"),
    seed: Seed = None,
    model: Model = None,
    lora: Lora = None,
    allow_untrained: AllowUntrained = False,
):
    """Predict something of IMAGE: a picture, numbers (-o depth.npy), or text that is printed."""
    _draw(output, model, lora, None, seed, allow_untrained, image=image, prompt=prompt, task=task)


@app.command()
def restore(
    image: ImageFile,
    output: Output = Path("restored.png"),
    color_fix: Annotated[str, typer.Option(help="How to keep IMAGE's colors: wavelet, adain or none.")] = "wavelet",
    seed: Seed = None,
    model: Model = None,
    lora: Lora = None,
    allow_untrained: AllowUntrained = False,
):
    """Restore a degraded IMAGE, and print what is the matter with it."""
    fix = None if color_fix == "none" else color_fix
    _draw(output, model, lora, None, seed, allow_untrained, image=image, task="restore", color_fix=fix)


@app.command()
def chat(
    output_dir: Annotated[Path, typer.Option(help="Where the answers' pictures go.")] = Path("."),
    seed: Seed = None,
    model: Model = None,
    lora: Lora = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="At most so many in an answer.")] = None,
    allow_untrained: AllowUntrained = False,
):
    """Talk with the model, a line at a time; <photo.png> in a line shows it that file. An empty line ends the talk.

    A line such as "/depth <photo.png>" or "/detection a red cube <photo.png>" asks for a task in the model's words.
    """
    pipe, generator = _load(model, lora), _generator(seed)
    messages: Any = []
    num_pictures = 0
    for line in _lines():
        try:
            message = _message(pipe.processor, line, allow_untrained)
            answer = pipe.chat([*messages, message], generator=generator, max_new_tokens=max_new_tokens)
        except (ValueError, OSError) as error:  # a mistyped file name must not end the talk
            typer.echo(f"Error: {error}", err=True)
            continue
        messages = answer.messages
        typer.echo(answer.text[0])
        for picture in answer.images:
            num_pictures += 1
            _save(picture, output_dir / f"chat-{num_pictures}.png")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, as in training/recipes.")],
    plan: Annotated[bool, typer.Option("--plan", help="Only print the memory that each GPU would need.")] = False,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs to plan for.")] = 1,
    gpu_memory: Annotated[float, typer.Option(min=1, help="GiB of each of them.")] = 80,
    minutes: Annotated[float | None, typer.Option(help="Of training at most; other than in RECIPE.")] = None,
):
    """Train a model by a RECIPE; what was stopped goes on where it was."""
    from modeling_lumina_mgpt.training import chain, sft, train_vq
    from modeling_lumina_mgpt.training.recipe import ChainRecipe, SFTRecipe, load_recipe

    loaded = load_recipe(recipe)
    if not isinstance(loaded, SFTRecipe) and plan:
        raise ValueError(f"{recipe}: what can be planned is of trainer 'sft'")
    if isinstance(loaded, train_vq.VQRecipe):
        if minutes is not None:
            raise ValueError(f"{recipe}: trainer 'vq' has num_steps in place of minutes")
        train_vq.train(loaded)
    elif isinstance(loaded, ChainRecipe):
        chain.train(loaded if minutes is None else replace(loaded, minutes=minutes), recipe.parent)
    elif plan:
        from modeling_lumina_mgpt.training.plan import plan as memory_plan

        typer.echo(memory_plan(loaded, gpus, gpu_memory))
    else:
        sft.train(loaded if minutes is None else replace(loaded, max_minutes=minutes))


@app.command()
def merge(
    source: Annotated[Path, typer.Argument(help="A checkpoint-N that FSDP has sharded, or an adapter's folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    model: Annotated[str | None, typer.Option(help="What training started from, if SOURCE does not say.")] = None,
):
    """Make a model that every loader reads of what training has spread out."""
    from modeling_lumina_mgpt.training.merge import merge as run

    from .places import folder_or_repo

    run(source, out, None if model is None else folder_or_repo(model, "model"))
    typer.echo(f"the model is in {out}")


@app.command()
def tokenize(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, as in training/recipes.")],
    out: Annotated[Path | None, typer.Argument(help="Folder to make; the recipe's `tokenized` if not given.")] = None,
):
    """Turn the records of a RECIPE's mixture into ids ahead of training.

    Processes that torchrun or `accelerate launch` starts share the work. What is done already is not done again.
    """
    from modeling_lumina_mgpt.training import tokenize_dataset
    from modeling_lumina_mgpt.training.recipe import SFTRecipe, load_recipe

    loaded = load_recipe(recipe)
    if not isinstance(loaded, SFTRecipe):
        raise ValueError(f"{recipe}: a {type(loaded).__name__}; what can be tokenized is the mixture of trainer 'sft'")
    if out is None and (loaded.tokenized is None or loaded.tokenized.startswith(tokenize_dataset.HUB)):
        raise ValueError(f"{recipe}: tokenized {loaded.tokenized!r} is no folder: name one as OUT")
    tokenize_dataset.tokenize_recipe(loaded, out or loaded.tokenized)


@app.command()
def evaluate(
    output_dir: Annotated[Path, typer.Option(help="Where the scores and contact sheets go.")] = Path("scores"),
    num_per_category: Annotated[
        int | None, typer.Option(min=1, help="Without --all, sentences in each category; 50 if not given.")
    ] = None,
    all_tasks: Annotated[bool, typer.Option("--all", help="Score every task; what was stopped goes on.")] = False,
    num_cases: Annotated[
        int | None, typer.Option(min=2, help="With --all, cases of each task; 200 if not given.")
    ] = None,
    size: Size = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Chooses the cases.")] = 0,
    split: Annotated[
        Literal["test", "validation"], typer.Option(help="The second is to choose settings by.")
    ] = "test",
    guidance_scale: Guidance = None,
    best_of: Annotated[int, typer.Option(min=1, help="Pictures of each sentence; the best one counts.")] = 1,
    model: Model = None,
    lora: Lora = None,
):
    """Draw held-out sentences of the Tabletop world and judge the pictures; or score every task."""
    options: dict[str, Any] = {"seed": seed, "split": split, **_size(size)}
    if all_tasks:
        if guidance_scale is not None or best_of > 1:
            raise ValueError("--all takes neither guidance-scale nor best-of: it scores the checkpoint's own settings")
        if num_per_category is not None:
            raise ValueError(f"num-per-category {num_per_category} with --all: accepted there is --num-cases")
        from modeling_lumina_mgpt.training.scoreboard import run_scoreboard

        run_scoreboard(_load(model, lora), output_dir, num_cases or 200, **options)
        return
    if num_cases is not None:
        raise ValueError(f"num-cases {num_cases} without --all: accepted there is --num-per-category")
    from modeling_lumina_mgpt.training.evaluate import run_evaluation

    options |= {"guidance_scale": guidance_scale, "best_of": best_of}
    run_evaluation(_load(model, lora), output_dir, num_per_category or 50, **options)


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
def inspect(
    prompt: Annotated[str | None, typer.Argument(help="What to draw, for tasks with words.")] = None,
    image: Annotated[Path | None, typer.Option(help="The picture to start from, for tasks with one.")] = None,
    task: Annotated[str | None, typer.Option(help="Such as restore; text-to-image or edit if not given.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Where attention.png, entropy.png and settings.png go.")] = Path(
        "inspection"
    ),
    size: Size = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Chooses the picture.")] = 0,
    model: Model = None,
    allow_untrained: AllowUntrained = False,
):
    """Draw what the model attends to, how sure it is of each code, and what its settings do."""
    from .inspection import draw_attention, draw_entropy, draw_settings, watch

    pipe = _load(model)
    call: dict[str, Any] = {"image": image, "task": task, "allow_untrained": allow_untrained, **_size(size)}
    watched = watch(pipe, prompt, generator=_generator(seed), **call)
    attention, sinks = draw_attention(pipe, watched)
    _save(attention, output_dir / "attention.png")
    typer.echo("\n".join(["sinks:", *sinks]) if sinks else "no sinks")
    _save(draw_entropy(watched), output_dir / "entropy.png")
    typer.echo(f"mean entropy: {watched.entropy.mean():.2f} nats")
    _save(draw_settings(pipe, prompt, seed, **call), output_dir / "settings.png")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="What training or `save_pretrained` wrote.")],
    repo_id: Annotated[str, typer.Argument(help="NAMESPACE/NAME on the Hub.")],
):
    """Upload FOLDER, a model with its card and its code or an adapter, to the Hub."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    from .places import http_error

    if not any((folder / name).is_file() for name in ("model_index.json", "adapter_model.safetensors")):
        raise ValueError(f"{folder} has no model_index.json: not a model's folder; nor is it an adapter's")
    api = HfApi()
    ignored = ["trainer/*", "data/*", "samples/*", "*__pycache__*", "source.json", "training_args.bin"]
    try:
        repo = api.create_repo(repo_id, exist_ok=True)
        pushed = api.upload_folder(repo_id=repo.repo_id, folder_path=folder, ignore_patterns=ignored)
    except HfHubHTTPError as error:
        hint = "log in with `hf auth login`, or set HF_TOKEN: " if error.response.status_code in (401, 403) else ""
        raise OSError(f"{repo_id}: {hint}{error}") from error
    except http_error() as error:
        raise OSError(f"{constants.ENDPOINT} cannot be reached: {error}") from error
    typer.echo(pushed.commit_url)


def _draw(
    output: Path,
    model: str | None,
    lora: list[str] | None,
    size: str | None,
    seed: int | None,
    allow_untrained: bool,
    **call: Any,
) -> None:
    """Calls the pipeline, prints what it says and saves what it draws."""
    from .pipeline_lumina_mgpt import VerifierError

    suffix = output.suffix.lower()
    call |= {"output_type": "np" if suffix == ".npy" else "pil", "allow_untrained": allow_untrained, **_size(size)}
    if suffix != ".npy" and Image.registered_extensions().get(suffix) not in Image.SAVE:
        raise ValueError(f"output {output}: accepted is a name with a picture's ending, such as picture.png, or .npy")
    if (given := call.get("image")) is not None and given.resolve() == output.resolve():
        raise ValueError(f"output {output} is the picture that is read: name another one")
    try:
        answer: Any = _load(model, lora)(generator=_generator(seed), **call)
    except VerifierError as error:
        for i, picture in enumerate(error.output.images, 1):
            _save(picture, output.with_stem(f"{output.stem}-{i}"))
        raise ValueError(str(error)) from error
    if answer.text[0]:
        typer.echo(answer.text[0])
    if answer.scores is not None:
        typer.echo(f"score: {answer.scores[0]:g}")
    if answer.boxes is not None:
        typer.echo(f"box (left, top, right, bottom): {answer.boxes[0] or 'none found'}")
    _save(answer.images[0], output)
    if answer.panels is not None:
        _save(answer.panels[0], output.with_stem(f"{output.stem}-panel"))


def _lines() -> Iterator[str]:
    """What is typed, up to an empty line or the end of the input."""
    with suppress(EOFError):
        while line := input("> "):
            yield line


def _message(processor, line: str, allow_untrained: bool) -> dict[str, Any]:
    """What a line of a talk says: text and <files> in turn, or a /task with its words and <file>."""
    parts = re.split(r"<([^<>\s][^<>]*\.\w+)>", line)
    if match := re.match(r"/(\S+)(.*)", parts[0]):
        task, words = match[1], " ".join([match[2], *parts[2::2]]).strip()
        if task in ("pair", "panel", "complete"):
            raise ValueError(f"task {task!r} is for `lumina-mgpt generate`, `control` and `complete`, not for a talk")
        if len(parts) > 3:
            raise ValueError(f"{line!r}: accepted is one picture for a task")
        image = parts[1] if len(parts) > 1 else None
        return processor.task_message(task, words or None, image, allow_untrained=allow_untrained)
    content = [{"type": ("text", "image")[i % 2], ("text", "image")[i % 2]: x} for i, x in enumerate(parts) if x]
    return {"role": "user", "content": content}


def _verifier(name: str | None):
    if name is None:
        return None
    from .places import folder_or_repo
    from .verifiers import CLIPVerifier, TabletopVerifier

    if name == "tabletop":
        return TabletopVerifier()
    return CLIPVerifier(folder_or_repo(name, "verifier", '"tabletop", '))


def _prompt_enhancer(model: str | None, url: str | None):
    if model is None:
        if url is not None:
            raise ValueError(f"prompt-enhancer-url {url}: name the model that is served there, as --prompt-enhancer")
        return None
    from .verifiers import ChatPromptEnhancer

    return ChatPromptEnhancer(model, url=url)


def _save(drawn: Any, path: Path) -> None:
    """A picture or an array as a file; nothing where none was drawn."""
    if drawn is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(drawn, Image.Image):
        drawn.save(path)
        size = f"{drawn.width}x{drawn.height}"
    else:
        import numpy as np

        np.save(path, drawn)
        size = "x".join(map(str, drawn.shape))
    typer.echo(f"{path} ({size})", err=True)


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


def _load(model: str | None, lora: list[str] | None = None) -> "LuminaMGPTPipeline":
    """The pipeline with its adapters."""
    from transformers.utils import logging

    from modeling_lumina_mgpt.checkpoints import default_checkpoint

    from .places import folder_or_repo, load_pipeline

    folder = default_checkpoint() if model is None else folder_or_repo(model, "model")
    adapters = [(folder_or_repo(name, "lora"), weight) for name, weight in map(_weighed, lora or [])]
    logging.disable_progress_bar()  # the one that is left shows the drawing
    pipe = load_pipeline(folder)
    weights = {}
    for name, weight in adapters:
        pipe.load_lora_weights(name)
        weights[pipe.get_active_adapters()[0]] = weight
    if weights:
        pipe.set_adapters([*weights], [*weights.values()])
    return pipe


def _weighed(lora: str) -> tuple[str, float]:
    """NAME:WEIGHT in two; the weight is 1 if not given."""
    match = re.fullmatch(r"(.+):(-?\d+(?:\.\d+)?)", lora)
    return (match[1], float(match[2])) if match else (lora, 1.0)
