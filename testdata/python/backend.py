"""A backend for the end-to-end tests, a process of its own, written with websockets
(Debian's, version 10). Command line, behaviour and record are those of
internal/e2e/backend, as far as it has them:

    /usr/bin/python3 backend.py -listen 127.0.0.1:21000 -name a -record a.jsonl -term-code 1001

and echo=1 and stream=<bytes per second> in a request's query. The library answers pings
ahead of the application, for which it queues up to 32 messages.
"""

import argparse
import asyncio
import base64
import json
import os
import signal
import sys
import threading
import time
import urllib.parse

import websockets

CLOSE_TIMEOUT = 5  # seconds after SIGTERM, for the peers' close frames
STREAM_INTERVAL = 0.02


class Record:
    """The record. Its writes go to the kernel one by one, so that a process that is
    killed has recorded all that it has done."""

    def __init__(self, path):
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        size = os.fstat(self.file).st_size
        if size > 0 and os.pread(self.file, 1, size - 1) != b"\n":
            os.write(self.file, b"\n")  # a line that was cut short by a kill stays one of its own
        self.add(event="start")

    def add(self, **line):
        line = {"time": time.time_ns(), "pid": os.getpid(), **line}
        os.write(self.file, json.dumps(line).encode() + b"\n")


class Backend:
    def __init__(self, args):
        self.args = args
        self.record = Record(args.record)
        self.last = 0  # number of the latest connection
        self.stopping = False
        self.running = set()  # the tasks of the connections
        self.goodbyes = set()  # of tasks nobody else holds, one might be collected
        self.open = set()

    async def serve(self, ws):
        self.last += 1
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(ws.path).query)
        about = {"seq": self.last, "conn": ws.request_headers.get("Holdfast-Connection", "")}
        self.record.add(event="open", resume=ws.request_headers.get("Holdfast-Resume", ""), **about)
        self.running.add(asyncio.current_task())
        self.open.add(ws)
        if self.stopping:
            self.goodbye(ws)
        rate = int(query.get("stream", ["0"])[0])
        streaming = asyncio.create_task(self.stream(ws, about["seq"], rate)) if rate > 0 else None
        try:
            # Recv goes on after our own close frame, until the peer's has come.
            while True:
                data = await ws.recv()
                if isinstance(data, str):
                    self.record.add(event="text", text=data, **about)
                else:
                    self.record.add(event="binary", binary=base64.b64encode(data).decode(), **about)
                if "echo" in query and ws.open:  # else send waits until it is closed
                    await ws.send(data)
        except websockets.ConnectionClosed as closed:
            code = closed.rcvd.code if closed.rcvd else 1006
            self.record.add(event="closed", code=code, **about)
        finally:
            if streaming:
                streaming.cancel()
            self.open.discard(ws)
            self.running.discard(asyncio.current_task())

    async def stream(self, ws, seq, rate):
        """Sends messages "<backend> <seq> <n>", n from 0, filled up with dots to what
        the rate asks for by then."""
        began, sent, n = time.monotonic(), 0, 0
        while True:
            await asyncio.sleep(STREAM_INTERVAL)
            due = int(rate * (time.monotonic() - began)) - sent
            text = f"{self.args.name} {seq} {n}"
            if due < len(text):
                continue
            try:
                await ws.send(text.ljust(due, "."))
            except websockets.ConnectionClosed:
                return
            sent += due
            n += 1

    def goodbye(self, ws):
        reason = f"backend {self.args.name} is stopping"
        task = asyncio.create_task(ws.close(self.args.term_code, reason))
        self.goodbyes.add(task)

    async def run(self):
        host, _, port = self.args.listen.rpartition(":")
        term = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, term.set)
        server = await websockets.serve(
            self.serve, host, int(port), max_size=None, close_timeout=2 * CLOSE_TIMEOUT
        )
        print(f"{host}:{server.sockets[0].getsockname()[1]}", flush=True)
        await term.wait()
        self.stopping = True
        server.server.close()  # only the listener; the library's own close says 1001 to all
        for ws in self.open:
            self.goodbye(ws)
        if self.running:
            await asyncio.wait(self.running, timeout=CLOSE_TIMEOUT)
        os._exit(0)


def die_with_parent():
    sys.stdin.buffer.read()
    os._exit(1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-listen", default="127.0.0.1:0")
    parser.add_argument("-name", default="backend")
    parser.add_argument("-record", default=os.devnull)
    parser.add_argument("-term-code", dest="term_code", type=int, default=1012)
    args = parser.parse_args()
    threading.Thread(target=die_with_parent, daemon=True).start()
    asyncio.run(Backend(args).run())


main()
