"""`python -m rednet` is the command `rednet`."""

import sys

from rednet.service.cli.parser import main

sys.exit(main())
