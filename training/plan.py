"""How much memory a recipe needs on each GPU, and what to change if that is too much. Loads no weights.

    lumina-mgpt train recipe.yaml --plan --gpus 8 --gpu-memory 80

The estimate is of training with `training/distributed/fsdp_*.yaml`: what is trained in float32, sharded over all GPUs,
computing in bfloat16. What backward needs is counted operation by operation; tests compare that with the live tensors
of a real step on the CPU. A GPU's attention differs from the CPU's by a seed of a few bytes; its dropout keeps a mask
of one byte a number (the CPU's: of the numbers' size); what its libraries take is `OVERHEAD_BYTES`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from modeling_lumina_mgpt import LuminaMGPTConfig, LuminaMGPTForConditionalGeneration
from modeling_lumina_mgpt.modeling_lumina_mgpt import LOGITS_PER_CHUNK
from modeling_lumina_mgpt.uni_rep import MAX_SIZE_UNITS, ImageLayout

from .code_rows import HIDDEN
from .recipe import LORA_TARGETS, WHOLE_MATRICES, SFTRecipe

GIB = 2**30
OVERHEAD_BYTES = 3 * GIB  # CUDA's context, the buffers of NCCL and cuBLAS, and gaps that the allocator cannot use
TEXT_TOKENS = 512  # beside a record's pictures
PICTURES = dict.fromkeys(("text-to-image", "caption", "vqa", "pair", "panel"), 1)  # two panels are one; of others 2
OPEN_ENDED = {"chat", "image-to-text", "edit"}  # conversations: as long as is accepted
DEFAULT_RANK = 32
BYTES_IN_4_BIT = 0.5 + 4 / 64  # and a float32 scale for every 64 weights
STATE_BYTES = {"8bit": 2, "4bit": 1, "adafactor": 0, "sgd": 0}  # of optimizers that are not AdamW with its 8
MAX_GPUS = 4096
UNKNOWN_IDS: dict[str, Any] = {
    **dict.fromkeys(("start_id", "end_id", "end_of_line_id", "end_of_turn_id"), 0),
    "size_ids": [0] * MAX_SIZE_UNITS,
    "code_id_ranges": [],
}
LARGE = {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 48, "num_attention_heads": 64}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {  # part of the name: shape, codes on each side of a size unit
    "34b": ({**LARGE, "num_key_value_heads": 8, "swin_norm": True}, 2),
    "mgpt-2": ({"vocab_size": 171_392, "max_position_embeddings": 10240}, 4),
    "pure": ({"vocab_size": 73_728, "max_position_embeddings": 11776}, 4),
    "mgpt": ({}, 2),
}


@dataclass(frozen=True)
class Shape:
    """A decoder's numbers of weights.

    Attributes:
        layer, head: weights of one layer, and of the head or the embedding.
        linear: inputs and outputs of a layer's linear layers, by name.
    """

    config: LuminaMGPTConfig
    total: int
    layer: int
    head: int
    linear: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, config: LuminaMGPTConfig) -> "Shape":
        with init_empty_weights():
            model = LuminaMGPTForConditionalGeneration(config)
        total, layer, head = (
            sum(weight.numel() for weight in module.parameters())
            for module in (model, model.model.layers[0], model.lm_head)
        )
        named = ((name.split(".")[-1], module) for name, module in model.model.layers[0].named_modules())
        linear = {name: (m.in_features, m.out_features) for name, m in named if isinstance(m, nn.Linear)}
        return cls(config, total, layer, head, linear)


@dataclass(frozen=True)
class Run:
    """What decides how much memory a run needs.

    Attributes:
        batch_size, length: records at a time on each GPU, and ids of the longest.
        accumulation: batches in a step.
        compute_bytes: of a number between layers, and of a gathered weight.
        rank: of LoRA; None: all weights are trained.
        targets: linear layers that LoRA adapts.
        base_bytes: of a frozen weight of a linear layer.
        shards_base: whether frozen weights are sharded; bitsandbytes' are not, unless stored as floats.
        state_bytes: of the optimizer for each trained weight.
        num_code_rows: codes whose rows of embeddings and head learn together.
    """

    shape: Shape
    num_gpus: int
    batch_size: int
    length: int
    accumulation: int = 1
    checkpointing: bool = True
    compute_bytes: int = 2
    rank: int | None = None
    targets: tuple[str, ...] = tuple(LORA_TARGETS)
    lora_dropout: float = 0.0
    base_bytes: float = 2
    shards_base: bool = True
    state_bytes: int = 8
    num_code_rows: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        gathered: whole weights of the layers at work and of the head, whose gradient is whole, too, for a while.
        activations: what the forward pass leaves for the backward pass.
        layer, logits: of the layer, or of the piece of the logits, that is being computed.
    """

    weights: float
    gathered: float
    gradients: float
    optimizer: float
    activations: float
    layer: float
    logits: float

    def peak(self, accumulation: int) -> float:
        """Within a step: activations go as gradients come, unless these are there from the batches before."""
        moving = (self.activations, self.gradients)
        largest = sum(moving) if accumulation > 1 else max(moving)
        return self.weights + self.gathered + self.optimizer + largest + max(self.layer, self.logits)


