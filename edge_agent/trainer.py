"""Trains one job after another in a process of its own, which edge_agent.confined shut in.

`train` is the pure part: graphs, weights, examples and a seed in, delta and metrics out, the same on every run on the
same machine. Around it: jobs come on stdin and answers go to stdout, in frames; all else that anything prints goes to
stderr. A job that cannot be done is answered with Failed and the next one is taken; an error of ours ends the process.
A job that is cancelled ends before its next batch or phase, as one that cannot be done; one that is suspended leaves a
checkpoint there, from which the same job goes on later as if nothing had been. A thread only reads stdin; all else
happens on the main thread.

This process never holds a key of the device, opens no socket, and checks graphs, weights and data itself.
"""

import contextlib
import hashlib
import itertools
import os
import queue
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, assert_never, cast

import msgspec
import numpy as np
import torch

from edge_agent import checkpoint, data, jobs
from edge_agent.checkpoint import Checkpoint, Place, State
from edge_agent.data import Examples
from edge_agent.interpreter import Interpreter
from edge_agent.jobs import Cancel, Done, Failed, Job, Judge, Judged, Progress, Said, Suspend, Suspended
from shared import codec, graph, sealing, tensors, wire
from shared.codec import Delta
from shared.errors import Reason, RemoteProtocolError, TrainingError
from shared.files import write_durably
from shared.layout import FLOATING, size, size_bytes
from shared.messages import Adam, DataContract, Metric, PlainBody, Sgd, TensorSpec, Training

Told = Callable[[int, int, float], None]
"""Called with (epoch, step, mean loss of the epoch so far), both counted from 1; at an epoch's end and now and then."""
Check = Callable[[], None]
"""Called before every batch and every phase; what it raises, such as Leave, ends the job there."""

TELL_EVERY = 1.0
"""Seconds between two reports inside an epoch, at least."""

_HEADER_MAX = 16 << 20
"""Bytes that a weights file may have beside the weights."""


class Leave(Exception):
    """The job is to be left here and gone on with later: raised by a Check."""


