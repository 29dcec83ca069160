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


# Windows has no SIGHUP; nohup ignores it.
_numbers = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))
SIGNALS = [n for n in _numbers if n and signal.getsignal(n) is not signal.SIG_IGN]
if os.path.basename(sys.argv[0]) in ("pretrain.py", "train_diffratio.py", "sample.py", "fid.py"):
    for _number in SIGNALS:
        signal.signal(_number, _leave)
