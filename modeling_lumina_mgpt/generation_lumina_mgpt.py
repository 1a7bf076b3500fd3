"""Decoding of text and images in one stream: guidance, grammar, state-aware sampling, the loop (2408.02657, 2.4).

It runs inside transformers' `generate`, which validates, prepares the cache and supplies the stopping criteria. What
differs from stock: every row of a batch is in a state of its own (in text, or at some line and column of its image);
guidance is the second half of one doubled batch, whose rows see only the tokens from their image's start on; what the
grammar determines is not sampled; and every random number is a pure function of (row seed, position, token id), so
that a row draws the same image whatever its neighbours, its cache and its device.
"""

from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from .uni_rep import ImageLayout, is_whole, whole_numbers

MIN_DECAYED_SCALE = 4.0  # Lumina-mGPT 2.0 lets a decaying guidance scale fall to here
ENTROPY_TOP_K = (1, 2000)  # the range of PURE's top-k by entropy
MASK_32 = 0xFFFFFFFF

NO_STOCK_SEARCH = {"guidance_scale": 1.0, "num_beams": 1}  # stock's guidance runs the model twice
NO_STOCK_WARPERS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0}
NO_STOCK_WARPERS |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0}

LOWEST = {"guidance_scale": 0, "image_top_k": 1, "text_top_k": 1, "image_temperature": 1e-6, "text_temperature": 1e-6}
UNSUPPORTED = ("num_beams", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "assistant_model")


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

    def __post_init__(self):
        accepted: dict[str, tuple] = {"guidance_schedule": (None, "decay"), "top_k_schedule": (None, "entropy")}
        accepted |= {"decoding": ("ar",), "do_sample": (True, False)}
        for name, values in accepted.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted are {', '.join(map(repr, values))}.")
        for name, lowest in LOWEST.items():
            for value in _as_list(getattr(self, name)):
                is_number = not isinstance(value, bool) and isinstance(value, Real) and bool(value < 2**31)  # nor nan
                if not is_number or value < lowest or (name.endswith("top_k") and not is_whole(value, lowest)):
                    kind = "whole number" if name.endswith("top_k") else "number"
                    raise ValueError(
                        f"{name} is {value!r}; it must be a {kind} of at least {lowest} (do_sample=False is greedy)."
                    )


