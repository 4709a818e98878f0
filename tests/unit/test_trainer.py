"""edge_agent.trainer: training is PyTorch's own bit for bit, and every failure of a job has a typed reason."""

import os
import queue
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from aggregator import export
from edge_agent import checkpoint, trainer
from edge_agent.checkpoint import State
from edge_agent.data import Examples
from edge_agent.jobs import Cancel, Done, Failed, Job, Judged, Progress, Source, Suspended, Word
from edge_agent.trainer import Arrived, Inbox, Model, Worker
from shared import codec, sealing, tensors
from shared.errors import Reason, RemoteProtocolError, TrainingError
from shared.layout import size
from shared.messages import Adam, DataContract, Sgd, TensorContract, Training

SEED = 7
CONTRACT = DataContract("blobs", [TensorContract("x", "float32", [6])], TensorContract("y", "int64", [], classes=3))
SGD = Training(Sgd(0.1), batch_size=16, epochs=3)


def network() -> nn.Module:
    """A small net with all that is hard: dropout draws random numbers, BatchNorm changes buffers."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def blobs(count: int, seed: int = 3) -> Examples:
    """Three clouds of points."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 3, count)
    x = random.normal(size=(count, 6)) + 2 * np.eye(3, 6)[y]
    return Examples((x.astype(np.float32), y))


@dataclass
class Published:
    """What a release holds of a module."""

    exported: export.Exported
    model: Model
    contract: DataContract

    def state(self) -> State:
        """The release's weights."""
        return trainer.load_state(self.exported.weights, self.exported.layout)


def publish(module: nn.Module, loss: str, contract: DataContract) -> Published:
    """Export a module and load it as a device does."""
    exported = export.export(module, loss, contract.inputs, contract.target)
    return Published(exported, Model(exported.train, exported.eval, exported.layout, contract), contract)


@pytest.fixture(scope="module")
def classifier() -> Published:
    """network() with cross-entropy."""
    torch.set_num_threads(1)
    return publish(network(), "cross_entropy", CONTRACT)


def eager(optimizer: Callable[[nn.Module], torch.optim.Optimizer], training: Training, examples: Examples) -> nn.Module:
    """Plain PyTorch, written as a user would."""
    module = network().train()
    x, y = map(torch.from_numpy, examples.arrays)
    order = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    steps, step = optimizer(module), 0
    for _ in range(training.epochs or 1000):
        for rows in torch.randperm(len(x), generator=order).split(training.batch_size):
            if len(rows) == 1 or (training.steps and step == training.steps):
                break
            steps.zero_grad()
            nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
            if training.gradient_clip:
                nn.utils.clip_grad_norm_(module.parameters(), training.gradient_clip)
            steps.step()
            step += 1
    return module


# -- training


