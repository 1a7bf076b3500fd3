"""Tokenizing ahead: a mixture's records as ids, in Parquet shards that `datasets` loads and the Hub shows.

    lumina-mgpt tokenize recipe.yaml                                  # or, on several GPUs,
    torchrun --nproc_per_node 8 --no-python lumina-mgpt tokenize recipe.yaml

A folder holds `data/<source>-<name>-<shard>.parquet`, `mixture.json` (what they are of), `skipped.jsonl` (what is not
in them, and why) and a dataset card. A shard is a fixed range of a source's records and appears when it is whole, so
processes share the work by the shards' numbers alone, and a run that was killed does again only what it had not
finished. Weights are no part of it: they apply when the records are loaded.
"""

import hashlib
import io
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import count, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, List, Value, load_dataset
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm

from modeling_lumina_mgpt import LuminaMGPTConfig, LuminaMGPTProcessor

from .files import write_whole
from .folders import make_start
from .mixture import Mixture, MixtureReader, Skipped, Source, read_mixture
from .recipe import SFTRecipe

SHARD_RECORDS = 512
BATCH_RECORDS = 64  # whose pictures become codes in one go
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "task": Value("string"),
        "source": Value("int32"),
        "index": Value("int64"),
    }
)
HUB = "hf://datasets/"  # before a Hub dataset's name
NOTES = b"lumina_mgpt"  # of a shard, in its schema's metadata
OF_LOADING = ("weight", "max_skipped", "max_length")  # fields that change no shard; max_length is noted as it was used

CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---

# Token ids of a mixture of datasets

Made by `lumina-mgpt tokenize`, for models with the tokenizer and the VQ model whose digests are in `mixture.json`.
`datasets.load_dataset` loads it. `hf upload REPO FOLDER --repo-type dataset` publishes it with all that a recipe's
`tokenized` needs; `load_dataset(FOLDER).push_to_hub(REPO)` only its records.

| source | task |
|---|---|
"""


def tokenize(
    mixture: Mixture,
    processor,
    folder: str | Path,
    max_length: int,
    rank: int = 0,
    world_size: int = 1,
    num_proc: int | None = None,
) -> None:
    """Makes one process's share of the shards, but for those that are there.

    Args:
        processor: with its VQ model, on the device that is to encode.
        max_length: records with more ids are skipped.
        rank, world_size: which of how many processes this is; they need not know of each other, only see the folder.
        num_proc: worker processes here; as many as CPUs if the VQ model is on the CPU, else 1.

    Raises:
        ValueError: if the folder is of another mixture or model, or if too many records are skipped.
    """
    folder, reader = Path(folder), MixtureReader(mixture, processor, max_length)
    _claim(folder, _manifest(mixture, processor) | {"max_length": max_length, "num_records": reader.num_records})
    if num_proc is None:
        num_cpus = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        num_proc = max(1, num_cpus) if processor.vqvae.device.type == "cpu" else 1
    if (folder / "skipped.jsonl").exists() and not _missing(folder):
        return
    own = (shard for place, shard in enumerate(_shards(reader, folder)) if place % world_size == rank)
    skipped = Skipped(mixture, reader.num_records)
    for path in sorted(folder.glob("data/*.parquet")):
        _count(skipped, _notes(path))
    with tqdm(desc="tokenizing", unit=" records", disable=rank != 0) as progress:
        for notes in _make(reader, (shard for shard in own if not shard[0].exists()), num_proc):
            _count(skipped, notes)
            progress.update(notes["num_seen"])
    if not _missing(folder):
        _finish(folder, mixture)


def tokenize_recipe(recipe: SFTRecipe, folder: str | Path) -> None:
    """This process's share of tokenizing an `SFTRecipe`'s mixture, on its accelerator if there is one.

    Which process it is, RANK, WORLD_SIZE and LOCAL_RANK say, as torchrun and `accelerate launch` set them.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    while rank and recipe.from_scratch and not Path(recipe.start).exists():
        time.sleep(1)  # the first process makes it
    start = make_start(recipe)
    processor = LuminaMGPTProcessor.from_pretrained(start)
    if device := torch.accelerator.current_accelerator(check_available=True):
        processor.vqvae.to(torch.device(device.type, local_rank))
    max_length = recipe.max_length(LuminaMGPTConfig.from_pretrained(start, **recipe.config))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    tokenize(read_mixture(recipe.mixture), processor, folder, max_length, rank, world_size)


