"""The one error a demo script shows people: what happened, where, and how to mend it."""

import sys


class Problem(Exception):
    """Something the user can put right. Everything else is a bug and keeps its traceback."""

    def __init__(self, what, where, mend):
        super().__init__(what)
        self.what, self.where, self.mend = what, where, mend

    def __str__(self):
        return f"error: {self.what}\n  where: {self.where}\n  mend:  {self.mend}"


def run_main(main):
    """Runs main(); a Problem becomes its three lines on stderr and exit status 1."""
    try:
        try:
            sys.exit(main())
        except ModuleNotFoundError as error:
            raise Problem(
                f"the Python module {error.name} is missing",
                sys.executable,
                "Run `source tools/setup`, then this script with $TAILOR_VENV/bin/python.",
            ) from None
    except Problem as problem:
        print(problem, file=sys.stderr)
        sys.exit(1)