@pytest.mark.parametrize(
    ("training", "optimizer"),
    [
        (SGD, lambda m: torch.optim.SGD(m.parameters(), 0.1)),
        (
            Training(Sgd(0.05, 0.9, 0.01), 16, epochs=2),
            lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, weight_decay=0.01),
        ),
        (
            Training(Adam(0.01, 0.8, 0.95, 1e-6, 0.02), 16, epochs=2),
            lambda m: torch.optim.Adam(m.parameters(), 0.01, (0.8, 0.95), 1e-6, 0.02),
        ),
        (Training(Sgd(0.1), 16, steps=11), lambda m: torch.optim.SGD(m.parameters(), 0.1)),
        (Training(Sgd(0.1), 16, epochs=2, gradient_clip=0.3), lambda m: torch.optim.SGD(m.parameters(), 0.1)),
    ],
    ids=["sgd", "momentum", "adam", "steps", "gradient clip"],
)
def test_equals_eager(
    classifier: Published, training: Training, optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    """Weights and buffers after training equal those of plain PyTorch with the same seed, bit for bit."""
    fit = blobs(97)  # a last batch of one, which is left out
    expected = eager(optimizer, training, fit).state_dict()
    trained = classifier.model.train(classifier.state(), fit, blobs(0), training, "loss", SEED)
    assert trained.weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(trained.weights[name], value), name
    assert trained.steps == (training.steps or 6 * training.epochs) and trained.examples == 97


def test_delta_is_new_minus_old(classifier: Published) -> None:
    """The delta covers the floating tensors in flat order, buffers too; the weights given are left alone."""
    old = classifier.state()
    trained = classifier.model.train(old, blobs(40), blobs(0), SGD, "loss", SEED)
    assert all(torch.equal(old[name], value) for name, value in classifier.state().items())
    layout = classifier.exported.layout
    before, after = ({n: t.numpy() for n, t in s.items()} for s in (old, trained.weights))
    assert np.array_equal(trained.delta, tensors.flatten(layout, after) - tensors.flatten(layout, before))
    assert trained.delta.dtype == np.float32 and np.abs(trained.delta).max() > 0.01


def test_seed_decides(classifier: Published) -> None:
    """The same seed gives the same delta, another one another."""
    deltas = [classifier.model.train(classifier.state(), blobs(40), blobs(0), SGD, "loss", s).delta for s in (1, 1, 2)]
    assert np.array_equal(deltas[0], deltas[1]) and not np.array_equal(deltas[0], deltas[2])


def test_progress_of_every_epoch(classifier: Published) -> None:
    """Every epoch's end is told, with the steps done and the mean loss."""
    said: list[tuple[int, int, float]] = []
    trained = classifier.model.train(
        classifier.state(), blobs(64), blobs(0), SGD, "loss", SEED, lambda *place: said.append(place)
    )
    assert [(epoch, step) for epoch, step, _ in said] == [(1, 4), (2, 8), (3, 12)]
    assert said[-1][2] == trained.loss < said[0][2]


def test_a_single_example(classifier: Published) -> None:
    """A batch of one is kept when it is all there is; normalisation then refuses it with a typed reason."""
    with pytest.raises(TrainingError) as caught:
        classifier.model.train(classifier.state(), blobs(1), blobs(0), SGD, "loss", SEED)
    assert caught.value.reason == "graph"


@pytest.mark.parametrize(("epochs", "steps"), [(0, 0), (1, 1)])
def test_epochs_or_steps(classifier: Published, epochs: int, steps: int) -> None:
    """A plan with neither or both is refused: it says nothing about how long to train."""
    training = msgspec.structs.replace(SGD, epochs=epochs, steps=steps)
    with pytest.raises(TrainingError, match="unsupported"):
        classifier.model.train(classifier.state(), blobs(40), blobs(0), training, "loss", SEED)


def test_diverged(classifier: Published) -> None:
    """Weights that are no numbers any more are never sent."""
    training = msgspec.structs.replace(SGD, optimizer=Sgd(1e12))
    with pytest.raises(TrainingError) as caught:
        classifier.model.train(classifier.state(), blobs(40), blobs(0), training, "loss", SEED)
    assert caught.value.reason == "not_finite"


# -- metrics


def test_metrics_are_of_the_weights_given(classifier: Published) -> None:
    """Metrics judge the release before training, on the hold-out, in eval mode, and weigh a last short batch right."""
    held = blobs(37, seed=9)
    trained = classifier.model.train(classifier.state(), blobs(40), held, SGD, "accuracy", SEED)
    module = network().eval()
    x, y = map(torch.from_numpy, held.arrays)
    outputs = module(x)
    assert trained.holdout == 37
    assert trained.metrics["accuracy"] == pytest.approx(float((outputs.argmax(1) == y).double().mean()))
    assert trained.metrics["loss"] == pytest.approx(nn.functional.cross_entropy(outputs, y).item(), rel=1e-5)


def test_evaluation_changes_nothing(classifier: Published) -> None:
    """Judging leaves weights and buffers as they were."""
    state = classifier.state()
    classifier.model.evaluate(state, blobs(20), "accuracy", 8)
    assert all(torch.equal(state[name], value) for name, value in classifier.state().items())


def test_no_holdout_no_metrics(classifier: Published) -> None:
    """Without held out examples there is nothing to tell."""
    assert classifier.model.evaluate(classifier.state(), blobs(0), "accuracy", 8) == {}


@pytest.fixture(scope="module")
def scalar() -> dict[str, Published]:
    """A linear model with one output, by the loss it is trained with."""
    contract = DataContract("d", [TensorContract("x", "float32", [2])], TensorContract("y", "float32", [1]))
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 0.0]]))
        module.bias.zero_()
    return {loss: publish(module, loss, contract) for loss in ("mse", "bce_with_logits")}


