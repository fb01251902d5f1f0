"""The run folder: every round is committed atomically, so that a run survives being killed at any instant.

    store.json           format, number of rows, digests of the next four; written last: without it there is no run
    config.yaml  environment.json  graph.safetensors  start.safetensors          never change
    rounds/000007.json   the commit record of round 7: its metrics, and the digest of every file it wrote
    rows/000012.r000007.safetensors      row 12 as of round 7
    optim/  extra/       the same for kept optimiser state by client, and for the method's own tensors (one key, 0)
    metrics.jsonl        a copy of the records' metrics for people and tools; never read, rebuilt when it differs
    result.json          the summary of a finished run

A round is committed if and only if its record exists; the record is renamed into place after all other files are on disk.
``history`` decides on the versions of a file that are read and kept. The cost of a commit is that of its changed rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from torch import Tensor

from mira.core.errors import UserError
from mira.store import files, manifests
from mira.store.history import History, RoundRecord
from mira.store.rounds import Rounds
from mira.store.rows import StoredRows

METRICS, RESULT = "metrics.jsonl", "result.json"
_CONTINUE = "continue with --resume; committed rounds are intact"


class Store:
    """An opened run folder. Close it, or use it in a ``with``, to let another process write."""

    def __init__(self, folder: Path, lock: int | None) -> None:
        """Use ``create`` or ``open``. ``lock``: the descriptor that holds the write lock, None to read only."""
        self.folder = folder
        self._lock = lock
        self._manifest = manifest = manifests.read(folder)
        self.num_rows = manifest.num_rows
        self.start = files.read_tensor(folder / "start.safetensors", manifest.files["start.safetensors"])
        """The common start row [P]."""
        self._rounds, self._history = Rounds(folder), History()
        metrics = hashlib.blake2b()  # a line at a time: with very many rounds not even the metrics fit in memory
        for record in self._rounds.records():
            self._history.add(record)
            metrics.update(record.line())
        if lock is not None:
            self._rounds.tidy(self._history.kept(), (METRICS, RESULT))
            self._rebuild(metrics.digest())

    @staticmethod
    def create(
        folder: Path,
        config_yaml: str,
        environment: dict[str, Any],
        start: Tensor,
        num_rows: int,
        graph: dict[str, Tensor],
    ) -> Store:
        """Make a run in an empty or absent folder, or where a creation was interrupted. Raises UserError for any other."""
        contents = {
            "config.yaml": config_yaml.encode(),
            "environment.json": files.pack_json(environment),
            "graph.safetensors": files.pack_tensors(graph),
            "start.safetensors": files.pack_tensors({"start": start}),
        }
        return Store.copied(folder, contents, num_rows)

    @staticmethod
    def copied(folder: Path, contents: Mapping[str, bytes], num_rows: int) -> Store:
        """Make a run of the files that never change, by name, as ``create`` does of their values."""
        try:
            return _held(folder, manifests.write(folder, contents, num_rows))
        except OSError as error:
            raise files.unwritable(folder, error, "start again; no run was created") from None

    @staticmethod
    def check_vacant(folder: Path) -> None:
        """Raises UserError where ``create`` would refuse ``folder`` because something lies there already."""
        if folder.is_dir():
            manifests.check_vacant(folder)

    @staticmethod
    def exists(folder: Path) -> bool:
        """True where ``folder`` holds a run; an interrupted creation is none."""
        return manifests.exists(folder)

    @staticmethod
    def open(folder: Path, writable: bool = True) -> Store:
        """Open an existing run. ``writable``: take the lock, and remove the remains of an interrupted commit.

        Raises UserError when there is no run, another process writes to it, or a file is missing or corrupt.
        """
        if not Store.exists(folder):
            begun = (folder / files.LOCK).exists()
            why = "its creation was interrupted; start it again without --resume" if begun else "there is no run here"
            raise UserError(f"{folder}: {why}")
        if not writable:
            return Store(folder, None)
        try:
            return _held(folder, files.take_lock(folder))
        except OSError as error:
            raise files.unwritable(folder, error, _CONTINUE) from None

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def last_round(self) -> int | None:
        """The last committed round; None before the first commit."""
        return self._history.last

    @property
    def best_round(self) -> int | None:
        """The round of the lowest validation loss; None while no round has one."""
        return self._history.best

    def config(self) -> str:
        """The resolved configuration, YAML."""
        path, digest = self.folder / "config.yaml", self._manifest.files["config.yaml"]
        if path.is_file() and files.digest(path.read_bytes()) != digest:
            why = "it was edited; give new places of data or model with --data and --model"
            raise files.corrupt(path, why)
        return files.read(path, digest).decode()

    def environment(self) -> dict[str, Any]:
        name = "environment.json"
        environment: dict[str, Any] = files.read_json(self.folder / name, self._manifest.files[name])
        return environment

    def graph(self) -> dict[str, Tensor]:
        return files.read_tensors(self.folder / "graph.safetensors", self._manifest.files["graph.safetensors"])

    def rows(self, as_of: int | None = None) -> StoredRows:
        """The rows as of round ``as_of``, the last or the best; None: of the last round, also after further commits."""
        return StoredRows(self.num_rows, self.start, partial(self._row, as_of=as_of))

    def optimizer(self, client: int) -> Tensor | None:
        """The client's last kept optimiser state; None when it has none."""
        version = self._version("optim", client, None)
        return None if version is None else files.read_tensor(*version)

    def extra(self, as_of: int | None = None) -> dict[str, Tensor]:
        """The method's own tensors as of the last (None) or the best round."""
        version = self._version("extra", 0, as_of)
        return {} if version is None else files.read_tensors(*version)

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of every committed round, from round 0 on."""
        return [{"round": record.round, **record.metrics} for record in self._rounds.records()]

    def commit(
        self,
        round: int,
        index: Tensor,
        value: Tensor,
        extra: Mapping[str, Tensor],
        optimizer: Mapping[int, Tensor] | None,
        metrics: dict[str, Any],
    ) -> None:
        """Make ``round`` the last one: rows ``value`` [n,P] at ``index`` [n], optimiser states by client, metrics.

        ``extra``: the method's tensors that change; the others keep their value. Rounds count from 0, without a gap.
        Raises UserError when a file cannot be written; the state of the former round is then untouched.
        """
        self._check_commit(round, index, value)
        files.pack_json(metrics)  # NaN must be found before anything is written
        new: list[tuple[str, int, dict[str, Tensor]]] = [
            ("rows", key, {"row": row}) for key, row in zip(index.tolist(), value, strict=True)
        ]
        new += [("optim", client, {"state": state}) for client, state in (optimizer or {}).items()]
        if extra:
            new.append(("extra", 0, {**self.extra(), **extra}))
        record = RoundRecord(round=round, metrics=metrics, rows={}, optim={}, extra={})
        self._add(record, ((kind, key, files.pack_tensors(tensors)) for kind, key, tensors in new))

    def adopt(self, record: RoundRecord, contents: Sequence[tuple[str, int, bytes]]) -> None:
        """Commit a round that another run folder has committed: its ``record``, and the versions that it wrote, by kind and key.
        The caller has checked their digests. Raises UserError as ``commit`` does, and, with nothing written, where a version fits
        no row of this run."""
        assert self._lock is not None, "opened to read only, or closed"
        assert record.round == self._next_round(), f"round {record.round} adopted, expected {self._next_round()}"
        for version in contents:
            self._check_version(record.round, *version)
        self._add(record.model_copy(update={"rows": {}, "optim": {}, "extra": {}}), contents)

    def _add(self, record: RoundRecord, contents: Iterable[tuple[str, int, bytes]]) -> None:
        try:
            self._rounds.write(record, contents)
            files.remove([self._rounds.version(*version) for version in self._history.add(record)])
            with open(self.folder / METRICS, "ab") as file:
                file.write(record.line())
        except OSError as error:
            raise files.unwritable(self.folder, error, _CONTINUE) from None

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary of a finished run."""
        self._write(RESULT, files.pack_json(summary))

    def result(self) -> dict[str, Any] | None:
        """The summary, None while the run is not finished."""
        path = self.folder / RESULT
        result: dict[str, Any] | None = files.read_json(path) if path.exists() else None
        return result

    def _next_round(self) -> int:
        return 0 if self.last_round is None else self.last_round + 1

    def _rebuild(self, expected: bytes) -> None:
        path = self.folder / METRICS
        if path.exists() and not path.is_symlink():
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "blake2b").digest() == expected:
                    return
        self._write(METRICS, (record.line() for record in self._rounds.records()))

    def _write(self, name: str, data: bytes | Iterable[bytes]) -> None:
        try:
            files.replace(self.folder / name, data)
            files.sync(self.folder)
        except OSError as error:
            raise files.unwritable(self.folder / name, error, _CONTINUE) from None

    def _version(self, kind: str, key: int, as_of: int | None) -> tuple[Path, str] | None:
        """File and digest of the version to read; None when there is none as of that round."""
        if as_of is not None and as_of not in (self.last_round, self.best_round):
            kept = f"last: {self.last_round}, best: {self.best_round}"
            raise UserError(f"{self.folder}: round {as_of} is not kept; {kept}")
        version = self._history.newest(kind, key, as_of)
        if version is None:
            return None
        path = self._rounds.version(kind, key, version.round)
        if self._lock is None and not path.exists() and self._rounds.record(self._next_round()).exists():
            raise UserError(f"{self.folder}: the run went on while it was read; try again")
        return path, version.digest

    def _row(self, key: int, as_of: int | None) -> Tensor:
        if not 0 <= key < self.num_rows:
            raise IndexError(f"row {key} of {self.num_rows}")
        version = self._version("rows", key, as_of)
        if version is None:
            return self.start
        return self._checked(version[0], files.read_tensor(*version))

    def _checked(self, path: Path, row: Tensor) -> Tensor:
        """``row``, the content of ``path``. Raises UserError where it is no row of this run."""
        if row.shape != self.start.shape or row.dtype != self.start.dtype:
            expected = f"{self.start.dtype} {tuple(self.start.shape)}"
            raise files.corrupt(path, f"{row.dtype} {tuple(row.shape)}, expected {expected}")
        return row

    def _check_version(self, round: int, kind: str, key: int, data: bytes) -> None:
        """Raise UserError where ``data`` cannot be the version of ``kind`` and ``key`` that ``round`` wrote."""
        path = self._rounds.version(kind, key, round)
        many = {"rows": self.num_rows, "extra": 1}.get(kind, inf)  # the store does not know the number of clients
        if key >= many:
            raise files.corrupt(path, f"the run has {many} of this kind")
        tensors = files.tensors_of(path, data)
        if kind == "rows":
            self._checked(path, files.only_tensor(path, tensors))

    def _check_commit(self, round: int, index: Tensor, value: Tensor) -> None:
        """Assert a valid commit; failures are bugs of the caller, not mistakes of the user."""
        assert self._lock is not None, "opened to read only, or closed"
        assert round == self._next_round(), f"round {round} committed, expected {self._next_round()}"
        assert len(index.unique()) == len(index) == len(value), "one value for each row, each row once"
        assert not len(index) or 0 <= int(index.min()) <= int(index.max()) < self.num_rows, "no such row"
        assert value.shape[1:] == self.start.shape, "rows of another size than the start row"
        assert value.dtype == self.start.dtype, "rows of another type than the start row"


def _held(folder: Path, lock: int) -> Store:
    """The run in ``folder``, opened with its ``lock``, which is released where that fails."""
    try:
        return Store(folder, lock)
    except BaseException:
        os.close(lock)
        raise
