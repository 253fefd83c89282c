"""A task that fails while it runs."""

from dataclasses import dataclass

VERSION = 1
KNOWN_AS = "nothing"


@dataclass(frozen=True)
class Options:
    """What it reads: nothing."""

    data: str = ""


def read(options):
    return None


def run(encoder, data, options, context):
    raise ZeroDivisionError("no sample is left")