def test_rmse(scalar: dict[str, Published]) -> None:
    """rmse is the root of the mean over all examples, not of the batches' roots."""
    x = np.array([[0, 0], [0, 0], [0, 0], [0, 0], [0, 0]], np.float32)
    y = np.array([[0], [0], [0], [0], [5]], np.float32)
    found = scalar["mse"].model.evaluate(scalar["mse"].state(), Examples((x, y)), "rmse", 2)
    assert found == {"loss": pytest.approx(5.0), "rmse": pytest.approx(5**0.5)}


def test_binary_accuracy(scalar: dict[str, Published]) -> None:
    """A logit above 0 says yes, and so does a target above one half."""
    x = np.array([[3, 0], [-2, 0], [0.1, 0], [-1, 0]], np.float32)
    y = np.array([[1], [0], [0], [1]], np.float32)
    published = scalar["bce_with_logits"]
    found = published.model.evaluate(published.state(), Examples((x, y)), "binary_accuracy", 3)
    assert found["binary_accuracy"] == 0.5


def test_a_metric_that_does_not_fit(scalar: dict[str, Published]) -> None:
    """Accuracy of a model without classes is a typed failure."""
    x, y = np.zeros((3, 2), np.float32), np.zeros((3, 1), np.float32)
    with pytest.raises(TrainingError) as caught:
        scalar["mse"].model.evaluate(scalar["mse"].state(), Examples((x, y)), "accuracy", 2)
    assert caught.value.reason == "graph"


def test_a_delta_beyond_float32(scalar: dict[str, Published]) -> None:
    """Old and new weights may both be finite and their difference not: never sent."""
    published = scalar["mse"]
    state = published.state()
    state["weight"][0, 0] = 2e38  # decays to -2.2e38 in two steps
    training = Training(Sgd(1.5, 0.9, 1.0), batch_size=4, steps=2)
    zeros = Examples((np.zeros((4, 2), np.float32), np.zeros((4, 1), np.float32)))
    with pytest.raises(TrainingError) as caught:
        published.model.train(state, zeros, Examples(tuple(a[:0] for a in zeros.arrays)), training, "rmse", SEED)
    assert caught.value.reason == "not_finite"


# -- clipping


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e10, 1e30])
def test_clipped(scale: float) -> None:
    """A delta above the bound is scaled to just below it, in its own direction; one below is sent as it is."""
    delta = (np.random.default_rng(0).normal(size=10_001) * scale).astype(np.float32)
    norm = float(np.linalg.norm(delta.astype(np.float64)))
    same, told = trainer.clipped(delta, norm * 1.01)
    assert same is delta and told == pytest.approx(norm)
    small, told = trainer.clipped(delta, norm / 10)
    bound = float(np.linalg.norm(small.astype(np.float64)))
    assert told == pytest.approx(norm)
    assert 0.9999 * norm / 10 < bound <= norm / 10
    assert np.allclose(small * 10, delta, rtol=1e-5, atol=0)


# -- jobs