def plan(recipe: SFTRecipe, num_gpus: int, gpu_memory_gib: float) -> str:
    """A table of what `recipe` needs on each of its GPUs, and the first change that makes it fit.

    Raises:
        ValueError: for a number of GPUs or a memory below 1, or for several where a setting needs whole matrices.
    """
    if num_gpus < 1 or gpu_memory_gib < 1:
        raise ValueError(f"{num_gpus} GPUs of {gpu_memory_gib} GiB: accepted are 1 and more of each")
    for name in WHOLE_MATRICES:
        if getattr(recipe, name) and num_gpus > 1:
            raise ValueError(f"{num_gpus} GPUs share the matrices, which {name}: true needs whole; accepted is 1")
    run = run_of(recipe, num_gpus)
    needed = total_bytes(run)
    lines = [*_described(run), "", "GiB on each GPU", *_rows(run), f"{'at the peak':<12} {needed / GIB:8.2f}"]
    lines[-1] += f" of {gpu_memory_gib:g}: {'fits' if needed <= gpu_memory_gib * GIB else 'does not fit'}"
    if needed > gpu_memory_gib * GIB:
        lines += ["", "What would change that, one after another:", *_advice(run, gpu_memory_gib * GIB)]
    return "\n".join(lines)


def total_bytes(run: Run) -> float:
    return memory(run).peak(run.accumulation) + OVERHEAD_BYTES


