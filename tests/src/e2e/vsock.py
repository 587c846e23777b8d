"""A container's side of many connections to one port of the host. Reports in one line of JSON."""

import json
import resource
import selectors
import socket
import sys

HOST = 2
PIECE = 64 << 10


def connections(port, count):
    for index in range(count):
        connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        connection.connect((HOST, port))
        connection.sendall(index.to_bytes(4, "big"))
        connection.setblocking(False)
        yield connection


def pattern(index, length):
    return bytes((index * 7 + at) % 251 for at in range(251)) * (length // 251 + 1)


class Echo:
    """Sends its bytes, then nothing more, and reads them back."""

    def __init__(self, connection, index, length):
        self.connection, self.sent, self.got = connection, 0, bytearray()
        self.bytes = memoryview(pattern(index, length))[:length]
        self.outcome = None

    def write(self):
        self.sent += self.connection.send(self.bytes[self.sent : self.sent + PIECE])
        if self.sent == len(self.bytes):
            self.connection.shutdown(socket.SHUT_WR)
        return self.sent < len(self.bytes)

    def read(self):
        piece = self.connection.recv(PIECE)
        self.got += piece
        if not piece:
            self.outcome = "whole" if self.got == self.bytes else "broken" if not self.got else "short"


def echo(port, count, length, long_length, every):
    """Connections with an index of 2 modulo `every` have more to say than there is room for."""
    selector = selectors.DefaultSelector()
    echoes = []
    for index, connection in enumerate(connections(port, count)):
        echoes.append(Echo(connection, index, long_length if index % every == 2 else length))
        selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE, echoes[-1])
    while selector.get_map():
        for key, events in selector.select():
            one = key.data
            try:
                if events & selectors.EVENT_WRITE and one.sent < len(one.bytes) and not one.write():
                    selector.modify(key.fileobj, selectors.EVENT_READ, one)
                if events & selectors.EVENT_READ:
                    one.read()
            except BlockingIOError:
                pass
            except OSError as error:
                one.outcome = "broken" if isinstance(error, (BrokenPipeError, ConnectionResetError)) else repr(error)
            if one.outcome:
                selector.unregister(key.fileobj)
                key.fileobj.close()
    outcomes = [one.outcome for one in echoes]
    return {outcome: [index for index, other in enumerate(outcomes) if other == outcome] for outcome in set(outcomes)}


def sink(port, count, total):
    """Reads what comes, wherever it comes: `total` bytes until all are at work, and as many to count."""
    selector = selectors.DefaultSelector()
    for index, connection in enumerate(connections(port, count)):
        selector.register(connection, selectors.EVENT_READ, index)
    for _ in range(2):
        got, left = [0] * count, total
        while left > 0:
            for key, _ in selector.select():
                length = len(key.fileobj.recv(PIECE))
                got[key.data] += length
                left -= length
    return {"least": min(got), "most": max(got)}


def crowd(port, count):
    """Opens as many as there may be, and one more when they are closed."""
    opened, refused = [], 0
    for _ in range(count):
        connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            connection.connect((HOST, port))
            opened.append(connection)
        except ConnectionResetError:
            refused += 1
            connection.close()
    for connection in opened:
        connection.close()
    again = 0
    while True:
        try:
            next(connections(port, 1)).close()
            break
        except ConnectionResetError:
            again += 1
    return {"opened": len(opened), "refused": refused, "again": again}


resource.setrlimit(resource.RLIMIT_NOFILE, (10000, 10000))
mode, *numbers = sys.argv[1:]
print(json.dumps({"echo": echo, "sink": sink, "crowd": crowd}[mode](*map(int, numbers))))
