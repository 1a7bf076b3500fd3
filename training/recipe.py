"""What a run is told: recipes in YAML, checked before anything is loaded, and the libraries' own settings in them."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig
from transformers import GenerationConfig
from trl import SFTConfig

from modeling_lumina_mgpt import LuminaMGPTConfig
from modeling_lumina_mgpt.generation_lumina_mgpt import DecodingSettings
from modeling_lumina_mgpt.uni_rep import is_whole

from .mixture import read_mixture
from .train_vq import VQRecipe

# The paper's: attention and MLP of every layer.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

WHOLE_MATRICES = ("muon", "share_code_rows")  # settings for which each matrix must be in one piece, and trained


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
        code_renaming: by task, the probability that a record has other codes in place of some that its pictures share,
            drawn anew at each epoch: the model learns to keep what it has never seen. For tasks that copy.
        share_code_rows: image codes' rows of embeddings and head learn together, by how the codes look (`CodeRows`).
        evaluation: the fields of another `Mixture`, held out; its losses are logged as often as `sft` says.
        judge_per_category: Tabletop sentences of each category that are drawn and judged at each evaluation.
        lora: values of `peft.LoraConfig`: train an adapter alone. On attention and MLP unless `target_modules` differ.
        quantization: values of `BitsAndBytesConfig` for the model under the adapter (QLoRA).
        samples: `steps` and `prompts`: as often, draw these into `output_dir/samples` and what is reported to.
        muon, spike_factor, max_skipped_steps, max_minutes, cooldown: as in `LuminaMGPTTrainer`.
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
    code_renaming: dict[str, float] = field(default_factory=dict)
    share_code_rows: bool = False
    evaluation: dict[str, Any] | None = None
    judge_per_category: int = 0
    lora: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    samples: dict[str, Any] | None = None
    muon: bool = False
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
        self.sft, self.config, self.generation = self.sft or {}, self.config or {}, self.generation or {}
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
        for name in WHOLE_MATRICES:
            if getattr(self, name) and self.lora is not None:
                raise ValueError(f"{name}: true: it is for whole matrices; with `lora`, accepted is false")
        if self.muon and not str(optim := self.sft.get("optim", "adamw")).startswith("adamw"):
            raise ValueError(
                f"muon: true with optim {optim!r}: what Muon leaves is for AdamW; accepted is adamw_torch"
            )
        for name in ("context_drop", "history_noise", "cooldown"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"{name} {share}: accepted are 0 to 1")
        if self.max_minutes is not None and not _is_positive(self.max_minutes):
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
        for name, kind in (("sft", SFTConfig), ("lora", LoraConfig)):
            for unknown in (getattr(self, name) or {}).keys() - kind.__dataclass_fields__.keys():
                like = get_close_matches(unknown, kind.__dataclass_fields__) or ["the fields of " + kind.__name__]
                raise ValueError(f"{name}: {unknown!r} is no setting; accepted are {', '.join(like)}")
        if unknown := self.config.keys() - LuminaMGPTConfig.__dataclass_fields__.keys():
            raise ValueError(f"config {sorted(unknown)}: accepted are the fields of LuminaMGPTConfig")
        known = {*GenerationConfig().to_dict(), *DecodingSettings.__dataclass_fields__, "image_to_image"}
        if unknown := self.generation.keys() - known:
            raise ValueError(f"generation {sorted(unknown)}: accepted are what `generate` takes")
        if unknown := self.generation.get("image_to_image", {}).keys() - DecodingSettings.__dataclass_fields__.keys():
            raise ValueError(f"generation.image_to_image {sorted(unknown)}: accepted are what `generate` samples by")
        tasks = [source.task for source in read_mixture(self.mixture).sources]
        if self.evaluation is not None:
            read_mixture(self.evaluation, "evaluation")
        if not _are_shares(self.code_renaming, tasks):
            accepted = ", ".join(dict.fromkeys(tasks))
            raise ValueError(f"code_renaming {self.code_renaming!r}: accepted are `task: 0 to 1` lines, of {accepted}")

    @property
    def start(self) -> str:
        """The Hub folder or repo that the run starts from; a new model's is kept, with its tokenizer and codes."""
        return self.model or str(Path(self.output_dir) / "trainer" / "start")

    def max_length(self, config: LuminaMGPTConfig) -> int:
        """Tokens that a record may have."""
        limits = self.mixture.get("max_length"), self.pack_tokens, config.max_position_embeddings
        return min(limit for limit in limits if limit)


def _are_shares(values: Any, names: list[str]) -> bool:
    return isinstance(values, dict) and all(
        name in names and isinstance(share, int | float) and 0 <= share <= 1 for name, share in values.items()
    )


def _are_samples(values: Any) -> bool:
    known = isinstance(values, dict) and values.keys() == {"steps", "prompts"}
    return known and is_whole(values["steps"], 1) and bool(values["prompts"]) and isinstance(values["prompts"], list)


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
        if not self.stages or not all(_is_stage(stage) for stage in self.stages):
            raise ValueError(f"stages {self.stages}: accepted are a `recipe` and perhaps a `share` for each")
        shares = [stage["share"] for stage in self.stages if "share" in stage]
        if not all(_is_positive(share) for share in shares) or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"the shares are {shares}: accepted are numbers above 0 that are 1 together")
        if not _is_positive(self.minutes):
            raise ValueError(f"minutes {self.minutes!r}: accepted are numbers above 0")
        if not is_whole(self.num_cases, 2):
            raise ValueError(f"num_cases {self.num_cases!r}: accepted are 2 and more")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _is_stage(value: Any) -> bool:
    return isinstance(value, dict) and {"recipe"} <= value.keys() <= {"recipe", "share"}


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
    are_dicts = {name for name, value in values.items() if value and isinstance(value, dict)}
    both = {name for name in are_dicts & base.keys() if isinstance(base[name], dict)}
    return {**base, **values, **{name: _merged(base[name], values[name]) for name in both}}


def load_recipe(path: str | Path) -> SFTRecipe | VQRecipe | ChainRecipe:
    """The recipe in a YAML file, of the kind that its `trainer` says; ValueError that names the file otherwise."""
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


def lora_config(recipe: SFTRecipe) -> LoraConfig | None:
    if recipe.lora is None:
        return None
    try:
        return LoraConfig(**{"target_modules": LORA_TARGETS, "task_type": "CAUSAL_LM", **recipe.lora})
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora: {error}") from error