def load_tokenized(mixture: Mixture, processor, folder: str | Path, max_length: int) -> Dataset:
    """Records of a folder, or of "hf://datasets/NAMESPACE/NAME" that holds one, weighted.

    Rows have `input_ids`, `labels`, `task` and `length`.

    Raises:
        ValueError: if they are of another mixture or model, not all there, or longer than `max_length`.
    """
    folder = Path(_downloaded(str(folder)) if str(folder).startswith(HUB) else folder)
    _check(folder, _manifest(mixture, processor))
    if missing := _missing(folder):
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} others" if len(missing) > 3 else "")
        raise ValueError(f"{folder}: tokenizing has not finished, {names} missing; `lumina-mgpt tokenize` goes on")
    if not (folder / "skipped.jsonl").exists():
        raise ValueError(f"{folder}: tokenizing ended in an error; `lumina-mgpt tokenize` says which")
    loaded = []
    for number in range(len(mixture.sources)):
        files = sorted(map(str, folder.glob(f"data/{number:02d}-*.parquet")))
        dataset = load_dataset("parquet", data_files=files, split="train", features=FEATURES)
        length = pc.list_value_length(dataset.data.column("input_ids")).to_numpy()
        if len(length) and length.max() > max_length:
            raise ValueError(f"{folder}: a record of {length.max()} ids, more than max_length {max_length}")
        loaded.append(dataset.select_columns(["input_ids", "labels", "task"]).add_column("length", length))
    return mixture.mix(loaded)


def _downloaded(address: str) -> str:
    try:
        return snapshot_download(address.removeprefix(HUB), repo_type="dataset")
    except (ValueError, OSError) as error:
        raise ValueError(f"tokenized {address!r}: {error}") from error


# What a folder is of


def _manifest(mixture: Mixture, processor) -> dict[str, Any]:
    """All that the ids depend on."""
    fields = {name: value for name, value in asdict(mixture).items() if name not in OF_LOADING}
    fields["sources"] = [{k: v for k, v in source.items() if k not in OF_LOADING} for source in fields["sources"]]
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    words = {name: value for name, value in tokenizer.items() if name not in ("truncation", "padding")}
    layout = {name: getattr(processor, name) for name in ("size_unit_px", "codes_per_size_unit", "task_templates")}
    manifest = {
        "mixture": fields,
        "shard_records": SHARD_RECORDS,
        "tokenizer": hashlib.sha256(json.dumps(words).encode()).hexdigest(),
        "processor": {**layout, "palette": processor.image_processor.palette},
        "vqvae": _digest(processor.vqvae),
    }
    return json.loads(json.dumps(manifest))


def _digest(vqvae) -> str:
    """Of the weights by which a VQ model encodes."""
    found = hashlib.sha256()
    for name, weight in sorted(vqvae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.", "quantize.")):
            found.update(name.encode() + weight.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _claim(folder: Path, manifest: dict[str, Any]) -> None:
    """Notes what the folder is of, or checks it."""
    if not (folder / "mixture.json").exists():
        if folder.exists() and any(folder.glob("[!.]*")) and not (folder / "README.md").exists():
            raise ValueError(f"{folder} holds something else: tokenizing needs a folder of its own")
        sources = manifest["mixture"]["sources"]
        folder.mkdir(parents=True, exist_ok=True)
        card = CARD + "".join(f"| {s['path']} | {s['task']} |\n" for s in sources)
        write_whole(folder / "README.md", card.encode())
        (folder / "data").mkdir(exist_ok=True)  # after the card, by which the folder is known as such
        write_whole(folder / "mixture.json", json.dumps(manifest, indent=2).encode())
    _check(folder, manifest)


def _check(folder: Path, manifest: dict[str, Any]) -> None:
    """ValueError that names the fields in which the folder is of something else."""
    if not (folder / "mixture.json").exists():
        raise ValueError(f"{folder} has no mixture.json: nothing that `lumina-mgpt tokenize` made")
    there = json.loads((folder / "mixture.json").read_text())
    if different := [text for name, value in manifest.items() for text in _differences(name, there.get(name), value)]:
        raise ValueError(
            f"{folder} was tokenized of another mixture or for another model: {'; '.join(different)}."
            " Name another folder, or remove this one"
        )


def _differences(name: str, there: Any, here: Any) -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = [(f"{name}.{key}", there.get(key), here.get(key)) for key in {**there, **here}]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(f"{name}.{i}", *values) for i, values in enumerate(zip(there, here, strict=True))]
    else:
        return [] if there == here else [f"{name} is {there!r} there and {here!r} here"]
    return [text for pair in pairs for text in _differences(*pair)]


# Shards


def _shards(reader: MixtureReader, folder: Path) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """All shards' files and rows, source by source; a stream's last one has fewer rows than others, perhaps none."""
    for number, records in enumerate(reader.sources):
        rows = records.rows(number)
        for place in count():
            own = list(islice(rows, SHARD_RECORDS))
            if not own and records.num_records is not None:
                break
            yield folder / "data" / _name(number, records.source, place), own
            if len(own) < SHARD_RECORDS:
                break


def _name(number: int, source: Source, place: int) -> str:
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(source.path).stem).strip("-")
    return f"{number:02d}-{name}-{place:05d}.parquet"


