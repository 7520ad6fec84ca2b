import sys

from .segment import main

sys.exit(main())
