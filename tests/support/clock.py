"""A clock in the test's hand."""

START = 1_800_000_000.0


class Clock:
    """Stands still until a test sets its `time`, in epoch seconds, or sleeps by it; `slept` are the seconds of each."""

    def __init__(self, time: float = START) -> None:
        self.time = time
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds
