"""Input splits processed by a pool of worker processes on one machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from megalr.errors import UserError
from megalr.files import DiskFull
from megalr.preprocessing.split_worker import Progress, SplitResult, SplitWorker, WorkSettings
from megalr.readers.input_splits import InputSplit

REPORT_SECONDS = 0.3  # between two progress messages of a worker


@dataclass(frozen=True)
class Failure:
    """An input split that could not be processed; the others go on."""

    name: str
    message: str


Outcome = SplitResult | Failure
Task = tuple[str, InputSplit]


def attempt(worker: SplitWorker, task: Task, progress: Progress) -> Outcome:
    """Process one input split; a UserError becomes a Failure, a full disk is raised."""
    try:
        return worker.process(*task, progress)
    except DiskFull:
        raise
    except UserError as error:
        return Failure(task[0], str(error))


class Throttle:
    """Adds up progress and sends it at most every ``REPORT_SECONDS``."""

    def __init__(self, send: Callable[[list[int]], None]) -> None:
        self._send, self._last, self._sum = send, time.monotonic(), [0, 0, 0, 0]

    def __call__(self, documents: int, text_bytes: int, tokens: int, input_bytes: int) -> None:
        for place, count in enumerate((documents, text_bytes, tokens, input_bytes)):
            self._sum[place] += count
        if time.monotonic() - self._last > REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        if any(self._sum):
            self._send(self._sum)
        self._sum, self._last = [0, 0, 0, 0], time.monotonic()


def run_serial(
    tasks: list[Task], settings: WorkSettings, job: str, progress: Progress
) -> Iterator[Outcome]:
    """Process the input splits one after the other in this process."""
    worker = SplitWorker(settings, job)
    for task in tasks:
        yield attempt(worker, task, progress)


def _worker_main(settings: WorkSettings, job: str, pipe: Connection) -> None:
    """Loop of a worker process; ends when the parent closes the pipe or exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    throttle = Throttle(lambda counts: pipe.send(("progress", counts)))
    try:
        worker = SplitWorker(settings, job)
        while True:
            outcome = attempt(worker, pipe.recv(), throttle)
            throttle.flush()
            pipe.send(("outcome", outcome))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except UserError as error:
        pipe.send(("stop", error))
    except BaseException:
        pipe.send(("crash", traceback.format_exc()))


class _Worker:
    def __init__(self, settings: WorkSettings, job: str) -> None:
        # spawn, so that no worker inherits another's pipe and each notices the end of the parent
        context = multiprocessing.get_context("spawn")
        self.pipe, remote = context.Pipe()
        self.process = context.Process(
            target=_worker_main, args=(settings, job, remote), daemon=True
        )
        self.process.start()
        remote.close()
        self.task: Task | None = None

    def assign(self, task: Task) -> None:
        self.task = task
        self.pipe.send(task)

    def death(self) -> UserError:
        """The error for a worker process that ended without reporting one."""
        self.process.join(5)
        code = self.process.exitcode or 0
        how = f"exit code {code}"
        if code < 0:
            how = f"signal {-code} ({signal.Signals(-code).name})"
        hint = ", probably out of memory" if code == -signal.SIGKILL else ""
        where = f" while working on {self.task[1].file}" if self.task else ""
        return UserError(
            f"worker process {self.process.pid} died with {how}{hint}{where}; what is finished is "
            f"kept: start the same command again"
        )


def run_workers(
    tasks: list[Task], settings: WorkSettings, job: str, workers: int, progress: Progress
) -> Iterator[Outcome]:
    """Process the input splits on ``workers`` processes, in order; outcomes as they arrive.

    Raises UserError when a worker dies or the disk is full; the other workers are then killed.
    """
    environment = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}  # a worker is one core
    kept = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    pool = [_Worker(settings, job) for _ in range(min(workers, len(tasks)))]
    for key, value in kept.items():
        os.environ.pop(key)
        if value is not None:
            os.environ[key] = value
    left = iter(tasks)
    try:
        for worker in pool:
            worker.assign(next(left))
        while busy := {worker.pipe: worker for worker in pool if worker.task}:
            for ready in wait(list(busy)):
                worker = busy[ready]  # type: ignore[index]
                try:
                    kind, value = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    raise worker.death() from None
                if kind == "progress":
                    progress(*value)
                    continue
                if kind == "outcome":
                    yield value
                    worker.task = None
                    if (task := next(left, None)) is not None:
                        worker.assign(task)
                    continue
                raise _failure(kind, value)
    finally:
        for worker in pool:
            worker.pipe.close()
            worker.process.kill()
            worker.process.join()


def _failure(kind: str, value: Any) -> Exception:
    return value if kind == "stop" else RuntimeError(f"a worker process failed:\n{value}")
