"""Every task of every family, through the pipeline, a chat and the command line, on converted checkpoints."""

import pytest
import torch
from PIL import Image
from published import publish
from transformers import LogitsProcessor
from typer.testing import CliRunner

from helpers import random_picture
from modeling_lumina_mgpt.convert_lumina_mgpt_checkpoint import PUBLISHED, convert
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline, cli
from modeling_lumina_mgpt.processing_lumina_mgpt import TASKS

CHECKPOINTS = {"Lumina-mGPT-7B-768-Omni": "lumina", "Lumina-mGPT-2.0-Omni": "lumina-2", "PURE": "pure"}
TRAINED = {name: next(p.tasks for p in PUBLISHED if p.name == name) for name in CHECKPOINTS}
CASES = [(name, task) for name in CHECKPOINTS for task in dict.fromkeys((*TRAINED[name], "complete"))]
COMMANDS = {
    "text-to-image": ["generate", "a cat", "--size", "64x32"],
    "complete": ["complete", "input.png", "a cat", "--size", "32x64"],
    "pair": ["generate", "a cat", "--condition", "depth", "--size", "64x32"],
    "panel": ["control", "input.png", "a cat", "--condition", "canny", "--size", "64x32"],
    "edit": ["edit", "input.png", "Remove the cat."],
    "control": ["control", "input.png", "a cat"],
    "detection": ["predict", "detection", "input.png", "the cat"],
    "vqa": ["predict", "vqa", "input.png", "What is it?"],
    "restore": ["restore", "input.png"],
}
SIZES = {"complete": (32, 64)}
assert {task for _, task in CASES} == {*TASKS}


class Say(LogitsProcessor):
    """Has a model without training say these ids first."""

    def __init__(self, ids: list[int], prompt_length: int):
        self.ids, self.prompt_length = ids, prompt_length

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt_length
        if step < len(self.ids):
            scores[:, self.ids[step]] = 1e6
        return scores


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """Converted checkpoints by name; their default pictures are small."""
    made = {}

    def pipe(name: str) -> LuminaMGPTPipeline:
        if name not in made:
            source = publish(tmp_path_factory.mktemp("published") / name, family=CHECKPOINTS[name])
            convert(source, source.parent / "out")
            made[name] = LuminaMGPTPipeline.from_pretrained(source.parent / "out")
            made[name].set_progress_bar_config(disable=True)
            made[name].processor.target_px = 64
            made[name].transformer.config.default_height_px = made[name].transformer.config.default_width_px = 32
            made[name].transformer.generation_config.max_new_tokens = 80
        return made[name]

    return pipe


@pytest.fixture
def picture(tmp_path, monkeypatch):
    """Also lies in the current folder, as input.png."""
    monkeypatch.chdir(tmp_path)
    picture = random_picture(64, 32)
    picture.save("input.png")
    return picture


@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_task_is_one_call_away(pipes, picture, name, task, monkeypatch):
    pipe = pipes(name)
    processor, asked = pipe.processor, pipe.processor.tasks[task]
    width, height = size = SIZES.get(task, picture.size)
    words = "a cat" if "{prompt}" in asked.template else None
    condition = "canny" if "{condition}" in asked.template else None
    image = picture if asked.needs_image else None
    sizes = {} if asked.needs_image and not asked.continues else {"height": height, "width": width}
    seen, said, stream = [], [], pipe.transformer.stream
    if asked.answer == "text+image":  # a text, then the picture of a whole square
        size = (64, 64)
        said = processor.tokenizer("Blurred.", add_special_tokens=False)["input_ids"]
        said += processor.uni_rep.header(*processor.uni_rep.grid(64, 64))
        monkeypatch.setattr(pipe.transformer.generation_config, "max_new_tokens", 100)

    def watched(input_ids, **kwargs):
        seen.append(input_ids)
        return stream(input_ids, logits_processor=[Say(said, input_ids.shape[1])], **kwargs)

    monkeypatch.setattr(pipe.transformer, "stream", watched)

    # 1. The pipeline
    given = {"image": image, "condition": condition, "allow_untrained": True, **sizes}
    output = pipe(words, task=task, generator=torch.Generator().manual_seed(0), **given)
    if "image" in asked.answer:
        wanted = (64, 32) if asked.answer == "text+image" else size  # a restored picture keeps its shape
        assert output.images[0].size == wanted
    if "text" in asked.answer:
        assert output.text[0]
    assert (output.panels is not None) == (asked.num_panels > 1)
    assert (output.boxes is not None) == (task == "detection")
    if asked.num_panels > 1:
        assert output.panels[0].size == size

    # 2. A chat
    whole = {"height": height * asked.num_panels, "width": width} if sizes else {}
    content = image if not asked.continues else None
    message = processor.task_message(task, words, content, condition=condition, allow_untrained=True, **whole)
    begun = {}
    if asked.continues:
        upper_px = height if asked.num_panels > 1 else picture.height * width // picture.width
        shown = processor.image_processor.canny(picture) if condition == "canny" else picture
        begun = {"upper_rows": processor.encode_images([shown], size=(width, upper_px))[0]}
    if asked.answer == "image":
        begun |= whole or dict(zip(("width", "height"), size, strict=True))
    talk = pipe.chat([message], generator=torch.Generator().manual_seed(0), **begun)
    if task != "restore":  # which sees a stretched picture
        assert torch.equal(*seen)
    if "image" in asked.answer:
        assert talk.images[0].size == (size[0], size[1] * asked.num_panels)
    if "text" in asked.answer:
        assert talk.text[0]
    again = pipe.chat([*talk.messages, {"role": "user", "content": "And now?"}], max_new_tokens=4)
    assert len(again.messages) == 4

    # 3. The command line
    monkeypatch.setattr(cli, "_load", lambda model, lora: pipe)
    command = COMMANDS.get(task, ["predict", task, "input.png"])
    result = CliRunner().invoke(cli.app, [*command, "--allow-untrained", "--seed", "0", "-o", "output.png"])
    assert result.exit_code == 0, result.stderr
    if "image" in asked.answer:
        assert Image.open("output.png").size == output.images[0].size
    if "text" in asked.answer:
        assert result.stdout.strip()
    if asked.num_panels > 1:
        assert Image.open("output-panel.png").size == size


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_other_tasks_are_refused_with_the_checkpoint_that_does_them(pipes, picture, name):
    pipe = pipes(name)
    for task in pipe.processor.tasks.keys() - set(TRAINED[name]):
        with pytest.raises(ValueError, match=f"{pipe.processor.tasks[task].checkpoint} does it"):
            pipe(task=task)