class Keeper(Protocol):
    """Keeps checkpoints of one job."""

    def due(self) -> bool:
        """Whether the time since the last one asks for another."""

    def keep(self, place: Place, weights: State, optimizer: torch.optim.Optimizer, order: torch.Tensor) -> None:
        """Write one; torch's own generator is read here too."""


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
        keeper: Keeper | None = None,
        left: Checkpoint | None = None,
    ) -> Trained:
        """One round: judge `weights` on the `held` examples, then train a copy of them on those to `fit`.

        Batches come from a seeded permutation of each epoch; a last batch of one example is left out when it is not
        the only one, as normalisation cannot train on it. Random operators draw from torch's generator, seeded alike.
        From `left`, a checkpoint of the same work, it goes on where that was written. What `check` raises goes through;
        if that is Leave between two batches, `keeper` has a checkpoint.
        TrainingError: `data` when there is nothing to train on, `unsupported`, `graph`, `not_finite`, `out_of_memory`.
        """
        if not len(fit):
            raise TrainingError("data", f"nothing to train on: {len(held)} examples, all in the hold-out")
        if (training.epochs > 0) == (training.steps > 0):
            raise TrainingError("unsupported", f"{training.epochs} epochs and {training.steps} steps: set exactly one")
        if left is None:
            metrics = self.evaluate(weights, held, metric, training.batch_size, check)
            state = {name: tensor.clone() for name, tensor in weights.items()}
        else:
            metrics, state = left.place.metrics, left.weights
        parameters = [state[spec.name] for spec in self.layout if spec.kind == "parameter" and spec.dtype in FLOATING]
        for parameter in parameters:
            parameter.requires_grad_(True)
        step, loss = self._fit(state, parameters, fit, training, seed, metrics, told, check, keeper, left)
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
        metrics: dict[str, float],
        told: Told | None,
        check: Check,
        keeper: Keeper | None,
        left: Checkpoint | None,
    ) -> tuple[int, float]:
        arrays = [torch.from_numpy(a) for a in examples.arrays]
        sampler = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        optimizer = _optimizer(training.optimizer, parameters)
        step, epoch, done, total, mean, last = 0, 0, 0, 0.0, 0.0, time.monotonic()
        if left is not None:
            checkpoint.restore_optimizer(optimizer, left.optimizer)
            sampler.set_state(left.order)
            torch.set_rng_state(left.generator)
            # The epoch in hand is begun again, and the batches of it that are done are passed over.
            step, epoch, done, total = left.place.step, left.place.epoch - 1, left.place.batch, left.place.loss_sum
        order = sampler.get_state()

        def keep() -> None:
            if keeper is not None:
                place = Place(v=1, key=bytes(32), epoch=epoch, batch=count, step=step, loss_sum=total, metrics=metrics)
                keeper.keep(place, state, optimizer, order)

        while epoch < training.epochs or step < training.steps:
            epoch += 1
            order, count, skip = sampler.get_state(), done, done
            total, done = total if skip else 0.0, 0
            for rows in itertools.islice(_batches(len(examples), training.batch_size, sampler), skip, None):
                try:
                    check()
                except Leave:
                    keep()
                    raise
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
                if keeper is not None and keeper.due():
                    keep()
            mean = total / count if count else mean
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

    def __init__(self, say: Callable[[jobs.Word], None]) -> None:
        self._say = say
        self._model: tuple[object, Model] | None = None
        self._examples: tuple[object, tuple[Examples, Examples]] | None = None

    def do(self, job: Job | Judge, check: Check = unchecked) -> None:
        """Say Progress as it goes, and at the end Done, Failed or Suspended, also of what `check` raises."""
        try:
            done = self._done(job, check) if isinstance(job, Job) else self._judged(job, check)
        except Leave:
            kept = isinstance(job, Job) and job.checkpoint is not None and Path(job.checkpoint).exists()
            self._say(Suspended(job.id, kept))
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
        weights = _weights(job.weights, job.layout)
        check()
        fit, held = self._load_examples(job)
        check()
        training = job.training
        keeper = left = None
        if job.checkpoint is not None:
            keeper = _Checkpoints(job, self._examples_key(job), wall, cpu)
            left = keeper.read(weights)
        if left is None:
            self._say(Progress(job.id, "evaluating"))

        def told(epoch: int, step: int, loss: float) -> None:
            place = (epoch, training.epochs, step, training.steps)
            self._say(Progress(job.id, "training", *place, loss if np.isfinite(loss) else None))

        trained = model.train(weights, fit, held, training, job.metric, job.seed, told, check, keeper, left)
        # All that is left is soon done, so it is not left here.
        check = _cancelled(check)
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
            time.monotonic() - wall + (left.place.seconds if left is not None else 0.0),
            time.process_time() - cpu + (left.place.cpu_seconds if left is not None else 0.0),
            _peak_rss(),
        )

    def _judged(self, job: Judge, check: Check) -> Judged:
        torch.set_num_threads(job.threads)
        model = self._load_model(job)
        _, held = self._load_examples(job)
        found = [
            model.evaluate(_weights(path, job.layout), held, job.metric, job.batch_size, check) if path else {}
            for path in (job.weights, job.before)
        ]
        return Judged(job.id, len(held), found[0], found[1])

    def _load_model(self, job: Job | Judge) -> Model:
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

    def _examples_key(self, job: Job | Judge) -> object:
        holdout = job.training.holdout if isinstance(job, Job) else job.holdout
        return (_stamp(data.files(job.source), "data"), job.source, job.data, holdout)

    def _load_examples(self, job: Job | Judge) -> tuple[Examples, Examples]:
        key = self._examples_key(job)
        if self._examples is None or self._examples[0] != key:
            self._examples = None
            holdout = job.training.holdout if isinstance(job, Job) else job.holdout
            self._examples = key, data.load(job.source, job.data).split(holdout)
        return self._examples[1]


