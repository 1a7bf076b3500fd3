"""Published checkpoints -> a folder that every loader of this package reads.

    lumina-mgpt convert Alpha-VLLM/Lumina-mGPT-7B-768 lumina-mgpt-7b-768 --vq vqgan.ckpt

Family, ids and shape are read off the tokenizer's names and the tensors; the source's configuration only adds what
these cannot tell. Nothing is written before every name and shape has been checked. Weights then pass shard by shard
through `OUT.part`, where a rerun goes on, and the folder gets its name once it is whole and has been checked.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import custom_object_save

from .configuration_lumina_mgpt import LuminaMGPTConfig
from .convert_vq_checkpoint import convert_vq_state_dict
from .image_processing_lumina_mgpt import LuminaMGPTImageProcessor
from .modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration
from .processing_lumina_mgpt import TASKS, LuminaMGPTProcessor

MAX_SHARD_BYTES = 4 * 2**30
SIZE_UNIT_PX = 32
TEXT_ROOM = 512  # tokens that a prompt may take beside a picture of the default size
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = (INDEX, "pytorch_model.bin.index.json", "model.safetensors", "pytorch_model.bin")
SOURCE_RECORD = "source.json"  # in `OUT.part`: what its shards were made from
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP_SFT_TASKS = ("text-to-image", "complete", "caption", "vqa")
OMNI_TASKS = tuple(name for name, task in TASKS.items() if name != "restore" and task.num_panels == 1)
LUMINA_2_TASKS = ("text-to-image", "complete", "pair", "panel")
CHAMELEON_LICENCE = {
    "license": "other",
    "license_name": "chameleon-research-license",
    "license_link": "https://github.com/facebookresearch/chameleon/blob/main/LICENSE",
}


@dataclass(frozen=True)
class Family:
    """What the checkpoints of a family share.

    Attributes:
        title: as the papers call it.
        codes_per_size_unit: codes on each side of 32 pixels.
        context: tokens that its sequences may have.
        vq_file: its VQ model as published, and where.
        generation: sampling defaults.
        round_pixels: whether its pictures' pixels are rounded or truncated to 8 bits.
    """

    title: str
    codes_per_size_unit: int
    context: int
    vq_file: tuple[str, str]
    generation: dict[str, Any]
    round_pixels: bool = False


LUMINA = Family(
    title="Lumina-mGPT (arXiv 2408.02657)",
    codes_per_size_unit=2,
    context=4096,
    vq_file=("vqgan.ckpt", "tokenizer/ of Meta's Chameleon download"),
    generation={"guidance_scale": 4.0, "image_top_k": 2000, "text_top_k": 5},
)
LUMINA_2 = Family(
    title="Lumina-mGPT 2.0 (arXiv 2507.17801)",
    codes_per_size_unit=4,
    context=10240,
    vq_file=("movqgan_270M.ckpt", "ai-forever/MoVQGAN on the Hub"),
    generation={"guidance_scale": 4.0, "guidance_schedule": "decay", "image_top_k": 4096, "text_top_k": 10},
    round_pixels=True,
)
PURE = Family(
    title="PURE (arXiv 2503.11073)",
    codes_per_size_unit=4,
    context=11776,
    vq_file=("vq_ds8_c2i.pt", "FoundationVision/LlamaGen on the Hub"),
    generation={
        "guidance_scale": 0.8,
        "image_temperature": 0.9,
        "text_temperature": 0.9,
        "text_top_k": 1,
        "top_k_schedule": "entropy",
    },
)


@dataclass(frozen=True)
class Published:
    """What neither weights nor configuration of a published checkpoint tell.

    Attributes:
        repo: on the Hub.
        target_px: side of the square whose area its pictures have.
        tasks: what it was trained for; None: not known.
        generation: sampling defaults that differ from the family's.
        task_templates: user turns that differ from `TASKS`.
        licence: for the model card.
    """

    repo: str
    target_px: int = 512
    tasks: tuple[str, ...] | None = FP_SFT_TASKS
    generation: dict[str, Any] = field(default_factory=dict)
    task_templates: dict[str, str] = field(default_factory=dict)
    licence: dict[str, str] = field(default_factory=lambda: CHAMELEON_LICENCE)

    @property
    def name(self) -> str:
        return self.repo.partition("/")[2]


PUBLISHED = (
    Published("Alpha-VLLM/Lumina-mGPT-7B-512"),
    Published("Alpha-VLLM/Lumina-mGPT-7B-768", 768),
    Published(
        "Alpha-VLLM/Lumina-mGPT-7B-768-Omni",
        768,
        OMNI_TASKS,
        generation={"guidance_scale": 1.0, "image_top_k": 200},
        task_templates={"segmentation": "Segmentic segmentation. <|image|>"},  # as it was prompted
    ),
    Published("Alpha-VLLM/Lumina-mGPT-7B-1024", 1024),
    Published("Alpha-VLLM/Lumina-mGPT-34B-512"),
    Published("Alpha-VLLM/Chameleon_7B_mGPT", tasks=("caption", "vqa")),
    Published("Alpha-VLLM/Chameleon_34B_mGPT", tasks=("caption", "vqa")),
    Published("facebook/chameleon-7b", tasks=("caption", "vqa")),
    Published("facebook/chameleon-30b", tasks=("caption", "vqa")),
    Published("Alpha-VLLM/Lumina-mGPT-2.0", 768, LUMINA_2_TASKS[:3], licence={"license": "apache-2.0"}),
    Published("Alpha-VLLM/Lumina-mGPT-2.0-Omni", 768, LUMINA_2_TASKS, licence={"license": "apache-2.0"}),
    Published("nonwhy/PURE", 512, ("restore",)),
)
UNPUBLISHED = Published("", tasks=None, licence={"license": "unknown"})


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    vq: str | os.PathLike | None = None,
    dtype: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    name: str | None = None,
    from_chameleon: bool = False,
) -> list[str]:
    """Converts a checkpoint, or goes on with a conversion that was interrupted.

    Args:
        source: folder or Hub repo with a configuration, and weights in safetensors or `.bin` files.
        out: folder to make.
        vq: the VQ model's published file; by default looked for in `source`.
        dtype: of the decoder: "fp32", "bf16", "fp16"; None: as in `source`. The VQ model stays as it is.
        tokenizer: folder with a tokenizer, or a `text_tokenizer.json`; by default looked for in `source`.
        name: which of `PUBLISHED` it is; by default as `source` is called. Others get their family's defaults.
        from_chameleon: set the head's rows of image codes to zero, to start training from Chameleon.

    Returns:
        What `check` found.

    Raises:
        ValueError: naming every tensor that is missing, unexpected or of another shape, and every file that is
            missing, cut short or of another kind.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: remove it, or name another folder")
    part = out.with_name(f"{out.name}.part")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: accepted are {', '.join(DTYPES)}")
    published = _published(name or Path(source).name, must_exist=name is not None)

    # 1. What is it?
    folder = _fetch(source)
    text_tokenizer = _load_tokenizer(Path(tokenizer) if tokenizer else folder)
    family = _family(text_tokenizer)
    processor = LuminaMGPTProcessor(
        LuminaMGPTImageProcessor(round_pixels=family.round_pixels),
        text_tokenizer,
        size_unit_px=SIZE_UNIT_PX,
        codes_per_size_unit=family.codes_per_size_unit,
        target_px=published.target_px,
        task_templates=published.task_templates,
        trained_tasks=None if published.tasks is None else [*published.tasks],
    )
    headers = _headers(folder)
    config = _config(
        folder, {name: shape for shapes in headers.values() for name, shape in shapes.items()}, processor, family
    )
    config.dtype = DTYPES[dtype] if dtype else _dtype(next(iter(headers)))
    plan = _plan(headers, config)
    processor.vqvae = _load_vq(folder, Path(vq) if vq else None, family, len(processor.uni_rep.code_ids))

    # 2. The weights
    zeroed = processor.uni_rep.code_ids if from_chameleon else None
    stats = {str(file.resolve()): file.stat() for file in headers}
    record = {
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "shards": [names for _, names in plan],
        "dtype": dtype,
        "zeroed": None if zeroed is None else zeroed.tolist(),
    }
    _open_part(part, record)
    for number, (file, names) in enumerate(plan, 1):
        shard = part / _shard_name(number, len(plan))
        if not shard.exists():
            _write_shard(shard, file, names, config, DTYPES.get(dtype or ""), zeroed)
    _write_index(part, plan)

    # 3. All else; the configuration comes last, since no loader of models takes a folder without it
    processor.save_pretrained(part)
    processor.vqvae.save_pretrained(part / "vqvae")
    _generation_config(config, family, published).save_pretrained(part)
    (part / "README.md").write_text(_card(source, family, published))
    _save_code(part)
    found = _check(part, config)
    config.architectures = [LuminaMGPTForConditionalGeneration.__name__]
    config.save_pretrained(part)
    part.rename(out)
    (out / SOURCE_RECORD).unlink()
    return found


