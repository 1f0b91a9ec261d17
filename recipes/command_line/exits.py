"""How a command ends, but for success: one line, and a code."""

from __future__ import annotations

import sys

INTERRUPTED = 130
WRONG = 1


def fail(message: str, code: int) -> int:
    """Say it; the code."""
    print(f"atlas-blocks: {' '.join(message.split())}", file=sys.stderr)
    return code
