"""edge_agent.child: the real trainer in a real process, however it ends."""

import contextlib
import ctypes
import io
import os
import queue
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from aggregator import export
from edge_agent import child, jobs
from edge_agent.child import Event, Settings, Trainer, TrainerExited, TrainerSaid, TrainerWrote
from edge_agent.jobs import Cancel, Done, Failed, Job, Order, Progress, Source, Suspended
from edge_agent.sandbox import Sandbox
from shared import sealing
from shared.errors import Reason, RemoteProtocolError, TrainingError
from shared.messages import DataContract, Sgd, TensorContract, TensorSpec, Training
from tests.hostile.daemon import until

PATIENCE = 60.0
"""Seconds after which a test gives up; none waits this long when all is well."""


class Hungry(nn.Module):
    """A valid graph that asks for 640 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, and a great deal of nothing."""
        return self.linear(x) + torch.zeros(160_000_000).sum()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A small job with all its files."""
    folder = tmp_path_factory.mktemp("job")
    torch.manual_seed(0)
    return prepare(folder, nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))


def prepare(folder: Path, module: nn.Module) -> Job:
    """A job that trains this module on noise."""
    x, y = TensorContract("x", "float32", [64]), TensorContract("y", "int64", [], classes=10)
    exported = export.export(module, "cross_entropy", [x], y)
    for name, content in (("train", exported.train), ("eval", exported.eval), ("weights", exported.weights)):
        (folder / name).write_bytes(content)
    random = np.random.default_rng(0)
    np.savez(folder / "d.npz", x=random.normal(size=(180, 64)).astype(np.float32), y=random.integers(0, 10, 180))
    return Job(
        id="r1",
        task="noise",
        opset=1,
        layout=exported.layout,
        train_graph=str(folder / "train"),
        eval_graph=str(folder / "eval"),
        weights=str(folder / "weights"),
        training=Training(Sgd(0.1), batch_size=16, epochs=3),
        data=DataContract("noise", [x], y),
        source=Source("npz", str(folder / "d.npz")),
        metric="accuracy",
        seed=1,
        clip=1.0,
        codec="fp32",
        hpke_key=sealing.generate()[1],
        context=b"context",
        output=str(folder / "body"),
    )


def endless(job: Job) -> Job:
    """The same job, but for hours."""
    return msgspec.structs.replace(job, training=Training(Sgd(0.001), batch_size=16, steps=10_000_000))


class Owner:
    """What the agent's owner thread does: it takes events from a mailbox."""

    def __init__(self, settings: Settings, sandbox: Sandbox | None = None) -> None:
        self.mailbox: queue.Queue[Event] = queue.Queue()
        self.trainer = Trainer(self.mailbox.put, settings, sandbox)
        self.wrote: list[str] = []

    def next(self) -> Event:
        """The next event but the lines on stderr, which are kept in `wrote`."""
        while isinstance(event := self.mailbox.get(timeout=PATIENCE), TrainerWrote):
            self.wrote.append(event.line)
        return event

    def result(self) -> Done | Failed | Suspended | TrainerExited:
        """The last word on a job."""
        while True:
            match self.next():
                case TrainerSaid(message=Done() | Failed() | Suspended() as message):
                    return message
                case TrainerExited() as event:
                    return event

    def training(self) -> None:
        """Wait until a job is being trained."""
        while True:
            match self.next():
                case TrainerSaid(message=Progress(phase="training")):
                    return
                case TrainerExited() as event:
                    raise AssertionError(event)

    def exited(self) -> TrainerExited:
        """The news of the end."""
        while not isinstance(event := self.next(), TrainerExited):
            pass
        return event


@pytest.fixture
def owner() -> Iterator[Owner]:
    """An owner whose child ends with the test."""
    owner = Owner(Settings(grace=10.0))
    yield owner
    end(owner)


@pytest.fixture(scope="module")
def warm() -> Iterator[Owner]:
    """One child for all tests that leave it alive."""
    os.environ["FIELDFARE_TEST_SECRET"] = "hush"
    owner = Owner(Settings(memory_max=700 << 20))
    yield owner
    end(owner)
    del os.environ["FIELDFARE_TEST_SECRET"]


def end(owner: Owner) -> None:
    """Leave no process behind."""
    if owner.trainer.pid is not None:
        owner.trainer.stop(kill=True)
        owner.exited()


# -- a child that lives


