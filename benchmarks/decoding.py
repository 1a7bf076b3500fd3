"""Speed and memory of decoding: the reference's algorithm, plain decoding and both speculative ways, on equal weights.

    python -m benchmarks.decoding --output-dir runs/decoding
    python -m benchmarks.decoding --device cuda --only 100M
    python -m benchmarks.decoding --device cuda --only 7B      # in bf16; with the default checkpoint's codes a step

Prints tables in Markdown; a folder gets them and a plot. All ways take turns in one process, so that what else the
machine does cancels in their ratios; times are medians over the turns. The baseline is what the reference does, on
transformers' own `generate`: a second forward with a cache of its own for guidance, batches of one, the grammar as
Python lists made anew for each token. Large models have random weights, which draft no better than chance: of theirs
count the milliseconds a step, and the codes a step are those of the trained default checkpoint. On the CPU they draw
parts of a picture, at several places in it, whose rest was given; a picture's time is the mean of its parts.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks.training import DTYPES, LARGE, MB, resident, start_peak
from modeling_lumina_mgpt import LuminaMGPTConfig, LuminaMGPTForConditionalGeneration
from modeling_lumina_mgpt.checkpoints import default_checkpoint
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline
from modeling_lumina_mgpt.uni_rep import ImageLayout

LAYOUT = ImageLayout(
    start_id=8197,
    end_id=8196,
    end_of_line_id=8803,
    end_of_turn_id=8710,
    size_ids=list(range(8805, 8869)),
    code_id_ranges=[[4, 8196]],
    size_unit_px=32,
    codes_per_size_unit=2,
)
TEXT_IDS = range(9000, 9032)  # of a prompt
MIDDLE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
SHAPES = {"100M": {**MIDDLE, "vocab_size": 16384}, "7B": {**LARGE, "vocab_size": 65536}}
SAMPLING = {"guidance_scale": 4.0, "image_top_k": 2000}
PROMPTS = ("a large red sphere", "a small blue cube", "two green cones", "a yellow cylinder and a purple sphere")
WINDOWS = (8, 16, 32, 64)
DRAFTS = ("uniform", "above", "left")
DRAFT_WINDOW = 16  # at which they are compared
SIDE = 32  # codes on a side of a picture of 512 x 512
SIDES = (8, 16, 32, 64)
PLACES = (1 / 16, 15 / 16)  # of a picture, where parts of it are timed; the time between grows with the cache
BATCH_SIZES = (1, 2, 4, 8)
INK, GRID, COLORS = (40, 40, 40), (225, 225, 225), ("#1f77b4", "#d62728", "#2ca02c")
LINES: list[str] = []  # of the report


@dataclass(frozen=True)
class Way:
    """A name, and the arguments of our `generate`; None is the baseline."""

    name: str
    arguments: dict[str, Any] | None


@dataclass
class Timing:
    """Of one way, turn by turn. Rows of a batch count as one each."""

    seconds: list[float] = field(default_factory=list)
    num_steps: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    peak: int = 0

    @property
    def tokens_per_step(self) -> float:
        return sum(self.num_tokens) / sum(self.num_steps)

    @property
    def step_ms(self) -> float:
        return 1000 * statistics.median(s / n for s, n in zip(self.seconds, self.num_steps, strict=True))


BASELINE, PLAIN = Way("baseline", None), Way("ar", {"decoding": "ar"})
SPECULATIVE = [Way(f"{name} {w}", {"decoding": name, "window": w}) for name in ("jacobi", "gumbel") for w in WINDOWS]
WAYS = [BASELINE, PLAIN, *SPECULATIVE, Way("gumbel auto", {"decoding": "gumbel", "window": "auto"})] + [
    Way(f"{name} {DRAFT_WINDOW}, {draft}", {"decoding": name, "window": DRAFT_WINDOW, "draft": draft})
    for name in ("jacobi", "gumbel")
    for draft in DRAFTS
]
COMPILED = [
    Way(f"{way.name}, compiled", {**(way.arguments or {}), "compile_config": CompileConfig()})
    for way in (PLAIN, Way(f"gumbel {DRAFT_WINDOW}", {"decoding": "gumbel", "window": DRAFT_WINDOW}))
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the 100M model")
    parser.add_argument("--num-turns", type=int, default=5, help="of the default checkpoint; the 100M model has half")
    parser.add_argument("--compiled", action="store_true", help="try compiled steps as well, which takes minutes")
    parser.add_argument("--num-pictures", type=int, default=200, help="over which memory must not grow")
    parser.add_argument("--only", choices=("memory", *SHAPES), help="besides the default checkpoint; all if not given")
    parser.add_argument("--output-dir", type=Path)
    args = parser.parse_args()
    if args.only == "7B" and args.device == "cpu":
        parser.error("--only 7B takes a --device that holds it, such as cuda")
    wanted = {args.only} if args.only else {"memory", "100M"} | ({"7B"} if args.device != "cpu" else set())
    charts: list[Image.Image] = []
    codes_per_step = print_default(args, charts)
    if "memory" in wanted:
        print_memory(args)
    if "100M" in wanted:
        model = random_model("100M", DTYPES[args.dtype], args.device)
        print_windows(model, codes_per_step, args)
        charts += [print_areas(model, args), print_batches(model, args)]
        del model
    if "7B" in wanted:
        print_large(codes_per_step, args)
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "decoding.md").write_text("\n".join(LINES) + "\n")
        beside(charts).save(args.output_dir / "decoding.png")


# The baseline


class TwoPassGuidance(LogitsProcessor):
    """Guidance by a second forward for each token, whose cache holds the picture's tokens only."""

    def __init__(self, model, scale: float):
        self.model, self.scale, self.cache = model, scale, DynamicCache(config=model.config)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        start = last_start(input_ids, self.model)
        unseen = input_ids[:, start + self.cache.get_seq_length() :]
        unconditional = self.model(unseen, past_key_values=self.cache, logits_to_keep=1).logits[:, -1].float()
        return unconditional + self.scale * (scores - unconditional)


