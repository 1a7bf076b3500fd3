"""Messages and pictures -> ids (and labels); ids -> text and pictures.

One path for everything: a prompt, a chat and a training record all become a list of turns with `<|image|>`
placeholders, then ids. Unlike stock processors this one emits final ids: it holds the VQ model, turns pictures into
codes and lays them out (Uni-Rep), so the decoder is a plain language model. What a user writes is text: names of
control tokens in it stay plain text, except for the placeholder.
"""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AddedToken, BatchFeature, ProcessorMixin

from .image_processing_lumina_mgpt import blend_tiles, tile_corners
from .uni_rep import END_OF_TURN, UniRep, is_whole, whole_numbers

IMAGE = "<|image|>"
IGNORED_LABEL = -100
MIN_TILE_CODES = 8  # on a side, of which one overlaps the next tile
BLENDED_CHANNELS = 3 + 3 + 1  # of a picture in tiles: in float32 the tiles, the whole and the weights
TEMPLATE_OPTIONS = {"height", "width", "upper_rows", "target_px"}
# What TRL and transformers' pipelines hand to every processor; here nothing is cut off, and the padding is fixed.
STOCK_OPTIONS = {"padding", "padding_side", "pad_to_multiple_of", "truncation", "max_length", "add_special_tokens"}
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")

# One space between a picture and its neighbours; an end-of-turn after each turn; no role words.
CHAT_TEMPLATE = """\
{{- bos_token or eos_token -}}
{%- for message in messages -%}
  {%- set ns = namespace(text="", after_image=false) -%}
  {%- if message.content is string -%}
    {%- set ns.text = message.content -%}
  {%- else -%}
    {%- for item in message.content -%}
      {%- if item.type == "image" -%}
        {%- set ns.text = ns.text.rstrip() ~ (" " if ns.text.strip() else "") ~ "<|image|>" -%}
        {%- set ns.after_image = true -%}
      {%- elif item.text -%}
        {%- set ns.text = ns.text ~ (" " ~ item.text.lstrip() if ns.after_image else item.text) -%}
        {%- set ns.after_image = false -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if message.role == "assistant" -%}
    {%- generation -%}{{- ns.text ~ "<reserved08706>" -}}{%- endgeneration -%}
  {%- else -%}
    {{- ns.text ~ "<reserved08706>" -}}
  {%- endif -%}
{%- endfor -%}
"""


@dataclass(frozen=True)
class Task:
    """How a task is asked for, in the words that the models were trained on.

    Attributes:
        template: the user's turn, with `{prompt}` where the user's words go and `<|image|>` for a picture.
        answer: what the model says: "image", "text", or "text+image".
        default_prompt: the user's words if there are none.
        checkpoint: a published one that was trained for it.
        continues: whether the answer's picture begins with the rows of the given one.
        num_panels: how many pictures of one size the answer's picture holds, above each other.
    """

    template: str
    answer: str = "image"
    default_prompt: str = ""
    checkpoint: str = "Lumina-mGPT-7B-768-Omni"
    continues: bool = False
    num_panels: int = 1

    @property
    def needs_image(self) -> bool:
        return IMAGE in self.template or self.continues

    @property
    def follows_image(self) -> bool:
        """Whether the answer comes after a picture, rather than to words alone, or as the rest of one."""
        return self.needs_image and not self.continues


TEXT_TO_IMAGE = "Generate an image of {width}x{height} according to the following prompt:\n{prompt}"
DUAL_PANEL = (
    "Generate a dual-panel image of {{width}}x{{height}} where the <{drawn} half> displays a <{{condition}}>,"
    " while the <{kept} half> retains the original image for direct visual comparison:\n{{prompt}}"
)
CONDITIONS = {
    "depth": "depth map",
    "canny": "canny edge map",
    "hed": "hed edge map",
    "pose": "pose estimation map",
}
TASKS = {
    "text-to-image": Task(TEXT_TO_IMAGE, checkpoint="Lumina-mGPT-7B-768"),
    "complete": Task(TEXT_TO_IMAGE, checkpoint="Lumina-mGPT-7B-768", continues=True),
    "pair": Task(DUAL_PANEL.format(drawn="lower", kept="upper"), checkpoint="Lumina-mGPT-2.0", num_panels=2),
    "panel": Task(
        DUAL_PANEL.format(drawn="upper", kept="lower"),
        checkpoint="Lumina-mGPT-2.0-Omni",
        continues=True,
        num_panels=2,
    ),
    "caption": Task("{prompt} <|image|>", "text", "Describe the image in detail."),
    "vqa": Task("{prompt} <|image|>", "text"),
    "edit": Task("{prompt} <|image|>"),
    "depth": Task("Depth estimation. <|image|>"),
    "normal": Task("Surface normal estimation. <|image|>"),
    "pose": Task("Human pose estimation. <|image|>"),
    "segmentation": Task("Semantic segmentation. <|image|>"),
    "detection": Task("Detect: {prompt} <|image|>"),
    "control": Task(
        "Generate an image according to the provided image, and according to the following caption:\n"
        "{prompt} <|image|>"
    ),
    "refine": Task("No edit. <|image|>"),
    "restore": Task(
        "Perceive the degradation level, understand the image content, and restore the high-quality image. <|image|>",
        "text+image",
        checkpoint="PURE",
    ),
}


