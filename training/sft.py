"""Supervised fine-tuning with TRL: FP-SFT, Omni-SFT, adapters, or a model from scratch (arXiv 2408.02657, 2.3).

    lumina-mgpt train training/recipes/tabletop/fp_sft_64.yaml
    accelerate launch --config_file training/distributed/fsdp_8_gpus.yaml --no_python lumina-mgpt train RECIPE

A recipe names the folder to start from (or the shape of a new model), a mixture of datasets and the values of TRL's
`SFTConfig`. The result is a Hub folder that every loader reads, or an adapter for `pipe.load_lora_weights`. A run that
was stopped, by whatever, continues from its last whole checkpoint when the same command is given again.
"""

from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from datasets import Dataset
from diffusers import VQModel
from diffusers.utils import make_image_grid
from peft import LoraConfig
from PIL import Image
from transformers import BitsAndBytesConfig, GenerationConfig, set_seed
from trl import SFTConfig

from modeling_lumina_mgpt import (
    LuminaMGPTConfig,
    LuminaMGPTForConditionalGeneration,
    LuminaMGPTImageProcessor,
    LuminaMGPTProcessor,
)
from modeling_lumina_mgpt.generation_lumina_mgpt import DecodingSettings
from modeling_lumina_mgpt.modeling_lumina_mgpt import IGNORED_LABEL
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline
from modeling_lumina_mgpt.processing_lumina_mgpt import TASKS
from modeling_lumina_mgpt.uni_rep import is_whole

from .merge import gather_model
from .mixture import Mixture, MixtureReader, read_mixture
from .tabletop import SEGMENT_PALETTE, tabletop_texts
from .tokenize_dataset import HUB, load_tokenized, tokenize
from .train_tokenizer import build_tokenizer
from .train_vq import VQRecipe
from .trainer import Collator, LuminaMGPTTrainer, SampleCallback, last_checkpoint, pack

if TYPE_CHECKING:
    from .chain import ChainRecipe

# The paper's: attention and MLP of every layer.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class SFTRecipe:
    """One run.

    Attributes:
        output_dir: where the model goes; its training state is kept in `output_dir/trainer`.
        mixture: the fields of `Mixture`: what is trained on.
        sft: values of `SFTConfig` (and of `TrainingArguments`).
        model: the Hub folder or repo to start from; None: a new model, shaped by `from_scratch`.
        from_scratch: `vqvae` (folder), `tokenizer` (arguments of `build_tokenizer`), `processor` and `config` values;
            or `like` (a Hub folder or repo whose processor and shape it has) and `config` values that differ.
        tokenized: folder of the mixture's records tokenized ahead, as `lumina-mgpt tokenize` makes it (made now, if it
            is not there), or `hf://datasets/NAMESPACE/NAME`; None: train straight from images.
        random_crop: crop pictures anew at each epoch; only straight from images.
        pack_tokens: put records together in rows of so many tokens, which never see each other; only tokenized ahead.
        context_drop: probability of dropping what precedes an answer's picture, drawn anew at each epoch.
        history_noise: of the codes that an answer's picture so far consists of, up to this share is replaced by others
            of its codes, drawn anew at each epoch: the model learns to go by what it was asked and shown.
        evaluation: the fields of another `Mixture`, held out; its losses are logged as often as `sft` says.
        judge_per_category: Tabletop sentences of each category that are drawn and judged at each evaluation.
        lora: values of `peft.LoraConfig`: train an adapter alone. On attention and MLP unless `target_modules` differ.
        quantization: values of `BitsAndBytesConfig` for the model under the adapter (QLoRA).
        samples: `steps` and `prompts`: as often, draw these into `output_dir/samples` and what is reported to.
        spike_factor, max_skipped_steps, max_minutes, cooldown: as in `LuminaMGPTTrainer`.
        config: values of the model's configuration that are other than in `model`, such as `residual_dropout`.
        generation: defaults written to `generation_config.json`.

    Raises:
        ValueError: unless either `model` or `from_scratch` is given, or for options that exclude each other.
    """

    output_dir: str
    mixture: dict[str, Any]
    sft: dict[str, Any]
    model: str | None = None
    from_scratch: dict[str, Any] | None = None
    tokenized: str | None = None
    random_crop: bool = False
    pack_tokens: int | None = None
    context_drop: float = 0.1
    history_noise: float = 0.0
    evaluation: dict[str, Any] | None = None
    judge_per_category: int = 0
    lora: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    samples: dict[str, Any] | None = None
    spike_factor: float = 3.0
    max_skipped_steps: int = 10
    max_minutes: float | None = None
    cooldown: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("mixture", "sft", "from_scratch", "evaluation", "lora", "quantization", "config", "generation"):
            if not isinstance(value := getattr(self, name), dict | None):
                raise ValueError(f"{name} {value!r}: accepted are `name: value` lines")
        if bool(self.model) == bool(self.from_scratch):
            raise ValueError(f"model {self.model!r} and from_scratch {self.from_scratch!r}: give one of them")
        if self.tokenized and self.random_crop:
            raise ValueError(f"random_crop {self.random_crop}: what was tokenized ahead cannot be cropped anew")
        grouped = self.sft.get("train_sampling_strategy") in ("group_by_length", "batch_rebalance")
        if not self.tokenized and (self.pack_tokens or grouped):
            raise ValueError("pack_tokens and grouping by length need lengths: name a folder in `tokenized`")
        if self.quantization and self.lora is None:
            raise ValueError(
                f"quantization {self.quantization}: quantized weights cannot be trained; give `lora`, too"
            )
        for name in ("context_drop", "history_noise", "cooldown"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"{name} {share}: accepted are 0 to 1")
        if self.max_minutes is not None and not (isinstance(self.max_minutes, int | float) and self.max_minutes > 0):
            raise ValueError(f"max_minutes {self.max_minutes!r}: accepted are numbers above 0")
        if self.pack_tokens is not None and not is_whole(self.pack_tokens, 1):
            raise ValueError(f"pack_tokens {self.pack_tokens!r}: accepted are 1 and more")
        if self.samples is not None and not _are_samples(self.samples):
            raise ValueError(f"samples {self.samples}: accepted are `steps` from 1 on and a list of `prompts`")
        if "resume_from_checkpoint" in self.sft:
            raise ValueError("resume_from_checkpoint: a run goes on from the last whole checkpoint of its output_dir")
        shape = (
            {"like", "config"}
            if "like" in (self.from_scratch or {})
            else {"vqvae", "tokenizer", "processor", "config"}
        )
        if self.from_scratch and not shape >= self.from_scratch.keys() >= shape - {"config"}:
            raise ValueError(f"from_scratch {sorted(self.from_scratch)}: accepted are {', '.join(sorted(shape))}")
        if unknown := self.config.keys() - LuminaMGPTConfig.__dataclass_fields__.keys():
            raise ValueError(f"config {sorted(unknown)}: accepted are the fields of LuminaMGPTConfig")
        known = {*GenerationConfig().to_dict(), *DecodingSettings.__dataclass_fields__, "image_to_image"}
        if unknown := self.generation.keys() - known:
            raise ValueError(f"generation {sorted(unknown)}: accepted are what `generate` takes")
        for name, values in (("mixture", self.mixture), ("evaluation", self.evaluation)):
            if values is not None:
                read_mixture(values, name)

    @property
    def start(self) -> str:
        """The Hub folder or repo that the run starts from; a new model's is kept, with its tokenizer and codes."""
        return self.model or str(Path(self.output_dir) / "trainer" / "start")

    def max_length(self, config: LuminaMGPTConfig) -> int:
        """Tokens that a record may have."""
        limits = self.mixture.get("max_length"), self.pack_tokens, config.max_position_embeddings
        return min(limit for limit in limits if limit)