class ListedGrammar(LogitsProcessor):
    """Forbids what the layout of a picture does not allow, by a list of ids as long as the vocabulary."""

    def __init__(self, model):
        self.model, self.layout = model, ImageLayout(**model.config.image_layout)
        self.codes = {i for first, end in self.layout.code_id_ranges for i in range(first, end)}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids, start = input_ids[0].tolist(), last_start(input_ids, self.model)
        rows, cols = (
            (self.layout.size_ids.index(i) + 1) * self.layout.codes_per_size_unit for i in ids[start + 1 : start + 3]
        )
        allowed, place = self.codes, len(ids) - start - 3
        if place == rows * (cols + 1):
            allowed = {self.layout.end_id}
        elif place % (cols + 1) == cols:
            allowed = {self.layout.end_of_line_id}
        forbidden = [i for i in range(scores.shape[1]) if i not in allowed]
        scores[:, forbidden] = -torch.inf
        return scores


class PhasedTopK(LogitsProcessor):
    """One top-k in pictures and another one in text, as far as the tokens so far say where we are."""

    def __init__(self, model, image_top_k: int, text_top_k: int):
        self.model, self.image_top_k, self.text_top_k = model, image_top_k, text_top_k
        self.layout = ImageLayout(**model.config.image_layout)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids = input_ids[0].tolist()
        in_picture = ids.count(self.layout.start_id) > ids.count(self.layout.end_id)
        top_k = min(self.image_top_k if in_picture else self.text_top_k, scores.shape[1])
        return scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)


def last_start(input_ids: Tensor, model) -> int:
    """Column of the last start token."""
    ids = input_ids[0].tolist()
    return len(ids) - 1 - ids[::-1].index(model.config.image_layout["start_id"])


def baseline(model, input_ids: Tensor, seed: int, guidance_scale: float, image_top_k: int, **arguments) -> Tensor:
    """`input_ids (1, length)`, up to the sizes of a picture or into it, and the rest of it."""
    torch.manual_seed(seed)
    processors = [TwoPassGuidance(model, guidance_scale), ListedGrammar(model), PhasedTopK(model, image_top_k, 5)]
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        guidance_scale=1.0,  # stock's own
        max_length=model.config.max_position_embeddings,
        eos_token_id=model.config.image_layout["end_id"],
        pad_token_id=model.config.pad_token_id,
    )
    return GenerationMixin.generate(
        model, input_ids, generation_config=config, logits_processor=LogitsProcessorList(processors), **arguments
    )


# Runs and their times