def test_jobs_one_after_another(warm: Owner, job: Job) -> None:
    """A warm child does job after job; each gets its own answer, and the body is where it was asked for."""
    for name in ("a", "b"):
        warm.trainer.submit(msgspec.structs.replace(job, id=name))
    first, second = warm.result(), warm.result()
    assert isinstance(first, Done) and isinstance(second, Done)
    assert (first.id, second.id) == ("a", "b") and second.seconds < 0.5
    assert Path(job.output).stat().st_size == second.size
    assert 100 << 20 < (warm.trainer.rss() or 0) <= second.peak_rss


def test_a_failure_is_an_answer(warm: Owner, job: Job) -> None:
    """A job that cannot be done leaves the child alive for the next."""
    warm.trainer.submit(msgspec.structs.replace(job, source=Source("csv", "/nowhere")))
    pid = warm.trainer.pid
    failed = warm.result()
    assert isinstance(failed, Failed) and failed.reason == "data" and "/nowhere" in failed.detail
    warm.trainer.submit(job)
    assert isinstance(warm.result(), Done) and warm.trainer.pid == pid


def test_out_of_memory_is_an_answer(warm: Owner, job: Job, tmp_path: Path) -> None:
    """A graph that asks for more than the child may have fails with its reason; the child does the next job."""
    warm.trainer.submit(prepare(tmp_path, Hungry()))
    failed = warm.result()
    assert isinstance(failed, Failed) and failed.reason == "out_of_memory", failed
    warm.trainer.submit(job)
    assert isinstance(warm.result(), Done)


def test_its_memory_is_limited(warm: Owner, job: Job) -> None:
    """The kernel holds the child to the memory that the owner of the device allows it."""
    pid = warm.trainer.submit(job)
    assert isinstance(warm.result(), Done)
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    (line,) = [each.split() for each in limits if each.startswith("Max data size")]
    assert line[-3:-1] == [str(700 << 20)] * 2


def test_large_job(warm: Owner, job: Job) -> None:
    """A job far above a pipe's capacity is handed over without waiting for the child."""
    layout = [TensorSpec(f"{'name' * 20}{i}", "parameter", "float32", [1]) for i in range(10_000)]
    large = msgspec.structs.replace(job, layout=layout)
    warm.trainer.freeze()
    warm.trainer.submit(large)
    warm.trainer.thaw()
    failed = warm.result()
    assert len(jobs.frame(Order(large))) > 1 << 20
    assert isinstance(failed, Failed) and failed.reason == "graph"


def test_freeze_and_thaw(warm: Owner, job: Job) -> None:
    """A frozen child stands still, keeps what it has, and goes on when thawed."""
    pid = warm.trainer.start()
    warm.trainer.freeze()
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    assert warm.trainer.frozen
    assert stopped(pid)
    warm.trainer.submit(job)
    warm.trainer.thaw()
    assert not warm.trainer.frozen
    assert isinstance(warm.result(), Done) and warm.trainer.pid == pid


def stopped(pid: int) -> bool:
    """Whether a signal has stopped this process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_group_that_it_is_not_in(tmp_path: Path) -> None:
    """Its group is frozen only where the child is in it, and then nothing else; else the child itself is stopped."""
    group = tmp_path / "trainer"
    group.mkdir()
    (group / "cgroup.freeze").write_text("")
    owner = Owner(Settings(), Sandbox(tmp_path))
    try:
        pid = owner.trainer.start()
        procs = group / "cgroup.procs"
        until(lambda: procs.exists() or None, "the child's try to join")
        owner.trainer.freeze()
        until(lambda: stopped(pid) or None, "a child that stands still", 10)
        assert owner.trainer.frozen and (group / "cgroup.freeze").read_text() == "0"
        owner.trainer.thaw()
        until(lambda: not stopped(pid) or None, "a child that goes on")
        procs.write_text(f"{os.getpid()}\n{pid}\n")
        owner.trainer.freeze()
        assert owner.trainer.frozen and (group / "cgroup.freeze").read_text() == "1"
        assert not stopped(pid)
        owner.trainer.thaw()
        assert not owner.trainer.frozen and (group / "cgroup.freeze").read_text() == "0"
    finally:
        end(owner)


@pytest.mark.parametrize(("after", "cause"), [(2, "killed"), (3, "out_of_memory")])
def test_ended_by_the_kernel_for_want_of_memory(tmp_path: Path, after: int, cause: str) -> None:
    """Its group's count tells whether it was that: one that ended so before does not count."""
    events = tmp_path / "trainer" / "memory.events"
    events.parent.mkdir()
    events.write_text("low 0\nhigh 9\nmax 9\noom 2\noom_kill 2\n")
    owner = Owner(Settings(), Sandbox(tmp_path))
    try:
        pid = owner.trainer.start()
        events.write_text(f"low 0\nhigh 9\nmax 9\noom 3\noom_kill {after}\n")
        os.kill(pid, signal.SIGKILL)
        assert owner.exited().cause == cause
    finally:
        end(owner)


