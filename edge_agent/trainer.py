"""Trains one job after another in a process of its own: `python -m edge_agent.trainer`, started by edge_agent.child.

`train` is the pure part: graphs, weights, examples and a seed in, delta and metrics out, the same on every run on the
same machine. Around it: jobs come on stdin and answers go to stdout, in frames; all else that anything prints goes to
stderr. A job that cannot be done is answered with Failed and the next one is taken; an error of ours ends the process.
A job that is cancelled ends before its next batch or phase, as one that cannot be done. A thread only reads stdin; all
else happens on the main thread.

This process never holds a key of the device, opens no socket, and checks graphs, weights and data itself.
"""

import argparse
import contextlib
import ctypes
import hashlib
import os
import queue
import re
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, assert_never, cast

import numpy as np
import torch

from edge_agent import data, jobs
from edge_agent.data import Examples
from edge_agent.interpreter import Interpreter
from edge_agent.jobs import Cancel, Done, Failed, Job, Progress, Said
from shared import codec, graph, sealing, tensors
from shared.codec import Delta
from shared.errors import Reason, RemoteProtocolError, TrainingError
from shared.files import write_durably
from shared.layout import FLOATING, size, size_bytes
from shared.messages import Adam, DataContract, Metric, PlainBody, Sgd, TensorSpec, Training

State = dict[str, torch.Tensor]
Told = Callable[[int, int, float], None]
"""Called with (epoch, step, mean loss of the epoch so far), both counted from 1; at an epoch's end and now and then."""
Check = Callable[[], None]
"""Called before every batch and every phase; what it raises ends the job there."""

TELL_EVERY = 1.0
"""Seconds between two reports inside an epoch, at least."""

_HEADER_MAX = 16 << 20
"""Bytes that a weights file may have beside the weights."""

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38


def unchecked() -> None:
    """The Check of work that nobody cancels."""


# -- the pure part -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trained:
    """What one round of training gives."""

    delta: Delta
    """float32[d]: new weights minus old, over the layout's floating tensors in flat order; finite, not clipped."""
    weights: State
    """The new weights themselves."""
    examples: int
    steps: int
    holdout: int
    metrics: dict[str, float]
    """Of the weights it started from, on the hold-out."""
    loss: float
    """Mean training loss of the last epoch."""


