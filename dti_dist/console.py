"""What a person sees while a command runs: progress on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from tqdm import tqdm

from dti_dist.redaction import redact

_SECONDS_BETWEEN_LINES = 10.0


def say(message: str) -> None:
    """Print one line to stderr at once; stdout stays free for a command's result.

    Credentials are hidden here, so that no message needs to think of them.
    """
    tqdm.write(redact(message), file=sys.stderr)
    sys.stderr.flush()


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)
) -> str:
    """Rows as aligned text, two spaces between columns; those not in `left` are right-aligned."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


class Progress:
    """Counts units of work; draws a bar on a terminal and prints a line now and then elsewhere."""

    def __init__(self, label: str, total: int | None, unit: str, visible: bool = True):
        self.label, self.total, self.unit, self.visible = label, total, unit, visible
        self.count = 0
        self._last_line = time.monotonic()
        self._bar = (
            tqdm(total=total, desc=label, unit=f" {unit}", unit_scale=True, leave=False)
            if visible and sys.stderr.isatty()
            else None
        )

    def advance(self, amount: int = 1) -> None:
        self.count += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif self.visible and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            of_total = f" of {self.total:,}" if self.total else ""
            say(f"{self.label}: {self.count:,}{of_total} {self.unit}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def progress(
    label: str, total: int | None = None, unit: str = "rows", visible: bool = True
) -> Iterator[Progress]:
    """``with progress("reading", 1000, "files") as bar: bar.advance()``; ranks but one hide it."""
    bar = Progress(label, total, unit, visible)
    try:
        yield bar
    finally:
        bar.close()


@contextmanager
def without_library_chatter() -> Iterator[None]:
    """Hide what libraries print while they load or save: bars in logs, lines where results go."""
    chatter = io.StringIO()
    try:
        with redirect_stdout(chatter), redirect_stderr(chatter):
            yield
    except BaseException:
        sys.stderr.write(redact(chatter.getvalue()))
        raise