def memory(run: Run) -> Memory:
    """The estimate, without `OVERHEAD_BYTES`."""
    shape, config, c = run.shape, run.shape.config, run.compute_bytes
    num_layers, num_tokens = config.num_hidden_layers, run.batch_size * run.length
    gathered = c * shape.head + 2 * c * shape.layer  # the next layer is fetched ahead
    if run.rank is None:
        trained, frozen = shape.total, 0.0
        gathered += (4 + c) * shape.head  # its gradient is the first, and added up in float32
    else:
        trained = num_layers * sum(run.rank * sum(shape.linear[name]) for name in run.targets)
        in_linear = num_layers * sum(rows * cols for rows, cols in shape.linear.values())
        frozen = run.base_bytes * in_linear + c * (shape.total - in_linear)
    code_rows = 0
    if (
        run.num_code_rows
    ):  # both matrices as they come to be, the gradient of one; rows as they were, and the network's units
        code_rows = 4 * (3 * shape.head + 2 * run.num_code_rows * (config.hidden_size + 4 * HIDDEN))
    in_layer = _layer_bytes(run)
    kept = c * config.hidden_size if run.checkpointing else in_layer
    last = (4 + c * (run.rank is None) + c) * config.hidden_size  # the last norm; what the loss has differentiated
    working = c * (config.hidden_size + config.intermediate_size) + (in_layer if run.checkpointing else 0)
    chunk = min(num_tokens, LOGITS_PER_CHUNK // config.vocab_size) * config.vocab_size
    return Memory(
        weights=4 * trained / run.num_gpus + frozen / (run.num_gpus if run.shards_base else 1) + code_rows,
        gathered=gathered,
        gradients=4 * trained / run.num_gpus,
        optimizer=run.state_bytes * trained / run.num_gpus,
        activations=num_tokens * (num_layers * kept + last),
        layer=num_tokens * working,
        logits=num_tokens * c * config.hidden_size + chunk * (4 + c % 4),
    )


def _layer_bytes(run: Run) -> float:
    """What one layer's operations keep of each token; inputs that several share once."""
    config, c, all_trained = run.shape.config, run.compute_bytes, run.rank is None
    hidden, wide = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    kv = hidden // heads * kv_heads

    def reads(*names: str) -> bool:  # what is trained reads its input again, for its own gradient
        return all_trained or not {*names}.isdisjoint(run.targets)

    norms = 2 * (4 + c * all_trained) * hidden  # in float32; and normalized
    inputs = c * hidden * (reads("q_proj", "k_proj", "v_proj") + reads("gate_proj", "up_proj"))
    queries_and_keys = c * (hidden + kv) * (2 + all_trained)  # as projected, normalized, rotated
    statistics = 4 * (heads + 2 * (heads + kv_heads))  # of attention, and of both their norms
    values_and_output = c * (kv + hidden)
    mlp = c * wide * (3 + reads("down_proj"))  # gate, its activation, up, their product
    masks = 2 * hidden if config.residual_dropout else 0
    adapters = c * (run.rank or 0) * len(run.targets)
    if run.rank and run.lora_dropout:
        adapters += (c + 1) * sum(run.shape.linear[name][0] for name in run.targets)
    return norms + inputs + queries_and_keys + statistics + values_and_output + mlp + masks + adapters


def run_of(recipe: SFTRecipe, num_gpus: int) -> Run:
    """What a recipe says of these, with the defaults of TRL where it says nothing."""
    config, values = _config(recipe), recipe.sft
    lora, quantization = recipe.lora or {}, recipe.quantization or {}
    targets = lora.get("target_modules")
    optimizer = str(values.get("optim", "adamw"))
    return Run(
        Shape.of(config),
        num_gpus,
        values.get("per_device_train_batch_size", 8),
        _longest(recipe, config),
        values.get("gradient_accumulation_steps", 1),
        values.get("gradient_checkpointing", values.get("activation_checkpointing", True)),
        2 if values.get("bf16", True) else 4,
        lora.get("r", 8) if recipe.lora is not None else None,
        tuple(targets) if isinstance(targets, list) else tuple(LORA_TARGETS),
        lora.get("lora_dropout", 0.0),
        BYTES_IN_4_BIT if quantization.get("load_in_4bit") else 1 if quantization.get("load_in_8bit") else 2,
        not quantization or "bnb_4bit_quant_storage" in quantization,
        next((size for name, size in STATE_BYTES.items() if name in optimizer), 8),
        _num_codes(config) if recipe.share_code_rows else 0,
    )


def _num_codes(config: LuminaMGPTConfig) -> int:
    return sum(end - start for start, end in (config.image_layout or UNKNOWN_IDS)["code_id_ranges"])


def _config(recipe: SFTRecipe) -> LuminaMGPTConfig:
    """Of the model to start from, or of the published one that it is called after where there is none yet."""
    if recipe.model:
        return _existing_config(recipe.model, recipe.config)
    shape = recipe.from_scratch or {}
    if "like" in shape:
        return _existing_config(shape["like"], shape.get("config", {}))
    units = {name: shape["processor"][name] for name in ("size_unit_px", "codes_per_size_unit")}
    return LuminaMGPTConfig(
        vocab_size=shape["tokenizer"]["vocab_size"], image_layout=UNKNOWN_IDS | units, **shape["config"]
    )


def _existing_config(model: str, values: dict[str, Any]) -> LuminaMGPTConfig:
    is_repo = "/" in model and not Path(model).exists()
    try:
        return LuminaMGPTConfig.from_pretrained(model, local_files_only=not is_repo, **values)
    except OSError:
        named = [(shape, codes) for name, (shape, codes) in PUBLISHED.items() if name in model.lower()]
        if not named:
            raise
    shape, codes_per_size_unit = named[0]
    layout = {**UNKNOWN_IDS, "size_unit_px": 32, "codes_per_size_unit": codes_per_size_unit}
    return LuminaMGPTConfig(**{**shape, "image_layout": layout, **values})


def _longest(recipe: SFTRecipe, config: LuminaMGPTConfig) -> int:
    """Ids of a mixture's longest records: `TEXT_TOKENS` and their pictures, or as many as are accepted."""
    limit = recipe.max_length(config)
    tasks = {source["task"] for source in recipe.mixture["sources"]}
    if recipe.pack_tokens or tasks & OPEN_ENDED:
        return limit
    if config.image_layout is None:
        raise ValueError(f"{recipe.start}: its configuration has no image_layout; `lumina-mgpt convert` gives it one")
    layout = ImageLayout(**config.image_layout)

    def pictures(task: str, target_px: int) -> int:
        sizes = layout.buckets(target_px)
        return PICTURES.get(task, 2) * max(layout.num_tokens(*layout.grid(height, width)) for width, height in sizes)

    own_px = recipe.mixture["target_px"]
    most = max(pictures(source["task"], source.get("target_px") or own_px) for source in recipe.mixture["sources"])
    return min(limit, TEXT_TOKENS + most)


def _described(run: Run) -> list[str]:
    trained = "all trained" if run.rank is None else f"frozen, with LoRA of rank {run.rank}"
    checkpointing = "with" if run.checkpointing else "without"
    return [
        f"{run.shape.total:,} weights, {trained}, on {run.num_gpus} GPU{'s' * (run.num_gpus > 1)}",
        f"{run.batch_size} records of up to {run.length:,} ids at a time, {checkpointing} gradient checkpointing",
    ]


def _rows(run: Run) -> list[str]:
    needed = memory(run)
    named = {**vars(needed), "libraries": OVERHEAD_BYTES}
    return [f"{name:<12} {size / GIB:8.2f}" for name, size in named.items()]


def _advice(run: Run, limit: float) -> list[str]:
    lines, least = [], total_bytes(run)
    for change, changed in changes(run):
        needed = total_bytes(changed)
        if needed >= least:  # accumulation keeps gradients while activations are made
            continue
        least = needed
        lines.append(f"  {change}: {needed / GIB:.2f} GiB{', which fits' if needed <= limit else ''}")
        if needed <= limit:
            return lines
    return [*lines, "  nothing of that fits: take GPUs with more memory, or shorter records"]


def changes(run: Run) -> Iterator[tuple[str, Run]]:
    """What needs less memory, in the order of what it costs; each with those before. More GPUs are without LoRA."""
    if not run.checkpointing:
        run = replace(run, checkpointing=True)
        yield "gradient_checkpointing: true", run
    while run.batch_size > 1:
        half, steps = run.batch_size // 2, run.accumulation * -(-run.batch_size // (run.batch_size // 2))
        run = replace(run, batch_size=half, accumulation=steps)
        yield f"per_device_train_batch_size: {half}, gradient_accumulation_steps: {steps}", run
    lora = replace(run, rank=run.rank or DEFAULT_RANK)
    if run.rank is None:
        yield f"lora: {{r: {DEFAULT_RANK}, lora_alpha: {DEFAULT_RANK}}}", lora
    if lora.base_bytes >= 1:
        yield "and quantization: {load_in_4bit: true}", replace(lora, base_bytes=BYTES_IN_4_BIT, shards_base=False)
    while run.num_gpus < MAX_GPUS:
        run = replace(run, num_gpus=2 * run.num_gpus, accumulation=max(1, run.accumulation // 2))
        yield f"{run.num_gpus} GPUs", run
