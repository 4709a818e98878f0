"""The `aggregator` command: a fleet, its devices, releases and models, and the daemon itself.

Each command imports what it needs when it runs, so that --help is quick and building, showing and publishing a release
work where Linux-only modules are missing. Nothing is decided here beyond what options mean.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shared import cli
from shared.cli import Exit, Failure, Parser, say, show
from shared.errors import Reason, RemoteProtocolError
from shared.topics import is_name

if TYPE_CHECKING:
    from aggregator.config import AggregatorConfig
    from aggregator.ports import Contribution, StoredTask
    from aggregator.release import Description
    from shared.messages import Root, TaskManifest
    from shared.mqtt import LinkSettings

PASSPHRASE = "FIELDFARE_PASSPHRASE"
FLEET = "FIELDFARE_FLEET"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return cli.run(_parser(), arguments)


# -- fleet and devices -------------------------------------------------------------------------------------------


def _fleet_init(options: argparse.Namespace) -> int:
    from aggregator import ca

    passphrase = None if options.no_passphrase else _passphrase(options, "for the new fleet's keys", twice=True)
    fleet = ca.init_fleet(
        options.directory,
        options.name,
        options.host,
        now=time.time(),
        passphrase=passphrase,
        port=options.port,
        prefix=options.prefix,
        message_max=options.message_max,
        bind=options.bind,
        broker_home=options.broker_home,
        broker_data=options.broker_data,
        broker_user=options.broker_user,
    )
    place = options.directory
    if options.json:
        show({"fleet": fleet.name, "directory": str(place.absolute()), "hosts": fleet.hosts, "port": fleet.port}, True)
        return Exit.OK
    print(f"made the fleet {fleet.name} in {place}")
    if options.broker_home is None:
        print(f"  broker      mosquitto -c {place / 'broker' / 'mosquitto.conf'}")
    else:
        print(f"  broker      copy {place / 'broker'} to {options.broker_home} on its host")
    print(f"  aggregator  aggregator run --config {place / 'aggregator' / 'aggregator.toml'}")
    print(f"  devices     aggregator device add NAME --fleet {place} -o NAME.tar.gz")
    print(f"keep {place / 'root'} and {place / 'ca'} off this machine when you do not need them: who holds")
    print(
        "their keys can replace the fleet's trust and enrol devices"
        + ("" if passphrase else " (they are not encrypted)")
    )
    return Exit.OK


def _device_add(options: argparse.Namespace) -> int:
    from aggregator import ca

    out = ca.add_device(
        options.fleet,
        options.name,
        options.output,
        now=time.time(),
        passphrase=_opening(options, options.fleet / "ca" / "ca.key"),
        days=options.days,
        again=options.again,
    )
    if options.json:
        show({"device": options.name, "bundle": str(out.absolute()), "days": options.days}, True)
    else:
        print(f"made the bundle of {options.name}: {out}")
        print("it holds the device's private key: copy it over a safe way, then delete it here")
    return Exit.OK


# -- the registrar -----------------------------------------------------------------------------------------------


def _registrar_init(options: argparse.Namespace) -> int:
    from aggregator import ca

    place = ca.init_registrar(
        options.fleet,
        options.host,
        options.output,
        now=time.time(),
        passphrase=_opening(options, options.fleet / "ca" / "ca.key"),
        port=options.port,
        bind=options.bind,
    )
    url = f"https://{f'[{options.host[0]}]' if ':' in options.host[0] else options.host[0]}:{options.port}"
    if options.json:
        show({"directory": str(place.absolute()), "url": url}, True)
        return Exit.OK
    print(f"made the registrar's folder {place}")
    print(f"  registrar   aggregator registrar run --config {place / 'registrar.toml'}")
    print(f"  tokens      aggregator token create --config {place / 'registrar.toml'}")
    print(f"  devices     edge-agent enrol {url} TOKEN")
    print(f"{place / 'ca.key'} is the open key of the fleet's CA: who holds it can enrol devices")
    print(f"the aggregator's trust.deny must name the same file as in {place / 'registrar.toml'}")
    return Exit.OK


def _registrar_run(options: argparse.Namespace) -> int:
    from aggregator import config, registrar

    registrar.run(config.load_registrar(options.config, os.environ))
    return Exit.OK


def _registrar_migrate(options: argparse.Namespace) -> int:
    from shared import config, migration

    show(config.migrate(options.config, migration.REGISTRAR), options.json)
    return Exit.OK


def _broker_render(options: argparse.Namespace) -> int:
    from aggregator import ca

    out = ca.render_broker(
        options.fleet,
        options.output,
        home=options.home,
        data=options.data,
        user=options.user,
        bind=options.bind,
        version=options.mosquitto,
        crl=options.crl,
    )
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    if options.json:
        show({"directory": str(out.absolute()), "files": files, "home": str(options.home)}, True)
        return Exit.OK
    print(f"made {out} for mosquitto {options.mosquitto}; on its host, as root:")
    print(f"  install -d -m 700 -o {options.user} -g {options.user} {options.home}")
    print(
        f"  install -m 600 -o {options.user} -g {options.user} {out}/{{mosquitto.conf,acl,*.crt,*.key}} {options.home}/"
    )
    print(f"  cp -r {out}/systemd/. /etc/systemd/system/ && systemctl daemon-reload")
    if options.crl is not None:
        print(f"  systemctl enable --now fieldfare-crl.path   # after the registrar, which makes {options.crl}")
    print("  systemctl restart mosquitto")
    return Exit.OK


def _token_create(options: argparse.Namespace) -> int:
    from aggregator import registry

    try:
        registry.labels_of(options.label)
    except ValueError as error:
        raise Failure(Exit.USAGE, str(error)) from None
    found = _ask(
        options,
        verb="token create",
        name=options.name or "",
        seconds=options.seconds,
        labels=options.label,
        again=options.again,
    )
    if options.json:
        show(found, True)
        return Exit.OK
    print(found["token"])
    limit = f" by {found['name']}" if found["name"] else ""
    say(f"works once{limit}, until {cli.moment(found['expires'])}; who has it can enrol a device: keep it secret")
    return Exit.OK


def _token_list(options: argparse.Namespace) -> int:
    tokens = _pages(options, "token list", "tokens", "id")
    if options.json:
        show({"tokens": tokens}, True)
        return Exit.OK
    heads = ("id", "state", "name", "device", "expires", "labels")
    cli.table(heads, [tuple(_cell(head, token[head]) for head in heads) for token in tokens])
    return Exit.OK


def _token_revoke(options: argparse.Namespace) -> int:
    show(_ask(options, verb="token revoke", name=options.id), options.json)
    return Exit.OK


def _device_list(options: argparse.Namespace) -> int:
    devices = _pages(options, "device list", "devices", "device")
    if options.json:
        show({"devices": devices}, True)
        return Exit.OK
    heads = ("device", "how", "enrolled", "expires", "denied", "labels")
    cli.table(heads, [tuple(_cell(head, device[head]) for head in heads) for device in devices])
    return Exit.OK


def _device_show(options: argparse.Namespace) -> int:
    _named_device(options.name)
    found = _ask(options, verb="device show", name=options.name)
    if not options.json:
        found |= {head: _cell(head, found[head]) for head in ("enrolled", "expires")}
        heads = ("serial", "issued", "expires", "revoked")
        rows = [tuple(_cell(head, each[head]) for head in heads) for each in found.pop("certificates")]
    show(found, options.json)
    if not options.json:
        print()
        cli.table(heads, rows)
    return Exit.OK


def _device_label(options: argparse.Namespace) -> int:
    _named_device(options.name)
    show(_ask(options, verb="device label", name=options.name, labels=options.label), options.json)
    return Exit.OK


def _device_revoke(options: argparse.Namespace) -> int:
    from aggregator import config, deny
    from shared.errors import LinkError

    _named_device(options.name)
    settings = config.load_registrar(options.config, os.environ, files=False)
    path = settings.trust.deny
    try:
        fresh = deny.add(path, options.name)
    except OSError as error:
        raise Failure(Exit.FAILED, f"{path} cannot be written: {error.strerror}; nothing was revoked") from None
    facts: dict[str, object] = {"device": options.name, "denied": True, "before": not fresh, "deny": str(path)}
    try:
        told = _ask(options, verb="denied", name=options.name)
    except LinkError as error:
        show(facts | {"crl": None}, options.json)
        text = f"it is on the deny list; the list for the broker is written when the registrar runs: {error}"
        return cli.complain("aggregator", text, Exit.TIMED_OUT)
    show(facts | {"known": told["known"], "crl": told["crl"]}, options.json)
    if not told["known"]:
        say(f"no device {options.name} is known here: is the name right? It is denied all the same")
    return Exit.OK


def _ask(options: argparse.Namespace, **request: Any) -> dict[str, Any]:
    """The running registrar's answer."""
    from aggregator import config, control

    state = config.load_registrar(options.config, os.environ, files=False).state.directory
    return control.ask_registrar(state, control.RegistrarRequest(**request))