class Clock(StoppingCriteria):
    """When each step ended; stops after `limit` of them."""

    def __init__(self, limit: int):
        self.limit = limit
        self.ends: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        return torch.full(input_ids.shape[:1], len(self.ends) >= self.limit, device=input_ids.device)


def generate(model, way: Way, input_ids: Tensor, seed: int, **arguments) -> tuple[Tensor, int]:
    """The sequences, and the steps that they took. Ends with the picture."""
    if way.arguments is None:
        sequences = baseline(model, input_ids, seed, **arguments)
        return sequences, sequences.shape[1] - input_ids.shape[1]
    output: Any = model.generate(
        input_ids,
        generator=torch.Generator().manual_seed(seed),
        eos_token_id=model.config.image_layout["end_id"],
        return_dict_in_generate=True,
        **arguments,
        **way.arguments,
    )
    return output.sequences, int(output.num_steps.max())


def in_turns(ways: Sequence[Way], turns: Iterable[int], run: Callable[[Way, int], tuple]) -> dict[str, Timing]:
    """Each way's timing. `run(way, turn)` gives seconds, steps, tokens and peak bytes; turn 0 is not counted."""
    timings = {way.name: Timing() for way in ways}
    for turn in turns:
        for way in ways:
            seconds, num_steps, num_tokens, peak = run(way, turn)
            timing = timings[way.name]
            timing.peak = max(timing.peak, peak)
            if turn:
                timing.seconds.append(seconds)
                timing.num_steps.append(num_steps)
                timing.num_tokens.append(num_tokens)
    return timings


def whole(model, way: Way, prompts: Sequence[Tensor], seed: int, **arguments) -> tuple[float, int, int, int]:
    """Draws a picture of each prompt `(1, length)`, one after the other."""
    peak, start, num_steps, num_tokens = start_peak(str(model.device)), time.perf_counter(), 0, 0
    for prompt in prompts:
        sequences, steps = generate(model, way, prompt, seed, **arguments)
        num_steps, num_tokens = num_steps + steps, num_tokens + sequences.shape[1] - prompt.shape[1]
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, num_steps, num_tokens, peak()


def part(
    model, way: Way, input_ids: Tensor, seed: int, num_steps: int = 8, copies: int = 1
) -> tuple[float, int, int, int]:
    """A step's seconds in going on with a picture. The first one, which reads what was given, is not counted."""
    peak, clock = start_peak(str(model.device)), Clock(num_steps + 1)
    arguments = {**SAMPLING, "stopping_criteria": StoppingCriteriaList([clock])}
    if copies > 1:
        arguments["num_return_sequences"] = copies
    generate(model, way, input_ids, seed, **arguments)
    seconds = statistics.median(end - start for start, end in pairwise(clock.ends))
    return seconds, 1, 1, peak()


def random_model(shape: str, dtype: torch.dtype, device: str) -> LuminaMGPTForConditionalGeneration:
    torch.manual_seed(0)
    config = LuminaMGPTConfig(
        **SHAPES[shape],
        max_position_embeddings=8192,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=LAYOUT.end_of_turn_id,
        image_layout=LAYOUT.layout_dict(),
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that 7B weights are never there in float32
    try:
        with torch.device(device):
            return LuminaMGPTForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)


def begun(model, side: int, place: float = 0.0) -> Tensor:
    """A prompt and a square picture up to some place in it, `(1, length)`."""
    layout = ImageLayout(**model.config.image_layout)
    codes = torch.randint(*layout.code_id_ranges[0], (side, side), generator=torch.Generator().manual_seed(0))
    lines = torch.nn.functional.pad(codes, (0, 1), value=layout.end_of_line_id).flatten()
    ids = [0, *TEXT_IDS, layout.end_of_turn_id, *layout.header(side, side), *lines[: int(place * len(lines))].tolist()]
    return torch.tensor([ids], device=model.device)


# The trained default checkpoint


