"""Many processes: they train what one would, in shards that become a model again."""

import json
import os
import pickle
import subprocess
import sys
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from distributed_worker import LORA, run
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from transformers import AutoModelForMultimodalLM

from modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline
from modeling_lumina_mgpt.training.merge import SHARDS, MetadataUnpickler, merge, read_shards

CONFIGURATIONS = files("modeling_lumina_mgpt.training") / "distributed"
RUNS = ("full", "lora")


def launch_environment(monkeypatch, name: str, *options: str) -> tuple[dict, dict]:
    """What `accelerate launch` makes of a configuration: torchrun's arguments, and the variables it sets."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    before = {**os.environ}
    command = ["--config_file", str(CONFIGURATIONS / name), *options, "--no_python", "lumina-mgpt", "train"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    environment = {**os.environ, **prepare_multi_gpu_env(arguments)}
    return vars(arguments), {key: value for key, value in environment.items() if before.get(key) != value}


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("fsdp_1_gpu.yaml", [], {"nproc_per_node": "1"}),
        ("fsdp_8_gpus.yaml", [], {"nproc_per_node": "8"}),
        (
            "fsdp_32_gpus.yaml",
            ["--machine_rank", "3", "--main_process_ip", "10.0.0.1"],
            {"nproc_per_node": "8", "nnodes": "4", "node_rank": 3, "rdzv_endpoint": "10.0.0.1:29500"},
        ),
    ],
)
def test_configurations_say_what_accelerate_reads(monkeypatch, name, options, expected):
    arguments, environment = launch_environment(monkeypatch, name, *options)
    assert {key: arguments.get(key) for key in expected} == expected
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16" and environment["ACCELERATE_USE_FSDP"] == "true"
    for key, value in environment.items():
        monkeypatch.setitem(os.environ, key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT" and plugin.cpu_ram_efficient_loading
    assert plugin.transformer_cls_names_to_wrap == LuminaMGPTForConditionalGeneration._no_split_modules
    assert not plugin.activation_checkpointing  # it would draw another dropout for backward


def launch(num_processes: int, *arguments: str) -> None:
    """Runs tests/distributed_worker.py."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command = [sys.executable, *torchrun, str(Path(__file__).with_name("distributed_worker.py")), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "log.json").read_text())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.slow
