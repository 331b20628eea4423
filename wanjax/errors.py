"""Errors that a person is meant to read: one sentence with the fact and the remedy, exit code 2."""

import difflib
import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence


class UserError(Exception):
    """Something the user can mend. The message is one sentence: what is wrong, and what to do."""


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> str:
    """A clause such as "; did you mean 'cross_attn'?" for a mistyped name, or the full choice."""
    candidates = sorted(candidates)
    close = difflib.get_close_matches(name, candidates, n=n, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    if len(candidates) > 16:
        return "; none of the names known here is like it, check what was given."
    return "; choose from " + ", ".join(candidates) + "."


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many others there are."""
    others = len(names) - most
    listed = ", ".join(names[:most])
    return f"{listed} and {others} other{'s' * (others > 1)}" if others > 0 else listed


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UserError` becomes one line on stderr and exit code 2, and so does
    any file or folder that may not be used.

    Ctrl-C (130) and SIGTERM (143) unwind as an error does, so that nothing half written stays.
    """
    signal.signal(signal.SIGTERM, _terminate)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except PermissionError as error:
        sys.stderr.write(f"error: {error.filename} may not be used; change its permissions.\n")
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        sys.stderr.write(f"error: {error.filename} is too long a name; choose a shorter one.\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        _leave(130)
    except _Terminated as stop:
        _leave(stop.code)


def _leave(code: int) -> None:
    """All is cleaned up. Python's own way out would now wait for, or crash in, the threads of a
    compilation that was interrupted."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Terminated(SystemExit):
    """SIGTERM came."""


def _terminate(*_: object) -> None:
    raise _Terminated(128 + signal.SIGTERM)
