"""Run the command line: `python -m depth_anything` is `depth-anything`."""

import sys

from depth_anything.cli import main

if __name__ == "__main__":
    sys.exit(main())