@dataclass
class RowState:
    """Where each row of the batch stands. All tensors are `(batch)` and stay on the device.

    Attributes:
        step: tokens since and including the start token, 0 in text.
        rows, cols: code grid of the current image, 0 where not known yet.
        wanted_rows, wanted_cols: the grid that was asked for, 0 for any; cleared once its image has begun.
        length: tokens of the row, padding left out; the position of its next token.
        room: tokens that the row may still get.
        context_start: column from which the unconditional branch sees the row.
        scale: guidance scale, as decayed so far; `given_scale` is where each image starts.
    """

    layout: ImageLayout
    step: Tensor
    rows: Tensor
    cols: Tensor
    wanted_rows: Tensor
    wanted_cols: Tensor
    length: Tensor
    room: Tensor
    context_start: Tensor
    scale: Tensor
    given_scale: Tensor = field(init=False)

    def __post_init__(self):
        self.given_scale = self.scale.clone()

    @classmethod
    def of_prompt(
        cls, layout: ImageLayout, ids: Tensor, mask: Tensor, wanted: tuple[Tensor, Tensor], room: Tensor, scale: Tensor
    ):
        """Reads the state off prompts `(batch, length)`, which may end inside an image."""
        columns = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        last_start, last_end = (((ids == i) & mask.bool()) * columns for i in (layout.start_id, layout.end_id))
        last_start, last_end = last_start.amax(1), last_end.amax(1)
        step = torch.where(last_start > last_end, ids.shape[1] - last_start + 1, 0)
        sizes = [
            layout.size_of_id(ids.gather(1, (last_start + i).clamp(max=ids.shape[1] - 1)[:, None])[:, 0])
            for i in (0, 1)
        ]
        rows, cols = (torch.where(step > i, size * layout.codes_per_size_unit, 0) for i, size in enumerate(sizes, 1))
        return cls(
            layout=layout,
            step=step,
            rows=torch.where(step == 1, wanted[0], rows),
            cols=torch.where((step == 1) | (step == 2), wanted[1], cols),
            wanted_rows=torch.where(step > 0, 0, wanted[0]),
            wanted_cols=torch.where(step > 0, 0, wanted[1]),
            length=mask.sum(1),
            room=room,
            context_start=torch.where(step > 0, last_start - 1, ids.shape[1] - 1),
            scale=scale,
        )

    def forced(self) -> Tensor:
        """The token that must come next, -1 where there is a choice."""
        start = torch.where((self.step == 0) & (self.wanted_rows > 0), self.layout.start_id, -1)
        return torch.maximum(start, self.layout.forced_next(self.step, self.rows, self.cols))

    def advance(self, tokens: Tensor, column: int) -> None:
        """Takes the tokens `(batch)` that were written to `column`."""
        codes_per_unit = self.layout.codes_per_size_unit
        starts = tokens == self.layout.start_id
        self.rows = torch.where(starts, self.wanted_rows, self.rows)
        self.cols = torch.where(starts, self.wanted_cols, self.cols)
        self.scale = torch.where(starts, self.given_scale, self.scale)
        size = self.layout.size_of_id(tokens) * codes_per_unit
        self.rows = torch.where(self.step == 1, size, self.rows)
        self.cols = torch.where(self.step == 2, size, self.cols)
        self.step = torch.where(starts, 1, torch.where(self.step > 0, self.step + 1, 0))
        self.step = torch.where(tokens == self.layout.end_id, 0, self.step)
        self.wanted_rows, self.wanted_cols = (torch.where(starts, 0, x) for x in (self.wanted_rows, self.wanted_cols))
        self.context_start = torch.where((self.step > 1), self.context_start, column)
        self.length, self.room = self.length + 1, self.room - 1

    def decay_guidance(self) -> None:
        """2.0's schedule: `s = max(4, s * (1 - n / (h * w)))` at each step; `h`, `w` are twice the size tokens."""
        unit = self.layout.codes_per_size_unit
        area = 4 * torch.div(self.rows, unit) * torch.div(self.cols, unit)
        decayed = (self.scale * (1 - (self.step - 1) / area.clamp(min=1))).clamp(min=MIN_DECAYED_SCALE)
        self.scale = torch.where((self.step >= 3) & (self.given_scale != 1), decayed, self.scale)


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
        **kwargs,
    ) -> LongTensor | GenerateDecoderOnlyOutput:
        """Continues each row with text and images until it ends.

        Besides stock's arguments (`input_ids`, `attention_mask`, `max_new_tokens`, `num_return_sequences`,
        `stopping_criteria`, `logits_processor`, `cache_implementation`, ...):

        Args:
            height, width: pixels of an image that each row must draw first, one for all or one per prompt (None: the
                model decides whether to draw, and how large). Prompts that already end in size tokens need none.
            guidance_scale: `l' + s (l - l')` on image codes; the unconditional scores `l'` see only the tokens from
                the image's start on. One for all or one per prompt; 1 skips it.
            guidance_schedule: None or "decay" (Lumina-mGPT 2.0).
            image_top_k, text_top_k, image_temperature, text_temperature: sampling inside and outside of images; one
                for all or one per prompt. Stock's `top_k` and `temperature` set both; `do_sample=False` is greedy.
            top_k_schedule: None or "entropy" (PURE: the flatter the scores, the more candidates).
            decoding: "ar".
            window: tokens drafted at a time by speculative decoding; "ar" has no use for it.
            generator: one for all, or one per returned row; each row draws a 64-bit seed from its own.
            negative_prompt_ids, negative_prompt_attention_mask: `(prompts, length)`, left-padded; tokens that the
                unconditional branch sees before the image.

        Returns:
            `LongTensor (batch, length)`: prompt and continuation, padded on the right; or stock's output object.

        Raises:
            ValueError: for a size without a representation or without room, and for values outside those named above.
        """
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
        decoder = _Decoder(
            model=self,
            settings=settings,
            streamer=streamer,
            num_prompts=len(ids),
            copies=copies,
            wanted=self._wanted_grid(height, width, len(ids), copies),
            seeds=_draw_seeds(generator, len(ids) * copies, ids.device),
        )
        padding = 0
        if negative_prompt_ids is not None:
            negative = self._checked_prompts(
                negative_prompt_ids, negative_prompt_attention_mask, "negative_prompt_ids"
            )
            ids, mask, padding = decoder.add_negative_prompt(ids, mask, *negative)
        if asked("max_new_tokens") is None:
            if asked("max_length") is None:
                kwargs["max_new_tokens"] = max(1, self.config.max_position_embeddings - int(mask.sum(1).min()))
            else:
                kwargs["max_length"] = asked("max_length") + padding
                if kwargs["max_length"] <= ids.shape[1]:
                    length = ids.shape[1] - padding
                    raise ValueError(f"max_length is {asked('max_length')}, and the prompt has {length} tokens.")
        output = super().generate(
            ids,
            generation_config,
            attention_mask=mask,
            custom_generate=decoder.decode,
            do_sample=settings.do_sample,
            **kwargs,
            **NO_STOCK_SEARCH,
            **(NO_STOCK_WARPERS if settings.do_sample else {}),
        )
        if isinstance(output, Tensor):
            return output[:, padding:]
        output.sequences = output.sequences[:, padding:]
        return output

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

    def _wanted_grid(self, height, width, num_prompts: int, copies: int) -> tuple[Tensor, Tensor]:
        """Code rows and columns that each row must draw, `(batch)` each, 0 for any."""
        layout = ImageLayout(**self.config.image_layout)
        heights, widths = _per_prompt(height, "height", num_prompts), _per_prompt(width, "width", num_prompts)
        grids = []
        for height_px, width_px in zip(heights, widths, strict=True):
            if (height_px is None) != (width_px is None):
                raise ValueError(f"height={height_px} and width={width_px}: give both or neither.")
            grids += [layout.grid(height_px, width_px) if height_px is not None else (0, 0)] * copies
        grid = torch.tensor(grids)
        return grid[:, 0], grid[:, 1]