def check(folder: str | os.PathLike) -> list[str]:
    """Verifies a folder of this package's format without loading its weights; returns what was found in order.

    Raises:
        ValueError: naming what is wrong.
    """
    folder = Path(folder)
    return _check(folder, LuminaMGPTConfig.from_pretrained(_existing(folder / "config.json").parent))


def _check(folder: Path, config: LuminaMGPTConfig) -> list[str]:
    headers = _headers(folder)
    plan = _plan(headers, config)
    found = [
        f"{sum(len(names) for _, names in plan)} tensors in {len(headers)} files, names and shapes as they must be"
    ]

    processor = LuminaMGPTProcessor.from_pretrained(folder)
    if processor.uni_rep.layout_dict() != config.image_layout:
        raise ValueError(f"{folder}: config.json has another image_layout than the tokenizer's names give")
    num_codes = len(processor.uni_rep.code_ids)
    found.append(f"{num_codes} image codes, {len(processor.uni_rep.size_ids)} sizes found by name")

    if processor.vqvae.config.num_vq_embeddings != num_codes:
        raise ValueError(
            f"{folder}: a VQ model of {processor.vqvae.config.num_vq_embeddings} codes for {num_codes} names"
        )
    picture = Image.linear_gradient("L").resize((2 * processor.size_unit_px,) * 2)
    codes = processor.encode_image(picture, target_px=picture.width)
    again = processor.uni_rep.decode(processor.uni_rep.encode(codes))
    if not torch.equal(again, codes) or processor.decode_image(again).size != picture.size:
        raise ValueError(f"{folder}: a picture does not survive the VQ model and the layout of its codes")
    found.append(f"a picture of {picture.width}x{picture.height} px became {len(codes)}x{len(codes)} codes, and back")

    GenerationConfig.from_pretrained(folder)
    found.append(f"trained for {', '.join(processor.trained_tasks or ['(not stated)'])}")
    return found


