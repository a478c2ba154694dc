"""MPI ranks as workers; rank 0 also assigns the input splits."""

from __future__ import annotations

import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from megalr.errors import UserError
from megalr.preprocessing.job import PreprocessJob, Summary
from megalr.preprocessing.split_pool import Outcome, Task, Throttle, attempt
from megalr.preprocessing.split_worker import Progress, SplitWorker, WorkSettings

IDLE_SECONDS = 0.02


def run_mpi(make_job: Callable[[], PreprocessJob], world: Any) -> Summary | None:
    """Run a job on all ranks of ``world``; the summary on rank 0, None elsewhere.

    Rank 0 alone looks at the inputs. It assigns input splits one at a time, the largest first, to
    whichever rank is free. An error on any rank ends the job on all of them.
    """
    if world.Get_rank() != 0:
        _work(world)
        return None
    coordinator = _Coordinator(world)
    try:
        return make_job().run(coordinator.run)
    except BaseException as error:
        if coordinator.state == "new":
            world.bcast(None)  # no rank works yet: the others just end
        elif coordinator.state == "running":
            _abort(world, error)
        raise


def _abort(world: Any, error: BaseException) -> None:
    """Print the error and end all ranks; some of them would wait for a message indefinitely."""
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
        sys.stderr.flush()
    world.Abort(2)


class _Coordinator:
    """Rank 0: assigns input splits, processes some itself, and answers between two batches."""

    def __init__(self, world: Any) -> None:
        self._world = world
        self.state = "new"  # new, running, done
        self._queue: deque[Task] = deque()
        self._outcomes: deque[Outcome] = deque()
        self._working = 0

    def run(
        self, tasks: list[Task], settings: WorkSettings, job: str, progress: Progress
    ) -> Iterator[Outcome]:
        self._queue.extend(tasks)
        self._progress = progress
        self._world.bcast((settings, job))
        self.state = "running"
        self._working = self._world.Get_size() - 1
        worker = SplitWorker(settings, f"{job}-rank0")

        def count(*counts: int) -> None:
            progress(*counts)
            self._serve()

        while self._queue or self._working:
            if self._queue:
                self._outcomes.append(attempt(worker, self._queue.popleft(), count))
            else:
                time.sleep(IDLE_SECONDS)
            self._serve()
            while self._outcomes:
                yield self._outcomes.popleft()
        self.state = "done"
        while self._outcomes:
            yield self._outcomes.popleft()

    def _serve(self) -> None:
        """Answer every message that has arrived."""
        while self._world.iprobe():
            sender, kind, value = self._world.recv()
            if kind == "progress":
                self._progress(*value)
            elif kind == "stop":
                raise value
            else:  # the sender's last outcome (None at first); it asks for another
                if value is not None:
                    self._outcomes.append(value)
                task = self._queue.popleft() if self._queue else None
                self._working -= task is None
                self._world.send(task, dest=sender)


def _work(world: Any) -> None:
    """Ranks 1 and up: request, process, report, until no input split is left."""
    start = world.bcast(None)
    if start is None:
        return
    settings, job = start
    rank = world.Get_rank()

    def send(kind: str, value: object) -> None:
        world.send((rank, kind, value), dest=0)

    throttle = Throttle(lambda counts: send("progress", counts))
    try:
        worker = SplitWorker(settings, f"{job}-rank{rank}")
        outcome: Outcome | None = None
        while True:
            send("ask", outcome)
            while not world.iprobe(source=0):  # a blocking receive would burn the core
                time.sleep(IDLE_SECONDS)
            if (task := world.recv(source=0)) is None:
                return
            outcome = attempt(worker, task, throttle)
            throttle.flush()
    except UserError as error:
        send("stop", error)
    except BaseException as error:
        _abort(world, error)