def print_default(args: argparse.Namespace, charts: list) -> dict[str, float]:
    """Whole pictures by all ways. Returns the codes a step of each, in float32."""
    ways = [*WAYS, *(COMPILED if args.compiled else ())]
    few = [way for way in ways if (way.arguments or {}).get("window", DRAFT_WINDOW) == DRAFT_WINDOW]
    codes_per_step = {}
    for dtype in (torch.float32, torch.bfloat16):
        pipe = LuminaMGPTPipeline.from_pretrained(default_checkpoint(), dtype=dtype).to(args.device)
        model, config = pipe.transformer, pipe.transformer.generation_config
        sampling = {"guidance_scale": config.guidance_scale, "image_top_k": config.image_top_k}
        prompts = [default_prompt(pipe, words) for words in PROMPTS]

        def run(way: Way, turn: int, model=model, prompts=prompts, sampling=sampling):
            return whole(model, way, prompts, seed=turn, **sampling)

        turns = range(args.num_turns + 1)  # turn 0 is to warm up
        timings = in_turns(ways if dtype == torch.float32 else few, turns, run)
        config_px = model.config.default_height_px, model.config.default_width_px
        say(f"\n## The default checkpoint, {dtype}: {config_px[0]} x {config_px[1]} pixels\n")
        say(f"Codes to pixels take {vq_ms(pipe):.1f} ms more. Peak memory is beyond the weights.\n")
        print_ways(timings, len(prompts))
        if dtype == torch.float32:
            num_codes = math.prod(pipe.processor.uni_rep.grid(config_px[0], config_px[1]))
            codes_per_step = {
                name: num_codes * len(prompts) * len(timing.num_steps) / sum(timing.num_steps)
                for name, timing in timings.items()
            }
            charts.append(window_chart(timings))
    return codes_per_step


def default_prompt(pipe: LuminaMGPTPipeline, words: str) -> Tensor:
    """The ids of a prompt and of the sizes of a picture, `(1, length)`."""
    size = {name: getattr(pipe.transformer.config, f"default_{name}_px") for name in ("height", "width")}
    turn = pipe.processor.task_prompt("text-to-image", words, **size)
    inputs = pipe.processor(turn, **size, return_tensors="pt")
    return inputs["input_ids"].to(pipe.transformer.device)


