"""The decoding engine: one loop for plain and speculative decoding, of rows that stand in different places.

A row's `tokens` are final up to its `length`; what follows are drafts. Its cache lags behind, by the last final token
at least. A step feeds a window of tokens from there on in one forward, which gives the distribution of what follows
each of them; it makes final what the drafts got right, the first token that they did not, and what the grammar forces
next (an end-of-line rides in the same forward as the code before it). The next step begins where the cache has ended:
to go back is to move a pointer. All of a row's state stays on the device, and a row never looks at its neighbours.

- "ar": no drafts. One token a step is drawn, as `argmax(log P + g)` with Gumbel noise `g` of (seed, position).
- "gumbel": the same draw at every place of the window, and drafts count as far as they agree with it. The noise of a
  position is always the same, so the tokens are those of "ar".
- "jacobi": a draft `x` that was drawn from `Q` is accepted while `u * Q(x) < P(x)`, and otherwise drawn anew from
  `norm(max(P - Q, 0))`; either way it is then a draw from `P` (2410.01699, with the maximal coupling of 2211.17192).
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache

from .uni_rep import ImageLayout

MIN_DECAYED_SCALE = 4.0  # Lumina-mGPT 2.0 lets a decaying guidance scale fall to here
ENTROPY_TOP_K = (1, 2000)  # the range of PURE's top-k by entropy
MAX_RIDES = 2  # what is forced after a code: end-of-line, end of image
COLUMNS = 64  # the cache grows, and is read, in multiples of this
COMPILED_COLUMNS = 512  # or from here on in powers of two and their halves between, as each size is compiled
WINDOWS = (8, 16, 32, 64)  # that "auto" chooses from
CALIBRATION_STEPS = 6  # of each, timed
STEPS_PER_LOOK = 64  # that are taken at most before the host looks at the rows again, where it reads all columns
MOVING = ("length", "cached", "drafted", "step", "rows", "cols", "shift", "scale", "running")
MAX_VARIANTS = 64  # of the step that are compiled
MASKED = ("sdpa", "eager")  # attention by masks
KEPT = "_last_decoder"  # attribute of a model whose steps are compiled
MASK_32 = 0xFFFFFFFF
ROUND_STRIDE = 0x9E3779B97F4A7C15 - 2**64  # odd, and nowhere near another's seed


@dataclass
class Prompt:
    """One row to decode; tensors are on the CPU, and those that are one object are prefilled once.

    Attributes:
        ids: `(length)` without padding, and with the size tokens of an image that was asked for.
        num_given: how many of them the caller gave.
        context: `(length)` what the unconditional branch sees of it: a negative prompt, then the image begun in it.
        num_negative: tokens of the negative prompt.
        step: tokens of the image begun, 0 in text; rows, cols: its grid, 0 where not known yet.
        limit: length at which the row ends.
        seed: of its random numbers, 64 bits.
        sampling: guidance_scale, image_top_k, text_top_k, image_temperature, text_temperature.
    """

    ids: Tensor
    num_given: int
    context: Tensor
    num_negative: int
    step: int
    rows: int
    cols: int
    limit: int
    seed: int
    sampling: dict[str, float]


class RowCache(Cache):
    """Keys and values that stay in place; each row writes at columns of its own, and reads those up to its token's.

    Held as `(rows, heads, columns, head_dim)` a layer, allocated where and as the layer's first keys are.
    """

    def __init__(self, num_rows: int, num_heads: int):
        self.layers: list = []  # stock's masks ask for them
        self.num_rows, self.num_heads, self.num_columns = num_rows, num_heads, 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.places: Tensor | None = None  # where the next forward's tokens go; first columns without

    def begin(self, rows: list[int], owners: list[int]) -> None:
        """Says that the next forward's rows, whose tokens are their first ones, are those of `rows[i]`."""
        self.rows, self.owners, self.places = rows, owners, None

    def point(self, positions: Tensor, num_read: int) -> None:
        """Says where the next forward's tokens `(rows, slots)` go, and how many columns it may read."""
        lines = torch.arange(len(positions) * self.num_heads, device=positions.device).view(-1, self.num_heads, 1)
        self.places = (lines * self.num_columns + positions[:, None]).flatten()  # (rows * heads * slots)
        self.num_read = num_read

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Takes `(rows, heads, slots, head_dim)`, gives `(rows, heads, columns, head_dim)`."""
        if layer_idx == len(self.keys):
            for stored, states in ((self.keys, key_states), (self.values, value_states)):
                stored.append(states.new_zeros(self.num_rows, states.shape[1], self.num_columns, states.shape[3]))
        return tuple(
            self._write(stored[layer_idx], states)
            for stored, states in ((self.keys, key_states), (self.values, value_states))
        )

    def _write(self, stored: Tensor, states: Tensor) -> Tensor:
        if self.places is None:
            stored[self.rows, :, : states.shape[2]] = states[self.owners].to(stored.dtype)
            return states
        places = self.places.to(states.device)
        stored.flatten(0, 2).index_copy_(0, places, states.flatten(0, 2).to(stored.dtype))
        return stored[: len(states), :, : self.num_read].to(states.dtype)

    def reserve(self, num_columns: int) -> None:
        """Makes room, by copying: what grows while it is decoded is text, which has no size known before."""
        more = num_columns - self.num_columns
        for stored in (self.keys, self.values):
            for layer, tensor in enumerate(stored):  # one at a time, so that only one is there twice
                stored[layer] = F.pad(tensor, (0, 0, 0, more))
        self.num_columns = num_columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0, as positions are always given."""
        return 0


