"""Token data: documents on disk, packed rows, batches.

`TokenData` holds documents as one memory-mapped array of token ids with offsets and a manifest.
`Rows` packs them into rows of a fixed length: documents follow each other in an order drawn from
the seed, rows are filled to the end, and every document start (and every row start) is marked, so
that attention, memory and positions begin anew there. `Batches` draws rows from several domains by
weight, without randomness beyond the seed, and can say where it stands and go on from there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .atomic import atomic_directory
from .errors import UserError
from .sources import Document, document_end, read_files
from .spool import Spool
from .tokenizer import Tokenizer

MANIFEST = "manifest.json"
_IDS, _OFFSETS, _COUNTED = "ids.bin", "offsets.npy", "counted.bin"

_PIECE = 1 << 20
"""Tokens that are widened at a time."""

IntArray = NDArray[np.int32]


class TokenData:
    """Documents as token ids: `ids` (uint16 or uint32) and `offsets` int64 [documents + 1].

    `counted`, bool [tokens]: the tokens that are to be learnt; None: all of them.
    """

    def __init__(
        self,
        ids: NDArray[Any],
        offsets: NDArray[np.int64],
        manifest: Mapping[str, Any] | None = None,
        where: str = "data",
        counted: NDArray[np.bool_] | None = None,
    ) -> None:
        self.ids, self.offsets, self.where, self.counted = ids, offsets, where, counted
        self.manifest: dict[str, Any] = dict(manifest or {})
        if counted is not None and len(counted) != len(ids):
            raise UserError(f"{where}: {len(ids)} tokens, but counted has {len(counted)}")
        self.manifest.setdefault("sha256", _digest(ids, offsets, counted))
        if self.documents == 0 or self.tokens == 0:
            raise UserError(f"{where}: holds no text")

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.offsets[-1])

    @property
    def fingerprint(self) -> str:
        """sha256 over token ids and document boundaries."""
        return str(self.manifest["sha256"])

    def document(self, index: int) -> IntArray:
        """Token ids of one document, int32."""
        start, end = self.offsets[index : index + 2]
        return np.asarray(self.ids[start:end], dtype=np.int32)

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[Sequence[int] | NDArray[np.integer[Any]]],
        vocab_size: int,
        manifest: Mapping[str, Any] | None = None,
        where: str = "data",
        counted: Iterable[NDArray[np.bool_] | None] | None = None,
        place: Path | None = None,
    ) -> TokenData:
        """Documents (lists of token ids) in memory, or in files without names in the directory
        `place`. UserError names an id that is out of range.

        `counted`: of each document, the tokens to be learnt (None: all).
        """
        ids = Spool(np.uint16 if vocab_size <= 1 << 16 else np.uint32, place)
        learnt, lengths, all_learnt = Spool(np.bool_, place), [], True
        given = itertools.repeat(None) if counted is None else counted
        for number, (document, mask) in enumerate(zip(documents, given, strict=False)):
            values = np.asarray(document, dtype=np.int64)
            if values.size == 0:
                continue
            learnt.append(np.ones(values.size, np.bool_) if mask is None else mask)
            all_learnt = all_learnt and (mask is None or bool(mask.all()))
            if values.min() < 0 or values.max() >= vocab_size:
                bad = int(values.min()) if values.min() < 0 else int(values.max())
                raise UserError(
                    f"{where}: document {number} holds token id {bad}, outside 0..{vocab_size - 1}"
                )
            ids.append(values)
            lengths.append(values.size)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        facts = {**(manifest or {}), "vocab_size": vocab_size}
        return cls(ids.array(), offsets, facts, where, None if all_learnt else learnt.array())

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: Tokenizer | None) -> TokenData:
        """Each text is a document, encoded without control tokens and ended by the end token."""
        tokenizer = _needed(tokenizer)
        end = document_end(tokenizer)
        encoded = tokenizer.encode_batch(list(texts), special=False)
        manifest = {"tokenizer": tokenizer.fingerprint}
        return cls.from_documents([[*e, *end] for e in encoded], tokenizer.vocab_size, manifest)

    @classmethod
    def from_files(cls, paths: Iterable[str | Path], tokenizer: Tokenizer | None) -> TokenData:
        """Documents of txt and jsonl files and of directories (sources.py says which)."""
        tokenizer = _needed(tokenizer)
        names = [str(path) for path in paths]
        found = list(read_files(names, tokenizer))
        return from_sources(found, tokenizer, names, where=", ".join(names))

    def save(self, directory: str | Path) -> None:
        """Write `ids.bin`, `offsets.npy`, `manifest.json` and, where not all tokens are to be
        learnt, `counted.bin`, as a whole or not at all."""
        manifest = {
            **self.manifest,
            "documents": self.documents,
            "tokens": self.tokens,
            "counted": self.tokens if self.counted is None else int(self.counted.sum()),
            "dtype": self.ids.dtype.name,
        }
        with atomic_directory(directory, MANIFEST) as work:
            with (work / _IDS).open("wb") as handle:
                np.ascontiguousarray(self.ids).tofile(handle)
            np.save(work / _OFFSETS, self.offsets)
            if self.counted is not None:
                with (work / _COUNTED).open("wb") as handle:
                    np.ascontiguousarray(self.counted).tofile(handle)
            text = json.dumps(manifest, indent=1, ensure_ascii=False)
            (work / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def open(cls, directory: str | Path) -> TokenData:
        """Open a saved directory (ids memory-mapped); the sha256 of its contents is verified."""
        folder = Path(directory)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            offsets = np.load(folder / _OFFSETS, allow_pickle=False)
            ids = np.memmap(folder / _IDS, dtype=np.dtype(manifest["dtype"]), mode="r")
            counted = None
            if manifest.get("counted", manifest["tokens"]) != manifest["tokens"]:
                counted = np.memmap(folder / _COUNTED, dtype=np.bool_, mode="r")
            recorded = str(manifest["sha256"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder}: not token data ({error}); delete it and make it again"
            ) from None
        if _digest(ids, offsets, counted) != recorded:
            raise UserError(
                f"{folder}: damaged: sha256 differs from {MANIFEST}; delete it and make it again"
            )
        return cls(ids, offsets, manifest, str(folder), counted)


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise UserError("texts need a tokenizer, and the model has none: add its tokenizer.json")
    return tokenizer


def _digest(
    ids: NDArray[Any], offsets: NDArray[np.int64], counted: NDArray[np.bool_] | None
) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(offsets, dtype="<i8").tobytes())
    for start in range(0, len(ids), _PIECE):
        digest.update(np.ascontiguousarray(ids[start : start + _PIECE], dtype="<u4").data)
    if counted is not None:
        digest.update(np.ascontiguousarray(counted).data)
    return digest.hexdigest()


def from_sources(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    sources: Any,
    where: str,
    vocab_size: int | None = None,
    facts: Mapping[str, Any] | None = None,
    place: Path | None = None,
) -> TokenData:
    """Token data of read documents; the manifest says which tokenizer and sources made it, and
    `facts`. `place` as for `from_documents`.

    `vocab_size`: the model's, where sampled text may hold ids that the tokenizer has no text for.
    """
    names = hashlib.sha256("\n".join(d.name for d in documents).encode()).hexdigest()
    manifest = {
        "tokenizer": tokenizer.fingerprint,
        "sources": sources,
        "names": names,
        **(facts or {}),
    }
    ids, counted = (d.ids for d in documents), (d.counted for d in documents)
    size = tokenizer.vocab_size if vocab_size is None else vocab_size
    return TokenData.from_documents(ids, size, manifest, where, counted, place)


@dataclass(frozen=True)
class Batch:
    """Packed rows: ids, labels int32 [B, T] (next token, -1 where a document ends and where the
    next token is not to be learnt), reset bool.

    `rows` names the domain and the row of each, by which cached targets are found.
    """

    ids: IntArray
    labels: IntArray
    reset: NDArray[np.bool_]
    rows: list[tuple[str, int]]

    @property
    def counted(self) -> int:
        """Number of positions that have a label."""
        return int((self.labels >= 0).sum())

    def parts(self, rows: int) -> Iterator[Batch]:
        """The batch in pieces of at most `rows` rows."""
        for start in range(0, len(self.ids), rows):
            s = slice(start, start + rows)
            yield Batch(self.ids[s], self.labels[s], self.reset[s], self.rows[s])


class Rows:
    """Documents packed into rows of `length` tokens, in an order drawn from `seed`.

    Rows are numbered in the order in which they are drawn first; the last, incomplete one is left
    out. The last `reserve` rows are not counted: batches do not draw them (`reserved` gives them).
    A document that crosses the end of a row goes on in another row as if it began there; the last
    position of a row still has its label.

    With `streams` the text is cut into so many pieces, and row n is the next one of piece
    n % streams: it goes on where row n - streams ended, also in the middle of a document, whose
    rest does not begin there then. Rows that are left over are not counted.
    """

    def __init__(
        self, data: TokenData, length: int, seed: int = 0, reserve: int = 0, streams: int = 0
    ) -> None:
        if length < 2:
            raise UserError(f"length is {length}, expected at least 2 tokens")
        self.data, self.length, self.seed, self.reserve = data, length, seed, reserve
        self.streams = streams
        whole = data.tokens // length
        self.count = whole - reserve
        if self.count < max(1, 2 * streams):
            each = f"two rows for each of {streams} streams, rows" if streams else "one row"
            more = f" beside {reserve} reserved for validation" if reserve else ""
            raise UserError(
                f"{data.where}: {data.tokens} tokens are fewer than {each} of {length}{more}; "
                "add text or lower length"
            )
        random = np.random.Generator(np.random.Philox(key=[seed, 0]))
        self._order = random.permutation(data.documents)
        sizes = np.diff(data.offsets)[self._order]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._rows = random.permutation(whole)
        if streams:
            drawn, reserved = np.sort(self._rows[: self.count]), self._rows[self.count :]
            self.count -= self.count % streams
            pieces = drawn[: self.count].reshape(streams, -1)
            self._rows = np.concatenate([pieces.T.reshape(-1), reserved])

    def __len__(self) -> int:
        return self.count

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the contents of every row."""
        own = {"data": self.data.fingerprint, "length": self.length, "seed": self.seed}
        more = {"reserve": self.reserve, "streams": self.streams}
        return {**own, **{key: value for key, value in more.items() if value}}

    @property
    def reserved(self) -> range:
        """The numbers of the rows that are set aside."""
        return range(self.count, self.count + self.reserve)

    def row(self, index: int) -> tuple[IntArray, IntArray, NDArray[np.bool_]]:
        """(ids, labels, reset), each [T], of one row."""
        first = int(self._rows[index]) * self.length
        last = first + self.length
        ids = np.empty(self.length + 1, dtype=np.int32)
        reset = np.zeros(self.length + 1, dtype=np.bool_)
        counted = np.ones(self.length + 1, dtype=np.bool_)
        reset[0] = not self._goes_on(index)
        at = first
        document = int(np.searchsorted(self._starts, first, side="right")) - 1
        while at <= last and document < self.data.documents:
            begin, end = int(self._starts[document]), int(self._starts[document + 1])
            source = int(self.data.offsets[self._order[document]])
            stop = min(end, last + 1)
            here = slice(at - first, stop - first)
            there = slice(source + at - begin, source + stop - begin)
            ids[here] = self.data.ids[there]
            if self.data.counted is not None:
                counted[here] = self.data.counted[there]
            if at == begin:
                reset[at - first] = True
            at, document = stop, document + 1
        if at <= last:  # the stream ends with this row
            reset[-1], ids[-1] = True, 0
        labels = np.where(counted[1:] & ~reset[1:], ids[1:], -1).astype(np.int32)
        return ids[:-1], labels, reset[:-1]

    def before(self, index: int, rows: int) -> IntArray:
        """The tokens of the document in which a row begins, as far as they stand in the `rows` rows
        before it in its stream, int32 [n]: none where it begins a document or a stream."""
        found: list[IntArray] = []
        enough = rows == 0 or bool(self.row(index)[2][0])
        while not enough:
            index -= self.streams
            ids, _, reset = self.row(index)
            starts = np.flatnonzero(reset)
            found.insert(0, ids[starts[-1] :] if len(starts) else ids)
            enough = len(found) == rows or len(starts) > 0
        return np.concatenate([np.empty(0, np.int32), *found])

    def _goes_on(self, index: int) -> bool:
        """True if the row before this one in its stream is the text before it."""
        before = index - self.streams
        if not self.streams or before < 0 or index >= self.count:
            return False
        return bool(self._rows[index] == self._rows[before] + 1)

    def batch(self, name: str, indices: Iterable[int]) -> Batch:
        """Some rows as one batch."""
        return _batch([(name, int(i)) for i in indices], {name: self})


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches of rows of one length as one."""
    arrays = zip(*((b.ids, b.labels, b.reset) for b in batches), strict=True)
    ids, labels, reset = (np.concatenate(x) for x in arrays)
    return Batch(ids, labels, reset, [row for b in batches for row in b.rows])


def _batch(keys: list[tuple[str, int]], sources: Mapping[str, Rows]) -> Batch:
    ids, labels, reset = zip(*(sources[name].row(index) for name, index in keys), strict=True)
    return Batch(np.stack(ids), np.stack(labels), np.stack(reset), keys)


class Batches:
    """An endless iterator of batches of `rows` rows, drawn from `sources` by `weights`.

    The next row comes from the domain that is furthest behind its share. A domain that is used up
    begins again in another order, or where its rows are those of `rows` streams in the same: then a
    batch has no two rows of a stream. `state_dict` and `load_state_dict` give and set the position.
    """

    def __init__(
        self,
        sources: Mapping[str, Rows],
        rows: int,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        if rows < 1:
            raise UserError(f"rows is {rows}, expected at least 1")
        shares = {name: 1.0 for name in sources} if weights is None else dict(weights)
        for name, share in shares.items():
            if name not in sources:
                known = ", ".join(sources)
                raise UserError(f"weights: there is no domain {name!r}; there are: {known}")
            if not (share >= 0 and np.isfinite(share)):
                raise UserError(f"weights: {name} has {share}, expected 0 or more")
        total = sum(shares.values())
        if not total > 0:
            raise UserError("weights: all are 0")
        self.weights = {name: share / total for name, share in shares.items() if share > 0}
        self.sources = {name: sources[name] for name in self.weights}
        lengths = {source.length for source in self.sources.values()}
        if len(lengths) != 1:
            raise UserError(f"domains have rows of different lengths: {sorted(lengths)}")
        streams = {source.streams for source in self.sources.values()}
        if not (streams == {0} or streams == {rows}):
            raise UserError(
                f"batches of {rows} rows: the domains have {sorted(streams)} streams, expected 0 "
                f"or {rows} (Rows)"
            )
        self.rows, self.seed = rows, seed
        self.length, self.streams = lengths.pop(), streams.pop()
        self._taken = dict.fromkeys(self.weights, 0)
        self._orders: dict[tuple[str, int], NDArray[np.int64]] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides every batch."""
        return {
            "rows": self.rows,
            "seed": self.seed,
            "weights": self.weights,
            "sources": {name: source.identity for name, source in self.sources.items()},
        }

    def state_dict(self) -> dict[str, int]:
        """Rows taken from each domain so far."""
        return dict(self._taken)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a position that `state_dict` gave."""
        if set(state) != set(self._taken):
            raise UserError(f"cursor of domains {sorted(state)}, here are {sorted(self._taken)}")
        self._taken = {name: int(state[name]) for name in self._taken}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return _batch([self._next_row() for _ in range(self.rows)], self.sources)

    def _next_row(self) -> tuple[str, int]:
        name = _furthest_behind(self.weights, self._taken)
        epoch, place = divmod(self._taken[name], self.sources[name].count)
        self._taken[name] += 1
        return name, int(self._order(name, epoch)[place])

    def _order(self, name: str, epoch: int) -> NDArray[np.int64]:
        count = self.sources[name].count
        if epoch == 0 or self.streams:
            return np.arange(count)
        if (name, epoch) not in self._orders:
            random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._orders = {k: v for k, v in self._orders.items() if k[0] != name}
            self._orders[name, epoch] = random.permutation(count)
        return self._orders[name, epoch]

    def first_rows(self, steps: int) -> dict[str, int]:
        """How many different rows of each domain `steps` batches use; they are the first ones."""
        return {name: min(n, self.sources[name].count) for name, n in self._drawn(steps).items()}

    def passes(self, steps: int) -> dict[str, float]:
        """How often `steps` batches go through the rows of each domain."""
        return {name: n / self.sources[name].count for name, n in self._drawn(steps).items()}

    def _drawn(self, steps: int) -> dict[str, int]:
        taken = dict.fromkeys(self.weights, 0)
        for _ in range(steps * self.rows):
            taken[_furthest_behind(self.weights, taken)] += 1
        return taken


def _furthest_behind(weights: Mapping[str, float], taken: Mapping[str, int]) -> str:
    drawn = sum(taken.values()) + 1
    return max(weights, key=lambda name: weights[name] * drawn - taken[name])


Data = TokenData | Rows | Batches | Mapping[str, TokenData]


def as_batches(data: Data, rows: int, length: int, seed: int, *, streams: int = 0) -> Batches:
    """Batches of what a user has: token data, several domains of it (equal shares), or rows.
    `streams`: of the rows that token data is packed into."""
    if isinstance(data, Batches):
        return data
    if isinstance(data, Rows):
        return Batches({"data": data}, rows, seed=seed)
    domains = {"data": data} if isinstance(data, TokenData) else data
    packed = {name: Rows(tokens, length, seed, streams=streams) for name, tokens in domains.items()}
    return Batches(packed, rows, seed=seed)
