"""Imported before PyTorch by each script: how its CPU threads wait, and Ctrl-C during start-up."""

import os
import signal
import sys

# Threads that wait for each other spin for so many rounds and then sleep. By default they spin for
# much longer, which costs most of the speed on a machine with other work (docs/reproducibility.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _leave(number, frame):
    os.write(2, b"stopped before the start; nothing was changed\n")
    os._exit(128 + number)


if os.path.basename(sys.argv[0]) in ("pretrain.py", "train_diffratio.py", "sample.py", "fid.py"):
    for _name in ("SIGINT", "SIGTERM", "SIGHUP"):
        _number = getattr(signal, _name, None)  # Windows has no SIGHUP
        if _number and signal.getsignal(_number) is not signal.SIG_IGN:
            signal.signal(_number, _leave)
