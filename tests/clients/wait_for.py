"""Waits until somebody serves on the Unix socket that is named."""

import socket
import sys
import time

until = time.monotonic() + 60
while True:
    try:
        socket.socket(socket.AF_UNIX).connect(sys.argv[1])
        break
    except OSError:
        if time.monotonic() > until:
            sys.exit(f"nobody serves on {sys.argv[1]}")
        time.sleep(0.01)
