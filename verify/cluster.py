"""Run functions on a dask.distributed cluster, each at most once: what takes a worker down is a result, not a hang.

Dask runs what a dying worker had begun on another one, and again, up to four workers: right for what a power cut
interrupts, wrong for what kills its process. So a function leaves a mark with the scheduler before it begins, and what
is marked is not begun again. What outlasts its time is cancelled and its worker restarted (by its nanny, as
`dask worker` has one): nothing less ends a compiler or a kernel that hangs. Functions travel by name, so workers need
this project installed, and of the same sources where that matters: what is called checks that itself.
"""

import math
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # half a second, and only who names a scheduler needs it
    from distributed import Client, Future

TICK = 1.0
"""Seconds between two looks at whether workers are still there."""
ANSWER = 10.0
"""Seconds that a scheduler has to answer."""
VACANT = 60.0
"""Seconds that what no worker can run waits for one: a nanny takes a few to bring one back."""
RETRIES = 3
"""Times that dask tries again what failed before the function was called: one of two workers' first tasks did on a busy
machine, for a reason unseen, and never in 84 clusters that were begun to find it."""


class Unreachable(Exception):
    """There is no such cluster, or it cannot do what is asked; the message says what was expected."""


@dataclass(frozen=True)
class Failure:
    """What became of a function that returned nothing."""

    kind: Literal["raised", "died", "late", "lost"]
    """It raised; its worker died with it; it outlasted its time; the cluster could not call it, or has nobody left."""
    message: str


@dataclass(eq=False)
class Task:
    """One function on its way."""

    name: str
    seconds: float
    resources: Mapping[str, float]
    future: "Future | None" = None
    worker: str | None = None
    """The address of the worker that began it."""
    since: float = field(default_factory=time.monotonic)
    """When it was begun, or, before, when it could last have been."""


class Pool:
    """The workers of a cluster, by what they offer."""

    def __init__(self, client: "Client"):
        self.client, self.tasks, self._done = client, {}, SimpleQueue()
        self._topic = f"kda-forge-{uuid.uuid4().hex}"
        client.subscribe_topic(self._topic, self._begun)

    def strangers(self) -> list[str]:
        """Return the workers that cannot import this project: what they are sent closes them.

        A builtin is all that such a worker reads.
        """
        asked = f"__import__('importlib.util').util.find_spec({__package__!r}) is not None"
        found = self.client.run(eval, asked, on_error="ignore")  # one that is just dying says nothing
        return [address for address, ours in found.items() if not ours]

    def slots(self, resource: str | None = None, seconds: float = 0.0) -> int:
        """Return how many functions can run at once that need one of a resource; None: one for a worker.

        Where there is none it waits so many seconds for one: a worker that died comes back.
        """
        until = time.monotonic() + seconds
        while True:
            found = int(sum(x["resources"].get(resource, 0) if resource else 1 for x in self._workers().values()))
            if found or time.monotonic() >= until:
                return found
            time.sleep(TICK / 10)

    def submit(
        self, function: Callable, *arguments, seconds: float = math.inf, resources: Mapping[str, float] | None = None
    ) -> Task:
        """Have a function of a module called on a worker that offers the resources, for at most so many seconds."""
        task = Task(f"kda-forge-{uuid.uuid4().hex}", seconds, dict(resources or {}))
        sent = {"key": task.name, "pure": False, "retries": RETRIES, "resources": task.resources}
        task.future = self.client.submit(_once, self._topic, task.name, function, arguments, **sent)
        self.tasks[task.name] = task
        task.future.add_done_callback(lambda _: self._done.put(task))
        return task

    def finished(self, seconds: float = math.inf) -> list[tuple[Task, object]]:
        """Wait until something has ended, for at most so many seconds; returns tasks with their values or Failures."""
        until = time.monotonic() + seconds
        while self.tasks:
            left = until - time.monotonic()
            ended = self._ended(max(0.0, min(TICK, left)))
            found = [(task, _value(task)) for task in ended] or self._overdue()
            for task, _ in found:
                self.cancel(task)
            if found or left <= 0:
                return found
        return []

    def cancel(self, task: Task) -> None:
        """Forget a task; one that has not begun never will."""
        from distributed import Event

        self.tasks.pop(task.name, None)
        with suppress(OSError):  # a scheduler that is gone has forgotten it, too
            task.future.cancel()
            Event(task.name, client=self.client).clear()

    def restart(self, address: str) -> None:
        """Have the process of a worker restarted, and wait for nothing; one without a nanny stays as it is."""

        def restarted() -> None:
            with suppress(Exception):  # gone already, without a nanny, or the client has closed
                self.client.restart_workers([address], timeout=VACANT, raise_for_error=False)

        threading.Thread(target=restarted, name=f"restart {address}", daemon=True).start()

    def close(self) -> None:
        """Cancel what is on its way."""
        for task in list(self.tasks.values()):
            self.cancel(task)

    def _begun(self, event: tuple[float, dict]) -> None:
        """Note what the scheduler says of a task: that a worker has begun it."""
        if task := self.tasks.get(event[1]["name"]):
            task.worker, task.since = event[1]["worker"], time.monotonic()

    def _ended(self, seconds: float) -> list[Task]:
        """Wait for tasks that have ended, for at most so many seconds, and return them."""
        found = {}
        with suppress(Empty):
            found[self._done.get(timeout=seconds)] = None
            while True:
                found[self._done.get_nowait()] = None
        return [task for task in found if task.name in self.tasks]

    def _overdue(self) -> list[tuple[Task, Failure]]:
        """Return the tasks that will not end by themselves."""
        workers = self._workers()
        found = [(task, self._trouble(task, workers)) for task in self.tasks.values()]
        found = [(task, failure) for task, failure in found if failure]
        for task, failure in found:
            if failure.kind == "late":
                self.restart(task.worker)
        return found

    def _trouble(self, task: Task, workers: dict[str, dict]) -> Failure | None:
        waited = time.monotonic() - task.since
        if task.worker is None:
            able = any(all(x["resources"].get(k, 0) >= n for k, n in task.resources.items()) for x in workers.values())
            if able:
                task.since = time.monotonic()
            return None if able or waited < VACANT else Failure("lost", f"no worker{_offering(task.resources)} is left")
        if task.worker not in workers:
            return Failure("died", f"the worker {task.worker} went away with it")
        return Failure("late", f"it took more than {task.seconds:g} s") if waited > task.seconds else None

    def _workers(self) -> dict[str, dict]:
        """Ask the scheduler for its workers; Unreachable where it does not answer."""
        try:
            return self.client.scheduler_info(n_workers=-1)["workers"]
        except (OSError, ValueError) as error:
            raise Unreachable(f"the scheduler does not answer any more: {error}") from error