def vq_ms(pipe: LuminaMGPTPipeline) -> float:
    config, px = pipe.transformer.config, pipe.processor.uni_rep.code_px
    codes = torch.zeros(config.default_height_px // px, config.default_width_px // px, dtype=torch.long)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        pipe.processor.decode_image(codes)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def print_ways(timings: dict[str, Timing], num_pictures: int) -> None:
    say("| way | s a picture | times as fast | tokens/s | steps a picture | tokens a step | ms a step | peak, MB |")
    say("|---|---|---|---|---|---|---|---|")
    for name, timing in timings.items():
        seconds = statistics.median(timing.seconds)
        steps = sum(timing.num_steps) / len(timing.num_steps) / num_pictures
        tokens = sum(timing.num_tokens) / len(timing.num_tokens)
        say(
            f"| {name} | {seconds / num_pictures:.3f} | {times_as_fast(timings, name):.2f} | {tokens / seconds:.1f}"
            f" | {steps:.1f} | {timing.tokens_per_step:.2f} | {timing.step_ms:.2f} | {timing.peak / MB:.0f} |"
        )


def times_as_fast(timings: dict[str, Timing], name: str) -> float:
    """As the baseline; the median over turns, each of which compares what was measured at about one time."""
    pairs = zip(timings[BASELINE.name].seconds, timings[name].seconds, strict=True)
    return statistics.median(slow / fast for slow, fast in pairs)


def print_memory(args: argparse.Namespace) -> None:
    """Whether many pictures take more memory than a few."""
    pipe = LuminaMGPTPipeline.from_pretrained(default_checkpoint(), dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    used = []
    for i in range(args.num_pictures):
        pipe(PROMPTS[i % len(PROMPTS)], generator=torch.Generator().manual_seed(i), decoding="gumbel")
        used.append(resident("VmRSS") if args.device == "cpu" else torch.cuda.memory_allocated())
    few = args.num_pictures // 10
    say(f"\n## Memory of the default checkpoint\n\nIn use after {few} pictures {used[few - 1] / MB:.1f} MB,")
    say(f"after {len(used)} pictures {used[-1] / MB:.1f} MB.")


# Large models with random weights


def print_windows(model, codes_per_step: dict[str, float], args: argparse.Namespace) -> None:
    """Milliseconds a step of all ways, and what they make of a picture."""
    timings = {}
    for place in PLACES:
        ids = begun(model, SIDE, place)

        def run(way: Way, turn: int, ids=ids):
            return part(model, way, ids, seed=turn)

        timings[place] = in_turns([BASELINE, PLAIN, *SPECULATIVE], few_turns(args), run)
    count = sum(p.numel() for p in model.parameters())
    say(f"\n## {count / 1e6:.0f}M parameters, {model.dtype}: {SIDE} x {SIDE} codes, {SIDE * (SIDE + 1) + 4} tokens\n")
    say("Steps were timed where so many tokens were given; codes a step are the default checkpoint's.\n")
    columns = [f"ms a step, {begun(model, SIDE, place).shape[1]}" for place in PLACES]
    say(f"| way | {' | '.join(columns)} | codes a step | s a picture | times as fast | peak, MB |")
    say(f"|---|{'---|' * len(PLACES)}---|---|---|---|")
    seconds = {}
    for name in timings[PLACES[0]]:
        times = [timings[place][name].step_ms for place in PLACES]
        seconds[name] = num_steps(name, SIDE, codes_per_step) * statistics.mean(times) / 1000
        say(
            f"| {name} | {' | '.join(f'{ms:.1f}' for ms in times)} | {codes_per_step[name]:.2f}"
            f" | {seconds[name]:.1f} | {seconds[BASELINE.name] / seconds[name]:.2f}"
            f" | {max(timings[place][name].peak for place in PLACES) / MB:.0f} |"
        )


def few_turns(args: argparse.Namespace) -> range:
    """Half of them, and none to warm up: the first step of each part does."""
    return range(1, 2 + args.num_turns // 2)


def num_steps(name: str, side: int, codes_per_step: dict[str, float]) -> float:
    """Of a square picture; only the baseline takes one for each end of a line, and for the end."""
    return side * (side + 1) + 1 if name == BASELINE.name else side**2 / codes_per_step[name]


def print_areas(model, args: argparse.Namespace) -> Image.Image:
    """Milliseconds a step at the end of larger pictures, and what the bytes that are read predict from the first."""
    parts = {side: begun(model, side, 1 - 1 / side) for side in SIDES}
    found: dict[str, list[tuple[float, float]]] = {BASELINE.name: [], PLAIN.name: []}
    for ids in parts.values():

        def run(way: Way, turn: int, ids=ids):
            return part(model, way, ids, seed=turn)

        for name, timing in in_turns([BASELINE, PLAIN], few_turns(args), run).items():
            found[name].append((ids.shape[1], timing.step_ms))
    first_length, first_ms = found[PLAIN.name][0]
    predicted = [(n, first_ms * bytes_a_step(model, n) / bytes_a_step(model, first_length)) for n, _ in found["ar"]]
    say("\n## At the end of larger pictures, the same model\n\n")
    say("| codes | tokens so far | baseline, ms a step | ar, ms a step | predicted from bytes | ar / predicted |")
    say("|---|---|---|---|---|---|")
    for side, (length, slow), (_, ms), (_, guess) in zip(SIDES, *found.values(), predicted, strict=True):
        say(f"| {side} x {side} | {length} | {slow:.1f} | {ms:.1f} | {guess:.1f} | {ms / guess:.2f} |")
    return chart("ms a step at the end of a picture", "tokens", {**found, "ar, predicted": predicted})


def bytes_a_step(model, length: int, batch: int = 1) -> int:
    """Weights and cache that a guided step reads of `batch` rows of that length: of the head only the codes' rows."""
    config, layout = model.config, ImageLayout(**model.config.image_layout)
    size = model.dtype.itemsize
    num_codes = sum(end - first for first, end in layout.code_id_ranges)
    weights = sum(p.numel() for p in model.model.layers.parameters()) + num_codes * config.hidden_size
    head_dim = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return size * (weights + 2 * batch * length * cache)


def print_batches(model, args: argparse.Namespace) -> Image.Image:
    """Pictures a second of larger batches, by the time of steps in the middle of a picture."""
    ids = begun(model, SIDE, 1 / 2)
    rates = []
    say("\n## Batches, the same model, plain decoding\n\n| batch | ms a step | pictures/s | times those of one |")
    say("|---|---|---|---|")
    ways = [Way(str(batch), {"decoding": "ar"}) for batch in BATCH_SIZES]
    run = lambda way, turn: part(model, way, ids, seed=turn, copies=int(way.name))  # noqa: E731
    for name, timing in in_turns(ways, few_turns(args), run).items():
        rates.append((int(name), 1000 * int(name) / timing.step_ms / SIDE**2))
        say(f"| {name} | {timing.step_ms:.1f} | {rates[-1][1]:.4f} | {rates[-1][1] / rates[0][1]:.2f} |")
    return chart("pictures a second", "batch", {PLAIN.name: rates})


def print_large(codes_per_step: dict[str, float], args: argparse.Namespace) -> None:
    """Whole pictures of the 7B shape against the time in which the device reads what a step needs."""
    model, rate = random_model("7B", torch.bfloat16, args.device), bytes_a_second(args.device)
    say(f"\n## The 7B shape, bfloat16, {torch.cuda.get_device_name()}: {rate / 1e12:.2f} TB/s\n")
    say("s trained: with the default checkpoint's codes a step. Of the baseline, a part in the middle was timed.\n")
    say("| pixels | way | s a picture | steps | ms a step | floor, ms | share | s trained | peak, GB |")
    say("|---|---|---|---|---|---|---|---|---|")
    for side in (48, 64):
        floor = 1000 * bytes_a_step(model, side * (side + 1) // 2) / rate
        for way in (BASELINE, PLAIN, *SPECULATIVE):
            steps: float = num_steps(way.name, side, codes_per_step)
            seconds, count, _, peak = part(model, way, begun(model, side, 1 / 2), seed=0, num_steps=30)  # or compiles
            if way is not BASELINE:
                seconds, count, _, peak = whole(model, way, [begun(model, side)], seed=1, **SAMPLING)
            ms, bound = 1000 * seconds / count, 2 * floor if way is BASELINE else floor
            drawn = f"{seconds:.2f} | {count}" if way is not BASELINE else f"{ms * steps / 1000:.2f} | {steps:.0f}"
            say(
                f"| {16 * side} x {16 * side} | {way.name} | {drawn} | {ms:.2f} | {bound:.2f} | {bound / ms:.0%}"
                f" | {ms * steps / 1000:.2f} | {peak / 1e9:.1f} |"
            )


def bytes_a_second(device: str) -> float:
    """That are read and written in copying 4 GB."""
    source = torch.zeros(2**32, dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * len(source) / min(times)


# The report


def say(line: str) -> None:
    print(line, flush=True)
    LINES.append(line)


def window_chart(timings: dict[str, Timing]) -> Image.Image:
    series = {
        name: [(window, times_as_fast(timings, f"{name} {window}")) for window in WINDOWS]
        for name in ("jacobi", "gumbel")
    }
    series[PLAIN.name] = [(window, times_as_fast(timings, PLAIN.name)) for window in WINDOWS]
    return chart("times as fast as the baseline, default checkpoint", "window", series)


def chart(title: str, x_name: str, series: dict[str, list[tuple[float, float]]]) -> Image.Image:
    """Lines over a logarithmic axis from the first line's first place to its last; values from 0."""
    sheet = Image.new("RGB", (460, 340), "white")
    pen, (left, top, right, bottom) = ImageDraw.Draw(sheet), (60, 40, 440, 270)
    places = [x for x, _ in next(iter(series.values()))]
    highest = 1.05 * max(y for line in series.values() for _, y in line)
    pen.text((left, 12), title, INK, font_size=14)
    pen.text((right, bottom + 22), x_name, INK, font_size=12, anchor="ra")
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - share * (bottom - top)
        pen.line((left, y, right, y), GRID)
        pen.text((left - 6, y), f"{share * highest:.3g}", INK, font_size=12, anchor="rm")
    for x in places:
        pen.text((_across(x, places, left, right), bottom + 6), f"{x:g}", INK, font_size=12, anchor="ma")
    for i, (name, line) in enumerate(series.items()):
        dots = [(_across(x, places, left, right), bottom - y / highest * (bottom - top)) for x, y in line]
        pen.line(dots, COLORS[i], width=2)
        for x, y in dots:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), COLORS[i])
        pen.text((left + 130 * i, 318), name, COLORS[i], font_size=13)
    return sheet


def _across(x: float, places: list[float], left: int, right: int) -> float:
    return left + 10 + math.log(x / places[0]) / math.log(places[-1] / places[0]) * (right - left - 20)


def beside(charts: list[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (sum(c.width for c in charts), charts[0].height), "white")
    for i, part in enumerate(charts):
        sheet.paste(part, (i * part.width, 0))
    return sheet


if __name__ == "__main__":
    main()
