"""Sources of records, weighted into a mixture, and their way to token ids.

A record becomes a conversation (`tasks.py`); its pictures become codes, those of a whole batch in one go by bucket;
and both become ids with labels (the processor). There is no second way: training straight from images and tokenizing
ahead (`tokenize_dataset.py`) both call `MixtureReader`, and whatever is random in a conversation depends on the
mixture's seed, the source and the record's index alone (with random crops also on the epoch).
"""

import logging
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)

from modeling_lumina_mgpt.pipelines.places import folder_or_repo
from modeling_lumina_mgpt.uni_rep import is_whole

from .records import RecordError
from .tabletop import TabletopSource
from .tasks import ADAPTERS, check_columns, conversation, panel_sizes

TABLETOP = "tabletop"
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tar": "webdataset"}
MIN_SEEN = 100
SHUFFLED = 1000  # records of a stream, still as bytes, from which the next one is drawn
logger = logging.getLogger(__name__)


@dataclass
class Source:
    """Records of one kind from one place.

    Attributes:
        task: a key of `tasks.ADAPTERS`: what the records are made into.
        path: a dataset on the Hub; a folder of data files, or one that `save_to_disk` made; a .parquet, .jsonl, .json,
            .csv or .tar (webdataset) file; or "tabletop".
        name: the dataset's configuration.
        split: of the dataset.
        streaming: read record by record, in the order that they are in, without a copy on disk.
        weight: share of the mixture, relative to the other sources' weights.
        columns: the adapter's name of a column -> the dataset's, where they differ; a dotted one reaches into structs.
        options: of the adapter; for "tabletop" also `max_aspect_ratio` of its pictures (2).
        num_records: at most so many, from the beginning; "tabletop" has exactly so many.
        target_px: as the mixture's, where it is another one for this source.
    """

    task: str
    path: str
    name: str | None = None
    split: str = "train"
    streaming: bool = False
    weight: float | None = None
    columns: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    num_records: int | None = None
    target_px: int | None = None

    def __post_init__(self):
        if self.weight is not None and not (isinstance(self.weight, int | float) and self.weight > 0):
            raise ValueError(f"{self}: weight {self.weight!r}; accepted are numbers above 0")
        if self.num_records is not None and not is_whole(self.num_records, 1):
            raise ValueError(f"{self}: num_records {self.num_records!r}; accepted are 1 and more")
        if self.target_px is not None and not is_whole(self.target_px, 1):
            raise ValueError(f"{self}: target_px {self.target_px!r}; accepted are 1 and more")
        if self.path == TABLETOP and (self.num_records is None or self.streaming):
            raise ValueError(f"{self} needs num_records, and does not stream")

    def __str__(self):
        return f"source {self.path!r} ({self.task})"


@dataclass
class Mixture:
    """What a run trains on.

    Attributes:
        target_px: side of the square whose area pictures have; sizes are that area's buckets.
        sources: `Source`s, or dicts of their fields. Without weights one follows the other; with weights an epoch
            draws from them in these proportions until each record of each has come; small ones come round again.
        max_length: ids in a record, more are skipped; None: as many as the model has positions.
        max_skipped: share of a source's records that may be skipped (of a stream's: of those read so far, and of 100
            at least).
        seed: of the proportions, of what is random in conversations, and of Tabletop's scenes.
    """

    target_px: int
    sources: list[Any]
    max_length: int | None = None
    max_skipped: float = 0.01
    seed: int = 0

    def __post_init__(self):
        if not self.sources or not isinstance(self.sources, list):
            raise ValueError(f"sources {self.sources!r}: accepted is a list of at least one")
        self.sources = [_source(source) for source in self.sources]
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError(f"weights {[source.weight for source in self.sources]}: give each source one, or none")
        if self.streams and len(self.sources) > 1 and self.probabilities is None:
            raise ValueError("a source that streams beside others: each needs a weight, as streams are not shuffled")

    @property
    def streams(self) -> bool:
        return any(source.streaming for source in self.sources)

    @property
    def probabilities(self) -> list[float] | None:
        """Each source's share of an epoch, if there are weights."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        return [weight / sum(weights) for weight in weights] or None

    def mix(self, datasets: list[Dataset]) -> Dataset:
        """One dataset from one for each source."""
        if self.probabilities is None:
            return concatenate_datasets(datasets)
        return interleave_datasets(datasets, self.probabilities, self.seed, stopping_strategy="all_exhausted")

    def check_skipped(self, number: int, reasons: dict[int, str], num_records: int) -> None:
        """ValueError if more of a source's records are skipped (index -> reason) than may be."""
        if len(reasons) <= self.max_skipped * num_records:
            return
        kinds: dict[str, list[int]] = {}
        for index, reason in sorted(reasons.items()):
            kinds.setdefault(re.sub(r"\d+", "#", reason), []).append(index)
        common = sorted(kinds.values(), key=len, reverse=True)[:3]
        listed = "; ".join(f"{len(indices)} such as record {indices[0]}: {reasons[indices[0]]}" for indices in common)
        raise ValueError(
            f"{self.sources[number]}: {len(reasons)} of {num_records} records skipped, more than max_skipped"
            f" {self.max_skipped:g} allows ({listed}). Mend the source, or raise max_skipped in the recipe's mixture"
        )


