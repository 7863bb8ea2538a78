"""`python -m qpeft` is `qpeft`."""

import sys

from qpeft.cli import main

sys.exit(main())
