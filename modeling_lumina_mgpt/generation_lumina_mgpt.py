"""`generate` for text and images in one stream: what may be asked for, prompts and sizes (2408.02657, 2.4).

It runs inside transformers' `generate`, which validates, merges configurations and makes the logits processors and
stopping criteria; the loop is the engine's, in `decoding_lumina_mgpt`. What differs from stock: every row of a batch
is in a state of its own (in text, or at some line and column of its image); guidance is the second half of one doubled
batch, whose rows see only the tokens from their image's start on; what the grammar determines is not sampled; and
every random number is a pure function of (row seed, position, token id), so that a row draws the same image whatever
its neighbours, its cache and its device.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import LongTensor, Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import CompileConfig, GenerationConfig, GenerationMixin, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria

from .decoding_lumina_mgpt import COLUMNS, KEPT, Decoder, Prompt, rounded_columns
from .uni_rep import ImageLayout, is_whole, whole_numbers

NO_STOCK_SEARCH = {"guidance_scale": 1.0, "num_beams": 1}  # stock's guidance runs the model twice
NO_STOCK_WARPERS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0}
NO_STOCK_WARPERS |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0}

LOWEST = {"guidance_scale": 0, "image_top_k": 1, "text_top_k": 1, "image_temperature": 1e-6, "text_temperature": 1e-6}
SAMPLING = tuple(LOWEST)  # what a prompt may have of its own
UNSUPPORTED = ("num_beams", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "assistant_model")
FORWARDS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "past_key_values")


class ContextTooShort(ValueError):
    """A prompt, or the image that is asked for, does not fit into the model's context."""


@dataclass
class DecodingSettings:
    """What `generate` was asked for, defaults filled in. Fields of type Any: a scalar, or one a prompt."""

    guidance_scale: Any = 4.0
    guidance_schedule: str | None = None
    image_top_k: Any = 2000
    text_top_k: Any = 5
    image_temperature: Any = 1.0
    text_temperature: Any = 1.0
    top_k_schedule: str | None = None
    do_sample: bool = True
    decoding: str = "ar"
    window: int | str = 16
    draft: str = "left"
    guidance_end: float = 1.0

    def __post_init__(self):
        accepted: dict[str, tuple] = {"guidance_schedule": (None, "decay"), "top_k_schedule": (None, "entropy")}
        accepted |= {"decoding": ("ar", "jacobi", "gumbel"), "do_sample": (True, False)}
        accepted |= {"draft": ("uniform", "above", "left")}
        for name, values in accepted.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted are {', '.join(map(repr, values))}.")
        if self.window != "auto" and not is_whole(self.window, 2):
            raise ValueError(f"window is {self.window!r}; accepted are 'auto' and 2, 3, 4, ...")
        if not isinstance(self.guidance_end, int | float) or not 0 <= self.guidance_end <= 1:
            raise ValueError(f"guidance_end is {self.guidance_end!r}; accepted are 0 to 1, a share of the image.")
        for name, lowest in LOWEST.items():
            for value in _as_list(getattr(self, name)):
                is_number = not isinstance(value, bool) and isinstance(value, Real) and bool(value < 2**31)  # nor nan
                if not is_number or value < lowest or (name.endswith("top_k") and not is_whole(value, lowest)):
                    kind = "whole number" if name.endswith("top_k") else "number"
                    raise ValueError(
                        f"{name} is {value!r}; it must be a {kind} of at least {lowest} (do_sample=False is greedy)."
                    )


@dataclass
class LuminaMGPTGenerateOutput(GenerateDecoderOnlyOutput):
    """Stock output, and how it came about.

    Attributes:
        window: tokens that a step looked at; 1 of "ar".
        num_steps: `(batch)` steps that each row took, each a forward of all rows together.
    """

    window: int | None = None
    num_steps: Any = None