# What a source is


def _published(name: str, must_exist: bool) -> Published:
    found = next((p for p in PUBLISHED if p.name.casefold() == name.casefold()), UNPUBLISHED)
    if must_exist and found is UNPUBLISHED:
        raise ValueError(f"name {name!r}: accepted are {', '.join(p.name for p in PUBLISHED)}")
    return found


def _fetch(source: str | os.PathLike) -> Path:
    """The folder, or a copy of the repo: its safetensors, or `.bin` files if it has none."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise ValueError(f"source {str(source)!r}: neither a folder nor a repo NAMESPACE/NAME")
    folder = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    if not any(folder.glob("*.safetensors")):
        snapshot_download(str(source), allow_patterns=["*.bin"])
    return folder


def _load_tokenizer(place: Path) -> PreTrainedTokenizerFast:
    """As it lies in a folder, or in Chameleon's own `text_tokenizer.json`."""
    file = place / "text_tokenizer.json" if place.is_dir() else place
    if place.is_dir() and (place / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(place)
    if not file.is_file():
        raise ValueError(f"{place}: no tokenizer.json and no text_tokenizer.json; give one as `tokenizer`")
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    except Exception as error:  # the parser raises nothing narrower
        raise ValueError(f"{file}: not a tokenizer: {error}") from error


def _family(tokenizer: PreTrainedTokenizerFast) -> Family:
    """By the names of the image codes."""
    vocab = tokenizer.get_vocab()
    if "<MOVQGAN0>" in vocab:
        return LUMINA_2
    return PURE if "IMGIMGIBJCZ" in vocab else LUMINA  # code 8192


def _config(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    processor: LuminaMGPTProcessor,
    family: Family,
) -> LuminaMGPTConfig:
    """The tensors' own numbers, the tokenizer's ids, and of the source's configuration what these leave open."""
    uni_rep, tokenizer = processor.uni_rep, processor.tokenizer
    given, _ = LuminaMGPTConfig.get_config_dict(_existing(folder / "config.json").parent)
    found = _shape_values(shapes)
    wrong = [
        f"{name} {given[name]} (the tensors say {n})" for name, n in found.items() if given.get(name) not in (None, n)
    ]
    if wrong:
        raise ValueError(f"{folder / 'config.json'}: {', '.join(wrong)}")
    side_px = processor.target_px
    rows, cols = uni_rep.grid(side_px, side_px)
    trained = [TASKS[name] for name in processor.trained_tasks or []]
    num_pictures = 1 + any("image" in task.answer and task.needs_image and not task.continues for task in trained)
    needed = max(family.context, num_pictures * uni_rep.num_tokens(rows, cols) + TEXT_ROOM)
    num_ids = 1 + max(uni_rep.end_of_turn_id, uni_rep.start_id, *uni_rep.size_ids, int(uni_rep.code_ids.max()))
    if num_ids > found["vocab_size"]:
        raise ValueError(f"{folder}: an embedding of {found['vocab_size']} rows for a tokenizer with ids to {num_ids}")
    values = {
        **given,
        **found,
        "max_position_embeddings": max(needed, given.get("max_position_embeddings") or 0),
        "bos_token_id": tokenizer.convert_tokens_to_ids(processor.bos_token),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": uni_rep.end_id if family is LUMINA_2 else uni_rep.end_of_turn_id,
        "image_layout": uni_rep.layout_dict(),
        "image_token_id": processor.image_token_id,
        "default_height_px": side_px,
        "default_width_px": side_px,
    }
    return LuminaMGPTConfig.from_dict(values)


def _shape_values(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """The decoder's dimensions."""
    layer = "model.layers.0."
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.q_norm", "mlp.gate_proj")
    wanted = ["model.embed_tokens.weight", *(f"{layer}{name}.weight" for name in names)]
    missing = [name for name in wanted if name not in shapes]
    if missing:
        raise ValueError(f"not a decoder of a known layout: missing {', '.join(missing)}")
    (vocab_size, hidden_size), (q_rows, _), (k_rows, _), (*_, head_dim), (mlp_rows, _) = (shapes[n] for n in wanted)
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": mlp_rows,
        "num_hidden_layers": len({m[1] for name in shapes if (m := re.match(r"model\.layers\.(\d+)\.", name))}),
        "num_attention_heads": q_rows // head_dim,
        "num_key_value_heads": k_rows // head_dim,
    }


def _generation_config(config: LuminaMGPTConfig, family: Family, published: Published) -> GenerationConfig:
    ids = {name: getattr(config, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    generation_config = GenerationConfig(do_sample=True, **ids)
    for name, value in (family.generation | published.generation).items():
        setattr(generation_config, name, value)  # the constructor would drop what is not stock's
    return generation_config


# Weights


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, as the index names them."""
    first = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if first is None:
        meta = any(folder.glob("consolidated*.pth"))
        advice = "; Meta's own files are not read: convert facebook/chameleon-7b or -30b" if meta else ""
        raise ValueError(f"{folder}: no weights, accepted are {', '.join(WEIGHT_FILES)}{advice}")
    if first.suffix != ".json":
        return [first]
    names = sorted(set(_read_json(first).get("weight_map", {}).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ValueError(f"{first} names files that are missing: {', '.join(missing) or 'none at all'}")
    return [folder / name for name in names]


@contextmanager
def _opened(file: Path) -> Iterator[tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]]:
    """The shapes of a file's tensors, and what reads one of them; the decoder's only."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as tensors:
                names = [name for name in tensors.keys() if not name.startswith("model.vqmodel.")]  # noqa: SIM118
                yield {name: tuple(tensors.get_slice(name).get_shape()) for name in names}, tensors.get_tensor
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged: {error}") from error
    else:
        state = load_pickle(file)
        names = [name for name in state if not name.startswith("model.vqmodel.")]
        yield {name: tuple(state[name].shape) for name in names}, state.__getitem__


def load_pickle(file: Path) -> dict[str, Tensor]:
    """Tensors of a `.bin`, `.ckpt` or `.pt` file, mapped from disk where it allows; nothing in it is executed.

    They may be nested in `state_dict` or `model`, as in the published VQ files.
    """
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            state = torch.load(file, mmap=True, **options)
        except RuntimeError:  # a file in the format from before PyTorch 1.6
            state = torch.load(file, **options)
    except Exception as error:  # of many kinds, as the damage may be
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file}: not a file of tensors, or damaged: {what}") from error
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file}: holds other things than tensors")
    return state


def _dtype(file: Path) -> torch.dtype:
    with _opened(file) as (shapes, get):
        return get(next(iter(shapes))).dtype


def _headers(folder: Path) -> dict[Path, dict[str, tuple[int, ...]]]:
    """The shapes of the tensors in each of a folder's weight files."""
    headers = {}
    for file in _weight_files(folder):
        with _opened(file) as (shapes, _):
            headers[file] = shapes
    return headers


def _plan(headers: dict[Path, dict[str, tuple[int, ...]]], config: LuminaMGPTConfig) -> list[tuple[Path, list[str]]]:
    """Shards to write, each from one file; ValueError unless the files hold exactly this decoder."""
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in LuminaMGPTForConditionalGeneration(config).state_dict().items()}
    plan: list[tuple[Path, list[str]]] = []
    faults: list[str] = []
    seen: set[str] = set()
    for file, shapes in headers.items():
        size = MAX_SHARD_BYTES + 1
        faults += [f"{name} is in {file.name} and in another file" for name in shapes.keys() & seen]
        for name, shape in shapes.items():
            if name not in wanted:
                faults.append(f"unexpected {name} in {file.name}")
            elif shape != wanted[name] and not _is_sharded_norm(name, shape, wanted[name]):
                faults.append(f"{name} has shape {list(shape)}, not {list(wanted[name])}")
            num_bytes = 4 * torch.Size(shape).numel()
            if size + num_bytes > MAX_SHARD_BYTES:
                plan.append((file, []))
                size = 0
            plan[-1][1].append(name)
            size += num_bytes
        seen |= shapes.keys()
    faults += [f"missing {name}" for name in wanted if name not in seen]
    if faults:
        raise ValueError("not the weights of this decoder: " + "; ".join(faults))
    return plan


