"""Runs in a container with everything that its kernel gives it: looks for somebody who answers on vsock.

The arguments are the first and the last but one of the host's ports that are all tried.

Prints one JSON object: what could be connected to, what else happened to the dials, what could be bound, and who came.
"""

import collections
import errno
import fcntl
import json
import select
import socket
import struct
import sys

ANY = 0xFFFFFFFF
# Reserved ones, the host's, its own, others' (vsock(7)), and every one that a comparison could get wrong.
CIDS = [0, 1, 2, 3, 4, 5, 42, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, ANY]
RUNTIME = list(range(1020, 1032))
# Where the host's own connections come from, and what services of other systems listen on.
OTHERS = [0, 1, 22, 80, 514, 2375, 5000, 9999, 0x7FFFFFFF, 0xBFFFFFFF, *range(0xC0000000, 0xC0000010), ANY - 1, ANY]


def name(error):
    return errno.errorcode.get(error.errno, str(error))


def dial(cid, port, kind=socket.SOCK_STREAM, source=None):
    """The name of the error, or None for a connection."""
    try:
        with socket.socket(socket.AF_VSOCK, kind) as connection:
            if source is not None:
                connection.bind((ANY, source))
            connection.settimeout(20)
            connection.connect((cid, port))
            return None
    except OSError as error:
        return name(error)


class Dials:
    def __init__(self):
        self.open = []
        self.outcomes = collections.Counter()

    def try_all(self, targets, **how):
        for cid, port in targets:
            outcome = dial(cid, port, **how)
            self.outcomes[outcome or "open"] += 1
            if outcome is None:
                self.open.append([cid, port])


def dial_all():
    dials = Dials()
    dials.try_all((2, port) for port in range(int(sys.argv[1]), int(sys.argv[2])))
    dials.try_all((cid, port) for cid in CIDS for port in [*RUNTIME, *OTHERS])
    # From ports that mean something to the host: its own side of connections that are open.
    for source in (1023, 0xC0000000, 0xC0000001, 0xC0000002):
        dials.try_all(((2, port) for port in RUNTIME), source=source)
    for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_RAW):
        dials.try_all(((cid, port) for cid in CIDS for port in (1023, 1024, 1025)), kind=kind)
    return dials


def flood():
    """Starts many connections at once and waits for none of them."""
    started = 0
    for _ in range(2):
        sockets = []
        for port in range(300):
            connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            connection.setblocking(False)
            connection.connect_ex((2, 1024 + port % 3 if port % 2 else 10000 + port))
            sockets.append(connection)
        started += len(sockets)
        for connection in sockets:
            connection.close()
    return started


def bind_all():
    """Listens wherever it can; the sockets, and what was refused."""
    listeners, refused = [], {}
    for cid in (ANY, 3, 2, 1, 0):
        for port in [*RUNTIME, 2000, 0xC0000000, 0xC0000001, 0xC0000002]:
            listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            try:
                listener.bind((cid, port))
                listener.listen()
                listeners.append(listener)
            except OSError as error:
                refused[f"{cid}:{port}"] = name(error)
    return listeners, refused


def own_cid():
    """By the device; its node is made by hand, as a container's /dev has none (miscdevice, IOCTL_VM_SOCKETS_GET_LOCAL_CID)."""
    with open("/proc/misc") as lines:
        minors = [int(line.split()[0]) for line in lines if line.split()[1] == "vsock"]
    if not minors:
        return None
    import os
    import stat

    os.mknod("/dev/vsock", 0o600 | stat.S_IFCHR, os.makedev(10, minors[0]))
    with open("/dev/vsock", "rb") as device:
        return struct.unpack("I", fcntl.ioctl(device, 0x7B9, b"\0" * 4))[0]


listeners, refused = bind_all()
dials = dial_all()
flooded = flood()
# Nobody comes, not even while the host goes on speaking to the agent.
came, _, _ = select.select(listeners, [], [], 1)
print(json.dumps({
    "open": dials.open,
    "outcomes": dials.outcomes,
    "listening": len(listeners),
    "refused": refused,
    "came": len(came),
    "flooded": flooded,
    "cid": own_cid(),
}))
