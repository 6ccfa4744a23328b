"""`python -m vivace` is the `vivace` command."""

import sys

from vivace.cli import main

sys.exit(main())