@contextmanager
def cluster(
    address: str | None = None, processes: int = 2, resources: Mapping[str, float] | None = None
) -> Iterator[Pool]:
    """Give the pool of a scheduler's workers; without an address so many processes here, each with the resources.

    Behind it nothing is on its way. Raises Unreachable where distributed is missing or the scheduler does not answer.
    """
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise Unreachable(f"{error}; kda-forge[fleet] brings it") from error
    with ExitStack() as stack:
        if address is None:
            local = {"processes": True, "threads_per_worker": 1, "dashboard_address": None, "memory_limit": 0}
            own = LocalCluster(processes, resources=dict(resources or {}), silence_logs="CRITICAL", **local)
            address = stack.enter_context(own).scheduler_address
        try:
            _knock(address)
            client = stack.enter_context(Client(address, timeout=ANSWER, set_as_default=False))
        except (OSError, ValueError, TypeError) as error:
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise Unreachable(f"expected the address of a dask scheduler, as tcp://HOST:8786: {said}") from error
        pool = Pool(client)
        stack.callback(pool.close)
        if strangers := pool.strangers():
            raise Unreachable(f"this project is not installed for its workers {', '.join(strangers)}")
        yield pool


def _knock(address: str) -> None:
    """Raise OSError where nobody listens, ValueError for no address: a Client that fails takes others' loops along."""
    from distributed.comm import get_address_host_port

    socket.create_connection(get_address_host_port(address, strict=True), timeout=ANSWER).close()


def _once(topic: str, name: str, function: Callable, arguments: tuple) -> tuple[bool, object]:
    """Call a function on a worker, unless another worker has begun it; returns whether it was called, and its value.

    What the function raises is a value: where this raises itself the function was not called, and dask tries again.
    """
    from distributed import Event, get_client, get_worker

    mark = Event(name)
    if mark.is_set():
        return False, None
    get_client().log_event(topic, {"name": name, "worker": get_worker().address})
    mark.set()
    try:
        return True, function(*arguments)
    except Exception as error:
        return True, Failure("raised", _said(error))


def _value(task: Task) -> object:
    """Return what a future that is done holds, or the Failure that it is."""
    from distributed import CancelledError
    from distributed.scheduler import KilledWorker

    try:
        called, value = task.future.result()
    except KilledWorker as error:
        return Failure("died", f"its worker died: {error}")
    except CancelledError:
        return Failure("lost", "the scheduler went away, or somebody cancelled it")
    except Exception as error:  # whatever dask raises is no reason to lose the others
        return Failure("lost", _said(error))
    return value if called else Failure("died", f"the worker {task.worker or 'that ran it'} died of it")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _offering(resources: Mapping[str, float]) -> str:
    return f" with {', '.join(f'{name}={x:g}' for name, x in resources.items())}" if resources else ""