class _Checkpoints:
    """The Keeper of one job: a file at the place that the job names."""

    def __init__(self, job: Job, examples: object, wall: float, cpu: float) -> None:
        assert job.checkpoint is not None
        self._path, self._every = Path(job.checkpoint), job.checkpoint_every
        self._began, self._spent, self._last = (wall, cpu), (0.0, 0.0), time.monotonic()
        # The data's time of change is in it: training does not go on with other examples.
        work = (job.id, job.seed, job.opset, job.layout, job.training, job.data, job.metric, repr(examples))
        self._key = hashlib.sha256(wire.pack(work)).digest()

    def read(self, weights: State) -> Checkpoint | None:
        """What an earlier process left; a file that is of no use is removed, and that said."""
        found = checkpoint.read(self._path, self._key, weights)
        if found is not None:
            self._spent = (found.place.seconds, found.place.cpu_seconds)
        elif self._path.exists():
            print("the checkpoint is damaged or of other data: training begins anew", file=sys.stderr)  # noqa: T201
            self._path.unlink(missing_ok=True)
        return found

    def due(self) -> bool:
        """See Keeper."""
        return self._every > 0 and time.monotonic() - self._last >= self._every

    def keep(self, place: Place, weights: State, optimizer: torch.optim.Optimizer, order: torch.Tensor) -> None:
        """See Keeper. A disk that refuses costs the checkpoint and not the job."""
        seconds = self._spent[0] + time.monotonic() - self._began[0]
        cpu_seconds = self._spent[1] + time.process_time() - self._began[1]
        place = msgspec.structs.replace(place, key=self._key, seconds=seconds, cpu_seconds=cpu_seconds)
        state = checkpoint.optimizer_state(optimizer)
        try:
            checkpoint.write(self._path, Checkpoint(place, weights, state, torch.get_rng_state(), order))
        except TrainingError as error:
            print(f"no checkpoint: {error.detail}", file=sys.stderr)  # noqa: T201
        self._last = time.monotonic()


def _cancelled(check: Check) -> Check:
    """`check` without its Leave."""

    def checked() -> None:
        with contextlib.suppress(Leave):
            check()

    return checked


def _weights(path: str, layout: Sequence[TensorSpec]) -> State:
    try:
        limit = sum(map(size_bytes, layout)) + _HEADER_MAX
        return load_state(_read(Path(path), limit, "weights"), layout)
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


def _failed(job: Job | Judge, reason: str, detail: str) -> Failed:
    return Failed(job.id, cast(jobs.FailureReason, reason), " ".join(detail.split())[:512])


# -- the process -------------------------------------------------------------------------------------------------


Arrived = Job | Judge | Cancel | Suspend | Exception | None
"""What came on stdin; last of all the error that ended it, or None for its proper end."""


@dataclass(slots=True)
class _Unfinished:
    job: Job | Judge
    cancelled: bool = False
    suspended: bool = False


class Inbox:
    """Jobs in the order they came. Cancel and Suspend mark the unfinished job they name, and others are forgotten."""

    def __init__(self, arrived: queue.SimpleQueue[Arrived]) -> None:
        self._arrived = arrived
        self._waiting: deque[_Unfinished | Exception | None] = deque()
        self._current: _Unfinished | None = None

    def next(self) -> Job | Judge | None:
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
        """TrainingError("cancelled") if the job that next() gave is no longer wanted, Leave if it is not wanted now."""
        while not self._arrived.empty():
            self._take(self._arrived.get())
        if self._current is not None and self._current.cancelled:
            raise TrainingError("cancelled", "no longer wanted")
        if self._current is not None and self._current.suspended:
            raise Leave

    def _take(self, arrived: Arrived) -> None:
        match arrived:
            case Job() | Judge():
                self._waiting.append(_Unfinished(arrived))
            case Cancel(id=id) | Suspend(id=id):
                for each in (self._current, *self._waiting):
                    if isinstance(each, _Unfinished) and each.job.id == id:
                        each.cancelled = each.cancelled or isinstance(arrived, Cancel)
                        each.suspended = each.suspended or isinstance(arrived, Suspend)
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


def serve() -> None:
    """Do jobs until stdin ends, and exit with 0; an error of ours goes through. edge_agent.confined has shut us in."""
    orders, answers = _take_pipes()

    def say(message: jobs.Word) -> None:
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


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """(orders, answers): private copies of stdin and stdout, which then lead nowhere and to stderr."""
    orders, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    os.dup2(2, 1)
    return orders, answers
