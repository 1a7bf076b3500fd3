"""Supervised fine-tuning with TRL: FP-SFT, Omni-SFT, adapters, or a model from scratch (arXiv 2408.02657, 2.3).

    lumina-mgpt train training/recipes/tabletop/fp_sft_64.yaml
    accelerate launch --config_file training/distributed/fsdp_8_gpus.yaml --no_python lumina-mgpt train RECIPE

A recipe names the folder to start from (or the shape of a new model), a mixture of datasets and the values of TRL's
`SFTConfig`. The result is a Hub folder that every loader reads, or an adapter for `pipe.load_lora_weights`. A run that
was stopped, by whatever, continues from its last whole checkpoint when the same command is given again.
"""

import os
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from diffusers.utils import make_image_grid
from PIL import Image
from transformers import BitsAndBytesConfig, set_seed
from trl import SFTConfig

from modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration
from modeling_lumina_mgpt.modeling_lumina_mgpt import IGNORED_LABEL
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline

from .code_rows import fold_code_rows, share_code_rows
from .collator import Collator, pack
from .files import write_whole
from .folders import make_start, save_folder, set_defaults
from .merge import gather_model
from .mixture import Mixture, MixtureReader, read_mixture
from .recipe import WHOLE_MATRICES, SFTRecipe, lora_config, sft_config
from .tokenize_dataset import HUB, load_tokenized, tokenize
from .trainer import LuminaMGPTTrainer, SampleCallback, last_checkpoint


def train(recipe: SFTRecipe) -> None:
    """Runs (or resumes) the recipe and saves the Hub folder, or the adapter, in `output_dir`.

    Raises:
        Diverged, Stopped: see `LuminaMGPTTrainer`.
    """
    # 1. The model
    arguments, adapter = sft_config(recipe), lora_config(recipe)
    _check(recipe)
    with arguments.main_process_first(local=False):  # checkpoints need a disk that all machines see, too
        start = make_start(recipe)
    model = LuminaMGPTForConditionalGeneration.from_pretrained(start, **recipe.config, **_loading(recipe, arguments))
    pipe = LuminaMGPTPipeline.from_pretrained(start, transformer=model, dtype=torch.float32)
    processor = pipe.processor
    set_defaults(pipe, recipe)  # for what is drawn on the way, too
    if recipe.samples or recipe.judge_per_category:
        processor.check_task("text-to-image")
    alone = max(arguments.train_batch_size, arguments.eval_batch_size) == 1
    if recipe.pack_tokens and "flash" in str(model.config._attn_implementation) and not alone:
        raise ValueError("pack_tokens with flash attention: accepted are batches of one row, in evaluation, too")
    if recipe.tokenized or arguments.dataloader_num_workers == 0:  # else loader processes encode, which share no GPU
        pipe.vqvae.to(arguments.device)

    # 2. The data
    mixture = read_mixture(recipe.mixture)
    max_length = recipe.max_length(model.config)
    dataset, encode = _data(recipe, mixture, processor, max_length, arguments)
    held_out = read_mixture(recipe.evaluation, "evaluation") if recipe.evaluation else None
    evaluated = _evaluated(held_out, processor, max_length, arguments)
    tasks = sorted({source.task for data in (mixture, held_out) if data for source in data.sources})
    collator, eval_collator = _collators(recipe, processor, model.config.pad_token_id, tasks, encode, arguments)

    # 3. The run; the trainer changes both configurations for its own ends
    config, generation_config = deepcopy(model.config), deepcopy(model.generation_config)
    set_seed(arguments.seed)  # an adapter's first weights are drawn, and those of the function behind code rows
    codebook, code_ids = pipe.vqvae.quantize.embedding.weight, processor.uni_rep.code_ids
    trainer = LuminaMGPTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=evaluated,
        data_collator=collator,
        eval_collator=eval_collator,
        processing_class=processor.tokenizer,
        peft_config=adapter,
        muon=recipe.muon,
        code_rows=share_code_rows(model, codebook, code_ids) if recipe.share_code_rows else (),
        spike_factor=recipe.spike_factor,
        max_skipped_steps=recipe.max_skipped_steps,
        max_minutes=recipe.max_minutes,
        cooldown=recipe.cooldown,
        extra_metrics=lambda: _judged(pipe, recipe.judge_per_category),
    )
    _add_samples(trainer, pipe, recipe)
    if trainer.is_world_process_zero():
        write_whole(Path(arguments.output_dir) / "recipe.yaml", yaml.safe_dump(asdict(recipe)).encode())
    trainer.train()

    # 4. What is left of it
    trained = gather_model(trainer)  # on all processes, but only the first has it
    if trained is not None:
        _save_result(pipe, trained, config, generation_config, recipe)


