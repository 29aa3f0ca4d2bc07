"""`python -m keel.verify.peers` writes docs/peers.md; some three minutes."""

import argparse
import sys
from pathlib import Path

from keel.core.errors import KeelError, UserError


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m keel.verify.peers", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/peers.md"), help="the page (docs/peers.md)")
    path: Path = parser.parse_args(arguments).output
    try:
        if not path.parent.is_dir():
            raise UserError("there is no such folder", str(path.parent), "Run it where docs/ is, or give --output.")
        path.write_text(_page(), encoding="utf-8")
    except KeelError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"wrote {path}")
    return 0


def _page() -> str:
    from keel.verify.peers.table import page

    try:
        return page()
    except ImportError as error:
        raise UserError(f"{error}", "keel.verify.peers", 'Install them: pip install "keel-rl[peers]".') from error


if __name__ == "__main__":
    sys.exit(main())