def read_mixture(values: Any, name: str = "mixture") -> Mixture:
    """The mixture of a recipe's `name`; ValueError for fields that it has not."""
    return _made(Mixture, name, values)


def _source(values: Any) -> Source:
    return values if isinstance(values, Source) else _made(Source, f"source {values!r}", values)


def _made(kind: Any, name: str, values: Any) -> Any:
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{name}: {error}; accepted are {', '.join(kind.__dataclass_fields__)}") from error


class Records:
    """A source's records, once it is open and its columns are checked.

    Attributes:
        num_records: None for a stream.
        target_px: the source's own, or the mixture's.
    """

    def __init__(self, source: Source, mixture: Mixture, processor):
        self.source, self.target_px = source, source.target_px or mixture.target_px
        self.options = dict(source.options)
        try:
            self.dataset = self._tabletop(mixture, processor) if source.path == TABLETOP else _open(source)
            columns = self.dataset.column_names or list(next(iter(self.dataset)))
            check_columns(source.task, columns, source.columns, self.options)
        except Exception as error:  # each kind of place and file has errors of its own
            raise ValueError(f"{source}: {error.__cause__ or error}") from error
        if source.path != TABLETOP:
            self.features = self.dataset.features
            self.dataset = self._needed(columns)
        self.num_records = None if source.streaming else len(self.dataset)
        if next(self.rows(0), None) is None:
            raise ValueError(f"{source} has no records")

    def _tabletop(self, mixture: Mixture, processor) -> Any:
        ratio = self.options.pop("max_aspect_ratio", 2.0)  # beyond 2, its four objects hardly have room
        has_panels = self.source.task in ("pair", "panel")
        buckets = panel_sizes(processor, self.target_px) if has_panels else processor.uni_rep.buckets(self.target_px)
        sizes = [size for size in buckets if max(size) <= ratio * min(size)]
        return TabletopSource(self.source.task, sizes, mixture.seed, self.source.split, self.source.num_records or 0)

    def _needed(self, columns: list[str]):
        """Without columns that the adapter does not read, whose pictures would be decoded for nothing."""
        adapter = ADAPTERS[self.source.task]
        names = *adapter.columns, *adapter.alternative, *adapter.optional
        paths = [self.source.columns.get(name, name) for name in names]
        read = [c for c in columns if any(fnmatchcase(c, path) or c == path.split(".")[0] for path in paths)]
        dataset = self.dataset.select_columns(read)
        return dataset.decode(False) if self.source.streaming and self.features else dataset

    def rows(self, number: int) -> Iterator[dict[str, Any]]:
        """`source`, `index` and, of a stream, `record` of each."""
        if self.num_records is None:
            yield from ({"source": number, "index": i, "record": record} for i, record in enumerate(self.dataset))
        else:
            yield from ({"source": number, "index": i} for i in range(self.num_records))

    def read(self, rows: list[dict[str, Any]]) -> list[Any]:
        """The records of rows, or in place of one that cannot be read its `RecordError`."""
        if self.source.path == TABLETOP:
            return self.dataset.fetch([row["index"] for row in rows])
        return [self._record(row) for row in rows]

    def _record(self, row: dict[str, Any]) -> Any:
        try:
            if "record" not in row:
                return self.dataset[row["index"]]
            return self.features.decode_example(row["record"]) if self.features else row["record"]
        except Exception as error:  # PIL and datasets raise what they like
            return RecordError(f"cannot be read: {error}")


