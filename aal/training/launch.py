"""One process per device, started by the script itself, which watches over them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from aal.training.command_line import ERRORS, LOST, NOTED, ProcessLost, tell
from aal.training.interruption import SIGNALS, STATUSES, Interruption, interrupts_held

_PARENT = "AAL_PARENT"  # in the environment: what cannot be read before the parent has ended
_PATIENCE = 10  # seconds that processes get to end, once another has failed
_MOST_LINES = 3  # that processes may say of their ends


def launch(script: str, arguments: Sequence[str], count: int) -> int:
    """Run ``script`` once per device and return the first bad exit status, or 0.

    When one process fails the others are stopped: they would wait for it for ever. What they say
    of it is told once. Signals are passed on as SIGTERM, which a terminal does not send to the
    processes by itself; its SIGINT waits in them until they save their state.

    Raises:
        ProcessLost: a process was killed, or waited for another in vain.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    theirs, ours = os.pipe()
    lines, errors = os.pipe()
    with Interruption() as interruption:
        for rank in range(count):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, NOTED: 1}
            own |= {_PARENT: theirs, ERRORS: errors}
            environment = os.environ | {name: str(value) for name, value in own.items()}
            command = [sys.executable, script, *arguments]
            with interrupts_held():
                kept = [theirs, errors]
                processes.append(subprocess.Popen(command, env=environment, pass_fds=kept))
        try:
            rank, status = _first_failure(processes, interruption)
            if status in STATUSES:
                for process in processes:  # all of which stop at this step
                    process.wait()
        except KeyboardInterrupt:
            for process in processes:
                process.kill()
            raise
        finally:
            _end(processes)
            os.close(ours)
            os.close(theirs)
            _tell_once(lines)
            os.close(lines)
            os.close(errors)
        if interruption.signal and (status in STATUSES or -status in SIGNALS):
            return 128 + interruption.signal
    if status < 0 or status == LOST:
        raise ProcessLost(f"process {rank + 1} of {count} {_ending(status)}")
    return status


def _tell_once(lines: int) -> None:
    """Tell what processes that have ended wrote to a pipe, and what several wrote only once."""
    os.set_blocking(lines, False)
    content = b""
    with contextlib.suppress(BlockingIOError):  # others might still hold its other end
        while piece := os.read(lines, 2**16):
            content += piece
    for line in list(dict.fromkeys(content.decode().splitlines()))[:_MOST_LINES]:
        tell(line)


def end_with_parent() -> None:
    """Stop this process as by SIGTERM when the ``launch`` that started it has been killed."""
    if _PARENT in os.environ:
        descriptor = int(os.environ[_PARENT])
        threading.Thread(target=_end_after, args=(descriptor,), daemon=True).start()


def _end_after(descriptor: int) -> None:
    os.read(descriptor, 1)  # of a pipe whose other end the system closes
    os.kill(os.getpid(), signal.SIGTERM)


def _ending(status: int) -> str:
    """How a process ended that could not say so itself."""
    if status == LOST:
        return "waited in vain for another one, which hangs or was stopped"
    number = -status
    names = {one.value: one.name for one in signal.Signals}
    text = f"was killed by signal {number} ({names.get(number, 'unknown')})"
    return text + (", perhaps for want of memory" if number == signal.SIGKILL else "")


def _first_failure(
    processes: Sequence[subprocess.Popen], interruption: Interruption
) -> tuple[int, int]:
    """Number and exit status of the process whose end explains the others'; (0, 0) if all is done.

    That is one that was killed, or else one that did not lose another.
    """
    has_told, deadline = False, None
    while True:
        if interruption.signal and not has_told:
            has_told = True
            for process in processes:
                process.terminate()
        statuses = [process.poll() for process in processes]
        failures = [(status, rank) for rank, status in enumerate(statuses) if status]
        causes = [failure for failure in failures if failure[0] != LOST]
        if failures and deadline is None:  # others may be about to end, and lost their connections
            deadline = time.monotonic() + _PATIENCE
        if causes or None not in statuses or (failures and time.monotonic() > deadline):
            status, rank = min(causes or failures, default=(0, 0))
            return rank, status
        time.sleep(0.1)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Stop processes that still run, in the end by force."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
