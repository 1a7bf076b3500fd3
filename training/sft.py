"""Supervised fine-tuning with TRL: FP-SFT, Omni-SFT, or a model from scratch, by recipe (arXiv 2408.02657, 2.3).

    lumina-mgpt train training/recipes/tabletop/fp_sft_64.yaml

A recipe names the folder to start from (or the shape of a new model), a mixture and the values of TRL's `SFTConfig`.
The result is a Hub folder that every loader reads. A run that was stopped continues from its last checkpoint.
"""

import random
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from modeling_lumina_mgpt import (
    LuminaMGPTConfig,
    LuminaMGPTForConditionalGeneration,
    LuminaMGPTImageProcessor,
    LuminaMGPTProcessor,
)
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline
from modeling_lumina_mgpt.processing_lumina_mgpt import TASKS

from .mixture import Mixture, load_mixture
from .tabletop import SEGMENT_COLORS, tabletop_texts
from .train_tokenizer import build_tokenizer

IGNORED_LABEL = -100


@dataclass
class SFTRecipe:
    """One run.

    Attributes:
        output_dir: where the model goes; its training state is kept in `output_dir/trainer`.
        mixture: the fields of `Mixture`.
        sft: values of `SFTConfig` (and of `TrainingArguments`).
        model: the Hub folder or repo to start from; None: a new model, shaped by `from_scratch`.
        from_scratch: `vqvae` (folder), `tokenizer` (arguments of `build_tokenizer`), `processor` and `config` values.
        context_drop: probability of dropping what precedes an answer's picture, drawn anew at each epoch.
        generation: defaults written to `generation_config.json`.

    Raises:
        ValueError: unless either `model` or `from_scratch` is given.
    """

    output_dir: str
    mixture: dict[str, Any]
    sft: dict[str, Any]
    model: str | None = None
    from_scratch: dict[str, Any] | None = None
    context_drop: float = 0.1
    generation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if bool(self.model) == bool(self.from_scratch):
            raise ValueError(f"model {self.model!r} and from_scratch {self.from_scratch!r}: give one of them")


