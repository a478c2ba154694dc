"""Running a sweep on this machine: some runs at a time on every GPU, each a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megalr.distributed.local_ranks import choose_gpus, end_with_parent, visible_gpus
from megalr.errors import UserError
from megalr.file_lock import lock_file
from megalr.files import disk_errors
from megalr.run.folder import RUN_LOCK
from megalr.sweep.grid import PlannedRun
from megalr.sweep.run_record import LOG, Attempt, RunRecord, current_record, last_line

POLL_SECONDS = 0.2
STOP_SECONDS = 180.0
"""How long a run may take to save and end once it was asked to, before it is killed."""

LAUNCHER_VARIABLES = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Slot:
    """Room for one run at a time.

    Attributes:
        gpu: as in CUDA_VISIBLE_DEVICES; None on a machine without GPUs.
        threads: processor cores of the run.
    """

    gpu: str | None
    threads: int


def machine_slots(gpus: int | Sequence[str] | None, per_gpu: int) -> list[Slot]:
    """``per_gpu`` slots on each GPU, the GPUs in turn; on a machine without GPUs that many in all.

    Args:
        gpus: how many of those that this process may use, or which, as in
            CUDA_VISIBLE_DEVICES; None: all of them.
        per_gpu: runs at a time on each.

    Raises:
        UserError: ``per_gpu`` is below 1, a GPU is named twice or is not there, or there are fewer.
    """
    if per_gpu < 1:
        raise UserError(f"--per_gpu is {per_gpu}: give 1 or more")
    names: list[str | None] = [*choose_gpus(gpus, visible_gpus())] or [None]
    threads = max(1, len(os.sched_getaffinity(0)) // (len(names) * per_gpu))
    return [Slot(gpu, threads) for _ in range(per_gpu) for gpu in names]


@dataclass
class RunningRun:
    """A run whose process is alive."""

    run: PlannedRun
    slot: Slot
    record: RunRecord
    process: subprocess.Popen[bytes]
    started: float


class StopAsked:
    """Whether SIGINT or SIGTERM has reached this process inside :meth:`listening`.

    Attributes:
        signal: the name of the first; None before.
    """

    def __init__(self) -> None:
        self.signal: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record both signals instead of ending by them."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._record) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name


class Runner:
    """Starts runs in slots until all have ended or a stop is asked for.

    Args:
        program: launchers/pretrain.py.
        environment: of the runs, completed for each by :func:`environment_of`.
        slots: where runs may run.
        deadline: of ``time.monotonic``: no run starts after it, and running ones are stopped.
        last_start: of the same clock: no run starts after it, and running ones go on to their end.
        on_end: called with every run that has ended, after its record was written.
        on_wait: called several times per second with the runs that are running.
    """

    def __init__(
        self,
        program: Path,
        environment: Mapping[str, str],
        slots: Sequence[Slot],
        deadline: float | None,
        last_start: float | None,
        on_end: Callable[[PlannedRun], None],
        on_wait: Callable[[Sequence[RunningRun]], None],
    ) -> None:
        self.program, self.environment = program, environment
        self.deadline, self.last_start = deadline, last_start
        self.on_end, self.on_wait = on_end, on_wait
        self.free = list(slots)
        self.running: list[RunningRun] = []
        self.stop_reason: str | None = None

    def run(self, runs: Sequence[PlannedRun]) -> str | None:
        """Run them in this order; each continues from where it was stopped, if it was.

        Returns:
            Why it stopped before all had ended; None if all have.

        Raises:
            UserError: a run's folder is in use, or cannot be written.
        """
        for run in runs:
            check_folder_is_free(run)
        waiting, stop = list(runs), StopAsked()
        with stop.listening():
            try:
                while self.running or waiting:
                    self.stop_reason = self._reason(stop)
                    if self.stop_reason is not None:
                        break
                    closed = _past(self.last_start)
                    if closed and not self.running:
                        self.stop_reason = "the time limit for new runs"
                        break
                    while waiting and self.free and not closed:
                        self._start(waiting.pop(0), self.free.pop(0))
                    self._wait()
            finally:
                self._stop_all()
        return self.stop_reason

    def _reason(self, stop: StopAsked) -> str | None:
        if stop.signal is not None:
            return stop.signal
        return "the time limit" if _past(self.deadline) else None

    def _start(self, run: PlannedRun, slot: Slot) -> None:
        record = current_record(run.name, run.config, run.folder) or RunRecord({})
        record.config = run.config.model_dump(mode="json")
        log = run.folder / LOG
        with disk_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            record.save(run.folder)
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, str(self.program), *run.arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment_of(slot, self.environment),
                    start_new_session=True,  # Ctrl-C reaches this program, which passes it on
                    preexec_fn=end_with_parent,
                )
        self.running.append(RunningRun(run, slot, record, process, time.monotonic()))

    def _wait(self) -> None:
        """Let some time pass, and take note of runs that have ended."""
        time.sleep(POLL_SECONDS)
        for item in list(self.running):
            code = item.process.poll()
            if code is None:
                continue
            self.running.remove(item)
            self.free.append(item.slot)
            with suppress(ProcessLookupError):  # compile workers that outlive it
                os.killpg(item.process.pid, signal.SIGKILL)
            seconds = round(time.monotonic() - item.started, 3)
            line = last_line(item.run.folder / LOG)
            item.record.attempts.append(Attempt(code, seconds, line))
            item.record.save(item.run.folder)
            self.on_end(item.run)
        self.on_wait(self.running)

    def _stop_all(self) -> None:
        """Ask every running run to save and end; wait for it; kill what does not end."""
        for item in self.running:
            item.process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        while self.running:
            if time.monotonic() - asked > STOP_SECONDS:
                for item in self.running:
                    item.process.kill()
            self._wait()


def _past(moment: float | None) -> bool:
    """Whether a moment of ``time.monotonic`` has come."""
    return moment is not None and time.monotonic() >= moment


def environment_of(slot: Slot, outer: Mapping[str, str]) -> dict[str, str]:
    """The environment of a run in a slot: a world of one process, one GPU, its share of cores."""
    environment = {k: v for k, v in outer.items() if k not in LAUNCHER_VARIABLES}
    environment |= {"RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": str(slot.threads)}
    # Without it every run compiles on all cores.
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(slot.threads))
    if slot.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = slot.gpu
    return environment


def check_folder_is_free(run: PlannedRun) -> None:
    """Refuse a run that another process is training.

    Raises:
        UserError: its folder is locked; names the process.
    """
    path = run.folder / RUN_LOCK
    if not path.exists():
        return
    with disk_errors(path), open(path, "a+", encoding="utf-8", errors="replace") as file:
        if lock_file(file):
            return
        file.seek(0)
        raise UserError(
            f"{run.name} is running already: {file.read().strip()}; wait for it or end it"
        )
