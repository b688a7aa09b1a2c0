"""For all tests, before any of them imports numpy."""

import os

# As the command line does: else every product of matrices waits for threads that spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