class LuminaMGPTGenerationMixin(GenerationMixin):
    """`generate` for text and images in one stream."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config=None,
        streamer=None,
        *,
        height: int | list[int | None] | None = None,
        width: int | list[int | None] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        callback_on_step_end: Callable[[LongTensor, Tensor], bool | None] | None = None,
        **kwargs,
    ) -> LongTensor | LuminaMGPTGenerateOutput:
        """Continues each row with text and images until it ends.

        Besides stock's arguments (`input_ids`, `attention_mask`, `max_new_tokens`, `num_return_sequences`,
        `stopping_criteria`, `logits_processor`, `compile_config`, ...):

        Args:
            height, width: pixels of an image that each row must draw first, one for all or one per prompt (None: the
                model decides whether to draw, and how large). Prompts that already end in size tokens need none.
            guidance_scale: `l' + s (l - l')` on image codes; the unconditional scores `l'` see only the tokens from
                the image's start on. One for all or one per prompt; 1 skips it.
            guidance_schedule: None or "decay" (Lumina-mGPT 2.0).
            guidance_end: the share of each image, 0 to 1, that is guided. Under 1 is faster and another distribution.
            image_top_k, text_top_k, image_temperature, text_temperature: sampling inside and outside of images; one
                for all or one per prompt. Stock's `top_k` and `temperature` set both; `do_sample=False` is greedy.
            top_k_schedule: None or "entropy" (PURE: the flatter the scores, the more candidates).
            decoding: "ar", a code a step; "gumbel", the same codes in fewer steps; "jacobi", others of the same
                distribution. With logits processors all are "ar".
            window: tokens that a step of "gumbel" and "jacobi" looks at, or "auto": the fastest of some, tried once.
            draft: what these two take codes for at first: "uniform", the ones "above", or to the "left".
            generator: one for all, or one per returned row; each row draws a 64-bit seed from its own.
            negative_prompt_ids, negative_prompt_attention_mask: `(prompts, length)`, left-padded; tokens that the
                unconditional branch sees before the image.
            compile_config: compiles the step on a CPU, too; on a GPU it is, with a CUDA graph, unless
                `disable_compile`.
            callback_on_step_end: called after each step as `callback(new_ids, num_new)`, with each row's new ids
                `(rows, longest)`, padded on the right, and how many there are; True ends all rows.

        Returns:
            `LongTensor (batch, length)`: prompt and continuation, padded on the right; or
            `LuminaMGPTGenerateOutput` with `return_dict_in_generate`.

        Raises:
            ValueError: for a size without a representation or without room, and for values outside those named above.
        """
        call = self._begin(
            inputs,
            generation_config,
            streamer,
            height=height,
            width=width,
            generator=generator,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            callback_on_step_end=callback_on_step_end,
            **kwargs,
        )
        return call.collect()

    @torch.no_grad()
    def stream(
        self, inputs: Tensor | None = None, generation_config=None, *, batch_size: int = 8, **kwargs
    ) -> Iterator[tuple[int, LuminaMGPTGenerateOutput]]:
        """Yields each row's number and output as soon as it ends, and gives its place to the next.

        Args:
            batch_size: rows at a time. Others are those of `generate`.

        Yields:
            Its number, and as `sequences (1, length)` its new ids alone.
        """
        if not is_whole(batch_size, 1):
            raise ValueError(f"batch_size is {batch_size!r}; accepted are 1, 2, 3, ...")
        call = self._begin(inputs, generation_config, batch_size=batch_size, **kwargs)
        return call.stream()

    def cache_bytes(self, num_rows: int, num_tokens: int, may_compile: bool = True) -> int:
        """Keys and values of so many rows, those of guidance counted apart, of so many tokens; and room for drafts.

        Compiled steps, which a call may do without, have more room.
        """
        config, is_compiled = self.config, self._compile_config(self.generation_config) is not None
        num_columns = rounded_columns(num_tokens + COLUMNS, is_compiled and may_compile)
        head_dim = config.hidden_size // config.num_attention_heads
        num_values = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim  # of a token
        return num_rows * num_columns * num_values * self.dtype.itemsize

    def free_cache(self) -> bool:
        """Gives back what compiled steps keep from call to call; whether there was any."""
        return self.__dict__.pop(KEPT, None) is not None

    def _begin(
        self,
        inputs: Tensor | None,
        generation_config,
        streamer=None,
        *,
        height=None,
        width=None,
        generator=None,
        negative_prompt_ids: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        callback_on_step_end: Callable | None = None,
        batch_size: int | None = None,
        **kwargs,
    ) -> "_Call":
        """Checks what `generate` was asked for, and lets stock prepare the rest of it."""
        if self.config.image_layout is None:
            raise ValueError(
                "config.image_layout is None: take it from UniRep.from_tokenizer(tokenizer).layout_dict()."
            )
        settings = self._decoding_settings(generation_config, kwargs)
        if kwargs.get("max_new_tokens", 0) is None:
            del kwargs["max_new_tokens"]  # or stock would forget the generation config's
        given = kwargs.pop("input_ids", None)
        if (inputs is None) == (given is None):
            raise ValueError(f"{'no' if given is None else 'both inputs and'} input_ids; accepted is one of them.")
        ids, mask = self._checked_prompts(
            given if inputs is None else inputs, kwargs.pop("attention_mask", None), "input_ids"
        )
        if not mask[:, -1].all():
            raise ValueError("attention_mask ends with 0; accepted are prompts that are padded on the left.")
        if ids.device.type == "cpu" and self.device.type != "meta":
            ids, mask = ids.to(self.device), mask.to(self.device)
        wants_picture = kwargs.pop("generation_mode", None) == "image"  # says the any-to-any pipeline
        if wants_picture and height is width is None:
            height, width = self.config.default_height_px, self.config.default_width_px

        def asked(name: str) -> Any:
            found = [kwargs.get(name)] + [getattr(c, name, None) for c in (generation_config, self.generation_config)]
            return next((value for value in found if value is not None), None)

        for name in ("num_return_sequences", "max_new_tokens", "max_length"):
            if asked(name) is not None and not is_whole(asked(name), 1):
                raise ValueError(f"{name} is {asked(name)!r}; accepted are 1, 2, 3, ...")
        if asked("eos_token_id") is not None:
            whole_numbers(asked("eos_token_id"), "eos_token_id")
        copies = kwargs["num_return_sequences"] = asked("num_return_sequences") or 1
        if asked("max_new_tokens") is None and asked("max_length") is None:
            kwargs["max_new_tokens"] = max(1, self.config.max_position_embeddings - int(mask.sum(1).min()))
        elif asked("max_new_tokens") is None and asked("max_length") <= ids.shape[1]:
            raise ValueError(f"max_length is {asked('max_length')}, and the prompt has {ids.shape[1]} tokens.")
        decoder = partial(
            self._decoder,
            settings=settings,
            prompts=_unpadded(ids, mask),
            negative=self._negative_prompts(negative_prompt_ids, negative_prompt_attention_mask, len(ids)),
            wanted=self._wanted_grid(height, width, len(ids)),
            seeds=_draw_seeds(generator, len(ids) * copies).tolist(),
            batch_size=batch_size,
        )

        def prepare(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs) -> _Call:
            """Stands where stock's loop does, with all that stock has prepared for it."""
            room = generation_config.max_length - input_ids.shape[1]
            made = decoder(max_new_tokens=room, generation_config=generation_config, processors=logits_processor)
            own = [c for c in stopping_criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
            as_dict = generation_config.return_dict_in_generate
            return _Call(made, input_ids, as_dict, StoppingCriteriaList(own), streamer, callback_on_step_end)

        call: Any = super().generate(
            ids,
            generation_config,
            attention_mask=mask,
            custom_generate=prepare,
            do_sample=settings.do_sample,
            **kwargs,
            **NO_STOCK_SEARCH,
            **(NO_STOCK_WARPERS if settings.do_sample else {}),
        )
        return call

    def _decoder(
        self,
        settings: DecodingSettings,
        prompts: list[Tensor],
        negative: list[Tensor],
        wanted: list[tuple[int, int]],
        seeds: list[int],
        batch_size: int | None,
        max_new_tokens: int,
        generation_config: Any,
        processors: list,
    ) -> Decoder:
        """The engine, with one row for each seed: each prompt's copies follow each other."""
        given = {name: _per_prompt(getattr(settings, name), name, len(prompts)) for name in SAMPLING}
        begun = [
            self._begun(row, ids, wanted[row], negative[row], max_new_tokens)
            | {"sampling": {name: values[row] for name, values in given.items()}}
            for row, ids in enumerate(prompts)
        ]
        copies = len(seeds) // len(prompts)
        pad_id, end_ids = generation_config._pad_token_tensor, generation_config._eos_token_tensor
        return Decoder(
            self,
            settings,
            [Prompt(**begun[row // copies], seed=seed) for row, seed in enumerate(seeds)],
            num_rows=min(batch_size or len(seeds), len(seeds)),
            end_ids=[] if end_ids is None else end_ids.tolist(),
            pad_id=0 if pad_id is None else int(pad_id),  # stock's: the end of a turn where there is no padding token
            processors=processors,
            compile_config=None if processors else self._compile_config(generation_config),
        )

    def _compile_config(self, generation_config: Any) -> CompileConfig | None:
        """How to compile the steps: as is asked for, else by default on a GPU that has the whole model; None: not."""
        if generation_config.disable_compile or generation_config.compile_config is not None:
            return None if generation_config.disable_compile else generation_config.compile_config
        quantizer, device_map = getattr(self, "hf_quantizer", None), getattr(self, "hf_device_map", {})
        is_whole_on_gpu = self.device.type == "cuda" and len({*device_map.values()}) < 2
        return CompileConfig() if is_whole_on_gpu and getattr(quantizer, "is_compileable", True) else None

    def _begun(
        self, row: int, ids: Tensor, wanted: tuple[int, int], negative: Tensor, max_new_tokens: int
    ) -> dict[str, Any]:
        """Where a prompt `(length)` stands, with the size tokens of the image asked for, which must have room."""
        layout, context = ImageLayout(**self.config.image_layout), self.config.max_position_embeddings
        length = len(ids)
        room = min(context - length, max_new_tokens)
        if room <= 0:
            raise ContextTooShort(f"row {row}: {length} prompt tokens leave no room in a context of {context}.")

        # 1. The image that the prompt has begun, or is to begin
        starts, ends = ((ids == i).nonzero().flatten().tolist() for i in (layout.start_id, layout.end_id))
        is_begun = bool(starts) and starts[-1] > max(ends, default=-1)
        first = starts[-1] if is_begun else length
        sizes = (layout.size_of_id(ids[first + 1 : first + 3]) * layout.codes_per_size_unit).tolist()
        rows, cols = wanted[0] if not sizes else sizes[0], wanted[1] if len(sizes) < 2 else sizes[1]
        is_asked = wanted[0] > 0 and (not is_begun or (rows, cols) == wanted)
        if is_begun and not layout.is_beginning(ids[first:], rows, cols):
            raise ValueError(f"row {row}: what follows the image's start, token {first}, is the beginning of none.")

        # 2. Its room. What was asked for needs it; what the prompt begins the user may cut short, but not the context
        step = length - first
        if is_begun or is_asked:
            smallest = layout.codes_per_size_unit
            rows_at_least, cols_at_least = max(rows, smallest), max(cols, smallest)
            needed = layout.num_tokens(rows_at_least, cols_at_least) - step
            if needed > (room if is_asked or step < 3 else context - length):
                raise ContextTooShort(
                    f"row {row}: an image of {rows_at_least}x{cols_at_least} codes takes {needed} more tokens, and"
                    f" {room} are left (context {context}, prompt {length}, max_new_tokens {max_new_tokens})."
                )

        # 3. The tokens that are known already
        if wanted[0] > 0 and step < 3:
            ids = torch.cat([ids, torch.tensor(layout.header(rows, cols)[step:])])
            step = 3
        return {
            "ids": ids,
            "num_given": length,
            "context": torch.cat([negative, ids[first:]]),
            "num_negative": len(negative),
            "step": step,
            "rows": rows if step > 1 else 0,
            "cols": cols if step > 2 else 0,
            "limit": length + room,
        }

    def _checked_prompts(self, ids: Any, mask: Any, name: str) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 (prompts, length); ValueError for other shapes, ids that do not exist, other masks."""
        ids, device = whole_numbers(ids, name), getattr(ids, "device", "cpu")
        mask = mask.long() if isinstance(mask, Tensor) and mask.dtype == torch.bool else mask
        mask = torch.ones_like(ids) if mask is None else whole_numbers(mask, f"the mask of {name}")
        if ids.ndim != 2 or not ids.numel():
            raise ValueError(f"{name} of shape {tuple(ids.shape)}; accepted is (batch, length).")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(
                f"{name} are {int(ids.min())} to {int(ids.max())}; accepted are 0 to {self.config.vocab_size - 1}."
            )
        if mask.shape != ids.shape or not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"the mask of {name} is {tuple(mask.shape)}; accepted are 0 and 1, {tuple(ids.shape)}.")
        return ids.to(device), mask.to(device).long()

    def _negative_prompts(self, ids: Any, mask: Any, num_prompts: int) -> list[Tensor]:
        """One `(length)` for each prompt, empty where none are given."""
        if ids is None:
            return [torch.zeros(0, dtype=torch.long)] * num_prompts
        ids, mask = self._checked_prompts(ids, mask, "negative_prompt_ids")
        if len(ids) != num_prompts:
            raise ValueError(f"{len(ids)} negative prompts for {num_prompts} prompts.")
        return _unpadded(ids, mask)

    def _decoding_settings(self, generation_config, kwargs: dict) -> DecodingSettings:
        """Takes our arguments out of `kwargs`; the others come from the generation configs, then from the defaults."""
        if not isinstance(generation_config, GenerationConfig | None):
            raise ValueError(f"generation_config is {generation_config!r}; accepted is a GenerationConfig.")
        for name in ("height", "width"):
            if getattr(generation_config, name, None) is not None:
                raise ValueError(f"{name} is in the generation_config; accepted is the call itself.")
        for name in UNSUPPORTED:
            for value in (kwargs.pop(name, None), getattr(generation_config, name, None)):
                if value not in (None, 0, 1):  # which switch it off
                    raise ValueError(f"{name}={value!r} is not supported; sampling is by top_k and temperature.")
        for name in FORWARDS:
            if kwargs.pop(name, None) not in (None, False):
                raise ValueError(
                    f"{name} is not supported: steps differ from tokens; `model(input_ids)` is a forward."
                )
        given = {name: kwargs.pop(name) for name in list(DecodingSettings.__dataclass_fields__) if name in kwargs}
        for stock in ("top_k", "temperature"):
            value = kwargs.pop(stock, None)
            if value is not None:
                given = {f"image_{stock}": value, f"text_{stock}": value} | given
        found = {name: value for name, value in given.items() if value is not None}
        for config in (generation_config, self.generation_config):
            for name in DecodingSettings.__dataclass_fields__:
                stock = name.removeprefix("image_").removeprefix("text_")
                value = getattr(config, name, None)
                value = getattr(config, stock, None) if value is None else value
                if value is not None:
                    found.setdefault(name, value)
        return DecodingSettings(**found)

    def _wanted_grid(self, height, width, num_prompts: int) -> list[tuple[int, int]]:
        """Code rows and columns that each prompt's image must have, 0 for any."""
        layout = ImageLayout(**self.config.image_layout)
        heights, widths = _per_prompt(height, "height", num_prompts), _per_prompt(width, "width", num_prompts)
        grids = []
        for height_px, width_px in zip(heights, widths, strict=True):
            if (height_px is None) != (width_px is None):
                raise ValueError(f"height={height_px} and width={width_px}: give both or neither.")
            grids.append(layout.grid(height_px, width_px) if height_px is not None else (0, 0))
        return grids


class _Call:
    """One call of `generate`: the engine, and who listens to it.

    Args:
        ids: `(rows, length)` the prompts as they were given.
        as_dict: whether an output object is wanted.
    """

    def __init__(
        self,
        decoder: Decoder,
        ids: Any,
        as_dict: bool,
        criteria: StoppingCriteriaList,
        streamer: Any,
        callback: Callable | None,
    ):
        self.decoder, self.ids, self.as_dict = decoder, ids, as_dict
        self.criteria, self.streamer, self.callback = criteria, streamer, callback
        self.num_streamed = 0
        if streamer is not None and len(decoder.prompts) > 1:
            raise ValueError(f"a streamer for {len(decoder.prompts)} rows; accepted is one.")
        if criteria or streamer is not None or callback is not None:
            decoder.hook = self._after_step

    def stream(self) -> Iterator[tuple[int, LuminaMGPTGenerateOutput]]:
        """Decodes all rows, each yielded when it has ended."""
        if self.streamer is not None:
            self.streamer.put(self.ids.cpu())
        for row, ids, num_steps in self.decoder.run():
            yield row, LuminaMGPTGenerateOutput(ids[None].clone(), window=self.decoder.window, num_steps=num_steps)
        if self.streamer is not None:
            self.streamer.end()

    def collect(self) -> LongTensor | LuminaMGPTGenerateOutput:
        """Decodes all rows; what `generate` returns."""
        outputs = dict(self.stream())
        new_ids = [outputs[row].sequences[0] for row in range(len(self.ids))]
        padded = pad_sequence([ids.to(self.ids.device) for ids in new_ids], True, self.decoder.pad_id)
        sequences: Any = torch.cat([self.ids, padded], 1)
        if not self.as_dict:
            return sequences
        num_steps = torch.tensor([int(outputs[row].num_steps) for row in sorted(outputs)])
        return LuminaMGPTGenerateOutput(sequences, window=self.decoder.window, num_steps=num_steps)

    def _after_step(self, decoder: Decoder) -> Tensor:
        """Tells everyone; which rows to end. `(rows)`"""
        stop = torch.zeros_like(decoder.running)
        if self.streamer is not None:
            new_ids, _ = decoder.new_ids()
            self.streamer.put(new_ids[0, self.num_streamed :].cpu())
            self.num_streamed = new_ids.shape[1]
        if self.criteria:
            stop |= self.criteria(decoder.final_ids(), None)
        if self.callback is not None and self.callback(*decoder.new_ids()):
            decoder.waiting.clear()
            stop |= True
        return stop


def _unpadded(ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The tokens of each row `(length)` that its mask has, on the CPU."""
    return [own[seen.bool()] for own, seen in zip(ids.cpu(), mask.cpu(), strict=True)]


def _draw_seeds(generator, num_rows: int) -> Tensor:
    """One 64-bit seed per row `(num_rows)`, the same whichever device the generators live on."""
    if not isinstance(generator, list | tuple):
        return _draw(generator, num_rows)
    if len(generator) != num_rows:
        raise ValueError(f"{len(generator)} generators for {num_rows} rows: give one, or one per returned row.")
    return torch.cat([_draw(g, 1) for g in generator])


def _draw(generator: torch.Generator | None, count: int) -> Tensor:
    """`count` seeds on the CPU; a generator of another device is followed by its seed and offset, and moves on."""
    if not isinstance(generator, torch.Generator | None):
        raise ValueError(f"generator {generator!r}; accepted is a torch.Generator, or a list with one per row.")
    skipped, source = 0, generator
    if generator is not None and generator.device.type != "cpu":
        skipped = generator.get_offset() // 4
        source = torch.Generator().manual_seed(generator.initial_seed())
        generator.set_offset(4 * (skipped + count))
    draws = torch.randint(-(2**63), 2**63 - 1, (skipped + count,), generator=source)
    return draws[skipped:]


def _as_list(value) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _per_prompt(value, name: str, num_prompts: int) -> list:
    if not isinstance(value, list | tuple):
        return [value] * num_prompts
    if len(value) != num_prompts:
        raise ValueError(f"{name} has {len(value)} values for {num_prompts} prompts.")
    return list(value)
