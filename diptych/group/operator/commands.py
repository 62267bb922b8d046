"""The commands `diptych operator` and `diptych rollout`. What they need (the official Kubernetes client) is an extra,
imported only when one of them runs."""

from __future__ import annotations

import argparse
from typing import Any

from diptych.errors import ConfigError

STATUS_TIMEOUT_S = 600.0


def add_commands(subparsers: Any) -> None:
    """Each sets `handler`, which takes the parsed arguments and returns an exit status."""
    text = "run the Kubernetes operator of RoleBasedGroups"
    parser = subparsers.add_parser("operator", help=text, description=text[0].upper() + text[1:] + ".")
    _add_operator(parser)
    text = "revisions of a group on Kubernetes: history, diff, undo, status, pause, resume"
    parser = subparsers.add_parser("rollout", help=text, description=text[0].upper() + text[1:] + ".")
    _add_rollout(parser)


def _add_operator(parser: argparse.ArgumentParser) -> None:
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--namespace", metavar="NS", help="watch this namespace (default: the operator's own)")
    scope.add_argument("--all-namespaces", action="store_true", help="watch all namespaces; needs a ClusterRole")
    _add_kubeconfig(parser)
    parser.add_argument(
        "--bind", metavar="HOST:PORT", default="0.0.0.0:8080", help="/metrics, /healthz, /readyz (default: %(default)s)"
    )
    parser.add_argument("--workers", metavar="N", type=int, default=4, help="groups worked on at a time (default: 4)")
    parser.add_argument(
        "--no-leader-election", action="store_true", help="work without a Lease; only when no other operator runs"
    )
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="default: %(default)s"
    )
    parser.set_defaults(handler=_run_operator)


def _add_rollout(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    for name, text in (
        ("history", "list the revisions of a group's spec"),
        ("diff", "show what a revision would change"),
        ("undo", "return to a revision; replicas stay as they are"),
        ("status", "wait until an update is complete; exit status 1 if it fails"),
        ("pause", "hold updates of all roles"),
        ("resume", "let held updates go on"),
    ):
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        action.add_argument("group", metavar="GROUP")
        action.add_argument("-n", "--namespace", metavar="NS", help="default: the kubeconfig's")
        _add_kubeconfig(action)
        if name in ("diff", "undo"):
            action.add_argument("--revision", metavar="N", type=int, help="default: the one before the newest")
        if name == "status":
            action.add_argument(
                "--timeout", metavar="S", type=float, default=STATUS_TIMEOUT_S, help="seconds (default: %(default)g)"
            )
        action.set_defaults(handler=_run_rollout)


def _add_kubeconfig(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kubeconfig", metavar="FILE", help="how to reach the cluster (default: in-cluster, else $KUBECONFIG)"
    )


def _run_operator(args: argparse.Namespace) -> int:
    _need_client()
    from diptych.group.operator.main import run_operator

    return run_operator(args)


def _run_rollout(args: argparse.Namespace) -> int:
    _need_client()
    from diptych.group.operator.rollout import run_rollout

    return run_rollout(args)


def _need_client() -> None:
    try:
        import kubernetes  # noqa: F401
    except ImportError:
        raise ConfigError('this command needs the Kubernetes client: pip install "diptych[operator]"') from None
