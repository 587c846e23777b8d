"""terminal.py ROWS COLUMNS INPUT COMMAND...: runs a command on a terminal of this size, types INPUT (escapes as in Python)
once the command has printed "ready", and prints what the terminal shows and the command's exit code."""

import fcntl, os, pty, struct, sys, termios

rows, columns, typed, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]
pid, master = pty.fork()
if pid == 0:
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    os.execvp(command[0], command)
seen, sent = b"", not typed
while True:
    try:
        data = os.read(master, 4096)
    except OSError:
        break
    if not data:
        break
    seen += data
    if not sent and b"ready" in seen:
        os.write(master, typed.encode().decode("unicode_escape").encode())
        sent = True
print(seen)
print("code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
