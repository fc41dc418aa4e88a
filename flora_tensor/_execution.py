"""Tasks done one after the other, or by an executor; outcomes kept as they come."""

from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, as_completed
from dataclasses import dataclass, replace

from flora_tensor._errors import ResourceError
from flora_tensor._journal import Journal
from flora_tensor._settings import Progress
from flora_tensor._tasks import Job, Outcome, Task, pack, perform, perform_job, unpack
from flora_tensor.checkpoint import Checkpoint

__all__ = ["Run"]


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

    def _key(self, task: Task) -> tuple[str, str, str]:
        return task.kind, task.name, task.options(self.job.settings)

    def _one_by_one(self, phase: str, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome | None]]:
        for done, task in enumerate(tasks):
            self.progress(phase, done, len(tasks), task.name)
            if done + 1 < len(tasks):  # the disk can be busy while we compute
                for name in tasks[done + 1].members or (tasks[done + 1].name,):
                    self.base.prefetch(name)
                    self.tuned.prefetch(name)
            yield task, perform(self.base, self.tuned, self.job.settings, task)

    def _all_at_once(self, phase: str, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome | None]]:
        assert self.executor is not None
        waiting = {self.executor.submit(perform_job, self.job, task): task for task in tasks}
        broken: BrokenExecutor | None = None
        try:
            for done, future in enumerate(as_completed(list(waiting))):
                task = waiting.pop(future)
                self.progress(phase, done, len(tasks), task.name)
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
