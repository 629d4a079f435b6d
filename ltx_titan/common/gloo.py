"""Gloo groups with one worker thread, because two corrupt memory (torch 2.11 to 2.14).

After each operation a worker of `ProcessGroupGloo::runLoop` assigns the operation's name to a string of the group,
without a lock. With names of 16 and more characters, of which that of `_c10d_functional.all_gather_into_tensor` is one,
the string has memory of its own, which one worker frees while the other writes to it. With 64 operations in flight that
takes seconds; with one at a time, about a million operations, for the second can start before the first has left its
worker. Then a rank crashes somewhere else, or waits forever.
"""

import functools
import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist


@functools.cache
def use_one_gloo_thread() -> None:
    """Gives every gloo group that this process makes from now on a single worker thread.

    Operations of a group then run in the order in which they were started, which is the same on all ranks.
    """
    if not dist.is_gloo_available():
        return
    # Typed stubs lack the options.
    group: Any = dist.ProcessGroupGloo
    original = group.__init__

    def __init__(
        self: Any, store: dist.Store, rank: int, size: int, *options: Any, timeout: timedelta | None = None, **rest: Any
    ) -> None:
        if not options and "options" not in rest:
            own = group._Options()
            # As torch chooses them: it sets two threads for each.
            interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
            own._devices = [group.create_device(interface=name) for name in interfaces.split(",") if name] or [
                group.create_default_device()
            ]
            own._threads = 1
            if timeout is not None:
                own._timeout = timeout
            # Arguments of later versions are options, too.
            for name in tuple(rest):
                setattr(own, name, rest.pop(name))
            options = (own,)
        elif timeout is not None:
            rest["timeout"] = timeout
        original(self, store, rank, size, *options, **rest)

    # The class stays the same, which torch compares.
    group.__init__ = __init__
