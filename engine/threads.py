"""How an engine's threads share the processor with each other and with the thread that serves.

A pass through a small model is a few hundred parallel regions, and a thread that has done its part of one waits for the others. Where
it sleeps at once, waking it costs some 50 us each time; where it spins as long as libgomp likes (300,000 turns), it takes the core of the
very thread it waits for as soon as anything else is running. Milliseconds a pass, SmolLM2-135M in float32 on 2 cores, beside another
program that is idle, busy a third of the time, and busy all the time:

    sleep at once            44    70    49
    spin 10,000 turns        36    60   134
    the same, nice 10        36    40    40    the other program's priority, not ours
    spin as libgomp does     36         570

So they spin for 10,000 turns (about half a millisecond), and the thread that serves gives way. Tokens a second of one stream through the
server, quiet and while others ask it for thousands of small things a second, so that its thread is always busy:

    sleep at once                          20    20
    spin 10,000 turns                      25     7
    the same, the thread gives way         23    15    as it is
    the same, at nice 10                   24    10

Where such floods or busy neighbours are the rule, set OMP_WAIT_POLICY=passive, or give the engine one thread fewer than there are cores
(`engine.threads`): one thread takes 43 ms a pass beside anything.
"""

from __future__ import annotations

import logging
import os
import sys

_log = logging.getLogger(__name__)
_SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def defaults() -> dict[str, str]:
    """Environment variables for a process that is to load torch; none where the user has set one of them."""
    return {} if any(name in os.environ for name in _SPINNING) else {_SPINNING[0]: "10000"}


def set_defaults() -> None:
    """For this process. Read when torch is loaded."""
    os.environ.update(defaults())


def give_way() -> None:
    """Let the engine's threads go before the calling one and those that it starts from now on.

    Only Linux has priorities of threads. Where it refuses, as sandboxes and some C libraries do, that is said and all else goes on.
    """
    if sys.platform == "linux":
        try:
            os.setpriority(os.PRIO_PROCESS, 0, 19)
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # it does not interrupt others when it wakes
        except OSError as error:
            _log.warning("The thread that serves cannot give way to those of the engine: %s", error.strerror)
