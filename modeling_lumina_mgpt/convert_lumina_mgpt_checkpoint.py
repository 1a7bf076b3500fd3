"""Published checkpoints -> a folder that every loader of this package reads.

    lumina-mgpt convert Alpha-VLLM/Lumina-mGPT-7B-768 lumina-mgpt-7b-768 --vq vqgan.ckpt

Family, ids and shape are read off the tokenizer's names and the tensors; the source's configuration only adds what
these cannot tell. Nothing is written before every name, shape and dtype has been checked, and of a repo the weights
are fetched last. They then pass shard by shard through `OUT.part`, where a rerun goes on, and the folder gets its name
once it is whole and has been checked.
"""

import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import VQModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers import __version__ as transformers_version
from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files

from .configuration_lumina_mgpt import LuminaMGPTConfig
from .convert_vq_checkpoint import DTYPES, convert_vq_state_dict, weight_faults
from .image_processing_lumina_mgpt import LuminaMGPTImageProcessor
from .modeling_lumina_mgpt import LuminaMGPTForConditionalGeneration
from .processing_lumina_mgpt import TASKS, LuminaMGPTProcessor

MAX_SHARD_BYTES = 4 * 2**30
MAX_LAYERS = 1000  # more are a mistake, which would take long to find
SIZE_UNIT_PX = 32
TEXT_ROOM = 512  # tokens that a prompt may take beside a picture of the default size
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = (INDEX, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
SOURCE_RECORD = "source.json"  # in `OUT.part`: what its shards were made from
# A refused configuration. Without any, some loaders take defaults; without a version, they suspect the tokenizer.
UNFINISHED = json.dumps({"image_layout": {}, "transformers_version": transformers_version})
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
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
        licence: of its published checkpoints, for the model card.
        generation: sampling defaults.
        round_pixels: whether its pictures' pixels are rounded or truncated to 8 bits.
    """

    title: str
    codes_per_size_unit: int
    context: int
    vq_file: tuple[str, str]
    licence: dict[str, str]
    generation: dict[str, Any]
    round_pixels: bool = False


LUMINA = Family(
    title="Lumina-mGPT (arXiv 2408.02657)",
    codes_per_size_unit=2,
    context=4096,
    vq_file=("vqgan.ckpt", "tokenizer/ of Meta's Chameleon download"),
    licence=CHAMELEON_LICENCE,
    generation={"guidance_scale": 4.0, "image_top_k": 2000, "text_top_k": 5},
)
LUMINA_2 = Family(
    title="Lumina-mGPT 2.0 (arXiv 2507.17801)",
    codes_per_size_unit=4,
    context=10240,
    vq_file=("movqgan_270M.ckpt", "ai-forever/MoVQGAN on the Hub"),
    licence={"license": "apache-2.0"},
    generation={"guidance_scale": 4.0, "guidance_schedule": "decay", "image_top_k": 4096, "text_top_k": 10},
    round_pixels=True,
)
PURE = Family(
    title="PURE (arXiv 2503.11073)",
    codes_per_size_unit=4,
    context=11776,
    vq_file=("vq_ds8_c2i.pt", "FoundationVision/LlamaGen on the Hub"),
    licence=CHAMELEON_LICENCE,
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
        family: which its tokenizer must be of.
        target_px: side of the square whose area its pictures have.
        tasks: what it was trained for; None: not known.
        generation: sampling defaults that differ from the family's.
        task_templates: user turns that differ from `TASKS`.
    """

    repo: str
    family: Family | None
    target_px: int = 512
    tasks: tuple[str, ...] | None = FP_SFT_TASKS
    generation: dict[str, Any] = field(default_factory=dict)
    task_templates: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.repo.partition("/")[2]


PUBLISHED = (
    Published("Alpha-VLLM/Lumina-mGPT-7B-512", LUMINA),
    Published("Alpha-VLLM/Lumina-mGPT-7B-768", LUMINA, 768),
    Published(
        "Alpha-VLLM/Lumina-mGPT-7B-768-Omni",
        LUMINA,
        768,
        OMNI_TASKS,
        generation={"guidance_scale": 1.0, "image_top_k": 200},
        task_templates={"segmentation": "Segmentic segmentation. <|image|>"},  # as it was prompted
    ),
    Published("Alpha-VLLM/Lumina-mGPT-7B-1024", LUMINA, 1024),
    Published("Alpha-VLLM/Lumina-mGPT-34B-512", LUMINA),
    Published("Alpha-VLLM/Chameleon_7B_mGPT", LUMINA, tasks=("caption", "vqa")),
    Published("Alpha-VLLM/Chameleon_34B_mGPT", LUMINA, tasks=("caption", "vqa")),
    Published("facebook/chameleon-7b", LUMINA, tasks=("caption", "vqa")),
    Published("facebook/chameleon-30b", LUMINA, tasks=("caption", "vqa")),
    Published("Alpha-VLLM/Lumina-mGPT-2.0", LUMINA_2, 768, LUMINA_2_TASKS[:3]),
    Published("Alpha-VLLM/Lumina-mGPT-2.0-Omni", LUMINA_2, 768, LUMINA_2_TASKS),
    Published("nonwhy/PURE", PURE, 512, ("restore",)),
)
UNPUBLISHED = Published("", None, tasks=None)


class Header(NamedTuple):
    """What is known of a tensor before it is read; a dtype that is not accepted is its name in the file."""

    shape: torch.Size
    dtype: Any


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
        name: which of `PUBLISHED` it is; by default the one whose repo `source` is, or whose name the folder has.
            Others get their family's defaults.
        from_chameleon: set the head's rows of image codes to zero, to start training from Chameleon.

    Returns:
        What `check` found.

    Raises:
        ValueError: naming every tensor that is missing, unexpected, or of another shape or dtype, and every file that
            is missing, cut short or of another kind.
        OSError: naming the folder that could not be written.
    """
    # 1. What was asked for?
    out = Path(out)
    part = _part_of(out)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: accepted are {', '.join(DTYPES)}")
    published = _published(source, name)
    vqvae = _load_vq(Path(vq)) if vq else None
    text_tokenizer = _load_tokenizer(Path(tokenizer)) if tokenizer else None

    # 2. What is it?
    folder = _fetch(source, "*.json")
    stated = _read_json(folder / "config.json")
    if stated.get("model_type") == LuminaMGPTConfig.model_type:
        raise ValueError(f"{folder} is converted already: `lumina-mgpt convert --check` verifies it")
    text_tokenizer = text_tokenizer or _load_tokenizer(folder)
    family = _family(text_tokenizer)
    if published.family not in (None, family):
        raise ValueError(
            f"{source}: called {published.name}, which is {published.family.title}, yet has a tokenizer of"
            f" {family.title}: give its true name with --name (`name`), or another one to its folder"
        )
    if from_chameleon and (family is not LUMINA or "text-to-image" in (published.tasks or ())):
        raise ValueError(
            f"{source}: --from-chameleon (`from_chameleon`) would undo the training of this checkpoint"
            f" ({published.name or family.title}); it is for Chameleon, which draws no pictures yet"
        )
    processor = LuminaMGPTProcessor(
        LuminaMGPTImageProcessor(round_pixels=family.round_pixels),
        text_tokenizer,
        size_unit_px=SIZE_UNIT_PX,
        codes_per_size_unit=family.codes_per_size_unit,
        target_px=published.target_px,
        task_templates=published.task_templates,
        trained_tasks=None if published.tasks is None else [*published.tasks],
    )
    processor.vqvae = vqvae or _load_vq(_fetch(source, family.vq_file[0]) / family.vq_file[0], family)
    _check_num_codes(processor)
    if not any(_fetch(source, "*.safetensors").glob("*.safetensors")):
        _fetch(source, "*.bin")
    headers = _headers(folder)
    tensors = {name: header for tensors in headers.values() for name, header in tensors.items()}
    decoder = _decoder(folder / "config.json", _decoder_values(folder / "config.json", stated, tensors))
    plan, config = _plan(headers, decoder), decoder.config
    config.dtype = (
        DTYPES[dtype] if dtype else reduce(torch.promote_types, {header.dtype for header in tensors.values()})
    )
    _settle(config, processor, family)

    # 3. All but the weights
    zeroed = processor.uni_rep.code_ids if from_chameleon else None
    stats = {str(file.resolve()): file.stat() for file in headers}
    record = {
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "shards": [names for _, names in plan],
        "dtype": dtype,
        "zeroed": None if zeroed is None else zeroed.tolist(),
    }
    with _writing(part):
        _open_part(part, record)
        processor.save_pretrained(part)
        processor.vqvae.save_pretrained(part / "vqvae")
        del processor, vqvae  # so that only one VQ model is ever in memory
        _generation_config(config, family, published).save_pretrained(part)
        (part / "README.md").write_text(_card(source, family, published))
        _save_code(part)

        # 4. The weights; the configuration comes last, since no loader takes `UNFINISHED`
        for number, (file, names) in enumerate(plan, 1):
            shard = part / _shard_name(number, len(plan))
            if not shard.exists():
                _write_shard(shard, file, names, config, DTYPES.get(dtype or ""), zeroed)
        _write_index(part, plan)
        found = _check(part, decoder)
        for file in part.rglob("*.safetensors"):
            shutil.copymode(part / SOURCE_RECORD, file)  # safetensors lets only the owner read what it writes
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
    file = folder / "config.json"
    values = _read_json(file)
    if values.get("model_type") != LuminaMGPTConfig.model_type:
        raise ValueError(f"{file}: model_type {values.get('model_type')!r}, not {LuminaMGPTConfig.model_type!r}")
    return _check(folder, _decoder(file, values))


def _check(folder: Path, decoder: LuminaMGPTForConditionalGeneration) -> list[str]:
    """As `check`, apart from the configuration, which is that of the empty `decoder`."""
    missing = [name for name in _small_files() if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: files are missing: {', '.join(missing)}")
    for file in (folder / name for name in _small_files() if name.endswith(".json")):
        _read_json(file)
    _check_index(folder / "model_index.json")
    headers = _headers(folder)
    num_tensors = sum(len(names) for _, names in _plan(headers, decoder))
    found = [f"{num_tensors} tensors in {len(headers)} files, names and shapes as they must be"]

    with _explained(f"{folder}: its processor does not load"):
        processor = LuminaMGPTProcessor.from_pretrained(folder)
    if processor.uni_rep.layout_dict() != decoder.config.image_layout:
        raise ValueError(f"{folder}: config.json has another image_layout than the tokenizer's names give")
    if decoder.config.bos_token_id != (bos := processor.tokenizer.convert_tokens_to_ids(processor.bos_token)):
        raise ValueError(
            f"{folder}: bos_token_id {decoder.config.bos_token_id} in config.json, {bos} in the tokenizer"
        )
    if unknown := set(processor.trained_tasks or ()) - TASKS.keys():
        raise ValueError(f"{folder}: trained_tasks {sorted(unknown)}: accepted are {', '.join(TASKS)}")
    num_codes, num_sizes = len(processor.uni_rep.code_ids), len(processor.uni_rep.size_ids)
    found.append(f"{num_codes} image codes, {num_sizes} sizes found by name")

    with _explained(f"{folder}: its VQ model does not load"):
        _check_num_codes(processor)
    picture = Image.linear_gradient("L").resize((2 * processor.size_unit_px,) * 2)
    codes = processor.encode_image(picture, target_px=picture.width)
    again = processor.uni_rep.decode(processor.uni_rep.encode(codes))
    drawn = processor.decode_image(again)
    is_blank = len({*codes.flatten().tolist()}) == 1 or all(low == high for low, high in drawn.getextrema())
    if not torch.equal(again, codes) or drawn.size != picture.size or is_blank:
        raise ValueError(f"{folder}: a picture does not survive the VQ model and the layout of its codes")
    found.append(f"a picture of {picture.width}x{picture.height} px became {len(codes)}x{len(codes)} codes, and back")

    with _explained(f"{folder}: its generation_config.json does not load"):
        GenerationConfig.from_pretrained(folder)
    found.append(f"trained for {', '.join(processor.trained_tasks or ['(not stated)'])}")
    return found


# What a source is


def _part_of(out: Path) -> Path:
    """The folder to work in; ValueError where `out` is taken or can never be made."""
    if os.path.lexists(out):
        raise ValueError(f"{out} exists: remove it, or name another folder")
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"{out}: {place} is not a folder that can be written to")
    return out.with_name(f"{out.name}.part")


def _published(source: str | os.PathLike, name: str | None) -> Published:
    """The one that is named, else the one whose repo `source` is or whose name the folder has."""
    called = name or (_called(source) if Path(source).is_dir() else str(source))
    known = {key.casefold(): p for p in PUBLISHED for key in (p.name, p.repo)}
    if name and name.casefold() not in known:
        raise ValueError(f"name {name!r}: accepted are {', '.join(p.name for p in PUBLISHED)}")
    return known.get(called.casefold(), UNPUBLISHED)


def _called(source: str | os.PathLike) -> str:
    return Path(source).resolve().name


def _fetch(source: str | os.PathLike, pattern: str) -> Path:
    """The folder; or of a repo a copy, which holds the files that fit the pattern."""
    if Path(source).is_dir():
        return Path(source)
    repo_id = str(source)
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id or Path(source).exists():
            raise HFValidationError("without a namespace, or a file")
        return Path(snapshot_download(repo_id, allow_patterns=[pattern]))
    except HFValidationError as error:
        raise ValueError(f"source {repo_id!r}: neither a folder nor a repo NAMESPACE/NAME") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"source {repo_id!r}: no such folder, and no repo that you may read on the Hub") from error


def _load_tokenizer(place: Path) -> PreTrainedTokenizerFast:
    """As it lies in a folder, or in Chameleon's own `text_tokenizer.json`."""
    files = [place] if place.is_file() else [place / "tokenizer.json", place / "text_tokenizer.json"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"{place}: no tokenizer.json and no text_tokenizer.json; --tokenizer (`tokenizer`) names one")
    for other in ("tokenizer_config.json", "special_tokens_map.json"):
        if (file.parent / other).is_file():
            _read_json(file.parent / other)
    with _explained(f"{file}: not a tokenizer"):
        vocab = Tokenizer.from_file(str(file)).get_vocab()
        if file.name == "tokenizer.json":
            tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent)
        else:
            names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **names)
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    wrong = [f"{name} {token!r}" for name, token in special.items() if token is not None and token not in vocab]
    if wrong or not (special["bos_token"] or special["eos_token"]):
        raise ValueError(f"{file}: not in the vocabulary: {', '.join(wrong) or 'bos_token and eos_token'}")
    return tokenizer