def test_suspended_in_training(warm: Owner, job: Job, tmp_path: Path) -> None:
    """A job that is left in the middle has a checkpoint, even if the child stood still; it is warm for the next."""
    left = msgspec.structs.replace(endless(job), id="left", checkpoint=str(tmp_path / "checkpoint"))
    pid = warm.trainer.submit(left)
    warm.training()
    warm.trainer.freeze()
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    warm.trainer.suspend("nobody")
    warm.trainer.freeze()
    warm.trainer.suspend(left.id)
    assert warm.result() == Suspended("left", True) and (tmp_path / "checkpoint").stat().st_size > 1000
    warm.trainer.submit(job)
    assert isinstance(warm.result(), Done) and warm.trainer.pid == pid


def test_it_comes_last() -> None:
    """A trainer that is to be idle has the idle classes for CPU and disk, and as a session the least weight."""
    modest = Owner(Settings(idle=True))
    try:
        pid = modest.trainer.start()
        confined = Path(f"/proc/{pid}/oom_score_adj")  # written last; its work would take long on a busy machine
        until(lambda: confined.read_text() == "500\n" or None, "the limits")
        assert os.sched_getscheduler(pid) == os.SCHED_IDLE
        found = ctypes.CDLL(None).syscall({"x86_64": 252, "aarch64": 31}[os.uname().machine], 1, pid)
        assert found >> 13 == 3
        session = Path(f"/proc/{pid}/autogroup")
        assert not session.exists() or session.read_text().split()[-1] == "19"
    finally:
        modest.trainer.stop(kill=True)
        modest.exited()


def test_cancelled_in_training(warm: Owner, job: Job) -> None:
    """A job that nobody wants any more ends at once, and the same warm child does the next."""
    pid = warm.trainer.submit(endless(job))
    warm.training()
    warm.trainer.cancel(job.id)
    failed = warm.result()
    assert isinstance(failed, Failed) and (failed.id, failed.reason) == (job.id, "cancelled")
    warm.trainer.submit(job)
    assert isinstance(warm.result(), Done) and warm.trainer.pid == pid


def test_cancelled_before_it_starts(warm: Owner, job: Job) -> None:
    """A job can be cancelled while it waits for another one, which is not touched."""
    first, second, third = (msgspec.structs.replace(endless(job), id=name) for name in ("a", "b", "c"))
    for each in (first, second, third):
        warm.trainer.submit(each)
    for each in (third, second, first):
        warm.trainer.cancel(each.id)
    answers = [warm.result() for _ in range(3)]
    assert [(a.id, a.reason) for a in answers if isinstance(a, Failed)] == [(i, "cancelled") for i in "abc"]


def test_cancelled_too_late(warm: Owner, job: Job) -> None:
    """A cancel for a job that is finished or unknown does nothing, not even to a later job of that name."""
    pid = warm.trainer.submit(job)
    assert isinstance(warm.result(), Done)
    warm.trainer.cancel(job.id)
    warm.trainer.cancel("nobody")
    warm.trainer.submit(job)
    assert isinstance(warm.result(), Done) and warm.trainer.pid == pid


def test_it_gets_no_secrets(warm: Owner, job: Job) -> None:
    """The child sees neither the agent's environment nor its files, has its own session, and is the first to go."""
    inherited = os.open("/etc/hostname", os.O_RDONLY)
    try:
        pid = warm.trainer.start()
        warm.trainer.submit(job)
        assert isinstance(warm.result(), Done)
        process = Path(f"/proc/{pid}")
        environment = process.joinpath("environ").read_bytes()
        assert b"hush" not in environment and b"OMP_NUM_THREADS=1" in environment
        targets = {os.readlink(entry) for entry in process.joinpath("fd").iterdir()}
        assert all(target.startswith("pipe:") or target == "/dev/null" for target in targets), targets
        assert os.getsid(pid) == os.getpgid(pid) == pid
        assert process.joinpath("cwd").readlink() == Path("/")
        assert int(process.joinpath("oom_score_adj").read_text()) >= 500
        assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
    finally:
        os.close(inherited)