def _save_result(pipe: LuminaMGPTPipeline, trained: Any, config, generation_config, recipe: SFTRecipe) -> None:
    """Writes the adapter, or the Hub folder with the configurations as they were before the run."""
    if recipe.lora is not None:
        pipe.register_modules(transformer=trained.get_base_model())
        pipe.save_lora_weights(recipe.output_dir)
        print(f"the adapter is in {recipe.output_dir}")
        return
    trained.config, trained.generation_config = config, generation_config
    if recipe.share_code_rows:
        fold_code_rows(trained)
    pipe.register_modules(transformer=trained)
    save_folder(pipe, recipe, recipe.output_dir)
    print(f"the model is in {recipe.output_dir}")


def _check(recipe: SFTRecipe) -> None:
    """ValueError if matrices would be sharded that must be whole, or if checkpoints there are of other weights."""
    for name in WHOLE_MATRICES:
        if getattr(recipe, name) and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            raise ValueError(f"{name}: true needs whole matrices; accepted where FSDP shards them is false")
    path = Path(recipe.output_dir) / "trainer" / "recipe.yaml"
    if not path.exists() or not last_checkpoint(path.parent):
        return
    before = yaml.safe_load(path.read_text())
    for name in ("model", "from_scratch", "lora", "quantization", *WHOLE_MATRICES):
        default = SFTRecipe.__dataclass_fields__[name].default  # of a run that is older than the setting
        if (earlier := before.get(name, default)) != (now := getattr(recipe, name)):
            raise ValueError(
                f"{name} {now!r}: the run in {recipe.output_dir} has {earlier!r}; set it back, or take "
                "another output_dir"
            )


def _loading(recipe: SFTRecipe, arguments: SFTConfig) -> dict[str, Any]:
    """Float32 where all weights are trained; under an adapter they may be as coarse as the computation."""
    if recipe.quantization is not None:
        return {"quantization_config": BitsAndBytesConfig(**recipe.quantization), "dtype": torch.bfloat16}
    return {"dtype": torch.bfloat16 if recipe.lora is not None and arguments.bf16 else torch.float32}


def _data(recipe: SFTRecipe, mixture: Mixture, processor, max_length: int, arguments: SFTConfig):
    """The dataset to train on, and what encodes its rows (None: they are)."""
    if recipe.tokenized is None:
        reader = MixtureReader(mixture, processor, max_length, recipe.random_crop)
        return reader.passes(arguments.seed) if mixture.streams else reader.dataset, reader.encode
    if not recipe.tokenized.startswith(HUB):
        tokenize(mixture, processor, recipe.tokenized, max_length, arguments.process_index, arguments.world_size)
        if arguments.world_size > 1:
            torch.distributed.barrier()
    dataset = load_tokenized(mixture, processor, recipe.tokenized, max_length)
    return (pack(dataset, recipe.pack_tokens) if recipe.pack_tokens else dataset), None


def _evaluated(mixture: Mixture | None, processor, max_length: int, arguments: SFTConfig) -> Dataset | None:
    """The held-out records, encoded once; then blank ones, for what accelerate fills up with would count twice."""
    if mixture is None:
        return None
    reader = MixtureReader(mixture, processor, min(max_length, mixture.max_length or max_length))
    rows = list(reader.dataset)
    chunks = [rows[i : i + 32] for i in range(0, len(rows), 32)]
    records = [record for chunk in chunks for record in reader.encode(chunk)]
    blank = {**records[0], "labels": [IGNORED_LABEL] * len(records[0]["labels"])}
    num_blank = -len(records) % (arguments.world_size * arguments.eval_batch_size)
    return Dataset.from_list(records + [blank] * num_blank)


def _collators(recipe: SFTRecipe, processor, pad_id: int, tasks: list[str], encode, arguments) -> list[Collator]:
    """The training's, and the evaluation's, which leaves records as they are."""
    layout = processor.uni_rep
    common: Any = {"image_start_id": layout.start_id, "image_end_id": layout.end_id, "code_ids": layout.code_ids}
    common |= {"pad_id": pad_id, "tasks": tasks, "seed": arguments.seed}
    row_length = recipe.pack_tokens if arguments.torch_compile else None
    changes: Any = {name: getattr(recipe, name) for name in ("context_drop", "history_noise", "code_renaming")}
    return [Collator(**common, **changes, row_length=row_length, encode=encode), Collator(**common)]


def _add_samples(trainer: LuminaMGPTTrainer, pipe: LuminaMGPTPipeline, recipe: SFTRecipe) -> None:
    if recipe.samples is None:
        return
    prompts, steps = recipe.samples["prompts"], recipe.samples["steps"]
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Image.Image:
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        return make_image_grid(pipe(prompts, generator=generators).images, 1, len(prompts))

    trainer.add_callback(SampleCallback(trainer, draw, steps, Path(recipe.output_dir) / "samples"))


def _judged(pipe: LuminaMGPTPipeline, num_per_category: int) -> dict[str, float]:
    """Shares of Tabletop sentences that were drawn right, by category."""
    if not num_per_category:
        return {}
    from .evaluate import score

    report, _ = score(pipe, num_per_category, split="validation")
    return {f"judge_{name.replace(' ', '_')}": value["rate"] for name, value in report["scores"].items()}