def _are_samples(values: Any) -> bool:
    known = isinstance(values, dict) and values.keys() == {"steps", "prompts"}
    return known and is_whole(values["steps"], 1) and bool(values["prompts"]) and isinstance(values["prompts"], list)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe's values; those of its `base`, a file named relative to it, hold where it says nothing.

    Raises:
        ValueError: if a file is no YAML mapping, or a base leads back to itself.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}: accepted are `name: value` lines")
    base = values.pop("base", None)
    if base is None:
        return values
    try:
        return _merged(read_recipe(path.parent / base), values)
    except RecursionError:
        raise ValueError(f"{path}: base {base!r} leads back to it") from None


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    both = {name for name in base.keys() & values.keys() if isinstance(base[name], dict) and values[name]}
    return {**base, **values, **{name: _merged(base[name], values[name]) for name in both}}


def load_recipe(path: str | Path) -> "SFTRecipe | VQRecipe | ChainRecipe":
    """The recipe in a YAML file, of the kind that its `trainer` says; ValueError that names the file otherwise."""
    from .chain import ChainRecipe  # which imports this file

    values = read_recipe(path)
    trainer = values.pop("trainer", "sft")
    kinds: dict[str, Any] = {"vq": VQRecipe, "sft": SFTRecipe, "chain": ChainRecipe}
    if trainer not in kinds:
        raise ValueError(f"{path}: trainer {trainer!r}; accepted are {', '.join(kinds)}")
    kind = kinds[trainer]
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{path}: {error}; accepted are {', '.join(kind.__dataclass_fields__)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def new_pipeline(shape: dict[str, Any]) -> LuminaMGPTPipeline:
    """An untrained model: of another's shape and words, or with a tokenizer of its own around a trained VQ model."""
    torch.manual_seed(0)
    if "like" in shape:
        config = LuminaMGPTConfig.from_pretrained(shape["like"], **shape.get("config", {}))
        processor = LuminaMGPTProcessor.from_pretrained(shape["like"])
        return LuminaMGPTPipeline(LuminaMGPTForConditionalGeneration(config), processor.vqvae, processor)
    vqvae = VQModel.from_pretrained(shape["vqvae"])
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
    _start_codes_alike(model, vqvae, processor.uni_rep.code_ids)
    return LuminaMGPTPipeline(model, vqvae, processor)


@torch.no_grad()
def _start_codes_alike(model: LuminaMGPTForConditionalGeneration, vqvae: VQModel, code_ids: torch.Tensor) -> None:
    """Adds a random projection of the codebook to the embeddings of codes: those that look alike begin alike."""
    codes = vqvae.quantize.embedding.weight.float()  # (codes, components)
    codes = (codes - codes.mean(0)) / codes.std(0).sqrt()
    codes = codes / codes.norm(dim=1).mean()
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        projection = model.config.initializer_range * torch.randn(codes.shape[1], model.config.hidden_size)
        embeddings.weight[code_ids] += codes @ projection


def make_start(recipe: SFTRecipe) -> str:
    """Where the run starts from; of a run from scratch it is made, all at once, if it is not there.

    Raises:
        ValueError: if the model is no folder, and no name of a repo either.
    """
    start = Path(recipe.start)
    if recipe.model and "/" not in recipe.model and not start.exists():
        raise ValueError(
            f"model {recipe.model!r}: neither a folder nor a repo NAMESPACE/NAME; `lumina-mgpt convert` makes a folder"
            " of a published checkpoint"
        )
    if recipe.from_scratch and not start.exists():
        part = start.with_name(f"{start.name}.part")
        new_pipeline(recipe.from_scratch).save_pretrained(part)
        part.rename(start)
    return recipe.start


def train(recipe: SFTRecipe) -> None:
    """Runs (or resumes) the recipe and saves the Hub folder, or the adapter, in `output_dir`.

    Raises:
        Diverged, Stopped: see `LuminaMGPTTrainer`.
    """
    # 1. The model
    arguments, adapter = sft_config(recipe), lora_config(recipe)
    _check_same_run(recipe)
    with arguments.main_process_first(local=False):  # checkpoints need a disk that all machines see, too
        start = make_start(recipe)
    model = LuminaMGPTForConditionalGeneration.from_pretrained(start, **recipe.config, **_loading(recipe, arguments))
    pipe = LuminaMGPTPipeline.from_pretrained(start, transformer=model, dtype=torch.float32)
    processor = pipe.processor
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
    layout = processor.uni_rep
    common = {"image_start_id": layout.start_id, "image_end_id": layout.end_id, "tasks": tasks}
    common |= {"pad_id": model.config.pad_token_id, "seed": arguments.seed, "code_ids": layout.code_ids}

    # 3. The run; the trainer changes both configurations for its own ends
    config, generation_config = deepcopy(model.config), deepcopy(model.generation_config)
    set_seed(arguments.seed)  # an adapter's first weights are drawn
    trainer = LuminaMGPTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=evaluated,
        data_collator=Collator(
            **common, context_drop=recipe.context_drop, history_noise=recipe.history_noise, encode=encode
        ),
        eval_collator=Collator(**common),
        processing_class=processor.tokenizer,
        peft_config=adapter,
        spike_factor=recipe.spike_factor,
        max_skipped_steps=recipe.max_skipped_steps,
        max_minutes=recipe.max_minutes,
        cooldown=recipe.cooldown,
        extra_metrics=lambda: _judged(pipe, recipe.judge_per_category),
    )
    _add_samples(trainer, pipe, recipe)
    if trainer.is_world_process_zero():
        (Path(arguments.output_dir) / "recipe.yaml").write_text(yaml.safe_dump(asdict(recipe)))
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
    pipe.register_modules(transformer=trained)
    save_folder(pipe, recipe, recipe.output_dir)
    print(f"the model is in {recipe.output_dir}")


