"""Lengths of time as people read them."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """0:07, 3:25, 1:03:25, 2 d 1:03:25."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """The same with its unit where that is not plain: 7.0 s, 3:25 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return clock(seconds) + (" min" if round(seconds) < 3600 else "")
