"""The `diptych` command: one name for every program of the package."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from diptych.errors import DiptychError

DESCRIPTION = """\
Serve large language models with prefill and decode on different processors.

  diptych up FILE          run a RoleBasedGroup manifest as processes on this machine
  diptych validate FILE    check manifests as Kubernetes would; `diptych crds` prints the definitions
  diptych serve ...        one server: --disaggregation-mode prefill, decode, or both phases
  diptych route ...        the router in front of prefill and decode servers
  diptych operator         run RoleBasedGroups on Kubernetes; `diptych rollout ...` shows and undoes updates
  diptych bench ...        measure a server or a router

`diptych COMMAND --help` tells each command's flags, defaults and units.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # Servers have parsers of their own (their flags are SGLang's); each imports only what it needs.
        if arguments[:1] == ["serve"]:
            from diptych.config import parse_server_args
            from diptych.server import run_server

            return run_server(parse_server_args(arguments[1:]))
        if arguments[:1] == ["route"]:
            from diptych.router.config import parse_router_args
            from diptych.router.main import run

            return run(parse_router_args(arguments[1:]))
        args = _parser().parse_args(arguments)
        return _handle(args)
    except DiptychError as error:
        print(f"diptych: {error.message}", file=sys.stderr)
        return 2 if error.code == "config_error" else 1
    except KeyboardInterrupt:
        return 130


def _handle(args: argparse.Namespace) -> int:
    try:
        status = int(args.handler(args))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may the interpreter's own flush fail
        return 128 + signal.SIGPIPE


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"diptych {version('diptych')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    from diptych.bench.commands import add_command
    from diptych.group.commands import add_commands
    from diptych.group.operator.commands import add_commands as add_operator_commands

    parser = argparse.ArgumentParser(
        prog="diptych", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("serve", help="one server (diptych serve --help)", add_help=False)
    commands.add_parser("route", help="the router (diptych route --help)", add_help=False)
    add_commands(commands)
    add_operator_commands(commands)
    add_command(commands)
    return parser


def entry() -> None:
    """Console script."""
    if os.getpid() == 1:  # a container's first process: the kernel drops a SIGTERM that has no handler yet
        signal.signal(signal.SIGTERM, _leave)
    sys.exit(main())


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)
