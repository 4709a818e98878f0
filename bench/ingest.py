"""What the aggregator takes in: updates of a CPU-second and of a second, and how its memory grows with their number.

The devices are one process of plain sockets (bench/senders.py), and all updates are made before the first is sent. The
bounds stand beside what is reached, measured in the same run: the disk, and TLS without anything done with the bytes.
"""

import json
import os
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

from bench import meters
from bench.fleet import MILLION, QUARTER, BenchError, Fleet, Model
from bench.report import Figure, Goal
from shared.chunks import CHUNK_SIZE

GOALS = {MILLION: 200, QUARTER: 700}
"""Updates of a CPU-second, durable."""
SHARE = 0.8
"""Of the smaller of the two bounds."""
BATCH = 16 << 20
"""Bytes that are made durable together when the disk is measured alone."""


def rates(root: Path, repeats: int) -> list[Figure]:
    """Ingest of 4 MB and 1 MB updates, whole and in chunks, `repeats` rounds of each, in turns."""
    cases = [(model, chunk) for model in (MILLION, QUARTER) for chunk in (CHUNK_SIZE, 0)]
    found: dict[tuple[Model, int], list[dict[str, float]]] = {case: [] for case in cases}
    for number in range(repeats):
        for model, chunk in cases:
            devices = 100 if model is MILLION else 200
            folder = root / f"{model.name}-{chunk}-{number}"
            found[model, chunk].append(_round(folder, model, devices, chunk, bounds=True))
    return [figure for (model, chunk), runs in found.items() for figure in _figures(model, chunk, runs)]


def memory(root: Path, counts: list[int]) -> list[Figure]:
    """The aggregator's peak memory with so many 1 MB updates in one round; the goal is that it does not grow."""
    figures = []
    for chunk in (CHUNK_SIZE, 0):
        first: float | None = None
        for devices in counts:
            run = _round(root / f"memory-{chunk}-{devices}", QUARTER, devices, chunk, bounds=False)
            # Flat: what a hundred times as many updates may add is what the limits let be in hand at a time.
            goal = None if first is None else Goal("<=", first + IN_HAND[chunk])
            first = run["peak"] if first is None else first
            group = f"The aggregator's memory, 1 MB updates {_how(chunk)}"
            figures += [
                Figure(group, f"peak with {devices} in one round", "MB", (run["peak"],), goal),
                Figure(group, f"seconds for {devices}", "s", (run["seconds"],)),
            ]
    return figures


IN_HAND = {CHUNK_SIZE: 2 * 64 * 1.0, 0: 64.0}
"""MB: updates that are collected from chunks at a time, and the journal's share; or the mailbox and a batch."""


def _figures(model: Model, chunk: int, runs: list[dict[str, float]]) -> list[Figure]:
    group = f"Ingest of {4 * model.parameters / 1e6:.0f} MB updates {_how(chunk)}, durable, over TLS"

    def each(name: str) -> tuple[float, ...]:
        return tuple(run[name] for run in runs)

    share = tuple(run["rate"] / min(run["disk"], run["tls"]) for run in runs)
    return [
        Figure(group, "updates of a CPU-second of the aggregator", "", each("of_cpu"), Goal(">=", GOALS[model])),
        Figure(group, "updates a second, all on this machine", "/s", each("rate")),
        Figure(group, "bound: the disk alone, 16 MB for each fdatasync", "/s", each("disk")),
        Figure(group, "bound: TLS alone, received and dropped, of a CPU-second", "", each("tls")),
        Figure(group, "updates of a CPU-second of the broker", "", each("of_broker")),
        Figure(group, "updates a second, of the smaller bound", "", share, Goal(">=", SHARE)),
    ]


def _how(chunk: int) -> str:
    return f"in chunks of {chunk >> 10} KiB" if chunk else "in one message"


def _round(root: Path, model: Model, devices: int, chunk: int, *, bounds: bool) -> dict[str, float]:
    """One round in which each device sends one update."""
    with Fleet(root, devices, 1, model) as fleet:
        bundles = [fleet.bundle(number) for number in range(devices)]
        release = fleet.build()
        fleet.start()
        assert fleet.aggregator is not None and fleet.broker.pid is not None
        server, broker, log = fleet.aggregator.pid, fleet.broker.pid, fleet.log()
        fleet.until("the aggregator is connected", lambda: any(e["event"] == "link.up" for e in log.read()), 30)
        given = [str(fleet.port), str(model.parameters), str(chunk), *map(str, bundles)]
        command = [sys.executable, "-m", "bench.senders", *given]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as senders:
            assert senders.stdin is not None and senders.stdout is not None
            _expect("ready", senders.stdout.readline())
            fleet.publish(release)
            _expect("prepared", senders.stdout.readline())
            before, between = meters.cpu_seconds(server), meters.cpu_seconds(broker)
            senders.stdin.write("go\n")
            senders.stdin.flush()
            line = senders.stdout.readline()
            spent, forwarded = meters.cpu_seconds(server) - before, meters.cpu_seconds(broker) - between
            if not line:
                raise BenchError(f"the senders have ended; see the logs in {root}")
            answer = json.loads(line)
            fleet.until("the round is closed", lambda: any(e["event"] == "round.closed" for e in log.read()), 60)
            peak = meters.resident_peak(server)
            senders.stdin.close()
        if answer["refused"]:
            raise BenchError(f"{answer['refused']} updates were refused; see the logs in {root}")
        seconds, size = answer["seconds"], 4 * model.parameters
        found = {
            "seconds": seconds,
            "rate": devices / seconds,
            "of_cpu": devices / spent,
            "of_broker": devices / forwarded,
            "peak": peak,
        }
        if bounds:
            found |= {"disk": _disk(root) / size, "tls": _tls(fleet, bundles[0], size)}
    return found


def _expect(word: str, line: str) -> None:
    if line.strip() != word:
        raise BenchError(f"the senders say {line.strip()!r}, not {word!r}")


def _disk(root: Path, batches: int = 16) -> float:
    """Bytes a second that the disk takes in one file, synchronised after each BATCH."""
    data, path = os.urandom(BATCH), root / "rate"
    began = time.perf_counter()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for _ in range(batches):
        os.write(file, data)
        os.fdatasync(file)
    os.close(file)
    seconds = time.perf_counter() - began
    path.unlink()
    return batches * BATCH / seconds


def _tls(fleet: Fleet, bundle: Path, size: int, total: int = 400 << 20) -> float:
    """Messages of `size` bytes that this process can receive of a CPU-second when it does nothing with them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(fleet.folder / "broker" / "server.crt", fleet.folder / "broker" / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        sender = "import socket,ssl,sys;c=ssl.create_default_context(cafile=sys.argv[1]);c.check_hostname=False;"
        sender += "s=c.wrap_socket(socket.create_connection(('127.0.0.1',int(sys.argv[2]))));d=bytes(1<<20)\n"
        sender += "for _ in range(int(sys.argv[3])>>20): s.sendall(d)\ns.recv(1)"
        port = str(listening.getsockname()[1])
        with subprocess.Popen([sys.executable, "-c", sender, str(bundle / "ca.crt"), port, str(total)]):
            plain, _ = listening.accept()
            with context.wrap_socket(plain, server_side=True) as stream:
                began, left = time.process_time(), total
                while left > 0:
                    with memoryview(bytearray(min(size, left))) as buffer:
                        got = 0
                        while got < len(buffer):
                            received = stream.recv_into(buffer[got:])
                            if not received:
                                raise BenchError("the sender of the bare TLS stream has ended")
                            got += received
                        left -= got
                return total / size / (time.process_time() - began)