@dataclass
class _Decoder:
    """One call of `generate`. `decode` has the signature that stock's `custom_generate` calls."""

    model: Any
    settings: DecodingSettings
    streamer: Any
    num_prompts: int
    copies: int
    wanted: tuple[Tensor, Tensor]
    seeds: Tensor
    negative: tuple[Tensor, Tensor] | None = None  # unconditional prompts: ids and mask, (prompts, length)
    _values: dict[str, Tensor] = field(default_factory=dict, init=False)

    def add_negative_prompt(self, ids: Tensor, mask: Tensor, negative_ids: Tensor, negative_mask: Tensor):
        """Lays each negative prompt before its row's image, or at the prompt's end; pads on the left to make room."""
        if len(negative_ids) != len(ids):
            raise ValueError(f"{len(negative_ids)} negative prompts for {len(ids)} prompts.")
        padding = negative_ids.shape[1]
        ids, mask = (torch.nn.functional.pad(x, (padding, 0)) for x in (ids, mask))
        zeros = torch.zeros_like(ids[:, 0])
        start = RowState.of_prompt(self._layout(), ids, mask, (zeros, zeros), zeros, zeros).context_start
        unconditional, visible = ids.clone(), torch.zeros_like(mask)
        for row, begin in enumerate(start.tolist()):
            end = begin if ids[row, begin] == self._layout().start_id else ids.shape[1]
            unconditional[row, end - padding : end] = negative_ids[row]
            visible[row, end - padding : end] = negative_mask[row]
        self.negative = (unconditional, visible)
        return ids, mask, padding

    def decode(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        """The loop: forward, choose, commit."""
        prompt_mask = model_kwargs.get("attention_mask")
        prompt_mask = torch.ones_like(input_ids) if prompt_mask is None else prompt_mask
        cache, ids = model_kwargs.get("past_key_values"), input_ids
        state = self._start(input_ids, prompt_mask, generation_config.max_length - input_ids.shape[1])
        branches = 2 if bool((state.given_scale != 1).any()) else 1
        negative_ids, negative_mask = self._negative(input_ids)
        pad_id = generation_config._pad_token_tensor  # stock's: the end of a turn where there is no padding token
        scores_kept: list[Tensor] = []
        finished = torch.zeros_like(state.step, dtype=torch.bool)
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())

        while not finished.all():
            # 1. Scores of the next token, guided
            mask = torch.nn.functional.pad(prompt_mask, (0, ids.shape[1] - input_ids.shape[1]), value=1)
            tokens = ids
            if branches == 2:
                columns = torch.arange(ids.shape[1], device=ids.device)
                seen = negative_mask | (columns >= state.context_start[:, None])  # (batch, columns)
                mask = torch.cat([mask, seen.to(mask.dtype)])
                tokens = torch.cat([ids, torch.cat([negative_ids, ids[:, input_ids.shape[1] :]], 1)])
                negative_mask = torch.nn.functional.pad(negative_mask, (0, 1))
            logits = self._forward(tokens, mask, cache)
            scores = self._guide(logits, state) if branches == 2 else logits

            # 2. The token: what the grammar forces, or a draw from what it allows
            scores = logits_processor(ids, scores)
            next_ids = self._choose(scores, state, scores_kept if generation_config.output_scores else None)
            next_ids = torch.where(finished, pad_id if pad_id is not None else 0, next_ids)

            # 3. Commit
            state.advance(next_ids, column=ids.shape[1])
            ids = torch.cat([ids, next_ids[:, None]], 1)
            if self.streamer is not None:
                self.streamer.put(next_ids.cpu())
            finished = finished | stopping_criteria(ids, None) | (state.room <= 0)

        if self.streamer is not None:
            self.streamer.end()
        if not generation_config.return_dict_in_generate:
            return ids
        return GenerateDecoderOnlyOutput(sequences=ids, scores=tuple(scores_kept) or None, past_key_values=cache)

    def _layout(self) -> ImageLayout:
        return ImageLayout(**self.model.config.image_layout)

    def _start(self, ids: Tensor, mask: Tensor, max_new_tokens: int) -> RowState:
        """The rows' states, once it is certain that each wanted image fits."""
        layout, lengths = self._layout(), mask.sum(1)
        room = (self.model.config.max_position_embeddings - lengths).clamp(0, max_new_tokens)
        if bool((room <= 0).any()):
            row, context = int(room.argmin()), self.model.config.max_position_embeddings
            raise ValueError(f"row {row}: {int(lengths[row])} prompt tokens leave no room in a context of {context}.")
        rows, cols = (x.to(ids.device) for x in self.wanted)
        scale = self._per_row("guidance_scale", ids.device).float()
        state = RowState.of_prompt(layout, ids, mask, (rows, cols), room, scale)
        # What was asked for needs room. What the prompt begins may be cut short by the user, but not by the context
        context = self.model.config.max_position_embeddings
        begun = state.step > 0
        own_rows, own_cols = (x.clamp(min=layout.codes_per_size_unit) for x in (state.rows, state.cols))  # at least
        is_asked = (rows > 0) & (~begun | ((rows == own_rows) & (cols == own_cols)))
        rows, cols = (torch.where(begun, own, x) for own, x in ((own_rows, rows), (own_cols, cols)))
        needed = torch.where(begun | is_asked, layout.num_tokens(rows, cols) - state.step, 0)
        missing = needed - torch.where(is_asked | (begun & (state.step < 3)), room, context - lengths)
        if bool((missing > 0).any()):
            row = int(missing.argmax())
            raise ValueError(
                f"row {row}: an image of {int(rows[row])}x{int(cols[row])} codes takes {int(needed[row])} more tokens,"
                f" and {int(room[row])} are left (context {context}, prompt {int(lengths[row])},"
                f" max_new_tokens {max_new_tokens})."
            )
        return state

    def _negative(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Prompt ids as the unconditional branch has them, and which of them it always sees. (batch, length) each"""
        if self.negative is None:
            return input_ids, torch.zeros_like(input_ids, dtype=torch.bool)
        ids, mask = (x.to(input_ids.device).repeat_interleave(self.copies, 0) for x in self.negative)
        return ids, mask.bool()

    def _forward(self, ids: Tensor, mask: Tensor, cache) -> Tensor:
        """Scores of the next token, float32 `(rows, vocab)`; only columns that the cache lacks are computed."""
        known = cache.get_seq_length() if cache is not None else 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        outputs = self.model(
            input_ids=ids[:, known:],
            attention_mask=mask,
            position_ids=positions[:, known:],
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1].float().to(ids.device)

    def _guide(self, logits: Tensor, state: RowState) -> Tensor:
        """Conditional and unconditional scores `(2 * batch, vocab)` to guided ones; on codes only."""
        conditional, unconditional = logits.chunk(2)
        if self.settings.guidance_schedule == "decay":
            state.decay_guidance()
        scale = torch.where(state.step >= 3, state.scale, 1.0)[:, None]
        guided = unconditional + scale * (conditional - unconditional)
        return torch.where(scale == 1, conditional, guided)

    def _choose(self, scores: Tensor, state: RowState, scores_kept: list[Tensor] | None) -> Tensor:
        """Grammar mask, top-k, temperature, draw. `(batch, vocab)` to `(batch)`"""
        forced = state.forced()
        allowed = state.layout.allowed(state.step, state.rows, state.room, scores.shape[1])
        scores = scores.masked_fill(~allowed, -torch.inf)
        if self.settings.do_sample:
            scores = self._warp(scores, in_image=state.step > 0)
            drawn = (scores + gumbel_noise(self.seeds, state.length, scores.shape[1])).argmax(1)
        else:
            drawn = scores.argmax(1)
        if scores_kept is not None:
            scores_kept.append(scores)
        return torch.where(forced >= 0, forced, drawn)

    def _warp(self, scores: Tensor, in_image: Tensor) -> Tensor:
        """Top-k, then temperature, each as its row's phase has it."""
        top_k = torch.where(
            in_image, self._per_row("image_top_k", scores.device), self._per_row("text_top_k", scores.device)
        )
        if self.settings.top_k_schedule == "entropy":
            top_k = torch.where(in_image, entropy_top_k(scores), top_k)
        temperature = torch.where(
            in_image,
            self._per_row("image_temperature", scores.device),
            self._per_row("text_temperature", scores.device),
        )
        best = scores.topk(min(self._largest_top_k(), scores.shape[1]), dim=1).values  # (batch, largest k)
        worst_kept = best.gather(1, top_k.clamp(max=best.shape[1])[:, None] - 1)
        return scores.masked_fill(scores < worst_kept, -torch.inf) / temperature[:, None]

    def _largest_top_k(self) -> int:
        given = [*_as_list(self.settings.image_top_k), *_as_list(self.settings.text_top_k)]
        return max(*given, ENTROPY_TOP_K[1] if self.settings.top_k_schedule else 1)

    def _per_row(self, name: str, device) -> Tensor:
        if name not in self._values:
            values = _per_prompt(getattr(self.settings, name), name, self.num_prompts)
            self._values[name] = torch.tensor(values, device=device).repeat_interleave(self.copies)
        return self._values[name]


def entropy_top_k(scores: Tensor) -> Tensor:
    """PURE's top-k for masked scores `(batch, vocab)`: 1 to 2000, growing with their entropy in nats. `(batch)`"""
    smallest, largest = ENTROPY_TOP_K
    return (smallest + (largest - smallest) * torch.sigmoid(entropy(scores).clamp(0, 10) - 5)).round().long()


def entropy(scores: Tensor) -> Tensor:
    """Entropy in nats of the law that scores `(batch, vocab)` stand for; -inf is never drawn. `(batch)`"""
    log_law = scores.log_softmax(-1)
    return -(log_law.exp() * log_law.masked_fill(log_law == -torch.inf, 0)).sum(-1)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise `(batch, vocab_size)`, float32: a pure function of (seed, position, token id).

    The argmax of log-probabilities plus this noise is a draw from them.
    """
    tokens = _mix(torch.arange(vocab_size, device=seeds.device) * 0x9E3779B9)
    low = _mix(seeds ^ _mix(positions * 0x85EBCA6B + 1))[:, None]
    high = _mix((seeds >> 32) ^ _mix(positions * 0xC2B2AE35 + 2))[:, None]
    bits = _mix(_mix(tokens ^ low) + high)
    uniform = ((bits.float() + 0.5) * 2**-32).clamp(max=1 - 2**-24)
    return -torch.log(-torch.log1p(-uniform))  # log1p keeps the small exponentials, which are the large noise, precise


def _mix(x: Tensor) -> Tensor:
    """A bijective 32-bit hash (two rounds of xor-shift and multiply) of the low half of int64 values."""
    x = x & MASK_32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK_32
    return x ^ (x >> 16)


def _draw_seeds(generator, num_rows: int, device) -> Tensor:
    """One 64-bit seed per row `(num_rows)`, the same whichever device the generators live on."""
    if not isinstance(generator, list | tuple):
        return _draw(generator, num_rows).to(device)
    if len(generator) != num_rows:
        raise ValueError(f"{len(generator)} generators for {num_rows} rows: give one, or one per returned row.")
    return torch.cat([_draw(g, 1) for g in generator]).to(device)


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
