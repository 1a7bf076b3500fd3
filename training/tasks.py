"""Records of datasets -> conversations: turns with `<|image|>` placeholders, and the pictures that fill them."""

import random
from typing import Any

from modeling_lumina_mgpt.processing_lumina_mgpt import IMAGE

from .tabletop import MAPS


def tabletop_conversation(task: str, record: dict[str, Any], processor, rng: random.Random) -> tuple[list[str], list]:
    """A record of `tabletop_records` as a conversation in one of the processor's tasks.

    Args:
        task: "text-to-image", "caption", "vqa", "edit", "control", "depth", "normal" or "segmentation"; ValueError for
            others.

    Returns:
        The turns, user first, and one picture for each placeholder.
    """
    picture = record["image"]
    if task == "text-to-image":
        prompt = processor.task_prompt(task, record["caption"], height=picture.height, width=picture.width)
        return [prompt, IMAGE], [picture]
    if task == "caption":
        return [processor.task_prompt(task), record["caption"]], [picture]
    if task == "vqa":
        return [processor.task_prompt(task, record["question"]), record["answer"]], [picture]
    if task == "edit":
        return [processor.task_prompt(task, record["instruction"]), IMAGE], [picture, record["edited"]]
    if task == "control":
        condition = record[rng.choice(MAPS)]
        return [processor.task_prompt(task, record["caption"]), IMAGE], [condition, picture]
    if task in MAPS:
        return [processor.task_prompt(task), IMAGE], [picture, record[task]]
    raise ValueError(f"task {task!r} has no Tabletop records yet")
