import sys

from sparse_gen.cli import main

sys.exit(main())
