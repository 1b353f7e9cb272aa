"""The one error of this package: what was expected, what was found, and how to repair it."""

from __future__ import annotations


class DataError(ValueError):
    """Data, or a request for data, that cannot be used as it is.

    Args:
        expected: The invariant, as a noun phrase ("10000 labels").
        found: What stands there instead, naming the file or value.
        repair: The most likely way out, as an instruction.

    Example:
        >>> print(DataError("labels below 10", "label 255 in a.bin", "download the file again"))
        expected labels below 10, but found label 255 in a.bin; download the file again
    """

    def __init__(self, expected: str, found: str, repair: str) -> None:
        # All three go to Exception.args, so that the error survives pickling between processes.
        super().__init__(expected, found, repair)
        self.expected = expected
        self.found = found
        self.repair = repair

    def __str__(self) -> str:
        return f"expected {self.expected}, but found {self.found}; {self.repair}"
