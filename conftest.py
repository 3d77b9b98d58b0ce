"""For every test of the repository: one thread.

Small tensors are slower on two threads than on one, twenty times slower where the second core is busy. Set
before torch is imported, and inherited by the commands that tests start.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
