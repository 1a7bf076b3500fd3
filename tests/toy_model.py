"""A decoder so small that the distribution of its answers can be written down, and samples' chi-squared from it.

The distribution is computed by plain forwards, one for each beginning of an answer, and knows nothing of the decoding
loops: only the grammar of `uni_rep` is shared. Rows of four kinds are drawn in one batch, so that they differ in
prompt, length, size, guidance, top-k and temperature; one kind writes text and begins a picture when it likes.
"""

from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling_lumina_mgpt import LuminaMGPTConfig, LuminaMGPTForConditionalGeneration
from modeling_lumina_mgpt import decoding_lumina_mgpt as engine
from modeling_lumina_mgpt.uni_rep import ImageLayout

PAD, BOS = 0, 1
LAYOUT = ImageLayout(
    start_id=2,
    end_id=3,
    end_of_line_id=4,
    end_of_turn_id=5,
    size_ids=[6, 7],
    code_id_ranges=[[8, 14], [18, 24]],
    size_unit_px=16,
    codes_per_size_unit=2,
)
VOCAB_SIZE = 26  # ids 14 to 17, 24 and 25 are text
MAX_NEW_TOKENS = 16  # just enough for 4x2 codes
ENDS = [LAYOUT.end_id, LAYOUT.end_of_turn_id]
BATCH_SIZE = 400  # of each kind
MIN_EXPECTED = 5  # samples in a cell, or it is counted together with neighbors


@dataclass(frozen=True)
class Kind:
    """Rows that are alike, and how many of their new tokens are counted."""

    prompt: tuple[int, ...]
    num_counted: int
    height: int | None = None
    width: int | None = None
    guidance_scale: float = 1.0
    image_top_k: int = 12
    image_temperature: float = 1.0
    text_top_k: int = 5


KINDS = (
    Kind((BOS, 14, 15), 10, 16, 16, guidance_scale=3.0, image_top_k=9),  # 2x2 codes, the whole picture
    Kind((BOS, 24, 14, 25, 16), 7, 16, 32, guidance_scale=1.5, image_temperature=1.3),  # the first of two lines
    Kind((BOS, 17), 8, 32, 16, image_top_k=10),  # the first two of four lines
    Kind((BOS, 16, 16, 24), 5, guidance_scale=2.0, image_top_k=4),  # free
)


def toy_model() -> LuminaMGPTForConditionalGeneration:
    torch.manual_seed(0)
    config = LuminaMGPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=LAYOUT.end_of_turn_id,
        image_layout=LAYOUT.layout_dict(),
    )
    return LuminaMGPTForConditionalGeneration(config).eval()


# The distribution


@torch.no_grad()
def joint_probs(model, kind: Kind, guidance_schedule: str | None = None) -> tuple[Tensor, Tensor]:
    """Every possible beginning of an answer, int64 `(cells, num_counted)`, and its probability, float64 `(cells)`."""
    ids, probs = torch.tensor([kind.prompt]), torch.ones(1, dtype=torch.float64)
    for _ in range(kind.num_counted):
        probs = probs[:, None] * next_probs(model, kind, ids, guidance_schedule)  # (beginnings, vocab)
        beginning, token = (probs > 0).nonzero(as_tuple=True)
        ids, probs = torch.cat([ids[beginning], token[:, None]], 1), probs[beginning, token]
    return ids[:, len(kind.prompt) :], probs


def next_probs(model, kind: Kind, ids: Tensor, guidance_schedule: str | None) -> Tensor:
    """`ids (beginnings, length)` to the distribution of the next token, float64 `(beginnings, vocab)`."""
    length, probs = ids.shape[1], torch.zeros(len(ids), VOCAB_SIZE, dtype=torch.float64)
    has_ended = torch.isin(ids, torch.tensor(ENDS)).any(1)
    probs[has_ended, PAD] = 1
    is_start = ids == LAYOUT.start_id
    starts = torch.where(is_start.any(1), is_start.int().argmax(1), length)  # (beginnings)
    for start in starts[~has_ended].unique().tolist():
        own = (starts == start) & ~has_ended
        probs[own] = next_probs_since(model, kind, ids[own], start, guidance_schedule)
    return probs


def next_probs_since(model, kind: Kind, ids: Tensor, start: int, guidance_schedule: str | None) -> Tensor:
    """The same, of answers whose picture started in column `start`; after the last column: not yet."""
    length = ids.shape[1]
    step, room = length - start, MAX_NEW_TOKENS - (length - len(kind.prompt))
    steps = torch.full((len(ids),), step)
    wanted = LAYOUT.grid(kind.height, kind.width) if kind.height else (0, 0)
    rows, cols = (
        LAYOUT.size_of_id(ids[:, start + i]) * LAYOUT.codes_per_size_unit if step > i else steps * 0 + wanted[i - 1]
        for i in (1, 2)
    )
    forced = LAYOUT.forced_next(steps, rows, cols)
    if step == 0 and kind.height:
        forced[:] = LAYOUT.start_id
    allowed = LAYOUT.allowed(steps, rows, steps * 0 + room, VOCAB_SIZE)

    scores = model(ids).logits[:, -1].double()
    if step >= 3:
        unconditional = model(ids[:, start:]).logits[:, -1].double()
        scale = guidance_scale(kind, step, rows * cols, guidance_schedule)[:, None]
        scores = unconditional + scale * (scores - unconditional)
    scores = scores.masked_fill(~allowed, -torch.inf)
    top_k = kind.image_top_k if step else kind.text_top_k
    worst_kept = scores.topk(top_k).values[:, -1:]
    scores = scores.masked_fill(scores < worst_kept, -torch.inf) / (kind.image_temperature if step else 1)
    certain = F.one_hot(forced.clamp(min=0), VOCAB_SIZE).double()
    return torch.where(forced[:, None] >= 0, certain, scores.softmax(1))


