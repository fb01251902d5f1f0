"""Commands of ``flwr`` in one process, as it takes seconds to load: JSON lists of arguments on standard input, one a line."""

from __future__ import annotations

import json
import sys

END = "\x1e"  # after what each command printed


def main() -> None:
    """One that fails does not stop the others."""
    from flwr.cli.app import app

    for line in sys.stdin:
        try:
            app(json.loads(line), standalone_mode=False)
        except (Exception, SystemExit) as error:
            print(f"{type(error).__name__}: {error}")
        print(END, flush=True)


if __name__ == "__main__":
    main()