class Decoder:
    """Decodes prompts in a fixed number of rows, each taking the next prompt when it has finished one.

    Args:
        model: a `LuminaMGPTForConditionalGeneration`.
        settings: what `generate` was asked for.
        prompts: in the order in which they are begun.
        num_rows: of them at a time.
        end_ids: tokens that end a row; pad_id: what stands before short rows when all are looked at.
        processors: stock's logits processors; with any, each token is decided by itself.
        compile_config: how to compile the step, as `torch.compile` takes it; None does not.

    Attributes:
        hook: may be set; called after each step as `hook(decoder)`, gives a bool for each row, True to end it.
        tokens: `(rows, columns)`, each row's prompt, what was decoded, then drafts. All tensors `(rows)`:
        length: tokens that are final; cached: those of them in the cache; drafted: end of the drafts; limit: where
            the row ends.
        step, rows, cols: place in the current image, as in `Prompt`.
        shift: position in the conditional branch less that in the unconditional one.
        scale: guidance scale; under a schedule, what the next token's is computed from.
        round: steps that the row has taken; random numbers of "jacobi" are of these, too.
        draft_probs: `(rows, window, codes)` of "jacobi": what each draft after the cached tokens was drawn from.
    """

    def __init__(
        self,
        model: Any,
        settings: Any,
        prompts: list[Prompt],
        num_rows: int,
        end_ids: list[int],
        pad_id: int = 0,
        processors: Any = None,
        compile_config: Any = None,
    ):
        self.model, self.settings, self.prompts = model, settings, prompts
        self.hook: Callable[[Decoder], Tensor] | None = None
        self.pad_id, self.processors, self.is_compiled = pad_id, processors, compile_config is not None
        step = Decoder.take_step  # not of self: what refers to itself keeps its cache until it is collected
        self.run_step: Any = _compiled(step, compile_config) if self.is_compiled else step
        self.layout = ImageLayout(**model.config.image_layout)
        self._call_in()
        embeddings = model.get_input_embeddings()
        device = embeddings.weight.device
        self.device = device if device.type != "meta" else torch.device(embeddings._hf_hook.execution_device)
        self.dtype = model.dtype
        self.window = settings.window if self.is_speculative else 1
        self.num_rows = num_rows
        longest = max(self.window if isinstance(self.window, int) else max(WINDOWS), 1 + MAX_RIDES)
        self.margin = longest + MAX_RIDES + 1  # columns that a step may touch after the last token
        self.end_ids = torch.tensor(end_ids, device=self.device)
        self.code_ids = torch.cat([torch.arange(*ends) for ends in self.layout.code_id_ranges]).to(self.device)
        self.code_index = torch.zeros(model.config.vocab_size, dtype=torch.long, device=self.device)
        self.code_index[self.code_ids] = torch.arange(len(self.code_ids), device=self.device)
        self.code_weight = _rows_of(model.lm_head, self.layout.code_id_ranges)
        self._allocate(max(prompt.limit for prompt in prompts), longest)
        top_k = [prompt.sampling[name] for prompt in prompts for name in ("image_top_k", "text_top_k")]
        self.largest_top_k = int(max(*top_k, ENTROPY_TOP_K[1] if settings.top_k_schedule == "entropy" else 1))
        self.layout.allowed(self.step, self.rows, self.limit, model.config.vocab_size)  # its tensors, before compiling
        self.is_guided = any(prompt.sampling["guidance_scale"] != 1 for prompt in prompts)
        self.cache = RowCache(num_rows * (2 if self.is_guided else 1), model.config.num_key_value_heads)
        self.waiting = deque(range(len(prompts)))
        self.owners = [-1] * num_rows  # which prompt each row has
        self.num_columns = 0  # of the cache, that this call needs
        if self.is_compiled:
            self._take_over(vars(model).pop(KEPT, None))

    @property
    def image_end(self) -> Tensor:
        """The length `(rows)` at which each row's image will be whole, where its grid is known."""
        return self.length - self.step + self.layout.num_tokens(self.rows, self.cols)

    @property
    def is_speculative(self) -> bool:
        """Whether drafts are verified; with processors every token is decided by itself."""
        return self.settings.decoding != "ar" and not self.processors

    def _allocate(self, limit: int, window: int) -> None:
        def numbers(*shape: int, dtype=torch.long) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self.tokens = numbers(self.num_rows, self._rounded(limit + self.margin))  # or each length would be compiled
        self.length, self.cached, self.drafted, self.limit = (numbers(self.num_rows) for _ in range(4))
        self.step, self.rows, self.cols, self.shift = (numbers(self.num_rows) for _ in range(4))
        self.num_negative, self.seeds, self.round = (numbers(self.num_rows) for _ in range(3))
        self.running = numbers(self.num_rows, dtype=torch.bool)
        self.scale, self.given_scale = (numbers(self.num_rows, dtype=torch.float32) for _ in range(2))
        self.image_top_k, self.text_top_k = (numbers(self.num_rows) for _ in range(2))
        self.image_temperature, self.text_temperature = (numbers(self.num_rows, dtype=torch.float32) for _ in range(2))
        self.draft_probs = None
        if self.is_speculative and self.settings.decoding == "jacobi" and self.settings.do_sample:
            self.draft_probs = numbers(self.num_rows, window, len(self.code_ids), dtype=torch.float32)

    @torch.inference_mode()  # in which the last call may have been made
    def _take_over(self, earlier: "Decoder | None") -> None:
        """The tensors of the last call's decoder, as far as they fit: graphs are recorded with their addresses."""
        if earlier is None or (earlier.device, earlier.dtype) != (self.device, self.dtype):
            return
        self.layout = earlier.layout
        for name, tensor in vars(self).items():
            old = getattr(earlier, name, None)
            if not isinstance(tensor, Tensor) or not isinstance(old, Tensor):
                continue
            if (old.shape, old.dtype) == (tensor.shape, tensor.dtype):
                setattr(self, name, old.copy_(tensor))
        if earlier.cache.num_rows == self.cache.num_rows:
            self.cache = earlier.cache

    def _call_in(self) -> None:
        """Brings an offloaded model to its device, which waits for a forward of the whole otherwise."""
        if hasattr(self.model, "_hf_hook"):
            self.model._hf_hook.pre_forward(self.model)

    # Rows

    def fill(self, rows: list[int], owners: list[int]) -> None:
        """Gives rows and the cache their next prompts, whose last tokens the first step feeds once more."""
        prompts = [self.prompts[owner] for owner in owners]
        for row, owner in zip(rows, owners, strict=True):
            self.owners[row] = owner
        values = {
            "length": [len(p.ids) for p in prompts],
            "cached": [len(p.ids) - 1 for p in prompts],
            "drafted": [len(p.ids) for p in prompts],
            "limit": [p.limit for p in prompts],
            **{name: [getattr(p, name) for p in prompts] for name in ("step", "rows", "cols", "num_negative")},
            "shift": [len(p.ids) - len(p.context) - (p.step == 0) for p in prompts],
            "seeds": [p.seed for p in prompts],
            "round": [0] * len(prompts),
            "running": [True] * len(prompts),
            "scale": [p.sampling["guidance_scale"] for p in prompts],
            "given_scale": [p.sampling["guidance_scale"] for p in prompts],
            **{
                name: [p.sampling[name] for p in prompts]
                for name in ("image_top_k", "text_top_k", "image_temperature", "text_temperature")
            },
        }
        index = torch.tensor(rows, device=self.device)
        for name, own in values.items():
            state = getattr(self, name)
            state[index] = torch.tensor(own, dtype=state.dtype, device=self.device)
        for row, prompt in zip(rows, prompts, strict=True):
            self.tokens[row, : len(prompt.ids)] = prompt.ids.to(self.device)
        ends = [len(p.ids) - p.step + self.layout.num_tokens(p.rows, p.cols) * (p.step > 0) for p in prompts]
        self._reserve(max(*ends, *(len(p.ids) for p in prompts), *(len(p.context) for p in prompts)))
        self._prefill(rows, [prompt.ids for prompt in prompts])
        if self.is_guided:
            self._prefill([row + self.num_rows for row in rows], [prompt.context for prompt in prompts])

    def _prefill(self, rows: list[int], contexts: list[Tensor]) -> None:
        """The cache of contexts, each computed once."""
        unique = {id(ids): ids for ids in contexts}
        places = {key: place for place, key in enumerate(unique)}
        ids = pad_sequence([*unique.values()], batch_first=True).to(self.device)  # on the right, where nothing sees it
        if not ids.shape[1]:
            return
        self.cache.begin(rows, [places[id(ids)] for ids in contexts])
        self._forward(ids, torch.arange(ids.shape[1], device=self.device).expand_as(ids), ids.shape[1])

    def _reserve(self, num_columns: int) -> None:
        """Room for so many tokens, and for what a step may draft after them."""
        if num_columns + self.margin > self.num_columns:
            grown = min(self.num_columns * 3 // 2, self.tokens.shape[1])
            self.num_columns = self._rounded(max(num_columns + self.margin, grown))
        if self.num_columns > self.cache.num_columns:  # else an earlier call's has more
            self.cache.reserve(self.num_columns)

    def _rounded(self, num_columns: int) -> int:
        return rounded_columns(num_columns, self.is_compiled)

    # The loop

    def run(self) -> Iterator[tuple[int, Tensor, int]]:
        """Yields each prompt's number, new ids `(length)` and steps taken as soon as its row ends."""
        try:
            yield from self._run()
        finally:
            self.hook = None  # whoever listens refers to this decoder
        if self.is_compiled:
            vars(self.model)[KEPT] = self
            self.model = self.run_step = None  # a model that refers to itself would stay until it is collected

    @torch.inference_mode()
    def _run(self) -> Iterator[tuple[int, Tensor, int]]:
        free = deque(range(self.num_rows))
        busy: set[int] = set()
        while self.waiting or busy:
            # 1. Prompts for the rows that have none, then as many steps as can be taken without a look
            self._call_in()  # again, as the VQ model may have been in between
            rows = [free.popleft() for _ in range(min(len(free), len(self.waiting)))]
            with _masked_attention(self.model.config):
                if rows:
                    self.fill(rows, [self.waiting.popleft() for _ in rows])
                    busy.update(rows)
                    seen = self._look()
                self._take_steps(seen)
            if self.hook is not None:
                with torch.inference_mode(False), torch.no_grad():  # what others get they may keep and use
                    stop = self.hook(self)
                self.running &= ~stop

            # 2. What is finished
            seen = self._look()
            for row in sorted(busy):
                if not seen["phase"][row]:
                    owner, length = self.owners[row], seen["length"][row]
                    busy.remove(row)
                    free.append(row)
                    yield owner, self.tokens[row, self.prompts[owner].num_given : length].cpu(), seen["round"][row]

    def _take_steps(self, seen: dict[str, list]) -> None:
        if self.window == "auto" and "codes" in seen["phase"]:
            self.window = self._fastest_window(seen)
        num_steps, variant = self._plan(seen)
        self._pin()
        for _ in range(num_steps):
            self.run_step(self, **variant)

    def _look(self) -> dict[str, list]:
        """What the host needs to know of the rows: the only place where it waits for the device."""
        state = {
            "length": self.length,
            "reach": self.length - self.shift.clamp(max=0),  # of both branches
            "pending": self.length - self.cached,
            "round": self.round,
            "running": self.running,
            "in_codes": self.step >= 3,
            "left": torch.minimum(self.image_end, self.limit) - self.length,  # of the image
            "unguided": (self.given_scale == 1) | (self.step == 0) | self._is_late(self.step, self.rows, self.cols),
        }
        seen = dict(zip(state, torch.stack([x.long() for x in state.values()]).tolist(), strict=True))
        both = zip(seen["running"], seen["in_codes"], strict=True)
        seen["phase"] = [("codes" if in_codes else "text") if running else "" for running, in_codes in both]
        return seen

    def _plan(self, seen: dict[str, list]) -> tuple[int, dict[str, Any]]:
        """How many steps to take before the next look, and of which kind."""
        running = [row for row, phase in enumerate(seen["phase"]) if phase]
        with_text = bool(self.processors) or "text" in seen["phase"]
        with_codes = not self.processors and "codes" in seen["phase"]
        num_slots, looks_always = 2, self.hook is not None or with_text  # a code, alone or with its end-of-line
        if self.is_speculative and with_codes:
            num_slots = self.window
        elif self.device.type == "cpu" and not self.is_compiled:  # where a look costs less than a slot
            num_slots, looks_always = max(seen["pending"][row] for row in running), True
        gain = num_slots + MAX_RIDES
        most = STEPS_PER_LOOK if self.is_compiled else COLUMNS // gain
        left = min(seen["left"][row] for row in running)
        num_steps = 1 if looks_always else max(1, min(most, left // gain))
        longest = max(seen["reach"][row] for row in running) + num_steps * gain
        self._reserve(longest - gain)  # the last step's is within the margin
        num_columns = min(self._rounded(longest), self.num_columns)
        if self.is_compiled:  # each pair of what is read and what is there is compiled, so that there should be few
            is_large = self.cache.num_columns >= 2 * self.num_columns
            num_columns = self.num_columns if is_large else self.cache.num_columns
        return num_steps, {
            "num_slots": num_slots,
            "num_columns": num_columns,
            "guided": self.is_guided and not all(seen["unguided"][row] for row in running),
            "with_codes": with_codes,
            "with_text": with_text,
        }

    def _pin(self) -> None:
        """Tells the compiler that all tensors stay where they are; a CUDA graph writes into no others."""
        if not self.is_compiled:
            return
        kept = (*vars(self).values(), *self.layout._tensors.values(), *self.cache.keys, *self.cache.values)
        for tensor in kept:
            if isinstance(tensor, Tensor):
                torch._dynamo.mark_static_address(tensor, guard=False)

    def _fastest_window(self, seen: dict[str, list]) -> int:
        """The window that makes most tokens final in a second, found once for a model, its dtype and its batch."""
        found, settings = vars(self.model).setdefault("_fastest_windows", {}), self.settings
        key = (settings.decoding, settings.draft, self.cache.num_rows, self.dtype, self.device, self.is_compiled)
        if key not in found:
            found[key] = self._calibrate(seen)
        return found[key]

    def _calibrate(self, seen: dict[str, list]) -> int:
        """Tries each window, and goes back."""
        before = {name: getattr(self, name).clone() for name in MOVING}
        speeds = {}
        for window in WINDOWS:
            self.window, now, start = window, seen, 0.0
            for step in range(CALIBRATION_STEPS + 2):
                if step == 2:  # the first may compile, and the second record its graph
                    begin, start = sum(now["length"]), perf_counter()
                if any(now["running"]):
                    variant = self._plan(now)[1]
                    self._pin()
                    self.run_step(self, **variant)
                now = self._look()
            speeds[window] = (sum(now["length"]) - begin) / (perf_counter() - start)
            for name, state in before.items():
                getattr(self, name).copy_(state)
        self.drafted.copy_(self.length)  # others' distributions are in the way
        return max(speeds, key=lambda window: speeds[window])

    # One step

    def take_step(self, num_slots: int, num_columns: int, guided: bool, with_codes: bool, with_text: bool) -> None:
        """Moves each running row on, by one token at least unless its phase is left out.

        Args:
            num_slots: tokens of each row to look at.
            num_columns: of the cache, to be read.
            guided: whether any row needs its unconditional branch.
            with_codes, with_text: whether rows inside of images, and others, are decided.
        """
        # 1. The window: tokens (rows, slots + 1); slot s feeds the one at s and decides the one at s + 1
        places = self.cached[:, None] + torch.arange(num_slots + 1, device=self.device)
        positions, targets = places[:, :-1], places[:, 1:]
        ahead = targets - self.length[:, None]  # of the tokens that are final; negative where there is one
        in_codes, image_end = self.step >= 3, self.image_end
        is_open = in_codes[:, None] & (ahead >= 0) & (targets < image_end[:, None])
        forced = self.layout.forced_next(self.step[:, None] + ahead, self.rows[:, None], self.cols[:, None])
        forced = torch.where(is_open, forced, -1)
        window = self.tokens.gather(1, places)
        if self.is_speculative and with_codes:
            window[:, 1:] = self._draft(window[:, 1:], targets, is_open & (targets >= self.drafted[:, None]))
        window[:, 1:] = torch.where(forced >= 0, forced, window[:, 1:])

        # 2. Forward
        hidden = self._look_at(window[:, :-1], positions, guided, num_columns)

        # 3. What comes at each place, and whether it was there already
        scales = self._scales(num_slots)
        agrees = (ahead < 0) | (forced >= 0)
        found = window[:, 1:]
        if with_codes:
            scale = scales.gather(1, ahead.clamp(min=0))
            drawn, accepted = self._next_codes(hidden, scale, found, targets, guided)
            is_code = is_open & (forced < 0)
            found = torch.where(is_code, drawn, found)
            if self.is_speculative:
                agrees = agrees | (is_code & accepted)
        decided = in_codes & with_codes
        if with_text:
            slot = self.length - 1 - self.cached  # of the last final token
            single = ~in_codes | bool(self.processors)
            at_slot = (torch.arange(num_slots, device=self.device) == slot[:, None]) & single[:, None] & (forced < 0)
            token = self._next_token(hidden, slot.clamp(max=num_slots - 1), scales[:, 0], guided)
            found, agrees = torch.where(at_slot, token[:, None], found), agrees & ~at_slot
            decided = decided | (single & (slot < num_slots))
        self.tokens.scatter_(1, targets, found)

        # 4. Commit
        last = torch.where(in_codes & with_codes, image_end, self.length + decided)
        self._commit(agrees.long().cumprod(1).sum(1), num_slots, last)

    def _draft(self, drafts: Tensor, targets: Tensor, is_new: Tensor) -> Tensor:
        """A first draft `(rows, slots)` where there is none: any code, or the one above or to the left."""
        draw = (uniforms(self._round_seeds(), targets, self.model.config.vocab_size + 1) * len(self.code_ids)).long()
        fresh, known = self.code_ids[draw.clamp(max=len(self.code_ids) - 1)], torch.zeros_like(is_new)
        if self.settings.draft != "uniform":
            first, line = (self.length - self.step + 3)[:, None], (self.cols + 1)[:, None]
            end = self.drafted[:, None]
            source = (end - 1).expand_as(targets)
            source = source - ((source - first) % line == line - 1).long()  # an end-of-line has a code before it
            if self.settings.draft == "above":
                above = targets - torch.div(targets - end, line, rounding_mode="floor") * line - line
                source = torch.where(above >= first, above, source)
            known = source >= first
            fresh = torch.where(known, self.tokens.gather(1, source.clamp(min=0)), fresh)
        if self.draft_probs is not None:
            probs = F.one_hot(self.code_index[fresh], len(self.code_ids)).float()
            probs = torch.where(known[..., None], probs, 1 / len(self.code_ids))
            own = self.draft_probs[:, : targets.shape[1]]
            own.copy_(torch.where(is_new[..., None], probs, own))
        return torch.where(is_new, fresh, drafts)

    def _look_at(self, ids: Tensor, positions: Tensor, guided: bool, num_columns: int) -> Tensor:
        """Hidden states `(rows, slots, hidden_size)`; guided, those of the unconditional branch follow as rows."""
        if guided:  # what comes before the image it sees as nothing: such tokens go where the image will begin
            unconditional = torch.maximum(positions - self.shift[:, None], self.num_negative[:, None])
            ids, positions = ids.repeat(2, 1), torch.cat([positions, unconditional])
        self.cache.point(positions, num_columns)
        return self._forward(ids, positions, num_columns)

    def _forward(self, ids: Tensor, positions: Tensor, num_columns: int) -> Tensor:
        unseen = torch.arange(num_columns, device=self.device) > positions[..., None]  # (rows, slots, columns)
        mask = torch.zeros(unseen.shape, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill_(unseen, torch.finfo(mask.dtype).min)[:, None]  # a sum: each layer would make one
        outputs = self.model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        )
        return outputs.last_hidden_state.to(self.device)

    def _next_codes(self, hidden: Tensor, scale: Tensor, drafts: Tensor, targets: Tensor, guided: bool):
        """Ids `(rows, slots)` that come at each place, and whether the drafts are right."""
        if self.code_weight is None:
            logits = self.model.lm_head(hidden).to(self.device)[..., self.code_ids]
        else:
            logits = F.linear(hidden, self.code_weight)
        scores = self._guide(logits, scale, guided)
        if not self.settings.do_sample:
            drawn = self.code_ids[scores.argmax(-1)]
            return drawn, drawn == drafts
        scores, candidates = self._warp(scores, self._top_k(scores), self.image_temperature)
        if self.draft_probs is None:
            noise = gumbel_noise(self.seeds, targets, self.code_ids[candidates])
            drawn = self.code_ids[_pick(scores + noise, candidates)]
            return drawn, drawn == drafts
        seeds, own = self._round_seeds(), self.draft_probs[:, : targets.shape[1]]
        probs, noise = (
            torch.zeros_like(own).scatter_(-1, candidates, x)
            for x in (scores.softmax(-1), gumbel_noise(seeds, targets, self.code_ids[candidates]))
        )
        threshold = uniforms(seeds, targets, self.model.config.vocab_size)
        accepted, index = verify(probs, own, self.code_index[drafts], threshold, noise)
        own.copy_(probs)
        return self.code_ids[index], accepted

    def _next_token(self, hidden: Tensor, slot: Tensor, scale: Tensor, guided: bool) -> Tensor:
        """The token `(rows)` after each row's last final one, of the whole vocabulary as the grammar allows it."""
        branches = hidden.unflatten(0, (-1, self.num_rows))  # (branches, rows, slots, hidden_size)
        last = branches.take_along_dim(slot[None, :, None, None], 2)[:, :, 0]
        scores = self._guide(self.model.lm_head(last).flatten(0, 1), scale, guided)
        if self.processors:
            with torch.inference_mode(False), torch.no_grad():
                scores = self.processors(self.final_ids(), scores.clone())
        allowed = self.layout.allowed(self.step, self.rows, self.limit - self.length, scores.shape[1])
        scores = scores.masked_fill(~allowed, -torch.inf)
        if not self.settings.do_sample:
            return scores.argmax(1)
        in_image = self.step > 0
        top_k = torch.where(in_image, self._top_k(scores), self.text_top_k)
        temperature = torch.where(in_image, self.image_temperature, self.text_temperature)
        scores, candidates = self._warp(scores, top_k, temperature)
        return _pick(scores + gumbel_noise(self.seeds, self.length[:, None], candidates[:, None])[:, 0], candidates)

    def _scales(self, num_slots: int) -> Tensor:
        """The guidance scale of the tokens to come, `(rows, num_slots + MAX_RIDES)`; 1 where there is none."""
        step = self.step[:, None] + torch.arange(num_slots + MAX_RIDES, device=self.device)
        scale = self.scale[:, None].expand_as(step)
        if self.settings.guidance_schedule == "decay":
            scale = torch.where(self.given_scale[:, None] != 1, self._decayed(step).clamp(min=MIN_DECAYED_SCALE), 1.0)
        is_guided = (step >= 3) & ~self._is_late(step, self.rows[:, None], self.cols[:, None])
        return torch.where(is_guided, scale, 1.0)

    def _decayed(self, step: Tensor) -> Tensor:
        """2.0's schedule: `s = max(4, s * (1 - n / (h * w)))` at each step; `h`, `w` are twice the size tokens.

        Before the maximum, which changes none of the products that are above it.
        """
        unit = self.layout.codes_per_size_unit
        area = 4 * torch.div(self.rows, unit) * torch.div(self.cols, unit)
        factors = (1 - (step - 1) / area.clamp(min=1)[:, None]).clamp(min=0)
        factors = torch.where(step >= 3, factors, 1.0)
        return torch.cat([self.scale[:, None], factors], 1).cumprod(1)[:, 1:]

    def _is_late(self, step: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Whether the part of an image that is guided is over."""
        if self.settings.guidance_end >= 1:
            return torch.zeros_like(step, dtype=torch.bool)
        return step - 3 >= self.settings.guidance_end * rows * (cols + 1)

    def _guide(self, logits: Tensor, scale: Tensor, guided: bool) -> Tensor:
        """Logits to float32 scores; guided, of both branches `(2 * rows, ..., tokens)`, by a scale `(rows, ...)`."""
        logits = logits.float().to(self.device)
        if not guided:
            return logits
        conditional, unconditional = logits.chunk(2)
        scores = unconditional + scale[..., None] * (conditional - unconditional)
        return torch.where(scale[..., None] == 1, conditional, scores)

    def _top_k(self, scores: Tensor) -> Tensor:
        """Candidates in images `(rows, ...)`, of scores `(rows, ..., tokens)`."""
        if self.settings.top_k_schedule == "entropy":
            return entropy_top_k(scores)
        return self.image_top_k.view(-1, *[1] * (scores.ndim - 2)).expand(scores.shape[:-1])

    def _warp(self, scores: Tensor, top_k: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """Top-k `(rows, ...)`, then temperature `(rows)`, of scores `(rows, ..., tokens)`: those left, and whose."""
        best, candidates = scores.topk(min(self.largest_top_k, scores.shape[-1]))  # (rows, ..., largest k)
        best = best.masked_fill(torch.arange(best.shape[-1], device=self.device) >= top_k[..., None], -torch.inf)
        return best / temperature.view(-1, *[1] * (scores.ndim - 1)), candidates

    def _commit(self, num_agreed: Tensor, num_slots: int, last: Tensor) -> None:
        """Moves the rows on: `(rows)` places of the window that agree, and the length that a row may reach."""
        # 1. Where the row ends now: what agreed, the token after it, and what is forced then
        num_final = torch.clamp(num_agreed + 1, max=num_slots)
        length = torch.maximum(torch.minimum(self.cached + num_final + 1, last), self.length)
        in_codes, image_end = self.step >= 3, self.image_end
        for _ in range(MAX_RIDES):
            forced = self.layout.forced_next(self.step + length - self.length, self.rows, self.cols)
            rides = in_codes & (forced >= 0) & (length < image_end)
            there = self.tokens.gather(1, length[:, None])
            self.tokens.scatter_(1, length[:, None], torch.where(rides[:, None], forced[:, None], there))
            length = length + rides
        length = torch.minimum(length, self.limit)
        recent = self.length[:, None] + torch.arange(num_slots + MAX_RIDES, device=self.device)
        is_end = torch.isin(self.tokens.gather(1, recent), self.end_ids) & (recent < length[:, None])
        first_end = torch.where(is_end, recent, self.tokens.shape[1]).amin(1)
        length = torch.where(self.running, torch.minimum(length, first_end + 1), self.length)

        # 2. Where it stands then
        num_new, token = length - self.length, self.tokens.gather(1, self.length[:, None])[:, 0]
        decides = ~in_codes & (num_new > 0)
        starts = decides & (token == self.layout.start_id)
        size = torch.where(decides, self.layout.size_of_id(token) * self.layout.codes_per_size_unit, 0)
        step = torch.where(in_codes | (self.step > 0), self.step + num_new, 0)
        step = torch.where(starts, 1, torch.where(in_codes & (length == image_end), 0, step))
        in_image = step > 0
        new = {
            "rows": torch.where(self.step == 1, size, self.rows) * (in_image & ~starts),
            "cols": torch.where(self.step == 2, size, self.cols) * (in_image & ~starts),
            "shift": torch.where(in_image & ~starts, self.shift, length - 1 - self.num_negative),
            "cached": torch.where(self.running, torch.minimum(self.cached + num_final, length - 1), self.cached),
            "drafted": torch.where(in_codes & in_image, torch.maximum(self.cached + num_slots + 1, length), length),
            "running": self.running & (length < self.limit) & (first_end >= length),
            "round": self.round + self.running,
            "step": step,
            "length": length,
        }
        if self.settings.guidance_schedule == "decay":
            decayed = self._decayed(self.step[:, None] + recent - self.length[:, None])
            table = torch.cat([self.scale[:, None], decayed], 1)
            new["scale"] = torch.where(in_image & ~starts, table.gather(1, num_new[:, None])[:, 0], self.given_scale)
        if self.draft_probs is not None:
            own = self.draft_probs[:, :num_slots]
            own.copy_(carry(own, new["cached"] - self.cached))
        for name, state in new.items():
            getattr(self, name).copy_(state)

    def _round_seeds(self) -> Tensor:
        """Seeds of random numbers that a row uses in this step only. `(rows)`"""
        return self.seeds + self.round * ROUND_STRIDE

    # What a hook may look at

    def new_ids(self) -> tuple[Tensor, Tensor]:
        """What is new of each row `(rows, longest)`, padded on the right, and how many tokens `(rows)`."""
        given = torch.tensor([self.prompts[owner].num_given for owner in self.owners], device=self.device)
        num_new = self.length - given
        places = torch.arange(int(num_new.max()), device=self.device) + given[:, None]
        within = places.clamp(max=self.tokens.shape[1] - 1)
        return self.tokens.gather(1, within).where(places < self.length[:, None], self.pad_id), num_new

    def final_ids(self) -> Tensor:
        """What is final of each row `(rows, longest)`, padded on the left."""
        places = torch.arange(-int(self.length.max()), 0, device=self.device) + self.length[:, None]
        return torch.where(places >= 0, self.tokens.gather(1, places.clamp(min=0)), self.pad_id)


def rounded_columns(num_columns: int, is_compiled: bool) -> int:
    """Of a cache that has room for so many."""
    if not is_compiled:
        return -(-num_columns // COLUMNS) * COLUMNS
    power = 1 << (num_columns - 1).bit_length()
    return max(COMPILED_COLUMNS, power * 3 // 4 if num_columns <= power * 3 // 4 else power)


def _pick(scores: Tensor, candidates: Tensor) -> Tensor:
    """The best candidate. `(..., candidates)` to `(...)`"""
    return candidates.gather(-1, scores.argmax(-1, keepdim=True))[..., 0]


def verify(
    probs: Tensor, draft_probs: Tensor, drafts: Tensor, threshold: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Turns draws from one distribution into draws from another, and keeps as many as can be.

    Args:
        probs, draft_probs: `(..., codes)` probabilities; drafts: `(...)` codes drawn from `draft_probs`.
        threshold: `(...)` uniform in (0, 1); noise: `(..., codes)` Gumbel noise.
    Returns:
        Whether each draft is kept, and the draws from `probs`. `(...)` each
    """
    wanted, given = (x.gather(-1, drafts[..., None])[..., 0] for x in (probs, draft_probs))
    kept = threshold * given < wanted
    residual = (probs - draft_probs).clamp(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, probs)  # equal distributions, up to rounding
    return kept, torch.where(kept, drafts, (residual.log() + noise).argmax(-1))


def carry(probs: Tensor, num_cached: Tensor) -> Tensor:
    """Distributions `(rows, slots, codes)` of drafts, by the slots of the window that begins so many tokens later."""
    slots = torch.arange(probs.shape[1], device=probs.device) + num_cached[:, None]
    return probs.take_along_dim(slots.clamp(max=probs.shape[1] - 1)[..., None], 1)


def entropy_top_k(scores: Tensor) -> Tensor:
    """PURE's top-k for masked scores `(..., tokens)`: 1 to 2000, growing with their entropy in nats. `(...)`"""
    smallest, largest = ENTROPY_TOP_K
    return (smallest + (largest - smallest) * torch.sigmoid(entropy(scores).clamp(0, 10) - 5)).round().long()


def entropy(scores: Tensor) -> Tensor:
    """Entropy in nats of the distribution that scores `(..., tokens)` stand for; -inf is never drawn. `(...)`"""
    log_probs = scores.log_softmax(-1)
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0)).sum(-1)


def gumbel_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise `(rows, places, tokens)`, float32: a pure function of (seed, position, token id).

    Of seeds `(rows)`, positions `(rows, places)` and ids `(tokens)`, or `(rows, places, tokens)` for some of each.
    The argmax of log-probabilities plus this noise is a draw from them.
    """
    uniform = _uniforms(seeds, positions, token_ids)
    return -torch.log(-torch.log1p(-uniform))  # log1p keeps the small exponentials, which are the large noise, precise


def uniforms(seeds: Tensor, positions: Tensor, token_id: int) -> Tensor:
    """Uniform numbers in (0, 1), `(rows, places)`, for an id that no token has."""
    return _uniforms(seeds, positions, torch.full((1,), token_id, device=seeds.device))[..., 0]


def _uniforms(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Numbers in (0, 1), as `gumbel_noise` has its noise."""
    tokens, seeds = _mix(token_ids * 0x9E3779B9), seeds[:, None]
    low = _mix(seeds ^ _mix(positions * 0x85EBCA6B + 1))[..., None]
    high = _mix((seeds >> 32) ^ _mix(positions * 0xC2B2AE35 + 2))[..., None]
    bits = _mix(_mix(tokens ^ low) + high)
    return ((bits.float() + 0.5) * 2**-32).clamp(max=1 - 2**-24)


def _mix(x: Tensor) -> Tensor:
    """A bijective 32-bit hash (two rounds of xor-shift and multiply) of the low half of int64 values."""
    x = x & MASK_32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK_32
    return x ^ (x >> 16)


@contextmanager
def _masked_attention(config: Any) -> Iterator[None]:
    """By masks alone each row can see columns of its own."""
    given = config._attn_implementation
    config._attn_implementation = given if given in MASKED else "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = given


def _rows_of(head: nn.Module, ranges: list[list[int]]) -> Tensor | None:
    """The head's rows `(codes, hidden_size)`, if it is a plain matrix at hand: not adapted, quantized or offloaded."""
    weight: Any = getattr(head, "weight", None)
    is_plain = type(weight) is nn.Parameter and type(weight.data) is Tensor and weight.device.type != "meta"
    if not is_plain or hasattr(head, "base_layer") or hasattr(head, "_hf_hook"):
        return None
    return torch.cat([weight.detach()[first:end] for first, end in ranges])  # a copy, which may be written to


def _compiled(step: Callable, compile_config: Any) -> Callable:
    """The step with its variants compiled; where that fails, it warns and runs as it is."""
    compiled = torch.compile(step, **{**compile_config.to_dict(), "dynamic": bool(compile_config.dynamic)})

    def run(decoder: Decoder, **variant) -> None:
        with torch._dynamo.config.patch(suppress_errors=True, recompile_limit=MAX_VARIANTS):
            torch.compiler.cudagraph_mark_step_begin()
            compiled(decoder, **variant)

    return run
