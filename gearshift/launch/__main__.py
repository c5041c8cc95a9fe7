"""`python -m gearshift.launch COMMAND ...` is `gearshift COMMAND ...`."""

import sys

from gearshift.launch.cli import main

sys.exit(main())