def _open(source: Source) -> Any:
    """What `datasets` makes of a place; of streams an `IterableDataset`."""
    path = Path(source.path)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        dataset = load_from_disk(source.path)
        if isinstance(dataset, DatasetDict):
            if source.split not in dataset:
                raise ValueError(f"split {source.split!r}: accepted are {', '.join(dataset)}")
            dataset = dataset[source.split]
        elif source.split not in ("train", str(dataset.split)):
            raise ValueError(f"split {source.split!r}: {source.path} was saved without splits; accepted is 'train'")
        dataset = dataset.to_iterable_dataset() if source.streaming else dataset
    else:
        kind = FORMATS.get(path.suffix)
        if kind is None and source.path.count("/") == 1:
            folder_or_repo(source.path, "path", repo_type="dataset")
        place = {"path": kind, "data_files": source.path} if kind else {"path": source.path}
        dataset = load_dataset(name=source.name, split=source.split, streaming=source.streaming, **place)
    if source.num_records is None:
        return dataset
    if source.streaming:
        return dataset.take(source.num_records)
    return dataset.select(range(min(source.num_records, len(dataset))))


class Skipped:
    """Reasons by index, for each source, as far as records were seen; ValueError once they are too many.

    Args:
        num_records: of each source; None for a stream.
    """

    def __init__(self, mixture: Mixture, num_records: list[int | None]):
        self.mixture, self.num_records = mixture, num_records
        self.num_seen = [0] * len(num_records)
        self.reasons: list[dict[int, str]] = [{} for _ in num_records]

    def add(self, number: int, num_seen: int, reasons: dict[int, str]) -> None:
        self.num_seen[number] += num_seen
        self.reasons[number] |= reasons
        num_records = self.num_records[number] or max(self.num_seen[number], MIN_SEEN)
        self.mixture.check_skipped(number, self.reasons[number], num_records)


