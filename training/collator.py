"""What feeds the trainer: records packed in rows; rows made a batch, with contexts dropped and histories disturbed."""

import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import torch
from datasets import Dataset
from torch import Tensor

from modeling_lumina_mgpt.modeling_lumina_mgpt import IGNORED_LABEL


@dataclass
class Collator:
    """Rows of a dataset -> one batch: encodes what is not yet, drops contexts, disturbs histories, pads on the right.

    Dropped context trains guidance's unconditional branch: of a record whose answer ends in a picture, only the tokens
    from that picture's start on are left, without the final end-of-turn. In a disturbed history some codes of the
    answers' pictures are others than the ones to predict, as they are when a model draws: what comes next is then
    learned from what was asked and shown, too, and not from the codes before alone. Where codes are renamed, what a
    record's pictures have in common, away from all differences, is made of other codes, the same in all of them:
    things stay as they are, whatever they look like. All of this depends on the record, the epoch and the seed alone,
    so that a resumed run sees what an undisturbed one would have seen.

    Attributes:
        code_ids: those of image codes.
        tasks: names that `task_ids` count.
        context_drop: probability of dropping a record's context.
        history_noise: of a record's predicted codes, up to this share is replaced by others of them in `input_ids`.
        code_renaming: by task, the probability that codes of a record are renamed, if its pictures are of one size.
        row_length: to which packed rows are padded, so that batches of as many rows have one shape, to be compiled.
        encode: called as `encode(rows, epoch)` on rows without `input_ids`; None: all have them.
    """

    pad_id: int
    image_start_id: int
    image_end_id: int
    code_ids: Tensor
    tasks: Sequence[str]
    context_drop: float = 0.0
    history_noise: float = 0.0
    code_renaming: Mapping[str, float] = field(default_factory=dict)
    row_length: int | None = None
    seed: int = 0
    encode: Callable[[list[dict], int], list[dict]] | None = None
    shared_epoch: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long).share_memory_())

    def __post_init__(self):
        self._all_codes: list[int] = self.code_ids.tolist()
        self._codes = frozenset(self._all_codes)

    @property
    def epoch(self) -> int:
        return int(self.shared_epoch)

    @epoch.setter
    def epoch(self, epoch: int):
        self.shared_epoch.fill_(epoch)  # seen by loader processes that live on

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        """A batch of as many rows; those of a packed dataset hold several records, which follow each other.

        Returns:
            `input_ids`, `labels` and `task_ids` (-1 on padding), int64 (batch, length); `attended`, int64 (batch): how
            many pairs of tokens attention compares; and of packed rows `position_ids`, which start anew with each
            record. There is no attention mask: nothing that counts comes after the padding.
        """
        packed = "records" in rows[0]
        records = [record for row in rows for record in row["records"]] if packed else rows
        if self.encode is not None:
            records = self.encode(records, self.epoch)
        ready = iter([self._ready(record) for record in records])
        lines = [[next(ready) for _ in row["records"]] for row in rows] if packed else [[one] for one in ready]
        longest = max(sum(len(ids) for ids, _, _ in line) for line in lines)
        length = max(longest, self.row_length or 0) if packed else longest
        batch = {
            "input_ids": [_joined([ids for ids, _, _ in line], length, self.pad_id) for line in lines],
            "labels": [_joined([labels for _, labels, _ in line], length, IGNORED_LABEL) for line in lines],
            "task_ids": [_joined([[task] * len(ids) for ids, _, task in line], length, -1) for line in lines],
            "attended": [sum(len(ids) * (len(ids) + 1) // 2 for ids, _, _ in line) for line in lines],
        }
        if packed:
            batch["position_ids"] = [_positions([len(ids) for ids, _, _ in line], length) for line in lines]
        return {name: torch.tensor(values) for name, values in batch.items()}

    def _ready(self, record: dict) -> tuple[list[int], list[int], int]:
        """Ids, labels and task; the first label is none, since in a packed row another record's token precedes it."""
        epoch = record.get("epoch", self.epoch)  # a stream's own, which to the trainer has but one
        ids, labels = list(record["input_ids"]), list(record["labels"])
        rng = random.Random(f"{self.seed}/{epoch}/{ids}")
        ids, labels = self._drop(ids, labels, rng)
        share = self.code_renaming.get(record["task"], 0.0)
        if share and rng.random() < share:
            ids, labels = self._rename(ids, labels, rng)
        return self._disturb(ids, labels, rng), [IGNORED_LABEL, *labels[1:]], self.tasks.index(record["task"])

    def _drop(self, ids: list[int], labels: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
        if rng.random() >= self.context_drop or labels[-2] != self.image_end_id:
            return ids, labels
        start = len(ids) - 1 - ids[::-1].index(self.image_start_id)
        return ids[start:-1], labels[start:-1]

    def _rename(self, ids: list[int], labels: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
        pictures = [*self._pictures(ids)]
        if len(pictures) < 2 or len({tuple(map(len, picture)) for picture in pictures}) > 1:
            return ids, labels  # what is in one picture alone is no copy
        kept = {code for before, after in pairwise(pictures) for code in _near_differences(before, after)}
        share = rng.random()
        present = {code for picture in pictures for row in picture for code in row}
        chosen = [code for code in sorted(present - kept) if rng.random() < share]
        absent = [code for code in self._all_codes if code not in present]
        others = dict(zip(chosen, rng.sample(absent, min(len(chosen), len(absent))), strict=False))
        return [others.get(token, token) for token in ids], [others.get(label, label) for label in labels]

    def _pictures(self, ids: list[int]) -> Iterator[list[list[int]]]:
        """Each picture's rows of codes."""
        starts = [i for i, token in enumerate(ids) if token == self.image_start_id]
        for start in starts:
            tokens = ids[start : ids.index(self.image_end_id, start)]
            yield [list(row) for are_codes, row in groupby(tokens, self._codes.__contains__) if are_codes]

    def _disturb(self, ids: list[int], labels: list[int], rng: random.Random) -> list[int]:
        share = self.history_noise * rng.random()  # between records it differs, so that clean histories are trusted
        if not share:
            return ids
        codes = [label for label in labels if label in self._codes]
        return [
            rng.choice(codes) if label in self._codes and rng.random() < share else token
            for token, label in zip(ids, labels, strict=True)
        ]


def _near_differences(before: list[list[int]], after: list[list[int]]) -> Iterator[int]:
    """Codes of two pictures of one size where they differ, and of the places around."""
    for i, j in ((i, j) for i, row in enumerate(before) for j, code in enumerate(row) if code != after[i][j]):
        for picture in (before, after):
            for row in picture[max(i - 1, 0) : i + 2]:
                yield from row[max(j - 1, 0) : j + 2]


def _joined(parts: list[list[int]], length: int, filler: int) -> list[int]:
    joined = [value for part in parts for value in part]
    return joined + [filler] * (length - len(joined))


def _positions(lengths: list[int], length: int) -> list[int]:
    return [position for num in (*lengths, length - sum(lengths)) for position in range(num)]


def pack(dataset: Dataset, num_tokens: int) -> Dataset:
    """Rows of records that have at most so many tokens together: the longest first, each where least room is left.

    Args:
        dataset: with a column `length`, none of which is above `num_tokens`.

    Returns:
        A dataset with `records` (read when they are asked for) and `length`.
    """
    lengths = dataset["length"][:]
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, (lengths[i], 0))
        room, row = rooms.pop(place) if place < len(rooms) else (num_tokens, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        insort(rooms, (room - lengths[i], row))

    def read(batch: dict[str, list]) -> dict[str, list]:
        return {"records": [[dataset[i] for i in row] for row in batch["records"]], "length": batch["length"]}

    packed = Dataset.from_dict({"records": rows, "length": [sum(lengths[i] for i in row) for row in rows]})
    return packed.with_transform(read, columns=["records", "length"])