def _missing(folder: Path) -> list[str]:
    """Names of the shards that are not there yet."""
    manifest, missing = json.loads((folder / "mixture.json").read_text()), []
    for number, (values, size) in enumerate(zip(manifest["mixture"]["sources"], manifest["num_records"], strict=True)):
        for place in count() if size is None else range(-(-size // manifest["shard_records"])):
            path = folder / "data" / _name(number, Source(**values), place)
            if not path.exists():
                missing.append(path.name)
            if size is None and (not path.exists() or _notes(path)["num_seen"] < manifest["shard_records"]):
                break
    return missing


def _make(
    reader: MixtureReader, shards: Iterable[tuple[Path, list[dict[str, Any]]]], num_proc: int
) -> Iterator[dict[str, Any]]:
    """Makes shards, here or in worker processes, and yields the notes of each."""
    if num_proc == 1:
        yield from (_make_shard(path, rows, reader) for path, rows in shards)
        return
    # forked where that is safe, as a reader is large; a few shards ahead, as a stream may be endless
    context = get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(num_proc, context, _start_worker, (reader,))
    pending: deque = deque()
    try:
        for path, rows in shards:
            pending.append(pool.submit(_make_shard, path, rows))
            if len(pending) > 2 * num_proc:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)
    finally:
        pool.shutdown(cancel_futures=True)


_worker_reader: MixtureReader


def _start_worker(reader: MixtureReader) -> None:
    global _worker_reader
    _worker_reader = reader
    torch.set_num_threads(1)  # else the processes get in each other's way
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent tells nobody, and a worker would wait for work for ever."""
    parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


def _make_shard(path: Path, rows: list[dict[str, Any]], reader: MixtureReader | None = None) -> dict[str, Any]:
    """Writes a shard; returns its notes."""
    reader = reader or _worker_reader
    kept, skipped = [], []
    for start in range(0, len(rows), BATCH_RECORDS):
        batch = rows[start : start + BATCH_RECORDS]
        for row, encoded in zip(batch, reader.attempt(batch), strict=True):
            if isinstance(encoded, str):
                skipped.append([row["index"], encoded])
            else:
                kept.append({**encoded, "source": row["source"], "index": row["index"]})
    notes = {"source": int(path.name.split("-")[0]), "num_seen": len(rows), "skipped": skipped}
    schema = FEATURES.arrow_schema
    schema = schema.with_metadata({**schema.metadata, NOTES: json.dumps(notes).encode()})
    content = io.BytesIO()
    with pq.ParquetWriter(content, schema) as writer:
        if kept:  # `datasets` cannot read a group of no rows
            writer.write_table(pa.Table.from_pylist(kept, schema))
    write_whole(path, content.getvalue())
    return notes


def _notes(path: Path) -> dict[str, Any]:
    return json.loads(pq.read_schema(path).metadata[NOTES])


def _count(skipped: Skipped, notes: dict[str, Any]) -> None:
    skipped.add(notes["source"], notes["num_seen"], dict(notes["skipped"]))


def _finish(folder: Path, mixture: Mixture) -> None:
    """Lists what all shards have skipped; whichever process comes last does, or several the same."""
    num_records = json.loads((folder / "mixture.json").read_text())["num_records"]
    skipped = Skipped(mixture, num_records)
    for path in sorted(folder.glob("data/*.parquet")):
        _count(skipped, _notes(path))
    lines = [
        {"source": number, "path": source.path, "task": source.task, "index": index, "reason": reason}
        for number, (source, reasons) in enumerate(zip(mixture.sources, skipped.reasons, strict=True))
        for index, reason in sorted(reasons.items())
    ]
    write_whole(folder / "skipped.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