class MixtureReader:
    """A mixture's records as ids and labels, straight from images.

    Records that cannot be used are skipped: damaged pictures, those that the adapter refuses, and those with more ids
    than `max_length`. Each is logged once.

    Args:
        processor: a `LuminaMGPTProcessor` with its VQ model.
        random_crop: draw crops' offsets, and all else that is random, anew at each epoch.

    Attributes:
        dataset: rows `source` and `index` (map-style, weighted), or, if a source streams, an `IterableDataset` in
            which streamed rows also have their `record`. Its order is the same each time.
        num_records: of each source; None for a stream.
        skipped: reasons by index, for each source.
    """

    def __init__(self, mixture: Mixture, processor, max_length: int, random_crop: bool = False):
        self.mixture, self.processor = mixture, processor
        self.max_length, self.random_crop = max_length, random_crop
        self.sources = [Records(source, mixture, processor) for source in mixture.sources]
        self.num_records = [records.num_records for records in self.sources]
        self._skips = Skipped(mixture, self.num_records)
        self._last: list[dict[str, Any]] = []  # of a stream, the last record that could be used
        self.skipped = self._skips.reasons
        self.dataset = self._stream() if mixture.streams else self._index()

    def passes(self, seed: int) -> IterableDataset:
        """The stream over and over, shuffled; rows also have their pass as `epoch`: to a trainer it is all one."""
        return IterableDataset.from_generator(partial(_passes, self.dataset, seed))

    def _stream(self) -> IterableDataset:
        return IterableDataset.from_generator(partial(_mixed_rows, self.sources, self.mixture))

    def _index(self) -> Dataset:
        sizes = enumerate(self.num_records)
        rows = [{"source": np.full(size or 0, number), "index": np.arange(size or 0)} for number, size in sizes]
        return self.mixture.mix([Dataset.from_dict(own) for own in rows])

    def encode(self, rows: Sequence[dict[str, Any]], epoch: int = 0) -> list[dict[str, Any]]:
        """`input_ids`, `labels` and `task` (and a row's own `epoch`) of rows of `dataset`, without the skipped ones.

        If all of them are, the next record of the first one's source that can be used comes in their place, or of a
        stream the last one, since a step needs something to learn from.

        Raises:
            ValueError: if too many records of a source are skipped, or all of them.
        """
        number, index = rows[0]["source"], rows[0]["index"]
        num_records, kept = self.num_records[number], self._kept(rows, epoch)
        if num_records is None:
            kept = kept or self._last
            self._last = kept[-1:]
        else:
            others = ((index + step) % num_records for step in range(1, num_records))
            while not kept and (other := next(others, None)) is not None:
                kept = self._kept([{"source": number, "index": other}], epoch)
        if not kept:
            raise ValueError(f"{self.mixture.sources[number]}: all of a batch is skipped, and none came before")
        return kept

    def _kept(self, rows: Sequence[dict[str, Any]], epoch: int) -> list[dict[str, Any]]:
        kept = []
        for row, encoded in zip(rows, self.attempt(rows, epoch), strict=True):
            number, index = row["source"], row["index"]
            if not isinstance(encoded, str):
                kept.append({**encoded, "epoch": row["epoch"]} if "epoch" in row else encoded)
            elif index not in self.skipped[number]:
                logger.warning("%s: record %d skipped: %s", self.mixture.sources[number], index, encoded)
            self._skips.add(number, 1, {index: encoded} if isinstance(encoded, str) else {})
        return kept

    def attempt(self, rows: Sequence[dict[str, Any]], epoch: int = 0) -> list[dict[str, Any] | str]:
        """`input_ids`, `labels` and `task` of each row, or the reason to skip it."""
        talks = [self._conversation(row, record, epoch) for row, record in zip(rows, self._read(rows), strict=True)]
        targets_px = [self.sources[row["source"]].target_px for row in rows]
        codes = {}
        for target_px in {*targets_px}:
            own = [talk for talk, px in zip(talks, targets_px, strict=True) if px == target_px]
            pictures = [picture for talk in own if not isinstance(talk, str) for picture in talk[1]]
            codes[target_px] = iter(self.processor.encode_images(pictures, target_px))
        return [
            talk if isinstance(talk, str) else self._ids(row, talk[0], [next(codes[px]) for _ in talk[1]])
            for row, talk, px in zip(rows, talks, targets_px, strict=True)
        ]

    def _read(self, rows: Sequence[dict[str, Any]]) -> list[Any]:
        """Records, read source by source."""
        found: dict[int, Any] = {}
        for number in sorted({row["source"] for row in rows}):
            places = [place for place, row in enumerate(rows) if row["source"] == number]
            found |= zip(places, self.sources[number].read([rows[place] for place in places]), strict=True)
        return [found[place] for place in range(len(rows))]

    def _conversation(self, row: dict[str, Any], record: Any, epoch: int) -> tuple[list[str], list[Any]] | str:
        """Turns and pictures, or the reason why there are none."""
        records, name = self.sources[row["source"]], f"{self.mixture.seed}/{row['source']}/{row['index']}"
        rng = random.Random(f"{name}/{row.get('epoch', epoch)}" if self.random_crop else name)
        source, sizes = records.source, (records.target_px, self.random_crop)
        try:
            if isinstance(record, RecordError):
                raise record
            return conversation(source.task, record, self.processor, rng, source.columns, records.options, *sizes)
        except RecordError as error:
            return _reason(error)
        except (TypeError, ValueError) as error:  # of an option's value
            raise ValueError(f"{source}: record {row['index']}: {error}") from error

    def _ids(self, row: dict[str, Any], turns: list[str], codes: list[torch.Tensor]) -> dict[str, Any] | str:
        try:
            encoded = self.processor.encode_conversation(turns, codes)
        except ValueError as error:
            return _reason(error)
        length = len(encoded["input_ids"])
        if length > self.max_length:
            return f"{length} ids: max_length is {self.max_length}"
        return {**encoded, "task": self.mixture.sources[row["source"]].task}


def _mixed_rows(sources: list[Records], mixture: Mixture) -> Iterator[dict[str, Any]]:
    """Rows in the order in which `interleave_datasets` gives those of map-style datasets."""
    rows = [records.rows(number) for number, records in enumerate(sources)]
    ahead = [next(own) for own in rows]
    exhausted: set[int] = set()
    rng = np.random.default_rng(mixture.seed)
    while True:
        for number in map(int, rng.choice(len(sources), 1000, p=mixture.probabilities)):
            yield ahead[number]
            following = next(rows[number], None)
            if following is None:
                exhausted.add(number)
                if len(exhausted) == len(sources):
                    return
                rows[number] = sources[number].rows(number)
                following = next(rows[number])
            ahead[number] = following


def _passes(dataset: IterableDataset, seed: int) -> Iterator[dict[str, Any]]:
    for epoch in count():
        yield from ({**row, "epoch": epoch} for row in dataset.shuffle(seed + epoch, buffer_size=SHUFFLED))


def _reason(error: Exception) -> str:
    """What an error says, without the addresses of objects, which differ from run to run."""
    return re.sub(r"\s*<[^<>]* at 0x[0-9a-f]+>", "", " ".join(str(error).split())) or type(error).__name__
