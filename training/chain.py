"""Recipes one after the other: from nothing to a checkpoint, its scores and its card.

    lumina-mgpt train training/recipes/tabletop/default.yaml
    lumina-mgpt train training/recipes/tabletop/default.yaml --minutes 90

What was stopped goes on where it was: a stage that has ended is left alone, the one that was cut resumes.
"""

import json
from pathlib import Path

from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline

from . import sft, train_vq
from .card import write_card
from .recipe import ChainRecipe, SFTRecipe, load_recipe
from .scoreboard import run_scoreboard
from .train_vq import VQRecipe
from .trainer import last_checkpoint, logged_minutes

FINISHED = "finished.json"


def train(chain: ChainRecipe, folder: str | Path) -> None:
    """Runs (or resumes) the stages, whose recipes are in `folder`, and scores what comes out.

    Raises:
        Diverged, Stopped: see `LuminaMGPTTrainer`.
    """
    path = Path(chain.output_dir) / FINISHED
    path.parent.mkdir(parents=True, exist_ok=True)
    recipes = {stage["recipe"]: _stage(Path(folder) / stage["recipe"]) for stage in chain.stages}
    finished = json.loads(path.read_text()) if path.exists() else []
    for stage in chain.stages:
        name, recipe = stage["recipe"], recipes[stage["recipe"]]
        if name in finished:
            continue
        print(f"{name}: {recipe.output_dir}", flush=True)
        if isinstance(recipe, VQRecipe):
            train_vq.train(recipe)
        else:
            if "share" in stage:
                recipe.max_minutes = chain.minutes * stage["share"]
            sft.train(recipe)
        finished.append(name)
        path.write_text(json.dumps(finished) + "\n")
    folders = [Path(recipe.output_dir) for recipe in recipes.values() if isinstance(recipe, SFTRecipe)]
    pipe, scores = LuminaMGPTPipeline.from_pretrained(folders[-1]), path.with_name("scores")
    run_scoreboard(pipe, scores, chain.num_cases)
    write_card(pipe, scores, {stage.name: _minutes(stage) for stage in folders}, folders[-1])


def _stage(path: Path) -> SFTRecipe | VQRecipe:
    recipe = load_recipe(path)
    if isinstance(recipe, ChainRecipe):
        raise ValueError(f"{path}: a chain within a chain; accepted are trainers 'vq' and 'sft'")
    return recipe


def _minutes(output_dir: Path) -> float:
    """That a stage's training has taken, as its last checkpoint says."""
    state = Path(last_checkpoint(output_dir / "trainer") or "") / "trainer_state.json"
    return logged_minutes(json.loads(state.read_text())["log_history"])