def _pages(options: argparse.Namespace, verb: str, what: str, key: str) -> list[dict[str, Any]]:
    """All of a list, which comes in pages."""
    found: list[dict[str, Any]] = []
    while True:
        answer = _ask(options, verb=verb, name=found[-1][key] if found else "")
        found += answer[what]
        if not answer["more"]:
            return found


def _cell(head: str, value: object) -> object:
    """One value of a table, for people."""
    if head in ("expires", "enrolled", "issued", "revoked") and isinstance(value, int):
        return cli.moment(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return " ".join(f"{key}={each}" for key, each in value.items()) or "-"
    return "-" if value is None else value


def _named_device(name: str) -> None:
    if not is_name(name):
        raise Failure(Exit.USAGE, f"{name!r} cannot name a device: a-z, 0-9 and -, at most 63 characters")


# -- releases and models -----------------------------------------------------------------------------------------


def _release_build(options: argparse.Namespace) -> int:
    from aggregator import release

    if options.output.exists() and not options.force:
        raise Failure(Exit.FAILED, f"{options.output} exists; give another name, or --force to replace it")
    keys = release.fleet_keys(options.fleet, lambda path: _passphrase(options, f"of {path}"))
    limit = _message_max(options)
    now = time.time()
    start = None
    if options.start is not None:
        root = keys.root
        start = _newest_of(options, root) if str(options.start) == "newest" else _read(options.start, root)
    # The publisher's own modules are found as `python` would find them.
    sys.path.insert(0, "")
    data = release.build(
        options.model,
        options.loss,
        options.task,
        keys,
        now=now,
        limit=limit,
        seed=options.seed,
        chunk_size=options.chunk_size,
        start=start,
    )
    cli.save(options.output, data, force=options.force)
    found = release.read(data, keys.root, now)
    if options.json:
        show(found.facts() | {"file": str(options.output.absolute())}, True)
    else:
        print(f"built {found.manifest.task} version {found.manifest.version}: {options.output}, {len(data)} bytes")
    return Exit.OK


def _release_show(options: argparse.Namespace) -> int:
    root = _root(options, required=False)
    found = _read(options.file, root)
    show(found.facts(), options.json)
    return Exit.OK


def _release_publish(options: argparse.Namespace) -> int:
    from aggregator import publish
    from shared.trust import Trust

    root = _root(options, required=True)
    assert root is not None
    found = _read(options.file, root, time.time())
    settings, prefix = _operator(options)
    result = publish.publish(found, Trust(root), settings, wait=options.wait, prefix=prefix, say=say)
    task, version = found.manifest.task, found.manifest.version
    if options.json:
        facts: dict[str, object] = {"task": task, "version": version, "published": True}
        taken = isinstance(result, publish.Taken)
        show(facts | {"taken": taken} | asdict(result), True)
    if isinstance(result, publish.Taken):
        if not options.json:
            print(f"the fleet has {task} version {version}, release {result.number} ({result.digest.hex()[:16]})")
        return Exit.OK
    if options.wait <= 0:
        return Exit.OK
    text = f"published and retained; no aggregator has taken it within {options.wait:g} s: {result.why}"
    return cli.complain("aggregator", text, Exit.TIMED_OUT)


def _model_export(options: argparse.Namespace) -> int:
    from aggregator import model, release

    _named(options.task)
    root = _root(options, required=True)
    assert root is not None
    part = options.output.with_name(f".{options.output.name}.part")
    if options.release is not None:
        found, current = model.verified(release.open_file(options.release), options.task, root, time.time())
    else:
        found, current = _newest(options, options.task, root, part)
    model.write(found, options.output, force=options.force)
    part.unlink(missing_ok=True)
    if not current:
        say(f"training of {options.task} has expired; its model stays usable")
    facts = {
        "task": options.task,
        "version": found.manifest.version,
        "number": found.release.number,
        "file": str(options.output.absolute()),
        "bytes": found.release.weights.size,
        "sha256": found.release.weights.sha256,
        "metrics_of_parent": dict(found.release.metrics),
    }
    if options.json:
        show(facts, True)
    else:
        print(f"wrote release {found.release.number} of {options.task}: {options.output}, {facts['bytes']} bytes")
    return Exit.OK


# -- the daemon --------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    from aggregator import config, service

    service.run(config.load(options.config, os.environ))
    return Exit.OK


def _status(options: argparse.Namespace) -> int:
    import json

    from aggregator import config

    settings = config.load(options.config, os.environ)
    path = settings.status_file
    try:
        told = json.loads(cli.load(path, 16 << 20))
    except FileNotFoundError:
        start = f"`aggregator run --config {options.config}` or `systemctl start aggregator` starts it"
        raise Failure(Exit.UNREACHABLE, f"the aggregator is not running (no {path}); {start}") from None
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise Failure(Exit.FAILED, f"{path} is damaged; a running aggregator writes it anew")
    running = _held(settings.lock_file)
    if not options.json and isinstance(told.get("started"), int):
        told["started"] = cli.moment(told["started"])
    show({"running": running} | told, options.json)
    if not running:
        return cli.complain("aggregator", "the aggregator is not running; this is what it said last", Exit.UNREACHABLE)
    return Exit.OK


def _devices(options: argparse.Namespace) -> int:
    from aggregator import config, control
    from aggregator.store import Store

    settings = config.load(options.config, os.environ)
    store = Store(settings.database, read_only=True)
    rows: list[dict[str, Any]] = []
    try:
        more = True
        while more:
            after = rows[-1]["device"] if rows else ""
            request = control.Request("devices", after=after, waiting=options.waiting)
            answer = control.ask(settings.state.directory, request)
            last = store.last_updates([each["device"] for each in answer["devices"]])
            rows += [each | _last_update(last.get(each["device"])) for each in answer["devices"]]
            more = answer["more"]
    finally:
        store.close()
    if options.json:
        show({"devices": rows}, True)
        return Exit.OK
    heads = ("device", "state", "waits for", "heard", "last update", "version", "data sets", "certificate until")
    lines = [
        (
            row["device"],
            "eligible" if row["eligible"] else "online" if row["online"] else "offline",
            (", ".join(row["obstacles"]) or "settling") if row["online"] and not row["eligible"] else "-",
            cli.moment(row["heard"]),
            f"{row['last_task']} {row['last_round']}: {row['last_outcome']}" if row["last_task"] else "-",
            row["version"],
            ", ".join(row["datasets"]) or "-",
            cli.moment(row["certificate_expires"])[:10] if row["certificate_expires"] else "-",
        )
        for row in rows
    ]
    cli.table(heads, [tuple(cli.printable(cell) for cell in line) for line in lines])
    return Exit.OK


def _last_update(row: "Contribution | None") -> dict[str, object]:
    """A device's newest update, and its certificate's end, as that update carried it."""
    from cryptography import x509

    from shared import wire
    from shared.messages import UpdateHead

    names = ("last_task", "last_round", "last_outcome", "last_at", "certificate_expires")
    if row is None:
        return dict.fromkeys(names)
    expires = None
    if row.head:  # verified before it was stored; a rejected update leaves none
        certificate = x509.load_der_x509_certificate(wire.unpack(row.head, UpdateHead).certificate)
        expires = int(certificate.not_valid_after_utc.timestamp())
    outcome = row.outcome + (f" ({row.reason})" if row.reason else "")
    return dict(zip(names, (row.task, row.origin_round, outcome, int(row.at), expires), strict=True))


def _held(lock: Path) -> bool:
    """Whether an aggregator holds its state directory: a process id could be another's by now."""
    import fcntl

    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _task_list(options: argparse.Namespace) -> int:
    from aggregator import config
    from aggregator.store import Store

    settings = config.load(options.config, os.environ)
    store = Store(settings.database, read_only=True)
    try:
        told, now = _told(settings), time.time()
        tasks = [_task_facts(task, told, now) for task in store.tasks()]
    finally:
        store.close()
    if options.json:
        show({"tasks": tasks}, True)
    else:
        heads = ("task", "version", "release", "round", "wanted", "phase", "updates", "expires")
        cli.table(heads, [tuple("-" if task[head] is None else task[head] for head in heads) for task in tasks])
    return Exit.OK


def _config_migrate(options: argparse.Namespace) -> int:
    from shared import config, migration

    show(config.migrate(options.config, migration.AGGREGATOR), options.json)
    return Exit.OK


def _told(settings: "AggregatorConfig") -> dict[str, dict[str, object]]:
    """What the running aggregator says of each task; nothing where none runs."""
    import json

    # The file lags a second behind, and may be written anew at this moment.
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
        if _held(settings.lock_file):
            tasks = json.loads(cli.load(settings.status_file, 16 << 20)).get("tasks", {})
            return {name: told for name, told in tasks.items() if isinstance(told, dict)}
    return {}


def _task_show(options: argparse.Namespace) -> int:
    from aggregator import config
    from aggregator.store import Store

    _named(options.task)
    settings = config.load(options.config, os.environ)
    store = Store(settings.database, read_only=True)
    try:
        found = next((task for task in store.tasks() if task.name == options.task), None)
        if found is None:
            known = ", ".join(task.name for task in store.tasks()) or "none yet"
            raise Failure(Exit.REFUSED, f"there is no task {options.task} here; there are: {known}")
        told = _told(settings)
        facts = _task_facts(found, told, time.time())
        releases = store.releases(found.name, found.manifest_version, settings.limits.keep_releases)
    finally:
        store.close()
    facts |= {name: each for name, each in told.get(options.task, {}).items() if name in ("eligible", "updates")}
    facts["releases"] = [
        {
            "number": each.number,
            "created": cli.moment(each.created),
            "retained": each.withdrawn_at is None,
            "restores": each.restores,
        }
        for each in releases
    ]
    if options.json:
        show(facts, True)
        return Exit.OK
    listed = facts.pop("releases")
    show(facts, False)
    assert isinstance(listed, list)
    heads = ("number", "created", "retained", "restores")
    print()
    cli.table(heads, [tuple("-" if each[head] is None else each[head] for head in heads) for each in listed])
    return Exit.OK


def _task_pause(options: argparse.Namespace) -> int:
    return _command(options, "pause")


def _task_resume(options: argparse.Namespace) -> int:
    return _command(options, "resume")


def _task_stop(options: argparse.Namespace) -> int:
    return _command(options, "stop")


def _task_rollback(options: argparse.Namespace) -> int:
    return _command(options, "rollback")


def _command(options: argparse.Namespace, verb: Literal["pause", "resume", "stop", "rollback"]) -> int:
    """Ask the running aggregator to do something with a task."""
    from aggregator import config, control

    _named(options.task)
    state = config.load(options.config, os.environ).state.directory
    show(control.ask(state, control.Request(verb, options.task, getattr(options, "to", None))), options.json)
    return Exit.OK


def _task_facts(task: "StoredTask", told: dict[str, dict[str, object]], now: float) -> dict[str, object]:
    """A task as the database has it, and the phase that the running aggregator says it is in."""
    from shared import signing, wire
    from shared.messages import Release, TaskManifest

    # The store holds only what was verified before it was written.
    manifest = wire.unpack(task.manifest.payload, TaskManifest)
    release = wire.unpack(task.release.payload, Release)
    return {
        "task": task.name,
        "version": manifest.version,
        "release": release.number,
        "release_digest": signing.digest(task.release),
        "metrics_of_parent": dict(release.metrics),
        "round": None if task.round is None else task.round.number,
        "rounds": manifest.plan.rounds,
        "wanted": task.state,
        "phase": _phase(task, manifest, told.get(task.name, {}).get("phase"), now),
        "updates": len(task.contributions),
        "goal": manifest.plan.goal,
        "expires": cli.moment(manifest.expires),
    }


def _phase(task: "StoredTask", manifest: "TaskManifest", told: object, now: float) -> str:
    """The running aggregator's word; without one, as far as the database says it."""
    going = {"open": "collecting", "closing": "reducing"}.get("" if task.round is None else task.round.state)
    if isinstance(told, str) and told != "finished":
        return told
    if now >= manifest.expires and not going:
        return "expired"
    if told == "finished" or (not going and task.round is not None and task.round.number >= manifest.plan.rounds):
        return "finished"
    return going or ("waiting" if task.state == "active" else task.state)


def _named(task: str) -> None:
    if not is_name(task):
        raise Failure(Exit.USAGE, f"{task!r} cannot name a task: a-z, 0-9 and -, at most 63 characters")


def _backup(options: argparse.Namespace) -> int:
    from aggregator import backup, config

    if options.output.exists() and not options.force:
        raise Failure(Exit.FAILED, f"{options.output} exists; give another name, or --force to replace it")
    if not options.output.absolute().parent.is_dir():
        folder = options.output.absolute().parent
        raise Failure(Exit.FAILED, f"{options.output} cannot be written: there is no folder {folder}; make it first")
    made = backup.make(config.load(options.config, os.environ), options.output, time.time())
    tasks, blobs = made.manifest.tasks, len(made.manifest.members) - 1
    if options.json:
        facts = {"file": str(options.output.absolute()), "bytes": made.size, "tasks": tasks, "blobs": blobs}
        show(facts | {"left_out": made.left_out}, True)
    else:
        print(f"wrote {options.output}: {len(tasks)} tasks, {blobs} graphs and weights, {made.size} bytes")
    if made.left_out:
        say(f"{len(made.left_out)} older weights could not be read and are not in it: no rollback to them")
    return Exit.OK


def _restore(options: argparse.Namespace) -> int:
    from aggregator import backup, config

    settings = config.load(options.config, os.environ)
    try:
        manifest = backup.restore(settings, options.file, time.time(), force=options.force)
    except RemoteProtocolError as error:
        raise Failure(Exit.REFUSED, f"{options.file}: {error}; nothing was restored") from None
    if options.json:
        show({"directory": str(settings.state.directory), "tasks": manifest.tasks, "made": manifest.made}, True)
    else:
        print(f"restored {len(manifest.tasks)} tasks of {cli.moment(manifest.made)} into {settings.state.directory}")
        say("start the aggregator: it catches up with what the broker holds of each task, then opens new rounds")
    return Exit.OK


# -- what several commands need ----------------------------------------------------------------------------------


def _passphrase(options: argparse.Namespace, purpose: str, *, twice: bool = False) -> bytes:
    """From --passphrase-file, else from the environment, else from the terminal."""
    if options.passphrase_file is not None:
        found = cli.load(options.passphrase_file, 4096).rstrip(b"\r\n")
    elif PASSPHRASE in os.environ:
        found = os.environ[PASSPHRASE].encode()
    elif sys.stdin.isatty():
        import getpass

        found = getpass.getpass(f"passphrase {purpose}: ").encode()
        if twice and getpass.getpass("once more: ").encode() != found:
            raise Failure(Exit.FAILED, "the two passphrases differ; nothing was made")
    else:
        none = ", or --no-passphrase" if twice else ""
        raise Failure(
            Exit.USAGE, f"a passphrase {purpose} is needed: give --passphrase-file, or set {PASSPHRASE}{none}"
        )
    if not found:
        raise Failure(Exit.USAGE, f"the passphrase {purpose} is empty")
    return found


def _opening(options: argparse.Namespace, key: Path) -> bytes | None:
    """The passphrase of a key's file, or None where it has none."""
    from shared import identity

    return _passphrase(options, f"of {key}") if identity.is_encrypted(key) else None


def _root(options: argparse.Namespace, *, required: bool) -> "Root | None":
    """The fleet's root: from --root, else from the fleet folder; None where neither is there and it is not required."""
    from shared import identity

    path: Path = options.root or options.fleet / "root" / "root.msgpack"
    if not required and options.root is None and not path.exists():
        return None
    return identity.load_root(path)


def _newest(options: argparse.Namespace, task: str, root: "Root", part: Path) -> "tuple[Description, bool]":
    """The newest release of a task on the broker, verified, and whether the task may still be trained."""
    from aggregator import model, publish

    settings, prefix = _operator(options)
    current: list[bool] = []

    def check(data: bytes) -> "Description":
        found, trainable = model.verified(data, task, root, time.time())
        current.append(trainable)
        return found

    found = publish.newest(task, settings, wait=options.wait, prefix=prefix, part=part, check=check, say=say)
    return found, current[-1]


def _newest_of(options: argparse.Namespace, root: "Root") -> "Description":
    """The newest release on the broker of the task that the task file names."""
    from aggregator import task

    part = options.output.with_name(f".{options.output.name}.part")
    try:
        return _newest(options, task.load(options.task).name, root, part)[0]
    finally:
        # What is mapped stays readable.
        if os.name == "posix":
            part.unlink(missing_ok=True)


def _read(file: Path, root: "Root | None", now: float | None = None) -> "Description":
    """A release file, checked as far as root and time allow."""
    from aggregator import release

    try:
        return release.read(release.open_file(file), root, now)
    except RemoteProtocolError as error:
        if error.reason in (Reason.NOT_MSGPACK, Reason.WRONG_TYPE, Reason.EMPTY):
            advice = "name one that `aggregator release build` wrote"
            raise Failure(Exit.REFUSED, f"{file}: is no release file ({error}); {advice}") from None
        changed = "; it was changed or damaged after it was signed: take it anew, or build it again"
        advice = {
            Reason.UNKNOWN_KEY: "; it is of another fleet than --fleet names, or its publisher is not in that root",
            Reason.WRONG_DIGEST: changed,
            Reason.BAD_SIGNATURE: changed,
        }.get(error.reason, "")
        raise Failure(Exit.REFUSED, f"{file}: {error}{advice}") from None


def _operator(options: argparse.Namespace) -> "tuple[LinkSettings, str]":
    """How the operator reaches the broker, and the prefix of the fleet's topics."""
    from aggregator import ca
    from shared.mqtt import LinkSettings
    from shared.topics import SERVICE_OPERATOR

    fleet = ca.read_fleet(options.fleet)
    place = options.fleet / "operator"
    settings = LinkSettings(
        host=options.host or fleet.hosts[0],
        port=options.port or fleet.port,
        client_id=SERVICE_OPERATOR,
        ca=place / "ca.crt",
        cert=place / "operator.crt",
        key=place / "operator.key",
        message_max=fleet.message_max,
    )
    return settings, fleet.prefix


def _message_max(options: argparse.Namespace) -> int:
    """The limit on one message: --limit, else what the fleet was made with."""
    from aggregator import ca

    limit: int = options.limit or ca.read_fleet(options.fleet).message_max
    return limit


# -- options -----------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(
        prog="aggregator",
        description="Train one PyTorch model on a fleet of devices over MQTT: make the fleet, publish a model, collect "
        "and average what the devices learn.",
        examples=(
            "aggregator fleet init fleet --host broker.example.org",
            "aggregator device add sensor-1 -o sensor-1.tar.gz",
            "aggregator run --config fleet/aggregator/aggregator.toml",
            "aggregator release build model.py:Net --loss cross_entropy --task task.toml -o release.msgpack",
            "aggregator release publish release.msgpack",
        ),
    )
    cli.add_version(parser)
    groups = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    fleet = _group(groups, "fleet", "make a fleet")
    one = cli.add_command(
        fleet, "init", _fleet_init, "make a fleet's keys, certificates and configurations",
        "Make the folder of a new fleet: its CA, trust root, publisher, operator and aggregator identities, and the "
        "configuration of its broker and its aggregator. Nothing is ever overwritten.",
        "aggregator fleet init fleet --host broker.example.org",
        "aggregator fleet init fleet --host 192.0.2.7 --host broker.local --passphrase-file ~/secret",
    )  # fmt: skip
    one.add_argument("directory", type=Path, metavar="DIR", help="the folder to make")
    one.add_argument("--name", default="fleet", help="the fleet's name, a-z 0-9 and - (default: %(default)s)")
    one.add_argument(
        "--host", action="append", required=True, metavar="HOST",
        help="name or address of the broker as devices reach it; may be repeated, devices use the first",
    )  # fmt: skip
    one.add_argument("--port", type=_port, default=8883, help="the broker's port (default: %(default)s)")
    one.add_argument("--prefix", default="fl", help="first level of the fleet's topics (default: %(default)s)")
    one.add_argument(
        "--message-max", type=_size, default=64 << 20, metavar="BYTES",
        help="bytes of the largest message, which bounds the model's size (default: %(default)s)",
    )  # fmt: skip
    one.add_argument("--bind", default="", metavar="ADDRESS", help="address the broker listens on (default: all)")
    one.add_argument("--broker-home", type=Path, metavar="DIR", help="where the broker's files will lie on its host "
                     "(default: where they are made)")  # fmt: skip
    one.add_argument("--broker-data", type=Path, metavar="DIR", help="where the broker keeps its state on its host "
                     "(default: a folder beside its files)")  # fmt: skip
    one.add_argument("--broker-user", metavar="USER", help="who runs the broker on its host (default: you)")
    one.add_argument("--no-passphrase", action="store_true", help="leave the keys of CA, root and publisher open")
    _add_passphrase(one)
    cli.add_json(one)

    device = _group(groups, "device", "enrol devices")
    one = cli.add_command(
        device, "add", _device_add, "make the bundle that enrols one device",
        "Make a device's bundle: its key and certificate, the fleet's CA and trust root, and a ready agent.toml.",
        "aggregator device add sensor-1 -o sensor-1.tar.gz",
        "aggregator device add sensor-1 --fleet /srv/fleet -o bundles/sensor-1",
    )  # fmt: skip
    one.add_argument("name", metavar="NAME", help="the device's name: a-z 0-9 and -, at most 63, unique in the fleet")
    _add_output(one, "the bundle: a folder, or one archive where the name ends in .tar.gz")
    one.add_argument(
        "--days", type=_positive, default=365, help="days that the certificate is valid (default: %(default)s)"
    )
    one.add_argument("--again", action="store_true", help="issue a further certificate to a device that has one")
    _add_fleet(one)
    _add_passphrase(one)
    cli.add_json(one)

    one = cli.add_command(
        device, "list", _device_list, "list the devices that the registrar knows, one a line",
        "Print one line for each device: how it came in, until when its newest certificate is good, whether it is "
        "denied. The registrar must run.",
        "aggregator device list --json",
    )  # fmt: skip
    _add_registrar(one)
    cli.add_json(one)
    one = cli.add_command(
        device, "show", _device_show, "say all that the registrar knows of one device",
        "Print a device's labels and its certificates, newest first. The registrar must run.",
        "aggregator device show sensor-1",
    )  # fmt: skip
    one.add_argument("name", metavar="NAME", help="the device's name")
    _add_registrar(one)
    cli.add_json(one)
    one = cli.add_command(
        device, "revoke", _device_revoke, "shut a device out, at once",
        "Put a device on the deny list, which the aggregator and the registrar heed at once, and on the list of "
        "revoked certificates for the broker. An exit code of 4 means: denied, but no registrar runs to write that "
        "list. To let it in again, take it off the deny list and give it a new token.",
        "aggregator device revoke sensor-1",
    )  # fmt: skip
    one.add_argument("name", metavar="NAME", help="the device's name")
    _add_registrar(one)
    cli.add_json(one)
    one = cli.add_command(
        device, "label", _device_label, "set or remove a device's labels",
        "Set labels of a device; one without a value is removed. The registrar must run.",
        "aggregator device label sensor-1 site=graz line=3",
        "aggregator device label sensor-1 line=",
    )  # fmt: skip
    one.add_argument("name", metavar="NAME", help="the device's name")
    one.add_argument("label", nargs="+", metavar="KEY=VALUE", help="a label; KEY= removes it")
    _add_registrar(one)
    cli.add_json(one)

    token = _group(groups, "token", "let devices enrol themselves")
    one = cli.add_command(
        token, "create", _token_create, "make a token with which one device enrols itself",
        "Make a join token and print it. It works once, for `edge-agent enrol URL TOKEN`; it is shown now and never "
        "again. The registrar must run.",
        "aggregator token create --name sensor-1",
        "aggregator token create --name 'line3-*' --for 2h --label site=graz",
    )  # fmt: skip
    one.add_argument("--name", help="the device's name; or a pattern with * that its name must match (default: any "
                     "name that is free)")  # fmt: skip
    one.add_argument("--for", dest="seconds", type=cli.duration, default=86_400, metavar="TIME",
                     help="how long it works: a number with s, m, h or d (default: 24h)")  # fmt: skip
    one.add_argument("--label", action="append", default=[], metavar="KEY=VALUE",
                     help="a label that the device gets; may be repeated")  # fmt: skip
    one.add_argument("--again", action="store_true", help="the device takes the place of the one of this name, whose "
                     "certificates are revoked")  # fmt: skip
    _add_registrar(one)
    cli.add_json(one)
    one = cli.add_command(
        token, "list", _token_list, "list the tokens, one a line",
        "Print one line for each token: whether it is open, who used it, until when it works. The registrar must run.",
        "aggregator token list",
    )  # fmt: skip
    _add_registrar(one)
    cli.add_json(one)
    one = cli.add_command(
        token, "revoke", _token_revoke, "take a token back before it is used",
        "Make an open token useless. What a device got with a used one is taken back by `device revoke`.",
        "aggregator token revoke abcdefghijkl",
    )  # fmt: skip
    one.add_argument("id", metavar="ID", help="the token's id, as in `token list`: the second part of its text")
    _add_registrar(one)
    cli.add_json(one)

    broker = _group(groups, "broker", "configure the fleet's broker")
    one = cli.add_command(
        broker, "render", _broker_render, "write what a distribution's mosquitto needs to be the fleet's broker",
        "Make a folder with mosquitto.conf, the ACL, the broker's certificate and key, and a drop-in for "
        "mosquitto.service; with --crl also the units that hand the list of revoked certificates on when it changes.",
        "aggregator broker render --fleet fleet -o broker",
        "aggregator broker render -o broker --mosquitto 2.1 --crl /var/lib/fieldfare-registrar/ca.crl",
    )  # fmt: skip
    _add_output(one, "the folder to make")
    one.add_argument("--mosquitto", choices=("2.0", "2.1"), default="2.0", help="its version (default: %(default)s)")
    one.add_argument("--home", type=Path, default=Path("/etc/mosquitto/fieldfare"), metavar="DIR",
                     help="where the files will lie on its host (default: %(default)s)")  # fmt: skip
    one.add_argument("--data", type=Path, default=Path("/var/lib/mosquitto"), metavar="DIR",
                     help="where it keeps its state there (default: %(default)s)")  # fmt: skip
    one.add_argument("--user", default="mosquitto", help="who runs it there (default: %(default)s)")
    one.add_argument("--bind", default="", metavar="ADDRESS", help="address it listens on (default: all)")
    one.add_argument("--crl", type=Path, metavar="FILE", help="where the registrar writes its list of revoked "
                     "certificates on that host (default: no list)")  # fmt: skip
    _add_fleet(one)
    cli.add_json(one)

    registrar = _group(groups, "registrar", "run the service at which devices enrol and renew")
    one = cli.add_command(
        registrar, "init", _registrar_init, "make the registrar's folder out of a fleet's",
        "Make the folder of a registrar: its configuration, its server's certificate, an open copy of the CA's key "
        "and an empty list of revoked certificates. Nothing is ever overwritten.",
        "aggregator registrar init --fleet fleet --host registrar.example.org -o registrar",
    )  # fmt: skip
    one.add_argument("--host", action="append", required=True, metavar="HOST",
                     help="name or address of the registrar as devices reach it; may be repeated")  # fmt: skip
    one.add_argument("--port", type=_port, default=8443, help="where it listens (default: %(default)s)")
    one.add_argument("--bind", default="", metavar="ADDRESS", help="address it listens on (default: all)")
    _add_output(one, "the folder to make")
    _add_fleet(one)
    _add_passphrase(one)
    cli.add_json(one)
    one = cli.add_command(
        registrar, "run", _registrar_run, "run the registrar",
        "Run the registrar in the foreground until SIGTERM or SIGINT.",
        "aggregator registrar run --config registrar/registrar.toml",
    )  # fmt: skip
    _add_registrar(one)
    cli.add_migrate(registrar, _registrar_migrate, _add_registrar)

    release = _group(groups, "release", "build, check and publish models")
    one = cli.add_command(
        release, "build", _release_build, "turn a PyTorch module and a task file into one signed release file",
        "Export a PyTorch module with its loss into a signed release file, which is data and holds no code. Python "
        "code is run here, on your machine, and nowhere else. Needs PyTorch.",
        "aggregator release build model.py:Net --loss cross_entropy --task task.toml -o release.msgpack",
        "aggregator release build my.package:make --loss my.package:Loss --task task.toml -o release.msgpack --force",
    )  # fmt: skip
    one.add_argument("model", metavar="MODEL", help="package.module:attribute or file.py:attribute; an nn.Module's "
                     "class, an instance, or a function without arguments that gives one")  # fmt: skip
    one.add_argument(
        "--loss", required=True,
        help="cross_entropy, bce_with_logits, mse, l1, smooth_l1 or huber; or, named like MODEL, a module of your own "
        "that takes "
        "outputs and target and returns the loss; or own, where the model computes its loss itself: "
        "forward(*inputs, target) returns it, and forward(*inputs) the outputs",
    )  # fmt: skip
    one.add_argument("--task", type=Path, required=True, metavar="FILE", help="the task file (TOML)")
    _add_output(one, "the release file to write")
    one.add_argument("--seed", type=int, default=0, help="of the initial weights (default: %(default)s)")
    one.add_argument("--limit", type=_size, metavar="BYTES", help="bytes that one message takes (default: as in the "
                     "fleet's fleet.toml)")  # fmt: skip
    one.add_argument("--chunk-size", type=_chunk_size, default=120 << 10, metavar="BYTES",
                     help="bytes of one chunk of weights above 64 KiB; 0 sends them whole, as devices before 0.2 need "
                     "(default: %(default)s)")  # fmt: skip
    one.add_argument("--continue", dest="start", type=Path, metavar="FILE|newest",
                     help="start a new version of the task from the weights of this release file, or of the newest "
                     "release on the broker")  # fmt: skip
    one.add_argument("--wait", type=_seconds, default=10.0, metavar="SECONDS",
                     help="how long --continue newest waits for the broker (default: %(default)g)")  # fmt: skip
    _add_broker(one)
    _add_force(one)
    _add_fleet(one)
    _add_passphrase(one)
    cli.add_json(one)

    one = cli.add_command(
        release, "show", _release_show, "check a release file and say what is in it",
        "Check a release file as a device would and print what it holds. Without a fleet folder or --root the "
        "signatures are not checked, and the output says so.",
        "aggregator release show release.msgpack",
        "aggregator release show release.msgpack --root root.msgpack --json",
    )  # fmt: skip
    one.add_argument("file", type=Path, metavar="FILE", help="the release file")
    _add_root(one)
    _add_fleet(one)
    cli.add_json(one)

    one = cli.add_command(
        release, "publish", _release_publish, "publish a release file and wait until the aggregator takes it",
        "Check a release file, publish it to models/release (retained) as the fleet's operator, and wait until the "
        "aggregator announces it. An exit code of 4 means: published, but no aggregator has taken it yet.",
        "aggregator release publish release.msgpack",
        "aggregator release publish release.msgpack --wait 0",
    )  # fmt: skip
    one.add_argument("file", type=Path, metavar="FILE", help="the release file")
    one.add_argument("--wait", type=_seconds, default=30.0, metavar="SECONDS",
                     help="how long to wait for the aggregator; 0 does not wait (default: %(default)g)")  # fmt: skip
    _add_broker(one)
    _add_root(one)
    _add_fleet(one)
    cli.add_json(one)

    model = _group(groups, "model", "take a trained model home")
    one = cli.add_command(
        model, "export", _model_export, "write a task's newest weights as safetensors",
        "Fetch the newest release of a task from the broker, verify it, and write its weights as a safetensors file "
        "that Module.load_state_dict takes.",
        "aggregator model export digits -o digits.safetensors",
        "aggregator model export digits --release release.msgpack -o initial.safetensors",
    )  # fmt: skip
    one.add_argument("task", metavar="TASK", help="the task's name")
    _add_output(one, "the safetensors file to write")
    one.add_argument("--release", type=Path, metavar="FILE", help="take it from this release file, not from the broker")
    one.add_argument("--wait", type=_seconds, default=10.0, metavar="SECONDS",
                     help="how long to wait for the broker to hand it out (default: %(default)g)")  # fmt: skip
    _add_force(one)
    _add_broker(one)
    _add_root(one)
    _add_fleet(one)
    cli.add_json(one)

    one = cli.add_command(
        groups, "run", _run, "run the aggregator",
        "Run the aggregator in the foreground until SIGTERM or SIGINT; it continues where its state directory stands.",
        "aggregator run --config fleet/aggregator/aggregator.toml",
    )  # fmt: skip
    _add_config(one)

    one = cli.add_command(
        groups, "status", _status, "say what each task is doing",
        "Print what the aggregator is doing: its link, the devices, every task with its round, and what it refused. "
        "An exit code of 5 means that it is not running; what it said last is printed all the same.",
        "aggregator status --config fleet/aggregator/aggregator.toml --json",
    )  # fmt: skip
    _add_config(one)
    cli.add_json(one)

    one = cli.add_command(
        groups, "devices", _devices, "say what each device waits for",
        "Print each device that the broker remembers: whether it is there and may train or what it waits for, when it "
        "was heard last, what became of its last update (of the newest five rounds), its version and data sets.",
        "aggregator devices --config fleet/aggregator/aggregator.toml",
        "aggregator devices --waiting --json --config fleet/aggregator/aggregator.toml",
    )  # fmt: skip
    one.add_argument("--waiting", action="store_true", help="only those that are here and may not train")
    _add_config(one)
    cli.add_json(one)

    one = cli.add_command(
        groups, "backup", _backup, "write all that cannot be made again into one file",
        "Write a consistent copy of the database, with the graphs and weights that it needs, into one file. The "
        "aggregator may be running. No private key and no update of a device is in it.",
        "aggregator backup -o aggregator-2027-01-31.tar --config fleet/aggregator/aggregator.toml",
    )  # fmt: skip
    _add_output(one, "the file to write")
    _add_force(one)
    _add_config(one)
    cli.add_json(one)

    one = cli.add_command(
        groups, "restore", _restore, "bring the state directory back from a backup",
        "Check a backup to its last byte and bring the state directory to what it holds; the aggregator must not be "
        "running. Rounds that were open are over. When the aggregator starts, it first takes over what the broker "
        "knows of each task, then skips far ahead, so that devices accept what it publishes.",
        "aggregator restore aggregator-2027-01-31.tar --config fleet/aggregator/aggregator.toml",
        "aggregator restore aggregator-2027-01-31.tar --force",
    )  # fmt: skip
    one.add_argument("file", type=Path, metavar="FILE", help="what `aggregator backup` wrote")
    one.add_argument("--force", action="store_true", help="set a database that lies there aside, under another name")
    _add_config(one)
    cli.add_json(one)

    task = _group(groups, "task", "look at tasks and steer them")
    one = cli.add_command(
        task, "list", _task_list, "list the tasks, one a line",
        "Print one line for each task, read from the state directory; the aggregator need not run.",
        "aggregator task list --config fleet/aggregator/aggregator.toml",
    )  # fmt: skip
    _add_config(one)
    cli.add_json(one)
    one = cli.add_command(
        task, "show", _task_show, "say all that is known of one task",
        "Print a task's state and the releases that it can be rolled back to, from the state directory and, where the "
        "aggregator runs, from its newest word.",
        "aggregator task show digits --config fleet/aggregator/aggregator.toml",
    )  # fmt: skip
    _add_task(one)
    one = cli.add_command(
        task, "pause", _task_pause, "open no further round",
        "Let the task's open round come to its end and open no further one, until `task resume`; also over restarts.",
        "aggregator task pause digits",
    )  # fmt: skip
    _add_task(one)
    one = cli.add_command(
        task, "resume", _task_resume, "open rounds again",
        "End a pause or a stop: the next round opens as soon as enough devices are eligible.",
        "aggregator task resume digits",
    )  # fmt: skip
    _add_task(one)
    one = cli.add_command(
        task, "stop", _task_stop, "end the open round and open no further one",
        "End the task's open round without a release; devices give up what they train for it. `task resume`, or a new "
        "version of the task, goes on.",
        "aggregator task stop digits",
    )  # fmt: skip
    _add_task(one)
    one = cli.add_command(
        task, "rollback", _task_rollback, "go back to the weights of an earlier release",
        "End the task's open round and publish a new release, with the next number, that has an earlier one's weights. "
        "Training goes on from there. Without --to it is the release before the newest; after a rollback, one further.",
        "aggregator task rollback digits",
        "aggregator task rollback digits --to 7",
    )  # fmt: skip
    one.add_argument("--to", type=_number, metavar="N", help="the number of the release (see `task show`)")
    _add_task(one)

    settings = _group(groups, "config", "look after the configuration")
    cli.add_migrate(settings, _config_migrate, _add_config)
    return parser


