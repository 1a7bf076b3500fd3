"""Tokenizing ahead: the same ids as from images, by any number of processes, however often they are killed."""

import json
import sys
import time
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path
from socket import gethostname

import pytest
import torch
from datasets import Dataset, load_dataset
from typer.testing import CliRunner

from helpers import CAPTIONED, contents, random_picture
from modeling_lumina_mgpt.pipelines.cli import app
from modeling_lumina_mgpt.training import tokenize_dataset
from modeling_lumina_mgpt.training.mixture import Mixture, MixtureReader
from modeling_lumina_mgpt.training.tokenize_dataset import load_tokenized, tokenize

MAX_LENGTH = 500


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(tokenize_dataset, "SHARD_RECORDS", 4)
    monkeypatch.setattr(tokenize_dataset, "BATCH_RECORDS", 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Twenty-two records of two sizes."""
    sizes = [(64, 64), (96, 48)]
    pictures = [random_picture(*sizes[i % 2], i) for i in range(22)]
    values = {"image": pictures, "caption": [f"sphere {i}" for i in range(22)]}
    folder = tmp_path_factory.mktemp("data") / "saved"
    Dataset.from_dict(values, features=CAPTIONED).save_to_disk(str(folder))
    return str(folder)


def mixture(saved, **fields):
    sources = [
        {"task": "text-to-image", "path": saved},
        {"task": "caption", "path": saved, "num_records": 8},
    ]
    return Mixture(64, sources, **fields)


def test_records_are_those_from_images(tiny_processor, saved, tmp_path):
    mixed = mixture(saved)
    tokenize(mixed, tiny_processor, tmp_path / "out", MAX_LENGTH, num_proc=1)
    loaded = load_tokenized(mixed, tiny_processor, tmp_path / "out", MAX_LENGTH)
    reader = MixtureReader(mixed, tiny_processor, MAX_LENGTH)
    expected = [record for row in reader.dataset for record in reader.encode([row])]
    assert [{k: v for k, v in record.items() if k != "length"} for record in loaded] == expected
    assert loaded["length"] == [len(record["input_ids"]) for record in expected]
    plain = load_dataset(str(tmp_path / "out"), split="train")
    assert plain.column_names == ["input_ids", "labels", "task", "source", "index"] and len(plain) == len(loaded)
    assert plain["index"] == [*range(22), *range(8)] and (tmp_path / "out" / "skipped.jsonl").read_text() == ""


def test_any_number_of_processes_makes_the_same_files(tiny_processor, saved, tmp_path):
    mixed = mixture(saved)
    tokenize(mixed, tiny_processor, tmp_path / "one", MAX_LENGTH, num_proc=1)
    tokenize(mixed, tiny_processor, tmp_path / "workers", MAX_LENGTH, num_proc=2)
    tokenize(mixed, tiny_processor, tmp_path / "ranks", MAX_LENGTH, rank=1, world_size=2, num_proc=1)
    with pytest.raises(ValueError, match=r"not finished, 00-saved-00000.parquet, .* and 1 others"):
        load_tokenized(mixed, tiny_processor, tmp_path / "ranks", MAX_LENGTH)
    tokenize(mixed, tiny_processor, tmp_path / "ranks", MAX_LENGTH, rank=0, world_size=2, num_proc=1)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "workers") == contents(tmp_path / "ranks")
    assert sum(name.startswith("data/") for name in one) == 6 + 2


def test_a_stream_is_tokenized_like_its_dataset(tiny_processor, saved, tmp_path):
    loaded = []
    for streaming in (False, True):
        source = {"task": "caption", "path": saved, "streaming": streaming}
        for num in (8, 10):
            mixed = Mixture(64, [{**source, "num_records": num}])
            tokenize(mixed, tiny_processor, tmp_path / f"{num}-{streaming}", MAX_LENGTH, num_proc=1)
            found = load_tokenized(mixed, tiny_processor, tmp_path / f"{num}-{streaming}", MAX_LENGTH)
            assert len(found) == num
        loaded.append(found[:])
    assert loaded[0] == loaded[1]
    last = max((tmp_path / "8-True" / "data").iterdir())
    last.unlink()  # the empty one by which a stream's end is known
    with pytest.raises(ValueError, match=last.name):
        load_tokenized(Mixture(64, [source | {"num_records": 8}]), tiny_processor, tmp_path / "8-True", MAX_LENGTH)


def halting_run(mixed, processor, folder, num_proc, begun, allowed):
    """Tokenizes only as many batches as are `allowed`; counts those `begun`."""
    attempt = MixtureReader.attempt

    def halting_attempt(self, rows, epoch=0):
        begun.release()
        allowed.acquire()
        return attempt(self, rows, epoch)

    torch.set_num_threads(1)
    MixtureReader.attempt = halting_attempt
    tokenize(mixed, processor, folder, MAX_LENGTH, num_proc=num_proc)


def is_running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")
@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_killed_run_goes_on_where_it_was(tiny_processor, saved, tmp_path, num_proc):
    mixed, out, fork = mixture(saved), tmp_path / "out", get_context("fork")
    tokenize(mixed, tiny_processor, tmp_path / "whole", MAX_LENGTH, num_proc=1)
    begun, allowed = fork.Semaphore(0), fork.Semaphore(6)
    run = fork.Process(target=halting_run, args=(mixed, tiny_processor, out, num_proc, begun, allowed))
    run.start()
    try:
        for _ in range(6 + num_proc):  # then all wait
            assert begun.acquire(timeout=60), "tokenizing has not begun, or has ended early"
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    finally:
        run.kill()
        run.join(20)
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)
    made = {path: path.stat().st_mtime_ns for path in (out / "data").glob("*.parquet")}
    assert 4 - num_proc <= len(made) <= 3  # of two batches each; every process may have been in another one
    last = max((tmp_path / "whole" / "data").iterdir()).name
    (out / "data" / f".{last}.{gethostname()}.{run.pid}.part").write_bytes(b"what a kill while writing leaves")
    tokenize(mixed, tiny_processor, out, MAX_LENGTH, num_proc=1)
    assert contents(out) == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in made.items())


@pytest.mark.parametrize("name", ["README.md", "mixture.json"])
def test_a_kill_before_the_first_shard_is_no_other_folder(tiny_processor, saved, tmp_path, monkeypatch, name):
    mixed, out, write = mixture(saved), tmp_path / "out", tokenize_dataset.write_whole

    def killed(path, content):
        if path.name == name:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(tokenize_dataset, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        tokenize(mixed, tiny_processor, out, MAX_LENGTH, num_proc=1)
    monkeypatch.setattr(tokenize_dataset, "write_whole", write)
    tokenize(mixed, tiny_processor, out, MAX_LENGTH, num_proc=1)
    assert len(load_tokenized(mixed, tiny_processor, out, MAX_LENGTH)) == 30


def test_skipped_records_are_listed_and_too_many_are_an_error(tiny_processor, saved, tmp_path):
    def mixture(max_skipped):
        return Mixture(64, [{"task": "text-to-image", "path": saved}], max_skipped=max_skipped)

    reader, out = MixtureReader(mixture(0), tiny_processor, MAX_LENGTH), tmp_path / "out"
    lengths = [len(record["input_ids"]) for record in reader.encode(list(reader.dataset))]
    max_length = max(lengths) - 1
    with pytest.raises(ValueError, match=rf"text-to-image.* of 22 records skipped.*max_length is {max_length}"):
        tokenize(mixture(0), tiny_processor, out, max_length, num_proc=1)
    tokenize(mixture(0.9), tiny_processor, out, max_length, num_proc=1)
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [i for i, length in enumerate(lengths) if length > max_length]
    assert lines[0]["reason"] == f"{max_length + 1} ids: max_length is {max_length}"
    loaded = load_tokenized(mixture(0.9), tiny_processor, out, max_length)
    assert loaded["length"][:] == [length for length in lengths if length <= max_length]
    with pytest.raises(ValueError, match="a record of"):
        load_tokenized(mixture(0.9), tiny_processor, out, max(loaded["length"]) - 1)


def test_another_mixture_or_model_is_refused_but_other_weights_are_not(tiny_processor, tiny_vqvae, saved, tmp_path):
    out, mixed = tmp_path / "out", mixture(saved)
    tokenize(mixed, tiny_processor, out, MAX_LENGTH, num_proc=1)
    for source, weight in zip(mixed.sources, (3, 1), strict=True):
        source.weight = weight
    rows = load_tokenized(mixed, tiny_processor, out, MAX_LENGTH)["task"]
    assert 0.6 < rows.count("text-to-image") / len(rows) < 0.9
    with pytest.raises(ValueError, match=r"mixture\.seed is 0 there and 1 here"):
        tokenize(mixture(saved, seed=1), tiny_processor, out, MAX_LENGTH)
    with pytest.raises(ValueError, match="max_length is 500 there and 499 here"):
        tokenize(mixed, tiny_processor, out, 499)
    other = mixture(saved)
    other.sources[1].task = "text-to-image"
    with pytest.raises(ValueError, match=r"mixture\.sources\.1\.task is 'caption' there"):
        load_tokenized(other, tiny_processor, out, MAX_LENGTH)
    tiny_processor.vqvae = deepcopy(tiny_processor.vqvae)
    load_tokenized(mixed, tiny_processor, out, MAX_LENGTH)
    with torch.no_grad():
        tiny_processor.vqvae.encoder.conv_in.weight += 1
    with pytest.raises(ValueError, match="vqvae is"):
        load_tokenized(mixed, tiny_processor, out, MAX_LENGTH)
    tiny_processor.vqvae = tiny_vqvae
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="something else"):
        tokenize(mixed, tiny_processor, tmp_path / "full", MAX_LENGTH)
    with pytest.raises(ValueError, match="nowhere has no mixture"):
        load_tokenized(mixed, tiny_processor, tmp_path / "nowhere", MAX_LENGTH)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command_tokenizes_a_recipe(tiny_folder, tiny_processor, saved, tmp_path, monkeypatch, ranks):
    recipe = {"model": str(tiny_folder), "output_dir": str(tmp_path), "tokenized": str(tmp_path / "ids"), "sft": {}}
    recipe["mixture"] = {"target_px": 64, "sources": [{"task": "caption", "path": saved}]}
    recipe["config"] = {"max_position_embeddings": MAX_LENGTH}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        result = CliRunner().invoke(app, ["tokenize", str(tmp_path / "recipe.yaml")])
        assert result.exit_code == 0, result.output
    assert len(load_tokenized(Mixture(**recipe["mixture"]), tiny_processor, tmp_path / "ids", MAX_LENGTH)) == 22
    assert json.loads((tmp_path / "ids" / "mixture.json").read_text())["max_length"] == MAX_LENGTH
    (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "tokenized": None}))
    result = CliRunner().invoke(app, ["tokenize", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 2 and "name one as OUT" in result.output