@pytest.fixture
def job(tmp_path: Path, classifier: Published) -> tuple[Job, bytes]:
    """A job with its files, and the round's private key."""
    exported = classifier.exported
    for name, content in (("train", exported.train), ("eval", exported.eval), ("weights", exported.weights)):
        (tmp_path / name).write_bytes(content)
    x, y = blobs(120).arrays
    np.savez(tmp_path / "data.npz", x=x, y=y)
    private, public = sealing.generate()
    return Job(
        id="r1",
        task="blobs",
        opset=1,
        layout=exported.layout,
        train_graph=str(tmp_path / "train"),
        eval_graph=str(tmp_path / "eval"),
        weights=str(tmp_path / "weights"),
        training=SGD,
        data=CONTRACT,
        source=Source("npz", str(tmp_path / "data.npz")),
        metric="accuracy",
        seed=SEED,
        clip=0.5,
        codec="fp32",
        hpke_key=public,
        context=b"of this round",
        output=str(tmp_path / "body"),
    ), private


class Warm:
    """A worker that remembers what it said."""

    def __init__(self) -> None:
        self.said: list[Word] = []
        self.worker = Worker(self.said.append)

    def do(self, job: Job, check: trainer.Check = trainer.unchecked) -> Done | Failed | Suspended:
        """The last word on a job."""
        self.said.clear()
        self.worker.do(job, check)
        *before, last = self.said
        assert all(isinstance(message, Progress) for message in before)
        assert not isinstance(last, Progress | Judged)
        return last


def do(job: Job) -> Done | Failed | Suspended:
    """The last word of a new worker on a job."""
    return Warm().do(job)


def test_a_job(job: tuple[Job, bytes], classifier: Published) -> None:
    """The sealed body opens with the round's key and context, and holds the clipped delta and what was measured."""
    order, private = job
    done = do(order)
    assert isinstance(done, Done)
    sealed = Path(order.output).read_bytes()
    header, encoded = sealing.open_sealed(private, done.encapsulation, sealed, order.context)
    delta = codec.decode("fp32", encoded, [size(spec) for spec in order.layout if spec.dtype == "float32"])
    fit, held = blobs(120).split(SGD.holdout)
    expected = classifier.model.train(classifier.state(), fit, held, SGD, "accuracy", SEED)
    assert np.array_equal(delta, trainer.clipped(expected.delta, 0.5)[0]) and done.norm > 0.5
    assert (header.examples, header.steps, header.holdout) == (len(fit), expected.steps, len(held))
    assert header.metrics == done.metrics == expected.metrics and set(done.metrics) == {"loss", "accuracy"}
    assert done.size == len(sealed) and done.peak_rss > 1 << 20
    assert [path.name for path in Path(order.output).parent.glob("*body*")] == [Path(order.output).name]
    with pytest.raises(RemoteProtocolError):
        sealing.open_sealed(private, done.encapsulation, sealed, b"of another round")


def test_what_is_kept_between_jobs_is_not_stale(job: tuple[Job, bytes]) -> None:
    """A warm trainer sees new data, weights and graphs at once."""
    order, _ = job
    worker = Warm()
    first = worker.do(order)
    again = worker.do(order)
    assert isinstance(first, Done) and isinstance(again, Done) and first.norm == again.norm
    x, y = blobs(60, seed=5).arrays
    np.savez(order.source.path, x=x, y=y)
    changed = worker.do(order)
    assert isinstance(changed, Done) and changed.examples + changed.holdout == 60
    Path(order.train_graph).write_bytes(b"junk")
    broken = worker.do(order)
    assert isinstance(broken, Failed) and broken.reason == "graph"


@pytest.mark.parametrize(
    ("field", "reason"), [("train_graph", "graph"), ("eval_graph", "graph"), ("weights", "weights"), ("source", "data")]
)
@pytest.mark.parametrize("content", [None, b"", b"junk", bytes(100)], ids=["absent", "empty", "text", "zeros"])
def test_broken_files(job: tuple[Job, bytes], field: str, reason: str, content: bytes | None) -> None:
    """A file that is absent or broken gives its own reason, is named if it cannot be read, and nothing is written."""
    order, _ = job
    path = Path(order.source.path if field == "source" else getattr(order, field))
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    failed = do(order)
    assert isinstance(failed, Failed) and failed.reason == reason
    assert content is not None or str(path) in failed.detail
    assert not Path(order.output).exists()


