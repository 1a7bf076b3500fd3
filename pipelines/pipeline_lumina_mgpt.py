"""The diffusers-style pipeline: prompts, pictures and tasks in; pictures and text out.

What differs from stock: the transformer and the processor live at the root of a repo, where transformers finds them,
so that its weights serve both libraries; two tiny files in `transformer/` and `processor/` tell diffusers. A repo
carries this file beside the model's, so it imports no sibling: the processor knows the tasks and the layout.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, VQModel
from diffusers import __version__ as diffusers_version
from diffusers.utils import BaseOutput
from huggingface_hub import create_repo
from torch import LongTensor, Tensor
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)

if TYPE_CHECKING:  # never imported: the loaders fetch just the files that a pipeline names like this
    from .configuration_lumina_mgpt import *  # type: ignore # noqa: F403
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
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PER_PROMPT = ("image", "condition", "height", "width", "negative_prompt", "guidance_scale", "generator")


@dataclass
class LuminaMGPTPipelineOutput(BaseOutput):
    """What the model drew and said.

    Attributes:
        images: one a row, None where a row drew none; of a chat, the answer's. As the call's `output_type` has it.
        text: one a row, empty where the model said nothing.
        panels: of tasks with two panels, what the other one shows, in the form and order of `images`.
        messages: of a chat, the conversation with the answer at its end, its pictures as codes.
    """

    images: list[Any] | np.ndarray | Tensor
    text: list[str]
    panels: list[Any] | np.ndarray | Tensor | None = None
    messages: list[dict[str, Any]] | None = None


class StepWatcher(StoppingCriteria):
    """After each token: the progress bar, the user's callback, and whether to stop."""

    def __init__(self, pipe: "LuminaMGPTPipeline", bar, callback: Callable | None, tensor_inputs: list[str]):
        self.pipe, self.bar, self.callback, self.tensor_inputs, self.step = pipe, bar, callback, tensor_inputs, 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        """`input_ids (batch, length)` -> True for all rows once the pipeline was interrupted. (batch)"""
        self.bar.update()
        if self.callback is not None:
            tensors = {"generated_ids": input_ids[:, -self.step - 1 :]}
            self.callback(self.pipe, self.step, self.step, {name: tensors[name] for name in self.tensor_inputs})
        self.step += 1
        return torch.full(input_ids.shape[:1], self.pipe.interrupt, device=input_ids.device)


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
        processor.vqvae = vqvae
        self.register_modules(transformer=transformer, vqvae=vqvae, processor=processor)
        self._interrupt = False

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
            num_images_per_prompt: rows drawn of each prompt; they follow each other in the output.
            guidance_scale: for all or one per prompt; 1 is without guidance.
            generator: one for all, or one per row.
            output_type: "pil", "np" (float32 (height, width, 3) in [0, 1]), "pt" (float32 (3, height, width) in
                [0, 1]) or "latent" (codes, int64 (rows, cols)). All but "pil" are stacked if they are of one size.
            callback_on_step_end: called as `callback(pipe, step, timestep, callback_kwargs)` after each token; both
                numbers count tokens. Tokens are final: what it returns is ignored.
            callback_on_step_end_tensor_inputs: of "generated_ids": `LongTensor (batch, step + 1)`, whose rows
                `processor.decode_ids` shows as far as they are drawn.
            condition: for all or one per prompt; of two panels, what the other one shows: "depth", "canny", "hed",
                "pose", or in words, such as a subject to draw again. `height` and `width` are those of one panel.
            color_fix: "wavelet", "adain" or None: how a restored picture gets the colors of `image`. One larger than
                the model's square is restored in overlapping squares; a smaller one comes back that large.
            allow_untrained: try a task that this checkpoint was not trained for.
            generate_kwargs: further arguments of the model's `generate`: `image_top_k`, `text_top_k`,
                `image_temperature`, `text_temperature`, `top_k_schedule`, `decoding`, `max_new_tokens`, ...

        Returns:
            `LuminaMGPTPipelineOutput`, or with `return_dict=False` the tuple `(images, text)`.

        Raises:
            ValueError: for an unknown or untrained task, a missing or superfluous prompt or image, an impossible size,
                or a list of another length than the prompts'.
        """
        # 1. One prompt, picture and size per row
        self._check_options(output_type, callback_on_step_end_tensor_inputs)
        task = task or ("text-to-image" if image is None else "edit")
        self.processor.check_task(task, allow_untrained)
        num_prompts = next((len(given) for given in (prompt, image) if isinstance(given, list | tuple)), 1)
        if not num_prompts:
            raise ValueError("an empty list: at least one prompt or image is needed")
        prompts, negatives = (
            _one_each(x, num_prompts, name) for x, name in ((prompt, "prompt"), (negative_prompt, "negative_prompt"))
        )
        images = self._check_images(task, _one_each(image, num_prompts, "image"))
        heights, widths = _one_each(height, num_prompts, "height"), _one_each(width, num_prompts, "width")
        if restoration := self._restoration(task, images, heights, color_fix, output_type):
            owners = [i for i, tiling in enumerate(restoration) for _ in tiling.corners]
            images = [square for tiling in restoration for square in tiling.cut()]
            prompts, negatives, heights, widths = (
                [values[i] for i in owners] for values in (prompts, negatives, heights, widths)
            )
            if isinstance(guidance_scale, list):
                guidance_scale = [guidance_scale[i] for i in owners]
            if isinstance(generator, list):
                copies = range(num_images_per_prompt)
                generator = [generator[i * num_images_per_prompt + copy] for i in owners for copy in copies]
        conditions = _one_each(condition, len(prompts), "condition")
        codes, heights, widths = self._encode_images(task, images, heights, widths)

        # 2. Prompts to ids
        asked, uni_rep = self.processor.tasks[task], self.processor.uni_rep
        inputs = self._encode_prompts(task, prompts, conditions, codes, heights, widths)
        if negative_prompt:
            filled = [negative or words for negative, words in zip(negatives, prompts, strict=True)]
            negative = self._encode_prompts(task, filled, conditions, codes, heights, widths, with_upper_rows=False)
            is_given = torch.tensor([[bool(words)] for words in negatives], device=self._execution_device)
            generate_kwargs["negative_prompt_ids"] = negative["input_ids"]
            generate_kwargs["negative_prompt_attention_mask"] = negative["attention_mask"] * is_given
        if asked.answer == "image":  # such an answer ends with its picture
            generate_kwargs.setdefault("eos_token_id", [uni_rep.end_id, uni_rep.end_of_turn_id])

        # 3. Generate
        answers: Any = self._generate(
            inputs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            height=heights,
            width=widths,
            guidance_scale=guidance_scale,
            generator=generator,
            num_return_sequences=num_images_per_prompt,
            **generate_kwargs,
        )

        # 4. Ids to text and pictures
        prompt_of_row = [i for i in range(len(prompts)) for _ in range(num_images_per_prompt)]
        if asked.continues:
            begun = [uni_rep.encode(x, uni_rep.grid(h, w)[0]) for x, h, w in zip(codes, heights, widths, strict=True)]
            answers = [torch.cat([begun[i], answer.cpu()]) for i, answer in zip(prompt_of_row, answers, strict=True)]
        parts = [self.processor.split_ids(answer) for answer in answers]
        text = ["".join(part for part in row if isinstance(part, str)).strip() for row in parts]
        drawn = [([x for x in row if not isinstance(x, str)] or [None])[-1] for row in parts]
        others = None
        if asked.num_panels > 1:  # the one with the picture is drawn last, if the other one is given
            num_rows = [uni_rep.grid(h, w)[0] for h, w in zip(heights, widths, strict=True)]
            halves = [_halves(x, num_rows[i]) for i, x in zip(prompt_of_row, drawn, strict=True)]
            drawn, others = ([pair[i] for pair in halves] for i in (asked.continues, not asked.continues))
            others = self._as_output(self._decode(others, output_type), output_type)
        drawn = self._decode(drawn, output_type)
        if restoration:
            drawn, text = self._merge(restoration, drawn, text, num_images_per_prompt, color_fix)
        images = self._as_output(drawn, output_type)
        self.maybe_free_model_hooks()
        return LuminaMGPTPipelineOutput(images=images, text=text, panels=others) if return_dict else (images, text)

    @torch.no_grad()
    def chat(
        self,
        messages: list[dict[str, Any]],
        output_type: str = "pil",
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = _callback_tensor_inputs,
        **generate_kwargs,
    ) -> LuminaMGPTPipelineOutput:
        """The next answer of a conversation, in text and pictures as the model likes.

        Args:
            messages: as in transformers: `{"role": "user" | "assistant", "content": ...}`, where content is a string
                or a list of `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`.
            generate_kwargs: as in a call; `height` and `width` have the answer begin with a picture of that size.

        Returns:
            `.images` of the answer, `.text` (one string in a list), and `.messages` to continue with.
        """
        self._check_options(output_type, callback_on_step_end_tensor_inputs)
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"messages {messages!r}: accepted is a list of {{'role': ..., 'content': ...}}")
        inputs = self.processor.apply_chat_template(messages, tokenize=True, return_dict=True)
        inputs = inputs.to(self._execution_device)
        (row,) = self._generate(inputs, callback_on_step_end, callback_on_step_end_tensor_inputs, **generate_kwargs)
        parts = self.processor.split_ids(row)
        codes, words = ([part for part in parts if isinstance(part, str) is is_text] for is_text in (False, True))
        content = [{"type": "text", "text": x} if isinstance(x, str) else {"type": "image", "image": x} for x in parts]
        images = self._as_output(self._decode(codes, output_type), output_type)
        self.maybe_free_model_hooks()
        answer = {"role": "assistant", "content": content}
        return LuminaMGPTPipelineOutput(images=images, text=["".join(words).strip()], messages=[*messages, answer])

    def stream(
        self, prompts: str | list[str], batch_size: int = 8, num_images_per_prompt: int = 1, **kwargs
    ) -> Iterator[tuple[int, LuminaMGPTPipelineOutput]]:
        """Yields `(index, output)` for each prompt as soon as it is drawn, `batch_size` prompts at a time.

        Further arguments are those of a call, with lists for all prompts.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        for first in range(0, len(prompts), batch_size):
            part: dict[str, Any] = {}
            for name, value in kwargs.items():
                copies = num_images_per_prompt if name == "generator" else 1
                own = slice(first * copies, (first + batch_size) * copies)
                part[name] = value[own] if isinstance(value, list) and name in PER_PROMPT else value
            batch = prompts[first : first + batch_size]
            output: Any = self(batch, num_images_per_prompt=num_images_per_prompt, **part)
            for i in range(len(batch)):
                own = slice(i * num_images_per_prompt, (i + 1) * num_images_per_prompt)
                yield first + i, LuminaMGPTPipelineOutput(images=output.images[own], text=output.text[own])

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """As in stock, but without an accelerator, where there is nothing to offload from, it does nothing."""
        if device is not None or torch.accelerator.is_available():
            super().enable_model_cpu_offload(gpu_id, device)

    # The steps of a call

    def _check_options(self, output_type: str, tensor_inputs: list[str]) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r}: accepted are {', '.join(OUTPUT_TYPES)}")
        unknown = set(tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs {sorted(unknown)}: accepted are {self._callback_tensor_inputs}"
            )

    def _check_images(self, task: str, images: list[Any]) -> list[Any]:
        needs_image = self.processor.tasks[task].needs_image
        if any((image is not None) != needs_image for image in images):
            raise ValueError(f"task {task!r} takes {'an' if needs_image else 'no'} image")
        return images

    def _encode_images(self, task: str, images: list[Any], heights: list, widths: list) -> tuple[list, list, list]:
        """Codes (rows, cols) of the pictures given; height and width in pixels of the picture that each row must draw,
        all panels of it, None where the model decides."""
        config, uni_rep, asked = self.transformer.config, self.processor.uni_rep, self.processor.tasks[task]
        follows = asked.needs_image and not asked.continues
        codes = self.processor.encode_images(images) if follows else []
        sizes = []
        for row, (height, width) in enumerate(zip(heights, widths, strict=True)):
            if (height is None) != (width is None):
                raise ValueError(f"height {height}, width {width}: give both or none")
            if height is not None:
                uni_rep.grid(height * asked.num_panels, width)  # raises for what cannot be drawn
            elif not follows and not (asked.continues and asked.num_panels > 1):
                height, width = config.default_height_px // asked.num_panels, config.default_width_px
            if asked.continues:
                codes.append(self._upper_rows(images[row], height, width, asked.num_panels))
            if height is None and asked.answer == "image":
                height, width = (n * uni_rep.size_unit_px // uni_rep.codes_per_size_unit for n in codes[row].shape)
            sizes.append((height and height * asked.num_panels, width))
        return codes, [height for height, _ in sizes], [width for _, width in sizes]

    def _upper_rows(self, image: Any, height: int | None, width: int | None, num_panels: int) -> Tensor:
        """Codes of what a picture begins with: a whole panel, or as many rows as the image has in that width."""
        if self.processor.is_codes(image):
            return torch.as_tensor(image)
        unit_px = self.processor.uni_rep.size_unit_px
        if height is None or width is None:  # a bucket such that all panels have the area that the model draws
            target_px = int(self.processor.target_px / num_panels**0.5) // unit_px * unit_px
            return self.processor.encode_image(image, max(target_px, unit_px))
        size = (width, height)
        if num_panels == 1:
            picture, code_px = (
                self.processor.image_processor.load(image),
                unit_px // self.processor.codes_per_size_unit,
            )
            num_rows = round(picture.height * width / picture.width / code_px)
            size = (width, min(max(num_rows, 1), height // code_px - 1) * code_px)
        return self.processor.encode_images([image], size=size)[0]

    def _encode_prompts(
        self,
        task: str,
        prompts: list,
        conditions: list,
        codes: list,
        heights: list,
        widths: list,
        with_upper_rows=True,
    ):
        """`input_ids` and `attention_mask`, int64 (prompts, length)."""
        rows = zip(prompts, heights, widths, conditions, strict=True)
        turns = [self.processor.task_prompt(task, *row) for row in rows]
        chats = [[{"role": "user", "content": turn}] for turn in turns]  # a plain call takes a rendered text verbatim
        options: dict[str, Any] = {}
        if not self.processor.tasks[task].continues:
            options["images"] = [[grid] for grid in codes] or None
        elif with_upper_rows:
            options = {"upper_rows": codes, "height": heights, "width": widths}
        inputs = self.processor.apply_chat_template(chats, tokenize=True, return_dict=True, **options)
        return inputs.to(self._execution_device)

    def _generate(self, inputs, callback: Callable | None, tensor_inputs: list[str], **kwargs) -> LongTensor:
        """The new ids, `(batch, length)`, finished rows padded on the right."""
        self._interrupt = False
        prompt_length = inputs["input_ids"].shape[1]
        with self.progress_bar(total=self._num_steps(prompt_length, **kwargs)) as bar:
            watcher = StepWatcher(self, bar, callback, tensor_inputs)
            criteria = StoppingCriteriaList([*kwargs.pop("stopping_criteria", []), watcher])
            ids = self.transformer.generate(**inputs, stopping_criteria=criteria, **kwargs)
        return ids[:, prompt_length:]

    def _num_steps(self, prompt_length: int, height=None, width=None, max_new_tokens=None, **kwargs) -> int:
        """At most so many tokens are drawn."""
        sizes = [
            (h, w) for h, w in zip(*(x if isinstance(x, list) else [x] for x in (height, width)), strict=True) if h
        ]
        if sizes and "eos_token_id" in kwargs:
            return max(self.processor.uni_rep.num_tokens(*self.processor.uni_rep.grid(h, w)) for h, w in sizes)
        return max_new_tokens or self.transformer.config.max_position_embeddings - prompt_length

    def _decode(self, codes: list[Tensor | None], output_type: str) -> list[Any]:
        """Codes (rows, cols) to PIL images, but for "latent"; None stays None."""
        if output_type == "latent":
            return codes
        pictures = iter(self.processor.decode_images([grid for grid in codes if grid is not None]))
        return [None if grid is None else next(pictures) for grid in codes]

    def _as_output(self, images: list[Any], output_type: str) -> Any:
        """PIL images, or codes, as `output_type` has them; those of one size are stacked but for "pil"."""
        if output_type in ("np", "pt"):
            images = [None if x is None else np.asarray(x, dtype=np.float32) / 255 for x in images]
        if output_type == "pt":
            images = [None if x is None else torch.from_numpy(x).permute(2, 0, 1) for x in images]
        if output_type == "pil":
            return images
        same = len({None if x is None else tuple(x.shape) for x in images}) == 1 and images[0] is not None
        return (np.stack if output_type == "np" else torch.stack)(images) if same else images

    # Restoration of pictures of any size

    def _restoration(
        self, task: str, images: list[Any], heights: list, color_fix: str | None, output_type: str
    ) -> list:
        """The pictures to restore, as squares that the model can take; empty for other tasks."""
        if task != "restore":
            return []
        image_processor, side_px = self.processor.image_processor, self.processor.target_px
        if any(height is not None for height in heights):
            raise ValueError("task 'restore' takes no height and width: a picture keeps its own shape")
        if output_type == "latent":
            raise ValueError("output_type 'latent': restored pictures are put together from pixels")
        if color_fix is not None:
            image_processor.check_color_fix(color_fix)
        pictures = [self.processor.decode_image(x) if self.processor.is_codes(x) else x for x in images]
        return [image_processor.tile(picture, side_px) for picture in pictures]

    def _merge(self, tilings: list, drawn: list, text: list[str], copies: int, color_fix: str | None) -> tuple:
        """One picture and one text for each copy of each picture, from those of its squares."""
        pictures, texts, first = [], [], 0
        for tiling in tilings:
            sources = tiling.cut()
            for copy in range(copies):
                own = slice(first + copy, first + copies * len(sources), copies)
                squares = [x and x.resize(source.size) for x, source in zip(drawn[own], sources, strict=True)]
                if color_fix is not None:
                    fix = self.processor.image_processor.fix_colors
                    squares = [x and fix(x, source, color_fix) for x, source in zip(squares, sources, strict=True)]
                pictures.append(None if None in squares else tiling.merge(squares))
                texts.append("\n".join(dict.fromkeys(text[own])))
            first += copies * len(sources)
        return pictures, texts

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, dtype=None, torch_dtype=None, trust_remote_code=None, **kwargs
    ):
        """A pipeline of the classes at hand, from a folder or a repo.

        Args:
            dtype, torch_dtype: of the weights; by default as saved for the transformer, float32 for the VQ model.
            trust_remote_code: whether to run a repo's code; not needed where this package is installed.
            kwargs: components to use instead of the repo's own (`transformer`, `vqvae`, `processor`); `revision`,
                `token`, `cache_dir`, `local_files_only`, `force_download`; all else goes to the transformer:
                `device_map`, `quantization_config`, `attn_implementation`, ...
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        source, dtype = str(pretrained_model_name_or_path), dtype or torch_dtype
        vqvae, processor, transformer = (kwargs.pop(name, None) for name in ("vqvae", "processor", "transformer"))
        code = {"trust_remote_code": trust_remote_code, **hub}
        if transformer is None:
            transformer = AutoModelForMultimodalLM.from_pretrained(source, dtype=dtype or "auto", **code, **kwargs)
        if vqvae is None:
            vqvae = VQModel.from_pretrained(source, subfolder="vqvae", dtype=dtype, **hub).to(transformer.device)
        if processor is None:
            processor = AutoProcessor.from_pretrained(source, **code)
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
        folder = Path(save_directory)
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


def _halves(codes: Tensor | None, num_rows: int) -> list[Tensor | None]:
    """The upper and the lower panel of codes (rows, cols), of which some rows may be missing; None where all are."""
    if codes is None:
        return [None, None]
    return [half if len(half) else None for half in (codes[: num_rows // 2], codes[num_rows // 2 :])]


def _one_each(value: Any, num_prompts: int, name: str) -> list[Any]:
    """A value for each prompt, from one for all or a list."""
    values = list(value) if isinstance(value, list | tuple) else [value] * num_prompts
    if len(values) != num_prompts:
        raise ValueError(f"{name} has {len(values)} values for {num_prompts} prompts")
    return values
