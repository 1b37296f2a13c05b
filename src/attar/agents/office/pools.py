"""What names, titles, hours and texts are drawn from.

Titles, tasks and topics are a word of one list and a word of another, so that hundreds are made of two dozen words, and
no word of one kind is a word of another: a search finds what is meant and nothing else.
"""

from __future__ import annotations

__all__ = [
    "DAYS",
    "DOMAINS",
    "EVENTS",
    "FIRST_NAMES",
    "HOURS",
    "LAST_NAMES",
    "SLOTS",
    "TASKS",
    "TEXTS",
    "TOPICS",
]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(first: str, second: str) -> tuple[str, ...]:
    return tuple(f"{a} {b}" for a in _words(first) for b in _words(second))


DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
HOURS = ("9am", "10am", "11am", "1pm", "2pm", "3pm", "4pm", "5pm")
SLOTS = tuple(f"{day} {hour}" for day in DAYS for hour in HOURS)

FIRST_NAMES = _words(
    "Ana Ben Clara David Emma Felix Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paul Rita Sam Tina Victor "
    "Alice Boris Carl Diana Eric Fiona George Helen Ivan Julia Kevin Laura Mark Nora Olga Peter Rosa Simon Tom Vera"
)
LAST_NAMES = _words(
    "Adams Baker Carter Diaz Evans Fisher Garcia Hughes Irwin Jones Keller Lopez Meyer Nolan Owens Parker "
    "Reed Scott Turner Vogel Walker Young Berg Costa"
)
DOMAINS = ("post.com", "north.com", "blue.net", "river.org", "delta.com", "green.org", "smart.net", "home.org")

EVENTS = _pairs(
    "Budget Sales Design Press Team Client Product Legal Data Safety Market Hiring",
    "review call lunch workshop briefing demo meeting interview",
)
TASKS = _pairs(
    "Sign Print Scan File Check Copy Update Collect",
    "lease invoice contract passport receipts brochure agenda minutes timetable handbook",
)
TOPICS = _pairs(
    "Parking Travel Printer Office Summer Garden Website Holiday Energy Music Kitchen Storage Winter Internet",
    "plan costs form question news offer request survey",
)
TEXTS = tuple(
    f"The {thing} {news}."
    for thing in _words("room report train key car door order letter parcel screen")
    for news in ("is ready", "is late", "has changed", "is lost", "is here now", "needs a check", "comes on Friday")
)
