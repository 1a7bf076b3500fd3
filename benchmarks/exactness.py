"""That speculative decoding is exact: chi-squared of a toy's answers, and tokens of the default checkpoint.

    python -m benchmarks.exactness

Prints tables in Markdown. The first is about `tests/toy_model.py`: rows of four kinds, in one batch, against the
joint distribution of each, which is computed by plain forwards; broken decoders show what the test finds. The second
compares the tokens of "gumbel" with those of "ar" over seeds, sizes and tasks, in float32 and in bfloat16, whose
rounding depends on how many tokens are computed at a time: a token that differs by it changes all that follow, so
they are counted up to there.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import cycle, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import chi2
from torch import Tensor
from torch.nn import functional as F

from modeling_lumina_mgpt.checkpoints import default_checkpoint
from modeling_lumina_mgpt.pipelines import LuminaMGPTPipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from toy_model import KINDS, broken, chi_squared, draw, joint_probs, toy_model

WAYS: tuple[dict[str, Any], ...] = (
    {"decoding": "ar"},
    {"decoding": "jacobi", "window": 4, "draft": "uniform"},
    {"decoding": "jacobi", "window": 8, "draft": "uniform"},
    {"decoding": "jacobi", "window": 8, "draft": "above"},
    {"decoding": "jacobi", "window": 8, "draft": "left"},
    {"decoding": "jacobi", "window": 4, "draft": "uniform", "guidance_schedule": "decay"},
    {"decoding": "gumbel", "window": 4, "draft": "uniform"},
    {"decoding": "gumbel", "window": 8, "draft": "above"},
)
FAULTS = ("resampling from P", "keeping the old Q")
CHUNK = 4_000  # samples of each kind that one process draws at a time
SPECULATION = tuple(
    {"window": w, "draft": d} for w, d in ((8, "uniform"), (16, "above"), (32, "left"), (64, "uniform"))
)
ROWS = 20  # at a time, of the default checkpoint
SIZES_PX = ((64, 64), (32, 112), (96, 48), (16, 160))
WORDS = "a large red sphere and a small blue cube"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=300_000, help="of each way")
    parser.add_argument("--num-seeds", type=int, default=100, help="of each size and task")
    args = parser.parse_args()
    print_chi_squared(args.num_samples)
    for dtype in (torch.float32, torch.bfloat16):
        print_tokens(dtype, args.num_seeds)


# The distribution


def print_chi_squared(num_samples: int) -> None:
    probs = {schedule: [joint_probs(toy_model(), kind, schedule) for kind in KINDS] for schedule in (None, "decay")}
    print(f"{num_samples:,} samples: degrees of freedom, chi-squared for each of them, its probability\n")
    print(f"| way | {' | '.join(name_of(kind) for kind in KINDS)} | all |\n|---|{'---|' * len(KINDS)}---|", flush=True)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for fault, way in [("", way) for way in WAYS] + [(fault, WAYS[1]) for fault in FAULTS]:
            per_kind = -(-num_samples // len(KINDS))
            sizes = [min(CHUNK, per_kind - first) for first in range(0, per_kind, CHUNK)]
            parts = pool.map(samples, sizes, range(len(sizes)), repeat(way), repeat(fault))
            found = [torch.cat([torch.from_numpy(x) for x in rows]) for rows in zip(*parts, strict=True)]
            own = probs[way.get("guidance_schedule")]
            tests = [chi_squared(rows, *table) for rows, table in zip(found, own, strict=True)]
            tests.append((sum(x for x, _ in tests), sum(freedom for _, freedom in tests)))
            name = ", ".join([" ".join(map(str, way.values())), *([fault] if fault else [])])
            entries = [f"{freedom:,}: {x / freedom:.3f} ({chi2.sf(x, freedom):.2g})" for x, freedom in tests]
            print(f"| {name} | {' | '.join(entries)} |", flush=True)


def name_of(kind) -> str:
    if kind.height is None:
        return f"free, {kind.num_counted} tokens"
    return f"{kind.height // 8} x {kind.width // 8} codes, {kind.num_counted} tokens"


def samples(num_samples: int, seed: int, way: dict[str, Any], fault: str) -> list[np.ndarray]:
    """`(num_samples, num_counted)` of each kind."""
    torch.set_num_threads(1)
    with broken(fault) if fault else nullcontext():
        return [rows.numpy() for rows in draw(toy_model(), num_samples, seed, **way)]


# Tokens


def print_tokens(dtype: torch.dtype, num_seeds: int) -> None:
    pipe = LuminaMGPTPipeline.from_pretrained(default_checkpoint(), dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    print(f'\nThe default checkpoint, {dtype}: "gumbel" against "ar"\n')
    print("| answers | equal | tokens | differ |\n|---|---|---|---|")
    counts, pad_id = torch.zeros(4, dtype=torch.long), pipe.transformer.config.pad_token_id
    for name, inputs in questions(pipe):
        own = torch.zeros(4, dtype=torch.long)
        for first, speculation in zip(range(0, num_seeds, ROWS), cycle(SPECULATION), strict=False):
            seeds = range(first, min(first + ROWS, num_seeds))
            plain = answers(pipe, inputs, seeds, decoding="ar")
            own += compare(plain, answers(pipe, inputs, seeds, decoding="gumbel", **speculation), pad_id)
            alone = answers(pipe, inputs, seeds[:1], decoding="gumbel", **speculation)  # rather than in a batch
            own += compare(plain[:1], alone, pad_id)
        counts += own
        print(row_of(name, own), flush=True)
    print(row_of("all", counts), flush=True)


def row_of(name: str, counts: Tensor) -> str:
    answers, equal, tokens, differ = counts.tolist()
    return f"| {name} | {equal} of {answers} | {tokens:,} | {differ} |"


def questions(pipe: LuminaMGPTPipeline) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and arguments of `generate`."""
    processor = pipe.processor
    codes = pipe(WORDS, output_type="latent", generator=torch.Generator().manual_seed(0)).images[0]
    height, width = (side * processor.uni_rep.code_px for side in codes.shape)
    template = {"tokenize": True, "return_dict": True}

    def asked(task: str, height_px: int, width_px: int, **options) -> dict[str, Any]:
        condition = "depth" if "{condition}" in processor.tasks[task].template else None
        turn = processor.task_prompt(task, WORDS, height_px, width_px, condition)
        inputs = processor.apply_chat_template([[{"role": "user", "content": turn}]], **template, **options)
        return {**inputs, "height": height_px, "width": width_px, "eos_token_id": processor.uni_rep.end_id}

    for height_px, width_px in SIZES_PX:
        yield f"text-to-image, {width_px} x {height_px}", asked("text-to-image", height_px, width_px)
    yield "edit", asked("edit", height, width, images=[[codes]])
    begun = {"height": [2 * height], "width": [width], "upper_rows": [codes]}
    yield "panel, one given", asked("panel", 2 * height, width, **begun)
    content = [{"type": "text", "text": "What is it?"}, {"type": "image", "image": codes}]
    inputs = processor.apply_chat_template([[{"role": "user", "content": content}]], **template)
    yield "chat, free", {**inputs, "text_top_k": 400, "text_temperature": 2.0, "max_new_tokens": 150}


def answers(pipe: LuminaMGPTPipeline, inputs: dict[str, Any], seeds: range, **decoding) -> Tensor:
    """`(seeds, length)`, padded on the right."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    ids = pipe.transformer.generate(**inputs, generator=generators, num_return_sequences=len(seeds), **decoding)
    return ids[:, inputs["input_ids"].shape[1] :]


def compare(plain: Tensor, other: Tensor, pad_id: int) -> Tensor:
    """Answers, those that are equal, tokens up to the first that differs, and how many of these differ. `(4)`"""
    width = max(plain.shape[1], other.shape[1])
    plain, other = (F.pad(ids, (0, width - ids.shape[1]), value=pad_id) for ids in (plain, other))
    agrees = (plain == other).long().cumprod(1)
    num_equal = int(agrees.all(1).sum())
    num_tokens = int((agrees * (plain != pad_id)).sum())
    num_different = len(plain) - num_equal
    return torch.tensor([len(plain), num_equal, num_tokens + num_different, num_different])


if __name__ == "__main__":
    main()
