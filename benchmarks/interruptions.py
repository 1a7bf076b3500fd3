"""What `kill -9` takes from a training and from tokenizing ahead.

    python benchmarks/interruptions.py

Tokenizes some scenes with two processes and trains the default checkpoint on them for some steps, undisturbed. Then
does both again with kills at random moments, in which only what a command says is left is started again, and compares
every file of what came out. Both are killed in loading, working and saving, as it happens.
"""

import argparse
import filecmp
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from modeling_lumina_mgpt.checkpoints import default_checkpoint
from modeling_lumina_mgpt.training.trainer import last_checkpoint

NUM_KILLS = 10  # of each
COMMAND = [sys.executable, "-c", "from modeling_lumina_mgpt.pipelines.cli import app; app()"]


def write_recipe(folder: Path, num_scenes: int, num_steps: int) -> Path:
    folder.mkdir()
    sources = [
        {"path": "tabletop", "task": task, "num_records": num_scenes, "options": {"max_aspect_ratio": 1}}
        for task in ("text-to-image", "depth")
    ]
    sft = {"max_steps": num_steps, "save_steps": 2, "save_total_limit": 2, "per_device_train_batch_size": 4}
    sft |= {"learning_rate": 1e-4, "bf16": False, "report_to": "none", "logging_steps": 1, "disable_tqdm": True}
    recipe = {
        "trainer": "sft",
        "output_dir": str(folder / "run"),
        "model": str(default_checkpoint()),
        "mixture": {"target_px": 64, "sources": sources},
        "tokenized": str(folder / "data"),
        "sft": sft,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def run(command: str, recipe: Path, kill_after_s: float | None = None) -> bool:
    """Whether the command ended by itself; all its processes are killed if it did not in time."""
    process = subprocess.Popen(
        [*COMMAND, command, recipe], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        _, said = process.communicate(timeout=kill_after_s)
    except subprocess.TimeoutExpired:
        subprocess.run(["kill", "-9", "--", f"-{process.pid}"], check=True)
        process.communicate()
        return False
    assert process.returncode == 0, said.decode()
    return True


def disturbed(command: str, recipe: Path, seconds: float, moments: random.Random, state) -> None:
    """Kills a command `NUM_KILLS` times, starting it again each time, and lets it end."""
    kills = 0
    while kills < NUM_KILLS:
        moment_s = moments.uniform(0.3, 1.0) * seconds
        if run(command, recipe, moment_s):
            print(f"  it had ended within {moment_s:.1f} s: once more from nothing", flush=True)
            shutil.rmtree(recipe.parent / {"tokenize": "data", "train": "run"}[command])
            continue
        kills += 1
        print(f"  killed after {moment_s:.1f} s; whole: {state()}", flush=True)
    assert run(command, recipe)


def compare(left: Path, right: Path, pattern: str) -> str:
    files = sorted(path.relative_to(left) for path in left.glob(pattern))
    assert files and files == sorted(path.relative_to(right) for path in right.glob(pattern))
    different = [str(file) for file in files if not filecmp.cmp(left / file, right / file, shallow=False)]
    assert not different, different
    return f"{len(files)} files, identical"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--scenes", type=int, default=2048, help="records of each of two tasks")
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        calm, hard = (write_recipe(Path(scratch, name), args.scenes, args.steps) for name in ("calm", "hard"))
        data, runs = hard.parent / "data", hard.parent / "run" / "trainer"
        states = {
            "tokenize": lambda: f"{len([*data.glob('data/*.parquet')])} shards",
            "train": lambda: Path(last_checkpoint(runs) or "none").name,
        }
        for command, pattern in (("tokenize", "data/data/*.parquet"), ("train", "run/*.safetensors")):
            begin = time.perf_counter()
            assert run(command, calm)
            seconds = time.perf_counter() - begin
            print(f"{command}: {seconds:.1f} s undisturbed", flush=True)
            disturbed(command, hard, seconds, moments, states[command])
            print(f"{command}: {NUM_KILLS} kills, {compare(calm.parent, hard.parent, pattern)}", flush=True)


if __name__ == "__main__":
    main()
