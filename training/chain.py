"""Recipes one after the other: from nothing to a checkpoint, its scores and its card.

    lumina-mgpt train training/recipes/tabletop/default.yaml
    lumina-mgpt train training/recipes/tabletop/default.yaml --minutes 15

What was stopped goes on where it was: a stage that has ended is left alone, the one that was cut resumes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline

from . import sft, train_vq
from .card import write_card
from .scoreboard import run_scoreboard
from .trainer import last_checkpoint, logged_minutes

FINISHED = "finished.json"


@dataclass
class ChainRecipe:
    """Stages and the time that they share.

    Attributes:
        output_dir: where the chain keeps which stages have ended, and `scores/` of the last one's model.
        stages: `recipe`, a file beside this one, and the `share` of the minutes that it gets; one without a share, as
            of a VQ model, takes what its own recipe says.
        minutes: of training. Rendering, tokenizing and scoring come on top.
        num_cases: of each task in the scoreboard.

    Raises:
        ValueError: for stages of another form, or shares that are not 1 together.
    """

    output_dir: str
    stages: list[dict[str, Any]]
    minutes: float
    num_cases: int = 200

    def __post_init__(self):
        if not self.stages or not all({"recipe"} <= stage.keys() <= {"recipe", "share"} for stage in self.stages):
            raise ValueError(f"stages {self.stages}: accepted are a `recipe` and perhaps a `share` for each")
        if abs(sum(stage.get("share", 0) for stage in self.stages) - 1) > 1e-6:
            raise ValueError(f"stages {self.stages}: accepted are shares that are 1 together")
        if not self.minutes > 0:
            raise ValueError(f"minutes {self.minutes}: accepted are numbers above 0")


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
        if isinstance(recipe, train_vq.VQRecipe):
            train_vq.train(recipe)
        else:
            if "share" in stage:
                recipe.max_minutes = chain.minutes * stage["share"]
            sft.train(recipe)
        finished.append(name)
        path.write_text(json.dumps(finished) + "\n")
    folders = [Path(recipe.output_dir) for recipe in recipes.values() if isinstance(recipe, sft.SFTRecipe)]
    pipe, scores = LuminaMGPTPipeline.from_pretrained(folders[-1]), path.with_name("scores")
    run_scoreboard(pipe, scores, chain.num_cases)
    write_card(pipe, scores, {stage.name: _minutes(stage) for stage in folders}, folders[-1])


def _stage(path: Path) -> sft.SFTRecipe | train_vq.VQRecipe:
    recipe = sft.load_recipe(path)
    if isinstance(recipe, ChainRecipe):
        raise ValueError(f"{path}: a chain within a chain; accepted are trainers 'vq' and 'sft'")
    return recipe


def _minutes(output_dir: Path) -> float:
    """That a stage's training has taken, as its last checkpoint says."""
    state = Path(last_checkpoint(output_dir / "trainer") or "") / "trainer_state.json"
    return logged_minutes(json.loads(state.read_text())["log_history"])
