"""The `edge-agent` command: the daemon, and what its owner may ask it.

Each command imports what it needs when it runs. Nothing is decided here beyond what options mean.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edge_agent import libraries
from shared import cli
from shared.cli import Exit, Failure, Parser, show

if TYPE_CHECKING:
    from edge_agent.config import AgentConfig
    from edge_agent.install import Trainer

DEFAULT_CONFIG = Path("/etc/fieldfare/agent.toml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return cli.run(_parser(), arguments)


def _run(options: argparse.Namespace) -> int:
    from edge_agent import lean

    lean.put_off()
    from edge_agent import service

    service.run(_config(options))
    return Exit.OK


def _status(options: argparse.Namespace) -> int:
    from edge_agent import words

    return _tell(_ask(options, "status"), words.status, options.json)


def _why(options: argparse.Namespace) -> int:
    from edge_agent import words

    answer = _ask(options, "why", task=options.task)
    code = _tell(answer, words.why, options.json)
    named = answer.get("tasks", {}).get(options.task, {}).get("reasons", [])
    return Exit.REFUSED if any(each["name"] == "unknown" for each in named) else code


def _tell(answer: dict[str, Any], said: Callable[[dict[str, Any]], list[str]], as_json: bool) -> int:
    """Print an answer, for a program or in words."""
    if as_json:
        show(answer, True)
    else:
        print("\n".join(said(answer)))
    return Exit.OK


def _doctor(options: argparse.Namespace) -> int:
    from edge_agent import doctor, words

    checks = doctor.examine(options.config, os.environ)
    failed = any(each["result"] == "failed" for each in checks)
    if options.json:
        show({"ok": not failed, "checks": checks}, True)
    else:
        print("\n".join(words.doctor(checks)))
    return Exit.FAILED if failed else Exit.OK


def _bugreport(options: argparse.Namespace) -> int:
    from edge_agent import bugreport

    cli.say("collecting; this takes up to a minute")
    parts = bugreport.collect(options.config, os.environ)
    cli.save(options.output, bugreport.pack(parts, options.output), force=options.force)
    os.chmod(options.output, 0o600)
    print(f"{options.output} holds, and nothing else (read it before you send it):")
    for name, text in parts.items():
        print(f"  {name}  {len(text)} characters")
    return Exit.OK


def _enrol(options: argparse.Namespace) -> int:
    import time

    from edge_agent import enrol
    from shared.enrolment import Token
    from shared.errors import EnrolmentError

    try:
        enrol.place(options.url, time.time)
        token = Token.parse(sys.stdin.readline() if options.token == "-" else options.token)
        device = enrol.enrol(options.config, options.url, token, options.name, again=options.again, clock=time.time)
    except EnrolmentError as error:
        raise Failure(Exit.REFUSED, f"enrolment was refused: {error}") from None
    except ValueError as error:
        raise Failure(Exit.USAGE, str(error) if "address" in str(error) else f"TOKEN {error}") from None
    folder = options.config.absolute().parent
    if options.json:
        show({"device": device, "directory": str(folder), "config": str(options.config.absolute())}, True)
        return Exit.OK
    print(f"this device is {device} now; its identity is in {folder}")
    print("start it: systemctl enable --now edge-agent" + (" (or restart it, if it runs)" if options.again else ""))
    return Exit.OK


def _pause(options: argparse.Namespace) -> int:
    show(_ask(options, "pause", options.seconds), options.json)
    return Exit.OK


def _resume(options: argparse.Namespace) -> int:
    show(_ask(options, "resume"), options.json)
    return Exit.OK


def _models(options: argparse.Namespace) -> int:
    from edge_agent.shelf import Shelf

    device = _config(options, files=False).device
    shelf = Shelf(device.shelf, public=False)
    if device.shelf.exists():
        os.scandir(device.shelf).close()  # one that may not be read is not the same as an empty one
    found = shelf.models()
    rows: list[dict[str, Any]] = [
        {
            "task": model.task,
            "version": model.version,
            "release": model.release,
            "since": cli.moment(model.since),
            "metrics": dict(model.metrics),
            "examples": model.examples,
            "path": str(shelf.path(model.task)),
        }
        for model in found
    ]
    if options.json:
        show({"models": rows}, True)
        return Exit.OK
    if not rows:
        cli.say(f"no model yet in {device.shelf}: no release was accepted")
    for row in rows:
        row["metrics"] = ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items()) or "not judged here"
    names = ("task", "version", "release", "since", "metrics", "path")
    if rows:
        cli.table(names, [tuple(row[name] for name in names) for row in rows])
    return Exit.OK


def _predict(options: argparse.Namespace) -> int:
    path: Path = options.input
    kind: Literal["csv", "npz"] = "csv" if path.suffix == ".csv" else "npz"
    if path.suffix not in (".csv", ".npz"):
        raise Failure(Exit.USAGE, f"{path}: predict reads .csv and .npz files")
    shelf = _config(options, files=False).device.shelf if options.models is None else options.models
    try:
        from edge_agent import local
    except ModuleNotFoundError as error:
        advice = "`edge-agent trainer install` brings what it needs"
        raise Failure(Exit.FAILED, f"{error.name} is not installed: {advice}") from None
    model = local.load(shelf / options.task)
    answer = model.predict(model.read(path, kind))
    if options.output is None:
        sys.stdout.write(model.table(answer))
    elif options.output.suffix == ".npz":
        cli.save(options.output, local.archive(answer), force=options.force)
    else:
        cli.save(options.output, model.table(answer).encode(), force=options.force)
    return Exit.OK


def _ask(
    options: argparse.Namespace,
    verb: Literal["status", "why", "pause", "resume"],
    seconds: float | None = None,
    task: str | None = None,
) -> dict[str, Any]:
    from edge_agent import control

    # The keys need not be readable by everybody who may ask.
    return control.ask(_config(options, files=False).device.run_dir, control.Request(verb, seconds, task))


def _trainer_install(options: argparse.Namespace) -> int:
    from edge_agent import install

    made = install.install(cli.say, options.index, options.wheels, options.cuda)
    _show_trainer(made, options)
    return Exit.OK


def _trainer_remove(options: argparse.Namespace) -> int:
    from edge_agent import install

    _show_trainer(install.remove(cli.say), options)
    return Exit.OK


def _trainer_status(options: argparse.Namespace) -> int:
    from edge_agent import install

    _show_trainer(install.installed(), options)
    return Exit.OK


def _show_trainer(found: "Trainer", options: argparse.Namespace) -> None:
    show({"torch": found.version, "tested_with": found.wanted, "missing": list(found.missing)}, options.json)


def _config_check(options: argparse.Namespace) -> int:
    from edge_agent import config as settings
    from edge_agent import service
    from shared import config

    found = _config(options, files=False)
    if (hidden := settings.encrypted(found.broker.key)) is None:
        found = _config(options)
    else:
        cli.say(f"{hidden} is encrypted: the unit loads it, and whether it fits only the agent can tell")
    service.check_identity(found)
    show(config.effective(found), options.json)
    return Exit.OK


def _config_migrate(options: argparse.Namespace) -> int:
    from shared import config, migration

    show(config.migrate(options.config, migration.AGENT), options.json)
    return Exit.OK


def _config(options: argparse.Namespace, files: bool = True) -> "AgentConfig":
    from edge_agent import config

    return config.load(options.config, os.environ, files=files)


# -- options -----------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(
        prog="edge-agent",
        description="Take part in training a fleet's models with the data of this device, which never leave it.",
        examples=(
            "edge-agent run --config agent.toml",
            "edge-agent status",
            "edge-agent pause --for 2h",
        ),
    )
    cli.add_version(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    one = cli.add_command(
        commands,
        "run",
        _run,
        "run the agent",
        "Run the agent in the foreground until SIGTERM or SIGINT; under systemd this is edge-agent.service.",
        "edge-agent run --config agent.toml",
    )
    _add_config(one)

    one = cli.add_command(
        commands,
        "status",
        _status,
        "say what the running agent is doing",
        "Ask the running agent for its link, its releases, its training and what keeps it from training.",
        "edge-agent status",
        "edge-agent status --json",
    )
    _add_config(one)
    cli.add_json(one)

    one = cli.add_command(
        commands,
        "why",
        _why,
        "say why this device is not training",
        "Ask the running agent why it does not train, all tasks or TASK: each constraint with what was measured just "
        "now, what is wanted, and the setting that decides, then what else each task waits for.",
        "edge-agent why",
        "edge-agent why digits --json",
    )
    one.add_argument("task", nargs="?", metavar="TASK", help="only this task (default: all)")
    _add_config(one)
    cli.add_json(one)

    one = cli.add_command(
        commands,
        "doctor",
        _doctor,
        "look for what is wrong",
        "Check clock, keys, configuration, folders, the broker and what it permits, the kernel's help, PyTorch and the "
        "data sets, whether the agent runs or not. The exit code is 1 if something failed. Run it as root.",
        "sudo edge-agent doctor",
        "sudo edge-agent doctor --json",
    )
    _add_config(one)
    cli.add_json(one)

    one = cli.add_command(
        commands,
        "bugreport",
        _bugreport,
        "collect what a developer would ask for",
        "Write status, why, doctor, configuration, versions, the unit, its last 500 lines of log and what the kernel "
        "says of load into one archive. Keys, certificates, data and weights are never read for it; passwords, tokens "
        "and key text are taken out of all the rest. Run it as root.",
        "sudo edge-agent bugreport",
    )
    one.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("fieldfare-bugreport.tar.gz"),
        metavar="FILE",
        help="the archive (default: %(default)s)",
    )
    one.add_argument("--force", action="store_true", help="replace FILE")
    _add_config(one)

    one = cli.add_command(
        commands,
        "enrol",
        _enrol,
        "join a fleet by a token",
        "Make a key, have the fleet's registrar certify it for a token, and write the identity beside the "
        "configuration, all or nothing. After a failure the same command can be given again. The agent renews the "
        "certificate by itself.",
        "edge-agent enrol https://enrol.example.org:8443 ff1.dGVzdGlk.c2VjcmV0...",
        "edge-agent enrol https://192.0.2.7 - --name line3-press <token.txt",
    )
    one.add_argument("url", metavar="URL", help="the registrar: https://HOST or https://HOST:PORT (default port: 8443)")
    one.add_argument(
        "token",
        metavar="TOKEN",
        help="as `aggregator token create` printed it; - reads it from stdin, where no other user sees it",
    )
    one.add_argument("--name", default="", help="the device's name, where the token leaves a choice")
    one.add_argument("--again", action="store_true", help="replace the identity that is here")
    _add_config(one)
    cli.add_json(one)

    one = cli.add_command(
        commands,
        "pause",
        _pause,
        "train no more until resumed",
        "Tell the running agent to stop training and to stay paused, also after a restart, until the time is over or "
        "`edge-agent resume`.",
        "edge-agent pause",
        "edge-agent pause --for 2h",
    )
    one.add_argument(
        "--for",
        dest="seconds",
        type=cli.duration,
        metavar="TIME",
        help="for so long, such as 90s, 30m, 2h, 1d (default: until `edge-agent resume`)",
    )
    _add_config(one)
    cli.add_json(one)

    one = cli.add_command(
        commands,
        "resume",
        _resume,
        "end a pause",
        "Tell the running agent that it may train again.",
        "edge-agent resume",
    )
    _add_config(one)
    cli.add_json(one)

    one = cli.add_command(
        commands,
        "models",
        _models,
        "list the models in use on this device",
        "List the newest good model of each task, with its metrics on this device's hold-out where it was judged, and "
        "the folder in which programs find it. Run it as root or as the agent, unless local.public is set.",
        "edge-agent models",
    )
    _add_config(one)
    cli.add_json(one)

    one = cli.add_command(
        commands,
        "predict",
        _predict,
        "answer examples with a task's model",
        "Read examples from a .csv or .npz file as the task's data set has them, with or without the target, and print "
        "the model's answers: for a classifier the class, then every output. Needs PyTorch; the agent need not run.",
        "edge-agent predict digits new.csv",
        "edge-agent predict digits new.npz -o answers.npz",
    )
    one.add_argument("task", metavar="TASK", help="whose model")
    one.add_argument("input", type=Path, metavar="FILE", help="a .csv or .npz file of examples")
    one.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="where the answers go: CSV, or arrays if it ends in .npz (default: CSV on standard output)",
    )
    one.add_argument("--force", action="store_true", help="replace FILE")
    one.add_argument("--models", type=Path, metavar="DIR", help="the folder of models (default: the configuration's)")
    _add_config(one)

    group = commands.add_parser(
        "trainer",
        help="install what training needs",
        description="Install, remove or show what training needs and the agent's package does not bring: PyTorch.",
    )
    trainer = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    one = cli.add_command(
        trainer,
        "install",
        _trainer_install,
        "install PyTorch for the agent",
        "Install PyTorch and what it needs into the agent's own Python environment, at the versions that this agent "
        "was tested with, and try it. Needs root, 1.2 GB of disk and, without --wheels, a network. The running agent "
        "notices by itself.",
        "sudo edge-agent trainer install",
        "sudo edge-agent trainer install --wheels /media/usb/wheels",
    )
    one.add_argument(
        "--index",
        default=libraries.INDEX,
        metavar="URL",
        help="where to find the CPU build of PyTorch (default: %(default)s)",
    )
    one.add_argument(
        "--wheels", type=Path, metavar="DIR", help="take everything from this folder of wheels, without a network"
    )
    one.add_argument(
        "--cuda", action="store_true", help="take a build for NVIDIA's GPUs, gigabytes larger, where the index has it"
    )
    cli.add_json(one)
    one = cli.add_command(
        trainer,
        "remove",
        _trainer_remove,
        "remove PyTorch",
        "Remove what `edge-agent trainer install` installed. The agent stays, and trains no more.",
        "sudo edge-agent trainer remove",
    )
    cli.add_json(one)
    one = cli.add_command(
        trainer,
        "status",
        _trainer_status,
        "say what is installed",
        "Say which PyTorch is installed for the agent, which one it was tested with, and what is missing.",
        "edge-agent trainer status",
    )
    cli.add_json(one)

    group = commands.add_parser("config", help="look at the configuration", description="Look at the configuration.")
    settings = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    one = cli.add_command(
        settings,
        "check",
        _config_check,
        "check the configuration and print all of it",
        "Read the configuration as the agent would, with its drop-ins and FIELDFARE_SECTION__KEY variables, and print "
        "every setting, defaults included. An exit code of 78 means that it is wrong; the line says where.",
        "edge-agent config check --config agent.toml",
    )
    _add_config(one)
    cli.add_json(one)
    cli.add_migrate(settings, _config_migrate, _add_config)
    return parser


def _add_config(parser: Parser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help="the agent's configuration (default: %(default)s)",
    )


if __name__ == "__main__":
    sys.exit(main())
