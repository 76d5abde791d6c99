"""The cpu engine's kernels, step by step, against numpy in float64: sums of codes exactly, of floats to their rounding,
attention within the noise that its INT8 operands are good for. At every instruction set that this CPU runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import stepping
from stepping import ACTIVATION, ACTIVATIONS, EPS, F64, Bench, Form, Matrix

from onevision_edge.engines.cpu import pack
from onevision_edge.runtime import kernels
from onevision_edge.runtime.cpu_library import Library, Pool

FORMS = [
    Form("int8", "codes4", 32),
    Form("int8", "codes4", 128),
    Form("int8", "codes8", 128),
    Form("int8", "codes8", 384),
    Form("int8", "codes8", 128, 0.02),
    Form("bf16", "pairs"),
    Form("fp32", "floats"),
]
CODES = [form for form in FORMS if form.rows == "int8"]
ROWS = [*range(1, 31), 97, 300]
LEVELS = [level.name for level in kernels.levels()]


@pytest.fixture(scope="module")
def pool(compiled: Callable[[str], Library]) -> Pool:
    """Two threads at this CPU's best level."""
    return compiled(LEVELS[0]).pool(2)


@pytest.fixture(scope="module", params=LEVELS)
def level(request: pytest.FixtureRequest, compiled: Callable[[str], Library]) -> Pool:
    """Two threads at each of the levels."""
    return compiled(request.param).pool(2)


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check_product(pool: Pool, form: Form, x: np.ndarray, weights: Matrix, **more: Any) -> None:
    """One product and its epilogue, against numpy."""
    found = stepping.product(pool, x, form, weights, **more)
    wanted, bound = expected(form, x, weights, **more)
    assert np.isfinite(found).all()
    error = np.abs(found - wanted)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), f"{form}, {x.shape}: {found[worst]} is not {wanted[worst]} at {worst}"