def test_many_processes_train_what_one_does(monkeypatch, tiny_folder, tmp_path):
    # 1. The same runs alone, with DDP, and with FSDP2 as the configuration for 8 GPUs has it (but in float32)
    _, fsdp = launch_environment(monkeypatch, "fsdp_8_gpus.yaml")
    monkeypatch.undo()
    fsdp = {name: value for name, value in fsdp.items() if name.startswith(("FSDP_", "ACCELERATE_"))}
    others = [
        f"{kind}-{name}{end}" for kind, end in (("ddp", ""), ("fsdp", ""), ("fsdp", "-resumed")) for name in RUNS
    ]
    launch(2, str(tiny_folder), str(tmp_path), json.dumps(fsdp), *others, "fsdp-full-bf16")
    for name in RUNS:
        run(tiny_folder, tmp_path / f"one-{name}", lora=name == "lora")

    # 2. Losses and weights are equal
    for name in RUNS:
        alone = tmp_path / f"one-{name}"
        assert len(log_of(alone)) == 4
        for other in (tmp_path / f"ddp-{name}", tmp_path / f"fsdp-{name}"):
            for ours, theirs in zip(log_of(alone), log_of(other), strict=True):
                for key in ("loss", "z_loss", "loss_chat", "loss_caption", "grad_norm", "predicted_tokens"):
                    assert theirs[key] == pytest.approx(ours[key], abs=1e-5), (other, key)
            expected, found = weights_of(alone / "model"), weights_of(other / "model")
            assert expected.keys() == found.keys()
            assert all(torch.allclose(found[key], expected[key], atol=1e-4) for key in expected)

    for ours, theirs in zip(log_of(tmp_path / "one-full"), log_of(tmp_path / "fsdp-full-bf16"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-2)

    # 3. What was resumed from shards is what was not stopped, to the bit
    for name in RUNS:
        whole, halves = (weights_of(tmp_path / f"fsdp-{name}{end}" / "model") for end in ("", "-resumed"))
        assert all(torch.equal(halves[key], whole[key]) for key in whole)

    # 4. What FSDP leaves loads as any other: nothing of its classes is in the files
    for file in tmp_path.glob("fsdp-*/model/*.json"):
        assert "fsdp" not in file.read_text().replace(str(tmp_path), "").lower()
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "fsdp-full" / "model", trust_remote_code=True)
    assert type(model).__name__ == "LuminaMGPTForConditionalGeneration"

    # 5. Shards become Hub folders, and so does an adapter with its base
    recipe = {"output_dir": str(tmp_path), "model": str(tiny_folder), "sft": {}, "generation": {"image_top_k": 7}}
    recipe["mixture"] = {"target_px": 32, "sources": [{"task": "caption", "path": "nowhere"}]}
    for name, lora in zip(RUNS, (None, LORA), strict=True):
        trainer = tmp_path / f"fsdp-{name}" / "trainer"
        (trainer / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "lora": lora}))
        merge(trainer / "checkpoint-4", tmp_path / f"merged-{name}")
    merge(tmp_path / "fsdp-lora" / "model", tmp_path / "merged-adapter", str(tiny_folder))
    full = weights_of(tmp_path / "fsdp-full" / "model")
    merged = LuminaMGPTPipeline.from_pretrained(tmp_path / "merged-full")
    assert merged.transformer.generation_config.image_top_k == 7 and merged.processor.target_px == 32
    assert all(torch.equal(merged.transformer.state_dict()[key], full[key].bfloat16()) for key in full)
    of_shards, of_adapter = (weights_of(tmp_path / f"merged-{name}") for name in ("lora", "adapter"))
    assert all(torch.equal(of_shards[key], of_adapter[key]) for key in of_shards)
    assert not torch.equal(of_shards["model.layers.0.mlp.up_proj.weight"], full["model.layers.0.mlp.up_proj.weight"])


def test_a_merged_model_has_the_configuration_of_its_recipe(tiny_pipe, tiny_folder, tmp_path):
    trainer = tmp_path / "trainer"
    shards = trainer / "checkpoint-1" / SHARDS
    dcp.save({"model": tiny_pipe.transformer.state_dict()}, checkpoint_id=shards, no_dist=True)
    mixture = {"target_px": 32, "sources": [{"task": "caption", "path": "nowhere"}]}
    recipe = {"output_dir": str(tmp_path), "model": str(tiny_folder), "sft": {}, "mixture": mixture}
    recipe["config"] = {"max_position_embeddings": 1024}
    (trainer / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge(trainer / "checkpoint-1", tmp_path / "merged")
    assert LuminaMGPTPipeline.from_pretrained(tmp_path / "merged").transformer.config.max_position_embeddings == 1024


class Attribute:
    """Pickled as members of enumerations are by older Pythons."""

    def __init__(self, *place):
        self.place = place

    def __reduce__(self):
        return getattr, self.place


def test_metadata_of_shards_cannot_run_code(tmp_path):
    table = tmp_path / ".metadata"
    for pickled, named in ((print, r"builtins\.print"), (Attribute(Metadata, "__init__"), r"Metadata'>\.__init__")):
        table.write_bytes(pickle.dumps(pickled))
        with pytest.raises(ValueError, match=f"{named}, which no checkpoint needs"):
            read_shards(tmp_path)
    found = MetadataUnpickler(BytesIO(pickle.dumps(Attribute(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT")))).load()
    assert found is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT


def test_merge_overwrites_nothing(tiny_folder, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for out in (tiny_folder, tmp_path / "adapter"):
        with pytest.raises(ValueError, match="not empty: accepted is a new folder"):
            merge(tmp_path / "adapter", out, str(tiny_folder))


def test_merge_says_what_it_accepts(tmp_path):
    with pytest.raises(ValueError, match="pytorch_model_fsdp_0"):
        merge(tmp_path, tmp_path / "out")
