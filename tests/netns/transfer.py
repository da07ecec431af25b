#!/usr/bin/env python3
"""transfer.py BYTES: host 1 of two_hosts.sh sends BYTES to host 0, which prints their number and the
seconds they took. With --wait host 0 then waits for more, at most 20 s, and says what it met."""

import os
import socket
import sys
import time

count = int(sys.argv[1])
wait = "--wait" in sys.argv
port = int(os.environ["MASTER_PORT"])
if os.environ["RANK"] == "0":
    server = socket.create_server(("", port))
    peer, address = server.accept()
    peer.settimeout(20)
    begin, got = time.monotonic(), 0
    while got < count:
        got += len(peer.recv(1 << 20))
    print(f"{got} bytes in {time.monotonic() - begin:.3f} s from {address[0]}", flush=True)
    if wait:
        peer.settimeout(4)
        try:
            print("closed" if peer.recv(1) == b"" else "more")
        except TimeoutError:
            print("silence")
else:
    end = time.monotonic() + 20
    while True:
        try:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=5)
            break
        except OSError:
            if time.monotonic() > end:
                sys.exit(69)
            time.sleep(0.05)
    peer.settimeout(20)
    peer.sendall(bytes(count))
    if wait:
        time.sleep(3)