def expected(
    form: Form,
    x: np.ndarray,
    weights: Matrix,
    epilogue: str = "write",
    bias: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    y, bound = stepping.multiplied(x, form, weights)
    if bias is not None:
        y = y + bias
        bound = bound + EPS * np.abs(y)
    if epilogue == "add":
        assert out is not None
        return out + y, bound + EPS * np.abs(out + y)
    if epilogue == "gated":  # columns in turn, sixteen of each
        pairs = [m.reshape(len(x), -1, 2, 16) for m in (y, bound)]
        (gate, gate_bound), (up, up_bound) = ([m[:, :, i].reshape(len(x), -1) for m in pairs] for i in (0, 1))
        silu = gate * stepping.sigmoid(gate)
        bound = 1.1 * np.abs(up) * gate_bound + np.abs(silu) * up_bound + ACTIVATION * np.abs(silu * up)
        return silu * up, bound + 1e-30
    if epilogue == "write":
        return y, bound
    return ACTIVATIONS[epilogue](y), 1.13 * bound + ACTIVATION * np.abs(y)  # 1.13: their steepest


# Products


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products_of_any_number_of_rows(pool: Pool, form: Form) -> None:
    """Blocks of every height, and the few rows that read 4-bit codes as they are stored."""
    x, weights = normal(300, 384), Matrix.random(form, 384, 48)
    for rows in ROWS:
        check_product(pool, form, x[:rows], weights)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products_of_any_number_of_columns(pool: Pool, form: Form) -> None:
    """Panels have 32 columns and vectors 16: neither need be full, and nothing is written beside them."""
    x, weights = normal(300, 384), Matrix.random(form, 384, 96)
    for columns in (1, 3, 8, 15, 16, 17, 31, 32, 33, 40, 47, 49, 70, 96):
        for rows in (1, 14, 300) if columns in (3, 40, 96) else (1, 14):
            check_product(pool, form, x[:rows], weights[:columns])


@pytest.mark.parametrize(
    ("form", "inputs"),
    [
        (Form("int8", "codes8", 24), 24),
        (Form("int8", "codes8", 4), 4),
        (Form("int8", "codes8", 588), 588),
        (Form("int8", "codes8", 512), 3584),
        (Form("int8", "codes8", 256, 0.03), 1280),
        (Form("int8", "codes8", 1100), 1100),
        (Form("int8", "codes4", 8), 8),
        (Form("int8", "codes4", 40), 40),
        (Form("int8", "codes4", 32), 4096),
        (Form("int8", "codes4", 128), 1152),
        (Form("bf16", "pairs"), 1),
        (Form("bf16", "pairs"), 3),
        (Form("bf16", "pairs"), 588),
        (Form("bf16", "pairs"), 4096),
        (Form("fp32", "floats"), 1),
        (Form("fp32", "floats"), 17),
        (Form("fp32", "floats"), 1152),
    ],
    ids=str,
)
def test_products_of_any_number_of_inputs(pool: Pool, form: Form, inputs: int) -> None:
    """Groups that no vector divides; panels that take several rounds in a cache; rows that take several stretches."""
    x, weights = normal(300, inputs), Matrix.random(form, inputs, 40)
    for rows in (1, 4, 13, 300):
        check_product(pool, form, x[:rows], weights)


@pytest.mark.parametrize("form", CODES, ids=str)
def test_sums_of_codes_are_exact(level: Pool, form: Form) -> None:
    """Scales that are powers of two make every step after the integers exact, whatever the instruction set."""
    random = np.random.default_rng(3)
    weights = Matrix.random(form, 384, 48)
    assert weights.scales is not None
    scales = 2.0 ** random.integers(-3, 4, weights.scales.shape)
    weights = Matrix(weights.values, scales.astype(np.float32))
    x = random.integers(-127, 128, (26, 384)).astype(np.float32)
    x.reshape(26, -1, form.group)[:, :, 0] = 127  # the scale is 1
    exact = Form(form.rows, form.weights, form.group, 1.0 if form.scale else 0.0)
    wanted = x.astype(F64) @ (weights.values * np.repeat(scales, 384 // len(scales), axis=0))
    for rows in (1, 2, 4, 5, 13, 26):
        np.testing.assert_array_equal(stepping.product(level, x[:rows], exact, weights), wanted[:rows])


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("weights", ["codes4", "codes8"])
def test_sums_of_the_largest_codes_are_exact(level: Pool, weights: str, sign: int) -> None:
    """Where instructions saturate, they do so here; a fixed scale's codes end at 127 on both sides."""
    form = Form("int8", weights, 128, 0.5)
    for w in (-8, 7) if weights == "codes4" else (-128, -127, 127):
        matrix = Matrix(np.full((256, 33), w, np.int8), np.ones((2 if weights == "codes4" else 1, 33), np.float32))
        x = np.full((3, 256), sign * 1e6, np.float32)
        found = stepping.product(level, x, form, matrix)
        np.testing.assert_array_equal(found, np.full((3, 33), 0.5 * 256 * sign * 127 * w))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("epilogue", ["write", "add", "gelu", "gelu_tanh", "quick_gelu", "gated"])
def test_epilogues(level: Pool, form: Form, epilogue: str) -> None:
    x, weights = 0.2 * normal(40, 384), Matrix.random(form, 384, 96)
    for columns in (64, 96) if epilogue == "gated" else (9, 48, 80):
        for bias in (None,) if epilogue == "gated" else (None, normal(columns)):
            for rows in (1, 3, 40):
                out = normal(rows, columns, seed=2) if epilogue == "add" else None
                check_product(level, form, x[:rows], weights[:columns], epilogue=epilogue, bias=bias, out=out)


@pytest.mark.parametrize("epilogue", ["gelu", "gelu_tanh", "quick_gelu", "gated"])
def test_activations_at_their_ends(level: Pool, epilogue: str) -> None:
    """Zero far below, the value itself far above, and never a NaN."""
    ends = [0.0, 1e-40, 1e-20, 1e-3, 0.1, 0.5, 1, 2, 3, 5, 8, 12, 20, 50, 88, 90, 127, 1e4, 1e15, 3e38]
    values = np.float32(ends[:-1] if epilogue == "gated" else ends)
    x = np.concatenate([values, -values])[:, None]
    if epilogue == "gated":
        matrix = Matrix(np.concatenate([np.ones((1, 16)), np.full((1, 16), 0.5)], axis=1).astype(np.float32))
    else:
        matrix = Matrix(np.ones((1, 5), np.float32))
    found = stepping.product(level, x, Form("fp32", "floats"), matrix, epilogue=epilogue)
    y = x.astype(F64)
    wanted = ACTIVATIONS[epilogue](y) if epilogue != "gated" else y * stepping.sigmoid(y) * (0.5 * y)
    bound = ACTIVATION * np.abs(y) * (np.maximum(1, np.abs(y)) if epilogue == "gated" else 1) + 1e-30
    assert not np.isnan(found).any()
    assert ((np.abs(found - wanted) <= bound) | (np.abs(wanted) > 3e38)).all()


@pytest.mark.parametrize("rows", [1, 13, 300])
@pytest.mark.parametrize(("stride", "column"), [(128, 64), (101, 7), (96, 0)])
def test_products_are_written_where_they_belong(pool: Pool, rows: int, stride: int, column: int) -> None:
    """Between other columns, which stay: side by side as queries, keys and values are."""
    form = Form("int8", "codes8", 128)
    x, weights, before = normal(rows, 128), Matrix.random(form, 128, 33), normal(rows, stride, seed=2)
    found = stepping.product(pool, x, form, weights, out=before, column=column)
    inside = np.zeros(stride, bool)
    inside[column : column + 33] = True
    np.testing.assert_array_equal(found[:, ~inside], before[:, ~inside])
    np.testing.assert_array_equal(found[:, inside], stepping.product(pool, x, form, weights))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_row_is_the_same_in_any_block(pool: Pool, form: Form) -> None:
    """Among others or alone: a token's result does not depend on what is computed with it, but for the last bits of
    sums that are ordered differently.
    """
    x, weights = normal(29, 384), Matrix.random(form, 384, 48)
    together = stepping.product(pool, x, form, weights)
    _, bound = stepping.multiplied(x, form, weights)
    for row in (0, 13, 28):
        alone = stepping.product(pool, x[row : row + 1], form, weights)[0]
        assert (np.abs(alone - together[row]) <= 2 * bound[row]).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products_at_every_level(level: Pool, form: Form) -> None:
    x, weights = normal(97, 384), Matrix.random(form, 384, 40)
    for rows in (1, 2, 3, 4, 5, 12, 13, 24, 97):
        check_product(level, form, x[:rows], weights)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_threads_change_no_bit_of_a_product(compiled: Callable[[str], Library], form: Form) -> None:
    x, weights = normal(300, 384), Matrix.random(form, 384, 80)
    for rows in (1, 13, 300):
        found = [stepping.product(compiled(LEVELS[0]).pool(n), x[:rows], form, weights) for n in (1, 2, 3)]
        for other in found[1:]:
            np.testing.assert_array_equal(found[0], other)


def test_no_rows_are_no_work(pool: Pool) -> None:
    form = Form("int8", "codes8", 128)
    bench = Bench([0, 0, 0])
    bench.put("x", np.zeros((1, 128), np.float32))
    out = bench.room("out", 1, 32)
    weights = Matrix.random(form, 128, 32)
    assert weights.scales is not None
    bench.step("rows", in_="x", kind="int8", n=128, k=128, group=128, stride=128)
    bench.step("rows", in_="x", kind="int8", n=512, k=128, group=128, stride=128, skip_first=1)
    w, s = bench.store(weights.packed(form)), bench.store(pack.pack_scales(weights.scales))
    bench.step("product", out="out", kind="int8", weights="codes8", n=32, k=128, group=128, stride=32, w=w, s=s)
    bench.step("gather", in_="x", out="out", k=32)
    bench.run(pool)
    assert np.isnan(out).all()


# Rows: what a product reads is seen by multiplying it with the identity.


@dataclass(frozen=True)
class Prologue:
    """What happens to rows [rows, k], or [rows, 2 k], before they are rounded."""

    name: str
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    eps: float = 1e-6

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if self.name == "rms_norm":
            assert self.weight is not None
            return stepping.rms_norm(x, self.weight, self.eps)
        if self.name == "layer_norm":
            assert self.weight is not None
            assert self.bias is not None
            return stepping.layer_norm(x, self.weight, self.bias, self.eps)
        if self.name == "swiglu":
            gate, up = np.split(x.astype(F64), 2, axis=-1)
            return gate * stepping.sigmoid(gate) * up
        return x.astype(F64)

    def settings(self, bench: Bench) -> dict[str, Any]:
        places = {"w": self.weight, "b": self.bias}
        return {"prologue": self.name, "eps": self.eps} | {
            name: bench.store(array) for name, array in places.items() if array is not None
        }


def prologue(name: str, k: int) -> Prologue:
    if name == "rms_norm":
        return Prologue(name, 1 + 0.1 * normal(k, seed=5))
    if name == "layer_norm":
        return Prologue(name, 1 + 0.1 * normal(k, seed=5), 0.1 * normal(k, seed=6), 1e-5)
    return Prologue(name)


PROLOGUES = ["as_is", "rms_norm", "layer_norm", "swiglu"]


def prepared(
    pool: Pool,
    x: np.ndarray,
    kind: str,
    before: Prologue,
    *,
    group: int = 0,
    scale: float = 0.0,
    joined: int = 1,
    images: int = 0,
    column: int = 0,
) -> np.ndarray:
    """Rows as a product finds them. images: leave out the first row of each of so many."""
    width = x.shape[1] - column
    k = width // 2 if before.name == "swiglu" else width
    n, group = k * joined, group or k
    count = (len(x) - images) // joined
    bench = Bench([len(x), count], sequences=images, tokens=len(x) // max(1, images))
    bench.rows_for(kind, count, n, group)
    bench.put("x", x)
    out = bench.room("out", count, n)
    settings = {"kind": kind, "n": n, "k": k, "group": group, "stride": x.shape[1], "column": column, "scale": scale}
    bench.step("rows", in_="x", skip_first=int(images > 0), **settings, **before.settings(bench))
    form = Form(kind, {"int8": "codes8", "bf16": "pairs", "fp32": "floats"}[kind], group, scale)
    one = np.eye(n, dtype=np.int8 if kind == "int8" else np.float32)
    places = {"w": bench.store(Matrix(one).packed(form))}
    if kind == "int8":
        places["s"] = bench.store(pack.pack_scales(np.ones((1, n), np.float32)))
    bench.step("product", rows=1, out="out", kind=kind, weights=form.weights, n=n, k=n, group=group, stride=n, **places)
    bench.run(pool)
    assert not np.isnan(out).any()
    return out


@pytest.mark.parametrize("k", [4, 16, 36, 96, 256])
def test_codes_of_rows_are_those_of_the_definition(level: Pool, k: int) -> None:
    """Largest magnitude of a group / 127, rounded half to even, bit for bit; or a fixed scale."""
    x = normal(30, k) * (10.0 ** np.arange(-15, 15)).astype(np.float32)[:, None]
    x[3], x[4, : k // 2], x[5, 1:] = 0, 0, 0
    for group in {k, k // 2 if k % 8 == 0 else k}:
        for rows in (1, 5, 30):
            codes, scales = stepping.rounded(x[:rows], group)
            wanted = (codes * scales[..., None]).reshape(rows, k)
            np.testing.assert_array_equal(prepared(level, x[:rows], "int8", Prologue("as_is"), group=group), wanted)
    codes, _ = stepping.rounded(x, k, 0.25)
    np.testing.assert_array_equal(
        prepared(level, x, "int8", Prologue("as_is"), scale=0.25), (codes * 0.25).reshape(x.shape)
    )


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("k", [1, 5, 16, 33, 588])
def test_floats_of_rows_are_rounded_half_to_even(level: Pool, kind: str, k: int) -> None:
    x = normal(14, k)
    x[:, 0] = np.float32([1.00390625, 1.01171875, -1.00390625, 0, -0.0, 1, 2, 3, 1e30, -1e30, 3e-38, 5, 6, 7])
    wanted = stepping.bf16(x) if kind == "bf16" else x
    for rows in (1, 14):
        np.testing.assert_array_equal(prepared(level, x[:rows], kind, Prologue("as_is")), wanted[:rows])


# Of a normalised or gated row, relative to its largest value: sums of squares, a root and a quotient in float32.
NORM = 3e-6


@pytest.mark.parametrize("name", PROLOGUES)
@pytest.mark.parametrize("kind", ["int8", "bf16", "fp32"])
def test_prologues(level: Pool, kind: str, name: str) -> None:
    for k in (20, 64, 200):
        before = prologue(name, k)
        x = 3 * normal(30, 2 * k if name == "swiglu" else k)
        x[7] = 0
        x[8] *= 1e-4
        x[9] *= 1e4
        wanted = before(x)
        most = np.abs(wanted).max(-1, keepdims=True)
        step = {"int8": most / 254, "bf16": 2.0**-8 * np.abs(wanted), "fp32": 0}[kind]
        for rows in (1, 2, 30):
            found = prepared(level, x[:rows], kind, before)
            error, bound = np.abs(found - wanted[:rows]), np.broadcast_to(step + NORM * most, wanted.shape)[:rows]
            assert (error <= bound).all(), (k, rows, np.argwhere(error > bound)[:4])


@pytest.mark.parametrize("name", PROLOGUES)
def test_huge_and_tiny_rows_give_numbers(level: Pool, name: str) -> None:
    """Squares that overflow or vanish in float32, codes' scales that vanish: never a NaN (`prepared` looks)."""
    for k in (16, 40):
        x = normal(12, 2 * k if name == "swiglu" else k)
        x *= np.float32([3e37, 1e30, 1e20, 1e10, 1, 1e-10, 1e-20, 1e-30, 1e-37, 1e-39, 1e-43, 0])[:, None]
        if name == "swiglu":
            x[:, k:] = np.clip(x[:, k:], -1, 1)  # or the product itself is too large
        for kind in ("int8", "bf16", "fp32"):
            found = prepared(level, x, kind, prologue(name, k))
            assert np.isfinite(found).all()
        if name == "as_is":
            assert (np.abs(prepared(level, x, "int8", prologue(name, k)) - x) <= np.abs(x).max(-1, keepdims=True)).all()


def test_rows_begin_at_a_column(level: Pool) -> None:
    x = normal(9, 40)
    for kind in ("bf16", "fp32"):
        found = prepared(level, x, kind, Prologue("as_is"), column=8)
        np.testing.assert_array_equal(found, stepping.bf16(x[:, 8:]) if kind == "bf16" else x[:, 8:])


@pytest.mark.parametrize("kind", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("images", [1, 3])
def test_rows_of_images_are_joined_without_their_first(level: Pool, kind: str, images: int) -> None:
    """As the merger reads patches: four rows make one, the class token is left out."""
    k, patches = 32, 12
    before = prologue("layer_norm", k)
    x = normal(images * (1 + patches), k)
    found = prepared(level, x, kind, before, group=k, joined=4, images=images)
    wanted = before(x.reshape(images, 1 + patches, k)[:, 1:].reshape(-1, k))
    step = {"int8": np.abs(wanted).max(-1, keepdims=True) / 254, "bf16": 2.0**-8 * np.abs(wanted), "fp32": 0}[kind]
    bound = np.broadcast_to(step + NORM * np.abs(wanted).max(), wanted.shape)
    assert found.shape == (images * patches // 4, 4 * k)
    assert (np.abs(found.reshape(wanted.shape) - wanted) <= bound).all()


@pytest.mark.parametrize("name", PROLOGUES[1:])
def test_rows_of_floats_go_to_a_buffer(level: Pool, name: str) -> None:
    k = 52
    before, x = prologue(name, k), normal(30, 2 * k if name == "swiglu" else k)
    bench = Bench([30])
    bench.put("x", x)
    out = bench.room("out", 30, k)
    bench.step("rows", in_="x", out="out", kind="fp32", n=k, k=k, stride=x.shape[1], **before.settings(bench))
    bench.run(level)
    assert np.abs(out - before(x)).max() < NORM * np.abs(before(x)).max()


def test_gathered_and_prepended_rows_are_copies(level: Pool) -> None:
    x, first = normal(2 * 5, 37), normal(37, seed=2)
    bench = Bench([10, 4, 12], sequences=2, tokens=6, indices=[9, 0, 3, 3])
    bench.put("x", x)
    chosen, joined = bench.room("chosen", 4, 37), bench.room("joined", 12, 37)
    bench.step("gather", rows=1, in_="x", out="chosen", k=37)
    bench.step("prepend", rows=2, in_="x", out="joined", k=37, w=bench.store(first))
    bench.run(level)
    np.testing.assert_array_equal(chosen, x[[9, 0, 3, 3]])
    for image in (0, 1):
        np.testing.assert_array_equal(joined[6 * image], first)
        np.testing.assert_array_equal(joined[6 * image + 1 : 6 * image + 6], x[5 * image : 5 * image + 5])


# Attention


@dataclass
class Heads:
    """Attention on the kernels: a cache of codes, which holds anything at first, and calls that go on in it."""

    pool: Pool
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    capacity: int = 640
    causal: bool = True
    eps: float = 1e-6
    normed: bool = True
    fill: int | None = None  # the cache's first bytes; None: any

    def __post_init__(self) -> None:
        size = 2 * self.batch * self.kv_heads * self.capacity * (self.head_dim + 4)
        cache = np.random.default_rng(9).integers(0, 256, size, np.uint8)
        if self.fill is not None:
            cache[:] = self.fill
        self.cache = np.split(cache, 2)
        d, random = self.head_dim, np.random.default_rng(10)
        self.norms = 1 + 0.1 * random.standard_normal((2, d)).astype(np.float32) if self.normed else None
        empty = np.zeros((self.batch, 0, self.kv_heads, d))
        self.seen = [[keys[i] for i in range(self.batch)] for keys in (empty, empty)]

    def __call__(self, x: np.ndarray, starts: Any = 0, angles: np.ndarray | None = None) -> np.ndarray:
        """x [batch, tokens, heads + 2 kv_heads, d], as a product leaves queries, keys and values."""
        batch, tokens, columns, d = x.shape
        rows, begin = batch * tokens, np.broadcast_to(starts, batch)
        angles = self.angles(x, begin) if angles is None else angles
        bench = Bench([rows], batch, tokens, begin.tolist(), angles=angles, capacity=self.capacity)
        bench.keys, bench.values = [self.cache[0]], [self.cache[1]]
        bench.put("x", x.reshape(rows, -1))
        bench.room("queries", rows, self.heads * d, dtype=np.uint8)
        bench.room("query_scales", rows, self.heads)
        bench.room("query_sums", rows, self.heads, dtype=np.int32)
        out = bench.room("out", rows, self.heads * d)
        shape = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": d}
        norms = {} if self.norms is None else {"b": bench.store(self.norms), "eps": self.eps}
        bench.step("heads", in_="x", stride=columns * d, scale=d**-0.5, **shape, **norms)
        bench.step("attention", out="out", causal=int(self.causal), **shape)
        bench.run(self.pool)
        return out.reshape(batch, tokens, self.heads, d)

    def angles(self, x: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Of each token's position."""
        frequencies = 1e4 ** -(np.arange(self.head_dim // 2) / (self.head_dim // 2))
        positions = (starts[:, None] + np.arange(x.shape[1])).reshape(-1, 1)
        return (positions * frequencies).astype(np.float32)

    def wanted(self, x: np.ndarray, starts: Any = 0) -> tuple[np.ndarray, np.ndarray]:
        """The same in float64 without any rounding, and the deviation that the codes are expected to add to it."""
        batch, tokens = x.shape[:2]
        begin = np.broadcast_to(starts, batch)
        angles = self.angles(x, begin).astype(F64).reshape(batch, tokens, 1, -1)
        q, k, v = np.split(x.astype(F64), [self.heads, self.heads + self.kv_heads], axis=2)
        if self.norms is not None:
            q, k = (stepping.rms_norm(y, weight, self.eps) for y, weight in ((q, self.norms[0]), (k, self.norms[1])))
        q, k = rotated(q, angles), rotated(k, angles)
        out, noise = np.empty_like(q), np.empty_like(q)
        for i, start in enumerate(begin):
            for kept, new in zip(self.seen, (k, v), strict=True):
                kept[i] = np.concatenate([kept[i][:start], new[i]])
            limits = start + np.arange(tokens) + 1 if self.causal else np.full(tokens, start + tokens)
            for h in range(self.heads):
                head = h // (self.heads // self.kv_heads)
                out[i, :, h], noise[i, :, h] = attended(
                    q[i, :, h], self.seen[0][i][:, head], self.seen[1][i][:, head], limits
                )
        return out, noise


def rotated(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attention of one head in float64, and the deviation of each value that INT8 codes are expected to cause.

    A code is off by up to half its step, evenly: by step / sqrt(12) as a deviation. Of queries and keys that makes
    an error of each score, which moves the weight of a value by its share; values have one of their own; weights are
    bytes under one scale for a tile (of 1 / 127, the coarsest), times the values' scales.
    """
    d = q.shape[1]
    scores = np.where(np.arange(len(k)) < limits[:, None], q @ k.T / np.sqrt(d), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ v
    step = {name: np.abs(x).max(-1) / 127 / np.sqrt(12) for name, x in (("q", q), ("k", k), ("v", v))}
    score = (
        np.square(k).sum(-1) * np.square(step["q"])[:, None] + np.square(q).sum(-1)[:, None] * np.square(step["k"])
    ) / d
    square = np.square(weights) * score  # of the weights, from the scores
    noise = square @ np.square(v) - 2 * out * (square @ v) + np.square(out) * square.sum(-1, keepdims=True)
    noise += np.square(weights) @ np.square(step["v"])[:, None]
    seen = np.arange(len(k)) < limits[:, None]
    largest = weights.max(-1) * np.max(np.where(seen, np.abs(v).max(-1), 0), -1)
    codes = np.square(v / np.maximum(np.abs(v).max(-1, keepdims=True), 1e-30))
    noise += np.square(largest / 127 / np.sqrt(12))[:, None] * (seen @ codes)
    return out, np.sqrt(noise)


def check_attention(heads: Heads, x: np.ndarray, starts: Any = 0) -> np.ndarray:
    """One call, against numpy. Errors in deviations of the estimate: see WORST and TYPICAL."""
    found = heads(x, starts)
    wanted, noise = heads.wanted(x, starts)
    assert np.isfinite(found).all()
    z = (found - wanted) / (noise + 1e-6)
    assert np.abs(z).max() < WORST, f"{x.shape} from {starts}: {np.abs(z).max():.1f} deviations at {z.argmax()}"
    assert np.sqrt(np.square(z).mean()) < TYPICAL, f"{x.shape} from {starts}: {np.sqrt(np.square(z).mean()):.2f}"
    return z


WORST, TYPICAL = 6.0, 1.3


def heads_of(random: np.random.Generator, heads: Heads, tokens: int) -> np.ndarray:
    """Queries, keys and values; keys share a direction, as those of trained models do."""
    shape = (heads.batch, tokens, heads.heads + 2 * heads.kv_heads, heads.head_dim)
    return random.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("start", [0, 1, 63, 64, 127, 128, 300])
def test_attention_from_any_row_over_any_number_of_tokens(pool: Pool, start: int) -> None:
    """Blocks of queries, tiles of keys and the edge of what is seen, in every position to each other."""
    random, z = np.random.default_rng(start), []
    for tokens in (*range(1, 10), 47, 48, 49, 100, 200):
        heads = Heads(pool, 4, 2, 64)
        if start:
            check_attention(heads, heads_of(random, heads, start))
        z.append(check_attention(heads, heads_of(random, heads, tokens), start).ravel())
    mean = np.concatenate(z)
    assert np.sqrt(np.square(mean).mean()) < 1.1
    assert abs(mean.mean()) < 0.05


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_attention_of_any_shape_of_heads(pool: Pool, head_dim: int, group: int) -> None:
    random = np.random.default_rng(group)
    heads = Heads(pool, 2 * group, 2, head_dim, capacity=256)
    start = 0
    for tokens in (70, 1, 2, 60, 1):  # prefill, decode, a chunk that crosses a tile, decode
        check_attention(heads, heads_of(random, heads, tokens), start)
        start += tokens


@pytest.mark.parametrize("tokens", [1, 5, 60])
def test_sequences_of_a_batch_have_rows_of_their_own(pool: Pool, tokens: int) -> None:
    random = np.random.default_rng(0)
    heads = Heads(pool, 4, 2, 32, batch=2, capacity=256)
    check_attention(heads, heads_of(random, heads, 130))
    x = heads_of(random, heads, tokens)
    check_attention(heads, x, [130, 7])
    alone = Heads(pool, 4, 2, 32, capacity=256)
    random = np.random.default_rng(0)
    alone(heads_of(random, heads, 130)[1:])
    again = Heads(pool, 4, 2, 32, batch=2, capacity=256)
    again(heads_of(np.random.default_rng(0), heads, 130))
    np.testing.assert_array_equal(alone(x[1:], 7)[0], again(x, [130, 7])[1])


@pytest.mark.parametrize("images", [1, 2])
def test_images_see_all_of_themselves(pool: Pool, images: int) -> None:
    """Without normalisation, as in the tower: 577 rows, and few."""
    random = np.random.default_rng(0)
    for rows, head_dim in ((577, 64), (5, 16), (129, 80)):
        heads = Heads(pool, 2, 2, head_dim, batch=images, causal=False, normed=False)
        check_attention(heads, heads_of(random, heads, rows))


def test_attention_at_every_level(level: Pool) -> None:
    random = np.random.default_rng(0)
    for causal, head_dim, group in ((True, 80, 4), (True, 128, 2), (False, 16, 1)):
        heads = Heads(level, 2 * group, 2, head_dim, capacity=256, causal=causal)
        check_attention(heads, heads_of(random, heads, 140))
        if causal:
            check_attention(heads, heads_of(random, heads, 1), 140)
            check_attention(heads, heads_of(random, heads, 9), 126)


def test_sharp_attention_picks_its_value(level: Pool) -> None:
    """A key far ahead of all others, in the first tile, the middle and the last: its value comes out.

    To half a step of its own codes, and half one of its weight's, which is a byte in terms of the largest values.
    """
    for place in (0, 70, 128, 199):
        heads = Heads(level, 4, 2, 32, normed=False)
        x = normal(1, 200, 8, 32)
        x[:, :, :4], x[:, :, 4:6] = 0.1, -20
        x[:, 199, :4], x[:, place, 4:6] = 30, 30
        found = heads(x, angles=np.zeros((200, 16), np.float32))[0, 199]
        for h in range(4):
            values = x[0, :, 6 + h // 2]
            assert np.abs(found[h] - values[place]).max() <= np.abs(values).max() / 127 + 1e-3


def test_weights_of_attention_have_no_bias(level: Pool) -> None:
    """Codes that are exact, scores over a power of two, values of 0 and 1: what is left is the exponential's error.

    2^x is within 1e-4, and rounding a weight to a byte (by up to 0.8 % of it) is even out over 256 keys to 5e-4.
    """
    heads = Heads(level, 4, 2, 16, normed=False)
    x, codes = np.zeros((1, 256, 8, 16), np.float32), np.arange(256) % 128
    power = 4 / (127 * 127 * np.log2(np.e))
    x[..., :4, 0] = 127 * power
    x[..., 4:6, 0], x[..., 4:6, 1] = codes[:, None], 127
    groups = codes // 16 % 8  # of equal fractions
    x[..., 6:, :] = (groups[:, None] == np.arange(16))[:, None, :]
    x[..., 6:, 15] = 1
    found = heads(x, angles=np.zeros((256, 8), np.float32))[0, 255]
    weights = 2.0 ** (codes / 127)
    shares = np.array([weights[groups == group].sum() for group in range(8)]) / weights.sum()
    assert np.abs(found[:, :8] / shares - 1).max() < 3e-3
    assert np.abs(found[:, 15] - 1).max() < 1e-3
    assert np.abs(np.cumsum(found[:, :8], axis=1) - np.cumsum(shares)).max() < 5e-4


def test_what_a_cache_held_before_does_not_matter(level: Pool) -> None:
    """Codes and scales beyond the rows that are valid: zeros, NaN (255), any bytes."""
    for causal, starts in ((True, (0, 66)), (False, (0,))):
        found = []
        for fill in (0, 255, 0x7F, None):
            heads = Heads(level, 4, 2, 64, capacity=256, causal=causal, fill=fill)
            random = np.random.default_rng(0)
            found.append([heads(heads_of(random, heads, 66 if start == 0 else 3), start) for start in starts])
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                np.testing.assert_array_equal(a, b)


def test_zeros_and_extremes_give_numbers(level: Pool) -> None:
    """A token whose embedding is zero has queries, keys and values of zero; and heads may be huge or tiny."""
    for factor in (0, 1e-43, 1e-30, 1e15):
        for normed in (True, False) if factor < 1e15 else (True,):
            for tokens in (1, 3, 70):
                heads = Heads(level, 4, 2, 32, normed=normed)
                x = normal(1, tokens, 8, 32)
                x[:, tokens // 2] *= np.float32(factor)
                found = heads(x)
                assert np.isfinite(found).all(), (factor, normed, tokens)
                assert np.abs(found).max() <= 1.01 * np.abs(x[:, :, 6:]).max()


def test_chunks_are_what_the_whole_is(level: Pool) -> None:
    """Attention of a prompt in one call, in sevens and token by token."""
    x = heads_of(np.random.default_rng(0), Heads(level, 4, 2, 32), 150)
    whole = Heads(level, 4, 2, 32)(x)
    _, noise = Heads(level, 4, 2, 32).wanted(x)
    for chunk in (7, 1):
        heads = Heads(level, 4, 2, 32)
        parts = [heads(x[:, i : i + chunk], i) for i in range(0, 150, chunk)]
        assert (np.abs(np.concatenate(parts, axis=1) - whole) / (noise + 1e-6)).max() < WORST


def test_threads_change_no_bit_of_attention(compiled: Callable[[str], Library]) -> None:
    for tokens in (1, 5, 200):
        found = []
        for threads in (1, 2, 3):
            heads = Heads(compiled(LEVELS[0]).pool(threads), 8, 2, 64)
            random = np.random.default_rng(0)
            heads(heads_of(random, heads, 130))
            found.append(heads(heads_of(random, heads, tokens), 130))
        for other in found[1:]:
            np.testing.assert_array_equal(found[0], other)