class Model:
    """A pair of graphs, checked and ready to train and to judge weights."""

    def __init__(
        self, train_graph: bytes, eval_graph: bytes, layout: Sequence[TensorSpec], contract: DataContract
    ) -> None:
        """From the graphs' bytes; RemoteProtocolError if they are not sound or do not fit layout and contract."""
        self.layout = list(layout)
        self._train = self._checked(train_graph, "train", contract)
        self._eval = self._checked(eval_graph, "eval", contract)

    def _checked(self, encoded: bytes, kind: graph.Kind, contract: DataContract) -> Interpreter:
        parsed = graph.parse(encoded)
        graph.check(parsed, kind, self.layout, contract.inputs, contract.target)
        return Interpreter(parsed)

    def evaluate(
        self, state: State, examples: Examples, metric: Metric, batch_size: int, check: Check = unchecked
    ) -> dict[str, float]:
        """`loss` and `metric` of the weights on these examples, in eval mode; none without examples or if not finite.

        accuracy: share of examples whose largest output is the label's. binary_accuracy: share of targets above one
        half where the output, a logit, is above 0. rmse: root of the mean squared difference of output and target.
        """
        if not len(examples):
            return {}
        sums = {"loss": 0.0, metric: 0.0}
        count = 0
        with torch.no_grad():
            for start in range(0, len(examples), batch_size):
                check()
                batch = [torch.from_numpy(a[start : start + batch_size]) for a in examples.arrays]
                *outputs, loss = _run(self._eval, state, batch)
                sums["loss"] += float(loss) * len(batch[0])
                if metric != "loss":
                    sums[metric] += _score(metric, outputs[0], batch[-1]) * len(batch[0])
                count += len(batch[0])
        found = {name: value / count for name, value in sums.items()}
        if metric == "rmse":
            found["rmse"] = found["rmse"] ** 0.5
        return {name: value for name, value in found.items() if np.isfinite(value)}

    def train(
        self,
        weights: State,
        fit: Examples,
        held: Examples,
        training: Training,
        metric: Metric,
        seed: int,
        told: Told | None = None,
        check: Check = unchecked,
    ) -> Trained:
        """One round: judge `weights` on the `held` examples, then train a copy of them on those to `fit`.

        Batches come from a seeded permutation of each epoch; a last batch of one example is left out when it is not
        the only one, as normalisation cannot train on it. Random operators draw from torch's generator, seeded alike.
        TrainingError: `data` when there is nothing to train on, `unsupported`, `graph`, `not_finite`, `out_of_memory`.
        """
        if not len(fit):
            raise TrainingError("data", f"nothing to train on: {len(held)} examples, all in the hold-out")
        if (training.epochs > 0) == (training.steps > 0):
            raise TrainingError("unsupported", f"{training.epochs} epochs and {training.steps} steps: set exactly one")
        metrics = self.evaluate(weights, held, metric, training.batch_size, check)
        state = {name: tensor.clone() for name, tensor in weights.items()}
        parameters = [state[spec.name] for spec in self.layout if spec.kind == "parameter" and spec.dtype in FLOATING]
        for parameter in parameters:
            parameter.requires_grad_(True)
        step, loss = self._fit(state, parameters, fit, training, seed, told, check)
        delta = self._delta(state, weights)
        if delta is None:
            raise TrainingError("not_finite", f"the weights are not finite after {step} steps; a lower rate may help")
        trained = {name: tensor.detach() for name, tensor in state.items()}
        return Trained(delta, trained, len(fit), step, len(held), metrics, loss)

    def _delta(self, new: State, old: State) -> Delta | None:
        try:
            after, before = (
                tensors.flatten(self.layout, {name: tensor.detach().numpy() for name, tensor in state.items()})
                for state in (new, old)
            )
        except RemoteProtocolError as error:
            if error.reason is Reason.NOT_FINITE:
                return None
            raise
        with np.errstate(over="ignore"):
            after -= before
        return after if np.isfinite(after).all() else None

    def _fit(
        self,
        state: State,
        parameters: list[torch.Tensor],
        examples: Examples,
        training: Training,
        seed: int,
        told: Told | None,
        check: Check,
    ) -> tuple[int, float]:
        arrays = [torch.from_numpy(a) for a in examples.arrays]
        order = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        optimizer = _optimizer(training.optimizer, parameters)
        step, epoch, last, mean = 0, 0, time.monotonic(), 0.0
        while epoch < training.epochs or step < training.steps:
            epoch += 1
            total, count = 0.0, 0
            for rows in _batches(len(examples), training.batch_size, order):
                check()
                optimizer.zero_grad()
                (loss,) = _run(self._train, state, [array[rows] for array in arrays])
                _backward(loss)
                if training.gradient_clip:
                    torch.nn.utils.clip_grad_norm_(parameters, training.gradient_clip)
                optimizer.step()
                step += 1
                total, count = total + float(loss.detach()), count + 1
                mean = total / count
                if told is not None and time.monotonic() - last >= TELL_EVERY:
                    last = time.monotonic()
                    told(epoch, step, mean)
                if step == training.steps:
                    break
            if told is not None:
                told(epoch, step, mean)
        return step, mean


def load_state(weights: bytes, layout: Sequence[TensorSpec]) -> State:
    """A release's weights as tensors; RemoteProtocolError if they do not fit the layout."""
    return {name: torch.from_numpy(values) for name, values in tensors.load(weights, layout).items()}


def clipped(delta: Delta, clip: float) -> tuple[Delta, float]:
    """(delta with an L2 norm of at most `clip`, its norm before)."""
    norm = float(np.linalg.norm(delta.astype(np.float64)))
    if norm <= clip:
        return delta, norm
    # A little below the bound, because rounding to float32 may lift the norm again.
    return (delta * (clip / norm * (1 - 1e-6))).astype(np.float32), norm


def _batches(count: int, size: int, order: torch.Generator) -> Iterator[torch.Tensor]:
    permuted = torch.randperm(count, generator=order)
    for start in range(0, count, size):
        batch = permuted[start : start + size]
        if start == 0 or len(batch) > 1:
            yield batch


def _run(interpreter: Interpreter, state: State, batch: list[torch.Tensor]) -> list[torch.Tensor]:
    try:
        return interpreter.run(state, batch)
    except RemoteProtocolError as error:
        reason = "out_of_memory" if error.reason is Reason.GRAPH_TOO_LARGE else "graph"
        raise TrainingError(reason, error.detail) from None


def _backward(loss: torch.Tensor) -> None:
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        reason = "out_of_memory" if "allocate" in str(error) else "graph"
        raise TrainingError(reason, f"backward: {str(error).strip():.300}") from None


