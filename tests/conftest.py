"""Small networks are fastest on one thread, and stay fast beside other work on the machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads, and for processes the tests start
