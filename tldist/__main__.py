"""``python -m tldist`` and ``accelerate launch ... -m tldist``."""

import os
import sys

from tldist.cli import main

if __name__ == "__main__":
    code = main()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        raise SystemExit(code)
    # A rank leaves at once: while the interpreter is taken down, a thread of gloo that is still there aborts
    # the process now and then ("terminate called without an active exception"), after all work is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
