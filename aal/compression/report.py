"""What became of every tensor that autograd saved."""

from dataclasses import dataclass

MIB = 2**20


@dataclass
class Row:
    """One saved tensor of a forward pass.

    Args:
        site: module, and number of the tensor within it.
        consumer: node of the graph that saved it.
        codec: how it is kept.
        bits: per element, side numbers apart; None for a tensor that is kept as it is.
        raw_bytes: of the storage that the tensor holds; 0 if a row before holds it already, or
            the caller does.
        stored_bytes: of what is kept of it; 0 where a row before keeps the same.
        note: why it is kept, or what the consumer does with it.
    """

    site: str
    consumer: str
    codec: str
    bits: float | None
    raw_bytes: int
    stored_bytes: int
    note: str


@dataclass
class Report:
    """Saved tensors in the order of their sites; ``str()`` draws the table."""

    rows: list[Row]

    @property
    def raw_bytes(self) -> int:
        return sum(row.raw_bytes for row in self.rows)

    @property
    def stored_bytes(self) -> int:
        return sum(row.stored_bytes for row in self.rows)

    def __str__(self) -> str:
        head = ("site", "consumer", "codec", "bits", "raw MiB", "kept MiB", "note")
        lines = [head, *(_cells(row) for row in self.rows)]
        total = ("total", "", "", "", _mib(self.raw_bytes), _mib(self.stored_bytes), "")
        lines.append(total)
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(
                cell.rjust(width) if 3 <= i <= 5 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        ruler = "-" * max(len(line) for line in text)
        return "\n".join([text[0], ruler, *text[1:-1], ruler, text[-1]])


def _cells(row: Row) -> tuple[str, ...]:
    bits = "" if row.bits is None else f"{row.bits:g}"
    sizes = (_mib(row.raw_bytes), _mib(row.stored_bytes))
    return row.site, row.consumer, row.codec, bits, *sizes, row.note


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.3f}"
