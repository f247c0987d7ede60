"""In place of `lsgd`: its processes sleep, and it writes what they would if they trained."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def launch(run, processes):
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    (run / "members").mkdir(parents=True)
    children, lives, steps = [None] * processes, [0] * processes, [0] * processes

    def log(worker, event, **values):
        event = {"event": event, "worker": worker, "life": lives[worker], "time": time.time(), "step": 0} | values
        with (run / f"events-{worker}.jsonl").open("a") as events:
            events.write(json.dumps(event) + "\n")

    try:
        for turn in itertools.count():
            for worker, child in enumerate(children):
                if child is None or child.poll() is not None:
                    if child is not None:
                        log(worker, "dead", seconds=time.time(), seen_by=1)
                    children[worker] = subprocess.Popen(["sleep", "100"])
                    lives[worker] += 1
                    folder = run / "workers" / str(worker)
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / ".lock").write_text(f"process {children[worker].pid} on {socket.gethostname()}\n")
                    (run / "members" / f"worker-{worker}-life-{lives[worker]}").write_text(f"127.0.0.1:{worker}\n")
                    log(worker, "start", step=steps[worker])
                steps[worker] += 1
                log(worker, "exchange", worker_step=steps[worker], leader=1)
            if turn == 3:
                log(0, "evaluation", center_error=0.25)
            time.sleep(0.02)
            if stopped:
                sys.exit(128 + signal.SIGTERM)
    finally:
        for child in children:
            child.kill()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["launch", "--processes", number, "--restarts", _, "--", "train", "digits", "--run-dir", run]:
            print("launched with", os.environ["LSGD_LINKS"])
            launch(Path(run), int(number))
        case ["replay", run]:
            print("replayed", run)
        case _:
            sys.exit(f"not understood: {sys.argv[1:]}")