# -- how it ends


def test_idle_child_leaves_in_order(owner: Owner, job: Job) -> None:
    """stop() on an idle child: it exits with 0, and nothing is left of it."""
    pid = owner.trainer.submit(job)
    assert isinstance(owner.result(), Done)
    owner.trainer.stop()
    assert owner.exited() == TrainerExited(pid, "stopped", 0, None)
    assert owner.trainer.pid is None and owner.trainer.rss() is None and not Path(f"/proc/{pid}").exists()


def test_stop_in_training(owner: Owner, job: Job) -> None:
    """stop() ends a job in the middle, even of a frozen child, leaves no body, and never blocks its caller."""
    output = Path(job.output)
    output.unlink(missing_ok=True)
    owner.trainer.submit(endless(job))
    owner.training()
    owner.trainer.freeze()
    owner.trainer.stop()
    event = owner.exited()
    assert event.cause == "stopped" and event.signal == signal.SIGTERM
    assert not output.exists()


def test_killed_in_training_and_started_again(owner: Owner, job: Job) -> None:
    """kill -9 from elsewhere, as by the kernel when memory runs out, is told as such; the next job gets a new child."""
    pid = owner.trainer.submit(endless(job))
    owner.training()
    assert owner.trainer.pid == pid
    os.kill(pid, signal.SIGKILL)
    assert owner.exited() == TrainerExited(pid, "killed", None, signal.SIGKILL)
    owner.trainer.submit(job)
    assert isinstance(owner.result(), Done) and owner.trainer.pid != pid


def test_cancelled_in_its_cold_start(owner: Owner, job: Job) -> None:
    """A round that ends while torch is still loading costs the child nothing: it is warm for the next one."""
    pid = owner.trainer.submit(endless(job))
    owner.trainer.cancel(job.id)
    owner.trainer.submit(msgspec.structs.replace(job, id="r2"))
    failed, done = owner.result(), owner.result()
    assert isinstance(failed, Failed) and failed.reason == "cancelled"
    assert isinstance(done, Done) and done.id == "r2" and owner.trainer.pid == pid


def test_stop_and_submit_at_once(owner: Owner, job: Job) -> None:
    """A job given while the old child ends goes to a new one; each end is told once, with its process id."""
    old = owner.trainer.start()
    owner.trainer.stop(kill=True)
    owner.trainer.submit(job)
    assert owner.trainer.pid not in (None, old)
    events = [owner.result(), owner.result()]
    assert {type(event) for event in events} == {Done, TrainerExited}
    (exited,) = (event for event in events if isinstance(event, TrainerExited))
    assert exited == TrainerExited(old, "stopped", None, signal.SIGKILL)


PARENT = """
import queue, sys, msgspec
from edge_agent import child, jobs
mailbox = queue.Queue()
trainer = child.Trainer(mailbox.put, child.Settings())
trainer.submit(jobs.read_order(sys.stdin.buffer))
while not getattr(getattr(mailbox.get(), "message", None), "phase", "") == "training":
    pass
print(trainer.pid, flush=True)
mailbox.get = None
sys.stdin.buffer.read()
"""


def test_it_dies_with_its_parent(job: Job) -> None:
    """kill -9 of the agent ends a child in the middle of training, even one that cannot notice a closed pipe."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdin.write(jobs.frame(Order(endless(job))))
        parent.stdin.flush()
        handle = os.pidfd_open(int(parent.stdout.readline()))
        try:
            signal.pidfd_send_signal(handle, signal.SIGSTOP)
            parent.kill()
            assert select.select([handle], [], [], PATIENCE / 4)[0], "the trainer outlived its agent"
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)


def script(path: Path, *lines: str) -> Settings:
    """Settings whose `python` is this shell script."""
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o700)
    return Settings(python=str(path))


@pytest.mark.parametrize(
    "output",
    [r"\377\377\377\377junk", r"\003\000\000\000\301\301\301", r"\001\000\000\000\200", r"\002\000\000\000x", r"\001"],
    ids=["length", "no msgpack", "no message", "cut", "half a length"],
)
def test_garbled(tmp_path: Path, output: str) -> None:
    """A child that does not speak the protocol is killed and told as such."""
    owner = Owner(script(tmp_path / "python", f"printf '{output}'", "exec >&-", "read line", "exec sleep 600"))
    pid = owner.trainer.start()
    assert owner.exited() == TrainerExited(pid, "garbled", None, signal.SIGKILL)
    assert "broke the protocol" in owner.wrote[-1]


def test_what_it_leaves_behind_is_ended(tmp_path: Path) -> None:
    """Nothing of the child's process group outlives it, and the report does not wait for such a rest."""
    owner = Owner(script(tmp_path / "python", "sleep 600 & echo $! >&2", "exit 3"))
    pid = owner.trainer.start()
    assert owner.exited() == TrainerExited(pid, "crashed", 3, None)
    try:
        handle = os.pidfd_open(int(owner.wrote[0]))
    except ProcessLookupError:
        return
    try:
        assert select.select([handle], [], [], PATIENCE)[0], "something was left behind"
    finally:
        os.close(handle)