def test_swapped_graphs(job: tuple[Job, bytes]) -> None:
    """An eval graph cannot stand in for a train graph."""
    failed = do(msgspec.structs.replace(job[0], train_graph=job[0].eval_graph))
    assert isinstance(failed, Failed) and failed.reason == "graph"


def test_another_layout(job: tuple[Job, bytes]) -> None:
    """Graphs and weights must fit the manifest's layout."""
    layout = [msgspec.structs.replace(job[0].layout[0], name="other"), *job[0].layout[1:]]
    failed = do(msgspec.structs.replace(job[0], layout=layout))
    assert isinstance(failed, Failed) and failed.reason == "graph"


def test_weights_that_are_no_numbers(job: tuple[Job, bytes], classifier: Published) -> None:
    """A NaN in the release's weights is refused before training."""
    weights = tensors.load(classifier.exported.weights, job[0].layout)
    at = bytes(classifier.exported.weights).find(weights["0.weight"].tobytes())
    content = bytearray(classifier.exported.weights)
    content[at : at + 4] = np.float32(np.nan).tobytes()
    Path(job[0].weights).write_bytes(content)
    failed = do(job[0])
    assert isinstance(failed, Failed) and failed.reason == "weights"


def test_nowhere_to_write(job: tuple[Job, bytes], tmp_path: Path) -> None:
    """An output that cannot be written is a typed failure."""
    failed = do(msgspec.structs.replace(job[0], output=str(tmp_path / "absent" / "body")))
    assert isinstance(failed, Failed) and failed.reason == "storage"


def test_everything_held_out(job: tuple[Job, bytes]) -> None:
    """A hold-out that takes all examples leaves nothing to train on: said as a matter of data."""
    x, y = blobs(120).split(0.2)[1].arrays
    np.savez(job[0].source.path, x=x, y=y)
    failed = do(job[0])
    assert isinstance(failed, Failed) and failed.reason == "data"


# -- cancelling


class CancelAt:
    """Cancels at the check with this number, counted from 1; never at 0."""

    def __init__(self, number: int) -> None:
        self.number, self.count = number, 0

    def __call__(self) -> None:
        """One check."""
        self.count += 1
        if self.count == self.number:
            raise TrainingError("cancelled", "in a test")


def test_cancelled_anywhere(job: tuple[Job, bytes]) -> None:
    """Before every batch and phase a job can end: with its reason, without a body, unnoticed by the next job."""
    order, _ = job
    worker, never = Warm(), CancelAt(0)
    whole = worker.do(order, never)
    assert isinstance(whole, Done) and never.count >= whole.steps + 6
    Path(order.output).unlink()
    for number in range(1, never.count + 1):
        failed = worker.do(order, CancelAt(number))
        assert isinstance(failed, Failed) and (failed.id, failed.reason) == (order.id, "cancelled")
        assert not Path(order.output).exists()
        assert number > 1 or worker.said == [failed]
    again = worker.do(order)
    assert isinstance(again, Done)
    assert (again.norm, again.loss, again.metrics) == (whole.norm, whole.loss, whole.metrics)


def inbox(*arrived: Arrived) -> Inbox:
    """An inbox to which all this has come."""
    stream: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
    for each in arrived:
        stream.put(each)
    return Inbox(stream)


def outcomes(given: Inbox) -> list[tuple[str, bool]]:
    """(job, whether it is cancelled) to the end of the inbox."""
    found = []
    while (job := given.next()) is not None:
        try:
            given.check()
        except TrainingError as error:
            assert error.reason == "cancelled"
            found.append((job.id, True))
        else:
            found.append((job.id, False))
    return found


def test_a_cancel_reaches_the_job_it_names(job: tuple[Job, bytes]) -> None:
    """At work or still waiting; jobs before and after it stay."""
    a, b, c = (msgspec.structs.replace(job[0], id=name) for name in "abc")
    assert outcomes(inbox(a, Cancel("a"), b, None)) == [("a", True), ("b", False)]
    assert outcomes(inbox(a, b, c, Cancel("b"), None)) == [("a", False), ("b", True), ("c", False)]


