"""How far a generation is, in plain lines."""

import time
from collections import Counter
from collections.abc import Callable

from .samples import SamplesFile

Say = Callable[[str], None]
_SECONDS_BETWEEN = 10


class Progress:
    """Says how many problems are done, how many come a minute, and what time is left.

    Args:
        file: The samples.
        num_samples: Samples of each problem.
        num_problems: How many problems there are.
        say: Takes one line at a time.
    """

    def __init__(self, file: SamplesFile, num_samples: int, num_problems: int, say: Say) -> None:
        self.file, self.num_samples, self.num_problems, self.say = file, num_samples, num_problems, say
        self.at_start, self.started = len(file.samples), time.monotonic()
        self.told = self.latest = self.started

    def tell(self, at_once: bool = False) -> None:
        """Say a line, unless the last one is less than ten seconds old. To be called before each sample is added.

        The rate is that up to the sample before, and so of whole batches where samples come in batches.
        """
        now = time.monotonic()
        if at_once or now - self.told >= _SECONDS_BETWEEN:
            self.told = now
            self.say(self.line(self.latest - self.started))
        self.latest = now

    def line(self, seconds: float) -> str:
        """The line, given the seconds since the start."""
        samples = self.file.samples
        wanted = self.num_problems * self.num_samples
        of_row = Counter(row for row, _ in samples)
        done = sum(number == self.num_samples for number in of_row.values())
        a_minute = (len(samples) - self.at_start) / self.num_samples / max(seconds, 1e-9) * 60
        text = f"{done} of {self.num_problems} problems"
        if a_minute > 0:
            left = (wanted - len(samples)) / self.num_samples / a_minute
            text += f", {a_minute:.3g} a minute, about {_duration(left)} left"
        judged = [sample for sample in samples.values() if sample.verdict is not None]
        if judged:
            passed = sum(sample.is_verified for sample in judged)
            text += f"; {passed / len(judged):.1%} of the samples pass"
        return text


def _duration(minutes: float) -> str:
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min"
