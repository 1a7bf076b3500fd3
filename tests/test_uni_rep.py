"""An image's layout can be written, read and enforced, and ids come from names alone."""

import json

import pytest
import torch
from golden_weights import PUBLISHED_LAYOUT, load_golden_xz

from helpers import Vocabulary
from modeling_lumina_mgpt import UniRep
from modeling_lumina_mgpt.uni_rep import ImageLayout

GOLDEN = load_golden_xz("sequences")["lumina_mgpt"]
GRIDS = [(2 * rows, 2 * cols) for rows in range(1, 6) for cols in range(1, 6)]
VOCAB_SIZE = 400


@pytest.fixture
def uni_rep(tiny_processor):
    return tiny_processor.uni_rep


def codes_of(rows, cols):
    return torch.randint(64, (rows, cols), generator=torch.Generator().manual_seed(100 * rows + cols))


def test_buckets_are_the_reference_lists():
    for target_px, sizes in GOLDEN["crop_lists"].items():
        assert PUBLISHED_LAYOUT.buckets(int(target_px)) == [tuple(size) for size in sizes]


def test_best_bucket_is_the_reference_choice():
    for choice in GOLDEN["crop_choices"]:
        width_px, height_px = choice["size"]
        assert PUBLISHED_LAYOUT.best_bucket(width_px, height_px, choice["target"]) == tuple(choice["bucket"])


@pytest.mark.parametrize(("rows", "cols"), GRIDS)
def test_decode_inverts_encode_and_keeps_the_finished_rows_of_any_beginning(uni_rep, rows, cols):
    codes = codes_of(rows, cols)
    ids = uni_rep.encode(codes)
    assert len(ids) == uni_rep.num_tokens(rows, cols)
    for length in range(len(ids) + 1):
        finished = min(max(length - 3, 0) // (cols + 1), rows)
        kept = uni_rep.decode(ids[:length])
        assert len(kept) == finished
        assert kept.equal(codes[:finished, : kept.shape[1]])
    upper = uni_rep.encode(codes[: rows // 2], rows=rows)
    assert upper.equal(ids[: 3 + rows // 2 * (cols + 1)])


def test_any_changed_token_is_found_where_it_is(uni_rep):
    ids = uni_rep.encode(codes_of(4, 6))
    for position in range(len(ids)):
        changed = ids.clone()
        changed[position] = uni_rep.end_of_turn_id
        with pytest.raises(ValueError, match=rf"token {uni_rep.end_of_turn_id} at position {position},"):
            uni_rep.decode(changed)
    with pytest.raises(ValueError, match=rf"position {len(ids)}, expected nothing"):
        uni_rep.decode([*ids.tolist(), 5])


def test_grammar_allows_exactly_what_encode_writes_for_rows_of_any_size_and_phase(uni_rep):
    steps = [
        (step, rows, cols, int(ids[step]), len(ids) - step)
        for rows, cols in GRIDS
        for ids in [uni_rep.encode(codes_of(rows, cols))]
        for step in range(1, len(ids))
    ]
    step, rows, cols, wanted, room = torch.tensor(steps).T
    forced = uni_rep.forced_next(step, rows, cols)
    assert forced[step < 3].equal(wanted[step < 3])
    allowed = uni_rep.allowed(step, rows, room, VOCAB_SIZE)
    is_allowed = allowed.gather(1, wanted[:, None])[:, 0]
    assert torch.where(forced >= 0, forced == wanted, is_allowed).all()
    num_codes = sum(rows * cols for rows, cols in GRIDS)
    assert ((forced < 0) & (step >= 3)).sum() == num_codes
    assert (allowed[(forced < 0) & (step >= 3)].sum(1) == len(uni_rep.code_ids)).all()


def test_random_walks_through_the_grammar_never_leave_an_image_unfinished(uni_rep):
    generator = torch.Generator().manual_seed(0)
    step, rows, cols = torch.zeros(3, 64, dtype=torch.long)
    walk = []
    for room in range(120, 0, -1):
        choices = uni_rep.allowed(step, rows, torch.full_like(step, room), VOCAB_SIZE).float()
        choices[:, uni_rep.start_id] *= 50
        ids = torch.multinomial(choices, 1, generator=generator)[:, 0]
        forced = uni_rep.forced_next(step, rows, cols)
        ids = torch.where(forced >= 0, forced, ids)
        walk.append(ids)
        sizes = uni_rep.size_of_id(ids) * uni_rep.codes_per_size_unit
        rows = torch.where(step == 1, sizes, torch.where(ids == uni_rep.start_id, 0, rows))
        cols = torch.where(step == 2, sizes, torch.where(ids == uni_rep.start_id, 0, cols))
        step = torch.where((step > 0) | (ids == uni_rep.start_id), step + 1, 0) * (ids != uni_rep.end_id)
    num_images = 0
    for ids in torch.stack(walk, 1):
        while len(starts := (ids == uni_rep.start_id).nonzero()):
            end = int((ids == uni_rep.end_id).nonzero()[0]) + 1
            codes = uni_rep.decode(ids[int(starts[0]) : end])
            assert uni_rep.num_tokens(*codes.shape) == end - int(starts[0])
            ids, num_images = ids[end:], num_images + 1
        assert uni_rep.end_id not in ids
    assert num_images > 64


def test_requested_sizes_are_forced(uni_rep):
    rows, cols = uni_rep.grid(height_px=32, width_px=80)
    step = torch.tensor([0, 1, 2])
    forced = uni_rep.forced_next(step, torch.full_like(step, rows), torch.full_like(step, cols))
    assert forced.tolist() == [-1, *uni_rep.header(rows, cols)[1:]]


def test_ids_follow_names_not_positions():
    names = ["IMGIMGBZ", "<eoss>", "IMGIMGAZ", "<reserved08802>", "<racm3:break>", "IMGIMGCZ", "<reserved08801>"]
    vocabulary = Vocabulary({name: i for i, name in enumerate([*names, "<reserved08799>", "<reserved08706>"])})
    rep = UniRep.from_tokenizer(vocabulary, 32, 1)
    assert (rep.code_ids.tolist(), rep.size_ids, rep.code_id_ranges) == ([2, 0, 5], [6, 3], [[0, 1], [2, 3], [5, 6]])
    assert rep.decode(rep.encode([[2, 0]])).tolist() == [[2, 0]]


@pytest.mark.parametrize("name", ["IMGIMGAZ", "<eoss>", "<reserved08801>"])
def test_a_missing_name_is_named(tiny_tokenizer, name):
    vocabulary = Vocabulary({other: i for other, i in tiny_tokenizer.get_vocab().items() if other != name})
    with pytest.raises(ValueError, match="image code 0" if "IMG" in name else name):
        UniRep.from_tokenizer(vocabulary, 16)


def test_layout_is_restored_from_json(uni_rep):
    restored = ImageLayout(**json.loads(json.dumps(uni_rep.layout_dict())))
    assert restored.layout_dict() == uni_rep.layout_dict()
