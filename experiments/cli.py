"""Config fields to flags, and the manners of every program: one line for an error, exit 2, no traceback."""

from __future__ import annotations

import argparse
import errno
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, NoReturn

from lm.config import PRESETS, SECTIONS, Config
from lm.errors import DivergedError, LostRankError, UserError, masked

_MENDABLE = {
    errno.ENOSPC: "the disk must have room",
    errno.EDQUOT: "the disk must have room",
    errno.EROFS: "files must be writable",
    errno.EACCES: "files must be readable and writable",
}
"""Errors of the operating system that a person can mend, and their rule."""


class Parser(argparse.ArgumentParser):
    """argparse with whole flag names only, and errors of one line that name the nearest flag."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong as a UserError."""
        raise UserError(f"{message}. Try --help.")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse all of `argv`.

        Raises:
            UserError: an unknown flag (with the nearest known one), or a value of the wrong kind.
        """
        for argument in sys.argv[1:] if argv is None else argv:
            if not argument.isprintable():
                raise UserError(f"flags must be printable UTF-8 text: got {ascii(argument)[:60]}. Try --help.")
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            near = get_close_matches(unknown[0].split("=")[0], flags, n=1)
            raise UserError(
                f"flags must be ones that --help lists: got {unknown[0]}. Try {near[0] if near else '--help'}."
            )
        return namespace


def add_config_flags(parser: Parser, **changed_defaults: Any) -> None:
    """Add `--preset` and a flag for every config field; only flags that are given reach the namespace.

    Args:
        parser: the program's parser.
        changed_defaults: fields whose default this program changes, shown in its help.
    """
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        default=None,
        help="reference recipe, the best found for its width and depth, or a tiny model for a first look",
    )
    for section in SECTIONS:
        group = parser.add_argument_group((section.__doc__ or "").split("\n")[0])
        for field in fields(section):
            default: Any = changed_defaults.get(field.name, field.default)
            options: dict[str, Any] = {
                "default": argparse.SUPPRESS,
                "help": f"{field.metadata['help']} (default: {default})".replace("%", "%%"),
                "dest": field.name,
            }
            if isinstance(default, bool):
                options["action"] = argparse.BooleanOptionalAction
            else:
                options |= {"type": type(field.default), "metavar": type(field.default).__name__.upper()}
                if field.metadata["choices"]:
                    options |= {"choices": field.metadata["choices"], "metavar": None}
            group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def add_probe_flag(parser: Parser) -> None:
    """Add `--probe`, which may be given several times."""
    parser.add_argument(
        "--probe",
        action="append",
        default=[],
        metavar="TEXT",
        help="also keep attention on this text at each epoch; may be given several times",
    )


def given(namespace: argparse.Namespace) -> dict[str, Any]:
    """The config fields that were set by a flag."""
    return {f.name: getattr(namespace, f.name) for s in SECTIONS for f in fields(s) if hasattr(namespace, f.name)}


def config_of(namespace: argparse.Namespace, **changed_defaults: Any) -> Config:
    """The config: the program's defaults, then the preset, then the flags that were given."""
    return Config.from_flat({**changed_defaults, **PRESETS[namespace.preset or "reference"], **given(namespace)})


def require_free(port: int, host: str = "127.0.0.1") -> None:
    """Raise UserError where something listens on the port already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as e:
            raise UserError(f"the port must be free: got {port} ({e}). Try --port 5050.") from e


def is_terminal() -> bool:
    """Whether a person is watching: bars then, lines otherwise."""
    return sys.stderr.isatty()


def duration(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def run(main: Callable[[], None]) -> NoReturn:
    """Run a program: exit 0; 2 with one line for what the user can mend; 1 for a failed training; 130 interrupted.

    SIGTERM and SIGHUP are treated as an interrupt, so that a run is closed with its true status.
    """

    def interrupt(signum: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) != signal.SIG_IGN:  # nohup asks for that
            signal.signal(ending, interrupt)
    name = sys.argv[0].rsplit("/", 1)[-1]
    try:
        main()
    except UserError as e:
        print(f"{name}: {masked(str(e))}", file=sys.stderr)
        sys.exit(2)
    except (DivergedError, LostRankError, MemoryError) as e:
        print(f"{name}: {e}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as e:
        if e.errno not in _MENDABLE:
            raise
        where = f": {e.filename}" if e.filename else ""
        print(
            f"{name}: {_MENDABLE[e.errno]}: got {e.strerror}{where}. Try LM_MLRUNS_DIR=/another/folder.",
            file=sys.stderr,
        )
        sys.exit(2)
    except Exception as e:
        if "disk is full" not in str(e):  # as SQLite says it, through whatever wraps it
            raise
        print(
            f"{name}: {_MENDABLE[errno.ENOSPC]}: got a full disk. Try LM_MLRUNS_DIR=/another/folder.", file=sys.stderr
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; what was logged is kept.", file=sys.stderr)
        sys.exit(130)
    finally:
        for ending in (signal.SIGTERM, signal.SIGHUP):  # nothing is left to be closed
            if signal.getsignal(ending) is interrupt:
                signal.signal(ending, signal.SIG_DFL)
    sys.exit(0)