def guidance_scale(kind: Kind, step: int, area: Tensor, schedule: str | None) -> Tensor:
    """At `step` tokens since and including the start. `area (rows)`: here twice the sizes are the code grid."""
    scale = torch.full(area.shape, kind.guidance_scale, dtype=torch.float64)
    for num_since in range(2, step) if schedule == "decay" and kind.guidance_scale != 1 else ():
        scale = (scale * (1 - num_since / area)).clamp(min=4)
    return scale


# Samples against it


def draw(model, num_samples: int, seed: int, **settings) -> list[Tensor]:
    """Beginnings of answers, `(num_samples, num_counted)` of each kind; all kinds share each batch."""
    longest = max(len(kind.prompt) for kind in KINDS)
    ids = torch.tensor([[PAD] * (longest - len(kind.prompt)) + list(kind.prompt) for kind in KINDS])
    names = ("height", "width", "guidance_scale", "image_top_k", "image_temperature", "text_top_k")
    own = {name: [getattr(kind, name) for kind in KINDS] for name in names}
    generator, answers = torch.Generator().manual_seed(seed), []
    for first in range(0, num_samples, BATCH_SIZE):
        output = model.generate(
            ids,
            attention_mask=(ids != PAD).long(),
            num_return_sequences=min(BATCH_SIZE, num_samples - first),
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=ENDS,
            generator=generator,
            **own,
            **settings,
        )
        rows = F.pad(output[:, longest:], (0, MAX_NEW_TOKENS), value=PAD).chunk(len(KINDS))
        answers.append([row[:, : kind.num_counted] for row, kind in zip(rows, KINDS, strict=True)])
    return [torch.cat(rows) for rows in zip(*answers, strict=True)]


def chi_squared(samples: Tensor, cells: Tensor, probs: Tensor) -> tuple[float, int]:
    """Statistic and degrees of freedom; infinite if a sample is none that the distribution allows."""
    counts = count(samples, cells)
    if counts.sum() < len(samples):
        return float("inf"), len(probs) - 1
    expected = probs / probs.sum() * len(samples)
    is_rare = expected < MIN_EXPECTED  # neighbors begin alike, so together they still tell something
    groups = (expected.masked_fill(~is_rare, 0).cumsum(0) / (2 * MIN_EXPECTED)).long()
    groups = torch.where(
        is_rare, groups.clamp(max=max(int(groups.max()) - 1, 0)), len(probs) + torch.arange(len(probs))
    )
    _, groups = groups.unique(return_inverse=True)
    expected, counts = (torch.zeros(len(probs)).double().scatter_add_(0, groups, x) for x in (expected, counts))
    expected, counts = expected[: groups.max() + 1], counts[: groups.max() + 1]
    return float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1


def count(samples: Tensor, cells: Tensor) -> Tensor:
    """How many of `samples (rows, length)` are each of `cells (cells, length)`; others are not counted. `(cells)`"""
    places = VOCAB_SIZE ** torch.arange(cells.shape[1])
    keys, order = (cells * places).sum(1).sort()
    found = (samples * places).sum(1)
    index = torch.searchsorted(keys, found).clamp(max=len(keys) - 1)
    return torch.bincount(order[index[keys[index] == found]], minlength=len(cells)).double()


# What must be found out


def broken(name: str):
    """Within it, "jacobi" is not exact: by "resampling from P", or by "keeping the old Q"."""
    if name == "resampling from P":
        return mock.patch.object(engine, "verify", _resampling_from_probs)
    kept: list[Tensor] = []
    verify, carry = engine.verify, engine.carry

    def keeping(probs: Tensor, draft_probs: Tensor, *args):
        kept.append(draft_probs.clone())
        return verify(probs, draft_probs, *args)

    return mock.patch.multiple(
        engine, verify=keeping, carry=lambda probs, *args: carry(kept.pop() if kept else probs, *args)
    )


def _resampling_from_probs(probs: Tensor, draft_probs: Tensor, drafts: Tensor, threshold: Tensor, noise: Tensor):
    kept = threshold * draft_probs.gather(-1, drafts[..., None])[..., 0] < probs.gather(-1, drafts[..., None])[..., 0]
    return kept, torch.where(kept, drafts, (probs.log() + noise).argmax(-1))