def test_a_cancel_is_not_kept(job: tuple[Job, bytes]) -> None:
    """For an id that is unknown, finished or yet to come it does nothing, then or later."""
    a, b = (msgspec.structs.replace(job[0], id=name) for name in "ab")
    assert outcomes(inbox(Cancel("a"), a, Cancel("nobody"), b, None)) == [("a", False), ("b", False)]
    arrived: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
    given = Inbox(arrived)
    for each in (a, b):
        arrived.put(each)
        assert given.next() == each
    arrived.put(Cancel("a"))
    given.check()
    for last in (a, None):
        arrived.put(last)
    assert outcomes(given) == [("a", False)]


def test_the_end_comes_after_the_jobs(job: tuple[Job, bytes]) -> None:
    """What came before the end of the stream, or before an error in it, is done first."""
    assert outcomes(inbox(job[0], job[0], None)) == [("r1", False)] * 2
    given = inbox(job[0], RemoteProtocolError(Reason.TOO_LARGE, "a frame"))
    assert given.next() == job[0]
    given.check()
    with pytest.raises(RemoteProtocolError):
        given.next()


# -- left and gone on with


class Interruption:
    """A Check that leaves at its `at`-th call."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise trainer.Leave


def delta_of(order: Job, private: bytes, done: object) -> np.ndarray[Any, Any]:
    """What a finished job's sealed body holds."""
    assert isinstance(done, Done)
    _, encoded = sealing.open_sealed(private, done.encapsulation, Path(order.output).read_bytes(), order.context)
    return codec.decode("fp32", encoded, [size(spec) for spec in order.layout if spec.dtype == "float32"])


def interruptible(job: tuple[Job, bytes], tmp_path: Path, training: Training) -> tuple[Job, bytes]:
    """The job with a place for its checkpoint."""
    order, private = job
    return msgspec.structs.replace(order, training=training, checkpoint=str(tmp_path / "checkpoint")), private


HARD = [
    Training(Sgd(0.1, momentum=0.9), batch_size=16, epochs=3),
    Training(Adam(0.01), batch_size=16, epochs=3, gradient_clip=1.0),
    Training(Adam(0.01), batch_size=50, steps=7),
    Training(Sgd(0.1), batch_size=97, epochs=2),
]


@pytest.mark.parametrize("training", HARD, ids=["momentum", "adam", "steps", "odd"])
def test_interrupted_anywhere_it_is_the_same(job: tuple[Job, bytes], tmp_path: Path, training: Training) -> None:
    """Left before any phase or batch and gone on with by another process, the weights are equal to the last bit."""
    order, private = interruptible(job, tmp_path, training)
    expected, whole = delta_of(order, private, do(order)), 0
    for at in range(1, 100):
        warm = Warm()
        said = warm.do(order, Interruption(at))
        if isinstance(said, Done):
            break
        whole += 1
        assert isinstance(said, Suspended)
        # What else this process does in between must not show.
        torch.manual_seed(at)
        torch.rand(at)
        done = do(order)
        assert np.array_equal(delta_of(order, private, done), expected)
        assert isinstance(done, Done) and done.metrics and done.steps == whole_steps(training)
        Path(str(order.checkpoint)).unlink(missing_ok=True)
    assert whole > whole_steps(training)


def whole_steps(training: Training) -> int:
    """Batches of a whole round on the blobs' examples; a single last example is left out."""
    fit, _ = blobs(120).split(training.holdout)
    count = len(fit)
    full, rest = divmod(count, training.batch_size)
    return training.steps or training.epochs * (full + (rest > 1 or full == 0))


def test_interrupted_again_and_again(job: tuple[Job, bytes], tmp_path: Path) -> None:
    """A device that is free for one batch at a time gets there as well, with the same result."""
    order, private = interruptible(job, tmp_path, HARD[1])
    expected = delta_of(order, private, do(order))
    for _ in range(100):
        done = Warm().do(order, Interruption(8))
        if isinstance(done, Done):
            break
        assert done == Suspended(order.id, Path(str(order.checkpoint)).exists())
    assert np.array_equal(delta_of(order, private, done), expected)