def _family(tokenizer: PreTrainedTokenizerFast) -> Family:
    """By the names of the image codes."""
    vocab = tokenizer.get_vocab()
    if "<MOVQGAN0>" in vocab:
        return LUMINA_2
    return PURE if "IMGIMGIBJCZ" in vocab else LUMINA  # code 8192


def _decoder_values(file: Path, stated: dict[str, Any], tensors: dict[str, Header]) -> dict[str, Any]:
    """The tensors' own numbers, and of the source's configuration what these leave open."""
    given = {name: value for name, value in LuminaMGPTConfig.translated(stated).items() if value is not None}
    found = _shape_values(tensors)
    wrong = [f"{name} {given[name]} (the tensors say {n})" for name, n in found.items() if given.get(name, n) != n]
    if wrong:
        raise ValueError(f"{file}: {', '.join(wrong)}")
    layers = {match[1] for name in tensors if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    # As many layers as it states, if it does: so the tensors of a lost one are named
    return {"num_hidden_layers": len(layers), **given, **found}


def _settle(config: LuminaMGPTConfig, processor: LuminaMGPTProcessor, family: Family) -> None:
    """Adds what tokenizer and family tell."""
    uni_rep, tokenizer, side_px = processor.uni_rep, processor.tokenizer, processor.target_px
    config.bos_token_id = tokenizer.convert_tokens_to_ids(processor.bos_token)
    config.pad_token_id = tokenizer.pad_token_id
    ids = [config.bos_token_id, config.pad_token_id or 0, uni_rep.end_of_turn_id, uni_rep.start_id, *uni_rep.size_ids]
    if (last := max(*ids, int(uni_rep.code_ids.max()))) >= config.vocab_size:
        raise ValueError(f"an embedding of {config.vocab_size} rows for a tokenizer with ids to {last}")
    if (config.rope_parameters or {}).get("rope_type") == "default":  # others measure distances by the context
        trained = [TASKS[name] for name in processor.trained_tasks or []]
        num_pictures = 1 + any("image" in task.answer and task.follows_image for task in trained)
        needed = num_pictures * uni_rep.num_tokens(*uni_rep.grid(side_px, side_px)) + TEXT_ROOM
        config.max_position_embeddings = max(family.context, needed, config.max_position_embeddings)
    config.eos_token_id = uni_rep.end_id if family is LUMINA_2 else uni_rep.end_of_turn_id
    config.image_layout, config.image_token_id = uni_rep.layout_dict(), processor.image_token_id
    config.default_height_px = config.default_width_px = side_px


def _shape_values(tensors: dict[str, Header]) -> dict[str, int]:
    """The decoder's dimensions."""
    layer = "model.layers.0."
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.q_norm", "mlp.gate_proj")
    wanted = ["model.embed_tokens.weight", *(f"{layer}{name}.weight" for name in names)]
    faults = [f"missing {name}" for name in wanted if name not in tensors]
    shapes = {name: tensors[name].shape for name in wanted if name in tensors}
    faults += [f"{name} has shape {list(shape)}" for name, shape in shapes.items() if len(shape) != 2 or 0 in shape]
    if faults:
        raise ValueError(f"not a decoder of a known layout: {', '.join(faults)}")
    (vocab_size, hidden_size), (q_rows, _), (k_rows, _), (_, head_dim), (mlp_rows, _) = shapes.values()
    if q_rows != hidden_size or k_rows % head_dim or q_rows % k_rows:
        sides = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"not a decoder of a known layout, by its shapes: {sides}")
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": mlp_rows,
        "num_attention_heads": q_rows // head_dim,
        "num_key_value_heads": k_rows // head_dim,
    }


def _decoder(file: Path, values: dict[str, Any]) -> LuminaMGPTForConditionalGeneration:
    """The decoder that a configuration describes, without memory."""
    with _explained(f"{file}: describes no decoder"), torch.device("meta"):
        config = LuminaMGPTConfig.from_dict(values)
        if config.num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers {config.num_hidden_layers}")
        return LuminaMGPTForConditionalGeneration(config)


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
    weight_map = _read_json(first).get("weight_map")
    if not isinstance(weight_map, dict) or not all(Path(str(name)).name == name for name in weight_map.values()):
        raise ValueError(f"{first}: its weight_map is no table of tensors and the files beside it")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ValueError(f"{first} names files that are missing: {', '.join(missing) or 'none at all'}")
    return [folder / name for name in names]


@contextmanager
def _opened(file: Path) -> Iterator[tuple[dict[str, Header], Callable[[str], Tensor]]]:
    """The headers of a file's tensors, and what reads one of them; the decoder's only."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as tensors:
                names = [name for name in tensors.keys() if not name.startswith("model.vqmodel.")]  # noqa: SIM118
                yield {name: _header(tensors.get_slice(name)) for name in names}, tensors.get_tensor
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged: {error}") from error
    else:
        state = load_pickle(file)
        names = [name for name in state if not name.startswith("model.vqmodel.")]
        yield {name: Header(state[name].shape, state[name].dtype) for name in names}, state.__getitem__


def _header(part) -> Header:
    """Of a tensor in a safetensors file."""
    return Header(torch.Size(part.get_shape()), SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()))


def load_pickle(file: Path) -> dict[str, Tensor]:
    """Tensors of a `.bin`, `.ckpt` or `.pt` file, mapped from disk where it allows; nothing in it is executed.

    They may be nested in `state_dict` or `model`, as in the published VQ files.
    """
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    with _explained(f"{file}: not a file of tensors, or damaged"):
        try:
            state = torch.load(file, mmap=True, **options)
        except RuntimeError:  # a file in the format from before PyTorch 1.6
            state = torch.load(file, **options)
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file}: holds other things than tensors")
    return state


def _headers(folder: Path) -> dict[Path, dict[str, Header]]:
    """What is in each of a folder's weight files."""
    headers = {}
    for file in _weight_files(folder):
        with _opened(file) as (tensors, _):
            headers[file] = tensors
    return headers


def _plan(
    headers: dict[Path, dict[str, Header]], decoder: LuminaMGPTForConditionalGeneration
) -> list[tuple[Path, list[str]]]:
    """Shards to write, each from one file; ValueError unless the files hold exactly this decoder."""
    wanted = decoder.state_dict()
    given: dict[str, Header] = {}
    places: dict[str, str] = {}
    plan: list[tuple[Path, list[str]]] = []
    faults: list[str] = []
    for file, tensors in headers.items():
        faults += [f"{name} is in {file.name} and in another file" for name in tensors.keys() & given.keys()]
        size = MAX_SHARD_BYTES + 1
        for name, header in tensors.items():
            given[name] = _expanded(name, header, wanted.get(name))
            places[name] = f"{name} in {file.name}"
            num_bytes = 4 * header.shape.numel()
            if size + num_bytes > MAX_SHARD_BYTES:
                plan.append((file, []))
                size = 0
            plan[-1][1].append(name)
            size += num_bytes
    faults += weight_faults(given, wanted, places.__getitem__)
    if faults:
        raise ValueError("not the weights of this decoder: " + "; ".join(faults))
    return plan


def _expanded(name: str, header: Header, wanted: Tensor | None) -> Header:
    """A norm of queries or keys as it will be, with a row for each head in place of one for each shard."""
    if wanted is None or len(header.shape) != 2 or not re.search(r"\.[qk]_norm\.(weight|bias)$", name):
        return header
    num_shards, head_dim = header.shape
    divides = num_shards > 0 and wanted.shape[0] % num_shards == 0
    return header._replace(shape=torch.Size([wanted.shape[0], head_dim])) if divides else header


def _open_part(part: Path, record: dict[str, Any]) -> None:
    """Makes the folder of an unfinished conversion; or, if it is of this one, keeps its shards and nothing else."""
    file, num_shards = part / SOURCE_RECORD, len(record["shards"])
    if os.path.lexists(part) and not part.is_dir():
        raise ValueError(f"{part} is in the way: remove it, or name another folder to make")
    part.mkdir(parents=True, exist_ok=True)
    if not any(path.name != SOURCE_RECORD for path in part.iterdir()):  # the record itself may have been cut short
        file.write_text(json.dumps(record))
    elif not file.is_file():
        raise ValueError(f"{part} is in the way, and was not made by a conversion: name another folder to make")
    elif _read_json(file) != record:
        raise ValueError(f"{part} holds another conversion that was interrupted: remove it to start this one")
    kept = {SOURCE_RECORD, *(_shard_name(number, num_shards) for number in range(1, num_shards + 1))}
    for path in part.iterdir():  # the rest may be cut short, or have a temporary name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in kept:
            path.unlink()
    (part / "config.json").write_text(UNFINISHED)


@contextmanager
def _writing(part: Path) -> Iterator[None]:
    """Says where it was that writing failed, and makes sure that nothing which loads is left there."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # each library has its own for a full disk
        if part.is_dir():
            (part / "config.json").write_text("")  # for which there is always room
        raise OSError(f"{part}: writing failed, a rerun goes on from there: {_in_one_line(error)}") from error


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


def _load_vq(file: Path, family: Family | None = None) -> VQModel:
    if not file.is_file():
        name, place = family.vq_file if family else ("", "")
        advice = f"; {family.title} needs {name} (from {place}): --vq (`vq`) names it" if family else ""
        raise ValueError(f"{file}: no such file{advice}")
    with _explained(str(file)):
        return convert_vq_state_dict(load_pickle(file))


def _check_num_codes(processor: LuminaMGPTProcessor) -> None:
    num_codes, num_names = processor.vqvae.config.num_vq_embeddings, len(processor.uni_rep.code_ids)
    if num_codes != num_names:
        raise ValueError(f"a VQ model of {num_codes} codes; the tokenizer has names for {num_names}")


def _save_code(part: Path) -> None:
    from modeling_lumina_mgpt.pipelines.pipeline_lumina_mgpt import save_pipeline_files

    save_pipeline_files(part)
    custom_object_save(LuminaMGPTForConditionalGeneration, part)


def _check_index(file: Path) -> None:
    """ValueError unless diffusers finds the pipeline and its parts by this file."""
    from modeling_lumina_mgpt.pipelines.pipeline_lumina_mgpt import MODEL_INDEX

    given = _read_json(file)
    wrong = [name for name, entry in MODEL_INDEX.items() if name[:2] != "_d" and given.get(name) != entry]
    if wrong:
        raise ValueError(f"{file}: {', '.join(wrong)}: accepted are the entries that `lumina-mgpt convert` writes")


def _small_files() -> list[str]:
    """What every folder holds beside its weights and its configuration."""
    from modeling_lumina_mgpt.pipelines.pipeline_lumina_mgpt import PIPELINE_FILES

    entries = [inspect.getfile(entry) for entry in (LuminaMGPTForConditionalGeneration, LuminaMGPTProcessor)]
    code = {Path(file).name for entry in entries for file in (entry, *get_relative_import_files(entry))}
    values = ("model_index", "generation_config", "processor_config", "tokenizer", "tokenizer_config", "vqvae/config")
    return [*sorted(code), *PIPELINE_FILES, *(f"{name}.json" for name in values)]


def _card(source: str | os.PathLike, family: Family, published: Published) -> str:
    from modeling_lumina_mgpt.model_cards import converted_card

    is_local = Path(source).is_dir()
    repo = published.repo or ("" if is_local else str(source))
    licence = family.licence if published.repo else {"license": "unknown"}
    return converted_card(
        name=published.name or _called(source),
        source=_called(source) if is_local else str(source),
        family=family.title,
        licence=licence | ({"base_model": repo} if repo else {}),
        tasks=published.tasks,
        published=published.repo,
    )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """One sentence in place of the many kinds of errors that libraries raise for a bad file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {_in_one_line(error)}") from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).splitlines()[:2]) or type(error).__name__


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not a table of names and values")
    return content
