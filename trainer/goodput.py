"""Goodput: what the seconds of a run were spent on, over all its restarts."""
import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping

KINDS = ('stepping', 'data_wait', 'evaluating', 'saving', 'restoring', 'compiling', 'lost')


class Goodput:
    """Seconds by kind, of which 'stepping' is the good one.

    'restoring': all that comes before the first step. 'compiling': the first step of each trace. 'saving': what steps
    wait for it. 'lost': spent on steps that were reported and that a resumed or rolled back run made again.
    """

    def __init__(self):
        self.seconds = Counter()

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[kind] += time.perf_counter() - started

    def spent_on_steps(self, secs: float, wait_secs: float, is_traced: bool) -> None:
        """Counts a loop of steps, which waited for data meanwhile; one that was not traced before has compiled."""
        waited = max(0.0, min(secs, wait_secs)) if is_traced else 0.0  # a clock may be set back
        self.seconds['data_wait'] += waited
        self.seconds['stepping' if is_traced else 'compiling'] += secs - waited

    def resume(self, saved: Mapping[str, float], total: float) -> None:
        """Goes back to the `saved` seconds of a checkpoint; whatever a run of `total` seconds did since is lost."""
        self.seconds = Counter(saved)
        self.seconds['lost'] += max(0.0, total - sum(saved.values()))

    def metrics(self) -> dict[str, float]:
        """'train/secs_<kind>', and 'train/goodput': the part of all seconds that was spent on steps which count."""
        seconds = {f'train/secs_{kind}': float(self.seconds[kind]) for kind in KINDS}
        return seconds | {'train/goodput': self.seconds['stepping'] / max(sum(seconds.values()), 1e-9)}

    def __str__(self) -> str:
        parts = ', '.join(f'{kind.replace("_", " ")} {self.seconds[kind]:.1f} s' for kind in KINDS)
        return f'goodput {100 * self.metrics()["train/goodput"]:.1f} %: {parts}'


def reported_seconds(report: Mapping[str, float]) -> float:
    """The seconds that a run had spent when it made this report."""
    return sum(report.get(f'train/secs_{kind}') or 0.0 for kind in KINDS)