class LuminaMGPTProcessor(ProcessorMixin):
    """Tokenizer, image processor and VQ model as one.

    Args:
        image_processor: a `LuminaMGPTImageProcessor`.
        tokenizer: one with the published special-token names; `<|image|>` is added if absent.
        chat_template: defaults to the models' own format.
        size_unit_px: pixels of one step of the size tokens.
        codes_per_size_unit: codes on each side of a size unit.
        target_px: side of the square whose area input pictures are cropped to.
        task_templates: user turns of a checkpoint that was trained with others than those in `TASKS`, by task.
        trained_tasks: what the checkpoint was trained for, of `TASKS`; None: not known.

    Attributes:
        vq_tile_px: the VQ model draws the square of so many pixels at a time: several pictures, or one, or of a
            larger one overlapping tiles, which are faded into each other. It may be set, and bounds the memory that
            decoding takes (`decode_bytes`). Tiles share the statistics of their norms, measured in a thumbnail, but
            not all that attention and convolutions see. At 512 x 512 an earlier default checkpoint's pictures in tiles
            of 256 are within 36 to 46 dB (PSNR) of those decoded whole (31 to 36 dB if each had its own statistics);
            those of Chameleon's shape with random weights only within 19 dB.
    """

    tasks = TASKS
    vq_tile_px = 1024

    def __init__(
        self,
        image_processor,
        tokenizer,
        chat_template: str | None = None,
        size_unit_px: int = 32,
        codes_per_size_unit: int = 2,
        target_px: int = 512,
        task_templates: dict[str, str] | None = None,
        trained_tasks: list[str] | None = None,
    ):
        self.uni_rep = UniRep.from_tokenizer(tokenizer, size_unit_px, codes_per_size_unit)
        if IMAGE not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.size_unit_px, self.codes_per_size_unit, self.target_px = size_unit_px, codes_per_size_unit, target_px
        self.task_templates, self.trained_tasks = task_templates or {}, trained_tasks
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        self.bos_token = tokenizer.bos_token or tokenizer.eos_token
        self._pad_token = tokenizer.pad_token or self.bos_token
        self._vqvae = None
        self._bytes_per_code: int | None = None
        self._source: tuple[str, dict[str, Any]] | None = None

    # Loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs):
        """As in transformers; the VQ model beside it, in `vqvae/`, is loaded when first needed.

        A folder's own code is trusted if this class came from such a folder; else as `trust_remote_code` says.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        kwargs.setdefault("trust_remote_code", cls.__module__.startswith("transformers_modules"))
        try:
            processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:  # each of the files in it has errors of its own
            raise OSError(f"{pretrained_model_name_or_path} holds no whole processor: {error}") from error
        processor._source = str(pretrained_model_name_or_path), hub
        return processor

    def to_dict(self) -> dict[str, Any]:
        vqvae, self._vqvae = self._vqvae, None  # the mixin would copy its weights
        try:
            return super().to_dict()
        finally:
            self._vqvae = vqvae

    @property
    def vqvae(self):
        """The `diffusers.VQModel`, in evaluation mode."""
        if self._vqvae is None:
            self.vqvae = self._load_vqvae()
        return self._vqvae

    @vqvae.setter
    def vqvae(self, vqvae):
        if not hasattr(vqvae, "quantize"):
            raise ValueError(f"a VQ model of type {type(vqvae).__name__}: accepted is a diffusers.VQModel")
        px, wanted_px = 2 ** (len(vqvae.config.block_out_channels) - 1), self.size_unit_px / self.codes_per_size_unit
        if px != wanted_px:
            raise ValueError(f"a VQ model with {px} px per code: this processor's layout wants {wanted_px:g}")
        self._vqvae, self._bytes_per_code = vqvae.eval().requires_grad_(False), None

    def _load_vqvae(self):
        from diffusers import VQModel

        if self._source is None:
            raise ValueError("the processor has no VQ model: set `processor.vqvae` to a diffusers.VQModel")
        path, hub = self._source
        try:
            return VQModel.from_pretrained(path, subfolder="vqvae", **hub)
        except OSError as error:
            raise ValueError(
                f"{path} has no VQ model in vqvae/: set `processor.vqvae` to a diffusers.VQModel"
            ) from error

    # Pictures

    def encode_images(
        self,
        images: Sequence[Any],
        target_px: int | None = None,
        random_crop: bool = False,
        generator: torch.Generator | None = None,
        size: tuple[int, int] | None = None,
    ) -> list[Tensor]:
        """Codes of pictures, each cropped to the bucket that suits it; codes among them pass through.

        Args:
            images: PIL images, paths, URLs, bytes, arrays, or codes (rows, cols).
            target_px: side of the square whose area is aimed at.
            random_crop: draw the crops' offsets (from `generator` if given) instead of centring.
            size: `(width_px, height_px)` to crop all to, whatever their shape.

        Returns:
            int64 (rows, cols) on the CPU, one a picture.
        """
        if not isinstance(images, list | tuple):
            raise ValueError(f"images of type {type(images).__name__}: accepted is a list of pictures")
        code_px = self.uni_rep.code_px
        is_size = isinstance(size, list | tuple) and len(size) == 2
        if size is not None and not (is_size and all(is_whole(px, 1) and px % code_px == 0 for px in size)):
            raise ValueError(f"size {size!r}: accepted is (width_px, height_px), multiples of {code_px}")
        codes: list[Any] = [torch.as_tensor(image).long().cpu() if self.is_codes(image) else None for image in images]
        todo = [i for i, known in enumerate(codes) if known is None]
        if todo:
            buckets = [size] if size else self.uni_rep.buckets(self.target_px if target_px is None else target_px)
            source = (generator or torch.default_generator) if random_crop else None
            pictures = self.image_processor([images[i] for i in todo], buckets, source)["pixel_values"]
            for chunk in _chunks(pictures, (self._tile_side() * code_px) ** 2):
                for i, code in zip(chunk, self._encode_pixels(torch.stack([pictures[i] for i in chunk])), strict=True):
                    codes[todo[i]] = code
        return codes

    @staticmethod
    def is_codes(image: Any) -> bool:
        """Whether an image is given as codes (rows, cols): a matrix of 32 or 64-bit integers."""
        is_matrix = isinstance(image, Tensor | np.ndarray) and image.ndim == 2
        return is_matrix and str(image.dtype)[-5:] in ("int32", "int64")

    def encode_image(self, image: Any, target_px: int | None = None) -> Tensor:
        """Codes (rows, cols) of one picture, cropped to the bucket that suits it."""
        return self.encode_images([image], target_px)[0]

    def decode_images(self, codes: Sequence[Any]) -> list[Image.Image]:
        """Pictures of codes (rows, cols), which may differ in size."""
        if not isinstance(codes, list | tuple | Tensor | np.ndarray):
            raise ValueError(f"codes {codes!r}: accepted is a list with (rows, cols) of each picture")
        codes = [self.uni_rep.checked_codes(grid) for grid in codes]
        pictures: list[Any] = [None] * len(codes)
        for chunk in _chunks(codes, self._tile_side() ** 2):
            pixels = self._decode_codes(torch.stack([codes[i] for i in chunk]))
            for i, picture in zip(chunk, self.image_processor.postprocess(pixels), strict=True):
                pictures[i] = picture
        return pictures

    def decode_image(self, codes: Any) -> Image.Image:
        """The picture of codes (rows, cols)."""
        return self.decode_images([codes])[0]

    @torch.no_grad()
    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height_px, width_px) in [-1, 1] -> codes (batch, rows, cols)."""
        device, embedding = self._vq_device, self.vqvae.quantize.embedding
        latents = self.vqvae.encode(pixels.to(device, self.vqvae.dtype)).latents.movedim(1, -1).float()
        codebook = embedding(torch.arange(embedding.num_embeddings, device=device)).float()  # if offloaded, it comes
        # A GPU may round matrix products (TF32); the norms in this one would no longer cancel
        mode = ("donot_use_mm" if device.type != "cpu" else "use_mm") + "_for_euclid_dist"
        codes = torch.cdist(latents.flatten(0, 2), codebook, compute_mode=mode).argmin(-1)
        return codes.view(latents.shape[:3]).cpu()

    @torch.no_grad()
    def _decode_codes(self, codes: Tensor) -> Tensor:
        """(batch, rows, cols) -> pixels (batch, 3, height_px, width_px) in about [-1, 1]; a large one comes alone."""
        (rows, cols), side, px = codes.shape[1:], self._tile_side(), self.uni_rep.code_px
        if rows * cols <= side**2:
            return self._decode_whole(codes)
        overlap, norms = side // MIN_TILE_CODES, SharedNorms()
        with norms:
            self._decode_whole(codes[:, :: -(-rows // side), :: -(-cols // side)])  # a thumbnail
        corners, tiles = tile_corners(cols, rows, side, overlap), []
        for x, y in corners:
            with norms:
                tiles.append(self._decode_whole(codes[:, y : y + side, x : x + side])[0].float())
        corners_px = [(x * px, y * px) for x, y in corners]
        return blend_tiles(tiles, corners_px, cols * px, rows * px, overlap * px)[None]

    def _decode_whole(self, codes: Tensor) -> Tensor:
        return _decoded(self.vqvae, codes.to(self._vq_device))

    def _tile_side(self) -> int:
        """Codes on each side of a tile."""
        side, rest = divmod(self.vq_tile_px, self.uni_rep.code_px) if is_whole(self.vq_tile_px, 1) else (0, 0)
        if rest or side < MIN_TILE_CODES:
            step = self.uni_rep.code_px
            raise ValueError(
                f"vq_tile_px {self.vq_tile_px!r}: accepted are multiples of {step} from {MIN_TILE_CODES * step}"
            )
        return side

    def decode_bytes(self, rows: int, cols: int, num_images: int = 1) -> int:
        """Bytes that decoding pictures of `rows` x `cols` codes needs at the peak, beside the VQ model itself.

        Counted tensor by tensor in a run without storage. What kernels allocate inside is not: on the CPU, for VQ
        models with few channels, another quarter.
        """
        if self._bytes_per_code is None:
            self._bytes_per_code = _float_bytes_per_code(self.vqvae)
        of_code = self._bytes_per_code * self.vqvae.dtype.itemsize // 4
        num_codes, largest = rows * cols, self._tile_side() ** 2
        if num_codes <= largest:
            return min(num_images, largest // num_codes) * num_codes * of_code
        return largest * of_code + num_codes * self.uni_rep.code_px**2 * 4 * BLENDED_CHANNELS

    @property
    def _vq_device(self):
        """With CPU offload, of the whole or of each part, the weights are elsewhere until they are called."""
        hooks = (getattr(part, "_hf_hook", None) for part in self.vqvae.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((device for device in devices if device is not None), self.vqvae.device)

    # Text and pictures -> ids

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        height: int | Sequence[int | None] | None = None,
        width: int | Sequence[int | None] | None = None,
        target_px: int | None = None,
        return_tensors: str | None = "pt",
        padding: bool = True,
        videos: None = None,
        audio: None = None,
    ) -> BatchFeature:
        """Prompts -> ids, padded on the left.

        Args:
            text: prompts. A plain string is one user turn; one that `apply_chat_template` rendered is taken verbatim.
            images: one for each `<|image|>`, in order, flat or nested by text. Pictures without any placeholder go to
                the front, each followed by a space.
            height, width: pixels of the picture to draw, for all or one a text: its start and size tokens are forced.
            target_px: side of the square whose area input pictures are cropped to.
            videos, audio: what transformers' pipelines pass; only None.

        Returns:
            `input_ids` and `attention_mask`, int64 (batch, length).
        """
        texts = _texts(text, "text")
        images = _images_by_text(texts, images)
        if videos is not None or audio is not None:
            raise ValueError("videos and audio are not accepted: the models read text and images")
        heights, widths = _per_text(height, "height", len(texts)), _per_text(width, "width", len(texts))
        codes = iter(self.encode_images(list(chain(*images)), target_px))
        rows = []
        for words, pictures, *size in zip(texts, images, heights, widths, strict=True):
            own = [next(codes) for _ in pictures]
            ids = self._rendered_ids(words, own) if self._is_rendered(words) else self._turn_ids([words], own)[0]
            rows.append(ids + self._size_prefix(*size))
        return self._batch(rows, return_tensors, padding)

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        continue_final_message: bool = False,
        add_generation_prompt: bool = False,
        return_tensors: str | None = "pt",
        images: Any = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        """Messages -> text, or with `tokenize` ids, in which only the template itself writes control tokens.

        Args:
            conversation: messages, or a list of conversations. Content is a string or a list of `{"type": "text",
                "text": ...}` and `{"type": "image", "image": ...}`. A message with `input_ids`, the tokens that the
                model said it with, becomes just these.
            images: the pictures of items that hold none and of `<|image|>` in text; as in `__call__`.
            return_assistant_tokens_mask: adds `assistant_masks`, 1 on answers and their end-of-turn.
            continue_final_message: leave the last answer open.
            add_generation_prompt: changes nothing: there are no role words.
            processor_kwargs, kwargs: `height`, `width` and `target_px`, as in `__call__`; `upper_rows`, codes
                (rows, cols) that the picture to draw begins with, for all or one a conversation. Stock's padding and
                truncation change nothing: rows are padded on the left and never cut.
        """
        is_batched = isinstance(conversation, list | tuple) and isinstance([*conversation, None][0], list | tuple)
        conversations = conversation if is_batched else [conversation]
        for messages in conversations:
            _check_messages(messages)
        if not tokenize:
            return super().apply_chat_template(
                conversation, chat_template, continue_final_message=continue_final_message, **kwargs
            )
        options = {**(processor_kwargs or {}), **kwargs}
        given = options.pop("images", None) if images is None else images
        unknown = {name for name, value in options.items() if value is not None} - TEMPLATE_OPTIONS - STOCK_OPTIONS
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: accepted are {', '.join(sorted(TEMPLATE_OPTIONS))}")
        given = [None] * len(conversations) if given is None else given if is_batched else [given]
        drawn = ("height", "width", "upper_rows")
        sizes = zip(*(_per_text(options.get(name), name, len(conversations)) for name in drawn), strict=True)
        rows, masks = [], []
        for messages, extra, size in zip(conversations, given, sizes, strict=True):
            turns = [super(LuminaMGPTProcessor, self).apply_chat_template([m], chat_template) for m in messages]
            turns = [turn.removeprefix(self.bos_token).removesuffix(END_OF_TURN) for turn in turns]
            turns = [
                whole_numbers(message["input_ids"], "input_ids").tolist() if "input_ids" in message else turn
                for message, turn in zip(messages, turns, strict=True)
            ]
            codes = self.encode_images(_message_images(messages, extra), options.get("target_px"))
            ids, is_answer = self._turn_ids(turns, codes, [message["role"] == "assistant" for message in messages])
            prefix = self._size_prefix(*size)
            rows.append((ids[:-1] if continue_final_message else ids) + prefix)
            masks.append([int(answers) for answers in is_answer[: len(rows[-1]) - len(prefix)]] + [0] * len(prefix))
        batch = self._batch(rows, return_tensors)
        if return_assistant_tokens_mask:
            batch["assistant_masks"] = self._batch(masks, return_tensors, pad_id=0)["input_ids"]
        return batch if return_dict else batch["input_ids"]

    def encode_messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages as in `apply_chat_template`, their pictures as codes, so that no later turn encodes them again."""
        _check_messages(messages)
        encoded = []
        for message in messages:
            content = message["content"]
            if not isinstance(content, str) and "input_ids" not in message:
                content = [
                    {"type": "image", "image": self.encode_image(held)} if held is not None else item
                    for item, held in ((item, _held(item)) for item in content)
                ]
            encoded.append({**message, "content": content})
        return encoded

    def encode_conversation(
        self,
        turns: Sequence[str],
        images: Any = (),
        target_px: int | None = None,
        random_crop: bool = False,
        generator: torch.Generator | None = None,
    ) -> dict[str, list[int]]:
        """A training record: ids and labels, with loss on answers and their end-of-turn only.

        Args:
            turns: user and assistant in turn, with `<|image|>` in place of pictures.
            images: as in `__call__`.
            target_px: side of the square whose area pictures are cropped to (512 unless the processor says otherwise).
            random_crop, generator: as in `encode_images`.

        Returns:
            `input_ids` and `labels` (-100 where there is no loss), lists of the same length.
        """
        turns = _texts(turns, "turns", accepts_one=False)
        codes = self.encode_images(_flat(images), target_px, random_crop, generator)
        ids, is_answer = self._turn_ids(turns, codes, [i % 2 == 1 for i in range(len(turns))])
        labels = [i if answers else IGNORED_LABEL for i, answers in zip(ids, is_answer, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def check_task(self, task: str, allow_untrained: bool = False) -> None:
        """ValueError for a task that does not exist, or that this checkpoint was not trained for."""
        if not isinstance(task, str) or task not in TASKS:
            raise ValueError(f"task {task!r}: accepted are {', '.join(TASKS)}")
        if not allow_untrained and self.trained_tasks is not None and task not in self.trained_tasks:
            raise ValueError(
                f"task {task!r}: this checkpoint was trained for {', '.join(self.trained_tasks)}."
                f" {TASKS[task].checkpoint} does it (allow_untrained=True tries it with this one)"
            )

    def task_prompt(
        self,
        task: str,
        prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        condition: str | None = None,
    ) -> str:
        """The user's turn for a task, with `<|image|>` in place of the picture.

        Args:
            task: a key of `TASKS`; ValueError for others.
            prompt: the user's words, where the task has room for any.
            height, width: pixels of the picture to draw, all panels of it; some tasks state them, if given.
            condition: of two panels, what the other one shows: "depth", "canny", "hed", "pose", or in words.
        """
        self.check_task(task, allow_untrained=True)
        template = self.task_templates.get(task, TASKS[task].template)
        for name, words in (("prompt", prompt), ("condition", condition)):
            if not isinstance(words, str | None):
                raise ValueError(f"{name} {words!r}: accepted is text")
        prompt = prompt if prompt and not prompt.isspace() else TASKS[task].default_prompt
        if bool(prompt) != ("{prompt}" in template):
            raise ValueError(f"task {task!r} takes {'no' if prompt else 'a'} prompt")
        if bool(condition) != ("{condition}" in template):
            raise ValueError(f"task {task!r} takes {'no' if condition else 'a'} condition")
        meant = (condition or "").strip().lower()
        if condition not in CONDITIONS and meant and any(meant in (name, name[:-1]) for name in CONDITIONS):
            raise ValueError(f"condition {condition!r}: accepted are {', '.join(CONDITIONS)}, or a subject in words")
        if self._size_prefix(height, width) == []:
            template = template.replace(" of {width}x{height}", "")
        shown = CONDITIONS.get(condition or "", condition)
        return template.format(prompt=prompt, height=height, width=width, condition=shown)

    def task_message(
        self, task: str, prompt: str | None = None, image: Any = None, allow_untrained: bool = False, **options: Any
    ) -> dict[str, Any]:
        """The user's message for a task, for `apply_chat_template` and the pipeline's `chat`.

        Args:
            task, prompt, options: as in `task_prompt`.
            image: what the task is about, if its words have a place for it; ValueError for one too many or too few.
            allow_untrained: whether it may be one that the checkpoint was not trained for.
        """
        self.check_task(task, allow_untrained)
        before, *after = self.task_prompt(task, prompt, **options).split(IMAGE)
        if len(after) > 1:
            raise ValueError(f"prompt {prompt!r}: accepted is text without {IMAGE}")
        if len(after) != (image is not None):
            raise ValueError(f"task {task!r} takes {'an' if after else 'no'} image")
        content = [{"type": "text", "text": before}]
        if after:
            content += [{"type": "image", "image": image}, {"type": "text", "text": after[0]}]
        return {"role": "user", "content": content}

    # Ids -> text and pictures

    def split_ids(self, ids: Any) -> list[str | Tensor]:
        """What a model said: text, and pictures as codes (rows, cols), in order; ValueError for a malformed picture.

        Of a picture that was cut short, the finished rows remain.
        """
        ids = self._without_padding(ids)
        parts: list[str | Tensor] = []
        while len(ids):
            start = _find(ids, self.uni_rep.start_id)
            end = start + _find(ids[start:], self.uni_rep.end_id) + 1
            text = self.tokenizer.decode(ids[:start], skip_special_tokens=True)
            codes = self.uni_rep.decode(ids[start:end])
            parts += [text] if text.strip() else []
            parts += [codes] if codes.numel() else []
            ids = ids[end:]
        return parts

    def _without_padding(self, ids: Any) -> Tensor:
        """Ids of one row up to the last that is not padding, as follows a row that ended before others."""
        ids = whole_numbers(ids, "ids")
        if ids.numel() and (ids.min() < 0 or (ids.ndim != 1 and len(ids) != 1)):
            raise ValueError(f"ids of shape {tuple(ids.shape)} from {ids.min()}: accepted is a row of ids from 0 on")
        ids = ids.flatten()
        kept = (ids != self.tokenizer.convert_tokens_to_ids(self._pad_token)).nonzero()
        return ids[: int(kept[-1]) + 1] if len(kept) else ids[:0]

    def answer_message(self, ids: Any) -> dict[str, Any]:
        """What a model said as a message, its pictures as codes.

        It keeps the tokens as `input_ids`, so that the next turn sees them as they were; but not with a picture that
        was cut short, which none could follow.
        """
        parts = self.split_ids(ids)
        content = [{"type": "text", "text": x} if isinstance(x, str) else {"type": "image", "image": x} for x in parts]
        message: dict[str, Any] = {"role": "assistant", "content": content}
        said = self._without_padding(ids)
        kept = said[: _find(said, self.uni_rep.end_of_turn_id)].tolist()
        if kept.count(self.uni_rep.start_id) == kept.count(self.uni_rep.end_id):
            message["input_ids"] = kept
        return message

    def decode_ids(self, ids: Any) -> list[str | Image.Image]:
        """What a model said: text and PIL images, in order."""
        parts = self.split_ids(ids)
        pictures = iter(self.decode_images([part for part in parts if not isinstance(part, str)]))
        return [part if isinstance(part, str) else next(pictures) for part in parts]

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens: bool = True, generation_mode: str | None = None, **kwargs
    ):
        """For transformers' "any-to-any" pipeline: the text of each row, or its last picture (None without)."""
        if generation_mode != "image":
            return super().post_process_multimodal_output(
                generated_outputs, skip_special_tokens, generation_mode, **kwargs
            )
        rows = [[part for part in self.split_ids(ids) if not isinstance(part, str)][-1:] for ids in generated_outputs]
        pictures = iter(self.decode_images(list(chain(*rows))))
        return [next(pictures) if row else None for row in rows]

    # The one path from text to ids

    def _turn_ids(
        self, turns: Sequence[Any], images: Sequence[Tensor], is_answer: Sequence[bool] = (False,)
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation of texts and lists of ids, and for each id whether it belongs to an answer."""
        codes = iter(images)
        ids, from_answer = [self.tokenizer.convert_tokens_to_ids(self.bos_token)], [False]
        for turn, answers in zip(_with_placeholders(turns, len(images)), is_answer, strict=True):
            own = self._text_ids(turn, codes, self._plain_ids) if isinstance(turn, str) else turn
            ids += [*own, self.uni_rep.end_of_turn_id]
            from_answer += [answers] * (len(own) + 1)
        return ids, from_answer

    def _rendered_ids(self, text: str, images: Sequence[Tensor]) -> list[int]:
        """Ids of a rendered template, control tokens and all."""
        (turns,) = _with_placeholders([text.removeprefix(self.bos_token)], len(images))
        return self._text_ids(self.bos_token + turns, iter(images), self._control_ids)

    def _is_rendered(self, text: str) -> bool:
        return text.startswith(self.bos_token) and END_OF_TURN in text

    def _text_ids(self, text: str, codes: Iterator[Tensor], text_to_ids: Callable[[str], list[int]]) -> list[int]:
        first, *others = text.split(IMAGE)
        ids = text_to_ids(first)
        for words in others:
            ids = ids + self.uni_rep.encode(next(codes)).tolist() + text_to_ids(words)
        return ids

    def _control_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _plain_ids(self, text: str) -> list[int]:
        """Ids of text in which the names of control tokens are mere words."""
        backend = self.tokenizer.backend_tokenizer
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        words = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, None)]
        return [token.id for word, _ in words for token in backend.model.tokenize(word)]

    def _size_prefix(self, height_px: int | None, width_px: int | None, upper_rows: Any = None) -> list[int]:
        """The tokens that a picture to draw begins with."""
        if height_px is None and width_px is None and upper_rows is None:
            return []
        if height_px is None or width_px is None:
            raise ValueError(f"height {height_px}, width {width_px}: give both or none")
        rows, cols = self.uni_rep.grid(height_px, width_px)
        if upper_rows is None:
            return self.uni_rep.header(rows, cols)
        upper_rows = self.uni_rep.checked_codes(upper_rows)
        if len(upper_rows) >= rows or upper_rows.shape[1] != cols:
            raise ValueError(f"upper rows of {tuple(upper_rows.shape)} codes for a picture of {rows}x{cols}")
        return self.uni_rep.encode(upper_rows, rows).tolist()

    def _batch(
        self, rows: list[list[int]], return_tensors: str | None, padding: bool = True, pad_id: int | None = None
    ) -> BatchFeature:
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors {return_tensors!r}: accepted are None, 'pt' and 'np'")
        if return_tensors and not padding and len({len(row) for row in rows}) > 1:
            raise ValueError(f"padding {padding}: rows of different lengths need return_tensors=None")
        pad_id = self.tokenizer.convert_tokens_to_ids(self._pad_token) if pad_id is None else pad_id
        missing = [max(map(len, rows)) - len(row) if padding else 0 for row in rows]
        ids = [[pad_id] * num + row for num, row in zip(missing, rows, strict=True)]
        mask = [[0] * num + [1] * len(row) for num, row in zip(missing, rows, strict=True)]
        return BatchFeature({"input_ids": ids, "attention_mask": mask}, tensor_type=return_tensors)


def _with_placeholders(turns: Sequence[Any], num_images: int) -> list[Any]:
    """The turns, after a placeholder for each image at the front if there is none anywhere."""
    num_places = sum(turn.count(IMAGE) for turn in turns)
    if num_images and turns and not num_places:
        return [f"{IMAGE} " * num_images + turns[0], *turns[1:]]
    if num_places != num_images:
        raise ValueError(f"{num_images} images for {num_places} placeholders {IMAGE}")
    return list(turns)


def _images_by_text(texts: Sequence[str], images: Any) -> list[list[Any]]:
    """Each text's own images, from one image, a flat list or a list nested by text."""
    if isinstance(images, list | tuple) and any(image is None or isinstance(image, list | tuple) for image in images):
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} lists of images for {len(texts)} texts")
        return [_flat(own) for own in images]
    images = _flat(images)
    if len(texts) == 1 or not images:
        return [images, *[[]] * (len(texts) - 1)]
    places = [text.count(IMAGE) for text in texts]
    if sum(places) != len(images):
        places = [max(num, 1) for num in places]
    if sum(places) != len(images):
        raise ValueError(f"{len(images)} images for {sum(places)} places in {len(texts)} texts")
    left = iter(images)
    return [list(islice(left, num)) for num in places]


def _texts(texts: Any, name: str, accepts_one: bool = True) -> list[str]:
    """A list of strings, at least one."""
    found = [texts] if isinstance(texts, str) and accepts_one else texts
    if not isinstance(found, list | tuple) or not found or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{name} {texts!r}: accepted is {'a string or ' * accepts_one}a list of strings")
    return list(found)


def _check_messages(messages: Any) -> None:
    """ValueError for what is no list of messages as `apply_chat_template` has them."""
    if not isinstance(messages, list | tuple) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"messages {messages!r}: accepted is a list of {{'role': ..., 'content': ...}}")
    if not messages:
        raise ValueError("an empty conversation: at least one message is needed")
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant"):
            raise ValueError(f"role {role!r}: accepted are 'user' and 'assistant'")
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(items, list | tuple) or not all(isinstance(item, dict) for item in items):
            raise ValueError(f"content {content!r}: accepted is text, or a list of {{'type': 'text' or 'image', ...}}")
        for item in items:
            if item.get("type") not in ("text", "image"):
                raise ValueError(f"content of type {item.get('type')!r}: accepted are 'text' and 'image'")
            if item["type"] == "text" and not isinstance(item.get("text"), str):
                raise ValueError(f"text {item.get('text')!r} in a message: accepted is a string")
        if whole_numbers(message.get("input_ids", []), "input_ids").ndim != 1:
            raise ValueError(f"input_ids {message['input_ids']!r}: accepted is one row of ids")


def _held(item: dict[str, Any]) -> Any:
    """The image that an item of a message holds, or None."""
    found = (item[key] for key in ("image", "path", "url") if item.get(key) is not None)
    return next(found, None) if item["type"] == "image" else None


def _message_images(messages: Sequence[dict[str, Any]], given: Any) -> list[Any]:
    """The images of messages in order; those that a message only has a place for come from `given`."""
    found: list[Any] = []
    left = iter(_flat(given))
    for message in messages:
        content = message["content"] if "input_ids" not in message else []
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            held = [] if _held(item) is None else [_held(item)]
            num_places = 1 if item["type"] == "image" else item["text"].count(IMAGE)
            found += held or islice(left, num_places)
    return [*found, *left]


def _flat(images: Any) -> list[Any]:
    """One image, a stack of them, or a list, as a list."""
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return list(chain(*map(_flat, images)))
    return list(images) if isinstance(images, Tensor | np.ndarray) and images.ndim == 4 else [images]


def _per_text(value: Any, name: str, num_texts: int) -> list[Any]:
    values = list(value) if isinstance(value, list | tuple) else [value] * num_texts
    if len(values) != num_texts:
        raise ValueError(f"{name} has {len(values)} values for {num_texts} texts")
    return values


def _find(ids: Tensor, wanted: int) -> int:
    """Position of an id, or the length where there is none."""
    places = (ids == wanted).nonzero()
    return int(places[0]) if len(places) else len(ids)


def _chunks(tensors: Sequence[Tensor], num_entries: int) -> Iterator[list[int]]:
    """Indices of tensors of one shape with at most so many entries (of a channel) in all, or of one tensor."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_shape.setdefault(tuple(tensor.shape[-2:]), []).append(i)
    for (rows, cols), indices in by_shape.items():
        size = max(1, num_entries // (rows * cols))
        yield from (indices[i : i + size] for i in range(0, len(indices), size))


class SharedNorms(TorchFunctionMode):
    """Has each group norm use the mean and variance that it found in the first run under this mode."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []  # in the order of calls

    def __enter__(self):
        self.calls = count()
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (self.group_norm if func is F.group_norm else func)(*args, **(kwargs or {}))

    def group_norm(self, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """(1, channels, ...) to the same."""
        call = next(self.calls)
        if call == len(self.found):
            groups = x.unflatten(1, (num_groups, -1)).flatten(2)  # (1, groups, rest)
            self.found.append(torch.var_mean(groups, -1, correction=0))
        variance, mean = (value[0].repeat_interleave(len(weight) // num_groups) for value in self.found[call])
        scale = weight * (variance + eps).rsqrt()
        shape = (-1, *[1] * (x.ndim - 2))
        return torch.addcmul((bias - mean * scale).view(shape), x, scale.view(shape))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that live at a time, but for those given; `peak` is the most."""

    def __init__(self, given: Iterable[Tensor]):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in given}  # by storage
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(made) if isinstance(x, Tensor)):
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return made


def _decoded(vqvae, codes: Tensor) -> Tensor:
    shape = (*codes.shape, vqvae.quantize.embedding.embedding_dim)
    return vqvae.decode(codes, force_not_quantize=True, shape=shape).sample


def _float_bytes_per_code(vqvae) -> int:
    """What decoding takes in float32 for each code, whatever their number, by a twin of the model without storage."""
    with torch.device("meta"), torch.no_grad():
        twin, codes = type(vqvae).from_config(vqvae.config), torch.zeros(1, 8, 8, dtype=torch.long)
        with LiveBytes(twin.parameters()) as live:
            _decoded(twin, codes)
    return live.peak // codes.numel()


LuminaMGPTProcessor.register_for_auto_class()
