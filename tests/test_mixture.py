"""Mixtures: any place opens alike, proportions are kept, and what cannot be used is skipped by rule."""

import json
import struct

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image

from helpers import CAPTIONED, random_picture
from modeling_lumina_mgpt.processing_lumina_mgpt import IMAGE
from modeling_lumina_mgpt.training.mixture import Mixture, MixtureReader, read_mixture


def captioned(num, first=0):
    rows = range(first, first + num)
    values = {"image": [random_picture(64, 64, i) for i in rows], "caption": [f"sphere {i}" for i in rows]}
    return Dataset.from_dict(values, features=CAPTIONED)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same eight records as each kind of place."""
    tmp_path = tmp_path_factory.mktemp("places")
    dataset = captioned(8)
    dataset.save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(str(tmp_path / "splits"))
    dataset.to_parquet(tmp_path / "file.parquet")
    (tmp_path / "folder").mkdir()
    dataset.to_parquet(tmp_path / "folder" / "train.parquet")
    lines = []
    for i, record in enumerate(dataset):
        record["image"].save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": record["caption"]}))
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    return tmp_path


def reader(processor, *sources, max_length=500, random_crop=False, **fields):
    return MixtureReader(Mixture(64, list(sources), **fields), processor, max_length, random_crop)


def source(path, task="text-to-image", **fields):
    return {"task": task, "path": str(path), **fields}


def order(dataset):
    return [(row["source"], row["index"]) for row in dataset]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["saved", "splits", "file.parquet", "folder", "lines.jsonl"])
def test_every_place_gives_the_same_records(tiny_processor, places, name, streaming):
    options = {"folder": str(places)} if name == "lines.jsonl" else {}
    expected = reader(tiny_processor, source(places / "saved"))
    found = reader(tiny_processor, source(places / name, streaming=streaming, options=options, num_records=5))
    rows = list(found.dataset)
    assert order(rows) == order(expected.dataset)[:5]
    assert found.encode(rows) == expected.encode(rows=list(expected.dataset)[:5])


def test_a_record_is_ids_and_labels_of_its_conversation(tiny_processor, places):
    own = reader(tiny_processor, source(places / "saved"))
    (encoded,) = own.encode([own.dataset[3]])
    prompt = tiny_processor.task_prompt("text-to-image", "sphere 3", height=64, width=64)
    expected = tiny_processor.encode_conversation([prompt, IMAGE], [random_picture(64, 64, 3)], target_px=64)
    assert encoded == {**expected, "task": "text-to-image"}


def test_weights_are_proportions_until_every_record_has_come(tiny_processor, places):
    sources = [source(places / "saved", weight=3), source(places / "file.parquet", "caption", weight=1)]
    rows = order(reader(tiny_processor, *sources).dataset)
    assert {*rows} == {(number, index) for number in (0, 1) for index in range(8)}
    sources[0]["num_records"] = 1
    many = [number for number, _ in order(reader(tiny_processor, *sources, seed=1).dataset)]
    drawn = np.random.default_rng(1).choice(2, 1000, p=[0.75, 0.25])[: len(many)]
    assert many == drawn.tolist()
    plain = reader(tiny_processor, source(places / "saved"), source(places / "file.parquet", "caption"))
    assert order(plain.dataset) == [(number, index) for number in (0, 1) for index in range(8)]


def test_a_stream_equals_its_dataset_each_time(tiny_processor, places):
    sources = [source(places / "saved", weight=2), source(places / "file.parquet", "caption", weight=1)]
    whole = reader(tiny_processor, *sources)
    streamed = reader(tiny_processor, *({**values, "streaming": True} for values in sources))
    mixed = reader(tiny_processor, {**sources[0], "streaming": True}, sources[1])
    rows = list(streamed.dataset)
    assert order(rows) == order(whole.dataset) == order(streamed.dataset) == order(mixed.dataset)
    encoded = whole.encode(list(whole.dataset))
    assert streamed.encode(rows) == encoded and mixed.encode(list(mixed.dataset)) == encoded
    with pytest.raises(ValueError, match="weight"):
        Mixture(64, [source("a", streaming=True), source("b")])


def test_random_crops_differ_by_epoch_and_are_the_same_for_a_photo_and_its_map(tiny_processor, tmp_path):
    same = [random_picture(96, 64, i) for i in range(3)]
    features = Features({"image": Image(), "depth": Image()})
    Dataset.from_dict({"image": same, "depth": same}, features=features).save_to_disk(str(tmp_path / "maps"))
    uni_rep = tiny_processor.uni_rep
    seen = set()
    own = reader(tiny_processor, source(tmp_path / "maps", "depth"), random_crop=True)
    for epoch in range(4):
        (encoded,) = own.encode([own.dataset[1]], epoch)
        ids = encoded["input_ids"]
        starts = [i for i, token in enumerate(ids) if token == uni_rep.start_id]
        ends = [i for i, token in enumerate(ids) if token == uni_rep.end_id]
        photo, drawn = (ids[start:end] for start, end in zip(starts, ends, strict=True))
        assert photo == drawn
        seen.add(tuple(photo))
        assert own.encode([own.dataset[1]], epoch)[0] == encoded
    assert len(seen) > 1


def damaged(path, num, places):
    """Records of which some have a damaged picture."""
    values = captioned(num).cast_column("image", Image(decode=False))[:]
    for place in places:
        values["image"][place] = {"bytes": b"nonsense", "path": None}
    Dataset.from_dict(values, features=CAPTIONED).save_to_disk(str(path))
    return source(path)


def test_unusable_records_are_skipped_and_listed(tiny_processor, tmp_path):
    broken = damaged(tmp_path / "broken", 6, [1, 5])
    for streaming in (False, True):
        own = reader(tiny_processor, {**broken, "streaming": streaming}, max_skipped=0.5)
        rows = list(own.dataset)
        kept = own.encode(rows)
        assert len(kept) == 4
        assert own.skipped[0].keys() == {1, 5} and "image" in own.skipped[0][1] and " at 0x" not in own.skipped[0][1]
    whole = reader(tiny_processor, broken, max_skipped=0.5)
    assert whole.encode([rows[1]]) == whole.encode([whole.dataset[2]])  # none left: the next one that can be used
    assert own.encode([rows[1]]) == kept[-1:]  # of a stream the last one
    fresh = reader(tiny_processor, {**broken, "streaming": True}, max_skipped=0.5)
    with pytest.raises(ValueError, match="all of a batch"):
        fresh.encode([rows[1]])


def test_whatever_a_decoder_raises_is_a_reason_to_skip(tiny_processor, places, monkeypatch):
    def cut_off(self, index):
        raise struct.error("unpack requires a buffer of 4 bytes")  # as PIL does of a cut EXIF block

    own = reader(tiny_processor, source(places / "saved"), max_skipped=1.0)
    monkeypatch.setattr(Dataset, "__getitem__", cut_off)
    (reason,) = own.attempt([{"source": 0, "index": 0}])
    assert "cannot be read: unpack requires a buffer" in reason


def test_what_was_saved_without_splits_has_none_to_choose(tiny_processor, places):
    with pytest.raises(ValueError, match=r"split 'train\[:2\]': .*saved without splits; accepted is 'train'"):
        reader(tiny_processor, source(places / "saved", split="train[:2]"))


def test_over_long_records_are_skipped(tiny_processor, places):
    own = reader(tiny_processor, source(places / "saved"), max_length=10, max_skipped=1.0)
    with pytest.raises(ValueError, match="all of a batch"):
        own.encode([own.dataset[0]])
    assert own.skipped[0].keys() == {*range(8)} and "max_length is 10" in own.skipped[0][0]


def test_too_many_skipped_is_an_error_with_reasons(tiny_processor, tmp_path):
    own = reader(tiny_processor, damaged(tmp_path / "broken", 12, [1, 3, 5]), max_skipped=0.2)
    with pytest.raises(ValueError, match=r"broken.*3 of 12 records.*max_skipped 0\.2.*3 such as record 1: .*image"):
        own.encode(list(own.dataset))


def test_wrong_sources_are_named(tiny_processor, places):
    def error(**fields):
        with pytest.raises(ValueError) as caught:
            reader(tiny_processor, source(places / "saved") | fields)
        return str(caught.value)

    message = error(columns={"caption": "text"})
    assert "saved" in message and "'text'" in message and "image, caption" in message
    assert "'nonsense'" in error(task="nonsense")
    assert "nonsense" in error(options={"nonsense": 1})
    assert "nothing.parquet" in error(path=str(places / "nothing.parquet"))
    for place in ("splits", "folder"):
        message = error(path=str(places / place), split="validation")
        assert place in message and "validation" in message and "train" in message


@pytest.mark.parametrize(
    ("sources", "named"),
    [
        ([], "sources"),
        ([source("a", colums={})], "colums"),
        ([source("a", weight=1), source("b")], "weights"),
        ([source("a", weight=0)], "weight 0"),
        ([source("tabletop")], "num_records"),
    ],
)
def test_wrong_mixtures_are_errors(sources, named):
    with pytest.raises(ValueError, match=named):
        Mixture(64, sources)


@pytest.mark.parametrize("values", [{"target_px": 64, "sourcs": []}, {"sources": [source("a")]}, 3])
def test_fields_that_a_mixture_has_not_are_errors(values):
    with pytest.raises(ValueError, match=r"evaluation: .*accepted are target_px, sources"):
        read_mixture(values, "evaluation")


def test_a_stream_goes_round_in_another_order_each_time(tiny_processor, places):
    own = reader(tiny_processor, source(places / "saved", streaming=True), random_crop=True)
    rows = list(own.passes(seed=3).take(16))
    assert [row["epoch"] for row in rows] == [0] * 8 + [1] * 8
    assert sorted(order(rows[:8])) == sorted(order(rows[8:])) == order(own.dataset)
    assert order(rows[:8]) != order(rows[8:]) and order(rows) == order(own.passes(seed=3).take(16))
    (later,) = own.encode(rows[8:9])
    assert later == {**own.encode([{**rows[8], "epoch": 1}])[0], "epoch": 1}


def test_tabletop_is_a_source(tiny_processor):
    tabletop = {"path": "tabletop", "num_records": 3, "options": {"max_aspect_ratio": 1}}
    own = reader(tiny_processor, {**tabletop, "task": "text-to-image"}, {**tabletop, "task": "vqa"})
    encoded = own.encode(list(own.dataset))
    assert [record["task"] for record in encoded] == ["text-to-image"] * 3 + ["vqa"] * 3
    assert own.encode([own.dataset[4]]) == [encoded[4]]


def test_a_source_may_have_pictures_of_another_size(tiny_processor):
    tabletop = {"path": "tabletop", "num_records": 2, "task": "text-to-image", "options": {"max_aspect_ratio": 1}}
    own = reader(tiny_processor, {**tabletop, "target_px": 32}, tabletop)
    small, *_, large = own.encode(list(own.dataset))
    (drawn,) = [part for part in tiny_processor.decode_ids(torch.tensor(small["input_ids"])) if hasattr(part, "size")]
    assert drawn.size == (32, 32) and len(large["input_ids"]) > len(small["input_ids"])
    assert own.encode([own.dataset[0]]) == [small]


def test_halves_of_panels_are_whole_scenes(tiny_processor):
    own = reader(tiny_processor, {"path": "tabletop", "num_records": 8, "task": "pair"}, max_length=2000)
    step_px = 2 * tiny_processor.uni_rep.size_unit_px
    halves = {(w, h // 2) for w, h in tiny_processor.uni_rep.buckets(64) if h % step_px == 0}
    assert {*own.sources[0].dataset.sizes} <= halves