def test_words_on_stderr(tmp_path: Path) -> None:
    """Lines on stderr reach the log, each bounded, before the news of the end."""
    owner = Owner(script(tmp_path / "python", "printf '%05000d\\nsecond\\n' 7 >&2", "exit 1"))
    owner.trainer.start()
    owner.exited()
    assert [len(line) for line in owner.wrote] == [1000, 6] and owner.wrote[1] == "second"


def test_no_such_python(tmp_path: Path) -> None:
    """A trainer that cannot even start is a typed error that names the program."""
    with pytest.raises(TrainingError, match="absent"):
        Owner(Settings(python=str(tmp_path / "absent"))).trainer.start()


def test_nothing_to_stop() -> None:
    """Without a child, stopping, cancelling, freezing and thawing do nothing."""
    trainer = Trainer(lambda event: None, Settings())
    trainer.stop()
    trainer.cancel("r1")
    trainer.freeze()
    trainer.thaw()
    assert trainer.pid is None and not trainer.frozen


# -- the pipes


def test_stray_output_goes_to_stderr() -> None:
    """Whatever prints inside the trainer, Python or not, cannot corrupt an answer."""
    code = (
        "import os; from edge_agent import trainer; orders, answers = trainer._take_pipes();"
        "print('stray', flush=True); os.system('echo stray'); answers.write(b'answer'); answers.flush()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, stdin=subprocess.DEVNULL)
    assert done.stdout == b"answer" and done.stderr.count(b"stray") == 2


def test_the_agent_needs_no_torch() -> None:
    """This module and its messages load neither torch nor numpy."""
    code = "import sys, edge_agent.child; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"set()"


def test_frames(job: Job) -> None:
    """A frame reads back as what was written, one after the other, to the end of the stream."""
    stream = io.BytesIO(jobs.frame(Order(job)) * 2 + jobs.frame(Order(Cancel(job.id))))
    assert jobs.read_order(stream) == job and jobs.read_order(stream) == job
    assert jobs.read_order(stream) == Cancel(job.id) and jobs.read_order(stream) is None


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 100])
def test_frame_cut_short(job: Job, cut: int) -> None:
    """A stream that ends inside a frame is refused, and one that claims too much before it is read."""
    with pytest.raises(RemoteProtocolError):
        jobs.read_order(io.BytesIO(jobs.frame(Order(job))[:cut]))
    with pytest.raises(RemoteProtocolError) as caught:
        jobs.read_said(io.BytesIO((jobs.SAID_MAX + 1).to_bytes(4, "little")))
    assert caught.value.reason is Reason.TOO_LARGE


@contextlib.contextmanager
def bare() -> Iterator[subprocess.Popen[bytes]]:
    """The trainer without its agent's side."""
    command = [sys.executable, "-m", "edge_agent.confined", f"--parent={os.getpid()}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def test_garbled_orders(job: Job) -> None:
    """The trainer finishes what came before a frame that is none, and then ends with an error."""
    with bare() as process:
        said, wrote = process.communicate(jobs.frame(Order(job)) + b"\xff" * 8, PATIENCE)
    answers, last = io.BytesIO(said), None
    while (message := jobs.read_said(answers)) is not None:
        last = message
    assert isinstance(last, Done) and process.returncode == 1 and b"RemoteProtocolError" in wrote


def test_an_error_while_it_listens(job: Job) -> None:
    """An error on the trainer's main thread ends it in order, though another thread waits for orders."""
    with bare() as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stdin.write(jobs.frame(Order(job)))
        process.stdin.flush()
        assert process.wait(PATIENCE) == 1 and b"BrokenPipeError" in process.stderr.read()


def test_rss_of_nobody() -> None:
    """A process that is gone has no memory."""
    assert child.rss(2**22 + 1) is None and (child.rss(os.getpid()) or 0) > 1 << 20
