"""The preprocessing job: text files in, shards and a manifest out."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalr.data.manifest import MANIFEST_NAME, DataManifest, ShardEntry
from megalr.data.megatron_index import token_dtype
from megalr.data.records import read_json
from megalr.errors import UserError
from megalr.file_lock import JobLock
from megalr.files import disk_errors, temporary_path, write_atomic
from megalr.preprocessing.progress_line import ProgressLine
from megalr.preprocessing.split_pool import Failure, Outcome, Task, run_serial, run_workers
from megalr.preprocessing.split_worker import (
    FINISHED_FOLDER,
    Progress,
    SplitResult,
    WorkSettings,
    finished_path,
    load_finished,
)
from megalr.preprocessing.tokenizer import Tokenizer, open_tokenizer, require_eos, tokenizer_info
from megalr.readers.input_splits import InputSplit, failed_inputs, plan_splits
from megalr.version import __version__

JOB_NAME = "job.json"
TOKENIZER_FOLDER = "tokenizer"
Runner = Callable[[list[Task], WorkSettings, str, Progress], Iterator[Outcome]]


@dataclass(frozen=True)
class Summary:
    """Result of a job. ``complete``: all input splits are finished and the manifest is written."""

    complete: bool
    files: int
    reused: int
    documents: int
    tokens: int
    text_bytes: int
    bad_lines: int
    empty_documents: int
    seconds: float
    tokens_per_second: float
    manifest: str | None


class PreprocessJob:
    """Prepares an output folder, processes one share of the inputs, writes the manifest at the end.

    settings.output receives ``NAME.bin``/``.idx`` per input split, ``finished/NAME.json`` once
    it is complete, ``tokenizer/`` (a copy), ``job.json`` (the settings) and ``manifest.json`` once
    all input splits of all shares are finished. Starting the same job again verifies the finished
    ones and processes the rest; the files are the same byte for byte.
    """

    def __init__(
        self,
        inputs: list[str],
        settings: WorkSettings,
        split_bytes: int,
        share: int = 0,
        shares: int = 1,
    ) -> None:
        self.settings, self.share, self.shares = settings, share, shares
        self.tokenizer: Tokenizer = open_tokenizer(settings.tokenizer)
        if settings.append_eos:
            require_eos(self.tokenizer)
        suffixes = [settings.shard_suffix(split) for split in settings.splits]
        self.input_splits: dict[str, InputSplit] = plan_splits(inputs, split_bytes, suffixes)
        for input_split in self.input_splits.values():
            folders = (
                input_split.file.parent,
                input_split.file.resolve().parent,
            )  # of a link and its target
            if input_split.unit != "hub" and settings.output.resolve() in folders:
                raise UserError(
                    f"{input_split.file}: lies in the output folder, where it could be "
                    f"overwritten; choose another --output"
                )
        self._record = settings.record(self.tokenizer.fingerprint)
        # Largest first, so that no long one starts when the others are about to end.
        names = sorted(
            self.input_splits, key=lambda name: (-_input_bytes(self.input_splits[name]), name)
        )
        self.tasks: list[Task] = [(name, self.input_splits[name]) for name in names[share::shares]]
        self.token = f"{share}-of-{shares}.{secrets.token_hex(4)}"  # marks unfinished files

    def run(self, runner: Runner) -> Summary:
        """Process this share with ``runner``. Raises UserError naming the inputs that failed."""
        output = self.settings.output
        with disk_errors(output):
            (output / FINISHED_FOLDER).mkdir(parents=True, exist_ok=True)
        lock = JobLock(output, self.share, self.shares)
        try:
            self._prepare()
            line = ProgressLine(
                len(self.tasks), sum(_input_bytes(input_split) for _, input_split in self.tasks)
            )
            results, failures = self._collect(runner, line)
            if failures:
                raise self._failed(failures, len(results))
            return self._finish(results, line)
        finally:
            self._remove_unfinished()
            lock.release()

    def _prepare(self) -> None:
        output = self.settings.output
        finished = sorted(path.stem for path in (output / FINISHED_FOLDER).glob("*.json"))
        self._prepare_settings(output / JOB_NAME, bool(finished))
        others = [name for name in finished if name not in self.input_splits]
        if others:
            raise UserError(
                f"{output}: holds shards of inputs that this command does not name ({others[0]} "
                f"and {len(others) - 1} more); name all inputs at once or choose another folder"
            )
        self._remove_unfinished()
        if not (output / TOKENIZER_FOLDER).exists():
            temporary = temporary_path(output / TOKENIZER_FOLDER, self.token)
            with disk_errors(output):
                self.tokenizer.copy_to(temporary)
                try:
                    os.rename(temporary, output / TOKENIZER_FOLDER)
                except OSError:  # another share was first
                    _delete(temporary)

    def _prepare_settings(self, job_file: Path, any_finished: bool) -> None:
        """Check the settings of an earlier start, or replace them if it finished nothing."""
        if job_file.exists():
            if any_finished:
                self._check_same(read_json(job_file), job_file)
                return
            with contextlib.suppress(UserError):  # damaged: it is replaced
                if read_json(job_file) == self._record:
                    return
            _delete(self.settings.output / TOKENIZER_FOLDER)
        content = json.dumps(self._record, indent=1) + "\n"
        write_atomic(job_file, content.encode(), self.token)

    def _remove_unfinished(self) -> None:
        """Delete unfinished files of this share, and of jobs with another number of shares."""
        for folder in (self.settings.output, self.settings.output / FINISHED_FOLDER):
            for path in folder.glob(".*.partial"):
                _, share, _, _ = path.name.rsplit(".", 3)
                running = share.endswith(f"-of-{self.shares}")  # perhaps: another share of this job
                if share == f"{self.share}-of-{self.shares}" or not running:
                    _delete(path)

    def _check_same(self, found: Any, path: Path) -> None:
        record = found if isinstance(found, dict) else {}
        own = self.settings.record_like(record, self.tokenizer)
        for key in sorted(set(own) | set(record)):
            if record.get(key) != own.get(key):
                raise UserError(
                    f"{path}: this folder was started with {key} = {record.get(key)!r}, now it is "
                    f"{own.get(key)!r}; use the same settings or another output folder"
                )

    def _collect(
        self, runner: Runner, line: ProgressLine
    ) -> tuple[list[SplitResult], list[Failure]]:
        results: list[SplitResult] = []
        failures: list[Failure] = []
        try:
            for outcome in runner(self.tasks, self.settings, self.token, line.add):
                if isinstance(outcome, Failure):
                    failures.append(outcome)
                    line.message(f"failed: {outcome.message}")
                    continue
                results.append(outcome)
                line.finish_split(_input_bytes(self.input_splits[outcome.name]), outcome.reused)
                if outcome.report.bad and not outcome.reused:
                    line.message(_bad_lines(self.input_splits[outcome.name], outcome))
        finally:
            line.close()
        return results, failures

    def _failed(self, failures: list[Failure], finished: int) -> UserError:
        listed = failed_inputs([failure.message for failure in failures], len(self.tasks))
        return UserError(
            f"{listed}. {finished} are "
            f"finished and kept in {self.settings.output}; repair the rest and start again"
        )

    def _finish(self, results: list[SplitResult], line: ProgressLine) -> Summary:
        written = [result for result in results if not result.reused]
        manifest = self._write_manifest(line)
        summary = Summary(
            complete=manifest is not None,
            files=len(results),
            reused=len(results) - len(written),
            documents=line.documents,
            tokens=line.tokens,
            text_bytes=line.text_bytes,
            bad_lines=sum(result.report.bad for result in results),
            empty_documents=sum(result.report.empty for result in results),
            seconds=round(line.seconds, 3),
            tokens_per_second=round(line.tokens / line.seconds),
            manifest=None if manifest is None else str(manifest),
        )
        name = "summary.json" if self.shares == 1 else f"summary-{self.share}-of-{self.shares}.json"
        content = json.dumps(summary.__dict__, indent=1) + "\n"
        write_atomic(self.settings.output / name, content.encode(), self.token)
        return summary

    def _write_manifest(self, line: ProgressLine) -> Path | None:
        """Write the manifest if the input splits of all shares are finished.

        A split of the data set that got no document is told on ``line``: with few documents a
        small fraction may hold out none.
        """
        output = self.settings.output
        shards: list[ShardEntry] = []
        for name in self.input_splits:
            if not finished_path(output, name).exists():
                return None
            settings, result = load_finished(output, name, self.settings, self.tokenizer.vocab_size)
            self._check_same(settings, finished_path(output, name))
            shards += result.shards
        documents = Counter[str]()
        for shard in shards:
            documents[shard.split] += shard.documents
        if not documents.total():
            raise UserError(f"{output}: the inputs hold no document; check --input and --text_key")
        for split in self.settings.splits:
            if not documents[split]:
                line.message(
                    f"warning: --validation_fraction {self.settings.validation_fraction} leaves "
                    f"no {split} document among {documents.total()}; choose another fraction and "
                    f"another --output"
                )
        manifest = DataManifest(
            tokenizer=tokenizer_info(self.tokenizer, TOKENIZER_FOLDER),
            append_eos=self.settings.append_eos,
            dtype=token_dtype(self.tokenizer.vocab_size).name,
            shards=tuple(shards),
            program_version=__version__,
            settings=self._record,
        )
        manifest.save(output, self.token)
        return output / MANIFEST_NAME


def _input_bytes(input_split: InputSplit) -> int:
    """Bytes of input in a split; 1 for a file of the hub, whose size is not known."""
    return (
        input_split.stop - input_split.start if input_split.unit == "bytes" else input_split.size
    ) or 1


def _bad_lines(input_split: InputSplit, result: SplitResult) -> str:
    report = result.report
    more = ", ..." if report.bad > len(report.reasons) else ""
    return (
        f"{input_split.file}: skipped {report.bad} bad of {report.records} records: "
        f"{'; '.join(report.reasons)}{more}"
    )


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def run_local(job: PreprocessJob, workers: int) -> Summary:
    """Run a job on ``workers`` processes of this machine (1: in this process)."""

    def runner(
        tasks: list[Task], settings: WorkSettings, token: str, progress: Progress
    ) -> Iterator[Outcome]:
        if workers == 1 or len(tasks) <= 1:
            return run_serial(tasks, settings, token, progress)
        return run_workers(tasks, settings, token, workers, progress)

    return job.run(runner)
