"""Weights that training has spread out, whole again: shards of many processes, or an adapter beside its base.

    lumina-mgpt merge runs/fp_sft_512/trainer/checkpoint-2000 merged/fp_sft_512

What differs from accelerate's: a folder that every loader reads comes out, and nothing that is read may run code.
"""

import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline

from .folders import save_folder
from .recipe import SFTRecipe, lora_config

SHARDS = "pytorch_model_fsdp_0"  # accelerate's name
METADATA_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
METADATA_NAMES = {("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("torch", "Size")}
METADATA_NAMES |= {("torch.serialization", "_get_layout"), ("torch", "device")}
METADATA_NAMES |= {("torch", name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}


def merge(source: str | Path, out: str | Path, model: str | None = None) -> None:
    """Writes the Hub folder `out` from a sharded checkpoint of training, or from an adapter and its base.

    Args:
        source: `OUTPUT_DIR/trainer/checkpoint-N` of a run under FSDP, or a folder with `adapter_config.json`.
        model: folder or repo that the run started from; if not given, the one that the run's recipe or the adapter
            names.

    Raises:
        ValueError: if `out` holds something, if `source` is neither, or nothing says what it started from.
    """
    source, out = Path(source), Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: accepted is a new folder")
    if (source / "adapter_config.json").is_file():
        pipe = _load(source, model or PeftConfig.from_pretrained(source).base_model_name_or_path)
        pipe.load_lora_weights(source)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        pipe.transformer.bfloat16()
        pipe.vqvae.bfloat16()
        pipe.save_pretrained(out)
        return
    if not (source / SHARDS / ".metadata").is_file():
        raise ValueError(f"{source}: accepted are a checkpoint with {SHARDS}/ and a folder with adapter_config.json")
    recipe = SFTRecipe(**yaml.safe_load((source.parent / "recipe.yaml").read_text()))
    pipe = _load(source, model or recipe.start, recipe.config)
    pipe.register_modules(transformer=_with_weights(pipe.transformer, read_shards(source / SHARDS), recipe))
    save_folder(pipe, recipe, out)


def read_shards(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of `torch.distributed.checkpoint` files, whole, by their names in the model; on the CPU."""
    reader = ShardReader(folder)
    described = reader.read_metadata().state_dict_metadata.items()
    state = {
        name: torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in described
        if isinstance(found, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}  # accelerate saves {"model": ...}


class ShardReader(dcp.FileSystemReader):
    """Stock reads the tensors safely, but the table of where they lie by pickle; here only that table's types."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            metadata = MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class MetadataUnpickler(pickle.Unpickler):
    """ValueError for anything but what the metadata of a checkpoint is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # by which Python before 3.11.4 wrote members of enumerations
            return _member
        known = module in METADATA_MODULES and not name.startswith("__") and "." not in name
        if (module, name) not in METADATA_NAMES and not known:
            raise ValueError(f"the shards' metadata names {module}.{name}, which no checkpoint needs: not read")
        return super().find_class(module, name)


def _member(kind: Any, name: str) -> Enum:
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise ValueError(f"the shards' metadata asks for {kind!r}.{name}, which no checkpoint needs: not read")
    return kind[name]


def gather_model(trainer) -> nn.Module | None:
    """The trained model as an ordinary one on the first process, None on the others; every process must call it.

    FSDP changes a model's class, so that what it saves cannot be loaded: under FSDP this is a new one, on the CPU.
    Of a `PeftModel` only the adapters are gathered, for `save_pretrained`: its base stays without storage.
    """
    wrapped = trainer.accelerator.unwrap_model(trainer.model)
    if not trainer.is_fsdp_enabled:
        return wrapped if trainer.is_world_process_zero() else None
    adapters = isinstance(wrapped, PeftModel)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapters)
    state = get_model_state_dict(wrapped, options=options)
    if not trainer.is_world_process_zero():
        return None
    base = wrapped.get_base_model() if adapters else wrapped
    with init_empty_weights(include_buffers=False):
        model: Any = LuminaMGPTForConditionalGeneration(base.config)
        if adapters:
            model = PeftModel(model, wrapped.peft_config["default"])
    model.load_state_dict(state, assign=True, strict=not adapters)
    if not adapters:
        model.generation_config = base.generation_config
    return model


def _with_weights(model: nn.Module, state: dict[str, Tensor], recipe: SFTRecipe) -> nn.Module:
    """`model` with a checkpoint's weights, its adapter merged if that is what it holds."""
    adapter = lora_config(recipe)
    if adapter is None:
        model.load_state_dict(state)
        return model
    adapted = get_peft_model(model, adapter)
    set_peft_model_state_dict(adapted, state)
    return adapted.merge_and_unload()


def _load(source: Path, start: str | None, config: dict[str, Any] | None = None) -> LuminaMGPTPipeline:
    """What a run started from, its configuration changed as the run's was."""
    if start is None:
        raise ValueError(f"{source}: nothing says what its run started from; name that model")
    model = LuminaMGPTForConditionalGeneration.from_pretrained(start, dtype=torch.float32, **(config or {}))
    return LuminaMGPTPipeline.from_pretrained(start, transformer=model, dtype=torch.float32)
