"""Tasks done one after the other, or by an executor; outcomes kept as they come."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import dataclass, replace
from queue import SimpleQueue

from flora_tensor._errors import ResourceError
from flora_tensor._journal import Journal
from flora_tensor._progress import Progress
from flora_tensor._tasks import Job, Outcome, Task, pack, perform, perform_job, unpack
from flora_tensor.checkpoint import Checkpoint

__all__ = ["Run"]

# Bytes of singular vectors that wait in an executor's queue at most; tasks without any are all submitted at once.
_MOST_HELD = 1 << 28


@dataclass(frozen=True)
class Run:
    """Where and how the tasks of one extraction are done."""

    base: Checkpoint
    tuned: Checkpoint
    job: Job
    journal: Journal | None
    executor: Executor | None
    progress: Progress

    def do(self, phase: str, tasks: Sequence[Task]) -> dict[str, Outcome]:
        """Do all tasks, and return their outcomes in the tasks' order; stored parts stay in the journal."""
        found: dict[str, Outcome] = {}
        if self.journal is not None and len(self.journal):
            tasks = [replace(task, known=self.journal.inputs_of(*self._key(task))) for task in tasks]
        steps = self._one_by_one(phase, tasks) if self.executor is None else self._all_at_once(phase, tasks)
        for task, outcome in steps:
            if outcome is None:
                assert self.journal is not None
                outcome = unpack(self.journal.load(*self._key(task)))
            elif self.journal is not None and outcome.weight is not None:
                self.journal.add(*self._key(task), outcome.weight.digest, pack(outcome))
            found[task.name] = outcome if self.journal is None else replace(outcome, parts={})
        return {task.name: found[task.name] for task in tasks}

    def stored(self, task: Task) -> Outcome:
        """Return a finished task's outcome, parts included."""
        assert self.journal is not None
        return unpack(self.journal.load(*self._key(task)))

    def _equipped(self, task: Task) -> Task:
        """Return a task with what looking at its tensor found, where that is kept."""
        if self.journal is None or task.weight is None or not task.weight.has_bases:
            return task
        return task.with_bases(self.stored(task.look).parts)

    def _key(self, task: Task) -> tuple[str, str, str]:
        return task.kind, task.name, task.options(self.job.settings)

    def _one_by_one(self, phase: str, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome | None]]:
        for done, task in enumerate(tasks):
            self.progress(phase, done, len(tasks), task.name)
            if done + 1 < len(tasks):  # the disk can be busy while we compute
                for name in tasks[done + 1].members or (tasks[done + 1].name,):
                    self.base.prefetch(name)
                    self.tuned.prefetch(name)
            yield task, perform(self.base, self.tuned, self.job.settings, self._equipped(task))

    def _all_at_once(self, phase: str, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome | None]]:
        assert self.executor is not None
        left, done, held = deque(tasks), 0, 0
        waiting: dict[Future[Outcome | None], Task] = {}
        finished = SimpleQueue[Future[Outcome | None]]()
        broken: BrokenExecutor | None = None
        try:
            while waiting or (left and broken is None):
                while left and broken is None and (held < _MOST_HELD or not waiting):
                    task = self._equipped(left[0])
                    try:
                        future = self.executor.submit(perform_job, self.job, task)
                    except BrokenExecutor as error:
                        broken = error
                        break
                    held, waiting[future] = held + task.n_bytes, task
                    future.add_done_callback(finished.put)
                    left.popleft()
                future = finished.get()
                task = waiting.pop(future)
                held -= task.n_bytes
                self.progress(phase, done, len(tasks), task.name)
                done += 1
                try:
                    outcome = future.result()
                except BrokenExecutor as error:  # what the others have finished is kept first
                    broken = error
                else:
                    yield task, outcome
        finally:
            for future in waiting:
                future.cancel()
        if broken is not None:
            raise ResourceError(f"extract: a worker died and the executor gave up: {broken}") from broken