def _add_task(parser: Parser) -> None:
    parser.add_argument("task", metavar="TASK", help="the task's name")
    _add_config(parser)
    cli.add_json(parser)


def _group(groups: "argparse._SubParsersAction[Parser]", name: str, text: str) -> "argparse._SubParsersAction[Parser]":
    group = groups.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    return group.add_subparsers(title="commands", metavar="COMMAND", required=True)


def _add_fleet(parser: Parser) -> None:
    parser.add_argument(
        "--fleet", type=Path, default=Path(os.environ.get(FLEET, "fleet")), metavar="DIR",
        help=f"the fleet's folder (default: ${FLEET}, else fleet)",
    )  # fmt: skip


def _add_passphrase(parser: Parser) -> None:
    parser.add_argument(
        "--passphrase-file", type=Path, metavar="FILE",
        help=f"file with the keys' passphrase (default: ${PASSPHRASE}, else it is asked for on the terminal)",
    )  # fmt: skip


def _add_output(parser: Parser, text: str) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PATH", help=text)


def _add_force(parser: Parser) -> None:
    parser.add_argument("--force", action="store_true", help="replace the output file where it exists")


def _add_root(parser: Parser) -> None:
    parser.add_argument("--root", type=Path, metavar="FILE", help="the trust root that must have signed (default: the "
                        "fleet folder's root/root.msgpack)")  # fmt: skip


