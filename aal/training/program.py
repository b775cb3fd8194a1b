"""What a train.py does with its command line."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from aal.training import batch_size, memory_limit
from aal.training.command_line import UserError, is_launched
from aal.training.run import Run, execute
from aal.training.trials import Trials, explain, peak_text


def main(make_run: Callable[[Sequence[str]], Run], script: str, arguments: Sequence[str]) -> int:
    """Make a run from its command line and execute it; returns the exit status.

    Args:
        make_run: makes a run from flags, or raises ``UserError``.
        script: path of the train.py.
        arguments: its command line.

    Raises:
        UserError: anything that the user can put right; out of memory, with what would have fitted.
    """
    with ExitStack() as limits:
        limits.enter_context(memory_limit.limited())
        run = _made(make_run, arguments)
        device, processes = run.devices[0], run.processes
        if device.type == "cuda":
            limits.close()
        if run.args.find_batch_size:
            batch_size.find_batch_size(Trials.of(make_run, arguments, run), run)
            return 0
        trials = None if "model_path" in run.args else Trials.of(make_run, arguments, run)
        try:
            return execute(run, script, arguments)
        except Exception as error:
            if not memory_limit.is_out_of_memory(error):
                raise
            text = f"out of memory{peak_text(device)}"
        # Behind the handler, whose error held on to all that there was.
        batch = run.settings.batch_size
        del run
        memory_limit.release()
        if processes > 1 or is_launched():
            raise UserError(f"{text}; keep less by --lean exact, --gcp, a rule or --compress")
        advice = explain(trials, batch) if trials else "use a device with more memory"
        raise UserError(f"{text}; {advice}. Files that were written before are untouched")


def _made(make_run: Callable[[Sequence[str]], Run], arguments: Sequence[str]) -> Run:
    """The run, or ``UserError`` where memory is too small even for its data."""
    try:
        return make_run(arguments)
    except Exception as error:
        if not memory_limit.is_out_of_memory(error):
            raise
        text = f"out of memory before the first step{peak_text(torch.device('cpu'))}"
        raise UserError(f"{text}; free some, or use a smaller network or fewer data") from error