class LuminaMGPTTrainer(SFTTrainer):
    """TRL's trainer with the model's own loss, since TRL's fused head would leave the z-loss out.

    Lengths are grouped at each epoch by the seed and the epoch alone: stock draws from the global generator, whose
    state a resumed run does not have when it needs it.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["use_cache"] = False
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        if self.model.training:
            # divided by the labels of the whole step, of which this batch has only its share
            shares = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            self._metrics["train"]["z_loss"].append(outputs.z_loss.item() * shares)
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = order = torch.Generator()
            sampler.set_epoch = lambda epoch: order.manual_seed(self.args.seed + epoch)
        return sampler


@dataclass
class Collator:
    """Pads records on the right to one length, after dropping the context of some.

    Dropped context trains guidance's unconditional branch: of a record whose answer ends in a picture, only the tokens
    from that picture's start on are left, without the final end-of-turn. Whether that happens depends on the record,
    the epoch and the seed alone, so that a resumed run sees what an undisturbed one would have seen.
    """

    pad_id: int
    image_start_id: int
    image_end_id: int
    context_drop: float = 0.0
    seed: int = 0
    epoch: int = 0

    def __call__(self, records: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and `attention_mask`, int64 (batch, length)."""
        pairs = [self._drop(list(r["input_ids"]), list(r["labels"])) for r in records]
        length = max(len(ids) for ids, _ in pairs)
        pad = [length - len(ids) for ids, _ in pairs]
        batch = {
            "input_ids": [ids + [self.pad_id] * n for (ids, _), n in zip(pairs, pad, strict=True)],
            "labels": [labels + [IGNORED_LABEL] * n for (_, labels), n in zip(pairs, pad, strict=True)],
            "attention_mask": [[1] * len(ids) + [0] * n for (ids, _), n in zip(pairs, pad, strict=True)],
        }
        return {name: torch.tensor(rows) for name, rows in batch.items()}

    def _drop(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        draw = random.Random(f"{self.seed}/{self.epoch}/{ids}").random()
        if labels[-2] != self.image_end_id or draw >= self.context_drop:
            return ids, labels
        start = len(ids) - 1 - ids[::-1].index(self.image_start_id)
        return ids[start:-1], labels[start:-1]


class EpochOfCollator(TrainerCallback):
    """Tells the collator the epoch."""

    def __init__(self, collator: Collator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = int(state.epoch or 0)


def new_pipeline(shape: dict[str, Any]) -> LuminaMGPTPipeline:
    """An untrained model with a tokenizer of its own around a trained VQ model."""
    vqvae = VQModel.from_pretrained(shape["vqvae"])
    num_codes = vqvae.config["num_vq_embeddings"]
    sizes = [shape["processor"]["size_unit_px"] * (i + 1) for i in range(shape["tokenizer"]["num_sizes"])]
    words = {"prompt": "", "condition": ""}
    templates = [task.template.format(width=s, height=s, **words) for task in TASKS.values() for s in sizes]
    tokenizer = build_tokenizer([*tabletop_texts(), *templates], num_codes=num_codes, **shape["tokenizer"])
    palette = [[name, *(round(255 * value) for value in color)] for name, color in SEGMENT_COLORS.items()]
    image_processor = LuminaMGPTImageProcessor(palette=palette)
    processor = LuminaMGPTProcessor(image_processor, tokenizer, **shape["processor"])
    config = LuminaMGPTConfig(
        vocab_size=len(tokenizer) - 1,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=processor.uni_rep.end_of_turn_id,
        image_layout=processor.uni_rep.layout_dict(),
        image_token_id=processor.image_token_id,
        **shape["config"],
    )
    torch.manual_seed(0)
    return LuminaMGPTPipeline(LuminaMGPTForConditionalGeneration(config), vqvae, processor)


def train(recipe: SFTRecipe) -> None:
    """Runs (or resumes) the recipe and saves the Hub folder in `output_dir`."""
    # 1. The model; a new one is kept, for a resumed run to have the very same tokenizer and codes
    output_dir = Path(recipe.output_dir)
    start = recipe.model or output_dir / "trainer" / "start"
    if recipe.from_scratch and not (Path(start) / "model_index.json").exists():
        new_pipeline(recipe.from_scratch).save_pretrained(start)
    pipe = LuminaMGPTPipeline.from_pretrained(start, dtype=torch.float32)
    processor, model = pipe.processor, pipe.transformer

    # 2. The data
    arguments = SFTConfig(
        output_dir=str(output_dir / "trainer"),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        loss_type="nll",  # TRL 1.12's default replaces the model's forward by one without the z-loss
        **recipe.sft,
    )
    mixture, layout = Mixture(**recipe.mixture), processor.uni_rep
    with arguments.main_process_first():
        dataset = load_mixture(mixture, processor, output_dir / "data")

    # 3. The run; the trainer changes both configurations for its own ends
    config, generation_config = deepcopy(model.config), deepcopy(model.generation_config)
    pad_id = model.config.pad_token_id
    collator = Collator(pad_id, layout.start_id, layout.end_id, recipe.context_drop, arguments.seed)
    trainer = LuminaMGPTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor.tokenizer,
        callbacks=[EpochOfCollator(collator)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir))

    # 4. The Hub folder
    if not trainer.is_world_process_zero():
        return
    processor.target_px = config.default_height_px = config.default_width_px = mixture.target_px
    if processor.trained_tasks is not None:
        processor.trained_tasks = sorted({*processor.trained_tasks, *mixture.tasks})
    model.config, model.generation_config = config, generation_config
    for name, value in recipe.generation.items():  # `update` would pass over names that are not stock's
        setattr(model.generation_config, name, value)
    model.generation_config._from_model_config = False  # else the loader keeps stock's names only
    model.bfloat16()
    pipe.vqvae.bfloat16()
    pipe.save_pretrained(output_dir, max_shard_size="15MB")
