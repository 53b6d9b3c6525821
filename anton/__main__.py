"""`python -m anton` is `anton`."""

import sys

from anton.cli import main

sys.exit(main())
