"""The Hub folders that a run starts from and leaves: of a new model, made here, or of trained weights."""

from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel

from modeling_lumina_mgpt import (
    LuminaMGPTConfig,
    LuminaMGPTForConditionalGeneration,
    LuminaMGPTImageProcessor,
    LuminaMGPTProcessor,
)
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline
from modeling_lumina_mgpt.pipelines.places import folder_or_repo
from modeling_lumina_mgpt.processing_lumina_mgpt import TASKS

from .code_rows import start_codes_alike
from .mixture import read_mixture
from .recipe import SFTRecipe
from .tabletop import SEGMENT_PALETTE, tabletop_texts
from .train_tokenizer import build_tokenizer


def new_pipeline(shape: dict[str, Any]) -> LuminaMGPTPipeline:
    """An untrained model: of another's shape and words, or with a tokenizer of its own around a trained VQ model."""
    torch.manual_seed(0)
    if "like" in shape:
        like = folder_or_repo(shape["like"], "from_scratch.like")
        config = LuminaMGPTConfig.from_pretrained(like, **shape.get("config", {}))
        processor = LuminaMGPTProcessor.from_pretrained(like)
        return LuminaMGPTPipeline(LuminaMGPTForConditionalGeneration(config), processor.vqvae, processor)
    vqvae = VQModel.from_pretrained(folder_or_repo(shape["vqvae"], "from_scratch.vqvae"))
    num_codes = vqvae.config["num_vq_embeddings"]
    sizes = [shape["processor"]["size_unit_px"] * (i + 1) for i in range(shape["tokenizer"]["num_sizes"])]
    words = {"prompt": "", "condition": ""}
    templates = [task.template.format(width=s, height=s, **words) for task in TASKS.values() for s in sizes]
    tokenizer = build_tokenizer([*tabletop_texts(), *templates], num_codes=num_codes, **shape["tokenizer"])
    image_processor = LuminaMGPTImageProcessor(palette=SEGMENT_PALETTE)
    processor = LuminaMGPTProcessor(image_processor, tokenizer, trained_tasks=[], **shape["processor"])
    config = LuminaMGPTConfig(
        vocab_size=len(tokenizer) - 1,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=processor.uni_rep.end_of_turn_id,
        image_layout=processor.uni_rep.layout_dict(),
        image_token_id=processor.image_token_id,
        **shape["config"],
    )
    model = LuminaMGPTForConditionalGeneration(config)
    start_codes_alike(model, vqvae.quantize.embedding.weight, processor.uni_rep.code_ids)
    return LuminaMGPTPipeline(model, vqvae, processor)


def make_start(recipe: SFTRecipe) -> str:
    """Where the run starts from; of a run from scratch it is made, all at once, if it is not there.

    Raises:
        ValueError: if the model is neither a folder nor, as far as can be told, a repo.
    """
    if recipe.model:
        try:
            return folder_or_repo(recipe.model, "model")
        except ValueError as error:
            hint = "`lumina-mgpt convert` makes a folder of a published checkpoint"
            raise ValueError(f"{error}; {hint}") from error
    start = Path(recipe.start)
    if recipe.from_scratch and not start.exists():
        part = start.with_name(f"{start.name}.part")
        new_pipeline(recipe.from_scratch).save_pretrained(part)
        part.rename(start)
    return recipe.start


def set_defaults(pipe: LuminaMGPTPipeline, recipe: SFTRecipe) -> None:
    """Gives a pipeline the size of pictures, the tasks and the sampling that a recipe's model has."""
    mixture, model, processor = read_mixture(recipe.mixture), pipe.transformer, pipe.processor
    processor.target_px = model.config.default_height_px = model.config.default_width_px = mixture.target_px
    if processor.trained_tasks is not None:
        tasks = {source.task for source in mixture.sources} & TASKS.keys()
        tasks |= {"complete"} if "text-to-image" in tasks else set()  # which begins in the middle
        processor.trained_tasks = sorted({*processor.trained_tasks, *tasks})
    for name, value in recipe.generation.items():  # `update` would pass over names that are not stock's
        setattr(model.generation_config, name, value)
    model.generation_config._from_model_config = False  # else the loader keeps stock's names only


def save_folder(pipe: LuminaMGPTPipeline, recipe: SFTRecipe, folder: str | Path) -> None:
    """Writes the Hub folder of a recipe's trained weights; the pipeline is changed on the way."""
    set_defaults(pipe, recipe)
    pipe.transformer.bfloat16()
    pipe.vqvae.bfloat16()
    pipe.save_pretrained(folder, max_shard_size="15MB")
