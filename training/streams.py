# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Streaming datasets in an order that can be entered at any place.

A streaming dataset consists of shards: parquet or tar files. The shards of an epoch are shuffled and dealt to the
processes. A process reads its shards row by row, cuts the rows into blocks and shuffles each block. The order is a
function of the seed, the process and the number of processes. It does not depend on the number of workers, because
the main process reads the rows, still encoded, and the workers decode them.

A block begins at a known row of a known shard. So a resumed run reads again one shard up to its place and one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.shared.programs import ProgramError

# The purposes of the random streams, beside those of `training.data`.
SHARD_ORDER, BLOCK_ORDER = 100, 101

NamedRow = tuple[str, Any]


class ImageStream:
    """A streaming dataset, whose rows are reached by the number of their shard and their place in it.

    Args:
        dataset (`datasets.IterableDataset`): Its rows are dicts.
        held_out (`Sequence[int]`, *optional*): How many rows to leave out at the beginning of each shard.
    """

    def __init__(self, dataset: Any, held_out: Sequence[int] | None = None) -> None:
        self.dataset, self.num_shards = dataset, dataset.num_shards
        self.held_out = list(held_out or [0] * self.num_shards)

    def rows(self, shard: int, start: int = 0) -> Iterator[tuple[int, NamedRow]]:
        """`(place, (name, row))` of the rows of a shard from place `start` on, the held-out ones not counted."""
        part = self.dataset if self.num_shards == 1 else self.dataset.shard(self.num_shards, shard)
        first = self.held_out[shard] + start
        for place, row in enumerate(part.skip(first) if first else part, first):
            yield place - self.held_out[shard], (f"row {place} of shard {shard}", row)

    def hold_out(self, count: int) -> tuple[list[Any], ImageStream]:
        """The first `count` rows, and a stream of the others."""
        held_out = [0] * self.num_shards
        taken: list[Any] = []
        for shard in range(self.num_shards):
            for _, (_, row) in self.rows(shard):
                if len(taken) == count:
                    break
                taken.append(row)
                held_out[shard] += 1
        return taken, ImageStream(self.dataset, held_out)

    @property
    def column_names(self) -> list[str]:
        """Names of the columns, read from the first row where the dataset does not know them."""
        return list(self.dataset.column_names or next(iter(self.dataset)))

    @property
    def features(self) -> Any:
        """The features of the dataset, None if it does not know them."""
        return self.dataset.features


@dataclass(frozen=True)
class BlockStart:
    """Where a block begins.

    Args:
        block (`int`): Number of the block.
        index (`int`): Number of its first row, counted over all rows that this process has read.
        turn (`int`): Number of the shard in the list of shards of this process.
        offset (`int`): Place of the first row in that shard.
    """

    block: int = 0
    index: int = 0
    turn: int = 0
    offset: int = 0


class ShuffledStream:
    """The endless shuffled rows of one process: `stream[index]`, for indices that do not fall below the last block.

    With fewer shards than processes each process reads all shards and keeps every N-th row.

    Args:
        stream (`ImageStream`): The rows.
        seed (`int`): Determines the order.
        rank (`int`): This process.
        world_size (`int`): Number of processes.
        block_size (`int`): Rows that are shuffled together. Two blocks are in memory.
        start (`BlockStart`, *optional*): Where to begin.
    """

    def __init__(
        self,
        stream: ImageStream,
        seed: int,
        rank: int,
        world_size: int,
        block_size: int,
        start: BlockStart | None = None,
    ) -> None:
        self.stream, self.seed, self.rank, self.world_size = stream, seed, rank, world_size
        self.block_size, self.shares_rows = block_size, stream.num_shards < world_size
        self._begin = start or BlockStart()
        # Of all blocks from the last one that was asked for on.
        self._starts = [self._begin]
        self._current: list[NamedRow] = []
        self._ahead: list[NamedRow] = []
        self._events = self._read(self._begin)
        self._is_ahead_whole = False

    def __getitem__(self, index: int) -> NamedRow:
        """Row number `index` of this process. Also reads one row of the next block, so that no block is waited for."""
        while not self._current or index >= self._begin.index + len(self._current):
            if self._current:
                self._begin = next(start for start in self._starts if start.block == self._begin.block + 1)
            while not self._is_ahead_whole:
                self._read_one()
            rng = np.random.default_rng([self.seed, BLOCK_ORDER, self.rank, self._begin.block])
            self._current = [self._ahead[place] for place in rng.permutation(len(self._ahead))]
            self._ahead, self._is_ahead_whole = [], False
        if not self._is_ahead_whole and len(self._ahead) < self.block_size:
            self._read_one()
        return self._current[index - self._begin.index]

    def following(self, index: int, count: int) -> list[NamedRow]:
        """Up to `count` other rows of the block of row `index`, the ones behind it first."""
        self[index]
        place = index - self._begin.index
        rows = self._current[place + 1 :] + self._current[:place]
        return rows[:count]

    def start_before(self, index: int) -> BlockStart:
        """The beginning of the block that holds row `index`. The blocks before it are forgotten."""
        first = max((start for start in self._starts if start.index <= index), key=lambda start: start.index)
        self._starts = [start for start in self._starts if start.block >= min(first.block, self._begin.block)]
        return first

    def _read_one(self) -> None:
        event = next(self._events)
        if isinstance(event, BlockStart):
            self._starts.append(event)
            self._is_ahead_whole = True
        else:
            self._ahead.append(event)

    def _shard(self, turn: int) -> tuple[int, int]:
        """The epoch and the shard of a turn."""
        entry = turn if self.shares_rows else self.rank + turn * self.world_size
        epoch, place = divmod(entry, self.stream.num_shards)
        order = np.random.default_rng([self.seed, SHARD_ORDER, epoch]).permutation(self.stream.num_shards)
        return epoch, int(order[place])

    def _read(self, start: BlockStart) -> Iterator[NamedRow | BlockStart]:
        """Rows, and after each block the beginning of the next. A block ends with the epoch."""
        block, index, turn, offset = start.block, start.index, start.turn, start.offset
        num_in_block, barren = 0, 0
        while True:
            epoch, shard = self._shard(turn)
            is_barren = offset == 0
            for place, row in self.stream.rows(shard, offset):
                offset = place + 1
                if self.shares_rows and place % self.world_size != self.rank:
                    continue
                is_barren = False
                yield row
                index, num_in_block = index + 1, num_in_block + 1
                if num_in_block == self.block_size:
                    block, num_in_block = block + 1, 0
                    yield BlockStart(block, index, turn, offset)
            barren = barren + 1 if is_barren else 0
            if barren > self.stream.num_shards:
                raise ProgramError(f"the streamed dataset holds no rows for process {self.rank} of {self.world_size}")
            turn, offset = turn + 1, 0
            if num_in_block and self._shard(turn)[0] != epoch:
                block, num_in_block = block + 1, 0
                yield BlockStart(block, index, turn, offset)
