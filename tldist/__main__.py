"""``python -m tldist`` and ``accelerate launch ... -m tldist``."""

from tldist.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
