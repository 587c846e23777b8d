"""Both ends of many TCP connections at once.

    traffic.py serve FILE           gives back what it gets; FILE has the number of connections that are open
    traffic.py hold HOST COUNT      opens as many, has a byte there and back on each, and keeps them to the end of its input
"""

import errno
import os
import resource
import select
import socket
import sys

# One address of a client has some 28,000 ports for each of the server's.
PORTS = range(8000, 8008)
AT_ONCE = 512
PATIENCE = 60


def serve(file):
    epoll, listeners, open_now, told = select.epoll(), {}, {}, None
    for port in PORTS:
        listener = socket.create_server(("", port), backlog=4096)
        listener.setblocking(False)
        listeners[listener.fileno()] = listener
        epoll.register(listener, select.EPOLLIN)
    while True:
        for fd, _ in epoll.poll(0.5):
            if fd in listeners:
                connection, _ = listeners[fd].accept()
                open_now[connection.fileno()] = connection
                epoll.register(connection, select.EPOLLIN)
            elif data := open_now[fd].recv(64):
                open_now[fd].sendall(data)
            else:
                open_now.pop(fd).close()
        if told != len(open_now):
            told = len(open_now)
            with open(file + ".new", "w") as new:
                print(told, file=new)
            os.rename(file + ".new", file)


def until(connections, event):
    poll = select.poll()
    for connection in connections:
        poll.register(connection, event)
    waiting = len(connections)
    while waiting:
        ready = poll.poll(PATIENCE * 1000)
        if not ready:
            sys.exit(f"{waiting} of {len(connections)} are not ready after {PATIENCE} s")
        for fd, _ in ready:
            poll.unregister(fd)
            waiting -= 1


def some(host, first, count):
    connections = []
    for index in range(first, first + count):
        connection = socket.socket()
        connection.setblocking(False)
        error = connection.connect_ex((host, PORTS[index % len(PORTS)]))
        if error not in (0, errno.EINPROGRESS):
            sys.exit(f"connection {index}: {os.strerror(error)}")
        connections.append(connection)
    until(connections, select.POLLOUT)
    for index, connection in enumerate(connections, first):
        if error := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            sys.exit(f"connection {index}: {os.strerror(error)}")
        connection.sendall(bytes([index % 251]))
    until(connections, select.POLLIN)
    for index, connection in enumerate(connections, first):
        if connection.recv(64) != bytes([index % 251]):
            sys.exit(f"connection {index}: another byte")
    return connections


def hold(host, count):
    held = []
    while len(held) < count:
        held += some(host, len(held), min(AT_ONCE, count - len(held)))
        print("held", len(held), flush=True)
    sys.stdin.read()


_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
if sys.argv[1] == "serve":
    serve(sys.argv[2])
else:
    hold(sys.argv[2], int(sys.argv[3]))
