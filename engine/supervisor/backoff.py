"""How long to wait before a process that died is started again, and when to stop trying."""

from __future__ import annotations

from collections import deque

#: Delay before the second restart, s, which doubles with each further one; the first is at once.
SECOND_DELAY_S = 0.1
#: Longest delay, s.
LAST_DELAY_S = 10.0
#: A process that was up for so long starts again as if for the first time, s.
HEALTHY_S = 10.0
#: So many deaths within the window, without a healthy life between them, are a crash loop.
LOOP_COUNT = 5
LOOP_WINDOW_S = 60.0


class Backoff:
    """The restarts of one process; times are monotonic seconds given by the caller."""

    def __init__(self) -> None:
        self._delay_s = 0.0
        self._deaths: deque[float] = deque(maxlen=LOOP_COUNT)

    def died(self, now_s: float, lived_s: float) -> float:
        """Note a death after ``lived_s`` seconds of service; return how long to wait before the next start, s."""
        if lived_s >= HEALTHY_S:
            self._delay_s = 0.0
            self._deaths.clear()
        self._deaths.append(now_s)
        delay_s = self._delay_s
        self._delay_s = min(max(self._delay_s * 2, SECOND_DELAY_S), LAST_DELAY_S)
        return delay_s

    @property
    def is_looping(self) -> bool:
        """True if it died so often within the window that there is no point in going on."""
        return len(self._deaths) == LOOP_COUNT and self._deaths[-1] - self._deaths[0] < LOOP_WINDOW_S
