"""The diffusers-style pipeline: prompts, pictures and tasks in; pictures and text out.

What differs from stock: the transformer and the processor live at the root of a repo, where transformers finds them,
so that its weights serve both libraries; two tiny files in `transformer/` and `processor/` tell diffusers. A repo
carries this file beside the model's, so it imports no sibling: the processor knows the tasks and the layout.
"""

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import count
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from diffusers import DiffusionPipeline, VQModel
from diffusers import __version__ as diffusers_version
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.utils import BaseOutput
from huggingface_hub import create_repo, snapshot_download
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import LongTensor, Tensor
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

if TYPE_CHECKING:  # never imported: the loaders fetch just the files that a pipeline names like this
    from .configuration_lumina_mgpt import *  # type: ignore # noqa: F403
    from .decoding_lumina_mgpt import *  # type: ignore # noqa: F403
    from .generation_lumina_mgpt import *  # type: ignore # noqa: F403
    from .image_processing_lumina_mgpt import *  # type: ignore # noqa: F403
    from .modeling_lumina_mgpt import *  # type: ignore # noqa: F403
    from .processing_lumina_mgpt import *  # type: ignore # noqa: F403
    from .processor.root_processor import *  # noqa: F403
    from .text_to_image_lumina_mgpt import *  # noqa: F403
    from .transformer.root_transformer import *  # noqa: F403
    from .uni_rep import *  # type: ignore # noqa: F403

PIPELINE_FILES = (
    "pipeline_lumina_mgpt.py",
    "text_to_image_lumina_mgpt.py",
    "transformer/root_transformer.py",
    "processor/root_processor.py",
)
MODEL_INDEX = {
    "_class_name": ["pipeline_lumina_mgpt", "LuminaMGPTPipeline"],
    "_diffusers_version": diffusers_version,
    "processor": ["root_processor", "RootProcessor"],
    "transformer": ["root_transformer", "RootTransformer"],
    "vqvae": ["diffusers", "VQModel"],
}
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")
LORA_PREFIX = "base_model.model."  # of all names in peft's files
LORA_VALUES = {  # of peft's LoraConfig; others change the model's own weights, or need more than layers
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
}
LORA_CARD = """---
library_name: peft
{base_model}pipeline_tag: text-to-image
tags: [lora]
---
# {name}

A LoRA of `{base}`, of rank {rank}, beside its {targets}.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}", trust_remote_code=True)
pipe.load_lora_weights("{name}")  # this folder or repo
pipe("what it was trained to draw").images[0].save("picture.png")
```
"""
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
USUAL_PROMPT_TOKENS = 128
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
OWN_ARGUMENTS = {  # of the model's `generate`, and what a user wants instead
    "num_return_sequences": "accepted is num_images_per_prompt, and a chat has one answer",
    "return_dict_in_generate": "accepted is output_type",
    "streamer": "accepted is callback_on_step_end",
    "input_ids": "accepted is a prompt",
    "attention_mask": "accepted is a prompt",
}
SAMPLING = (
    "guidance_scale",
    "top_k",
    "image_top_k",
    "text_top_k",
    "temperature",
    "image_temperature",
    "text_temperature",
)


@dataclass
class LuminaMGPTPipelineOutput(BaseOutput):
    """What the model drew and said.

    Attributes:
        images: one a row, None where a row drew none; of a chat, the answer's. As the call's `output_type` has it.
        text: one a row, empty where the model said nothing.
        panels: of tasks with two panels, what the other one shows, in the form and order of `images`.
        boxes: of task "detection", the box (left, top, right, bottom) found in each image, in its pixels; or None.
        scores: the verifier's, one a row; `-inf` for one without a picture.
        prompts: one a row, as the prompt enhancer made them.
        messages: of a chat, the conversation with the answer at its end, as `processor.answer_message` has it.
        window: tokens that each step of decoding looked at, as "auto" has chosen it; 1 without drafts.
    """

    images: list[Any] | np.ndarray | Tensor
    text: list[str]
    panels: list[Any] | np.ndarray | Tensor | None = None
    boxes: list[tuple[int, int, int, int] | None] | None = None
    scores: list[float] | None = None
    prompts: list[str] | None = None
    messages: list[dict[str, Any]] | None = None
    window: int | None = None


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that drawing takes.

    Attributes:
        weights: of all components as they are loaded: in their dtypes, quantized, with adapters.
        cache: keys and values of all rows.
        vq_decode: what turning codes into pixels needs at its peak, beside weights.
    """

    weights: int
    cache: int
    vq_decode: int

    @property
    def total(self) -> int:
        """All at once, as in a stream that draws on while it decodes."""
        return self.weights + self.cache + self.vq_decode

    def __str__(self) -> str:
        parts = {"weights": self.weights, "cache": self.cache, "VQ decode": self.vq_decode, "total": self.total}
        return ", ".join(f"{name} {_bytes_text(num_bytes)}" for name, num_bytes in parts.items())


class VerifierError(RuntimeError):
    """A verifier failed. `output` is a `LuminaMGPTPipelineOutput` with every picture that had been drawn."""

    def __init__(self, message: str, output: LuminaMGPTPipelineOutput):
        super().__init__(message)
        self.output = output


@dataclass
class Request:
    """One prompt of a call and what was given for it, None where nothing was.

    Attributes:
        height, width: pixels; once the image is encoded, those of the picture to draw, all panels of it.
        sampling: those of `SAMPLING` that were given.
        words: what the model is told, if not the prompt.
        codes: of the image, or of the rows that the picture to draw begins with. int64 (rows, cols)
    """

    prompt: str | None
    negative_prompt: str | None
    condition: str | None
    image: Any
    height: Any
    width: Any
    sampling: dict[str, Any]
    words: str | None = None
    codes: Any = None


@dataclass
class Row:
    """One answer. Codes are int64 (rows, cols), pictures PIL images; what was not drawn is None."""

    request: Request
    text: str
    codes: Any = None
    panel_codes: Any = None
    picture: Any = None
    panel: Any = None
    box: tuple[int, int, int, int] | None = None
    score: float = math.nan


@dataclass
class Call:
    """What was asked for, checked.

    Attributes:
        given: one request for each prompt.
        requests: those that the model answers; `owners[i]` is the number of the prompt that `requests[i]` is for.
        tilings: of the pictures to restore, whose squares are the requests.
        copies: rows to draw of each request, of which `num_kept` are returned.
        batch_size: rows to draw at a time, all by default.
    """

    task: str
    given: list[Request]
    requests: list[Request]
    owners: list[int]
    tilings: list[Any]
    copies: int
    num_kept: int
    batch_size: int | None
    generator: Any
    output_type: str
    color_fix: str | None
    verifier: Callable | None
    callback: Callable | None
    tensor_inputs: list[str]
    generate_kwargs: dict[str, Any]
    window: int | None = None  # that decoding has used


class LuminaMGPTPipeline(DiffusionPipeline):
    """Text-to-image, editing, control, dense prediction, restoration, questions and chat.

    Args:
        transformer: a `LuminaMGPTForConditionalGeneration`.
        vqvae: the VQ model between pixels in [-1, 1] and codes.
        processor: a `LuminaMGPTProcessor`; it is given `vqvae`.
    """

    model_cpu_offload_seq = "transformer->vqvae"
    _callback_tensor_inputs = ["generated_ids"]  # noqa: RUF012

    def __init__(self, transformer: PreTrainedModel, vqvae: VQModel, processor: ProcessorMixin):
        super().__init__()
        if not hasattr(processor, "uni_rep"):
            raise ValueError(f"processor {processor!r}: accepted is a LuminaMGPTProcessor")
        processor.vqvae = vqvae
        self.register_modules(transformer=transformer, vqvae=vqvae, processor=processor)
        self._interrupt = False
        self._lora_scale = 1.0

    @property
    def interrupt(self) -> bool:
        """Whether to stop at the next token: set `_interrupt` in a callback. The rows drawn so far are returned."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        task: str | None = None,
        height: int | list[int | None] | None = None,
        width: int | list[int | None] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = _callback_tensor_inputs,
        condition: str | list[str] | None = None,
        color_fix: str | None = "wavelet",
        tile_batch_size: int = 1,
        best_of: int | None = None,
        verifier: Callable[[str, list[Image.Image]], Any] | None = None,
        prompt_enhancer: Callable[[str], str] | None = None,
        allow_untrained: bool = False,
        **generate_kwargs,
    ) -> LuminaMGPTPipelineOutput | tuple:
        """Answers prompts with pictures or text. What is not given is as the checkpoint's `generation_config` has it.

        Args:
            prompt: what to draw, change or answer; not for tasks that need no words.
            image: one picture (PIL, path, URL, bytes, array, or codes `LongTensor (rows, cols)`), or a list with one
                for each prompt.
            task: a key of `processor.tasks`. Defaults to "edit" with an image and "text-to-image" without.
            height, width: pixels, for all or one per prompt. Default: the model's own for text-to-image, the input's
                bucket for tasks that turn a picture into a picture.
            negative_prompt: context of guidance's unconditional branch, for all or one per prompt; "" is none.
            num_images_per_prompt: rows of each prompt; they follow each other in the output.
            guidance_scale: for all or one per prompt; 1 is without guidance.
            generator: one for all, or one per row drawn.
            output_type: "pil", "np" (float32 (height, width, 3) in [0, 1]), "pt" (float32 (3, height, width) in
                [0, 1]) or "latent" (codes, int64 (rows, cols)). All but "pil" are stacked if they are of one size.
                "np" and "pt" hold numbers for tasks "depth" ((height, width) in [0, 1]), "normal" (unit vectors in
                place of colors) and "segmentation" (uint8 (height, width)): see `image_processor.to_array`.
            callback_on_step_end: called as `callback(pipe, step, timestep, callback_kwargs)` after each step of
                decoding; both numbers count steps. Tokens are final: what it returns is ignored.
            callback_on_step_end_tensor_inputs: of "generated_ids": `LongTensor (batch, longest)`, whose rows, padded
                on the right, `processor.decode_ids` shows as far as they are drawn.
            condition: for all or one per prompt; of two panels, what the other one shows: "depth", "canny", "hed",
                "pose", or in words, such as a subject to draw again. `height` and `width` are those of one panel.
                For "canny" a photo will do: its edges are found first.
            color_fix: "wavelet", "adain" or None: how a restored picture gets the colors of `image`. One larger than
                the model's square is restored in overlapping squares; a smaller one comes back that large.
            tile_batch_size: squares of a large picture that are restored at a time; more take less time, and of a 7B
                PURE in bfloat16 about 9 GB each, 13 where steps are compiled.
            best_of: rows to draw of each prompt, of which the `num_images_per_prompt` best are returned.
            verifier: called as `verifier(prompt, images)` with the rows of a prompt as PIL images; gives a score for
                each, more is better. The best come first. `pipelines.verifiers` has two.
            prompt_enhancer: called as `prompt_enhancer(prompt)`; the model draws what it gives, the verifier sees the
                prompt as it was.
            allow_untrained: try a task that this checkpoint was not trained for.
            generate_kwargs: further arguments of the model's `generate`: `image_top_k`, `text_top_k`,
                `image_temperature`, `text_temperature`, `top_k_schedule`, `decoding`, `window`, `draft`,
                `guidance_end`, `compile_config`, `max_new_tokens`, ...; where they say nothing, the checkpoint's
                `generation_config`, and of answers to pictures its `image_to_image`.

        Returns:
            `LuminaMGPTPipelineOutput`, or with `return_dict=False` the tuple `(images, text)`.

        Raises:
            ValueError: for an unknown or untrained task, a missing or superfluous prompt or image, an impossible size,
                or a list of another length than the prompts'.
            MemoryError: if the rows will not fit into the device's memory; it says what would. Nothing has begun then.
            VerifierError: if the verifier raises, or gives other than a finite number for each image; `.output` holds
                the images.
        """
        # 1. One request per prompt
        call = self._prepare(
            prompt=prompt,
            image=image,
            task=task,
            height=height,
            width=width,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            condition=condition,
            color_fix=color_fix,
            tile_batch_size=tile_batch_size,
            best_of=best_of,
            verifier=verifier,
            prompt_enhancer=prompt_enhancer,
            allow_untrained=allow_untrained,
            **generate_kwargs,
        )

        # 2. Their answers, in the order of the prompts
        answers = dict(self._answers(call))

        # 3. Pictures, and the best of them
        output = self._finish(call, sorted(answers), [row for owner in sorted(answers) for row in answers[owner]])
        self.maybe_free_model_hooks()
        return output if return_dict else (output.images, output.text)

    @torch.no_grad()
    def chat(
        self,
        messages: list[dict[str, Any]],
        output_type: str = "pil",
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = _callback_tensor_inputs,
        upper_rows: Tensor | None = None,
        **generate_kwargs,
    ) -> LuminaMGPTPipelineOutput:
        """The next answer of a conversation, in text and pictures as the model likes.

        Args:
            messages: as in transformers: `{"role": "user" | "assistant", "content": ...}`, where content is a string
                or a list of `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`; or as
                `processor.task_message` has it for a task.
            upper_rows: codes (rows, cols) that the answer's picture, of `height` and `width`, begins with.
            generate_kwargs: as in a call, and once there is a picture in the talk, `image_to_image` holds for all that
                follows; `height` and `width` have the answer begin with a picture of that size, and `max_new_tokens`
                ends it early.

        Returns:
            `.images` of the answer, `.text` (one string in a list), and `.messages` to continue with, in which
            pictures have become codes and the answer keeps its tokens.
        """
        self._check_options(output_type, callback_on_step_end_tensor_inputs, generate_kwargs)
        messages = self.processor.encode_messages(messages)
        begun: dict[str, Any] = {}
        if upper_rows is not None:
            begun = {"upper_rows": upper_rows, **{name: generate_kwargs.get(name) for name in ("height", "width")}}
        inputs = self.processor.apply_chat_template(messages, tokenize=True, return_dict=True, **begun)
        inputs = inputs.to(self._execution_device)
        generate_kwargs["num_return_sequences"] = 1
        parts = [part for message in messages for part in message["content"] if not isinstance(part, str)]
        if any(part["type"] == "image" for part in parts):
            generate_kwargs = {**self.sampling_after_images(generate_kwargs), **generate_kwargs}
        watch = callback_on_step_end, callback_on_step_end_tensor_inputs
        ((_, row, window),) = self._generate(inputs, 1, 1, *watch, **generate_kwargs)
        if upper_rows is not None:
            row = torch.cat([self._begun(upper_rows, generate_kwargs["height"], generate_kwargs["width"]), row])
        answer = self.processor.answer_message(row)
        codes = [item["image"] for item in answer["content"] if item["type"] == "image"]
        text = "".join(item["text"] for item in answer["content"] if item["type"] == "text").strip()
        images = self._as_output(codes if output_type == "latent" else self._decode(codes), output_type)
        self.maybe_free_model_hooks()
        return LuminaMGPTPipelineOutput(images=images, text=[text], messages=[*messages, answer], window=window)

    def stream(
        self, prompts: str | list[str], batch_size: int = 8, num_images_per_prompt: int = 1, **kwargs
    ) -> Iterator[tuple[int, LuminaMGPTPipelineOutput]]:
        """Yields `(index, output)` for each prompt as soon as it is drawn, while others still are.

        Args:
            batch_size: rows to draw at a time; where one has ended the next begins. What a prompt gives depends on
                neither its place nor its neighbors.
            kwargs: further arguments of a call, with lists for all prompts.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, list | tuple) or not prompts:
            raise ValueError(f"prompts {prompts!r}: accepted is a string or a list of strings")
        _checked_count("batch_size", batch_size)
        options = {"num_images_per_prompt": num_images_per_prompt, "batch_size": batch_size, **kwargs}
        call = self._prepare(prompt=list(prompts), **options)

        def outputs() -> Iterator[tuple[int, LuminaMGPTPipelineOutput]]:
            for owner, rows in self._answers(call):
                yield owner, self._finish(call, [owner], rows)
            self.maybe_free_model_hooks()

        return outputs()

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """As in stock, but without an accelerator, where there is nothing to offload from, it does nothing."""
        if device is not None or torch.accelerator.is_available():
            super().enable_model_cpu_offload(gpu_id, device)

    # Memory

    def estimate_memory(
        self,
        height: int,
        width: int,
        batch: int = 1,
        guidance_scale: float | None = None,
        prompt_tokens: int = USUAL_PROMPT_TOKENS,
    ) -> MemoryEstimate:
        """What drawing `batch` pictures at a time takes, in bytes; `print` shows it in GB.

        A call needs it on its device: one that will not fit raises MemoryError before it begins. What a forward needs
        while it runs is not counted; it is little beside `vq_decode`, which `processor.vq_tile_px` bounds.

        Args:
            height, width: pixels of each picture, with all its panels.
            guidance_scale: by default the checkpoint's; all but 1 double the cache.
            prompt_tokens: of the longest prompt, pictures in it included.

        Raises:
            ValueError: for an impossible size, and counts that are not whole numbers from 1 on.
        """
        rows, cols = self.processor.uni_rep.grid(height, width)
        _checked_count("batch", batch)
        if guidance_scale is not None:
            _check_weight("guidance_scale", guidance_scale)
        num_tokens = _checked_count("prompt_tokens", prompt_tokens) + self.processor.uni_rep.num_tokens(rows, cols)
        return MemoryEstimate(
            weights=sum(_weight_bytes(part) for part in self._modules_here()),
            cache=self._cache_bytes(batch, num_tokens, [guidance_scale]),
            vq_decode=self.processor.decode_bytes(rows, cols, batch),
        )

    def sampling_after_images(self, given: Iterable[str] = ()) -> dict[str, Any]:
        """How answers to pictures are sampled, where that differs: `image_to_image` of the `generation_config`.

        Such an answer is often sure, where one to words alone has much to choose from.

        Args:
            given: names of a call's own sampling; a `top_k` or `temperature` stands for that of images as well.
        """
        own = getattr(self.transformer.generation_config, "image_to_image", None) or {}
        return {name: value for name, value in own.items() if name.removeprefix("image_") not in {*given} - {name}}

    def _modules_here(self) -> list[torch.nn.Module]:
        return [part for part in self.components.values() if isinstance(part, torch.nn.Module)]

    def _cache_bytes(
        self, num_rows: int, num_tokens: int, guidance_scales: list[float | None], may_compile: bool = True
    ) -> int:
        default = getattr(self.transformer.generation_config, "guidance_scale", None)
        is_guided = any((default if scale is None else scale) != 1 for scale in guidance_scales)
        return self.transformer.cache_bytes(num_rows * (1 + is_guided), num_tokens, may_compile)

    def _check_memory(self, call: Call, num_rows: int, prompt_length: int, generate_kwargs: dict[str, Any]) -> None:
        """MemoryError, with what would fit, if the answers to a call, so many at a time, will not."""
        device, num_panels = self._execution_device, self.processor.tasks[call.task].num_panels
        free = free_bytes(device)
        limit, device_map = generate_kwargs.get("max_new_tokens"), getattr(self.transformer, "hf_device_map", {})
        if free is None or not isinstance(limit, Integral | None) or len({*device_map.values()}) > 1:
            return  # of a model on several devices each holds a part; a wrong limit is for `generate` to refuse
        absent = {x: _weight_bytes(x) for x in self._modules_here() if x.device.type not in (device.type, "meta")}
        decoder = absent.pop(self.transformer, 0)
        scales = generate_kwargs.get("guidance_scale", [None])
        processed = any(generate_kwargs.get(name) is not None for name in ("logits_processor", "suppress_tokens"))
        may_compile = not (processed or generate_kwargs.get("disable_compile"))

        def needed(num_rows: int, height: int | None, width: int | None) -> int:
            num_tokens = self._num_steps(prompt_length, **{**generate_kwargs, "height": height, "width": width})
            num_tokens = min(num_tokens, int(limit or num_tokens))
            decoding = 0
            if height is not None and width is not None:
                decoding = self.processor.decode_bytes(*self.processor.uni_rep.grid(height, width), num_rows)
            cache = self._cache_bytes(num_rows, prompt_length + num_tokens, scales, may_compile)
            is_offloaded = bool(getattr(self, "_all_hooks", None))  # the decoder leaves before pictures are decoded
            return cache + sum(absent.values()) + (max(decoder, decoding) if is_offloaded else decoder + decoding)

        sizes = [(request.height, request.width) for request in call.requests]
        height, width = max(sizes, key=lambda size: (size[0] or 0) * (size[1] or 0))
        wanted = needed(num_rows, height, width)
        if wanted > free and self.transformer.free_cache():
            free = free_bytes(device) or free
        if wanted <= free:
            return
        fits, what = "not even one fits", "answers"
        if height is not None and width is not None:
            what = f"pictures of {width}x{height // num_panels} px"
            less = _smaller_sizes(height // num_panels, width, self.processor.uni_rep.size_unit_px)
            smaller = [(h, w) for h, w in less if needed(1, h * num_panels, w) <= free]
            fits = f"one of {smaller[0][1]}x{smaller[0][0]} px fits" if smaller else "not even the smallest fits"
        if few := [n for n in range(1, num_rows) if needed(n, height, width) <= free]:
            fits = f"{few[-1]} at a time fit"
        raise MemoryError(
            f"{what}, {num_rows} at a time, need {_bytes_text(wanted)}, and {_bytes_text(free)} are free on {device}:"
            f" {fits}"
        )

    # The steps of a call

    @torch.no_grad()
    def _prepare(
        self,
        prompt: Any,
        image: Any = None,
        task: str | None = None,
        height: Any = None,
        width: Any = None,
        negative_prompt: Any = None,
        num_images_per_prompt: int = 1,
        guidance_scale: Any = None,
        generator: Any = None,
        output_type: str = "pil",
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = _callback_tensor_inputs,
        condition: Any = None,
        color_fix: str | None = "wavelet",
        tile_batch_size: int = 1,
        best_of: int | None = None,
        verifier: Callable | None = None,
        prompt_enhancer: Callable | None = None,
        allow_untrained: bool = False,
        batch_size: int | None = None,
        **generate_kwargs,
    ) -> Call:
        """Checks what was asked for, and encodes its images."""
        task = task if task is not None else default_task(image)
        self.processor.check_task(task, allow_untrained)
        self._check_options(output_type, callback_on_step_end_tensor_inputs, generate_kwargs, task)
        if color_fix is not None:
            self.processor.image_processor.check_color_fix(color_fix)
        _check_callables(callback_on_step_end=callback_on_step_end, verifier=verifier, prompt_enhancer=prompt_enhancer)
        copies = _num_copies(num_images_per_prompt, best_of, verifier)
        given = _requests(
            prompt=prompt,
            negative_prompt=negative_prompt,
            condition=condition,
            image=image,
            height=height,
            width=width,
            sampling={"guidance_scale": guidance_scale}
            | {name: generate_kwargs.pop(name) for name in SAMPLING if name in generate_kwargs},
        )
        _check_generators(generator, len(given) * copies)
        for request in given:
            self._check_image(task, request.image)
            if not isinstance(request.negative_prompt, str | None):
                raise ValueError(f"negative_prompt {request.negative_prompt!r}: accepted is text")
        tilings = self._tilings(given, output_type) if task == "restore" else []
        requests, owners = given, list(range(len(given)))
        if tilings:
            requests, owners, generator = _one_per_square(given, tilings, generator, copies)
            batch_size = _checked_count("tile_batch_size", tile_batch_size) * copies
        self._encode_images(task, requests)
        for request in requests:
            if prompt_enhancer is not None and request.prompt:
                request.words = _enhanced(prompt_enhancer, request.prompt)
        return Call(
            task=task,
            given=given,
            requests=requests,
            owners=owners,
            tilings=tilings,
            copies=copies,
            num_kept=num_images_per_prompt,
            batch_size=batch_size,
            generator=generator,
            output_type=output_type,
            color_fix=color_fix,
            verifier=verifier,
            callback=callback_on_step_end,
            tensor_inputs=callback_on_step_end_tensor_inputs,
            generate_kwargs=generate_kwargs,
        )

    def _check_options(
        self, output_type: str, tensor_inputs: list[str], generate_kwargs: dict[str, Any], task: str = ""
    ) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r}: accepted are {', '.join(OUTPUT_TYPES)}")
        if task == "segmentation" and output_type in ("np", "pt"):
            self.processor.image_processor.check_palette()
        accepted = self._callback_tensor_inputs
        if not isinstance(tensor_inputs, list | tuple) or any(name not in accepted for name in tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs {tensor_inputs!r}: accepted are {accepted}")
        for name, instead in OWN_ARGUMENTS.items():
            if name in generate_kwargs:
                raise ValueError(f"{name} {generate_kwargs[name]!r}: the pipeline sets it; {instead}")
        if not isinstance(generate_kwargs.get("stopping_criteria", []), list):
            raise ValueError(f"stopping_criteria {generate_kwargs['stopping_criteria']!r}: accepted is a list")

    def _check_image(self, task: str, image: Any) -> None:
        needs_image = self.processor.tasks[task].needs_image
        if (image is not None) != needs_image:
            raise ValueError(f"task {task!r} takes {'an' if needs_image else 'no'} image")

    def _encode_images(self, task: str, requests: list[Request]) -> None:
        """Gives each request its image's codes, and the size of the picture to draw unless the model decides."""
        config, uni_rep, asked = self.transformer.config, self.processor.uni_rep, self.processor.tasks[task]
        if asked.follows_image:
            codes = self.processor.encode_images([request.image for request in requests])
            for request, own in zip(requests, codes, strict=True):
                uni_rep.header(*own.shape)  # raises for what cannot be written
                request.codes = own
        for request in requests:
            if asked.answer == "text" and (request.height is not None or request.width is not None):
                raise ValueError(f"task {task!r} takes no height and width: its answer is text")
            if (request.height is None) != (request.width is None):
                raise ValueError(f"height {request.height!r}, width {request.width!r}: give both or none")
            if request.height is not None:
                request.height = _checked_count("height", request.height) * asked.num_panels
                uni_rep.grid(request.height, request.width)  # raises for what cannot be drawn
            elif not asked.follows_image and not (asked.continues and asked.num_panels > 1):
                request.height, request.width = config.default_height_px, config.default_width_px
            if asked.continues:
                request.codes = self._upper_rows(request, asked.num_panels)
            if request.height is None and asked.answer == "image":
                rows, cols = request.codes.shape
                request.height, request.width = rows * asked.num_panels * uni_rep.code_px, cols * uni_rep.code_px

    def _upper_rows(self, request: Request, num_panels: int) -> Tensor:
        """Codes of what a picture begins with: a whole panel, or as many rows as the image has in that width."""
        image, image_processor = request.image, self.processor.image_processor
        if self.processor.is_codes(image):
            return torch.as_tensor(image)
        if request.condition == "canny":
            image = image_processor.canny(image)
        unit_px = self.processor.uni_rep.size_unit_px
        if request.height is None:  # a bucket such that all panels have the area that the model draws
            target_px = int(self.processor.target_px / num_panels**0.5) // unit_px * unit_px
            return self.processor.encode_image(image, max(target_px, unit_px))
        height_px = request.height // num_panels
        if num_panels == 1:  # of a picture that is too high, the top
            image, code_px = image_processor.load(image), self.processor.uni_rep.code_px
            num_rows = round(image.height * request.width / image.width / code_px)
            height_px = min(max(num_rows, 1), height_px // code_px - 1) * code_px
            kept_px = max(1, round(height_px * image.width / request.width))
            image = image.crop((0, 0, image.width, min(image.height, kept_px)))
        return self.processor.encode_images([image], size=(request.width, height_px))[0]

    def _begun(self, upper_rows: Tensor, height: int, width: int) -> Tensor:
        """The ids of a picture of that size as far as its upper rows go."""
        uni_rep = self.processor.uni_rep
        return uni_rep.encode(upper_rows, uni_rep.grid(height, width)[0])

    def _encode_prompts(self, task: str, requests: list[Request], with_upper_rows: bool = True):
        """`input_ids` and `attention_mask`, int64 (prompts, length)."""
        turns = [
            self.processor.task_prompt(task, r.words or r.prompt, r.height, r.width, r.condition) for r in requests
        ]
        chats = [[{"role": "user", "content": turn}] for turn in turns]  # a plain call takes a rendered text verbatim
        options: dict[str, Any] = {}
        if not self.processor.tasks[task].continues:
            options["images"] = [[r.codes] for r in requests if r.codes is not None] or None
        elif with_upper_rows:
            options = {name: [getattr(r, name) for r in requests] for name in ("height", "width")}
            options["upper_rows"] = [r.codes for r in requests]
        inputs = self.processor.apply_chat_template(chats, tokenize=True, return_dict=True, **options)
        return inputs.to(self._execution_device)

    def _encode_negative_prompts(self, task: str, requests: list[Request]) -> dict[str, Tensor]:
        """What `generate` takes as negative prompts; nothing is seen of those that are empty."""
        negatives = [replace(request, words=request.negative_prompt) for request in requests]
        inputs = self._encode_prompts(task, negatives, with_upper_rows=False)
        is_given = torch.tensor([[bool(r.negative_prompt)] for r in requests], device=self._execution_device)
        return {
            "negative_prompt_ids": inputs["input_ids"],
            "negative_prompt_attention_mask": inputs["attention_mask"] * is_given,
        }

    def _answers(self, call: Call) -> Iterator[tuple[int, list[Row]]]:
        """Yields each prompt's number and its rows, pictures as codes, as soon as all of these are drawn."""
        # 1. Prompts to ids
        task, requests, copies, kwargs = call.task, call.requests, call.copies, dict(call.generate_kwargs)
        inputs = self._encode_prompts(task, requests)
        if any(request.negative_prompt for request in requests):
            kwargs |= self._encode_negative_prompts(task, requests)
        sampling = {name: [request.sampling[name] for request in requests] for name in requests[0].sampling}
        if self.processor.tasks[task].follows_image:
            for name, value in self.sampling_after_images(sampling).items():
                own = sampling.get(name, [None] * len(requests))
                sampling[name] = [value if given is None else given for given in own]
        answer, uni_rep = self.processor.tasks[task].answer, self.processor.uni_rep
        if answer == "image":  # such an answer ends with its picture
            kwargs.setdefault("eos_token_id", [uni_rep.end_id, uni_rep.end_of_turn_id])
        elif answer == "text":  # and has nothing to guide
            kwargs.setdefault("suppress_tokens", [uni_rep.start_id])
            sampling["guidance_scale"] = [1.0] * len(requests)

        # 2. Ids to text and codes, as rows end
        sizes = {name: [getattr(request, name) for request in requests] for name in ("height", "width")}
        kwargs |= {"num_return_sequences": copies, "generator": call.generator, **sizes, **sampling}
        at_once = min(call.batch_size or len(requests) * copies, len(requests) * copies)
        self._check_memory(call, at_once, inputs["input_ids"].shape[1], kwargs)
        rows = {i: Row(requests[i // copies], "") for i in range(len(requests) * copies)}  # of what is interrupted
        numbers: dict[int, list[int]] = {owner: [] for owner in call.owners}
        for i in rows:
            numbers[call.owners[i // copies]].append(i)
        waits = {owner: len(own) for owner, own in numbers.items()}
        for number, ids, window in self._generate(
            inputs, len(rows), at_once, call.callback, call.tensor_inputs, **kwargs
        ):
            rows[number] = self._row(task, requests[number // copies], ids)
            call.window = window
            owner = call.owners[number // copies]
            waits[owner] -= 1
            if not waits[owner]:
                yield owner, [rows[i] for i in numbers[owner]]
        for owner, left in waits.items():
            if left:
                yield owner, [rows[i] for i in numbers[owner]]

    def _generate(
        self,
        inputs,
        num_rows: int,
        at_once: int,
        callback: Callable | None,
        tensor_inputs: list[str],
        **kwargs,
    ) -> Iterator[tuple[int, Any, int]]:
        """Yields each row's number, new ids `(length)` on the CPU and the window as soon as it ends."""
        self._interrupt = False
        num_steps = self._num_steps(inputs["input_ids"].shape[1], **kwargs)
        steps = count()
        with self.progress_bar(total=num_steps if at_once == num_rows else num_rows) as bar:

            def watch(new_ids: LongTensor, num_new: Tensor) -> bool:
                if at_once == num_rows:
                    bar.update(int(num_new.max()) - bar.n)
                if callback is not None:
                    step, tensors = next(steps), {"generated_ids": new_ids}
                    callback(self, step, step, {name: tensors[name] for name in tensor_inputs})
                return self.interrupt

            if callback is not None or not bar.disable:  # without either the device is never waited for
                kwargs["callback_on_step_end"] = watch
            for number, output in self.transformer.stream(**inputs, batch_size=at_once, **kwargs):
                if at_once < num_rows:
                    bar.update()
                yield number, output.sequences[0].cpu(), output.window

    def _num_steps(self, prompt_length: int, height=None, width=None, max_new_tokens=None, **kwargs) -> int:
        """At most so many tokens are drawn."""
        sizes = [
            (h, w) for h, w in zip(*(x if isinstance(x, list) else [x] for x in (height, width)), strict=False) if h
        ]
        if sizes and "eos_token_id" in kwargs:
            return max(self.processor.uni_rep.num_tokens(*self.processor.uni_rep.grid(h, w)) for h, w in sizes)
        return max_new_tokens or self.transformer.config.max_position_embeddings - prompt_length

    def _row(self, task: str, request: Request, ids: Tensor) -> Row:
        """What the new ids of a row say."""
        asked = self.processor.tasks[task]
        if asked.continues:
            ids = torch.cat([self._begun(request.codes, request.height, request.width), ids])
        parts = self.processor.split_ids(ids)
        text = "".join(part for part in parts if isinstance(part, str)).strip()
        codes = ([part for part in parts if not isinstance(part, str)] or [None])[-1]
        if asked.num_panels == 1 or codes is None:
            return Row(request, text, codes)
        num_rows = self.processor.uni_rep.grid(request.height, request.width)[0] // asked.num_panels
        upper, lower = (half if len(half) else None for half in (codes[:num_rows], codes[num_rows:]))
        # the panel that is the picture is drawn last if the other one is given
        return Row(request, text, lower, upper) if asked.continues else Row(request, text, upper, lower)

    @torch.no_grad()
    def _finish(self, call: Call, owners: list[int], rows: list[Row]) -> LuminaMGPTPipelineOutput:
        """The pictures of these prompts' rows, the best of them, as output."""
        if call.output_type != "latent" or call.verifier is not None:
            self._decode_rows(call.task, rows)
        if call.tilings:
            rows = self._merge(call, owners, rows)
        if call.verifier is not None:
            rows = self._best(call, call.verifier, rows)
        return self._output(call, rows)

    def _decode_rows(self, task: str, rows: list[Row]) -> None:
        """Gives the rows their pictures, and the boxes found in them."""
        for row, picture in zip(rows, self._decode([row.codes for row in rows]), strict=True):
            row.picture = picture
        for row, panel in zip(rows, self._decode([row.panel_codes for row in rows]), strict=True):
            row.panel = panel
        if task == "detection":
            for row, source in zip(rows, self._decode([row.request.codes for row in rows]), strict=True):
                if row.picture is not None and row.picture.size == source.size:
                    row.box = self.processor.image_processor.find_box(row.picture, source)

    def _decode(self, codes: list[Tensor | None]) -> list[Any]:
        """Codes (rows, cols) to PIL images; None stays None."""
        pictures = iter(self.processor.decode_images([grid for grid in codes if grid is not None]))
        return [None if grid is None else next(pictures) for grid in codes]

    def _best(self, call: Call, verifier: Callable, rows: list[Row]) -> list[Row]:
        """Of the copies of each prompt, those with the best scores, the best first."""
        kept = []
        for first in range(0, len(rows), call.copies):
            own, prompt = rows[first : first + call.copies], rows[first].request.prompt or ""
            seen = [row for row in own if row.picture is not None]
            try:
                scores = [float(score) for score in verifier(prompt, [row.picture for row in seen])] if seen else []
                if len(scores) != len(seen) or not all(map(math.isfinite, scores)):
                    raise ValueError(f"it gave {scores} for {len(seen)} images, not a finite number for each")
            except Exception as error:  # whatever a stranger's callable raises, the pictures must not be lost
                message = f"the verifier failed on {prompt!r}: {type(error).__name__}: {error}"
                raise VerifierError(message, self._output(call, rows)) from error
            for row in own:
                row.score = scores.pop(0) if row.picture is not None else -math.inf
            kept += sorted(own, key=lambda row: -row.score)[: call.num_kept]
        return kept

    def _output(self, call: Call, rows: list[Row]) -> LuminaMGPTPipelineOutput:
        task, output_type, is_latent = call.task, call.output_type, call.output_type == "latent"
        output = LuminaMGPTPipelineOutput(
            images=self._as_output([row.codes if is_latent else row.picture for row in rows], output_type, task),
            text=[row.text for row in rows],
            window=call.window,
        )
        if self.processor.tasks[task].num_panels > 1:
            panels = [row.panel_codes if is_latent else row.panel for row in rows]
            output["panels"] = self._as_output(panels, output_type, task)
        if task == "detection" and not is_latent:
            output["boxes"] = [row.box for row in rows]
        if not math.isnan(rows[0].score):
            output["scores"] = [row.score for row in rows]
        if any(row.request.words for row in rows):
            output["prompts"] = [row.request.words or row.request.prompt for row in rows]
        return output

    def _as_output(self, images: list[Any], output_type: str, task: str = "") -> Any:
        """PIL images, or codes, as `output_type` has them; those of one size are stacked but for "pil"."""
        if output_type == "pil":
            return images
        if output_type in ("np", "pt"):
            to_array = self.processor.image_processor.to_array
            images = [None if x is None else to_array(x, task) for x in images]
        if output_type == "pt":
            images = [None if x is None else torch.from_numpy(x.copy()) for x in images]
            images = [x.permute(2, 0, 1) if x is not None and x.ndim == 3 else x for x in images]
        same = len({None if x is None else tuple(x.shape) for x in images}) == 1 and images[0] is not None
        return (np.stack if output_type == "np" else torch.stack)(images) if same else images

    # Restoration of pictures of any size

    def _tilings(self, requests: list[Request], output_type: str) -> list:
        """The pictures to restore, as squares that the model can take."""
        image_processor, side_px = self.processor.image_processor, self.processor.target_px
        if any(request.height is not None or request.width is not None for request in requests):
            raise ValueError("task 'restore' takes no height and width: a picture keeps its own shape")
        if output_type == "latent":
            raise ValueError("output_type 'latent': restored pictures are put together from pixels")
        images = [request.image for request in requests]
        pictures = [self.processor.decode_image(x) if self.processor.is_codes(x) else x for x in images]
        return [image_processor.tile(picture, side_px) for picture in pictures]

    def _merge(self, call: Call, owners: list[int], rows: list[Row]) -> list[Row]:
        """One row for each copy of each picture, from those of its squares."""
        merged, first, fix_colors = [], 0, self.processor.image_processor.fix_colors
        for owner in owners:
            tiling = call.tilings[owner]
            sources = tiling.cut()
            for copy in range(call.copies):
                own = rows[first + copy : first + call.copies * len(sources) : call.copies]
                squares = [row.picture and row.picture.resize(x.size) for row, x in zip(own, sources, strict=True)]
                if (fix := call.color_fix) is not None:
                    squares = [x and fix_colors(x, source, fix) for x, source in zip(squares, sources, strict=True)]
                text = "\n".join(dict.fromkeys(row.text for row in own))
                merged.append(Row(call.given[owner], text, picture=None if None in squares else tiling.merge(squares)))
            first += call.copies * len(sources)
        return merged

    # Adapters

    def load_lora_weights(self, path_or_repo: str | Path, adapter_name: str | None = None, **hub_arguments) -> None:
        """Adds a LoRA that peft saved. From then on it alone counts, with weight 1; `set_adapters` changes that.

        Args:
            path_or_repo: folder, or repo NAMESPACE/NAME, with `adapter_config.json` and `adapter_model.safetensors`.
            adapter_name: by which the other methods know it. Default: "default_0", "default_1", ...
            hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            ImportError: without peft.
            ValueError: if there is no LoRA, or that of another model, or the name is taken; or the transformer is
                offloaded, or was replaced by `torch.compile`. Nothing is loaded then.
        """
        peft, model, loaded = _peft(), self.transformer, self._adapters()
        name = adapter_name or next(free for i in count() if (free := f"default_{i}") not in loaded)
        if name in loaded:
            raise ValueError(f"adapter_name {name!r} is taken; loaded are {loaded}")
        self._check_unfused()
        if hasattr(model, "_orig_mod") or any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                "the transformer is compiled or offloaded: load adapters first, or use transformer.compile()"
            )
        config, weights = _read_lora(path_or_repo, hub_arguments)
        self._check_lora(path_or_repo, config, weights, name)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        _inject(config, model, name)
        peft.set_peft_model_state_dict(model, weights, name)
        model._hf_peft_config_loaded = True
        model.train(model.training)  # new layers are in training mode
        for parameter in trained:  # peft froze them
            parameter.requires_grad_(True)
        self.set_adapters(name)

    def save_lora_weights(self, save_directory: str | Path, adapter_name: str | None = None) -> None:
        """Writes an adapter, the active one if not named, as peft does, with a model card unless there is one."""
        folder, peft = Path(save_directory), _peft()
        name = adapter_name or (*self.get_active_adapters(), None)[0]
        (name,) = self._checked_adapters([name] if name else [])
        weights = peft.get_peft_model_state_dict(self.transformer, adapter_name=name, save_embedding_layers=False)
        config = deepcopy(self.transformer.peft_config[name])
        config.base_model_name_or_path = base = config.base_model_name_or_path or self.transformer.name_or_path
        config.save_pretrained(folder)
        tensors = {LORA_PREFIX + key: weight.contiguous().cpu() for key, weight in weights.items()}
        save_file(tensors, folder / LORA_FILES[1], metadata={"format": "pt"})
        if not (folder / "README.md").exists():
            is_repo = not Path(base).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", base)
            base = base if is_repo else f"path/to/{Path(base).name}"  # on whose machine, nobody needs to know
            targets = sorted({key.partition(".lora_")[0].rpartition(".")[2] for key in weights if ".lora_" in key})
            values = {"base": base, "name": folder.name, "rank": config.r, "targets": ", ".join(targets)}
            card = LORA_CARD.format(base_model=f"base_model: {base}\n" if is_repo else "", **values)
            (folder / "README.md").write_text(card)

    def set_adapters(
        self, adapter_names: str | list[str], adapter_weights: float | list[float | None] | None = None
    ) -> None:
        """Has these adapters count, all at once, each by its weight (1 if not given, and one number is for all).

        What an adapter replaces (`modules_to_save`, the magnitudes of a DoRA) it replaces whole, whatever its weight.
        """
        names = self._checked_adapters([adapter_names] if isinstance(adapter_names, str) else list(adapter_names))
        self._check_unfused()
        given = list(adapter_weights) if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        if len(given) != len(names):
            raise ValueError(f"adapter_weights {given}: accepted is one number, or one for each of {names}")
        weights = [1.0 if weight is None else weight for weight in given]
        for weight in weights:
            _check_weight("adapter_weights", weight)
        for key, module in self._tuned():
            if len(own := [name for name in names if name in getattr(module, "modules_to_save", ())]) > 1:
                raise ValueError(f"adapters {own} each replace {key}: accepted is one of them at a time")
        self.enable_lora()
        self._activate(names)
        for _, module in self._tuned():
            if hasattr(module, "set_scale"):
                for name, weight in zip(names, weights, strict=True):
                    module.set_scale(name, weight)

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that count."""
        active = {name for _, module in self._tuned() for name in module.active_adapters}
        return [name for name in self._adapters() if name in active]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all adapters, by component."""
        return {"transformer": names} if (names := self._adapters()) else {}

    def disable_lora(self) -> None:
        """Has no adapter count, until `enable_lora`."""
        self._check_unfused()
        for _, module in self._tuned():
            module.enable_adapters(False)

    def enable_lora(self) -> None:
        """Has those adapters count again that did before `disable_lora`."""
        for _, module in self._tuned():
            module.enable_adapters(True)

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """Removes adapters; if none is left that counts, the last one does."""
        names = self._checked_adapters([adapter_names] if isinstance(adapter_names, str) else list(adapter_names))
        self._check_unfused()
        left = [name for name in self._adapters() if name not in names]
        if not left:
            return self.unload_lora_weights()
        active = [name for name in self.get_active_adapters() if name in left] or left[-1:]
        self._activate(active[:1])  # peft would choose for each layer by itself
        self.transformer.delete_adapter(names)
        self._activate(active)

    def unload_lora_weights(self) -> None:
        """Removes all adapters. The weights are as before, bit by bit, except where `fuse_lora` changed them."""
        kept = self._fused()
        for key, module in reversed(self._tuned()):  # the inner ones first
            if hasattr(module, "modules_to_save"):
                replaced = [own for name, own in module.modules_to_save.items() if name in kept]
                base = (replaced or [module.original_module])[0]
            else:
                base = module.get_base_layer()
            self.transformer.set_submodule(key, base)
        if self._adapters():
            del self.transformer.peft_config
            self.transformer._hf_peft_config_loaded = False

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Adds the adapters that count to the weights themselves: faster, and with `unload_lora_weights` for good.

        `fuse_lora`, `unload_lora_weights` and `save_pretrained` write a model that needs no adapter.
        """
        _check_weight("lora_scale", lora_scale)
        self._checked_adapters(self.get_active_adapters())
        self._check_unfused()
        if lora_scale == 0 or any(module.disable_adapters for _, module in self._tuned()):
            raise ValueError(
                f"lora_scale {lora_scale}: accepted is another than 0, for adapters that are not disabled"
            )
        if getattr(self.transformer, "is_quantized", False):
            raise ValueError("the transformer is quantized: load it without quantization_config to fuse adapters")
        self._lora_scale = lora_scale
        for _, module in self._tuned():
            if hasattr(module, "scale_layer"):
                module.scale_layer(lora_scale)
                module.merge()

    def unfuse_lora(self) -> None:
        """Undoes `fuse_lora`, up to rounding."""
        for _, module in self._tuned():
            if module.merged_adapters:
                module.unmerge()
                module.unscale_layer(self._lora_scale)

    def _adapters(self) -> list[str]:
        return list(getattr(self.transformer, "peft_config", {}))

    def _tuned(self) -> list[tuple[str, Any]]:
        """The modules that peft has put in place of others, by name."""
        modules = self.transformer.named_modules()
        return [(key, module) for key, module in modules if hasattr(module, "merged_adapters")]

    def _activate(self, names: list[str]) -> None:
        for _, module in self._tuned():
            replaces = getattr(module, "modules_to_save", names)
            module.set_adapter([name for name in names if name in replaces], inference_mode=True)

    def _fused(self) -> list[str]:
        fused = {name for _, module in self._tuned() for name in module.merged_adapters}
        return [name for name in self._adapters() if name in fused]

    def _check_unfused(self) -> None:
        if fused := self._fused():
            raise ValueError(f"adapters {fused} are fused: unfuse_lora or unload_lora_weights comes first")

    def _checked_adapters(self, names: list[str]) -> list[str]:
        if not names or set(names) - {*self._adapters()} or len(set(names)) < len(names):
            raise ValueError(f"adapters {names}: accepted are those loaded, each once: {self._adapters()}")
        return names

    def _check_lora(self, source, config, weights: dict[str, Tensor], name: str) -> None:
        """Raises unless these are the weights that an adapter of the model has, as a twin without storage shows."""
        try:
            with torch.device("meta"):
                twin = type(self.transformer)(deepcopy(self.transformer.config))
                for other in self._adapters():
                    _inject(deepcopy(self.transformer.peft_config[other]), twin, other)
                _inject(deepcopy(config), twin, name)
            needed = _peft().get_peft_model_state_dict(twin, adapter_name=name, save_embedding_layers=False)
        except Exception as error:  # peft's are of many kinds
            raise ValueError(f"{source} as adapter {name!r} does not fit the model: {error}") from error
        shapes = {key: tuple(weight.shape) for key, weight in needed.items()}
        found = {key: tuple(weight.shape) for key, weight in weights.items()}
        for key in sorted(shapes.keys() | found.keys()):
            if shapes.get(key) != found.get(key):
                wanted, given = shapes.get(key, "no such weight"), found.get(key, "none")
                raise ValueError(
                    f"{source} as adapter {name!r} does not fit the model: {key} is {given}, accepted is {wanted}"
                )

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, dtype=None, torch_dtype=None, trust_remote_code=None, **kwargs
    ):
        """A pipeline of the classes at hand, from a folder or a repo.

        Args:
            dtype, torch_dtype: of the transformer; by default as saved. The VQ model is in float32, as it gives some
                codes a neighbor's number in bfloat16; `.to(dtype)` changes both.
            trust_remote_code: whether to run a repo's code; not needed where this package is installed.
            kwargs: components to use instead of the repo's own (`transformer`, `vqvae`, `processor`); `revision`,
                `token`, `cache_dir`, `local_files_only`, `force_download`; all else goes to the transformer:
                `device_map`, `quantization_config` (transformers' or diffusers'), `attn_implementation`, ...
        """
        if isinstance(quantization := kwargs.get("quantization_config"), PipelineQuantizationConfig):
            kwargs["quantization_config"] = quantization._resolve_quant_config(False, "transformer")
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        source, dtype = str(pretrained_model_name_or_path), dtype or torch_dtype
        if not isinstance(pretrained_model_name_or_path, str | Path) or Path(source).is_file():
            raise ValueError(f"{source}: accepted is a folder, or a repo NAMESPACE/NAME")
        if (Path(source) / LORA_FILES[0]).exists() and not (Path(source) / cls.config_name).exists():
            raise ValueError(f"{source} is an adapter: load its model, then load_lora_weights({source!r})")
        vqvae, processor, transformer = (kwargs.pop(name, None) for name in ("vqvae", "processor", "transformer"))
        code = {"trust_remote_code": trust_remote_code, **hub}
        loading = "transformer"
        try:
            if transformer is None:
                transformer = AutoModelForMultimodalLM.from_pretrained(source, dtype=dtype or "auto", **code, **kwargs)
            loading = "vqvae"
            if vqvae is None:
                vqvae = VQModel.from_pretrained(source, subfolder="vqvae", dtype=torch.float32, **hub)
                vqvae.to(transformer.device)
            loading = "processor"
            if processor is None:
                processor = AutoProcessor.from_pretrained(source, **code)
        except (ImportError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # each kind of file has errors of its own
            raise OSError(f"the {loading} of {source} cannot be loaded: {error}") from error
        return cls(transformer, vqvae, processor)

    def save_pretrained(
        self,
        save_directory,
        max_shard_size: int | str = "5GB",
        push_to_hub: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        **kwargs,
    ) -> None:
        """Writes a folder that transformers and diffusers both load, with its code, each weight once.

        Args:
            max_shard_size: of the transformer's files.
            push_to_hub: upload the folder as well, to `repo_id` (default: the folder's name); `private`, `token`,
                `commit_message` and `create_pr` are as in `push_to_hub`.

        Raises:
            ValueError: if asked for pickled weights or a variant.
        """
        if not safe_serialization or variant:
            raise ValueError(
                f"safe_serialization={safe_serialization}, variant={variant!r}: accepted are True and None"
            )
        if not re.fullmatch(r"\d+ ?([KMGT]?B)?", str(max_shard_size).upper()):
            raise ValueError(f"max_shard_size {max_shard_size!r}: accepted are bytes, or text such as '5GB'")
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file: accepted is a folder")
        if names := self._adapters():
            raise ValueError(
                f"adapters {names} are loaded: fuse_lora and unload_lora_weights come first, or save_lora_weights"
            )
        for path in (*folder.glob("*.py"), *folder.glob("*/root_*.py")):
            if path.is_symlink():
                path.unlink()  # or the copies below would be written through it
        self.transformer.save_pretrained(folder, max_shard_size=max_shard_size)
        self.processor.save_pretrained(folder)
        self.vqvae.save_pretrained(folder / "vqvae")
        save_pipeline_files(folder)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", folder.name)
            repo = create_repo(repo_id, exist_ok=True, private=kwargs.pop("private", None), token=kwargs.get("token"))
            self._upload_folder(folder, repo.repo_id, **kwargs)


def save_pipeline_files(folder: Path) -> None:
    """Writes what makes a folder with model, processor and VQ model a pipeline's."""
    for name in PIPELINE_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(__file__).parent / name, folder / name)
    (folder / LuminaMGPTPipeline.config_name).write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


def free_bytes(device: torch.device) -> int | None:
    """What may still be allocated on a device; None where that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available if device.type == "cpu" else None


def _smaller_sizes(height: int, width: int, unit: int) -> Iterator[tuple[int, int]]:
    """Multiples of `unit` of that shape as nearly as possible, the largest first."""
    longest = max(height, width) // unit
    for length in range(longest - 1, 0, -1):
        scale = length / longest / unit
        yield max(1, round(height * scale)) * unit, max(1, round(width * scale)) * unit


def _weight_bytes(module: torch.nn.Module) -> int:
    """Of all that its state holds, once; of quantized tensors what they are made of."""
    found: dict[Any, int] = {}  # by storage and place

    def add(tensor: Any) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, name))
        elif isinstance(tensor, Tensor):
            found[tensor.untyped_storage()._cdata, tensor.storage_offset()] = tensor.nbytes

    for tensor in module.state_dict().values():
        add(tensor)
    return sum(found.values())


def _bytes_text(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _peft():
    try:
        import peft
        import peft.functional
    except ImportError as error:
        raise ImportError("adapters need peft: pip install peft") from error
    return peft


def _inject(config, model: PreTrainedModel, name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        _peft().inject_adapter_in_model(config, model, name)


def _read_lora(source: str | Path, hub_arguments: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """peft's configuration of an adapter, and its weights by the model's names."""
    if unknown := hub_arguments.keys() - {*HUB_ARGUMENTS}:
        raise ValueError(f"{', '.join(sorted(unknown))}: accepted are adapter_name, {', '.join(HUB_ARGUMENTS)}")
    folder, peft = Path(source), _peft()
    try:
        if not folder.exists():
            folder = Path(snapshot_download(str(source), allow_patterns=[*LORA_FILES], **hub_arguments))
        if missing := [name for name in LORA_FILES if not (folder / name).is_file()]:
            raise ValueError(f"no {missing[0]}; accepted is a folder or repo with a LoRA that peft saved")
        config, weights = peft.PeftConfig.from_pretrained(folder), load_file(folder / LORA_FILES[1])
    except Exception as error:  # each kind of file has errors of its own
        raise ValueError(f"the adapter {source} cannot be loaded: {error}") from error
    for field, accepted in LORA_VALUES.items():
        if (value := getattr(config, field, None)) not in accepted:
            raise ValueError(f"{source}: {field} {value!r}; accepted are {', '.join(map(repr, accepted))}")
    own = {key.removeprefix(LORA_PREFIX): weight for key, weight in weights.items()}
    return config, {key: weight for key, weight in own.items() if ".base_layer." not in key}


def _check_weight(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} {value!r}: accepted are numbers")


def default_task(image: Any) -> str:
    """What a call is for that does not say it."""
    return "text-to-image" if image is None else "edit"


def _num_copies(num_images_per_prompt: int, best_of: int | None, verifier: Callable | None) -> int:
    """Rows to draw of each prompt."""
    _checked_count("num_images_per_prompt", num_images_per_prompt)
    if best_of is None:
        return num_images_per_prompt
    if _checked_count("best_of", best_of) < num_images_per_prompt:
        raise ValueError(f"best_of {best_of}: {num_images_per_prompt} images per prompt need at least as many")
    if verifier is None:
        raise ValueError(f"best_of {best_of} needs a verifier, such as those in `pipelines.verifiers`")
    return best_of


def _checked_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} {value!r}: accepted are 1 and more, whole numbers")
    return int(value)


def _requests(sampling: dict[str, Any], **given: Any) -> list[Request]:
    """One request for each prompt, from values for all or lists with one for each."""
    lists = (given[name] for name in ("prompt", "image") if isinstance(given[name], list | tuple))
    num_prompts = len(next(lists, [None]))
    if not num_prompts:
        raise ValueError("an empty list: at least one prompt or image is needed")
    own = {name: _one_each(value, num_prompts, name) for name, value in given.items()}
    settings = {name: _one_each(value, num_prompts, name) for name, value in sampling.items() if value is not None}
    return [
        Request(
            sampling={name: values[i] for name, values in settings.items()},
            **{name: values[i] for name, values in own.items()},
        )
        for i in range(num_prompts)
    ]


def _check_callables(**given: Any) -> None:
    for name, value in given.items():
        if value is not None and not callable(value):
            raise ValueError(f"{name} {value!r}: accepted is something to call")


def _check_generators(generator: Any, num_rows: int) -> None:
    if isinstance(generator, list | tuple) and len(generator) != num_rows:
        raise ValueError(f"{len(generator)} generators for {num_rows} rows: give one, or one per row that is drawn")


def _enhanced(enhancer: Callable[[str], str], prompt: str) -> str:
    try:
        words = enhancer(prompt)
    except Exception as error:
        kind = TimeoutError if isinstance(error, TimeoutError) else RuntimeError
        raise kind(f"the prompt enhancer failed on {prompt!r}: {type(error).__name__}: {error}") from error
    if not isinstance(words, str) or not words.strip():
        raise ValueError(f"the prompt enhancer made {words!r} of {prompt!r}: accepted is some text")
    return words


def _one_per_square(requests: list[Request], tilings: list, generator: Any, copies: int):
    """A request for each square of each picture, the picture's number, and for its rows the picture's generators."""
    owners = [i for i, tiling in enumerate(tilings) for _ in tiling.corners]
    squares = [square for tiling in tilings for square in tiling.cut()]
    if isinstance(generator, list | tuple):
        generator = [generator[i * copies + copy] for i in owners for copy in range(copies)]
    return [replace(requests[i], image=square) for i, square in zip(owners, squares, strict=True)], owners, generator


def _one_each(value: Any, num_prompts: int, name: str) -> list[Any]:
    """A value for each prompt, from one for all or a list."""
    values = list(value) if isinstance(value, list | tuple) else [value] * num_prompts
    if len(values) != num_prompts:
        raise ValueError(f"{name} has {len(values)} values for {num_prompts} prompts")
    return values