def _score(metric: Metric, output: torch.Tensor, target: torch.Tensor) -> float:
    """The mean of one batch; for rmse of the squares."""
    if metric == "accuracy":
        if output.dim() != target.dim() + 1:
            raise TrainingError("graph", f"accuracy of outputs {list(output.shape)} for labels {list(target.shape)}")
        return float((output.argmax(1) == target).double().mean())
    if output.numel() != target.numel():
        raise TrainingError("graph", f"{metric} of outputs {list(output.shape)} for targets {list(target.shape)}")
    output = output.reshape(target.shape).double()
    if metric == "binary_accuracy":
        return float(((output > 0) == (target > 0.5)).double().mean())
    return float((output - target.double()).square().mean())


def _optimizer(settings: Sgd | Adam, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    match settings:
        case Sgd():
            return torch.optim.SGD(
                parameters, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
            )
        case Adam():
            betas = settings.beta1, settings.beta2
            return torch.optim.Adam(parameters, settings.lr, betas, settings.eps, weight_decay=settings.weight_decay)
    assert_never(settings)


# -- jobs --------------------------------------------------------------------------------------------------------

Stamp = tuple[tuple[str, int, int], ...]


class Worker:
    """Does jobs; keeps the last model and data set, as the next job is most often of the same task."""

    def __init__(self, say: Callable[[Progress | Done | Failed], None]) -> None:
        self._say = say
        self._model: tuple[object, Model] | None = None
        self._examples: tuple[object, tuple[Examples, Examples]] | None = None

    def do(self, job: Job, check: Check = unchecked) -> None:
        """Say Progress as it goes, and at the end Done or Failed, also of what `check` raises."""
        try:
            done = self._done(job, check)
        except TrainingError as error:
            self._say(_failed(job, error.reason, error.detail))
        except MemoryError as error:
            self._say(_failed(job, "out_of_memory", str(error)))
        else:
            self._say(done)

    def _done(self, job: Job, check: Check) -> Done:
        check()
        wall, cpu = time.monotonic(), time.process_time()
        torch.set_num_threads(job.threads)
        self._say(Progress(job.id, "loading"))
        model = self._load_model(job)
        check()
        weights = _weights(job)
        check()
        fit, held = self._load_examples(job)
        check()
        self._say(Progress(job.id, "evaluating"))
        training = job.training

        def told(epoch: int, step: int, loss: float) -> None:
            place = (epoch, training.epochs, step, training.steps)
            self._say(Progress(job.id, "training", *place, loss if np.isfinite(loss) else None))

        trained = model.train(weights, fit, held, training, job.metric, job.seed, told, check)
        check()
        self._say(Progress(job.id, "sealing"))
        delta, norm = clipped(trained.delta, job.clip)
        encoded = codec.encode(job.codec, delta, [size(spec) for spec in job.layout if spec.dtype in FLOATING])
        header = PlainBody(trained.examples, trained.steps, trained.metrics, trained.holdout)
        try:
            encapsulation, sealed = sealing.seal(header, encoded, job.hpke_key, job.context)
        except RemoteProtocolError as error:
            raise TrainingError("unsupported", error.detail) from None
        check()
        _write(Path(job.output), sealed)
        return Done(
            job.id,
            encapsulation,
            len(sealed),
            hashlib.sha256(sealed).digest(),
            trained.examples,
            trained.steps,
            trained.holdout,
            trained.metrics,
            trained.loss,
            norm,
            time.monotonic() - wall,
            time.process_time() - cpu,
            _peak_rss(),
        )

    def _load_model(self, job: Job) -> Model:
        paths = [Path(job.train_graph), Path(job.eval_graph)]
        key = (_stamp(paths, "graph"), job.opset, job.layout, job.data)
        if self._model is None or self._model[0] != key:
            self._model = None
            train, judge = (_read(path, graph.LIMITS.bytes, "graph") for path in paths)
            try:
                self._model = key, Model(train, judge, job.layout, job.data)
            except RemoteProtocolError as error:
                raise TrainingError("graph", str(error)) from None
        return self._model[1]

    def _load_examples(self, job: Job) -> tuple[Examples, Examples]:
        key = (_stamp(data.files(job.source), "data"), job.source, job.data, job.training.holdout)
        if self._examples is None or self._examples[0] != key:
            self._examples = None
            self._examples = key, data.load(job.source, job.data).split(job.training.holdout)
        return self._examples[1]


def _weights(job: Job) -> State:
    try:
        limit = sum(map(size_bytes, job.layout)) + _HEADER_MAX
        return load_state(_read(Path(job.weights), limit, "weights"), job.layout)
    except RemoteProtocolError as error:
        raise TrainingError("weights", str(error)) from None


def _stamp(paths: Sequence[Path], reason: str) -> Stamp:
    try:
        return tuple((str(path), found.st_size, found.st_mtime_ns) for path in paths for found in (path.stat(),))
    except OSError as error:
        raise TrainingError(reason, f"{error.filename}: {error.strerror}") from None


def _read(path: Path, limit: int, reason: str) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise TrainingError(reason, f"{path}: {error.strerror}") from None
    if len(content) > limit:
        raise TrainingError(reason, f"{path}: over {limit} bytes")
    return content


def _write(path: Path, content: bytearray) -> None:
    """All of it or nothing, and on the disk when this returns."""
    try:
        write_durably(path, content)
    except OSError as error:
        raise TrainingError("storage", f"{path}: {error.strerror}") from None


def _peak_rss() -> int:
    # Not getrusage's: that one starts from what the agent's fork had.
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(peak[1]) * 1024 if peak else 0


def _failed(job: Job, reason: str, detail: str) -> Failed:
    return Failed(job.id, cast(jobs.FailureReason, reason), " ".join(detail.split())[:512])


# -- the process -------------------------------------------------------------------------------------------------


Arrived = Job | Cancel | Exception | None
"""What came on stdin; last of all the error that ended it, or None for its proper end."""


@dataclass(slots=True)
class _Unfinished:
    job: Job
    cancelled: bool = False


class Inbox:
    """Jobs in the order they came. A cancel marks the unfinished job it names; one for any other job is forgotten."""

    def __init__(self, arrived: queue.SimpleQueue[Arrived]) -> None:
        self._arrived = arrived
        self._waiting: deque[_Unfinished | Exception | None] = deque()
        self._current: _Unfinished | None = None

    def next(self) -> Job | None:
        """Wait for the next job, which finishes the one before; None at the end, or raise the error that ended it."""
        while not self._waiting:
            self._take(self._arrived.get())
        match self._waiting.popleft():
            case _Unfinished() as found:
                self._current = found
                return found.job
            case None:
                return None
            case error:
                raise error

    def check(self) -> None:
        """TrainingError("cancelled") if the job that next() gave is no longer wanted."""
        while not self._arrived.empty():
            self._take(self._arrived.get())
        if self._current is not None and self._current.cancelled:
            raise TrainingError("cancelled", "no longer wanted")

    def _take(self, arrived: Arrived) -> None:
        match arrived:
            case Job():
                self._waiting.append(_Unfinished(arrived))
            case Cancel(id=id):
                for each in (self._current, *self._waiting):
                    if isinstance(each, _Unfinished) and each.job.id == id:
                        each.cancelled = True
            case last:
                self._waiting.append(last)


def _read_orders(stream: IO[bytes], arrived: queue.SimpleQueue[Arrived]) -> None:
    try:
        while (order := jobs.read_order(stream)) is not None:
            arrived.put(order)
    except (RemoteProtocolError, MemoryError, OSError) as error:
        arrived.put(error)  # the main thread raises it
    else:
        arrived.put(None)


def main() -> None:
    """Serve jobs until stdin ends; the exit status is 0 then, 1 with a traceback on stderr after an error of ours."""
    options = argparse.ArgumentParser(prog="trainer", description="Started by edge-agent, not by hand.")
    options.add_argument("--parent", type=int, required=True, help="process id; without it the trainer ends")
    options.add_argument("--memory-max", type=int, default=0, help="bytes of private memory, 0 for any")
    options.add_argument("--nice", type=int, default=0, help="added to the scheduling priority")
    given = options.parse_args()
    if not _confine(given.parent, given.memory_max, given.nice):
        return
    orders, answers = _take_pipes()

    def say(message: Progress | Done | Failed) -> None:
        answers.write(jobs.frame(Said(message)))
        answers.flush()

    torch.set_num_interop_threads(1)
    arrived: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
    threading.Thread(target=_read_orders, args=(orders, arrived), name="orders", daemon=True).start()
    worker, inbox = Worker(say), Inbox(arrived)
    while (job := inbox.next()) is not None:
        worker.do(job, inbox.check)
    # Tearing torch down takes half a second and gains nothing.
    sys.stderr.flush()
    os._exit(0)


def _confine(parent: int, memory_max: int, nice: int) -> bool:
    """Die with the parent, and stay within limits; False if the parent is gone already."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:
        return False
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold data
    if memory_max:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_max, memory_max))
    os.nice(nice)
    with contextlib.suppress(OSError):
        # Short of memory, the kernel should end this process and not the agent.
        Path("/proc/self/oom_score_adj").write_text("500")
    return True


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """(orders, answers): private copies of stdin and stdout, which then lead nowhere and to stderr."""
    orders, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    os.dup2(2, 1)
    return orders, answers


if __name__ == "__main__":
    main()
