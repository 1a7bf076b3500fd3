"""Recipes one after the other: from nothing to a checkpoint, its scores and its card.

    lumina-mgpt train training/recipes/tabletop/default.yaml
    lumina-mgpt train training/recipes/tabletop/default.yaml --minutes 90

What was stopped goes on where it was: a stage that has ended is left alone, the one that was cut resumes.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

from modeling_lumina_mgpt.pipelines.places import load_pipeline

from . import sft, train_vq
from .card import write_card
from .files import write_whole
from .recipe import ChainRecipe, SFTRecipe, load_recipe
from .scoreboard import run_scoreboard
from .train_vq import VQRecipe
from .trainer import last_checkpoint, logged_minutes

FINISHED = "finished.json"


def train(chain: ChainRecipe, folder: str | Path) -> None:
    """Runs (or resumes) the stages, whose recipes are in `folder`, and scores what comes out.

    Raises:
        ValueError: for stages that do not fit together, and in one of several processes.
        Diverged, Stopped: see `LuminaMGPTTrainer`.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("a chain runs in one process: launch the recipes of its stages one by one")
    stages = {stage["recipe"]: _stage(Path(folder), chain, **stage) for stage in chain.stages}
    *_, last = stages.values()
    if not isinstance(last, SFTRecipe) or last.lora is not None:
        raise ValueError(
            f"stage {chain.stages[-1]}: accepted as the last one is trainer 'sft' without lora, whose model is scored"
        )
    path = Path(chain.output_dir) / FINISHED
    path.parent.mkdir(parents=True, exist_ok=True)
    finished = json.loads(path.read_text()) if path.exists() else []
    for name, recipe in stages.items():
        if name in finished:
            continue
        print(f"{name}: {recipe.output_dir}", flush=True)
        if isinstance(recipe, VQRecipe):
            train_vq.train(recipe)
        else:
            sft.train(recipe)
        finished.append(name)
        write_whole(path, (json.dumps(finished) + "\n").encode())
    minutes = {Path(r.output_dir).name: _minutes(r) for r in stages.values() if isinstance(r, SFTRecipe)}
    pipe, scores = load_pipeline(last.output_dir), path.with_name("scores")
    run_scoreboard(pipe, scores, chain.num_cases)
    write_card(pipe, scores, minutes, last.output_dir)


def _stage(folder: Path, chain: ChainRecipe, recipe: str, share: float | None = None) -> SFTRecipe | VQRecipe:
    """A stage's recipe, with its share of the chain's minutes."""
    loaded = load_recipe(folder / recipe)
    if isinstance(loaded, ChainRecipe):
        raise ValueError(f"{folder / recipe}: a chain within a chain; accepted are trainers 'vq' and 'sft'")
    if share is None:
        return loaded
    if isinstance(loaded, VQRecipe):
        raise ValueError(f"{recipe} with share {share}: a VQ model takes what its own num_steps say")
    return replace(loaded, max_minutes=chain.minutes * share)


def _minutes(recipe: SFTRecipe) -> float:
    """That a stage's training has taken, as its last checkpoint says."""
    checkpoint = last_checkpoint(folder := Path(recipe.output_dir) / "trainer")
    if checkpoint is None:
        raise ValueError(f"{folder}: no whole checkpoint, which says how long the training has taken")
    return logged_minutes(json.loads((Path(checkpoint) / "trainer_state.json").read_text())["log_history"])