def _add_broker(parser: Parser) -> None:
    parser.add_argument("--host", help="the broker's name or address (default: as in the fleet's fleet.toml)")
    parser.add_argument("--port", type=_port, help="the broker's port (default: as in the fleet's fleet.toml)")


def _add_config(parser: Parser) -> None:
    parser.add_argument("--config", type=Path, default=Path("/etc/fieldfare/aggregator.toml"), metavar="FILE",
                        help="the aggregator's configuration (default: %(default)s)")  # fmt: skip


def _add_registrar(parser: Parser) -> None:
    parser.add_argument("--config", type=Path, default=Path("/etc/fieldfare/registrar.toml"), metavar="FILE",
                        help="the registrar's configuration (default: %(default)s)")  # fmt: skip


def _port(text: str) -> int:
    return _whole(text, 1, 65_535)


def _size(text: str) -> int:
    return _whole(text, 65_536, (256 << 20) - 1)  # as in the daemons' configurations


def _chunk_size(text: str) -> int:
    return 0 if text == "0" else _whole(text, 1 << 10, 1 << 24)


def _number(text: str) -> int:
    return _whole(text, 0, 2**63 - 1)


def _positive(text: str) -> int:
    return _whole(text, 1, 10**9)


def _whole(text: str, low: int, high: int) -> int:
    if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 86400")
    return found


if __name__ == "__main__":
    sys.exit(main())
