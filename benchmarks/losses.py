"""That losses do not depend on how they are computed: the same steps, taken in other ways.

    python benchmarks/losses.py

Trains the default checkpoint for five steps on all of 32 records of four tasks, each way in a process of its own (two
of them on two, over gloo), and prints the largest difference of any step's loss from the first way's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from distributed_worker import force_fsdp_on_cpu

from modeling_lumina_mgpt.checkpoints import default_checkpoint
from modeling_lumina_mgpt.training.recipe import load_recipe
from modeling_lumina_mgpt.training.sft import train
from modeling_lumina_mgpt.training.trainer import LuminaMGPTTrainer, last_checkpoint

TASKS = ("text-to-image", "vqa", "edit", "depth")
NUM_RECORDS, NUM_STEPS, ROW = 32, 5, 1024
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LuminaMGPTDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def with_logits(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    """The loss by its definition, from the logits of all positions."""
    given = {name: inputs[name] for name in ("input_ids", "position_ids") if name in inputs}
    logits = model(**given, use_cache=False).logits[:, :-1].float()
    targets = inputs["labels"][:, 1:]
    counted = targets >= 0
    cross_entropy = F.cross_entropy(logits[counted], targets[counted], reduction="none")
    z_losses = logits.logsumexp(-1)[counted].square()
    nothing = torch.zeros(inputs["labels"].shape)
    place = F.pad(counted, (0, 1))
    parts = {"cross_entropy": cross_entropy, "z_losses": z_losses}
    self._add(inputs, argparse.Namespace(**{k: nothing.masked_scatter(place, v.detach()) for k, v in parts.items()}))
    return (cross_entropy + self.model.config.z_loss_weight * z_losses).sum() / num_items_in_batch


def losses(folder: Path, name: str, num_processes: int = 1, flags: tuple[str, ...] = (), **values) -> list[float]:
    """Those of a run with these values of a recipe, or of its `sft`."""
    sources = [{"path": "tabletop", "task": task, "num_records": NUM_RECORDS // len(TASKS)} for task in TASKS]
    sft = {"max_steps": NUM_STEPS, "save_steps": NUM_STEPS, "learning_rate": 1e-3, "logging_steps": 1, "bf16": False}
    sft |= {"per_device_train_batch_size": NUM_RECORDS, "report_to": "none", "disable_tqdm": True}
    recipe = {"output_dir": str(folder / name), "model": str(default_checkpoint()), "tokenized": str(folder / "data")}
    recipe |= {
        "mixture": {"target_px": 64, "sources": sources, "max_length": ROW},
        "sft": sft | values.pop("sft", {}),
        **values,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)] if num_processes > 1 else []
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **(FSDP if "--fsdp" in flags else {})}
    command = [sys.executable, *launch, __file__, "--train", str(path), *flags]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = json.loads((Path(last_checkpoint(folder / name / "trainer")) / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--fsdp", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--with-logits", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        if given.fsdp:
            force_fsdp_on_cpu()
        if given.with_logits:
            LuminaMGPTTrainer.compute_loss = with_logits
        return train(load_recipe(given.train))
    with tempfile.TemporaryDirectory() as scratch:
        folder, half = Path(scratch), {"sft": {"per_device_train_batch_size": NUM_RECORDS // 2}}
        quarter = {"sft": {"per_device_train_batch_size": NUM_RECORDS // 4, "gradient_accumulation_steps": 4}}
        first = losses(folder, "first")
        ways = {
            "full logits": losses(folder, "logits", flags=("--with-logits",)),
            "packed in rows of 1,024": losses(folder, "packed", pack_tokens=ROW),
            "4 batches accumulated": losses(folder, "accumulated", **quarter),
            "straight from images": losses(folder, "images", tokenized=None),
            "2 processes, DDP": losses(folder, "ddp", 2, **half),
            "2 processes, FSDP2": losses(folder, "fsdp", 2, ("--fsdp",), **half),
        }
    print(f"losses {', '.join(f'{loss:.4f}' for loss in first)}; largest difference from them:")
    for way, found in ways.items():
        print(f"| {way} | {max(abs(a - b) for a, b in zip(first, found, strict=True)):.1e} |")


if __name__ == "__main__":
    main()