def _is_sharded_norm(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a norm of queries or keys has a row for each model-parallel shard, or one for all heads."""
    is_norm = re.search(r"\.[qk]_norm\.(weight|bias)$", name) is not None
    rows = shape[0] if len(shape) == 2 else 1
    return is_norm and shape[-1:] == wanted[-1:] and rows > 0 and wanted[0] % rows == 0


def _open_part(part: Path, record: dict[str, Any]) -> None:
    """Makes the folder of an unfinished conversion, or makes sure that it is of this one."""
    file = part / SOURCE_RECORD
    part.mkdir(parents=True, exist_ok=True)
    if not any(part.iterdir()):
        file.write_text(json.dumps(record))
    elif not file.is_file():
        raise ValueError(f"{part} is in the way, and was not made by a conversion: name another folder to make")
    elif _read_json(file) != record:
        raise ValueError(f"{part} holds another conversion that was interrupted: remove it to start this one")
    (part / "config.json").unlink(missing_ok=True)  # what follows makes the folder anew around the shards


def _shard_name(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors" if total > 1 else "model.safetensors"


def _write_shard(
    shard: Path, file: Path, names: list[str], config, dtype: torch.dtype | None, zeroed: Tensor | None
) -> None:
    """One shard, which appears when it is whole."""
    heads = {"q_norm": config.num_attention_heads, "k_norm": config.num_key_value_heads}
    tensors = {}
    with _opened(file) as (_, get):
        for name in names:
            tensor = get(name)
            if norm := re.search(r"\.([qk]_norm)\.", name):
                tensor = tensor.reshape(-1, tensor.shape[-1])
                tensor = tensor.repeat_interleave(heads[norm[1]] // len(tensor), 0)
            if zeroed is not None and name == "lm_head.weight":
                tensor = tensor.index_fill(0, zeroed, 0)
            tensors[name] = tensor.to(dtype or tensor.dtype).contiguous()
        unfinished = shard.with_suffix(".unfinished")
        save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.rename(shard)


def _write_index(part: Path, plan: list[tuple[Path, list[str]]]) -> None:
    if len(plan) == 1:
        return
    weight_map = {name: _shard_name(i, len(plan)) for i, (_, names) in enumerate(plan, 1) for name in names}
    total = sum((part / _shard_name(i, len(plan))).stat().st_size for i in range(1, len(plan) + 1))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (part / INDEX).write_text(json.dumps(index, indent=2) + "\n")


# The rest of the folder


def _load_vq(folder: Path, file: Path | None, family: Family, num_names: int) -> VQModel:
    name, place = family.vq_file
    file = file or folder / name
    if not file.is_file():
        raise ValueError(f"{file}: no such file; {family.title} needs {name} (from {place}), given as `vq`")
    vqvae = convert_vq_state_dict(load_pickle(file))
    num_codes = vqvae.config.num_vq_embeddings
    if num_codes != num_names:
        raise ValueError(f"{file}: a VQ model of {num_codes} codes; the tokenizer has names for {num_names}")
    return vqvae


def _save_code(part: Path) -> None:
    from modeling_lumina_mgpt.pipelines.pipeline_lumina_mgpt import save_pipeline_files

    save_pipeline_files(part)
    custom_object_save(LuminaMGPTForConditionalGeneration, part)


def _card(source: str | os.PathLike, family: Family, published: Published) -> str:
    from modeling_lumina_mgpt.model_cards import converted_card

    base = {"base_model": published.repo} if published.repo else {}
    name, place = published.name or Path(source).name, published.repo or str(source)
    return converted_card(name, place, family.title, published.licence | base, published.tasks)


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    return file


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