def test_power_fails(job: tuple[Job, bytes], tmp_path: Path) -> None:
    """Checkpoints are written on the way, so that a process that just ends costs little."""
    order, private = interruptible(job, tmp_path, HARD[0])
    order = msgspec.structs.replace(order, checkpoint_every=1e-9)
    expected = delta_of(order, private, do(order))
    Path(str(order.checkpoint)).unlink()

    class Gone(Exception):
        pass

    calls = iter(range(100))

    def gone() -> None:
        if next(calls) == 15:
            raise Gone

    with pytest.raises(Gone):
        Warm().worker.do(order, gone)
    kept = checkpoint.read(Path(str(order.checkpoint)), place_key(order), initial(order))
    assert kept is not None and kept.place.step > 3 and kept.place.seconds > 0
    assert np.array_equal(delta_of(order, private, do(order)), expected)


def initial(order: Job) -> State:
    """The weights that a job starts from."""
    return trainer.load_state(Path(order.weights).read_bytes(), order.layout)


def place_key(order: Job) -> bytes:
    """The key of a job's checkpoints."""
    return trainer._Checkpoints(order, Warm().worker._examples_key(order), 0.0, 0.0)._key


def test_other_work_does_not_go_on_from_it(job: tuple[Job, bytes], tmp_path: Path) -> None:
    """Examples that changed, another seed or another rate: it is begun anew, and the checkpoint is gone."""
    order, _ = interruptible(job, tmp_path, HARD[0])
    place = Path(str(order.checkpoint))
    Warm().do(order, Interruption(9))
    kept = place.read_bytes()
    os.utime(order.source.path, ns=(1, 1))
    for other in (
        order,
        msgspec.structs.replace(order, seed=SEED + 1),
        msgspec.structs.replace(order, id="other"),
        msgspec.structs.replace(order, training=HARD[1]),
    ):
        place.write_bytes(kept)
        warm = Warm()
        assert isinstance(warm.do(other, Interruption(5)), Suspended)
        assert not place.exists() and Progress(other.id, "evaluating") in warm.said
        os.utime(order.source.path, ns=(2, 2))


def test_damaged_checkpoints(job: tuple[Job, bytes], tmp_path: Path) -> None:
    """Cut anywhere or with any byte changed, it is as good as none."""
    order, private = interruptible(job, tmp_path, HARD[1])
    place = Path(str(order.checkpoint))
    Warm().do(order, Interruption(12))
    whole, key, weights = place.read_bytes(), place_key(order), initial(order)
    assert checkpoint.read(place, key, weights) is not None
    for cut in (0, 1, 31, 32, 35, 36, 100, len(whole) - 1):
        place.write_bytes(whole[:cut])
        assert checkpoint.read(place, key, weights) is None
    for at in (0, 31, 33, 60, len(whole) // 2, len(whole) - 1):
        place.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert checkpoint.read(place, key, weights) is None
    place.write_bytes(whole)
    assert checkpoint.read(place, bytes(32), weights) is None
    assert checkpoint.read(place, key, {name: tensor.double() for name, tensor in weights.items()}) is None
    place.write_bytes(b"junk")
    assert np.array_equal(delta_of(order, private, do(order)), delta_of(order, private, do(order)))


def test_no_room_for_a_checkpoint(job: tuple[Job, bytes], tmp_path: Path) -> None:
    """The work is left all the same, and said to have none."""
    order, _ = interruptible(job, tmp_path, HARD[0])
    order = msgspec.structs.replace(order, checkpoint=str(tmp_path / "nowhere" / "checkpoint"))
    assert Warm().do(order, Interruption(9)) == Suspended(order.id, False)
    assert isinstance(do(msgspec.structs.replace(order, checkpoint_every=1e-9)), Done)
