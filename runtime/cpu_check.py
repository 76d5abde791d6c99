"""What the steps of a program touch, checked before they run: the kernels look at nothing of it.

A step that passes reads and writes inside the buffers, the caches and the file, whatever the file holds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .cpu_library import EPILOGUES, KINDS, LANES, MOST_WIDTH, OPS, PANEL, PROLOGUES, UNIT_VALUES, WEIGHTS, Step

_ROWS_OF = {"codes4": "int8", "codes8": "int8", "pairs": "bf16", "floats": "fp32"}
_PANEL_UNIT = 4 * PANEL  # bytes
_MOST = 1 << 28  # of whatever is counted


@dataclass(frozen=True, slots=True)
class Place:
    """What a program runs in. whole: the kind of rows that attention works on; answers: that of the output."""

    decoder: bool
    output_width: int
    size: int  # of the file of weights
    heads: int
    kv_heads: int
    head_dim: int
    layers: int

    @property
    def whole(self) -> int:
        return 0 if self.decoder else 1

    @property
    def answers(self) -> int:
        return 1 if self.decoder else 2


@dataclass
class Needs:
    """Bytes that buffers must have for each row of a kind, gathered step by step. Raises ValueError."""

    place: Place
    names: Sequence[str]  # of buffers, by number
    sizes: dict[str, dict[int, int]] = field(default_factory=dict)
    _prepared: tuple[str, int, int, int] | None = None

    def add(self, step: Step) -> None:
        """A step's own."""
        if not all(0 <= getattr(step, name) < _MOST for name in ("n", "k", "group", "stride", "column", "layer")):
            raise ValueError("a width is negative or beyond all measure")
        if not 0 <= step.rows <= self.place.answers:
            raise ValueError(f"there are no rows of kind {step.rows}")
        kinds: dict[str, Callable[[Step], None]] = {
            "rows": self._rows,
            "product": self._product,
            "heads": self._heads,
            "attention": self._attention,
            "gather": self._gather,
            "prepend": self._prepend,
        }
        kinds[OPS[step.op]](step)

    def check(self, sizes: Mapping[str, Mapping[int, int]]) -> None:
        """Raise ValueError where buffers are smaller than the steps need, or the output is not the caller's."""
        given = {**sizes, "output": {self.place.answers: 4 * self.place.output_width}}
        if self.sizes.get("output") != given["output"]:
            raise ValueError(f"the steps do not write rows of {self.place.output_width} values to the output")
        for name, needed in self.sizes.items():
            for kind, nbytes in needed.items():
                found = given.get(name, {}).get(kind, 0)
                if found < nbytes:
                    raise ValueError(f"{name} has {found} bytes for a row, and the steps need {nbytes}")
        found_sizes = [(kind, nbytes) for each in sizes.values() for kind, nbytes in each.items()]
        if any(not 0 <= nbytes < _MOST or not 0 <= kind <= self.place.answers for kind, nbytes in found_sizes):
            raise ValueError("a buffer has no rows, or a size, that it can have")

    def need(self, buffer: str, rows: int, nbytes: int) -> None:
        """Note that a buffer is used."""
        sizes = self.sizes.setdefault(buffer, {})
        sizes[rows] = max(sizes.get(rows, 0), nbytes)

    def _named(self, number: int) -> str:
        if not 0 <= number < len(self.names):
            raise ValueError("a step has no buffer to read or to write")
        return self.names[number]

    def _stored(self, start: int, nbytes: int) -> None:
        if start < 0 or start + nbytes > self.place.size:
            raise ValueError(f"{nbytes} bytes from {start} on lie outside a file of {self.place.size}")

    def _rows(self, s: Step) -> None:
        kind, prologue, place = KINDS[s.kind], PROLOGUES[s.prologue], self.place
        read = 2 * s.k if prologue == "swiglu" else s.k
        _require(s.k > 0 and s.n > 0 and s.n % s.k == 0 and s.column + read <= s.stride, "rows")
        self.need(self._named(s.in_), s.rows, 4 * s.stride)
        if prologue.endswith("norm"):
            self._stored(s.w, 4 * s.k)
        if prologue == "layer_norm":
            self._stored(s.b, 4 * s.k)
        _require(not s.skip_first or (not place.decoder and s.rows == place.whole), "rows without the first")
        joined = s.n // s.k
        _require(joined == 1 or bool(s.skip_first), "joined rows")
        if s.out >= 0:
            _require(not s.skip_first, "rows of floats")
            self.need(self._named(s.out), s.rows, 4 * s.k)
            return
        target = place.answers if s.skip_first else s.rows
        _require(joined == 1 or kind != "bf16" or s.k % 2 == 0, "pairs of joined rows")
        self.need("units", target, 4 * _units(kind, s.n))
        group = s.group if kind == "int8" else 0
        if kind == "int8":
            _require(group > 0 and group % 4 == 0 and s.k % group == 0, "groups of rows")
            self.need("scales", target, 4 * (s.n // group))
            self.need("sums", target, 4 * (s.n // group))
        self._prepared = kind, s.n, group, target

    def _product(self, s: Step) -> None:
        kind, weights, gated = KINDS[s.kind], WEIGHTS[s.weights], EPILOGUES[s.epilogue] == "gated"
        group = s.group if kind == "int8" else 0
        _require(self._prepared == (kind, s.k, group, s.rows), "a product of other rows than were prepared")
        four = weights == "codes4"
        _require(_ROWS_OF[weights] == kind and (not four or group % 8 == 0), "weights of another form than the rows")
        _require(s.n > 0 and s.column + s.n <= s.stride, "columns")
        panels = -(-(2 * s.n if gated else s.n) // PANEL)
        self._stored(s.w, panels * _units(kind, s.k) * _PANEL_UNIT >> four)
        if kind == "int8":
            self._stored(s.s, 4 * panels * PANEL * (s.k // group if four else 1))
        if s.b >= 0:
            self._stored(s.b, 4 * panels * PANEL)
        self.need(self._named(s.out), s.rows, 4 * s.stride)

    def _shape(self, s: Step) -> int:
        """Checks the shape of heads; returns the queries' columns."""
        place = self.place
        _require((s.heads, s.kv_heads, s.head_dim) == (place.heads, place.kv_heads, place.head_dim), "heads")
        _require(s.rows == place.whole and s.layer < place.layers, "heads of these rows, or of this layer")
        self.need("queries", s.rows, s.heads * s.head_dim)
        self.need("query_scales", s.rows, 4 * s.heads)
        self.need("query_sums", s.rows, 4 * s.heads)
        return s.heads * s.head_dim

    def _heads(self, s: Step) -> None:
        columns = self._shape(s) + 2 * s.kv_heads * s.head_dim
        _require(columns <= s.stride, "columns of heads")
        self.need(self._named(s.in_), s.rows, 4 * s.stride)
        if s.b >= 0:
            self._stored(s.b, 8 * s.head_dim)

    def _attention(self, s: Step) -> None:
        self.need(self._named(s.out), s.rows, 4 * self._shape(s))

    def _gather(self, s: Step) -> None:
        _require(self.place.decoder and s.rows == 1 and s.k > 0, "rows to gather")
        self.need(self._named(s.in_), 0, 4 * s.k)
        self.need(self._named(s.out), 1, 4 * s.k)

    def _prepend(self, s: Step) -> None:
        _require(not self.place.decoder and s.rows == 1 and s.k > 0, "rows to prepend")
        self.need(self._named(s.in_), 0, 4 * s.k)
        self.need(self._named(s.out), 1, 4 * s.k)
        self._stored(s.w, 4 * s.k)


def check_shape(place: Place, angles: int) -> None:
    """Raise ValueError unless there are heads that the kernels know, and an angle for each pair of a head's columns."""
    _require(0 < place.kv_heads <= place.heads < 1 << 16 and place.heads % place.kv_heads == 0, "groups of heads")
    _require(0 < place.head_dim <= MOST_WIDTH and place.head_dim % LANES == 0, "a head's width")
    _require(2 * angles == place.head_dim, "angles")


def _units(kind: str, values: int) -> int:
    return -(-values // UNIT_VALUES[kind])


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"a step has impossible {what}")
