"""Several ``flwr`` commands in one process, since ``flwr`` takes seconds to load.

Standard input has one JSON list of arguments a line.
"""

from __future__ import annotations

import json
import sys

END = "\x1e"  # follows the output of each command


def main() -> None:
    """Run the commands; one that fails does not stop the others."""
    from flwr.cli.app import app

    for line in sys.stdin:
        try:
            app(json.loads(line), standalone_mode=False)
        except (Exception, SystemExit) as error:
            print(f"{type(error).__name__}: {error}")
        print(END, flush=True)


if __name__ == "__main__":
    main()