def _check_same_run(recipe: SFTRecipe) -> None:
    """ValueError if the folder's checkpoints are of other weights than the recipe's."""
    path = Path(recipe.output_dir) / "trainer" / "recipe.yaml"
    if not path.exists() or not last_checkpoint(path.parent):
        return
    before = yaml.safe_load(path.read_text())
    for name in ("model", "from_scratch", "lora", "quantization"):
        if before.get(name) != (now := getattr(recipe, name)):
            raise ValueError(
                f"{name} {now!r}: the run in {recipe.output_dir} has {before.get(name)!r}; set it back, or take "
                "another output_dir"
            )


def save_folder(pipe: LuminaMGPTPipeline, recipe: SFTRecipe, folder: str | Path) -> None:
    """Writes the Hub folder of a recipe's trained weights; the pipeline is changed on the way."""
    mixture, model, processor = read_mixture(recipe.mixture), pipe.transformer, pipe.processor
    processor.target_px = model.config.default_height_px = model.config.default_width_px = mixture.target_px
    if processor.trained_tasks is not None:
        tasks = {source.task for source in mixture.sources} & TASKS.keys()
        tasks |= {"complete"} if "text-to-image" in tasks else set()  # which begins in the middle
        processor.trained_tasks = sorted({*processor.trained_tasks, *tasks})
    for name, value in recipe.generation.items():  # `update` would pass over names that are not stock's
        setattr(model.generation_config, name, value)
    model.generation_config._from_model_config = False  # else the loader keeps stock's names only
    model.bfloat16()
    pipe.vqvae.bfloat16()
    pipe.save_pretrained(folder, max_shard_size="15MB")


def sft_config(recipe: SFTRecipe) -> SFTConfig:
    on_cpu = not torch.accelerator.is_available()  # where bf16 is refused unless it is asked for like this
    own: dict[str, Any] = {"use_cpu": on_cpu, "dataloader_pin_memory": not on_cpu}
    own["accelerator_config"] = {"dispatch_batches": False}  # a stream's batches differ in length between processes
    try:
        return SFTConfig(
            output_dir=str(Path(recipe.output_dir) / "trainer"),
            max_length=None,  # TRL would cut
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            prediction_loss_only=True,
            loss_type="nll",  # TRL 1.12's default replaces the model's forward by one without the z-loss
            **{**own, **recipe.sft},
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"sft: {error}") from error


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


def lora_config(recipe: SFTRecipe) -> LoraConfig | None:
    if recipe.lora is None:
        return None
    try:
        return LoraConfig(**{"target_modules": LORA_TARGETS, "task_type": "CAUSAL_LM", **recipe.lora})
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora: {error}") from error


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

    report, _ = score(pipe, num_per_category)
    return {f"judge_{name.replace(' ', '_')}": value["rate"] for name, value in report["scores"].items()}
