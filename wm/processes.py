"""A process that ends with the one that started it, whatever ends that one."""

import ctypes
import sys

PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


def end_with_parent(number: int) -> None:
    """Ask Linux for a signal when the parent ends; elsewhere nothing is asked.

    A parent that has ended already sends none: look at os.getppid() afterwards where that may be.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
