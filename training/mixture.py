"""Weighted mixtures of datasets, as token ids with labels, kept on disk.

Images become codes once; what is drawn anew at each epoch (the context drop) is the collator's work, in `sft.py`.
"""

import json
import os
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset, Features, List, Value, load_from_disk

from .tabletop import MAPS, tabletop_records
from .tasks import tabletop_conversation

TASKS_WITH_MAPS = {*MAPS, "control", "edit"}
FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "task": Value("string")})
CHUNK = 64


@dataclass
class Mixture:
    """What a stage trains on.

    Attributes:
        target_px: side of the square whose area pictures have; sizes are that area's buckets.
        max_aspect_ratio: of the buckets in use; beyond 2, Tabletop's four objects hardly have room.
        num_scenes: Tabletop scenes, each of which becomes one record.
        tasks: task -> weight.
        seed: of the scenes and of the choice of tasks.
    """

    target_px: int
    num_scenes: int
    tasks: dict[str, float] = field(default_factory=lambda: {"text-to-image": 1.0})
    max_aspect_ratio: float = 2.0
    seed: int = 0


def load_mixture(mixture: Mixture, processor, folder: str | Path) -> Dataset:
    """The mixture's records (`input_ids`, `labels`, `task`), from `folder` if they are there, else made and saved.

    Raises:
        ValueError: if the records in `folder` are of another mixture.
    """
    folder = Path(folder)
    if not folder.exists():
        _make(mixture, processor, folder)
    made = json.loads((folder / "mixture.json").read_text())
    if made != asdict(mixture):
        raise ValueError(f"{folder} holds another mixture, {made}, not {asdict(mixture)}: remove it to make this one")
    return load_from_disk(folder)


def _make(mixture: Mixture, processor, folder: Path) -> None:
    """Renders and encodes; the folder appears when it is whole."""
    part = folder.with_name(f"{folder.name}.part")
    with TemporaryDirectory() as cache_dir:
        made = Dataset.from_generator(
            _records,
            features=FEATURES,
            gen_kwargs={"starts": [*range(0, mixture.num_scenes, CHUNK)], "mixture": mixture, "processor": processor},
            num_proc=min(os.cpu_count() or 1, -(-mixture.num_scenes // CHUNK)),
            cache_dir=cache_dir,
        )
        made.save_to_disk(part)
    (part / "mixture.json").write_text(json.dumps(asdict(mixture)))
    part.rename(folder)


def _records(starts: list[int], mixture: Mixture, processor) -> Iterator[dict]:
    """Records of the chunks of scenes at `starts`; workers share these chunks out among themselves."""
    torch.set_num_threads(1)
    sizes = [s for s in processor.uni_rep.buckets(mixture.target_px) if max(s) <= mixture.max_aspect_ratio * min(s)]
    names, weights = zip(*mixture.tasks.items(), strict=True)
    for start in starts:
        indices = range(start, min(start + CHUNK, mixture.num_scenes))
        rng = random.Random(f"{mixture.seed}/{start}")
        maps = bool(TASKS_WITH_MAPS & mixture.tasks.keys())
        records = tabletop_records(indices, sizes, mixture.seed, maps=maps)
        tasks = rng.choices(names, weights, k=len(indices))
        conversations = [tabletop_conversation(t, r, processor, rng) for t, r in zip(tasks, records, strict=True)]
        codes = iter(processor.encode_images([i for _, images in conversations for i in images], mixture.target_px))
        for task, (turns, images) in zip(tasks, conversations, strict=True):
            ids = processor.encode_conversation(turns, [next(codes) for _ in images])
            yield {**ids, "task": task}
