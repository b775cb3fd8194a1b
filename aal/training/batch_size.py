"""The largest batch that fits in memory, found by trying."""

from collections.abc import Callable, Sequence

from aal.memory import MIB
from aal.training import memory_limit
from aal.training.command_line import UserError, print_line
from aal.training.run import Run
from aal.training.trials import Trial, Trials

FRACTION = 32  # a batch that a 32nd would be too much for counts as the largest


def find_batch_size(trials: Trials, run: Run) -> None:
    """Print every batch that is tried, and the largest that fits.

    Args:
        trials: of the run's command line.
        run: whose batch is tried first.

    Raises:
        UserError: nothing fits, or steps go wrong.
    """
    found: dict[int, Trial] = {}

    def fits(batch: int) -> bool:
        trial = trials.attempt("--batch-size", batch)
        if trial is None:
            print_line(f"batch size {batch}: out of memory")
            return False
        found[batch] = trial
        peak = "" if trial.peak is None else f", peak {trial.peak / MIB:.0f} MiB"
        print_line(f"batch size {batch}: fits{peak}, {trial.rate}")
        return True

    least = run.settings.gradient_accumulation_steps
    batch = run.settings.batch_size
    while not fits(batch):
        try:
            smaller = max(batch // 2, least)
            trials.changed("--batch-size", smaller)
        except UserError as error:  # too small to hold a text, say
            if not memory_limit.is_out_of_memory(error.__cause__ or error):
                smaller = batch
        if smaller == batch:
            raise UserError(
                f"not even --batch-size {batch} fits in memory; keep less by --lean exact, --gcp, "
                "a rule or --compress"
            )
        batch = smaller
    guess = 2 * batch
    if fits(guess):
        limit, peaks = memory_limit.limit(run.devices[0]), [found[b].peak for b in (batch, guess)]
        batch = guess
        if limit is not None and None not in peaks and peaks[0] < peaks[1]:
            guess = max(affordable((batch // 2, batch), peaks, limit), batch + 1)
        else:
            guess = 2 * batch
        batch = largest_batch(fits, batch, guess)
    else:
        batch = largest_batch(fits, batch, guess, fails=True)
    print_line(f"largest batch size: {batch}")


def largest_batch(
    fits: Callable[[int], bool], fitting: int, guess: int, fails: bool = False
) -> int:
    """The largest batch that fits, to one part in ``FRACTION``.

    Args:
        fits: tells whether a batch does.
        fitting: a batch that does; 0 if none is known.
        guess: where to look first, above ``fitting``.
        fails: the guess is known not to fit.
    """
    low, high, stride = fitting, guess, max(guess // FRACTION, 1)
    if not fails and fits(guess):
        while fits(high := (low := high) + stride):
            stride *= 2
    else:
        while high - stride > low and not fits(lower := high - stride):
            high, stride = lower, 2 * stride
        low = max(low, high - stride)
    while high - low > max(low // FRACTION, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def affordable(batches: Sequence[int], peaks: Sequence[float], limit: float) -> int:
    """The batch whose peak is ``limit``, on the line through the peaks of two batches."""
    slope = (peaks[1] - peaks[0]) / (batches[1] - batches[0])
    return int(batches[0] + (limit - peaks[0]) / slope)
