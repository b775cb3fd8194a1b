"""One process per device, started by the script itself, which watches over them."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from aal.training.command_line import LOST, NOTED, ProcessLost
from aal.training.interruption import SIGNALS, STATUSES, Interruption

_PARENT = "AAL_PARENT"  # in the environment: what cannot be read before the parent has ended
_PATIENCE = 10  # seconds that processes get to end, once another has failed


def launch(script: str, arguments: Sequence[str], count: int) -> int:
    """Run ``script`` once per device and return the first bad exit status, or 0.

    When one process fails the others are stopped: they would wait for it for ever. Signals are
    passed on as SIGTERM, which a terminal does not send to the processes by itself.

    Raises:
        ProcessLost: a process was killed, or waited for another in vain.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    theirs, ours = os.pipe()
    with Interruption() as interruption:
        for rank in range(count):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, NOTED: 1}
            own |= {_PARENT: theirs}
            environment = os.environ | {name: str(value) for name, value in own.items()}
            command = [sys.executable, script, *arguments]
            processes.append(subprocess.Popen(command, env=environment, pass_fds=[theirs]))
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
        if interruption.signal and (status in STATUSES or -status in SIGNALS):
            return 128 + interruption.signal
    if status < 0 or status == LOST:
        raise ProcessLost(f"process {rank + 1} of {count} {_ending(status)}")
    return status


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
